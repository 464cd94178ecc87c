"""Where weights lie under the distribution in force: what its layout map says of them, and what follows for the rest.

A layout map of Keras's answers by the path of a variable, once, while the variable is made. That is right for a weight
that the map names. What the map does not name follows what it belongs to: the use that the map names, or the base that
a form has made it for. So every verb that makes weights, or a variable in the place of an expression, asks here when it
is known what the weight is for. Nothing is asked without a layout map, that is without JAX and `ModelParallel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import keras

from tether import keras_seam
from tether.weights.algebra import MADE
from tether.weights.expression import Expression, Node, Shape, Stored, known_shape, program
from tether.weights.layouts import Spec, Traced, fitted, whole
from tether.weights.operators.indexing import Gather
from tether.weights.operators.quantized import Dequantize


def asked_for(path: str, shape: Shape, *, entry: bool = False, made: bool = False) -> Spec | None:
    """What the layout map in force says of a path; `None` if it says nothing, or nothing that fits the shape.

    Args:
        path: The path of a variable, or of a use.
        shape: Its shape.
        entry: Whether it is a stack of weights, of which the map may name one: the stack's own axis is whole then.
        made: Whether it is a weight that was made for another one.
    """
    layouts = keras_seam.layout_map()
    layout = None if layouts is None else answer(layouts, path, made=made)
    if layout is None:
        return None
    found: Spec = tuple(layout.axes)
    if entry and len(found) == len(shape) - 1:
        found = (None, *found)
    return found if len(found) == len(shape) and _names_axes(found) else None


def answer(
    layouts: keras.distribution.LayoutMap, path: str, *, made: bool = False
) -> keras.distribution.TensorLayout | None:
    """What a map says of a path; nothing, if several of its patterns fit: Keras refuses a variable of that path.

    In Keras 3.13 a key is for all that it is a piece of: `up/kernel` would be for `up/kernel_lora_a`, which has other
    axes. So what was made for another weight has to be named as a whole.
    """
    if made and not hasattr(layouts, "answer"):
        keys = [path] if path in list(layouts) else [key for key in layouts if re.fullmatch(key, path)]
        return layouts[keys[0]] if len(keys) == 1 else None
    try:
        return layouts[path]
    except ValueError:
        return None


def _names_axes(spec: Iterable[object]) -> bool:
    return all(name is None or isinstance(name, str) for name in spec)


def is_base(weight: Stored) -> bool:
    """Whether a weight is none that was made for another one."""
    return weight.role not in MADE


def standing(expression: Expression) -> Iterator[tuple[str, Node]]:
    """The steps of an expression that are a weight in integers, with the path of that weight."""
    for step in program(expression):
        node = step.expression
        if isinstance(node, Dequantize):
            path = next((each.stands_for for each in node.operands[0].weights_used()), None)
            if path is not None:
                yield path, node


def at_creation(weight: Stored, shape: Shape) -> Spec | None:
    """The layout to make a weight's variable with; `None` to leave it to Keras, which asks the map by its path.

    Keras takes whatever the map says: a layout of another rank, or of an axis that the devices cannot divide, is an
    error of JAX's then, which names neither.
    """
    layouts = keras_seam.layout_map()
    if layouts is None:
        return None
    made = weight.role is not None
    layout = answer(layouts, weight.path, made=made)
    if layout is None:
        known = weight.lies if weight.lies is not None and len(weight.lies) == len(shape) else None
        return whole(len(shape)) if known is None and made else known
    asked = asked_for(weight.path, shape, made=made)
    found = whole(len(shape)) if asked is None else fitted(asked, shape, keras_seam.mesh_sizes(layouts.device_mesh))
    return None if found == tuple(layout.axes) and not made else found


def layout_for(weight: Stored, expression: Expression | None = None) -> Spec | None:
    """The layout that a weight has by itself: the map names its path, or something has laid it out before.

    Args:
        weight: A weight of a known shape.
        expression: What it is used in.
    """
    present = keras_seam.layout_of(weight.variable) if weight.is_built else weight.lies
    if present is not None and any(present):
        return present
    shape = known_shape(weight)
    entry = expression is not None and is_read_by_entry(weight, expression)
    return asked_for(weight.path, shape, entry=entry, made=weight.role is not None)


def is_read_by_entry(weight: Stored, expression: Expression) -> bool:
    """Whether an expression reads entries of a weight along its first axis, as a bank does."""
    nodes = (step.expression for step in program(expression))
    return any(
        isinstance(node, Gather) and node.operands[0] is weight and node.parameters["axis"] == 0 for node in nodes
    )


# --------------------------------------------------------------------------- what follows


def traced(path: str, expression: Expression) -> Traced | None:
    """A use with all that is known of its layout: by the layouts of its bases, and by the name of the use itself.

    `None` if nothing is: without a layout map in force, or before its weights have their shapes.
    """
    layouts = keras_seam.layout_map()
    if layouts is None or expression.shape is None:
        return None
    bases: dict[Expression, Spec | None] = {
        weight: layout_for(weight, expression) for weight in expression.weights_used() if is_base(weight)
    }
    bases.update((node, asked_for(path, node.shape or ())) for path, node in standing(expression))
    asked = asked_for(path, expression.shape)
    return tracing(expression, asked, bases, keras_seam.mesh_sizes(layouts.device_mesh))


def tracing(
    expression: Expression, asked: Spec | None, bases: Mapping[Expression, Spec | None], sizes: Mapping[str, int]
) -> Traced | None:
    """A use with what is known of its layout; `None` if nothing is.

    Args:
        expression: What the layer computes with.
        asked: What is said of the use itself.
        bases: The layouts of its weights that are no parts of others, or of other steps, as far as they are known.
        sizes: How many devices each axis of the mesh has.
    """
    known = {step: spec for step, spec in bases.items() if spec is not None}
    if asked is None and not known:
        return None
    found = Traced(expression, sizes)
    for step, spec in known.items():
        found.say(spec, step)
    if asked is not None:
        value = found.value
        found.say(tuple(None if name in value else name for name in asked))
    return found


def follow(path: str, expression: Expression) -> None:
    """Lays out what a use reads and the layout map does not name: by the use, or by the base that it was made for.

    Args:
        path: The path of the use: that of the variable that the layer would have.
        expression: What the layer computes with.
    """
    if keras_seam.layout_map() is None:
        return
    found = traced(path, expression)
    if found is not None:
        _lay_out(found, expression)


def follow_from(spec: Spec | None, expression: Expression) -> None:
    """Lays out the weights that store from now on what lay in a known way: integers and their scale, for example."""
    layouts = keras_seam.layout_map()
    if layouts is None or spec is None or expression.shape is None:
        return
    found = Traced(expression, keras_seam.mesh_sizes(layouts.device_mesh))
    found.say(spec)
    _lay_out(found, expression)


def _lay_out(found: Traced, expression: Expression) -> None:
    layouts = keras_seam.layout_map()
    if layouts is None:
        return
    for weight in expression.weights_used():
        own = layout_for(weight, expression)
        if own is None or is_read_by_entry(weight, expression):
            spec = fitted(found.of(weight) if own is None else own, known_shape(weight), found.sizes)
            if not any(spec):
                continue
            if weight.is_built:
                keras_seam.lay_out(weight.variable, spec, layouts.device_mesh)
            else:  # its variable is made when a file has its values
                keras_seam.set_untracked(weight, "lies", spec)


def lay_out_as(variable: keras.Variable, spec: Spec | None) -> None:
    """Lays out a variable that the map does not name in the way of what it takes the place of."""
    layouts = keras_seam.layout_map()
    shape = tuple(int(n) for n in variable.shape)
    if layouts is None or spec is None or len(spec) != len(shape) or asked_for(variable.path, shape) is not None:
        return
    present = keras_seam.layout_of(variable)
    if present is None or not any(present):
        keras_seam.lay_out(
            variable, fitted(spec, shape, keras_seam.mesh_sizes(layouts.device_mesh)), layouts.device_mesh
        )


def stacked(entries: Sequence[keras.Variable]) -> Spec | None:
    """How a stack of variables lies: as the first of them that is divided, and whole along its own axis."""
    laid = [spec for variable in entries if (spec := keras_seam.layout_of(variable)) is not None]
    return (None, *next(filter(any, laid), laid[0])) if laid else None


def layout_of_value(path: str, expression: Expression) -> Spec | None:
    """How the value of a use lies, by how its weights do; `None` if nothing is known of it."""
    found = traced(path, expression)
    return None if found is None else found.value


__all__ = [
    "answer", "asked_for", "at_creation", "follow", "follow_from", "is_base", "is_read_by_entry", "lay_out_as",
    "layout_for", "layout_of_value", "stacked", "standing", "traced", "tracing",
]  # fmt: skip

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
from tether.weights.axes import Axes, Links, Row
from tether.weights.expression import Expression, Node, Shape, Stored, known_shape, program
from tether.weights.operators.indexing import Gather
from tether.weights.operators.quantized import Dequantize

# --------------------------------------------------------------------------- layouts through an expression
# A layout names for each axis of a value the axis of the mesh over which it is divided, or `None` where it is whole, as
# in `keras.distribution.TensorLayout`. That of a use goes back through the expression to the weights, that of a base
# goes on to what a form has made beside it, by the labels of axes (`weights.axes`). Only shapes are looked at.


Spec = tuple[str | None, ...]
"""For each axis of a value the axis of the mesh that divides it, or `None`."""


def undivided(rank: int) -> Spec:
    """The layout of what every device has as a whole."""
    return (None,) * rank


def fitted(spec: Spec, shape: Shape, sizes: Mapping[str, int]) -> Spec:
    """A layout without the axes that the devices cannot divide evenly."""
    return tuple(
        name if name is None or size % sizes[name] == 0 else None for name, size in zip(spec, shape, strict=True)
    )


class Traced:
    """An expression whose axes have been traced back to its weights, and what layouts have been said of them.

    Args:
        expression: The expression. Its shape must be known.
        sizes: How many devices each axis of the mesh has.
    """

    def __init__(self, expression: Expression, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.shape = known_shape(expression)
        self._links = Links()
        self._axes: dict[Expression, Axes] = {}
        self._value = self._trace(expression)
        self._rows: dict[Row, str | None] = {}
        self._marks: dict[int, tuple[str, int, int] | None] = {}

    def _trace(self, expression: Expression) -> Axes:
        """The labels of an expression's axes; those of its steps are remembered."""
        steps = program(expression)
        for step in steps:
            current = step.expression
            if current in self._axes:
                continue
            found: Axes | None = None
            if isinstance(current, Node):
                operands = [self._axes[steps[place].expression] for place in step.operands]
                found = current.axes_from(self._links, *operands)
                simpler = current.expanded() if found is None else None
                if simpler is not None:
                    found = self._trace(simpler)
            self._axes[current] = self._links.fresh(current.shape or ()) if found is None else found
        return self._axes[steps[-1].expression]

    # ------------------------------------------------------------------ what is said

    def say(self, spec: Spec, of: Expression | None = None) -> None:
        """Says how the value lies, or a weight or other step of it. What was said before of an axis stands.

        An axis that is in two places of it, as in `w + w.T`, cannot be divided in one of them, so it is whole.
        """
        rows = [self._links.row(row) for row in (self._value if of is None else self._axes[of])]
        names = fitted(spec, tuple(map(self._links.size, rows)), self.sizes)
        said: dict[Row, set[str | None]] = {}
        for row, name in zip(rows, names, strict=True):
            said.setdefault(row, set()).add(name)
        for row, names_of in said.items():
            if row and row not in self._rows:
                self._say(row, names_of.pop() if len(names_of) == 1 else None)

    def _say(self, row: Row, name: str | None) -> None:
        self._rows[row] = name
        if name is None:
            return
        left, done, marks = self.sizes[name], 1, dict[int, tuple[str, int, int] | None]()
        for label in row:
            size = self._links.sizes[label]
            taken = left if size % left == 0 else size
            if left % taken:
                break
            marks[label] = (name, done, taken)
            done, left = done * taken, left // taken
            if left == 1:
                break
        if left > 1:
            return  # only a whole axis of just these labels can be divided so
        for label, mark in marks.items():
            self._marks[label] = mark if self._marks.get(label, mark) == mark else None

    # ------------------------------------------------------------------ what follows

    def of(self, weight: Stored) -> Spec:
        """How a weight in the expression lies, by what was said of the rest."""
        return self._read(self._axes[weight])

    def is_said(self, weight: Stored) -> tuple[bool, ...]:
        """Of which axes of a weight something was said: the others are no axes of what was spoken of."""
        rows = [self._links.row(row) for row in self._axes[weight]]
        return tuple(row in self._rows or any(label in self._marks for label in row[:1]) for row in rows)

    @property
    def value(self) -> Spec:
        """How the value lies."""
        return self._read(self._value)

    def _read(self, axes: Axes) -> Spec:
        found = [self._read_row(self._links.row(row)) for row in axes]
        return tuple(None if name is not None and found.count(name) > 1 else name for name in found)

    def _read_row(self, row: Row) -> str | None:
        if row in self._rows:
            return self._rows[row]
        done, name = 1, None
        for label in row:
            mark = self._marks.get(label)
            if mark is None or mark[1] != done or name not in (None, mark[0]):
                break
            name, done = mark[0], done * mark[2]
            if mark[2] < self._links.sizes[label]:
                break
        return name if name is not None and done == self.sizes[name] else None


# --------------------------------------------------------------------------- what the map says


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
        return undivided(len(shape)) if known is None and made else known
    asked = asked_for(weight.path, shape, made=made)
    found = undivided(len(shape)) if asked is None else fitted(asked, shape, keras_seam.mesh_sizes(layouts.device_mesh))
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
    "Spec", "Traced", "answer", "asked_for", "at_creation", "fitted", "follow", "follow_from", "is_base",
    "is_read_by_entry", "lay_out_as", "layout_for", "layout_of_value", "stacked", "standing", "traced", "tracing",
    "undivided",
]  # fmt: skip

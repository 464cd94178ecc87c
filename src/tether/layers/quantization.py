"""Quantising tied layers: what is stored becomes integers and a scale, and every use of it follows.

A weight `w` becomes the expression `dequantize(integers, scale)` (`operators.quantized`), so whatever is made
of `w` goes on as it was: both users of a tie, a low-rank part that learns, what is saved, counted, drawn and planned.
The inputs of layers stay floats.

Everything is worked out before anything is changed. `Model.quantize` gets here before Keras has touched a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import Unsupported, received
from tether.kinds import kind_of
from tether.layers.tying import paths
from tether.layers.tying.state import View, slots_of, users
from tether.layers.tying.swap import become_all
from tether.layers.tying.tie import weight_of
from tether.planning.products import products
from tether.weights.algebra import MADE, split_sum
from tether.weights.expression import Expression, Node, Shape, live_weights, program
from tether.weights.operators.arithmetic import Add, ScaleGradient, StopGradient, Subtract
from tether.weights.operators.quantized import LARGEST, Dequantize, Rounded, Unpack, rounded
from tether.weights.operators.structure import Where
from tether.weights.storage import Use
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- who asks


def quantize_model(model: keras.Model, mode: object, config: object, filters: object) -> None:
    """Quantises the weights of the tied layers in a model: the part of `Model.quantize` that Keras leaves out."""
    _refuse_split(model, filters)
    layers = [layer for layer in keras_seam.contained_layers(model) if slots_of(layer)]
    asked = [
        layer for layer in layers if keras_seam.passes(layer, filters) and (_own_matrices(layer) or _present(layer))
    ]
    if asked:
        _quantize(asked, mode, config, lambda layer: keras_seam.passes(layer, filters))


def _refuse_split(model: keras.Model, filters: object) -> None:
    """Refuses layers whose weights Keras itself would quantise, and could not read, before any layer is changed.

    Raises:
        Unsupported: A weight of one lies partly on other processes.
    """
    for layer in keras_seam.contained_layers(model):
        has_own = type(layer).quantize is not keras.Layer.quantize
        own = has_own and not (slots_of(layer) or isinstance(layer, Weight))
        if own and keras_seam.passes(layer, filters):
            for variable in chain(*keras_seam.variable_lists(layer).values()):
                if keras_seam.lies_elsewhere(keras_seam.stored_value(variable)):
                    raise Unsupported(
                        f"Keras quantises {variable.path!r} of the plain layer {layer.name!r} in one process, and a "
                        "part of it lies on others. Make it a weight of Tether's first, which all processes quantise: "
                        f"`tether.weight_of(layer, {variable.name!r})`. Nothing has been changed."
                    )


def quantize_layer(
    layer: keras.Layer, original: Callable[..., None], mode: object, config: object, **kwargs: Any
) -> None:
    """`quantize` of a tied layer. Where another user of its weights was asked before, nothing is left to do."""
    if _own_matrices(layer) or _present(layer):
        _quantize([layer], mode, config, lambda layer: True)
    else:
        original(mode, config=config, **kwargs)


def quantize_weight(weight: Weight, mode: object, config: object) -> None:
    """What `Weight.quantize` does, after its checks of arguments."""
    mode, block = _settings(f"the weight {weight.name!r}", mode, config)
    if not _is_matrix(weight):
        raise Unsupported(
            f"The weight {weight.name!r} holds no matrix of floats, so there is nothing to quantise. "
            f"{received(shape=weight.shape, dtype=weight.dtype)}"
        )
    _carry_out({weight: _rounded(weight, mode, block)})


keras_seam.quantizers.update(model=quantize_model, weight=quantize_weight, layer=quantize_layer)


def _settings(what: str, mode: Any, config: Any) -> tuple[str, int | None]:
    """The mode, and the size of blocks."""
    config = keras_seam.quantization_config(mode, config)
    if config.mode not in LARGEST:
        raise Unsupported(
            f"{what[0].upper()}{what[1:]} is tied, and tied weights can be quantised to {' and '.join(LARGEST)}. For "
            "another mode quantise a plain copy: `plain = tether.materialize(model); plain.quantize(...)`. Nothing "
            f"has been changed. {received(mode=config.mode)}"
        )
    if config.weight_quantizer is not None:
        raise Unsupported(
            f"{what[0].upper()}{what[1:]} is tied, and its users share one scale, so it cannot be given a quantizer of "
            f"one layer. Leave `weight_quantizer` out. Nothing has been changed."
        )
    block = getattr(config, "block_size", None)  # Keras 3.13 has none
    return config.mode, None if block in (None, -1) else int(block)


def _quantize(layers: list[keras.Layer], mode: object, config: object, passes: Callable[[object], bool]) -> None:
    mode, block = _settings(f"the layer {layers[0].name!r}", mode, config)
    found: dict[Weight, Rounded] = {}
    own: list[tuple[Any, str]] = []
    for layer in layers:
        if _present(layer) - {mode}:
            raise Unsupported(
                f"The layer {layer.name!r} is quantised already ({', '.join(sorted(_present(layer)))}). Nothing has "
                f"been changed. {received(mode=mode)}"
            )
    for layer in layers:
        for variable in _own_matrices(layer):
            if not isinstance(variable, View):
                own.append((layer, variable.name))
                continue
            for weight in matrices(variable.expression):
                if weight not in found and _is_allowed(weight, passes):
                    found[weight] = _rounded(weight, mode, block)
    _carry_out(found)
    for layer, name in own:
        stored = weight_of(layer, name)
        assert isinstance(stored, Weight)  # of a variable of the layer's own
        _carry_out({stored: _rounded(stored, mode, block)})


def _is_allowed(weight: Weight, passes: Callable[[object], bool]) -> bool:
    left_out = [layer.name for layer in users(weight) if not passes(layer)]
    if left_out:
        warnings.warn(
            f"The weight {weight.name!r} stays as it is: the filters leave out {', '.join(map(repr, left_out))}, which "
            "uses it too.",
            stacklevel=2,
        )
    return not left_out


# --------------------------------------------------------------------------- what is quantised


def _named(layer: keras.Layer) -> list[Any]:
    """The variables and views of a layer that Keras quantises in a layer of its kind."""
    names = kind_of(type(layer)).of(layer).quantized
    return [variable for variable in paths.own_variables(layer) if variable.name in names]


def _own_matrices(layer: keras.Layer) -> list[Any]:
    """Those of which something is not quantised yet."""
    return [variable for variable in _named(layer) if _holds_a_matrix(variable)]


def _present(layer: keras.Layer) -> set[str]:
    """How those are quantised that are."""
    views = [variable for variable in _named(layer) if isinstance(variable, View)]
    return {mode for view in views for mode in _modes(view.expression)}


def _holds_a_matrix(variable: keras.Variable) -> bool:
    if isinstance(variable, View):
        return bool(matrices(variable.expression))
    return len(variable.shape) > 1 and keras_seam.is_float(keras_seam.stored_dtype(variable))


def _is_matrix(weight: Weight) -> bool:
    return (
        weight.became is None
        and len(weight.shape or ()) > 1
        and weight.is_built
        and keras_seam.is_float(str(weight.dtype))
    )


def matrices(expression: Expression) -> list[Weight]:
    """The weights of an expression that are quantised: its matrices, but not what was added to them to learn.

    Vectors (gates, lengths, strengths) stay floats. So does what was added to a base (`weights.structure`), what
    a form made for another weight, and what trains beside something that does not.
    """
    found: dict[Weight, None] = {}
    waiting, seen = [expression], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Weight) and _is_matrix(current):
            found[current] = None
        elif isinstance(current, Node):
            waiting.extend(reversed(_bases(current)))
    return list(found)


def _bases(node: Node) -> list[Expression]:
    """The operands of a node without what was added to them."""
    if isinstance(node, Dequantize):
        return []
    found = split_sum(node)
    if found is not None:
        return [found.base]
    operands = [operand for operand in node.operands if operand.weights_used()]
    operands = _unless_all(operands, lambda part: all(weight.role in MADE for weight in part.weights_used()))
    if isinstance(node, (Add, Subtract, Where)):
        operands = _unless_all(operands, lambda part: any(weight.trainable for weight in live_weights(part)))
    return operands


def _unless_all(operands: list[Expression], is_added: Callable[[Expression], bool]) -> list[Expression]:
    left = [operand for operand in operands if not is_added(operand)]
    return left or operands


# --------------------------------------------------------------------------- where the scale goes


def _rounded(weight: Weight, mode: str, block: int | None) -> Rounded:
    array = np.asarray(keras_seam.on_host(keras_seam.plain_tensor(weight.value), weight.name, in_step=True))
    return rounded(array, mode, _inputs(weight), block)


def _inputs(weight: Weight) -> tuple[int, ...]:
    """The axes of a weight over which one scale goes: those of the inputs in the first layer that uses it."""
    shape = weight.shape or ()
    for use in weight.uses:
        layer = use.layer()
        outputs = None if layer is None else _output_axes(layer, use, len(use.expression.shape or ()))
        if outputs is not None:
            kept = _axes_behind(weight, shape, use.expression, outputs)
            inputs = tuple(axis for axis in range(len(shape)) if kept is None or axis not in kept)
            one_channel = sum(size > 1 for size in shape) < 2
            if kept is not None and inputs and (kept or one_channel):
                return inputs
    return tuple(range(len(shape) - 1))


def _output_axes(layer: keras.Layer, use: Use, rank: int) -> set[int] | None:
    """The axes of a layer's weight that have one entry for each output channel (of a table: for each row)."""
    kind = kind_of(type(layer)).of(layer)
    name = use.name.rpartition("/")[2]
    if name not in kind.axes:  # of a subclass: as its main weight
        name = next(iter(kind.axes), "")
    axes, scaled = kind.axes.get(name, ""), kind.quantized.get(name)
    if scaled is not None and len(axes) == rank:
        return {place for place, letter in enumerate(axes) if letter in scaled}
    return {rank - 1} if rank > 1 else None


def _axes_behind(weight: Weight, shape: Shape, expression: Expression, outputs: set[int]) -> set[int] | None:
    """The axes of a weight that become some of these axes of an expression; `None` where that cannot be said."""
    form = products(expression)
    found: set[int] | None = None
    for term in form.terms:
        labels = {label for axis in outputs for label in term.axes[axis]}
        for factor in term.factors:
            current = factor.expression
            while isinstance(current, (StopGradient, ScaleGradient)) or (
                isinstance(current, Node) and current.name == "reshape"
            ):
                current = current.operands[0]
            if current is weight:
                found = (found or set()) | _axes_of(
                    shape, [(label, form.sizes[label]) for label in factor.labels], labels
                )
    return found


def _axes_of(shape: Shape, labels: list[tuple[int, int]], wanted: set[int]) -> set[int]:
    """Which axes of a shape have some of the wanted labels; several labels may make up one axis."""
    rest, found = list(labels), set()
    for axis, size in enumerate(shape):
        while size > 1 and rest:
            label, part = rest.pop(0)
            size //= part
            if label in wanted:
                found.add(axis)
    return found


# --------------------------------------------------------------------------- changing


def _carry_out(found: dict[Weight, Rounded]) -> None:
    """Gives each weight up for its integers."""
    new = {weight: each.expression(weight, str(weight.dtype)) for weight, each in found.items()}
    for layer in become_all(new):
        for slot in slots_of(layer):
            slot.tie.quantized = slot.tie.made_by_code and bool(_modes(slot.view.expression))


def _modes(expression: Expression) -> set[str]:
    """How parts of an expression are quantised."""
    found = (step.expression for step in program(expression))
    return {
        "int4" if isinstance(node.operands[0], Unpack) else "int8" for node in found if isinstance(node, Dequantize)
    }


__all__ = ["matrices"]

"""The sizes of a layer: which axes of its weights have to agree, and the setting that says how large they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from tether import keras_seam
from tether.errors import Unsupported
from tether.layers.tying.tied import base_class

Undo = list[Callable[[], None]]


@dataclass(frozen=True)
class Size:
    """One size of a layer."""

    axes: tuple[tuple[str, int], ...]
    """The weights that have it, by name, and on which axis."""
    set: Callable[[int, Undo], None]
    """Tells the layer the new size; gives the undo list what puts the old one back."""


def sizes_of(layer: Any) -> list[Size]:
    """The sizes of a layer that can change after it was built.

    Raises:
        Unsupported: It is of a class whose sizes are not known here, or it is quantised or has Keras's LoRA.
    """
    base: Any = base_class(type(layer))
    if getattr(layer, "quantization_mode", None) is not None or getattr(layer, "lora_enabled", False):
        raise Unsupported("it is quantised or has Keras's LoRA")
    for known, describe in _KNOWN.items():
        if isinstance(layer, known) and base.build is known.build:
            return describe(layer)
    raise Unsupported(f"{base.__name__} does not say which of its settings hold the size")


def _setting(layer: Any, name: str) -> Callable[[int, Undo], None]:
    def set_it(size: int, undo: Undo) -> None:
        _replace(layer, name, size, undo)

    return set_it


def _replace(layer: Any, name: str, value: Any, undo: Undo) -> None:
    before = getattr(layer, name)
    undo.append(lambda: setattr(layer, name, before))
    setattr(layer, name, value)


def _input(layer: Any, axis: int) -> Callable[[int, Undo], None]:
    """The size of an axis of the layer's input."""

    def set_it(size: int, undo: Undo) -> None:
        spec, shapes = layer.input_spec, keras_seam.build_shapes(layer)
        if spec is not None and spec.axes:
            axes = {at: size if at in (axis, axis % (len(spec.shape or ()) or 1)) else n for at, n in spec.axes.items()}
            kept = {key: getattr(spec, key) for key in ("dtype", "shape", "ndim", "max_ndim", "min_ndim")}
            _replace(layer, "input_spec", keras.layers.InputSpec(axes=axes, **kept), undo)
        if shapes is not None and len(shapes) == 1:
            ((key, shape),) = shapes.items()
            changed = list(shape)
            changed[axis] = size
            undo.append(lambda: keras_seam.set_build_shapes(layer, shapes))
            keras_seam.set_build_shapes(layer, {key: tuple(changed)})

    return set_it


def _dense(layer: Any) -> list[Size]:
    return [
        Size((("kernel", 0),), _input(layer, -1)),
        Size((("kernel", 1), ("bias", 0)), _setting(layer, "units")),
    ]


def _embedding(layer: Any) -> list[Size]:
    return [
        Size((("embeddings", 0), ("reverse_embeddings", 1)), _setting(layer, "input_dim")),
        Size((("embeddings", 1), ("reverse_embeddings", 0)), _setting(layer, "output_dim")),
    ]


def _convolution(layer: Any) -> list[Size]:
    channels = -1 if layer.data_format == "channels_last" else 1
    out, into = (-2, -1) if "Transpose" in base_class(type(layer)).__name__ else (-1, -2)
    rank = layer.rank + 2
    filters = Size((("kernel", out % rank), ("bias", 0)), _setting(layer, "filters"))
    if getattr(layer, "groups", 1) != 1:
        return []
    return [filters, Size((("kernel", into % rank),), _input(layer, channels))]


def _einsum(layer: Any) -> list[Size]:
    equation = layer.equation.replace(" ", "")
    if "." in equation:
        raise Unsupported("its equation has an ellipsis")
    inputs, _, rest = equation.partition(",")
    kernel, _, outputs = rest.partition("->")
    first = min((outputs.index(letter) for letter in layer.bias_axes or ""), default=0)

    def describe(letter: str) -> Size:
        axes = [("kernel", kernel.index(letter))]
        if letter in (layer.bias_axes or ""):
            axes.append(("bias", outputs.index(letter) - first))

        def set_it(size: int, undo: Undo) -> None:
            if letter in inputs:
                _input(layer, inputs.index(letter))(size, undo)
            if letter in outputs[1:]:
                shape = list(layer.partial_output_shape)
                at = outputs.index(letter) - 1
                shape[at] = size if shape[at] is not None else None
                _replace(layer, "partial_output_shape", tuple(shape), undo)

        return Size(tuple(axes), set_it)

    return [describe(letter) for letter in kernel]


_KNOWN: dict[Any, Callable[[Any], list[Size]]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum,
    keras.layers.Embedding: _embedding,
    **{getattr(keras.layers, f"Conv{rank}D{kind}"): _convolution for rank in (1, 2, 3) for kind in ("", "Transpose")},
}
if hasattr(keras.layers, "ReversibleEmbedding"):
    _KNOWN[keras.layers.ReversibleEmbedding] = _embedding

__all__ = ["Size", "Undo", "sizes_of"]

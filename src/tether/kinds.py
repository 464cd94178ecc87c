"""What each kind of Keras layer does with its weights: the one table of it.

Who reads it: `layers.appliers` (how a combined weight is applied), `layers.resize` (what holds a size),
`layers.quantization` (what is quantised, and where the scales go) and `forms.form` (where the outputs are). Forms need
it and know nothing of `layers`, so it stands below both and imports nothing of Tether; appliers, which are in `layers`,
it has by name. A layer that is not in it builds a combined weight before its call, and cannot be resized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras


@dataclass(frozen=True)
class Kind:
    """A kind of layer. Its axes are letters, as in an einsum: axes of one letter have one size."""

    applier: str = ""
    """The name of what applies its combined weight by plan."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """The axes of each weight that has a size which can change, its main weight first."""
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Which axis of the layer's input has a size."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Which attribute of the layer has a size, and at which place in it, if it is a tuple of sizes."""
    units: str = ""
    """The entry of the config that has the number of outputs, if they are the last axis of the kernel."""
    quantized: Mapping[str, str] = field(default_factory=dict)
    """The weights that Keras quantises, and the axes along which each entry has a scale of its own."""
    by_layer: Callable[[Any], Mapping[str, Any]] | None = None
    """What of this only the layer itself says."""

    def of(self, layer: keras.Layer) -> Kind:
        """The kind, with what this layer says of it."""
        return self if self.by_layer is None else replace(self, **self.by_layer(layer))


def letters_of(equation: str) -> list[str]:
    """The letters of the inputs, the kernel and the outputs of an EinsumDense."""
    return equation.replace(" ", "").replace("->", ",").split(",")


def _of_equation(layer: Any) -> dict[str, Any]:
    """What the equation of an EinsumDense says."""
    inputs, kernel, outputs = letters_of(layer.equation)
    biased = layer.bias_axes or ""
    first = min(map(outputs.index, biased), default=len(outputs))
    return {
        "axes": {"kernel": kernel, "bias": "".join(axis if axis in biased else "1" for axis in outputs[first:])},
        "inputs": {axis: inputs.index(axis) for axis in kernel if axis in inputs},
        "settings": {a: ("partial_output_shape", outputs.index(a) - 1) for a in kernel if a in outputs[1:]},
        "quantized": {"kernel": outputs},
    }


def _of_channels(layer: Any) -> dict[str, Any]:
    """Where a convolution has its channels. With groups, no size of it can change."""
    if getattr(layer, "groups", 1) != 1:
        return {"settings": {}}
    return {"inputs": {"i": -1 if layer.data_format == "channels_last" else 1}}


_EMBEDDING = Kind(
    applier="embedding",
    axes={"embeddings": "vd", "reverse_embeddings": "dv"},
    settings={"v": ("input_dim",), "d": ("output_dim",)},
    quantized={"embeddings": "v", "reverse_embeddings": "v"},
)


def _convolution(axes: str, **more: Any) -> Kind:
    return Kind(axes={"kernel": axes, "bias": "o"}, settings={"o": ("filters",)}, by_layer=_of_channels, **more)


KINDS: dict[Any, Kind] = {
    keras.layers.Dense: Kind(
        applier="dense",
        axes={"kernel": "io", "bias": "o"},
        inputs={"i": -1},
        settings={"o": ("units",)},
        units="units",
        quantized={"kernel": "o"},
    ),
    keras.layers.EinsumDense: Kind(applier="einsum_dense", units="output_shape", by_layer=_of_equation),
    keras.layers.Embedding: _EMBEDDING,
    keras.layers.ReversibleEmbedding: replace(_EMBEDDING, applier="reversible"),
    keras.layers.Conv1D: _convolution("xio", applier="convolution", units="filters"),
    keras.layers.Conv2D: _convolution("xyio", applier="convolution", units="filters"),
    keras.layers.Conv3D: _convolution("xyzio", applier="convolution", units="filters"),
    keras.layers.Conv1DTranspose: _convolution("xoi"),
    keras.layers.Conv2DTranspose: _convolution("xyoi"),
    keras.layers.Conv3DTranspose: _convolution("xyzoi"),
    keras.layers.DepthwiseConv1D: Kind(applier="depthwise"),
    keras.layers.DepthwiseConv2D: Kind(applier="depthwise"),
    keras.layers.LSTMCell: Kind(applier="lstm_cell"),
    keras.layers.GRUCell: Kind(applier="gru_cell"),
    keras.layers.SimpleRNNCell: Kind(applier="simple_cell"),
    keras.layers.LayerNormalization: Kind(applier="normalization"),
    keras.layers.RMSNormalization: Kind(applier="normalization"),
    keras.layers.GroupNormalization: Kind(applier="normalization"),
    keras.layers.BatchNormalization: Kind(applier="normalization"),
}
"""A subclass is of the kind of the nearest class here, see `kind_of`."""


def kind_of(cls: type, method: str | None = None) -> Kind:
    """The kind of a class: that of the nearest class in the table that it is or derives from, or one of nothing.

    Args:
        cls: The class of a layer.
        method: A method that must be that of the class in the table: a subclass with its own may do otherwise.
    """
    for known in cls.__mro__:
        if known in KINDS and (method is None or getattr(cls, method) is getattr(known, method)):
            return KINDS[known]
    return Kind()


__all__ = ["KINDS", "Kind", "kind_of", "letters_of"]

"""Convolutions: channels mixed by the factors of a low-rank kernel, before or after the layer's own convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tether.layers.appliers.dense import Shape
from tether.layers.appliers.planned import applied
from tether.planning.plan import Convolution, Problem


def convolution_call(base: Any) -> Callable[..., Any]:
    """`call` of a convolution without groups."""

    def call(self: Any, inputs: Any) -> Any:
        y = None if self.groups != 1 else _convolved(self, inputs, keras.ops.conv, depthwise=False)
        return base.call(self, inputs) if y is None else _finished(self, y, self.filters)

    return call


def depthwise_call(base: Any) -> Callable[..., Any]:
    """`call` of a convolution of each channel by itself."""

    def call(self: Any, inputs: Any) -> Any:
        y = _convolved(self, inputs, keras.ops.depthwise_conv, depthwise=True)
        if y is None:
            return base.call(self, inputs)
        channels = int(self.kernel.shape[-2]) * int(self.kernel.shape[-1])
        shape = list(keras.ops.shape(y))
        place = len(shape) - 2 if self.data_format == "channels_last" else 1
        y = keras.ops.reshape(y, [*shape[:place], channels, *shape[place + 2 :]])
        return _finished(self, y, channels)

    return call


def _convolved(layer: Any, x: Any, operation: Any, *, depthwise: bool) -> Any:
    padding = layer.padding
    if padding == "causal":
        width = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        last = layer.data_format == "channels_last"
        padding = "valid"
    else:
        width, last = 0, True

    def convolve(x: Any, kernel: Any) -> Any:
        if width:  # zeros stay zeros when channels are mixed
            x = keras.ops.pad(x, [[0, 0], [width, 0], [0, 0]] if last else [[0, 0], [0, 0], [width, 0]])
        return operation(
            x,
            kernel,
            strides=layer.strides if depthwise else list(layer.strides),  # as Keras does, and TensorFlow wants
            padding=padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )

    def problem(shape: Shape, **call: Any) -> Problem:
        places = [f"s{axis}" for axis in range(layer.rank)]
        made = [f"p{axis}" for axis in range(layer.rank)]
        taps = [f"k{axis}" for axis in range(layer.rank)]
        out = tuple(layer.compute_output_shape(shape))
        ends = ("i", "o") if depthwise else ("o",)
        if layer.data_format == "channels_last":
            inputs, outputs, positions = ("b", *places, "i"), ("b", *made, *ends), out[1:-1]
        else:
            inputs, outputs, positions = ("b", "i", *places), ("b", *ends, *made), out[2:]
        return Problem(inputs, (*taps, "i", "o"), outputs, shape, convolution=Convolution(positions, depthwise), **call)

    return applied(layer.kernel, x, _Kept(layer, problem), convolve)


class _Kept:
    """The problem of one layer, equal for all its calls: plans are kept by it."""

    def __init__(self, layer: Any, problem: Callable[..., Problem]) -> None:
        self.settings = (layer.rank, layer.strides, layer.padding, layer.dilation_rate, layer.data_format)
        self.problem = problem

    def __call__(self, shape: Shape, **call: Any) -> Problem:
        return self.problem(shape, **call)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)


def _finished(layer: Any, y: Any, channels: int) -> Any:
    if layer.use_bias:
        ones = (1,) * layer.rank
        shape = (1, *ones, channels) if layer.data_format == "channels_last" else (1, channels, *ones)
        y = keras.ops.add(y, keras.ops.reshape(layer.bias, shape))
    return y if layer.activation is None else layer.activation(y)

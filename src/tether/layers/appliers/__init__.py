"""How each kind of Keras layer applies a combined weight; a kind that is not here builds it first.

An applier replaces one method of a tied layer, and only where the layer's class has Keras's own: a user's
subclass with a `call` of its own keeps it. What the layer does beside the product (bias, activation,
precision) is written as Keras does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tether.layers.appliers import convolution, dense, embedding, recurrent

Applier = Callable[[type], Callable[..., Any]]

_APPLIERS: tuple[tuple[type, Applier], ...] = (
    (keras.layers.Dense, dense.dense_call),
    (keras.layers.EinsumDense, dense.einsum_dense_call),
    (keras.layers.ReversibleEmbedding, embedding.reversible_call),
    (keras.layers.Embedding, embedding.embedding_call),
    (keras.layers.Conv1D, convolution.convolution_call),
    (keras.layers.Conv2D, convolution.convolution_call),
    (keras.layers.Conv3D, convolution.convolution_call),
    (keras.layers.DepthwiseConv1D, convolution.depthwise_call),
    (keras.layers.DepthwiseConv2D, convolution.depthwise_call),
    (keras.layers.LSTMCell, recurrent.lstm_cell_call),
    (keras.layers.GRUCell, recurrent.gru_cell_call),
    (keras.layers.SimpleRNNCell, recurrent.simple_cell_call),
)


def planned_call(base: Any) -> Callable[..., Any] | None:
    """A `call` that applies combined weights by plan, or `None` for a class that has no applier."""
    for kind, applier in _APPLIERS:
        if issubclass(base, kind) and base.call is kind.call:  # type: ignore[attr-defined]
            call = applier(base)
            call.__doc__ = base.call.__doc__
            return call
    return None

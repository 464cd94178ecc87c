"""Embedding and ReversibleEmbedding: rows of a table, which is looked up before it is multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tether import keras_seam
from tether.layers.appliers.dense import Shape, dense_problem
from tether.layers.appliers.planned import applied
from tether.planning.plan import Problem


def lookup_problem(shape: Shape, **call: Any) -> Problem:
    """Numbers of any shape, and the rows of a table."""
    rows = tuple(f"b{axis}" for axis in range(len(shape)))
    return Problem(rows, ("v", "d"), (*rows, "d"), shape, lookup=True, **call)


def logits_problem(shape: Shape, **call: Any) -> Problem:
    """Rows times the transposed table."""
    rows = tuple(f"b{axis}" for axis in range(len(shape) - 1))
    return Problem((*rows, "d"), ("v", "d"), (*rows, "v"), shape, **call)


def _rows(layer: Any, inputs: Any) -> Any:
    if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
        inputs = keras.ops.cast(inputs, "int32")
    y = applied(layer.embeddings, inputs, lookup_problem)
    return y if y is None else keras.ops.cast(y, layer.compute_dtype)


def embedding_call(base: Any) -> Callable[..., Any]:
    """`Embedding.call`."""

    def call(self: Any, inputs: Any) -> Any:
        y = _rows(self, inputs)
        return base.call(self, inputs) if y is None else y

    return call


def reversible_call(base: Any) -> Callable[..., Any]:
    """`ReversibleEmbedding.call`, both ways."""

    def call(self: Any, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            y = _rows(self, inputs)
            if y is None:
                return base.call(self, inputs)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                keras_seam.set_mask(y, mask)
            return y
        y = None
        if self.reverse_dtype is None and self.tie_weights:
            y = applied(self.embeddings, inputs, logits_problem)
        elif self.reverse_dtype is None:
            y = applied(self.reverse_embeddings, inputs, dense_problem)
        if y is None:
            return base.call(self, inputs, reverse=True)
        cap = self.logit_soft_cap
        return y if cap is None else keras.ops.multiply(keras.ops.tanh(keras.ops.divide(y, cap)), cap)

    return call

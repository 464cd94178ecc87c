"""Dense and EinsumDense: inputs times a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from tether import keras_seam
from tether.layers.appliers.planned import applied
from tether.planning.plan import Problem

Shape = tuple[int | None, ...]


def dense_problem(shape: Shape, **call: Any) -> Problem:
    """Rows times a matrix."""
    rows = tuple(f"b{axis}" for axis in range(len(shape) - 1))
    return Problem((*rows, "i"), ("i", "o"), (*rows, "o"), shape, **call)


@functools.lru_cache(maxsize=1024)
def einsum_problem(equation: str) -> Callable[..., Problem]:
    """The problem of an equation such as `"abc,cd->abd"`, which may begin with `...`."""

    def problem(shape: Shape, **call: Any) -> Problem:
        left, output = equation.replace(" ", "").split("->")
        inputs, kernel = left.split(",")
        extra = tuple(f"b{axis}" for axis in range(len(shape) - len(inputs.replace("...", ""))))
        return Problem(_letters(inputs, extra), tuple(kernel), _letters(output, extra), shape, **call)

    return problem


def _letters(part: str, extra: tuple[str, ...]) -> tuple[str, ...]:
    before, dots, after = part.partition("...")
    return (*before, *(extra if dots else ()), *after)


def _finished(layer: Any, y: Any) -> Any:
    if layer.bias is not None:
        y = keras_seam.add(y, _tensor(layer.bias))
    return y if layer.activation is None else layer.activation(y)


def _tensor(weight: Any) -> Any:
    return weight.value if isinstance(weight, keras.Variable) else weight


def _is_quicker_here(inputs: Any) -> bool:
    """Whether the product is computed here where the weight is built, and not by Keras's own call."""
    return keras_seam.RUNS_FROM_PYTHON and not keras_seam.is_sparse(inputs)


def dense_call(base: Any) -> Callable[..., Any]:
    """`Dense.call`."""

    def call(self: Any, inputs: Any, training: Any = None) -> Any:
        y = applied(self.kernel, inputs, dense_problem)
        if y is None and _is_quicker_here(inputs):
            y = keras_seam.matmul(inputs, _tensor(self.kernel))
        return base.call(self, inputs, training=training) if y is None else _finished(self, y)

    return call


def einsum_dense_call(base: Any) -> Callable[..., Any]:
    """`EinsumDense.call`."""

    def call(self: Any, inputs: Any, training: Any = None) -> Any:
        y = applied(self.kernel, inputs, einsum_problem(self.equation))
        if y is None and _is_quicker_here(inputs):
            y = keras.ops.einsum(self.equation, inputs, self.kernel)
        return base.call(self, inputs, training=training) if y is None else _finished(self, y)

    return call

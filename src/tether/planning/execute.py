"""Doing what a plan says, in `keras.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tether import keras_seam
from tether.planning.gradient import attach
from tether.planning.integers import Integers, as_floats
from tether.planning.plan import Plan
from tether.weights.expression import Tensor

Convolve = Callable[[Tensor, Tensor], Tensor]


def execute(plan: Plan, x: Tensor, factors: Sequence[Tensor], convolve: Convolve | None = None) -> Tensor:
    """The layer's product with its weight.

    Args:
        plan: What to do.
        x: The layer's input.
        factors: The values of the plan's factors; those that rows are taken from may be `Integers`.
        convolve: The layer's own convolution with a kernel.
    """
    if plan.gradient is not None:
        return _with_gradient(plan, plan.gradient, x, factors)
    return _run(plan, x, factors, convolve)


def _run(plan: Plan, x: Tensor, factors: Sequence[Tensor], convolve: Convolve | None = None) -> Tensor:
    values: list[Any] = [x, *factors]
    for step in plan.steps:
        inputs = [values[place] for place in step.inputs]
        if step.op == "take" and isinstance(inputs[0], Integers):
            values.append(inputs[0].take(inputs[1], step.detail))
            continue
        inputs = [as_floats(value) for value in inputs]
        if step.op == "convolve":
            values.append(convolve(*inputs))  # type: ignore[misc]
        else:
            values.append(_OPERATIONS[step.op](step.detail, *inputs))
    return values[plan.output]


def _with_gradient(plan: Plan, of_factors: Plan, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The plan's value; the gradient of the factors that train by other steps."""
    still = [keras.ops.stop_gradient(f) if place in plan.trained else f for place, f in enumerate(factors)]
    frozen = [place for place in range(len(factors)) if place not in plan.trained]

    def tangent(x: Tensor, varying: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        given = dict(zip((*plan.trained, *frozen), (*varying, *others), strict=True))
        return _run(of_factors, x, [given[place] for place in range(len(factors))])

    y = _run(plan, x, still)
    return attach(y, tangent, x, [factors[place] for place in plan.trained], [factors[place] for place in frozen])


def _split(detail: tuple[Any, ...], x: Tensor) -> Tensor:
    shape: list[Any] = []
    for size, parts in zip(keras.ops.shape(x), detail, strict=True):
        shape += [size] if parts is None else parts
    return keras.ops.reshape(x, shape)


def _join(detail: tuple[int, ...], x: Tensor) -> Tensor:
    sizes, shape = list(keras.ops.shape(x)), list[Any]()
    for count in detail:
        shape.append(sizes[0] if count == 1 else math.prod(sizes[:count]))
        del sizes[:count]
    return keras.ops.reshape(x, shape)


def _digit(detail: tuple[int, int | None], ids: Tensor) -> Tensor:
    divisor, size = detail
    digits = keras.ops.floor_divide(ids, divisor)
    return digits if size is None else keras.ops.mod(digits, size)


def _restore(detail: tuple[tuple[str, int], ...], y: Tensor, x: Tensor) -> Tensor:
    sizes = keras.ops.shape(x)
    return keras.ops.reshape(y, [size if kind == "size" else sizes[size] for kind, size in detail])


def _multiply(present: tuple[bool, ...], a: Tensor, b: Tensor) -> Tensor:
    if not all(present):
        b = b[tuple(slice(None) if there else None for there in present)]
    return keras_seam.multiply(a, b)


def _einsum(equation: str, *inputs: Tensor) -> Tensor:
    dtypes = {keras.backend.standardize_dtype(value.dtype) for value in inputs}
    if len(dtypes) > 1:  # a matrix product promotes; PyTorch's einsum does not
        dtype = keras.backend.result_type(*sorted(dtypes))
        inputs = tuple(keras.ops.cast(value, dtype) for value in inputs)
    return keras.ops.einsum(equation, *inputs)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "scale": lambda number, x: keras.ops.multiply(x, number),
    "split": _split,
    "join": _join,
    "restore": _restore,
    "squeeze": lambda axes, x: keras.ops.squeeze(x, axis=axes),
    "add": lambda _, a, b: a + b,  # keras.ops.add takes an empty batch on TensorFlow for a bias
    "digit": _digit,
    "take": lambda axis, table, ids: keras.ops.take(table, ids, axis=axis),
    "multiply": _multiply,
    "matmul": lambda _, a, b: keras_seam.matmul(a, b),
    "einsum": _einsum,
}

"""Doing what a plan says, and computing a gradient by other steps than the value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tether import keras_seam
from tether.planning.plan import Entries, Integers, Plan, as_floats
from tether.types import Tensor
from tether.weights.operators.choice import where_option

# --------------------------------------------------------------------------- gradients by other steps
# A value whose gradient is computed in another way than the value was.
#
# A weight `W + A @ B` with a frozen `W` is best built where there are many rows, and yet its gradient is best
# computed part by part: the gradient of the built weight, of its full size, is needed by nobody.


Tangent = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""What varies with the first factors: a function of the input, those factors, and the others."""


def attach(y: Tensor, tangent: Tangent, x: Tensor, varying: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """`y`, with the gradient of `tangent` to `varying` beside its own.

    Args:
        y: A value in which no gradient flows to `varying`.
        tangent: Computes something whose derivative to `varying` is that of `y`. It has the shape of `y`.
        x: The input, to which `y` has its gradient already.
        varying: The factors that train.
        others: The other factors.
    """
    return _attach[keras.backend.backend()](y, tangent, x, tuple(varying), tuple(others))


def _jax(y: Tensor, tangent: Tangent, x: Tensor, varying: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    import jax

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def attached(y: Tensor, x: Tensor, varying: object, others: object) -> Tensor:
        return y

    @attached.defjvp  # type: ignore[untyped-decorator]
    def rule(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
        y, x, varying, others = primals
        _, moved = jax.jvp(lambda factors: tangent(x, factors, others), (varying,), (tangents[2],))
        # Attached again: who differentiates this derivative sees the value's own dependence on the factors too.
        return attached(*primals), jax.numpy.add(tangents[0], moved.astype(y.dtype))

    return attached(y, x, varying, others)


def _tensorflow(
    y: Tensor, tangent: Tangent, x: Tensor, varying: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> Tensor:
    import tensorflow as tf

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def attached(y: Tensor, *varying: object) -> Tensor:
        def gradients(upstream: object) -> Tensor:
            with tf.GradientTape() as tape:
                tape.watch(varying)
                moved = tangent(x, varying, others)
            found = tape.gradient(moved, varying, tf.cast(upstream, moved.dtype))
            return (upstream, *found)

        return tf.identity(y), gradients

    return attached(y, *varying)


def _torch(y: Tensor, tangent: Tangent, x: Tensor, varying: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    return _torch_function().apply(y, tangent, len(varying), x, *varying, *others)


@functools.cache
def _torch_function() -> type[Any]:
    import torch

    class Attached(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, y: Tensor, tangent: Tangent, count: int, x: Tensor, *factors: Tensor) -> Tensor:
            context.tangent, context.count = tangent, count
            context.save_for_backward(x, *factors)
            return y.view_as(y)

        @staticmethod
        def backward(context: Any, upstream: Tensor) -> Tensor:
            x, *factors = context.saved_tensors
            again = torch.is_grad_enabled()  # the gradient is to be differentiated too
            if not again:
                x, factors = x.detach(), [factor.detach() for factor in factors]
            asked = [place for place in range(context.count) if context.needs_input_grad[4 + place]]
            with torch.enable_grad():
                for place in asked if not again else ():
                    factors[place].requires_grad_()
                moved = context.tangent(x, factors[: context.count], factors[context.count :])
                found = torch.autograd.grad(
                    moved, [factors[place] for place in asked], upstream.to(moved.dtype), create_graph=again
                )
            gradients = [None] * len(factors)
            for place, gradient in zip(asked, found, strict=True):
                gradients[place] = gradient
            return (upstream, None, None, None, *gradients)

    return Attached


_attach: dict[str, Callable[..., Tensor]] = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}


# --------------------------------------------------------------------------- the steps
# Doing what a plan says, in `keras.ops`.


Convolve = Callable[[Tensor, Tensor], Tensor]


def execute(plan: Plan, x: Tensor, factors: Sequence[Tensor], convolve: Convolve | None = None) -> Tensor:
    """The layer's product with its weight.

    Args:
        plan: What to do.
        x: The layer's input.
        factors: The values of the plan's factors; those that rows are taken from may be `Integers`, and what is read
            for each example `Entries`.
        convolve: The layer's own convolution with a kernel.
    """
    if plan.gradient is not None:
        return _with_gradient(plan, plan.gradient, x, factors)
    return _run(plan, x, factors, convolve)


_OF_EXAMPLES = ("ab,abc->ac", "abc,acd->abd")
"""The product of each example, one row or several, with a matrix of its own."""


def _run(plan: Plan, x: Tensor, factors: Sequence[Tensor], convolve: Convolve | None = None) -> Tensor:
    values: list[Tensor] = [x, *factors]
    for step in plan.done:
        if step is None:
            values.append(None)
            continue
        inputs = [values[place] for place in step.inputs]
        if step.op == "take" and isinstance(inputs[0], Integers):
            values.append(inputs[0].take(inputs[1], step.detail))
            continue
        if step.detail in _OF_EXAMPLES and isinstance(inputs[1], Entries) and inputs[0].shape[1:-1] in ((), (1,)):
            values.append(inputs[1].times(inputs[0]))
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
    shape: list[int] = []
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
    if equation == _OF_EXAMPLES[1]:
        return keras_seam.product_of_examples(*inputs)
    return keras.ops.einsum(equation, *inputs)


def _mask(present: tuple[bool, ...], a: Tensor, mask: Tensor) -> Tensor:
    mask = mask[tuple(slice(None) if there else None for there in present)]
    return keras.ops.where(keras.ops.equal(mask, 0), keras.ops.zeros((), a.dtype), keras_seam.multiply(a, mask))


def _pick(detail: tuple[int, float], tables: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
    axis, other = detail
    if axis:
        tables = keras.ops.moveaxis(tables, axis + 1, 1)
    options, size = tables.shape[:2]
    numbers = keras.ops.reshape(numbers, (*keras.ops.shape(numbers), *(1,) * (len(ids.shape) - len(numbers.shape))))
    rows = keras.ops.clip(numbers, 0, options - 1) * size + keras.ops.cast(ids, "int32")
    found = keras_seam.entries(keras.ops.reshape(tables, (options * size, *tables.shape[2:])), rows)
    return where_option(numbers, options, found, keras.ops.cast(other, found.dtype))


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "scale": lambda number, x: keras.ops.multiply(x, number),
    "split": _split,
    "join": _join,
    "restore": _restore,
    "squeeze": lambda axes, x: keras.ops.squeeze(x, axis=axes),
    "add": lambda _, a, b: a + b,  # keras.ops.add takes an empty batch on TensorFlow for a bias
    "digit": _digit,
    "take": lambda axis, table, ids: keras.ops.take(table, ids, axis=axis),
    "pick": _pick,
    "mask": _mask,
    "multiply": _multiply,
    "matmul": lambda _, a, b: keras_seam.matmul(a, b),
    "add_product": lambda _, y, a, b: keras_seam.add_product(y, a, b),
    "einsum": _einsum,
}

"""A value whose gradient is computed in another way than the value was.

A weight `W + A @ B` with a frozen `W` is best built where there are many rows, and yet its gradient is
best computed part by part: the gradient of the built weight, of its full size, is needed by nobody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tether.weights.expression import Tensor

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
    def attached(y: Any, x: Any, varying: Any, others: Any) -> Any:
        return y

    @attached.defjvp  # type: ignore[untyped-decorator]
    def rule(primals: Any, tangents: Any) -> Any:
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
    def attached(y: Any, *varying: Any) -> Any:
        def gradients(upstream: Any) -> Any:
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
def _torch_function() -> Any:
    import torch

    class Attached(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, y: Any, tangent: Tangent, count: int, x: Any, *factors: Any) -> Any:
            context.tangent, context.count = tangent, count
            context.save_for_backward(x, *factors)
            return y.view_as(y)

        @staticmethod
        def backward(context: Any, upstream: Any) -> Any:
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

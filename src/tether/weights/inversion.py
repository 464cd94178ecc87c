"""Pushing a value or a shape back through an expression, into the weights it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tether.errors import NotInvertible, ShapeMismatch
from tether.weights.expression import Expression, Node, Shape, Step, Tensor, known_shape, leaves, program
from tether.weights.weight import Weight


def assign(expression: Expression, value: Any) -> None:
    """Stores `value` in the weights so that the expression evaluates to it. Nothing changes if it cannot be."""
    shape = known_shape(expression)
    value = keras.ops.convert_to_tensor(value)
    if tuple(value.shape) != shape:
        raise ShapeMismatch(
            f"A value for {expression.notation()} has shape {shape}. Received: shape={tuple(value.shape)}."
        )
    for weight, part in invert(expression, value).items():
        weight.assign(part)


def invert(
    expression: Expression, value: Tensor, otherwise: Callable[[Node], tuple[Expression, ...]] | None = None
) -> dict[Weight, Tensor]:
    """The weights' values that make the expression evaluate to `value`.

    Args:
        expression: What shall have the value.
        value: The value.
        otherwise: Says which parts of a node take its value if the node has no inverse.

    Raises:
        NotInvertible: A part of the expression has no inverse, or one weight would need two values.
    """
    steps = program(expression)
    wanted: dict[int, list[Tensor]] = {len(steps) - 1: [value]}
    found: dict[Weight, Tensor] = {}
    for place in range(len(steps) - 1, -1, -1):
        if place not in wanted:
            continue
        current, values = steps[place].expression, wanted[place]
        if len(values) > 1 and not all(_equal(values[0], other) for other in values[1:]):
            raise NotInvertible(
                f"{expression.notation()} uses {current.notation()} more than once, so no single value of it gives "
                "what was assigned. Assign to the weights themselves."
            )
        if isinstance(current, Weight):
            found[current] = values[0]
        else:
            parts = current.inverse(values[0]) if isinstance(current, Node) else None
            if parts is None and otherwise is not None and isinstance(current, Node):
                heirs = otherwise(current)
                for heir in heirs:
                    wanted.setdefault(_place_of(heir, current, place, steps), []).append(values[0])
                if heirs:
                    continue
            if parts is None:
                raise NotInvertible(
                    f"{expression.notation()} cannot be assigned: {current.notation()} has no inverse. Assign to the "
                    f"weights themselves ({', '.join(weight.name for weight in expression.weights_used())}), or "
                    "`tether.untie` the layer first."
                )
            for operand, part in zip(steps[place].operands, parts, strict=True):
                if part is not None:
                    wanted.setdefault(operand, []).append(part)
    return found


def _place_of(part: Expression, root: Expression, place: int, steps: tuple[Step, ...]) -> int:
    """Where a part of an expression stands in a program that has the expression at a place."""
    waiting = [(root, place)]
    while True:
        current, place = waiting.pop()
        if current is part:
            return place
        if isinstance(current, Node):
            waiting += zip(current.operands, steps[place].operands, strict=True)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(np.array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)))


def solve_shape(expression: Expression, shape: Shape) -> tuple[Weight, Shape] | None:
    """The one weight without a shape and the shape that it must have, where `shape` determines it."""
    unknown = {leaf for leaf in leaves(expression) if isinstance(leaf, Weight) and leaf.shape is None}
    if len(unknown) != 1:
        return None
    current: Expression = expression
    wanted = shape
    while isinstance(current, Node):
        found = current.operand_shape(wanted)
        open_operands = [o for o in current.operands if o.shape is None]
        if found is None or len(open_operands) != 1:
            return None
        current, wanted = open_operands[0], found
    return (current, wanted) if isinstance(current, Weight) else None


def is_invertible(expression: Expression) -> bool:
    """Whether every value can be assigned. Shapes must be known."""
    shape = known_shape(expression)
    try:
        invert(expression, keras.ops.zeros(shape, dtype=expression.dtype))
    except NotInvertible:
        return False
    return True

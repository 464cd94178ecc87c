"""What an expression's shape becomes when a weight in it gets another size."""

from __future__ import annotations

from collections.abc import Mapping

from tether.weights.expression import Expression, Node, Shape, known_shape
from tether.weights.weight import Weight


def shapes_with(root: Expression, shapes: Mapping[Weight, Shape]) -> list[tuple[Expression, Shape]]:
    """The shapes of all parts of an expression, itself last, if some of its weights had others.

    Raises:
        ShapeMismatch: The operands of a part would not fit any more.
    """
    found: dict[int, Shape] = {}
    parts: list[tuple[Expression, Shape]] = []
    stack = [root]
    while stack:
        current = stack[-1]
        operands = current.operands if isinstance(current, Node) else ()
        waiting = [operand for operand in operands if id(operand) not in found]
        if id(current) not in found and waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if id(current) in found:
            continue
        if isinstance(current, Node):
            found[id(current)] = current._checked_shape([found[id(operand)] for operand in operands])
        else:
            given = shapes.get(current) if isinstance(current, Weight) else None
            found[id(current)] = known_shape(current) if given is None else given
        parts.append((current, found[id(current)]))
    return parts


def take_shapes(parts: list[tuple[Expression, Shape]]) -> None:
    """Lets the parts of an expression know the shapes that they have now."""
    set_slot = object.__setattr__
    for part, shape in parts:
        if isinstance(part, Node):
            set_slot(part, "_shape", shape)


__all__ = ["shapes_with", "take_shapes"]

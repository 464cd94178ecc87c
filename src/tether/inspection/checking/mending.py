"""Code that makes one weight out of another."""

from __future__ import annotations

from tether.weights.expression import Expression, Node
from tether.weights.operators.structure import Transpose
from tether.weights.weight import Weight


def arranged(code: str, axes: tuple[int, ...], scale: float = 1.0) -> str:
    """Code for `scale * weight.transpose(axes)`."""
    if axes == tuple(range(len(axes))[::-1]) and len(axes) > 1:
        code += ".T"
    elif axes != tuple(range(len(axes))):
        code += f".transpose({', '.join(map(str, axes))})"
    return code if scale == 1 else f"{scale:.7g} * {code}"


def in_words(axes: tuple[int, ...], scale: float = 1.0) -> str:
    """How one array is made from another: ` transposed and times 0.5`, or nothing."""
    turned = [" transposed"] if axes != tuple(range(len(axes))) else []
    return " and".join([*turned, *([f" times {scale:.6g}"] if scale != 1 else [])])


def code_of(expression: Expression, weight_code: dict[Weight, str]) -> str:
    """Code for an expression, or its notation where that is not written in a few words."""
    if isinstance(expression, Weight):
        return weight_code.get(expression) or str(expression.name)
    if isinstance(expression, Transpose) and isinstance(expression, Node):
        (operand,) = expression.operands
        axes = expression.parameters["axes"]
        inner = code_of(operand, weight_code)
        return f"{inner}.T" if axes is None else f"{inner}.transpose({', '.join(map(str, axes))})"
    return expression.notation()

"""What an expression is made of: the base and what was added to it, and values and shapes pushed back through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch
from tether.types import Tensor
from tether.weights.expression import (
    Expression,
    Node,
    Shape,
    Step,
    Stored,
    known_shape,
    leaves,
    live_weights,
    program,
    provide,
)
from tether.weights.leaves import write_lent
from tether.weights.operators.arithmetic import (
    Add,
    Divide,
    MatMul,
    Multiply,
    Negative,
    ScaleGradient,
    StopGradient,
    Subtract,
)
from tether.weights.operators.choice import Adapted, Routed
from tether.weights.operators.quantized import Dequantize
from tether.weights.operators.structure import Cast, Einsum, Where

# --------------------------------------------------------------------------- backwards
# Pushing a value or a shape back through an expression, into the weights it is made of.


def assign(expression: Expression, value: Tensor) -> None:
    """Stores `value` in the weights so that the expression evaluates to it. Nothing changes if it cannot be."""
    shape = known_shape(expression)
    value = keras.ops.convert_to_tensor(value)
    if tuple(value.shape) != shape:
        raise ShapeMismatch(
            f"A value for {expression.notation()} has shape {shape}. Received: shape={tuple(value.shape)}."
        )
    if write_lent(expression, value):
        return
    for weight, part in invert(expression, value).items():
        weight.assign(part)


def invert(
    expression: Expression, value: Tensor, otherwise: Callable[[Node], tuple[Expression, ...]] | None = None
) -> dict[Stored, Tensor]:
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
    found: dict[Stored, Tensor] = {}
    for place in range(len(steps) - 1, -1, -1):
        if place not in wanted:
            continue
        current, values = steps[place].expression, wanted[place]
        if len(values) > 1 and not all(_equal(values[0], other) for other in values[1:]):
            raise NotInvertible(
                f"{expression.notation()} uses {current.notation()} more than once, so no single value of it gives "
                "what was assigned. Assign to the weights themselves."
            )
        if isinstance(current, Stored):
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
    return bool(np.array_equal(keras_seam.to_numpy(a, in_step=True), keras_seam.to_numpy(b, in_step=True)))


def solve_shape(expression: Expression, shape: Shape) -> tuple[Stored, Shape] | None:
    """The one weight without a shape and the shape that it must have, where `shape` determines it."""
    unknown = {leaf for leaf in leaves(expression) if isinstance(leaf, Stored) and leaf.shape is None}
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
    return (current, wanted) if isinstance(current, Stored) else None


def is_invertible(expression: Expression) -> bool:
    """Whether every value can be assigned. Shapes must be known."""
    shape = known_shape(expression)
    try:
        invert(expression, keras.ops.zeros(shape, dtype=expression.dtype))
    except NotInvertible:
        return False
    return True


# --------------------------------------------------------------------------- the base
# Which weight of an expression is the base, and what was added to it.
#
# A layer may compute with more than the weight that it had: `w + a @ b`, `w * s`, a mixture, a mask. Who loads a
# plain layer's value, quantises, or takes a low-rank part out has to know which of the stored weights is the one that
# the layer had. Structure tells it, never a name:
#
# - Named parts (`Adapted`) are added to their base.
# - Weights with a role (`Weight.role`) were made for those that have none.
# - What has not the whole shape is spread over what has it: a scale for each output, a shift.
# - A product of weights was added to what is none.
# - If several are left, the base is the one that gets no gradient.
#
# If none of this tells, there is no base: neither of `a + b` is it.


MADE = ("part", "fixed", "strength", "state")
"""The roles of what was made for another weight. Integers and their scale are the weight that they stand for."""


@dataclass(frozen=True)
class Split:
    """What a node is made of."""

    base: Expression
    added: tuple[Expression, ...]
    """What was added to the base, or multiplied with it; what is subtracted, as its negative."""
    copies: tuple[Expression, ...]
    """What stands in for the base: where it has the base's value, the node has it too."""


def split_sum(expression: Expression) -> Split | None:
    """The base of a node and what was added to it; `None` if that cannot be told, or nothing was."""
    if isinstance(expression, Adapted):
        return _split(expression.base, list(expression.operands[1:]))
    if isinstance(expression, Routed):
        return _split(expression.operands[1], [expression.operands[2]])
    if isinstance(expression, (Add, Subtract, Multiply, Divide)):
        is_sum = isinstance(expression, (Add, Subtract))
        parts = list(_terms(expression) if is_sum else expression.operands)
        may_be = parts[:1] if isinstance(expression, Divide) else [p for p in parts if not isinstance(p, Negative)]
        base = _base_of(may_be, parts, expression.shape)
        added = [part for part in parts if part is not base]
        if base is None or not added or not all(_has_more(part, base) for part in added):
            return None  # a constant, or the base again: what the base is then is a matter of arithmetic
        return _split(base, added)
    if isinstance(expression, Where):
        condition, *chosen = expression.operands
        base = _base_of(chosen, chosen, expression.shape)
        others = tuple(each for each in chosen if each is not base and each.weights_used())
        return None if base is None else Split(base, (condition,), others)
    return None


def _split(base: Expression, added: list[Expression]) -> Split:
    compared = (_compared(part, base) for part in added)
    return Split(base, tuple(added), tuple(each for each in compared if each is not None))


def _has_more(part: Expression, base: Expression) -> bool:
    return not set(part.weights_used()) <= set(base.weights_used())


def terms_of(expression: Expression) -> list[Expression]:
    """The terms of a sum, in its order; the expression itself, if it is none."""
    return list(_terms(expression))


def _terms(expression: Expression) -> Iterator[Expression]:
    """The terms of a sum, those that are subtracted as negatives. A sum with a constant is one term."""
    waiting = [(expression, True)]
    while waiting:
        current, is_added = waiting.pop()
        if isinstance(current, (Add, Subtract)) and all(map(_has_weights, current.operands)):
            left, right = current.operands
            waiting += [(right, is_added == isinstance(current, Add)), (left, is_added)]
        else:
            yield current if is_added else -current


def _has_weights(expression: Expression) -> bool:
    """Whether there is a weight in an expression. It makes no program: a long sum would need one for each part."""
    waiting, seen = [expression], set()
    while waiting:
        current = waiting.pop()
        if isinstance(current, Stored):
            return True
        if isinstance(current, Node) and id(current) not in seen:
            seen.add(id(current))
            waiting += current.operands
    return False


def _base_of(may_be: list[Expression], parts: list[Expression], shape: Shape | None) -> Expression | None:
    """The one of several parts of a node that is the base."""
    left = [part for part in parts if part.weights_used()]
    without = (part.weights_used() for part in left if not any(w.role in MADE for w in part.weights_used()))
    plain = {weight for weights in without for weight in weights}
    left = [part for part in left if not _is_made_for(part, plain)] or left
    left = [part for part in left if part.shape == shape]
    left = [part for part in left if not _is_product(part)] or left
    left = [part for part in left if _is_of_one(part)] or left
    if len(left) > 1:
        left = [part for part in left if not live_weights(part)]
    return left[0] if len(left) == 1 and any(left[0] is part for part in may_be) else None


def _is_made_for(part: Expression, plain: set[Stored]) -> bool:
    """Whether weights of a part have a role, and the others in it are those of parts without such weights."""
    made = {weight for weight in part.weights_used() if weight.role in MADE}
    return bool(made) and set(part.weights_used()) <= made | plain


def _is_of_one(part: Expression) -> bool:
    """Whether a part is made of one weight; integers and their scale are one."""
    integers = sum(isinstance(step.expression, Dequantize) for step in program(part))
    return len(part.weights_used()) - integers == 1


def _is_product(part: Expression) -> bool:
    return any(isinstance(step.expression, (MatMul, Einsum)) for step in program(part))


def _compared(part: Expression, base: Expression) -> Expression | None:
    """The `x` of a part `f * (x - base)`, which is nothing where `x` is the base."""
    names = set(base.weights_used())
    while not isinstance(part, Subtract):
        if isinstance(part, (StopGradient, ScaleGradient, Negative)):
            part = part.operands[0]
        elif isinstance(part, Multiply):
            holding = [factor for factor in part.operands if names & set(factor.weights_used())]
            if len(holding) != 1:
                return None
            part = holding[0]
        else:
            return None
    compared, other = part.operands
    return compared if _valued(other) == _valued(base) and compared.shape == base.shape else None


def _valued(expression: Expression) -> Expression:
    """The same value, with its own gradient."""
    while isinstance(expression, (StopGradient, ScaleGradient)):
        expression = expression.operands[0]
    return expression


# --------------------------------------------------------------------------- what follows from it


def as_it_is(expression: Expression) -> Stored | None:
    """The stored weight that an expression is, whatever gradient flows to it."""
    found = _valued(expression)
    return found if isinstance(found, Stored) and found.became is None else None


def is_kept_still(expression: Expression) -> bool:
    """Whether an expression is a stored weight as it is, to which no gradient flows."""
    return isinstance(expression, StopGradient) and as_it_is(expression) is not None


def base_of(expression: Expression) -> Stored | None:
    """The weight to which all else in an expression was added: `w` of `w.stop_gradient() + a @ b`, or of `w` itself.

    A value that the plain layer had is a value for it, as it is, and for nothing else.
    """
    current = expression
    while not isinstance(current, Stored):
        if isinstance(current, (StopGradient, ScaleGradient)) or _is_between_floats(current):
            current = current.operands[0]  # type: ignore[attr-defined]
            continue
        found = split_sum(current)
        if found is None or found.copies:
            return None
        current = found.base
    return current if current.became is None and current.shape == expression.shape else None


def _is_between_floats(expression: Expression) -> bool:
    return isinstance(expression, Cast) and all(
        each.dtype is not None and keras_seam.is_float(each.dtype) for each in (expression, *expression.operands)
    )


def put(expression: Expression, value: Tensor) -> dict[Stored, Tensor]:
    """Values for the weights of an expression that make it the value of a plain layer, with what was added on top.

    Where an expression has an inverse, it is as assigned. Else the base takes the value.

    Raises:
        NotInvertible: It has no inverse, and no base.
    """
    return invert(expression, value, otherwise=_heirs)


def _heirs(node: Node) -> tuple[Expression, ...]:
    """The parts of a node without an inverse that take its value."""
    found = split_sum(node)
    return () if found is None or found.base.shape != node.shape else (found.base, *found.copies)


def added_weights(expression: Expression) -> set[Stored]:
    """The weights that were only added: those to which no value of a plain layer goes."""
    added: set[Stored] = set()
    kept: set[Stored] = set()
    waiting = [expression]
    while waiting:
        current = waiting.pop()
        found = split_sum(current)
        if isinstance(current, Stored):
            kept.add(current)
        elif found is not None:
            added.update(weight for part in found.added for weight in part.weights_used())
            waiting += [found.base, *found.copies]
        elif isinstance(current, (Add, Subtract)) and len(terms := list(_terms(current))) > 1:
            waiting += terms
        elif isinstance(current, Node):
            waiting += current.operands
    return added - kept


def is_added(weight: Stored) -> bool:
    """Whether a weight was only added to others, wherever it is used."""
    return bool(weight.uses) and all(weight in added_weights(use.expression) for use in weight.uses)


provide(assign=assign)


__all__ = [
    "MADE",
    "Split",
    "added_weights",
    "as_it_is",
    "base_of",
    "is_added",
    "is_kept_still",
    "put",
    "split_sum",
    "terms_of",
]

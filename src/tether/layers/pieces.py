"""What a layer applies by itself: the parts of its weight that have a dropout on their input, and the rest.

In training, `x (W + drop Δ)` is `x W + drop(x) Δ`. So a weight with such parts is taken apart into a sum, of which the
layer applies each by its own plan, to its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras

from tether.errors import Unsupported
from tether.forms.dropout import InputDropout, has_dropout
from tether.kinds import kind_of
from tether.weights.expression import Expression, Node, program
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
from tether.weights.operators.choice import Adapted, Switched, adapted
from tether.weights.operators.structure import Cast, Index, Reshape, Transpose


@dataclass(frozen=True)
class Piece:
    """A term of a weight, and the dropout on its input if it has one."""

    expression: Expression
    dropout: InputDropout | None = None


_Sum = tuple[Piece, ...]
"""The terms of an expression: first what has no dropout, if there is any."""

_LINEAR = (Negative, StopGradient, ScaleGradient, Cast, Index, Reshape, Transpose)
_BILINEAR = (Multiply, MatMul, Divide)


def pieces_of(expression: Expression) -> tuple[Piece, ...]:
    """The terms of a weight by the dropout on their input; the whole weight if there is none.

    Raises:
        Unsupported: A dropout is inside of something that is no sum.
    """
    if not has_dropout(expression):
        return (Piece(expression),)
    done: list[_Sum] = []
    for step in program(expression):
        done.append(_terms(step.expression, [done[place] for place in step.operands]))
    found = done[-1]
    for piece in found:
        if piece.expression.shape != expression.shape:
            raise Unsupported(
                f"A part with a dropout on its input is added to a weight of its own shape. In {expression.notation()} "
                f"of shape {expression.shape}, {piece.expression.notation()} has shape {piece.expression.shape}."
            )
    return found


def _terms(current: Expression, operands: list[_Sum]) -> _Sum:
    if isinstance(current, InputDropout) and not _has_any(operands):
        return (Piece(current.operands[0], current),)
    if not isinstance(current, Node) or not _has_any(operands):
        return (Piece(current),)
    if isinstance(current, Add):
        return _joined(*operands)
    if isinstance(current, Subtract):
        left, right = operands
        return _joined(left, _each(right, lambda term: -term))
    if isinstance(current, Adapted):
        return _of_adapted(current, operands)
    if isinstance(current, _LINEAR):
        return _each(operands[0], lambda term: type(current)(term, **current.parameters))
    if isinstance(current, _BILINEAR):
        first, second = (any(piece.dropout is not None for piece in each) for each in operands)
        one, other = current.operands
        if not second:
            return _each(operands[0], lambda term: type(current)(term, other))
        if not first and not isinstance(current, Divide):
            return _each(operands[1], lambda term: type(current)(one, term))
    raise Unsupported(
        "A dropout on the input of a part goes with a sum: the part is added to a weight. In "
        f"{current.notation()} it is inside of something else, which a layer cannot apply term by term."
    )


def _has_any(operands: Sequence[_Sum]) -> bool:
    return any(piece.dropout is not None for each in operands for piece in each)


def _each(terms: _Sum, of: Callable[[Expression], Expression]) -> _Sum:
    return tuple(Piece(of(piece.expression), piece.dropout) for piece in terms)


def _joined(*sums: _Sum) -> _Sum:
    """The sum of sums: what has no dropout as one term, first."""
    plain: Expression | None = None
    dropped: list[Piece] = []
    for piece in (piece for each in sums for piece in each):
        if piece.dropout is not None:
            dropped.append(piece)
        else:
            plain = piece.expression if plain is None else plain + piece.expression
    return (*([] if plain is None else [Piece(plain)]), *dropped)


def _of_adapted(current: Adapted, operands: list[_Sum]) -> _Sum:
    """What of each named part has a dropout, by its strength; the rest stays what it is."""
    base, *pairs = operands
    plain, dropped = {}, [piece for piece in base if piece.dropout is not None]
    for (name, (strength, _)), terms in zip(current.parts.items(), pairs[1::2], strict=True):
        for piece in terms:
            if piece.dropout is None:
                plain[name] = (strength, piece.expression)
            else:
                dropped.append(Piece(strength * Switched(piece.expression, strength), piece.dropout))
    rest = [piece.expression for piece in base if piece.dropout is None]
    if plain and not rest:
        raise Unsupported(
            f"The base of {current.notation()} has a dropout on its input, all of it. Add adapters to a plain weight."
        )
    return (*(Piece(adapted(each, plain, current.order)) for each in rest), *dropped)


# --------------------------------------------------------------------------- what a tie refuses


_TAKE_DROPOUT = ("dense", "einsum_dense", "convolution", "depthwise")
"""The appliers that multiply an input with the layer's kernel, and with nothing else."""


def takes_dropout(layer: keras.Layer) -> bool:
    """Whether a layer can drop numbers of the input of a part of its kernel."""
    cls = getattr(type(layer), "_tether_base", type(layer))
    return kind_of(cls, "call").applier in _TAKE_DROPOUT and getattr(layer, "groups", 1) == 1


def refuse_dropout(layer: keras.Layer, name: str, expression: Expression) -> None:
    """Refuses a dropout on the input of a part where the layer cannot apply it.

    Raises:
        Unsupported: The layer is of another kind, or the part is inside of something that is no sum.
    """
    if not has_dropout(expression):
        return
    if not takes_dropout(layer) or name.rpartition("/")[2] != "kernel":
        raise Unsupported(
            f"{layer.name}/{name} = {expression.notation()} has a dropout on the input of a part, and "
            f"{type(layer).__name__} "
            f"cannot apply it to its {name}: that can the kernels of Dense, EinsumDense, and convolutions without "
            "groups, in classes that leave `call` as it is. Leave `dropout` out there: "
            "`{'*/kernel': tether.low_rank(8, dropout=0.1), '*/embeddings': tether.low_rank(8)}`."
        )
    if expression.shape is not None:
        pieces_of(expression)


__all__ = ["Piece", "pieces_of", "refuse_dropout", "takes_dropout"]

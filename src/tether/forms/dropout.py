"""Dropout on a part of a weight: on its input, or on its outputs and on the whole of it.

    y = x W + drop(x) Δ   in training,   y = x (W + Δ)   otherwise

No weight gives the first: it is how a layer applies its weight, and not what the weight is. So the operator here has
the value of its part, and the layers that apply weights by plan see it and drop numbers of the part's input
(`pieces_of`). That is where LoRA has its dropout (Hu et al. 2021, arXiv:2106.09685), and PEFT that of the others.

    y = x (W + Δ · m)   in training, where the random m is one number for each output,   y = x (W + Δ)   otherwise

The second is a weight, of which m is a factor that is one outside of training (`DropMask`). So every layer can have it.
PEFT has it for LoHa and LoKr, by the names `rank_dropout` and `module_dropout`.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, Unsupported, as_ints, received
from tether.forms.form import part, part_dtype
from tether.kinds import kind_of
from tether.types import Config, Tensor
from tether.weights.evaluation import cast_to_scope
from tether.weights.expression import Expression, Node, Shape, Term, program, register
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
from tether.weights.weight import Weight

__all__: list[str] = []


@register
class InputDropout(Node):
    """The value of its first operand, whose input is dropped out in training by seeds drawn from the second."""

    name, arity, accepts, seeds = "input_dropout", 2, ("rate", "seeded"), (1,)
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """A share of less than 1; and whether somebody chose the seed."""
        return {"rate": _checked_rate(given, "rate"), "seeded": _checked_flag(given, "seeded")}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the part."""
        _refuse_other_seeds(self.operands[1], shapes[1])
        return shapes[0]

    def compute(self, *values: Tensor) -> Tensor:
        """The part: dropout is none of its value."""
        return values[0]

    def format(self, *terms: Term) -> Term:
        """`input_dropout(a @ b, 0.1)`."""
        return Term(f"input_dropout({terms[0].text}, {self.parameters['rate']:g})")

    def expanded(self) -> Expression:
        """The part, for calls that do not train."""
        return self.operands[0]

    def dropped(self, x: Tensor) -> Tensor:
        """An input with a share of its numbers zero and the others larger for it; every call draws others."""
        found = keras.random.dropout(x, self.parameters["rate"], seed=_seeds(self.operands[1], self.parameters))
        training = keras_seam.undecided_training()
        return found if training is None else keras.ops.where(training, found, x)


@register
class DropMask(Node):
    """What a part is multiplied with: one outside of training; in training a random factor for each of its outputs.

    Its operand is the state that the random numbers come from.
    """

    name, accepts, seeds = "drop_mask", ("shape", "outputs", "rescaled", "whole", "seeded"), (0,)
    is_random = True
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The shape by which the factors lie along a weight; two shares of less than 1; two flags."""
        shape = as_ints(given.get("shape"), "shape")
        if any(size < 1 for size in shape):
            raise InvalidConfig(f"A mask has sizes of 1 or more. {received(shape=shape)}")
        rates = {name: _checked_rate(given, name) for name in ("outputs", "whole")}
        return {"shape": shape, **rates, **{name: _checked_flag(given, name) for name in ("rescaled", "seeded")}}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the factors."""
        _refuse_other_seeds(self.operands[0], shapes[0])
        shape: Shape = self.parameters["shape"]
        return shape

    def infer_dtype(self, *dtypes: str) -> str:
        return "float32"

    def compute(self, *values: Tensor) -> Tensor:
        """Ones, or in a call that trains what is drawn for it."""
        shape, outputs = self.parameters["shape"], self.parameters["outputs"]
        if not keras_seam.is_training_call():
            return cast_to_scope(keras.ops.ones(shape, dtype="float32"))
        kept = self._kept(shape, outputs)
        if self.parameters["rescaled"] and outputs:
            kept = kept * math.prod(shape) / keras.ops.maximum(keras.ops.sum(kept), 1.0)  # zero if none is kept
        found = kept * self._kept(tuple(1 for _ in shape), self.parameters["whole"])
        training = keras_seam.undecided_training()
        return cast_to_scope(
            found if training is None else keras.ops.where(training, found, keras.ops.ones_like(found))
        )

    def _kept(self, shape: Shape, rate: float) -> Tensor:
        """One where a number is kept, and zero where it is dropped; by Keras's dropout, which compilers know."""
        whole = keras.ops.ones(shape, dtype="float32")
        if not rate:
            return whole
        left = keras.random.dropout(whole, rate, seed=_seeds(self.operands[0], self.parameters))
        return keras.ops.cast(left > 0, "float32")

    def format(self, *terms: Term) -> Term:
        """`drop_mask(0.1)` for the outputs, `drop_mask(0.1, whole=0.2)`."""
        whole = f", whole={self.parameters['whole']:g}" if self.parameters["whole"] else ""
        return Term(f"drop_mask({self.parameters['outputs']:g}{whole})")


def _checked_rate(given: Config, name: str) -> float:
    rate = given.get(name)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise InvalidConfig(f"A dropout's rate is a number from 0 to less than 1. {received(**{name: rate})}")
    return float(rate)


def _checked_flag(given: Config, name: str) -> bool:
    flag = given.get(name, False)
    if not isinstance(flag, bool):
        raise InvalidConfig(f"`{name}` is True or False. {received(**{name: flag})}")
    return flag


def _refuse_other_seeds(state: Expression, shape: Shape) -> None:
    if shape != (2,) or not isinstance(state, Weight) or state.dtype != keras_seam.SEED_DTYPE:
        raise ShapeMismatch(
            f"The seeds of a dropout are a weight of two {keras_seam.SEED_DTYPE}. "
            f"{received(shape=shape, dtype=state.dtype)}"
        )


def _seeds(state: Expression, parameters: Config) -> keras_seam.Seeds:
    if not isinstance(state, Weight):
        raise TypeError("The seeds of a dropout are no weight.")
    return keras_seam.Seeds(state.variable, parameters["seeded"])


@keras.saving.register_keras_serializable(package="tether", name="SeedStart")
class SeedStart(keras.initializers.Initializer):
    """Starts the state of a dropout: at a seed, or without one at another one for each copy.

    Args:
        seed: A whole number, or `None`.
        stream: Tells apart the dropouts of one seed: a whole number.
    """

    def __init__(self, seed: int | None = None, stream: int = 0) -> None:
        self.seed, self.stream = seed, stream

    def __call__(self, shape: Shape, dtype: str | None = None) -> Tensor:
        """The seed, and where its stream begins."""
        seed = random.randint(1, 10**9) if self.seed is None else self.seed  # as Keras draws the seed of a generator
        start = np.array([seed & 0xFFFFFFFF, self.stream & 0xFFFFFFFF], keras_seam.SEED_DTYPE)
        return keras.ops.convert_to_tensor(start, dtype=dtype)

    def get_config(self) -> Config:
        """Seed and stream."""
        return {"seed": self.seed, "stream": self.stream}


def as_rate(
    rate: object, name: str = "dropout", what: str = "the share of the part's inputs that are dropped"
) -> float:
    """A rate of dropout.

    Args:
        rate: The rate.
        name: The parameter's name, for the error.
        what: What it is the rate of, for the error.

    Raises:
        TetherError: It is none.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 <= rate < 1:
        raise TetherError(f"`{name}` is {what}: 0 to less than 1. {received(**{name: rate})}")
    return float(rate)


def with_dropout(added: Expression, base: Expression, rate: float, seed: int | None) -> Expression:
    """A part whose input is dropped out in training, with a state of its own beside the base."""
    if rate == 0:
        return added
    return InputDropout(added, _state(added, base, seed), rate=rate, seeded=seed is not None)


def _state(added: Expression, base: Expression, seed: int | None) -> Expression:
    """What the dropout of a part draws its seeds from, beside the base."""
    paths = " ".join(weight.path for weight in added.weights_used())
    stream = 0 if seed is None else zlib.crc32(paths.encode())  # another one for each part
    start = SeedStart(seed, stream)
    return part(base, "dropout", start, (2,), dtype=keras_seam.SEED_DTYPE, trainable=False, role="state")


@dataclass(frozen=True)
class OutputDropout:
    """How a part is dropped out in training, by its outputs and as a whole."""

    outputs: float = 0.0
    """The share of its outputs that are dropped in a call."""
    rescaled: bool = False
    """Whether the others are larger for it: multiplied with how many there are for each one that was kept."""
    whole: float = 0.0
    """The share of calls in which all of it is."""

    @classmethod
    def asked(cls, rank_dropout: object, module_dropout: object, *, rescaled: bool) -> OutputDropout:
        """What the arguments of a form say.

        Raises:
            TetherError: A rate is none.
        """
        outputs = as_rate(rank_dropout, "rank_dropout", "the share of the part's outputs that are dropped")
        whole = as_rate(module_dropout, "module_dropout", "the share of calls that drop the part")
        return cls(outputs, bool(rescaled) and outputs > 0, whole)

    def applied(self, added: Expression, base: Expression, rows: Shape, columns: Shape, seed: int | None) -> Expression:
        """A part in the base's shape, which has these rows and columns, with its dropout."""
        if not (self.outputs or self.whole):
            return added
        mask: Expression = DropMask(
            _state(added, base, seed),
            shape=(*(1 for _ in rows), *columns),
            outputs=self.outputs,
            rescaled=self.rescaled,
            whole=self.whole,
            seeded=seed is not None,
        )
        dtype = part_dtype(base)
        return added * (mask if dtype == "float32" else mask.astype(dtype))


def output_dropout_of(expression: Expression) -> OutputDropout:
    """The dropout on the outputs of an expression: that of the first part that has one."""
    masks = (step.expression for step in program(expression) if isinstance(step.expression, DropMask))
    found = next((mask.parameters for mask in masks), None)
    return OutputDropout() if found is None else OutputDropout(found["outputs"], found["rescaled"], found["whole"])


def without_mask(added: Expression) -> Expression:
    """A part without the dropout on its outputs."""
    if isinstance(added, Multiply):
        for mask, other in (added.operands, added.operands[::-1]):
            if isinstance(mask.operands[0] if isinstance(mask, Cast) else mask, DropMask):
                return other
    return added


def has_dropout(expression: Expression) -> bool:
    """Whether something in an expression has its input dropped out."""
    return any(isinstance(step.expression, InputDropout) for step in program(expression))


def without_dropout(added: Expression) -> Expression:
    """A part without the dropout on its input."""
    return added.operands[0] if isinstance(added, InputDropout) else added


def rate_of(added: Expression) -> float:
    """The dropout on the input of a part; 0 if there is none."""
    return float(added.parameters["rate"]) if isinstance(added, InputDropout) else 0.0


# --------------------------------------------------------------------------- what layers apply


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

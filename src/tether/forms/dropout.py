"""Dropout on the input of a part of a weight.

    y = x W + drop(x) Δ   in training,   y = x (W + Δ)   otherwise

No weight gives the first: it is how a layer applies its weight, and not what the weight is. So the operator here has
the value of its part, and the layers that apply weights by plan see it and drop numbers of the part's input
(`layers.pieces`). That is where LoRA has its dropout (Hu et al. 2021, arXiv:2106.09685), and PEFT that of the others.
"""

from __future__ import annotations

import random
import zlib

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, received
from tether.forms.form import part
from tether.types import Config, Tensor
from tether.weights.expression import Expression, Node, Shape, Term, program, register
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
        rate, seeded = given.get("rate"), given.get("seeded", False)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise InvalidConfig(f"A dropout's rate is a number from 0 to less than 1. {received(rate=rate)}")
        if not isinstance(seeded, bool):
            raise InvalidConfig(f"`seeded` is True or False. {received(seeded=seeded)}")
        return {"rate": float(rate), "seeded": seeded}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the part."""
        state = self.operands[1]
        if shapes[1] != (2,) or not isinstance(state, Weight) or state.dtype != keras_seam.SEED_DTYPE:
            raise ShapeMismatch(
                f"The seeds of a dropout are a weight of two {keras_seam.SEED_DTYPE}. "
                f"{received(shape=shapes[1], dtype=state.dtype)}"
            )
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
        state = self.operands[1]
        if not isinstance(state, Weight):
            raise TypeError("The seeds of a dropout are no weight.")
        seeds = keras_seam.Seeds(state.variable, self.parameters["seeded"])
        found, training = keras.random.dropout(x, self.parameters["rate"], seed=seeds), keras_seam.undecided_training()
        return found if training is None else keras.ops.where(training, found, x)


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


def as_rate(rate: object) -> float:
    """A rate of dropout.

    Raises:
        TetherError: It is none.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 <= rate < 1:
        raise TetherError(
            f"`dropout` is the share of the part's inputs that are dropped: 0 to less than 1. {received(dropout=rate)}"
        )
    return float(rate)


def with_dropout(added: Expression, base: Expression, rate: float, seed: int | None) -> Expression:
    """A part whose input is dropped out in training, with a state of its own beside the base."""
    if rate == 0:
        return added
    paths = " ".join(weight.path for weight in added.weights_used())
    stream = 0 if seed is None else zlib.crc32(paths.encode())  # another one for each part
    start = SeedStart(seed, stream)
    state = part(base, "dropout", start, (2,), dtype=keras_seam.SEED_DTYPE, trainable=False, role="state")
    return InputDropout(added, state, rate=rate, seeded=seed is not None)


def has_dropout(expression: Expression) -> bool:
    """Whether something in an expression has its input dropped out."""
    return any(isinstance(step.expression, InputDropout) for step in program(expression))


def without_dropout(added: Expression) -> Expression:
    """A part without the dropout on its input."""
    return added.operands[0] if isinstance(added, InputDropout) else added


def rate_of(added: Expression) -> float:
    """The dropout on the input of a part; 0 if there is none."""
    return float(added.parameters["rate"]) if isinstance(added, InputDropout) else 0.0

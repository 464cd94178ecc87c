"""What a layer computes with its weight, and the plan for it.

A layer says what it computes with its weight (`Problem`), the expression says what the weight is
(`Products`). A plan applies some terms of the sum one factor after another, and builds the others into
one weight first; building all of them is what the layer does without a plan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import keras

from tether import keras_seam
from tether.errors import NUMERIC
from tether.planning.cost import Operation
from tether.types import Tensor
from tether.weights.expression import Expression
from tether.weights.leaves import Choice
from tether.weights.operators.arithmetic import ScaleGradient, StopGradient
from tether.weights.operators.quantized import Unpack
from tether.weights.operators.structure import Cast

ASSUMED_ROWS = 32
"""The size of an axis of the input that has none when the layer is compiled."""


@dataclass(frozen=True)
class Convolution:
    """What a convolution adds to a problem: the sizes of its output's positions, and which letters are positions."""

    positions: tuple[int | None, ...]
    depthwise: bool = False


@dataclass(frozen=True)
class Problem:
    """What a layer computes with a weight, in the letters of an einsum."""

    inputs: tuple[str, ...]
    """A letter for each axis of the layer's input; for a lookup, of the array of numbers."""
    kernel: tuple[str, ...]
    """A letter for each axis of the weight. A convolution's are positions, `i` and `o`."""
    outputs: tuple[str, ...]
    sizes: tuple[int | None, ...]
    """The size of each axis of the input; `None` where it is not known."""
    lookup: bool = False
    """Whether the input holds numbers of entries along the weight's first axis."""
    convolution: Convolution | None = None
    itemsize: int = 4
    """Bytes of a number."""
    training: bool = False
    repeated: bool = False
    """Whether this is one of many equal calls before which weights are built once: the steps of a time loop."""
    choice: Choice | None = None
    """The choice that examples make for themselves."""
    chosen: int = 0
    """How many of the input's first axes that has: with one, each example has an option of its own."""
    mixed: bool = False
    """Whether the choice is the weights of a mixture."""


@dataclass(frozen=True)
class Reading:
    """A value that a plan starts from: an expression, and how it is read where examples choose for themselves."""

    expression: Expression
    how: Literal["value", "once", "rows", "options", "table", "weights", "numbers"] = "value"
    """`"value"`: its one value. `"once"`: that of the one choice of a call. `"rows"`: one for each choice, after the
    axes of the choice. `"options"`: one for each option, with zeros for an option that is not finite; `"table"`: as
    they are. Of the choice itself, `"weights"`: how much each option counts, `"numbers"`: which it is."""


@dataclass(frozen=True)
class Alternative:
    """One way to compute it: which terms are built into one weight first, and what it costs."""

    name: str
    merged: tuple[int, ...]
    seconds: float
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is done at a call: immutable, and kept for all calls of its kind."""

    name: str
    """`"materialize"`: the layer builds its weight and goes on as it does without a plan."""
    steps: tuple[Operation, ...] = ()
    factors: tuple[Reading, ...] = ()
    output: int = 0
    seconds: float = 0.0
    alternatives: tuple[Alternative, ...] = ()
    gradient: Plan | None = None
    """Steps whose result has the gradient of the factors that train, where the plan's own steps give them none."""
    trained: tuple[int, ...] = ()
    """The factors that train, if there is such a plan."""
    choice: Choice | None = None
    """The choice that examples make for themselves, by which factors are read."""

    done: tuple[Operation | None, ...] = field(init=False, compare=False)
    """The steps as they are done: a product that is only added to something is done with the sum (`None` before)."""

    # What follows from these is a field too: `torch.compile` reads the fields of a frozen dataclass, and no property.
    materializes: bool = field(init=False, compare=False)
    """Whether the whole weight is built."""
    reads: tuple[tuple[Reading, Coded | None] | None, ...] = field(init=False, compare=False)
    """The factors that a step needs, and for those stored as integers of which only some entries are needed, how."""
    takes_sparse: bool = field(init=False, compare=False)
    """Whether the layer's input is only multiplied with matrices: what can be done with a sparse one."""

    def __post_init__(self) -> None:
        taken_from = {step.inputs[0] - 1 for step in self.steps if step.op == "take"}
        needed = {place - 1 for step in self.steps for place in step.inputs} | {self.output - 1}
        if self.gradient is not None:
            needed |= {place - 1 for step in self.gradient.steps for place in step.inputs}
        reads = tuple(
            ((factor, coded(factor.expression) if place in taken_from else None) if place in needed else None)
            for place, factor in enumerate(self.factors)
        )
        products_only = all(step.op == "matmul" for step in self.steps if 0 in step.inputs)
        object.__setattr__(self, "materializes", self.name == "materialize")
        object.__setattr__(self, "done", self._joined_steps())
        object.__setattr__(self, "reads", reads)
        object.__setattr__(
            self, "chooses", any(read is not None and read[0].how not in ("value", "once") for read in reads)
        )
        object.__setattr__(self, "takes_sparse", self.gradient is None and products_only)

    def _joined_steps(self) -> tuple[Operation | None, ...]:
        first = 1 + len(self.factors)
        uses = Counter(place for step in self.steps for place in step.inputs)
        done: list[Operation | None] = list(self.steps)
        for index, step in enumerate(self.steps):
            if step.op != "add":
                continue
            for other, place in (step.inputs, step.inputs[::-1]):
                product = done[place - first] if place >= first else None
                if product is not None and product.op == "matmul" and uses[place] == 1 and place != self.output:
                    done[place - first], done[index] = None, Operation("add_product", (other, *product.inputs))
                    break
        return tuple(done)


# --------------------------------------------------------------------------- rows of integers
# A table that is stored as integers: rows are taken from these, and only what was taken becomes floats.


@dataclass(frozen=True)
class Coded:
    """An expression that only makes floats of stored integers."""

    stored: Expression
    dtype: str
    packed: tuple[int, int] | None
    """Of two integers in a byte the axis, and how many there are along it."""


def coded(expression: Expression) -> Coded | None:
    """How an expression makes floats of stored integers, if that is all that it does."""
    while isinstance(expression, (StopGradient, ScaleGradient)):  # through integers no gradient flows anyway
        expression = expression.operands[0]
    if not isinstance(expression, Cast):
        return None
    integers, dtype = expression.operands[0], str(expression.parameters["dtype"])
    if integers.dtype not in NUMERIC or "int" not in str(integers.dtype):
        return None
    if isinstance(integers, Unpack):
        return Coded(integers.operands[0], dtype, (integers.parameters["axis"], integers.parameters["size"]))
    return Coded(integers, dtype, None)


@dataclass(frozen=True)
class Integers:
    """The stored integers of a factor."""

    stored: Tensor
    how: Coded
    dtype: str
    """The dtype of the floats."""

    def take(self, numbers: Tensor, axis: int) -> Tensor:
        """The entries along an axis, as floats."""
        packed = self.how.packed
        if packed is not None and packed[0] == axis:
            return keras.ops.take(self.floats(), numbers, axis=axis)
        rows = keras.ops.take(self.stored, numbers, axis=axis)
        moved = len(numbers.shape) - 1
        return self._floats(rows, packed and (packed[0] + (moved if packed[0] > axis else 0), packed[1]))

    def floats(self) -> Tensor:
        """All entries of the table as floats."""
        return self._floats(self.stored, self.how.packed)

    def _floats(self, stored: Tensor, packed: tuple[int, int] | None) -> Tensor:
        integers = stored if packed is None else keras.quantizers.unpack_int4(stored, packed[1], axis=packed[0])
        return keras.ops.cast(integers, self.dtype)


@dataclass(frozen=True)
class Entries:
    """One entry of a stack for each example, of shape `(numbers, ...)`: a product reads it in place where it can."""

    stack: Tensor
    numbers: Tensor

    def times(self, x: Tensor) -> Tensor:
        """A row of each example, of shape `(examples, inputs)` or `(examples, 1, inputs)`, by its entry."""
        found = keras_seam.product_with_entries(keras.ops.reshape(x, (-1, x.shape[-1])), self.stack, self.numbers)
        return keras.ops.reshape(found, (*x.shape[:-1], found.shape[-1]))

    def floats(self) -> Tensor:
        """The entries."""
        return keras_seam.entries(self.stack, self.numbers)


def as_floats(value: object) -> Tensor:
    """A value of a plan that an operation of arithmetic takes."""
    return value.floats() if isinstance(value, (Integers, Entries)) else value


MATERIALIZE = Plan("materialize")

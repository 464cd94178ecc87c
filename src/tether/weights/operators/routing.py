"""What is chosen for each example: options of one form, and a base where none of them is chosen."""

from __future__ import annotations

import keras

from tether.errors import InvalidConfig, ShapeMismatch, received
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Node, Shape, Term, register
from tether.weights.leaves import Choice
from tether.weights.operators.arithmetic import result_type


@register
class Routed(Node):
    """`[options][number]`, and the base where the number is none of the options.

    The operands are the number, a `Choice`; the base; and an expression that reads the number, as a bank does.
    """

    name, arity, indices = "routed", 3, (0,)

    @property
    def count(self) -> int:
        """How many options there are."""
        number = self.operands[0]
        assert isinstance(number, Choice)
        return len(number.choices)

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The one shape of the base and the options."""
        if not isinstance(self.operands[0], Choice):
            raise InvalidConfig(f"What is routed reads a choice. {received(number=self.operands[0])}")
        if shapes[1] != shapes[2]:
            base = self.operands[1].notation()
            raise ShapeMismatch(
                f"The base has the shape of the options, {shapes[2]}. {received(base=base, shape=shapes[1])}"
            )
        return shapes[1]

    def infer_dtype(self, *dtypes: str) -> str | None:
        """Keras's promotion of both."""
        return dtypes[1] if dtypes[1] == dtypes[2] else result_type(*dtypes[1:])

    def compute(self, *values: Tensor) -> Tensor:
        number, base, option = values
        if isinstance(number, int):
            chosen = option if 0 <= number < self.count else base
            # The sum of no elements is zero, and so is its gradient: what is not chosen has one.
            for each in (base, option):
                nothing = keras.ops.sum(keras.ops.reshape(each, (-1,))[:0])
                chosen = keras.ops.add(chosen, keras.ops.cast(nothing, chosen.dtype))
            return chosen
        return where_option(number, self.count, option, base)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the base, which are those of the options."""
        return links.broadcast(self.shape or (), *operands[1:])

    def format(self, *terms: Term) -> Term:
        """As the options are written: the base is what they have in common."""
        return terms[2]

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape


class Mask(Node):
    """1 where a choice is one of the options (or one of them), and 0 elsewhere; or the other way round.

    Plans alone have it, as a factor of a term that only some choices have.
    """

    name, arity, accepts, indices = "mask", 1, ("of",), (0,)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """`"options"`, `"base"`, or the number of an option."""
        return {"of": given["of"]}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """A number."""
        return ()

    def infer_dtype(self, *dtypes: str) -> str | None:
        return keras.config.floatx()

    def compute(self, *values: Tensor) -> Tensor:
        (number,), of = values, self.parameters["of"]
        choice = self.operands[0]
        assert isinstance(choice, Choice)
        number = keras.ops.convert_to_tensor(number, "int32")
        if isinstance(of, int):
            found = keras.ops.equal(number, of)
        else:
            found = is_option(number, len(choice.choices))
            found = keras.ops.logical_not(found) if of == "base" else found
        return keras.ops.cast(found, keras.config.floatx())

    def format(self, *terms: Term) -> Term:
        """A condition in brackets, as mathematics writes what is 1 where it holds."""
        of = self.parameters["of"]
        condition = {"options": "≥ 0", "base": "< 0"}.get(of, f"= {of}")
        return Term(f"[{terms[0].text} {condition}]")


def is_option(number: Tensor, count: int) -> Tensor:
    """Whether numbers are those of options."""
    return keras.ops.logical_and(keras.ops.greater_equal(number, 0), keras.ops.less(number, count))


def where_option(numbers: Tensor, count: int, value: Tensor, other: Tensor) -> Tensor:
    """Values where numbers are those of options, and others elsewhere; the numbers' axes are the values' first ones."""
    exists = is_option(numbers, count)
    missing = len(value.shape) - len(numbers.shape)
    return keras.ops.where(keras.ops.reshape(exists, (*keras.ops.shape(exists), *(1,) * missing)), value, other)


__all__ = ["Mask", "Routed", "is_option", "where_option"]

"""Operators that choose: one of several expressions by an index, for a call or each example, and active adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, received
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Term, as_expression, register
from tether.weights.leaves import Choice
from tether.weights.operators.arithmetic import SUM, result_type

# --------------------------------------------------------------------------- choose
# One of several values, chosen when the layer is called.


@register
class Choose(Node):
    """`[a, b, c][index]`: the first operand is the index, a whole number of shape `()`.

    The options that are not chosen get a gradient of zero, on every backend, whether the index is known
    when the backend compiles or a tensor. They are live weights: weight decay goes on for them.
    """

    name, arity, accepts, indices = "choose", None, ("strict",), (0,)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Whether a number that is none of the options is NaN, and not the nearest."""
        if given.get("strict") not in (None, False, True):
            raise InvalidConfig(f"`strict` is a bool. {received(strict=given['strict'])}")
        return {"strict": True} if given.get("strict") else {}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The one shape of all options."""
        index, *options = shapes
        if index != () or not options:
            raise ShapeMismatch(f"`choose` takes one whole number and the options. {received(index_shape=index)}")
        if any(shape != options[0] for shape in options):
            listed = ", ".join(f"{o.notation()} has shape {s}" for o, s in zip(self.operands[1:], options, strict=True))
            raise ShapeMismatch(f"What can be chosen must have one shape: {listed}.")
        return options[0]

    def infer_dtype(self, *dtypes: str) -> str | None:
        """Keras's promotion of the options."""
        index, *options = dtypes
        _check_index(index)
        return options[0] if len(set(options)) == 1 else result_type(*options)

    def compute(self, *values: Tensor) -> Tensor:
        """The option that the index names; one beyond the ends is taken as the nearest, or is NaN."""
        index, *options = values
        dtypes = {keras.backend.standardize_dtype(option.dtype) for option in options}
        if len(dtypes) > 1:
            options = [keras.ops.cast(option, result_type(*sorted(dtypes))) for option in options]
        last = len(options) - 1
        if isinstance(index, int):
            chosen = options[min(max(index, 0), last)]
        else:
            branches = [lambda *given, place=place: given[place] for place in range(len(options))]
            number = keras.ops.cast(index, "int32")
            index = keras.ops.clip(number, 0, last)
            chosen = keras.ops.switch(index, branches, *options)
            if self.parameters.get("strict") and keras_seam.is_float(keras.backend.standardize_dtype(chosen.dtype)):
                chosen = keras.ops.where(
                    keras.ops.equal(number, index), chosen, keras.ops.cast(float("nan"), chosen.dtype)
                )
        # The sum of no elements is zero, and so is its gradient: every option has one.
        nothing = [keras.ops.sum(keras.ops.reshape(option, (-1,))[:0]) for option in options]
        return keras.ops.add(chosen, keras.ops.cast(sum(nothing[1:], nothing[0]), chosen.dtype))

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of every option."""
        return links.broadcast(self.shape or (), *operands[1:])

    def format(self, *terms: Term) -> Term:
        index, *options = terms
        return Term(f"[{', '.join(option.text for option in options)}][{index.text}]")

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape


def choose(index: object, options: Iterable[object]) -> Expression:
    """One of several values of one shape, by a whole number: usually an argument with a default.

    The options that are not chosen get a gradient of zero.

    Args:
        index: A whole number of shape `()`: an argument, a weight, an expression or a number. Beyond the ends it
            is taken as the nearest.
        options: The weights or expressions, all of one shape.

    Returns:
        The expression, of the options' shape.

    Raises:
        ShapeMismatch: The options' shapes differ, there is none, or the index has axes.
        TetherError: The index is no whole number.

    Example:
    ```python
    which = tether.weights.Argument("which", shape=(), dtype="int32", default=0)
    options = [tether.Weight((8, 4), name=name) for name in ("one", "two")]
    layer = tether.tie(keras.layers.Dense(4), kernel=tether.ops.choose(which, options))
    y = layer(np.ones((2, 8), "float32"), which=1)
    ```
    """
    number = as_expression(index)
    if number.dtype is not None:
        _check_index(number.dtype)
    return Choose(number, *map(as_expression, options))


def _check_index(dtype: str) -> None:
    if not dtype.startswith(("int", "uint")):
        raise TetherError(f"An index is a whole number. {received(dtype=dtype)}")


# --------------------------------------------------------------------------- adapters
# A base and named parts that are added to it, each with a strength that can be changed at any time.


@register
class Adapted(Node):
    """`base + strength · part + ...`: the operands are the base, then a strength and a part for each name.

    A part of strength zero adds nothing, whatever it holds: zero times an infinity would not be zero.
    """

    name, arity, accepts = "adapted", None, ("names", "order")

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The parts' names, each another one; and when each was added to the model: numbers that grow."""
        names, order = given.get("names"), given.get("order")
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            raise InvalidConfig(f"The parts that are added have names. {received(names=names)}")
        if len(set(names)) != len(names):
            raise InvalidConfig(f"Each part has another name. {received(names=names)}")
        if order is None or (isinstance(order, (list, tuple)) and list(order) == list(range(len(names)))):
            return {"names": tuple(names)}  # as files of version 0.1.0 have it
        if not isinstance(order, (list, tuple)) or len(order) != len(names) or not all(type(n) is int for n in order):
            raise InvalidConfig(f"Each part has a number for when it was added. {received(names=names, order=order)}")
        return {"names": tuple(names), "order": tuple(order)}

    @property
    def base(self) -> Expression:
        """What the parts are added to."""
        return self.operands[0]

    @property
    def parts(self) -> dict[str, tuple[Expression, Expression]]:
        """Strength and part of each name."""
        return dict(
            zip(self.parameters["names"], zip(self.operands[1::2], self.operands[2::2], strict=True), strict=True)
        )

    @property
    def order(self) -> dict[str, int]:
        """When each part was added, by name: a later one has a larger number."""
        names = self.parameters["names"]
        return dict(zip(names, self.parameters.get("order", range(len(names))), strict=True))

    def without(self, names: Collection[str]) -> Expression:
        """The same without some of the parts; the base, if none is left."""
        kept = [name for name in self.parts if name not in names]
        if len(kept) == len(self.parts):
            return self
        return adapted(self.base, {name: self.parts[name] for name in kept}, self.order)

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the base; strengths are numbers, and parts must not make it larger."""
        if len(shapes) != 1 + 2 * len(self.parameters["names"]):
            raise InvalidConfig(
                f"Each named part has a strength. {received(names=self.parameters['names'], n=len(shapes))}"
            )
        if any(shape != () for shape in shapes[1::2]):
            raise InvalidConfig(f"A strength has the shape (). {received(shapes=shapes[1::2])}")
        if np.broadcast_shapes(shapes[0], *shapes[2::2]) != shapes[0]:
            raise InvalidConfig(f"A part has the base's shape {shapes[0]}. {received(shapes=shapes[2::2])}")
        return shapes[0]

    def infer_dtype(self, *dtypes: str) -> str | None:
        """Keras's promotion of the base and the parts."""
        kept = (dtypes[0], *dtypes[2::2])
        return kept[0] if len(set(kept)) == 1 else result_type(*kept)

    def compute(self, *values: Tensor) -> Tensor:
        total = values[0]
        for strength, part in zip(values[1::2], values[2::2], strict=True):
            weighted = keras_seam.multiply(keras.ops.cast(strength, part.dtype), part)
            total = keras_seam.add(total, _unless_zero(strength, weighted))
        return total

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the base, and of the parts where they meet it."""
        return links.broadcast(self.shape or (), operands[0], *operands[2::2])

    def format(self, *terms: Term) -> Term:
        """`base + french.strength * (a @ b)`."""
        pairs = zip(terms[1::2], terms[2::2], strict=True)
        texts = [f"{strength.inside(100)} * {part.inside(100)}" for strength, part in pairs]
        return Term(" + ".join([terms[0].inside(SUM), *texts]), SUM)

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The base has the shape of the sum."""
        return shape if all(operand.shape is not None for operand in self.operands[1:]) else None


def adapted(
    base: Expression, parts: Mapping[str, tuple[Expression, Expression]], order: Mapping[str, int]
) -> Expression:
    """A base with named parts, each a strength and what is added; the base itself if there are none.

    Args:
        base: What they are added to.
        parts: Strength and part by name.
        order: When each was added: a number for each name, and for others.
    """
    operands = [operand for pair in parts.values() for operand in pair]
    numbers = tuple(order[name] for name in parts)
    return Adapted(base, *operands, names=tuple(parts), order=numbers) if parts else base


class Switched(Node):
    """A value where a number is not zero, and zero where it is: a factor of a part of an adapter, in a plan.

    Plans alone have it, so files know nothing of it.

    A product of factors that may hold infinities is zero at strength zero only if its factors are.
    """

    name, arity = "switched", 2

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the value; what switches it is one number."""
        if shapes[1] != ():
            raise ShapeMismatch(f"What switches a value is one number. {received(shape=shapes[1])}")
        return shapes[0]

    def compute(self, *values: Tensor) -> Tensor:
        value, strength = values
        return _unless_zero(strength, value)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def format(self, *terms: Term) -> Term:
        """As the value: the strength is a factor of the same product."""
        return terms[0]


def _unless_zero(strength: Tensor, value: Tensor) -> Tensor:
    return keras.ops.where(keras.ops.equal(strength, 0), keras.ops.zeros((), value.dtype), value)


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

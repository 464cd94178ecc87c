"""The value of an expression for each of several choices: what a layer reads whose examples choose for themselves.

An expression that reads a `Choice` has one value for a call. Here it has one for each number: its stacked weights are
read once for all numbers, and what is computed from them is computed for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import keras

from tether import keras_seam
from tether.errors import Unsupported, received
from tether.types import Tensor
from tether.weights.evaluation import cast_to_scope, evaluate
from tether.weights.expression import Expression, Node, Step, Stored, leaves, program
from tether.weights.leaves import Choice, bindings, is_for_each
from tether.weights.operators.arithmetic import (
    Add,
    Divide,
    MatMul,
    Multiply,
    Negative,
    ScaleGradient,
    StopGradient,
    Subtract,
    result_type,
)
from tether.weights.operators.choice import Choose, Mask, Routed, Switched, is_option, where_option
from tether.weights.operators.indexing import Gather
from tether.weights.operators.structure import Cast, Reshape

_OF_ANY_SHAPE = (Negative, StopGradient, ScaleGradient, Cast, Switched)
"""Operators that do the same to each number of their first operand."""
_ARITHMETIC = (Add, Subtract, Multiply, Divide)


def choices_in(expression: Expression) -> tuple[Choice, ...]:
    """The choices that an expression reads."""
    return tuple(leaf for leaf in leaves(expression) if isinstance(leaf, Choice))


def bound_for_each(choices: Iterable[Choice]) -> tuple[Choice, Tensor] | None:
    """The one of several choices that examples make for themselves now, and what it is bound to.

    Raises:
        Unsupported: There are two.
    """
    bound, found = bindings(), []
    for choice in choices:
        value = bound.get(choice.key)
        if is_for_each(value):
            found.append((choice, value))
    if len(found) > 1:
        names = [choice.name for choice, _ in found]
        raise Unsupported(f"One choice is made for each example, and the others for a call. {received(choices=names)}")
    return found[0] if found else None


def for_options(expression: Expression, choice: Choice) -> Tensor:
    """The values for all options, along a first axis. Where the base is meant, an option stands."""
    return _Spread(choice, None).of(expression)


def for_numbers(expression: Expression, choice: Choice, numbers: Tensor) -> Tensor:
    """The value for each number, in the axes of the numbers and then its own.

    A number that is none of the options has the base where the expression says what that is (`Routed`), and elsewhere
    what an option has: who asks masks it.
    """
    shape = expression.shape or ()
    found = _Spread(choice, keras.ops.reshape(numbers, (-1,))).of(expression)
    return found if len(numbers.shape) == 1 else keras.ops.reshape(found, (*keras.ops.shape(numbers), *shape))


def has_base(expression: Expression, choice: Choice) -> bool:
    """Whether an expression says itself what it is where a choice is none of the options."""
    return any(isinstance(each, Routed) and each.operands[0] == choice for each in _nodes(expression))


def _nodes(expression: Expression) -> Iterator[Node]:
    return (step.expression for step in program(expression) if isinstance(step.expression, Node))


def once(expression: Expression) -> Tensor:
    """A factor of a plan for the one choice of a call: zeros where that is none of the options, and there is a base."""
    numbers = [
        (choice.bound(), len(choice.choices))
        for choice in choices_in(expression)
        if choice.none is not None and not has_base(expression, choice)
    ]
    if any(isinstance(number, int) and not 0 <= number < count for number, count in numbers):
        return keras.ops.zeros(expression.shape or (), expression.dtype)
    value = evaluate(expression)
    for number, count in numbers:
        if not isinstance(number, int):
            value = where_option(number, count, value, keras.ops.zeros((), value.dtype))
    return value


def rows(expression: Expression, choice: Choice, bound: Tensor) -> Tensor:
    """A factor of a plan for each example: of what has no option, zeros where there is a base, else NaN.

    Args:
        expression: The factor.
        choice: The choice that it reads.
        bound: What that is bound to: whole numbers, or the weights of a mixture.
    """
    if isinstance(expression, Mask):
        return cast_to_scope(_mask(expression, bound))
    if has_base(expression, choice) or keras_seam.is_float(keras.backend.standardize_dtype(bound.dtype)):
        return whole_rows(expression, choice, bound)
    known = [size for size in bound.shape if isinstance(size, int)]
    few = len(known) < len(bound.shape) or len(choice.choices) <= math.prod(known)
    if few and not is_read_only(expression):
        flat = keras.ops.clip(bound, 0, len(choice.choices) - 1)
        value = keras_seam.entries(for_options(expression, choice), flat)
    else:
        value = for_numbers(expression, choice, bound)
    return masked(value, choice, bound)


def whole_rows(expression: Expression, choice: Choice, bound: Tensor) -> Tensor:
    """The whole value for each example, which is the base's where it has no option, and NaN where there is no base."""
    if not keras_seam.is_float(keras.backend.standardize_dtype(bound.dtype)):
        value = for_numbers(expression, choice, bound)
        return masked(value, choice, bound) if choice.none is None else value
    (options,), bad = without_bad([for_options(expression, choice)])
    weights = weights_of_choice(choice, bound, bad, keras.backend.standardize_dtype(options.dtype))
    value = keras.ops.tensordot(weights, options, axes=1)
    if not has_base(expression, choice):
        return value
    if isinstance(expression, Routed):
        base = evaluate(expression.operands[1])  # alone: no option is computed for it, which may not be finite
    else:
        base = for_numbers(expression, choice, keras.ops.convert_to_tensor([-1], dtype="int32"))[0]
    left = keras.ops.subtract(1.0, keras.ops.sum(weights, axis=-1))
    of_base = keras.ops.tensordot(keras.ops.expand_dims(left, -1), keras.ops.expand_dims(base, 0), axes=1)
    return keras.ops.add(value, of_base)


def _mask(mask: Mask, bound: Tensor) -> Tensor:
    """Which examples have one of the options, a certain one, or the base; of a mixture, how much of it they have."""
    if not keras_seam.is_float(keras.backend.standardize_dtype(bound.dtype)):
        return mask.compute(bound)
    of = mask.parameters["of"]
    if isinstance(of, int):
        return bound[..., of]
    total = keras.ops.sum(bound, axis=-1)
    return keras.ops.subtract(1.0, total) if of == "base" else total


def masked(value: Tensor, choice: Choice, numbers: Tensor) -> Tensor:
    """The values with those that belong to none of the options replaced: by zeros where there is a base, else NaN.

    Where the numbers lie at hand and all are those of options, there is nothing to replace, and no copy is made. An
    accelerator is not waited for: this is asked for every factor of every layer.
    """
    if are_options(choice, numbers):
        return value
    other = keras.ops.cast(float("nan") if choice.none is None else 0.0, value.dtype)
    return where_option(numbers, len(choice.choices), value, other)


def are_options(choice: Choice, numbers: Tensor) -> bool:
    """Whether numbers lie at hand, and all are those of options."""
    if not keras_seam.is_concrete(numbers) or keras_seam.is_compiling() or not keras_seam.is_in_memory(numbers):
        return False
    known = keras_seam.on_host(numbers)
    return bool(known.size and known.min() >= 0 and known.max() < len(choice.choices))


def is_stack(expression: Expression, choice: Choice) -> bool:
    """Whether the options of an expression are the entries of one stack, as it is stored and in its order."""
    while isinstance(expression, StopGradient):
        expression = expression.operands[0]
    if not isinstance(expression, Gather) or expression.parameters["axis"] != 0:
        return False
    return isinstance(expression.operands[0], Stored) and expression.operands[1] == choice


def is_read_only(expression: Expression) -> bool:
    """Whether an expression only reads entries, and computes nothing that costs much."""
    return all(isinstance(node, (Gather, Choose, Reshape, *_OF_ANY_SHAPE)) for node in _nodes(expression))


class _Spread:
    """Computes an expression for several numbers at once; `None` is for all options."""

    def __init__(self, choice: Choice, numbers: Tensor | None) -> None:
        self.choice, self.count = choice, len(choice.choices)
        self.numbers = numbers
        self.read = None if numbers is None else keras.ops.clip(numbers, 0, self.count - 1)

    def of(self, expression: Expression) -> Tensor:
        """The values, along a first axis."""
        steps = program(expression)
        spread: dict[int, Tensor] = {}
        for place, step in enumerate(steps):
            if step.expression == self.choice:
                spread[place] = self.read
            elif any(at in spread for at in step.operands):
                spread[place] = self._step(steps, step, spread)
        last = len(steps) - 1
        if last in spread:
            return spread[last]
        value = evaluate(expression)
        rows = self.count if self.read is None else keras.ops.shape(self.read)[0]
        return keras.ops.broadcast_to(value, (rows, *value.shape))

    def _step(self, steps: tuple[Step, ...], step: Step, spread: dict[int, Tensor]) -> Tensor:
        node = step.expression
        assert isinstance(node, Node)
        if isinstance(node, Gather) and step.operands[0] not in spread:
            return self._entries(node, evaluate(steps[step.operands[0]].expression), spread[step.operands[1]])
        if isinstance(node, Choose) and not any(at in spread for at in step.operands[1:]):
            options = [evaluate(steps[at].expression) for at in step.operands[1:]]
            dtypes = sorted({keras.backend.standardize_dtype(option.dtype) for option in options})
            stacked = keras.ops.stack([keras.ops.cast(option, result_type(*dtypes)) for option in options])
            number = spread[step.operands[0]]
            return stacked if number is None else keras_seam.entries(stacked, number)
        if isinstance(node, Choose):
            return self._chosen(steps, step, spread)
        if isinstance(node, Routed):
            option = self._value(steps, step.operands[2], spread)
            if self.numbers is None:
                return option
            base = self._value(steps, step.operands[1], spread)
            return where_option(self.numbers, self.count, option, base)
        values = [spread[at] if at in spread else evaluate(steps[at].expression) for at in step.operands]
        if isinstance(node, _OF_ANY_SHAPE) and all(at not in spread for at in step.operands[1:]):
            return node.compute(*values)
        if isinstance(node, Reshape):
            return keras.ops.reshape(values[0], (-1, *(node.shape or ())))
        if isinstance(node, _ARITHMETIC):
            return node.compute(
                *(self._padded(node, steps, at, value, spread) for at, value in zip(step.operands, values, strict=True))
            )
        if isinstance(node, MatMul) and all(len(operand.shape or ()) == 2 for operand in node.operands):
            return node.compute(*values)
        return self._mapped(node, step, values, spread)

    def _chosen(self, steps: tuple[Step, ...], step: Step, spread: dict[int, Tensor]) -> Tensor:
        """One of several values for each number, by a number that is computed from it: the stack in which it is."""
        index = self._value(steps, step.operands[0], spread)
        if index is None:
            index = keras.ops.arange(self.count, dtype="int32")
        options = [self._value(steps, at, spread) for at in step.operands[1:]]
        dtype = result_type(*sorted({keras.backend.standardize_dtype(option.dtype) for option in options}))
        chosen, *others = (keras.ops.cast(option, dtype) for option in options)
        index = keras.ops.reshape(index, (-1, *(1,) * (len(chosen.shape) - 1)))
        for place, option in enumerate(others, 1):
            chosen = keras.ops.where(keras.ops.greater_equal(index, place), option, chosen)
        return chosen

    @staticmethod
    def _padded(node: Node, steps: tuple[Step, ...], at: int, value: Tensor, spread: dict[int, Tensor]) -> Tensor:
        """An operand of arithmetic whose own axes stand at the end of all of the result's."""
        own = steps[at].expression.shape or ()
        missing = len(node.shape or ()) - len(own)
        return keras.ops.reshape(value, (-1, *(1,) * missing, *own)) if at in spread and missing else value

    def _value(self, steps: tuple[Step, ...], place: int, spread: dict[int, Tensor]) -> Tensor:
        """A value with the axis of numbers: one of size 1, if it is the same for all."""
        return spread[place] if place in spread else keras.ops.expand_dims(evaluate(steps[place].expression), 0)

    def _entries(self, node: Gather, whole: Tensor, number: Tensor | None) -> Tensor:
        axis = node.parameters["axis"] % len(whole.shape)
        if axis:
            whole = keras.ops.moveaxis(whole, axis, 0)
        return whole if number is None else keras_seam.entries(whole, number)

    def _mapped(self, node: Node, step: Step, values: list[Tensor], spread: dict[int, Tensor]) -> Tensor:
        """A node of several axes, computed for each number."""
        moving = [place for place, at in enumerate(step.operands) if at in spread]

        def one(given: tuple[Tensor, ...]) -> Tensor:
            now = list(values)
            for place, value in zip(moving, given, strict=True):
                now[place] = value
            return node.compute(*now)

        return keras.ops.vectorized_map(one, tuple(values[place] for place in moving))


# --------------------------------------------------------------------------- all options, weighted
# A sum over all options by the weights of a mixture, of which one is 1 where an option is chosen: matrix products in
# the place of reading entries. What is not finite in one option is then taken out of the sum, so that it does not spoil
# the others (zero times NaN is NaN), and put back where that option counts.


def without_bad(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Values for all options with zeros for those that are not finite in one of them, and which these are."""
    bad: Tensor = None
    for value in values:
        flat = keras.ops.reshape(value, (value.shape[0], math.prod(value.shape[1:])))
        here = keras.ops.logical_not(keras.ops.all(keras.ops.isfinite(flat), axis=1))
        bad = here if bad is None else keras.ops.logical_or(bad, here)
    kept = [
        keras.ops.where(keras.ops.reshape(bad, (-1, *(1,) * (len(v.shape) - 1))), keras.ops.zeros((), v.dtype), v)
        for v in values
    ]
    return kept, bad


def weights_of_choice(choice: Choice, bound: Tensor, bad: Tensor | None, dtype: str) -> Tensor:
    """The weight of each option for each example: 1 for what is chosen, NaN if that is not finite."""
    count = len(choice.choices)
    if "int" in keras.backend.standardize_dtype(bound.dtype):
        chosen = keras.ops.equal(keras.ops.expand_dims(bound, -1), keras.ops.arange(count, dtype="int32"))
        found = keras.ops.cast(chosen, dtype)
        if choice.none is None:
            lost = keras.ops.expand_dims(keras.ops.logical_not(is_option(bound, count)), -1)
            found = keras.ops.where(lost, keras.ops.cast(float("nan"), dtype), found)
    else:
        found = keras.ops.cast(bound, dtype)
        chosen = keras.ops.not_equal(found, 0)
    if bad is None:
        return found
    return keras.ops.where(keras.ops.logical_and(chosen, bad), keras.ops.cast(float("nan"), dtype), found)


__all__ = [
    "bound_for_each",
    "choices_in",
    "for_numbers",
    "for_options",
    "has_base",
    "is_read_only",
    "masked",
    "once",
    "rows",
    "weights_of_choice",
    "whole_rows",
    "without_bad",
]

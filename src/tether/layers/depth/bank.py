"""Several expressions of one program stored as one, read by a number: the weights in which they differ become a stack.

`Repeat` reads its block's weights so by the depth, and `route` by the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.layers.tying.swap import become_all
from tether.types import Array, Config, Tensor
from tether.weights import placement
from tether.weights.expression import (
    Expression,
    Node,
    Shape,
    StatefulNode,
    Step,
    as_expression,
    instead_of,
    known_shape,
    program,
    resolved,
    rewritten,
)
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import Add, Multiply, Negative, ScaleGradient, StopGradient
from tether.weights.operators.choice import Choose
from tether.weights.operators.indexing import Gather
from tether.weights.operators.structure import Cast, Reshape, stack
from tether.weights.operators.structure import index as index_of
from tether.weights.storage import Copy
from tether.weights.weight import Weight

if TYPE_CHECKING:
    from tether.planning.products import Labels, Summand


def bank(expressions: Iterable[object], index: object) -> Expression:
    """Several expressions of one form as one, which is the one that an index names.

    What is equal in all of them stays as it is. Where weights differ, they become one stacked weight, of the shape
    `(n, ...)`, which the index reads: an optimizer, a file and a compiled graph then see one weight in the place of n,
    however many there are. The weights that were stacked follow: wherever they are used, they are their entry of it.
    The optimizer of a compiled model that has trained them goes on with the stack of what it kept for each, unless that
    has another shape than the weights (Adafactor): then the model asks to be compiled again.

    Args:
        expressions: Weights or expressions of one form: they differ in their weights only, and these have the same
            shape, dtype and role. What trains and what does not are stacked apart.
        index: A whole number of shape `()`: an argument of the call (`tether.weights.Argument("choice", (), "int32")`),
            a weight or an expression.

    Returns:
        The expression, of the shape that each of them has.

    Raises:
        TetherError: The expressions are of different forms, or their weights cannot be stacked. Nothing is changed
        then.

    Example:
    ```python
    base = tether.Weight((8, 4), "glorot_uniform", name="base", trainable=False)
    tasks = [base + tether.low_rank(2) for _ in range(100)]
    choice = tether.weights.Argument("choice", (), "int32", default=0)
    layer = tether.tie(keras.layers.Dense(4), kernel=tether.bank(tasks, choice))
    y = layer(np.ones((3, 8), "float32"), choice=42)
    assert len(layer.trainable_weights) == 3  # the bias, and two stacks of 100 factors
    ```
    """
    options = as_options(expressions)
    number = _expression(index)
    if number.shape != () or "int" not in str(number.dtype):
        raise TetherError(
            f"The index of a bank is one whole number. {received(shape=number.shape, dtype=number.dtype)}"
        )
    found, stacks = zipped(options, number)
    become_all(followers(stacks), origins_of(stacks))
    return found


def as_options(expressions: object) -> list[Expression]:
    """A list of weights and expressions, each as it is made of weights now.

    Raises:
        TetherError: It is no list, or empty, or has something else in it.
    """
    return [resolved(_expression(each)) for each in _several(expressions)]


def _several(expressions: object) -> list[object]:
    if isinstance(expressions, (Expression, Mapping, str)) or not isinstance(expressions, Iterable):
        raise TetherError(f"A bank is made of a list of expressions. {received(expressions=expressions)}")
    found = list(expressions)
    if not found:
        raise TetherError("A bank is made of one expression or more, and the list is empty.")
    return found


def _expression(value: object) -> Expression:
    try:
        return as_expression(value)
    except TypeError:
        raise TetherError(
            f"A bank is made of weights and expressions.{instead_of(value)} {received(value=value)}"
        ) from None


class StackedWeight:
    """A stacked weight, and those that it is made of: each once, in the order in which they appear."""

    def __init__(self, weight: Weight, parts: Sequence[Weight]) -> None:
        self.weight, self.parts = weight, parts


def zipped(
    options: Sequence[Expression],
    number: Expression,
    *,
    stored: bool = True,
    train: Collection[int] | None = None,
    known: dict[tuple[int, ...], StackedWeight] | None = None,
) -> tuple[Expression, list[StackedWeight]]:
    """One expression that is the option of a number, and the stacks in it. The weights that were stacked stay.

    Args:
        options: The expressions.
        number: What names one of them.
        stored: Whether the weights in which they differ become stacks; else each stays stored by itself, and one of
            them is chosen.
        train: Which options train, by their places: their weights become one stack, and those of the others another,
            which is frozen. Left out, weights train as they did; those that do and those that do not are stacked apart.
        known: Stacks of other expressions of the same options, by what is in them: the same weights are one stack.

    Raises:
        TetherError: The options are of different forms, or their weights cannot be stacked.
    """
    programs = [program(option) for option in options]
    largest = max(range(len(options)), key=lambda place: _size_of(options[place]))
    for place in range(len(options)):
        refuse_other_form(options, programs, largest, place)
    states = [step.expression for step in programs[largest] if isinstance(step.expression, StatefulNode)]
    if states and not stored:
        raise Unsupported(f"{states[0].notation()} keeps a state, which goes on in a stack of them only.")
    known = {} if known is None else known
    trains = _trains(programs, train)
    stacked_in: dict[int, tuple[int, ...]] = {}
    plans: list[Sequence[Expression] | None] = []
    seeds = {s.operands[at] for s in programs[0] if isinstance(s.expression, Node) for at in s.expression.seeds}
    for place, step in enumerate(programs[largest]):
        here = [steps[place].expression for steps in programs]
        is_leaf = not isinstance(step.expression, Node) and place not in seeds
        differs = is_leaf and any(other != here[0] for other in here[1:])
        if differs and stored and isinstance(step.expression, Weight):
            _check(here, stacked_in)
        plans.append(here if differs else None)
    if any(plan is not None and len({each.shape for each in plan}) > 1 for plan in plans):
        refuse_filling(options, largest)

    def entry(place: int, current: Expression) -> Expression | None:
        found = plans[place]
        if found is None:
            return None
        if isinstance(current, Constant):
            return _numbers([each.number for each in found if isinstance(each, Constant)], number)
        weights = [each for each in found if isinstance(each, Weight)]
        if not stored:
            return Choose(number, *weights, strict=True)
        parts = {id(weight): weight for weight in weights}
        found_in: list[StackedWeight] = []
        for trainable in (False, True):
            apart = tuple(weight for weight in parts.values() if trains(weight) is trainable)
            if apart:
                key = tuple(map(id, apart))
                if key not in known:
                    known[key] = StackedWeight(_stacked(apart, known_shape(current), trainable), apart)
                found_in.append(known[key])
        entries = [_entry(each, weights, number) for each in found_in]
        if len(entries) == 1:
            return entries[0]
        which = Gather(Constant.of(np.array([trains(weight) for weight in weights], "int32")), number)
        return Choose(which, *entries)

    return rewritten(options[largest], entry), list(known.values())


def _trains(programs: Sequence[Sequence[Step]], train: Collection[int] | None) -> Callable[[Weight], bool]:
    """Whether a weight that is stacked trains."""
    if train is None:
        return lambda weight: weight.trainable_flag
    used = [{step.expression for step in steps if isinstance(step.expression, Weight)} for steps in programs]
    learns = {id(weight) for place in train for weight in used[place]}
    return lambda weight: weight.trainable_flag and id(weight) in learns


def _size_of(option: Expression) -> int:
    return sum(math.prod(known_shape(weight)) for weight in option.weights_used())


def _numbers(of: Sequence[Any], number: Expression) -> Expression:
    """One of several numbers; of whole ones, which may be those of entries, in as few words as there are."""
    if all(isinstance(each, int) for each in of):
        return number if list(of) == list(range(len(of))) else Gather(Constant.of(np.array(of, "int32")), number)
    return Gather(Constant.of(np.array(of, "float32")), number)


def _entry(stack: StackedWeight, of: Sequence[Weight], number: Expression) -> Expression:
    """The entry of a stack for a number; with several numbers for one entry, by a table of them.

    A weight that is in another stack has the number of the first entry here, which then is not chosen.
    """
    places = {id(weight): place for place, weight in enumerate(stack.parts)}
    table = [places.get(id(weight), 0) for weight in of]
    if table != list(range(len(stack.parts))):
        number = Gather(Constant.of(np.array(table, "int32")), number)
    return Gather(stack.weight, number)


def refuse_other_form(
    options: Sequence[Expression], programs: Sequence[tuple[Step, ...]], largest: int, place: int
) -> None:
    """Refuses an option that is not of the form of the largest one, and names what differs."""
    first, steps = programs[largest], programs[place]

    def refuse(a: Expression, b: Expression) -> None:
        raise TetherError(
            f"The expressions of a bank have one form, and differ in their weights only. Number {largest} has "
            f"{a.notation()} where number {place} has {b.notation()}. Give each one form: a part that starts at zero "
            "adds nothing."
        )

    of_entries = {step.operands[1] for step in first if isinstance(step.expression, Gather)}
    for at, (a, b) in enumerate(zip(first, steps, strict=False)):
        mine, theirs = a.expression, b.expression
        if isinstance(mine, Node) and isinstance(theirs, Node):
            filled = isinstance(mine, Reshape) and type(mine) is type(theirs) and a.operands == b.operands
            if not a.same_as(b) and not (filled and mine.operands[0].shape != theirs.operands[0].shape):
                refuse(mine, theirs)
        elif isinstance(mine, Constant) and isinstance(theirs, Constant) and None not in (mine.number, theirs.number):
            kind = int if at in of_entries else float
            if mine != theirs and not (isinstance(mine.number, kind) and isinstance(theirs.number, kind)):
                refuse(mine, theirs)
        elif type(mine) is not type(theirs) or (not isinstance(mine, Weight) and mine != theirs):
            refuse(mine, theirs)
    if len(first) != len(steps):
        refuse(options[largest], options[place])


def refuse_filling(options: Sequence[Expression], largest: int) -> None:
    """Refuses weights of different shapes, but for those that zeros may fill up: the thin factors of a product.

    That is so where the axes that differ are summed over, and nothing but a product reads the weights.
    """
    from tether.planning.products import products  # imported with the first tie

    model = products(options[largest])
    kept = {label for term in model.terms for axis in term.axes for label in axis}
    for option in options:
        weights = zip(option.weights_used(), options[largest].weights_used(), strict=True)
        smaller = {weight for weight, other in weights if weight.shape != other.shape}
        found = products(option)
        pairs = zip(found.terms, model.terms, strict=False)
        matched = [_matched(mine, theirs, kept) for mine, theirs in pairs]
        alike = len(found.terms) == len(model.terms) and None not in matched
        sizes = {
            label: (found.sizes[mine], model.sizes[label])
            for term, same in zip(found.terms, matched, strict=False)
            for factor, labels in zip(term.factors, same or (), strict=False)
            for mine, label in zip(factor.labels, labels, strict=True)
        }
        read = [factor.expression for term in found.terms for factor in term.factors]
        whole = [each for each in read if smaller & set(each.weights_used()) and not _is_stored(each)]
        if not alike or whole or any(a != b and label in kept for label, (a, b) in sizes.items()):
            first = next(iter(smaller)) if smaller else option
            raise TetherError(
                f"Weights that are stacked have one shape, or are thin factors of a product that zeros fill up. "
                f"{received(expression=option.notation(), shape=first.shape)}"
            )


def _matched(term: Summand, model: Summand, kept: Collection[int]) -> list[Labels] | None:
    """The labels of a term's factors, as another term calls them that is alike; `None` if it is not.

    An axis of size 1 has no label, so the other may have more: of those that are summed over.
    """
    from tether.planning.products import labels_of

    summed = sorted({label for factor in model.factors for label in factor.labels} - set(kept))
    for count in range(len(summed) + 1):
        for left_out in itertools.combinations(summed, count):
            labels = [tuple(n for n in factor.labels if n not in left_out) for factor in model.factors]
            narrowed = [replace(f, labels=own) for f, own in zip(model.factors, labels, strict=True)]
            if labels_of(term) == labels_of(replace(model, factors=tuple(narrowed))):
                return labels
    return None


def taken_out(part: Expression) -> tuple[float, Expression]:
    """The number that a part is multiplied with, and the part without it."""
    if isinstance(part, Negative):
        scale, rest = taken_out(part.operands[0])
        return -scale, rest
    if isinstance(part, Multiply):
        numbers = [each for each in part.operands if isinstance(each, Constant) and each.number is not None]
        if len(numbers) == 1:
            scale, rest = taken_out(next(each for each in part.operands if each is not numbers[0]))
            return scale * float(numbers[0].number or 0.0), rest
    if isinstance(part, (Reshape, Cast)):
        scale, rest = taken_out(part.operands[0])
        return scale, part if rest is part.operands[0] else type(part)(rest, **part.parameters)
    return 1.0, part


def with_number(option: Expression) -> Expression:
    """A sum with the number before its last part written, also where it is 1: so that others may have another."""
    if not isinstance(option, Add):
        return option
    scale, part = taken_out(option.operands[1])
    return Add(option.operands[0], Multiply(Constant.of(scale), part))


def _is_stored(expression: Expression) -> bool:
    """Whether an expression is a weight in another shape or dtype, and nothing is computed with it."""
    while isinstance(expression, (Reshape, Cast, StopGradient, ScaleGradient)):
        expression = expression.operands[0]
    return isinstance(expression, Weight)


def _check(leaves: Sequence[Expression], stacked_in: dict[int, tuple[int, ...]]) -> None:
    """Refuses weights at one place of the options that cannot be stacked."""
    found = [leaf for leaf in leaves if isinstance(leaf, Weight)]
    first, key = found[0], tuple(map(id, {id(w): w for w in found}.values()))
    for weight in found:
        mine, theirs = _described(first), _described(weight)
        if mine != theirs or len(known_shape(weight)) != len(known_shape(first)):
            raise TetherError(
                f"Weights that are stacked are alike. {first.name!r} has shape {first.shape}, {mine}; {weight.name!r} "
                f"has shape {weight.shape}, {theirs}."
            )
        if weight.present_constraint is not None:
            raise Unsupported(
                f"The weight {weight.name!r} has a constraint, which would hold for the whole stack. Write it into the "
                "expression (`tether.forms.positive`, for example), or take it off."
            )
        if stacked_in.setdefault(id(weight), key) != key:
            raise TetherError(
                f"The weight {weight.name!r} would be in two stacks: it is at two places of the expressions, beside "
                "other weights at each."
            )


def _described(weight: Weight) -> str:
    regularizer = "" if weight.regularizer is None else f", {keras.regularizers.serialize(weight.regularizer)}"
    role = "" if weight.role is None else f", role {weight.role!r}"
    return f"dtype {weight.dtype}{role}{regularizer}"


def _stacked(parts: Sequence[Weight], shape: Shape, trainable: bool) -> Weight:
    """A new weight of the values of several, one after another, in the name and at the path of the first.

    Values that are smaller than the shape are filled up with zeros.
    """
    first = parts[0]
    found = like(first, (len(parts), *shape), first.name, trainable)
    waiting = [keras_seam.waiting_start(weight.variable) for weight in parts]
    alike = all(known_shape(weight) == shape for weight in parts)
    if any(start is not None for start in waiting):  # inside a trace: there are no values yet
        starts = [start or Copy(values_of(weight, weight.name)) for start, weight in zip(waiting, parts, strict=True)]
        found.start_by(_Entries(starts, [known_shape(weight) for weight in parts]), path=first.path)
    else:
        values = [values_of(weight, weight.name) for weight in parts]
        found.start_at(np.stack([padded(value, shape) for value in values]), path=first.path)
    placement.lay_out_as(found.variable, placement.stacked([weight.variable for weight in parts]))
    if alike and len({_started(weight) for weight in parts}) == 1 and first.initializer is not None:
        found.initializer = EachEntry(first.initializer)
    return found


def padded(value: Array, shape: Shape) -> Array:
    """An array with zeros at the ends of its axes, so that it has a shape."""
    if value.shape == shape:
        return value
    found = np.zeros(shape, value.dtype)
    found[tuple(map(slice, value.shape))] = value
    return found


def like(weight: Weight, shape: Shape, name: str, trainable: bool | None = None) -> Weight:
    """A weight of another shape and name that is otherwise like one, without a value yet."""
    return Weight(
        shape,
        dtype=weight.dtype,
        trainable=weight.trainable_flag if trainable is None else trainable,
        regularizer=weight.regularizer,
        name=name,
        role=weight.role,
    )


def _started(weight: Weight) -> str:
    """How a weight starts, but for its seed."""
    if weight.initializer is None:
        return ""
    config = keras.initializers.serialize(weight.initializer)
    settings = {key: value for key, value in dict(config.get("config") or {}).items() if key != "seed"}
    return repr((config.get("class_name"), sorted(settings.items())))


class _Entries(keras.initializers.Initializer):
    """Starts each entry of a stacked weight by an initializer of its own, in a shape of its own."""

    def __init__(self, starts: Sequence[Any], shapes: Sequence[Shape]) -> None:
        self.starts, self.shapes = starts, shapes

    def __call__(self, shape: Shape, dtype: str | None = None) -> Tensor:
        """The entries, filled up with zeros."""
        found = []
        for start, own in zip(self.starts, self.shapes, strict=True):
            value = start(own, dtype=dtype)
            missing = [(0, size - less) for size, less in zip(shape[1:], own, strict=True)]
            found.append(keras.ops.pad(value, missing) if tuple(shape[1:]) != own else value)
        return keras.ops.stack(found)


@keras.saving.register_keras_serializable(package="tether", name="EachEntry")
class EachEntry(keras.initializers.Initializer):
    """Starts each entry of a stacked weight as a weight of its own would start.

    Args:
        initializer: How one entry starts.
    """

    def __init__(self, initializer: Any) -> None:
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape: Shape, dtype: str | None = None) -> Tensor:
        """The entries: the first axis of the shape is their number."""
        draws = [self.initializer.clone() if place else self.initializer for place in range(shape[0])]
        return keras.ops.stack([draw(tuple(shape[1:]), dtype=dtype) for draw in draws])

    def get_config(self) -> Config:
        """How one entry starts."""
        return {"initializer": keras.initializers.serialize(self.initializer)}

    @classmethod
    def from_config(cls, config: Config) -> EachEntry:
        """Makes the initializer again."""
        return cls(keras.initializers.deserialize(config["initializer"]))


def followers(stacks: Iterable[StackedWeight]) -> dict[Weight, Expression]:
    """What the weights that were stacked are from now on: their entries, without what they were filled up with."""
    found: dict[Weight, Expression] = {}
    for each in stacks:
        for place, part in enumerate(each.parts):
            entry: Expression = Gather(each.weight, Constant.of(place))
            shape = known_shape(part)
            found[part] = entry if entry.shape == shape else index_of(entry, tuple(map(slice, shape)))
    return found


def origins_of(stacks: Iterable[StackedWeight]) -> dict[int, keras_seam.SlotSource]:
    """Of which variables stacks are made, so that an optimizer's slots follow; of none that zeros have filled up."""
    return {
        id(each.weight.variable): keras_seam.SlotSource(tuple(part.variable for part in each.parts), keras.ops.stack)
        for each in stacks
        if len({part.shape for part in each.parts}) == 1
    }


def unbank(expression: Expression, count: int | None = None) -> list[Expression]:
    """The expressions that a bank was made of, each with weights of its own again.

    The stacked weights are no longer stored: the bank itself, wherever it is used, follows the new weights. So does
    what the optimizer of a compiled model keeps for them, as in `bank`.

    Args:
        expression: A bank, or an expression with one or more in it, read by the same index.
        count: How many there are; left out, as many as a stack has entries.

    Returns:
        The expressions by number, with the values that the stacks have now. Each new weight is named after its stack,
        with its number.

    Raises:
        TetherError: There is no stack in the expression that an index reads.

    Example:
    ```python
    choice = tether.weights.Argument("choice", (), "int32", default=0)
    found = tether.bank([tether.Weight((4,), "ones", name=name) for name in ("a", "b")], choice)
    a, b = tether.unbank(found)
    assert a.shape == (4,) and a != b
    ```
    """
    root = resolved(expression)
    tables = {
        step.expression.operands[0]: table_of(step.expression.operands[1])
        for step in program(root)
        if isinstance(step.expression, Gather)
        and isinstance(step.expression.operands[0], Weight)
        and step.expression.parameters["axis"] == 0
        and step.expression.operands[1].shape == ()
    }
    if not tables:
        raise TetherError(f"There is no bank in {expression.notation()}: no stacked weight that an index reads.")
    weight, table = next(iter(tables.items()))
    parts = {weight: _parts(weight) for weight in tables}
    if count is None:
        count = len(parts[weight] if table is None else table)
    found = []
    for number in range(count):

        def own(_: int, current: Expression, number: int = number) -> Expression | None:
            stacked = current.operands[0] if isinstance(current, Gather) else None
            if not isinstance(stacked, Weight) or stacked not in parts:
                return None
            table = tables[stacked]
            return parts[stacked][number if table is None else table[number]]

        found.append(rewritten(root, own, partial(_one_of_both, number)))
    origins = {
        id(part.variable): keras_seam.SlotSource((weight.variable,), _Entry(place))
        for weight, entries in parts.items()
        for place, part in enumerate(entries)
    }
    become_all({weight: stack(entries) for weight, entries in parts.items()}, origins)
    return found


def _one_of_both(number: int, node: Node, operands: list[Expression]) -> Expression:
    """A node over the entries of one option: where stacks of what trains and of what is frozen meet, that one's."""
    if isinstance(node, Choose):
        which = table_of(node.operands[0])
        if which is not None:
            return operands[1 + which[number]]
    return type(node)(*operands, **node.parameters)


@dataclass(frozen=True)
class _Entry:
    """The slot of an entry, from the one of the stack."""

    place: int

    def __call__(self, slots: list[Tensor]) -> Tensor:
        return slots[0][self.place]


def table_of(number: Expression) -> list[int] | None:
    """The entries of a stack by number, where not each number has one of its own."""
    if isinstance(number, Gather) and isinstance(number.operands[0], Constant):
        array = number.operands[0].array
        return None if array is None else [int(each) for each in array]
    return None


def values_of(expression: Expression, name: str = "") -> Array:
    """The values of a weight or expression, for what all processes do if it lies on several."""
    return keras_seam.on_host(keras_seam.plain_tensor(expression.value), name, in_step=True)


def _parts(weight: Weight) -> list[Weight]:
    values = values_of(weight, weight.name)
    found = []
    for place, value in enumerate(values):
        part = like(weight, tuple(value.shape), f"{weight.name}_{place}")
        part.start_at(np.array(value), path=f"{weight.path}_{place}")
        placement.lay_out_as(part.variable, (keras_seam.layout_of(weight.variable) or ())[1:])
        found.append(part)
    return found


__all__ = [
    "EachEntry",
    "StackedWeight",
    "as_options",
    "bank",
    "followers",
    "like",
    "origins_of",
    "padded",
    "refuse_filling",
    "refuse_other_form",
    "table_of",
    "taken_out",
    "unbank",
    "values_of",
    "with_number",
    "zipped",
]

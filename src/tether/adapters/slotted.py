"""Slots of a running set: places for adapters in a model that come and go while its graph stays.

`capacity` gives weights of a model a stack with an entry for each slot in the place of every weight that one adapter
has. A weight of the model is then its base where the choice of a call is -1, and for slot n

    base + strength[n] · part[n]

A free slot is all zeros, so it is the base. Here is how such weights are made and found again, and how the entries of
one slot are written and read; the functions that people call for it are those for other adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from weakref import WeakKeyDictionary

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, UnknownName, listed, received
from tether.forms.low_rank import ranks_of
from tether.layers.depth.bank import (
    EachEntry,
    like,
    padded,
    refuse_filling,
    refuse_other_form,
    table_of,
    taken_out,
    values_of,
)
from tether.layers.family.named import named_weights
from tether.layers.tying.state import View, arguments_in, slots_of
from tether.types import Array
from tether.weights.expression import Expression, Node, Shape, Stored, known_shape, program, rewritten
from tether.weights.leaves import Constant, Slots, numpy_dtype
from tether.weights.operators.arithmetic import Add, Multiply, Subtract
from tether.weights.operators.choice import Choose, Routed
from tether.weights.operators.indexing import Gather
from tether.weights.weight import Weight

STRENGTH = "strength"
"""The role of the stack of numbers that parts are multiplied with."""
Part = Callable[[Expression], Expression]
"""Makes what is added to a weight, from the weight."""


@dataclass(frozen=True)
class Slotted:
    """A weight of a model with slots."""

    path: str
    routed: Routed

    @property
    def slots(self) -> Slots:
        """The choice."""
        number = self.routed.operands[0]
        assert isinstance(number, Slots)
        return number

    @property
    def base(self) -> Expression:
        """What the parts are added to."""
        return self.routed.operands[1]

    @property
    def _product(self) -> Expression:
        return self.routed.operands[2].operands[1]  # type: ignore[attr-defined]

    @property
    def strength(self) -> Node:
        """The read of the stack of strengths."""
        return self._product.operands[0]  # type: ignore[attr-defined]

    @property
    def part(self) -> Expression:
        """What is added, with stacks read by the slot's number in the place of weights."""
        return self._product.operands[1]  # type: ignore[attr-defined]

    def reads(self) -> list[Node]:
        """The parts of the expression that are an entry of a stack, each once."""
        found = dict.fromkeys(each for each in _nodes(self.part) if _is_read(each))
        inner = {id(operand) for each in found if isinstance(each, Choose) for operand in each.operands[1:]}
        return [each for each in found if id(each) not in inner]

    def of(self, entries: Mapping[Node, Expression]) -> Expression:
        """The part with others in the place of the entries."""
        return rewritten(self.part, lambda _, current: entries.get(current) if isinstance(current, Node) else None)

    def refuse(self, name: str, core: Expression) -> None:
        """Raises if a part is not of the form of a slot.

        Raises:
            TetherError: It has another form.
            ShapeMismatch: It has weights that are larger than an entry.
        """
        template = self.of({read: _entry_like(read) for read in self.reads()})
        mine, theirs = program(template), program(core)
        try:
            refuse_other_form([template, core], [mine, theirs], 0, 1)
        except TetherError:
            raise TetherError(
                f"A slot of {self.path!r} holds {template.notation()}, and the adapter {name!r} has {core.notation()} "
                "there. Give it the form that `capacity` was asked for."
            ) from None
        pairs = [(a.expression, b.expression) for a, b in zip(mine, theirs, strict=True)]
        shapes = [(known_shape(a), known_shape(b)) for a, b in pairs if isinstance(a, Weight) and a != b]
        if all(a == b for a, b in shapes):
            return
        if any(len(a) != len(b) or any(n < m for n, m in zip(a, b, strict=True)) for a, b in shapes):
            ranks = {"rank": max(ranks_of(core), default=None), "slot": max(ranks_of(template), default=None)}
            raise ShapeMismatch(
                f"The adapter {name!r} has larger weights for {self.path!r} than a slot holds: ask `capacity` for a "
                f"larger rank. {received(**(ranks if ranks['rank'] else {'shapes': shapes}))}"
            )
        refuse_filling([template, core], 0)

    def values(self, core: Expression, arrays: Mapping[Stored, Array]) -> dict[Node, Array]:
        """What the entries are for a part of the form of a slot: given arrays, or the values of its weights."""
        template = self.of(places := {read: _entry_like(read) for read in self.reads()})
        read_of = {id(place): read for read, place in places.items()}
        found: dict[Node, Array] = {}
        for mine, theirs in zip(program(template), program(core), strict=True):
            if id(mine.expression) in read_of:
                weight = theirs.expression
                assert isinstance(weight, Weight)
                found[read_of[id(mine.expression)]] = arrays[weight] if weight in arrays else values_of(weight)
        return found


def _nodes(expression: Expression) -> list[Node]:
    return [step.expression for step in program(expression) if isinstance(step.expression, Node)]


def _is_read(node: Node) -> bool:
    """Whether a node is one entry of a stack, or of one of two stacks, by the number of a slot."""
    if isinstance(node, Choose):
        return table_of(node.operands[0]) is not None
    if not isinstance(node, Gather) or not isinstance(node.operands[0], Weight):
        return False
    number = node.operands[1]
    return isinstance(number.operands[1] if table_of(number) is not None else number, Slots)  # type: ignore[attr-defined]


def _located(read: Expression, number: int) -> tuple[Weight, int]:
    """The stack that has the entry of a slot, and its place in it."""
    assert isinstance(read, Node)
    if isinstance(read, Choose):
        which = table_of(read.operands[0])
        assert which is not None
        return _located(read.operands[1 + which[number]], number)
    stack, table = read.operands[0], table_of(read.operands[1])
    assert isinstance(stack, Weight)
    return stack, number if table is None else table[number]


_blanks: WeakKeyDictionary[Weight, Weight] = WeakKeyDictionary()
"""For each stack a weight like its entries: making one is most of the time that an adapter takes to come or go."""


def _entry_like(read: Expression) -> Weight:
    """A weight, without a value, of the shape, dtype and role of an entry."""
    stack, _ = _located(read, 0)
    found, shape = _blanks.get(stack), known_shape(stack)[1:]
    if found is None or (found.shape, found.dtype, found.role) != (shape, stack.dtype, stack.role):
        found = _blanks[stack] = like(stack, shape, stack.name)
    return found


@functools.lru_cache(4096)
def stand_in(shape: Shape, dtype: str, role: str | None, number: int) -> Weight:
    """A weight without a value, to write down a part of which the values are known otherwise. It is kept."""
    return Weight(shape, dtype=dtype, role=role, name=f"stand_in_{number}")


# --------------------------------------------------------------------------- making


class Stacks:
    """Makes stacks with an entry for each slot: one for each weight of a part, wherever it is used.

    Args:
        slots: The choice.
        train: How many slots train, the first ones: their entries are stacks of their own.
    """

    def __init__(self, slots: Slots, train: int) -> None:
        self.slots, self.train = slots, train
        self._known: dict[Weight, Expression] = {}

    def routed(self, base: Expression, part: Expression) -> Routed:
        """A weight with slots, of its base and a part that one adapter would add."""
        scale, core = taken_out(part)
        known: set[Expression] = set(base.weights_used())
        known.update(node.operands[at] for node in _nodes(core) for at in node.seeds)  # drawn once for all slots

        def entry(_: int, current: Expression) -> Expression | None:
            return self._read(current) if isinstance(current, Weight) and current not in known else None

        stacked = rewritten(core, entry)
        first, zeros = next(iter(base.weights_used()), None), np.zeros(len(self.slots.names), "float32")
        strength = Weight.beside(first, "strength", zeros, None, dtype="float32", trainable=False, role=STRENGTH)
        strength.initializer = EachEntry(keras.initializers.Constant(scale))
        return Routed(self.slots, base, Add(base, Multiply(Gather(strength, self.slots), stacked)))

    def _read(self, weight: Weight) -> Expression:
        if weight not in self._known:
            count = len(self.slots.names)
            train = min(self.train, count) if weight.trainable_flag else 0
            found: list[Expression] = []
            for size, first, trainable in ((count - train, train, False), (train, 0, True)):
                if size == count:
                    self._known[weight] = Gather(self._stack(weight, size, trainable), self.slots)
                    return self._known[weight]
                table = [place - first if first <= place < first + size else 0 for place in range(count)]
                number = Gather(Constant.of(np.array(table, "int32")), self.slots)
                if size:
                    found.append(Gather(self._stack(weight, size, trainable), number))
            flags = np.array([place < train for place in range(count)], "int32")
            self._known[weight] = Choose(Gather(Constant.of(flags), self.slots), *found)
        return self._known[weight]

    @staticmethod
    def _stack(weight: Weight, size: int, trainable: bool) -> Weight:
        shape, end = known_shape(weight), "" if trainable or not weight.trainable_flag else "_frozen"
        found = like(weight, (size, *shape), f"{weight.name}{end}", trainable)
        found.start_at(np.zeros((size, *shape), weight.dtype), path=f"{weight.path}{end}")
        start = weight.initializer
        if start is None and not np.any(values_of(weight)):
            start = keras.initializers.Zeros()
        if start is not None:
            found.initializer = EachEntry(start)
        return found


# --------------------------------------------------------------------------- finding


def slotted_weights(model: keras.Layer) -> dict[str, Slotted]:
    """The weights of a model with slots, by path."""
    found = {}
    for weight in named_weights(model):
        if isinstance(weight.variable, View):
            routed = next((each for each in _nodes(weight.variable.expression) if _has_slots(each)), None)
            if isinstance(routed, Routed):
                found[weight.path] = Slotted(weight.path, routed)
    return found


def _has_slots(node: Node) -> bool:
    return isinstance(node, Routed) and isinstance(node.operands[0], Slots)


def tables(model: keras.Layer) -> list[Slots]:
    """Every object with the names of a model's slots: they are alike."""
    found = {}
    for layer in keras_seam.contained_layers(model):
        for slot in slots_of(layer):
            for leaf in arguments_in(slot.view.expression):
                if isinstance(leaf, Slots):
                    found[id(leaf)] = leaf
    return list(found.values())


def names_in(model: keras.Layer) -> dict[str, int]:
    """The number of the slot of each adapter that has one, by its name."""
    first = next(iter(tables(model)), None)
    return {} if first is None else {name: place for place, name in enumerate(first.names) if name is not None}


def rename(model: keras.Layer, number: int, name: str | None) -> None:
    """Gives a slot another name, or frees it."""
    for each in tables(model):
        each.names[number] = name


def slot_for(places: Mapping[str, Slotted], name: str, trainable: bool) -> int:
    """The slot that an adapter of this name has, or the first free one: `slots_for` of one adapter."""
    return slots_for(places, [name], trainable)[0]


def slots_for(places: Mapping[str, Slotted], adapters: Sequence[str], trainable: bool) -> list[int]:
    """The slots that adapters of these names have, or the first free ones, of those that train or of the others.

    Raises:
        TetherError: Not enough are free.
    """
    names, trains = next(iter(places.values())).slots.names, training_slots(places)
    free = [place for place, name in enumerate(names) if name is None]
    wanted = [place for place in free if (place < trains) is trainable or not 0 < trains < len(names)]
    new = [name for name in adapters if name not in names]
    if len(new) <= len(wanted):
        found = dict(zip(new, wanted, strict=False))
        return [names.index(name) if name in names else found[name] for name in adapters]
    if len(new) <= len(free):
        raise TetherError(
            f"{len(wanted)} of the slots that {'train' if trainable else 'are frozen'} are free, and {len(new)} are "
            f"needed: of {len(names)} slots {trains} train. Take adapters off, or give `trainable={not trainable}`."
        )
    taken = [str(name) for name in names if name is not None]
    raise TetherError(
        f"{len(free)} of {len(names)} slots are free, and {len(new)} are needed. The others have: {listed(taken, 6)}. "
        "Take one off: `remove(model, name)`, or give `replace=True`."
    )


def training_slots(places: Mapping[str, Slotted]) -> int:
    """How many slots train."""
    sizes = [0]
    for place in places.values():
        for read in place.reads():
            stack, _ = _located(read, 0)
            if stack.trainable_flag:
                sizes.append(known_shape(stack)[0])
    return max(sizes)


# --------------------------------------------------------------------------- writing and reading


def made_of(places: Mapping[str, Slotted], parts: Mapping[str, Part], name: str) -> dict[str, Expression]:
    """What an adapter adds to weights with slots, by path.

    Raises:
        UnknownName: It changes a weight that has none.
    """
    outside = [path for path in parts if path not in places]
    if outside:
        raise UnknownName(
            f"The adapter {name!r} changes {outside[0]!r}, which has no slots. They are at: {listed(places, 4)}."
        )
    return {path: part(places[path].base) for path, part in parts.items()}


Content = Mapping[str, tuple[float, Mapping[Node, Array]]]
"""What a slot has for weights, by path: the strength, and the entries."""


def content_of(
    places: Mapping[str, Slotted],
    made: Mapping[str, Expression],
    name: str,
    strength: float,
    arrays: Mapping[Stored, Array] = MappingProxyType({}),
) -> Content:
    """What a slot has to hold for an adapter.

    Args:
        places: The weights with slots.
        made: What the adapter adds to them, by path.
        name: Its name.
        strength: What it is multiplied with.
        arrays: The values of its weights that hold none (`stand_in`).

    Raises:
        TetherError: A part is not of the form of a slot.
    """
    found = {}
    for path, part in made.items():
        scale, core = taken_out(part)
        places[path].refuse(name, core)
        found[path] = (scale * strength, places[path].values(core, arrays))
    return found


def start_of(places: Mapping[str, Slotted]) -> Content:
    """What a slot holds for a new adapter: each weight as the form starts it.

    Raises:
        TetherError: The form starts at values of the base.
    """
    found = {}
    known: dict[Node, Array] = {}
    for path, place in places.items():
        for read in place.reads():
            if read not in known:
                stack, _ = _located(read, 0)
                if isinstance(place.part, Subtract) and place.part.operands == (read, place.base):  # of `full`
                    known[read] = values_of(place.base)
                    continue
                if not isinstance(stack.initializer, EachEntry):
                    raise TetherError(
                        f"How a slot of {path!r} starts is not known, since its form starts at values of the base: "
                        "give the form, as in `add(model, name, {...})`."
                    )
                known[read] = _first_entry(stack)
        strength, _ = _located(place.strength, 0)
        found[path] = (float(_first_entry(strength)), {read: known[read] for read in place.reads()})
    return found


def _first_entry(stack: Weight) -> Array:
    """An entry as a stack starts it; numbers that are all one are not made on the device first."""
    assert isinstance(stack.initializer, EachEntry)
    start, shape, dtype = stack.initializer.initializer, known_shape(stack)[1:], numpy_dtype(stack.dtype or "float32")
    if type(start) is keras.initializers.Zeros:
        return np.zeros(shape, dtype)
    if type(start) is keras.initializers.Constant:
        return np.full(shape, start.value, dtype)
    return np.asarray(keras_seam.on_host(start.clone()(shape, dtype=stack.dtype)))


def fill_slot(
    model: keras.Layer, places: Mapping[str, Slotted], number: int, name: str | None, content: Content
) -> None:
    """Writes an adapter to a slot, under a name; weights that it does not change are zero there.

    What optimizers keep for the entries starts anew.

    Raises:
        TetherError: This runs in a callback of the model's `fit`. Nothing is written then.
    """
    entries: dict[tuple[int, int], tuple[Weight, int, Array]] = {}
    for path in sorted(places, key=content.__contains__):  # last what is not zero: weights may share a stack
        place = places[path]
        strength, values = content.get(path, (0.0, {}))
        for read in (place.strength, *place.reads()):
            stack, row = _located(read, number)
            shape = known_shape(stack)[1:]
            value = np.asarray(strength) if read is place.strength else values.get(read, np.zeros(shape))
            entries[id(stack), row] = (stack, row, padded(value, shape))
    keras_seam.refuse_sharded(model.variables)
    keras_seam.refuse_in_fit([stack for stack, _, _ in entries.values()], "Change slots before or after `fit`.")
    for stack, row, array in entries.values():
        keras_seam.write_entry(stack.variable, row, array)
    keras_seam.forget_entries([(stack.variable, row) for stack, row, _ in entries.values()])
    rename(model, number, name)


def scaled(scale: float, part: Expression) -> Expression:
    """A part times a number, which is not written where it is 1."""
    return part if scale == 1.0 else Multiply(Constant.of(scale), part)


def part_of(places: Iterable[Slotted], number: int) -> dict[str, Expression]:
    """What the adapter of a slot adds to each weight, with weights of its own: copies of the entries.

    A weight that it does not change is left out.
    """
    found: dict[str, Expression] = {}
    known: dict[tuple[int, int], Expression] = {}
    for place in places:
        stack, row = _located(place.strength, number)
        strength = float(values_of(stack)[row])
        if strength == 0.0:
            continue
        entries: dict[Node, Expression] = {}
        for read in place.reads():
            stack, row = _located(read, number)
            if (id(stack), row) not in known:
                entry = like(stack, known_shape(stack)[1:], stack.name.removesuffix("_frozen"), True)
                entry.start_at(np.array(values_of(stack)[row]), path=stack.path.removesuffix("_frozen"))
                known[id(stack), row] = entry
            entries[read] = known[id(stack), row]
        found[place.path] = scaled(strength, place.of(entries))
    return found


__all__ = [
    "Content",
    "Slotted",
    "Stacks",
    "content_of",
    "fill_slot",
    "made_of",
    "names_in",
    "part_of",
    "rename",
    "scaled",
    "slot_for",
    "slots_for",
    "slotted_weights",
    "stand_in",
    "start_of",
    "tables",
    "training_slots",
]

"""The facts of a model's sharing: what is stored, who uses it and how. Every view of a model is made from them.

The facts of a live model and those of its file are equal where the file holds the fact; what it does not hold is
`None`. So nothing here refers to a variable, a layer or a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate

from tether.errors import InvalidConfig, received
from tether.types import Config
from tether.weights.leaves import numpy_dtype

# --------------------------------------------------------------------------- facts


VERSION = 1
Shape = tuple[int, ...]


def as_bytes(shape: Shape, dtype: str) -> int:
    """The bytes that a tensor takes: its elements times the size of one."""
    return math.prod(shape) * itemsize(dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a Keras dtype."""
    if dtype == "string":
        return 0
    return numpy_dtype(dtype).itemsize


@dataclass(frozen=True)
class StoredThing:
    """Something stored once: a place, a shape and a dtype."""

    place: str
    """Where it is in the model's file: `layers/dense/vars/0`. It names the tensor, in facts of models and of files."""
    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        """The bytes that it takes."""
        return as_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Slot(StoredThing):
    """What an optimizer keeps for one variable."""

    name: str | None = None
    """Such as `momentums`."""
    weight: str | None = None
    """The place of the weight that it is kept for; `None` for what is kept once, such as the number of steps."""
    again: tuple[str, ...] = ()
    """Further places of the file that hold the same: a loss scale writes what its inner optimizer writes too."""


@dataclass(frozen=True)
class StoredWeight(StoredThing):
    """One weight, stored once, with what says how it trains."""

    path: str | None = None
    """The path of its variable: `codec`, `encode/bias`; the weight's name in a file that tells no more."""
    trainable: bool | None = None
    """Whether it trains."""
    again: tuple[str, ...] = ()
    """Further places of the file that hold the same weight."""
    state: bool = False
    """Whether it is state that no layer computes with as a weight: of a random generator, of a metric."""


@dataclass(frozen=True)
class UseOf:
    """One layer's attribute, and what it reads."""

    layer: str
    """The names of the layers from the model down to the one that reads: `block/attention/query`."""
    attribute: str | None
    """The layer's own name for it: `kernel`."""
    expression: str | None
    """What it reads, in mathematics: `codec.T`. A variable of the layer's own reads itself."""
    weights: tuple[str, ...]
    """The places of the stored weights in it."""
    shape: Shape
    dtype: str
    kind: str | None = None
    """The class of the layer."""
    tied: bool = False
    """Whether it is a tie; otherwise it is a variable of the layer's own."""
    trains: bool | None = None
    """Whether a gradient flows through this use."""
    stopped: tuple[str, ...] | None = None
    """The places of its weights that get no gradient through this use: all of them, or those under `stop_gradient`."""
    kept_still: bool = False
    """Whether it is a tie that reads one weight as it is, under `stop_gradient`: how a part of a layer is frozen."""

    @property
    def where(self) -> str:
        """The layer and the attribute."""
        return "/".join(part for part in (self.layer, self.attribute) if part)

    @property
    def bytes(self) -> int:
        """What a variable of the layer's own would take in its place."""
        return as_bytes(self.shape, self.dtype)

    def reaches(self, weight: StoredWeight) -> bool | None:
        """Whether a weight in it gets a gradient through this use; `None` if that is not known."""
        if weight.trainable is False or weight.place in (self.stopped or ()):
            return False
        return self.trains


@dataclass(frozen=True)
class AdapterOf:
    """One adapter: a named part on some weights, `base + strength · part`."""

    name: str
    strength: float | None
    """`None` in the facts of a model's file, of which no value is read."""
    ranks: tuple[int, ...]
    """The ranks of its products of two factors, each once, from small to large; empty for other forms."""
    changes: tuple[str, ...]
    """The layers and attributes that it changes, as `UseOf.where` has them."""
    weights: tuple[str, ...]
    """The places of the weights that it has brought, its strength among them."""
    numbers: int
    """How many numbers it has to train, whether they train now or not."""
    bytes: int
    """What its weights take."""
    trains: bool | None
    """Whether any of them trains now."""


@dataclass(frozen=True)
class Facts:
    """The facts of a model or of a file.

    Attributes:
        name: The model's name, or the file's.
        weights: Every stored weight, once, in the order in which Keras writes them.
        uses: Every use, in the order of the layers.
        optimizer: What the optimizer keeps.
        layers: The layers that have or use weights, in the order of the model, with their classes.
        ties: Whether the uses tell of every tie. A file of weights without Tether's notes does not.
        adapters: The named adapters (`tether.adapters`) that are on the model's weights, in the order in which they
            were added. One that is merged is none for as long.
    """

    name: str
    weights: tuple[StoredWeight, ...]
    uses: tuple[UseOf, ...]
    optimizer: tuple[Slot, ...] = ()
    layers: tuple[tuple[str, str | None], ...] = ()
    ties: bool = True
    adapters: tuple[AdapterOf, ...] = ()

    @cached_property
    def _weights(self) -> dict[str, StoredWeight]:
        return {weight.place: weight for weight in self.weights}

    @cached_property
    def _uses(self) -> dict[str, tuple[UseOf, ...]]:
        found: dict[str, list[UseOf]] = {weight.place: [] for weight in self.weights}
        for use in self.uses:
            for place in use.weights:
                found.setdefault(place, []).append(use)
        return {place: tuple(uses) for place, uses in found.items()}

    @cached_property
    def _slots(self) -> dict[str | None, tuple[Slot, ...]]:
        found: dict[str | None, list[Slot]] = {}
        for slot in self.optimizer:
            found.setdefault(slot.weight, []).append(slot)
        return {place: tuple(slots) for place, slots in found.items()}

    def weight(self, place: str) -> StoredWeight:
        """The weight at a place of the file."""
        return self._weights[place]

    def uses_of(self, weight: StoredWeight) -> tuple[UseOf, ...]:
        """The uses of a weight."""
        return self._uses[weight.place]

    def slots_of(self, weight: StoredWeight) -> tuple[Slot, ...]:
        """What the optimizer keeps for a weight."""
        return self._slots.get(weight.place, ())

    def shared(self) -> Iterator[StoredWeight]:
        """The weights with more than one use, but for those that an adapter has brought: they are the adapter's."""
        return (w for w in self.weights if len(self.uses_of(w)) > 1 and w.place not in self._of_adapters)

    def of_adapters(self) -> tuple[StoredWeight, ...]:
        """What adapters have brought, strengths included, and nobody else reads."""
        return tuple(weight for weight in self.weights if weight.place in self._of_adapters)

    def is_plain(self, weight: StoredWeight) -> bool:
        """Whether one layer owns the weight and nobody else reads it."""
        uses = self.uses_of(weight)
        return not weight.again and len(uses) <= 1 and not any(use.expression and not use.kept_still for use in uses)

    @cached_property
    def _of_adapters(self) -> set[str]:
        """The places of what adapters have brought, and nobody else reads."""
        own = {place for adapter in self.adapters for place in adapter.weights}
        return own - {place for use in self.uses if not self._is_adapted(use) for place in use.weights}

    @cached_property
    def _changed(self) -> set[str]:
        return {where for adapter in self.adapters for where in adapter.changes}

    def _is_adapted(self, use: UseOf) -> bool:
        return use.expression is not None and use.where in self._changed

    def is_shared_or_combined(self, weight: StoredWeight) -> bool:
        """Whether the weight has several uses, or one in an expression that makes something else of it.

        What an adapter has brought is the adapter's, and a base under it that nobody else reads has one use.
        """
        if weight.place in self._of_adapters:
            return False
        uses = self.uses_of(weight)
        if weight.again or len(uses) != 1 or not self._is_adapted(uses[0]):
            return not self.is_plain(weight)
        return any(place != weight.place and place not in self._of_adapters for place in uses[0].weights)

    def shared_only(self) -> Facts:
        """The facts of what is shared or combined: without weights that have one use, by the layer that owns them.

        Adapters alone make nothing shared (`is_shared_or_combined`).
        """
        kept = {weight.place for weight in self.weights if self.is_shared_or_combined(weight)}
        uses = tuple(use for use in self.uses if not kept.isdisjoint(use.weights))
        places = kept | {place for use in uses for place in use.weights}
        weights = tuple(weight for weight in self.weights if weight.place in places)
        names = {name for use in uses for name in accumulate(use.layer.split("/"), "{}/{}".format)}
        layers = tuple(layer for layer in self.layers if layer[0] in names)
        return replace(self, weights=weights, uses=uses, layers=layers)

    @property
    def stored_bytes(self) -> int:
        """The bytes that all weights take, each counted once."""
        return sum(weight.bytes for weight in self.weights)

    @property
    def unshared_bytes(self) -> int:
        """What they would take if every use were a variable of its layer's own, as `tether.materialize` makes it."""
        return sum(use.bytes for use in self.uses) + sum(w.bytes for w in self.weights if not self.uses_of(w))

    @property
    def optimizer_bytes(self) -> int:
        """The bytes of what the optimizer keeps."""
        return sum(slot.bytes for slot in self.optimizer)

    def _repr_html_(self) -> str:
        return _VIEWS["html"](self)

    def to_json(self) -> Config:
        """The facts as what JSON can hold; `from_json` reads it."""
        totals = {
            "stored_bytes": self.stored_bytes,
            "unshared_bytes": self.unshared_bytes,
            "optimizer_bytes": self.optimizer_bytes,
        }
        return {"version": VERSION, **asdict(self), "totals": totals}

    @classmethod
    def from_json(cls, data: object) -> Facts:
        """The facts that `to_json` wrote.

        Raises:
            InvalidConfig: It did not write them.
        """
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise InvalidConfig(
                f"Facts as JSON are a dict of version {VERSION}, as `to_json` writes it. "
                + received(version=data.get("version") if isinstance(data, dict) else type(data).__name__)
            )
        try:
            return cls(
                name=str(data["name"]),
                weights=tuple(StoredWeight(**_tuples(entry)) for entry in data["weights"]),
                uses=tuple(UseOf(**_tuples(entry)) for entry in data["uses"]),
                optimizer=tuple(Slot(**_tuples(entry)) for entry in data["optimizer"]),
                layers=tuple((path, kind) for path, kind in data["layers"]),
                ties=bool(data["ties"]),
                adapters=tuple(AdapterOf(**_tuples(entry)) for entry in data.get("adapters", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidConfig(f"These facts are not what `to_json` writes: {error}.") from error


_VIEWS: dict[str, Callable[[Facts], str]] = {}


def shown_by(view: Callable[[Facts], str]) -> None:
    """Lets facts show themselves in a notebook by a view of them. Views import this module, so it can import none."""
    _VIEWS["html"] = view


def _tuples(entry: Config) -> Config:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


# --------------------------------------------------------------------------- what two have not in common
# What two models, two files, or a model and a file do not have in common.


@dataclass(frozen=True)
class Change:
    """One difference. A value that is `None` on one side is not there."""

    what: str
    """`weight`, `use` or `optimizer`."""
    where: str
    """The place of a weight, or the layer and attribute of a use."""
    fact: str
    """Which fact differs: `shape`, `expression`; `present` if one side has nothing there."""
    before: object
    after: object

    def __str__(self) -> str:
        if self.fact == "present":
            return f"{'+' if self.after else '-'} {self.what} {self.where}"
        return f"~ {self.what} {self.where}: {self.fact} {self.before!r} -> {self.after!r}"


@dataclass(frozen=True)
class Difference:
    """The differences of two models; true if there is any."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "no difference"


def difference(before: Facts, after: Facts) -> Difference:
    """What differs between two sets of facts. A fact that one side does not hold is no difference.

    Weights are compared by their places in a file, ties by layer and attribute; where a file does not tell the
    attributes, by layer and number. Whether layers have the same variables of their own, their places say.
    """
    changes: list[Change] = []
    changes += _of("weight", _weights(before), _weights(after))
    if before.ties and after.ties:
        by_number = any(use.tied and use.attribute is None for side in (before, after) for use in side.uses)
        one, other = _ties(before, by_number), _ties(after, by_number)
        known = ((key, use) for ties in (one, other) for key, use in ties.items() if use.attribute is not None)
        names = {key: use.where for key, use in known} if by_number else {}
        changes += _of("use", _compared(one), _compared(other), names)
    if before.optimizer and after.optimizer:
        changes += _of("optimizer", _slots(before), _slots(after))
    return Difference(tuple(changes))


def _weights(facts: Facts) -> dict[str, Config]:
    """Every place that holds a weight; one that holds a weight again is a place too."""
    return {
        place: {"shape": weight.shape, "dtype": weight.dtype, "trainable": weight.trainable}
        for weight in facts.weights
        for place in (weight.place, *weight.again)
    }


def _ties(facts: Facts, by_number: bool) -> dict[str, UseOf]:
    """The ties by layer and attribute, or by layer and number; of several that have one name by a number too."""
    found: dict[str, UseOf] = {}
    seen: Counter[str] = Counter()
    for use in facts.uses:
        if use.tied:
            name = use.layer if by_number else use.where
            seen[name] += 1
            found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = use
    return found


def _compared(ties: dict[str, UseOf]) -> dict[str, dict[str, object]]:
    return {
        key: {
            "attribute": use.attribute,
            "expression": use.expression,
            "weights": use.weights,
            "shape": use.shape,
            "dtype": use.dtype,
            "kind": use.kind,
            "trains": use.trains,
        }
        for key, use in ties.items()
    }


def _slots(facts: Facts) -> dict[str, Config]:
    return {
        place: {"shape": slot.shape, "dtype": slot.dtype}
        for slot in facts.optimizer
        for place in (slot.place, *slot.again)
    }


def _of(
    what: str,
    before: dict[str, dict[str, object]],
    after: dict[str, dict[str, object]],
    names: dict[str, str] | None = None,
) -> list[Change]:
    """The changes of things that are compared by a key; `names` are what people call them."""
    found: list[Change] = []
    for key in before:
        where = (names or {}).get(key, key)
        if key not in after:
            found.append(Change(what, where, "present", True, None))
            continue
        for fact, value in before[key].items():
            other = after[key][fact]
            if value is not None and other is not None and value != other:
                found.append(Change(what, where, fact, value, other))
    added = [(names or {}).get(key, key) for key in after if key not in before]
    return found + [Change(what, where, "present", None, True) for where in added]


# --------------------------------------------------------------------------- sizes in words
# Numbers of bytes in units that people read.


def human_bytes(number: int) -> str:
    """A number of bytes in decimal units: `512 B`, `200.7 kB`, `1.3 GB`."""
    if abs(number) < 1000:
        return f"{number} B"
    size = number / 1000
    for unit in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.95:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} PB"

"""What two models, two files, or a model and a file do not have in common."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tether.inspection.facts import Facts, UseOf


@dataclass(frozen=True)
class Change:
    """One difference. A value that is `None` on one side is not there."""

    what: str
    """`weight`, `use` or `optimizer`."""
    where: str
    """The place of a weight, or the layer and attribute of a use."""
    fact: str
    """Which fact differs: `shape`, `expression`; `present` if one side has nothing there."""
    before: Any
    after: Any

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


def _weights(facts: Facts) -> dict[str, dict[str, Any]]:
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


def _compared(ties: dict[str, UseOf]) -> dict[str, dict[str, Any]]:
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


def _slots(facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        place: {"shape": slot.shape, "dtype": slot.dtype}
        for slot in facts.optimizer
        for place in (slot.place, *slot.again)
    }


def _of(
    what: str,
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
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

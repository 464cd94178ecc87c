"""What two models, two files, or a model and a file do not have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tether.inspection.facts import Facts


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

    Weights are compared by their places in a file, ties by layer and attribute. Whether layers have the same
    variables of their own, their places say.
    """
    changes: list[Change] = []
    changes += _of("weight", _weights(before), _weights(after))
    if before.ties and after.ties:
        changes += _of("use", _ties(before), _ties(after))
    if before.optimizer and after.optimizer:
        changes += _of("optimizer", _slots(before), _slots(after))
    return Difference(tuple(changes))


def _weights(facts: Facts) -> dict[str, dict[str, Any]]:
    """Every place that holds a weight; one that holds a weight again is a place too."""
    found = {}
    for weight in facts.weights:
        for place in (weight.place, *weight.again):
            found[place] = {"shape": weight.shape, "dtype": weight.dtype, "trainable": weight.trainable}
    return found


def _ties(facts: Facts) -> dict[str, dict[str, Any]]:
    return {
        use.where: {
            "expression": use.expression,
            "weights": use.weights,
            "shape": use.shape,
            "dtype": use.dtype,
            "kind": use.kind,
            "trains": use.trains,
        }
        for use in facts.uses
        if use.tied
    }


def _slots(facts: Facts) -> dict[str, dict[str, Any]]:
    return {slot.place: {"shape": slot.shape, "dtype": slot.dtype} for slot in facts.optimizer}


def _of(what: str, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[Change]:
    found = [Change(what, where, "present", True, None) for where in before if where not in after]
    found += [Change(what, where, "present", None, True) for where in after if where not in before]
    for where in before:
        for fact, value in before[where].items() if where in after else ():
            other = after[where][fact]
            if value is not None and other is not None and value != other:
                found.append(Change(what, where, fact, value, other))
    return found

"""The adapters of a model or a file, as its expressions tell them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tether.forms.low_rank import ranks_of
from tether.inspection.facts import AdapterOf, StoredWeight
from tether.weights.expression import Expression, Stored
from tether.weights.operators.choice import Adapted


@dataclass
class _Seen:
    number: int = 0
    strength: Expression | None = None
    ranks: set[int] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)
    weights: dict[Stored, None] = field(default_factory=dict)


class Adapters:
    """Adapters by name, put together from the expressions of the weights that they change."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def see(self, where: str, expression: Expression) -> None:
        """Takes up what an expression has of adapters, which may be nothing."""
        if isinstance(expression, Adapted):
            base = set(expression.base.weights_used())
            for name, (strength, part) in expression.parts.items():
                self.add(name, where, strength, part, base, expression.order[name])

    def add(
        self, name: str, where: str, strength: Expression | None, part: Expression, base: set[Stored], number: int = 0
    ) -> None:
        """Takes up one part of an adapter."""
        seen = self._seen.setdefault(name, _Seen(number))
        seen.strength = strength
        seen.number = max(seen.number, number)
        seen.ranks.update(ranks_of(part))
        seen.changes.append(where)
        own = [weight for weight in part.weights_used() if weight not in base]
        seen.weights.update(dict.fromkeys([*own, *(() if strength is None else strength.weights_used())]))

    def found(
        self, weights: Iterable[StoredWeight], place_of: Callable[[Stored], str | None], *, values: bool = False
    ) -> tuple[AdapterOf, ...]:
        """What was seen, in the order in which the adapters were added.

        Args:
            weights: What the model or the file stores.
            place_of: The place of a weight.
            values: Whether strengths can be read.
        """
        stored = {weight.place: weight for weight in weights}
        made = []
        for name, seen in sorted(self._seen.items(), key=lambda item: item[1].number):
            places = {weight: place for weight in seen.weights if (place := place_of(weight)) in stored}
            held = [stored[place] for place in dict.fromkeys(places.values())]
            parts = [stored[place] for weight, place in places.items() if weight.role in ("part", None)]
            told = [weight.trainable for weight in parts]
            made.append(
                AdapterOf(
                    name,
                    float(seen.strength.numpy()) if values and seen.strength is not None else None,
                    tuple(sorted(seen.ranks)),
                    tuple(seen.changes),
                    tuple(weight.place for weight in held),
                    sum(math.prod(weight.shape) for weight in parts),
                    sum(weight.bytes for weight in held),
                    True if True in told else None if None in told else False,
                )
            )
        return tuple(made)

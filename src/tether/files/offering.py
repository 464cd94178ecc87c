"""Which of a file's values are for which of a model's weights, whatever is tied in either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tether.errors import Unsupported
from tether.files.entries import Entry, StoredTie
from tether.files.filling import Offer
from tether.files.positions import Position
from tether.layers.tying.state import View
from tether.weights.expression import Expression, program
from tether.weights.weight import Weight


def offers_of(
    found: Sequence[Position], entries: Mapping[str, Sequence[Entry]], ties: Mapping[str, StoredTie]
) -> tuple[list[Offer], set[str]]:
    """What a file's entries offer to a model, and its ties where it has no entry.

    Args:
        found: The model's positions.
        entries: The file's entries by position; all that one position has must agree.
        ties: The file's ties by position.

    Returns:
        The offers, and the names of the entries that were of use.
    """
    offers: list[Offer] = []
    taken: set[str] = set()
    filled: set[int] = set()
    for each in found:
        for entry in entries.get(each.place, ()):
            _check_target(each)
            taken.add(entry.name)
            offers.append(as_offer(each.target, entry))
            filled |= {id(weight) for weight in weights_of(each)}
    for each in found:
        tie = ties.get(each.place)
        if tie is not None and not entries.get(each.place):
            taken |= {entry.name for entry in tie.weights.values()}
            weights = weights_of(each)
            if not weights or not all(id(weight) in filled for weight in weights):
                offers.append(_tied_offer(each.target, tie))
    return offers, taken


def of_one_structure(views: Mapping[str, View], ties: Mapping[str, StoredTie]) -> dict[int, list[Entry]]:
    """The entries of weights by their ids, where the file's tie computes the same of its weights as the model's.

    So what the weights are called, there and here, plays no part.
    """
    found: dict[int, dict[str, Entry]] = {}
    for place, view in views.items():
        if place in ties:
            for mine, theirs in _pairs(view.expression, ties[place].expression).items():
                entry = ties[place].weights[theirs]
                found.setdefault(id(mine), {})[entry.name] = entry
    return {key: list(named.values()) for key, named in found.items()}


def _pairs(mine: Expression, theirs: Expression) -> dict[Weight, Weight]:
    """The weights of one expression with those of another; none if the two differ in more than these."""
    steps, others = program(mine), program(theirs)
    pairs: dict[Weight, Weight] = {}
    for step, other in zip(steps, others, strict=False):
        one, two = step.expression, other.expression
        if isinstance(one, Weight) and isinstance(two, Weight) and one.shape == two.shape:
            pairs[one] = two
        elif not step.same_as(other):
            return {}
    return pairs if len(steps) == len(others) else {}


def weights_of(position: Position) -> list[Weight]:
    """The stored weights behind a position, if it has weights of Tether's."""
    for each in (position.target, position.holder):
        if isinstance(each, Weight):
            return [each]
    return list(position.target.expression.weights_used()) if isinstance(position.target, View) else []


def as_offer(target: Any, entry: Entry) -> Offer:
    """An entry for a target."""
    return Offer(target, entry.name, entry.shape, entry.dtype, entry.read, entry.rows)


def _tied_offer(target: Any, tie: StoredTie) -> Offer:
    source = ", ".join(entry.name for entry in tie.weights.values())
    return Offer(target, f"{source} by the tie of {tie.name}", tie.shape, tie.dtype, tie.read)


def _check_target(position: Position) -> None:
    if not isinstance(position.target, (keras.Variable, View, Weight)):
        raise Unsupported(
            f"{position.holder.name!r} writes more than variables to its files ({position.place!r}), so it must read "
            "them itself: load the file with Keras's own `load_weights`."
        )


__all__ = ["as_offer", "of_one_structure", "offers_of", "weights_of"]

"""A running set of adapters: one batch may use them all, and they come and go without anything being compiled again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tether.adapters import slotted
from tether.adapters.manage import Freeze, as_parts, check, frozen_for, own_weights, taken_apart
from tether.errors import TetherError, received
from tether.layers.family.named import named_weights, tie_what_learns
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import weights_of
from tether.patterns import Pattern
from tether.types import AnyLayer
from tether.weights.leaves import MAX_CHOICES, Slots
from tether.weights.operators.arithmetic import StopGradient
from tether.weights.operators.choice import adapted

__all__ = ["capacity", "slots"]


def capacity(
    model: AnyLayer,
    changes: Mapping[Any, Any],
    /,
    *,
    slots: int,
    train: int | None = None,
    also: Pattern | None = None,
    freeze: Freeze = "adapted",
    argument: str = "choice",
) -> AnyLayer:
    """Makes room in a model for many adapters of one form, of which each example of a batch chooses its own.

    All slots are free at first, and a free slot is the base. `add`, `load`, `remove` and `save` then act on slots: an
    adapter that is added or loaded takes a free one, in the same files as other adapters, and nothing is compiled
    again. Which of them counts, a call says: `layer(x, choice="french")` for the whole call, or numbers for each
    example (`tether.adapters.slots`); `tether.routed(model)` has a column of numbers as one more input. -1, `"none"`
    and a call without a choice are the base.

    Args:
        model: A built Keras model or layer. Changed in place.
        changes: Forms by the weight's path or a pattern, as for `add`. An adapter may change fewer weights, and its
            low-rank parts may have smaller ranks and other scales.
        slots: How many adapters there may be.
        train: How many of the slots train: their weights are stored apart, so that an optimizer touches these and
            not all. Left out, all do; 0 is a set that only serves.
        also: Weights of which each adapter has a whole difference of its own, such as biases.
        freeze: As for `add`.
        argument: What the keyword of a call is named.

    Returns:
        The model.

    Raises:
        TetherError: The model has a set already, a number makes no sense, or a change is none.
        UnknownName: A pattern fits no weight.

    Example:
    ```python
    tether.adapters.capacity(model, {"*/query/kernel": tether.low_rank(8)}, slots=4)
    tether.adapters.add(model, "french")
    tether.adapters.add(model, "german", {"*/query/kernel": tether.low_rank(2)})
    assert tether.adapters.slots(model) == {"french": 0, "german": 1}
    tether.adapters.remove(model, "french")
    ```
    """
    check(model, "capacity")
    _refuse_numbers(slots, train)
    if slotted.tables(model):
        raise TetherError(f"{model.name!r} has slots for adapters already: {slotted.names_in(model) or 'all free'}.")
    parts = as_parts(model, changes, also, "slot")
    number = Slots(argument, [None] * slots)
    stacks = slotted.Stacks(number, slots if train is None else train)
    with Rollback.below(model):
        frozen_for(model, freeze, own_weights(model))
        found = named_weights(model)
        ties = {}
        for path, base in weights_of(model, parts).items():
            base, others, order = taken_apart(base)
            still = base if isinstance(base, StopGradient) or not freeze else base.stop_gradient()
            ties[path] = adapted(stacks.routed(still, parts[path](still)), others, order)
        tie_what_learns(model, ties, found)
    return model


def _refuse_numbers(slots: object, train: object) -> None:
    if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= MAX_CHOICES:
        raise TetherError(f"`slots` is how many adapters there may be, 1 to {MAX_CHOICES}. {received(slots=slots)}")
    if train is not None and (isinstance(train, bool) or not isinstance(train, int) or not 0 <= train <= slots):
        raise TetherError(f"`train` is how many of the {slots} slots train. {received(train=train)}")


def slots(model: keras.Layer) -> dict[str, int]:
    """The numbers by which a batch chooses the adapters of a running set.

    Args:
        model: A model with slots (`capacity`).

    Returns:
        The number of the slot of each adapter, by its name. It stays the same as long as the adapter is there.

    Example:
    ```python
    tether.adapters.capacity(model, {"*/query/kernel": tether.low_rank(8)}, slots=4)
    tether.adapters.add(model, "french")
    assert tether.adapters.slots(model) == {"french": 0}
    ```
    """
    return slotted.names_in(model)

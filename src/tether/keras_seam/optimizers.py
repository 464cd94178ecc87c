"""Optimizers: learning rates that differ from variable to variable, and slots that move to other variables.

Every optimizer of Keras makes its step from a learning rate that it is given beside the gradient, so a factor on that
rate is all that a variable of its own speed needs. It is given in two places: `update_step` of one variable, and on
PyTorch, for the optimizers that step all variables at once, `_parallel_update_step`. Weight decay reads the rate
itself.

What an optimizer keeps for a variable stays in a list for each kind of slot, in the order of its variables. Where a
weight takes the place of others, `move_slots` brings these lists to the new variables.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy

from tether.keras_seam.layers import (
    OF_ALL_VARIABLES,
    decay_pattern,
    forget_attribute,
    inner_optimizer,
    is_excluded_from_decay,
    is_of_slots,
    optimized_variables,
    set_untracked,
    slots_by_kind,
)
from tether.keras_seam.memory import write_entry
from tether.keras_seam.variables import own_copy, raw_value, stored_dtype
from tether.types import Tensor

_Base: Any = keras.Optimizer if TYPE_CHECKING else object
_Slots: TypeAlias = "list[keras.Variable | None]"
"""What an optimizer keeps of one kind, by the number of the variable."""


class RatedOptimizer(_Base):
    """Comes before the class of a Keras optimizer; a subclass says the factor of a variable."""

    _factor = 1.0
    """That of the variables whose weights decay now."""

    def factor_of(self, variable: keras.Variable) -> float:
        """The factor on the learning rate of a variable."""
        raise TypeError(f"{type(self).__name__} does not say how fast a variable learns.")

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """The step of one variable; TensorFlow gives its own, of which Keras's is known."""
        known = self._trainable_variables[self._get_variable_index(variable)]
        super().update_step(gradient, variable, _times(learning_rate, self.factor_of(known)))

    def _parallel_update_step(
        self, grads: Sequence[Tensor], variables: Sequence[keras.Variable], learning_rate: Tensor
    ) -> None:
        whole = getattr(self, "_u_product", None)  # what Nadam advances once a step
        before = None if whole is None else keras.ops.copy(whole.value)
        for factor, places in self._by_factor(variables):
            if whole is not None:
                whole.assign(before)
            given = [grads[place] for place in places], [variables[place] for place in places]
            super()._parallel_update_step(*given, _times(learning_rate, factor))

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        variables = [variable for variable in variables if self.weight_decay and self._use_weight_decay(variable)]
        for factor, places in self._by_factor(variables):
            set_untracked(self, "_factor", factor)
            try:
                super()._apply_weight_decay([variables[place] for place in places])
            finally:
                set_untracked(self, "_factor", 1.0)

    def _get_current_learning_rate(self) -> Tensor:
        return _times(super()._get_current_learning_rate(), self._factor)

    def _by_factor(self, variables: Sequence[keras.Variable]) -> Iterator[tuple[float, list[int]]]:
        """The places of the variables of each factor."""
        found: dict[float, list[int]] = {}
        for place, variable in enumerate(variables):
            found.setdefault(self.factor_of(variable), []).append(place)
        yield from found.items()


def _times(learning_rate: Tensor, factor: float) -> Tensor:
    return learning_rate if factor == 1.0 else keras.ops.multiply(learning_rate, factor)


# --------------------------------------------------------------------------- slots


@dataclass(frozen=True)
class SlotSource:
    """From which variables a new one is made, and how a slot of it is made from one slot of each of these."""

    variables: tuple[keras.Variable, ...]
    value: Callable[[list[Tensor]], Tensor]


def move_slots(
    optimizer: keras.Optimizer, variables: Sequence[keras.Variable], origins: Mapping[int, SlotSource]
) -> bool:
    """Lets an optimizer that is built go on with other variables, with what it has kept so far.

    Args:
        optimizer: A built optimizer, also one in a loss scale.
        variables: What it steps from now on, in this order. A variable that it knows keeps its slots.
        origins: Where the slots of the others come from, by the ids of the variables.

    Returns:
        Whether it goes on. It does not, and nothing is changed, if it does not know a variable or the origins of one,
        if it keeps something that is not of the shape of its variable, or if it treats the origins of one variable
        differently.
    """
    inner = inner_optimizer(optimizer)
    known = optimized_variables(inner)
    places = {id(variable): place for place, variable in enumerate(known)}
    sources = [
        SlotSource((variable,), lambda slots: slots[0]) if id(variable) in places else origins.get(id(variable))
        for variable in variables
    ]
    found = [source for source in sources if source is not None and all(id(one) in places for one in source.variables)]
    if len(found) < len(variables) or len(places) < len(known) or hasattr(inner, "optimizers"):
        return False
    try:
        fresh = type(optimizer).from_config(optimizer.get_config())
        fresh.build(list(variables))
    except Exception:  # an optimizer of somebody else's, or one that asks for certain variables
        return False
    parts = [(inner, inner_optimizer(fresh))] + ([] if inner is optimizer else [(optimizer, fresh)])
    plans = [_planned(old, new, list(variables), found, places) for old, new in parts]
    excluded = _excluded(inner, variables, found)
    if excluded is None or any(plan is None for plan in plans):
        return False
    for (old, _), plan in zip(parts, plans, strict=True):
        assert plan is not None
        _carry_out(old, list(variables), *plan)
    decays = getattr(inner, "_weight_decay_by_var_key", None)  # of Keras 3.16
    if decays:
        keys = [
            (inner._var_key(variable), inner._var_key(source.variables[0]))
            for variable, source in zip(variables, found, strict=True)
        ]
        set_untracked(inner, "_weight_decay_by_var_key", {new: decays[old] for new, old in keys if old in decays})
    if hasattr(inner, "_exclude_from_weight_decay"):
        set_untracked(inner, "_exclude_from_weight_decay", {inner._var_key(variable) for variable in excluded})
    return True


def _planned(
    old: Any,
    new: Any,
    variables: list[keras.Variable],
    sources: list[SlotSource],
    places: Mapping[int, int],
) -> tuple[dict[str, _Slots], list[keras.Variable]] | None:
    """The lists of slots that an optimizer will have, and all of its variables in their order."""
    replaced: dict[int, keras.Variable] = {}
    lists: dict[str, _Slots] = {}
    for name, slots in vars(new).items():
        before = vars(old).get(name)
        if isinstance(slots, keras.Variable):
            if not isinstance(before, keras.Variable) or before.shape != slots.shape:
                return None
            replaced[id(slots)] = before
        elif name not in OF_ALL_VARIABLES and is_of_slots(slots) and len(slots) == len(variables):
            if not isinstance(before, list) or len(before) != len(places):
                return None
            moved: _Slots = []
            for variable, slot, source in zip(variables, slots, sources, strict=True):
                of = [before[places[id(one)]] for one in source.variables]
                if any(isinstance(each, keras.Variable) is not isinstance(slot, keras.Variable) for each in of):
                    return None
                if id(variable) in places:
                    moved.append(of[0])
                elif isinstance(slot, keras.Variable):
                    alike = all(each.shape == one.shape for each, one in zip(of, source.variables, strict=True))
                    if not alike or slot.shape != variable.shape:
                        return None
                    slot.assign(source.value([own_copy(raw_value(each)) for each in of]))
                    moved.append(slot)
                else:
                    moved.append(slot)
                if isinstance(slot, keras.Variable):
                    replaced[id(slot)] = moved[-1]
            lists[name] = moved
    if any(id(variable) not in replaced for variable in new._variables):
        return None
    return lists, [replaced[id(variable)] for variable in new._variables]


def _excluded(
    optimizer: Any, variables: Sequence[keras.Variable], sources: Sequence[SlotSource]
) -> list[keras.Variable] | None:
    """The variables that were given as ones that do not decay; `None` where origins of one are stepped differently."""
    pattern, found = decay_pattern(optimizer), []
    decays = getattr(optimizer, "_weight_decay_by_var_key", None) or {}

    def treated(variable: keras.Variable) -> tuple[float, bool]:
        rate = optimizer.factor_of(variable) if isinstance(optimizer, RatedOptimizer) else 1.0
        return rate, pattern is not None and pattern.search(variable.name) is not None

    for variable, source in zip(variables, sources, strict=True):
        ways = {
            (treated(one), is_excluded_from_decay(optimizer, one), decays.get(optimizer._var_key(one)))
            for one in source.variables
        }
        way, is_given, _ = ways.pop()
        if ways or way != treated(variable):
            return None
        if is_given:
            found.append(variable)
    return found


def _carry_out(
    optimizer: Any,
    variables: list[keras.Variable],
    lists: Mapping[str, _Slots],
    every: list[keras.Variable],
) -> None:
    """Gives an optimizer its new lists. TensorFlow has wrapped the old ones, and would not have them changed."""
    tracker = optimizer._tracker
    tracker.config["variables"] = (tracker.config["variables"][0], every)
    tracker.stored_ids["variables"] = {id(variable) for variable in every}
    places = {optimizer._var_key(variable): place for place, variable in enumerate(variables)}
    new = {
        **lists,
        "_variables": every,
        "_trainable_variables": variables,
        "_trainable_variables_indices": places,
        "_exclude_from_weight_decay_cache": {},  # by ids, which new variables may have again
    }
    for name, value in new.items():
        forget_attribute(optimizer, name)
        set_untracked(optimizer, name, value)


def forget_entries_of(optimizer: keras.Optimizer, entries: Sequence[tuple[keras.Variable, int]]) -> None:
    """Lets what a built optimizer keeps for entries of variables, along their first axes, start anew.

    What it keeps in another shape than the variable's, as Adafactor does, stays.

    Args:
        optimizer: A built optimizer, also one in a loss scale.
        entries: Variables, and the places of entries.
    """
    inner = inner_optimizer(optimizer)
    known = optimized_variables(inner)
    places = {id(variable): place for place, variable in enumerate(known)}
    concerned = [(variable, entry) for variable, entry in entries if id(variable) in places]
    if not concerned:
        return
    starts = _starts_of(inner)
    for name, slots in slots_by_kind(inner).items():
        for variable, entry in concerned if name in starts else ():
            slot = slots[places[id(variable)]]
            if slot is not None and slot.shape == variable.shape:
                array = numpy.full(tuple(slot.shape)[1:], starts[name], stored_dtype(slot))
                write_entry(slot, entry, array)


_starts: weakref.WeakKeyDictionary[keras.Optimizer, dict[str, float]] = weakref.WeakKeyDictionary()


def _starts_of(optimizer: Any) -> dict[str, float]:
    """The number that each slot of an optimizer starts at, by the name of the list: of those shaped as variables."""
    found = _starts.get(optimizer)
    if found is None:
        fresh = type(optimizer).from_config(optimizer.get_config())
        fresh.build([keras.Variable([0.0], name="one", trainable=True)])
        found = {
            name: float(keras.ops.convert_to_numpy(slots[0].value)[0])
            for name, slots in slots_by_kind(fresh).items()
            if slots[0] is not None and tuple(slots[0].shape) == (1,)
        }
        _starts[optimizer] = found
    return found


__all__ = ["RatedOptimizer", "SlotSource", "forget_entries_of", "move_slots"]

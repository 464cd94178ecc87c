"""What a tied layer remembers about its ties."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tether import keras_seam
from tether.layers.view import View, stored_variables
from tether.weights.expression import Expression
from tether.weights.leaves import Argument
from tether.weights.weight import Use, Weight

if TYPE_CHECKING:
    from tether.layers.penalty import Penalty

STATE = "_tether"
WEIGHTS = "_tether_weights"


@dataclass(eq=False)
class Tie:
    """One tie as it was asked for: where it is recorded, and by which path from there."""

    recorder: weakref.ref[Any]
    path: tuple[str, ...]
    expression: Expression
    made_by_code: bool = False
    """Made inside the constructor or `build` of a Keras object, which makes it again when it is made again."""
    quantized: bool = False
    """Quantised since, of which that constructor knows nothing."""

    def record(self, recorder: Any, path: tuple[str, ...]) -> None:
        """Records the tie on a tied layer, in the place of another one of the same path."""
        self.recorder, self.path = weakref.ref(recorder), path
        recorded = vars(recorder)[STATE].recorded
        recorded.pop(path, None)
        recorded[path] = self

    def rename(self, path: tuple[str, ...]) -> None:
        """Records the tie under another path from the layer that records it, if one does."""
        if self.is_recorded:
            self.forget()
            self.record(self.recorder(), path)

    def forget(self) -> None:
        """Removes the tie from the layer that records it."""
        if self.is_recorded:
            del vars(self.recorder())[STATE].recorded[self.path]

    @property
    def is_recorded(self) -> bool:
        """Whether a layer records the tie: it was not untied since, nor replaced by another one."""
        recorder = self.recorder()
        state = None if recorder is None else vars(recorder).get(STATE)
        return state is not None and state.recorded.get(self.path) is self


@dataclass(eq=False)
class Slot:
    """A view, and the position that its variable has or would have in the layer's lists."""

    view: View
    store: str
    index: int
    tie: Tie
    named: bool = False
    """Whether `add_weight` handed the view out by name."""


@dataclass(eq=False)
class State:
    """The ties of one layer: those that wait for a variable, and those that have one."""

    pending: dict[tuple[str, ...], Tie] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    recorded: dict[tuple[str, ...], Tie] = field(default_factory=dict)
    """The ties recorded on this layer, for it and for layers below it, by their paths from here."""
    lent: list[tuple[Tie, tuple[str, ...]]] = field(default_factory=list)
    """Ties recorded on a graph around this layer, by their paths from here: for a clone of the graph."""
    takes: list[Argument] = field(default_factory=list)
    """Arguments of ties that were asked for here and are recorded on layers below: this layer's call takes them."""
    penalties: list[Penalty] = field(default_factory=list)
    """Penalties recorded here, and those of a graph around this layer: for a clone of the graph."""
    clashes: list[str] = field(default_factory=list)
    """Names that the layer gave to a second variable after a view had been handed out for the first."""
    held: list[Any] = field(default_factory=list)
    orders: dict[tuple[int, ...], list[Any]] = field(default_factory=dict)
    """Variables in the base's order, by the ids of what Keras listed: asked for at every step."""
    order: tuple[Any, list[Any]] | None = None
    """The same for a layer without other sub-layers than its weights, by what it has."""


def state_of(layer: Any) -> State | None:
    """The state of a tied layer, or `None` of any other."""
    found = vars(layer).get(STATE)
    return found if isinstance(found, State) else None


def ordered_variables(layer: Any, state: State) -> dict[str, list[Any]]:
    """The layer's own variables by store, in the base's order, with views at their places."""
    lists = {store: list(variables) for store, variables in keras_seam.variable_lists(layer).items()}
    for slot in sorted(state.slots, key=lambda slot: slot.index):
        lists[slot.store].insert(min(slot.index, len(lists[slot.store])), slot.view)
    return lists


def in_base_order(layer: Any, state: State, found: list[Any]) -> list[Any]:
    """Variables that Keras listed, those of the layer itself first and in the order that its base has."""
    if not state.slots:
        return found
    key = tuple(map(id, found))
    if key not in state.orders:
        lists = ordered_variables(layer, state)
        known = set(key)
        ordered: dict[int, Any] = {}
        for store in keras_seam.STORES:
            for variable in lists[store]:
                for stored in stored_variables(variable):
                    if id(stored) in known:
                        ordered.setdefault(id(stored), stored)
        for variable in found:
            ordered.setdefault(id(variable), variable)
        state.orders = {key: list(ordered.values()), **dict(list(state.orders.items())[:1])}
    return list(state.orders[key])


def known_order(layer: Any, state: State) -> list[Any] | None:
    """All variables in the base's order, as they were last found, if they are sure to be the same.

    That is so as long as the layer has no sub-layers but the weights of its views, and no more variables.
    """
    counts = keras_seam.counts(layer)
    if state.order is not None and state.order[0] == counts:
        return state.order[1].copy()
    hung = vars(layer).get(WEIGHTS) or ()
    if not state.slots or counts[-1] != len(hung) or not all(weight.is_built for weight in hung):
        return None
    found = [variable for variables in keras_seam.variable_lists(layer).values() for variable in variables]
    found += [weight.variable for weight in hung]
    ordered = in_base_order(layer, state, list({id(variable): variable for variable in found}.values()))
    state.order = (counts, ordered)
    return ordered.copy()


def hang_weights(layer: Any) -> None:
    """Makes exactly the weights that the layer's views use its sub-layers."""
    state = state_of(layer)
    wanted: list[Weight] = []
    if state is not None:
        state.orders, state.order = {}, None
        for slot in sorted(state.slots, key=lambda slot: (keras_seam.STORES.index(slot.store), slot.index)):
            wanted.extend(weight for weight in slot.view.expression.weights_used() if weight not in wanted)
        for penalty in state.penalties:
            if penalty.recorder() is layer:
                wanted.extend(weight for weight in penalty.owned if weight not in wanted)
    present = list(vars(layer).get(WEIGHTS) or [])
    with keras_seam.unlocked(layer):
        for weight in present:
            if weight not in wanted and not _held_elsewhere(layer, weight):
                keras_seam.untrack_layer(layer, weight)
        if wanted:
            setattr(layer, WEIGHTS, wanted)
        elif WEIGHTS in vars(layer):
            object.__delattr__(layer, WEIGHTS)
            keras_seam.forget_attribute(layer, WEIGHTS)


def _held_elsewhere(layer: Any, weight: Weight) -> bool:
    """Whether an attribute of the user's own holds the weight too."""
    return any(value is weight for name, value in vars(layer).items() if name != WEIGHTS)


def weights_below(layer: Any) -> list[Weight]:
    """The weights in a layer and the layers below it, those of ties that still wait included."""
    found: dict[int, Weight] = {}
    for below in keras_seam.contained_layers(layer):
        state = state_of(below)
        waiting = [] if state is None else [*state.pending.values(), *state.recorded.values()]
        for weight in (w for tie in waiting for w in tie.expression.weights_used()):
            found.setdefault(id(weight), weight)
        for weight in (w for penalty in (state.penalties if state is not None else ()) for w in penalty.weights):
            found.setdefault(id(weight), weight)
        if isinstance(below, Weight):
            found.setdefault(id(below), below)
    return list(found.values())


_serializing = threading.local()


class serializing:
    """Marks an object whose config is being made, so that layers in it leave its ties to it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        self.before: tuple[int, ...] = getattr(_serializing, "owners", ())
        _serializing.owners = (*self.before, id(self.layer))

    def __exit__(self, *_: object) -> None:
        _serializing.owners = self.before


def is_serializing(layer: Any) -> bool:
    """Whether the object's config is being made, on this thread."""
    return id(layer) in getattr(_serializing, "owners", ())


def new_use(layer: Any, name: str, expression: Expression, regularizer: Any) -> Use:
    """A use of an expression by a layer, not registered yet."""
    return Use(name=name, expression=expression, layer=weakref.ref(layer), regularizer=regularizer)

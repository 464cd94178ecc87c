"""Changing which variables a layer has: the one way in which a variable, or a view, takes the place of another.

Every verb that changes layers (tie, untie, materialize, adapters, quantize, loading) goes through here. `exchange` puts
one in the place of the other: in the layer's lists and in every attribute and container that holds it. `swapped` is put
around all exchanges of one call, and does the bookkeeping of the backends once, from what each layer stored before and
stores after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from tether import keras_seam
from tether.errors import UnknownName
from tether.layers import paths
from tether.layers.state import Slot, State, Tie, hang_weights, ordered_variables
from tether.layers.view import View


@contextlib.contextmanager
def swapped(layers: Iterable[Any]) -> Iterator[None]:
    """Lets the backends know what layers store, after what is done in the block has changed it.

    A layer within a block that has been left by an error stores what it did: nobody has been told otherwise.
    """
    before = {id(layer): (layer, list(layer.variables)) for layer in (layers if keras_seam.LISTS_PARAMETERS else ())}
    yield
    changes = [keras_seam.Change(layer, stored, list(layer.variables)) for layer, stored in before.values()]
    keras_seam.list_parameters_again(changes)


def exchange(layer: Any, state: State, old: Any, new: Any, asked: Tie | None = None) -> None:
    """Puts a variable or view in the place of another, wherever the layer holds it.

    Args:
        layer: A tied layer.
        state: Its state.
        old: A variable or view of the layer.
        new: What takes its place.
        asked: The tie of a new view.
    """
    slot = next((slot for slot in state.slots if slot.view is old), None)
    held = paths.holders(layer, old)
    advice = " Tie the layer before it is built, or keep its variables in a list."
    for path in held:
        paths.refuse_fixed(layer, path, what="variable", advice=advice)
    if slot is None:
        store, index = _position(layer, state, old)
        keras_seam.untrack(layer, old)
        slot = Slot(new, store, index, asked)  # type: ignore[arg-type]
        state.slots.append(slot)
    elif isinstance(new, View):
        slot.view, slot.tie = new, asked  # type: ignore[assignment]
    else:
        state.slots.remove(slot)
        ahead = sum(other.store == slot.store and other.index < slot.index for other in state.slots)
        keras_seam.insert_tracked(layer, slot.store, slot.index - ahead, new)
    for path in held:
        _put(layer, path, new)
    hang_weights(layer)


def _position(layer: Any, state: State, variable: Any) -> tuple[str, int]:
    for store, variables in ordered_variables(layer, state).items():
        for index, other in enumerate(variables):
            if other is variable:
                return store, index
    raise UnknownName(f"Layer {layer.name!r} does not track {variable.path!r}.")


def _put(layer: Any, path: tuple[str, ...], value: Any) -> None:
    """Sets an attribute, or an item of a container that an attribute holds."""
    if len(path) > 1:
        paths.put_item(layer, path, value)
    elif isinstance(value, View):
        keras_seam.forget_attribute(layer, path[0])
        keras_seam.set_untracked(layer, path[0], value)
    else:
        with keras_seam.unlocked(layer):
            setattr(layer, path[0], value)


__all__ = ["exchange", "swapped"]

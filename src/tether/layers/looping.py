"""Weights of a cell are computed once, before the loop over time, and not at each of its steps."""

from __future__ import annotations

import contextlib
from typing import Any

from tether import keras_seam
from tether.layers.state import state_of
from tether.weights.evaluation import hold, release


def _hold(cell: Any) -> None:
    """Computes the cell's composite weights now, outside the time loop that is about to run."""
    state = state_of(cell)
    if state is None or state.held:
        return
    scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if cell.compute_dtype != cell.variable_dtype and keras_seam.is_float(cell.compute_dtype):
        scope = keras_seam.AutocastScope(cell.compute_dtype)
    with scope:
        state.held = [entry for slot in state.slots for entry in slot.view.read(slot.view.expression, hold)]


def loop_hooks(base: Any) -> dict[str, Any]:
    """An RNN asks its cell for a dropout mask before its loop, and takes it back after."""

    def get_dropout_mask(self: Any, step_input: Any) -> Any:
        _hold(self)
        return base.get_dropout_mask(self, step_input)

    def reset_dropout_mask(self: Any) -> None:
        state = state_of(self)
        if state is not None:
            release(state.held)
            state.held = []
        base.reset_dropout_mask(self)

    return {"get_dropout_mask": get_dropout_mask, "reset_dropout_mask": reset_dropout_mask}


def holding(get_initial_state: Any) -> Any:
    """A cell of the user's own has one call before the loop: the one for its first state."""

    def held_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is not None:
            state.held = []
            _hold(self)
            state.held = []
        return get_initial_state(self, *args, **kwargs)

    return held_state

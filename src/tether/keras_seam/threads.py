"""What Keras keeps for each thread: the scopes that are open, the call in progress."""

from __future__ import annotations

from typing import Any

from tether.keras_seam.private import private

of_this_thread = private("keras.src.backend.common.global_state.get_global_attribute", "Evaluating a weight")
"""The value of a name: `stateless_scope`, `autocast_scope`, `name_scope_stack`, `current_call_ctx`."""

set_in_this_thread = private("keras.src.backend.common.global_state.set_global_attribute", "Making a weight")

AutocastScope = private("keras.src.backend.common.variables.AutocastScope", "Reading a weight under mixed precision")


def get_autocast_scope() -> Any:
    """The scope that says to which precision variables are cast when they are read, if there is one."""
    return of_this_thread("autocast_scope")

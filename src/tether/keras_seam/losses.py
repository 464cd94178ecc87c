"""A loss, computed by somebody else than `fit`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from keras import Layer as _Layer

from tether.keras_seam.layers import contained_layers, set_untracked
from tether.keras_seam.threads import of_this_thread


def running_layers() -> Iterator[Any]:
    """The layers whose calls are in progress on this thread, innermost first."""
    for scope in reversed(of_this_thread("name_scope_stack") or ()):
        if isinstance(scope.caller, _Layer):
            yield scope.caller


def has_compiled_loss(model: Any) -> bool:
    """Whether `compile` was given a loss."""
    return getattr(model, "_compile_loss", None) is not None


def training_loss(model: Any, x: Any, y: Any, y_pred: Any) -> Any:
    """The compiled loss and the model's own losses, as a training step adds them up."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, training=True)


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Puts back what a call of a model, and of its compiled loss, changes beside variables.

    A call forgets the losses that layers added in the call before; the compiled loss makes metrics when it first
    sees outputs. Within the scope no layer computes its forward pass again for the gradient either: it would read
    its weights outside of its call then.
    """
    layers = contained_layers(model)
    losses = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in layers]
    rematerialized = [(layer, layer._remat_mode) for layer in layers if layer._remat_mode is not None]
    compiled = getattr(model, "_compile_loss", None)
    for layer, _ in rematerialized:
        set_untracked(layer, "_remat_mode", None)
    if compiled is not None:
        own = type(compiled)(compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names)
        set_untracked(model, "_compile_loss", own)
    try:
        yield
    finally:
        for layer, before, ids in losses:
            layer._losses[:] = before
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)
        for layer, mode in rematerialized:
            set_untracked(layer, "_remat_mode", mode)
        if compiled is not None:
            set_untracked(model, "_compile_loss", compiled)

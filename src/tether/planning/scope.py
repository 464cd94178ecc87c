"""How long a choice of plans, or a remembered value, holds: scopes of the present thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tether.errors import TetherError, received
from tether.weights.evaluation import remembering

Mode = Literal["auto", "materialize", "factored"]
MODES = ("auto", "materialize", "factored")

_noted: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("tether_noted", default=None)
_training: contextvars.ContextVar[bool | None] = contextvars.ContextVar("tether_training", default=None)
_mode: contextvars.ContextVar[Mode] = contextvars.ContextVar("tether_plan", default="auto")


def mode() -> Mode:
    """How plans are chosen now."""
    return _mode.get()


@contextlib.contextmanager
def force(how: Mode) -> Iterator[None]:
    """Plans of one kind, for the calls within this scope.

    A plan is chosen when a layer is called, so a model that is compiled already keeps the plans that it was
    compiled with.

    Args:
        how: `"materialize"` builds each weight before the layer uses it, as a layer without an applier does;
            `"factored"` never builds a sum or product of weights where its parts can be applied one after
            another; `"auto"` chooses by cost, as outside of any scope.

    Raises:
        TetherError: Another word.

    Example:
    ```python
    with tether.planning.force("materialize"):
        y = layer(x)
    ```
    """
    if how not in MODES:
        raise TetherError(f'`force` takes "materialize", "factored" or "auto". {received(how=how)}')
    token = _mode.set(how)
    try:
        yield
    finally:
        _mode.reset(token)


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Keeps combined weights from call to call, for eager loops that do not train.

    Within this scope a weight such as `w + a @ b` is computed at its first use and again only after a stored
    weight that it is made of was written to: by `assign`, an optimizer, or the backend's own assignment and
    in-place operations. (PyTorch does not tell of writes to `tensor.data`.) A call that is compiled or recorded
    for a gradient computes as it does outside. Each kept weight takes its memory until the scope ends.

    Example:
    ```python
    with tether.planning.cached():
        for batch in batches:
            y = model(batch)
    ```
    """
    with remembering():
        yield


@contextlib.contextmanager
def recording(*, training: bool) -> Iterator[list[Any]]:
    """Notes the plans that calls within this scope follow; they are made as if the calls trained, or did not."""
    noted: list[Any] = []
    token, other = _noted.set(noted), _training.set(training)
    try:
        yield noted
    finally:
        _noted.reset(token)
        _training.reset(other)


def assumed_training() -> bool | None:
    """Whether plans are to be made for a training step, if a scope says so."""
    return _training.get()


def note(make: Callable[[], Any]) -> None:
    """Adds to what is noted, if anything is."""
    noted = _noted.get()
    if noted is not None:
        noted.append(make())

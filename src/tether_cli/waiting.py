"""A spinner on stderr for what takes longer than a second; nothing where nobody watches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

PATIENCE = 1.0
"""Seconds after which a person wants to know."""


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Says what is going on, if it goes on for long and stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    status = console.status(f"{what} …")
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # or it could start after it was stopped
        status.stop()

"""Which weight is which, across copies: ids, and the scopes inside which copies find each other.

A tie must hold within one copy of a model and never between a copy and its original, or between two
copies. So a weight's `uid` is fresh for every copy, and a file's uid means something only inside one
*sharing scope*: the outermost Keras call in progress that clones or deserialises, or an explicit
`with tether.sharing():`. The second use that names the same uid inside one scope gets the weight that
the first one made.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tether import keras_seam

if TYPE_CHECKING:
    from tether.weights.weight import Weight

_explicit = threading.local()


def fresh_uid() -> str:
    """An id that no other weight has, in this process or another."""
    return uuid.uuid4().hex


@contextlib.contextmanager
def sharing(known: dict[str, Weight] | None = None) -> Iterator[dict[str, Weight]]:
    """Lets several loads or clones share weights, as one would.

    Without it, a tie holds within one call that loads or clones, and never between two of them.

    Example:
    ```python
    with tether.sharing():
        encoder = keras.saving.load_model("encoder.keras")
        decoder = keras.saving.load_model("decoder.keras")   # saved from one tied model: tied again
    ```

    Yields:
        The weights made so far, by the uid in the files.
    """
    before: dict[str, Weight] | None = getattr(_explicit, "scope", None)
    _explicit.scope = {} if known is None else known
    try:
        yield _explicit.scope
    finally:
        _explicit.scope = before


def current_scope() -> dict[str, Weight] | None:
    """The weights of the scope in progress, by the uid in the config, or `None` outside of any."""
    explicit: dict[str, Weight] | None = getattr(_explicit, "scope", None)
    return explicit if explicit is not None else keras_seam.copying_scope()

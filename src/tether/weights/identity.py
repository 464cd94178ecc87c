"""Which weight is which, across copies: ids, and the scopes inside which copies find each other.

A tie must hold within one copy of a model and never between a copy and its original, or between two
copies. So a weight's `uid` is fresh for every copy, and a uid in a config means something only inside one
*sharing scope*: the call in progress that clones or deserialises, or an explicit `with tether.sharing():`.
The second use that names the same uid inside one scope gets the weight that the first one made.

Calls that copy may be nested: a constructor that runs while a file is read may clone a network for itself. What
such an inner copy names was made during the outer call, so the scope is the outermost call that began after the
named weight was made. A file's own uids are of weights that were made before, and meet in the outermost call.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tether import keras_seam

if TYPE_CHECKING:
    from tether.weights.weight import Weight

_explicit = threading.local()
_births: weakref.WeakValueDictionary[str, Weight] = weakref.WeakValueDictionary()


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


def born(weight: Weight) -> None:
    """Notes when a weight was made, so that a copy of it can be told from what is made along with it."""
    _births[weight.uid] = weight
    keras_seam.set_untracked(weight, "born", keras_seam.copies_begun())


def scope_of(uid: str) -> dict[str, Weight] | None:
    """The weights made so far by the copy in which a config names a uid, by uid; `None` outside of any copy."""
    explicit: dict[str, Weight] | None = getattr(_explicit, "scope", None)
    if explicit is not None:
        return explicit
    original = _births.get(uid)
    return keras_seam.copying_scope(-1 if original is None else original.born)

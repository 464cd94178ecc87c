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
import contextvars
import itertools
import threading
import uuid
import weakref
from collections.abc import Iterator

import keras

from tether import keras_seam
from tether.types import Config
from tether.weights.expression import Stored

_explicit = threading.local()
_births: weakref.WeakValueDictionary[str, Stored] = weakref.WeakValueDictionary()


def fresh_uid() -> str:
    """An id that no other weight has, in this process or another."""
    return uuid.uuid4().hex


@contextlib.contextmanager
def sharing(known: dict[str, Stored] | None = None) -> Iterator[dict[str, Stored]]:
    """Lets several loads or clones share weights, as one would.

    Without it, a tie holds within one call that loads or clones, and never between two of them.

    Args:
        known: Weights made so far, by the uid in the files, as an earlier scope gave them; left out, none.

    Yields:
        The weights made so far, by the uid in the files.

    Raises:
        ValueConflict: A file that is loaded inside has another value for a weight than the file before it.

    Example:
    ```python
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(4), kernel=codec)
    decode = tether.tie(keras.layers.Dense(8), kernel=codec.T)
    keras.Sequential([keras.Input((8,)), encode]).save("encoder.keras")
    keras.Sequential([keras.Input((4,)), decode]).save("decoder.keras")

    with tether.sharing():
        encoder = keras.saving.load_model("encoder.keras")
        decoder = keras.saving.load_model("decoder.keras")   # saved from one tied model: tied again
    assert len(tether.inspection.unique(encoder.weights + decoder.weights)) == 3
    ```
    """
    before: dict[str, Stored] | None = getattr(_explicit, "scope", None)
    _explicit.scope = {} if known is None else known
    try:
        yield _explicit.scope
    finally:
        _explicit.scope = before


def born(weight: Stored) -> None:
    """Notes when a weight was made, so that a copy of it can be told from what is made along with it."""
    _births[weight.uid] = weight
    keras_seam.set_untracked(weight, "born", keras_seam.copies_begun())


def scope_of(uid: str) -> dict[str, Stored] | None:
    """The weights made so far by the copy in which a config names a uid, by uid; `None` outside of any copy."""
    explicit: dict[str, Stored] | None = getattr(_explicit, "scope", None)
    if explicit is not None:
        return explicit
    original = _births.get(uid)
    return keras_seam.copying_scope(-1 if original is None else original.born)


# --------------------------------------------------------------------------- what a file holds
# What the config of a model holds, found in the config itself.
#
# That an object was asked for its config does not mean that the config is in the file: a recurrent layer asks its
# cell and throws the answer away. So the model's config is made once more, by Keras's public function, with a mark in
# each entry of Tether's; what of them is in the result is in the file.


MARK = "tether_mark"
_marks: contextvars.ContextVar[dict[str, tuple[object, ...]] | None] = contextvars.ContextVar(
    "tether_marks", default=None
)


def mark(entry: Config, *told: object) -> Config:
    """Marks an entry of a config as the one that tells of some objects, while somebody looks for them."""
    marks = _marks.get()
    if marks is not None:
        entry[MARK] = f"mark {len(marks)}"
        marks[entry[MARK]] = told
    return entry


def told_by_config(root: keras.Layer) -> dict[int, object]:
    """The objects of Tether's (ties, penalties, weights) that the config of a model or layer tells of, by their ids."""
    token = _marks.set({})
    try:
        config = keras.saving.serialize_keras_object(root)
        marks = _marks.get() or {}
    finally:
        _marks.reset(token)
    found = (marks.get(entry[MARK], ()) for entry in dictionaries(config) if isinstance(entry.get(MARK), str))
    return {id(told): told for told in itertools.chain.from_iterable(found)}


def told_by_file() -> dict[int, object] | None:
    """The same for the `.keras` archive that is being written, found once; `None` if none is."""
    scope = keras_seam.saving_scope()
    if scope is None:
        return None
    if "told" not in scope:
        scope["told"] = told_by_config(scope["root"])
    found: dict[int, object] = scope["told"]
    return found


def dictionaries(config: object) -> Iterator[Config]:
    """The dictionaries in a config, at any depth."""
    waiting = [config]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            yield entry
            waiting.extend(entry.values())
        elif isinstance(entry, (list, tuple)):
            waiting.extend(entry)

"""What the config of a model holds, found in the config itself.

That an object was asked for its config does not mean that the config is in the file: a recurrent layer asks its cell
and throws the answer away. So the model's config is made once more, by Keras's public function, with a mark in each
entry of Tether's; what of them is in the result is in the file.
"""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Iterator
from typing import Any

import keras

from tether import keras_seam

MARK = "tether_mark"
_marks: contextvars.ContextVar[dict[str, tuple[Any, ...]] | None] = contextvars.ContextVar("tether_marks", default=None)


def mark(entry: dict[str, Any], *told: Any) -> dict[str, Any]:
    """Marks an entry of a config as the one that tells of some objects, while somebody looks for them."""
    marks = _marks.get()
    if marks is not None:
        entry[MARK] = f"mark {len(marks)}"
        marks[entry[MARK]] = told
    return entry


def told_by_config(root: Any) -> dict[int, Any]:
    """The objects of Tether's (ties, penalties, weights) that the config of a model or layer tells of, by their ids."""
    token = _marks.set({})
    try:
        config = keras.saving.serialize_keras_object(root)
        marks = _marks.get() or {}
    finally:
        _marks.reset(token)
    found = (marks.get(entry[MARK], ()) for entry in dictionaries(config) if isinstance(entry.get(MARK), str))
    return {id(told): told for told in itertools.chain.from_iterable(found)}


def told_by_file() -> dict[int, Any] | None:
    """The same for the `.keras` archive that is being written, found once; `None` if none is."""
    scope = keras_seam.saving_scope()
    if scope is None:
        return None
    if "told" not in scope:
        scope["told"] = told_by_config(scope["root"])
    found: dict[int, Any] = scope["told"]
    return found


def dictionaries(config: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries in a config, at any depth."""
    waiting = [config]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            yield entry
            waiting.extend(entry.values())
        elif isinstance(entry, (list, tuple)):
            waiting.extend(entry)

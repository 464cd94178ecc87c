"""Writing a file beside its target and renaming it: at every moment the target is the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import time
import uuid
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows, which has no such locks: there only age tells
    fcntl = None  # type: ignore[assignment]

OLD = 3600.0
"""Seconds after which a file that nobody writes to any more is taken for one that a dead process left."""


@contextlib.contextmanager
def written_beside(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a path in the target's folder to write to; if the block ends well, that file becomes the target.

    If the block raises, or the process dies, the target is what it was. What processes that died left in the folder
    for this target goes, once it is old.
    """
    final = pathlib.Path(target)
    _clean(final)
    beside = final.with_name(f".{uuid.uuid4().hex[:8]}.{final.name}")
    try:
        with _claimed(beside):
            yield beside
            with open(beside, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a new file for as long as this process lives and writes to it."""
    if fcntl is None:
        yield
        return
    with open(path, "xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: there only age tells
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _clean(final: pathlib.Path) -> None:
    """Removes what is left of earlier writes to a target: old files that nobody holds."""
    ours = re.compile(r"(\.[0-9a-f]{8}\.)+" + re.escape(final.name))
    with contextlib.suppress(OSError):
        for path in final.parent.iterdir():
            if ours.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > OLD and not _is_held(path):
                        path.unlink()


def _is_held(path: pathlib.Path) -> bool:
    if fcntl is None:
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False

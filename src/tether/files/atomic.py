"""Writing a file beside its target and renaming it: at every moment the target is the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def written_beside(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a path in the target's folder to write to; if the block ends well, that file becomes the target.

    If the block raises, or the process dies, the target is what it was.
    """
    final = pathlib.Path(target)
    beside = final.with_name(f".{uuid.uuid4().hex[:8]}.{final.name}")
    try:
        yield beside
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)

"""Writing a file or a folder beside its target, which it replaces when it is whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from tether.atomic import written_beside
from tether.errors import TetherError, received

OF_A_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra", "keras_metadata.pb"}


@contextlib.contextmanager
def replaced(target: pathlib.Path, *, folder: bool) -> Iterator[pathlib.Path]:
    """Gives a path to write to; if the block ends well, what is there becomes the target.

    A file is renamed over the old one. A folder cannot be: the old one is moved aside first, so a process that dies
    between the two renames leaves both folders beside the target, whole.

    Raises:
        TetherError: The target's folder does not exist, or what is at the target is not of the kind that is written.
    """
    if not target.parent.is_dir():
        raise TetherError(f"The folder of the target does not exist. {received(path=str(target))}")
    if not folder:
        if target.is_dir():
            raise TetherError(f"There is a folder where the file would be. {received(path=str(target))}")
        with written_beside(target) as beside:
            yield beside
        return
    if target.exists() and not is_saved_model(target):
        raise TetherError(
            "What is there is no SavedModel, and is not replaced by one. Name another folder. "
            f"{received(path=str(target))}"
        )
    beside, aside = (target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}") for _ in range(2))
    try:
        yield beside
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(beside, target)
        except OSError:
            if aside.exists():
                os.replace(aside, target)
            raise
    finally:
        for path in (beside, aside) if target.exists() else (beside,):
            shutil.rmtree(path, ignore_errors=True)


def is_saved_model(path: pathlib.Path) -> bool:
    """Whether a folder holds a SavedModel and nothing else, or nothing at all."""
    if not path.is_dir():
        return False
    found = {entry.name for entry in path.iterdir()}
    return not found or ("saved_model.pb" in found and found <= OF_A_SAVED_MODEL)


__all__ = ["is_saved_model", "replaced"]

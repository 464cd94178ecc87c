"""Saving a model so that a failure leaves the old file as it was."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import keras

from tether.errors import TetherError, received
from tether.files.atomic import written_beside


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Writes a standard `.keras` file that `keras.saving.load_model` reads.

    It is written beside the target and renamed: if a tie would be lost, or anything else fails, the file that
    was there is untouched. (Keras's own `model.save` has emptied it by then.)

    Args:
        model: A Keras model or layer.
        path: Where to, with the ending `.keras`.

    Raises:
        LostTie: The file would not hold a tie; the error says where to put it.
        TetherError: The path has another ending, or its folder does not exist.
    """
    target = pathlib.Path(path)
    if target.suffix != ".keras":
        raise TetherError(f"A model is saved in a file that ends in '.keras'. {received(path=str(path))}")
    if not target.parent.is_dir():
        raise TetherError(f"The folder of the file does not exist. {received(path=str(path))}")
    with written_beside(target) as beside:
        keras.saving.save_model(model, beside)

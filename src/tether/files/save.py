"""Saving a model so that a failure leaves the old file as it was, and so that the file holds what the model shares."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import keras

from tether.atomic import written_beside
from tether.errors import TetherError, received
from tether.files.archive import contents, with_config
from tether.files.instances import has_shared_layers, mended
from tether.files.places import places_of
from tether.layers.records.verification import record_further_out


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Writes a standard `.keras` file that `keras.saving.load_model` reads.

    It is written beside the target, checked, and renamed: if a tie would be lost, or anything else fails, the file
    that was there is untouched. (Keras's own `model.save` has emptied it by then.)

    A layer that is in two models at once, in one and outside of it, or in a wrapper and alone, comes back as one
    layer. To see that, such a model is put together once more from its config while it is saved.

    Args:
        model: A Keras model or layer.
        path: Where to, with the ending `.keras`.

    Raises:
        LostTie: The file would not hold a tie; the error says where to put it.
        Unsupported: A layer in several places would come back as several.
        TetherError: The path has another ending, its folder does not exist, or the file came out incomplete.

    Example:
    ```python
    tether.files.save_model(model, "model.keras")
    again = keras.saving.load_model("model.keras")
    ```
    """
    target = pathlib.Path(path)
    if target.suffix != ".keras":
        raise TetherError(f"A model is saved in a file that ends in '.keras'. {received(path=str(path))}")
    if not target.parent.is_dir():
        raise TetherError(f"The folder of the file does not exist. {received(path=str(path))}")
    record_further_out(model)
    with written_beside(target) as beside:
        keras.saving.save_model(model, beside)
        found = contents(beside)
        absent = sorted(set(places_of(model).items()) - set(found.values.items()))
        if absent:
            raise TetherError(
                f"The file came out incomplete: it lacks {', '.join(place for place, _ in absent[:8])}. Is the disk "
                "full, or does a layer's `save_own_variables` write something else each time?"
            )
        if has_shared_layers(model):
            config = mended(model, found.config)
            with written_beside(beside) as again:
                with_config(beside, again, config)


__all__ = ["save_model"]

"""TensorFlow's SavedModel, by Keras's own exporter."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.files.exporting.asking import Asked, quiet

BACKENDS = ("tensorflow", "jax")
SUFFIX = ""
LIMIT = None
FOLDS = False


def write(asked: Asked, path: pathlib.Path, held: list[Any]) -> None:
    """Writes the folder. A SavedModel reads variables where it runs, so there is nothing to hold out."""
    archive = keras.export.ExportArchive()
    archive.track_and_add_endpoint("serve", asked.model, asked.signature, **asked.options)
    keras_seam.store_each_variable_once(archive)
    archive.write_out(str(path), verbose=False)


def stored(path: pathlib.Path) -> int:
    """The bytes of the variables in a folder."""
    return sum(file.stat().st_size for file in (path / "variables").glob("variables.data*"))


def runner(path: pathlib.Path) -> Any:
    """A function of arrays that runs the folder in TensorFlow."""
    import tensorflow as tf

    with quiet("absl"):
        served = tf.saved_model.load(str(path))

    def run(asked: Asked, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        arguments = keras.tree.pack_sequence_as(asked.signature, list(map(tf.convert_to_tensor, arrays)))
        return [np.asarray(output) for output in keras.tree.flatten(served.serve(*arguments))]

    return run

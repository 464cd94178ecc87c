"""TensorFlow's SavedModel, by Keras's own exporter."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import Unsupported
from tether.files.exporting.model import Asked, Runner, quiet
from tether.types import Array, Function, Tensor

BACKENDS = ("tensorflow", "jax")
SUFFIX = ""
LIMIT = None
FOLDS = False


def write(asked: Asked, path: pathlib.Path, held: list[keras.Variable]) -> None:
    """Writes the folder. A SavedModel reads variables where it runs, so there is nothing to hold out.

    Raises:
        Unsupported: TensorFlow is not installed.
    """
    try:
        importlib.import_module("tensorflow")
    except ImportError as error:
        raise Unsupported(
            f"A SavedModel is written with the package 'tensorflow', on the {keras.backend.backend()} backend too, and "
            f"it cannot be imported ({error}). Install it: `pip install tensorflow`."
        ) from error
    archive = keras.export.ExportArchive()
    archive.track_and_add_endpoint("serve", asked.model, asked.signature, **asked.options)
    keras_seam.store_each_variable_once(archive)
    archive.write_out(str(path), verbose=False)


def stored(path: pathlib.Path) -> int:
    """The bytes of the variables in a folder."""
    return sum(file.stat().st_size for file in (path / "variables").glob("variables.data*"))


def runner(path: pathlib.Path) -> Runner:
    """A function of arrays that runs the folder in TensorFlow."""
    import tensorflow as tf

    with quiet("absl"):
        served = tf.saved_model.load(str(path))

    def run(asked: Asked, arrays: Sequence[Array]) -> list[Array]:
        arguments = keras.tree.pack_sequence_as(asked.signature, list(map(tf.convert_to_tensor, arrays)))
        return [np.asarray(output) for output in keras.tree.flatten(served.serve(*arguments))]

    return run


# --------------------------------------------------------------------------- the function of a model
# The model as a TensorFlow function, on the TensorFlow and JAX backends.


def traced(asked: Asked, held: list[keras.Variable]) -> tuple[Any, list[str]]:
    """A function of the inputs and of the variables that are held out, with named outputs.

    Returns:
        The function, which has a signature, and the names of its arguments that stand for variables.
    """
    import tensorflow as tf

    names = [f"held_{at}" for at in range(len(held))]
    specs = [tf.TensorSpec(shape, dtype, name) for name, shape, dtype in asked.specs]
    specs += [
        tf.TensorSpec(tuple(variable.shape), variable.dtype, name) for name, variable in zip(names, held, strict=True)
    ]

    def compute(*tensors: Tensor) -> list[Tensor]:
        return asked.with_held(tensors, held)

    if keras.backend.backend() == "jax":
        compute = _through_jax(asked, held, compute)

    def serve(*tensors: Tensor) -> dict[str, Tensor]:
        return dict(zip(asked.output_names, compute(*tensors), strict=True))

    return tf.function(serve, input_signature=specs, autograph=False), names


def _through_jax(asked: Asked, held: list[keras.Variable], compute: Function) -> Function:
    from jax.experimental import jax2tf

    shapes = [f"({''.join(f'{size}, ' for size in shape)})" for shape, _ in asked.described(held)]
    return jax2tf.convert(compute, polymorphic_shapes=shapes, with_gradient=False)


__all__ = ["traced"]

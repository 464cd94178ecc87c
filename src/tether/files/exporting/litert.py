"""LiteRT files (`.tflite`), by TensorFlow's converter."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tether.errors import Unsupported
from tether.files.exporting.model import Asked, Runner
from tether.files.exporting.saved_model import traced
from tether.layers.depth.turns import written_out
from tether.layers.tying.state import numpy_of
from tether.types import Array

BACKENDS = ("tensorflow", "jax")
SUFFIX = ".tflite"
LIMIT = 2**31 - 2**20
"""The places in a file are numbers of 32 bits."""
FOLDS = True
ALIGNMENT = 16
"""LiteRT reads the bytes of a constant in place."""


def write(asked: Asked, path: pathlib.Path, held: list[keras.Variable]) -> None:
    """Converts the model, the variables that are held out being inputs, and makes constants of these inputs."""
    import tensorflow as tf

    function, names = traced(asked, held)
    module = tf.Module()
    module.serve = function
    if keras.backend.backend() == "tensorflow":
        module.stored = [variable.value for variable in asked.variables]
    with tempfile.TemporaryDirectory() as folder, written_out():  # a loop may ask for operations that LiteRT lacks
        tf.saved_model.save(module, folder, signatures={"serving_default": function.get_concrete_function()})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
        for name, value in asked.options.items():
            if not hasattr(converter, name):
                raise Unsupported(f"TensorFlow's LiteRT converter has no option {name!r}.")
            setattr(converter, name, value)
        converted = converter.convert()
    path.write_bytes(_with_constants(converted, dict(zip(names, map(numpy_of, held), strict=True))))


def _with_constants(converted: bytes, values: dict[str, Array]) -> bytes:
    """The same file, with inputs that have become stored constants."""
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    if not values:
        return converted
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(converted))
    graph = model.subgraphs[0]
    for signature in model.signatureDefs:
        for entry in list(signature.inputs):
            name = entry.name.decode()
            if name in values:
                buffer = schema.BufferT()
                buffer.data = np.frombuffer(values[name].tobytes(), np.uint8)
                graph.tensors[entry.tensorIndex].buffer = len(model.buffers)
                model.buffers.append(buffer)
                graph.inputs = [at for at in graph.inputs if at != entry.tensorIndex]
                signature.inputs.remove(entry)
    builder = _builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _builder() -> Any:
    """A builder that puts the bytes of constants where LiteRT may read them as numbers."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):
        def StartVector(self, size: int, count: int, alignment: int) -> object:
            return super().StartVector(size, count, ALIGNMENT if size == 1 else alignment)

    return Aligned(1024)


def stored(path: pathlib.Path) -> int:
    """The bytes of the constants in a file."""
    from tensorflow.lite.tools import flatbuffer_utils

    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(path.read_bytes()))
    return sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)


def runner(path: pathlib.Path) -> Runner:
    """A function of arrays that runs the file in LiteRT's interpreter."""
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_path=str(path))
    ((_, signature),) = interpreter.get_signature_list().items()

    def run(asked: Asked, arrays: Sequence[Array]) -> list[Array]:
        call = interpreter.get_signature_runner()
        names = [name for name, _, _ in asked.specs]
        given = {name: array for name, array in zip(names, arrays, strict=True) if name in signature["inputs"]}
        found = call(**given)
        return [found[name] for name in asked.output_names]

    return run

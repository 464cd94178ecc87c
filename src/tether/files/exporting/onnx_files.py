"""ONNX files, by tf2onnx, jax2onnx or PyTorch's own exporter."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import Unsupported
from tether.files.exporting.model import SMALL, Asked, Runner, distinct, quiet
from tether.layers.depth.turns import written_out
from tether.layers.tying.state import numpy_of
from tether.types import Array

if TYPE_CHECKING:
    import onnx

BACKENDS = ("tensorflow", "jax", "torch")
SUFFIX = ".onnx"
LIMIT = 2**31 - 2**20
"""An ONNX file is one protobuf message, which is smaller than 2 GiB."""
FOLDS = True

OPSET = 18
"""Of tf2onnx: the newest that it knows. Its default is older than the operations that unpack small integers."""

NEEDS = {
    "tensorflow": ("onnx", "tf2onnx"),
    "jax": ("onnx", "jax2onnx", "flax"),
    "torch": ("onnx", "onnxscript"),
}


def write(asked: Asked, path: pathlib.Path, held: list[keras.Variable]) -> None:
    """Converts the model, the variables that are held out being inputs, and makes initializers of these inputs."""
    backend = keras.backend.backend()
    for package in NEEDS[backend]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise Unsupported(
                f"An ONNX file is written on the {backend} backend with the package {package!r}, which cannot be "
                f"imported ({error}). Install it: `pip install {' '.join(NEEDS[backend])}`."
            ) from error
    import onnx

    model = {"tensorflow": _by_tf2onnx, "jax": _by_jax2onnx, "torch": _by_torch}[backend](asked, held)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _by_tf2onnx(asked: Asked, held: list[keras.Variable]) -> onnx.ModelProto:
    import tf2onnx

    from tether.files.exporting.saved_model import traced

    keras_seam.mend_tf2onnx()
    function, names = traced(asked, held)
    with quiet("tf2onnx"):
        model, _ = tf2onnx.convert.from_function(
            function,
            input_signature=function.input_signature,
            opset=asked.options.get("opset_version", OPSET),
            custom_op_handlers={"Erfc": (_one_minus_erf, [])},
        )
    return with_initializers(model, names, held)


def _one_minus_erf(graph: Any, node: Any, name: str, arguments: object) -> None:
    """Puts `1 - Erf(x)` in the place of TensorFlow's `Erfc(x)`, which the exact GELU is made of and ONNX lacks."""
    import tf2onnx

    dtype, shape = graph.get_dtype(node.output[0]), graph.get_shape(node.output[0])
    one = graph.make_const(f"{name}/one", np.ones((), tf2onnx.utils.map_onnx_to_numpy_type(dtype)))
    graph.remove_node(name)
    erf = graph.make_node("Erf", list(node.input), dtypes=[dtype], shapes=[shape], name=f"{name}/erf")
    graph.make_node(
        "Sub", [one.output[0], erf.output[0]], outputs=list(node.output), dtypes=[dtype], shapes=[shape], name=name
    )


def with_initializers(model: onnx.ModelProto, names: list[str], held: list[keras.Variable]) -> onnx.ModelProto:
    """The same model, with inputs that have become stored weights under the variables' own names."""
    import onnx

    taken = [found.name for found in (*model.graph.input, *model.graph.output) if found.name not in names]
    paths = distinct([*taken, *(variable.path for variable in held)])[len(taken) :]
    for name, path, variable in zip(names, paths, held, strict=True):
        for place, found in enumerate(model.graph.input):
            if found.name == name:
                del model.graph.input[place]
                model.graph.initializer.append(onnx.numpy_helper.from_array(numpy_of(variable), path))
                _rename(model.graph, name, path)
                break
    return model


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, old, new)


def _by_jax2onnx(asked: Asked, held: list[keras.Variable]) -> onnx.ModelProto:
    import jax
    import jax2onnx

    names = [f"held_{at}" for at in range(len(held))]
    shapes = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for shape, dtype in asked.described(held)]
    options = {"opset": asked.options["opset_version"]} if "opset_version" in asked.options else {}
    with written_out():  # of a loop's types it may be wrong
        model = jax2onnx.to_onnx(
            lambda *tensors: tuple(asked.with_held(tensors, held)),
            inputs=shapes,
            input_names=[*(name for name, _, _ in asked.specs), *names],
            output_names=asked.output_names,
            **options,
        )
    return with_initializers(model, names, held)


def _by_torch(asked: Asked, held: list[keras.Variable]) -> onnx.ModelProto:
    import onnxscript.optimizer
    import torch

    from tether.files.exporting.torch_program import exported_program

    with quiet("torch.onnx"):
        found = torch.onnx.export(
            exported_program(asked),
            dynamo=True,
            verbose=False,
            optimize=False,  # it would compute small kernels in advance
            input_names=[name for name, _, _ in asked.specs],
            output_names=asked.output_names,
            opset_version=asked.options.get("opset_version"),
        )
        onnxscript.optimizer.optimize(found.model, output_size_limit=SMALL // 4)
    return found.model_proto


def stored(path: pathlib.Path) -> int:
    """The bytes of the constants in a file."""
    import onnx

    return _constants(onnx.load(str(path)).graph)


def _constants(graph: onnx.GraphProto) -> int:
    total = sum(tensor.ByteSize() for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                total += attribute.t.ByteSize()
            total += sum(map(_constants, [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]))
    return total


def runner(path: pathlib.Path) -> Runner:
    """A function of arrays that runs the file in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = {found.name for found in session.get_inputs()}

    def run(asked: Asked, arrays: Sequence[Array]) -> list[Array]:
        given = {name: array for (name, _, _), array in zip(asked.specs, arrays, strict=True) if name in known}
        return list(session.run(asked.output_names, given))

    return run

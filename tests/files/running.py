"""Running what was exported, each format by its own runtime, and looking at what it stores."""

import keras
import numpy as np

SUFFIXES = {"tf_saved_model": "", "onnx": ".onnx", "litert": ".tflite", "torch": ".pt2"}
WRITTEN_ON = {
    "tf_saved_model": {"tensorflow", "jax"},
    "onnx": {"tensorflow", "jax", "torch"},
    "litert": {"tensorflow", "jax"},
    "torch": {"torch"},
}
BACKEND = keras.backend.backend()
HERE = [name for name, backends in WRITTEN_ON.items() if BACKEND in backends]
ELSEWHERE = [name for name in WRITTEN_ON if name not in HERE]


def outputs(path, format, arrays):
    """The outputs, flat, for one flat list of inputs."""
    return {"tf_saved_model": _served, "onnx": _onnx, "litert": _litert, "torch": _program}[format](path, arrays)


def _served(path, arrays):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    try:
        found = loaded.serve(*arrays)
    except TypeError:  # a model with a list of inputs takes one
        found = loaded.serve(list(arrays))
    return [np.asarray(output) for output in keras.tree.flatten(found)]


def _onnx(path, arrays):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {known.name: array for known, array in zip(session.get_inputs(), arrays, strict=True)})


def _litert(path, arrays):
    import warnings

    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's interpreter says that it will move to a package of its own
        interpreter = tf.lite.Interpreter(model_path=str(path))
    details, left = [], interpreter.get_input_details()
    assert len(left) == len(arrays)
    for array in arrays:  # inputs are listed by name: those of one dtype are in order
        details.append(next(detail for detail in left if detail["dtype"] == array.dtype))
        left = [detail for detail in left if detail is not details[-1]]
    for detail, array in zip(details, arrays, strict=True):
        interpreter.resize_tensor_input(detail["index"], array.shape)
    interpreter.allocate_tensors()
    for detail, array in zip(details, arrays, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def _program(path, arrays):
    import torch

    found = torch.export.load(str(path)).module()(*map(torch.as_tensor, arrays))
    return [output.detach().numpy() for output in keras.tree.flatten(found)]


def stored_sizes(path, format):
    """How many numbers each stored tensor has."""
    if format == "tf_saved_model":
        import tensorflow as tf

        found = tf.train.list_variables(str(path / "variables/variables"))
        return [int(np.prod(shape)) for name, shape in found if not name.startswith("_CHECKPOINTABLE")]
    if format == "onnx":
        import onnx

        graph = onnx.load(str(path)).graph
        constants = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
        return [int(np.prod(tensor.dims)) for tensor in (*graph.initializer, *constants)]
    if format == "litert":
        from tensorflow.lite.tools import flatbuffer_utils

        buffers = flatbuffer_utils.read_model(str(path)).buffers
        return [len(buffer.data) // 4 for buffer in buffers if buffer.data is not None]
    import torch

    program = torch.export.load(str(path))
    return [tensor.numel() for tensor in (*program.state_dict.values(), *program.constants.values())]

"""Exports to other formats."""

from __future__ import annotations

from typing import Any

from keras import backend as _backend

from tether.keras_seam.private import private

_get_input_signature = private("keras.src.export.export_utils.get_input_signature", "Exporting a model")
_patch_tf2onnx = private("keras.src.export.tf2onnx_lib.patch_tf2onnx", "An ONNX file of the TensorFlow backend")
_make_input_spec = private("keras.src.export.export_utils.make_input_spec", "Exporting a model")


def input_signature(model: Any) -> list[Any]:
    """The positional arguments of a model's call, as structures of specs, as Keras's exporters read them.

    Raises:
        ValueError: The model has not been called, so nobody knows.
    """
    return list(_get_input_signature(model))


def input_spec(tensor: Any) -> Any:
    """The spec of a tensor, a symbolic tensor or a spec."""
    return _make_input_spec(tensor)


def store_each_variable_once(archive: Any) -> None:
    """Makes an export archive of the TensorFlow backend write each variable once.

    It lists Keras's variables, and once more the TensorFlow variables inside them; TensorFlow takes them for two.
    """
    if _backend.backend() == "tensorflow":
        for name in ("variables", "trainable_variables", "non_trainable_variables"):
            setattr(archive._tf_trackable, name, [v.value for v in getattr(archive._tf_trackable, name)])


def mend_tf2onnx() -> None:
    """Makes tf2onnx work with the NumPy of today, as Keras does before it calls it."""
    _patch_tf2onnx()

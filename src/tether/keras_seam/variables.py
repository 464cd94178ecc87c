"""Variables: their stored values, and what a view is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import backend as _backend

from tether.keras_seam.threads import of_this_thread

Variable = keras.Variable
"""The backend's concrete variable class, the one that `add_weight` creates."""


def raw_value(variable: Any) -> Any:
    """The tensor that a variable holds now, before autocast; `None` if not initialised yet."""
    scope = of_this_thread("stateless_scope")
    if scope is not None:
        value = scope.get_current_value(variable)
        if value is not None:
            return value
    return variable._value


_dtype_names: dict[Any, str] = {}


def tensor_dtype(tensor: Any) -> str:
    """The dtype of a tensor, as Keras calls it: asked for at every call of a layer, and each looked up once."""
    dtype = tensor.dtype
    found = _dtype_names.get(dtype)
    if found is None:
        found = _dtype_names[dtype] = str(keras.backend.standardize_dtype(dtype))
    return found


RUNS_FROM_PYTHON = _backend.backend() == "torch"
"""Whether each operation is run from Python at each call, so that what Keras converts and promotes first takes time."""


def _quick(name: str) -> Callable[[Any, Any], Any]:
    """An operation of `keras.ops` on two tensors, straight from PyTorch where that does the same.

    PyTorch runs each operation from Python, and what Keras converts and promotes first takes longer than a small
    product. Of two dense floating-point tensors of one dtype there is nothing to convert.
    """
    general: Callable[[Any, Any], Any] = getattr(keras.ops, name)
    if not RUNS_FROM_PYTHON:
        return general
    import torch

    plain, kinds = getattr(torch, name), (torch.Tensor, torch.nn.Parameter)

    def quick(a: Any, b: Any) -> Any:
        are_tensors = type(a) in kinds and type(b) in kinds
        if not are_tensors or a.dtype != b.dtype or a.device != b.device or not a.is_floating_point():
            return general(a, b)
        return plain(a, b) if a.layout == b.layout == torch.strided else general(a, b)

    return quick


add, subtract, multiply, matmul = map(_quick, ("add", "subtract", "multiply", "matmul"))


def stored_dtype(variable: Any) -> str:
    """The dtype of what is stored, whatever the autocast scope says."""
    return str(keras.backend.standardize_dtype(variable._dtype))


def held_dtype(variable: Any) -> str:
    """The dtype of the tensor that a variable holds, which is not always the one that the variable says it has.

    JAX without 64 bits holds float32 for float64, PyTorch has no uint16 and holds int32.
    """
    value = raw_value(variable)
    return stored_dtype(variable) if value is None else str(keras.backend.standardize_dtype(value.dtype))


def _make_plain_tensor() -> Callable[[Any], Any]:
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor
    return lambda value: value


plain_tensor = _make_plain_tensor()
"""A tensor of what a variable's `value` gives: on TensorFlow its own variable, which some of `keras.ops` refuse."""


def own_tensor(array: Any, dtype: str | None) -> Any:
    """An array as a tensor for a variable to start with, of a dtype or of the array's.

    PyTorch would take NumPy's memory, at whose addresses a matrix product may take half as long again.
    """
    tensor = keras.ops.convert_to_tensor(array, dtype=dtype)
    return tensor.clone() if _backend.backend() == "torch" else tensor


def own_copy(tensor: Any) -> Any:
    """A tensor whose memory nobody else holds: JAX donates buffers, and one given away twice is an error."""
    if _backend.backend() == "jax":
        import jax

        if isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer):
            return jax.numpy.copy(tensor)
    return tensor


def prepare_view(view: Any, *, name: str, path: str, shape: tuple[int, ...], dtype: str, autocast: bool) -> None:
    """Gives a variable that owns no storage the attributes that `Variable.__init__` would set."""
    view._name = name
    view._path = path
    view._shape = shape
    view._ndim = len(shape)
    view._dtype = dtype
    view._autocast = autocast
    view._initializer = None
    view._regularizer = None
    view._constraint = None
    view._aggregation = "none"
    view._synchronization = "auto"
    view._layout = None
    view._overwrite_with_gradient = False
    view._value = None


def autocasts(variable: Any) -> bool:
    return bool(variable._autocast)


def is_float(dtype: str) -> bool:
    return "float" in dtype

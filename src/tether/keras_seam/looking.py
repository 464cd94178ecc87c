"""Models looked at from outside: graphs, optimizers, values in memory."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy
from keras.src import backend as _backend
from keras.src.layers.layer import Layer as _Layer
from keras.src.models.functional import Functional
from keras.src.models.sequential import Sequential

from tether.keras_seam.calls import is_traced
from tether.keras_seam.layers import attributes


def calls_in_graph(model: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The calls in the graph of a functional or sequential model, inputs first: what is called, and its arguments."""
    graph = model._functional if isinstance(model, Sequential) else model
    if not isinstance(graph, Functional):
        return []
    depths = sorted(graph._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in graph._nodes_by_depth[depth] if not node.is_input]
    return [(node.operation, node.arguments.args, node.arguments.kwargs) for node in nodes]


def graph_outputs(model: Any) -> list[Any]:
    """What makes each output of a functional or sequential model: a layer or an operation."""
    graph = model._functional if isinstance(model, Sequential) else model
    return [o._keras_history.operation for o in graph.outputs] if isinstance(graph, Functional) else []


_OF_MODELS = {
    "_functional", "optimizer", "loss", "compiled", "history", "stop_training", "stop_evaluating", "stop_predicting",
    "_eval_epoch_iterator", "unrolled_steps_per_execution",
    "_compile_config", "_compile_loss", "_compile_metrics", "_loss_tracker", "_compiled_trainable_state",
    "train_function", "test_function", "predict_function", "steps_per_execution", "_jax_state", "_jax_state_synced",
}  # fmt: skip


def own_attributes(layer: Any) -> list[tuple[str, Any]]:
    """The attributes of a layer that are not those of any layer, or of any model that was compiled."""
    common = _common_attributes()
    return [(name, value) for name, value in attributes(layer) if name not in common]


@functools.cache
def _common_attributes() -> frozenset[str]:
    # The names are given, so that no counter of automatic names goes on.
    return frozenset({*vars(_Layer(name="layer")), *vars(keras.Model(name="model")), *_OF_MODELS})


def optimized_variables(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built with, as often as it was given them."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    return list(getattr(optimizer, "_trainable_variables", None) or ())


def decay_pattern(optimizer: Any) -> Any:
    """The pattern of names that are excluded from weight decay, if there is one: it is searched for in `name`."""
    return getattr(getattr(optimizer, "inner_optimizer", optimizer), "_exclude_from_weight_decay_pattern", None)


def is_excluded_from_decay(optimizer: Any, variable: Any) -> bool:
    """Whether a variable was itself given as one that does not decay."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer._var_key(variable) in (getattr(optimizer, "_exclude_from_weight_decay", None) or ())


def layout_map() -> Any:
    """The layouts by path of the distribution in force, if it has any."""
    return getattr(keras.distribution.distribution(), "_layout_map", None)


def stored_value(variable: Any) -> Any:
    """The tensor that a variable stores; `None` if it is not initialised yet."""
    return variable._value


def is_concrete(value: Any) -> bool:
    """Whether a tensor has values now: it does not stand for one of a trace, and JAX has not given its memory away."""
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return not tf.is_symbolic_tensor(value)
    if name == "torch":
        return str(value.device.type) != "meta"
    return not is_traced(value) and not (hasattr(value, "is_deleted") and value.is_deleted())


def _make_on_host() -> Callable[[Any], Any]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        whole = {1: tf.uint8, 2: tf.uint16}

        def of_tensorflow(value: Any) -> Any:
            read = value.read_value() if hasattr(value, "read_value") else value
            dtype = numpy.dtype(read.dtype.as_numpy_dtype)
            if "CPU" not in read.device:
                return read.numpy()
            # NumPy lends no memory of dtypes that it does not know itself, such as bfloat16.
            lent = read if dtype.isbuiltin == 1 else tf.bitcast(read, whole[dtype.itemsize])
            return numpy.asarray(memoryview(lent)).view(dtype)

        return of_tensorflow
    if name == "torch":
        import ml_dtypes
        import torch

        def of_torch(value: Any) -> Any:
            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:
                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        return of_torch

    def of_jax(value: Any) -> Any:
        import jax

        if any(device.platform != "cpu" for device in value.devices()):
            value = jax.device_put(value, jax.devices("cpu")[0])  # or JAX would keep what NumPy is given
        return numpy.asarray(value)

    return of_jax if name == "jax" else numpy.asarray


on_host = _make_on_host()
"""A tensor as a NumPy array; it shares the memory of one that lies in the processor's."""


def _make_write() -> Callable[[Any, Any], None]:
    name = _backend.backend()
    part = 1 << 22

    def assign(variable: Any, array: Any) -> None:
        variable.assign(keras.ops.convert_to_tensor(array, dtype=variable._dtype))

    def of_jax(variable: Any, array: Any) -> None:
        import jax

        variable.assign(jax.numpy.array(array, dtype=variable._dtype, copy=True))

    def of_torch(variable: Any, array: Any) -> None:
        import torch

        if not array.flags.writeable or not array.flags.c_contiguous:
            array = numpy.array(array)
        bits = array.dtype.name == "bfloat16"
        tensor = torch.from_numpy(array.view("int16") if bits else array)
        with torch.no_grad():
            variable.value.copy_(tensor.view(torch.bfloat16) if bits else tensor)

    def of_tensorflow(variable: Any, array: Any) -> None:
        if array.nbytes <= part or not array.ndim or getattr(variable, "_layout", None) is not None:
            assign(variable, array)
            return
        rows = max(1, part * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            variable._value[start : start + rows].assign(array[start : start + rows])

    return {"jax": of_jax, "torch": of_torch, "tensorflow": of_tensorflow}.get(name, assign)


write = _make_write()
"""Stores an array of a variable's own shape and dtype, with little memory beside the variable's where it can be."""


def _make_write_rows() -> Callable[[Any, Any, Callable[[Any, int], None]], None]:
    name = _backend.backend()
    small, part = 1 << 20, 1 << 22

    def whole(variable: Any, dtype: Any, rows: Callable[[Any, int], None]) -> None:
        array = numpy.empty(tuple(variable.shape), dtype)
        rows(array, 0)
        write(variable, array)

    def in_parts(variable: Any, dtype: Any, rows: Callable[[Any, int], None], store: Callable[[int, Any], Any]) -> None:
        shape = tuple(variable.shape)
        row = numpy.dtype(dtype).itemsize * int(numpy.prod(shape[1:]))
        memory = numpy.empty((min(max(1, part // max(1, row)), shape[0]), *shape[1:]), dtype)
        for start in range(0, shape[0], len(memory)):
            start = min(start, shape[0] - len(memory))  # all parts have one size, for which JAX compiles once
            rows(memory, start)
            store(start, memory)

    def holders(owner: Any) -> int:
        return sys.getrefcount(owner._value)

    def of_jax(variable: Any, dtype: Any, rows: Callable[[Any, int], None]) -> None:
        value = types.SimpleNamespace(_value=object())
        if holders(variable) > holders(value) or len(variable._value.devices()) > 1:
            whole(variable, dtype, rows)  # somebody else has the array
            return
        value._value, variable._value = variable._value, None

        def store(start: int, array: Any) -> None:
            value._value = update()(value._value, array, start)
            value._value.block_until_ready()  # before the memory of the part is used again

        try:
            in_parts(variable, dtype, rows, store)
        finally:
            variable._value = value._value

    @functools.cache
    def update() -> Any:
        """Puts rows into an array that is given away: in its memory, as `fit` of Keras does."""
        import jax

        return jax.jit(
            lambda old, part, start: jax.lax.dynamic_update_slice_in_dim(old, part, start, 0), donate_argnums=0
        )

    def of_torch(variable: Any, dtype: Any, rows: Callable[[Any, int], None]) -> None:
        import torch

        tensor = variable._value.detach()
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            rows(on_host(tensor), 0)
            torch.autograd.graph.increment_version(tensor)  # which others look at to see whether a value is new
            return
        with torch.no_grad():
            in_parts(variable, dtype, rows, lambda start, array: tensor[start : start + len(array)].copy_(own(array)))

    def own(array: Any) -> Any:
        import torch

        bits = array.dtype.name == "bfloat16"
        tensor = torch.from_numpy(array.view("int16") if bits else array)
        return tensor.view(torch.bfloat16) if bits else tensor

    def of_tensorflow(variable: Any, dtype: Any, rows: Callable[[Any, int], None]) -> None:
        import tensorflow as tf

        def store(start: int, array: Any) -> None:
            variable._value.scatter_update(tf.IndexedSlices(array, numpy.arange(start, start + len(array))))

        in_parts(variable, dtype, rows, store)

    known = {"jax": of_jax, "torch": of_torch, "tensorflow": of_tensorflow}.get(name, whole)

    def write_rows(variable: Any, dtype: Any, rows: Callable[[Any, int], None]) -> None:
        size = numpy.dtype(dtype).itemsize * int(numpy.prod(variable.shape))
        large = size > small and getattr(variable, "_layout", None) is None
        (known if large else whole)(variable, dtype, rows)

    return write_rows


write_rows = _make_write_rows()
"""Stores what a function gives: `rows(array, first)` fills an array with a variable's rows from the first on.

For a large variable this takes the memory of a few rows at a time. If the function raises, the variable may have some
of its new rows. On JAX its array is given away, unless somebody else has it too.
"""

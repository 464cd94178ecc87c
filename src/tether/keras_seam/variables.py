"""Variables: what they are made of, their names and paths, and their names among PyTorch's parameters."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Container, Iterator
from types import CodeType, FrameType

import keras
import numpy as np
from keras import Sequential
from keras import backend as _backend

from tether.keras_seam.devices import lay_out_value
from tether.keras_seam.layers import inner_optimizer, set_untracked
from tether.keras_seam.private import (
    AutocastScope,
    Functional,
    is_missing,
    of_this_thread,
    private,
    private_method,
    set_in_this_thread,
    to_snake_case,
)
from tether.types import Array, Config, Tensor

# --------------------------------------------------------------------------- variables
# Variables: their stored values, and what a view is made of.


Variable = keras.Variable
"""The backend's concrete variable class, the one that `add_weight` creates."""


def raw_value(variable: keras.Variable) -> Tensor:
    """The tensor that a variable holds now, before autocast; `None` if not initialised yet."""
    scope = of_this_thread("stateless_scope")
    if scope is not None:
        value = scope.get_current_value(variable)
        if value is not None:
            return value
    return variable._value


def store(variable: keras.Variable, value: Tensor) -> None:
    """Stores a tensor in a variable, also inside a layer's autocast."""
    with AutocastScope(None):
        variable.assign(value)


def waiting_start(variable: keras.Variable) -> keras.Initializer | None:
    """What a variable will start by that has no value yet: it was made inside a trace, and starts when that ends."""
    return None if variable._value is not None else variable._initializer


def _names_of_dtypes() -> dict[object, str]:
    if _backend.backend() != "torch":
        return {}
    import torch

    sizes = {"float": (16, 32, 64), "int": (8, 16, 32, 64), "uint": (8, 16, 32, 64)}
    names = ["bool", "bfloat16", *(f"{kind}{size}" for kind, of_kind in sizes.items() for size in of_kind)]
    return {getattr(torch, name): name for name in names if hasattr(torch, name)}


_DTYPE_NAMES = _names_of_dtypes()
"""What Keras calls the dtypes of PyTorch. A call that added to a dict would end the graph of `torch.compile`."""


def tensor_dtype(tensor: Tensor) -> str:
    """The dtype of a tensor, as Keras calls it: asked for at every call of a layer."""
    return _DTYPE_NAMES.get(tensor.dtype) or str(keras.backend.standardize_dtype(tensor.dtype))


RUNS_FROM_PYTHON = _backend.backend() == "torch"
"""Whether each operation is run from Python at each call, so that what Keras converts and promotes first takes time."""


def _quick(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """An operation of `keras.ops` on two tensors, straight from PyTorch where that does the same.

    PyTorch runs each operation from Python, and what Keras converts and promotes first takes longer than a small
    product. Of two dense floating-point tensors of one dtype there is nothing to convert.
    """
    general: Callable[[Tensor, Tensor], Tensor] = getattr(keras.ops, name)
    if not RUNS_FROM_PYTHON:
        return general
    import torch

    plain, kinds = getattr(torch, name), (torch.Tensor, torch.nn.Parameter)

    def quick(a: Tensor, b: Tensor) -> Tensor:
        are_tensors = type(a) in kinds and type(b) in kinds
        if not are_tensors or a.dtype != b.dtype or a.device != b.device or not a.is_floating_point():
            return general(a, b)
        return plain(a, b) if a.layout == b.layout == torch.strided else general(a, b)

    return quick


add, subtract, multiply, matmul = map(_quick, ("add", "subtract", "multiply", "matmul"))


def _make_add_product() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def apart(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + matmul(a, b)  # `keras.ops.add` takes an empty batch on TensorFlow for a bias

    if not RUNS_FROM_PYTHON:
        return apart
    import torch

    def at_once(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        fits = type(y) is type(a) is torch.Tensor and a.dtype == y.dtype == b.dtype and y.is_floating_point()
        if not fits or a.dim() < 2 or b.dim() != 2 or y.shape != (*a.shape[:-1], b.shape[1]):
            return apart(y, a, b)
        if a.dim() == 2:
            return torch.addmm(y, a, b)
        found = torch.addmm(y.reshape(-1, y.shape[-1]), a.reshape(-1, a.shape[-1]), b)
        return found.reshape(y.shape)

    return at_once


add_product = _make_add_product()
"""Rows and the product of rows with a matrix: on PyTorch in one operation, which goes through the result once."""


def _make_product_of_examples() -> Callable[[Tensor, Tensor], Tensor]:
    if not RUNS_FROM_PYTHON:
        return functools.partial(keras.ops.einsum, "abc,acd->abd")

    def with_few_columns(x: Tensor, matrices: Tensor) -> Tensor:
        rows, (inputs, outputs) = x.shape[1], matrices.shape[1:]
        is_known = type(rows) is type(inputs) is type(outputs) is int  # not the symbols of a compiler
        if not is_known or rows == 1 or 4 * outputs > inputs or x.device.type != "cpu" or x.dtype != matrices.dtype:
            return matmul(x, matrices)
        # Few columns of many rows take a processor twice as long as few rows of many columns, and so does the gradient.
        return matmul(matrices.mT, x.mT).mT

    return with_few_columns


product_of_examples = _make_product_of_examples()
"""The rows of each example, `(examples, rows, inputs)`, times a matrix of its own, `(examples, inputs, outputs)`."""


def _entries_of_tensorflow(taken: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Entries whose gradient is that of the whole table.

    TensorFlow's own is a list of slices, one for each number, of which Keras's optimizers take the square one by one
    where an entry was taken several times: Adam then steps otherwise than on the other backends.
    """
    import tensorflow as tf

    def found(table: Tensor, numbers: Tensor) -> Tensor:
        table, numbers = tf.convert_to_tensor(table), tf.convert_to_tensor(numbers)
        if not table.dtype.is_floating or None in table.shape:
            return taken(table, numbers)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def chosen(table: Tensor) -> Tensor:
            def gradient(upstream: Tensor) -> Tensor:
                rows = tf.reshape(upstream, (-1, *table.shape[1:]))
                return tf.math.unsorted_segment_sum(rows, tf.reshape(numbers, (-1,)), table.shape[0])

            return tf.gather(table, numbers), gradient

        return chosen(table)

    return found


def _make_entries() -> Callable[[Tensor, Tensor], Tensor]:
    def taken(table: Tensor, numbers: Tensor) -> Tensor:
        return keras.ops.take(table, numbers, axis=0)

    if _backend.backend() == "tensorflow":
        return _entries_of_tensorflow(taken)
    if not RUNS_FROM_PYTHON:
        return taken
    import torch

    def selected(table: Tensor, numbers: Tensor) -> Tensor:
        # Keras squeezes an axis that has as many entries as there are numbers, which an ONNX file then does always.
        found = torch.index_select(table, 0, numbers.reshape(-1))
        return found.reshape(*numbers.shape, *table.shape[1:])

    return selected


entries = _make_entries()
"""The entries along the first axis of a table, for numbers of any shape that all exist."""


def reads_entries_in_place(x: Tensor) -> bool:
    """Whether `product_with_entries` is quicker than to copy entries: in an eager call of PyTorch on a processor."""
    if not RUNS_FROM_PYTHON:
        return False
    import torch

    is_at_hand = x.device.type == "cpu" and x.dtype == torch.float32
    return is_at_hand and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def product_with_entries(x: Tensor, stack: Tensor, numbers: Tensor) -> Tensor:
    """Each row of `x` times an entry of a stack of matrices, which is read where it lies; without a gradient.

    Args:
        x: Shape `(examples, inputs)`.
        stack: Shape `(entries, inputs, outputs)`.
        numbers: The entry of each example, shape `(examples,)`.
    """
    import torch

    _, inputs, outputs = stack.shape
    rows = numbers.long().unsqueeze(1) * inputs + torch.arange(inputs)
    table = stack.reshape(-1, outputs)
    return torch.nn.functional.embedding_bag(rows, table, per_sample_weights=x.contiguous(), mode="sum")


def stored_dtype(variable: keras.Variable) -> str:
    """The dtype of what is stored, whatever the autocast scope says."""
    return str(keras.backend.standardize_dtype(variable._dtype))


def held_dtype(variable: keras.Variable) -> str:
    """The dtype of the tensor that a variable holds, which is not always the one that the variable says it has.

    JAX without 64 bits holds float32 for float64, PyTorch has no uint16 and holds int32.
    """
    value = raw_value(variable)
    return stored_dtype(variable) if value is None else str(keras.backend.standardize_dtype(value.dtype))


def _make_plain_tensor() -> Callable[[Tensor], Tensor]:
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor
    return lambda value: value


plain_tensor = _make_plain_tensor()
"""A tensor of what a variable's `value` gives: on TensorFlow its own variable, which some of `keras.ops` refuse."""


def own_tensor(array: Array, dtype: str | None) -> Tensor:
    """An array as a tensor for a variable to start with, of a dtype or of the array's.

    PyTorch would take NumPy's memory, at whose addresses a matrix product may take half as long again.
    """
    tensor = keras.ops.convert_to_tensor(array, dtype=dtype)
    return tensor.clone() if _backend.backend() == "torch" else tensor


def own_copy(tensor: Tensor) -> Tensor:
    """A tensor whose memory nobody else holds: JAX donates buffers, and one given away twice is an error."""
    if _backend.backend() == "jax":
        import jax

        if isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer):
            return jax.numpy.copy(tensor)
    return tensor


def prepare_view(
    view: keras.Variable, *, name: str, path: str, shape: tuple[int, ...], dtype: str, autocast: bool
) -> None:
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


def autocasts(variable: keras.Variable) -> bool:
    return bool(variable._autocast)


def is_float(dtype: str) -> bool:
    return "float" in dtype


# --------------------------------------------------------------------------- names and paths
# Name scopes, and the paths of variables.


_name_scope = private("keras.src.backend.common.name_scope.name_scope", "A weight under a path of its own")
_current_path = private("keras.src.backend.common.name_scope.current_path", "A path for a variable")


@contextlib.contextmanager
def path_scope(path: str) -> Iterator[None]:
    """The name scope in which a variable of the path's last name is created under the path, whatever scopes are open.

    A layout map looks a variable up while it is created, so a path that is set afterwards comes too late. It is Keras's
    own scope and none of TensorFlow's, whose graphs do not take every name: the variable is created outside of them.
    """
    *above, scope = path.split("/")[:-1] or [""]
    with _outside_graphs(), _name_scope(scope, override_parent="/".join(above)):
        yield


def _make_outside_graphs() -> Callable[[], contextlib.AbstractContextManager[object]]:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope
    return contextlib.nullcontext


_outside_graphs = _make_outside_graphs()


@contextlib.contextmanager
def _outside_stateless_scopes() -> Iterator[None]:
    """Allows new variables, which Keras refuses in a stateless scope."""
    scope = of_this_thread("stateless_scope")
    set_in_this_thread("stateless_scope", None)
    try:
        yield
    finally:
        set_in_this_thread("stateless_scope", scope)


def name_scope(layer: keras.Layer) -> contextlib.AbstractContextManager[object]:
    """The name scope that `add_weight` opens around a new variable of `layer`."""
    return keras.name_scope(layer.name, caller=layer)


def current_path() -> str:
    return str(_current_path())


def numbered(name: str, taken: Container[str]) -> str:
    """A name, with a number if it is taken: how things of one name in one model are told apart, in its order."""
    numbers = (f"{name}_{number}" for number in itertools.count(1))
    return next(each for each in itertools.chain([name], numbers) if each not in taken)


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", to_snake_case(Variable.__name__)}


# --------------------------------------------------------------------------- PyTorch's names
# The names under which PyTorch has a model's parameters.
#
# Keras registers them by path, so of two variables of one path one would be no parameter of the model: no optimizer
# of PyTorch's would train it, and no `state_dict` have it. A variable does not know what else a model holds; the
# stack says which model is registering its variables. Those of weights then give their paths with numbers, in the
# model's order.


_REGISTERING: CodeType | None = None
_READING: set[CodeType] = set()
_RESERVED: set[str] = set()
"""What a list of parameters has as attributes of its own, such as `half`: no parameter can be called so."""
if keras.backend.backend() == "torch":
    from torch.compiler import is_compiling as _is_compiling
    from torch.nn import ParameterDict as _ParameterDict

    _RESERVED = set(dir(_ParameterDict()))
    _track = private_method(keras.Layer, "_track_variables", "Two parameters of one path in one model of PyTorch's")
    if not is_missing(_track):
        _REGISTERING = _track.__code__
        # Before Python 3.12 the comprehension in it has a frame of its own.
        _READING = {_REGISTERING, *(each for each in _REGISTERING.co_consts if isinstance(each, CodeType))}


class _Keyed(keras.Variable):
    """A variable whose path is another one while a model registers it that has the path already."""

    @property
    def path(self) -> str:
        """Its path; asked by Keras for the key of a parameter, one that no other variable of the model has."""
        path = str(self._path)
        if _is_compiling():  # there are no frames then
            return path
        frame: FrameType | None = sys._getframe(1)
        if frame is None or frame.f_code not in _READING:
            return path
        while frame is not None and frame.f_code is not _REGISTERING:
            frame = frame.f_back
        if frame is None:
            return path
        keys = frame.f_locals.setdefault(".tether.keys", {})
        if not keys:
            keys.update(_keys(frame.f_locals["self"].variables))
        return str(keys.get(id(self), path))


def _keys(variables: list[keras.Variable]) -> dict[int, str]:
    """What the variables of weights are called among all of a model's, by their ids."""
    found: dict[int, str] = {}
    taken = {variable.path for variable in variables if not isinstance(variable, _Keyed)} | _RESERVED
    for variable in variables:
        if isinstance(variable, _Keyed):
            found[id(variable)] = numbered(variable.path, taken)
            taken.add(found[id(variable)])
    return found


def tell_apart(variable: keras.Variable) -> None:
    """Lets a stored variable be a parameter of its own, whatever else in a model has its path."""
    if _REGISTERING is not None:
        variable.__class__ = _Keyed


# --------------------------------------------------------------------------- another shape
# Giving a variable another value, or another shape.


def _make_give_value() -> Callable[[keras.Variable, Tensor], None]:
    name = _backend.backend()
    if name == "torch":
        import torch

        def of_torch(variable: keras.Variable, value: Tensor) -> None:
            parameter = variable._value  # the same object, since optimizers and modules of PyTorch's hold it
            with torch.no_grad():
                tensor = keras.ops.convert_to_tensor(value, dtype=variable._dtype).to(parameter.device)
                parameter.grad = None
                if tensor.is_floating_point():
                    # A graph that somebody still holds knows the old shape; another dtype in between ends its hold.
                    other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
                    parameter.data = torch.empty(0, dtype=other, device=tensor.device)
                parameter.data = torch.empty_like(tensor)
                parameter.copy_(tensor)  # counts as a change
            variable._shape = tuple(value.shape)

        return of_torch

    def of_others(variable: keras.Variable, value: Tensor) -> None:
        tensor = own_copy(keras.ops.convert_to_tensor(value, dtype=variable._dtype))
        before, variable._shape = variable._shape, tuple(value.shape)
        try:
            if name == "jax":
                set_untracked(variable, "_value", lay_out_value(variable, tensor))
            else:
                variable._initialize(tensor)
        except BaseException:
            variable._shape = before
            raise

    return of_others


give_value = _make_give_value()
"""Gives a variable a value of another shape; it stays the object that layers and optimizers know."""


def recognize_variables(optimizer: keras.Optimizer) -> None:
    """Lets an optimizer know its variables again after `give_value`: TensorFlow's has other names for them then."""
    for each in {id(found): found for found in (optimizer, inner_optimizer(optimizer))}.values():
        before = {place: key for key, place in (getattr(each, "_trainable_variables_indices", None) or {}).items()}
        if before:
            after = {place: each._var_key(variable) for place, variable in enumerate(each._trainable_variables)}
            excluded = getattr(each, "_exclude_from_weight_decay", None) or set()
            renamed = {after[place] for place, key in before.items() if key in excluded}
            excluded.difference_update(before.values())
            excluded.update(renamed)
            decays = getattr(each, "_weight_decay_by_var_key", None)  # of Keras 3.16
            if decays:
                each._weight_decay_by_var_key = {after[place]: decays[key] for place, key in before.items()}
            each._trainable_variables_indices = {key: place for place, key in after.items()}


def give_shape(variable: keras.Variable, shape: tuple[int, ...]) -> None:
    """Lets a variable without storage know its shape."""
    variable._shape = shape


def build_shapes(layer: keras.Layer) -> Config | None:
    """The shapes of the inputs that a layer was built for, which its config holds."""
    return getattr(layer, "_build_shapes_dict", None)


def set_build_shapes(layer: keras.Layer, shapes: Config | None) -> None:
    set_untracked(layer, "_build_shapes_dict", shapes)


def infer_graph(model: keras.Model, undo: list[Callable[[], None]]) -> None:
    """Works out the shapes of all tensors in a model's graph again, in the graphs that it calls first.

    Args:
        model: A functional or sequential model whose layers have other sizes than when it was made.
        undo: Gets what puts each shape back.
    """
    graph = model._functional if isinstance(model, Sequential) else model
    if not isinstance(graph, Functional):
        return
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            operation = node.operation
            if isinstance(operation, (Functional, Sequential)):
                infer_graph(operation, undo)
            outputs = operation.compute_output_spec(*node.arguments.args, **node.arguments.kwargs)
            for tensor, found in zip(node.outputs, keras.tree.flatten(outputs), strict=True):
                if tensor._shape != found.shape:
                    undo.append(functools.partial(setattr, tensor, "_shape", tensor._shape))
                    tensor._shape = found.shape


# --------------------------------------------------------------------------- random numbers of a stored state


SEED_DTYPE = "uint32"
"""In which a state is stored: what a seed is on every backend, though PyTorch and TensorFlow have it in other types."""


class Seeds(keras.random.SeedGenerator):
    """Draws seeds from a stored state, as Keras's generator does from the variable that it makes for itself.

    Keras's random functions ask a generator for `next()`, and on PyTorch whether it was given a seed (`_initial_seed`):
    without, PyTorch's own generator is faster.

    Args:
        state: A variable of two whole numbers: the seed, and how many were drawn.
        seeded: Whether somebody chose the seed.
    """

    def __init__(self, state: keras.Variable, seeded: bool) -> None:
        self.name = state.name  # without `super`, which would make a variable
        self.state = state
        self._initial_seed = 0 if seeded else None

    def next(self, ordered: bool = True) -> Tensor:
        """The present state as a seed; the state goes on."""
        value = self.state.value
        one = keras.ops.convert_to_tensor(np.array([0, 1]), dtype=self.state.dtype)
        # A copy: what TensorFlow and PyTorch give is what is stored, and a cast to its own dtype is none.
        seed = keras.ops.copy(keras.ops.cast(value, _dtype_of_seeds()))
        self.state.assign(keras.ops.add(value, one))
        return seed


def _dtype_of_seeds() -> str:
    return {"tensorflow": "int64", "torch": "int64"}.get(keras.backend.backend(), SEED_DTYPE)

"""Values as they lie in memory: lent to NumPy, compared over time, and stored with little memory beside them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator

import keras
import ml_dtypes
import numpy
from keras import Layer as _Layer
from keras import backend as _backend
from numpy.typing import DTypeLike

from tether.keras_seam.calls import is_traced
from tether.keras_seam.frames import _first_local, _frames
from tether.keras_seam.private import RandomInitializer as _RandomInitializer
from tether.keras_seam.private import is_missing, private_method
from tether.keras_seam.processes import gathered, lies_elsewhere
from tether.keras_seam.sharding import is_sharded, local_rows, whole
from tether.keras_seam.variables import Variable
from tether.types import Array, Function, Tensor

# --------------------------------------------------------------------------- values in memory


Snapshot = tuple[Tensor, object]
"""A tensor, and what tells whether it was written to since: a count, or its memory."""
Rows = Callable[[Array, int | tuple[int, ...]], None]
"""Fills an array with a part of a value: its rows from a number on, or what begins at a place on each axis."""

SMALL, PART = 1 << 20, 1 << 22
"""Bytes of a value that is stored as a whole, and of one part of a larger one."""
ALIGNED = 64
"""What the addresses of arrays are a multiple of whose memory the backends take as it is."""


def stored_value(variable: keras.Variable) -> Tensor:
    """The tensor that a variable stores; `None` if it is not initialised yet."""
    return variable._value


def is_concrete(value: Tensor) -> bool:
    """Whether a tensor has values now: it does not stand for one of a trace, and JAX has not given its memory away."""
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return not tf.is_symbolic_tensor(value)
    if name == "torch":
        return str(value.device.type) != "meta"
    return not is_traced(value) and not (hasattr(value, "is_deleted") and value.is_deleted())


def is_stored_in(value: Tensor, variable: keras.Variable) -> bool:
    """Whether a value is what a variable stores: that very tensor, or an array over its memory."""
    if isinstance(value, numpy.ndarray) and _backend.backend() == "torch":
        if is_sharded(variable):
            return False
        return bool(value.__array_interface__["data"][0] == variable._value.data_ptr())
    return value is variable._value


def _lent_by_tensorflow(tensor: Tensor) -> memoryview:
    """The memory of an eager tensor. NumPy knows no dtypes such as bfloat16: theirs is lent as integers."""
    import tensorflow as tf

    if numpy.dtype(tensor.dtype.as_numpy_dtype).isbuiltin != 1:
        tensor = tf.bitcast(tensor, f"uint{8 * tensor.dtype.size}")
    return memoryview(tensor)


def _aligned(shape: tuple[int, ...], dtype: DTypeLike, make: Function = numpy.empty) -> Tensor:
    size = numpy.dtype(dtype).itemsize * math.prod(shape)
    memory = make(size + ALIGNED, "uint8")
    first = -memory.ctypes.data % ALIGNED
    return memory[first : first + size].view(dtype).reshape(shape)


def _filled_by_hand(tensor: Tensor, dtype: DTypeLike) -> Array:
    """An array in which a new tensor of TensorFlow's, that nobody has read, can be written to."""
    lent = numpy.asarray(_lent_by_tensorflow(tensor))
    address, _ = lent.__array_interface__["data"]
    memory = numpy.ctypeslib.as_array((ctypes.c_uint8 * lent.nbytes).from_address(address))
    return memory.view(dtype).reshape(lent.shape)


def _given_to_tensorflow(array: Array) -> Tensor:
    """A tensor that has an array's memory from now on; TensorFlow writes to other memory when it is first assigned."""
    import tensorflow as tf

    bits = array.dtype.name == "bfloat16"
    tensor = tf.experimental.dlpack.from_dlpack((array.view("uint16") if bits else array).__dlpack__())
    return tf.bitcast(tensor, "bfloat16") if bits else tensor


def _can_be_given(dtype: DTypeLike) -> bool:
    name = numpy.dtype(dtype).name
    return name == "bfloat16" or numpy.dtype(name).isbuiltin == 1  # TensorFlow makes no float8 of other bits


def untouched_zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Zeros that something else is about to take the place of; on TensorFlow they take no memory until then."""
    if _backend.backend() != "tensorflow" or not _can_be_given(dtype):
        return keras.ops.zeros(shape, dtype)
    return _given_to_tensorflow(_aligned(shape, dtype, numpy.zeros))


def _lent_to_torch(array: Array) -> Tensor:
    """A tensor over the memory of an array, also of a dtype that PyTorch takes from NumPy only as integers."""
    import torch

    name = array.dtype.name
    if name not in _BITS:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_BITS[name])).view(getattr(torch, name))


_BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""Dtypes that NumPy has only by an extension, which PyTorch does not know, and integers as large."""


def _make_lent() -> Callable[[Tensor], Array]:
    name = _backend.backend()
    if name == "tensorflow":

        def of_tensorflow(value: Tensor) -> Array:
            read = value.read_value() if hasattr(value, "read_value") else value
            if "CPU" not in read.device:
                return read.numpy()
            return numpy.asarray(_lent_by_tensorflow(read)).view(numpy.dtype(read.dtype.as_numpy_dtype))

        return of_tensorflow
    if name == "torch":
        import torch

        def of_torch(value: Tensor) -> Array:
            value = whole(value).detach().cpu()
            name = str(value.dtype).removeprefix("torch.")
            if name not in _BITS:
                return value.numpy()
            return value.view(getattr(torch, _BITS[name])).numpy().view(getattr(ml_dtypes, name))

        return of_torch

    def of_jax(value: Tensor) -> Array:
        import jax

        if value.is_fully_replicated:
            value = value.addressable_data(0)
        if any(device.platform != "cpu" for device in value.devices()):
            value = jax.device_put(value, jax.devices("cpu")[0])  # or JAX would keep what NumPy is given
        return numpy.asarray(value)

    return of_jax if name == "jax" else numpy.asarray


_lent = _make_lent()


def _make_is_in_memory() -> Callable[[Tensor], bool]:
    kinds: dict[str, Callable[[Tensor], bool]] = {
        "jax": lambda value: all(device.platform == "cpu" for device in value.devices()) and not lies_elsewhere(value),
        "torch": lambda value: value.device.type == "cpu",
        "tensorflow": lambda value: "CPU" in value.device,
    }
    return kinds.get(_backend.backend(), lambda value: False)


is_in_memory = _make_is_in_memory()
"""Whether a tensor with a value can be read without waiting for an accelerator or another process."""


def on_host(value: Tensor, name: str = "", *, in_step: bool = False) -> Array:
    """A tensor as a NumPy array; it shares the memory of one that lies in the processor's.

    One that lies partly on other processes is refused with a `TetherError`, or gathered: see `processes.gathered`,
    which says what the other arguments are for.
    """
    return gathered(value, name, in_step=in_step) if lies_elsewhere(value) else _lent(value)


def to_numpy(value: Tensor, name: str = "", *, in_step: bool = False) -> Array:
    """What `keras.ops.convert_to_numpy` gives, also of a value that lies partly on other processes; see `on_host`."""
    tensor = value.value if isinstance(value, keras.Variable) else value
    return gathered(tensor, name, in_step=in_step) if lies_elsewhere(tensor) else keras.ops.convert_to_numpy(tensor)


def sharding_of(variable: keras.Variable) -> Tensor:
    """Where JAX puts the parts of a variable that is laid out over several devices; `None` of one that is on one."""
    if _backend.backend() != "jax":
        return None
    layout = getattr(variable._layout, "backend_layout", variable._layout)
    value = getattr(variable, "_value", None)  # none yet where the variable is being made
    if layout is None and value is not None:
        layout = value.sharding
    return layout if layout is not None and len(layout.device_set) > 1 else None


def _by_parts(variable: keras.Variable, dtype: DTypeLike, rows: Rows, layout: Tensor) -> None:
    """Stores a value of which each device gets its part; this process asks for the parts of its own devices only."""
    import jax

    shape = tuple(variable.shape)
    devices: dict[tuple[tuple[int, int], ...], list[object]] = {}
    for device, index in layout.addressable_devices_indices_map(shape).items():
        bounds = tuple(each.indices(n)[:2] for each, n in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        part = _aligned(tuple(stop - start for start, stop in bounds), dtype)
        rows(part, tuple(start for start, _ in bounds))
        arrays += [jax.device_put(part, device) for device in holders]
    variable.assign(jax.make_array_from_single_device_arrays(shape, layout, arrays))


def _make_snapshot() -> Callable[[Tensor], Snapshot]:
    name = _backend.backend()
    if name == "tensorflow":

        def of_tensorflow(value: Tensor) -> Snapshot:
            # As long as somebody holds what was read, TensorFlow writes to other memory: the address tells.
            read = value.read_value() if hasattr(value, "read_value") else value
            return read, _lent_by_tensorflow(read)

        return of_tensorflow
    if name == "torch":
        return lambda value: (value, value._version)
    return lambda value: (value, 0)


snapshot = _make_snapshot()
"""What a stored value is now, to be compared later; holds on to the memory of JAX's and TensorFlow's tensors."""


def is_same_snapshot(a: Snapshot, b: Snapshot) -> bool:
    """Whether nothing was written between two snapshots of one stored value."""
    if isinstance(a[1], memoryview) and isinstance(b[1], memoryview):
        return _address(a[1]) == _address(b[1])
    return a[0] is b[0] and a[1] == b[1]


def _address(view: memoryview) -> tuple[int, int]:
    array = numpy.asarray(view)
    return array.__array_interface__["data"][0], array.nbytes


def _fill_from(value: Array, array: Array, first: int | tuple[int, ...]) -> None:
    place = (first,) if isinstance(first, int) else first  # no axis at all of a scalar
    array[...] = value[tuple(slice(at, at + n) for at, n in zip(place, array.shape, strict=False))]


def _make_write() -> Callable[[keras.Variable, Array], None]:
    name = _backend.backend()

    def assign(variable: keras.Variable, array: Array) -> None:
        variable.assign(keras.ops.convert_to_tensor(array, dtype=variable._dtype))

    def of_jax(variable: keras.Variable, array: Array) -> None:
        import jax

        layout = sharding_of(variable)
        if layout is not None:
            value = numpy.asarray(array, variable._value.dtype)
            _by_parts(variable, value.dtype, functools.partial(_fill_from, value), layout)
            return
        variable.assign(jax.numpy.array(array, dtype=variable._value.dtype, copy=True))

    def of_torch(variable: keras.Variable, array: Array) -> None:
        import torch

        if not array.flags.writeable or not array.flags.c_contiguous:
            array = numpy.array(array)
        if is_sharded(variable):
            variable.assign(_lent_to_torch(array))
            return
        with torch.no_grad():
            variable.value.copy_(_lent_to_torch(array))

    return {"jax": of_jax, "torch": of_torch}.get(name, assign)


write = _make_write()
"""Stores a copy of an array of a variable's own shape, and of the dtype of what it holds."""


def _make_write_entry() -> Callable[[keras.Variable, int, Array], None]:
    name = _backend.backend()

    def of_torch(variable: keras.Variable, place: int, array: Array) -> None:
        import torch

        with torch.no_grad():
            variable.value[place].copy_(_lent_to_torch(numpy.array(array)))

    if name == "torch":
        return of_torch
    if name != "jax":
        return _rewritten
    import jax

    def put(whole: Tensor, place: Tensor, entry: Tensor) -> Tensor:
        return whole.at[place].set(entry)

    copied, in_place = jax.jit(put), jax.jit(put, donate_argnums=0)

    def of_jax(variable: keras.Variable, place: int, array: Array) -> None:
        # Nobody else may hold the array that is written over: it counts as held here, in the call and by the variable.
        alone = sys.getrefcount(variable._value) <= 2
        entry = numpy.asarray(array, variable._value.dtype)
        variable._value = (in_place if alone else copied)(variable._value, numpy.int32(place), entry)

    return of_jax


def _rewritten(variable: keras.Variable, place: int, array: Array) -> None:
    """All entries anew, unless the entry is there already.

    For TensorFlow: after an assignment to some rows, it copies the whole variable at each read.
    """
    present = on_host(variable.value)
    entry = numpy.asarray(array, present.dtype)
    if present[place].tobytes() == entry.tobytes():
        return

    def rows(whole: Array, first: int | tuple[int, ...]) -> None:
        whole[...] = present
        whole[place] = entry

    write_rows(variable, present.dtype, rows)


write_entry = _make_write_entry()
"""Stores an entry along the first axis of a variable: an array of the entry's shape. The others are not touched."""


def _row(place: int | tuple[int, ...]) -> int:
    assert isinstance(place, int)
    return place


def _make_write_rows() -> Callable[[keras.Variable, DTypeLike, Rows], None]:
    name = _backend.backend()

    def at_once(variable: keras.Variable, dtype: DTypeLike, rows: Rows) -> None:
        array = numpy.empty(tuple(variable.shape), dtype)
        rows(array, 0)
        write(variable, array)

    def in_parts(variable: keras.Variable, dtype: DTypeLike, rows: Rows, store: Callable[[int, Array], object]) -> None:
        shape = tuple(variable.shape)
        row = numpy.dtype(dtype).itemsize * int(numpy.prod(shape[1:]))
        memory = _aligned((min(max(1, PART // max(1, row)), shape[0]), *shape[1:]), dtype)
        for start in range(0, shape[0], len(memory)):
            start = min(start, shape[0] - len(memory))  # all parts have one size, for which JAX compiles once
            rows(memory, start)
            store(start, memory)

    def holders(owner: keras.Variable | types.SimpleNamespace) -> int:
        return sys.getrefcount(owner._value)

    def of_jax(variable: keras.Variable, dtype: DTypeLike, rows: Rows) -> None:
        value = types.SimpleNamespace(_value=object())
        if holders(variable) > holders(value) or len(variable._value.devices()) > 1:
            at_once(variable, dtype, rows)  # somebody else has the array
            return
        value._value, variable._value = variable._value, None

        def store(start: int, array: Array) -> None:
            value._value = update()(value._value, array, start)
            value._value.block_until_ready()  # before the memory of the part is used again

        try:
            in_parts(variable, dtype, rows, store)
        finally:
            variable._value = value._value

    @functools.cache
    def update() -> Function:
        """Puts rows into an array that is given away: in its memory, as `fit` of Keras does."""
        import jax

        return jax.jit(
            lambda old, part, start: jax.lax.dynamic_update_slice_in_dim(old, part, start, 0), donate_argnums=0
        )

    def of_torch(variable: keras.Variable, dtype: DTypeLike, rows: Rows) -> None:
        import torch

        if is_sharded(variable):
            first, tensor = local_rows(variable)
            if tensor is None:
                at_once(variable, dtype, rows)
                return
            given, rows = rows, lambda array, place: given(array, first + _row(place)) if len(array) else None
        else:
            tensor = variable._value.detach()
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            rows(on_host(tensor), 0)
            torch.autograd.graph.increment_version(tensor)  # which others look at to see whether a value is new
            return
        with torch.no_grad():
            in_parts(variable, dtype, rows, lambda at, part: tensor[at : at + len(part)].copy_(_lent_to_torch(part)))

    def of_tensorflow(variable: keras.Variable, dtype: DTypeLike, rows: Rows) -> None:
        if not _can_be_given(dtype):
            at_once(variable, dtype, rows)
            return
        # Not a few rows at a time: after an assignment to some rows, TensorFlow copies the whole variable at each
        # read. The memory is TensorFlow's own, so that it is what the variable before this one has given back.
        import tensorflow as tf

        with tf.device("CPU"):
            tensor = tf.raw_ops.Empty(shape=tuple(variable.shape), dtype=dtype, init=False)
        rows(_filled_by_hand(tensor, dtype), 0)
        variable._value.assign(tensor)

    known = {"jax": of_jax, "torch": of_torch, "tensorflow": of_tensorflow}.get(name, at_once)

    def write_rows(variable: keras.Variable, dtype: DTypeLike, rows: Rows) -> None:
        layout = sharding_of(variable)
        if layout is not None:
            _by_parts(variable, dtype, rows, layout)
            return
        size = numpy.dtype(dtype).itemsize * int(numpy.prod(variable.shape))
        large = size > SMALL and getattr(variable, "_layout", None) is None
        (known if large else at_once)(variable, dtype, rows)

    return write_rows


write_rows = _make_write_rows()
"""Stores what a function gives: `rows(array, first)` fills an array with a variable's rows from the first on.

A variable that is laid out over several devices of JAX is asked for by the parts of this process's devices alone, with
the place on each axis at which a part begins. For another large variable this takes the memory of a few rows at a time
on JAX and PyTorch, and if the function raises it may have some of its new rows there. On JAX its array is given away,
unless somebody else has it too.
"""


# --------------------------------------------------------------------------- start values
# Variables that start at zero where a file is about to say what is in them.


Start = tuple["weakref.ref[keras.Variable]", Callable[[], Tensor]]
"""A variable, and what makes the value that it would have started with."""


def is_random(initializer: keras.Initializer) -> bool:
    return isinstance(initializer, _RandomInitializer)


class _Here(threading.local):
    """What holds in one thread."""

    def __init__(self) -> None:
        self.larger_than: int | None = None
        self.begun: dict[int, tuple[Start, Snapshot]] = {}
        """The variables that exist and started at zero, by id, each with a snapshot of that zero."""


_here = _Here()
_lock = threading.Lock()
_scopes = 0


@contextlib.contextmanager
def random_starts_left_out(larger_than: int) -> Iterator[list[Start]]:
    """Inside, large variables start at zero where they would start at random: for one who stores their values next.

    Drawing them takes longer than reading a file, and more memory. Keras has no place for it but the method by which a
    variable starts, so another one stands in for it meanwhile. For other threads it changes nothing. A layer of one's
    own draws from a seed as ever, since what it makes of such a start in its `build` can be relied on.

    Args:
        larger_than: Bytes from which on a variable is large.

    Yields:
        A list that has, after the block, each variable in which nothing was stored in it, and what makes its value.
    """
    left_out: list[Start] = []
    if is_missing(_method):  # then every variable starts as Keras has it
        yield left_out
        return
    before, begun = (_here.larger_than, _here.begun), dict[int, tuple[Start, Snapshot]]()
    _count(1)
    _here.larger_than, _here.begun = larger_than, begun
    try:
        yield left_out
        for start, zero in list(begun.values()):
            variable = start[0]()
            if variable is not None and is_same_snapshot(zero, _snapshot(variable)):
                left_out.append(start)
    finally:
        _here.larger_than, _here.begun = before
        _count(-1)
        begun.clear()  # whose snapshots hold memory, also after a failure


def _count(change: int) -> None:
    global _scopes
    with _lock:
        before, _scopes = _scopes, _scopes + change
        if before == 0:
            Variable._initialize_with_initializer = _initialize
        elif _scopes == 0 and _own is not None:
            Variable._initialize_with_initializer = _own
        elif _scopes == 0:
            del Variable._initialize_with_initializer


_own = vars(Variable).get("_initialize_with_initializer")
_method = private_method(Variable, "_initialize_with_initializer", "A start without random numbers")


def _initialize(variable: keras.Variable, initializer: keras.Initializer) -> None:
    is_left_out = _is_left_out(variable, initializer)
    if not is_left_out and not (_is_large(variable) and isinstance(initializer, keras.initializers.Zeros)):
        _method(variable, initializer)
        return
    layout = _layout_in_force(variable)
    if layout is None:
        _method(variable, untouched_zeros if is_left_out else initializer)
    else:
        _by_parts(variable, variable._dtype, lambda part, _: part.fill(0), layout)
    if not is_left_out:
        return
    begun, key = _here.begun, id(variable)
    start = functools.partial(initializer, tuple(variable._shape), dtype=variable._dtype)
    begun[key] = (weakref.ref(variable, lambda _: begun.pop(key, None)), start), _snapshot(variable)


def _is_left_out(variable: keras.Variable, initializer: keras.Initializer) -> bool:
    if _here.larger_than is None or not is_random(initializer):
        return False
    if not isinstance(initializer.seed, int):
        return False  # from a generator of seeds, which would give other numbers to the next one who draws
    if not _is_large(variable):
        return False
    return initializer._init_seed is None or _only_keras_builds()


def _is_large(variable: keras.Variable) -> bool:
    size = math.prod(variable._shape) * numpy.dtype(variable._dtype).itemsize
    return _here.larger_than is not None and size > _here.larger_than


def _layout_in_force(variable: keras.Variable) -> Tensor:
    """Where a new variable is going to lie, if that is on several devices: Keras makes all of it in each process."""
    find = getattr(variable, "_initialize_layout", None)
    if find is None:
        return None
    find()
    return sharding_of(variable)


def _only_keras_builds() -> bool:
    """Whether all layers that are being built are Keras's: those of attention seed their own parts."""
    found = (local for local in map(_first_local, _frames()) if isinstance(local, _Layer))
    return all(type(layer).__module__.startswith(("keras.", "tether.")) for layer in found)


def _make_snapshot_of_all() -> Callable[[keras.Variable], Snapshot]:
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        def of_tensorflow(variable: keras.Variable) -> Snapshot:
            with tf.init_scope():  # a graph may be in the making
                return snapshot(variable._value)

        return of_tensorflow
    return lambda variable: snapshot(variable._value)


_snapshot = _make_snapshot_of_all()

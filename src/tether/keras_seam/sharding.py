"""Variables that an engine divides or copies: PyTorch's FSDP2, told to Keras, and TensorFlow's strategies.

FSDP2 registers another parameter before and after each call: the whole one while the call runs, and this process's
shard of it (a `DTensor`) in between. A Keras variable holds one parameter and asks nobody, so whoever exchanges the
registered parameter points the variable at the new one (`point`), and with it every list of parameters that has it.

What Keras does with a variable between calls meets the shard. Values go in and out whole; what an optimizer keeps for
the variable is made a shard of the same layout as soon as it is created.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import keras
from keras import backend as _backend
from numpy.typing import DTypeLike

from tether.errors import Unsupported
from tether.keras_seam import census
from tether.keras_seam.frames import code_of
from tether.keras_seam.layers import contained_layers, inner_optimizer, optimized_variables, slots_by_kind
from tether.keras_seam.private import ThreadScope, of_this_thread
from tether.types import Array, Tensor

_Base: Any = keras.Variable if TYPE_CHECKING else object
_ADD_SLOT = code_of(keras.Optimizer.add_variable_from_reference)


class _Reading(ThreadScope):
    whole: bool = False


_reading = _Reading()


def whole_values() -> contextlib.AbstractContextManager[None]:
    """Inside the block a sharded variable reads as the whole tensor, gathered at each reading from all processes."""
    return _reading.set(whole=True)


@dataclass
class Home:
    """Where the shards of a variable lie, and how the whole parameter is given up for the shard."""

    mesh: Any
    placements: tuple[object, ...]
    reshard: Callable[[], None]


class ShardedVariable(_Base):
    """Comes before the class of a variable whose parameter is a shard between the calls of its model."""

    _home: Home

    @property
    def value(self) -> Tensor:
        """What is registered now: the whole parameter in a call of the model, else the shard."""
        if _waiting:
            finish_slots()
        if _reading.whole and is_shard(self._value) and of_this_thread("stateless_scope") is None:
            return self._maybe_autocast(whole(self._value))
        return super().value

    def _direct_assign(self, value: Tensor) -> None:
        self._home.reshard()
        store_whole(self._value, value)

    def numpy(self) -> Array:
        """The whole value. All processes have to ask for it."""
        return cast("Array", keras.ops.convert_to_numpy(whole(self._value)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    @property
    def trainable(self) -> bool:
        """Whether it trains."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        self._home.reshard()
        self._value.requires_grad_(bool(value))

    @property
    def _layout(self) -> Home | None:
        """Asked for by an optimizer that makes a slot for the variable: the slots that it has made are sharded now."""
        frame = sys._getframe(1)
        if frame.f_code is _ADD_SLOT:
            optimizer = frame.f_locals["self"]
            _shard_slots(optimizer)
            if not any(optimizer is other for other in _waiting):
                _waiting.append(optimizer)  # the last slot is made after the last question
        return self._home

    def __reduce__(self) -> tuple[object, ...]:
        raise Unsupported(
            f"The variable {self.path!r} is sharded with FSDP2 and cannot be copied or pickled. Copy the model before "
            "`tether.distribution.fully_shard`, or save it: `tether.files.save_model(model, path)`."
        )


_waiting: list[keras.Optimizer] = []
"""The optimizers that have made slots for sharded variables since they were looked through."""


class _Slot(ShardedVariable):
    """A slot of an optimizer for a sharded variable."""

    @property
    def _layout(self) -> Home:
        return self._home


@functools.cache
def _class_of(kind: type, cls: type) -> type:
    return type(cls.__name__, (kind, cls), {"__module__": cls.__module__})


def is_shard(value: object) -> bool:
    """Whether a tensor is one that several processes hold together."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor. Of a sharded one, all processes have to ask."""
    return value.detach().full_tensor() if is_shard(value) else value


def store_whole(target: Tensor, value: Tensor) -> None:
    """Writes a value into a parameter: of a sharded one, this process's part of it. Nothing is sent."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        if not is_shard(target):
            target.copy_(whole(value))
        elif is_shard(value):
            target.copy_(value.redistribute(target.device_mesh, target.placements))
        else:
            value = value.detach().to(target.dtype)
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))


def local_rows(variable: keras.Variable) -> tuple[int, Tensor | None]:
    """The first of the rows of a sharded variable that this process holds, and these; `None` if it holds no rows."""
    variable._home.reshard()
    value = variable._value.detach()
    *others, last = value.placements
    if not last.is_shard(0) or not all(one.is_replicate() for one in others):
        return 0, None
    part = -(-variable.shape[0] // value.device_mesh.size(-1))
    return min(part * value.device_mesh.get_local_rank(value.device_mesh.ndim - 1), variable.shape[0]), value.to_local()


def is_sharded(variable: keras.Variable) -> bool:
    """Whether the parameter of a variable is a shard between calls."""
    return isinstance(variable, ShardedVariable)


def refuse_sharded(variables: Iterable[keras.Variable]) -> None:
    """Refuses to change what layers compute with once FSDP2 has divided it among groups.

    Raises:
        Unsupported: One of the variables is sharded.
    """
    if not census.LISTS_PARAMETERS:
        return
    found = next((variable for variable in variables if isinstance(variable, ShardedVariable)), None)
    if found is not None:
        raise Unsupported(
            f"The weight {found.path!r} is sharded with FSDP2, which gathers it for the layers that used it then. Tie, "
            "untie, quantise, resize, and add or remove adapters before `tether.distribution.fully_shard(model)`. "
            "Nothing was changed."
        )


def parameter_of(variable: keras.Variable) -> Tensor:
    """The parameter that a variable holds."""
    return variable._value


def make_sharded(variable: keras.Variable, home: Home) -> None:
    """Lets a variable know that its parameter is about to be a shard."""
    cls: Any = type(variable)
    variable.__class__ = _class_of(ShardedVariable, cls)
    variable._home = home


Listing = tuple[keras.Layer, str]
"""A module that lists a parameter, and the key under which it does."""


def listings(variables: Sequence[keras.Variable], model: keras.Layer) -> dict[int, list[Listing]]:
    """Every module that lists the parameter of a variable, by the variable's id: the model's, and those around them.

    Modules of the model that list nothing yet do so now: later they would list what is registered then.
    """
    for layer in contained_layers(model):
        if census.LIST not in layer._modules:
            layer._track_variables()
    return census.listings(variables)


def point(variable: keras.Variable, parameter: Tensor, places: Sequence[Listing]) -> None:
    """Makes a parameter the variable's, in the variable and in the modules that list it."""
    variable._value = parameter
    for module, key in places:
        listed = module._modules[census.LIST]._parameters
        if key in listed:
            listed[key] = parameter


def stray_parameters(layer: keras.Layer) -> list[tuple[str, keras.Variable]]:
    """The parameters that PyTorch has for a layer in the place of one of its variables', and these variables.

    One of another shape or kind is what Keras leaves in a model's list when a layer in it gets other variables.
    """
    if not census.LISTS_PARAMETERS:
        return []
    held = {id(variable._value) for variable in layer.variables}
    named: dict[str, keras.Variable] = {}
    for variable in layer.variables:
        named.setdefault(variable.path, variable)
    listed = layer._modules.get(census.LIST)
    found = []
    for key, parameter in ({} if listed is None else listed._parameters).items():
        present = None if id(parameter) in held else named.get(key)
        if present is not None and present._value is not None and _is_like(parameter, present._value):
            found.append((key, present))
    return found


def _is_like(a: Tensor, b: Tensor) -> bool:
    return bool(a.shape == b.shape and a.is_floating_point() and b.is_floating_point())


def after_backward(function: Callable[[], None]) -> None:
    """Calls a function at the end of the backward pass that runs now, as FSDP2 ends its own part of it."""
    from torch.autograd import Variable

    Variable._execution_engine.queue_callback(function)


def computes(values: object) -> bool:
    """Whether a call with these arguments computes values now, and no shapes or functions of values."""
    if of_this_thread("stateless_scope") is not None or str(of_this_thread("torch_device")) == "meta":
        return False
    return not any(isinstance(value, keras.KerasTensor) for value in keras.tree.flatten(values))


# --------------------------------------------------------------------------- what optimizers keep


def adopt_slots(optimizer: keras.Optimizer) -> None:
    """Shards what an optimizer, built before its model was sharded, keeps for variables that are sharded now."""
    inner = inner_optimizer(optimizer)
    _note_homes(inner)
    _waiting.append(optimizer)
    finish_slots()


def _note_homes(inner: Any) -> None:
    """Says of slots in whole lists, one for each variable, how these are sharded."""
    for slots in slots_by_kind(inner).values():
        for slot, variable in zip(slots, optimized_variables(inner), strict=True):
            plain = isinstance(slot, keras.Variable) and not isinstance(slot, ShardedVariable)
            if plain and isinstance(variable, ShardedVariable) and slot.shape == variable.shape:
                vars(slot)["_layout"] = variable._home


def finish_slots() -> None:
    """Shards what optimizers have made for sharded variables since the last time.

    Raises:
        Unsupported: One of them keeps arrays of other shapes than its variables'.
    """
    while _waiting:
        optimizer = _waiting.pop()
        _shard_slots(optimizer)
        _refuse_others(inner_optimizer(optimizer))


def _shard_slots(optimizer: keras.Optimizer) -> None:
    import torch
    from torch.distributed.tensor import distribute_tensor

    inner = inner_optimizer(optimizer)
    _note_homes(inner)  # slots of Keras before 3.14 do not keep what their variable was asked for
    for slot in inner.variables:
        home = vars(slot).get("_layout")
        if not isinstance(home, Home) or isinstance(slot, ShardedVariable):
            continue
        shard = distribute_tensor(slot._value.detach(), home.mesh, home.placements, src_data_rank=None)
        slot._value = torch.nn.Parameter(shard, requires_grad=False)
        cls: Any = type(slot)
        slot.__class__ = _class_of(_Slot, cls)
        slot._home = Home(home.mesh, home.placements, _stays)


def _refuse_others(optimizer: keras.Optimizer) -> None:
    plain = {tuple(v.shape) for v in optimized_variables(optimizer) if not isinstance(v, ShardedVariable)}
    for slot in optimizer.variables:
        shape = tuple(slot.shape)
        if shape and shape not in plain and not isinstance(slot, ShardedVariable):
            raise Unsupported(
                f"The optimizer {type(optimizer).__name__} keeps {slot.path!r} of shape {shape}, which is not sharded "
                "as one of its variables is. Train a sharded model with an optimizer that keeps arrays of the shapes "
                "of its variables only: SGD, Adam, AdamW, RMSprop, Adagrad, Lion and the like."
            )


def _stays() -> None:
    """A slot is always a shard."""


# --------------------------------------------------------------------------- TensorFlow's strategies
# A variable that is made in the scope of a `MirroredStrategy` has a copy on each replica. One that is made outside has
# none, and an optimizer that meets it in a replica fails in the middle of a step. So whoever makes variables beside
# those of a strategy has to be in its scope.


_HAS_STRATEGIES = _backend.backend() == "tensorflow"


def strategy_of(variable: keras.Variable) -> Any:
    """The strategy in whose scope a variable was made, `None` if in none."""
    return getattr(variable._value, "distribute_strategy", None) if _HAS_STRATEGIES else None


def refuse_outside(layers: Iterable[keras.Layer]) -> None:
    """Refuses to make variables for layers whose others are those of a strategy, outside of its scope.

    Raises:
        Unsupported: That is what would happen.
    """
    if not _HAS_STRATEGIES:
        return
    import tensorflow as tf

    present = tf.distribute.get_strategy()
    for variable in (variable for layer in layers for variable in layer.variables):
        strategy = strategy_of(variable)
        if strategy is not None and strategy is not present:
            raise _outside(variable, strategy)


def refuse_mixed(layers: Iterable[keras.Layer]) -> None:
    """Refuses layers of which some variables were made in the scope of a strategy, and some outside.

    Raises:
        Unsupported: There is such a layer.
    """
    for layer in layers if _HAS_STRATEGIES else ():
        inside = [variable for variable in layer.variables if strategy_of(variable) is not None]
        if inside and len(inside) < len(layer.variables):
            raise _outside(inside[0], strategy_of(inside[0]))


def _outside(variable: keras.Variable, strategy: Any) -> Unsupported:
    return Unsupported(
        f"The weight {variable.path!r} was made in the scope of a `{type(strategy).__name__}`, and what is made beside "
        "it here would have no copy on the replicas. Do it in the scope: `with strategy.scope(): ...`, ties, adapters "
        "and all that makes variables. Nothing was changed."
    )

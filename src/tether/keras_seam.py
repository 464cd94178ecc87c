"""Every private Keras name that Tether relies on, in one place.

Nothing else in Tether may touch `keras.src` or an attribute of Keras that starts with an
underscore. Each function below states the assumption it makes, and `tests/test_keras_seam.py`
checks each one against the oldest and the newest supported Keras.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras
import numpy
from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.backend.common import stateless_scope as _stateless
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope
from keras.src.backend.config import is_nnx_enabled
from keras.src.export import export_utils as _export_utils
from keras.src.layers.layer import Layer as _Layer
from keras.src.layers.normalization.spectral_normalization import SpectralNormalization as _SpectralNormalization
from keras.src.layers.rnn.bidirectional import Bidirectional as _Bidirectional
from keras.src.models import cloning as _cloning
from keras.src.models import functional as _functional
from keras.src.models import model as _model
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.models.sequential import Sequential
from keras.src.quantizers.quantization_config import validate_and_resolve_config as _resolve_quantization
from keras.src.quantizers.utils import should_quantize_layer as _should_quantize_layer
from keras.src.saving import object_registration as _registration
from keras.src.saving import saving_api as _saving_api
from keras.src.saving import saving_lib as _saving_lib
from keras.src.saving import serialization_lib as _serialization
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.trainers.trainer import Trainer as _Trainer
from keras.src.utils import naming as _naming
from keras.src.utils import python_utils as _python_utils

from tether.errors import Unsupported

__all__ = ["AutocastScope", "Functional", "KerasSaveable", "Sequential", "get_autocast_scope", "is_nnx_enabled"]

Variable = _backend.Variable
"""The backend's concrete variable class, the one that `add_weight` creates."""


# --------------------------------------------------------------------------- frames
#
# Keras has no "a copy starts here" hook. The stack says it: every clone and every load runs below
# one outermost Keras call. State that must live exactly as long as that call is kept in the frame's
# own local namespace: it is thread-local, it dies with the call, also when the call fails, and no
# frame is kept alive by it.


def _code(function: Callable[..., Any]) -> CodeType:
    return inspect.unwrap(function).__code__


_COPYING = {
    _code(function)
    for function in (
        _cloning.clone_model,
        _serialization.deserialize_keras_object,
        _saving_api.load_model,
        _saving_lib.load_model,
        _saving_lib._load_model_from_fileobj,
        _saving_lib._load_model_from_dir,
        _functional.functional_from_config,
        _model.model_from_json,
    )
}
_LOADING = {
    _code(function)
    for function in (
        _saving_lib._load_model_from_fileobj,
        _saving_lib._load_model_from_dir,
        _saving_lib.load_weights_only,
        _saving_lib._load_state,
    )
}
_SAVING = {_code(_saving_lib._save_model_to_fileobj), _code(_saving_lib._save_model_to_dir)}
_LOSSES = {_code(_Layer.losses.fget)}
_TRAINABLE_SETTER = _code(_Layer.trainable.fset)
_SPECTRAL_BUILD = _code(_SpectralNormalization.build)
_RESET_METRICS = _code(_Trainer.reset_metrics)
_BIDIRECTIONAL_INIT = _code(_Bidirectional.__init__)


def _make_is_tracing() -> Callable[[], bool]:
    if _backend.backend() != "torch":
        return lambda: False
    import torch

    return torch.compiler.is_compiling


_is_tracing = _make_is_tracing()
"""Whether PyTorch's compiler is reading the code: there are no frames then. JAX and TensorFlow run it."""


def _frames(depth: int = 2) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _first_local(frame: FrameType) -> Any:
    """The first positional argument of a frame: `self` of a method, `cls` of a classmethod."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_copying(frame: FrameType) -> bool:
    if frame.f_code in _COPYING:
        return True
    if frame.f_code.co_name != "from_config":
        return False
    first = _first_local(frame)
    return isinstance(first, type) and issubclass(first, KerasSaveable)


def _outermost(matches: Callable[[FrameType], bool]) -> FrameType | None:
    found = None
    for frame in _frames(3):
        if matches(frame):
            found = frame
    return found


def _namespace(frame: FrameType | None, key: str) -> dict[Any, Any] | None:
    if frame is None:
        return None
    return frame.f_locals.setdefault(key, {})


def copying_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active Keras call that clones or deserialises."""
    return _namespace(_outermost(_is_copying), ".tether.copying")


def loading_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active Keras call that loads weights."""
    return _namespace(_outermost(lambda frame: frame.f_code in _LOADING), ".tether.loading")


def saving_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active write of a `.keras` archive.

    Its key `"root"` holds the model being saved.
    """
    frame = _outermost(lambda frame: frame.f_code in _SAVING)
    namespace = _namespace(frame, ".tether.saving")
    if namespace is not None and frame is not None:
        namespace.setdefault("root", frame.f_locals.get("model"))
    return namespace


def losses_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as one read of the outermost `Layer.losses`."""
    return _namespace(_outermost(lambda frame: frame.f_code in _LOSSES), ".tether.losses")


def set_by_a_container() -> bool:
    """Whether a `trainable` setter runs because Keras recurses from a containing layer."""
    callers = (frame for frame in _frames() if frame.f_code.co_name != "__setattr__")
    return next(itertools.islice(callers, 2, 3)).f_code is _TRAINABLE_SETTER  # after this function and the setter


def inside_bidirectional_init() -> bool:
    """Whether `Bidirectional.__init__` is copying its argument by config."""
    return any(frame.f_code is _BIDIRECTIONAL_INIT for frame in _frames())


def _fitting_trainer() -> Any:
    """The model whose metrics are being reset, when that is why the metrics of a layer below it are read.

    It is the one thing that every backend does at the start of each epoch with every layer of a model.
    """
    if _is_tracing():
        return None
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):  # a plain loop: every weight asks at every step
        if frame is None:
            return None
        if frame.f_code is _RESET_METRICS:
            return _first_local(frame)
        frame = frame.f_back
    return None


def compiled_training() -> Any:
    """Which compiled training function is about to run, if a `fit` is what reads the metrics of all layers."""
    return getattr(_fitting_trainer(), "train_function", None)


def is_unknown_to_the_optimizer(variable: Any) -> bool:
    """Whether a `fit` is about to begin whose optimizer was built without a variable that trains."""
    optimizer = getattr(_fitting_trainer(), "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    if optimizer is None or not optimizer.built:
        return False
    return optimizer._var_key(variable) not in optimizer._trainable_variables_indices


def is_known_to_the_optimizer(variable: Any) -> bool:
    """Whether a `fit` is about to begin whose optimizer was built with a variable."""
    return any(variable is known for known in optimized_variables(getattr(_fitting_trainer(), "optimizer", None)))


def refuse_spectral_normalization(view: Any) -> None:
    """Raises while Keras's SpectralNormalization takes a view: it assigns to it at every training step."""
    for frame in itertools.islice(_frames(), 8):
        if frame.f_code is _SPECTRAL_BUILD:
            raise Unsupported(
                f"SpectralNormalization overwrites what it normalises at every training step, here {view.path}, for "
                "everybody who shares it. Leave the tied layer without the wrapper."
            )


def maker(exclude: Any) -> Any:
    """The outermost Keras object whose `__init__` or `build` is running, if any, other than `exclude`."""
    found = None
    for frame in _frames():
        if frame.f_code.co_name in ("__init__", "build"):
            owner = _first_local(frame)
            if isinstance(owner, KerasSaveable) and owner is not exclude:
                found = owner
    return found


def running_methods(layer: Any) -> Iterator[type]:
    """The classes whose methods are at work on a layer, innermost first."""
    for frame in _frames(1):
        code = frame.f_code
        if code.co_argcount and _first_local(frame) is layer:
            for cls in type(layer).__mro__:
                function = vars(cls).get(code.co_name)
                if inspect.isfunction(function) and _code(function) is code:
                    yield cls
                    break


# --------------------------------------------------------------------------- names and scopes


@contextlib.contextmanager
def outside_name_scopes() -> Iterator[None]:
    """Creates variables at the root of the name scopes, whichever layer is being built."""
    stack = _global_state.get_global_attribute("name_scope_stack")
    _global_state.set_global_attribute("name_scope_stack", [])
    try:
        yield
    finally:
        _global_state.set_global_attribute("name_scope_stack", stack)


@contextlib.contextmanager
def _outside_stateless_scopes() -> Iterator[None]:
    """Allows new variables, which Keras refuses in a stateless scope."""
    scope = _global_state.get_global_attribute("stateless_scope")
    _global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        _global_state.set_global_attribute("stateless_scope", scope)


def name_scope(layer: Any) -> Any:
    """The name scope that `add_weight` opens around a new variable of `layer`."""
    return _backend.name_scope(layer.name, caller=layer)


def current_path() -> str:
    return str(_backend.common.name_scope.current_path())


def set_path(variable: Any, path: str) -> None:
    variable._path = path


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", _naming.to_snake_case(Variable.__name__)}


# --------------------------------------------------------------------------- variables


def raw_value(variable: Any) -> Any:
    """The tensor that a variable holds now, before autocast; `None` if not initialised yet."""
    scope = _stateless.get_stateless_scope()
    if scope is not None:
        value = scope.get_current_value(variable)
        if value is not None:
            return value
    return variable._value


def stored_dtype(variable: Any) -> str:
    """The dtype of what is stored, whatever the autocast scope says."""
    return str(keras.backend.standardize_dtype(variable._dtype))


def _make_plain_tensor() -> Callable[[Any], Any]:
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor
    return lambda value: value


plain_tensor = _make_plain_tensor()
"""A tensor of what a variable's `value` gives: on TensorFlow its own variable, which some of `keras.ops` refuse."""


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


# --------------------------------------------------------------------------- layers


def track(layer: Any, variable: Any) -> None:
    """Adds a stored variable to a layer, built or not."""
    with unlocked(layer):
        layer._track_variable(variable)


def untrack(layer: Any, variable: Any) -> None:
    layer._untrack_variable(variable)


@contextlib.contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Allows a layer that is built to take new sub-layers and variables."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()


def unlock(layer: Any) -> None:
    """Allows a layer in its `build` to take new variables, whatever its parent's build has locked."""
    layer._tracker.unlock()


def is_locked(layer: Any) -> bool:
    """Whether Keras refuses new variables, because the layer is built."""
    return bool(layer._tracker.locked)


STORES = ("trainable_variables", "non_trainable_variables")


def variable_lists(layer: Any) -> dict[str, list[Any]]:
    """The layer's own variables, by the tracker's store: the order in which Keras lists and saves them."""
    return {store: getattr(layer, f"_{store}") for store in STORES}


def counts(layer: Any) -> tuple[int, int, int]:
    """How many variables of each store a layer has, and how many parts that add to them: asked for at every step."""
    return (
        len(layer._trainable_variables),
        len(layer._non_trainable_variables),
        len(layer._layers) + len(layer._seed_generators),
    )


@contextlib.contextmanager
def listed_variables(layer: Any, lists: dict[str, list[Any]]) -> Iterator[None]:
    """Shows other lists of own variables to the layer's save and load methods."""
    before = variable_lists(layer)
    for store, variables in lists.items():
        object.__setattr__(layer, f"_{store}", variables)
    try:
        yield
    finally:
        for store, variables in before.items():
            object.__setattr__(layer, f"_{store}", variables)


def insert_tracked(layer: Any, store: str, index: int, variable: Any) -> None:
    """Tracks a variable at a position of one of the layer's lists."""
    with unlocked(layer):
        layer._tracker.config[store][1].insert(index, variable)
        layer._tracker.stored_ids[store].add(id(variable))
        if _backend.backend() == "torch":
            layer._post_track_variable(variable)


def shield_tracker(layer: Any, ignored: type) -> None:
    """Makes the layer's tracker pass over instances of `ignored`, also inside containers."""
    config = layer._tracker.config
    for store in STORES:
        test, variables = config[store]
        if getattr(test, "ignores", None) is ignored:
            continue

        def shielded(value: Any, test: Callable[[Any], bool] = test) -> bool:
            return not isinstance(value, ignored) and test(value)

        shielded.ignores = ignored  # type: ignore[attr-defined]
        shielded.original = test  # type: ignore[attr-defined]
        config[store] = (shielded, variables)


def unshield_tracker(layer: Any) -> None:
    config = layer._tracker.config
    for store in STORES:
        test, variables = config[store]
        config[store] = (getattr(test, "original", test), variables)


_BOOKKEEPING = {
    "_layers", "_metrics", "_seed_generators", "_trainable_variables", "_non_trainable_variables",
    "_parameters", "_buffers", "_torch_params", "_non_persistent_buffers_set", "_tracked",
    "_operations", "_operations_by_depth", "_nodes", "_nodes_by_depth", "_inbound_nodes", "_outbound_nodes",
    "_losses", "_losses_override", "_loss_ids", "_tracker", "_compiled_trainable_state",
}  # fmt: skip


def attributes(layer: Any) -> list[tuple[str, Any]]:
    """The attributes that the layer's author set, the same on every backend."""
    own = {
        name: value for name, value in vars(layer).items() if name not in _BOOKKEEPING and not name.startswith("_self_")
    }
    own.update(own.pop("_modules", {}))  # PyTorch keeps sub-layers apart
    own.pop("_torch_params", None)
    return list(own.items())


def sublayers(layer: Any) -> list[Any]:
    return list(layer._layers)


def own_trainable_flag(layer: Any) -> bool:
    return bool(layer._trainable)


def set_own_trainable_flag(layer: Any, value: bool) -> None:
    layer._trainable = value


def untrack_layer(layer: Any, sublayer: Any) -> None:
    layer._tracker.untrack(sublayer)


def set_untracked(layer: Any, name: str, value: Any) -> None:
    """Sets an attribute that neither Keras nor the backend must track."""
    object.__setattr__(layer, name, value)


def forget_attribute(layer: Any, name: str) -> None:
    """Removes the backend's own record of an attribute that held a variable (TensorFlow's checkpoints)."""
    if _backend.backend() != "tensorflow":
        return
    with contextlib.suppress(AttributeError, ValueError):
        layer._delete_tracking(name)


def refresh_torch_parameters(layer: Any) -> None:
    """Lets PyTorch's `parameters()` and `state_dict()` see the layer's present variables."""
    if _backend.backend() == "torch" and layer.built:
        layer._track_variables()


def replace_torch_parameters(replaced: list[tuple[Any, list[Any]]]) -> None:
    """Puts the stored variables behind a tie into the parameter lists that hold the variable it replaced.

    Each module of Keras lists the parameters of all layers below it when it is built, and a layer does
    not know the modules around it, so they are found by who refers to the parameter.
    """
    if _backend.backend() != "torch":
        return
    # Two references are the variable's own and the one being passed here: nobody else lists the parameter.
    replaced = [(variable, stored) for variable, stored in replaced if sys.getrefcount(variable._value) > 2]
    if not replaced:
        return
    import gc

    import torch

    successors = {id(variable._value): stored for variable, stored in replaced}
    lists = [
        owner
        for owner in gc.get_referrers(*(variable._value for variable, _ in replaced))
        if isinstance(owner, dict) and any(id(value) in successors for value in owner.values())
    ]
    for owner in gc.get_referrers(*lists) if lists else ():
        module = owner if isinstance(owner, torch.nn.ParameterDict) else None
        attributes = owner if isinstance(owner, dict) else vars(owner) if module is not None else {}
        parameters, keys = attributes.get("_parameters"), attributes.get("_keys")
        if isinstance(parameters, dict) and isinstance(keys, dict):
            for name in [name for name, value in parameters.items() if id(value) in successors]:
                stored = successors[id(parameters.pop(name))]
                keys.pop(name, None)
                parameters.update({variable.path: variable._value for variable in stored})
                keys.update({variable.path: None for variable in stored})


def is_default(method: Any) -> bool:
    return bool(_python_utils.is_default(method))


def mark_like(function: Any, other: Any) -> Any:
    """Keeps Keras's mark of a method that was not overridden (`get_config` made from `__init__`)."""
    if is_default(other):
        _python_utils.default(function)
    return function


def holds_its_layers_configs(model: Any) -> bool:
    """Whether the model's config is made of the configs of its layers, by Keras's own code."""
    cls = type(model)
    if isinstance(model, Sequential):
        return cls.get_config is Sequential.get_config
    if isinstance(model, Functional):
        return cls.get_config is Functional.get_config and functional_like_constructor(cls)
    return False


def is_automatic_layer_name(layer: Any) -> bool:
    """Whether Keras made the layer's name up from its class (`dense`, `dense_3`)."""
    stem = _naming.to_snake_case(type(layer).__name__)
    return layer.name == stem or (layer.name.startswith(f"{stem}_") and layer.name[len(stem) + 1 :].isdigit())


def unique_name(prefix: str) -> str:
    """A layer name that Keras has not given yet: the prefix, or the prefix and a number."""
    return str(_naming.uniquify(prefix))


def contained_layers(layer: Any) -> list[Any]:
    """Every layer below `layer`, itself first, each once."""
    return list(layer._flatten_layers())


# --------------------------------------------------------------------------- what a file holds


def saved_objects(root: Any) -> Iterator[tuple[str, Any]]:
    """Everything that Keras writes of a model, each object once, with its place in the file, as it is written."""
    yield from _saved_below(root, "", set())


def _saved_below(saveable: Any, place: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(saveable) in seen:
        return
    seen.add(id(saveable))
    yield place, saveable
    with _outside_stateless_scopes():  # to see what an optimizer writes, Keras makes one
        children = list(_saving_lib._walk_saveable(saveable))
    for name, child in children:
        inner = f"{place}/{name}" if place else name
        if isinstance(child, KerasSaveable):
            yield from _saved_below(child, inner, seen)
        elif isinstance(child, (list, dict, tuple)):
            yield from _saved_in_container(child, inner, seen, set())


_NESTED = hasattr(_saving_lib, "_container_path_present")
"""Whether this Keras writes what is in a container within a container."""


def _saved_in_container(container: Any, place: str, seen: set[int], containers: set[int]) -> Iterator[tuple[str, Any]]:
    if id(container) in containers:
        return
    containers.add(id(container))
    used: dict[str, int] = {}

    def unique(name: str) -> str:
        used[name] = used.get(name, -1) + 1
        return f"{place}/{name}" + (f"_{used[name]}" if used[name] else "")

    for child in list(container.values()) if isinstance(container, dict) else container:
        if isinstance(child, KerasSaveable):
            yield from _saved_below(child, unique(_naming.to_snake_case(type(child).__name__)), seen)
        elif _NESTED and isinstance(child, (list, dict, tuple)):
            yield from _saved_in_container(child, unique("container"), seen, containers)


def entry_notes(store: Any) -> Any:
    """Where notes go beside what a layer writes: attributes of its HDF5 group, which Keras never reads.

    `None` of a store that has no place for them.
    """
    return getattr(getattr(store, "_h5_entry_group", None), "attrs", None)


class _OpenStore(_saving_lib.H5IOStore):
    """Keras's store, over a file that is open; what was stored from it already is not read again."""

    def __init__(self, file: Any, stored: dict[str, Any]) -> None:
        self._open, self._stored = file, stored
        super().__init__("values", mode="r")

    def _get_h5_file(self, path_or_io: Any, mode: Any = None) -> Any:
        return self._open

    def __getitem__(self, key: str) -> Any:
        variable = self._stored.get(f"{self._h5_entry_path}/vars/{key}" if self._h5_entry_path else f"vars/{key}")
        if variable is None:
            return super().__getitem__(key)
        return on_host(variable._value) if _backend.backend() == "torch" else variable._value


def read_archive(
    archive: Any,
    values: Any,
    first: Callable[[Any], dict[str, Any]],
    *,
    custom_objects: dict[str, Any] | None,
    compile: bool,
    safe_mode: bool,
) -> Any:
    """What `keras.saving.load_model` makes of an archive, without having all values in memory a second time.

    Args:
        archive: The archive, a `zipfile.ZipFile`.
        values: The values in it, an `h5py.File`.
        first: Called with the model before Keras reads values. It may store some itself, and returns their variables
            by their places in the file.
        custom_objects: As in `load_model`.
        compile: As there.
        safe_mode: As there.
    """
    config = archive.read(_saving_lib._CONFIG_FILENAME)
    model = _saving_lib._model_from_config(config, custom_objects, compile, safe_mode)
    store, assets = _OpenStore(values, first(model)), None
    if len(archive.namelist()) > 3:
        assets = _saving_lib.DiskIOStore(_saving_lib._ASSETS_DIRNAME, archive=archive, mode="r")
    failed: set[int] = set()
    errors: dict[int, Any] = {}
    try:
        _saving_lib._load_state(
            model,
            weights_store=store,
            assets_store=assets,
            inner_path="",
            visited_saveables=set(),
            failed_saveables=failed,
            error_msgs=errors,
        )
    finally:
        if assets is not None:
            assets.close()
    if failed:
        _saving_lib._raise_loading_failure(errors)
    return model


_COPYING.add(_code(read_archive))
_LOADING.add(_code(read_archive))


def optimizer_slots(optimizer: Any) -> dict[int, list[tuple[str, Any]]]:
    """What an optimizer keeps for each variable, by the variable's id: the name of the slot, and its variable.

    An optimizer holds a list for each kind of slot, in the order of the variables that it was built with.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    found: dict[int, list[tuple[str, Any]]] = {}
    known = list(getattr(optimizer, "_trainable_variables", None) or ())
    for name, slots in vars(optimizer).items():
        if name in ("_variables", "_trainable_variables") or not isinstance(slots, list) or len(slots) != len(known):
            continue
        for variable, slot in zip(known, slots, strict=True):
            if isinstance(slot, keras.Variable):
                found.setdefault(id(variable), []).append((name.strip("_"), slot))
    for variable in known:
        found.setdefault(id(variable), [])
    return found


# --------------------------------------------------------------------------- one layer in several places


def config_with_ids(model: Any) -> dict[str, Any]:
    """A model's config in which every object has the key `SHARED_ID`, and not just the second mention of one.

    Keras notes an object when it meets it, writes its id from the second time on, and copies the configs of graphs
    and stacks before that time comes. In a second pass it knows all of them.
    """
    with _serialization.ObjectSharingScope():
        _serialization.serialize_keras_object(model)
        return _serialization.serialize_keras_object(model)


SHARED_ID = "shared_object_id"
"""Where a config holds the id of an object that the file has in several places."""


def deserialized(config: dict[str, Any], custom_objects: dict[str, Any]) -> Any:
    """The model of a config that this process wrote, as `load_model` makes it before it reads values."""
    with _serialization.ObjectSharingScope():
        return _serialization.deserialize_keras_object(config, custom_objects, safe_mode=False)


def shared_object(identity: int) -> Any:
    """What was made for an id so far, while a config is read."""
    return _serialization.get_shared_object(identity)


def calls_of(operation: Any) -> int:
    """How many nodes of graphs an operation has: a config counts those of its own graph."""
    return len(operation._inbound_nodes)


def graph_of(model: Any) -> list[tuple[Any, list[Any], list[Any]]]:
    """What a functional model's graph computes, inputs first: what is called, its input and its output tensors."""
    depths = sorted(model._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in model._nodes_by_depth[depth]]
    return [(node.operation, list(node.input_tensors), list(node.outputs)) for node in nodes]


# --------------------------------------------------------------------------- another size


def _make_give_value() -> Callable[[Any, Any], None]:
    name = _backend.backend()
    if name == "torch":
        import torch

        def of_torch(variable: Any, value: Any) -> None:
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

    def of_others(variable: Any, value: Any) -> None:
        tensor = own_copy(keras.ops.convert_to_tensor(value, dtype=variable._dtype))
        if name == "jax":
            variable._shape = tuple(value.shape)
            set_untracked(variable, "_value", tensor)
        else:
            variable._initialize(tensor)
            variable._shape = tuple(value.shape)

    return of_others


give_value = _make_give_value()
"""Gives a variable a value of another shape; it stays the object that layers and optimizers know."""


def recognize_variables(optimizer: Any) -> None:
    """Lets an optimizer know its variables again after `give_value`: TensorFlow's has other names for them then."""
    for each in {id(found): found for found in (optimizer, getattr(optimizer, "inner_optimizer", optimizer))}.values():
        before = {place: key for key, place in (getattr(each, "_trainable_variables_indices", None) or {}).items()}
        if before:
            after = {place: each._var_key(variable) for place, variable in enumerate(each._trainable_variables)}
            excluded = getattr(each, "_exclude_from_weight_decay", None) or set()
            renamed = {after[place] for place, key in before.items() if key in excluded}
            excluded.difference_update(before.values())
            excluded.update(renamed)
            each._trainable_variables_indices = {key: place for place, key in after.items()}


def give_shape(variable: Any, shape: tuple[int, ...]) -> None:
    """Lets a variable without storage know its shape."""
    variable._shape = shape


def build_shapes(layer: Any) -> dict[str, Any] | None:
    """The shapes of the inputs that a layer was built for, which its config holds."""
    return getattr(layer, "_build_shapes_dict", None)


def set_build_shapes(layer: Any, shapes: dict[str, Any] | None) -> None:
    set_untracked(layer, "_build_shapes_dict", shapes)


def infer_graph(model: Any, undo: list[Callable[[], None]]) -> None:
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


def forget_traces(model: Any) -> None:
    """Makes Keras trace a model's training, testing and predicting again; it stays compiled."""
    for layer in contained_layers(model):
        if isinstance(layer, _Trainer):
            for attribute in ("train_function", "test_function", "predict_function"):
                setattr(layer, attribute, None)


# --------------------------------------------------------------------------- what a check looks at


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


# --------------------------------------------------------------------------- one call


def call_owners() -> list[Any]:
    """The objects that live as long as the calls in progress, innermost first: places for values computed once a call.

    A stateless call has its scope, any other the context of its outermost layer. JAX's time loop opens
    a scope of its own inside the call.
    """
    owners = []
    scope = _stateless.get_stateless_scope()
    while scope is not None:
        owners.append(scope)
        scope = getattr(scope, "original_scope", None)
    context = _global_state.get_global_attribute("current_call_ctx")
    if context is not None:
        owners.append(context)
    return owners


def is_training_call() -> bool:
    """Whether the outermost call in progress was told to train."""
    context = _global_state.get_global_attribute("current_call_ctx")
    return bool(context is not None and context.get_value("training"))


def set_mask(tensor: Any, mask: Any) -> None:
    """Hands a mask on with a tensor, as a layer does that computes one in its `call`."""
    _backend.set_keras_mask(tensor, mask)


def refresh_call_signature(layer: Any) -> None:
    """Makes Keras read a layer's `call` again, after its class has changed: it read the signature when it was made."""
    signature = inspect.signature(layer.call)
    names = [parameter.name for parameter in signature.parameters.values()]
    for attribute, value in {
        "_call_signature": signature,
        "call_signature_parameters": names,
        "_call_has_training_arg": "training" in names,
        "_call_has_mask_arg": "mask" in names,
        "_call_has_context_arg": {name: name in names for name in layer._call_context_args},
    }.items():
        set_untracked(layer, attribute, value)


def forget_compilation(model: Any) -> None:
    """Makes Keras ask for `compile` before a model trains on: its optimizer knows other weights than the model has.

    What was traced for predicting is forgotten too.
    """
    if isinstance(model, _Trainer):
        for attribute in ("train_function", "test_function", "predict_function"):
            setattr(model, attribute, None)
        if model.compiled:
            model.compiled = False


def call_parameters(layer: Any) -> list[str]:
    """The names of what a layer's call takes, as Keras knows them."""
    return list(layer.call_signature_parameters)


def trace_token() -> Any:
    """Something equal as long as values may be passed on without crossing a trace of the backend."""
    return _trace_token()


def _make_trace_token() -> Callable[[], Any]:
    name = _backend.backend()
    if name == "jax":
        from jax.extend.core import get_opaque_trace_state

        return lambda: get_opaque_trace_state(convention="flax")
    if name == "tensorflow":
        import tensorflow as tf

        return lambda: None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if name == "torch":
        import torch

        return lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return lambda: None


_trace_token = _make_trace_token()


def _make_mutations() -> Callable[[Any], int]:
    if _backend.backend() == "torch":
        return lambda tensor: tensor._version
    return lambda tensor: 0


mutations = _make_mutations()
"""How often a tensor was changed in place (PyTorch counts; JAX cannot, TensorFlow does not tell)."""


ADDS_IN_PLACE = _backend.backend() == "torch"
"""Whether adding to a tensor in place saves memory traffic: the compilers of the other backends fuse the addition."""


def add_to_fresh(tensor: Any, other: Any) -> Any:
    """`tensor + other`, in place where that saves one: the tensor is a result that nobody else holds."""
    if not ADDS_IN_PLACE or tensor.dtype != other.dtype or tensor.shape[-1:] != other.shape:
        return keras.ops.add(tensor, other)
    if tensor.requires_grad and tensor._is_view():  # the gradient of a view that was written to costs more
        return keras.ops.add(tensor, other)
    return tensor.add_(other)


def _make_is_plain_eager() -> Callable[[], bool]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.eager import record

        return lambda: tf.executing_eagerly() and not record.could_possibly_record()
    if name == "torch":
        import torch

        return lambda: not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return lambda: _stateless.get_stateless_scope() is None


is_plain_eager = _make_is_plain_eager()
"""Whether a value computed now is a plain tensor, through which no gradient flows: one that may be kept.

JAX's gradients see a variable's value only in a stateless scope.
"""


def is_traced(value: Any) -> bool:
    """Whether a tensor stands for one that a compiler will know later."""
    if _backend.backend() == "jax":
        import jax

        return isinstance(value, jax.core.Tracer)
    return False


def _make_is_sparse() -> Callable[[Any], bool]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return lambda value: isinstance(value, (tf.SparseTensor, tf.RaggedTensor))
    if name == "jax":
        from jax.experimental import sparse

        return lambda value: isinstance(value, sparse.JAXSparse)
    return lambda value: False


is_sparse = _make_is_sparse()
"""Whether a tensor is kept as the entries that it has, so that few operations take it."""


def is_differentiated(*values: Any) -> bool:
    """Whether JAX is differentiating with respect to one of these tensors.

    Keras's stateless calls do not tell layers without a `training` argument that they train; the tracer does.
    """
    return TRACES_GRADIENTS and any(type(value).__name__ in _GRADIENT_TRACERS for value in values)


TRACES_GRADIENTS = _backend.backend() == "jax"
_GRADIENT_TRACERS = {"JVPTracer", "LinearizeTracer"}


def _make_snapshot() -> Callable[[Any], Any]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        whole = {1: tf.uint8, 2: tf.uint16}

        def of_tensorflow(value: Any) -> Any:
            # As long as somebody holds what was read, TensorFlow writes to other memory: the address tells.
            read = value.read_value() if hasattr(value, "read_value") else value
            # NumPy lends no memory of dtypes that it does not know itself, such as bfloat16.
            known = numpy.dtype(read.dtype.as_numpy_dtype).isbuiltin == 1
            return read, memoryview(read if known else tf.bitcast(read, whole[read.dtype.size]))

        return of_tensorflow
    if name == "torch":
        return lambda value: (value, value._version)
    return lambda value: (value, 0)


snapshot = _make_snapshot()
"""What a stored value is now, to be compared later; holds on to the memory of JAX's and TensorFlow's tensors."""


def is_same_snapshot(a: Any, b: Any) -> bool:
    """Whether nothing was written between two snapshots of one stored value."""
    if isinstance(a[1], memoryview) and isinstance(b[1], memoryview):
        return _address(a[1]) == _address(b[1])
    return a[0] is b[0] and a[1] == b[1]


def _address(view: memoryview) -> tuple[int, int]:
    array = numpy.asarray(view)
    return array.__array_interface__["data"][0], array.nbytes


def trace(function: Callable[..., Any], *specs: Any) -> Any:
    """Runs a function on inputs that have a shape and no values, as Keras does when it builds a graph."""
    return _backend.compute_output_spec(function, *specs)


# --------------------------------------------------------------------------- quantising
#
# `Model.quantize` goes through a list of all layers and asks each one that has no sub-layers. A tied layer has some,
# its weights, and would be passed over. When the list is made, before any layer is changed, Keras reads the sub-layers
# of each layer, and so of each weight: that is the moment to do the work for tied layers, or to refuse.


quantizers: dict[str, Callable[..., None]] = {}
"""What quantises ties: `"model"`, of a model, mode, config and filters; `"weight"`, of a weight, mode and config."""

_MODEL_QUANTIZE = _code(_model.Model.quantize)
_FLATTEN_LAYERS = _code(_Layer._flatten_layers)


class WatchedSublayers:
    """The list of a layer's sub-layers; who reads it to quantise a whole model is noticed first."""

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if not _is_tracing():
            frame = sys._getframe(1)
            caller = frame.f_back if frame.f_code is _FLATTEN_LAYERS else None
            if caller is not None and caller.f_code is _MODEL_QUANTIZE:
                _notice_quantizing(caller)
        try:
            return vars(layer)["_layers"]
        except KeyError:
            raise AttributeError("_layers") from None

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)["_layers"] = value


def _notice_quantizing(frame: FrameType) -> None:
    scope = _namespace(frame, ".tether.quantizing")
    if scope is not None and not scope:
        scope["begun"] = True
        given = frame.f_locals
        quantizers["model"](given["self"], given["mode"], given["config"], given["filters"])


def is_quantizing_a_model() -> bool:
    """Whether `Model.quantize` is what asks a layer to quantise itself."""
    return any(frame.f_code is _MODEL_QUANTIZE for frame in itertools.islice(_frames(), 4))


def quantization_config(mode: Any, config: Any) -> Any:
    """The config that `quantize(mode, config)` means; its `mode` is one that Keras knows."""
    return _resolve_quantization(mode, config)


def passes(layer: Any, filters: Any) -> bool:
    """Whether the filters of `Model.quantize` let a layer through."""
    return bool(_should_quantize_layer(layer, filters))


def take_over_quantize(layer: Any, function: Callable[..., None]) -> None:
    """Has a function called for `layer.quantize(...)`, with the layer and Keras's own method first.

    Keras gives each layer a `quantize` of its own when it is made, so that one of another class would not be found.
    """
    original = layer.quantize

    @functools.wraps(original)
    def quantize(mode: Any = None, config: Any = None, **kwargs: Any) -> None:
        function(layer, original, mode, config, **kwargs)

    quantize.original = original  # type: ignore[attr-defined]
    set_untracked(layer, "quantize", quantize)


def give_back_quantize(layer: Any) -> None:
    """Undoes `take_over_quantize`."""
    original = getattr(layer.quantize, "original", None)
    if original is not None:
        set_untracked(layer, "quantize", original)


# --------------------------------------------------------------------------- a loss, computed by somebody else than fit


def running_layers() -> Iterator[Any]:
    """The layers whose calls are in progress on this thread, innermost first."""
    for scope in reversed(_global_state.get_global_attribute("name_scope_stack") or ()):
        if isinstance(scope.caller, _Layer):
            yield scope.caller


def has_compiled_loss(model: Any) -> bool:
    """Whether `compile` was given a loss."""
    return getattr(model, "_compile_loss", None) is not None


def training_loss(model: Any, x: Any, y: Any, y_pred: Any) -> Any:
    """The compiled loss and the model's own losses, as a training step adds them up."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, training=True)


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Puts back what a call of a model, and of its compiled loss, changes beside variables.

    A call forgets the losses that layers added in the call before; the compiled loss makes metrics when it first
    sees outputs. Within the scope no layer computes its forward pass again for the gradient either: it would read
    its weights outside of its call then.
    """
    layers = contained_layers(model)
    losses = [(layer, list(layer._losses), set(layer._loss_ids)) for layer in layers]
    rematerialized = [(layer, layer._remat_mode) for layer in layers if layer._remat_mode is not None]
    compiled = getattr(model, "_compile_loss", None)
    for layer, _ in rematerialized:
        set_untracked(layer, "_remat_mode", None)
    if compiled is not None:
        own = type(compiled)(compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names)
        set_untracked(model, "_compile_loss", own)
    try:
        yield
    finally:
        for layer, before, ids in losses:
            layer._losses[:] = before
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)
        for layer, mode in rematerialized:
            set_untracked(layer, "_remat_mode", mode)
        if compiled is not None:
            set_untracked(model, "_compile_loss", compiled)


# --------------------------------------------------------------------------- classes in files


TIED_NAME = "tether>Tied"


def register_tied(cls: type) -> None:
    """Makes Keras write the one name of all tied classes into a config, whichever layer it is."""
    _registration.GLOBAL_CUSTOM_NAMES[cls] = TIED_NAME


def register_reader(reader: Any) -> None:
    """Makes Keras hand every config of a tied layer to `reader.from_config`."""
    _registration.GLOBAL_CUSTOM_OBJECTS[TIED_NAME] = reader


def class_reference(cls: type) -> dict[str, Any]:
    """How Keras names a class in a file."""
    found = _serialization.serialize_with_public_class(cls, {})
    return {key: found[key] for key in ("module", "class_name", "registered_name")}


def find_class(reference: dict[str, Any]) -> Any:
    """The class of a reference, by Keras's own rules of what a file may name."""
    custom = {
        **_global_state.get_global_attribute("custom_objects_scope_dict", {}),
        **_registration.GLOBAL_CUSTOM_OBJECTS,
    }
    return _serialization._retrieve_class_or_fn(
        reference["class_name"],
        reference["registered_name"],
        reference["module"],
        obj_type="class",
        full_config={**reference, "config": {}},
        custom_objects=custom,
    )


def registered_function(name: str) -> Any:
    custom = {
        **_global_state.get_global_attribute("custom_objects_scope_dict", {}),
        **_registration.GLOBAL_CUSTOM_OBJECTS,
    }
    return custom.get(name)


def save_to(model: Any, fileobj: Any) -> None:
    _saving_lib._save_model_to_fileobj(model, fileobj, "h5")


def load_from(fileobj: Any, *, compile: bool) -> Any:
    return _saving_lib._load_model_from_fileobj(fileobj, custom_objects=None, compile=compile, safe_mode=False)


# --------------------------------------------------------------------------- exporting


def input_signature(model: Any) -> list[Any]:
    """The positional arguments of a model's call, as structures of specs, as Keras's exporters read them.

    Raises:
        ValueError: The model has not been called, so nobody knows.
    """
    return list(_export_utils.get_input_signature(model))


def input_spec(tensor: Any) -> Any:
    """The spec of a tensor, a symbolic tensor or a spec."""
    return _export_utils.make_input_spec(tensor)


def store_each_variable_once(archive: Any) -> None:
    """Makes an export archive of the TensorFlow backend write each variable once.

    It lists Keras's variables, and once more the TensorFlow variables inside them; TensorFlow takes them for two.
    """
    if _backend.backend() == "tensorflow":
        for name in ("variables", "trainable_variables", "non_trainable_variables"):
            setattr(archive._tf_trackable, name, [v.value for v in getattr(archive._tf_trackable, name)])


def mend_tf2onnx() -> None:
    """Makes tf2onnx work with the NumPy of today, as Keras does before it calls it."""
    from keras.src.export.tf2onnx_lib import patch_tf2onnx

    patch_tf2onnx()


keras_version: str = keras.__version__

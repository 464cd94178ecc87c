"""Layers: what they list and track, what is below them, and their losses."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import keras
from keras import Layer as _Layer
from keras import Sequential
from keras import backend as _backend

from tether.keras_seam.frames import _frames, _is_tracing, _namespace, code_of
from tether.keras_seam.private import Functional, is_missing, of_this_thread, private, private_method, to_snake_case
from tether.types import Function, Tensor

# --------------------------------------------------------------------------- lists and trackers
# Layers: what they track, hold and list.


flatten_layers = private_method(keras.Layer, "_flatten_layers", "Finding the layers of a model")


def untrack(layer: keras.Layer, variable: keras.Variable) -> None:
    layer._untrack_variable(variable)


def own_tracker(layer: keras.Layer) -> Any:
    """What sorts the variables and layers that are set as attributes; `None` before a layer's constructor has begun."""
    return vars(layer).get("_tracker")


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Allows a layer that is built to take new sub-layers and variables."""
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()


def unlock(layer: keras.Layer) -> None:
    """Allows a layer in its `build` to take new variables, whatever its parent's build has locked."""
    layer._tracker.unlock()


def is_locked(layer: keras.Layer) -> bool:
    """Whether Keras refuses new variables, because the layer is built."""
    return bool(layer._tracker.locked)


STORES = ("trainable_variables", "non_trainable_variables")


def variable_lists(layer: keras.Layer) -> dict[str, list[keras.Variable]]:
    """The layer's own variables, by the tracker's store: the order in which Keras lists and saves them."""
    return {store: getattr(layer, f"_{store}") for store in STORES}


def counts(layer: keras.Layer) -> tuple[int, int, int]:
    """How many variables of each store a layer has, and how many parts that add to them: asked for at every step."""
    return (
        len(layer._trainable_variables),
        len(layer._non_trainable_variables),
        len(layer._layers) + len(layer._seed_generators),
    )


@contextlib.contextmanager
def listed_variables(layer: keras.Layer, lists: dict[str, list[keras.Variable]]) -> Iterator[None]:
    """Shows other lists of own variables to the layer's save and load methods."""
    before = variable_lists(layer)
    for store, variables in lists.items():
        object.__setattr__(layer, f"_{store}", variables)
    try:
        yield
    finally:
        for store, variables in before.items():
            object.__setattr__(layer, f"_{store}", variables)


def insert_tracked(layer: keras.Layer, store: str, index: int, variable: keras.Variable) -> None:
    """Tracks a variable at a position of one of the layer's lists."""
    with unlocked(layer):
        layer._tracker.config[store][1].insert(index, variable)
        layer._tracker.stored_ids[store].add(id(variable))
        if _backend.backend() == "torch":
            layer._post_track_variable(variable)


def shield_tracker(layer: keras.Layer, ignored: type) -> None:
    """Makes the layer's tracker pass over instances of `ignored`, also inside containers."""
    config = layer._tracker.config
    for store in STORES:
        test, variables = config[store]
        if getattr(test, "ignores", None) is ignored:
            continue

        def shielded(value: object, test: Callable[[object], bool] = test) -> bool:
            return not isinstance(value, ignored) and test(value)

        shielded.ignores = ignored  # type: ignore[attr-defined]
        shielded.original = test  # type: ignore[attr-defined]
        config[store] = (shielded, variables)


def unshield_tracker(layer: keras.Layer) -> None:
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


def attributes(layer: keras.Layer) -> list[tuple[str, object]]:
    """The attributes that the layer's author set, the same on every backend."""
    own = {
        name: value for name, value in vars(layer).items() if name not in _BOOKKEEPING and not name.startswith("_self_")
    }
    own.update(own.pop("_modules", {}))  # PyTorch keeps sub-layers apart
    own.pop("_torch_params", None)
    return list(own.items())


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    return list(layer._layers)


def own_trainable_flag(layer: keras.Layer) -> bool:
    return bool(layer._trainable)


def set_own_trainable_flag(layer: keras.Layer, value: bool) -> None:
    object.__setattr__(layer, "_trainable", value)  # a flag is nothing to track, and Keras's look at it takes longer


def untrack_layer(layer: keras.Layer, sublayer: object) -> None:
    layer._tracker.untrack(sublayer)


def set_untracked(holder: object, name: str, value: object) -> None:
    """Sets an attribute that neither Keras nor the backend must track."""
    object.__setattr__(holder, name, value)


def forget_attribute(layer: keras.Layer, name: str) -> None:
    """Removes the backend's own record of an attribute that held a variable (TensorFlow's checkpoints)."""
    if _backend.backend() != "tensorflow":
        return
    with contextlib.suppress(AttributeError, ValueError):
        layer._delete_tracking(name)


def is_default(method: object) -> bool:
    return bool(getattr(method, "_is_default", False))


AnyFunction = TypeVar("AnyFunction", bound=Function)


def mark_like(function: AnyFunction, other: object) -> AnyFunction:
    """Keeps Keras's mark of a method that was not overridden (`get_config` made from `__init__`)."""
    if is_default(other):
        function._is_default = True  # type: ignore[attr-defined]
    return function


def holds_its_layers_configs(model: keras.Model) -> bool:
    """Whether the model's config is made of the configs of its layers, by Keras's own code."""
    cls = type(model)
    if isinstance(model, Sequential):
        return cls.get_config is Sequential.get_config
    if isinstance(model, Functional):
        return cls.get_config is Functional.get_config and _takes_a_graph(cls)
    return False


def _takes_a_graph(cls: type) -> bool:
    """Whether Keras hands inputs and outputs to a class that it makes again, by what the constructor takes."""
    given = inspect.getfullargspec(cls.__init__)  # type: ignore[misc]
    return given.args == inspect.getfullargspec(Functional.__init__).args or bool(given.varargs and given.varkw)


def is_automatic_layer_name(layer: keras.Layer) -> bool:
    """Whether Keras made the layer's name up from its class (`dense`, `dense_3`)."""
    stem = to_snake_case(type(layer).__name__)
    return layer.name == stem or (layer.name.startswith(f"{stem}_") and layer.name[len(stem) + 1 :].isdigit())


def unique_name(prefix: str) -> str:
    """A layer name that Keras has not given yet: the prefix, or the prefix and a number."""
    number = keras.backend.get_uid(prefix) - 1
    return f"{prefix}_{number}" if number else prefix


def contained_layers(layer: keras.Layer) -> list[keras.Layer]:
    """Every layer below `layer`, itself first, each once."""
    return list(flatten_layers(layer))


# --------------------------------------------------------------------------- what Keras looks into
# Models looked at from outside: graphs, attributes, optimizers.


def calls_in_graph(model: keras.Model) -> list[tuple[keras.Operation, tuple[object, ...], dict[str, object]]]:
    """The calls in the graph of a functional or sequential model, inputs first: what is called, and its arguments."""
    graph = model._functional if isinstance(model, Sequential) else model
    if not isinstance(graph, Functional):
        return []
    depths = sorted(graph._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in graph._nodes_by_depth[depth] if not node.is_input]
    return [(node.operation, node.arguments.args, node.arguments.kwargs) for node in nodes]


def graph_outputs(model: keras.Model) -> list[keras.Operation]:
    """What makes each output of a functional or sequential model: a layer or an operation."""
    graph = model._functional if isinstance(model, Sequential) else model
    return [o._keras_history.operation for o in graph.outputs] if isinstance(graph, Functional) else []


_OF_MODELS = {
    "_functional", "optimizer", "loss", "compiled", "history", "stop_training", "stop_evaluating", "stop_predicting",
    "_eval_epoch_iterator", "unrolled_steps_per_execution",
    "_compile_config", "_compile_loss", "_compile_metrics", "_loss_tracker", "_compiled_trainable_state",
    "train_function", "test_function", "predict_function", "steps_per_execution", "_jax_state", "_jax_state_synced",
}  # fmt: skip


def own_attributes(layer: keras.Layer) -> list[tuple[str, object]]:
    """The attributes of a layer that are not those of any layer, or of any model that was compiled."""
    common = _common_attributes()
    return [(name, value) for name, value in attributes(layer) if name not in common]


@functools.cache
def _common_attributes() -> frozenset[str]:
    # The names are given, so that no counter of automatic names goes on.
    return frozenset({*vars(_Layer(name="layer")), *vars(keras.Model(name="model")), *_OF_MODELS})


def inner_optimizer(optimizer: keras.Optimizer) -> keras.Optimizer:
    """The optimizer that a loss scale is around, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimized_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built with, as often as it was given them."""
    return list(getattr(inner_optimizer(optimizer), "_trainable_variables", None) or ())


def slots_by_kind(optimizer: keras.Optimizer) -> dict[str, list[Any]]:
    """What a built optimizer (no loss scale around one) keeps for its variables, by kind: lists in their order."""
    count = len(optimized_variables(optimizer))
    return {
        name: held
        for name, held in vars(optimizer).items()
        if name not in OF_ALL_VARIABLES and is_of_slots(held) and len(held) == count
    }


OF_ALL_VARIABLES = ("_variables", "_trainable_variables")
"""The lists of an optimizer that have no slots, or all of them."""


def is_of_slots(value: object) -> bool:
    """Whether something is a list of slots."""
    return isinstance(value, list) and all(each is None or isinstance(each, keras.Variable) for each in value)


def decay_pattern(optimizer: keras.Optimizer) -> re.Pattern[str] | None:
    """The pattern of names that are excluded from weight decay, if there is one: it is searched for in `name`."""
    return getattr(inner_optimizer(optimizer), "_exclude_from_weight_decay_pattern", None)


def is_excluded_from_decay(optimizer: keras.Optimizer, variable: keras.Variable) -> bool:
    """Whether a variable was itself given as one that does not decay."""
    optimizer = inner_optimizer(optimizer)
    return optimizer._var_key(variable) in (getattr(optimizer, "_exclude_from_weight_decay", None) or ())


# --------------------------------------------------------------------------- losses
# A loss, computed by somebody else than `fit`.


def running_layers() -> Iterator[keras.Layer]:
    """The layers whose calls are in progress on this thread, innermost first."""
    for scope in reversed(of_this_thread("name_scope_stack") or ()):
        if isinstance(scope.caller, _Layer):
            yield scope.caller


def has_compiled_loss(model: keras.Model) -> bool:
    """Whether `compile` was given a loss."""
    return getattr(model, "_compile_loss", None) is not None


def training_loss(model: keras.Model, x: object, y: object, y_pred: object) -> Tensor:
    """The compiled loss and the model's own losses, as a training step adds them up."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, training=True)


@contextlib.contextmanager
def undisturbed(model: keras.Model) -> Iterator[None]:
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


# --------------------------------------------------------------------------- quantising
# Quantising, by Keras and by Tether.


_resolve_quantization = private(
    "keras.src.quantizers.quantization_config.validate_and_resolve_config", "Quantising a tied layer"
)
_should_quantize_layer = private("keras.src.quantizers.utils.should_quantize_layer", "Quantising a model with ties")

# `Model.quantize` goes through a list of all layers and asks each one that has no sub-layers. A tied layer has some,
# its weights, and would be passed over. When the list is made, before any layer is changed, Keras reads the sub-layers
# of each layer, and so of each weight: that is the moment to do the work for tied layers, or to refuse.


quantizers: dict[str, Callable[..., None]] = {}
"""What quantises ties: `"model"`, of a model, mode, config and filters; `"layer"`, of a layer, Keras's own method, mode
and config; `"weight"`, of a weight, mode and config."""

_MODEL_QUANTIZE = code_of(keras.Model.quantize)
_FLATTEN_LAYERS = None if is_missing(flatten_layers) else code_of(flatten_layers)


class WatchedSublayers:
    """The list of a layer's sub-layers; who reads it to quantise a whole model is noticed first."""

    def __get__(self, layer: keras.Layer, owner: type | None = None) -> Any:
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

    def __set__(self, layer: keras.Layer, value: object) -> None:
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


def quantization_config(mode: object, config: object) -> Any:
    """The config that `quantize(mode, config)` means; its `mode` is one that Keras knows."""
    return _resolve_quantization(mode, config)


def passes(layer: keras.Layer, filters: object) -> bool:
    """Whether the filters of `Model.quantize` let a layer through."""
    return bool(_should_quantize_layer(layer, filters))


def take_over_quantize(layer: keras.Layer) -> None:
    """Has what quantises ties called for `layer.quantize(...)`, with the layer and Keras's own method first.

    Keras gives each layer a `quantize` of its own when it is made, so that one of another class would not be found.
    """
    original = layer.quantize

    @functools.wraps(original)
    def quantize(mode: object = None, config: object = None, **kwargs: Any) -> None:
        quantizers["layer"](layer, original, mode, config, **kwargs)

    quantize.original = original  # type: ignore[attr-defined]
    set_untracked(layer, "quantize", quantize)


def give_back_quantize(layer: keras.Layer) -> None:
    """Undoes `take_over_quantize`: the layer has Keras's own method again."""
    original = getattr(layer.quantize, "original", None)
    if original is not None:
        set_untracked(layer, "quantize", original)

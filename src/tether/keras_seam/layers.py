"""Layers: what they track, hold and list."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import Sequential
from keras import backend as _backend

from tether.keras_seam.classes import Functional, to_snake_case
from tether.keras_seam.private import private_method

flatten_layers = private_method(keras.Layer, "_flatten_layers", "Finding the layers of a model")


def untrack(layer: Any, variable: Any) -> None:
    layer._untrack_variable(variable)


def own_tracker(layer: Any) -> Any:
    """What sorts the variables and layers that are set as attributes; `None` before a layer's constructor has begun."""
    return vars(layer).get("_tracker")


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


def is_default(method: Any) -> bool:
    return bool(getattr(method, "_is_default", False))


def mark_like(function: Any, other: Any) -> Any:
    """Keeps Keras's mark of a method that was not overridden (`get_config` made from `__init__`)."""
    if is_default(other):
        function._is_default = True
    return function


def holds_its_layers_configs(model: Any) -> bool:
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


def is_automatic_layer_name(layer: Any) -> bool:
    """Whether Keras made the layer's name up from its class (`dense`, `dense_3`)."""
    stem = to_snake_case(type(layer).__name__)
    return layer.name == stem or (layer.name.startswith(f"{stem}_") and layer.name[len(stem) + 1 :].isdigit())


def unique_name(prefix: str) -> str:
    """A layer name that Keras has not given yet: the prefix, or the prefix and a number."""
    number = keras.backend.get_uid(prefix) - 1
    return f"{prefix}_{number}" if number else prefix


def contained_layers(layer: Any) -> list[Any]:
    """Every layer below `layer`, itself first, each once."""
    return list(flatten_layers(layer))

"""Models looked at from outside: graphs, attributes, optimizers."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import Layer as _Layer
from keras import Sequential

from tether.keras_seam.classes import Functional
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


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that a loss scale is around, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimized_variables(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built with, as often as it was given them."""
    return list(getattr(inner_optimizer(optimizer), "_trainable_variables", None) or ())


def decay_pattern(optimizer: Any) -> Any:
    """The pattern of names that are excluded from weight decay, if there is one: it is searched for in `name`."""
    return getattr(inner_optimizer(optimizer), "_exclude_from_weight_decay_pattern", None)


def is_excluded_from_decay(optimizer: Any, variable: Any) -> bool:
    """Whether a variable was itself given as one that does not decay."""
    optimizer = inner_optimizer(optimizer)
    return optimizer._var_key(variable) in (getattr(optimizer, "_exclude_from_weight_decay", None) or ())


def layout_map() -> Any:
    """The layouts by path of the distribution in force, if it has any."""
    return getattr(keras.distribution.distribution(), "_layout_map", None)

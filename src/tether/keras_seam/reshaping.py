"""Giving a variable another value, or another shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import Sequential
from keras import backend as _backend

from tether.keras_seam.classes import Functional
from tether.keras_seam.layers import set_untracked
from tether.keras_seam.looking import inner_optimizer
from tether.keras_seam.variables import own_copy


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
        before, variable._shape = variable._shape, tuple(value.shape)
        try:
            if name == "jax":
                set_untracked(variable, "_value", tensor)
            else:
                variable._initialize(tensor)
        except BaseException:
            variable._shape = before
            raise

    return of_others


give_value = _make_give_value()
"""Gives a variable a value of another shape; it stays the object that layers and optimizers know."""


def recognize_variables(optimizer: Any) -> None:
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

"""Which part of a gradient came from whom: each reader of a stored variable is handed a tensor of its own.

A weight's gradient is the sum over its uses. In one forward pass every use reads a tensor that equals the weight and
is nobody else's, so one backward pass gives the share of each. A stateless scope hands the tensors out: it is asked
for the value of a variable, knows who asks, and keeps every write away from the model.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tether import keras_seam
from tether.inspection.live import layer_path
from tether.layers.tying.state import WEIGHTS, View, state_of, stored_variables
from tether.weights.expression import Expression, Tensor
from tether.weights.weight import Weight


@dataclass(frozen=True)
class Reader:
    """Who reads a stored variable: a view of it, or a layer that holds it."""

    owner: Any
    where: str
    """The layer and its own name for the weight, or the rest: what reads it and is none of them."""
    expression: str | None = None
    """What a view computes from it."""


ELSEWHERE = Reader(None, "elsewhere")
"""A regularizer of the stored weight, a soft tie, a function that captured the variable."""


def readers(model: Any) -> dict[int, list[Reader]]:
    """The readers of each stored variable of a model, by the variable's id, in the order of its layers."""
    objects = list(keras_seam.saved_objects(model))
    names = {place: saveable.name for place, saveable in objects if isinstance(saveable, keras.layers.Layer)}
    places = {id(saveable): place for place, saveable in objects}
    found: dict[int, dict[int, Reader]] = {}
    for layer in keras_seam.contained_layers(model):
        if isinstance(layer, Weight):
            continue
        place = places.get(id(layer))
        path = layer.name if place is None else layer_path(place, names)
        for variable, owner, name, expression in _reads(layer):
            where = "/".join(part for part in (path, name) if part)
            found.setdefault(id(variable), {}).setdefault(id(owner), Reader(owner, where, expression))
    return {variable: list(of_variable.values()) for variable, of_variable in found.items()}


def _reads(layer: Any) -> Iterator[tuple[Any, Any, str, str | None]]:
    """What one layer reads by itself: the variable, who it is that reads, the layer's name for it, the expression."""
    state = state_of(layer)
    for slot in state.slots if state is not None else ():
        for variable in stored_variables(slot.view):
            yield variable, slot.view, slot.view.use.name, slot.view.expression.notation()
    for variables in keras_seam.variable_lists(layer).values():
        for variable in variables:
            yield variable, layer, variable.name, None
    for name, value in keras_seam.attributes(layer):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in items if name != WEIGHTS else ():
            if isinstance(item, Weight) and item.is_built:
                yield item.variable, layer, name, item.notation()


class _HandedOut(keras.StatelessScope):
    """A scope in which the value of a variable depends on who reads it.

    Args:
        tensors: The tensor for each variable's id and reader's id; the one of the reader `None` is for the others.
    """

    def __init__(self, tensors: Mapping[tuple[int, int | None], Tensor]) -> None:
        super().__init__(collect_losses=True)
        self._tensors = tensors
        self._split = {variable for variable, reader in tensors if reader is not None}
        self._here = threading.local()

    def get_current_value(self, variable: Any) -> Tensor:
        """What was assigned in the scope, or the tensor of the reader at work, or `None`."""
        assigned = super().get_current_value(variable)
        if assigned is not None:
            return assigned
        key = id(variable)
        if key in self._split:
            for reader in self._at_work():
                if (key, id(reader)) in self._tensors:
                    return self._tensors[key, id(reader)]
        return self._tensors.get((key, None))

    def _at_work(self) -> Iterator[Any]:
        view = getattr(self._here, "view", None)
        if view is not None:
            yield view
        yield from keras_seam.running_layers()

    def read(self, view: View, part: Expression, how: Callable[[Expression], Any] | None = None) -> Any:
        """In the place of `View.read`: notes who reads."""
        arguments = (part,) if how is None else (part, how)
        before = getattr(self._here, "view", None)
        self._here.view = view
        try:
            return View.read(view, *arguments)
        finally:
            self._here.view = before

    @contextlib.contextmanager
    def watching(self, views: Sequence[View]) -> Iterator[None]:
        """Lets these views say when they read."""
        for view in views:
            keras_seam.set_untracked(view, "read", functools.partial(self.read, view))
        try:
            yield
        finally:
            for view in views:
                object.__delattr__(view, "read")


@dataclass(frozen=True)
class Shares:
    """The gradient of one stored variable, by who read it; `None` where none came."""

    variable: Any
    readers: tuple[Reader, ...]
    gradients: tuple[Tensor | None, ...]


def shares(model: Any, loss_of: Callable[[], Tensor]) -> tuple[float, list[Shares]]:
    """The value of a loss, and its gradient to each variable of a model that trains, by reader.

    Args:
        model: A layer or model, built.
        loss_of: Computes a scalar by calls of the model.
    """
    known = readers(model)
    keys: list[tuple[int, int | None]] = []
    values: list[Tensor] = []
    asked: list[tuple[Any, list[Reader]]] = []
    for variable in model.trainable_variables:
        found = known.get(id(variable), [])
        split = [*found, ELSEWHERE] if len(found) > 1 else found or [ELSEWHERE]
        asked.append((variable, split))
        for reader in split:
            keys.append((id(variable), id(reader.owner) if len(split) > 1 and reader is not ELSEWHERE else None))
            values.append(keras_seam.raw_value(variable))
    views = [reader.owner for split in known.values() for reader in split if isinstance(reader.owner, View)]
    unique = list({id(view): view for view in views}.values())

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        scope = _HandedOut(dict(zip(keys, tensors, strict=True)))
        with scope, scope.watching(unique):
            return keras.ops.convert_to_tensor(loss_of())

    with keras_seam.undisturbed(model):
        value, gradients = _BACKWARD[keras.backend.backend()](loss, values)
    given = iter(gradients)
    return float(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))), [
        Shares(variable, tuple(split), tuple(next(given) for _ in split)) for variable, split in asked
    ]


# --------------------------------------------------------------------------- one backward pass

Loss = Callable[[Sequence[Tensor]], Tensor]
Result = tuple[Tensor, Sequence[Tensor | None]]


def _jax(loss: Loss, values: list[Tensor]) -> Result:
    import jax

    return jax.value_and_grad(loss)(values)


def _tensorflow(loss: Loss, values: list[Tensor]) -> Result:
    import tensorflow as tf

    tensors = [tf.identity(value) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = loss(tensors)
    found = tape.gradient(value, tensors)
    return value, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]


def _torch(loss: Loss, values: list[Tensor]) -> Result:
    import torch

    tensors = [value.detach().requires_grad_() for value in values]
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    # Dropout without a seed takes its numbers from PyTorch's own generator, which no scope keeps as it is.
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        value = loss(tensors)
    if not value.requires_grad:
        return value, [None] * len(tensors)
    return value.detach(), torch.autograd.grad(value, tensors, allow_unused=True)


_BACKWARD: dict[str, Callable[[Loss, list[Tensor]], Result]] = {
    "jax": _jax,
    "tensorflow": _tensorflow,
    "torch": _torch,
}

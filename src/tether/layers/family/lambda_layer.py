"""A function with weights of its own: the `Lambda` that people write, tracked, trained and saved."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from tether import keras_seam
from tether.errors import TetherError, received
from tether.layers.tying.state import state_of
from tether.layers.tying.tie import tie
from tether.types import Config, Function
from tether.weights.expression import known_shape


@keras.saving.register_keras_serializable(package="tether", name="Lambda")
class Lambda(keras.layers.Layer):
    """A layer that calls `function(inputs, **weights)`.

    What a `keras.layers.Lambda` captures by closure is never tracked, trained or saved. Here it is named.

    Args:
        function: Called with the inputs and, by keyword, the tensor of each weight; also with `training`
            if it has that parameter. To be loaded in Keras's safe mode it must be registered with
            `@keras.saving.register_keras_serializable()`; a Python `lambda` needs `safe_mode=False`.
        weights: Expressions by name, for names that are arguments of a layer.
        name: The layer's name.
        dtype: The layer's dtype policy.
        trainable: Whether gradients flow into the weights through this layer.
        **by_name: Expressions by name.

    Example:
    ```python
    @keras.saving.register_keras_serializable()
    def logits(hidden, table):
        return keras.ops.matmul(hidden, keras.ops.transpose(table))

    outputs = tether.Lambda(logits, table=table)(hidden)
    ```
    """

    def __init__(
        self,
        function: Function,
        weights: Mapping[str, Any] | None = None,
        /,
        *,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        **by_name: Any,
    ) -> None:
        if not callable(function):
            raise TetherError(f"`tether.Lambda` takes a function. {received(function=function)}")
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.function = function
        parameters = inspect.signature(function).parameters
        self._passes_training = "training" in parameters
        self._names: tuple[str, ...] = ()
        given = {**(weights or {}), **by_name}
        if given:
            _check_parameters(function, parameters, given)
            tie(self, given)

    def build(self, input_shape: Any) -> None:
        """Asks for each weight by name, with the shape of its expression."""
        state = state_of(self)
        names = []
        for path, asked in list(state.pending.items()) if state is not None else []:
            (name,) = path
            shape = known_shape(asked.expression)
            view = self.add_weight(name=name, shape=shape, dtype=asked.expression.dtype)
            setattr(self, f"weight_{name}", view)
            names.append(name)
        self._names = tuple(names)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Calls the function with the weights' present tensors."""
        values = {name: keras_seam.plain_tensor(getattr(self, f"weight_{name}").value) for name in self._names}
        if self._passes_training:
            values["training"] = training
        return self.function(inputs, **values)

    def get_config(self) -> Config:
        """The function by its registered name; the weights are in the record of ties."""
        return {**super().get_config(), "function": keras.saving.serialize_keras_object(self.function)}

    @classmethod
    def from_config(cls, config: Config) -> Lambda:
        """Reads what `get_config` wrote. A Python lambda is read only where Keras's safe mode is off."""
        config = dict(config)
        function = keras.saving.deserialize_keras_object(config.pop("function"))
        dtype = config.pop("dtype", None)
        if isinstance(dtype, dict):
            dtype = keras.dtype_policies.deserialize(dtype)
        return cls(function, dtype=dtype, **config)


def _check_parameters(function: Any, parameters: Any, given: Config) -> None:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = [name for name in given if name not in parameters]
    if missing:
        raise TetherError(
            f"The function {getattr(function, '__name__', function)!r} has no parameter {missing[0]!r}. "
            f"It has: {', '.join(parameters)}."
        )

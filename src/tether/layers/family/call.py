"""Calling a layer with weights that were computed: a hypernetwork in one line."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, Unsupported, received
from tether.layers.tying import paths
from tether.layers.tying.fit import given_twice, refuse_layer, refuse_unsupported
from tether.layers.tying.state import View, shape_of, state_of, view_like
from tether.layers.tying.tie import tie
from tether.types import Config, Function, Tensor
from tether.weights.expression import Expression, NoTensor, known_shape
from tether.weights.leaves import Argument, bind
from tether.weights.storage import Use


def call(
    layer: keras.Layer,
    inputs: object,
    weights: Mapping[str, object] | None = None,
    /,
    *,
    training: bool | None = None,
    **by_name: object,
) -> Tensor:
    """Calls a layer with tensors in the place of some of its weights; gradients flow into the tensors.

    A layer that is not built never gets variables for these weights: they are arguments of its call from then on
    (`layer(x, kernel=tensor)`), and it stores nothing for them. A layer that is built keeps its own, which this
    call does not read. Not to be called for one layer from two threads at once.

    Args:
        layer: A Keras layer or model.
        inputs: The layer's inputs; a tuple is passed as several arguments. Symbolic inputs or weights make a
            part of a functional model.
        weights: Tensors by the weight's path, for names that are not identifiers or that this function has.
        training: Passed on, if it is not `None`.
        **by_name: Tensors by the weight's name, each of the weight's shape: one value for the whole batch.

    Returns:
        The layer's outputs.

    Raises:
        ShapeMismatch: A tensor has another shape than the weight.
        UnknownName: A name names no weight, or two.
        TetherError: No weight is given, or one twice.

    Example:
    ```python
    hyper = keras.layers.Dense(8 * 4)
    kernel = keras.ops.reshape(hyper(np.ones((1, 3))), (8, 4))
    y = tether.call(keras.layers.Dense(4), np.ones((2, 8)), kernel=kernel)
    ```
    """
    refuse_layer("call", layer)
    given = {**(weights or {}), **by_name}
    twice = set(weights or {}) & set(by_name)
    if twice or not given:
        raise TetherError(
            given_twice(twice)
            if twice
            else f"`call` needs weights of layer {layer.name!r}, as in `call(layer, x, kernel=tensor)`. Without any, "
            "call the layer itself: `layer(x)`."
        )
    if any(isinstance(leaf, keras.KerasTensor) for leaf in keras.tree.flatten([inputs, list(given.values())])):
        part = WithWeights(layer, list(given))
        return part(list(inputs) if isinstance(inputs, tuple) else inputs, list(given.values()), training=training)
    tensors = {path: keras.ops.convert_to_tensor(value) for path, value in given.items()}
    if not layer.built:
        _by_argument(layer, {path: tuple(tensor.shape) for path, tensor in tensors.items()})
    return _call(layer, inputs if isinstance(inputs, tuple) else (inputs,), tensors, training)


def _call(
    layer: keras.Layer, inputs: tuple[object, ...], tensors: Mapping[str, Tensor], training: bool | None
) -> Tensor:
    keywords = {} if training is None else {"training": training}
    with contextlib.ExitStack() as stack:
        for path, tensor in tensors.items():
            stack.enter_context(_given(layer, path, tensor))
        return layer(*inputs, **keywords)


def _by_argument(layer: keras.Layer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Makes weights of a layer that is not built arguments of its call, unless they are already."""
    state = state_of(layer)
    waiting = {} if state is None else state.pending
    missing = {path: shape for path, shape in shapes.items() if paths.split(path) not in waiting}
    if missing:
        tie(
            layer,
            {path: Argument(path.replace("/", "_"), shape, layer.variable_dtype) for path, shape in missing.items()},
        )


@contextlib.contextmanager
def _given(layer: keras.Layer, path: str, tensor: Tensor) -> Iterator[None]:
    """Lets a weight be a tensor for as long as the block runs."""
    place = paths.locate(layer, paths.split(path))
    state = state_of(place.layer)
    expression: Expression | None = None
    lent: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(place.variable, View):
        expression = place.variable.expression
    elif place.variable is None and state is not None and place.leaf in state.pending:
        expression = state.pending[place.leaf].expression
    if not isinstance(expression, Argument):
        if place.variable is None:
            raise Unsupported(
                f"{place.layer.name!r} is not built, so it cannot be told what its {path!r} is. Build {layer.name!r} "
                "first, by a call on data or `layer.build(input_shape)`."
            )
        refuse_unsupported(place.layer)
        name, dtype = place.leaf_name.replace("/", "_"), keras_seam.stored_dtype(place.variable)
        expression = Argument(name, shape_of(place.variable), dtype)
        lent = _lend(place, expression)
    if tuple(tensor.shape) != expression.shape:
        raise ShapeMismatch(
            f"The weight {path!r} of layer {layer.name!r} has shape {expression.shape}. "
            f"{received(shape=tuple(tensor.shape))}"
        )
    with lent, bind({expression: tensor}):
        yield


@contextlib.contextmanager
def _lend(place: paths.Place, argument: Argument) -> Iterator[None]:
    """Puts a view of an argument wherever the layer holds a variable, and takes it out again."""
    variable = place.variable
    use = Use(name=place.leaf_name, expression=argument, layer=weakref.ref(place.layer))
    view = view_like(variable, use, trainable=True)
    held = paths.holders(place.layer, variable)
    for path in held:
        paths.put_item(place.layer, path, view)
    try:
        yield
    finally:
        for path in held:
            paths.put_item(place.layer, path, variable)


@keras.saving.register_keras_serializable(package="tether", name="WithWeights")
class WithWeights(keras.layers.Layer):
    """A layer with some of its weights as inputs: what `tether.call` is in a functional model.

    Args:
        layer: The layer; one that is built keeps weights of its own, which are not read.
        paths: The weights that are inputs, in the order of the second argument of the call.
        keeps: Whether the layer has weights of its own at these paths. Left out: if it is built.
        **kwargs: As for any layer.
    """

    def __init__(self, layer: keras.Layer, paths: list[str], keeps: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer
        self.weight_paths = list(paths)
        self.keeps = bool(layer.built) if keeps is None else bool(keeps)

    def build(self, inputs_shape: Any, weights_shape: Iterable[Iterable[int]]) -> None:
        """Builds the layer: for weights as arguments, if it has none of its own."""
        if not self.layer.built:
            if not self.keeps:
                _by_argument(self.layer, dict(zip(self.weight_paths, map(tuple, weights_shape), strict=True)))
            several = isinstance(inputs_shape, list)
            self.layer.build(*inputs_shape) if several else self.layer.build(inputs_shape)

    def call(self, inputs: object, weights: Iterable[Tensor], training: bool | None = None) -> Tensor:
        """The layer's outputs with these weights."""
        arguments = tuple(inputs) if isinstance(inputs, list) else (inputs,)
        tensors = dict(zip(self.weight_paths, weights, strict=True))
        takes = "training" in keras_seam.call_parameters(self.layer)
        return _call(self.layer, arguments, tensors, training if takes else None)

    def get_config(self) -> Config:
        """The layer and the paths."""
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "paths": list(self.weight_paths),
            "keeps": self.keeps,
        }

    @classmethod
    def from_config(cls, config: Config) -> WithWeights:
        """Makes the layer again from what `get_config` wrote."""
        config = dict(config)
        layer, names = config.pop("layer", None), config.pop("paths", None)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InvalidConfig(f"The paths of WithWeights are strings. {received(paths=names)}")
        return cls(keras.saving.deserialize_keras_object(layer), list(names), **config)


# --------------------------------------------------------------------------- Lambda
# A function with weights of its own: the `Lambda` that people write, tracked, trained and saved.


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

    table = tether.Weight((100, 16), name="table")
    hidden = keras.Input((16,))
    scorer = keras.Model(hidden, tether.Lambda(logits, table=table)(hidden))
    ```
    """

    def __init__(
        self,
        function: Function,
        weights: Mapping[str, object] | None = None,
        /,
        *,
        name: str | None = None,
        dtype: object = None,
        trainable: bool = True,
        **by_name: object,
    ) -> None:
        asked: object = function
        if not callable(asked) or isinstance(asked, NoTensor):
            raise TetherError(
                "`tether.Lambda` takes a function, and weights by name: `tether.Lambda(lambda x, w: x @ w, w=weight)`. "
                f"{received(function=function)}"
            )
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        self.function = function
        parameters = inspect.signature(function).parameters
        self._passes_training = "training" in parameters
        self._names: tuple[str, ...] = ()
        given = {**(weights or {}), **by_name}
        _check_parameters(function, parameters, given)
        if given:
            tie(self, given)

    def build(self, input_shape: object) -> None:
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
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        needed = [
            p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        missing = [name for name in needed if name not in (*names, "training")]
        if missing:
            raise TetherError(
                f"The function of the tether.Lambda {self.name!r} needs {', '.join(missing)}, and it was given "
                f"{', '.join(names) or 'no weights'}. Name the weights: "
                f"`tether.Lambda(function, {', '.join(f'{name}=...' for name in needed)})`."
            )

    def call(self, inputs: object, training: bool | None = None) -> Tensor:
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


def _check_parameters(function: object, parameters: Mapping[str, inspect.Parameter], given: Iterable[str]) -> None:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = [name for name in given if name not in parameters]
    if missing:
        raise TetherError(
            f"The function {getattr(function, '__name__', function)!r} has no parameter {missing[0]!r}. "
            f"It has: {', '.join(parameters)}."
        )

"""What a layer reaches past Keras's tracker: in closures, defaults, globals, and objects where Keras does not look."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.layers.tying.state import STATE, WEIGHTS, View
from tether.layers.tying.tied import base_class
from tether.weights.expression import Expression
from tether.weights.weight import Weight

MAX_DEPTH, MAX_OBJECTS = 7, 20_000
MAX_ITEMS = 10_000
"""A container of more is a vocabulary."""
LIBRARIES = {"keras", "keras_hub", "tether", "numpy", "jax", "jaxlib", "tensorflow", "torch", "builtins", "functools"}
"""What is defined there keeps state as Keras expects, or not at all: its functions and objects are not looked into."""
_PRIMITIVE = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


@dataclass(frozen=True)
class Found:
    """A variable, an array or a layer that something holds."""

    value: Any
    how: str
    """Where it is held: `the closure of scaled() (w)`."""
    attribute: str
    """The attribute of the holder that leads to it."""


def reached(holder: keras.Operation, known_layers: set[int]) -> Iterator[Found]:
    """The variables and arrays that a layer, or an operation of a graph, holds or captures, and the layers.

    Args:
        holder: The layer or operation.
        known_layers: The ids of layers that may be referred to: Keras finds them in the model.
    """
    walk = _Walk(known_layers)
    if isinstance(holder, keras.layers.Layer):
        attributes = keras_seam.own_attributes(holder)
        methods = [
            vars(cls)["call"] for cls in base_class(type(holder)).__mro__ if _is_own(cls) and "call" in vars(cls)
        ]
    else:
        attributes = [(name, value) for name, value in vars(holder).items() if not name.startswith("_")]
        methods = []
    for name, value in attributes:
        if name not in (STATE, WEIGHTS, "build", "quantize") and not name.endswith("_initializer"):
            yield from walk.into(value, f"the attribute {name}", name, 0)
    for method in methods:
        yield from walk.into(method, "call", "call", 0)


def arguments_of(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[Found]:
    """The variables, arrays and layers among the arguments of a call in a graph."""
    walk = _Walk(set())
    for place, value in [*enumerate(args), *kwargs.items()]:
        name = f"argument {place}" if isinstance(place, int) else f"argument `{place}`"
        yield from walk.into(value, name, name, 0)


class _Walk:
    """Goes through what is held, each object once."""

    def __init__(self, known_layers: set[int]) -> None:
        self._known = known_layers
        self._been: dict[int, object] = {}  # kept alive, so that no id is given twice

    def into(self, value: object, how: str, attribute: str, depth: int) -> Iterator[Found]:
        if isinstance(value, _PRIMITIVE) or id(value) in self._been:
            return
        if depth > MAX_DEPTH or len(self._been) > MAX_OBJECTS:
            return
        self._been[id(value)] = value
        if isinstance(value, (View, keras.KerasTensor)):
            return
        if isinstance(value, (keras.Variable, np.ndarray)) or keras.ops.is_tensor(value):
            yield Found(value, how, attribute)
        elif isinstance(value, keras.layers.Layer) and not isinstance(value, Weight):
            if id(value) not in self._known:
                yield Found(value, how, attribute)
        elif isinstance(value, Expression):
            for weight in value.weights_used():
                if weight.is_built:
                    yield Found(weight.variable, how, attribute)
        else:
            for inner, where in _parts(value, how):
                yield from self.into(inner, where, attribute, depth + 1)


def _parts(value: object, how: str) -> Iterator[tuple[object, str]]:
    """What is in an object, and where."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        if len(value) <= MAX_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((item, f"{how}[{key!r}]") for key, item in items)
    elif isinstance(value, functools.partial):
        yield from ((item, f"{how}, argument {key!r}") for key, item in enumerate(value.args))
        yield from ((item, f"{how}, argument {key!r}") for key, item in value.keywords.items())
        yield value.func, how
    elif isinstance(value, types.MethodType):
        yield value.__self__, f"the object of {how}"
        yield value.__func__, how
    elif isinstance(value, types.FunctionType):
        if _is_own(value):
            yield from _captured(value)
    elif _is_own(type(value)) and not isinstance(value, _PASSED_BY):
        yield from ((item, f"{how}.{name}") for name, item in _fields(value))


_PASSED_BY = (
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.optimizers.Optimizer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.callbacks.Callback,
    keras.random.SeedGenerator,
)
"""What holds values for a purpose that is known: a start, a target, what Keras finds by itself."""


def _is_own(thing: object) -> bool:
    """Whether a class or function is not a library's."""
    return str(getattr(thing, "__module__", None) or "builtins").split(".")[0] not in LIBRARIES


def _fields(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


_IN_GLOBALS = (
    keras.Variable,
    keras.layers.Layer,
    Expression,
    np.ndarray,
    types.FunctionType,
    functools.partial,
    list,
    tuple,
    dict,
)
"""Globals that are looked into. An object that a program keeps for itself is none of a layer's."""


def _captured(function: types.FunctionType) -> Iterator[tuple[object, str]]:
    """What a function takes from outside of its arguments."""
    name = f"{function.__name__}()" if function.__name__ != "<lambda>" else "the lambda"
    for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, f"the closure of {name} ({free})"
        except ValueError:  # not filled yet
            continue
    for place, default in enumerate(function.__defaults__ or ()):
        yield default, f"default {place} of {name}"
    for key, default in (function.__kwdefaults__ or {}).items():
        yield default, f"default {key!r} of {name}"
    for key in _globals_of(function.__code__):
        value = function.__globals__.get(key)
        if isinstance(value, _IN_GLOBALS) or keras.ops.is_tensor(value):
            yield value, f"the global {key} in {name}"


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a code object reads, and those that functions in it read."""
    names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(dict.fromkeys([*names, *(name for part in inner for name in _globals_of(part))]))

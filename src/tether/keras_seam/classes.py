"""Classes of Keras that have no public name, and are found by what has."""

from __future__ import annotations

import re
from typing import Any

import keras

from tether.keras_seam.private import private_method


def _common_base(*classes: type) -> Any:
    """The most special class that all of these derive from."""
    first, *others = classes
    return next(base for base in first.__mro__ if all(issubclass(other, base) for other in others))


KerasSaveable = _common_base(keras.Layer, keras.Metric, keras.Optimizer)
"""What Keras writes to a file and reads from one."""

RandomInitializer = _common_base(keras.initializers.RandomNormal, keras.initializers.RandomUniform)
"""An initializer that draws from a seed."""


Functional: Any = type(keras.Model.__new__(keras.Model, inputs=None, outputs=None))
"""The class of a model that is made of its inputs and outputs. Its constructor, which would count names, is not run."""

unpickle = private_method(KerasSaveable, "_unpickle_model", "Unpickling a tied layer")
"""What makes a model or layer again of the bytes that it is pickled as."""


def to_snake_case(name: str) -> str:
    """A class's name as Keras makes automatic names of it: `dense` of `Dense`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()

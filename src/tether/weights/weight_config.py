"""Reading what a weight is made of: from a caller's arguments, and from a config that a stranger may have written."""

from __future__ import annotations

import json
import math
import types
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, as_dtype, received
from tether.types import Config
from tether.weights.expression import MAX_ELEMENTS, Expression, Shape

ROLES = ("part", "strength", "state", "integers", "scale")
"""What a weight may be for, where it is no weight of its own."""


def check_role(role: Any) -> str | None:
    """A role, or `None`.

    Raises:
        TetherError: It is no role that there is.
    """
    if role is not None and (not isinstance(role, str) or role not in ROLES):
        raise TetherError(f"A weight's role is one of {', '.join(map(repr, ROLES))}, or None. {received(role=role)}")
    return role


def read_start(shape: Any, initializer: Any, dtype: Any) -> tuple[Shape | None, Any, Any]:
    """Tells a shape from an array: returns shape, initializer, start value."""
    for given in (shape, initializer):
        if isinstance(given, keras.Variable):
            raise TetherError(
                f"A Weight cannot be made from a keras.Variable, since two things could be meant. To share the "
                f"variable that a layer has: `tether.weight_of(layer, {given.name!r})`. To start at a copy of its "
                "present value: `tether.Weight(variable.numpy())`."
            )
        if isinstance(given, Expression):
            raise TetherError(
                "A Weight owns storage; an expression does not. Use the expression itself, or copy its value: "
                "`tether.Weight(expression.numpy())`."
            )
    start = None
    if _is_array(shape):
        if initializer is not None:
            raise TetherError("Give an array or an initializer, not both.")
        start, shape = shape, None
    elif _is_array(initializer):
        start, initializer = initializer, None
    if start is not None:
        start = np.array(keras.ops.convert_to_numpy(start) if keras.ops.is_tensor(start) else start)
        if shape is not None and tuple(shape) != start.shape:
            raise ShapeMismatch(
                f"The array has another shape than the weight. {received(shape=shape, array=start.shape)}"
            )
        if start.dtype == np.float64 and dtype is None:
            start = start.astype(keras.config.floatx())
        if start.dtype == np.int64 and dtype is None and np.array_equal(start.astype("int32"), start):
            start = start.astype("int32")
        return None, None, start
    initializer = keras.initializers.get(initializer)
    if dtype is not None and keras_seam.is_random(initializer) and not keras_seam.is_float(as_dtype(dtype)):
        raise TetherError(
            f"{type(initializer).__name__} draws floats, and the weight is to store {as_dtype(dtype)}. Give it its "
            "values, or 'zeros'."
        )
    return None if shape is None else check_shape(shape), initializer, None


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return True
    return isinstance(value, list) and any(isinstance(item, (list, float, np.ndarray)) for item in value)


def check_shape(shape: Any) -> Shape:
    """A tuple of sizes, from an int, a tuple or a list."""
    if isinstance(shape, int) and not isinstance(shape, bool):
        shape = (shape,)
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in shape
    ):
        raise TetherError(f"A shape is a tuple of integers. {received(shape=shape)}")
    if any(n < 0 for n in shape) or math.prod(int(n) for n in shape) > MAX_ELEMENTS or len(shape) > 32:
        raise TetherError(
            f"A shape has sizes of 0 or more, and at most {MAX_ELEMENTS:,} elements. {received(shape=shape)}"
        )
    return tuple(int(n) for n in shape)


def check_config(config: Any) -> dict[str, Any]:
    """A copy of a weight's config, known to be well formed."""
    keys = {"name", "path", "shape", "dtype", "trainable", "initializer", "regularizer", "constraint", "uid", "origin"}
    if not isinstance(config, dict) or set(config) - {"became", "autocast", "role"} != keys:
        raise InvalidConfig(f"A weight's config has the keys {sorted(keys)}. {received(config=config)}")
    config = dict(config)
    if config["shape"] is not None:
        if not isinstance(config["shape"], (list, tuple)):
            raise InvalidConfig(f"A weight's shape is a list of integers. {received(shape=config['shape'])}")
        try:
            config["shape"] = check_shape(config["shape"])
        except TetherError as error:
            raise InvalidConfig(str(error)) from None
    if config["dtype"] is not None:
        config["dtype"] = as_dtype(config["dtype"])
    for key in ("name", "uid", "origin"):
        if not isinstance(config[key], str) or not config[key] or len(config[key]) > 1000:
            raise InvalidConfig(f"A weight's {key} is a string. {received(**{key: config[key]})}")
    if "/" in config["name"] or not isinstance(config["path"], (str, type(None))):
        raise InvalidConfig(f"A weight's name has no '/'. {received(name=config['name'], path=config['path'])}")
    if config["path"] is not None:
        config["path"] = "/".join(filter(None, config["path"].split("/")))
    try:
        check_role(config.get("role"))
    except TetherError as error:
        raise InvalidConfig(str(error)) from None
    for key in ("trainable", "autocast"):
        if not isinstance(config.get(key, True), bool):
            raise InvalidConfig(f"A weight's {key} is a bool. {received(**{key: config[key]})}")
    for key, module, kind in (
        ("initializer", keras.initializers, keras.initializers.Initializer),
        ("regularizer", keras.regularizers, keras.regularizers.Regularizer),
        ("constraint", keras.constraints, keras.constraints.Constraint),
    ):
        try:
            config[key] = None if config[key] is None else module.get(config[key])
        except Exception as error:
            raise InvalidConfig(f"A weight's {key} cannot be read: {error}") from error
        if not isinstance(config[key], (kind, types.FunctionType, type(None))):
            raise InvalidConfig(f"A weight's {key} is a Keras {key}. {received(type=type(config[key]).__name__)}")
    return config


def check_agrees(config: Config, weight: Any) -> None:
    """Refuses a second config of a weight that is unlike what the first one made.

    Args:
        config: A config that `check_config` returned.
        weight: The weight that is known by the same uid.

    Raises:
        InvalidConfig: They differ in what the weight is.
    """
    pairs: dict[str, tuple[Any, Any]] = {
        "shape": (weight.shape, config["shape"]),
        "dtype": (weight.dtype, config["dtype"]),
        "trainable": (weight._trainable_flag, config["trainable"]),
        "regularizer": (_as_text(weight.regularizer), _as_text(config["regularizer"])),
        "constraint": (_as_text(weight.constraint), _as_text(config["constraint"])),
        "role": (weight.role, config.get("role")),
    }
    for key, (known, said) in pairs.items():
        if known != said and not (key in ("shape", "dtype") and None in (known, said)):
            raise InvalidConfig(
                f"What is read has two configs of one weight, {weight.name!r} and {config['name']!r}, which differ in "
                f"{key}: {known} and {said}. Parts of a model that were saved at different times are joined by "
                "`tether.files.retie`, each loaded by itself."
            )


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    said = {"name": getattr(value, "__name__", type(value).__name__)}
    return json.dumps({**said, **(value.get_config() if hasattr(value, "get_config") else {})}, default=repr)

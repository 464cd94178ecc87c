"""Values that a caller or a file gave, made what they have to be."""

from __future__ import annotations

import operator
from typing import Any

import keras

from tether.errors import InvalidConfig, received

NUMERIC = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip
"""Keras's names of the dtypes of real numbers."""


def as_int(value: Any, what: str) -> int:
    """An integer that is no bool."""
    if isinstance(value, bool):
        raise InvalidConfig(f"{what} must be an integer. {received(value=value)}")
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidConfig(f"{what} must be an integer. {received(value=value)}") from None


def as_ints(values: Any, what: str) -> tuple[int, ...]:
    """A tuple of integers, from a list of a file or a tuple of a caller."""
    if not isinstance(values, (list, tuple)):
        raise InvalidConfig(f"{what} must be a list of integers. {received(value=values)}")
    return tuple(as_int(value, what) for value in values)


def as_dtype(value: Any) -> str:
    """Keras's name of a dtype of real numbers."""
    try:
        dtype = None if value is None else str(keras.backend.standardize_dtype(value))
    except (ValueError, TypeError):
        dtype = None
    if dtype not in NUMERIC or dtype is None:
        raise InvalidConfig(f"A dtype is one of {sorted(NUMERIC)}. {received(dtype=value)}")
    return dtype

"""How far apart two values are, and how far they may be."""

from __future__ import annotations

import numpy as np

from tether import keras_seam
from tether.files.entries import Array

_COARSE = 2.0**-7
"""The precision of bfloat16, the coarsest of the floats that weights are stored in."""


def difference_of(a: Array, b: Array) -> float | None:
    """The largest difference of two arrays of one shape, `nan` if one has a NaN where the other has none."""
    if np.array_equal(a, b):
        return None
    wide = "complex128" if a.dtype.kind == "c" else "float64"
    first, second = a.astype(wide), b.astype(wide)
    if np.array_equal(first, second, equal_nan=True):
        return None
    both = np.isnan(first) & np.isnan(second)
    with np.errstate(invalid="ignore"):  # of two infinities
        return float(np.max(np.where(both | (first == second), 0.0, np.abs(first - second))))


def tolerance_of(value: Array) -> float:
    """How far a computed value may be from one that another backend computed."""
    if not keras_seam.is_float(str(value.dtype)):
        return 0.0
    largest = float(np.max(np.abs(value.astype("float64")), initial=0.0))
    return (
        float(np.finfo(np.float32).eps if value.dtype.itemsize > 2 else _COARSE)
        * 8.0
        * max(1.0, largest if np.isfinite(largest) else 1.0)
    )


__all__ = ["difference_of", "tolerance_of"]

"""Whole numbers that are stored in as few bits as they need: what `take` reads the entries of a codebook by."""

from __future__ import annotations

import keras
import numpy as np

from tether.errors import TetherError, received
from tether.types import Array
from tether.weights.expression import Expression, provide
from tether.weights.operators.quantized import Unpack
from tether.weights.weight import Weight


def integers(values: object, *, name: str = "integers") -> Expression:
    """Whole numbers, stored once in as few bits as they need: 4, 8 or 32 bits each. They do not train.

    Args:
        values: An array of whole numbers of any shape: usually the entries that `tether.ops.take` is to read.
        name: The name of the weight that stores them.

    Returns:
        The expression of the numbers, of their shape; its one weight has the role `"integers"`. From 0 to 15 two
        numbers share a byte.

    Raises:
        TetherError: They are no whole numbers, or need more than 32 bits.

    Example:
    ```python
    codebook = tether.Weight((16, 4), "glorot_uniform", name="codebook")
    codes = tether.ops.integers(np.random.randint(0, 16, (32, 8)), name="codes")
    assert codes.shape == (32, 8) and sum(w.numpy().nbytes for w in codes.weights_used()) == 128
    layer = tether.tie(keras.layers.Dense(32), kernel=tether.ops.take(codebook, codes).reshape(32, 32))
    ```
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TetherError(f"Stored numbers of entries are whole. {received(dtype=str(array.dtype))}")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < -(1 << 31) or high >= 1 << 31:
        raise TetherError(f"Stored numbers of entries have at most 32 bits. {received(smallest=low, largest=high)}")
    if low >= 0 and high <= 15 and array.size > 1:
        shifted = keras.ops.convert_to_tensor(array.reshape(-1).astype("int8") - 8, dtype="int8")
        packed, _, _ = keras.quantizers.pack_int4(shifted, axis=0)
        stored = _numbers(np.array(keras.ops.convert_to_numpy(packed)), name)
        found = Unpack(stored, axis=0, size=array.size) + 8
        return found if array.ndim == 1 else found.reshape(*array.shape)
    dtype = next(name for name in ("uint8", "int8", "int16", "int32") if _fits(name, low, high))
    return _numbers(array.astype(dtype), name)


def _fits(dtype: str, low: int, high: int) -> bool:
    limits = np.iinfo(dtype)
    return int(limits.min) <= low and high <= int(limits.max)


def _numbers(array: Array, name: str) -> Weight:
    return Weight(array, dtype=str(array.dtype), trainable=False, name=name, role="integers")


provide(integers=integers)

__all__ = ["integers"]

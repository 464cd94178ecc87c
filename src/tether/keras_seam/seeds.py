"""Random numbers whose state is a variable that something else keeps."""

from __future__ import annotations

import keras
import numpy as np

from tether.types import Tensor

SEED_DTYPE = "uint32"
"""In which a state is stored: what a seed is on every backend, though PyTorch and TensorFlow have it in other types."""


class Seeds(keras.random.SeedGenerator):
    """Draws seeds from a stored state, as Keras's generator does from the variable that it makes for itself.

    Keras's random functions ask a generator for `next()`, and on PyTorch whether it was given a seed (`_initial_seed`):
    without, PyTorch's own generator is faster.

    Args:
        state: A variable of two whole numbers: the seed, and how many were drawn.
        seeded: Whether somebody chose the seed.
    """

    def __init__(self, state: keras.Variable, seeded: bool) -> None:
        self.name = state.name  # without `super`, which would make a variable
        self.state = state
        self._initial_seed = 0 if seeded else None

    def next(self, ordered: bool = True) -> Tensor:
        """The present state as a seed; the state goes on."""
        value = self.state.value
        one = keras.ops.convert_to_tensor(np.array([0, 1]), dtype=self.state.dtype)
        # A copy: what TensorFlow and PyTorch give is what is stored, and a cast to its own dtype is none.
        seed = keras.ops.copy(keras.ops.cast(value, _dtype_of_seeds()))
        self.state.assign(keras.ops.add(value, one))
        return seed


def _dtype_of_seeds() -> str:
    return {"tensorflow": "int64", "torch": "int64"}.get(keras.backend.backend(), SEED_DTYPE)


__all__ = ["SEED_DTYPE", "Seeds"]

"""Where a `.keras` file has each value of a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tether import keras_seam


class _Noted(dict[str, Any]):
    """A store that only notes what would be written."""


def places_of(model: Any, *, of_layers: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of all values that a file of the model has, by their places.

    Args:
        model: A model that is built.
        of_layers: Whether to leave out what training adds: the optimizer's values and those of metrics.
    """
    found: dict[str, tuple[int, ...]] = {}
    for place, saved in keras_seam.saved_objects(model):
        write = getattr(saved, "save_own_variables", None)
        if write is None or (of_layers and not isinstance(saved, keras.layers.Layer)):
            continue
        noted = _Noted()
        write(noted)
        for key, value in noted.items():
            shape = value.shape if hasattr(value, "shape") else np.shape(value)
            found[f"{place}/vars/{key}" if place else f"vars/{key}"] = tuple(int(n) for n in shape)
    return found


__all__ = ["places_of"]

"""The values of a file's weights, read in parts while the file is open."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tether.files.keras.archive import opened_values, reading
from tether.inspection.checking.values import Array, InMemory, Shape, Values
from tether.inspection.facts import Facts


class _Dataset:
    """The values of one dataset of an HDF5 file."""

    def __init__(self, path: Path, dataset: Any, shape: Shape, dtype: str) -> None:
        self.shape = shape
        self._path, self._dataset, self._dtype = path, dataset, dtype

    def at(self, places: tuple[Array, ...]) -> Array:
        """The elements at some places; of the first axis, only the rows that have some are read."""
        rows, inverse = np.unique(places[0], return_inverse=True)
        return np.asarray(self._read(rows)[(inverse, *places[1:])])

    def block(self, parts: tuple[slice, ...]) -> Array:
        """A part."""
        return self._read(parts)

    def _read(self, parts: Any) -> Array:
        with reading(self._path):  # a piece that is packed may be damaged inside
            array = self._dataset[parts]
        known = getattr(ml_dtypes, self._dtype, None)  # HDF5 has no such numbers: Keras writes their bits
        return array.view(known) if known is not None and array.dtype != known else array


@contextlib.contextmanager
def opened(path: Path, facts: Facts) -> Iterator[dict[str, Values]]:
    """The values of a file by their places, as long as the file is open."""
    if path.name.endswith(".safetensors"):
        yield dict(_safetensors(path, facts))
        return
    with opened_values(path) as file:
        yield {weight.place: _Dataset(path, file[weight.place], weight.shape, weight.dtype) for weight in facts.weights}


def _safetensors(path: Path, facts: Facts) -> Iterator[tuple[str, Values]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for weight in facts.weights:
        dtype = np.dtype(getattr(ml_dtypes, weight.dtype, None) or weight.dtype)
        start = 8 + length + header[weight.place]["data_offsets"][0]
        yield weight.place, InMemory(weight.shape, functools.partial(np.memmap, path, dtype, "r", start, weight.shape))

"""Keras's `.npz` weights: for each layer a pickled dict of arrays, read without letting a pickle make anything else."""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from tether.errors import InvalidConfig

Array = np.ndarray[Any, Any]

MAX_EXPANSION, SMALL = 1000, 1 << 28
"""How many times its size in the archive an entry may have, if it has more than this many bytes."""

_HARMLESS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("ml_dtypes", "bfloat16"),
}


class _Arrays(pickle.Unpickler):
    """Makes arrays, dicts and strings, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names, if it is one of the few that arrays need."""
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in _HARMLESS:
            raise InvalidConfig(f"The file holds {module}.{name}, which is no array. It was not made.")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise InvalidConfig("The file holds text that is no array's data.")
    return text.encode("latin1")


def read_npz(archive: zipfile.ZipFile) -> Iterator[tuple[str, dict[str, Array]]]:
    """The arrays of each layer, by the layer's place; a member that is an array itself is one by its name.

    Raises:
        InvalidConfig: A member is something else, or would fill the memory.
    """
    for info in archive.infolist():
        place = info.filename.removesuffix(".npy")
        if info.file_size > max(SMALL, MAX_EXPANSION * info.compress_size):
            raise InvalidConfig(f"{place!r} would have {info.file_size:,} bytes: no weights are compressed as much.")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0", np.lib.format.read_array_header_2_0)
            shape, _, dtype = read(member)
            if dtype.kind != "O" or shape != ():
                raise InvalidConfig(f"{place!r} is an array, and not a layer's: this file was not written by Keras.")
            held = _Arrays(member).load()
        if isinstance(held, np.ndarray) and held.shape == () and held.dtype.kind == "O":
            held = held.item()
        if not isinstance(held, dict) or not all(isinstance(value, np.ndarray) for value in held.values()):
            raise InvalidConfig(f"{place!r} holds no arrays by name.")
        if any(value.dtype.kind == "O" for value in held.values()):
            raise InvalidConfig(f"{place!r} holds something that is no number.")
        yield ("" if place == "__root__" else place), {str(key): value for key, value in held.items()}


__all__ = ["read_npz"]

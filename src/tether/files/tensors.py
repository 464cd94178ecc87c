"""The safetensors format: a header in JSON, then arrays, which are mapped into memory and read as they are used.

The libraries of the format read what is written here. Dtypes that NumPy lacks (bfloat16) are kept as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tether.atomic import written_beside
from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.files.archive import reading
from tether.files.entries import Array, Entry
from tether.weights.constant import numpy_dtype

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of a header, as the format has it."""
MAX_SHARDS = 10_000
_PAGE = mmap.ALLOCATIONGRANULARITY


# --------------------------------------------------------------------------- reading


class TensorFile:
    """A file that is mapped into memory, with its tensors by name."""

    def __init__(self, path: pathlib.Path) -> None:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise InvalidConfig(f"{path.name!r} is shorter than a header. {received(bytes=size)}")
            # A private mapping is one that may be written to: PyTorch takes no other memory without a copy.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._map[:8], "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise InvalidConfig(f"{path.name!r} has no header of safetensors. {received(length=length, bytes=size)}")
        header = json.loads(self._map[8 : 8 + length].decode("utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise InvalidConfig(f"The header of {path.name!r} is a dict. {received(header=header)}")
        self.metadata = _checked_metadata(header.pop("__metadata__", None) or {}, path.name)
        self._start = 8 + length
        self._places: dict[str, tuple[int, int]] = {}
        self._last: tuple[int, int] | None = None
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        end = 0
        for begin, stop in sorted(self._places.values()):
            if begin != end:
                raise InvalidConfig(f"The tensors of {path.name!r} overlap, or leave holes.")
            end = stop
        if end != size - self._start:
            raise InvalidConfig(f"{path.name!r} has another length than its header says.")

    def _entry(self, name: str, value: Any) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise InvalidConfig(f"The tensor {name!r} has dtype, shape and data_offsets. {received(tensor=value)}")
        code, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        if code not in DTYPES:
            raise Unsupported(f"The tensor {name!r} is of a dtype that Keras has not. {received(dtype=code)}")
        if not all(isinstance(n, list) and all(type(m) is int and m >= 0 for m in n) for n in (shape, place)):
            raise InvalidConfig(f"The shape and offsets of {name!r} are lists of integers. {received(tensor=value)}")
        dtype = numpy_dtype(DTYPES[code])
        if len(place) != 2 or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
            raise InvalidConfig(f"The offsets of {name!r} do not fit its shape. {received(tensor=value)}")
        self._places[name] = (place[0], place[1])
        return Entry(name, tuple(shape), DTYPES[code], lambda: self._read(name, tuple(shape), dtype))

    def _read(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array on the mapped memory. What was read before it is given back to the system."""
        begin, stop = self._places[name]
        if self._last is not None and hasattr(self._map, "madvise"):
            first = -(-self._last[0] // _PAGE) * _PAGE
            if self._last[1] > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, (self._last[1] - first) // _PAGE * _PAGE)
        self._last = (self._start + begin, self._start + stop)
        return np.frombuffer(self._map, dtype, math.prod(shape), self._start + begin).reshape(shape)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidConfig("The header has one name twice.")
    return found


def _checked_metadata(metadata: Any, name: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidConfig(f"The metadata of {name!r} are strings by name. {received(metadata=metadata)}")
    return metadata


@contextlib.contextmanager
def opened_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Entry], dict[str, str]]]:
    """The entries and metadata of a `.safetensors` file, or of the shards that a `.safetensors.index.json` names.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, or not what its name says.
    """
    target = pathlib.Path(path)
    if not target.is_file():
        raise TetherError(f"There is no file {str(path)!r}.")
    with reading(target):
        files = [TensorFile(each) for each in _files(target)]
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        twice = set(entries) & set(file.entries)
        if twice:
            raise InvalidConfig(f"Two shards of {target.name!r} have {sorted(twice)[0]!r}.")
        entries.update(file.entries)
        metadata.update(file.metadata)
    yield entries, metadata


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.name.endswith(".safetensors"):
        return [path]
    if not path.name.endswith(".safetensors.index.json"):
        raise Unsupported(
            "Tensors are read from files that end with .safetensors or .safetensors.index.json. "
            f"{received(path=str(path))}"
        )
    names = dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    plain = all(isinstance(name, str) and name == pathlib.PurePosixPath(name).name for name in names)
    if not plain or len(names) > MAX_SHARDS:
        raise InvalidConfig(f"{path.name!r} names shards by their file names, beside it.")
    found = [path.with_name(name) for name in names]
    missing = [each.name for each in found if not each.is_file()]
    if missing:
        raise TetherError(f"The shard {missing[0]!r} of {path.name!r} is not beside it.")
    return found


# --------------------------------------------------------------------------- writing


def write_tensors(path: pathlib.Path, tensors: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Writes tensors, one after another, beside the target, and renames.

    Args:
        path: The target.
        tensors: What is written; each is read when its turn comes.
        metadata: Strings for the header.
    """
    # Wide dtypes come first, so that each array is aligned to its own items.
    ordered = sorted(tensors, key=lambda each: (-numpy_dtype(each.dtype).itemsize, each.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for each in ordered:
        size = math.prod(each.shape) * numpy_dtype(each.dtype).itemsize
        header[each.name] = {
            "dtype": _code(each), "shape": list(each.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for each in ordered:
            array = np.ascontiguousarray(each.read())
            file.write(array.reshape(-1).view("uint8").data if array.size else b"")


def _code(tensor: Entry) -> str:
    if tensor.dtype not in _CODES:
        raise Unsupported(f"{tensor.name!r} is of a dtype that safetensors has not. {received(dtype=tensor.dtype)}")
    return _CODES[tensor.dtype]


__all__ = ["DTYPES", "TensorFile", "opened_tensors", "write_tensors"]

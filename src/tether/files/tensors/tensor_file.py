"""The safetensors format: a header in JSON, then arrays, which are read where they are wanted, when they are.

The libraries of the format read what is written here. Dtypes that NumPy lacks (bfloat16) are kept as they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import InvalidConfig, TetherError, Unsupported, no_file, received
from tether.files.keras.archive import reading
from tether.files.loading.entries import Entry
from tether.files.tensors.slices import SLICES, joined
from tether.types import Array, Config
from tether.weights.leaves import numpy_dtype

# --------------------------------------------------------------------------- the format


DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of a header, as the format has it."""
MAX_SHARDS = 10_000
_PART, _PIECE = 1 << 20, 1 << 12
"""Bytes that are read at once where only pieces of them are wanted, and of a piece that is worth a call of its own."""


# --------------------------------------------------------------------------- reading


class TensorFile:
    """A file that is open for reading, with its tensors by name."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self._file, self._name = file, name
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise InvalidConfig(
                f"{name!r} is not what its name says: it is shorter than a header. {received(bytes=size)}"
            )
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise InvalidConfig(
                f"{name!r} is not what its name says: it has no header. {received(length=length, bytes=size)}"
            )
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise InvalidConfig(f"The header of {name!r} is a dict. {received(header=header)}")
        self.metadata = _checked_metadata(header.pop("__metadata__", None) or {}, name)
        self._start = 8 + length
        self._places: dict[str, tuple[int, int]] = {}
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        end = 0
        for begin, stop in sorted(self._places.values()):
            if begin != end:
                raise InvalidConfig(f"The tensors of {name!r} overlap, or leave holes.")
            end = stop
        if end != size - self._start:
            raise InvalidConfig(f"{name!r} has another length than its header says.")

    def _entry(self, name: str, value: object) -> Entry:
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
        return self._readable(name, tuple(shape), DTYPES[code], dtype)

    def _readable(self, name: str, shape: tuple[int, ...], called: str, dtype: np.dtype[Any]) -> Entry:
        start = self._start + self._places[name][0]

        def rows(array: Array, first: int | tuple[int, ...]) -> None:
            place = (first, *(0 for _ in shape[1:])) if isinstance(first, int) else first
            self._fill_part(array, place, shape, start)

        def read() -> Array:
            array = np.empty(shape, dtype)
            rows(array, 0)
            return array

        return Entry(name, shape, called, read, rows)

    def _fill_part(self, array: Array, place: tuple[int, ...], shape: tuple[int, ...], start: int) -> None:
        """Reads what begins at a place of a tensor, and no more of it than that, but where that is in tiny pieces.

        Args:
            array: What is filled, contiguous, with as many axes as the tensor.
            place: Where it begins, on each axis of the tensor.
            shape: The tensor's shape.
            start: Where the tensor begins in the file.
        """
        cut = max((axis for axis, n in enumerate(shape) if array.shape[axis] != n), default=0)
        strides = [math.prod(shape[axis + 1 :]) * array.itemsize for axis in range(len(shape))]
        at = start + sum(stride * n for stride, n in zip(strides, place, strict=False))
        piece = math.prod(array.shape[cut:]) * array.itemsize
        if cut == 0 or not array.size:  # all of it lies together
            self._file.seek(at)
            self._fill(array)
        elif piece >= _PIECE:
            for index in np.ndindex(array.shape[:cut]):
                self._file.seek(at + sum(stride * n for stride, n in zip(strides, index, strict=False)))
                self._fill(array[index])
        else:  # whole rows are read, a few at a time, and the pieces are taken from them
            row, begin = strides[cut - 1], place[cut]
            at -= begin * strides[cut]
            count = min(array.shape[cut - 1], max(1, _PART // row))
            buffer = np.empty((count, *shape[cut:]), array.dtype)
            for index in np.ndindex(array.shape[: cut - 1]):
                above = at + sum(stride * n for stride, n in zip(strides, index, strict=False))
                for first in range(0, array.shape[cut - 1], count):
                    part = buffer[: array.shape[cut - 1] - first]
                    self._file.seek(above + first * row)
                    self._fill(part)
                    array[index][first : first + len(part)] = part[:, begin : begin + array.shape[cut]]

    def _fill(self, array: Array) -> None:
        if not array.size:
            return
        left = array.reshape(-1).view("uint8").data
        while left:
            count = self._file.readinto(left)
            if not count:
                raise InvalidConfig(f"{self._name!r} ends earlier than it did when it was opened.")
            left = left[count:]


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidConfig("The header has one name twice.")
    return found


def _checked_metadata(metadata: object, name: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidConfig(f"The metadata of {name!r} are strings by name. {received(metadata=metadata)}")
    return metadata


INDEX = ".safetensors.index.json"
"""How the name of a file ends that says which tensors are in which of several files beside it."""


def tensors_in(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file that a path means: itself, or in a folder the index of its files, or the one file of tensors in it.

    Raises:
        TetherError: There is none, or the folder has several.
    """
    target = pathlib.Path(path)
    if target.is_dir():
        names = sorted(each.name for each in target.iterdir() if not each.name.startswith("."))
        found = [n for n in names if n.endswith(INDEX)] or [n for n in names if n.endswith(".safetensors")]
        if len(found) > 1:
            raise TetherError(f"The folder {str(path)!r} has several files of tensors: name one. {received(has=found)}")
        if found:
            return target / found[0]
    if not target.is_file():
        raise TetherError(no_file(path))
    return target


@contextlib.contextmanager
def opened_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Entry], dict[str, str]]]:
    """The entries and metadata of a `.safetensors` file, or of the files that a `.safetensors.index.json` names.

    A tensor of which several files have slices is one entry. A folder with one such index, or one such file, will do.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, or not what its name says.
    """
    target = tensors_in(path)
    with contextlib.ExitStack() as stack:
        with reading(target):
            paths = _files(target)
            files = [TensorFile(stack.enter_context(open(each, "rb", buffering=0)), each.name) for each in paths]
        yield _together(files, target.name)


def _together(files: Sequence[TensorFile], name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for file in files:
        twice = set(entries) & set(file.entries)
        if twice:
            raise InvalidConfig(f"Two shards of {name!r} have {sorted(twice)[0]!r}.")
        entries.update(file.entries)
        notes += [file.metadata[key] for key in file.metadata if key == SLICES]
        metadata.update({key: value for key, value in file.metadata.items() if key != SLICES})
    return joined(entries, notes, name), metadata


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.name.endswith(".safetensors"):
        return [path]
    if not path.name.endswith(INDEX):
        raise Unsupported(
            f"Tensors are read from files that end with .safetensors or {INDEX}. {received(path=str(path))}"
        )
    return files_of(path)


def files_of(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index names, each once.

    Raises:
        InvalidConfig: It names what is elsewhere.
        TetherError: One of them is not there.
    """
    names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    plain = all(isinstance(name, str) and name == pathlib.PurePosixPath(name).name for name in names)
    if not plain or len(names) > MAX_SHARDS:
        raise InvalidConfig(f"{index.name!r} names shards by their file names, beside it.")
    found = [index.with_name(name) for name in names]
    missing = [each.name for each in found if not each.is_file()]
    if missing:
        raise TetherError(f"The shard {missing[0]!r} of {index.name!r} is not beside it.")
    return found


# --------------------------------------------------------------------------- writing


def write_tensors(
    path: pathlib.Path, tensors: Sequence[Entry], metadata: Mapping[str, str], *, own: bool = False
) -> None:
    """Writes tensors, one after another, beside the target, and renames.

    Args:
        path: The target.
        tensors: What is written; each is read when its turn comes.
        metadata: Strings for the header.
        own: Whether the file is this process's own. Else, of several processes that do this in step, the first one
            writes, and all read each tensor in its turn: what lies on several processes is gathered then.
    """
    # Wide dtypes come first, so that each array is aligned to its own items.
    ordered = sorted(tensors, key=lambda each: (-numpy_dtype(each.dtype).itemsize, each.name))
    header: Config = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for each in ordered:
        size = math.prod(each.shape) * numpy_dtype(each.dtype).itemsize
        header[each.name] = {
            "dtype": _code(each), "shape": list(each.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if not own and keras_seam.place_in_step()[0]:
        for each in ordered:
            each.read()
        return
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for each in ordered:
            array = np.ascontiguousarray(each.read())
            if (str(array.dtype), array.size) != (each.dtype, math.prod(each.shape)):
                raise TetherError(
                    f"{each.name!r} became something else while the file was written: the header says {each.dtype} of "
                    f"shape {each.shape}. {received(dtype=str(array.dtype), shape=array.shape)}"
                )
            file.write(array.reshape(-1).view("uint8").data if array.size else b"")


def _code(tensor: Entry) -> str:
    if tensor.dtype not in _CODES:
        raise Unsupported(f"{tensor.name!r} is of a dtype that safetensors has not. {received(dtype=tensor.dtype)}")
    return _CODES[tensor.dtype]


__all__ = ["DTYPES", "INDEX", "TensorFile", "files_of", "opened_tensors", "tensors_in", "write_tensors"]

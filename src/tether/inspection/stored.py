"""The facts of a file, read without making the model: `.keras`, `.weights.h5`, `.safetensors`. No value is read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.inspection.facts import Facts, Shape, StoredWeight, UseOf
from tether.inspection.stored_config import stored_layers
from tether.inspection.stored_layers import stored_facts
from tether.inspection.stored_values import NOTE, Values, noted_ties
from tether.weights.codec import decode
from tether.weights.expression import known_shape
from tether.weights.identity import sharing
from tether.weights.weight import Weight

CONFIG, VALUES = "config.json", "model.weights.h5"
MAX_CONFIG = 256 * 2**20
"""Bytes of a config; those of the largest models that people make have a few megabytes."""
MAX_EXPANSION, SMALL = 100, 2**28
"""How many times its size in the archive a part of one may have, if it is larger than this many bytes."""


def file_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts of a file.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidConfig: It is broken, or not what its name says.
        Unsupported: It is of another kind.
    """
    path = Path(path)
    reader = next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if reader is None or not path.is_file():
        raise Unsupported(
            f"Facts are read from files that end with {', '.join(_READERS)}. {received(path=str(path))} "
            "Load the model and pass that."
        )
    try:
        return reader(path)
    except (TetherError, PermissionError):
        raise
    except Exception as error:  # a stranger's file may make zipfile, h5py and safetensors fail in any way
        raise InvalidConfig(f"{str(path)!r} is broken, or not what its name says: {error}") from error


# --------------------------------------------------------------------------- Keras


def _weights_facts(path: Path) -> Facts:
    with h5py.File(path, "r") as file:
        return stored_facts(path.name, Values(file), {}, {})


def _archive_facts(path: Path) -> Facts:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        config = _config(archive, path.name)
        if VALUES not in archive.namelist():
            raise Unsupported(f"{path.name!r} has no {VALUES}. Load the model and pass that.")
        with _opened(archive, file) as source, h5py.File(source, "r") as opened:
            values = Values(opened)
    with sharing() as known:
        layers = stored_layers(config, values)
        return stored_facts(str(config["config"].get("name", path.stem)), values, layers, known)


def _config(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    if CONFIG not in archive.namelist():
        raise InvalidConfig(f"{name!r} has no {CONFIG}, so it is no file of a Keras model.")
    if archive.getinfo(CONFIG).file_size > MAX_CONFIG:
        raise InvalidConfig(f"The config in {name!r} is larger than {MAX_CONFIG} bytes.")
    config = json.loads(archive.read(CONFIG))
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise InvalidConfig(f"The config in {name!r} is not that of a Keras object. {received(config=config)}")
    return config


@contextlib.contextmanager
def _opened(archive: zipfile.ZipFile, file: BinaryIO) -> Iterator[Any]:
    """The values, as something that HDF5 reads: where they lie in the archive, or a copy if they are compressed."""
    info = archive.getinfo(VALUES)
    if info.compress_type == zipfile.ZIP_STORED:
        yield io.BufferedReader(_Part(file, info))
        return
    if info.file_size > max(SMALL, MAX_EXPANSION * info.compress_size):
        raise InvalidConfig(
            f"{VALUES} would have {info.file_size:,} bytes, from {info.compress_size:,} in the archive: no weights are "
            "compressed as much."
        )
    with tempfile.TemporaryFile() as copy, archive.open(info) as source:
        shutil.copyfileobj(source, copy, 2**16)
        copy.seek(0)
        yield copy


@contextlib.contextmanager
def opened_values(path: Path) -> Iterator[h5py.File]:
    """The values in a `.keras` or `.weights.h5` file, for reading."""
    if path.name.endswith(".weights.h5"):
        with h5py.File(path, "r") as values:
            yield values
        return
    with (
        open(path, "rb") as file,
        zipfile.ZipFile(file) as archive,
        _opened(archive, file) as source,
        h5py.File(source, "r") as values,
    ):
        yield values


class _Part(io.RawIOBase):
    """A file that is stored in an archive as it is."""

    def __init__(self, file: BinaryIO, info: zipfile.ZipInfo) -> None:
        file.seek(info.header_offset)
        header = struct.unpack("<4s22x2H", file.read(30))
        if header[0] != b"PK\003\004":
            raise zipfile.BadZipFile(f"{info.filename} is not where the archive says")
        self._file, self._size, self._at = file, info.file_size, 0
        self._start = info.header_offset + 30 + header[1] + header[2]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(min(len(buffer), self._size - self._at), 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# --------------------------------------------------------------------------- safetensors

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _safetensors_facts(path: Path) -> Facts:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        weights = tuple(
            StoredWeight(key, tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()], path=key)
            for key, tensor in tensors.items()
        )
        note = (file.metadata() or {}).get(NOTE)
    ties = {} if note is None else _ties_over({weight.place: weight for weight in weights}, note, path.name)
    taken = {place for use in ties.values() for place in use.weights}
    own = (_named_use(w.place, (w.place,), w.shape, w.dtype, note is not None) for w in weights if w.place not in taken)
    uses = (*ties.values(), *own)
    layers = dict.fromkeys(use.layer for use in uses)
    # A shared tensor has the name of a layer that reads it, or another; the note does not say which.
    return Facts(path.name, weights, uses, layers=tuple((layer, None) for layer in layers), ties=False)


def _ties_over(weights: dict[str, StoredWeight], note: str, name: str) -> dict[str, UseOf]:
    """What Tether's note in the header says: which tensor is which weight, and what layers read over them."""
    ties = noted_ties(note, name)
    named = json.loads(note).get("weights")
    if not isinstance(named, dict) or not all(isinstance(key, str) and key in weights for key in named.values()):
        raise InvalidConfig(f"The note in {name!r} names tensors that the file has. {received(weights=named)}")
    with sharing():
        known = {uid: Weight(weights[key].shape, dtype=weights[key].dtype, name=key) for uid, key in named.items()}
    places = {known[uid]: key for uid, key in named.items()}
    found = {}
    for where, tie in ties.items():
        expression = decode(tie["steps"], known)
        reads = tuple(places[weight] for weight in expression.weights_used())
        use = _named_use(where, reads, known_shape(expression), tie["dtype"], True)
        found[where] = replace(use, expression=expression.notation(), tied=True)
    return found


def _named_use(name: str, weights: tuple[str, ...], shape: Shape, dtype: str, ours: bool) -> UseOf:
    """The use of a tensor by its name; Tether has put dots where paths of layers have slashes."""
    layer, _, attribute = name.rpartition(".")
    return UseOf(layer.replace(".", "/") if ours else layer, attribute, None, weights, shape, dtype)


_READERS = {".keras": _archive_facts, ".weights.h5": _weights_facts, ".safetensors": _safetensors_facts}

__all__ = ["file_facts", "opened_values"]

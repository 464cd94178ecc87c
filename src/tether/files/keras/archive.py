"""Files of strangers, read within bounds: HDF5, NumPy's and `.keras` archives, and where in them a layer is."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import math
import os
import pathlib
import pickle
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import h5py
import keras
import numpy as np

from tether import keras_seam
from tether.errors import NUMERIC, InvalidConfig, TetherError, Unsupported, no_file, received
from tether.types import Array, Config
from tether.weights.leaves import numpy_dtype

# --------------------------------------------------------------------------- HDF5
# An HDF5 file that a stranger may have written, walked in bounded time: each place once, and nothing outside of it.
#
# HDF5 is a graph and not a tree. A group may hold what it is in, two names in each of forty groups lead to a trillion
# places, and a name may point to another file. Keras writes a tree, so what is none is refused. Every reader of HDF5
# goes through `objects` before anything else looks at the file, Keras included.


MAX_OBJECTS, MAX_DEPTH, MAX_PLACE, MAX_PLACES = 120_000, 500, 4096, 2**26
"""How many groups and datasets, how deep, and how many characters in one place and in all together: more than ten times
what the largest models have, and no more than what HDF5 opens while somebody waits."""
SMALL, MAX_EXPANSION = 2**28, 100
"""What unpacks to more than this many bytes may have at most this many times its size in the file."""


def objects(
    file: h5py.File, size: int, *, expansion: int = MAX_EXPANSION
) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """The groups and datasets of a file with their places, a group before what is in it; the file itself is at `""`.

    Args:
        file: An open `h5py.File`.
        size: The bytes that the file has on the disk.
        expansion: How many times that its values may have, if they are many bytes.

    Raises:
        InvalidConfig: It is no tree, it leads to other files, something in it holds no numbers, or it is larger, deeper
            or would unpack to more than a file of weights.
    """
    groups = {h5py.h5o.get_info(file.id).addr}
    count = characters = total = 0
    yield "", file
    waiting = [("", file.id, _links(file.id, "", MAX_OBJECTS))]
    while waiting:
        above, parent, links = waiting[-1]
        if not links:
            waiting.pop()
            continue
        name, address = links.pop()
        place = f"{above}/{_text(name)}" if above else _text(name)
        count, characters = count + 1, characters + len(place)
        if count + len(links) > MAX_OBJECTS or len(waiting) > MAX_DEPTH:
            raise InvalidConfig(
                f"A file of weights has at most {MAX_OBJECTS:,} groups and values, in {MAX_DEPTH} levels. "
                + received(place=place)
            )
        if len(place) > MAX_PLACE or characters > MAX_PLACES:
            raise InvalidConfig(f"The names in the file are longer than those of any layer. {received(place=place)}")
        found = h5py.h5o.open(parent, name)
        if isinstance(found, h5py.h5g.GroupID):
            if address in groups:
                raise InvalidConfig(f"{place!r} is a group that the file has in another place too, or is in itself.")
            groups.add(address)
            yield place, h5py.Group(found)
            waiting.append((place, found, _links(found, place, MAX_OBJECTS - count)))
        elif isinstance(found, h5py.h5d.DatasetID):
            dataset = h5py.Dataset(found)
            total += _bytes(dataset, place)
            refuse_bomb(place, total, size, expansion)
            yield place, dataset
        else:
            raise InvalidConfig(f"{place!r} is neither a group nor values.")


def _links(group: h5py.Group, place: str, most: int) -> list[tuple[bytes, int]]:
    """The names in a group, the first one last, with the addresses of what they name; one too many if it has more."""
    found: list[tuple[bytes, int]] = []
    elsewhere: list[bytes] = []

    def note(name: bytes, link: h5py.h5l.LinkInfo) -> bool | None:  # called from C, where nothing may be raised
        if link.type != h5py.h5l.TYPE_HARD:
            elsewhere.append(name)
        found.append((name, link.u))
        return True if elsewhere or len(found) > most else None

    group.links.iterate(note, info=True)
    if elsewhere:
        inner = f"{place}/{_text(elsewhere[0])}" if place else _text(elsewhere[0])
        raise InvalidConfig(f"{inner!r} is a link to somewhere else, which is not followed.")
    found.reverse()
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(dataset: h5py.Dataset, place: str) -> int:
    """How many bytes a dataset's values take in memory."""
    stored = dataset.dtype
    if dataset.external or dataset.is_virtual:
        raise InvalidConfig(f"{place!r} is kept in another file, which is not followed.")
    if stored.kind not in "biufcV" or stored.fields is not None or stored.subdtype is not None:
        raise InvalidConfig(f"{place!r} in the file holds no numbers. {received(dtype=str(stored))}")
    if dataset.shape is None:
        raise InvalidConfig(f"{place!r} in the file holds nothing.")
    return math.prod(dataset.shape) * int(stored.itemsize)


def dtype_of(dataset: h5py.Dataset) -> str:
    """Keras's name of a dataset's dtype.

    HDF5 knows no bfloat16 and no float8. Keras writes their bytes, and beside those of bfloat16 what they are. Bytes of
    which it says nothing are of the one float8 that NumPy gives to HDF5.

    Raises:
        InvalidConfig: They are something else.
    """
    stored, said = dataset.dtype, dataset.attrs.get("dtype")
    if said is None:
        said = ("float8_e4m3fn" if stored.itemsize == 1 else None) if is_bytes(dataset) else stored.name
    fits = isinstance(said, str) and said in _NUMBERS
    if not fits or (is_bytes(dataset) and numpy_dtype(said).itemsize != stored.itemsize):
        raise InvalidConfig(f"{dataset.name[1:]!r} holds no numbers. {received(dtype=said or str(stored))}")
    return str(said)


_NUMBERS = NUMERIC | {"complex64", "complex128"}


def is_bytes(dataset: h5py.Dataset) -> bool:
    """Whether a dataset is of a dtype that HDF5 does not know."""
    return bool(dataset.dtype.kind == "V")


def refuse_bomb(what: str, unpacked: int, size: int, expansion: int = MAX_EXPANSION) -> None:
    """Refuses what would take far more memory than it has bytes in a file."""
    if unpacked > max(SMALL, expansion * size):
        raise InvalidConfig(f"{what!r} would unpack to {unpacked:,} bytes, from {size:,}: no model is packed as much.")


# --------------------------------------------------------------------------- NumPy files
# Keras's `.npz` weights: for each layer a pickled dict of arrays, read without letting a pickle make anything else.


NPZ_EXPANSION = 1000
"""How many times its size in a file of NumPy's an entry may have, if it is not small."""

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

    def find_class(self, module: str, name: str) -> object:
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
        refuse_bomb(place, info.file_size, info.compress_size, NPZ_EXPANSION)
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


# --------------------------------------------------------------------------- `.keras` archives
# A `.keras` archive, looked at before anything in it is believed.
#
# What is in it is listed, and no value is read. A stranger may have written it, so what it says about itself is held
# against the file's own size first.


CONFIG, VALUES, METADATA = "config.json", "model.weights.h5", "metadata.json"
MAX_METADATA = 2**16
MAX_CONFIG, SMALL_CONFIG = 2**28, 2**24
"""Bytes of a config. Those of the largest models have a few megabytes, and more if ties hold arrays; packed ones less,
since a text of brackets packs well and takes twenty times its size when it is read."""
_ENCRYPTED = 1


@dataclass(frozen=True)
class Contents:
    """What an archive says that it holds."""

    config: Config
    values: dict[str, tuple[int, ...]]
    """The shapes of the stored values, by their places in the file."""
    written_by: str | None = None
    """The version of Keras that wrote it, if it says so."""

    @property
    def elements(self) -> int:
        """How many numbers are stored."""
        return sum(math.prod(shape) for shape in self.values.values())


def contents(path: str | os.PathLike[str], *, whole: bool = False) -> Contents:
    """What a `.keras` file holds.

    Args:
        path: The file.
        whole: Whether to read all of it and hold it against the checksums in it.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, it is no model's, or it would unpack to far more than it is.
    """
    source = pathlib.Path(path)
    if not source.is_file():
        raise TetherError(no_file(path))
    with reading(source), opened_archive(source, whole=whole) as archive, archive.values() as values:
        return Contents(archive.config(), _shapes(values, source.stat().st_size), archive.written_by())


@contextlib.contextmanager
def reading(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns whatever fails while the bytes of a stranger's file are read into one error.

    Nothing belongs inside that runs code of Keras's layers, of a backend or of a user: what fails there is no damage,
    see `tether.files.keras.load`.
    """
    try:
        yield
    except (TetherError, PermissionError):
        raise
    except Exception as error:  # zipfile, h5py and json may fail in any way
        raise damaged(path, error) from error


def damaged(path: os.PathLike[str] | str, error: BaseException) -> TetherError:
    """What to raise for an error of what reads bytes: that the file is damaged, unless the system is what failed."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM):
        return TetherError(f"{str(path)!r} could not be read: {str(error) or 'there is not enough memory.'}")
    return InvalidConfig(f"{str(path)!r} is damaged, or not what its name says: {error}")


_OF_THE_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE}


def _check_entries(archive: zipfile.ZipFile, path: pathlib.Path) -> None:
    size = path.stat().st_size
    names: set[str] = set()
    for info in archive.infolist():
        parts = info.filename.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or ":" in parts[0] or "\0" in info.orig_filename:
            raise InvalidConfig(f"An entry of {path.name!r} would be put elsewhere. {received(name=info.filename)}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InvalidConfig(f"An entry of {path.name!r} is a link. {received(name=info.filename)}")
        if info.filename in names:
            raise InvalidConfig(f"{path.name!r} has two entries of one name. {received(name=info.filename)}")
        names.add(info.filename)
        if info.flag_bits & _ENCRYPTED:
            raise InvalidConfig(f"An entry of {path.name!r} is encrypted. {received(name=info.filename)}")
        if info.header_offset + info.compress_size > size:
            raise InvalidConfig(f"{path.name!r} ends before its entry {info.filename!r} does.")
    refuse_bomb(path.name, sum(info.file_size for info in archive.infolist()), size)


@dataclass(frozen=True)
class Archive:
    """An archive that is open, and whose entries are known to be harmless."""

    path: pathlib.Path
    zip: zipfile.ZipFile
    _file: BinaryIO

    def __contains__(self, name: str) -> bool:
        return name in self.zip.namelist()

    def config(self) -> Config:
        """What the config says.

        Raises:
            InvalidConfig: There is none, or it is not that of a Keras object.
        """
        if CONFIG not in self:
            raise InvalidConfig(f"{self.path.name!r} has no {CONFIG}, so it is no file of a Keras model.")
        info = self.zip.getinfo(CONFIG)
        limit = MAX_CONFIG
        if info.compress_type != zipfile.ZIP_STORED:
            limit = min(limit, max(SMALL_CONFIG, MAX_EXPANSION * info.compress_size))
        if info.file_size > limit:
            raise InvalidConfig(f"The config in {self.path.name!r} is larger than {limit:,} bytes.")
        config = json.loads(self.zip.read(CONFIG))
        if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
            raise InvalidConfig(
                f"The config in {self.path.name!r} is not that of a Keras object. {received(config=config)}"
            )
        return config

    def written_by(self) -> str | None:
        """The version of Keras that wrote the archive, if it says so."""
        if METADATA not in self or self.zip.getinfo(METADATA).file_size > MAX_METADATA:
            return None
        try:
            said = json.loads(self.zip.read(METADATA))
        except (ValueError, RecursionError):  # nothing is made of it
            return None
        version = said.get("keras_version") if isinstance(said, dict) else None
        return version[:40] if isinstance(version, str) else None

    @contextlib.contextmanager
    def entry(self, name: str) -> Iterator[IO[bytes]]:
        """An entry as a file: where it lies in the archive, or a copy if it is compressed."""
        info = self.zip.getinfo(name)
        if info.compress_type == zipfile.ZIP_STORED:
            yield io.BufferedReader(_Part(self._file, info))
            return
        with tempfile.TemporaryFile() as unpacked, self.zip.open(info) as source:
            shutil.copyfileobj(source, unpacked, 2**16)
            unpacked.seek(0)
            yield unpacked

    @contextlib.contextmanager
    def values(self) -> Iterator[h5py.File]:
        """The values.

        Raises:
            Unsupported: They are not in HDF5.
        """
        if VALUES not in self:
            raise Unsupported(f"{str(self.path)!r} holds no {VALUES}; its values are of another format.")
        with self.entry(VALUES) as source, h5py.File(source, "r") as values:
            yield values


@contextlib.contextmanager
def opened_archive(path: str | os.PathLike[str], *, whole: bool = False) -> Iterator[Archive]:
    """A `.keras` file, for reading.

    Args:
        path: The file.
        whole: Whether to read all of it first and hold it against the checksums in it.

    Raises:
        InvalidConfig: It is damaged, an entry would be put elsewhere, or it would unpack to far more than it is.
    """
    source = pathlib.Path(path)
    if source.suffix in (".h5", ".hdf5"):
        raise InvalidConfig(
            f"{str(path)!r} is no '.keras' file. If it holds weights: `model.load_weights(path)`, or "
            "`tether.files.load_untied(model, path)` for those of an untied model; if it is a whole model of an "
            "earlier Keras: `keras.saving.load_model(path)`."
        )
    with open(source, "rb") as file, zipfile.ZipFile(file) as archive:
        _check_entries(archive, source)
        damaged = archive.testzip() if whole else None
        if damaged is not None:
            raise InvalidConfig(f"{damaged!r} in {str(source)!r} is damaged: it has another checksum than it says.")
        yield Archive(source, archive, file)


def _shapes(file: h5py.File, size: int) -> dict[str, tuple[int, ...]]:
    return {
        place: tuple(int(n) for n in item.shape)
        for place, item in objects(file, size)
        if isinstance(item, h5py.Dataset)
    }


@contextlib.contextmanager
def opened_values(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """The values in a `.keras` or `.weights.h5` file, for reading."""
    if str(path).endswith(".weights.h5"):
        with h5py.File(path, "r") as values:
            yield values
        return
    with opened_archive(path) as archive, archive.values() as values:
        yield values


class _Part(io.RawIOBase):
    """An entry that is stored in an archive as it is."""

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
        count = self._file.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def with_config(source: pathlib.Path, target: pathlib.Path, config: Config) -> None:
    """Copies an archive and gives it another config."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if info.filename == CONFIG:
                new.writestr(info, json.dumps(config))
                continue
            with old.open(info) as read, new.open(info, "w") as written:
                shutil.copyfileobj(read, written, 2**20)


# --------------------------------------------------------------------------- where a layer is in a file
# Where a `.keras` file has each value of a model.


def places_of(model: keras.Model, *, of_layers: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of all values that a file of the model has, by their places.

    Args:
        model: A model that is built.
        of_layers: Whether to leave out what training adds: the optimizer's values and those of metrics.
    """
    found: dict[str, tuple[int, ...]] = {}
    for place, saved in keras_seam.saved_objects(model):
        if not hasattr(saved, "save_own_variables") or (of_layers and not isinstance(saved, keras.layers.Layer)):
            continue
        for key, value in keras_seam.own_values(saved).items():
            shape = value.shape if hasattr(value, "shape") else np.shape(value)
            found[f"{place}/vars/{key}" if place else f"vars/{key}"] = tuple(int(n) for n in shape)
    return found


__all__ = [
    "MAX_EXPANSION",
    "SMALL",
    "Archive",
    "Contents",
    "contents",
    "damaged",
    "dtype_of",
    "is_bytes",
    "objects",
    "opened_archive",
    "opened_values",
    "places_of",
    "read_npz",
    "reading",
    "refuse_bomb",
    "with_config",
]

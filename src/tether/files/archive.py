"""A `.keras` archive, looked at before anything in it is believed.

What is in it is listed, and no value is read. A stranger may have written it, so what it says about itself is held
against the file's own size first.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import h5py

from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.files.hdf5 import MAX_EXPANSION, objects, refuse_bomb

CONFIG, VALUES, METADATA = "config.json", "model.weights.h5", "metadata.json"
MAX_METADATA = 2**16
MAX_CONFIG, SMALL_CONFIG = 2**28, 2**24
"""Bytes of a config. Those of the largest models have a few megabytes, and more if ties hold arrays; packed ones less,
since a text of brackets packs well and takes twenty times its size when it is read."""
_ENCRYPTED = 1


@dataclass(frozen=True)
class Contents:
    """What an archive says that it holds."""

    config: dict[str, Any]
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
        raise TetherError(f"There is no file {str(path)!r}.")
    with reading(source), opened_archive(source, whole=whole) as archive, archive.values() as values:
        return Contents(archive.config(), _shapes(values, source.stat().st_size), archive.written_by())


@contextlib.contextmanager
def reading(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns whatever fails while the bytes of a stranger's file are read into one error.

    Nothing belongs inside that runs code of Keras's layers, of a backend or of a user: what fails there is no damage,
    see `tether.files.making`.
    """
    try:
        yield
    except (TetherError, PermissionError):
        raise
    except Exception as error:  # zipfile, h5py and json may fail in any way
        raise damaged(path, error) from error


def damaged(path: os.PathLike[str] | str, error: Exception) -> TetherError:
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

    def config(self) -> dict[str, Any]:
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
    def entry(self, name: str) -> Iterator[Any]:
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


def with_config(source: pathlib.Path, target: pathlib.Path, config: dict[str, Any]) -> None:
    """Copies an archive and gives it another config."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if info.filename == CONFIG:
                new.writestr(info, json.dumps(config))
                continue
            with old.open(info) as read, new.open(info, "w") as written:
                shutil.copyfileobj(read, written, 2**20)


__all__ = [
    "Archive", "Contents", "contents", "damaged", "opened_archive", "opened_values", "reading", "with_config",
]  # fmt: skip

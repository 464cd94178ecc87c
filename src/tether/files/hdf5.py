"""An HDF5 file that a stranger may have written, walked in bounded time: each place once, and nothing outside of it.

HDF5 is a graph and not a tree. A group may hold what it is in, two names in each of forty groups lead to a trillion
places, and a name may point to another file. Keras writes a tree, so what is none is refused. Every reader of HDF5 goes
through `objects` before anything else looks at the file, Keras included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import h5py

from tether.errors import NUMERIC, InvalidConfig, received
from tether.weights.leaves import numpy_dtype

MAX_OBJECTS, MAX_DEPTH, MAX_PLACE, MAX_PLACES = 120_000, 500, 4096, 2**26
"""How many groups and datasets, how deep, and how many characters in one place and in all together: more than ten times
what the largest models have, and no more than what HDF5 opens while somebody waits."""
SMALL, MAX_EXPANSION = 2**28, 100
"""What unpacks to more than this many bytes may have at most this many times its size in the file."""


def objects(file: Any, size: int, *, expansion: int = MAX_EXPANSION) -> Iterator[tuple[str, Any]]:
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


def _links(group: Any, place: str, most: int) -> list[tuple[bytes, int]]:
    """The names in a group, the first one last, with the addresses of what they name; one too many if it has more."""
    found: list[tuple[bytes, int]] = []
    elsewhere: list[bytes] = []

    def note(name: bytes, link: Any) -> bool | None:  # called from C, where nothing may be raised
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


def _bytes(dataset: Any, place: str) -> int:
    """How many bytes a dataset's values take in memory."""
    stored = dataset.dtype
    if dataset.external or dataset.is_virtual:
        raise InvalidConfig(f"{place!r} is kept in another file, which is not followed.")
    if stored.kind not in "biufcV" or stored.fields is not None or stored.subdtype is not None:
        raise InvalidConfig(f"{place!r} in the file holds no numbers. {received(dtype=str(stored))}")
    if dataset.shape is None:
        raise InvalidConfig(f"{place!r} in the file holds nothing.")
    return math.prod(dataset.shape) * int(stored.itemsize)


def dtype_of(dataset: Any) -> str:
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


def is_bytes(dataset: Any) -> bool:
    """Whether a dataset is of a dtype that HDF5 does not know."""
    return bool(dataset.dtype.kind == "V")


def refuse_bomb(what: str, unpacked: int, size: int, expansion: int = MAX_EXPANSION) -> None:
    """Refuses what would take far more memory than it has bytes in a file."""
    if unpacked > max(SMALL, expansion * size):
        raise InvalidConfig(f"{what!r} would unpack to {unpacked:,} bytes, from {size:,}: no model is packed as much.")


__all__ = ["MAX_EXPANSION", "SMALL", "dtype_of", "is_bytes", "objects", "refuse_bomb"]

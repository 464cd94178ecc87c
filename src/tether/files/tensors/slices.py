"""Tensors of which several files have a slice each: what the files say of them, and the whole tensors again.

A process that writes only what lies on its own devices gives a slice the name of its tensor with the bounds as NumPy
has them, `table[0:8, 4:8]`, and says under `tether.slices` in the metadata of the file's header what that is:

    {"version": 1, "slices": {"table[0:8, 4:8]": {"of": "table", "shape": [16, 8], "start": [0, 4]}}}

To any reader of safetensors a slice is a tensor like others. Here it is a part of a tensor of the shape that is said,
which the slices in all files fill like a grid, without holes and each place once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, TetherError, received
from tether.files.loading.entries import Entry, entry_of
from tether.types import Array, Tensor
from tether.weights.leaves import numpy_dtype

SLICES = "tether.slices"
"""The key of a header's metadata under which it says which of the file's tensors are slices."""
MAX_SLICES = 1 << 26
"""Characters of what it says."""

Bounds = tuple[tuple[int, int], ...]
"""Where a slice begins and ends, on each axis."""


@dataclass(frozen=True)
class Slice:
    """What a file says of a tensor that is a slice of another one."""

    of: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    start: tuple[int, ...]


# --------------------------------------------------------------------------- what a process owns


def owned(variable: keras.Variable, name: str) -> tuple[list[Entry], dict[str, Slice]]:
    """What this process writes of a variable: all of it, slices of it, or nothing.

    Each part is written by one process, though several may have a copy of it: the one whose device JAX calls the first
    replica. What does not lie on several processes is written by process 0.

    Args:
        variable: A stored variable.
        name: What it is called in the file.

    Returns:
        The entries, and of those that are slices what the file has to say.
    """
    value = keras_seam.raw_value(variable)
    if not keras_seam.spans_processes(value):
        return ([entry_of(variable, name)] if keras_seam.place_in_step()[0] == 0 else []), {}
    entries, slices = [], {}
    shape = tuple(int(n) for n in variable.shape)
    for bounds, part in _own_parts(value, shape):
        whole = all(bound == (0, n) for bound, n in zip(bounds, shape, strict=True))
        called = name if whole else f"{name}[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
        size = tuple(stop - start for start, stop in bounds)
        entries.append(Entry(called, size, keras_seam.held_dtype(variable), _reader(part)))
        if not whole:
            slices[called] = Slice(name, shape, tuple(start for start, _ in bounds))
    return entries, slices


def _own_parts(value: Tensor, shape: tuple[int, ...]) -> Iterable[tuple[Bounds, Tensor]]:
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield tuple(each.indices(n)[:2] for each, n in zip(shard.index, shape, strict=True)), shard.data


def _reader(part: Tensor) -> Callable[[], Array]:
    return lambda: keras_seam.on_host(part)


def noted(slices: Mapping[str, Slice]) -> str:
    """What a header says of the slices in its file."""
    said = {name: {"of": each.of, "shape": each.shape, "start": each.start} for name, each in slices.items()}
    return json.dumps({"version": 1, "slices": said}, separators=(",", ":"))


# --------------------------------------------------------------------------- whole tensors again


def joined(entries: dict[str, Entry], notes: Iterable[str], name: str) -> dict[str, Entry]:
    """The tensors of some files, with those in slices as one each.

    Args:
        entries: All tensors of the files.
        notes: What the files say of slices.
        name: The file that was asked for, for messages.

    Raises:
        InvalidConfig: The slices are not what `owned` gives.
        TetherError: Some of them are in other files.
    """
    found: dict[str, dict[str, Slice]] = {}
    for note in notes:
        for piece, each in _read(note, entries, name).items():
            found.setdefault(each.of, {})[piece] = each
    whole = dict(entries)
    for of, pieces in found.items():
        if of in entries:
            raise InvalidConfig(f"{name!r} has {of!r} whole, and in slices.")
        for piece in pieces:
            del whole[piece]
        whole[of] = _whole(of, [(each, entries[piece]) for piece, each in pieces.items()], name)
    return whole


def _read(note: str, entries: Mapping[str, Entry], name: str) -> dict[str, Slice]:
    try:
        said = json.loads(note) if len(note) <= MAX_SLICES else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidConfig(f"What {name!r} says of its slices cannot be read: {error}") from error
    slices = said.get("slices") if isinstance(said, dict) and said.get("version") == 1 else None
    if not isinstance(slices, dict):
        raise InvalidConfig(f"What {name!r} says of its slices has version 1, and slices by name.")
    return {piece: _slice(piece, each, entries, name) for piece, each in slices.items()}


def _slice(piece: str, said: Any, entries: Mapping[str, Entry], name: str) -> Slice:
    axes = len(entries[piece].shape) if piece in entries else None
    fits = isinstance(said, dict) and set(said) == {"of", "shape", "start"} and isinstance(said["of"], str)
    fits = fits and _are_sizes(said["shape"]) and _are_sizes(said["start"])
    if not fits or not len(said["shape"]) == len(said["start"]) == axes:
        raise InvalidConfig(f"{name!r} says of the slice {piece!r} what it cannot be. {received(slice=said)}")
    return Slice(said["of"], tuple(said["shape"]), tuple(said["start"]))


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _whole(of: str, pieces: list[tuple[Slice, Entry]], name: str) -> Entry:
    """A tensor of its slices; these lie like a grid, so that each place is in one of them."""
    shape, dtype = pieces[0][0].shape, pieces[0][1].dtype
    if any((each.shape, entry.dtype) != (shape, dtype) for each, entry in pieces):
        raise InvalidConfig(f"The slices of {of!r} in {name!r} are not of one tensor: shapes or dtypes differ.")
    axes = [sorted({each.start[axis] for each, _ in pieces}) for axis in range(len(shape))]
    ends = [dict(itertools.pairwise([*starts, n])) for starts, n in zip(axes, shape, strict=True)]
    for each, entry in pieces:
        stops = tuple(end[start] for end, start in zip(ends, each.start, strict=True))
        if any(start + n > stop for start, n, stop in zip(each.start, entry.shape, stops, strict=True)):
            raise InvalidConfig(
                f"The slices of {of!r} in {name!r} overlap, or leave the tensor. {received(slice=each)}"
            )
    if len({each.start for each, _ in pieces}) != len(pieces):
        raise InvalidConfig(f"{name!r} has two slices of {of!r} that begin at one place.")
    if sum(math.prod(entry.shape) for _, entry in pieces) != math.prod(shape):
        raise TetherError(
            f"{name!r} has {len(pieces)} slices of {of!r}, which are not all of it. Each process wrote its own: load "
            "the '.safetensors.index.json' beside the files, or the folder, and see that the files of all are there."
        )

    def rows(array: Array, first: int | tuple[int, ...]) -> None:
        place = (first, *(0 for _ in shape[1:])) if isinstance(first, int) else first
        for each, entry in pieces:
            begin = tuple(map(max, each.start, place))
            end = tuple(
                min(s + n, at + m) for s, n, at, m in zip(each.start, entry.shape, place, array.shape, strict=True)
            )
            if all(a < b for a, b in zip(begin, end, strict=True)):
                _copy(entry, each.start, array, place, begin, end)

    def read() -> Array:
        array = np.empty(shape, numpy_dtype(dtype))
        rows(array, 0)
        return array

    return Entry(of, shape, dtype, read, rows)


def _copy(
    entry: Entry, start: tuple[int, ...], array: Array, place: tuple[int, ...], begin: Iterable[int], end: Iterable[int]
) -> None:
    """Reads what a slice has of a part of its tensor, of which an array has the place given, into the array."""
    bounds = list(zip(begin, end, strict=True))
    target = array[tuple(slice(a - at, b - at) for (a, b), at in zip(bounds, place, strict=True))]
    filled = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
    assert entry.rows is not None
    entry.rows(filled, tuple(a - s for (a, _), s in zip(bounds, start, strict=True)))
    if filled is not target:
        target[...] = filled


__all__ = ["SLICES", "Slice", "joined", "noted", "owned"]

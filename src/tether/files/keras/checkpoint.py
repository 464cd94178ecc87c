"""What Keras's files of weights hold, read without making a model: entries by place, and what is tied.

Read are `.keras` archives, `.weights.h5`, shards (`.weights.json`), `.npz`, and the HDF5 files of Keras 2. What a
tied layer left out is in the notes beside its entries, see `tether.layers.records.own_values`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, TypeVar

import h5py
import numpy as np

from tether.errors import InvalidConfig, TetherError, Unsupported, no_file, received
from tether.files.keras.archive import VALUES, dtype_of, objects, opened_archive, read_npz, reading, refuse_bomb
from tether.files.loading.entries import Entry, StoredTie, stored_ties
from tether.types import Array, Config
from tether.weights.leaves import numpy_dtype

NPZ = "model.weights.npz"
MAX_EXPANSION = 1000
"""How many times their size in the file values may have: here people pack them."""
MAX_SHARDS = 10_000


@dataclass
class Values:
    """Entries by place (`layers/dense/vars/0`), and ties by the place that the layer's own entry would have."""

    entries: dict[str, Entry] = field(default_factory=dict)
    notes: dict[str, Config] = field(default_factory=dict)
    """What is written beside the entries of a layer, by the place of its group."""
    uids: dict[str, str] = field(default_factory=dict)
    """The place of each shared weight's entry."""
    old: list[tuple[str, list[Entry]]] | None = None
    """The layers of a file of Keras 2, in its order, the model's own weights last as `""`."""

    def ties(self) -> dict[str, StoredTie]:
        """The ties that the file's notes have.

        Raises:
            InvalidConfig: They are not what Tether writes.
        """
        notes = {f"{group}/{key}": tie for group, note in self.notes.items() for key, tie in note.items()}
        weights = {uid: self.entries[place] for uid, place in self.uids.items() if place in self.entries}
        return stored_ties(notes, weights)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Values]:
    """The values in a file, which is open inside the block.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, or not what its name says.
        Unsupported: It is of another kind.
    """
    target = pathlib.Path(path)
    if not target.is_file():
        raise TetherError(no_file(path))
    reader = next((reader for suffix, reader in _READERS.items() if target.name.endswith(suffix)), None)
    if reader is None:
        raise Unsupported(
            f"Weights are read from files that end with {', '.join(_READERS)}. {received(path=str(path))} "
            "For safetensors: `tether.files.load_safetensors`."
        )
    with contextlib.ExitStack() as stack:
        with reading(target):
            values = reader(target, stack)
        yield values


# --------------------------------------------------------------------------- the kinds of files


def _archive(path: pathlib.Path, stack: contextlib.ExitStack) -> Values:
    archive = stack.enter_context(opened_archive(path, whole=True))
    if VALUES not in archive and NPZ in archive:
        return _of_npz(stack.enter_context(archive.entry(NPZ)), stack)
    return _of_h5(_tree(stack.enter_context(archive.values()), path))


def _h5(path: pathlib.Path, stack: contextlib.ExitStack) -> Values:
    file = stack.enter_context(h5py.File(path, "r"))
    tree = _tree(file, path)
    if "layer_names" in file.attrs or "model_weights" in file:
        found = dict(tree)
        return Values(old=_old_layers(found, "" if "layer_names" in file.attrs else "model_weights"))
    return _of_h5(tree)


def _shards(path: pathlib.Path, stack: contextlib.ExitStack) -> Values:
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    names = dict.fromkeys(name for shard in shards for name in (shard if isinstance(shard, list) else [shard]))
    if len(names) > MAX_SHARDS or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise InvalidConfig(f"{path.name!r} names shards by their file names, beside it.")
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise TetherError(f"The shard {missing[0]!r} of {path.name!r} is not beside it.")
    found = [path.with_name(name) for name in names]
    return _of_h5(*(_tree(stack.enter_context(h5py.File(each, "r")), each) for each in found))


def _is_plain(name: str) -> bool:
    return bool(name) and name == pathlib.PurePosixPath(name).name == pathlib.PureWindowsPath(name).name


def _npz(path: pathlib.Path, stack: contextlib.ExitStack) -> Values:
    return _of_npz(stack.enter_context(path.open("rb")), stack)


_READERS: dict[str, Callable[[pathlib.Path, contextlib.ExitStack], Values]] = {
    ".keras": _archive, ".weights.json": _shards, ".h5": _h5, ".hdf5": _h5, ".npz": _npz,
}  # fmt: skip


def _of_npz(file: IO[bytes], stack: contextlib.ExitStack) -> Values:
    values = Values()
    for place, arrays in read_npz(stack.enter_context(zipfile.ZipFile(file))):
        for key, array in arrays.items():
            name = f"{place}/vars/{key}" if place else f"vars/{key}"
            values.entries[name] = Entry(name, array.shape, str(array.dtype), lambda array=array: array)  # type: ignore[misc]
    return values


# --------------------------------------------------------------------------- HDF5


def _tree(file: h5py.File, path: pathlib.Path) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    return objects(file, path.stat().st_size, expansion=MAX_EXPANSION)


def _of_h5(*trees: Iterable[tuple[str, h5py.Group | h5py.Dataset]]) -> Values:
    values = Values()
    for place, item in itertools.chain(*trees):
        if isinstance(item, h5py.Dataset):
            # Keras 2.13 had another name for the layers of a model.
            known = place.replace("_layer_checkpoint_dependencies", "layers")
            values.entries[known] = _entry(known, item)
        else:
            _read_notes(item, place, values)
    return values


def _read_notes(group: h5py.Group, place: str, values: Values) -> None:
    uid, note = group.attrs.get("tether_uid"), group.attrs.get("tether")
    if isinstance(uid, str):
        values.uids[uid] = f"{place}/0"
    if isinstance(note, str):
        try:
            read = json.loads(note)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidConfig(f"The file's note at {place!r} cannot be read: {error}") from error
        if not isinstance(read, dict) or read.get("version") != 1 or not isinstance(read.get("ties"), dict):
            raise InvalidConfig(f"The file's note at {place!r} has version 1 and ties. {received(note=read)}")
        values.notes[place] = read["ties"]


def _entry(name: str, dataset: h5py.Dataset) -> Entry:
    dtype = dtype_of(dataset)
    shape = tuple(int(n) for n in dataset.shape)
    refuse_bomb(name, dataset.nbytes, dataset.id.get_storage_size(), MAX_EXPANSION)
    if dataset.chunks is not None:
        dataset[()]  # what is compressed may be damaged inside: that must show before anything is assigned

    def read() -> Array:
        array = np.asarray(dataset[()])
        if str(array.dtype) == dtype:
            return array
        return array.view(numpy_dtype(dtype)) if array.dtype.kind == "V" else array.astype(numpy_dtype(dtype))

    return Entry(name, shape, dtype, read)


def _old_layers(tree: Mapping[str, h5py.Group | h5py.Dataset], top: str) -> list[tuple[str, list[Entry]]]:
    """The layers with weights of a Keras 2 file, in order; the model's own weights last, under `""`."""
    root = _one(tree, top, h5py.Group)
    found = [(name, _old_weights(tree, _join(top, name), name)) for name in _names(root, "layer_names")]
    own = "top_level_model_weights"
    if _join(top, own) in tree:
        found.append(("", _old_weights(tree, _join(top, own), own)))
    return [(name, entries) for name, entries in found if entries]


def _old_weights(tree: Mapping[str, h5py.Group | h5py.Dataset], place: str, layer: str) -> list[Entry]:
    names = _names(_one(tree, place, h5py.Group), "weight_names")
    return [_entry(f"{layer}/{name}", _one(tree, _join(place, name), h5py.Dataset)) for name in names]


def _join(above: str, name: str) -> str:
    return f"{above}/{name}" if above else name


OfKind = TypeVar("OfKind")


def _one(tree: Mapping[str, h5py.Group | h5py.Dataset], place: str, kind: type[OfKind]) -> OfKind:
    if not isinstance(tree.get(place), kind):
        raise InvalidConfig(f"The file has no {place!r} of its own, which it names.")
    return tree[place]


def _names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names, which Keras 2 splits into numbered attributes if it is long."""
    if attribute in group.attrs:
        found = list(group.attrs[attribute])
    else:
        found, number = [], 0
        while f"{attribute}{number}" in group.attrs:
            found.extend(group.attrs[f"{attribute}{number}"])
            number += 1
    names = [name.decode("utf-8") if isinstance(name, bytes) else str(name) for name in found]
    if len(set(names)) < len(names):
        raise InvalidConfig(f"{group.name!r} names one thing twice. {received(**{attribute: names})}")
    return names


__all__ = ["Values", "opened"]

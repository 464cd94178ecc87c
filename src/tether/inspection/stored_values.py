"""What an HDF5 file of weights holds, by place: the attributes that lead to the object that wrote an entry."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import h5py

from tether.errors import InvalidConfig, Unsupported, received
from tether.files.keras.archive import dtype_of, objects
from tether.inspection.facts import Shape, itemsize
from tether.inspection.live import OPTIMIZER

NOTE, UID = "tether", "tether_uid"
"""The attributes beside the entries of a layer, which say what is tied in it, and beside that of a weight."""


class Values:
    """What an HDF5 file of weights holds: shapes and dtypes by place, and the names of objects."""

    def __init__(self, file: h5py.File, size: int) -> None:
        """Reads what there is.

        Args:
            file: The open file.
            size: The bytes that it has on the disk.
        """
        self.tensors: dict[str, tuple[Shape, str]] = {}
        self.names: dict[str, str] = {}
        """The name of the object at each place."""
        self.notes: dict[str, dict[str, Any]] = {}
        """Of a tied layer at a place: what is read instead of the entries that are left out, by their keys."""
        self.uids: dict[str, str] = {}
        """The entries of weights, by the ids that notes name them by."""
        self._named: dict[str, list[str]] = {}
        self._below: dict[str, dict[str, None]] = {}
        """The groups in each group, by their names there."""
        self._stems: dict[str, set[str]] = {}
        """What these names are without their numbers."""
        if "layer_names" in file.attrs or "model_weights" in file:
            raise Unsupported("This file is of Keras's old format. Load it and save it as `.keras` or `.weights.h5`.")
        for place, item in objects(file, size):
            if isinstance(item, h5py.Dataset):
                self.tensors[place] = (tuple(int(n) for n in item.shape), dtype_of(item))
            elif place:
                above, _, name = place.rpartition("/")
                self._below.setdefault(above, {})[name] = None
                self._read_group(place, item)

    def _read_group(self, place: str, group: Any) -> None:
        if not f"/{place}".endswith("/vars"):
            return
        owner = place.removesuffix("vars").removesuffix("/")
        if "name" in group.attrs:
            self.names[owner] = name = str(group.attrs["name"])
            self._named.setdefault(name, []).append(owner)
        if NOTE in group.attrs:
            self.notes[owner] = noted_ties(group.attrs[NOTE], owner)
        if UID in group.attrs:
            self.uids[str(group.attrs[UID])] = f"{place}/0"

    def nearest(self, name: Any, place: str) -> str | None:
        """The place nearest below another whose object has a name."""
        below = f"{place}/" if place else ""
        found = [p for p in self._named.get(name, ()) if p and p.startswith(below)]
        return min(found, key=lambda p: (p.count("/"), written(p)), default=None)

    def follow(self, place: str, steps: list[str]) -> tuple[str, list[str]]:
        """Where a path of attributes, items and names leads, and what of the path is not in the file."""
        while steps:
            keys = self._below.get(place, ())
            key = next((key for key in (steps[0], steps[0].removeprefix("_")) if key in keys), None)
            key = key or self._item(place, steps[0])
            inner = self.nearest(steps[0], place) if key is None else f"{place}/{key}" if place else key
            if inner is None:
                break
            place, steps = inner, steps[1:]
        return place, steps

    def _item(self, place: str, step: str) -> str | None:
        """The name of an item of a list, if the names in the file tell which one it is: all of one class."""
        if not step.isdigit():
            return None
        if place not in self._stems:
            self._stems[place] = {re.sub(r"_\d+$", "", key) for key in self._below.get(place, ())}
        stems = self._stems[place]
        key = min(stems, default="") + (f"_{step}" if step != "0" else "")
        return key if len(stems) == 1 and key in self._below[place] else None

    def is_state(self, place: str) -> bool:
        """Whether an entry is of the optimizer of a model within the model."""
        return f"/{OPTIMIZER}" in place


def _is_number(dtype: Any) -> bool:
    try:
        return isinstance(dtype, str) and itemsize(dtype) > 0
    except TypeError:
        return False


def noted_ties(note: Any, place: str) -> dict[str, Any]:
    """The ties in a note that a stranger may have written; their steps are not read yet."""
    read = json.loads(note) if isinstance(note, str) else None
    ties = read.get("ties") if isinstance(read, dict) and read.get("version") == 1 else None
    if not isinstance(ties, dict) or not all(
        isinstance(tie, dict) and set(tie) == {"dtype", "steps"} and _is_number(tie["dtype"]) for tie in ties.values()
    ):
        raise InvalidConfig(
            f"A note of ties has version 1, and dtype and steps of each. {received(place=place, note=note)}"
        )
    return ties


def owner_of(place: str) -> str:
    """The place of the object that wrote an entry."""
    return place.rpartition("vars/")[0].removesuffix("/")


def written(place: str, graph: Mapping[str, int] | None = None) -> tuple[Any, ...]:
    """Orders places as Keras writes them: an object's own entries, then its attributes, private ones last.

    Layers of a graph come first and as they are numbered in `graph`, items of another list by the numbers in
    their names.
    """
    key, above = [], ""
    for part in place.split("/"):
        at = f"{above}/{part}" if above else part
        number = (graph or {}).get(at) if above.rpartition("/")[2] == "layers" else None
        key.append((part != "vars", part != "layers", part.startswith("_"), number or 0, *_natural(part)))
        above = at
    return tuple(key)


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name))


__all__ = ["NOTE", "Values", "noted_ties", "owner_of", "written"]

"""Names for weights as a caller gives them, and a model's weights under them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tether.errors import TetherError, received
from tether.files.loading.entries import Entry
from tether.files.tensors.presets import PRESETS
from tether.files.tensors.tables import Table, Tensor, has_place
from tether.types import Array

# --------------------------------------------------------------------------- names
# What other people's files call a model's weights, and how they lay them out.


Names = Mapping[str, Any] | Callable[[str], Any] | Table | str | None


@dataclass(frozen=True)
class Naming:
    """The tensors of a file for each name of a model's weights."""

    names: Names
    known: frozenset[str] = frozenset()
    """All names of the model's weights."""

    def __post_init__(self) -> None:
        names = self.names
        if (
            names is not None
            and not callable(names)
            and not isinstance(names, (Mapping, Table))
            and (names not in (*PRESETS,))
        ):
            raise TetherError(
                f"`names` is a mapping from the model's names to the file's, a function of a name, a "
                f"`tether.files.Table`, or one of {', '.join(map(repr, PRESETS))}. {received(names=names)}"
            )

    @cached_property
    def table(self) -> Table | None:
        """The table that says the names, if one does."""
        names = self.names
        if isinstance(names, str):
            return PRESETS[names]
        if isinstance(names, Mapping) and any(has_place(str(key)) for key in names):
            return Table(names)
        return names if isinstance(names, Table) else None

    def of(self, name: str) -> list[Tensor]:
        """The tensors that a weight of this name is in: all that a file has of them must agree."""
        names = self.names
        if names is None:
            return [Tensor(name)]
        found: Any
        if self.table is not None:
            found = self.table.of(name, self.known)
            if found is None and isinstance(names, Mapping):
                found = name
        else:
            found = names(name) if callable(names) else names.get(name, name)  # type: ignore[union-attr]
        if found is None:
            return []
        several = found if isinstance(found, (list, tuple)) else [found]
        return [_as_tensor(each, name) for each in several]

    def ordered(self, names: list[Any]) -> list[Any]:
        """The alternatives of a name as PEFT has them: below the backbone's own name first, in a model with a head."""
        table = self.table
        if table is None or table.prefixes[0] or not table.is_within(self.known):
            return names
        count = len(table.prefixes)
        if len(names) % count:
            return names
        return [name for place in range(0, len(names), count) for name in names[place : place + count][::-1]]

    def find(self, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> list[Entry]:
        """A file's entries for a weight, in the weight's layout."""
        found = []
        for tensor in self.of(name):
            entry = next((entries[each] for each in tensor.names if each in entries), None)
            if entry is not None:
                found.append(_laid_out(entry, tensor, shape))
        return found

    def spare(self, name: str) -> bool:
        """Whether a tensor of a file is known to be no weight of the model: a buffer, or a head that it has not."""
        return self.table is not None and self.table.is_spare(name)


def _as_tensor(value: object, name: str) -> Tensor:
    if isinstance(value, str):
        return Tensor(value)
    if not isinstance(value, Tensor):
        raise TetherError(
            f"`names` gives for {name!r} a name in the file, a `tether.files.Tensor`, a list of these, or None. "
            f"{received(value=value)}"
        )
    return value


def _laid_out(entry: Entry, tensor: Tensor, shape: tuple[int, ...]) -> Entry:
    """An entry in the layout of the model's weight; what cannot be is left as it is, so that its shape is refused."""
    if tensor.is_plain:
        return entry
    expected = tensor.stored_shape(shape)
    if entry.shape != expected:
        return replace(entry, name=f"{entry.name} ({tensor.describe()} of shape {shape} is {expected} there)")
    return replace(entry, shape=shape, read=lambda: tensor.to_weight(entry.read(), shape), rows=None)


def to_file(weights: Sequence[Entry], naming: Naming) -> list[Entry]:
    """A model's weights as a file of these names has them; parts of one tensor are joined.

    Raises:
        TetherError: Two weights would get one name, or a part of a tensor is missing.
    """
    found: dict[str, Entry] = {}
    parts: dict[str, dict[int, tuple[Entry, Tensor]]] = {}
    for weight in weights:
        for tensor in naming.of(weight.name)[:1]:
            name = tensor.names[0]
            if tensor.part is not None:
                parts.setdefault(name, {})[tensor.part[0]] = (weight, tensor)
            elif name in found:
                raise TetherError(f"Two weights would be {name!r} in the file; one of them is {weight.name!r}.")
            else:
                found[name] = _stored(name, weight, tensor)
    for name, pieces in parts.items():
        found[name] = _joined(name, pieces)
    return list(found.values())


def _stored(name: str, weight: Entry, tensor: Tensor) -> Entry:
    shape = tensor.stored_shape(weight.shape)
    return Entry(name, shape, weight.dtype, lambda: tensor.to_file(weight.read()))


def _joined(name: str, pieces: dict[int, tuple[Entry, Tensor]]) -> Entry:
    count = (next(iter(pieces.values()))[1].part or (0, 0))[1]
    if sorted(pieces) != list(range(count)):
        raise TetherError(f"The model has {len(pieces)} of the {count} parts of the tensor {name!r}.")
    ordered = [pieces[number] for number in range(count)]
    shapes = [math.prod(weight.shape) for weight, _ in ordered]
    if len(set(shapes)) != 1:
        raise TetherError(f"The parts of {name!r} have different sizes. {received(sizes=shapes)}")
    dtypes = {weight.dtype for weight, _ in ordered}
    if len(dtypes) != 1:
        raise TetherError(f"The parts of {name!r} have different dtypes. {received(dtypes=sorted(dtypes))}")
    weight, tensor = ordered[0]

    def read() -> Array:
        return np.concatenate([tensor.to_file(weight.read()) for weight, tensor in ordered], axis=tensor.part_axis)

    return Entry(name, tensor.stored_shape(weight.shape), weight.dtype, read)


__all__ = ["Names", "Naming", "to_file"]

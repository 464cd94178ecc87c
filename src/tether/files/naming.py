"""What other people's files call a model's weights, and how they lay them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tether.errors import TetherError, received
from tether.files import bert
from tether.files.entries import Array, Entry
from tether.files.layout import Tensor

Names = Mapping[str, Any] | Callable[[str], Any] | str | None

PRESETS: dict[str, Callable[[str, frozenset[str]], Any]] = {"bert": bert.names}
"""Hugging Face's names of a weight, given all names of the model, by a word for the architecture."""


@dataclass(frozen=True)
class Naming:
    """The tensors of a file for each name of a model's weights."""

    names: Names
    known: frozenset[str] = frozenset()
    """All names of the model's weights."""

    def __post_init__(self) -> None:
        names = self.names
        if names is not None and not callable(names) and not isinstance(names, Mapping) and names not in (*PRESETS,):
            raise TetherError(
                f"`names` is a mapping from the model's names to the file's, a function of a name, or one of "
                f"{', '.join(map(repr, PRESETS))}. {received(names=names)}"
            )

    def of(self, name: str) -> list[Tensor]:
        """The tensors that a weight of this name is in: all that a file has of them must agree."""
        names = self.names
        if names is None:
            return [Tensor(name)]
        if isinstance(names, str):
            found = PRESETS[names](name, self.known)
        else:
            found = names(name) if callable(names) else names.get(name, name)
        if found is None:
            return []
        several = found if isinstance(found, (list, tuple)) else [found]
        return [_as_tensor(each, name) for each in several]

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
        return self.names == "bert" and bert.is_spare(name)


def _as_tensor(value: Any, name: str) -> Tensor:
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
    (_, count) = next(iter(pieces.values()))[1].part or (0, 0)
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
        return np.concatenate([tensor.to_file(weight.read()) for weight, tensor in ordered])

    return Entry(name, tensor.stored_shape(weight.shape), weight.dtype, read)


__all__ = ["PRESETS", "Names", "Naming", "to_file"]

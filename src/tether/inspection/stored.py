"""The facts of a file, read without making the model: `.keras`, `.weights.h5`, `.safetensors`. No value is read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from tether.errors import InvalidConfig, Unsupported, no_file, received
from tether.files.keras.archive import opened_archive, opened_values, reading
from tether.files.tensors.tensor_file import opened_tensors
from tether.inspection.facts import Facts, Shape, StoredWeight, UseOf
from tether.inspection.stored_layers import NOTE, StoredValues, noted_ties, stored_facts, stored_layers
from tether.weights.algebra import is_kept_still
from tether.weights.codec import decode
from tether.weights.expression import Stored, known_shape
from tether.weights.identity import sharing
from tether.weights.weight import Weight


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
        raise FileNotFoundError(no_file(path))
    if reader is None or not path.is_file():
        raise Unsupported(
            f"Facts are read from files that end with {', '.join(_READERS)}. {received(path=str(path))} "
            "Load the model and pass that."
        )
    with reading(path):
        return reader(path)


# --------------------------------------------------------------------------- Keras


def _weights_facts(path: Path) -> Facts:
    with opened_values(path) as file:
        return stored_facts(path.name, StoredValues(file, path.stat().st_size), {}, {})


def _archive_facts(path: Path) -> Facts:
    with opened_archive(path) as archive, archive.values() as opened:
        config, values = archive.config(), StoredValues(opened, path.stat().st_size)
    with sharing() as known:
        layers = stored_layers(config, values)
        return stored_facts(str(config["config"].get("name", path.stem)), values, layers, known)


# --------------------------------------------------------------------------- safetensors


def _safetensors_facts(path: Path) -> Facts:
    with opened_tensors(path) as (tensors, metadata):
        weights = tuple(StoredWeight(key, entry.shape, entry.dtype, path=key) for key, entry in tensors.items())
        note = metadata.get(NOTE)
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
    places: dict[Stored, str] = {known[uid]: key for uid, key in named.items()}
    found: dict[str, UseOf] = {}
    for where, tie in ties.items():
        expression = decode(tie["steps"], known)
        reads = tuple(places[weight] for weight in expression.weights_used())
        use = _named_use(where, reads, known_shape(expression), tie["dtype"], True)
        found[where] = replace(use, expression=expression.notation(), tied=True, kept_still=is_kept_still(expression))
    return found


def _named_use(name: str, weights: tuple[str, ...], shape: Shape, dtype: str, ours: bool) -> UseOf:
    """The use of a tensor by its name; Tether has put dots where paths of layers have slashes."""
    layer, _, attribute = name.rpartition(".")
    return UseOf(layer.replace(".", "/") if ours else layer, attribute, None, weights, shape, dtype)


_READERS = {".keras": _archive_facts, ".weights.h5": _weights_facts, ".safetensors": _safetensors_facts}

__all__ = ["file_facts"]

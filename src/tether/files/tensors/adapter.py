"""The file of one adapter: safetensors, with a header that says in which weights its parts are."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

from tether import keras_seam
from tether.errors import InvalidConfig, TetherError, received
from tether.files.keras.archive import reading
from tether.files.keras.load import making
from tether.files.loading.assignment import Assignment
from tether.files.loading.entries import Entry, entry_of
from tether.files.loading.matching import as_offer
from tether.files.tensors.safetensors import TensorFile, write_tensors
from tether.types import Config
from tether.weights.codec import encode
from tether.weights.expression import Expression
from tether.weights.identity import sharing
from tether.weights.weight import Weight

VERSION = 1
_FORMAT = "tether.adapter"
_MAX_HEADER = 1 << 26


def write(
    target: pathlib.Path,
    name: str,
    strength: float,
    parts: Mapping[str, Expression],
    bases: Mapping[str, Sequence[Weight]],
) -> None:
    """Writes an adapter.

    Args:
        target: Where to. Written beside and renamed.
        name: What it is called.
        strength: Its strength.
        parts: What it adds, by the weight's path.
        bases: The weights of what it adds to, by the same paths. Their values are not written.
    """
    weights: dict[str, Weight] = {}
    for place, part in parts.items():
        of_base = {weight.uid for weight in bases[place]}
        weights.update({weight.uid: weight for weight in part.weights_used() if weight.uid not in of_base})
    header = {
        "version": VERSION,
        "name": name,
        "strength": strength,
        "ties": {place: encode(part) for place, part in parts.items()},
        "bases": {place: [weight.uid for weight in base] for place, base in bases.items()},
        "weights": {uid: weight.get_config() for uid, weight in weights.items()},
    }
    tensors = [entry_of(weight.variable, uid) for uid, weight in weights.items()]
    write_tensors(target, tensors, {"format": _FORMAT, "adapter": json.dumps(header)})


def read(path: str | os.PathLike[str], taken: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Header, and weights by uid, of a file that a stranger may have written.

    Args:
        path: The file.
        taken: Paths that its weights must not have: they get a number then.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        TetherError: There is no file.
    """
    target = pathlib.Path(path)
    if not target.is_file():
        raise TetherError(f"There is no file {str(path)!r}.")
    with open(target, "rb", buffering=0) as opened:
        with reading(target):
            file = TensorFile(opened, target.name)
            header = _header(file.metadata, target)
        with making(target, header["weights"], what="adapter"):
            return header, _weights_of(header, file.entries, taken)


def _header(metadata: Mapping[str, str], path: pathlib.Path) -> dict[str, Any]:
    text = metadata.get("adapter", "")
    if metadata.get("format") != _FORMAT or len(text) > _MAX_HEADER:
        raise InvalidConfig(f"{str(path)!r} holds no adapter of Tether's.")
    header = json.loads(text)
    kinds = {"name": str, "strength": float, "ties": dict, "bases": dict, "weights": dict}
    if (
        not isinstance(header, dict)
        or header.get("version") != VERSION
        or not all(isinstance(header.get(key), kind) for key, kind in kinds.items())
        or not header["ties"]
        or not math.isfinite(header["strength"])
    ):
        raise InvalidConfig(f"{str(path)!r} holds no adapter of version {VERSION}.")
    return header


def _weights_of(header: Config, tensors: Mapping[str, Entry], taken: Container[str]) -> dict[str, Weight]:
    if set(header["weights"]) != set(tensors):
        raise InvalidConfig("The file's header names other weights than it holds.")
    weights = {}
    with sharing():
        for uid, config in header["weights"].items():
            if not isinstance(config, dict) or config.get("uid") != uid:
                raise InvalidConfig(f"A weight's config names its own uid. {received(uid=uid)}")
            weight = Weight.from_config(_beside_others(config, taken))
            if weight.shape != tensors[uid].shape:
                raise InvalidConfig(f"A weight of the file has another shape than its header says. {received(uid=uid)}")
            weights[uid] = weight
    plan = Assignment([as_offer(weight, tensors[uid]) for uid, weight in weights.items()], "error")
    plan.check()
    plan.carry_out()
    return weights


def _beside_others(config: Config, taken: Container[str]) -> dict[str, Any]:
    """The config of a weight with a path that is not taken, and with the same number in its name."""
    path, name = config.get("path"), config.get("name")
    if not isinstance(path, str) or not isinstance(name, str):
        return config
    found = keras_seam.numbered(path, taken)
    return {**config, "path": found, "name": name + found[len(path) :]}

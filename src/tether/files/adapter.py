"""The file of one adapter: safetensors, with a header that says in which weights its parts are."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import InvalidConfig, TetherError, received
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
    from safetensors.numpy import save_file

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
    tensors = {uid: _storable(weight) for uid, weight in weights.items()}
    with written_beside(target) as beside:
        save_file(tensors, beside, metadata={"format": _FORMAT, "adapter": json.dumps(header)})


def _storable(weight: Weight) -> np.ndarray[Any, Any]:
    """The value in a dtype that NumPy has: 16-bit floats are kept exactly as 32 bits."""
    value = keras.ops.convert_to_numpy(keras_seam.raw_value(weight.variable))
    return np.ascontiguousarray(value.astype("float32") if value.dtype.itemsize == 2 else value)


def read(path: str | os.PathLike[str], taken: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Header, and weights by uid, of a file that a stranger may have written.

    Args:
        path: The file.
        taken: Paths that its weights must not have: they get a number then.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        TetherError: There is no file.
    """
    header, tensors = _read(path)
    return header, _weights_of(header, tensors, taken)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of a file that a stranger may have written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
            text = metadata.get("adapter", "")
            if metadata.get("format") != _FORMAT or len(text) > _MAX_HEADER:
                raise InvalidConfig(f"{path} holds no adapter of Tether's.")
            header = json.loads(text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise TetherError(f"There is no file {str(path)!r}.") from error
    except (SafetensorError, json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} cannot be read as an adapter: {error}") from error
    kinds = {"name": str, "strength": float, "ties": dict, "bases": dict, "weights": dict}
    if (
        not isinstance(header, dict)
        or header.get("version") != VERSION
        or not all(isinstance(header.get(key), kind) for key, kind in kinds.items())
        or not header["ties"]
        or not np.isfinite(header["strength"])
    ):
        raise InvalidConfig(f"{path} holds no adapter of version {VERSION}.")
    return header, tensors


def _weights_of(header: dict[str, Any], tensors: dict[str, Any], taken: Container[str]) -> dict[str, Weight]:
    if set(header["weights"]) != set(tensors):
        raise InvalidConfig("The file's header names other weights than it holds.")
    weights = {}
    with sharing():
        for uid, config in header["weights"].items():
            if not isinstance(config, dict) or config.get("uid") != uid:
                raise InvalidConfig(f"A weight's config names its own uid. {received(uid=uid)}")
            weight = Weight.from_config(_beside_others(config, taken))
            if weight.shape != tuple(tensors[uid].shape):
                raise InvalidConfig(f"A weight of the file has another shape than its header says. {received(uid=uid)}")
            weight.assign(keras.ops.cast(tensors[uid], weight.dtype))
            weights[uid] = weight
    return weights


def _beside_others(config: dict[str, Any], taken: Container[str]) -> dict[str, Any]:
    """The config of a weight with a path that is not taken, and with the same number in its name."""
    path, name = config.get("path"), config.get("name")
    if not isinstance(path, str) or not isinstance(name, str):
        return config
    found = keras_seam.numbered(path, taken)
    return {**config, "path": found, "name": name + found[len(path) :]}

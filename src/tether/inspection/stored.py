"""The facts of a file, read without making the model: `.keras`, `.weights.h5`, `.safetensors`. No value is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py

from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.inspection.facts import Facts, Slot, StoredWeight, UseOf
from tether.inspection.live import OPTIMIZER, layer_path
from tether.layers.record import read_record
from tether.layers.state import WEIGHTS
from tether.weights.expression import known_shape
from tether.weights.identity import sharing

CONFIG, VALUES = "config.json", "model.weights.h5"
MAX_CONFIG = 256 * 2**20
"""Bytes of a config; those of the largest models that people make have a few megabytes."""


def file_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts of a file.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidConfig: It is broken, or not what its name says.
        Unsupported: It is of another kind.
    """
    path = Path(path)
    reader = next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise Unsupported(
            f"Facts are read from files that end with {', '.join(_READERS)}. {received(path=str(path))} "
            "Load the model and pass that."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        return reader(path)
    except TetherError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise InvalidConfig(f"{str(path)!r} is broken, or not what its name says: {error}") from error


# --------------------------------------------------------------------------- HDF5


def _weights_facts(path: Path) -> Facts:
    return replace(_Values(path).facts(path.name, [], {}), ties=False)


class _Values:
    """What an HDF5 file of weights holds: shapes and dtypes by place, and names of layers."""

    def __init__(self, path: Path) -> None:
        self.names: dict[str, str] = {}
        """The name of the object at each place."""
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        with h5py.File(path, "r") as file:
            if "layer_names" in file.attrs or "model_weights" in file:
                raise Unsupported(f"{path.name!r} is of Keras's old format. Load it and save it as `.weights.h5`.")
            file.visititems(self._visit)

    def _visit(self, place: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            dtype = str(item.attrs.get("dtype", item.dtype))
            self.tensors[place] = (tuple(int(n) for n in item.shape), dtype)
        elif "name" in item.attrs:
            self.names[place.removesuffix("vars").rstrip("/")] = str(item.attrs["name"])

    def facts(self, name: str, order: list[str], records: dict[str, Any]) -> Facts:
        """The facts; `order` are the places of layers as the model has them, `records` their ties."""
        places = sorted(self.tensors, key=lambda place: _rank(place, order))
        kept = [place for place in places if place.startswith(OPTIMIZER)]
        places = [place for place in places if not place.startswith(OPTIMIZER)]
        tied, paths = self._tied(records, places)
        weights = [StoredWeight(place, *self.tensors[place], path=paths.get(place)) for place in places]
        uses = [*tied, *self._own(places, {place for use in tied for place in use.weights})]
        layers = dict.fromkeys(use.layer for use in uses)
        rank = {layer: number for number, layer in enumerate(layers)}
        return Facts(
            name=name,
            weights=tuple(weights),
            uses=tuple(sorted(uses, key=lambda use: rank[use.layer])),
            optimizer=tuple(Slot(place, *self.tensors[place]) for place in kept),
            layers=tuple((layer, None) for layer in layers),
        )

    def _own(self, places: list[str], used: set[str]) -> Iterator[UseOf]:
        for place in places:
            owner = place.rpartition("/vars/")[0] if "/vars/" in place else ""
            if place not in used and WEIGHTS not in place.split("/"):
                yield UseOf(layer_path(owner, self.names), None, None, (place,), *self.tensors[place])

    def _tied(self, records: dict[str, Any], places: list[str]) -> tuple[list[UseOf], dict[str, str]]:
        uses, paths = [], dict[str, str]()
        found: dict[str, str] = {}  # uid of a weight -> its place
        weights = [weight for record in records.values() for e in record.ties.values() for weight in e.weights_used()]
        for weight in dict.fromkeys(weights):
            fits = [
                place
                for place in places
                if self.names.get(place.rpartition("/vars/")[0]) == weight.name
                and (weight.shape is None or self.tensors[place][0] == weight.shape)
                and place not in found.values()
            ]
            if fits:
                found[weight.uid] = fits[0]
                paths[fits[0]] = weight.get_config()["path"] or weight.name
        for place, record in records.items():
            for path, expression in record.ties.items():
                *steps, attribute = path.split("/")
                layer, left = self._below(place, steps)
                reads = [found[w.uid] for w in expression.weights_used() if w.uid in found]
                uses.append(
                    UseOf(
                        layer=layer_path(layer, self.names),
                        attribute="/".join([*left, attribute]),
                        expression=expression.notation(),
                        weights=tuple(reads),
                        shape=known_shape(expression),
                        dtype=expression.dtype or "float32",
                        tied=True,
                    )
                )
        return uses, paths

    def _below(self, place: str, steps: list[str]) -> tuple[str, list[str]]:
        """The place that steps of attributes lead to, and the steps that are not in the file."""
        while steps:
            step = steps[0]
            inner = f"{place}/{step}" if place else step
            named = [p for p, name in self.names.items() if name == step and _is_child(p, place)]
            if not any(p == inner or p.startswith(f"{inner}/") for p in self.names) and len(named) == 1:
                inner = named[0]
            elif not any(p == inner or p.startswith(f"{inner}/") for p in self.names):
                break
            place, steps = inner, steps[1:]
        return place, steps


def _is_child(place: str, parent: str) -> bool:
    below = place.removeprefix(f"{parent}/") if parent else place
    return below != place or not parent


def _rank(place: str, order: list[str]) -> tuple[Any, ...]:
    """Layers as the model has them; what it does not say by the numbers in the names."""
    best = max((p for p in order if place.startswith(f"{p}/")), key=len, default=None)
    known = (len(order),) if best is None else (order.index(best),)
    return (*known, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", place)])


# --------------------------------------------------------------------------- .keras


def _archive_facts(path: Path) -> Facts:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(CONFIG).file_size > MAX_CONFIG:
            raise InvalidConfig(f"The config in {path.name!r} is larger than {MAX_CONFIG} bytes.")
        config = json.loads(archive.read(CONFIG))
        if VALUES not in archive.namelist():
            raise Unsupported(f"{path.name!r} has no {VALUES}. Load the model and pass that.")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / VALUES
            with archive.open(VALUES) as source, open(copy, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            values = _Values(copy)
    order: list[str] = []
    records: dict[str, Any] = {}
    with sharing():
        _walk(config, "", values, order, records)
        return values.facts(str(config["config"].get("name", path.stem)), order, records)


def _walk(config: Any, place: str, values: _Values, order: list[str], records: dict[str, Any]) -> None:
    """Goes through the configs of layers in layers; `place` is that of the layer that a config is of."""
    inner = config.get("config") if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        return
    order.append(place)
    if isinstance(inner.get("tether"), dict):
        records[place] = read_record(inner["tether"])
    for value in inner.values():
        for child in value if isinstance(value, list) else (value,):
            if _is_layer(child):
                below = _place_of(child.get("name", child["config"].get("name")), place, values)
                if below is not None:
                    _walk(child, below, values, order, records)


def _is_layer(value: Any) -> bool:
    return isinstance(value, dict) and "class_name" in value and isinstance(value.get("config"), dict)


def _place_of(name: Any, place: str, values: _Values) -> str | None:
    """The place nearest below another whose object has a name."""
    found = [p for p, other in values.names.items() if other == name and p != place and _is_child(p, place)]
    return min(found, key=lambda p: (p.count("/"), p), default=None)


# --------------------------------------------------------------------------- safetensors

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _safetensors_facts(path: Path) -> Facts:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            weights = tuple(
                StoredWeight(key, tuple(tensor.get_shape()), _DTYPES[tensor.get_dtype()], path=key)
                for key, tensor in tensors.items()
            )
    except SafetensorError as error:
        raise InvalidConfig(f"{str(path)!r} is not a safetensors file: {error}") from error
    uses = []
    for weight in weights:
        layer, _, attribute = weight.place.rpartition(".")
        uses.append(UseOf(layer, attribute, None, (weight.place,), weight.shape, weight.dtype))
    layers = dict.fromkeys(use.layer for use in uses)
    return Facts(path.name, weights, tuple(uses), layers=tuple((layer, None) for layer in layers), ties=False)


_READERS = {".keras": _archive_facts, ".weights.h5": _weights_facts, ".safetensors": _safetensors_facts}

__all__ = ["file_facts"]

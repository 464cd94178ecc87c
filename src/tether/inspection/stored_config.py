"""What the config of a model says of its layers, by their places in the file. A layer is found there by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tether.inspection.stored_values import Values
from tether.layers.records.record import Record, read_record
from tether.layers.tying.tied import KEY
from tether.weights.weight import Weight

WEIGHT = "tether>Weight"
"""How a config names the class."""
_NOT_ALL_TRAIN = {"BatchNormalization", "Normalization", "RNN", "SpectralNormalization", "TimeDistributed"}
"""Keras's own layers that have variables which never train, or hold layers of others."""
_PARTS = {"Bidirectional": ("forward_layer", "backward_layer")}
"""Attributes of layers that Keras renames, so that no config has their names."""


@dataclass(frozen=True)
class StoredLayer:
    """What a config says of a layer."""

    kind: str
    trainable: bool | None = None
    """Its flag."""
    dtype: str | None = None
    """The dtype of its variables."""
    all_train: bool = False
    """Whether it is known that all of its variables train if the layer does."""
    record: Record | None = None
    held: tuple[tuple[str, Weight], ...] = ()
    """The weights that its config holds, by their keys: attributes of a layer of somebody's own."""


def stored_layers(config: dict[str, Any], values: Values) -> dict[str, StoredLayer]:
    """The layers of a config by their places in the file, a layer before those in it."""
    found: dict[str, StoredLayer] = {}
    _add(config, "", values, found)
    return found


def _add(config: dict[str, Any], place: str, values: Values, found: dict[str, StoredLayer]) -> None:
    inner = config["config"]
    record = inner.get(KEY)
    base = record.get("base") if isinstance(record, dict) else None
    named = base if isinstance(base, dict) else config
    kind, module = str(named.get("class_name")), str(named.get("module"))
    trainable = inner.get("trainable")
    layer = StoredLayer(
        kind=kind,
        trainable=trainable if isinstance(trainable, bool) else None,
        dtype=_variable_dtype(inner.get("dtype")),
        all_train=module == "keras.layers" and kind not in _NOT_ALL_TRAIN and not inner.get("lora_rank"),
        record=None if record is None else read_record(_without_values(record)),
        held=tuple(_held(inner, ())),
    )
    found.setdefault(place, layer)
    for child in _configs(list(inner.values())):
        name = child.get("name", child["config"].get("name"))
        below = values.nearest(name, place) if isinstance(name, str) else None
        if below is not None and below not in found:
            _add(child, below, values, found)
        elif below is None and kind in _PARTS:
            for part in _PARTS[kind]:
                _add(child, f"{place}/{part}" if place else part, values, found)


def _configs(value: Any) -> Iterator[dict[str, Any]]:
    """The configs of objects in a config, but not those in them."""
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, dict) and "class_name" in entry and isinstance(entry.get("config"), dict):
            yield entry
        elif isinstance(entry, (dict, list)):
            yield from _configs(entry)


def _held(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Weight]]:
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, dict) and entry.get("registered_name") == WEIGHT:
            yield "/".join((*path, str(key))), Weight.from_config(_bare(entry.get("config")))
        elif isinstance(entry, list) or (isinstance(entry, dict) and "class_name" not in entry and key != KEY):
            yield from _held(entry, (*path, str(key)))


def _without_values(record: Any) -> Any:
    """A record whose weights start with nothing, so that reading it makes no variable."""
    weights = record.get("weights") if isinstance(record, dict) else None
    if not isinstance(weights, dict):
        return record
    return {**record, "weights": {uid: _bare(config) for uid, config in weights.items()}}


def _bare(config: Any) -> Any:
    unset = dict.fromkeys(("initializer", "regularizer", "constraint"))
    return {**config, **unset} if isinstance(config, dict) and set(unset) <= set(config) else config


def _variable_dtype(policy: Any) -> str | None:
    """The dtype that a layer's variables have by its policy."""
    name = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
    if isinstance(name, str) and name.startswith("mixed_"):
        return "float32"
    return name if name in ("float16", "bfloat16", "float32", "float64") else None


__all__ = ["StoredLayer", "stored_layers"]

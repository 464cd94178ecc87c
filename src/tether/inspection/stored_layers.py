"""What a file says without its model being made: its values by place, and the layers and ties of its config."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import h5py

from tether import keras_seam
from tether.errors import InvalidConfig, Unsupported, received
from tether.files.keras.archive import dtype_of, objects
from tether.inspection.adapted import Adapters
from tether.inspection.facts import Facts, Shape, Slot, StoredWeight, UseOf, itemsize
from tether.inspection.live import OPTIMIZER, layer_path
from tether.layers.records.record import Record, read_record
from tether.layers.tying.state import WEIGHTS
from tether.layers.tying.tied import KEY
from tether.types import Config
from tether.weights.algebra import is_kept_still
from tether.weights.codec import decode
from tether.weights.expression import Expression, Stored, known_shape, live_weights
from tether.weights.identity import sharing
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- values
# What an HDF5 file of weights holds, by place: the attributes that lead to the object that wrote an entry.


NOTE, UID = "tether", "tether_uid"
"""The attributes beside the entries of a layer, which say what is tied in it, and beside that of a weight."""


class StoredValues:
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
        self.notes: dict[str, Config] = {}
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

    def _read_group(self, place: str, group: h5py.Group) -> None:
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


def _is_number(dtype: object) -> bool:
    try:
        return isinstance(dtype, str) and itemsize(dtype) > 0
    except TypeError:
        return False


def noted_ties(note: object, place: str) -> Config:
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


def written(place: str, graph: Mapping[str, int] | None = None) -> tuple[object, ...]:
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


def _natural(name: str) -> tuple[object, ...]:
    return tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name))


# --------------------------------------------------------------------------- configs
# What the config of a model says of its layers, by their places in the file. A layer is found there by its name.


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
    held: tuple[tuple[str, Stored], ...] = ()
    """The weights that its config holds, by their keys: attributes of a layer of somebody's own."""


def stored_layers(config: Config, values: StoredValues) -> dict[str, StoredLayer]:
    """The layers of a config by their places in the file, a layer before those in it."""
    found: dict[str, StoredLayer] = {}
    _add(config, "", values, found)
    return found


def _add(config: Config, place: str, values: StoredValues, found: dict[str, StoredLayer]) -> None:
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


def _configs(value: Any) -> Iterator[Config]:
    """The configs of objects in a config, but not those in them."""
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, dict) and "class_name" in entry and isinstance(entry.get("config"), dict):
            yield entry
        elif isinstance(entry, (dict, list)):
            yield from _configs(entry)


def _held(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Stored]]:
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(entry, dict) and entry.get("registered_name") == WEIGHT:
            yield "/".join((*path, str(key))), Weight.from_config(_bare(entry.get("config")))
        elif isinstance(entry, list) or (isinstance(entry, dict) and "class_name" not in entry and key != KEY):
            yield from _held(entry, (*path, str(key)))


def _without_values(record: Any) -> object:
    """A record whose weights start with nothing, so that reading it makes no variable."""
    weights = record.get("weights") if isinstance(record, dict) else None
    if not isinstance(weights, dict):
        return record
    return {**record, "weights": {uid: _bare(config) for uid, config in weights.items()}}


def _bare(config: object) -> Any:
    unset = dict.fromkeys(("initializer", "regularizer", "constraint"))
    return {**config, **unset} if isinstance(config, dict) and set(unset) <= set(config) else config


def _variable_dtype(policy: object) -> str | None:
    """The dtype that a layer's variables have by its policy."""
    name = policy.get("config", {}).get("name") if isinstance(policy, dict) else policy
    if isinstance(name, str) and name.startswith("mixed_"):
        return "float32"
    return name if name in ("float16", "bfloat16", "float32", "float64") else None


# --------------------------------------------------------------------------- layers
# What an HDF5 file of values says of layers and weights, with what the config says of them.
#
# What is tied is said twice: by path and attribute in the config of the layer on which the tie was made, and in notes
# beside the entries of the layer that reads, by the number of the variable in whose place it is. Files of weights
# alone have the notes; files that an older Tether wrote have only the config.


_MOST = 10_000
"""More variables than a layer has of its own: weights that it holds come after them."""


def stored_facts(name: str, values: StoredValues, layers: dict[str, StoredLayer], known: dict[str, Stored]) -> Facts:
    """The facts of what a file holds, and of what a config says of it.

    Args:
        name: What the facts are of.
        values: What the file holds.
        layers: What the config says of layers, by their places.
        known: The weights that the config names, by the ids that the notes name them by too.
    """
    return _Reading(values, layers, known).facts(name)


class _Reading:
    """Uses and weights of one file, found step by step."""

    def __init__(self, values: StoredValues, layers: dict[str, StoredLayer], known: dict[str, Stored]) -> None:
        self.values, self.layers = values, layers
        self.known = dict(known)
        self.numbers = {place: number for number, place in enumerate(layers)}
        self.uses: list[tuple[str, int, UseOf]] = []
        """The place of a layer, the number of a variable in it, and the use."""
        self.held: list[tuple[str, str, Stored]] = []
        """The places of layers that hold weights as attributes, the attribute and the weight."""
        self.weights: dict[str, Stored] = {}
        """The weights that ties name, by their places."""
        self.adapters = Adapters()

    def facts(self, name: str) -> Facts:
        values = self.values
        places = sorted(values.tensors, key=lambda place: written(place, self.numbers))
        held = [place for place in places if not place.startswith(OPTIMIZER)]
        self._read_ties(held)
        self._read_own(held)
        self.uses.sort(key=lambda entry: (self._rank(entry[0]), entry[1]))
        uses = tuple(use for _, _, use in self.uses)
        by_place: dict[str, list[UseOf]] = {}
        for use in uses:
            for place in use.weights:
                by_place.setdefault(place, []).append(use)
        at = {use.layer: place for place, _, use in reversed(self.uses)}
        untold = any(_hangs(place) and place not in self.weights for place in held)
        weights = tuple(self._weight(place, by_place.get(place, [])) for place in held)
        found = {weight: place for place, weight in self.weights.items()}
        return Facts(
            name=name,
            weights=weights,
            uses=uses,
            optimizer=tuple(Slot(place, *values.tensors[place]) for place in places if place.startswith(OPTIMIZER)),
            layers=tuple((layer, self._kind(at[layer])) for layer in dict.fromkeys(use.layer for use in uses)),
            ties=bool(self.layers or values.notes) and not untold,
            adapters=self.adapters.found(weights, found.get),
        )

    def _rank(self, place: str) -> tuple[object, ...]:
        """Layers as the config has them, within one by the numbers in the names."""
        known = (self.numbers[above] for above in _upwards(place) if above in self.numbers)
        return (next(known, len(self.numbers)), *written(place))

    def _kind(self, place: str) -> str | None:
        return self.layers[place].kind if place in self.layers else None

    def _around(self, place: str) -> StoredLayer | None:
        """What the config says of the layer at a place, or of the nearest around it."""
        return next((self.layers[above] for above in _upwards(place) if above in self.layers), None)

    def _trains(self, place: str) -> bool | None:
        """Whether the variables of the layer at a place train, as far as the config tells."""
        layer = self._around(place)
        if layer is None or layer.trainable is None:
            return None
        if not layer.trainable:
            return False if place in self.layers else None
        return True if layer.all_train else None

    # ------------------------------------------------------------------ ties

    def _read_ties(self, held: list[str]) -> None:
        users: dict[Stored, list[str]] = {}
        recorded = list(self._recorded(users))
        noted = list(self._noted(users))
        places = self._find(users, held)
        self.weights = {place: weight for weight, place in places.items()}
        waiting: dict[tuple[Expression, str], deque[int]] = {}
        for position, (place, _, expression) in enumerate(recorded):
            waiting.setdefault((expression, place), deque()).append(position)
        for place, key, expression, dtype in noted:
            # The one that was found exactly here, or else the first that is known to be somewhere below its recorder.
            here, *above = (waiting.get((expression, at)) for at in _upwards(place))
            first = here or min(filter(None, above), key=lambda positions: positions[0], default=None)
            known = recorded[first.popleft()][1].rpartition("/")[2] if first else None
            attribute = known if known is not None or key.isdigit() else key
            self._add_tie(place, attribute, expression, places, dtype=dtype, number=int(key) if key.isdigit() else 0)
        for place, attribute, expression in () if noted else recorded:
            if all(weight in places for weight in expression.weights_used()):
                self._add_tie(place, attribute, expression, places)
        self._read_held(users, places)

    def _recorded(self, users: dict[Stored, list[str]]) -> Iterator[tuple[str, str, Expression]]:
        """The ties in configs: the place of the layer, what of the path is left from there, the expression."""
        for recorder, layer in self.layers.items():
            for attribute, weight in layer.held:
                self.held.append((recorder, attribute, weight))
                users.setdefault(weight, [])
            if layer.record is None:
                continue
            for *_, owned in layer.record.penalties:
                for weight in owned:
                    users.setdefault(weight, []).append(recorder)
            for path, expression in layer.record.ties.items():
                *steps, attribute = path.split("/")
                place, left = self.values.follow(recorder, steps)
                for weight in expression.weights_used():
                    users.setdefault(weight, []).append(place)
                yield place, "/".join([*left, attribute]), expression

    def _noted(self, users: dict[Stored, list[str]]) -> Iterator[tuple[str, str, Expression, str]]:
        """The ties in notes: the place of the layer, the key of the missing entry, the expression, its dtype."""
        values = self.values
        for uid, entry in values.uids.items():
            if uid not in self.known and entry in values.tensors:
                shape, dtype = values.tensors[entry]
                with sharing():
                    self.known[uid] = Weight(shape, dtype=dtype, name=values.names.get(owner_of(entry), "weight"))
        for place, ties in values.notes.items():
            for key, tie in ties.items():
                expression = decode(tie["steps"], self.known)
                for weight in expression.weights_used():
                    users.setdefault(weight, []).append(place)
                yield place, key, expression, tie["dtype"]

    def _find(self, users: dict[Stored, list[str]], held: list[str]) -> dict[Stored, str]:
        """The places of weights: on a layer that reads them, or where a layer of somebody's own holds them."""
        by_name: dict[str, list[str]] = {}
        for place in held:
            by_name.setdefault(self.values.names.get(owner_of(place), ""), []).append(place)
        holders = {weight: f"{holder}/{attribute}/" for holder, attribute, weight in self.held}
        entries = {self.known[uid]: place for uid, place in self.values.uids.items() if uid in self.known}
        found = {weight: place for weight, place in entries.items() if place in self.values.tensors}
        taken = set(found.values())
        for weight, layers in users.items():
            if weight in found:
                continue
            fits = [
                place
                for place in by_name.get(weight.name, ())
                if place not in taken and weight.shape in (None, self.values.tensors[place][0])
            ]
            hanging = [place for place in fits if any(place.startswith(_hanging(layer)) for layer in layers)]
            held_at = [place for place in fits if weight in holders and place.startswith(holders[weight])]
            chosen = next(iter(held_at or hanging or [place for place in fits if not _hangs(place)]), None)
            if chosen is not None:
                found[weight] = chosen
                taken.add(chosen)
        return found

    def _read_held(self, users: dict[Stored, list[str]], places: dict[Stored, str]) -> None:
        """The uses of weights that layers hold as attributes, unless they hold them to tie them to what is below."""
        known = {(holder, weight) for holder, _, weight in self.held}
        for place, weight in self.weights.items():
            holder, _, attribute = owner_of(place).rpartition("/")
            if not _hangs(place) and not any(place.startswith(f"{other}/") for other, one in known if one is weight):
                self.held.append((holder, attribute, weight))
        for holder, attribute, weight in self.held:
            below = f"{holder}/" if holder else ""
            of_ties = users.get(weight, [])
            if weight not in places or any(user == holder or user.startswith(below) for user in of_ties):
                continue
            layer = self._around(holder)
            free = layer.trainable if layer is not None and not of_ties else None
            use = UseOf(
                layer=layer_path(holder, self.values.names),
                attribute=attribute,
                expression=weight.notation(),
                weights=(places[weight],),
                shape=self.values.tensors[places[weight]][0],
                dtype=self.values.tensors[places[weight]][1],
                kind=self._kind(holder),
                trains=free if weight.trainable_flag else False,
            )
            self.uses.append((holder, len(self.uses) + _MOST, use))

    def _add_tie(
        self,
        place: str,
        attribute: str | None,
        expression: Expression,
        places: dict[Stored, str],
        *,
        dtype: str | None = None,
        number: int | None = None,
    ) -> None:
        weights = expression.weights_used()
        if dtype is None:
            layer = self._around(place)
            dtype = expression.dtype or "float32"
            if layer is not None and layer.dtype is not None and keras_seam.is_float(dtype):
                dtype = layer.dtype
        if number is None:
            taken = {other for at, other, _ in self.uses if at == place} | self._own_numbers(place)
            number = next(n for n in range(len(taken) + 1) if n not in taken)
        flag = self._trains(place)
        live = set(live_weights(expression))
        reached = [w for w in live if w.trainable_flag and keras_seam.is_float(w.dtype or "float32")]
        stopped = tuple(places[w] for w in weights if not flag or w not in live)
        use = UseOf(
            layer=layer_path(place, self.values.names),
            attribute=attribute,
            expression=expression.notation(),
            weights=tuple(places[weight] for weight in weights),
            shape=known_shape(expression),
            dtype=dtype,
            kind=self._kind(place),
            tied=True,
            trains=None if flag is None and reached else bool(flag and reached),
            stopped=None if flag is None else stopped,
            kept_still=is_kept_still(expression),
        )
        self.uses.append((place, number, use))
        self.adapters.see(use.where, expression)

    def _own_numbers(self, place: str) -> set[int]:
        """The numbers that a layer's own variables have in the file; ties have left out theirs."""
        below = f"{place}/vars/" if place else "vars/"
        return {int(key) for p in self.values.tensors if (key := p.removeprefix(below)).isdigit()}

    # ------------------------------------------------------------------ the others

    def _read_own(self, held: list[str]) -> None:
        for place in held:
            owner, key = owner_of(place), place.rpartition("/")[2]
            shape, dtype = self.values.tensors[place]
            if place not in self.weights and not _hangs(place) and not self.values.is_state(place):
                flag = self._trains(owner) if keras_seam.is_float(dtype) else None
                layer, attribute = layer_path(owner, self.values.names), None if key.isdigit() else key
                use = UseOf(layer, attribute, None, (place,), shape, dtype, kind=self._kind(owner), trains=flag)
                self.uses.append((owner, int(key) if key.isdigit() else 0, use))

    def _weight(self, place: str, uses: list[UseOf]) -> StoredWeight:
        """A weight; whether it trains, if its uses tell."""
        shape, dtype = self.values.tensors[place]
        weight, state = self.weights.get(place), self.values.is_state(place)
        path = None
        if weight is not None:
            path = weight.get_config()["path"] or weight.name
        elif _hangs(place):
            path = self.values.names.get(owner_of(place))
        trainable = None
        if state or (weight is not None and not weight.trainable_flag):
            trainable = False
        elif uses:
            ties = [use for use in uses if use.tied]
            said = [use.trains and place not in (use.stopped or ()) for use in ties or uses]
            trainable = True if True in said else None if None in said else False
        return StoredWeight(place, shape, dtype, path=path, trainable=trainable, state=state)


def _hanging(layer: str) -> str:
    return f"{layer}/{WEIGHTS}/" if layer else f"{WEIGHTS}/"


def _hangs(place: str) -> bool:
    """Whether an entry is of a weight that a tied layer lists, and nothing else holds."""
    return f"/{WEIGHTS}/" in f"/{place}"


def _upwards(place: str) -> Iterator[str]:
    """A place and those around it, the nearest first."""
    while place:
        yield place
        place = place.rpartition("/")[0]
    yield ""


__all__ = ["NOTE", "StoredLayer", "StoredValues", "noted_ties", "owner_of", "stored_facts", "stored_layers", "written"]

"""The file of adapters, mostly of one: safetensors, with a header that says in which weights its parts are.

Weights are named as a person knows them: by the names of layers. So an adapter that was trained in a classifier goes to
the same weights of the backbone alone, or of a classifier with another head.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import partial
from typing import Any, TypeVar

import keras

from tether import keras_seam, patterns
from tether.adapters import slotted
from tether.adapters.manage import (
    Freeze,
    adapt,
    adapted_weights,
    check,
    check_known,
    check_new_name,
    strengths,
    taken_apart,
)
from tether.adapters.slotted import Part
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, listed, no_file, received
from tether.files.keras.archive import reading
from tether.files.keras.load import making
from tether.files.loading.assignment import Assignment, check_fit
from tether.files.loading.entries import Entry, entry_of
from tether.files.loading.matching import as_offer
from tether.files.peft.peft_loading import opened_peft
from tether.files.tensors.dialects import Names
from tether.files.tensors.tensor_file import TensorFile, write_tensors
from tether.inspection.adapted import Adapters
from tether.inspection.facts import Facts, StoredWeight
from tether.layers.family.named import named_weights, names_apart
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import weight_of
from tether.types import AnyLayer, Array, Config
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.identity import sharing
from tether.weights.weight import Weight, check_config

_VERSIONS = (1, 2)
"""Version 1 named weights by positions in lists of layers, and tensors by the weights' ids."""
_VERSION_OF_SEVERAL = 3
"""Of a file with several adapters: each is as one of the last version, and their tensors stand side by side."""
_FORMAT = "tether.adapter"
_MAX_HEADER = 1 << 26
_Made = TypeVar("_Made")


# --------------------------------------------------------------------------- writing


def save(model: keras.Layer, name: str | Sequence[str], path: str | os.PathLike[str]) -> None:
    """Writes one adapter or several, and nothing of the base, to a safetensors file.

    Of a model that is split over several processes (JAX), all of them call it, and the first one writes.

    Args:
        model: The model.
        name: The adapter, or a list of adapters, which `load` adds together. One in a slot (`capacity`) is written as
            others are, with the rank of the slot.
        path: Where to, with the ending `.safetensors`. Written beside and renamed.

    Raises:
        UnknownName: The model has no adapter of this name.
        TetherError: The path has another ending, or its folder does not exist.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.save(model, "french", "french.safetensors")
    ```
    """
    target = pathlib.Path(path)
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise TetherError(
            "An adapter is saved in a file that ends in '.safetensors', in a folder that exists. "
            f"{received(path=str(path))}"
        )
    several = [name] if isinstance(name, str) else list(name)
    if not several or len(set(several)) < len(several):
        raise TetherError(f"What is saved is an adapter, or a list of several. {received(name=name)}")
    in_slots, places = slotted.names_in(model), slotted.slotted_weights(model)
    check_known(model, [each for each in several if each not in in_slots])
    addresses = names_apart(named_weights(model))
    taken: set[str] = set()
    headers, tensors = [], []
    for each in several:
        found = _in_slot(places, in_slots[each]) if each in in_slots else _adapted(model, each)
        header, weights = _header(each, found, addresses, taken)
        headers.append(header)
        tensors += [entry_of(weight.variable, header["keys"][uid]) for uid, weight in weights.items()]
    content: object = headers[0] if len(headers) == 1 else {"version": _VERSION_OF_SEVERAL, "adapters": headers}
    with keras_seam.in_step_for(model, f"adapters.save({target.name!r})"):
        write_tensors(target, tensors, {"format": _FORMAT, "adapter": json.dumps(content)})


@dataclass(frozen=True)
class _Found:
    """What an adapter is in a model: by path what it adds, and the weights of the base."""

    strength: float
    parts: dict[str, Expression]
    bases: dict[str, list[Stored]]


def _adapted(model: keras.Layer, name: str) -> _Found:
    found = {path: each for path, each in adapted_weights(model).items() if name in each.parts}
    return _Found(
        strengths(model)[name],
        {path: each.parts[name][1] for path, each in found.items()},
        {path: list(each.base.weights_used()) for path, each in found.items()},
    )


def _in_slot(places: Mapping[str, slotted.Slotted], number: int) -> _Found:
    parts = slotted.part_of(places.values(), number)
    return _Found(1.0, parts, {path: list(places[path].base.weights_used()) for path in parts})


def _header(
    name: str, found: _Found, addresses: Mapping[str, str], taken: set[str]
) -> tuple[Config, dict[str, Stored]]:
    """What a file says of an adapter, and the weights that it holds of it."""
    parts = {addresses[path]: part for path, part in found.parts.items()}
    bases = {addresses[path]: base for path, base in found.bases.items()}
    weights: dict[str, Stored] = {}
    for address, part in parts.items():
        of_base = {weight.uid for weight in bases[address]}
        weights.update({weight.uid: weight for weight in part.weights_used() if weight.uid not in of_base})
    keys: dict[str, str] = {}
    for uid, weight in weights.items():
        keys[uid] = keras_seam.numbered(weight.path, taken)
        taken.add(keys[uid])
    header = {
        "version": _VERSIONS[-1],
        "name": name,
        "strength": found.strength,
        "ties": {address: encode(part) for address, part in parts.items()},
        "positions": {addresses[path]: path for path in found.parts},
        "bases": {address: [weight.uid for weight in base] for address, base in bases.items()},
        "weights": {uid: weight.get_config() for uid, weight in weights.items()},
        "keys": keys,
    }
    return header, weights


# --------------------------------------------------------------------------- reading


def load(
    model: AnyLayer,
    path: str | os.PathLike[str],
    /,
    *,
    name: str | None = None,
    names: Names = None,
    freeze: Freeze = "adapted",
    trainable: bool = True,
    replace: bool = False,
) -> AnyLayer:
    """Adds the adapter of a file, or of a folder of PEFT's, to a model, in place, at the strength that it had.

    Of a file with several all are added. In a model with slots (`capacity`) each takes a free one.

    The weights are found by the names of their layers. The model may be a part of the one that the adapter was saved
    from, contain it, or have another head: what counts is where the names agree, and that there is one such place.

    Args:
        model: A built model with weights of the same names and shapes as the one that it was saved from.
        path: The file, or the folder.
        name: What to call it here; the name in the file, or that of the folder, if left out. Several keep their names.
        names: What the weights are called where a folder comes from, as for `tether.files.load_peft`.
        freeze: As for `add`.
        trainable: Whether it trains here.
        replace: Whether it takes the place of an adapter of its name, if there is one.

    Returns:
        The model.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        Unsupported: A folder asks for what would change the values and is not read.
        UnknownName: The model lacks weights that the adapter changes, or has several places for them.
        ShapeMismatch: One of them has another shape.
        TetherError: The name is taken.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.save(model, "french", "french.safetensors")
    tether.adapters.load(model, "french.safetensors", name="fr", trainable=False)
    ```
    """
    check(model, "load")
    if pathlib.Path(path).is_dir():
        name = pathlib.Path(path).resolve().name if name is None else name
        check_new_name(model, name, replace)
        with opened_peft(model, path, names, trainable=trainable) as opened, Rollback.below(model):
            parts = opened.parts(model)
            if places := slotted.slotted_weights(model):
                made = slotted.made_of(places, parts, name)
                opened.assign()
                parts = {path: partial(_as_made, part) for path, part in made.items()}
            adapt(model, name, 1.0, parts, freeze=freeze, trainable=trainable)
            opened.assign()
        return model
    if places := slotted.slotted_weights(model):
        return _load_into_slots(model, places, path, name, trainable=trainable, replace=replace)
    taken = {variable.path for variable in model.weights}
    found = _read_file(path, partial(_weights_of, taken=taken))
    called = _names_of(found, path, name)
    for each in called:
        check_new_name(model, each, replace)
    with Rollback.below(model):
        for each, (header, weights) in zip(called, found, strict=True):
            parts = _parts(model, each, header, weights)
            adapt(model, each, header["strength"], parts, freeze=freeze, trainable=trainable)
    return model


def _as_made(part: Expression, base: Expression) -> Expression:
    return part


def _parts(model: keras.Layer, name: str, header: Config, weights: Mapping[str, Weight]) -> dict[str, Part]:
    """What makes the part of each weight that an adapter of a file changes, by path."""
    found = _places(model, header, name)
    return {place: partial(_read_part, model, place, address, header, weights) for address, place in found.items()}


def _names_of(found: Sequence[tuple[Config, object]], path: str | os.PathLike[str], name: str | None) -> list[str]:
    """What the adapters of a file will be called."""
    called = [header["name"] for header, _ in found]
    if name is not None and len(found) > 1:
        names = listed(map(repr, called), 6)
        raise TetherError(f"{str(path)!r} holds {len(found)} adapters, which keep their names: {names}. Omit `name`.")
    return called if name is None else [name]


def _load_into_slots(
    model: AnyLayer,
    places: Mapping[str, slotted.Slotted],
    path: str | os.PathLike[str],
    name: str | None,
    *,
    trainable: bool,
    replace: bool,
) -> AnyLayer:
    """Copies the adapters of a file to slots of a model: all or none."""
    found = _read_file(path, _arrays_of)
    called = _names_of(found, path, name)
    for each in called:
        check_new_name(model, each, replace)
    numbers = slotted.slots_for(places, called, trainable)
    contents = []
    for each, (header, (weights, arrays)) in zip(called, found, strict=True):
        made = slotted.made_of(places, _parts(model, each, header, weights), each)
        contents.append(slotted.content_of(places, made, each, header["strength"], arrays))
    for each, number, content in zip(called, numbers, contents, strict=True):
        slotted.fill_slot(model, places, number, each, content)
    return model


def _places(model: keras.Layer, header: Config, name: str) -> dict[str, str]:
    """The path in the model of each weight that a file names.

    Raises:
        UnknownName: There is none for some, or more than one.
    """
    weights = named_weights(model)
    wanted = list(header["ties"])
    known = {weight.path: weight.path for weight in weights}
    if header["version"] > 1:
        known.update({address: place for place, address in names_apart(weights).items()})
    if all(address in known for address in wanted):
        return {address: known[address] for address in wanted}
    moved = _below_another(wanted, known)
    if len(moved) == 1:
        return moved[0]
    positions = header.get("positions", {})
    if not moved and all(map(_was_numbered, wanted)) and all(positions.get(each) in known for each in wanted):
        return {address: positions[address] for address in wanted}
    if moved:
        places = ", ".join(repr(next(iter(each.values()))) for each in moved[:4])
        raise UnknownName(
            f"{model.name!r} has several places for the weights of the adapter {name!r}, such as {places} for "
            f"{wanted[0]!r}. Load it into the part that it is for: `adapters.load(model.get_layer(...), ...)`."
        )
    missing = [address for address in wanted if address not in known]
    raise UnknownName(
        f"{model.name!r} lacks {len(missing)} of the {len(wanted)} weights that the adapter {name!r} changes, such as "
        f"{missing[0]!r}. {patterns.missed(missing[0], (weight.name for weight in weights))}"
    )


def _below_another(wanted: Sequence[str], known: Mapping[str, str]) -> list[dict[str, str]]:
    """The places of weights that stand below other layers than in the file: all below one, by the same names."""
    split = [address.split("/") for address in wanted]
    for dropped in range(max(1, min(map(len, split)) - 1)):
        if len({tuple(each[:dropped]) for each in split}) > 1:
            break
        rests = ["/".join(each[dropped:]) for each in split]
        heads = [address.removesuffix(rests[0]) for address in known if f"/{address}".endswith(f"/{rests[0]}")]
        fitting = [head for head in heads if all(head + rest in known for rest in rests)]
        if fitting:
            found = [{a: known[head + r] for a, r in zip(wanted, rests, strict=True)} for head in fitting]
            return [each for place, each in enumerate(found) if each not in found[:place]]
    return []


def _was_numbered(address: str) -> bool:
    """Whether a layer on the way to a weight has a name that Keras made up, which is another in each process."""
    return any(re.sub(r"_\d+$", "", each) in _automatic_names() for each in address.split("/"))


@functools.cache
def _automatic_names() -> frozenset[str]:
    kinds = [*vars(keras.layers).values(), *vars(keras.models).values()]
    return frozenset(keras_seam.to_snake_case(kind.__name__) for kind in kinds if isinstance(kind, type))


def _read_part(
    model: keras.Layer,
    place: str,
    address: str,
    header: Mapping[str, Any],
    weights: Mapping[str, Weight],
    base: Expression,
) -> Expression:
    """The part that a file has for a weight, with this base in the place of the one that it was made for."""
    uids, own = header["bases"].get(address, []), base.weights_used()
    steps = header["ties"][address]
    fits = isinstance(uids, list) and all(isinstance(uid, str) for uid in uids)
    if fits and len(uids) != len(own):  # such as a base that was quantised: it may not be named by the part
        fits = not any(isinstance(step, dict) and step.get("weight") in uids for step in steps or ())
    if not fits:
        present, *_ = taken_apart(weight_of(model, place))
        raise InvalidConfig(f"The adapter was made for another base of {address!r} than {present.notation()}.")
    part = decode(steps, {**weights, **dict(zip(uids, own, strict=False))})
    if part.shape != base.shape:
        raise ShapeMismatch(f"The weight {address!r} has shape {base.shape}, the adapter's part {part.shape}.")
    return part


def _read_file(
    path: str | os.PathLike[str], make: Callable[[Config, Mapping[str, Entry]], _Made]
) -> list[tuple[Config, _Made]]:
    """The header of each adapter in a file that a stranger may have written, and what is made of it.

    Args:
        path: The file.
        make: Makes it, of the header and the file's entries by the weights' uids.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        TetherError: There is no file.
    """
    target = pathlib.Path(path)
    if not target.is_file():
        raise TetherError(no_file(path))
    with open(target, "rb", buffering=0) as opened:
        with reading(target):
            file = TensorFile(opened, target.name)
            headers = read_headers(file.metadata, target)
        rest, found = dict(file.entries), []
        for header in headers:
            own = rest
            if len(headers) > 1:
                own = {key: rest.pop(key) for key in map(str, header["keys"].values()) if key in rest}
            with making(target, header["weights"], what="adapter"):
                found.append((header, make(header, _by_uid(header, own))))
        if len(headers) > 1 and rest:
            raise InvalidConfig(f"{str(path)!r} holds tensors of no adapter, such as {next(iter(rest))!r}.")
        return found


def file_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts of a file of adapters: the weights that it holds, and the adapters.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        TetherError: There is no file.
    """
    stored: list[StoredWeight] = []
    adapters = []
    for header, weights in _read_file(path, _weights_of):
        keys = header.get("keys") or {uid: uid for uid in weights}
        places: dict[Stored, str] = {weight: keys[uid] for uid, weight in weights.items()}
        own = [
            StoredWeight(keys[uid], tuple(w.shape or ()), str(w.dtype), path=w.path, trainable=w.trainable_flag)
            for uid, w in weights.items()
        ]
        seen = Adapters()
        with making(path, header["ties"], what="adapter"):
            for address, steps in header["ties"].items():
                bases = {uid: Weight(name="base") for uid in header["bases"].get(address, ())}
                seen.add(header["name"], address, None, decode(steps, {**weights, **bases}), set(bases.values()))
        (found,) = seen.found(own, places.get)
        stored += own
        adapters.append(replaced(found, strength=header["strength"]))
    name = adapters[0].name if len(adapters) == 1 else pathlib.Path(path).stem
    return Facts(name, tuple(stored), (), adapters=tuple(adapters), ties=False)


def read_headers(metadata: Mapping[str, str], path: pathlib.Path) -> list[Config]:
    """What the header of a file says of each adapter in it.

    Raises:
        InvalidConfig: It is not that of adapters.
    """
    text = metadata.get("adapter", "")
    if metadata.get("format") != _FORMAT or len(text) > _MAX_HEADER:
        raise InvalidConfig(f"{str(path)!r} holds no adapter of Tether's.")
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("version") != _VERSION_OF_SEVERAL:
        return [_checked(content, _VERSIONS, path)]
    several = content.get("adapters")
    if not isinstance(several, list) or len(several) < 2:
        raise InvalidConfig(f"{str(path)!r} says that it holds several adapters, and names fewer than two.")
    found = [_checked(each, _VERSIONS[-1:], path) for each in several]
    if len({header["name"] for header in found}) < len(found):
        raise InvalidConfig(f"{str(path)!r} holds two adapters of one name.")
    return found


def _checked(header: Any, versions: Sequence[int], path: pathlib.Path) -> Config:
    kinds = {"name": str, "strength": float, "ties": dict, "bases": dict, "weights": dict}
    if isinstance(header, dict) and header.get("version") == _VERSIONS[-1]:
        kinds.update(positions=dict, keys=dict)
    if (
        not isinstance(header, dict)
        or header.get("version") not in versions
        or not all(isinstance(header.get(key), kind) for key, kind in kinds.items())
        or not header["ties"]
        or not math.isfinite(header["strength"])
    ):
        raise InvalidConfig(f"{str(path)!r} holds no adapter of a version up to {_VERSION_OF_SEVERAL}.")
    return header


def _by_uid(header: Config, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of an adapter by the uids of its weights."""
    keys = header.get("keys") or {uid: uid for uid in header["weights"]}
    if set(header["weights"]) != set(keys) or sorted(map(str, keys.values())) != sorted(tensors):
        raise InvalidConfig("The file's header names other weights than it holds.")
    for uid, config in header["weights"].items():
        if not isinstance(config, dict) or config.get("uid") != uid:
            raise InvalidConfig(f"A weight's config names its own uid. {received(uid=uid)}")
    return {uid: tensors[keys[uid]] for uid in header["weights"]}


def _weights_of(header: Config, entries: Mapping[str, Entry], taken: Container[str] = ()) -> dict[str, Weight]:
    """The weights of an adapter, by uid; one whose path is taken gets a number."""
    weights = {}
    with sharing():
        for uid, config in header["weights"].items():
            weights[uid] = Weight.from_config(_beside_others(config, taken))
            _check_shape(weights[uid], entries[uid])
    plan = Assignment([as_offer(weight, entries[uid]) for uid, weight in weights.items()], "error")
    plan.check()
    plan.carry_out()
    return weights


def _arrays_of(header: Config, entries: Mapping[str, Entry]) -> tuple[dict[str, Weight], dict[Stored, Array]]:
    """The same for slots, which copy the values: weights that hold none, by uid, and the value of each.

    A layer and a variable of each, as `_weights_of` makes, would be most of the time that an adapter takes to come.
    """
    if any("became" in config for config in header["weights"].values()):  # quantised: more than one weight each
        return _weights_of(header, entries), {}
    weights: dict[str, Weight] = {}
    arrays: dict[Stored, Array] = {}
    count: Counter[object] = Counter()
    for uid, entry in entries.items():
        config = check_config(header["weights"][uid])
        kind = (config["shape"], config["dtype"], config.get("role"))
        weights[uid] = slotted.stand_in(*kind, count[kind])
        count[kind] += 1
        _check_shape(weights[uid], entry)
        check_fit(as_offer(weights[uid], entry))
        arrays[weights[uid]] = entry.read()
    return weights, arrays


def _check_shape(weight: Weight, entry: Entry) -> None:
    if weight.shape != entry.shape:
        raise InvalidConfig(f"A weight of the file has another shape than its header says. {received(key=entry.name)}")


def _beside_others(config: Config, taken: Container[str]) -> Config:
    """The config of a weight with a path that is not taken, and with the same number in its name."""
    path, name = config.get("path"), config.get("name")
    if not isinstance(path, str) or not isinstance(name, str):
        return config
    found = keras_seam.numbered(path, taken)
    return {**config, "path": found, "name": name + found[len(path) :]}


__all__ = ["file_facts", "load", "save"]

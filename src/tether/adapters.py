"""Adapters as people manage them: named, several on one model, on or off, each in a small file of its own.

An adapter adds a part to some of a model's weights: `base + strength · part`. The base is never written to,
whatever is switched, merged or removed. What an adapter is can be read from the model's expressions alone,
so a saved model keeps its adapters, and a file of one adapter holds nothing else.

```python
for language in ("french", "german"):
    tether.adapters.add(model, language, {"*/query/kernel": tether.low_rank(8)})
tether.adapters.save(model, "french", "french.safetensors")      # kilobytes
tether.adapters.set_strengths(model, {"french": 0.3, "german": 0.7})
```
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, received
from tether.files.keras.archive import reading
from tether.files.keras.load import making
from tether.files.loading.assignment import Assignment
from tether.files.loading.entries import Entry, entry_of
from tether.files.loading.matching import as_offer
from tether.files.tensors.safetensors import TensorFile, write_tensors
from tether.forms.form import AddedForm
from tether.layers.family.inherit import changed
from tether.layers.family.named import named_weights, select_all, tie_what_learns
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import View
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie, weight_of, weights_of
from tether.layers.tying.untie import untie
from tether.types import AnyLayer, Config
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression
from tether.weights.identity import sharing
from tether.weights.operators.arithmetic import StopGradient
from tether.weights.operators.choice import Adapted
from tether.weights.weight import Weight

_MERGED = "_tether_merged"


# --------------------------------------------------------------------------- adding and removing


def add(model: AnyLayer, name: str, changes: Mapping[str, Any], /, *, freeze: bool = True) -> AnyLayer:
    """Adds a named adapter to weights of a model, in place. Its strength is 1.

    What was frozen in the model stays frozen, and the adapter learns all the same. A model that has trained has to
    be compiled again before it trains on: its optimizer does not know the new weights.

    Args:
        model: A built Keras model or layer.
        name: What the adapter is called: no name that another adapter of the model has.
        changes: Forms by the weight's path or a pattern: `{"*/query/kernel": tether.low_rank(8)}`. A form that
            is not a sum adds the difference that it makes.
        freeze: Whether the weights that are adapted stop training.

    Returns:
        The model.

    Raises:
        TetherError: The name is taken, the model is merged, or a change is none.
        UnknownName: A pattern fits no weight.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    ```
    """
    _check(model, "add")
    _check_new_name(model, name)
    _check_changes(changes)
    chosen = select_all(model, named_weights(model), changes)
    parts = {weight.path: partial(_delta, change, weight.name) for weight, change in chosen}
    return _adapt(model, name, 1.0, parts, freeze=freeze)


def remove(model: AnyLayer, name: str) -> AnyLayer:
    """Takes an adapter off, in place. The bases stay frozen as they were under it.

    Args:
        model: The model.
        name: The adapter.

    Returns:
        The model.

    Raises:
        UnknownName: The model has no adapter of this name.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.remove(model, "french")
    assert not tether.adapters.names(model)
    ```
    """
    _check(model, "remove")
    _known(model, [name])
    ties = {}
    for path, adapted in _adapted_weights(model).items():
        parts = {key: value for key, value in adapted.parts.items() if key != name}
        if len(parts) < len(adapted.parts):
            ties[path] = _adapted(adapted.base, parts)
    with Rollback.below(model):
        tie(model, ties)
    return model


def _adapt(
    model: keras.Model,
    name: str,
    strength: float,
    parts: Mapping[str, Callable[[Expression], Expression]],
    *,
    freeze: bool,
) -> Any:
    """Adds to weights, by path, the part that a function makes of the weight, all under one strength."""
    found = named_weights(model)
    with Rollback.below(model):
        factor = Weight(np.array(strength, "float32"), trainable=False, name=f"{name}.strength", role="strength")
        ties = {}
        present = weights_of(model, parts)
        for path, part in parts.items():
            base, others = _taken_apart(present[path])
            still = base if isinstance(base, StopGradient) or not freeze else base.stop_gradient()
            ties[path] = _adapted(still, {**others, name: (factor, part(still))})
        tie_what_learns(model, ties, found)
    return model


def _delta(change: object, name: str, base: Expression) -> Expression:
    if isinstance(change, AddedForm):
        return change.delta(base)
    return changed(change, base, name) - base


def _taken_apart(expression: Expression) -> tuple[Expression, dict[str, tuple[Expression, Expression]]]:
    return (expression.base, expression.parts) if isinstance(expression, Adapted) else (expression, {})


def _adapted(base: Expression, parts: Mapping[str, tuple[Expression, Expression]]) -> Expression:
    operands = [operand for pair in parts.values() for operand in pair]
    return Adapted(base, *operands, names=tuple(parts)) if parts else base


# --------------------------------------------------------------------------- what there is


def names(model: keras.Model) -> list[str]:
    """The names of a model's adapters, in the order in which they were added.

    Args:
        model: The model.

    Returns:
        The names; an empty list if it has none.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    assert tether.adapters.names(model) == ["french"]
    ```
    """
    return list(strengths(model))


def strengths(model: keras.Model) -> dict[str, float]:
    """The present strength of each adapter.

    Args:
        model: The model.

    Returns:
        The strengths by name: 1 is on, 0 is off.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    assert tether.adapters.strengths(model) == {"french": 1.0}
    ```
    """
    found: dict[str, float] = {}
    for adapted in _adapted_weights(model).values():
        for name, (strength, _) in adapted.parts.items():
            found.setdefault(name, float(strength.numpy()))
    return found


def set_strengths(model: keras.Model, wanted: Mapping[str, float], /) -> None:
    """Sets how strongly adapters count: 1 is on, 0 is off, several make a weighted sum. Others stay as they are.

    It is one assignment: nothing is compiled again.

    Args:
        model: The model.
        wanted: Strengths by the adapters' names.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: A strength is not a finite number.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.set_strengths(model, {"french": 0.3})
    assert abs(tether.adapters.strengths(model)["french"] - 0.3) < 1e-6
    ```
    """
    _known(model, wanted)
    for name, value in wanted.items():
        _check_strength(name, value)
    for strength, name in _strength_weights(model):
        if name in wanted:
            strength.assign(np.asarray(wanted[name], strength.dtype))


def activate(model: keras.Model, *wanted: str) -> None:
    """Turns adapters on (strength 1), and all others off; without names, all off.

    Args:
        model: The model.
        *wanted: The adapters to turn on.

    Raises:
        UnknownName: The model has no adapter of a name.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.activate(model)             # the base alone
    tether.adapters.activate(model, "french")
    ```
    """
    _known(model, wanted)
    set_strengths(model, {name: float(name in wanted) for name in names(model)})


def _strength_weights(model: keras.Model) -> list[tuple[Weight, str]]:
    found = {}
    for adapted in _adapted_weights(model).values():
        for name, (strength, _) in adapted.parts.items():
            if isinstance(strength, Weight):
                found[id(strength)] = (strength, name)
    return list(found.values())


def _adapted_weights(model: keras.Model) -> dict[str, Adapted]:
    """The expressions with adapters, by path."""
    merged = getattr(model, _MERGED, None)
    if merged:
        return {path: expression for path, expression in merged.items() if isinstance(expression, Adapted)}
    return {
        weight.path: weight.variable.expression
        for weight in named_weights(model)
        if isinstance(weight.variable, View) and isinstance(weight.variable.expression, Adapted)
    }


def _known(model: keras.Model, wanted: Iterable[str]) -> None:
    unknown = [name for name in wanted if name not in names(model)]
    if unknown:
        raise UnknownName(f"{model.name!r} has no adapter {unknown[0]!r}. It has: {_listed(model)}.")


def _listed(model: keras.Model) -> str:
    return ", ".join(names(model)) or "none"


def _check(model: keras.Model, function: str) -> None:
    refuse_layer(f"adapters.{function}", model)
    if not model.built:
        raise TetherError(f"{model.name!r} is not built yet. Call it on data first, or `build` it.")
    if getattr(model, _MERGED, None):
        raise TetherError(f"The adapters of {model.name!r} are merged. Take them apart first: `unmerge(model)`.")


def _check_new_name(model: keras.Model, name: object) -> None:
    if not isinstance(name, str) or not name or name in names(model):
        raise TetherError(f"An adapter has a name of its own; the model has: {_listed(model)}. {received(name=name)}")


def _check_changes(changes: object) -> None:
    if not isinstance(changes, Mapping) or not changes:
        raise TetherError(f"An adapter changes weights by name or pattern. {received(changes=changes)}")


def _check_strength(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise TetherError(f"A strength is a finite number. {received(**{name: value})}")


# --------------------------------------------------------------------------- merging


def merge(model: AnyLayer) -> AnyLayer:
    """Gives the weights with adapters plain variables of their present values, in place, until `unmerge`.

    Nothing that is stored is written to, so merging and taking apart loses not a bit, however often. For a plain
    copy of the whole model use `tether.materialize`.

    Args:
        model: A built model.

    Returns:
        The model, which computes what it did, as fast as without adapters.

    Raises:
        TetherError: The model is not built, or is merged already.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.merge(model)
    model.predict(x, verbose=0)
    tether.adapters.unmerge(model)
    ```
    """
    _check(model, "merge")
    adapted = _adapted_weights(model)
    if adapted:
        with Rollback.below(model):
            untie(model, *adapted)
            keras_seam.set_untracked(model, _MERGED, dict(adapted))
    return model


def unmerge(model: AnyLayer) -> AnyLayer:
    """Makes the expressions again that `merge` replaced, in place.

    Args:
        model: A model whose adapters were merged.

    Returns:
        The model.

    Raises:
        TetherError: The model is not merged.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.merge(model)
    tether.adapters.unmerge(model)
    assert tether.adapters.names(model) == ["french"]
    ```
    """
    merged = getattr(model, _MERGED, None)
    if not merged:
        raise TetherError(f"The adapters of {model.name!r} are not merged.")
    with Rollback.below(model):
        tie(model, merged)
        keras_seam.set_untracked(model, _MERGED, {})
    return model


# --------------------------------------------------------------------------- files


def save(model: keras.Model, name: str, path: str | os.PathLike[str]) -> None:
    """Writes one adapter, and nothing of the base, to a safetensors file.

    Args:
        model: The model.
        name: The adapter.
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
    _known(model, [name])
    parts, bases = {}, {}
    for place, adapted in _adapted_weights(model).items():
        if name in adapted.parts:
            _, parts[place] = adapted.parts[name]
            bases[place] = list(adapted.base.weights_used())
    _write_file(target, name, strengths(model)[name], parts, bases)


def load(model: keras.Model, path: str | os.PathLike[str], /, *, name: str | None = None, freeze: bool = True) -> Any:
    """Adds the adapter of a file to a model, in place, at the strength that it was saved with.

    Args:
        model: A built model with weights of the same paths and shapes as the one that it was saved from.
        path: The file.
        name: What to call it here; the name in the file if left out.
        freeze: As for `add`.

    Returns:
        The model.

    Raises:
        InvalidConfig: The file is damaged, or holds no adapter.
        UnknownName: The model lacks a weight that the adapter changes.
        ShapeMismatch: One of them has another shape.
        TetherError: The name is taken.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.save(model, "french", "french.safetensors")
    tether.adapters.load(model, "french.safetensors", name="copy")
    assert tether.adapters.names(model) == ["french", "copy"]
    ```
    """
    _check(model, "load")
    header, weights = _read_file(path, {variable.path for variable in model.weights})
    name = header["name"] if name is None else name
    _check_new_name(model, name)
    for place in header["ties"]:
        if paths.locate(model, paths.split(place)).variable is None:
            raise UnknownName(f"{model.name!r} has no weight {place!r}, which the adapter {name!r} changes.")
    parts = {place: partial(_read_part, model, place, header, weights) for place in header["ties"]}
    return _adapt(model, name, header["strength"], parts, freeze=freeze)


def _read_part(
    model: keras.Model, place: str, header: Mapping[str, Any], weights: Mapping[str, Weight], base: Expression
) -> Expression:
    """The part that a file has for a weight, with this base in the place of the one that it was made for."""
    uids, own = header["bases"].get(place, []), base.weights_used()
    steps = header["ties"][place]
    fits = isinstance(uids, list) and all(isinstance(uid, str) for uid in uids)
    if fits and len(uids) != len(own):  # such as a base that was quantised: it may not be named by the part
        fits = not any(isinstance(step, dict) and step.get("weight") in uids for step in steps or ())
    if not fits:
        present, _ = _taken_apart(weight_of(model, place))
        raise InvalidConfig(f"The adapter was made for another base of {place!r} than {present.notation()}.")
    part = decode(steps, {**weights, **dict(zip(uids, own, strict=False))})
    if part.shape != base.shape:
        raise ShapeMismatch(f"The weight {place!r} has shape {base.shape}, the adapter's part {part.shape}.")
    return part


# --------------------------------------------------------------------------- the file of one adapter
# The file of one adapter: safetensors, with a header that says in which weights its parts are.


_VERSION = 1
_FORMAT = "tether.adapter"
_MAX_HEADER = 1 << 26


def _write_file(
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
        "version": _VERSION,
        "name": name,
        "strength": strength,
        "ties": {place: encode(part) for place, part in parts.items()},
        "bases": {place: [weight.uid for weight in base] for place, base in bases.items()},
        "weights": {uid: weight.get_config() for uid, weight in weights.items()},
    }
    tensors = [entry_of(weight.variable, uid) for uid, weight in weights.items()]
    write_tensors(target, tensors, {"format": _FORMAT, "adapter": json.dumps(header)})


def _read_file(path: str | os.PathLike[str], taken: Container[str] = ()) -> tuple[dict[str, Any], dict[str, Weight]]:
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
        or header.get("version") != _VERSION
        or not all(isinstance(header.get(key), kind) for key, kind in kinds.items())
        or not header["ties"]
        or not math.isfinite(header["strength"])
    ):
        raise InvalidConfig(f"{str(path)!r} holds no adapter of version {_VERSION}.")
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


__all__ = ["activate", "add", "load", "merge", "names", "remove", "save", "set_strengths", "strengths", "unmerge"]

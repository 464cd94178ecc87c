"""Models as safetensors: each stored weight once, with what is tied in the header."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, TetherError, received
from tether.files import bert
from tether.files.entries import Entry, StoredTie, entry_of, stored_ties
from tether.files.filling import Resolve, check_resolve, fill
from tether.files.naming import Names, Naming, to_file
from tether.files.offering import of_one_structure, offers_of
from tether.files.positions import Position, check_built, named_positions, stored_names, tied_names, wanted
from tether.files.report import Conflict, Report
from tether.files.tensors import opened_tensors, write_tensors
from tether.layers.family.named import named_weights
from tether.layers.tying.state import weights_below
from tether.weights.codec import encode
from tether.weights.weight import Weight

PLAN = "tether"
"""The key of the header's metadata under which the sharing plan is."""
MAX_PLAN = 1 << 26
_PART = 1 << 20
_PAIRS = (
    bert.TIED,
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
)
"""What `tie_word_embeddings` speaks of: an embedding, and the kernel of a head."""


def save_safetensors(model: Any, path: str | os.PathLike[str], *, names: Names = None) -> None:
    """Writes the weights of a model, each once and in its own dtype, as safetensors.

    A weight has the name of the first layer that uses it as it is, with dots (`encoder.dense.kernel`), or that adds
    to it (`w + tether.low_rank(8)`); others have their paths. What is made of weights is in the header, so that
    `load_safetensors` can fill models that are tied otherwise, or whose weights have other names. Any reader of
    safetensors reads the file. It is written beside the target, tensor by tensor, and renamed.

    Args:
        model: A built Keras model or layer.
        path: Where to, with the ending `.safetensors`.
        names: What the weights are called in the file: a mapping from the model's names, a function of a name, or
            `"bert"` for Hugging Face's names. It gives a name, a `Tensor` that says how it is laid out, or `None` to
            leave the weight out.

    Raises:
        TetherError: The path has another ending, its folder does not exist, or two weights get one name.

    Example:
    ```python
    tether.files.save_safetensors(model, "model.safetensors")
    ```
    """
    check_built("save_safetensors", model)
    target = pathlib.Path(path)
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise TetherError(
            "Tensors are saved in a file that ends in '.safetensors', in a folder that exists. "
            f"{received(path=str(path))}"
        )
    stored = stored_names(model)
    naming = Naming(names, frozenset(stored.values()))
    weights = [entry_of(variable, stored[id(variable)]) for variable in model.weights]
    tensors = to_file(weights, naming)
    plan = _plan(model, stored, naming)
    metadata = {"format": "pt"}  # how others name the layout of plain arrays
    if plan["ties"]:
        metadata[PLAN] = json.dumps(plan)
    write_tensors(target, tensors, metadata)


def _plan(model: Any, stored: Mapping[int, str], naming: Naming) -> dict[str, Any]:
    """Which layer has what in the place of a stored weight, where the file has the weights as they are."""
    plain: dict[str, str] = {}
    for weight in weights_below(model):
        if weight.is_built and id(weight.variable) in stored:
            tensors = naming.of(stored[id(weight.variable)])
            if tensors and tensors[0].is_plain:
                plain[weight.uid] = tensors[0].names[0]
    ties, used = {}, set()
    for name, view in tied_names(model).items():
        uids = {weight.uid for weight in view.expression.weights_used()}
        if uids <= set(plain):
            used |= uids
            ties[name] = {"dtype": keras_seam.stored_dtype(view), "steps": encode(view.expression)}
    return {"version": 1, "weights": {uid: plain[uid] for uid in plain if uid in used}, "ties": ties}


def load_safetensors(
    model: Any, path: str | os.PathLike[str], *, names: Names = None, resolve: Resolve = "error", strict: bool = True
) -> Report:
    """Loads the weights of a model by name from safetensors, whatever is tied in it or in the file.

    The file is mapped into memory and loaded tensor by tensor. Names are those of `save_safetensors`, or what layers
    call their weights. A name of a weight to which an adapter was added (`w + tether.low_rank(8)`) means the weight.
    If anything is wrong, the model is as it was.

    Args:
        model: A built Keras model or layer.
        path: A `.safetensors` file, or the `.safetensors.index.json` of several.
        names: What the weights are called in the file, as for `save_safetensors`. Where it gives a list, all that
            the file has of it must agree.
        resolve: What is loaded where values of one weight differ, as for `load_untied`.
        strict: Whether it is an error that the file has tensors for which the model has no place, or none for one
            of its weights other than an adapter's.

    Returns:
        What was loaded from what, what was skipped or is missing, and what differed. Where a `config.json` beside the
        file says by `tie_word_embeddings` something else than the tensors, that is reported, and the tensors hold.

    Raises:
        ValueConflict: Values of one weight differ and `resolve` is `"error"`.
        ShapeMismatch: A tensor has another shape.
        InvalidConfig: The file is damaged.
        TetherError: It does not fit and `strict` is set, or there is no such file.

    Example:
    ```python
    backbone = keras_hub.models.BertBackbone(...)
    tether.files.load_safetensors(backbone, "model.safetensors", names="bert")
    ```
    """
    check_built("load_safetensors", model)
    check_resolve(resolve)
    named = named_weights(model)
    found = named_positions(model, named)
    naming = Naming(names, frozenset(each.place for each in found))
    target = pathlib.Path(path)
    with opened_tensors(target) as (tensors, metadata):
        ties = _ties_of(metadata, tensors, target.name)
        entries = {each.place: naming.find(each.place, tuple(each.target.shape), tensors) for each in found}
        structure = of_one_structure(tied_names(model, named), ties)
        entries.update({each.place: structure[id(each.target)] for each in found if id(each.target) in structure})
        if names is None:
            entries.update(_of_older_names(found, entries, tensors))
        offers, taken = offers_of(_each_once(found, entries), entries, ties)
        left = [(name, not naming.spare(name)) for name in tensors if name not in taken]
        report = fill(
            offers, wanted(model, named), resolve=resolve, strict=strict, skipped=left, what=repr(target.name)
        )
        flag = _flag_conflict(target, tensors)
    return (
        report if flag is None else Report(report.loaded, report.skipped, report.missing, (*report.conflicting, flag))
    )


def _of_older_names(
    found: list[Position], entries: Mapping[str, list[Entry]], tensors: Mapping[str, Entry]
) -> dict[str, list[Entry]]:
    """The entries of weights under the names that 0.1.0 gave them, by their places.

    It put a dot before what a form adds (`dense.kernel.lora_a`), and `.stored` behind a name that was taken.
    """
    taken = {entry.name for each in entries.values() for entry in each}
    left: dict[str, list[str]] = {}
    for name in sorted(tensors, key=len):
        if name not in taken:
            left.setdefault(re.sub(r"(\.stored)+$", "", name).replace(".", "_"), []).append(name)
    older: dict[str, list[Entry]] = {}
    filled = {id(each.target) for each in found if entries[each.place]}
    for each in found:
        if isinstance(each.target, Weight) and id(each.target) not in filled:
            names = left.get(each.target.name.replace(".", "_"), [])
            if names and tensors[names[0]].shape == each.target.shape:
                older[each.place] = [tensors[names.pop(0)]]
                filled.add(id(each.target))
    return older


def _each_once(found: list[Any], entries: Mapping[str, list[Entry]]) -> list[Any]:
    """The positions without those that are a second name of one target for the same tensors."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for each in found:
        key = (id(each.target), *(entry.name for entry in entries[each.place]))
        if key not in seen or not entries[each.place]:
            kept.append(each)
        seen.add(key)
    return kept


def _ties_of(metadata: Mapping[str, str], tensors: Mapping[str, Entry], name: str) -> dict[str, StoredTie]:
    """The ties of the plan in a header that a stranger may have written."""
    text = metadata.get(PLAN)
    if text is None:
        return {}
    try:
        plan = json.loads(text) if len(text) <= MAX_PLAN else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidConfig(f"The sharing plan of {name!r} cannot be read: {error}") from error
    if (
        not isinstance(plan, dict)
        or plan.get("version") != 1
        or not isinstance(plan.get("ties"), dict)
        or not isinstance(plan.get("weights"), dict)
        or not all(isinstance(tensor, str) and tensor in tensors for tensor in plan["weights"].values())
    ):
        raise InvalidConfig(f"The sharing plan of {name!r} has version 1, weights that the file has, and ties.")
    return stored_ties(plan["ties"], {uid: tensors[tensor] for uid, tensor in plan["weights"].items()})


def _flag_conflict(path: pathlib.Path, tensors: Mapping[str, Entry]) -> Conflict | None:
    """What a `config.json` says of tied embeddings, if the tensors say otherwise."""
    config = path.with_name("config.json")
    if not config.is_file():
        return None
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    flag = read.get("tie_word_embeddings") if isinstance(read, dict) else None
    if not isinstance(flag, bool):
        return None
    for names in _PAIRS:
        table, head = (next((n for n in tensors if n == each or n == f"bert.{each}"), None) for each in names)
        if table is None or head is None or tensors[table].shape != tensors[head].shape:
            continue
        difference = _apart(tensors[table], tensors[head])
        if flag and difference:
            return Conflict("tie_word_embeddings is true, and the tensors differ", (table, head), difference, "each")
        if not flag and not difference:
            return Conflict("tie_word_embeddings is false, and the tensors are equal", (table, head), 0.0, "each")
    return None


def _apart(first: Entry, second: Entry) -> float:
    """The largest difference of two tensors of one shape, of which a few rows at a time are read."""
    count = max(1, _PART // max(1, math.prod(first.shape[1:])))
    parts = [(start, min(count, first.shape[0] - start)) for start in range(0, first.shape[0], count)]
    found = (np.abs(first.part(*part).astype("float64") - second.part(*part).astype("float64")) for part in parts)
    return max((float(np.max(each, initial=0.0)) for each in found), default=0.0)


__all__ = ["load_safetensors", "save_safetensors"]

"""Models as safetensors: each stored weight once, with what is tied in the header, in one file or one a process."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import uuid
from collections.abc import Mapping

import keras
import numpy as np

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.files.loading.assignment import Resolve, assign_offers, check_resolve
from tether.files.loading.entries import Conflict, Entry, Report, StoredTie, entry_of, stored_ties
from tether.files.loading.matching import (
    Position,
    check_built,
    named_positions,
    of_one_structure,
    offers_of,
    stored_names,
    tied_names,
    wanted,
)
from tether.files.tensors.dialects import Names, Naming, to_file
from tether.files.tensors.presets import TIED
from tether.files.tensors.slices import SLICES, Slice, noted, owned
from tether.files.tensors.tensor_file import INDEX, TensorFile, files_of, opened_tensors, tensors_in, write_tensors
from tether.layers.family.named import named_weights
from tether.layers.tying.state import weights_below
from tether.types import Config
from tether.weights.codec import encode
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- saving


PLAN = "tether"
"""The key of the header's metadata under which the sharing plan is."""
MAX_PLAN = 1 << 26
_PART = 1 << 20
_PAIRS = (
    TIED,
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
)
"""What `tie_word_embeddings` speaks of: an embedding, and the kernel of a head."""


def save_safetensors(
    model: keras.Model, path: str | os.PathLike[str], *, names: Names = None, per_process: bool = False
) -> None:
    """Writes the weights of a model, each once and in its own dtype, as safetensors.

    A weight has the name of the first layer that uses it as it is, with dots (`encoder.dense.kernel`), or that adds
    to it (`w + tether.low_rank(8)`); others have their paths. What is made of weights is in the header, so that
    `load_safetensors` can fill models that are tied otherwise, or whose weights have other names. Any reader of
    safetensors reads the file. It is written beside the target, tensor by tensor, and renamed.

    A model that is split over several processes is saved by all of them. They gather one weight at a time, and process
    0 writes. With `per_process`, nothing is gathered: each process writes the parts that lie on its own devices into a
    file of its own, a part of which several have a copy once, and process 0 writes an index when all are there. The
    files of an earlier save are valid until then and are removed afterwards.

    Args:
        model: A built Keras model or layer.
        path: Where to, with the ending `.safetensors`. With `per_process`, a folder that exists and that all processes
            see; it gets `model.safetensors.index.json` and the files that the index names.
        names: What the weights are called in the file: a mapping from the model's names, a function of a name, a
            `Table`, or the word of an architecture for Hugging Face's names: `"bert"`, `"distilbert"`, `"gemma"`,
            `"gpt2"`, `"llama"`, `"mistral"`, `"qwen2"`, `"roberta"`, `"t5"`, `"vit"`, `"vit5"`. It gives a name, a
            `Tensor` that says how it is laid out, or `None` to leave the weight out.
        per_process: Whether each process writes a file of its own.

    Raises:
        TetherError: The path has another ending, its folder does not exist, or two weights get one name. Another
            process has failed, or did not come within the time limit (`tether.distribution.time_limit`).
        Unsupported: `per_process`, and `names` lays a tensor out in another way than the model has it.

    Example:
    ```python
    tether.files.save_safetensors(model, "model.safetensors")
    ```
    """
    check_built("save_safetensors", model)
    target = pathlib.Path(path)
    if per_process and not target.is_dir():
        raise TetherError(
            "With `per_process`, tensors are saved in a folder that exists, one file a process. "
            f"{received(path=str(path))}"
        )
    if not per_process and (target.suffix != ".safetensors" or not target.parent.is_dir()):
        raise TetherError(
            "Tensors are saved in a file that ends in '.safetensors', in a folder that exists. "
            f"{received(path=str(path))}"
        )
    stored = stored_names(model)
    naming = Naming(names, frozenset(stored.values()))
    plan = _plan(model, stored, naming)
    metadata = {"format": "pt"}  # how others name the layout of plain arrays
    if plan["ties"]:
        metadata[PLAN] = json.dumps(plan)
    with keras_seam.in_step_for(model, f"save_safetensors({target.name!r})"):
        if per_process:
            _save_per_process(model, target, stored, naming, metadata)
        else:
            weights = [entry_of(variable, stored[id(variable)]) for variable in model.weights]
            write_tensors(target, to_file(weights, naming), metadata)


def _save_per_process(
    model: keras.Model, folder: pathlib.Path, stored: Mapping[int, str], naming: Naming, metadata: dict[str, str]
) -> None:
    """Writes what this process owns, and in process 0 then the index of all that the processes have written.

    A save has names of its own, so that it takes nothing from an earlier one before it is complete.
    """
    tensors: list[Entry] = []
    slices: dict[str, Slice] = {}
    taken: dict[str, str] = {}
    for variable in model.weights:
        name = stored[id(variable)]
        for tensor in naming.of(name)[:1]:
            if not tensor.is_plain:
                raise Unsupported(
                    f"`names` lays {name!r} out in another way than the model ({tensor.describe()}), which needs all "
                    "of it. With `per_process`, `names` gives names only; without it, one process writes one file."
                )
            called = tensor.names[0]
            if called in taken:
                raise TetherError(f"Two weights would be {called!r} in the file: {taken[called]!r} and {name!r}.")
            taken[called] = name
            entries, cut = owned(variable, called)
            tensors += entries
            slices.update(cut)
    number, count = keras_seam.place_in_step()
    save = keras_seam.said_by_first(uuid.uuid4().hex[:8])
    files = [folder / f"model-{save}-{each + 1:05d}-of-{count:05d}.safetensors" for each in range(count)]
    own = files[number]
    if number:
        metadata.pop(PLAN, None)  # process 0 says it for all
    if slices:
        metadata[SLICES] = noted(slices)
    try:
        write_tensors(own, tensors, metadata, own=True)
        keras_seam.said_by_first("all files are written")
        if number == 0:
            _write_index(folder / f"model{INDEX}", files)
    except BaseException:
        own.unlink(missing_ok=True)
        raise


def _write_index(index: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Writes which tensors are in which file, and removes the files that the index named before."""
    weights: dict[str, str] = {}
    total = 0
    for path in files:
        if not path.is_file():
            raise TetherError(
                f"Process 0 does not see {path.name!r} in {str(index.parent)!r}, which another process has written. "
                "Give a folder on a file system that all processes share."
            )
        with open(path, "rb", buffering=0) as file:
            entries = TensorFile(file, path.name).entries
        weights.update(dict.fromkeys(entries, path.name))
        total += sum(each.size for each in entries.values())
    before = _named_before(index)
    with written_beside(index) as beside:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2, sort_keys=True)
        beside.write_text(f"{text}\n", encoding="utf-8")
    for path in set(before) - set(files):
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


_OURS = re.compile(r"model-[0-9a-f]{8}-\d{5}-of-\d{5}\.safetensors")
"""The names that `per_process` gives."""


def _named_before(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        return files_of(index)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # there is none, or a broken one
        return []


def _plan(model: keras.Model, stored: Mapping[int, str], naming: Naming) -> Config:
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


# --------------------------------------------------------------------------- loading


def load_safetensors(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    names: Names = None,
    resolve: Resolve = "error",
    strict: bool = True,
) -> Report:
    """Loads the weights of a model by name from safetensors, whatever is tied in it or in the file.

    The file is read tensor by tensor. Of a weight that is laid out over several devices (JAX) each process reads the
    parts that lie on its own devices, also from a file that was written on other devices. Names are those of
    `save_safetensors`, or what layers call their weights. A name of a weight to which an adapter was added
    (`w + tether.low_rank(8)`) means the weight. If anything is wrong, the model is as it was.

    Args:
        model: A built Keras model or layer.
        path: A `.safetensors` file, the `.safetensors.index.json` of several, or a folder with one of these.
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
    tether.files.save_safetensors(model, "model.safetensors")
    report = tether.files.load_safetensors(model, "model.safetensors")
    assert not report.missing and not report.skipped
    ```
    """
    check_built("load_safetensors", model)
    check_resolve(resolve)
    named = named_weights(model)
    found = named_positions(model, named)
    naming = Naming(names, frozenset(each.place for each in found))
    with keras_seam.in_step_for(model, f"load_safetensors({os.path.basename(path)!r})"):
        target = tensors_in(path)
        with opened_tensors(target) as (tensors, metadata):
            ties = _ties_of(metadata, tensors, target.name)
            entries = {each.place: naming.find(each.place, tuple(each.target.shape), tensors) for each in found}
            structure = of_one_structure(tied_names(model, named), ties)
            entries.update({each.place: structure[id(each.target)] for each in found if id(each.target) in structure})
            if names is None:
                entries.update(_of_older_names(found, entries, tensors))
            offers, taken = offers_of(_each_once(found, entries), entries, ties)
            left = [(name, not naming.spare(name)) for name in tensors if name not in taken]
            report = assign_offers(
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


def _each_once(found: list[Position], entries: Mapping[str, list[Entry]]) -> list[Position]:
    """The positions without those that are a second name of one target for the same tensors."""
    seen: set[tuple[object, ...]] = set()
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

"""The safetensors format: a header in JSON, then arrays, which are read where they are wanted, when they are.

The libraries of the format read what is written here. Dtypes that NumPy lacks (bfloat16) are kept as they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import InvalidConfig, TetherError, Unsupported, no_file, received
from tether.files.keras.archive import reading
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
from tether.layers.family.named import named_weights
from tether.layers.tying.state import weights_below
from tether.types import Array, Config
from tether.weights.codec import encode
from tether.weights.leaves import numpy_dtype
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- the format


DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of a header, as the format has it."""
MAX_SHARDS = 10_000


# --------------------------------------------------------------------------- reading


class TensorFile:
    """A file that is open for reading, with its tensors by name."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self._file, self._name = file, name
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise InvalidConfig(
                f"{name!r} is not what its name says: it is shorter than a header. {received(bytes=size)}"
            )
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise InvalidConfig(
                f"{name!r} is not what its name says: it has no header. {received(length=length, bytes=size)}"
            )
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_doubles)
        if not isinstance(header, dict):
            raise InvalidConfig(f"The header of {name!r} is a dict. {received(header=header)}")
        self.metadata = _checked_metadata(header.pop("__metadata__", None) or {}, name)
        self._start = 8 + length
        self._places: dict[str, tuple[int, int]] = {}
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        end = 0
        for begin, stop in sorted(self._places.values()):
            if begin != end:
                raise InvalidConfig(f"The tensors of {name!r} overlap, or leave holes.")
            end = stop
        if end != size - self._start:
            raise InvalidConfig(f"{name!r} has another length than its header says.")

    def _entry(self, name: str, value: object) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise InvalidConfig(f"The tensor {name!r} has dtype, shape and data_offsets. {received(tensor=value)}")
        code, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        if code not in DTYPES:
            raise Unsupported(f"The tensor {name!r} is of a dtype that Keras has not. {received(dtype=code)}")
        if not all(isinstance(n, list) and all(type(m) is int and m >= 0 for m in n) for n in (shape, place)):
            raise InvalidConfig(f"The shape and offsets of {name!r} are lists of integers. {received(tensor=value)}")
        dtype = numpy_dtype(DTYPES[code])
        if len(place) != 2 or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
            raise InvalidConfig(f"The offsets of {name!r} do not fit its shape. {received(tensor=value)}")
        self._places[name] = (place[0], place[1])
        return self._readable(name, tuple(shape), DTYPES[code], dtype)

    def _readable(self, name: str, shape: tuple[int, ...], called: str, dtype: np.dtype[Any]) -> Entry:
        start = self._start + self._places[name][0]
        row = math.prod(shape[1:]) * dtype.itemsize

        def rows(array: Array, first: int) -> None:
            self._file.seek(start + first * row)
            self._fill(array)

        def read() -> Array:
            array = np.empty(shape, dtype)
            rows(array, 0)
            return array

        return Entry(name, shape, called, read, rows)

    def _fill(self, array: Array) -> None:
        if not array.size:
            return
        left = array.reshape(-1).view("uint8").data
        while left:
            count = self._file.readinto(left)
            if not count:
                raise InvalidConfig(f"{self._name!r} ends earlier than it did when it was opened.")
            left = left[count:]


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidConfig("The header has one name twice.")
    return found


def _checked_metadata(metadata: object, name: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidConfig(f"The metadata of {name!r} are strings by name. {received(metadata=metadata)}")
    return metadata


@contextlib.contextmanager
def opened_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Entry], dict[str, str]]]:
    """The entries and metadata of a `.safetensors` file, or of the shards that a `.safetensors.index.json` names.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, or not what its name says.
    """
    target = pathlib.Path(path)
    if not target.is_file():
        raise TetherError(no_file(path))
    with contextlib.ExitStack() as stack:
        with reading(target):
            paths = _files(target)
            files = [TensorFile(stack.enter_context(open(each, "rb", buffering=0)), each.name) for each in paths]
        yield _together(files, target.name)


def _together(files: Sequence[TensorFile], name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        twice = set(entries) & set(file.entries)
        if twice:
            raise InvalidConfig(f"Two shards of {name!r} have {sorted(twice)[0]!r}.")
        entries.update(file.entries)
        metadata.update(file.metadata)
    return entries, metadata


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.name.endswith(".safetensors"):
        return [path]
    if not path.name.endswith(".safetensors.index.json"):
        raise Unsupported(
            "Tensors are read from files that end with .safetensors or .safetensors.index.json. "
            f"{received(path=str(path))}"
        )
    names = dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    plain = all(isinstance(name, str) and name == pathlib.PurePosixPath(name).name for name in names)
    if not plain or len(names) > MAX_SHARDS:
        raise InvalidConfig(f"{path.name!r} names shards by their file names, beside it.")
    found = [path.with_name(name) for name in names]
    missing = [each.name for each in found if not each.is_file()]
    if missing:
        raise TetherError(f"The shard {missing[0]!r} of {path.name!r} is not beside it.")
    return found


# --------------------------------------------------------------------------- writing


def write_tensors(path: pathlib.Path, tensors: Sequence[Entry], metadata: Mapping[str, str]) -> None:
    """Writes tensors, one after another, beside the target, and renames.

    Args:
        path: The target.
        tensors: What is written; each is read when its turn comes.
        metadata: Strings for the header.
    """
    # Wide dtypes come first, so that each array is aligned to its own items.
    ordered = sorted(tensors, key=lambda each: (-numpy_dtype(each.dtype).itemsize, each.name))
    header: Config = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for each in ordered:
        size = math.prod(each.shape) * numpy_dtype(each.dtype).itemsize
        header[each.name] = {
            "dtype": _code(each), "shape": list(each.shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with written_beside(path) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for each in ordered:
            array = np.ascontiguousarray(each.read())
            if (str(array.dtype), array.size) != (each.dtype, math.prod(each.shape)):
                raise TetherError(
                    f"{each.name!r} became something else while the file was written: the header says {each.dtype} of "
                    f"shape {each.shape}. {received(dtype=str(array.dtype), shape=array.shape)}"
                )
            file.write(array.reshape(-1).view("uint8").data if array.size else b"")


def _code(tensor: Entry) -> str:
    if tensor.dtype not in _CODES:
        raise Unsupported(f"{tensor.name!r} is of a dtype that safetensors has not. {received(dtype=tensor.dtype)}")
    return _CODES[tensor.dtype]


# --------------------------------------------------------------------------- models
# Models as safetensors: each stored weight once, with what is tied in the header.


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


def save_safetensors(model: keras.Model, path: str | os.PathLike[str], *, names: Names = None) -> None:
    """Writes the weights of a model, each once and in its own dtype, as safetensors.

    A weight has the name of the first layer that uses it as it is, with dots (`encoder.dense.kernel`), or that adds
    to it (`w + tether.low_rank(8)`); others have their paths. What is made of weights is in the header, so that
    `load_safetensors` can fill models that are tied otherwise, or whose weights have other names. Any reader of
    safetensors reads the file. It is written beside the target, tensor by tensor, and renamed.

    Args:
        model: A built Keras model or layer.
        path: Where to, with the ending `.safetensors`.
        names: What the weights are called in the file: a mapping from the model's names, a function of a name, a
            `Table`, or the word of an architecture for Hugging Face's names: `"bert"`, `"distilbert"`, `"gemma"`,
            `"gpt2"`, `"llama"`, `"mistral"`, `"qwen2"`, `"roberta"`, `"t5"`, `"vit"`, `"vit5"`. It gives a name, a
            `Tensor` that says how it is laid out, or `None` to leave the weight out.

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


def load_safetensors(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    names: Names = None,
    resolve: Resolve = "error",
    strict: bool = True,
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


__all__ = ["DTYPES", "TensorFile", "load_safetensors", "opened_tensors", "save_safetensors", "write_tensors"]

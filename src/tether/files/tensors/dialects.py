"""Other people's names for weights, and the layouts that they keep them in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tether.errors import TetherError, received
from tether.files.loading.entries import Entry
from tether.types import Array

# --------------------------------------------------------------------------- layouts
# How a tensor of somebody else's file holds a weight.


@dataclass(frozen=True, init=False)
class Tensor:
    """A tensor of a file, and how it holds a weight of the model.

    Args:
        *names: What it is called. The first that a file has is read; the first is written.
        inputs: For a kernel as PyTorch's `Linear` stores it, outputs first: how many leading axes of the model's
            kernel are inputs. A kernel with an axis of heads is folded into two axes there. Left out, the tensor is
            laid out as the weight.
        folded: Whether all axes of the weight are one there, as in the bias of a projection to heads.
        part: `(k, n)`: the weight is the k-th of n equal parts of the tensor's first axis, as where query, key and
            value are one tensor.

    Example:
    ```python
    names = {"head.kernel": tether.files.Tensor("lm_head.weight", "embed_tokens.weight", inputs=1)}
    tether.files.save_safetensors(model, "model.safetensors", names=names)
    tether.files.load_safetensors(model, "model.safetensors", names=names)
    ```
    """

    names: tuple[str, ...]
    inputs: int | None
    folded: bool
    part: tuple[int, int] | None

    def __init__(
        self, *names: str, inputs: int | None = None, folded: bool = False, part: tuple[int, int] | None = None
    ) -> None:
        if not names or not all(type(name) is str and name for name in names):
            raise TetherError(f"A tensor of a file has a name, or several to look for. {received(names=names)}")
        if inputs is not None and (type(inputs) is not int or inputs < 1):
            raise TetherError(f"`inputs` is how many axes of a kernel are inputs. {received(inputs=inputs)}")
        if part is not None and not 0 <= part[0] < part[1]:
            raise TetherError(f"`part` is a number from 0, and how many parts there are. {received(part=part)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "folded", bool(folded))
        object.__setattr__(self, "part", part)

    @property
    def is_plain(self) -> bool:
        """Whether it is laid out as the weight."""
        return self.inputs is None and self.part is None and not self.folded

    def describe(self) -> str:
        """What it holds, in a few words."""
        return "a kernel" if self.inputs is not None else "a part" if self.part is not None else "folded, one"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, of the weight's."""
        if self.inputs is not None:
            shape = (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))
        elif self.folded:
            shape = (math.prod(shape),)
        return shape if self.part is None else (shape[0] * self.part[1], *shape[1:])

    def to_weight(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The weight of this shape, from the tensor."""
        if self.part is not None:
            size = len(array) // self.part[1]
            array = array[self.part[0] * size : (self.part[0] + 1) * size]
        return (array if self.inputs is None else array.T).reshape(shape)

    def to_file(self, weight: Array) -> Array:
        """The tensor, or this part of it, from the weight."""
        if self.inputs is not None:
            return np.ascontiguousarray(weight.reshape(math.prod(weight.shape[: self.inputs]), -1).T)
        return weight.reshape(-1) if self.folded else weight


# --------------------------------------------------------------------------- BERT
# Hugging Face's names of BERT, for KerasHub's `BertBackbone` and what contains one.
#
# PyTorch stores a projection outputs first and folds the heads into one axis; Keras has inputs first, and an axis of
# heads. LayerNorm is `weight` and `bias` there, in old files `gamma` and `beta`. In a model with a language modelling
# head the embedding may be in the file twice, as the head's own (`tie_word_embeddings`): what counts is whether the
# tensors are equal, not what a flag says.


PREFIXES = ("", "bert.")
"""Of the encoder, alone and within a model with a head."""
HEAD = "cls.predictions"
TIED = ("embeddings.word_embeddings.weight", f"{HEAD}.decoder.weight")

_NORM = {"gamma": ("weight", "gamma"), "beta": ("bias", "beta")}
_OUTER = {
    "position_embedding.embeddings": "embeddings.position_embeddings.weight",
    "segment_embedding.embeddings": "embeddings.token_type_embeddings.weight",
}
_PROJECTIONS = {
    "self_attention_layer.query": ("attention.self.query", 1),
    "self_attention_layer.key": ("attention.self.key", 1),
    "self_attention_layer.value": ("attention.self.value", 1),
    "self_attention_layer.attention_output": ("attention.output.dense", 2),
    "feedforward_intermediate_dense": ("intermediate.dense", 1),
    "feedforward_output_dense": ("output.dense", 1),
}
_NORMS = {
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "feedforward_layer_norm": "output.LayerNorm",
}
_LEAVES = {"kernel", "bias", "gamma", "beta", "output_bias"}
_BLOCK = re.compile(r"transformer_layer_(\d+)\.(.+)\.(kernel|bias|gamma|beta)")
_SPARE = re.compile(r"(.*\.)?embeddings\.position_ids|cls\..*|(.*\.)?pooler\..*|classifier\..*")


def names(name: str, known: frozenset[str]) -> Any:
    """The tensors of a weight of KerasHub's, by its name with dots; `None` for what is no part of BERT.

    In a model with a language modelling head, which shares the embedding, the head's tensor has to agree with it.
    """
    name = _inside(name)
    if name == "token_embedding.embeddings":
        own = _of("embeddings.word_embeddings.weight")
        has_head = any(each.rpartition(".")[2] == "output_bias" for each in known)
        return [own, Tensor(f"{HEAD}.decoder.weight")] if has_head else own
    if name in _OUTER:
        return _of(_OUTER[name])
    owner, _, leaf = name.rpartition(".")
    if leaf not in _LEAVES:  # what a form has added
        return None
    if owner == "embeddings_layer_norm":
        return _norm("embeddings.LayerNorm", leaf)
    if owner == "pooled_dense":
        return _projection("pooler.dense", leaf, 1)
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _of_head(owner, leaf)
    block, part, leaf = match.groups()
    place = f"encoder.layer.{block}"
    if part in _NORMS and leaf in _NORM:
        return _norm(f"{place}.{_NORMS[part]}", leaf)
    if part in _PROJECTIONS and leaf not in _NORM:
        theirs, inputs = _PROJECTIONS[part]
        return _projection(f"{place}.{theirs}", leaf, inputs)
    return None


def is_spare(name: str) -> bool:
    """Whether a tensor is a buffer or belongs to a head or pooler, which the model may not have."""
    return _SPARE.fullmatch(name) is not None


def _inside(name: str) -> str:
    """The name without the backbone's own, if it is in another model."""
    head, _, rest = name.partition(".")
    return rest if head.startswith("bert_") and "backbone" in head else name


def _of_head(owner: str, leaf: str) -> Any:
    """KerasHub's `MaskedLMHead`, which shares the embedding."""
    owner = owner.removeprefix("mlm_head.") if owner != "mlm_head" else ""
    if owner == "" and leaf == "output_bias":
        return [Tensor(f"{HEAD}.bias"), Tensor(f"{HEAD}.decoder.bias")]
    if owner == "intermediate_dense":
        return Tensor(f"{HEAD}.transform.dense.{_parameter(leaf)}", inputs=1 if leaf == "kernel" else None)
    if owner == "intermediate_layer_norm":
        return Tensor(*(f"{HEAD}.transform.LayerNorm.{each}" for each in _NORM[leaf]))
    return None


def _of(name: str) -> Tensor:
    return Tensor(*(prefix + name for prefix in PREFIXES))


def _norm(place: str, leaf: str) -> Tensor:
    return Tensor(*(f"{prefix}{place}.{each}" for each in _NORM[leaf] for prefix in PREFIXES))


def _projection(place: str, leaf: str, inputs: int) -> Tensor:
    found = tuple(f"{prefix}{place}.{_parameter(leaf)}" for prefix in PREFIXES)
    return Tensor(*found, inputs=inputs) if leaf == "kernel" else Tensor(*found, folded=True)


def _parameter(leaf: str) -> str:
    return "weight" if leaf == "kernel" else leaf


# --------------------------------------------------------------------------- names
# What other people's files call a model's weights, and how they lay them out.


Names = Mapping[str, Any] | Callable[[str], Any] | str | None

PRESETS: dict[str, Callable[[str, frozenset[str]], Any]] = {"bert": names}
"""Hugging Face's names of a weight, given all names of the model, by a word for the architecture."""


@dataclass(frozen=True)
class Naming:
    """The tensors of a file for each name of a model's weights."""

    names: Names
    known: frozenset[str] = frozenset()
    """All names of the model's weights."""

    def __post_init__(self) -> None:
        names = self.names
        if names is not None and not callable(names) and not isinstance(names, Mapping) and names not in (*PRESETS,):
            raise TetherError(
                f"`names` is a mapping from the model's names to the file's, a function of a name, or one of "
                f"{', '.join(map(repr, PRESETS))}. {received(names=names)}"
            )

    def of(self, name: str) -> list[Tensor]:
        """The tensors that a weight of this name is in: all that a file has of them must agree."""
        names = self.names
        if names is None:
            return [Tensor(name)]
        if isinstance(names, str):
            found = PRESETS[names](name, self.known)
        else:
            found = names(name) if callable(names) else names.get(name, name)
        if found is None:
            return []
        several = found if isinstance(found, (list, tuple)) else [found]
        return [_as_tensor(each, name) for each in several]

    def ordered(self, names: list[Any]) -> list[Any]:
        """The alternatives of a name as PEFT has them: below the backbone's own name first, in a model with a head."""
        within = self.names == "bert" and any(_inside(each) != each for each in self.known)
        return names[::-1] if within and len(names) == len(PREFIXES) else names

    def find(self, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> list[Entry]:
        """A file's entries for a weight, in the weight's layout."""
        found = []
        for tensor in self.of(name):
            entry = next((entries[each] for each in tensor.names if each in entries), None)
            if entry is not None:
                found.append(_laid_out(entry, tensor, shape))
        return found

    def spare(self, name: str) -> bool:
        """Whether a tensor of a file is known to be no weight of the model: a buffer, or a head that it has not."""
        return self.names == "bert" and is_spare(name)


def _as_tensor(value: object, name: str) -> Tensor:
    if isinstance(value, str):
        return Tensor(value)
    if not isinstance(value, Tensor):
        raise TetherError(
            f"`names` gives for {name!r} a name in the file, a `tether.files.Tensor`, a list of these, or None. "
            f"{received(value=value)}"
        )
    return value


def _laid_out(entry: Entry, tensor: Tensor, shape: tuple[int, ...]) -> Entry:
    """An entry in the layout of the model's weight; what cannot be is left as it is, so that its shape is refused."""
    if tensor.is_plain:
        return entry
    expected = tensor.stored_shape(shape)
    if entry.shape != expected:
        return replace(entry, name=f"{entry.name} ({tensor.describe()} of shape {shape} is {expected} there)")
    return replace(entry, shape=shape, read=lambda: tensor.to_weight(entry.read(), shape), rows=None)


def to_file(weights: Sequence[Entry], naming: Naming) -> list[Entry]:
    """A model's weights as a file of these names has them; parts of one tensor are joined.

    Raises:
        TetherError: Two weights would get one name, or a part of a tensor is missing.
    """
    found: dict[str, Entry] = {}
    parts: dict[str, dict[int, tuple[Entry, Tensor]]] = {}
    for weight in weights:
        for tensor in naming.of(weight.name)[:1]:
            name = tensor.names[0]
            if tensor.part is not None:
                parts.setdefault(name, {})[tensor.part[0]] = (weight, tensor)
            elif name in found:
                raise TetherError(f"Two weights would be {name!r} in the file; one of them is {weight.name!r}.")
            else:
                found[name] = _stored(name, weight, tensor)
    for name, pieces in parts.items():
        found[name] = _joined(name, pieces)
    return list(found.values())


def _stored(name: str, weight: Entry, tensor: Tensor) -> Entry:
    shape = tensor.stored_shape(weight.shape)
    return Entry(name, shape, weight.dtype, lambda: tensor.to_file(weight.read()))


def _joined(name: str, pieces: dict[int, tuple[Entry, Tensor]]) -> Entry:
    (_, count) = next(iter(pieces.values()))[1].part or (0, 0)
    if sorted(pieces) != list(range(count)):
        raise TetherError(f"The model has {len(pieces)} of the {count} parts of the tensor {name!r}.")
    ordered = [pieces[number] for number in range(count)]
    shapes = [math.prod(weight.shape) for weight, _ in ordered]
    if len(set(shapes)) != 1:
        raise TetherError(f"The parts of {name!r} have different sizes. {received(sizes=shapes)}")
    dtypes = {weight.dtype for weight, _ in ordered}
    if len(dtypes) != 1:
        raise TetherError(f"The parts of {name!r} have different dtypes. {received(dtypes=sorted(dtypes))}")
    weight, tensor = ordered[0]

    def read() -> Array:
        return np.concatenate([tensor.to_file(weight.read()) for weight, tensor in ordered])

    return Entry(name, tensor.stored_shape(weight.shape), weight.dtype, read)


__all__ = ["PRESETS", "TIED", "Names", "Naming", "Tensor", "is_spare", "names", "to_file"]

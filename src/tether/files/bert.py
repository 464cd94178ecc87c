"""Hugging Face's names of BERT, for KerasHub's `BertBackbone` and what contains one.

PyTorch stores a projection outputs first and folds the heads into one axis; Keras has inputs first, and an axis of
heads. LayerNorm is `weight` and `bias` there, in old files `gamma` and `beta`. In a model with a language modelling
head the embedding may be in the file twice, as the head's own (`tie_word_embeddings`): what counts is whether the
tensors are equal, not what a flag says.
"""

from __future__ import annotations

import re
from typing import Any

from tether.files.layout import Tensor

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


__all__ = ["TIED", "is_spare", "names"]

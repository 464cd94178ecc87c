"""A proposal of what a file calls a model's weights, from shapes and from how alike names are."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import keras

from tether.files.loading.entries import Entry
from tether.files.loading.matching import check_built, stored_names
from tether.files.tensors.tables import Tensor
from tether.files.tensors.tensor_file import opened_tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Guess:
    """What a file may call a model's weights. It is a proposal: look at it before you load by it.

    Attributes:
        names: The tensor of each weight that was placed, as `names=` takes it.
        doubtful: Of those, the weights that are not sure, with the other tensors that would do as well or nearly.
        unplaced: The model's weights for which there is none.
        left: The file's tensors that no weight got.
    """

    names: Mapping[str, Tensor]
    doubtful: Mapping[str, tuple[str, ...]]
    unplaced: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for name, tensor in self.names.items():
            others = " or ".join(self.doubtful.get(name, ())[:3])
            doubt = "" if name not in self.doubtful else f"  (or {others})" if others else "  (not sure)"
            lines.append(f"{name} <- {tensor.names[0]}{_layout(tensor)}{doubt}")
        lines += [f"{name} <- ?" for name in self.unplaced]
        lines += [f"left: {name}" for name in self.left]
        return "\n".join(lines)


def guess_names(model: keras.Model, path: str | os.PathLike[str]) -> Guess:
    """Proposes what a safetensors file calls a model's weights, and how it lays them out.

    Names that differ in a number alone (`block_3`, `layers.3`) are placed together, in the order of the numbers, if all
    shapes fit. Among tensors of fitting shapes the names decide. Values are not looked at, so a kernel of as many
    inputs as outputs is taken for PyTorch's, with its outputs first.

    Args:
        model: A built Keras model or layer.
        path: A `.safetensors` file, or the `.safetensors.index.json` of several.

    Returns:
        The proposal. Printed, it is a line for each weight.

    Raises:
        TetherError: There is no such file, or the model is not built.
        InvalidConfig: The file is damaged.

    Example:
    ```python
    tether.files.save_safetensors(model, "model.safetensors")
    guess = tether.files.guess_names(model, "model.safetensors")
    print(guess)
    assert not guess.unplaced
    ```
    """
    check_built("guess_names", model)
    names = stored_names(model)
    ours = {names[id(v)]: tuple(int(n) for n in v.shape) for v in model.weights}
    with opened_tensors(path) as (tensors, _):
        theirs = {name: entry.shape for name, entry in tensors.items() if _is_weight(entry)}
    placed, doubtful = _placed(list(_groups(ours)), list(_groups(theirs)), ours, theirs)
    taken = {tensor.names[0] for tensor in placed.values()}
    return Guess(
        {name: placed[name] for name in ours if name in placed},
        doubtful,
        tuple(name for name in ours if name not in placed),
        tuple(name for name in theirs if name not in taken),
    )


def _is_weight(entry: Entry) -> bool:
    return entry.dtype.startswith(("float", "bfloat"))


# --------------------------------------------------------------------------- names of one kind
# Names that differ in one number, such as that of a block.


@dataclass(frozen=True)
class _Group:
    names: tuple[str, ...]
    """In the order of the numbers."""
    words: Counter[str]


def _groups(shapes: Mapping[str, Shape]) -> Iterator[_Group]:
    found: dict[str, list[tuple[int, str]]] = {}
    for name in shapes:
        match = re.search(r"(?<=[._/])\d+(?=[._/]|$)", name)  # the first that stands by itself is that of a block
        number = -1 if match is None else int(match[0])
        key = name if match is None else f"{name[: match.start()]}{{n}}{name[match.end() :]}"
        found.setdefault(key, []).append((number, name))
    for key, members in found.items():
        yield _Group(tuple(name for _, name in sorted(members)), _words(key))


_SAME = {
    "kernel": "weight", "gamma": "weight", "scale": "weight", "embeddings": "weight", "beta": "bias", "q": "query",
    "k": "key", "v": "value", "o": "out", "output": "out", "attn": "attention", "mha": "attention", "ln": "norm",
    "ffn": "mlp", "ffw": "mlp", "feedforward": "mlp", "fc": "up", "intermediate": "up",
    "gating": "gate", "embed": "embedding", "wte": "token embedding", "wpe": "position embedding", "word": "token",
    "lin1": "up", "lin2": "out", "down": "out", "pooled": "pooler", "segment": "type", "sa": "attention",
}  # fmt: skip
"""Words that people use for one thing."""
_PHRASES = (
    ("layer_norm", "norm"), ("layernorm", "norm"), ("input_norm", "attention_norm"),
    ("post_attention_norm", "mlp_norm"),
)  # fmt: skip
"""What stands for something else than its words: Llama names the norm before a sublayer by what was before that."""
_EMPTY = {
    "layer", "layers", "block", "transformer", "self", "proj", "dense", "linear", "lin", "model", "h", "encoder",
    "n", "c",
}  # fmt: skip
"""Words that tell nothing apart."""


def _words(name: str) -> Counter[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    for phrase, meaning in _PHRASES:
        apart = apart.replace(phrase, meaning)
    found = [word for part in re.split(r"[._/{}]+", apart) for word in _SAME.get(part, part).split()]
    return Counter(word for word in found if word and word not in _EMPTY)


def _alike(one: Counter[str], other: Counter[str]) -> float:
    """How alike two names are: twice the words that both have, divided by the words of both."""
    size = one.total() + other.total()
    return 2 * (one & other).total() / size if size else 0.0


# --------------------------------------------------------------------------- placing


_MARGIN = 0.1
"""By how much a name must be more alike than the next for there to be no doubt."""
_LEAST = 0.6
"""How alike names must be for there to be no doubt."""


def _placed(
    ours: Sequence[_Group], theirs: Sequence[_Group], our_shapes: Mapping[str, Shape], their_shapes: Mapping[str, Shape]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The tensor of each weight, the most alike names first; and the other tensors that would do."""
    pairs = []
    for place, mine in enumerate(ours):
        for other, yours in enumerate(theirs):
            layouts = _layouts_of(mine, yours, our_shapes, their_shapes)
            if layouts is not None:
                pairs.append((_alike(mine.words, yours.words), -place, -other, layouts))
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    found: dict[str, Tensor] = {}
    doubtful: dict[str, tuple[str, ...]] = {}
    done: set[int] = set()
    taken: set[int] = set()
    disputed: set[int] = set()  # what others, placed before, might have been instead
    for alike, place, other, layouts in pairs:
        if -place in done or -other in taken:
            continue
        done.add(-place)
        taken.add(-other)
        names = ours[-place].names
        found.update(zip(names, layouts, strict=True))
        close = [(p, o) for a, p, o, _ in pairs if a > alike - _MARGIN]
        near = [o for p, o in close if p == place and -o not in taken]
        contested = any(o == other and -p not in done for p, o in close)
        disputed.update(-each for each in near)
        if near or contested or alike < _LEAST or -other in disputed:
            for number, name in enumerate(names):
                doubtful[name] = tuple(theirs[-each].names[number] for each in near)
    return found, doubtful


def _layouts_of(
    mine: _Group, yours: _Group, our_shapes: Mapping[str, Shape], their_shapes: Mapping[str, Shape]
) -> list[Tensor] | None:
    """How the tensors of a group hold the weights of another, if all of them can."""
    if len(mine.names) != len(yours.names):
        return None
    found = []
    for name, called in zip(mine.names, yours.names, strict=True):
        tensor = _fitting(name, our_shapes[name], called, their_shapes[called])
        if tensor is None:
            return None
        found.append(tensor)
    return found


def _fitting(name: str, shape: Shape, called: str, stored: Shape) -> Tensor | None:
    """How a tensor holds a weight, by their shapes."""
    if math.prod(shape) != math.prod(stored):
        return None
    rank = len(shape)
    kernels = [Tensor(called, inputs=number) for number in range(1, rank)]
    windows = [Tensor(called, axes=(rank - 1, rank - 2, *range(rank - 2)))] if rank > 2 else []
    flat = [Tensor(called, folded=True)] if rank > 1 else []
    if rank == 3 and shape[0] * shape[1] == shape[2]:  # heads that make up the width: the projection behind them
        kernels.reverse()
    is_kernel = name.rpartition(".")[2] == "kernel" and called.rpartition(".")[2] != "kernel"
    others = [*windows, *kernels, *flat]
    tried = [*others, Tensor(called)] if is_kernel else [Tensor(called), *others]
    return next((tensor for tensor in tried if tensor.stored_shape(shape) == stored), None)


def _layout(tensor: Tensor) -> str:
    given = {"inputs": tensor.inputs, "axes": tensor.axes, "folded": tensor.folded or None}
    return "".join(f", {key}={value}" for key, value in given.items() if value is not None)


__all__ = ["Guess", "guess_names"]

"""Depth: the blocks of a model, which of them are one by a pattern, and which of their weights they share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras

from tether import patterns
from tether.errors import TetherError, UnknownName, received
from tether.layers.family.named import Named, named_weights
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.patterns import Pattern

# --------------------------------------------------------------------------- which blocks


@dataclass(frozen=True, eq=False)
class Block:
    """One block: from where it is tied, and what it has."""

    layer: keras.Layer
    root: keras.Layer
    prefix: str
    name: str
    weights: dict[str, Named]

    def path(self, weight: str) -> str:
        """The path of one of its weights from the root."""
        return f"{self.prefix}/{weight}" if self.prefix else weight


def as_blocks(layers: object, named: Pattern | None) -> list[Block]:
    """The blocks that are meant, in their order.

    Args:
        layers: What was given: the blocks, or a model.
        named: The pattern of the blocks of a model.

    Raises:
        UnknownName: The pattern fits no layer.
        TetherError: What was given are no blocks, or fewer than two.
    """
    if isinstance(layers, keras.layers.Layer):
        found = _below(layers, named)
    elif named is not None:
        raise TetherError(
            f"`blocks` chooses layers of a model; of a list, give those that are meant. {received(blocks=named)}"
        )
    elif isinstance(layers, Sequence) and not isinstance(layers, str):
        found = []
        for layer in layers:
            refuse_layer("share_depth", layer)
            found.append((layer, layer, "", layer.name))
    else:
        raise TetherError(
            "`share_depth` takes the blocks in their order, or a model and a pattern of their names: "
            f"`share_depth(model, 'cycle:2', blocks='block_*')`. {received(layers=layers)}"
        )
    if len(found) < 2:
        raise TetherError(f"Depth is shared by two blocks or more. {received(blocks=[name for *_, name in found])}")
    twice = [name for place, (layer, *_, name) in enumerate(found) if any(layer is o for o, *_ in found[:place])]
    if twice:
        raise TetherError(f"{twice[0]!r} is given twice: a layer that is used twice shares all its weights already.")
    return [
        Block(layer, root, prefix, name, {weight.path: weight for weight in named_weights(layer)})
        for layer, root, prefix, name in found
    ]


def _below(root: keras.Layer, named: Pattern | None) -> list[tuple[keras.Layer, keras.Layer, str, str]]:
    """The outermost layers below a model that a pattern chooses, each once."""
    refuse_layer("share_depth", root)
    walked = [(path, names, mixed, layer) for path, names, mixed, layer in paths.walk_layers(root) if path]
    names = ["/".join(mixed) for _, _, mixed, _ in walked]
    if named is None:
        raise TetherError(
            f"Of a model, say which of its layers are the blocks: `share_depth(model, blocks='block_*')`. "
            f"{root.name!r} has {', '.join(map(repr, names[:12]))}{' and more' if len(names) > 12 else ''}."
        )
    found: list[tuple[keras.Layer, keras.Layer, str, str]] = []
    inside: list[paths.Path] = []
    for path, by_name, mixed, layer in walked:
        spelled = tuple("/".join(each) for each in (path, mixed, by_name))
        if any(path[: len(other)] == other for other in inside) or not patterns.fits(named, *spelled):
            continue
        inside.append(path)
        if not any(layer is other for other, *_ in found):
            found.append((layer, root, spelled[0], spelled[1]))
    if not found:
        raise UnknownName(
            f"No layer of {root.name!r} fits the pattern {named!r}. {patterns.missed(named, names, 'layer')}"
        )
    return found


_NUMBERED = ("sequence", "cycle", "cycle_reverse")


def by_pattern(pattern: object, depth: int) -> list[list[int]]:
    """The places that share, in the order of the depth."""
    word, mark, number = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    plain = word if not mark else ""
    if word in _NUMBERED and number.isascii() and number.isdigit():
        own = int(number)
        if not 1 <= own <= depth:
            raise TetherError(
                f"Of {depth} blocks, 1 to {depth} can have weights of their own. {received(pattern=pattern)}"
            )
        last = own * (math.ceil(depth / own) - 1)  # where the last turn begins
        if word == "sequence":
            order = [place * own // depth for place in range(depth)]
        else:
            order = [place % own for place in range(depth)]
        if word == "cycle_reverse":
            order = [own - 1 - of if place >= last else of for place, of in enumerate(order)]
    elif plain == "all":
        order = [0] * depth
    elif plain == "sandwich":
        if depth < 4:
            raise TetherError(
                f"A sandwich has two blocks or more between the first and the last. {received(blocks=depth)}"
            )
        order = [0, *[1] * (depth - 2), 2]
    else:
        hint = f" Say how many have weights of their own: '{plain}:2'." if plain in _NUMBERED else ""
        raise TetherError(
            "A pattern of the depth is 'all', 'sequence:k', 'cycle:k', 'cycle_reverse:k' or 'sandwich', such as "
            f"'cycle:2'; or give `groups=[[0, 1], [2, 3]]`.{hint} {received(pattern=pattern)}"
        )
    found: dict[int, list[int]] = {}
    for place, letter in enumerate(order):
        found.setdefault(letter, []).append(place)
    return list(found.values())


def checked_groups(groups: object, depth: int) -> list[list[int]]:
    """The places that share, as they were given.

    Raises:
        TetherError: They are no places, or one is given twice.
    """
    try:
        found = [[int(place) for place in group] for group in groups]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        found = []
    places = [place for group in found for place in group]
    if not places or len(set(places)) < len(places) or not all(0 <= place < depth for place in places):
        raise TetherError(
            f"`groups` has the places of blocks that share, 0 to {depth - 1}, each once: [[0, 1], [2, 3]]. "
            f"{received(groups=groups)}"
        )
    return [sorted(group) for group in found]


# --------------------------------------------------------------------------- which weights


NORMS = "norms"
"""The word for what belongs to a depth and not to the block: see `share_depth`."""
_NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
_SCALES = ("gamma", "beta", "scale", "alpha", "*_gamma", "*_scale", "layer_scale*")
"""What vectors of a depth's own are called: of norms that are no layers of Keras's, and of residual branches."""


def _is_of_the_depth(weight: Named) -> bool:
    """Whether a weight is what `"norms"` means."""
    if not weight.can_train or isinstance(weight.layer, _NORMALIZATIONS) or weight.shape == ():
        return True
    leaf = weight.path.rpartition("/")[2].lstrip("_")
    of_norm = "norm" in type(weight.layer).__name__.lower()
    return len(weight.shape) == 1 and (of_norm or any(fnmatch.fnmatchcase(leaf, each) for each in _SCALES))


def is_matrix(weight: Named) -> bool:
    """Whether a low-rank part can be smaller than the weight: no vector, nor the bias of several axes."""
    return len(weight.shape) > 1 and not weight.path.rpartition("/")[2].endswith("bias")


def chooses(pattern: Pattern, weight: Named) -> bool:
    """Whether patterns, of which some may be words, choose a weight; none choose nothing."""
    if pattern in ((), []):
        return False
    return weight.fits(pattern, {NORMS: _is_of_the_depth(weight)})


def refuse_missed(pattern: Pattern, weights: Sequence[Named]) -> None:
    """Refuses a pattern that fits no weight.

    Raises:
        UnknownName: The first one.
    """
    for one in patterns.parts(pattern) if pattern not in ((), []) else ():
        excluding = isinstance(one, str) and (one.startswith("!") or one in (NORMS, patterns.ALL_LINEAR))
        if not excluding and not any(weight.fits(one) for weight in weights):
            raise UnknownName(
                f"No weight of the blocks fits the pattern {one!r}. {patterns.missed(one, (w.name for w in weights))}"
            )


def shared_paths(weights: Mapping[str, Named], only: Pattern, keep: Pattern) -> list[str]:
    """The paths of a block's weights that are shared."""
    return [path for path, weight in weights.items() if chooses(only, weight) and not chooses(keep, weight)]


__all__ = [
    "NORMS",
    "Block",
    "as_blocks",
    "by_pattern",
    "checked_groups",
    "chooses",
    "is_matrix",
    "refuse_missed",
    "shared_paths",
]

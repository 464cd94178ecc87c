"""Which weight of one layer corresponds to which of another.

Two models that were made apart from each other have other automatic names (`dense_3`, `dense_7`) and
their layers may stand at other places. So a layer of a graph is known by the name that a person gave it
or else by its kind and number (the second Dense), a layer that an attribute holds by that attribute, and
a weight by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from tether import keras_seam
from tether.errors import TetherError, UnknownName, received
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import View, numpy_of, shape_of, stored_variables
from tether.types import Array
from tether.weights.expression import Expression, program
from tether.weights.weight import Weight


@dataclass(frozen=True, eq=False)
class Held:
    """One weight of a layer, at the first place where it is found."""

    path: str
    """By the names of layers, as an error would list it."""
    key: tuple[Any, ...]
    """What corresponding weights have in common."""
    layer: keras.Layer
    variable: keras.Variable
    expression: Expression | None
    """What it reads, if it is tied; the Weight, if an attribute of the user's holds one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight or variable."""
        return shape_of(self.variable)

    @property
    def stored(self) -> list[Any]:
        """The stored variables behind it."""
        return stored_variables(self.variable)

    def numpy(self) -> Array:
        """A copy of its value, before autocast."""
        return numpy_of(self.variable)


def held_weights(root: keras.Layer) -> list[Held]:
    """The weights below a layer, each once, views included."""
    found: dict[int, Held] = {}
    for held in _walk(root, (), (), (root,)):
        found.setdefault(id(held.variable), held)
    return list(found.values())


def _walk(layer: keras.Layer, names: tuple[str, ...], key: tuple[Any, ...], around: tuple[Any, ...]) -> Iterator[Held]:
    inside = paths.Holdings().of(layer)
    for variable in inside.variables:
        leaf = inside.names[id(variable)]
        expression = variable.expression if isinstance(variable, View) else None
        yield Held("/".join(names + leaf), key + leaf, layer, variable, expression)
    counts: dict[str, int] = {}
    for child in keras_seam.sublayers(layer):
        if isinstance(child, Weight):
            places = paths.holders(layer, child)
            if places:
                yield Held("/".join(names + places[0]), key + places[0], layer, child.variable, child)
        elif not isinstance(child, keras.layers.InputLayer) and not any(child is other for other in around):
            name, step = _step(inside.child(child), inside.is_graph, child, counts)
            yield from _walk(child, names + name, key + step, (*around, child))


def _step(
    canonical: paths.Path, in_graph: bool, child: keras.Layer, counts: dict[str, int]
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The path to a sub-layer for people, and what its counterpart has in common with it."""
    if canonical[0] != "layers" or not in_graph:
        return canonical, canonical
    if not keras_seam.is_automatic_layer_name(child):
        return (child.name,), (child.name,)
    kind = type(child).__name__
    counts[kind] = counts.get(kind, -1) + 1
    return (child.name,), ((kind, counts[kind]),)


# --------------------------------------------------------------------------- pairs


def built(function: str, role: str, layer: keras.Layer) -> None:
    """Refuses what is no layer, or has no weights yet.

    Raises:
        TetherError: It is one of these.
    """
    refuse_layer(function, layer)
    if not layer.built:
        raise TetherError(
            f"The {role} of `{function}` must be built, and {layer.name!r} is not. Call it on data, or build it: "
            f"`{layer.name}.build(input_shape)`."
        )


class Pair(NamedTuple):
    """A weight of the target, and the one of the source that corresponds to it, if any."""

    target: Held
    source: Held | None
    left_alone: bool
    """Whether `match` says that it is to have none."""


def paired(source: Any, target: Any, match: Mapping[str, str | None] | None) -> list[Pair]:
    """Each weight of the target with its counterpart.

    Args:
        source: A built layer.
        target: A built layer.
        match: The source's path, or `None` for none, by the target's path. A `*` in a target's path stands
            for anything, and each one in the source's path for the same.

    Raises:
        UnknownName: A path in `match` names nothing.
    """
    theirs, mine = held_weights(source), held_weights(target)
    by_key = {held.key: held for held in theirs}
    found = {id(held): by_key.get(held.key) for held in mine}
    alone: set[int] = set()
    for pattern, replacement in _checked(match).items():
        for held, captured in _fitting(target, mine, pattern):
            if replacement is None:
                found[id(held)] = None
                alone.add(id(held))
            else:
                found[id(held)] = _named(source, theirs, _filled(replacement, captured))
                alone.discard(id(held))
    return [Pair(held, found[id(held)], id(held) in alone) for held in mine]


def _checked(match: Any) -> dict[str, str | None]:
    if match is None:
        return {}
    if not isinstance(match, Mapping) or not all(
        isinstance(mine, str) and isinstance(theirs, (str, type(None))) for mine, theirs in match.items()
    ):
        raise TetherError(
            "`match` has the source's path for the target's, as in {'encoder/*': 'backbone/*'}, or None for a weight "
            f"that is to be left alone. {received(match=match)}"
        )
    for mine, theirs in match.items():
        if theirs is not None and theirs.count("*") > mine.count("*"):
            raise TetherError(f"The pattern {theirs!r} has more stars than {mine!r}, which has to fill them.")
    return dict(match)


def _fitting(root: keras.Layer, weights: list[Held], pattern: str) -> list[tuple[Held, tuple[str, ...]]]:
    """The weights that a path or pattern means, and what each star stands for."""
    if "*" not in pattern:
        return [(_named(root, weights, pattern), ())]
    search = re.compile("(.*)".join(map(re.escape, pattern.split("*")))).fullmatch
    found = [(held, hit.groups()) for held in weights if (hit := search(held.path))]
    if not found:
        raise UnknownName(f"No weight of {root.name!r} fits the pattern {pattern!r}. It has: {listed(weights)}.")
    return found


def _filled(pattern: str, captured: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    return "".join(part + text for part, text in zip(parts, (*captured[: len(parts) - 1], ""), strict=True))


def _named(root: keras.Layer, weights: list[Held], path: str) -> Held:
    for held in weights:
        if held.path == path:
            return held
    variable = paths.locate(root, paths.split(path)).variable
    for held in weights:
        if held.variable is variable:
            return held
    raise UnknownName(f"{root.name!r} has no weight {path!r}. It has: {listed(weights)}.")


def listed(weights: list[Held]) -> str:
    """The first paths, for an error."""
    names = ", ".join(held.path for held in weights[:12])
    return (f"{names}, ... ({len(weights)} in all)" if len(weights) > 12 else names) or "no weights"


def leaf_pairs(target: Expression | None, source: Expression | None) -> list[tuple[Weight, Weight]] | None:
    """The weights that correspond to each other in two expressions of one form, `None` for two forms."""
    if target is None or source is None:
        return None
    mine, theirs = program(target), program(source)
    if len(mine) != len(theirs):
        return None
    found = []
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(one.expression, Weight) and isinstance(other.expression, Weight):
            found.append((one.expression, other.expression))
        elif not one.same_as(other):
            return None
    return found

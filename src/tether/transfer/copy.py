"""True copies of values from one layer or model to another, and which weight of one is which of the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch, TetherError, UnknownName, ValueConflict, received
from tether.layers.family.fill import Provenance, Rule, check_rule, describe, filled
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import View, numpy_of, shape_of, stored_variables
from tether.types import Array
from tether.weights.algebra import invert
from tether.weights.expression import Expression, Stored, program
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- pairs
# Which weight of one layer corresponds to which of another.
#
# Two models that were made apart from each other have other automatic names (`dense_3`, `dense_7`) and their layers
# may stand at other places. So a layer of a graph is known by the name that a person gave it or else by its kind and
# number (the second Dense), a layer that an attribute holds by that attribute, and a weight by its name.


Step = str | tuple[str, int]
"""A part of a path: a name, or the class of a layer that Keras has named and its number among those of the class."""


@dataclass(frozen=True, eq=False)
class Held:
    """One weight of a layer, at the first place where it is found."""

    path: str
    """By the names of layers, as an error would list it."""
    key: tuple[Step, ...]
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
    def stored(self) -> list[keras.Variable]:
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


def _walk(
    layer: keras.Layer, names: tuple[str, ...], key: tuple[Step, ...], around: tuple[keras.Layer, ...]
) -> Iterator[Held]:
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
) -> tuple[tuple[str, ...], tuple[Step, ...]]:
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


def paired(source: object, target: object, match: Mapping[str, str | None] | None) -> list[Pair]:
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


def _checked(match: object) -> dict[str, str | None]:
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


# --------------------------------------------------------------------------- copying
# True copies of values from one layer or model to another: afterwards neither knows of the other.


def copy(
    source: keras.Layer, target: keras.Layer, /, *, match: Mapping[str, str | None] | None = None, fill: Rule = None
) -> Provenance:
    """Copies the values of a layer's weights to another layer's, in place.

    Corresponding weights have the same name, in layers of the same name or attribute; a layer whose name
    Keras made up is known by its kind and number in its model. The copy is a true one on every backend:
    changing one side never changes the other. Optimizer state is not copied, and a failed copy changes nothing.

    Args:
        source: A built layer or model.
        target: Another. Weights without a counterpart keep their values. A tied weight takes its value
            through its expression, or from the source's expression of the same form.
        match: The source's path for a path of the target, where they differ: `{"encoder/*": "backbone/*"}`;
            `None` leaves a weight alone.
        fill: What a weight of another size has where the source has nothing: `"zeros"`, `"initializer"` (what it
            has now), `"mean"` (of the source's values along the axis that grew), or a function
            `(value, start) -> array`. What does not fit is cut. Left out, other sizes are an error.

    Returns:
        A report of what came from where; `print` it.

    Raises:
        TetherError: A layer is not built, or the copy would change the source, with which the target shares a weight.
        UnknownName: No weight corresponds to another, or a path in `match` names nothing.
        ShapeMismatch: The sizes differ and there is no `fill`.
        NotInvertible: A tied weight of the target cannot be assigned.
        ValueConflict: A shared weight of the target would have to take two different values.

    Example:
    ```python
    small, large = keras.layers.Dense(16), keras.layers.Dense(24)
    small.build((None, 8))
    large.build((None, 8))
    report = tether.transfer.copy(small, large, fill="zeros")
    print(report)
    ```
    """
    built("copy", "source", source)
    built("copy", "target", target)
    check_rule(fill)
    if source is target:
        raise TetherError(f"The source and the target are the same layer, {source.name!r}.")
    plan = _Assignments(source, fill)
    found = paired(source, target, match)
    if all(pair.source is None for pair in found):
        raise UnknownName(
            f"No weight of {target.name!r} corresponds to one of {source.name!r}. The target has: "
            f"{listed([pair.target for pair in found])}. The source has: {listed(held_weights(source))}. Say which is "
            "which: match={'target/path': 'source/path'}."
        )
    for pair in found:
        plan.add(pair.target, pair.source)
    plan.run()
    taken = {pair.source.path for pair in found if pair.source is not None}
    plan.report.unused.extend(held.path for held in plan.theirs if held.path not in taken)
    return plan.report


class _Assignments:
    """The values to be assigned, all of them computed before the first one is."""

    def __init__(self, source: object, rule: Rule) -> None:
        self.rule = rule
        self.theirs = held_weights(source)
        self.of_source = {id(variable) for held in self.theirs for variable in held.stored}
        self.values: dict[int, tuple[keras.Variable | Stored, Array, str]] = {}
        """By the stored variable: it or its Weight, the value, and for which path."""
        self.origins: dict[int, int] = {}
        """By the stored variable: the one of the source that it takes its value from, where that is one."""
        self.finishing: dict[int, Any] = {}
        self.report = Provenance()

    def add(self, held: Held, source: Held | None) -> None:
        """Plans one weight of the target."""
        if source is None:
            self.report.add(held.path, held.shape, None, None, "kept")
            return
        if held.variable is source.variable or (held.expression is not None and held.expression == source.expression):
            how = "shared"
        elif held.expression is None:
            how = self._take(held.path, held.variable, held.variable, source.numpy(), source)
        else:
            how = self._through(held, held.expression, source)
        self.report.add(held.path, held.shape, source.path, source.shape, how)
        if hasattr(held.layer, "finalize_state"):
            self.finishing[id(held.layer)] = held.layer

    def _through(self, held: Held, expression: Expression, source: Held) -> str:
        """A weight that is an expression: the same form weight by weight, another one by its inverse."""
        weights = leaf_pairs(expression, source.expression)
        known = [self._known(mine, theirs) for mine, theirs in weights or ()]
        if known and all(known):
            return "copied with the weight"
        if weights is not None and (len(weights) > 1 or held.shape == source.shape or isinstance(expression, Weight)):
            steps = [
                self._take(held.path, mine, mine.variable, numpy_of(theirs.variable), source)
                for mine, theirs in weights
            ]
            return ", ".join(dict.fromkeys(steps))
        value, how = self._fitted(held.path, source.numpy(), numpy_of(held.variable), source)
        tensor = keras.ops.convert_to_tensor(value, dtype=keras_seam.stored_dtype(held.variable))
        try:
            parts = invert(expression, tensor)
        except NotInvertible as error:
            raise NotInvertible(f"The value for {held.path!r} has no place to go: {error}") from error
        for weight, part in parts.items():
            array = np.array(keras_seam.to_numpy(part, weight.name, in_step=True))
            self._take(held.path, weight, weight.variable, array, source)
        return how if isinstance(expression, Weight) else f"{how}, through {expression.notation()}"

    def _known(self, mine: Weight, theirs: Weight) -> bool:
        """Whether the weight takes its value from that of the source already, for another path."""
        before = self.origins.setdefault(id(mine.variable), id(theirs.variable))
        return id(mine.variable) in self.values and before == id(theirs.variable)

    def _fitted(self, path: str, value: Array, start: Array, source: Held) -> tuple[Array, str]:
        try:
            how = (
                describe(value.shape, start.shape, self.rule) if value.shape != start.shape and self.rule else "copied"
            )
            return filled(value, start, self.rule), how
        except ShapeMismatch as error:
            raise ShapeMismatch(f"{source.path!r} to {path!r}: {error}") from error

    def _take(self, path: str, place: object, variable: keras.Variable, value: Array, source: Held) -> str:
        """Plans the value of one stored variable."""
        array, how = self._fitted(path, value, numpy_of(variable), source)
        old, new = keras_seam.stored_dtype(source.variable), keras_seam.stored_dtype(variable)
        if old != new:
            how += f", cast: {old} -> {new}"
        if id(variable) in self.of_source:
            if np.array_equal(array, numpy_of(variable), equal_nan=array.dtype.kind in "fc"):
                return "shared"
            raise TetherError(
                f"{path!r} of the target uses the stored weight {variable.path!r} of the source, so copying "
                f"{source.path!r} there would change the source. Untie the target first: `tether.untie(target)`."
            )
        before = self.values.get(id(variable))
        if before is not None and not np.array_equal(before[1], array, equal_nan=array.dtype.kind in "fc"):
            raise ValueConflict(
                f"{before[2]!r} and {path!r} of the target are one stored weight, {variable.path!r}, and the source "
                "has two different values for them. Leave one out: match={" + repr(path) + ": None}."
            )
        self.values[id(variable)] = (place, array, path)
        return how

    def run(self) -> None:
        """Assigns; a failure half way is undone."""
        done: list[tuple[keras.Variable | Stored, Array]] = []
        try:
            for place, value, _ in self.values.values():
                done.append((place, numpy_of(_variable(place))))
                _assign(place, value)
            for layer in self.finishing.values():
                layer.finalize_state()
        except BaseException:
            for place, value in done:
                _assign(place, value)
            raise


def _variable(place: object) -> keras.Variable:
    return place.variable if isinstance(place, Weight) else place


def _assign(place: keras.Variable | Stored, value: Array) -> None:
    """Stores a value of which nobody else holds the memory."""
    dtype = keras_seam.stored_dtype(_variable(place))
    place.assign(keras_seam.own_copy(keras.ops.convert_to_tensor(np.array(value), dtype=dtype)))


__all__ = ["copy"]

"""True copies of values from one layer or model to another: afterwards neither knows of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch, TetherError, UnknownName, ValueConflict
from tether.layers.family.fill import Provenance, Rule, check_rule, describe, filled
from tether.layers.tying.state import numpy_of
from tether.transfer.pairing import Held, built, held_weights, leaf_pairs, listed, paired
from tether.weights.algebra import invert
from tether.weights.weight import Weight

Array = np.ndarray[Any, Any]


def copy(
    source: Any, target: Any, /, *, match: Mapping[str, str | None] | None = None, fill: Rule = None
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
    report = tether.transfer.copy(small, large, fill="zeros")
    print(report)
    ```
    """
    built("copy", "source", source)
    built("copy", "target", target)
    check_rule(fill)
    if source is target:
        raise TetherError(f"The source and the target are the same layer, {source.name!r}.")
    plan = _Plan(source, fill)
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


class _Plan:
    """The values to be assigned, all of them computed before the first one is."""

    def __init__(self, source: Any, rule: Rule) -> None:
        self.rule = rule
        self.theirs = held_weights(source)
        self.of_source = {id(variable) for held in self.theirs for variable in held.stored}
        self.values: dict[int, tuple[Any, Array, str]] = {}
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

    def _through(self, held: Held, expression: Any, source: Held) -> str:
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
            array = np.array(keras.ops.convert_to_numpy(part))
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

    def _take(self, path: str, place: Any, variable: keras.Variable, value: Array, source: Held) -> str:
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
        done: list[tuple[Any, Array]] = []
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


def _variable(place: Any) -> Any:
    return place.variable if isinstance(place, Weight) else place


def _assign(place: Any, value: Array) -> None:
    """StoredChange a value of which nobody else holds the memory."""
    dtype = keras_seam.stored_dtype(_variable(place))
    place.assign(keras_seam.own_copy(keras.ops.convert_to_tensor(np.array(value), dtype=dtype)))


__all__ = ["copy"]

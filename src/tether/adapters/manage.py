"""Adding, removing, switching and merging the adapters of a model.

What an adapter is, the expressions say: each weight that it changes is `base + strength · part` (`Adapted`), and the
strength is one stored number for all of an adapter. Nothing else is remembered, but for what `merge` puts aside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import keras
import numpy as np

from tether import keras_seam
from tether.adapters import slotted
from tether.adapters.slotted import Part
from tether.errors import TetherError, UnknownName, did_you_mean, received
from tether.forms.form import Form
from tether.forms.full import full
from tether.layers.family.inherit import changed
from tether.layers.family.named import named_weights, select, select_all, tie_what_learns
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import View, slots_of
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie, weights_of
from tether.layers.tying.untie import untie
from tether.patterns import Pattern
from tether.types import AnyLayer
from tether.weights.expression import Expression, Stored
from tether.weights.operators.arithmetic import StopGradient
from tether.weights.operators.choice import Adapted, adapted
from tether.weights.weight import Weight

_MERGED = "_tether_merged"

Freeze = Literal["adapted", "all"] | bool | None


@dataclass(frozen=True)
class _Merged:
    """A weight whose adapters were merged."""

    apart: Adapted
    names: tuple[str, ...]
    """Which of its adapters were."""
    left: Expression | None = None
    """What it is since, with the others on top; `None` if it is a plain variable."""


# --------------------------------------------------------------------------- adding and removing


def add(
    model: AnyLayer,
    name: str,
    changes: Mapping[Any, Any] | None = None,
    /,
    *,
    also: Pattern | None = None,
    freeze: Freeze = "adapted",
    trainable: bool = True,
    replace: bool = False,
) -> AnyLayer:
    """Adds a named adapter to weights of a model, in place. Its strength is 1.

    What was frozen in the model stays frozen, and the adapter learns all the same. A model that has trained has to
    be compiled again before it trains on: its optimizer does not know the new weights.

    Args:
        model: A built Keras model or layer.
        name: What the adapter is called: no name that another adapter of the model has.
        changes: Forms by the weight's path or a pattern (`tether.patterns`), or by `"all-linear"`:
            `{"*/query/kernel": tether.low_rank(8)}`. Of two patterns that fit a weight the later counts, and
            `"!head/*": None` leaves weights out. A form that is not a sum adds the difference that it makes. In a
            model with slots (`capacity`) these may be left out: the adapter then starts as the form of the slots does.
        also: Weights that are trained whole, such as a new head: `["classifier/*"]`. The adapter has them, and its
            file too (`tether.forms.full`).
        freeze: `"adapted"`: the weights that are adapted stop training. `"all"`: everything else in the model does.
            `None`: nothing does.
        trainable: Whether the adapter trains. In a model with slots, whether it takes one of those that train.
        replace: Whether it takes the place of an adapter of this name, if there is one.

    Returns:
        The model.

    Raises:
        TetherError: The name is taken, the model is merged, a change is none, or no slot is free.
        UnknownName: A pattern fits no weight.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)}, also="head/*", freeze="all")
    ```
    """
    check(model, "add")
    check_new_name(model, name, replace)
    places = slotted.slotted_weights(model)
    if places and changes is None and also is None:
        slotted.fill_slot(model, places, slotted.slot_for(places, name, trainable), name, slotted.start_of(places))
        return model
    parts = as_parts(model, {} if changes is None and also is not None else changes, also, "adapter")
    return adapt(model, name, 1.0, parts, freeze=freeze, trainable=trainable)


def as_parts(model: keras.Layer, changes: object, also: Pattern | None, what: str) -> dict[str, Part]:
    """What makes the part of each weight that changes name, by path.

    Raises:
        TetherError: They are no mapping of forms.
        UnknownName: A pattern fits no weight.
    """
    given: Any = changes
    if not isinstance(given, Mapping) or (not given and also is None):
        raise TetherError(
            f"{'An' if what == 'adapter' else 'A'} {what} changes weights by name or pattern, as in "
            f"`{{{_as_pattern(given)}: tether.low_rank(8)}}`. {received(changes=changes)}"
        )
    weights = named_weights(model)
    chosen = select_all(model, weights, given)
    parts: dict[str, Part] = {weight.path: partial(_delta, change, weight.name) for weight, change in chosen}
    for weight in [] if also is None else select(model, weights, also):
        parts[weight.path] = full().delta
    return parts


def _as_pattern(given: object) -> str:
    """The pattern that a list of modules stands for elsewhere, `["query", "value"]`."""
    first = given[0] if isinstance(given, (list, tuple)) and given else given
    return repr(f"*/{first}/kernel" if isinstance(first, str) and first.isidentifier() else "*/query/kernel")


def remove(model: AnyLayer, name: str) -> AnyLayer:
    """Takes an adapter off, in place. The bases stay frozen as they were under it.

    Args:
        model: The model.
        name: The adapter.

    Returns:
        The model.

    Raises:
        UnknownName: The model has no adapter of this name.
        TetherError: It is no name.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.remove(model, "french")
    assert not tether.adapters.names(model)
    ```
    """
    check(model, "remove")
    if not isinstance(name, str):
        raise TetherError(f"One adapter is taken off, by its name, a string. {received(name=name)}")
    present = slotted.names_in(model)
    if name in present:
        slotted.fill_slot(model, slotted.slotted_weights(model), present[name], None, {})
        return model
    check_known(model, [name])
    found = adapted_weights(model).items()
    with Rollback.below(model):
        tie(model, {path: expression.without([name]) for path, expression in found if name in expression.parts})
    return model


def adapt(
    model: AnyLayer, name: str, strength: float, parts: Mapping[str, Part], *, freeze: Freeze, trainable: bool = True
) -> AnyLayer:
    """Adds to weights, by path, the part that a function makes of the weight, all under one strength.

    Raises:
        TetherError: `freeze` is none of its words.
    """
    places = slotted.slotted_weights(model)
    if places:
        content = slotted.content_of(places, slotted.made_of(places, parts, name), name, strength)
        slotted.fill_slot(model, places, slotted.slot_for(places, name, trainable), name, content)
        return model
    keras_seam.refuse_sharded(model.variables)
    keras_seam.refuse_outside([model])
    with Rollback.below(model):
        if name in names(model):
            remove(model, name)
        present = adapted_weights(model)
        number = 1 + max((n for each in present.values() for n in each.order.values()), default=-1)
        frozen_for(model, freeze, own_weights(model))
        found = named_weights(model)
        factor = Weight(np.array(strength, "float32"), trainable=False, name=f"{name}.strength", role="strength")
        ties = {}
        bases = weights_of(model, parts)
        for path, part in parts.items():
            base, others, order = taken_apart(bases[path])
            still = base if isinstance(base, StopGradient) or not freeze else base.stop_gradient()
            ties[path] = adapted(still, {**others, name: (factor, part(still))}, {**order, name: number})
        tie_what_learns(model, ties, found)
        if not trainable:
            for weight in own_weights(model)[name]:
                weight.trainable = False
    return model


def frozen_for(model: keras.Layer, freeze: Freeze, own: Mapping[str, Sequence[Stored]]) -> None:
    """Freezes a model for an adapter, if all of it shall be; what trains of the adapters that are there trains on.

    Raises:
        TetherError: `freeze` is none of its words.
    """
    if freeze not in ("adapted", "all", True, False, None):
        raise TetherError(f"`freeze` is 'adapted', 'all' or None. {received(freeze=freeze)}")
    if freeze == "all":
        kept = [weight for weights in own.values() for weight in weights if weight.trainable_flag]
        model.trainable = False
        for weight in kept:
            weight.trainable = True


def _delta(change: object, name: str, base: Expression) -> Expression:
    if isinstance(change, Form):
        return change.delta(base)
    if isinstance(change, (int, float)):
        raise TetherError(
            f"What an adapter makes of {name!r} is a form, or a function of the weight, and no number. For a low-rank "
            f"part of that rank write `tether.low_rank({change})`. {received(change=change)}"
        )
    return changed(change, base, name) - base


def taken_apart(expression: Expression) -> tuple[Expression, dict[str, tuple[Expression, Expression]], dict[str, int]]:
    """The base of a weight, its parts by name, and when each was added."""
    if isinstance(expression, Adapted):
        return expression.base, expression.parts, expression.order
    return expression, {}, {}


# --------------------------------------------------------------------------- what there is


def names(model: keras.Layer) -> list[str]:
    """The names of a model's adapters, in the order in which they were added.

    Args:
        model: The model.

    Returns:
        The names; an empty list if it has none.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    assert tether.adapters.names(model) == ["french"]
    ```
    """
    return [*_names(_expressions(model)), *slotted.names_in(model)]


def _names(expressions: Iterable[Adapted]) -> list[str]:
    order: dict[str, int] = {}
    for expression in expressions:
        for name, number in expression.order.items():
            order[name] = max(number, order.get(name, number))
    return sorted(order, key=lambda name: order[name])


def strengths(model: keras.Layer) -> dict[str, float]:
    """The present strength of each adapter, in the order in which they were added.

    Args:
        model: The model.

    Returns:
        The strengths by name: 1 is on, 0 is off.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    assert tether.adapters.strengths(model) == {"french": 1.0}
    ```
    """
    expressions = _expressions(model)
    found = {name: strength for each in expressions for name, (strength, _) in each.parts.items()}
    return {name: float(found[name].numpy()) for name in _names(expressions)}


def set_strengths(model: keras.Layer, wanted: Mapping[str, float], /) -> None:
    """Sets how strongly adapters count: 1 is on, 0 is off, several make a weighted sum. Others stay as they are.

    It is one assignment: nothing is compiled again. What trains does not change: `activate` and `trainable` say that.

    Args:
        model: The model.
        wanted: Finite numbers by the adapter's name; negative ones take an adapter off.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: A strength is not a finite number, or an adapter is merged.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.set_strengths(model, {"french": 0.3})
    assert abs(tether.adapters.strengths(model)["french"] - 0.3) < 1e-6
    ```
    """
    given: object = wanted
    if not isinstance(given, Mapping):
        raise TetherError(
            f"Strengths are given by the adapters' names, as in `set_strengths(model, {{'french': 0.3}})`. "
            f"{received(strengths=given)}"
        )
    expressions = _expressions(model)
    _check_known(model, expressions, wanted)
    merged = _merged_names(model)
    for name, value in wanted.items():
        check_strength(name, value)
        if name in merged:
            raise TetherError(
                f"The adapter {name!r} of {model.name!r} is merged. Take it apart first: `unmerge(model)`."
            )
    _set_strengths(expressions, wanted)


def _set_strengths(expressions: Iterable[Adapted], wanted: Mapping[str, float]) -> None:
    found = {}
    for expression in expressions:
        for name, (strength, _) in expression.parts.items():
            if isinstance(strength, Weight) and name in wanted:
                found[id(strength)] = (name, strength)
    for name, strength in found.values():
        strength.assign(np.asarray(wanted[name], strength.dtype))


def activate(model: keras.Layer, *wanted: str, trainable: bool = True) -> None:
    """Turns adapters on (strength 1) and lets them train; all others are off and frozen. Without names, all are.

    What is off adds nothing, whatever it holds, and no optimizer moves it, neither by momentum nor by decay. Nothing
    is compiled again to compute; a model whose optimizer was made for other weights asks at the next `fit` to be
    compiled.

    Args:
        model: The model.
        *wanted: The adapters.
        trainable: Whether these train. Without, they compute and no adapter trains.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: Another adapter would train, in a callback of the model's `fit`. Nothing is changed then.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.activate(model)             # the base alone
    tether.adapters.activate(model, "french")
    ```
    """
    expressions, merged = _expressions(model), _merged_names(model)
    _check_known(model, expressions, wanted)
    _train(expressions, wanted if trainable else ())  # first, since it may be refused
    _set_strengths(expressions, {name: float(name in wanted) for name in _names(expressions) if name not in merged})


def trainable(model: keras.Layer, *wanted: str) -> None:
    """Lets these adapters train, and no other, whatever their strengths.

    Args:
        model: The model.
        *wanted: The adapters. Without names, none trains.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: Another adapter would train, in a callback of the model's `fit`. Nothing is changed then.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.trainable(model)
    assert not model.trainable_variables or model.trainable
    ```
    """
    expressions = _expressions(model)
    _check_known(model, expressions, wanted)
    _train(expressions, wanted)


def _train(expressions: Sequence[Adapted], wanted: Sequence[str]) -> None:
    found = _own_weights(expressions)
    learns = {id(weight) for name in wanted for weight in found[name]}
    own = {id(weight): weight for weights in found.values() for weight in weights}
    changed = [weight for key, weight in own.items() if weight.trainable_flag != (key in learns)]
    keras_seam.refuse_in_fit(
        changed, "Strengths may: `set_strengths(model, {'french': 0.5})`. Or compile and fit again for it."
    )
    for key, weight in own.items():
        weight.trainable = key in learns


@contextlib.contextmanager
def disabled(model: keras.Layer) -> Iterator[None]:
    """Turns all adapters off for a block: the model computes what its base does, to the last bit.

    Args:
        model: The model.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    with tether.adapters.disabled(model):
        reference = model.predict(x, verbose=0)
    ```
    """
    merged = _merged_names(model)
    before = {name: value for name, value in strengths(model).items() if name not in merged}
    set_strengths(model, dict.fromkeys(before, 0.0))
    try:
        yield
    finally:
        present = names(model)
        set_strengths(model, {name: value for name, value in before.items() if name in present})


def own_weights(model: keras.Layer) -> dict[str, list[Stored]]:
    """What each adapter may train: the weights that it was added with, but for those that a form has fixed."""
    return _own_weights(_expressions(model))


def _own_weights(expressions: Sequence[Adapted]) -> dict[str, list[Stored]]:
    found: dict[str, dict[int, Stored]] = {name: {} for name in _names(expressions)}
    for expression in expressions:
        base = set(expression.base.weights_used())
        for name, (_, part) in expression.parts.items():
            own = [weight for weight in part.weights_used() if weight not in base and weight.role in ("part", None)]
            for weight in own if any(weight.trainable_flag for weight in own) else ():
                if not weight.trainable_flag:  # a file of version 0.1.0 says so of what a form has fixed
                    keras_seam.set_untracked(weight, "_role", "fixed")
            found[name].update((id(weight), weight) for weight in own if weight.role != "fixed")
    return {name: list(own.values()) for name, own in found.items()}


def _expressions(model: keras.Layer) -> list[Adapted]:
    """The expressions with adapters; those that are merged as they are apart."""
    merged = _merged(model)
    left = {id(each.left) for each in merged.values()}
    apart = {id(each.apart): each.apart for each in merged.values()}
    for layer in keras_seam.contained_layers(model):
        for slot in slots_of(layer):
            expression = slot.view.expression
            if isinstance(expression, Adapted) and id(expression) not in left:
                apart.setdefault(id(expression), expression)
    return list(apart.values())


def adapted_weights(model: keras.Layer) -> dict[str, Adapted]:
    """The expressions with adapters, by path; those that are merged as they are apart."""
    live = {
        weight.path: weight.variable.expression
        for weight in named_weights(model)
        if isinstance(weight.variable, View) and isinstance(weight.variable.expression, Adapted)
    }
    return {**live, **{path: each.apart for path, each in _merged(model).items()}}


def _merged(model: keras.Layer) -> dict[str, _Merged]:
    """What of the model's weights is merged, by path."""
    found: dict[str, _Merged] = getattr(model, _MERGED, {})
    return found


def _merged_names(model: keras.Layer) -> set[str]:
    return {name for each in _merged(model).values() for name in each.names}


def check_known(model: keras.Layer, wanted: Iterable[str]) -> None:
    """Raises if the model has no adapter of one of these names.

    Raises:
        UnknownName: It has not.
    """
    _check_known(model, _expressions(model), wanted)


def _check_known(model: keras.Layer, expressions: Iterable[Adapted], wanted: Iterable[str]) -> None:
    present = _names(expressions)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        near = did_you_mean(unknown[0], present)
        if unknown[0] in slotted.names_in(model):
            near = f" It has a slot of that name: a call chooses it, as in `model(x, choice={unknown[0]!r})`."
        raise UnknownName(
            f"{model.name!r} has no adapter {unknown[0]!r}.{near} It has: {', '.join(present) or 'none'}."
        )


def check(model: keras.Layer, function: str) -> None:
    """Raises if adapters of a model cannot be changed now.

    Raises:
        TetherError: It is no built layer, or its adapters are merged.
    """
    refuse_layer(f"adapters.{function}", model)
    if not model.built:
        raise TetherError(
            f"`adapters.{function}` needs a model that has its weights, and {model.name!r} is not built. Call it on "
            f"data, or build it: `{model.name}.build(input_shape)`."
        )
    if _merged(model):
        raise TetherError(f"The adapters of {model.name!r} are merged. Take them apart first: `unmerge(model)`.")


def check_new_name(model: keras.Layer, name: object, replace: bool = False) -> None:
    """Raises if a new adapter cannot have this name, or that of one that it replaces.

    Raises:
        TetherError: It is no name, or another adapter has it.
    """
    present = names(model)
    if not isinstance(name, str) or not name or (name in present and not replace):
        listed = ", ".join(present) or "none"
        raise TetherError(
            f"An adapter has a name of its own, a string; {model.name!r} has: {listed}. Take another, or the old one "
            f"off: `remove(model, name)`, or give `replace=True`. {received(name=name)}"
        )
    if "/" in name:
        raise TetherError(
            f"The name of an adapter is part of the names of its weights: no '/' in it. {received(name=name)}"
        )


def check_strength(name: str, value: object) -> None:
    """Raises if a strength is not a finite number.

    Raises:
        TetherError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
        raise TetherError(
            f"The strength of the adapter {name!r} is a finite number: 1 is on, 0 is off. {received(**{name: value})}"
        )


# --------------------------------------------------------------------------- merging


def merge(model: AnyLayer, names: Sequence[str] | None = None) -> AnyLayer:
    """Gives the weights with adapters plain variables of their present values, in place, until `unmerge`.

    Nothing that is stored is written to, so merging and taking apart loses not a bit, however often. For a plain
    copy of the whole model use `tether.materialize`.

    Args:
        model: The model.
        names: Which adapters to merge; the others stay on top and can be switched. Left out, all.

    Returns:
        The model, which computes what it did, as fast as without these adapters.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: The model is not built, or is merged already.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.merge(model)
    model.predict(x, verbose=0)
    tether.adapters.unmerge(model)
    ```
    """
    check(model, "merge")
    if isinstance(names, str):
        raise TetherError(f"`names` is a list of adapters, as in `merge(model, [{names!r}])`. {received(names=names)}")
    if names is not None:
        check_known(model, names)
    whole: list[str] = []
    ties: dict[str, Expression] = {}
    merged: dict[str, _Merged] = {}
    for path, expression in adapted_weights(model).items():
        done = [name for name in expression.parts if names is None or name in names]
        rest = {name: part for name, part in expression.parts.items() if name not in done}
        if not done:
            continue
        if not rest:
            merged[path] = _Merged(expression, tuple(done))
            whole.append(path)
            continue
        value = np.array(keras_seam.to_numpy(expression.without(rest).value, path, in_step=True))
        base = Weight(value, trainable=False, name=f"{path.replace('/', '.')}.merged", dtype=expression.dtype)
        ties[path] = adapted(base, rest, expression.order)
        merged[path] = _Merged(expression, tuple(done), ties[path])
    if merged:
        with Rollback.below(model):
            if whole:
                untie(model, *whole)
            if ties:
                tie(model, ties)
            keras_seam.set_untracked(model, _MERGED, merged)
    return model


def unmerge(model: AnyLayer) -> AnyLayer:
    """Makes the expressions again that `merge` replaced, in place.

    Args:
        model: A model whose adapters were merged.

    Returns:
        The model.

    Raises:
        TetherError: The model is not merged.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.adapters.merge(model)
    tether.adapters.unmerge(model)
    ```
    """
    merged = _merged(model)
    if not merged:
        raise TetherError(
            f"The adapters of {model.name!r} are not merged, so there is nothing to take apart: `unmerge` follows "
            f"`tether.adapters.merge(model)`. It has: {', '.join(names(model)) or 'none'}."
        )
    with Rollback.below(model):
        tie(model, {path: each.apart for path, each in merged.items()})
        keras_seam.set_untracked(model, _MERGED, {})
    return model


__all__ = [
    "activate",
    "add",
    "disabled",
    "merge",
    "names",
    "remove",
    "set_strengths",
    "strengths",
    "trainable",
    "unmerge",
]

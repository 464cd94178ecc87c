"""What is frozen without anybody having said so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.rules.registry import rule
from tether.layers.tying import paths


@rule("frozen-through-another", "a layer or weight that is frozen because something else that holds it is")
def frozen_through_another(context: Context) -> Iterator[Finding]:
    """Keras freezes whatever a frozen layer holds, also what belongs to others."""
    yield from _layers(context)
    yield from _variables(context)


def _layers(context: Context) -> Iterator[Finding]:
    for layer in context.layers:
        parents = context.parents.get(id(layer), [])
        frozen = [parent for parent in parents if not keras_seam.own_trainable_flag(parent)]
        free = [parent for parent in parents if keras_seam.own_trainable_flag(parent)]
        if keras_seam.own_trainable_flag(layer) or not frozen or not free or not layer.weights:
            continue
        by, other = context.path_of(frozen[0]), context.path_of(free[0])
        yield Finding(
            "frozen-through-another",
            "warning",
            context.path_of(layer),
            f"The layer is frozen together with {by!r}, which holds it as an attribute; {other!r}, which holds it "
            "too, is not frozen. Freezing a layer freezes every layer in its attributes. To share a weight, tie it: "
            "neither layer owns the other then, and each use is frozen by itself.",
            f"{context.layer_code(layer)}.trainable = True",
        )


def _variables(context: Context) -> Iterator[Finding]:
    holders: dict[int, list[Any]] = {}
    for layer in context.layers:
        for variables in keras_seam.variable_lists(layer).values():
            for variable in variables:
                holders.setdefault(id(variable), []).append((layer, variable))
    for held in holders.values():
        variable = held[0][1]
        frozen = [layer for layer, _ in held if not keras_seam.own_trainable_flag(layer)]
        free = [layer for layer, _ in held if keras_seam.own_trainable_flag(layer)]
        if variable.trainable or not frozen or not free:
            continue
        one, other = frozen[0], free[0]
        path = "/".join((context.use_path(one, variable),))
        yield Finding(
            "frozen-through-another",
            "warning",
            f"{context.path_of(other)}/{'/'.join(paths.canonical_name(other, variable))}",
            f"The layer trains, and its variable {variable.path!r} does not: layer {context.path_of(one)!r} holds the "
            "same variable and is frozen, which freezes it for both.",
            f"tether.tie(model, {{{path!r}: tether.weight_of(model, {context.use_path(other, variable)!r})}})",
        )

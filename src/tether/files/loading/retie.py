"""Joining parts of one tied model that were saved and loaded apart."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from tether.errors import TetherError, Unsupported, received
from tether.files.loading.assignment import Offer, Plan, Resolve
from tether.files.loading.entries import Loaded, Report, entry_of
from tether.files.loading.matching import check_built
from tether.layers.family.named import named_weights
from tether.layers.tying.state import View, weights_below
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression
from tether.weights.weight import Weight


def retie(*models: Any, resolve: Resolve = "error") -> Report:
    """Makes weights one again that were one when the models were saved.

    A weight remembers the one that it is a copy of (`weight.origin`), also through files. Weights of one origin in
    different models become the first model's; their values have to agree. Whoever is in one model stays apart from
    the others of that model. Compile again what was compiled: its optimizer knows other weights.

    To load both files as one in the first place: `with tether.sharing(): ...`.

    Args:
        *models: Two or more built models or layers.
        resolve: What the joined weight has where the values differ: `"error"` raises; `"first"`, that of the first
            model; `"mean"`; or a function of the weight's name and the list of arrays.

    Returns:
        What was joined, and which values differed, by how much.

    Raises:
        ValueConflict: Values differ and `resolve` is `"error"`.
        ShapeMismatch: A weight has another shape in another model.
        TetherError: No weight of one model comes from where one of another comes from, or two in one model do.
        Unsupported: A layer holds the weight as an attribute, where it cannot be replaced.

    Example:
    ```python
    encoder = keras.saving.load_model("encoder.keras")
    decoder = keras.saving.load_model("decoder.keras")
    print(tether.files.retie(encoder, decoder))
    # loaded 1: codec <- encoder: codec, decoder: codec
    ```
    """
    if len({id(model) for model in models}) < 2:
        raise TetherError(f"`retie` joins two or more models. {received(models=[_name(model) for model in models])}")
    for model in models:
        check_built("retie", model)
    joined = _joined(models)
    if not joined:
        raise TetherError(
            f"No weight of {', '.join(map(_name, models))} comes from where one of another comes from, so there is "
            "nothing to join. Parts of one tied model do, if each was saved as it was tied."
        )
    offers = [_offer(found[0][1], model, weight) for found in joined.values() for model, weight in found]
    plan = Plan(offers, resolve)
    plan.check()
    replaced = {weight.uid: found[0][1] for found in joined.values() for _, weight in found[1:]}
    with contextlib.ExitStack() as undoing:
        for model in models:
            undoing.enter_context(Rollback.below(model))
        for model in models:
            ties = _ties(model, replaced)
            if ties:
                tie(model, ties)
            _check_gone(model, replaced)
    plan.carry_out()
    loaded = [
        Loaded(found[0][1].name, tuple(f"{_name(model)}: {weight.name}" for model, weight in found))
        for found in joined.values()
    ]
    return Report(loaded=tuple(loaded), conflicting=tuple(plan.conflicts))


def _joined(models: tuple[Any, ...]) -> dict[str, list[tuple[Any, Weight]]]:
    """The weights of one origin in different models, by origin."""
    found: dict[str, list[tuple[Any, Weight]]] = {}
    for model in models:
        mine: dict[str, Weight] = {}
        for weight in weights_below(model):
            other = mine.setdefault(weight.origin, weight)
            if other is not weight:
                raise TetherError(
                    f"{_name(model)!r} has two copies of one weight, {other.name!r} and {weight.name!r}, so it is not "
                    "clear which to join with the other models'. Tie by hand: `tether.tie`."
                )
        for origin, weight in mine.items():
            known = found.setdefault(origin, [])
            if all(weight is not other for _, other in known):
                known.append((model, weight))
    return {origin: weights for origin, weights in found.items() if len(weights) > 1}


def _offer(target: Weight, model: Any, weight: Weight) -> Offer:
    held = entry_of(weight.variable, weight.name)
    return Offer(target, f"{_name(model)}: {weight.name}", held.shape, held.dtype, lambda: held.read().copy())


def _ties(model: Any, replaced: dict[str, Weight]) -> dict[str, Expression]:
    """The model's expressions with other weights in them, by path."""
    ties = {}
    for named in named_weights(model):
        if isinstance(named.variable, View):
            expression = named.variable.expression
            used = expression.weights_used()
            if any(weight.uid in replaced for weight in used):
                known = {weight.uid: replaced.get(weight.uid, weight) for weight in used}
                ties[named.path] = decode(encode(expression), known)
    return ties


def _check_gone(model: Any, replaced: dict[str, Weight]) -> None:
    left = [weight.name for weight in weights_below(model) if weight.uid in replaced]
    if left:
        raise Unsupported(
            f"A layer of {_name(model)!r} holds {left[0]!r} as an attribute, where it cannot be replaced. Load the "
            "parts as one instead: `with tether.sharing(): ...` around both loads. Nothing was changed."
        )


def _name(model: Any) -> str:
    return str(model.name) if isinstance(model, keras.layers.Layer) else repr(model)


__all__ = ["retie"]

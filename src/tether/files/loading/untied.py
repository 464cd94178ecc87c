"""Loading a checkpoint whose sharing is another than the model's: untied into tied, tied into untied."""

from __future__ import annotations

import contextlib
import copy
import os
import pathlib
from collections.abc import Iterable, Mapping

import keras

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.files.keras.archive import opened_archive, reading
from tether.files.keras.checkpoint import Values, opened
from tether.files.keras.load import explained
from tether.files.loading.assignment import Assignment, Offer, Resolve, assign_offers, check_resolve
from tether.files.loading.entries import Entry, Loaded, Report, entry_of
from tether.files.loading.matching import (
    Position,
    as_offer,
    check_built,
    in_old_order,
    offers_of,
    own_in_old_order,
    positions,
    wanted,
)
from tether.layers.family.named import named_weights
from tether.layers.tying.state import View, weights_below
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie
from tether.layers.tying.tied import KEY
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.identity import dictionaries
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- checkpoints with other sharing


def load_untied(
    model: keras.Model, path: str | os.PathLike[str], *, resolve: Resolve = "error", strict: bool = True
) -> Report:
    """Loads weights into a model from a checkpoint of the same layers, whatever is tied in either.

    A checkpoint of untied layers has a value for each; where one weight is in several of them here, the values are
    compared. A checkpoint of tied layers has one value, and fills every layer that used it: the file's ties say how.
    If anything is wrong, the model is as it was.

    Args:
        model: A built Keras model or layer.
        path: A `.keras` file, `.weights.h5`, `.weights.json` with its shards, `.npz`, or an HDF5 file of Keras 2.
            Layers are matched by their places in the model, as Keras does. Optimizer state is not read.
        resolve: What is loaded where values of one weight differ: `"error"` raises; `"first"` is that of the layer
            that comes first in the model; `"mean"`; or a function of the weight's name and the list of arrays.
        strict: Whether it is an error that the file has values for which the model has no place, or none for one of
            its weights.

    Returns:
        What was loaded from what, what was skipped or is missing, and which values differed, by how much.

    Raises:
        ValueConflict: Values of one weight differ and `resolve` is `"error"`.
        ShapeMismatch: A value has another shape.
        InvalidConfig: The file is damaged.
        TetherError: It does not fit and `strict` is set, or there is no such file.

    Example:
    ```python
    model.save_weights("untied.weights.h5")
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    report = tether.files.load_untied(model, "untied.weights.h5", resolve="mean")
    print(report.conflicting)
    ```
    """
    check_built("load_untied", model)
    check_resolve(resolve)
    name = pathlib.Path(path).name
    with keras_seam.in_step_for(model, f"load_untied({name!r})"), opened(path) as values:
        if values.old is not None:
            offers, skipped = _old_offers(model, values.old, name)
            return assign_offers(
                offers, wanted(model), resolve=resolve, strict=strict, skipped=skipped, what=repr(name)
            )
        if name.endswith(".keras"):
            note_sharing(path, values)
        found = list(positions(model))
        misleading = _others_weights(found, values)
        entries = {place: [entry] for place, entry in values.entries.items() if place not in misleading}
        offers, taken = offers_of(found, entries, values.ties())
        skipped = [(place, not _is_state(place)) for place in values.entries if place not in taken]
        report = assign_offers(offers, wanted(model), resolve=resolve, strict=strict, skipped=skipped, what=repr(name))
    _finish(each.holder for each in found)
    return report


def _others_weights(found: list[Position], values: Values) -> set[str]:
    """The places of shared weights at which the file has a weight that its layers use otherwise than the model's.

    Shared weights hang on the layers that use them, so files of models that are tied differently may have different
    weights at one place. What their notes say of the layers tells them apart; a file without notes is believed.
    """
    if not values.notes:
        return set()
    mine = {id(each.holder): each.place for each in found if isinstance(each.holder, Weight)}
    theirs = values.uids
    said = {f"{group}/{key}": tie for group, note in values.notes.items() for key, tie in note.items()}
    users: dict[str, list[bool]] = {}
    for each in found:
        tie = said.get(each.place)
        if isinstance(each.target, View) and isinstance(tie, dict):
            weights = each.target.expression.weights_used()
            here = _by_place(encode(each.target.expression), {w.uid: mine.get(id(w), "") for w in weights})
            same = here == _by_place(tie.get("steps"), theirs)
            for weight in weights:
                users.setdefault(mine.get(id(weight), ""), []).append(same)
    elsewhere = {
        theirs.get(step["weight"])
        for tie in said.values()
        if isinstance(tie, dict) and isinstance(tie.get("steps"), list)
        for step in tie["steps"]
        if isinstance(step, dict) and isinstance(step.get("weight"), str)
    }
    return {place for place in mine.values() if not all(users.get(place, [place not in elsewhere]))}


def _by_place(steps: object, places: Mapping[str, str]) -> list[object]:
    """The steps of an expression with places in the file for its weights."""
    if not isinstance(steps, list):
        return []
    return [
        {"weight": places.get(str(step["weight"]))} if isinstance(step, dict) and "weight" in step else step
        for step in steps
    ]


def _is_state(place: str) -> bool:
    """Whether an entry is not a weight: of an optimizer, of metrics, or of a random seed."""
    parts = place.split("/")
    return any(
        part in {"optimizer", "_metrics", "_compile_metrics", "_loss_tracker"}
        or part.startswith(("seed_generator", "_seed_generator", "compile_metrics", "metrics"))
        for part in parts
    )


def _finish(holders: Iterable[keras.Layer]) -> None:
    """Lets layers that derive something from their weights derive it again (Normalization)."""
    for holder in dict.fromkeys(holders):
        if hasattr(holder, "finalize_state"):
            holder.finalize_state()


# --------------------------------------------------------------------------- Keras 2


def _old_offers(
    model: keras.Model, layers: list[tuple[str, list[Entry]]], name: str
) -> tuple[list[Offer], list[tuple[str, bool]]]:
    """Keras 2 wrote layers in the model's order, and what is in them as a flat list."""
    if not hasattr(model, "layers"):
        raise Unsupported(f"{name!r} is a file of Keras 2, which holds models, and {model.name!r} is a layer.")
    mine = in_old_order(model)
    own = own_in_old_order(model)
    if own:
        mine.append(("", own))
    if len(mine) != len(layers):
        raise TetherError(
            f"{name!r} is a file of Keras 2, whose layers are matched by their order. It has {len(layers)} layers with "
            f"weights ({', '.join(layer or 'the model itself' for layer, _ in layers[:8])}), the model {len(mine)}."
        )
    offers = []
    for (theirs, entries), (layer, targets) in zip(layers, mine, strict=True):
        if len(entries) != len(targets):
            raise TetherError(
                f"The layer {theirs!r} in {name!r} has {len(entries)} weights, and {layer!r} has {len(targets)}."
            )
        offers += [as_offer(target, entry) for target, entry in zip(targets, entries, strict=True)]
    return offers, []


# --------------------------------------------------------------------------- ties in the config alone
# What is tied in a `.keras` file without notes, as older files are: its config says it, and not where.
#
# The notes beside the entries of a file say which layer reads what, and which entry is which weight. Where there are
# none, the model is made from the config, and says where its weights and ties would be in a file.


def note_sharing(path: str | os.PathLike[str], values: Values) -> None:
    """Adds the notes that a `.keras` file could have, if it has none.

    Args:
        path: The file.
        values: What was read of it.

    Raises:
        TetherError: Its config records ties, and no model can be made of it.
    """
    if values.notes or values.uids:
        return
    with reading(path), opened_archive(path) as archive:
        config = archive.config()
    if not any(KEY in entry for entry in dictionaries(config)):
        return
    try:
        model = keras.saving.deserialize_keras_object({**copy.deepcopy(config), "compile_config": None})
    except Exception as error:  # Keras, and classes of others
        why = explained(error, path, config)
        raise type(why)(
            f"{str(path)!r} has ties, without the notes beside its values that say where they are, and no model can be "
            f"made from its config to see that. {why} What `tether.files.load_model` loads and `save_model` writes has "
            "the notes."
        ) from error
    for each in positions(model):
        group, _, key = each.place.rpartition("/")
        if isinstance(each.holder, Weight):
            values.uids[each.holder.uid] = each.place
        elif isinstance(each.target, View):
            dtype = keras_seam.stored_dtype(each.target)
            tie = {"dtype": dtype, "steps": encode(each.target.expression)}
            values.notes.setdefault(group, {})[key] = tie


# --------------------------------------------------------------------------- weights tied again
# Joining parts of one tied model that were saved and loaded apart.


def retie(*models: object, resolve: Resolve = "error") -> Report:
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
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(4), kernel=codec)
    decode = tether.tie(keras.layers.Dense(8), kernel=codec.T)
    keras.Sequential([keras.Input((8,)), encode]).save("encoder.keras")
    keras.Sequential([keras.Input((4,)), decode]).save("decoder.keras")

    encoder = keras.saving.load_model("encoder.keras")
    decoder = keras.saving.load_model("decoder.keras")
    print(tether.files.retie(encoder, decoder))
    # loaded 1: codec <- sequential: codec, sequential_1: codec
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
    plan = Assignment(offers, resolve)
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


def _joined(models: tuple[keras.Model, ...]) -> dict[str, list[tuple[keras.Model, Stored]]]:
    """The weights of one origin in different models, by origin."""
    found: dict[str, list[tuple[keras.Model, Stored]]] = {}
    for model in models:
        mine: dict[str, Stored] = {}
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


def _offer(target: Stored, model: keras.Model, weight: Stored) -> Offer:
    held = entry_of(weight.variable, weight.name)
    return Offer(target, f"{_name(model)}: {weight.name}", held.shape, held.dtype, lambda: held.read().copy())


def _ties(model: keras.Model, replaced: dict[str, Stored]) -> dict[str, Expression]:
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


def _check_gone(model: keras.Model, replaced: dict[str, Stored]) -> None:
    left = [weight.name for weight in weights_below(model) if weight.uid in replaced]
    if left:
        raise Unsupported(
            f"A layer of {_name(model)!r} holds {left[0]!r} as an attribute, where it cannot be replaced. Load the "
            "parts as one instead: `with tether.sharing(): ...` around both loads. Nothing was changed."
        )


def _name(model: keras.Model) -> str:
    return str(model.name) if isinstance(model, keras.layers.Layer) else repr(model)


__all__ = ["load_untied", "note_sharing", "retie"]

"""Loading a checkpoint whose sharing is another than the model's: untied into tied, tied into untied."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from tether.errors import TetherError, Unsupported
from tether.files import unnoted
from tether.files.entries import Entry
from tether.files.filling import Offer, Resolve, check_resolve, fill
from tether.files.keras_files import Values, opened
from tether.files.offering import as_offer, offers_of
from tether.files.positions import Position, check_built, in_old_order, own_in_old_order, positions, wanted
from tether.files.report import Report
from tether.layers.tying.state import View
from tether.weights.codec import encode
from tether.weights.weight import Weight


def load_untied(model: Any, path: str | os.PathLike[str], *, resolve: Resolve = "error", strict: bool = True) -> Report:
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
    report = tether.files.load_untied(tied_model, "untied.weights.h5", resolve="mean")
    print(report.conflicting)
    ```
    """
    check_built("load_untied", model)
    check_resolve(resolve)
    name = pathlib.Path(path).name
    with opened(path) as values:
        if values.old is not None:
            offers, skipped = _old_offers(model, values.old, name)
            return fill(offers, wanted(model), resolve=resolve, strict=strict, skipped=skipped, what=repr(name))
        if name.endswith(".keras"):
            unnoted.note(path, values)
        found = list(positions(model))
        misleading = _others_weights(found, values)
        entries = {place: [entry] for place, entry in values.entries.items() if place not in misleading}
        offers, taken = offers_of(found, entries, values.ties())
        skipped = [(place, not _is_state(place)) for place in values.entries if place not in taken]
        report = fill(offers, wanted(model), resolve=resolve, strict=strict, skipped=skipped, what=repr(name))
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


def _by_place(steps: Any, places: Mapping[str, str]) -> list[Any]:
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


def _finish(holders: Iterable[Any]) -> None:
    """Lets layers that derive something from their weights derive it again (Normalization)."""
    for holder in dict.fromkeys(holders):
        if hasattr(holder, "finalize_state"):
            holder.finalize_state()


# --------------------------------------------------------------------------- Keras 2


def _old_offers(
    model: Any, layers: list[tuple[str, list[Entry]]], name: str
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


__all__ = ["load_untied"]

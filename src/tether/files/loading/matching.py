"""Which entry of a file is for which weight of a model: by the places of layers, and by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import keras

from tether import keras_seam
from tether.errors import TetherError, Unsupported
from tether.files.loading.assignment import Offer, Wanted
from tether.files.loading.entries import Entry, StoredTie
from tether.layers.family.named import Named, named_weights, names_apart
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import View, ordered_variables, state_of, stored_variables, weights_below
from tether.layers.tying.tied import own_entries
from tether.types import Tensor
from tether.weights.algebra import added_weights, base_of
from tether.weights.expression import Expression, Stored, program
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- positions
# Where the values of a model belong: in Keras's files by place, in others by name.


@dataclass(frozen=True)
class Position:
    """An entry that a Keras file of the model has, or would have if nothing were tied."""

    place: str
    """`layers/dense/vars/0`, as in the file."""
    holder: keras.Layer
    """The layer that writes it."""
    target: keras.Variable | Tensor
    """A variable, a view, or what else a layer writes."""


def check_built(function: str, model: keras.Model) -> None:
    """Refuses what is no layer, and what has no weights yet.

    Raises:
        TetherError: It is one of these.
    """
    refuse_layer(f"files.{function}", model)
    if not model.built:
        raise TetherError(f"{model.name!r} is not built yet. Call it on data first, or `build` it.")


def positions(model: keras.Model) -> Iterator[Position]:
    """The entries of all layers and random seeds, in the order in which Keras writes them."""
    for place, holder in keras_seam.saved_objects(model):
        if isinstance(holder, (keras.layers.Layer, keras.random.SeedGenerator)):
            below = f"{place}/vars" if place else "vars"
            for key, target in own_entries(holder).items():
                yield Position(f"{below}/{key}", holder, target)


def stored_names(model: keras.Model, named: Sequence[Named] | None = None) -> dict[int, str]:
    """The name under which a file by names has each stored weight, by the variable's id.

    It is that of the first layer that uses the weight as it is; else of the first one of which it is the base; else
    the weight's path. If that is taken, it gets a number in the model's order. `named` are the weights of its layers,
    if they were found already.
    """
    found: dict[int, str] = {}
    later: list[tuple[int, str]] = []
    names = _position_names(named or named_weights(model))
    for each, name in names:
        if not isinstance(each.variable, View):
            found.setdefault(id(each.variable), name)
            continue
        base = base_of(each.variable.expression)
        if base is not None:
            later.append((id(base.variable), name))
            if each.variable.expression.weights_used() == (base,):
                found.setdefault(id(base.variable), name)
    for key, name in later:
        found.setdefault(key, name)
    taken = {name for _, name in names}
    for variable in model.weights:
        if id(variable) not in found:
            found[id(variable)] = keras_seam.numbered(dotted(str(variable.path)), taken)
            taken.add(found[id(variable)])
    return found


def _owners(model: keras.Model) -> dict[int, Stored]:
    """The shared weights below a model, by their variables' ids."""
    return {id(weight.variable): weight for weight in weights_below(model) if weight.is_built}


def named_positions(model: keras.Model, named: Sequence[Named]) -> list[Position]:
    """What a file by names may have: the stored weights by their names, then what layers call them."""
    owners = _owners(model)
    names = stored_names(model, named)
    found: dict[str, Position] = {}
    for variable in model.weights:
        owner = owners.get(id(variable))
        name = names[id(variable)]
        found[name] = Position(name, owner, variable if owner is None else owner)
    for each, name in _position_names(named):
        found.setdefault(name, Position(name, each.layer, each.variable))
    for weight in owners.values():
        for name in (dotted(weight.name), dotted(weight.path)):
            found.setdefault(name, Position(name, weight, weight))
    return list(found.values())


def tied_names(model: keras.Model, named: Sequence[Named] | None = None) -> dict[str, View]:
    """What layers call their views, but those that read the stored weight of that name as it is."""
    found = named or named_weights(model)
    names = set(stored_names(model, found).values())
    return {
        name: each.variable
        for each, name in _position_names(found)
        if isinstance(each.variable, View) and not (name in names and isinstance(each.variable.expression, Weight))
    }


def _position_names(found: Sequence[Named]) -> list[tuple[Named, str]]:
    """The weights of layers, by the names that people gave to the layers where these tell them apart."""
    names = names_apart(found)
    return [(named, dotted(names[named.path])) for named in found]


def dotted(path: str) -> str:
    """A path with dots, as names of tensors have them."""
    return path.replace("/", ".")


def wanted(model: keras.Model, named: Sequence[Named] | None = None) -> list[Wanted]:
    """The stored weights that a file should fill; what an adapter adds to its base may be new."""
    added = _of_adapters(named or named_weights(model))
    return [Wanted(variable, str(variable.path), id(variable) not in added) for variable in model.weights]


def _of_adapters(weights: Sequence[Named]) -> set[int]:
    """The variables that were only added to others."""
    found: set[int] = set()
    others: set[int] = set()
    for named in weights:
        is_view = isinstance(named.variable, View)
        added = {id(weight.variable) for weight in added_weights(named.variable.expression)} if is_view else set()
        found |= added
        others |= {id(variable) for variable in stored_variables(named.variable)} - added
    return found - others


def in_old_order(model: keras.Model) -> list[tuple[str, list[keras.Variable]]]:
    """The layers of a model that have weights, with these as Keras 2 wrote them: those that train first."""
    found = []
    for layer in model.layers:
        trained, others = _of_layer(layer)
        if trained or others:
            found.append((layer.name, trained + others))
    return found


def own_in_old_order(model: keras.Model) -> list[keras.Variable]:
    """The weights of a model itself, as Keras 2 wrote them."""
    state = state_of(model)
    lists = keras_seam.variable_lists(model) if state is None else ordered_variables(model, state)
    return [variable for store in keras_seam.STORES for variable in lists[store]]


def _of_layer(layer: keras.Layer) -> tuple[list[keras.Variable], list[keras.Variable]]:
    found: dict[str, dict[int, keras.Variable]] = {store: {} for store in keras_seam.STORES}
    waiting = [layer]
    while waiting:
        current = waiting.pop(0)
        state = state_of(current)
        lists = keras_seam.variable_lists(current) if state is None else ordered_variables(current, state)
        for store in keras_seam.STORES:
            found[store].update((id(variable), variable) for variable in lists[store])
        hung = [below for below in keras_seam.sublayers(current) if not isinstance(below, Weight)]
        waiting = hung + waiting
    trained, others = (list(found[store].values()) for store in keras_seam.STORES)
    return trained, others


# --------------------------------------------------------------------------- what is offered
# Which of a file's values are for which of a model's weights, whatever is tied in either.


def offers_of(
    found: Sequence[Position], entries: Mapping[str, Sequence[Entry]], ties: Mapping[str, StoredTie]
) -> tuple[list[Offer], set[str]]:
    """What a file's entries offer to a model, and its ties where it has no entry.

    Args:
        found: The model's positions.
        entries: The file's entries by position; all that one position has must agree.
        ties: The file's ties by position.

    Returns:
        The offers, and the names of the entries that were of use.
    """
    offers: list[Offer] = []
    taken: set[str] = set()
    filled: set[int] = set()
    for each in found:
        for entry in entries.get(each.place, ()):
            _check_target(each)
            taken.add(entry.name)
            offers.append(as_offer(each.target, entry))
            filled |= {id(weight) for weight in weights_at(each)}
    for each in found:
        tie = ties.get(each.place)
        if tie is not None and not entries.get(each.place):
            taken |= {entry.name for entry in tie.weights.values()}
            weights = weights_at(each)
            if not weights or not all(id(weight) in filled for weight in weights):
                offers.append(_tied_offer(each.target, tie))
    return offers, taken


def of_one_structure(views: Mapping[str, View], ties: Mapping[str, StoredTie]) -> dict[int, list[Entry]]:
    """The entries of weights by their ids, where the file's tie computes the same of its weights as the model's.

    So what the weights are called, there and here, plays no part.
    """
    found: dict[int, dict[str, Entry]] = {}
    for place, view in views.items():
        if place in ties:
            for mine, theirs in _pairs(view.expression, ties[place].expression).items():
                entry = ties[place].weights[theirs]
                found.setdefault(id(mine), {})[entry.name] = entry
    return {key: list(named.values()) for key, named in found.items()}


def _pairs(mine: Expression, theirs: Expression) -> dict[Weight, Weight]:
    """The weights of one expression with those of another; none if the two differ in more than these."""
    steps, others = program(mine), program(theirs)
    pairs: dict[Weight, Weight] = {}
    for step, other in zip(steps, others, strict=False):
        one, two = step.expression, other.expression
        if isinstance(one, Weight) and isinstance(two, Weight) and one.shape == two.shape:
            pairs[one] = two
        elif not step.same_as(other):
            return {}
    return pairs if len(steps) == len(others) else {}


def weights_at(position: Position) -> list[Stored]:
    """The stored weights behind a position, if it has weights of Tether's."""
    for each in (position.target, position.holder):
        if isinstance(each, Weight):
            return [each]
    return list(position.target.expression.weights_used()) if isinstance(position.target, View) else []


def as_offer(target: keras.Variable | Stored, entry: Entry) -> Offer:
    """An entry for a target."""
    return Offer(target, entry.name, entry.shape, entry.dtype, entry.read, entry.rows)


def _tied_offer(target: keras.Variable | Stored, tie: StoredTie) -> Offer:
    source = ", ".join(entry.name for entry in tie.weights.values())
    return Offer(target, f"{source} by the tie of {tie.name}", tie.shape, tie.dtype, tie.read)


def _check_target(position: Position) -> None:
    if not isinstance(position.target, (keras.Variable, View, Weight)):
        raise Unsupported(
            f"{position.holder.name!r} writes more than variables to its files ({position.place!r}), so it must read "
            "them itself: load the file with Keras's own `load_weights`."
        )


__all__ = [
    "Position",
    "as_offer",
    "check_built",
    "dotted",
    "in_old_order",
    "named_positions",
    "of_one_structure",
    "offers_of",
    "own_in_old_order",
    "positions",
    "stored_names",
    "tied_names",
    "wanted",
    "weights_at",
]

"""Making a use: a layer's attribute reads an expression from now on.

Nothing is changed before everything is known to fit, and a failure half way is rolled back.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard

import keras

from tether import keras_seam, patterns
from tether.errors import TetherError, UnknownName, received
from tether.layers.tying import paths
from tether.layers.tying.counterparts import Counterparts, Origin, Source
from tether.layers.tying.fit import given_twice, refuse_layer, refuse_tie, refuse_twice, refuse_unsupported
from tether.layers.tying.penalty import ALIVE, Penalty, Stated
from tether.layers.tying.state import Tie, View, arguments_in, hang_weights, state_of, weights_below
from tether.layers.tying.swap import Rollback, swapped
from tether.layers.tying.tied import become_tied, replace, take_arguments, takes_arguments
from tether.types import AnyLayer
from tether.weights.expression import Expression, Stored, as_expression, instead_of, resolved
from tether.weights.leaves import Argument
from tether.weights.weight import Weight


def tie(layer: AnyLayer, weights: Mapping[str, object] | keras.Layer | None = None, /, **by_name: object) -> AnyLayer:
    """Makes weights of a layer read expressions, in place, and returns the layer.

    In the place of an expression, a layer stands for its weights, and a string for weights of `layer` itself: each
    weight that the key names shares the one that corresponds to it, and takes its value. The stars of a string stand
    for what the last stars of its key do. What has no counterpart of its shape is an error, and nothing is tied.

    Args:
        layer: A Keras layer or model, built or not.
        weights: Expressions by path, for names that are not identifiers: `{"query/kernel": w}`. A path
            is made of attributes, indices and names of sub-layers, and ends in a weight's name. Below a built layer it
            may be a pattern for several (`tether.patterns`): `{"*/query/kernel": w}`; a later one counts.
            Another layer, made alike, shares all its weights: `tie(layer, other)` is `tie(layer, {"**": other})`.
        **by_name: Expressions by the weight's name or attribute: `kernel=codec.T`. A number or an
            array is a constant.

    Returns:
        The same layer. It is still an instance of its class.

    Raises:
        UnknownName: A path names no weight, or two. For a layer that is not built this is raised when
            it is built.
        ShapeMismatch: An expression has another shape than the weight.
        UnknownShape: A weight in an expression has no shape and this tie cannot tell it.
        Unsupported: The layer or the weight cannot be tied; the error names the way that works.

    Example:
    ```python
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(64, activation="relu"), kernel=codec)
    decode = tether.tie(keras.layers.Dense(784), kernel=codec.T)

    tether.tie(layer, parent)                                    # the weights of a layer that is made alike
    tether.tie(model, {"attention/key/**": "attention/query/**"})  # and those of the model's own
    ```
    """
    wanted, shared = _wanted(layer, weights, by_name)
    made_by_code = keras_seam.maker(layer) is not None
    if shared:
        _share(layer, wanted, shared, made_by_code=made_by_code)
    else:
        _tie_all(layer, wanted, _places(layer, wanted), made_by_code=made_by_code)
    return layer


def _share(layer: keras.Layer, wanted: dict[str, Expression], shared: dict[str, Source], *, made_by_code: bool) -> None:
    """Ties to weights of layers, which are promoted for it; with them, nothing is left of a failure."""
    places = _places(layer, [*wanted, *shared])
    for place in places.values():
        refuse_unsupported(place.layer)
    roots = {id(source.root): source.root for source in shared.values()}
    with contextlib.ExitStack() as stack:
        for root in {id(layer): layer, **roots}.values():
            stack.enter_context(Rollback.below(root))
        for root in roots.values():
            found = weights_of(root, dict.fromkeys(s.path for s in shared.values() if s.root is root))
            wanted.update((path, resolved(found[s.path])) for path, s in shared.items() if s.root is root)
        if wanted:
            _tie_all(layer, wanted, _places(layer, wanted), made_by_code=made_by_code)


def tie_later(layer: keras.Layer, ties: Mapping[str, Expression], *, made_by_code: bool) -> None:
    """Makes ties that were asked for earlier; whether a constructor asked for them was known then."""
    _tie_all(layer, dict(ties), _places(layer, ties), made_by_code=made_by_code)


def restore(layer: keras.Layer, ties: Mapping[str, Expression], takes: list[Argument], penalties: list[Stated]) -> None:
    """Makes the ties and penalties that a config records.

    A constructor that copies a tied layer for itself makes that copy, and its ties, again wherever it runs.
    """
    if ties:
        made_by_code = keras_seam.maker(layer) is not None
        _tie_all(layer, dict(ties), _places(layer, dict(ties)), made_by_code=made_by_code, is_new=True)
    if takes:
        become_tied(layer).takes = list(takes)
        take_arguments(layer)
    state = state_of(layer)
    if penalties or (state is not None and state.penalties):
        replace_penalties(layer, penalties)


def weight_of(layer: keras.Layer, name: str) -> Weight | Expression:
    """The stored weight behind a layer's weight, to be used elsewhere: promoted in place if it has none.

    The layer keeps its values, and the very Variable object, so an optimizer that knows it stays valid.
    For a layer that is not built the weight gets its shape and values when the layer builds.

    Args:
        layer: A Keras layer or model.
        name: The weight's name, attribute or path.

    Returns:
        The `tether.Weight`; for a weight that is tied to a composite expression, that expression.

    Raises:
        UnknownName: The name names no weight, or two.

    Example:
    ```python
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    ```
    """
    return weights_of(layer, [name])[name]


def weights_of(layer: keras.Layer, names: Iterable[str], *, made_by_code: bool | None = None) -> dict[str, Expression]:
    """What `weight_of` gives, for several names at once; `made_by_code`, if that was known before."""
    refuse_layer("weight_of", layer)
    names = list(names)
    holdings = paths.Holdings(len(names))
    found: dict[str, Expression] = {}
    made: dict[str, Expression] = {}
    places: dict[str, paths.Place] = {}
    by_place: dict[tuple[int, paths.Path], Weight] = {}
    for name in names:
        place = paths.locate(layer, paths.split(name), holdings)
        state = state_of(place.layer)
        if isinstance(place.variable, View):
            found[name] = place.variable.expression
        elif state is not None and place.leaf in state.pending:
            found[name] = state.pending[place.leaf].expression
        else:
            key = (id(place.layer), place.leaf) if place.variable is None else (id(place.variable), ())
            if key not in by_place:
                label = f"{place.layer.name}.{place.leaf_name}".replace("/", ".")
                made[name] = by_place[key] = Weight(name=label)
                places[name] = place
                by_place[key].find_path()  # of a layer that is not built: the path that the layer gives its variable
            found[name] = by_place[key]
    if made:
        by_code = keras_seam.maker(layer) is not None if made_by_code is None else made_by_code
        _tie_all(layer, made, places, made_by_code=by_code)
    return found


# --------------------------------------------------------------------------- what is asked for


def _wanted(
    layer: keras.Layer, weights: object, by_name: Mapping[str, object]
) -> tuple[dict[str, Expression], dict[str, Source]]:
    """What is given for each weight: expressions, and weights of layers that are to be shared."""
    refuse_layer("tie", layer)
    if isinstance(weights, keras.layers.Layer) and _is_origin(weights):
        weights = {"**": weights}
    if weights is not None and not isinstance(weights, Mapping):
        raise TetherError(
            "`tie` takes expressions by name: `tie(layer, kernel=w)` or `tie(layer, {'query/kernel': w})`; or another "
            f"layer, whose weights are shared. {received(weights=weights)}"
        )
    given = dict(weights or {})
    twice = set(given) & set(by_name)
    if twice:
        raise TetherError(given_twice(twice))
    given.update(by_name)
    if not given:
        raise TetherError(
            f"`tie` needs at least one weight of layer {layer.name!r}, as in `tie(layer, kernel=w)`, and none came. It "
            f"has: {', '.join(paths.weight_paths(layer)) or 'none yet'}."
        )
    counterparts = Counterparts(layer) if any(map(_is_origin, given.values())) else None
    wanted: dict[str, Expression] = {}
    shared: dict[str, Source] = {}
    for path, value in by_path(layer, given, counterparts).items():
        if isinstance(value, Source):
            shared[path] = value
            continue
        try:
            wanted[path] = resolved(as_expression(value))
        except TypeError:
            raise TetherError(
                f"The weight {path!r} of layer {layer.name!r} can be tied to a `tether.Weight`, an expression, a "
                f"number or an array.{instead_of(value, path.rpartition('/')[2])} "
                f"{received(type=type(value).__name__)}"
            ) from None
    return wanted, {} if counterparts is None else counterparts.checked(shared)


def _is_origin(value: object) -> TypeGuard[Origin]:
    """Whether a value in the place of an expression stands for weights that are to be shared one by one."""
    return isinstance(value, str) or (isinstance(value, keras.layers.Layer) and not isinstance(value, Weight))


def by_path(layer: keras.Layer, given: Mapping[Any, Any], counterparts: Counterparts | None = None) -> dict[str, Any]:
    """What is given by path, where patterns may stand for several, and layers for their weights."""
    exact = all(patterns.is_exact(key) or not isinstance(key, (str, re.Pattern, tuple)) for key in given)
    if exact and counterparts is None:
        return dict(given)
    names: dict[str, str] = {}
    words: dict[str, dict[str, bool]] = {}
    for path, name, own, variable in paths.walk(layer):
        names["/".join(path)], words["/".join(path)] = "/".join(name), paths.words_of(own, variable)
    sources: dict[Any, dict[str, Source]] = {}

    def choose(pattern: Any) -> Iterable[str]:
        if counterparts is not None and _is_origin(given.get(pattern)):
            sources[pattern] = counterparts.of(pattern, given[pattern])
            return sources[pattern]
        chosen = [path for path, name in names.items() if patterns.fits(pattern, path, name, words=words[path])]
        if not chosen and not patterns.is_exact(pattern):
            raise UnknownName(
                f"No weight of {layer.name!r} fits the pattern {pattern!r}. {patterns.missed(pattern, names.values())}"
            )
        return chosen or [pattern]

    by_path = patterns.spread({key: (key, value) for key, value in given.items()}, choose)
    return {path: sources[key][path] if key in sources else value for path, (key, value) in by_path.items()}


def _places(layer: keras.Layer, wanted: Collection[str]) -> dict[str, paths.Place]:
    holdings = paths.Holdings(len(wanted))
    return {path: paths.locate(layer, paths.split(path), holdings) for path in wanted}


def _tie_all(
    layer: keras.Layer,
    wanted: dict[str, Expression],
    places: dict[str, paths.Place],
    *,
    made_by_code: bool,
    is_new: bool = False,
) -> None:
    refuse_twice(layer, places)
    changed = {id(place.layer): place.layer for place in places.values()}
    affected = {id(layer): layer, **changed}
    affected.update({id(place.recorder): place.recorder for place in places.values()})
    affected.update({id(place.lent[0]): place.lent[0] for place in places.values() if place.lent is not None})
    involved = {id(w): w for expression in wanted.values() for w in expression.weights_used()}
    for place in places.values():
        if isinstance(place.variable, View):
            involved.update({id(w): w for w in place.variable.expression.weights_used()})
    for path, place in places.items():
        refuse_tie(place.layer, place.leaf_name, place.variable, wanted[path])
    if not is_new:
        built = [place.layer for place in places.values() if place.variable is not None]
        keras_seam.before_change(built, makes_variables=False)
    takes = any(map(arguments_in, wanted.values()))
    # One tie that waits for its variable is known to fit, as far as anything can: nothing can fail below.
    waits = len(places) == 1 and not takes and all(place.variable is None for place in places.values())
    with Rollback([] if waits else [*affected.values(), *involved.values()]), swapped(changed.values()):
        for path, place in places.items():
            state = become_tied(place.layer)
            become_tied(place.recorder)
            asked = Tie(weakref.ref(place.recorder), place.recorded_path, wanted[path], made_by_code)
            asked.record(place.recorder, place.recorded_path)
            if place.lent is not None:
                lent = become_tied(place.lent[0]).lent
                lent[:] = [(tie, path) for tie, path in lent if path != place.lent[1]] + [(asked, place.lent[1])]
            if place.variable is None:
                state.pending[place.leaf] = asked
            else:
                replace(place.layer, place.variable, place.leaf_name, asked)
            if place.recorder is not layer and arguments_in(wanted[path]):
                taken = become_tied(layer).takes
                taken.extend(a for a in arguments_in(wanted[path]) if a not in taken)
        for taker in {id(each): each for each in (layer, *(place.recorder for place in places.values()))}.values():
            if takes or takes_arguments(taker):
                take_arguments(taker)
        keras_seam.refuse_mixed(changed.values())


# --------------------------------------------------------------------------- penalties
# Where a penalty is recorded, and how it comes there and goes again.
#
# A model made by Keras from its layers has no config but theirs, and a clone of it asks only them. So a penalty is
# recorded on a layer whose config every save and every clone holds; which one makes no difference to the loss, since
# Keras asks each layer below a model once.


GRAPHS = (keras_seam.Functional, keras_seam.Sequential)


def penalty_places(model: keras.Model, weights: tuple[Stored, ...]) -> tuple[keras.Layer, keras.Layer | None]:
    """Who records a penalty of these weights, and the layer that a clone of a graph around it asks, if any."""
    recorder, current = None, model
    while isinstance(current, GRAPHS):
        if recorder is None and not keras_seam.holds_its_layers_configs(current):
            recorder = current
        children = [child for child in keras_seam.sublayers(current) if _may_record(child)]
        if not children:
            break
        with_weights = (child for child in children if set(weights_below(child)) & set(weights))
        current = next(with_weights, children[0])
    if recorder is None or recorder is current:
        return current, None
    return recorder, current


def _may_record(layer: keras.Layer) -> bool:
    return not isinstance(layer, (Weight, keras.layers.InputLayer))


def attach_penalty(penalty: Penalty, recorder: keras.Layer, lent: object = None) -> None:
    """Records a penalty on a layer; from now on it is one of its losses."""
    with swapped([recorder]):
        become_tied(recorder).penalties.append(penalty)
        penalty.register()
        penalty.follow(keras_seam.own_trainable_flag(recorder))
        hang_weights(recorder)
    if lent is not None:
        become_tied(lent).penalties.append(penalty)


def detach_penalty(penalty: Penalty, holders: list[keras.Layer]) -> None:
    """Takes a penalty off the layers that have it; they stay tied layers."""
    penalty.unregister()
    for layer in holders:
        state = state_of(layer)
        if state is not None and any(other is penalty for other in state.penalties):
            with swapped([layer]):
                state.penalties = [other for other in state.penalties if other is not penalty]
                hang_weights(layer)


def replace_penalties(layer: keras.Layer, found: list[Stated]) -> None:
    """Gives a layer the penalties of its config, instead of those that its own constructor made."""
    state = state_of(layer)
    for penalty in list(state.penalties) if state is not None else []:
        detach_penalty(penalty, [layer])
    for a, b, strength, owned in found:
        attach_penalty(Penalty(layer, a, b, strength, owned), layer)


def has_penalties() -> bool:
    """Whether there is any penalty."""
    return bool(ALIVE)


def drop_void_penalties(layers: list[keras.Layer]) -> None:
    """Takes off the penalties of which a weight is no longer in use."""
    for layer in layers:
        state = state_of(layer)
        for penalty in list(state.penalties) if state is not None else []:
            if penalty.is_void:
                detach_penalty(penalty, [layer])


__all__ = ["by_path", "restore", "tie", "tie_later", "weight_of", "weights_of"]

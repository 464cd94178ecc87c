"""Names of weights: a path of attributes and indices from a layer down to one of its variables.

A segment may also be a sub-layer's `name`, as a convenience for people. What is recorded is the
canonical path, which is the same in every instance of the layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import keras

from tether import keras_seam
from tether.errors import UnknownName, Unsupported, received
from tether.layers.tying.state import STATE, WEIGHTS, shape_of, slots_of
from tether.patterns import ALL_LINEAR
from tether.weights.weight import Weight

Path = tuple[str, ...]
"""The way from a layer to a weight or a sub-layer: attributes, and places in containers."""
Container = list[object] | tuple[object, ...] | dict[str, object]
Named = TypeVar("Named", bound=keras.Layer | keras.Variable)


@dataclass(frozen=True)
class Place:
    """Where a path leads: the layer that has (or will make) the variable, and who records a tie of it."""

    layer: keras.Layer
    leaf: Path
    """What is left of the path: a variable's name, or more as long as the layer is not built."""
    recorder: keras.Layer
    recorded_path: Path
    variable: keras.Variable | None = None
    """The variable or view, if it exists."""
    leaf_name: str = ""
    lent: tuple[keras.Layer, Path] | None = None
    """A layer of a graph that the path goes through, and the rest of the path from there: a clone of the
    graph copies its layers one by one, and asks only them for their configs."""


def split(path: object) -> Path:
    """The segments of a path.

    Raises:
        UnknownName: It is not a non-empty string of segments.
    """
    if not isinstance(path, str) or not path or any(not part for part in path.split("/")):
        raise UnknownName(f"A weight is named by a path such as 'kernel' or 'query/kernel'. {received(path=path)}")
    return tuple(path.split("/"))


def locate(root: keras.Layer, path: Path, holdings: Holdings | None = None) -> Place:
    """Follows a path from a layer.

    Args:
        root: The layer.
        path: The path.
        holdings: What the layers hold, if several paths are followed while nothing changes.

    Raises:
        UnknownName: It leads nowhere, or to two places.
    """
    held = _Held if holdings is None else holdings.of
    layer, recorder, recorded, rest = root, root, cast("Path", ()), path
    graph: tuple[keras.Layer, Path] | None = None
    while True:
        _refuse_in_place(layer, rest)
        found = _find_variable(held(layer), rest)
        if found is not None:
            variable, canonical = found
            graph = None if graph is None or graph[0] is layer else (graph[0], graph[1] + canonical)
            return Place(layer, rest, recorder, recorded + canonical, variable, "/".join(canonical), graph)
        step = _find_child(held(layer), rest)
        if step is None:
            if layer.built:
                raise UnknownName(nothing_there(root, path, layer, rest))
            graph = None if graph is None or graph[0] is layer else (graph[0], graph[1] + rest)
            return Place(layer, rest, recorder, recorded + rest, None, rest[-1], graph)
        child, canonical, rest = step
        if keras_seam.holds_its_layers_configs(layer):
            recorder, recorded, graph = child, (), None
        else:
            recorded = recorded + canonical
            if isinstance(layer, (keras_seam.Functional, keras_seam.Sequential)):
                graph = (child, ())
            elif graph is not None:
                graph = (graph[0], graph[1] + canonical)
        if not rest:
            raise UnknownName(
                f"The path {'/'.join(path)!r} of layer {root.name!r} names a layer, not a weight. "
                f"It has: {', '.join('/'.join((*path, name)) for name in weight_paths(child)) or 'no weights yet'}."
            )
        layer = child


_FOREIGN = (keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer)


def _refuse_in_place(layer: keras.Layer, rest: Path) -> None:
    if isinstance(layer, _FOREIGN):
        raise Unsupported(
            f"Layer {layer.name!r} ({type(layer).__name__}) computes with parameters of its own framework, so a "
            "tie would have no effect. Write it as a Keras layer."
        )
    if isinstance(layer, keras.layers.SpectralNormalization) and rest[-1] in ("kernel", "embeddings"):
        raise Unsupported(
            f"The SpectralNormalization {layer.name!r} overwrites the {rest[-1]} of its layer at every step, for "
            "everybody who shares it. Tie the layer without the wrapper."
        )


# --------------------------------------------------------------------------- variables


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of the layer itself, views included, sub-layers not."""
    found = [variable for variables in keras_seam.variable_lists(layer).values() for variable in variables]
    return found + [slot.view for slot in slots_of(layer)]


def holders(layer: keras.Layer, variable: keras.Variable | keras.Layer | Weight) -> list[Path]:
    """The attributes, and places in containers, that hold a variable or sub-layer, public ones first."""
    return _places(layer, [variable]).get(id(variable), [])


def _places(layer: keras.Layer, wanted: Iterable[object]) -> dict[int, list[Path]]:
    """The attributes, and places in containers, that hold each of several variables or sub-layers, by its id."""
    ids = set(map(id, wanted))
    found: dict[int, list[Path]] = {}
    for path, value in _attributes(layer):
        if id(value) in ids:
            found.setdefault(id(value), []).append(path)
    return {key: sorted(places, key=lambda p: (p[0].startswith("_"), len(p), p)) for key, places in found.items()}


def _attributes(layer: keras.Layer) -> Iterator[tuple[Path, object]]:
    for name, value in keras_seam.attributes(layer):
        if name not in (STATE, WEIGHTS):
            yield from _inside((name,), value, 0)


def _inside(path: Path, value: object, depth: int) -> Iterator[tuple[Path, object]]:
    yield path, value
    if depth < 4 and isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _inside((*path, str(place)), item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for key, item in list(value.items()):
            if isinstance(key, str):
                yield from _inside((*path, key), item, depth + 1)


def put_item(layer: keras.Layer, path: Path, value: object, *, what: str = "weight", advice: str = "") -> None:
    """Puts a value where an attribute of the layer, or a container in one, holds another, past all trackers.

    Raises:
        Unsupported: The container is a tuple. The error names what is kept in it, and ends in the advice.
    """
    refuse_fixed(layer, path, what=what, advice=advice)
    container = _container(layer, path)
    if isinstance(container, list):
        list.__setitem__(container, int(path[-1]), value)
    elif isinstance(container, dict):
        dict.__setitem__(container, path[-1], value)


def refuse_fixed(layer: keras.Layer, path: Path, *, what: str = "weight", advice: str = "") -> None:
    """Raises if what an attribute, or a container in one, holds cannot be replaced: it is in a tuple.

    Raises:
        Unsupported: The error names what is kept in it, and ends in the advice.
    """
    if isinstance(_container(layer, path), tuple):
        raise Unsupported(
            f"Layer {layer.name!r} keeps the {what} in the tuple {path[0]!r}, which cannot be changed.{advice}"
        )


def _container(layer: keras.Layer, path: Path) -> Container:
    container: Container = vars(layer)
    for key in path[:-1]:
        container = _item(container, key)
    return container


class Holdings:
    """What layers hold, each looked through once: for who follows many paths, as long as nothing changes."""

    def __init__(self, count: int | None = None) -> None:
        """For a number of paths; left out, for many."""
        self._many = count is None or count > 1
        self._known: dict[int, _Held] = {}

    def of(self, layer: keras.Layer) -> _Held:
        """What a layer holds, looked through once for all paths."""
        if id(layer) not in self._known:
            self._known[id(layer)] = _Held(layer, many=self._many)
        return self._known[id(layer)]


class _Held:
    """What one layer holds: its own variables and its sub-layers, by name and by place, each found when asked for.

    If many are going to be asked for, all are found with the first: a model may have a thousand layers.
    """

    def __init__(self, layer: keras.Layer, *, many: bool = False) -> None:
        self.layer, self.many = layer, many
        self.variables = own_variables(layer)
        self._asked: dict[str, object] = {}

    def attribute(self, name: str) -> object:
        """An attribute of the layer; `None` if it has none, or not yet."""
        if name not in self._asked:
            try:
                self._asked[name] = getattr(self.layer, name, None)
            except Exception:  # a property that is not ready before build
                self._asked[name] = None
        return self._asked[name]

    @cached_property
    def by_name(self) -> dict[str, list[keras.Variable]]:
        """The variables of each name."""
        return _grouped({id(variable): variable for variable in self.variables}.values())

    @cached_property
    def places(self) -> dict[int, list[Path]]:
        """Where variables and sub-layers are, public places first, by their ids."""
        return _places(self.layer, [*self.variables, *self.children])

    @cached_property
    def at(self) -> dict[Path, keras.Variable]:
        """The variables at each place."""
        return {place: variable for variable in self.variables for place in self.places.get(id(variable), ())}

    @cached_property
    def names(self) -> dict[int, Path]:
        """The canonical path of each variable, by its id.

        It is the variable's name, or its attribute where the name was made up or is not the only one of its kind.
        """
        found = {}
        for variable in self.variables:
            unique = len(self.by_name[variable.name]) == 1
            places = self.places.get(id(variable)) if not unique or _is_made_up(variable) else None
            found[id(variable)] = places[0] if places else (variable.name,)
        return found

    @cached_property
    def children(self) -> list[keras.Layer]:
        """The sub-layers that are no weights."""
        return [child for child in keras_seam.sublayers(self.layer) if _is_child(child)]

    def children_named(self, name: str) -> list[keras.Layer]:
        """The sub-layers of a name."""
        if self.many:
            return self._children_by_name.get(name, [])
        return [child for child in keras_seam.sublayers(self.layer) if child.name == name and _is_child(child)]

    @cached_property
    def _children_by_name(self) -> dict[str, list[keras.Layer]]:
        return _grouped(self.children)

    @cached_property
    def is_graph(self) -> bool:
        """Whether Keras makes the layer's own `call`, of the layers that it lists."""
        return isinstance(self.layer, (keras_seam.Functional, keras_seam.Sequential))

    @cached_property
    def graph(self) -> dict[int, Path]:
        """The place of each layer of a graph, by its id: the order in which the graph lists them."""
        if not self.is_graph:
            return {}
        return {id(child): ("layers", str(place)) for place, child in enumerate(self.layer.layers)}

    def child(self, child: keras.Layer) -> Path:
        """The canonical path of a sub-layer: where every instance of the layer holds it."""
        places = (self.places if self.many else _places(self.layer, [child])).get(id(child), [])
        if places and not (self.is_graph and places[0][0].startswith("_")):
            return places[0]
        listed = self._listed_at(child) if self.is_graph else None
        return listed or (places[0] if places else (child.name,))

    def _listed_at(self, child: keras.Layer) -> Path | None:
        if self.many:
            return self.graph.get(id(child))
        places = (place for place, other in enumerate(self.layer.layers) if other is child)
        return next((("layers", str(place)) for place in places), None)


def _is_child(layer: keras.Layer) -> bool:
    return not isinstance(layer, Weight)


def _grouped(named: Iterable[Named]) -> dict[str, list[Named]]:
    found: dict[str, list[Named]] = {}
    for each in named:
        found.setdefault(each.name, []).append(each)
    return found


def _is_made_up(variable: keras.Variable) -> bool:
    return keras_seam.is_automatic_variable_name(variable.name)


def find_variable(layer: keras.Layer, rest: Path) -> tuple[keras.Variable, Path] | None:
    """The layer's own variable of that name or attribute, and its canonical path."""
    return _find_variable(_Held(layer), rest)


def _find_variable(held: _Held, rest: Path) -> tuple[keras.Variable, Path] | None:
    if not held.variables:
        return None
    matches: dict[int, tuple[keras.Variable, str]] = {}
    for variable in held.by_name.get(rest[0], ()) if len(rest) == 1 else ():
        places = held.places.get(id(variable))
        at = f" at {'/'.join(places[0])!r}" if places else ""
        matches[id(variable)] = (variable, f"the variable {variable.path}{at}")
    for path in (rest, ("_" + rest[0], *rest[1:])):
        if path in held.at:
            variable = held.at[path]
            matches.setdefault(id(variable), (variable, f"the attribute {'.'.join(path)} (variable {variable.path})"))
    if not matches:
        return None
    if len(matches) > 1:
        raise UnknownName(
            f"The name {'/'.join(rest)!r} is ambiguous in layer {held.layer.name!r}: it is "
            f"{' and '.join(words for _, words in matches.values())}. Use a name that only one of them has."
        )
    variable, _ = next(iter(matches.values()))
    return variable, held.names[id(variable)]


def canonical_name(layer: keras.Layer, variable: keras.Variable) -> Path:
    """The variable's name, or its attribute where the name was made up or is not the only one of its kind."""
    return canonical_names(layer).get(id(variable), (variable.name,))


def canonical_names(layer: keras.Layer) -> dict[int, Path]:
    """The canonical names of all variables of a layer, by their ids."""
    return _Held(layer).names


# --------------------------------------------------------------------------- sub-layers


def find_child(layer: keras.Layer, rest: Path) -> tuple[keras.Layer, Path, Path] | None:
    """The sub-layer that the path goes through next: the layer, its canonical path, what is left."""
    return _find_child(_Held(layer), rest)


def _find_child(held: _Held, rest: Path) -> tuple[keras.Layer, Path, Path] | None:
    layer, head, tail = held.layer, rest[0], rest[1:]
    found: dict[int, tuple[keras.Layer, Path, Path]] = {}
    for attribute in (head, "_" + head):
        value = held.attribute(attribute)
        path: Path = (attribute,)
        remaining = tail
        while isinstance(value, (list, tuple, dict)) and remaining:
            value = _item(value, remaining[0])
            path, remaining = (*path, remaining[0]), remaining[1:]
        if isinstance(value, keras.layers.Layer) and not isinstance(value, Weight):
            found[id(value)] = (value, path, remaining)
            break
    for child in held.children_named(head):
        if id(child) not in found:
            found[id(child)] = (child, held.child(child), tail)
    if not found and not tail and isinstance(layer, keras.layers.RNN) and isinstance(layer.cell, keras.layers.Layer):
        return layer.cell, ("cell",), rest
    if len(found) > 1:
        both = " and ".join(f"'{'/'.join(path)}' ({child.name})" for child, path, _ in found.values())
        raise UnknownName(
            f"The name {head!r} is ambiguous in layer {layer.name!r}: it is {both}. Use the attribute's path."
        )
    return next(iter(found.values()), None)


def _item(container: Container, key: str) -> Any:
    if isinstance(container, dict):
        return container.get(key)
    return container[int(key)] if key.isdigit() and int(key) < len(container) else None


def canonical_child(layer: keras.Layer, child: keras.Layer) -> Path:
    """The attribute, or the place in a container, that holds a sub-layer in every instance of the layer."""
    return _Held(layer).child(child)


def children(layer: keras.Layer) -> Iterator[tuple[Path, keras.Layer]]:
    """The sub-layers, weights that are attributes included, each by a path that is the same in a layer made alike."""
    if _Held(layer).is_graph:
        yield from ((("layers", str(place)), child) for place, child in enumerate(layer.layers))
        return
    hung = set(map(id, vars(layer).get(WEIGHTS) or ()))
    below = [child for child in keras_seam.sublayers(layer) if id(child) not in hung]
    places = _places(layer, below)
    for child in below:
        yield places.get(id(child), [(child.name,)])[0], child


# --------------------------------------------------------------------------- errors


def weight_paths(layer: keras.Layer) -> list[str]:
    """The paths of all weights below a layer, by the names of layers."""
    return list(dict.fromkeys("/".join(names) for _, names, _, _ in walk(layer)))


def walk(layer: keras.Layer) -> Iterator[tuple[Path, Path, keras.Layer, keras.Variable]]:
    """Every weight below a built layer, at every place: canonical path, path by layer names, its layer, itself."""
    for path, names, _, own, variable in walk_spelled(layer):
        yield path, names, own, variable


def walk_spelled(layer: keras.Layer) -> Iterator[tuple[Path, Path, Path, keras.Layer, keras.Variable]]:
    """The same, with a third path: by names for layers of a graph, by attributes for what is in these."""
    holdings = Holdings()
    for path, names, mixed, own in _layers(holdings, layer, ((), (), ()), (layer,)):
        held = holdings.of(own)
        for variable in held.variables:
            leaf = held.names[id(variable)]
            yield path + leaf, names + leaf, mixed + leaf, own, variable


def walk_layers(layer: keras.Layer) -> Iterator[tuple[Path, Path, Path, keras.Layer]]:
    """A layer and every layer below it, at every place, with the same three paths; a layer before those in it."""
    yield from _layers(Holdings(), layer, ((), (), ()), (layer,))


def _layers(
    holdings: Holdings, layer: keras.Layer, at: tuple[Path, Path, Path], around: tuple[keras.Layer, ...]
) -> Iterator[tuple[Path, Path, Path, keras.Layer]]:
    yield *at, layer
    held = holdings.of(layer)
    path, names, mixed = at
    for child in layer.layers if held.is_graph else held.children:
        if not isinstance(child, Weight) and not any(child is other for other in around):
            canonical, name = held.child(child), (child.name,)
            below = path + canonical, names + name, mixed + (name if held.is_graph else canonical)
            yield from _layers(holdings, child, below, (*around, child))


def words_of(layer: keras.Layer, variable: keras.Variable) -> dict[str, bool]:
    """The words of `tether.patterns`, and whether each means a weight of a layer."""
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    is_kernel = isinstance(layer, kinds) and variable.name == "kernel"
    return {ALL_LINEAR: is_kernel and len(shape_of(variable)) > 1}


def nothing_there(root: keras.Layer, path: Path, layer: keras.Layer, rest: Path) -> str:
    """Says that a path from `root` names no weight: what is left of it at `layer`, and what there is."""
    names = weight_paths(root)
    wanted = "/".join(path)
    within = [name for name in names if f"/{wanted}/" in f"/{name}/"]
    close = within[:3] or difflib.get_close_matches(wanted.replace(".", "/"), names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    at = f" ({'/'.join(rest)!r} at {layer.name!r})" if layer is not root else ""
    return (
        f"Layer {root.name!r} ({type(root).__name__}) has no weight {wanted!r}{at}.{hint} "
        f"It has: {listed or 'no weights'}."
    )

"""Names of weights: a path of attributes and indices from a layer down to one of its variables.

A segment may also be a sub-layer's `name`, as a convenience for people. What is recorded is the
canonical path, which is the same in every instance of the layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import keras

from tether import keras_seam
from tether.errors import UnknownName, Unsupported, received
from tether.layers.state import STATE, WEIGHTS, state_of
from tether.weights.weight import Weight

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a path leads: the layer that has (or will make) the variable, and who records a tie of it."""

    layer: Any
    leaf: Path
    """What is left of the path: a variable's name, or more as long as the layer is not built."""
    recorder: Any
    recorded_path: Path
    variable: Any = None
    """The variable or view, if it exists."""
    leaf_name: str = ""
    lent: tuple[Any, Path] | None = None
    """A layer of a graph that the path goes through, and the rest of the path from there: a clone of the
    graph copies its layers one by one, and asks only them for their configs."""


def split(path: Any) -> Path:
    """The segments of a path.

    Raises:
        UnknownName: It is not a non-empty string of segments.
    """
    if not isinstance(path, str) or not path or any(not part for part in path.split("/")):
        raise UnknownName(f"A weight is named by a path such as 'kernel' or 'query/kernel'. {received(path=path)}")
    return tuple(path.split("/"))


def locate(root: Any, path: Path) -> Place:
    """Follows a path from a layer.

    Raises:
        UnknownName: It leads nowhere, or to two places.
    """
    layer, recorder, recorded, rest = root, root, cast("Path", ()), path
    graph: tuple[Any, Path] | None = None
    while True:
        _refuse_in_place(layer, rest)
        found = find_variable(layer, rest)
        if found is not None:
            variable, canonical = found
            graph = None if graph is None or graph[0] is layer else (graph[0], graph[1] + canonical)
            return Place(layer, rest, recorder, recorded + canonical, variable, "/".join(canonical), graph)
        step = find_child(layer, rest)
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
                f"It has: {', '.join(weight_paths(child)) or 'no weights yet'}."
            )
        layer = child


_FOREIGN = (keras.layers.TorchModuleWrapper, keras.layers.TFSMLayer)


def _refuse_in_place(layer: Any, rest: Path) -> None:
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


def own_variables(layer: Any) -> list[Any]:
    """The variables of the layer itself, views included, sub-layers not."""
    state = state_of(layer)
    found = [variable for variables in keras_seam.variable_lists(layer).values() for variable in variables]
    return found + ([slot.view for slot in state.slots] if state is not None else [])


def holders(layer: Any, variable: Any) -> list[Path]:
    """The attributes, and places in containers, that hold a variable or sub-layer, public ones first."""
    found = [path for path, value in _attributes(layer) if value is variable]
    return sorted(found, key=lambda path: (path[0].startswith("_"), len(path), path))


def _attributes(layer: Any) -> Iterator[tuple[Path, Any]]:
    for name, value in keras_seam.attributes(layer):
        if name not in (STATE, WEIGHTS):
            yield from _inside((name,), value, 0)


def _inside(path: Path, value: Any, depth: int) -> Iterator[tuple[Path, Any]]:
    yield path, value
    if depth < 4 and isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _inside((*path, str(place)), item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for key, item in list(value.items()):
            if isinstance(key, str):
                yield from _inside((*path, key), item, depth + 1)


def put_item(layer: Any, path: Path, value: Any, *, what: str = "weight", advice: str = "") -> None:
    """Puts a value where an attribute of the layer, or a container in one, holds another, past all trackers.

    Raises:
        Unsupported: The container is a tuple. The error names what is kept in it, and ends in the advice.
    """
    container = vars(layer)
    for key in path[:-1]:
        container = _item(container, key)
    if isinstance(container, tuple):
        raise Unsupported(
            f"Layer {layer.name!r} keeps the {what} in the tuple {path[0]!r}, which cannot be changed.{advice}"
        )
    if isinstance(container, list):
        list.__setitem__(container, int(path[-1]), value)
    else:
        dict.__setitem__(container, path[-1], value)


def find_variable(layer: Any, rest: Path) -> tuple[Any, Path] | None:
    """The layer's own variable of that name or attribute, and its canonical path."""
    variables = own_variables(layer)
    if not variables:
        return None
    by_id = {id(variable): variable for variable in variables}
    matches: dict[int, str] = {}
    if len(rest) == 1:
        for variable in variables:
            if variable.name == rest[0]:
                matches[id(variable)] = f"the variable {variable.path}{_at(layer, variable)}"
    for path, value in _attributes(layer):
        if id(value) in by_id and path in (rest, ("_" + rest[0], *rest[1:])):
            matches.setdefault(id(value), f"the attribute {'.'.join(path)} (variable {value.path})")
    if not matches:
        return None
    if len(matches) > 1:
        raise UnknownName(
            f"The name {'/'.join(rest)!r} is ambiguous in layer {layer.name!r}: it is {' and '.join(matches.values())}."
            " Use a name that only one of them has."
        )
    variable = by_id[next(iter(matches))]
    return variable, canonical_name(layer, variable)


def _at(layer: Any, variable: Any) -> str:
    paths = holders(layer, variable)
    return f" at {'/'.join(paths[0])!r}" if paths else ""


def canonical_name(layer: Any, variable: Any) -> Path:
    """The variable's name, or its attribute where the name was made up or is not the only one of its kind."""
    same = [other for other in own_variables(layer) if other.name == variable.name]
    if len(same) == 1 and not keras_seam.is_automatic_variable_name(variable.name):
        return (variable.name,)
    paths = holders(layer, variable)
    return paths[0] if paths else (variable.name,)


# --------------------------------------------------------------------------- sub-layers


def find_child(layer: Any, rest: Path) -> tuple[Any, Path, Path] | None:
    """The sub-layer that the path goes through next: the layer, its canonical path, what is left."""
    head, tail = rest[0], rest[1:]
    found: dict[int, tuple[Any, Path, Path]] = {}
    for attribute in (head, "_" + head):
        value = _attribute(layer, attribute)
        path: Path = (attribute,)
        remaining = tail
        while isinstance(value, (list, tuple, dict)) and remaining:
            value = _item(value, remaining[0])
            path, remaining = (*path, remaining[0]), remaining[1:]
        if isinstance(value, keras.layers.Layer) and not isinstance(value, Weight):
            found[id(value)] = (value, path, remaining)
            break
    for child in _children(layer):
        if child.name == head:
            found.setdefault(id(child), (child, canonical_child(layer, child), tail))
    if not found and not tail and isinstance(layer, keras.layers.RNN) and isinstance(layer.cell, keras.layers.Layer):
        return layer.cell, ("cell",), rest
    if len(found) > 1:
        both = " and ".join(f"'{'/'.join(path)}' ({child.name})" for child, path, _ in found.values())
        raise UnknownName(
            f"The name {head!r} is ambiguous in layer {layer.name!r}: it is {both}. Use the attribute's path."
        )
    return next(iter(found.values()), None)


def _children(layer: Any) -> list[Any]:
    return [child for child in keras_seam.sublayers(layer) if not isinstance(child, Weight)]


def _attribute(layer: Any, name: str) -> Any:
    try:
        return getattr(layer, name, None)
    except Exception:  # a property that is not ready before build
        return None


def _item(container: Any, key: str) -> Any:
    if isinstance(container, dict):
        return container.get(key)
    return container[int(key)] if key.isdigit() and int(key) < len(container) else None


def canonical_child(layer: Any, child: Any) -> Path:
    """The attribute, or the place in a container, that holds a sub-layer in every instance of the layer."""
    if isinstance(layer, keras.Model) and isinstance(layer, (keras_seam.Functional, keras_seam.Sequential)):
        public = [path for path in holders(layer, child) if not path[0].startswith("_")]
        if public:
            return public[0]
        return ("layers", str(next(i for i, other in enumerate(layer.layers) if other is child)))
    paths = holders(layer, child)
    return paths[0] if paths else (child.name,)


def children(layer: Any) -> Iterator[tuple[Path, Any]]:
    """The sub-layers, weights that are attributes included, each by a path that is the same in a layer made alike."""
    if isinstance(layer, (keras_seam.Functional, keras_seam.Sequential)):
        for place, child in enumerate(layer.layers):
            yield ("layers", str(place)), child
        return
    hung = vars(layer).get(WEIGHTS) or ()
    for child in keras_seam.sublayers(layer):
        if not any(child is weight for weight in hung):
            yield canonical_child(layer, child), child


# --------------------------------------------------------------------------- errors


def weight_paths(layer: Any, prefix: Path = (), depth: int = 0) -> list[str]:
    """The paths of all weights below a layer."""
    found = ["/".join((*prefix, *canonical_name(layer, variable))) for variable in own_variables(layer)]
    if depth < 8:
        for child in _children(layer):
            found.extend(weight_paths(child, (*prefix, child.name), depth + 1))
    return list(dict.fromkeys(found))


def walk(layer: Any) -> Iterator[tuple[Path, Path, Any, Any]]:
    """Every weight below a built layer, at every place: canonical path, path by layer names, its layer, itself."""
    yield from _walk(layer, (), (), (layer,))


def _walk(layer: Any, path: Path, names: Path, around: tuple[Any, ...]) -> Iterator[tuple[Path, Path, Any, Any]]:
    for variable in own_variables(layer):
        leaf = canonical_name(layer, variable)
        yield path + leaf, names + leaf, layer, variable
    graph = isinstance(layer, (keras_seam.Functional, keras_seam.Sequential))
    for child in [c for c in layer.layers if not isinstance(c, Weight)] if graph else _children(layer):
        if not any(child is other for other in around):
            step = canonical_child(layer, child)
            yield from _walk(child, path + step, (*names, child.name), (*around, child))


def nothing_there(root: Any, path: Path, layer: Any, rest: Path) -> str:
    """Says that a path from `root` names no weight: what is left of it at `layer`, and what there is."""
    names = weight_paths(root)
    wanted = "/".join(path)
    close = difflib.get_close_matches(wanted, names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    at = f" ({'/'.join(rest)!r} at {layer.name!r})" if layer is not root else ""
    return (
        f"Layer {root.name!r} ({type(root).__name__}) has no weight {wanted!r}{at}.{hint} "
        f"It has: {listed or 'no weights'}."
    )

"""Every name of a stored weight: its own path, and the path of each use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tether import keras_seam
from tether.layers.tying.state import state_of, stored_variables


class Aliases(Mapping[str, tuple[str, ...]]):
    """The names of each stored variable, by its path; `find` searches all of them."""

    def __init__(self, names: dict[str, tuple[str, ...]], variables: dict[str, Any]) -> None:
        self._names = names
        self._variables = variables

    def __getitem__(self, path: str) -> tuple[str, ...]:
        return self._names[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, pattern: str) -> list[Any]:
        """The stored variables of which some name matches a regular expression (searched, not anchored)."""
        search = re.compile(pattern).search
        return [self._variables[path] for path, names in self._names.items() if any(map(search, names))]

    def __repr__(self) -> str:
        return f"Aliases({self._names!r})"


def unique_paths(model: Any) -> dict[int, str]:
    """The path of each stored variable by its id; where several have one, the later ones with a number."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for variable in model.weights:
        found[id(variable)] = keras_seam.numbered(variable.path, taken)
        taken.add(found[id(variable)])
    return found


def aliases(model: Any) -> Aliases:
    """Every name under which a model's stored variables are known.

    An optimizer or a layout map that goes by names sees only the path of the stored variable. A user of
    it has a path too.

    Args:
        model: A layer or model.

    Returns:
        A mapping from the path of each stored variable to all its names, its own first. Where several of the model have
        one path, the later ones have it with a number.

    Example:
    ```python
    optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("lm_head"))
    ```
    """
    keys = unique_paths(model)
    variables = {keys[id(variable)]: variable for variable in model.weights}
    names = {key: {key: None} for key in variables}
    for layer in keras_seam.contained_layers(model):
        state = state_of(layer)
        for slot in state.slots if state is not None else ():
            for stored in stored_variables(slot.view):
                if id(stored) in keys:
                    names[keys[id(stored)]][slot.view.path] = None
    return Aliases({path: tuple(found) for path, found in names.items()}, variables)

"""Operators by the name that files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tether.weights.expression import Node

OPERATORS: dict[str, type[Node]] = {}

NodeClass = TypeVar("NodeClass", bound=type[Node])


def register(cls: NodeClass) -> NodeClass:
    """Makes an operator known to files, under its `name`."""
    if OPERATORS.setdefault(cls.name, cls) is not cls:
        raise TypeError(f"Two operators are called {cls.name!r}: {OPERATORS[cls.name]} and {cls}.")
    return cls


_sources: list[Callable[[], Any]] = []


def when_unknown(load: Callable[[], Any]) -> None:
    """Has more operators registered when a name is asked for that is not known yet: `load` imports them."""
    _sources.append(load)


def operator(name: str) -> type[Node] | None:
    """The operator of a name, if there is one."""
    while name not in OPERATORS and _sources:
        _sources.pop(0)()
    return OPERATORS.get(name)

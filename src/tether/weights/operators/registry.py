"""Operators by the name that files use."""

from __future__ import annotations

from typing import TypeVar

from tether.weights.expression import Node

OPERATORS: dict[str, type[Node]] = {}

NodeClass = TypeVar("NodeClass", bound=type[Node])


def register(cls: NodeClass) -> NodeClass:
    """Makes an operator known to files, under its `name`."""
    if OPERATORS.setdefault(cls.name, cls) is not cls:
        raise TypeError(f"Two operators are called {cls.name!r}: {OPERATORS[cls.name]} and {cls}.")
    return cls

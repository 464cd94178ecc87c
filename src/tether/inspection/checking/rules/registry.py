"""The rules: each a function from a context to findings, with what it can judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tether.inspection.checking.finding import Finding

if TYPE_CHECKING:
    from tether.inspection.checking.context import Context

Judge = Callable[["Context"], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """One rule."""

    name: str
    """In kebab case: `equal-weights`."""
    description: str
    """What it finds, in one line."""
    judge: Judge
    model: bool
    """Whether it can judge a live model."""
    file: bool
    """Whether it can judge a file."""
    needs_data: bool
    """Whether it judges only with a batch of data."""

    def suits(self, context: Context) -> bool:
        """Whether it can judge what is checked."""
        source = self.file if context.file is not None else self.model
        return source and (context.data is not None or not self.needs_data)


RULES: dict[str, Rule] = {}
"""All rules, by name, in the order in which they are asked."""


def rule(
    name: str, description: str, *, model: bool = True, file: bool = False, needs_data: bool = False
) -> Callable[[Judge], Judge]:
    """Registers a function as a rule."""

    def register(judge: Judge) -> Judge:
        if name in RULES:
            raise TypeError(f"Two rules are named {name!r}.")
        RULES[name] = Rule(name, description, judge, model, file, needs_data)
        return judge

    return register

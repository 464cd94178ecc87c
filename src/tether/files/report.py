"""What a load did: which weights were loaded from what, and what did not fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loaded:
    """One stored weight, and what the file calls the values that were offered for it."""

    name: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} <- {', '.join(self.sources)}"


@dataclass(frozen=True)
class Conflict:
    """Values of one weight that differ: where they came from, by how much, and what was done."""

    name: str
    sources: tuple[str, ...]
    """The first two are the farthest apart that were compared."""
    difference: float
    taken: str

    def __str__(self) -> str:
        first, second, *more = self.sources
        others = f" (and {', '.join(more)})" if more else ""
        return f"{self.name}: {first!r} and {second!r}{others} differ by up to {self.difference:.3g}"


@dataclass(frozen=True)
class Report:
    """What was loaded, and what was not. Its text is for people.

    Example:
    ```python
    print(report)
    # loaded 3: codec <- layers/dense/vars/0, layers/dense_1/vars/0; ...
    # conflicting 1: codec: 'layers/dense/vars/0' and 'layers/dense_1/vars/0' differ by up to 0.25; mean taken
    ```
    """

    loaded: tuple[Loaded, ...] = ()
    skipped: tuple[str, ...] = ()
    """What the file has and the model has no place for."""
    missing: tuple[str, ...] = ()
    """The model's weights that the file says nothing about: they are as they were."""
    conflicting: tuple[Conflict, ...] = ()

    def __str__(self) -> str:
        conflicts = [f"{conflict}; {conflict.taken} taken" for conflict in self.conflicting]
        lines = [
            _line("loaded", [str(each) for each in self.loaded]),
            _line("skipped", self.skipped),
            _line("missing", self.missing),
            _line("conflicting", conflicts),
        ]
        return "\n".join(line for line in lines if line)


def _line(title: str, items: list[str] | tuple[str, ...]) -> str:
    if not items and title != "loaded":
        return ""
    shown = "; ".join(items[:8]) + ("; ..." if len(items) > 8 else "")
    return f"{title} {len(items)}" + (f": {shown}" if items else "")


__all__ = ["Conflict", "Loaded", "Report"]

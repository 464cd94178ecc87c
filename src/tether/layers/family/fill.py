"""Values for a weight of another size than the one they come from, and the report of what came from where.

What both weights have is copied: the corner that begins at index 0 of every axis. What only the larger
one has follows a rule, and what the smaller one has no place for is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tether.errors import ShapeMismatch, TetherError, received
from tether.types import Array

Rule = str | Callable[[Array, Array], object] | None

RULES = ("zeros", "initializer", "mean")


def filled(value: Array, start: Array, rule: Rule) -> Array:
    """A value of one shape in an array of another.

    Args:
        value: What is there to copy, for example a parent's kernel.
        start: The array to be replaced: it gives the shape, the dtype and the values that an initializer
            made. It is not changed.
        rule: What the entries get that `value` does not have: `"zeros"`; `"initializer"`, the values of
            `start`; `"mean"`, the mean of `value` over the axis that grows (over all of them where several
            grow); or a function of `value` and `start` that returns the whole array, which may also map
            between different numbers of axes. `None` allows no difference.

    Returns:
        A new array of the shape and dtype of `start`.

    Raises:
        ShapeMismatch: The shapes differ and there is no rule, or the numbers of axes differ, or the
            function returned another shape.
        TetherError: The rule is none of these.

    Example:
    ```python
    filled(np.array([1.0, 3.0]), np.zeros(3), "mean")  # [1., 3., 2.]
    ```
    """
    check_rule(rule)
    value, start = np.asarray(value), np.asarray(start)
    if value.shape == start.shape:
        return np.array(value, dtype=start.dtype)
    if rule is None:
        raise ShapeMismatch(
            f"The value has shape {value.shape} and its target {start.shape}. Say what the part without a "
            "counterpart gets: fill='zeros', 'initializer' (what the target has), 'mean', or a function of both arrays."
        )
    if callable(rule):
        return _filled_by(rule, value, start)
    if value.ndim != start.ndim:
        raise ShapeMismatch(
            f"The value has shape {value.shape} and its target {start.shape}, with another number of axes, so there "
            f"is no common part. Give a function: fill=lambda value, start: ... {received(fill=rule)}"
        )
    common = tuple(slice(0, min(sizes)) for sizes in zip(value.shape, start.shape, strict=True))
    if rule == "mean":
        return _extended_by_means(value[common], value.shape, start)
    filled = np.zeros_like(start) if rule == "zeros" else start.copy()
    filled[common] = value[common].astype(start.dtype)
    return filled


def check_rule(rule: object) -> None:
    """Refuses what is no rule.

    Raises:
        TetherError: It is neither `None`, the name of a rule nor a function.
    """
    if rule is not None and not callable(rule) and not (isinstance(rule, str) and rule in RULES):
        raise TetherError(
            f"`fill` is one of {', '.join(map(repr, RULES))}, a function of the value and the target's start, or "
            f"None. {received(fill=rule)}"
        )


def describe(value: tuple[int, ...], start: tuple[int, ...], rule: Rule) -> str:
    """What `fill` does between two shapes, in a few words: `copied, zeros on axis 1: 64 -> 128`."""
    if value == start:
        return "copied"
    if callable(rule):
        return f"filled by {getattr(rule, '__name__', type(rule).__name__)}"
    parts = [
        f"{rule if new > old else 'cut'} on axis {axis}: {old} -> {new}"
        for axis, (old, new) in enumerate(zip(value, start, strict=True))
        if new != old
    ]
    return ", ".join(["copied", *parts])


def _filled_by(rule: Callable[[Array, Array], object], value: Array, start: Array) -> Array:
    filled = np.asarray(rule(value.copy(), start.copy()))
    if filled.shape != start.shape:
        raise ShapeMismatch(
            f"The function given as fill returns the target's whole array, of shape {start.shape}. "
            f"{received(shape=filled.shape)}"
        )
    return np.array(filled, dtype=start.dtype)


def _extended_by_means(value: Array, before: tuple[int, ...], start: Array) -> Array:
    """Appends along each axis that grows the mean over it; in which order makes no difference."""
    found = value.astype("float64")
    for axis, (old, new) in enumerate(zip(before, start.shape, strict=True)):
        if new > old:
            if old == 0:
                raise ShapeMismatch(f"There is no mean over axis {axis}, which is empty. {received(shape=before)}")
            mean = found.mean(axis=axis, keepdims=True)
            found = np.concatenate([found, np.repeat(mean, new - old, axis=axis)], axis=axis)
    whole = np.issubdtype(start.dtype, np.integer) or start.dtype == np.bool_
    return (np.rint(found) if whole else found).astype(start.dtype)


# --------------------------------------------------------------------------- what came from where


@dataclass(frozen=True)
class StartOf:
    """One weight of the target: where its values come from, and how."""

    target: str
    shape: tuple[int, ...] | None
    source: str | None
    source_shape: tuple[int, ...] | None
    how: str


@dataclass
class Provenance:
    """What came from where, one row for each weight of the target. Its text is a table.

    Example:
    ```python
    print(report)
    # target   shape      source   shape      how
    # kernel   (64, 128)  kernel   (64, 64)   copied, zeros on axis 1: 64 -> 128
    # bias     (128,)     -        -          kept
    ```
    """

    rows: list[StartOf] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """The paths of the source's weights that nothing took."""

    def add(
        self,
        target: str,
        shape: tuple[int, ...] | None,
        source: str | None,
        source_shape: tuple[int, ...] | None,
        how: str,
    ) -> None:
        """Adds a row for one weight of the target."""
        self.rows.append(StartOf(target, shape, source, source_shape, how))

    def __iter__(self) -> Iterator[StartOf]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, target: str) -> StartOf:
        """The row of a weight of the target, by its path."""
        for row in self.rows:
            if row.target == target:
                return row
        raise KeyError(target)

    def __str__(self) -> str:
        cells = [("target", "shape", "source", "shape", "how")]
        cells += [tuple("-" if cell is None else str(cell) for cell in _cells(row)) for row in self.rows]  # type: ignore[misc]
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        if self.unused:
            lines.append(f"nothing took: {', '.join(self.unused)}")
        return "\n".join(lines)


def _cells(row: StartOf) -> tuple[object, ...]:
    return row.target, row.shape, row.source, row.source_shape, row.how


__all__ = ["RULES", "Array", "Provenance", "Rule", "StartOf", "check_rule", "describe", "filled"]

"""Layouts through an expression: how stored weights lie on a mesh of devices, and how what is made of them does.

A layout names for each axis of a value the axis of the mesh over which it is divided, or `None` where it is whole, as
in `keras.distribution.TensorLayout`. A stored weight has one, on its own axes. That of a use goes back through the
expression to the weights, and that of a base goes on to what a form has made beside it, by the labels of axes
(`weights.axes`). Only shapes are looked at, never a value.
"""

from __future__ import annotations

from collections.abc import Mapping

from tether.weights.axes import Axes, Links, Row
from tether.weights.expression import Expression, Node, Shape, Stored, known_shape, program

Spec = tuple[str | None, ...]
"""For each axis of a value the axis of the mesh that divides it, or `None`."""


def whole(rank: int) -> Spec:
    """The layout of what every device has as a whole."""
    return (None,) * rank


def fitted(spec: Spec, shape: Shape, sizes: Mapping[str, int]) -> Spec:
    """A layout without the axes that the devices cannot divide evenly."""
    return tuple(
        name if name is None or size % sizes[name] == 0 else None for name, size in zip(spec, shape, strict=True)
    )


class Traced:
    """An expression whose axes have been traced back to its weights, and what layouts have been said of them.

    Args:
        expression: The expression. Its shape must be known.
        sizes: How many devices each axis of the mesh has.
    """

    def __init__(self, expression: Expression, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.shape = known_shape(expression)
        self._links = Links()
        self._axes: dict[Expression, Axes] = {}
        self._value = self._trace(expression)
        self._rows: dict[Row, str | None] = {}
        self._marks: dict[int, tuple[str, int, int] | None] = {}

    def _trace(self, expression: Expression) -> Axes:
        """The labels of an expression's axes; those of its steps are remembered."""
        steps = program(expression)
        for step in steps:
            current = step.expression
            if current in self._axes:
                continue
            found: Axes | None = None
            if isinstance(current, Node):
                operands = [self._axes[steps[place].expression] for place in step.operands]
                found = current.axes_from(self._links, *operands)
                simpler = current.expanded() if found is None else None
                if simpler is not None:
                    found = self._trace(simpler)
            self._axes[current] = self._links.fresh(current.shape or ()) if found is None else found
        return self._axes[steps[-1].expression]

    # ------------------------------------------------------------------ what is said

    def say(self, spec: Spec, of: Expression | None = None) -> None:
        """Says how the value lies, or a weight or other step of it. What was said before of an axis stands.

        An axis that is in two places of it, as in `w + w.T`, cannot be divided in one of them, so it is whole.
        """
        rows = [self._links.row(row) for row in (self._value if of is None else self._axes[of])]
        names = fitted(spec, tuple(map(self._links.size, rows)), self.sizes)
        said: dict[Row, set[str | None]] = {}
        for row, name in zip(rows, names, strict=True):
            said.setdefault(row, set()).add(name)
        for row, names_of in said.items():
            if row and row not in self._rows:
                self._say(row, names_of.pop() if len(names_of) == 1 else None)

    def _say(self, row: Row, name: str | None) -> None:
        self._rows[row] = name
        if name is None:
            return
        left, done, marks = self.sizes[name], 1, dict[int, tuple[str, int, int] | None]()
        for label in row:
            size = self._links.sizes[label]
            taken = left if size % left == 0 else size
            if left % taken:
                break
            marks[label] = (name, done, taken)
            done, left = done * taken, left // taken
            if left == 1:
                break
        if left > 1:
            return  # only a whole axis of just these labels can be divided so
        for label, mark in marks.items():
            self._marks[label] = mark if self._marks.get(label, mark) == mark else None

    # ------------------------------------------------------------------ what follows

    def of(self, weight: Stored) -> Spec:
        """How a weight in the expression lies, by what was said of the rest."""
        return self._read(self._axes[weight])

    def is_said(self, weight: Stored) -> tuple[bool, ...]:
        """Of which axes of a weight something was said: the others are no axes of what was spoken of."""
        rows = [self._links.row(row) for row in self._axes[weight]]
        return tuple(row in self._rows or any(label in self._marks for label in row[:1]) for row in rows)

    @property
    def value(self) -> Spec:
        """How the value lies."""
        return self._read(self._value)

    def _read(self, axes: Axes) -> Spec:
        found = [self._read_row(self._links.row(row)) for row in axes]
        return tuple(None if name is not None and found.count(name) > 1 else name for name in found)

    def _read_row(self, row: Row) -> str | None:
        if row in self._rows:
            return self._rows[row]
        done, name = 1, None
        for label in row:
            mark = self._marks.get(label)
            if mark is None or mark[1] != done or name not in (None, mark[0]):
                break
            name, done = mark[0], done * mark[2]
            if mark[2] < self._links.sizes[label]:
                break
        return name if name is not None and done == self.sizes[name] else None


__all__ = ["Spec", "Traced", "fitted", "whole"]

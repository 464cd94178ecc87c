"""Which axes of stored weights the axes of an expression's value are: labels, one or several for each axis.

Every axis of a leaf has a label. An operator says in `Node.axes_from` what labels the axes of its value have, given
those of its operands: a transpose moves them, a reshape splits or joins them, a sum and a product make labels that meet
one label. Where nothing is said, an axis gets a label of its own, which is no axis of any operand. So once an
expression has been walked, an axis of its value and an axis of a leaf are the same axis if they have the same labels.

Labels are not sums of products (`planning.products`), which are limited in terms and factors, leave out what is no
float, and cannot say anything of a `concatenate`: here each operator needs one rule, and none multiplies terms out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Row = tuple[int, ...]
"""The labels of one axis, outermost first; none for an axis of size 1."""
Axes = tuple[Row, ...]
"""The labels of each axis of a value."""


class Links:
    """Labels, and what is known of them: how long each is, and which are the same."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._instead: dict[int, Row] = {}
        self._numbers = itertools.count()

    def label(self, size: int) -> Row:
        """The row of an axis that is no axis of anything else."""
        if size < 2:
            return ()
        number = next(self._numbers)
        self.sizes[number] = size
        return (number,)

    def fresh(self, shape: Sequence[int]) -> Axes:
        """Axes of a shape that are no axes of anything else."""
        return tuple(map(self.label, shape))

    def row(self, row: Iterable[int]) -> Row:
        """A row with what has been found out since it was made: labels that were split or are others."""
        found: list[int] = []
        waiting = list(row)[::-1]
        while waiting:
            label = waiting.pop()
            instead = self._instead.get(label)
            if instead is None:
                found.append(label)
            else:
                waiting.extend(reversed(instead))
        return tuple(found)

    def size(self, row: Iterable[int]) -> int:
        """How long an axis of these labels is."""
        return math.prod(self.sizes[label] for label in row)

    def same(self, one: Row, other: Row) -> Row:
        """Makes two axes of one size one axis, as far as their labels can be split alike; the row of it."""
        mine, theirs = list(self.row(one)), list(self.row(other))
        if not mine or not theirs:  # an axis of size 1, which is repeated
            return one or other
        while mine and theirs:
            first, second = mine.pop(0), theirs.pop(0)
            if first == second:
                continue
            n, m = self.sizes[first], self.sizes[second]
            if n == m:
                self._instead[second] = (first,)
            elif n % m == 0:
                self._instead[first] = (second, *self.label(n // m))
                mine[:0] = self._instead[first][1:]
            elif m % n == 0:
                self._instead[second] = (first, *self.label(m // n))
                theirs[:0] = self._instead[second][1:]
            else:
                break
            mine, theirs = list(self.row(mine)), list(self.row(theirs))
        return one

    def broadcast(self, shape: Sequence[int], *operands: Axes) -> Axes:
        """The axes of what several values broadcast to, which is of this shape."""
        found: list[Row] = [()] * len(shape)
        for axes in operands:
            for place, row in enumerate(axes, len(shape) - len(axes)):
                found[place] = self.same(found[place], row)
        return tuple(found)

    def reshaped(self, axes: Axes, shape: Sequence[int]) -> Axes:
        """The axes of a value in another shape: labels are dealt out again, and split where that can be done."""
        if 0 in shape:
            return self.fresh(shape)
        rest = [label for axis in axes for label in self.row(axis)]
        dealt: list[Row] = []
        for wanted in shape:
            axis: list[int] = []
            while wanted > 1:
                if not rest:
                    return (*dealt, *self.fresh(shape[len(dealt) :]))
                label = rest.pop(0)
                size = self.sizes[label]
                if wanted % size == 0:
                    wanted //= size
                elif size % wanted == 0:
                    self._instead[label] = (*self.label(wanted), *self.label(size // wanted))
                    label, rest[:0] = self._instead[label][0], self._instead[label][1:]
                    rest = list(self.row(rest))
                    wanted = 1
                else:  # this axis and those after it are cut across
                    return (*dealt, *self.fresh(shape[len(dealt) :]))
                axis.append(label)
            dealt.append(tuple(axis))
        return tuple(dealt)


__all__ = ["Axes", "Links", "Row"]

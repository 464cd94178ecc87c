"""Where everything is on the map. The script of the page does the same when a layer is closed or the window changes.

Each row has a height when it is open and one when a layer around it is closed: then it is a stripe in a stack.
What is solid is to scale, in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tether.inspection.facts import Facts
from tether.inspection.plotting.rows import Row

TALL, TALLEST = 380.0, 190.0
"""All that layers read is drawn so tall, unless one weight would be taller than the second."""
MOST_A_BYTE = 0.5
"""Pixels a byte in a tiny model."""
HEADING, LINE = 20.0, 18.0
"""The heights of a heading and of the smallest open row."""
HAIR = 1.0
"""What is solid is never less than this, or half of it in a closed layer."""
GAP = 2.0
"""Between weights that are drawn at one row."""
ABOVE = 4.0
"""Above a heading."""


@dataclass(frozen=True)
class Heights:
    """Heights of something that is drawn, open and in a closed layer."""

    open: float
    closed: float


def scale_of(facts: Facts) -> float:
    """Pixels a byte."""
    largest = max(0, *(weight.bytes for weight in facts.weights), *(use.bytes for use in facts.uses))
    return min(TALL / max(facts.unshared_bytes, 1), TALLEST / max(largest, 1), MOST_A_BYTE)


def solid(count: int, scale: float) -> Heights:
    """The heights of so many bytes."""
    return Heights(max(count * scale, HAIR), max(count * scale, HAIR / 2))


def row_heights(row: Row, scale: float) -> Heights:
    """The heights of a row: its use beside the weights that are drawn at it."""
    if row.heading:
        return Heights(HEADING, 0.0)
    weights = [solid(weight.bytes, scale) for weight in row.weights]
    use = solid(row.use.bytes, scale) if row.use else Heights(0.0, 0.0)
    boxes = [max(heights.open, LINE) for heights in weights]
    return Heights(
        max(sum(boxes) + GAP * (len(boxes) - 1), use.open, LINE),
        max(sum(heights.closed for heights in weights), use.closed),
    )


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    top: float
    height: float
    stripe: bool
    """Whether it is a stripe of a closed layer."""


def places_of(rows: Sequence[Row], heights: Sequence[Heights], top: float) -> tuple[list[Place], float]:
    """The place of each row, and where the last ends."""
    places: list[Place] = []
    y, number = top, 0
    while number < len(rows):
        row = rows[number]
        y += ABOVE if row.heading else 0.0
        if row.closed:
            inside = range(number + 1, row.end)
            stack = sum(heights[inner].closed for inner in inside)
            height = max(HEADING, stack)
            places.append(Place(y, height, False))
            at = y + (height - stack) / 2
            for inner in inside:
                places.append(Place(at, heights[inner].closed, True))
                at += heights[inner].closed
            number = row.end
        else:
            height = heights[number].open
            places.append(Place(y, height, False))
            number += 1
        y += height
    return places, y

"""The widths of the drawing, and how colours are called in its styles."""

from __future__ import annotations

from tether.inspection.plotting.rows import KINDS

LEFT, BAR, RIGHT = 208, 36, 292
"""The widths of the weights' names, of a weight, and of the layers' column."""
BAR_OF_USE = 10
STEP, MOST_STEPS = 13, 6
"""How far a layer inside another is moved in, and how often at most."""
WIDTH, NARROWEST, WIDEST = 960, 720, 1400
"""Of the static drawing; that of the page is as wide as its window, between the others."""
BELOW = 12
"""Under the last row."""
TWO_LINES = 36
"""A weight of this height has its shape under its name."""
MOST_OF_EXPRESSION = 120
"""Characters of an expression on the widest map; the facts of its use have all."""
CODE, PROSE, WIDE = 7.25, 6.9, 7.7
"""About the width of a character of code, of the other words, and of these if many letters are wide."""
CLASSES = dict(zip(KINDS, ("trained", "frozen", "here", "unused", "state", "unknown"), strict=True))


def px(value: float) -> str:
    """A number for SVG, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")

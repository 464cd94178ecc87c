"""What the colours and heights mean, of those that there are."""

from __future__ import annotations

import itertools

from tether.inspection.facts import Facts
from tether.inspection.plotting.layout import LINE, scale_of
from tether.inspection.plotting.measures import BAR, CLASSES, LEFT, NARROWEST, PROSE, RIGHT, WIDTH, px
from tether.inspection.plotting.rows import KINDS, kind_of, use_kind, weight_kind
from tether.inspection.sizes import human_bytes

MARK = 12
"""The width of a patch of colour."""


def legend(facts: Facts, top: float) -> tuple[list[str], float]:
    """The elements of the legend and of the names of the columns, and where the rows begin."""
    parts = ['<g class="legend">']
    x, y = 0.0, top + 12
    for mark, said in _entries(facts):
        wide = MARK + 6 + PROSE * len(said) + 18
        if x and x + wide > NARROWEST:
            x, y = 0.0, y + 22
        parts.append(f'<g transform="translate({px(x)},{px(y)})">{mark}<text x="{MARK + 6}">{said}</text></g>')
        x += wide
    y += 28
    parts += [
        f'<text class="column" x="{LEFT + BAR}" y="{px(y)}" text-anchor="end">STORED WEIGHTS</text>',
        f'<text class="column right" x="{WIDTH - RIGHT}" y="{px(y)}">LAYERS, AND WHAT THEY READ</text>',
        "</g>",
    ]
    return parts, y + 6


def _entries(facts: Facts) -> list[tuple[str, str]]:
    kinds = {weight_kind(weight, facts) for weight in facts.weights} | {kind_of(use, facts) for use in facts.uses}
    kinds |= {use_kind(use, facts.weight(place)) for use in facts.uses for place in use.weights}
    found = [(_patch(CLASSES[kind]), kind) for kind in KINDS if kind in kinds]
    if any(facts.shared()) or any(use.tied for use in facts.uses):
        found.append((_patch("strong"), "strong: shared or tied"))
    scale = scale_of(facts)
    rounds = (step * 10**power for power in range(18) for step in (1, 2, 5))
    count = max(itertools.takewhile(lambda count: count * scale <= LINE, rounds), default=1)
    height = count * scale
    bar = f'<rect class="scale" y="{px(-height / 2)}" width="{MARK}" height="{px(height)}"/>'
    return [
        *found,
        (bar, f"{human_bytes(count)}; a hairline at least; paler is room for a name".replace(".0 ", " ")),
    ]


def _patch(kind: str) -> str:
    return f'<rect class="mark {kind}" y="{-MARK / 2:g}" width="{MARK}" height="{MARK}" rx="2"/>'

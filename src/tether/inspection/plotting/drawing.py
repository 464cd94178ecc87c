"""The weight map as SVG, with its legend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tether.inspection.facts import Facts, StoredWeight, UseOf, human_bytes
from tether.inspection.plotting import layout
from tether.inspection.plotting.layout import (
    BAR,
    BAR_OF_USE,
    BELOW,
    CLASSES,
    CODE,
    GAP,
    HEADING,
    KINDS,
    LEAST_NARROW,
    LEFT,
    LINE,
    MIDDLE,
    MOST_OF_EXPRESSION,
    MOST_STEPS,
    NARROWEST,
    PROSE,
    RIBBON,
    RIGHT,
    STEP,
    TWO_LINES,
    WIDE,
    WIDTH,
    box,
    heights_of,
    kind_of_use,
    px,
    rows_of,
    scale_of,
    spots_of,
    text,
    use_kind,
    weight_kind,
)

# --------------------------------------------------------------------------- two looks
# What is drawn otherwise when a layer is closed, or when the window is narrow, has the other attributes beside its
# own. The script of the page exchanges them, and so knows nothing of how anything looks.


Attributes = dict[str, str | float]


def _looks(first: Attributes, second: Attributes, *, now_second: bool = False) -> str:
    """Attributes as they are now, and those of the other look that differ."""
    now, other = (second, first) if now_second else (first, second)
    here, there = ({name: v if isinstance(v, str) else px(v) for name, v in look.items()} for look in (now, other))
    shown = " ".join(f'{name}="{value}"' for name, value in here.items())
    differing = ";".join(f"{name}={value}" for name, value in there.items() if here[name] != value)
    return shown + (f' data-look="{differing}"' if differing else "")


def _shown(closed: bool, *, in_closed: bool = False) -> str:
    """Shown only when a row is closed, or only when it is open."""
    shown, hidden = Attributes(display="inline"), Attributes(display="none")
    return _looks(hidden, shown, now_second=closed) if in_closed else _looks(shown, hidden, now_second=closed)


# --------------------------------------------------------------------------- the legend
# What the colours and heights mean, of those that there are.


MARK = 12
"""The width of a patch of colour."""


def legend(facts: Facts, top: float) -> tuple[list[str], tuple[float, float]]:
    """The elements of the legend, and where it ends, wide and narrow."""
    entries = _entries(facts)
    widths = [MARK + 6 + PROSE * len(said) + 18 for _, said in entries]
    wide, narrow = _flow(widths, NARROWEST, top + 12), _flow(widths, LEAST_NARROW, top + 12)
    parts = ['<g class="legend">']
    for (mark, said), first, second in zip(entries, wide, narrow, strict=True):
        at = _looks({"transform": _to(*first)}, {"transform": _to(*second)})
        parts.append(f'<g {at}>{mark}<text x="{MARK + 6}">{said}</text></g>')
    return [*parts, "</g>"], (wide[-1][1], narrow[-1][1])


def _flow(widths: Sequence[float], room: float, top: float) -> list[tuple[float, float]]:
    """Where things of these widths stand, one beside the other, in lines of so much room."""
    found: list[tuple[float, float]] = []
    x, y = 0.0, top
    for wide in widths:
        if x and x + wide > room:
            x, y = 0.0, y + 22
        found.append((x, y))
        x += wide
    return found


def _to(x: float, y: float) -> str:
    return f"translate({px(x)},{px(y)})"


def _entries(facts: Facts) -> list[tuple[str, str]]:
    kinds = {weight_kind(weight, facts) for weight in facts.weights} | {kind_of_use(use, facts) for use in facts.uses}
    kinds |= {use_kind(use, facts.weight(place)) for use in facts.uses for place in use.weights}
    found = [(_patch(CLASSES[kind]), kind) for kind in KINDS if kind in kinds]
    if any(facts.shared()) or any(use.tied for use in facts.uses):
        found.append((_patch("strong"), "strong: shared or tied"))
    scale = scale_of(facts).of_byte
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


# --------------------------------------------------------------------------- the drawing
# The map as SVG: the stored weights on the left, the layers in the order of the model on the right, ribbons between.
#
# Everything that the script of the page moves has an id or a number: `w3` is a weight, `r5` a row; a ribbon names
# both. Numbers in pairs are for an open and for a closed row.


@dataclass(frozen=True)
class Drawing:
    """A drawing, and what is needed around it."""

    svg: str
    """The elements inside `<svg>`."""
    height: float
    tops: tuple[float, float]
    """Where the rows begin, wide and narrow."""


class _Map:
    """The facts, the rows made of them, and where these are."""

    def __init__(self, facts: Facts, top: float) -> None:
        self.facts = facts
        self.rows = rows_of(facts)
        self.scale = scale_of(facts)
        self.heights, self.stacks = heights_of(self.rows, self.scale)
        self.places, self.bottom = spots_of(self.rows, self.heights, self.stacks, top)
        self.kinds = {weight.place: weight_kind(weight, facts) for weight in facts.weights}
        self.shared = {weight.place for weight in facts.shared()}
        self.numbers = {weight.place: number for number, weight in enumerate(facts.weights)}
        self.at: dict[str, tuple[float, float]] = {}
        """The top and the height of the solid part of each weight."""


def draw(facts: Facts, *, top: float = 0.0) -> Drawing:
    """Draws the map.

    Args:
        facts: What it shows.
        top: Where it begins; above is room for a title.
    """
    signs, ends = legend(facts, top)
    columns = _looks({"y": ends[0] + 28}, {"y": ends[1] + 28})
    tops = (ends[0] + 34, ends[1] + 34)
    it = _Map(facts, tops[0])
    # First, since the ribbons need to know where the weights are.
    weights = [line for number in range(len(it.rows)) for line in _weights(it, number)]
    parts = [
        *signs,
        f'<g class="ribbons" aria-hidden="true" transform="{_to(LEFT + BAR, 0)}">',
        *_ribbons(it),
        "</g>",
        f'<g class="left" transform="{_to(LEFT, 0)}">',
        f'<text class="column wide" x="{BAR}" text-anchor="end" {columns}>STORED WEIGHTS</text>',
        f'<text class="column narrow" {columns}>STORED</text>',
        '<g class="weights" role="list" aria-label="Stored weights">',
        *weights,
        "</g></g>",
        f'<g class="right" transform="{_to(WIDTH - RIGHT, 0)}">',
        f'<text class="column" {columns}>LAYERS, AND WHAT THEY READ</text>',
        '<g class="rows" role="tree" aria-label="Layers, and what they read">',
        *(_row(it, number) for number in range(len(it.rows))),
        "</g></g>",
    ]
    return Drawing("\n".join(parts), math.ceil(it.bottom + BELOW), tops)


# --------------------------------------------------------------------------- weights


def _weights(it: _Map, number: int) -> Iterator[str]:
    """The weights that are drawn at a row, one under the other, in its middle."""
    row, place = it.rows[number], it.places[number]
    if row.heading:
        said = _sum(it, number, 16)
        if said:
            y = px(it.heights[number].closed / 2)
            yield (
                f'<g class="sum" aria-hidden="true" data-row="{number}" transform="{_to(0, place.top)}"'
                f"{_hidden(place.stripe)}>"
                f'<text x="-9" y="{y}" {_shown(row.closed, in_closed=True)}>{text(said)}</text></g>'
            )
        return
    boxes = [box(it.scale.solid(weight.bytes)) for weight in row.weights]
    tall = it.heights[number]
    opened = (tall.open - sum(each.open for each in boxes) - GAP * (len(boxes) - 1)) / 2
    closed = (tall.closed - sum(each.closed for each in boxes)) / 2
    for weight, each in zip(row.weights, boxes, strict=True):
        yield _weight(it, weight, number, (opened, closed))
        opened += each.open + GAP
        closed += each.closed


def _sum(it: _Map, number: int, room: int) -> str:
    """How much is in a layer."""
    inside = [weight for inner in it.rows[number + 1 : it.rows[number].end] for weight in inner.weights]
    if not inside:
        return ""
    many = layout.number(len(inside), "weight") if len(inside) > 1 else layout.name_of(inside[0]).split("/")[-1]
    return f"{layout.fit_end(many, room)}, {human_bytes(sum(weight.bytes for weight in inside))}"


def _weight(it: _Map, weight: StoredWeight, number: int, at: tuple[float, float]) -> str:
    """A weight whose box begins so far below the top of its row."""
    facts, kind, place = it.facts, it.kinds[weight.place], it.places[number]
    drawn = it.scale.solid(weight.bytes)
    around = box(drawn)
    middle = (around.open - drawn.open) / 2
    it.at[weight.place] = (place.top + (at[1] if place.stripe else at[0] + middle), drawn.of(place.stripe))
    uses = facts.uses_of(weight)
    tied = weight.place in it.shared or any(use.tied for use in uses)
    name = layout.name_of(weight)
    if uses and not tied:  # the row beside it says the rest
        name = name.rpartition("/")[2]
    size = human_bytes(weight.bytes)
    y = around.open / 2
    if drawn.open >= TWO_LINES:
        room = int((LEFT - 14) / CODE)
        label = (
            f'<text class="name" x="-9" y="{px(y - 8)}">{text(layout.fit_path(name, room))}</text>'
            f'<text class="note" x="-9" y="{px(y + 9)}">{text(layout.shape(weight.shape))}, {size}</text>'
        )
    else:
        room = int((LEFT - 20 - PROSE * len(size)) / CODE)
        label = (
            f'<text class="name" x="-9" y="{px(y)}">{text(layout.fit_path(name, room))}'
            f'<tspan class="note" dx="7">{size}</tspan></text>'
        )
    classes = f"weight {CLASSES[kind]}{' tied' if tied else ''}{' shared' if weight.place in it.shared else ''}"
    frame = _looks({"height": around.open, "rx": 2}, {"height": around.closed, "rx": 0}, now_second=place.stripe)
    return (
        f'<g id="w{it.numbers[weight.place]}" class="{classes}" role="listitem" data-row="{number}" '
        f'data-bytes="{weight.bytes}" data-at="{px(at[0])} {px(at[1])}" '
        f'data-solid="{px(at[0] + middle)} {px(drawn.open)} {px(at[1])} {px(drawn.closed)}" '
        f'transform="{_to(0, place.top + at[place.stripe])}">'
        f"{_title(layout.weight_facts(weight, facts, kind))}"
        f'<rect class="box" width="{BAR}" {frame}/>'
        f'<rect class="solid" width="{BAR}" {_solid(middle, 0.0, drawn, place.stripe)}/>'
        f"<g {_shown(place.stripe)}>{label}</g></g>"
    )


def _solid(opened: float, closed: float, drawn: layout.Heights, stripe: bool) -> str:
    """The top and the height of what is solid, in both looks."""
    return _looks({"y": opened, "height": drawn.open}, {"y": closed, "height": drawn.closed}, now_second=stripe)


def _title(lines: Sequence[str]) -> str:
    return f"<title>{text(chr(10).join(lines))}</title>"


def _hidden(hidden: bool) -> str:
    return ' display="none"' if hidden else ""


# --------------------------------------------------------------------------- rows


def _row(it: _Map, number: int) -> str:
    row, place, heights = it.rows[number], it.places[number], it.heights[number]
    common = (
        f'id="r{number}" data-end="{row.end}" data-height="{px(heights.open)} {px(heights.closed)}" '
        f'transform="{_to(0, place.top)}"'
    )
    if row.heading:
        return _heading(it, number, common)
    if row.use is None:
        return _loose(it, number, common)
    return _use(it, number, row.use, common)


def _indented(depth: int) -> int:
    return BAR_OF_USE + 11 + STEP * min(depth, MOST_STEPS)


def _heading(it: _Map, number: int, common: str) -> str:
    row, place, heights = it.rows[number], it.places[number], it.heights[number]
    x = _indented(row.depth) - 2
    room = RIGHT - x - 16
    name = layout.fit_path(row.name, int(room / CODE))
    left = room - CODE * len(name) - 8
    kind = row.kind or ""
    if len(kind) * PROSE > left:  # wide letters must fit too, since nothing may stand beyond the edge
        kind = layout.fit_end(kind, int(left / WIDE)) if left > 6 * WIDE else ""
    inner = range(number + 1, row.end)
    weights = [weight for n in inner for weight in it.rows[n].weights]
    uses = sum(it.rows[n].use is not None for n in inner)
    size = human_bytes(sum(weight.bytes for weight in weights))
    sized = bool(weights) and len(size) * PROSE <= left  # a narrow map has no names and sizes on the left
    said = [row.path]
    if row.kind:
        said.append(row.kind)
    said.append(f"{layout.number(uses, 'use')}; {layout.number(len(weights), 'weight')} drawn here, {size}")
    bottom = max((it.places[n].top + it.places[n].height for n in inner), default=place.top)
    closed = heights.closed
    label = _looks({"transform": _to(0, HEADING / 2)}, {"transform": _to(0, closed / 2)}, now_second=row.closed)
    hit = _looks({"height": HEADING}, {"height": closed}, now_second=row.closed)
    # A bracket beside the stack of a closed layer; below the heading of an open one, a line along what is in it.
    bracket = _looks({"d": ""}, {"d": f"M{x - 5} 0.5h3v{px(closed - 1)}h-3"}, now_second=row.closed)
    guide = 0.0 if row.closed else max(bottom - place.top - HEADING + 4, 0.0)
    sign = _looks({"d": f"M{x} -2.5l4.5 5l4.5 -5"}, {"d": f"M{x + 2} -4.5l5 4.5l-5 4.5"}, now_second=row.closed)
    return (
        f'<g class="heading" role="treeitem" aria-level="{row.depth + 1}" '
        f'aria-expanded="{"false" if row.closed else "true"}" data-stack="{px(it.stacks[number])}" '
        f"{common}{_hidden(place.stripe)}>"
        f'{_title(said)}<rect class="hit" width="{RIGHT}" {hit}/>'
        f'<path class="bracket" {bracket}/>'
        f'<rect class="guide" x="{x + 4}" y="{HEADING - 4:g}" width="1" height="{px(guide)}"/>'
        f'<g class="label" {label}><path class="sign" {sign}/>'
        f'<text x="{x + 14}"><tspan class="name">{text(name)}</tspan>'
        + (f'<tspan class="note{" wide" * sized}" dx="8">{text(kind)}</tspan>' if kind else "")
        + (f'<tspan class="note narrow" dx="8">{size}</tspan>' if sized else "")
        + "</text></g></g>"
    )


def _loose(it: _Map, number: int, common: str) -> str:
    """The row of a weight that stands by itself: who reads it, and where the window is narrow its name."""
    row, place = it.rows[number], it.places[number]
    (weight,) = row.weights
    x, y = _indented(row.depth), px(it.heights[number].open / 2)
    uses = it.facts.uses_of(weight)
    readers = f"{layout.number(len(uses), 'use')}: {', '.join(use.layer for use in uses[:8])}" if uses else ""
    size = human_bytes(weight.bytes)
    name = layout.fit_path(layout.name_of(weight), int((RIGHT - x - 8 - PROSE * len(size)) / CODE))
    readers = text(layout.fit_end(readers, int((RIGHT - x) / WIDE)))
    by = f'<text class="note wide" x="{x}" y="{y}">{readers}</text>' if readers else ""
    return (
        f'<g class="loose" aria-hidden="true" {common}><g {_shown(place.stripe)}>{by}'
        f'<text class="narrow" x="{x}" y="{y}"><tspan class="name">{text(name)}</tspan>'
        f'<tspan class="note" dx="8">{size}</tspan></text></g></g>'
    )


def _use(it: _Map, number: int, use: UseOf, common: str) -> str:
    row, place, heights = it.rows[number], it.places[number], it.heights[number]
    read = [it.facts.weight(at) for at in use.weights]
    kind = kind_of_use(use, it.facts)
    drawn = it.scale.solid(use.bytes)
    x, middle = _indented(row.depth), heights.open / 2
    name = layout.attribute_of(use)
    shape = layout.shape(use.shape)
    room = int((RIGHT - x - PROSE * len(shape) - 8) / CODE)
    tied = use.tied or any(weight.place in it.shared for weight in read)
    expression = use.expression if use.tied else None
    wide = ' class="wide"' if expression else ""
    label = (
        f'<text{wide} x="{x}" y="{px(middle)}">'
        f'<tspan class="name">{text(layout.fit_path(name, max(room, 8)))}</tspan>'
        f'<tspan class="note" dx="8">{text(shape)}</tspan></text>'
    )
    if expression:
        equation = layout.fit_end(f"{name} = {expression}", int((RIGHT - x) / CODE))
        full = layout.fit_end(expression, MOST_OF_EXPRESSION)
        short = layout.fit_end(full, int((MIDDLE - 12) / CODE))
        label += (
            f'<text class="name narrow" x="{x}" y="{px(middle)}">{text(equation)}</text>'
            f'<text class="expression wide" data-full="{text(full)}" x="-8" y="{px(middle)}">{text(short)}</text>'
        )
    names = [(layout.name_of(weight), use_kind(use, weight)) for weight in read]
    tops = [(heights.of(closed) - drawn.of(closed)) / 2 for closed in (False, True)]
    return (
        f'<g class="use {CLASSES[kind]}{" tied" if tied else ""}" role="treeitem" aria-level="{row.depth + 1}" '
        f'data-bytes="{use.bytes}" {common} '
        f'data-solid="{px(tops[0])} {px(drawn.open)} {px(tops[1])} {px(drawn.closed)}">'
        f"{_title(layout.use_facts(use, names))}"
        f'<rect class="solid" width="{BAR_OF_USE}" {_solid(tops[0], tops[1], drawn, place.stripe)}/>'
        f'<g {_shown(place.stripe)}><rect class="hit" width="{RIGHT}" height="{px(heights.open)}"/>{label}</g></g>'
    )


# --------------------------------------------------------------------------- ribbons


def _ribbons(it: _Map) -> Iterator[str]:
    """A ribbon from each weight to each row that reads it; those of shared and combined weights lie on top."""
    quiet: list[str] = []
    loud: list[str] = []
    for number, row in enumerate(it.rows):
        use = row.use
        if use is None:
            continue
        place = it.places[number]
        height = it.scale.solid(use.bytes).of(place.stripe)
        top = place.top + (place.height - height) / 2
        total = sum(it.facts.weight(at).bytes for at in use.weights)
        part = 0.0
        for at in use.weights:
            weight = it.facts.weight(at)
            share = weight.bytes / total if total else 1 / len(use.weights)
            y, thick = it.at[at]
            to = top + part * height
            d = RIBBON.format(a=px(y), b=px(y + thick), c=px(to), d=px(to + share * height))
            tied = use.tied or at in it.shared
            (loud if tied else quiet).append(
                f'<path class="ribbon {CLASSES[use_kind(use, weight)]}{" tied" if tied else ""}" '
                f'data-weight="{it.numbers[at]}" data-row="{number}" data-part="{part:.4g} {share:.4g}" d="{d}"/>'
            )
            part += share
    yield from quiet
    yield from loud

"""The weight map as SVG, its legend, and the page around it that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

from tether.inspection.facts import Facts, StoredWeight, UseOf, human_bytes
from tether.inspection.plotting import rows
from tether.inspection.plotting.rows import (
    ABOVE,
    BAR,
    BAR_OF_USE,
    BELOW,
    CLASSES,
    CODE,
    GAP,
    HEADING,
    KINDS,
    LEFT,
    LINE,
    MOST_OF_EXPRESSION,
    MOST_STEPS,
    NARROWEST,
    PROSE,
    RIGHT,
    STEP,
    TWO_LINES,
    WIDE,
    WIDEST,
    WIDTH,
    Heights,
    kind_of,
    px,
    row_heights,
    rows_of,
    scale_of,
    solid,
    spots_of,
    text,
    use_kind,
    weight_kind,
)

# --------------------------------------------------------------------------- the legend
# What the colours and heights mean, of those that there are.


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


# --------------------------------------------------------------------------- the drawing
# The map as SVG: the stored weights on the left, the layers in the order of the model on the right, ribbons between.
#
# Everything that the script of the page moves has an id or a number: `w3` is a weight, `r5` a row; a ribbon names
# both.


@dataclass(frozen=True)
class Drawing:
    """A drawing, and what is needed around it."""

    svg: str
    """The elements inside `<svg>`."""
    height: float
    top: float
    """Where the rows begin."""


class _Map:
    """The facts, the rows made of them, and where these are."""

    def __init__(self, facts: Facts, top: float) -> None:
        self.facts = facts
        self.rows = rows_of(facts)
        self.scale = scale_of(facts)
        self.heights = [row_heights(row, self.scale) for row in self.rows]
        self.places, self.bottom = spots_of(self.rows, self.heights, top)
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
    signs, top = legend(facts, top)
    it = _Map(facts, top)
    # First, since the ribbons need to know where the weights are.
    weights = [line for number in range(len(it.rows)) for line in _weights(it, number)]
    parts = [
        *signs,
        '<g class="ribbons" aria-hidden="true">',
        *_ribbons(it),
        "</g>",
        '<g class="weights" role="list" aria-label="Stored weights">',
        *weights,
        "</g>",
        '<g class="rows" role="tree" aria-label="Layers, and what they read">',
        *(_row(it, number) for number in range(len(it.rows))),
        "</g>",
    ]
    return Drawing("\n".join(parts), math.ceil(it.bottom + BELOW), top)


# --------------------------------------------------------------------------- weights


def _weights(it: _Map, number: int) -> Iterator[str]:
    """The weights that are drawn at a row, one under the other, in its middle."""
    row, place = it.rows[number], it.places[number]
    if row.heading:
        inside = [weight for inner in it.rows[number + 1 : row.end] for weight in inner.weights]
        if inside:
            many = rows.number(len(inside), "weight") if len(inside) > 1 else rows.name_of(inside[0]).split("/")[-1]
            said = text(f"{rows.fit_end(many, 16)}, {human_bytes(sum(weight.bytes for weight in inside))}")
            yield (
                f'<text class="sum" data-row="{number}" x="{LEFT - 9}" y="{px(place.top + place.height / 2)}"'
                f"{_hidden(not row.closed or place.stripe)}>{said}</text>"
            )
    heights = [solid(weight.bytes, it.scale) for weight in row.weights]
    boxes = [h.closed if place.stripe else max(h.open, LINE) for h in heights]
    gap = 0.0 if place.stripe else GAP
    y = place.top + (place.height - sum(boxes) - gap * (len(boxes) - 1)) / 2
    for weight, drawn, box in zip(row.weights, heights, boxes, strict=True):
        height = drawn.closed if place.stripe else drawn.open
        it.at[weight.place] = (y + (box - height) / 2, height)
        yield _weight(it, weight, number, y, box, drawn, place.stripe)
        y += box + gap


def _weight(it: _Map, weight: StoredWeight, row: int, y: float, box: float, drawn: Heights, stripe: bool) -> str:
    facts, kind = it.facts, it.kinds[weight.place]
    height = drawn.closed if stripe else drawn.open
    uses = facts.uses_of(weight)
    tied = weight.place in it.shared or any(use.tied for use in uses)
    name = rows.name_of(weight)
    if uses and not tied:  # the row beside it says the rest
        name = name.rpartition("/")[2]
    size = human_bytes(weight.bytes)
    middle = max(drawn.open, LINE) / 2
    if drawn.open >= TWO_LINES:
        room = int((LEFT - 14) / CODE)
        label = (
            f'<text class="name" x="-9" y="{px(middle - 8)}">{text(rows.fit_path(name, room))}</text>'
            f'<text class="note" x="-9" y="{px(middle + 9)}">{text(rows.shape(weight.shape))}, {size}</text>'
        )
    else:
        room = int((LEFT - 20 - PROSE * len(size)) / CODE)
        label = (
            f'<text class="name" x="-9" y="{px(middle)}">{text(rows.fit_path(name, room))}'
            f'<tspan class="note" dx="7">{size}</tspan></text>'
        )
    classes = f"weight {CLASSES[kind]}{' tied' if tied else ''}{' shared' if weight.place in it.shared else ''}"
    return (
        f'<g id="w{it.numbers[weight.place]}" class="{classes}" role="listitem" data-row="{row}" '
        f'data-bytes="{weight.bytes}" data-solid="{px(drawn.open)} {px(drawn.closed)}" '
        f'transform="translate({LEFT},{px(y)})">'
        f"{_title(rows.weight_facts(weight, facts, kind))}"
        f'<rect class="box" width="{BAR}" height="{px(box)}" rx="{0 if stripe else 2}"/>'
        f'<rect class="solid" width="{BAR}" y="{px((box - height) / 2)}" height="{px(height)}"/>'
        f"<g{_hidden(stripe)}>{label}</g></g>"
    )


def _title(lines: Sequence[str]) -> str:
    return f"<title>{text(chr(10).join(lines))}</title>"


def _hidden(hidden: bool) -> str:
    return ' display="none"' if hidden else ""


# --------------------------------------------------------------------------- rows


def _row(it: _Map, number: int) -> str:
    row, place = it.rows[number], it.places[number]
    common = (
        f'id="r{number}" data-end="{row.end}" data-height="{px(it.heights[number].open)} '
        f'{px(it.heights[number].closed)}" transform="translate({WIDTH - RIGHT},{px(place.top)})"'
    )
    if row.heading:
        return _heading(it, number, common)
    if row.use is None:
        return f'<g class="loose" aria-hidden="true" {common}/>'
    return _use(it, number, row.use, common)


def _heading(it: _Map, number: int, common: str) -> str:
    row, place = it.rows[number], it.places[number]
    x = BAR_OF_USE + 9 + STEP * min(row.depth, MOST_STEPS)
    room = RIGHT - x - 16
    name = rows.fit_path(row.name, int(room / CODE))
    left = room - CODE * len(name) - 8
    kind = row.kind or ""
    if len(kind) * PROSE > left:  # wide letters must fit too, since nothing may stand beyond the edge
        kind = rows.fit_end(kind, int(left / WIDE)) if left > 6 * WIDE else ""
    inner = range(number + 1, row.end)
    weights = [weight for n in inner for weight in it.rows[n].weights]
    uses = sum(it.rows[n].use is not None for n in inner)
    said = [row.path]
    if row.kind:
        said.append(row.kind)
    said.append(
        f"{rows.number(uses, 'use')}; {rows.number(len(weights), 'weight')} drawn here, "
        f"{human_bytes(sum(weight.bytes for weight in weights))}"
    )
    bottom = max((it.places[n].top + it.places[n].height for n in inner), default=place.top)
    height = place.height if row.closed else max(bottom - place.top, place.height)
    return (
        f'<g class="heading" role="treeitem" aria-level="{row.depth + 1}" '
        f'aria-expanded="{"false" if row.closed else "true"}" data-x="{x}" {common}{_hidden(place.stripe)}>'
        f'{_title(said)}<rect class="hit" width="{RIGHT}" height="{px(place.height)}"/>'
        f'<path class="bracket" d="{bracket(x, height, row.closed)}"/>'
        f'<g class="label" transform="translate(0,{px(place.height / 2)})">'
        f'<path class="sign" d="{sign(x, row.closed)}"/>'
        f'<text x="{x + 14}"><tspan class="name">{text(name)}</tspan>'
        + (f'<tspan class="note" dx="8">{text(kind)}</tspan>' if kind else "")
        + "</text></g></g>"
    )


def bracket(x: float, height: float, closed: bool) -> str:
    """What spans the rows of a layer: beside the stack of a closed one, below the heading of an open one."""
    if closed:
        return f"M{px(x - 5)} 0.5h3v{px(height - 1)}h-3"
    return f"M{px(x + 4.5)} {px(HEADING - 4)}V{px(height)}"


def sign(x: float, closed: bool) -> str:
    """Points to what is inside: to the right if that is closed, else down."""
    return f"M{px(x + 2)} -4.5l5 4.5l-5 4.5" if closed else f"M{px(x)} -2.5l4.5 5l4.5 -5"


def _use(it: _Map, number: int, use: UseOf, common: str) -> str:
    row, place = it.rows[number], it.places[number]
    read = [it.facts.weight(at) for at in use.weights]
    kind = kind_of(use, it.facts)
    drawn = solid(use.bytes, it.scale)
    height = drawn.closed if place.stripe else drawn.open
    x = BAR_OF_USE + 11 + STEP * min(row.depth, MOST_STEPS)
    name = rows.attribute_of(use)
    shape = rows.shape(use.shape)
    room = int((RIGHT - x - PROSE * len(shape) - 8) / CODE)
    tied = use.tied or any(weight.place in it.shared for weight in read)
    middle = it.heights[number].open / 2
    label = (
        f'<text x="{x}" y="{px(middle)}"><tspan class="name">{text(rows.fit_path(name, max(room, 8)))}</tspan>'
        f'<tspan class="note" dx="8">{text(shape)}</tspan></text>'
    )
    if use.tied and use.expression:
        full = rows.fit_end(use.expression, MOST_OF_EXPRESSION)
        short = rows.fit_end(full, int((WIDTH - LEFT - BAR - RIGHT - 12) / CODE))
        label += f'<text class="expression" data-full="{text(full)}" x="-8" y="{px(middle)}">{text(short)}</text>'
    names = [(rows.name_of(weight), use_kind(use, weight)) for weight in read]
    return (
        f'<g class="use {CLASSES[kind]}{" tied" if tied else ""}" role="treeitem" aria-level="{row.depth + 1}" '
        f'data-bytes="{use.bytes}" data-solid="{px(drawn.open)} {px(drawn.closed)}" {common}>'
        f"{_title(rows.use_facts(use, names))}"
        f'<rect class="solid" width="{BAR_OF_USE}" y="{px((place.height - height) / 2)}" height="{px(height)}"/>'
        f'<g{_hidden(place.stripe)}><rect class="hit" width="{RIGHT}" height="{px(place.height)}"/>{label}</g></g>'
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
        drawn = solid(use.bytes, it.scale)
        height = drawn.closed if place.stripe else drawn.open
        top = place.top + (place.height - height) / 2
        total = sum(it.facts.weight(at).bytes for at in use.weights)
        part = 0.0
        for at in use.weights:
            weight = it.facts.weight(at)
            share = weight.bytes / total if total else 1 / len(use.weights)
            y, thick = it.at[at]
            tied = use.tied or at in it.shared
            d = ribbon(LEFT + BAR, y, thick, WIDTH - RIGHT, top + part * height, share * height)
            (loud if tied else quiet).append(
                f'<path class="ribbon {CLASSES[use_kind(use, weight)]}{" tied" if tied else ""}" '
                f'data-weight="{it.numbers[at]}" data-row="{number}" data-part="{part:.4g} {share:.4g}" d="{d}"/>'
            )
            part += share
    yield from quiet
    yield from loud


def ribbon(x: float, y: float, height: float, to_x: float, to_y: float, to_height: float) -> str:
    """The outline of a ribbon from the right side of a weight to the left side of a use."""
    middle = px((x + to_x) / 2)
    return (
        f"M{px(x)} {px(y)}C{middle} {px(y)} {middle} {px(to_y)} {px(to_x)} {px(to_y)}V{px(to_y + to_height)}"
        f"C{middle} {px(to_y + to_height)} {middle} {px(y + height)} {px(x)} {px(y + height)}Z"
    )


# --------------------------------------------------------------------------- the page
# A map as a whole file: a page that needs nothing else, or a drawing.


MARGIN = 24


def page(facts: Facts, title: str) -> str:
    """The map as one HTML file. Its policy lets it load nothing and run no script but its own."""
    drawing = draw(facts)
    style, script = _file("map.css") + _file("page.css"), _file("map.js")
    sizes = {
        "left": LEFT, "bar": BAR, "right": RIGHT, "heading": HEADING, "line": LINE, "gap": GAP, "above": ABOVE,
        "below": BELOW, "top": drawing.top, "least": NARROWEST, "most": WIDEST, "letter": CODE,
    }  # fmt: skip
    totals = "\n".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>" for name, value, note in totals_of(facts)
    )
    return Template(_file("page.html")).substitute(
        title=text(title),
        description=text(_description(facts, title)),
        totals=totals,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        width=WIDTH,
        height=drawing.height,
        sizes=" ".join(f'data-{name}="{value:g}"' for name, value in sizes.items()),
        map=drawing.svg,
    )


def image(facts: Facts, title: str) -> str:
    """The map as one SVG file."""
    drawing = draw(facts, top=84)
    width, height = WIDTH + 2 * MARGIN, drawing.height + MARGIN
    frame = f'x="{-MARGIN}" y="{-MARGIN // 2}" width="{width}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" width="{width}" height="{height:g}" '
        f'viewBox="{-MARGIN} {-MARGIN // 2} {width} {height:g}" role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{text(title)}</title>\n<desc id="desc">{text(_description(facts, title))}</desc>\n'
        f'<style>{_file("map.css")}</style>\n<rect class="paper" {frame}/>\n'
        f'<text class="head" y="16">{text(rows.fit_end(title, 84))}</text>\n'
        f"{_totals(facts)}\n{drawing.svg}\n</svg>\n"
    )


def _totals(facts: Facts) -> str:
    """The totals as text of a drawing."""
    return "\n".join(
        f'<g transform="translate({number * WIDTH // 4},44)"><text class="note">{name}</text>'
        f'<text class="total" y="20">{value}<tspan class="note" dx="6">{note}</tspan></text></g>'
        for number, (name, value, note) in enumerate(totals_of(facts))
    )


def totals_of(facts: Facts) -> list[tuple[str, str, str]]:
    """The totals: what of, how much, and a word on it."""
    shared = sum(1 for _ in facts.shared())
    note = rows.number(len(facts.weights), "weight") + (f", {shared:,} shared" if shared else "")
    found = [("stored", human_bytes(facts.stored_bytes), note)]
    if facts.ties:
        saved = facts.unshared_bytes - facts.stored_bytes
        found.append(("unshared", human_bytes(facts.unshared_bytes), "if nothing were shared"))
        of_all = f"{abs(saved) / facts.unshared_bytes:.1%} of that" if saved else ""
        found.append(("saved" if saved >= 0 else "added", human_bytes(abs(saved)), of_all))
    else:
        found.append(("unshared", "unknown", "this file does not say which layers share"))
    if facts.optimizer:
        found.append(("optimizer", human_bytes(facts.optimizer_bytes), "kept beside the weights"))
    return found


def _description(facts: Facts, title: str) -> str:
    said = ", ".join(f"{name} {value}" for name, value, _ in totals_of(facts))
    weights, layers = rows.number(len(facts.weights), "stored weight"), rows.number(len(facts.layers), "layer")
    return (
        f"{title}: {said}. On the left are {weights}, as high as their bytes; "
        f"on the right {layers}, in the order of the model. "
        f"A ribbon is one of {rows.number(len(facts.uses), 'use')}."
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

"""What the map shows, row by row: the layers as headings, one inside the other, and under each what it reads.

A weight is drawn at the row that reads it first. Weights that no layer reads have rows of their own at the end, and in
a model of many rows those that are shared have theirs on top.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from tether.inspection.facts import Facts, Shape, StoredWeight, UseOf, human_bytes

# --------------------------------------------------------------------------- rows


MOST_OPEN = 34
"""Layers are opened at first as long as the map has no more rows than these. A model of more is a big one: its shared
weights stand on top, and of more layers side by side, those that are alike have one heading."""
LEAST_ALIKE = 3
"""Of fewer layers than these, each has its own heading."""
SHARED = "shared weights"

TRAINED, FROZEN, FROZEN_HERE, UNUSED, STATE, UNKNOWN = KINDS = (
    "trained",
    "frozen",
    "frozen for this use",
    "read by no layer",
    "state",
    "trained or frozen: the file does not say",
)


@dataclass
class MapRow:
    """A heading, or a use, or a weight that no layer reads."""

    name: str
    depth: int
    parent: int | None
    """The number of the heading that it is under."""
    kind: str | None = None
    """The class of the layer."""
    use: UseOf | None = None
    weights: list[StoredWeight] = field(default_factory=list)
    """What is drawn here."""
    heading: bool = False
    path: str = ""
    end: int = 0
    """The number after the last row inside it."""
    closed: bool = False


class _Node:
    """A layer, or a name that layers have before their own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: str | None = None
        self.uses: list[UseOf] = []
        self.children: dict[str, _Node] = {}
        self.tied = False
        """Whether anything inside is tied or shared."""
        self.alike = False
        """Whether it stands for several layers side by side, and is no layer."""

    def below(self, names: list[str], *, tied: bool = False) -> _Node:
        """The node that names lead to."""
        node = self
        for name in names:
            node = node.children.setdefault(name, _Node(name))
            node.tied |= tied
        return node

    def inner(self) -> list[_Node]:
        """The nodes inside, the last first, as a stack wants them. Of too many, those alike in a row are one node."""
        nodes = list(self.children.values())
        if len(nodes) > MOST_OPEN and not self.alike:
            groups = itertools.groupby(nodes, key=lambda node: (node.stem, node.kind, node.tied))
            joined = [node for _, group in groups for node in _joined(list(group))]
            nodes = (
                joined if len(joined) > 1 or not self.name else nodes
            )  # a layer that has nothing else is their heading
        return nodes[::-1]

    @property
    def stem(self) -> str:
        """The name without the number at its end."""
        return self.name.rstrip("0123456789")


def _joined(nodes: list[_Node]) -> list[_Node]:
    """One node in the place of several that are alike."""
    first, last = nodes[0], nodes[-1]
    if len(nodes) < LEAST_ALIKE:
        return nodes
    joined = _Node(f"{first.name} … {last.name.removeprefix(last.stem) or last.name}")
    joined.kind = f"{len(nodes)} × {first.kind}" if first.kind else f"{len(nodes)} layers"
    joined.children = {node.name: node for node in nodes}
    joined.alike = True
    return [joined]


def weight_kind(weight: StoredWeight, facts: Facts) -> str:
    """Which of `KINDS` a weight is of."""
    if weight.state:
        return STATE
    if not facts.uses_of(weight):
        return UNUSED
    return UNKNOWN if weight.trainable is None else TRAINED if weight.trainable else FROZEN


def use_kind(use: UseOf, weight: StoredWeight) -> str:
    """Which of `KINDS` a use of a weight is of."""
    if weight.trainable is False:
        return FROZEN
    reaches = use.reaches(weight)
    if reaches is None:
        return UNKNOWN if weight.trainable is None else TRAINED
    return TRAINED if reaches else FROZEN_HERE


def kind_of_use(use: UseOf, facts: Facts) -> str:
    """Which of `KINDS` a use is of: it trains if it trains one of its weights. One without weights is a constant."""
    kinds = {use_kind(use, facts.weight(place)) for place in use.weights}
    return next((kind for kind in (TRAINED, FROZEN_HERE, UNKNOWN) if kind in kinds), FROZEN)


def rows_of(facts: Facts) -> list[MapRow]:
    """The rows, with those closed that would make the map too long to begin with."""
    shared = {weight.place for weight in facts.shared()}
    layers = list(_layers(facts, shared))
    rows: list[MapRow] = []
    if len(layers) > MOST_OPEN:
        _list(rows, SHARED, list(facts.shared()))
    first, drawn = len(rows), {weight.place for row in rows for weight in row.weights}
    for row in layers:
        row.end += first
        row.parent = None if row.parent is None else row.parent + first
        for place in row.use.weights if row.use else ():
            if place not in drawn:
                drawn.add(place)
                row.weights.append(facts.weight(place))
    rows += layers
    left = [weight for weight in facts.weights if weight.place not in drawn]
    _list(rows, UNUSED, [weight for weight in left if not weight.state])
    _list(rows, STATE, [weight for weight in left if weight.state])
    _close(rows, shared)
    return rows


def _list(rows: list[MapRow], name: str, weights: list[StoredWeight]) -> None:
    """Adds a heading with a row for each of some weights, if there are any."""
    if weights:
        heading = len(rows)
        rows.append(MapRow(name, 0, None, heading=True, path=name, end=heading + 1 + len(weights)))
        rows += [MapRow("", 1, heading, weights=[weight], end=heading + 2 + n) for n, weight in enumerate(weights)]


def _layers(facts: Facts, shared: set[str]) -> Iterator[MapRow]:
    root = _Node("")
    # The names in a file of another library's may be joined by dots.
    separator = "/" if facts.ties or any("/" in use.layer for use in facts.uses) else "."
    for path, kind in facts.layers:
        node = root.below(path.split(separator))
        node.kind = node.kind or kind
    for use in facts.uses:
        tied = use.tied or not shared.isdisjoint(use.weights)
        root.below(use.layer.split(separator), tied=tied).uses.append(use)
    count = 0
    open_headings: list[MapRow] = []
    todo: list[tuple[_Node, str, int | None] | None] = [(child, "", None) for child in root.inner()]
    while todo:
        entry = todo.pop()
        if entry is None:
            open_headings.pop().end = count
            continue
        node, before, parent = entry
        names = [node.name]
        while not node.uses and len(node.children) == 1:  # one row for `bidirectional/forward_layer`
            (node,) = node.children.values()
            names.append(node.name)
        name = separator.join(names) or facts.name
        heading = MapRow(name, len(open_headings), parent, kind=node.kind, heading=True, path=before + name)
        yield heading
        number, count = count, count + 1
        for use in node.uses:
            count += 1
            yield MapRow("", heading.depth + 1, number, use=use, end=count)
        open_headings.append(heading)
        todo.append(None)
        before = before if node.alike else f"{heading.path}{separator}"
        todo += [(child, before, number) for child in node.inner()]


# --------------------------------------------------------------------------- what is closed at first


def _close(rows: list[MapRow], shared: set[str]) -> None:
    """Closes headings so that about `MOST_OPEN` rows are left.

    Level by level, all headings are opened if there is room. If not, from there on those with ties are, as long as
    that shows no more than `MOST_OPEN` further rows; or only those where a shared weight is drawn. So twelve equal
    blocks are open or closed together, and ties are open in a model of a hundred.
    """
    ties, sharing = set[int](), set[int]()
    inside: dict[int | None, list[int]] = {}
    for number, row in enumerate(rows):
        row.closed = row.heading
        inside.setdefault(row.parent, []).append(number)
        draws_shared = any(weight.place in shared for weight in row.weights)
        tied = draws_shared or (row.use is not None and (row.use.tied or not shared.isdisjoint(row.use.weights)))
        above = row.parent
        while above is not None and tied:
            ties.add(above)
            if draws_shared:
                sharing.add(above)
            above = rows[above].parent
    level = list(inside.get(None, ()))
    all_are, room = True, MOST_OPEN - len(level)

    def more(headings: list[int]) -> int:
        return sum(len(inside.get(number, ())) for number in headings)

    while level:
        if all_are and more(level) > room:
            all_are, room = False, MOST_OPEN
        if not all_are:
            some = ([number for number in level if number in these] for these in (ties, sharing))
            level = next((headings for headings in some if more(headings) <= room), [])
        for number in level:
            rows[number].closed = False
        room -= more(level)
        level = [inner for number in level for inner in inside.get(number, ()) if rows[inner].heading]


# --------------------------------------------------------------------------- words
# The words of the map: sizes, names that fit, and the facts that are shown on hover.


MOST_LISTED = 8
"""Of more uses than these, the facts of a weight give the number."""
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")
"""Characters that would show the text around them in another order."""


def text(words: str) -> str:
    """Any words as text or as an attribute's value in XML and HTML."""
    return escape(_TURNS_TEXT.sub("�", _NOT_XML.sub("�", words)), {'"': "&quot;", "'": "&#39;"})


def shape(dimensions: Shape) -> str:
    """A shape for people: `784 × 64`."""
    return " × ".join(map(str, dimensions)) or "scalar"


def number(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 use`, `12 uses`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def fit_end(words: str, room: int) -> str:
    """The start of long words, then `…`."""
    return words if len(words) <= room else words[: room - 1].rstrip() + "…"


def fit_path(path: str, room: int) -> str:
    """The last parts of a long path, after `…/`."""
    if len(path) <= room:
        return path
    parts = path.split("/")
    for start in range(1, len(parts)):
        short = "…/" + "/".join(parts[start:])
        if len(short) <= room:
            return short
    return "…" + path[len(path) - room + 1 :]


def name_of(weight: StoredWeight) -> str:
    """A weight's name: its variable's path, or its place in the file."""
    return weight.path or weight.place


def attribute_of(use: UseOf) -> str:
    """The layer's name for what it reads; a file may know no more than a number."""
    if use.attribute:
        return use.attribute
    return "/".join(use.weights[0].split("/")[-2:]) if use.weights else "?"


def weight_facts(weight: StoredWeight, facts: Facts, kind: str) -> list[str]:
    """What the map says of a weight, line by line. The first is what is searched, here and in those of a use."""
    uses = facts.uses_of(weight)
    lines = [
        name_of(weight),
        f"{shape(weight.shape)}, {weight.dtype}, {human_bytes(weight.bytes)}",
        kind + (f", shared by {number(len(uses), 'use')}" if len(uses) > 1 else ""),
    ]
    lines += [f"read by {_reading(use)}" for use in uses[:MOST_LISTED]]
    if len(uses) > MOST_LISTED:
        lines.append(f"and {len(uses) - MOST_LISTED:,} more")
    slots = facts.slots_of(weight)
    if slots:
        names = ", ".join(slot.name or "?" for slot in slots)
        lines.append(f"optimizer: {names}, {human_bytes(sum(slot.bytes for slot in slots))}")
    lines.append(f"stored at {weight.place}" + (f", again at {', '.join(weight.again)}" if weight.again else ""))
    return lines


def use_facts(use: UseOf, kinds: list[tuple[str, str]]) -> list[str]:
    """What the map says of a use; `kinds` are its weights' names and how each is used."""
    return [
        _reading(use) + (f" ({use.kind})" if use.kind else ""),
        f"{shape(use.shape)}, {use.dtype}, {human_bytes(use.bytes)}" + (" if it were stored" if use.tied else ""),
        *(f"reads {name}: {kind}" for name, kind in kinds),
    ]


def _reading(use: UseOf) -> str:
    return f"{use.layer}/{attribute_of(use)}" + (f" = {use.expression}" if use.expression else "")


# --------------------------------------------------------------------------- measures
# The widths of the drawing, and how colours are called in its styles.


LEFT, BAR, RIGHT = 208, 36, 292
"""The widths of the weights' names, of a weight, and of the layers' column."""
BAR_OF_USE = 10
STEP, MOST_STEPS = 13, 6
"""How far a layer inside another is moved in, and how often at most."""
WIDTH, NARROWEST, WIDEST = 960, 720, 1400
"""Of the static drawing; that of the page is as wide as its window, between the others. In a narrower window the map
has its narrow form: no names of weights on the left, and more is said on the right."""
LEAST_NARROW, NARROW_BAR = 340, 18
"""The width of the narrowest map, and of a weight in it."""
MIDDLE = WIDTH - LEFT - BAR - RIGHT
"""The width of the ribbons, in the static drawing."""
RIBBON = "M0 {a}CX {a} X {c} W {c}V{d}CX {d} X {b} 0 {b}Z".replace("X", f"{MIDDLE // 2}").replace("W", f"{MIDDLE}")
"""The outline of a ribbon: from `a` to `b` on the side of its weight, from `c` to `d` on that of its use."""
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


# --------------------------------------------------------------------------- layout
# Where everything is on the map. All of it is computed here. When a layer is closed in the page, its script adds up the
# heights of the rows that are then open, which the drawing says, and moves each row to its place.
#
# Each row has a height when it is open and one when it is closed: that of a closed layer is that of the stack of what
# is in it, that of another row is its share of the stack. What is solid is to scale, in both.


TALL, TALLEST = 380.0, 190.0
"""All that layers read is drawn so tall, unless one weight would be taller than the second."""
MOST_A_BYTE = 0.5
"""Pixels a byte in a tiny model."""
HEADING, LINE = 20.0, 18.0
"""The heights of a heading and of the smallest open row."""
HAIR = 1.0
"""What is solid is never less than this, or half of it in a closed layer; less if there are so many weights that their
hairlines would be the most of the map."""
GAP = 2.0
"""Between weights that are drawn at one row."""
ABOVE = 4.0
"""Above a heading."""


@dataclass(frozen=True)
class Heights:
    """Heights of something that is drawn, open and closed."""

    open: float
    closed: float

    def of(self, closed: bool) -> float:
        """One of them."""
        return self.closed if closed else self.open


@dataclass(frozen=True)
class ByteScale:
    """How high bytes are drawn."""

    of_byte: float
    """Pixels a byte."""
    hair: float
    """The least height in a closed layer."""

    def solid(self, count: int) -> Heights:
        """The heights of so many bytes."""
        return Heights(max(count * self.of_byte, HAIR), max(count * self.of_byte, self.hair))


def scale_of(facts: Facts) -> ByteScale:
    """The scale on which the facts are drawn."""
    largest = max(0, *(weight.bytes for weight in facts.weights), *(use.bytes for use in facts.uses))
    of_byte = min(TALL / max(facts.unshared_bytes, 1), TALLEST / max(largest, 1), MOST_A_BYTE)
    many = max(len(facts.weights), len(facts.uses), 1)
    return ByteScale(of_byte, max(min(HAIR / 2, TALL / 2 / many), 0.01))


def box(solid: Heights) -> Heights:
    """The heights of a weight with the room for its name."""
    return Heights(max(solid.open, LINE), solid.closed)


def heights_of(rows: Sequence[MapRow], scale: ByteScale) -> tuple[list[Heights], list[float]]:
    """The heights of each row, and for a heading that of the stack that it is when it is closed.

    A use is beside the weights that are drawn at it.
    """
    heights, stacks = [], [0.0]
    for row in rows:
        boxes = [box(scale.solid(weight.bytes)) for weight in row.weights]
        use = scale.solid(row.use.bytes) if row.use else Heights(0.0, 0.0)
        heights.append(
            Heights(
                max(sum(each.open for each in boxes) + GAP * (len(boxes) - 1), use.open, LINE),
                max(sum(each.closed for each in boxes), use.closed),
            )
        )
        stacks.append(stacks[-1] + heights[-1].closed)
    stack = [stacks[row.end] - stacks[number + 1] for number, row in enumerate(rows)]
    for number, row in enumerate(rows):
        if row.heading:
            heights[number] = Heights(HEADING, max(HEADING, stack[number]))
    return heights, stack


@dataclass(frozen=True)
class Spot:
    """Where on the map a row stands."""

    top: float
    height: float
    stripe: bool
    """Whether it is a stripe of a closed layer."""


def spots_of(
    rows: Sequence[MapRow], heights: Sequence[Heights], stacks: Sequence[float], top: float
) -> tuple[list[Spot], float]:
    """The place of each row, and where the last ends."""
    places: list[Spot] = []
    y, number = top, 0
    while number < len(rows):
        row = rows[number]
        y += ABOVE if row.heading else 0.0
        height = heights[number].of(row.closed)
        places.append(Spot(y, height, False))
        number += 1
        if row.closed:
            at = y + (height - stacks[number - 1]) / 2
            for inner in range(number, row.end):
                share = 0.0 if rows[inner].heading else heights[inner].closed
                places.append(Spot(at, share, True))
                at += share
            number = row.end
        y += height
    return places, y

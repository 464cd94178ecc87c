"""What the map shows, row by row: the layers as headings, one inside the other, and under each what it reads.

A weight is drawn at the row that reads it first. Weights that no layer reads have rows of their own at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tether.inspection.facts import Facts, StoredWeight, UseOf

MOST_OPEN = 34
"""Layers are opened at first as long as the map has no more rows than these."""

TRAINED, FROZEN, FROZEN_HERE, UNUSED, STATE, UNKNOWN = KINDS = (
    "trained",
    "frozen",
    "frozen for this use",
    "read by no layer",
    "state",
    "trained or frozen: the file does not say",
)


@dataclass
class Row:
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

    def below(self, names: list[str]) -> _Node:
        """The node that names lead to."""
        node = self
        for name in names:
            node = node.children.setdefault(name, _Node(name))
        return node

    def inner(self) -> list[_Node]:
        """The nodes inside, the last first, as a stack wants them."""
        return list(reversed(self.children.values()))


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


def kind_of(use: UseOf, facts: Facts) -> str:
    """Which of `KINDS` a use is of: it trains if it trains one of its weights. One without weights is a constant."""
    kinds = {use_kind(use, facts.weight(place)) for place in use.weights}
    return next((kind for kind in (TRAINED, FROZEN_HERE, UNKNOWN) if kind in kinds), FROZEN)


def rows_of(facts: Facts) -> list[Row]:
    """The rows, with those closed that would make the map too long to begin with."""
    rows = list(_layers(facts))
    drawn: set[str] = set()
    for row in rows:
        for place in row.use.weights if row.use else ():
            if place not in drawn:
                drawn.add(place)
                row.weights.append(facts.weight(place))
    left = [weight for weight in facts.weights if weight.place not in drawn]
    for name, group in ((UNUSED, [w for w in left if not w.state]), (STATE, [w for w in left if w.state])):
        if group:
            heading = len(rows)
            rows.append(Row(name, 0, None, heading=True, end=heading + 1 + len(group)))
            rows += [Row("", 1, heading, weights=[weight], end=heading + 2 + n) for n, weight in enumerate(group)]
    _close(rows, {weight.place for weight in facts.shared()})
    return rows


def _layers(facts: Facts) -> Iterator[Row]:
    root = _Node("")
    # The names in a file of another library's may be joined by dots.
    separator = "/" if facts.ties or any("/" in use.layer for use in facts.uses) else "."
    for path, kind in facts.layers:
        node = root.below(path.split(separator))
        node.kind = node.kind or kind
    for use in facts.uses:
        root.below(use.layer.split(separator)).uses.append(use)
    count = 0
    open_headings: list[Row] = []
    todo: list[tuple[_Node, Row | None, int | None] | None] = [(child, None, None) for child in root.inner()]
    while todo:
        entry = todo.pop()
        if entry is None:
            open_headings.pop().end = count
            continue
        node, above, parent = entry
        names = [node.name]
        while not node.uses and len(node.children) == 1:  # one row for `bidirectional/forward_layer`
            (node,) = node.children.values()
            names.append(node.name)
        name = separator.join(names) or facts.name
        path, depth = (f"{above.path}{separator}{name}", above.depth + 1) if above else (name, 0)
        heading = Row(name, depth, parent, kind=node.kind, heading=True, path=path)
        yield heading
        number, count = count, count + 1
        for use in node.uses:
            count += 1
            yield Row("", depth + 1, number, use=use, end=count)
        open_headings.append(heading)
        todo.append(None)
        todo += [(child, heading, number) for child in node.inner()]


# --------------------------------------------------------------------------- what is closed at first


def _close(rows: list[Row], shared: set[str]) -> None:
    """Closes headings so that about `MOST_OPEN` rows are left.

    Level by level, all headings are opened if there is room; if not, those with ties; if not, those where a shared
    weight is drawn. So twelve equal blocks are open or closed together.
    """
    ties, sharing = set[int](), set[int]()
    inside: dict[int | None, list[int]] = {}
    for number, row in enumerate(rows):
        row.closed = row.heading
        inside.setdefault(row.parent, []).append(number)
        tied = row.use is not None and (row.use.tied or not shared.isdisjoint(row.use.weights))
        draws_shared = any(weight.place in shared for weight in row.weights)
        above = row.parent
        while above is not None and (tied or draws_shared):
            if tied:
                ties.add(above)
            if draws_shared:
                sharing.add(above)
            above = rows[above].parent
    level = list(inside.get(None, ()))
    shown = len(level)
    while level:
        for chosen in (level, [n for n in level if n in ties], [n for n in level if n in sharing]):
            more = sum(len(inside.get(number, ())) for number in chosen)
            if chosen and shown + more <= MOST_OPEN:
                break
        else:
            return
        for number in chosen:
            rows[number].closed = False
        shown += more
        level = [inner for number in chosen for inner in inside.get(number, ()) if rows[inner].heading]

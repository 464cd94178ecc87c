"""The words of the map: sizes, names that fit, and the facts that are shown on hover."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

from tether.inspection.facts import Facts, Shape, StoredWeight, UseOf
from tether.inspection.sizes import human_bytes

MOST_LISTED = 8
"""Of more uses than these, the facts of a weight give the number."""
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TURNS_TEXT = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")
"""Characters that would show the text around them in another order."""


def text(words: str) -> str:
    """Any words as text or as an attribute's value in XML and HTML."""
    return escape(_TURNS_TEXT.sub("�", _NOT_XML.sub("�", words)), {'"': "&quot;", "'": "&#39;"})


def shape(dimensions: Shape) -> str:
    """`784 × 64`."""
    return " × ".join(map(str, dimensions)) or "scalar"


def number(count: int, one: str, many: str | None = None) -> str:
    """`1 use`, `12 uses`."""
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

"""A map as a whole file: a page that needs nothing else, or a drawing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from string import Template

from tether.inspection.facts import Facts, human_bytes
from tether.inspection.plotting import layout
from tether.inspection.plotting.drawing import draw
from tether.inspection.plotting.layout import (
    ABOVE,
    BAR,
    BELOW,
    CODE,
    HEADING,
    LEAST_NARROW,
    LEFT,
    MIDDLE,
    NARROW_BAR,
    NARROWEST,
    RIBBON,
    RIGHT,
    WIDEST,
    WIDTH,
    text,
)

MARGIN = 24


def page(whole: Facts, shown: Facts, title: str) -> str:
    """The map as one HTML file. Its policy lets it load nothing and run no script but its own.

    Args:
        whole: What the totals are of.
        shown: What is drawn of it.
        title: What it says on top.
    """
    drawing = draw(shown)
    totals = totals_of(whole, shown)
    style, script = _file("map.css") + _file("page.css"), _file("map.js")
    sizes = {
        "left": LEFT, "bar": BAR, "narrow-bar": NARROW_BAR, "right": RIGHT, "middle": MIDDLE, "heading": HEADING,
        "above": ABOVE, "below": BELOW, "top": drawing.tops[0], "narrow-top": drawing.tops[1],
        "least": NARROWEST, "least-narrow": LEAST_NARROW, "most": WIDEST, "letter": CODE,
    }  # fmt: skip
    return Template(_file("page.html")).substitute(
        title=text(title),
        description=text(_description(shown, title, totals)),
        totals="\n".join(
            f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>" for name, value, note in totals
        ),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        width=WIDTH,
        height=drawing.height,
        sizes=" ".join(f'data-{name}="{value:g}"' for name, value in sizes.items()),
        ribbon=RIBBON,
        map=drawing.svg,
    )


def image(whole: Facts, shown: Facts, title: str) -> str:
    """The map as one SVG file. The arguments are those of `page`."""
    drawing = draw(shown, top=84)
    totals = totals_of(whole, shown)
    width, height = WIDTH + 2 * MARGIN, drawing.height + MARGIN
    frame = f'x="{-MARGIN}" y="{-MARGIN // 2}" width="{width}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" width="{width}" height="{height:g}" '
        f'viewBox="{-MARGIN} {-MARGIN // 2} {width} {height:g}" role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{text(title)}</title>\n<desc id="desc">{text(_description(shown, title, totals))}</desc>\n'
        f'<style>{_file("map.css")}</style>\n<rect class="paper" {frame}/>\n'
        f'<text class="head" y="16">{text(layout.fit_end(title, 84))}</text>\n'
        f"{_totals(totals)}\n{drawing.svg}\n</svg>\n"
    )


Total = tuple[str, str, str]
"""What of, how much, and a word on it."""


def _totals(totals: Sequence[Total]) -> str:
    """The totals as text of a drawing."""
    return "\n".join(
        f'<g transform="translate({number * WIDTH // max(len(totals), 4)},44)"><text class="note">{name}</text>'
        f'<text class="total" y="20">{value}<tspan class="note" dx="6">{note}</tspan></text></g>'
        for number, (name, value, note) in enumerate(totals)
    )


def totals_of(facts: Facts, shown: Facts) -> list[Total]:
    """The totals of facts, and of what of them is not shown."""
    shared = sum(1 for _ in facts.shared())
    note = layout.number(len(facts.weights), "weight") + (f", {shared:,} shared" if shared else "")
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
    if hidden := len(facts.weights) - len(shown.weights):
        size = human_bytes(facts.stored_bytes - shown.stored_bytes)
        found.append(("not drawn", size, f"{layout.number(hidden, 'weight')} not shared"))
    return found


def _description(facts: Facts, title: str, totals: Sequence[Total]) -> str:
    said = ", ".join(f"{name} {value}" for name, value, _ in totals)
    weights, layers = layout.number(len(facts.weights), "stored weight"), layout.number(len(facts.layers), "layer")
    return (
        f"{title}: {said}. On the left are {weights}, as high as their bytes; "
        f"on the right {layers}, in the order of the model. "
        f"A ribbon is one of {layout.number(len(facts.uses), 'use')}."
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

"""Draws the rooms of the package and which of them imports which: `python scripts/draw_house.py` writes docs/house.svg.

A room is a folder of `src/tether`, or a module of its own there. Its height in the picture is its place in the order of
imports (`pyproject.toml`): what is below knows nothing of what is above. An arrow that others imply is left out.
"""

import re
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from check_circles import imported, modules

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/house.svg"
WIDTH, BOX, GAP, LINE = 940, 46, 34, 17
INSIDE = {
    "layers": ("tying", "records", "family"),
    "files": ("keras", "tensors", "loading", "exporting", "publishing"),
    "weights": ("operators",),
    "inspection": ("checking", "plotting"),
}
"""The folders of a room that are named in its box."""


def rows() -> list[list[str]]:
    """The rooms, from the top of the order of imports to its bottom."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    lines = next(contract["layers"] for contract in contracts if contract["id"] == "direction")
    return [[name.strip(" ()").removeprefix("tether.") for name in line.split("|")] for line in lines]


def read() -> tuple[dict[str, tuple[int, int]], dict[str, set[str]]]:
    """Of each room the number of files and lines, and the rooms that it imports."""
    import ast

    paths = modules(ROOT / "src")
    sizes: dict[str, tuple[int, int]] = {}
    arrows: dict[str, set[str]] = {}
    for name, path in paths.items():
        room = room_of(name)
        text = path.read_text()
        files, lines = sizes.get(room, (0, 0))
        sizes[room] = (files + 1, lines + text.count("\n"))
        arrows.setdefault(room, set()).update(room_of(each) for each in imported(ast.parse(text), set(paths)))
    return sizes, {room: found - {room} for room, found in arrows.items()}


def room_of(module: str) -> str:
    """The room of a module, by dotted names."""
    parts = module.split(".")
    return parts[0] if parts[0] != "tether" or len(parts) == 1 else parts[1]


def needed(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no others imply."""

    def reached(room: str) -> set[str]:
        found, waiting = set(), list(arrows.get(room, ()))
        while waiting:
            each = waiting.pop()
            if each not in found:
                found.add(each)
                waiting += arrows.get(each, ())
        return found

    return [
        (room, other)
        for room, others in sorted(arrows.items())
        for other in sorted(others)
        if not any(other in reached(between) for between in others - {other})
    ]


def draw() -> str:
    """The picture."""
    sizes, arrows = read()
    shown = [[room for room in row if room in sizes] for row in rows()]
    shown = [row for row in shown if row]
    boxes: dict[str, tuple[float, float, float, float]] = {}
    y = 20.0
    for row in shown:
        height = BOX + LINE * max(bool(INSIDE.get(room)) for room in row)
        width = (300.0, 240.0, 200.0, 170.0)[len(row) - 1]
        left = (WIDTH - len(row) * width - (len(row) - 1) * 60) / 2
        for place, room in enumerate(row):
            boxes[room] = (left + place * (width + 60), y, width, height)
        y += height + GAP
    arrows = {room: found & set(boxes) for room, found in arrows.items() if room in boxes}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" font-family="sans-serif"'
        ' font-size="13">',
        "<title>The rooms of Tether, and which imports which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#fff"/>',
    ]
    order = [room for row in shown for room in row]
    for number, (room, other) in enumerate(needed(arrows)):
        x, top, width, height = boxes[room]
        to_x, to_top, to_width, _ = boxes[other]
        skips = order.index(other) - order.index(room) > 2
        start, end = x + width / 2, to_x + to_width / 2
        if skips:  # around the boxes between
            side = 1 if number % 2 else -1
            start, end = x + (width if side > 0 else 0), to_x + (to_width if side > 0 else 0)
            out = (WIDTH - 30 - 12 * (number % 5)) if side > 0 else 30 + 12 * (number % 5)
            high, low = f"{top + height / 2:.0f}", f"{to_top + 20:.0f}"
            path = f"M{start:.0f} {high} C{out} {high} {out} {low} {end:.0f} {low}"
        else:
            path = f"M{start:.0f} {top + height:.0f} L{end:.0f} {to_top:.0f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#667" marker-end="url(#tip)"/>')
    for room, (x, top, width, height) in boxes.items():
        files, lines = sizes[room]
        middle = x + width / 2
        count = f"{files} file{'s' * (files > 1)}, {round(lines, -2) or lines:,} lines"
        inside = " · ".join(INSIDE.get(room, ()))
        parts += [
            f'<rect x="{x:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height}" rx="6" fill="#eef3fa"/>',
            f'<text x="{middle:.0f}" y="{top + 19:.0f}" text-anchor="middle" font-weight="bold">{room}</text>',
            f'<text x="{middle:.0f}" y="{top + 36:.0f}" text-anchor="middle" fill="#445">{count}</text>',
        ]
        if inside:
            parts.append(f'<text x="{middle:.0f}" y="{top + 53:.0f}" text-anchor="middle" fill="#445">{inside}</text>')
    return "\n".join([*parts, "</svg>", ""])


def rooms_and_arrows(picture: str) -> str:
    """A picture without its numbers of files and lines, which every commit changes."""
    return re.sub(r"\d+ files?, [\d,]+ lines", "", picture)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print("written:", PICTURE.relative_to(ROOT))

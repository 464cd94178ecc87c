"""Rows of text in columns, or one under the other where columns have no room. What is long is folded, never cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

NARROWEST = 20
"""The fewest cells of a terminal that rows are laid out for."""

GAP = 2
LEAST_NAME, MOST_CELL = 28, 24
"""How wide the first column must be able to get, and how wide another one may."""

Piece = tuple[str, str]
"""Text and its style; an empty style is the terminal's own."""
Line = list[Piece]


@dataclass(frozen=True)
class Column:
    """A further column: its title, whether it holds numbers, and what a cell is called where it stands by itself."""

    title: str
    number: bool = False
    label: str = ""


@dataclass(frozen=True)
class Row:
    """One row: its name, a note on it, and a cell for each column."""

    name: Piece
    cells: tuple[Piece, ...]
    note: str = ""
    level: int = 0
    """How far it is indented: what a row is about stands above it, less far."""

    @property
    def whole(self) -> str:
        """The name with the note."""
        return f"{self.name[0]} {self.note}" if self.note else self.name[0]


def literal(text: str, encoding: str = "utf-8") -> str:
    """Text that is shown as it is: what would steer a terminal, or what its encoding lacks, is spelled out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def fold(text: str, width: int, hang: int = 0) -> list[str]:
    """Lines of at most `width` cells, those after the first indented by `hang`.

    They are broken after a space or a slash where that leaves no line too short, else wherever they must.
    """
    found: list[str] = []
    room = width
    while cell_len(text) > room:
        end, good, cells = 0, 0, 0
        for end, character in enumerate(text):
            cells += cell_len(character)
            if cells > room:
                break
            good = end + 1 if character in " /" else good
        cut = good if good > room // 3 else max(end, 1)
        found.append(text[:cut].rstrip(" "))
        text, room = text[cut:].lstrip(" "), max(width - hang, 1)
    found.append(text)
    return [part if not number else " " * hang + part for number, part in enumerate(found)]


def lay_out(title: str, columns: Sequence[Column], rows: Sequence[Row], width: int) -> Iterator[Line]:
    """The rows in lines of at most `width` cells: in columns if those leave enough room for the names."""
    header = Row((title, "bold"), tuple((column.title, "bold") for column in columns))
    widths = [
        min(max(cell_len(row.cells[place][0]) for row in (header, *rows)), MOST_CELL) for place in range(len(columns))
    ]
    wanted = max(cell_len(row.whole) + 2 * row.level for row in (header, *rows))
    name = min(wanted, width - sum(widths) - GAP * len(widths))
    if name < min(wanted, LEAST_NAME):
        for row in rows:
            yield from _stacked(columns, row, width)
        return
    yield from _in_columns(columns, header, [name, *widths])
    yield [("-" * (name + sum(widths) + GAP * len(widths)), "dim")]
    for row in rows:
        yield from _in_columns(columns, row, [name, *widths])


def _named(row: Row, width: int) -> list[Line]:
    """The name and the note: on one line if there is room."""
    text, style = row.name
    indent = " " * 2 * row.level
    room = width - len(indent)
    if row.note and cell_len(row.whole) <= room:
        return [[(indent + text, style), (f" {row.note}", "cyan")]]
    named: list[Line] = [[(indent + part, style)] for part in fold(text, room, hang=2)]
    notes: list[Line] = [[(f"{indent}  {part}", "cyan")] for part in fold(row.note, room - 2)] if row.note else []
    return named + notes


def _in_columns(columns: Sequence[Column], row: Row, widths: list[int]) -> Iterator[Line]:
    named = _named(row, widths[0])
    cells = [fold(text, width) for (text, _), width in zip(row.cells, widths[1:], strict=True)]
    for number in range(max(len(named), *map(len, cells))):
        line = list(named[number]) if number < len(named) else []
        missing = widths[0] - sum(cell_len(text) for text, _ in line)
        for column, parts, width, (_, style) in zip(columns, cells, widths[1:], row.cells, strict=True):
            text = parts[number] if number < len(parts) else ""
            left = width - cell_len(text) if column.number else 0
            if text:
                line += [(" " * (missing + GAP + left), ""), (text, style)]
                missing = width - left - cell_len(text)
            else:
                missing += GAP + width
        yield line


def _stacked(columns: Sequence[Column], row: Row, width: int) -> Iterator[Line]:
    yield from _named(row, width)
    said = [f"{c.label} {text}" if c.label else text for c, (text, _) in zip(columns, row.cells, strict=True) if text]
    if said:
        indent = " " * (2 * row.level + 4 - 2 * bool(row.level))
        yield from ([(indent + part, "dim")] for part in fold(", ".join(said), width - len(indent)))

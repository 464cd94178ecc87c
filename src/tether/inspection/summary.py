"""What a model stores, who reads it and how, and what sharing saves: as text, and as a table in notebooks."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from rich.cells import cell_len

from tether.errors import TetherError, received
from tether.inspection.collect import count_of
from tether.inspection.collect import facts as facts_of
from tether.inspection.facts import AdapterOf, Facts, StoredWeight, UseOf, human_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 100
"""Columns of plain text where there is no terminal that has a width."""

TITLE = "weight, and what reads it"
ADAPTERS_TITLE = "adapter"
_STYLES = {"trained": "green", "frozen": "blue", "?": "dim"}


def summary(
    source: object,
    *,
    shared_only: bool = False,
    adapters: bool = False,
    width: int | None = None,
    print_fn: Callable[[str], object] | None = None,
) -> Summary:
    """Prints what a model stores: each weight once, under it the uses, and what sharing saves.

    In a notebook nothing is printed: the summary is a table when it is the last thing in a cell.

    Args:
        source: A model or layer, the path of a `.keras`, `.weights.h5` or `.safetensors` file, or facts. A file is
            read without making the model; no value is read.
        shared_only: Whether to leave out weights that have one use, by the layer that owns them. Adapters are one line
            then: a base under them that nobody else reads has one use.
        adapters: Whether to list the adapters (`tether.adapters`) instead of the weights: their strengths, ranks, how
            many weights they change, what they have to train, and whether they do.
        width: The columns of the text; left out, those of the terminal, or 100 where there is none.
        print_fn: What to call with each line instead of printing.

    Returns:
        The summary: `.facts`, and `str(summary)` is the plain text.

    Raises:
        TetherError: There are no facts of such a thing, or too narrow a width.
        FileNotFoundError: There is no such file.

    Example:
    ```python
    model.save("model.keras")
    tether.summary(model)
    tether.summary("model.keras", shared_only=True)
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)})
    tether.summary(model, adapters=True)
    ```
    """
    if width is not None and width < NARROWEST:
        raise TetherError(f"The width is a number of columns, {NARROWEST} or more. {received(width=width)}")
    if print_fn is not None and not callable(print_fn):
        raise TetherError(f"`print_fn` is called with each line of text. {received(print_fn=print_fn)}")
    found = Summary(facts_of(source), shared_only=shared_only, adapters=adapters, width=width)
    if print_fn is not None:
        for line in str(found).splitlines():
            print_fn(line)
    elif not _shows_results():
        from rich.console import Console

        console = Console(width=width)
        if width is None and not console.is_terminal and not os.environ.get("COLUMNS"):
            console = Console(width=WIDTH)
        console.print(found)
    return found


class Summary:
    """The summary of some facts: prints as text, and is a table in a notebook.

    Attributes:
        facts: What it is a view of.
    """

    def __init__(
        self, facts: Facts, *, shared_only: bool = False, adapters: bool = False, width: int | None = None
    ) -> None:
        self.facts = facts
        self._shared_only = shared_only
        self._adapters = adapters
        self._width = width

    # ------------------------------------------------------------------ what it says

    @property
    def _title(self) -> str:
        return ADAPTERS_TITLE if self._adapters else TITLE

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        """The columns after the first."""
        if self._adapters:
            return ADAPTER_COLUMNS
        kept = (Column("optimizer", number=True, label="optimizer"),) if self._slots_are_known else ()
        return (Column("shape"), Column("dtype"), Column("bytes", number=True), Column("trains"), *kept)

    @cached_property
    def _slots_are_known(self) -> bool:
        """Whether the facts tell for which weight the optimizer keeps what."""
        return any(slot.weight is not None for slot in self.facts.optimizer)

    @cached_property
    def _rows(self) -> tuple[SummaryRow, ...]:
        """A row for each weight, under it those of its uses; one row for a weight that only its layer reads.

        Or a row for each adapter.
        """
        if self._adapters:
            return tuple(map(_row_of_adapter, self.facts.adapters))
        names = Counter(map(self._name, self.facts.weights))
        return tuple(row for weight in self._listed for row in self._rows_of(weight, names))

    @cached_property
    def _listed(self) -> tuple[StoredWeight, ...]:
        return tuple(w for w in self.facts.weights if not self._shared_only or self.facts.is_shared_or_combined(w))

    @cached_property
    def _shared(self) -> frozenset[StoredWeight]:
        return frozenset(self.facts.shared())

    def _name(self, weight: StoredWeight) -> str:
        """The path, or in a file that has none the names of the layers and the entry."""
        if weight.path is not None:
            return weight.path
        layers = {use.where for use in self.facts.uses_of(weight) if use.layer}
        entry = weight.place.rpartition("vars/")[1:]
        return "/".join((*layers, "".join(entry))) if len(layers) == 1 and all(entry) else weight.place

    def _rows_of(self, weight: StoredWeight, names: Counter[str]) -> Iterator[SummaryRow]:
        uses = self.facts.uses_of(weight)
        name = self._name(weight)
        kept = sum(slot.bytes for slot in self.facts.slots_of(weight))
        trains = "state" if weight.state else _trains(weight.trainable)
        cells = [
            (str(weight.shape), ""), (weight.dtype, ""), (human_bytes(weight.bytes), ""),
            (trains, _STYLES.get(trains, "")),
        ]  # fmt: skip
        if self._slots_are_known:
            cells.append((human_bytes(kept) if kept else "", ""))
        note = ""
        if len(uses) > 1:
            note = f"({'shared' if weight in self._shared else 'read'} by {len(uses)} uses)"
        if not uses and not weight.state and self.facts.ties:
            note = "(not used)"
        yield SummaryRow((name, "bold" if note else ""), tuple(cells), note)
        blank = [("", "")] * (len(cells) - 4)
        for place in weight.again:
            yield SummaryRow((f"stored again at {place}", "yellow"), (("", ""),) * len(cells), level=1)
        if self.facts.is_plain(weight) and names[name] == 1:
            return
        for use in uses:
            trains = _trains(use.reaches(weight))
            yield SummaryRow(
                (_equation(use), ""),
                (
                    (str(use.shape) if use.shape != weight.shape else "", ""),
                    (use.dtype if use.dtype != weight.dtype else "", ""),
                    ("", ""),
                    (trains, _STYLES.get(trains, "")),
                    *blank,
                ),
                level=1,
            )

    @cached_property
    def _totals(self) -> tuple[tuple[str, str, str], ...]:
        """What is stored, what it would take unshared, what that saves, and what an optimizer keeps."""
        facts = self.facts
        weights = [weight for weight in facts.weights if not weight.state]
        shared = [len(facts.uses_of(weight)) for weight in self._shared]
        numbers = count_of(facts)
        held = f"{_count(len(weights), 'weight')}, {_count(numbers.total, 'parameter')}"
        if weights and numbers.trained is not None:
            held += f" ({numbers.trained:,} trained, {numbers.frozen:,} frozen)"
        if state := len(facts.weights) - len(weights):
            held += f", {_count(state, 'entry')} of state"
        found = [("stored", human_bytes(facts.stored_bytes), held)]
        if facts.adapters:
            size = sum(weight.bytes for weight in facts.of_adapters())
            found.append(("adapters", human_bytes(size), _of_adapters(facts.adapters)))
        if facts.ties:
            saved = facts.unshared_bytes - facts.stored_bytes
            found.append(("unshared", human_bytes(facts.unshared_bytes), "if every use were a variable of its layer"))
            found.append(("saved", human_bytes(saved), _saving(saved, facts.unshared_bytes, shared)))
        if facts.optimizer:
            found.append(("optimizer", human_bytes(facts.optimizer_bytes), _count(len(facts.optimizer), "variable")))
        return tuple(found)

    @cached_property
    def _notes(self) -> tuple[str, ...]:
        """What a reader has to know of what is not said."""
        facts, listed, found = self.facts, set(self._listed), []
        if self._adapters:
            if not facts.adapters:
                return (f"There are no adapters on {facts.name!r}, or they are merged.",)
            unknown = any(adapter.strength is None or adapter.trains is None for adapter in facts.adapters)
            return ("?: the file is read without its values; the model has them.",) if unknown else ()
        listed.update(facts.of_adapters())
        if hidden := [weight for weight in facts.weights if weight not in listed]:
            size = human_bytes(sum(weight.bytes for weight in hidden))
            found.append(f"{_count(len(hidden), 'weight')} with no use but the layer's own ({size}) not listed.")
        if not facts.weights:
            found.append("No weights: a model or layer that is not built has none yet. Call it on data, or build it.")
        if not facts.ties:
            found.append(
                "This file does not tell of every use of its weights, so nothing is said of what sharing saves. "
                "The model does."
            )
        if any(cell[0] == "?" for row in self._rows for cell in row.cells) or any(
            use.expression is not None and use.attribute is None for use in facts.uses
        ):
            found.append("?: the file does not say.")
        return tuple(found)

    # ------------------------------------------------------------------ as text

    def _lines(self, width: int, encoding: str = "utf-8") -> Iterator[Line]:
        def shown(piece: Piece) -> Piece:
            return literal(piece[0], encoding), piece[1]

        rows = [SummaryRow(shown(row.name), tuple(map(shown, row.cells)), row.note, row.level) for row in self._rows]
        yield from ([(part, "bold")] for part in fold(literal(self.facts.name, encoding), width))
        yield []
        if rows:
            yield from lay_out(self._title, self._columns, rows, width)
            yield []
        label, number = (max(len(total[place]) for total in self._totals) for place in (0, 1))
        start = label + number + 4
        beside = width - start >= LEAST_NAME
        for name, size, words in self._totals:
            parts = fold(words, width - start if beside else width - 2)
            first = [(f"  {parts.pop(0)}", "")] if beside else []
            yield [(f"{name:<{label}}  {size:>{number}}", "bold"), *first]
            yield from ([(" " * (start if beside else 2) + part, "")] for part in parts)
        for note in self._notes:
            yield from ([(part, "dim")] for part in fold(note, width))

    def __str__(self) -> str:
        lines = self._lines(self._width or WIDTH)
        return "\n".join("".join(text for text, _ in line).rstrip(" ") for line in lines)

    def __repr__(self) -> str:
        return f"<Summary of {self.facts.name!r}: {', '.join(f'{size} {name}' for name, size, _ in self._totals)}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = max(min(options.max_width, self._width or options.max_width), NARROWEST)
        for line in self._lines(width, options.encoding):
            yield Text.assemble(*line, no_wrap=True, overflow="ignore")

    def _repr_html_(self) -> str:

        return as_html(self.facts.name, self._title, self._columns, self._rows, self._totals, self._notes)


def _equation(use: UseOf) -> str:
    if use.expression is None:
        return use.where
    return f"{use.where if use.attribute is not None else f'{use.layer}/?'} = {use.expression}"


def _trains(flag: bool | None) -> str:
    return "?" if flag is None else "trained" if flag else "frozen"


def _row_of_adapter(adapter: AdapterOf) -> SummaryRow:
    ranks = sorted({*adapter.ranks[:1], *adapter.ranks[-1:]})
    trains = _trains(adapter.trains)
    cells = (
        "?" if adapter.strength is None else f"{adapter.strength:g}",
        " to ".join(map(str, ranks)),
        _count(len(adapter.changes), "weight"),
        f"{adapter.numbers:,}",
        human_bytes(adapter.bytes),
    )
    return SummaryRow((adapter.name, "bold"), (*((cell, "") for cell in cells), (trains, _STYLES.get(trains, ""))))


def _of_adapters(adapters: Sequence[AdapterOf]) -> str:
    """What there is of adapters, in one line."""
    changed = {where for adapter in adapters for where in adapter.changes}
    names = ", ".join(adapter.name for adapter in adapters)
    return f"{_count(len(adapters), 'adapter')} on {_count(len(changed), 'weight')}: {names}"


def _count(number: int, noun: str) -> str:
    plural = noun.removesuffix("y") + "ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _saving(saved: int, unshared: int, shared: list[int]) -> str:
    who = f"{_count(len(shared), 'weight')} shared by {_count(sum(shared), 'use')}" if shared else "no weight is shared"
    if saved < 0:
        return (
            f"{human_bytes(-saved)} more than unshared: the parts of expressions take more than what they make; {who}"
        )
    return f"{saved / unshared:.1%} of unshared: {who}" if saved else who


def _shows_results() -> bool:
    """Whether Python runs in a notebook, which shows what a cell ends with."""
    from rich.console import Console

    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return Console().is_jupyter or getattr(shell, "kernel", None) is not None


# --------------------------------------------------------------------------- folded to a width
# Rows of text in columns, or one under the other where columns have no room. What is long is folded, never cut off.


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
class SummaryRow:
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


ADAPTER_COLUMNS = (
    Column("strength", number=True, label="strength"),
    Column("rank", number=True, label="rank"),
    Column("changes", number=True, label="changes"),
    Column("parameters", number=True, label="parameters"),
    Column("bytes", number=True),
    Column("trains"),
)


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


def lay_out(title: str, columns: Sequence[Column], rows: Sequence[SummaryRow], width: int) -> Iterator[Line]:
    """The rows in lines of at most `width` cells: in columns if those leave enough room for the names."""
    header = SummaryRow((title, "bold"), tuple((column.title, "bold") for column in columns))
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


def _named(row: SummaryRow, width: int) -> list[Line]:
    """The name and the note: on one line if there is room."""
    text, style = row.name
    indent = " " * 2 * row.level
    room = width - len(indent)
    if row.note and cell_len(row.whole) <= room:
        return [[(indent + text, style), (f" {row.note}", "cyan")]]
    named: list[Line] = [[(indent + part, style)] for part in fold(text, room, hang=2)]
    notes: list[Line] = [[(f"{indent}  {part}", "cyan")] for part in fold(row.note, room - 2)] if row.note else []
    return named + notes


def _in_columns(columns: Sequence[Column], row: SummaryRow, widths: list[int]) -> Iterator[Line]:
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


def _stacked(columns: Sequence[Column], row: SummaryRow, width: int) -> Iterator[Line]:
    yield from _named(row, width)
    said = [f"{c.label} {text}" if c.label else text for c, (text, _) in zip(columns, row.cells, strict=True) if text]
    if said:
        indent = " " * (2 * row.level + 4 - 2 * bool(row.level))
        yield from ([(indent + part, "dim")] for part in fold(", ".join(said), width - len(indent)))


# --------------------------------------------------------------------------- for a notebook
# A summary as an HTML table: whole in itself, without script, in the colours of the page around it.


# The text takes the page's colour. The accents are read on white and on black; where a page says which it is, they
# are those of that.
_STYLE = """
.tether-summary{overflow:auto;max-height:60em}
.tether-summary table{border-collapse:collapse;background:none;color:inherit;font-size:.9em}
.tether-summary table+table{margin-top:.8em}
.tether-summary :is(th,td){text-align:left;vertical-align:top;padding:.2em .8em .2em 0;border:0;
 border-top:1px solid color-mix(in srgb,currentColor 20%,transparent);white-space:nowrap;background:none;color:inherit}
.tether-summary .name{white-space:normal;overflow-wrap:anywhere;min-width:12em}
.tether-summary .number{text-align:right;font-variant-numeric:tabular-nums}
.tether-summary .use>*{border-top:0;padding-top:0}
.tether-summary .use .name{padding-left:1.5em;font-weight:normal;font-family:ui-monospace,monospace}
.tether-summary caption{text-align:left;font-weight:bold;caption-side:top;color:inherit}
.tether-summary .note{color:var(--tether-note)}
.tether-summary .trained{color:var(--tether-trained)}
.tether-summary .frozen{color:var(--tether-frozen)}
.tether-summary{--tether-note:#0b7285;--tether-trained:#2b8a3e;--tether-frozen:#1971c2}
@media (prefers-color-scheme:dark){
.tether-summary{--tether-note:#66d9e8;--tether-trained:#8ce99a;--tether-frozen:#74c0fc}}
"""


def as_html(
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[SummaryRow],
    totals: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
) -> str:
    """The table of rows, the totals and the notes under it."""
    head = "".join(_cell("th", column.title, column, scope="col") for column in columns)
    body = "\n".join(_row(columns, row) for row in rows)
    foot = "\n".join(
        f'<tr><th scope="row">{_text(label)}</th><td class="number">{_text(size)}</td>'
        f'<td class="name">{_text(words)}</td></tr>'
        for label, size, words in totals
    )
    below = "\n".join(f"<p>{_text(note)}</p>" for note in notes)
    return (
        f'<div class="tether-summary"><style>{_STYLE}</style>\n'
        f'<table><caption>{_text(name)}</caption>\n<thead><tr><th scope="col" class="name">{_text(title)}</th>{head}'
        f"</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n<table><tbody>\n{foot}\n</tbody></table>\n{below}</div>"
    )


def _row(columns: Sequence[Column], row: SummaryRow) -> str:
    text, _ = row.name
    note = f' <span class="note">{_text(row.note)}</span>' if row.note else ""
    cells = "".join(_cell("td", cell, column) for column, (cell, _) in zip(columns, row.cells, strict=True))
    kind = ' class="use"' if row.level else ""
    return f'<tr{kind}><th scope="row" class="name">{_text(text)}{note}</th>{cells}</tr>'


def _cell(tag: str, text: str, column: Column, scope: str = "") -> str:
    kind = "number" if column.number else text if text in ("trained", "frozen") else ""
    attributes = (f' scope="{scope}"' if scope else "") + (f' class="{kind}"' if kind else "")
    return f"<{tag}{attributes}>{_text(text)}</{tag}>"


def _text(text: str) -> str:
    return escape(literal(text))


__all__ = ["Summary", "summary"]

"""A summary as an HTML table: whole in itself, without script, in the colours of the page around it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tether.inspection.layout import Column, Row, literal

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
    rows: Sequence[Row],
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


def _row(columns: Sequence[Column], row: Row) -> str:
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

"""What `share_depth` did: which weights are shared, and how far the values are now from what they were."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class SharedWeight:
    """One weight of the blocks."""

    name: str
    """Its path in a block."""
    shape: tuple[int, ...]
    how: str
    """`"shared"`, `"own"`, or the low-rank form that each depth adds to what is shared."""
    errors: tuple[float, ...] = ()
    """How far the value of each block is from what it was, relative to that: `‖new - old‖ / ‖old‖`."""

    @property
    def error(self) -> float:
        """The largest of these."""
        return max(self.errors, default=0.0)


@dataclass(frozen=True, repr=False)
class SharedDepth:
    """What `tether.share_depth` returns. It shows itself as a table, at the prompt and in a notebook.

    Example:
    ```python
    blocks = [keras.layers.Dense(4, name=f"block_{place}") for place in range(4)]
    for block in blocks:
        block.build((None, 4))
    report = tether.share_depth(blocks, "cycle:2")
    assert report.letters == "ABAB" and report["kernel"].how == "shared"
    ```
    """

    blocks: tuple[str, ...]
    """The names of the blocks, in their order."""
    letters: str
    """Which are one: `"ABAB"`."""
    weights: tuple[SharedWeight, ...]
    """The weights of a block; none as long as the blocks are not built."""
    before: int
    """The parameters of all blocks before, each stored one counted once."""
    after: int
    """And after."""

    @property
    def error(self) -> float:
        """The largest relative change of a value."""
        return max((weight.error for weight in self.weights), default=0.0)

    def __getitem__(self, name: str) -> SharedWeight:
        """What became of a weight, by its path in a block."""
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(name)

    def __repr__(self) -> str:
        cells = [("weight", "shape", "", "changed by"), *self._rows()]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self._title, *(line.rstrip() for line in lines), self._totals])

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("weight", "shape", "", "changed by"))
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{escape(name)}</code></td>"
            + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in self._rows()
        )
        return (
            f"<p>{escape(self._title)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p>{self._totals}</p>"
        )

    @property
    def _title(self) -> str:
        return f"{len(self.blocks)} blocks, {self.letters}: {self.blocks[0]} to {self.blocks[-1]}"

    @property
    def _totals(self) -> str:
        if not self.weights:
            return "The blocks are not built yet, and share their weights when they are."
        saved = 1 - self.after / self.before if self.before else 0.0
        more = f"{saved:.0%} less" if saved >= 0 else f"{-saved:.0%} more"
        return f"{self.before:,} parameters before, {self.after:,} after: {more}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(weight.name, str(weight.shape), weight.how, _changed(weight.errors)) for weight in self.weights]


def _changed(errors: tuple[float, ...]) -> str:
    if not errors:
        return ""
    low, high = f"{min(errors):.1%}", f"{max(errors):.1%}"
    return low if low == high else f"{low} to {high}"


def letters(groups: Sequence[Sequence[int]], depth: int) -> str:
    """Which blocks are one, as people write it: `"ABAB"`; numbers where letters do not suffice."""
    of = {place: number for number, group in enumerate(groups) for place in group}
    numbers: dict[object, int] = {}
    each = [numbers.setdefault(of.get(place, ("alone", place)), len(numbers)) for place in range(depth)]
    if len(numbers) <= len(string.ascii_uppercase):
        return "".join(string.ascii_uppercase[number] for number in each)
    return " ".join(str(number + 1) for number in each)


__all__ = ["SharedDepth", "SharedWeight"]

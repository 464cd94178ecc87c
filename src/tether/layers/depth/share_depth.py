"""Blocks of one structure that share weights through the depth of a model: in place, also after training.

    h₁ = B(h₀; W₁), h₂ = B(h₁; W₂), …  →  some of the W are one

Patterns: Takase & Kiyono 2021, "Lessons on Parameter Sharing across Layers in Transformers" (arXiv:2104.06022). One
block for all: Dehghani et al. 2018, "Universal Transformers" (arXiv:1807.03819), and Lan et al. 2019, "ALBERT"
(arXiv:1909.11942). The mean with a low-rank part for each depth: Bae et al. 2024, "Relaxed Recursive Transformers"
(arXiv:2410.20672).
"""

from __future__ import annotations

import contextlib
import copy
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import keras
import numpy as np

from tether import keras_seam, patterns
from tether.errors import ShapeMismatch, TetherError, UnknownName, Unsupported, received
from tether.forms.form import rows_and_columns
from tether.forms.low_rank import LowRank
from tether.layers.depth.blocks import (
    NORMS,
    Block,
    as_blocks,
    by_pattern,
    checked_groups,
    chooses,
    is_matrix,
    refuse_missed,
    shared_paths,
)
from tether.layers.family.named import named_weights
from tether.layers.tying.fit import refuse_unsupported
from tether.layers.tying.state import WhenBuilt, numpy_of, users
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie, tie_later, weights_of
from tether.layers.tying.tied import become_tied
from tether.patterns import Pattern
from tether.types import Array
from tether.weights.expression import Expression
from tether.weights.weight import Weight


def share_depth(
    layers: Sequence[keras.Layer] | keras.Layer,
    pattern: str = "all",
    *,
    blocks: Pattern | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    only: Pattern = "*",
    keep: Pattern = NORMS,
    values: str | LowRank = "first",
) -> SharedDepth:
    """Lets blocks of one structure share weights through the depth of a model, in place.

    Which blocks are one is a pattern of the depth; for six blocks:

    | pattern | blocks | |
    |---|---|---|
    | `"all"` | `AAAAAA` | one block's weights for all |
    | `"sequence:3"` | `AABBCC` | neighbours share |
    | `"cycle:3"` | `ABCABC` | the blocks in turn |
    | `"cycle_reverse:3"` | `ABCCBA` | in turn, the last time backwards |
    | `"sandwich"` | `ABBBBC` | the first and the last have their own |

    Norms, statistics and residual scales stay with each depth unless `keep` says otherwise; kernels, biases and tables
    are shared. What of a block is frozen stays frozen. With the values of the first block a model that has been trained
    goes on, with what its optimizer keeps for the weights that are left; otherwise it has to be compiled again.

    Args:
        layers: The blocks in their order; or a model, of which `blocks` chooses them. From the model, the ties are part
            of its config even where this does not hold those of its blocks, as in KerasHub's backbones. Blocks that are
            not built share as soon as they are.
        pattern: One of the table; the number is that of blocks with weights of their own.
        blocks: Which layers of a model are the blocks, by name or pattern of their paths: `"transformer_layer_*"`. What
            is in a block is no block.
        groups: Places of blocks that share, instead of a pattern: `[[0, 1], [2, 3]]`. Others stay as they are.
        only: Which weights are shared: patterns of their paths in a block (`"*attention*"`), `"all-linear"` for the
            kernels of Dense and EinsumDense layers.
        keep: Which of these stay with each depth, `()` for none. `"norms"` are the weights of normalizations, all that
            is not made to be trained, scalars, and vectors with names such as `gamma` or `layer_scale`.
            `["norms", "*bias"]` keeps biases too.
        values: What a shared weight starts with: `"first"`, the value of the group's first block; `"mean"`, the mean
            of its blocks; or `tether.low_rank(r)`: the mean, and at each depth a part of rank r, the truncated SVD of
            what the depth differs by. Biases and other vectors then stay with each depth, and at full rank the outputs
            are what they were.

    Returns:
        A report that shows itself: which weights are shared, the parameters before and after, and how far each depth's
        value is now from what it was, relative to it.

    Raises:
        UnknownName: A pattern fits nothing, or a block has no counterpart of a weight.
        ShapeMismatch: The counterpart has another shape.
        Unsupported: A weight cannot be tied, or its value cannot be the mean.
        TetherError: An argument makes no sense, or some of the blocks are built and others are not.

    Example:
    ```python
    inputs = x = keras.Input((4,))
    for place in range(6):
        x = keras.layers.Dense(4, activation="tanh", name=f"block_{place}")(x)
    deep = keras.Model(inputs, x)
    report = tether.share_depth(deep, "cycle:3", blocks="block_*", values="mean")
    assert deep.count_params() == report.after == report.before // 2
    ```
    """
    chosen = as_blocks(layers, blocks)
    if groups is not None and pattern != "all":
        raise TetherError(f"Give a pattern or groups, not both. {received(pattern=pattern, groups=groups)}")
    found = by_pattern(pattern, len(chosen)) if groups is None else checked_groups(groups, len(chosen))
    _check_values(values)
    if not any(block.weights for block in chosen) and not any(block.layer.built for block in chosen):
        return _Waiting(chosen, found, only, keep, values).report
    return _Sharing(chosen, found, only, keep, values).make()


def _check_values(values: object) -> None:
    if isinstance(values, LowRank):
        if not isinstance(values.start, str) or values.start != "zeros":
            raise TetherError(
                f"A low-rank part starts here at what a depth differs by: leave its start out. "
                f"{received(values=values)}"
            )
    elif not isinstance(values, str) or values not in ("first", "mean"):
        raise TetherError(
            f"`values` is 'first', 'mean', or `tether.low_rank(8)` for the mean and a part of each depth. "
            f"{received(values=values)}"
        )


# --------------------------------------------------------------------------- sharing


class _Sharing:
    """One call: everything that can fail first, then the ties."""

    def __init__(
        self, blocks: list[Block], groups: list[list[int]], only: Pattern, keep: Pattern, values: str | LowRank
    ) -> None:
        self.blocks, self.groups, self.values = blocks, groups, values
        empty = next((block for block in blocks if not block.weights), None)
        if empty is not None:
            raise TetherError(
                f"{empty.name!r} has no weights, or none yet, and {next(b.name for b in blocks if b.weights)!r} has. "
                f"Build all blocks first, or none: `{empty.root.name}.build(input_shape)`."
            )
        weights = [weight for block in blocks for weight in block.weights.values()]
        for pattern in (only, keep):
            refuse_missed(pattern, weights)
        for weight in weights:
            if weight.layer.quantization_mode is not None and chooses(only, weight):
                refuse_unsupported(weight.layer)
        self.shared = [shared_paths(block.weights, only, keep) for block in blocks]
        for group in groups:
            for place in group[1:]:
                self._refuse_other(group[0], place)
        if isinstance(values, LowRank):
            self.shared = [
                [path for path in found if is_matrix(block.weights[path])]
                for block, found in zip(blocks, self.shared, strict=True)
            ]
            self._refuse_constraints()
        if not any(self.shared[group[0]] for group in groups if len(group) > 1):
            raise UnknownName(
                "None of the blocks' weights is to be shared: `only` chooses none that `keep` does not, or no group "
                f"has two blocks. {received(only=only, keep=keep, groups=groups)}"
            )

    def _refuse_other(self, first: int, other: int) -> None:
        """Refuses a block whose weights are not those of the first one of its group."""
        a, b = self.blocks[first], self.blocks[other]
        for mine, theirs, one, two in ((first, other, a, b), (other, first, b, a)):
            lacking = next((path for path in self.shared[mine] if path not in self.shared[theirs]), None)
            if lacking is not None:
                raise UnknownName(
                    f"{one.name!r} has the weight {self._name(lacking)!r} and {two.name!r} has none that "
                    "corresponds to it: the blocks are made otherwise. Share those that are alike, or leave the weight "
                    f"with its depth: `keep=['norms', {lacking!r}]`."
                )
        for path in self.shared[first]:
            if a.weights[path].shape != b.weights[path].shape:
                raise ShapeMismatch(
                    f"{self._name(path)!r} has shape {a.weights[path].shape} in {a.name!r} and "
                    f"{b.weights[path].shape} in {b.name!r}. Share blocks of one size, or leave the weight with its "
                    f"depth: `keep=['norms', {path!r}]`."
                )

    def _refuse_constraints(self) -> None:
        """Refuses a low-rank part on what a layer constrains as it is stored."""
        for group in self.groups:
            for place in group if len(group) > 1 else ():
                for path in self.shared[place]:
                    constraint = getattr(self.blocks[place].weights[path].variable, "constraint", None)
                    if constraint is not None:
                        raise Unsupported(
                            f"{self.blocks[place].name!r} constrains its {self._name(path)} by "
                            f"{type(constraint).__name__}, which acts on what is stored, and with a low-rank part the "
                            "value is a sum. Take `values='mean'`, or leave the weight with its depth: "
                            f"`keep=['norms', {path!r}]`."
                        )

    def _name(self, path: str) -> str:
        """What a weight is called: by the names of layers if these are the same in all blocks, else by attributes."""
        names = {block.weights[path].name if path in block.weights else path for block in self.blocks}
        return names.pop() if len(names) == 1 else path

    def make(self) -> SharedDepth:
        """Ties, and says what became of the values."""
        groups = [group for group in self.groups if len(group) > 1]
        places = sorted(place for group in groups for place in group)
        old = {
            (place, path): np.asarray(numpy_of(self.blocks[place].weights[path].variable), dtype="float64")
            for place in places
            for path in self.shared[place]
        }
        before, stored = self._count(), self._trained()
        roots = {id(block.root): block.root for block in self.blocks}
        with contextlib.ExitStack() as stack:
            for root in roots.values():
                stack.enter_context(Rollback.below(root))
            wanted: dict[int, dict[str, Expression]] = {key: {} for key in roots}
            means: dict[Weight, Array] = {}
            for group in groups:
                for place, path, expression in self._of_group(group, old, means):
                    block = self.blocks[place]
                    wanted[id(block.root)][block.path(path)] = expression
            for key, ties in wanted.items():
                if ties:
                    tie(roots[key], ties)
        for weight, value in means.items():
            weight.assign(value)
        if self.values == "first":  # each weight that is left has its value, and so what optimizers keep for it
            left = self._trained()
            keras_seam.keep_slots({}, [variable for key, variable in stored.items() if key not in left])
        return self._report(places, old, before)

    def _of_group(
        self, group: list[int], old: dict[tuple[int, str], Array], means: dict[Weight, Array]
    ) -> list[tuple[int, str, Expression]]:
        """What each block of a group reads from now on."""
        first = self.blocks[group[0]]
        chosen = self.shared[group[0]]
        bases = weights_of(first.root, [first.path(path) for path in chosen])
        found: list[tuple[int, str, Expression]] = []
        for path in chosen:
            base = bases[first.path(path)]
            if self.values != "first":
                mean = np.mean([old[place, path] for place in group], axis=0)
                means[self._assignable(base, path, group)] = mean
            if isinstance(self.values, LowRank):
                for place in group:
                    found.append((place, path, base + self._part(place, path, old[place, path] - mean)))
            else:
                found.extend((place, path, base) for place in group[1:])
        return found

    def _assignable(self, base: Expression, path: str, group: list[int]) -> Weight:
        """The stored weight that gets the mean, if nobody else reads it."""
        name = f"{self.blocks[group[0]].name}/{path}"
        if not isinstance(base, Weight):
            raise Unsupported(
                f"{name} is {base.notation()}, which cannot be given a mean. Untie it first, `tether.untie`, or take "
                "`values='first'`."
            )
        inside = {id(layer) for place in group for layer in keras_seam.contained_layers(self.blocks[place].layer)}
        outside = next((layer for layer in users(base) if id(layer) not in inside), None)
        if outside is not None:
            raise Unsupported(
                f"{name} is shared with {outside.name!r}, which is not one of the blocks and would change with the "
                "mean. Untie it first, or take `values='first'`."
            )
        return base

    def _part(self, place: int, path: str, difference: Array) -> Expression:
        """A depth's own low-rank part, beside its own weight."""
        assert isinstance(self.values, LowRank)
        block = self.blocks[place]
        own = weights_of(block.root, [block.path(path)])[block.path(path)]
        rows, columns = rows_and_columns(difference.shape, self.values.split, of=own.notation())
        form = copy.copy(self.values)
        form.rank = min(form.rank, math.prod(rows), math.prod(columns))
        return form.near(own, difference)

    def _trained(self) -> dict[int, keras.Variable]:
        """The variables of the blocks that train, by their ids."""
        return {id(v): v for block in self.blocks for v in block.layer.trainable_variables}

    def _count(self) -> int:
        variables = {id(v): v for block in self.blocks for v in block.layer.weights}
        return sum(math.prod(variable.shape) for variable in variables.values())

    def _report(self, places: list[int], old: dict[tuple[int, str], Array], before: int) -> SharedDepth:
        rows = []
        first = self.blocks[places[0]]
        shared = set(self.shared[places[0]])
        now = {place: {w.path: w for w in named_weights(self.blocks[place].layer)} for place in places}
        for path, weight in first.weights.items():
            errors: list[float] = []
            for place in places if path in shared else ():
                change = np.linalg.norm(numpy_of(now[place][path].variable) - old[place, path])
                norm = np.linalg.norm(old[place, path])
                errors.append(float(change / norm) if norm else (0.0 if not change else math.inf))
            if path not in shared:
                how = "own"
            else:
                how = "shared" if isinstance(self.values, str) else f"mean + low_rank({self.values.rank})"
            rows.append(SharedWeight(self._name(path), weight.shape, how, tuple(errors)))
        return SharedDepth(
            tuple(block.name for block in self.blocks),
            letters(self.groups, len(self.blocks)),
            tuple(rows),
            before,
            self._count(),
        )


# --------------------------------------------------------------------------- blocks that are not built


class _Waiting:
    """Sharing that begins when the blocks are built: the first one of a group that is, says what it has."""

    def __init__(
        self, blocks: list[Block], groups: list[list[int]], only: Pattern, keep: Pattern, values: str | LowRank
    ) -> None:
        if values != "first":
            raise TetherError(
                f"The blocks are not built, so that they have no values yet. Take `values='first'`, or build them "
                f"first. {received(values=values)}"
            )
        for pattern in (only, keep):
            if pattern not in ((), []):
                patterns.parts(pattern)
        self.blocks, self.only, self.keep = blocks, only, keep
        self.group_of = {place: group for group in groups if len(group) > 1 for place in group}
        if not self.group_of:
            raise UnknownName(f"No group has two blocks. {received(groups=groups)}")
        self.of_first: dict[int, list[str]] = {}
        self.made_by_code = [keras_seam.maker(block.layer) is not None for block in blocks]
        self.report = SharedDepth(tuple(block.name for block in blocks), letters(groups, len(blocks)), (), 0, 0)
        for block in blocks:
            refuse_unsupported(block.layer)
        for place in self.group_of:
            state = become_tied(blocks[place].layer)
            state.when_built.append(WhenBuilt(self.share, self.made_by_code[place]))
        root = blocks[0].root
        if root is not blocks[0].layer:  # its config says as little of what is to come
            become_tied(root).when_built.append(WhenBuilt(lambda _: None, keras_seam.maker(root) is not None))

    def share(self, layer: keras.Layer) -> None:
        """Ties the other blocks of a layer's group to it, or sees that it is like the one that they are tied to."""
        place = next(place for place in self.group_of if self.blocks[place].layer is layer)
        block, group = self.blocks[place], self.group_of[place]
        waiting = next((each for each in keras_seam.contained_layers(layer) if not _is_known(each)), None)
        if waiting is not None:
            raise TetherError(
                f"The `build` of {block.name!r} leaves {waiting.name!r} to be built later, so that nobody knows the "
                "block's weights. Build it there, or share the depth when the model is built."
            )
        shared = shared_paths({weight.path: weight for weight in named_weights(layer)}, self.only, self.keep)
        if group[0] in self.of_first:
            other = self.of_first[group[0]]
            lacking = next(iter(set(shared) ^ set(other)), None)
            if lacking is not None:
                raise UnknownName(f"{lacking!r} is in {block.name!r} or in the first block, and not in both.")
            return
        self.of_first[group[0]] = shared
        if not shared:
            raise UnknownName(
                f"None of the weights of {block.name!r} is to be shared. {received(only=self.only, keep=self.keep)}"
            )
        names = [block.path(path) for path in shared]
        bases = weights_of(block.root, names, made_by_code=self.made_by_code[place])
        for each in group:
            other_block = self.blocks[each]
            if each != place:
                ties = {other_block.path(path): bases[block.path(path)] for path in shared}
                tie_later(other_block.root, ties, made_by_code=self.made_by_code[each])


def _is_known(layer: keras.Layer) -> bool:
    return isinstance(layer, Weight) or layer.built


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


__all__ = ["SharedDepth", "SharedWeight", "share_depth"]

"""How a product of factors is multiplied: axes that always go together made one, then the cheapest order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tether.planning.plan import Problem
from tether.planning.products import Factor, Labels, Products, Summand, shaped

# --------------------------------------------------------------------------- the order
# In which order the factors of a product are multiplied: what opt_einsum finds best, for calls of several sizes.


Path = tuple[tuple[int, ...], ...]
_SCALES = (1.0, 1e-9, 1e9)


def orders(inputs: Sequence[Labels], output: Labels, sizes: Mapping[int, int], batch: frozenset[int]) -> list[Path]:
    """Orders worth a look, the one with the fewest operations first.

    The fewest operations of a forward pass need not be the fastest of a training step. So the best order is
    also found for a call of very few and of very many rows: applied one after another, and multiplied
    beforehand.

    Args:
        inputs: The labels of the operands.
        output: The labels of the product.
        sizes: The size of each label.
        batch: The labels of rows.
    """
    if len(inputs) < 2:
        return [()]
    if len(inputs) == 2:
        return [((0, 1),)]
    names: dict[int, int] = {}
    for labels in inputs:
        for label in labels:
            names.setdefault(label, len(names))
    canonical = tuple(frozenset(names[label] for label in labels) for labels in inputs)
    target = frozenset(names[label] for label in output)
    scaled = tuple((names[label], sizes[label], label in batch) for label in names)
    return list(_orders(canonical, target, scaled))


@lru_cache(maxsize=4096)
def _orders(
    inputs: tuple[frozenset[int], ...], output: frozenset[int], sizes: tuple[tuple[int, int, bool], ...]
) -> tuple[Path, ...]:
    from opt_einsum import paths  # imported with the first product of three

    found: list[Path] = []
    for scale in _SCALES:
        size = {name: max(1, round(count * scale)) if rows else count for name, count, rows in sizes}
        path = tuple(tuple(pair) for pair in paths.optimal([set(part) for part in inputs], set(output), size))
        if path not in found:
            found.append(path)
    return tuple(found)


# --------------------------------------------------------------------------- axes that go together
# Axes that always go together, made one: rows of several axes times a kernel of several are a matrix product.
#
# Backends multiply matrices faster than they contract tensors, so the kernel of an attention projection `(inputs,
# heads, head)` is applied as a matrix of `inputs` by `heads * head`.


Letters = tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """How the layer's input is brought into fewer axes, and the result back."""

    joined: tuple[int, ...]
    """How many axes of the input become each axis."""
    restored: tuple[tuple[str, int], ...]
    """For each axis of the result its size (`"size"`), or the axis of the input that has the same (`"input"`)."""


def grouped(problem: Problem, products: Products) -> tuple[Problem, Products, Grouping | None]:
    """The same problem with fewer axes, if there are some that always go together."""
    if problem.lookup or problem.convolution is not None:
        return problem, products, None
    parts: list[list[Letters]] = [
        [(letter,) for letter in letters] for letters in (problem.inputs, problem.kernel, problem.outputs)
    ]
    apart = set(problem.inputs[: problem.chosen])  # the axes of a choice stay as they are
    merged = True
    while merged:
        merged = False
        for one, two in [pair for part in parts for pair in itertools.pairwise(part)]:
            if apart.intersection(one + two):
                continue
            if _always_adjacent(one, two, parts) and _same_everywhere(one + two, problem, products):
                parts = [_merge(part, one, two) for part in parts]
                merged = True
                break
    if all(len(group) == 1 for part in parts for group in part):
        return problem, products, None
    inputs, kernel, outputs = parts
    sizes = dict(zip(problem.inputs, problem.sizes, strict=True))
    of_kernel = dict(zip(problem.kernel, products.shape, strict=True))
    small = replace(
        problem,
        inputs=tuple("+".join(group) for group in inputs),
        kernel=tuple("+".join(group) for group in kernel),
        outputs=tuple("+".join(group) for group in outputs),
        sizes=tuple(_product([sizes[letter] for letter in group]) for group in inputs),
    )
    restored = tuple(
        ("input", problem.inputs.index(letter)) if letter in problem.inputs else ("size", of_kernel[letter])
        for letter in problem.outputs
    )
    grouping = Grouping(tuple(len(group) for group in inputs), restored)
    return small, _with_axes(products, [len(group) for group in kernel]), grouping


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _always_adjacent(one: Letters, two: Letters, parts: list[list[Letters]]) -> bool:
    for part in parts:
        if (one in part) != (two in part) or (one in part and part.index(two) != part.index(one) + 1):
            return False
    return True


def _merge(part: list[Letters], one: Letters, two: Letters) -> list[Letters]:
    if one not in part:
        return part
    place = part.index(one)
    return [*part[:place], one + two, *part[place + 2 :]]


def _same_everywhere(letters: Letters, problem: Problem, products: Products) -> bool:
    """Whether every term has labels on these axes of the weight: one that is the same along an axis has none."""
    places = [problem.kernel.index(letter) for letter in letters if letter in problem.kernel]
    return all(term.axes[place] or products.shape[place] == 1 for term in products.terms for place in places)


def _with_axes(products: Products, counts: Sequence[int]) -> Products:
    """The products with several axes as one, and labels that always go together as one label."""
    sizes, shape, starts = dict(products.sizes), list[int](), list[int]()
    for count in counts:
        starts.append(sum(counts[: len(starts)]))
        shape.append(math.prod(products.shape[starts[-1] : starts[-1] + count]))
    terms = []
    for term in products.terms:
        axes = tuple(
            tuple(label for axis in term.axes[start : start + count] for label in axis)
            for start, count in zip(starts, counts, strict=True)
        )
        terms.append(_fused(replace(term, axes=axes), sizes))
    return Products(tuple(shape), tuple(terms), sizes)


def _fused(term: Summand, sizes: dict[int, int]) -> Summand:
    """The term with each row of labels that no factor parts as one label."""
    while True:
        pair = next((p for axis in term.axes for p in itertools.pairwise(axis) if _together(p, term)), None)
        if pair is None:
            return term
        label = max(sizes) + 1
        sizes[label] = sizes[pair[0]] * sizes[pair[1]]
        factors = tuple(
            Factor(*shaped(factor.expression, _replaced(factor.labels, pair, label), sizes)) for factor in term.factors
        )
        term = Summand(term.number, factors, tuple(_replaced(axis, pair, label) for axis in term.axes))


def _together(pair: tuple[int, int], term: Summand) -> bool:
    one, two = pair
    for labels in (factor.labels for factor in term.factors):
        if (one in labels) != (two in labels) or (one in labels and labels.index(two) != labels.index(one) + 1):
            return False
    return True


def _replaced(labels: Labels, pair: tuple[int, int], label: int) -> Labels:
    if pair[0] not in labels:
        return labels
    place = labels.index(pair[0])
    return (*labels[:place], label, *labels[place + 2 :])

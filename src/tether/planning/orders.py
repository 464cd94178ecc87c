"""In which order the factors of a product are multiplied: what opt_einsum finds best, for calls of several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tether.planning.products import Labels

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

"""One adapter made of several, with weights of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal

import keras
import numpy as np

from tether import keras_seam
from tether.adapters.manage import adapt, adapted_weights, check, check_known, check_new_name, check_strength
from tether.adapters.slotted import Part
from tether.errors import TetherError, did_you_mean, received
from tether.forms.form import part, rows_and_columns, start_value
from tether.forms.low_rank import factors_of, low_rank
from tether.types import Array
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.operators.choice import Adapted
from tether.weights.weight import Weight

Method = Literal["linear", "cat", "svd", "ties", "dare"]
METHODS = ("linear", "cat", "svd", "ties", "dare")


def combine(
    model: keras.Layer,
    adapters: Mapping[str, float],
    /,
    into: str,
    *,
    method: Method = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int | None = None,
) -> dict[str, float]:
    """Makes one adapter of several: a weighted sum of what each adds, in weights of its own. The others stay.

    The new adapter is on and trains like any other. What the adapters add is summed, never their factors one by one,
    so there are no products of one adapter's factor with another's.

    Args:
        model: The model.
        adapters: How much of each: finite numbers by name. Present strengths play no part.
        into: What the new adapter is called.
        method: `"linear"`: the weighted sum. `"cat"`: the same for low-rank adapters only, as one product of their
            factors side by side. `"svd"`: the sum, cut to `rank`. `"ties"`: of each difference the largest entries
            are kept (a share of `density`), each entry gets the sign that prevails, and the mean of those that have
            it (Yadav et al. 2023, arXiv:2306.01708). `"dare"`: entries are dropped at random but for a share of
            `density`, and the rest is scaled up for it (Yu et al. 2023, arXiv:2311.03099).
        rank: The rank of the result, by a truncated SVD of each weight's sum; weights of fewer than two axes stay
            whole. Left out, the result is exact.
        density: The share that `"ties"` and `"dare"` keep.
        seed: Of what `"dare"` drops.

    Returns:
        For each weight, by its path, how far the result is from the sum it was made for: the norm of the difference
        divided by the norm of the sum. 0 where nothing was cut off.

    Raises:
        UnknownName: The model has no adapter of a name.
        TetherError: The new name is taken, a number makes no sense, the method does not go with the adapters, or an
            adapter adds numbers that are not finite (where the sum is not exact).

    Example:
    ```python
    for language in ("french", "german"):
        tether.adapters.add(model, language, {"*/query/kernel": tether.low_rank(8)})
    lost = tether.adapters.combine(model, {"french": 0.7, "german": -0.3}, into="both", rank=8)
    ```
    """
    check(model, "combine")
    _check_arguments(model, adapters, method, rank, density)
    check_new_name(model, into)
    random = np.random.default_rng(seed)
    parts: dict[str, Part] = {}
    errors: dict[str, float] = {}
    for path, expression in adapted_weights(model).items():
        given = {
            name: (float(adapters[name]), part) for name, (_, part) in expression.parts.items() if name in adapters
        }
        if not given:
            continue
        dense = method in ("ties", "dare") or (rank is not None and len(expression.shape or ()) > 1)
        if not dense:
            parts[path] = partial(_summed, list(given.values()), expression)
            errors[path] = 0.0
            continue
        values = [(weight, _finite_value(name, path, part)) for name, (weight, part) in given.items()]
        target = _merged(values, method, density, random)
        made, errors[path] = _cut(target, rank)
        parts[path] = made
    adapt(model, into, 1.0, parts, freeze=None)  # what is frozen under the others stays frozen
    return errors


def _finite_value(name: str, path: str, part: Expression) -> Array:
    """What an adapter adds to a weight; an error names both if some of it is not finite."""
    value = start_value(part)
    if not np.isfinite(value).all():
        raise TetherError(
            f"The adapter {name!r} adds numbers to {path!r} that are not finite ({int((~np.isfinite(value)).sum())} of "
            f"{value.size}): its training may have diverged. Combine the others."
        )
    return value


def _check_arguments(
    model: keras.Layer, adapters: Mapping[str, float], method: str, rank: object, density: object
) -> None:
    given: object = adapters
    if not isinstance(given, Mapping) or not given:
        raise TetherError(
            "What is combined is given as numbers by name: `{'french': 0.7, 'german': -0.3}`. "
            f"{received(adapters=adapters)}"
        )
    check_known(model, adapters)
    for name, value in adapters.items():
        check_strength(name, value)
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise TetherError(f"`method` is one of {', '.join(map(repr, METHODS))}.{near} {received(method=method)}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise TetherError(f"`rank` is a whole number of 1 or more, or None for an exact sum. {received(rank=rank)}")
    if method == "svd" and rank is None:
        raise TetherError("`method='svd'` cuts the sum to a rank: `combine(..., method='svd', rank=8)`.")
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise TetherError(f"`density` is a share between 0 and 1. {received(density=density)}")
    if method == "cat":
        for path, expression in adapted_weights(model).items():
            for name, (_, made) in expression.parts.items():
                if name in adapters and factors_of(made) is None:
                    raise TetherError(
                        f"`method='cat'` puts the factors of low-rank adapters side by side, and {name!r} adds "
                        f"{made.notation()} to {path!r}. Use `method='linear'`, or give a `rank`."
                    )


def _summed(given: list[tuple[float, Expression]], of: Adapted, base: Expression) -> Expression:
    """The exact weighted sum: one product where all are low-rank, else a sum of copies."""
    factors = [factors_of(made) for _, made in given]
    if all(found is not None for found in factors):
        lefts, rights = [], []
        for (weight, _), found in zip(given, factors, strict=True):
            if found is not None:
                scale, a, b = found
                lefts.append(_wide(a))
                rights.append(weight * scale * _wide(b))
        return _product(base, np.concatenate(lefts, axis=-1), np.concatenate(rights, axis=0))
    total: Expression | None = None
    for weight, made in given:
        term = _copied(made, of.base, base)
        term = term if weight == 1 else weight * term
        total = term if total is None else total + term
    if total is None:
        raise TypeError("A sum of no adapters was asked for.")
    return total


def _wide(weight: Weight) -> Array:
    return np.asarray(
        keras_seam.to_numpy(keras.ops.cast(weight.value, "float32"), weight.name, in_step=True), "float64"
    )


def _product(base: Expression, left: Array, right: Array) -> Expression:
    """A low-rank part with these factors."""
    made = low_rank(left.shape[-1], split=left.ndim - 1).delta(base)
    found = factors_of(made)
    if found is None:
        raise TypeError("A low-rank form has made something else than a product of two factors.")
    _, a, b = found
    a.assign(left.astype("float32"))
    b.assign(right.astype("float32"))
    return made


def _copied(made: Expression, old: Expression, base: Expression) -> Expression:
    """A part with copies of its own weights; what of it names the base names this base."""
    of_base = dict(zip((weight.uid for weight in old.weights_used()), base.weights_used(), strict=True))
    copies: dict[str, Stored] = {}
    first = next(iter(base.weights_used()), None)
    for weight in made.weights_used():
        if weight.uid not in of_base:
            suffix = weight.path.rpartition("/")[2].removeprefix(
                "" if first is None else f"{first.path.rpartition('/')[2]}_"
            )
            copies[weight.uid] = Weight.beside(
                first,
                suffix,
                np.array(keras_seam.to_numpy(weight.value, weight.name, in_step=True)),
                dtype=str(weight.dtype),
                trainable=weight.role != "fixed",
                role=weight.role or "part",
            )
    return decode(encode(made), {**copies, **of_base})


def _merged(values: list[tuple[float, Array]], method: str, density: float, random: np.random.Generator) -> Array:
    """The sum of differences that a method asks for."""
    if method == "ties":
        kept = [weight * _largest(value, density) for weight, value in values]
        sign = np.sign(sum(kept[1:], kept[0]))
        agreeing = [np.where(np.sign(value) == sign, value, 0.0) for value in kept]
        counts = sum((value != 0).astype("float64") for value in agreeing)
        return np.asarray(sum(agreeing[1:], agreeing[0]) / np.maximum(counts, 1.0))
    if method == "dare":
        values = [(weight, np.where(random.random(v.shape) < density, v / density, 0.0)) for weight, v in values]
    terms = [weight * value for weight, value in values]
    return np.asarray(sum(terms[1:], terms[0]))


def _largest(value: Array, density: float) -> Array:
    """The entries of the largest sizes, and zero elsewhere."""
    count = max(1, math.ceil(density * value.size))
    least = np.partition(np.abs(value).reshape(-1), value.size - count)[value.size - count]
    return np.where(np.abs(value) >= least, value, 0.0)


def _cut(target: Array, rank: int | None) -> tuple[Part, float]:
    """What adds a difference to a weight, of a rank if one is asked for, and how far it is from it."""
    if rank is None or target.ndim < 2:
        return lambda base: part(base, "sum", target.astype("float32")), 0.0
    rows, columns = rows_and_columns(target.shape)
    u, s, v = np.linalg.svd(target.reshape(math.prod(rows), math.prod(columns)), full_matrices=False)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    left, right = (u[:, :kept] * root).reshape(*rows, kept), (v[:kept] * root[:, None]).reshape(kept, *columns)
    norm = float(np.linalg.norm(s))
    lost = float(np.linalg.norm(s[kept:])) / norm if norm else 0.0
    return partial(_product, left=left, right=right), lost


__all__ = ["combine"]

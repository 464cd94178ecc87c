"""The steps of a convolution: channels mixed before it, the layer's own, channels mixed after it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tether.planning.draft import Draft, NoPlan, Value
from tether.planning.products import Labels, Term

if TYPE_CHECKING:
    from tether.planning.search import Search


def convolved(
    search: Search, draft: Draft, term: Term, axes: dict[str, Labels], factors: tuple[Value, ...]
) -> tuple[Draft, Value]:
    """Channels mixed before, the layer's own convolution with what has positions, channels mixed after."""
    spatial = {label for letter in search.problem.kernel[:-2] for label in axes[letter]}
    for letter, size in zip(search.problem.kernel[:-1], search.products.shape, strict=False):
        if size > 1 and not axes[letter]:
            raise NoPlan
    core = [value for value in factors if spatial & set(value.labels)]
    others = [value for value in factors if not spatial & set(value.labels)]
    best: tuple[Draft, Value] | None = None
    for roles in itertools.product(("before", "core", "after"), repeat=len(others)):
        chosen = {role: [v for v, r in zip(others, roles, strict=True) if r == role] for role in ("before", "after")}
        inner = [*core, *(v for v, r in zip(others, roles, strict=True) if r == "core")]
        if not inner:
            continue
        try:
            tried = _convolution(search, draft.fork(), term, axes, chosen["before"], inner, chosen["after"])
        except NoPlan:
            continue
        if best is None or tried[0].seconds() < best[0].seconds():
            best = tried
    if best is None:
        raise NoPlan
    return best


def _convolution(
    search: Search,
    draft: Draft,
    term: Term,
    axes: dict[str, Labels],
    before: list[Value],
    core: list[Value],
    after: list[Value],
) -> tuple[Draft, Value]:
    problem = search.problem
    depthwise = problem.convolution is not None and problem.convolution.depthwise
    channels_in, channels_out = problem.kernel[-2:]
    draft, x, axes = search.input(draft, axes)
    out = [axes[letter] for letter in problem.outputs]
    flat = tuple(label for axis in out for label in axis)
    later = set(flat).union(*(value.labels for value in after))
    of_core = {label for value in core for label in value.labels}
    # Channels mixed before the convolution: what of it the kernel sums over.
    channels = axes[channels_in]
    if before:
        mixed = set(channels).union(*(value.labels for value in before))
        channels = tuple(sorted(mixed & (of_core | later), reverse=True))
        wanted = tuple(
            label for letter in problem.inputs for label in (channels if letter == channels_in else axes[letter])
        )
        draft, x = search.multiplied(draft, [x, *before], 1.0, wanted, applied=False)
    if not set(channels) <= of_core or (set(channels) & later and not depthwise):
        raise NoPlan
    if depthwise and channels != axes[channels_in]:
        raise NoPlan
    spatial = [axes[letter] for letter in problem.kernel[:-2]]
    places = {label for axis in spatial for label in axis}
    made = tuple(sorted((of_core & later) - places - set(channels), reverse=True))
    kernel_axes = [*spatial, channels, made]
    order = tuple(label for axis in kernel_axes for label in axis)
    if of_core - set(order) & later:
        raise NoPlan
    draft, kernel = search.multiplied(draft, core, term.number, order, applied=False)
    sizes = tuple(search.label(draft.size(axis)) for axis in kernel_axes)
    kernel = search.joined(draft, kernel, kernel_axes, sizes)
    if len(channels) != 1:
        groups = [channels if letter == channels_in else axes[letter] for letter in problem.inputs]
        x = search.joined(draft, x, groups, tuple(search.label(draft.size(axis)) for axis in groups))
    middle = [
        ((*channels, *made) if depthwise else made) if letter == channels_out else axes[letter]
        for letter in problem.outputs
        if not (depthwise and letter == channels_in)
    ]
    rows = draft.size(
        label for letter in problem.outputs if letter not in (channels_in, channels_out) for label in axes[letter]
    )
    joined = tuple(search.label(draft.size(axis)) for axis in middle)
    positions = draft.size(places)
    if depthwise:
        sides, count = (rows, draft.size(made), positions), draft.size(channels)
    else:
        sides, count = (rows, draft.size(made), positions * draft.size(channels)), 1
    y = draft.convolve(x, kernel, joined, sides, count)
    if any(len(axis) != 1 for axis in middle):
        detail = tuple(tuple(search.sizes[label] for label in axis) if len(axis) != 1 else None for axis in middle)
        y = draft.reshape(y, "split", detail, tuple(label for axis in middle for label in axis))
    y = Value(y.register, tuple(label for axis in middle for label in axis))
    draft, value = search.multiplied(draft, [y, *after], 1.0, flat, applied=False)
    return draft, search.result(draft, value, out)

"""Weights that are equal and not tied."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding, Severity, arranged, in_words, rule
from tether.inspection.checking.samples import Likeness, Readable, alike, is_equal, sample_tolerance
from tether.inspection.facts import StoredWeight
from tether.layers.tying.state import state_of

NEARLY = 1 - 1e-4
"""The least correlation of samples that are worth a whole comparison: rounding in 16 bits costs less."""
ROUNDED = 0.9
"""The least correlation of a float weight with the same one in integers, whose scale may differ by column."""


@rule("equal-weights", "weights with equal values, also transposed or scaled, that are not tied", file=True)
def equal_weights(context: Context) -> Iterator[Finding]:
    """They were copied where they were meant to be shared; or they start from one seed and learn alike."""
    if context.file is None:
        yield from _copies(context)
        return
    for first, second, found in context.once(equal_pairs):
        if not (found.in_order and found.scale == 1):  # equal to the bit is stored twice, another rule's
            yield Finding(
                "equal-weights",
                "warning",
                second.place,
                f"It is {first.place!r}{in_words(found.axes, found.scale)}. If they are meant to be one, the model "
                "that wrote the file did not know it.",
                _mend_file(context),
            )


@rule("stored-twice", "a shared weight that a file holds twice", file=True)
def stored_twice(context: Context) -> Iterator[Finding]:
    """Read back, each of them is a weight of its own."""
    if context.file is not None:
        for first, second, found in context.once(equal_pairs):
            if found.in_order and found.scale == 1 and not _is_within(first.place, second.place):
                yield Finding(
                    "stored-twice",
                    "warning",
                    second.place,
                    f"The file holds the values of {first.place!r} again here, {second.bytes:,} bytes. If the weights "
                    "are meant to be one, they are two when the file is read.",
                    _mend_file(context),
                )
        return
    for weight in context.weights:
        if not weight.again:
            continue
        variable = context.variables[weight.place]
        holders = [(layer, held) for layer, held in context.uses(variable) if held is variable]
        for place in weight.again:
            if _is_within(place, weight.place):
                continue
            by_config = all(_is_made_by_config(context, layer) for layer, _ in holders)
            yield Finding(
                "stored-twice",
                "error" if by_config else "warning",
                context.name_of(weight),
                f"The one variable {weight.path!r} is written at {weight.place!r} and again at {place!r}. When the "
                "file is read, these are two weights, which learn apart, and the optimizer's state does not fit"
                + ("." if by_config else ", unless the code of your layers makes them one again."),
                _tie_holders(context, variable, holders),
            )


def _is_within(place: str, other: str) -> bool:
    """Whether one of two entries is of an object inside of the other's: a layer that keeps a weight of its part."""
    (one, first, _), (two, second, _) = place.rpartition("vars/"), other.rpartition("vars/")
    return bool(first and second) and (one.startswith(two) or two.startswith(one))


def _is_made_by_config(context: Context, layer: keras.Layer) -> bool:
    """Whether a layer comes out of a file by its own config alone, so that no code shares its variable again."""
    parents = context.parents.get(id(layer), [])
    return bool(parents) and all(keras_seam.holds_its_layers_configs(parent) for parent in parents)


def _tie_holders(context: Context, variable: keras.Variable, holders: list[tuple[keras.Layer, keras.Variable]]) -> str:
    paths = [context.use_path(layer, held) for layer, held in holders]
    if len(paths) < 2:
        return "# let one layer store the weight, and tie the others to it by `tether.tie`"
    return "\n".join(f"tether.tie(model, {{{path!r}: tether.weight_of(model, {paths[0]!r})}})" for path in paths[1:])


@rule("quantized-beside-float", "a layer whose quantised weight was shared, beside a user that is not", file=True)
def quantized_beside_float(context: Context) -> Iterator[Finding]:
    """Quantising replaces the weight of one layer by integers of its own: it no longer follows the other."""
    if context.file is None:
        for layer, _, slot in context.tied:
            if layer.quantization_mode is not None:
                yield Finding(
                    "quantized-beside-float",
                    "error",
                    f"{context.path_of(layer)}/{slot.view.use.name}",
                    f"The layer is quantised ({layer.quantization_mode}) and computes with integers of its own, not "
                    f"with {slot.view.expression.notation()}, which it is tied to.",
                    "plain = tether.materialize(model)  # of the model before; then plain.quantize('int8')",
                )
    weights = [weight for weight in context.weights if weight.place in context.values and len(weight.shape) > 1]
    kinds = ["int" in weight.dtype for weight in weights]
    values: list[Readable] = [context.values[weight.place] for weight in weights]
    for found in alike(values, ROUNDED, lambda first, second: kinds[first] != kinds[second]):
        first, second = weights[found.first], weights[found.second]
        rounded, other = (first, second) if kinds[found.first] else (second, first)
        yield Finding(
            "quantized-beside-float",
            "warning",
            context.name_of(rounded),
            f"It is {context.name_of(other)!r}{'' if found.in_order else ' transposed'}, rounded to {rounded.dtype} "
            f"(a correlation of {found.correlation:.3f}). One layer was quantised and the other was not: they no "
            "longer share the weight, and take more memory than before.",
            "model.quantize('int8')  # all users of the weight, or none",
        )


# --------------------------------------------------------------------------- pairs


Pair = tuple[StoredWeight, StoredWeight, Likeness]


def equal_pairs(context: Context) -> list[Pair]:
    """The pairs of stored floating-point weights that are equal up to an order of axes and a factor.

    Of several that are equal, each is paired with the first one only.
    """
    weights = [w for w in context.weights if keras_seam.is_float(w.dtype) and w.place in context.values]
    values: list[Readable] = [context.values[weight.place] for weight in weights]
    found: list[Pair] = []
    paired: set[int] = set()
    likenesses = alike(values, NEARLY, lambda first, second: True)
    for likeness in sorted(likenesses, key=lambda likeness: (likeness.first, likeness.second)):
        first, second = weights[likeness.first], weights[likeness.second]
        if likeness.first in paired or likeness.second in paired:
            continue
        if is_equal(
            values[likeness.first], values[likeness.second], likeness, sample_tolerance(first.dtype, second.dtype)
        ):
            paired.add(likeness.second)
            found.append((first, second, likeness))
    return found


def _copies(context: Context) -> Iterator[Finding]:
    soft = _softly_tied(context)
    of_one_seed: dict[tuple[str, ...], list[Pair]] = {}
    for pair in context.once(equal_pairs):
        first, second, _ = pair
        if frozenset({first.place, second.place}) in soft:
            continue
        if all(_is_at_its_start(context, context.variables[weight.place]) for weight in (first, second)):
            kind = tuple(part for weight in (first, second) for part in context.name_of(weight).split("/")[-2:])
            of_one_seed.setdefault(kind, []).append(pair)
        elif first.trainable != second.trainable:
            what = "One of them trains and the other does not: a copy that was meant as one is right as it is."
            yield _copied(context, pair, "hint", what)
        else:
            yield _copied(context, pair, "warning", "Copies part with the next step of training.")
    for pairs in of_one_seed.values():
        what = "Both were started by initializers of one seed, so their layers begin as copies of each other."
        others = [context.name_of(second) for _, second, _ in pairs[1:]]
        what += f" The same goes for {', '.join(others)}." if others else ""
        yield _copied(context, pairs[0], "hint", what, "\n# or, if they are two weights, give each a seed of its own")


def _copied(context: Context, pair: Pair, severity: Severity, what: str, mend: str = "") -> Finding:
    first, second, found = pair
    one, other = context.variables[first.place], context.variables[second.place]
    why = f"It has the values of {context.name_of(first)!r}{in_words(found.axes, found.scale)} and is not tied to it."
    layer, held = next(iter(context.uses(other)), (None, None))
    path = context.name_of(second) if layer is None else context.use_path(layer, held)
    tie = f"tether.tie(model, {{{path!r}: {arranged(context.weight_code(one), found.axes, found.scale)}}})"
    return Finding("equal-weights", severity, context.name_of(second), f"{why} {what}", tie + mend)


def _is_at_its_start(context: Context, variable: keras.Variable) -> bool:
    """Whether a variable still holds what its layer's seeded initializer gives."""
    layer, _ = next(iter(context.uses(variable)), (None, None))
    initializer = getattr(layer, f"{variable.name}_initializer", None)
    if not isinstance(getattr(initializer, "seed", None), int):
        return False
    try:
        start = initializer(tuple(variable.shape), dtype=keras_seam.stored_dtype(variable))  # type: ignore[misc]
    except Exception:  # an initializer of the user's own may refuse to start anything twice
        return False
    value = keras_seam.on_host(keras_seam.stored_value(variable))
    return bool(np.array_equal(keras.ops.convert_to_numpy(start), value))


def _softly_tied(context: Context) -> set[frozenset[str]]:
    """The pairs of weights that a soft tie keeps close: two of them on purpose."""
    found = set()
    for layer in context.layers:
        state = state_of(layer)
        for penalty in state.penalties if state is not None else ():
            for a in penalty.a.weights_used():
                for b in penalty.b.weights_used():
                    pair = [context.weight_of(w.variable) for w in (a, b) if w.is_built]
                    found.add(frozenset(weight.place for weight in pair if weight is not None))
    return found


def _mend_file(context: Context) -> str:
    name = context.file.name if context.file is not None else ""
    return (
        f"model = keras.saving.load_model({name!r})\n"
        "print(tether.check(model))  # says how to tie them; then save the model again"
    )

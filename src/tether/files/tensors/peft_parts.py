"""What each kind of PEFT adapter adds to a weight: the form that makes the same, and its values from the tensors.

PEFT's base is PyTorch's: a `Linear` stores outputs first, a convolution outputs, inputs, window; Tether has Keras's
layout, with outputs last. So each tensor comes with the way in which it is turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from tether import ops
from tether.errors import InvalidConfig, ShapeMismatch, Unsupported, received
from tether.files.loading.entries import Entry
from tether.files.tensors.peft_config import PeftConfig
from tether.forms.dora import Dora
from tether.forms.form import AddedForm, from_matrix, part
from tether.forms.full import full
from tether.forms.hadamard import hadamard
from tether.forms.low_rank import low_rank
from tether.forms.rows import rows
from tether.forms.vera import Vera, vera
from tether.kinds import letters_of
from tether.layers.family.named import Named
from tether.layers.pieces import takes_dropout
from tether.types import Array
from tether.weights.expression import Expression, Shape

Made = Callable[[Expression], Expression]
"""Makes what the layer computes with, of what it had."""


@dataclass(frozen=True)
class Value:
    """A tensor of the file for a weight that a form has made, and how it is turned."""

    entry: Entry
    expected: Shape
    """The shape that the tensor has to have."""
    turned: Callable[[Array], Array]


@dataclass(frozen=True)
class Addition:
    """What an adapter does to one weight."""

    form: Made
    values: tuple[Value | None, ...]
    """For each weight that the form makes, in the order of the expression; `None` keeps its start."""
    whole: bool = False
    """Whether the value stands in for the base's, rather than being made of it."""


@dataclass(frozen=True)
class Place:
    """A weight of the model that may have a part, and what a PEFT folder calls its module and the parameter in it."""

    named: Named
    modules: tuple[str, ...]
    leaf: str
    inputs: int | None
    whole: bool = True
    """Whether the parameter is the weight and nothing else: not so where query, key and value are one tensor."""

    @property
    def is_convolution(self) -> bool:
        """Whether it is the kernel of a convolution, which PyTorch keeps with its window last."""
        return isinstance(self.named.layer, keras.layers.Layer) and _is_convolution(self.named.layer)

    def rows(self, inputs: int, outputs: int) -> int:
        """How many leading axes of the weight are inputs, if it has as many inputs and outputs as a file says."""
        shape = self.named.shape
        fits = [n for n in range(1, len(shape)) if (math.prod(shape[:n]), math.prod(shape[n:])) == (inputs, outputs)]
        if self.is_convolution:
            fits = [n for n in fits if n == len(shape) - 1]
        if not fits or (self.inputs is not None and self.inputs not in fits):
            raise ShapeMismatch(
                f"{self.named.name} has shape {shape}; the adapter's factors make {(inputs, outputs)}, inputs first."
            )
        return fits[0] if self.inputs is None else self.inputs


def _leading_inputs(layer: keras.Layer) -> int | None:
    """How many leading axes of the kernel of an EinsumDense are inputs, as its equation says."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    _, kernel, outputs = letters_of(layer.equation)
    return sum(letter not in outputs for letter in kernel) or None


def _is_convolution(layer: keras.Layer) -> bool:
    return isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D))


def as_stored(place: Place) -> tuple[Shape, Callable[[Array], Array], Callable[[Array], Array]]:
    """The shape of a whole weight in PyTorch, how it is turned to the model's, and back."""
    shape = place.named.shape
    if place.leaf != "weight" or len(shape) < 2 or isinstance(place.named.layer, keras.layers.Embedding):
        stored = (math.prod(shape),) if place.leaf == "bias" else shape
        return stored, lambda array: array.reshape(shape), lambda array: array.reshape(stored)
    if place.is_convolution:
        window = len(shape) - 2
        order = (*range(2, window + 2), 1, 0)
        back = (window + 1, window, *range(window))
        stored = tuple(shape[axis] for axis in back)
        return stored, lambda array: array.transpose(order), lambda array: np.ascontiguousarray(array.transpose(back))
    inputs = place.inputs or _leading_inputs(place.named.layer) or len(shape) - 1
    stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    return (
        stored,
        lambda array: array.T.reshape(shape),
        lambda array: np.ascontiguousarray(array.reshape(stored[::-1]).T),
    )


# --------------------------------------------------------------------------- LoRA and DoRA


def lora(place: Place, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · B A`, and with lengths `m · (W + s · B A) / ‖W + s · B A‖`."""
    table = "embedding_A" in found
    a, b = (_named(found, module, name) for name in (("embedding_A", "embedding_B") if table else ("A", "B")))
    window = a.shape[2:]
    rank = config.rank(module)
    if not a.shape[0] == b.shape[1] == rank or math.prod(b.shape[2:]) != 1:
        raise InvalidConfig(
            f"The factors of {module!r} have another rank than the config. {received(A=a.shape, B=b.shape, r=rank)}"
        )
    shape = place.named.shape
    if window and (not place.is_convolution or shape[:-2] != window):
        raise ShapeMismatch(
            f"{place.named.name} has shape {shape}; the adapter's first factor is that of a convolution with the "
            f"window {window}. {received(A=a.shape)}"
        )
    split = place.rows(math.prod(a.shape[1:]), b.shape[0])
    first = Value(a, a.shape, lambda array: array.transpose((*range(2, array.ndim), 1, 0)))
    second = Value(b, b.shape, lambda array: array.reshape(array.shape[:2]).T)
    dropout = config.dropout if takes_dropout(place.named.layer) else 0.0  # PEFT has none on tables
    has_lengths = "magnitude_vector" in found
    product = low_rank(
        rank,
        alpha=config.alpha(module),
        rank_stabilized=bool(config["use_rslora"]),
        start=config.start,
        split=split,
        dropout=0.0 if has_lengths else dropout,
    )
    state: tuple[None, ...] = (None,) if dropout else ()
    taken_off: tuple[None, ...] = (None, None) if config.start != "zeros" else ()
    if not has_lengths:
        return Addition(product, (first, second, *state, *taken_off))
    lengths, columns = found["magnitude_vector"], shape[split:]
    last = Value(lengths, lengths.shape, lambda array: array.reshape(columns))
    return Addition(Dora(product, dropout), (first, second, *taken_off, last, *state))


def lora_bias(place: Place, module: str, entry: Entry, config: PeftConfig) -> Addition:
    """`b + s · v`: the second factor's own bias."""
    rank = config.rank(module)
    scale = config.alpha(module) / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Addition(_Shift(scale), (whole_value(place, entry),))


class _Shift(AddedForm):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def delta(self, base: Expression) -> Expression:
        return self.scale * part(base, "lora_bias", "zeros", base.shape)


FULL = full()
"""The form of a weight that was trained whole."""


def whole_value(place: Place, entry: Entry) -> Value:
    """A tensor that has a weight's whole value."""
    stored, turned, _ = as_stored(place)
    return Value(entry, stored, turned)


def tokens(place: Place, module: str, entry: Entry, config: PeftConfig) -> Addition:
    """Rows of a table that were trained by themselves."""
    asked = config["trainable_token_indices"]
    if isinstance(asked, Mapping):
        indices = next((each for name, each in asked.items() if module == name or module.endswith(f".{name}")), None)
    else:
        indices = asked
    if not indices:
        raise InvalidConfig(f"The config names no tokens for {module!r}, and the file has rows for them.")
    return Addition(rows(indices), (Value(entry, (len(indices), *place.named.shape[1:]), lambda array: array),))


# --------------------------------------------------------------------------- the others


def ia3(kernel: Place, bias: Place | None, module: str, entry: Entry, config: PeftConfig) -> dict[str, Addition]:
    """`W · s` for each output, with the bias; or for each input of a feed-forward module."""
    shape = kernel.named.shape
    forward = config.names_module("feedforward_modules", module)
    size = math.prod(entry.shape)
    inputs = next((n for n in range(1, len(shape)) if math.prod(shape[:n] if forward else shape[n:]) == size), None)
    if kernel.is_convolution:
        sides = shape[-2] if forward else shape[-1]
        inputs = len(shape) - 1 if sides == size else None
    if inputs is None:
        side = "inputs" if forward else "outputs"
        raise ShapeMismatch(f"{kernel.named.name} has shape {shape}; the adapter scales {size} {side}.")
    if kernel.is_convolution:
        sizes = (*(1 for _ in shape[:-2]), size, 1) if forward else (size,)
    else:
        sizes = (*shape[:inputs], *(1 for _ in shape[inputs:])) if forward else shape[inputs:]
    shared: list[Expression] = []

    def scaled(base: Expression) -> Expression:
        shared[:] = [part(base, "ia3", np.ones(sizes))]
        return base * shared[0]

    def scaled_bias(base: Expression) -> Expression:
        return base * shared[0]

    value = Value(entry, entry.shape, lambda array: array.reshape(sizes))
    found = {kernel.named.path: Addition(scaled, (value,))}
    if bias is not None and not forward:
        found[bias.named.path] = Addition(scaled_bias, (value,))
    return found


def loha(place: Place, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · (A₁ B₁) ∘ (A₂ B₂)`."""
    if "hada_t1" in found:
        raise Unsupported(f"The LoHa of {module!r} has factors of its own for the window, which Tether does not read.")
    ours = [_named(found, module, name) for name in ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")]
    first, last = ours[0], ours[1]
    split = place.rows(first.shape[1], last.shape[0])
    rank = config.rank(module)
    shapes = [(rank, first.shape[1]), (last.shape[0], rank)] * 2
    values = tuple(
        Value(entry, shape, _rows_turned(place, split, n % 2 == 0))
        for n, (entry, shape) in enumerate(zip(ours, shapes, strict=True))
    )
    return Addition(hadamard(rank, alpha=config.alpha(module), split=split), values)


def _rows_turned(place: Place, split: int, is_first: bool) -> Callable[[Array], Array]:
    """A factor outputs first, inputs first; the inputs of a convolution, channels before the window, the other way."""
    if not is_first or not place.is_convolution:
        return lambda array: array.T
    *window, channels = place.named.shape[:split]
    order = (*range(2, len(window) + 2), 1, 0)

    def turned(array: Array) -> Array:
        return array.reshape(len(array), channels, *window).transpose(order).reshape(-1, len(array))

    return turned


def lokr(place: Place, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · C ⊗ D`, where D may be a product."""
    others = sorted(set(found) - {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    if others:
        raise Unsupported(f"The LoKr of {module!r} has the tensor {others[0]!r}, which Tether does not read.")
    if place.is_convolution:
        raise Unsupported(f"The LoKr of {module!r} is that of a convolution, which Tether does not read.")
    small = _named(found, module, "lokr_w1")
    large = [found[name] for name in ("lokr_w2_b", "lokr_w2_a", "lokr_w2") if name in found]
    if not large or any(len(each.shape) != 2 for each in (small, *large)) or (len(large) == 3):
        raise InvalidConfig(f"The LoKr of {module!r} has one small and one large matrix of two axes, or a product.")
    n2, m2 = large[0].shape[1], large[-1].shape[0]
    split = place.rows(small.shape[1] * n2, small.shape[0] * m2)
    scale = config.alpha(module) / config.rank(module)
    values = tuple(Value(entry, entry.shape, lambda array: array.T) for entry in (small, *large))
    return Addition(_Kronecker(split, small.shape, [each.shape for each in large], scale), values)


class _Kronecker(AddedForm):
    """As `tether.forms.kronecker`, with the sizes that a file has."""

    def __init__(self, split: int, small: Shape, large: Sequence[Shape], scale: float) -> None:
        self.split, self.small, self.large, self.scale = split, small, large, scale

    def delta(self, base: Expression) -> Expression:
        shape = base.shape or ()
        rows, columns = shape[: self.split], shape[self.split :]
        small = part(base, "lokr_c", "zeros", self.small[::-1])
        names = ["lokr_d"] if len(self.large) == 1 else ["lokr_a", "lokr_b"]
        made = [part(base, name, "zeros", each[::-1]) for name, each in zip(names, self.large, strict=True)]
        large = made[0] if len(made) == 1 else made[0] @ made[1]
        product = ops.einsum("ab,cd->acbd", small, large).reshape(math.prod(rows), math.prod(columns))
        return from_matrix(product if self.scale == 1 else self.scale * product, rows, columns)


def vera_family(
    modules: Mapping[str, tuple[Place, Mapping[str, Entry]]], shared: Mapping[str, Entry], config: PeftConfig
) -> dict[str, Addition]:
    """`W + (A · d)(B · b)`, with A and B that all modules share: in the file, or drawn again from its seed."""
    sizes = {}
    rank = int(config["r"])
    for module, (place, found) in modules.items():
        outputs = math.prod(_named(found, module, "vera_lambda_b").shape)
        sizes[module] = (math.prod(place.named.shape) // outputs, outputs)
    n, m = (max(each[side] for each in sizes.values()) for side in (0, 1))
    if shared:
        a, b = (_named(shared, "the model", name) for name in ("vera_A", "vera_B"))
        n, m = a.shape[-1], b.shape[0]
        bases = [Value(a, (rank, n), lambda array: array.T), Value(b, (m, rank), lambda array: array.T)]
    else:
        drawn = _drawn(int(config["projection_prng_key"] or 0), (rank, n), (m, rank))
        bases = [_drawn_value(name, array) for name, array in zip(("vera_A", "vera_B"), drawn, strict=True)]
    additions: dict[str, Addition] = {}
    forms: dict[tuple[int, float], Vera] = {}
    for module, (place, found) in modules.items():
        split = place.rows(*sizes[module])
        dropout = config.dropout if takes_dropout(place.named.layer) else 0.0
        form = forms.setdefault((split, dropout), vera(rank, size=(n, m), split=split, dropout=dropout))
        d, b = _named(found, module, "vera_lambda_d"), _named(found, module, "vera_lambda_b")
        additions[place.named.path] = Addition(
            _OfFamily(form, forms),
            (
                bases[0],
                Value(d, (rank,), lambda array: array),
                bases[1],
                Value(b, (sizes[module][1],), lambda array: array),
                *((None,) if dropout else ()),
            ),
        )
    return additions


def _drawn_value(name: str, array: Array) -> Value:
    return Value(Entry(name, array.shape, "float32", lambda: array), array.shape, lambda array: array.T)


class _OfFamily(AddedForm):
    """One of several forms that share their random matrices: each splits weights at another axis."""

    def __init__(self, form: Vera, family: Mapping[tuple[int, float], Vera]) -> None:
        self.form, self.family = form, family

    def delta(self, base: Expression) -> Expression:
        self.form._bases = next((each._bases for each in self.family.values() if each._bases is not None), None)
        return self.form.delta(base)


def _drawn(seed: int, *shapes: tuple[int, int]) -> list[Array]:
    """The matrices that PyTorch draws from a seed, uniformly for a gain of √2, one after the other.

    Its generator is the Mersenne twister, and a float32 has the lower 24 bits of a draw.
    """
    random = np.random.RandomState(seed & 0xFFFFFFFF)
    found = []
    for shape in shapes:
        draws = (random.randint(0, 1 << 32, math.prod(shape), "uint32") & ((1 << 24) - 1)).astype(
            "float32"
        ) * np.float32(2.0**-24)
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
        found.append((draws * np.float32(2 * bound) - np.float32(bound)).reshape(shape))
    return found


def _named(found: Mapping[str, Entry], module: str, name: str) -> Entry:
    if name not in found:
        raise InvalidConfig(f"The adapter has no tensor {name!r} for {module!r}; it has {', '.join(found) or 'none'}.")
    return found[name]


__all__ = ["FULL", "Addition", "Place", "Value"]

"""What each kind of PEFT adapter adds to a weight: the form that makes the same, and its values from the tensors.

A folder has PyTorch's layouts (`peft_places`), so each tensor comes with the way in which it is turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tether.errors import InvalidConfig, ShapeMismatch, Unsupported, received
from tether.files.loading.entries import Entry
from tether.files.peft.peft_config import PeftConfig
from tether.files.peft.peft_places import PeftPlace, as_stored
from tether.forms.boft import Boft
from tether.forms.dora import Dora, lengths_of
from tether.forms.dropout import OutputDropout, takes_dropout
from tether.forms.form import AddedForm, part
from tether.forms.fourier import Fourier, waves_of
from tether.forms.full import full, whole_of
from tether.forms.hadamard import Hadamard, pairs_of
from tether.forms.kronecker import Kronecker, Sizes, matrices_of
from tether.forms.low_rank import low_rank, number_before, products_of, stored_behind
from tether.forms.oft import Oft, size_of, turned_of
from tether.forms.rows import rows, rows_of
from tether.forms.scale import scaled_of
from tether.forms.vera import DrawnByTorch, Vera, vectors_of, vera
from tether.types import Array
from tether.weights.expression import Expression, Shape
from tether.weights.weight import Weight

Made = Callable[[Expression], Expression]
"""Makes what the layer computes with, of what it had."""


@dataclass(frozen=True)
class MappedValue:
    """A tensor of the file for a weight that a form has made, and how it is turned."""

    entry: Entry
    expected: Shape
    """The shape that the tensor has to have."""
    turned: Callable[[Array], Array]
    numbers: int | None = None
    """How many numbers are left once it is turned, if not all."""


@dataclass(frozen=True)
class Addition:
    """What an adapter does to one weight."""

    form: Made
    values: tuple[MappedValue | None, ...]
    """For each weight that the form makes, in the order of the expression; `None` keeps its start."""
    whole: bool = False
    """Whether the value stands in for the base's, rather than being made of it."""


# --------------------------------------------------------------------------- LoRA and DoRA


def lora(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
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
    first = MappedValue(a, a.shape, lambda array: array.transpose((*range(2, array.ndim), 1, 0)))
    second = MappedValue(b, b.shape, lambda array: array.reshape(array.shape[:2]).T)
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
    last = MappedValue(lengths, lengths.shape, lambda array: array.reshape(columns))
    return Addition(Dora(product, dropout), (first, second, *taken_off, last, *state))


def lora_bias(place: PeftPlace, module: str, entry: Entry, config: PeftConfig) -> Addition:
    """`b + s · v`: the second factor's own bias."""
    rank = config.rank(module)
    scale = config.alpha(module) / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Addition(_Shift(scale), (whole_value(place, entry),))


def shift_of(added: Expression) -> Weight | None:
    """The stored vector of what is added to a bias, by the scale of its module; `None` if it is something else."""
    found = stored_behind(number_before(added)[1])
    return found if found is not None and found.role == "part" else None


class _Shift(AddedForm):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def delta(self, base: Expression) -> Expression:
        return self.scale * part(base, "lora_bias", "zeros", base.shape)


FULL = full()
"""The form of a weight that was trained whole."""


def whole_value(place: PeftPlace, entry: Entry) -> MappedValue:
    """A tensor that has a weight's whole value."""
    stored, turned, _ = as_stored(place)
    return MappedValue(entry, stored, turned)


def tokens(place: PeftPlace, module: str, entry: Entry, config: PeftConfig) -> Addition:
    """Rows of a table that were trained by themselves."""
    asked = config["trainable_token_indices"]
    if isinstance(asked, Mapping):
        indices = next((each for name, each in asked.items() if module == name or module.endswith(f".{name}")), None)
    else:
        indices = asked
    if not indices:
        raise InvalidConfig(f"The config names no tokens for {module!r}, and the file has rows for them.")
    return Addition(rows(indices), (MappedValue(entry, (len(indices), *place.named.shape[1:]), lambda array: array),))


# --------------------------------------------------------------------------- the others


def ia3(
    kernel: PeftPlace, bias: PeftPlace | None, module: str, entry: Entry, config: PeftConfig
) -> dict[str, Addition]:
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

    value = MappedValue(entry, entry.shape, lambda array: array.reshape(sizes))
    found = {kernel.named.path: Addition(scaled, (value,))}
    if bias is not None and not forward:
        found[bias.named.path] = Addition(scaled_bias, (value,))
    return found


def loha(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · (A₁ B₁) ∘ (A₂ B₂)`."""
    if "hada_t1" in found:
        raise Unsupported(f"The LoHa of {module!r} has factors of its own for the window, which Tether does not read.")
    ours = [_named(found, module, name) for name in ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")]
    first, last = ours[0], ours[1]
    split = place.rows(first.shape[1], last.shape[0])
    rank = config.rank(module)
    shapes = [(rank, first.shape[1]), (last.shape[0], rank)] * 2
    *window, channels = place.named.shape[:split] if place.is_convolution else (first.shape[1],)
    turned = [_window_turned(channels, tuple(window)), lambda array: array.T] * 2
    values = tuple(MappedValue(*each) for each in zip(ours, shapes, turned, strict=True))
    form = Hadamard(rank, config.alpha(module), split, None, None, config.output_dropout)
    return Addition(form, (*values, *_state_of(form.dropout)))


def _state_of(dropout: OutputDropout) -> tuple[None, ...]:
    """The state of a dropout among the weights that a form makes: no tensor has it."""
    return (None,) if dropout.outputs or dropout.whole else ()


def _window_turned(channels: int, window: Shape) -> Callable[[Array], Array]:
    """A factor outputs first, inputs first; the inputs of a convolution, channels before the window, the other way."""
    order = (*range(2, len(window) + 2), 1, 0)

    def turned(array: Array) -> Array:
        return array.reshape(len(array), channels, *window).transpose(order).reshape(-1, len(array))

    return turned


def lokr(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · C ⊗ D`, where D may be a product; of a convolution, C divides the channels alone."""
    others = sorted(set(found) - {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})
    if others:
        raise Unsupported(f"The LoKr of {module!r} has the tensor {others[0]!r}, which Tether does not read.")
    small = _named(found, module, "lokr_w1")
    large = [found[name] for name in ("lokr_w2_b", "lokr_w2_a", "lokr_w2") if name in found]
    window = place.named.shape[:-2] if place.is_convolution else ()
    whole = len(large) == 1 and len(large[0].shape) == 2 + len(window)
    if len(small.shape) != 2 or not (whole or (len(large) == 2 and all(len(each.shape) == 2 for each in large))):
        raise InvalidConfig(f"The LoKr of {module!r} has one small and one large matrix, or a product for the large.")
    size = math.prod(large[0].shape[1:])
    if size % math.prod(window):
        raise ShapeMismatch(f"{module!r} has the window {window}. {received(shape=large[0].shape)}")
    sizes = Sizes(
        (small.shape[1], small.shape[0]),
        (size // math.prod(window), large[-1].shape[0]),
        None if whole else large[-1].shape[1],
        window,
        turned_there(window, whole=whole),
    )
    split = place.rows(small.shape[1] * size, small.shape[0] * sizes.large[1])
    turned = _window_turned(sizes.large[0], window)
    ways = [lambda array: array.T, turned, lambda array: array.T]
    values = tuple(MappedValue(entry, entry.shape, way) for entry, way in zip((small, *large), ways, strict=False))
    rank = config.rank(module)
    agree = 2 * rank >= max(sizes.large) if whole else large[0].shape[0] == sizes.inner == rank
    if not agree:
        raise InvalidConfig(
            f"The factors of {module!r} have another rank than the config. "
            f"{received(shapes=[each.shape for each in large], r=rank)}"
        )
    form = _Sized(sizes, rank, config.alpha(module), split, config.output_dropout)
    return Addition(form, (*values, *_state_of(form.dropout)))


def turned_there(window: Shape, *, whole: bool) -> bool:
    """Whether PEFT has the two matrices of a LoKr the other way round: as it does with a window of one axis."""
    return whole and len(window) == 1


class _Sized(Kronecker):
    """A Kronecker product with the sizes that a file has."""

    def __init__(self, sizes: Sizes, rank: int, alpha: float, split: int, dropout: OutputDropout) -> None:
        super().__init__(rank, alpha, None, split, None, None, dropout)
        self._sizes = sizes

    def sizes(self, rows: Shape, columns: Shape) -> Sizes:
        return self._sizes


def vera_family(
    modules: Mapping[str, tuple[PeftPlace, Mapping[str, Entry]]], shared: Mapping[str, Entry], config: PeftConfig
) -> dict[str, Addition]:
    """`W + (A · d)(B · b)`, with A and B that all modules share: in the file, or drawn again from its seed."""
    sizes = {}
    rank = int(config["r"])
    for module, (place, found) in modules.items():
        outputs = math.prod(_named(found, module, "vera_lambda_b").shape)
        sizes[module] = (math.prod(place.named.shape) // outputs, outputs)
    n, m = (max(each[side] for each in sizes.values()) for side in (0, 1))
    bases: tuple[MappedValue | None, ...] = (None, None)
    starts = None
    if shared:
        a, b = (_named(shared, "the model", name) for name in ("vera_A", "vera_B"))
        n, m = a.shape[-1], b.shape[0]
        bases = MappedValue(a, (rank, n), lambda array: array.T), MappedValue(b, (m, rank), lambda array: array.T)
    else:
        seed = int(config["projection_prng_key"] or 0)
        starts = DrawnByTorch(seed), DrawnByTorch(seed, rank * n)
    additions: dict[str, Addition] = {}
    forms: dict[tuple[int, float], Vera] = {}
    for module, (place, found) in modules.items():
        split = place.rows(*sizes[module])
        dropout = config.dropout if takes_dropout(place.named.layer) else 0.0
        form = forms.setdefault((split, dropout), vera(rank, size=(n, m), split=split, dropout=dropout))
        form.starts = starts
        d, b = _named(found, module, "vera_lambda_d"), _named(found, module, "vera_lambda_b")
        additions[place.named.path] = Addition(
            _OfFamily(form, forms),
            (
                bases[0],
                MappedValue(d, (rank,), lambda array: array),
                bases[1],
                MappedValue(b, (sizes[module][1],), lambda array: array),
                *((None,) if dropout else ()),
            ),
        )
    return additions


class _OfFamily(AddedForm):
    """One of several forms that share their random matrices: each splits weights at another axis."""

    def __init__(self, form: Vera, family: Mapping[tuple[int, float], Vera]) -> None:
        self.form, self.family = form, family

    def delta(self, base: Expression) -> Expression:
        self.form._bases = next((each._bases for each in self.family.values() if each._bases is not None), None)
        return self.form.delta(base)


# --------------------------------------------------------------------------- rotations and waves


def oft(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`R W`, with R in blocks that turn the inputs."""
    entry = _named(found, module, "oft_R")
    inputs = _inputs_of_matrix(place, module, config)
    size = size_of(entry.shape[-1]) if len(entry.shape) == 2 else None
    if size is None:
        raise InvalidConfig(f"The rotations of {module!r} are upper triangles. {received(shape=entry.shape)}")
    if inputs % size or entry.shape[0] not in (1, inputs // size):
        raise ShapeMismatch(
            f"{place.named.name} has {inputs} inputs, and the adapter {entry.shape[0]} blocks of {size}."
        )
    share = entry.shape[0] == 1 != inputs // size
    by_series = bool(config["use_cayley_neumann"])
    terms = int(config["num_cayley_neumann_terms"]) if by_series else None
    sign = 1 if by_series else -1  # PEFT's series and its inverse turn opposite ways
    return Addition(
        Oft(size, share, terms, place.split, None), (MappedValue(entry, entry.shape, lambda array: sign * array),)
    )


def boft(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`(M_m ⋯ M₁ W) · s`, of whole matrices, whose skew-symmetric part counts."""
    entry, scale = (_named(found, module, name) for name in ("boft_R", "boft_s"))
    inputs = _inputs_of_matrix(place, module, config)
    factors, count, size, _ = entry.shape if len(entry.shape) == 4 else (0, 0, 0, 0)
    if not factors or entry.shape[3] != size or size < 2 or config["boft_block_size"] not in (None, 0, size):
        raise InvalidConfig(
            f"The rotations of {module!r} are square matrices of the size that the config says. "
            f"{received(shape=entry.shape, boft_block_size=config['boft_block_size'])}"
        )
    columns = place.named.shape[place.split :]
    if count * size != inputs:
        raise ShapeMismatch(f"{place.named.name} has {inputs} inputs, and the adapter {count} blocks of {size}.")
    upper = np.triu_indices(size, 1)

    def turned(array: Array) -> Array:
        halves = 0.5 * (array.swapaxes(-1, -2) - array)
        return halves.reshape(-1, size, size)[:, *upper]

    values = (
        MappedValue(entry, entry.shape, turned, factors * count * len(upper[0])),
        MappedValue(scale, (math.prod(columns), 1), lambda array: array.reshape(columns)),
    )
    return Addition(Boft(size, factors, place.split, None), values)


def fourier(place: PeftPlace, module: str, found: Mapping[str, Entry], config: PeftConfig) -> Addition:
    """`W + s · Re(F⁻¹ S)`, with S zero but at places that a seed chooses."""
    entry = _named(found, module, "fourierft_spectrum")
    inputs = _inputs_of_matrix(place, module, config)
    size = math.prod(place.named.shape)
    if len(entry.shape) != 1 or not 0 < entry.shape[0] <= size:
        raise ShapeMismatch(
            f"{place.named.name} of {inputs} inputs has {size} frequencies. {received(shape=entry.shape)}"
        )
    counts = {config["n_frequency"], *(config["n_frequency_pattern"] or {}).values()} - {None}
    if counts and entry.shape[0] not in counts:
        raise InvalidConfig(
            f"{module!r} has another number of frequencies than the config says. "
            f"{received(shape=entry.shape, n_frequency=config['n_frequency'])}"
        )
    form = Fourier(entry.shape[0], float(config["scaling"]), int(config["random_loc_seed"]), place.split, None)
    return Addition(form, (MappedValue(entry, entry.shape, lambda array: array),))


def _inputs_of_matrix(place: PeftPlace, module: str, config: PeftConfig) -> int:
    """How many inputs a module has that is no convolution and no table."""
    if place.is_convolution or place.is_table or len(place.named.shape) < 2:
        raise Unsupported(
            f"{module!r} is {place.named.name!r}, whose {config.kind} Tether does not read: it reads that of matrices."
        )
    return math.prod(place.named.shape[: place.split])


Builder = Callable[[PeftPlace, str, Mapping[str, Entry], PeftConfig], Addition]
BUILDERS: dict[str, Builder] = {"LOHA": loha, "LOKR": lokr, "OFT": oft, "BOFT": boft, "FOURIERFT": fourier}
"""What reads a module by itself, by the kind."""


def is_part(added: Expression) -> bool:
    """Whether a part is one of those that a folder may have."""
    known: tuple[Callable[[Expression], object | None], ...] = (
        products_of, lengths_of, whole_of, rows_of, shift_of, scaled_of, pairs_of, matrices_of, vectors_of,
        waves_of, turned_of,
    )  # fmt: skip
    return any(of(added) is not None for of in known)


def _named(found: Mapping[str, Entry], module: str, name: str) -> Entry:
    if name not in found:
        raise InvalidConfig(f"The adapter has no tensor {name!r} for {module!r}; it has {', '.join(found) or 'none'}.")
    return found[name]


__all__ = ["FULL", "Addition", "MappedValue"]

"""Every form of a weight with the facts that hold for it, for the tests that all of them must pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

import tether
from tether import forms

ROWS, COLUMNS = 6, 4
MASK = np.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1]], dtype=bool)


@dataclass
class Case:
    """A form, and what is true of it."""

    make: Callable[[], Any]
    value: Callable[..., Any]
    """The value in NumPy: of the base and the form's own weights by what their names add."""
    notation: str
    trains: frozenset[str] = frozenset()
    """Its own weights that train."""
    holds: frozenset[str] = frozenset()
    """Its own weights that do not."""
    starts_equal: bool = True
    reparametrizes: bool = False
    """Whether the base is what trains, and is not frozen as a parent would be."""
    shape: tuple[int, int] = (ROWS, COLUMNS)
    good: Callable[..., Any] | None = None
    """A value that can be assigned, from a generator; `None` where there is no inverse."""
    bad: Callable[..., Any] | None = None
    """A value of the right shape that cannot."""
    any_axes: bool = True
    """Whether weights of more axes can have it."""
    own: dict[str, Callable[..., Any]] = field(default_factory=dict)
    """Values for own weights that are not any numbers."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norms(w):
    return np.sqrt((w**2).sum(axis=0))


def softplus(x):
    return np.log1p(np.exp(x))


def mirrored(x):
    return np.triu(x) + np.triu(x, 1).T


def reflections(x):
    """The product of Householder reflections, one after another, as their definition has it."""
    if x.shape[0] < x.shape[1]:
        return reflections(x.T).T
    n, k = x.shape
    q = np.eye(n)
    for i in range(k):
        y = np.zeros(n)
        y[i], y[i + 1 :] = 1, x[i + 1 :, i]
        q = q @ (np.eye(n) - 2 * np.outer(y, y) / (y @ y))
    return q[:, :k] * np.where(np.diagonal(x) < 0, -1, 1)


def cayley(x, before):
    """The Cayley map by its definition."""
    if x.shape[0] < x.shape[1]:
        return cayley(x.T, before).T
    n, k = x.shape
    lower = np.zeros((n, n))
    lower[:, :k] = np.tril(x)
    a = lower - lower.T
    return before @ np.linalg.inv(np.eye(n) - a / 2) @ (np.eye(n) + a / 2)[:, :k]


def orthogonal_value(rng, shape):
    q = np.linalg.qr(rng.normal(size=(max(shape), min(shape))))[0]
    return q.T if shape[0] < shape[1] else q


def any_value(rng, shape):
    return rng.normal(size=shape)


def turn(v, size, terms=None):
    """The rotation of an upper triangle: `(I + Q)(I - Q)⁻¹`, or the terms of its series that PEFT takes."""
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = v
    q -= q.T
    eye = np.eye(size)
    if terms == 5:
        return eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return (eye + q) @ np.linalg.inv(eye - q)


def diagonal(matrices):
    """Matrices along the diagonal of one."""
    size = len(matrices[0])
    whole = np.zeros((size * len(matrices),) * 2)
    for n, matrix in enumerate(matrices):
        whole[n * size : (n + 1) * size, n * size : (n + 1) * size] = matrix
    return whole


def butterfly(w, boft_q, boft_s):
    """Two factors of blocks of two: the second turns 0 with 2, 1 with 3, 4 with 6 and 5 with 7."""
    first, second = diagonal([turn(v, 2) for v in boft_q[:4]]), diagonal([turn(v, 2) for v in boft_q[4:]])
    p = np.eye(8)[[0, 2, 1, 3, 4, 6, 5, 7]]
    return p @ second @ p.T @ first @ w * boft_s


def wave(w, fourier_c):
    """The inverse transform of what stands where PyTorch's `randperm(24)` of the seed 777 begins."""
    spectrum = np.zeros((4, 6))
    spectrum.reshape(-1)[[23, 2, 19, 17, 1]] = fourier_c
    return w + 3 * np.fft.ifft2(spectrum).real.T


LORA = frozenset({"lora_a", "lora_b"})

CASES = {
    "low_rank": Case(
        lambda: forms.low_rank(2, alpha=4, seed=1),
        lambda w, lora_a, lora_b: w + 2 * lora_a @ lora_b,
        "w.stop_gradient() + 2.0 * (w_lora_a @ w_lora_b)",
        LORA,
    ),
    "low_rank, pissa": Case(
        lambda: forms.low_rank(2, start="pissa"),
        lambda w, lora_a, lora_b, pissa_a, pissa_b: w + lora_a @ lora_b - pissa_a @ pissa_b,
        "w.stop_gradient() + w_lora_a @ w_lora_b - w_pissa_a @ w_pissa_b",
        LORA,
        frozenset({"pissa_a", "pissa_b"}),
    ),
    "dora": Case(
        lambda: forms.dora(2, seed=1),
        lambda w, lora_a, lora_b, magnitude: magnitude * (w + lora_a @ lora_b) / norms(w + lora_a @ lora_b),
        "magnitude(w_magnitude, w.stop_gradient() + w_lora_a @ w_lora_b)",
        LORA | {"magnitude"},
    ),
    "low_rank, olora": Case(
        lambda: forms.low_rank(2, start="olora"),
        lambda w, lora_a, lora_b, pissa_a, pissa_b: w + lora_a @ lora_b - pissa_a @ pissa_b,
        "w.stop_gradient() + w_lora_a @ w_lora_b - w_pissa_a @ w_pissa_b",
        LORA,
        frozenset({"pissa_a", "pissa_b"}),
    ),
    "full": Case(
        forms.full,
        lambda w, full: w + (full - w),
        "w.stop_gradient() + 1.0 * (w_full - w.stop_gradient())",
        frozenset({"full"}),
    ),
    "rows": Case(
        lambda: forms.rows([4, 1]),
        lambda w, rows: np.stack([rows[{4: 0, 1: 1}[n]] if n in (4, 1) else row for n, row in enumerate(w)]),
        "where(rows([[1.0], [1.0]], [4, 1]), rows(w_rows, [4, 1]), w.stop_gradient())",
        frozenset({"rows"}),
        any_axes=False,
    ),
    "vera": Case(
        lambda: forms.vera(3, seed=1),
        lambda w, vera_d, vera_b, a, b: w + (a * vera_d) @ (b * vera_b),
        "w.stop_gradient() + (vera_bases.a * w_vera_d) @ (vera_bases.b * w_vera_b)",
        frozenset({"vera_d", "vera_b"}),
        frozenset({"a", "b"}),
    ),
    "vera, size": Case(
        lambda: forms.vera(3, size=(9, 7), seed=1),
        lambda w, vera_d, vera_b, a, b: w + (a[: len(w)] * vera_d) @ (b[:, : w.shape[1]] * vera_b),
        "w.stop_gradient() + (vera_bases.a[:6] * w_vera_d) @ (vera_bases.b[:, :4] * w_vera_b)",
        frozenset({"vera_d", "vera_b"}),
        frozenset({"a", "b"}),
        any_axes=False,
    ),
    "scale": Case(
        lambda: forms.scale(), lambda w, scale: w * scale, "w.stop_gradient() * w_scale", frozenset({"scale"})
    ),
    "scale, inputs": Case(
        lambda: forms.scale(axis=0), lambda w, scale: w * scale, "w.stop_gradient() * w_scale", frozenset({"scale"})
    ),
    "gate": Case(
        lambda: forms.gate(start=0.75),
        lambda w, gate, own: sigmoid(gate) * w + (1 - sigmoid(gate)) * own,
        "w.stop_gradient() + sigmoid(-w_gate) * (w_own - w.stop_gradient())",
        frozenset({"gate", "own"}),
    ),
    "gate, output": Case(
        lambda: forms.gate(per="output"),
        lambda w, gate, own: sigmoid(gate) * w + (1 - sigmoid(gate)) * own,
        "w.stop_gradient() + sigmoid(-w_gate) * (w_own - w.stop_gradient())",
        frozenset({"gate", "own"}),
    ),
    "masked": Case(
        lambda: forms.masked(MASK),
        lambda w: np.where(MASK, w, 0),
        "where(array[6, 4], w, 0.0)",
        starts_equal=False,
        reparametrizes=True,
        any_axes=False,
    ),
    "masked, parent": Case(
        lambda: forms.masked(MASK, outside="parent"),
        lambda w, own: np.where(MASK, own, w),
        "where(array[6, 4], w_own, w.stop_gradient())",
        frozenset({"own"}),
        any_axes=False,
    ),
    "hadamard": Case(
        lambda: forms.hadamard(2, alpha=4, seed=1),
        lambda w, loha_a1, loha_b1, loha_a2, loha_b2: w + 2 * (loha_a1 @ loha_b1) * (loha_a2 @ loha_b2),
        "w.stop_gradient() + 2.0 * (w_loha_a1 @ w_loha_b1 * (w_loha_a2 @ w_loha_b2))",
        frozenset({"loha_a1", "loha_b1", "loha_a2", "loha_b2"}),
    ),
    "kronecker": Case(
        lambda: forms.kronecker(seed=1),
        lambda w, lokr_c, lokr_d: w + np.kron(lokr_c, lokr_d),
        "w.stop_gradient() + einsum('ab,cd->acbd', w_lokr_c, w_lokr_d).reshape(6, 4)",
        frozenset({"lokr_c", "lokr_d"}),
    ),
    "kronecker, rank": Case(
        lambda: forms.kronecker(1, alpha=2, seed=1),
        lambda w, lokr_c, lokr_a, lokr_b: w + 2 * np.kron(lokr_c, lokr_a @ lokr_b),
        "w.stop_gradient() + 2.0 * einsum('ab,cd->acbd', w_lokr_c, w_lokr_a @ w_lokr_b).reshape(6, 4)",
        frozenset({"lokr_c", "lokr_a", "lokr_b"}),
    ),
    "oft": Case(
        lambda: forms.oft(3),
        lambda w, oft_q: diagonal([turn(v, 3) for v in oft_q]) @ w,
        "w.stop_gradient() + einsum('kij,kjo->kio', turn(w_oft_q), w.stop_gradient().reshape(2, 3, 4)).reshape(6, 4)",
        frozenset({"oft_q"}),
    ),
    "oft, terms": Case(
        lambda: forms.oft(3, terms=5),
        lambda w, oft_q: diagonal([turn(v, 3, terms=5) for v in oft_q]) @ w,
        "w.stop_gradient() + einsum('kij,kjo->kio', turn(w_oft_q, terms=5), "
        "w.stop_gradient().reshape(2, 3, 4)).reshape(6, 4)",
        frozenset({"oft_q"}),
        own={"oft_q": lambda rng: 0.2 * rng.normal(size=(2, 3))},
    ),
    "oft, share": Case(
        lambda: forms.oft(2, share=True),
        lambda w, oft_q: diagonal([turn(oft_q[0], 2)] * 3) @ w,
        "w.stop_gradient() + einsum('ij,kjo->kio', turn(w_oft_q).reshape(2, 2), "
        "w.stop_gradient().reshape(3, 2, 4)).reshape(6, 4)",
        frozenset({"oft_q"}),
    ),
    "boft": Case(
        lambda: forms.boft(3),
        lambda w, boft_q, boft_s: diagonal([turn(v, 3) for v in boft_q]) @ w * boft_s,
        "(w.stop_gradient() + einsum('kij,kjo->kio', turn(w_boft_q), w.stop_gradient().reshape(2, 3, 4))"
        ".reshape(6, 4)) * w_boft_s",
        frozenset({"boft_q", "boft_s"}),
    ),
    "boft, factors": Case(
        lambda: forms.boft(2, factors=2),
        butterfly,
        "(w.stop_gradient() + einsum('kij,kjo->kio', turn(w_boft_q)[0:4], w.stop_gradient().reshape(4, 2, 4))"
        ".reshape(8, 4) + einsum('ghaibj,gbhjo->gahio', turn(w_boft_q)[4:8].reshape(2, 2, 2, 1, 2, 1), "
        "(w.stop_gradient() + einsum('kij,kjo->kio', turn(w_boft_q)[0:4], w.stop_gradient().reshape(4, 2, 4))"
        ".reshape(8, 4)).reshape(2, 2, 2, 1, 4)).reshape(8, 4)) * w_boft_s",
        frozenset({"boft_q", "boft_s"}),
        shape=(8, 4),
        any_axes=False,
    ),
    "fourier": Case(
        lambda: forms.fourier(5, scale=3),
        wave,
        "w.stop_gradient() + 3.0 * waves(w_fourier_c)",
        frozenset({"fourier_c"}),
    ),
    "weight_norm": Case(
        forms.weight_norm,
        lambda w, g: g * w / norms(w),
        "magnitude(w_g, w)",
        frozenset({"g"}),
        reparametrizes=True,
        good=any_value,
    ),
    "spectral_norm": Case(
        lambda: forms.spectral_norm(seed=1),
        lambda w, u, v: w / (v @ w @ u),
        "spectral_norm(w)",
        holds=frozenset({"u", "v"}),
        starts_equal=False,
        reparametrizes=True,
        good=lambda rng, shape: (lambda w: w / np.linalg.norm(w, 2))(rng.normal(size=shape)),
        bad=lambda rng, shape: 3 * np.ones(shape),
    ),
    "orthogonal": Case(
        forms.orthogonal,
        reflections,
        "householder(w)",
        starts_equal=False,
        reparametrizes=True,
        good=orthogonal_value,
        bad=lambda rng, shape: np.ones(shape),
    ),
    "orthogonal, wide": Case(
        forms.orthogonal,
        reflections,
        "householder(w)",
        starts_equal=False,
        reparametrizes=True,
        shape=(4, 6),
        good=orthogonal_value,
        bad=lambda rng, shape: np.zeros(shape),
    ),
    "orthogonal, cayley": Case(
        lambda: forms.orthogonal("cayley"),
        cayley,
        "cayley(w, w_before)",
        holds=frozenset({"before"}),
        starts_equal=False,
        reparametrizes=True,
        good=orthogonal_value,
        bad=lambda rng, shape: np.ones(shape),
        own={"before": lambda rng: orthogonal_value(rng, (6, 6))},
    ),
    "orthogonal, cayley, wide": Case(
        lambda: forms.orthogonal("cayley"),
        cayley,
        "cayley(w, w_before)",
        holds=frozenset({"before"}),
        starts_equal=False,
        reparametrizes=True,
        shape=(4, 6),
        good=orthogonal_value,
        bad=lambda rng, shape: np.full(shape, np.nan),
        own={"before": lambda rng: orthogonal_value(rng, (6, 6))},
    ),
    "symmetric": Case(
        forms.symmetric,
        mirrored,
        "symmetric(w)",
        starts_equal=False,
        reparametrizes=True,
        shape=(5, 5),
        good=lambda rng, shape: mirrored(rng.normal(size=shape)),
        bad=lambda rng, shape: np.arange(25.0).reshape(5, 5),
        any_axes=False,
    ),
    "positive": Case(
        forms.positive,
        softplus,
        "softplus(w)",
        starts_equal=False,
        reparametrizes=True,
        good=lambda rng, shape: np.exp(3 * rng.normal(size=shape)),
        bad=lambda rng, shape: np.zeros(shape),
    ),
}


def base_weight(shape, seed=3):
    return tether.Weight(np.random.default_rng(seed).normal(size=shape).astype("float32"), name="w")


def expression_of(name, base=None):
    """The case's expression: over a frozen base, unless the base is what the form trains."""
    case = CASES[name]
    base = base_weight(case.shape) if base is None else base
    return base, case.make()(base if case.reparametrizes else base.stop_gradient())


def own_weights(expression, base):
    """What the form has brought, by what their names add to the base's."""
    brought = (weight for weight in expression.weights_used() if weight is not base)
    return {weight.name.removeprefix(f"{base.name}_").removeprefix("vera_bases."): weight for weight in brought}


def model_of(name, **dense):
    """A model of one Dense layer whose kernel has the form."""
    base, kernel = expression_of(name)
    layer = tether.tie(keras.layers.Dense(kernel.shape[1], **dense), kernel=kernel)
    return keras.Sequential([keras.Input((kernel.shape[0],)), layer]), base, kernel

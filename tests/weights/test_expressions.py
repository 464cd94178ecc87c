"""Every operator and method of expressions against NumPy, and what expressions promise as Python values."""

import copy
import pickle
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import tether
from tests.support import as_zero, assert_close, gradients
from tether.errors import InvalidConfig, NotInvertible, ShapeMismatch, TetherError, UnboundArgument
from tether.weights import Argument, Constant, Node, bind
from tether.weights.algebra import is_invertible
from tether.weights.codec import decode, encode
from tether.weights.expression import MAX_STEPS, OPERATORS, as_expression, live_weights, program
from tether.weights.leaves import Choice
from tether.weights.operators.choice import Adapted, Choose, Routed
from tether.weights.operators.quantized import Dequantize, Unpack

ops = tether.ops

VALUES = {
    name: np.random.default_rng(seed).uniform(0.5, 2.0, shape).astype("float32")
    for seed, (name, shape) in enumerate(
        {"a": (3, 4), "b": (3, 4), "m": (4, 5), "n": (5, 3), "v": (4,), "u": (3, 1), "s": (), "t": (2, 3, 4)}.items()
    )
}
ARRAY = np.array([1.0, 2.0, 3.0, 4.0], dtype="float32")
BIG = np.arange(12, dtype="float32").reshape(3, 4) - 5.0
ROWS = np.array([True, False, True, False])


@keras.saving.register_keras_serializable("tether_tests")
def squared_gap(x, y):
    return keras.ops.square(x - y)


def numpy_squared_gap(x, y):
    return np.square(x - y)


def unpacked(packed, axis, size):
    """The integers in the two halves of each byte, the lower half first."""
    halves = np.stack([packed & 15, (packed >> 4) & 15], axis=axis + 1)
    values = np.where(halves > 7, halves - 16, halves)
    sizes = list(packed.shape)
    sizes[axis] *= 2
    return np.take(values.reshape(sizes), range(size), axis=axis).astype("int8")


def make_weights(**changes):
    """A weight for each of `VALUES`, with those names."""
    made = {name: tether.Weight(value, name=name) for name, value in VALUES.items()}
    return SimpleNamespace(**{**made, **changes})


def arrays():
    return SimpleNamespace(**VALUES)


# The notation, the expression, and the same in NumPy where it is not written with the same words.
PLACES = np.array([[0, -1, 1], [2, 0, 0]], "int32")

CASES = [
    # ---- looking in another way
    ("a", lambda x: x.a),
    ("a.T", lambda x: x.a.T),
    ("t.T", lambda x: x.t.T),
    ("t.transpose(0, 2, 1)", lambda x: x.t.transpose(0, 2, 1)),
    ("t.transpose(-1, 0, 1)", lambda x: x.t.transpose(-1, 0, 1)),
    ("t.T", lambda x: x.t.transpose()),
    ("t.transpose(1, 0, 2)", lambda x: ops.transpose(x.t, (1, 0, 2)), lambda x: np.transpose(x.t, (1, 0, 2))),
    ("a.T.T", lambda x: ops.transpose(x.a.transpose(1, 0)).transpose(1, 0).T, None),
    ("a[1]", lambda x: x.a[1]),
    ("a[-1]", lambda x: x.a[-1]),
    ("a[1, 2]", lambda x: x.a[1, 2]),
    ("a[:, :3]", lambda x: x.a[:, :3]),
    ("a[1:]", lambda x: x.a[1:]),
    ("a[-2:, -3:-1]", lambda x: x.a[-2:, -3:-1]),
    ("a[::2]", lambda x: x.a[::2]),
    ("a[::-1]", lambda x: x.a[::-1]),
    ("a[::-2, 3:0:-1]", lambda x: x.a[::-2, 3:0:-1]),
    ("a[0:2:-1]", lambda x: x.a[0:2:-1]),
    ("a[2:1]", lambda x: x.a[2:1]),
    ("a[1:100]", lambda x: x.a[1:100]),
    ("a[None]", lambda x: x.a[None]),
    ("a[:, None, ::-1]", lambda x: x.a[:, None, ::-1]),
    ("t[..., 0]", lambda x: x.t[..., 0]),
    ("t[0, ..., ::-1]", lambda x: x.t[0, ..., ::-1]),
    ("t[..., None, 1::-1]", lambda x: x.t[..., None, 1::-1]),
    ("t[1, None, ::-1, 2]", lambda x: x.t[1, None, ::-1, 2]),
    ("t[None, ..., None]", lambda x: x.t[None, ..., None]),
    ("t[...]", lambda x: x.t[...]),
    ("t[()]", lambda x: x.t[()]),
    ("a[1, 2]", lambda x: x.a[np.int64(1), np.int32(2)]),
    ("a.reshape(2, 6)", lambda x: x.a.reshape(2, 6)),
    ("a.reshape(12,)", lambda x: x.a.reshape(-1 + 13)),
    ("a.reshape(-1,)", lambda x: x.a.reshape(-1)),
    ("a.reshape(2, -1, 3)", lambda x: x.a.reshape((2, -1, 3))),
    ("s.reshape(1, 1)", lambda x: x.s.reshape([1, 1])),
    ("a[0, 0].reshape()", lambda x: x.a[0, 0].reshape(())),
    ("a.reshape(6, 2)", lambda x: ops.reshape(x.a, (6, 2)), lambda x: x.a.reshape(6, 2)),
    ("take(a, indices=(2, 0, 2, -1), axis=0)", lambda x: ops.take(x.a, [2, 0, 2, -1]), lambda x: x.a[[2, 0, 2, -1]]),
    (
        "take(t, indices=(3, 1), axis=-1)",
        lambda x: ops.take(x.t, np.array([3, 1]), axis=-1),
        lambda x: x.t[..., [3, 1]],
    ),
    ("a[array[2, 3]]", lambda x: ops.take(x.a, PLACES), lambda x: x.a[PLACES]),
    ("take(t, 1, axis=-2)", lambda x: ops.take(x.t, 1, axis=-2), lambda x: x.t[:, 1]),
    ("t.transpose(0, 2, 1)", lambda x: x.t.transpose((0, 2, 1))),
    ("t.transpose(0, 2, 1)", lambda x: x.t.transpose([0, 2, 1])),
    # ---- arithmetic
    ("a + b", lambda x: x.a + x.b),
    ("a - b", lambda x: x.a - x.b),
    ("a * b", lambda x: x.a * x.b),
    ("a / b", lambda x: x.a / x.b),
    ("-a", lambda x: -x.a),
    ("a + v", lambda x: x.a + x.v),
    ("u * v", lambda x: x.u * x.v),
    ("t - u", lambda x: x.t - x.u),
    ("a / s", lambda x: x.a / x.s),
    ("a + 2", lambda x: x.a + 2),
    ("2 + a", lambda x: 2 + x.a),
    ("1.5 - a", lambda x: 1.5 - x.a),
    ("a - 1.5", lambda x: x.a - 1.5),
    ("2.0 * a", lambda x: 2.0 * x.a),
    ("a * 2.0", lambda x: x.a * np.float32(2.0)),
    ("2.0 * a", lambda x: np.float64(2.0) * x.a, lambda x: 2 * x.a),
    ("3 * a", lambda x: np.int64(3) * x.a, lambda x: 3 * x.a),
    ("2 / a", lambda x: 2 / x.a),
    ("a / 2", lambda x: x.a / 2),
    ("-2.0 * a", lambda x: -2.0 * x.a),
    ("a * -2.0", lambda x: x.a * -2.0),
    ("[1.0, 2.0, 3.0, 4.0] * a", lambda x: ARRAY * x.a),
    ("a * [1.0, 2.0, 3.0, 4.0]", lambda x: x.a * ARRAY),
    ("a + array[3, 4]", lambda x: x.a + BIG),
    ("array[3, 4] - a", lambda x: BIG - x.a),
    ("array[3, 4] / a", lambda x: BIG / x.a),
    ("a + [1.0, 2.0, 3.0, 4.0]", lambda x: x.a + ARRAY.tolist(), lambda x: x.a + ARRAY),
    ("[1.0, 2.0, 3.0, 4.0] - a", lambda x: ARRAY.tolist() - x.a, lambda x: ARRAY - x.a),
    ("a * [1, 0, 1, 0]", lambda x: x.a * np.array([1, 0, 1, 0]), lambda x: x.a * ROWS),
    ("a * [1.0, 2.0, 3.0, 4.0]", lambda x: x.a * ARRAY.astype("float64"), lambda x: x.a * ARRAY),
    ("a * [True, False, True, False]", lambda x: x.a * ROWS),
    ("a @ m", lambda x: x.a @ x.m),
    ("a @ v", lambda x: x.a @ x.v),
    ("v @ m", lambda x: x.v @ x.m),
    ("v @ v", lambda x: x.v @ x.v),
    ("t @ m", lambda x: x.t @ x.m),
    ("a @ array[4, 3]", lambda x: x.a @ BIG.T),
    ("array[4, 3] @ a", lambda x: BIG.T @ x.a),
    ("a + b", lambda x: ops.add(x.a, x.b), lambda x: x.a + x.b),
    ("1 - a", lambda x: ops.subtract(1, x.a), lambda x: 1 - x.a),
    ("a * 3.0", lambda x: ops.multiply(x.a, 3.0), lambda x: x.a * 3),
    ("a / b", lambda x: ops.divide(x.a, x.b), lambda x: x.a / x.b),
    ("a @ m", lambda x: ops.matmul(x.a, x.m), lambda x: x.a @ x.m),
    ("-a", lambda x: ops.negative(x.a), lambda x: -x.a),
    # ---- functions of each number, and along axes
    ("a ** 2", lambda x: x.a**2),
    ("a ** 2", lambda x: x.a**2.0),
    ("a ** 0.5", lambda x: x.a ** np.float64(0.5), lambda x: x.a**0.5),
    ("a ** -1", lambda x: ops.power(x.a, -1), lambda x: 1 / x.a),
    ("-a ** 3", lambda x: -(x.a**3)),
    ("(-a) ** 3", lambda x: (-x.a) ** 3),
    ("(a ** 2) ** 3", lambda x: (x.a**2) ** 3),
    ("(a ** 2).T", lambda x: (x.a**2).T),
    ("(2.0 * a ** 2) @ m", lambda x: 2.0 * x.a**2 @ x.m),
    ("a.astype(int32) ** 2", lambda x: x.a.astype("int32") ** 2),
    (
        "(a.astype(int32) + 1) ** -1",
        lambda x: (x.a.astype("int32") + 1) ** -1,
        lambda x: (1 / (x.a.astype("int32") + 1)).astype("float32"),
    ),
    ("a.astype(float16) ** 2", lambda x: x.a.astype("float16") ** 2),
    ("abs(a - 1.0)", lambda x: abs(x.a - 1.0)),
    ("abs(1 - a)", lambda x: ops.abs(1 - x.a), lambda x: abs(1 - x.a)),
    ("abs(a.astype(int32) - 1)", lambda x: abs(x.a.astype("int32") - 1)),
    ("exp(a)", lambda x: ops.exp(x.a), lambda x: np.exp(x.a)),
    ("log(a)", lambda x: ops.log(x.a), lambda x: np.log(x.a)),
    ("sqrt(a + b)", lambda x: ops.sqrt(x.a + x.b), lambda x: np.sqrt(x.a + x.b)),
    (
        "exp(a.astype(int32))",
        lambda x: ops.exp(x.a.astype("int32")),
        lambda x: np.exp(x.a.astype("int32")).astype("float32"),
    ),
    ("maximum(a, v)", lambda x: ops.maximum(x.a, x.v), lambda x: np.maximum(x.a, x.v)),
    ("minimum(1.0, a)", lambda x: ops.minimum(1.0, x.a), lambda x: np.minimum(1, x.a)),
    ("sum(a)", lambda x: x.a.sum(), lambda x: x.a.sum()),
    ("sum(a, axis=0)", lambda x: x.a.sum(0)),
    ("sum(t, axis=(0, -1))", lambda x: x.t.sum((0, -1))),
    ("sum(t, axis=(2, 0), keepdims=True)", lambda x: ops.sum(x.t, [2, 0], True), lambda x: x.t.sum((2, 0), keepdims=1)),
    ("sum(s)", lambda x: x.s.sum(), lambda x: x.s),
    ("sum(a.astype(int8))", lambda x: x.a.astype("int8").sum(), lambda x: x.a.astype("int8").sum(dtype="int32")),
    ("mean(a, axis=-1)", lambda x: x.a.mean(-1)),
    ("mean(a.astype(int32))", lambda x: x.a.astype("int32").mean(), lambda x: np.float32(x.a.astype("int32").mean())),
    ("max(t, axis=1)", lambda x: x.t.max(1)),
    ("min(a, axis=0, keepdims=True)", lambda x: ops.min(x.a, 0, keepdims=True), lambda x: x.a.min(0, keepdims=True)),
    ("(a - mean(a, axis=0)).T", lambda x: (x.a - x.a.mean(0)).T),
    # ---- several made one
    ("concatenate([a, b], axis=0)", lambda x: ops.concatenate([x.a, x.b]), lambda x: np.concatenate([x.a, x.b])),
    (
        "concatenate([u, a, array[3, 4]], axis=-1)",
        lambda x: ops.concatenate([x.u, x.a, BIG], axis=-1),
        lambda x: np.concatenate([x.u, x.a, BIG], axis=-1),
    ),
    ("stack([a, b, a], axis=1)", lambda x: ops.stack([x.a, x.b, x.a], 1), lambda x: np.stack([x.a, x.b, x.a], 1)),
    ("stack([s, 2.0], axis=-1)", lambda x: ops.stack([x.s, 2.0], -1), lambda x: np.stack([x.s, np.float32(2.0)], -1)),
    ("stack([v], axis=0)", lambda x: ops.stack([x.v]), lambda x: np.stack([x.v])),
    ("where(array[3, 4], a, b)", lambda x: ops.where(BIG > 0, x.a, x.b), lambda x: np.where(BIG > 0, x.a, x.b)),
    (
        "where(array[3, 4], v, 0.0)",
        lambda x: ops.where(BIG.astype("int32"), x.v, 0.0),
        lambda x: np.where(BIG.astype("int32"), x.v, np.float32(0)),
    ),
    ("where(a - s, 1.0, u)", lambda x: ops.where(x.a - x.s, 1.0, x.u), lambda x: np.where(x.a - x.s, x.u * 0 + 1, x.u)),
    ("einsum('ij,jk->ik', a, m)", lambda x: ops.einsum("ij,jk->ik", x.a, x.m), lambda x: x.a @ x.m),
    ("einsum('ij->', a)", lambda x: ops.einsum("ij->", x.a), lambda x: np.einsum("ij->", x.a)),
    (
        "einsum('tij,jk->tki', t, m)",
        lambda x: ops.einsum("tij, jk -> tki", x.t, x.m),
        lambda x: (x.t @ x.m).swapaxes(1, 2),
    ),
    (
        "einsum('ij,jk,ki->ji', a, m, n)",
        lambda x: ops.einsum("ij,jk,ki->ji", x.a, x.m, x.n),
        lambda x: np.einsum("ij,jk,ki->ji", x.a, x.m, x.n),
    ),
    ("einsum('i,j->ij', v, v)", lambda x: ops.einsum("i,j->ij", x.v, x.v), lambda x: np.outer(x.v, x.v)),
    # ---- functions, dtypes, gradients
    ("tanh(a)", lambda x: ops.apply(keras.ops.tanh, x.a), lambda x: np.tanh(x.a)),
    ("maximum(a, 1.0)", lambda x: ops.apply(keras.ops.maximum, x.a, 1.0), lambda x: np.maximum(x.a, 1)),
    ("squared_gap(a, v)", lambda x: ops.apply(squared_gap, x.a, x.v), lambda x: numpy_squared_gap(x.a, x.v)),
    ("a.astype(float16)", lambda x: x.a.astype("float16")),
    ("a.astype(int32)", lambda x: ops.cast(x.a, "int32"), lambda x: x.a.astype("int32")),
    ("a.astype(int32) + 1", lambda x: x.a.astype("int32") + 1),
    ("a.astype(int32) / 2", lambda x: x.a.astype("int32") / 2, lambda x: (x.a.astype("int32") / 2).astype("float32")),
    ("a.astype(float16) * 0.5", lambda x: x.a.astype("float16") * 0.5),
    ("a.astype(float16) + b", lambda x: x.a.astype("float16") + x.b),
    ("a.stop_gradient()", lambda x: x.a.stop_gradient(), lambda x: x.a),
    ("a.stop_gradient()", lambda x: ops.stop_gradient(x.a), lambda x: x.a),
    ("a.scale_gradient(0.5)", lambda x: x.a.scale_gradient(0.5), lambda x: x.a),
    ("a.scale_gradient(-2)", lambda x: ops.scale_gradient(x.a, -2), lambda x: x.a),
    # ---- how it reads
    ("0.5 * a.T + m @ n", lambda x: 0.5 * x.a.T + x.m @ x.n),
    ("(a + b) @ m", lambda x: (x.a + x.b) @ x.m),
    ("a @ (m + m)", lambda x: x.a @ (x.m + x.m)),
    ("(a * b) @ m", lambda x: (x.a * x.b) @ x.m),
    ("a @ m @ n", lambda x: x.a @ x.m @ x.n),
    ("a @ (m @ n)", lambda x: x.a @ (x.m @ x.n)),
    ("a - (b - a)", lambda x: x.a - (x.b - x.a)),
    ("a - b - a", lambda x: x.a - x.b - x.a),
    ("a - (b + a)", lambda x: x.a - (x.b + x.a)),
    ("a + b - a", lambda x: x.a + x.b - x.a),
    ("-(a + b)", lambda x: -(x.a + x.b)),
    ("-(a * b)", lambda x: -(x.a * x.b)),
    ("-(a @ m)", lambda x: -(x.a @ x.m)),
    ("-a @ m", lambda x: -x.a @ x.m),
    ("-a + b", lambda x: -x.a + x.b),
    ("a - -b", lambda x: x.a - -x.b),
    ("(-a).T", lambda x: (-x.a).T),
    ("-a.T", lambda x: -x.a.T),
    ("a / (b / a)", lambda x: x.a / (x.b / x.a)),
    ("a / b / a", lambda x: x.a / x.b / x.a),
    ("a / (b * a)", lambda x: x.a / (x.b * x.a)),
    ("a * (b / a)", lambda x: x.a * (x.b / x.a)),
    ("2.0 * (a @ m)", lambda x: 2.0 * (x.a @ x.m)),
    ("2.0 * (a @ m * (a @ m))", lambda x: 2.0 * ((x.a @ x.m) * (x.a @ x.m))),
    ("a @ m * 2.0", lambda x: x.a @ x.m * 2.0),
    ("a @ m / 2.0", lambda x: x.a @ x.m / 2.0),
    ("2.0 / (a @ m)", lambda x: 2.0 / (x.a @ x.m)),
    ("(a + b) * (a - b)", lambda x: (x.a + x.b) * (x.a - x.b)),
    ("(a + b)[1:].T", lambda x: (x.a + x.b)[1:].T),
    ("(a @ m).reshape(15,)", lambda x: (x.a @ x.m).reshape(15)),
    (
        "[a, b, 2.0 * a][choice]",
        lambda x: tether.ops.choose(Argument("choice", (), "int32", default=2), [x.a, x.b, 2.0 * x.a]),
        lambda x: 2 * x.a,
    ),
    (
        "[a, b, 2.0 * a][choice]",
        lambda x: Choose(Choice("choice", [*"abc"], default=2), x.a, x.b, 2.0 * x.a, strict=True),
        lambda x: 2 * x.a,
    ),
    (
        "a + [b, a][choice]",
        lambda x: Routed(c := Choice("choice", [*"ab"], none="none"), x.a, x.a + Choose(c, x.b, x.a, strict=True)),
        lambda x: x.a + x.b,
    ),
    (
        "a + [b, 2.0 * a][choice]",
        lambda x: Routed(c := Choice("choice", [*"ab"], default=-1, none="none"), x.a, x.a + Choose(c, x.b, 2.0 * x.a)),
        lambda x: x.a,
    ),
    (
        "a + 0.5 * b + 2.0 * (a * b)",
        lambda x: Adapted(x.a, as_expression(0.5), x.b, as_expression(2.0), x.a * x.b, names=("one", "two")),
        lambda x: x.a + 0.5 * x.b + 2 * x.a * x.b,
    ),
    ("(2.0 * a).stop_gradient() + b", lambda x: (2.0 * x.a).stop_gradient() + x.b, lambda x: 2 * x.a + x.b),
    # ---- integers that stand for floats
    (
        "dequantize((a * 4).astype(int8), u)",
        lambda x: Dequantize((x.a * 4).astype("int8"), x.u, dtype="float32"),
        lambda x: (x.a * 4).astype("int8") * x.u,
    ),
    (
        "2.0 * dequantize((a * 4).astype(int8), v[None]).reshape(2, 6)",
        lambda x: 2.0 * Dequantize((x.a * 4).astype("int8"), x.v[None], dtype="float32", shape=(2, 6)),
        lambda x: 2 * ((x.a * 4).astype("int8") * x.v).reshape(2, 6),
    ),
    (
        "dequantize(a.astype(int32), u)",
        lambda x: Dequantize(x.a.astype("int32"), x.u, dtype="float16"),
        lambda x: (x.a.astype("int32") * x.u).astype("float16"),
    ),
    (
        "unpack((a * 20 - b * 30).astype(int8), axis=0, size=5)",
        lambda x: Unpack((x.a * 20 - x.b * 30).astype("int8"), axis=0, size=5),
        lambda x: unpacked((x.a * 20 - x.b * 30).astype("int8"), 0, 5),
    ),
    (
        "unpack((20 * t).astype(int8), axis=1, size=6)",
        lambda x: Unpack((20 * x.t).astype("int8"), axis=1, size=6),
        lambda x: unpacked((20 * x.t).astype("int8"), 1, 6),
    ),
]


def identifiers(cases):
    return [f"{number}: {case[0]}" for number, case in enumerate(cases)]


def oracle_of(case):
    """What NumPy says; without words of its own the case itself is run on arrays."""
    if len(case) == 3 and case[2] is None:
        return arrays().a
    return np.asarray(case[-1](arrays()))


@pytest.fixture(scope="module")
def weights():
    return make_weights()


@pytest.fixture(scope="module")
def twins():
    """Other weights of the same names and values."""
    return make_weights()


@pytest.fixture(scope="module")
def bare():
    """Weights that know their shapes and dtypes and hold nothing yet."""
    return SimpleNamespace(**{name: tether.Weight(v.shape, dtype="float32", name=name) for name, v in VALUES.items()})


@pytest.fixture(scope="module")
def blank():
    """Weights that know nothing yet."""
    return SimpleNamespace(**{name: tether.Weight(name=name) for name in VALUES})


@pytest.mark.parametrize("case", CASES, ids=identifiers(CASES))
class TestEveryOperator:
    def test_value_shape_and_dtype_are_those_of_numpy(self, case, weights):
        expression = case[1](weights)
        expected = oracle_of(case)
        assert expression.shape == expected.shape
        assert expression.ndim == expected.ndim
        shape, dtype = expression.shape, expression.dtype
        value = expression.value
        assert tuple(value.shape) == shape
        assert keras.backend.standardize_dtype(value.dtype) == dtype == str(expected.dtype)
        np.testing.assert_allclose(expression.numpy(), expected, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-5)

    def test_reads_as_mathematics(self, case, weights):
        expression = case[1](weights)
        if case[0] != "a.T.T":
            assert expression.notation() == case[0]
            assert repr(expression) == case[0] or expression is weights.a

    def test_is_equal_when_written_twice(self, case, weights, twins):
        first, second = case[1](weights), case[1](weights)
        assert first == second
        assert hash(first) == hash(second)
        assert {first: "found"}[second] == "found"
        assert first != case[1](twins)

    def test_shape_and_dtype_need_no_value(self, case, bare):
        expression = case[1](bare)
        expected = oracle_of(case)
        assert (expression.shape, expression.dtype) == (expected.shape, str(expected.dtype))
        assert not any(weight.is_built for weight in vars(bare).values())

    def test_shape_and_dtype_are_none_as_long_as_a_leaf_has_none(self, case, weights, blank):
        expression = case[1](blank)
        assert (expression.shape, expression.ndim, expression.dtype) == (None, None, None)
        for weight in case[1](weights).weights_used():
            partly = case[1](SimpleNamespace(**{**vars(weights), weight.name: vars(blank)[weight.name]}))
            assert (partly.shape, partly.dtype) == (None, None)

    def test_survives_json_pickle_and_copy(self, case, weights, twins):
        expression = case[1](weights)
        known = {weight.uid: weight for weight in expression.weights_used()}
        assert decode(encode(expression), known) == expression
        # As `copy` and `pickle` rebuild it, with other weights in the places of these.
        rebuild, (steps,) = (
            expression.__reduce__() if isinstance(expression, Node) else (lambda steps: steps[0], ([expression],))
        )
        others = [getattr(twins, step.name) if isinstance(step, tether.Weight) else step for step in steps]
        assert rebuild(others) == case[1](twins)
        assert rebuild(steps) == expression

    def test_is_immutable(self, case, weights):
        expression = case[1](weights)
        if isinstance(expression, Node):
            for name in ("operands", "parameters", "shape", "anything"):
                with pytest.raises(AttributeError):
                    setattr(expression, name, None)
            assert isinstance(expression.operands, tuple)


def test_every_registered_operator_has_a_case(weights):
    seen = {
        step.expression.name
        for case in CASES
        for step in program(case[1](weights))
        if isinstance(step.expression, Node)
    }
    assert seen == {name for name, operator in OPERATORS.items() if operator.__module__.startswith("tether.weights")}


# --------------------------------------------------------------------------- equality


def test_different_expressions_differ(weights):
    x = weights
    different = [
        x.a, x.b, x.a + x.b, x.b + x.a, x.a - x.b, x.a * 2, x.a * 2.0, x.a * 3, 2 * x.a, x.a.T, x.a.transpose(0, 1),
        x.a[0], x.a[0:1], x.a[None], x.a[...], x.a.reshape(4, 3), x.a.reshape(12), x.a * ARRAY, x.a * (ARRAY + 1),
        x.a * ARRAY[None], x.a.stop_gradient(), x.a.scale_gradient(1.0), x.a.scale_gradient(2.0), x.a.astype("float16"),
        ops.stack([x.a, x.b]), ops.stack([x.a, x.b], 1), ops.concatenate([x.a, x.b]), ops.take(x.a, [0]),
        ops.take(x.a, [0], 1), x.a * Argument("k"), x.a * Argument("j"), x.a * Argument("k", (4,)),
        ops.einsum("ij->ij", x.a), ops.einsum("ij->ji", x.a), ops.apply(keras.ops.tanh, x.a),
        x.a[-1], x.a[-2], ops.take(x.a, [-1]), ops.take(x.a, [-2]),  # Python's hashes of -1 and -2 are equal
        x.a ** 2, x.a ** 3, x.a ** 0.5, ops.exp(x.a), ops.log(x.a), ops.maximum(x.a, x.b), ops.minimum(x.a, x.b),
        x.a.sum(), x.a.sum(0), x.a.sum((0,)), x.a.sum(0, keepdims=True), x.a.mean(0), x.a.max(0),
        ops.apply(keras.ops.exp, x.a), (x.a + x.b) + x.a, x.a + (x.b + x.a), 1, "a + b", None,
    ]  # fmt: skip
    for place, one in enumerate(different):
        for other in different[:place]:
            assert one != other, (one, other)
    assert len(dict.fromkeys(different)) == len(different)


def test_equal_parts_are_computed_once(weights):
    x = weights
    shared = (x.a + x.b) * (x.a + x.b)
    assert len(program(shared)) == 4
    assert len(encode(shared)) == 4


def test_transposing_back_gives_the_very_expression(weights):
    assert weights.a.T.T is weights.a
    assert weights.a.stop_gradient().stop_gradient() == weights.a.stop_gradient()


def test_axes_are_exchanged_as_in_numpy(weights, blank):
    for axes in [(0, 1), (-1, 0), (1, 2), (1, 1)]:
        expression = weights.t.swapaxes(*axes)
        np.testing.assert_array_equal(expression.numpy(), VALUES["t"].swapaxes(*axes))
        assert expression == ops.swapaxes(weights.t, *axes)
    np.testing.assert_array_equal(weights.t.mT.numpy(), VALUES["t"].swapaxes(1, 2))
    assert weights.a.mT == weights.a.T
    assert weights.t.swapaxes(2, -1) is weights.t
    with pytest.raises(tether.TetherError, match=r"The shape of t is not known"):
        blank.t.swapaxes(0, 1)


def test_what_has_an_inverse_takes_values_and_refuses_those_that_it_cannot_have():
    for make, value, wrong in [
        (ops.exp, [[1.0, 2.0]], [[1.0, 0.0]]),
        (ops.log, [[-1.0, 2.0]], None),
        (ops.sqrt, [[0.0, 3.0]], [[1.0, -1.0]]),
        (lambda w: w**3, [[-8.0, 27.0]], None),
        (lambda w: w**-1, [[-2.0, 4.0]], [[0.0, 1.0]]),
        (lambda w: w**0.5, [[0.0, 3.0]], [[-1.0, 1.0]]),
        (lambda w: 2.0 * ops.exp(w).T + 1.0, [[2.0], [3.0]], [[1.0], [2.0]]),
    ]:
        w = tether.Weight(np.ones((1, 2), "float32"), name="w")
        expression = make(w)
        expression.assign(np.array(value, "float32"))
        np.testing.assert_allclose(expression.numpy(), value, rtol=1e-5)
        if wrong is not None:
            with pytest.raises(NotInvertible, match=r"takes only numbers"):
                expression.assign(np.array(wrong, "float32"))
            np.testing.assert_allclose(expression.numpy(), value, rtol=1e-5)
    for expression in (w**2, w**0, abs(w), w.sum(), w.max(0), ops.maximum(w, 0.0), w.astype("int32") ** 3):
        with pytest.raises(NotInvertible, match="has no inverse"):
            expression.assign(np.ones(expression.shape))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("power", {"exponent": "2"}),
        ("power", {"exponent": True}),
        ("power", {"exponent": float("nan")}),
        ("power", {"exponent": 1 << 4000}),
        ("elementwise", {"function": "eval"}),
        ("elementwise", {"function": ["abs"]}),
        ("elementwise", {}),
        ("extreme", {"function": "abs"}),
        ("reduction", {"function": "prod", "axis": 0, "keepdims": False}),
        ("reduction", {"function": "sum", "axis": "0", "keepdims": False}),
        ("reduction", {"function": "sum", "axis": [0.5], "keepdims": False}),
        ("reduction", {"function": "sum", "axis": 0, "keepdims": 1}),
    ],
)
def test_parameters_of_functions_are_checked(name, wrong, weights):
    operands = [weights.a] * (OPERATORS[name].arity or 1)
    with pytest.raises(InvalidConfig):
        OPERATORS[name](*operands, **wrong)


def test_weights_used_lists_each_once_in_the_order_of_writing(weights):
    x = weights
    assert (x.b + x.a * x.b).weights_used() == (x.b, x.a)
    assert x.a.weights_used() == (x.a,)


def test_live_weights_are_those_with_an_occurrence_outside_stop_gradient(weights):
    x = weights
    assert live_weights(x.a.stop_gradient() + x.b) == (x.b,)
    assert live_weights(x.a.stop_gradient() + x.a) == (x.a,)
    assert live_weights((x.a + x.b).T.stop_gradient()) == ()
    assert live_weights(x.a.scale_gradient(0.5)) == (x.a,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
def test_a_copy_has_weights_of_its_own_and_shares_them_as_the_original_does(copied, weights):
    original = [weights.a + 2.0 * weights.b, weights.a.T, weights.b, Argument("k") * weights.a]
    duplicate = copied(original)
    first, second = duplicate[0].weights_used()
    assert duplicate == [first + 2.0 * second, first.T, second, Argument("k") * first]
    assert duplicate != original
    assert [e.notation() for e in duplicate] == [e.notation() for e in original]
    np.testing.assert_array_equal(duplicate[0].numpy(), original[0].numpy())
    first.assign(VALUES["a"] + 1)
    np.testing.assert_array_equal(weights.a.numpy(), VALUES["a"])
    assert_close(duplicate[1].value, VALUES["a"].T + 1)


# --------------------------------------------------------------------------- depth and breadth


def test_a_very_long_expression_works(weights):
    long, plain = weights.a, VALUES["a"]
    for number in range(2000):
        long, plain = (long + 1.0, plain + 1.0) if number % 2 else (-long, -plain)
    assert (long.shape, long.dtype) == ((3, 4), "float32")
    assert_close(long.value, plain, 1e-4)
    assert len(long.notation()) < 500
    assert decode(encode(long), {weights.a.uid: weights.a}) == long
    assert pickle.loads(pickle.dumps(long)).shape == (3, 4)


def test_a_very_long_expression_over_a_weight_without_a_shape():
    base = tether.Weight(name="late")
    long = base
    for _ in range(2000):
        long = long.T.stop_gradient()
    assert (long.shape, long.dtype) == (None, None)
    base.give_start((3, 4), "float32", "zeros")
    assert (long.shape, long.dtype) == ((3, 4), "float32")
    assert (long + 1).shape == (3, 4)


@pytest.mark.parametrize("known", [True, False])
def test_doubling_sixty_times_takes_no_time(known):
    base = tether.Weight(np.float32(1.0).reshape(1), name="one") if known else tether.Weight(name="late")
    doubled = base
    for _ in range(60):
        doubled = doubled + doubled
    assert len(program(doubled)) == 61
    assert doubled.shape == ((1,) if known else None)
    assert doubled.dtype == ("float32" if known else None)
    assert len(doubled.notation()) < 1000
    base.give_start((1,), "float32", "ones")
    assert_close(doubled.value, [2.0**60])


def test_too_many_steps_are_refused(weights):
    long = weights.a
    for _ in range(MAX_STEPS + 1):
        long = -long
    with pytest.raises(tether.TetherError, match="at most"):
        program(long)


def test_a_shape_that_a_failed_tie_took_back_is_unknown_again():
    codec = tether.Weight(name="codec")
    decoder = codec.T
    layer = keras.layers.Dense(5)
    layer.build((None, 3))
    with pytest.raises(ShapeMismatch):
        tether.tie(layer, kernel=decoder, bias=tether.Weight((7,), name="wrong"))
    assert (codec.shape, decoder.shape, decoder.dtype) == (None, None, None)
    other = keras.layers.Dense(2)
    other.build((None, 6))
    tether.tie(other, kernel=decoder)
    assert (codec.shape, decoder.shape, decoder.dtype) == ((2, 6), (6, 2), "float32")


def test_a_value_beyond_any_memory_is_refused_where_it_is_written():
    wide, high = tether.Weight((1 << 20, 1), name="high"), tether.Weight((1, 1 << 20), name="wide")
    with pytest.raises(ShapeMismatch, match="elements"):
        wide + high
    with pytest.raises(ShapeMismatch, match="axes"):
        wide[(None,) * 40]


# --------------------------------------------------------------------------- wrong shapes

MISFITS = [
    (lambda x: x.a + x.m, "a + m", "(3, 4)", "(4, 5)"),
    (lambda x: x.a - x.m, "a - m", "(3, 4)", "(4, 5)"),
    (lambda x: x.a * x.t[0, :2, :3], "a * t[0, :2, :3]", "(3, 4)", "(2, 3)"),
    (lambda x: x.a / np.ones(3, "float32"), "a / [1.0, 1.0, 1.0]", "(3, 4)", "(3,)"),
    (lambda x: x.a @ x.b, "a @ b", "(3, 4)", "(3, 4)"),
    (lambda x: x.a @ x.s, "a @ s", "(3, 4)", "()"),
    (lambda x: 2.0 @ x.a, "2.0 @ a", "()", "(3, 4)"),
    (
        lambda x: ops.stack([x.t, x.t]) @ x.t[:, :, None].reshape(6, 4, 1),
        "stack([t, t], axis=0) @ ",
        "(2, 2, 3, 4)",
        "6",
    ),
    (lambda x: ops.concatenate([x.a, x.m]), "concatenate([a, m], axis=0)", "(3, 4)", "(4, 5)"),
    (lambda x: ops.concatenate([x.a, x.v]), "concatenate([a, v], axis=0)", "(3, 4)", "(4,)"),
    (lambda x: ops.concatenate([x.a, x.b], axis=2), "concatenate([a, b], axis=2)", "(3, 4)", "(3, 4)"),
    (lambda x: ops.stack([x.a, x.a.T]), "stack([a, a.T], axis=0)", "(3, 4)", "(4, 3)"),
    (lambda x: ops.stack([x.a, x.b], axis=3), "stack([a, b], axis=3)", "(3, 4)", "(3, 4)"),
    (lambda x: ops.where(x.t, x.a, x.m), "where(t, a, m)", "(2, 3, 4)", "(4, 5)"),
    (lambda x: ops.einsum("ij,jk->ik", x.a, x.b), "einsum('ij,jk->ik', a, b)", "4", "3"),
    (lambda x: ops.einsum("ijk->k", x.a), "einsum('ijk->k', a)", "3 axes", "(3, 4)"),
    (lambda x: ops.einsum("ij,ij->", x.a), "'ij,ij->'", "2", "1"),
    (lambda x: x.a.reshape(5, 2), "a", "(3, 4)", "(5, 2)"),
    (lambda x: x.a.reshape(5, -1), "a", "(3, 4)", "(5, -1)"),
    (lambda x: x.a.transpose(0, 2), "a.transpose(0, 2)", "2 axes", "(0, 2)"),
    (lambda x: x.a.transpose(0, 0), "a.transpose(0, 0)", "2 axes", "(0, 0)"),
    (lambda x: x.a.transpose(0), "a.transpose(0)", "2 axes", "(0,)"),
    (lambda x: x.a.swapaxes(0, 2), "a", "(3, 4)", "axis2=2"),
    (lambda x: x.v.mT, "v", "1 axes", "axis1=-2"),
    (lambda x: x.a.sum(2), "sum(a, axis=2)", "(3, 4)", "axis=2"),
    (lambda x: x.a.mean((0, -2)), "mean(a, axis=(0, -2))", "(3, 4)", "(0, -2)"),
    (lambda x: x.a[:, :0].max(1), "max(a[:, :0], axis=1)", "no numbers", "(3, 0)"),
    (lambda x: ops.maximum(x.a, x.m), "maximum(a, m)", "(3, 4)", "(4, 5)"),
    (lambda x: x.a[3], "a[3]", "(3, 4)", "3"),
    (lambda x: x.a[0, 0, 0], "a[0, 0, 0]", "(3, 4)", ""),
    (lambda x: ops.take(x.a, [0, 3]), "a", "3 entries", "index=3"),
    (lambda x: ops.take(x.a, [0], axis=2), "a", "2 axes", "axis=2"),
]


@pytest.mark.parametrize("make, text, first, second", MISFITS, ids=[case[1] for case in MISFITS])
def test_shapes_that_do_not_fit_are_named_where_they_are_written(make, text, first, second, weights):
    with pytest.raises(ShapeMismatch) as caught:
        make(weights)
    for part in (text, first, second):
        assert part in str(caught.value)


def test_shapes_of_late_weights_are_checked_when_they_are_known(weights):
    late = tether.Weight(name="late")
    expression = late.T @ weights.m
    late.give_start((3, 4), "float32", "zeros")
    with pytest.raises(ShapeMismatch, match=r"late.T @ m.*\(4, 3\).*\(4, 5\)"):
        assert expression.shape


# --------------------------------------------------------------------------- what must not happen silently


@pytest.mark.parametrize("convert", [np.array, np.asarray, lambda e: np.zeros((3, 4)).__setitem__(..., e)])
@pytest.mark.parametrize("make", [lambda x: x.a, lambda x: x.a + x.b])
def test_becoming_an_array_is_refused(convert, make, weights):
    with pytest.raises(tether.TetherError, match=r"freeze.*\.value"):
        convert(make(weights))


@pytest.mark.parametrize(
    "function, said",
    [
        (np.sum, r"`tether\.ops\.sum`"),
        (np.exp, r"`tether\.ops\.exp`"),
        (np.add.reduce, r"array"),
        (np.tanh, r"`tanh`"),
        (np.concatenate, r"."),
        (lambda e: np.add(e, 1, out=np.zeros((3, 4))), r"`add`"),
        (lambda e: np.add(e, 1, dtype="float64"), r"`add`"),
        (lambda e: np.float32(1) < e, r"`less`"),
        (float, r"number"),
        (int, r"number"),
    ],
)
def test_numpy_does_not_compute_with_expressions(function, said, weights):
    with pytest.raises(TypeError, match=said):
        function(weights.a + weights.b)


def test_an_array_and_an_expression_are_not_equal(weights):
    for array in (BIG, np.float32(1)):
        assert (array == weights.a) is False
        assert (array != weights.a) is True


def test_a_name_of_an_array_that_an_expression_is_added_to_means_an_expression_then(weights):
    array = kept = BIG.copy()
    array += weights.a
    assert array == BIG + weights.a
    np.testing.assert_array_equal(kept, BIG)


@pytest.mark.parametrize("make", [lambda x: x.a, lambda x: x.a + x.b])
def test_iterating_and_membership_are_refused(make, weights):
    with pytest.raises(TypeError):
        iter(make(weights))
    with pytest.raises(TypeError):
        list(make(weights))
    with pytest.raises(TypeError):
        1.0 in make(weights)  # noqa: B015


def test_expressions_are_true(weights):
    assert weights.a + weights.b
    assert weights.a


def test_arrays_and_tensors_on_the_left_hand_over(weights):
    for left in (BIG, BIG.astype("float64"), keras.ops.convert_to_tensor(BIG)):
        for expression, expected in (
            (left + weights.a, BIG + VALUES["a"]),
            (left - weights.a, BIG - VALUES["a"]),
            (left * weights.a, BIG * VALUES["a"]),
            (left / weights.a, BIG / VALUES["a"]),
            (left @ weights.a.T, BIG @ VALUES["a"].T),
        ):
            assert isinstance(expression, tether.Expression)
            assert expression.dtype == "float32"
            assert_close(expression.value, expected)
    assert isinstance(np.float32(2) * weights.a, tether.Expression)


@pytest.mark.parametrize("wrong", [None, "text", object(), {"a": 1}, {1, 2}, 1j])
def test_operands_that_are_no_numbers_are_refused(wrong, weights):
    for operate in (lambda e, o: e + o, lambda e, o: o - e, lambda e, o: e * o, lambda e, o: o / e, lambda e, o: e @ o):
        with pytest.raises(TypeError):
            operate(weights.a, wrong)
    with pytest.raises(TypeError):
        ops.concatenate([weights.a, wrong])


@pytest.mark.parametrize(
    "wrong",
    [np.array(["a"]), np.array([1j]), np.array([object()]), [["a"]], [[1], [1, 2]], np.array([1], "M8[s]"), 1 << 70],
)
def test_constants_that_are_no_real_numbers_are_refused(wrong, weights):
    with pytest.raises(tether.TetherError):
        weights.a + wrong


def test_a_large_constant_is_refused_and_the_error_says_weight(weights):
    with pytest.raises(tether.TetherError, match=r"1,048,577 elements.*tether\.Weight"):
        weights.s * np.zeros((1 << 20) + 1, dtype="float32")
    assert (weights.s * np.zeros(1 << 20, dtype="float32")).shape == (1 << 20,)


def test_constants_are_copies(weights):
    array = ARRAY.copy()
    expression = weights.a * array
    before, text = expression.numpy(), hash(expression)
    array[:] = 100.0
    np.testing.assert_array_equal(expression.numpy(), before)
    assert hash(expression) == text
    with pytest.raises(ValueError, match="read-only"):
        expression.operands[1].array[0] = 3.0


@pytest.mark.parametrize(
    "array, dtype",
    [
        (np.ones(4), "float32"),
        (np.ones(4, "float16"), "float16"),
        (np.ones(4, ">f4"), "float32"),
        (np.ones(4, "int64"), "int32"),
        (np.ones(4, "int8"), "int8"),
        (np.ones(4, "bool"), "bool"),
        ([1, 2], "int32"),
        ([1.0, 2], "float32"),
        ((1.5,), "float32"),
        (2, "int"),
        (2.0, "float"),
        (np.float16(2), "float"),
        (True, "bool"),
    ],
)
def test_constants_take_the_dtypes_of_keras(array, dtype):
    assert Constant.of(array).dtype == dtype


def test_a_variable_of_a_layer_is_no_constant(weights):
    layer = keras.layers.Dense(4)
    layer.build((None, 3))
    with pytest.raises(tether.TetherError, match="weight_of"):
        weights.a + layer.kernel


def test_constants_that_are_numbers_tell_int_from_float_and_signs_of_zero():
    assert Constant.of(1) != Constant.of(1.0)
    assert Constant.of(0.0) != Constant.of(-0.0)
    assert Constant.of(float("nan")) == Constant.of(float("nan"))
    assert Constant.of([1.0]) != Constant.of([1])
    with pytest.raises(AttributeError):
        Constant.of(1).number = 2


def test_wrong_indices_are_refused(weights):
    for key in ([0, 1], np.array([0, 1]), (0, [1]), "x", 1.5, True, slice("a", None), slice(None, None, 0), (..., ...)):
        with pytest.raises(tether.TetherError):
            weights.a[key]


@pytest.mark.parametrize("equation", ["ij", "ij->ik->k", "i...->i", "ij->ii", "ij->k", "i1->i", 3, "é->é"])
def test_wrong_equations_are_refused(equation, weights):
    with pytest.raises(tether.TetherError):
        ops.einsum(equation, weights.a)


def test_an_equation_may_repeat_a_label(weights):
    square = weights.a @ weights.m @ weights.n
    plain = VALUES["a"] @ VALUES["m"] @ VALUES["n"]
    assert_close(ops.einsum("ii->i", square).value, np.diag(plain), 1e-4)
    assert_close(ops.einsum("ii->", square).value, np.trace(plain), 1e-4)


def test_wrong_dtypes_and_scales_are_refused(weights):
    for wrong in ("float33", object(), 3):
        with pytest.raises(tether.TetherError):
            weights.a.astype(wrong)
    for wrong in (float("nan"), float("inf"), "2", None, True):
        with pytest.raises(tether.TetherError):
            weights.a.scale_gradient(wrong)


def test_joining_nothing_is_refused():
    for join in (ops.concatenate, ops.stack):
        with pytest.raises(tether.TetherError, match="at least one"):
            join([])


# --------------------------------------------------------------------------- apply


def not_registered(x):
    return x


class Callable:
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    "function", [lambda x: x, not_registered, len, np.tanh, Callable(), keras.layers.Dense(2), int, None, "tanh"]
)
def test_apply_refuses_what_a_file_cannot_name(function, weights):
    with pytest.raises(tether.TetherError, match="register_keras_serializable"):
        ops.apply(function, weights.a)


@keras.saving.register_keras_serializable("tether_tests")
def two_results(x):
    return x, x


@keras.saving.register_keras_serializable("tether_tests")
def fails(x):
    raise RuntimeError("no such thing")


def test_apply_refuses_functions_that_do_not_return_one_tensor(weights):
    with pytest.raises(tether.TetherError, match="one tensor"):
        ops.apply(two_results, weights.a)
    with pytest.raises(tether.TetherError, match="no such thing"):
        ops.apply(fails, weights.a)


def test_apply_is_written_by_name(weights):
    assert encode(ops.apply(squared_gap, weights.a, weights.b))[-1]["function"] == "tether_tests>squared_gap"
    assert encode(ops.apply(keras.ops.tanh, weights.a))[-1]["function"] == "keras.ops.tanh"


# --------------------------------------------------------------------------- gradients


def test_gradients_reach_weights_as_written(weights):
    x = make_weights()
    expression = x.a.stop_gradient() * x.b + x.a.scale_gradient(0.5) * 3.0 + 2.0 * x.a
    _, (da, db) = gradients(lambda: keras.ops.sum(expression.value), [x.a.variable, x.b.variable])
    assert_close(da, np.full((3, 4), 0.5 * 3.0 + 2.0))
    assert_close(db, VALUES["a"])


def test_no_gradient_flows_through_stop_gradient():
    x = make_weights()
    expression = (x.a * x.b).stop_gradient() + x.b
    _, (da, db) = gradients(lambda: keras.ops.sum(expression.value), [x.a.variable, x.b.variable])
    assert_close(as_zero(da, (3, 4)), np.zeros((3, 4)))
    assert_close(db, np.ones((3, 4)))


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.25, 3])
def test_scale_gradient_keeps_the_value_to_the_last_bit(scale):
    x = make_weights()
    scaled = x.a.scale_gradient(scale)
    np.testing.assert_array_equal(scaled.numpy(), VALUES["a"])
    _, (da,) = gradients(lambda: keras.ops.sum(keras.ops.square(scaled.value)), [x.a.variable])
    assert_close(da, scale * 2 * VALUES["a"])


# --------------------------------------------------------------------------- arguments


def test_an_argument_takes_the_value_that_is_bound(weights):
    strength = Argument("strength")
    expression = weights.a + strength * weights.b
    assert expression.shape == (3, 4)
    assert expression.dtype == "float32"
    assert expression.notation() == "a + strength * b"
    for value in (0.5, 2, np.float64(3.0), keras.ops.convert_to_tensor(4.0)):
        with bind({strength: value}):
            assert_close(expression.value, VALUES["a"] + float(value) * VALUES["b"])


def test_an_argument_without_a_value_says_how_to_bind_it(weights):
    strength = Argument("strength")
    with pytest.raises(UnboundArgument, match=r"strength.*bind"):
        (weights.a * strength).numpy()
    with bind({Argument("other"): 1.0}), pytest.raises(UnboundArgument):
        (weights.a * strength).numpy()
    with bind({strength: 1.0}):
        pass
    with pytest.raises(UnboundArgument):
        (weights.a * strength).numpy()


def test_inner_bindings_win_and_end_with_their_block(weights):
    first, second = Argument("first"), Argument("second")
    total = first + second * weights.s
    s = VALUES["s"]
    with bind({first: 1.0, second: 2.0}):
        assert_close(total.value, 1 + 2 * s)
        with bind({first: 10.0}):
            assert_close(total.value, 10 + 2 * s)
        assert_close(total.value, 1 + 2 * s)
        with pytest.raises(RuntimeError, match="on purpose"), bind({second: 7.0}):
            raise RuntimeError("on purpose")
        assert_close(total.value, 1 + 2 * s)


def test_a_binding_is_seen_by_its_own_thread_only(weights):
    strength = Argument("strength")
    expression = strength * weights.v
    found, barrier = {}, threading.Barrier(2, timeout=30)

    def work(value):
        with bind({strength: value}):
            barrier.wait()
            found[value] = expression.numpy()
            barrier.wait()

    def look():
        try:
            expression.numpy()
        except UnboundArgument as error:
            found["unbound"] = error

    threads = [threading.Thread(target=work, args=(value,)) for value in (2.0, 3.0)]
    with bind({strength: 5.0}):
        other = threading.Thread(target=look)
        for thread in [*threads, other]:
            thread.start()
        for thread in [*threads, other]:
            thread.join()
        assert_close(expression.value, 5.0 * VALUES["v"])
    assert_close(found[2.0], 2.0 * VALUES["v"])
    assert_close(found[3.0], 3.0 * VALUES["v"])
    assert isinstance(found["unbound"], UnboundArgument)


def test_a_bound_value_has_the_shape_of_the_argument(weights):
    rows = Argument("rows", (3, 1))
    with bind({rows: np.array([[1.0], [2.0], [3.0]])}):
        assert_close((rows * weights.a).value, np.array([[1.0], [2.0], [3.0]]) * VALUES["a"])
    for wrong in (1.0, np.ones(3), np.ones((1, 3))):
        with pytest.raises(ShapeMismatch, match=r"rows.*\(3, 1\)"), bind({rows: wrong}):
            raise AssertionError("it was bound")
    with pytest.raises(tether.TetherError), bind({"rows": 1.0}):
        raise AssertionError("it was bound")


def test_arguments_of_one_name_shape_and_dtype_are_one():
    one = Argument("k", (2,), "int32")
    assert one == Argument("k", (2,), "int32") == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one)
    assert hash(one) == hash(Argument("k", (2,), "int32"))
    assert (one.shape, one.dtype, one.notation(), repr(one)) == ((2,), "int32", "k", "k")
    assert Argument("k").dtype == keras.config.floatx()
    with pytest.raises(AttributeError):
        one.name = "j"


@pytest.mark.parametrize("name", ["", "two words", "1st", None, 3, "a.b"])
def test_an_argument_has_an_identifier_for_a_name(name):
    with pytest.raises(tether.TetherError, match="identifier"):
        Argument(name)


# --------------------------------------------------------------------------- assigning through an expression

INVERTIBLE = [
    lambda x: x.a,
    lambda x: x.a.T,
    lambda x: x.t.transpose(1, 2, 0),
    lambda x: x.t.transpose(-1, 0, 1),
    lambda x: x.a.reshape(2, 6),
    lambda x: x.a.reshape(-1),
    lambda x: -x.a,
    lambda x: x.a + 2.0,
    lambda x: 2.0 + x.a,
    lambda x: x.a - 2,
    lambda x: 2 - x.a,
    lambda x: 0.5 * x.a,
    lambda x: x.a * 3,
    lambda x: x.a / 4.0,
    lambda x: x.a * (BIG + 0.5),
    lambda x: (BIG + 0.5) * x.a,
    lambda x: x.a + BIG,
    lambda x: BIG - x.a,
    lambda x: x.a + ARRAY,
    lambda x: x.a.stop_gradient(),
    lambda x: x.a.scale_gradient(0.5),
    lambda x: x.a.astype("float32"),
    lambda x: ops.concatenate([x.a, x.b]),
    lambda x: ops.concatenate([x.u, x.a], axis=-1),
    lambda x: ops.stack([x.a, x.b], axis=1),
    lambda x: (2.0 * ops.stack([x.a.T, x.b.T - 1.0], axis=-1)).T,
    lambda x: (-(0.5 * x.a.T) + 1.0).reshape(12),
]


@pytest.mark.parametrize("make", INVERTIBLE, ids=[make(make_weights()).notation() for make in INVERTIBLE])
def test_what_is_assigned_through_an_expression_is_its_value(make, rng):
    expression = make(make_weights())
    value = rng.normal(size=expression.shape).astype("float32")
    assert is_invertible(expression)
    expression.assign(value)
    np.testing.assert_allclose(expression.numpy(), value, rtol=1e-5, atol=1e-5)
    expression.assign(keras.ops.convert_to_tensor(value + 1))
    np.testing.assert_allclose(expression.numpy(), value + 1, rtol=1e-5, atol=1e-5)


NOT_INVERTIBLE = [
    (lambda x: x.a + x.b, "a + b"),
    (lambda x: x.a * x.b, "a * b"),
    (lambda x: x.a @ x.m, "a @ m"),
    (lambda x: 1.0 / x.a, "1.0 / a"),
    (lambda x: 0 * x.a, "0 * a"),
    (lambda x: x.a * [1.0, 0.0, 1.0, 1.0], "a * [1.0, 0.0, 1.0, 1.0]"),
    (lambda x: x.v + BIG, "v + array[3, 4]"),
    (lambda x: x.a[1:], "a[1:]"),
    (lambda x: ops.take(x.a, [0, 1, 2]), "take"),
    (lambda x: ops.where(BIG > 0, x.a, x.b), "where"),
    (lambda x: ops.einsum("ij->ji", x.a), "einsum"),
    (lambda x: ops.apply(keras.ops.tanh, x.a), "tanh"),
    (lambda x: (2.0 * (x.a + x.b)).T, "a + b"),
    (lambda x: ops.concatenate([x.a, x.a]), "a"),
    (lambda x: ops.stack([x.b, x.a, x.a]), "a"),
    (lambda x: ops.concatenate([x.b, BIG]), "concatenate"),
    (lambda x: ops.concatenate([x.b, Constant.of(BIG).stop_gradient()]), "array[3, 4]"),
    (lambda x: ops.stack([x.v, Argument("k", (4,))]), "k"),
    (lambda x: -Argument("k", (4,)), "k"),
]


@pytest.mark.parametrize(
    "make, part", NOT_INVERTIBLE, ids=[case[0](make_weights()).notation() for case in NOT_INVERTIBLE]
)
def test_an_expression_without_an_inverse_refuses_and_changes_nothing(make, part, rng):
    weights = make_weights()
    expression = make(weights)
    with pytest.raises(NotInvertible) as caught:
        expression.assign(rng.normal(size=expression.shape).astype("float32"))
    assert part in str(caught.value)
    assert expression.notation() in str(caught.value)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(getattr(weights, name).numpy(), value)


def test_one_weight_in_two_places_takes_a_value_that_agrees():
    weights = make_weights()
    twice = ops.stack([weights.v, weights.v])
    twice.assign(np.stack([ARRAY, ARRAY]))
    np.testing.assert_array_equal(weights.v.numpy(), ARRAY)


def test_assigning_another_shape_changes_nothing():
    weights = make_weights()
    for expression in (weights.a, weights.a.T, ops.concatenate([weights.a, weights.b])):
        with pytest.raises(ShapeMismatch):
            expression.assign(np.zeros((2, 2), "float32"))
    np.testing.assert_array_equal(weights.a.numpy(), VALUES["a"])
    np.testing.assert_array_equal(weights.b.numpy(), VALUES["b"])


# --------------------------------------------------------------------------- value


def test_value_follows_what_is_stored(weights):
    x = make_weights()
    expression = 2.0 * x.a.T
    before = expression.numpy()
    x.a.assign(VALUES["a"] + 1)
    np.testing.assert_allclose(expression.numpy(), before + 2, rtol=1e-6)
    copied = expression.numpy()
    copied[:] = 0
    assert np.all(expression.numpy() != 0)


def test_value_casts_as_keras_does_inside_an_autocast_scope():
    x = make_weights()
    with keras.backend.AutocastScope("bfloat16") if hasattr(keras.backend, "AutocastScope") else autocast("bfloat16"):
        assert keras.backend.standardize_dtype((x.a + x.b * 0.5).value.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype((x.a + x.b * 0.5).value.dtype) == "float32"


def autocast(dtype):
    from tether import keras_seam

    return keras_seam.AutocastScope(dtype)


def test_a_node_checks_how_it_is_made(weights):
    add, reshape = OPERATORS["add"], OPERATORS["reshape"]
    for wrong in (lambda: add(weights.a), lambda: add(), lambda: add(weights.a, weights.b, weights.a)):
        with pytest.raises(tether.TetherError, match="operand"):
            wrong()
    with pytest.raises(tether.TetherError, match="parameters"):
        add(weights.a, weights.b, axis=1)
    for wrong in ("12", None, [1.5, 8], [True, 12], [-2, 6], [-1, -1]):
        with pytest.raises(InvalidConfig):
            reshape(weights.a, shape=wrong)


def test_a_function_gets_plain_tensors():
    weight = tether.Weight(np.eye(3, dtype="float32"), name="square")
    assert_close(tether.ops.apply(keras.ops.diagonal, weight).value, np.ones(3))
    layer = tether.Lambda(diagonal_times, square=weight)
    assert_close(layer(np.ones((2, 3), "float32")), np.ones((2, 3)))


@keras.saving.register_keras_serializable(package="tests")
def diagonal_times(x, square):
    return x * keras.ops.diagonal(square)


@pytest.mark.parametrize("index", [0.5, np.float32(1), True], ids=["float", "array", "bool"])
def test_an_index_that_is_no_whole_number_is_refused_at_once(index):
    options = [tether.Weight((2, 2), name=name) for name in ("a", "b")]
    with pytest.raises(TetherError, match="An index is a whole number"):
        tether.ops.choose(index, options)

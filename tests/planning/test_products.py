"""The sum-of-products form of an expression is the expression."""

import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tether
from tests.planning.drawing import Drawing
from tether import forms, ops
from tether.planning.products import MAX_FACTORS, MAX_TERMS, products
from tether.weights import Argument, bind
from tether.weights.operators.arithmetic import ScaleGradient, StopGradient


def value_of(form):
    """The value of a form by its definition: for each term one einsum of its factors, with the labels as letters."""
    total = np.zeros(form.shape)
    for term in form.terms:
        names = {label: place for place, label in enumerate({label: 0 for f in term.factors for label in f.labels})}
        operands = []
        for factor in term.factors:
            array = factor.expression.numpy().astype("float64")
            assert array.shape == factor.expression.shape == tuple(form.sizes[label] for label in factor.labels)
            operands += [array, [names[label] for label in factor.labels]]
        flat = [label for axis in term.axes for label in axis]
        assert len(set(flat)) == len(flat)
        value = np.einsum(*operands, [names[label] for label in flat]) if operands else np.float64(1.0)
        shape = [math.prod(form.sizes[label] for label in axis) for axis in term.axes]
        assert all(axis == () or size == whole for axis, size, whole in zip(term.axes, shape, form.shape, strict=True))
        total = total + term.number * value.reshape(shape)
    return total


def assert_equal(expression, terms=None, factors=None):
    """The form equals the expression; it has so many terms, of so many factors."""
    form = products(expression)
    assert form.shape == expression.shape
    wanted = expression.numpy().astype("float64")
    np.testing.assert_allclose(value_of(form), wanted, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(wanted).max(initial=0)))
    if terms is not None:
        assert len(form.terms) == terms
    if factors is not None:
        assert sorted(len(term.factors) for term in form.terms) == sorted(factors)
    return form


def weight(*shape, seed=0):
    value = np.random.default_rng([seed, *shape]).uniform(0.5, 1.5, shape)
    return tether.Weight(np.asarray(value, "float32"), name=f"w{seed}")


W, V = weight(4, 6), weight(4, 6, seed=1)
A, B = weight(4, 2), weight(2, 6)
ROW, COLUMN, VECTOR, NUMBER = weight(1, 6), weight(4, 1), weight(6), weight()
CUBE = weight(2, 3, 4)

# name -> expression, terms, factors of each term
RULES = {
    "weight": (W, 1, [1]),
    "add": (W + V, 2, [1, 1]),
    "subtract": (W - V, 2, [1, 1]),
    "subtract a sum": (W - (V - A @ B), 3, [1, 1, 2]),
    "negative": (-(W + V), 2, [1, 1]),
    "add a vector": (W + VECTOR, 2, [1, 1]),
    "add a column": (W + COLUMN, 2, [1, 1]),
    "add to a vector": (VECTOR - W, 2, [1, 1]),
    "add grows": (COLUMN + ROW, 2, [1, 1]),
    "add a number": (W + 2.0, 2, [0, 1]),
    "subtract from a number": (1 - W, 2, [0, 1]),
    "add a scalar weight": (W + NUMBER, 2, [1, 1]),
    "low rank": (W + 0.5 * A @ B, 2, [1, 2]),
    "multiply": (W * V, 1, [2]),
    "multiply by itself": (W * W, 1, [2]),
    "multiply by its transpose": (weight(4, 4) * weight(4, 4).T, 1, [2]),
    "multiply by a column": (W * COLUMN, 1, [2]),
    "multiply by a row": (ROW * W, 1, [2]),
    "multiply by a vector": (VECTOR * W, 1, [2]),
    "multiply grows": (COLUMN * VECTOR, 1, [2]),
    "multiply by a scalar weight": (NUMBER * W, 1, [2]),
    "multiply by a number": (-3 * W, 1, [1]),
    "multiply sums": ((W + V) * (COLUMN - A @ B), 4, [2, 2, 3, 3]),
    "multiply by an array": (W * np.arange(6.0), 1, [2]),
    "divide by a number": (W / 4, 1, [1]),
    "divide by a weight": (W / VECTOR, 1, [2]),
    "divide a sum": ((W + A @ B) / COLUMN, 2, [2, 3]),
    "divide a number": (2.0 / W, 1, [1]),
    "matmul": (A @ B, 1, [2]),
    "matmul of sums": ((A + 1) @ (B + 2), 4, [0, 1, 1, 2]),
    "matmul, three": (A @ weight(2, 2) @ B, 1, [3]),
    "matmul with its transpose": (A @ A.T, 1, [2]),
    "matmul, power": (weight(3, 3) @ weight(3, 3) @ weight(3, 3), 1, [3]),
    "matmul, inner of size 1": (COLUMN @ ROW, 1, [2]),
    "matmul, matrix and vector": (W @ VECTOR, 1, [2]),
    "matmul, vector and matrix": (weight(4) @ W, 1, [2]),
    "matmul, vectors": (VECTOR @ weight(6, seed=3), 1, [2]),
    "matmul of what is the same along its inner axis": (
        (weight(4, 1) + np.zeros((1, 2), "float32")) @ B, 2, [2, 2],
    ),
    "matmul of numbers": ((A * 0.0 + 1.0) @ (B * 0.0 + 2.0), 4, None),
    "matmul of stacks": (CUBE @ weight(4, 2), 1, [2]),
    "einsum": (ops.einsum("ab,bc->ac", A, B), 1, [2]),
    "einsum, order": (ops.einsum("ab,bc->ca", A, B), 1, [2]),
    "einsum, outer": (ops.einsum("a,b,c->cab", weight(2), weight(3), weight(4)), 1, [3]),
    "einsum, elementwise": (ops.einsum("ab,ab->ab", W, V), 1, [2]),
    "einsum, sum": (ops.einsum("ab->b", W), 1, [1]),
    "einsum, sum of what is the same": (ops.einsum("ab,ab->b", W + 1.0, V + VECTOR), 4, None),
    "einsum, diagonal": (ops.einsum("aa->a", weight(3, 3)), 1, [1]),
    "einsum of sums": (ops.einsum("ab,bc->ac", A + COLUMN, B), 2, [2, 2]),
    "transpose": (W.T, 1, [1]),
    "transpose a product": ((A @ B).T + weight(6, 4), 2, [1, 2]),
    "transpose with axes": (CUBE.transpose(2, 0, 1), 1, [1]),
    "transpose with negative axes": (ops.transpose(CUBE, (-1, 0, 1)), 1, [1]),
    "transpose a broadcast": ((CUBE + weight(3, 1)).transpose(1, 2, 0), 2, [1, 1]),
    "reshape splits": ((A @ B).reshape(2, 2, 6), 1, [2]),
    "reshape splits in three": ((weight(12, 2) @ B).reshape(2, 3, 2, 6), 1, [2]),
    "reshape joins": ((A @ B).reshape(24), 1, [2]),
    "reshape regroups": ((A @ B).reshape(8, 3), 1, [2]),
    "reshape to ones": ((A @ B).reshape(4, 1, 6, 1), 1, [2]),
    "reshape there and back": (((W + A @ B).reshape(2, 12)).reshape(4, 6), 2, [1, 2]),
    "reshape across": ((A @ B).reshape(3, 8), 1, None),
    "reshape a broadcast": ((W + VECTOR).reshape(24), 1, [1]),
    "split parts meet": ((A @ B).reshape(2, 2, 6) * weight(2, 1, 3, 2).reshape(2, 1, 6), 1, [3]),
    "joined meets split": (ops.einsum("ab,cd->acbd", weight(2, 3), weight(2, 2)).reshape(4, 6) * W, 1, [3]),
    "kronecker": (W + ops.einsum("ab,cd->acbd", weight(2, 3), weight(2, 2)).reshape(4, 6), 2, [1, 2]),
    "kronecker twice": (
        ops.einsum("ab,cd->acbd", weight(2, 3), weight(2, 2)).reshape(4, 6)
        @ ops.einsum("ab,cd->acbd", weight(3, 2), weight(2, 2)).reshape(6, 4),
        1,
        [4],
    ),
    "slice": (W[1:3], 1, [1]),
    "slice a product": ((W + A @ B)[1:, ::2], 2, [1, 2]),
    "slice with a negative step": ((W + A @ B)[::-1, 4::-2], 2, [1, 2]),
    "slice to one": ((A @ B)[1:2], 1, [2]),
    "integer": ((A @ B)[1], 1, [2]),
    "negative integer": ((A @ B)[:, -2], 1, [2]),
    "new axis": ((A @ B)[:, None], 1, [2]),
    "new axis and integer": ((W + VECTOR)[None, -1, ..., 2:], 2, [1, 1]),
    "ellipsis": ((CUBE * weight(4))[..., 1], 1, [2]),
    "slice what is the same": ((W + VECTOR)[2], 2, [1, 1]),
    "slice nothing": ((A @ B)[0:0], 1, None),
    "slice a joined axis": ((A @ B).reshape(24)[3:9], 1, [1]),
    "stop_gradient": ((W + A @ B).stop_gradient(), 2, [1, 2]),
    "scale_gradient": ((W + A @ B).scale_gradient(0.5), 2, [1, 2]),
    "opaque": (ops.apply(keras.ops.tanh, W) + A @ B, 2, [1, 2]),
    "opaque parts": (A @ ops.apply(keras.ops.tanh, B), 1, [2]),
    "concatenated": (ops.concatenate([W, V]) @ weight(6, 2), 1, [2]),
    "taken": (ops.take(W, [0, 0, 3]) + VECTOR, 2, [1, 1]),
    "cast": ((W + V).astype("float32"), 1, [1]),
    "several dtypes": (tether.Weight(np.ones((4, 6), "float16"), name="half") + A @ B, 2, [1, 2]),
    "integers": (W * tether.Weight(np.arange(6), name="n", dtype="int32", trainable=False), 1, [2]),
    "adapted": (
        tether.weights.operators.choice.Adapted(W, NUMBER, A @ B, names=("french",)), 2, [1, 3],
    ),
    "axes of size 1": (weight(1, 1) * weight(1, 3) + weight(1, 1), 2, [1, 2]),
    "a scalar": (NUMBER * 2.0 + 1.0, 2, [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_form_equals_the_expression(name):
    expression, terms, factors = RULES[name]
    assert_equal(expression, terms, factors)


def test_the_forms_of_forms_are_sums():
    base = tether.Weight(np.random.default_rng(0).normal(size=(8, 12)).astype("float32"), name="base")
    for form, factors in (
        (forms.low_rank(2, start="pissa"), [1, 2, 2]),
        (forms.vera(3, seed=1), [1, 4]),
        (forms.hadamard(2, alpha=4, seed=1), [1, 4]),
        (forms.kronecker(seed=1), [1, 2]),
        (forms.kronecker(1, alpha=2, seed=1), [1, 3]),
        (forms.scale(), [2]),
        (forms.oft(4), [1, 2]),
        (forms.oft(2, share=True, terms=5), [1, 2]),
        (forms.boft(2, factors=2), [2, 3, 3, 4]),
        (forms.fourier(5), [1, 1]),
    ):
        assert_equal(form(base.stop_gradient()), len(factors), factors)


def test_gradients_are_cut_and_scaled_at_each_factor():
    (whole, low) = assert_equal((W + A @ B).stop_gradient()).terms
    assert all(isinstance(factor.expression, StopGradient) for factor in (*whole.factors, *low.factors))
    (twice,) = assert_equal((A.stop_gradient() @ B).stop_gradient()).terms
    assert [factor.expression for factor in twice.factors] == [A.stop_gradient(), B.stop_gradient()]
    (scaled,) = assert_equal((A @ B).scale_gradient(0.25)).terms
    assert [factor.expression for factor in scaled.factors] == [A.scale_gradient(0.25), B.scale_gradient(0.25)]
    assert isinstance(scaled.factors[0].expression, ScaleGradient)


def test_too_many_terms_become_one_factor():
    most = sum([weight(4, 6, seed=n) for n in range(1, MAX_TERMS)], W)
    assert_equal(most, MAX_TERMS)
    assert_equal(most + VECTOR, 1, [1])
    assert_equal(most + VECTOR + A @ B, 2, [1, 2])
    assert_equal((W + V + A @ B) * (COLUMN + ROW), 6)
    assert_equal((W + V + A @ B) * (COLUMN + ROW + 1.0), 1, [1])
    assert_equal((W + V + A @ B) @ (W.T + V.T + B.T @ A.T), 1, [1])


def test_too_many_factors_become_one_factor():
    chain = weight(3, 3)
    for n in range(MAX_FACTORS - 1):
        chain = chain @ weight(3, 3, seed=n + 1)
    assert_equal(chain, 1, [MAX_FACTORS])
    form = assert_equal(chain @ weight(3, 3, seed=50), 1)
    assert len(form.terms[0].factors) <= MAX_FACTORS


def test_a_deep_expression_is_done_without_recursion():
    deep = W
    for _ in range(1500):
        deep = -deep
    assert_equal(deep, 1, [1])


def test_arguments_and_choices_are_factors():
    strength = Argument("strength")
    with bind({strength: 0.5}):
        assert_equal(W + strength * (A @ B), 2, [1, 3])
    choice = Argument("choice", (), "int32", default=1)
    assert_equal(ops.choose(choice, [W, W + A @ B]) + V, 2, [1, 1])


@given(st.randoms(use_true_random=False), st.sampled_from([(4, 6), (6, 2), (2, 3, 4), (6,), (1, 4)]))
@settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_random_expressions(random, shape):
    assert_equal(Drawing(random).expression(shape, 3))

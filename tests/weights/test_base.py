"""Which weight of an expression is the base, and which were added: told by structure, whatever anybody is called."""

import time

import keras
import numpy as np
import pytest

import tether
from tests.forms.cases import CASES, expression_of, own_weights
from tether import forms, ops
from tether.errors import NotInvertible
from tether.layers.quantization import matrices
from tether.weights import Weight
from tether.weights.algebra import added_weights, base_of, put, split_sum
from tether.weights.expression import resolved
from tether.weights.operators.choice import Adapted
from tether.weights.operators.quantized import rounded

ROWS, COLUMNS, RANK = 6, 4, 2


def weights(*shapes, names="abcdefgh", **kwargs):
    rng = np.random.default_rng(2)
    return [Weight(rng.normal(size=s).astype("float32"), name=n, **kwargs) for s, n in zip(shapes, names, strict=False)]


WHOLE = (ROWS, COLUMNS)
LEFT, RIGHT = (ROWS, RANK), (RANK, COLUMNS)
ROW = (COLUMNS,)

HAND_WRITTEN = {
    "a frozen weight and a product": ((WHOLE, LEFT, RIGHT), lambda w, a, b: w.stop_gradient() + a @ b),
    "a weight that trains and a product": ((WHOLE, LEFT, RIGHT), lambda w, a, b: w + a @ b),
    "a product and a weight": ((WHOLE, LEFT, RIGHT), lambda w, a, b: a @ b + w),
    "a scaled product": ((WHOLE, LEFT, RIGHT), lambda w, a, b: w + 0.5 * (a @ b)),
    "two products": ((WHOLE, LEFT, RIGHT, LEFT, RIGHT), lambda w, a, b, c, d: w + a @ b - c @ d),
    "products first": ((WHOLE, LEFT, RIGHT, LEFT, RIGHT), lambda w, a, b, c, d: a @ b + (c @ d + w)),
    "a contraction": ((WHOLE, LEFT, RIGHT), lambda w, a, b: w + ops.einsum("ir,ro->io", a, b)),
    "a product of products": (
        (WHOLE, LEFT, RIGHT, LEFT, RIGHT),
        lambda w, a, b, c, d: w + (a @ b) * (c @ d),
    ),
    "a product for its own rows": ((WHOLE, (ROWS, ROWS)), lambda w, r: w + r @ w),
    "a frozen weight and one that trains": ((WHOLE, WHOLE), lambda w, d: w.stop_gradient() + d),
    "one that trains and a frozen weight": ((WHOLE, WHOLE), lambda w, d: d + w.stop_gradient()),
    "a frozen weight and a share of one that trains": ((WHOLE, WHOLE), lambda w, d: w.stop_gradient() + 0.5 * d),
    "a shift of each output": ((WHOLE, ROW), lambda w, s: w + s),
    "a factor of each output": ((WHOLE, ROW), lambda w, s: w.stop_gradient() * s),
    "a factor of each input": ((WHOLE, (ROWS, 1)), lambda w, s: s * w),
    "a divisor of each output": ((WHOLE, ROW), lambda w, s: w / s),
    "a frozen weight and factors that train": ((WHOLE, WHOLE), lambda w, f: w.stop_gradient() * f),
    "another gradient": ((WHOLE, LEFT, RIGHT), lambda w, a, b: (w.scale_gradient(0.1) + a @ b).scale_gradient(2.0)),
    "another dtype": ((WHOLE, LEFT, RIGHT), lambda w, a, b: w.astype("float64") + a @ b),
    "a sum on a frozen sum": (
        (WHOLE, LEFT, RIGHT, LEFT, RIGHT),
        lambda w, a, b, c, d: (w + a @ b).stop_gradient() + c @ d,
    ),
    "a named part": (
        (WHOLE, LEFT, RIGHT, ()),
        lambda w, a, b, s: Adapted(w.stop_gradient(), s, a @ b, names=("french",)),
    ),
}


@pytest.mark.parametrize(
    "names", ["wabcd", "zyxvu", ["W", "W.a", "W.b", "W.c", "W.d"], ["lora_a", "w", "w.b", "x", "w"]]
)
@pytest.mark.parametrize("what", HAND_WRITTEN)
def test_the_base_of_what_is_written_by_hand_does_not_go_by_names(what, names):
    shapes, write = HAND_WRITTEN[what]
    base, *others = parts = weights(*shapes, names=names)
    expression = write(*parts)
    assert base_of(expression) is base
    assert added_weights(expression) == set(others)
    assert matrices(expression) == [base]
    value = np.random.default_rng(5).normal(size=WHOLE).astype("float32")
    ((taker, taken),) = put(expression, keras.ops.convert_to_tensor(value)).items()
    assert taker is base
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(taken), value)


NO_BASE = {
    "two weights that train": ((WHOLE, WHOLE), lambda a, b: a + b),
    "two frozen weights": ((WHOLE, WHOLE), lambda a, b: a.stop_gradient() + b.stop_gradient()),
    "a mean": ((WHOLE, WHOLE), lambda a, b: 0.5 * a + 0.5 * b),
    "what is subtracted": ((WHOLE, LEFT, RIGHT), lambda w, a, b: a @ b - w),
    "twice a weight": ((WHOLE,), lambda w: w.stop_gradient() + w),
    "a product": ((LEFT, RIGHT), lambda a, b: a @ b),
    "two products": ((LEFT, RIGHT, LEFT, RIGHT), lambda a, b, c, d: a @ b + c @ d),
    "a product of two": ((WHOLE, WHOLE), lambda a, b: a * b),
    "what divides": ((WHOLE, ROW), lambda w, s: s / w),
    "rows that are spread": (((1, COLUMNS), (ROWS, 1)), lambda a, b: a + b),
}


@pytest.mark.parametrize("what", NO_BASE)
def test_where_structure_does_not_tell_there_is_no_base(what):
    shapes, write = NO_BASE[what]
    expression = write(*weights(*shapes))
    assert base_of(expression) is None and split_sum(expression) is None
    assert not added_weights(expression)
    with pytest.raises(NotInvertible):
        put(expression, keras.ops.zeros(expression.shape))


def test_a_weight_is_its_own_base_and_what_has_an_inverse_has_none():
    (w,) = weights(WHOLE)
    assert base_of(w) is base_of(w.stop_gradient()) is w
    for expression in (w.T, 0.5 * w, w + 1.0, w.reshape(COLUMNS, ROWS)):
        assert base_of(expression) is None and not added_weights(expression)
        value = np.arange(24.0, dtype="float32").reshape(expression.shape)
        ((taker, _),) = put(expression, keras.ops.convert_to_tensor(value)).items()
        w.assign(put(expression, keras.ops.convert_to_tensor(value))[w])
        assert taker is w
        np.testing.assert_allclose(expression.numpy(), value, rtol=1e-6)


def test_a_value_goes_through_what_the_base_is_made_of():
    table, a, b = weights((COLUMNS, ROWS), LEFT, RIGHT)
    value = np.random.default_rng(4).normal(size=WHOLE).astype("float32")
    for expression, wanted in ((table.T + a @ b, value.T), (2.0 * table.T + 1.0 + a @ b, (value.T - 1) / 2)):
        (found,) = put(expression, keras.ops.convert_to_tensor(value)).values()
        np.testing.assert_allclose(keras.ops.convert_to_numpy(found), wanted, rtol=1e-6)
        assert base_of(expression) is None and added_weights(expression) == {a, b}


def test_a_base_that_became_integers_is_still_the_base():
    w, a, b, d = weights(WHOLE, LEFT, RIGHT, WHOLE)
    expressions = [w.stop_gradient() + a @ b, w.stop_gradient() + tether.low_rank(2), w.stop_gradient() + d]
    added = [set(expression.weights_used()) - {w} for expression in expressions]
    w.become(rounded(w.numpy(), "int8", (0,)).expression(w, "float32"))
    for expression, others in zip(expressions, added, strict=True):
        assert added_weights(expression) == others
        assert resolved(split_sum(expression).base) == w.became.stop_gradient()
        assert matrices(expression) == []
        with pytest.raises(NotInvertible):
            put(expression, keras.ops.zeros(WHOLE))


@pytest.mark.parametrize("has_base", [True, False])
def test_a_long_sum_is_taken_apart_in_little_time(has_base):
    """As long as an expression may be: none of this recurses, nor compares each term with each."""
    base, a, b = weights(WHOLE, LEFT, RIGHT)
    expression, others = base, [Weight(np.zeros(WHOLE, "float32"), name="o", role="part" if has_base else None)] * 3000
    for other in others:
        expression = expression - other
    expression = expression + a @ b
    started = time.perf_counter()
    assert (base_of(expression) is base) == has_base
    assert added_weights(expression) == ({others[0], a, b} if has_base else set())
    assert time.perf_counter() - started < 20


# --------------------------------------------------------------------------- forms


@pytest.mark.parametrize("name", CASES)
def test_the_base_of_a_form_is_what_is_quantised(name):
    base, expression = expression_of(name)
    assert matrices(expression) == [base]


@pytest.mark.parametrize("name", CASES)
def test_a_forms_own_weights_say_that_they_are(name):
    base, expression = expression_of(name)
    for key, weight in own_weights(expression, base).items():
        assert weight.role == ("state" if key in ("u", "v") else "part" if key in CASES[name].trains else "fixed")
        assert weight.path == (f"w_{key}" if key not in ("a", "b") else f"vera_bases/{key}")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.starts_equal or case.good])
def test_after_a_plain_value_a_form_has_that_value(name, rng):
    """What was only added stays as it is, and what was the base's value again, or follows from it, follows."""
    case = CASES[name]
    base, expression = expression_of(name)
    value = (case.good or (lambda rng, shape: rng.normal(size=shape)))(rng, case.shape).astype("float32")
    found = put(expression, keras.ops.convert_to_tensor(value))
    for weight, taken in found.items():
        weight.assign(taken)
    np.testing.assert_allclose(expression.numpy(), value, rtol=2e-5, atol=2e-5)
    if case.starts_equal:
        np.testing.assert_array_equal(base.numpy(), value)
    assert not set(found) & added_weights(expression)
    assert set(found) | added_weights(expression) == set(expression.weights_used())


def test_a_mask_lets_the_base_have_what_it_hides(rng):
    base, expression = expression_of("masked")
    value = rng.normal(size=(ROWS, COLUMNS)).astype("float32")
    ((taker, taken),) = put(expression, keras.ops.convert_to_tensor(value)).items()
    assert taker is base is base_of(expression)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(taken), value)


@pytest.mark.parametrize("form", ["gate", "masked, parent"])
def test_a_mixture_written_by_hand_is_understood_as_the_form_is(form, rng):
    """Its own copy takes the value too, so it has no base that alone would have it."""
    w, own, z = weights(WHOLE, WHOLE, ROW)
    still, mask = w.stop_gradient(), np.eye(ROWS, COLUMNS) > 0
    expression = still + z * (own - still) if form == "gate" else ops.where(mask, own, still)
    value = rng.normal(size=WHOLE).astype("float32")
    found = put(expression, keras.ops.convert_to_tensor(value))
    assert set(found) == {w, own} and base_of(expression) is None
    assert all(np.array_equal(keras.ops.convert_to_numpy(taken), value) for taken in found.values())
    assert matrices(expression) == [w]


@pytest.mark.parametrize("name", ["dora", "gate", "low_rank"])
def test_a_named_adapter_of_any_form_keeps_the_base(name, rng):
    """A form that is no sum adds its difference from the base, which is nothing where it has the base's value."""
    base, expression = expression_of(name)
    still, strength = base.stop_gradient(), Weight((), "ones", name="s", role="strength")
    part = expression - still if name != "low_rank" else forms.low_rank(2, seed=1).delta(still)
    adapted = Adapted(still, strength, part, names=("x",))
    value = rng.normal(size=WHOLE).astype("float32")
    for weight, taken in put(adapted, keras.ops.convert_to_tensor(value)).items():
        weight.assign(taken)
    np.testing.assert_array_equal(base.numpy(), value)
    np.testing.assert_allclose(adapted.numpy(), value, rtol=2e-5, atol=2e-5)
    assert matrices(adapted) == [base]

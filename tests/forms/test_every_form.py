"""What every form of a weight has to do: start, compute, print, survive files, train what should train."""

import json

import keras
import numpy as np
import pytest

import tether
from tests.forms.cases import CASES, base_weight, expression_of, model_of, own_weights
from tests.support import assert_close, numpy
from tether import forms
from tether.errors import NotInvertible, TetherError, UnknownShape
from tether.weights.codec import decode, encode

EQUAL = [name for name, case in CASES.items() if case.starts_equal]
MANY_AXES = [name for name, case in CASES.items() if case.any_axes]
ASSIGNABLE = [name for name, case in CASES.items() if case.good is not None]


def data(kernel, seed=5):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(8, kernel.shape[0])).astype("float32"),
        rng.normal(size=(8, kernel.shape[1])).astype("float32"),
    )


def test_every_public_form_is_tested():
    bases = {"AddedForm", "Form", "LayerForm", "ScalingForm"}
    layer_forms = {"compose", "concatenate"}  # in files of their own
    assert {name.partition(",")[0] for name in CASES} == set(forms.__all__) - bases - layer_forms


@pytest.mark.parametrize("name", EQUAL)
def test_the_start_equals_the_base(name):
    base, expression = expression_of(name)
    np.testing.assert_allclose(expression.numpy(), base.numpy(), rtol=2e-6, atol=2e-6)


BIT_FOR_BIT = [
    "low_rank", "vera", "scale", "gate", "masked, parent", "hadamard", "kronecker", "oft", "oft, terms", "boft",
    "boft, factors", "fourier",
]  # fmt: skip


@pytest.mark.parametrize("name", BIT_FOR_BIT)
def test_the_start_equals_the_base_to_the_last_bit(name):
    base, expression = expression_of(name)
    np.testing.assert_array_equal(expression.numpy(), base.numpy())


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_that_of_the_formula(name, rng):
    case = CASES[name]
    base, expression = expression_of(name)
    own = own_weights(expression, base)
    assert set(own) == case.trains | case.holds
    values = {key: case.own[key](rng) if key in case.own else rng.normal(size=w.shape) for key, w in own.items()}
    for key, weight in own.items():
        weight.assign(values[key].astype("float32"))
    wanted = case.value(base.numpy().astype("float64"), **values)
    assert expression.shape == wanted.shape == case.shape
    np.testing.assert_allclose(expression.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_notation_is_mathematics(name):
    assert expression_of(name)[1].notation() == CASES[name].notation


@pytest.mark.parametrize("name", CASES)
def test_the_expression_goes_through_json(name):
    _, expression = expression_of(name)
    weights = {weight.uid: weight for weight in expression.weights_used()}
    assert decode(json.loads(json.dumps(encode(expression))), weights) == expression


@pytest.mark.parametrize("name", CASES)
def test_a_layer_with_the_form_goes_through_its_config(name):
    model, _, kernel = model_of(name)
    layer = model.layers[0]
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
    assert again.kernel.expression.notation() == kernel.notation()
    assert [w.trainable for w in again.weights] == [w.trainable for w in layer.weights]


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_after_saving_and_loading_as_if_nothing_had_been(name, tmp_path):
    model, _, kernel = model_of(name)
    x, y = data(kernel)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    for each in (model, loaded):
        each.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    assert len(model.weights) == len(loaded.weights)
    for mine, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-6, err_msg=mine.path)


@pytest.mark.parametrize("name", CASES)
def test_only_what_should_train_trains(name):
    case = CASES[name]
    model, base, kernel = model_of(name, use_bias=False)
    own = own_weights(kernel, base)
    wanted = {key for key in own if key in case.trains} | ({"base"} if case.reparametrizes else set())
    everything = {**own, "base": base}
    assert {key for key, weight in everything.items() if weight.trainable} == wanted
    listed = {id(variable) for variable in model.trainable_variables}
    assert {key for key, weight in everything.items() if id(weight.variable) in listed} == wanted
    before = {key: weight.numpy() for key, weight in everything.items()}
    x, y = data(kernel)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    moves = {key for key, weight in everything.items() if not np.array_equal(weight.numpy(), before[key])}
    assert moves == wanted | ({"u", "v"} & set(own))  # the state of a power iteration goes on without a gradient


@pytest.mark.parametrize("name", CASES)
def test_mixed_precision_computes_in_sixteen_bits(name):
    model, _, kernel = model_of(name, dtype="mixed_bfloat16")
    x, y = data(kernel)
    outputs = model.layers[0](keras.ops.convert_to_tensor(x))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    wanted = x @ kernel.numpy()
    np.testing.assert_allclose(
        numpy(keras.ops.cast(outputs, "float32")), wanted, rtol=0, atol=0.03 * np.max(np.abs(wanted))
    )
    model.compile(keras.optimizers.SGD(0.01), "mse")
    assert np.isfinite(model.train_on_batch(x, y))
    assert all(np.isfinite(numpy(variable)).all() for variable in model.weights)


# --------------------------------------------------------------------------- shapes of other layers


@pytest.mark.parametrize("name", MANY_AXES)
def test_a_convolution_can_have_the_form(name):
    base, kernel = expression_of(name, base_weight((3, 3, 2, 4)))
    layer = tether.tie(keras.layers.Conv2D(4, 3), kernel=kernel)
    x = np.random.default_rng(1).normal(size=(2, 5, 5, 2)).astype("float32")
    plain = keras.layers.Conv2D(4, 3)
    plain.build(x.shape)
    plain.kernel.assign(kernel.numpy())
    assert_close(layer(x), plain(x))
    if CASES[name].starts_equal:
        np.testing.assert_allclose(kernel.numpy(), base.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", MANY_AXES)
def test_a_projection_of_attention_can_have_the_form(name):
    base, kernel = expression_of(name, base_weight((6, 2, 3)))
    layer = tether.tie(keras.layers.MultiHeadAttention(2, 3), {"query/kernel": kernel})
    x = np.random.default_rng(1).normal(size=(2, 5, 6)).astype("float32")
    outputs = layer(x, x)
    plain = keras.layers.MultiHeadAttention(2, 3)
    plain.build(x.shape, x.shape)
    plain.query_dense.kernel.assign(kernel.numpy())
    for part in ("key_dense", "value_dense", "output_dense"):
        getattr(plain, part).kernel.assign(getattr(layer, part).kernel.numpy())
    assert_close(outputs, plain(x, x))
    if CASES[name].starts_equal:
        np.testing.assert_allclose(kernel.numpy(), base.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["low_rank", "dora", "vera", "hadamard", "kronecker"])
def test_a_projection_of_attention_is_the_matrix_with_the_smaller_factors(name, rng):
    case = CASES[name]
    base, kernel = expression_of(name, base_weight((6, 2, 3)))
    own = own_weights(kernel, base)
    values = {key: rng.normal(size=weight.shape) for key, weight in own.items()}
    for key, weight in own.items():
        weight.assign(values[key].astype("float32"))
    flat = {  # six inputs, and two heads of three outputs
        key: value.reshape(value.shape[0], -1)
        if value.ndim == 3
        else value.reshape(-1)
        if key == "magnitude"
        else value
        for key, value in values.items()
    }
    wanted = case.value(base.numpy().reshape(6, 6).astype("float64"), **flat)
    np.testing.assert_allclose(kernel.numpy().reshape(6, 6), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_child_takes_the_form_by_name(name):
    case = CASES[name]
    parent = keras.layers.Dense(case.shape[1])
    parent.build((None, case.shape[0]))
    parent.trainable = case.reparametrizes
    child = tether.inherit(parent, kernel=case.make())
    x = np.ones((2, case.shape[0]), "float32")
    if case.starts_equal:
        np.testing.assert_allclose(numpy(child(x)), numpy(parent(x)), rtol=1e-5, atol=1e-5)
    assert child.kernel.shape == case.shape
    assert any(weight.variable is parent.kernel for weight in child.kernel.expression.weights_used()) or any(
        weight is parent.kernel.expression for weight in child.kernel.expression.weights_used()
    )


# --------------------------------------------------------------------------- inverses


@pytest.mark.parametrize("name", ASSIGNABLE)
def test_a_value_can_be_assigned_through_the_form(name, rng):
    case = CASES[name]
    _, expression = expression_of(name)
    value = case.good(rng, case.shape).astype("float32")
    expression.assign(value)
    np.testing.assert_allclose(expression.numpy(), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ASSIGNABLE)
def test_a_layer_with_the_form_can_be_assigned(name, rng):
    case = CASES[name]
    model, _, _ = model_of(name, use_bias=False)
    value = case.good(rng, case.shape).astype("float32")
    model.layers[0].kernel.assign(value)
    np.testing.assert_allclose(numpy(model(np.eye(case.shape[0], dtype="float32"))), value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in ASSIGNABLE if CASES[name].bad is not None])
def test_a_value_out_of_range_is_refused_and_changes_nothing(name, rng):
    case = CASES[name]
    _, expression = expression_of(name)
    before = [weight.numpy() for weight in expression.weights_used()]
    with pytest.raises(NotInvertible, match=r"takes only .* Received: "):
        expression.assign(case.bad(rng, case.shape).astype("float32"))
    for weight, value in zip(expression.weights_used(), before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.good is None])
def test_a_form_without_an_inverse_says_so(name):
    _, expression = expression_of(name)
    with pytest.raises(NotInvertible, match="has no inverse"):
        expression.assign(np.zeros(expression.shape, "float32"))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", ["kernel", None, object()], ids=["a string", "None", "an object"])
def test_what_is_no_weight_is_refused(name, base):
    with pytest.raises(TetherError, match=r"is called with a weight.*Received: base="):
        CASES[name].make()(base)


ANY_AXES = ("scale", "gate", "masked", "positive", "symmetric", "full", "rows")
NEEDS_TWO_AXES = [name for name in CASES if name.partition(",")[0] not in ANY_AXES]


@pytest.mark.parametrize("name", NEEDS_TWO_AXES)
def test_a_vector_is_refused_by_a_form_of_matrices(name):
    with pytest.raises(TetherError, match="two or more axes"):
        CASES[name].make()(tether.Weight((4,), "ones", name="bias"))


@pytest.mark.parametrize("name", [name for name in CASES if name.partition(",")[0] not in ("positive", "symmetric")])
def test_a_base_without_a_shape_is_refused(name):
    make = CASES[name].make
    if name.startswith("orthogonal") and "cayley" not in name:
        assert make()(tether.Weight(name="later")).shape is None
    else:
        with pytest.raises(UnknownShape, match="later"):
            make()(tether.Weight(name="later"))


REFUSED = {
    "a rank of zero": lambda: forms.dora(0),
    "a rank that is no number": lambda: forms.hadamard("4"),
    "a rank that is a bool": lambda: forms.vera(True),
    "an alpha that is no number": lambda: forms.low_rank(2, alpha="4"),
    "an alpha that is infinite": lambda: forms.dora(2, alpha=float("inf")),
    "a start that is no word of ours": lambda: forms.dora(2, start="ones"),
    "a vera of one size": lambda: forms.vera(2, size=(4,)),
    "a vera of no size": lambda: forms.vera(2, size=(4, 0)),
    "a vera of a size that is no number": lambda: forms.vera(2, size="big"),
    "an axis that is no number": lambda: forms.scale(axis="out"),
    "an axis that is a float": lambda: forms.scale(axis=1.5),
    "an axis that is not there": lambda: forms.scale(axis=2)(base_weight((3, 4))),
    "an axis that is there twice": lambda: forms.scale(axis=(0, -2))(base_weight((3, 4))),
    "a gate that is closed": lambda: forms.gate(start=1.0),
    "a gate that is no number": lambda: forms.gate(start="half"),
    "a gate per row": lambda: forms.gate(per="row"),
    "a mask of other numbers": lambda: forms.masked([0.5, 1.0]),
    "a mask of words": lambda: forms.masked(["yes"]),
    "a mask of another shape": lambda: forms.masked(np.ones((4, 3)))(base_weight((3, 4))),
    "a mask of more axes": lambda: forms.masked(np.ones((2, 3, 4)))(base_weight((3, 4))),
    "an outside of something else": lambda: forms.masked([True], outside="random"),
    "a factor of zero": lambda: forms.kronecker(factor=0),
    "an alpha without a rank": lambda: forms.kronecker(alpha=2),
    "no iterations": lambda: forms.spectral_norm(0),
    "a negative epsilon": lambda: forms.spectral_norm(epsilon=-1.0),
    "blocks of one": lambda: forms.oft(1),
    "blocks that are no number": lambda: forms.boft("big"),
    "blocks that do not divide the inputs": lambda: forms.oft(2)(base_weight((3, 4))),
    "no terms": lambda: forms.oft(2, terms=0),
    "no factors": lambda: forms.boft(2, 0),
    "a butterfly of odd blocks": lambda: forms.boft(3, 2)(base_weight((6, 4))),
    "a butterfly of an odd number of blocks": lambda: forms.boft(2, 2)(base_weight((6, 4))),
    "no frequencies": lambda: forms.fourier(0),
    "more frequencies than numbers": lambda: forms.fourier(13)(base_weight((3, 4))),
    "a seed that is no number": lambda: forms.fourier(2, seed="x"),
    "a scale that is infinite": lambda: forms.fourier(2, scale=float("inf")),
    "a map that nobody knows": lambda: forms.orthogonal("givens"),
    "a split that leaves no columns": lambda: forms.orthogonal(split=2)(base_weight((3, 4))),
    "a symmetric weight that is not square": lambda: forms.symmetric()(base_weight((3, 4))),
    "no units to concatenate": lambda: forms.concatenate(0),
    "no units to compose": lambda: forms.compose(-1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_what_was_received(what):
    with pytest.raises(TetherError, match="Received: "):
        REFUSED[what]()

"""Weights that are chosen when the layer is called."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError, Unsupported
from tether.weights import Argument, bind

layers = keras.layers
ops = keras.ops


def three(rng, shape=(4, 3)):
    return [tether.Weight(rng.normal(size=shape).astype("float32"), name=name) for name in ("base", "french", "german")]


def routed(base, french, german, **more):
    options = {"base": base, "french": base + french, "german": base + german}
    return tether.route(layers.Dense(3, use_bias=False), kernel=options, **more)


def expected(weights, choice, x):
    base, french, german = (numpy(w.value) for w in weights)
    return x @ [base, base + french, base + german][choice]


@pytest.mark.parametrize(
    ("choice", "place"),
    [(0, 0), (1, 1), (2, 2), ("base", 0), ("german", 2), (False, 0), (True, 1), (np.int64(2), 2), (np.array(1), 1)],
    ids=str,
)
def test_a_choice_is_a_number_a_name_or_a_bool(rng, choice, place):
    weights = three(rng)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(routed(*weights)(x, choice=choice), expected(weights, place, x))


@pytest.mark.parametrize(("choice", "place"), [(0, 0), (2, 2), (-1, 0)])
def test_a_choice_is_a_scalar_tensor(rng, choice, place):
    weights = three(rng)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(routed(*weights)(x, choice=ops.convert_to_tensor(choice)), expected(weights, place, x))


@pytest.mark.parametrize(("default", "place"), [(0, 0), ("german", 2), (True, 1)])
def test_the_default_holds_where_no_choice_is_made(rng, default, place):
    weights = three(rng)
    layer = routed(*weights, default=default)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(layer(x), expected(weights, place, x))
    assert_close(layer(x, choice=None), expected(weights, place, x))
    inputs = keras.Input((4,))
    assert_close(keras.Model(inputs, layer(inputs)).predict(x, verbose=0), expected(weights, place, x))


@pytest.mark.parametrize(
    "choice", [3, -2, "dutch", 0.5, "0", np.array(3), np.array([0, 3]), np.array([-2, 0])], ids=str
)
def test_a_choice_that_there_is_not_is_refused(rng, choice):
    layer = routed(*three(rng))
    layer.build((None, 4))
    with pytest.raises(TetherError, match=r"0 \(base\), 1 \(french\), 2 \(german\)"):
        layer(np.ones((2, 4), "float32"), choice=choice)


def test_a_choice_is_part_of_a_functional_model(rng, tmp_path):
    weights = three(rng)
    layer = routed(*weights)
    inputs, choice = keras.Input((4,)), keras.Input(batch_shape=(), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    fixed = keras.Model(inputs, layer(inputs, choice="french"))
    x = rng.normal(size=(2, 4)).astype("float32")
    model.save(tmp_path / "m.keras")
    fixed.save(tmp_path / "f.keras")
    for one, other in (
        (model, fixed),
        (keras.saving.load_model(tmp_path / "m.keras"), keras.saving.load_model(tmp_path / "f.keras")),
    ):
        for place in range(3):
            found = one([ops.convert_to_tensor(x), ops.convert_to_tensor(place)])
            assert_close(found, expected(weights, place, x))
        assert_close(other.predict(x, verbose=0), expected(weights, 1, x))
        assert len(one.weights) == len(other.weights) == 3


@pytest.mark.parametrize("choice", [1, "tensor"])
def test_options_that_are_not_chosen_get_a_gradient_of_zero(rng, choice):
    weights = [tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name=name) for name in ("a", "b")]
    layer = tether.route(layers.Dense(3, use_bias=False), kernel=weights)
    x = rng.normal(size=(2, 4)).astype("float32")
    given = ops.convert_to_tensor(1) if choice == "tensor" else choice
    _, found = gradients(lambda: ops.sum(layer(x, choice=given) ** 2), [w.variable for w in weights])
    assert found[0] is not None  # zeros, not nothing
    assert_close(found[0], np.zeros((4, 3)))
    assert_close(found[1], 2 * x.T @ (x @ numpy(weights[1].value)), 1e-4)


def test_a_weight_that_is_not_finite_does_not_spoil_the_others(rng):
    bad = tether.Weight(np.full((4, 3), np.nan, "float32"), name="bad")
    good = tether.Weight(np.ones((4, 3), "float32"), name="good")
    layer = tether.route(layers.Dense(3, use_bias=False), kernel=[bad, good], default="good")
    assert_close(layer(np.ones((1, 4), "float32")), np.full((1, 3), 4.0))


def test_several_weights_are_chosen_together(rng):
    kernels, biases = three(rng), three(rng, (3,))
    layer = tether.route(layers.Dense(3), kernel=kernels, bias={w.name: w for w in biases})
    x = rng.normal(size=(2, 4)).astype("float32")
    for place, name in enumerate(("base", "french", "german")):
        assert_close(layer(x, choice=name), x @ numpy(kernels[place].value) + numpy(biases[place].value))


@pytest.mark.parametrize("build", ["before", "after"])
def test_by_path_in_a_layer_of_layers(rng, build, tmp_path):
    attention = layers.MultiHeadAttention(2, 3)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    own = tether.Weight(rng.normal(size=(4, 2, 3)).astype("float32"), name="own")
    other = tether.Weight(rng.normal(size=(4, 2, 3)).astype("float32"), name="other")
    if build == "before":
        attention.build((None, 5, 4), (None, 5, 4))
    tether.route(attention, {"query/kernel": [own, other]})
    twin = layers.MultiHeadAttention(2, 3)
    attention(x, x)
    twin.build((None, 5, 4), (None, 5, 4))
    for source, target in zip(attention.weights[-7:], twin.weights[1:], strict=True):
        target.assign(source)
    for place, weight in enumerate((own, other)):
        twin.query_dense.kernel.assign(weight.value)
        assert_close(attention(x, x, choice=place), twin(x, x))
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, attention(inputs, inputs, choice=1))
    model.save(tmp_path / "m.keras")
    assert_close(keras.saving.load_model(tmp_path / "m.keras").predict(x, verbose=0), twin(x, x))


def test_a_model_takes_the_choice_for_its_layers(rng, tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False, name="d"), layers.ReLU()])
    weight = tether.weight_of(model, "d/kernel")
    tether.route(model, {"d/kernel": [weight, -1.0 * weight]})
    x = rng.normal(size=(2, 4)).astype("float32")
    plain = x @ numpy(weight.value)
    model.save(tmp_path / "m.keras")
    for found in (model, keras.saving.load_model(tmp_path / "m.keras")):
        assert_close(found(x), np.maximum(plain, 0))
        assert_close(found(x, choice=1), np.maximum(-plain, 0))
        inputs = keras.Input((4,))
        outer = keras.Model(inputs, found(inputs, choice=1))
        assert_close(outer.predict(x, verbose=0), np.maximum(-plain, 0))
    tether.untie(model)
    assert type(model) is keras.Sequential
    with pytest.raises(Exception, match="choice"):
        layers.Dense(3)(x, choice=1)


def test_an_outer_choice_reaches_inner_layers_that_make_none(rng):
    weights = three(rng)
    layer = routed(*weights)
    x = rng.normal(size=(2, 4)).astype("float32")
    layer(x)
    with bind({Argument("choice", (), "int32"): 2}):
        assert_close(layer(x), expected(weights, 2, x))
        assert_close(layer(x, choice=1), expected(weights, 1, x))
    assert_close(layer(x), expected(weights, 0, x))


def test_other_arguments_of_expressions_are_keywords_too(rng):
    base, delta = three(rng)[:2]
    strength = Argument("strength", default=1.0)
    layer = tether.tie(layers.Dense(3, use_bias=False), kernel=base + strength * delta)
    x = rng.normal(size=(2, 4)).astype("float32")
    for value, call in ((1.0, {}), (0.5, {"strength": 0.5}), (2.0, {"strength": ops.convert_to_tensor(2.0)})):
        assert_close(layer(x, **call), x @ (numpy(base.value) + value * numpy(delta.value)))


def test_fit_trains_the_default_and_predict_uses_it(rng):
    weights = [tether.Weight(np.zeros((4, 3), "float32"), name=name) for name in ("a", "b")]
    layer = tether.route(layers.Dense(3, use_bias=False), kernel=weights, default="b")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)), epochs=2, verbose=0)
    assert not np.any(numpy(weights[0].value))
    assert np.any(numpy(weights[1].value))


def test_in_bfloat16(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    weights = three(rng)
    layer = routed(*weights)
    x = rng.normal(size=(2, 4)).astype("float32")
    found = layer(x, choice=ops.convert_to_tensor(1))
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert_close(ops.cast(found, "float32"), expected(weights, 1, x), 5e-2)


def test_clones_route_their_own_weights(rng):
    weights = three(rng)
    model = keras.Sequential([keras.Input((4,)), routed(*weights)])
    clone = keras.models.clone_model(model)
    clone.set_weights([w + 1 for w in model.get_weights()])
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(model.layers[0](x, choice=1), expected(weights, 1, x))
    assert_close(clone.layers[0](x, choice=0), x @ (numpy(weights[0].value) + 1))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs options"),
        ({"kernel": []}, "list of expressions"),
        ({"kernel": None}, "list of expressions"),
        ({"kernel": {1: 2.0}}, "list of expressions"),
    ],
    ids=str,
)
def test_what_are_no_options_is_refused(options, message):
    layer = layers.Dense(3)
    with pytest.raises(TetherError, match=message):
        tether.route(layer, options)
    assert type(layer) is layers.Dense


def test_one_expression_is_no_list_of_options(rng):
    with pytest.raises(TetherError, match=r"tether\.tie"):
        tether.route(layers.Dense(3), kernel=three(rng)[0])


def test_weights_of_one_route_have_the_same_options(rng):
    kernels, biases = three(rng), three(rng, (3,))
    with pytest.raises(TetherError, match="One choice decides"):
        tether.route(layers.Dense(3), kernel=kernels, bias=biases[:2])
    with pytest.raises(TetherError, match="One choice decides"):
        tether.route(layers.Dense(3), kernel={"a": kernels[0], "b": kernels[1]}, bias={"a": biases[0], "c": biases[1]})


def test_options_of_different_shapes_are_refused_when_written(rng):
    with pytest.raises(ShapeMismatch, match="one shape"):
        tether.route(layers.Dense(3), kernel=[np.zeros((4, 3), "float32"), np.zeros((3, 4), "float32")])


@pytest.mark.parametrize("default", [3, "dutch", -2, None])
def test_a_default_that_there_is_not_is_refused(rng, default):
    if default is None:
        layer = routed(*three(rng), default=None)
        layer.build((None, 4))
        with pytest.raises(TetherError, match="choice=value"):
            layer(np.ones((1, 4), "float32"))
        return
    with pytest.raises(TetherError, match="is one of"):
        routed(*three(rng), default=default)


def test_an_argument_with_the_name_of_a_parameter_of_the_call_is_refused(rng):
    weights = three(rng)
    layer = layers.Dense(3)
    with pytest.raises(Unsupported, match="'training'"):
        tether.route(layer, kernel=weights, argument="training")
    assert type(layer) is layers.Dense
    assert all(not weight.uses for weight in weights)

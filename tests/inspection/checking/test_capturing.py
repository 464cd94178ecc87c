"""What counts as captured or frozen, and what does not."""

import functools

import keras
import numpy as np
import pytest

import tether
from tests.inspection.checking.faults import Box, Transposing, lambda_model, normal

layers = keras.layers
RULES = ["captured-variable", "frozen-constant"]


def check(model):
    return tether.check(model, rules=RULES)


def holding(value, name="holder"):
    """A model with a layer that has an attribute besides what it computes with."""
    layer = layers.Dense(4, name=name)
    object.__setattr__(layer, "extra", value)
    return keras.Sequential([keras.Input((4,)), layer])


@pytest.mark.parametrize(
    "wrap",
    [
        Box,
        lambda v: Box(Box({"a": [v]})),
        lambda v: functools.partial(len, v),
        lambda v: Box(v).__init__,
        lambda v: frozenset([Box(v)]),
        lambda v: lambda: v,
    ],
    ids=["object", "nested", "partial", "method", "frozenset", "function"],
)
def test_a_variable_is_found_in_whatever_holds_it(wrap, rng):
    (finding,) = check(holding(wrap(keras.Variable(normal(rng, 4), name="lost"))))
    assert finding.rule == "captured-variable" and finding.where == "holder/extra" and "'lost'" in finding.why


def test_a_variable_that_does_not_train_is_a_warning(rng):
    (finding,) = check(holding(Box(keras.Variable(normal(rng, 4), trainable=False))))
    assert finding.severity == "warning"


def test_two_holders_of_one_variable_are_two_findings_and_one_holder_is_one(rng):
    variable = keras.Variable(normal(rng, 4), name="w")
    assert len(check(holding([Box(variable), Box(variable)]))) == 1
    model = keras.Sequential([keras.Input((4,)), holding(Box(variable), "a"), holding(Box(variable), "b")])
    assert sorted(finding.where.split("/")[-2] for finding in check(model)) == ["a", "b"]


def test_what_keras_tracks_elsewhere_may_be_referred_to(rng):
    first, second = layers.Dense(4), layers.Dense(4)
    model = keras.Sequential([keras.Input((4,)), first, second])
    object.__setattr__(second, "extra", Box([first, first.kernel, model]))
    assert not check(model)


def test_a_tracked_variable_in_a_function_is_a_warning_since_a_file_loses_it(rng):
    dense = layers.Dense(4, name="dense")
    x = keras.Input((4,))
    h = dense(x)
    model = keras.Model(
        x, [layers.Lambda(lambda t: t @ dense.kernel, name="again")(h), keras.ops.matmul(h, dense.kernel)]
    )
    found = check(model)
    assert [finding.severity for finding in found] == ["warning", "warning"]
    assert {finding.where.split("_")[0] for finding in found} == {"again/function", "matmul"}
    assert all("tether.weight_of(model, 'dense/kernel')" in finding.mend for finding in found)


def test_a_variable_that_the_call_of_ones_own_class_takes_from_outside_is_found(rng):
    variable = keras.Variable(normal(rng, 4), name="outside")

    class Outside(layers.Layer):
        def call(self, x):
            return x * variable

    (finding,) = check(keras.Sequential([keras.Input((4,)), Outside(name="layer")]))
    assert finding.where == "layer/call" and finding.severity == "error"


def test_what_a_compiled_model_keeps_is_not_captured(rng):
    other = layers.Dense(4)
    other.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model.compile("adam", loss=lambda t, y: keras.ops.mean(keras.ops.square(other(t) - other(y))), metrics=["mae"])
    model.fit(normal(rng, 2, 4), normal(rng, 2, 4), verbose=0)
    assert not check(model)


# --------------------------------------------------------------------------- constants


def scaled_recipe():
    encoder = layers.Dense(16, name="encode")
    x = keras.Input((8,))
    model = keras.Model(x, Transposing(encoder, lambda kernel: 2.0 * keras.ops.transpose(kernel))(encoder(x)))
    return model, encoder


def test_a_constant_that_the_weight_has_left_behind_is_still_found(rng):
    model, encoder = scaled_recipe()
    assert check(model)[0].severity == "error" and "transposed and times 2" in check(model)[0].why
    encoder.kernel.assign(encoder.kernel + 0.02 * normal(rng, 8, 16))
    (finding,) = check(model)
    assert finding.severity == "warning" and "once computed from 'encode/kernel'" in finding.why
    encoder.kernel.assign(normal(rng, 8, 16))
    assert not check(model)


def test_the_code_names_the_arrangement_and_the_factor(rng):
    model, encoder = scaled_recipe()
    (finding,) = check(model)
    names = {"model": model, "tether": tether}
    exec(finding.mend, names)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(names["weight"].value), 2 * keras.ops.convert_to_numpy(encoder.kernel).T
    )


@pytest.mark.parametrize(
    "constant",
    [np.zeros((6, 6)), np.eye(6), np.arange(36.0).reshape(6, 6), np.random.default_rng(3).normal(size=(6, 6))],
    ids=["zeros", "identity", "positions", "noise"],
)
def test_a_constant_that_is_no_weights_is_no_finding(constant):
    tensor = keras.ops.convert_to_tensor(constant.astype("float32"))
    layer = layers.Dense(6)
    object.__setattr__(layer, "extra", tensor)
    x = keras.Input((6,))
    assert not check(keras.Model(x, keras.ops.matmul(layer(x), tensor)))


def test_a_start_value_is_no_constant(rng):
    table = normal(rng, 9, 4)
    by_class = layers.Embedding(9, 4, embeddings_initializer=keras.initializers.Constant(table))
    by_function = layers.Embedding(9, 4, embeddings_initializer=lambda shape, dtype=None: 2 * table)
    x = keras.Input((3,), dtype="int32")
    assert not check(keras.Model(x, [by_class(x), by_function(x)]))


def test_preprocessing_may_keep_what_it_derives(rng):
    normalization = layers.Normalization()
    normalization.adapt(normal(rng, 50, 32))
    assert not check(keras.Sequential([keras.Input((32,)), normalization, layers.Dense(3)]))


def test_tethers_own_layers_are_clean(rng):
    weight = tether.Weight(normal(rng, 4), name="w")
    assert not check(lambda_model(rng, lambda x, w: x * w, w=weight))

"""Regularizers act once on each pair of expression and regularizer; constraints on what is stored."""

import keras
import numpy as np
import pytest

import tether
from tests.support import gradients, numpy

pytestmark = pytest.mark.spread

L2 = 0.1


def total(model):
    return float(sum(numpy(loss) for loss in model.losses))


def l2(value):
    return L2 * float(np.sum(np.square(value)))


def test_two_layers_with_the_same_expression_and_regularizer_count_once(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    make = lambda: tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=w)  # noqa: E731
    inputs = keras.Input((4,))
    model = keras.Model(inputs, make()(make()(inputs)))
    assert total(model) == pytest.approx(l2(w.numpy()), rel=1e-5)


def test_different_expressions_of_one_weight_count_each(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    a = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=w)
    b = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=3 * w)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, b(a(inputs)))
    assert total(model) == pytest.approx(10 * l2(w.numpy()), rel=1e-5)


def test_different_regularizers_of_one_expression_count_each(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    a = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=w)
    b = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L1(L2)), kernel=w)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, b(a(inputs)))
    assert total(model) == pytest.approx(l2(w.numpy()) + L2 * np.abs(w.numpy()).sum(), rel=1e-5)


def test_a_weights_own_regularizer_counts_once_however_many_uses(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), regularizer=keras.regularizers.L2(L2), name="w")
    a = tether.tie(keras.layers.Dense(4), kernel=w)
    b = tether.tie(keras.layers.Dense(4), kernel=w.T)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, b(a(inputs)))
    assert total(model) == pytest.approx(l2(w.numpy()), rel=1e-5)


def test_a_promoted_weight_keeps_its_layers_regularizer_on_the_use(rng):
    layer = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    before = total(model)
    tether.weight_of(layer, "kernel")
    assert total(model) == pytest.approx(before, rel=1e-6)
    assert before > 0


def test_the_gradient_of_a_regularizer_reaches_the_parts_of_an_expression(rng):
    a = tether.Weight(rng.normal(size=(4, 2)).astype("float32"), name="a")
    b = tether.Weight(rng.normal(size=(2, 4)).astype("float32"), name="b")
    layer = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=a @ b)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    _, (grad_a, grad_b) = gradients(lambda: sum(model.losses), [a.variable, b.variable])
    product = a.numpy() @ b.numpy()
    np.testing.assert_allclose(grad_a, 2 * L2 * product @ b.numpy().T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_b, 2 * L2 * a.numpy().T @ product, rtol=1e-4, atol=1e-5)


def test_a_frozen_use_passes_no_regularizer_gradient(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    a = tether.tie(keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(L2)), kernel=w)
    b = tether.tie(keras.layers.Dense(4), kernel=w)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, b(a(inputs)))
    a.trainable = False
    assert total(model) == 0.0
    a.trainable = True
    assert total(model) == pytest.approx(l2(w.numpy()), rel=1e-5)


def test_regularizers_act_in_training_as_in_the_plain_model(rng):
    x = rng.normal(size=(16, 4)).astype("float32")
    kernel = rng.normal(size=(4, 4)).astype("float32")

    def trained(tie):
        layer = keras.layers.Dense(4, use_bias=False, kernel_regularizer=keras.regularizers.L2(L2))
        inputs = keras.Input((4,))
        if tie:
            tether.tie(layer, kernel=tether.Weight(name="w"))
        model = keras.Model(inputs, layer(inputs))
        model.set_weights([kernel])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
        return model.get_weights()[0]

    np.testing.assert_allclose(trained(True), trained(False), rtol=1e-5, atol=1e-6)


def test_a_layers_constraint_acts_on_the_weight_that_it_uses_as_it_is(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    inputs = keras.Input((4,))
    outputs = tether.tie(keras.layers.Dense(4, kernel_constraint="non_neg"), kernel=w)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = rng.normal(size=(8, 4)).astype("float32")
    assert (w.numpy() < 0).any()
    model.fit(x, x, verbose=0)
    assert (w.numpy() >= 0).all()


def test_a_constraint_on_a_derived_expression_is_refused():
    w = tether.Weight((4, 4), "ones", name="w")
    layer = tether.tie(keras.layers.Dense(4, kernel_constraint="non_neg"), kernel=w.T)
    with pytest.raises(tether.TetherError, match=r"Weight\(constraint="):
        layer.build((None, 4))


def test_two_different_constraints_on_one_weight_are_refused():
    w = tether.Weight((4, 4), "ones", name="w")
    tether.tie(keras.layers.Dense(4, kernel_constraint="non_neg"), kernel=w).build((None, 4))
    with pytest.raises(tether.TetherError, match="constrained by NonNeg already"):
        tether.tie(keras.layers.Dense(4, kernel_constraint="unit_norm"), kernel=w).build((None, 4))


def test_the_same_constraint_twice_is_fine():
    w = tether.Weight((4, 4), "ones", name="w")
    for _ in range(2):
        tether.tie(keras.layers.Dense(4, kernel_constraint="non_neg"), kernel=w).build((None, 4))
    assert isinstance(w.variable.constraint, keras.constraints.NonNeg)

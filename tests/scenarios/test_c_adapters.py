"""Rows C2 to C4, C7 and C10 to C12 of the scenarios: adapters on what is shared, and computed weights."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether.errors import TetherError, Unsupported

layers = keras.layers
ops = keras.ops


def shared_pair(rng):
    """Two layers of one kernel, built."""
    weight = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    pair = [tether.tie(layers.Dense(4, name=name), kernel=weight) for name in ("a", "b")]
    for layer in pair:
        layer.build((None, 4))
    return weight, *pair


def model_of(*parts):
    inputs = keras.Input((4,))
    x = inputs
    for layer in parts:
        x = layer(x)
    return keras.Model(inputs, x)


# --------------------------------------------------------------------------- C2


def test_c2_enable_lora_on_a_shared_kernel_is_refused(rng):
    _, a, b = shared_pair(rng)
    with pytest.raises(Unsupported, match="tether"):
        a.enable_lora(2)
    model = model_of(a, b)
    assert len(model.trainable_weights) == 3


@pytest.mark.parametrize("users", ["one", "all"])
def test_c2_low_rank_works_for_one_user_or_for_all(rng, users, tmp_path):
    weight, a, b = shared_pair(rng)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")
    before = numpy(b(x))
    adapted = weight.stop_gradient() + tether.low_rank(2)
    tether.tie(a, kernel=adapted)
    tether.tie(b, kernel=adapted if users == "all" else weight)
    model = model_of(a, b)
    assert_close(b(x), before)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, epochs=3, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again.predict(x, verbose=0), model.predict(x, verbose=0))
    names = {w.name for w in again.trainable_weights}
    assert names == {"w_lora_a", "w_lora_b", "bias", *(["w"] if users == "one" else [])}


# --------------------------------------------------------------------------- C3


def test_c3_training_goes_on_as_if_never_stopped(rng, tmp_path):
    parent = layers.Dense(4, name="parent")
    parent.build((None, 4))
    parent.trainable = False
    model = model_of(tether.inherit(parent, kernel=tether.low_rank(2)))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    factors = {w.name: numpy(w) for w in again.trainable_weights}
    assert np.any(factors["kernel_lora_a"]) and np.any(factors["kernel_lora_b"])
    for one in (model, again):
        one.fit(x, y, epochs=3, shuffle=False, verbose=0)
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        assert_close(one, other, 1e-6)


# --------------------------------------------------------------------------- C4


def test_c4_an_adapter_after_fit_is_one_clear_message(rng):
    model = model_of(layers.Dense(4, name="d"))
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, verbose=0)
    weight = tether.weight_of(model, "d/kernel")
    tether.tie(model.get_layer("d"), kernel=weight.stop_gradient() + tether.low_rank(2))
    for _ in range(2):
        with pytest.raises(TetherError, match=r"Compile the model again before `fit`"):
            model.fit(x, y, verbose=0)
    base = numpy(weight.value).copy()
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(numpy(weight.value), base)
    assert np.any(numpy(model.get_layer("d").kernel.value) != base)


def test_c4_before_the_first_fit_it_just_works(rng):
    model = model_of(layers.Dense(4, name="d"))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    weight = tether.weight_of(model, "d/kernel")
    tether.tie(model.get_layer("d"), kernel=weight.stop_gradient() + tether.low_rank(2))
    base = numpy(weight.value).copy()
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(numpy(weight.value), base)
    assert np.any(numpy(model.get_layer("d").kernel.value) != base)


# --------------------------------------------------------------------------- C7


def test_c7_a_spectral_norm_of_one_user_leaves_the_stored_weight(rng):
    weight, a, b = shared_pair(rng)
    tether.tie(a, kernel=tether.forms.spectral_norm()(weight))
    model = model_of(a, b)
    value, x = numpy(weight.value).copy(), rng.normal(size=(8, 4)).astype("float32")
    alone = numpy(b(x))
    for _ in range(5):
        model(x, training=True)
    np.testing.assert_array_equal(numpy(weight.value), value)
    np.testing.assert_array_equal(numpy(b(x)), alone)
    assert_close(np.linalg.norm(numpy(a.kernel.value), 2), 1.0, 1e-2)


def test_c7_keras_own_wrapper_is_refused(rng):
    _, a, _ = shared_pair(rng)
    with pytest.raises(Unsupported, match="SpectralNormalization"):
        layers.SpectralNormalization(a).build((None, 4))


# --------------------------------------------------------------------------- C10


def test_c10_a_layer_is_called_with_computed_weights(rng):
    x = rng.normal(size=(2, 4)).astype("float32")
    code = keras.Variable(rng.normal(size=(12,)).astype("float32"))
    layer = layers.Dense(3, use_bias=False)
    _, (found,) = gradients(lambda: ops.sum(tether.call(layer, x, kernel=ops.reshape(code.value, (4, 3)))), [code])
    assert_close(found, np.repeat(x.sum(0)[:, None], 3, axis=1).ravel())
    assert_close(tether.call(layer, x, kernel=ops.reshape(code.value, (4, 3))), x @ numpy(code).reshape(4, 3))
    assert layer.weights == []


# --------------------------------------------------------------------------- C11


@pytest.mark.parametrize("way", ["untie", "materialize", "merge"])
def test_c11_merging_for_one_user_leaves_the_other_bit_identical(rng, way):
    weight, a, b = shared_pair(rng)
    delta = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="delta")
    x = rng.normal(size=(8, 4)).astype("float32")
    if way == "merge":
        tether.adapters.add(a, "delta", {"kernel": tether.low_rank(2, start=rng.normal(size=(4, 4)))})
    else:
        tether.tie(a, kernel=weight + delta)
    of_a, of_b, stored = numpy(a(x)), numpy(b(x)), numpy(weight.value).copy()
    merged = a
    if way == "untie":
        tether.untie(a)
    elif way == "materialize":
        merged = tether.materialize(a)
    else:
        tether.adapters.merge(a)
    assert_close(merged(x), of_a)
    np.testing.assert_array_equal(numpy(b(x)), of_b)
    np.testing.assert_array_equal(numpy(weight.value), stored)
    merged.kernel.assign(numpy(merged.kernel.value) * 0)
    np.testing.assert_array_equal(numpy(b(x)), of_b)


# --------------------------------------------------------------------------- C12


def test_c12_a_thousand_merges_in_bfloat16_change_no_bit(rng):
    layer = layers.Dense(4, dtype="bfloat16", use_bias=False)
    layer.build((None, 4))
    weight = tether.weight_of(layer, "kernel")
    stored = numpy(weight.value).tobytes()
    adapted = weight.stop_gradient() + tether.low_rank(2, start=rng.normal(size=(4, 4)))
    merged = set()
    for _ in range(1000):
        tether.tie(layer, kernel=adapted)
        tether.untie(layer)
        merged.add(numpy(layer.kernel).tobytes())
    assert len(merged) == 1
    assert numpy(weight.value).tobytes() == stored
    tether.tie(layer, kernel=weight)
    assert numpy(layer.kernel.value).tobytes() == stored

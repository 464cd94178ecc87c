"""Row C6 of the scenarios: quantising one of two tied layers."""

import warnings

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether.errors import Unsupported

layers = keras.layers


def tied_pair():
    """An encoder and a decoder on its transposed kernel, behind a layer that is not tied."""
    x = keras.Input((12,))
    h = layers.Dense(5, activation="tanh", name="encode")(layers.Dense(12, name="before")(x))
    model = keras.Model(x, layers.Dense(12, name="decode")(h))
    tether.tie(model, {"decode/kernel": tether.weight_of(model, "encode/kernel").T})
    return model


def bytes_of(model):
    return sum(numpy(variable.value).nbytes for variable in model.weights)


@pytest.mark.parametrize("asked", ["one layer", "the model"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_c6_both_users_follow_and_it_takes_less_memory_than_before(mode, asked, rng, tmp_path):
    model = tied_pair()
    kernel, before = numpy(model.get_layer("encode").kernel.value), bytes_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        (model if asked == "the model" else model.get_layer("decode")).quantize(mode)
    encode, decode = model.get_layer("encode"), model.get_layer("decode")
    assert np.array_equal(numpy(encode.kernel.value), numpy(decode.kernel.value).T)
    half_a_step = np.abs(kernel).max() / (2 * 127 if mode == "int8" else 2 * 7)
    assert 0 < np.abs(numpy(encode.kernel.value) - kernel).max() <= half_a_step * (1 + 1e-5)
    assert bytes_of(model) < before
    assert not tether.check(model).by_rule("quantized-beside-float")
    x = rng.normal(size=(4, 12)).astype("float32")
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert len(again.weights) == len(model.weights)
    parts = again.get_layer("encode").kernel.expression.weights_used()
    assert again.get_layer("decode").kernel.expression.weights_used() == parts and len(parts) == 2


def test_c6_an_inherited_child_follows_its_parent(rng):
    parent = layers.Dense(6, name="parent")
    parent.build((None, 4))
    parent.trainable = False
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(2))
    child.quantize("int8")
    x = rng.normal(size=(3, 4)).astype("float32")
    assert_close(child(x), parent(x))  # the child's own part starts at zero
    assert {v.path for v in child.trainable_weights} == {"parent/kernel_lora_a", "parent/kernel_lora_b"}


def test_c6_what_cannot_follow_is_refused_and_nothing_is_quantised(rng):
    model = tied_pair()
    x = rng.normal(size=(4, 12)).astype("float32")
    before, weights = model.predict(x, verbose=0), [v.path for v in model.weights]
    with pytest.raises(Unsupported, match="materialize"):
        model.quantize("float8")
    assert [v.path for v in model.weights] == weights
    assert all(layer.quantization_mode is None for layer in model.layers)
    assert np.array_equal(model.predict(x, verbose=0), before)

"""One short use of everything that Tether is for, also run on the Keras that will come next."""

import warnings

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy


def test_a_tied_autoencoder_stores_its_kernel_once():
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(3), kernel=codec)
    decode = tether.tie(keras.layers.Dense(5), kernel=codec.T)
    decode(encode(np.ones((2, 5), "float32")))
    assert codec.shape == (5, 3)
    assert decode.kernel.shape == (3, 5)


@pytest.fixture
def x(rng):
    return rng.normal(size=(16, 6)).astype("float32")


@pytest.fixture
def model():
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(4, name="encode"), kernel=codec)
    decode = tether.tie(keras.layers.Dense(6, name="decode"), kernel=codec.T)
    return keras.Sequential([keras.Input((6,)), encode, decode], name="autoencoder")


def by_hand(model, x):
    """What the tied autoencoder computes from what it stores."""
    (kernel,) = (numpy(v.value) for v in model.weights if tuple(v.shape) == (6, 4))
    inner, outer = (numpy(layer.bias) for layer in model.layers)
    return (x @ kernel + inner) @ kernel.T + outer


def assert_computes(model, x, expected):
    np.testing.assert_allclose(numpy(model(x)), expected, rtol=1e-4, atol=1e-5)


def test_fit_trains_the_one_kernel(model, x):
    model.compile(keras.optimizers.Adam(0.05), "mse")
    before = model.evaluate(x, x, verbose=0)
    model.fit(x, x, epochs=3, verbose=0)
    assert model.evaluate(x, x, verbose=0) < before
    assert len(model.trainable_weights) == 3
    assert_computes(model, x, by_hand(model, x))


def test_files_and_copies_keep_the_tie(model, x, tmp_path):
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    expected = by_hand(model, x)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    verified = tether.files.load_model(tmp_path / "m.keras")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "m.weights.h5")
    plain = tether.materialize(model)
    for copy in (loaded, verified, clone):
        assert len(copy.weights) == 3
        assert_computes(copy, x, expected)
    assert len(plain.weights) == 4
    assert_computes(plain, x, expected)
    loaded.fit(x, x, verbose=0)
    assert_computes(loaded, x, by_hand(loaded, x))


def test_untie_gives_each_layer_its_own_kernel(model, x):
    expected = by_hand(model, x)
    tether.untie(model)
    assert len(model.weights) == 4
    assert_computes(model, x, expected)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)


def test_a_low_rank_part_and_an_adapter_are_added_and_merged(model, x):
    expected = by_hand(model, x)
    layer = tether.tie(keras.layers.Dense(3), kernel=tether.Weight((6, 3), name="w") + tether.low_rank(2))
    layer(x)
    assert sorted(tuple(v.shape) for v in layer.weights) == [(2, 3), (3,), (6, 2), (6, 3)]
    tether.adapters.add(model, "task", {"encode/kernel": tether.low_rank(2)})
    assert_computes(model, x, expected)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    trained = numpy(model(x))
    assert not np.allclose(trained, expected)
    tether.adapters.merge(model)
    assert_computes(model, x, trained)


def test_quantize_keeps_the_tie(model, x):
    expected = by_hand(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Keras, about layers that it does not quantise
        model.quantize("int8")
    dtypes = [keras.backend.standardize_dtype(v.dtype) for v in model.weights if tuple(v.shape) == (6, 4)]
    assert dtypes == ["int8"]
    assert np.abs(numpy(model(x)) - expected).max() < 0.1 * np.abs(expected).max()


def test_check_and_summary_read_a_model(model):
    assert not tether.check(model)
    text = str(tether.summary(model))
    assert "codec" in text and "encode/kernel = codec" in text and "decode/kernel = codec.T" in text

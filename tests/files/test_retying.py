"""Parts of one tied model that were saved and loaded apart."""

import keras
import numpy as np
import pytest

import tether
from tests.files.models import randomize, state
from tests.support import numpy
from tether.errors import ShapeMismatch, TetherError, Unsupported, ValueConflict

layers = keras.layers


def parts(rng, tmp_path):
    """An encoder and a decoder of one tied model, saved and loaded apart."""
    codec = tether.Weight((5, 3), "glorot_uniform", name="codec")
    encode, decode = layers.Dense(3, name="encode"), layers.Dense(5, name="decode")
    x, h = keras.Input((5,)), keras.Input((3,))
    tether.tie(encode, kernel=codec)
    tether.tie(decode, kernel=2.0 * codec.T)
    encoder, decoder = keras.Model(x, encode(x), name="encoder"), keras.Model(h, decode(h), name="decoder")
    randomize(encoder, rng)
    loaded = []
    for model in (encoder, decoder):
        tether.files.save_model(model, tmp_path / f"{model.name}.keras")
        loaded.append(keras.saving.load_model(tmp_path / f"{model.name}.keras"))
    return loaded


def kernels(encoder, decoder):
    return numpy(encoder.layers[-1].kernel), numpy(decoder.layers[-1].kernel)


def test_parts_are_joined_and_stay_joined(rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    first = tether.weight_of(encoder, "encode/kernel")
    assert tether.weight_of(decoder, "decode/kernel").weights_used() != (first,)
    report = tether.files.retie(encoder, decoder)
    assert [each.sources for each in report.loaded] == [("encoder: codec", "decoder: codec")]
    assert tether.weight_of(decoder, "decode/kernel").weights_used() == (first,)
    first.assign(rng.normal(size=(5, 3)).astype("float32"))
    a, b = kernels(encoder, decoder)
    assert np.array_equal(b, 2 * a.T)
    x = keras.Input((5,))
    whole = keras.Model(x, decoder(encoder(x)))
    assert len(whole.weights) == 3
    whole.save(tmp_path / "whole.keras")
    again = keras.saving.load_model(tmp_path / "whole.keras")
    assert len(again.weights) == 3


def test_values_that_differ_are_an_error_and_nothing_changes(rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    weight = tether.weight_of(decoder, "decode/kernel").weights_used()[0]
    weight.assign(weight.numpy() + 0.5)
    before = state(encoder), state(decoder)
    with pytest.raises(ValueConflict, match=r"'encoder: codec' and 'decoder: codec' differ by up to 0\.5"):
        tether.files.retie(encoder, decoder)
    assert (state(encoder), state(decoder)) == before
    assert tether.weight_of(decoder, "decode/kernel").weights_used() == (weight,)


@pytest.mark.parametrize(
    ("resolve", "expected"),
    [("first", 0.0), ("mean", 0.25), (lambda name, arrays: arrays[1], 0.5)],
    ids=["first", "mean", "function"],
)
def test_values_that_differ_are_resolved(resolve, expected, rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    kernel, _ = kernels(encoder, decoder)
    weight = tether.weight_of(decoder, "decode/kernel").weights_used()[0]
    weight.assign(weight.numpy() + 0.5)
    report = tether.files.retie(encoder, decoder, resolve=resolve)
    np.testing.assert_allclose(kernels(encoder, decoder)[0], kernel + expected, rtol=1e-6)
    np.testing.assert_allclose(kernels(encoder, decoder)[1], 2 * (kernel + expected).T, rtol=1e-6)
    assert report.conflicting[0].difference == pytest.approx(0.5, rel=1e-6)


def test_a_joined_model_trains_one_weight(rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    tether.files.retie(encoder, decoder)
    x = keras.Input((5,))
    whole = keras.Model(x, decoder(encoder(x)))
    whole.compile("adam", "mse")
    data = rng.normal(size=(8, 5)).astype("float32")
    whole.fit(data, data, verbose=0)
    a, b = kernels(encoder, decoder)
    assert np.array_equal(b, 2 * a.T)


def test_three_models_are_joined(rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    third = keras.saving.load_model(tmp_path / "encoder.keras")
    report = tether.files.retie(encoder, decoder, third)
    assert len(report.loaded[0].sources) == 3
    assert tether.weight_of(third, "encode/kernel") is tether.weight_of(encoder, "encode/kernel")


def test_what_cannot_be_joined_is_refused(rng, tmp_path):
    encoder, decoder = parts(rng, tmp_path)
    with pytest.raises(TetherError, match="two or more"):
        tether.files.retie(encoder)
    with pytest.raises(TetherError, match="two or more"):
        tether.files.retie(encoder, encoder)
    plain = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    with pytest.raises(TetherError, match="nothing to join"):
        tether.files.retie(encoder, plain)
    x = keras.Input((5,))
    second = keras.saving.load_model(tmp_path / "encoder.keras")
    second.name = "second"
    doubled = keras.Model(x, [encoder(x), second(x)])
    with pytest.raises(TetherError, match="two copies of one weight"):
        tether.files.retie(decoder, doubled)


@keras.saving.register_keras_serializable(package="test_retying")
class Holder(layers.Layer):
    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return keras.ops.matmul(x, self.table.value)

    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "table": keras.saving.deserialize_keras_object(config["table"])})


def test_a_weight_that_a_layer_holds_itself_is_refused_and_nothing_changes(rng, tmp_path):
    encoder, _ = parts(rng, tmp_path)
    x = keras.Input((5,))
    holder = keras.Model(x, Holder(tether.weight_of(encoder, "encode/kernel"))(x), name="holder")
    holder.save(tmp_path / "holder.keras")
    holder = keras.saving.load_model(tmp_path / "holder.keras")
    before = state(encoder), state(holder)
    with pytest.raises(Unsupported, match=r"'codec' as an attribute.*tether\.sharing"):
        tether.files.retie(encoder, holder)
    assert (state(encoder), state(holder)) == before


def test_weights_of_other_shapes_are_refused(rng, tmp_path):
    encoder, _decoder = parts(rng, tmp_path)
    weight = tether.Weight((2, 2), "ones", name="other")
    weight.origin = tether.weight_of(encoder, "encode/kernel").origin
    other = tether.tie(layers.Dense(2, name="small"), kernel=weight)
    other.build((None, 2))
    with pytest.raises(ShapeMismatch, match=r"\(5, 3\).*\(2, 2\)"):
        tether.files.retie(encoder, other)
    assert len(weight.uses) == 1

"""Saving so that a failure leaves the old file as it was."""

import os

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close
from tether.errors import LostTie, TetherError

pytestmark = pytest.mark.spread

layers = keras.layers


def tied_model():
    codec = tether.Weight(name="codec")
    inputs = keras.Input((4,))
    hidden = tether.tie(layers.Dense(3, name="encode"), kernel=codec)(inputs)
    return keras.Model(inputs, tether.tie(layers.Dense(4, name="decode"), kernel=codec.T)(hidden))


def test_it_writes_a_file_that_keras_reads(rng, tmp_path):
    model = tied_model()
    path = tmp_path / "model.keras"
    tether.files.save_model(model, path)
    tether.files.save_model(model, str(path))
    again = keras.saving.load_model(path)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert len(again.weights) == 3
    assert os.listdir(tmp_path) == ["model.keras"]


class Hidden(layers.Layer):
    """A layer whose config does not hold the tied layer in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(3)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


def test_what_would_lose_a_tie_leaves_the_old_file(tmp_path):
    hidden = Hidden()
    model = keras.Sequential([keras.Input((4,)), hidden])
    path = tmp_path / "model.keras"
    tether.files.save_model(model, path)
    before = path.read_bytes()
    # An argument of the inner layer's call cannot become one of the outer layer's: nobody would pass it.
    strength = tether.weights.Argument("strength", default=1.0)
    tether.tie(hidden.inner, kernel=tether.Weight((4, 3), name="w") * strength)
    with pytest.raises(LostTie, match="would lose a tie"):
        tether.files.save_model(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.keras"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "model.keras"
    path.write_bytes(b"the old file")

    def half(model, target):
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(keras.saving, "save_model", half)
    with pytest.raises(error):
        tether.files.save_model(tied_model(), path)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["model.keras"]


def test_other_targets_are_refused(tmp_path):
    model = tied_model()
    with pytest.raises(TetherError, match=r"\.keras"):
        tether.files.save_model(model, tmp_path / "model.h5")
    with pytest.raises(TetherError, match="folder"):
        tether.files.save_model(model, tmp_path / "nowhere" / "model.keras")
    assert os.listdir(tmp_path) == []
    assert np.isfinite(model.get_weights()[0]).all()

"""Row C3 of the scenarios, in every format: an adapter that was saved goes on learning."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

layers = keras.layers


def trained(rng, optimizer):
    """A model with an adapter on a frozen kernel, after three steps."""
    parent = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inner")])
    parent.set_weights([rng.normal(size=(4, 4)).astype("float32"), np.zeros(4, "float32")])
    parent.trainable = False
    model = tether.inherit(parent, {"inner/kernel": tether.low_rank(2, alpha=6)}, name="child")
    model.compile(optimizer(), "mse")
    x, y = rng.normal(size=(2, 8, 4)).astype("float32")
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    return parent, model, x, y


def copied(parent):
    """The frozen base, as another process would make it."""
    copy = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inner")])
    copy.set_weights(parent.get_weights())
    copy.trainable = False
    return copy


def through_keras(parent, model, tmp_path):
    tether.files.save_model(model, tmp_path / "m.keras")
    return tether.files.load_model(tmp_path / "m.keras")


def through_safetensors(parent, model, tmp_path):
    tether.files.save_safetensors(model, tmp_path / "m.safetensors")
    again = tether.inherit(copied(parent), {"inner/kernel": tether.low_rank(2, alpha=6)}, name="again")
    tether.files.load_safetensors(again, tmp_path / "m.safetensors")
    return again


def through_a_weights_file(parent, model, tmp_path):
    model.save_weights(tmp_path / "m.weights.h5")
    again = tether.inherit(copied(parent), {"inner/kernel": tether.low_rank(2, alpha=6)}, name="again")
    tether.files.load_untied(again, tmp_path / "m.weights.h5")
    return again


def through_peft(parent, model, tmp_path):
    tether.files.save_peft(model, tmp_path / "lora")
    again = copied(parent)
    tether.files.load_peft(again, tmp_path / "lora")
    return again


WAYS = [through_keras, through_safetensors, through_a_weights_file, through_peft]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_c3_training_goes_on_as_if_never_stopped(way, rng, tmp_path):
    # Without momentum, as only a .keras file has the optimizer's state.
    optimizer = keras.optimizers.Adam if way is through_keras else keras.optimizers.SGD
    parent, model, x, y = trained(rng, lambda: optimizer(0.05))
    again = way(parent, model, tmp_path)
    kernel = again.layers[-1].kernel
    assert_close(again(x), model(x), 1e-6)
    base, left, right = kernel.expression.weights_used()
    assert np.any(left.numpy()) and np.any(right.numpy())
    before = base.numpy()
    if not again.compiled:
        again.compile(optimizer(0.05), "mse")
    for each in (model, again):
        each.fit(x, y, epochs=3, shuffle=False, verbose=0)
    assert_close(again(x), model(x), 1e-5)
    assert np.array_equal(base.numpy(), before)
    assert not np.allclose(numpy(kernel.value), before)

"""The start values that a tie gives: integers and truth values never start as floats are drawn."""

import copy
import os
import pickle

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

pytestmark = pytest.mark.spread

SMALL = np.array([[1, -2], [3, 4]])
LARGE = np.random.default_rng(0).integers(-100, 100, (600, 600))
VALUES = {
    "int32": SMALL.astype("int32"),
    "int8": SMALL.astype("int8"),
    "uint8": abs(SMALL).astype("uint8"),
    "bool": SMALL > 0,
    "int32, more than a megabyte": LARGE.astype("int32"),
}
USES = {
    "cast": lambda q: q.astype("float32"),
    "scaled": lambda q: q.astype("float32") * 0.5,
    "transposed": lambda q: q.astype("float32").T,
    "with a stored scale": lambda q: (
        q.astype("float32") * tether.Weight(np.full(q.shape[1:], 0.25, "float32"), name="s")
    ),
}
INITIALIZERS = [
    "glorot_uniform",
    "orthogonal",
    "ones",
    lambda shape, dtype=None: keras.random.normal(shape, dtype=dtype),
]


def model_of(values, use):
    """A Dense layer whose kernel is made of stored integers."""
    q = tether.Weight(values, name="q")
    layer = tether.tie(keras.layers.Dense(values.shape[1], use_bias=False, name="dense"), kernel=use(q))
    inputs = keras.Input(values.shape[:1])
    return keras.Model(inputs, layer(inputs))


def copies(model, folder):
    """The model as each road brings it back, by name."""
    path, weights = os.path.join(folder, "model.keras"), os.path.join(folder, "model.weights.h5")
    tensors = os.path.join(folder, "model.safetensors")
    model.save(path)
    model.save_weights(weights)
    tether.files.save_safetensors(model, tensors)
    set_again, h5, safetensors = (keras.models.clone_model(model) for _ in range(3))
    set_again.set_weights(model.get_weights())
    h5.load_weights(weights)
    tether.files.load_safetensors(safetensors, tensors)
    return {
        "keras.saving.load_model": keras.saving.load_model(path),
        "tether.files.load_model": tether.files.load_model(path),
        "clone_model and set_weights": set_again,
        "clone_model and load_weights": h5,
        "clone_model and load_safetensors": safetensors,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
    }


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", VALUES)
def test_integers_come_back_as_they_were_on_every_road(dtype, use, tmp_path):
    model = model_of(VALUES[dtype], USES[use])
    wanted = numpy(model.get_layer("dense").kernel)
    for road, made in copies(model, tmp_path).items():
        np.testing.assert_array_equal(numpy(made.get_layer("dense").kernel), wanted, err_msg=road)
        stored = next(v for v in made.variables if "float" not in keras.backend.standardize_dtype(v.dtype))
        assert keras.backend.standardize_dtype(stored.dtype) == str(VALUES[dtype].dtype), road
        np.testing.assert_array_equal(numpy(stored), VALUES[dtype], err_msg=road)
        assert not any(variable is stored for variable in made.trainable_variables), road


@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("shape", [None, (4, 4)])
@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "bool"])
def test_integers_without_values_start_at_zero_whatever_the_layer_draws(dtype, shape, initializer):
    q = tether.Weight(shape, dtype=dtype)
    layer = tether.tie(keras.layers.Dense(4, kernel_initializer=initializer), kernel=q.astype("float32") * 2.0)
    layer.build((None, 4))
    assert (q.dtype, q.shape) == (dtype, (4, 4))
    assert_close(layer.kernel, np.zeros((4, 4)))
    again = keras.layers.Dense(4, kernel_initializer="he_normal")  # and its initializer is compared with none
    tether.tie(again, kernel=q.astype("float32")).build((None, 4))
    q.assign(np.eye(4, dtype=dtype))
    assert_close(again.kernel, np.eye(4))


def test_the_floats_beside_integers_start_as_the_layer_draws_them():
    q, scale = tether.Weight((4, 4), dtype="int8", name="q"), tether.Weight((4, 4), name="scale")
    tether.tie(keras.layers.Dense(4), kernel=scale).build((None, 4))
    layer = tether.tie(keras.layers.Dense(4, kernel_initializer="ones"), kernel=q.astype("float32") + scale)
    layer.build((None, 4))
    assert np.std(scale.numpy()) > 0
    assert_close(layer.kernel, scale.numpy())


class Table(keras.layers.Layer):
    """A layer whose own variable is one of integers."""

    def build(self, _):
        self.places = self.add_weight(shape=(4,), dtype="int32", initializer=self.drawn, trainable=False, name="places")
        self.built = True

    @staticmethod
    def drawn(shape, dtype=None):
        return keras.ops.arange(shape[0], dtype=dtype)

    def call(self, x):
        return keras.ops.take(x, self.places, axis=-1)


def test_integers_that_a_layer_draws_itself_are_drawn():
    places = tether.Weight(dtype="int32", name="places")
    layer = tether.tie(Table(), places=places)
    x = np.array([[5.0, 6.0, 7.0, 8.0]], "float32")
    assert_close(layer(x), x)
    assert places.numpy().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("initializer", ["glorot_uniform", keras.initializers.RandomNormal(), "orthogonal"])
def test_an_initializer_that_draws_floats_is_refused_for_integers(initializer, dtype):
    with pytest.raises(tether.TetherError, match=f"draws floats.*{dtype}"):
        tether.Weight((2, 2), initializer, dtype=dtype)
    assert tether.Weight((2, 2), "ones", dtype=dtype).numpy().tolist() == [[1, 1], [1, 1]]

"""Calling a layer with weights that were computed."""

import keras
import numpy as np
import pytest

import tether
from tests.kinds import for_each
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError, UnboundArgument, UnknownName

layers = keras.layers
ops = keras.ops

MADE_OF_ONE_LAYER = ("dense", "embedding", "conv2d", "einsum_dense", "layer_normalization", "lstm", "attention")


def data(kind, rng):
    twin, x = kind.make(), kind.inputs(rng)
    given = (x, x) if isinstance(twin, layers.MultiHeadAttention) else x
    run(twin, given)
    weight = tether.weight_of(twin, kind.path)
    return twin, weight, given, rng.normal(size=weight.shape).astype("float32")


def run(layer, given):
    return layer(*given) if isinstance(given, tuple) else layer(given)


@for_each(*MADE_OF_ONE_LAYER, "block")
def test_a_built_layer_keeps_weights_of_its_own(kind, rng):
    twin, weight, given, value = data(kind, rng)
    layer = kind.make()
    run(layer, given)
    layer.set_weights(twin.get_weights())
    cls, before = type(layer), numpy(run(layer, given))
    found = tether.call(layer, given, {kind.path: value})
    weight.assign(value)
    assert_close(found, run(twin, given))
    np.testing.assert_array_equal(numpy(run(layer, given)), before)
    assert type(layer) is cls
    assert len(layer.weights) == len(twin.weights)


def test_a_model_without_a_graph_yet_stores_nothing_for_them_either(rng):
    model = keras.Sequential([layers.Dense(3, name="d")])
    tether.call(model, np.ones((2, 4), "float32"), {"d/kernel": np.ones((4, 3), "float32")})
    assert [w.name for w in model.weights] == ["bias"]


@for_each(*MADE_OF_ONE_LAYER)
def test_a_layer_that_is_not_built_stores_nothing_for_them(kind, rng):
    twin, weight, given, value = data(kind, rng)
    layer = kind.make()
    first = tether.call(layer, given, {kind.path: value})
    assert len(layer.weights) == len(twin.weights) - 1
    rest = [w for w in twin.weights if w is not weight.variable]
    for target, source in zip(layer.weights, rest, strict=True):
        target.assign(source)
    weight.assign(value)
    assert_close(tether.call(layer, given, {kind.path: value}), run(twin, given))
    assert first.shape == run(twin, given).shape


@pytest.mark.parametrize("build", ["before", "after"])
def test_gradients_flow_into_the_tensors(rng, build):
    layer = layers.Dense(3)
    if build == "before":
        layer.build((None, 4))
    code = keras.Variable(rng.normal(size=(12,)).astype("float32"))
    x = rng.normal(size=(2, 4)).astype("float32")

    def loss():
        kernel = ops.reshape(ops.tanh(code.value), (4, 3))
        return ops.sum(tether.call(layer, x, kernel=kernel, bias=np.zeros(3, "float32")) ** 2)

    _, (found,) = gradients(loss, [code])
    value = numpy(code.value)
    kernel = np.tanh(value).reshape(4, 3)
    assert_close(found, (2 * x.T @ (x @ kernel)).ravel() * (1 - np.tanh(value) ** 2), 1e-4)


@pytest.mark.parametrize("build", ["before", "after"])
def test_a_hypernetwork_as_a_functional_model(rng, build, tmp_path):
    target = layers.Dense(3, name="target")
    if build == "before":
        target.build((None, 4))
    inputs, task = keras.Input((4,)), keras.Input(batch_shape=(1, 2))
    kernel = layers.Reshape((4, 3))(layers.Dense(12, name="hyper")(task))
    outputs = tether.call(target, inputs, kernel=kernel[0])
    model = keras.Model([inputs, task], outputs)
    x, code = rng.normal(size=(5, 4)).astype("float32"), rng.normal(size=(1, 2)).astype("float32")
    hyper = model.get_layer("hyper")
    made = numpy(hyper(code)).reshape(4, 3)
    assert_close(model([ops.convert_to_tensor(x), ops.convert_to_tensor(code)]), x @ made)
    names = [w.path.rpartition("/")[2] for w in model.trainable_weights]
    assert names == ["kernel", "bias", *(["kernel"] if build == "before" else []), "bias"]
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again([ops.convert_to_tensor(x), ops.convert_to_tensor(code)]), x @ made)
    before = numpy(hyper.kernel).copy()
    _, found = gradients(
        lambda: ops.sum(model([ops.convert_to_tensor(x), ops.convert_to_tensor(code)]) ** 2), [hyper.kernel]
    )
    assert np.any(found[0]) and found[0].shape == before.shape


def test_it_trains_inside_a_layer_of_ones_own(rng):
    class Hyper(layers.Layer):
        def __init__(self):
            super().__init__()
            self.make, self.target = layers.Dense(12), layers.Dense(3)

        def build(self, shape):
            self.make.build((1, 4))
            self.target.build(shape)
            self.target.trainable = False  # its own kernel is not used: it gets no gradient

        def call(self, x):
            kernel = ops.reshape(self.make(ops.mean(x, axis=0, keepdims=True)), (4, 3))
            return tether.call(self.target, x, kernel=kernel)

    layer = Hyper()
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    x, y = rng.normal(size=(16, 4)), rng.normal(size=(16, 3))
    own = numpy(layer.target.kernel).copy()
    losses = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(numpy(layer.target.kernel), own)


def test_what_a_layer_keeps_as_state_goes_on(rng):
    layer = layers.BatchNormalization(momentum=0.0)
    layer.build((None, 4))
    x = rng.normal(size=(64, 4)).astype("float32") + 3
    tether.call(layer, x, gamma=np.full(4, 2.0, "float32"), training=True)
    assert_close(layer.moving_mean, x.mean(0), 1e-3)
    assert_close(layer.gamma, np.ones(4))


def test_after_an_error_the_layer_is_as_it_was(rng):
    layer = layers.Dense(3)
    layer.build((None, 4))
    kernel = layer.kernel
    with pytest.raises(Exception, match=r"incompatible|shape|size"):
        tether.call(layer, np.ones((2, 5), "float32"), kernel=np.ones((4, 3), "float32"))
    assert layer.kernel is kernel


def test_bad_input_is_refused(rng):
    layer = layers.Dense(3)
    layer.build((None, 4))
    x = np.ones((2, 4), "float32")
    with pytest.raises(ShapeMismatch, match=r"\(4, 3\).*\(3, 4\)"):
        tether.call(layer, x, kernel=np.ones((3, 4), "float32"))
    with pytest.raises(UnknownName, match="kernel"):
        tether.call(layer, x, kernal=np.ones((4, 3), "float32"))
    with pytest.raises(TetherError, match="needs weights"):
        tether.call(layer, x)
    with pytest.raises(TetherError, match="twice"):
        tether.call(layer, x, {"kernel": 1.0}, kernel=1.0)
    with pytest.raises(TetherError, match="Keras layer"):
        tether.call("layer", x, kernel=1.0)


def test_a_layer_without_a_kernel_of_its_own_says_so(rng):
    layer = layers.Dense(3)
    x = np.ones((2, 4), "float32")
    tether.call(layer, x, kernel=np.ones((4, 3), "float32"))
    with pytest.raises(UnboundArgument, match="kernel=value"):
        layer(x)
    assert_close(layer(x, kernel=np.ones((4, 3), "float32")), np.full((2, 3), 4.0))

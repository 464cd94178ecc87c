"""Rows B of the scenarios: one weight in two layers."""

import gc
import io
import json
import os
import pickle
import subprocess
import sys
import weakref
import zipfile

import keras
import numpy as np
import pytest

import tether
from tests.kinds import Bilinear, Kind, apply, for_each
from tests.support import assert_close, gradients, numpy, paths, slot_count

layers = keras.layers
BACKEND = keras.backend.backend()

# --------------------------------------------------------------------------- the models of these tests


KINDS = {
    "dense": Kind(lambda: layers.Dense(3, activation="tanh"), "kernel", (4,)),
    "embedding": Kind(lambda: layers.Embedding(5, 3), "embeddings", (4,), 5),
    "conv2d": Kind(lambda: layers.Conv2D(2, 2), "kernel", (3, 3, 2)),
    "einsum_dense": Kind(
        lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de"), "kernel", (2, 4)
    ),
    "lstm_cell": Kind(lambda: layers.LSTM(2, unroll=True), "cell/recurrent_kernel", (2, 2)),
    "attention": Kind(lambda: layers.MultiHeadAttention(2, 2), "query_dense/kernel", (3, 4)),
}
every_kind = for_each(among=KINDS)


def loss(outputs):
    """A loss in which every output counts differently."""
    total = 0.0
    for number, y in enumerate(keras.tree.flatten(outputs), start=1):
        total = total + number * keras.ops.sum(keras.ops.sin(y) + 0.5 * y * y)
    return total


def plain_twin(kind, model, first, second):
    """Untied layers with the same values."""
    twin, one, two = kind.pair()
    one.set_weights(first.get_weights())
    two.set_weights(second.get_weights())
    return twin, one, two


class Codec:
    """A linear autoencoder with a tied kernel, and what NumPy says about it."""

    def __init__(self, rng, inputs=5, code=3, **options):
        self.W = rng.normal(size=(inputs, code)).astype("float32")
        self.b = rng.normal(size=code).astype("float32")
        self.c = rng.normal(size=inputs).astype("float32")
        self.x = rng.normal(size=(4, inputs)).astype("float32")
        self.t = rng.normal(size=(4, inputs)).astype("float32")
        self.codec = tether.Weight(name="codec")
        self.encode = tether.tie(layers.Dense(code, name="encode"), kernel=self.codec)
        self.decode = tether.tie(layers.Dense(inputs, name="decode"), kernel=self.codec.T)

    def model(self):
        x = keras.Input((self.W.shape[0],))
        model = keras.Model(x, self.decode(self.encode(x)))
        self.start()
        return model

    def start(self):
        self.codec.assign(self.W)
        self.encode.bias.assign(self.b)
        self.decode.bias.assign(self.c)

    def predicted(self):
        return (self.x @ self.W + self.b) @ self.W.T + self.c

    def parts(self):
        """The gradient of the mean squared error through the encoder's use and through the decoder's."""
        h = self.x @ self.W + self.b
        dy = 2 * (h @ self.W.T + self.c - self.t) / self.t.size
        return self.x.T @ (dy @ self.W), dy.T @ h

    def loss(self):
        return keras.ops.mean(keras.ops.square(keras.ops.subtract(self.decode(self.encode(self.x)), self.t)))


def step(model, x, t, optimizer=None):
    """One step of training on one batch."""
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    model.fit(x, t, batch_size=len(x), epochs=1, shuffle=False, verbose=0)


def reload(model, tmp_path, name="model.keras"):
    path = str(tmp_path / name)
    model.save(path)
    return keras.saving.load_model(path)


def snapshot(layer):
    """Everything about a layer that a tie that fails must not change."""
    below = [layer, *layer._flatten_layers(include_self=False)]
    return {
        "types": [type(each) for each in below],
        "attributes": [sorted(vars(each)) for each in below],
        "variables": [id(variable) for variable in layer.variables],
        "trainable": [variable.trainable for variable in layer.variables],
        "paths": paths(layer),
        "regularizers": [variable.regularizer for variable in layer.variables],
        "config": json.dumps(layer.get_config(), default=str),
        "values": [value.tobytes() for value in layer.get_weights()],
    }


# --------------------------------------------------------------------------- B1


@every_kind
def test_b1_tie_before_build_shares_one_variable(kind, rng):
    weight = tether.Weight(name="shared")
    first, second = kind.make(), kind.make()
    assert tether.tie(first, {kind.path: weight}) is first
    assert tether.tie(second, {kind.path: weight}) is second
    x = kind.symbol()
    model = keras.Model(x, [apply(first, x), apply(second, x)])

    twin, one, two = plain_twin(kind, model, first, second)
    assert len(model.weights) == len(twin.weights) - 1
    assert model.count_params() == twin.count_params() - weight.numpy().size
    assert [v for v in model.weights if v is weight.variable] == [weight.variable]
    assert [v is weight.variable for v in first.weights].count(True) == 1
    batch = kind.inputs(rng)
    for mine, theirs in zip(model(batch), twin(batch), strict=True):
        assert_close(mine, theirs)

    value, (found,) = gradients(lambda: loss(model(batch)), [weight.variable])
    expected, parts = gradients(lambda: loss(twin(batch)), [kind.read(one), kind.read(two)])
    assert value == pytest.approx(expected, rel=1e-5)
    assert_close(found, parts[0] + parts[1], 1e-4)


@every_kind
def test_b1_tie_after_build_shares_one_variable(kind, rng):
    model, first, second = kind.pair()
    batch = kind.inputs(rng)
    before = len(model.weights)
    variable, kept = kind.read(first), numpy(kind.read(first))
    output = numpy(model(batch)[0])
    weight = tether.weight_of(first, kind.path)
    assert tether.tie(second, {kind.path: weight}) is second

    assert weight.variable is variable
    assert np.array_equal(numpy(kind.read(second)), kept)
    assert len(model.weights) == before - 1
    assert np.array_equal(numpy(model(batch)[0]), output)
    twin, one, two = plain_twin(kind, model, first, second)
    assert np.array_equal(numpy(kind.read(two)), kept)
    for mine, theirs in zip(model(batch), twin(batch), strict=True):
        assert_close(mine, theirs)
    _, (found,) = gradients(lambda: loss(model(batch)), [variable])
    _, parts = gradients(lambda: loss(twin(batch)), [kind.read(one), kind.read(two)])
    assert_close(found, parts[0] + parts[1], 1e-4)


@every_kind
def test_b1_no_orphan_is_left(kind):
    model, first, second = kind.pair()
    orphan = weakref.ref(kind.read(second))
    tether.tie(second, {kind.path: tether.weight_of(first, kind.path)})
    gc.collect()
    assert orphan() is None
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    assert slot_count(optimizer) == 2 * len(model.trainable_variables)
    assert len(model.trainable_variables) == 2 * len(first.trainable_variables) - 1


def test_b1_an_optimizer_of_before_knows_the_promoted_variable(rng):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="a"), layers.Dense(3, name="b")])
    x, t = rng.normal(size=(2, 4, 3)).astype("float32")
    step(model, x, t, keras.optimizers.SGD(0.1, momentum=0.9))
    momentum = next(v for v in model.optimizer.variables if "a_kernel" in v.path)
    before, value = numpy(momentum).copy(), numpy(model.get_layer("a").kernel).copy()
    weight = tether.weight_of(model.get_layer("a"), "kernel")
    _, (gradient,) = gradients(
        lambda: keras.ops.mean(keras.ops.square(keras.ops.subtract(model(x), t))), [weight.variable]
    )
    model.fit(x, t, batch_size=4, shuffle=False, verbose=0)
    assert np.abs(before).max() > 0
    assert_close(momentum, 0.9 * before - 0.1 * gradient)
    assert_close(weight.value, value + 0.9 * before - 0.1 * gradient)


def misfits():
    """Ties that fail, of a built Dense(3) on 4 inputs with a tanh and a constrained bias."""
    return {
        "shape": lambda w: {"kernel": w.T},
        "the second of two": lambda w: {"kernel": w, "bias": w[0, :2]},
        "the second has no name": lambda w: {"kernel": w, "kernal": w},
        "one twice": lambda w: {"kernel": w, "_kernel": w},
        "a constraint on a formula": lambda w: {"kernel": w, "bias": 2.0 * w[0]},
        "a string": lambda w: {"kernel": "w"},
        "no shape": lambda w: {"kernel": tether.Weight() @ tether.Weight()},
    }


@pytest.mark.parametrize("built_weight", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("misfit", list(misfits()))
@pytest.mark.parametrize("depth", ["layer", "submodel"])
def test_b1_a_failed_tie_changes_nothing(misfit, depth, built_weight, rng):
    dense = layers.Dense(3, bias_constraint=keras.constraints.NonNeg(), name="dense")
    root = keras.Sequential([keras.Input((4,)), dense], name="inner")
    if depth == "submodel":
        root = keras.Sequential([keras.Input((4,)), root])
    prefix = {"layer": "dense/", "submodel": "inner/dense/"}[depth]
    weight = tether.Weight((4, 3), name="w")
    if built_weight:
        assert weight.variable.shape == (4, 3)
    kernel, bias = dense.kernel, dense.bias
    before = snapshot(root)
    batch = rng.normal(size=(2, 4)).astype("float32")
    output = numpy(root(batch))

    with pytest.raises(tether.TetherError):
        tether.tie(root, {prefix + name: value for name, value in misfits()[misfit](weight).items()})

    assert snapshot(root) == before
    assert dense.kernel is kernel and dense._kernel is kernel and dense.bias is bias
    assert weight.uses == () and weight.is_built is built_weight
    assert np.array_equal(numpy(root(batch)), output)
    # And the tie that was meant still works.
    tether.tie(root, {prefix + "kernel": weight})
    assert dense.kernel.shape == (4, 3) and len(weight.uses) == 1


def test_b1_a_tie_that_fails_when_the_layer_builds_names_both_shapes(rng):
    weight = tether.Weight((3, 4), initializer="ones", name="w")
    layer = tether.tie(layers.Dense(3, name="late"), kernel=weight)
    with pytest.raises(tether.TetherError, match=r"kernel.*late.*\(4, 3\).*\(3, 4\).*kernel=w.T"):
        layer.build((None, 4))
    assert weight.uses == () and np.array_equal(weight.numpy(), np.ones((3, 4)))


def test_b1_a_tie_that_was_tied_before_moves(rng):
    one, two = tether.Weight((4, 3), "ones", name="one"), tether.Weight((4, 3), "zeros", name="two")
    layer = tether.tie(layers.Dense(3, use_bias=False), kernel=one)
    layer.build((None, 4))
    tether.tie(layer, kernel=two)
    assert [v is two.variable for v in layer.weights] == [True]
    assert one.uses == () and len(two.uses) == 1
    assert np.array_equal(numpy(layer(np.ones((1, 4), "float32"))), np.zeros((1, 3)))


@keras.saving.register_keras_serializable(package="scenarios_b")
class Tower(keras.Model):
    """A subclassed model that ties in its constructor, two levels down."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.blocks = [keras.Sequential([layers.Dense(units, activation="tanh", name="dense")]) for _ in range(3)]
        self.head = layers.Dense(units)
        self.shared = tether.Weight(name="shared")
        for block in self.blocks:
            tether.tie(block.layers[0], kernel=self.shared)
        tether.tie(self.head, kernel=self.shared.T)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_b1_in_a_subclassed_model(rng):
    model = Tower()
    batch = rng.normal(size=(2, 3)).astype("float32")
    model(batch)
    assert len(model.weights) == 5 and model.count_params() == 9 + 4 * 3
    W = rng.normal(size=(3, 3)).astype("float32")
    model.shared.assign(W)
    h = batch
    for _ in range(3):
        h = np.tanh(h @ W)
    assert_close(model(batch), h @ W.T)


def test_b1_by_the_place_in_a_sequential(rng):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(3)])
    weight = tether.weight_of(model, "layers/0/kernel")
    assert tether.tie(model, {"layers/1/kernel": weight.T}) is model
    x, W = rng.normal(size=(2, 3)).astype("float32"), rng.normal(size=(3, 3)).astype("float32")
    model.layers[0].kernel.assign(W)
    assert len(model.weights) == 3
    assert_close(model(x), x @ W @ W.T)


def test_b1_by_a_path_through_submodels(rng):
    left = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")], name="left")
    right = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")], name="right")
    x = keras.Input((4,))
    model = keras.Model(x, [left(x), right(x)])
    weight = tether.weight_of(model, "left/dense/kernel")
    tether.tie(model, {"right/dense/kernel": weight})
    assert len(model.weights) == 3 and len(left.weights) == len(right.weights) == 2
    W = rng.normal(size=(4, 3)).astype("float32")
    weight.assign(W)
    batch = rng.normal(size=(2, 4)).astype("float32")
    for y in model(batch):
        assert_close(y, batch @ W)


# --------------------------------------------------------------------------- B2


def autoencoder(rng):
    codec = Codec(rng)
    return codec.model(), codec.x, codec.t, 3, ["encode/kernel", "decode/kernel"]


def language_model(rng):
    """Built first, and then tied."""
    x = keras.Input((4,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(layers.Embedding(6, 3, name="embed")(x))
    model = keras.Model(x, layers.Dense(6, name="head")(h))
    ids, t = rng.integers(0, 6, (4, 4)).astype("int32"), rng.normal(size=(4, 6)).astype("float32")
    tether.tie(model.get_layer("head"), kernel=tether.weight_of(model.get_layer("embed"), "embeddings").T)
    return model, ids, t, 2, ["embed/embeddings", "head/kernel"]


def two_submodels(rng):
    # Not both "dense": read from a file, Keras gives both biases one path, and PyTorch trains one of the two.
    encoder = keras.Sequential([keras.Input((5,)), layers.Dense(3, name="squeeze")], name="encoder")
    decoder = keras.Sequential([keras.Input((3,)), layers.Dense(5, name="expand")], name="decoder")
    x = keras.Input((5,))
    model = keras.Model(x, decoder(encoder(x)))
    tether.tie(model, {"decoder/expand/kernel": tether.weight_of(model, "encoder/squeeze/kernel").T})
    return model, *rng.normal(size=(2, 4, 5)).astype("float32"), 3, ["encoder/squeeze/kernel", "decoder/expand/kernel"]


def subclassed(rng):
    model = Tower()
    x, t = rng.normal(size=(2, 4, 3)).astype("float32")
    model(x)
    return model, x, t, 5, ["blocks/0/dense/kernel", "blocks/2/dense/kernel", "head/kernel"]


def convolutions(rng):
    kernel = tether.Weight(name="filters")
    down = tether.tie(layers.Conv2D(2, 2, name="down"), kernel=kernel)
    up = tether.tie(layers.Conv2DTranspose(3, 2, name="up"), kernel=kernel)
    x = keras.Input((3, 3, 3))
    model = keras.Model(x, up(down(x)))
    return model, *rng.normal(size=(2, 4, 3, 3, 3)).astype("float32"), 3, ["down/kernel", "up/kernel"]


def attentions(rng):
    x = keras.Input((3, 4))
    one = layers.MultiHeadAttention(2, 2, name="one")
    two = layers.MultiHeadAttention(2, 2, name="two")
    model = keras.Model(x, two(one(x, x), x))
    tether.tie(model, {"two/query/kernel": tether.weight_of(model, "one/query/kernel")})
    t = rng.normal(size=(2, 4, 3, 4)).astype("float32")
    return model, *t, 15, ["one/query/kernel", "two/query/kernel"]


SAVED = [autoencoder, language_model, two_submodels, subclassed, convolutions, attentions]


def stored_behind(model, names):
    """The distinct stored variables behind weights of a model."""
    found = [tether.weight_of(model, name) for name in names]
    weights = {id(w): w for expression in found for w in expression.weights_used()}
    return [weight.variable for weight in weights.values()]


def compile_as_if_trained(model, rng):
    """Adam, whose every moment is another number."""
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        if tuple(variable.shape) != ():
            variable.assign(rng.uniform(0.1, 0.2, variable.shape).astype("float32"))


@pytest.mark.parametrize("make", SAVED, ids=lambda make: make.__name__)
def test_b2_reloads_tied_with_its_optimizer(make, rng, tmp_path):
    model, x, _, count, names = make(rng)
    compile_as_if_trained(model, rng)
    loaded = reload(model, tmp_path)

    assert len(loaded.weights) == len(model.weights) == count
    assert loaded.count_params() == model.count_params()
    assert len(stored_behind(loaded, names)) == len(stored_behind(model, names)) == 1
    for mine, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))

    assert slot_count(loaded.optimizer) == slot_count(model.optimizer) == 2 * count
    for mine, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs))


@pytest.mark.parametrize("make", [autoencoder, language_model, subclassed], ids=lambda make: make.__name__)
def test_b2_training_goes_on_as_if_never_stopped(make, rng, tmp_path):
    """A tie that was lost would diverge, and so would a lost momentum."""
    model, x, t, _, names = make(rng)
    step(model, x, t, keras.optimizers.Adam(0.1))
    loaded = reload(model, tmp_path)
    (shared,) = stored_behind(model, names)
    before = numpy(shared).copy()
    losses = [each.fit(x, t, batch_size=len(x), shuffle=False, epochs=2, verbose=0).history for each in (model, loaded)]
    assert_close(losses[1]["loss"], losses[0]["loss"], 1e-5)
    for mine, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert_close(mine, theirs, 1e-4)
    assert np.abs(numpy(shared) - before).max() > 0.01


def test_b2_a_twice_saved_model_is_the_same(rng, tmp_path):
    model, x, *_ = two_submodels(rng)
    compile_as_if_trained(model, rng)
    again = reload(reload(model, tmp_path, "one.keras"), tmp_path, "two.keras")
    assert len(again.weights) == 3
    assert np.array_equal(numpy(again(x)), numpy(model(x)))
    again.layers[1].layers[0].kernel.assign(np.zeros((5, 3), "float32"))
    assert np.array_equal(numpy(again.layers[2].layers[0].kernel), np.zeros((3, 5)))
    for mine, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs))


def test_b2_weights_alone_load_into_a_model_of_the_same_ties(rng, tmp_path):
    one, two = Codec(rng), Codec(rng)
    model, other = one.model(), two.model()
    path = str(tmp_path / "only.weights.h5")
    model.save_weights(path)
    other.load_weights(path)
    assert np.array_equal(two.codec.numpy(), one.W)
    assert np.array_equal(numpy(two.decode.kernel), one.W.T)
    assert np.array_equal(numpy(other(one.x)), numpy(model(one.x)))


def test_b2_the_legacy_format_reloads_tied(rng, tmp_path):
    codec = Codec(rng)
    model = codec.model()
    loaded = reload(model, tmp_path, "model.h5")
    assert len(loaded.weights) == 3 and loaded.count_params() == 23
    assert np.array_equal(numpy(loaded(codec.x)), numpy(model(codec.x)))
    W = rng.normal(size=(5, 3)).astype("float32")
    loaded.get_layer("encode").kernel.assign(W)
    assert np.array_equal(numpy(loaded.get_layer("decode").kernel), W.T)
    assert np.array_equal(codec.codec.numpy(), codec.W)


READER = """
import json, sys
import keras, numpy as np
import tether
model = keras.saving.load_model(sys.argv[1])
x = np.load(sys.argv[2])
encode, decode = model.get_layer("encode"), model.get_layer("decode")
before = np.asarray(keras.ops.convert_to_numpy(model(x))).tolist()
slots = sum(v.shape != () for v in model.optimizer.variables)
encode.kernel.assign(np.full((5, 3), 2.0, "float32"))
after = np.asarray(keras.ops.convert_to_numpy(decode.kernel)).tolist()
print(json.dumps({"paths": [v.path for v in model.weights], "output": before, "decode": after, "slots": slots}))
"""


def test_b2_loads_in_a_new_process(rng, tmp_path):
    codec = Codec(rng)
    model = codec.model()
    compile_as_if_trained(model, rng)
    model.save(str(tmp_path / "model.keras"))
    np.save(tmp_path / "x.npy", codec.x)
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", READER, "model.keras", "x.npy"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.strip().splitlines()[-1])
    assert said["paths"] == paths(model) == [codec.codec.variable.path, "encode/bias", "decode/bias"]
    assert said["slots"] == 6
    assert_close(np.array(said["output"], "float32"), model(codec.x), 1e-6)
    assert np.array_equal(said["decode"], np.full((3, 5), 2.0))


# --------------------------------------------------------------------------- B3


def test_b3_a_transposed_kernel_follows_the_encoder(rng):
    codec = Codec(rng)
    model = codec.model()
    assert_close(model(codec.x), codec.predicted())
    compiled = model.predict(codec.x, verbose=0)
    assert_close(compiled, codec.predicted())
    codec.W = rng.normal(size=codec.W.shape).astype("float32")
    codec.encode.kernel.assign(codec.W)
    assert_close(model(codec.x), codec.predicted())
    assert_close(model.predict(codec.x, verbose=0), codec.predicted())


def test_b3_the_gradient_comes_from_both_uses(rng):
    codec = Codec(rng)
    model = codec.model()
    through_encode, through_decode = codec.parts()
    _, (found,) = gradients(codec.loss, [codec.codec.variable])
    assert_close(found, through_encode + through_decode)
    step(model, codec.x, codec.t)
    assert_close(codec.codec.value, codec.W - 0.1 * (through_encode + through_decode))
    assert np.array_equal(numpy(codec.decode.kernel), numpy(codec.encode.kernel).T)


@keras.saving.register_keras_serializable(package="scenarios_b")
class Decoder(layers.Layer):
    """The recipe that people copy, with a tie where they transpose: inside `build`."""

    def __init__(self, encoder, **kwargs):
        super().__init__(**kwargs)
        self.kernel_weight = tether.weight_of(encoder, "kernel")
        self.dense = layers.Dense(5)

    def build(self, shape):
        tether.tie(self.dense, kernel=self.kernel_weight.T)
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


def test_b3_tied_inside_build(rng):
    encoder = layers.Dense(3)
    x = keras.Input((5,))
    h = encoder(x)
    decoder = Decoder(encoder)
    model = keras.Model(x, decoder(h))
    assert len(model.weights) == 3
    batch, W = rng.normal(size=(2, 5)).astype("float32"), rng.normal(size=(5, 3)).astype("float32")
    model.predict(batch, verbose=0)
    encoder.kernel.assign(W)
    assert_close(model.predict(batch, verbose=0), batch @ W @ W.T)


def test_b3_a_layer_of_ones_own_reads_the_present_value(rng):
    table = tether.Weight((5, 3), name="table")
    x = keras.Input((5,))
    embed = tether.tie(layers.Dense(3, use_bias=False), kernel=table)
    model = keras.Model(x, Bilinear(table)(embed(x)))
    assert len(model.weights) == 1
    batch = rng.normal(size=(2, 5)).astype("float32")
    for _ in range(2):
        W = rng.normal(size=(5, 3)).astype("float32")
        table.assign(W)
        assert_close(model.predict(batch, verbose=0), batch @ W @ W.T)


# --------------------------------------------------------------------------- B4


def halves(rng):
    W = rng.normal(size=(4, 7)).astype("float32")
    weight = tether.Weight(W, name="w")
    left = tether.tie(layers.Dense(3, use_bias=False, name="left"), kernel=weight[:, :3])
    right = tether.tie(layers.Dense(4, use_bias=False, name="right"), kernel=weight[:, 3:])
    x = keras.Input((4,))
    return keras.Model(x, [left(x), right(x)]), weight, W


def test_b4_two_slices_of_one_weight_train(rng):
    model, weight, W = halves(rng)
    x = rng.normal(size=(5, 4)).astype("float32")
    t = rng.normal(size=(5, 7)).astype("float32")
    assert len(model.weights) == 1 and model.count_params() == 28
    left, right = model(x)
    assert_close(left, x @ W[:, :3])
    assert_close(right, x @ W[:, 3:])
    dy = x @ W - t
    dy = np.concatenate([2 * dy[:, :3] / 15, 2 * dy[:, 3:] / 20], axis=1)
    step(model, x, [t[:, :3], t[:, 3:]])
    assert_close(weight.value, W - 0.1 * x.T @ dy)


def test_b4_two_slices_saved_and_loaded(rng, tmp_path):
    model, weight, _ = halves(rng)
    x = rng.normal(size=(5, 4)).astype("float32")
    loaded = reload(model, tmp_path)
    assert len(loaded.weights) == 1 and loaded.count_params() == 28
    for mine, theirs in zip(loaded(x), model(x), strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs))
    W = rng.normal(size=(4, 7)).astype("float32")
    loaded.weights[0].assign(W)
    assert np.array_equal(numpy(loaded.get_layer("right").kernel), W[:, 3:])
    assert not np.array_equal(weight.numpy(), W)


def test_b4_slices_that_overlap_add_up(rng):
    W = rng.normal(size=(6, 3)).astype("float32")
    table = tether.Weight(W, name="table")
    low = tether.tie(layers.Embedding(4, 3), embeddings=table[:4])
    high = tether.tie(layers.Embedding(4, 3), embeddings=table[2:])
    ids = np.array([[0, 1, 2, 3], [3, 3, 0, 2]], "int32")
    assert np.array_equal(numpy(low(ids)), W[ids])
    assert np.array_equal(numpy(high(ids)), W[ids + 2])
    _, (found,) = gradients(lambda: keras.ops.sum(low(ids)) + 10.0 * keras.ops.sum(high(ids)), [table.variable])
    counts = np.bincount(ids.ravel(), minlength=4).astype("float32")
    expected = np.concatenate([counts, [0, 0]]) + 10 * np.concatenate([[0, 0], counts])
    assert_close(found, np.repeat(expected[:, None], 3, axis=1))


def test_b4_slices_of_a_convolution_and_of_heads(rng):
    filters = tether.Weight(rng.normal(size=(2, 2, 3, 4)).astype("float32"), name="filters")
    one = tether.tie(layers.Conv2D(1, 2), kernel=filters[..., :1])
    three = tether.tie(layers.Conv2D(3, 2), kernel=filters[..., 1:])
    plain = layers.Conv2D(4, 2)
    x = rng.normal(size=(2, 3, 3, 3)).astype("float32")
    plain.build(x.shape)
    plain.kernel.assign(filters.numpy())
    assert_close(np.concatenate([numpy(one(x)), numpy(three(x))], axis=-1), plain(x))

    heads = tether.Weight(rng.normal(size=(4, 2, 3)).astype("float32"), name="heads")
    single = [
        tether.tie(layers.EinsumDense("abc,cd->abd", output_shape=(None, 3)), kernel=heads[:, head])
        for head in range(2)
    ]
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    for head, layer in enumerate(single):
        assert_close(layer(x), x @ heads.numpy()[:, head])


# --------------------------------------------------------------------------- B5


@keras.saving.register_keras_serializable(package="scenarios_b")
def logits_by_matmul(h, table):
    return keras.ops.matmul(h, keras.ops.transpose(table))


@keras.saving.register_keras_serializable(package="scenarios_b")
def logits_by_einsum(h, table):
    return keras.ops.einsum("bd,vd->bv", h, table)


HEADS = {
    "dense": lambda table: tether.tie(layers.Dense(6, use_bias=False, name="head"), kernel=table.T),
    "matmul": lambda table: tether.Lambda(logits_by_matmul, table=table, name="head"),
    "einsum": lambda table: tether.Lambda(logits_by_einsum, table=table, name="head"),
    "einsum_dense": lambda table: tether.tie(
        layers.EinsumDense("bd,dv->bv", output_shape=6, name="head"), kernel=table.T
    ),
}


def tied_logits(head):
    table = tether.Weight(name="table")
    x = keras.Input((4,), dtype="int32")
    embed = tether.tie(layers.Embedding(6, 3, name="embed"), embeddings=table)
    h = layers.GlobalAveragePooling1D()(embed(x))
    return keras.Model(x, HEADS[head](table)(h)), table


def logits(ids, E):
    return E[ids].mean(axis=1) @ E.T


def logits_gradient(ids, t, E):
    h = E[ids].mean(axis=1)
    dy = 2 * (h @ E.T - t) / t.size
    gradient = dy.T @ h
    np.add.at(gradient, ids, (dy @ E)[:, None, :] / ids.shape[1])
    return gradient


@pytest.mark.parametrize("head", list(HEADS))
def test_b5_tied_logits_are_live_and_train(head, rng):
    model, table = tied_logits(head)
    ids, t = rng.integers(0, 6, (5, 4)).astype("int32"), rng.normal(size=(5, 6)).astype("float32")
    assert len(model.weights) == 1 and model.count_params() == 18
    for _ in range(2):
        E = rng.normal(size=(6, 3)).astype("float32")
        table.assign(E)
        assert_close(model.predict(ids, verbose=0), logits(ids, E))
    step(model, ids, t)
    assert_close(table.value, E - 0.1 * logits_gradient(ids, t, E))


@pytest.mark.parametrize("head", list(HEADS))
def test_b5_tied_logits_stay_tied_when_reloaded(head, rng, tmp_path):
    model, _ = tied_logits(head)
    loaded = reload(model, tmp_path)
    ids, t = rng.integers(0, 6, (5, 4)).astype("int32"), rng.normal(size=(5, 6)).astype("float32")
    assert len(loaded.weights) == 1 and loaded.count_params() == 18
    assert np.array_equal(numpy(loaded(ids)), numpy(model(ids)))
    E = rng.normal(size=(6, 3)).astype("float32")
    loaded.weights[0].assign(E)
    assert_close(loaded(ids), logits(ids, E))
    error = lambda: keras.ops.mean(keras.ops.square(keras.ops.subtract(loaded(ids), t)))  # noqa: E731
    assert_close(gradients(error, loaded.weights)[1][0], logits_gradient(ids, t, E))


def test_b5_a_model_that_exists_is_tied_to_its_table(rng, tmp_path):
    x = keras.Input((4,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(layers.Embedding(6, 3, name="embed")(x))
    model = keras.Model(x, layers.Dense(6, name="head")(h))
    E = numpy(model.get_layer("embed").embeddings).copy()
    tether.tie(model.get_layer("head"), kernel=tether.weight_of(model.get_layer("embed"), "embeddings").T)
    ids = rng.integers(0, 6, (5, 4)).astype("int32")
    assert_close(model.predict(ids, verbose=0), logits(ids, E))
    loaded = reload(model, tmp_path)
    E = rng.normal(size=(6, 3)).astype("float32")
    loaded.get_layer("embed").embeddings.assign(E)
    assert_close(loaded.predict(ids, verbose=0), logits(ids, E))


# --------------------------------------------------------------------------- B6


@keras.saving.register_keras_serializable(package="scenarios_b")
def affine(x, scale, shift):
    return x * scale + shift


@keras.saving.register_keras_serializable(package="scenarios_b")
def in_training_only(x, scale, training=None):
    return x * scale if training else x


def affine_model(rng):
    scale = tether.Weight(rng.normal(size=3).astype("float32"), name="scale")
    shift = tether.Weight(rng.normal(size=3).astype("float32"), name="shift")
    x = keras.Input((3,))
    inner = tether.Lambda(affine, scale=scale, shift=shift, name="inner")
    outer = tether.Lambda(affine, scale=scale, shift=2.0 * shift, name="outer")
    return keras.Model(x, outer(inner(x))), scale, shift


def test_b6_a_function_with_weights_is_tracked_and_trained(rng):
    model, scale, shift = affine_model(rng)
    s, b = scale.numpy(), shift.numpy()
    x, t = rng.normal(size=(2, 4, 3)).astype("float32")
    assert {id(v) for v in model.weights} == {id(scale.variable), id(shift.variable)}
    assert len(model.weights) == 2 and model.count_params() == 6
    assert_close(model(x), (x * s + b) * s + 2 * b)
    dy = 2 * ((x * s + b) * s + 2 * b - t) / t.size
    step(model, x, t)
    assert_close(scale.value, s - 0.1 * (dy * (2 * x * s + b)).sum(axis=0))
    assert_close(shift.value, b - 0.1 * (dy * (s + 2)).sum(axis=0))


def test_b6_a_function_with_weights_is_saved_and_loaded(rng, tmp_path):
    model, scale, _ = affine_model(rng)
    x = rng.normal(size=(4, 3)).astype("float32")
    step(model, x, x, keras.optimizers.Adam(0.1))
    loaded = reload(model, tmp_path)
    assert len(loaded.weights) == 2
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))
    assert slot_count(loaded.optimizer) == 4
    before = scale.numpy()
    tether.weight_of(loaded, "inner/scale").assign(np.zeros(3, "float32"))
    shift = tether.weight_of(loaded, "inner/shift").numpy()
    assert_close(loaded(x), np.tile(2 * shift, (4, 1)))
    assert np.array_equal(scale.numpy(), before)


def test_b6_a_function_in_a_submodel_shares_with_a_layer(rng, tmp_path):
    scale = tether.Weight(np.array([2.0, 3.0, 4.0], "float32"), name="scale")
    norm = tether.tie(layers.LayerNormalization(name="norm"), gamma=scale)
    inner = keras.Sequential([keras.Input((3,)), norm], name="inner")
    x = keras.Input((3,))
    model = keras.Model(x, tether.Lambda(affine, scale=scale, shift=1.0 + scale, name="f")(inner(x)))
    assert len(model.weights) == 2 and model.count_params() == 6
    batch = rng.normal(size=(4, 3)).astype("float32")
    normal = (batch - batch.mean(axis=1, keepdims=True)) / np.sqrt(batch.var(axis=1, keepdims=True) + 1e-3)
    for each in (model, reload(model, tmp_path)):
        assert_close(each(batch), normal * np.array([4, 9, 16]) + np.array([3, 4, 5]), 1e-4)
        assert each.count_params() == 6


def test_b6_a_function_is_told_of_training(rng):
    layer = tether.Lambda(in_training_only, scale=tether.Weight(np.array(3.0, "float32"), name="s"))
    x = np.ones((2, 2), "float32")
    assert np.array_equal(numpy(layer(x, training=True)), 3 * x)
    assert np.array_equal(numpy(layer(x, training=False)), x)


# --------------------------------------------------------------------------- B7


@every_kind
def test_b7_the_config_carries_the_tie(kind, rng):
    weight = tether.Weight(name="shared")
    x = kind.symbol()
    first, second = (tether.tie(kind.make(), {kind.path: weight}) for _ in range(2))
    model = keras.Model(x, [apply(first, x), apply(second, x)])
    config = json.loads(json.dumps(model.get_config()))
    copy = keras.Model.from_config(config)
    assert len(copy.weights) == len(model.weights)
    copy.set_weights(model.get_weights())
    one, two = copy.layers[1:]
    stored = tether.weight_of(one, kind.path)
    assert tether.weight_of(two, kind.path) is stored and stored is not weight
    batch = kind.inputs(rng)
    for mine, theirs in zip(copy(batch), model(batch), strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs))


def test_b7_a_weight_passed_to_a_constructor_is_in_the_config(rng, tmp_path):
    table = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="table")
    x = keras.Input((3,))
    model = keras.Model(x, [Bilinear(table, name="one")(x), Bilinear(table, name="two")(x)])
    assert len(model.weights) == 1
    loaded = reload(model, tmp_path)
    assert len(loaded.weights) == 1
    assert loaded.get_layer("one").table is loaded.get_layer("two").table
    batch = rng.normal(size=(2, 3)).astype("float32")
    W = rng.normal(size=(4, 3)).astype("float32")
    loaded.get_layer("one").table.assign(W)
    for y in loaded(batch):
        assert_close(y, batch @ W.T)


def test_b7_a_config_of_a_built_layer_carries_it_too(rng):
    layer = layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5))
    layer.build((None, 4))
    weight = tether.weight_of(layer, "kernel")
    other = tether.tie(layers.Dense(4), kernel=0.5 * weight.T)
    other.build((None, 3))
    with tether.sharing():
        one = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
        two = type(other).from_config(json.loads(json.dumps(other.get_config())))
    one.build((None, 4))
    two.build((None, 3))
    W = rng.normal(size=(4, 3)).astype("float32")
    one.kernel.assign(W)
    assert np.array_equal(numpy(two.kernel), 0.5 * W.T)
    assert float(numpy(sum(one.losses))) == pytest.approx(0.5 * float((W * W).sum()), rel=1e-5)


# --------------------------------------------------------------------------- B8


@pytest.mark.parametrize("first", ["encode", "decode"])
def test_b8_the_first_that_builds_gives_shape_and_start(first, rng):
    start = lambda: keras.initializers.RandomNormal(seed=3)  # noqa: E731
    codec = tether.Weight(name="codec")
    options = {"encode": {}, "decode": {}}
    options[first] = {"kernel_initializer": start()}
    encode = tether.tie(layers.Dense(3, **options["encode"]), kernel=codec)
    decode = tether.tie(layers.Dense(5, **options["decode"]), kernel=codec.T)
    assert codec.shape is None and not codec.is_built
    shapes = {"encode": (encode, (None, 5)), "decode": (decode, (None, 3))}
    layer, shape = shapes.pop(first)
    layer.build(shape)
    ((other, shape),) = shapes.values()
    other.build(shape)

    plain = layers.Dense(3 if first == "encode" else 5, kernel_initializer=start())
    plain.build((None, 5) if first == "encode" else (None, 3))
    expected = numpy(plain.kernel) if first == "encode" else numpy(plain.kernel).T
    assert codec.shape == (5, 3)
    assert np.array_equal(codec.numpy(), expected)
    assert np.array_equal(numpy(decode.kernel), expected.T)


@every_kind
def test_b8_weight_of_a_layer_that_is_not_built(kind, rng):
    first, second = kind.make(), kind.make()
    weight = tether.weight_of(first, kind.path)
    tether.tie(second, {kind.path: weight})
    assert not weight.is_built
    x = kind.symbol()
    # The one that ties builds before the one that was tied to.
    y = apply(second, x)
    model = keras.Model(x, [apply(first, x), y])
    batch = kind.inputs(rng)
    twin, *_ = plain_twin(kind, model, first, second)
    assert len(model.weights) == len(twin.weights) - 1
    for mine, theirs in zip(model(batch), twin(batch), strict=True):
        assert_close(mine, theirs)


def test_b8_everything_is_built_by_fit(rng):
    codec = Codec(rng)
    model = keras.Sequential([codec.encode, codec.decode])
    assert not model.built
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(codec.x, codec.t, batch_size=4, verbose=0)
    assert len(model.weights) == 3
    codec.start()
    step(model, codec.x, codec.t)
    assert_close(codec.codec.value, codec.W - 0.1 * sum(codec.parts()))


def test_b8_saved_before_it_is_built(rng, tmp_path):
    codec = Codec(rng)
    with pytest.warns(UserWarning, match="not yet been built"):
        loaded = reload(keras.Sequential([codec.encode, codec.decode]), tmp_path)
    loaded.build((None, 5))
    assert len(loaded.weights) == 3
    loaded.layers[0].kernel.assign(codec.W)
    assert np.array_equal(numpy(loaded.layers[1].kernel), codec.W.T)
    assert not codec.codec.is_built


def test_b8_a_path_to_a_layer_that_build_makes(rng):
    weight = tether.Weight(name="query")
    attention = tether.tie(layers.MultiHeadAttention(2, 2), {"query/kernel": weight, "key/kernel": weight})
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    attention(x, x)
    assert weight.shape == (4, 2, 2) and len(attention.weights) == 7
    plain = layers.MultiHeadAttention(2, 2)
    plain.build(x.shape, x.shape)
    plain.set_weights([np.array(numpy(v)) for v in untied_values(attention)])
    assert_close(attention(x, x), plain(x, x))


def untied_values(attention):
    dense = [attention.query_dense, attention.key_dense, attention.value_dense, attention.output_dense]
    return [value for each in dense for value in (each.kernel, each.bias)]


def test_b8_a_tie_that_nothing_meets_is_an_error(rng):
    layer = tether.tie(layers.Dense(3, name="d"), kernell=tether.Weight((4, 3)))
    with pytest.raises(tether.TetherError, match="Did you mean 'kernel'"):
        layer.build((None, 4))


# --------------------------------------------------------------------------- B9


def test_b9_freezing_the_decoder_leaves_the_encoder(rng):
    codec = Codec(rng)
    model = codec.model()
    codec.decode.trainable = False
    assert codec.encode.trainable and codec.encode.kernel.trainable and codec.codec.trainable
    trainable = [codec.codec.variable, codec.encode.bias]
    assert [id(v) for v in model.trainable_variables] == [id(v) for v in trainable]
    assert [v is codec.decode.bias for v in model.non_trainable_variables] == [True]


def test_b9_each_counts_the_shared_weight_and_its_own(rng):
    codec = Codec(rng)
    model = codec.model()
    assert codec.encode.count_params() == 15 + 3
    assert codec.decode.count_params() == 15 + 5
    assert model.count_params() == 15 + 3 + 5
    assert not any(below is codec.encode for below in codec.decode._flatten_layers())
    assert not any(below is codec.decode for below in codec.encode._flatten_layers())


def test_b9_encoder_and_decoder_models_do_not_own_each_other(rng):
    table = tether.Weight(name="table")
    encoder = keras.Sequential(
        [keras.Input((5,)), tether.tie(layers.Dense(3), kernel=table), layers.Dense(3)], name="encoder"
    )
    decoder = keras.Sequential([keras.Input((3,)), tether.tie(layers.Dense(5), kernel=table.T)], name="decoder")
    assert decoder.count_params() == 15 + 5
    assert encoder.count_params() == 15 + 3 + 9 + 3
    decoder.trainable = False
    assert len(encoder.trainable_variables) == 4
    # The encoder alone: a step trains the weight that the frozen decoder uses.
    x, t = rng.normal(size=(4, 5)).astype("float32"), rng.normal(size=(4, 3)).astype("float32")
    W = table.numpy()
    step(encoder, x, t)
    assert not np.array_equal(table.numpy(), W)
    assert np.array_equal(numpy(decoder.layers[0].kernel), table.numpy().T)


def test_b9_mutual_references_end(rng, tmp_path):
    one, two = layers.Dense(3, name="one"), layers.Dense(3, name="two")
    model = keras.Sequential([keras.Input((3,)), one, two])
    tether.tie(two, kernel=tether.weight_of(one, "kernel").T)
    tether.tie(one, bias=tether.weight_of(two, "bias"))
    assert one.count_params() == two.count_params() == model.count_params() == 12
    one.trainable = False
    assert one.trainable_variables == []
    assert len(two.trainable_variables) == len(model.trainable_variables) == 2
    assert {id(v) for v in two.trainable_variables} == {id(v) for v in model.trainable_variables}
    x = rng.normal(size=(2, 3)).astype("float32")
    W, b = (numpy(v) for v in (one.kernel, one.bias))
    b = b + rng.normal(size=3).astype("float32")
    two.bias.assign(b)
    for each in (model, reload(model, tmp_path)):
        assert_close(each(x), (x @ W + b) @ W.T + b)
        assert each.count_params() == 12


# --------------------------------------------------------------------------- B10


@pytest.mark.parametrize("when", ["before the tie", "before build", "after build"])
@pytest.mark.parametrize("order", ["encode first", "decode first"])
@pytest.mark.parametrize("frozen", ["encode", "decode"])
def test_b10_a_frozen_use_passes_no_gradient(frozen, order, when, rng):
    codec = Codec(rng)
    if when == "before the tie":
        codec.encode, codec.decode = layers.Dense(3, name="encode"), layers.Dense(5, name="decode")
        getattr(codec, frozen).trainable = False
        tether.tie(codec.encode, kernel=codec.codec)
        tether.tie(codec.decode, kernel=codec.codec.T)
    if when == "before build":
        getattr(codec, frozen).trainable = False
    codec.decode.build((None, 3)) if order == "decode first" else codec.encode.build((None, 5))
    model = codec.model()
    if when == "after build":
        getattr(codec, frozen).trainable = False

    through_encode, through_decode = codec.parts()
    expected = through_decode if frozen == "encode" else through_encode
    assert codec.codec.trainable and len(model.trainable_variables) == 2
    _, (found,) = gradients(codec.loss, [codec.codec.variable])
    assert_close(found, expected)
    assert not getattr(codec, frozen).bias.trainable


@pytest.mark.parametrize("frozen", ["encode", "decode"])
def test_b10_training_follows_the_other_use_only(frozen, rng, tmp_path):
    codec = Codec(rng)
    model = codec.model()
    getattr(codec, frozen).trainable = False
    through_encode, through_decode = codec.parts()
    expected = codec.W - 0.1 * (through_decode if frozen == "encode" else through_encode)
    loaded, clone = reload(model, tmp_path), keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for each in (model, loaded, clone):
        step(each, codec.x, codec.t)
        assert_close(each.get_layer("encode").kernel, expected)
        assert np.array_equal(numpy(each.get_layer("decode").kernel), numpy(each.get_layer("encode").kernel).T)
        bias = {"encode": codec.b, "decode": codec.c}[frozen]
        assert np.array_equal(numpy(each.get_layer(frozen).bias), bias)


def test_b10_frozen_by_a_frozen_submodel(rng):
    codec = Codec(rng)
    decoder = keras.Sequential([keras.Input((3,)), codec.decode], name="decoder")
    model = keras.Sequential([keras.Input((5,)), codec.encode, decoder])
    codec.start()
    decoder.trainable = False
    assert len(model.trainable_variables) == 2
    step(model, codec.x, codec.t)
    assert_close(codec.codec.value, codec.W - 0.1 * codec.parts()[0])
    decoder.trainable = True
    codec.start()
    step(model, codec.x, codec.t)
    assert_close(codec.codec.value, codec.W - 0.1 * sum(codec.parts()))


def test_b10_all_uses_frozen_means_no_slot_and_no_decay(rng):
    codec = Codec(rng)
    x = keras.Input((5,))
    model = keras.Model(x, layers.Dense(2)(codec.decode(codec.encode(x))))
    codec.start()
    codec.encode.trainable = codec.decode.trainable = False
    assert not codec.codec.trainable
    assert len(model.trainable_variables) == 2 and len(model.non_trainable_variables) == 3
    step(model, codec.x, codec.t[:, :2], keras.optimizers.AdamW(0.1, weight_decay=0.5))
    assert slot_count(model.optimizer) == 4
    assert np.array_equal(codec.codec.numpy(), codec.W)
    codec.encode.trainable = True
    assert codec.codec.trainable and len(model.trainable_variables) == 4


@every_kind
def test_b10_every_kind_of_layer_freezes_its_own_use(kind, rng):
    model, first, second = kind.pair()
    weight = tether.weight_of(first, kind.path)
    tether.tie(second, {kind.path: weight})
    batch = kind.inputs(rng)
    twin, one, two = plain_twin(kind, model, first, second)
    _, parts = gradients(lambda: loss(twin(batch)), [kind.read(one), kind.read(two)])
    for frozen, left in ((first, parts[1]), (second, parts[0])):
        frozen.trainable = False
        _, (found,) = gradients(lambda: loss(model(batch)), [weight.variable])
        assert_close(found, left, 1e-4)
        assert [v is weight.variable for v in model.trainable_variables].count(True) == 1
        frozen.trainable = True
    first.trainable = second.trainable = False
    assert not weight.trainable and not weight.variable.trainable and model.trainable_variables == []
    first.trainable = True
    assert weight.trainable and weight.variable.trainable


def test_b10_one_attribute_of_a_layer_can_be_frozen(rng):
    codec = Codec(rng)
    codec.model()
    codec.decode.kernel.trainable = False
    _, (found, bias) = gradients(codec.loss, [codec.codec.variable, codec.decode.bias])
    assert_close(found, codec.parts()[0])
    assert np.abs(bias).max() > 0


# --------------------------------------------------------------------------- B11


def cloned(model):
    return keras.models.clone_model(model)


def from_config(model):
    return type(model).from_config(model.get_config())


def through_json(model):
    return keras.models.model_from_json(model.to_json())


def cloned_layer_by_layer(model):
    return keras.models.clone_model(model, clone_function=lambda layer: type(layer).from_config(layer.get_config()))


COPIES = [(make, copy) for make in SAVED for copy in (cloned, from_config)]
COPIES += [(make, copy) for make in (autoencoder, attentions) for copy in (through_json, cloned_layer_by_layer)]


@pytest.mark.parametrize(("make", "copy"), COPIES, ids=lambda function: function.__name__)
def test_b11_a_copy_is_tied_within_itself(make, copy, rng):
    model, x, _, count, names = make(rng)
    twins = [copy(model), copy(model)]
    values = model.get_weights()
    for twin in twins:
        twin(x)
        assert len(twin.weights) == count
        assert len(stored_behind(twin, names)) == 1
        twin.set_weights(values)
        assert np.array_equal(numpy(twin(x)), numpy(model(x)))
    everything = [model, *twins]
    assert len({id(v) for each in everything for v in each.weights}) == 3 * count
    stored_behind(twins[0], names)[0].assign(0.0 * stored_behind(model, names)[0])
    for each in (model, twins[1]):
        for mine, theirs in zip(each.get_weights(), values, strict=True):
            assert np.array_equal(mine, theirs)
    changed = tether.weight_of(twins[0], names[-1]).value
    assert np.array_equal(numpy(changed), np.zeros(changed.shape))


def test_b11_a_copy_adds_no_use_to_the_original(rng):
    codec = Codec(rng)
    model = codec.model()
    clone = keras.models.clone_model(model)
    assert len(codec.codec.uses) == 2
    other = tether.weight_of(clone.get_layer("encode"), "kernel")
    assert other is not codec.codec and other.uid != codec.codec.uid and other.origin == codec.codec.origin
    assert len(other.uses) == 2
    clone.get_layer("encode").trainable = clone.get_layer("decode").trainable = False
    assert codec.codec.trainable and not other.trainable


def test_b11_nested_models_clone_recursively(rng):
    model, x, _, count, names = two_submodels(rng)
    clone = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
    )
    clone.set_weights(model.get_weights())
    assert len(clone.weights) == count and len(stored_behind(clone, names)) == 1
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    assert np.array_equal(numpy(clone(x)), numpy(model(x)))


def test_b11_two_calls_do_not_share_unless_asked(rng):
    codec = Codec(rng)
    codec.model()
    configs = codec.encode.get_config(), codec.decode.get_config()
    cls = type(codec.encode)
    apart = [cls.from_config(config) for config in configs]
    with tether.sharing():
        together = [cls.from_config(config) for config in configs]
    for encode, decode in (apart, together):
        encode.build((None, 5))
        decode.build((None, 3))
        encode.kernel.assign(codec.W)
    assert not np.array_equal(numpy(apart[1].kernel), codec.W.T)
    assert np.array_equal(numpy(together[1].kernel), codec.W.T)
    assert len(codec.codec.uses) == 2


def test_b11_a_trained_clone_leaves_the_original(rng):
    codec = Codec(rng)
    model = codec.model()
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    step(clone, codec.x, codec.t)
    assert_close(clone.get_layer("encode").kernel, codec.W - 0.1 * sum(codec.parts()))
    assert np.array_equal(codec.codec.numpy(), codec.W)


# --------------------------------------------------------------------------- B16


def elements(file):
    """How many numbers an HDF5 file stores: of the layers, and of the optimizer."""
    import h5py

    found = {"layers": 0, "optimizer": 0}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found["optimizer" if name.startswith("optimizer") else "layers"] += item.size

    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
    return found


@pytest.mark.parametrize("make", SAVED, ids=lambda make: make.__name__)
def test_b16_a_keras_file_holds_a_shared_weight_once(make, rng, tmp_path):
    model, *_ = make(rng)
    compile_as_if_trained(model, rng)
    model.save(str(tmp_path / "m.keras"))
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        found = elements(io.BytesIO(archive.read("model.weights.h5")))
    assert found["layers"] == model.count_params() == sum(v.size for v in model.get_weights())
    # Two moments of each, the step and the learning rate.
    assert found["optimizer"] == 2 * model.count_params() + 2


@pytest.mark.parametrize("make", SAVED, ids=lambda make: make.__name__)
def test_b16_a_weights_file_holds_a_shared_weight_once(make, rng, tmp_path):
    model, *_ = make(rng)
    model.save_weights(str(tmp_path / "m.weights.h5"))
    assert elements(tmp_path / "m.weights.h5")["layers"] == model.count_params()


def test_b16_a_tied_file_is_smaller_by_the_shared_weight(rng, tmp_path):
    codec = Codec(rng)
    codec.model().save_weights(str(tmp_path / "m.weights.h5"))
    plain = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Dense(5)])
    plain.save_weights(str(tmp_path / "p.weights.h5"))
    assert elements(tmp_path / "p.weights.h5")["layers"] - elements(tmp_path / "m.weights.h5")["layers"] == 15


def large_codec(rng):
    codec = Codec(rng, inputs=200, code=100)
    return codec.model(), codec


def test_b16_a_pickle_holds_a_shared_weight_once(rng):
    model, _ = large_codec(rng)
    size = len(pickle.dumps(model))
    # 4 bytes a number; the rest of the pickle (config, HDF5 structure) is less than half of a second kernel.
    assert 4 * 20300 <= size < 4 * 20300 + 40000


def test_b16_the_backends_own_format_holds_a_shared_weight_once(rng, tmp_path):
    model, _ = large_codec(rng)
    if BACKEND == "torch":
        import torch

        torch.save(model.state_dict(), str(tmp_path / "m.pt"))
        counts = [value.numel() for value in torch.load(str(tmp_path / "m.pt")).values()]
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        path = tf.train.Checkpoint(model=model).write(str(tmp_path / "m.ckpt"))
        entries = tf.train.load_checkpoint(path).get_variable_to_shape_map().items()
        counts = [int(np.prod(shape)) for name, shape in entries if "OBJECT_GRAPH" not in name and shape]
    else:
        import jax

        model.compile("sgd", "mse")
        counts = [leaf.size for leaf in jax.tree_util.tree_leaves(model.get_state_tree()["trainable_variables"])]
    assert sorted(counts) == [100, 200, 20000]

"""A tie is in the config that is written, or it is recorded where it will be, or saving is refused."""

import copy
import os
import pickle

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy
from tether.errors import LostTie
from tether.layers.records.verification import unrecorded

pytestmark = pytest.mark.spread

layers = keras.layers


@keras.saving.register_keras_serializable("recorded")
class Block(layers.Layer):
    """Makes two layers of its own, one in a list, which its config does not hold."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, name="inner")
        self.more = [layers.Dense(4, name="more")]

    def build(self, shape):
        self.inner.build(shape)
        self.more[0].build(shape)

    def call(self, x):
        return self.inner(x) + self.more[0](x)

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("recorded")
class Outer(layers.Layer):
    """A block in a block."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block(name="block")

    def build(self, shape):
        self.block.build(shape)

    def call(self, x):
        return self.block(x)


def nested():
    x = keras.Input((4,))
    return keras.Model(x, Block(name="block")(x), name="nested")


# What is in the model, the layer on which the tie is made, and the weight's name.
PLACES = {
    "cell of LSTM": (lambda: layers.LSTM(2), (3, 4), lambda made: made.cell, "kernel"),
    "cell of GRU": (lambda: layers.GRU(2), (3, 4), lambda made: made.cell, "recurrent_kernel"),
    "cell of SimpleRNN": (lambda: layers.SimpleRNN(2), (3, 4), lambda made: made.cell, "kernel"),
    "cell of ConvLSTM": (lambda: layers.ConvLSTM1D(2, 2), (3, 5, 4), lambda made: made.cell, "kernel"),
    "forward": (lambda: layers.Bidirectional(layers.LSTM(2)), (3, 4), lambda made: made.forward_layer, "cell/kernel"),
    "forward's cell": (
        lambda: layers.Bidirectional(layers.GRU(2)),
        (3, 4),
        lambda made: made.forward_layer.cell,
        "kernel",
    ),
    "backward's cell": (
        lambda: layers.Bidirectional(layers.LSTM(2)),
        (3, 4),
        lambda made: made.backward_layer.cell,
        "kernel",
    ),
    "inner": (lambda: Block(), (4,), lambda made: made.inner, "kernel"),
    "in a list": (lambda: Block(), (4,), lambda made: made.more[0], "bias"),
    "block in a block": (lambda: Outer(), (4,), lambda made: made.block.inner, "kernel"),
    "in TimeDistributed": (lambda: layers.TimeDistributed(Block()), (3, 4), lambda made: made.layer.inner, "kernel"),
    "in a nested model": (nested, (4,), lambda made: made.get_layer("block").inner, "kernel"),
    "query of attention": (
        lambda: layers.MultiHeadAttention(2, 2),
        (3, 4),
        lambda made: made.query_dense,
        "kernel",
    ),
}
each_place = pytest.mark.parametrize("place", list(PLACES))


def made_at(place):
    """A model whose tie is made on an inner layer, and the reads of both uses of the weight."""
    make, shape, inner_of, name = PLACES[place]
    layer = make()
    layer.name = "layer"
    x = keras.Input(shape)
    y = layer(x, x) if isinstance(layer, layers_of_two) else layer(x)
    weight = tether.weight_of(inner_of(layer), name)
    free = tether.Lambda(read_sum, name="free", w=weight)
    model = keras.Model(x, [y, free(x)])

    def reads(model):
        return numpy(model.get_layer("free").weight_w.value), read(inner_of(model.get_layer("layer")), name)

    return model, reads


layers_of_two = (layers.MultiHeadAttention,)


def read(layer, name):
    for part in name.split("/"):
        layer = getattr(layer, part)
    return numpy(layer.value)


@keras.saving.register_keras_serializable("recorded")
def read_sum(x, w):
    return keras.ops.sum(w) + 0 * keras.ops.sum(x)


def assert_tied(model, reads):
    model.get_layer("free").weight_w.assign(np.random.default_rng(3).normal(size=reads(model)[0].shape))
    one, two = reads(model)
    np.testing.assert_array_equal(one, two)


@each_place
def test_the_file_that_save_model_writes_holds_the_tie(place, tmp_path):
    model, reads = made_at(place)
    x = np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")
    before = [numpy(y) for y in model(x)]
    tether.files.save_model(model, tmp_path / "m.keras")
    for load in (keras.saving.load_model, tether.files.load_model):
        made = load(tmp_path / "m.keras")
        for one, other in zip(before, made(x), strict=True):
            np.testing.assert_allclose(one, numpy(other), rtol=1e-5, atol=1e-6)
        assert made.count_params() == model.count_params()
        assert_tied(made, reads)
    assert not unrecorded(model)
    model.save(tmp_path / "again.keras")  # it is recorded for good
    assert_tied(keras.saving.load_model(tmp_path / "again.keras"), reads)


COPIES = {
    "save": lambda model, path: model.save(path),
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.dumps(model),
}


@each_place
@pytest.mark.parametrize("way", list(COPIES))
def test_keras_own_ways_keep_the_tie_or_are_refused(place, way, tmp_path):
    model, reads = made_at(place)
    path = tmp_path / "m.keras"
    try:
        made = COPIES[way](model, path)
    except LostTie as error:
        assert "would lose a tie" in str(error) and "tether.tie(" in str(error)
        return
    if way == "save":
        made = keras.saving.load_model(path)
    elif way == "pickle":
        made = pickle.loads(made)
    assert_tied(made, reads)


@each_place
def test_check_finds_what_a_clone_would_lose_and_its_mend_records_it(place):
    model, reads = made_at(place)
    found = tether.check(model, rules=["unrecorded-tie"])
    try:
        clone = keras.models.clone_model(model)
        kept = clone.count_params() == model.count_params()
    except tether.TetherError:
        kept = False
    assert bool(found) or kept, "a clone would be untied, and nothing says so"
    if found:
        exec(found[0].mend, {"model": model, "tether": tether})
        assert not tether.check(model, rules=["unrecorded-tie"])
        assert_tied(keras.models.clone_model(model), reads)


def test_what_cannot_be_recorded_further_out_changes_nothing(tmp_path):
    model, _ = made_at("inner")
    block = model.get_layer("layer")
    strength = tether.weights.Argument("strength", default=1.0)
    tether.tie(block.more[0], kernel=tether.Weight((4, 4), "ones", name="v") * strength)
    kinds = [type(layer) for layer in (block, block.inner, block.more[0])]
    with pytest.raises(LostTie):
        tether.files.save_model(model, tmp_path / "m.keras")
    assert not os.listdir(tmp_path)
    assert [type(layer) for layer in (block, block.inner, block.more[0])] == kinds
    assert len(unrecorded(model)) == 2

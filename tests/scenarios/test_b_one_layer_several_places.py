"""Row B12 of the scenarios: one layer inside and outside a sub-model, in two sub-models, in a wrapper and alone."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

layers = keras.layers


def shared():
    return layers.Dense(4, activation="tanh", name="shared")


def inside_and_outside():
    layer, x, i = shared(), keras.Input((4,)), keras.Input((4,))
    part = keras.Model(i, layers.Dense(4, name="own")(layer(i)), name="part")
    return keras.Model(x, [layer(part(x)), part(layer(layer(x)))])


def in_a_graph_and_a_stack():
    layer, x, i = shared(), keras.Input((4,)), keras.Input((4,))
    graph = keras.Model(i, layers.Dense(4, name="first")(layer(i)), name="graph")
    parts = [keras.Input((4,)), layers.Dense(4, name="second"), layer, layers.Dense(4, name="third")]
    stack = keras.Sequential(parts, name="stack")
    return keras.Model(x, [stack(graph(x)), layer(x)])


def in_a_wrapper_and_alone():
    layer, x, y = shared(), keras.Input((3, 4)), keras.Input((4,))
    return keras.Model([x, y], [layers.TimeDistributed(layer)(x), layer(y)])


def alone_first_and_then_in_a_wrapper():
    layer, x = shared(), keras.Input((3, 4))
    return keras.Model(x, layers.TimeDistributed(layer, name="wrapper")(layer(x)))


def a_part_in_two_parts():
    layer, i, j, k, x = shared(), *(keras.Input((4,)) for _ in range(4))
    inner = keras.Model(i, layer(layer(i)), name="inner")
    left = keras.Model(j, layers.Dense(4, name="left_dense")(inner(j)), name="left")
    right = keras.Model(k, inner(layers.Dense(4, name="right_dense")(k)), name="right")
    return keras.Model(x, {"y": right(left(x)), "z": inner(x), "w": layer(x)})


def part_of_one_graph_in_another():
    x = keras.Input((4,))
    hidden = shared()(x)
    code = layers.Dense(2, name="code")(hidden)
    encoder = keras.Model(x, code, name="encoder")
    return keras.Model(x, [layers.Dense(4, name="head")(hidden), encoder(x)])


def tied_as_well():
    codec = tether.Weight(name="codec")
    layer = tether.tie(layers.Dense(3, name="encode"), kernel=codec)
    i, x = keras.Input((4,)), keras.Input((4,))
    part = keras.Model(i, tether.tie(layers.Dense(4, name="decode"), kernel=codec.T)(layer(i)), name="part")
    return keras.Model(x, layer(part(x)))


MODELS = [
    inside_and_outside,
    in_a_graph_and_a_stack,
    in_a_wrapper_and_alone,
    alone_first_and_then_in_a_wrapper,
    a_part_in_two_parts,
    part_of_one_graph_in_another,
    tied_as_well,
]


def batch_of(rng, tensors):
    return [rng.normal(size=(6, *tensor.shape[1:])).astype("float32") for tensor in tensors]


def outputs_of(model, batch):
    return keras.tree.flatten(model(batch if len(batch) > 1 else batch[0]))


def train(model, inputs, targets):
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    targets = keras.tree.pack_sequence_as(model.output, targets)
    model.fit(inputs if len(inputs) > 1 else inputs[0], targets, batch_size=3, epochs=2, shuffle=False, verbose=0)


@pytest.mark.parametrize("make", MODELS)
def test_b12_plain_keras_reads_back_one_layer(make, rng, tmp_path):
    model = make()
    inputs, targets = batch_of(rng, model.inputs), batch_of(rng, model.outputs)
    train(model, inputs, targets)
    path = tmp_path / "model.keras"
    tether.files.save_model(model, path)

    again = keras.saving.load_model(path)

    assert len(again.weights) == len(model.weights)
    assert again.count_params() == model.count_params()
    for mine, theirs in zip(outputs_of(model, inputs), outputs_of(again, inputs), strict=True):
        assert_close(mine, theirs)
    state, restored = model.optimizer.variables, again.optimizer.variables
    assert sorted(tuple(v.shape) for v in restored) == sorted(tuple(v.shape) for v in state)
    fresh = keras.saving.load_model(path, compile=False)
    train(model, inputs, targets)
    train(fresh, inputs, targets)
    for mine, theirs in zip(model.weights, fresh.weights, strict=True):
        assert mine.name.partition("_")[0] == theirs.name.partition("_")[0]
        assert_close(mine, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_b12_tethers_own_reader_reads_it_and_the_copy_saves_again(make, rng, tmp_path):
    model = make()
    inputs = batch_of(rng, model.inputs)
    tether.files.save_model(model, tmp_path / "one.keras")
    again = tether.files.load_model(tmp_path / "one.keras")
    tether.files.save_model(again, tmp_path / "two.keras")
    third = tether.files.load_model(tmp_path / "two.keras")
    for mine, theirs in zip(outputs_of(model, inputs), outputs_of(third, inputs), strict=True):
        assert_close(mine, theirs)
    assert len(third.weights) == len(model.weights)


def test_b12_the_layer_read_back_is_one_object(tmp_path):
    tether.files.save_model(in_a_graph_and_a_stack(), tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    found = again.get_layer("shared")
    assert again.get_layer("graph").get_layer("shared") is found
    assert again.get_layer("stack").get_layer("shared") is found
    before = numpy(found.kernel).copy()
    again.get_layer("stack").get_layer("shared").kernel.assign(before + 1)
    assert np.allclose(numpy(again.get_layer("graph").get_layer("shared").kernel), before + 1)


@keras.saving.register_keras_serializable(package="scenarios_b12")
class Around(layers.Layer):
    """Holds a layer that it is given, and says so in its config."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def build(self, shape):
        if not self.inner.built:
            self.inner.build(shape)

    def call(self, x):
        return 2.0 * self.inner(x)

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        config["inner"] = keras.saving.deserialize_keras_object(config["inner"])
        return cls(**config)


@keras.saving.register_keras_serializable(package="scenarios_b12")
class Forgetful(Around):
    """Makes a layer of its own when it is read."""

    def get_config(self):
        return layers.Layer.get_config(self)

    @classmethod
    def from_config(cls, config):
        return cls(shared(), **config)


def test_b12_in_a_layer_of_ones_own_and_alone(rng, tmp_path):
    layer, x = shared(), keras.Input((4,))
    model = keras.Model(x, [Around(layer, name="around")(x), layer(x)])
    inputs = batch_of(rng, model.inputs)
    tether.files.save_model(model, tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("around").inner is again.get_layer("shared")
    for mine, theirs in zip(outputs_of(model, inputs), outputs_of(again, inputs), strict=True):
        assert_close(mine, theirs)


def test_b12_what_cannot_come_back_as_one_is_refused_before_anything_is_written(tmp_path):
    layer, x = shared(), keras.Input((4,))
    model = keras.Model(x, [Forgetful(layer, name="around")(x), layer(x)])
    path = tmp_path / "model.keras"
    path.write_bytes(b"the old file")
    with pytest.raises(tether.errors.Unsupported, match=r"'shared'.*several layers.*get_config"):
        tether.files.save_model(model, path)
    assert path.read_bytes() == b"the old file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.keras"]

"""Rows A of the scenarios: a child layer on top of its parent's weights, by `tether.extend`."""

import zipfile

import h5py
import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

layers = keras.layers


def randomize(layer, seed=3):
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape).astype("float32"))


def with_one_more(base):
    """What people write: `super().build()`, and one weight more."""

    @tether.extend
    class Child(base):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=(1,), initializer="ones")

        def call(self, inputs):
            return super().call(inputs) * self.gain

    return Child


def is_unchanged_by_a_refused_build(layer, match, shape=(None, 4)):
    attributes = sorted(vars(layer))
    with pytest.raises(tether.TetherError, match=match) as caught:
        layer.build(shape)
    assert layer.weights == [] and not layer.built and sorted(vars(layer)) == attributes
    return str(caught.value)


# --------------------------------------------------------------------------- A1


PARENTS = {
    "dense": (layers.Dense, {"units": 3}, (4,)),
    "einsum_dense": (layers.EinsumDense, {"equation": "ab,bc->ac", "output_shape": 3, "bias_axes": "c"}, (4,)),
    "embedding": (layers.Embedding, {"input_dim": 5, "output_dim": 3}, (4,)),
    "conv1d": (layers.Conv1D, {"filters": 2, "kernel_size": 2}, (4, 3)),
    "conv2d": (layers.Conv2D, {"filters": 2, "kernel_size": 2}, (4, 4, 3)),
    "conv2d_transpose": (layers.Conv2DTranspose, {"filters": 2, "kernel_size": 2}, (4, 4, 3)),
    "depthwise_conv2d": (layers.DepthwiseConv2D, {"kernel_size": 2}, (4, 4, 3)),
    "separable_conv1d": (layers.SeparableConv1D, {"filters": 2, "kernel_size": 2}, (4, 3)),
}


@pytest.mark.parametrize("parent", list(PARENTS))
@pytest.mark.parametrize("suffix", ["keras", "weights.h5"])
def test_a1_every_weight_of_parent_and_child_round_trips(parent, suffix, tmp_path, rng):
    base, options, shape = PARENTS[parent]
    Child = with_one_more(base)
    model = keras.Sequential([keras.Input(shape), Child(**options)])
    randomize(model)
    path = tmp_path / f"m.{suffix}"
    if suffix == "keras":
        model.save(path)
        loaded = keras.saving.load_model(path, custom_objects={"Child": Child})
    else:
        model.save_weights(path)
        loaded = keras.Sequential([keras.Input(shape), Child(**options)])
        loaded.load_weights(path)
    x = rng.integers(0, 5, (2, *shape)).astype("float32")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        assert a.name == b.name and np.array_equal(numpy(a), numpy(b))
    assert np.array_equal(numpy(model(x)), numpy(loaded(x)))


def test_a1_the_weights_are_in_the_file_by_name(tmp_path):
    model = keras.Sequential([keras.Input((4,)), with_one_more(layers.Dense)(3)])
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive, archive.open("model.weights.h5") as file:
        names = []
        h5py.File(file).visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    assert sorted(name.rsplit("/", 1)[1] for name in names if "/vars/" in name) == ["bias", "gain", "kernel"]


def test_a1_a_child_inside_another_layer_round_trips(tmp_path, rng):
    Child = with_one_more(layers.Dense)
    inner = keras.Sequential([keras.Input((4,)), Child(4)])
    model = keras.Sequential([keras.Input((2, 4)), layers.TimeDistributed(inner)])
    randomize(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"Child": Child})
    x = rng.normal(size=(3, 2, 4)).astype("float32")
    assert np.array_equal(numpy(model(x)), numpy(loaded(x)))


# --------------------------------------------------------------------------- A2


@tether.extend
@keras.saving.register_keras_serializable(package="my_custom_package")
class LayerWithCustomVariable(layers.Dense):
    """The class of Keras's guide to custom saving, without its `save_own_variables` and `load_own_variables`."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.my_variable = keras.Variable(np.random.random((units,)), name="my_variable", dtype="float32")

    def call(self, inputs):
        dense_out = super().call(inputs)
        return dense_out + self.my_variable

    def get_config(self):
        return super().get_config()


def test_a2_the_guides_layer_round_trips_without_save_methods(tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), LayerWithCustomVariable(1)])
    model.compile("sgd", "mse")
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 1)).astype("float32")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert sorted(v.name for v in loaded.weights) == ["bias", "kernel", "my_variable"]
    assert np.array_equal(numpy(model.layers[0].my_variable), numpy(loaded.layers[0].my_variable))
    np.testing.assert_allclose(model.predict(x, verbose=0), loaded.predict(x, verbose=0))
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert_close(a, b, 1e-6)


def test_a2_weights_are_saved_before_the_layer_is_built():
    layer, other = LayerWithCustomVariable(2), LayerWithCustomVariable(2)
    store = {}
    layer.save_own_variables(store)
    other.load_own_variables(store)
    assert np.array_equal(numpy(layer.my_variable), numpy(other.my_variable))


# --------------------------------------------------------------------------- A5


@pytest.mark.parametrize("parent", ["dense", "einsum_dense", "conv1d"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a5_setting_the_parents_kernel_names_the_tie(parent, order):
    base, options, shape = PARENTS[parent]

    @tether.extend
    class Child(base):
        def build(self, input_shape):
            if order == "after":
                super().build(input_shape)
            self.kernel = self.add_weight(name="my_kernel", shape=(4, 3))
            super().build(input_shape)

    message = is_unchanged_by_a_refused_build(Child(**options), "`self.kernel = ...` is not possible", (None, *shape))
    assert "tether.tie(layer, kernel=...)" in message


def test_a5_under_the_parents_own_name_names_the_tie_too():
    @tether.extend
    class Child(layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.kernel = self.add_weight(name="kernel", shape=(4, 3))

    message = is_unchanged_by_a_refused_build(Child(3), "a weight named 'kernel'")
    assert "tether.tie(layer, kernel=...)" in message


def test_a5_the_tie_that_the_message_names_works(rng):
    kernel = tether.Weight(name="mine")
    layer = tether.tie(with_one_more(layers.Dense)(3), kernel=2.0 * kernel)
    layer.build((None, 4))
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(layer(x), x @ (2.0 * kernel.numpy()))


# --------------------------------------------------------------------------- A6


def test_a6_a_forgotten_build_names_what_is_missing():
    @tether.extend
    class Child(layers.Dense):
        def build(self, input_shape):
            self.gain = self.add_weight(name="gain", shape=(1,))

    message = is_unchanged_by_a_refused_build(
        Child(3), r"the parent's build\(\) was not called; missing: kernel, bias\."
    )
    assert "`super().build(input_shape)` in `Child.build`, which reaches Dense.build" in message


def test_a6_the_missing_weights_follow_the_layers_arguments():
    @tether.extend
    class Child(layers.LayerNormalization):
        def build(self, input_shape):
            self.gain = self.add_weight(name="gain", shape=(1,))

    is_unchanged_by_a_refused_build(Child(), r"missing: gamma, beta\.")
    is_unchanged_by_a_refused_build(Child(center=False), r"missing: gamma\.")


def test_a6_the_parents_sub_layers_count():
    @tether.extend
    class Child(layers.LSTM):
        def build(self, input_shape):
            self.gain = self.add_weight(name="gain", shape=(1,))

    message = is_unchanged_by_a_refused_build(Child(2), "was not called", (None, 3, 4))
    assert "missing: cell/kernel, cell/recurrent_kernel, cell/bias." in message


def test_a6_a_call_meets_the_same_error(rng):
    @tether.extend
    class Child(layers.Dense):
        def build(self, input_shape):
            self.gain = self.add_weight(name="gain", shape=(1,))

    with pytest.raises(tether.TetherError, match=r"was not called; missing: kernel, bias\."):
        Child(3)(rng.normal(size=(2, 4)).astype("float32"))


# --------------------------------------------------------------------------- A7


@pytest.mark.parametrize(
    ("base", "options", "shape", "name"),
    [
        (layers.Dense, {"units": 3}, (None, 4), "kernel"),
        (layers.Dense, {"units": 3}, (None, 4), "bias"),
        (layers.Embedding, {"input_dim": 5, "output_dim": 3}, (None, 4), "embeddings"),
        (layers.BatchNormalization, {}, (None, 4), "moving_mean"),
        (layers.Conv2D, {"filters": 2, "kernel_size": 2}, (None, 4, 4, 3), "kernel"),
    ],
)
@pytest.mark.parametrize("order", ["after", "before"])
def test_a7_a_name_that_the_parent_uses_is_refused_naming_both(base, options, shape, name, order):
    @tether.extend
    class Child(base):
        def build(self, input_shape):
            if order == "after":
                super().build(input_shape)
            self.mine = self.add_weight(name=name, shape=(1,))
            super().build(input_shape)

    message = is_unchanged_by_a_refused_build(Child(**options, name="child"), f"a weight named '{name}'", shape)
    assert f"child/{name}" in message and "Child" in message
    assert ("made by Child" if order == "before" else "Child adds") in message


# --------------------------------------------------------------------------- A8


def test_a8_an_attribute_of_the_parents_config_is_refused_naming_both():
    @tether.extend
    class Child(layers.LayerNormalization):
        def build(self, input_shape):
            super().build(input_shape)
            self.scale = self.add_weight(name="my_scale", shape=(4,))

    message = is_unchanged_by_a_refused_build(Child(), "keeps the weight 'my_scale' in the attribute `scale`")
    assert "`scale` is an argument of LayerNormalization" in message and "self.scale_weight" in message


@pytest.mark.parametrize(
    ("base", "options", "name", "owner"),
    [
        (layers.Dense, {"units": 3}, "units", "Dense"),
        (layers.Dense, {"units": 3}, "kernel_regularizer", "Dense"),
        (layers.BatchNormalization, {}, "momentum", "BatchNormalization"),
        (layers.Dense, {"units": 3}, "activity_regularizer", "Dense"),
        (layers.DepthwiseConv1D, {"kernel_size": 2}, "strides", "DepthwiseConv1D"),
    ],
)
def test_a8_every_argument_of_the_parent_is_kept_from_weights(base, options, name, owner):
    @tether.extend
    class Child(base):
        def build(self, input_shape):
            super().build(input_shape)
            setattr(self, name, self.add_weight(name="mine", shape=(1,)))

    shape = (None, 4, 3) if base is layers.DepthwiseConv1D else (None, 4)
    is_unchanged_by_a_refused_build(Child(**options), f"`{name}` is an argument of {owner}", shape)


def test_a8_the_attribute_that_the_message_proposes_round_trips(tmp_path):
    @tether.extend
    class Child(layers.LayerNormalization):
        def build(self, input_shape):
            super().build(input_shape)
            self.scale_weight = self.add_weight(name="scale", shape=(4,))

    model = keras.Sequential([keras.Input((4,)), Child()])
    randomize(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"Child": Child})
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(a, b)

"""`tether.extend`: a subclass that adds weights to a Keras layer's stores all of them by name, and refuses clashes."""

import copy
import functools
import inspect
import warnings

import h5py
import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy

L = keras.layers
BACKEND = keras.backend.backend()


registered = keras.saving.register_keras_serializable("test_extend")


# --------------------------------------------------------------------------- the layers of these tests


class Kind:
    """A kind of Keras layer: its class, its arguments, inputs for it, and who writes its file."""

    def __init__(self, base, options, *inputs, vocabulary=None, positions="all"):
        self.base, self.options, self.shapes, self.vocabulary = base, options, inputs, vocabulary
        self.positions = positions
        """Which weights the class writes when it is not extended: "all", or only those that "parent" knows."""

    def inputs(self, seed=5):
        rng = np.random.default_rng(seed)
        if self.vocabulary is not None:
            return [rng.integers(0, self.vocabulary, shape).astype("int32") for shape in self.shapes]
        return [rng.normal(size=shape).astype("float32") for shape in self.shapes]

    def model(self, layer):
        dtype = "int32" if self.vocabulary is not None else "float32"
        symbols = [keras.Input(shape[1:], dtype=dtype) for shape in self.shapes]
        return keras.Model(symbols, layer(*symbols))

    def predict(self, model):
        return numpy(model(self.inputs()))


def child_of(base, extended=True):
    """A subclass that multiplies the outputs by one weight and adds another, which does not train."""

    class Child(base):
        def add_two(self):
            self.gain = self.add_weight(name="gain", shape=(), initializer="ones")
            self.offset = self.add_weight(name="offset", shape=(), initializer="zeros", trainable=False)

        if base is L.MultiHeadAttention:

            def build(self, query_shape, value_shape, key_shape=None):
                super().build(query_shape, value_shape, key_shape)
                self.add_two()

        else:

            def build(self, input_shape):
                super().build(input_shape)
                self.add_two()

        @functools.wraps(base.call)
        def call(self, *args, **kwargs):
            return super().call(*args, **kwargs) * self.gain + self.offset

    return tether.extend(Child) if extended else Child


KINDS = {
    "dense": Kind(L.Dense, {"units": 3}, (2, 4), positions="parent"),
    "dense_no_bias": Kind(L.Dense, {"units": 3, "use_bias": False}, (2, 4), positions="parent"),
    "einsum_dense": Kind(
        L.EinsumDense,
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        (2, 2, 4),
        positions="parent",
    ),
    "embedding": Kind(L.Embedding, {"input_dim": 5, "output_dim": 3}, (2, 4), vocabulary=5, positions="parent"),
    "reversible_embedding": Kind(
        L.ReversibleEmbedding,
        {"input_dim": 5, "output_dim": 3, "tie_weights": False},
        (2, 4),
        vocabulary=5,
        positions="parent",
    ),
    "conv1d": Kind(L.Conv1D, {"filters": 2, "kernel_size": 2}, (2, 4, 3), positions="parent"),
    "conv2d": Kind(L.Conv2D, {"filters": 2, "kernel_size": 2}, (2, 4, 4, 3), positions="parent"),
    "conv3d": Kind(L.Conv3D, {"filters": 2, "kernel_size": 2}, (2, 3, 3, 3, 2), positions="parent"),
    "depthwise_conv1d": Kind(L.DepthwiseConv1D, {"kernel_size": 2}, (2, 4, 3)),
    "depthwise_conv2d": Kind(L.DepthwiseConv2D, {"kernel_size": 2}, (2, 4, 4, 3)),
    "batch_normalization": Kind(L.BatchNormalization, {}, (2, 4)),
    "layer_normalization": Kind(L.LayerNormalization, {}, (2, 4)),
    "lstm": Kind(L.LSTM, {"units": 2, "unroll": True}, (2, 3, 4)),
    "gru": Kind(L.GRU, {"units": 2, "unroll": True}, (2, 3, 4)),
    "attention": Kind(L.MultiHeadAttention, {"num_heads": 2, "key_dim": 2}, (2, 3, 4), (2, 5, 4)),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def randomize(layer, seed=3):
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape).astype("float32"))


def own_names(layer):
    return [variable.name for variable in layer._trainable_variables + layer._non_trainable_variables]


def values(layer):
    return [np.array(numpy(variable)) for variable in layer.weights]


def same(before, after):
    return len(before) == len(after) and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def written(layer):
    store = {}
    layer.save_own_variables(store)
    return {key: np.array(numpy(value)) for key, value in store.items()}


def reload(model, path, **custom_objects):
    model.save(path)
    return keras.saving.load_model(path, custom_objects=custom_objects)


@registered
@tether.extend
class Scaled(L.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.gain = self.add_weight(name="gain", shape=(self.units,), initializer="ones")

    def call(self, inputs):
        return super().call(inputs) * self.gain


# --------------------------------------------------------------------------- what is stored


@every_kind
def test_every_own_weight_is_stored_by_name(kind, tmp_path):
    layer = child_of(kind.base)(**kind.options, name="layer")
    model = kind.model(layer)
    model.save_weights(tmp_path / "m.weights.h5")
    names = own_names(layer)
    assert {"gain", "offset"} <= set(names) and len(set(names)) == len(names)
    with h5py.File(tmp_path / "m.weights.h5") as file:
        groups = [item for item in file["layers"].values() if "vars" in item and "gain" in item["vars"]]
        assert sorted(groups[0]["vars"]) == sorted(names) and len(groups) == 1


@every_kind
def test_a_keras_file_brings_back_every_weight_and_output(kind, tmp_path):
    Child = child_of(kind.base)
    model = kind.model(Child(**kind.options, name="layer"))
    randomize(model)
    loaded = reload(model, tmp_path / "m.keras", Child=Child)
    assert type(loaded.get_layer("layer")) is Child
    assert same(values(model), values(loaded))
    assert np.array_equal(kind.predict(model), kind.predict(loaded))


@every_kind
def test_a_weights_file_brings_back_every_weight(kind, tmp_path):
    Child = child_of(kind.base)
    model, other = kind.model(Child(**kind.options)), kind.model(Child(**kind.options))
    randomize(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert same(values(model), values(other))


@every_kind
def test_the_file_of_the_class_before_it_was_extended_is_read_where_it_holds_the_values(kind, tmp_path):
    plain = kind.model(child_of(kind.base, extended=False)(**kind.options))
    randomize(plain)
    plain.save_weights(tmp_path / "m.weights.h5")
    model = kind.model(child_of(kind.base)(**kind.options))
    if kind.positions == "all":
        model.load_weights(tmp_path / "m.weights.h5")
        assert same(values(plain), values(model))
    else:
        before = values(model)
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match="no value for gain, offset; nothing was loaded"),
        ):
            warnings.simplefilter("ignore")  # Keras looks elsewhere for a layer that did not load, and says so first
            model.load_weights(tmp_path / "m.weights.h5")
        assert same(before, values(model))


@every_kind
def test_the_file_of_the_parent_lacks_the_childs_weights(kind):
    parent = kind.base(**kind.options)
    kind.model(parent)
    randomize(parent)
    child = child_of(kind.base)(**kind.options)
    kind.model(child)
    before, store = values(child), written(parent)
    with pytest.raises(tether.TetherError, match="no value for gain, offset; nothing was loaded"):
        child.load_own_variables(store)
    assert same(before, values(child))


@every_kind
def test_an_extended_layer_computes_what_the_plain_subclass_computes(kind):
    plain = kind.model(child_of(kind.base, extended=False)(**kind.options))
    model = kind.model(child_of(kind.base)(**kind.options))
    assert [v.name for v in plain.weights] == [v.name for v in model.weights]
    assert len(plain.trainable_weights) == len(model.trainable_weights)
    randomize(plain)
    model.set_weights(plain.get_weights())
    assert np.array_equal(kind.predict(plain), kind.predict(model))


@every_kind
def test_clones_and_deep_copies_have_weights_of_their_own(kind):
    Child = child_of(kind.base)
    model = kind.model(Child(**kind.options))
    randomize(model)
    clone = keras.models.clone_model(model)
    assert [v.shape for v in clone.weights] == [v.shape for v in model.weights]
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    with keras.saving.custom_object_scope({"Child": Child}):
        copied = copy.deepcopy(model)
    assert same(values(model), values(copied))


# --------------------------------------------------------------------------- variations of what is stored


def test_a_registered_class_is_found_without_custom_objects(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Scaled(3)])
    randomize(model)
    assert same(values(model), values(reload(model, tmp_path / "m.keras")))
    assert same(values(model), values(copy.deepcopy(model)))


def test_nested_in_models_and_layers(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), Scaled(4), Scaled(4)])
    inputs = keras.Input((2, 4))
    model = keras.Model(inputs, L.TimeDistributed(inner)(L.TimeDistributed(Scaled(4))(inputs)))
    randomize(model)
    loaded = reload(model, tmp_path / "m.keras")
    x = np.random.default_rng(2).normal(size=(3, 2, 4)).astype("float32")
    assert len(loaded.weights) == 9 and same(values(model), values(loaded))
    assert np.array_equal(numpy(model(x)), numpy(loaded(x)))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_other_precisions(policy, tmp_path):
    model = keras.Sequential([keras.Input((4,)), Scaled(3, dtype=policy)])
    randomize(model)
    loaded = reload(model, tmp_path / "m.keras")
    assert [v.dtype for v in loaded.weights] == [v.dtype for v in model.weights]
    for a, b in zip(model.weights, loaded.weights, strict=True):
        assert np.array_equal(numpy(a).astype("float32"), numpy(b).astype("float32"))


def test_training_goes_on_after_a_load_as_if_it_had_not_stopped(tmp_path, rng):
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 3)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), Scaled(3)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    loaded = reload(model, tmp_path / "m.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert_close(a, b, 1e-6)


def test_gradients_reach_parent_and_child(rng):
    layer = Scaled(3)
    layer.build((None, 4))
    randomize(layer)
    x = rng.normal(size=(2, 4)).astype("float32")
    _, (kernel, bias, gain) = gradients(lambda: keras.ops.sum(layer(x)), layer.weights)
    W, b, g = (numpy(v) for v in layer.weights)
    assert_close(kernel, np.outer(x.sum(0), g))
    assert_close(bias, 2 * g)
    assert_close(gain, (x @ W + b).sum(0))


@pytest.mark.parametrize("base", ["dense", "einsum_dense", "embedding", "conv2d"])
def test_lora_factors_come_back_and_can_learn_on(base, tmp_path):
    kind = KINDS[base]
    Child = child_of(kind.base)
    layer = Child(**kind.options, name="layer")
    model = kind.model(layer)
    layer.enable_lora(2)
    randomize(model)
    loaded = reload(model, tmp_path / "m.keras", Child=Child)
    again = loaded.get_layer("layer")
    assert again.lora_enabled and {name for name in own_names(again) if "lora" in name}
    by_name = {variable.path: numpy(variable) for variable in model.weights}
    assert len(by_name) == len(loaded.weights)
    for variable in loaded.weights:
        assert np.array_equal(numpy(variable), by_name[variable.path]), variable.path
    assert np.array_equal(kind.predict(model), kind.predict(loaded))


def test_lora_asked_for_in_the_constructor_leaves_room_for_the_childs_weights():
    layer = Scaled(3, lora_rank=2)
    layer.build((None, 4))
    assert own_names(layer) == ["kernel", "bias", "lora_kernel_a", "lora_kernel_b", "gain"]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantised_layer_comes_back(mode, tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), Scaled(4, name="layer")])
    randomize(model)
    model.get_layer("layer").quantize(mode, type_check=False)
    x = rng.normal(size=(3, 4)).astype("float32")
    expected = numpy(model(x))
    loaded = reload(model, tmp_path / "m.keras")
    assert "kernel_scale" in own_names(loaded.get_layer("layer"))
    before, after = written(model.get_layer("layer")), written(loaded.get_layer("layer"))
    assert set(before) == set(after) and all(np.array_equal(before[key], after[key]) for key in before)
    assert np.array_equal(numpy(loaded(x)), expected)


def test_a_layer_that_begins_quantised_is_built_and_comes_back(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Scaled(3, dtype="int8_from_float32")])
    loaded = reload(model, tmp_path / "m.keras")
    assert same(values(model), values(loaded))


@registered
@tether.extend
class Unnamed(L.Dense):
    """Weights without names: in an attribute, in a list, in a dict."""

    def build(self, input_shape):
        super().build(input_shape)
        self.one = self.add_weight(shape=(2,))
        self.several = [self.add_weight(shape=(3,)), self.add_weight(shape=(3,))]
        self.table = {"left": self.add_weight(shape=(4,))}


def test_weights_without_a_name_are_stored_by_the_attribute_that_holds_them(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Unnamed(3, name="layer")])
    randomize(model)
    assert set(written(model.get_layer("layer"))) == {
        "kernel",
        "bias",
        "one",
        "several.0",
        "several.1",
        "table.left",
    }
    assert same(values(model), values(reload(model, tmp_path / "m.keras")))


def test_variables_that_are_not_kept_in_an_attribute_are_stored_by_their_place():
    class Loose(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.add_weight(shape=(2,))

    layer, other = tether.extend(Loose)(3), Loose(3)
    for each in (layer, other):
        each.build((None, 4))
    randomize(layer)
    other.load_own_variables(written(layer))
    assert set(written(layer)) == {"kernel", "bias", "variable.2"} and same(values(layer), values(other))


# --------------------------------------------------------------------------- hierarchies


@registered
@tether.extend
class First(L.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.first = self.add_weight(name="first", shape=(self.units,), initializer="ones")

    def call(self, inputs):
        return super().call(inputs) * self.first


@registered
@tether.extend
class Second(First):
    """The second level has a weight from its constructor, and no `build`."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.second = self.add_weight(name="second", shape=(), initializer="ones")

    def call(self, inputs):
        return super().call(inputs) * self.second


@registered
@tether.extend
class Third(Second):
    def build(self, input_shape):
        self.third = self.add_weight(name="third", shape=(), initializer="zeros", trainable=False)
        super().build(input_shape)

    def call(self, inputs):
        return super().call(inputs) + self.third


def test_a_hierarchy_of_three_levels_comes_back(tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), Third(3, name="layer")])
    randomize(model)
    assert set(written(model.layers[0])) == {"kernel", "bias", "first", "second", "third"}
    loaded = reload(model, tmp_path / "m.keras")
    x = rng.normal(size=(2, 4)).astype("float32")
    assert same(values(model), values(loaded)) and np.array_equal(numpy(model(x)), numpy(loaded(x)))


def test_each_level_of_a_hierarchy_must_call_its_parent():
    class Lazy(Second):
        def build(self, input_shape):
            self.third = self.add_weight(name="third", shape=())

    layer = tether.extend(Lazy)(3)
    with pytest.raises(tether.TetherError, match=r"not called; missing: kernel, bias, first\."):
        layer.build((None, 4))

    class Middle(First):
        def build(self, input_shape):
            self.built = True

    class Top(tether.extend(Middle)):
        def build(self, input_shape):
            super().build(input_shape)

    with pytest.raises(tether.TetherError, match=r"not called; missing: kernel, bias, first\..*`Middle\.build`"):
        tether.extend(Top)(3).build((None, 4))


def test_a_level_may_stay_undecorated():
    class Fourth(Third):
        def build(self, input_shape):
            super().build(input_shape)
            self.fourth = self.add_weight(name="fourth", shape=())

    layer, other = Fourth(3), Fourth(3)
    for each in (layer, other):
        each.build((None, 4))
    randomize(layer)
    other.load_own_variables(written(layer))
    assert "fourth" in written(layer) and same(values(layer), values(other))


def test_an_undecorated_level_between_keras_and_the_extended_class():
    class Plain(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.between = self.add_weight(name="between", shape=())

    class Child(Plain):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())

    old = Child(3)
    old.build((None, 4))
    store = written(old)
    layer, other = tether.extend(Child)(3), Child(3)
    for each in (layer, other):
        each.build((None, 4))
    randomize(layer)
    other.load_own_variables(written(layer))
    assert same(values(layer), values(other))
    with pytest.raises(tether.TetherError, match="no value for between, gain"):
        layer.load_own_variables(store)


def test_a_mixin_of_the_users_own_takes_part():
    class Tempered:
        def build(self, input_shape):
            super().build(input_shape)
            self.temperature = self.add_weight(name="temperature", shape=(), initializer="ones")

    @tether.extend
    class Child(Tempered, L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())

    layer = Child(3)
    layer.build((None, 4))
    assert set(written(layer)) == {"kernel", "bias", "temperature", "gain"}


def test_a_layer_without_a_keras_parent_needs_no_call_of_build(tmp_path):
    @tether.extend
    class Alone(L.Layer):
        def build(self, input_shape):
            self.gain = self.add_weight(name="gain", shape=(input_shape[-1],))

        def call(self, inputs):
            return inputs * self.gain

    model = keras.Sequential([keras.Input((4,)), Alone()])
    randomize(model)
    assert same(values(model), values(reload(model, tmp_path / "m.keras", Alone=Alone)))


def test_a_model_of_the_users_own_can_be_extended(tmp_path):
    @tether.extend
    class Own(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = L.Dense(3)
            self.gain = self.add_weight(name="gain", shape=(), initializer="ones")

        def build(self, input_shape):
            self.dense.build(input_shape)

        def call(self, inputs):
            return self.dense(inputs) * self.gain

    model = Own()
    model.build((None, 4))
    randomize(model)
    assert same(values(model), values(reload(model, tmp_path / "m.keras", Own=Own)))


def test_a_functional_model_can_be_extended():
    @tether.extend
    class Graph(keras.Model):
        pass

    inputs = keras.Input((4,))
    model = Graph(inputs, Scaled(3)(inputs))
    assert isinstance(model, Graph) and len(model.weights) == 3


# --------------------------------------------------------------------------- what parents write beside variables


@registered
@tether.extend
class Counting(L.Normalization):
    """The parent computes constants from its variables when it loads."""

    def build(self, input_shape):
        super().build(input_shape)
        self.gain = self.add_weight(name="gain", shape=(), initializer="ones")

    def call(self, inputs):
        return super().call(inputs) * self.gain


def test_a_parent_that_does_more_when_it_loads_does_it(tmp_path, rng):
    layer = Counting(name="layer")
    layer.adapt(rng.normal(3.0, 2.0, size=(64, 4)).astype("float32"))
    model = keras.Sequential([keras.Input((4,)), layer])
    x = rng.normal(size=(2, 4)).astype("float32")
    loaded = reload(model, tmp_path / "m.keras")
    assert np.array_equal(numpy(model(x)), numpy(loaded(x)))
    assert abs(float(numpy(loaded.get_layer("layer").mean).mean()) - 3.0) < 1.0


class Remembering(L.Layer):
    """A parent with a state of its own that is no variable."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = np.zeros(0, "int32")

    def build(self, input_shape):
        self.gain = self.add_weight(name="gain", shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs):
        return inputs * self.gain

    def save_own_variables(self, store):
        store["0"] = numpy(self.gain)
        store["words"] = self.words

    def load_own_variables(self, store):
        self.gain.assign(store["0"])
        self.words = np.array(store["words"])


@registered
@tether.extend
class RememberingMore(Remembering):
    def build(self, input_shape):
        super().build(input_shape)
        self.more = self.add_weight(name="more", shape=())


def test_what_else_a_parent_writes_is_kept(tmp_path):
    model = keras.Sequential([keras.Input((4,)), RememberingMore(name="layer")])
    model.get_layer("layer").words = np.arange(5, dtype="int32")
    randomize(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = keras.Sequential([keras.Input((4,)), RememberingMore(name="layer")])
    other.load_weights(tmp_path / "m.weights.h5")
    assert same(values(model), values(other))
    assert np.array_equal(other.get_layer("layer").words, np.arange(5))


def test_save_methods_of_the_class_itself_come_first():
    @tether.extend
    class Noting(L.Dense):
        note = 0

        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["note"] = np.array(self.note)

        def load_own_variables(self, store):
            super().load_own_variables(store)
            self.note = int(store["note"])

    layer, other = Noting(3), Noting(3)
    for each in (layer, other):
        each.build((None, 4))
    layer.note = 7
    other.load_own_variables(written(layer))
    assert other.note == 7 and same(values(layer), values(other))


# --------------------------------------------------------------------------- files that do not fit


def extended(store_of=None, **options):
    layer = Scaled(3, **options)
    layer.build((None, 4))
    randomize(layer)
    return layer


def test_a_file_that_lacks_one_weight_names_it_and_changes_nothing():
    layer = extended()
    before, store = values(layer), written(layer)
    del store["bias"]
    store["kernel"] += 1.0
    with pytest.raises(tether.TetherError, match="no value for bias; nothing was loaded"):
        layer.load_own_variables(store)
    assert same(before, values(layer))


def test_a_file_with_a_weight_that_the_layer_has_not_names_it_and_changes_nothing():
    layer, store = extended(use_bias=False), written(extended())
    before = values(layer)
    with pytest.raises(tether.TetherError, match=r"no weight for what the file holds under 'bias'.*kernel, gain"):
        layer.load_own_variables(store)
    assert same(before, values(layer))


def test_a_value_of_another_shape_changes_nothing():
    layer = extended()
    before, store = values(layer), written(layer)
    store["kernel"], store["gain"] = store["kernel"] + 1.0, np.ones(5, "float32")
    with pytest.raises(tether.errors.ShapeMismatch, match=r"'gain'.*has shape \(3,\).*shape=\(5,\)"):
        layer.load_own_variables(store)
    assert same(before, values(layer))


def test_positions_of_another_shape_or_number_change_nothing():
    Child = child_of(L.LayerNormalization)
    layer = Child()
    layer.build((None, 4))
    before = values(layer)
    positions = {str(place): np.full(4, 7.0, "float32") for place in range(4)}
    with pytest.raises(ValueError, match="shape"):
        layer.load_own_variables(positions)  # gain is a scalar
    assert same(before, values(layer))
    with pytest.raises(tether.TetherError, match="3 values by position, and the layer has 4 weights"):
        layer.load_own_variables({key: positions[key] for key in "012"})
    assert same(before, values(layer))


def test_a_mixed_file_is_read_by_position_and_by_name():
    layer = extended()
    kernel, bias = np.full((4, 3), 2.0, "float32"), np.full(3, 3.0, "float32")
    layer.load_own_variables({"0": kernel, "1": bias, "gain": np.full(3, 4.0, "float32")})
    assert [float(value.mean()) for value in values(layer)] == [2.0, 3.0, 4.0]


def test_a_layer_that_is_not_built_says_so():
    with pytest.raises(tether.TetherError, match="The layer is not built"):
        Scaled(3).load_own_variables(written(extended()))


def test_positions_and_lora_merged_by_keras_are_read_as_keras_reads_them(rng):
    class Child(L.Dense):
        pass

    old = Child(3, lora_rank=2)
    old.build((None, 4))
    randomize(old)
    x, store = rng.normal(size=(2, 4)).astype("float32"), written(old)
    expected = numpy(old(x))
    assert set(store) == {"0", "1"}
    new = tether.extend(Child)(3, lora_rank=2)
    new.build((None, 4))
    new.load_own_variables(store)
    assert_close(new(x), expected)
    assert not numpy(new.lora_kernel_b).any()


def test_a_failed_load_with_a_parent_of_its_own_ways_changes_nothing():
    layer = RememberingMore()
    layer.build((None, 4))
    before, store = values(layer), written(layer)
    store["gain"] += 1.0
    del store["parent.words"]
    with pytest.raises(KeyError, match="words"):
        layer.load_own_variables(store)
    assert same(before, values(layer))


# --------------------------------------------------------------------------- clashes


def state(layer):
    return sorted(vars(layer)), [v.path for v in layer.weights], layer.built, values(layer)


def refused(cls, match, *args, shape=(None, 4), **kwargs):
    """A build that is refused, twice with the same words, and leaves the layer as it was."""
    layer = tether.extend(cls)(*args, **kwargs)
    before = state(layer)
    for _ in range(2):
        with pytest.raises(tether.TetherError, match=match) as caught:
            layer.build(shape)
        after = state(layer)
        assert before[:3] == after[:3] and same(before[3], after[3])
    return str(caught.value)


def test_a_second_weight_of_one_name_is_refused_whoever_comes_first():
    class After(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.mine = self.add_weight(name="bias", shape=())

    class Before(L.Dense):
        def build(self, input_shape):
            self.mine = self.add_weight(name="bias", shape=())
            super().build(input_shape)

    class Twice(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.mine = self.add_weight(name="mine", shape=())
            self.other = self.add_weight(name="mine", shape=())

    class ByHand(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.mine = keras.Variable(np.ones(2, "float32"), name="bias")

    assert "attribute `bias`, made by Dense" in refused(After, "After adds a weight named 'bias'", 3)
    assert "attribute `mine`, made by Before" in refused(Before, "Dense adds a weight named 'bias'", 3)
    refused(Twice, "Twice adds a weight named 'mine'", 3)
    refused(ByHand, "ByHand adds a weight named 'bias'", 3)


def test_a_weight_of_the_constructor_with_the_name_of_a_parents_is_refused_at_build():
    @tether.extend
    class Early(L.Dense):
        def __init__(self, units):
            super().__init__(units)
            self.mine = self.add_weight(name="kernel", shape=())

    with pytest.raises(tether.TetherError, match=r"Dense adds a weight named 'kernel'.*made by Early"):
        Early(3).build((None, 4))


def test_two_levels_of_a_hierarchy_must_not_use_one_name():
    class Again(Third):
        def build(self, input_shape):
            super().build(input_shape)
            self.mine = self.add_weight(name="first", shape=())

    message = refused(Again, "Again adds a weight named 'first'", 3)
    assert "made by First" in message


def test_a_parent_that_uses_a_name_twice_itself_is_left_alone():
    class Doubled(L.Layer):
        def build(self, input_shape):
            self.left = self.add_weight(name="w", shape=(2,))
            self.right = self.add_weight(name="w", shape=(2,))

    @tether.extend
    class Child(Doubled):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())

    layer, other = Child(), Child()
    for each in (layer, other):
        each.build((None, 4))
    randomize(layer)
    assert set(written(layer)) == {"left", "right", "gain"}
    other.load_own_variables(written(layer))
    assert same(values(layer), values(other))


def test_an_attribute_that_holds_a_weight_of_the_parent_is_refused():
    class Replacing(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.bias = self.add_weight(name="other_bias", shape=(self.units,))

    message = refused(Replacing, "keeps the weight 'other_bias' in the attribute `bias`", 3)
    assert "made by Dense" in message and "tether.tie(layer, bias=...)" in message


def test_an_attribute_that_is_an_argument_is_refused_in_the_constructor_too():
    @tether.extend
    class Early(L.LayerNormalization):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.epsilon = self.add_weight(name="mine", shape=())

    with pytest.raises(tether.TetherError, match="`epsilon` is an argument of LayerNormalization"):
        Early()


def test_an_argument_of_an_extended_parent_is_refused():
    class Wide(L.Dense):
        def __init__(self, units, width=2, **kwargs):
            super().__init__(units, **kwargs)
            self.width = width

    class Child(tether.extend(Wide)):
        def build(self, input_shape):
            super().build(input_shape)
            self.width = self.add_weight(name="mine", shape=())

    refused(Child, "Child keeps the weight 'mine' in the attribute `width`, and `width` is an argument of Wide", 3)


def test_a_parent_may_keep_its_own_weight_under_its_own_argument():
    class Table(L.Layer):
        def __init__(self, table=None, **kwargs):
            super().__init__(**kwargs)

        def build(self, input_shape):
            self.table = self.add_weight(name="table", shape=(2,))

    @tether.extend
    class Child(Table):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())

    layer = Child()
    layer.build((None, 4))
    assert set(written(layer)) == {"table", "gain"}


@pytest.mark.parametrize("value", ["weight", "tensor"])
def test_a_property_of_the_parent_is_refused_for_weights_and_tensors(value):
    class Child(L.Embedding):
        def build(self, input_shape):
            super().build(input_shape)
            mine = self.add_weight(name="mine", shape=(5, 3))
            self.embeddings = mine if value == "weight" else keras.ops.convert_to_tensor(mine) * 2.0

    message = refused(Child, "`embeddings` is a property of Embedding", 5, 3)
    assert "tether.tie(layer, embeddings=...)" in message


def test_a_property_with_a_setter_can_be_set():
    @tether.extend
    class Child(L.Dense):
        @property
        def doubled(self):
            return self._doubled * 2.0

        @doubled.setter
        def doubled(self, value):
            self._doubled = value

        def build(self, input_shape):
            super().build(input_shape)
            self.doubled = self.add_weight(name="gain", shape=(), initializer="ones")

    layer = Child(3)
    layer.build((None, 4))
    assert float(numpy(layer.doubled)) == 2.0 and "gain" in written(layer)


def test_a_second_build_is_refused_by_keras_as_for_any_layer():
    layer = extended()
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.build((None, 4))


# --------------------------------------------------------------------------- the parent's build


@every_kind
def test_a_forgotten_build_of_the_parent_names_what_is_missing(kind):
    class Lazy(kind.base):
        if kind.base is L.MultiHeadAttention:

            def build(self, query_shape, value_shape, key_shape=None):
                self.gain = self.add_weight(name="gain", shape=())

        else:

            def build(self, input_shape):
                self.gain = self.add_weight(name="gain", shape=())

    parent = kind.base(**kind.options)
    shapes = kind.shapes
    parent.build(*shapes)
    layer = tether.extend(Lazy)(**kind.options)
    before = state(layer)
    with pytest.raises(tether.TetherError, match=r"the parent's build\(\) was not called; missing: ") as caught:
        layer.build(*shapes)
    listed = str(caught.value).split("missing: ")[1].split(". ")[0].split(", ")
    assert [name.split("/")[-1] for name in listed] == [variable.name for variable in parent.weights]
    assert before[:3] == state(layer)[:3]


def test_a_class_may_make_its_parents_weights_itself():
    @tether.extend
    class Own(L.Dense):
        def build(self, input_shape):
            self._kernel = self.add_weight(name="kernel", shape=(4, self.units))
            self.bias = self.add_weight(name="bias", shape=(self.units,))

    @tether.extend
    class ByName(L.Dense):
        def build(self, input_shape):
            L.Dense.build(self, input_shape)

    for cls in (Own, ByName):
        layer = cls(3)
        layer.build((None, 4))
        assert set(written(layer)) == {"kernel", "bias"}


def test_a_parent_that_cannot_be_made_for_the_message_is_still_missed():
    class Demanding(L.Dense):
        def __init__(self, units, secret):
            super().__init__(units)

    class Child(Demanding):
        def build(self, input_shape):
            pass

    with pytest.raises(tether.TetherError, match="not called; missing: which could not be listed"):
        tether.extend(Child)(3, "secret").build((None, 4))


def test_an_error_in_build_leaves_the_layer_as_it_was_and_it_can_be_built_later():
    fail = [True]

    @tether.extend
    class Moody(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())
            if fail[0]:
                raise RuntimeError("not today")

    layer = Moody(3)
    with pytest.raises(RuntimeError, match="not today"):
        layer.build((None, 4))
    assert layer.weights == [] and not layer.built
    fail[0] = False
    layer.build((None, 4))
    assert own_names(layer) == ["kernel", "bias", "gain"]


# --------------------------------------------------------------------------- the decorator


def test_the_class_stays_the_same_object_with_its_own_build_signature():
    class Child(L.Dense):
        def build(self, input_shape):
            """What it does."""
            super().build(input_shape)

    assert tether.extend(Child) is Child
    assert list(inspect.signature(Child.build).parameters) == ["self", "input_shape"]
    assert Child.build.__doc__ == "What it does."
    layer = Child(3)
    layer.build((None, 4))
    assert layer.get_build_config() == {"input_shape": (None, 4)}
    assert "build" not in vars(tether.extend(type("Silent", (L.Dense,), {})))


def test_extending_twice_is_extending_once():
    class Child(L.Dense):
        pass

    tether.extend(Child)
    bases = Child.__mro__
    assert tether.extend(Child) is Child and Child.__mro__ == bases


def test_it_goes_with_registration_in_either_order(tmp_path):
    @keras.saving.register_keras_serializable("test_extend")
    @tether.extend
    class Above(Scaled):
        pass

    @tether.extend
    @keras.saving.register_keras_serializable("test_extend")
    class Below(Scaled):
        pass

    model = keras.Sequential([keras.Input((4,)), Above(3), Below(3)])
    randomize(model)
    assert same(values(model), values(reload(model, tmp_path / "m.keras")))


@pytest.mark.parametrize(
    "wrong", [3, None, int, lambda: None, keras.Variable], ids=["3", "None", "int", "a function", "a variable"]
)
def test_what_is_no_layer_class_is_refused(wrong):
    with pytest.raises(tether.TetherError, match="decorates a class that subclasses a Keras layer"):
        tether.extend(wrong)


def test_an_instance_is_refused():
    with pytest.raises(tether.TetherError, match="decorates a class"):
        tether.extend(L.Dense(3))


def test_classes_of_keras_and_of_tether_are_not_changed():
    for cls in (L.Dense, keras.Model, tether.Weight, type(tether.tie(Scaled(3), gain=tether.Weight()))):
        bases = cls.__bases__
        with pytest.raises(tether.TetherError, match="not yours to change"):
            tether.extend(cls)
        assert cls.__bases__ == bases


def test_a_class_whose_bases_cannot_be_changed_is_refused_and_stays_as_it_is():
    class Sealed(type(L.Dense)):
        def __setattr__(cls, name, value):
            raise TypeError(f"{name} is sealed")

    class Child(L.Dense, metaclass=Sealed):
        def build(self, input_shape):
            super().build(input_shape)

    before = dict(vars(Child))
    with pytest.raises(tether.errors.Unsupported, match="__bases__ is sealed"):
        tether.extend(Child)
    assert dict(vars(Child)) == before and Child.__bases__ == (L.Dense,)


# --------------------------------------------------------------------------- ties


def tied_model():
    w, g = tether.Weight(name="w"), tether.Weight(name="g")
    first = tether.tie(Scaled(4, name="first"), kernel=w, gain=g)
    second = tether.tie(Scaled(4, name="second"), kernel=w.T)
    return keras.Sequential([keras.Input((4,)), first, second])


def test_weights_of_parent_and_child_can_be_tied_and_come_back(tmp_path, rng):
    model = tied_model()
    assert len(model.weights) == 5
    randomize(model)
    x = rng.normal(size=(2, 4)).astype("float32")
    for other in (reload(model, tmp_path / "m.keras"), copy.deepcopy(model)):
        assert len(other.weights) == 5 and np.array_equal(numpy(model(x)), numpy(other(x)))
        assert other.layers[1].kernel.expression == other.layers[0].kernel.expression.T
    clone = keras.models.clone_model(model)
    assert len(clone.weights) == 5
    model.save_weights(tmp_path / "m.weights.h5")
    clone.load_weights(tmp_path / "m.weights.h5")
    assert np.array_equal(numpy(model(x)), numpy(clone(x)))


def test_a_built_layer_can_be_tied_and_untied(rng):
    layer = extended()
    before = written(layer)
    x = rng.normal(size=(2, 4)).astype("float32")
    y = numpy(layer(x))
    weight = tether.weight_of(layer, "gain")
    other = tether.tie(Scaled(3), gain=weight)
    other.build((None, 4))
    assert np.array_equal(numpy(layer(x)), y) and set(written(layer)) == {"kernel", "bias"}
    tether.untie(layer)
    assert type(layer) is Scaled and np.array_equal(numpy(layer(x)), y)
    after = written(layer)
    assert list(after) == list(before) and all(np.array_equal(after[key], before[key]) for key in before)


def test_a_file_from_before_a_tie_still_loads():
    plain = extended()
    tied = Scaled(3)
    tied.build((None, 4))
    weight = tether.weight_of(tied, "kernel")
    tied.load_own_variables(written(plain))
    assert np.array_equal(weight.numpy(), numpy(plain.kernel))
    assert same([numpy(v) for v in plain.weights], [numpy(v) for v in tied.weights])


@pytest.mark.parametrize("path", ["gain", "gamma"])
def test_positions_from_before_the_class_was_extended_and_tied_still_load(path):
    old = child_of(L.LayerNormalization, extended=False)()
    new = child_of(L.LayerNormalization)()
    for each in (old, new):
        each.build((None, 4))
    randomize(old)
    weight = tether.weight_of(new, path)
    new.load_own_variables(written(old))
    assert np.array_equal(weight.numpy(), numpy(getattr(old, path)))
    assert same(values(old), values(new))


def test_a_models_file_from_before_the_class_was_extended_and_tied_still_loads(tmp_path):
    kind = KINDS["layer_normalization"]
    old = kind.model(child_of(kind.base, extended=False)(name="layer"))
    randomize(old)
    old.save_weights(tmp_path / "m.weights.h5")
    layer = child_of(kind.base)(name="layer")
    new = kind.model(layer)
    weights = {path: tether.weight_of(layer, path) for path in ("gain", "gamma")}
    new.load_weights(tmp_path / "m.weights.h5")
    for path, weight in weights.items():
        assert np.array_equal(weight.numpy(), numpy(getattr(old.get_layer("layer"), path)))
    assert same(values(old), values(new))


def test_a_tied_weight_of_the_parent_counts_as_the_parents_in_a_file_by_position():
    parent, child = L.LayerNormalization(), tether.tie(child_of(L.LayerNormalization)(), gamma=tether.Weight(name="w"))
    for each in (parent, child):
        each.build((None, 4))
    with pytest.raises(tether.TetherError, match="no value for gain, offset; nothing was loaded"):
        child.load_own_variables(written(parent))


def test_a_name_that_is_tied_clashes_too():
    class After(L.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.mine = self.add_weight(name="bias", shape=(self.units,))

    weight = tether.Weight(name="shared")
    layer = tether.tie(tether.extend(After)(3), bias=weight)
    with pytest.raises(tether.TetherError, match="After adds a weight named 'bias'"):
        layer.build((None, 4))
    assert layer.weights == [] and not weight.is_built
    other = tether.tie(L.Dense(5), bias=weight)
    other.build((None, 4))
    assert weight.shape == (5,)


def test_a_materialized_copy_of_a_tied_layer_is_a_plain_extended_one(rng):
    model = tied_model()
    randomize(model)
    plain = tether.materialize(model)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert [type(layer) for layer in plain.layers] == [Scaled, Scaled] and len(plain.weights) == 6
    assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    ("base", "attribute"), [(keras.layers.Dense, "kernel"), (keras.layers.LayerNormalization, "scale")]
)
def test_an_attribute_that_a_weight_must_not_take_is_refused_for_a_tied_one_too(base, attribute):
    @tether.extend
    class Child(base):
        def build(self, input_shape):
            super().build(input_shape)
            setattr(self, attribute, self.add_weight(name="mine", shape=(2,)))

    child = Child(3) if base is keras.layers.Dense else Child()
    tether.tie(child, mine=tether.Weight(np.zeros(2, "float32"), name="shared"))
    with pytest.raises(tether.TetherError, match=attribute):
        child.build((None, 4))

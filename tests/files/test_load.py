"""Loading a model, and seeing that all of it arrived."""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether.errors import InvalidConfig, LostTie, TetherError

pytestmark = pytest.mark.spread

layers = keras.layers


def tied_model():
    codec = tether.Weight(name="codec")
    inputs = keras.Input((4,))
    hidden = tether.tie(layers.Dense(3, name="encode"), kernel=codec)(inputs)
    return keras.Model(inputs, tether.tie(layers.Dense(4, name="decode"), kernel=codec.T)(hidden))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.keras"
    model = tied_model()
    tether.files.save_model(model, path)
    return model, path


def with_values(path, change):
    """A copy of a file with other values."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    held = io.BytesIO(entries["model.weights.h5"])
    with h5py.File(held, "r+") as values:
        change(values)
    entries["model.weights.h5"] = held.getvalue()
    other = path.with_name("changed.keras")
    with zipfile.ZipFile(other, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return other


def test_a_tied_model_comes_back_tied(saved, rng):
    model, path = saved
    again = tether.files.load_model(str(path))
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(model(x), again(x))
    assert len(again.weights) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_weights_come_back_to_the_bit(dtype, rng, tmp_path):
    """Weights of more than a megabyte, which are read in parts: shared, a layer's own, and an optimizer's."""
    codec, x = tether.Weight(name="codec", dtype=dtype), keras.Input((1100,))
    encode = tether.tie(layers.Dense(700, name="encode", dtype=dtype), kernel=codec)
    decode = tether.tie(layers.Dense(1100, name="decode", dtype=dtype), kernel=codec.T)
    model = keras.Model(x, layers.Dense(600, name="own", dtype=dtype)(decode(encode(x))))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for variable in [*model.weights, *model.optimizer.variables[2:]]:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    tether.files.save_model(model, tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    for mine, theirs in zip(again.variables, model.variables, strict=True):
        assert numpy(mine).tobytes() == numpy(theirs).tobytes(), mine.path
    for mine, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        assert numpy(mine).tobytes() == numpy(theirs).tobytes(), mine.path
    assert len(again.weights) == 5


class Halved(layers.Dense):
    """Writes its kernel as it is and halves it when it reads it."""

    def load_own_variables(self, store):
        self.kernel.assign(np.asarray(store["0"]) / 2)
        self.bias.assign(store["1"])


def test_a_layer_may_do_what_it_likes_with_a_large_weight_that_it_reads(rng, tmp_path):
    model = keras.Sequential([keras.Input((600,)), Halved(600)])
    kernel = rng.normal(size=(600, 600)).astype("float32")
    model.layers[0].kernel.assign(kernel)
    tether.files.save_model(model, tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras", custom_objects={"Halved": Halved})
    assert np.array_equal(numpy(again.layers[0].kernel), kernel / 2)


@keras.saving.register_keras_serializable(package="test_load")
class Projecting(layers.Layer):
    """Random projections that no file has."""

    def build(self, shape):
        seeded = keras.initializers.RandomNormal(seed=1)
        self.seeded = self.add_weight((600, 600), seeded, trainable=False, name="seeded")
        self.derived = keras.ops.sign(self.seeded.value)
        self.given = self.add_weight((600, 600), "random_normal", trainable=False, name="given")
        self.given.assign(np.eye(600))
        self.drawn = self.add_weight((600, 600), "random_normal", trainable=False, name="drawn")

    def call(self, x):
        return x @ self.seeded @ self.derived @ self.given

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


def test_a_large_weight_that_no_file_has_starts_as_its_layer_says(rng, tmp_path):
    model = keras.Sequential([keras.Input((600,)), Projecting(), layers.Dense(600)])
    tether.files.save_model(model, tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    x = rng.normal(size=(2, 600)).astype("float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(again(x)))
    assert numpy(again.layers[0].drawn).std() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_start_is_drawn_for_a_large_weight_that_the_file_has(dtype, tmp_path, monkeypatch):
    codec, x = tether.Weight(name="codec", dtype=dtype), keras.Input((1200,))
    h = tether.tie(layers.Dense(700, dtype=dtype), kernel=codec)(layers.Dense(1200, dtype=dtype)(x))
    h = tether.tie(layers.Dense(1200, dtype=dtype), kernel=codec.T)(h)
    model = keras.Model(x, layers.Dense(3, dtype=dtype)(h))
    tether.files.save_model(model, tmp_path / "model.keras")
    drawn, draw = [], keras.initializers.VarianceScaling.__call__

    def recorded(self, shape, **kwargs):
        drawn.append(tuple(shape))
        return draw(self, shape, **kwargs)

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", recorded)
    again = tether.files.load_model(tmp_path / "model.keras")
    assert drawn == [(1200, 3)]
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))


def test_a_large_weight_that_is_packed_in_the_file_is_read_too(rng, tmp_path):
    model = keras.Sequential([keras.Input((600,)), layers.Dense(600)])
    tether.files.save_model(model, tmp_path / "model.keras")

    def pack(values):
        place = "layers/dense/vars/0"
        value = values[place][()]
        del values[place]
        values.create_dataset(place, data=value, compression="gzip")

    again = tether.files.load_model(with_values(tmp_path / "model.keras", pack))
    np.testing.assert_array_equal(numpy(model.layers[0].kernel), numpy(again.layers[0].kernel))


def test_the_optimizer_comes_back_unless_it_is_not_asked_for(rng, tmp_path):
    model = tied_model()
    model.compile("adam", "mse", metrics=["mae"])
    x = rng.normal(size=(8, 4)).astype("float32")
    model.fit(x, x, verbose=0)
    tether.files.save_model(model, tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    for mine, theirs in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
        assert_close(mine, theirs)
    bare = tether.files.load_model(tmp_path / "model.keras", compile=False)
    assert not bare.compiled
    assert_close(bare(x), model(x))


class Doubling(layers.Layer):
    """A class that Keras knows only by what the caller says."""

    def call(self, x):
        return 2.0 * x


def test_classes_of_ones_own_are_given_by_name(tmp_path):
    x = keras.Input((4,))
    tether.files.save_model(keras.Model(x, Doubling()(x)), tmp_path / "model.keras")
    with pytest.raises(InvalidConfig, match="Doubling"):
        tether.files.load_model(tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras", custom_objects={"Doubling": Doubling})
    assert_close(again(np.ones((1, 4), "float32")), 2.0 * np.ones((1, 4)))


def test_code_in_a_file_is_run_only_if_the_caller_trusts_it(tmp_path):
    x = keras.Input((4,))
    tether.files.save_model(keras.Model(x, layers.Lambda(lambda y: y + 1.0)(x)), tmp_path / "model.keras")
    with pytest.raises(InvalidConfig, match="safe_mode"):
        tether.files.load_model(tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras", safe_mode=False)
    assert_close(again(np.ones((1, 4), "float32")), 2.0 * np.ones((1, 4)))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TetherError, match=r"There is no file.*nowhere\.keras"):
        tether.files.load_model(tmp_path / "nowhere.keras")


def test_a_weight_without_a_value_and_a_value_without_a_weight_are_named(saved):
    _, path = saved
    extra = with_values(path, lambda values: values.create_dataset("layers/other/vars/0", data=np.ones(3)))
    with pytest.raises(InvalidConfig, match="no place for: layers/other/vars/0"):
        tether.files.load_model(extra)
    absent = with_values(path, lambda values: values.__delitem__("layers/dense/vars/1"))
    with pytest.raises(InvalidConfig, match=r"could not be loaded|no value for"):
        tether.files.load_model(absent)


class Careless(layers.Dense):
    """Takes what there is."""

    def load_own_variables(self, store):
        for key in store.keys():  # noqa: SIM118
            self.weights[int(key)].assign(store[key])


def test_a_layer_that_is_content_with_less_is_noticed(tmp_path):
    x = keras.Input((4,))
    path = tmp_path / "model.keras"
    tether.files.save_model(keras.Model(x, Careless(3, name="careless")(x)), path)
    absent = with_values(path, lambda values: values.__delitem__("layers/careless/vars/1"))
    with pytest.raises(InvalidConfig, match="no value for layers/careless/vars/1"):
        tether.files.load_model(absent, custom_objects={"Careless": Careless})


@keras.saving.register_keras_serializable(package="test_load")
class Untying(layers.Layer):
    """Reads its config and makes a plain layer all the same."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner or layers.Dense(3, use_bias=False, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        config.pop("inner")
        return cls(**config)


def around(bias, kernel=None):
    inner = tether.tie(layers.Dense(3, name="inner"), bias=bias)
    if kernel is not None:
        tether.tie(inner, kernel=kernel)
    x = keras.Input((4,))
    return keras.Model(x, Untying(inner, name="around")(x))


def test_a_tie_that_did_not_come_back_is_named(tmp_path):
    path = tmp_path / "model.keras"
    tether.files.save_model(around(np.zeros(3, "float32")), path)
    with pytest.raises(LostTie, match="inner/bias"):
        tether.files.load_model(path)


def test_a_tied_weight_that_did_not_come_back_is_named(tmp_path):
    path = tmp_path / "model.keras"
    tether.files.save_model(around(np.zeros(3, "float32"), tether.Weight((4, 3), name="w")), path)
    with pytest.raises(TetherError, match="inner"):
        tether.files.load_model(path)


@pytest.mark.parametrize("change", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_model_that_is_to_be_compiled_again_is_read_without_what_its_optimizer_kept(kind, change, tmp_path):
    made = [layers.Dense(4, name="a"), layers.Dense(4, name="b")]
    inputs = keras.Input((4,))
    if kind == "functional":
        model = keras.Model(inputs, made[1](made[0](inputs)))
    else:
        model = keras.Sequential([inputs, *made])
    x = np.ones((2, 4), "float32")
    if change == "untied":
        tether.tie(model, {"b/kernel": tether.weight_of(model, "a/kernel").T})
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    if change == "tied":
        tether.tie(model, {"b/kernel": tether.weight_of(model, "a/kernel").T})
    else:
        tether.untie(model)
    path = tmp_path / "model.keras"
    tether.files.save_model(model, path)
    again = tether.files.load_model(path)
    assert not again.compiled and len(again.weights) == len(model.weights)
    assert_close(again(x), model(x), 0)

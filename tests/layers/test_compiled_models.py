"""A model that has been trained is changed below: it works as changed, or one error says to compile it again."""

import copy
import gc
import sys
import warnings

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy, slot_count
from tether import TetherError
from tether.keras_seam import census

pytestmark = pytest.mark.spread

layers = keras.layers


def network(nested):
    """Three layers of one shape, the first two in a model of their own if it is nested."""
    x = keras.Input((4,))
    y = layers.Dense(4, activation="tanh", name="two")(layers.Dense(4, activation="tanh", name="one")(x))
    if not nested:
        return keras.Model(x, layers.Dense(4, name="three")(y), name="flat")
    inner, outer = keras.Model(x, y, name="inner"), keras.Input((4,))
    return keras.Model(outer, layers.Dense(4, name="three")(inner(outer)), name="outer")


class Network:
    """A model, and what a change is called on: the model, or the very layer."""

    def __init__(self, nested, called_on):
        self.model, self.nested, self.on_layer = network(nested), nested, called_on == "layer"

    def layer(self, name):
        holder = self.model.get_layer("inner") if self.nested and name != "three" else self.model
        return holder.get_layer(name)

    def path(self, name):
        return f"inner/{name}" if self.nested and not name.startswith("three") else name

    def weight_of(self, name):
        return tether.weight_of(self.layer(name), "kernel")

    def tie(self, name, expression):
        if self.on_layer:
            tether.tie(self.layer(name), kernel=expression)
        else:
            tether.tie(self.model, {self.path(f"{name}/kernel"): expression})

    def untie(self, name):
        if self.on_layer:
            tether.untie(self.layer(name))
        else:
            tether.untie(self.model, self.path(f"{name}/kernel"))

    @property
    def root(self):
        """What whole models are changed by: the model itself, or the part of it that holds the layers."""
        return self.model.get_layer("inner") if self.on_layer and self.nested else self.model

    def adapter(self, name="french"):
        pattern = "*two/kernel" if self.root is self.model else "two/kernel"
        tether.adapters.add(self.root, name, {pattern: tether.low_rank(2)})


def nothing(network, folder):
    """Before it is trained."""


def tied(network, folder):
    network.tie("two", network.weight_of("one"))


def promoted(network, folder):
    network.weight_of("two")


def adapted(network, folder):
    network.adapter()


def adapted_and_merged(network, folder):
    network.adapter()
    tether.adapters.merge(network.root)


def adapter_saved(network, folder):
    network.adapter()
    tether.adapters.save(network.root, "french", folder / "french.safetensors")
    tether.adapters.remove(network.root, "french")
    tether.untie(network.model)


def scale_the_second(network, folder):
    network.tie("two", 2.0 * network.weight_of("two"))


def untie_the_second(network, folder):
    network.untie("two")


def make_it_constant(network, folder):
    network.tie("two", np.eye(4, dtype="float32"))


def add_a_part(network, folder):
    network.tie("two", network.weight_of("two") + tether.low_rank(2))


def remove_the_adapter(network, folder):
    tether.adapters.remove(network.root, "french")


def merge(network, folder):
    tether.adapters.merge(network.root)


def unmerge(network, folder):
    tether.adapters.unmerge(network.root)


def load_the_adapter(network, folder):
    tether.adapters.load(network.root, folder / "french.safetensors")


def quantize(network, folder):
    if network.on_layer:
        network.layer("two").quantize("int8")
    else:
        network.model.quantize("int8", filters=lambda layer: not isinstance(layer, layers.InputLayer))


def inherit(network, folder):
    tether.inherit(network.layer("two"))


def keep_close(network, folder):
    tether.transfer.soft_tie(network.root, network.weight_of("one"), network.weight_of("two"), 0.5)


def retie(network, folder):
    other = copy.deepcopy(network.root)
    tether.files.retie(other, network.root, resolve="first")


WORKS = {
    "promote": (nothing, promoted),
    "scale": (nothing, scale_the_second),
    "scale a tied one": (promoted, scale_the_second),
    "inherit": (nothing, inherit),
    "keep close": (promoted, keep_close),
}
HAS_TO_BE_COMPILED = {
    "tie": (nothing, tied),
    "tie to a constant": (nothing, make_it_constant),
    "add a part": (promoted, add_a_part),
    "untie": (tied, untie_the_second),
    "untie its own": (promoted, untie_the_second),
    "add an adapter": (nothing, adapted),
    "remove an adapter": (adapted, remove_the_adapter),
    "merge": (adapted, merge),
    "unmerge": (adapted_and_merged, unmerge),
    "load an adapter": (adapter_saved, load_the_adapter),
    "quantize": (tied, quantize),
    "retie": (tied, retie),
}
PLACES = [(nested, on, how) for nested in (False, True) for on in ("model", "layer") for how in ("fit", "batches")]


def in_places(changes, everywhere):
    """Each change in two places, some in all."""
    places = {name: (PLACES[3 * k % 8], PLACES[(3 * k + 5) % 8]) for k, name in enumerate(changes)}
    places.update((name, PLACES) for name in everywhere)
    found = [(name, place) for name in changes for place in places[name]]
    ids = [f"{name}, {'nested' if nested else 'flat'}, {on}, {how}" for name, (nested, on, how) in found]
    return pytest.mark.parametrize(
        ("change", "nested", "called_on", "how"), [(changes[name], *place) for name, place in found], ids=ids
    )


def train(model, how, x, y):
    if how == "fit":
        model.fit(x, y, batch_size=len(x), epochs=2, verbose=0)
    else:
        for _ in range(2):
            model.train_on_batch(x, y)


def changed_model(change, nested, called_on, how, tmp_path, rng, optimizer):
    before, change = change
    made = Network(nested, called_on)
    before(made, tmp_path)
    x, y = rng.normal(size=(2, 8, 4)).astype("float32")
    model = made.model
    model.compile(optimizer(), "mse")
    train(model, how, x, y)
    model.evaluate(x, y, verbose=0), model.predict(x, verbose=0)
    change(made, tmp_path)
    return model, x, y


def fresh(model, optimizer):
    """A copy that was never trained, compiled anew."""
    twin = copy.deepcopy(model)
    twin.compile(optimizer(), "mse")
    return twin


def assert_evaluates_as(twin, model, x, y):
    outputs = numpy(twin(x))
    assert_close(model.predict(x, verbose=0), outputs)
    loss = np.mean((outputs - y) ** 2) + sum(float(numpy(loss)) for loss in twin.losses)
    assert_close(model.evaluate(x, y, verbose=0), loss)


def assert_same_weights(one, other):
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        assert_close(mine, theirs)


@in_places(WORKS, [])
def test_a_change_that_leaves_what_trains_just_works(change, nested, called_on, how, tmp_path, rng):
    sgd = lambda: keras.optimizers.SGD(0.1)  # noqa: E731
    model, x, y = changed_model(change, nested, called_on, how, tmp_path, rng, sgd)
    twin = fresh(model, sgd)
    assert_evaluates_as(twin, model, x, y)
    for one in (model, twin):
        train(one, how, x, y)
    assert_same_weights(model, twin)


@in_places(HAS_TO_BE_COMPILED, ["tie"])
def test_a_change_of_what_trains_asks_for_compile(change, nested, called_on, how, tmp_path, rng):
    momentum = lambda: keras.optimizers.SGD(0.1, momentum=0.9)  # noqa: E731
    model, x, y = changed_model(change, nested, called_on, how, tmp_path, rng, momentum)
    twin = fresh(model, momentum)
    assert_evaluates_as(twin, model, x, y)
    before = model.get_weights()
    for again in ("fit", "train_on_batch"):
        with pytest.raises(TetherError, match="Compile the model again before `fit`"):
            train(model, again, x, y)
    model.compile(model.optimizer, "mse")
    with pytest.raises(TetherError, match="with a new optimizer"):
        train(model, how, x, y)
    assert all(np.array_equal(mine, kept) for mine, kept in zip(model.get_weights(), before, strict=True))
    model.compile(momentum(), "mse")
    for one in (model, twin):
        train(one, how, x, y)
    assert_same_weights(model, twin)
    assert slot_count(model.optimizer) == slot_count(twin.optimizer)


# --------------------------------------------------------------------------- which models are found


def two_models_with_one_layer():
    shared, x, y = layers.Dense(4, name="shared"), keras.Input((4,)), keras.Input((4,))
    one = keras.Model(x, layers.Dense(4, name="one")(shared(x)))
    other = keras.Sequential([y, layers.Dense(4, name="other"), shared])
    return one, other, shared


def test_each_of_two_models_with_the_layer_asks_and_no_other_model(rng):
    one, other, shared = two_models_with_one_layer()
    apart = network(nested=False)
    x = rng.normal(size=(8, 4)).astype("float32")
    for model in (one, other, apart):
        model.compile("adam", "mse")
        model.fit(x, x, verbose=0), model.predict(x, verbose=0)
    traced = apart.train_function, apart.predict_function
    tether.tie(shared, kernel=tether.weight_of(one, "one/kernel"))
    assert (apart.train_function, apart.predict_function) == traced
    assert not {"make_train_function", "make_predict_function"} & set(vars(apart))
    for model in (one, other):
        for _ in range(2):
            with pytest.raises(TetherError, match="Compile the model again"):
                model.fit(x, x, verbose=0)
        model.compile("adam", "mse")
        model.fit(x, x, verbose=0)
        assert not {"make_train_function", "make_predict_function"} & set(vars(model))
    apart.fit(x, x, verbose=0)
    assert apart.train_function is traced[0]


def test_a_model_that_only_predicts_is_traced_anew(rng):
    model, x = network(nested=True), rng.normal(size=(8, 4)).astype("float32")
    model.predict(x, verbose=0)
    two = model.get_layer("inner").get_layer("two")
    kernel = tether.weight_of(two, "kernel")
    for expression, value in ((2.0 * kernel, 2 * kernel.numpy()), (kernel.T, kernel.numpy().T)):
        tether.tie(two, kernel=expression)
        weights = [numpy(v) for layer in (model.get_layer("inner").get_layer("one"), two, model.get_layer("three"))
                   for v in (layer.kernel, layer.bias)]  # fmt: skip
        weights[2] = value
        hidden = np.tanh(np.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3])
        assert_close(model.predict(x, verbose=0), hidden @ weights[4] + weights[5], 1e-4)


def test_a_model_that_was_loaded_with_its_optimizer_asks_too(rng, tmp_path):
    model, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    tether.tie(again.get_layer("two"), kernel=tether.weight_of(again.get_layer("one"), "kernel"))
    with pytest.raises(TetherError, match="Compile the model again"):
        again.fit(x, x, verbose=0)


def test_before_the_first_step_a_change_is_no_trouble(rng):
    model, x = network(nested=True), rng.normal(size=(8, 4)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    inner = model.get_layer("inner")
    tether.tie(inner, {"two/kernel": tether.weight_of(inner, "one/kernel")})
    twin = fresh(model, lambda: keras.optimizers.SGD(0.1))
    for one in (model, twin):
        train(one, "fit", x, x)
    assert_same_weights(model, twin)


def test_a_step_of_the_users_own_goes_on_if_what_trains_is_as_it_was(rng):
    class Counts(keras.Model):
        steps = 0

        def train_step(self, *args):
            self.steps += 1
            return super().train_step(*args)

    x = rng.normal(size=(8, 4)).astype("float32")
    plain = network(nested=False)
    model = Counts(plain.inputs, plain.outputs)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    tether.weight_of(model, "one/kernel")
    model.fit(x, x, verbose=0)
    tether.tie(model, {"two/kernel": tether.weight_of(model, "one/kernel")})
    with pytest.raises(TetherError, match="Compile the model again"):
        model.fit(x, x, verbose=0)


def test_a_copy_between_the_change_and_compile_is_not_compiled(rng, tmp_path):
    model, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    tether.adapters.add(model, "french", {"two/kernel": tether.low_rank(2)})
    model.save(tmp_path / "m.keras")
    for again in (copy.deepcopy(model), keras.saving.load_model(tmp_path / "m.keras")):
        assert not again.compiled
        assert_close(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert keras.models.clone_model(model).compiled


def test_a_callback_that_ties_the_model_at_work_is_refused(rng):
    model, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    refused = []

    class Ties(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(TetherError, match="not in a callback") as caught:
                tether.tie(self.model, {"two/kernel": kernel})
            refused.append(caught)

    model.compile("sgd", "mse")
    kernel = tether.weight_of(model, "one/kernel")
    model.fit(x, x, epochs=2, verbose=0, callbacks=[Ties()])
    assert len(refused) == 2 and type(model.get_layer("two")) is layers.Dense
    apart = network(nested=False)

    class TiesAnother(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            tether.weight_of(apart, "one/kernel")

    model.fit(x, x, verbose=0, callbacks=[TiesAnother()])


@keras.saving.register_keras_serializable(package="compiled")
class TiesInBuild(layers.Layer):
    """Makes its layers, and ties them, when it is first called: in the first step of training."""

    def build(self, shape):
        self.one, self.two = layers.Dense(shape[-1], name="one"), layers.Dense(shape[-1], name="two")
        self.one.build(shape), self.two.build(shape)
        tether.tie(self.two, kernel=tether.weight_of(self.one, "kernel").T)

    def call(self, x):
        return self.two(self.one(x))


def test_a_layer_that_ties_when_fit_builds_it_is_not_refused(rng):
    model, x = keras.Sequential([TiesInBuild(), layers.Dense(4)]), rng.normal(size=(8, 4)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, x, batch_size=4, epochs=2, verbose=0)
    inner = model.layers[0]
    assert np.array_equal(numpy(inner.one.kernel), numpy(inner.two.kernel).T)


def test_a_resized_weight_of_another_model_asks_there(rng):
    table = tether.Weight(rng.normal(size=(6, 4)).astype("float32"), name="table")
    models = []
    for _ in range(2):
        embed = tether.tie(layers.Embedding(6, 4), embeddings=table)
        models.append(keras.Sequential([keras.Input((3,), dtype="int32"), embed, layers.Dense(4)]))
    ids, y = rng.integers(0, 6, (8, 3)), rng.normal(size=(8, 3, 4)).astype("float32")
    for model in models:
        model.compile("adam", "mse")
        model.fit(ids, y, verbose=0), model.predict(ids, verbose=0)
    adjusted, other = models
    tether.files.resize(table, 0, 9, fill="zeros", model=adjusted)
    for model in models:
        assert model.predict(ids + 3, verbose=0).shape == (8, 3, 4)
    adjusted.fit(ids + 3, y, verbose=0)
    with pytest.raises(TetherError, match="Compile the model again"):
        other.fit(ids + 3, y, verbose=0)
    other.compile("adam", "mse")
    other.fit(ids + 3, y, verbose=0)


# --------------------------------------------------------------------------- freezing


def test_frozen_and_unfrozen_again_it_trains_on_as_if_nothing_had_been(rng):
    model, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    tether.tie(model, {"two/kernel": tether.weight_of(model, "one/kernel").T})
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    traced = model.train_function
    for _ in range(2):  # as the two models of a GAN take turns
        model.trainable = False
        model.evaluate(x, x, verbose=0)
        model.trainable = True
        model.fit(x, x, verbose=0)
        assert model.train_function is traced


def test_freezing_a_use_takes_effect_at_the_next_step_and_says_so(rng):
    sgd = lambda: keras.optimizers.SGD(0.1)  # noqa: E731
    model, x = network(nested=True), rng.normal(size=(8, 4)).astype("float32")
    inner = model.get_layer("inner")
    tether.tie(inner, {"two/kernel": tether.weight_of(inner, "one/kernel").T})
    model.compile(sgd(), "mse")
    model.fit(x, x, verbose=0)
    inner.get_layer("two").kernel.trainable = False
    twin = fresh(model, sgd)
    twin.get_layer("inner").get_layer("two").kernel.trainable = False
    with pytest.warns(UserWarning, match="What trains of the weight 'one.kernel' has changed"):
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, on PyTorch
        train(model, "train_on_batch", x, x)
    train(twin, "train_on_batch", x, x)
    assert_same_weights(model, twin)


@pytest.mark.parametrize("frozen_before", [False, True])
def test_freezing_or_unfreezing_a_whole_weight_asks_for_compile(frozen_before, rng):
    model, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    weight = tether.weight_of(model, "one/kernel")
    weight.trainable = not frozen_before
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, x, verbose=0)
    before, weight.trainable = weight.numpy(), frozen_before
    with pytest.raises(TetherError, match="Compile the model again"):
        model.train_on_batch(x, x)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, x)
    assert np.array_equal(weight.numpy(), before) is not frozen_before


# --------------------------------------------------------------------------- what it costs


@pytest.fixture
def looked(monkeypatch):
    """How often everything in memory was gone through."""
    seen, original = [], gc.get_objects
    monkeypatch.setattr(census.gc, "get_objects", lambda *generation: (seen.append(1), original(*generation))[1])
    return seen


def test_many_ties_look_for_models_once(looked, rng):
    apart, x = network(nested=False), rng.normal(size=(8, 4)).astype("float32")
    apart.compile("sgd", "mse")
    apart.fit(x, x, verbose=0)
    many = [layers.Dense(4, name=f"d{number}") for number in range(30)]
    model = keras.Sequential([keras.Input((4,)), *many])
    weight = tether.weight_of(many[0], "kernel")
    for layer in many[1:10]:
        tether.tie(layer, kernel=weight)
    assert len(looked) <= 3  # once, in three generations
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    looked.clear()
    for layer in many[10:]:
        tether.tie(layer, kernel=weight)
    assert len(looked) <= 3  # once, in three generations
    with pytest.raises(TetherError, match="Compile the model again"):
        model.fit(x, x, verbose=0)


def test_layers_that_are_not_built_look_for_nothing(looked):
    tether.weight_of(network(nested=False), "one/kernel")
    looked.clear()
    weight = tether.Weight((4, 4), name="w")
    many = [tether.tie(layers.Dense(4), kernel=weight) for _ in range(5)]
    keras.Sequential([keras.Input((4,)), *many]).compile("sgd", "mse")
    assert not looked


def calls_of_a_step(uses, rng):
    """How many Python functions a training step calls."""
    x = rng.normal(size=(4, 4)).astype("float32")
    weight = tether.Weight(rng.normal(0, 0.01, size=(4, 4)).astype("float32"), name="w")
    h = inputs = keras.Input((4,))
    for number in range(uses):
        h = h + tether.tie(layers.Dense(4), kernel=weight.T if number % 2 else weight)(h)
    model = keras.Model(inputs, h)
    model.compile("sgd", "mse")
    model.train_on_batch(x, x), model.train_on_batch(x, x)
    count = [0]
    sys.setprofile(lambda frame, event, argument: count.__setitem__(0, count[0] + (event == "call")))
    model.train_on_batch(x, x)
    sys.setprofile(None)
    return count[0]


def test_a_step_grows_with_the_uses_and_not_with_their_square(rng):
    few, some, many = (calls_of_a_step(uses, rng) for uses in (5, 10, 20))
    assert many - some <= 2.2 * (some - few)

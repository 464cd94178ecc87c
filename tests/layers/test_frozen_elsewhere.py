"""A model that holds only frozen uses of a weight leaves it as it is, to the last bit, though it trains elsewhere."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether import keras_seam

pytestmark = pytest.mark.spread

layers, optimizers = keras.layers, keras.optimizers


def weight(rng):
    return tether.Weight(rng.normal(size=(3, 3)).astype("float32"), name="w")


def trains(w):
    """A model that trains the weight."""
    return keras.Sequential([keras.Input((3,)), tether.tie(layers.Dense(3, use_bias=False, name="trains"), kernel=w)])


def dense(expression, **options):
    return tether.tie(layers.Dense(3, use_bias=False, **options), kernel=expression)


def stopped(w):
    return [dense(w.stop_gradient())]


def frozen(w):
    return [dense(w, trainable=False)]


def frozen_twice(w):
    return [dense(w.T, trainable=False), dense(2.0 * w.stop_gradient())]


def nested(w):
    return [keras.Sequential([keras.Input((3,)), layers.Activation("tanh"), dense(w.stop_gradient())])]


def multiply(inputs, table):
    return keras.ops.matmul(inputs, table)


def in_a_lambda(w):
    return [tether.Lambda(multiply, table=w.stop_gradient())]


class Holds(layers.Layer):
    """A layer that holds a weight as an attribute, as many do."""

    def __init__(self, w, **kwargs):
        super().__init__(**kwargs)
        self.table = w

    def call(self, x):
        return keras.ops.matmul(x, self.table.value)


def held_by_a_frozen_layer(w):
    return [Holds(w, trainable=False)]


WAYS = (stopped, frozen, frozen_twice, nested, in_a_lambda)


def reads(w, way, name="reads"):
    """A model that only reads the weight, and trains a layer behind it."""
    return keras.Sequential([keras.Input((3,)), *way(w), layers.Dense(3, name="own")], name=name)


def several(first):
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(first, {"own/.*": optimizers.AdamW(0.1)}))


OPTIMIZERS = {
    "AdamW": lambda: optimizers.AdamW(0.1, weight_decay=0.5),
    "SGD": lambda: optimizers.SGD(0.1, weight_decay=0.5, momentum=0.9),
    "Lion": lambda: optimizers.Lion(0.1, weight_decay=0.5),
    "Adafactor": lambda: optimizers.Adafactor(0.1, weight_decay=0.5),
    "Ftrl": lambda: optimizers.Ftrl(0.1, l2_regularization_strength=0.1),
    "clipped": lambda: optimizers.AdamW(0.1, weight_decay=0.5, global_clipnorm=0.1),
    "loss scale": lambda: optimizers.LossScaleOptimizer(optimizers.AdamW(0.1, weight_decay=0.5)),
    "accumulating": lambda: optimizers.AdamW(0.1, weight_decay=0.5, gradient_accumulation_steps=2),
    "several": lambda: several(optimizers.AdamW(0.1, weight_decay=0.5)),
}
MODES = [{}, {"run_eagerly": True}, {"jit_compile": False}]


def steps(model, x, optimizer, **options):
    model.compile(optimizer, "mse", **options)
    model.fit(x, 2 * x, batch_size=4, shuffle=False, verbose=0)
    model.train_on_batch(x, 2 * x)
    model.fit(x, 2 * x, batch_size=4, shuffle=False, verbose=0)


@pytest.fixture
def x(rng):
    return rng.normal(size=(12, 3)).astype("float32")


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_optimizer_moves_it(optimizer, rng, x):
    w = weight(rng)
    before, one, other = w.numpy(), trains(w), reads(w, stopped)
    steps(other, x, optimizer())
    assert np.array_equal(w.numpy(), before)
    assert np.abs(numpy(other.get_layer("own").kernel)).max() > 0
    steps(one, x, optimizers.SGD(0.1))
    moved = w.numpy()
    assert np.abs(moved - before).min() > 1e-4
    other.fit(x, x, batch_size=4, verbose=0)
    assert np.array_equal(w.numpy(), moved)


class Moves(keras.callbacks.Callback):
    """Adds to a weight after each epoch, as training another model in between does."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def on_epoch_end(self, epoch, logs=None):
        assert self.model is not None  # JAX puts the values back where they belong when it is asked
        self.w.assign(self.w.numpy() + 1)


@pytest.mark.parametrize("frequency", [None, 2])
def test_no_average_of_what_it_was_takes_its_place(frequency, rng, x):
    w = weight(rng)
    before, _, other = w.numpy(), trains(w), reads(w, stopped)
    average = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": frequency}
    other.compile(optimizers.AdamW(0.1, weight_decay=0.5, **average), "mse")
    other.fit(x, 2 * x, batch_size=4, epochs=2, verbose=0, callbacks=[Moves(w)])
    assert np.array_equal(w.numpy(), before + 1 + 1)
    averages = other.optimizer._model_variables_moving_average
    assert_close(other.get_layer("own").kernel, averages[1])


@pytest.mark.parametrize("way", [*WAYS, held_by_a_frozen_layer])
def test_however_it_is_frozen(way, rng, x):
    w = weight(rng)
    before, _, other = w.numpy(), trains(w), reads(w, way)
    own = numpy(other.get_layer("own").kernel).copy()
    steps(other, x, optimizers.AdamW(0.1, weight_decay=0.5))
    assert np.array_equal(w.numpy(), before)
    assert np.abs(numpy(other.get_layer("own").kernel) - own).min() > 1e-3


@pytest.mark.parametrize("mode", MODES, ids=["traced", "eager", "without a compiler"])
def test_however_it_is_run(mode, rng, x):
    w = weight(rng)
    before, _, other = w.numpy(), trains(w), reads(w, frozen)
    steps(other, x, optimizers.AdamW(0.1, weight_decay=0.5), **mode)
    assert np.array_equal(w.numpy(), before)


def test_a_layer_that_is_built_by_fit(rng, x):
    w = weight(rng)
    before, _ = w.numpy(), trains(w)
    other = keras.Sequential([*stopped(w), layers.Dense(3)])
    steps(other, x, optimizers.AdamW(0.1, weight_decay=0.5))
    assert np.array_equal(w.numpy(), before)


def test_a_model_that_is_compiled_before_it_has_the_layer(rng, x):
    w = weight(rng)
    before, _, other = w.numpy(), trains(w), keras.Sequential([keras.Input((3,))])
    other.compile(optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    for layer in (*stopped(w), layers.Dense(3)):
        other.add(layer)
    other.train_on_batch(x, x)
    assert np.array_equal(w.numpy(), before)


def test_a_model_that_is_compiled_before_it_is_tied(rng, x):
    w = weight(rng)
    before, _ = w.numpy(), trains(w)
    other = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="plain"), layers.Dense(3)])
    other.compile(optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    tether.tie(other.get_layer("plain"), kernel=w.stop_gradient())
    other.train_on_batch(x, x)
    assert np.array_equal(w.numpy(), before)


def test_a_train_step_of_the_users_own_with_metrics_of_its_own(rng, x):
    class Custom(keras.Sequential):
        own = None

        @property
        def metrics(self):
            return [self.own]

    w = weight(rng)
    before, _ = w.numpy(), trains(w)
    other = Custom([keras.Input((3,)), *stopped(w), layers.Dense(3)])
    other.own = keras.metrics.Mean(name="own")
    steps(other, x, optimizers.AdamW(0.1, weight_decay=0.5))
    assert np.array_equal(w.numpy(), before)


def test_a_weight_that_the_model_trains_too_is_decayed_as_ever(rng, x):
    w = weight(rng)
    before, _ = w.numpy(), trains(w)
    model = keras.Sequential([keras.Input((3,)), *stopped(w), dense(w)])
    model.compile(optimizers.SGD(0.1, weight_decay=0.5), "mse")
    model.train_on_batch(x, np.zeros_like(x))
    hidden = (x @ before).astype("float64")
    gradient = 2 * hidden.T @ (hidden @ before) / hidden.size
    assert_close(w.numpy(), before * (1 - 0.1 * 0.5) - 0.1 * gradient, 1e-4)


def test_only_frozen_weights_leave_nothing_to_train(rng, x):
    w = weight(rng)
    before, _ = w.numpy(), trains(w)
    model = keras.Sequential([keras.Input((3,)), *frozen(w)])
    model.compile(optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    model.build((None, 3))
    if keras.backend.backend() != "torch":  # which has nothing to differentiate then, and says so
        model.train_on_batch(x, x)
    assert np.array_equal(w.numpy(), before)


def test_unfrozen_and_compiled_again_it_trains_and_decays(rng, x):
    w = weight(rng)
    trains(w)
    layer = dense(w, trainable=False)
    model = keras.Sequential([keras.Input((3,)), layer])
    own = keras.Sequential([keras.Input((3,)), layer, layers.Dense(3)])
    steps(own, x, optimizers.SGD(0.1, weight_decay=0.5))
    before = w.numpy()
    layer.trainable = True
    model.compile(optimizers.SGD(0.1, weight_decay=0.5), "mse")
    model.train_on_batch(x, np.zeros_like(x))
    gradient = 2 * x.astype("float64").T @ (x @ before) / x.size
    assert_close(w.numpy(), before * (1 - 0.1 * 0.5) - 0.1 * gradient, 1e-4)


def test_a_copy_is_looked_after_as_its_original(rng, x, tmp_path):
    w = weight(rng)
    first, other = trains(w), reads(w, stopped)
    steps(other, x, optimizers.AdamW(0.1, weight_decay=0.5))
    with tether.sharing():
        first.save(tmp_path / "first.keras"), other.save(tmp_path / "other.keras")
        first = keras.saving.load_model(tmp_path / "first.keras")
        again = keras.saving.load_model(tmp_path / "other.keras")
    before = first.get_weights()
    again.fit(x, x, verbose=0)
    assert np.array_equal(first.get_weights()[0], before[0])


def test_the_optimizer_keeps_a_slot_for_it_as_keras_asks(rng, x):
    w = weight(rng)
    trains(w)
    model = reads(w, stopped)
    model.compile(optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, x, verbose=0)
    assert len(model.optimizer.variables) == 2 + len(model.trainable_variables) == 5
    assert all(one is other for one, other in zip(
        keras_seam.optimized_variables(model.optimizer), model.trainable_variables, strict=True))  # fmt: skip


@pytest.mark.parametrize("on_epoch", [False, True])
def test_averages_do_not_take_the_place_of_a_weight_that_trains_elsewhere(rng, on_epoch):
    weight = tether.Weight(name="w")
    trains = keras.Sequential(
        [keras.Input((6,)), tether.tie(keras.layers.Dense(6, use_bias=False), kernel=weight)], name="trains"
    )
    reads = tether.tie(keras.layers.Dense(6, use_bias=False), kernel=weight.stop_gradient().T)
    still = keras.Sequential([keras.Input((6,)), reads, keras.layers.Dense(6, name="own")], name="still")
    trains.compile(keras.optimizers.SGD(1.0), "mse")
    still.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9), "mse")
    x = rng.normal(size=(8, 6)).astype("float32")
    still.train_on_batch(x, x)
    trains.train_on_batch(x, x)
    before, own = weight.numpy().copy(), numpy(still.get_layer("own").kernel)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
    still.fit(x, x, epochs=2, validation_data=(x, x), verbose=0, callbacks=[swap])
    np.testing.assert_array_equal(weight.numpy(), before)
    assert np.abs(numpy(still.get_layer("own").kernel) - own).max() > 0

"""Learning rates of their own for some weights: steps by hand, other optimizers, files, precision, accumulation."""

import copy
import re

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether import adapters
from tether.adapters import learning_rates
from tether.errors import InvalidConfig, TetherError, UnknownName

pytestmark = pytest.mark.spread

layers, optimizers = keras.layers, keras.optimizers
PROPORTIONAL = ("SGD", "Adam", "AdamW", "Nadam", "RMSprop", "Lion", "Adamax", "Adadelta", "Adagrad", "Lamb", "Muon")
KNOWN = [name for name in PROPORTIONAL if hasattr(optimizers, name)]
X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
A, B, BIAS = "d/kernel_lora_a", "d/kernel_lora_b", "d/bias_full"


def make_model(dtype=None):
    keras.utils.set_random_seed(3)
    x = keras.Input((6,))
    model = keras.Model(x, layers.Dense(3, name="d", dtype=dtype)(x))
    model.trainable = False
    adapters.add(model, "a", {"*/kernel": tether.low_rank(2)}, also="d/bias")
    for weight in adapters.manage.own_weights(model)["a"]:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    return model


def values(model):
    return {v.path: np.array(numpy(v.value)) for v in model.trainable_variables}


def moved(optimizer, epochs=1, model=None, **compiled):
    """How far each weight is moved by some steps."""
    model = model or make_model()
    model.compile(optimizer, "mse", **compiled)
    before = values(model)
    model.fit(X, Y, epochs=epochs, batch_size=8, shuffle=False, verbose=0)
    return {path: value - before[path] for path, value in values(model).items()}


def test_a_step_is_the_one_computed_by_hand():
    model = make_model()
    layer, now = model.get_layer("d"), values(model)
    base = numpy(layer.kernel.expression.base.value)
    error = X @ (base + now[A] @ now[B]) + now[BIAS] - Y
    slope = 2 * error / error.size
    right = {A: X.T @ slope @ now[B].T, B: now[A].T @ X.T @ slope, BIAS: slope.sum(0)}
    found = moved(learning_rates(optimizers.SGD(0.01)), model=model)
    for path, factor in {A: 1, B: 16, BIAS: 1}.items():
        assert_close(found[path], -0.01 * factor * right[path], 1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", KNOWN)
def test_each_optimizer_steps_as_far_as_with_that_learning_rate(name, decay):
    def make(rate):
        return getattr(optimizers, name)(rate, weight_decay=decay)

    one, fast = moved(make(1e-3)), moved(make(8e-3))
    found = moved(learning_rates(make(1e-3), {"*_lora_b": 8, "d/bias*": 1.0}))
    for path, expected in {A: one[A], BIAS: one[BIAS], B: fast[B]}.items():
        np.testing.assert_allclose(found[path], expected, rtol=2e-3, atol=5e-6)


def test_many_steps_of_momentum_are_those_of_two_rates():
    def make(rate):
        return optimizers.Nadam(rate)

    # One weight trains at a time, so that neither sees what the other does.
    for path, factor in ((A, 1.0), (B, 4.0)):
        only = {}
        for made in (make(0.01 * factor), learning_rates(make(0.01), {"d/*": 7.0, path: factor})):
            model = make_model()
            for weight in adapters.manage.own_weights(model)["a"]:
                weight.trainable = weight.path == path
            only[made] = moved(made, 5, model)[path]
        assert_close(*only.values(), 1e-4)


def test_a_schedule_a_clip_and_a_later_rate_are_kept():
    schedule = optimizers.schedules.PiecewiseConstantDecay([0], [0.01, 0.001])
    found = learning_rates(optimizers.SGD(schedule, global_clipnorm=1e-3))
    one, two = moved(optimizers.SGD(schedule, global_clipnorm=1e-3)), moved(found)
    assert_close(two[B], 16 * one[B], 1e-4)
    assert float(numpy(found.learning_rate)) == pytest.approx(0.001)
    plain, rated = optimizers.SGD(0.5), learning_rates(optimizers.SGD(0.5))
    plain.learning_rate = rated.learning_rate = 0.001
    assert_close(moved(rated)[B], 16 * moved(plain)[B], 1e-4)


def test_gradients_are_accumulated():
    def fit(optimizer):
        model = make_model()
        model.compile(optimizer, "mse")
        before = values(model)
        model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        return {path: value - before[path] for path, value in values(model).items()}

    whole = fit(optimizers.SGD(0.01, gradient_accumulation_steps=2))
    found = fit(learning_rates(optimizers.SGD(0.01, gradient_accumulation_steps=2)))
    assert_close(found[A], whole[A], 1e-4)
    assert_close(found[B], 16 * whole[B], 1e-4)


def test_a_loss_scale_goes_around_it():
    model = make_model("mixed_float16")
    model.compile(optimizers.LossScaleOptimizer(learning_rates(optimizers.SGD(1e-3)), initial_scale=8.0), "mse")
    before = values(model)
    model.fit(X, Y, batch_size=8, verbose=0)
    other = make_model("mixed_float16")
    one = moved(optimizers.LossScaleOptimizer(optimizers.SGD(1e-3), initial_scale=8.0), model=other)
    assert_close(values(model)[B] - before[B], 16 * one[B], 2e-2)
    with pytest.raises(TetherError, match="goes around"):
        learning_rates(optimizers.LossScaleOptimizer(optimizers.SGD()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_training_goes_on_after_a_file_as_if_there_had_been_none(wrapped, tmp_path):
    def make():
        model = make_model()
        found = learning_rates(optimizers.Adam(0.01), {("*", "!*_a"): 2, re.compile(r".*_LORA_B", re.I): 8.0})
        model.compile(optimizers.LossScaleOptimizer(found) if wrapped else found, "mse")
        return model

    straight, broken = make(), make()
    straight.fit(X, Y, epochs=4, batch_size=8, shuffle=False, verbose=0)
    broken.fit(X, Y, epochs=2, batch_size=8, shuffle=False, verbose=0)
    broken.save(tmp_path / "model.keras")
    for load in (tether.files.load_model, keras.models.load_model):
        again = load(tmp_path / "model.keras")
        inner = again.optimizer.inner_optimizer if wrapped else again.optimizer
        assert isinstance(inner, optimizers.Adam)
        assert list(inner.multipliers.values()) == [2.0, 8.0]
        again.fit(X, Y, epochs=2, batch_size=8, shuffle=False, verbose=0)
        for one, other in zip(straight.variables, again.variables, strict=True):
            assert_close(one.value, other.value, 1e-4)


@pytest.mark.slow
def test_a_step_that_is_compiled():
    for jit in (True, False):
        one = moved(optimizers.Adam(1e-3), jit_compile=jit)
        found = moved(learning_rates("adam"), jit_compile=jit)
        np.testing.assert_allclose(found[B], 16 * one[B], rtol=1e-2)


def test_what_is_compiled_again_with_more_adapters_has_its_rates():
    model = make_model()
    model.compile(learning_rates(optimizers.SGD(0.01)), "mse")
    model.fit(X, Y, verbose=0)
    adapters.add(model, "b", {"*/kernel": tether.low_rank(1, start="gaussian")})
    for weight in adapters.manage.own_weights(model)["b"]:
        weight.assign(np.ones(weight.shape))
    before = values(model)
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    model.compile(learning_rates(optimizers.SGD(0.01)), "mse")
    other.compile(optimizers.SGD(0.01), "mse")
    for each in (model, other):
        each.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for one, two, (path, was) in zip(model.trainable_variables, other.trainable_variables, before.items(), strict=True):
        factor = 16 if "lora_b" in path else 1
        assert_close(numpy(one.value) - was, factor * (numpy(two.value) - was), 1e-4)
    assert sum("lora_b" in path for path in before) == 2


def test_bad_arguments_are_refused():
    for multipliers in ({}, None, {"*": 0}, {"*": -1.0}, {"*": float("inf")}, {"*": True}, {"*": "fast"}, {3: 1.0}):
        with pytest.raises(TetherError):
            learning_rates("sgd", multipliers)
    for optimizer in ("no such", 3, None):
        with pytest.raises(TetherError):
            learning_rates(optimizer)
    with pytest.raises(TetherError, match="already"):
        learning_rates(learning_rates("sgd"))
    stepped = optimizers.SGD()
    stepped.build(make_model().trainable_variables)
    with pytest.raises(TetherError, match="stepped"):
        learning_rates(stepped)
    with pytest.raises(UnknownName, match="lora_b"):
        moved(learning_rates("sgd", {"*_lora_c": 2.0}))


def test_a_stranger_s_config_is_checked():
    good = optimizers.serialize(learning_rates("sgd"))
    again = optimizers.deserialize(copy.deepcopy(good))
    assert optimizers.serialize(again) == good
    assert good["config"]["optimizer"]["module"] == "keras.optimizers"  # and not that of one backend
    wrong = 3, [["*", 1.0]], [[["*"], 0]], [[[{"regex": "("}], 1.0]], [[[{"regex": "(", "flags": 0}], 1.0]]
    for change in (*({"multipliers": each} for each in wrong), {"x": 1}, {"optimizer": 3}):
        with pytest.raises(InvalidConfig):
            optimizers.deserialize({**good, "config": {**good["config"], **change}})


def test_the_given_optimizer_stays_as_it_is():
    given = optimizers.SGD(0.25, momentum=0.5, name="mine")
    found = learning_rates(given)
    assert type(given) is type(optimizers.SGD()) and found is not given and not hasattr(given, "multipliers")
    assert isinstance(found, optimizers.SGD) and found.momentum == 0.5 and found.name == "mine"

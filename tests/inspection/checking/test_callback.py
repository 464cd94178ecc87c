"""The check as a callback: what raises, what is warned of, and when."""

import warnings

import keras
import numpy as np
import pytest

import tether
from tests.inspection.checking.faults import FAULTS, normal, tied_pair
from tests.support import numpy
from tether.errors import TetherError, UnknownName

layers = keras.layers


def faulty(name, rng):
    model, _ = FAULTS[name].make(rng, True)
    model.compile("sgd", "mse")
    inputs = normal(rng, 4, *model.input_shape[1:])
    return model, (inputs, np.zeros((4, *model.output_shape[1:]), "float32"))


class Epochs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.begun = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.begun += 1


def fit(model, data, *callbacks, epochs=1):
    model.fit(*data, batch_size=2, epochs=epochs, verbose=0, callbacks=list(callbacks))


def test_an_error_raises_before_the_first_epoch_and_nothing_has_trained(rng):
    model, data = faulty("a_variable_in_a_closure", rng)
    before = [numpy(variable).copy() for variable in model.weights]
    epochs = Epochs()
    with pytest.raises(
        TetherError, match=r"(?s)captured-variable  scaled/function.*ignore=\['captured-variable:scaled/"
    ):
        fit(model, data, epochs, tether.CheckCallback())
    assert epochs.begun == 0
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


def test_what_is_known_to_be_right_is_left_out(rng):
    model, data = faulty("a_variable_in_a_closure", rng)
    epochs = Epochs()
    fit(
        model, data, epochs, tether.CheckCallback(ignore=["captured-variable:scaled/function"])
    )  # a warning would be an error
    assert epochs.begun == 1
    with pytest.raises(UnknownName, match="no rule 'captured'"):
        fit(model, data, tether.CheckCallback(ignore=["captured"]))


def warnings_of(function, *arguments, **options):
    """What a call warns of; deprecations inside Keras aside, which `pytest.warns` would raise again as errors."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        function(*arguments, **options)
    return [str(one.message) for one in said]


def test_nothing_raises_if_nothing_should_and_each_finding_is_warned_of_once(rng):
    model, data = faulty("a_variable_in_a_closure", rng)
    callback = tether.CheckCallback(raise_on=None)
    (said,) = warnings_of(fit, model, data, callback, epochs=2)
    assert "captured-variable  scaled/function" in said
    assert warnings_of(fit, model, data, callback) == []
    assert len(warnings_of(fit, model, data, tether.CheckCallback(raise_on=None))) == 1


def two_equal(rng):
    """Two heads that start equal, which is a warning."""
    x, value = keras.Input((4,)), normal(rng, 4, 40)
    heads = [layers.Dense(40, name=name, kernel_initializer=lambda *_, **__: value * 1) for name in ("one", "two")]
    model = keras.Model(x, layers.Add()([head(x) for head in heads]))
    model.compile("sgd", "mse")
    return model, (normal(rng, 4, 4), normal(rng, 4, 40))


def test_a_warning_is_a_warning_unless_it_is_to_raise(rng):
    model, data = two_equal(rng)
    assert [finding.severity for finding in tether.check(model)] == ["warning"]
    (said,) = warnings_of(fit, model, data, tether.CheckCallback())
    assert "equal-weights" in said
    model, data = two_equal(rng)
    with pytest.raises(TetherError, match="equal-weights"):
        fit(model, data, tether.CheckCallback(raise_on="warning"))


class Subclassed(keras.Model):
    """Built by its first call."""

    def __init__(self):
        super().__init__()
        kernel = np.random.default_rng(0).normal(size=(4, 40)).astype("float32")
        self.heads = [layers.Dense(40, name=name, kernel_initializer=lambda *_, **__: kernel * 1) for name in "ab"]

    def call(self, x):
        return sum(head(x) for head in self.heads)


def test_a_model_that_fit_builds_is_checked(rng):
    model = Subclassed()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    (said,) = warnings_of(fit, model, (normal(rng, 4, 4), normal(rng, 4, 40)), tether.CheckCallback())
    assert "equal-weights" in said


def test_a_model_that_its_first_step_builds_is_checked_after_it(rng):
    model, _ = two_equal(rng)
    callback = tether.CheckCallback()
    callback.set_model(model)
    model.built = False
    assert warnings_of(callback.on_train_begin) == []
    model.built = True
    (said,) = warnings_of(callback.on_train_batch_end, 0)
    assert "equal-weights" in said
    callback._warned.clear()
    assert warnings_of(callback.on_train_batch_end, 1) == []


def test_a_sound_model_trains_as_without(rng):
    model, _ = tied_pair(rng)
    model.compile("adam", "mse")
    fit(
        model, (normal(rng, 4, 6), normal(rng, 4, 6)), tether.CheckCallback(raise_on="warning")
    )  # a warning would be an error


def test_what_it_takes_is_checked():
    with pytest.raises(TetherError, match="raise_on"):
        tether.CheckCallback(raise_on="hint")
    with pytest.raises(TetherError, match="several names"):
        tether.CheckCallback(ignore="many-uses")

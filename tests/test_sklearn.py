"""Tied models in Keras's wrappers for scikit-learn: what `docs/saving.md` says of them."""

import pickle

import keras
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_validate

import tether
from tests.support import numpy

layers = keras.layers
Classifier = keras.wrappers.SKLearnClassifier
pytestmark = pytest.mark.slow
QUIET = {"epochs": 1, "verbose": 0}


def make_model(X, y, units=4, codec=None):
    codec = tether.Weight((8, units), "glorot_uniform", name="codec") if codec is None else codec
    x = keras.Input((8,))
    h = tether.tie(layers.Dense(units, activation="tanh", name="encode"), kernel=codec)(x)
    h = tether.tie(layers.Dense(8, name="decode"), kernel=codec.T)(h)
    model = keras.Model(x, layers.Dense(2, activation="softmax", name="head")(h))
    model.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy")
    return model


@pytest.fixture
def data(rng):
    X = rng.normal(size=(60, 8)).astype("float32")
    return X, (X[:, 0] > 0).astype("int64")


def kernels(model):
    """What the layers of a tied model compute with, which has to be one stored weight."""
    (shared,) = tether.inspection.facts(model).shared()
    assert shared.shape[0] == 8
    encode, decode = (numpy(model.get_layer(name).kernel.value) for name in ("encode", "decode"))
    np.testing.assert_array_equal(encode, decode.T)
    return encode


def test_a_function_makes_a_tied_model_for_each_fit(data):
    found = cross_validate(Classifier(make_model), *data, cv=2, params=QUIET, return_estimator=True)
    one, other = (estimator.model_ for estimator in found["estimator"])
    assert not np.array_equal(kernels(one), kernels(other))
    assert not {id(variable) for variable in one.weights} & {id(variable) for variable in other.weights}


def test_a_search_over_arguments_of_the_function(data):
    choices = {"model_kwargs": [{"units": 2}, {"units": 3}]}
    search = GridSearchCV(Classifier(make_model), choices, cv=2, error_score="raise").fit(*data, **QUIET)
    best = search.best_estimator_
    assert kernels(best.model_).shape == (8, search.best_params_["model_kwargs"]["units"])
    again = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(kernels(again.model_), kernels(best.model_))
    np.testing.assert_array_equal(again.predict(data[0]), best.predict(data[0]))


def test_a_model_is_cloned_tied_and_starts_anew(data):
    model = make_model(*data)
    before = kernels(model).copy()
    fitted = Classifier(model).fit(*data, **QUIET).model_
    assert fitted is not model
    np.testing.assert_array_equal(kernels(model), before)
    assert not np.allclose(kernels(fitted), before, atol=0.05)  # a step of Adam is 0.01
    assert Classifier(model, warm_start=True).fit(*data, **QUIET).model_ is not model


def test_a_weight_made_outside_of_the_function_is_trained_by_every_fit(data):
    estimator = Classifier(make_model, model_kwargs={"codec": tether.Weight((8, 4), "glorot_uniform", name="codec")})
    first = estimator.fit(*data, **QUIET).model_
    after = kernels(first).copy()
    second = estimator.fit(*data, **QUIET).model_
    assert second is not first
    np.testing.assert_array_equal(kernels(first), kernels(second))
    assert not np.array_equal(kernels(first), after)


def test_copies_of_an_estimator_lose_the_arguments_of_fit():
    assert clone(Classifier(make_model, fit_kwargs=QUIET)).fit_kwargs is None

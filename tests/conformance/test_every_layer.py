"""Every layer of Keras, every weight of it: tied, it is as the plain layer is.

Each weight is tied before and after the layer is built, to a fresh Weight and to an expression that
equals the original, and the layer is held beside a plain twin with the same values.
"""

import contextlib
import inspect

import keras
import numpy as np
import pytest

import tether
from tests import support
from tests.conformance.catalogue import NOT_MADE, NOT_TIED, WITH_WEIGHTS, WITHOUT_WEIGHTS, layer_classes
from tether.layers.tying import paths as layer_paths
from tether.layers.tying.state import View

EXCEPTIONS = {
    ("Normalization", "mean"): "it computes with constants that it derives from its weights",
    ("Normalization", "variance"): "it computes with constants that it derives from its weights",
    ("Normalization", "count"): "it computes with constants that it derives from its weights",
    ("SpectralNormalization", "kernel"): "it overwrites the kernel of its layer at every training step",
    ("SpectralNormalization", "inner/kernel"): "it overwrites the kernel of its layer at every training step",
}
"""Weights that cannot be tied, by class and path, with the reason. A user who tries gets a TetherError."""

ALL_EXCEPTED = {"Normalization"}
"""Classes of which no weight can be tied."""

TIED = [case for case in WITH_WEIGHTS if case.class_name not in ALL_EXCEPTED]
WAYS = [(when, form) for when in ("before", "after") for form in ("weight", "expression")]


def reshaped(w, shape):
    return w.reshape(shape)


EXPRESSIONS = [lambda w, shape: 1.0 * w, lambda w, shape: tether.ops.negative(-w), reshaped, lambda w, shape: w.T.T]


def is_quick(case, way, place):
    """Of a case whose ways are all quick two are run, in turn: each case meets each when and each form.

    So the pairs of case, when and form are covered; the rest is left to the slow tests.
    """
    if case.quick == "all":
        return (WAYS.index(way) in (0, 3)) == bool(place % 2)
    return case.quick == "one" and way == ("before", "expression")


def every_way(cases=TIED):
    """Every case in every way; the slow ones are marked."""
    return [
        pytest.param(
            case, *way, id="-".join((str(case), *way)), marks=[] if is_quick(case, way, place) else [pytest.mark.slow]
        )
        for place, case in enumerate(cases)
        for way in WAYS
    ]


# --------------------------------------------------------------------------- helpers


@contextlib.contextmanager
def at(*words):
    """Says in a failure which weight and which step it was."""
    try:
        yield
    except BaseException as error:
        error.add_note("at: " + ", ".join(map(str, words)))
        raise


def tied_paths(case, plain):
    """The paths that can be tied, the same in every instance of the layer, with the variables of the plain one."""
    found = {}
    for path in layer_paths.weight_paths(plain):
        if (case.class_name, path) not in EXCEPTIONS:
            place = layer_paths.locate(plain, layer_paths.split(path))
            found.setdefault("/".join(place.recorded_path), place.variable)
    assert found, "no weight of it can be tied"
    return found


def expression_at(layer, path):
    """What the weight of that path is tied to."""
    variable = layer_paths.locate(layer, layer_paths.split(path)).variable
    assert isinstance(variable, View), f"{path} is not tied"
    return variable.expression


def weight_at(layer, path):
    (weight,) = expression_at(layer, path).weights_used()
    return weight


def plain_twin(case):
    """The layer as Keras makes it, with values that no initializer gives."""
    plain = case.built()
    rng = np.random.default_rng(5)
    values = []
    for variable in plain.weights:
        value = rng.uniform(0.2, 0.9, variable.shape) * (
            rng.choice([-1, 1], variable.shape) if variable.trainable else 1
        )
        values.append(value.astype("float32") if "float" in variable.dtype else np.ones(variable.shape, variable.dtype))
    plain.set_weights(values)
    return plain


def fresh(variable, form, number, start=None):
    """A new Weight, and what the layer is tied to: the Weight itself, or an expression over it that equals it."""
    shape = tuple(variable.shape)
    if form == "weight":
        weight = tether.Weight(start, name="tied")
        return weight, weight
    express = EXPRESSIONS[number % len(EXPRESSIONS)] if "float" in variable.dtype else reshaped
    # Any weight of so many elements would do for a reshaped one, so that one needs a shape.
    weight = tether.Weight(shape if start is None and express is reshaped else start, name="tied")
    return weight, express(weight, shape)


def tied_twin(case, expressions, when):
    """The layer with these weights tied, built."""
    layer = case.make()
    if when == "after":
        layer(*case.sample())
    assert tether.tie(layer, expressions) is layer
    layer(*case.sample())
    return layer


def outputs(layer, case, seed=8, **options):
    return [support.numpy(x) for x in keras.tree.flatten(layer(*case.sample(seed), **options))]


def assert_outputs(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        support.assert_close(a, b, 1e-6)


def gradients_of(layer, case):
    """The gradient of a loss of all outputs with respect to each trainable stored variable, in the layer's order."""
    sample = keras.tree.map_structure(keras.ops.convert_to_tensor, case.sample(8))

    def loss():
        total = 0.0
        for number, output in enumerate(keras.tree.flatten(layer(*sample))):
            shape = tuple(output.shape)
            factors = np.cos(np.arange(np.prod(shape, dtype=int)) + number).reshape(shape).astype("float32")
            total = total + keras.ops.sum(keras.ops.cast(output, "float32") * keras.ops.convert_to_tensor(factors))
        return total

    variables = layer.trainable_weights
    value, found = support.gradients(loss, variables)
    return value, [support.as_zero(g, tuple(v.shape)) for g, v in zip(found, variables, strict=True)]


# --------------------------------------------------------------------------- what is covered


def test_every_class_is_known():
    made = {case.class_name for case in [*WITH_WEIGHTS, *WITHOUT_WEIGHTS]} | set(NOT_TIED)
    assert not made & set(NOT_MADE)
    known = made | set(NOT_MADE)
    missing = sorted(set(layer_classes()) - known)
    assert not missing, f"the catalogue has to learn to make {missing}"


def test_every_class_with_weights_has_quick_tests():
    quick = {param.values[0].class_name for param in every_way() if not param.marks}
    assert quick == {case.class_name for case in TIED}


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=str)
def test_every_weight_has_a_path_or_a_reason(case):
    plain = case.built()
    excepted = [path for path in layer_paths.weight_paths(plain) if (case.class_name, path) in EXCEPTIONS]
    owners = {v.path for v in plain.weights}
    if case.class_name in ALL_EXCEPTED:
        assert len(excepted) == len(owners)
    else:
        left = owners - {v.path for v in tied_paths(case, plain).values()}
        assert len(left) <= len(excepted), f"{left} have no path"
        assert excepted or not left


# --------------------------------------------------------------------------- as the plain layer


@pytest.mark.parametrize(("case", "when", "form"), every_way())
def test_computes_and_learns_as_the_plain_layer(case, when, form):
    plain = plain_twin(case)
    wanted = outputs(plain, case)
    flags = [variable.trainable for variable in plain.weights]
    if any(flags):
        wanted_loss, wanted_gradients = gradients_of(plain, case)
    for number, (path, variable) in enumerate(tied_paths(case, plain).items()):
        with at(case, when, form, path):
            weight, expression = fresh(variable, form, number)
            tied = tied_twin(case, {path: expression}, when)
            assert isinstance(tied, type(plain))
            assert weight_at(tied, path) is weight
            tied.set_weights(plain.get_weights())
            support.assert_close(weight.value, variable.value, 0)
            for mine, theirs in zip(tied.get_weights(), plain.get_weights(), strict=True):
                np.testing.assert_array_equal(mine, theirs)
            assert_outputs(outputs(tied, case), wanted)
            assert tied.count_params() == plain.count_params()
            assert [v.trainable for v in tied.weights] == flags
            assert any(v is weight.variable for v in tied.weights)
            if any(flags):
                loss, found = gradients_of(tied, case)
                assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-5)
                for mine, theirs in zip(found, wanted_gradients, strict=True):
                    support.assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize(("case", "when", "form"), every_way())
def test_a_tie_after_build_keeps_the_values_and_a_weight_brings_its_own(case, when, form):
    plain = plain_twin(case)
    wanted = outputs(plain, case)
    for number, (path, variable) in enumerate(tied_paths(case, plain).items()):
        with at(case, when, form, path):
            if when == "after":
                layer = case.built()
                layer.set_weights(plain.get_weights())
                _, expression = fresh(variable, form, number)
                tether.tie(layer, {path: expression})
            else:
                layer = case.make()
                weight, expression = fresh(variable, form, number, support.numpy(variable.value))
                tether.tie(layer, {path: expression})
                layer(*case.sample())
                support.assert_close(weight.value, variable.value, 0)
                layer.set_weights(plain.get_weights())
            assert_outputs(outputs(layer, case), wanted)


STATEFUL = [case for case in TIED if case.class_name in ("BatchNormalization", "SpectralNormalization")]


def test_the_layers_with_state_are_found():
    changing = set()
    for case in TIED:
        layer = case.make()
        if case.quick == "all" and "training" in inspect.signature(layer.call).parameters:
            layer(*case.sample())
            if layer.non_trainable_weights:
                changing.add(case.class_name)
    assert changing == {case.class_name for case in STATEFUL}


@pytest.mark.parametrize(("case", "when", "form"), every_way(STATEFUL))
def test_a_call_in_training_changes_state_as_in_the_plain_layer(case, when, form):
    plain = plain_twin(case)
    start = plain.get_weights()
    for number, (path, variable) in enumerate(tied_paths(case, plain).items()):
        with at(case, when, form, path):
            plain.set_weights(start)
            _, expression = fresh(variable, form, number)
            tied = tied_twin(case, {path: expression}, when)
            tied.set_weights(start)
            for seed in (20, 21):
                assert_outputs(outputs(tied, case, seed, training=True), outputs(plain, case, seed, training=True))
            assert any((a != b).any() for a, b in zip(plain.get_weights(), start, strict=True)), "no state changed"
            for mine, theirs in zip(tied.get_weights(), plain.get_weights(), strict=True):
                support.assert_close(mine, theirs, 1e-6)
            assert_outputs(outputs(tied, case), outputs(plain, case))


# --------------------------------------------------------------------------- it survives


def sharing_model(case, variables, when, form):
    """A model of two layers of the kind that share the weights of these paths, with the two layers and the weights."""
    weights, expressions = {}, {}
    for number, (path, variable) in enumerate(variables.items()):
        weights[path], expressions[path] = fresh(variable, form, number)
    first, second = (tied_twin(case, expressions, when) for _ in range(2))
    inputs = case.symbolic()
    results = keras.tree.flatten([first(*inputs), second(*inputs)])
    return keras.Model(keras.tree.flatten(inputs), results), first, second, weights


def assert_same_model(copy, model, first, second, weights, case):
    sample = keras.tree.flatten(case.sample(8))
    ours, theirs = copy.get_layer(first.name), copy.get_layer(second.name)
    for path, weight in weights.items():
        with at(path):
            assert weight_at(ours, path) is weight_at(theirs, path), "the two layers share no longer"
            assert weight_at(ours, path) is not weight, "the copy shares with the original"
            assert expression_at(ours, path).notation() == expression_at(first, path).notation()
    assert copy.count_params() == model.count_params()
    for name in ("weights", "trainable_weights"):
        assert [tuple(v.shape) for v in getattr(copy, name)] == [tuple(v.shape) for v in getattr(model, name)]
    assert_outputs(
        [support.numpy(x) for x in keras.tree.flatten(copy(sample))],
        [support.numpy(x) for x in keras.tree.flatten(model(sample))],
    )


@pytest.mark.parametrize(("case", "when", "form"), every_way())
def test_survives_saving_loading_and_copying(case, when, form, tmp_path):
    plain = plain_twin(case)
    wanted = outputs(plain, case)
    places = list(tied_paths(case, plain).items())
    # Every second one, so that a layer has tied weights and some of its own.
    for group in filter(None, (dict(places[::2]), dict(places[1::2]))):
        with at(case, when, form, *group):
            model, first, second, weights = sharing_model(case, group, when, form)
            first.set_weights(plain.get_weights())
            second.set_weights(plain.get_weights())
            shared = sum(int(np.prod(variable.shape, dtype=int)) for variable in group.values())
            assert model.count_params() == 2 * plain.count_params() - shared

            with at("saved and loaded"):
                file = tmp_path / "model.keras"
                model.save(file)
                loaded = keras.saving.load_model(file)
                assert_same_model(loaded, model, first, second, weights, case)

            with at("cloned"):
                clone = keras.models.clone_model(model)
                clone.set_weights(model.get_weights())
                assert_same_model(clone, model, first, second, weights, case)

            with at("from_config(get_config())"):
                copy = type(first).from_config(first.get_config())
                copy(*case.sample())
                copy.set_weights(plain.get_weights())
                assert_outputs(outputs(copy, case), wanted)
                assert copy.count_params() == plain.count_params()
                for path, weight in weights.items():
                    assert weight_at(copy, path) is not weight
                    weight_at(copy, path).assign(keras.ops.zeros_like(weight.value))
                assert_outputs(outputs(first, case), wanted)


# --------------------------------------------------------------------------- all weights at once


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", [case for case in TIED if case.quick == "all"], ids=str)
def test_all_weights_tied_at_once(case, when):
    plain = plain_twin(case)
    layer = case.make() if when == "before" else case.built()
    places = list({id(v): path for path, v in reversed(tied_paths(case, plain).items())}.values())
    weights = {path: tether.Weight(name="all") for path in places}
    tether.tie(layer, weights)
    layer(*case.sample())
    layer.set_weights(plain.get_weights())
    assert_outputs(outputs(layer, case), outputs(plain, case))
    assert layer.count_params() == plain.count_params()
    assert {id(w.variable) for w in weights.values()} <= {id(v) for v in layer.weights}


# --------------------------------------------------------------------------- what cannot be tied


def refusal(layer, name, finish):
    """The error that a user gets who ties the weight of that name; the layer is as it was."""
    before = [variable.path for variable in layer.weights]
    cls, built = type(layer), layer.built
    with pytest.raises(tether.TetherError) as caught:
        tether.tie(layer, {name: tether.Weight(name="refused")})
        assert not built, "the tie of a built layer was accepted"
        finish(layer)
    assert isinstance(layer, cls)
    if built:
        assert type(layer) is cls
        assert [variable.path for variable in layer.weights] == before
    return str(caught.value)


@pytest.mark.parametrize("case", WITHOUT_WEIGHTS, ids=str)
def test_a_layer_without_weights_says_so(case):
    layer = case.make()
    layer(*case.symbolic())
    assert layer.weights == []
    assert layer_paths.weight_paths(layer) == []
    for tried in (layer, case.make()):
        assert "no weight 'kernel'" in refusal(tried, "kernel", lambda layer: layer(*case.symbolic()))


@pytest.mark.parametrize("class_name", NOT_TIED)
def test_a_layer_without_a_weight_to_tie_says_so(class_name):
    reason, make, name = NOT_TIED[class_name]
    assert reason
    layer = make()
    assert layer.name in refusal(layer, name, lambda layer: layer.build((2, 3)))


@pytest.mark.parametrize(("class_name", "path"), EXCEPTIONS)
def test_an_exception_is_refused_with_a_reason(class_name, path):
    assert EXCEPTIONS[class_name, path]
    for case in WITH_WEIGHTS:
        if case.class_name == class_name:
            for layer in (case.built(), case.make()):
                assert layer.name in refusal(layer, path, lambda layer, case=case: layer(*case.sample()))


def test_spectral_normalization_of_a_tied_layer_is_refused():
    with pytest.raises(tether.TetherError, match="SpectralNormalization"):
        wrapper = keras.layers.SpectralNormalization(tether.tie(keras.layers.Dense(3), kernel=tether.Weight()))
        wrapper(np.ones((2, 4), "float32"))

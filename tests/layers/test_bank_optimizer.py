"""What an optimizer keeps for weights goes along when they become a bank, and when they leave it."""

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tether import keras_seam
from tether.errors import TetherError
from tether.weights import Argument

pytestmark = pytest.mark.spread

rows = np.random.RandomState(0).randn(6, 4).astype("float32")
targets = np.random.RandomState(1).randn(6, 1).astype("float32")
COUNT = 3
AVERAGES = keras.backend.backend() != "jax"
"""On JAX a second `fit` with averages fails in Keras itself."""

ELEMENTWISE = {
    "adam": lambda: keras.optimizers.Adam(0.02),
    "amsgrad, averaged": lambda: keras.optimizers.AdamW(
        0.02,
        weight_decay=0.1,
        amsgrad=True,
        use_ema=AVERAGES,
        ema_momentum=0.5,
        ema_overwrite_frequency=4 if AVERAGES else None,
    ),
    "momentum": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "accumulated": lambda: keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=3),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.05),
    "nadam": lambda: keras.optimizers.Nadam(0.02),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02)),
    "rates": lambda: tether.adapters.learning_rates(keras.optimizers.Adam(0.02), {"own*": 2.0}),
}


def model_of(dtype="float32", nested=False):
    """A model of layers in a row, each on a shared kernel and a part of its own, and each with a bias of its own."""
    keras.utils.set_random_seed(7)
    stored = "float32" if dtype.startswith("mixed") else dtype
    base = tether.Weight((4, 4), "glorot_uniform", name="base", dtype=stored)
    own = [tether.Weight((4, 4), "glorot_uniform", name="own", dtype=stored) for _ in range(COUNT)]
    kernels = [base + 0.5 * each for each in own]
    inputs = x = keras.Input((4,))
    biases = []
    for place, kernel in enumerate(kernels):
        layer = keras.layers.Dense(4, activation="tanh", name=f"dense_{place}", dtype=dtype)
        x = tether.tie(layer, kernel=kernel)(x)
        biases.append(tether.weight_of(layer, "bias"))
    if nested:
        x = keras.Model(inputs, x, name="inside")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out", dtype=dtype)(x))
    return model, kernels, biases


def number():
    return Argument("number", (), "int32", default=0)


def train(model, epochs=2):
    model.fit(rows, targets, batch_size=3, epochs=epochs, shuffle=False, verbose=0)


def array(value):
    return np.array(ops.convert_to_numpy(value))


def slots(model):
    """What the optimizer keeps, by the paths of the weights and the names of the slots."""
    known = keras_seam.optimized_variables(model.optimizer)
    assert [id(v) for v in known] == [id(v) for v in model.trainable_variables]
    kept = keras_seam.optimizer_slots(model.optimizer)
    return [{name: array(slot) for name, slot in kept[id(variable)]} for variable in known]


def by_weight(model, weights):
    known = [id(v) for v in model.trainable_variables]
    found = slots(model)
    return [found[known.index(id(weight.variable))] for weight in weights]


def only(expressions, place=-1):
    return [expression.weights_used()[place] for expression in expressions]


@pytest.mark.parametrize(
    ("kind", "nested"), [*((kind, False) for kind in ELEMENTWISE), ("adam", True), ("scaled", True)]
)
def test_training_goes_on_as_if_there_had_been_no_bank(kind, nested):
    plain, kernels, _ = model_of(nested=nested)
    plain.compile(ELEMENTWISE[kind](), "mse")
    for _ in range(3):
        train(plain)
    wanted = [array(each.value) for each in kernels]

    model, kernels, biases = model_of(nested=nested)
    optimizer = ELEMENTWISE[kind]()
    model.compile(optimizer, "mse")
    train(model)
    before = [by_weight(model, only(kernels)), by_weight(model, biases)]
    names = set(before[0][0])
    assert names and all(slot.any() for slot in before[0][0].values())
    banks = [tether.bank(kernels, number()), tether.bank(biases, number())]
    for bank, kept in zip(banks, before, strict=True):
        (found,) = by_weight(model, bank.weights_used()[-1:])
        assert set(found) == names
        for name in names:
            np.testing.assert_array_equal(found[name], np.stack([each[name] for each in kept]))
    train(model)
    assert model.optimizer is optimizer
    stacked = [by_weight(model, bank.weights_used()[-1:])[0] for bank in banks]
    apart = [tether.unbank(bank) for bank in banks]
    for expressions, kept in zip(apart, stacked, strict=True):
        for place, found in enumerate(by_weight(model, only(expressions))):
            for name in names:
                np.testing.assert_array_equal(found[name], kept[name][place])
    train(model)
    for found, value in zip(apart[0], wanted, strict=True):
        np.testing.assert_allclose(array(found.value), value, atol=2e-6)
    np.testing.assert_allclose(model.predict(rows, verbose=0), plain.predict(rows, verbose=0), atol=5e-6)
    assert int(array(optimizer.iterations)) == int(array(plain.optimizer.iterations)) > 0
    shapes = [sorted(tuple(v.shape) for v in each.variables) for each in (optimizer, plain.optimizer)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_slots_of_16_bits_are_stacked_to_the_bit(dtype):
    model, kernels, _ = model_of(dtype)
    model.compile("adam", "mse")
    train(model, 1)
    before = by_weight(model, only(kernels))
    bank = tether.bank(kernels, number())
    (found,) = by_weight(model, bank.weights_used()[-1:])
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.stack([each[name] for each in before]))
    train(model, 1)


def test_a_model_that_is_saved_between_takes_its_slots_along(tmp_path):
    model, kernels, _ = model_of()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    train(model)
    tether.bank(kernels, number())
    model.save(tmp_path / "m.keras")
    loaded = tether.files.load_model(tmp_path / "m.keras")
    for found, wanted in zip(slots(loaded), slots(model), strict=True):
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
    for each in (model, loaded):
        train(each)
    np.testing.assert_allclose(loaded.predict(rows, verbose=0), model.predict(rows, verbose=0), atol=1e-6)


@pytest.mark.parametrize("excluded", ["all", "one"])
def test_what_does_not_decay_still_does_not(excluded):
    model, kernels, _ = model_of()
    optimizer = keras.optimizers.AdamW(0.02, weight_decay=0.5)
    own = only(kernels)
    optimizer.exclude_from_weight_decay([each.variable for each in (own if excluded == "all" else own[:1])])
    model.compile(optimizer, "mse")
    train(model)
    bank = tether.bank(kernels, number())
    stack = bank.weights_used()[-1]
    if excluded == "all":
        assert keras_seam.is_excluded_from_decay(optimizer, stack.variable)
        assert not keras_seam.is_excluded_from_decay(optimizer, bank.weights_used()[0].variable)
        train(model)
        for part in only(tether.unbank(bank)):
            assert keras_seam.is_excluded_from_decay(optimizer, part.variable)
    else:
        with pytest.raises(TetherError, match="Compile the model again"):
            train(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adafactor(0.01),
        lambda: keras.optimizers.Muon(0.01) if hasattr(keras.optimizers, "Muon") else keras.optimizers.Adafactor(0.1),
    ],
    ids=["Adafactor", "Muon"],
)
def test_an_optimizer_that_cannot_go_on_asks_to_compile_again_and_keeps_what_it_had(make):
    model, kernels, biases = model_of()
    model.compile(make(), "mse")
    train(model)
    kept = [array(v) for v in model.optimizer.variables]
    values = [array(each.value) for each in kernels]
    bank = tether.bank(kernels, number())
    unbanked = tether.unbank(tether.bank(biases, number()))
    for found, wanted in zip(model.optimizer.variables, kept, strict=True):
        np.testing.assert_array_equal(array(found), wanted)
    with pytest.raises(TetherError, match="Compile the model again"):
        train(model)
    for place, value in enumerate(values):
        with tether.weights.bind({number(): place}):
            np.testing.assert_allclose(array(bank.value), value, atol=1e-6)
    assert len(unbanked) == COUNT
    model.compile("adam", "mse")
    train(model)


def test_parts_that_would_learn_at_another_rate_ask_to_compile_again():
    model, kernels, _ = model_of()
    model.compile(tether.adapters.learning_rates(keras.optimizers.Adam(0.02), {"own": 2.0}), "mse")
    train(model)
    bank = tether.bank(kernels, number())  # at the path of its first part, to which the pattern applies
    train(model)
    tether.unbank(bank)  # own_0, own_1, own_2
    with pytest.raises(TetherError, match="Compile the model again"):
        train(model)


def test_an_optimizer_that_knows_only_some_of_the_parts_asks_to_compile_again():
    model, kernels, _ = model_of()
    alone = tether.Weight((4, 4), "ones", name="alone")
    model.compile("adam", "mse")
    train(model)
    tether.bank([*kernels, kernels[0].weights_used()[0] + 0.5 * alone], number())
    with pytest.raises(TetherError, match="Compile the model again"):
        train(model)


def test_two_models_with_one_optimizer_and_one_that_shares_no_weight():
    model, kernels, _ = model_of()
    other, _, _ = model_of()
    optimizer = keras.optimizers.Adam(0.02)
    model.compile(optimizer, "mse")
    other.compile(keras.optimizers.Adam(0.02), "mse")
    twin = keras.Model(model.inputs, model.outputs)
    twin.compile(optimizer, "mse")
    train(model)
    train(other)
    before = slots(other)
    tether.bank(kernels, number())
    for found, wanted in zip(slots(other), before, strict=True):
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
    train(twin)
    train(model)
    train(other)
    assert int(array(optimizer.iterations)) == 12

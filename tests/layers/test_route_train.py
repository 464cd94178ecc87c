"""`route(..., train=[...])`: some options of a bank train, and the others are stored apart and never touched."""

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tests.layers.test_route_each import LAYERS, by_each, make
from tests.support import assert_close, gradients, numpy
from tether.errors import TetherError, Unsupported

pytestmark = pytest.mark.spread

layers = keras.layers


def values_by_option(layer, x, count):
    return [numpy(layer(x, choice=place)) for place in range(-1, count)]


@pytest.mark.parametrize("count", [3, 11])
@pytest.mark.parametrize("train", [[], [1], [0, 2], "all"], ids=str)
@pytest.mark.parametrize(("kind", "form"), [("dense", "low_rank"), ("dense, tokens", "scale"), ("einsum", "low_rank"),
                                            ("embedding", "low_rank"), ("convolution", "full")], ids=str)  # fmt: skip
def test_it_computes_what_it_does_without(rng, kind, form, train, count):
    train = list(range(count)) if train == "all" else train
    state = rng.bit_generator.state
    plain, *_, x = make(rng, kind, form, count)
    rng.bit_generator.state = state
    layer, *_ = make(rng, kind, form, count, train=train)
    for one, other in zip(values_by_option(layer, x, count), values_by_option(plain, x, count), strict=True):
        assert_close(one, other, 1e-6)
    choice = np.array([2, -1, 0, 2, 1, count - 1])
    assert_close(layer(x, choice=choice), plain(x, choice=choice), 1e-5)
    assert_close(layer(x, choice=choice), by_each(layer, x, choice), 1e-4)
    stacks = [
        weight for weight in layer.weights if "own" in weight.path or "lora" in weight.path or "scale" in weight.path
    ]
    assert {weight.shape[0] for weight in stacks if weight.trainable} == ({len(train)} if train else set())
    assert {weight.shape[0] for weight in stacks if not weight.trainable} <= {count - len(train), 1}


@pytest.mark.parametrize("kind", ["dense", "dense, tokens", "einsum", "embedding", "convolution"])
def test_the_gradients_of_what_trains_are_those_of_one_after_another(rng, kind):
    layer, _, _, x = make(rng, kind, "low_rank", 11, train=[0, 2, 5])
    choice = np.array([2, -1, 0, 2, 7, 0])
    layer(x)
    variables = layer.trainable_variables
    assert {v.shape[0] for v in variables if "lora" in v.path} == {3}
    _, found = gradients(lambda: ops.sum(layer(x, choice=choice) ** 2), variables)
    looped = lambda: sum(ops.sum(layer(x[i : i + 1], choice=int(c)) ** 2) for i, c in enumerate(choice))  # noqa: E731
    _, wanted = gradients(looped, variables)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, 1e-4)


@pytest.mark.parametrize("how", ["call", "column"])
def test_an_optimizer_touches_only_what_trains(rng, how, tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="first"), layers.Dense(2, name="second")])
    names = ["first/kernel", "second/kernel"]
    kernels = {name: tether.weight_of(model, name) for name in names}
    letters = [chr(ord("a") + n) for n in range(12)]
    tether.route(
        model,
        {name: {each: w.stop_gradient() + tether.low_rank(2) for each in letters} for name, w in kernels.items()},
        train=["c", "k"],
    )
    tasks = tether.routed(model)
    for variable in model.variables:
        if "lora_b" in variable.path:
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
    tasks.compile(keras.optimizers.AdamW(0.1, weight_decay=0.1), "mse")
    assert {v.shape[0] for v in model.trainable_variables if "lora" in v.path} == {2}
    assert {v.shape[0] for v in model.non_trainable_variables if "lora" in v.path} == {10}
    x, y = rng.normal(size=(24, 4)).astype("float32"), rng.normal(size=(24, 2)).astype("float32")
    before = {v.path: numpy(v) for v in model.weights}
    outputs = {place: numpy(tasks([x, np.full(24, place)])) for place in range(12)}
    ids = np.array([2, 10] * 12) if how == "call" else np.arange(24) % 12
    tasks.fit([x, ids], y, epochs=2, verbose=0)
    for variable in model.weights:
        moved = not np.array_equal(numpy(variable), before[variable.path])
        assert moved == (variable.trainable and not variable.path.endswith("kernel")), variable.path
    optimizer_sizes = sum(int(np.prod(v.shape)) for v in tasks.optimizer.variables)
    trained = sum(int(np.prod(v.shape)) for v in tasks.trainable_variables)
    assert optimizer_sizes <= 2 * trained + 2
    bias = numpy(model.get_layer("second").bias) - before[model.get_layer("second").bias.path]
    assert not np.allclose(bias, 0) and not np.allclose(outputs[2], numpy(tasks([x, np.full(24, 2)])))
    tasks.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(loaded([x, ids]), tasks([x, ids]), 1e-5)
    assert [v.trainable for v in loaded.weights] == [v.trainable for v in tasks.weights]


@pytest.mark.parametrize(
    ("train", "words"),
    [(["italian"], "italian"), ("french", "a list of options"), ([7], "7"), ([-1], "-1"), ([True], "True"), (3, "3")],
    ids=str,
)
def test_options_that_are_not_there_cannot_train_and_nothing_changes(train, words):
    base = tether.Weight((4, 3), "glorot_uniform", name="base")
    children = {name: base + tether.low_rank(1) for name in ("french", "german")}
    layer = layers.Dense(3)
    with pytest.raises(TetherError, match=words):
        tether.route(layer, kernel=children, train=train)
    assert not layer.built and all(child.weights_used()[1].trainable for child in children.values())


def test_options_of_several_forms_have_no_bank_to_split():
    base = tether.Weight((4, 3), "glorot_uniform", name="base")
    with pytest.raises(TetherError, match="one form"):
        tether.route(layers.Dense(3), kernel=[base + tether.low_rank(1), base * 2.0], train=[0])


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_weights_of_a_mixture_and_tokens_meet_both_stacks(rng, kind):
    layer, _, _, x = make(rng, kind, "low_rank", 11, train=[0, 4])
    mixture = np.zeros((6, 11), "float32")
    mixture[np.arange(6), [0, 1, 4, 10, 3, 0]] = 1.0
    assert_close(layer(x, choice=mixture), layer(x, choice=mixture.argmax(1)), 1e-4)
    if np.ndim(x) > 2 and not kind.startswith("convolution"):
        tokens = rng.integers(-1, 11, np.shape(x)[:2])
        found = numpy(layer(x, choice=tokens))
        for place in (-1, 0, 4, 7):
            assert_close(found[tokens == place], numpy(layer(x, choice=place))[tokens == place], 1e-4)


# ------------------------------------------------------------------ a plain copy of one choice


@pytest.mark.parametrize("count", [3, 11])
def test_a_plain_copy_has_the_weights_of_one_choice(rng, count):
    layer, *_, x = make(rng, "dense", "low_rank", count)
    model = keras.Sequential([keras.Input((4,)), layer])
    for choice in (0, count - 1, -1, "none", "1"):
        plain = tether.materialize(model, choice=choice)
        assert type(plain.layers[0]) is layers.Dense
        assert_close(plain(x), layer(x, choice=choice), 1e-5)
    assert_close(tether.materialize(layer)(x), layer(x, choice=0), 1e-5)
    for wrong, words in ((count, "is one of"), ("seven", "is one of"), ([0, 1], "is one choice"), (0.5, "is one of")):
        with pytest.raises(TetherError, match=words):
            tether.materialize(model, choice=wrong)
    with pytest.raises(TetherError, match="Did you mean 'choice'"):
        tether.materialize(model, choise=0)
    with pytest.raises(Unsupported, match="RoutedCall"):
        tether.materialize(tether.routed(model))


def test_a_plain_copy_of_an_adapter_in_a_slot(rng):
    layer = layers.Dense(3, name="head")
    layer.build((None, 4))
    x = rng.normal(size=(2, 4)).astype("float32")
    tether.adapters.capacity(layer, {"kernel": tether.low_rank(2)}, slots=3)
    tether.adapters.add(layer, "french", {"kernel": tether.low_rank(2, start=rng.normal(size=(4, 3)))})
    plain = tether.materialize(layer, choice="french")
    assert_close(plain(x), layer(x, choice="french"), 1e-5)
    assert not np.allclose(numpy(plain(x)), numpy(layer(x)))

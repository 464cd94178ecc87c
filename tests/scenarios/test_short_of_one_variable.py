"""Rows A9, A10 and B17 of the scenarios: sharing short of one variable."""

import keras
import numpy as np
import pytest
from keras import layers

import tether
from tests.support import assert_close, numpy
from tether.errors import ShapeMismatch


def classifier(units=4, name=None):
    return keras.Sequential([keras.Input((6,)), layers.Dense(units, "tanh"), layers.Dense(2)], name=name)


def data(rng):
    return rng.normal(size=(16, 6)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")


# --------------------------------------------------------------------------- A9


@pytest.mark.parametrize("trained", ["parent", "child"])
def test_a9_a_copy_never_changes_with_its_parent(trained, rng):
    parent, child = classifier(), classifier()
    tether.transfer.copy(parent, child)
    for mine, theirs in zip(child.weights, parent.weights, strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs)) and mine is not theirs
    learns, stays = (parent, child) if trained == "parent" else (child, parent)
    before = [numpy(v).copy() for v in stays.weights]
    learns.compile("adam", "mse")
    learns.fit(*data(rng), batch_size=4, epochs=2, verbose=0)
    for variable, value in zip(stays.weights, before, strict=True):
        assert np.array_equal(numpy(variable), value)
    for variable, value in zip(learns.weights, before, strict=True):
        assert np.abs(numpy(variable) - value).max() > 0


def test_a9_assigning_one_never_changes_the_other():
    parent, child = layers.Dense(3), layers.Dense(3)
    for layer in (parent, child):
        layer.build((None, 2))
    tether.transfer.copy(parent, child)
    value = numpy(parent.kernel).copy()
    child.kernel.assign(np.zeros((2, 3), "float32"))
    assert np.array_equal(numpy(parent.kernel), value)
    parent.kernel.assign_add(np.ones((2, 3), "float32"))
    assert np.array_equal(numpy(child.kernel), np.zeros((2, 3)))


@pytest.mark.parametrize("jit", [True, False])
def test_a9_parent_and_child_train_in_one_model(jit, rng):
    """JAX donates the buffers of what trains: two variables on one buffer would die here."""
    parent, child = classifier(), classifier()
    tether.transfer.copy(parent, child)
    i = keras.Input((6,))
    both = keras.Model(i, [parent(i), child(i)])
    both.compile(keras.optimizers.SGD(0.1), ["mse", "mse"], jit_compile=jit and keras.backend.backend() != "torch")
    x, y = data(rng)
    both.fit(x, [y, -y], batch_size=8, epochs=2, verbose=0)
    assert np.abs(numpy(parent.weights[0]) - numpy(child.weights[0])).max() > 1e-4
    assert np.isfinite(numpy(both(x)[0])).all()


# --------------------------------------------------------------------------- A10


def test_a10_a_larger_vocabulary_starts_from_a_smaller_one(rng):
    small, large = layers.Embedding(5, 3), layers.Embedding(8, 3)
    for table in (small, large):
        table.build((None, 4))
    with pytest.raises(ShapeMismatch, match=r"\(5, 3\).*\(8, 3\).*fill="):
        tether.transfer.copy(small, large)
    report = tether.transfer.copy(small, large, fill="mean")
    E = numpy(small.embeddings)
    assert_close(large.embeddings, np.concatenate([E, np.repeat(E.mean(0, keepdims=True), 3, axis=0)]), 1e-6)
    assert "copied, mean on axis 0: 5 -> 8" in str(report)


def test_a10_new_units_that_start_at_zero_change_no_output_and_learn(rng):
    small, large = classifier(4), classifier(7)
    report = tether.transfer.copy(small, large, fill="zeros")
    x, y = data(rng)
    assert_close(small(x), large(x), 1e-6)
    assert [row.how for row in report] == [
        "copied, zeros on axis 1: 4 -> 7",
        "copied, zeros on axis 0: 4 -> 7",
        "copied, zeros on axis 0: 4 -> 7",
        "copied",
    ]

    large = classifier(7)
    first, second = (f"{layer.name}/*" for layer in large.layers)
    start = numpy(large.layers[0].kernel).copy()
    tether.transfer.copy(small, large, match={second: None}, fill="initializer")
    tether.transfer.copy(small, large, match={first: None}, fill="zeros")
    assert_close(small(x), large(x), 1e-6)
    assert np.array_equal(numpy(large.layers[0].kernel)[:, 4:], start[:, 4:])
    large.compile(keras.optimizers.SGD(0.1), "mse")
    large.fit(x, y, epochs=1, verbose=0)
    assert np.abs(numpy(large.layers[1].kernel)[4:]).min() > 0


# --------------------------------------------------------------------------- B17


def test_b17_weights_related_by_a_formula():
    base = tether.Weight((6, 2), "glorot_uniform", name="base")
    one, two = tether.tie(layers.Dense(2), kernel=base), tether.tie(layers.Dense(2), kernel=3 * base)
    for layer in (one, two):
        layer.build((None, 6))
    assert_close(two.kernel, 3 * numpy(one.kernel), 1e-6)
    base.assign(np.ones((6, 2), "float32"))
    assert_close(two.kernel, np.full((6, 2), 3.0), 1e-6)


def test_b17_weights_related_softly(rng, tmp_path):
    def distance(model):
        one, two = model.layers[-2:]
        return float(np.sum((numpy(one.kernel) - numpy(two.kernel)) ** 2))

    def fitted(strength):
        keras.utils.set_random_seed(3)
        i = keras.Input((6,))
        model = keras.Model(i, [layers.Dense(2, name="english")(i), layers.Dense(2, name="german")(i)])
        if strength:
            tether.transfer.soft_tie(model, "english/kernel", "german/kernel", strength=strength)
        model.compile(keras.optimizers.SGD(0.05), ["mse", "mse"])
        model.fit(x, [y, y + 1], epochs=5, batch_size=16, shuffle=False, verbose=0)
        return model

    x, y = data(rng)
    free, soft, softer = fitted(0), fitted(2.0), fitted(0.2)
    assert distance(soft) < distance(softer) < distance(free)
    assert len(soft.weights) == 4 and distance(soft) > 0
    soft.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(loaded.losses[0], 2.0 * distance(soft), 1e-5)


def test_b17_a_target_that_follows(rng):
    source, target = classifier(), classifier()
    source.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = data(rng)
    start = [numpy(v).copy() for v in target.weights]
    source.fit(
        x, y, batch_size=16, epochs=1, verbose=0, callbacks=[tether.transfer.Follow(target, source, momentum=0.9)]
    )
    for variable, before, theirs in zip(target.weights, start, source.weights, strict=True):
        assert_close(variable, 0.9 * before + 0.1 * numpy(theirs), 1e-6)

"""Rows A3, A4 and A9 to A11 of the scenarios: a child's weights combined with its parent's."""

import keras
import numpy as np
import pytest

import tether
from tests.kinds import apply, for_each
from tests.support import assert_close, numpy
from tether.errors import ShapeMismatch

layers = keras.layers
ops = keras.ops

every_kind = for_each("dense", "embedding", "conv2d", "einsum_dense", "lstm", "attention")


def model_of(layer, kind):
    inputs = kind.symbol()
    return keras.Model(inputs, apply(layer, inputs))


# --------------------------------------------------------------------------- A3


def frozen_and_free_rows():
    frozen = tether.Weight(np.arange(12, dtype="float32").reshape(4, 3), name="frozen")
    free = tether.Weight((3, 3), "uniform", name="free")
    rows = tether.ops.concatenate([frozen.stop_gradient(), free], axis=0)
    return frozen, free, tether.tie(layers.Embedding(7, 3), embeddings=rows)


def test_a3_frozen_rows_and_free_rows(rng, tmp_path):
    frozen, free, layer = frozen_and_free_rows()
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layer])
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.1), "mse")
    x, y = rng.integers(0, 7, (16, 2)), rng.normal(size=(16, 2, 3))
    before = numpy(free.value).copy()
    model.fit(x, y, epochs=3, verbose=0)
    np.testing.assert_array_equal(numpy(frozen.value), np.arange(12).reshape(4, 3))
    assert np.any(numpy(free.value) != before)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again.predict(x, verbose=0), model.predict(x, verbose=0))
    again.fit(x, y, verbose=0)
    model.fit(x, y, verbose=0)
    assert [w.name for w in again.trainable_weights] == ["free"]
    np.testing.assert_array_equal(again.get_weights()[0], np.arange(12).reshape(4, 3))


# --------------------------------------------------------------------------- A4


@every_kind
@pytest.mark.parametrize("reload", ["model", "weights"])
def test_a4_parent_plus_a_delta_stores_both(kind, rng, tmp_path, reload):
    parent, x, path = kind.make(), kind.inputs(rng, 4), kind.path
    apply(parent, x)
    stored = tether.weight_of(parent, path)
    delta = tether.Weight(rng.normal(size=stored.shape).astype("float32"), name="delta")
    child = tether.inherit(parent, {path: lambda w: w + delta})
    model = model_of(child, kind)
    y = model.predict(x, verbose=0)
    if reload == "model":
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
    else:
        model.save_weights(tmp_path / "m.weights.h5")
        again = keras.models.clone_model(model)
        again.load_weights(tmp_path / "m.weights.h5")
    assert_close(again.predict(x, verbose=0), y)
    values = [numpy(w) for w in again.weights]
    for expected in (numpy(stored.value), numpy(delta.value)):
        assert any(v.shape == expected.shape and np.array_equal(v, expected) for v in values)
    assert not any(
        np.array_equal(v, numpy(stored.value) + numpy(delta.value)) for v in values if v.shape == delta.shape
    )


def test_a4_merging_is_a_separate_step(rng):
    parent = layers.Dense(3)
    parent.build((None, 4))
    delta = tether.Weight(np.ones((4, 3), "float32"), name="delta")
    child = tether.inherit(parent, kernel=lambda w: w + delta)
    plain = tether.materialize(child)
    assert type(plain) is layers.Dense
    assert_close(plain.kernel, numpy(parent.kernel.value) + 1)
    assert len(child.weights) == 3


# --------------------------------------------------------------------------- A9


@every_kind
def test_a9_a_start_at_the_parents_values_is_a_copy(kind, rng):
    parent, x = kind.make(), kind.inputs(rng, 4)
    y = numpy(apply(parent, x)).copy()
    child = tether.inherit(parent, share=False)
    model = model_of(child, kind)
    model.compile("adam", "mse")
    model.fit(x, np.zeros_like(y), epochs=2, verbose=0)
    np.testing.assert_array_equal(numpy(apply(parent, x)), y)
    assert np.any(model.predict(x, verbose=0) != y)


@every_kind
def test_a9_a_tie_always_shares(kind, rng):
    parent, x = kind.make(), kind.inputs(rng, 4)
    y = numpy(apply(parent, x)).copy()
    child = tether.inherit(parent)
    model = model_of(child, kind)
    model.compile("adam", "mse")
    model.fit(x, np.zeros_like(y), epochs=2, verbose=0)
    assert_close(apply(parent, x), model.predict(x, verbose=0))
    assert np.any(numpy(apply(parent, x)) != y)


# --------------------------------------------------------------------------- A10


def test_a10_more_rows_of_a_vocabulary(rng):
    parent = layers.Embedding(7, 3)
    parent.build((None, 2))
    child = tether.inherit(parent, into=layers.Embedding(9, 3), share=False, fill="mean")
    np.testing.assert_array_equal(numpy(child.embeddings)[:7], numpy(parent.embeddings))
    assert_close(numpy(child.embeddings)[7:], np.repeat(numpy(parent.embeddings).mean(0, keepdims=True), 2, axis=0))
    assert "7 -> 9" in str(child.inheritance)


def test_a10_more_units_throughout_a_model(rng):
    def make(width):
        inputs = keras.Input((4,))
        hidden = layers.Dense(width, activation="relu", name="hidden")(inputs)
        return keras.Model(inputs, layers.Dense(2, name="out")(hidden))

    parent, child = make(3), make(5)
    with pytest.raises(ShapeMismatch, match="fill="):
        tether.inherit(parent, into=child, share=False)
    tether.inherit(parent, into=child, share=False, fill="zeros")
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(child(x), parent(x))
    assert len(list(child.inheritance)) == 4


# --------------------------------------------------------------------------- A11


def gated(rng, first, second):
    a = tether.Weight(np.ones((4, 3), "float32"), name="a")
    b = tether.Weight(np.ones((4, 3), "float32"), name="b")
    layer = tether.route(layers.Dense(3, use_bias=False), kernel=[first(a), second(b)])
    return a, b, layer


def one_step(rng, layer, choice):
    """One step of AdamW with decay, with a choice that is fixed in the graph or a tensor that is fed."""
    inputs = keras.Input((4,))
    x, y = np.ones((4, 4), "float32"), np.zeros((4, 3), "float32")
    if choice == "default":
        model, data = keras.Model(inputs, layer(inputs)), x
    else:
        picked = layers.Lambda(lambda t: ops.cast(t[0, 0], "int32"), output_shape=())
        index = keras.Input((1,))
        model = keras.Model([inputs, index], layer(inputs, choice=picked(index)))
        data = [x, np.zeros((4, 1), "float32")]
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    model.fit(data, y, batch_size=4, epochs=1, verbose=0)
    return model


@pytest.mark.parametrize("choice", ["default", "tensor"])
def test_a11_a_side_that_is_not_chosen_has_a_gradient_of_zero_and_decays(rng, choice):
    a, b, layer = gated(rng, lambda w: w, lambda w: w)
    one_step(rng, layer, choice)
    assert_close(b.value, np.full((4, 3), 1 - 0.1 * 0.5))
    assert np.all(numpy(a.value) < 1 - 0.1 * 0.5)


@pytest.mark.parametrize("choice", ["default", "tensor"])
def test_a11_a_side_under_stop_gradient_only_does_not_train_and_does_not_decay(rng, choice):
    a, b, layer = gated(rng, lambda w: w, lambda w: w.stop_gradient())
    model = one_step(rng, layer, choice)
    np.testing.assert_array_equal(numpy(b.value), np.ones((4, 3)))
    assert [w.name for w in model.trainable_weights] == ["a"]
    assert np.all(numpy(a.value) < 1)

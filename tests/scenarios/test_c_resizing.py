"""Row C13 of the scenarios: resizing a tied embedding."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

layers = keras.layers


def language_model(tokens=10, width=4):
    ids = keras.Input((5,), dtype="int32")
    hidden = layers.Dense(width, activation="tanh", name="body")(layers.Embedding(tokens, width, name="embed")(ids))
    model = keras.Model(ids, layers.Dense(tokens, name="head")(hidden))
    tether.tie(model, {"head/kernel": tether.weight_of(model, "embed/embeddings").T})
    return model


def logits(model, ids):
    table = numpy(model.get_layer("embed").embeddings)
    body, head = model.get_layer("body"), model.get_layer("head")
    return np.tanh(table[ids] @ numpy(body.kernel) + numpy(body.bias)) @ table.T + numpy(head.bias)


def fit(model, ids, targets, epochs=3):
    model.fit(ids, targets, batch_size=4, epochs=epochs, shuffle=False, verbose=0)


def batch(rng, tokens):
    ids = rng.integers(0, tokens, (8, 5)).astype("int32")
    return ids, np.roll(ids, -1, axis=1)


def compiled(model):
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("size", [13, 7])
def test_c13_both_sides_of_a_tied_embedding_are_resized(size, rng, tmp_path):
    model = compiled(language_model())
    fit(model, *batch(rng, 10))
    table = tether.weight_of(model, "embed/embeddings")
    before, kept = table.numpy(), min(size, 10)

    tether.files.resize(table, 0, size, fill="mean", model=model)

    ids, targets = batch(rng, size)
    assert table.shape == (size, 4) and len(model.weights) == 4
    assert_close(table.numpy()[:kept], before[:kept])
    assert_close(model(ids), logits(model, ids))
    assert model.get_layer("embed").input_dim == model.get_layer("head").units == size
    fit(model, ids, targets)
    assert_close(model.predict(ids, verbose=0), logits(model, ids), 1e-4)
    assert len([w for w in model.weights if w is table.variable]) == 1

    tether.files.save_model(model, tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(again(ids), model(ids))
    for each in (model, again):
        fit(each, ids, targets, epochs=1)
    for mine, theirs in zip(model.weights, again.weights, strict=True):
        assert_close(mine, theirs, 1e-4)


def test_c13_what_cannot_follow_is_named_and_nothing_changes(rng):
    model = compiled(language_model())
    ids, targets = batch(rng, 10)
    fit(model, ids, targets)
    table = tether.weight_of(model, "embed/embeddings")
    before = [numpy(variable).copy() for variable in [*model.variables, *model.optimizer.variables]]
    with pytest.raises(tether.errors.Unsupported, match=r"body.*Nothing has changed"):
        tether.files.resize(table, 1, 6, model=model)
    after = [*model.variables, *model.optimizer.variables]
    assert all(np.array_equal(old, numpy(new)) for old, new in zip(before, after, strict=True))
    fit(model, ids, targets)

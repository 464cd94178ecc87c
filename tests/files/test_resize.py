"""Giving a weight another size: what follows, what is refused, and that a refusal changes nothing."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether.errors import ShapeMismatch, TetherError, Unsupported

layers = keras.layers


def language_model():
    """An embedding of 6 tokens, and a head that is tied to it."""
    table = tether.Weight(name="table")
    ids = keras.Input((4,), dtype="int32")
    hidden = tether.tie(layers.Embedding(6, 3, name="embed"), embeddings=table)(ids)
    logits = tether.tie(layers.Dense(6, name="head"), kernel=table.T)(hidden)
    return keras.Model(ids, layers.Softmax(name="probabilities")(logits)), table


def state_of(model):
    return [numpy(variable).tobytes() for variable in model.variables], [v.shape for v in model.variables]


def test_rows_are_added_where_they_are_used(rng):
    model, table = language_model()
    before = table.numpy()
    report = tether.files.resize(table, 0, 8, fill="mean", model=model)
    assert table.shape == (8, 3)
    assert_close(table.numpy()[:6], before)
    assert_close(table.numpy()[6:], np.tile(before.mean(0), (2, 1)))
    embed, head = model.get_layer("embed"), model.get_layer("head")
    assert embed.input_dim == 8 and head.units == 8
    assert tuple(head.kernel.shape) == (3, 8) and tuple(head.bias.shape) == (8,)
    assert model.output_shape == (None, 4, 8)
    assert report["table"].source_shape == (6, 3) and report["head/bias"].shape == (8,)
    ids = np.array([[0, 7, 6, 5]], "int32")
    hidden = table.numpy()[ids]
    logits = hidden @ table.numpy().T + numpy(head.bias)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_close(model(ids), expected)
    assert_close(model.predict(ids, verbose=0), expected)


def test_rows_are_cut(rng):
    model, table = language_model()
    before = table.numpy()
    tether.files.resize(table, -2, 4, model=model)
    assert_close(table.numpy(), before[:4])
    assert model(np.array([[0, 1, 2, 3]], "int32")).shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        ("zeros", lambda old: np.zeros((2, 3))),
        ("mean", lambda old: np.tile(old.mean(0), (2, 1))),
        (keras.initializers.Constant(0.5), lambda old: np.full((2, 3), 0.5)),
        (np.arange(6.0).reshape(2, 3), lambda old: np.arange(6.0).reshape(2, 3)),
        (lambda value, start: np.concatenate([value, -value[:2]]), lambda old: -old[:2]),
    ],
)
def test_new_entries_follow_a_rule(fill, expected):
    weight = tether.Weight((4, 3), "glorot_uniform", name="w")
    before = weight.numpy()
    tether.files.resize(weight, 0, 6, fill=fill)
    assert_close(weight.numpy(), np.concatenate([before, expected(before)]))


def test_new_entries_are_made_by_the_weights_own_initializer():
    weight = tether.Weight((4, 3), keras.initializers.Constant(2.0), name="w")
    weight.assign(np.zeros((4, 3), "float32"))
    tether.files.resize(weight, 1, 5)
    assert_close(weight.numpy(), np.concatenate([np.zeros((4, 3)), np.full((4, 2), 2.0)], axis=1))


def train(model, ids, targets):
    model.fit(ids, targets, batch_size=len(ids), epochs=2, shuffle=False, verbose=0)


def test_the_optimizer_follows_and_training_goes_on(rng):
    model, table = language_model()
    ids = rng.integers(0, 6, (8, 4)).astype("int32")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    train(model, ids, rng.normal(size=(8, 4, 6)).astype("float32"))
    kept = {v.path: numpy(v) for v in model.optimizer.variables}
    tether.files.resize(table, 0, 8, model=model)
    assert model.compiled
    for variable in model.optimizer.variables:
        old, new = kept[variable.path], numpy(variable)
        assert_close(new[tuple(slice(0, n) for n in old.shape)], old)
        if old.shape != new.shape:
            assert not new[6:].any()
    before = table.numpy()
    more = rng.integers(0, 8, (8, 4)).astype("int32")
    train(model, more, rng.normal(size=(8, 4, 8)).astype("float32"))
    assert (np.abs(table.numpy() - before).sum(1) > 0).all()


def test_a_resized_model_is_saved_and_read_back(rng, tmp_path):
    model, table = language_model()
    tether.files.resize(table, 0, 9, model=model)
    tether.files.save_model(model, tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    ids = rng.integers(0, 9, (2, 4)).astype("int32")
    assert_close(again(ids), model(ids))


def test_it_trains_as_one_that_was_made_so(rng):
    """A model that was resized, and one that was made with the new size and given the same values."""
    model, table = language_model()
    tether.files.resize(table, 0, 8, model=model)
    made = tether.Weight(name="made")
    ids = keras.Input((4,), dtype="int32")
    hidden = tether.tie(layers.Embedding(8, 3), embeddings=made)(ids)
    other = keras.Model(ids, layers.Softmax()(tether.tie(layers.Dense(8), kernel=made.T)(hidden)))
    other.set_weights(model.get_weights())
    x, y = rng.integers(0, 8, (8, 4)).astype("int32"), rng.normal(size=(8, 4, 8)).astype("float32")
    for each in (model, other):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        train(each, x, y)
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_einsum_follows(axis, rng):
    weight = tether.Weight(name="w")
    layer = tether.tie(layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d", name="einsum"), kernel=weight)
    x = keras.Input((2, 4))
    model = keras.Model(x, layer(x))
    tether.files.resize(weight, axis, 6, model=model if axis else None)
    batch = rng.normal(size=(3, 2, 4 if axis else 6)).astype("float32")
    assert_close(layer(batch), batch @ weight.numpy() + numpy(layer.bias))
    again = type(layer).from_config(layer.get_config())
    assert tuple(again(batch).shape) == (3, 2, 6 if axis else 5)


@pytest.mark.parametrize(("axis", "size"), [(2, 5), (3, 4)])
def test_a_convolution_follows(axis, size, rng):
    weight = tether.Weight(name="w")
    layer = tether.tie(layers.Conv2D(3, 2, name="conv"), kernel=weight)
    layer.build((None, 4, 4, 2))
    tether.files.resize(weight, axis, size)
    out = layer(rng.normal(size=(1, 4, 4, size if axis == 2 else 2)).astype("float32"))
    assert out.shape[-1] == (size if axis == 3 else 3)


def test_a_reversible_embedding_follows(rng):
    layer = layers.ReversibleEmbedding(6, 3, name="both")
    ids = keras.Input((4,), dtype="int32")
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    table = tether.weight_of(layer, "embeddings")
    tether.files.resize(table, 0, 7, model=model)
    assert layer.input_dim == 7 and model.output_shape == (None, 4, 7)
    x = rng.integers(0, 7, (2, 4)).astype("int32")
    assert_close(model(x), table.numpy()[x] @ table.numpy().T)


def test_a_use_of_which_the_shape_stays_needs_nothing(rng):
    weight = tether.Weight((6, 3), name="w")
    layer = tether.tie(layers.Dense(3, name="first"), kernel=weight[:4])
    layer.build((None, 4))
    tether.files.resize(weight, 0, 8)
    assert tuple(layer.kernel.shape) == (4, 3)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(layer(x), x @ weight.numpy()[:4])


@keras.saving.register_keras_serializable(package="test_resize")
class Own(layers.Layer):
    """A layer of which nobody knows how it holds its sizes."""

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 3))

    def call(self, x):
        return x @ self.kernel


def added():
    weight = tether.Weight((4, 3), "ones", name="w")
    layer = tether.tie(layers.Dense(3, name="low"), kernel=weight + tether.Weight((4, 1)) @ tether.Weight((1, 3)))
    layer.build((1, 4))
    return weight, layer


def own():
    weight = tether.Weight((4, 3), "ones", name="w")
    layer = tether.tie(Own(name="own"), kernel=weight)
    layer.build((None, 4))
    return weight, layer


def reshaped():
    weight = tether.Weight((4, 3), "ones", name="w")
    layer = tether.tie(layers.Dense(6, name="flat"), kernel=weight.reshape(2, 6))
    layer.build((None, 2))
    return weight, layer


@pytest.mark.parametrize(
    ("make", "names"), [(added, "low/kernel"), (own, "own/kernel.*Own"), (reshaped, "flat/kernel")]
)
def test_a_use_that_cannot_follow_is_named_and_nothing_changes(make, names):
    weight, layer = make()  # a weight does not keep the layers that use it
    with pytest.raises(Unsupported, match=f"{names}.*Nothing has changed"):
        tether.files.resize(weight, 0, 6)
    assert weight.shape == (4, 3) and np.array_equal(weight.numpy(), np.ones((4, 3)))
    assert layer.built


def test_a_graph_that_cannot_follow_is_named_and_nothing_changes(rng):
    model, table = language_model()
    x = model.get_layer("head").output
    outer = keras.Model(model.input, layers.Dense(2, name="after")(x))
    outer.compile("adam", "mse")
    ids = rng.integers(0, 6, (4, 4)).astype("int32")
    outer.fit(ids, rng.normal(size=(4, 4, 2)).astype("float32"), verbose=0)
    before, output = state_of(outer), numpy(outer(ids))
    with pytest.raises(Unsupported, match=r"after.*Nothing has changed"):
        tether.files.resize(table, 0, 9, model=outer)
    assert state_of(outer) == before and np.array_equal(numpy(outer(ids)), output)
    assert model.get_layer("head").units == 6 and outer.output_shape == (None, 4, 2)
    outer.fit(ids, rng.normal(size=(4, 4, 2)).astype("float32"), verbose=0)


def test_an_optimizer_that_cannot_follow_is_named(rng):
    model, table = language_model()
    model.compile(keras.optimizers.Adafactor(), "mse")
    ids = rng.integers(0, 6, (4, 4)).astype("int32")
    model.fit(ids, rng.normal(size=(4, 4, 6)).astype("float32"), verbose=0)
    with pytest.raises(Unsupported, match=r"optimizer keeps.*Nothing has changed"):
        tether.files.resize(table, 0, 9, model=model)
    assert table.shape == (6, 3)


def test_a_soft_tie_that_cannot_follow_is_named():
    model, table = language_model()
    other = tether.Weight((6, 3), "ones", name="other")
    tether.transfer.soft_tie(model, "embed/embeddings", other, 0.1)
    with pytest.raises(Unsupported, match=r"soft tie.*Nothing has changed"):
        tether.files.resize(table, 0, 9, model=model)


def test_what_is_no_size_or_rule_is_refused():
    model, table = language_model()
    for arguments in [(2, 5), (-3, 5), (0, 0), (0, 2.5), ("a", 5)]:
        with pytest.raises(TetherError, match="Received"):
            tether.files.resize(table, *arguments)
    with pytest.raises(TetherError, match="fill"):
        tether.files.resize(table, 0, 8, fill="ones")
    with pytest.raises(ShapeMismatch, match=r"\(2, 3\)"):
        tether.files.resize(table, 0, 8, fill=np.ones((3, 3)))
    with pytest.raises(TetherError, match="weight_of"):
        tether.files.resize(model.get_layer("head").bias, 0, 8)
    with pytest.raises(TetherError, match="model"):
        tether.files.resize(table, 0, 8, model="model")
    assert table.shape == (6, 3)

"""Rows D of the scenarios: what works in Keras and must go on working."""

import copy
import pickle

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy, slot_count

layers = keras.layers
BACKEND = keras.backend.backend()


def tied_pair(rng, **options):
    """A functional model whose two layers share a kernel, one of them transposed."""
    weight = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="w", **options)
    a = tether.tie(layers.Dense(3, name="a"), kernel=weight)
    b = tether.tie(layers.Dense(4, name="b"), kernel=weight.T)
    x = keras.Input((4,))
    return keras.Model(x, b(a(x))), weight, a, b


def batch(rng, n=4, width=4):
    return rng.normal(size=(2, n, width)).astype("float32")


def linear_gradient(x, t, W):
    """Of the mean squared error of x W Wᵀ, with respect to W."""
    dy = 2 * (x @ W @ W.T - t) / t.size
    return x.T @ (dy @ W) + dy.T @ (x @ W)


def bare_pair(rng):
    """The same without biases, which NumPy follows in a line."""
    weight = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="w")
    x = keras.Input((4,))
    h = tether.tie(layers.Dense(3, use_bias=False, name="a"), kernel=weight)(x)
    return keras.Model(x, tether.tie(layers.Dense(4, use_bias=False, name="b"), kernel=weight.T)(h)), weight


# --------------------------------------------------------------------------- one slot


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), 1),
        (lambda: keras.optimizers.Adam(0.1), 2),
        (lambda: keras.optimizers.Adam(0.1, use_ema=True), 3),
        (lambda: keras.optimizers.RMSprop(0.1, momentum=0.5, centered=True), 3),
    ],
    ids=["momentum", "adam", "average", "rmsprop"],
)
def test_d_one_slot_for_a_variable_of_two_layers(make, slots, rng):
    model, _, a, b = tied_pair(rng)
    x, t = batch(rng)
    model.compile(make(), "mse")
    model.fit(x, t, batch_size=4, verbose=0)
    assert slot_count(model.optimizer) == slots * 3
    assert sum(tuple(v.shape) == (4, 3) for v in model.optimizer.variables) == slots
    assert np.array_equal(numpy(b.kernel), numpy(a.kernel).T)


def test_d_the_slot_holds_the_sum_over_uses(rng):
    model, weight = bare_pair(rng)
    x, t = batch(rng)
    W = weight.numpy()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(x, t, batch_size=4, epochs=2, verbose=0)
    velocity = -0.1 * linear_gradient(x, t, W)
    W = W + velocity
    velocity = 0.9 * velocity - 0.1 * linear_gradient(x, t, W)
    assert_close(weight.value, W + velocity, 1e-4)
    (slot,) = [v for v in model.optimizer.variables if tuple(v.shape) == (4, 3)]
    assert_close(slot, velocity, 1e-4)


# --------------------------------------------------------------------------- gradient accumulation


def test_d_accumulated_gradients_equal_one_large_batch(rng):
    x, t = batch(rng, n=8)
    W = rng.normal(size=(4, 3)).astype("float32")
    results = []
    for size, every in ((8, None), (4, 2), (2, 4)):
        model, weight = bare_pair(rng)
        weight.assign(W)
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=every), "mse")
        model.fit(x, t, batch_size=size, shuffle=False, verbose=0)
        results.append(weight.numpy())
    for found in results:
        assert_close(found, W - 0.1 * linear_gradient(x, t, W), 1e-5)


# --------------------------------------------------------------------------- regularizers


def test_d_a_weights_regularizer_counts_once(rng):
    model, weight, _, _ = tied_pair(rng, regularizer=keras.regularizers.L2(0.1))
    W = weight.numpy()
    expected = 0.1 * float((W * W).sum())
    assert float(numpy(sum(model.losses))) == pytest.approx(expected, rel=1e-5)
    _, (found,) = gradients(lambda: sum(model.losses), [weight.variable])
    assert_close(found, 0.2 * W)


@pytest.mark.parametrize("when", ["before build", "after build"])
def test_d_a_layers_regularizer_counts_once_for_equal_uses(when, rng):
    make = lambda: layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1))  # noqa: E731
    a, b = make(), make()
    x = keras.Input((4,))
    weight = tether.weight_of(a, "kernel")
    if when == "before build":
        tether.tie(b, kernel=weight)
    model = keras.Model(x, [a(x), b(x)])
    if when == "after build":
        tether.tie(b, kernel=weight)
    W = rng.normal(size=(4, 3)).astype("float32")
    weight.assign(W)
    assert float(numpy(sum(model.losses))) == pytest.approx(0.1 * float((W * W).sum()), rel=1e-5)


def test_d_regularizers_of_unequal_uses_all_count(rng):
    weight = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="w")
    L1, L2 = keras.regularizers.L1, keras.regularizers.L2
    a = tether.tie(layers.Dense(3, kernel_regularizer=L2(0.1)), kernel=weight)
    b = tether.tie(layers.Dense(3, kernel_regularizer=L1(0.1)), kernel=weight)
    c = tether.tie(layers.Dense(3, kernel_regularizer=L2(0.1)), kernel=3.0 * weight)
    x = keras.Input((4,))
    model = keras.Model(x, [a(x), b(x), c(x)])
    W = weight.numpy()
    expected = 0.1 * (W * W).sum() + 0.1 * np.abs(W).sum() + 0.1 * (9 * W * W).sum()
    assert float(numpy(sum(model.losses))) == pytest.approx(float(expected), rel=1e-5)


def test_d_a_regularizer_in_fit_and_after_a_reload(rng, tmp_path):
    weight = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="w", regularizer=keras.regularizers.L2(0.5))
    i = keras.Input((4,))
    h = tether.tie(layers.Dense(3, use_bias=False), kernel=weight)(i)
    model = keras.Model(i, tether.tie(layers.Dense(4, use_bias=False), kernel=weight.T)(h))
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    x, t = batch(rng)
    W = weight.numpy()
    for each in (model, loaded):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        history = each.fit(x, t, batch_size=4, verbose=0).history["loss"][0]
        expected = ((x @ W @ W.T - t) ** 2).mean() + 0.5 * (W * W).sum()
        assert history == pytest.approx(float(expected), rel=1e-4)
        assert_close(each.weights[0], W - 0.1 * (linear_gradient(x, t, W) + W), 1e-4)


# --------------------------------------------------------------------------- mixed precision


def test_d_mixed_precision_across_users(rng):
    weight = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    users = {
        dtype: tether.tie(layers.Dense(4, use_bias=False, dtype=dtype), kernel=weight)
        for dtype in ("float32", "mixed_bfloat16", "mixed_float16")
    }
    x = rng.normal(size=(3, 4)).astype("float32")
    W = weight.numpy()
    for dtype, layer in users.items():
        y = layer(x)
        assert keras.backend.standardize_dtype(y.dtype) == dtype.removeprefix("mixed_")
        assert_close(keras.ops.cast(y, "float32"), x @ W, {"float32": 1e-5, "mixed_float16": 2e-2}.get(dtype, 2e-1))
    assert weight.dtype == "float32" and np.array_equal(weight.numpy(), W)
    assert len({id(v) for layer in users.values() for v in layer.weights}) == 1

    _, (found,) = gradients(lambda: sum(keras.ops.sum(keras.ops.cast(y(x), "float32")) for y in users.values()), [
        weight.variable
    ])  # fmt: skip
    assert found.dtype == np.float32
    assert_close(found, 3 * np.repeat(x.sum(axis=0)[:, None], 4, axis=1), 5e-2)


def test_d_mixed_precision_equals_plain_keras_to_the_bit(rng):
    W, x = rng.normal(size=(4, 3)).astype("float32"), rng.normal(size=(5, 4)).astype("float32")
    for dtype in ("mixed_bfloat16", "mixed_float16", "float32"):
        weight = tether.Weight(W, name="w")
        tied = [
            tether.tie(layers.Dense(3, use_bias=False, dtype=dtype), kernel=weight),
            tether.tie(layers.Dense(4, use_bias=False, dtype=dtype), kernel=weight.T),
        ]
        plain = [layers.Dense(3, use_bias=False, dtype=dtype), layers.Dense(4, use_bias=False, dtype=dtype)]
        plain[0].build((None, 4))
        plain[1].build((None, 3))
        plain[0].kernel.assign(W)
        plain[1].kernel.assign(W.T)
        mine, theirs = tied[1](tied[0](x)), plain[1](plain[0](x))
        assert mine.dtype == theirs.dtype
        assert np.array_equal(
            numpy(keras.ops.cast(tied[0](x), "float32")), numpy(keras.ops.cast(plain[0](x), "float32"))
        )
        assert_close(keras.ops.cast(mine, "float32"), keras.ops.cast(theirs, "float32"), 1e-2)


def test_d_mixed_precision_trains_the_float32_weight(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, weight = bare_pair(rng)
    x, t = batch(rng)
    W = weight.numpy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, t, batch_size=4, verbose=0)
    assert weight.dtype == "float32"
    step = weight.numpy() - W
    expected = -0.1 * linear_gradient(x, t, W)
    assert np.abs(step - expected).max() < 0.05 * np.abs(expected).max()


# --------------------------------------------------------------------------- one block many times


@keras.saving.register_keras_serializable(package="scenarios_d")
class Recurrent(keras.Model):
    """One tied block applied in a loop, and a list that names it twice."""

    def __init__(self, times=3, **kwargs):
        super().__init__(**kwargs)
        self.times = times
        self.shared = tether.Weight(name="shared")
        self.block = tether.tie(layers.Dense(4, activation="tanh", name="block"), kernel=self.shared)
        self.back = tether.tie(layers.Dense(4, activation="tanh", name="back"), kernel=self.shared.T)
        self.stages = [self.block, self.back, self.block]

    def build(self, shape):
        self.block.build(shape)
        self.back.build(shape)

    def call(self, x):
        for _ in range(self.times):
            for stage in self.stages:
                x = stage(x)
        return x

    def get_config(self):
        return {**super().get_config(), "times": self.times}


def applied(x, W, b, c, stages):
    for stage in stages:
        x = np.tanh(x @ W + b) if stage == "block" else np.tanh(x @ W.T + c)
    return x


def test_d_one_block_in_a_loop_and_a_list(rng, tmp_path):
    model = Recurrent()
    x, t = batch(rng)
    model(x)
    assert len(model.weights) == 3 and model.count_params() == 16 + 8
    W, b, c = rng.normal(size=(4, 4)).astype("float32"), *rng.normal(size=(2, 4)).astype("float32")
    model.shared.assign(W)
    model.block.bias.assign(b)
    model.back.bias.assign(c)
    expected = applied(x, W, b, c, ["block", "back", "block"] * 3)
    assert_close(model(x), expected, 1e-4)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, t, batch_size=4, verbose=0)
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    assert len(loaded.weights) == 3 and loaded.stages[0] is loaded.stages[2] is loaded.block
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))
    assert slot_count(loaded.optimizer) == 6
    loaded.shared.assign(W)
    loaded.block.bias.assign(b)
    loaded.back.bias.assign(c)
    assert_close(loaded(x), expected, 1e-4)


def test_d_one_block_in_a_functional_graph(rng, tmp_path):
    weight = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    block = tether.tie(layers.Dense(4, activation="tanh", name="block"), kernel=weight)
    back = tether.tie(layers.Dense(4, activation="tanh", name="back"), kernel=weight.T)
    i = keras.Input((4,))
    model = keras.Model(i, block(back(block(block(i)))))
    order = ["block", "block", "back", "block"]
    x, _ = batch(rng)
    zero, start = np.zeros(4, "float32"), weight.numpy()
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for each in (model, loaded, clone):
        assert len(each.weights) == 3 and len(each.layers) == 3
        assert_close(each(x), applied(x, start, zero, zero, order), 1e-4)
        W = rng.normal(size=(4, 4)).astype("float32")
        each.get_layer("block").kernel.assign(W)
        assert_close(each(x), applied(x, W, zero, zero, order), 1e-4)


def test_d_the_gradient_of_a_block_used_often_equals_keras(rng):
    W = rng.normal(size=(4, 4)).astype("float32")
    x = rng.normal(size=(3, 4)).astype("float32")
    plain = layers.Dense(4, activation="tanh", use_bias=False)
    plain.build((None, 4))
    plain.kernel.assign(W)
    weight = tether.Weight(W, name="w")
    tied = tether.tie(layers.Dense(4, activation="tanh", use_bias=False), kernel=weight)
    twin = tether.tie(layers.Dense(4, activation="tanh", use_bias=False), kernel=weight)
    expected, (theirs,) = gradients(lambda: keras.ops.sum(plain(plain(plain(x)))), [plain.kernel])
    for stages in ((tied, tied, tied), (tied, twin, tied)):

        def loss(stages=stages):
            y = x
            for stage in stages:
                y = stage(y)
            return keras.ops.sum(y)

        value, (mine,) = gradients(loss, [weight.variable])
        assert value == pytest.approx(expected, rel=1e-5)
        assert_close(mine, theirs, 1e-4)


# --------------------------------------------------------------------------- a siamese sub-model


def siamese(rng, when):
    weight = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="w")
    a, b = layers.Dense(3, name="a"), layers.Dense(4, name="b")
    if when == "before build":
        tether.tie(a, kernel=weight)
        tether.tie(b, kernel=weight.T)
    tower = keras.Sequential([keras.Input((4,)), a, b], name="tower")
    left, right = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([left, right], layers.Subtract()([tower(left), tower(right)]))
    if when == "after build":
        weight = tether.weight_of(model, "tower/a/kernel")
        tether.tie(model, {"tower/b/kernel": weight.T})
    return model, weight


@pytest.mark.parametrize("when", ["before build", "after build"])
def test_d_a_siamese_submodel_saved_and_loaded(when, rng, tmp_path):
    model, weight = siamese(rng, when)
    left, right = batch(rng)
    W = weight.numpy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    t = rng.normal(size=(4, 4)).astype("float32")
    for each in (model, loaded):
        assert len(each.weights) == 3 and each.count_params() == 12 + 3 + 4
        assert_close(each([left, right]), (left - right) @ W @ W.T, 1e-4)
        each.fit([left, right], t, batch_size=4, verbose=0)
        # The biases cancel, so the pair is one linear codec of the difference.
        assert_close(each.get_layer("tower").layers[0].kernel, W - 0.1 * linear_gradient(left - right, t, W), 1e-4)


# --------------------------------------------------------------------------- ReversibleEmbedding


def reverse_logits(ids, E):
    return E[ids].mean(axis=1) @ E.T


def test_d_reversible_embedding_works_as_before(rng, tmp_path):
    embed = layers.ReversibleEmbedding(6, 3, name="embed")
    i = keras.Input((4,), dtype="int32")
    model = keras.Model(i, embed(layers.GlobalAveragePooling1D()(embed(i)), reverse=True))
    ids = rng.integers(0, 6, (5, 4)).astype("int32")
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    E = numpy(embed.embeddings)
    for each in (model, loaded):
        assert len(each.weights) == 1 and type(each.get_layer("embed")) is layers.ReversibleEmbedding
        assert_close(each(ids), reverse_logits(ids, E), 1e-5)


@pytest.mark.parametrize("when", ["before build", "after build"])
def test_d_reversible_embedding_can_be_tied(when, rng, tmp_path):
    embed, head = layers.ReversibleEmbedding(6, 3, name="embed"), layers.Dense(6, use_bias=False, name="head")
    table = tether.Weight(name="table")
    if when == "before build":
        tether.tie(embed, embeddings=table)
        tether.tie(head, kernel=table.T)
    i = keras.Input((4,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(embed(i))
    model = keras.Model(i, [embed(h, reverse=True), head(h)])
    if when == "after build":
        table = tether.weight_of(embed, "embeddings")
        tether.tie(head, kernel=table.T)
    ids = rng.integers(0, 6, (5, 4)).astype("int32")
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    for each in (model, loaded):
        assert len(each.weights) == 1 and each.count_params() == 18
        E = rng.normal(size=(6, 3)).astype("float32")
        each.get_layer("embed").embeddings.assign(E)
        for y in each(ids):
            assert_close(y, reverse_logits(ids, E), 1e-5)


def test_d_reversible_embedding_untied_by_its_own_option(rng):
    embed = layers.ReversibleEmbedding(6, 3, tie_weights=False)
    embed.build((None, 4))
    assert len(embed.weights) == 2
    tether.tie(embed, reverse_embeddings=tether.weight_of(embed, "embeddings").T)
    assert len(embed.weights) == 1
    E, ids = rng.normal(size=(6, 3)).astype("float32"), rng.integers(0, 6, (5, 4)).astype("int32")
    embed.embeddings.assign(E)
    assert np.array_equal(numpy(embed(ids)), E[ids])
    assert_close(embed(E[ids], reverse=True), E[ids] @ E.T, 1e-5)


# --------------------------------------------------------------------------- names of parameters


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_d_a_shared_tensor_is_named_once(nested, rng):
    model, weight, _, _ = tied_pair(rng)
    if nested:
        model = keras.Sequential([keras.Input((4,)), model, layers.Dense(4, name="top")])
    count = 5 if nested else 3
    assert len({v.path for v in model.weights}) == len(model.weights) == count
    assert sum(v is weight.variable for v in model.weights) == 1
    if BACKEND == "torch":
        named = dict(model.named_parameters())
        assert len(named) == count
        assert sum(parameter is weight.variable.value for parameter in named.values()) == 1
        state = model.state_dict()
        assert len({tensor.data_ptr() for tensor in state.values()}) == count
        # By whatever names a tensor is listed, what is loaded is what is computed.
        W = rng.normal(size=(4, 3)).astype("float32")
        with_W = {
            key: keras.ops.convert_to_tensor(W) if tensor.data_ptr() == weight.variable.value.data_ptr() else tensor
            for key, tensor in state.items()
        }
        model.load_state_dict(with_W)
        assert np.array_equal(weight.numpy(), W)


def test_d_names_are_those_of_a_layer_that_is_shared(rng):
    """As many names as when Keras shares the whole layer."""
    shared = layers.Dense(4, name="shared")
    i = keras.Input((4,))
    keras_model = keras.Model(i, shared(shared(i)))
    weight, bias = tether.Weight(name="w"), tether.Weight(name="v")
    one = tether.tie(layers.Dense(4, name="one"), kernel=weight, bias=bias)
    two = tether.tie(layers.Dense(4, name="two"), kernel=weight, bias=bias)
    model = keras.Model(i, two(one(i)))
    model.set_weights(keras_model.get_weights())
    x = rng.normal(size=(3, 4)).astype("float32")
    assert np.array_equal(numpy(model(x)), numpy(keras_model(x)))
    assert len(model.weights) == len(keras_model.weights) == 2
    if BACKEND == "torch":
        assert len(list(model.parameters())) == len(list(keras_model.parameters())) == 2
        assert sum(p.numel() for p in model.parameters()) == 20


# --------------------------------------------------------------------------- deepcopy and pickle


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


both_copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


@both_copies
def test_d_a_copied_model_is_tied_within_itself(copied, rng):
    model, weight, a, _ = tied_pair(rng)
    x, t = batch(rng)
    W = weight.numpy()
    twin = copied(model)
    assert len(twin.weights) == 3
    assert not {id(v) for v in twin.weights} & {id(v) for v in model.weights}
    assert np.array_equal(numpy(twin(x)), numpy(model(x)))
    changed = rng.normal(size=(4, 3)).astype("float32")
    twin.get_layer("a").kernel.assign(changed)
    assert np.array_equal(numpy(twin.get_layer("b").kernel), changed.T)
    assert np.array_equal(weight.numpy(), W) and len(weight.uses) == 2
    assert_close(twin(x), x @ changed @ changed.T, 1e-4)
    twin.compile(keras.optimizers.SGD(0.1), "mse")
    twin.fit(x, t, batch_size=4, verbose=0)
    assert_close(twin.get_layer("a").kernel, changed - 0.1 * linear_gradient(x, t, changed), 1e-4)
    assert np.array_equal(numpy(a.kernel), W)


@both_copies
def test_d_a_copied_model_keeps_its_optimizer(copied, rng):
    model, _, _, _ = tied_pair(rng)
    x, t = batch(rng)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(x, t, batch_size=4, verbose=0)
    twin = copied(model)
    assert slot_count(twin.optimizer) == slot_count(model.optimizer) == 6
    for mine, theirs in zip(twin.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(numpy(mine), numpy(theirs))
    for each in (model, twin):
        each.fit(x, t, batch_size=4, verbose=0)
    for mine, theirs in zip(twin.get_weights(), model.get_weights(), strict=True):
        assert_close(mine, theirs, 1e-5)


@both_copies
@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_d_a_copied_list_of_layers_is_tied(copied, built, rng):
    weight = tether.Weight(name="w")
    pair = [tether.tie(layers.Dense(3), kernel=weight), tether.tie(layers.Dense(4), kernel=weight.T)]
    shapes = [(None, 4), (None, 3)]
    if built:
        for layer, shape in zip(pair, shapes, strict=True):
            layer.build(shape)
    twins = copied(pair)
    for layer, shape in zip(twins, shapes, strict=True):
        if not layer.built:
            layer.build(shape)
    if built:
        assert np.array_equal(numpy(twins[0].kernel), weight.numpy())
    W = rng.normal(size=(4, 3)).astype("float32")
    twins[0].kernel.assign(W)
    assert np.array_equal(numpy(twins[1].kernel), W.T)
    assert weight.is_built is built and len(weight.uses) == (2 if built else 0)
    if built:
        assert not np.array_equal(weight.numpy(), W)


@both_copies
def test_d_a_copied_siamese_model(copied, rng):
    model, weight = siamese(rng, "after build")
    left, right = batch(rng)
    twin = copied(model)
    assert len(twin.weights) == 3
    assert np.array_equal(numpy(twin([left, right])), numpy(model([left, right])))
    W = rng.normal(size=(4, 3)).astype("float32")
    twin.get_layer("tower").layers[0].kernel.assign(W)
    assert_close(twin([left, right]), (left - right) @ W @ W.T, 1e-4)
    assert not np.array_equal(weight.numpy(), W)

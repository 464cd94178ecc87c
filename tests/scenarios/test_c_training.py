"""Rows C1, C5 and C8 of the scenarios: training what is shared."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy, slot_count

layers = keras.layers

# --------------------------------------------------------------------------- C1


def ones_pair(first=None, second=None):
    """Two layers that share a weight of ones."""
    weight = tether.Weight((2, 2), initializer="ones", name="w")
    a = tether.tie(layers.Dense(2, use_bias=False, name="a"), kernel=weight if first is None else first(weight))
    b = tether.tie(layers.Dense(2, use_bias=False, name="b"), kernel=weight if second is None else second(weight))
    for layer in (a, b):
        layer.build((None, 2))
    return weight, a, b


def mean_of_both(a, b, x):
    return 0.5 * (keras.ops.sum(a(x)) + keras.ops.sum(b(x)))


def test_c1_a_shared_variable_steps_once():
    weight, a, b = ones_pair()
    x = np.ones((1, 2), "float32")
    variables = tether.inspection.unique(a.trainable_weights + b.trainable_weights)
    assert [v is weight.variable for v in variables] == [True]
    _, found = gradients(lambda: mean_of_both(a, b, x), variables)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in found], variables)
    assert_close(weight.value, np.full((2, 2), 0.9), 1e-6)


@pytest.mark.parametrize("built", ["before", "after"])
def test_c1_with_momentum_it_has_one_slot(built):
    if built == "before":
        weight, a, b = ones_pair()
    else:
        a, b = (layers.Dense(2, use_bias=False, kernel_initializer="ones") for _ in range(2))
        for layer in (a, b):
            layer.build((None, 2))
        weight = tether.weight_of(a, "kernel")
        tether.tie(b, kernel=weight)
    x = np.ones((1, 2), "float32")
    optimizer = keras.optimizers.SGD(0.1, momentum=0.5)
    variables = tether.inspection.unique(a.trainable_weights + b.trainable_weights)
    for _ in range(2):
        _, found = gradients(lambda: mean_of_both(a, b, x), variables)
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in found], variables)
    assert slot_count(optimizer) == 1
    # 1 - 0.1, then a velocity of 0.5 * -0.1 - 0.1
    assert_close(weight.value, np.full((2, 2), 0.75), 1e-6)


def test_c1_the_list_by_hand_equals_fit(rng):
    x, t = rng.normal(size=(2, 4, 2)).astype("float32")

    def model():
        weight, a, b = ones_pair(second=lambda w: w.T)
        weight.assign(np.array([[1, 2], [3, 4]], "float32"))
        return weight, a, b, keras.Sequential([keras.Input((2,)), a, b])

    by_fit, _, _, fitted = model()
    fitted.compile(keras.optimizers.Adam(0.1), "mse")
    fitted.fit(x, t, batch_size=4, epochs=2, shuffle=False, verbose=0)

    by_hand, a, b, _ = model()
    optimizer = keras.optimizers.Adam(0.1)
    variables = tether.inspection.unique(a.trainable_weights + b.trainable_weights)
    for _ in range(2):
        _, found = gradients(lambda: keras.ops.mean(keras.ops.square(keras.ops.subtract(b(a(x)), t))), variables)
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in found], variables)
    assert len(variables) == 1
    assert_close(by_hand.value, by_fit.value, 1e-4)
    assert np.abs(by_hand.numpy() - [[1, 2], [3, 4]]).min() > 0.1


def test_c1_unique_keeps_the_order_of_first_appearance():
    shared = tether.Weight((2, 2), name="shared")
    a, b, c = (layers.Dense(2) for _ in range(3))
    for layer in (a, b, c):
        layer.build((None, 2))
    tether.tie(a, kernel=shared)
    tether.tie(c, kernel=shared.T)
    everything = a.trainable_weights + b.trainable_weights + c.trainable_weights
    assert len(everything) == 6
    expected = [shared.variable, a.bias, b.kernel, b.bias, c.bias]
    assert [id(v) for v in tether.inspection.unique(everything)] == [id(v) for v in expected]
    expected = [b.kernel, b.bias, shared.variable, a.bias]
    found = tether.inspection.unique(b.trainable_weights + a.trainable_weights)
    assert [id(v) for v in found] == [id(v) for v in expected]


def test_c1_a_view_stands_for_what_is_stored():
    one, two = tether.Weight((2, 2), "ones", name="one"), tether.Weight((2, 2), "ones", name="two")
    a = tether.tie(layers.Dense(2), kernel=one + two)
    b = tether.tie(layers.Dense(2), kernel=two)
    for layer in (a, b):
        layer.build((None, 2))
    found = tether.inspection.unique([a.kernel, b.kernel, a.bias, a.bias])
    assert [id(v) for v in found] == [id(one.variable), id(two.variable), id(a.bias)]
    assert tether.inspection.unique([]) == []
    plain = layers.Dense(2)
    plain.build((None, 2))
    assert [id(v) for v in tether.inspection.unique(plain.weights * 2)] == [id(v) for v in plain.weights]


def test_c1_two_models_that_share(rng):
    """A shared embedding in two models, trained by one loop."""
    table = tether.Weight(rng.normal(size=(5, 3)).astype("float32"), name="table")
    embed = keras.Sequential([keras.Input((2,), dtype="int32"), tether.tie(layers.Embedding(5, 3), embeddings=table)])
    head = keras.Sequential([keras.Input((3,)), tether.tie(layers.Dense(5, use_bias=False), kernel=table.T)])
    ids, h = np.array([[0, 1], [1, 4]], "int32"), rng.normal(size=(2, 3)).astype("float32")
    E = table.numpy()
    variables = tether.inspection.unique(embed.trainable_variables + head.trainable_variables)
    assert len(embed.trainable_variables + head.trainable_variables) == 2 and len(variables) == 1
    _, found = gradients(lambda: keras.ops.sum(embed(ids)) + keras.ops.sum(head(h)), variables)
    keras.optimizers.SGD(0.1).apply([keras.ops.convert_to_tensor(g) for g in found], variables)
    expected = np.bincount(ids.ravel(), minlength=5)[:, None] + h.sum(axis=0)
    assert_close(table.value, E - 0.1 * expected)


# --------------------------------------------------------------------------- C5


class Adapted:
    """A layer with a frozen base and a low-rank part that learns."""

    def __init__(self, rng, layer, shape, path="kernel", rank=2):
        *left, right = shape
        self.base = tether.Weight(rng.normal(size=shape).astype("float32"), name="base")
        self.a = tether.Weight(rng.normal(size=(*left, rank)).astype("float32"), name="a")
        self.b = tether.Weight(rng.normal(size=(rank, right)).astype("float32"), name="b")
        self.layer = tether.tie(layer, {path: self.base.stop_gradient() + self.a @ self.b})

    @property
    def flags(self):
        return [w.trainable for w in (self.base, self.a, self.b)]


def dense_adapter(rng):
    return Adapted(rng, layers.Dense(3, use_bias=False, name="d"), (4, 3)), rng.normal(size=(5, 4)).astype("float32")


def embedding_adapter(rng):
    layer = layers.Embedding(4, 3, name="d")
    return Adapted(rng, layer, (4, 3), "embeddings"), rng.integers(0, 4, (5, 2)).astype("int32")


def convolution_adapter(rng):
    layer = layers.Conv2D(3, 2, use_bias=False, name="d")
    return Adapted(rng, layer, (2, 2, 3, 3)), rng.normal(size=(5, 3, 3, 3)).astype("float32")


ADAPTERS = [dense_adapter, embedding_adapter, convolution_adapter]


def toggle_layer(layer, model):
    layer.trainable = False
    layer.trainable = True


def toggle_model(layer, model):
    model.trainable = False
    model.trainable = True


def unfreeze_only(layer, model):
    model.trainable = True


TOGGLES = [toggle_layer, toggle_model, unfreeze_only]


@pytest.mark.parametrize("toggle", TOGGLES, ids=lambda toggle: toggle.__name__)
@pytest.mark.parametrize("make", ADAPTERS, ids=lambda make: make.__name__)
def test_c5_a_frozen_base_stays_frozen(make, toggle, rng):
    adapted, x = make(rng)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), adapted.layer])
    assert adapted.flags == [False, True, True]
    before = [id(v) for v in model.trainable_variables]
    toggle(adapted.layer, model)
    assert adapted.flags == [False, True, True]
    assert [id(v) for v in model.trainable_variables] == before == [id(w.variable) for w in (adapted.a, adapted.b)]
    assert [v is adapted.base.variable for v in model.non_trainable_variables] == [True]


@pytest.mark.parametrize("make", ADAPTERS, ids=lambda make: make.__name__)
def test_c5_a_frozen_base_is_not_decayed(make, rng):
    """AdamW would decay a variable that Keras calls trainable, gradient or no gradient."""
    adapted, x = make(rng)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), adapted.layer])
    toggle_model(adapted.layer, model)
    values = [w.numpy() for w in (adapted.base, adapted.a, adapted.b)]
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    model.fit(x, np.ones(numpy(model(x)).shape, "float32"), batch_size=5, verbose=0)
    assert np.array_equal(adapted.base.numpy(), values[0])
    assert np.abs(adapted.a.numpy() - values[1]).max() > 0.05
    assert np.abs(adapted.b.numpy() - values[2]).max() > 0.05
    assert slot_count(model.optimizer) == 4


def test_c5_while_off_nothing_learns(rng):
    adapted, x = dense_adapter(rng)
    model = keras.Sequential([keras.Input((4,)), adapted.layer, layers.Dense(2)])
    adapted.layer.trainable = False
    assert adapted.flags == [False, False, False] and len(model.trainable_variables) == 2
    _, (found,) = gradients(lambda: keras.ops.sum(model(x)), [model.layers[-1].kernel])
    values = [w.numpy() for w in (adapted.base, adapted.a, adapted.b)]
    expected = (x @ (values[0] + values[1] @ values[2])).sum(axis=0)
    assert_close(found, np.repeat(expected[:, None], 2, axis=1), 1e-4)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    model.fit(x, np.ones((5, 2), "float32"), batch_size=5, verbose=0)
    for weight, value in zip((adapted.base, adapted.a, adapted.b), values, strict=True):
        assert np.array_equal(weight.numpy(), value)


def test_c5_the_gradient_is_the_one_of_before(rng):
    adapted, x = dense_adapter(rng)
    adapted.layer.build(x.shape)
    variables = [adapted.a.variable, adapted.b.variable]
    toggle_layer(adapted.layer, None)
    _, found = gradients(lambda: keras.ops.sum(keras.ops.square(adapted.layer(x))), variables)
    A, B = adapted.a.numpy(), adapted.b.numpy()
    dW = x.T @ (2 * x @ (adapted.base.numpy() + A @ B))
    assert_close(found[0], dW @ B.T, 1e-4)
    assert_close(found[1], A.T @ dW, 1e-4)


def test_c5_the_flag_of_a_weight_is_kept_too(rng):
    frozen = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), trainable=False, name="frozen")
    layer = tether.tie(layers.Dense(3), kernel=frozen)
    model = keras.Sequential([keras.Input((4,)), keras.Sequential([keras.Input((4,)), layer])])
    for toggle in TOGGLES:
        toggle(layer, model)
        assert not frozen.trainable and not frozen.variable.trainable
        assert [v is layer.bias for v in model.trainable_variables] == [True]
    frozen.trainable = True
    assert len(model.trainable_variables) == 2
    frozen.trainable = False
    toggle_model(layer, model)
    assert len(model.trainable_variables) == 1


def test_c5_a_frozen_attribute_is_kept_too(rng):
    weight = tether.Weight(rng.normal(size=(3, 3)).astype("float32"), name="w")
    one = tether.tie(layers.Dense(3, use_bias=False), kernel=weight)
    two = tether.tie(layers.Dense(3, use_bias=False), kernel=weight.T)
    model = keras.Sequential([keras.Input((3,)), one, two])
    x = rng.normal(size=(5, 3)).astype("float32")
    two.kernel.trainable = False
    for toggle in TOGGLES:
        toggle(two, model)
        assert not two.kernel.trainable and one.kernel.trainable
        W = weight.numpy()
        _, (found,) = gradients(lambda: keras.ops.sum(model(x)), [weight.variable])
        assert_close(found, x.T @ np.ones((5, 3)) @ W, 1e-4)


def test_c5_after_a_reload(rng, tmp_path):
    adapted, x = dense_adapter(rng)
    model = keras.Sequential([keras.Input((4,)), adapted.layer])
    toggle_model(adapted.layer, model)
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    toggle_model(loaded.layers[-1], loaded)
    assert len(loaded.trainable_variables) == 2 and len(loaded.non_trainable_variables) == 1
    assert np.array_equal(numpy(loaded.non_trainable_variables[0]), adapted.base.numpy())
    loaded.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    loaded.fit(x, np.ones((5, 3), "float32"), batch_size=5, verbose=0)
    assert np.array_equal(numpy(loaded.non_trainable_variables[0]), adapted.base.numpy())


def test_c5_a_use_elsewhere_decides_for_itself(rng):
    """The base of one layer is the trained kernel of another."""
    adapted, x = dense_adapter(rng)
    plain = tether.tie(layers.Dense(3, use_bias=False), kernel=adapted.base)
    i = keras.Input((4,))
    model = keras.Model(i, [adapted.layer(i), plain(i)])
    toggle_model(adapted.layer, model)
    assert adapted.flags == [True, True, True]
    both = lambda: sum(keras.ops.sum(y) for y in model(x))  # noqa: E731
    _, (found,) = gradients(both, [adapted.base.variable])
    assert_close(found, np.repeat(x.sum(axis=0)[:, None], 3, axis=1), 1e-4)
    plain.trainable = False
    assert adapted.flags == [False, True, True]
    toggle_layer(adapted.layer, model)
    assert adapted.flags == [False, True, True]
    _, (found,) = gradients(both, [adapted.a.variable])
    assert_close(found, np.outer(x.sum(axis=0), adapted.b.numpy().sum(axis=1)), 1e-4)


# --------------------------------------------------------------------------- C8


def language_model(rng, when, nested=False):
    """A model whose head is the transpose of its table: the table's path says nothing of the head."""
    embed, head = layers.Embedding(6, 3, name="embed"), layers.Dense(6, name="lm_head")
    table = tether.Weight(rng.normal(size=(6, 3)).astype("float32"), name="table")
    if when == "before build":
        tether.tie(embed, embeddings=table)
        tether.tie(head, kernel=table.T)
    x = keras.Input((4,), dtype="int32")
    body = keras.Sequential([embed, layers.GlobalAveragePooling1D(), layers.Dense(3, name="body")], name="encoder")
    top = keras.Sequential([head], name="top") if nested else head
    model = keras.Model(x, top(body(x)))
    if when == "after build":
        table = tether.weight_of(embed, "embeddings")
        tether.tie(head, kernel=table.T)
    return model, table, head


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("when", ["before build", "after build"])
def test_c8_the_shared_head_is_excluded_by_its_name(when, nested, rng):
    model, table, head = language_model(rng, when, nested)
    found = tether.inspection.aliases(model).find("lm_head/kernel")
    assert [v is table.variable for v in found] == [True]
    found = tether.inspection.aliases(model).find("lm_head")
    assert {id(v) for v in found} == {id(table.variable), id(head.bias)}

    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=found)
    before = [numpy(v).copy() for v in model.trainable_variables]
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    kept = {id(v) for v in found}
    assert len(before) == 4
    for variable, value in zip(model.trainable_variables, before, strict=True):
        assert_close(variable, value if id(variable) in kept else value * (1 - 0.1 * 0.5), 1e-6)
    assert np.array_equal(table.numpy(), before[[v is table.variable for v in model.trainable_variables].index(True)])


def test_c8_the_decay_of_fit_goes_by_it_too(rng):
    model, table, _ = language_model(rng, "before build")
    body = model.get_layer("encoder").layers[-1]
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("lm_head"))
    # The loss does not depend on the weights: all gradients are zero.
    model.compile(optimizer, loss=lambda t, y: 0.0 * keras.ops.sum(y, axis=-1))
    ids, E, W = rng.integers(0, 6, (4, 4)).astype("int32"), table.numpy(), numpy(body.kernel).copy()
    model.fit(ids, np.zeros((4, 6), "float32"), batch_size=4, verbose=0)
    assert np.array_equal(table.numpy(), E)
    assert_close(body.kernel, 0.95 * W, 1e-6)


def test_c8_every_name_of_a_weight_is_listed(rng):
    model, table, head = language_model(rng, "before build")
    names = tether.inspection.aliases(model)
    own = table.variable.path
    embed = model.get_layer("encoder").layers[0]
    assert names[own] == (own, embed.embeddings.path, head.kernel.path)
    assert set(names) == {v.path for v in model.weights} and len(names) == 4
    assert names[head.bias.path] == (head.bias.path,)
    assert names.find("^embed|/embeddings$") == [table.variable]
    assert names.find("no such name") == []


def test_c8_composite_expressions_have_all_their_weights_names(rng):
    one, two = tether.Weight((4, 3), "ones", name="one"), tether.Weight((4, 3), "ones", name="two")
    a = tether.tie(layers.Dense(3, name="a"), kernel=one + two)
    b = tether.tie(layers.Dense(4, name="b"), kernel=two.T)
    model = keras.Sequential([keras.Input((4,)), a, b])
    names = tether.inspection.aliases(model)
    assert names[one.variable.path] == (one.variable.path, a.kernel.path)
    assert names[two.variable.path] == (two.variable.path, a.kernel.path, b.kernel.path)
    assert {id(v) for v in names.find(r"a/kernel")} == {id(one.variable), id(two.variable)}


def test_c8_after_a_reload(rng, tmp_path):
    model, _, _ = language_model(rng, "after build", nested=True)
    model.save(str(tmp_path / "m.keras"))
    loaded = keras.saving.load_model(str(tmp_path / "m.keras"))
    (found,) = tether.inspection.aliases(loaded).find("lm_head/kernel")
    assert found is tether.weight_of(loaded, "encoder/embed/embeddings").variable

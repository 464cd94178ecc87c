"""A layer, or a string, in the place of an expression: many weights shared with one line."""

import copy
import pickle
import re

import keras
import numpy as np
import pytest

import tether
from tests import kinds
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError, UnknownName, Unsupported

pytestmark = pytest.mark.spread

L = keras.layers


@keras.saving.register_keras_serializable("tests.sharing_layers")
class Block(L.Layer):
    """A small transformer block that makes its layers itself."""

    def __init__(self, hidden=8, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.use_bias = hidden, use_bias
        self.attention = L.MultiHeadAttention(2, 3)
        self.norm = L.LayerNormalization()
        self.up = L.Dense(hidden, activation="tanh")
        self.down = L.Dense(6, use_bias=use_bias)

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], self.hidden))

    def call(self, x):
        x = x + self.attention(x, x)
        return x + self.down(self.up(self.norm(x)))

    def get_config(self):
        return {**super().get_config(), "hidden": self.hidden, "use_bias": self.use_bias}


@keras.saving.register_keras_serializable("tests.sharing_layers")
class Stack(keras.Model):
    """Blocks in a list."""

    def __init__(self, depth=3, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = [Block(name=f"block_{i}") for i in range(depth)]

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


def built(layer=None, **settings):
    layer = layer if layer is not None else Block(**settings)
    layer.build((None, 5, 6))
    return layer


def functional(depth=3):
    inputs = x = keras.Input((5, 6))
    for i in range(depth):
        x = Block(name=f"block_{i}")(x)
    return keras.Model(inputs, x)


def sequential(depth=3):
    return keras.Sequential([keras.Input((5, 6)), *(Block(name=f"block_{i}") for i in range(depth))])


STACKS = {"subclass": lambda: built(Stack()), "functional": functional, "sequential": sequential}
ATTENTION, BLOCK = 4 * 36 + 3 * 6 + 6, 290


def x(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 5, 6)).astype("float32")


def distinct(*layers):
    return len({id(variable) for layer in layers for variable in layer.variables})


def snapshot(*layers):
    return [(type(layer), [(id(v), numpy(v).tobytes()) for v in layer.variables]) for layer in layers]


def test_a_layer_shares_all_of_another():
    a, b = built(name="a"), built(name="b")
    assert tether.tie(b, a) is b
    assert distinct(a, b) == distinct(a) == len(a.weights)
    assert_close(b(x()), a(x()))
    a.down.kernel.assign(a.down.kernel * 2)
    assert_close(b(x()), a(x()))


@pytest.mark.parametrize("make", [lambda a: {"**": a}, lambda a: {"*": a}, lambda a: {re.compile("(.*)"): a}])
def test_a_pattern_of_everything_is_the_same(make):
    a, b = built(), built()
    tether.tie(b, make(a))
    assert distinct(a, b) == distinct(a)


@pytest.mark.parametrize("kind", STACKS)
def test_what_the_stars_stand_for_corresponds(kind):
    model = STACKS[kind]()
    before = model.count_params()
    names = "blocks/*/attention/**" if kind == "subclass" else "block_*/attention/**"
    blocks = [block for block in model.layers if isinstance(block, Block)]
    first = numpy(blocks[0].attention._query_dense.kernel).copy()
    tether.tie(model, {names: names.replace("*", "0", 1)})
    assert before - model.count_params() == 2 * ATTENTION
    kernels = [block.attention._query_dense.kernel for block in blocks]
    assert all(np.array_equal(numpy(kernel.value), first) for kernel in kernels)
    assert len({kernel.expression for kernel in kernels}) == 1
    other = [block.attention._key_dense.kernel.expression for block in blocks]
    assert len(set(other)) == 1 and other[0] != kernels[0].expression


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("how", ["keras", "deepcopy", "clone", "pickle"])
def test_it_survives(kind, how, tmp_path):
    model = STACKS[kind]()
    model(x())
    names = "blocks/*/attention/**" if kind == "subclass" else "block_*/attention/**"
    tether.tie(model, {names: names.replace("*", "0", 1)})
    if how == "keras":
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
    elif how == "clone":
        again = keras.models.clone_model(model)
        again(x())
        again.set_weights(model.get_weights())
    else:
        again = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert again.count_params() == model.count_params() == 3 * BLOCK - 2 * ATTENTION
    assert_close(again(x()), model(x()))


def test_the_gradient_is_the_sum_over_uses():
    model, plain = functional(), functional()
    tether.tie(model, {"block_*/**": "block_0/**"})
    for block in plain.layers[1:]:
        block.set_weights(model.get_layer("block_0").get_weights())

    def of(root):
        return gradients(lambda: keras.ops.sum(root(x()) ** 2), root.trainable_weights)[1]

    tied, own = of(model), of(plain)
    for place, gradient in enumerate(tied):
        total = sum(own[place + len(tied) * depth] for depth in range(3))
        np.testing.assert_allclose(gradient, total, rtol=1e-3, atol=1e-3 * np.abs(total).max())


def test_names_of_layers_and_single_weights():
    model = functional()
    one = model.get_layer("block_1")
    tether.tie(model, {"block_1/up": "block_0/up", "block_2": one, "block_1/norm/*": "block_0/norm/*"})
    zero, one, two = (model.get_layer(f"block_{i}") for i in range(3))
    assert distinct(one, two) == distinct(one) + 4  # all at once: what `block_1` had before
    assert distinct(zero, one) == distinct(zero) + distinct(one) - 4
    a, b = built(), built()
    tether.tie(b, {"up/kernel": a, "down/bias": "attention/_output_dense/bias"})
    assert b.up.kernel.expression == a.up.kernel.expression
    assert b.down.bias.expression == b.attention._output_dense.bias.expression


def test_a_later_pattern_counts_and_some_are_left_out():
    a, b, c = built(), built(), built()
    w = tether.Weight((8,), "zeros", name="w")
    tether.tie(b, {"**": a, "*norm*": c, "up/bias": w, "!*_key_dense/*": None})
    assert b.norm.gamma.expression == c.norm.gamma.expression
    assert b.up.bias.expression is w
    assert b.down.kernel.expression == a.down.kernel.expression
    assert not hasattr(b.attention._key_dense.kernel, "expression")
    without, more = built(use_bias=False), built()
    tether.tie(without, {("**", "!down/bias"): more})
    assert distinct(without, more) == distinct(more)


def test_a_layer_that_is_not_built_shares_what_the_other_has():
    a, b, model = built(), Block(), Stack()
    tether.tie(b, a)
    tether.tie(model, {"blocks/1": a, "blocks/2/attention/**": a.attention})
    assert not b.built
    assert_close(b(x()), a(x()))
    model(x())
    assert_close(model.blocks[1](x()), a(x()))
    assert distinct(a, model.blocks[1]) == distinct(a)
    assert distinct(a, model.blocks[2]) == 2 * distinct(a) - 8


def test_two_layers_that_are_not_built_share_a_weight_by_name():
    a, b = L.Dense(3), L.Dense(3)
    tether.tie(b, kernel=a)
    b.build((None, 4))
    a.build((None, 4))
    assert a.kernel.expression == b.kernel.expression


def test_an_expression_of_the_source_is_shared():
    a, b = built(), built()
    tether.tie(a, {"down/kernel": 2 * tether.weight_of(a, "down/kernel")})
    tether.tie(b, a)
    assert b.down.kernel.expression == a.down.kernel.expression
    assert_close(b(x()), a(x()))


def test_a_frozen_use_stays_frozen():
    a, b = built(), built()
    b.attention.trainable = False
    tether.tie(b, a)
    assert not b.attention._query_dense.kernel.trainable and b.up.kernel.trainable
    assert a.attention._query_dense.kernel.trainable


def test_a_compiled_model_asks_to_compile_again():
    model = functional()
    model.compile("sgd", "mse")
    model.fit(x(), x(1), verbose=0)
    tether.tie(model, {"block_*/**": "block_0/**"})
    with pytest.raises(TetherError, match="compile"):
        model.fit(x(), x(1), verbose=0)
    model.compile("sgd", "mse")
    model.fit(x(), x(1), verbose=0)


def with_constraint():
    block = Block()
    block.down = L.Dense(6, kernel_constraint="non_neg")
    return built(block)


@pytest.mark.parametrize(
    ("target", "given", "error", "said"),
    [
        (lambda: built(), lambda: built(use_bias=False), UnknownName, "'down/bias'.*no such weight"),
        (lambda: built(use_bias=False), lambda: built(), UnknownName, "has the weight 'down/bias'"),
        (lambda: built(hidden=7), lambda: built(), ShapeMismatch, r"'up/kernel'.*\(6, 7\).*\(6, 8\)"),
        (lambda: built(), lambda: {"**": Block()}, TetherError, "not built"),
        (lambda: Block(), lambda: {"*/kernel": built()}, TetherError, "not built"),
        (lambda: built(), lambda: {"up/*": "*/*"}, TetherError, "more stars"),
        (lambda: built(), lambda: {"up/*": "dwon/*"}, UnknownName, "dwon"),
        (lambda: built(), lambda: {"upp/*": "down/*"}, UnknownName, "No weight of"),
        (lambda: built(), lambda: {"up/kernel": "kernel"}, UnknownName, "'kernel'"),
        (lambda: with_constraint(), lambda: _composite(), Unsupported, "constrains"),
    ],
)
def test_a_failure_names_the_weight_and_changes_nothing(target, given, error, said):
    layer, other = target(), given()
    around = [layer, *(v for v in (other.values() if isinstance(other, dict) else [other]) if isinstance(v, L.Layer))]
    before = snapshot(*around)
    with pytest.raises(error, match=said):
        tether.tie(layer, other)
    assert snapshot(*around) == before


def _composite():
    block = built()
    return tether.tie(block, {"down/kernel": tether.weight_of(block, "down/kernel") * 2})


def test_a_layer_used_twice_is_shared_once():
    shared = built(name="shared")
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, shared(Block(name="own")(shared(inputs))))
    tether.tie(model, {"own/**": "shared/**"})
    assert model.count_params() == BLOCK
    other = built()
    tether.tie(model, {"shared/**": other})
    assert distinct(other, shared) == distinct(other)


@kinds.for_each()
@pytest.mark.parametrize("how", ["tie", "tie, not built", "share_depth"])
def test_every_kind_of_layer(kind, how, rng, tmp_path):
    x = kind.inputs(rng)
    a, b = kind.make(), kind.make()
    y = numpy(kinds.apply(a, x))
    if how != "tie, not built":
        kinds.apply(b, x)
    if how == "share_depth":
        report = tether.share_depth([a, b], keep=())
        assert report.after * 2 == report.before
    else:
        tether.tie(b, a)
    np.testing.assert_allclose(numpy(kinds.apply(b, x)), y, atol=1e-6)
    assert {id(weight) for weight in b.weights} == {id(weight) for weight in a.weights}
    symbol = kind.symbol()
    model = keras.Model(symbol, [kinds.apply(a, symbol), kinds.apply(b, symbol)])
    tether.files.save_model(model, tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.count_params() == a.count_params()
    np.testing.assert_allclose(numpy(again(x)[1]), y, atol=1e-6)


# --------------------------------------------------------------------------- one weight of no shape yet, several places


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize(
    "of_second", [lambda w: w, lambda w: 0.5 * w, lambda w: w.stop_gradient()], ids=["itself", "expression", "frozen"]
)
def test_places_of_other_shapes_in_one_call_are_refused_and_nothing_changes(first, of_second):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(1, name="b")])
    weight, second = tether.Weight(name="w"), "b" if first == "a" else "a"
    stored = {each.path: numpy(each) for each in model.weights}
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(ShapeMismatch, match=f"'bias' of layer '{second}'"):
        tether.tie(model, {f"{first}/bias": weight, f"{second}/bias": of_second(weight)})
    assert [each.path for each in model.weights] == list(stored) and [type(layer) for layer in model.layers] == classes
    for each in model.weights:
        np.testing.assert_array_equal(numpy(each), stored[each.path])
    assert weight.shape is None and not weight.is_built
    tether.tie(model, {f"{first}/bias": weight})


def test_constraints_that_differ_are_refused_in_one_call_too():
    def model(first, second):
        layers = [
            keras.layers.Dense(4, name=name, kernel_constraint=each) for name, each in (("a", first), ("b", second))
        ]
        return keras.Sequential([keras.Input((4,)), *layers])

    refused, weight = model(keras.constraints.MaxNorm(1.0), "non_neg"), tether.Weight(name="w")
    with pytest.raises(Unsupported, match="constrained by MaxNorm already"):
        tether.tie(refused, {"a/kernel": weight, "b/kernel": weight})
    assert len(refused.weights) == 4
    same = model("non_neg", "non_neg")
    tether.tie(same, {"a/kernel": weight, "b/kernel": weight})
    assert len(same.weights) == 3 and weight.variable.constraint is not None

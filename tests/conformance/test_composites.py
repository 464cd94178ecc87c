"""Whole models, tied by path: layers in layers, models in models, and KerasHub's backbones."""

from dataclasses import dataclass
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

import tether
from tests import support
from tether.layers.tying import paths as layer_paths
from tether.layers.tying.state import View

L = keras.layers
SMALL = {
    "vocabulary_size": 50, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32,
    "max_sequence_length": 8, "dropout": 0.0,
}  # fmt: skip
RNG = np.random.default_rng(6)
X = RNG.normal(size=(8, 4)).astype("float32")
TOKENS = RNG.integers(0, 50, (2, 8)).astype("int32")
MASK = np.ones((2, 8), "int32")
BERT = {"token_ids": TOKENS, "segment_ids": 0 * TOKENS, "padding_mask": MASK}
GPT = {"token_ids": TOKENS, "padding_mask": MASK}


def nested():
    """A functional model in a functional model."""
    inside = keras.Input((4,))
    hidden = L.Dense(4, activation="tanh", name="inner_first")(inside)
    inner = keras.Model(inside, L.Dense(4, name="inner_second")(hidden), name="inner")
    inputs = keras.Input((4,))
    hidden = inner(L.Dense(4, name="outer_first")(inputs))
    return keras.Model(inputs, L.Dense(4, name="outer_last")(hidden))


def sequential():
    block = keras.Sequential([L.Dense(4, activation="tanh", name="a"), L.Dense(4, name="b")], name="block")
    steps = L.Bidirectional(L.SimpleRNN(2, unroll=True), name="steps")
    return keras.Sequential([keras.Input((4,)), block, L.Dense(4, name="c"), L.Reshape((2, 2)), steps])


@keras.saving.register_keras_serializable("tether_composites")
class Subclassed(keras.Model):
    """A model of the user's own: layers as attributes, in a list and in a dict."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encode = L.Dense(4, activation="tanh")
        self.blocks = [L.Dense(4, activation="tanh") for _ in range(2)]
        self.heads = {"mean": L.Dense(4), "spread": L.Dense(4)}

    def build(self, input_shape):
        for layer in (self.encode, *self.blocks, *self.heads.values()):
            layer.build(input_shape)

    def call(self, x):
        x = self.encode(x)
        for block in self.blocks:
            x = x + block(x)
        return self.heads["mean"](x) + self.heads["spread"](x)


def bert():
    return keras_hub.models.BertBackbone(**SMALL)


def gpt():
    return keras_hub.models.GPT2Backbone(**SMALL)


def classifier():
    """A backbone as a layer of a user's model."""
    backbone = keras_hub.models.BertBackbone(**SMALL, name="backbone")
    inputs = {name: keras.Input((8,), dtype="int32", name=name) for name in BERT}
    return keras.Model(inputs, L.Dense(3, name="head")(backbone(inputs)["pooled_output"]))


@dataclass(frozen=True)
class Composite:
    """A model, what it is called with, and the paths that come to read one weight, as it is or transposed."""

    make: Any
    inputs: Any
    same: tuple[str, ...]
    transposed: tuple[str, ...] = ()
    waits: bool = False
    """It is not built when it is made, so it can be tied before."""
    slow: bool = False

    def __str__(self):
        return self.make.__name__


BLOCK = "transformer_layer_{}/{}"
COMPOSITES = [
    Composite(nested, X, ("outer_first/kernel", "inner/inner_first/kernel"), ("outer_last/kernel",)),
    Composite(sequential, X, ("block/a/kernel", "c/kernel"), ("block/b/kernel",)),
    Composite(
        sequential, X, ("steps/forward_layer/cell/recurrent_kernel",), ("steps/backward_layer/recurrent_kernel",)
    ),
    Composite(
        Subclassed, X, ("encode/kernel", "blocks/0/kernel", "heads/mean/kernel"), ("blocks/1/kernel",), waits=True
    ),
    Composite(bert, BERT, tuple(BLOCK.format(i, "self_attention_layer/query/kernel") for i in range(2))),
    Composite(bert, BERT, tuple(BLOCK.format(i, "feedforward_output_dense/kernel") for i in range(2)), slow=True),
    Composite(
        bert,
        BERT,
        ("transformer_layer_0/feedforward_intermediate_dense/kernel",),
        ("transformer_layer_1/feedforward_output_dense/kernel",),
        slow=True,
    ),
    Composite(gpt, GPT, tuple(BLOCK.format(i, "self_attention/value/kernel") for i in range(2)), slow=True),
    Composite(
        gpt,
        GPT,
        tuple(BLOCK.format(i, "feedforward_intermediate_dense/kernel") for i in range(2)),
        tuple(BLOCK.format(i, "feedforward_output_dense/kernel") for i in range(2)),
    ),
    Composite(
        classifier,
        BERT,
        tuple("backbone/" + BLOCK.format(i, "self_attention_layer/key/kernel") for i in range(2)),
        slow=True,
    ),
]


def named(composite, *more):
    marks = [pytest.mark.slow] if composite.slow else []
    return pytest.param(
        composite, *more, marks=marks, id="-".join((str(composite), composite.same[0].replace("/", "."), *more))
    )


EACH = [named(composite) for composite in COMPOSITES]
BUILT_OR_NOT = [named(c, when) for c in COMPOSITES for when in (("before", "after") if c.waits else ("after",))]


def weight_at(model, path):
    variable = layer_paths.locate(model, layer_paths.split(path)).variable
    assert isinstance(variable, View), f"{path} is not tied"
    (weight,) = variable.expression.weights_used()
    return weight


def value_at(model, path):
    return support.numpy(layer_paths.locate(model, layer_paths.split(path)).variable.value)


def outputs(model, inputs):
    return [support.numpy(x) for x in keras.tree.flatten(model(inputs))]


def assert_tied(model, composite):
    """All paths read one weight; returns it."""
    weights = [weight_at(model, path) for path in composite.same + composite.transposed]
    assert all(weight is weights[0] for weight in weights)
    present = support.numpy(weights[0].value)
    for path in composite.same:
        np.testing.assert_array_equal(value_at(model, path), present)
    for path in composite.transposed:
        np.testing.assert_array_equal(value_at(model, path), present.T)
    return weights[0]


def assert_same_outputs(a, b, inputs):
    for mine, theirs in zip(outputs(a, inputs), outputs(b, inputs), strict=True):
        support.assert_close(mine, theirs, 1e-6)


def train_one_step(model, inputs):
    targets = keras.tree.map_structure(lambda x: np.zeros(x.shape, "float32"), model(inputs))
    loss = keras.tree.map_structure(lambda x: "mse", targets)
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.train_on_batch(inputs, targets)


@pytest.mark.parametrize(("composite", "when"), BUILT_OR_NOT)
def test_tied_by_path_it_trains_saves_loads_and_clones(composite, when, tmp_path):
    plain = composite.make()
    plain(composite.inputs)
    model = composite.make()
    if when == "after":
        model(composite.inputs)
    weight = tether.Weight(name="one")
    ties = dict.fromkeys(composite.same, weight) | dict.fromkeys(composite.transposed, weight.T)
    assert tether.tie(model, ties) is model
    model(composite.inputs)
    assert isinstance(model, type(plain))
    assert assert_tied(model, composite) is weight
    size, uses = int(np.prod(weight.shape)), len(ties)
    assert model.count_params() == plain.count_params() - (uses - 1) * size
    assert len(model.trainable_weights) == len(plain.trainable_weights) - (uses - 1)

    start = support.numpy(weight.value).copy()
    train_one_step(model, composite.inputs)
    assert assert_tied(model, composite) is weight
    assert not np.array_equal(weight.numpy(), start)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone(composite.inputs)
    clone.set_weights(model.get_weights())
    trained = support.numpy(weight.value).copy()
    for copy in (loaded, clone):
        assert assert_tied(copy, composite) is not weight
        assert copy.count_params() == model.count_params()
        assert_same_outputs(copy, model, composite.inputs)
        if composite.inputs is X:
            train_one_step(copy, composite.inputs)
        else:  # a step of a backbone takes long to compile
            assert_tied(copy, composite).assign(trained + 1)
        assert not np.array_equal(assert_tied(copy, composite).numpy(), trained)
        np.testing.assert_array_equal(weight.numpy(), trained)
    assert assert_tied(loaded, composite) is not assert_tied(clone, composite)


@pytest.mark.parametrize("composite", EACH)
def test_untied_it_is_plain_again(composite):
    model = composite.make()
    model(composite.inputs)
    order = [tuple(v.shape) for v in model.weights]
    weight = tether.Weight(name="one")
    tether.tie(model, dict.fromkeys(composite.same, weight) | dict.fromkeys(composite.transposed, weight.T))
    wanted = outputs(model, composite.inputs)
    tether.untie(model)
    for mine, theirs in zip(outputs(model, composite.inputs), wanted, strict=True):
        support.assert_close(mine, theirs, 1e-6)
    assert [tuple(v.shape) for v in model.weights] == order
    assert type(model) is type(composite.make())


def test_a_backbone_with_a_tied_head(tmp_path):
    """The head of a language model is its table, transposed."""
    backbone = keras_hub.models.GPT2Backbone(**SMALL, name="backbone")
    inputs = {name: keras.Input((8,), dtype="int32", name=name) for name in GPT}
    head = L.Dense(50, use_bias=False, name="head")
    model = keras.Model(inputs, head(backbone(inputs)))
    free = model.count_params()
    table = tether.weight_of(model, "backbone/token_embedding/embeddings")
    tether.tie(model, {"head/kernel": table.T})
    assert model.count_params() == free - 50 * 16
    train_one_step(model, GPT)
    np.testing.assert_array_equal(value_at(model, "head/kernel"), table.numpy().T)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert weight_at(loaded, "head/kernel") is weight_at(loaded, "backbone/token_embedding/embeddings")
    assert weight_at(loaded, "head/kernel") is not table
    assert loaded.count_params() == model.count_params()
    assert_same_outputs(loaded, model, GPT)


@pytest.mark.parametrize("make", [bert, gpt])
def test_every_weight_of_a_backbone_has_a_path(make):
    backbone = make()
    found = {}
    for path in layer_paths.weight_paths(backbone):
        found[path] = layer_paths.locate(backbone, layer_paths.split(path)).variable
    assert {id(v) for v in found.values()} == {id(v) for v in backbone.weights}
    assert len(found) == len(backbone.weights)


def test_a_backbone_with_every_weight_tied_keeps_its_outputs_and_presets(tmp_path):
    backbone = bert()
    wanted, values = outputs(backbone, BERT), backbone.get_weights()
    tether.tie(backbone, {path: tether.Weight() for path in layer_paths.weight_paths(backbone)})
    for mine, theirs in zip(outputs(backbone, BERT), wanted, strict=True):
        support.assert_close(mine, theirs, 1e-6)
    for mine, theirs in zip(backbone.get_weights(), values, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    backbone.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert isinstance(loaded, keras_hub.models.BertBackbone)
    assert_same_outputs(loaded, backbone, BERT)
    assert loaded.count_params() == backbone.count_params()

"""Models that share and combine weights in every way, for tests of what is said of them."""

import keras
import numpy as np

import tether
from tests.kinds import Bilinear

layers = keras.layers
PACKAGE = "tests.inspection"


def values(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("float32")


# --------------------------------------------------------------------------- layers of a user's own


@keras.saving.register_keras_serializable(PACKAGE)
class TiesItself(layers.Layer):
    """Makes a tie in its constructor, so that no config tells of it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        weight = tether.Weight(name="inner")
        self.down = tether.tie(layers.Dense(3, name="down"), kernel=weight)
        self.up = tether.tie(layers.Dense(4, name="up"), kernel=weight.T)

    def build(self, shape):
        self.down.build(shape)
        self.up.build((None, 3))

    def call(self, x):
        return self.up(self.down(x))


@keras.saving.register_keras_serializable(PACKAGE)
@tether.extend
class Scaled(layers.Dense):
    def build(self, shape):
        super().build(shape)
        self.gain = self.add_weight(name="gain", shape=(self.units,), initializer="ones")

    def call(self, x):
        return super().call(x) * self.gain


@keras.saving.register_keras_serializable(PACKAGE)
class Block(layers.Layer):
    """Layers in an attribute, in a list and in a dict, with state of its own that does not train."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4, name="first")
        self.stack = [layers.Dense(4, name="one"), layers.Dense(4, name="two")]
        self.others = {"norm": layers.LayerNormalization(name="norm"), "drop": layers.Dropout(0.5)}

    def build(self, shape):
        for layer in (self.first, *self.stack, self.others["norm"]):
            layer.build(shape)
        self.steps = self.add_weight(name="steps", shape=(), trainable=False, dtype="int32", initializer="zeros")
        self.shift = self.add_weight(name="shift", shape=(4,))

    def call(self, x):
        x = self.stack[1](self.stack[0](self.first(x)))
        return self.others["drop"](self.others["norm"](x)) + self.shift


@keras.saving.register_keras_serializable(PACKAGE)
class Own(keras.Model):
    """A subclassed model around others, whose config has theirs."""

    def __init__(self, body, head, **kwargs):
        super().__init__(**kwargs)
        self.body, self.head = body, head

    def build(self, shape):
        self.built = True

    def call(self, x):
        return self.head(self.body(x))

    def get_config(self):
        parts = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in ("body", "head")}
        return {**super().get_config(), **parts}

    @classmethod
    def from_config(cls, config):
        parts = {name: keras.saving.deserialize_keras_object(config.pop(name)) for name in ("body", "head")}
        return cls(**parts, **config)


# --------------------------------------------------------------------------- models


def tied_autoencoder():
    codec = tether.Weight(name="codec")
    x = keras.Input((6,))
    encode = tether.tie(layers.Dense(3, activation="relu", name="encode"), kernel=codec)
    decode = tether.tie(layers.Dense(6, name="decode"), kernel=codec.T)
    return keras.Model(x, decode(encode(x)), name="autoencoder")


def transposed_head():
    """The tie is made when everything is built and nested."""
    embed = layers.Embedding(7, 3, name="embed")
    head = layers.Dense(7, name="lm_head")
    x = keras.Input((4,), dtype="int32")
    body = keras.Sequential([embed, layers.GlobalAveragePooling1D(), layers.Dense(3, name="body")], name="encoder")
    model = keras.Model(x, keras.Sequential([head], name="top")(body(x)))
    tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
    return model


def slices():
    whole = tether.Weight((4, 6), "glorot_uniform", name="whole")
    x = keras.Input((4,))
    left = tether.tie(layers.Dense(2, use_bias=False, name="left"), kernel=whole[:, :2])
    right = tether.tie(layers.Dense(4, use_bias=False, name="right"), kernel=whole[:, 2:])
    return keras.Model(x, [left(x), right(x)])


def low_rank_child():
    parent = layers.Dense(3, name="parent")
    parent.build((None, 4))
    parent.trainable = False
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(2), bias=lambda b: 1.5 * b, name="child")
    x = keras.Input((4,))
    return keras.Model(x, [parent(x), child(x)])


def children_of_one_name():
    """Weights of one name and shape in several layers."""
    x = y = keras.Input((4,))
    for place in range(3):
        weight = tether.Weight(values(4, 4) + place, name="same")
        other = tether.Weight(values(4, 4) - place, name="same")
        y = tether.tie(layers.Dense(4, name=f"layer_{place}"), kernel=weight @ other)(y)
    return keras.Model(x, y)


def routed():
    base, french = tether.Weight(values(4, 3), name="base"), tether.Weight(values(4, 3), name="french")
    layer = tether.route(layers.Dense(3, name="routed"), kernel={"base": base, "french": base + french})
    return keras.Sequential([keras.Input((4,)), layer])


def extended():
    return keras.Sequential([keras.Input((4,)), Scaled(3, name="scaled"), Scaled(2, name="again")])


def nested():
    """A functional model and a Sequential in a subclassed one."""
    x = keras.Input((4,))
    body = keras.Model(x, layers.Dense(4, name="wide")(layers.Dense(4, name="narrow")(x)), name="body")
    model = Own(body, keras.Sequential([keras.Input((4,)), layers.Dense(4, name="out")], name="head"), name="own")
    model(np.ones((2, 4), "float32"))
    shared = tether.weight_of(model, "body/wide/kernel")
    tether.tie(model, {"head/out/kernel": shared.T, "body/narrow/kernel": 0.5 * shared})
    return model


def block():
    inner = Block(name="block")
    inner.build((None, 4))
    tether.tie(inner, {"stack/1/kernel": tether.weight_of(inner, "first/kernel").T})
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2, name="last")])


def attention():
    mha = layers.MultiHeadAttention(2, 2, name="attention")
    x = keras.Input((5, 4))
    kernel = tether.Weight((4, 2, 2), name="projection")
    tether.tie(mha, {"query/kernel": kernel, "key/kernel": 2.0 * kernel})
    return keras.Model(x, mha(x, x))


def attention_after_build():
    mha = layers.MultiHeadAttention(2, 2, name="attention")
    x = keras.Input((5, 4))
    model = keras.Model(x, mha(x, x))
    tether.tie(mha, {"key/kernel": tether.weight_of(mha, "query/kernel")})
    return model


def own_attribute():
    table = tether.Weight((5, 4), "glorot_uniform", name="table")
    x = keras.Input((2,), dtype="int32")
    embed = tether.tie(layers.Embedding(5, 4, name="embed"), embeddings=table)
    return keras.Model(x, Bilinear(table, name="bilinear")(embed(x)))


def own_attribute_alone():
    """A weight that a layer holds, and nothing is tied to, beside a tie."""
    x = keras.Input((4,))
    own = tether.Weight((4, 4), "glorot_uniform", name="own")
    dense = tether.tie(layers.Dense(4, name="dense"), kernel=tether.Weight(name="kernel"))
    return keras.Model(x, Bilinear(own, name="bilinear")(dense(x)))


def ties_itself():
    return keras.Sequential([keras.Input((4,)), TiesItself(name="itself"), layers.Dense(2, name="last")])


def private_sharing():
    """What people do without Tether: a private attribute of Keras."""
    a, b = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    model = keras.Sequential([keras.Input((4,)), a, b])
    b._tracker.unlock()
    b._untrack_variable(b._kernel)
    b._kernel = a._kernel
    b._tracker.lock()
    return model


def reversible_embedding():
    layer = layers.ReversibleEmbedding(6, 3, name="table")
    x = keras.Input((4,), dtype="int32")
    return keras.Model(x, layer(layers.Dense(3, name="between")(layer(x)), reverse=True))


def batch_normalization():
    gamma = tether.Weight(name="gamma")
    x = y = keras.Input((4,))
    for name in ("one", "two"):
        y = tether.tie(layers.BatchNormalization(name=name), gamma=gamma)(layers.Dense(4)(y))
    return keras.Model(x, y)


def recurrent():
    weight = tether.Weight(name="recurrent")
    x = keras.Input((5, 4))
    a = tether.tie(layers.LSTM(3, name="a", return_sequences=True), {"cell/recurrent_kernel": weight})
    b = tether.tie(layers.GRU(4, name="b"), {"cell/kernel": weight})
    return keras.Model(x, b(a(x)))


def bidirectional():
    both = layers.Bidirectional(layers.LSTM(2), name="both")
    weight = tether.Weight(name="kernel")
    tether.tie(both, {"forward_layer/cell/kernel": weight, "backward_layer/cell/kernel": weight})
    return keras.Sequential([keras.Input((5, 4)), both])


def time_distributed():
    weight = tether.Weight(name="w")
    inner = tether.tie(layers.Dense(4, name="inner"), kernel=weight)
    x = keras.Input((5, 4))
    return keras.Model(x, tether.tie(layers.Dense(4, name="outer"), kernel=weight.T)(layers.TimeDistributed(inner)(x)))


def unbuilt():
    weight = tether.Weight(name="later")
    return keras.Sequential(
        [tether.tie(layers.Dense(4, name=name), kernel=weight) for name in ("a", "b")], name="unbuilt"
    )


def shared_layer():
    """A layer in a sub-model and outside of it."""
    dense = layers.Dense(4, name="twice")
    x = keras.Input((4,))
    inner = keras.Model(x, layers.Dense(4, name="inside")(dense(x)), name="inner")
    y = keras.Input((4,))
    model = keras.Model(y, dense(inner(y)))
    tether.tie(model.get_layer("inner").get_layer("inside"), kernel=tether.weight_of(dense, "kernel").T)
    return model


def frozen_use():
    weight = tether.Weight(values(4, 4), name="w")
    x = keras.Input((4,))
    a = tether.tie(layers.Dense(4, name="a"), kernel=weight)
    b = tether.tie(layers.Dense(4, name="b"), kernel=weight.T)
    c = tether.tie(layers.Dense(4, name="c"), kernel=weight.stop_gradient())
    model = keras.Model(x, [a(x), b(x), c(x), layers.Dense(4, name="plain", trainable=True)(x)])
    b.trainable = False
    model.get_layer("plain").trainable = False
    return model


def soft_tie():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="one"), layers.Dense(4, name="two")])
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    return model


def with_state():
    """A form with state of its own, random generators and a container of layers."""
    kernel = tether.Weight(values(4, 4), name="kernel")
    form = tether.forms.spectral_norm()
    x = keras.Input((4,))
    y = tether.tie(layers.Dense(4, name="normed"), kernel=form(kernel))(x)
    y = layers.Dropout(0.5)(layers.GaussianNoise(0.1)(y))
    return keras.Model(x, tether.tie(layers.Dense(4, name="plain"), kernel=kernel)(y))


def bfloat16():
    keras.config.set_dtype_policy("bfloat16")
    try:
        return tied_autoencoder()
    finally:
        keras.config.set_dtype_policy("float32")


def float32_weight_in_bfloat16():
    weight = tether.Weight(values(4, 4), name="w")
    x = keras.Input((4,))
    a = tether.tie(layers.Dense(4, name="a", dtype="bfloat16"), kernel=weight)
    return keras.Model(x, tether.tie(layers.Dense(4, name="b", dtype="mixed_bfloat16"), kernel=weight.T)(a(x)))


def plain():
    x = keras.Input((8, 8, 1))
    y = layers.BatchNormalization()(layers.Conv2D(2, 3)(x))
    y = layers.Dropout(0.5)(layers.Flatten()(y))
    return keras.Model(x, layers.Dense(3)(y))


def more_than_unshared():
    """The parts take more than the whole."""
    a, b = tether.Weight(values(4, 16), name="a"), tether.Weight(values(16, 4), name="b")
    return keras.Sequential([keras.Input((4,)), tether.tie(layers.Dense(4, name="dense"), kernel=a @ b)])


MODELS = {
    make.__name__: make
    for make in (
        tied_autoencoder, transposed_head, slices, low_rank_child, children_of_one_name, routed, extended, nested,
        block, attention, attention_after_build, own_attribute, own_attribute_alone, ties_itself, private_sharing,
        reversible_embedding, batch_normalization, recurrent, bidirectional, time_distributed, unbuilt, shared_layer,
        frozen_use, soft_tie, with_state, bfloat16, float32_weight_in_bfloat16, plain, more_than_unshared,
    )
}  # fmt: skip


@keras.saving.register_keras_serializable(PACKAGE)
def squares(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(keras.ops.cast(y_pred, "float32")), axis=-1)


def fitted(model, optimizer):
    """A model after one step."""
    model.compile(optimizer, loss=squares)
    x = np.zeros((2, *model.inputs[0].shape[1:]), "float32")
    model.fit(x, [np.zeros((2, 1), "float32")] * len(model.outputs), verbose=0)
    return model

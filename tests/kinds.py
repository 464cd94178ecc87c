"""Kinds of layers, for tests of what holds for each of them."""

import operator

import keras
import pytest

layers = keras.layers


class Kind:
    """A kind of layer, the path of one of its weights, and inputs for it."""

    def __init__(self, make, path, shape, vocabulary=None):
        self.make, self.path, self.shape, self.vocabulary = make, path, shape, vocabulary

    def inputs(self, rng, batch=2):
        if self.vocabulary is not None:
            return rng.integers(0, self.vocabulary, (batch, *self.shape)).astype("int32")
        return rng.normal(size=(batch, *self.shape)).astype("float32")

    def symbol(self):
        return keras.Input(self.shape, dtype="int32" if self.vocabulary is not None else "float32")

    def read(self, layer):
        return operator.attrgetter(self.path.replace("/", "."))(layer)

    def pair(self):
        """A model of two layers of this kind side by side: model, first, second."""
        first, second = self.make(), self.make()
        x = self.symbol()
        return keras.Model(x, [apply(first, x), apply(second, x)]), first, second


@keras.saving.register_keras_serializable(package="kinds")
class Bilinear(layers.Layer):
    """A layer of one's own that reads a weight in its call, through a transpose, and has it in its config."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return keras.ops.matmul(x, self.table.T.value)

    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("table")), **config)


KINDS = {
    "dense": Kind(lambda: layers.Dense(3, activation="tanh"), "kernel", (4,)),
    "einsum_dense": Kind(
        lambda: layers.EinsumDense("abc,cd->abd", output_shape=(None, 3), bias_axes="d"), "kernel", (5, 4)
    ),
    "embedding": Kind(lambda: layers.Embedding(7, 3), "embeddings", (4,), 7),
    "conv1d": Kind(lambda: layers.Conv1D(3, 2), "kernel", (5, 4)),
    "conv2d": Kind(lambda: layers.Conv2D(3, 2), "kernel", (5, 5, 2)),
    "depthwise": Kind(lambda: layers.DepthwiseConv2D(2), "kernel", (5, 5, 2)),
    "batch_normalization": Kind(lambda: layers.BatchNormalization(), "gamma", (4,)),
    "layer_normalization": Kind(lambda: layers.LayerNormalization(), "gamma", (4,)),
    "lstm": Kind(lambda: layers.LSTM(3), "cell/recurrent_kernel", (5, 4)),
    "gru": Kind(lambda: layers.GRU(3), "cell/recurrent_kernel", (5, 4)),
    "bidirectional": Kind(lambda: layers.Bidirectional(layers.LSTM(2)), "forward_layer/cell/kernel", (5, 4)),
    "time_distributed": Kind(lambda: layers.TimeDistributed(layers.Dense(3)), "layer/kernel", (5, 4)),
    "attention": Kind(lambda: layers.MultiHeadAttention(2, 2), "query/kernel", (5, 4)),
    "block": Kind(
        lambda: keras.Sequential([layers.Dense(4, activation="relu", name="first"), layers.Dense(3)]),
        "first/kernel",
        (4,),
    ),
}


def for_each(*names, among=KINDS):
    """Runs a test with each of these kinds; without names, with all."""
    chosen = names or tuple(among)
    return pytest.mark.parametrize("kind", [among[name] for name in chosen], ids=chosen)


def apply(layer, x):
    """What a layer makes of an input, which attention takes twice."""
    return layer(x, x) if isinstance(layer, layers.MultiHeadAttention) else layer(x)

"""Models for the tests of files: the same layers, tied and not."""

import keras
import numpy as np

import tether

layers = keras.layers


def autoencoder(tied, **options):
    """Dense 5 -> 3 -> 5; tied, the second kernel is the first one's transpose."""
    x = keras.Input((5,))
    encode, decode = layers.Dense(3, name="encode", **options), layers.Dense(5, name="decode", **options)
    if tied:
        codec = tether.Weight(name="codec")
        tether.tie(encode, kernel=codec)
        tether.tie(decode, kernel=codec.T)
    return keras.Model(x, decode(encode(x)), name="autoencoder")


def stack(tied):
    """An embedding, a normalisation with state, dropout, an inner model, and a head that may be the embedding's."""
    x = keras.Input((4,), dtype="int32")
    h = layers.Embedding(7, 3, name="embed")(x)
    h = layers.BatchNormalization(name="norm")(h)
    h = layers.Dropout(0.5, name="drop")(h)
    inner = keras.Sequential([keras.Input((4, 3)), layers.Dense(3, name="inside")], name="inner")
    h = inner(h)
    model = keras.Model(x, layers.Dense(7, name="head")(h), name="stack")
    if tied:
        tether.tie(model, {"head/kernel": tether.weight_of(model, "embed/embeddings").T})
    return model


def randomize(model, rng):
    """Gives every stored weight a value of its own."""
    for variable in model.weights:
        value = rng.normal(size=variable.shape).astype("float32")
        variable.assign(np.abs(value) if "variance" in variable.name else value)
    return model


def state(model):
    """All values, to be compared bit by bit."""
    return [(v.path, np.asarray(keras.ops.convert_to_numpy(v.value)).tobytes()) for v in model.variables]

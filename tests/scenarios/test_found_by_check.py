"""Rows B3, B5, B6, B9, C1 and C8 of the scenarios as people write them today: `tether.check` finds them."""

import keras
import numpy as np
import pytest

import tether
from tests.kinds import Bilinear
from tests.support import assert_close, gradients, numpy

layers = keras.layers
BACKEND = keras.backend.backend()


def only(found, rule):
    """The one finding there is, of this rule."""
    assert [finding.rule for finding in found] == [rule], str(found)
    return found[0]


def step(model, x, t):
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, t, batch_size=len(x), verbose=0)


# --------------------------------------------------------------------------- B3


@keras.saving.register_keras_serializable(package="found_by_check")
class CopiedRecipe(layers.Layer):
    """The most-copied recipe."""

    def __init__(self, encoder, **kwargs):
        super().__init__(**kwargs)
        object.__setattr__(self, "encoder", encoder)

    def build(self, input_shape):
        self.kernel = keras.ops.transpose(self.encoder.kernel)

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_b3_the_frozen_copy_is_found(nested, rng):
    encoder = layers.Dense(6, name="encode")
    x = keras.Input((5,))
    h = encoder(x)
    decoder = CopiedRecipe(encoder, name="decode")
    y = keras.Sequential([keras.Input((6,)), decoder], name="inner")(h) if nested else decoder(h)
    model = keras.Model(x, y)
    finding = only(tether.check(model), "frozen-constant")
    assert finding.severity == "error" and finding.where.endswith("decode/kernel")
    assert "'encode/kernel' transposed" in finding.why

    if BACKEND != "torch":  # where a transpose shares its memory
        encoder.kernel.assign(rng.normal(size=(5, 6)).astype("float32"))
        assert np.abs(numpy(decoder.kernel) - numpy(encoder.kernel).T).max() > 0.1

    weight = tether.weight_of(encoder, "kernel")
    mended = keras.Model(x, Bilinear(weight, name="decode")(h))  # what the finding says
    assert not tether.check(mended)
    value = rng.normal(size=(5, 6)).astype("float32")
    encoder.kernel.assign(value)
    batch = rng.normal(size=(2, 5)).astype("float32")
    assert_close(mended(batch), batch @ value @ value.T, 1e-4)


def test_b3_a_copy_that_training_has_left_behind_is_found(rng):
    encoder = layers.Dense(12, name="encode")
    x = keras.Input((8,))
    h = encoder(x)

    class Scaled(CopiedRecipe):
        def build(self, input_shape):
            self.kernel = keras.ops.stop_gradient(0.5 * keras.ops.transpose(self.encoder.kernel))

    model = keras.Model(x, Scaled(encoder, name="decode")(h))
    data = rng.normal(size=(16, 8)).astype("float32")
    step(model, data, data)
    finding = only(tether.check(model), "frozen-constant")
    assert finding.where == "decode/kernel" and "once computed from 'encode/kernel'" in finding.why


# --------------------------------------------------------------------------- B5


@pytest.mark.parametrize("form", ["matmul", "einsum"])
def test_b5_tied_logits_by_an_operation_are_found(form, rng):
    embed = layers.Embedding(11, 4, name="embed")
    x = keras.Input((3,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(embed(x))
    if form == "matmul":
        logits = keras.ops.matmul(h, keras.ops.transpose(embed.embeddings))
    else:
        logits = keras.ops.einsum("bd,vd->bv", h, embed.embeddings)
    model = keras.Model(x, logits)
    found = tether.check(model)
    if form == "matmul":  # the transpose was computed when the graph was made
        finding = only(found, "frozen-constant")
        assert finding.severity == "error" and "'embed/embeddings' transposed" in finding.why
    else:  # the variable itself: it trains, and no file knows it
        finding = only(found, "captured-variable")
        assert finding.severity == "warning" and "a file of the model does not hold" in finding.why
    assert finding.where.startswith(form) and "tether.Lambda" in finding.mend

    head = tether.tie(layers.Dense(11, use_bias=False), kernel=tether.weight_of(embed, "embeddings").T)
    mended = keras.Model(x, head(h))
    assert not tether.check(mended, rng.integers(0, 11, (4, 3)).astype("int32"))


# --------------------------------------------------------------------------- B6


@keras.saving.register_keras_serializable(package="found_by_check")
def scaled(x, scale):
    return x * scale


@pytest.mark.parametrize("form", ["lambda", "operation"])
def test_b6_a_bare_variable_is_found(form, rng, tmp_path):
    scale = keras.Variable(rng.normal(size=4).astype("float32"), name="scale")
    x = keras.Input((4,))
    h = layers.Dense(4)(x)
    y = layers.Lambda(lambda t: t * scale, name="scaling")(h) if form == "lambda" else keras.ops.multiply(h, scale)
    model = keras.Model(x, y)
    finding = only(tether.check(model), "captured-variable")
    assert finding.severity == "error" and "'scale'" in finding.why

    before = numpy(scale).copy()
    data = rng.normal(size=(8, 4)).astype("float32")
    step(model, data, data)
    assert np.array_equal(numpy(scale), before)  # never trained

    weight = tether.Weight((4,), "ones", name="scale")
    mended = keras.Model(x, tether.Lambda(scaled, scale=weight)(h))
    assert not tether.check(mended, data)
    step(mended, data, data)
    assert np.abs(weight.numpy() - 1).min() > 0
    mended.save(tmp_path / "m.keras")
    assert not tether.check(tmp_path / "m.keras")
    assert not tether.check(keras.saving.load_model(tmp_path / "m.keras"))


# --------------------------------------------------------------------------- B9


class Decoder(layers.Layer):
    """A decoder that holds its encoder."""

    def __init__(self, encoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.shift = layers.Dense(5, name="shift")

    def build(self, shape):
        self.shift.build((None, 5))

    def call(self, h):
        return self.shift(keras.ops.matmul(h, keras.ops.transpose(self.encoder.kernel)))


def test_b9_an_encoder_frozen_by_its_decoder_is_found(rng):
    encoder = layers.Dense(3, name="encode")
    x = keras.Input((5,))
    decoder = Decoder(encoder, name="decode")
    model = keras.Model(x, decoder(encoder(x)))
    assert not tether.check(model)
    decoder.trainable = False
    assert not model.trainable_weights  # the encoder was never frozen by anybody
    finding = only(tether.check(model), "frozen-through-another")
    assert finding.where == "encode" and "'decode'" in finding.why
    exec(finding.mend, {"model": model})
    assert encoder.trainable and not tether.check(model)

    tied = tether.tie(layers.Dense(5, name="tied"), kernel=tether.weight_of(encoder, "kernel").T)
    mended = keras.Model(x, tied(encoder(x)))
    tied.trainable = False
    assert len(mended.trainable_weights) == 2 and not tether.check(mended)


# --------------------------------------------------------------------------- C1


def test_c1_a_variable_that_is_stepped_twice_is_explained(rng):
    weight = tether.Weight((2, 2), initializer="ones", name="w")
    a = tether.tie(layers.Dense(2, use_bias=False, name="a"), kernel=weight)
    b = tether.tie(layers.Dense(2, use_bias=False, name="b"), kernel=weight)
    model = keras.Sequential([keras.Input((2,)), a, b])
    by_hand = a.trainable_weights + b.trainable_weights
    x = np.ones((1, 2), "float32")
    _, (gradient,) = gradients(lambda: 0.5 * (keras.ops.sum(a(x)) + keras.ops.sum(b(x))), [weight.variable])
    gradient = keras.ops.convert_to_tensor(gradient)
    model.optimizer = keras.optimizers.SGD(0.1)
    model.optimizer.apply([gradient, gradient], by_hand)
    assert np.abs(weight.numpy() - 0.9).max() > 0.05  # 0.9 is right

    found = tether.check(model, rules=["stepped-twice"])
    finding = only(found, "stepped-twice")
    assert finding.severity == "error" and finding.where == weight.variable.path
    assert "2 times" in finding.why and "tether.inspection.unique" in finding.mend

    exec(finding.mend, {"model": model, "tether": tether})
    assert not tether.check(model, rules=["stepped-twice"])
    weight.assign(np.ones((2, 2), "float32"))
    model.optimizer.apply([gradient], tether.inspection.unique(by_hand))
    assert_close(weight.value, np.full((2, 2), 0.9), 1e-6)


# --------------------------------------------------------------------------- C8


@pytest.mark.parametrize("name", ["lm_head", "head/kernel$"])
def test_c8_an_exclusion_that_misses_is_found(name, rng):
    embed, head = layers.Embedding(6, 3, name="embed"), layers.Dense(6, name="lm_head")
    x = keras.Input((4,), dtype="int32")
    body = layers.Dense(3, name="body")
    model = keras.Model(x, head(body(layers.GlobalAveragePooling1D()(embed(x)))))
    tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=[name])
    model.compile(optimizer, "mse")
    finding = only(tether.check(model), "name-misses-alias")
    assert finding.where == "lm_head/kernel" and "embed/embeddings" in finding.why

    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    exec(finding.mend, {"model": model, "tether": tether, "optimizer": optimizer})
    model.compile(optimizer, "mse")
    assert not tether.check(model)
    optimizer.build(model.trainable_variables)
    before, decayed = numpy(embed.embeddings).copy(), 0.95 * numpy(body.kernel)
    zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    assert np.array_equal(numpy(embed.embeddings), before)
    assert_close(body.kernel, decayed, 1e-6)

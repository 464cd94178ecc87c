"""Rules of training: gradients, uses, tables, optimizers, freezing, building."""

import random

import keras
import numpy as np
import pytest

import tether
from tests.inspection.checking.faults import Child, language_model, normal, tied_pair, trained
from tests.support import numpy

layers = keras.layers


# --------------------------------------------------------------------------- gradients


def test_a_factor_behind_a_zero_one_is_no_finding(rng):
    """The gradient of A is zero as long as B is, and B learns."""
    base = tether.Weight(normal(rng, 6, 5), name="base", trainable=False)
    layer = tether.tie(layers.Dense(5), kernel=base + tether.low_rank(2))
    model = keras.Sequential([keras.Input((6,)), layer])
    (a,) = [weight for weight in layer.kernel.expression.weights_used() if weight.shape == (6, 2)]
    found = tether.inspection.gradients(model, normal(rng, 4, 6))
    assert found.weights[a.variable.path].norm == 0
    assert not tether.check(model, normal(rng, 4, 6))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_keras_lora_is_no_finding_in_a_compiled_model(optimizer, rng):
    """The same for a model that has an optimizer, trained or not."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6)])
    model.layers[0].enable_lora(2)
    model.compile(optimizer, "mse")
    x = normal(rng, 4, 6)
    assert not tether.check(model, (x, x))
    model.fit(x, x, verbose=0)
    assert not tether.check(model, (x, x))


def test_a_model_that_starts_at_zero_is_no_finding(rng):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5), layers.Dense(4, kernel_initializer="zeros")])
    assert not tether.check(model, normal(rng, 4, 6))


def test_a_model_in_which_nothing_trains_is_no_finding(rng):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5)])
    model.trainable = False
    assert not tether.check(model, normal(rng, 4, 6))


def test_the_batch_may_have_targets_that_nothing_compares(rng):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5)])
    assert not tether.check(model, (normal(rng, 4, 6), normal(rng, 4, 5)))


def test_a_hint_has_the_measured_norm_of_each_use(rng):
    model, codec = tied_pair(rng)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = normal(rng, 4, 6), normal(rng, 4, 6)
    (finding,) = tether.check(model, (x, y))
    measured = tether.inspection.gradients(model, x, y).weights[codec.variable.path]
    for use in measured.uses:
        assert f"{use.where} {use.norm:.3g}" in finding.why
    assert f"{measured.norm:.3g}" in finding.why
    (finding,) = tether.check(model)
    assert "on this batch" not in finding.why and "2 uses" in finding.why


def test_a_use_that_passes_no_gradient_does_not_count(rng):
    model, _ = tied_pair(rng)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.layers[1].trainable = False
    assert not tether.check(model)


def test_the_code_for_many_uses_keeps_every_expression_and_scales_its_gradient(rng):
    model, codec = tied_pair(rng)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = normal(rng, 4, 6)
    before = numpy(model(x))
    whole = tether.inspection.gradients(model, x, x).weights[codec.variable.path].norm
    (finding,) = tether.check(model)
    exec(finding.mend, {"model": model, "tether": tether})
    np.testing.assert_allclose(numpy(model(x)), before, rtol=1e-5, atol=1e-6)
    halved = tether.inspection.gradients(model, x, x).weights[codec.variable.path].norm
    assert abs(halved - whole / 2) < 1e-3 * whole
    assert not tether.check(model)


# --------------------------------------------------------------------------- tables


def wide(model, data=None):
    return tether.check(model, data, rules=["wide-table"])


def test_the_logits_that_the_batch_gives_decide(rng):
    ids = rng.integers(0, 50, (8, 4)).astype("int32")

    def model(scale):
        embed = layers.Embedding(50, 64, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0))
        head = layers.Dense(50, name="head")
        x = keras.Input((4,), dtype="int32")
        h = layers.LayerNormalization()(embed(x))
        model = keras.Model(x, head(layers.Rescaling(scale)(h)))
        tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
        return model

    as_it_is, scaled_down = model(1.0), model(64**-0.5)
    (finding,) = wide(as_it_is, ids)
    assert f"measured: {np.std(numpy(as_it_is(ids))):.3g}" in finding.why
    assert wide(scaled_down) and not wide(scaled_down, ids)


def test_a_table_that_has_trained_is_as_wide_as_it_learnt_to_be(rng):
    model = language_model(rng, embeddings_initializer=keras.initializers.RandomNormal(stddev=10.0))
    model.compile("adam", "mse")
    assert wide(model)
    model.fit(np.zeros((2, 4), "int32"), np.zeros((2, 4, 12)), verbose=0)
    assert not wide(model)


def test_keras_reversible_embedding_is_a_head_where_it_is_called_as_one():
    embed = layers.ReversibleEmbedding(50, 64, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0))
    x = keras.Input((4,), dtype="int32")
    h = layers.LayerNormalization()(embed(x))
    (finding,) = wide(keras.Model(x, embed(h, reverse=True)))
    assert finding.where.endswith("/embeddings")
    assert not wide(keras.Model(x, h))


def test_a_fresh_table_of_keras_is_not_too_wide(rng):
    assert not wide(language_model(rng))


# --------------------------------------------------------------------------- optimizers


def test_an_optimizer_that_scales_the_loss_is_looked_into(rng):
    model, _ = tied_pair(rng)
    model = trained(model, rng, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    assert [finding.rule for finding in tether.check(model)] == ["many-uses"]
    tether.tie(model, {"decode/kernel": tether.Weight(normal(rng, 6, 6), name="new").T})
    assert tether.check(model).by_rule("compiled-before-tied")


def test_freezing_after_training_leaves_the_optimizer_and_unfreezing_does_not(rng):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="a"), layers.Dense(6, name="b")])
    model.layers[0].trainable = False
    trained(model, rng)
    assert not tether.check(model)
    model.layers[1].trainable = False
    assert not tether.check(model)
    model.layers[0].trainable = True
    (finding,) = tether.check(model)
    assert finding.rule == "compiled-before-tied" and "a/kernel" in finding.why


def test_an_optimizer_in_an_attribute_is_looked_into(rng):
    model, codec = tied_pair(rng)
    model.second_optimizer = keras.optimizers.SGD(0.1)
    model.second_optimizer.build([codec.variable, codec.variable])
    (finding,) = tether.check(model)
    assert finding.rule == "stepped-twice" and "second_optimizer" in finding.why


# --------------------------------------------------------------------------- freezing


def test_what_is_frozen_on_purpose_is_no_finding(rng):
    model, _ = tied_pair(rng)
    for frozen in (model.layers[0], model.layers[1], model):
        frozen.trainable = False
        assert not tether.check(model)
        frozen.trainable = True
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6)])
    outer = keras.Sequential([keras.Input((6,)), inner, layers.Dense(6)])
    inner.trainable = False
    assert not tether.check(outer)


# --------------------------------------------------------------------------- building


class Whole(layers.Dense):
    """Makes everything itself, and needs nothing of its parent's."""

    def build(self, shape):
        self.own = self.add_weight(shape=(shape[-1], self.units), name="own")

    def call(self, x):
        return keras.ops.matmul(x, self.own)


class Attending(layers.MultiHeadAttention):
    """Calls its parent's build, which makes some attributes for some arguments only."""

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)


@tether.extend
class Extended(layers.Dense):
    """An extended class."""

    def build(self, shape):
        super().build(shape)
        self.gain = self.add_weight(shape=(self.units,), name="gain")


def test_classes_that_are_built_right_are_no_finding(rng):
    x = keras.Input((3, 4))
    attended = Attending(2, 2)(x, x)
    assert not tether.check(keras.Model(x, [Whole(3)(x), Extended(3)(x), attended]))


def test_judging_a_build_draws_no_random_number():
    child = Child(4, False)
    child.build((None, 3))
    random.seed(5)
    before = random.getstate()
    assert tether.check(child)
    assert random.getstate() == before

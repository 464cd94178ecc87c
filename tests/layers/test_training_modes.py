"""A tied model trains as the model written by hand does, however it is trained."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy, slot_count


def pair(rng, dtype="float32"):
    """A tied model and a subclassed one that uses the same variable by hand."""
    kernel = rng.normal(0, 0.3, size=(5, 3)).astype("float32")

    @keras.saving.register_keras_serializable(package="modes")
    class ByHand(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.kernel = self.add_weight(name="k", shape=(5, 3))
            self.b = self.add_weight(name="b", shape=(3,), initializer="zeros")
            self.c = self.add_weight(name="c", shape=(5,), initializer="zeros")

        def call(self, x):
            h = keras.ops.relu(keras.ops.add(keras.ops.matmul(x, self.kernel), self.b))
            return keras.ops.add(keras.ops.matmul(h, keras.ops.transpose(self.kernel)), self.c)

    codec = tether.Weight(kernel, name="codec")
    inputs = keras.Input((5,))
    hidden = tether.tie(keras.layers.Dense(3, activation="relu", dtype=dtype), kernel=codec)(inputs)
    tied = keras.Model(inputs, tether.tie(keras.layers.Dense(5, dtype=dtype), kernel=codec.T)(hidden))
    hand = ByHand(dtype=dtype)
    hand(np.zeros((1, 5), "float32"))
    hand.kernel.assign(kernel)
    return tied, hand, codec


def agree(tied, hand, tolerance=1e-5):
    for a, b in zip(tied.get_weights(), hand.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def x(rng):
    return rng.random((16, 5)).astype("float32")


@pytest.mark.parametrize(
    "compile_kwargs",
    [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}],
    ids=["default", "eager", "jit", "steps"],
)
def test_fit_equals_the_model_by_hand(compile_kwargs, rng, x):
    if keras.backend.backend() == "torch":
        # torch.compile has its own, slow test below; PyTorch has no steps_per_execution
        compile_kwargs = {**compile_kwargs, "jit_compile": False, "steps_per_execution": 1}
    tied, hand, _ = pair(rng)
    for model in (tied, hand):
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.01), "mse", **compile_kwargs)
        model.fit(x, x, batch_size=4, epochs=2, shuffle=False, verbose=0)
    agree(tied, hand)
    assert slot_count(tied.optimizer) == slot_count(hand.optimizer)


def test_train_on_batch(rng, x):
    tied, hand, _ = pair(rng)
    losses = []
    for model in (tied, hand):
        model.compile("sgd", "mse")
        losses.append([float(model.train_on_batch(x, x)) for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    agree(tied, hand)


def test_gradient_accumulation_equals_one_large_batch(rng, x):
    results = []
    for steps, batch in ((4, 4), (None, 16)):
        tied, _, _ = pair(np.random.default_rng(3))
        tied.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps), "mse")
        tied.fit(x, x, batch_size=batch, epochs=2, shuffle=False, verbose=0)
        results.append(tied.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_average_for_each_stored_weight(rng, x):
    tied, hand, _ = pair(rng)
    for model in (tied, hand):
        model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
        model.fit(x, x, epochs=3, shuffle=False, verbose=0)
        model.optimizer.finalize_variable_values(model.trainable_variables)
    agree(tied, hand)
    assert slot_count(tied.optimizer) == 3


def test_a_train_step_of_the_users_own(rng, x):
    class Custom(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(keras.ops.square(y - y_pred)) * 2.0

    tied, hand, _ = pair(rng)
    model = Custom(tied.inputs, tied.outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, x, batch_size=16, shuffle=False, verbose=0)
    hand.compile(keras.optimizers.SGD(0.2), "mse")
    hand.fit(x, x, batch_size=16, shuffle=False, verbose=0)
    agree(tied, hand)


def test_stateless_call(rng, x):
    tied, _, codec = pair(rng)
    trainable = [keras.ops.zeros_like(v.value) for v in tied.trainable_variables]
    before = codec.numpy()
    y, _ = tied.stateless_call(trainable, [v.value for v in tied.non_trainable_variables], x)
    assert np.array_equal(numpy(y), np.zeros((16, 5)))
    assert np.array_equal(codec.numpy(), before)


def test_gradients_are_the_sum_over_uses(rng, x):
    tied, hand, _ = pair(rng)
    loss_a, a = gradients(lambda: keras.ops.sum(tied(x) ** 2), tied.trainable_variables)
    loss_b, b = gradients(lambda: keras.ops.sum(hand(x) ** 2), hand.trainable_variables)
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_mixed_precision_trains_as_the_model_by_hand(rng, x):
    tied, hand, codec = pair(rng, dtype="mixed_bfloat16")
    for model in (tied, hand):
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(x, x, epochs=2, shuffle=False, verbose=0)
    assert codec.dtype == "float32"
    agree(tied, hand, 2e-2)


def test_mixed_precision_computes_composite_expressions_in_the_compute_dtype(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    seen = []

    @keras.saving.register_keras_serializable(package="modes")
    def spy(x):
        seen.append(keras.backend.standardize_dtype(x.dtype))
        return keras.ops.add(x, 0)

    layer = tether.tie(keras.layers.Dense(4, dtype="mixed_bfloat16"), kernel=tether.ops.apply(spy, w))
    layer.build((None, 4))
    seen.clear()
    y = layer(np.ones((2, 4), "float32"))
    assert seen == ["bfloat16"] and keras.backend.standardize_dtype(y.dtype) == "bfloat16"


def test_a_variable_without_autocast_stays_in_full_precision(rng):
    gamma = tether.Weight(np.array([1.0, 1.0009765625, 2.0], "float32"), name="gamma")
    norm = tether.tie(keras.layers.LayerNormalization(dtype="mixed_bfloat16"), gamma=1.0 * gamma)
    plain = keras.layers.LayerNormalization(dtype="mixed_bfloat16")
    x = rng.normal(size=(2, 3)).astype("float32")
    norm.build(x.shape), plain.build(x.shape)
    plain.gamma.assign(gamma.numpy())
    assert_close(keras.ops.cast(norm(x), "float32"), keras.ops.cast(plain(x), "float32"), 0)


def test_the_very_variable_is_kept_so_a_compiled_optimizer_stays_valid(rng, x):
    inputs = keras.Input((5,))
    layer = keras.layers.Dense(5)
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    before, variables = layer.kernel, [id(v) for v in model.trainable_variables]
    weight = tether.weight_of(layer, "kernel")
    assert weight.variable is before
    assert [id(v) for v in model.trainable_variables] == variables
    model.fit(x, x, verbose=0)
    assert layer.kernel.path == before.path


@pytest.mark.slow
def test_torch_compile(rng, x):
    tied, hand, _ = pair(rng)
    if keras.backend.backend() == "torch":
        import torch

        found = torch._dynamo.explain(tied)(torch.as_tensor(x))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
        torch._dynamo.reset()
        compiled = torch.compile(tied, backend="eager")
        assert_close(compiled(torch.as_tensor(x)).detach(), tied(x).detach())
    for model in (tied, hand):
        model.compile("sgd", "mse", jit_compile=True)
        model.fit(x, x, epochs=2, shuffle=False, verbose=0)
    agree(tied, hand)

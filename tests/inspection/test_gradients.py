"""Each use's share of a gradient, beside what is known of it by hand, by freezing the others, or by a training step."""

import json
import threading

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError
from tether.inspection.gradients import shares

layers = keras.layers


def dense(units, **options):
    return layers.Dense(units, use_bias=False, **options)


def autoencoder(**options):
    codec = tether.Weight(name="codec")
    encode = tether.tie(dense(3, name="encode", **options), kernel=codec)
    decode = tether.tie(dense(5, name="decode"), kernel=codec.T)
    return keras.Sequential([keras.Input((5,)), encode, decode], name="auto")


def two_of(first, second, shape=(4,), dtype="float32"):
    """Two layers side by side on the same inputs."""
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, [first(x), second(x)])


def low_rank():
    base = tether.Weight((4, 3), "normal", name="base")
    a, b = tether.Weight((4, 1), "normal", name="a"), tether.Weight((1, 3), "normal", name="b")
    combined = base + a @ b  # one value in the cache of a call, for both
    x = keras.Input((4,))
    first, second = dense(3, name="first", activation="tanh"), dense(3, name="second")
    tether.tie(first, kernel=combined), tether.tie(second, kernel=combined)
    return keras.Model(x, [first(x), second(keras.ops.square(x))])


def routed():
    a, b = tether.Weight((4, 3), "normal", name="a"), tether.Weight((4, 3), "normal", name="b")
    chosen = tether.route(dense(3, name="chosen"), kernel=[a, a + b], default=1)
    return two_of(chosen, tether.tie(dense(3, name="plain", activation="tanh"), kernel=a))


def recurrent():
    base = tether.Weight((3, 12), "orthogonal", name="base")
    a, b = tether.Weight((3, 1), "normal", name="a"), tether.Weight((1, 12), "normal", name="b")
    first = tether.tie(layers.LSTM(3, name="first"), {"cell/recurrent_kernel": base + a @ b})
    second = tether.tie(layers.LSTM(3, name="second", go_backwards=True), {"cell/recurrent_kernel": base + a @ b})
    return two_of(first, second, (5, 4))


def convolutions():
    kernel = tether.Weight((2, 4, 3), "normal", name="kernel")
    first = tether.tie(layers.Conv1D(3, 2, name="first"), kernel=kernel)
    second = tether.tie(layers.Conv1D(3, 2, name="second", activation="tanh"), kernel=2.0 * kernel)
    return two_of(first, second, (5, 4))


def tied_logits():
    table = tether.Weight((7, 3), "normal", name="table")
    embed = tether.tie(layers.Embedding(7, 3, name="embed"), embeddings=table)
    head = tether.tie(dense(7, name="head"), kernel=table.T)
    return keras.Sequential([keras.Input((4,), dtype="int32"), embed, head])


def composite():
    kernel = tether.Weight(name="projection")
    attention = tether.tie(layers.MultiHeadAttention(2, 2), {"query/kernel": kernel, "key/kernel": 0.5 * kernel})
    x = keras.Input((5, 4))
    return keras.Model(x, attention(x, x))


@keras.saving.register_keras_serializable("tests")
class Reads(layers.Layer):
    """Reads a weight that it holds, without a tie."""

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)
        self.held = held

    def call(self, x):
        return keras.ops.matmul(x, self.held.value)


def attributes():
    kernel = tether.Weight((4, 3), "normal", name="kernel")
    return two_of(Reads(kernel, name="reads"), tether.tie(dense(3, name="tied", activation="tanh"), kernel=kernel))


def untied_sharing():
    first, second = dense(3, name="first"), dense(3, name="second", activation="tanh")
    model = two_of(first, second)
    with_one = [v for v in second._trainable_variables if v is not second._kernel]
    object.__setattr__(second, "_kernel", first._kernel)
    second._tracker.config["trainable_variables"][1][:] = [*with_one, first._kernel]
    return model


MODELS = {
    "autoencoder": autoencoder,
    "low_rank": low_rank,
    "routed": routed,
    "recurrent": recurrent,
    "convolutions": convolutions,
    "tied_logits": tied_logits,
    "composite": composite,
    "attributes": attributes,
    "untied_sharing": untied_sharing,
}


def inputs_of(model, rng, batch=6):
    spec = model.inputs[0]
    if spec.dtype == "int32":
        return keras.ops.convert_to_tensor(rng.integers(0, 7, (batch, *spec.shape[1:])).astype("int32"))
    return keras.ops.convert_to_tensor(rng.normal(size=(batch, *spec.shape[1:])).astype("float32"))


def loss_of(model, x):
    return lambda: sum(
        keras.ops.mean((1.0 + place) * (output - 0.3) ** 2)
        for place, output in enumerate(keras.tree.flatten(model(x, training=True)))
    )


def by_reader(found):
    """The shares as arrays: by the variable's path, then by reader."""
    return {
        share.variable.path: {
            reader.where: np.zeros(share.variable.shape) if g is None else np.array(numpy(g))
            for reader, g in zip(share.readers, share.gradients, strict=True)
        }
        for share in found
    }


@pytest.mark.parametrize("plan", ["auto", "factored"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_shares_add_up_to_the_gradient(make, plan, rng):
    model = make()
    x = inputs_of(model, rng)
    with tether.planning.force(plan):
        loss, found = shares(model, loss_of(model, x))
        expected, whole = gradients(loss_of(model, x), model.trainable_variables)
    assert loss == pytest.approx(expected, rel=1e-5)
    arrays = by_reader(found)
    assert any(len(of_one) > 1 for of_one in arrays.values())
    for variable, gradient in zip(model.trainable_variables, whole, strict=True):
        assert_close(sum(arrays[variable.path].values()), gradient)
        assert not arrays[variable.path].get("elsewhere", np.zeros(1)).any()


@pytest.mark.parametrize("make", [autoencoder, low_rank, recurrent, convolutions, tied_logits, routed])
def test_a_share_is_the_gradient_with_every_other_layer_frozen(make, rng):
    model = make()
    x = inputs_of(model, rng)
    _, found = shares(model, loss_of(model, x))
    shared = [share for share in found if len(share.readers) > 2]
    assert shared
    for share, of_uses in zip(shared, map(by_reader, [[share] for share in shared]), strict=True):
        for where, array in of_uses[share.variable.path].items():
            for layer in model.layers:
                layer.trainable = where.startswith(f"{layer.name}/")
            _, (alone,) = gradients(loss_of(model, x), [share.variable])
            for layer in model.layers:
                layer.trainable = True
            if where != "elsewhere":
                assert_close(array, alone)
                assert np.abs(alone).max() > 1e-4


def test_the_shares_of_a_tied_autoencoder_are_those_worked_out_by_hand(rng):
    model = autoencoder()
    x, y = rng.normal(size=(6, 5)).astype("float32"), rng.normal(size=(6, 5)).astype("float32")
    (w,) = model.get_weights()
    hidden = x @ w
    slope = 2 * (hidden @ w.T - y) / y.size
    of_encode, of_decode = x.T @ (slope @ w), slope.T @ hidden
    whole = of_encode + of_decode
    found = tether.inspection.gradients(model, x, y, loss="mse")
    codec = found.weights["codec"]
    encode, decode = codec.uses
    assert (encode.where, encode.expression) == ("encode/kernel", "codec")
    assert (decode.where, decode.expression) == ("decode/kernel", "codec.T")
    assert found.loss == pytest.approx(np.mean((hidden @ w.T - y) ** 2), rel=1e-5)

    def norm(array):
        return pytest.approx(np.linalg.norm(array), rel=1e-5)

    def cosine(a, b):
        return pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)

    assert (codec.norm, encode.norm, decode.norm) == (norm(whole), norm(of_encode), norm(of_decode))
    assert codec.cosines[0][1] == codec.cosines[1][0] == cosine(of_encode, of_decode)
    assert (codec.cosines[0][0], codec.cosines[1][1]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert encode.cosine_to_total == cosine(of_encode, whole)
    assert decode.cosine_to_total == cosine(of_decode, whole)


def test_two_uses_that_pull_apart_have_a_cosine_of_minus_one(rng):
    kernel = tether.Weight((4, 3), "normal", name="kernel")
    model = two_of(*(tether.tie(dense(3, name=name), kernel=kernel) for name in ("up", "down")))
    x = rng.normal(size=(6, 4)).astype("float32")
    found = tether.inspection.gradients(
        model, x, loss=lambda y, y_pred: keras.ops.mean(y_pred[0]) - keras.ops.mean(y_pred[1])
    )
    weight = found.weights["kernel"]
    assert weight.cosines[0][1] == pytest.approx(-1.0)
    assert weight.lowest == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert weight.norm == pytest.approx(0.0, abs=1e-7)
    assert weight.uses[0].norm == pytest.approx(weight.uses[1].norm)
    assert weight.uses[0].norm > 0.1


def test_a_frozen_use_has_no_share(rng):
    model = autoencoder()
    x = rng.normal(size=(6, 5)).astype("float32")
    model.get_layer("decode").trainable = False
    codec = tether.inspection.gradients(model, x).weights["codec"]
    encode, decode = codec.uses
    assert (decode.norm, decode.cosine_to_total) == (0.0, None)
    assert codec.cosines[0] == (pytest.approx(1.0), None)
    assert codec.lowest == (None, None)
    assert encode.norm == pytest.approx(codec.norm)
    assert codec.norm > 0


def test_an_occurrence_under_stop_gradient_has_no_share(rng):
    base = tether.Weight((4, 3), "normal", name="base")
    own = tether.Weight((4, 3), "normal", name="own")
    first = tether.tie(dense(3, name="first"), kernel=base.stop_gradient() + own)
    model = two_of(first, tether.tie(dense(3, name="second"), kernel=base))
    found = tether.inspection.gradients(model, rng.normal(size=(6, 4)).astype("float32"))
    assert [use.norm > 0 for use in found.weights["base"].uses] == [False, True]
    assert found.weights["own"].norm > 0


def test_what_does_not_train_is_not_listed(rng):
    base = tether.Weight((4, 3), "normal", name="base")
    own = tether.Weight((4, 3), "normal", name="own")
    layer = tether.tie(dense(3), kernel=base.stop_gradient() + own)
    model = keras.Sequential([keras.Input((4,)), layer, layers.BatchNormalization()])
    found = tether.inspection.gradients(model, rng.normal(size=(6, 4)).astype("float32"))
    assert set(found.weights) == {"own", *(v.path for v in model.layers[-1].trainable_variables)}


@pytest.mark.parametrize("times", [1, 3])
def test_a_layer_that_is_called_several_times_is_one_use(times, rng):
    kernel = tether.Weight((4, 4), "orthogonal", name="kernel")
    repeated = tether.tie(dense(4, name="repeated"), kernel=kernel)
    last = tether.tie(dense(4, name="last"), kernel=kernel)
    inputs = h = keras.Input((4,))
    for _ in range(times):
        h = repeated(h)
    model = keras.Model(inputs, last(h))
    x = rng.normal(size=(6, 4)).astype("float32")
    w = kernel.numpy()
    hidden = [x]
    for _ in range(times):
        hidden.append(hidden[-1] @ w)
    slope = 2 * (hidden[-1] @ w) / x.size @ w.T
    share = np.zeros_like(w)
    for h in reversed(hidden[:-1]):
        share += h.T @ slope
        slope = slope @ w.T
    found = tether.inspection.gradients(model, x).weights["kernel"]
    assert [use.where for use in found.uses] == ["repeated/kernel", "last/kernel"]
    assert found.uses[0].norm == pytest.approx(np.linalg.norm(share), rel=1e-4)


def test_layers_that_hold_one_variable_without_a_tie_are_told_apart(rng):
    model = untied_sharing()
    found = tether.inspection.gradients(model, rng.normal(size=(6, 4)).astype("float32"))
    (weight,) = found.weights.values()
    assert [use.where for use in weight.uses] == ["first/kernel", "second/kernel"]
    assert [use.expression for use in weight.uses] == [None, None]
    assert all(use.norm > 0 for use in weight.uses)


def test_a_weight_that_a_layer_reads_by_itself_is_a_use_of_that_layer(rng):
    model = attributes()
    found = tether.inspection.gradients(model, rng.normal(size=(6, 4)).astype("float32")).weights["kernel"]
    assert [(use.where, use.expression) for use in found.uses] == [("reads/held", "kernel"), ("tied/kernel", "kernel")]
    assert all(use.norm > 0 for use in found.uses)


# --------------------------------------------------------------------------- the loss


def stepped(model, x, y=None, **options):
    """What one step of plain gradient descent at a rate of one takes off each weight: the gradient."""
    before = {v.path: np.array(numpy(v.value)) for v in model.trainable_variables}
    model.compile(keras.optimizers.SGD(1.0), **options)
    found = tether.inspection.gradients(model, x, y)
    loss = float(model.train_on_batch(x, y, return_dict=True)["loss"])
    taken = {v.path: before[v.path] - np.array(numpy(v.value)) for v in model.trainable_variables}
    return found, loss, taken


def test_the_gradient_is_the_one_of_a_training_step(rng):
    codec = tether.Weight(name="codec", regularizer=keras.regularizers.L2(0.1))
    encode = tether.tie(
        layers.Dense(3, name="encode", kernel_regularizer=keras.regularizers.L1(0.02), activity_regularizer="l2"),
        kernel=codec,
    )
    decode = tether.tie(layers.Dense(5, name="decode"), kernel=codec.T)
    inner = [encode, layers.BatchNormalization(name="norm"), layers.Dropout(0.5, seed=3), decode]
    model = keras.Sequential([keras.Input((5,)), *inner])
    beta = tether.weight_of(inner[1], "beta")
    tether.transfer.soft_tie(model, beta, tether.weight_of(encode, "bias"), strength=0.3)
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
    found, loss, taken = stepped(model, x, y, loss="mae")
    assert found.of == "the compiled loss on 8 examples"
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert set(found.weights) == set(taken)
    for path, gradient in taken.items():
        assert found.weights[path].norm == pytest.approx(np.linalg.norm(gradient), rel=1e-3, abs=1e-6)
    assert [use.where for use in found.weights["codec"].uses] == ["encode/kernel", "decode/kernel", "elsewhere"]
    assert found.weights["codec"].uses[-1].norm == pytest.approx(0.2 * np.linalg.norm(codec_before(taken, codec)))


def codec_before(taken, codec):
    return codec.numpy() + taken["codec"]


def test_several_outputs_have_the_losses_that_they_were_compiled_with(rng):
    model = two_of(dense(2, name="a"), dense(2, name="b"))
    x = rng.normal(size=(8, 4)).astype("float32")
    y = [rng.normal(size=(8, 2)).astype("float32") for _ in range(2)]
    metrics = len(model.metrics)
    found, loss, taken = stepped(model, x, y, loss=["mse", "mae"], loss_weights=[0.5, 2.0])
    assert found.loss == pytest.approx(loss, rel=1e-5)
    for path, gradient in taken.items():
        assert found.weights[path].norm == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
    assert metrics == 0  # and the ones that there are now were made by the training step


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


def test_without_targets_and_a_compiled_loss_it_is_what_layers_add(rng):
    model = keras.Sequential([keras.Input((4,)), dense(3), AddsLoss()])
    x = rng.normal(size=(8, 4)).astype("float32")
    found, loss, taken = stepped(model, x)
    assert found.of == "the model's own losses on 8 examples"
    assert found.loss == pytest.approx(loss, rel=1e-5)
    ((path, gradient),) = taken.items()
    assert found.weights[path].norm == pytest.approx(np.linalg.norm(gradient), rel=1e-4)


def test_without_targets_and_loss_it_is_the_mean_square_of_the_outputs(rng):
    model = autoencoder(kernel_regularizer=keras.regularizers.L2(0.1))
    x = rng.normal(size=(8, 5)).astype("float32")
    found = tether.inspection.gradients(model, x)
    (w,) = model.get_weights()
    assert found.of == "the mean square of the outputs on 8 examples"
    assert found.loss == pytest.approx(np.mean((x @ w @ w.T) ** 2) + 0.1 * np.sum(w**2), rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError(), lambda y, y_pred: (y - y_pred) ** 2])
def test_a_loss_may_be_given(loss, rng):
    model = autoencoder()
    model.compile("sgd", "mae")
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
    (w,) = model.get_weights()
    found = tether.inspection.gradients(model, x, y, loss=loss)
    assert found.loss == pytest.approx(np.mean((x @ w @ w.T - y) ** 2), rel=1e-5)
    assert "the loss" in found.of


def test_a_loss_of_the_outputs_alone_gets_no_targets(rng):
    model = autoencoder()
    x = rng.normal(size=(8, 5)).astype("float32")
    given = []

    def largest(y, y_pred):
        given.append(y)
        return keras.ops.max(y_pred)

    found = tether.inspection.gradients(model, x, loss=largest)
    (w,) = model.get_weights()
    assert given == [None]
    assert found.of == "the loss largest on 8 examples"
    assert found.loss == pytest.approx(np.max(x @ w @ w.T), rel=1e-5)


def test_a_models_own_compute_loss_is_asked(rng):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = autoencoder()

        def call(self, x):
            return self.inner(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            assert training
            return keras.ops.mean((y_pred - x) ** 2)

    model = Mine()
    x = rng.normal(size=(8, 5)).astype("float32")
    model(x)
    (w,) = model.get_weights()
    assert tether.inspection.gradients(model, x).loss == pytest.approx(np.mean((x @ w @ w.T - x) ** 2), rel=1e-5)


def test_a_layer_alone_has_gradients_too(rng):
    kernel = tether.Weight((4, 3), "normal", name="kernel")
    layer = tether.tie(dense(3), kernel=kernel + kernel)
    layer.build((None, 4))
    x = rng.normal(size=(6, 4)).astype("float32")
    found = tether.inspection.gradients(layer, x)
    slope = 2 * (x @ (2 * kernel.numpy())) / (6 * 3)
    assert found.weights["kernel"].norm == pytest.approx(np.linalg.norm(2 * x.T @ slope), rel=1e-4)
    assert [use.expression for use in found.weights["kernel"].uses] == ["kernel + kernel"]


def test_inputs_may_be_a_dict_or_a_list(rng):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    kernel = tether.Weight((4, 3), "normal", name="kernel")
    sides = [tether.tie(dense(3, name=name), kernel=kernel) for name in ("left", "right")]
    model = keras.Model({"a": a, "b": b}, sides[0](a) + sides[1](b))
    x = {name: rng.normal(size=(6, 4)) for name in ("a", "b")}
    found = tether.inspection.gradients(model, x).weights["kernel"]
    slope = 2 * (x["a"] + x["b"]) @ kernel.numpy() / (6 * 3)
    for use, name in zip(found.uses, ("a", "b"), strict=True):
        assert use.norm == pytest.approx(np.linalg.norm(x[name].T @ slope), rel=1e-4)


# --------------------------------------------------------------------------- nothing changes


def state(model):
    """Everything that a model holds, as bytes."""
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return {
        "variables": [(v.path, np.array(numpy(v.value)).tobytes()) for v in variables],
        "trainable": [v.path for v in model.trainable_variables],
        "losses": [float(numpy(value)) for value in model.losses],
        "metrics": [metric.name for metric in model.metrics],
        "compiled": (model.compiled, model.train_function, model._compile_loss, model._compile_loss.built),
        "attributes": {id(layer): sorted(vars(layer)) for layer in model._flatten_layers()},
        "views": [sorted(vars(layer.kernel)) for layer in model.layers if hasattr(layer, "kernel")],
    }


def busy_model():
    codec = tether.Weight((5, 3), "normal", name="codec")
    low = tether.low_rank(2)(codec)
    encode = tether.tie(layers.Dense(3, name="encode", activity_regularizer="l2"), kernel=low)
    spectral = tether.forms.spectral_norm()(codec)
    decode = tether.tie(layers.Dense(5, name="decode"), kernel=spectral.T)
    inner = [encode, layers.BatchNormalization(), layers.Dropout(0.5), layers.GaussianNoise(0.1), decode]
    model = keras.Sequential([keras.Input((5,)), *inner])
    model.compile("adam", "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_of_the_model_changes(trained, rng):
    model = busy_model()
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
    if trained:
        model.fit(x, y, verbose=0)
    model(x, training=True)
    before = state(model)
    found = tether.inspection.gradients(model, x, y)
    assert state(model) == before
    assert found.weights["codec"].norm > 0
    again = tether.inspection.gradients(model, x, y)
    assert str(again) == str(found)  # the random state is what it was


def test_training_goes_on_as_if_nobody_had_looked(rng):
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
    ended = []
    for look in (False, True):
        keras.utils.set_random_seed(5)
        model = busy_model()
        model.fit(x, y, epochs=2, verbose=0)
        if look:
            tether.inspection.gradients(model, x, y)
        model.fit(x, y, epochs=2, verbose=0)
        ended.append(model.get_weights())
    for one, other in zip(*ended, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_of_the_model_changes_when_the_call_fails(rng):
    model = busy_model()
    x, y = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(8, 5)).astype("float32")
    model(x, training=True)
    before = state(model)

    def broken(y, y_pred):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tether.inspection.gradients(model, x, y, loss=broken)
    assert {**state(model), "losses": None} == {**before, "losses": None}
    assert tether.inspection.gradients(model, x, y).weights["codec"].norm > 0


def test_other_threads_read_the_stored_weights_meanwhile(rng):
    model = autoencoder()
    x = rng.normal(size=(6, 5)).astype("float32")
    expected = numpy(model(x))
    seen = []

    def loss(y, y_pred):
        thread = threading.Thread(target=lambda: seen.append(np.array(numpy(model.get_layer("decode").kernel.value))))
        thread.start()
        thread.join()
        return keras.ops.mean(y_pred)

    tether.inspection.gradients(model, x, loss=loss)
    np.testing.assert_array_equal(seen[0], model.get_layer("decode").kernel.numpy())
    np.testing.assert_array_equal(numpy(model(x)), expected)


def test_layers_that_compute_twice_have_their_shares_too(rng):
    with keras.RematScope(mode="full"):
        model = autoencoder()
    x = rng.normal(size=(6, 5)).astype("float32")
    plain = autoencoder()
    plain.set_weights(model.get_weights())
    modes = [layer._remat_mode for layer in model.layers]
    assert all(mode is not None for mode in modes)
    (found,), (expected,) = (tether.inspection.gradients(m, x).weights.values() for m in (model, plain))
    assert [use.norm for use in found.uses] == pytest.approx([use.norm for use in expected.uses], rel=1e-5)
    assert [layer._remat_mode for layer in model.layers] == modes


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float16"])
def test_gradients_in_16_bits_are_measured(policy, rng):
    keras.config.set_dtype_policy(policy)
    model = autoencoder()
    found = tether.inspection.gradients(model, rng.normal(size=(6, 5)).astype("float32")).weights["codec"]
    assert found.norm > 0
    assert -1 <= found.cosines[0][1] <= 1


# --------------------------------------------------------------------------- what is said, and what is refused


def test_the_text_lists_shared_weights_with_their_uses(rng):
    model = keras.Sequential([keras.Input((5,)), *autoencoder().layers, layers.Dense(2, name="last")], name="auto")
    found = tether.inspection.gradients(model, rng.normal(size=(6, 5)).astype("float32"))
    lines = str(found).splitlines()
    assert lines[0].startswith("auto: gradient of the mean square of the outputs on 6 examples, which is ")
    assert " ".join(lines[2].split()) == "weight, and its uses norm cosine to the whole lowest to another use"
    assert lines[3].startswith("codec ")
    assert lines[4].startswith("  encode/kernel = codec ")
    assert lines[5].startswith("  decode/kernel = codec.T ")
    assert lines[-1].startswith("The 2 weights that have one use: norm ")
    assert len({len(line) for line in lines[4:6]}) == 1
    assert list(found.shared) == ["codec"]
    html = found._repr_html_()
    assert "decode/kernel = codec.T" in html
    assert html.count("<tr>") == 4


def test_the_text_says_when_nothing_is_shared(rng):
    model = keras.Sequential([keras.Input((4,)), dense(2)])
    text = str(tether.inspection.gradients(model, rng.normal(size=(6, 4)).astype("float32")))
    assert text.endswith(" No weight has more.")
    assert "The one weight that has one use" in text


def test_names_are_escaped_in_html():
    twice = tether.Weight((4, 2), "normal", name="w")
    model = two_of(tether.tie(dense(2, name="<b>"), kernel=twice), tether.tie(dense(2, name="c"), kernel=twice))
    assert "<b>" not in tether.inspection.gradients(model, np.ones((2, 4), "float32"))._repr_html_()


def test_json_holds_all_of_it(rng):
    model = autoencoder()
    model.get_layer("decode").trainable = False
    found = tether.inspection.gradients(model, rng.normal(size=(6, 5)).astype("float32"))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["name"] == "auto"
    assert data["loss"] == found.loss
    codec = data["weights"]["codec"]
    assert codec["cosines"] == [list(row) for row in found.weights["codec"].cosines]
    assert [use["where"] for use in codec["uses"]] == ["encode/kernel", "decode/kernel"]
    assert codec["uses"][0]["norm"] == found.weights["codec"].uses[0].norm


def test_json_has_no_number_for_what_is_not_finite():
    model = autoencoder()
    x = np.full((2, 5), 3e38, "float32")
    data = tether.inspection.gradients(model, x).to_json()
    json.dumps(data, allow_nan=False)
    assert data["weights"]["codec"]["norm"] is None


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([dense(2, name="a")], name="mine")
    with pytest.raises(TetherError, match="'mine' is not built"):
        tether.inspection.gradients(model, np.ones((2, 3), "float32"))


def test_a_model_of_which_nothing_trains_is_refused():
    model = autoencoder()
    model.trainable = False
    with pytest.raises(TetherError, match="Nothing in 'auto' trains"):
        tether.inspection.gradients(model, np.ones((2, 5), "float32"))


def test_other_things_than_models_are_refused():
    with pytest.raises(TetherError, match="str"):
        tether.inspection.gradients("model.keras", np.ones((2, 5), "float32"))
    with pytest.raises(TetherError, match="One batch is an array"):
        tether.inspection.gradients(autoencoder(), (row for row in np.ones((2, 5))))


def test_targets_without_a_loss_are_refused():
    with pytest.raises(TetherError, match="no loss for these targets"):
        tether.inspection.gradients(autoencoder(), np.ones((2, 5), "float32"), np.ones((2, 5), "float32"))


def test_a_model_compiled_without_any_loss_is_refused():
    model = autoencoder()
    model.compile("sgd")
    with pytest.raises(TetherError, match="no layer of it adds one"):
        tether.inspection.gradients(model, np.ones((2, 5), "float32"))


def test_as_many_targets_as_inputs():
    with pytest.raises(ShapeMismatch, match="x=3, y=2"):
        tether.inspection.gradients(autoencoder(), np.ones((3, 5), "f4"), np.ones((2, 5), "f4"), loss="mse")


def test_inputs_of_another_shape_are_keras_own_error():
    model = autoencoder()
    with pytest.raises(ValueError, match="incompatible"):
        tether.inspection.gradients(model, np.ones((3, 4), "f4"))
    assert "read" not in vars(model.get_layer("decode").kernel)


def test_a_loss_that_gives_nothing_is_refused():
    with pytest.raises(TetherError, match="The loss gave nothing"):
        tether.inspection.gradients(autoencoder(), np.ones((3, 5), "f4"), loss=lambda y, y_pred: None)

"""Quantising tied layers: both users follow, parts that learn go on learning, and a refusal changes nothing."""

import copy
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import safetensors

import tether
from tests.kinds import Bilinear
from tests.support import assert_close, numpy
from tether.errors import LostTie, NotInvertible, TetherError, Unsupported
from tether.layers.quantization import matrices
from tether.layers.tying.state import View
from tether.planning.plan import Integers

pytestmark = pytest.mark.spread

layers = keras.layers
MODES = ("int8", "int4")
modes = pytest.mark.parametrize("mode", MODES)


def quantize(model, mode, **kwargs):
    """`model.quantize` without Keras's warnings about layers that have nothing to quantise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
        model.quantize(mode, **kwargs)
    return model


def bytes_of(model):
    return sum(numpy(variable.value).nbytes for variable in model.weights)


def autoencoder(inputs=21, units=7, plain=True):
    """A decoder on the transposed kernel of its encoder, behind a layer that is not tied."""
    codec = tether.Weight(name="codec")
    x = keras.Input((inputs,))
    h = layers.Dense(inputs, name="plain")(x) if plain else x
    h = tether.tie(layers.Dense(units, activation="tanh", name="encode"), kernel=codec)(h)
    return keras.Model(x, tether.tie(layers.Dense(inputs, name="decode"), kernel=codec.T)(h)), codec


def language_model(vocabulary=31, width=6):
    ids = keras.Input((5,), dtype="int32")
    h = layers.Embedding(vocabulary, width, name="embed")(ids)
    model = keras.Model(ids, layers.Dense(vocabulary, name="head")(layers.Dense(width, name="mix")(h)))
    table = tether.weight_of(model, "embed/embeddings")
    tether.tie(model, {"head/kernel": table.T})
    return model, table


def batch(rng, inputs=21, rows=8):
    return rng.normal(size=(rows, inputs)).astype("float32")


def config_of_int4(block_size):
    """A config with blocks of this size; Keras 3.13 knows none."""
    try:
        return keras.quantizers.Int4QuantizationConfig(block_size=block_size)
    except TypeError:
        pytest.skip("this Keras has no blocks")


# --------------------------------------------------------------------------- what comes out


@modes
@pytest.mark.parametrize("shape", [(21, 7), (20, 6), (3, 1), (1, 5)])
def test_every_value_is_within_half_a_step_of_what_it_was(mode, shape, rng):
    model, codec = autoencoder(*shape)
    before = codec.numpy()
    quantize(model, mode)
    _, scale = codec.became.weights_used()
    largest = 127 if mode == "int8" else 7
    np.testing.assert_allclose(scale.numpy()[0], np.abs(before).max(axis=0) / largest, rtol=1e-6)
    rounding = np.finfo("float32").eps * np.abs(before)
    assert np.all(np.abs(codec.numpy() - before) <= scale.numpy() / 2 + rounding)


@modes
def test_both_users_follow(mode, rng):
    model, codec = autoencoder()
    quantize(model, mode)
    encode, decode = model.get_layer("encode"), model.get_layer("decode")
    assert np.array_equal(numpy(encode.kernel.value), codec.numpy())
    assert np.array_equal(numpy(decode.kernel.value), codec.numpy().T)
    assert encode.quantization_mode is None and isinstance(encode.kernel, View)
    x = batch(rng)
    h = np.tanh(numpy(model.get_layer("plain")(x)) @ codec.numpy() + numpy(encode.bias.value))
    assert_close(model.predict(x, verbose=0), h @ codec.numpy().T + numpy(decode.bias.value))


@modes
def test_the_outputs_stay_within_the_rounding_of_the_weights(mode, rng):
    model, codec = autoencoder(plain=False)
    x, before, kernel = batch(rng), None, codec.numpy()
    before = model.predict(x, verbose=0)
    quantize(model, mode)
    half = np.broadcast_to(codec.became.weights_used()[1].numpy() / 2, kernel.shape)
    hidden = np.abs(np.tanh(x @ kernel))  # of slope 1 at most
    bound = np.minimum(np.abs(x) @ half, 2.0) @ (np.abs(kernel) + half).T + hidden @ half.T
    assert np.all(np.abs(model.predict(x, verbose=0) - before) <= bound + 1e-5)


@modes
def test_integers_take_the_place_of_floats(mode):
    model, codec = autoencoder(plain=False)
    quantize(model, mode)
    rows = 21 if mode == "int8" else 11
    stored = {v.path: (tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for v in model.weights}
    assert stored[f"codec_{mode}"] == ((rows, 7), "int8")
    assert stored["codec_scale"] == ((1, 7), "float32")
    assert not any(path == "codec" for path in stored)
    assert all(v.path.endswith("bias") for v in model.trainable_weights)
    assert codec.shape == (21, 7) and codec.dtype == "float32" and not codec.trainable


@modes
def test_the_memory_is_no_more_than_keras_needs_for_the_untied_model(mode):
    for make in (autoencoder, language_model):
        tied, _ = make()
        untied = quantize(tether.materialize(tied), mode)
        assert bytes_of(quantize(tied, mode)) <= bytes_of(untied)


@modes
@pytest.mark.parametrize(
    "inputs", [pytest.param(256, marks=pytest.mark.slow), 200, pytest.param(130, marks=pytest.mark.slow), 129]
)
def test_wide_layers_on_a_low_rank_part_need_no_more_than_keras_does_for_the_kernel(mode, inputs):
    layer = layers.Dense(16, use_bias=False)
    layer.build((None, inputs))
    tied = tether.tie(layers.Dense(16, use_bias=False), kernel=tether.Weight(numpy(layer.kernel.value), name="w"))
    tied.build((None, inputs))
    layer.quantize(mode)
    tied.quantize(mode)
    assert bytes_of(tied) <= bytes_of(layer)


@modes
def test_a_table_is_quantised_by_rows_and_the_head_follows(mode, rng):
    model, table = language_model()
    before = table.numpy()
    quantize(model, mode)
    _, scale = table.became.weights_used()
    assert scale.shape == (31, 1)
    ids = rng.integers(0, 31, (4, 5))
    assert_close(model.get_layer("embed")(ids), table.numpy()[ids])
    h = rng.normal(size=(4, 5, 6)).astype("float32")
    assert_close(model.get_layer("head")(h), h @ table.numpy().T, 1e-4)
    assert np.all(np.abs(table.numpy() - before) <= scale.numpy() / 2 + 1e-6)


@modes
@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_reversible_embedding_works_both_ways(mode, tie_weights, rng):
    table = tether.Weight((9, 5), "normal", name="table")
    ties = {"embeddings": table} if tie_weights else {"embeddings": table, "reverse_embeddings": table.T}
    layer = tether.tie(layers.ReversibleEmbedding(9, 5, tie_weights=tie_weights), ties)
    other = tether.tie(layers.Dense(9, use_bias=False), kernel=table.T)
    layer.build((None, 3))
    other.build((None, 5))
    layer.quantize(mode)
    ids, h = rng.integers(0, 9, (2, 3)), batch(rng, 5)
    assert table.became is not None
    assert_close(layer(ids), table.numpy()[ids])
    assert_close(layer(h, reverse=True), h @ table.numpy().T)
    assert_close(other(h), h @ table.numpy().T)


@modes
def test_every_plan_computes_the_same(mode, rng):
    model, _ = language_model()
    quantize(model, mode)
    ids = rng.integers(0, 31, (3, 5))
    found = []
    for how in ("materialize", "factored", "auto"):
        with tether.planning.force(how):
            found.append(numpy(model(ids)))
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


@modes
def test_a_lookup_takes_its_rows_before_it_multiplies(mode, monkeypatch):
    model, _ = language_model(4000, 64)
    quantize(model, mode)
    seen, floats = [], Integers._floats
    monkeypatch.setattr(
        Integers, "_floats", lambda self, stored, *rest: seen.append(stored) or floats(self, stored, *rest)
    )
    ids = np.zeros((2, 5), "int32")
    model.get_layer("embed")(ids)
    assert [tuple(stored.shape[:2]) for stored in seen] == [(2, 5)]
    text = str(tether.planning.explain(model.get_layer("embed"), (2, 5)))
    assert "-> factored" in text and "[take" in text


def test_four_bits_have_a_scale_for_each_block_of_inputs(rng):
    weight = tether.Weight(batch(rng, 6, 256) * np.linspace(0.01, 1, 256, dtype="float32")[:, None], name="w")
    before = weight.numpy()
    layer = tether.tie(layers.Dense(6, use_bias=False), kernel=weight)
    layer.build((None, 256))
    layer.quantize(config=config_of_int4(64))
    _, scale = weight.became.weights_used()
    assert scale.shape == (4, 1, 6)
    steps = np.repeat(scale.numpy(), 64, axis=1).reshape(256, 6)
    assert np.all(np.abs(weight.numpy() - before) <= steps / 2 + 1e-6)
    x = batch(rng, 256)
    for how in ("materialize", "factored"):
        with tether.planning.force(how):
            assert_close(layer(x), x @ weight.numpy(), 1e-4)


def test_a_table_in_blocks_is_looked_up_by_row(rng):
    table = tether.Weight(batch(rng, 256, 10), name="table")
    layer = tether.tie(layers.Embedding(10, 256), embeddings=table)
    layer.build((None, 3))
    layer.quantize(config=config_of_int4(128))
    assert table.became.weights_used()[1].shape == (10, 2, 1)
    ids = rng.integers(0, 10, (2, 3))
    for how in ("materialize", "factored"):
        with tether.planning.force(how):
            assert_close(layer(ids), table.numpy()[ids])


@modes
def test_an_attention_projection_has_a_scale_for_each_of_its_outputs(mode, rng):
    kernel = tether.Weight((8, 2, 3), "normal", name="kernel")
    first = tether.tie(layers.EinsumDense("abc,cde->abde", (None, 2, 3)), kernel=kernel)
    first.build((None, 4, 8))
    second = tether.tie(layers.EinsumDense("abde,cde->abc", (None, 8)), kernel=kernel)
    second.build((None, 4, 2, 3))
    first.quantize(mode)
    assert kernel.became.weights_used()[1].shape == (1, 2, 3)
    x = rng.normal(size=(2, 4, 8)).astype("float32")
    assert_close(first(x), np.einsum("abc,cde->abde", x, kernel.numpy()))
    assert_close(second(first(x)), np.einsum("abde,cde->abc", numpy(first(x)), kernel.numpy()))


def test_the_scale_goes_along_the_outputs_of_the_first_use_also_through_a_transpose_and_a_reshape(rng):
    weight = tether.Weight(batch(rng, 6, 10), name="w")
    layer = tether.tie(layers.EinsumDense("ab,bcd->acd", (2, 3), bias_axes=None), kernel=weight.reshape(10, 2, 3))
    layer.build((None, 10))
    turned = tether.Weight(batch(rng, 6, 10), name="turned")
    other = tether.tie(layers.Dense(10), kernel=(0.5 * turned).T)
    other.build((None, 6))
    layer.quantize("int8")
    other.quantize("int8")
    assert weight.became.weights_used()[1].shape == (1, 6)
    assert turned.became.weights_used()[1].shape == (10, 1)


@pytest.mark.parametrize(
    ("equation", "output", "axes", "bias"),
    [("abc,cde->abde", (None, 2, 3), "de", lambda w: w), ("abc,cd->abd", (None, 3), "d", lambda w: w[0])],
)
def test_a_matrix_that_is_a_bias_of_an_einsum_has_a_scale_along_its_last_axis(equation, output, axes, bias, rng):
    w = tether.Weight(rng.normal(size=(2, 3)).astype("float32"), name="w")
    before = w.numpy()
    layer = tether.tie(keras.layers.EinsumDense(equation, output, bias_axes=axes), bias=bias(w))
    layer.build((None, 4, 5))
    w.quantize("int8")
    assert [tuple(weight.shape) for weight in w.became.weights_used()] == [(2, 3), (1, 3)]
    np.testing.assert_allclose(w.numpy(), before, atol=np.abs(before).max() / 254 + 1e-6)


def test_zeros_stay_zeros(rng):
    value = batch(rng, 4, 6)
    value[:, 1] = 0
    weight = tether.Weight(value, name="w")
    layer = tether.tie(layers.Dense(4), kernel=weight)
    layer.build((None, 6))
    layer.quantize("int8")
    assert np.all(weight.numpy()[:, 1] == 0) and np.all(np.isfinite(weight.numpy()))


@modes
def test_under_a_mixed_policy_the_product_is_computed_in_its_dtype(mode, rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, _ = autoencoder(plain=False)
    quantize(model, mode)
    x = batch(rng)
    with tether.planning.force("materialize"):
        built = model(x)
    assert keras.backend.standardize_dtype(built.dtype) == "bfloat16"
    np.testing.assert_allclose(
        numpy(keras.ops.cast(built, "float32")), numpy(keras.ops.cast(model(x), "float32")), atol=0.1
    )


# --------------------------------------------------------------------------- what is quantised


def named(*names, shape=(4, 4)):
    return [tether.Weight(shape, "normal", name=name) for name in names]


def test_the_base_is_quantised_and_what_was_added_to_it_is_not():
    w, a, b = named("w", "a", "b")
    v = tether.Weight((4,), "ones", name="v")
    assert matrices(w.T) == [w]
    assert matrices(0.5 * w.reshape(2, 8)) == [w]
    assert matrices(w + tether.low_rank(2)) == [w]
    assert matrices(w.stop_gradient() + tether.low_rank(2)) == [w]
    assert matrices(w + a @ b) == [w]
    assert matrices(w.stop_gradient() + a) == [w]
    assert matrices(w * v) == [w]
    assert matrices(a @ b) == [a, b]
    assert matrices(tether.ops.concatenate([a, b], axis=0)) == [a, b]
    assert matrices(a + b) == [a, b]
    assert matrices(v.reshape(2, 2)) == []


@pytest.mark.parametrize("form", ["dora", "vera", "hadamard", "masked", "scale", "gate", "oft", "boft", "fourier"])
def test_forms_leave_what_they_add_as_it_is(form):
    (w,) = named("w")
    arguments = {"masked": (np.eye(4), "parent"), "scale": (), "gate": ()}.get(form, (2,))
    made = getattr(tether.forms, form)(*arguments)(w)
    assert matrices(made) == [w]


def test_biases_norms_and_kernels_of_convolutions_stay_floats(rng):
    w, kernel = tether.Weight(name="bias"), tether.Weight(name="kernel")
    parts = [
        tether.tie(layers.Conv1D(4, 2, padding="same"), kernel=kernel, bias=w),
        tether.tie(layers.LayerNormalization(), beta=w),
        tether.tie(layers.Dense(4), bias=w),
    ]
    model = keras.Sequential([keras.Input((5, 4)), *parts])
    own = numpy(parts[2].kernel.value)
    quantize(model, "int8")
    assert w.became is None and kernel.became is None
    expression = tether.weight_of(parts[2], "kernel")
    assert expression.notation().startswith("dequantize(")  # its own kernel, which Keras passes over beside a tied bias
    assert np.abs(expression.numpy() - own).max() <= np.abs(own).max() / 127


def test_a_layer_that_keras_would_not_quantise_follows_one_that_it_would(rng):
    w = tether.Weight((4, 4), "normal", name="w")
    dense = tether.tie(layers.Dense(4, use_bias=False), kernel=w)
    convolution = tether.tie(layers.Conv1D(4, 1, use_bias=False), kernel=w.reshape(1, 4, 4))
    model = keras.Sequential([keras.Input((5, 4)), convolution, dense])
    quantize(model, "int8")
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    assert_close(model(x), x @ w.numpy() @ w.numpy())
    assert len(model.weights) == 2


@modes
def test_a_factorised_kernel_is_quantised_factor_by_factor(mode, rng):
    p, s = tether.Weight((30, 4), "normal", name="p"), tether.Weight((4, 12), "normal", name="s")
    layer = tether.tie(layers.Embedding(30, 12), embeddings=p @ s)
    layer.build((None, 3))
    layer.quantize(mode)
    assert p.became is not None and s.became is not None
    assert p.became.weights_used()[1].shape == (30, 1)
    ids = rng.integers(0, 30, (2, 3))
    assert_close(layer(ids), (p.numpy() @ s.numpy())[ids])


# --------------------------------------------------------------------------- going on


def trained(model, x, y):
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, epochs=1, verbose=0)


@modes
@pytest.mark.parametrize("frozen", [True, False])
def test_a_low_rank_part_goes_on_learning(mode, frozen, rng):
    w = tether.Weight((6, 6), "glorot_uniform", name="w")
    base = w.stop_gradient() if frozen else w
    first = tether.tie(layers.Dense(6, name="first"), kernel=base + tether.low_rank(2))
    second = tether.tie(layers.Dense(6, name="second"), kernel=w.T.stop_gradient())
    model = keras.Sequential([keras.Input((6,)), first, second])
    x, y = batch(rng, 6), batch(rng, 6)
    if frozen:  # the same weights train before and after, so the model stays compiled
        trained(model, x, y)
    quantize(model, mode)
    before = {v.path: numpy(v.value).copy() for v in model.weights}
    if frozen:
        model.fit(x, y, epochs=2, verbose=0)
    else:
        trained(model, x, y)
        model.fit(x, y, epochs=1, verbose=0)  # the first factor gets a gradient once the second is not zero
    changed = {v.path for v in model.weights if not np.array_equal(before[v.path], numpy(v.value))}
    names = {path if path[0] == "w" else path.partition("/")[2] for path in changed}
    assert names == {"w_lora_a", "w_lora_b", "first/bias", "second/bias"}


def test_a_named_adapter_goes_on_learning_and_a_saved_one_fits_the_quantised_base(rng, tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="first"), layers.Dense(3, name="last")])
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    for each in (model, other):
        tether.adapters.add(each, "french", {"first/kernel": tether.low_rank(2)})
    x, y = batch(rng, 6), batch(rng, 3)
    trained(model, x, y)
    tether.adapters.save(model, "french", tmp_path / "french.safetensors")
    tether.adapters.remove(other, "french")
    quantize(other, "int8")
    tether.adapters.load(other, tmp_path / "french.safetensors")
    float_kernel, base = model.get_layer("first").kernel.numpy(), tether.weight_of(other, "first/kernel").base
    steps = base.weights_used()[1].numpy()
    assert np.all(np.abs(other.get_layer("first").kernel.numpy() - float_kernel) <= steps / 2 + 1e-6)
    integers = [numpy(v.value).copy() for v in other.weights if keras.backend.standardize_dtype(v.dtype) == "int8"]
    trained(other, x, y)
    left = [numpy(v.value) for v in other.weights if keras.backend.standardize_dtype(v.dtype) == "int8"]
    assert all(np.array_equal(a, b) for a, b in zip(integers, left, strict=True)) and len(left) == 2


def test_training_on_without_compiling_is_one_clear_error(rng):
    model, _ = autoencoder(plain=False)
    x = batch(rng)
    trained(model, x, x)
    quantize(model, "int8")
    model.predict(x, verbose=0)
    model.evaluate(x, x, verbose=0)
    with pytest.raises(TetherError, match="Compile the model again"):
        model.fit(x, x, verbose=0)
    trained(model, x, x)


# --------------------------------------------------------------------------- files and copies


def assert_same(model, other, x):
    assert [v.path.rstrip("_0123456789") for v in model.weights] == [
        v.path.rstrip("_0123456789") for v in other.weights
    ]
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    assert np.array_equal(model.predict(x, verbose=0), other.predict(x, verbose=0))


@modes
@pytest.mark.parametrize("how", ["keras", "tether", "pickle", "clone"])
def test_a_copy_is_equal_to_the_last_bit_and_tied(mode, how, rng, tmp_path):
    model, _ = autoencoder(plain=how in ("keras", "tether"))
    quantize(model, mode)
    if how == "keras":
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
    elif how == "tether":
        tether.files.save_model(model, tmp_path / "m.keras")
        again = tether.files.load_model(tmp_path / "m.keras")
    elif how == "pickle":
        again = copy.deepcopy(model)
    else:
        again = keras.models.clone_model(model)
        again.set_weights(model.get_weights())
    assert_same(model, again, batch(rng))
    encode, decode = again.get_layer("encode").kernel.expression, again.get_layer("decode").kernel.expression
    assert decode == encode.T
    assert not set(encode.weights_used()) & set(model.get_layer("encode").kernel.expression.weights_used())


@modes
def test_a_file_of_weights_goes_into_a_model_that_was_quantised_too(mode, rng, tmp_path):
    model, _ = autoencoder()
    other, _ = autoencoder()
    quantize(model, mode).save_weights(tmp_path / "w.weights.h5")
    quantize(other, mode).load_weights(tmp_path / "w.weights.h5")
    assert_same(model, other, batch(rng))


@modes
def test_safetensors_hold_the_integers_once(mode, rng, tmp_path):
    model, _ = autoencoder()
    other, _ = autoencoder()
    quantize(model, mode)
    quantize(other, mode)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "np") as file:
        shared = {key: file.get_tensor(key).dtype for key in file.keys() if "codec" in key}  # noqa: SIM118
    assert sorted(map(str, shared.values())) == ["float32", "int8"]
    tether.files.load_safetensors(other, tmp_path / "m.safetensors")
    assert_same(model, other, batch(rng))


def test_a_layer_in_a_wrapper_follows(rng, tmp_path):
    weight = tether.Weight(name="w")
    wrapped = tether.tie(layers.TimeDistributed(layers.Dense(4)), {"layer/kernel": weight})
    model = keras.Sequential([keras.Input((3, 4)), wrapped])
    quantize(model, "int8")
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    assert_close(model.predict(x, verbose=0), x @ weight.numpy())
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert np.array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert [w.dtype for w in again.get_weights()] == ["int8", "float32", "float32"]


def test_a_routed_layer_keeps_what_learns_beside_its_base(rng):
    base, french = tether.Weight((6, 6), "normal", name="base"), tether.Weight((6, 6), "zeros", name="french")
    layer = tether.route(layers.Dense(6), kernel=[base, base.stop_gradient() + french])
    x = batch(rng, 6)
    layer(x, choice=1)
    layer.quantize("int8")
    assert base.became is not None and french.became is None and french.trainable
    assert_close(layer(x, choice=1), x @ base.numpy())


@pytest.mark.slow
@modes
def test_another_process_reads_the_file_by_plain_keras(mode, rng, tmp_path):
    model, _ = language_model()
    quantize(model, mode).save(tmp_path / "m.keras")
    ids = rng.integers(0, 31, (3, 5)).astype("int32")
    np.save(tmp_path / "ids.npy", ids)
    code = (
        "import keras, numpy as np, tether\n"
        f"model = keras.saving.load_model({str(tmp_path / 'm.keras')!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, model.predict(np.load({str(tmp_path / 'ids.npy')!r}), verbose=0))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    assert np.array_equal(np.load(tmp_path / "y.npy"), model.predict(ids, verbose=0))


@modes
def test_a_layer_of_ones_own_that_reads_the_weight_follows(mode, rng, tmp_path):
    table = tether.Weight((9, 4), "normal", name="table")
    ids = keras.Input((3,), dtype="int32")
    h = tether.tie(layers.Embedding(9, 4, name="embed"), embeddings=table)(ids)
    model = keras.Model(ids, Bilinear(table, name="logits")(h))
    quantize(model, mode)
    assert len(model.weights) == 2
    x = rng.integers(0, 9, (2, 3))
    assert_close(model.predict(x, verbose=0), table.numpy()[x] @ table.numpy().T)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_same(model, again, x)
    assert set(again.get_layer("logits").table.became.weights_used()) == set(
        again.get_layer("embed").embeddings.expression.weights_used()
    )


@keras.saving.register_keras_serializable(package="quantizing")
class Maker(layers.Layer):
    """Makes a weight and ties a layer to it in its constructor."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = tether.Weight((4, 4), "normal", name="made")
        self.inner = tether.tie(layers.Dense(4, use_bias=False), kernel=self.table)

    def call(self, x):
        return keras.ops.matmul(self.inner(x), self.table.T.value)


def test_what_a_constructor_would_make_again_as_a_float_is_not_saved(rng, tmp_path):
    model = keras.Sequential([keras.Input((4,)), Maker()])
    quantize(model, "int8")
    x, value = batch(rng, 4), model.layers[0].table.numpy()
    assert_close(model.predict(x, verbose=0), x @ value @ value.T)
    with pytest.raises(LostTie, match="quantised"):
        tether.files.save_model(model, tmp_path / "m.keras")
    assert not (tmp_path / "m.keras").exists()


@modes
def test_materialize_and_untie_give_floats_of_the_rounded_values(mode, rng):
    model, codec = autoencoder(plain=False)
    quantize(model, mode)
    x = batch(rng)
    plain = tether.materialize(model)
    assert type(plain.get_layer("encode")) is layers.Dense
    assert np.array_equal(numpy(plain.get_layer("decode").kernel.value), codec.numpy().T)
    assert_close(plain.predict(x, verbose=0), model.predict(x, verbose=0))
    tether.untie(model)
    assert type(model.get_layer("encode")) is layers.Dense
    assert np.array_equal(numpy(model.get_layer("encode").kernel.value), codec.numpy())
    model.get_layer("encode").quantize(mode)  # Keras's own again
    assert model.get_layer("encode").quantization_mode == mode


# --------------------------------------------------------------------------- who still holds the weight


def test_a_weight_in_somebodys_hands_stands_for_its_integers(rng):
    model, codec = autoencoder(plain=False)
    half = 0.5 * codec.T
    early = half.numpy()
    assert half.weights_used() == (codec,)
    quantize(model, "int8")
    parts = codec.became.weights_used()
    assert half.weights_used() == parts
    assert_close(half.numpy(), 0.5 * codec.numpy().T)
    assert not np.array_equal(half.numpy(), early)
    layer = tether.tie(layers.Dense(21), kernel=half)
    layer.build((None, 7))
    assert set(layer.kernel.expression.weights_used()) == set(parts)
    assert codec.variables == [part.variable for part in parts] and not codec.is_built
    with pytest.raises(Unsupported, match="was quantised"):
        _ = codec.variable
    with pytest.raises(NotInvertible):
        codec.assign(np.zeros((21, 7)))


def test_a_layer_that_is_built_later_follows(rng):
    codec = tether.Weight(name="codec")
    first = tether.tie(layers.Dense(3), kernel=codec)
    late, later = tether.tie(layers.Dense(5), kernel=codec.T), tether.tie(layers.Dense(3), kernel=codec)
    first.build((None, 5))
    first.quantize("int8")
    for layer, inputs in ((late, 3), (later, 5)):
        layer.build((None, inputs))
        assert set(layer.kernel.expression.weights_used()) == set(codec.became.weights_used())
    assert np.array_equal(numpy(late.kernel.value), codec.numpy().T)


def test_a_soft_tie_goes_on_with_the_rounded_weight(rng):
    w, other = tether.Weight((4, 4), "normal", name="w"), tether.Weight((4, 4), "normal", name="other")
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            tether.tie(layers.Dense(4, name="first"), kernel=w),
            tether.tie(layers.Conv1D(4, 1, name="second"), kernel=other.reshape(1, 4, 4)),
        ]
    )
    tether.transfer.soft_tie(model, w, other, strength=0.1)
    quantize(model, "int8")
    assert w.became is not None and other.became is None
    (loss,) = model.losses
    assert_close(loss, 0.1 * np.sum((w.numpy() - other.numpy()) ** 2), 1e-4)


def test_a_weight_can_be_quantised_by_itself(rng):
    table = tether.Weight((9, 4), "normal", name="table")
    layer = Bilinear(table)
    x = batch(rng, 4)
    layer(x)
    table.quantize("int8")
    assert_close(layer(x), x @ table.numpy().T)
    assert len(layer.weights) == 2
    with pytest.raises(Unsupported, match="no matrix of floats"):
        table.quantize("int8")


# --------------------------------------------------------------------------- refusing


def snapshot(model):
    return [(v.path, keras.backend.standardize_dtype(v.dtype), numpy(v.value).copy()) for v in model.weights]


def assert_unchanged(model, before, codec):
    after = snapshot(model)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(after, before, strict=True))
    assert all(layer.quantization_mode is None for layer in model.layers)
    assert codec.became is None and codec.trainable


def test_another_mode_is_refused_before_anything_is_changed(rng):
    model, codec = autoencoder()
    before = snapshot(model)
    with pytest.raises(Unsupported, match="materialize"):
        quantize(model, "float8")
    assert_unchanged(model, before, codec)
    with pytest.raises(Unsupported, match="materialize"):
        model.get_layer("encode").quantize("float8")
    assert_unchanged(model, before, codec)


def test_a_calibrated_mode_is_refused_before_anything_is_changed(rng):
    model, codec = autoencoder()
    before = snapshot(model)
    config = keras.quantizers.GPTQConfig(dataset=["text"], tokenizer=str)
    with pytest.raises(Unsupported, match="gptq"):
        quantize(model, None, config=config)
    assert_unchanged(model, before, codec)


def test_a_quantizer_of_one_layer_is_refused_before_anything_is_changed(rng):
    model, codec = autoencoder()
    before = snapshot(model)
    config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=keras.quantizers.AbsMaxQuantizer(axis=0))
    with pytest.raises(Unsupported, match="weight_quantizer"):
        quantize(model, None, config=config)
    assert_unchanged(model, before, codec)


def test_a_policy_that_quantises_is_refused_and_changes_nothing():
    model, codec = autoencoder()
    before, layer = snapshot(model), model.get_layer("encode")
    policy = layer.dtype_policy
    with pytest.raises(Unsupported, match="keeps the tie"):
        layer.dtype_policy = "int8_from_float32"
    assert layer.dtype_policy is policy
    assert_unchanged(model, before, codec)
    layer.dtype_policy = "mixed_bfloat16"
    assert layer.compute_dtype == "bfloat16"


@modes
def test_the_second_user_finds_nothing_left_to_do(mode):
    model, codec = autoencoder()
    model.get_layer("encode").quantize(mode)
    first = codec.became
    model.get_layer("decode").quantize(mode)
    assert codec.became is first
    other = {"int8": "int4", "int4": "int8"}[mode]
    for asked in (model.get_layer("decode"), model):
        with pytest.raises(Unsupported, match="quantised already"):
            quantize(asked, other)
        assert codec.became is first and model.get_layer("plain").quantization_mode is None


def test_a_layer_that_is_not_built_is_refused_as_keras_does():
    layer = tether.tie(layers.Dense(3), kernel=tether.Weight(name="w"))
    with pytest.raises(ValueError, match="built"):
        layer.quantize("int8")


@pytest.mark.parametrize("filters", ["encode", ["enc", "nothing"], lambda layer: layer.name == "encode"])
def test_a_weight_of_which_a_filter_leaves_a_user_out_stays_as_it_is(filters):
    model, codec = autoencoder()
    with pytest.warns(UserWarning, match="leave out 'decode'"):
        quantize(model, "int8", filters=filters)
    assert codec.became is None


def test_filters_go_by_layers():
    model, codec = autoencoder()
    quantize(model, "int8", filters=["encode", "decode"])
    assert codec.became is not None and model.get_layer("plain").quantization_mode is None
    model, codec = autoencoder()
    quantize(model, "int8", filters="plain")
    assert codec.became is None and model.get_layer("plain").quantization_mode == "int8"


# --------------------------------------------------------------------------- looking


@modes
def test_what_looks_at_the_model_shows_integers_shared_by_both(mode, tmp_path):
    model, _ = autoencoder()
    quantize(model, mode)
    text = str(tether.summary(model))
    assert f"codec_{mode}" in text and "2 uses" in text and "dequantize(" in text
    assert not [finding for finding in tether.check(model) if finding.rule == "quantized-beside-float"]
    tether.plot(model, tmp_path / "weights.html")
    assert "codec_scale" in (tmp_path / "weights.html").read_text()
    model.save(tmp_path / "m.keras")
    assert f"codec_{mode}" in str(tether.summary(tmp_path / "m.keras"))

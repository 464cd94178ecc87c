"""Freezing is per use: what trains is decided by flags and live uses, never by garbage collection."""

import gc
import warnings

import keras
import numpy as np
import pytest

import tether
from tests.support import as_zero, assert_close, gradients, numpy, slot_count
from tether import keras_seam


def autoencoder(width=3, size=5):
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(width, name="encode"), kernel=codec)
    decode = tether.tie(keras.layers.Dense(size, name="decode"), kernel=codec.T)
    inputs = keras.Input((size,))
    return codec, encode, decode, keras.Model(inputs, decode(encode(inputs)))


def loss_of(model, x):
    return lambda: keras.ops.sum(keras.ops.square(model(x) - 1.0))


def test_freezing_one_user_stops_the_gradient_through_that_use_only(rng):
    codec, encode, decode, model = autoencoder()
    x = rng.normal(size=(4, 5)).astype("float32")
    _, (both,) = gradients(loss_of(model, x), [codec.variable])
    decode.trainable = False
    _, (through_encode,) = gradients(loss_of(model, x), [codec.variable])
    decode.trainable = True
    encode.trainable = False
    _, (through_decode,) = gradients(loss_of(model, x), [codec.variable])
    assert np.abs(through_encode).max() > 1e-3 and np.abs(through_decode).max() > 1e-3
    assert_close(both, through_encode + through_decode, 1e-4)


@pytest.mark.parametrize("order", [("encode", "decode"), ("decode", "encode")])
def test_the_result_does_not_depend_on_which_user_was_built_first(order, rng):
    kernel = rng.normal(size=(5, 3)).astype("float32")
    codec = tether.Weight(kernel, name="codec")
    layers = {
        "encode": tether.tie(keras.layers.Dense(3), kernel=codec),
        "decode": tether.tie(keras.layers.Dense(5), kernel=codec.T),
    }
    sizes = {"encode": 5, "decode": 3}
    for name in order:
        layers[name].build((None, sizes[name]))
    layers["decode"].trainable = False
    assert codec.trainable
    layers["encode"].trainable = False
    assert not codec.trainable and not codec.variable.trainable
    layers["decode"].trainable = True
    assert codec.trainable and codec.variable.trainable


def test_a_weight_under_stop_gradient_only_is_not_trainable_and_has_no_slot():
    base = tether.Weight((4, 4), "ones", name="base")
    delta = tether.Weight((4, 4), "zeros", name="delta")
    layer = tether.tie(keras.layers.Dense(4), kernel=base.stop_gradient() + delta)
    layer.build((None, 4))
    assert not base.trainable and delta.trainable
    assert [v.path for v in layer.trainable_weights] == ["delta", f"{layer.name}/bias"]
    assert base.variable in layer.non_trainable_weights or any(base.variable is v for v in layer.non_trainable_weights)


def test_adamw_with_decay_leaves_a_stopped_base_bit_identical_and_without_slots(rng):
    base = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="base")
    delta = tether.Weight((4, 4), "zeros", name="delta")
    inputs = keras.Input((4,))
    outputs = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=base.stop_gradient() + delta)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    before = base.numpy()
    x = rng.normal(size=(8, 4)).astype("float32")
    model.fit(x, x, epochs=3, verbose=0)
    assert np.array_equal(base.numpy(), before)
    assert np.abs(delta.numpy()).max() > 0
    assert slot_count(model.optimizer) == 2  # Adam's two moments of delta


def test_a_base_frozen_in_one_use_and_live_in_another_trains():
    base = tether.Weight((4, 4), "ones", name="base")
    tether.tie(keras.layers.Dense(4), kernel=base.stop_gradient()).build((None, 4))
    assert not base.trainable
    other = tether.tie(keras.layers.Dense(4), kernel=base)
    other.build((None, 4))
    assert base.trainable
    tether.untie(other)
    assert not base.trainable


def test_own_flag_wins_over_live_uses():
    codec, encode, _, _ = autoencoder()
    codec.trainable = False
    assert not codec.variable.trainable
    encode.trainable = False
    encode.trainable = True
    assert not codec.variable.trainable
    codec.trainable = True
    assert codec.variable.trainable


def test_the_recursive_setter_of_a_model_does_not_reach_a_weight_that_another_model_trains():
    codec, encode, decode, _ = autoencoder()
    frozen = keras.Sequential([keras.Input((5,)), encode])
    keras.Sequential([keras.Input((3,)), decode])
    frozen.trainable = False
    assert codec.trainable and codec.variable.trainable
    frozen.trainable = True
    assert encode.kernel.trainable


def test_toggling_a_model_keeps_the_freezes_of_single_uses():
    codec, encode, decode, model = autoencoder()
    decode.kernel.trainable = False
    model.trainable = False
    assert not codec.trainable
    model.trainable = True
    assert codec.trainable
    assert encode.kernel.trainable and not decode.kernel.trainable


def test_collecting_a_layer_does_not_change_what_trains():
    base = tether.Weight((4, 4), "ones", name="base")
    live = tether.tie(keras.layers.Dense(4), kernel=base)
    live.build((None, 4))
    frozen = tether.tie(keras.layers.Dense(4), kernel=base.stop_gradient())
    frozen.build((None, 4))
    del live
    gc.collect()
    assert base.trainable


def test_scale_gradient_scales_one_use(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    plain = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=w)
    scaled = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=w.scale_gradient(0.25))
    x = rng.normal(size=(2, 4)).astype("float32")
    plain.build(x.shape), scaled.build(x.shape)
    loss_a, (a,) = gradients(lambda: keras.ops.sum(plain(x) ** 2), [w.variable])
    loss_b, (b,) = gradients(lambda: keras.ops.sum(scaled(x) ** 2), [w.variable])
    assert loss_a == loss_b
    assert_close(b, 0.25 * a)


def test_a_layer_made_frozen_is_a_frozen_use():
    w = tether.Weight((4, 4), "ones", name="w")
    tether.tie(keras.layers.Dense(4, trainable=False), kernel=w).build((None, 4))
    assert not w.trainable


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "Compile the model again" in str(w.message)]


def test_freezing_one_use_after_compile_warns_once(rng):
    _, _, decode, model = autoencoder()
    model.compile("sgd", "mse")
    x = rng.normal(size=(8, 5)).astype("float32")
    fit = lambda: model.fit(x, x, verbose=0)  # noqa: E731
    assert warned(fit) == [] and warned(fit) == []
    decode.kernel.trainable = False
    (message,) = warned(fit)
    assert "codec" in message
    assert warned(fit) == []


def test_freezing_and_compiling_again_does_not_warn(rng):
    _, _, decode, model = autoencoder()
    x = rng.normal(size=(8, 5)).astype("float32")
    for _ in range(2):
        model.compile("sgd", "mse")
        assert warned(lambda: model.fit(x, x, verbose=0)) == []
        decode.trainable = not decode.trainable


def test_a_frozen_use_passes_no_gradient_to_other_parts_of_its_expression(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    delta = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="delta")
    a = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=w)
    b = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=w + delta)
    x = rng.normal(size=(2, 4)).astype("float32")
    a.build(x.shape), b.build(x.shape)
    b.trainable = False
    assert w.trainable and not delta.trainable
    _, (grad,) = gradients(lambda: keras.ops.sum(a(x) + 3.0 * b(x)), [w.variable])
    assert_close(as_zero(grad, (4, 4)), np.tile(x.sum(0)[:, None], (1, 4)), 1e-4)
    assert numpy(delta.value).shape == (4, 4)


@pytest.mark.parametrize("frozen", ["nothing", "the layer", "the variable", "the weight"])
@pytest.mark.parametrize("fails_at", ["the second path", "another shape", "a constraint"])
def test_a_tie_that_fails_leaves_what_trains_as_it_was(frozen, fails_at):
    dense = keras.layers.Dense(3, bias_constraint="non_neg", name="dense")
    model = keras.Sequential([keras.Input((4,)), dense])
    weight = tether.Weight((4, 3), "ones", name="w")
    user = tether.tie(keras.layers.Dense(3, name="user"), kernel=weight)
    user.build((None, 4))
    if frozen == "the layer":
        dense.trainable = user.trainable = False
    elif frozen == "the variable":
        dense.kernel.trainable = False
    elif frozen == "the weight":
        weight.trainable = False
    before = [variable.trainable for variable in (*model.variables, *user.variables)]
    wrong = {
        "the second path": {"nobody": weight},
        "another shape": {"bias": weight},
        "a constraint": {"bias": 2 * weight[0]},
    }
    with pytest.raises(tether.TetherError):
        tether.tie(model, {"dense/kernel": weight, **{f"dense/{name}": w for name, w in wrong[fails_at].items()}})
    assert [variable.trainable for variable in (*model.variables, *user.variables)] == before
    assert dense.trainable is user.trainable is (frozen != "the layer")


def test_a_tie_that_fails_in_the_middle_leaves_what_trains_as_it_was(monkeypatch):
    dense = keras.layers.Dense(3, name="dense")
    dense.build((None, 4))
    weight = tether.Weight((4, 3), "ones", name="w")
    user = tether.tie(keras.layers.Dense(3, name="user"), kernel=weight.stop_gradient())
    user.build((None, 4))
    assert not weight.trainable

    def fail(*_):
        raise MemoryError("in the middle")

    monkeypatch.setattr(keras_seam, "list_parameters_again", fail)
    with pytest.raises(MemoryError):
        tether.tie(dense, kernel=weight)
    monkeypatch.undo()
    assert not weight.trainable and not weight.variable.trainable and dense.kernel.trainable
    assert {variable.path: variable.trainable for variable in user.variables} == {"w": False, "user/bias": True}

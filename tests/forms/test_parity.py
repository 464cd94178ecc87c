"""Every form that PEFT or PyTorch has too computes, and trains by one step, what theirs does.

The numbers come from `parity/measure_peft.py`. PyTorch's kernels are outputs × inputs, Keras's the other way round.
"""

import json
import pathlib

import keras
import numpy as np
import pytest

import tether
from tests.support import as_zero, gradients, numpy
from tether import forms

RECORDED = json.loads((pathlib.Path(__file__).parent / "parity" / "peft.json").read_text())

# The form, and PEFT's names of what are the form's own weights here; all are transposed.
LORA = {"lora_a": "lora_A", "lora_b": "lora_B"}
ADAPTERS = {
    "low_rank": (lambda: forms.low_rank(3, alpha=6), LORA),
    "low_rank_rank_stabilized": (lambda: forms.low_rank(3, alpha=6, rank_stabilized=True), LORA),
    "low_rank_pissa": (lambda: forms.low_rank(3, alpha=6, start="pissa"), {}),
    "dora": (lambda: forms.dora(3, alpha=6), {**LORA, "magnitude": "lora_magnitude_vector"}),
    "vera": (
        lambda: forms.vera(4),
        {"vera_d": "vera_lambda_d", "vera_b": "vera_lambda_b", "a": "vera_A", "b": "vera_B"},
    ),
    "scale": (lambda: forms.scale(), {"scale": "ia3_l"}),
    "scale_inputs": (lambda: forms.scale(axis=0), {"scale": "ia3_l"}),
    "hadamard": (
        lambda: forms.hadamard(3, alpha=6),
        {"loha_a1": "hada_w1_b", "loha_b1": "hada_w1_a", "loha_a2": "hada_w2_b", "loha_b2": "hada_w2_a"},
    ),
    "kronecker": (lambda: forms.kronecker(4, alpha=8), {"lokr_c": "lokr_w1", "lokr_d": "lokr_w2"}),
    "kronecker_factored": (
        lambda: forms.kronecker(1, alpha=2),
        {"lokr_c": "lokr_w1", "lokr_a": "lokr_w2_b", "lokr_b": "lokr_w2_a"},
    ),
}


def array(values):
    return np.array(values, dtype="float32")


def close(mine, theirs, message=""):
    np.testing.assert_allclose(numpy(mine), theirs, rtol=1e-5, atol=1e-5, err_msg=message)


def added_name(weight):
    """What a name adds to that of the base."""
    return weight.name.removeprefix("base_").removeprefix("vera_bases.")


def own_weights(expression):
    return {added_name(weight): weight for weight in expression.weights_used()}


def test_every_recorded_case_is_compared():
    assert set(ADAPTERS) == set(RECORDED["adapters"])
    assert set(PARAMETRIZATIONS) == set(RECORDED["parametrizations"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_and_trains_as_in_peft(name):
    make, names = ADAPTERS[name]
    recorded = RECORDED["adapters"][name]
    base = tether.Weight(array(recorded["weight"]).T, name="base")
    bias = tether.Weight(array(recorded["bias"]), name="bias", trainable=False)
    kernel = make()(base.stop_gradient())
    own = own_weights(kernel)
    for mine, theirs in names.items():
        value = array({**recorded["before"], **recorded["shared"]}[theirs]).T
        own[mine].assign(value.reshape(own[mine].shape))
    # IA3 of a layer's outputs multiplies the bias too.
    shift = bias * own["scale"] if name == "scale" else bias
    layer = tether.tie(keras.layers.Dense(6), kernel=kernel, bias=shift)
    model = keras.Sequential([keras.Input((8,)), layer])
    x, y = array(recorded["x"]), array(recorded["y"])
    close(model(x), recorded["outputs"])
    model.compile(keras.optimizers.SGD(recorded["rate"]), "mse")
    model.train_on_batch(x, y)
    close(model(x), recorded["outputs_after"])
    for mine, theirs in names.items():
        if theirs in recorded["after"]:
            close(own[mine].value, array(recorded["after"][theirs]).T.reshape(own[mine].shape), mine)
    assert len(model.trainable_variables) == len(recorded["after"])


def test_the_pissa_start_has_pefts_factors():
    recorded = RECORDED["adapters"]["low_rank_pissa"]
    base = tether.Weight(array(recorded["weight"]).T, name="base")
    own = own_weights(forms.low_rank(3, alpha=6, start="pissa")(base))
    theirs = array(recorded["before"]["lora_B"]) @ array(recorded["before"]["lora_A"])
    close(own["lora_a"].numpy() @ own["lora_b"].numpy(), theirs.T)  # each pair of vectors is known up to its sign
    close(np.abs(own["lora_a"].numpy()), np.abs(array(recorded["before"]["lora_A"]).T))


# --------------------------------------------------------------------------- parametrizations

PARAMETRIZATIONS = {
    "weight_norm": (forms.weight_norm, {"base": "original1", "g": "original0"}),
    "spectral_norm": (forms.spectral_norm, {"base": "original", "u": "0._u", "v": "0._v"}),
    **{
        f"orthogonal_{map}{kind}": (
            (lambda map=map: forms.orthogonal(map, split=1)),
            {"base": "original", "before": "0.base"} if map == "cayley" else {"base": "original"},
        )
        for map in ("householder", "cayley")
        for kind in ("", "_wide", "_square")
    },
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_has_the_value_and_gradient_of_pytorchs(name):
    form, names = PARAMETRIZATIONS[name]
    recorded = RECORDED["parametrizations"][name]
    # What is normalised by output has outputs last here; a matrix that is orthogonal is one either way round.
    turned = name in ("weight_norm", "spectral_norm")
    turn = (lambda values: array(values).T) if turned else array
    theirs = {**recorded["stored"], **recorded["buffers"]}
    base = tether.Weight(turn(theirs[names["base"]]), name="base")
    expression = form()(base)
    own = own_weights(expression)
    assert set(own) == set(names)
    for mine in set(names) - {"base"}:
        own[mine].assign(turn(theirs[names[mine]]).reshape(own[mine].shape))
    layer = tether.tie(keras.layers.Dense(base.shape[1], use_bias=False), kernel=expression)
    eye, factors = np.eye(base.shape[0], dtype="float32"), turn(recorded["weights"])
    layer.build(eye.shape)
    trained = [weight for weight in own.values() if weight.trainable]
    assert len(trained) == len(recorded["stored"])

    def loss():
        return keras.ops.sum(keras.ops.multiply(layer(eye, training=True), factors))

    _, found = gradients(loss, [weight.variable for weight in trained])
    for weight, gradient in zip(trained, found, strict=True):
        wanted = turn(recorded["gradients"][names[added_name(weight)]]).reshape(weight.shape)
        close(as_zero(gradient, weight.shape), wanted, weight.name)
    for mine in set(names) - {"base"}:  # where the gradient has advanced some state, again from the start
        own[mine].assign(turn(theirs[names[mine]]).reshape(own[mine].shape))
    close(layer(eye, training=True), turn(recorded["value"]))
    for mine, name_there in names.items():
        if name_there in recorded["buffers_after"]:
            close(own[mine].value, turn(recorded["buffers_after"][name_there]), mine)

"""A weight that has become an expression of others: what names it follows, and its config is checked."""

import copy

import numpy as np
import pytest

import tether
from tests.support import numpy
from tether.errors import InvalidConfig, TetherError
from tether.weights import Weight
from tether.weights.expression import is_view, live_weights, program, resolved
from tether.weights.operators.quantized import Dequantize, rounded


def became_integers(rng, shape=(3, 2)):
    weight = Weight(rng.normal(size=shape).astype("float32"), name="w")
    twice = 2.0 * weight.T
    _ = twice.numpy(), live_weights(twice), is_view(weight.T)  # what is remembered of it must be found again
    weight.become(rounded(weight.numpy(), "int8", (0,)).expression(weight, "float32"))
    return weight, twice


def test_an_expression_written_before_is_made_of_the_new_weights(rng):
    weight, twice = became_integers(rng)
    parts = weight.became.weights_used()
    assert [part.name for part in parts] == [part.path for part in parts] == ["w_int8", "w_scale"]
    assert [part.role for part in parts] == ["integers", "scale"]
    assert twice.weights_used() == parts == (2.0 * weight.T).weights_used()
    assert not any(step.expression is weight for step in program(twice))
    assert twice.notation() == "2.0 * dequantize(w_int8, w_scale).T"
    assert not is_view(weight) and not is_view(weight.T)
    assert np.array_equal(twice.numpy(), 2 * (numpy(parts[0].value) * numpy(parts[1].value)).T)
    assert (weight.shape, weight.dtype, twice.shape) == ((3, 2), "float32", (2, 3))


def test_what_it_has_become_is_written_out_where_it_is_asked_for(rng):
    weight, twice = became_integers(rng)
    other = Weight((2, 3), "ones", name="other") + 1
    assert resolved(weight) is weight.became
    assert resolved(other) is other
    once = resolved(twice)
    assert once == 2.0 * weight.became.T and resolved(once) is once


@pytest.mark.parametrize("how", ["config", "copy"])
def test_a_copy_has_integers_of_its_own(rng, how):
    weight, _ = became_integers(rng)
    again = copy.deepcopy(weight) if how == "copy" else Weight.from_config(weight.get_config())
    assert [part.name for part in again.became.weights_used()] == ["w_int8", "w_scale"]
    assert [part.role for part in again.became.weights_used()] == ["integers", "scale"]
    assert not set(again.became.weights_used()) & set(weight.became.weights_used())
    assert (again.shape, again.dtype) == (weight.shape, weight.dtype)
    if how == "copy":
        assert np.array_equal(again.numpy(), weight.numpy())


def test_several_copies_within_one_scope_share_the_integers(rng):
    weight, _ = became_integers(rng)
    config = weight.get_config()
    integers = weight.became.weights_used()[0].get_config()
    with tether.sharing():
        first, second = Weight.from_config(config), Weight.from_config(integers)
    assert first.became.weights_used()[0] is second


def broken(name, config):
    became, parts = config["became"], config["became"]["weights"]
    first = next(iter(parts))
    if name == "not a dict":
        config["became"] = [1]
    elif name == "another key":
        became["code"] = "import os"
    elif name == "weights in a list":
        became["weights"] = [parts[first]]
    elif name == "nothing stored":
        became["weights"] = {}
    elif name == "a part that has become something itself":
        parts[first]["became"] = copy.deepcopy(became)
    elif name == "a part of another uid":
        became["weights"] = {"zzz": parts[first]}
    elif name == "a cycle":
        became["steps"][-1]["of"] = [2, 1]
    elif name == "itself":
        became["steps"] = [{"weight": config["uid"]}]
    elif name == "a number":
        became["steps"] = [{"number": 1.0}]
    elif name == "a stored weight":
        became["steps"] = [{"weight": first}]
    elif name == "another shape":
        config["shape"] = [2, 3]
    elif name == "no shape":
        config["shape"] = None
    elif name == "another dtype":
        config["dtype"] = "float16"
    return config


@pytest.mark.parametrize(
    "name",
    [
        "not a dict", "another key", "weights in a list", "nothing stored", "a part that has become something itself",
        "a part of another uid", "a cycle", "itself", "a number", "a stored weight", "another shape", "no shape",
        "another dtype",
    ],
)  # fmt: skip
def test_a_config_of_a_stranger_is_checked(rng, name):
    weight, _ = became_integers(rng)
    Weight.from_config(copy.deepcopy(weight.get_config()))
    with pytest.raises(InvalidConfig):
        Weight.from_config(broken(name, copy.deepcopy(weight.get_config())))


def test_a_value_cannot_be_assigned_through_the_integers(rng):
    weight, twice = became_integers(rng)
    before = weight.numpy()
    for target in (weight, twice, weight.became):
        with pytest.raises(TetherError, match="no inverse"):
            target.assign(np.zeros(target.shape, "float32"))
    assert np.array_equal(weight.numpy(), before)


# --------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("inputs", [(0,), (1,), (0, 1), (0, 2), (1, 2)])
def test_the_grid_of_each_channel_reaches_as_far_as_its_values(mode, inputs, rng):
    array = rng.normal(size=(5, 3, 7)).astype("float32")
    expression = rounded(array, mode, inputs).expression(Weight(array, name="w"), "float32")
    scale = expression.weights_used()[1].numpy()
    largest = {"int8": 127, "int4": 7}[mode]
    np.testing.assert_allclose(scale, np.abs(array).max(axis=inputs, keepdims=True) / largest, rtol=1e-6)
    codes = np.rint(expression.numpy() / scale)
    assert np.abs(codes).max() == largest
    assert np.all(np.abs(expression.numpy() - array) <= scale / 2 + 1e-6)
    extremes = np.abs(array) == np.abs(array).max(axis=inputs, keepdims=True)
    np.testing.assert_allclose(expression.numpy()[extremes], array[extremes], rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "block", "blocks"),
    [(256, 128, 2), (257, 128, 1), (130, 128, 2), (300, 100, 3), (96, 128, 1), (768, 100, 8)],
)
def test_blocks_have_one_size(count, block, blocks, rng):
    array = rng.normal(size=(count, 2)).astype("float32")
    found = rounded(array, "int4", (0,), block)
    assert found.scale.size == 2 * blocks
    expression = found.expression(Weight(array, name="w"), "float32")
    assert isinstance(expression, Dequantize) and expression.shape == array.shape
    steps = np.repeat(found.scale.reshape(blocks, 2), count // blocks, axis=0)
    assert np.all(np.abs(expression.numpy() - array) <= steps / 2 + 1e-6)


def test_bytes_hold_two_integers_each(rng):
    found = rounded(rng.normal(size=(5, 3)).astype("float32"), "int4", (0,))
    assert found.codes.shape == (3, 3) and found.codes.dtype == np.int8

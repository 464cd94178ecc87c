"""Which weights count as equal."""

import itertools

import keras
import ml_dtypes
import numpy as np
import pytest

import tether
from tests.inspection.checking.faults import normal
from tether.inspection.checking.samples import InMemory, alike, is_equal, is_zero, sample_tolerance

layers = keras.layers


def in_memory(*arrays):
    return [InMemory(array.shape, lambda array=array: array) for array in arrays]


def equal_pairs(*arrays, tolerance=1e-6):
    values = in_memory(*arrays)
    return [
        found
        for found in alike(values, 0.999, lambda first, second: True)
        if is_equal(values[found.first], values[found.second], found, tolerance)
    ]


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3])
@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 4, 4), (3, 4, 3)], ids=str)
def test_every_arrangement_and_factor_is_found(shape, scale, axes, rng):
    first = normal(rng, *shape)
    second = (scale * first.transpose(axes)).astype("float32")
    (found,) = equal_pairs(first, normal(rng, *shape), second)
    assert (found.first, found.second) == (0, 2)
    np.testing.assert_allclose(second, found.scale * first.transpose(found.axes), rtol=1e-5)
    assert found.scale == pytest.approx(scale, rel=1e-6)


def test_a_large_weight_is_compared_everywhere(rng):
    first = normal(rng, 1500, 900)
    assert len(equal_pairs(first, first.T.copy())) == 1
    second = first.T.copy()
    second[-1, -1] += 1.0
    assert not equal_pairs(first, second)


@pytest.mark.parametrize(
    "array",
    [np.zeros((8, 8)), np.ones(64), np.eye(8), np.r_[np.zeros(16), np.ones(16)], np.arange(15.0), np.full(32, np.nan)],
    ids=["zeros", "ones", "identity", "forget gate", "tiny", "not numbers"],
)
def test_starts_that_are_alike_on_purpose_do_not_count(array):
    assert not equal_pairs(array.astype("float32"), array.astype("float32"))


def test_rounded_products_of_16_bits_are_equal(rng):
    first = normal(rng, 20, 20).astype(ml_dtypes.bfloat16)
    second = (0.3 * first.astype("float32")).astype(ml_dtypes.bfloat16)
    assert len(equal_pairs(first, second, tolerance=sample_tolerance("bfloat16"))) == 1


def test_reading_for_zeros_ends_at_the_first_number():
    reads = []

    class Watched(InMemory):
        def block(self, parts):
            reads.append(parts)
            return super().block(parts)

    array = np.zeros((5000, 1000), "float32")
    assert is_zero(Watched(array.shape, lambda: array))
    assert len(reads) > 2
    array[0, 0] = 1
    reads.clear()
    assert not is_zero(Watched(array.shape, lambda: array)) and len(reads) == 1


# --------------------------------------------------------------------------- models


def chain(*units, inputs=6):
    model = keras.Sequential([keras.Input((inputs,)), *(layers.Dense(n, name=f"d{i}") for i, n in enumerate(units))])
    return model, model.layers


def equal(model):
    return tether.check(model, rules=["equal-weights"])


def test_of_three_each_is_paired_with_the_first(rng):
    model, dense = chain(6, 6, 6)
    for layer in dense:
        layer.kernel.assign(keras.ops.convert_to_tensor(np.arange(36, dtype="float32").reshape(6, 6)))
    found = equal(model)
    assert [finding.where for finding in found] == ["d1/kernel", "d2/kernel"]
    assert all("'d0/kernel'" in finding.mend for finding in found)


def test_the_code_ties_and_keeps_the_values(rng):
    model, (first, second) = chain(4, 6)
    kernel = normal(rng, 6, 4)
    first.kernel.assign(kernel)
    second.kernel.assign(0.25 * kernel.T)
    x = normal(rng, 3, 6)
    before = keras.ops.convert_to_numpy(model(x))
    (finding,) = equal(model)
    exec(finding.mend, {"model": model, "tether": tether})
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(x)), before, rtol=1e-5, atol=1e-6)
    assert len(model.weights) == 3 and not equal(model)


def test_a_fresh_model_is_clean():
    model, _ = chain(6, 6, 6)
    recurrent = keras.Sequential([keras.Input((4, 8)), layers.Bidirectional(layers.LSTM(8)), layers.Dense(8)])
    assert not equal(model) and not equal(recurrent)


def test_an_initializer_object_used_twice_is_one_seed():
    start = keras.initializers.HeNormal()
    layer = [layers.Dense(6, kernel_initializer=start, name=name) for name in "ab"]
    (finding,) = equal(keras.Sequential([keras.Input((6,)), *layer]))
    assert finding.severity == "hint" and "one seed" in finding.why


def test_weights_that_a_soft_tie_keeps_close_are_no_finding(rng):
    model, (first, second) = chain(6, 6)
    second.kernel.assign(first.kernel)
    assert equal(model)
    tether.transfer.soft_tie(model, "d0/kernel", "d1/kernel", strength=0.1)
    assert not equal(model)


def test_tied_weights_are_no_finding(rng):
    model, _ = chain(6, 6)
    tether.tie(model, {"d1/kernel": tether.weight_of(model, "d0/kernel").T})
    assert not tether.check(model)


def test_a_layer_that_is_used_twice_is_no_finding(rng):
    dense = layers.Dense(6)
    x = keras.Input((6,))
    assert not tether.check(keras.Model(x, dense(dense(x))))


def test_blocks_that_start_alike_in_the_same_way_are_one_hint():
    def block(number):
        start = keras.initializers.HeNormal()
        pair = [layers.Dense(6, kernel_initializer=start, name=name) for name in ("key", "value")]
        return keras.Sequential(pair, name=f"block_{number}")

    model = keras.Sequential([keras.Input((6,)), *(block(number) for number in range(3))])
    (finding,) = equal(model)
    assert finding.where == "block_0/value/kernel"
    assert "block_1/value/kernel, block_2/value/kernel" in finding.why


def test_the_weights_of_a_layer_by_itself_are_compared_too():
    start = keras.initializers.HeNormal()

    class Two(layers.Layer):
        def build(self, shape):
            self.a = self.add_weight(shape=(6, 6), initializer=start, name="a")
            self.b = self.add_weight(shape=(6, 6), initializer=start, name="b")

    layer = Two()
    layer.build((None, 6))
    (finding,) = equal(layer)
    assert finding.where.endswith("b") and finding.mend.startswith("tether.tie(model, {'b': ")

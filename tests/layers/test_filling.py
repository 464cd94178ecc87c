"""Values in an array of another size, and the report of what came from where."""

import keras
import numpy as np
import pytest

from tether.errors import ShapeMismatch, TetherError
from tether.layers.family.fill import Provenance, describe, filled


def start(*shape):
    return np.full(shape, 7.0, "float32")


def test_equal_shapes_are_copied_whatever_the_rule():
    value = np.arange(6, dtype="float64").reshape(2, 3)
    for rule in (None, "zeros", "initializer", "mean", lambda value, start: start):
        found = filled(value, start(2, 3), rule)
        assert found.dtype == np.float32 and np.array_equal(found, value)
        assert not np.shares_memory(found, value)


def test_another_shape_needs_a_rule_and_the_error_names_both_shapes():
    with pytest.raises(ShapeMismatch, match=r"\(2, 3\).*\(2, 4\).*fill="):
        filled(np.zeros((2, 3)), start(2, 4), None)


def test_zeros():
    found = filled(np.arange(4.0).reshape(2, 2), start(3, 3), "zeros")
    assert np.array_equal(found, [[0, 1, 0], [2, 3, 0], [0, 0, 0]])


def test_initializer_keeps_what_is_there():
    begin = start(3, 2)
    found = filled(np.arange(4.0).reshape(2, 2), begin, "initializer")
    assert np.array_equal(found, [[0, 1], [2, 3], [7, 7]])
    assert np.array_equal(begin, start(3, 2))


def test_mean_over_one_grown_axis():
    value = np.array([[1.0, 2.0], [3.0, 6.0]])
    assert np.array_equal(filled(value, start(4, 2), "mean"), [[1, 2], [3, 6], [2, 4], [2, 4]])
    assert np.array_equal(filled(value, start(2, 3), "mean"), [[1, 2, 1.5], [3, 6, 4.5]])


def test_mean_over_two_grown_axes_does_not_depend_on_their_order(rng):
    value = rng.normal(size=(2, 3, 4))
    found = filled(value, np.zeros((4, 3, 6)), "mean")
    turned = filled(value.transpose(2, 1, 0), np.zeros((6, 3, 4)), "mean").transpose(2, 1, 0)
    np.testing.assert_allclose(found, turned)
    np.testing.assert_allclose(found[:2, :, :4], value)
    np.testing.assert_allclose(found[3, :, :4], value.mean(axis=0))
    np.testing.assert_allclose(found[:2, :, 5], value.mean(axis=2))
    np.testing.assert_allclose(found[3, :, 5], value.mean(axis=(0, 2)))


def test_mean_where_another_axis_shrinks():
    value = np.array([[1.0, 2.0, 9.0], [3.0, 6.0, 9.0]])
    assert np.array_equal(filled(value, start(3, 2), "mean"), [[1, 2], [3, 6], [2, 4]])


def test_what_does_not_fit_is_cut():
    value = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(filled(value, start(3, 2), "zeros"), [[0, 1], [3, 4], [0, 0]])


def test_whole_numbers_are_rounded_not_cut_off():
    assert np.array_equal(filled(np.array([1, 2, 2]), np.zeros(4, "int32"), "mean"), [1, 2, 2, 2])


def test_a_function_makes_the_whole_array_also_of_another_number_of_axes():
    found = filled(np.array([1.0, 2.0]), start(2, 2), lambda value, start: np.outer(value, [1, 10]) + 0 * start)
    assert np.array_equal(found, [[1, 10], [2, 20]])


def test_a_function_that_returns_another_shape_is_refused():
    with pytest.raises(ShapeMismatch, match=r"\(3, 2\).*shape=\(2, 2\)"):
        filled(np.zeros((2, 2)), start(3, 2), lambda value, start: value)


def test_a_function_cannot_change_what_it_is_given():
    value, begin = np.ones(2), start(3)

    def greedy(value, start):
        value[:] = start[:] = -1
        return start

    assert np.array_equal(filled(value, begin, greedy), [-1, -1, -1])
    assert np.array_equal(value, [1, 1]) and np.array_equal(begin, start(3))


def test_another_number_of_axes_has_no_common_part():
    with pytest.raises(ShapeMismatch, match="number of axes"):
        filled(np.zeros((2, 3)), start(6), "zeros")


@pytest.mark.parametrize("rule", ["zero", 0, ("zeros",)])
def test_what_is_no_rule_is_refused_even_where_none_is_needed(rule):
    with pytest.raises(TetherError, match="'zeros', 'initializer', 'mean'"):
        filled(np.zeros(2), start(2), rule)


def test_16_bit_values_are_filled_too():
    value = keras.ops.convert_to_numpy(keras.ops.cast([1.0, 3.0], "bfloat16"))
    found = filled(value, np.zeros(3, value.dtype), "mean")
    assert found.dtype == value.dtype and np.array_equal(found.astype("float32"), [1, 3, 2])


def test_describe_says_what_fill_does():
    assert describe((64, 64), (64, 64), None) == "copied"
    assert describe((64, 64), (64, 128), "zeros") == "copied, zeros on axis 1: 64 -> 128"
    assert describe((64, 9), (32, 12), "mean") == "copied, cut on axis 0: 64 -> 32, mean on axis 1: 9 -> 12"


def test_the_report_is_an_aligned_table():
    report = Provenance()
    report.add("kernel", (64, 128), "dense/kernel", (64, 64), "copied, zeros on axis 1: 64 -> 128")
    report.add("b", (128,), None, None, "kept")
    report.unused.append("dense/bias")
    lines = str(report).splitlines()
    assert lines[:3] == [
        "target  shape      source        shape     how",
        "kernel  (64, 128)  dense/kernel  (64, 64)  copied, zeros on axis 1: 64 -> 128",
        "b       (128,)     -             -         kept",
    ]
    assert "dense/bias" in lines[3] and len(lines) == 4
    assert [row.target for row in report] == ["kernel", "b"] and len(report) == 2
    assert report["b"].how == "kept"
    with pytest.raises(KeyError):
        report["c"]

"""The engine: offers for variables, weights and views, planned and checked before anything is assigned."""

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy
from tether.errors import ShapeMismatch, TetherError, ValueConflict
from tether.files.loading.assignment import Offer, Wanted, assign_offers

layers = keras.layers


def offer(target, array, source="file", reads=None):
    array = np.asarray(array)

    def read():
        if reads is not None:
            reads.append(source)
        return array

    return Offer(target, source, array.shape, str(array.dtype), read)


def filled(offers, wanted=(), **options):
    return assign_offers(offers, wanted, **{"resolve": "error", "strict": True, "what": "the file", **options})


def layer(expression, inputs=2, units=3):
    made = tether.tie(layers.Dense(units, use_bias=False), kernel=expression)
    made.build((None, inputs))
    return made


def test_a_variable_a_weight_and_a_view_are_filled():
    variable = keras.Variable(np.zeros(2, "float32"), name="v")
    one, two = tether.Weight((2, 3), "zeros", name="one"), tether.Weight((3, 2), "zeros", name="two")
    view = layer(0.5 * two.T).kernel
    value = np.arange(6, dtype="float32").reshape(2, 3)
    report = filled([offer(variable, np.ones(2, "float32")), offer(one, value), offer(view, value)])
    assert numpy(variable).tolist() == [1, 1]
    assert np.array_equal(one.numpy(), value) and np.array_equal(two.numpy(), 2 * value.T)
    assert [each.name for each in report.loaded] == ["v", "one", "two"]


def test_a_weight_notices_that_it_was_written_to():
    weight = tether.Weight((2,), "zeros", name="w")
    before = weight.generation
    filled([offer(weight, np.ones(2, "float32"))])
    assert weight.generation > before


def test_a_joined_weight_gives_its_parts():
    a, b = tether.Weight((2, 1), "zeros", name="a"), tether.Weight((2, 2), "zeros", name="b")
    view = layer(tether.ops.concatenate([a, b], axis=1)).kernel
    value = np.arange(6, dtype="float32").reshape(2, 3)
    filled([offer(view, value)])
    assert np.array_equal(a.numpy(), value[:, :1]) and np.array_equal(b.numpy(), value[:, 1:])


def test_values_are_read_late_and_one_after_another():
    weights = [tether.Weight((2,), "zeros", name=name) for name in "abc"]
    reads = []
    filled([offer(weight, np.ones(2, "float32"), weight.name, reads) for weight in weights])
    assert reads == ["a", "b", "c"]


def test_the_conflict_is_of_the_values_that_are_farthest_apart():
    weight = tether.Weight((2,), "zeros", name="w")
    values = {"a": [0, 0], "b": [0, 0.25], "c": [3, 0], "d": [0, 0]}
    offers = [offer(weight, np.array(value, "float32"), source) for source, value in values.items()]
    with pytest.raises(ValueConflict, match=r"w: 'a' and 'c' \(and b\) differ by up to 3\..*Nothing was changed"):
        filled(offers)
    report = filled(offers, resolve="mean")
    assert report.conflicting[0].sources == ("a", "c", "b") and report.conflicting[0].difference == 3
    assert weight.numpy().tolist() == [0.75, 0.0625]


def test_infinities_are_compared():
    weight = tether.Weight((2,), "zeros", name="w")
    same = np.array([np.inf, -np.inf], "float32")
    assert not filled([offer(weight, same, "a"), offer(weight, same.copy(), "b")]).conflicting
    with pytest.raises(ValueConflict, match="differ by up to inf"):
        filled([offer(weight, same, "a"), offer(weight, -same, "b")])


def test_whole_numbers_have_no_mean_and_must_fit():
    weight = keras.Variable(np.zeros(2), dtype="int8", trainable=False, name="w")
    a, b = np.array([1, 2], "int8"), np.array([1, 3], "int8")
    with pytest.raises(TetherError, match="no mean"):
        filled([offer(weight, a, "a"), offer(weight, b, "b")], resolve="mean")
    filled([offer(weight, np.array([5, -5], "int32"))])
    assert numpy(weight).tolist() == [5, -5]
    with pytest.raises(TetherError, match="int8 cannot hold"):
        filled([offer(weight, np.array([300, 0], "int32")), offer(weight, a)])
    assert numpy(weight).tolist() == [5, -5]


def test_shapes_are_checked_before_anything_is_read():
    one, two = (tether.Weight((2,), "zeros", name=name) for name in "ab")
    reads = []
    with pytest.raises(ShapeMismatch, match=r"b has shape \(2,\); 'y' has shape \(3,\)"):
        filled([offer(one, np.ones(2, "float32"), "x", reads), offer(two, np.ones(3, "float32"), "y", reads)])
    assert reads == [] and one.numpy().tolist() == [0, 0]


def test_what_is_missing_is_an_error_only_if_it_is_required():
    weight, part = (keras.Variable(np.zeros(2, "float32"), name=name) for name in ("weight", "part"))
    offers = [offer(weight, np.ones(2, "float32"))]
    report = filled(offers, [Wanted(weight, "weight"), Wanted(part, "part", required=False)])
    assert report.missing == ("part",)
    with pytest.raises(TetherError, match="the file has no value for 'part'"):
        filled(offers, [Wanted(weight, "weight"), Wanted(part, "part")])


def test_a_report_is_for_people():
    weight = tether.Weight((2,), "zeros", name="w")
    offers = [offer(weight, np.zeros(2, "float32"), "a"), offer(weight, np.ones(2, "float32"), "b")]
    report = filled(offers, skipped=[("c", False)], resolve="first")
    assert str(report).splitlines() == [
        "loaded 1: w <- a, b",
        "skipped 1: c",
        "conflicting 1: w: 'a' and 'b' differ by up to 1; first taken",
    ]
    with pytest.raises(AttributeError):
        report.loaded = ()

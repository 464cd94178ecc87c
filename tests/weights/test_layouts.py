"""Layouts through expressions: which axes of stored weights the axes of a value are. Only shapes are looked at."""

import keras
import numpy as np
import pytest

import tether
from tether.weights.axes import Links
from tether.weights.expression import OPERATORS, Node, operator
from tether.weights.placement import Traced, fitted

SIZES = {"batch": 2, "model": 4}
COLUMNS, ROWS = (None, "model"), ("model", None)


def weight(*shape, name="w", **kwargs):
    return tether.Weight(shape, "glorot_uniform" if len(shape) > 1 else "ones", name=name, **kwargs)


def back(expression, spec):
    """The layout of each weight, by its path, if the value lies in this way."""
    traced = Traced(expression, SIZES)
    traced.say(spec)
    return {each.path: traced.of(each) for each in expression.weights_used()}


def forth(expression, spec):
    """The layout of the value, if its first weight lies in this way."""
    traced = Traced(expression, SIZES)
    traced.say(spec, expression.weights_used()[0])
    return traced.value


W, V = weight(16, 8), weight(16, 8, name="v")
T, C = weight(8, 4, 12, name="t"), weight(8, name="c")


@pytest.mark.parametrize(
    ("expression", "spec", "right"),
    [
        (W.T, COLUMNS, {"w": ROWS}),
        (T.transpose(1, 2, 0), (None, None, "model"), {"t": ("model", None, None)}),
        (0.5 * W, COLUMNS, {"w": COLUMNS}),
        (W.stop_gradient().scale_gradient(0.1).astype("float16"), ROWS, {"w": ROWS}),
        (W + V, COLUMNS, {"w": COLUMNS, "v": COLUMNS}),
        (W - 2 * V, ROWS, {"w": ROWS, "v": ROWS}),
        (W * C, COLUMNS, {"w": COLUMNS, "c": ("model",)}),
        (W / C, ROWS, {"w": ROWS, "c": (None,)}),
        (W @ weight(8, 12, name="b"), COLUMNS, {"w": (None, None), "b": COLUMNS}),
        (W @ weight(8, 12, name="b"), ROWS, {"w": ROWS, "b": (None, None)}),
        (W @ C, ("model",), {"w": ROWS, "c": (None,)}),
        (weight(3, 16, 8, name="s") @ C[:, None], (None, "model", None), {"s": (None, "model", None), "c": (None,)}),
        (W.reshape(4, 4, 8), ("model", None, None), {"w": ROWS}),
        (W.reshape(2, 8, 8), ("batch", None, "model"), {"w": ("batch", "model")}),
        (W.reshape(2, 8, 8), ("model", None, None), {"w": (None, None)}),
        (W.reshape(2, 8, 8), (None, "model", None), {"w": (None, None)}),
        (W.reshape(128), ("model",), {"w": ROWS}),
        (T.reshape(8, 48), COLUMNS, {"t": (None, "model", None)}),
        (T.reshape(8, 48).reshape(8, 4, 12), (None, None, "model"), {"t": (None, None, "model")}),
        (W[:, :4], ROWS, {"w": ROWS}),
        (W[:, :4], COLUMNS, {"w": (None, None)}),
        (T[2], COLUMNS, {"t": (None, None, "model")}),
        (T[..., None, ::2], ("model", None, None, None), {"t": ("model", None, None)}),
        (W[::-1], ROWS, {"w": (None, None)}),
        (tether.ops.concatenate([W, V], 0), COLUMNS, {"w": COLUMNS, "v": COLUMNS}),
        (tether.ops.concatenate([W, V], 0), ROWS, {"w": (None, None), "v": (None, None)}),
        (tether.ops.stack([W, V], 1), ("model", None, None), {"w": ROWS, "v": ROWS}),
        (tether.ops.where(np.ones((16, 1), bool), W, C), COLUMNS, {"w": COLUMNS, "c": ("model",)}),
        (tether.ops.einsum("ab,cd->acbd", W, V), ("model", None, None, None), {"w": ROWS, "v": (None, None)}),
        (tether.ops.einsum("ab,cd->acbd", W, V).reshape(256, 64), COLUMNS, {"w": COLUMNS, "v": (None, None)}),
        (tether.ops.take(W, [1, 2, 3], 0), COLUMNS, {"w": COLUMNS}),
        (tether.ops.take(weight(5, 16, 8, name="s"), 2), ROWS, {"s": (None, "model", None)}),
        (T.sum(1), ROWS, {"t": ("model", None, None)}),
        (T.mean(2, keepdims=True), (None, "model", None), {"t": (None, "model", None)}),
        (tether.ops.exp(W) ** 2, COLUMNS, {"w": COLUMNS}),
        (tether.ops.maximum(W, V), ROWS, {"w": ROWS, "v": ROWS}),
        (tether.ops.apply(keras.ops.tanh, W), COLUMNS, {"w": COLUMNS}),
        (tether.ops.apply(keras.ops.cumsum, W), ("model",), {"w": (None, None)}),
        (tether.forms.orthogonal()(W), COLUMNS, {"w": (None, None)}),
    ],
)  # fmt: skip
def test_a_layout_goes_back_through(expression, spec, right):
    assert back(expression, spec) == right


def test_an_axis_in_two_places_of_a_value_is_whole():
    w = weight(8, 8)
    assert back(w + w.T, COLUMNS) == {"w": (None, None)}
    assert forth(w + w.T, COLUMNS) == (None, None)


def test_a_base_tells_its_parts_how_to_lie():
    base = weight(16, 8)
    for form, right in (
        (tether.low_rank(2), {"w_lora_a": (None, None), "w_lora_b": COLUMNS}),
        (tether.forms.dora(2), {"w_lora_b": COLUMNS, "w_magnitude": ("model",)}),
        (tether.forms.gate(per="output"), {"w_gate": ("model",), "w_own": COLUMNS}),
    ):
        traced = Traced(expression := form(base), SIZES)
        traced.say(COLUMNS, base)
        found = {each.path: traced.of(each) for each in expression.weights_used()}
        assert right.items() <= {path.replace("_1", ""): spec for path, spec in found.items()}.items()
        assert traced.value == COLUMNS


def test_a_split_axis_goes_over_several_parts_of_it():
    """A base of 12 columns beside a Kronecker product of 2 and 6: four devices divide the base and no factor."""
    w, c, d = weight(8, 12), weight(2, 2, name="c"), weight(4, 6, name="d")
    expression = w + tether.ops.einsum("ab,cd->acbd", c, d).reshape(8, 12)
    assert back(expression, COLUMNS) == {"w": COLUMNS, "c": (None, None), "d": (None, None)}
    w, c, d = weight(8, 15), weight(2, 5, name="c"), weight(4, 3, name="d")
    assert back(w + tether.ops.einsum("ab,cd->acbd", c, d).reshape(8, 15), ROWS)["w"] == ROWS


def test_an_axis_that_cannot_be_divided_is_whole():
    assert fitted(("model", "batch", None), (6, 6, 5), SIZES) == (None, "batch", None)
    assert back(weight(6, 8), ROWS) == {"w": (None, None)}


def test_a_mesh_axis_of_one_device_keeps_its_name():
    traced = Traced(expression := weight(6, 8).T, {"model": 1})
    traced.say((None, "model"))
    assert traced.of(expression.weights_used()[0]) == ("model", None)


def test_integers_and_their_scale_follow_what_they_stand_for():
    for mode, codes in (("int8", (16, 8)), ("int4", (8, 8))):
        w = weight(16, 8)
        w.quantize(mode)
        found = {tuple(each.shape): spec for each, spec in _by_weight(w.became, COLUMNS)}
        assert found == {codes: COLUMNS, (1, 8): COLUMNS}
        found = {tuple(each.shape): spec for each, spec in _by_weight(w.became, ROWS)}
        assert found == {codes: ROWS, (1, 8): (None, None)}


def _by_weight(expression, spec):
    traced = Traced(expression, SIZES)
    traced.say(spec)
    return [(each, traced.of(each)) for each in expression.weights_used()]


def test_labels_are_split_where_axes_of_one_size_meet():
    links = Links()
    whole, parts = links.label(24), links.label(4) + links.label(6)
    links.same(whole, parts)
    assert [links.sizes[label] for label in links.row(whole)] == [4, 6]
    links.same(links.row(whole), links.label(2) + links.label(12))
    assert (
        [links.sizes[label] for label in links.row(whole)]
        == [2, 2, 6]
        == [links.sizes[label] for label in links.row(parts)]
    )


def test_axes_that_cannot_be_split_alike_are_not_made_one():
    links = Links()
    one, other = links.label(2) + links.label(3), links.label(3) + links.label(2)
    links.same(one, other)
    assert links.row(one) == one and links.row(other) == other


def test_every_operator_says_its_axes_or_has_none_to_say():
    """An operator without a rule needs its operands whole: those that do are named here, each on purpose."""
    operator("")  # the forms' operators are registered too
    silent = {
        name for name, cls in OPERATORS.items() if cls.axes_from is Node.axes_from and cls.expanded is Node.expanded
    }
    assert silent == {"cayley", "drop_mask", "householder", "symmetric", "turn", "waves"}


def test_axes_have_the_sizes_of_the_value():
    for expression in (W.T @ V, T.reshape(2, 4, 48)[1], tether.ops.stack([W, V], -1), T.sum((0, 2)), W[:0]):
        traced = Traced(expression, SIZES)
        rows = traced._axes[expression]
        assert [traced._links.size(row) for row in rows] == [max(size, 1) for size in expression.shape]

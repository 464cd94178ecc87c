"""What an expression's shape becomes when a weight in it gets another size."""

import pytest

import tether
from tether.errors import ShapeMismatch
from tether.layers.resize import shapes_with, take_shapes


def test_every_part_gets_its_shape():
    w, v = tether.Weight((4, 3), name="w"), tether.Weight((3, 5), name="v")
    product = w @ v
    root = (product + 1.0).T
    found = {id(part): shape for part, shape in shapes_with(root, {w: (6, 3)})}
    assert found[id(w)] == (6, 3) and found[id(v)] == (3, 5)
    assert found[id(product)] == (6, 5) and found[id(root)] == (5, 6)
    assert root.shape == (5, 4)
    take_shapes(shapes_with(root, {w: (6, 3)}))
    assert root.shape == (5, 6) and product.shape == (6, 5)


def test_a_part_that_does_not_fit_any_more_is_named():
    w, v = tether.Weight((4, 3), name="w"), tether.Weight((3, 5), name="v")
    with pytest.raises(ShapeMismatch, match="w @ v"):
        shapes_with(w @ v, {w: (4, 6)})


def test_a_long_chain_costs_no_stack():
    w = tether.Weight((4, 3), name="w")
    root = w
    for _ in range(3_000):
        root = root + 1.0
    assert shapes_with(root, {w: (5, 3)})[-1][1] == (5, 3)

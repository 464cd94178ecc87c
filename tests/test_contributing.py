"""The operator that CONTRIBUTING walks through works, and passes the test that stands beside it."""

import numpy as np
import pytest

import tether
from tests.documents import python_blocks, run
from tether.errors import InvalidConfig, NotInvertible, ShapeMismatch, TetherError
from tether.weights.expression import OPERATORS
from tether.weights.operators import structure

NAME = "CONTRIBUTING.md"


@pytest.fixture
def walk():
    """The names that the blocks define. The operator is forgotten afterwards: it is not part of Tether."""
    known = set(OPERATORS)
    namespace = {"__name__": "walk_through"}
    operator, function, test, *_ = python_blocks(NAME)
    run(NAME, operator[1], operator[0], namespace)
    structure.roll = namespace["roll"]
    public = dict(vars(tether.ops))
    try:
        run(NAME, function[1], function[0], public)
        namespace["public_roll"] = public["roll"]
        run(NAME, test[1], test[0], namespace)
        yield namespace
    finally:
        del structure.roll
        for name in set(OPERATORS) - known:
            del OPERATORS[name]


def test_its_own_test_passes(walk):
    walk["test_roll"]()


def test_it_is_what_the_text_says(walk):
    roll = walk["public_roll"]
    w = tether.Weight((2, 3), name="w")
    assert roll(w, 1) == walk["roll"](w, 1, axis=0)
    with pytest.raises(ShapeMismatch):
        roll(w, 1, axis=2)
    with pytest.raises(InvalidConfig):
        roll(w, "1")
    with pytest.raises(InvalidConfig):
        roll(w, True)
    with pytest.raises(TetherError):
        walk["Roll"](w, shift=1, by=2)
    with pytest.raises(TypeError, match="Two operators"):
        walk["register"](type("Other", (walk["Node"],), {"name": "roll"}))


def test_a_layer_starts_and_computes_through_it(walk):
    import keras

    w = tether.Weight(name="w")
    dense = tether.tie(keras.layers.Dense(3, use_bias=False), kernel=walk["public_roll"](w, 1, axis=1))
    x = np.eye(2, dtype="float32")
    y = keras.ops.convert_to_numpy(dense(x))
    assert w.shape == (2, 3)
    np.testing.assert_allclose(y, np.roll(w.numpy(), 1, axis=1), rtol=1e-6)
    with pytest.raises(NotInvertible):
        (walk["public_roll"](w, 1) @ w.T).assign(np.ones((2, 2)))


def test_the_form_that_it_walks_through_passes_its_own_test():
    form, test = python_blocks(NAME)[3:5]
    namespace = {"__name__": "walk_through_a_form"}
    for line, code in (form, test):
        run(NAME, code, line, namespace)
    namespace["test_singular_values"]()
    assert namespace["__all__"] == ["singular_values"]
    kernel = tether.Weight(np.random.default_rng(0).normal(size=(3, 2, 4)).astype("float32"), name="kernel")
    np.testing.assert_allclose(namespace["singular_values"]()(kernel).numpy(), kernel.numpy(), atol=1e-6)
    with pytest.raises(TetherError, match="two or more axes"):
        kernel[0, 0] + namespace["singular_values"]()


def test_the_applier_that_it_shows_is_one(monkeypatch):
    import keras

    from tether import kinds
    from tether.layers import appliers

    ((line, code),) = python_blocks(NAME)[5:]
    namespace = {"__name__": "an_applier", "keras": keras}
    run(NAME, code, line, namespace)
    followed = []

    def applied(*args):
        followed.append(namespace["applied_by_plan"](*args))
        return followed[-1]

    namespace["applied_by_plan"], namespace["applied"] = namespace["applied"], applied

    class Mine(keras.layers.Dense):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training)

    monkeypatch.setitem(appliers.APPLIERS, "mine", namespace["call_of"])
    monkeypatch.setitem(kinds.KINDS, Mine, kinds.Kind(applier="mine"))
    w, a, b = (
        tether.Weight(shape, "normal", name=name) for name, shape in (("w", (4, 3)), ("a", (4, 1)), ("b", (1, 3)))
    )
    layer = tether.tie(Mine(3, activation="relu"), kernel=w + a @ b)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    with tether.planning.force("factored"):
        y = keras.ops.convert_to_numpy(layer(x))
    assert followed[-1] is not None
    np.testing.assert_allclose(y, np.maximum(x @ (w.numpy() + a.numpy() @ b.numpy()), 0), atol=1e-5)

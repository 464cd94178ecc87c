"""A child layer on its parent's weights."""

import keras
import numpy as np
import pytest

import tether
from tests import kinds
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError, UnknownName, Unsupported

layers = keras.layers
ops = keras.ops

every_kind = kinds.for_each()


def built(kind, rng):
    """A layer with values that no initializer makes, and an input."""
    layer, x = kind.make(), kind.inputs(rng)
    outputs(layer, x)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape).astype("float32"))
    return layer, x


def outputs(layer, x):
    return numpy(kinds.apply(layer, x))


def state(layer):
    return [(w.path, w.dtype, tuple(w.shape), numpy(w).tobytes()) for w in layer.weights]


@every_kind
def test_without_a_change_all_is_shared(kind, rng, tmp_path):
    parent, x = built(kind, rng)
    variables, before, y = list(parent.weights), state(parent), outputs(parent, x)
    parent.save_weights(tmp_path / "before.weights.h5") if isinstance(parent, keras.Model) else None
    child = tether.inherit(parent)
    assert isinstance(child, type(parent).__mro__[-1]) and child is not parent
    np.testing.assert_array_equal(outputs(child, x), y)
    np.testing.assert_array_equal(outputs(parent, x), y)
    assert all(a is b for a, b in zip(parent.weights, variables, strict=True))
    assert state(parent) == before
    assert all(a is b for a, b in zip(child.weights, parent.weights, strict=True))
    assert {row.how for row in child.inheritance} == {"shared"}
    changed = [w + 1.0 for w in parent.get_weights()]
    parent.set_weights(changed)
    np.testing.assert_array_equal(outputs(child, x), outputs(parent, x))
    if isinstance(parent, keras.Model):
        parent.load_weights(tmp_path / "before.weights.h5")
        np.testing.assert_array_equal(outputs(parent, x), y)


@every_kind
def test_without_sharing_all_is_a_true_copy(kind, rng):
    parent, x = built(kind, rng)
    cls, y = type(parent), outputs(parent, x)
    child = tether.inherit(parent, share=False)
    np.testing.assert_array_equal(outputs(child, x), y)
    assert type(child) is type(parent) is cls
    assert not {id(w) for w in child.weights} & {id(w) for w in parent.weights}
    child.set_weights([w * 0 for w in child.get_weights()])
    np.testing.assert_array_equal(outputs(parent, x), y)
    assert {row.how for row in child.inheritance} == {"copied"}


@every_kind
def test_a_child_and_its_parent_survive_a_file(kind, rng, tmp_path):
    parent, x = built(kind, rng)
    child = tether.inherit(parent)
    inputs = kind.symbol()
    both = keras.Model(inputs, [kinds.apply(parent, inputs), kinds.apply(child, inputs)])
    alone = keras.Model(inputs, kinds.apply(child, inputs))
    assert len(both.weights) == len(parent.weights)
    both.save(tmp_path / "both.keras")
    alone.save(tmp_path / "alone.keras")
    again, single = keras.saving.load_model(tmp_path / "both.keras"), keras.saving.load_model(tmp_path / "alone.keras")
    assert len(again.weights) == len(both.weights)
    for one, other in zip(again(x), both(x), strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    np.testing.assert_array_equal(numpy(single(x)), outputs(parent, x))
    again.set_weights([w * 0.5 for w in again.get_weights()])
    first, second = again(x)
    np.testing.assert_array_equal(numpy(first), numpy(second))


def dense_parent(rng, units=3, inputs=4, **more):
    parent = layers.Dense(units, name="parent", **more)
    parent.build((None, inputs))
    parent.set_weights([rng.normal(size=w.shape).astype("float32") for w in parent.get_weights()])
    return parent


# --------------------------------------------------------------------------- changes


def test_a_change_is_a_function_a_form_an_expression_a_number_or_an_array(rng):
    parent = dense_parent(rng)
    kernel, bias = map(numpy, parent.weights)
    x = rng.normal(size=(2, 4)).astype("float32")
    other = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="other")
    for change, expected in (
        (lambda w: 3 * w, 3 * kernel),
        (tether.low_rank(2), kernel),
        (other, numpy(other.value)),
        (0.5 * other, 0.5 * numpy(other.value)),
        (np.ones((4, 3), "float32"), np.ones((4, 3))),
        (lambda w: 0.0 * w + other, numpy(other.value)),
    ):
        child = tether.inherit(parent, kernel=change)
        assert_close(child(x), x @ expected + bias)
    child = tether.inherit(parent, {"kernel": tether.forms.scale(), "bias": lambda b: -b})
    assert_close(child(x), x @ kernel - bias)


@pytest.mark.parametrize(
    "change",
    [None, "kernel", object(), lambda w: None, lambda w: "x"],
    ids=["None", "a string", "an object", "returns None", "returns a string"],
)
def test_what_is_no_change_is_refused_and_changes_nothing(rng, change):
    parent = dense_parent(rng)
    before = state(parent)
    with pytest.raises(TetherError, match="function from the parent's expression"):
        tether.inherit(parent, kernel=change)
    assert type(parent) is layers.Dense
    assert state(parent) == before
    assert "inheritance" not in vars(parent)


def test_a_change_that_raises_changes_nothing(rng):
    parent = dense_parent(rng)
    shared = tether.weight_of(parent, "bias")
    uses, before = shared.uses, state(parent)

    def broken(w):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tether.inherit(parent, kernel=broken)
    with pytest.raises(ShapeMismatch):
        tether.inherit(parent, kernel=lambda w: w.T)
    assert shared.uses == uses
    assert state(parent) == before
    assert isinstance(parent.kernel, keras.Variable) and parent.kernel is parent.trainable_weights[0]


def test_patterns_name_the_weights_of_a_model(rng):
    inputs = keras.Input((5, 4))
    x = inputs
    for number in range(2):
        x = layers.MultiHeadAttention(2, 2, name=f"attention_{number}")(x, x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    child = tether.inherit(
        model, {"attention_*/query/kernel": tether.low_rank(1), "head/bias": 0.0 * np.ones(3, "float32")}
    )
    changed = [row.target for row in child.inheritance if row.how.startswith("combined")]
    assert changed == ["attention_0/query/kernel", "attention_1/query/kernel", "head/bias"]
    data = rng.normal(size=(2, 5, 4)).astype("float32")
    assert_close(child.predict(data, verbose=0), model.predict(data, verbose=0))
    with pytest.raises(UnknownName, match="fits the pattern"):
        tether.inherit(model, {"attention_*/no_such": 1.0})
    with pytest.raises(UnknownName, match="head/kernel"):
        tether.inherit(model, {"head/kernal": 1.0})
    later = tether.inherit(model, {"head/*": lambda w: 3 * w, "head/kernel": lambda w: 2 * w})
    assert_close(later.get_layer("head").kernel, 2 * numpy(model.get_layer("head").kernel.value))


# --------------------------------------------------------------------------- what is frozen


def test_a_frozen_parent_and_a_small_part_that_learns(rng):
    parent = dense_parent(rng)
    parent.trainable = False
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(2))
    assert [w.name for w in child.trainable_weights] == ["kernel_lora_a", "kernel_lora_b"]
    assert len(child.non_trainable_weights) == 2
    before = numpy(parent.kernel.value).copy(), numpy(parent.bias.value).copy()
    model = keras.Sequential([keras.Input((4,)), child])
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), "mse")
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=10, verbose=0)
    assert model.evaluate(x, y, verbose=0) < first
    np.testing.assert_array_equal(before[0], numpy(parent.kernel.value))
    np.testing.assert_array_equal(before[1], numpy(parent.bias.value))


def test_only_what_was_frozen_stays_frozen_also_after_a_file(rng, tmp_path):
    inputs = keras.Input((5, 4))
    attention = layers.MultiHeadAttention(2, 2, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.BatchNormalization(name="norm")(attention)))
    model.get_layer("attention").trainable = False
    child = tether.inherit(model, {"attention/query/kernel": tether.low_rank(1)})
    wanted = ["kernel_lora_a", "kernel_lora_b", "gamma", "beta", "kernel", "bias"]
    assert [w.name for w in child.trainable_weights] == wanted
    child.save(tmp_path / "child.keras")
    again = keras.saving.load_model(tmp_path / "child.keras")
    assert [w.name for w in again.trainable_weights] == wanted


def test_without_a_change_a_frozen_child_can_be_thawed(rng):
    parent = dense_parent(rng)
    parent.trainable = False
    child = tether.inherit(parent)
    assert child.trainable_weights == []
    child.trainable = True
    assert len(child.trainable_weights) == 2


def test_copies_of_a_frozen_parent_learn(rng):
    parent = dense_parent(rng)
    parent.trainable = False
    child = tether.inherit(parent, share=["kernel"])
    assert [w.name for w in child.trainable_weights] == ["bias"]
    assert parent.trainable_weights == []


# --------------------------------------------------------------------------- into, share, match, fill


class Renamed(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.matrix = self.add_weight(name="matrix", shape=(shape[-1], self.units))
        self.own = self.add_weight(name="own", shape=(self.units,), initializer="ones")

    def call(self, x):
        return ops.matmul(x, self.matrix) * self.own


class Scaled(layers.Dense):
    def build(self, shape):
        super().build(shape)
        self.own = self.add_weight(name="own", shape=(), initializer="ones")

    def call(self, x):
        return super().call(x) * self.own


def test_into_another_class_by_name(rng):
    parent = dense_parent(rng, activation="tanh")
    x = rng.normal(size=(2, 4)).astype("float32")
    for into in (Scaled(3, activation="tanh"), Scaled):
        child = tether.inherit(parent, into=into)
        assert isinstance(child, Scaled)
        assert_close(child(x), parent(x))
        assert [row.how for row in child.inheritance] == ["shared", "shared", "own"]
        assert len(child.weights) == 3


def test_into_another_class_with_other_names(rng):
    parent = dense_parent(rng)
    child = tether.inherit(parent, into=Renamed(3), match={"matrix": "kernel"})
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(child(x), x @ numpy(parent.kernel.value))
    assert child.inheritance["matrix"].source == "kernel"
    assert child.inheritance.unused == ["bias"]
    with pytest.raises(UnknownName):
        tether.inherit(parent, into=Renamed(3), match={"matrix": "no_such"})


def test_a_change_of_a_weight_of_the_childs_own(rng):
    parent = dense_parent(rng)
    child = tether.inherit(parent, into=Scaled(3), own=lambda w: 2.0 * w)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(child(x), 2 * numpy(parent(x)))


def test_share_names_what_is_shared(rng):
    parent = dense_parent(rng)
    child = tether.inherit(parent, share=["kernel"])
    assert child.weights[0] is parent.weights[0]
    assert child.weights[1] is not parent.weights[1]
    assert [row.how for row in child.inheritance] == ["shared", "copied"]
    with pytest.raises(UnknownName):
        tether.inherit(parent, share=["no_such"])
    for wrong in ("kernel", 3):
        with pytest.raises(TetherError, match="True, False or a list"):
            tether.inherit(parent, share=wrong)


def test_a_copy_with_a_change_starts_at_the_parents_value(rng):
    parent = dense_parent(rng)
    value = numpy(parent.kernel.value)
    x = rng.normal(size=(2, 4)).astype("float32")
    for change in (lambda w: 2.0 * w, lambda w: (w.T).T, tether.low_rank(1)):
        child = tether.inherit(parent, share=False, kernel=change)
        assert_close(child(x), parent(x))
        child.set_weights([w * 0 for w in child.get_weights()])
        np.testing.assert_array_equal(numpy(parent.kernel.value), value)


@pytest.mark.parametrize("rule", ["zeros", "initializer", "mean"])
def test_a_child_of_another_size(rng, rule):
    parent = dense_parent(rng)
    child = tether.inherit(parent, into=layers.Dense(5, bias_initializer="ones"), share=False, fill=rule)
    kernel, bias = (numpy(w) for w in child.weights)
    np.testing.assert_array_equal(kernel[:, :3], numpy(parent.kernel))
    np.testing.assert_array_equal(bias[:3], numpy(parent.bias))
    if rule == "initializer":
        assert np.all(bias[3:] == 1)
    else:
        expected = 0 if rule == "zeros" else np.mean(numpy(parent.bias))
        assert_close(bias[3:], np.full(2, expected))
    assert "3 -> 5" in child.inheritance["bias"].how


def test_another_size_needs_a_rule(rng):
    parent = dense_parent(rng)
    with pytest.raises(ShapeMismatch, match="fill="):
        tether.inherit(parent, into=layers.Dense(5), share=False)
    with pytest.raises(ShapeMismatch, match="share=False"):
        tether.inherit(parent, into=layers.Dense(5))
    with pytest.raises(TetherError, match="fill"):
        tether.inherit(parent, share=False, fill="ones")
    assert type(parent) is layers.Dense


def test_a_parent_that_is_not_built_is_refused():
    with pytest.raises(TetherError, match="build it"):
        tether.inherit(layers.Dense(3))


@pytest.mark.parametrize("into", [3, "Dense", tether.Weight], ids=str)
def test_into_takes_layers(rng, into):
    with pytest.raises(TetherError, match="into"):
        tether.inherit(dense_parent(rng), into=into)


def test_a_child_for_other_inputs_is_built_first(rng):
    parent = dense_parent(rng)
    with pytest.raises(TetherError, match="Build it first"):
        tether.inherit(parent, into=layers.Conv2D(3, 1))


# --------------------------------------------------------------------------- parents that are tied themselves


def tied_parent(rng):
    codec = tether.Weight(rng.normal(size=(4, 3)).astype("float32"), name="codec")
    inputs = keras.Input((4,))
    hidden = tether.tie(layers.Dense(3, name="encode", activation="tanh"), kernel=codec)(inputs)
    return keras.Model(inputs, tether.tie(layers.Dense(4, name="decode"), kernel=codec.T)(hidden)), codec


@pytest.mark.parametrize("share", [True, False])
def test_the_ties_of_a_parent_hold_in_the_child(rng, share):
    parent, codec = tied_parent(rng)
    x = rng.normal(size=(2, 4)).astype("float32")
    y = parent.predict(x, verbose=0)
    child = tether.inherit(parent, share=share)
    assert_close(child.predict(x, verbose=0), y)
    assert len(child.weights) == 3
    child.set_weights([w * 2 for w in child.get_weights()])
    assert_close(child.get_layer("decode").kernel.value, ops.transpose(child.get_layer("encode").kernel.value))
    moved = np.any(parent.predict(x, verbose=0) != y)
    assert moved == share
    assert (child.weights[0] is codec.variable) == share


def test_a_grandchild(rng):
    parent = dense_parent(rng)
    parent.trainable = False
    child = tether.inherit(parent, kernel=tether.low_rank(1))
    grandchild = tether.inherit(child, kernel=lambda w: 0.5 * w + tether.low_rank(1))
    x = rng.normal(size=(2, 4)).astype("float32")
    bias = numpy(parent.bias.value)
    assert_close(grandchild(x), 0.5 * (numpy(child(x)) - bias) + bias)
    assert len(grandchild.weights) == 6
    assert grandchild.kernel.expression.notation().count("parent.kernel") >= 1


def test_gradients_sum_over_parent_and_child(rng):
    parent = dense_parent(rng, use_bias=False)
    child = tether.inherit(parent, kernel=lambda w: 3.0 * w)
    x = rng.normal(size=(2, 4)).astype("float32")
    _, (found,) = gradients(lambda: ops.sum(parent(x)) + ops.sum(child(x)), [parent.weights[0]])
    assert_close(found, np.repeat(4 * x.sum(0)[:, None], 3, axis=1))


# --------------------------------------------------------------------------- forms of the layer


def test_compose_puts_a_matrix_after_the_parents(rng):
    parent = dense_parent(rng)
    child = tether.inherit(parent, tether.forms.compose(2))
    x = rng.normal(size=(5, 4)).astype("float32")
    assert child(x).shape == (5, 2)
    (own,) = [w for w in child.weights if tuple(w.shape) == (3, 2)]
    assert_close(child(x), numpy(parent(x)) @ numpy(own), 1e-4)
    with pytest.raises(Unsupported):
        tether.inherit(dense_parent(rng, activation="relu"), tether.forms.compose(2))
    with pytest.raises(TetherError, match="leave out"):
        tether.inherit(parent, tether.forms.compose(2), share=False)
    with pytest.raises(TetherError, match="leave out"):
        tether.inherit(parent, tether.forms.compose(2), kernel=1.0)


def test_concatenate_puts_own_units_beside_the_parents(rng, tmp_path):
    parent = dense_parent(rng, activation="tanh")
    child = tether.inherit(parent, tether.forms.concatenate(2))
    x = rng.normal(size=(5, 4)).astype("float32")
    assert child.units == 5
    assert_close(child(x)[:, :3], parent(x))
    model = keras.Sequential([keras.Input((4,)), child])
    model.save(tmp_path / "child.keras")
    assert_close(keras.saving.load_model(tmp_path / "child.keras").predict(x, verbose=0), child(x))


def test_a_child_has_a_name(rng):
    parent = dense_parent(rng)
    assert tether.inherit(parent).name.startswith("parent_child")
    assert tether.inherit(parent, name="heir").name == "heir"
    for more in ({"into": layers.Dense(3)}, {}):
        with pytest.raises(TetherError, match="its own name"):
            tether.inherit(parent, *([] if more else [tether.forms.compose(2)]), name="heir", **more)


def test_names_of_a_familys_parts_are_kept_over_a_file(rng, tmp_path):
    import json
    import subprocess
    import sys

    parent = dense_parent(rng)
    parent.trainable = False
    inputs = keras.Input((4,))
    children = [tether.inherit(parent, name=f"child_{n}", kernel=tether.low_rank(1)) for n in range(4)]
    family = keras.Model(inputs, [layer(inputs) for layer in (parent, *children)])
    family.save(tmp_path / "family.keras")
    script = (
        "import json, sys, keras, tether; m = keras.saving.load_model(sys.argv[1]);"
        "print(json.dumps([[w.name, w.path] for w in m.weights]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "family.keras")], capture_output=True, text=True, check=True
    )
    read = json.loads(run.stdout.strip().splitlines()[-1])
    made = [w.path for w in family.weights]
    assert [path for _, path in read] == made
    assert all(path.rpartition("/")[2] == name for name, path in read if "lora" in path)

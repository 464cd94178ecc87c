"""What differs between two models, two files, or a model and a file."""

from dataclasses import replace

import keras
import numpy as np
import pytest

import tether
from tests.inspection import models
from tests.inspection.models import fitted, values
from tether.inspection import Change, Difference, diff, facts

layers = keras.layers


def pair(second=lambda w: w.T, *, dtype="float32", width=4, more=False, frozen=False, kind=layers.Dense):
    """Two layers that share a weight, and what may be otherwise about them."""
    weight = tether.Weight(values(4, 4).astype(dtype), name="w")
    x = keras.Input((4,))
    b = tether.tie(kind(4, name="b"), kernel=second(weight))
    y = b(tether.tie(layers.Dense(4, name="a"), kernel=weight)(x))
    y = layers.Dense(width, name="c")(y)
    y = layers.Dense(2, name="d")(y) if more else y
    b.trainable = not frozen
    return keras.Model(x, y, name="pair")


def said(before, after):
    return str(diff(before, after)).splitlines()


def test_equal_models_do_not_differ():
    found = diff(pair(), pair())
    assert not found and found == Difference(()) and str(found) == "no difference"


def test_a_weight_that_is_added():
    assert said(pair(), pair(more=True)) == ["+ weight layers/dense_3/vars/0", "+ weight layers/dense_3/vars/1"]
    assert said(pair(more=True), pair()) == ["- weight layers/dense_3/vars/0", "- weight layers/dense_3/vars/1"]
    assert diff(pair(), pair(more=True)).changes[0] == Change("weight", "layers/dense_3/vars/0", "present", None, True)


def test_an_expression_that_is_another():
    assert said(pair(), pair(lambda w: 2 * w)) == ["~ use b/kernel: expression 'w.T' -> '2 * w'"]


def test_a_use_that_is_frozen():
    (bias, use) = diff(pair(), pair(frozen=True)).changes
    assert (use.what, use.where, use.fact, use.before, use.after) == ("use", "b/kernel", "trains", True, False)
    assert (bias.where, bias.fact, bias.after) == ("layers/dense_1/vars/1", "trainable", False)


def test_a_use_under_stop_gradient():
    changed = {
        change.fact: (change.before, change.after)
        for change in diff(pair(), pair(lambda w: w.T.stop_gradient())).changes
    }
    assert changed == {"expression": ("w.T", "w.T.stop_gradient()"), "trains": (True, False)}


def test_a_dtype_and_a_shape_that_are_others():
    assert said(pair(), pair(dtype="float16")) == [
        "~ weight layers/dense/_tether_weights/weight/vars/0: dtype 'float32' -> 'float16'"
    ]
    assert said(pair(), pair(width=5)) == [
        "~ weight layers/dense_2/vars/0: shape (4, 4) -> (4, 5)",
        "~ weight layers/dense_2/vars/1: shape (4,) -> (5,)",
    ]


@keras.saving.register_keras_serializable(models.PACKAGE)
class Thick(layers.Dense):
    pass


def test_a_class_that_is_another():
    found = diff(pair(), pair(kind=Thick))
    assert [str(change) for change in found.changes if change.fact == "kind"] == [
        "~ use b/kernel: kind 'Dense' -> 'Thick'"
    ]


def test_a_tie_that_is_gone():
    def untied():
        model = pair()
        tether.untie(model.get_layer("b"), "kernel")
        return model

    found = said(pair(), untied())
    assert "- use b/kernel" in found and "+ weight layers/dense_1/vars/0" in found and len(found) == 2


def test_what_an_optimizer_keeps():
    adam, momentum = fitted(pair(), "adam"), fitted(pair(), keras.optimizers.SGD(0.1, momentum=0.9))
    found = diff(adam, momentum)
    assert {change.what for change in found.changes} == {"optimizer"} and found
    assert not diff(adam, pair())  # one that has no optimizer says nothing of it


def test_a_file_that_tells_of_no_ties_does_not_differ_in_them(tmp_path):
    layer = layers.Dense(4, name="a")
    layer.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save_weights(tmp_path / "m.weights.h5")
    assert not facts(tmp_path / "m.weights.h5").ties
    before = facts(model)
    after = replace(before, uses=tuple(replace(use, tied=True, expression="w") for use in before.uses))
    assert diff(before, after) and not diff(after, tmp_path / "m.weights.h5")


def test_ties_whose_attributes_a_file_does_not_tell_are_compared_by_their_number(tmp_path):
    pair(lambda w: 2 * w).save_weights(tmp_path / "m.weights.h5")
    assert not diff(pair(lambda w: 2 * w), tmp_path / "m.weights.h5")
    assert said(pair(), tmp_path / "m.weights.h5") == ["~ use b/kernel: expression 'w.T' -> '2 * w'"]
    assert said(tmp_path / "m.weights.h5", pair()) == ["~ use b/kernel: expression '2 * w' -> 'w.T'"]


def test_layers_of_one_name_are_told_apart():
    class Twins(layers.Layer):
        def __init__(self, scale):
            super().__init__(name="twins")
            self.weight = tether.Weight(values(4, 4), name="w")
            self.one = tether.tie(layers.Dense(4, use_bias=False, name="twin"), kernel=self.weight)
            self.two = tether.tie(layers.Dense(4, use_bias=False, name="twin"), kernel=scale * self.weight)
            self.one.build((None, 4))
            self.two.build((None, 4))

    assert not diff(Twins(2), Twins(2))
    assert said(Twins(2), Twins(3)) == ["~ use twin/kernel (2): expression '2 * w' -> '3 * w'"]


def test_facts_may_be_compared_by_themselves():
    before = facts(pair())
    assert not diff(before, pair()) and diff(before, facts(pair(more=True)))


@pytest.mark.parametrize("sides", [(None, 3), (np.zeros(3), "missing.keras")], ids=repr)
def test_of_anything_else_there_is_no_difference(sides):
    with pytest.raises((tether.TetherError, FileNotFoundError)):
        diff(*sides)

"""The table of the kinds of layers."""

import keras
import pytest

from tether.kinds import KINDS, Kind, kind_of
from tether.layers.appliers import APPLIERS

layers = keras.layers


class Plain(layers.Dense):
    """A Dense that computes as one."""


class Other(layers.Dense):
    """A Dense with a call of its own."""

    def call(self, inputs, training=None):
        return super().call(inputs, training=training) + 1


def test_every_applier_serves_a_kind_and_every_kind_names_one_that_is_there():
    assert {kind.applier for kind in KINDS.values()} - {""} == set(APPLIERS)


def test_a_subclass_is_of_the_kind_of_the_nearest_class():
    assert kind_of(Plain) is kind_of(Plain, "call") is KINDS[layers.Dense]
    assert kind_of(layers.ReversibleEmbedding, "call") is not KINDS[layers.Embedding]
    assert kind_of(layers.PReLU) == Kind()


def test_a_method_of_its_own_makes_it_another_kind_for_what_depends_on_that_method():
    assert kind_of(Other, "call") == Kind()
    assert kind_of(Other, "build") is kind_of(Other) is KINDS[layers.Dense]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: layers.Dense(3), (None, 4)),
        (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e"), (None, 5, 4)),
        (lambda: layers.ReversibleEmbedding(5, 3, tie_weights=False), (None, 4)),
        (lambda: layers.Conv2D(3, 2), (None, 5, 5, 2)),
        (lambda: layers.Conv1DTranspose(3, 2), (None, 5, 2)),
    ],
)
def test_a_weight_has_as_many_axes_as_the_table_says(make, shape):
    layer = make()
    layer.build(shape)
    found = {variable.name: len(variable.shape) for variable in layer.weights}
    assert found == {name: len(axes) for name, axes in kind_of(type(layer)).of(layer).axes.items()}

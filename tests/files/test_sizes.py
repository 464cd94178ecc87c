"""The sizes of layers."""

import keras
import pytest

from tether.errors import Unsupported
from tether.layers.resize import sizes_of

layers = keras.layers


class Upwards(layers.Conv2DTranspose):
    """A transposed convolution whose name does not say so."""


LAYERS = [
    (lambda: layers.Dense(3), (None, 4)),
    (lambda: layers.Embedding(5, 3), (None, 4)),
    (lambda: layers.ReversibleEmbedding(5, 3, tie_weights=False), (None, 4)),
    (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (None, 2, 4)),
    (lambda: layers.EinsumDense("abc,bcd->abd", (2, 5), bias_axes="bd"), (None, 2, 4)),
    (lambda: layers.Conv1D(3, 2), (None, 5, 2)),
    (lambda: layers.Conv2D(3, 2), (None, 5, 5, 2)),
    (lambda: layers.Conv2DTranspose(3, 2), (None, 5, 5, 2)),
    (lambda: Upwards(3, 2), (None, 5, 5, 2)),
    (lambda: layers.Conv2D(3, 2, data_format="channels_first"), (None, 2, 5, 5)),
    (lambda: layers.Conv3D(3, 2), (None, 5, 5, 5, 2)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_axes_of_one_size_agree_and_a_setting_follows(make, shape):
    """With a setting changed, a layer of the same config has weights of the new size on just these axes."""
    layer = make()
    layer.build(shape)
    names = {variable.name: tuple(variable.shape) for variable in layer.weights}
    for place, size in enumerate(sizes_of(layer)):
        found = {names[name][axis] for name, axis in size.axes if name in names}
        assert len(found) == 1
        undo = []
        size.set(found.pop() + 2, undo)
        other = type(layer).from_config(layer.get_config())
        build = layer.get_build_config()
        other.build(tuple(build["input_shape"]) if build and build.get("input_shape") else shape)
        changed = {variable.name: tuple(variable.shape) for variable in other.weights}
        for name, before in names.items():
            grown = {axis for wanted, axis in size.axes if wanted == name}
            expected = tuple(n + 2 if axis in grown else n for axis, n in enumerate(before))
            assert changed[name] == expected, (place, name)
        for step in reversed(undo):
            step()
        assert layer.get_config() == make_again(layer).get_config() and layer.get_build_config() is not None


def make_again(layer):
    return type(layer).from_config(layer.get_config())


class Other(layers.Dense):
    """A Dense that makes its weights in its own way."""

    def build(self, shape):
        super().build(shape)


def test_a_class_that_builds_otherwise_has_no_known_sizes():
    with pytest.raises(Unsupported, match="Other does not say"):
        sizes_of(Other(3))
    with pytest.raises(Unsupported, match="LayerNormalization"):
        sizes_of(layers.LayerNormalization())
    with pytest.raises(Unsupported, match="ellipsis"):
        sizes_of(layers.EinsumDense("...x,xy->...y", 3))


def test_a_convolution_with_groups_has_none():
    layer = layers.Conv1D(4, 2, groups=2)
    layer.build((None, 5, 2))
    assert sizes_of(layer) == []


def test_a_layer_with_keras_lora_has_none():
    layer = layers.Dense(3)
    layer.build((None, 4))
    layer.enable_lora(2)
    with pytest.raises(Unsupported, match="LoRA"):
        sizes_of(layer)

"""A layer that Tether has never heard of: nothing in it is written for Tether."""

import keras
import numpy as np
import pytest

import tether
from tests import support


@keras.saving.register_keras_serializable("tether_unseen")
class Gate(keras.layers.Layer):
    """A sub-layer with a weight of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape):
        self.amount = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gate_amount")

    def call(self, x):
        return x * keras.ops.sigmoid(self.amount)


@keras.saving.register_keras_serializable("tether_unseen")
class Mixer(keras.layers.Layer):
    """Three weights and a sub-layer. Attributes and variables have other names than each other."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.gate = Gate(name="the_gate")
        self.offset = self.add_weight(shape=(units,), initializer="zeros", name="made_in_init")

    def build(self, input_shape):
        self.left = self.add_weight(shape=(input_shape[-1], self.units), name="left_matrix")
        self.right = self.add_weight(shape=(self.units, self.units), name="right_matrix")
        self.gate.build((*input_shape[:-1], self.units))

    def call(self, x):
        return self.gate(keras.ops.tanh(x @ self.left) @ self.right + self.offset)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tether_unseen")
class Stack(keras.layers.Layer):
    """Weights in a list, in a dict, and in a dict of lists."""

    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth

    def build(self, input_shape):
        width = input_shape[-1]
        self.kernels = [self.add_weight(shape=(width, width), name=f"kernel_{i}") for i in range(self.depth)]
        self.extra = {"scale": self.add_weight(shape=(width,), initializer="ones", name="the_scale")}
        self.nested = {"shifts": [self.add_weight(shape=(width,), name="shift") for _ in range(2)]}

    def call(self, x):
        for kernel in self.kernels:
            x = keras.ops.tanh(x @ kernel)
        return x * self.extra["scale"] + self.nested["shifts"][0] - self.nested["shifts"][1]

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


@keras.saving.register_keras_serializable("tether_unseen")
class ByHand(keras.layers.Layer):
    """Variables made by hand in `__init__`, not asked of the layer."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.matrix = keras.Variable(np.eye(width, dtype="float32") * 2, name="by_hand")
        self.unnamed = keras.Variable(np.ones(width, "float32"))

    def call(self, x):
        return x @ self.matrix + self.unnamed

    def get_config(self):
        return {**super().get_config(), "width": self.width}


X = np.random.default_rng(4).normal(size=(5, 4)).astype("float32")
MAKE = {"Mixer": lambda: Mixer(4), "Stack": lambda: Stack(), "ByHand": lambda: ByHand(4)}

NAMES = [
    ("Mixer", "left", "left"),
    ("Mixer", "left_matrix", "left"),
    ("Mixer", "right", "right"),
    ("Mixer", "right_matrix", "right"),
    ("Mixer", "offset", "offset"),
    ("Mixer", "made_in_init", "offset"),
    ("Mixer", "gate/amount", "gate.amount"),
    ("Mixer", "gate/gate_amount", "gate.amount"),
    ("Mixer", "the_gate/gate_amount", "gate.amount"),
    ("Stack", "kernel_0", "kernels.0"),
    ("Stack", "kernels/0", "kernels.0"),
    ("Stack", "kernels/1", "kernels.1"),
    ("Stack", "extra/scale", "extra.scale"),
    ("Stack", "the_scale", "extra.scale"),
    ("Stack", "nested/shifts/0", "nested.shifts.0"),
    ("Stack", "nested/shifts/1", "nested.shifts.1"),
    ("ByHand", "matrix", "matrix"),
    ("ByHand", "by_hand", "matrix"),
    ("ByHand", "unnamed", "unnamed"),
]


def held(layer, place):
    """The variable that the layer itself reads."""
    value = layer
    for step in place.split("."):
        value = value[int(step)] if step.isdigit() else value[step] if isinstance(value, dict) else getattr(value, step)
    return value


def tied(kind, name, expression, when):
    layer = MAKE[kind]()
    if when == "after":
        layer(X)
    tether.tie(layer, {name: expression})
    layer(X)
    return layer


def randomised(layer, seed=0):
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.normal(size=v.shape).astype("float32") for v in layer.weights])
    return layer


def weight_of(layer, place):
    (weight,) = held(layer, place).expression.weights_used()
    return weight


@pytest.mark.parametrize("form", ["weight", "expression"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name", "place"), NAMES)
def test_ties_like_any_layer(kind, name, place, when, form, tmp_path):
    plain = MAKE[kind]()
    plain(X)
    randomised(plain)
    wanted = plain.get_weights()
    weight = tether.Weight(name="tied")
    expression = weight if form == "weight" else 1.0 * weight
    first, second = (tied(kind, name, expression, when) for _ in range(2))
    for layer in (first, second):
        assert isinstance(layer, type(plain))
        layer.set_weights(wanted)
        for mine, theirs in zip(layer.get_weights(), wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        support.assert_close(layer(X), plain(X), 1e-6)
        assert layer.count_params() == plain.count_params()
        assert weight_of(layer, place) is weight
    support.assert_close(weight.value, held(plain, place).value, 0)

    # It learns: the gradient is the sum over both uses.
    _, (found,) = support.gradients(lambda: keras.ops.sum(first(X)) + keras.ops.sum(second(X)), [weight.variable])
    _, (once,) = support.gradients(lambda: keras.ops.sum(plain(X)), [held(plain, place)])
    support.assert_close(found, 2 * once, 1e-5)

    # It survives.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [first(inputs), second(inputs)])
    assert model.count_params() == 2 * plain.count_params() - int(np.prod(weight.shape))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for copy in (loaded, clone):
        ours, theirs = (copy.get_layer(layer.name) for layer in (first, second))
        assert weight_of(ours, place) is weight_of(theirs, place)
        assert weight_of(ours, place) is not weight
        assert copy.count_params() == model.count_params()
        support.assert_close(copy(X)[0], plain(X), 1e-6)
        support.assert_close(copy(X)[1], plain(X), 1e-6)


@pytest.mark.parametrize("kind", MAKE)
def test_unties_to_the_plain_layer(kind):
    places = {place: name for k, name, place in NAMES if k == kind}
    layer = randomised(MAKE[kind]() if kind == "ByHand" else _built(MAKE[kind]()))
    wanted, order = support.numpy(layer(X)), [tuple(v.shape) for v in layer.weights]
    names = [v.name for v in layer.weights]
    for name in places.values():
        tether.tie(layer, {name: tether.Weight()})
    support.assert_close(layer(X), wanted, 1e-6)
    tether.untie(layer)
    assert type(layer) is type(MAKE[kind]())
    support.assert_close(layer(X), wanted, 1e-6)
    assert [tuple(v.shape) for v in layer.weights] == order
    assert [v.name for v in layer.weights] == names


def _built(layer):
    layer(X)
    return layer


@pytest.mark.parametrize("when", ["before", "after"])
def test_two_weights_of_one_name_are_told_apart_by_place(when):
    layer = Stack() if when == "before" else _built(Stack())
    with pytest.raises(tether.TetherError, match="ambiguous") as caught:
        tether.tie(layer, shift=tether.Weight())
        layer(X)
    assert "nested/shifts/0" in str(caught.value)
    assert "nested/shifts/1" in str(caught.value)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_name_that_nothing_has_is_refused(when):
    layer = Mixer(4)
    if when == "after":
        layer(X)
    with pytest.raises(tether.TetherError, match="no weight 'lefd'") as caught:
        tether.tie(layer, lefd=tether.Weight())
        layer(X)
    assert "left" in str(caught.value)


def test_all_at_once_trains_like_one_layer_used_twice(tmp_path):
    """Three weights and the sub-layer's, tied between two layers: the same as the layer itself used twice."""
    names = ["left", "right", "offset", "gate/amount"]
    weights = {name: tether.Weight() for name in names}
    first, second = (tether.tie(Mixer(4, name=name), weights) for name in ("first", "second"))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, second(first(inputs)))
    once = Mixer(4, name="once")
    reused = keras.Model(inputs, once(once(inputs)))
    assert model.count_params() == reused.count_params()
    randomised(first, 3)
    once.set_weights(first.get_weights())
    for trained in (model, reused):
        trained.compile(keras.optimizers.Adam(0.05), "mse")
        trained.fit(X, X, epochs=3, batch_size=5, verbose=0, shuffle=False)
    support.assert_close(model(X), reused(X), 1e-4)
    for mine, theirs in zip(first.get_weights(), once.get_weights(), strict=True):
        support.assert_close(mine, theirs, 1e-4)
    for mine, theirs in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert support.slot_count(model.optimizer) == support.slot_count(reused.optimizer)

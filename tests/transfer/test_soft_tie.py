"""A penalty that keeps two weights close: its value, its gradient, its life."""

import copy

import keras
import numpy as np
import pytest
from keras import layers

import tether
from tests.support import as_zero, assert_close, gradients, numpy
from tether import keras_seam
from tether.errors import InvalidConfig, LostTie, ShapeMismatch, TetherError, UnboundArgument, UnknownName


def two_dense(shape="functional"):
    one, two = layers.Dense(3, name="one"), layers.Dense(3, name="two")
    if shape == "sequential":
        return keras.Sequential([keras.Input((3,)), one, two])
    if shape == "nested":
        inner = keras.Sequential([keras.Input((3,)), one, two], name="inner")
        x = keras.Input((3,))
        return keras.Model(x, inner(x))
    x = keras.Input((3,))
    return keras.Model(x, two(one(x)))


PREFIX = {"functional": "", "sequential": "", "nested": "inner/"}


def kernels(model):
    found = {layer.name: layer for layer in keras_seam.contained_layers(model)}
    return tuple(tether.weight_of(found[name], "kernel").variable for name in ("one", "two"))


def penalty(model, strength=0.5):
    a, b = map(numpy, kernels(model))
    return strength * np.sum((a - b) ** 2)


def total(model):
    return sum(float(numpy(loss)) for loss in model.losses)


@pytest.mark.parametrize("shape", PREFIX)
def test_the_penalty_is_among_the_losses_once(shape):
    model = two_dense(shape)
    tether.transfer.soft_tie(model, f"{PREFIX[shape]}one/kernel", f"{PREFIX[shape]}two/kernel", 0.5)
    assert len(model.losses) == 1
    np.testing.assert_allclose(total(model), penalty(model), rtol=1e-5)


def test_a_nested_model_counts_it_once_however_often_it_is_used():
    inner = two_dense()
    tether.transfer.soft_tie(inner, "one/kernel", "two/kernel", 0.5)
    x = keras.Input((3,))
    outer = keras.Model(x, inner(inner(x)))
    assert len(inner.losses) == len(outer.losses) == 1
    np.testing.assert_allclose(total(outer), penalty(inner), rtol=1e-5)
    outermost = keras.Sequential([keras.Input((3,)), outer, inner])
    np.testing.assert_allclose(total(outermost), penalty(inner), rtol=1e-5)


class Custom(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = layers.Dense(3, name="one"), layers.Dense(3, name="two")

    def build(self, input_shape):
        self.one.build(input_shape)
        self.two.build(input_shape)

    def call(self, x):
        return self.two(self.one(x))

    def get_config(self):
        return {"name": self.name}


def test_a_model_of_ones_own_is_asked_itself():
    model = Custom()
    model.build((None, 3))
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    assert isinstance(model, Custom) and len(model.losses) == 1
    np.testing.assert_allclose(total(model), penalty(model), rtol=1e-5)
    x = keras.Input((3,))
    np.testing.assert_allclose(total(keras.Model(x, model(x))), penalty(model), rtol=1e-5)


def test_the_gradient_flows_to_both_sides():
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    a, b = kernels(model)
    loss, (to_a, to_b) = gradients(lambda: model.losses[0], [a, b])
    assert_close(to_a, numpy(a) - numpy(b))
    assert_close(to_b, numpy(b) - numpy(a))
    np.testing.assert_allclose(loss, penalty(model), rtol=1e-5)


def test_a_side_under_stop_gradient_is_not_pulled():
    model = two_dense()
    table = tether.weight_of(model, "one/kernel")
    tether.transfer.soft_tie(model, table.stop_gradient(), "two/kernel", 1.0)
    a, b = kernels(model)
    _, (to_a, to_b) = gradients(lambda: model.losses[0], [a, b])
    assert_close(as_zero(to_a, (3, 3)), np.zeros((3, 3)))
    assert_close(to_b, 2 * (numpy(b) - numpy(a)))


def test_a_transpose_and_an_array_are_sides_too(rng):
    i = keras.Input((4,))
    encode, decode = layers.Dense(2, name="encode"), layers.Dense(4, name="decode")
    model = keras.Model(i, decode(encode(i)))
    tether.transfer.soft_tie(model, "encode/kernel", tether.weight_of(model, "decode/kernel").T, 2.0)
    a, b = numpy(encode.kernel), numpy(decode.kernel)
    np.testing.assert_allclose(total(model), 2 * np.sum((a - b.T) ** 2), rtol=1e-5)
    prior = rng.normal(size=(4, 2)).astype("float32")
    tether.transfer.soft_tie(model, "encode/kernel", prior, 3.0)
    np.testing.assert_allclose(total(model), 2 * np.sum((a - b.T) ** 2) + 3 * np.sum((a - prior) ** 2), rtol=1e-5)


def trained(model, x, y, steps=3, rate=0.1):
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, y, batch_size=len(x), epochs=steps, shuffle=False, verbose=0)


def reference(A, a, B, b, x, y, strength, steps, rate=0.1):
    """Two linear layers under mean squared error and a soft tie of their kernels, by hand."""
    for _ in range(steps):
        h = x @ A + a
        d = 2 * (h @ B + b - y) / y.size
        dA, dB = x.T @ (d @ B.T) + 2 * strength * (A - B), h.T @ d + 2 * strength * (B - A)
        A, a, B, b = A - rate * dA, a - rate * (d @ B.T).sum(0), B - rate * dB, b - rate * d.sum(0)
    return A, a, B, b


@pytest.mark.parametrize("shape", PREFIX)
@pytest.mark.parametrize("come_back", ["as it is", "clone", "load"])
def test_fit_pulls_as_the_formula_says(shape, come_back, rng, tmp_path):
    model = two_dense(shape)
    tether.transfer.soft_tie(model, f"{PREFIX[shape]}one/kernel", f"{PREFIX[shape]}two/kernel", 0.4)
    if come_back == "clone":
        values = model.get_weights()
        model = keras.models.clone_model(model)
        model.set_weights(values)
    if come_back == "load":
        model.save(tmp_path / "m.keras")
        model = keras.saving.load_model(tmp_path / "m.keras")
    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 3)).astype("float32")
    expected = reference(*model.get_weights(), x, y, 0.4, steps=3)
    trained(model, x, y)
    for found, wanted in zip(model.get_weights(), expected, strict=True):
        assert_close(found, wanted, 1e-4)


def test_the_penalty_of_a_clone_is_of_the_clone(rng):
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    clone = keras.models.clone_model(model)
    before = total(model)
    clone.set_weights([np.zeros_like(w) for w in clone.get_weights()])
    assert total(clone) == 0.0 and total(model) == before > 0
    twice = keras.models.clone_model(clone)
    twice.set_weights(model.get_weights())
    np.testing.assert_allclose(total(twice), before, rtol=1e-5)


def test_it_survives_a_recursive_clone_a_deep_copy_and_a_custom_model(tmp_path):
    model = two_dense("nested")
    tether.transfer.soft_tie(model, "inner/one/kernel", "inner/two/kernel", 0.5)
    clone = keras.models.clone_model(
        model, recursive=True, clone_function=lambda layer: type(layer).from_config(layer.get_config())
    )
    np.testing.assert_allclose(total(clone), penalty(clone), rtol=1e-5)
    flat = two_dense()
    tether.transfer.soft_tie(flat, "one/kernel", "two/kernel", 0.5)
    twin = copy.deepcopy(flat)
    np.testing.assert_allclose(total(twin), total(flat), rtol=1e-6)
    kernels(twin)[0].assign(kernels(twin)[1])
    assert total(twin) == 0.0 and total(flat) > 0

    custom = Custom()
    custom.build((None, 3))
    tether.transfer.soft_tie(custom, "one/kernel", "two/kernel", 0.5)
    custom.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"Custom": Custom})
    assert len(loaded.losses) == 1
    np.testing.assert_allclose(total(loaded), total(custom), rtol=1e-6)


class OwnConstructor(keras.Model):
    """A functional model whose config is not made of its layers' configs."""

    def __init__(self, units=3, **kwargs):
        x = keras.Input((3,))
        super().__init__(x, layers.Dense(3, name="two")(layers.Dense(units, name="one")(x)), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units, "name": self.name}


def test_a_functional_model_with_a_constructor_of_its_own_keeps_it_in_files_and_clones(tmp_path):
    model = OwnConstructor()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    assert len(model.losses) == 1
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"OwnConstructor": OwnConstructor})
    assert len(loaded.losses) == 1
    np.testing.assert_allclose(total(loaded), total(model), rtol=1e-6)
    clone = keras.models.clone_model(model)
    assert len(clone.losses) == 1
    np.testing.assert_allclose(total(clone), penalty(clone), rtol=1e-5)


class MadeSoft(Custom):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        tether.transfer.soft_tie(self, "one/kernel", "two/kernel", 0.5)


def test_one_that_a_constructor_makes_is_not_doubled_by_a_file(tmp_path):
    model = MadeSoft()
    model.build((None, 3))
    np.testing.assert_allclose(total(model), penalty(model), rtol=1e-5)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"MadeSoft": MadeSoft})
    np.testing.assert_allclose(total(loaded), total(model), rtol=1e-6)


def test_a_file_that_would_lose_it_is_not_written(tmp_path):
    class Holder(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.body = two_dense()

        def call(self, x):
            return self.body(x)

        def get_config(self):
            return {"name": self.name}

    model = Holder()
    model(np.zeros((1, 3), "float32"))
    prior = np.zeros((3, 3), "float32")
    tether.transfer.soft_tie(model.body, "one/kernel", prior, 0.5)
    with pytest.raises(LostTie):
        model.save(tmp_path / "m.keras")


class Bilinear(layers.Layer):
    def __init__(self, table=None, **kwargs):
        super().__init__(**kwargs)
        self.table = tether.Weight((3, 3), "glorot_uniform", name="table") if table is None else table

    def call(self, x):
        return x @ self.table.value


class Written(Bilinear):
    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "table": keras.saving.deserialize_keras_object(config["table"])})


def test_a_weight_that_an_attribute_holds_is_saved_with_it_or_refused(tmp_path):
    for cls in (Bilinear, Written):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="one"), cls(name="two")])
        tether.transfer.soft_tie(model, "one/kernel", model.get_layer("two").table, 0.5)
        assert len(model.losses) == 1 and len(model.weights) == 3
        if cls is Bilinear:
            with pytest.raises(LostTie, match="'table'"):
                model.save(tmp_path / "m.keras")
            assert keras.models.clone_model(model).losses == []
            continue
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects={"Written": Written})
        np.testing.assert_allclose(total(loaded), total(model), rtol=1e-6)
        loaded.layers[0].kernel.assign(loaded.layers[1].table.numpy())
        assert total(loaded) == 0.0 and len(loaded.weights) == 3


def test_a_layer_that_comes_alone_out_of_a_clone_has_no_penalty():
    one, two = (tether.Weight((3, 3), "glorot_uniform", name=name) for name in ("one", "two"))
    pair = [tether.tie(layers.Dense(3, name=weight.name), kernel=weight) for weight in (one, two)]
    model = keras.Sequential([keras.Input((3,)), *pair])
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    assert len(pair[0].losses) == 1
    alone = type(pair[0]).from_config(pair[0].get_config())
    alone.build((None, 3))
    assert alone.losses == []


def test_before_the_layers_are_built():
    model = keras.Sequential([layers.Dense(3, name="one"), layers.Dense(3, name="two")])
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    assert model.losses == []
    model.build((None, 3))
    np.testing.assert_allclose(total(model), penalty(model), rtol=1e-5)


def test_a_strength_that_is_a_weight_makes_a_schedule_and_does_not_train(rng, tmp_path):
    model = two_dense()
    strength = tether.Weight(np.array(0.25, "float32"), name="strength")
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", strength)
    assert not strength.trainable and any(v is strength.variable for v in model.non_trainable_variables)
    np.testing.assert_allclose(total(model), penalty(model, 0.25), rtol=1e-5)

    class Schedule(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            strength.assign(np.float32(0.1 * (epoch + 1)))

    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 3)).astype("float32")
    layers_first = [numpy(v).copy() for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[Schedule()])
    expected = layers_first
    for epoch in range(3):
        expected = reference(*expected, x, y, 0.1 * (epoch + 1), steps=1)
    for found, wanted in zip(model.trainable_variables, expected, strict=True):
        assert_close(found, wanted, 1e-4)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(total(loaded), penalty(model, 0.3), rtol=1e-5)
    (soft,) = tether.transfer.soft_ties(loaded)
    soft.remove()
    assert len(loaded.weights) == 4


def test_a_weight_of_the_penalty_alone_learns_and_is_frozen_with_its_layer(rng):
    """A common mean of two layers, which no layer computes with."""
    model = two_dense()
    mean = tether.Weight(rng.normal(size=(3, 3)).astype("float32"), name="mean")
    for side in ("one/kernel", "two/kernel"):
        tether.transfer.soft_tie(model, side, mean, 0.5)
    assert mean.trainable and len(model.trainable_variables) == 5
    a, b = kernels(model)
    _, (found,) = gradients(lambda: sum(model.losses), [mean.variable])
    assert_close(found, 2 * mean.numpy() - numpy(a) - numpy(b))
    model.trainable = False
    assert not mean.trainable and model.trainable_variables == []
    model.trainable = True
    assert len(model.trainable_variables) == 5


def test_it_makes_no_frozen_weight_train():
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    model.get_layer("one").trainable = False
    assert len(model.trainable_variables) == 2


def test_remove_ends_it_and_a_second_time_does_nothing(rng):
    model = two_dense()
    soft = tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    other = tether.transfer.soft_tie(model, "one/bias", "two/bias", 1.0)
    np.testing.assert_allclose(float(numpy(soft.value)), penalty(model), rtol=1e-5)
    assert soft.a.shape == soft.b.shape == (3, 3) and "sum(" in repr(soft)
    soft.remove()
    soft.remove()
    assert len(model.losses) == 1 and total(model) == 0.0
    other.remove()
    assert model.losses == [] and tether.transfer.soft_ties(model) == []


def test_untie_and_materialize_end_it(tmp_path):
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    plain = tether.materialize(model)
    assert plain.losses == [] and {type(layer) for layer in plain.layers[1:]} == {layers.Dense}
    assert len(model.losses) == 1
    tether.untie(model.get_layer("two"))
    assert model.losses == []
    tether.untie(model)
    assert {type(layer) for layer in model.layers[1:]} == {layers.Dense}


def test_a_change_after_fit_takes_effect_at_the_next_step(rng):
    model, x = two_dense(), rng.normal(size=(4, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, x, verbose=0)
    softs = []
    for change in (
        lambda: softs.append(tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)),
        lambda: softs[0].remove(),
    ):
        change()
        twin = copy.deepcopy(model)
        twin.compile(keras.optimizers.SGD(0.1), "mse")
        losses = [one.train_on_batch(x, x) for one in (model, twin)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        for mine, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_16_bit_weights_are_compared_in_float32():
    keras.config.set_dtype_policy("bfloat16")
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 1.0)
    a, b = (numpy(v).astype("float64") for v in kernels(model))
    assert keras.backend.standardize_dtype(model.losses[0].dtype) == "float32"
    np.testing.assert_allclose(total(model), np.sum((a - b) ** 2), rtol=1e-5)


def test_errors_say_what_is_wrong_and_change_nothing():
    i = keras.Input((4,))
    model = keras.Model(i, layers.Dense(4, name="decode")(layers.Dense(2, name="encode")(i)))
    soft_tie = tether.transfer.soft_tie
    with pytest.raises(ShapeMismatch, match=r"\(4, 2\).*\(2, 4\).*\.T"):
        soft_tie(model, "encode/kernel", "decode/kernel", 1.0)
    with pytest.raises(ShapeMismatch, match=r"\(4, 2\).*\(4,\)"):
        soft_tie(model, "encode/kernel", np.zeros(4, "float32"), 1.0)
    with pytest.raises(UnknownName, match="kernle"):
        soft_tie(model, "encode/kernle", "decode/kernel", 1.0)
    with pytest.raises(TetherError, match="the same weight"):
        soft_tie(model, "encode/kernel", "layers/1/kernel", 1.0)
    for strength in (-1.0, float("nan")):
        with pytest.raises(TetherError, match="0 or more"):
            soft_tie(model, "encode/bias", np.zeros(2, "float32"), strength)
    with pytest.raises(ShapeMismatch, match="one number"):
        soft_tie(model, "encode/bias", np.zeros(2, "float32"), np.ones(2, "float32"))
    with pytest.raises(TetherError, match="strength"):
        soft_tie(model, "encode/bias", np.zeros(2, "float32"), "decode/bias")
    with pytest.raises(TetherError, match="Neither side"):
        soft_tie(model, np.zeros(2, "float32"), np.ones(2, "float32"), 1.0)
    with pytest.raises(TetherError, match="floating-point"):
        soft_tie(model, np.zeros(2, "int32"), np.ones(2, "int32"), 1.0)
    with pytest.raises(UnboundArgument, match="'by'"):
        soft_tie(model, "encode/bias", np.zeros(2, "float32"), tether.weights.Argument("by", default=1.0))
    with pytest.raises(TetherError, match="Keras layer"):
        soft_tie("model", "a", "b", 1.0)
    assert model.losses == [] and {type(layer) for layer in model.layers[1:]} == {layers.Dense}


def test_a_tied_weight_and_its_own_tie_cannot_be_kept_close():
    model = two_dense()
    table = tether.weight_of(model, "one/kernel")
    tether.tie(model.get_layer("two"), kernel=table)
    with pytest.raises(TetherError, match="the same on both sides"):
        tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 1.0)


def broken(entry):
    return [
        "no list",
        [3],
        [{}],
        [{**entry, "more": 1}],
        [{**entry, "owned": ["unknown"]}],
        [{**entry, "owned": 1}],
        [{**entry, "strength": [{"number": -1}]}],
        [{**entry, "strength": [{"number": True}]}],
        [{**entry, "a": entry["b"]}],
        [{**entry, "a": []}],
        [{**entry, "a": [{"weight": "unknown"}]}],
        [{**entry, "a": [{"number": 1.0}]}],
        [{**entry, "strength": [{"argument": {"name": "s", "shape": [], "dtype": "float32"}}]}],
    ]


@pytest.mark.parametrize("case", range(13))
def test_a_strangers_record_is_refused(case):
    model = two_dense()
    tether.transfer.soft_tie(model, "one/kernel", "two/kernel", 0.5)
    layer = model.get_layer("one")
    config = layer.get_config()
    (entry,) = config["tether"]["penalties"]
    assert len(type(layer).from_config(layer.get_config()).get_config()["tether"]["penalties"]) == 1
    config["tether"]["penalties"] = broken(entry)[case]
    with pytest.raises(InvalidConfig):
        type(layer).from_config(config)

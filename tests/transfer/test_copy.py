"""True copies of values, by name."""

import keras
import numpy as np
import pytest
from keras import layers

import tether
from tests.support import assert_close, numpy
from tether.errors import NotInvertible, ShapeMismatch, TetherError, UnknownName, ValueConflict

copy = tether.transfer.copy


def mlp(*units, inputs=4, names=None):
    names = names or [None] * len(units)
    made = [layers.Dense(n, name=name) for n, name in zip(units, names, strict=True)]
    return keras.Sequential([keras.Input((inputs,)), *made])


def values(layer):
    return [numpy(v).copy() for v in layer.weights]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(numpy(a), numpy(b))


def fill_with(layer, rng):
    layer.set_weights([rng.normal(size=w.shape).astype(w.dtype) for w in layer.get_weights()])


# --------------------------------------------------------------------------- what corresponds to what


def test_models_that_were_made_apart_correspond_by_kind_and_number():
    """Their automatic names overlap: the source's second Dense has the name of the target's first, and so on."""
    keras.utils.clear_session(free_memory=False)
    source, target = mlp(4, 4, 4), mlp(4, 4, 4)
    assert source.layers[1].name != target.layers[1].name
    report = copy(source, target)
    assert_equal(source.weights, target.weights)
    assert [row.how for row in report] == ["copied"] * 6 and report.unused == []
    assert report[f"{target.layers[1].name}/kernel"].source == f"{source.layers[1].name}/kernel"


def test_layers_between_do_not_shift_the_correspondence():
    source = mlp(5, 3)
    target = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.Dropout(0.5), layers.Dense(3), layers.Dense(2)]
    )
    report = copy(source, target)
    assert_equal(source.weights, target.weights[:4])
    assert [row.how for row in report] == ["copied"] * 4 + ["kept"] * 2


def test_names_that_people_gave_decide_before_places():
    source = mlp(4, 4, names=["a", "b"])
    target = mlp(4, 4, 4, names=["b", "c", "a"])
    report = copy(source, target)
    for name in "ab":
        assert_equal(source.get_layer(name).weights, target.get_layer(name).weights)
    assert report["c/kernel"].how == "kept" and report["c/kernel"].source is None


def test_a_sequential_model_copies_to_a_functional_one():
    source = mlp(5, 3)
    x = keras.Input((4,))
    target = keras.Model(x, layers.Dense(3)(layers.Dense(5)(x)))
    copy(source, target)
    assert_equal(source.weights, target.weights)


class Block(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(units), layers.Dense(units)]
        self.norm = layers.LayerNormalization()
        self.table = tether.Weight((units, units), "glorot_uniform")

    def build(self, shape):
        for part in self.parts:
            part.build(shape)
        self.norm.build(shape)
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return self.norm(x) @ self.table.value * self.scale


def test_layers_of_ones_own_correspond_by_attribute_and_hold_weights(rng):
    source, target = (keras.Sequential([keras.Input((4,)), Block(4)]) for _ in range(2))
    fill_with(source, rng)
    report = copy(source, target)
    x = rng.normal(size=(3, 4)).astype("float32")
    assert_close(source(x), target(x), 1e-6)
    name = target.layers[0].name
    assert {row.target for row in report} == {
        f"{name}/{rest}"
        for rest in (
            "parts/0/kernel", "parts/0/bias", "parts/1/kernel", "parts/1/bias",
            "norm/gamma", "norm/beta", "scale", "table",
        )
    }  # fmt: skip
    assert all(row.how == "copied" for row in report)


def test_moving_statistics_are_copied_and_derived_constants_follow(rng):
    def model():
        return keras.Sequential([keras.Input((4,)), layers.Normalization(), layers.BatchNormalization()])

    source, target = model(), model()
    x = rng.normal(2.0, 3.0, size=(20, 4)).astype("float32")
    source.layers[0].adapt(x)
    source.layers[1].moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    assert np.abs(numpy(source(x)) - numpy(target(x))).max() > 0.1
    copy(source, target)
    assert_close(source(x), target(x), 1e-5)


def test_two_layers_of_composite_kind(rng):
    source, target = (layers.MultiHeadAttention(2, 3) for _ in range(2))
    for layer in (source, target):
        layer.build((None, 5, 4), (None, 5, 4))
    copy(source, target)
    assert_equal(source.weights, target.weights)


# --------------------------------------------------------------------------- match


def test_match_names_the_source_of_a_weight():
    source, target = mlp(4, names=["a"]), mlp(4, names=["b"])
    before = values(target)
    report = copy(source, target, match={"b/kernel": "a/kernel"})
    assert np.array_equal(numpy(target.weights[0]), numpy(source.weights[0]))
    assert np.array_equal(numpy(target.weights[1]), before[1])
    assert report.unused == ["a/bias"] and report["b/kernel"].source == "a/kernel"


def test_match_takes_patterns_and_every_star_is_filled():
    source, target = mlp(4, 4, names=["a_0", "a_1"]), mlp(4, 4, names=["block_0_x", "block_1_x"])
    copy(source, target, match={"block_*_x/*": "a_*/*"})
    assert_equal(source.weights, target.weights)


def test_match_with_none_leaves_weights_alone():
    source, target = mlp(4, 4), mlp(4, 4)
    before = values(target)
    name = target.layers[1].name
    report = copy(source, target, match={f"{name}/*": None})
    assert_equal(target.weights[:2], source.weights[:2])
    assert_equal(target.weights[2:], before[2:])
    assert [row.how for row in report] == ["copied", "copied", "kept", "kept"] and len(report.unused) == 2


def test_a_canonical_path_is_a_path_too():
    source, target = mlp(4, 4), mlp(4, 4)
    copy(source, target, match={"layers/0/kernel": "layers/1/kernel"})
    assert np.array_equal(numpy(target.weights[0]), numpy(source.weights[2]))


@pytest.mark.parametrize(
    ("match", "error"),
    [
        ({"nowhere/kernel": "a/kernel"}, UnknownName),
        ({"b/kernel": "nowhere/kernel"}, UnknownName),
        ({"nowhere/*": "a/*"}, UnknownName),
        ({"b/*": "nowhere/*"}, UnknownName),
        ({"b/kernel": "a/*"}, TetherError),
        ({"b/kernel": 3}, TetherError),
        ("b/kernel", TetherError),
        ({"b/kernel": "a/bias"}, ShapeMismatch),
    ],
)
def test_a_match_that_is_wrong_is_refused_and_changes_nothing(match, error):
    source, target = mlp(4, names=["a"]), mlp(4, names=["b"])
    before = values(target)
    with pytest.raises(error):
        copy(source, target, match=match)
    assert_equal(target.weights, before)


# --------------------------------------------------------------------------- tied targets


def codec(rng=None):
    table = tether.Weight((4, 3), "glorot_uniform", name="codec")
    encode = tether.tie(layers.Dense(3, name="encode"), kernel=table)
    decode = tether.tie(layers.Dense(4, name="decode"), kernel=table.T)
    model = keras.Sequential([keras.Input((4,)), encode, decode])
    if rng is not None:
        fill_with(model, rng)
    return model, table


def test_tied_models_copy_each_weight_once_and_stay_apart(rng):
    (source, theirs), (target, mine) = codec(rng), codec()
    report = copy(source, target)
    assert_equal(source.weights, target.weights)
    assert mine is not theirs and len(target.weights) == 3
    theirs.assign(np.zeros((4, 3), "float32"))
    assert np.abs(mine.numpy()).max() > 0
    assert report["encode/kernel"].how == "copied" and report["decode/kernel"].how == "copied with the weight"


def test_a_plain_model_copies_into_a_tied_one_if_its_values_agree(rng):
    target, mine = codec()
    source = mlp(3, 4, names=["encode", "decode"])
    fill_with(source, rng)
    before = values(target)
    with pytest.raises(ValueConflict, match=r"encode/kernel.*decode/kernel"):
        copy(source, target)
    assert_equal(target.weights, before)
    copy(source, target, match={"encode/kernel": None})
    assert np.array_equal(mine.numpy(), numpy(source.get_layer("decode").kernel).T)
    source.get_layer("encode").kernel.assign(mine.numpy())
    report = copy(source, target)
    assert "through codec.T" in report["decode/kernel"].how
    assert np.array_equal(mine.numpy(), numpy(source.get_layer("encode").kernel))


def test_a_tied_model_copies_into_a_plain_one(rng):
    source, _ = codec(rng)
    target = mlp(3, 4, names=["encode", "decode"])
    copy(source, target)
    x = rng.normal(size=(2, 4)).astype("float32")
    assert_close(source(x), target(x), 1e-6)


def test_an_expression_of_the_same_form_is_copied_part_by_part(rng):
    def adapted():
        w, a, b = (tether.Weight(s, "glorot_uniform", name=n) for s, n in (((4, 3), "w"), ((4, 2), "a"), ((2, 3), "b")))
        layer = tether.tie(layers.Dense(3, name="dense"), kernel=w + a @ b)
        return keras.Sequential([keras.Input((4,)), layer])

    source, target = adapted(), adapted()
    copy(source, target)
    assert_equal(source.weights, target.weights)


def test_an_expression_of_no_inverse_is_refused_and_nothing_changes(rng):
    a, b = (tether.Weight(s, "glorot_uniform", name=n) for s, n in (((4, 2), "a"), ((2, 3), "b")))
    target = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="first"), layers.Dense(3, name="dense")])
    tether.tie(target.get_layer("dense"), kernel=a @ b)
    source = mlp(4, 3, names=["first", "dense"])
    before = values(target)
    with pytest.raises(NotInvertible, match=r"dense/kernel.*a @ b"):
        copy(source, target)
    assert_equal(target.weights, before)


def test_what_is_shared_already_is_reported_and_stays(rng):
    parent = mlp(3, names=["dense"])
    child = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
    tether.tie(child.get_layer("dense"), kernel=tether.weight_of(parent, "dense/kernel"))
    before = values(parent)
    report = copy(parent, child)
    assert report["dense/kernel"].how == "shared" and report["dense/bias"].how == "copied"
    assert_equal(parent.weights, before)


def test_a_copy_never_changes_its_source(rng):
    parent = mlp(3, names=["dense"])
    table = tether.weight_of(parent, "dense/kernel")
    child = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
    tether.tie(child.get_layer("dense"), kernel=2.0 * table)
    before = values(parent)
    with pytest.raises(TetherError, match="would change the source"):
        copy(parent, child)
    assert_equal(parent.weights, before)


# --------------------------------------------------------------------------- sizes, dtypes, failures


@pytest.mark.parametrize("rule", ["zeros", "initializer", "mean"])
def test_another_size_follows_the_rule(rule):
    source, target = mlp(3, inputs=2), mlp(5, inputs=4)
    before = values(target)
    report = copy(source, target, fill=rule)
    K = numpy(source.weights[0])
    expected = np.zeros((4, 5), "float32") if rule == "zeros" else before[0].copy()
    if rule == "mean":
        expected[2:, :3] = K.mean(0)
        expected[:2, 3:] = K.mean(1, keepdims=True)
        expected[2:, 3:] = K.mean()
    expected[:2, :3] = K
    assert_close(target.weights[0], expected, 1e-6)
    name = target.layers[0].name
    assert report[f"{name}/kernel"].how == f"copied, {rule} on axis 0: 2 -> 4, {rule} on axis 1: 3 -> 5"


def test_tied_targets_of_another_size_are_filled_as_the_layer_sees_them(rng):
    source = mlp(3, 4, names=["encode", "decode"])
    source.get_layer("decode").kernel.assign(numpy(source.get_layer("encode").kernel).T)
    table = tether.Weight((4, 5), "glorot_uniform", name="codec")
    encode = tether.tie(layers.Dense(5, name="encode"), kernel=table)
    decode = tether.tie(layers.Dense(4, name="decode"), kernel=table.T)
    target = keras.Sequential([keras.Input((4,)), encode, decode])
    report = copy(source, target, fill="zeros")
    assert np.array_equal(table.numpy()[:, :3], numpy(source.get_layer("encode").kernel))
    assert np.array_equal(table.numpy()[:, 3:], np.zeros((4, 2)))
    assert report["decode/kernel"].how == "copied, zeros on axis 0: 3 -> 5, through codec.T"


def test_a_random_fill_of_a_tied_weight_is_drawn_once(rng):
    (source, _), (target, mine) = codec(rng), codec()
    grown = tether.Weight((6, 3), "zeros", name="grown")
    encode = tether.tie(layers.Dense(3, name="encode"), kernel=grown)
    decode = tether.tie(layers.Dense(6, name="decode"), kernel=grown.T)
    large = keras.Sequential([keras.Input((6,)), encode, decode])

    def drawn(value, start):
        found = rng.normal(size=start.shape)
        found[tuple(map(slice, value.shape))] = value
        return found

    report = copy(source, large, fill=drawn)
    assert np.array_equal(grown.numpy()[:4], numpy(source.get_layer("encode").kernel))
    assert report["encode/kernel"].how == "filled by drawn" and np.abs(grown.numpy()[4:]).min() > 0
    copy(source, target)
    assert np.array_equal(mine.numpy(), grown.numpy()[:4])


def test_other_dtypes_are_cast_and_reported():
    source = mlp(3, names=["dense"])
    keras.config.set_dtype_policy("float16")
    target = mlp(3, names=["dense"])
    report = copy(source, target)
    assert np.array_equal(numpy(target.weights[0]), numpy(source.weights[0]).astype("float16"))
    assert report["dense/kernel"].how == "copied, cast: float32 -> float16"
    back = mlp(3, names=["dense"])
    keras.config.set_dtype_policy("bfloat16")
    small = mlp(3, names=["dense"])
    copy(source, small)
    copy(small, back)
    assert_close(keras.ops.cast(back.weights[0], "float32"), source.weights[0], 1e-2)


def test_a_failure_half_way_is_undone():
    source, target = mlp(4, 4), mlp(4, 4)
    before = values(target)
    last = target.layers[-1].bias

    def fail(value):
        raise RuntimeError("no space left")

    object.__setattr__(last, "assign", fail)
    with pytest.raises(RuntimeError):
        copy(source, target)
    object.__delattr__(last, "assign")
    assert_equal(target.weights, before)


def test_unbuilt_layers_strangers_and_itself_are_refused():
    built, unbuilt = mlp(3), layers.Dense(3)
    with pytest.raises(TetherError, match="source of `copy` must be built"):
        copy(unbuilt, built)
    with pytest.raises(TetherError, match="target of `copy` must be built"):
        copy(built, unbuilt)
    with pytest.raises(TetherError, match="Keras layer"):
        copy(built, "target")
    with pytest.raises(TetherError, match="same layer"):
        copy(built, built)
    with pytest.raises(TetherError, match="'zeros'"):
        copy(built, mlp(3), fill="ones")
    with pytest.raises(UnknownName, match="match="):
        copy(mlp(3, names=["a"]), mlp(3, names=["b"]))

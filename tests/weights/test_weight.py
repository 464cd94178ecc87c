"""What a Weight is: how it comes to be, what it holds, what it is called, and how it travels."""

import copy
import json
import pickle
import threading

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownShape
from tether.weights import Weight
from tether.weights.storage import Copy

BACKEND = keras.backend.backend()
VALUE = np.arange(12, dtype="float32").reshape(3, 4)


def native_tensor(array):
    """A tensor of the backend's own making."""
    if BACKEND == "jax":
        import jax.numpy as jnp

        return jnp.asarray(array)
    if BACKEND == "torch":
        import torch

        return torch.tensor(array)
    import tensorflow as tf

    return tf.constant(array)


# --------------------------------------------------------------------------- how it comes to be


@pytest.mark.parametrize("shape", [(3, 4), [3, 4], (np.int64(3), np.int32(4))])
def test_made_from_a_shape_and_an_initializer(shape):
    for initializer in ("ones", keras.initializers.Ones(), keras.initializers.Constant(1.0)):
        weight = Weight(shape, initializer)
        assert weight.is_built
        assert weight.shape == (3, 4)
        assert weight.dtype == "float32"
        np.testing.assert_array_equal(weight.numpy(), np.ones((3, 4)))


def test_an_initializer_draws_as_it_does_for_keras():
    weight = Weight((30, 40), keras.initializers.RandomNormal(stddev=2.0, seed=3))
    expected = keras.initializers.RandomNormal(stddev=2.0, seed=3)((30, 40))
    assert_close(weight.value, expected)


def test_a_function_is_an_initializer():
    weight = Weight((2, 3), lambda shape, dtype=None: keras.ops.full(shape, 5.0, dtype=dtype))
    np.testing.assert_array_equal(weight.numpy(), np.full((2, 3), 5.0))


def test_a_number_is_a_shape_of_one_axis_and_an_empty_one_a_scalar():
    assert Weight(5, "zeros").shape == (5,)
    assert Weight((), "zeros").shape == ()
    assert Weight((0, 3), "zeros").numpy().shape == (0, 3)


def test_a_shape_alone_waits_for_the_initializer():
    weight = Weight((30, 40))
    assert not weight.is_built
    assert (weight.shape, weight.dtype) == ((30, 40), None)
    assert 0 < np.std(weight.numpy()) < 0.3
    assert weight.is_built
    assert weight.dtype == "float32"


def test_made_with_neither_shape_nor_initializer():
    weight = Weight(name="later")
    assert (weight.shape, weight.dtype, weight.ndim, weight.is_built) == (None, None, None, False)
    for read in (lambda: weight.value, lambda: weight.variable, weight.numpy, lambda: (2 * weight).value):
        with pytest.raises(UnknownShape, match="later"):
            read()
    with pytest.raises(UnknownShape, match="later"):
        weight.assign(VALUE)
    assert not weight.is_built


def test_a_first_tie_gives_what_was_left_out():
    weight = Weight(name="later")
    layer = tether.tie(keras.layers.Dense(4, kernel_initializer="ones"), kernel=weight)
    assert weight.shape is None
    layer.build((None, 3))
    assert (weight.shape, weight.dtype) == ((3, 4), "float32")
    np.testing.assert_array_equal(weight.numpy(), np.ones((3, 4)))


def test_a_first_tie_gives_the_shape_through_a_transpose_and_keeps_an_own_initializer():
    weight = Weight(initializer="ones", name="later")
    assert not weight.is_built
    tether.tie(keras.layers.Dense(4), kernel=0.5 * weight.T).build((None, 3))
    assert weight.shape == (4, 3)
    np.testing.assert_array_equal(weight.numpy(), np.ones((4, 3)))


def test_an_array_is_copied(rng):
    for make in (Weight, lambda array: Weight(initializer=array), lambda array: Weight((3, 4), array)):
        source = VALUE.copy()
        weight = make(source)
        source[:] = -1
        np.testing.assert_array_equal(weight.numpy(), VALUE)
        weight.assign(VALUE + 1)
        np.testing.assert_array_equal(source, np.full((3, 4), -1))


def test_a_tensor_is_copied():
    source = native_tensor(VALUE)
    weight = Weight(source)
    if BACKEND == "torch":
        source.mul_(0)
    weight_of_tensor = weight.numpy()
    np.testing.assert_array_equal(weight_of_tensor, VALUE)
    weight.assign(VALUE + 1)
    assert_close(source, VALUE * (0 if BACKEND == "torch" else 1))


def test_two_weights_of_one_array_are_two():
    first, second = Weight(VALUE), Weight(VALUE)
    first.assign(VALUE + 1)
    np.testing.assert_array_equal(second.numpy(), VALUE)


def test_the_value_of_another_weight_is_copied():
    first = Weight(VALUE)
    second = Weight(first.value)
    first.assign(VALUE * 2)
    np.testing.assert_array_equal(second.numpy(), VALUE)
    third = Weight(first.numpy())
    first.assign(VALUE * 3)
    np.testing.assert_array_equal(third.numpy(), VALUE * 2)


def test_what_is_assigned_is_copied():
    weight, source = Weight(VALUE), VALUE + 1
    weight.assign(source)
    source[:] = 0
    np.testing.assert_array_equal(weight.numpy(), VALUE + 1)


def test_lists_of_numbers_are_arrays():
    assert_close(Weight([[1.0, 2.0], [3.0, 4.0]]).value, [[1, 2], [3, 4]])
    assert_close(Weight([1.5, 2]).value, [1.5, 2])
    assert Weight([1.5, 2]).dtype == "float32"


@pytest.mark.parametrize("give", [lambda v: Weight(v), lambda v: Weight((3, 4), v), lambda v: Weight(initializer=v)])
def test_a_variable_is_refused_and_the_error_names_both_meanings(give):
    layer = keras.layers.Dense(4)
    layer.build((None, 3))
    with pytest.raises(tether.TetherError, match=r"tether\.weight_of\(layer, 'kernel'\).*variable\.numpy\(\)"):
        give(layer.kernel)


@pytest.mark.parametrize("give", [lambda e: Weight(e), lambda e: Weight((3, 4), e), lambda e: Weight(initializer=e)])
def test_an_expression_is_refused(give):
    weight = Weight(VALUE)
    for expression in (weight, 2 * weight):
        with pytest.raises(tether.TetherError, match="expression"):
            give(expression)


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": (3, -1)},
        {"shape": (3, None)},
        {"shape": (3, 1.5)},
        {"shape": (True,)},
        {"shape": "34"},
        {"shape": {"a": 1}},
        {"shape": (1 << 40,)},
        {"shape": (1,) * 33},
        {"shape": VALUE, "initializer": "ones"},
        {"shape": (4, 3), "initializer": VALUE},
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(tether.TetherError):
        Weight(**arguments)


@pytest.mark.parametrize("name", ["initializer", "regularizer", "constraint", "dtype"])
def test_unknown_names_of_keras_objects_are_refused_as_by_keras(name):
    with pytest.raises(ValueError, match="nonsense"):
        Weight((3, 4), **{name: "nonsense"})


# --------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_array_keeps_its_dtype(dtype):
    array = keras.ops.convert_to_tensor(VALUE, dtype=dtype)
    assert Weight(array).dtype == dtype
    assert keras.backend.standardize_dtype(Weight(array).value.dtype) == dtype


def test_a_float64_array_takes_the_default_of_keras():
    assert Weight(VALUE.astype("float64")).dtype == keras.config.floatx() == "float32"


def test_a_dtype_that_is_given_wins():
    assert Weight(VALUE, dtype="float16").dtype == "float16"
    assert Weight(VALUE.astype("float16"), dtype="float32").dtype == "float32"
    assert Weight((3, 4), "ones", dtype="bfloat16").dtype == "bfloat16"
    assert Weight((3, 4), dtype="float16").dtype == "float16"
    late = Weight(dtype="float16")
    tether.tie(keras.layers.Dense(4), kernel=late).build((None, 3))
    assert late.dtype == "float16"


def test_integers_are_stored_if_they_do_not_train():
    weight = Weight(np.array([1, 2, 3], dtype="int32"), trainable=False)
    assert weight.dtype == "int32"
    np.testing.assert_array_equal((weight + 1).numpy(), [2, 3, 4])
    numpys_default = Weight(np.array([1, 2, 3]), trainable=False)
    np.testing.assert_array_equal(numpys_default.numpy(), [1, 2, 3])
    assert keras.backend.standardize_dtype(numpys_default.value.dtype) == numpys_default.dtype


def test_integers_are_stored_and_never_train():
    weight = Weight(np.array([1, 2, 3], dtype="int32"))
    assert not weight.trainable and not weight.variable.trainable
    weight.trainable = True
    assert not weight.variable.trainable


# --------------------------------------------------------------------------- what it holds


def test_numpy_is_a_copy():
    weight = Weight(VALUE)
    weight.numpy()[:] = 0
    np.testing.assert_array_equal(weight.numpy(), VALUE)


def test_assign_takes_arrays_tensors_and_lists():
    weight = Weight(VALUE)
    for value in (VALUE + 1, native_tensor(VALUE + 2), (VALUE + 3).tolist(), VALUE.astype("float64") + 4):
        weight.assign(value)
        assert_close(weight.value, value)
        assert weight.dtype == "float32"


@pytest.mark.parametrize("value", [np.zeros((4, 3)), 1.0, np.zeros(12), np.zeros((1, 3, 4))])
def test_assign_refuses_another_shape_and_changes_nothing(value):
    weight = Weight(VALUE, name="kept")
    with pytest.raises(ShapeMismatch, match=r"'kept'.*\(3, 4\)"):
        weight.assign(value)
    np.testing.assert_array_equal(weight.numpy(), VALUE)


def test_printing_says_what_is_known():
    weight = Weight(name="codec")
    assert repr(weight) == str(weight) == "<Weight codec: shape not known yet, dtype=None, uses=0>"
    assert repr(Weight(VALUE, name="shown")) == "<Weight shown: shape=(3, 4), dtype=float32, uses=0>"
    frozen = Weight(VALUE, name="still", trainable=False)
    assert repr(frozen) == "<Weight still: shape=(3, 4), dtype=float32, frozen, uses=0>"
    tether.tie(keras.layers.Dense(4), kernel=frozen).build((None, 3))
    assert "uses=1" in repr(frozen)


def test_a_weight_is_equal_to_itself_only():
    first, second = Weight(VALUE, name="same"), Weight(VALUE, name="same")
    assert first == first
    assert first != second
    assert len({first, second, first}) == 2


def test_it_is_a_keras_layer_with_one_weight():
    weight = Weight(VALUE, name="one")
    assert isinstance(weight, keras.layers.Layer)
    assert weight.weights == [weight.variable]
    assert weight.count_params() == 12


# --------------------------------------------------------------------------- names


def test_the_path_of_its_variable_is_its_name_whoever_builds_it():
    late = Weight(name="late_of_the_path_test")
    layer = tether.tie(keras.layers.Dense(4, name="inner"), kernel=late)
    keras.Sequential([layer], name="outer").build((None, 3))
    assert late.variable.path == "late_of_the_path_test"

    class Holder(keras.layers.Layer):
        def build(self, shape):
            self.early = Weight((2,), "zeros", name="early_of_the_path_test")

    holder = Holder(name="holder")
    holder.build((None, 3))
    assert holder.early.variable.path == "early_of_the_path_test"


def test_what_else_lives_plays_no_part_in_a_path():
    first, second = (Weight(VALUE, name="twin") for _ in range(2))
    assert [(w.name, w.path, w.variable.path, w.variable.name) for w in (first, second)] == [("twin",) * 4] * 2
    assert Weight.from_config(first.get_config()).variable.path == copy.deepcopy(first).variable.path == "twin"


@pytest.mark.parametrize(
    ("name", "path"), [("block.codec", "block/codec"), (".a..b.", "a/b"), ("...", "weight"), ("codec", "codec")]
)
def test_dots_of_a_name_are_slashes_of_the_path(name, path):
    waiting, made = Weight(name=name), Weight((2,), "zeros", name=name)
    assert waiting.path == made.path == made.variable.path == path
    with keras.name_scope("outer"):
        assert Weight((2,), "zeros", name=name).variable.path == path


def test_a_weight_without_a_name_has_the_path_of_the_first_variable_that_it_stands_for():
    """As the variable would have it that the layer makes: whatever was made in the process before."""
    early, late = Weight(), Weight()
    built = keras.layers.Dense(2, name="built")
    built.build((None, 3))
    tether.tie(built, kernel=early)
    layer = tether.tie(keras.layers.Dense(2, name="inner"), kernel=late)
    other = tether.tie(keras.layers.Dense(2, name="other"), kernel=late)
    plain = keras.Sequential([keras.layers.Dense(2, name="inner"), keras.layers.Dense(2)], name="outer")
    for model in (plain, keras.Sequential([layer, other], name="outer")):
        model.build((None, 2))
    assert early.path == "built/kernel"
    assert late.path == late.variable.path == plain.layers[0].kernel.path


def test_the_promoted_weight_of_a_layer_that_is_not_built_gets_the_path_of_its_variable():
    layer = keras.layers.Dense(2, name="inner")
    weight = tether.weight_of(layer, "kernel")
    assert weight.name == "inner.kernel"
    model, plain = (keras.Sequential([each], name="outer") for each in (layer, keras.layers.Dense(2, name="inner")))
    clone = keras.models.clone_model(model)
    for each in (plain, model, clone):
        each.build((None, 3))
    assert weight.path == clone.layers[0].kernel.expression.path == plain.layers[0].kernel.path


# --------------------------------------------------------------------------- roles


def test_a_role_is_written_and_read():
    for role in ("part", "strength", "state", "integers", "scale"):
        weight = Weight((2,), "zeros", name="w", role=role)
        assert weight.role == weight.get_config()["role"] == Weight.from_config(weight.get_config()).role == role
        assert copy.deepcopy(weight).role == pickle.loads(pickle.dumps(weight)).role == role
    with pytest.raises(AttributeError):
        weight.role = "part"
    assert Weight((2,), "zeros").role is None and "role" not in Weight((2,), "zeros").get_config()


def test_a_role_that_there_is_not_is_refused():
    with pytest.raises(TetherError, match=r"role is one of 'part'.*Received: role='base'"):
        Weight((2,), "zeros", role="base")
    for role in ("base", 3, ["part"]):
        with pytest.raises(InvalidConfig, match="role is one of"):
            Weight.from_config({**Weight((2,), "zeros").get_config(), "role": role})
    part = Weight((2,), "zeros", role="part").get_config()
    with tether.sharing(), pytest.raises(InvalidConfig, match="differ in role"):
        Weight.from_config(part)
        Weight.from_config({**part, "role": "state"})


def test_a_weight_beside_another_has_its_name_and_path_with_a_suffix():
    base = keras.layers.Dense(4, name="query")
    with keras.name_scope("block"):
        base.build((None, 3))
    kernel = tether.weight_of(base, "kernel")
    part = Weight.beside(kernel, "lora_a", np.ones((3, 2)), dtype="float32")
    assert (part.name, part.path) == ("query.kernel_lora_a", "block/query/kernel_lora_a")
    assert part.variable.path == part.path and part.variable.name == "kernel_lora_a"
    waiting = Weight.beside(Weight(name="late.kernel"), "g", "ones", (2,), dtype="float16", role="state")
    assert (waiting.name, waiting.path, waiting.dtype, waiting.role) == (
        "late.kernel_g",
        "late/kernel_g",
        "float16",
        "state",
    )
    np.testing.assert_array_equal(waiting.numpy(), np.ones(2))


def test_a_name_is_made_up_if_none_is_given():
    first, second = Weight((2,), "zeros"), Weight((2,), "zeros")
    assert first.name != second.name
    assert first.name.startswith("weight")


def test_a_name_has_no_slash():
    with pytest.raises(ValueError, match="/"):
        Weight((2,), "zeros", name="a/b")


# --------------------------------------------------------------------------- what trains, regularizers, constraints


class Scale(keras.layers.Layer):
    """A layer of a user's own that holds one weight as an attribute."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return x * self.factor.value


def test_its_own_flag_decides_whether_it_trains():
    weight = Weight(VALUE, trainable=False)
    assert not weight.trainable
    assert not weight.variable.trainable
    assert (weight.trainable_weights, weight.non_trainable_weights) == ([], [weight.variable])
    weight.trainable = True
    assert weight.variable.trainable
    assert (weight.trainable_weights, weight.non_trainable_weights) == ([weight.variable], [])
    assert not Weight((2, 2), trainable=False).variable.trainable


def test_a_layer_that_holds_it_freezes_and_frees_it():
    factor = Weight(np.ones(3, "float32"))
    layer = Scale(factor)
    layer(np.ones((2, 3), "float32"))
    assert layer.trainable_weights == [factor.variable]
    layer.trainable = False
    assert layer.trainable_weights == []
    assert not factor.variable.trainable
    layer.trainable = True
    assert layer.trainable_weights == [factor.variable]


def test_freeing_a_layer_does_not_free_a_weight_that_was_made_frozen():
    factor = Weight(np.ones(3, "float32"), trainable=False)
    layer = Scale(factor)
    layer.trainable = False
    layer.trainable = True
    assert not factor.variable.trainable


def test_its_regularizer_counts_once_however_many_layers_hold_it():
    factor = Weight(np.full(3, 2.0, "float32"), regularizer=keras.regularizers.L2(0.5))
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Scale(factor)(Scale(factor)(inputs)))
    assert_close(keras.ops.sum(model.losses), 0.5 * 12)
    assert len(model.losses) == 1


def test_its_constraint_holds_after_a_step():
    factor = Weight(np.full(3, 0.1, "float32"), constraint="non_neg")
    model = keras.Sequential([keras.Input((3,)), Scale(factor)])
    model.compile(keras.optimizers.SGD(10.0), "mse")
    model.fit(np.ones((4, 3)), np.full((4, 3), -5.0), epochs=1, verbose=0)
    np.testing.assert_array_equal(factor.numpy(), np.zeros(3))


# --------------------------------------------------------------------------- configs


def settings(config):
    return {key: value for key, value in config.items() if key not in ("uid", "origin")}


def test_a_config_is_json_and_gives_a_weight_of_the_same_settings():
    weight = Weight(
        (3, 4),
        keras.initializers.RandomUniform(-2, 3, seed=5),
        dtype="float16",
        trainable=False,
        regularizer=keras.regularizers.L1(0.25),
        constraint=keras.constraints.MaxNorm(2.0),
        name="travels",
    )
    config = json.loads(json.dumps(weight.get_config()))
    revived = Weight.from_config(config)
    assert settings(revived.get_config()) == settings(weight.get_config())
    assert (revived.name, revived.shape, revived.dtype, revived.trainable) == ("travels", (3, 4), "float16", False)
    assert revived.is_built
    assert isinstance(revived.initializer, keras.initializers.RandomUniform)
    assert isinstance(revived.regularizer, keras.regularizers.L1)
    assert isinstance(revived.constraint, keras.constraints.MaxNorm)
    assert revived.variable.path == "travels"


@pytest.mark.parametrize("make", [lambda: Weight(), lambda: Weight((3, 4)), lambda: Weight(initializer="ones")])
def test_the_config_of_a_weight_that_waits_gives_one_that_waits(make):
    weight = make()
    revived = Weight.from_config(weight.get_config())
    assert (revived.shape, revived.dtype, revived.is_built) == (weight.shape, weight.dtype, False)
    assert settings(revived.get_config()) == settings(weight.get_config())


def test_a_config_of_an_array_gives_its_shape_and_dtype():
    revived = Weight.from_config(Weight(VALUE.astype("float16")).get_config())
    assert (revived.shape, revived.dtype) == ((3, 4), "float16")


def test_every_copy_has_an_id_of_its_own_and_one_origin():
    weight = Weight(VALUE, name="first")
    assert weight.uid == weight.origin
    copies = [
        Weight.from_config(weight.get_config()),
        copy.deepcopy(weight),
        copy.copy(weight),
        pickle.loads(pickle.dumps(weight)),
    ]
    copies.append(Weight.from_config(copies[0].get_config()))
    assert len({weight.uid, *(c.uid for c in copies)}) == 6
    assert {c.origin for c in copies} == {weight.uid}
    assert Weight(VALUE, name="first").origin != weight.uid


def test_from_config_finds_what_the_sharing_scope_has_made():
    config = Weight(VALUE).get_config()
    with tether.sharing() as made:
        first = Weight.from_config(config)
        assert Weight.from_config(config) is first
        assert made == {config["uid"]: first}
        assert Weight.from_config(Weight(VALUE).get_config()) is not first
    assert Weight.from_config(config) is not first
    assert Weight.from_config(config) is not Weight.from_config(config)
    with tether.sharing():
        assert Weight.from_config(config) is not first


DIFFERENCES = {
    "shape": [2, 9],
    "dtype": "float16",
    "trainable": False,
    "regularizer": {"module": "keras.regularizers", "class_name": "L2", "config": {"l2": 0.5}},
    "constraint": {"module": "keras.constraints", "class_name": "NonNeg", "config": {}},
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_two_configs_of_one_weight_that_differ_are_refused(key):
    config = Weight(VALUE, name="codec").get_config()
    with tether.sharing() as made:
        first = Weight.from_config(config)
        with pytest.raises(InvalidConfig, match=f"two configs of one weight, 'codec' and 'codec', .* differ in {key}"):
            Weight.from_config({**config, key: DIFFERENCES[key]})
        assert made == {config["uid"]: first}


def test_sharing_scopes_nest_and_end_with_their_block():
    config = Weight(VALUE).get_config()
    with tether.sharing():
        outer = Weight.from_config(config)
        with tether.sharing():
            inner = Weight.from_config(config)
            assert inner is not outer
        assert Weight.from_config(config) is outer
        with pytest.raises(RuntimeError, match="on purpose"), tether.sharing():
            raise RuntimeError("on purpose")
        assert Weight.from_config(config) is outer


def test_a_sharing_scope_belongs_to_its_thread():
    config = Weight(VALUE).get_config()
    found = []
    with tether.sharing():
        here = Weight.from_config(config)
        thread = threading.Thread(target=lambda: found.append(Weight.from_config(config)))
        thread.start()
        thread.join()
    assert found[0] is not here


def test_a_config_that_lacks_or_adds_a_key_is_refused():
    config = Weight(VALUE).get_config()
    for key in config:
        with pytest.raises(InvalidConfig):
            Weight.from_config({k: v for k, v in config.items() if k != key})
    with pytest.raises(InvalidConfig):
        Weight.from_config({**config, "more": 1})


# --------------------------------------------------------------------------- deepcopy and pickle


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))], ids=["copy", "pickle"])
class TestCopies:
    def test_a_copy_has_the_value_and_the_settings(self, duplicate):
        weight = Weight(
            (3, 4), "ones", regularizer="l2", constraint="non_neg", trainable=False, dtype="bfloat16", name="many"
        )
        weight.assign(VALUE)
        copied = duplicate(weight)
        assert settings(copied.get_config()) == settings(weight.get_config())
        np.testing.assert_array_equal(copied.numpy(), weight.numpy())
        assert copied.variable.path == weight.variable.path == "many"

    def test_a_copy_has_storage_of_its_own(self, duplicate):
        weight = Weight(VALUE)
        copied = duplicate(weight)
        weight.assign(VALUE + 1)
        np.testing.assert_array_equal(copied.numpy(), VALUE)
        copied.assign(VALUE + 2)
        np.testing.assert_array_equal(weight.numpy(), VALUE + 1)

    def test_a_weight_that_waits_stays_one(self, duplicate):
        copied = duplicate(Weight(initializer="ones", name="waits"))
        assert (copied.shape, copied.is_built, copied.name) == (None, False, "waits")
        assert not duplicate(Weight((3, 4))).is_built

    def test_one_copy_serves_all_that_share_it(self, duplicate):
        weight = Weight(VALUE)
        first, second, other = duplicate([weight, {"again": weight}, Weight(VALUE)])
        assert first is second["again"]
        assert first is not weight
        assert other is not first


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the others align what they compute with")
def test_a_weight_of_an_array_lies_where_pytorch_would_put_it():
    memory = np.zeros(64 * 64 * 4 + 64, "uint8")
    first = -memory.ctypes.data % 64 + 16
    array = memory[first : first + 63 * 64 * 4].view("float32").reshape(63, 64)
    variable = keras.Variable(Copy(array), shape=(63, 64), dtype="float32")
    assert variable.value.data_ptr() % 64 == 0
    array[...] = 1
    assert not numpy(variable).any()


# --------------------------------------------------------------------------- inside a layer of a user's own


@keras.saving.register_keras_serializable("tether_tests")
class Bilinear(keras.layers.Layer):
    """Scores every row of a table, which other layers may use too."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table

    def call(self, x):
        return keras.ops.matmul(x, self.table.T.value) + keras.ops.sum((0.5 * self.table[:, :1]).value)

    def get_config(self):
        return {**super().get_config(), "table": keras.saving.serialize_keras_object(self.table)}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["table"] = keras.saving.deserialize_keras_object(config["table"])
        return cls(**config)


TABLE = np.random.default_rng(5).normal(size=(5, 3)).astype("float32")
INPUTS = np.random.default_rng(6).normal(size=(4, 3)).astype("float32")


def bilinear_of(x, table):
    return x @ table.T + 0.5 * np.sum(table[:, :1])


def two_layers_one_table():
    table = Weight(TABLE, name="table")
    inputs = keras.Input((3,))
    first = Bilinear(table, name="first")
    second = Bilinear(table, name="second")
    return table, keras.Model(inputs, first(inputs) + 2 * second(inputs))


def test_as_an_attribute_it_is_tracked_and_counted_once():
    table, model = two_layers_one_table()
    for layer in model.layers[1:3]:
        assert layer.weights == [table.variable]
    assert model.weights == [table.variable]
    assert model.count_params() == TABLE.size
    assert len(model.get_weights()) == 1
    assert_close(model(INPUTS), 3 * bilinear_of(INPUTS, TABLE), 1e-4)


def test_as_an_attribute_it_gets_the_gradient_of_all_its_uses():
    table, model = two_layers_one_table()
    layer = model.get_layer("first")
    _, (alone,) = gradients(lambda: keras.ops.sum(layer(INPUTS)), [table.variable])
    _, (both,) = gradients(lambda: keras.ops.sum(model(INPUTS)), [table.variable])
    assert_close(both, 3 * alone, 1e-4)
    expected = np.tile(INPUTS.sum(0), (5, 1))
    expected[:, 0] += 0.5 * 4 * 5
    assert_close(alone, expected, 1e-4)


def test_as_an_attribute_it_trains_with_one_slot():
    table, model = two_layers_one_table()
    model.compile("adam", "mse")
    model.fit(INPUTS, np.zeros((4, 5)), epochs=1, verbose=0)
    assert np.any(table.numpy() != TABLE)
    assert sum(1 for v in model.optimizer.variables if tuple(v.shape) == TABLE.shape) == 2
    assert_close(model(INPUTS), 3 * bilinear_of(INPUTS, table.numpy()), 1e-4)


def test_as_an_attribute_it_is_saved_and_loaded_and_still_shared(tmp_path):
    table, model = two_layers_one_table()
    expected = model.predict(INPUTS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(INPUTS, verbose=0), expected, rtol=1e-6)
    first, second = loaded.get_layer("first"), loaded.get_layer("second")
    assert first.table is second.table is not table
    assert first.table.origin == table.uid
    assert loaded.count_params() == TABLE.size
    first.table.assign(TABLE + 1)
    np.testing.assert_array_equal(table.numpy(), TABLE)


def test_as_an_attribute_it_is_cloned_and_still_shared():
    table, model = two_layers_one_table()
    clone = keras.models.clone_model(model)
    first, second = clone.get_layer("first"), clone.get_layer("second")
    assert first.table is second.table is not table
    clone.set_weights(model.get_weights())
    assert_close(clone(INPUTS), model(INPUTS))


def test_a_weights_file_holds_it_once(tmp_path):
    table, model = two_layers_one_table()
    model.save_weights(tmp_path / "m.weights.h5")
    table.assign(TABLE * 0)
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(table.numpy(), TABLE)
    large = Weight(np.zeros((1000, 100), "float32"), name="large")
    inputs = keras.Input((100,))
    wide = keras.Model(inputs, Bilinear(large)(inputs) + Bilinear(large)(inputs))
    wide.save_weights(tmp_path / "wide.weights.h5")
    assert (tmp_path / "wide.weights.h5").stat().st_size < 1.02 * 400_000 + 50_000


def test_two_layers_from_one_config_each_outside_a_scope_share_nothing():
    table, model = two_layers_one_table()
    configs = [keras.saving.serialize_keras_object(model.get_layer(name)) for name in ("first", "second")]
    first, second = map(keras.saving.deserialize_keras_object, configs)
    assert first.table is not second.table
    with tether.sharing():
        first, second = map(keras.saving.deserialize_keras_object, configs)
    assert first.table is second.table is not table


def test_a_list_of_weights_is_tracked():
    class Several(keras.layers.Layer):
        def __init__(self, parts, **kwargs):
            super().__init__(**kwargs)
            self.parts = parts

        def call(self, x):
            return x * sum(keras.ops.sum(part.value) for part in self.parts)

    parts = [Weight(np.ones(2, "float32")), Weight(np.ones(3, "float32"))]
    layer = Several(parts)
    layer(INPUTS)
    assert layer.weights == [part.variable for part in parts]
    assert_close(layer(INPUTS), 5 * INPUTS)


def test_assigning_another_weights_value_copies_it(rng):
    a = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="a")
    b = tether.Weight((4, 4), "zeros", name="b")
    b.assign(a.value)
    models = []
    for weight in (a, b):
        inputs = keras.Input((4,))
        models.append(keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=weight)(inputs)))
    both = keras.Model(models[0].inputs, keras.layers.Add()([model(models[0].inputs[0]) for model in models]))
    both.compile("sgd", "mse")
    x = np.ones((4, 4), "float32")
    both.fit(x, x, verbose=0)
    a.assign(np.zeros((4, 4)))
    assert np.abs(b.numpy()).max() > 0


def test_dir_names_what_people_use_and_not_what_keras_has_for_a_layer():
    weight = Weight((2, 3), "ones", name="w")
    named = dir(weight)
    assert {"shape", "value", "assign", "T", "trainable", "quantize"} <= set(named) and len(named) < 30
    assert all(hasattr(weight, name) for name in named)
    assert not {"build", "call", "add_weight", "losses", "uid", "add_use"} & set(named)


def test_what_a_subclass_of_weight_holds_is_saved_with_it(tmp_path):
    @keras.saving.register_keras_serializable(package="test_weight")
    class Holds(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.w = Weight((2, 2), "zeros", name="w")
            self.w.beside_it = keras.layers.Dense(2, name="beside_it")
            self.w.beside_it.build((None, 2))

        def call(self, x):
            return self.w.beside_it(x @ self.w.value)

    model = keras.Sequential([keras.Input((2,)), Holds(name="holds")])
    model.layers[0].w.beside_it.bias.assign([1.0, 2.0])
    model.save_weights(tmp_path / "m.weights.h5")
    other = keras.Sequential([keras.Input((2,)), Holds(name="holds")])
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(other.layers[0].w.beside_it.bias), [1.0, 2.0])

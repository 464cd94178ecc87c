"""`tether.Repeat`: `training` that is a tensor, and forms with a state that each turn has for itself."""

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tests.layers.test_repeat import WIDTH, assert_same, rows, values
from tether.errors import Unsupported
from tether.weights import Argument

pytestmark = pytest.mark.spread

BACKEND = keras.backend.backend()


def array(value):
    return np.array(ops.convert_to_numpy(value))


def graph_of(layer):
    """A function of inputs and a bool tensor, which the backend compiles once for both; with the layer's state."""
    if BACKEND == "jax":
        import jax

        def stateless(x, training, trained, others):
            return layer.stateless_call(trained, others, x, training=training)

        run = jax.jit(stateless)

        def call(x, training):
            lists = layer.trainable_variables, layer.non_trainable_variables
            found, after = run(x, training, *[[v.value for v in each] for each in lists])
            for variable, value in zip(layer.non_trainable_variables, after, strict=True):
                variable.assign(value)
            return found

        return call
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x, training: layer(x, training=training))
    return lambda x, training: layer(x, training=training)


class Doubles(keras.layers.Layer):
    """A block that takes a tensor for `training`, and doubles its input where it trains."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(WIDTH, name="dense", use_bias=False)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x, training=None):
        training = ops.cast(False if training is None else training, "bool")
        return ops.where(training, x * 1.5, x) + 0.1 * self.dense(x)


class Asks(Doubles):
    """The same, by a branch of the graph."""

    def call(self, x, training=None):
        if training is None or isinstance(training, bool):
            return (x * 1.5 if training else x) + 0.1 * self.dense(x)
        return ops.cond(training, lambda: x * 1.5, lambda: x) + 0.1 * self.dense(x)


def chance():
    return keras.layers.Dense(1, activation="sigmoid", name="chance")


BODIES = {
    "where": (Doubles, {}),
    "a branch": (Asks, {}),
    "halting": (Doubles, {"halt": chance}),
    "computed again": (Doubles, {"remat": True}),
    "a state of its own": (Doubles, {"vary": {"dense/kernel": tether.forms.spectral_norm(seed=1)}}),
}
RANDOM = {
    "stochastic depth": (Doubles, {"skip_rate": 0.5}),
    "dropout of a part": (Doubles, {"vary": {"dense/kernel": tether.low_rank(2, dropout=0.5)}}),
}


def body_of(kind, unroll, times=5):
    keras.utils.set_random_seed(4)
    block, settings = {**BODIES, **RANDOM}[kind]
    made = {name: value() if name == "halt" else value for name, value in settings.items()}
    body = tether.Repeat(block(name="block"), times, unroll=unroll, name="body", **made)
    body.build((None, WIDTH))
    drawn = np.random.RandomState(2)
    for weight in body.trainable_weights:
        weight.assign(drawn.randn(*weight.shape) * 0.3)
    return body


# ------------------------------------------------------------------ a tensor for `training`


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
@pytest.mark.parametrize("kind", [*BODIES, *RANDOM])
def test_training_may_be_a_tensor_that_a_graph_is_given_later(kind, unroll):
    x = ops.convert_to_tensor(rows)
    body, plain = body_of(kind, unroll), body_of(kind, unroll)
    run = graph_of(body)
    outputs = {}
    for training in (False, True, False, True):
        found = array(run(x, ops.convert_to_tensor(training)))
        wanted = array(plain(x, training=training))
        if kind in BODIES or not training:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        outputs[training] = found
    assert not np.allclose(outputs[True], outputs[False])
    if kind in BODIES:
        assert_same(values(body), values(plain))


@pytest.mark.parametrize("kind", ["where", "halting"])
def test_training_may_be_a_tensor_whose_value_is_known(kind):
    body = body_of(kind, False)
    for training in (False, True):
        wanted = array(body(rows, training=training))
        np.testing.assert_array_equal(array(body(rows, training=ops.convert_to_tensor(training))), wanted)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras gives no layer a symbolic `training` there")
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
def test_training_may_be_an_input_of_a_model(unroll):
    body = body_of("where", unroll)
    x, flag = keras.Input((WIDTH,)), keras.Input(batch_shape=(), dtype="bool")
    model = keras.Model([x, flag], body(x, training=flag))
    for training in (True, False):
        given = ops.convert_to_tensor(rows), ops.convert_to_tensor(training)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            found = array(tf.function(lambda *each: model(each))(*given))
        else:
            found = array(model(given))
        np.testing.assert_allclose(found, array(body(rows, training=training)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
def test_a_block_that_asks_in_python_is_named(unroll):
    body = tether.Repeat(keras.layers.Dropout(0.5, name="asks"), 5, unroll=unroll, name="body")
    x = ops.convert_to_tensor(rows)
    body(x)
    if BACKEND == "torch":  # runs it as it comes
        for training in (False, True):
            assert (array(body(x, training=ops.convert_to_tensor(training))) != rows).any() == training
        return
    with pytest.raises(Unsupported, match=r"(?s)'asks' asks for it in Python.*True or False to 'body'"):
        graph_of(body)(x, ops.convert_to_tensor(True))
    np.testing.assert_array_equal(array(body(x, training=False)), rows)


def test_an_error_of_the_block_stays_what_it_is():
    class Wrong(keras.layers.Layer):
        def call(self, x, training=None):
            raise KeyError("wrong")

        def compute_output_shape(self, shape):
            return shape

    with pytest.raises(KeyError, match="wrong"):
        tether.Repeat(Wrong(), 2)(ops.convert_to_tensor(rows), training=True)


# ------------------------------------------------------------------ a state of each turn's own


def normed(kernel, u, v):
    """What one training call makes of a kernel and its vectors."""
    u = v @ kernel
    u = u / np.linalg.norm(u)
    v = kernel @ u
    v = v / np.linalg.norm(v)
    return kernel / (v @ kernel @ u), u, v


VARIES = {
    "the norm": tether.forms.spectral_norm(),
    "a part, then the norm": lambda w: tether.forms.spectral_norm()(w + tether.low_rank(2)(w) - w),
}


def normed_body(kind="the norm", unroll=False, dtype=None, remat=False, times=5):
    keras.utils.set_random_seed(2)
    block = keras.layers.Dense(WIDTH, use_bias=False, name="dense", dtype=dtype)
    body = tether.Repeat(block, times, vary={"kernel": VARIES[kind]}, unroll=unroll, name="body", remat=remat)
    x = keras.Input((WIDTH,))
    model = keras.Model(x, body(x))
    drawn = np.random.RandomState(3)
    for weight in body.weights:
        if "lora" in weight.path:
            weight.assign(drawn.randn(*weight.shape) * 0.3)
    return model, body


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "written out"])
def test_each_turn_has_vectors_of_its_own_which_go_on_once_in_a_training_call(unroll):
    _, body = normed_body("a part, then the norm", unroll)
    named = {w.path.rpartition("/")[2]: array(w) for w in body.weights}
    assert {name: value.shape for name, value in named.items()} == {
        "kernel": (8, 8), "kernel_lora_a": (5, 8, 2), "kernel_lora_b": (5, 2, 8), "kernel_u": (5, 8),
        "kernel_v": (5, 8),
    }  # fmt: skip
    assert {w.path.rpartition("/")[2] for w in body.trainable_weights} == {"kernel", "kernel_lora_a", "kernel_lora_b"}
    run = graph_of(body)
    for training in (True, False, True):
        wanted = rows
        for turn in range(5):
            kernel = named["kernel"] + named["kernel_lora_a"][turn] @ named["kernel_lora_b"][turn]
            u, v = named["kernel_u"][turn], named["kernel_v"][turn]
            if training:
                kernel, named["kernel_u"][turn], named["kernel_v"][turn] = normed(kernel, u, v)
            else:
                kernel = kernel / (v @ kernel @ u)
            wanted = wanted @ kernel
        found = array(run(ops.convert_to_tensor(rows), ops.convert_to_tensor(training)))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        for weight in body.weights:
            np.testing.assert_allclose(array(weight), named[weight.path.rpartition("/")[2]], atol=1e-5)


@pytest.mark.parametrize("kind", VARIES)
def test_fewer_turns_leave_the_vectors_of_the_others(kind):
    _, body = normed_body(kind)
    before = values(body)
    body(rows, times=2, training=True)
    for path, value in values(body).items():
        moved = (value != before[path]).reshape(5, -1).any(axis=1) if path.endswith(("_u", "_v")) else np.zeros(5)
        if kind == "a part, then the norm" and path.endswith("_u"):
            assert moved.tolist() == [True, True, False, False, False]
        assert not moved[2:].any()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16"])
def test_training_is_the_same_in_a_loop_and_written_out(dtype, remat):
    found = {}
    for unroll in (False, True):
        model, _ = normed_body("a part, then the norm", unroll, dtype, remat and unroll is False)
        model.compile(keras.optimizers.SGD(0.01), "mse")
        before = values(model)
        model.fit(rows, rows, batch_size=3, epochs=2, shuffle=False, verbose=0)
        found[unroll] = values(model)
        assert all(not np.array_equal(found[unroll][path], before[path]) for path in before)
    assert_same(found[False], found[True], atol=2e-5 if dtype is None else 2e-2)


@pytest.mark.parametrize("way", ["keras", "weights", "safetensors", "clone", "apart"])
def test_the_vectors_are_kept(way, tmp_path):
    model, body = normed_body("a part, then the norm")
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(rows, rows, batch_size=3, verbose=0)
    wanted = model.predict(rows, verbose=0)
    if way == "keras":
        model.save(tmp_path / "m.keras")
        other = tether.files.load_model(tmp_path / "m.keras")
    elif way == "apart":
        x = y = keras.Input((WIDTH,))
        for layer in body.layers():
            y = layer(y)
        other = keras.Model(x, y)
        assert {id(v) for v in other.weights} == {id(v) for v in model.weights}
    else:
        other = keras.models.clone_model(model)
        if way == "clone":
            other.set_weights(model.get_weights())
        elif way == "weights":
            model.save_weights(tmp_path / "m.weights.h5")
            other.load_weights(tmp_path / "m.weights.h5")
        else:
            tether.files.save_safetensors(model, tmp_path / "m.safetensors")
            tether.files.load_safetensors(other, tmp_path / "m.safetensors")
    np.testing.assert_allclose(other.predict(rows, verbose=0), wanted, rtol=1e-4, atol=1e-5)
    before = values(other)
    other.compile(keras.optimizers.SGD(0.01), "mse")
    other.fit(rows, rows, batch_size=6, verbose=0)
    assert all((values(other)[path] != before[path]).any() for path in before)


def test_a_bank_of_normed_weights_goes_on_at_the_number_that_is_read():
    weights = [tether.Weight(np.random.RandomState(n).randn(8, 4).astype("float32"), name="w") for n in range(3)]
    expressions = [tether.forms.spectral_norm()(w) for w in weights]
    known = [[w.numpy() for w in e.weights_used()] for e in expressions]
    number = Argument("number", (), "int32", default=0)
    layer = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=tether.bank(expressions, number))
    kernel, u, v = normed(*known[1])
    np.testing.assert_allclose(array(layer(rows, number=1, training=True)), rows @ kernel, rtol=1e-4, atol=1e-5)
    bank = tether.weight_of(layer, "kernel")
    apart = tether.unbank(bank)
    for place, expression in enumerate(apart):
        wanted = (known[1][0], u, v) if place == 1 else known[place]
        for weight, value in zip(expression.weights_used(), wanted, strict=True):
            np.testing.assert_allclose(weight.numpy(), value, atol=1e-6)
    wanted = normed(*(w.numpy() for w in apart[2].weights_used()))[0]
    np.testing.assert_allclose(array(layer(rows, number=2, training=True)), rows @ wanted, rtol=1e-4, atol=1e-5)

"""`tether.Repeat`: one block used several times, with what each turn has of its own, in a loop or one by one."""

import os
import re

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tether import files
from tether.errors import ShapeMismatch, TetherError, UnknownName

pytestmark = pytest.mark.spread

BACKEND = keras.backend.backend()
WIDTH = 8
rows = np.random.RandomState(0).randn(6, WIDTH).astype("float32")
targets = np.random.RandomState(1).randn(6, 1).astype("float32")


@keras.saving.register_keras_serializable(package="test_repeat")
class Residual(keras.layers.Layer):
    """A block with moving statistics, dropout, a penalty of its activity and one of its kernel."""

    def __init__(self, rate=0.3, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.norm = keras.layers.BatchNormalization(name="norm", momentum=0.5)
        self.dense = keras.layers.Dense(
            WIDTH, activation="tanh", name="dense", activity_regularizer=keras.regularizers.L2(1e-2),
            kernel_regularizer=keras.regularizers.L2(1e-2),
        )  # fmt: skip
        self.drop = keras.layers.Dropout(rate, name="drop")

    def build(self, shape):
        self.norm.build(shape)
        self.dense.build(shape)

    def call(self, x, training=None):
        return x + self.drop(self.dense(self.norm(x, training=training)), training=training)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(package="test_repeat")
class Attends(keras.layers.Layer):
    """A block of two inputs: it attends to a context that all turns share."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.attention = keras.layers.MultiHeadAttention(2, 4, name="attention")

    def build(self, x_shape, context_shape):
        self.attention.build(x_shape, context_shape)

    def call(self, x, context, mask=None):
        mask = None if mask is None else mask[:, :, None]
        return x + self.attention(x, context, attention_mask=mask)


@keras.saving.register_keras_serializable(package="test_repeat")
class Cached(keras.layers.Layer):
    """A block that is handed a cache for each turn, and hands it back."""

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], shape[-1]), initializer="glorot_uniform")

    def call(self, x, cache=None):
        y = ops.tanh(ops.matmul(x, self.kernel) + cache)
        return y, cache + ops.sum(y, keepdims=True)


VARY = {"dense/kernel": tether.low_rank(2), "dense/bias": "own", "norm/gamma": tether.forms.scale()}


def spread_out(layer, seed=5):
    """Gives everything that trains values that differ from turn to turn."""
    drawn = np.random.RandomState(seed)
    for weight in layer.trainable_weights:
        weight.assign(drawn.randn(*weight.shape) * 0.1)


def model_of(unroll="auto", times=5, state="own", vary=VARY, block=None, **kwargs):
    keras.utils.set_random_seed(3)
    x = keras.Input((WIDTH,))
    body = tether.Repeat(
        Residual(name="block") if block is None else block, times, vary=vary, state=state, unroll=unroll, name="body",
        **kwargs,
    )  # fmt: skip
    model = keras.Model(x, keras.layers.Dense(1, name="out")(body(x)))
    spread_out(body)
    return model, body


def values(model):
    """By path; Keras numbers its seed generators through the process."""
    return {
        re.sub(r"seed_generator(_\d+)?/", "seeds/", v.path): np.array(ops.convert_to_numpy(v)) for v in model.variables
    }


def assert_same(found, wanted, atol=2e-5):
    assert found.keys() == wanted.keys()
    for path in found:
        np.testing.assert_allclose(
            found[path].astype("float64"), wanted[path].astype("float64"), atol=atol, rtol=1e-4, err_msg=path
        )


# ------------------------------------------------------------------ what is stored


def test_each_weight_is_stored_once_and_what_turns_have_of_their_own_is_stacked():
    model, body = model_of(vary={"dense/kernel": tether.low_rank(2), "dense/bias": "own"})
    shapes = {w.path: tuple(w.shape) for w in model.weights}
    assert shapes == {
        "body/block/norm/gamma": (WIDTH,),
        "body/block/norm/beta": (WIDTH,),
        "body/block/norm/moving_mean": (5, WIDTH),
        "body/block/norm/moving_variance": (5, WIDTH),
        "body/block/dense/kernel": (WIDTH, WIDTH),
        "body/block/dense/kernel_lora_a": (5, WIDTH, 2),
        "body/block/dense/kernel_lora_b": (5, 2, WIDTH),
        "body/block/dense/bias": (5, WIDTH),
        "out/kernel": (WIDTH, 1),
        "out/bias": (1,),
    }
    one = WIDTH * WIDTH + 2 * WIDTH
    assert body.count_params() == one + 5 * (2 * 2 * WIDTH + WIDTH + 2 * WIDTH)
    assert body.stored_turns() == 5


def test_the_config_does_not_grow_with_the_number_of_turns():
    sizes = {len(str(model_of(times=times)[1].get_config())) for times in (10, 20, 90)}
    assert len(sizes) == 1


def test_the_parts_start_so_that_each_turn_is_the_block():
    block = keras.layers.Dense(WIDTH, activation="tanh")
    y = block(rows)
    body = tether.Repeat(block, 3, vary={"kernel": tether.low_rank(2), "bias": "own"})
    found = body(rows)
    for _ in range(2):
        y = block(y, depth=0)
    np.testing.assert_allclose(ops.convert_to_numpy(found), ops.convert_to_numpy(y), atol=1e-6)


def test_a_stack_has_the_regularizer_of_the_weight_at_each_turn():
    model, body = model_of()
    kernel = next(w for w in body.weights if w.path.endswith("dense/kernel")).numpy()
    a, b = (next(w for w in body.weights if w.path.endswith(f"kernel_lora_{c}")).numpy() for c in "ab")
    wanted = sum(0.01 * np.sum((kernel + a[turn] @ b[turn]) ** 2) for turn in range(5))
    np.testing.assert_allclose(float(sum(map(ops.convert_to_numpy, model.losses))), wanted, rtol=1e-4)


# ------------------------------------------------------------------ a loop, one by one, apart: the same numbers


@pytest.mark.parametrize("state", ["own", "shared"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_gives_the_numbers_of_turns_one_by_one(state, remat):
    found = {}
    for unroll in (False, True):
        model, _ = model_of(unroll, state=state, remat=remat and unroll is False)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.5), "mse", metrics=["mae"])
        history = model.fit(rows, targets, batch_size=3, epochs=2, shuffle=False, verbose=0).history
        found[unroll] = {
            **values(model), "loss": np.array(history["loss"]), "mae": np.array(history["mae"]),
            "predicted": model.predict(rows, verbose=0), "tested": np.array(model.evaluate(rows, targets, verbose=0)),
        }  # fmt: skip
    assert_same(found[False], found[True])
    moved = [path for path in found[True] if "moving" in path or "seed" in path]
    assert len(moved) == 3


@pytest.mark.parametrize("state", ["own", "shared"])
def test_the_turns_as_layers_of_their_own_are_the_same_weights(state):
    model, body = model_of(state=state)
    x = keras.Input((WIDTH,))
    y = x
    for layer in body.layers():
        y = layer(y)
    apart = keras.Model(x, model.get_layer("out")(y))
    assert {id(v) for v in apart.weights} == {id(v) for v in model.weights}
    np.testing.assert_allclose(apart.predict(rows, verbose=0), model.predict(rows, verbose=0), atol=1e-5)
    optimizer = keras.optimizers.Adam(0.01)
    apart.compile(optimizer, "mse")
    before = values(model)
    apart.fit(rows, targets, epochs=1, verbose=0)
    model.compile(optimizer, "mse")  # the same slots
    model.fit(rows, targets, epochs=1, verbose=0)
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 2
    changed = [path for path, value in values(model).items() if not np.array_equal(value, before[path])]
    assert {"body/block/dense/kernel", "body/block/dense/kernel_lora_a", "body/block/dense/bias"} <= set(changed)


def test_gradients_are_the_sum_over_turns():
    block = keras.layers.Dense(WIDTH, use_bias=False)
    body = tether.Repeat(block, 3, vary={"kernel": tether.low_rank(1)})
    x = keras.Input((WIDTH,))
    model = keras.Model(x, body(x))
    spread_out(body)
    before = values(model)
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    model.fit(rows, rows, batch_size=6, epochs=1, verbose=0)
    after = values(model)
    kernel, a, b = (before[next(p for p in before if p.endswith(end))] for end in ("kernel", "_a", "_b"))
    whole = [kernel + a[turn] @ b[turn] for turn in range(3)]
    states = [rows]
    for w in whole:
        states.append(states[-1] @ w)
    gradient = 2 * (states[-1] - rows) / rows.size
    total = np.zeros_like(kernel)
    for turn in reversed(range(3)):
        of_turn = states[turn].T @ gradient
        total += of_turn
        found = (before["dense/kernel_lora_a" if False else next(p for p in before if p.endswith("_a"))][turn]
                 - after[next(p for p in after if p.endswith("_a"))][turn]) / 1e-3  # fmt: skip
        np.testing.assert_allclose(found, of_turn @ b[turn].T, rtol=2e-2, atol=2e-3)
        gradient = gradient @ whole[turn].T
    path = next(p for p in before if p.endswith("kernel"))
    np.testing.assert_allclose((before[path] - after[path]) / 1e-3, total, rtol=2e-2, atol=2e-3)


def test_turns_and_steps_draw_other_numbers():
    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(1)

        def call(self, x):
            return x + keras.random.normal(ops.shape(x), seed=self.seeds)

    x = keras.Input((4,))
    body = tether.Repeat(Noise(), 6, outputs="all", unroll=False)
    model = keras.Model(x, body(x))
    drawn = np.concatenate([np.diff(ops.convert_to_numpy(model.predict(np.zeros((2, 4)), verbose=0)), axis=0)] * 1)
    again = np.diff(ops.convert_to_numpy(model.predict(np.zeros((2, 4)), verbose=0)), axis=0)
    noises = [drawn[turn] for turn in range(5)] + [again[turn] for turn in range(5)]
    assert all(not np.allclose(a, b) for i, a in enumerate(noises) for b in noises[:i])


# ------------------------------------------------------------------ what passes through


@pytest.mark.parametrize("unroll", [False, True])
def test_common_arguments_and_a_mask_reach_each_turn(unroll):
    keras.utils.set_random_seed(0)
    block = Attends(name="block")
    body = tether.Repeat(block, 4, unroll=unroll, vary={"attention/query/kernel": tether.low_rank(1)})
    ids, context = keras.Input((5,), dtype="int32"), keras.Input((3, WIDTH))
    x = keras.layers.Embedding(10, WIDTH, mask_zero=True)(ids)
    model = keras.Model([ids, context], body(x, context))
    spread_out(body)
    number = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]])
    other = np.random.RandomState(4).randn(2, 3, WIDTH).astype("float32")
    y = ops.convert_to_numpy(model.layers[[type(each).__name__ for each in model.layers].index("Embedding")](number))
    wanted = ops.convert_to_tensor(y)
    for turn in range(4):
        wanted = block(wanted, other, mask=ops.convert_to_tensor(number != 0), depth=turn)
    np.testing.assert_allclose(model.predict([number, other], verbose=0), ops.convert_to_numpy(wanted), atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True])
def test_a_cache_for_each_turn_goes_in_and_comes_out(unroll):
    body = tether.Repeat(Cached(name="block"), 5, stacked=("cache",), unroll=unroll)
    x, cache = keras.Input((WIDTH,)), keras.Input(batch_shape=(5, 1, 1))
    y, after = body(x, cache=cache)
    assert (y.shape, after.shape) == ((None, WIDTH), (5, 1, 1))
    body_of = lambda x, c: keras.Model([x, cache], [y, after])  # noqa: E731
    given = np.arange(5, dtype="float32").reshape(5, 1, 1)
    found, caches = body(ops.convert_to_tensor(rows), cache=ops.convert_to_tensor(given))
    state, wanted = rows, []
    kernel = body.block.kernel.numpy()
    for turn in range(5):
        state = np.tanh(state @ kernel + given[turn])
        wanted.append(given[turn] + state.sum(keepdims=True))
    np.testing.assert_allclose(ops.convert_to_numpy(found), state, atol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(caches), np.stack(wanted), rtol=1e-4, atol=1e-4)
    assert body_of is not None
    with pytest.raises(ShapeMismatch, match=r"each of 5 turns.*shape=\(4, 1, 1\)"):
        body(ops.convert_to_tensor(rows), cache=ops.convert_to_tensor(given[:4]))


def test_all_outputs_and_another_number_of_turns():
    _, body = model_of(outputs="last")
    all_of = tether.Repeat(body.block, 5, outputs="all", unroll=True)
    every = ops.convert_to_numpy(all_of(rows))
    assert every.shape == (5, 6, WIDTH)
    for turns in (1, 2, 5):
        np.testing.assert_allclose(ops.convert_to_numpy(body(rows, times=turns)), every[turns - 1], atol=1e-5)
    with pytest.raises(TetherError, match=r"1 to 5.*times=6"):
        body(rows, times=6)
    shared = tether.Repeat(keras.layers.Dense(WIDTH), 2)
    shared(rows)
    assert shared(rows, times=9).shape == (6, WIDTH)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("unroll", [False, True])
def test_the_precision_of_the_block_is_kept(dtype, unroll):
    block = keras.layers.Dense(WIDTH, activation="tanh", dtype=dtype)
    body = tether.Repeat(block, 5, vary={"kernel": tether.low_rank(2)}, unroll=unroll)
    x = keras.Input((WIDTH,))
    model = keras.Model(x, keras.layers.Dense(1)(body(x)))
    wide = {"mixed_bfloat16": "bfloat16"}.get(dtype, dtype)
    assert keras.backend.standardize_dtype(body(rows).dtype) == wide == body(x).dtype
    model.compile("sgd", "mse")
    model.fit(rows, targets, verbose=0)
    stored = {w.path.rpartition("/")[2]: keras.backend.standardize_dtype(w.dtype) for w in body.weights}
    assert stored["kernel"] == {"mixed_bfloat16": "float32"}.get(dtype, dtype)


def test_a_repeat_in_a_repeat():
    def build(unroll):
        inner = tether.Repeat(
            keras.layers.Dense(WIDTH, activation="tanh", name="dense"),
            4,
            vary={"bias": "own"},
            unroll=unroll,
            name="inner",
        )
        outer = tether.Repeat(
            inner, 4, vary={"block/kernel": tether.low_rank(1)}, argument="round", unroll=unroll, name="outer"
        )
        x = keras.Input((WIDTH,))
        model = keras.Model(x, outer(x))
        spread_out(outer)
        return model

    looped, written = build(False), build(True)
    assert {tuple(w.shape) for w in looped.weights} == {(WIDTH, WIDTH), (4, WIDTH, 1), (4, 1, WIDTH), (4, WIDTH)}
    found = written.predict(rows, verbose=0)
    np.testing.assert_allclose(looped.predict(rows, verbose=0), found, atol=1e-5)
    value = rows
    named = {w.path.rpartition("/")[2]: w.numpy() for w in written.weights}
    for outer_turn in range(4):
        for turn in range(4):
            kernel = named["kernel"] + named["kernel_lora_a"][outer_turn] @ named["kernel_lora_b"][outer_turn]
            value = np.tanh(value @ kernel + named["bias"][turn])
    np.testing.assert_allclose(found, value, atol=1e-5)


def test_a_state_of_an_expression_goes_on_at_each_turn():
    def build(unroll):
        keras.utils.set_random_seed(2)
        block = keras.layers.Dense(WIDTH, use_bias=False, name="dense")
        block.build((None, WIDTH))
        tether.tie(block, kernel=tether.forms.spectral_norm(1)(tether.weight_of(block, "kernel")))
        body = tether.Repeat(block, 4, unroll=unroll)
        x = keras.Input((WIDTH,))
        model = keras.Model(x, body(x))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(rows, rows, batch_size=6, verbose=0)
        return values(model)

    assert_same(build(False), build(True))


def test_a_model_is_a_block():
    x = keras.Input((WIDTH,))
    y = keras.layers.Dense(WIDTH, activation="relu", name="one")(x)
    block = keras.Model(x, keras.layers.Dense(WIDTH, name="two")(y), name="block")
    found = {}
    for unroll in (False, True):
        body = tether.Repeat(keras.models.clone_model(block), 4, vary={"*/kernel": tether.low_rank(1)}, unroll=unroll)
        model = keras.Model(x, body(x))
        spread_out(body)
        found[unroll] = model.predict(rows, verbose=0)
    np.testing.assert_allclose(found[False], found[True], atol=1e-5)


@keras.saving.register_keras_serializable(package="test_repeat")
class Whole(keras.Model):
    """A model of a user's own without a `build`: its layers are built by a trace."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = tether.Repeat(
            Residual(name="block"), 5, vary={"dense/kernel": tether.low_rank(1), "norm/beta": "own"}
        )
        self.out = keras.layers.Dense(1)

    def call(self, x, training=None):
        return self.out(self.body(x, training=training))


def test_a_model_of_ones_own_is_built_by_a_trace_saved_and_loaded(tmp_path):
    model = Whole()
    model.compile("adam", "mse")
    model.fit(rows, targets, verbose=0)
    variance = next(w for w in model.weights if w.path.endswith("moving_variance"))
    assert variance.shape == (5, WIDTH) and (variance.numpy() > 0).all()
    factors = next(w for w in model.weights if w.path.endswith("kernel_lora_a")).numpy()
    assert not np.allclose(factors[0], factors[1])
    wanted = model.predict(rows, verbose=0)
    model.save(tmp_path / "m.keras")
    for loaded in (keras.saving.load_model(tmp_path / "m.keras"), files.load_model(tmp_path / "m.keras")):
        np.testing.assert_array_equal(loaded.predict(rows, verbose=0), wanted)
    loaded.compile("adam", "mse")
    loaded.fit(rows, targets, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    loaded.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(loaded.predict(rows, verbose=0), wanted)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras's metrics in a layer need more than its `variables` there")
def test_metrics_of_the_block_count_every_turn():
    @keras.saving.register_keras_serializable(package="test_repeat")
    class Counted(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(WIDTH, name="dense")
            self.mean = keras.metrics.Mean(name="mean_of_turns")

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            y = ops.tanh(self.dense(x))
            self.mean.update_state(ops.mean(y))
            self.add_loss(0.1 * ops.mean(ops.square(y)))
            return y

    found = {}
    for unroll in (False, True):
        keras.utils.set_random_seed(1)
        x = keras.Input((WIDTH,))
        model = keras.Model(x, tether.Repeat(Counted(), 5, unroll=unroll)(x))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        found[unroll] = model.fit(rows, rows, batch_size=6, epochs=2, verbose=0, shuffle=False).history
        assert found[unroll]["mean_of_turns"][0] != 0
    for name, value in found[True].items():
        np.testing.assert_allclose(found[False][name], value, rtol=1e-4)


# ------------------------------------------------------------------ stochastic depth, halting


def test_stochastic_depth_leaves_turns_out_in_training_and_weighs_them_otherwise():
    block = keras.layers.Dense(WIDTH, kernel_initializer="zeros", bias_initializer="ones")
    body = tether.Repeat(block, 1, skip_rate=0.5)
    wanted = 0.5 * rows + 0.5
    np.testing.assert_allclose(ops.convert_to_numpy(body(rows)), wanted, atol=1e-6)
    trained = ops.convert_to_numpy(body(np.repeat(rows, 50, 0), training=True))
    kept = (trained == 1).all(-1)
    assert ((trained == np.repeat(rows, 50, 0)).all(-1) | kept).all()
    assert 0.3 < kept.mean() < 0.7


@pytest.mark.parametrize("unroll", [False, True])
def test_a_halting_function_weighs_the_turns(unroll):
    @keras.saving.register_keras_serializable(package="test_repeat", name=f"Half{unroll}")
    class Half(keras.layers.Layer):
        def call(self, y):
            return 0.4 * ops.ones_like(y[..., :1])

    block = keras.layers.Dense(WIDTH, kernel_initializer="identity", bias_initializer="ones")
    body = tether.Repeat(block, 5, halt=Half(), ponder_cost=0.1, unroll=unroll)
    x = keras.Input((WIDTH,))
    model = keras.Model(x, body(x))
    # weights of the turns: 0.4, 0.4, and what is left: 0.2
    wanted = rows + 0.4 * 1 + 0.4 * 2 + 0.2 * 3
    np.testing.assert_allclose(model.predict(rows, verbose=0), wanted, atol=1e-5)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    loss = model.fit(rows, wanted, batch_size=6, verbose=0).history["loss"][0]
    np.testing.assert_allclose(loss, 0.1 * (3 + 0.2), atol=1e-5)


# ------------------------------------------------------------------ files and copies


def test_it_is_saved_and_loaded_with_its_stacks(tmp_path):
    model, _ = model_of()
    model.compile("adam", "mse")
    model.fit(rows, targets, verbose=0)
    wanted = model.predict(rows, verbose=0)
    model.save(tmp_path / "m.keras")
    for loaded in (keras.saving.load_model(tmp_path / "m.keras"), files.load_model(tmp_path / "m.keras")):
        np.testing.assert_array_equal(loaded.predict(rows, verbose=0), wanted)
        assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    model.save(tmp_path / "again.keras")
    model.save_weights(tmp_path / "w.weights.h5")
    other, _ = model_of()
    other.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(other.predict(rows, verbose=0), wanted, atol=1e-6)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors")
    third, _ = model_of()
    tether.files.load_safetensors(third, tmp_path / "m.safetensors")
    np.testing.assert_allclose(third.predict(rows, verbose=0), wanted, atol=1e-6)


def test_files_of_more_turns_grow_by_the_small_parts_alone(tmp_path):
    sizes = []
    for times in (10, 20):
        model, _ = model_of(times=times, state="shared")
        tether.files.save_safetensors(model, tmp_path / f"{times}.safetensors")
        sizes.append((os.path.getsize(tmp_path / f"{times}.safetensors"), model.count_params()))
    (small, few), (large, many) = sizes
    assert many - few == 10 * (2 * 2 * WIDTH + WIDTH + 1) or many > few
    assert 0 <= (large - small) - 4 * (many - few) < 64


def test_copies_have_stacks_of_their_own():
    model, _ = model_of()
    clone = keras.models.clone_model(model)
    assert [w.path for w in clone.weights] == [w.path for w in model.weights]
    assert not {id(v) for v in clone.weights} & {id(v) for v in model.weights}
    variance = next(w for w in clone.weights if w.path.endswith("variance"))
    assert (variance.numpy() == 1).all()
    factor = next(w for w in clone.weights if w.path.endswith("lora_a")).numpy()
    assert (factor.std(axis=(1, 2)) > 0).all() and not np.allclose(factor[0], factor[1])
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(clone.predict(rows, verbose=0), model.predict(rows, verbose=0), atol=1e-6)


def test_a_part_added_later_is_shared_by_all_turns():
    model, body = model_of()
    before = model.predict(rows, verbose=0)
    tether.adapters.add(model, "more", {"*/dense/kernel": tether.low_rank(1)})
    np.testing.assert_allclose(model.predict(rows, verbose=0), before, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit(rows, targets, verbose=0)
    with tether.adapters.disabled(model):
        model.predict(rows, verbose=0)
    assert body.stored_turns() == 5
    assert [w.path for w in body.weights if "_1" in w.path] == [
        "body/block/dense/kernel_lora_a_1", "body/block/dense/kernel_lora_b_1",
    ]  # fmt: skip


def test_it_is_looked_at():
    model, _ = model_of()
    text = str(tether.summary(model))
    assert "dense.bias[depth]" in text and "(5, 8)" in text
    assert not [finding for finding in tether.check(model) if finding.severity == "error"]


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 0), TetherError, "1 or more.*times=0"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), True), TetherError, "times=True"),
        (lambda: tether.Repeat(tether.Weight((2,), name="w"), 2), TetherError, "Weight"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, vary=["kernel"]), TetherError, "forms by path"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, state="mine"), TetherError, "'own', 'shared'"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, unroll=1), TetherError, "unroll=1"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, skip_rate=1.0), TetherError, "skip_rate=1.0"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, stacked="cache"), TetherError, "stacked='cache'"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, halt=3), TetherError, "halt=3"),
        (lambda: tether.Repeat(keras.layers.Dense(3, name="other"), 2)(rows), ShapeMismatch, "'other'.*shape of its"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, vary={"kernl": "own"})(rows), UnknownName, "kernl"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, vary={"*nothing": "own"})(rows), UnknownName, "fits"),
        (lambda: tether.Repeat(keras.layers.Dense(WIDTH), 2, vary={"kernel": 8})(rows), TetherError, "'kernel'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_what_varies_is_not_lost_before_the_layer_is_built():
    body = tether.Repeat(keras.layers.Dense(WIDTH), 2, vary={"kernel": tether.low_rank(1)})
    with pytest.raises(TetherError, match="not built"):
        body.get_config()


def test_a_call_parameter_of_the_depths_name_is_refused():
    class Deep(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(name="kernel", shape=(shape[-1],))

        def call(self, x, depth=1):
            return x * self.kernel * depth

    with pytest.raises(TetherError, match="argument='turn'"):
        tether.Repeat(Deep(), 2, vary={"kernel": "own"})(rows)
    assert tether.Repeat(Deep(), 2, vary={"kernel": "own"}, argument="turn")(rows).shape == rows.shape


# ------------------------------------------------------------------ other roads


@pytest.mark.filterwarnings("ignore:Layer .*quantize")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_block_is_quantised_under_its_turns(mode, tmp_path):
    model, body = model_of()
    before = model.predict(rows, verbose=0)
    model.quantize(mode)
    after = model.predict(rows, verbose=0)
    assert 0 < np.abs(after - before).max() < (0.1 if mode == "int8" else 1)
    roles = {w.role for w in body.block.dense.kernel.expression.weights_used()}
    assert {"integers", "scale", "part"} == roles
    model.save(tmp_path / "q.keras")
    np.testing.assert_array_equal(files.load_model(tmp_path / "q.keras").predict(rows, verbose=0), after)


def test_untie_and_materialize_say_to_take_the_turns_apart_and_change_nothing():
    model, body = model_of()
    before, wanted = values(model), model.predict(rows, verbose=0)
    for verb in (tether.untie, tether.materialize):
        with pytest.raises(TetherError, match=r"repeat\.layers\(\)"):
            verb(model)
    assert_same(values(model), before, atol=0)
    np.testing.assert_array_equal(model.predict(rows, verbose=0), wanted)
    x = keras.Input((WIDTH,))
    y = x
    for layer in body.layers():
        y = layer(y)
    plain = tether.materialize(keras.Model(x, model.get_layer("out")(y)))
    np.testing.assert_allclose(plain.predict(rows, verbose=0), wanted, atol=1e-6)
    assert not any(isinstance(layer, (tether.Weight, tether.Repeat)) for layer in plain._flatten_layers())


@pytest.mark.parametrize("remat", [False, True])
def test_a_dropout_of_a_part_draws_other_numbers_at_each_turn(remat):
    found = {}
    for unroll in (False, True):
        vary = {"dense/kernel": tether.low_rank(2, dropout=0.5, seed=5)}
        model, _ = model_of(unroll, vary=vary, remat=remat and not unroll)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(rows, targets, batch_size=3, epochs=2, verbose=0, shuffle=False)
        found[unroll] = values(model)
    assert_same(found[False], found[True])
    (state,) = [value for path, value in found[True].items() if path.endswith("dropout")]
    once = tether.Repeat(keras.layers.Dense(WIDTH), 1, vary={"kernel": tether.low_rank(2, dropout=0.5, seed=5)})
    once(rows)
    assert state[1] > 0 and state[0] == 5


EXPORTS = {"tensorflow": ("onnx", "tf_saved_model"), "jax": ("onnx", "tf_saved_model"), "torch": ("onnx", "torch")}[
    BACKEND
]


@pytest.mark.spread(3)  # each backend has its own formats
@pytest.mark.parametrize("format", EXPORTS)
def test_it_is_exported(format, tmp_path):
    block = keras.layers.Dense(WIDTH, activation="tanh", name="dense")
    x = keras.Input((WIDTH,))
    body = tether.Repeat(block, 5, vary={"kernel": tether.low_rank(2), "bias": "own"}, unroll=False)
    model = keras.Model(x, body(x))
    spread_out(body)
    ends = {"onnx": "m.onnx", "tf_saved_model": "m", "torch": "m.pt2"}
    files.export(model, tmp_path / ends[format], format)  # runs it and compares


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.skipif(BACKEND != "torch", reason="`torch.compile` is PyTorch's")
@pytest.mark.parametrize("first", ["a layer's output", "a model's input"])
def test_a_turn_is_compiled_once_for_all_turns(first):
    import torch
    from torch._dynamo.testing import CompileCounter

    block = keras.layers.Dense(WIDTH, activation="tanh")
    body = tether.Repeat(block, 12, vary={"kernel": tether.low_rank(2)}, compile_turn=True)
    plain = tether.Repeat(block, 12)
    body.build((None, WIDTH))
    spread_out(body)
    x = torch.tensor(rows, requires_grad=True) * 1 if first == "a layer's output" else torch.tensor(rows)
    counter, whole = CompileCounter(), torch.compile
    torch._dynamo.reset()
    try:
        torch.compile = lambda function: whole(function, backend=counter)
        for _ in range(3):
            found = body(x)
    finally:
        torch.compile = whole
        torch._dynamo.reset()
    assert counter.frame_count == 1
    np.testing.assert_allclose(ops.convert_to_numpy(found), ops.convert_to_numpy(plain(rows)), atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA under TensorFlow")
def test_a_loop_of_tensorflow_keeps_less_for_its_gradient_under_xla():
    import tensorflow as tf

    body = tether.Repeat(keras.layers.Dense(WIDTH, activation="gelu"), 6, unroll=False)
    body.build((None, WIDTH))

    def gradient(x):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(body(x, training=True) ** 2)
        return tape.gradient(total, body.trainable_weights[0].value)

    kept, found = [], []
    for jit in (False, True):
        function = tf.function(gradient, jit_compile=jit)
        found.append(function(rows).numpy())
        graph = function.get_concrete_function(tf.TensorSpec(rows.shape)).graph.as_graph_def()
        kept.append(str(graph).count('op: "TensorListPushBack"'))
    assert 0 < kept[1] < kept[0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_a_second_repeat_of_a_block_needs_a_name_of_its_own_for_the_depth():
    block = keras.layers.Dense(WIDTH)
    first = tether.Repeat(block, 2, vary={"kernel": tether.low_rank(1)})
    first(rows)
    with pytest.raises(TetherError, match=r"argument='round'"):
        tether.Repeat(block, 3, vary={"kernel": tether.low_rank(1)})(rows)
    assert first(rows).shape == rows.shape


@pytest.mark.parametrize("unroll", [False, True])
def test_what_a_block_returns_besides_is_whole_where_all_have_halted(unroll):
    @keras.saving.register_keras_serializable(package="test_repeat", name=f"Now{unroll}")
    class Now(keras.layers.Layer):
        def call(self, y):
            return ops.ones_like(y[..., :1])

    body = tether.Repeat(Cached(), 5, stacked=("cache",), halt=Now(), unroll=unroll)
    x, cache = keras.Input((WIDTH,)), keras.Input(batch_shape=(5, 1, 1))
    model = keras.Model([x, cache], body(x, cache=cache))
    given = [rows[:5], np.zeros((5, 1, 1), "float32")]
    found, caches = model.predict_on_batch(given)
    np.testing.assert_allclose(found, np.tanh(rows[:5] @ body.block.kernel.numpy()), atol=1e-5)
    assert caches.shape == (5, 1, 1) and (caches[1:] != 0).all()


# --------------------------------------------------------------------------- layers that exist


def apart(depth=4, **kinds):
    """A model of blocks that are layers of their own, and its blocks."""
    x = y = keras.Input((WIDTH,))
    blocks = [keras.layers.Dense(WIDTH, activation="tanh", name=f"block_{place}") for place in range(depth)]
    for block in blocks:
        y = block(y)
    return keras.Model(x, keras.layers.Dense(1, name="out")(y)), blocks


SHARED = {
    "nothing": (lambda model: model, {"kernel": (4, WIDTH, WIDTH), "bias": (4, WIDTH)}),
    "kernels": (
        lambda model: tether.share_depth(model, "all", blocks="block_*", only="*kernel"),
        {"kernel": (WIDTH, WIDTH), "bias": (4, WIDTH)},
    ),
    "a sandwich": (
        lambda model: tether.share_depth(model, "sandwich", blocks="block_*"),
        {"kernel": (3, WIDTH, WIDTH), "bias": (3, WIDTH)},
    ),
    "a cycle": (
        lambda model: tether.share_depth(model, "cycle:2", blocks="block_*"),
        {"kernel": (2, WIDTH, WIDTH), "bias": (2, WIDTH)},
    ),
    "parts": (
        lambda model: tether.share_depth(
            model, "all", blocks="block_*", only="*kernel", values=tether.low_rank(2, seed=1)
        ),
        {
            "kernel": (WIDTH, WIDTH),
            "kernel_lora_a": (4, WIDTH, 2),
            "kernel_lora_b": (4, 2, WIDTH),
            "bias": (4, WIDTH),
        },
    ),
}


@pytest.mark.parametrize("how", SHARED)
def test_layers_become_turns_and_training_goes_on(how, tmp_path):
    share, shapes = SHARED[how]
    keras.utils.set_random_seed(1)
    model, blocks = apart()
    share(model)
    target = np.ones((len(rows), 1), "float32")
    model.compile("adam", "mse")
    model.fit(rows, target, epochs=2, shuffle=False, verbose=0)
    files.save_model(model, tmp_path / "apart.keras")
    right, before, count = (
        files.load_model(tmp_path / "apart.keras"),
        model.predict(rows, verbose=0),
        model.count_params(),
    )

    body = tether.Repeat.of(blocks)
    assert {weight.path.rpartition("/")[2]: tuple(weight.shape) for weight in body.weights} == shapes
    x = keras.Input((WIDTH,))
    together = keras.Model(x, model.get_layer("out")(body(x)))
    assert together.count_params() == model.count_params() == count
    for each in (together, model):
        np.testing.assert_allclose(each.predict(rows, verbose=0), before, atol=1e-6)

    together.compile(model.optimizer, "mse")
    for each in (together, right):
        each.fit(rows, target, epochs=2, shuffle=False, verbose=0)
    for each in (together, model):  # the layers follow
        np.testing.assert_allclose(each.predict(rows, verbose=0), right.predict(rows, verbose=0), atol=1e-5)
    files.save_model(together, tmp_path / "together.keras")
    for each in (files.load_model(tmp_path / "together.keras"), keras.models.clone_model(together)):
        assert each.count_params() == count
    with pytest.raises(TetherError, match="turns"):
        body(rows, times=5)


def test_turns_that_were_taken_apart_become_turns_again():
    block = keras.layers.Dense(WIDTH, activation="tanh")
    body = tether.Repeat(block, 3, vary={"kernel": tether.low_rank(2), "bias": "own"})
    body.build((None, WIDTH))
    spread_out(body)
    again = tether.Repeat.of(body.layers())
    assert {id(weight) for weight in again.weights} == {id(weight) for weight in body.weights}
    assert [tuple(weight.shape) for weight in again.stacks().values()] == [
        tuple(weight.shape) for weight in body.stacks().values()
    ]
    np.testing.assert_allclose(ops.convert_to_numpy(again(rows)), ops.convert_to_numpy(body(rows)), atol=1e-6)


def test_moving_statistics_of_layers_are_those_of_turns():
    blocks = [keras.Sequential([keras.layers.Dense(WIDTH), keras.layers.BatchNormalization()]) for _ in range(3)]
    for place, block in enumerate(blocks):
        block.build((None, WIDTH))
        block.layers[1].moving_mean.assign(np.full(WIDTH, 1.0 + place))
    y = rows
    for block in blocks:
        y = block(y)
    body = tether.Repeat.of(blocks)
    np.testing.assert_allclose(ops.convert_to_numpy(body(rows)), ops.convert_to_numpy(y), atol=1e-5)
    (mean,) = [weight for weight in body.weights if weight.path.endswith("moving_mean")]
    assert np.array_equal(mean.numpy()[:, 0], [1.0, 2.0, 3.0])


def test_layers_that_are_not_alike_become_no_turns():
    def built(layer, size=WIDTH):
        layer.build((None, size))
        return layer

    plain, frozen = built(keras.layers.Dense(WIDTH, name="a")), built(keras.layers.Dense(WIDTH, name="b"))
    frozen.trainable = False
    others = {
        "two layers or more": [plain],
        "not built": [plain, keras.layers.Dense(WIDTH)],
        "'bias'": [plain, built(keras.layers.Dense(WIDTH, use_bias=False))],
        "'kernel'": [plain, built(keras.layers.Dense(WIDTH), 3)],
        "frozen alike": [plain, frozen],
        "such as an activation": [plain, built(keras.layers.Dense(WIDTH, activation="tanh"))],
        "one class": [plain, built(keras.layers.EinsumDense("ab,bc->ac", WIDTH, bias_axes="c"))],
    }
    for words, layers in others.items():
        with pytest.raises(TetherError, match=words):
            tether.Repeat.of(layers)
    with pytest.raises(TetherError, match="leave `vary` out"):
        tether.Repeat.of([plain, built(keras.layers.Dense(WIDTH))], vary={"kernel": "own"})
    tied = tether.inherit(plain, kernel=tether.low_rank(1), name="c")
    with pytest.raises(TetherError, match="form"):
        tether.Repeat.of([plain, tied])
    assert isinstance(plain.kernel, keras.Variable) and len(plain.weights) == 2 and len(tied.weights) == 4

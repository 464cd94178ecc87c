"""A target that follows a source while it trains, against the same training by hand."""

import keras
import numpy as np
import pytest
from keras import layers

import tether
from tests.support import assert_close, numpy
from tether.errors import ShapeMismatch, TetherError, UnknownName, Unsupported

Follow = tether.transfer.Follow
RATE = 0.1
JITS = [False, True] if keras.backend.backend() != "torch" else [False]


def linear(names=("one", "two"), inputs=3):
    return keras.Sequential([keras.Input((inputs,)), *(layers.Dense(3, name=name) for name in names)])


def snapshot(layer):
    return [numpy(v).astype("float64") for v in layer.weights]


def step(weights, x, y):
    """One step of gradient descent of two linear layers under mean squared error."""
    A, a, B, b = weights
    h = x @ A + a
    d = 2 * (h @ B + b - y) / y.size
    e = d @ B.T
    return [A - RATE * x.T @ e, a - RATE * e.sum(0), B - RATE * h.T @ d, b - RATE * d.sum(0)]


def toward(target, source, momentum):
    return [momentum * t + (1 - momentum) * s for t, s in zip(target, source, strict=True)]


def assert_weights(layer, expected, tolerance=1e-5):
    for variable, value in zip(layer.weights, expected, strict=True):
        assert_close(variable, value, tolerance)


@pytest.fixture
def data(rng):
    return rng.normal(size=(24, 3)).astype("float32"), rng.normal(size=(24, 3)).astype("float32")


def batches(data, size=4, epochs=1):
    x, y = data
    for _ in range(epochs):
        for start in range(0, len(x), size):
            yield x[start : start + size], y[start : start + size]


def fit(model, data, *callbacks, epochs=1, **compile_arguments):
    optimizer = compile_arguments.pop("optimizer", None) or keras.optimizers.SGD(RATE)
    model.compile(optimizer, "mse", **compile_arguments)
    model.fit(*data, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_target_is_the_average_of_all_steps(momentum, jit, data):
    source, target = linear(), linear()
    w, t = snapshot(source), snapshot(target)
    for x, y in batches(data, epochs=2):
        w = step(w, x, y)
        t = toward(t, w, momentum)
    fit(source, data, Follow(target, source, momentum=momentum), epochs=2, jit_compile=jit)
    assert_weights(source, w)
    assert_weights(target, t)


@pytest.mark.parametrize("every", [2, 4, 100])
def test_every_so_many_steps(every, data):
    source, target = linear(), linear()
    w, t = snapshot(source), snapshot(target)
    for count, (x, y) in enumerate(batches(data, epochs=2), start=1):
        w = step(w, x, y)
        if count % every == 0:
            t = toward(t, w, 0.5)
    fit(source, data, Follow(target, source, momentum=0.5, every=every), epochs=2)
    assert_weights(target, t)


def test_a_second_fit_goes_on_counting(data):
    source, target = linear(), linear()
    w, t = snapshot(source), snapshot(target)
    follow = Follow(target, source, momentum=0.5, every=4)
    for count, (x, y) in enumerate(batches(data, epochs=2), start=1):
        w = step(w, x, y)
        if count % 4 == 0:
            t = toward(t, w, 0.5)
    fit(source, data, follow)
    source.fit(*data, batch_size=4, shuffle=False, verbose=0, callbacks=[follow])
    assert_weights(target, t)


def test_accumulated_gradients_do_not_move_the_target(data):
    source, target = linear(), linear()
    w, t = snapshot(source), snapshot(target)
    x, y = data
    for start in range(0, 24, 8):  # the mean of two batches of four is one batch of eight
        w = step(w, x[start : start + 8], y[start : start + 8])
        t = toward(t, w, 0.75)
    optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    fit(source, data, Follow(target, source, momentum=0.75), optimizer=optimizer)
    assert_weights(source, w)
    assert_weights(target, t)


UNSEEN = 1 if keras.backend.backend() == "torch" else 3  # Keras's PyTorch trainer makes single steps only


@pytest.mark.parametrize("every", [1, 2])
def test_steps_that_cannot_be_seen_count_all_the_same(every, data):
    source, target = linear(), linear()
    w, t = snapshot(source), snapshot(target)
    for count, (x, y) in enumerate(batches(data), start=1):
        w = step(w, x, y)
        if count % UNSEEN == 0:
            t = toward(t, w, 0.8 ** (count // every - (count - UNSEEN) // every))
    fit(source, data, Follow(target, source, momentum=0.8, every=every), steps_per_execution=UNSEEN)
    assert_weights(source, w)
    assert_weights(target, t)


def test_inside_a_model_whose_output_depends_on_the_target(data):
    """Student and teacher in one model, the teacher's output a part of the loss."""
    student, teacher = linear(), linear()
    teacher.trainable = False
    i = keras.Input((3,))
    model = keras.Model(i, student(i) + teacher(i))
    w, t = snapshot(student), snapshot(teacher)
    for x, y in batches(data, epochs=2):
        A, a, B, b = t
        w = step(w, x, y - ((x @ A + a) @ B + b))
        t = toward(t, w, 0.6)
    fit(model, data, Follow(teacher, student, momentum=0.6), epochs=2)
    assert_weights(student, w, 1e-4)
    assert_weights(teacher, t, 1e-4)


def test_parts_of_a_model_and_validation_in_between(data):
    source, target = linear(), linear()
    source.compile(keras.optimizers.SGD(RATE), "mse")
    w, t = snapshot(source), snapshot(target)
    for x, y in batches(data, epochs=2):
        w = step(w, x, y)
        t[:2] = toward(t[:2], w[:2], 0.5)
    source.fit(
        *data, batch_size=4, epochs=2, shuffle=False, verbose=0, validation_data=data,
        callbacks=[Follow(target.layers[0], source.layers[0], momentum=0.5)],
    )  # fmt: skip
    assert_weights(target, t)


def tied():
    table = tether.Weight((3, 3), "glorot_uniform", name="table")
    one = tether.tie(layers.Dense(3, name="one"), kernel=table)
    two = tether.tie(layers.Dense(3, name="two"), kernel=table.T)
    return keras.Sequential([keras.Input((3,)), one, two]), table


def recorded(model, data, *callbacks):
    """Fits, and returns the model's weights after each step."""
    found = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            found.append(snapshot(model))

    fit(model, data, Record(), *callbacks)
    return found


def test_tied_weights_move_once(data):
    (source, _), (target, _) = tied(), tied()
    t = snapshot(target)
    for w in recorded(source, data, Follow(target, source, momentum=0.5)):
        t = toward(t, w, 0.5)
    assert len(t) == 3
    assert_weights(target, t)


def test_a_plain_target_follows_what_a_tied_source_computes_with(data):
    (source, _), target = tied(), linear()
    start = numpy(target.layers[1].kernel).astype("float64")
    expected = start
    for w in recorded(source, data, Follow(target, source, momentum=0.5)):
        expected = 0.5 * expected + 0.5 * w[0].T
    assert_close(target.layers[1].kernel, expected)


def test_a_tied_target_follows_a_plain_source_through_its_expression(data):
    source, target = linear(), linear()
    kept = tether.Weight((3, 3), "glorot_uniform", name="kept")
    tether.tie(target.layers[0], kernel=kept.T)
    expected = kept.numpy().astype("float64")
    for w in recorded(source, data, Follow(target, source, momentum=0.5)):
        expected = 0.5 * expected + 0.5 * w[0].T
    assert_close(kept.numpy(), expected)


def test_moving_statistics_are_averaged_and_whole_numbers_copied(data):
    class Counting(layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls")

        def call(self, x, training=False):
            if training:
                self.calls.assign(self.calls.value + 1)
            return x

    def model():
        parts = [layers.BatchNormalization(name="norm"), Counting(name="count"), layers.Dense(3, name="dense")]
        return keras.Sequential([keras.Input((3,)), *parts])

    source, target = model(), model()
    t = snapshot(target)
    for w in recorded(source, data, Follow(target, source, momentum=0.5)):
        t = toward(t, w, 0.5)
    assert int(numpy(target.get_layer("count").calls)) == 6
    assert_close(target.get_layer("norm").moving_mean, t[2])
    assert np.abs(t[2]).max() > 0


def test_a_copy_now_and_then_stays_a_true_copy(data):
    source, target = linear(), linear()
    fit(source, data, Follow(target, source, momentum=0))
    assert_weights(target, snapshot(source), 0)
    before = snapshot(target)
    fit(source, data)
    assert_weights(target, before, 0)
    assert np.abs(snapshot(source)[0] - before[0]).max() > 1e-3


def test_a_target_of_16_bits_is_averaged_in_32():
    keras.config.set_dtype_policy("bfloat16")
    target = linear()
    keras.config.set_dtype_policy("float32")
    source = linear()
    before = numpy(keras.ops.cast(target.weights[0], "float32"))
    x = np.zeros((4, 3), "float32")
    source.compile(keras.optimizers.SGD(0.0), "mse")
    source.fit(x, x, batch_size=4, verbose=0, callbacks=[Follow(target, source, momentum=0.5)])
    expected = keras.ops.cast(0.5 * before + 0.5 * numpy(source.weights[0]), "bfloat16")
    assert_close(keras.ops.cast(target.weights[0], "float32"), keras.ops.cast(expected, "float32"), 0)


def test_match_names_other_paths_and_leaves_others_alone(data):
    source, target = linear(), linear(names=("slow", "head"))
    before = snapshot(target)
    fit(source, data, Follow(target, source, momentum=0, match={"slow/*": "one/*", "head/*": None}))
    assert_weights(target, snapshot(source)[:2] + before[2:], 1e-6)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments",
    [{"momentum": 1.0}, {"momentum": -0.1}, {"momentum": "0.9"}, {"every": 0}, {"every": 1.5}, {"every": True}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(TetherError, match=next(iter(arguments))):
        Follow(linear(), linear(), **arguments)


def test_what_cannot_be_followed_is_refused_at_once():
    source = linear()
    with pytest.raises(TetherError, match="itself"):
        Follow(source, source)
    with pytest.raises(TetherError, match="Keras layer"):
        Follow("target", source)
    with pytest.raises(ShapeMismatch, match=r"\(4, 3\).*\(3, 3\)"):
        Follow(linear(inputs=4), source)
    with pytest.raises(UnknownName, match=r"three/kernel.*match="):
        Follow(linear(names=("one", "three")), source)
    child = linear()
    tether.tie(child.layers[0], kernel=tether.weight_of(source, "one/kernel"))
    with pytest.raises(TetherError, match="shares the stored weight"):
        Follow(child, source)


def test_tied_targets_that_cannot_follow_are_refused():
    source = linear()
    target = linear()
    a, b = tether.Weight((3, 2), "ones", name="a"), tether.Weight((2, 3), "ones", name="b")
    tether.tie(target.layers[0], kernel=a @ b)
    with pytest.raises(Unsupported, match="a @ b"):
        Follow(target, source)
    with pytest.raises(TetherError, match="one stored weight"):
        Follow(tied()[0], source)


def test_layers_that_are_not_built_are_checked_when_training_begins(data):
    source, target = linear(), layers.Dense(3, name="dense")
    follow = Follow(target, source.layers[0])
    with pytest.raises(TetherError, match="target of `Follow` must be built"):
        fit(source, data, follow)
    lazy, copy = (keras.Sequential([layers.Dense(3, name="one")]) for _ in range(2))
    copy.build((None, 3))
    fit(lazy, data, Follow(copy, lazy, momentum=0))
    assert_weights(copy, snapshot(lazy), 1e-6)


def test_a_target_that_the_optimizer_trains_is_refused(data):
    student, teacher = linear(), linear()
    i = keras.Input((3,))
    model = keras.Model(i, student(i) + teacher(i))
    with pytest.raises(TetherError, match=r"target\.trainable = False"):
        fit(model, data, Follow(teacher, student))

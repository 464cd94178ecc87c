"""`tether.bank` and `tether.unbank`; `tether.ops.take` by numbers that are stored or come with a call."""

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tether.errors import ShapeMismatch, TetherError, Unsupported
from tether.weights import Argument

rows = np.random.RandomState(0).randn(3, 8).astype("float32")


def choice(default=0):
    return Argument("choice", (), "int32", default=default)


def tasks(count=5, **kwargs):
    base = tether.Weight((8, 4), "glorot_uniform", name="base", trainable=False)
    found = [base + tether.low_rank(2, **kwargs) for _ in range(count)]
    drawn = np.random.RandomState(1)
    for expression in found:
        for weight in expression.weights_used()[1:]:
            weight.assign(drawn.randn(*weight.shape))
    return base, found


def array(x):
    return np.array(ops.convert_to_numpy(x))


@pytest.mark.parametrize("highest", [15, 200], ids=["packed", "bytes"])
@pytest.mark.parametrize("road", ["safetensors", "weights.h5"])
def test_a_file_with_numbers_beyond_the_table_is_refused(road, highest, tmp_path):
    size = highest if highest == 15 else highest + 1  # the largest number that fits in 4 bits, or none that does

    def made():
        table = tether.Weight(np.arange(4.0 * size, dtype="float32").reshape(size, 4), name="table")
        codes = tether.ops.integers(np.array([0, 1, 2, size - 1]), name="codes")
        kernel, inputs = tether.ops.take(table, codes).reshape(2, 8), keras.Input((2,))
        return keras.Model(inputs, tether.tie(keras.layers.Dense(8, name="d"), kernel=kernel)(inputs))

    model, other = made(), made()
    before = [array(w) for w in model.weights]
    beyond = tether.ops.integers(np.array([0, 1, 2, size])).weights_used()[0]
    next(w for w in other.weights if "codes" in w.path).assign(beyond.value)
    path = tmp_path / ("codes.safetensors" if road == "safetensors" else "codes.weights.h5")
    if road == "safetensors":
        tether.files.save_safetensors(other, path)
    else:
        other.save_weights(path)
    load = tether.files.load_safetensors if road == "safetensors" else keras.Model.load_weights
    with pytest.raises((ShapeMismatch, ValueError), match="entries on axis"):  # Keras makes its own error of it
        load(model, path)
    if road == "safetensors":
        assert all(np.array_equal(a, array(b)) for a, b in zip(before, model.weights, strict=True))


# ------------------------------------------------------------------ banks


def test_a_bank_stores_what_differs_as_one_and_is_the_expression_of_a_number():
    base, found = tasks()
    wanted = [expression.numpy() for expression in found]
    layer = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=tether.bank(found, choice()))
    for number in range(5):
        for given in (number, np.int64(number), ops.convert_to_tensor(number, "int32")):
            np.testing.assert_allclose(array(layer(rows, choice=given)), rows @ wanted[number], atol=1e-5)
    shapes = {w.path: tuple(w.shape) for w in layer.weights}
    assert shapes == {"base": (8, 4), "base_lora_a": (5, 8, 2), "base_lora_b": (5, 2, 4)}
    assert [w.path for w in layer.trainable_weights] == ["base_lora_a", "base_lora_b"]
    assert base.uses


def test_the_weights_of_a_bank_follow_it_wherever_they_are_used():
    _, found = tasks(3)
    other = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=found[1])
    before = array(other(rows))
    bank = tether.bank(found, choice())
    np.testing.assert_allclose(array(other(rows)), before, atol=1e-6)
    stack = next(w for w in bank.weights_used() if w.name.endswith("lora_b"))
    stack.assign(np.zeros(stack.shape))
    np.testing.assert_allclose(array(other(rows)), rows @ found[0].weights_used()[0].numpy(), atol=1e-5)
    assert {w.path for w in other.weights} == {w.path for w in bank.weights_used()}


def test_unbank_gives_weights_of_their_own_again():
    _, found = tasks(4)
    wanted = [expression.numpy() for expression in found]
    bank = tether.bank(found, choice())
    layer = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=bank)
    layer(rows)
    apart = tether.unbank(bank)
    assert len(apart) == 4
    for expression, value in zip(apart, wanted, strict=True):
        np.testing.assert_allclose(expression.numpy(), value, atol=1e-6)
    own = [w for w in apart[2].weights_used() if w.name != "base"]
    assert [w.path for w in own] == ["base_lora_a_2", "base_lora_b_2"]
    np.testing.assert_allclose(array(layer(rows, choice=3)), rows @ wanted[3], atol=1e-5)
    own[1].assign(np.zeros(own[1].shape))
    np.testing.assert_allclose(array(layer(rows, choice=2)), rows @ found[0].weights_used()[0].numpy(), atol=1e-5)


def test_a_weight_at_several_numbers_is_stored_once():
    a, b = (tether.Weight(np.full(4, value, "float32"), name=name) for name, value in (("a", 1), ("b", 2)))
    bank = tether.bank([a, b, b, a], choice())
    (stack,) = bank.weights_used()
    assert stack.shape == (2, 4)
    layer = tether.tie(keras.layers.Dense(4), bias=bank)
    zeros = np.zeros((1, 3), "float32")
    assert [array(layer(zeros, choice=number))[0, 0] for number in range(4)] == [1, 2, 2, 1]


def test_a_bank_trains_and_is_saved_as_one(tmp_path):
    _, found = tasks(6)
    x = keras.Input((8,))
    layer = tether.tie(keras.layers.Dense(4, use_bias=False, name="dense"), kernel=tether.bank(found, choice(2)))
    model = keras.Model(x, layer(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = {w.path: array(w) for w in model.weights}
    model.fit(rows, np.zeros((3, 4)), verbose=0)
    after = {w.path: array(w) for w in model.weights}
    for path in ("base_lora_a", "base_lora_b"):
        moved = (before[path] != after[path]).any(axis=(1, 2))
        assert moved.tolist() == [number == 2 for number in range(6)]
    model.save(tmp_path / "m.keras")
    loaded = tether.files.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(rows, verbose=0), model.predict(rows, verbose=0))
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda a, b: tether.bank([], choice()), TetherError, "empty"),
        (lambda a, b: tether.bank(a, choice()), TetherError, "list of expressions"),
        (lambda a, b: tether.bank([a, b], Argument("x", (2,), "int32")), TetherError, r"shape=\(2,\)"),
        (lambda a, b: tether.bank([a, b], Argument("x")), TetherError, "dtype='float32'"),
        (lambda a, b: tether.bank([a, 2 * b], choice()), TetherError, "Number 0 has a where number 1 has 2"),
        (lambda a, b: tether.bank([a, keras.layers.Dense(2)], choice()), TetherError, "which weight"),
        (lambda a, b: tether.bank([a + a.T, a + b.T], choice()), TetherError, "one form"),
        (lambda a, b: tether.bank([2 * a, 3 * b], choice()), TetherError, "where number 1"),
        (lambda a, b: tether.bank([a, tether.Weight((3, 4), name="c")], choice()), TetherError, r"\(3, 4\)"),
        (
            lambda a, b: tether.bank([a, tether.Weight((4, 4), "zeros", constraint="non_neg", name="c")], choice()),
            Unsupported, "constraint",
        ),
        (lambda a, b: tether.unbank(a + b), TetherError, "no bank"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_bank_is_named_and_changes_nothing(make, error, words):
    a, b = (tether.Weight((4, 4), "glorot_uniform", name=name) for name in "ab")
    with pytest.raises(error, match=words):
        make(a, b)
    assert a.is_built and b.is_built and a.became is None and b.became is None


@pytest.mark.parametrize("frozen", [(1,), (0, 3), (0, 1, 2, 3)], ids=str)
def test_what_trains_and_what_is_frozen_are_stacked_apart(frozen):
    parts = [tether.Weight((3, 2), "normal", name=f"part{n}", trainable=n not in frozen) for n in range(4)]
    values = [part.numpy() for part in parts]
    number = choice()
    found = tether.bank([2 * part for part in parts], number)
    stacks = {weight.trainable: weight.shape[0] for weight in found.weights_used()}
    assert stacks == {True: 4 - len(frozen), False: len(frozen)} or stacks == {False: 4}
    for n, (part, value) in enumerate(zip(parts, values, strict=True)):
        with tether.weights.bind({number: n}):
            np.testing.assert_array_equal(found.numpy(), 2 * value)
        with tether.weights.bind({number: keras.ops.convert_to_tensor(n, "int32")}):
            np.testing.assert_array_equal(found.numpy(), 2 * value)
        np.testing.assert_array_equal(part.numpy(), value)
    back = tether.unbank(found)
    assert [one.weights_used()[0].trainable for one in back] == [n not in frozen for n in range(4)]
    assert [one.notation().count("[") for one in back] == [0] * 4
    for one, value in zip(back, values, strict=True):
        np.testing.assert_array_equal(one.numpy(), 2 * value)


# ------------------------------------------------------------------ entries by number


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_entries_of_stored_numbers_are_those_of_numpy(axis, shape):
    table = tether.Weight(np.random.RandomState(0).randn(6, 7, 6).astype("float32"), name="table")
    numbers = np.random.RandomState(1).randint(-6, 6, shape)
    for index in (tether.Weight(np.asarray(numbers, "int32"), name="i", trainable=False, role="integers"),
                  tether.ops.integers(numbers), numbers.tolist()):  # fmt: skip
        found = tether.ops.take(table, index, axis=axis)
        wanted = np.take(table.numpy(), numbers, axis=axis)
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize(
    ("low", "high", "bytes_of_each"), [(0, 16, 0.5), (0, 200, 1), (-100, 100, 1), (0, 30_000, 2), (-9, 70_000, 4)]
)
def test_whole_numbers_are_stored_in_as_few_bits_as_they_need(low, high, bytes_of_each):
    numbers = np.random.RandomState(0).randint(low, high, (9, 6))
    numbers[0, 0], numbers[0, 1] = low, high - 1
    stored = tether.ops.integers(numbers)
    np.testing.assert_array_equal(stored.numpy(), numbers)
    (weight,) = stored.weights_used()
    assert weight.role == "integers" and not weight.trainable
    assert weight.numpy().nbytes == 54 * bytes_of_each


def test_a_codebook_learns_by_the_sum_of_its_uses_and_its_config_is_small(tmp_path):
    numbers = np.random.RandomState(0).randint(0, 10, (8, 4))
    book = tether.Weight((16,), "ones", name="book")
    layer = tether.tie(keras.layers.Dense(4, use_bias=False, name="dense"), kernel=tether.ops.take(book, numbers))
    x = keras.Input((8,))
    model = keras.Model(x, layer(x))
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(p))
    ones = np.ones((1, 8), "float32")
    model.fit(ones, np.zeros((1, 4)), verbose=0)
    np.testing.assert_allclose(1 - book.numpy(), np.bincount(numbers.reshape(-1), minlength=16) / 4 * 4, atol=1e-5)
    big = np.random.RandomState(0).randint(0, 16, 5000)
    large = tether.tie(keras.layers.Dense(50, name="large"), kernel=tether.ops.take(book, big).reshape(100, 50))
    y = keras.Input((100,))
    whole = keras.Model(y, large(y))
    assert len(str(large.get_config())) < 5000
    whole.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    given = np.random.RandomState(2).randn(2, 100).astype("float32")
    np.testing.assert_array_equal(loaded.predict(given, verbose=0), whole.predict(given, verbose=0))


def test_a_number_that_does_not_exist_is_an_error_or_not_a_number():
    table = tether.Weight(np.arange(12, dtype="float32").reshape(3, 4), name="table")
    layer = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=tether.ops.take(table, choice()).reshape(1, 4))
    one = np.ones((1, 1), "float32")
    np.testing.assert_array_equal(array(layer(one, choice=-1))[0], [8, 9, 10, 11])
    for given in (3, -4, ops.convert_to_tensor(7, "int32")):
        with pytest.raises(ShapeMismatch, match="3 entries on axis 0"):
            layer(one, choice=given)
    with pytest.raises(ShapeMismatch, match="3 entries"):
        tether.ops.take(table, 3)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jax.jit(lambda number: layer(one, choice=number))
    elif backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(lambda number: layer(one, choice=number))
    else:
        pytest.skip("PyTorch runs eagerly")
    assert np.isnan(array(compiled(ops.convert_to_tensor(7, "int32")))).all()
    np.testing.assert_array_equal(array(compiled(ops.convert_to_tensor(1, "int32")))[0], [4, 5, 6, 7])


def test_entries_are_assigned_through_the_expression():
    table = tether.Weight(np.zeros((3, 4), "float32"), name="table")
    tether.ops.take(table, 1).assign(np.ones(4))
    np.testing.assert_array_equal(table.numpy(), [[0] * 4, [1] * 4, [0] * 4])
    number = choice(2)
    with tether.weights.bind({number: 0}):
        tether.ops.take(table, number).assign(np.full(4, 5.0))
    np.testing.assert_array_equal(table.numpy()[:, 0], [5, 1, 0])
    tether.ops.take(table, Argument("any", (), "int32")).assign(np.full(4, 7.0))  # nothing says which: every one
    assert (table.numpy() == 7).all()


def test_products_of_entries_stay_products():
    a, b = tether.Weight((9, 64, 2), "ones", name="a"), tether.Weight((9, 2, 64), "ones", name="b")
    number = choice()
    kernel = tether.ops.take(a, number) @ tether.ops.take(b, number)
    layer = tether.tie(keras.layers.Dense(64), kernel=kernel)
    layer.build((None, 64))
    (use,) = tether.planning.explain(layer, (4, 64)).uses
    assert not use.plan.materializes


@pytest.mark.parametrize(
    "make",
    [
        lambda w: tether.ops.take(w, [0.5]),
        lambda w: tether.ops.take(w, tether.Weight((2,), "zeros", name="f")),
        lambda w: tether.ops.integers([1.5]),
        lambda w: tether.ops.integers([1 << 40]),
    ],
)
def test_numbers_of_entries_are_whole(make):
    with pytest.raises(TetherError, match=r"whole|bits"):
        make(tether.Weight((3, 4), "zeros", name="w"))


@pytest.mark.parametrize("count", [3, 40])
def test_route_of_many_options_of_one_form_is_a_bank(count):
    base, found = tasks(count)
    wanted = [expression.numpy() for expression in found]
    names = {f"task {number}": expression for number, expression in enumerate(found)}
    layer = tether.route(keras.layers.Dense(4, use_bias=False), kernel=names, default="task 1")
    for number in (0, 2, count - 1):
        np.testing.assert_allclose(array(layer(rows, choice=f"task {number}")), rows @ wanted[number], atol=1e-5)
    np.testing.assert_allclose(array(layer(rows)), rows @ wanted[1], atol=1e-5)
    assert len(layer.weights) == (3 if count > 8 else 1 + 2 * count)
    assert base.is_built


def test_route_of_many_options_of_several_forms_is_a_switch():
    base, found = tasks(9)
    layer = tether.route(keras.layers.Dense(4, use_bias=False), kernel=[base, *found])
    np.testing.assert_allclose(array(layer(rows, choice=0)), rows @ base.numpy(), atol=1e-5)
    np.testing.assert_allclose(array(layer(rows, choice=9)), rows @ found[8].numpy(), atol=1e-5)
    assert len(layer.weights) == 19

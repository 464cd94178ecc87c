"""Slots for adapters: they come, go and are replaced in a model while nothing is compiled again."""

import copy

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import tether
from tests.support import assert_close, numpy
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName

layers = keras.layers
adapters = tether.adapters
pytestmark = pytest.mark.spread


def drawn(rng, shape):
    return rng.normal(size=shape).astype("float32")


def dense(rng):
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="tanh", name="first")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="second")(hidden)), drawn(rng, (5, 4))


def attention(rng):
    inputs = keras.Input((3, 8))
    hidden = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.Dense(3, name="second")(hidden)), drawn(rng, (5, 3, 8))


def embedding(rng):
    inputs = keras.Input((3,), dtype="int32")
    hidden = layers.Embedding(7, 6, name="table")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="second")(hidden)), rng.integers(0, 7, (5, 3))


def convolution(rng):
    inputs = keras.Input((6, 4))
    hidden = layers.Conv1D(5, 2, name="convolution")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="second")(hidden)), drawn(rng, (5, 6, 4))


MODELS = {
    "dense": (dense, {"*/kernel": tether.low_rank(4, alpha=8)}),
    "attention": (attention, {"*/query/kernel": tether.low_rank(4), "*/value/kernel": tether.low_rank(2, alpha=6)}),
    "embedding": (embedding, {"table/embeddings": tether.low_rank(2), "second/kernel": tether.forms.full()}),
    "convolution": (convolution, {"all-linear": tether.low_rank(2)}),
    "hadamard": (dense, {"first/kernel": tether.forms.hadamard(2)}),
    "scale": (dense, {"*/kernel": tether.forms.scale()}),
    "dora": (dense, {"second/kernel": tether.forms.dora(2)}),
    "bias": (dense, {"*/kernel": tether.low_rank(2), "*/bias": tether.forms.full()}),
}
TRAINED = ["dense", "attention", "embedding"]


def fill_with(rng, model, name):
    """Other values for an adapter in a slot, as training would leave them."""
    number = adapters.slots(model)[name]
    for place in adapters.slotted.slotted_weights(model).values():
        for read in place.reads():
            stack, row = adapters.slotted._located(read, number)
            value = stack.numpy()
            value[row] = 0.5 * drawn(rng, value[row].shape)
            stack.assign(value)


def chosen(model, x, number):
    """What a model with a column of choices computes where all examples have one."""
    return numpy(tether.routed(model)([x, np.full(len(x), number)]))


@pytest.mark.thin(3)
@pytest.mark.parametrize("train", [None, 0, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_free_slot_is_the_base_and_an_adapter_in_one_is_that_adapter(rng, kind, train, tmp_path):
    build, changes = MODELS[kind]
    model, x = build(rng)
    plain = numpy(model(x))
    adapters.capacity(model, changes, slots=4, train=train)
    assert adapters.names(model) == [] and adapters.slots(model) == {}
    for number in range(-1, 4):
        assert_close(chosen(model, x, number), plain, 1e-6)
    assert_close(model(x), plain, 1e-6 if train == 0 else 0)  # PyTorch multiplies otherwise where no gradient is asked
    adapters.add(model, "french", changes, trainable=train != 0)
    adapters.add(model, "german", changes, trainable=False)
    assert list(adapters.slots(model)) == adapters.names(model) == ["french", "german"]
    assert adapters.slots(model)["german"] == (2 if train == 2 else 1)
    for name in ("french", "german"):
        assert_close(chosen(model, x, adapters.slots(model)[name]), plain, 1e-5)
        fill_with(rng, model, name)
    ids = [-1, *adapters.slots(model).values(), 3, -1]
    mixed = numpy(tether.routed(model)([x, np.array(ids)]))
    alone = np.concatenate([chosen(model, x, number)[i : i + 1] for i, number in enumerate(ids)])
    assert_close(mixed, alone, 1e-5)
    assert_close(mixed[[0, 3, 4]], plain[[0, 3, 4]], 1e-5)
    assert not np.allclose(mixed[1], plain[1]) and not np.allclose(mixed[2], plain[2])
    # The same file goes to a model without slots, and back to a slot of another set.
    adapters.save(model, "german", tmp_path / "german.safetensors")
    other, _ = build(np.random.default_rng(0))
    other.set_weights([numpy(w) for w in fresh_weights(model, build)])
    before = numpy(other(x))
    adapters.load(other, tmp_path / "german.safetensors")
    assert_close(before, plain, 1e-6)
    assert_close(other(x), chosen(model, x, adapters.slots(model)["german"]), 1e-5)
    adapters.load(model, tmp_path / "german.safetensors", name="again")
    assert_close(chosen(model, x, adapters.slots(model)["again"]), other(x), 1e-5)


def fresh_weights(model, build):
    """The values of a model without its slots, in the order in which it was built."""
    names = [v.path.rsplit("/", 2)[-2:] for v in build(np.random.default_rng(0))[0].weights]
    by_name = {tuple(v.path.rsplit("/", 2)[-2:]): v for v in model.weights}
    return [by_name[tuple(name)] for name in names]


@pytest.mark.parametrize("kind", ["dense", "attention"])
def test_a_file_of_an_ordinary_adapter_goes_to_a_slot_with_its_own_rank_and_scale(rng, kind, tmp_path):
    build, changes = MODELS[kind]
    model, x = build(rng)
    narrow = {path: tether.low_rank(1, alpha=3) for path in changes}
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    adapters.add(other, "small", narrow)
    for variable in other.trainable_variables:
        if "lora" in variable.path:
            variable.assign(drawn(rng, variable.shape))
    adapters.set_strengths(other, {"small": 0.5})
    adapters.save(other, "small", tmp_path / "small.safetensors")
    adapters.capacity(model, changes, slots=3)
    adapters.load(model, tmp_path / "small.safetensors")
    assert_close(chosen(model, x, 0), other(x), 1e-5)
    part = tmp_path / "part.safetensors"
    only = next(path for path in adapters.slotted.slotted_weights(model))
    third = keras.models.clone_model(other)
    third, _ = build(rng)
    adapters.add(third, "part", {only: next(iter(narrow.values()))})
    adapters.save(third, "part", part)
    adapters.load(model, part, name="small", replace=True)
    assert adapters.slots(model) == {"small": 0}
    assert_close(chosen(model, x, 0), model(x), 1e-5)  # its second factors are zero, and so is what it does not change


@pytest.mark.parametrize("train", [None, 2])
@pytest.mark.parametrize("kind", TRAINED)
def test_slots_train_in_mixed_batches_and_others_are_not_touched(rng, kind, train, tmp_path):
    build, changes = MODELS[kind]
    model, x = build(rng)
    adapters.capacity(model, changes, slots=5, train=train, freeze="all")
    for name in ("a", "b"):
        adapters.add(model, name)
    adapters.add(model, "still", changes, trainable=train is None)
    fill_with(rng, model, "still")
    tasks = tether.routed(model)
    tasks.compile(keras.optimizers.AdamW(0.05, weight_decay=0.01), "mse")
    ids = np.array([0, 1, -1, 1, 0])
    target = drawn(rng, numpy(tasks([x, ids])).shape)
    base, still = chosen(model, x, -1), chosen(model, x, adapters.slots(model)["still"])
    before = tasks.evaluate([x, ids], target, verbose=0)
    tasks.fit([x, ids], target, epochs=20, verbose=0)
    assert tasks.evaluate([x, ids], target, verbose=0) < before
    assert_close(chosen(model, x, -1), base, 0)
    if train is not None:
        assert_close(chosen(model, x, adapters.slots(model)["still"]), still, 0)
    tasks.save(tmp_path / "set.keras")
    loaded = keras.saving.load_model(tmp_path / "set.keras")
    assert adapters.slots(loaded) == adapters.slots(model)
    assert_close(loaded([x, ids]), tasks([x, ids]), 1e-5)
    adapters.remove(loaded, "a")
    adapters.add(loaded, "c")
    assert adapters.slots(loaded) == {"c": 0, "b": 1, "still": adapters.slots(model)["still"]}
    assert adapters.slots(model)["a"] == 0
    loaded.fit([x, ids], target, verbose=0)


def test_what_the_optimizer_keeps_for_a_slot_starts_anew(rng):
    model, x = dense(rng)
    adapters.capacity(model, {"first/kernel": tether.low_rank(2)}, slots=3, freeze="all")
    adapters.add(model, "a")
    adapters.add(model, "b")
    tasks = tether.routed(model)
    tasks.compile(keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.25), "mse")
    tasks.fit([x, np.array([0, 1, 0, 1, 0])], drawn(rng, (5, 3)), epochs=2, verbose=0)
    slots = [v for v in tasks.optimizer.variables if len(v.shape) == 3]
    assert len(slots) == 2
    before = [numpy(v) for v in slots]
    assert any((value[0] > 0.25).any() and (value[1] > 0.25).any() for value in before)
    adapters.remove(model, "a")
    adapters.add(model, "c")
    for value, slot in zip(before, slots, strict=True):
        assert (numpy(slot)[0] == 0.25).all()
        assert np.array_equal(numpy(slot)[1], value[1])


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch runs eagerly")
def test_nothing_is_compiled_again_for_other_adapters(rng):
    model, x = dense(rng)
    traced = []

    class Counts(layers.Layer):
        def call(self, inputs):
            traced.append(1)
            return inputs

    inputs = keras.Input((4,))
    model = keras.Model(inputs, model(Counts()(inputs)))
    adapters.capacity(model, {"*/kernel": tether.low_rank(2)}, slots=8)
    tasks = tether.routed(model)
    tasks.compile("adam", "mse")
    tasks.predict([x, np.full(5, -1)], verbose=0)
    tasks.fit([x, np.full(5, 0)], drawn(rng, (5, 3)), verbose=0)
    tasks.predict([x, np.full(5, -1)], verbose=0)
    count = len(traced)
    outputs = []
    for number in range(20):
        adapters.add(model, f"child{number}", replace=True)
        fill_with(rng, model, f"child{number}")
        outputs.append(tasks.predict([x, rng.integers(-1, 8, 5)], verbose=0))
        tasks.fit([x, np.full(5, number % 8)], drawn(rng, (5, 3)), verbose=0)
        if number > 5:
            adapters.remove(model, f"child{number - 5}")
    assert len(traced) == count
    assert not np.allclose(outputs[0], outputs[-1])


def test_one_file_has_several_adapters(rng, tmp_path):
    model, x = dense(rng)
    changes = {"*/kernel": tether.low_rank(2)}
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    adapters.capacity(model, changes, slots=4, train=2)
    for name in ("a", "b"):
        adapters.add(model, name)
        fill_with(rng, model, name)
    adapters.save(model, ["b", "a"], tmp_path / "set.safetensors")
    adapters.load(twin, tmp_path / "set.safetensors", trainable=False)
    assert adapters.names(twin) == ["b", "a"]
    for name in ("a", "b"):
        adapters.activate(twin, name, trainable=False)
        assert_close(twin(x), chosen(model, x, adapters.slots(model)[name]), 1e-5)
    adapters.save(twin, ["a", "b"], tmp_path / "plain.safetensors")
    back, _ = dense(rng)
    back.set_weights([numpy(w) for w in fresh_weights(model, dense)])
    adapters.capacity(back, changes, slots=4)
    adapters.load(back, tmp_path / "plain.safetensors")
    with pytest.raises(TetherError, match="has: a, b"):
        adapters.load(back, tmp_path / "set.safetensors")
    adapters.load(back, tmp_path / "set.safetensors", replace=True)
    for name in ("a", "b"):
        assert_close(chosen(back, x, adapters.slots(back)[name]), chosen(model, x, adapters.slots(model)[name]), 1e-5)
    facts = adapters.file.file_facts(tmp_path / "set.safetensors")
    assert [adapter.name for adapter in facts.adapters] == ["b", "a"]
    with pytest.raises(TetherError, match="keep their names"):
        adapters.load(back, tmp_path / "set.safetensors", name="one")
    few, _ = dense(rng)
    adapters.capacity(few, changes, slots=1)
    with pytest.raises(TetherError, match="1 of 1 slots are free"):
        adapters.load(few, tmp_path / "set.safetensors")
    assert adapters.slots(few) == {}


@pytest.mark.parametrize("damage", [b'"version": 3', b'"name": "b"', b'"keys"'])
def test_a_damaged_file_of_several_is_one_error(rng, damage, tmp_path):
    model, _ = dense(rng)
    adapters.capacity(model, {"*/kernel": tether.low_rank(2)}, slots=4)
    adapters.add(model, "a")
    adapters.add(model, "b")
    path = tmp_path / "set.safetensors"
    adapters.save(model, ["a", "b"], path)
    content = path.read_bytes().replace(damage.replace(b'"', b'\\"'), damage[::-1].replace(b'"', b'\\"'))
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(InvalidConfig):
        adapters.load(model, path, replace=True)
    assert adapters.slots(model) == {"a": 0, "b": 1}


def test_a_name_chooses_for_a_call_and_is_read_at_each(rng):
    layer = layers.Dense(3, name="head")
    layer.build((None, 4))
    x = drawn(rng, (5, 4))
    adapters.capacity(layer, {"kernel": tether.low_rank(2)}, slots=3)
    adapters.add(layer, "french")
    fill_with(rng, layer, "french")
    french = numpy(layer(x, choice="french"))
    assert_close(french, layer(x, choice=0), 0)
    assert_close(layer(x, choice="none"), layer(x), 0)
    with pytest.raises(TetherError, match="No slot has the name 'german'"):
        layer(x, choice="german")
    adapters.remove(layer, "french")
    with pytest.raises(TetherError, match="There are: none"):
        layer(x, choice="french")
    assert_close(layer(x, choice=0), layer(x), 0)
    twin = copy.deepcopy(layer)
    adapters.add(twin, "german")
    assert adapters.slots(layer) == {} and adapters.slots(twin) == {"german": 0}


def saved_adapter(rng, build, changes, path):
    """An ordinary adapter with values in a file; the model that has it, an input, and the values of its base."""
    other, x = build(rng)
    plain = other.get_weights()
    adapters.add(other, "new", changes)
    for weight in other.weights:
        if "lora" in weight.path:
            weight.assign(drawn(rng, weight.shape))
    adapters.save(other, "new", path)
    return other, x, plain


SQUARE = {"first/kernel": tether.low_rank(4), "second/kernel": tether.low_rank(4)}
"""Of a model of which all four factors have one shape: each has to come to its own place."""


def square(rng):
    inputs = keras.Input((4,))
    hidden = layers.Dense(4, activation="tanh", name="first")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="second")(hidden)), drawn(rng, (5, 4))


def rewritten_file(path, change):
    """The same file with other tensors."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file({name: change(tensor) for name, tensor in tensors.items()}, path, metadata)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_of_a_file_come_to_their_places_in_a_slot_in_any_precision(rng, dtype, tmp_path):
    path = tmp_path / "new.safetensors"
    other, x, plain = saved_adapter(rng, square, SQUARE, path)
    rewritten_file(path, lambda tensor: tensor.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    model, _ = square(rng)
    model.set_weights(plain)
    adapters.capacity(model, SQUARE, slots=3)
    adapters.load(model, path, name="two")
    adapters.load(model, path, name="three")
    tolerance = {"float16": 1e-2, "bfloat16": 6e-2}.get(dtype, 1e-5)
    for name in ("two", "three"):
        assert_close(chosen(model, x, adapters.slots(model)[name]), other(x), tolerance)


@pytest.mark.parametrize(
    "change",
    [lambda tensor: np.zeros(tensor.shape, "int32"), lambda tensor: np.zeros((*tensor.shape, 1), tensor.dtype)],
    ids=["integers", "shape"],
)
def test_a_file_with_other_tensors_than_it_says_leaves_the_slots_as_they_were(rng, change, tmp_path):
    path = tmp_path / "new.safetensors"
    saved_adapter(rng, square, SQUARE, path)
    rewritten_file(path, change)
    model, _ = square(rng)
    adapters.capacity(model, SQUARE, slots=2)
    adapters.add(model, "old")
    before = [numpy(variable).copy() for variable in model.weights]
    with pytest.raises(TetherError):
        adapters.load(model, path)
    assert adapters.names(model) == ["old"]
    assert all(np.array_equal(a, numpy(b)) for a, b in zip(before, model.weights, strict=True))


def test_an_adapter_comes_to_a_slot_without_a_variable_of_its_own(rng, tmp_path, monkeypatch):
    path = tmp_path / "new.safetensors"
    saved_adapter(rng, square, SQUARE, path)
    model, _ = square(rng)
    adapters.capacity(model, SQUARE, slots=3)
    adapters.load(model, path, name="one")

    def refuse(*args, **kwargs):
        raise AssertionError("a variable is made")

    monkeypatch.setattr(keras.Variable, "__init__", refuse)
    adapters.load(model, path, name="two")
    adapters.remove(model, "one")
    assert adapters.names(model) == ["two"]


def test_what_was_not_finite_leaves_nothing_behind(rng):
    model, x = dense(rng)
    plain = numpy(model(x))
    adapters.capacity(model, {"*/kernel": tether.low_rank(2)}, slots=2)
    adapters.add(model, "broken")
    for variable in model.weights:
        if "lora" in variable.path or "strength" in variable.path:
            value = numpy(variable)
            value[0] = np.nan
            variable.assign(value)
    assert np.isnan(chosen(model, x, 0)).all()
    assert_close(chosen(model, x, 1), plain, 1e-6)
    adapters.remove(model, "broken")
    assert_close(chosen(model, x, 0), plain, 1e-6)


def with_set(rng, **more):
    model, x = dense(rng)
    return adapters.capacity(model, {"first/kernel": tether.low_rank(2)}, **{"slots": 2, **more}), x


def add_all(model):
    for name in ("a", "b", "c"):
        adapters.add(model, name)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda m: adapters.capacity(m, {"first/kernel": tether.low_rank(2)}, slots=2), TetherError, "has slots"),
        (lambda m: adapters.add(m, "a", {"first/kernel": tether.low_rank(3)}), ShapeMismatch, "rank=3, slot=2"),
        (lambda m: adapters.add(m, "a", {"second/kernel": tether.low_rank(1)}), UnknownName, "has no slots"),
        (lambda m: adapters.add(m, "a", {"first/kernel": tether.forms.full()}), TetherError, "A slot of"),
        (lambda m: adapters.add(m, "a", {"*/kernel": tether.low_rank(1)}), UnknownName, "has no slots"),
        (lambda m: adapters.add(m, "old"), TetherError, "replace=True"),
        (lambda m: adapters.add(m, ""), TetherError, "a string"),
        (lambda m: adapters.remove(m, "a"), UnknownName, "'a'"),
        (lambda m: adapters.set_strengths(m, {"old": 0.5}), UnknownName, "choice='old'"),
        (lambda m: adapters.activate(m, "old"), UnknownName, "a call chooses it"),
        (lambda m: adapters.merge(m, ["old"]), UnknownName, "a call chooses it"),
        (lambda m: adapters.save(m, ["old", "old"], "x.safetensors"), TetherError, "list of several"),
        (add_all, TetherError, "0 of 2 slots are free"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_and_changes_nothing(rng, act, error, words):
    model, x = with_set(rng)
    adapters.add(model, "old")
    fill_with(rng, model, "old")
    values, before = [numpy(w) for w in model.weights], chosen(model, x, 0)
    with pytest.raises(error, match=words):
        act(model)
    names = adapters.slots(model)
    assert names.pop("old") == 0 and set(names) <= {"a"}
    assert [w.shape for w in model.weights] == [value.shape for value in values]
    assert_close(chosen(model, x, 0), before, 0)


@pytest.mark.parametrize(
    "numbers", [{"slots": 0}, {"slots": 2.0}, {"slots": True}, {"train": 3}, {"train": -1}], ids=str
)
def test_numbers_of_slots_are_checked(rng, numbers):
    with pytest.raises(TetherError, match=f"`{next(iter(numbers))}`"):
        with_set(rng, **numbers)


def test_of_the_slots_that_train_none_may_be_free(rng):
    model, _ = with_set(rng, train=1)
    adapters.add(model, "a")
    with pytest.raises(TetherError, match="0 of the slots that train are free"):
        adapters.add(model, "b")
    adapters.add(model, "b", trainable=False)
    assert adapters.slots(model) == {"a": 0, "b": 1}


def test_slots_do_not_change_in_a_callback_of_fit(rng):
    model, x = with_set(rng)
    tasks = tether.routed(model)
    tasks.compile("sgd", "mse")

    class Adds(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            adapters.add(model, "late")

    with pytest.raises(TetherError, match="before or after `fit`"):
        tasks.fit([x, np.full(5, -1)], drawn(rng, (5, 3)), verbose=0, callbacks=[Adds()])
    assert adapters.slots(model) == {}


def test_an_adapter_beside_the_slots_stays(rng):
    model, x = dense(rng)
    adapters.add(model, "always", {"first/kernel": tether.low_rank(1)})
    for variable in model.trainable_variables:
        if "lora" in variable.path:
            variable.assign(drawn(rng, variable.shape))
    plain = numpy(model(x))
    adapters.capacity(model, {"first/kernel": tether.low_rank(2)}, slots=2)
    adapters.add(model, "one")
    fill_with(rng, model, "one")
    assert adapters.names(model) == ["always", "one"]
    assert_close(chosen(model, x, -1), plain, 1e-6)
    assert not np.allclose(chosen(model, x, 0), plain)

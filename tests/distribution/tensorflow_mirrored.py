"""What a `MirroredStrategy` on two devices of one processor does; `test_tensorflow_mirrored.py` runs it."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

import tether  # noqa: E402
from tests.distribution.programs import check  # noqa: E402

STRATEGY = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
RNG = np.random.default_rng(0)
X, Y = (RNG.integers(0, 12, (16, 4)).astype("int32") for _ in range(2))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def start(folder, number):
    return folder


def glorot(seed):
    return keras.initializers.GlorotUniform(seed)


def language_model():
    inputs = keras.Input((4,), dtype="int32")
    table = tether.Weight(name="table", initializer=keras.initializers.RandomNormal(seed=1))
    h = tether.tie(keras.layers.Embedding(12, 6, name="embed"), embeddings=table)(inputs)
    h = keras.layers.Dense(6, activation="tanh", name="up", kernel_initializer=glorot(2))(h)
    h = keras.layers.Dense(6, activation="tanh", name="down", kernel_initializer=glorot(3))(h)
    return keras.Model(inputs, tether.tie(keras.layers.Dense(12, use_bias=False, name="head"), kernel=table.T)(h))


def data():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16, drop_remainder=True)


def fit(model, *callbacks):
    mirrored = hasattr(model.weights[0].value, "values")
    with STRATEGY.scope() if mirrored else contextlib.nullcontext():
        model.compile(keras.optimizers.SGD(0.5), LOSS, jit_compile=False, run_eagerly=not mirrored)
    return model.fit(data(), epochs=2, shuffle=False, verbose=0, callbacks=list(callbacks)).history["loss"]


def make(change=lambda model: None):
    """A model outside of the strategy, and one in its scope; both changed there."""
    alone = language_model()
    change(alone)
    with STRATEGY.scope():
        model = language_model()
        change(model)
    return alone, model


def assert_same(alone, model, tolerance=1e-5):
    assert np.allclose(fit(alone), fit(model), atol=tolerance)
    assert len(alone.weights) == len(model.weights)
    for one, other in zip(alone.weights, model.weights, strict=True):
        copies = [copy.numpy() for copy in other.value.values]
        assert len(copies) == 2 and np.array_equal(*copies), other.path
        assert np.abs(one.numpy() - copies[0]).max() <= tolerance, other.path


def refused(model, change, *words):
    """Asserts that a change outside of the scope is refused, and that the model is as it was."""

    def present():
        return [(id(variable), variable.trainable, variable.numpy().tolist()) for variable in model.variables]

    before = present()
    try:
        change(model)
    except tether.errors.Unsupported as error:
        assert all(word in str(error) for word in ("MirroredStrategy", "strategy.scope()", *words)), str(error)
    else:
        raise AssertionError("nothing was refused")
    assert present() == before


@check
def a_slow_copy_follows(folder):
    (alone, model), (of_alone, of_model) = make(), make()
    fit(alone, tether.transfer.Follow(target=of_alone, source=alone, momentum=0.5))
    fit(model, tether.transfer.Follow(target=of_model, source=model, momentum=0.5))
    for one, other in zip(of_alone.weights, of_model.weights, strict=True):
        copies = [copy.numpy() for copy in other.value.values]
        assert np.array_equal(*copies) and np.abs(one.numpy() - copies[0]).max() < 1e-5
    plain = language_model()  # a target outside of the strategy
    source = make()[1]
    fit(source, tether.transfer.Follow(target=plain, source=source, momentum=0.5))
    assert all(np.abs(a.numpy() - b.numpy()).max() < 1e-5 for a, b in zip(plain.weights, of_alone.weights, strict=True))


@check
def other_callbacks_run(folder):
    alone, model = make()
    stop = keras.callbacks.EarlyStopping(monitor="loss", restore_best_weights=True)
    store = keras.callbacks.ModelCheckpoint(folder / "best.keras", monitor="loss", save_best_only=True)
    fit(model, tether.CheckCallback(ignore=["many-uses"]), stop, store)
    fit(alone)
    again = keras.saving.load_model(folder / "best.keras")
    assert all(np.abs(a.numpy() - b.numpy()).max() < 1e-5 for a, b in zip(alone.weights, model.weights, strict=True))
    assert again.get_layer("head").kernel.expression.notation() == "table.T"


@check
def soft_ties(folder):
    def change(model):
        tether.transfer.soft_tie(model, "up/kernel", "down/kernel", strength=0.1)

    assert_same(*make(change))


@check
def adapters_are_added_switched_and_removed(folder):
    def change(model):
        tether.adapters.add(model, "task", {"up/kernel": tether.low_rank(2, seed=1)})

    alone, model = make(change)
    assert_same(alone, model)
    found = []
    for one in (alone, model):
        with tether.adapters.disabled(one):
            found.append(one.predict(X, verbose=0))
    assert np.abs(found[0] - found[1]).max() < 1e-5
    tether.adapters.remove(alone, "task")
    with STRATEGY.scope():
        tether.adapters.remove(model, "task")
    assert_same(alone, model)


@check
def ties_are_made_and_ended(folder):
    alone, model = make()
    assert_same(alone, model)
    for one, scope in ((alone, None), (model, STRATEGY.scope())):
        if scope is not None:
            scope.__enter__()
        tether.tie(one.get_layer("down"), kernel=tether.weight_of(one, "up/kernel"))
        tether.untie(one.get_layer("head"))
        if scope is not None:
            scope.__exit__(None, None, None)
    assert_same(alone, model)
    assert not np.allclose(model.get_layer("head").kernel.numpy(), model.get_layer("embed").embeddings.numpy().T)


@check
def outside_of_the_scope_it_is_refused(folder):
    alone, model = make()
    refused(model, lambda model: tether.untie(model.get_layer("head")))
    refused(model, lambda model: tether.untie(model, "head/kernel"))
    refused(model, lambda model: tether.adapters.add(model, "t", {"up/kernel": tether.low_rank(2)}), "strategy")
    refused(model, lambda model: tether.adapters.add(model, "t", {"up/kernel": tether.low_rank(2)}, freeze="all"))
    refused(model, lambda model: tether.tie(model.get_layer("down"), kernel=tether.Weight((6, 6), "zeros", name="n")))
    refused(model, lambda model: tether.inherit(model.get_layer("up"), kernel=lambda w: w + tether.low_rank(2)))
    refused(model, lambda model: tether.weight_of(model, "embed/embeddings").quantize("int8"))
    assert_same(alone, model)


@check
def what_makes_no_variables_is_not_refused(folder):
    alone, model = make()
    for one in (alone, model):
        tether.tie(one.get_layer("down"), kernel=tether.weight_of(one, "up/kernel"))
        tether.transfer.soft_tie(one, "up/bias", "down/bias", strength=0.1)
    assert_same(alone, model)


@check
def a_variable_outside_is_a_finding(folder):
    with STRATEGY.scope():
        model = language_model()
    assert not tether.check(model).by_rule("outside-strategy")
    plain = keras.layers.Dense(12, name="plain")
    plain.build((None, 4, 12))
    mixed = keras.Sequential([model, plain])
    found = tether.check(mixed).by_rule("outside-strategy")
    assert [finding.where for finding in found] == ["plain/kernel", "plain/bias"]
    assert found[0].severity == "error" and "strategy.scope()" in found[0].mend and "MirroredStrategy" in found[0].why
    assert not tether.check(language_model()).by_rule("outside-strategy")
    model.compile(keras.optimizers.SGD(0.5, name="descent"), LOSS)
    (found,) = tether.check(model).by_rule("outside-strategy")
    assert found.where == "descent" and "once for each replica" in found.why
    fit(model)
    assert not tether.check(model).by_rule("outside-strategy")


@check
def files_go_out_and_in(folder):
    model = make()[1]
    fit(model)
    tether.files.save_model(model, folder / "model.keras")
    tether.files.save_safetensors(model, folder / "model.safetensors")
    with STRATEGY.scope():
        loaded, filled, copied = keras.saving.load_model(folder / "model.keras"), language_model(), language_model()
    tether.files.load_safetensors(filled, folder / "model.safetensors")
    tether.transfer.copy(model, copied)
    for other in (loaded, filled, copied, keras.saving.load_model(folder / "model.keras")):
        assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(model.weights, other.weights, strict=True))
    assert all(len(variable.value.values) == 2 for variable in loaded.weights)


@check
def routes_and_repeats(folder):
    def one():
        inputs, choice = keras.Input((6,)), keras.Input((), dtype="int32")
        base = tether.Weight((6, 6), glorot(2), name="base")
        layer = tether.route(keras.layers.Dense(6, name="d"), kernel=[base, base + tether.low_rank(2, seed=3)])
        block = keras.Sequential([keras.layers.Dense(6, activation="tanh", kernel_initializer=glorot(4), name="d")])
        block.build((None, 6))
        body = tether.Repeat(block, times=3, vary={"d/kernel": tether.low_rank(2, seed=5)})
        return keras.Model([inputs, choice], body(layer(inputs, choice=choice)))

    x, choices = RNG.normal(size=(16, 6)).astype("float32"), RNG.integers(0, 2, 16).astype("int32")
    batches = tf.data.Dataset.from_tensor_slices(((x, choices), x)).batch(16, drop_remainder=True)
    alone = one()
    with STRATEGY.scope():
        model = one()
    losses = []
    for each in (alone, model):
        each.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
        losses.append(each.fit(batches, epochs=2, shuffle=False, verbose=0).history["loss"])
    assert np.allclose(*losses, atol=1e-5)

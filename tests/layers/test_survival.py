"""A tie outlives saving, loading, cloning, copying, pickling and interruption; and never spreads to a second copy."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy


def autoencoder(width=3, size=5, compiled=False):
    codec = tether.Weight(name="codec")
    inputs = keras.Input((size,))
    hidden = tether.tie(keras.layers.Dense(width, activation="relu", name="encode"), kernel=codec)(inputs)
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(size, name="decode"), kernel=codec.T)(hidden))
    if compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def is_tied(model):
    kernel = model.get_layer("encode").kernel.expression
    return model.get_layer("decode").kernel.expression == kernel.T and len(model.weights) == 3


def weights_of(model):
    return model.get_layer("encode").kernel.expression


@pytest.fixture
def x(rng):
    return rng.random((16, 5)).astype("float32")


def test_keras_file_keeps_the_tie_and_the_outputs(tmp_path, x):
    model = autoencoder(compiled=True)
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert is_tied(loaded)
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_training_goes_on_after_a_load_as_if_it_had_not_stopped(tmp_path, x):
    model = autoencoder(compiled=True)
    model.fit(x, x, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert [v.shape for v in loaded.optimizer.variables] == [v.shape for v in model.optimizer.variables]
    for m in (model, loaded):
        m.fit(x, x, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_weights_file_holds_each_weight_once(tmp_path):
    model = autoencoder()
    model.save_weights(tmp_path / "m.weights.h5")
    shapes = []
    with h5py.File(tmp_path / "m.weights.h5") as file:
        file.visititems(lambda _, item: shapes.append(item.shape) if isinstance(item, h5py.Dataset) else None)
    assert sorted(shapes) == [(3,), (5,), (5, 3)]
    other = autoencoder()
    other.load_weights(tmp_path / "m.weights.h5")
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(a, b)


def plain_autoencoder(width=3, size=5):
    inputs = keras.Input((size,))
    hidden = keras.layers.Dense(width, activation="relu", name="encode")(inputs)
    return keras.Model(inputs, keras.layers.Dense(size, name="decode")(hidden))


def test_a_weights_file_written_before_the_tie_loads_after_it(tmp_path):
    plain = plain_autoencoder()
    kernel, bias, _, other = plain.get_weights()
    plain.set_weights([kernel, bias + 1, kernel.T, other + 2])
    plain.save_weights(tmp_path / "m.weights.h5")
    tied = autoencoder()
    tied.load_weights(tmp_path / "m.weights.h5")
    for a, b in zip(tied.get_weights(), [kernel, bias + 1, other + 2], strict=True):
        assert np.array_equal(a, b)


def test_a_weights_file_with_two_different_values_for_one_weight_is_refused(tmp_path):
    plain = plain_autoencoder()
    plain.save_weights(tmp_path / "m.weights.h5")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="two different values for the weight 'codec'"):
        warnings.simplefilter("ignore")  # Keras warns of the containers that it cannot finish
        autoencoder().load_weights(tmp_path / "m.weights.h5")


def test_a_promoted_layer_loads_files_of_before_and_writes_files_that_say_the_tie(tmp_path, x):
    plain = plain_autoencoder()
    plain.save_weights(tmp_path / "before.weights.h5")
    before = plain.get_weights()
    weight = tether.weight_of(plain.get_layer("encode"), "kernel")
    weight.assign(np.zeros((5, 3)))
    plain.load_weights(tmp_path / "before.weights.h5")
    for a, b in zip(plain.get_weights(), before, strict=True):
        assert np.array_equal(a, b)
    plain.save(tmp_path / "after.keras")
    loaded = keras.saving.load_model(tmp_path / "after.keras")
    assert isinstance(loaded.get_layer("encode").kernel.expression, tether.Weight)
    assert [v.path for v in loaded.weights] == [v.path for v in plain.weights]


def test_clone_is_tied_within_itself_and_not_to_the_original(x):
    model = autoencoder()
    clone = keras.models.clone_model(model)
    assert is_tied(clone)
    weights_of(clone).assign(np.zeros((5, 3)))
    assert np.abs(weights_of(model).numpy()).max() > 0


def test_recursive_clone_of_nested_models_is_tied():
    table = tether.Weight(name="table")
    inner = keras.Sequential(
        [keras.Input((4,)), tether.tie(keras.layers.Dense(4, name="a"), kernel=table)], name="inner"
    )
    inputs = keras.Input((4,))
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(4, name="b"), kernel=table.T)(inner(inputs)))
    for recursive in (False, True):
        clone = keras.models.clone_model(model, recursive=recursive)
        a = clone.get_layer("inner").get_layer("a").kernel.expression
        assert clone.get_layer("b").kernel.expression == a.T
        assert a is not table


def test_clone_function_that_edits_configs_keeps_the_tie():
    def quiet(layer):
        config = layer.get_config()
        if "activation" in config:
            config["activation"] = "linear"
        return layer.__class__.from_config(config)

    clone = keras.models.clone_model(autoencoder(), clone_function=quiet)
    assert is_tied(clone)
    assert clone.get_layer("encode").activation is keras.activations.linear


def test_deepcopy_and_pickle_of_a_model(x):
    model = autoencoder(compiled=True)
    model.fit(x, x, verbose=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_tied(other)
        assert weights_of(other) is not weights_of(model)
        assert np.array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


def test_deepcopy_and_pickle_of_a_plain_list_of_layers_keep_them_tied():
    codec = tether.Weight(name="codec")
    layers = [
        tether.tie(keras.layers.Dense(3), kernel=codec),
        tether.tie(keras.layers.Dense(5), kernel=codec.T),
    ]
    layers[0].build((None, 5)), layers[1].build((None, 3))
    for a, b in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert b.kernel.expression == a.kernel.expression.T
        assert a.kernel.expression is not codec
        assert np.array_equal(numpy(a.kernel.value), codec.numpy())


def test_two_partial_clones_one_after_the_other_are_not_tied():
    model = autoencoder()
    a, b = (type(layer).from_config(layer.get_config()) for layer in model.layers[1:])
    a.build((None, 5)), b.build((None, 3))
    assert a.kernel.expression is not b.kernel.expression.operands[0]


def test_one_file_loaded_twice_gives_two_models(tmp_path):
    autoencoder().save(tmp_path / "m.keras")
    a, b = (keras.saving.load_model(tmp_path / "m.keras") for _ in range(2))
    assert is_tied(a) and is_tied(b) and weights_of(a) is not weights_of(b)


def test_a_load_after_a_load_that_failed_shares_nothing_with_it(tmp_path):
    model = autoencoder()
    config = model.get_config()
    broken = copy.deepcopy(config)
    broken["layers"][-1]["config"]["tether"]["ties"] = {"kernel": [{"op": "no such thing", "of": [0]}]}
    seen = []
    original = tether.Weight.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(self)

    tether.Weight.__init__ = spy
    try:
        with pytest.raises(tether.TetherError, match="no such thing"):
            keras.Model.from_config(broken)
        loaded = keras.Model.from_config(config)
    finally:
        tether.Weight.__init__ = original
    assert is_tied(loaded)
    assert len(seen) == 2 and weights_of(loaded) is seen[1]


def test_two_threads_that_load_one_file_share_nothing(tmp_path):
    autoencoder().save(tmp_path / "m.keras")
    found = []

    def load():
        for _ in range(3):
            found.append(keras.saving.load_model(tmp_path / "m.keras"))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(map(is_tied, found))
    assert len({id(weights_of(model)) for model in found}) == 6


def test_parts_saved_apart_are_tied_again_inside_an_explicit_scope(tmp_path):
    model = autoencoder()
    keras.Sequential([keras.Input((5,)), model.get_layer("encode")]).save(tmp_path / "a.keras")
    keras.Sequential([keras.Input((3,)), model.get_layer("decode")]).save(tmp_path / "b.keras")
    apart = [keras.saving.load_model(tmp_path / name) for name in ("a.keras", "b.keras")]
    with tether.sharing():
        joined = [keras.saving.load_model(tmp_path / name) for name in ("a.keras", "b.keras")]
    for (a, b), tied in ((apart, False), (joined, True)):
        assert (b.layers[0].kernel.expression.operands[0] is a.layers[0].kernel.expression) is tied


def test_model_checkpoint_and_backup_and_restore(tmp_path, x):
    model = autoencoder(compiled=True)
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras"),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    model.fit(x, x, epochs=2, verbose=0, callbacks=callbacks)
    assert is_tied(keras.saving.load_model(tmp_path / "best.keras"))

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    whole, broken = autoencoder(compiled=True), autoencoder(compiled=True)
    broken.set_weights(whole.get_weights())
    whole.fit(x, x, epochs=4, shuffle=False, verbose=0)
    backup = lambda: keras.callbacks.BackupAndRestore(tmp_path / "resumed")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        broken.fit(x, x, epochs=4, shuffle=False, verbose=0, callbacks=[backup(), Stop()])
    resumed = autoencoder(compiled=True)
    resumed.fit(x, x, epochs=4, shuffle=False, verbose=0, callbacks=[backup()])
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_saving_what_would_be_lost_is_refused(tmp_path):
    @keras.saving.register_keras_serializable(package="survival")
    class Holder(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = keras.layers.Dense(4), keras.layers.Dense(4)

        def call(self, inputs):
            return self.b(self.a(inputs))

    model = Holder()
    model(np.ones((2, 4), "float32"))
    tether.tie(model.b, kernel=tether.weight_of(model.a, "kernel"))
    with pytest.raises(tether.TetherError, match="would lose a tie"):
        model.save(tmp_path / "m.keras")

    model = Holder()
    model(np.ones((2, 4), "float32"))
    tether.tie(model, {"b/kernel": tether.weight_of(model, "a/kernel")})
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.b.kernel.expression is loaded.a.kernel.expression
    assert np.array_equal(numpy(loaded.b.kernel.value), numpy(model.a.kernel.value))


@keras.saving.register_keras_serializable(package="survival")
class TiedInside(keras.Model):
    """Ties in its constructor, so that its own config makes the tie again."""

    def __init__(self, width=3, **kwargs):
        super().__init__(**kwargs)
        self.codec = tether.Weight(name="codec")
        self.encode = tether.tie(keras.layers.Dense(width), kernel=self.codec)
        self.decode = tether.tie(keras.layers.Dense(5), kernel=self.codec.T)

    def call(self, inputs):
        return self.decode(self.encode(inputs))


def test_a_subclassed_model_that_ties_in_its_constructor_saves_and_loads(tmp_path, x):
    model = TiedInside()
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(loaded.weights) == 3 and loaded.decode.kernel.expression == loaded.codec.T
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


BACKENDS = ("jax", "torch", "tensorflow")
NEXT, LAST = (BACKENDS[(BACKENDS.index(keras.backend.backend()) + step) % 3] for step in (1, 2))


@pytest.mark.parametrize("backend", [NEXT, pytest.param(LAST, marks=pytest.mark.slow)])
def test_a_file_of_this_backend_is_read_by_the_others(backend, tmp_path, x):
    model = autoencoder(compiled=True)
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "x.npz", x=x, y=model.predict(x, verbose=0))
    script = (
        "import sys, numpy as np, keras, tether\n"
        "torch = sys.argv[2] == 'torch'\n"  # Keras itself cannot train elsewhere with an optimizer of PyTorch's own
        "m = keras.saving.load_model(sys.argv[1] + '/m.keras', compile=not torch)\n"
        "m.jit_compile = False\n"  # what the file says would have PyTorch compile with a compiler of C++ for a minute
        "d = np.load(sys.argv[1] + '/x.npz')\n"
        "assert len(m.weights) == 3\n"
        "assert m.layers[2].kernel.expression == m.layers[1].kernel.expression.T\n"
        "np.testing.assert_allclose(m.predict(d['x'], verbose=0), d['y'], rtol=1e-5, atol=1e-6)\n"
        "if torch:\n    m.compile('adam', 'mse')\n"
        "m.fit(d['x'], d['x'], verbose=0)\n"
        "print('read on', keras.backend.backend(), len(m.optimizer.variables))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), keras.backend.backend()],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"read on {backend} {len(model.optimizer.variables)}" in run.stdout, run.stderr


def test_the_config_holds_the_tie_under_one_flat_key(tmp_path):
    autoencoder().save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        config = json.loads(archive.read("config.json"))
    (decode,) = [layer for layer in config["config"]["layers"] if layer["config"]["name"] == "decode"]
    assert decode["class_name"] == "Dense" and decode["registered_name"] == "tether>Tied"
    assert decode["config"]["units"] == 5
    assert list(decode["config"]["tether"]) == ["needs", "version", "base", "ties", "weights"]


def test_a_tied_layer_is_loaded_in_safe_mode_without_custom_objects(tmp_path):
    autoencoder().save(tmp_path / "m.keras")
    assert is_tied(keras.saving.load_model(tmp_path / "m.keras", safe_mode=True, custom_objects=None))


def test_file_sizes(tmp_path):
    codec = tether.Weight(name="codec")
    inputs = keras.Input((400,))
    hidden = tether.tie(keras.layers.Dense(300), kernel=codec)(inputs)
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(400), kernel=codec.T)(hidden))
    unique = 4 * model.count_params()
    model.save_weights(tmp_path / "m.weights.h5")
    model.save(tmp_path / "m.keras")
    assert os.path.getsize(tmp_path / "m.weights.h5") <= 1.02 * unique + 50_000
    assert os.path.getsize(tmp_path / "m.keras") <= 1.02 * unique + 50_000
    model.compile("adam", "mse")
    x = np.ones((2, 400), "float32")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "c.keras")
    assert os.path.getsize(tmp_path / "c.keras") <= 3 * (1.02 * unique) + 50_000


def test_skip_mismatch_of_a_plain_file_gives_each_layer_its_own_values(tmp_path):
    def stack():
        inputs = keras.Input((4,))
        outputs = inputs
        for name in "abc":
            outputs = keras.layers.Dense(4, name=name)(outputs)
        return keras.Model(inputs, outputs)

    plain, tied = stack(), stack()
    plain.save_weights(tmp_path / "m.weights.h5")
    tether.weight_of(tied.get_layer("b"), "kernel")
    tied.load_weights(tmp_path / "m.weights.h5", skip_mismatch=True)
    for name in "abc":
        assert_close(tied.get_layer(name).kernel.value, plain.get_layer(name).kernel.value, 0)

"""A good file that cannot be loaded here: the error says why, and calls nothing damaged."""

import errno
import json

import keras
import numpy as np
import pytest

import tether
from tests.files import hostile
from tests.support import numpy
from tether.errors import InvalidConfig, TetherError
from tether.files.keras import archive

register = keras.saving.register_keras_serializable("test_making")
RAISES = {}
"""What methods of `Own` raise, by their names."""


def maybe_raise(method):
    if method in RAISES:
        raise RAISES[method]


@register
class Own(keras.layers.Layer):
    """A layer of the user's, whose methods fail on request."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        maybe_raise("__init__")

    def build(self, shape):
        maybe_raise("build")
        self.scale = self.add_weight(shape[-1:], "ones", name="scale")

    def call(self, x):
        maybe_raise("call")
        return x * self.scale

    @classmethod
    def from_config(cls, config):
        maybe_raise("from_config")
        return cls(**config)

    def load_own_variables(self, store):
        maybe_raise("load_own_variables")
        super().load_own_variables(store)

    def save_own_variables(self, store):
        maybe_raise("save_own_variables")
        super().save_own_variables(store)


@register
class TiedOwn(keras.layers.Dense):
    """A class that is only in the record of a tie."""


@register
class Start(keras.initializers.Initializer):
    """An initializer of a weight."""

    def __call__(self, shape, dtype=None):
        return keras.ops.ones(shape, dtype)


@register
def activate(x):
    return x


@register
def twice(x):
    return 2.0 * x


@register
def loss(truth, output):
    return keras.ops.mean((truth - output) ** 2)


NAMES = {each.__name__: each for each in (Own, TiedOwn, Start, activate, twice, loss)}


@pytest.fixture
def unregistered():
    """Functions that make this process forget and know a class again, as if its module was not imported."""
    known = keras.saving.get_custom_objects()
    keys = {name: f"test_making>{name}" for name in NAMES}
    yield lambda name: known.pop(keys[name])
    known.update({keys[name]: each for name, each in NAMES.items()})


@pytest.fixture(autouse=True)
def nothing_raises():
    yield
    RAISES.clear()


def model():
    x, w = keras.Input((4,)), tether.Weight((4, 3), Start(), name="w")
    h = tether.tie(TiedOwn(3, name="tied", activation=activate), kernel=tether.ops.apply(twice, w))(x)
    return keras.Model(x, Own(name="own")(h))


@pytest.fixture
def path(tmp_path):
    made = model()
    made.compile("sgd", loss)
    made.optimizer.build(made.trainable_variables)
    tether.files.save_model(made, tmp_path / "model.keras")
    return tmp_path / "model.keras"


def refused(read, kind=TetherError):
    """The message with which something is refused; it calls nothing damaged, and has a cause."""
    with pytest.raises(kind) as error:
        read()
    assert "damaged" not in str(error.value) and error.value.__cause__ is not None
    return str(error.value)


# --------------------------------------------------------------------------- names that nobody knows


@pytest.mark.parametrize("name", NAMES)
def test_a_class_or_function_that_is_not_known_is_named_with_what_to_do(name, unregistered, path):
    tether.files.load_model(path)
    key = f"test_making>{name}"
    unregistered(name)
    for given in (None, {name: NAMES[name]}):  # the second time by another name than Keras looks for
        message = refused(lambda given=given: tether.files.load_model(path, custom_objects=given), InvalidConfig)
        kind = "class" if isinstance(NAMES[name], type) else "function"
        assert f"does not know the {kind} {key!r}. Import the module" in message
        assert f"`custom_objects={{{key!r}: {name}}}`" in message
    again = tether.files.load_model(path, custom_objects={key: NAMES[name]})
    assert again.count_params() == 4 * 3 + 3 + 3


def test_a_loss_that_is_not_known_is_not_asked_for_without_compiling(unregistered, path):
    unregistered("loss")
    assert not tether.files.load_model(path, compile=False).compiled


def test_what_is_read_without_making_the_model_needs_no_class(unregistered, path):
    for name in ("Own", "TiedOwn", "Start", "activate", "loss"):
        unregistered(name)
    assert [use.expression for use in tether.inspection.facts(path).uses if use.tied] == ["twice(w)"]


def test_a_checkpoint_without_notes_names_the_class_that_its_model_needs(unregistered, path):
    hostile.with_values(lambda file: file.visititems(lambda _, item: forget_notes(item.attrs)))(path)
    target = model()
    unregistered("Own")
    message = refused(lambda: tether.files.load_untied(target, path), InvalidConfig)
    assert "without the notes" in message and "does not know the class 'test_making>Own'" in message
    assert "with keras.saving.custom_object_scope({'test_making>Own': Own})" in message
    with keras.saving.custom_object_scope({"test_making>Own": Own}):
        assert not tether.files.load_untied(target, path).missing


def forget_notes(attributes):
    for key in ("tether", "tether_uid"):
        if key in attributes:
            del attributes[key]


def test_an_adapter_names_the_class_that_its_weights_need(unregistered, tmp_path):
    def plain():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])

    made = plain()
    w = tether.Weight((4, 3), Start(), name="part")
    tether.adapters.add(made, "style", {"dense/kernel": lambda base: base + w})
    tether.adapters.save(made, "style", tmp_path / "a.safetensors")
    unregistered("Start")
    target = plain()
    message = refused(lambda: tether.adapters.load(target, tmp_path / "a.safetensors"), InvalidConfig)
    assert "adapter" in message and "does not know the class 'test_making>Start'" in message
    with keras.saving.custom_object_scope({"test_making>Start": Start}):
        tether.adapters.load(target, tmp_path / "a.safetensors")
    assert np.array_equal(numpy(target.layers[0].kernel), numpy(base_of(target)) + 1.0)


def base_of(model):
    """The first weight of a model without its adapter."""
    return tether.weight_of(model, "dense/kernel").base.weights_used()[0].value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"module": "keras.layers", "class_name": "Tomorrow"}, r"Keras [\d.]+ has no 'keras.layers.Tomorrow'"),
        (
            {"module": "keras_cv.layers", "class_name": "Gone"},
            "keras_cv is not installed, which has 'keras_cv.layers.Gone'",
        ),
    ],
)
def test_a_class_that_this_keras_has_not_is_named(changes, says, path):
    hostile.with_config(lambda config: hostile.layer(config, "own").update(registered_name=None, **changes))(path)
    with pytest.raises(InvalidConfig, match=says):
        tether.files.load_model(path)


def test_an_argument_of_another_keras_is_named_with_both_versions(path):
    hostile.with_config(lambda config: hostile.layer(config, "own")["config"].update(tomorrow=1))(path)
    held = hostile.entries(path)
    hostile.write(path, {**held, "metadata.json": json.dumps({"keras_version": "3.99.0"})})
    message = refused(lambda: tether.files.load_model(path), InvalidConfig)
    assert f"written by Keras 3.99.0, and this is Keras {keras.__version__}" in message
    assert "Own 'own'" in message and "tomorrow" in message
    for metadata in ("[", '"text"', '{"keras_version": 3}'):  # of which nothing is made
        hostile.write(path, {**held, "metadata.json": metadata})
        assert "written by" not in refused(lambda: tether.files.load_model(path), InvalidConfig)


def test_a_name_that_nobody_looked_for_is_not_blamed(path):
    def unused(config):
        config["compile_config"]["more"] = {
            "class_name": "Own2",
            "config": {},
            "registered_name": "x>Own2",
            "module": "x",
        }

    hostile.with_config(unused)(path)
    RAISES["build"] = ValueError("boom")
    assert "Own2" not in refused(lambda: tether.files.load_model(path, compile=False), InvalidConfig)


def test_names_and_configs_without_end_make_no_message_without_end(path):
    hostile.with_config(lambda config: hostile.layer(config, "own").update(registered_name="x>" + "y" * 10**6))(path)
    assert len(refused(lambda: tether.files.load_model(path), InvalidConfig)) < 6000


# --------------------------------------------------------------------------- code that raises

METHODS = ["__init__", "from_config", "build", "call", "load_own_variables", "save_own_variables"]


def backend_error():
    """What the backend raises where there is too little memory."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: boom")
    if backend == "torch":
        import torch

        return torch.OutOfMemoryError("boom")
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError(None, None, "boom")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error", [ValueError("boom"), TypeError("boom"), KeyError("boom")], ids=lambda e: type(e).__name__
)
def test_what_code_of_a_class_raises_names_the_class(error, method, path):
    RAISES[method] = error
    message = refused(lambda: tether.files.load_model(path), InvalidConfig)
    assert "Own" in message and "boom" in message and type(error).__name__ in message


@pytest.mark.parametrize("method", [method for method in METHODS if method != "call"])  # no memory is taken there
@pytest.mark.parametrize("make", [MemoryError, RuntimeError, ImportError, backend_error])
def test_what_the_machine_or_the_backend_raises_is_no_fault_of_the_files(make, method, path):
    RAISES[method] = make("boom") if make is not backend_error else make()
    message = refused(lambda: tether.files.load_model(path))
    assert "Own" in message and "boom" in message
    with pytest.raises(TetherError) as error:
        tether.files.load_model(path)
    assert type(error.value) is TetherError


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupt_is_passed_on(method, path):
    RAISES[method] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tether.files.load_model(path)


# --------------------------------------------------------------------------- what is damage, and what is the system's


def test_damage_is_still_called_damage(path):
    hostile.truncated(path)
    with pytest.raises(InvalidConfig, match=r"damaged.*not a zip file"):
        tether.files.load_model(path)


@pytest.mark.parametrize("read", ["load_model", "load_untied", "check"])
def test_a_piece_of_values_that_cannot_be_unpacked_is_damage(read, tmp_path, rng):
    """The archive's checksum is right: whoever wrote the file wrote it so."""
    made, path, at = keras.Sequential([keras.Input((5,)), *map(keras.layers.Dense, (5, 5))]), tmp_path / "m.keras", []
    tether.files.save_model(made, path)

    def pack(file):
        value = file["layers/dense/vars/0"][()]
        del file["layers/dense/vars/0"]
        packed = file.create_dataset("layers/dense/vars/0", data=value, compression="gzip", fletcher32=True)
        file.flush()
        at.append(packed.id.get_chunk_info(0).byte_offset)

    hostile.with_values(pack)(path)
    readers = {
        "load_model": tether.files.load_model,
        "load_untied": lambda path: tether.files.load_untied(made, path),
        "check": tether.check,
    }
    readers[read](path)
    held = hostile.entries(path)
    data = bytearray(held["model.weights.h5"])
    data[at[0] + 12] ^= 0xFF
    hostile.write(path, {**held, "model.weights.h5": bytes(data)})
    with pytest.raises(InvalidConfig, match="is damaged"):
        readers[read](path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_a_failure_of_the_system_is_not_called_damage(number, path, monkeypatch):
    def fails(*_, **__):
        raise OSError(number, "boom")

    monkeypatch.setattr(archive.zipfile.ZipFile, "testzip", fails)
    with pytest.raises(TetherError, match=r"could not be read: .*boom") as error:
        tether.files.load_model(path)
    assert type(error.value) is TetherError
    monkeypatch.setattr(archive.zipfile.ZipFile, "testzip", lambda _: exec("raise MemoryError"))
    with pytest.raises(TetherError, match="not enough memory") as error:
        tether.files.load_model(path)
    assert type(error.value) is TetherError

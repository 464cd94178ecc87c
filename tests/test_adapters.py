"""Adapters as people manage them."""

import json
import os

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy
from tether import adapters
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName
from tether.layers.tying.state import View
from tether.weights import Weight

pytestmark = pytest.mark.spread(2)

layers = keras.layers

QUERIES = {"*query/kernel": tether.low_rank(2), "head/kernel": tether.low_rank(1)}


def make_model(seed=1, frozen=True):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3, 4))
    x = layers.MultiHeadAttention(2, 2, name="attention")(inputs, inputs)
    x = layers.BatchNormalization(name="norm")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    model.trainable = not frozen
    return model


@pytest.fixture
def data(rng):
    return rng.normal(size=(8, 3, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")


def predict(model, data):
    return model.predict(data[0], verbose=0)


def train(model, data, epochs=4):
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(*data, epochs=epochs, batch_size=8, shuffle=False, verbose=0)


def values(model):
    return {w.path: numpy(w).tobytes() for w in model.weights}


@pytest.fixture
def trained(data):
    model = make_model()
    before = predict(model, data)
    adapters.add(model, "french", QUERIES)
    train(model, data)
    return model, before, predict(model, data)


def test_only_the_adapter_learns_and_off_is_the_base_to_the_last_bit(trained, data):
    model, before, after = trained
    assert {w.name for w in model.trainable_weights} == {"kernel_lora_a", "kernel_lora_b"}
    assert len(model.trainable_weights) == 4
    assert np.max(np.abs(after - before)) > 1e-3
    adapters.activate(model)
    np.testing.assert_array_equal(predict(model, data), before)
    adapters.activate(model, "french")
    np.testing.assert_array_equal(predict(model, data), after)


def test_adding_changes_no_output(data):
    for frozen in (True, False):
        model = make_model(frozen=frozen)
        before, count = predict(model, data), len(model.trainable_weights)
        adapters.add(model, "french", QUERIES)
        np.testing.assert_array_equal(predict(model, data), before)
        assert len(model.trainable_weights) == (4 if frozen else count - 2 + 4)


def test_several_adapters_make_a_weighted_sum(trained, data):
    model, _before, _ = trained
    adapters.add(model, "german", {"head/kernel": tether.low_rank(1, start=np.ones((12, 2), "float32"))})
    assert adapters.names(model) == ["french", "german"]
    head = model.get_layer("head")
    parts = {}
    for name in ("french", "german"):
        adapters.activate(model, name)
        parts[name] = numpy(head.kernel.value)
    adapters.activate(model)
    base = numpy(head.kernel.value)
    adapters.set_strengths(model, {"french": 0.3, "german": 0.7})
    assert adapters.strengths(model) == pytest.approx({"french": 0.3, "german": 0.7})
    mixed = base + 0.3 * (parts["french"] - base) + 0.7 * (parts["german"] - base)
    np.testing.assert_allclose(numpy(head.kernel.value), mixed, atol=1e-5)
    adapters.set_strengths(model, {"german": 0})
    assert adapters.strengths(model)["french"] == pytest.approx(0.3)


def test_one_is_removed_and_another_loaded(trained, data, tmp_path):
    model, before, after = trained
    file = tmp_path / "french.safetensors"
    adapters.save(model, "french", file)
    adapters.remove(model, "french")
    assert adapters.names(model) == []
    np.testing.assert_array_equal(predict(model, data), before)
    adapters.load(model, file, name="again")
    assert adapters.names(model) == ["again"]
    np.testing.assert_array_equal(predict(model, data), after)
    assert {w.name for w in model.trainable_weights} == {"kernel_lora_a", "kernel_lora_b"}


def test_the_file_holds_the_adapter_alone_and_fits_another_process_model(trained, data, tmp_path):
    from safetensors import safe_open

    model, _, after = trained
    file = tmp_path / "french.safetensors"
    adapters.save(model, "french", file)
    with safe_open(str(file), framework="np") as opened:
        sizes = sorted(opened.get_tensor(key).size for key in opened.keys())  # noqa: SIM118
    assert sizes == sorted([4 * 2, 2 * 2 * 2, 12, 2])
    assert os.path.getsize(file) < 8_000
    fresh = make_model()
    adapters.load(fresh, file)
    np.testing.assert_allclose(predict(fresh, data), after, atol=1e-6)


def test_a_saved_model_keeps_its_adapters(trained, data, tmp_path):
    model, before, after = trained
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(again, data), after, atol=1e-6)
    assert adapters.names(again) == ["french"]
    assert len(again.trainable_weights) == 4
    adapters.activate(again)
    np.testing.assert_allclose(predict(again, data), before, atol=1e-6)
    adapters.save(again, "french", tmp_path / "french.safetensors")
    adapters.remove(again, "french")
    adapters.load(again, tmp_path / "french.safetensors")
    adapters.activate(again, "french")
    np.testing.assert_allclose(predict(again, data), after, atol=1e-6)


def test_training_goes_on_after_a_file_as_if_it_had_not_stopped(trained, data, tmp_path):
    model = trained[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, again):
        one.fit(*data, epochs=2, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_allclose(predict(again, data), predict(model, data), atol=1e-5)


def test_forms_that_are_no_sums_add_their_difference(data):
    model = make_model()
    before = predict(model, data)
    adapters.add(model, "scaled", {"head/kernel": tether.forms.scale()})
    np.testing.assert_allclose(predict(model, data), before, atol=1e-6)
    train(model, data)
    assert np.max(np.abs(predict(model, data) - before)) > 1e-3
    adapters.activate(model)
    np.testing.assert_array_equal(predict(model, data), before)


def test_a_form_over_its_base_travels_in_a_file(data, tmp_path):
    model = make_model()
    adapters.add(model, "scaled", {"head/kernel": tether.forms.scale()})
    train(model, data)
    adapters.save(model, "scaled", tmp_path / "a.safetensors")
    fresh = make_model()
    adapters.load(fresh, tmp_path / "a.safetensors")
    np.testing.assert_allclose(predict(fresh, data), predict(model, data), atol=1e-6)


def test_merging_and_taking_apart_a_thousand_times_loses_no_bit_in_bfloat16(rng):
    layer = layers.Dense(3, dtype="bfloat16", name="d")
    layer.build((None, 4))
    layer.kernel.assign(rng.normal(size=(4, 3)))
    base = numpy(layer.kernel).tobytes()
    adapters.add(layer, "a", {"kernel": tether.low_rank(2, start=rng.normal(size=(4, 3)))})
    stored = {w.path: numpy(w).tobytes() for w in layer.weights}
    merged = None
    for _ in range(1000):
        adapters.merge(layer)
        now = numpy(layer.kernel).tobytes()
        assert merged is None or now == merged
        merged = now
        adapters.unmerge(layer)
    assert {w.path: numpy(w).tobytes() for w in layer.weights} == stored
    adapters.remove(layer, "a")
    assert numpy(layer.kernel.value).tobytes() == base


def test_a_merged_model_is_plain_until_it_is_taken_apart(trained, data, tmp_path):
    model, _, after = trained
    adapters.merge(model)
    assert isinstance(model.get_layer("head").kernel, keras.Variable)
    assert not isinstance(model.get_layer("head").kernel, View)
    np.testing.assert_allclose(predict(model, data), after, atol=1e-6)
    assert len(model.weights) == len(make_model().weights)
    assert adapters.names(model) == ["french"]
    for wrong in (
        lambda: adapters.add(model, "x", QUERIES),
        lambda: adapters.remove(model, "french"),
        lambda: adapters.merge(model),
    ):
        with pytest.raises(TetherError, match="merged"):
            wrong()
    adapters.unmerge(model)
    np.testing.assert_array_equal(predict(model, data), after)
    assert {w.name for w in model.trainable_weights} == {"kernel_lora_a", "kernel_lora_b"}
    with pytest.raises(TetherError, match="not merged"):
        adapters.unmerge(model)


def test_materialize_gives_a_plain_copy(trained, data):
    model, _, after = trained
    plain = tether.materialize(model)
    np.testing.assert_allclose(predict(plain, data), after, atol=1e-6)
    assert adapters.names(plain) == []
    assert adapters.names(model) == ["french"]


def test_an_adapter_added_after_fit_asks_for_compile_on_every_backend(data):
    model = make_model(frozen=False)
    train(model, data, epochs=1)
    adapters.add(model, "french", QUERIES)
    with pytest.raises(ValueError, match="compile"):
        model.fit(*data, verbose=0)
    base = numpy(tether.weight_of(model, "head/kernel").operands[0].value)
    train(model, data, epochs=1)
    np.testing.assert_array_equal(numpy(tether.weight_of(model, "head/kernel").operands[0].value), base)


def test_strengths_need_no_new_compilation(trained, data):
    model = trained[0]
    predict(model, data)
    function = model.predict_function
    adapters.set_strengths(model, {"french": 0.5})
    predict(model, data)
    assert model.predict_function is function
    model.fit(*data, verbose=0)
    adapters.activate(model)
    predict(model, data)
    assert model.predict_function is function


# --------------------------------------------------------------------------- what is refused


def test_names_are_known_and_taken_once(trained):
    model = trained[0]
    for wrong in ("french", "", 3, None):
        with pytest.raises(TetherError, match="a name of its own"):
            adapters.add(model, wrong, QUERIES)
    for function in (adapters.remove, adapters.activate, lambda m, n: adapters.save(m, n, "x.safetensors")):
        with pytest.raises(UnknownName, match="It has: french"):
            function(model, "dutch")
    with pytest.raises(UnknownName, match="It has: french"):
        adapters.set_strengths(model, {"dutch": 1.0})
    for wrong in (float("nan"), "1", True, None):
        with pytest.raises(TetherError, match="finite number"):
            adapters.set_strengths(model, {"french": wrong})


def test_a_failed_call_changes_nothing(data):
    model = make_model()
    before, known = predict(model, data), values(model)
    for changes in (
        {"no_such": tether.low_rank(1)},
        {"head/bias": tether.low_rank(1)},
        {},
        None,
        {"head/kernel": "no form"},
    ):
        with pytest.raises(TetherError):
            adapters.add(model, "a", changes)
    assert adapters.names(model) == []
    assert type(model.get_layer("head")) is layers.Dense
    assert values(model) == known
    np.testing.assert_array_equal(predict(model, data), before)
    with pytest.raises(TetherError, match="not built"):
        adapters.add(layers.Dense(3), "a", QUERIES)


def test_a_file_that_is_no_adapter_is_refused(trained, data, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = trained[0]
    good = tmp_path / "good.safetensors"
    adapters.save(model, "french", good)
    whole = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    fresh = make_model()
    for content in (b"", b"no file", whole[:40], whole[:-8], b"\xff" * 100):
        bad.write_bytes(content)
        with pytest.raises(InvalidConfig):
            adapters.load(fresh, bad)
    save_file(load_file(good), bad)
    with pytest.raises(InvalidConfig, match="no adapter"):
        adapters.load(fresh, bad)
    for header in ("{", "[]", json.dumps({"version": 1}), json.dumps({"version": 99, "ties": {}}), "[" * 100_000):
        save_file(load_file(good), bad, metadata={"format": "tether.adapter", "adapter": header})
        with pytest.raises(InvalidConfig):
            adapters.load(fresh, bad)
    with pytest.raises(TetherError, match="no file"):
        adapters.load(fresh, tmp_path / "nowhere.safetensors")
    with pytest.raises(TetherError, match=r"\.safetensors"):
        adapters.save(model, "french", tmp_path / "french.bin")
    assert adapters.names(fresh) == []
    assert all(type(layer) is not Weight for layer in fresh.layers)


def test_an_adapter_for_another_model_is_refused(trained, tmp_path):
    file = tmp_path / "french.safetensors"
    adapters.save(trained[0], "french", file)
    inputs = keras.Input((3, 4))
    other = keras.Model(inputs, layers.Dense(2, name="head")(inputs))
    with pytest.raises(UnknownName):
        adapters.load(other, file)
    x = layers.MultiHeadAttention(2, 2, name="attention")(inputs, inputs)
    x = layers.BatchNormalization(name="norm")(x)
    wider = keras.Model(inputs, layers.Dense(5, name="head")(layers.Flatten()(x)))
    with pytest.raises(ShapeMismatch):
        adapters.load(wider, file)
    for model in (other, wider):
        assert adapters.names(model) == []
        assert type(model.get_layer("head")) is layers.Dense


def test_a_save_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch):
    file = tmp_path / "french.safetensors"
    adapters.save(trained[0], "french", file)
    before = file.read_bytes()
    monkeypatch.setattr(json, "dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapters.save(trained[0], "french", file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == [file.name]

"""What one backend wrote, the others read: bit by bit where nothing is computed."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import tether
from tests.files.models import autoencoder, randomize, stack
from tests.scenarios.test_b_one_layer_several_places import inside_and_outside
from tests.support import numpy

BACKEND = keras.backend.backend()
OTHERS = sorted({"jax", "torch", "tensorflow"} - {BACKEND})

WRITER = """
import sys
from pathlib import Path
import numpy as np
from tests.files.test_across_backends import write_all
write_all(Path(sys.argv[1]))
"""


def models():
    """A tied and an untied model, and one with an adapter, with values from a fixed seed."""
    rng = np.random.default_rng(5)
    tied, plain = randomize(autoencoder(True, dtype="bfloat16"), rng), randomize(stack(False), rng)
    plain.trainable = False
    child = tether.inherit(plain, {"head/kernel": tether.low_rank(2, alpha=4)}, name="child")
    randomize(child, rng)
    return {"tied": tied, "child": child, "agreeing": agreeing(rng)}


def agreeing(rng):
    model = randomize(autoencoder(False), rng)
    model.layers[2].kernel.assign(numpy(model.layers[1].kernel).T)
    return model


def write_all(folder):
    """Every model in every format, and what it computes."""
    for name, model in models().items():
        tether.files.save_model(model, folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        tether.files.save_safetensors(model, folder / f"{name}.safetensors")
        np.save(folder / f"{name}.npy", numpy(model(inputs(name))).astype("float32"))
    tether.files.save_peft(models()["child"], folder / "lora")
    for name, model in wholes().items():
        tether.files.save_model(model, folder / f"{name}.keras")
        np.save(folder / f"{name}.npy", np.concatenate([numpy(y).ravel() for y in outputs(name, model)]))


def wholes():
    """Rows B2, B12, B13, C13 and C6 of the scenarios: trained, one layer in several places, in two files, resized,
    quantised."""
    rng = np.random.default_rng(6)
    trained = randomize(autoencoder(True), rng)
    trained.compile("adam", "mse")
    trained.optimizer.build(trained.trainable_variables)
    for variable in trained.optimizer.variables[2:]:
        variable.assign(rng.uniform(0.1, 0.2, variable.shape).astype("float32"))
    several = randomize(inside_and_outside(), rng)
    whole = randomize(autoencoder(True), rng)
    parts = {}
    for name in ("encode", "decode"):
        layer = whole.get_layer(name)
        x = keras.Input((5 if name == "encode" else 3,))
        parts[name] = keras.Model(x, layer(x), name=name)
    resized = randomize(stack(True), rng)
    tether.files.resize(tether.weight_of(resized, "embed/embeddings"), 0, 9, fill="mean", model=resized)
    quantized = {mode: randomize(autoencoder(True), rng) for mode in ("int8", "int4")}
    for mode, model in quantized.items():
        model.layers[1].quantize(mode)
    return {"trained": trained, "several": several, **parts, "resized": resized, **quantized}


def outputs(name, model):
    size = model.input_shape[-1]
    rows = np.array([[1, 2, 8, 0]], "int32") if name == "resized" else np.linspace(-1, 1, 2 * size).reshape(2, size)
    found = model(rows if name == "resized" else rows.astype("float32"))
    return found if isinstance(found, list) else [found]


def inputs(name):
    return (
        np.array([[1, 2, 6, 0]], "int32") if name == "child" else np.linspace(-1, 1, 10, dtype="float32").reshape(2, 5)
    )


@pytest.mark.slow
@pytest.mark.parametrize("writer", OTHERS)
def test_what_another_backend_wrote_is_read(writer, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": writer, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rng = np.random.default_rng(0)
    for name, expected in models().items():
        values = [value.tobytes() for value in expected.get_weights()]
        loaded = tether.files.load_model(tmp_path / f"{name}.keras")
        assert [value.tobytes() for value in loaded.get_weights()] == values
        tolerance = 0.05 if name == "tied" else 1e-5  # bfloat16
        written = np.load(tmp_path / f"{name}.npy")
        assert np.allclose(numpy(loaded(inputs(name))).astype("float32"), written, atol=tolerance, rtol=tolerance)
        for load, path in (
            (tether.files.load_untied, tmp_path / f"{name}.weights.h5"),
            (tether.files.load_safetensors, tmp_path / f"{name}.safetensors"),
        ):
            randomize(loaded, rng)
            load(loaded, path)
            assert [value.tobytes() for value in loaded.get_weights()] == values, path.name
    target = autoencoder(True)
    for path in ("agreeing.keras", "agreeing.weights.h5"):
        randomize(target, rng)
        assert not tether.files.load_untied(target, tmp_path / path).conflicting
        assert np.array_equal(numpy(target.layers[2].kernel), numpy(models()["agreeing"].layers[2].kernel))
    plain = stack(False)
    tether.files.load_safetensors(plain, tmp_path / "child.safetensors", strict=False)
    tether.files.load_peft(plain, tmp_path / "lora")
    assert np.allclose(numpy(plain(inputs("child"))), np.load(tmp_path / "child.npy"), atol=1e-5)
    read_wholes(tmp_path)


def read_wholes(folder):
    read = {}
    for name, expected in wholes().items():
        loaded = read[name] = tether.files.load_model(folder / f"{name}.keras")
        assert [value.tobytes() for value in loaded.get_weights()] == [v.tobytes() for v in expected.get_weights()]
        found = np.concatenate([numpy(y).ravel() for y in outputs(name, loaded)])
        assert np.allclose(found, np.load(folder / f"{name}.npy"), atol=1e-5), name
    slots = zip(read["trained"].optimizer.variables, wholes()["trained"].optimizer.variables, strict=True)
    assert all(numpy(mine).tobytes() == numpy(theirs).tobytes() for mine, theirs in slots)
    assert read["several"].get_layer("part").get_layer("shared") is read["several"].get_layer("shared")
    assert len(tether.files.retie(read["encode"], read["decode"]).loaded) == 1
    kernel = np.full((5, 3), 2.0, "float32")
    read["encode"].layers[-1].kernel.assign(kernel)
    assert np.array_equal(numpy(read["decode"].layers[-1].kernel), kernel.T)


@pytest.mark.slow
def test_the_writer_writes_what_it_is_asked_to(tmp_path):
    write_all(tmp_path)
    assert len(list(tmp_path.iterdir())) == 13 + 14
    read_wholes(tmp_path)

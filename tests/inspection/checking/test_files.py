"""What a file tells of itself, without the model being made."""

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import tether
from tests.inspection.checking.faults import FAULTS, normal, tied_pair, trained

layers = keras.layers
SUFFIXES = ["keras", "weights.h5"]


def written(model, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    (model.save if suffix == "keras" else model.save_weights)(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tied_model_has_a_clean_file(suffix, rng, tmp_path):
    model, _ = tied_pair(rng)
    trained(model, rng)
    found = tether.check(written(model, tmp_path, suffix))
    assert not found and len(found.rules) >= 5


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_variable_that_keras_wrote_twice_is_found(suffix, dtype, rng, tmp_path):
    keras.config.set_dtype_policy(dtype)
    model, _ = FAULTS["a_variable_in_two_layers"].make(rng, True)
    model.layers[0].kernel.assign(normal(rng, 6, 6))
    (finding,) = tether.check(written(model, tmp_path, suffix))
    assert (finding.rule, finding.severity) == ("stored-twice", "warning")
    assert finding.where == "layers/dense_1/vars/0" and "layers/dense/vars/0" in finding.why


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_transposed_copy_is_found(suffix, rng, tmp_path):
    model, _ = FAULTS["a_transposed_copy"].make(rng, True)
    (finding,) = tether.check(written(model, tmp_path, suffix))
    assert finding.rule == "equal-weights" and "transposed" in finding.why


def test_a_file_of_a_wrapper_that_keeps_a_weight_of_its_part_is_clean(rng, tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.SpectralNormalization(layers.Dense(6)), layers.Dense(6)])
    model.save(tmp_path / "m.keras")
    assert not tether.check(tmp_path / "m.keras")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_a_safetensors_file_is_judged_by_its_values(dtype, rng, tmp_path):
    w = normal(rng, 8, 5).astype(dtype)
    tensors = {
        "a.weight": w,
        "b.weight": w.copy(),
        "c.weight": np.ascontiguousarray(w.T),
        "d.bias": np.zeros(20, dtype),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    found = tether.check(tmp_path / "m.safetensors")
    assert {(f.rule, f.where) for f in found} == {("stored-twice", "b.weight"), ("equal-weights", "c.weight")}


def test_a_quantised_copy_is_found(rng, tmp_path):
    model, _ = FAULTS["one_of_two_copies_quantised"].make(rng, True)
    found = tether.check(written(model, tmp_path, "keras"))
    assert [finding.rule for finding in found] == ["quantized-beside-float"]


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "ftrl", "lion", "adamax", "nadam", "rmsprop", "sgd"])
def test_the_state_of_every_optimizer_fits(optimizer, rng, tmp_path):
    model = trained(keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(6)]), rng, optimizer)
    assert not tether.check(model, rules=["misfit-slot"])
    assert not tether.check(written(model, tmp_path, "keras"), rules=["misfit-slot"])


def test_a_slot_that_fits_no_weight_is_found(rng, tmp_path):
    model = trained(keras.Sequential([keras.Input((6,)), layers.Dense(6)]), rng)
    path = written(model, tmp_path, "weights.h5")
    with h5py.File(path, "r+") as file:
        place = next(f"optimizer/vars/{key}" for key, item in file["optimizer/vars"].items() if item.shape == (6, 6))
        del file[place]
        file[place] = np.zeros((7, 9), "float32")
    (finding,) = tether.check(path)
    assert finding.rule == "misfit-slot" and finding.where.startswith(place) and "(7, 9)" in finding.why


def test_a_broken_file_is_an_error(tmp_path):
    (tmp_path / "m.keras").write_bytes(b"nothing")
    with pytest.raises(tether.TetherError, match="broken"):
        tether.check(tmp_path / "m.keras")
    with pytest.raises(FileNotFoundError):
        tether.check(tmp_path / "other.keras")

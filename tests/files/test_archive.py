"""Looking at an archive before anything in it is believed."""

import zipfile

import keras
import numpy as np
import pytest

import tether
from tests.files import hostile
from tether.errors import InvalidConfig, TetherError, Unsupported
from tether.files.keras.archive import contents, opened_values, with_config


@pytest.fixture
def good(tmp_path):
    tether.files.save_model(hostile.tied_model(), tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_it_says_what_the_file_holds(good):
    found = contents(good)
    assert found.config["class_name"] == "Functional"
    assert sorted(found.values.values()) == [(3,), (4,), (4, 3)]
    assert found.elements == 3 + 4 + 12


def test_a_compressed_archive_is_read_as_well(good, rng):
    hostile.write(good, hostile.entries(good), zipfile.ZIP_DEFLATED)
    assert contents(good, whole=True).elements == 19
    model = tether.files.load_model(good)
    assert len(model.weights) == 3


def test_the_values_are_those_that_were_saved(tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    model.layers[0].kernel.assign(value := rng.normal(size=(4, 3)).astype("float32"))
    tether.files.save_model(model, tmp_path / "model.keras")
    with opened_values(tmp_path / "model.keras") as values:
        assert np.array_equal(values["layers/dense/vars/0"][()], value)


def test_a_flipped_bit_is_seen_only_when_the_whole_file_is_read(good):
    hostile.flipped(good, 0.5)
    with pytest.raises(InvalidConfig, match="checksum"):
        contents(good, whole=True)


def test_an_encrypted_entry_is_refused(good):
    data = bytearray(good.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    good.write_bytes(bytes(data))
    with pytest.raises(InvalidConfig, match="encrypted"):
        contents(good)


def test_an_entry_that_is_not_where_the_archive_says_is_refused(good):
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        start = archive.getinfo("model.weights.h5").header_offset
    data[start] = 0
    good.write_bytes(bytes(data))
    with pytest.raises(InvalidConfig, match="damaged"):
        contents(good)


def test_values_of_another_format_are_named(good):
    held = hostile.entries(good)
    hostile.write(good, {"config.json": held["config.json"], "model.weights.npz": b""})
    with pytest.raises(Unsupported, match=r"no model\.weights\.h5"):
        contents(good)


def test_a_config_of_more_than_its_limit_is_refused(good):
    hostile.BOMBS["config"](good)
    with pytest.raises(InvalidConfig, match="larger than"):
        contents(good)


def test_a_packed_config_of_brackets_is_refused_before_it_is_read(good):
    held = hostile.entries(good)
    hostile.write(good, {**held, "config.json": b"[" + b"[]," * (6 * 2**20) + b"1]"}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidConfig, match="larger than"):
        contents(good)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(TetherError, match="There is no file"):
        contents(tmp_path)


def test_another_config_leaves_the_other_entries_as_they_are(good, tmp_path):
    with_config(good, tmp_path / "other.keras", {"config": {}})
    before, after = hostile.entries(good), hostile.entries(tmp_path / "other.keras")
    assert list(before) == list(after) and after["config.json"] == b'{"config": {}}'
    assert all(before[name] == after[name] for name in before if name != "config.json")

"""Tensors of which several files have a slice each: read by parts, put together, and refused if one is missing."""

import json

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

import tether
from tether.errors import InvalidConfig, TetherError
from tether.files.tensors import tensor_file
from tether.files.tensors.slices import SLICES
from tether.files.tensors.tensor_file import opened_tensors
from tether.keras_seam import processes

RIGHT = np.arange(70, dtype="float32").reshape(10, 7)
GRID = [((0, 0), (6, 3)), ((6, 0), (4, 3)), ((0, 3), (6, 4)), ((6, 3), (4, 4))]
"""Where the slices begin, and their sizes: a grid of unequal ones."""


def piece(start, size, of="table"):
    place = tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))
    return f"{of}[{', '.join(f'{each.start}:{each.stop}' for each in place)}]", place


def written(folder, slices=GRID, *, right=RIGHT, change=None, parts=2, extra=()):
    """A folder of files with slices, and an index of them; `change` gets what each file says, and its tensors."""
    index = {}
    for number in range(parts):
        tensors, said = {}, {}
        for start, size in slices[number::parts]:
            name, place = piece(start, size)
            tensors[name] = np.ascontiguousarray(right[place])
            said[name] = {"of": "table", "shape": list(right.shape), "start": list(start)}
        tensors.update(dict(extra) if number == 0 else {})
        note = {"version": 1, "slices": said}
        if change is not None:
            change(number, note, tensors)
        path = folder / f"part{number}.safetensors"
        save_file(tensors, path, {SLICES: note if isinstance(note, str) else json.dumps(note)})
        index.update(dict.fromkeys(tensors, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_slices_are_one_tensor_again(tmp_path):
    other = np.arange(4, dtype="int8")
    with opened_tensors(written(tmp_path, extra={"bias": other}.items())) as (entries, metadata):
        assert set(entries) == {"table", "bias"} and SLICES not in metadata
        assert (entries["table"].shape, entries["table"].dtype) == ((10, 7), "float32")
        np.testing.assert_array_equal(entries["table"].read(), RIGHT)
        np.testing.assert_array_equal(entries["table"].part(4, 5), RIGHT[4:9])
        for start, size in [((0, 0), (10, 7)), ((5, 2), (3, 3)), ((6, 3), (1, 1)), ((2, 6), (8, 1)), ((3, 3), (0, 2))]:
            array = np.full(size, -1, "float32")
            entries["table"].rows(array, start)
            np.testing.assert_array_equal(array, RIGHT[piece(start, size)[1]])


def test_a_model_takes_its_weight_from_slices(tmp_path):
    weight = tether.Weight((10, 7), "zeros", name="table")
    layer = keras.layers.Dense(7, use_bias=False, name="table_of")
    layer.build((None, 10))
    tether.tie(layer, kernel=weight)
    report = tether.files.load_safetensors(layer, written(tmp_path), names={"kernel": "table"})
    assert len(report.loaded) == 1
    np.testing.assert_array_equal(weight.numpy(), RIGHT)


@pytest.mark.parametrize("piece_size", [1, 1 << 12])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 5), (2, 3, 4, 5), (0, 3)])
def test_parts_of_a_tensor_are_read_from_a_file(tmp_path, monkeypatch, rng, shape, piece_size):
    monkeypatch.setattr(tensor_file, "_PIECE", piece_size)
    monkeypatch.setattr(tensor_file, "_PART", 64)  # bytes: a few rows at a time
    right = rng.integers(0, 1000, shape).astype("int32")
    path = tmp_path / "m.safetensors"
    save_file({"before": np.arange(3, dtype="int32"), "it": right}, path)
    with opened_tensors(path) as (entries, _):
        for _ in range(30):
            start = tuple(int(rng.integers(0, n + 1)) for n in shape)
            array = np.full([int(rng.integers(0, n - at + 1)) for n, at in zip(shape, start, strict=True)], -1, "int32")
            entries["it"].rows(array, start)
            np.testing.assert_array_equal(array, right[tuple(map(slice, start, np.add(start, array.shape)))])


def shifted(number, note, tensors):
    if number == 1:
        next(iter(note["slices"].values()))["start"] = [5, 0]


def larger(number, note, tensors):
    for said in note["slices"].values():
        said["shape"] = [1 << 40, 7]


def unequal(number, note, tensors):
    for said in note["slices"].values():
        said["shape"] = [10 + number, 7]


def of_another_dtype(number, note, tensors):
    for name in list(tensors) if number == 0 else ():
        tensors[name] = tensors[name].astype("float16")


def not_there(number, note, tensors):
    note["slices"]["nothing[0:1, 0:1]"] = {"of": "table", "shape": [10, 7], "start": [0, 0]}


def whole_too(number, note, tensors):
    if number == 0:
        tensors["table"] = RIGHT


def of_other_axes(number, note, tensors):
    next(iter(note["slices"].values()))["start"] = [0]


def negative(number, note, tensors):
    next(iter(note["slices"].values()))["start"] = [-6, 0]


def of_no_text(number, note, tensors):
    next(iter(note["slices"].values()))["of"] = 3


def without_slices(number, note, tensors):
    del note["slices"]


def of_a_later_version(number, note, tensors):
    note["version"] = 2


@pytest.mark.parametrize(
    "change",
    [
        shifted, unequal, of_another_dtype, not_there, whole_too, of_other_axes, negative, of_no_text, without_slices,
        of_a_later_version,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_slices_that_a_stranger_has_made_up_are_refused(tmp_path, change):
    with pytest.raises(InvalidConfig), opened_tensors(written(tmp_path, change=change)):
        pass


def test_two_slices_of_one_place_are_refused(tmp_path):
    def change(number, note, tensors):
        if number == 0:
            note["slices"]["again"] = next(iter(note["slices"].values()))
            tensors["again"] = next(iter(tensors.values()))

    with pytest.raises(InvalidConfig, match="begin at one place"), opened_tensors(written(tmp_path, change=change)):
        pass


@pytest.mark.parametrize("change", [None, larger])
def test_some_of_the_slices_are_no_tensor(tmp_path, change):
    folder = written(tmp_path, GRID if change else GRID[:3], change=change)
    with pytest.raises(TetherError, match="not all of it"), opened_tensors(folder):
        pass


def test_the_file_of_one_process_alone_says_what_to_open(tmp_path):
    folder = written(tmp_path)
    with (
        pytest.raises(TetherError, match=r"load the '\.safetensors\.index\.json'"),
        opened_tensors(folder / "part0.safetensors"),
    ):
        pass
    (folder / "part1.safetensors").unlink()
    with pytest.raises(TetherError, match=r"'part1\.safetensors' of"), opened_tensors(folder):
        pass


def test_a_folder_of_several_files_is_asked_which(tmp_path):
    for name in ("one", "two"):
        save_file({"it": RIGHT}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TetherError, match="several files of tensors"), opened_tensors(tmp_path):
        pass
    (tmp_path / "two.safetensors").unlink()
    with opened_tensors(tmp_path) as (entries, _):
        assert set(entries) == {"it"}


def test_one_process_saves_one_file_and_an_index(tmp_path, rng):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="one"), keras.layers.Dense(4, name="two")])
    tether.tie(model.get_layer("two"), kernel=tether.weight_of(model.get_layer("one"), "kernel").T)
    for _ in range(2):
        tether.files.save_safetensors(model, tmp_path, per_process=True)
        assert len(list(tmp_path.iterdir())) == 2
    before = [variable.numpy() for variable in model.weights]
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    report = tether.files.load_safetensors(model, tmp_path)
    assert len(report.loaded) == 3
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    with pytest.raises(TetherError, match="a folder that exists"):
        tether.files.save_safetensors(model, tmp_path / "m.safetensors", per_process=True)


def test_one_process_waits_for_nobody(monkeypatch):
    assert processes.process_count() == 1 and processes.place_in_step() == (0, 1)
    monkeypatch.setattr(processes, "_client", lambda: pytest.fail("asked for others"))
    with tether.distribution.gathering(), tether.distribution.time_limit(0.1):
        assert tether.Weight((2, 2), "ones", name="w").numpy().sum() == 4
        assert processes.said_by_first("word") == "word"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "10", True, None])
def test_a_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(TetherError, match="number of seconds"):
        tether.distribution.time_limit(seconds)

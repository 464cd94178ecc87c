"""What a reader does with a broken or hostile file: one clear error, nothing run, nothing changed."""

import json
import os
import shutil
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tether
from tests.documents import ROOT
from tests.files import hostile
from tests.support import numpy
from tether.errors import InvalidConfig, TetherError
from tether.files.keras.archive import contents

pytestmark = pytest.mark.spread

READERS = {"load_model": tether.files.load_model, "facts": tether.inspection.facts}
FILE = "model.keras"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / FILE
    tether.files.save_model(hostile.tied_model(), path)
    return path


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copy(good, tmp_path / FILE)


@pytest.mark.parametrize("damage", list(hostile.DAMAGED))
def test_a_damaged_file_is_a_clear_error(damage, copy):
    hostile.DAMAGED[damage](copy)
    with pytest.raises(TetherError, match=r".{20}"):
        tether.files.load_model(copy)


@pytest.mark.parametrize("where", list(hostile.OUTSIDE))
def test_nothing_is_unpacked_elsewhere(where, copy):
    hostile.OUTSIDE[where](copy)
    with pytest.raises(InvalidConfig, match=r"elsewhere|link|two entries"):
        tether.files.load_model(copy)
    assert os.listdir(copy.parent) == [FILE] and not (copy.parent.parent / "outside").exists()


MISFITS = ("no path", "another shape")  # wrong for the model, which only `load_model` makes


@pytest.mark.parametrize(
    ("reader", "plan"),
    [(reader, plan) for reader in READERS for plan in hostile.PLANS if reader == "load_model" or plan not in MISFITS],
)
def test_a_wrong_plan_is_a_clear_error(plan, reader, copy):
    hostile.PLANS[plan](copy)
    with pytest.raises(TetherError, match=r".{20}"):
        READERS[reader](copy)


@pytest.mark.parametrize("code", list(hostile.runs("")))
def test_code_that_a_file_names_is_not_run(code, copy):
    marker = copy.parent / "marker"
    hostile.runs(marker)[code](copy)
    for read in READERS.values():
        try:
            read(copy)
        except TetherError:
            continue
        assert read is tether.inspection.facts
    assert not marker.exists()


def start(module, *arguments):
    """Runs a module of the tests as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", f"tests.files.{module}", *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_what_unpacks_to_too_much_is_refused_before_it_does(tmp_path):
    run = start("bombs", tmp_path)
    assert run.returncode == 0, run.stderr
    for name, found in json.loads(run.stdout.splitlines()[-1]).items():
        if not name.startswith("facts of") or "dataset" not in name:  # facts read no values
            assert found["error"].startswith("InvalidConfig"), (name, found)
        assert found["grown"] < 200 * 2**20, (name, found)


SLOW_TO_MAKE = ("many groups",)
trees = [pytest.param(tree, marks=pytest.mark.slow) if tree in SLOW_TO_MAKE else tree for tree in hostile.NO_TREES]


@pytest.mark.parametrize("tree", trees)
def test_values_that_are_no_tree_are_refused_by_every_reader_at_once(tree, copy):
    """HDF5 holds graphs, whose paths may have no end, and names of other files."""
    weights, target = copy.with_name("model.weights.h5"), hostile.tied_model()
    target.save_weights(weights)
    before = [numpy(variable).tobytes() for variable in target.weights]
    hostile.with_values(hostile.NO_TREES[tree])(copy)
    with h5py.File(weights, "r+") as values:
        hostile.NO_TREES[tree](values)
    (index := copy.with_name("model.weights.json")).write_text(json.dumps({"weight_map": {"": [weights.name]}}))
    for path in (copy, weights, index):
        for reader, read in {**READERS, "untied": lambda path: tether.files.load_untied(target, path)}.items():
            if path is copy or reader == "untied" or (reader == "facts" and path is weights):
                with pytest.raises(InvalidConfig, match=r"another place|link|levels|names|neither") as error:
                    read(path)
                assert len(str(error.value)) < 6000, (path.name, reader)
    assert [numpy(variable).tobytes() for variable in target.weights] == before


@pytest.mark.parametrize("tree", ["loop to the top", "trillions of paths", "a soft link"])
def test_old_files_that_are_no_tree_are_refused_at_once(tree, tmp_path):
    def layer(values, name, weights=("kernel:0", "bias:0")):
        group = values.create_group(name)
        group.attrs["weight_names"] = [weight.encode() for weight in weights]
        for weight, shape in zip(weights, ((4, 3), (3,)), strict=True):
            group[weight] = np.zeros(shape, "float32")
        return group

    model, path = plain_model(), tmp_path / "old.h5"
    with h5py.File(path, "w") as values:
        values.attrs["layer_names"] = [b"dense"]
        layer(values, "dense")
        values.create_group("layers/dense/vars")
    tether.files.load_untied(model, path)
    with h5py.File(path, "r+") as values:
        hostile.NO_TREES[tree](values)
    with pytest.raises(InvalidConfig, match=r"another place|link"):
        tether.files.load_untied(model, path)


@pytest.mark.parametrize(
    ("layers", "weights"),
    [
        (["dense"] * 2, ["kernel"]),
        (["dense"], ["kernel"] * 2),
        (["nowhere"], []),
        (["dense"], ["../x"]),
        (["dense"], ["sub"]),
        (["dense/kernel"], []),
    ],
)
def test_old_files_that_name_what_they_do_not_have_are_refused(layers, weights, tmp_path):
    with h5py.File(tmp_path / "old.h5", "w") as values:
        values.attrs["layer_names"] = [name.encode() for name in layers]
        values["dense/kernel"] = np.zeros((4, 3))
        values.create_group("dense/sub")
        values["dense"].attrs["weight_names"] = [name.encode() for name in weights]
    with pytest.raises(InvalidConfig, match=r"which it names|names one thing twice"):
        tether.files.load_untied(plain_model(), tmp_path / "old.h5")


def test_one_value_in_two_places_is_a_value_for_each(copy):
    """A hard link to values costs nobody anything."""

    def share(values):
        del values["layers/dense_1/vars/0"]
        values.move("layers/dense/vars/0", "layers/dense_1/vars/0")
        values["layers/dense/vars/0"] = values["layers/dense_1/vars/0"]

    model, path = keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3) for _ in "ab")]), copy
    tether.files.save_model(model, path)
    hostile.with_values(share)(path)
    again = tether.files.load_model(path)
    for layer in again.layers:
        assert np.array_equal(numpy(layer.kernel), numpy(model.layers[0].kernel))
    assert [weight.bytes for weight in tether.inspection.facts(path).weights] == [36, 12, 36, 12]


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_very_many_values_that_no_weight_takes_are_an_error(count, copy):
    def many(values):
        group = values.create_group("layers/more/vars")
        for number in range(count):
            group.create_dataset(str(number), data=np.float32(number))

    hostile.with_values(many)(copy)
    with pytest.raises(InvalidConfig, match=rf"no place for.* and {count - 8} more"):
        tether.files.load_model(copy)


@pytest.mark.parametrize("count", [200, 100_000])
def test_very_many_weights_in_a_plan_are_an_error(count, copy):
    def many(found):
        (uid,) = found["weights"]
        for number in range(count):
            found["weights"][f"{number}"] = {**found["weights"][uid], "uid": f"{number}", "initializer": None}
            found["ties"][f"kernel{number}"] = [{"weight": f"{number}"}]

    hostile.with_record(many)(copy)
    with pytest.raises(TetherError):
        tether.files.load_model(copy)


# --------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    model = plain_model()
    tether.adapters.add(model, "style", {"dense/kernel": tether.forms.low_rank(rank=2)})
    tether.adapters.save(model, "style", path)
    return path


def plain_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])


def model_with(slots):
    model = plain_model()
    return tether.adapters.capacity(model, {"*/kernel": tether.low_rank(2)}, slots=slots) if slots else model


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_adapter(change):
    def damage(path):
        header, values = header_of(path)
        plan = json.loads(header["__metadata__"]["adapter"])
        change(plan)
        header["__metadata__"]["adapter"] = json.dumps(plan)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + values)

    return damage


def first_weight(plan):
    return next(iter(plan["weights"].values()))


ADAPTERS = {
    "truncated": hostile.truncated,
    "empty": hostile.empty,
    "text": hostile.text,
    "a header that is longer than the file": lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    "another version": with_adapter(lambda plan: plan.update(version=99)),
    "no ties": with_adapter(lambda plan: plan["ties"].clear()),
    "another shape": with_adapter(lambda plan: first_weight(plan).update(shape=[7, 7])),
    "another uid": with_adapter(lambda plan: first_weight(plan).update(uid="other")),
    "a missing weight": with_adapter(lambda plan: plan["weights"].popitem()),
    "no such path": with_adapter(lambda plan: plan.update(ties={"nowhere/kernel": next(iter(plan["ties"].values()))})),
    "cyclic": with_adapter(
        lambda plan: plan["ties"].update({next(iter(plan["ties"])): [{"op": "transpose", "of": [0], "axes": None}]})
    ),
    "code": with_adapter(
        lambda plan: first_weight(plan).update(
            initializer={"module": "os", "class_name": "system", "config": {"command": "true"}, "registered_name": None}
        )
    ),
}


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("damage", list(ADAPTERS))
def test_a_broken_adapter_is_a_clear_error_and_the_model_stays(damage, slots, adapter, tmp_path):
    path = shutil.copy(adapter, tmp_path / adapter.name)
    ADAPTERS[damage](path)
    model = model_with(slots)
    before = [numpy(weight).tobytes() for weight in model.weights]
    with pytest.raises(TetherError, match=r".{20}"):
        tether.adapters.load(model, path)
    assert [numpy(weight).tobytes() for weight in model.weights] == before
    assert tether.adapters.names(model) == []


# --------------------------------------------------------------------------- fuzzing


def fuzz(examples):
    """Settings of a search that takes some seconds, the same every time."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


def mangled(data, edits):
    """Bytes with some of them overwritten, taken out or put in."""
    data = bytearray(data)
    for where, kind, piece in edits:
        at = int(where * len(data))
        if kind == "over":
            data[at : at + len(piece)] = piece
        elif kind == "out":
            del data[at : at + len(piece)]
        elif kind == "in":
            data[at:at] = piece
        else:
            del data[at:]
    return bytes(data)


edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["over", "out", "in", "cut"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def tolerated(read, path):
    """Reads a file; a Tether error is what a reader may answer, and no other."""
    try:
        return read(path)
    except TetherError:
        return None


def search_bytes(read, good, folder, examples, check=lambda found: None):
    path, data = folder / good.name, good.read_bytes()

    @fuzz(examples)
    @given(edits)
    def search(edits):
        path.write_bytes(mangled(data, edits))
        found = tolerated(read, path)
        if found is not None:
            check(found)

    search()


SHORT_AND_LONG = [pytest.param(1), pytest.param(30, marks=pytest.mark.slow(on="torch"))]


@pytest.mark.parametrize("times", SHORT_AND_LONG)
def test_no_bytes_make_the_archive_reader_fail_otherwise(times, good, tmp_path):
    search_bytes(lambda path: contents(path, whole=True), good, tmp_path, 1500 * times)


@pytest.mark.parametrize("times", SHORT_AND_LONG)
def test_no_bytes_make_the_facts_fail_otherwise(times, good, tmp_path):
    search_bytes(tether.inspection.facts, good, tmp_path, 1000 * times)


@pytest.mark.parametrize("times", SHORT_AND_LONG)
def test_no_bytes_give_a_model_with_other_values(times, good, tmp_path):
    values = [numpy(weight) for weight in tether.files.load_model(good).weights]

    def check(model):
        for mine, theirs in zip(values, model.weights, strict=True):
            assert np.array_equal(mine, numpy(theirs))

    search_bytes(tether.files.load_model, good, tmp_path, 400 * times, check)


def kept(load, make):
    """A reader that fills a model; if it refuses, the model has to be as it was."""

    def read(path):
        model = make()
        before = [numpy(variable).tobytes() for variable in model.weights]
        try:
            return load(model, path)
        except TetherError:
            assert [numpy(variable).tobytes() for variable in model.weights] == before
            raise

    return read


@pytest.mark.parametrize("times", SHORT_AND_LONG)
@pytest.mark.parametrize("kind", ["keras", "safetensors"])
def test_no_bytes_make_a_reader_that_fills_a_model_fail_otherwise(kind, times, tmp_path):
    load = tether.files.load_untied if kind == "keras" else tether.files.load_safetensors
    save = tether.files.save_model if kind == "keras" else tether.files.save_safetensors
    (tmp_path / "good").mkdir()
    model = hostile.tied_model()
    save(model, tmp_path / "good" / f"model.{kind}")
    search_bytes(kept(load, lambda: model), tmp_path / "good" / f"model.{kind}", tmp_path, 300 * times)


@pytest.mark.parametrize("times", SHORT_AND_LONG)
@pytest.mark.parametrize("slots", [0, 2])
def test_no_bytes_make_the_adapter_reader_fail_otherwise(slots, times, adapter, tmp_path):
    model = model_with(slots)

    def load(model, path):
        tether.adapters.load(model, path, name="read", replace=True)

    load(model, adapter)
    search_bytes(kept(load, lambda: model), adapter, tmp_path, 1000 * times)


def places_in(config, path=()):
    """The paths to all parts of a config."""
    yield path
    if isinstance(config, (dict, list)):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from places_in(value, (*path, key))


def put(config, path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@pytest.mark.parametrize("times", SHORT_AND_LONG)
def test_no_config_makes_the_readers_fail_otherwise(times, good, tmp_path):
    path, held = tmp_path / FILE, hostile.entries(good)
    config = json.loads(held["config.json"])
    places = [place for place in places_in(config) if place and "compile_config" not in place]
    in_ties = [place for place in places if "tether" in place]

    @fuzz(400 * times)
    @given(st.sampled_from(in_ties) | st.sampled_from(places), json_values)
    def search(place, value):
        changed = json.loads(held["config.json"])
        put(changed, place, value)
        hostile.write(path, {**held, "config.json": json.dumps(changed)})
        tolerated(tether.files.load_model, path)
        tolerated(tether.inspection.facts, path)

    search()


@pytest.mark.slow(on="torch")
def test_no_bytes_that_a_search_by_coverage_finds_make_the_archive_reader_fail_otherwise(tmp_path):
    pytest.importorskip("atheris", reason="There is no atheris for this system or this Python.")
    run = start("guided", tmp_path, "60")
    assert run.returncode == 0 and "Done" in run.stderr, run.stderr[-2000:]


def test_the_file_of_the_tests_is_good(good, adapter):
    """What the tests above damage can be read as it is."""
    assert len(tether.files.load_model(good).weights) == 3
    assert len(list(tether.inspection.facts(good).shared())) == 1
    tether.adapters.load(plain_model(), adapter)

"""The facts of files: those of the model that was saved, where the file holds them, and clear errors of broken ones."""

import contextlib
import io
import json
import os
import tempfile
import tracemalloc
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

import tether
from tests.inspection import models
from tests.inspection.models import MODELS, fitted
from tether.errors import InvalidConfig, Unsupported
from tether.inspection import diff, facts
from tether.layers.tying.state import from_above

layers = keras.layers
IN_NO_CONFIG = {"ties_itself"}
WRITES_TWICE = {"private_sharing"}


def saved(model, folder):
    """The path of a `.keras` file; that of weights alone too, if the model has any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving a model that has not yet been built", UserWarning)
        model.save(folder / "m.keras")
        if model.built:
            model.save_weights(folder / "m.weights.h5")
    return folder / "m.keras", folder / "m.weights.h5"


def stored(found):
    return [(place, w.shape, w.dtype) for w in found.weights for place in (w.place, *w.again)]


def ties(found):
    return {use.where: (use.expression, use.weights, use.shape, use.dtype) for use in found.uses if use.tied}


def read_by_number(found):
    """The ties of each layer, without the attributes, of which a file of weights does not tell."""
    entries = [(u.layer, u.expression.split(".")[-1], u.weights, u.shape, u.dtype) for u in found.uses if u.tied]
    return sorted(entries, key=lambda entry: entry[0])


# --------------------------------------------------------------------------- the same as of the model


def unnoted(path):
    """The file without the notes of what is tied beside the values, as an older Tether wrote it."""

    def strip(file):
        def visit(_, item):
            for name in ("tether", "tether_uid"):
                item.attrs.pop(name, None)

        file.visititems(visit)

    target = path.with_name(f"unnoted.{path.name}")
    if path.suffix == ".keras":
        return repacked(path, target, values=spoiled_values(strip))
    target.write_bytes(spoiled_values(strip)(path.read_bytes()))
    return target


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "no notes"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_file_have_the_same_facts(name, notes, tmp_path):
    model = MODELS[name]()
    path, _ = saved(model, tmp_path)
    live, file = facts(model), facts(path if notes else unnoted(path))
    assert not diff(live, file)
    assert sorted(stored(live)) == sorted(stored(file))
    assert file.stored_bytes == live.stored_bytes + sum(w.bytes * len(w.again) for w in live.weights)
    assert file.name == live.name
    assert file.ties is (notes or name not in IN_NO_CONFIG)
    if name in IN_NO_CONFIG:
        assert read_by_number(file) == (read_by_number(live) if notes else [])
        return
    assert ties(live) == ties(file)
    assert file.unshared_bytes == live.unshared_bytes
    if name in WRITES_TWICE:
        return
    if name != "extended":  # whose entries HDF5 orders by their names
        assert [w.place for w in live.weights] == [w.place for w in file.weights]
    by_place = {w.place: w for w in live.weights}
    for weight in file.weights:
        assert weight.trainable in (None, by_place[weight.place].trainable)
        assert weight.path in (None, by_place[weight.place].path)
    read = {(use.layer, use.weights): [] for use in live.uses}
    for use in live.uses:
        read[use.layer, use.weights].append(use)
    for use in file.uses:
        (same,) = read[use.layer, use.weights] if use.weights else [use]
        assert use.attribute in (None, same.attribute) and use.expression == same.expression
        assert use.kind in (None, same.kind) and use.trains in (None, same.trains)
        assert use.stopped in (None, same.stopped)
    assert len(file.uses) == len(live.uses)
    assert {layer for layer, _ in file.layers} == {layer for layer, _ in live.layers}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "unbuilt"])
def test_a_model_and_its_file_of_weights_have_the_same_weights_and_ties(name, tmp_path):
    model = MODELS[name]()
    _, path = saved(model, tmp_path)
    live, file, bare = facts(model), facts(path), facts(unnoted(path))
    assert not diff(live, file) and not diff(live, bare) and not bare.ties
    assert sorted(stored(live)) == sorted(stored(file)) == sorted(stored(bare))
    assert file.ties is any(use.tied for use in live.uses)
    assert read_by_number(file) == read_by_number(live) and read_by_number(bare) == []
    if file.ties and name != "own_attribute":  # of which a layer's own code reads the weight
        assert file.unshared_bytes == live.unshared_bytes


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.1),
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
    ],
    ids=["adam", "momentum", "loss scale"],
)
@pytest.mark.parametrize("name", ["tied_autoencoder", "frozen_use", "low_rank_child", "bfloat16"])
def test_what_the_optimizer_keeps_is_in_the_file(name, optimizer, tmp_path):
    model = fitted(MODELS[name](), optimizer())
    live = facts(model)
    for path in saved(model, tmp_path):
        file = facts(path)
        assert not diff(live, file)
        places = [(place, s.shape, s.dtype) for s in live.optimizer for place in (s.place, *s.again)]
        assert sorted(places) == sorted((s.place, s.shape, s.dtype) for s in file.optimizer) and places
        assert file.optimizer_bytes == sum(s.bytes * (1 + len(s.again)) for s in live.optimizer)


def test_an_optimizer_that_has_not_trained_is_in_the_file_with_its_counters(tmp_path):
    model = models.tied_autoencoder()
    model.compile("adam", "mse")
    live, file = facts(model), facts(saved(model, tmp_path)[0])
    assert [(s.place, s.shape) for s in live.optimizer] == [(s.place, s.shape) for s in file.optimizer]


def test_mixed_precision_is_stored_as_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.tied_autoencoder()
    file = facts(saved(model, tmp_path)[0])
    assert {w.dtype for w in file.weights} == {u.dtype for u in file.uses} == {"float32"}
    assert not diff(model, file)


def test_a_compiled_model_within_a_model_keeps_its_optimizer_as_state(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")], name="inner")
    fitted(inner, "adam")
    model = keras.Sequential([keras.Input((4,)), inner])
    live, file = facts(model), facts(saved(model, tmp_path)[0])
    assert not diff(live, file) and live.optimizer == file.optimizer == ()
    assert {w.place for w in live.weights if w.state} == {w.place for w in file.weights if w.state} != set()
    assert {use.where for use in live.uses} == {"inner/d/kernel", "inner/d/bias"} and len(file.uses) == 2


def test_what_was_loaded_has_the_facts_of_the_file(tmp_path):
    path, _ = saved(models.low_rank_child(), tmp_path)
    loaded = keras.saving.load_model(path)
    assert not diff(path, loaded)
    assert ties(facts(path)) == ties(facts(loaded))


# --------------------------------------------------------------------------- what a config tells


def test_the_config_tells_the_kinds_of_layers(tmp_path):
    file = facts(saved(models.plain(), tmp_path)[0])
    assert [kind for _, kind in file.layers] == ["Conv2D", "BatchNormalization", "Dense"]
    kinds = dict(facts(saved(models.bidirectional(), tmp_path)[0]).layers)
    assert all(layer.startswith("both/forward_lstm") or layer.startswith("both/backward_lstm") for layer in kinds)


def test_the_config_tells_what_trains_where_the_class_leaves_no_doubt(tmp_path):
    model = models.frozen_use()
    live, file = facts(model), facts(saved(model, tmp_path)[0])
    assert {w.place: w.trainable for w in file.weights} == {w.place: w.trainable for w in live.weights}
    assert {u.where: u.trains for u in file.uses if u.tied} == {u.where: u.trains for u in live.uses if u.tied}
    attention = facts(saved(models.attention(), tmp_path)[0])
    assert all(w.trainable for w in attention.weights)


def test_it_says_nothing_of_what_a_class_decides(tmp_path):
    normalized = facts(saved(models.plain(), tmp_path)[0])
    assert {w.trainable for w in normalized.weights if "batch_normalization" in w.place} == {None}
    assert {w.trainable for w in facts(saved(models.extended(), tmp_path)[0]).weights} == {None}
    frozen = models.plain()
    frozen.trainable = False
    assert {w.trainable for w in facts(saved(frozen, tmp_path)[0]).weights} == {False}


# --------------------------------------------------------------------------- nothing is made


def test_the_file_is_read_without_making_the_model(tmp_path, monkeypatch):
    model = fitted(models.own_attribute(), "adam")
    path, _ = saved(model, tmp_path)
    expected = facts(model)

    def refuse(*args, **kwargs):
        raise AssertionError("something was made")

    for cls in (keras.layers.Embedding, keras.Model, models.Bilinear, keras.optimizers.Adam):
        monkeypatch.setattr(cls, "__init__", refuse)
        monkeypatch.setattr(cls, "from_config", refuse)
    monkeypatch.setattr("tether.layers.records.reader.revive", refuse)
    monkeypatch.setitem(from_above, "revive", refuse)
    monkeypatch.setattr("tether.weights.weight.Weight._create", refuse)
    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", refuse)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    monkeypatch.setattr(h5py.Dataset, "__array__", refuse, raising=False)
    assert not diff(expected, facts(path))


@contextlib.contextmanager
def growth():
    tracemalloc.start()
    peak = [0]
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
def test_no_value_is_copied_into_memory(compression, tmp_path):
    weight = tether.Weight((1500, 1000), "ones", name="large")
    model = keras.Sequential([keras.Input((1500,)), tether.tie(layers.Dense(1000), kernel=weight)])
    path, _ = saved(model, tmp_path)
    again = repacked(path, tmp_path / "again.keras", compression=compression)
    facts(again)
    with growth() as peak:
        found = facts(again)
    assert found.stored_bytes > 6_000_000 and peak[0] < 3_000_000
    assert not diff(model, found)


def test_a_part_of_an_archive_is_read_where_it_lies(tmp_path, monkeypatch):
    path, _ = saved(models.slices(), tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)
    assert facts(path).weights


# --------------------------------------------------------------------------- safetensors


def test_a_safetensors_file(tmp_path):
    import ml_dtypes

    tensors = {
        "encoder.layer.0.weight": np.zeros((4, 3), "float32"),
        "encoder.layer.0.bias": np.zeros((3,), "float16"),
        "scale": np.zeros((), ml_dtypes.bfloat16),
        "ids": np.zeros((2, 2), "int64"),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    found = facts(tmp_path / "m.safetensors")
    assert {w.path: (w.shape, w.dtype) for w in found.weights} == {
        name: (array.shape, str(array.dtype)) for name, array in tensors.items()
    }
    assert {use.where for use in found.uses} == {"encoder.layer.0/weight", "encoder.layer.0/bias", "scale", "ids"}
    assert found.stored_bytes == sum(array.nbytes for array in tensors.values()) and not found.ties
    save_file({**tensors, "ids": np.zeros((2, 2), "int32")}, tmp_path / "n.safetensors")
    assert str(diff(tmp_path / "m.safetensors", tmp_path / "n.safetensors")) == (
        "~ weight ids: dtype 'int64' -> 'int32'"
    )


def note_of(**changed):
    steps = [{"weight": "u"}, {"op": "transpose", "of": [0], "axes": None}]
    ties = {"decode.kernel": {"dtype": "float32", "steps": steps}}
    return {"tether": json.dumps({"version": 1, "weights": {"u": "encode.kernel"}, "ties": ties, **changed})}


def test_a_safetensors_file_with_a_note_of_what_is_tied(tmp_path):
    tensors = {"encode.kernel": np.zeros((4, 3), "float32"), "decode.inner.bias": np.zeros((4,), "float32")}
    save_file(tensors, tmp_path / "m.safetensors", metadata=note_of())
    found = facts(tmp_path / "m.safetensors")
    assert {u.where: (u.expression, u.tied, u.weights, u.shape) for u in found.uses} == {
        "decode/kernel": ("encode.kernel.T", True, ("encode.kernel",), (3, 4)),
        "decode/inner/bias": (None, False, ("decode.inner.bias",), (4,)),
    }
    assert not found.ties  # the note does not say whether a layer reads the tensor as it is
    assert found.stored_bytes == 4 * 3 * 4 + 4 * 4


@pytest.mark.parametrize(
    "metadata",
    [{"tether": "{"}, {"tether": "[]"}, note_of(version=2), note_of(weights=None), note_of(weights={"u": "missing"}),
     note_of(weights={}), note_of(ties={"a": 1})],
    ids=["no json", "no dict", "version", "no weights", "missing tensor", "unknown weight", "a tie that is none"],
)  # fmt: skip
def test_a_safetensors_file_with_a_hostile_note(metadata, tmp_path, nothing_left):
    save_file({"encode.kernel": np.zeros((4, 3), "float32")}, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(InvalidConfig):
        facts(tmp_path / "m.safetensors")


# --------------------------------------------------------------------------- broken files


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """A folder of temporary files, empty after the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not os.listdir(folder)


def repacked(path, target, *, compression=zipfile.ZIP_STORED, **changed):
    """An archive with other entries: `config=` and `values=` are functions of what is there; None leaves it out."""
    parts = {"config": "config.json", "values": "model.weights.h5"}
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", compression) as out:
        for name in archive.namelist():
            part = next((key for key, entry in parts.items() if entry == name), None)
            change = changed.get(part, lambda content: content)
            if change is not None:
                out.writestr(name, change(archive.read(name)))
    return target


def config_of(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


def with_config(path, target, change):
    """The file with another config; `change` gets it as a dict."""

    def changed(content):
        config = json.loads(content)
        return json.dumps(change(config) or config).encode()

    return repacked(path, target, config=changed)


@pytest.fixture
def autoencoder(tmp_path):
    return saved(models.tied_autoencoder(), tmp_path)[0]


def spoiled_values(change):
    """HDF5 with another content, made from what was there."""

    def changed(content):
        buffer = io.BytesIO(content)
        with h5py.File(buffer, "r+") as file:
            change(file)
        return buffer.getvalue()

    return changed


@pytest.mark.parametrize("keep", [0, 10, 0.5, -30], ids=str)
def test_a_truncated_archive(autoencoder, keep, tmp_path, nothing_left):
    content = autoencoder.read_bytes()
    broken = tmp_path / "broken.keras"
    broken.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(InvalidConfig, match=r"broken\.keras"):
        facts(broken)


@pytest.mark.parametrize("keep", [0, 100, 0.5], ids=str)
def test_truncated_values(autoencoder, keep, tmp_path, nothing_left):
    def cut(content):
        return content[: int(len(content) * keep) if isinstance(keep, float) else keep]

    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with pytest.raises(InvalidConfig, match=r"broken\.keras"):
            facts(repacked(autoencoder, tmp_path / "broken.keras", compression=compression, values=cut))
    broken = tmp_path / "broken.weights.h5"
    broken.write_bytes(cut((tmp_path / "m.weights.h5").read_bytes()))
    with pytest.raises(InvalidConfig, match=r"broken\.weights\.h5"):
        facts(broken)


def test_an_archive_without_a_config(autoencoder, tmp_path, nothing_left):
    with pytest.raises(InvalidConfig, match=r"no config\.json"):
        facts(repacked(autoencoder, tmp_path / "m2.keras", config=None))


def test_an_archive_without_values(autoencoder, tmp_path, nothing_left):
    with pytest.raises(Unsupported, match=r"no model\.weights\.h5"):
        facts(repacked(autoencoder, tmp_path / "m2.keras", values=None))


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"3", b"{", b'{"class_name": "Functional"}', b'{"config": []}', b"[" * 100_000, b"\xff\xfe"],
    ids=lambda config: repr(config[:12]),
)
def test_a_config_that_is_none(config, autoencoder, tmp_path, nothing_left):
    with pytest.raises(InvalidConfig):
        facts(repacked(autoencoder, tmp_path / "m2.keras", config=lambda _: config))


def test_what_is_no_archive(tmp_path, nothing_left):
    (tmp_path / "m.keras").write_text("not a zip file at all")
    with pytest.raises(InvalidConfig, match="not what its name says"):
        facts(tmp_path / "m.keras")


def test_values_that_are_named_as_a_model(autoencoder, tmp_path, nothing_left):
    (tmp_path / "m.weights.h5").rename(tmp_path / "values.keras")
    with pytest.raises(InvalidConfig, match="not what its name says"):
        facts(tmp_path / "values.keras")


def test_a_model_that_is_named_as_values(autoencoder, tmp_path, nothing_left):
    autoencoder.rename(tmp_path / "model.weights.h5")
    with pytest.raises(InvalidConfig, match="not what its name says"):
        facts(tmp_path / "model.weights.h5")


def test_a_file_of_keras_before_3(tmp_path, nothing_left):
    with h5py.File(tmp_path / "old.weights.h5", "w") as file:
        file.attrs["layer_names"] = ["dense"]
    with pytest.raises(Unsupported, match="old format"):
        facts(tmp_path / "old.weights.h5")
    model = models.plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "old.h5")
    with pytest.raises(Unsupported, match=r"end with \.keras"):
        facts(tmp_path / "old.h5")
    (tmp_path / "old.h5").rename(tmp_path / "renamed.weights.h5")
    with pytest.raises(Unsupported, match="old format"):
        facts(tmp_path / "renamed.weights.h5")


def test_a_folder(tmp_path, nothing_left):
    (tmp_path / "folder.keras").mkdir()
    for path in (tmp_path, tmp_path / "folder.keras"):
        with pytest.raises(Unsupported, match="Load the model"):
            facts(path)


@pytest.mark.parametrize("name", ["missing.keras", "missing.weights.h5", "missing.safetensors", "missing"])
def test_a_file_that_is_not_there(name, tmp_path, nothing_left):
    with pytest.raises(FileNotFoundError, match=name):
        facts(tmp_path / name)


def test_a_file_of_another_kind(tmp_path, nothing_left):
    (tmp_path / "m.onnx").write_bytes(b"\0")
    with pytest.raises(Unsupported, match=r"\.keras, \.weights\.h5, \.safetensors"):
        facts(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}"], ids=repr)
def test_broken_safetensors(content, tmp_path, nothing_left):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(InvalidConfig, match="not what its name says"):
        facts(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.create_dataset("layers/dense/vars/7", data="text"),
        lambda file: file.create_dataset("layers/dense/vars/7", data=h5py.Empty("f")),
        lambda file: file.create_dataset("layers/dense/vars/7", data=np.zeros(2, [("a", "f4"), ("b", "i4")])),
        lambda file: file["layers/dense/vars/1"].attrs.update({"dtype": "colour"}),
    ],
    ids=["text", "nothing", "records", "dtype"],
)
def test_values_that_are_no_numbers(change, autoencoder, tmp_path, nothing_left):
    with pytest.raises(InvalidConfig):
        facts(repacked(autoencoder, tmp_path / "m2.keras", values=spoiled_values(change)))


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("secret.h5", "vars/0"), h5py.SoftLink("/layers/dense/vars/1")], ids=["external", "soft"]
)
def test_links_are_named_and_not_followed(link, autoencoder, tmp_path, nothing_left):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file.create_dataset("vars/0", data=np.zeros(3))
    values = spoiled_values(lambda file: file.__setitem__("layers/dense/vars/8", link))
    with pytest.raises(InvalidConfig, match="'layers/dense/vars/8' is a link"):
        facts(repacked(autoencoder, tmp_path / "m2.keras", values=values))


def test_a_compressed_archive_that_would_fill_the_disk(autoencoder, tmp_path, nothing_left, monkeypatch):
    monkeypatch.setattr("tether.files.keras.archive.SMALL", 10_000)
    zeros = repacked(
        autoencoder, tmp_path / "m2.keras", compression=zipfile.ZIP_DEFLATED, values=lambda _: b"\0" * 10_000_000
    )
    with pytest.raises(InvalidConfig, match="would unpack to 10,0"):
        facts(zeros)


def test_a_config_that_would_fill_the_memory(autoencoder, tmp_path, nothing_left, monkeypatch):
    monkeypatch.setattr("tether.files.keras.archive.MAX_CONFIG", 100)
    with pytest.raises(InvalidConfig, match="larger than 100 bytes"):
        facts(autoencoder)


def record_of(config):
    """The ties of the first tied layer of a config."""
    return next(layer["config"]["tether"] for layer in config["config"]["layers"] if "tether" in layer["config"])


HOSTILE = {
    "another version": lambda record: record.update(version=99),
    "no weights": lambda record: record.pop("weights"),
    "weights in a list": lambda record: record.update(weights=[1]),
    "a weight of another id": lambda record: next(iter(record["weights"].values())).update(uid="other"),
    "a weight without a name": lambda record: next(iter(record["weights"].values())).pop("name"),
    "a weight of a huge shape": lambda record: next(iter(record["weights"].values())).update(shape=[2**40, 2**40]),
    "a weight that is none": lambda record: record.update(weights={"a": 3}),
    "an unknown weight": lambda record: record.update(ties={"kernel": [{"weight": "nobody"}]}),
    "an unknown operator": lambda record: record.update(ties={"kernel": [{"op": "run", "of": [0]}]}),
    "a cycle": lambda record: record.update(ties={"kernel": [{"op": "transpose", "of": [0]}]}),
    "ties in a list": lambda record: record.update(ties=[1]),
    "steps that are none": lambda record: record.update(ties={"kernel": 3}),
    "a code object": lambda record: record.update(ties={"kernel": [{"code": "import os"}]}),
    "more keys": lambda record: record.update(more=1),
    "penalties that are none": lambda record: record.update(penalties=3),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_of_ties(change, autoencoder, tmp_path, nothing_left):
    spoiled = with_config(autoencoder, tmp_path / "m2.keras", lambda config: change(record_of(config)) and None)
    with pytest.raises(InvalidConfig):
        facts(spoiled)


NOTES = {
    "no text": 3,
    "no json": "{",
    "no ties": json.dumps({"version": 1}),
    "another version": json.dumps({"version": 2, "ties": {}}),
    "ties in a list": json.dumps({"version": 1, "ties": [1]}),
    "a tie that is none": json.dumps({"version": 1, "ties": {"0": 3}}),
    "no steps": json.dumps({"version": 1, "ties": {"0": {"dtype": "float32"}}}),
    "an unknown weight": json.dumps(
        {"version": 1, "ties": {"0": {"dtype": "float32", "steps": [{"weight": "nobody"}]}}}
    ),
    "a huge value": json.dumps(
        {"version": 1, "ties": {"0": {"dtype": "float32", "steps": [{"op": "run", "of": [0]}]}}}
    ),
    "an unknown dtype": json.dumps({"version": 1, "ties": {"0": {"dtype": "colour", "steps": [{"number": 1.0}]}}}),
}


@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_a_hostile_note_of_ties(note, autoencoder, tmp_path, nothing_left):
    def change(file):
        file["layers/dense/vars"].attrs["tether"] = note

    changed = spoiled_values(change)
    (tmp_path / "m2.weights.h5").write_bytes(changed((tmp_path / "m.weights.h5").read_bytes()))
    for path in (repacked(autoencoder, tmp_path / "m2.keras", values=changed), tmp_path / "m2.weights.h5"):
        with pytest.raises(InvalidConfig):
            facts(path)


def test_a_note_names_the_expression_that_a_layer_reads(tmp_path):
    """The format, whoever wrote it."""
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for layer in ("a", "b"):
            file.create_group(f"{layer}/vars").attrs["name"] = layer
            steps = [{"weight": "u"}, *([{"op": "transpose", "of": [0], "axes": None}] if layer == "b" else [])]
            file[f"{layer}/vars"].attrs["tether"] = json.dumps(
                {"version": 1, "ties": {"0": {"dtype": "bfloat16", "steps": steps}}}
            )
        file["a/_tether_weights/weight/vars/0"] = np.zeros((2, 3), "float32")
        file["a/_tether_weights/weight/vars"].attrs.update({"name": "w", "tether_uid": "u"})
    found = facts(tmp_path / "m.weights.h5")
    assert [(u.layer, u.attribute, u.expression, u.shape, u.dtype) for u in found.uses] == [
        ("a", None, "w", (2, 3), "bfloat16"), ("b", None, "w.T", (3, 2), "bfloat16")
    ]  # fmt: skip
    assert found.ties and [weight.path for weight in found.shared()] == ["w"]


def test_a_record_that_is_none(autoencoder, tmp_path, nothing_left):
    def change(config):
        for layer in config["config"]["layers"]:
            if "tether" in layer["config"]:
                layer["config"]["tether"] = "codec"

    with pytest.raises(InvalidConfig, match="record of ties"):
        facts(with_config(autoencoder, tmp_path / "m2.keras", change))


def test_an_initializer_of_a_file_is_not_run(autoencoder, tmp_path, monkeypatch):
    def change(config):
        for weight in record_of(config)["weights"].values():
            weight["initializer"] = {"module": "os", "class_name": "system", "config": {"command": "false"}}

    assert not diff(autoencoder, facts(with_config(autoencoder, tmp_path / "m2.keras", change)))


def test_ties_whose_weight_is_not_found_are_left_out_and_the_facts_say_so(autoencoder, tmp_path):
    def change(config):
        for layer in config["config"]["layers"]:
            for weight in layer["config"].get("tether", {}).get("weights", {}).values():
                weight["name"] = "elsewhere"

    found = facts(with_config(unnoted(autoencoder), tmp_path / "m2.keras", change))
    assert not found.ties and not any(use.tied for use in found.uses)
    assert sorted(stored(found)) == sorted(stored(facts(autoencoder)))


def test_names_that_are_no_strings(autoencoder, tmp_path):
    def change(config):
        config["config"]["name"] = {"a": 1}
        config["config"]["layers"][0]["name"] = ["x"]

    assert stored(facts(with_config(autoencoder, tmp_path / "m2.keras", change)))


def test_many_layers_of_one_name_within_each_other(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="same")], name="same")
    for _ in range(3):
        model = keras.Sequential([keras.Input((4,)), model, layers.Dense(4, name="other")], name="same_model")
    assert not diff(model, saved(model, tmp_path)[0])

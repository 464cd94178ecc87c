"""Every kind of PEFT folder, beside what PEFT itself computes with it (`tests/fixtures/peft/make.py`)."""

import json
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tether
from tether import adapters
from tether.errors import InvalidConfig, TetherError, Unsupported
from tether.files.tensors.peft_config import FIELDS

pytestmark = pytest.mark.spread

FOLDERS = pathlib.Path(__file__).parent.parent / "fixtures" / "peft"
KINDS = sorted(path.name for path in FOLDERS.iterdir() if (path / "values.npz").is_file())
WRITTEN = [
    "bias_all", "conv1d", "conv2d", "conv2d_dora", "conv2d_saved", "dora", "dora_embedding", "lora", "lora_bias",
    "lora_embedding", "lora_only", "lora_rank_pattern", "modules_to_save", "tokens",
]  # fmt: skip
"""What can be written as a folder of PEFT's again."""


def values(name):
    return np.load(FOLDERS / name / "values.npz")


def from_torch(array):
    """A kernel as Keras has it."""
    return np.ascontiguousarray(array.transpose((*range(2, array.ndim), 1, 0)))


def text(right):
    x = keras.Input((5,), dtype="int32")
    h = keras.layers.Embedding(9, 4, name="table")(x)
    h = keras.layers.Dense(6, activation="tanh", name="first")(h)
    h = keras.layers.Dense(4, activation="tanh", name="second")(h)
    model = keras.Model(x, keras.layers.Dense(3, name="head")(h))
    model.get_layer("table").embeddings.assign(right["base/table.weight"])
    return filled(model, right, ("first", "second", "head"))


def image(right):
    x = keras.Input((5, 4, 2))
    h = keras.layers.Conv2D(4, (3, 2), activation="tanh", name="wide")(x)
    return filled(keras.Model(x, keras.layers.Conv2D(3, 1, name="narrow")(h)), right, ("wide", "narrow"))


def sound(right):
    x = keras.Input((7, 2))
    return filled(keras.Model(x, keras.layers.Conv1D(4, 3, name="wide")(x)), right, ("wide",))


def filled(model, right, layers):
    for name in layers:
        model.get_layer(name).set_weights([from_torch(right[f"base/{name}.weight"]), right[f"base/{name}.bias"]])
    return model


def base(name):
    """The model of a folder, its input, and what it has to compute with the adapter and without."""
    right = values(name)
    x, y, y_base = right["x"], right["y"], right["y_base"]
    if "base/table.weight" in right:
        return text(right), x.astype("int32"), y, y_base
    last = [np.moveaxis(each, 1, -1) for each in (x, y, y_base)]
    return ((image if "base/narrow.weight" in right else sound)(right), *last)


def predict(model, x):
    return np.asarray(model.predict(x, verbose=0))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_computes_what_it_computes_in_peft(name):
    model, x, right, right_base = base(name)
    close(predict(model, x), right_base)
    model.trainable = False
    report = tether.files.load_peft(model, FOLDERS / name)
    assert report.loaded
    close(predict(model, x), right)
    assert model.trainable_variables, "nothing of it trains"


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_an_adapter_among_others(name, tmp_path):
    model, x, right, _ = base(name)
    start = predict(model, x)
    adapters.load(model, FOLDERS / name, name="theirs")
    assert adapters.names(model) == ["theirs"]
    close(predict(model, x), right)
    with adapters.disabled(model):
        assert np.array_equal(predict(model, x), start)
    adapters.save(model, "theirs", tmp_path / "a.safetensors")
    again, *_ = base(name)
    adapters.load(again, tmp_path / "a.safetensors")
    close(predict(again, x), right)
    tether.files.save_model(model, tmp_path / "m.keras")
    close(predict(tether.files.load_model(tmp_path / "m.keras"), x), right)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_the_same_adapter(name, named, tmp_path):
    model, x, right, _ = base(name)
    if named:
        adapters.load(model, FOLDERS / name)
    else:
        tether.files.load_peft(model, FOLDERS / name)
    tether.files.save_peft(model, tmp_path / "out")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDERS / name, tmp_path / "out"))
    again, *_ = base(name)
    tether.files.load_peft(again, tmp_path / "out")
    close(predict(again, x), right)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        close(ours[key], value)


def changed(tmp_path, name, tensors=None, **fields):
    """A copy of a folder whose config, or tensors, say something else."""
    folder = tmp_path / "changed"
    shutil.copytree(FOLDERS / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


REFUSED = [
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "something new"},
    *({field: {"a": 1}} for field, fate in FIELDS["LORA"].items() if fate == "refused"),
    {"a_field_of_next_year": 3},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: "-".join(fields))
def test_what_would_change_the_values_is_refused_by_name(fields, tmp_path):
    model, x, *_ = base("lora")
    before, known = predict(model, x), [variable.path for variable in model.variables]
    for load in (tether.files.load_peft, adapters.load):
        with pytest.raises(Unsupported, match=next(iter(fields))):
            load(model, changed(tmp_path, "lora", **fields))
        shutil.rmtree(tmp_path / "changed")
    assert np.array_equal(predict(model, x), before)
    assert [variable.path for variable in model.variables] == known


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_alone_is_read(start, tmp_path):
    model, x, right, _ = base("lora")
    tether.files.load_peft(model, changed(tmp_path, "lora", init_lora_weights=start))
    close(predict(model, x), right)


@pytest.mark.parametrize("alpha", [0, -6])
def test_a_scale_may_be_zero_or_negative(alpha, tmp_path):
    model, x, right, right_base = base("lora")
    tether.files.load_peft(model, changed(tmp_path, "lora", lora_alpha=alpha))
    if alpha == 0:
        close(predict(model, x), right_base)
    else:
        assert not np.allclose(predict(model, x), right, atol=1e-2)


def damaged(name, how):
    tensors = dict(load_file(FOLDERS / name / "adapter_model.safetensors"))
    key = next(iter(tensors))
    if how == "a tensor less":
        del tensors[key]
    elif how == "another shape":
        tensors[key] = np.zeros((7, *tensors[key].shape[1:]), "float32")
    elif how == "another name":
        tensors[key.replace("model.", "model.nowhere.", 1)] = tensors.pop(key)
    return tensors


@pytest.mark.parametrize("how", ["a tensor less", "another shape", "another name"])
@pytest.mark.parametrize("name", ["lora", "dora", "conv2d", "ia3", "loha", "lokr", "vera", "tokens"])
def test_a_damaged_folder_changes_nothing(name, how, tmp_path):
    model, x, *_ = base(name)
    before = predict(model, x)
    if name == "ia3" and how == "a tensor less":
        return  # a module less is an adapter too
    for load in (tether.files.load_peft, adapters.load):
        with pytest.raises(TetherError):
            load(model, changed(tmp_path, name, damaged(name, how)))
        shutil.rmtree(tmp_path / "changed")
    assert np.array_equal(predict(model, x), before)
    assert not adapters.names(model)


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path):
    folder = changed(tmp_path, "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Unsupported, match="save_file"):
        tether.files.load_peft(base("lora")[0], folder)


def test_a_config_of_another_kind_than_the_tensors_is_damaged(tmp_path):
    with pytest.raises(InvalidConfig, match="says that the adapter is IA3"):
        tensors = load_file(FOLDERS / "lora" / "adapter_model.safetensors")
        tether.files.load_peft(base("lora")[0], changed(tmp_path, "ia3", tensors))


def test_loading_twice_replaces_what_was_loaded():
    for name in ("lora", "dora"):
        model, x, right, _ = base(name)
        count = len(tether.files.load_peft(model, FOLDERS / name).loaded)
        stored = len(model.variables)
        assert len(tether.files.load_peft(model, FOLDERS / name).loaded) == count
        close(predict(model, x), right)
        assert len(model.variables) == stored


def test_the_docs_say_what_becomes_of_each_field():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = text[text.index("| field | becomes |") :].split("\n\n")[0]
    words = {"honoured": "honoured", "the tensors": "tensors", "acts in training": "training", "no effect": "no effect"}
    said = {}
    for row in table.splitlines()[2:]:
        fields, fate = row.strip("| ").split(" | ")
        kind = next((kind for start, kind in words.items() if fate.startswith(start)), "refused")
        said.update(dict.fromkeys(re.findall(r"`(\w+)`", fields), kind))
    assert said == FIELDS["LORA"]


def attention_folder(tmp_path, tensors, **fields):
    """A folder of PEFT's for an attention whose projections PyTorch folds into matrices."""
    folder = tmp_path / "attention"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["query"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": np.ascontiguousarray(v) for key, v in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_projections_to_heads_are_matrices_there(rng, tmp_path):
    x = keras.Input((3, 8))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x))
    before = {
        name: tether.weight_of(model, f"attention/{name}").numpy()
        for name in ("query/kernel", "attention_output/kernel", "value/bias")
    }
    tensors = {
        "attention.query.lora_A.weight": rng.normal(size=(2, 8)).astype("float32"),
        "attention.query.lora_B.weight": rng.normal(size=(8, 2)).astype("float32"),
        "attention.query.lora_B.bias": rng.normal(size=8).astype("float32"),
        "attention.key.lora_A.weight": rng.normal(size=(2, 8)).astype("float32"),
        "attention.key.lora_B.weight": rng.normal(size=(8, 2)).astype("float32"),
        "attention.key.lora_B.bias": rng.normal(size=8).astype("float32"),
        "attention.attention_output.weight": rng.normal(size=(8, 8)).astype("float32"),
        "attention.value.bias": rng.normal(size=8).astype("float32"),
    }
    folder = attention_folder(tmp_path, tensors, lora_bias=True, bias="all", modules_to_save=["attention_output"])
    tether.files.load_peft(model, folder)
    a, b = tensors["attention.query.lora_A.weight"], tensors["attention.query.lora_B.weight"]
    close(
        tether.weight_of(model, "attention/query/kernel").numpy(),
        before["query/kernel"] + 3 * (b @ a).T.reshape(8, 2, 4),
    )
    close(
        tether.weight_of(model, "attention/query/bias").numpy(),
        3 * tensors["attention.query.lora_B.bias"].reshape(2, 4),
    )
    close(
        tether.weight_of(model, "attention/attention_output/kernel").numpy(),
        tensors["attention.attention_output.weight"].T.reshape(2, 4, 8),
    )
    close(tether.weight_of(model, "attention/value/bias").numpy(), tensors["attention.value.bias"].reshape(2, 4))
    tether.files.save_peft(model, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(ours) == {f"base_model.model.{key}" for key in tensors}
    for key, value in tensors.items():
        close(ours[f"base_model.model.{key}"], value)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tying", [False, True])
def test_logits_of_a_tied_table_follow_if_the_folder_says_so(tying, named, tmp_path):
    right = values("lora_embedding")
    x = keras.Input((5,), dtype="int32")
    h = keras.layers.Dense(4, name="first")(keras.layers.Embedding(9, 4, name="table")(x))
    model = keras.Model(x, keras.layers.Dense(9, use_bias=False, name="logits")(h))
    model.get_layer("table").embeddings.assign(right["base/table.weight"])
    tether.tie(model, {"logits/kernel": 2.0 * tether.weight_of(model, "table/embeddings").T})
    tensors = dict(load_file(FOLDERS / "lora_embedding" / "adapter_model.safetensors"))
    tensors = {key: value for key, value in tensors.items() if "table" in key}
    folder = changed(tmp_path, "lora_embedding", tensors, ensure_weight_tying=tying)
    (adapters.load if named else tether.files.load_peft)(model, folder)
    a, b = (tensors[f"base_model.model.table.lora_embedding_{k}"] for k in "AB")
    table = right["base/table.weight"] + 3 * (b @ a).T
    close(tether.weight_of(model, "table/embeddings").numpy(), table)
    close(tether.weight_of(model, "logits/kernel").numpy(), 2 * (table if tying else right["base/table.weight"]).T)
    tether.files.save_model(model, tmp_path / "m.keras")
    again = tether.files.load_model(tmp_path / "m.keras")
    close(tether.weight_of(again, "logits/kernel").numpy(), tether.weight_of(model, "logits/kernel").numpy())
    if named:
        adapters.activate(model)
        close(tether.weight_of(model, "logits/kernel").numpy(), 2 * right["base/table.weight"].T)


def test_a_layer_that_computes_the_logits_with_its_table_is_warned_of():
    right = values("lora_embedding")
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.ReversibleEmbedding(9, 4, name="table"),
            keras.layers.Dense(6, name="first"),
        ]
    )
    model.get_layer("table").embeddings.assign(right["base/table.weight"])
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        tether.files.load_peft(model, FOLDERS / "lora_embedding")

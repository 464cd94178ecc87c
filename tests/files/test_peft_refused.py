"""Folders of PEFT's that are refused, of every kind: an error says what is wrong, and the model is as it was."""

import json
import pickle
import shutil

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import tether
from tests.files.peft_folders import FOLDERS, KINDS, base, changed, close, predict, values
from tests.support import numpy
from tether import adapters, forms
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, Unsupported
from tether.files.peft.peft_config import FIELDS

pytestmark = pytest.mark.spread


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


def damaged(name, how):
    tensors = dict(load_file(FOLDERS / name / "adapter_model.safetensors"))
    key = next(iter(tensors))
    if how == "a tensor less":
        del tensors[key]
    elif how == "another shape":
        first, *rest = tensors[key].shape
        tensors[key] = np.zeros((first + 5, *rest), "float32")
    elif how == "another name":
        tensors[key.replace("model.", "model.nowhere.", 1)] = tensors.pop(key)
    return tensors


def seen(model, x):
    """What must not change where a folder is refused."""
    layers = {layer.name for layer in model.layers} & {"table", "first", "second", "head", "wide", "narrow"}
    leaves = {name: "embeddings" if name == "table" else "kernel" for name in sorted(layers)}
    named = [tether.weight_of(model, f"{name}/{leaf}") for name, leaf in leaves.items()]
    return (
        numpy(model(x)).tobytes(),
        [(variable.path, variable.trainable) for variable in model.variables],
        [expression.notation() for expression in named],
        adapters.names(model),
    )


def refused(model, x, folder, error=TetherError, match=None):
    """Neither function takes a folder, and nothing of the model changes."""
    before = seen(model, x)
    with pytest.raises(error, match=match):
        tether.files.load_peft(model, folder)
    assert seen(model, x) == before
    with pytest.raises(error, match=match):
        adapters.load(model, folder, name="other")
    assert seen(model, x) == before


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_folder_changes_nothing(name, tmp_path):
    model, x, *_ = base(name)
    for how in ("a tensor less", "another shape", "another name"):
        tensors = damaged(name, how)
        if how != "a tensor less" or not adapter_of_fewer(name, tensors):  # a module less is an adapter too
            refused(model, x, changed(tmp_path / how, name, tensors))


def adapter_of_fewer(name, tensors):
    """Whether what is left is an adapter of fewer modules or parameters."""
    key = next(iter(load_file(FOLDERS / name / "adapter_model.safetensors")))
    alone = ("ia3_l", "oft_R.weight", "fourierft_spectrum", "bias", "trainable_tokens_delta", "head.weight")
    return bool(tensors) and key.endswith(alone)


def smaller(name):
    """A model like that of a folder, with other sizes."""
    right = values(name)
    if "base/table.weight" in right:
        x = keras.Input((5,), dtype="int32")
        h = keras.layers.Dense(7, name="first")(keras.layers.Embedding(9, 5, name="table")(x))
        h = keras.layers.Dense(5, name="second")(h)
        return keras.Model(x, keras.layers.Dense(4, name="head")(h)), right["x"].astype("int32")
    x = keras.Input((*right["x"].shape[2:], right["base/wide.weight"].shape[1]))
    layer = keras.layers.Conv1D if right["x"].ndim == 3 else keras.layers.Conv2D
    h = layer(5, 2, name="wide")(x)
    h = h if right["x"].ndim == 3 else keras.layers.Conv2D(2, 1, name="narrow")(h)
    return keras.Model(x, h), np.moveaxis(right["x"], 1, -1)


@pytest.mark.parametrize("name", sorted({*KINDS} - {"fourier"}))  # a spectrum tells nothing of the base's sizes
def test_a_folder_of_another_base_is_refused(name):
    model, x = smaller(name)
    refused(model, x, FOLDERS / name, (ShapeMismatch, InvalidConfig))


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_a_model_with_more_modules_is_refused(name):
    x = keras.Input((5,))
    model = keras.Model(x, keras.layers.Dense(4, name="else")(x))
    refused(model, np.ones((2, 5), "float32"), FOLDERS / name, UnknownName, "no weight for the module")


RANKS = {"BOFT": {"boft_block_size": 2}, "FOURIERFT": {"n_frequency": 3, "n_frequency_pattern": {}}}


@pytest.mark.parametrize("name", KINDS)
def test_ranks_that_disagree_with_the_tensors_are_refused(name, tmp_path):
    config = json.loads((FOLDERS / name / "adapter_config.json").read_text())
    if config["peft_type"] in ("IA3", "OFT") or name == "lokr_conv1d":
        return  # no rank; another size of blocks where that asked for does not divide; one matrix by any rank
    fields = RANKS.get(config["peft_type"], {"r": 5 if config.get("r", 0) < 5 else 1, "rank_pattern": {}})
    model, x, *_ = base(name)
    refused(model, x, changed(tmp_path, name, **fields), (InvalidConfig, ShapeMismatch))


@pytest.mark.parametrize("name", KINDS)
def test_a_name_that_is_taken_is_refused(name):
    model, x, *_ = base(name)
    adapters.load(model, FOLDERS / name, name="taken")
    before = seen(model, x)
    with pytest.raises(TetherError, match="taken"):
        adapters.load(model, FOLDERS / name, name="taken")
    assert seen(model, x) == before


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_folder_is_refused(name, tmp_path):
    file = changed(tmp_path, name) / "adapter_model.safetensors"
    content = file.read_bytes()
    model, x, *_ = base(name)
    for share in (0.0, 0.3, 0.9):
        file.write_bytes(content[: int(share * len(content))])
        refused(model, x, file.parent, InvalidConfig)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code has run')",)


@pytest.mark.parametrize("name", KINDS)
def test_code_and_pickles_in_a_folder_are_never_run(name, tmp_path):
    folder = changed(tmp_path, name, auto_mapping={"base_model_class": "X", "parent_library": "this_is_code"})
    (folder / "this_is_code.py").write_text("raise SystemExit('code has run')")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    model, x, right, _ = base(name)
    tether.files.load_peft(model, folder)  # beside the tensors a pickle is not looked at
    close(predict(model, x), right)
    model, x, *_ = base(name)
    (folder / "adapter_model.safetensors").unlink()
    refused(model, x, folder, Unsupported, "which may hold code")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    refused(model, x, folder, InvalidConfig)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": 3}', '{"peft_type": "LORA", "r": "x"}'])
@pytest.mark.parametrize("name", ["lora", "fourier"])
def test_a_config_that_says_nothing_is_refused(name, text, tmp_path):
    folder = changed(tmp_path, name)
    (folder / "adapter_config.json").write_text(text)
    model, x, *_ = base(name)
    refused(model, x, folder)


WRONG = [
    ("oft", {"num_cayley_neumann_terms": "five"}), ("oft", {"num_cayley_neumann_terms": 0}), ("oft", {"coft": True}),
    ("fourier", {"scaling": "much"}), ("fourier", {"random_loc_seed": None}), ("fourier", {"scaling": float("nan")}),
    ("fourier", {"n_frequency_pattern": [7]}), ("lokr", {"alpha": float("inf")}), ("vera", {"r": 0}),
    ("vera_seed", {"projection_prng_key": "x"}), ("ia3", {"feedforward_modules": "second"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), WRONG, ids=lambda each: str(each))
def test_a_field_that_makes_no_sense_is_refused(name, fields, tmp_path):
    model, x, *_ = base(name)
    refused(model, x, changed(tmp_path, name, **fields), TetherError, next(iter(fields)))


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path):
    folder = changed(tmp_path, "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Unsupported, match="save_file"):
        tether.files.load_peft(base("lora")[0], folder)


def test_a_config_of_another_kind_than_the_tensors_is_damaged(tmp_path):
    with pytest.raises(InvalidConfig, match="says that the adapter is IA3"):
        tensors = load_file(FOLDERS / "lora" / "adapter_model.safetensors")
        tether.files.load_peft(base("lora")[0], changed(tmp_path, "ia3", tensors))


# --------------------------------------------------------------------------- what is not written


NOT_WRITTEN = {
    "several kinds": ({"first/kernel": tether.low_rank(2), "second/kernel": forms.hadamard(2)}, "one kind of adapter"),
    "outputs without the bias": ({"first/kernel": forms.scale()}, "its bias too"),
    "a bias alone": ({"first/bias": forms.scale()}, "its bias too"),
    "a factor for each number": ({"first/kernel": forms.scale(axis=(0, 1))}, "its bias too"),
    "LoHa of a table": ({"table/embeddings": forms.hadamard(2)}, "Tables have low-rank"),
    "a bias beside LoHa": ({"first/kernel": forms.hadamard(2), "head/bias": forms.full()}, "no bias trained by itself"),
    "two families": ({"first/kernel": forms.vera(2), "second/kernel": forms.vera(2)}, "several. Make all"),
    "sizes of no one factor": (
        {"first/kernel": forms.kronecker(factor=1), "second/kernel": forms.kronecker(factor=3)}, "decompose_factor"
    ),
    "rotations of several sizes": (
        {"first/kernel": forms.oft(2), "second/kernel": forms.oft(3)}, "one `oft_block_size`"
    ),
    "several seeds": (
        {"first/kernel": forms.fourier(2), "second/kernel": forms.fourier(2, seed=1)}, "one `random_loc_seed`"
    ),
    "a table that turns": ({"table/embeddings": forms.oft(3)}, "cannot hold"),
    "a gate": ({"first/kernel": forms.gate()}, "cannot hold"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_WRITTEN)
def test_what_peft_has_no_folder_for_is_refused_and_nothing_is_written(what, tmp_path):
    changes, message = NOT_WRITTEN[what]
    model, *_ = base("lora")
    adapters.add(model, "own", changes)
    with pytest.raises(Unsupported, match=message):
        tether.files.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Every kind of PEFT folder, beside what PEFT itself computes with it (`tests/fixtures/peft/make.py`)."""

import importlib.util
import json
import pathlib
import re

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tether
from tests.files.peft_folders import FOLDERS, KINDS, base, changed, close, predict, values
from tether import adapters, forms
from tether.errors import Unsupported
from tether.files.peft.peft_config import FIELDS

pytestmark = pytest.mark.spread

WRITTEN = sorted({*KINDS} - {"pissa", "olora"})
"""What can be written as a folder of PEFT's again, of the same kind."""


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
        if key.endswith("boft_R"):  # of which the skew-symmetric part counts
            value = (value - value.swapaxes(-1, -2)) / 2
        assert ours[key].shape == value.shape
        close(ours[key], value)


@pytest.mark.parametrize("way", ["at once", "a model's file", "an adapter's file"])
def test_matrices_that_are_drawn_from_a_seed_are_not_written(way, tmp_path):
    model, *_ = base("vera_seed")
    adapters.load(model, FOLDERS / "vera_seed")
    if way == "a model's file":
        tether.files.save_model(model, tmp_path / "m.keras")
        model = tether.files.load_model(tmp_path / "m.keras")
    elif way == "an adapter's file":
        adapters.save(model, "vera_seed", tmp_path / "a.safetensors")
        model = base("vera_seed")[0]
        adapters.load(model, tmp_path / "a.safetensors")
    tether.files.save_peft(model, tmp_path / "out")
    assert "base_model.vera_A" not in load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["save_projection"]
    used = tether.weight_of(model, "first/kernel").weights_used()
    next(weight for weight in used if weight.name == "vera_bases.b").assign(np.ones((6, 3), "float32").T)
    tether.files.save_peft(model, tmp_path / "other")
    assert "base_model.vera_B" in load_file(tmp_path / "other" / "adapter_model.safetensors")


def by_peft(folder, right):
    """What PEFT itself computes with a folder, where it is installed."""
    pytest.importorskip("peft", reason="peft reads what is written")
    spec = importlib.util.spec_from_file_location("make", FOLDERS / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    if "base/table.weight" in right:
        kind, x = make.Text, make.IDS
    else:
        shape = right["base/wide.weight"].shape
        kind = make.Sound if len(shape) == 3 else make.Deep if shape[0] == 6 else make.Image
        x = {make.Sound: make.SEQUENCE, make.Deep: make.DEEP, make.Image: make.PICTURE}[kind]
    y = make.output(make.PeftModel.from_pretrained(make.fresh(kind), folder).eval(), x)
    return y if kind is make.Text else np.moveaxis(y, 1, -1)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_product_that_is_taken_off_is_written_side_by_side(name, named, tmp_path):
    model, x, right, _ = base(name)
    (adapters.load if named else tether.files.load_peft)(model, FOLDERS / name)
    tether.files.save_peft(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.first.lora_A.weight"].shape == (4, 4)
    again, *_ = base(name)
    tether.files.load_peft(again, tmp_path / "out")
    close(predict(again, x), right)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_peft_computes_the_same_with_what_is_written(name, tmp_path):
    model, _, right, _ = base(name)
    adapters.load(model, FOLDERS / name)
    tether.files.save_peft(model, tmp_path / "out")
    close(by_peft(tmp_path / "out", values(name)), right)


def scaled_with_bias(model):
    kernel, bias = (tether.weight_of(model, f"first/{leaf}").stop_gradient() for leaf in ("kernel", "bias"))
    s = tether.Weight((6,), "ones", name="own_s")
    tether.tie(model, {"first/kernel": kernel * s, "first/bias": bias * s})


OWN = {
    "scale of outputs": ("ia3", scaled_with_bias),
    "scale of inputs": ("ia3", {"first/kernel": forms.scale(axis=0), "second/kernel": forms.scale(axis=0)}),
    "scale as a whole": ("ia3", {"second/kernel": forms.scale(axis=None)}),
    "hadamard": ("loha", {"first/kernel": forms.hadamard(2), "second/kernel": forms.hadamard(3, alpha=5)}),
    "hadamard and a head": ("loha", {"first/kernel": forms.hadamard(2), "head/*": forms.full()}),
    "hadamard of a convolution": ("conv2d", {"wide/kernel": forms.hadamard(2), "narrow/kernel": forms.hadamard(1)}),
    "kronecker": ("lokr", {"first/kernel": forms.kronecker(1, alpha=2), "second/kernel": forms.kronecker()}),
    "kronecker, factor": (
        "lokr",
        {"first/kernel": forms.kronecker(factor=2), "second/kernel": forms.kronecker(factor=2)},
    ),
    "kronecker of one place": ("conv2d", {"narrow/kernel": forms.kronecker()}),
    "oft": ("oft", {"first/kernel": forms.oft(2), "second/kernel": forms.oft(2)}),
    "oft, terms": ("oft", {"first/kernel": forms.oft(4, terms=4)}),
    "oft, share": ("oft", dict.fromkeys(("first/kernel", "second/kernel"), forms.oft(2, share=True))),
    "oft, one block": ("oft", {"first/kernel": forms.oft(4), "head/*": forms.full()}),
    "boft": ("boft", {"first/kernel": forms.boft(2), "second/kernel": forms.boft(2)}),
    "fourier": ("fourier", {"first/kernel": forms.fourier(4), "second/kernel": forms.fourier(3, scale=2)}),
    "vera": ("vera", dict.fromkeys(("first/kernel", "second/kernel"), forms.vera(3, size=(9, 7)))),
}
"""Parts that were not read from a folder, on models of folders."""


def with_own(what, rng):
    name, changes = OWN[what]
    model, x, *_ = base(name)
    if callable(changes):
        changes(model)
    else:
        adapters.add(model, "own", changes)
    for variable in model.variables:
        if any(
            word in variable.path
            for word in ("loha", "lokr", "vera_d", "vera_b", "scale", "full", "own_s", "oft", "fourier")
        ):
            variable.assign(rng.normal(size=variable.shape).astype("float32") / 2)
    if not callable(changes):
        adapters.set_strengths(model, {"own": 1.0 if "head" in what or "oft" in what else -0.5})
    return name, model, x


@pytest.mark.parametrize("what", OWN)
def test_a_part_of_ones_own_is_written_and_read(what, rng, tmp_path):
    name, model, x = with_own(what, rng)
    wanted = predict(model, x)
    tether.files.save_peft(model, tmp_path / "out")
    again, *_ = base(name)
    assert not np.allclose(predict(again, x), wanted, atol=1e-3)
    tether.files.load_peft(again, tmp_path / "out")
    close(predict(again, x), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", OWN)
def test_peft_computes_the_same_with_a_part_of_ones_own(what, rng, tmp_path):
    name, model, x = with_own(what, rng)
    tether.files.save_peft(model, tmp_path / "out")
    close(by_peft(tmp_path / "out", values(name)), predict(model, x))


@pytest.mark.parametrize("form", [forms.oft(2), forms.boft(2)])
def test_a_rotation_at_another_strength_is_no_folder(form, tmp_path):
    model, *_ = base("lora")
    adapters.add(model, "own", {"first/kernel": form})
    adapters.set_strengths(model, {"own": 0.5})
    with pytest.raises(Unsupported, match=r"at strength 0\.5"):
        tether.files.save_peft(model, tmp_path / "out")


def test_a_butterfly_of_several_factors_goes_there_and_back(rng, tmp_path):
    kernel = rng.normal(size=(8, 3)).astype("float32")

    def fresh():
        x = keras.Input((8,))
        model = keras.Model(x, keras.layers.Dense(3, name="d")(x))
        model.get_layer("d").kernel.assign(kernel)
        return model

    model = fresh()
    adapters.add(model, "own", {"d/kernel": forms.boft(2, factors=3)})
    for weight in adapters.manage.own_weights(model)["own"]:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    wanted = tether.weight_of(model, "d/kernel").numpy()
    tether.files.save_peft(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 3
    named, plain = fresh(), fresh()
    adapters.load(named, tmp_path / "out")
    close(tether.weight_of(named, "d/kernel").numpy(), wanted)
    for _ in range(2):  # in the place of what was there
        tether.files.load_peft(plain, tmp_path / "out")
        close(tether.weight_of(plain, "d/kernel").numpy(), wanted)


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


def test_loading_twice_replaces_what_was_loaded():
    for name in ("lora", "dora", "pissa", "ia3", "loha", "lokr", "vera", "oft", "boft", "fourier"):
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

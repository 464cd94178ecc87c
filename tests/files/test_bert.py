"""Hugging Face's names of BERT, on a small one; the real one is in test_minilm.py."""

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tether
from tests.files.models import randomize
from tests.support import numpy
from tether.errors import TetherError, ValueConflict

keras_hub = pytest.importorskip("keras_hub")


def backbone():
    return keras_hub.models.BertBackbone(
        vocabulary_size=11, num_layers=2, num_heads=2, hidden_dim=6, intermediate_dim=8, max_sequence_length=5
    )


def masked_model():
    return keras_hub.models.BertMaskedLM(backbone(), preprocessor=None)


def values(model):
    return [value.tobytes() for value in model.get_weights()]


def written(model, tmp_path):
    tether.files.save_safetensors(model, tmp_path / "m.safetensors", names="bert")
    return tmp_path / "m.safetensors"


def test_every_tensor_is_called_and_laid_out_as_there(rng, tmp_path):
    model = randomize(backbone(), rng)
    found = load_file(written(model, tmp_path))
    block = "encoder.layer.1."
    expected = {
        "embeddings.word_embeddings.weight": (11, 6),
        "embeddings.position_embeddings.weight": (5, 6),
        "embeddings.token_type_embeddings.weight": (2, 6),
        "embeddings.LayerNorm.weight": (6,),
        block + "attention.self.query.weight": (6, 6),
        block + "attention.self.value.bias": (6,),
        block + "attention.output.dense.weight": (6, 6),
        block + "attention.output.LayerNorm.bias": (6,),
        block + "intermediate.dense.weight": (8, 6),
        block + "output.dense.weight": (6, 8),
        block + "output.LayerNorm.weight": (6,),
        "pooler.dense.weight": (6, 6),
    }
    assert {name: found[name].shape for name in expected} == expected
    assert len(found) == len(model.weights) == 5 + 2 * 16 + 2
    attention = model.get_layer("transformer_layer_1")._self_attention_layer
    query = numpy(attention._query_dense.kernel)
    for head in range(2):  # a row is an output of a head there, a column here
        theirs = found[block + "attention.self.query.weight"][3 * head : 3 * head + 3]
        assert np.array_equal(theirs, query[:, head, :].T)
    output = numpy(attention._output_dense.kernel)
    assert np.array_equal(found[block + "attention.output.dense.weight"][:, 3:], output[1].T)


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old", [False, True], ids=["weight_and_bias", "gamma_and_beta"])
def test_the_names_of_all_ages_are_read(prefix, old, rng, tmp_path):
    source = randomize(backbone(), rng)
    found = {prefix + name: array for name, array in load_file(written(source, tmp_path)).items()}
    if old:
        norm = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        found = {next((n.replace(a, b) for a, b in norm.items() if a in n), n): found[n] for n in found}
    found[prefix + "embeddings.position_ids"] = np.arange(5)
    found["cls.seq_relationship.weight"] = np.zeros((2, 6), "float32")
    found["cls.predictions.decoder.weight"] = np.ones((11, 6), "float32")  # a head that the backbone has not
    save_file(found, tmp_path / "theirs.safetensors")
    target = backbone()
    report = tether.files.load_safetensors(target, tmp_path / "theirs.safetensors", names="bert")
    assert values(target) == values(source)
    assert len(report.skipped) == 3


def test_a_language_models_head_has_to_agree_with_the_embedding(rng, tmp_path):
    source = randomize(masked_model(), rng)
    found = load_file(written(source, tmp_path))
    assert found["cls.predictions.bias"].shape == (11,)
    assert {"cls.predictions.transform.dense.weight", "cls.predictions.transform.LayerNorm.weight"} <= set(found)
    target = masked_model()
    tether.files.load_safetensors(target, tmp_path / "m.safetensors", names="bert")
    assert values(target) == values(source)
    table = found["embeddings.word_embeddings.weight"]
    for head, fits in ((table, True), (table + 1, False)):
        save_file({**found, "cls.predictions.decoder.weight": np.array(head)}, tmp_path / "m.safetensors")
        if fits:
            assert not tether.files.load_safetensors(target, tmp_path / "m.safetensors", names="bert").conflicting
            continue
        with pytest.raises(ValueConflict, match=r"word_embeddings\.weight' and 'cls\.predictions\.decoder\.weight'"):
            tether.files.load_safetensors(target, tmp_path / "m.safetensors", names="bert")


def test_what_is_no_part_of_bert_has_no_name_there(rng, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="other")])
    save_file({"pooler.dense.bias": np.zeros(2, "float32")}, tmp_path / "m.safetensors")
    with pytest.raises(TetherError, match="has no value for"):
        tether.files.load_safetensors(model, tmp_path / "m.safetensors", names="bert")

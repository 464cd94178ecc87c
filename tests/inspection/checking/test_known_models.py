"""No false alarm: the models of `keras.applications`, and backbones of KerasHub. What is found there is true.

One model at a time, and what is left of it is collected before the next.
"""

import gc

import keras
import numpy as np
import pytest

import tether

pytestmark = pytest.mark.slow

APPLICATIONS = sorted(name for name in dir(keras.applications) if name[0].isupper())
SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
FIXED = {"NASNetLarge": {}, "NASNetMobile": {}}
"""Those that take no small input with their top."""


@pytest.fixture(autouse=True)
def alone():
    yield
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":  # or the programs of all models are more than a process can have
        import jax

        jax.clear_caches()
    gc.collect()


@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_is_clean(name):
    if name == "NASNetMobile" and keras.backend.backend() == "torch":
        pytest.skip("Keras does not offer it on PyTorch")
    size = SMALLEST.get(name, 64)
    options = FIXED.get(name, {"input_shape": (size, size, 3), "include_top": False})
    model = getattr(keras.applications, name)(weights=None, **options)
    found = tether.check(model)
    assert len(model.layers) > 10 and len(found.rules) > 15
    assert not found, str(found)


TEXT = {"vocabulary_size": 40, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
SHORT = {**TEXT, "num_heads": 2, "max_sequence_length": 12}
GROUPED = {**TEXT, "num_query_heads": 2, "num_key_value_heads": 1}

BACKBONES = {
    "BertBackbone": SHORT,
    "RobertaBackbone": SHORT,
    "DistilBertBackbone": SHORT,
    "AlbertBackbone": {**SHORT, "embedding_dim": 8, "num_groups": 1},
    "DebertaV3Backbone": {**SHORT, "bucket_size": 4},
    "GPT2Backbone": SHORT,
    "OPTBackbone": SHORT,
    "BartBackbone": SHORT,
    "T5Backbone": {**TEXT, "num_heads": 2},
    "LlamaBackbone": GROUPED,
    "MistralBackbone": {**GROUPED, "sliding_window": 4},
    "GemmaBackbone": {**GROUPED, "head_dim": 8},
    "WhisperBackbone": {
        **{key: value for key, value in SHORT.items() if key != "max_sequence_length"},
        "num_mels": 8,
        "max_encoder_sequence_length": 16,
        "max_decoder_sequence_length": 12,
    },
    "ViTBackbone": {
        "image_shape": (32, 32, 3),
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    },
}

TRUE = {
    # Keys and values are made by one initializer object, so they start equal.
    "LlamaBackbone": {("equal-weights", "hint"), ("no-gradient", "warning")},
    "MistralBackbone": {("equal-weights", "hint"), ("no-gradient", "warning")},
    "GemmaBackbone": {("equal-weights", "hint")},
    # The tables of relative positions of encoder and decoder have one path.
    "T5Backbone": {("path-used-twice", "warning")},
}
"""What is found, and true. (A backbone does not call the output head of its own table, so that has no gradient.)"""


def batch_for(model, rng):
    """A batch for the inputs of a backbone, by their names."""
    batch = {}
    for spec in model.inputs:
        shape = (2, *(8 if size is None else size for size in spec.shape[1:]))
        if "int" in spec.dtype:
            batch[spec.name] = np.ones(shape, "int32") if "mask" in spec.name else rng.integers(1, 40, shape)
        else:
            batch[spec.name] = rng.normal(size=shape).astype("float32")
        if "segment" in spec.name:
            batch[spec.name] = np.zeros(shape, "int32")
    return batch if len(batch) > 1 else next(iter(batch.values()))


@pytest.mark.filterwarnings("ignore:Layer '.*_attention'.*mask:UserWarning")
@pytest.mark.parametrize("name", list(BACKBONES))
def test_what_is_found_in_a_backbone_is_true(name, rng):
    keras_hub = pytest.importorskip("keras_hub")
    model = getattr(keras_hub.models, name)(**BACKBONES[name])
    found = tether.check(model, batch_for(model, rng))
    assert {(finding.rule, finding.severity) for finding in found} == TRUE.get(name, set()), str(found)
    if name in ("LlamaBackbone", "MistralBackbone", "GemmaBackbone"):
        for finding in found.by_rule("equal-weights"):
            assert finding.where.endswith("/value/kernel") and "/key/kernel" in finding.why
        for finding in found.by_rule("no-gradient"):
            assert finding.where == "token_embedding/reverse_embeddings"

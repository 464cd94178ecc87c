"""`share_depth` by pattern on KerasHub's backbones, and on a stack as ALBERT has it."""

import keras
import keras_hub
import numpy as np
import pytest

import tether
from tests.layers.test_sharing_layers import Block, built, x
from tests.support import assert_close, numpy

pytestmark = pytest.mark.spread

L = keras.layers
SMALL = {"vocabulary_size": 11, "num_heads": 2, "hidden_dim": 6, "intermediate_dim": 8, "max_sequence_length": 5}
WORDS = {"token_ids": np.array([[1, 2, 3, 4, 0]] * 2), "padding_mask": np.array([[1, 1, 1, 1, 0]] * 2)}
BERT = {**WORDS, "segment_ids": np.zeros((2, 5), "int32")}
IMAGES = np.random.default_rng(0).random((2, 8, 8, 3)).astype("float32")
MODELS = {
    "bert": (lambda: keras_hub.models.BertBackbone(num_layers=4, **SMALL), "transformer_layer_*", BERT),
    "gpt2": (lambda: keras_hub.models.GPT2Backbone(num_layers=4, **SMALL), "transformer_layer_*", WORDS),
    "vit": (
        lambda: keras_hub.models.ViTBackbone(
            image_shape=(8, 8, 3), patch_size=4, num_layers=4, num_heads=2, hidden_dim=6, mlp_dim=8
        ),
        "*/encoder_layers/*",
        IMAGES,
    ),
}


def outputs(model, inputs):
    found = model(inputs)
    return numpy(found["sequence_output"] if isinstance(found, dict) else found)


def randomized(model, seed=5):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape).astype("float32") / 3)
    return model


@pytest.mark.parametrize("values", ["first", tether.low_rank(2)], ids=["first", "low rank"])
@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_shares_its_depth_and_survives(name, values, tmp_path):
    make, blocks, inputs = MODELS[name]
    model = randomized(make())
    before = model.count_params()
    report = tether.share_depth(model, "cycle:2", blocks=blocks, values=values)
    assert report.letters == "ABAB"
    assert model.count_params() == before - report.before + report.after
    assert all(weight.how == "own" for weight in report.weights if "norm" in weight.name)
    assert all(weight.how != "own" for weight in report.weights if weight.name.endswith("kernel"))
    y = outputs(model, inputs)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.count_params() == model.count_params()
    assert_close(outputs(again, inputs), y)
    assert_close(outputs(tether.materialize(model), inputs), y)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors")
    tether.files.load_safetensors(randomized(again, 6), tmp_path / "m.safetensors")
    assert_close(outputs(again, inputs), y)
    assert_close(outputs(tether.untie(model), inputs), y)
    assert model.count_params() == before


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_the_model_it_was(name):
    make, blocks, inputs = MODELS[name]
    model = randomized(make())
    y = outputs(model, inputs)
    tether.share_depth(model, blocks=blocks, values=tether.low_rank(99))
    assert_close(outputs(model, inputs), y, 1e-3)


def test_a_classifier_on_a_backbone_trains_and_is_cloned():
    backbone = keras_hub.models.BertBackbone(num_layers=3, **SMALL, name="backbone")
    inputs = {name: keras.Input((5,), dtype="int32", name=name) for name in BERT}
    model = keras.Model(inputs, L.Dense(2, name="head")(backbone(inputs)["pooled_output"]))
    report = tether.share_depth(model, "all", blocks="backbone/transformer_layer_*")
    assert report.blocks[0] == "backbone/transformer_layer_0"
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = backbone.get_layer("transformer_layer_2")._feedforward_output_dense.kernel
    before = numpy(kernel.value).copy()
    model.fit(BERT, np.array([0, 1]), verbose=0)
    moved = numpy(kernel.value)
    assert not np.array_equal(moved, before)
    first = backbone.get_layer("transformer_layer_0")._feedforward_output_dense.kernel
    np.testing.assert_array_equal(numpy(first.value), moved)


def test_groups_of_an_albert_become_one():
    def albert(groups):
        return keras_hub.models.AlbertBackbone(
            num_layers=4, num_groups=groups, num_inner_repetitions=1, embedding_dim=4, dropout=0.0, **SMALL
        )

    model, one = randomized(albert(2)), albert(1)
    tether.share_depth(model, blocks="group_*", keep=())
    assert model.count_params() == one.count_params()
    one.set_weights(model.get_weights())
    assert_close(outputs(model, BERT), outputs(one, BERT))


def test_a_stack_that_shares_all_is_one_block_used_again():
    block = built(Block(name="block"))
    inputs = y = keras.Input((5, 6))
    for _ in range(4):
        y = block(y)
    loop = keras.Model(inputs, y)
    stack = keras.Sequential([keras.Input((5, 6)), *(Block(name=f"block_{place}") for place in range(4))])
    tether.share_depth(stack, blocks="block_*", keep=())
    assert stack.count_params() == loop.count_params()
    stack.set_weights(loop.get_weights())
    assert_close(stack(x()), loop(x()))

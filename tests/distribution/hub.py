"""KerasHub's Gemma, tiny, with the layout map that KerasHub has for it."""

import keras_hub
import numpy as np

import tether
from tests.distribution.models import mesh_of, scope, shards
from tests.distribution.programs import check
from tether.distribution import layout_map

RULES = ["layout-missed", "layout-conflict", "layout-misfit", "part-whole"]


def gemma():
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=64, num_layers=2, num_query_heads=4, num_key_value_heads=4, hidden_dim=16,
        intermediate_dim=32, head_dim=8,
    )  # fmt: skip


@check
def gemma_with_its_own_map():
    mesh = mesh_of(2, 4)
    whole = gemma()
    layouts = layout_map(whole, keras_hub.models.GemmaBackbone.get_layout_map(mesh))
    with scope(layouts):
        model = gemma()
        tether.adapters.add(model, "x", {"*/query/kernel": tether.low_rank(2), "*output/kernel": tether.low_rank(2)})
        found = {path.removeprefix("decoder_block_1/attention/"): shape for path, shape in shards(model).items()}
        assert found["token_embedding/embeddings"] == (16, 8)
        assert found["query/kernel"] == (1, 8, 8) and found["query/kernel_lora_a"] == (1, 8, 2)
        assert found["attention_output/kernel_lora_b"] == (2, 8)
        assert not tether.check(model, rules=RULES), str(tether.check(model, rules=RULES))
        batch = {"token_ids": np.ones((4, 6), "int32"), "padding_mask": np.ones((4, 6), "int32")}
        outputs = model.predict(batch, verbose=0)
    values = {variable.path: np.asarray(variable.value) for variable in model.weights}
    for variable in whole.weights:
        variable.assign(values[variable.path])
    np.testing.assert_allclose(outputs, whole.predict(batch, verbose=0), atol=1e-5)

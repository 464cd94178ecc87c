# %% [markdown]
# # LoRA on a BERT of KerasHub
#
# A frozen encoder, and a low-rank part that learns on each of its query and value projections (Hu et al. 2021,
# "LoRA"). The encoder is a small one with random weights, so that nothing is downloaded; with
# `keras_hub.models.BertBackbone.from_preset` it is the real one.

# %%
import os

import keras
import keras_hub
import numpy as np

import tether

keras.utils.set_random_seed(0)
backbone = keras_hub.models.BertBackbone(
    vocabulary_size=200,
    num_layers=2,
    num_heads=2,
    hidden_dim=32,
    intermediate_dim=64,
    max_sequence_length=12,
    dropout=0.0,
)
backbone.trainable = False
before = [value.copy() for value in backbone.get_weights()]
print(f"{backbone.count_params():,} stored numbers, all frozen")

# %% [markdown]
# ## The adapter
#
# An adapter is a named part of some weights. A pattern says of which. The base stays frozen, and the parts learn.

# %%
tether.adapters.add(
    backbone, "first_token", {f"*/{name}/kernel": tether.low_rank(4, alpha=64) for name in ("query", "value")}
)
print("adapters:", tether.adapters.strengths(backbone))
print(f"{sum(int(np.prod(v.shape)) for v in backbone.trainable_variables):,} numbers train, such as:")
print(*[variable.path for variable in backbone.trainable_variables][:2], sep="\n")

# %% [markdown]
# ## A task
#
# Whether the first token of a sequence is above 100. A guess has a loss of 0.69.

# %%
rng = np.random.default_rng(0)
ids = rng.integers(1, 200, (512, 12)).astype("int32")
x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids)}
y = ids[:, 0] > 100

inputs = backbone.input
outputs = keras.layers.Dense(1, activation="sigmoid", name="answer")(backbone(inputs)["pooled_output"])
classifier = keras.Model(inputs, outputs)
classifier.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"])
history = classifier.fit(x, y, batch_size=64, epochs=15, verbose=0).history
print(f"loss {history['loss'][0]:.2f} to {history['loss'][-1]:.2f}, accuracy {history['accuracy'][-1]:.2f}")

# %% [markdown]
# ## On, off, and in a file of its own
#
# Setting a strength is one assignment: nothing is compiled again. The file of an adapter holds its factors and
# nothing of the base.

# %%
on = classifier.predict(x, verbose=0)
tether.adapters.activate(backbone)
off = classifier.predict(x, verbose=0)
tether.adapters.activate(backbone, "first_token")
tether.adapters.save(backbone, "first_token", "first_token.safetensors")
print(f"the adapter changes answers by up to {np.abs(on - off).max():.2f}")
print(f"its file has {os.path.getsize('first_token.safetensors'):,} bytes")

# %%
tether.adapters.remove(backbone, "first_token")
tether.adapters.load(backbone, "first_token.safetensors")
after = {variable.path: keras.ops.convert_to_numpy(variable) for variable in backbone.variables}
own = [path for path in after if "lora" not in path and "strength" not in path]
print(len(own), "variables of the base, and", len(after) - len(own), "of the adapter")

# %%
assert history["loss"][-1] < 0.6
assert all(
    np.array_equal(one, other) for one, other in zip(before, map(after.get, own), strict=True)
)  # to the last bit
assert np.allclose(classifier.predict(x, verbose=0), on, atol=1e-5)

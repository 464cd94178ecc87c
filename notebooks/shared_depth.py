# %% [markdown]
# # Depth that is shared
#
# A transformer has the same block many times, each time with weights of its own. Here blocks compute with the same
# weights (Takase and Kiyono 2021, "Lessons on Parameter Sharing across Layers in Transformers"), in a small language
# model that reads characters. The text is the documentation that comes with Python, so nothing is downloaded. The
# longer program is [guides/shared_depth.py](../guides/shared_depth.py), and everything about sharing is in
# [docs/depth.md](../docs/depth.md).

# %%
import math
from pydoc_data.topics import topics

import keras
import numpy as np

import tether

text = "\n".join(topics[name] for name in sorted(topics))[:100_000]
letters = sorted(set(text))
number = {letter: place for place, letter in enumerate(letters)}
ids = np.array([number[letter] for letter in text])
lines = ids[: len(ids) // 33 * 33].reshape(-1, 33)
train, held_out = lines[:-512], lines[-512:]
print(len(train), "lines of 32 characters to learn from,", len(letters), "different characters")

# %% [markdown]
# ## The model
#
# Plain Keras: a block is attention to what came before, then two dense layers, each added to its input. Its `build`
# makes and builds the layers within.


# %%
@keras.saving.register_keras_serializable("shared_depth")
class Block(keras.layers.Layer):
    def build(self, shape):
        width = shape[-1]
        self.attention_norm = keras.layers.LayerNormalization()
        self.attention = keras.layers.MultiHeadAttention(2, width // 2)
        self.dense_norm = keras.layers.LayerNormalization()
        self.up = keras.layers.Dense(4 * width, activation="gelu")
        self.down = keras.layers.Dense(width)
        self.attention.build(shape, shape)
        for layer in (self.attention_norm, self.dense_norm, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 4 * width))

    def call(self, x):
        y = self.attention_norm(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.down(self.up(self.dense_norm(x)))


def language_model(depth):
    keras.utils.set_random_seed(0)
    tokens = keras.Input((32,), dtype="int32")
    x = keras.layers.Embedding(len(letters), 32, name="letters")(tokens)
    for place in range(depth):
        x = Block(name=f"block_{place}")(x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    return keras.Model(tokens, keras.layers.Dense(len(letters), name="head")(x))


# %% [markdown]
# ## Sharing
#
# `share_depth` changes the model in place. `"cycle:2"` of four blocks is ABAB: the third computes with the weights of
# the first, the fourth with those of the second. The weights of norms stay with each depth.

# %%
shared = language_model(4)
print(tether.share_depth(shared, "cycle:2", blocks="block_*"))

# %% [markdown]
# ## What it does to the loss
#
# Each model takes as many steps, on the same lines. Beside those that share is the honest baseline: two blocks that
# are not repeated have as many numbers, and a step of theirs takes less time. This is a short run of one seed, in which
# small differences say nothing; the longer program has more of both.

# %%
parts = language_model(4)
tether.share_depth(parts, "cycle:2", blocks="block_*", values=tether.low_rank(2))
models = {
    "four blocks": language_model(4),
    "ABAB": shared,
    "ABAB + low_rank(2)": parts,
    "two blocks": language_model(2),
}


def bits(model):
    return model.evaluate(held_out[:, :-1], held_out[:, 1:], batch_size=64, verbose=0) / math.log(2)


found = {}
for name, model in models.items():
    model.compile(keras.optimizers.Adam(0.005), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    keras.utils.set_random_seed(0)  # the same order of lines
    model.fit(train[:, :-1], train[:, 1:], batch_size=64, epochs=3, verbose=0)
    found[name] = bits(model)
    print(f"{name:20}{model.count_params():>8,} numbers, {found[name]:.2f} bits a character on held-out text")

# %% [markdown]
# ## Sharing what is trained already
#
# The four blocks of the first model have learned. A shared weight can start with the mean of its two blocks, and each
# depth can add a product of two thin matrices, fitted to what its own value differs by (Bae et al. 2024, "Relaxed
# Recursive Transformers"). The higher the rank, the nearer the model is to what it was, and the more it stores: at full
# rank, here 32, it computes the same, and stores more than four blocks.

# %%
before = models["four blocks"].predict(held_out[:64, :-1], verbose=0)
changes = {}
for name, values in {"mean": "mean", "low_rank(8)": tether.low_rank(8), "low_rank(32)": tether.low_rank(32)}.items():
    copy = keras.models.clone_model(models["four blocks"])
    copy.set_weights(models["four blocks"].get_weights())
    tether.share_depth(copy, "cycle:2", blocks="block_*", values=values)
    changes[name] = np.abs(copy.predict(held_out[:64, :-1], verbose=0) - before).max()
    print(f"{name:14}{copy.count_params():>8,} numbers, outputs differ by up to {changes[name]:.4f}")

# %% [markdown]
# ## Saving
#
# A file holds what is shared once, and the loaded model shares it.

# %%
parts.save("shared_depth.keras")
again = keras.saving.load_model("shared_depth.keras")
difference = np.abs(again.predict(held_out[:64, :-1], verbose=0) - parts.predict(held_out[:64, :-1], verbose=0)).max()
print(f"{again.count_params():,} numbers, outputs differ by up to {difference:.1g}")

# %%
frequencies = np.bincount(train.ravel(), minlength=len(letters)) + 1
assert max(found.values()) < -np.log2((frequencies / frequencies.sum())[held_out[:, 1:]]).mean()
assert shared.count_params() < parts.count_params() < models["four blocks"].count_params()
assert changes["mean"] > 0.1 and changes["low_rank(32)"] < 1e-2
assert copy.count_params() > models["four blocks"].count_params()
assert again.count_params() == parts.count_params() and difference < 1e-4

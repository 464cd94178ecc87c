# %% [markdown]
# # A tied language model
#
# A language model has a table of words at its input, and at its output a matrix that turns a hidden state into a
# score for each word. Both have one row for each word. Here they are one stored weight (Press and Wolf 2017, "Using
# the output embedding to improve language models"). The text is the documentation that comes with Python, so nothing
# is downloaded.

# %%
import re
from collections import Counter
from pydoc_data.topics import topics

import keras
import numpy as np

import tether

keras.utils.set_random_seed(0)
words = re.findall(r"[a-z]+|[.,]", " ".join(topics.values()).lower())[:40_000]
known = [word for word, _ in Counter(words).most_common(999)]
number = {word: index + 1 for index, word in enumerate(known)}
ids = np.array([number.get(word, 0) for word in words])
lines = ids[: len(ids) // 17 * 17].reshape(-1, 17)
train, held_out = lines[:2000], lines[2000:]
print(len(words), "words,", len(known), "different ones are kept:", *known[:8])

# %% [markdown]
# ## The model, and the tie
#
# The model is plain Keras. `weight_of` gives the stored weight behind the embedding, and `tie` makes the kernel of
# the head its transpose. Everything else about the two layers stays: the head still has a bias of its own.


# %%
def language_model(tied):
    tokens = keras.Input((16,), dtype="int32")
    hidden = keras.layers.Embedding(1000, 64, name="embedding")(tokens)
    hidden = hidden + keras.layers.Conv1D(64, 4, padding="causal", activation="relu", name="context")(hidden)
    hidden = keras.layers.LayerNormalization(name="norm")(hidden)
    model = keras.Model(tokens, keras.layers.Dense(1000, name="head")(hidden), name="tied" if tied else "untied")
    if tied:
        table = tether.weight_of(model, "embedding/embeddings")
        tether.tie(model, {"head/kernel": table.T})
    model.compile(keras.optimizers.Adam(0.003), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


models = {name: language_model(name == "tied") for name in ("untied", "tied")}
tether.summary(models["tied"])

# %% [markdown]
# ## Training
#
# The gradient of the table is the sum over both uses, and the optimizer keeps one set of slots for it. What sharing
# does to the loss has to be measured for each model: with as little training as here the untied model, which has
# nearly twice the numbers, is a little better.

# %%
losses = {}
for name, model in models.items():
    model.fit(train[:, :-1], train[:, 1:], batch_size=50, epochs=4, verbose=0)
    losses[name] = model.evaluate(held_out[:, :-1], held_out[:, 1:], verbose=0)
    print(f"{name:7}{model.count_params():>9,} stored numbers, loss on held-out text {losses[name]:.2f}")

share = np.bincount(train.ravel(), minlength=1000) + 1
frequencies = -np.log((share / share.sum())[held_out[:, 1:]]).mean()
print(f"by the words' frequencies alone {frequencies:.2f}")

# %% [markdown]
# ## Saving
#
# The file holds the table once, and the loaded model is tied: what trains one side trains the other.

# %%
tether.files.save_model(models["tied"], "language_model.keras")
again = keras.saving.load_model("language_model.keras")
again.fit(train[:100, :-1], train[:100, 1:], verbose=0)
table = keras.ops.convert_to_numpy(again.get_layer("embedding").embeddings)
kernel = keras.ops.convert_to_numpy(again.get_layer("head").kernel)
print("the head of the loaded model is its table:", np.array_equal(kernel, table.T))

# %%
assert models["untied"].count_params() - models["tied"].count_params() == 1000 * 64
assert np.array_equal(kernel, table.T)
assert losses["tied"] < frequencies

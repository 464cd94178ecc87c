"""Draws the weight map that the documentation site shows: `python scripts/draw_map.py map.html`.

A small language model whose head is tied to its embedding, and whose queries have a low-rank part.
"""

import sys

import keras

import tether


def language_model(words=2000, width=64, blocks=4):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    hidden = keras.layers.Embedding(words, width, name="embedding")(tokens)
    for number in range(blocks):
        read = keras.layers.MultiHeadAttention(4, width // 4, name=f"attention_{number}")(hidden, hidden)
        hidden = keras.layers.LayerNormalization(name=f"norm_{number}")(hidden + read)
        wide = keras.layers.Dense(4 * width, activation="relu", name=f"wide_{number}")(hidden)
        hidden = hidden + keras.layers.Dense(width, name=f"narrow_{number}")(wide)
    model = keras.Model(tokens, keras.layers.Dense(words, name="head")(hidden), name="language_model")
    table = tether.weight_of(model, "embedding/embeddings")
    tether.tie(model, {"head/kernel": table.T})
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(4)})
    return model


if __name__ == "__main__":
    tether.plot(language_model(), sys.argv[1], title="A language model whose head is its embedding, with an adapter")

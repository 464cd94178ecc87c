"""A check of a large model takes little time, and no memory to speak of."""

import gc
import os
import threading
import time
from pathlib import Path

import keras
import pytest

import tether

layers = keras.layers


def resident():
    """The bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that the process has had within the scope, above what it had before."""

    def __enter__(self):
        gc.collect()
        self.before = self.most = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.growth = self.most - self.before


def encoder(width=768, depth=12, vocabulary=30_522, length=512):
    """A transformer of BERT's size whose head is its table."""
    ids = keras.Input((length,), dtype="int32")
    table = layers.Embedding(vocabulary, width, name="table")
    positions = layers.Embedding(length, width, name="positions")
    h = layers.LayerNormalization()(layers.Add()([table(ids), positions(ids)]))
    for number in range(depth):
        attended = layers.MultiHeadAttention(12, width // 12, name=f"attention_{number}")(h, h)
        h = layers.LayerNormalization()(layers.Add()([h, attended]))
        wide = layers.Dense(4 * width, activation="gelu", name=f"wide_{number}")(h)
        h = layers.LayerNormalization()(layers.Add()([h, layers.Dense(width, name=f"narrow_{number}")(wide)]))
    model = keras.Model(ids, layers.Dense(vocabulary, use_bias=False, name="head")(h))
    tether.tie(model, {"head/kernel": tether.weight_of(model, "table/embeddings").T})
    return model


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_110_million_parameters_take_less_than_three_seconds_and_no_copy():
    tether.check(keras.Sequential([keras.Input((20,)), layers.Dense(20), layers.Dense(20)]))  # what is imported once
    model = encoder()
    size = 4 * model.count_params()
    assert 100e6 < size / 4 < 120e6
    with Peak() as peak:
        processor, wall = time.process_time(), time.perf_counter()
        found = tether.check(model)
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
    print(f"{size / 4e6:.0f} M parameters: {wall:.2f} s ({processor:.2f} s of processor), {peak.growth / 1e6:.0f} MB")
    assert not found, str(found)
    assert wall < 3
    assert peak.growth < size / 8

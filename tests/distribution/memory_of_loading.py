"""How much memory a process takes, and how many bytes it reads, while it loads a model that lies on two processes."""

import gc
import pathlib
import types

import keras
import numpy as np

import tether
from tests.distribution.programs import check

D, L = keras.distribution, keras.layers
PROCESSES, SIZE = 2, 2048
BYTES = SIZE * 2 * SIZE * 4
"""Bytes of each weight: they are equal, so that this is the largest one."""
MARGIN = 4 << 20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
"""Variables of the environment with which memory that is given back is given back at once, and so is not measured."""


def right(name):
    shape = (SIZE, 2 * SIZE) if name in ("rows", "columns") else (2 * SIZE, SIZE)
    return np.random.default_rng(len(name)).random(shape, "float32")


def build():
    inputs = keras.Input((SIZE,))
    x = L.Dense(2 * SIZE, use_bias=False, name="columns")(inputs)
    x = L.Dense(SIZE, use_bias=False, name="rows_too")(x)
    return keras.Model(inputs, L.Dense(2 * SIZE, use_bias=False, name="rows")(x))


def prepare(folder):
    model = build()
    for layer in model.layers[1:]:
        layer.kernel.assign(right(layer.name))
    tether.files.save_safetensors(model, folder / "m.safetensors")
    tether.files.save_model(model, folder / "m.keras")


def start(folder, number):
    layouts = D.LayoutMap(D.DeviceMesh((1, PROCESSES), ["batch", "model"], D.list_devices("cpu")))
    layouts["columns/kernel"] = (None, "model")
    layouts["rows.*kernel"] = ("model", None)
    D.set_distribution(D.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False))
    return types.SimpleNamespace(folder=folder, model=build(), own=3 * BYTES // PROCESSES)


class Measured:
    """The largest memory and the bytes read within a block, beyond what was there before it."""

    def __enter__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before, self.read = number("status", "VmRSS:") << 10, number("io", "rchar:")
        return self

    def __exit__(self, *_):
        self.peak = (number("status", "VmHWM:") << 10) - self.before
        self.read = number("io", "rchar:") - self.read
        print(f"peak {self.peak / BYTES:.2f}, read {self.read / BYTES:.2f} of a weight", flush=True)


def number(file, name):
    lines = pathlib.Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def holds(model):
    for layer in model.layers[1:]:
        value = right(layer.name)
        for shard in layer.kernel.value.addressable_shards:
            assert shard.data.size * PROCESSES == value.size
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])


def loaded(c, path):
    with Measured() as measured:
        tether.files.load_safetensors(c.model, path)
    holds(c.model)
    assert measured.peak <= 1.2 * BYTES  # the shards that the model had before are counted before
    assert measured.read <= c.own + MARGIN


@check
def a_single_file_is_read_by_own_parts_only(c):
    loaded(c, c.folder / "m.safetensors")


@check
def what_processes_have_written_is_read_by_own_parts_only(c):
    (c.folder / "own").mkdir(exist_ok=True)
    with Measured() as measured:
        tether.files.save_safetensors(c.model, c.folder / "own", per_process=True)
    assert measured.peak <= 0.1 * BYTES  # nothing is gathered
    for layer in c.model.layers[1:]:
        layer.kernel.assign(keras.ops.zeros_like(layer.kernel.value))
    loaded(c, c.folder / "own")


@check
def a_model_is_gathered_one_weight_at_a_time(c):
    with Measured() as measured:
        tether.files.save_safetensors(c.model, c.folder / "again.safetensors")
    # One in the collective operation and what comes of it; on a busy machine what is done with is given back a little
    # later. All three at once would be four or more.
    assert measured.peak <= 3 * BYTES


@check
def a_model_is_made_and_read_by_own_parts(c):
    c.model = None
    gc.collect()
    with Measured() as measured:
        model = tether.files.load_model(c.folder / "m.keras")
    holds(model)
    assert measured.peak <= c.own + 1.2 * BYTES

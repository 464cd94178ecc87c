"""What it costs to write a model to a file and to read it back: `python -m benchmarks.files [part ...]`.

The model is an encoder as large as BERT-base (12 layers, width 768, 30,522 tokens) with a head for masked words whose
kernel is the table of tokens, transposed: 110 million stored numbers. Beside Tether's functions are Keras's own
`.keras`, the plain library of safetensors, and on PyTorch `torch.save`, each with the same values. `filled` are the
plain readers with what it takes until a model has the values: they return arrays.

Parts:
    times     bytes of each file over those of the stored weights; seconds of each save and load, in turn in one
              process, medians; and the median ratio to the plain library of safetensors, filled. Tether flushes what
              it writes to the disk before it renames the file; the others leave that to the system.
    memory    each load in a process of its own: how far the peak of the process's resident memory (VmHWM) rises
              above what is resident before the load (VmRSS), over the bytes of the stored weights; and the peak of
              the whole process. Where a load fills a model, the model exists before and is not counted; where it makes
              one or returns arrays, these are; beside them is what it takes to make the model alone. A small file of
              the same kind is loaded before, so that what Python and the backend load once is not counted.
Asked for: bytes at most 1.01 of the stored weights; safetensors at least 0.9 times as fast as the plain library; peak
memory at most 1.1 times the stored weights.
"""

import gc
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import keras
import numpy as np

import tether
from benchmarks._measure import seconds, write

layers = keras.layers
BERT = {"depth": 12, "width": 768, "heads": 12, "inner": 3072, "vocabulary": 30522, "length": 512}
SMALL = {"depth": 1, "width": 640, "heads": 2, "inner": 640, "vocabulary": 1000, "length": 8}
PLAIN, MADE = "safetensors, filled", "the model made, no file"
ROUNDS = 9


def model_of(depth, width, heads, inner, vocabulary, length):
    ids = keras.Input((length,), dtype="int32")
    table = layers.Embedding(vocabulary, width, name="tokens")
    places = layers.Embedding(length, width, name="places")
    x = layers.LayerNormalization(name="norm")(
        table(ids) + places(keras.ops.cumsum(keras.ops.ones_like(ids), axis=1) - 1)
    )
    for number in range(depth):
        attention = layers.MultiHeadAttention(heads, width // heads, name=f"attention_{number}")(x, x)
        x = layers.LayerNormalization(name=f"attention_norm_{number}")(x + attention)
        y = layers.Dense(inner, activation="gelu", name=f"inner_{number}")(x)
        y = layers.Dense(width, name=f"outer_{number}")(y)
        x = layers.LayerNormalization(name=f"outer_norm_{number}")(x + y)
    x = layers.LayerNormalization(name="head_norm")(layers.Dense(width, activation="gelu", name="head")(x))
    head = layers.Dense(vocabulary, name="words")
    head = tether.tie(head, kernel=tether.weight_of(table, "embeddings").T)
    return keras.Model(ids, head(x))


def bytes_of(model):
    return sum(int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in model.weights)


# --------------------------------------------------------------------------- what is compared


def save_plain(model, path):
    from safetensors.numpy import save_file

    save_file({str(n): keras.ops.convert_to_numpy(v.value) for n, v in enumerate(model.weights)}, path)


def load_plain(model, path):
    from safetensors.numpy import load_file

    return load_file(path)


def fill_plain(model, path):
    arrays = load_plain(model, path)
    for number, variable in enumerate(model.weights):
        variable.assign(arrays[str(number)])


def save_torch(model, path):
    import torch

    torch.save(model.state_dict(), path)


def load_torch(model, path):
    import torch

    return torch.load(path, weights_only=True)


def fill_torch(model, path):
    arrays = load_torch(model, path)
    model.load_state_dict(dict(zip(model.state_dict(), arrays.values(), strict=True)))


SAVES = {
    "tether.files.save_model": ("tether.keras", tether.files.save_model),
    "Keras, model.save": ("keras.keras", lambda model, path: model.save(path)),
    "tether.files.save_safetensors": ("tether.safetensors", tether.files.save_safetensors),
    "safetensors": ("plain.safetensors", save_plain),
}
LOADS = {
    "tether.files.load_model": ("tether.keras", lambda model, path: tether.files.load_model(path)),
    "Keras, load_model": ("keras.keras", lambda model, path: keras.saving.load_model(path)),
    "tether.files.load_safetensors": ("tether.safetensors", tether.files.load_safetensors),
    "safetensors": ("plain.safetensors", load_plain),
    PLAIN: ("plain.safetensors", fill_plain),
}
if keras.backend.backend() == "torch":
    SAVES["torch.save"] = ("plain.pt", save_torch)
    LOADS |= {"torch.load": ("plain.pt", load_torch), "torch.load, filled": ("plain.pt", fill_torch)}


def written(model, folder):
    for name, save in SAVES.values():
        save(model, folder / name)


def done(model):
    """Waits until a model has the values that it was given."""
    if keras.backend.backend() == "jax" and model is not None:
        import jax

        jax.block_until_ready([variable.value for variable in model.weights])


# --------------------------------------------------------------------------- the parts


def times(folder):
    model = model_of(**BERT)
    unique = bytes_of(model)
    rows = []
    for kind, calls, plain in (("save", SAVES, "safetensors"), ("load", LOADS, PLAIN)):
        found = {name: [] for name in calls}
        for number in range(1 + ROUNDS):
            for name in list(calls) if number % 2 else list(calls)[::-1]:
                file, call = calls[name]
                gc.collect()
                os.sync()  # what another one has left to the system is not this one's to wait for
                found[name].append(seconds(lambda call=call, file=file: (call(model, folder / file), done(model))))
        for name, (file, _) in calls.items():
            ratios = [theirs / ours for ours, theirs in zip(found[name][1:], found[plain][1:], strict=True)]
            row = {
                "case": f"{kind}: {name}",
                "seconds": statistics.median(found[name][1:]),
                "times_as_fast_as_plain": statistics.median(ratios),
                "bytes_over_unique": (folder / file).stat().st_size / unique,
                "MB": unique / 1e6,
            }
            rows.append(row)
            print("{seconds:8.3f} s  {times_as_fast_as_plain:.2f}  {bytes_over_unique:.4f}  {case}".format(**row))
    return rows


def resident(key):
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(key))) * 1024


def one_load(name, folder):
    """Loads in this process, which does nothing else, and prints the peak's rise and the peak, in bytes."""
    file, call = LOADS.get(name, ("", lambda model, path: model_of(**BERT)))
    makes_a_model = name in (MADE, "tether.files.load_model", "Keras, load_model")
    small = model_of(**SMALL)
    if name != MADE:
        call(small, folder / "small" / file)
    model = None if makes_a_model else model_of(**BERT)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    call(model, folder / file)
    done(model)
    print("peak", resident("VmHWM") - before, resident("VmHWM"))


def memory(folder):
    model = model_of(**BERT)
    unique = bytes_of(model)
    written(model, folder)
    small = folder / "small"
    small.mkdir(exist_ok=True)
    written(model_of(**SMALL), small)
    del model
    rows = []
    for name in (MADE, *LOADS):
        command = [sys.executable, "-m", "benchmarks.files", "one_load", name, str(folder)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rise, peak = map(int, out.rpartition("peak ")[2].split())
        rows.append({"case": f"memory: {name}", "rise_over_unique": rise / unique, "process_MB": peak / 1e6})
        print("{rise_over_unique:8.3f}  {process_MB:.0f} MB  {case}".format(**rows[-1]), flush=True)
    return rows


PARTS = {"times": times, "memory": memory}


def main(parts):
    if parts[:1] == ["one_load"]:
        one_load(parts[1], pathlib.Path(parts[2]))
        return
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            write("files", PARTS[part](pathlib.Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])

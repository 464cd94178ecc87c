"""Kills processes that save over a file again and again, and looks at the file after each.

Run as `python -m tests.files.kills FOLDER COUNT`; prints a report as JSON. A process of its own, since it forks: what
it kills is a copy of itself, which costs milliseconds and not the seconds of a new start.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np

import tether
from tether.files.keras import archive

SIZE = 128


def model():
    shared = tether.Weight((SIZE, SIZE), "zeros", name="shared")
    x = keras.Input((SIZE,))
    first = tether.tie(keras.layers.Dense(SIZE, use_bias=False), kernel=shared)
    second = tether.tie(keras.layers.Dense(SIZE, use_bias=False), kernel=shared.T)
    layers = [keras.layers.Dense(SIZE, "relu", kernel_initializer="zeros", use_bias=False) for _ in range(2)]
    y = second(first(x))
    for layer in layers:
        y = layer(y)
    return keras.Model(x, y)


def fill(model, number):
    """Gives all weights one value, so that a mixture of two saves would show."""
    for variable in model.weights:
        variable.assign(np.full(variable.shape, number, "float32"))


def save_for_ever(models, path, counter):
    while True:
        for each in models:
            tether.files.save_model(each, path)
            os.write(counter, b".")


def numbers_in(path):
    """The values in the file, which is read in full."""
    found = archive.contents(path, whole=True)
    with archive.opened_values(path) as values:
        return {float(n) for place in found.values for n in np.unique(values[place][()])}, len(found.values)


def one_kill(models, path, within, rng):
    """Starts a process that saves, kills it within some seconds, and says how many saves it had finished."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's, that its threads do not come along: saving needs none
        pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            save_for_ever(models, path, write)
        os._exit(1)
    os.close(write)
    time.sleep(rng.uniform(0.0, within))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the process that saves ended by itself"
    with open(read, "rb") as pipe:
        return len(pipe.read())


def main(folder, count):
    path = Path(folder) / "model.keras"
    models = [model(), model()]
    for number, each in enumerate(models, start=1):
        fill(each, number)
    tether.files.save_model(models[0], path)
    start = time.perf_counter()
    tether.files.save_model(models[0], path)
    within = 2.5 * (time.perf_counter() - start)
    _, entries = numbers_in(path)
    rng, saves, versions = random.Random(5), 0, set()
    for kill in range(4 * count):
        if kill >= count:
            if saves:
                break
            within *= 1.5  # a copy on a busy machine is slower than the process that was timed
        models.reverse()
        saves += one_kill(models, path, within, rng)
        found, held = numbers_in(path)
        assert len(found) == 1 and held == entries, f"the file is a mixture: {found}, {held} entries"
        versions |= found
    again = keras.saving.load_model(path)
    assert len(again.weights) == len(models[0].weights)
    left = [entry for entry in os.listdir(folder) if entry != path.name]
    tether.files.save_model(models[0], path)
    kept = [entry for entry in os.listdir(folder) if entry != path.name]
    for entry in left:
        os.utime(Path(folder) / entry, (0, 0))
    tether.files.save_model(models[0], path)
    after = os.listdir(folder)
    print(json.dumps({"saves": saves, "versions": len(versions), "left": len(left), "kept": len(kept), "after": after}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""How what Tether does grows with a model.

`python -m benchmarks.growth [--sizes 100,400] [--kinds uses] [--roads check,save]`

Kinds of models, of n Dense layers each:
    uses        one weight in all of them, half of them transposed or scaled
    promoted    a weight of its own for each
    low_rank    a weight of its own and a low-rank part for each
    listed      one weight in all of them, and the layers in a list of one layer of somebody's own

For each road: seconds at each size; the exponent of the growth between the last two sizes (1 is linear); and where
there is such a road, the same for the same layers without Tether, and the ratio at the last size. Of a step of
training the Python is counted, in calls of functions: what the backend computes is in a comparison of whole steps,
with 400 uses of one weight beside the same layers untied, in turn in one process.
Asked for: exponents of at most 1.15; a step of at most 1.1 times that of the untied layers.

The results are written if they were measured at all sizes.
"""

import argparse
import copy
import gc
import math
import pathlib
import sys
import tempfile
import time

import keras
import numpy as np

import tether
from benchmarks._measure import compare, seconds, write

WIDTH, CHAIN, RANK = 8, 50, 2
SIZES = (100, 400, 1600)
USES_OF_A_STEP = 400
PATIENCE = 0.5
"""What takes less than so many seconds is measured three times."""


# --------------------------------------------------------------------------- models


@keras.saving.register_keras_serializable(package="growth")
class Stack(keras.layers.Layer):
    """Layers in a list, one after another."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.inner = [keras.layers.Dense(WIDTH) for _ in range(size)]

    def build(self, shape):
        for layer in self.inner:
            layer.build(shape)

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "size": self.size}


class Parts:
    """The layers of a model, with the path of each kernel from the layer on which it is tied, and from the model."""

    def __init__(self, kind, size):
        self.inputs = keras.Input((WIDTH,))
        self.kernels = []
        if kind == "listed":
            self.top = [Stack(size, name="stack")]
            inner = [f"inner/{place}/kernel" for place in range(size)]
            self.kernels = [(self.top[0], path, f"stack/{path}") for path in inner]
        else:
            self.top = [keras.layers.Dense(WIDTH, name=f"dense_{place}") for place in range(size)]
            self.kernels = [(layer, "kernel", f"{layer.name}/kernel") for layer in self.top]

    def model(self):
        """Chains of some layers side by side: Keras walks graphs recursively, so one chain cannot be long."""
        ends = []
        for start in range(0, len(self.top), CHAIN):
            end = self.inputs
            for layer in self.top[start : start + CHAIN]:
                end = layer(end)
            ends.append(end)
        return keras.Model(self.inputs, keras.layers.Average()(ends) if len(ends) > 1 else ends[0])


def expressions(kind, size):
    shared = tether.Weight((WIDTH, WIDTH), "glorot_uniform", name="shared")
    for place in range(size):
        if kind == "promoted":
            yield tether.Weight(name=f"weight_{place}")
        elif kind == "low_rank":
            yield tether.Weight((WIDTH, WIDTH), "glorot_uniform", name=f"weight_{place}") + tether.low_rank(RANK)
        else:
            yield (shared, shared.T, shared, 0.5 * shared)[place % 4]


def tied_parts(kind, size):
    parts = Parts(kind, size)
    tie_one_by_one(parts, expressions(kind, size))
    return parts


def tie_one_by_one(parts, ties):
    for (layer, path, _), expression in zip(parts.kernels, ties, strict=True):
        tether.tie(layer, {path: expression})


def made(kind, size, tied):
    return tied_parts(kind, size).model() if tied else Parts(kind, size).model()


DATA = np.ones((2, WIDTH), "float32")


def compiled(model):
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    model.train_on_batch(DATA, DATA)
    return model


# --------------------------------------------------------------------------- roads
# Each takes what there is before, and gives what is measured: a function of no arguments.


def tie_before_build(kind, size, tied, _):
    """Making the layers, and tying each."""
    if not tied:
        return lambda: Parts(kind, size)
    return lambda: tied_parts(kind, size)


def build(kind, size, tied, _):
    parts = tied_parts(kind, size) if tied else Parts(kind, size)
    return parts.model


def tie_by_layer(kind, size, tied, _):
    parts, ties = Parts(kind, size), list(expressions(kind, size))
    parts.model()
    return (lambda: tie_one_by_one(parts, ties)) if tied else None


def tie_by_path(kind, size, tied, _):
    """By paths from the model: beside it is how Keras finds a layer by name."""
    parts, ties = Parts(kind, size), list(expressions(kind, size))
    model = parts.model()
    if not tied:
        return lambda: [model.get_layer(path.partition("/")[0]) for _, _, path in parts.kernels]
    return lambda: [tether.tie(model, {path: tie}) for (_, _, path), tie in zip(parts.kernels, ties, strict=True)]


def tie_at_once(kind, size, tied, _):
    parts, ties = Parts(kind, size), list(expressions(kind, size))
    model = parts.model()
    named = {path: tie for (_, _, path), tie in zip(parts.kernels, ties, strict=True)}
    return (lambda: tether.tie(model, named)) if tied else None


def untie(kind, size, tied, _):
    model = made(kind, size, tied)
    return (lambda: tether.untie(model)) if tied else None


def untie_by_path(kind, size, tied, _):
    parts = tied_parts(kind, size)
    model = parts.model()
    return (lambda: [tether.untie(model, path) for _, _, path in parts.kernels]) if tied else None


def step(kind, size, tied, _):
    model = compiled(made(kind, size, tied))
    return lambda: model.train_on_batch(DATA, DATA)


def of_model(road):
    """A road of a model that is built, which it does not change."""
    return lambda kind, size, tied, folder: road(made(kind, size, tied), folder)


def save(model, folder):
    return lambda: model.save(folder / "model.keras")


def load(model, folder):
    model.save(folder / "model.keras")
    return lambda: keras.saving.load_model(folder / "model.keras")


def load_by_tether(model, folder):
    model.save(folder / "model.keras")
    return lambda: tether.files.load_model(folder / "model.keras")


def load_weights(model, folder):
    model.save_weights(folder / "model.weights.h5")
    return lambda: model.load_weights(folder / "model.weights.h5")


def load_untied(model, folder):
    model.save(folder / "model.keras")
    return lambda: tether.files.load_untied(model, folder / "model.keras")


def load_safetensors(model, folder):
    tether.files.save_safetensors(model, folder / "model.safetensors")
    return lambda: tether.files.load_safetensors(model, folder / "model.safetensors")


def file_facts(model, folder):
    model.save(folder / "model.keras")
    return lambda: tether.inspection.facts(folder / "model.keras")


def check_trained(model, _):
    """With plain gradient descent, under which there is something to say of a weight with many uses."""
    compiled(model)
    return lambda: tether.check(model)


def freeze(model, _):
    def switch():
        model.trainable = False
        model.trainable = True

    return switch


def silent(*_):
    """Takes lines of text."""


CHANGING = {
    "make and tie": tie_before_build, "build": build, "tie by layer": tie_by_layer, "tie by path": tie_by_path,
    "tie at once": tie_at_once, "untie": untie, "untie by path": untie_by_path,
}  # fmt: skip
"""Roads that are prepared anew each time that they are measured."""
ROADS = {
    "save": save,
    "tether.files.save_model": lambda model, folder: lambda: tether.files.save_model(model, folder / "model.keras"),
    "load": load,
    "tether.files.load_model": load_by_tether,
    "save_weights": lambda model, folder: lambda: model.save_weights(folder / "model.weights.h5"),
    "load_weights": load_weights,
    "load_untied": load_untied,
    "save_safetensors": lambda model, folder: lambda: tether.files.save_safetensors(model, folder / "m.safetensors"),
    "load_safetensors": load_safetensors,
    "clone_model": lambda model, _: lambda: keras.models.clone_model(model),
    "deepcopy": lambda model, _: lambda: copy.deepcopy(model),
    "inherit": lambda model, _: lambda: tether.inherit(model),
    "materialize": lambda model, _: lambda: tether.materialize(model),
    "freeze": freeze,
    "facts": lambda model, _: lambda: tether.inspection.facts(model),
    "facts of a file": file_facts,
    "summary": lambda model, _: lambda: tether.summary(model, print_fn=silent),
    "check": lambda model, _: lambda: str(tether.check(model)),
    "check a trained model": check_trained,
    "plot": lambda model, folder: lambda: tether.plot(model, folder / "map.html"),
    "aliases": lambda model, _: lambda: tether.inspection.aliases(model),
}
KINDS = ("uses", "promoted", "low_rank", "listed")
STEP = "step"


# --------------------------------------------------------------------------- measuring


def seconds_of(road, kind, size, tied):
    """The least of some times: what disturbs only adds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        run = None
        while not found or (len(found) < 3 and found[0] < PATIENCE):
            if run is None or road in CHANGING:
                prepare = CHANGING[road] if road in CHANGING else of_model(ROADS[road])
                run = prepare(kind, size, tied, pathlib.Path(folder))
                if run is None:
                    return None
            gc.collect()
            found.append(seconds(run))
    return min(found)


def calls_of(run):
    """The functions that are called, Python's and those in C."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return float(count)


def row_of(case, sizes, ours, theirs):
    row = {"case": case, **{f"at_{size}": found for size, found in zip(sizes, ours, strict=True)}}
    if len(sizes) > 1:
        row["exponent"] = exponent(sizes, ours)
    if None not in theirs:
        row |= {f"plain_at_{size}": found for size, found in zip(sizes, theirs, strict=True)}
        if len(sizes) > 1:
            row["plain_exponent"] = exponent(sizes, theirs)
        row["ratio"] = ours[-1] / theirs[-1]
    return row


def exponent(sizes, found):
    return math.log(found[-1] / found[-2]) / math.log(sizes[-1] / sizes[-2])


def measured(kind, road, sizes):
    begun = time.perf_counter()
    if road == STEP:
        case = f"{kind}: calls of a step"
        ours, theirs = ([calls_of(step(kind, size, tied, None)) for size in sizes] for tied in (True, False))
    else:
        case = f"{kind}: {road}"
        seconds_of(road, kind, 4, True)  # what is imported or compiled once
        ours, theirs = ([seconds_of(road, kind, size, tied) for size in sizes] for tied in (True, False))
    row = row_of(case, sizes, ours, theirs)
    shown = "  ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "case")
    print(f"{case:36s} {shown}  ({time.perf_counter() - begun:.0f} s)", flush=True)
    return row


def compared_steps(size=USES_OF_A_STEP):
    models = [compiled(made("uses", size, tied)) for tied in (True, False)]
    ours, theirs = (lambda model=model: model.train_on_batch(DATA, DATA) for model in models)
    return {"case": f"step: {size} uses of one weight / the same layers untied", **compare(ours, theirs, budget=20.0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--roads", default=",".join([*CHANGING, *ROADS, STEP]))
    asked = parser.parse_args()
    sizes = tuple(int(size) for size in asked.sizes.split(","))
    roads = asked.roads.split(",")
    rows = []
    for kind in asked.kinds.split(","):
        rows += [measured(kind, road, sizes) for road in roads]
    if STEP in roads:
        rows.append(compared_steps())
        print("{case}: {ours_ms:.2f} ms / {theirs_ms:.2f} ms = {ratio:.3f}".format(**rows[-1]))
    if sizes == SIZES:
        write("growth", rows)


if __name__ == "__main__":
    main()

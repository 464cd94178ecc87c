"""One layer, many children, one batch: `KERAS_BACKEND=torch python -m benchmarks.route [case ...]`.

A Dense layer whose kernel is a base plus a low-rank part, of which each example (or token) of a batch has chosen
another. Beside it the base layer alone, and what one does without: a loop over the parts, each with its own examples.
Forward passes and training steps as each backend runs them, in turn, medians of ratios. Cases: forward, token, train,
thousand, slots, and on PyTorch peft (`pip install peft`): one token an example beside PEFT's `adapter_names`.
"""

import contextlib
import ctypes
import gc
import pathlib
import resource
import statistics
import sys
import tempfile
import time

import keras
import numpy as np

import tether
from benchmarks._measure import compare, write
from benchmarks._steps import forward, train
from tether.weights.leaves import Choice
from tether.weights.operators.choice import Routed

BACKEND = keras.backend.backend()
random = np.random.RandomState(0)


def routed_dense(width, rank, count):
    """A layer with so many low-rank parts, and the plain layer over the same base."""
    base = tether.Weight((width, width), "glorot_uniform", name="base")
    options = [base.stop_gradient() + tether.low_rank(rank) for _ in range(count)]
    for option in options:
        for weight in option.weights_used()[1:]:
            weight.assign(0.02 * random.randn(*weight.shape))
    layer = tether.route(keras.layers.Dense(width, use_bias=False), kernel=options)
    plain = tether.tie(keras.layers.Dense(width, use_bias=False), kernel=base.stop_gradient())
    return layer, plain


def model_of(layer, shape, ids_shape=None):
    """A model of one layer; with choices as its second input."""
    inputs = keras.Input(shape)
    if ids_shape is None:
        return keras.Model(inputs, layer(inputs))
    choice = keras.Input(ids_shape, dtype="int32")
    return keras.Model([inputs, choice], layer(inputs, choice=choice))


def measure_forward(name, width, rank, count, tokens, batch=64, each_token=False):
    """The forward pass of a batch in which each example or token has its own part, beside the base alone."""
    layer, plain = routed_dense(width, rank, count)
    x = random.randn(batch, tokens, width).astype("float32")
    ids = random.randint(0, count, (batch, tokens) if each_token else (batch,)).astype("int32")
    ours = forward(model_of(layer, (tokens, width), ids.shape[1:]), [x, ids])
    theirs = forward(model_of(plain, (tokens, width)), x)
    return {"case": name, "of": "base alone", **compare(ours, theirs)}


def forward_cases():
    return [
        measure_forward("16 parts of rank 8, an example each, width 512, 64 x 32 tokens", 512, 8, 16, 32),
        measure_forward("64 parts of rank 16, an example each, width 1024, 64 x 1 token", 1024, 16, 64, 1),
        measure_forward(
            "16 parts of rank 8, a token each, width 512, 64 x 128 tokens", 512, 8, 16, 128, each_token=True
        ),
    ]


def token_cases():
    """One token an example beside a loop over the parts, each with its examples."""
    layer, _ = routed_dense(1024, 16, 64)
    x = random.randn(64, 1, 1024).astype("float32")
    ids = np.arange(64, dtype="int32")
    by_one = [forward(model_of_choice(layer, place, (1, 1024)), x[place : place + 1]) for place in range(64)]
    ours = forward(model_of(layer, (1, 1024), ()), [x, ids])
    return [
        {
            "case": "64 parts, 64 x 1 token",
            "of": "loop over parts",
            **compare(ours, lambda: [call() for call in by_one]),
        }
    ]


def model_of_choice(layer, place, shape):
    """A model of one layer with one choice for good."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs, choice=place))


def train_cases():
    """A training step of a mixed batch beside one step for each part with its own examples, and the base alone."""
    found = []
    for count in (16, 64):
        layer, plain = routed_dense(512, 8, count)
        x = random.randn(64, 32, 512).astype("float32")
        ids = np.repeat(np.arange(count, dtype="int32"), 64 // count)
        ours = train(model_of(layer, (32, 512), ()), [x, ids], of_input=False)
        apart = [
            train(model_of_choice(layer, place, (32, 512)), x[ids == place], of_input=False) for place in range(count)
        ]
        loop = lambda apart=apart: [call() for call in apart]  # noqa: E731
        base = forward(model_of(plain, (32, 512)), x)
        case = f"training step, {count} parts, 64 x 32 tokens"
        found.append({"case": case, "of": "loop over parts", **compare(ours, loop)})
        found.append({"case": case, "of": "the base's product alone", **compare(ours, base)})
    return found


def thousand_cases():
    """A base of 12 layers with a thousand parts on two projections of each, beside the same with 16."""
    models, resident = {}, {}
    for count in (16, 1000):
        before = resident_bytes()
        inputs, choice = keras.Input((32, 768)), keras.Input((), dtype="int32")
        x = inputs
        for _ in range(12):
            attention = keras.layers.MultiHeadAttention(12, 64)
            attention.build((None, 32, 768), (None, 32, 768))
            ties = {}
            for path in ("query/kernel", "value/kernel"):
                weight = tether.weight_of(attention, path)
                stacks = [
                    tether.Weight((count, *shape), "zeros", name=name, trainable=False)
                    for name, shape in (("a", (768, 8)), ("b", (8, 12, 64)))
                ]
                number = Choice("choice", [str(n) for n in range(count)], none="none")
                a, b = (tether.ops.take(stack, number) for stack in stacks)
                part = (a @ b.reshape(8, 768)).reshape(768, 12, 64)
                ties[path] = Routed(number, weight, weight + part)
            tether.tie(attention, ties)
            x = keras.layers.LayerNormalization()(x + attention(x, x, choice=choice))
        models[count] = keras.Model([inputs, choice], x)
        for weight in models[count].weights:  # zeros take no memory until they are written
            if len(weight.shape) > 2 and weight.shape[0] == count:
                weight.assign(0.02 * random.standard_normal(weight.shape).astype("float32"))
        resident[count] = resident_bytes() - before
    x = random.randn(16, 32, 768).astype("float32")
    ids = {count: random.randint(0, count, 16).astype("int32") for count in models}
    many, few = (forward(models[count], [x, ids[count]]) for count in (1000, 16))
    size = lambda count: sum(int(np.prod(w.shape)) * 4 for w in models[count].weights)  # noqa: E731
    exact = size(1000) - size(16) == 984 * 24 * (768 * 8 + 8 * 768) * 4
    memory = {"exact": exact, "resident_mb": resident[1000] / 1e6, "stored_mb": size(1000) / 1e6}
    return [{"case": "1000 parts on 24 projections, 16 x 32 tokens", "of": "16 parts", **memory, **compare(many, few)}]


def resident_bytes():
    """The memory of this process, after what nobody needs is given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def with_slots(slots, train=None, layers=1, width=512, rank=8):
    """A model of Dense layers with slots for adapters, and the one that takes a column of numbers."""
    inputs = keras.Input((32, width))
    x = inputs
    for place in range(layers):
        x = keras.layers.Dense(width, use_bias=False, name=f"dense_{place}")(x)
    model = keras.Model(inputs, x)
    tether.adapters.capacity(model, {"*/kernel": tether.low_rank(rank)}, slots=slots, train=train)
    return model, tether.routed(model)


def slots_cases():
    """A step of 16 slots of a thousand beside a set of 16; and how long an adapter takes to come into a running set."""
    x = random.randn(64, 32, 512).astype("float32")
    ids = random.randint(0, 16, 64).astype("int32")
    few, many = (train(with_slots(*each)[1], [x, ids], of_input=False) for each in ((16, None), (1000, 16)))
    found = [{"case": "training step, 16 of 1000 slots, 64 x 32 tokens", "of": "16 slots", **compare(many, few)}]
    return found + [come_and_go(layers) for layers in (1, 24)]


def come_and_go(layers, slots=64, rounds=30):
    """Milliseconds to load an adapter's file into a free slot of a compiled model, and to start a new one."""
    model, tasks = with_slots(slots, layers=layers)
    tasks.compile("adam", "mse")
    x = random.randn(4, 32, 512).astype("float32")
    tasks.fit([x, np.zeros(4, "int32")], x, verbose=0)
    seconds = {"add": [], "load": [], "remove": []}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "one.safetensors"
        tether.adapters.add(model, "one")
        tether.adapters.save(model, "one", file)
        acts = {
            "add": lambda: tether.adapters.add(model, "new"),
            "load": lambda: tether.adapters.load(model, file, name="new"),
            "remove": lambda: tether.adapters.remove(model, "new"),
        }
        for _ in range(rounds):
            for name in ("add", "remove", "load", "remove"):
                started = time.perf_counter()
                acts[name]()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: round(1000 * statistics.median(found), 2) for name, found in seconds.items()}
    return {"case": f"an adapter of {layers} weights comes into one of {slots} slots", "of": "ms", **medians}


def peft_cases():
    """One token an example: 64 parts of rank 16 of a Dense layer beside PEFT's loop over the names of a batch."""
    import torch
    from peft import LoraConfig, get_peft_model

    layer, _ = routed_dense(1024, 16, 64)
    x = random.randn(64, 1, 1024).astype("float32")
    ids = np.arange(64, dtype="int32")
    names = [f"a{place}" for place in range(64)]
    theirs = torch.nn.Sequential()
    theirs.add_module("linear", torch.nn.Linear(1024, 1024, bias=False))
    config = LoraConfig(r=16, target_modules=["linear"], init_lora_weights=False)
    theirs = get_peft_model(theirs, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    theirs.eval()
    given = torch.as_tensor(x)

    def looped():
        with torch.no_grad():
            return theirs(given, adapter_names=names)

    ours = forward(model_of(layer, (1, 1024), ()), [x, ids])
    return [{"case": "64 parts of rank 16, 64 x 1 token", "of": "PEFT adapter_names", **compare(ours, looped)}]


CASES = {
    "forward": forward_cases,
    "token": token_cases,
    "train": train_cases,
    "thousand": thousand_cases,
    "slots": slots_cases,
    "peft": peft_cases,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or [case for case in CASES if case != "peft"]:
        write("route", CASES[chosen]())

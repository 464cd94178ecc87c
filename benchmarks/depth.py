"""A block used many times: `KERAS_BACKEND=jax python -m benchmarks.depth [case ...]`.

A transformer block of Keras layers with dropout (width 64, 2 heads, 4 × 32 tokens) under `tether.Repeat`: the first
step of training, which compiles, and the later ones. Beside it the turns written out one by one, which is what a loop
over one Keras layer does, and, with what each turn has of its own, the plain block. A first step is measured once, in a
process that has compiled something else before; later ones are compared in turn, medians. Cases: first, written, later,
deep, regional, vary, remat, bank.
"""

import statistics
import sys
import time

import keras
import numpy as np

import tether
from benchmarks._measure import compare, write

BACKEND = keras.backend.backend()
WIDTH, HEADS, BATCH, LENGTH = 64, 2, 4, 32
rows = np.random.RandomState(0).randn(BATCH, LENGTH, WIDTH).astype("float32")


class Block(keras.layers.Layer):
    """A transformer block."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=0.1, name="attention")
        self.up = keras.layers.Dense(4 * WIDTH, activation="gelu", name="up")
        self.down = keras.layers.Dense(WIDTH, name="down")
        self.drops = [keras.layers.Dropout(0.1) for _ in range(2)]

    def build(self, shape):
        for norm in self.norms:
            norm.build(shape)
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 4 * WIDTH))

    def call(self, x, training=None):
        h = self.norms[0](x)
        x = x + self.drops[0](self.attention(h, h, training=training), training=training)
        return x + self.drops[1](self.down(self.up(self.norms[1](x))), training=training)


def model_of(times, jit="auto", loop=False, **kwargs):
    """A compiled model of the block repeated; `loop`: by a Python loop over one Keras layer."""
    keras.utils.set_random_seed(0)
    x = keras.Input(batch_shape=(BATCH, LENGTH, WIDTH))
    if loop:
        block, y = Block(), x
        for _ in range(times):
            y = block(y)
    else:
        y = tether.Repeat(Block(), times, **kwargs)(x)
    model = keras.Model(x, y)
    model.compile(keras.optimizers.SGD(1e-4), "mse", jit_compile=jit)
    return model


def step_of(model):
    """One step of training, to its end."""
    return lambda: float(np.asarray(model.train_on_batch(rows, rows)))


def first_step(model):
    step = step_of(model)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ways():
    """How a step is compiled here: by name, what `compile` is told."""
    return {"": "auto"} if BACKEND != "tensorflow" else {" with XLA": True, " without XLA": False}


def first():
    for name, jit in ways().items():
        first_step(model_of(2, jit))  # what a process does once
        found = {times: first_step(model_of(times, jit, unroll=False)) for times in (6, 24, 96)}
        for times, seconds in found.items():
            yield {"case": f"first step, {times} turns, loop{name}", "seconds": seconds, "ratio": seconds / found[6]}


def written():
    """The first steps of turns that are written out: minutes."""
    for name, jit in ways().items():
        first_step(model_of(2, jit))
        for times in (6, 24) if BACKEND == "jax" else (6,):
            for how, kwargs in {"written out": {"unroll": True}, "Keras's loop": {"loop": True}}.items():
                yield {
                    "case": f"first step, {times} turns, {how}{name}",
                    "seconds": first_step(model_of(times, jit, **kwargs)),
                }


def later(turns=12):
    for name, jit in ways().items():
        looped, written = model_of(turns, jit, unroll=False), model_of(turns, jit, loop=True)
        yield {"case": f"later steps, {turns} turns, loop / Keras's loop{name}",
               **compare(step_of(looped), step_of(written), rounds=15, budget=12)}  # fmt: skip


def deep():
    """As `later`, for 24 turns: minutes for what is written out."""
    yield from later(24)


def regional():
    """PyTorch: one turn compiled once for all, beside turns that run eagerly; how many graphs, how often again."""
    if BACKEND != "torch":
        return
    import torch._dynamo

    for turns in (6, 24):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled, eager = model_of(turns, False, compile_turn=True), model_of(turns, False)
        seconds = first_step(compiled)
        found = compare(step_of(compiled), step_of(eager), rounds=15, budget=20)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {"case": f"later steps, {turns} turns, a compiled turn / eager", "first step": seconds, "graphs": graphs,
               **found}  # fmt: skip


def vary():
    for name, jit in ways().items():
        parts = {"up/kernel": tether.low_rank(8), "down/kernel": tether.low_rank(8)}
        ours, plain = model_of(24, jit, vary=parts), model_of(24, jit)
        yield {"case": f"later steps, 24 turns, low_rank(8) for each / plain{name}",
               **compare(step_of(ours), step_of(plain), rounds=15, budget=12)}  # fmt: skip


def remat():
    if BACKEND != "jax":
        return
    import jax

    def bytes_of(times, again):
        body = tether.Repeat(Block(), times, remat=again, unroll=False)
        body.build((BATCH, LENGTH, WIDTH))
        trained = [v.value for v in body.trainable_variables]
        still = [v.value for v in body.non_trainable_variables]

        def loss(trained, still, x):
            y, _ = body.stateless_call(trained, still, x, training=True)
            return keras.ops.mean(y * y)

        found = jax.jit(jax.grad(loss)).lower(trained, still, rows).compile().memory_analysis()
        return found.temp_size_in_bytes

    one = rows.nbytes
    for again in (True, False):
        growth = (bytes_of(48, again) - bytes_of(12, again)) / 36
        yield {"case": f"memory that one turn more takes, remat={again}", "bytes": growth, "activations": growth / one}


def bank():
    def model(options):
        keras.utils.set_random_seed(0)
        base = tether.Weight((256, 256), "glorot_uniform", name="base", trainable=False)
        number = tether.weights.Argument("choice", (), "int32", default=0)
        kernel = tether.bank([base + tether.low_rank(4) for _ in range(options)], number)
        x = keras.Input((256,))
        made = keras.Model(x, tether.tie(keras.layers.Dense(256), kernel=kernel)(x))
        made.compile("sgd", "mse")
        return made

    data = np.ones((8, 256), "float32")

    def first_of(options):
        made = model(options)
        start = time.perf_counter()
        float(np.asarray(made.train_on_batch(data, data)))
        return time.perf_counter() - start

    first_of(2)
    found = {options: statistics.median(first_of(options) for _ in range(3)) for options in (4, 400)}
    for options, seconds in found.items():
        yield {"case": f"first step, a bank of {options}", "seconds": seconds, "ratio": seconds / found[4]}


if __name__ == "__main__":
    for case in sys.argv[1:] or ("first", "written", "later", "deep", "regional", "vary", "remat", "bank"):
        write("depth", list(globals()[case]()))

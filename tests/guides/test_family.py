"""The guide of a family, with three children and two ranks: what its table and its files say is so."""

import io

import keras
import numpy as np
import pytest
from rich.console import Console

import tether
from guides import family
from tests.support import numpy

BASE, HEAD, LOW, CUT, OWN = "the parent as it is", "frozen, own head", "low_rank", "own weights cut", "own weights"
WHOLE = 3 * 3 * 1 * 16 + 16 + 3 * 3 * 16 * 32 + 32 + 1152 * 64 + 64 + 64 * 10 + 10
KERNELS = {"conv_1/kernel": (9, 16), "conv_2/kernel": (144, 32), "hidden/kernel": (1152, 64)}
BIASES_AND_HEAD = 16 + 32 + 64 + 64 * 10 + 10


def own_numbers(rank):
    return rank * sum(rows + columns for rows, columns in KERNELS.values()) + BIASES_AND_HEAD


def printed():
    return Console(width=120, file=io.StringIO())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    console = printed()
    result = family.main(quick=True, output=tmp_path_factory.mktemp("family"), console=console)
    return result, {(row.kind, row.rank): row for row in result.rows}, console.file.getvalue()


def test_a_child_stores_what_is_its_own_and_the_parent_is_stored_once(quick):
    _, rows, _ = quick
    children = family.QUICK.tasks
    expected = {(BASE, None): 0, (HEAD, None): 64 * 10 + 10, (OWN, None): WHOLE}
    expected |= {(kind, rank): own_numbers(rank) for kind in (LOW, CUT) for rank in family.QUICK.ranks}
    assert set(rows) == set(expected)
    for key, own in expected.items():
        assert rows[key].own == rows[key].trainable == own
        assert rows[key].child_bytes == 4 * own
        assert rows[key].weight_bytes == 4 * (WHOLE + children * own)
        assert rows[key].weight_bytes < rows[key].file_bytes < rows[key].weight_bytes + 60_000 * (1 + children)


def test_a_low_rank_child_is_better_than_its_parent_and_than_a_head(quick):
    result, rows, _ = quick
    assert result.parent_accuracy > 0.8
    untouched, head = rows[BASE, None].mean, rows[HEAD, None].mean
    low = rows[LOW, max(family.QUICK.ranks)]
    assert low.mean > untouched + 0.2
    assert low.mean > head
    assert low.mean > 0.5
    assert min(low.accuracies.values()) > 0.4
    assert low.own < 0.1 * rows[OWN, None].own
    assert rows[OWN, None].mean > 0.6


def test_a_copy_that_was_cut_is_nearer_to_the_copy_the_higher_the_rank(quick):
    _, rows, _ = quick
    small, large = (rows[CUT, rank].mean for rank in sorted(family.QUICK.ranks))
    assert rows[BASE, None].mean < small < large < rows[OWN, None].mean + 0.02


def test_one_file_holds_the_family_and_another_one_of_its_children(quick):
    result, rows, _ = quick
    files, row = result.files, rows[LOW, family.QUICK.family_rank]
    assert files.weight_bytes == row.weight_bytes
    assert files.apart == 4 * (WHOLE + family.QUICK.tasks * (WHOLE + own_numbers(4) - BIASES_AND_HEAD))
    assert files.child_bytes == 4 * (WHOLE + own_numbers(4) - BIASES_AND_HEAD)
    assert files.largest_difference < 1e-4
    assert files.child_difference < 1e-4


def test_the_family_that_was_read_is_still_one(quick, rng):
    result, _, _ = quick
    read = keras.saving.load_model(result.files.family)
    children = [read.get_layer(task.name) for task in family.TASKS[: family.QUICK.tasks]]
    parent = read.get_layer("parent")
    images = rng.random((4, 28, 28, 1)).astype("float32")
    before = [numpy(one(images)) for one in [parent, *children]]
    assert not parent.trainable_weights
    kernel = tether.weight_of(parent, "hidden/kernel")
    kernel.assign(kernel.value * 0.5)
    for one, earlier in zip([parent, *children], before, strict=True):
        assert np.abs(numpy(one(images)) - earlier).max() > 1e-2
    part = next(w for w in children[0].trainable_weights if "lora_b" in w.name)
    others = [numpy(one(images)) for one in [parent, *children[1:]]]
    part.assign(part.value + 1.0)
    for one, earlier in zip([parent, *children[1:]], others, strict=True):
        np.testing.assert_array_equal(numpy(one(images)), earlier)
    alone = keras.saving.load_model(result.files.child)
    np.testing.assert_allclose(numpy(alone(images)), before[1], atol=1e-4)


def test_children_that_learn_in_one_run_learn_what_each_would_alone():
    size = family.Size(tasks=2, child_digits=100)
    digits, tasks = family.Digits(*family.read_digits()), family.TASKS[:2]
    parent = family.network("parent")
    parent.trainable = False

    def trained(names):
        chosen = [task for task in tasks if task.name in names]
        children = [family.with_low_rank(parent, task.name, 2) for task in chosen]
        for child in children:
            child.get_layer("head").set_weights(parent.get_layer("head").get_weights())
        keras.utils.set_random_seed(3)  # the same order of digits
        family.train(children, [digits.child(task, size) for task in chosen], 3, 0.005)
        return {child.name: child for child in children}

    together = trained([task.name for task in tasks])
    alone = trained([tasks[0].name])
    images, _ = digits.test(tasks[0])
    one, other = together[tasks[0].name], alone[tasks[0].name]
    np.testing.assert_allclose(numpy(one(images[:50])), numpy(other(images[:50])), atol=1e-2)
    assert np.abs(numpy(one(images[:50])) - numpy(parent(images[:50]))).max() > 0.1


def test_a_cut_of_full_rank_is_the_copy(rng):
    parent = family.network("parent")
    parent.trainable = False
    copy = family.with_own_weights(parent, "copy")
    copy.set_weights([w + rng.normal(size=w.shape, scale=0.1).astype("float32") for w in copy.get_weights()])
    images = rng.random((4, 28, 28, 1)).astype("float32")
    whole = family.cut_to_rank(parent, copy, "whole", 64)
    np.testing.assert_allclose(numpy(whole(images)), numpy(copy(images)), atol=1e-3)
    cut = family.cut_to_rank(parent, copy, "cut", 2)
    difference, left = (
        numpy(tether.weight_of(one, "hidden/kernel").value) - numpy(parent.get_layer("hidden").kernel)
        for one in (copy, cut)
    )
    u, s, v = np.linalg.svd(difference, full_matrices=False)
    np.testing.assert_allclose(left, (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)


def test_the_tasks_are_sixteen_and_no_digit_is_both_learned_and_tested():
    digits = family.Digits(*family.read_digits())
    size = family.Size()
    assert len({task.name for task in family.TASKS}) == 16
    for task in family.TASKS:
        images, labels = digits.child(task, size)
        assert images.shape == (400, 28, 28, 1) and images.dtype == np.float32
        assert labels.shape == (400,) and labels.min() >= 0 and labels.max() < 10
        tested, answers = digits.test(task)
        assert len(tested) == len(answers) >= 400
        assert images.min() > -1e-6 and images.max() < 1 + 1e-6
        first, _ = task(digits.images[:1], np.zeros(1, "int32"))
        if task.name != "speckled":  # each image is changed by itself
            np.testing.assert_allclose(task(digits.images[:9], np.zeros(9, "int32"))[0][:1], first, atol=1e-6)
    parts = (digits.parent(size)[0], digits.images[3000:4000, ..., None], digits.images[4000:, ..., None])
    first, second, third = ({image.tobytes() for image in images} for images in parts)
    assert not (first & second or first & third or second & third)


def test_the_table_and_the_picture_show_what_was_measured(quick):
    result, rows, text = quick
    for row in rows.values():
        (line, *_) = (line for line in text.splitlines() if line.strip().startswith(row.name + "  "))
        for shown in (f"{row.own:,}", f"{row.weight_bytes / 1000:,.0f}", f"{row.mean:.3f}"):
            assert shown in line
    assert result.plot is not None and "</svg>" in result.plot.read_text()
    assert not list(result.plot.parent.glob("measured*"))


@pytest.mark.slow(on="torch")
def test_the_full_run(tmp_path):
    result = family.main(output=tmp_path, console=printed())
    rows = {(row.kind, row.rank): row for row in result.rows}
    low = [rows[LOW, rank].mean for rank in family.Size().ranks]
    assert len(rows) == 13
    # On one seed the ranks differ by less than their start does: on PyTorch rank 1 was ahead of rank 16.
    assert rows[BASE, None].mean + 0.2 < min(low)
    assert rows[HEAD, None].mean < max(low)
    assert rows[OWN, None].mean > min(low)
    assert rows[LOW, 16].weight_bytes < 0.5 * rows[OWN, None].weight_bytes
    assert result.files.largest_difference < 1e-3

"""The guide of a fine-tune, on few digits: what its table says is so."""

import io

import numpy as np
import pytest
from rich.console import Console

import tether
from guides import fine_tune
from tests.support import numpy

FULL, HEAD, LOW, GATE = fine_tune.WAYS
NUMBERS = {  # of a network with ten outputs
    "kernels": 3 * 3 * 1 * 16 + 3 * 3 * 16 * 32 + 1152 * 64,
    "biases": 16 + 32 + 64,
    "head": 64 * 10 + 10,
}
PARTS = 4 * (9 + 16) + 4 * (144 + 32) + 4 * (1152 + 64)
"""Of rank 4: rows and columns of each kernel."""


def printed():
    return Console(width=110, file=io.StringIO())


@pytest.fixture(scope="module")
def quick():
    console = printed()
    result = fine_tune.main(quick=True, console=console)
    return result, {row.name: row for row in result.rows}, console.file.getvalue()


def test_each_child_trains_what_it_says(quick):
    _, rows, _ = quick
    whole = sum(NUMBERS.values())
    assert rows[FULL].trained == whole
    assert rows[HEAD].trained == NUMBERS["head"]
    assert rows[LOW].trained == PARTS + NUMBERS["biases"] + NUMBERS["head"]
    assert rows[GATE].trained == whole + 3
    assert rows[LOW].trained < 0.1 * rows[FULL].trained
    assert all(row.trained == row.own for row in rows.values())


def test_the_files_hold_each_weight_once_and_say_the_same(quick):
    _, rows, _ = quick
    whole = 4 * sum(NUMBERS.values())
    for row in rows.values():
        assert row.stored.beside[1] == 4 * row.own
        assert row.stored.difference < 1e-4
    assert rows[FULL].stored.alone[1] == rows[HEAD].stored.alone[1] == whole
    assert rows[LOW].stored.alone[1] == whole + 4 * PARTS
    assert rows[GATE].stored.alone[1] == whole + 4 * (NUMBERS["kernels"] + 3)
    assert rows[LOW].stored.beside[0] < 0.3 * rows[FULL].stored.beside[0]
    assert rows[HEAD].stored.beside[0] < rows[LOW].stored.beside[0]


def test_the_children_learn_the_tenth_digit_and_the_parent_stays_as_it_was(quick):
    result, rows, _ = quick
    accuracy, known, tenth = result.parent
    assert known > 0.8 and tenth == 0
    assert result.parent_moved == 0
    for row in rows.values():
        assert row.before < accuracy + 0.1  # it starts at the parent, with one column that knows nothing
        assert row.before > 0.5
        assert row.accuracy > accuracy + 0.02
        assert row.accuracy > 0.8
        assert row.known > known - 0.1
        assert row.tenth > 0.3
    assert rows[LOW].tenth > rows[HEAD].tenth


def test_the_table_shows_what_was_measured(quick):
    result, rows, text = quick
    assert f"{result.parent[1]:.3f}" in text
    for row in rows.values():
        (line,) = (line for line in text.splitlines() if line.strip().startswith(row.name))
        for shown in (
            f"{row.trained:,}",
            f"{row.accuracy:.3f}",
            f"{row.tenth:.3f}",
            f"{row.stored.alone[0] / 1000:,.1f}",
        ):
            assert shown in line


def test_no_digit_is_both_learned_and_tested():
    digits = fine_tune.split_digits(fine_tune.Size())
    sets = [{image.tobytes() for image in images} for images, _ in (digits.parent, digits.child, digits.test)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert set(digits.parent[1]) == set(range(9))
    assert set(digits.child[1]) == set(digits.test[1]) == set(range(10))
    assert len(digits.test[1]) == 1000


@pytest.mark.parametrize("way", list(fine_tune.WAYS))
def test_a_child_starts_at_its_parent(way, rng):
    parent = fine_tune.network("parent", digits=9)
    parent.trainable = False
    child = fine_tune.WAYS[way][0](parent)
    images = rng.random((4, 28, 28, 1)).astype("float32")
    np.testing.assert_allclose(numpy(child(images))[:, :9], numpy(parent(images)), atol=1e-5)
    shared = {id(w) for w in parent.weights} & {id(w) for w in child.weights}
    assert len(shared) == {FULL: 0, HEAD: 6, LOW: 3, GATE: 3}[way]
    kernel = tether.weight_of(parent, "hidden/kernel")
    kernel.assign(kernel.value * 0)
    moved = np.abs(numpy(child(images))[:, :9] - numpy(parent(images))).max() > 1e-3
    assert moved == (way in (FULL, GATE))


@pytest.mark.slow
def test_the_full_run():
    result = fine_tune.main(console=printed())
    rows = {row.name: row for row in result.rows}
    assert all(row.accuracy > 0.88 and row.stored.difference < 1e-4 for row in rows.values())
    assert all(row.tenth > 0.7 for name, row in rows.items() if name != HEAD)
    assert rows[HEAD].tenth > 0.5  # a new head alone learns the new digit least: 0.68 on TensorFlow
    assert rows[LOW].tenth > rows[HEAD].tenth

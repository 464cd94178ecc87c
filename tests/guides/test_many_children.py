"""The guide of many children in one batch, with three tasks: what its tables and its words say is so."""

import io

import numpy as np
import pytest
from rich.console import Console

import tether
from guides import many_children
from tests.support import numpy

ALONE, MIXED = "children trained alone", "children in mixed batches"
BIASES_AND_HEAD = 16 + 32 + 64 + 64 * 10 + 10
OF_KERNELS = 9 + 16 + 144 + 32 + 1152 + 64
"""The numbers of rank-1 parts of the three kernels."""


def printed():
    return Console(width=120, file=io.StringIO())


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    console, folder = printed(), tmp_path_factory.mktemp("many")
    return many_children.main(quick=True, output=folder, console=console), folder, console.file.getvalue()


def test_children_learn_in_mixed_batches_what_they_learn_alone(quick):
    result, _, _ = quick
    means = {way: np.mean(found) for way, found in result.rows.items()}
    assert result.parent_accuracy > 0.8
    assert abs(means[MIXED] - means[ALONE]) < 0.05
    assert means[MIXED] > means["one network for all tasks"] + 0.03
    assert means["one network for all tasks"] > means["the parent as it is"] + 0.2


def test_the_file_has_the_children_alone_and_a_fresh_parent_takes_them(quick):
    result, folder, _ = quick
    size, files = result.size, result.files
    own = size.rank * OF_KERNELS + BIASES_AND_HEAD
    strengths = 3 + 5
    assert files.child == 4 * (own + strengths)
    assert files.adapters == (folder / "children.safetensors").stat().st_size
    assert 4 * size.tasks * own < files.adapters < 4 * size.tasks * own + 40_000
    assert files.largest_difference < 1e-4
    facts = tether.adapters.file.file_facts(folder / "children.safetensors")
    assert [each.name for each in facts.adapters] == [task.name for task in many_children.TASKS[: size.tasks]]


def test_a_mixed_batch_says_what_one_task_after_another_does(quick):
    result, _, _ = quick
    assert result.times.largest_difference < 1e-3
    assert result.times.images == result.size.tasks * result.size.timed_images
    assert result.times.at_once > 0


def test_a_batch_of_all_tasks_has_as_much_of_each(rng):
    data = [(rng.random((6, 2, 2, 1)), np.full(6, place)) for place in range(3)]
    images, ids, labels = many_children.mixed(data)
    assert sorted(ids) == [0] * 6 + [1] * 6 + [2] * 6 and (ids == labels).all()
    for image, place in zip(images, ids, strict=True):
        assert (image == data[place][0]).all(axis=(1, 2, 3)).any()


def test_what_is_printed_is_what_was_measured(quick):
    result, _, text = quick
    for way, found in result.rows.items():
        (line, *_) = (line for line in text.splitlines() if line.strip().startswith(way + "  "))
        assert f"{np.mean(found):.3f}" in line
    assert f"{1000 * result.times.at_once:.1f} ms at once" in text


def test_slots_of_the_guide_start_at_the_parent(rng):
    parent = many_children.network("parent")
    _, tasks = many_children.with_slots(parent, many_children.QUICK, 2)
    images = rng.random((4, 28, 28, 1)).astype("float32")
    np.testing.assert_allclose(numpy(tasks([images, np.array([0, 1, -1, 0])])), numpy(parent(images)), atol=1e-5)


@pytest.mark.slow(on="jax")
def test_the_full_run_of_one_seed(tmp_path):
    result = many_children.main(seeds=1, output=tmp_path, console=printed())
    means = {way: np.mean(found) for way, found in result.rows.items()}
    assert means[MIXED] > means[ALONE] - 0.02  # what is trained alone has few batches, and may fail to learn
    assert np.min(np.subtract(result.rows[MIXED], result.rows[ALONE])) > -0.05
    assert means[MIXED] > means["one network for all tasks"]

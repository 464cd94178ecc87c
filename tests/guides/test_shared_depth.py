"""The guide of depth that is shared, on a tiny model: what its table says is so."""

import io
import math

import keras
import numpy as np
import pytest
from rich.console import Console

from guides import shared_depth
from tests.support import numpy

SIZE = shared_depth.QUICK


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "tiny.txt"
    file.write_text("to be or not to be, that is the question. " * 200, encoding="utf-8")
    console = Console(width=110, file=io.StringIO())
    rows = shared_depth.main(quick=True, seeds=1, steps=40, text=file, output=file.parent, console=console)
    return {row.name: row for row in rows}, console.file.getvalue(), file.parent


def test_what_each_way_stores(quick):
    rows, _, _ = quick
    width = SIZE.width
    shared = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width  # kernels and biases of a block
    assert {name: row.letters for name, row in rows.items()} == {
        "own": "ABCD", "all": "AAAA", "sequence": "AABB", "cycle": "ABAB", "cycle_reverse": "ABBA",
        "cycle + low_rank": "ABAB", "2 blocks, not repeated": "AB", "1 block, not repeated": "A",
    }  # fmt: skip
    whole = rows["own"].parameters
    assert rows["all"].parameters == whole - 3 * shared
    assert rows["sequence"].parameters == rows["cycle"].parameters == whole - 2 * shared
    assert rows["cycle"].parameters < rows["cycle + low_rank"].parameters < whole
    assert rows["2 blocks, not repeated"].parameters == whole - 2 * (shared + 4 * width)


def test_every_way_learns(quick):
    rows, _, _ = quick
    guess = math.log2(17)  # letters that are about as likely
    assert all(loss < guess for row in rows.values() for loss in row.losses)


def test_the_noise_is_said():
    names = ("own", "cycle", "2 blocks, not repeated")
    rows = [shared_depth.Row(name, "AB", 10 + place, (2.0, 2.2), 1.0) for place, name in enumerate(names)]
    assert rows[0].spread == pytest.approx(0.1414, abs=1e-4)
    assert "below about 0.283" in shared_depth.in_words(rows)
    alone = [shared_depth.Row(row.name, "AB", row.parameters, (2.0,), 1.0) for row in rows]
    assert math.isnan(alone[0].spread) and "nobody knows" in shared_depth.in_words(alone)


def test_the_table_and_the_picture_show_it(quick):
    rows, text, folder = quick
    for row in rows.values():
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{row.name}  "))
        assert row.letters in line
        assert f"{row.parameters:,}" in line and f"{row.mean:.3f}" in line
    assert "nobody knows how large the noise is" in text.replace("\n", " ")
    if "No picture" not in text:
        assert (folder / "shared_depth.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_the_text_is_there_without_anything_installed(monkeypatch):
    monkeypatch.setattr(shared_depth.shutil, "which", lambda name: None)
    text = shared_depth.as_numbers(*shared_depth.read_text())
    assert text.name == "pydoc_data.topics" and len(text.train) > 400_000
    assert len(text.test) == pytest.approx(len(text.train) / 9, rel=1e-3)
    assert text.train.max() == len(text.letters)


def test_the_verses_are_read_without_their_numbers(monkeypatch):
    class Printed:
        stdout = "Ge1:1 In the beginning\nGe1:2 And the earth\n"

    monkeypatch.setattr(shared_depth.shutil, "which", lambda name: "/usr/bin/bible")
    monkeypatch.setattr(shared_depth.subprocess, "run", lambda *_, **__: Printed)
    assert shared_depth.read_text() == ("In the beginning\nAnd the earth", "bible-kjv")


def test_a_model_is_read_again_from_its_file(tmp_path, rng):
    model, _ = shared_depth.make("cycle + low_rank", 9, SIZE)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    x = rng.integers(0, 9, (2, SIZE.context))
    np.testing.assert_allclose(numpy(again(x)), numpy(model(x)), atol=1e-5)
    assert again.count_params() == model.count_params()


def test_nothing_is_seen_before_it_is_said():
    model, _ = shared_depth.make("all", 9, SIZE)
    x = np.ones((1, SIZE.context), "int32")
    later = x.copy()
    later[0, -1] = 5
    np.testing.assert_allclose(numpy(model(x))[0, :-1], numpy(model(later))[0, :-1], atol=1e-5)

"""The demo at a tiny size: its facts, and that it says so when a tie is lost."""

import io

import keras
import numpy as np
import pytest
from rich.console import Console

import tether
from tether import demo

pytestmark = pytest.mark.spread

TINY = demo.Setting(digits=60, epochs=2)


@pytest.fixture
def data(rng):
    images = rng.random((100, demo.PIXELS)).astype("float32")
    return demo.split(images, held_out=40)


def text_of(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_digits_are_real_and_shuffled():
    digits = demo.read_digits()
    assert digits.shape == (5000, 784)
    assert digits.dtype == np.float32
    assert digits.min() == 0.0
    assert digits.max() == 1.0
    train, held_out = demo.split(digits)
    assert len(train) == 4000
    assert len(held_out) == 1000
    # Sorted by label, the last thousand would be nines and eights only: a far narrower set of images.
    assert np.abs(held_out.mean(axis=0) - train.mean(axis=0)).max() < 0.1


def test_the_table_has_what_was_measured(data, tmp_path):
    ticks = []
    results = [demo.run(kind, TINY, data, tmp_path, tick=lambda: ticks.append(1)) for kind in demo.KINDS]
    tied, transpose, glorot = results
    assert [result.parameters for result in results] == [51_024, 101_200, 101_200]
    assert tied.still_tied == {"train": True, "load": True, "clone": True, "resume": True}
    assert transpose.still_tied == glorot.still_tied == {}
    # With Adam's two averages, each stored number is in the file three times.
    assert 3 * 4 * 51_024 < tied.file_bytes < 1.02 * 3 * 4 * 51_024 + 50_000
    assert transpose.file_bytes > 3 * 4 * 101_200
    assert len(ticks) == 3 * TINY.epochs
    assert all(result.error > 0 and result.seconds > 0 for result in results)
    text = text_of(demo.table_of(results, "title"))
    assert "51,024" in text
    assert "101,200" in text
    assert text.count("yes") == 4
    assert "NO" not in text


def test_the_three_start_alike():
    inputs = np.random.default_rng(0).random((5, demo.PIXELS)).astype("float32")
    tied, transpose, glorot = (demo.autoencoder(kind, seed=3) for kind in demo.KINDS)
    for other in (transpose, glorot):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(tied.get_layer("encode").kernel),
            keras.ops.convert_to_numpy(other.get_layer("encode").kernel),
        )
    expected = tied.predict(inputs, verbose=0)
    np.testing.assert_allclose(transpose.predict(inputs, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(glorot.predict(inputs, verbose=0) - expected).max() > 1e-2


def test_a_lost_tie_is_seen(data, tmp_path):
    model = demo.autoencoder(demo.TRANSPOSE, seed=1)
    assert not demo.is_tied(model)  # equal values, but two stored kernels
    tied = demo.autoencoder(demo.TIED, seed=1)
    assert demo.is_tied(tied)
    tether.untie(tied)
    assert not demo.is_tied(tied)
    assert not demo.shares_nothing(tied, tied)


@pytest.fixture
def quick(data, tmp_path, monkeypatch):
    """A run of the tied model alone, at a tiny size, in an empty folder."""
    monkeypatch.setattr(demo, "SETTINGS", (TINY,))
    monkeypatch.setattr(demo, "KINDS", (demo.TIED,))
    monkeypatch.setattr(demo, "read_digits", lambda: np.concatenate([*data] * 20))
    monkeypatch.chdir(tmp_path)


def test_it_ends_with_a_map_of_the_weights_in_the_current_folder(quick, tmp_path, capsys):
    (tmp_path / "weights.html").write_text("of the run before")
    assert demo.main(["--seeds", "1"]) == 0
    assert f"open {tmp_path / 'weights.html'} in a browser" in capsys.readouterr().out
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    assert "Weights of the tied autoencoder" in page
    assert "codec.T" in page
    assert [file.name for file in tmp_path.iterdir()] == ["weights.html"]


def test_a_lost_tie_fails_the_run(quick, monkeypatch, capsys):
    assert demo.main(["--seeds", "1"]) == 0
    assert "51,024" in capsys.readouterr().out
    monkeypatch.setattr(demo, "survive", lambda *_: dict.fromkeys(demo.STEPS, True) | {"load": False})
    assert demo.main(["--seeds", "1", "--output", "sigmoid"]) == 1
    assert "The tie was lost: 60 digits, load." in capsys.readouterr().out


def test_several_seeds_are_averaged():
    one = demo.Result("tied", 200, 51_024, 600_000, 0.01, 0.1, {"train": True, "load": True})
    other = demo.Result("tied", 200, 51_024, 600_000, 0.03, 0.3, {"train": True, "load": False})
    mean = demo.mean([one, other])
    assert mean.error == pytest.approx(0.02)
    assert mean.seconds == pytest.approx(0.2)
    assert mean.still_tied == {"train": True, "load": False}

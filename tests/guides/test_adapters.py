"""The guide of six ways to fine-tune, on a small encoder with random weights: what its table says is so."""

import io

import numpy as np
import pytest
from rich.console import Console

import tether
from guides import adapters
from tests.guides.small_encoder import small_encoder

LAYERS, WIDTH, KINDS = 2, 16, len(adapters.PACKAGES)
HEAD = WIDTH * KINDS + KINDS
PROJECTIONS = 2 * LAYERS
TRAINED = {
    "head only": HEAD,
    "LoRA": HEAD + PROJECTIONS * 4 * (WIDTH + WIDTH),
    "DoRA": HEAD + PROJECTIONS * (4 * (WIDTH + WIDTH) + WIDTH),
    "VeRA": HEAD + PROJECTIONS * (64 + WIDTH),
    "rows": HEAD + adapters.QUICK.rows * WIDTH,
}


@pytest.fixture(scope="module")
def quick():
    console = Console(width=110, file=io.StringIO())
    encoder, vocabulary = small_encoder(LAYERS, adapters.QUICK.length, WIDTH)
    before = [value.copy() for value in encoder.get_weights()]
    result = adapters.main(None, seeds=2, quick=True, console=console, encoder=(encoder, vocabulary))
    assert all(np.array_equal(a, b) for a, b in zip(before, encoder.get_weights(), strict=True))
    assert not tether.adapters.names(encoder)
    return result, console.file.getvalue()


def test_each_way_trains_and_stores_what_it_says(quick):
    result, _ = quick
    assert len(result.rows) == 2
    for rows in result.rows:
        found = {row.name: row for row in rows}
        assert {name: found[name].trained for name in TRAINED} == TRAINED
        assert list(found) == list(adapters.WAYS)
        for name, row in found.items():
            assert 0 <= row.accuracy <= 1 and row.seconds > 0
            assert row.bytes >= 4 * row.trained
            if name not in ("VeRA", "all weights"):  # the one has its matrices in it, the other what does not train
                assert row.bytes < 4 * row.trained + 20_000


def test_the_adapters_live_on_after_training(quick):
    after = quick[0].afterwards
    assert after.reread < 1e-5 and after.merged < 1e-4 and after.refolded < 1e-5
    assert 0 <= after.combined <= 1 and after.folder_bytes > 4 * TRAINED["LoRA"]


def test_the_table_has_the_means_of_the_seeds(quick):
    result, text = quick
    for row, *others in zip(adapters.means(result), *result.rows, strict=True):
        assert row.accuracy == pytest.approx(np.mean([other.accuracy for other in others]))
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{row.name}  "))
        assert f"{row.trained:,}" in line and f"{row.accuracy:.3f}" in line
    assert "2 seed(s)" in " ".join(text.split()) and "half of DoRA" in " ".join(text.split())


def test_no_sentence_is_both_learned_and_tested():
    _, vocabulary = small_encoder(LAYERS, adapters.QUICK.length, WIDTH)
    sentences = adapters.read_sentences(vocabulary, adapters.QUICK)
    assert len(sentences.train[1]) == 96 and len(sentences.test[1]) == 64
    rows = [set(map(tuple, part["token_ids"].tolist())) for part, _ in (sentences.train, sentences.test)]
    assert len(rows[0] & rows[1]) <= 2  # two sentences may begin alike
    assert set(np.bincount(np.concatenate([sentences.train[1], sentences.test[1]]))) == {20}

"""The guide of six layers made three, on a small encoder with random weights: what its table says is so."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import tether
from guides import fewer_layers
from tests.guides.small_encoder import small_encoder
from tests.support import numpy

SIZE = replace(fewer_layers.QUICK, tests=32, chosen_by=32, length=12)
WIDTH, LAYERS = 16, 4
MATRICES = {(WIDTH, WIDTH): 4, (WIDTH, 2 * WIDTH): 2}
BIASES = 4 * WIDTH + 2 * WIDTH + WIDTH
SHARED = sum(rows * columns * count for (rows, columns), count in MATRICES.items()) + BIASES
NORMS = 4 * WIDTH
PARTS = SIZE.rank * sum((rows + columns) * count for (rows, columns), count in MATRICES.items())
CYCLE, SEQUENCE = f"cycle + low_rank({SIZE.rank})", f"sequence + low_rank({SIZE.rank})"


def lively_encoder(layers=LAYERS):
    """One of which each layer does something: without it the embeddings are others."""
    encoder, vocabulary = small_encoder(layers, SIZE.length, WIDTH)
    rng = np.random.default_rng(0)
    for weight in encoder.weights:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(size=weight.shape, scale=0.3))
    return encoder, vocabulary


@pytest.fixture(scope="module")
def quick():
    console = Console(width=110, file=io.StringIO())
    encoder, vocabulary = lively_encoder()
    before = [value.copy() for value in encoder.get_weights()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewer_layers, "QUICK", SIZE)
        result = fewer_layers.main(None, seeds=1, quick=True, steps=8, console=console, encoder=(encoder, vocabulary))
    assert all(np.array_equal(a, b) for a, b in zip(before, encoder.get_weights(), strict=True))
    return result, {row.name: row for row in result.rows}, console.file.getvalue()


@pytest.fixture(scope="module")
def sentences():
    encoder, vocabulary = lively_encoder()
    return encoder, fewer_layers.read_sentences(vocabulary, SIZE)


def made(name, encoder, size=SIZE):
    return fewer_layers.make(encoder, *fewer_layers.ways(encoder, (0, 1), size)[name])


def test_what_each_way_stores(quick):
    result, rows, _ = quick
    whole = result.frozen + LAYERS * (SHARED + NORMS)
    own_biases = LAYERS * (BIASES + PARTS) + 2 * (SHARED - BIASES)
    halved = result.frozen + LAYERS * NORMS + 2 * SHARED
    kept = result.frozen + 2 * (SHARED + NORMS)
    assert {name: row.numbers for name, row in rows.items()} == {
        "cycle, first": halved, "cycle, mean": halved, CYCLE: result.frozen + LAYERS * NORMS + own_biases,
        "sequence, mean": halved, SEQUENCE: result.frozen + LAYERS * NORMS + own_biases,
        "every second layer kept": kept, "nearest layers kept": kept, "the original": whole,
    }  # fmt: skip
    for row in rows.values():
        assert 4 * row.numbers < row.bytes < 4 * row.numbers + 40_000
    assert {rows[name].layers for name in ("cycle, first", "cycle, mean", CYCLE)} == {"ABAB"}
    assert {rows[name].layers for name in ("sequence, mean", SEQUENCE)} == {"AABB"}
    assert rows["every second layer kept"].layers == "0 2" and rows["the original"].layers == "0 1 2 3"


def test_each_way_comes_nearer_to_the_original(quick):
    _, rows, _ = quick
    assert rows["the original"].before == pytest.approx(1.0, abs=1e-5) and rows["the original"].after == ()
    for name, row in rows.items():
        assert row.seconds > 0
        if name != "the original":
            assert len(row.after) == 1 and row.before < row.mean < 1


def check_table(result, text):
    for row in result.rows:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{row.name}  "))
        spread = f" ({min(row.after):.3f} to {max(row.after):.3f})" if len(row.after) > 1 else ""
        shown = f"{row.before:.3f} {row.mean:.3f}{spread}" if row.after else f"{row.before:.3f}"
        assert f"{row.numbers:,}" in line and shown in " ".join(line.split())
        assert row.layers in line and f"{row.bytes / 1000:,.0f}" in line


def test_the_table_has_what_was_measured(quick):
    result, _, text = quick
    check_table(result, text)
    words = " ".join(text.split())
    assert "1 seed(s)" in words and f"the mean, has {result.constant:.3f}" in words


def test_each_seed_learns_from_other_sentences(monkeypatch):
    every_way = fewer_layers.ways
    few = ("cycle, mean", "nearest layers kept", fewer_layers.ORIGINAL)
    monkeypatch.setattr(fewer_layers, "QUICK", SIZE)
    monkeypatch.setattr(fewer_layers, "ways", lambda *given: {name: every_way(*given)[name] for name in few})
    console = Console(width=110, file=io.StringIO())
    result = fewer_layers.main(None, seeds=2, quick=True, steps=2, console=console, encoder=lively_encoder(2))
    assert [len(set(row.after)) for row in result.rows] == [2, 2, 0]
    check_table(result, console.file.getvalue())
    assert "2 seed(s)" in console.file.getvalue()


def test_seeds_are_put_together():
    rows = [fewer_layers.Row("cycle", "ABAB", 9, 36, 0.1, (after,), after * 2) for after in (0.5, 0.75, 0.6)]
    assert fewer_layers.of_all_seeds(rows) == replace(rows[0], after=(0.5, 0.75, 0.6), seconds=1.2)


def test_the_noise_is_said():
    rows = [
        fewer_layers.Row("cycle, mean", "ABAB", 9, 36, 0.1, (0.5, 0.75), 2.0),
        fewer_layers.Row("nearest layers kept", "0 3", 8, 32, 0.2, (0.75, 0.85), 1.0),
        fewer_layers.Row(fewer_layers.ORIGINAL, "0 1 2 3", 10, 40, 1.0, (), 2.0),
    ]
    words = fewer_layers.in_words(fewer_layers.Result(rows, 0.4, 5))
    assert "differ by up to 0.250" in words and "cycle, mean: 0.625" in words
    assert "(0 3): 0.800" in words and "50% of the time" in words
    alone = [replace(row, after=row.after[:1]) for row in rows]
    assert "nobody knows" in fewer_layers.in_words(fewer_layers.Result(alone, 0.4, 5))


@pytest.mark.parametrize("zero", [(0, 2), (1, 3), (0, 1)])
def test_the_layers_that_do_nothing_are_those_that_are_left_out(sentences, zero):
    encoder, parts = sentences
    encoder = fewer_layers.with_layers(encoder, range(LAYERS))
    for place in zero:
        for weight in encoder.get_layer(f"transformer_layer_{place}").weights:
            if "norm" not in weight.path:
                weight.assign(np.zeros(weight.shape))
    wanted = fewer_layers.embeddings(fewer_layers.embeds(encoder), parts.choose)
    kept = tuple(place for place in range(LAYERS) if place not in zero)
    assert fewer_layers.nearest_layers(encoder, 2, parts.choose, wanted) == kept
    model, layers = fewer_layers.make(encoder, kept, None)
    assert layers == " ".join(map(str, kept))
    np.testing.assert_allclose(fewer_layers.embeddings(model, parts.choose), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["cycle", "sequence"])
def test_parts_of_full_rank_are_the_original(sentences, name):
    encoder, parts = sentences
    original = fewer_layers.embeds(fewer_layers.with_layers(encoder, range(LAYERS)))
    wanted = fewer_layers.embeddings(original, parts.test)
    found = [
        fewer_layers.cosine(
            fewer_layers.embeddings(
                made(f"{name} + low_rank({rank})", encoder, replace(SIZE, rank=rank))[0], parts.test
            ),
            wanted,
        )
        for rank in (1, 8, WIDTH)
    ]
    assert found == sorted(found) and found[-1] == pytest.approx(1.0, abs=1e-5) and found[0] < 0.99


def test_only_the_layers_learn(sentences):
    encoder, parts = sentences
    model, _ = made(CYCLE, encoder)
    ids = parts.order(0, 2)
    before = {variable.path: numpy(variable).copy() for variable in model.weights}
    wanted = np.random.default_rng(0).normal(size=(len(ids), WIDTH)).astype("float32")
    fewer_layers.distil(model, ids, wanted, 1e-2)
    changed = {v.path for v in model.weights if not np.array_equal(numpy(v), before[v.path])}
    layers = {path for path in before if "transformer_layer_" in path}
    without = {path for path in layers if path.endswith("key/bias")}  # which changes no attention: no gradient
    assert len(without) == LAYERS and changed - without == layers - without


def test_what_is_in_the_file_is_the_model(sentences, tmp_path):
    encoder, parts = sentences
    model, _ = made(SEQUENCE, encoder)
    tether.files.save_safetensors(model, tmp_path / "m.safetensors")
    other, _ = made(SEQUENCE, encoder)
    for weight in other.weights:
        weight.assign(numpy(weight) + 1)
    wanted = fewer_layers.embeddings(model, parts.test)
    assert np.abs(fewer_layers.embeddings(other, parts.test) - wanted).max() > 1e-2
    tether.files.load_safetensors(other, tmp_path / "m.safetensors")
    np.testing.assert_allclose(fewer_layers.embeddings(other, parts.test), wanted, atol=1e-5)


def test_no_sentence_is_in_two_parts_and_each_is_learned_as_often(sentences):
    _, parts = sentences
    rows = [set(map(tuple, part.tolist())) for part in (parts.choose, parts.test, parts.learn)]
    assert [len(each) for each in rows[:2]] == [32, 32] and len(rows[2]) == len(parts.learn)
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])
    steps = 2 * len(parts.learn) // fewer_layers.BATCH + 1
    ids = parts.order(1, steps)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    assert len(ids) == steps * fewer_layers.BATCH and set(counts) <= {2, 3}
    assert not np.array_equal(ids, parts.order(2, steps)) and np.array_equal(ids, parts.order(1, steps))

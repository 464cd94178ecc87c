"""Row C9 of the scenarios: seeing what is shared. What Keras's own summary does not say."""

import re

import keras
import numpy as np
import pytest

import tether

layers = keras.layers


def language_model(when):
    """A model whose head reads its table, in a sub-model."""
    embed, head = layers.Embedding(50, 8, name="embed"), layers.Dense(50, name="lm_head")
    if when == "before build":
        table = tether.Weight(name="table")
        tether.tie(embed, embeddings=table)
        tether.tie(head, kernel=table.T)
    x = keras.Input((4,), dtype="int32")
    body = keras.Sequential([embed, layers.GlobalAveragePooling1D(), layers.Dense(8, name="body")], name="encoder")
    model = keras.Model(x, head(body(x)), name="language_model")
    if when == "after build":
        tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
    return model


def of_keras(model):
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line), expand_nested=True, line_length=120)
    return "\n".join(lines)


def of_tether(source, **options):
    lines = []
    found = tether.summary(source, width=120, print_fn=lines.append, **options)
    return found, "\n".join(lines)


WHEN = pytest.mark.parametrize("when", ["before build", "after build"])


@WHEN
def test_c9_the_summary_says_who_shares_what(when):
    model = language_model(when)
    assert "lm_head" in of_keras(model) and ".T" not in of_keras(model)  # what this row is about
    found, said = of_tether(model)
    (table,) = found.facts.shared()
    name = table.path.rpartition("/")[2] if when == "before build" else "embed.embeddings"
    assert f"{table.path} (shared by 2 uses)" in said
    assert f"encoder/embed/embeddings = {name}" in said and f"lm_head/kernel = {name}.T" in said


@WHEN
def test_c9_it_says_what_sharing_saves(when):
    found, said = of_tether(language_model(when))
    once = 50 * 8 * 4
    assert found.facts.unshared_bytes - found.facts.stored_bytes == once
    assert re.search(r"^saved +1\.6 kB .* 1 weight shared by 2 uses$", said, re.MULTILINE)


@WHEN
def test_c9_it_says_the_same_of_the_file(when, tmp_path):
    model = language_model(when)
    model.save(str(tmp_path / "m.keras"))
    _, live = of_tether(model, shared_only=True)
    _, file = of_tether(tmp_path / "m.keras", shared_only=True)
    assert file == live
    _, loaded = of_tether(keras.saving.load_model(str(tmp_path / "m.keras")), shared_only=True)
    assert "(shared by 2 uses)" in loaded and "lm_head/kernel = " in loaded


@WHEN
def test_c9_it_says_which_use_is_frozen(when):
    model = language_model(when)
    model.get_layer("lm_head").trainable = False
    _, said = of_tether(model)
    trains = {line.split(" = ")[0].strip(): line.split()[-1] for line in said.splitlines() if " = " in line}
    assert trains == {"encoder/embed/embeddings": "trained", "lm_head/kernel": "frozen"}


@WHEN
def test_c9_it_counts_the_slots_of_a_shared_weight_once(when):
    model = language_model(when)
    model.compile("adam", "mse")
    model.fit(np.zeros((2, 4), "int32"), np.zeros((2, 50), "float32"), verbose=0)
    found, said = of_tether(model)
    (table,) = found.facts.shared()
    assert sum(slot.bytes for slot in found.facts.slots_of(table)) == 2 * table.bytes
    assert said.splitlines()[2].endswith("optimizer")


def test_c9_an_untied_model_says_that_nothing_is_shared():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)])
    _, said = of_tether(model)
    assert "no weight is shared" in said and "shared by" not in said


def test_c9_a_private_sharing_is_seen_too_until_it_is_lost(tmp_path):
    """The people's way: it is there, and Keras's file does not keep it."""
    a, b = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    model = keras.Sequential([keras.Input((4,)), a, b])
    b._tracker.unlock()
    b._untrack_variable(b._kernel)
    b._kernel = a._kernel
    b._tracker.lock()
    found, said = of_tether(model)
    assert "(shared by 2 uses)" in said and "stored again at" in said
    model.save(str(tmp_path / "m.keras"))
    lost, _ = of_tether(tmp_path / "m.keras")
    assert list(found.facts.shared()) and not list(lost.facts.shared())
    assert lost.facts.stored_bytes == found.facts.stored_bytes + 4 * 4 * 4

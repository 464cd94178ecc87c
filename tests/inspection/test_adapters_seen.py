"""Adapters as facts, in the summary and in the count of what trains."""

import html
import re

import keras
import pytest

import tether
from tether.inspection import Count, Facts, count, facts
from tether.inspection.summary import Summary

layers = keras.layers
SILENT = {"print_fn": lambda line: None}


def tied_model():
    """A frozen body with a table that also gives the logits."""
    keras.utils.set_random_seed(3)
    words = keras.Input((4,), dtype="int32")
    embed = layers.Embedding(9, 6, name="embed")
    hidden = layers.Dense(6, name="hidden")(embed(words))
    logits = tether.tie(layers.Dense(9, name="logits"), kernel=tether.weight_of(embed, "embeddings").T)
    model = keras.Model(words, logits(layers.Dense(6, name="top")(hidden)), name="text")
    model.trainable = False
    return model


@pytest.fixture
def model():
    model = tied_model()
    tether.adapters.add(model, "french", {"hidden/kernel": tether.low_rank(2), "top/kernel": tether.low_rank(3)})
    tether.adapters.add(model, "german", {"hidden/kernel": tether.forms.dora(2)}, also="hidden/bias")
    tether.adapters.add(model, "scaled", {"top/kernel": tether.forms.scale()}, trainable=False)
    tether.adapters.set_strengths(model, {"german": -0.25})
    return model


def body(source, **options):
    return str(tether.summary(source, width=300, **SILENT, **options)).split("\n\n")


def test_the_summary_lists_adapters(model):
    _, table, totals = body(model, adapters=True)
    assert table == (
        "adapter  strength    rank    changes  parameters  bytes  trains\n"
        "----------------------------------------------------------------\n"
        "french          1  2 to 3  2 weights          60  244 B  trained\n"
        "german      -0.25       2  2 weights          36  148 B  trained\n"
        "scaled          1           1 weight           6   28 B  frozen"
    )
    assert "adapters" in totals and "3 adapters on 3 weights: french, german, scaled" in totals


def test_what_an_adapter_has_is_what_its_weights_are(model):
    for adapter in facts(model).adapters:
        own = tether.adapters.manage.own_weights(model)[adapter.name]
        assert adapter.numbers == sum(weight.numpy().size for weight in own)
        assert adapter.trains is any(weight.trainable for weight in own)
        assert adapter.strength == pytest.approx(tether.adapters.strengths(model)[adapter.name])
    tether.adapters.activate(model, "german")
    assert [adapter.trains for adapter in facts(model).adapters] == [False, True, False]
    assert [adapter.strength for adapter in facts(model).adapters] == [0, 1, 0]


def test_matrices_that_are_fixed_are_none_of_what_it_trains():
    model = tied_model()
    tether.adapters.add(model, "vera", {"hidden/kernel": tether.forms.vera(2), "top/kernel": tether.forms.vera(2)})
    (found,) = facts(model).adapters
    own = tether.adapters.manage.own_weights(model)["vera"]
    assert found.numbers == sum(weight.numpy().size for weight in own) < found.bytes // 4


def test_the_table_is_html_in_a_notebook(model):
    page = tether.summary(model, adapters=True, **SILENT)._repr_html_()
    cells = [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<t[dh][^>]*>.*?</t[dh]>", page)]
    assert cells[:7] == ["adapter", "strength", "rank", "changes", "parameters", "bytes", "trains"]
    assert cells[7:14] == ["french", "1", "2 to 3", "2 weights", "60", "244 B", "trained"]
    assert '<td class="frozen">frozen</td>' in page


def test_a_file_tells_all_but_strengths(model, tmp_path):
    model.save(tmp_path / "m.keras")
    live, file = facts(model).adapters, facts(tmp_path / "m.keras").adapters
    assert [adapter.name for adapter in file] == ["french", "german", "scaled"]
    for one, other in zip(live, file, strict=True):
        assert (one.ranks, one.numbers, one.bytes) == (other.ranks, other.numbers, other.bytes)
        assert sorted(one.changes) == sorted(other.changes) and sorted(one.weights) == sorted(other.weights)
        assert other.strength is None and other.trains in (None, one.trains)
    assert "?: the file is read without its values" in body(tmp_path / "m.keras", adapters=True)[-1]


def test_facts_with_adapters_are_json(model):
    found = facts(model)
    assert Facts.from_json(found.to_json()) == found
    assert Facts.from_json({key: value for key, value in found.to_json().items() if key != "adapters"}).adapters == ()


def test_a_model_without_adapters_says_so(model):
    assert "There are no adapters on 'text'" in body(tied_model(), adapters=True)[-1]
    tether.adapters.merge(model)
    assert "or they are merged" in body(model, adapters=True)[-1]


# --------------------------------------------------------------------------- what is shared


def test_an_adapter_makes_nothing_shared(model):
    _, table, totals = body(model, shared_only=True)
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "embed/embeddings",
        *["embed/embeddings", "logits/kernel"],
    ]
    assert "1 weight shared by 2 uses" in totals
    before, after = facts(tied_model()), facts(model)
    assert [w.path for w in before.shared()] == [w.path for w in after.shared()]
    assert after.shared_only().weights == tuple(after.shared())
    assert "(read by 2 uses)" in body(model)[1]  # the strength of french


def test_a_base_that_others_read_is_shared(model, tmp_path):
    tether.adapters.add(model, "table", {"embed/embeddings": tether.low_rank(2)})
    _, table, totals = body(model, shared_only=True)
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "embed/embeddings",
        *["embed/embeddings", "logits/kernel"],
    ]
    assert "table.strength" in table and "4 adapters on 4 weights" in totals
    assert "table_lora" not in "".join(line.split("=")[0] for line in table.splitlines())
    kept = facts(model).shared_only()
    assert {place for use in kept.uses for place in use.weights} <= {weight.place for weight in kept.weights}
    tether.plot(model, tmp_path / "map.svg", shared_only=True)
    assert "table.strength" in (tmp_path / "map.svg").read_text(encoding="utf-8")


def test_a_weight_that_is_combined_with_anothers_is_listed():
    base = tether.Weight((4, 3), name="base")
    other = tether.Weight((4, 3), name="other")
    mixed = keras.Sequential([keras.Input((4,)), tether.tie(layers.Dense(3, name="d"), kernel=base + other)])
    tether.adapters.add(mixed, "a", {"d/kernel": tether.low_rank(1)})
    assert [w.path for w in facts(mixed).shared_only().weights if w.path in ("base", "other")] == ["base", "other"]


def test_a_frozen_bias_takes_one_line(model):
    lines = [line for line in body(model)[1].splitlines() if "top/bias" in line]
    assert len(lines) == 1 and lines[0].endswith("frozen")


# --------------------------------------------------------------------------- count


def test_each_stored_number_counts_once(model):
    found = count(model)
    assert found.total == sum(weight.numpy().size for weight in model.weights)
    assert found.trained == 60 + 36 == sum(variable.numpy().size for variable in model.trainable_weights)
    assert found.frozen == found.total - found.trained
    assert found.percent == pytest.approx(100 * found.trained / found.total)
    assert str(found) == f"96 of {found.total} parameters trained ({found.percent:.3g} %), {found.frozen} frozen"
    assert dict(found) == {
        "trained": found.trained, "frozen": found.frozen, "total": found.total, "percent": found.percent
    }  # fmt: skip
    with pytest.raises(KeyError):
        found["all"]
    assert f"({found.trained} trained, {found.frozen} frozen)" in str(Summary(facts(model)))


def test_state_is_no_parameter_and_an_empty_model_trains_nothing():
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5)])
    assert count(model) == Count(0, 0, 0, 0.0)


def test_a_file_that_does_not_say_what_trains_has_a_total(model, tmp_path):
    model.save_weights(tmp_path / "m.weights.h5")
    found = count(tmp_path / "m.weights.h5")
    assert found.total == count(model).total and found.trained is None
    assert str(found).endswith("the file does not say which of them train")

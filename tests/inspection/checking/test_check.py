"""What `tether.check` takes, gives and leaves as it was."""

import json

import keras
import numpy as np
import pytest

import tether
from tests.documents import ROOT
from tests.inspection.checking.faults import FAULTS, tied_pair
from tests.support import numpy
from tether.errors import TetherError, UnknownName
from tether.inspection.checking.finding import Finding, Findings, rule
from tether.inspection.checking.rules import RULES

layers = keras.layers


# --------------------------------------------------------------------------- findings


def some_findings():
    return Findings(
        [
            Finding("many-uses", "hint", "a/kernel", "Why <b>this</b>.", "mend()"),
            Finding("lost-tie", "error", "b/kernel", "x " * 200, "one()\ntwo()"),
            Finding("wide-table", "warning", "c", "Why.", "mend()"),
        ],
        rules=["many-uses", "lost-tie", "wide-table"],
    )


def test_findings_are_a_sequence_with_the_gravest_first():
    found = some_findings()
    assert [finding.severity for finding in found] == ["error", "warning", "hint"]
    assert found and len(found) == 3 and found[0].rule == "lost-tie" and not Findings()
    assert [finding.rule for finding in found[1:]] == ["wide-table", "many-uses"]
    assert [[f.rule for f in part] for part in (found.errors, found.warnings, found.hints)] == [
        ["lost-tie"],
        ["wide-table"],
        ["many-uses"],
    ]
    assert found.by_rule("many-uses")[0].where == "a/kernel" and not found.by_rule("equal-weights")


def test_findings_as_text_say_everything_and_keep_code_as_it_is():
    text = str(some_findings())
    for finding in some_findings():
        assert finding.rule in text and finding.where in text and finding.severity in text
    assert "mend: one()\n        two()" in text
    assert max(map(len, text.splitlines())) <= 110
    assert text.endswith("1 error, 1 warning, 1 hint")
    assert "2 rules" in str(Findings(rules=["a", "b"]))


def test_findings_as_json_and_as_a_table():
    data = json.loads(json.dumps(some_findings().to_json()))
    assert data["counts"] == {"error": 1, "warning": 1, "hint": 1}
    assert [Finding(**entry) for entry in data["findings"]] == list(some_findings())
    html = some_findings()._repr_html_()
    assert "<table" in html and "&lt;b&gt;this" in html and "<b>this" not in html
    assert "<table" not in Findings()._repr_html_()


def test_a_finding_cannot_be_changed():
    with pytest.raises(AttributeError):
        some_findings()[0].rule = "other"


# --------------------------------------------------------------------------- what it takes


def test_check_is_public():
    assert tether.check.__module__.startswith("tether.inspection.checking")


def test_a_layer_can_be_checked_too(rng):
    model, _ = tied_pair(rng)
    assert not tether.check(model.layers[0])
    layer = keras.layers.Dense(3, name="alone")
    with pytest.raises(TetherError, match="'alone' is not built"):
        tether.check(layer)
    layer.build((None, 2))
    assert not tether.check(layer)


def test_only_the_rules_that_are_asked_for_answer(rng):
    model, _ = FAULTS["a_copied_kernel"].make(rng, True)
    found = tether.check(model, rules=["lost-tie", "equal-weights"])
    assert found.rules == ("lost-tie", "equal-weights") and {finding.rule for finding in found} == {"equal-weights"}
    assert not tether.check(model, rules=["lost-tie"])


def test_what_is_known_and_right_is_ignored(rng):
    model, _ = FAULTS["a_copied_kernel"].make(rng, True)
    assert tether.check(model)
    assert not tether.check(model, ignore=["equal-weights"])
    assert not tether.check(model, ignore=["equal-weights:second/kernel"])
    assert tether.check(model, ignore=["equal-weights:first/kernel"])


@pytest.mark.parametrize("argument", ["rules", "ignore"])
def test_an_unknown_rule_is_an_error_that_names_a_close_one(argument, rng):
    model, _ = tied_pair(rng)
    with pytest.raises(UnknownName, match=r"'equal-weight'\..*Did you mean 'equal-weights'"):
        tether.check(model, **{argument: ["equal-weight"]})


def test_a_rule_that_cannot_judge_is_an_error(rng, tmp_path):
    model, _ = tied_pair(rng)
    with pytest.raises(TetherError, match="needs data"):
        tether.check(model, rules=["no-gradient"])
    model.save(tmp_path / "m.keras")
    with pytest.raises(TetherError, match="cannot judge a file"):
        tether.check(tmp_path / "m.keras", rules=["lost-tie"])
    with pytest.raises(TetherError, match="several names"):
        tether.check(model, rules="lost-tie")


@pytest.mark.parametrize("source", [None, 3, "model"])
def test_what_is_no_model_is_refused(source):
    with pytest.raises((TetherError, FileNotFoundError)):
        tether.check(source)


def test_data_for_a_file_or_a_model_that_is_not_built_is_refused(rng, tmp_path):
    model, _ = tied_pair(rng)
    model.save(tmp_path / "m.keras")
    x = rng.normal(size=(2, 6)).astype("float32")
    with pytest.raises(TetherError, match="not through a file"):
        tether.check(tmp_path / "m.keras", x)
    with pytest.raises(TetherError, match="not built"):
        tether.check(keras.Sequential([layers.Dense(3)]), x)


class Failing(layers.Layer):
    """Fails when it trains."""

    def call(self, x, training=False):
        if training:
            raise RuntimeError("a failure of the layer's own")
        return x


def test_a_model_that_fails_on_the_way_back_gives_a_clear_error(rng):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6), Failing()], name="failing")
    with pytest.raises(TetherError, match=r"(?s)'failing'.*a failure of the layer's own.*data=\(x, y\)"):
        tether.check(model, rng.normal(size=(2, 6)).astype("float32"))


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(TypeError, match="lost-tie"):
        rule("lost-tie", "again")(lambda context: iter(()))


# --------------------------------------------------------------------------- what it leaves


class Noisy(layers.Layer):
    """Has everything that a call changes: a random state, a moving average, a metric and a loss of its own."""

    def __init__(self, measures=False, **kwargs):
        super().__init__(**kwargs)
        self.dropout = layers.Dropout(0.5, seed=1)
        self.norm = layers.BatchNormalization()
        self.mean = keras.metrics.Mean(name="mean")
        self.measures = measures  # which Keras's `fit` on JAX does not allow

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=False):
        self.add_loss(keras.ops.mean(x))
        if self.measures:
            self.mean.update_state(keras.ops.mean(x))
        return self.norm(self.dropout(x, training=training), training=training)


@pytest.mark.parametrize("trained", [False, True], ids=["compiled", "trained"])
def test_a_check_with_data_changes_nothing(rng, trained):
    model, codec = tied_pair(rng)
    encode, decode = model.layers
    noisy = Noisy(measures=not trained)
    model = keras.Sequential([keras.Input((6,)), encode, noisy, decode])
    frozen = layers.Dense(2, trainable=False)
    model = keras.Sequential([model, frozen])
    x, y = rng.normal(size=(4, 6)).astype("float32"), rng.normal(size=(4, 2)).astype("float32")
    model(x, training=True)
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    if trained:
        model.fit(x, y, verbose=0, batch_size=4)

    def snapshot():
        return {
            "variables": [(id(v), v.path, numpy(v).tobytes(), v.trainable) for v in model.variables],
            "metrics": [(id(v), numpy(v).tobytes()) for v in model.metrics_variables],
            "own metric": numpy(noisy.mean.total).tobytes(),
            "optimizer": [(id(v), numpy(v).tobytes()) for v in model.optimizer.variables],
            "flags": [layer.trainable for layer in model._flatten_layers()],
            "losses": [(id(loss), layer.name) for layer in model._flatten_layers() for loss in layer._losses],
            "uses": [(use.name, use.live) for use in codec.uses],
            "classes": [type(layer) for layer in model._flatten_layers()],
            "attributes": [sorted(vars(layer)) for layer in model._flatten_layers()],
            "random": keras.utils.get_random_seed() if hasattr(keras.utils, "get_random_seed") else None,
        }

    before = snapshot()
    tether.check(model, (x, y))
    assert snapshot() == before
    tether.check(model, x)
    assert snapshot() == before


def test_a_model_trains_on_after_a_check_as_if_there_had_been_none(rng):
    x, y = rng.normal(size=(8, 6)).astype("float32"), rng.normal(size=(8, 6)).astype("float32")
    results = []
    for checked in (False, True):
        keras.utils.set_random_seed(3)
        model, _ = tied_pair(np.random.default_rng(5))
        model = keras.Sequential([keras.Input((6,)), model.layers[0], Noisy(), model.layers[1]])
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        model.fit(x, y, verbose=0, batch_size=8, shuffle=False)
        if checked:
            tether.check(model, (x, y))
        model.fit(x, y, verbose=0, batch_size=8, shuffle=False)
        results.append([numpy(v) for v in model.weights])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# --------------------------------------------------------------------------- the page


def test_every_rule_is_on_the_page():
    page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    headings = [line.strip("# `\n") for line in page.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(RULES)
    for name, each in RULES.items():
        section = page.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
        assert each.description in " ".join(section.split()), name
        assert "**Why it matters.**" in section and "**Mend.**" in section, name


def test_the_page_lists_the_rules_that_judge_a_file():
    page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| a file |"))
    assert set(row.split("`")[1::2]) == {name for name, each in RULES.items() if each.file}


def test_every_rule_has_a_name_in_kebab_case_and_one_line():
    for name, each in RULES.items():
        assert name == name.lower() and name.replace("-", "").isalpha() and name == each.name
        assert each.description and "\n" not in each.description
        assert each.model or each.file

"""The plugin of pytest: what `assert_tied` lets pass, what it says otherwise, and what loading it imports."""

import os
import subprocess
import sys
import tomllib

import keras
import pytest

import tether
from tests.documents import ROOT
from tether.errors import TetherError, UnknownName
from tether_pytest.assertion import assert_tied

pytestmark = pytest.mark.spread

layers = keras.layers


def language_model(width=16):
    tokens = keras.Input((6,), dtype="int32")
    h = layers.Embedding(100, width, name="embedding")(tokens)
    return keras.Model(tokens, layers.Dense(100, name="head")(h), name="words")


def tied_language_model():
    model = language_model()
    tether.tie(model, {"head/kernel": tether.weight_of(model, "embedding/embeddings").T})
    return model


def test_two_names_of_one_stored_weight_pass():
    assert_tied(tied_language_model(), "head/kernel", "embedding/embeddings")
    x, both = keras.Input((4,)), tether.Weight((4, 8), name="both")
    parts = [
        tether.tie(layers.Dense(4, name=name), kernel=part) for name, part in (("a", both[:, :4]), ("b", both[:, 4:]))
    ]
    model = keras.Model(x, [part(x) for part in parts])
    assert_tied(model, "a/kernel", "b/kernel")  # other parts of it


def test_others_fail_with_what_each_reads_and_what_to_write():
    model = language_model()
    with pytest.raises(AssertionError) as failed:
        assert_tied(model, "head/kernel", "embedding/embeddings")
    said = str(failed.value)
    assert "head/kernel: its own variable 'head/kernel', of shape (16, 100)" in said
    assert "embedding/embeddings: its own variable 'embedding/embeddings', of shape (100, 16)" in said
    exec(said.partition("write: ")[2], {"tether": tether, "model": model})
    assert_tied(model, "head/kernel", "embedding/embeddings")


def test_expressions_are_written_out():
    model, w, v = language_model(), tether.Weight((100, 16), name="w"), tether.Weight((100, 16), name="v")
    tether.tie(model, {"head/kernel": 2 * w.T, "embedding/embeddings": v + 1})
    with pytest.raises(AssertionError, match=r"(?s)head/kernel: 2 \* w\.T, of.*embeddings: v \+ 1, of shape.*from 'v'"):
        assert_tied(model, "head/kernel", "embedding/embeddings")


def test_what_is_written_suits_the_shapes():
    x = keras.Input((4,))
    model = keras.Model(x, [layers.Dense(n, name=name)(x) for name, n in (("a", 4), ("b", 4), ("c", 5))])
    with pytest.raises(AssertionError, match=r"'a/kernel': tether\.weight_of\(model, 'b/kernel'\)\}"):
        assert_tied(model, "a/kernel", "b/kernel")
    with pytest.raises(AssertionError, match=r"an expression of the shape \(4, 4\) over tether\.weight_of"):
        assert_tied(model, "a/kernel", "c/kernel")


def test_the_strength_of_an_adapter_ties_nothing():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(4, name="b")(layers.Dense(4, name="a")(x)))
    tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(2)})
    with pytest.raises(AssertionError, match="share no stored weight"):
        assert_tied(model, "a/kernel", "b/kernel")


def test_what_can_never_fail_or_be_told_is_refused():
    model = language_model()
    with pytest.raises(TetherError, match="can never fail"):
        assert_tied(model, "head/kernel", "head/kernel")
    with pytest.raises(UnknownName, match="kernell"):
        assert_tied(model, "head/kernell", "embedding/embeddings")
    with pytest.raises(TetherError, match="model or layer"):
        assert_tied("model", "head/kernel", "embedding/embeddings")
    with pytest.raises(TetherError, match="not built yet"):
        assert_tied(keras.Sequential([layers.Dense(3, name="a"), layers.Dense(3, name="b")]), "a/kernel", "b/kernel")


TESTS = """
import sys

at_start = {"keras", "tether"} & set(sys.modules)

def test_nothing_is_imported_at_start():
    assert not at_start

def test_tied(assert_tied):
    from tests.test_pytest_plugin import tied_language_model
    assert_tied(tied_language_model(), "head/kernel", "embedding/embeddings")

def test_untied(assert_tied):
    from tests.test_pytest_plugin import language_model
    assert_tied(language_model(), "head/kernel", "embedding/embeddings")
"""


def test_pytest_loads_it_without_keras_and_a_test_uses_it(tmp_path):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["pytest11"]
    (tmp_path / "test_it.py").write_text(TESTS)
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # it may be installed or not
    command = [sys.executable, "-m", "pytest", "-p", entry["tether"], "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    failure = done.stdout.partition("def test_untied")[2].partition("short test summary")[0]
    assert "AssertionError: 'head/kernel' and 'embedding/embeddings' of 'words' share no stored weight." in failure
    assert "To tie them, write: tether.tie(" in failure
    assert "ties.py" not in failure  # the test's own line is shown

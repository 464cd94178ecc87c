"""What the guides about the sentence encoder share: sentences of documentation, and their pieces."""

import numpy as np
import pytest

from guides import _sentences


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own."""
    said = 'def f():\n    """{}"""\n'
    files = {
        "one.py": "This sentence has more than six words. Too short. This one\n    goes over two lines of text.",
        "pack/two.py": "A module of the package says what it does. This sentence has more than six words.",
        "pack/test/three.py": "Tests are no documentation of anything at all.",
        "site-packages/four.py": "Another package is no part of the library.",
    }
    for name, text in files.items():
        file = tmp_path / "tests" / name  # where the library is does not matter
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(said.format(text), encoding="utf-8")
    monkeypatch.setattr(_sentences.sysconfig, "get_path", lambda name: str(tmp_path / "tests"))


def test_sentences_are_those_of_the_documentation_each_once(library):
    long, lines = "This sentence has more than six words.", "This one goes over two lines of text."
    module = "A module of the package says what it does."
    assert _sentences.documentation() == [long, lines, module]
    assert _sentences.documentation("pack") == [module, long]


def test_a_text_is_cut_into_the_longest_pieces_that_are_known():
    vocabulary = {"[UNK]": 1, "un": 2, "##known": 3, "##k": 4, "a": 5, "!": 6}
    assert _sentences.word_pieces("A unknown!", vocabulary) == [5, 2, 3, 6]
    assert _sentences.word_pieces("aunt", vocabulary) == [1]


def test_a_row_of_tokens_is_cut_or_filled():
    vocabulary = {"[UNK]": 1, "[CLS]": 7, "[SEP]": 8, "a": 5}
    assert _sentences.tokens("a a", vocabulary, 6) == [7, 5, 5, 8, 0, 0]
    assert _sentences.tokens("a a a a a", vocabulary, 4) == [7, 5, 5, 8]
    inputs = _sentences.encoder_inputs(np.array([[7, 5, 8, 0]], "int32"))
    assert inputs["padding_mask"].tolist() == [[1, 1, 1, 0]] and not inputs["segment_ids"].any()


def test_the_first_step_is_not_counted_if_there_are_others():
    steps = _sentences.Steps()
    steps.seconds = [9.0]
    assert steps.median == 9.0
    steps.seconds += [1.0, 3.0]
    assert steps.median == 2.0

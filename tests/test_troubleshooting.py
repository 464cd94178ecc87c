"""docs/troubleshooting.md quotes texts that the sources still have, and its lines of Python are Python."""

import ast
import re

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.spread
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED, *_ = PAGE.partition("## Without an error")


def rows(text):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [row for row in cells if row[0] not in ("what it says", "what happens")]


def template(node):
    """A string of the sources, with "…" for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.fixture(scope="module")
def texts():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    return {template(node) for tree in trees for node in ast.walk(tree)} - {""}


def occurs(quoted, text):
    """Whether the parts of a quoted text come in a text, in their order."""
    parts = [part.strip() for part in quoted.split("…") if part.strip()]
    return re.search(".*?".join(map(re.escape, parts)), text, re.DOTALL) is not None


@pytest.mark.parametrize("quoted", [row[0] for row in rows(QUOTED)])
def test_a_quoted_text_is_in_the_sources(quoted, texts):
    assert len(quoted.replace("…", "").strip()) > 12
    assert any(occurs(quoted, text) for text in texts)


def test_a_text_that_no_source_has_is_noticed(texts):
    assert not any(occurs("The weight … has no colour yet.", text) for text in texts)
    assert len(rows(QUOTED)) > 30


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0][:40])
def test_a_line_that_mends_is_python(row):
    assert len(row) == 3 and all(row)
    for line in re.findall(r"`([^`]+)`", row[2]):
        if "in a shell" not in row[2]:
            body = "\ndef function(): ..." if line.startswith("@") else ""
            ast.parse(line + body)

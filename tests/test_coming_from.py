"""docs/coming-from.md: in each section, the Python block and then each line of ours in its table run."""

import re

import pytest

from tests.documents import BLOCK, ROOT

pytestmark = pytest.mark.spread

PAGE = "docs/coming-from.md"
SECTIONS = re.split(r"^## ", (ROOT / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


def rows(section):
    """The three cells of each row of a section's table."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_there_is_a_section_for_each():
    assert len(SECTIONS) == 5
    assert sum(len(rows(section)) for section in SECTIONS) > 30


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_every_line_of_ours_runs(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": PAGE}
    (setup,) = [match[2] for match in BLOCK.finditer(section)]
    exec(setup, namespace)
    for theirs, ours, _ in rows(section):
        lines = re.findall(r"`([^`]+)`", ours)
        assert theirs and lines, "a row has a line of each side"
        for line in lines:
            exec(compile(line, f"<{PAGE}: {line}>", "exec"), namespace)

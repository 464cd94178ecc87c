"""The notebooks are what their sources say, and the sources run to their last line, which asserts what they show."""

import json

import pytest

from tests.documents import ROOT, broken_links

SOURCES = sorted(ROOT.glob("notebooks/*.py"))


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return __import__("notebooks")


def test_there_are_notebooks():
    assert len(SOURCES) >= 5
    assert [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb"))] == [path.stem for path in SOURCES]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_has_its_sources_cells_and_outputs(source, notebooks):
    """Else `python scripts/notebooks.py` has to be run."""
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 50_000
    written = json.loads(path.read_text(encoding="utf-8"))
    cells = notebooks.cells(source.read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in written["cells"]] == cells
    assert cells[0][0] == "markdown" and cells[0][1].startswith("# ")
    assert cells[-1][0] == "code" and cells[-1][1].splitlines()[-1].startswith("assert ")
    for cell in written["cells"]:
        if cell["cell_type"] == "markdown":
            assert not list(broken_links(path, "".join(cell["source"])))
        else:
            assert bool(cell["outputs"]) == (
                "print(" in "".join(cell["source"]) or "summary(" in "".join(cell["source"])
            )


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source, notebooks):
    printed = notebooks.run(source.stem, source.read_text(encoding="utf-8"))
    assert any(printed)

"""Every Python block of the README and of docs/ runs, in order, in one namespace a file."""

import re

import pytest

from tests.documents import ROOT, python_blocks, run

WITH_CODE = [
    "README.md",
    "docs/semantics.md",
    "docs/inheriting.md",
    "docs/planning.md",
    "docs/saving.md",
    "docs/quantizing.md",
    "docs/files.md",
    "docs/exports.md",
    "docs/check.md",
    "docs/gradients.md",
    "docs/summary.md",
    "docs/weight-map.md",
]
PAGES = [*WITH_CODE, "CONTRIBUTING.md", "RELEASING.md", "docs/command-line.md", "docs/design.md"]


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(name)
    assert blocks
    namespace = {"__name__": name}
    for line, code in blocks:
        run(name, code, line, namespace)


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_lead_somewhere(name):
    file = ROOT / name
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8"))
    for link in links:
        if "://" not in link:
            assert (file.parent / link).exists(), link

"""Every Python block of the README and of docs/ runs, in order, in one namespace a file."""

import pytest

from tests import fake_hub
from tests.documents import ROOT, broken_links, python_blocks, run

pytestmark = pytest.mark.spread

WITH_CODE = [
    "README.md",
    "docs/tour.md",
    "docs/semantics.md",
    "docs/adapters.md",
    "docs/inheriting.md",
    "docs/depth.md",
    "docs/routing.md",
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
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub.install(monkeypatch, tmp_path / "hub")
    blocks = python_blocks(name)
    assert blocks
    namespace = {"__name__": name}
    for line, code in blocks:
        run(name, code, line, namespace)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    file = ROOT / name
    assert list(broken_links(file, file.read_text(encoding="utf-8"))) == []


def test_the_readme_is_short_and_no_page_is_forgotten():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    linked = {path for path in PAGES if f"]({path})" in readme}
    assert set(PAGES) - linked == {"README.md", "RELEASING.md"}  # the second is for maintainers: CONTRIBUTING has it
    assert all(f"](notebooks/{path.name})" in readme for path in ROOT.glob("notebooks/*.ipynb"))


def test_broken_links_are_found():
    text = "# A page\n## Its `name`, and more\n[a](README.md) [b](#its-name-and-more) `[c](gone.md)`\n"
    assert list(broken_links(ROOT / "page.md", text)) == []
    for link in ("gone.md", "#gone", "docs/semantics.md#gone", "docs/../gone.md#a"):
        assert list(broken_links(ROOT / "page.md", f"{text}[d]({link})")) == [link]
    assert not list(broken_links(ROOT / "page.md", "[d](docs/semantics.md#changing-a-trained-model)"))

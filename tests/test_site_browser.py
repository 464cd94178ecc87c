"""The site in headless Chromium: the search in pages that were opened as files, and whether everyone can use it."""

import pytest

from tests.documents import ROOT
from tests.inspection.test_plotting_browser import axe, chromium, serious  # noqa: F401

pytestmark = pytest.mark.slow

WORKER = """
addEventListener("message", async (event) => {
    await importScripts("words.js");
    postMessage(words[event.data] ?? "unknown");
});
"""
PAGE = """<!doctype html><title>waiting</title><script src="iframe-worker.js"></script><body><script>
    const worker = new Worker("worker.js"), answers = [];
    worker.addEventListener("message", (event) => {
        answers.push(event.data);
        document.title = answers.join(" ");
    });
    worker.postMessage("one");
    worker.postMessage("two");
</script></body>"""


def test_a_worker_answers_in_a_page_that_is_a_file(chromium, tmp_path):  # noqa: F811
    shim = (ROOT / "scripts/iframe-worker.js").read_text(encoding="utf-8")
    (tmp_path / "iframe-worker.js").write_text(shim, encoding="utf-8")
    (tmp_path / "worker.js").write_text(WORKER, encoding="utf-8")
    (tmp_path / "words.js").write_text("window.words = {one: 'un'};", encoding="utf-8")
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    page = chromium.new_page()
    try:
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.title === 'un unknown'", timeout=10_000)
    finally:
        page.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["index.html", "adapters.html", "reference/forms.html", "weight-map.html"])
def test_axe_finds_nothing_serious_on_a_page(name, width, chromium):  # noqa: F811
    path = ROOT / "site" / name
    assert path.is_file(), "the site is not built: make docs"
    page = chromium.new_page(viewport={"width": width, "height": 900})
    try:
        page.goto(path.as_uri())
        page.evaluate(axe())
        assert serious(page) == set()
    finally:
        page.close()

"""What looks the built site through finds what is wrong. The site itself is built and looked through by `make docs`."""

import sys

import pytest

from tests.documents import ROOT


@pytest.fixture
def check_site(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield __import__("check_site")
    for name in ("check_site", "site_pages"):
        del sys.modules[name]


def site(folder, body, other='<h1 id="top">Other</h1>'):
    (folder / "index.html").write_text(f"<html><body>{body}</body></html>")
    (folder / "other.html").write_text(other)
    return folder


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (
            '<a href="other.html#top">there</a> <a href="#here" id="here">here</a> <a href="https://keras.io">out</a>',
            None,
        ),
        ('<a href="gone.html">gone</a>', "index.html links to gone.html, which is not there"),
        ('<a href="other.html#bottom">gone</a>', "index.html links to other.html#bottom, which has no such anchor"),
        ('<a href="#there">gone</a>', "index.html links to #there, which has no such anchor"),
        ('<img src="gone.svg">', "index.html links to gone.svg, which is not there"),
        ('<script src="https://example.org/x.js"></script>', "index.html loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "index.html loads //example.org/x.css"),
    ],
)
def test_faults_of_a_page_are_found(check_site, tmp_path, body, fault):
    found = list(check_site.faults(site(tmp_path, body)))
    assert found == ([] if fault is None else [fault])


def test_a_style_that_loads_a_font_from_elsewhere_is_found(check_site, tmp_path):
    (site(tmp_path, "") / "a.css").write_text("@font-face { src: url('https://example.org/font.woff2') }")
    assert list(check_site.faults(tmp_path)) == ["a.css loads https://example.org/font.woff2"]


def test_public_names_that_the_reference_lacks_are_found(check_site, tmp_path):
    import tether

    missing = set(check_site.unnamed(tmp_path))
    assert {f"tether.ops.{name}" for name in tether.ops.__all__} <= missing
    (tmp_path / "reference").mkdir()
    names = "".join(f'<h2 id="tether.ops.{name}">{name}</h2>' for name in tether.ops.__all__ if name != "einsum")
    (tmp_path / "reference/ops.html").write_text(names)
    assert {name for name in check_site.unnamed(tmp_path) if name.startswith("tether.ops.")} == {"tether.ops.einsum"}
    assert {"tether.tie", "tether.errors.ShapeMismatch"} <= missing

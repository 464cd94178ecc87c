"""Looks the built site through: `python scripts/check_site.py` says what is wrong, and ends with 1 if anything is.

Every link leads to a file of the site and to an anchor in it, nothing is loaded from elsewhere, and every public name
has its place in the reference.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from site_pages import MODULES, public_names

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "prev", "next", "edit"}


class Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get(LOADED.get(tag)) and attrs.get("rel") not in NOT_LOADED:
            self.loads.append(attrs[LOADED[tag]])


def faults(site):
    """What is wrong with a built site, a line each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.loads:
            if urlsplit(link).netloc or urlsplit(link).scheme not in ("", "data"):
                yield f"{name} loads {link}"
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name} links to {link}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}, which has no such anchor"
    for path in sorted(site.rglob("*.css")):
        for url in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^)\"']*)", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads {url}"


def unnamed(site):
    """The public names that the reference of a built site lacks."""
    for module in ("tether", *(f"tether.{name}" for name in MODULES)):
        path = site / f"reference/{module.rpartition('.')[2]}.html"
        anchors = Page(path).anchors if path.exists() else set()
        modules = MODULES if module == "tether" else ()
        for name in public_names(module):
            if name not in modules and f"{module}.{name}" not in anchors:
                yield f"{module}.{name}"


def main():
    site = (ROOT / (sys.argv[1] if len(sys.argv) > 1 else "site")).resolve()
    found = [*faults(site), *(f"the reference lacks {name}" for name in unnamed(site))]
    print("\n".join(found) or f"{site}/index.html: every link leads somewhere, and nothing is loaded from elsewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The README as a package index shows it: its links are absolute. Hatch runs it when it builds the package.

In the repository links are relative, so that they work in every branch and on every machine. An index shows the text
alone; there they lead to the files of the version's tag, at the address that `project.urls` has in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
ABSOLUTE = re.compile(r"[a-z][a-z+.-]*:|#")
BLOCK = re.compile(r"(^```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)


def with_absolute_links(text: str, home: str, tag: str) -> str:
    """The Markdown with every relative link leading to a file of the repository; what is in blocks of code stays.

    Args:
        text: Markdown whose links are relative to the root of the repository.
        home: The address of the repository.
        tag: The tag or branch whose files are meant.
    """

    def absolute(link: re.Match[str]) -> str:
        if ABSOLUTE.match(link["target"]):
            return link[0]
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({home}/{kind}/{tag}/{link['target'].removeprefix('./')})"

    parts = BLOCK.split(text)  # the odd ones are blocks of code
    return "".join(part if place % 2 else LINK.sub(absolute, part) for place, part in enumerate(parts))


class ReadmeHook(MetadataHookInterface):
    """Gives the package its `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README to the metadata of the package."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        home, tag = metadata["urls"]["Homepage"], f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, home, tag)}

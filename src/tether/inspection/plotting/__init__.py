"""`tether.plot`: a map of the weights of a model, as a page or as a drawing."""

from __future__ import annotations

import base64
import os
import re
from html import escape
from pathlib import Path

from tether.atomic import written_beside
from tether.errors import TetherError, Unsupported, no_folder, received
from tether.inspection.collect import facts
from tether.inspection.plotting.pages import image, page

__all__ = ["WeightMap", "plot"]

_KINDS = {".html": page, ".svg": image}
_TALLEST = 640
"""Of a page inside a notebook; a higher one is scrolled."""
_AROUND = 160
"""About the height of what stands above the map in its page."""


class WeightMap(type(Path())):  # type: ignore[misc]  # before Python 3.12, only a system's own kind of path can be derived
    """The path of a weight map, which shows the map in a notebook."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        """The map as it is in its file. The page is in a frame, where it can neither reach the notebook nor load."""
        if self.suffix.lower() not in _KINDS or not self.is_file():
            return None
        content = self.read_text(encoding="utf-8")
        if self.suffix.lower() == ".svg":  # as an image, which runs nothing
            data = base64.b64encode(content.encode()).decode()
            return f'<img alt="{escape(self.name)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
        drawn = re.search(r'<svg class="map"[^>]* height="(\d+)"', content)
        height = min(int(drawn[1]) + _AROUND if drawn else _TALLEST, _TALLEST)
        return (
            f'<iframe title="{escape(self.name)}" sandbox="allow-scripts" srcdoc="{escape(content)}" '
            f'style="width:100%;height:{height}px;border:0"></iframe>'
        )


def plot(
    source: object,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    shared_only: bool = False,
) -> WeightMap:
    """Writes a weight map: what a model stores on one side, its layers on the other, ribbons for who reads what.

    Heights are bytes. What is shared or combined is strong and labelled with its expression, the rest is quiet.

    Args:
        source: A model or layer, the path of a `.keras`, `.weights.h5` or `.safetensors` file, or facts.
        path: Where to write: a page (`.html`) in which layers open and close, facts show under the pointer and
            names can be searched, or a drawing (`.svg`). Both are one file that loads nothing. A file that is there
            is replaced once the new one is complete. Left out, `<name of the model>-weights.html` in the current
            folder.
        title: What it says on top. Left out, whose weights they are.
        shared_only: Whether to leave out weights that have one use, by the layer that owns them. The totals on top
            are those of the whole model.

    Returns:
        The path of the file. In a notebook it shows the map when it is the last thing in a cell.

    Raises:
        TetherError: There is nothing to draw, or nothing shared, or the path ends in something else.
        FileNotFoundError: There is no such source, or no folder to write to.

    Example:
    ```python
    tether.plot(model, "weights.html")
    ```
    """
    if title is not None and not isinstance(title, str):
        raise TetherError(f"A title is a string. {received(title=title)}")
    if path is not None and Path(path).suffix.lower() not in _KINDS:
        raise Unsupported(f"A weight map is a .html or a .svg file. {received(path=os.fspath(path))}")
    found = facts(source)
    if not found.weights:
        raise TetherError(
            f"{found.name!r} has no weights, so there is nothing to draw. A model has them once it is built: give it "
            "an Input, or call it on data."
        )
    shown = found.shared_only() if shared_only else found
    if not shown.weights:
        raise TetherError(
            f"{found.name!r} has no weight that is shared or combined, so shared_only=True leaves nothing to draw. "
            + ("Leave it out." if found.ties else "This file does not say which layers share: the model does.")
        )
    target = WeightMap(path if path is not None else f"{_file_name(found.name)}-weights.html")
    if not target.parent.is_dir():
        raise FileNotFoundError(no_folder(target))
    content = _KINDS[target.suffix.lower()](found, shown, f"Weights of {found.name}" if title is None else title)
    with written_beside(target) as beside:
        beside.write_text(content, encoding="utf-8", newline="\n")
    return target


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100].lstrip(".") or "model"

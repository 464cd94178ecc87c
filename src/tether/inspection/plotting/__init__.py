"""`tether.plot`: a map of the weights of a model, as a page or as a drawing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tether.atomic import written_beside
from tether.errors import TetherError, Unsupported, received
from tether.inspection.collect import facts
from tether.inspection.plotting.drawing import image, page

__all__ = ["plot"]

_KINDS = {".html": page, ".svg": image}


def plot(source: object, path: str | os.PathLike[str] | None = None, *, title: str | None = None) -> Path:
    """Writes a weight map: what a model stores on one side, its layers on the other, ribbons for who reads what.

    Heights are bytes. What is shared or combined is strong and labelled with its expression, the rest is quiet.

    Args:
        source: A model or layer, the path of a `.keras`, `.weights.h5` or `.safetensors` file, or facts.
        path: Where to write: a page (`.html`) in which layers open and close, facts show under the pointer and
            names can be searched, or a drawing (`.svg`). Both are one file that loads nothing. A file that is there
            is replaced once the new one is complete. Left out, `<name of the model>-weights.html` in the current
            folder.
        title: What it says on top. Left out, whose weights they are.

    Returns:
        The path of the file.

    Raises:
        TetherError: There is nothing to draw, or the path ends in something else.
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
    target = Path(path) if path is not None else Path(f"{_file_name(found.name)}-weights.html")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write {target.name!r} to.")
    content = _KINDS[target.suffix.lower()](found, f"Weights of {found.name}" if title is None else title)
    with written_beside(target) as beside:
        beside.write_text(content, encoding="utf-8", newline="\n")
    return target


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[:100].lstrip(".") or "model"

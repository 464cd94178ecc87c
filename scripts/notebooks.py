"""Runs the notebooks' sources and writes the notebooks: `python scripts/notebooks.py [name ...]`.

A source is a program in `notebooks/` with a `# %%` before each cell, `# %% [markdown]` before one of text. The notebook
beside it has the cells, and what they printed here.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import keras

FOLDER = Path(__file__).parents[1] / "notebooks"


def cells(text):
    """The kind and the text of each cell of a source."""
    found = []
    for part in ("\n" + text).split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = (line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            found.append(("markdown", "\n".join(lines).strip()))
        else:
            found.append(("code", body.strip()))
    return found


def notebook_of(name, found, outputs):
    """A notebook, as what JSON can hold."""
    written = []
    for place, ((kind, source), output) in enumerate(zip(found, outputs, strict=True)):
        cell = {"cell_type": kind, "id": f"{name.replace('_', '-')}-{place}"[-64:], "metadata": {}}
        cell["source"] = source.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
            if output:
                cell["outputs"] = [
                    {"name": "stdout", "output_type": "stream", "text": output.splitlines(keepends=True)}
                ]
        written.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def run(name, text):
    """What each cell printed, all run in one namespace in a folder of their own."""
    keras.utils.clear_session()  # so that names do not depend on what ran before
    namespace, printed = {"__name__": "__main__"}, []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for place, (kind, source) in enumerate(cells(text)):
            out = io.StringIO()
            if kind == "code":
                with contextlib.redirect_stdout(out):
                    exec(compile(source, f"<cell {place} of {name}>", "exec"), namespace)
            printed.append(out.getvalue())
    return printed


def main():
    os.environ.setdefault("COLUMNS", "100")
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py")):
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        notebook = notebook_of(name, cells(text), run(name, text))
        written = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.ipynb").write_text(written, encoding="utf-8")
        print(f"written: notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()

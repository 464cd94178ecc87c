"""Options and arguments that several commands have, and how they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Argument(metavar="FILE", help="A .keras, .weights.h5 or .safetensors file.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A .keras file.")]
Custom = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE[:CLASS]",
        help="Import a module of your own that registers its classes with Keras, or a class by name. Repeatable.",
    ),
]
Load = Annotated[
    bool, typer.Option("--load", help="Load the model, in Keras's safe mode, instead of reading its file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME=]SIZES[:DTYPE]",
        help="Sizes of one example: 28,28,1 or none,64 or words=128:int32. Once for each input.",
    ),
]


def examples(*lines: str) -> str:
    """What a command's help ends with."""
    return "\n  ".join(("\b\nExamples:", *lines))  # \b: typer leaves the lines as they are


def print_json(data: object) -> None:
    """Prints what JSON can hold."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))

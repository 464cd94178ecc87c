"""What commands have in common: options, how they print, and the one line that they say while they work or fail."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

# --------------------------------------------------------------------------- errors
# What goes wrong is one line on stderr and the exit code 2; a traceback comes only if it is asked for.


EXIT_CODE = 2
MAX_CHARACTERS = 700
ASKS = "--traceback"


class Failed(Exception):
    """Something that the person at the shell can mend; the message says how."""


class Commands(typer.core.TyperGroup):
    """The group of all commands: it turns the errors that are expected into a line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes `--traceback` wherever it stands, since a command is repeated with it at the end."""
        if ASKS in args:
            args = [ASKS, *(argument for argument in args if argument != ASKS)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command, and makes one line of what goes wrong."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not _is_expected(error):
                raise
            if ctx.params.get("traceback"):
                traceback.print_exc()
            else:
                typer.echo(f"tether: {one_line(error)}", err=True)
            raise typer.Exit(EXIT_CODE) from error


def _is_expected(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has gone: nothing to tell anybody
        return False
    if isinstance(error, (Failed, OSError)):
        return True
    errors = sys.modules.get("tether.errors")  # not imported before it is needed
    return errors is not None and isinstance(error, errors.TetherError)


def one_line(error: BaseException) -> str:
    """The first paragraph of an error's message, on one line; with the second if the first announces it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    paragraphs = [" ".join(part.split()) for part in str(error).split("\n\n") if part.strip()]
    text = paragraphs[0] if paragraphs else type(error).__name__
    if text.endswith(":"):
        text = " ".join(paragraphs[:2])
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


# --------------------------------------------------------------------------- waiting
# A spinner on stderr for what takes longer than a second; nothing where nobody watches.


PATIENCE = 1.0
"""Seconds after which a person wants to know."""


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Says what is going on, if it goes on for long and stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    status = console.status(f"{what} …")
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # or it could start after it was stopped
        status.stop()


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

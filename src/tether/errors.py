"""The errors of Tether: each says what was expected, what came, and what to write instead."""

from __future__ import annotations

import difflib
import operator
import os
import pathlib
import reprlib
from collections.abc import Iterable
from typing import Any

import keras


class TetherError(ValueError):
    """The base of every error that Tether raises on purpose.

    It is a `ValueError`, so code that guards a Keras call already catches it.
    """

    # TensorFlow's AutoGraph raises an error of a user's function again, with a longer message: one that is made so.
    __init__ = Exception.__init__


class ShapeMismatch(TetherError):
    """Shapes that have to agree do not."""


class UnknownName(TetherError):
    """A path names no weight of the layer, or names more than one."""


class UnknownShape(TetherError):
    """A shape is needed and nothing has told it yet."""


class NotATensor(TetherError, TypeError):
    """An expression, or a form, was given to what computes with tensors.

    It is a `TypeError` too, as Python, Keras and the backends raise where something has the wrong type: what they do
    next after one (an operator hands over to the other operand) they do after this one.
    """


class NotInvertible(TetherError):
    """A value cannot be pushed back through an expression into its stored weights."""


class UnboundArgument(TetherError):
    """An expression with an argument was evaluated outside a call that binds it."""


class ChosenForEach(UnboundArgument, NotImplementedError):
    """A single value was asked for, and each example chooses a value of its own.

    It is a `NotImplementedError` for Keras, which goes on with its own loop where a fused one cannot have such weights.
    """


class InvalidConfig(TetherError):
    """A serialised expression, weight or tie cannot be read, or must not be trusted."""


class Unsupported(TetherError):
    """The combination is known not to work; the message names the supported way."""


class LostTie(TetherError):
    """Saving would lose a tie, or loading has lost one."""


class ValueConflict(TetherError):
    """A file holds two different values for one stored weight."""


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 4, 200, 200
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 20


def received(**values: object) -> str:
    """Formats the closing sentence of an error: `Received: name=value, ...`, values shortened."""
    return "Received: " + ", ".join(f"{name}={_short.repr(value)}" for name, value in values.items()) + "."


def did_you_mean(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """` Did you mean 'kernel'?`, of the names that are like a word; nothing where none is."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=cutoff) if isinstance(word, str) else []
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def not_there(module: str, name: str, names: Iterable[str]) -> str:
    """What to say of a name that a module does not have."""
    known = list(names)
    return f"`{module}` has no {name!r}.{did_you_mean(name, known)} It has: {', '.join(known)}."


def no_file(path: str | os.PathLike[str]) -> str:
    """What to say of the path of a file that is none: whether it is a folder, and what there is beside it."""
    target = pathlib.Path(path)
    said = f"There is no file {str(path)!r}."
    if target.is_dir():
        return f"{said} It is a folder: name a file in it. It has: {_content(target)}."
    if not target.parent.is_dir():
        return f"{said} There is no folder {str(target.parent)!r} either; the present one is {os.getcwd()!r}."
    near = did_you_mean(target.name, sorted(each.name for each in target.parent.iterdir()), cutoff=0.5)
    return f"{said}{near} Its folder has: {_content(target.parent)}."


def _content(folder: pathlib.Path) -> str:
    return listed(sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))) or "nothing"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a message: the first of them, and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def no_folder(path: str | os.PathLike[str]) -> str:
    """What to say of the path of a file to be written into a folder that does not exist."""
    parent = os.path.dirname(os.fspath(path))
    return (
        f"There is no folder {parent!r} to write {os.path.basename(os.fspath(path))!r} to. Make it first: "
        f"`os.makedirs({parent!r})`."
    )


# --------------------------------------------------------------------------- checks of what a caller or a file gave
# Values that a caller or a file gave, made what they have to be.


NUMERIC = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip
"""Keras's names of the dtypes of real numbers."""


def as_int(value: Any, what: str) -> int:
    """An integer that is no bool."""
    if isinstance(value, bool):
        raise InvalidConfig(f"{what} must be an integer. {received(value=value)}")
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidConfig(f"{what} must be an integer. {received(value=value)}") from None


def as_ints(values: object, what: str) -> tuple[int, ...]:
    """A tuple of integers, from a list of a file or a tuple of a caller."""
    if not isinstance(values, (list, tuple)):
        raise InvalidConfig(f"{what} must be a list of integers. {received(value=values)}")
    return tuple(as_int(value, what) for value in values)


def as_dtype(value: object) -> str:
    """Keras's name of a dtype of real numbers."""
    try:
        dtype = None if value is None else str(keras.backend.standardize_dtype(value))
    except (ValueError, TypeError):
        dtype = None
    if dtype not in NUMERIC or dtype is None:
        raise InvalidConfig(
            f"A dtype is one of {', '.join(sorted(NUMERIC))}.{did_you_mean(value, NUMERIC)} {received(dtype=value)}"
        )
    return dtype

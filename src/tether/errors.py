"""The errors of Tether: each says what was expected, what came, and what to write instead."""

from __future__ import annotations

import reprlib


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

"""The patterns by which weights are chosen, the same in every function that takes some.

- A string is a shell pattern over the whole path: `*` stands for anything, slashes too, `?` for one character, `[ab]`
  for one of these. `"encoder/*/query/kernel"`, `"*kernel"`.
- `"!head/*"` leaves out what the rest of it fits.
- `re.compile(...)` is a regular expression that has to fit the whole path.
- `"all-linear"` stands for the kernels of Dense and EinsumDense layers, those in attention included.
- A list goes through its patterns in order, and the last one that fits decides: `["*/kernel", "!head/*"]`. One that
  begins by leaving out begins with all.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from tether.errors import TetherError, received

Pattern: TypeAlias = "str | re.Pattern[str] | Sequence[str | re.Pattern[str]]"
"""What chooses weights by their paths."""

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
"""The word for all kernels of Dense and EinsumDense layers."""


def fits(pattern: Pattern, *names: str, words: Mapping[str, bool] | None = None) -> bool:
    """Whether a pattern chooses what has these names.

    Args:
        pattern: The pattern.
        *names: What it is called: any of them may fit.
        words: Words that stand in the place of patterns, and whether each means it.

    Raises:
        TetherError: It is no pattern.
    """
    each = list(parts(pattern))
    chosen = bool(each) and leaves_out(each[0])
    for one in each:
        if isinstance(one, re.Pattern):
            chosen = chosen or any(one.fullmatch(name) for name in names)
        elif one.startswith("!"):
            chosen = chosen and not _is_one(one[1:], names, words or {})
        else:
            chosen = chosen or _is_one(one, names, words or {})
    return chosen


def _is_one(pattern: str, names: Iterable[str], words: Mapping[str, bool]) -> bool:
    """Whether a shell pattern fits one of several names, or is one: a layer may be called `[a]`."""
    if pattern in words:
        return words[pattern]
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def parts(pattern: object) -> Iterable[str | re.Pattern[str]]:
    """The patterns of a list, or the one pattern.

    Raises:
        TetherError: It is neither.
    """
    found = [pattern] if isinstance(pattern, (str, re.Pattern)) else pattern
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(p, (str, re.Pattern)) for p in found):
        raise TetherError(
            "Weights are chosen by a path, a pattern such as '*/query/kernel', `re.compile(...)`, or a list of these. "
            f"{received(pattern=pattern)}"
        )
    return found


def spread(given: Mapping[Any, Value], choose: Callable[[Any], Iterable[str]]) -> dict[str, Value]:
    """What is given by patterns, for each name that they choose: a later one counts, `"!..."` leaves out.

    Args:
        given: Values by pattern.
        choose: The names that a pattern means.
    """
    found: dict[str, Value] = {}
    for pattern, value in given.items():
        excluding = leaves_out(pattern)
        for name in choose(pattern[1:] if excluding else pattern):
            if excluding:
                found.pop(name, None)
            else:
                found[name] = value
    return found


def is_exact(pattern: object) -> bool:
    """Whether a pattern can only mean one name."""
    if not isinstance(pattern, str) or pattern == ALL_LINEAR:
        return False
    return not pattern.startswith("!") and not any(sign in pattern for sign in "*?[")


def leaves_out(pattern: object) -> bool:
    """Whether a pattern of a list leaves out what the rest of it fits."""
    return isinstance(pattern, str) and pattern.startswith("!")


def missed(pattern: object, names: Iterable[str], what: str = "weight") -> str:
    """What to say of a pattern that fits none of these names: the nearest of them, and how many there are."""
    known = list(dict.fromkeys(names))
    if not known:
        return f"It has no {what}s."
    words = pattern if isinstance(pattern, str) else " ".join(str(getattr(p, "pattern", p)) for p in parts(pattern))
    near = _nearest(words.strip("!*?"), known)
    meant = f"Did you mean {', '.join(map(repr, near))}? " if near else ""
    listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    return f"{meant}It has {len(known)} {what}{'s' if len(known) > 1 else ''}: {listed}."


def _nearest(word: str, known: list[str]) -> list[str]:
    tails = {name[-len(word) - 2 :] if word else name: name for name in reversed(known)}
    whole = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    ends = difflib.get_close_matches(word, tails, n=3, cutoff=0.7)
    return list(dict.fromkeys([*whole, *(tails[end] for end in ends)]))[:3]


__all__ = ["ALL_LINEAR", "Pattern", "fits", "is_exact", "leaves_out", "missed", "parts", "spread"]

"""Which weight is which where many are shared at once, instead of one expression for each.

In the place of an expression, a layer stands for its weights, and a string for weights of the layer that is tied: each
weight that the key names shares the one that corresponds to it. What the stars of the source stand for is what the last
stars of the key stand for: `{"layers/*/attention/**": "layers/0/attention/**"}`. A layer has what the last star stands
for if the key ends in one after a slash, and else the whole path of the target. Nothing is changed here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import keras

from tether import patterns
from tether.errors import ShapeMismatch, TetherError, UnknownName
from tether.layers.tying import paths
from tether.layers.tying.state import shape_of

Origin: TypeAlias = "str | keras.Layer"
"""What stands for many weights in the place of an expression."""
Key: TypeAlias = "str | re.Pattern[str] | tuple[str | re.Pattern[str], ...]"


@dataclass(frozen=True)
class Source:
    """The weight that another one is to share: where, and by which path from there."""

    root: keras.Layer
    path: str


class Counterparts:
    """The weights of one layer, and what each is to share.

    Args:
        root: The layer that is tied.
    """

    def __init__(self, root: keras.Layer) -> None:
        self.root, self.mine = root, _Weights(root)
        self._others: dict[int, _Weights] = {id(root): self.mine}
        self._missing: dict[Source, UnknownName] = {}

    def of(self, key: Key, origin: Origin) -> dict[str, Source]:
        """What the weights that a key names are to share, by their paths.

        A counterpart that is not there is an error in `checked` only: a later key may leave the weight out.

        Raises:
            UnknownName: The key names no weight, or the origin has one that the target lacks.
            TetherError: Not enough is built to know.
        """
        theirs = self._weights_of(self.root if isinstance(origin, str) else origin)
        if isinstance(key, str) and patterns.is_exact(key):
            wanted = origin if isinstance(origin, str) else key
            if key in self.mine.spelled or not (self.mine.below(key) or theirs.below(wanted) or self._is_new(theirs)):
                return {key: self._source(theirs, wanted, key)}
            key = f"{key}/*"
        template = _template(key, origin, theirs)
        if not self.mine.all and not self.root.built:
            return self._of_unbuilt(key, template, theirs)
        _refuse_unknown(theirs)
        found: dict[str, Source] = {}
        around: dict[tuple[str, ...], str] = {}
        stars = template.count("*")
        for weight in self.mine.all:
            if not patterns.fits(key, *weight.spellings):
                continue
            path, tried = weight.spellings[0], []
            for spelling in weight.spellings:
                captured = _captured(key, spelling)
                if captured is None:
                    continue
                if len(captured) < stars:
                    raise TetherError(f"{origin!r} has more stars than {key!r}, which say what they stand for.")
                before, filling = captured[: len(captured) - stars], captured[len(captured) - stars :]
                name = _filled(template, filling) if template else spelling
                tried.append(name)
                if name in theirs.spelled:
                    around.setdefault(before, weight.name)
                    break
            found[path] = self._source(theirs, tried[-1] if tried[-1] in theirs.spelled else tried[0], path)
        if not found:
            raise UnknownName(
                f"No weight of {self.root.name!r} fits the pattern {key!r}. {patterns.missed(key, self.mine.spelled)}"
            )
        self._refuse_incomplete(key, template, theirs, around)
        return found

    def checked(self, found: Mapping[str, Source]) -> dict[str, Source]:
        """What is shared in the end, without weights that are their own counterparts.

        Raises:
            UnknownName: A weight has no counterpart.
            ShapeMismatch: It has one of another shape.
        """
        for path, source in found.items():
            if source in self._missing:
                raise self._missing[source]
            mine, theirs = self.mine.spelled.get(path), self._weights_of(source.root).spelled.get(source.path)
            if mine is not None and theirs is not None and mine.shape != theirs.shape:
                raise ShapeMismatch(
                    f"{path!r} of {self.root.name!r} has shape {mine.shape}, and {source.path!r} of "
                    f"{source.root.name!r}, which it is to share, has shape {theirs.shape}. Give the layers one size, "
                    f"or leave this weight out: `'!{path}': None` after the others."
                )
        return {path: source for path, source in found.items() if not self._is_itself(path, source)}

    def _is_itself(self, path: str, source: Source) -> bool:
        mine, theirs = self.mine.spelled.get(path), self._weights_of(source.root).spelled.get(source.path)
        return mine is not None and theirs is not None and mine.variable is theirs.variable

    def _source(self, theirs: _Weights, wanted: str, path: str) -> Source:
        if wanted in theirs.spelled:
            return Source(theirs.root, theirs.spelled[wanted].spellings[0])
        source = Source(theirs.root, wanted)
        if theirs.root.built or theirs.all:  # else it has it when it is built, or there is an error then
            self._missing[source] = UnknownName(
                f"{path!r} of {self.root.name!r} is to share {wanted!r} of {theirs.root.name!r}, which has no such "
                f"weight. {patterns.missed(wanted, theirs.names)} To share the others, leave this one out, after "
                f"them: `'!{path}': None`."
            )
        return source

    def _is_new(self, theirs: _Weights) -> bool:
        """Whether it is the source that has to say what a layer without weights is going to have."""
        return not self.mine.all and not self.root.built and theirs is not self.mine and bool(theirs.all)

    def _of_unbuilt(self, key: Key, template: str, theirs: _Weights) -> dict[str, Source]:
        """What a layer that is not built is going to share: the source says what it has."""
        prefix = re.sub(r"/?\*+$", "", key) if isinstance(key, str) and key.endswith("*") else "*"
        origin = template[:-1].rstrip("/")
        if (prefix and not patterns.is_exact(prefix)) or "*" in origin or not template.endswith("*"):
            raise TetherError(
                f"{self.root.name!r} is not built, so that nobody knows which weights {key!r} means. Build it first: "
                f"`{self.root.name}.build(input_shape)`; or give the path of a layer in it."
            )
        _refuse_unknown(theirs)
        found = {}
        for weight in theirs.all:
            path = next((s for s in weight.spellings if not origin or s.startswith(f"{origin}/")), None)
            if path is not None:
                own = path[len(origin) + 1 :] if origin else path
                found[f"{prefix}/{own}" if prefix else own] = Source(theirs.root, weight.spellings[0])
        return found

    def _refuse_incomplete(
        self, key: Key, template: str, theirs: _Weights, around: Mapping[tuple[str, ...], str]
    ) -> None:
        """Refuses a source with a weight that a layer which shares it has not: the two are made otherwise."""
        if "*" not in template:
            return
        captured = (_captured(key, spelling) for weight in self.mine.all for spelling in weight.spellings)
        there = {each for each in captured if each is not None}
        for weight in theirs.all:
            parts = [part for spelling in weight.spellings if (part := _captured(template, spelling)) is not None]
            for before, example in around.items() if parts else ():
                expected = [(*before, *part) for part in parts]
                if not any(each in there for each in expected) and _means(key, expected):
                    raise UnknownName(
                        f"{theirs.root.name!r} has the weight {weight.name!r}, and {self.root.name!r} has none "
                        f"that corresponds to it beside {example!r}: the two are made otherwise. Name the weights that "
                        "both have, or leave this one out: `('*', '!*bias')`."
                    )

    def _weights_of(self, root: keras.Layer) -> _Weights:
        if id(root) not in self._others:
            self._others[id(root)] = _Weights(root)
        return self._others[id(root)]


# --------------------------------------------------------------------------- names


@dataclass(frozen=True, eq=False)
class _Spelled:
    """A weight below a layer, with the ways in which its path may be written, the canonical one first."""

    spellings: tuple[str, ...]
    name: str
    """The one that errors have."""
    variable: keras.Variable

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.variable)


class _Weights:
    """The weights below one layer, at every place."""

    def __init__(self, root: keras.Layer) -> None:
        self.root = root
        self.all = [
            _Spelled(tuple(dict.fromkeys(map("/".join, (path, mixed, names)))), "/".join(mixed), variable)
            for path, names, mixed, _, variable in paths.walk_spelled(root)
        ]

    @cached_property
    def spelled(self) -> dict[str, _Spelled]:
        """Each by its paths, as far as these name one weight only."""
        found: dict[str, _Spelled | None] = {}
        for weight in self.all:
            for spelling in weight.spellings:
                known = found.setdefault(spelling, weight)
                if known is not None and known.variable is not weight.variable:
                    found[spelling] = None
        return {spelling: weight for spelling, weight in found.items() if weight is not None}

    @property
    def names(self) -> list[str]:
        """A path of each, for errors."""
        return [weight.name for weight in self.all]

    def below(self, path: str) -> bool:
        """Whether a path is that of a layer: weights are below it."""
        return any(spelling.startswith(f"{path}/") for weight in self.all for spelling in weight.spellings)


def _refuse_unknown(theirs: _Weights) -> None:
    if not theirs.all:
        is_new = "is not built, so that nobody knows which weights" if not theirs.root.built else "has no weights that"
        raise TetherError(
            f"{theirs.root.name!r} {is_new} are to be shared. Call it on data, or build it: "
            f"`{theirs.root.name}.build(input_shape)`."
        )


# --------------------------------------------------------------------------- stars


def _template(key: Key, origin: Origin, theirs: _Weights) -> str:
    """The source's path, with stars for what the last stars of the key stand for; empty if it is the target's path."""
    if isinstance(origin, str):
        template = re.sub(r"\*+", "*", origin)
        return f"{template}/*" if "*" not in template and theirs.below(template) else template
    last = _positive(key)[-1:]
    ends = any(
        one.groups > 0 if isinstance(one, re.Pattern) else re.fullmatch(r"(.*/)?\*+", one) is not None for one in last
    )
    return "*" if ends else ""


def _positive(key: Key) -> list[str | re.Pattern[str]]:
    return [one for one in patterns.parts(key) if not (isinstance(one, str) and one.startswith("!"))] or ["*"]


def _captured(key: Key, name: str) -> tuple[str, ...] | None:
    """What the stars of a pattern (the groups of a regular expression) stand for in a name that it fits."""
    for one in reversed(_positive(key)):
        match = (one if isinstance(one, re.Pattern) else _expression(one)).fullmatch(name)
        if match is not None:
            return tuple(group or "" for group in match.groups())
    return None


def _expression(pattern: str) -> re.Pattern[str]:
    """A shell pattern with a group for each run of stars, of which the last takes what it can."""
    pieces = re.split(r"(\*+|\[[^\]]+\])", pattern)
    last = max((place for place, piece in enumerate(pieces) if piece.startswith("*")), default=-1)
    found = ""
    for place, piece in enumerate(pieces):
        if piece.startswith("*"):
            found += "(.*)" if place == last else "(.*?)"
        elif piece:
            translated = fnmatch.translate(piece)  # "(?s:...)" and a sign of the end
            found += translated[: translated.rindex(")") + 1]
    return re.compile(found, re.DOTALL)


def _filled(template: str, captured: tuple[str, ...]) -> str:
    parts = re.split(r"\*+", template)
    return "".join(part + text for part, text in zip(parts, (*captured, ""), strict=True))


def _means(key: Key, expected: list[tuple[str, ...]]) -> bool:
    """Whether a key names what its stars would stand for, if it were there: a list may leave it out."""
    last = _positive(key)[-1]
    if isinstance(last, re.Pattern):
        return True
    fitting = [each for each in expected if len(re.findall(r"\*+", last)) == len(each)]
    return not fitting or patterns.fits(key, *(_filled(last, each) for each in fitting))


__all__ = ["Counterparts", "Origin", "Source"]

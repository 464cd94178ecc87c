"""How what a model stores is to lie on a mesh of devices, by what is said of its uses: from names and shapes alone.

`tether.distribution.layout_map` makes a map of it, and `tether.check` compares it with how the variables do lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import keras

from tether.layers.tying import paths
from tether.layers.tying.state import View, shape_of
from tether.weights.expression import Expression, Shape, Stored, known_shape
from tether.weights.placement import Spec, Traced, answer, fitted, is_base, is_read_by_entry, standing, tracing

Answer = Callable[[tuple[str, ...], Mapping[str, bool], bool], tuple[object, Spec] | None]
"""What a layout map says of what has these names (and is meant by these words), and whether that was made for another
weight: its key that fits, and the layout."""


@dataclass(frozen=True)
class Said:
    """What a layout map says of one use of a stored weight, and what that makes of the weight."""

    name: str
    key: object
    asked: Spec
    expression: Expression | None
    """What the use computes; nothing, if it is the weight itself."""
    spec: Spec
    """The layout of the stored weight."""
    known: tuple[bool, ...]
    """Of which of its axes that says anything."""

    def __str__(self) -> str:
        through = "" if self.expression is None else f" = {self.expression.notation()}"
        made = "" if self.spec == self.asked else f", which makes {self.spec} of the weight"
        return f"{self.name!r}{through} is {self.asked} by the key {self.key!r}{made}"

    def agrees(self, other: Said) -> bool:
        """Whether both make the same of the axes that both speak of."""
        pairs = zip(self.spec, self.known, other.spec, other.known, strict=True)
        return all(mine == theirs for mine, known, theirs, also in pairs if known and also)


@dataclass(frozen=True)
class LayoutConflict:
    """Two uses that make different layouts of one weight."""

    path: str
    shape: Shape
    one: Said
    other: Said
    instead: Spec | None
    """What the other would have to be, to agree with the first."""

    def __str__(self) -> str:
        mended = "" if self.instead is None else f": for example {self.other.name!r} as {self.instead}"
        return (
            f"Two layouts are said of the stored weight {self.path!r}, of shape {self.shape}: {self.one}; "
            f"{self.other}. It lies in one way, so they have to agree{mended}."
        )


@dataclass(frozen=True)
class Misfit:
    """A layout that does not fit the shape of what it is said of."""

    name: str
    key: object
    asked: Spec
    shape: Shape
    axis: int | None = None
    """The axis that the devices do not divide evenly; `None` if there is another number of axes."""


@dataclass
class LaidOut:
    """How a model's variables are to lie, and what speaks against it."""

    specs: list[tuple[keras.Variable, Spec]] = field(default_factory=list)
    conflicts: list[LayoutConflict] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)
    undivided: list[Misfit] = field(default_factory=list)
    keys: list[object] = field(default_factory=list)
    """The keys of the map that fit something."""


@dataclass(frozen=True)
class _Use:
    names: tuple[str, ...]
    words: Mapping[str, bool]
    variable: keras.Variable

    @property
    def expression(self) -> Expression | None:
        return self.variable.expression if isinstance(self.variable, View) else None


def laid_out(model: keras.layers.Layer, answer: Answer, sizes: Mapping[str, int]) -> LaidOut:
    """How what a model stores is to lie, by what a layout map says of its uses.

    Args:
        model: A model or layer that is built.
        answer: What the map says.
        sizes: How many devices each axis of the mesh has.
    """
    return _Working(model, answer, sizes).found


class _Working:
    def __init__(self, model: keras.layers.Layer, answer: Answer, sizes: Mapping[str, int]) -> None:
        self.answer, self.sizes, self.found = answer, sizes, LaidOut()
        uses = [
            _Use(("/".join(names), "/".join(path), variable.path), paths.words_of(layer, variable), variable)
            for path, names, layer, variable in paths.walk(model)
        ]
        asked = [self._asked(use.names, use.words, shape_of(use.variable)) for use in uses]
        self.said: dict[int, list[Said]] = {}
        self.settled: dict[int, tuple[keras.Variable, Spec]] = {}
        weights: dict[int, tuple[Stored, Expression]] = {}
        for use in uses:
            expression = use.expression
            for weight in () if expression is None else expression.weights_used():
                if weight.is_built and expression is not None:
                    weights.setdefault(id(weight.variable), (weight, expression))
        for weight, expression in weights.values():
            self._say_of_itself(weight, expression)
        for use, of_use in zip(uses, asked, strict=True):
            if use.expression is not None:
                self._say_of_integers(use.expression)
            if of_use is not None:
                self._say_of_use(use, *of_use)
        variables = {id(use.variable): use.variable for use in uses}
        for key, found in self.said.items():
            owner = weights[key][0] if key in weights else None
            self._agree(variables[key] if owner is None else owner.variable, owner, found)
        for use, of_use in zip(uses, asked, strict=True):
            if use.expression is not None:
                self._settle(use.expression, None if of_use is None else of_use[1])
        self.found.specs = list(self.settled.values())

    def _asked(
        self,
        names: tuple[str, ...],
        words: Mapping[str, bool],
        shape: Shape,
        *,
        of: Stored | None = None,
        entry: bool = False,
    ) -> tuple[object, Spec] | None:
        """The key and the layout that the map has for a shape; what does not fit it is noted and is nothing."""
        answer = self.answer(names, words, of is not None and of.role is not None)
        if answer is None:
            return None
        key, spec = answer
        if key not in self.found.keys:
            self.found.keys.append(key)
        if entry and len(spec) == len(shape) - 1:
            spec = (None, *spec)
        if len(spec) != len(shape):
            self.found.misfits.append(Misfit(names[0], key, spec, shape))
            return None
        found = fitted(spec, shape, self.sizes)
        for axis, (name, kept) in enumerate(zip(spec, found, strict=True)):
            if name != kept:
                self.found.undivided.append(Misfit(names[0], key, spec, shape, axis))
        return key, found

    def _say_of_integers(self, expression: Expression) -> None:
        """What is said of a weight that is stored as integers now, by its own path."""
        for path, node in standing(expression):
            asked = self._asked((path,), {}, node.shape or ())
            if asked is None:
                continue
            traced = Traced(node, self.sizes)
            traced.say(asked[1])
            for weight in node.weights_used():
                if weight.is_built and id(weight.variable) not in self.said:
                    said = Said(path, asked[0], asked[1], node, traced.of(weight), traced.is_said(weight))
                    self.said[id(weight.variable)] = [said]

    def _say_of_itself(self, weight: Stored, expression: Expression) -> None:
        shape = known_shape(weight)
        asked = self._asked((weight.path,), {}, shape, of=weight, entry=is_read_by_entry(weight, expression))
        if asked is not None:
            every = (True,) * len(shape)
            self.said[id(weight.variable)] = [Said(weight.path, asked[0], asked[1], None, asked[1], every)]

    def _say_of_use(self, use: _Use, key: object, asked: Spec) -> None:
        if use.expression is None:
            said = Said(use.names[0], key, asked, None, asked, (True,) * len(asked))
            self.said.setdefault(id(use.variable), []).append(said)
            return
        if use.expression.shape is None:
            return
        traced = Traced(use.expression, self.sizes)
        traced.say(asked)
        for weight in use.expression.weights_used():
            if weight.is_built and is_base(weight):
                through = None if use.expression is weight else use.expression
                known, spec = traced.is_said(weight), traced.of(weight)
                if any(known):
                    said = Said(use.names[0], key, asked, through, spec, known)
                    self.said.setdefault(id(weight.variable), []).append(said)

    def _agree(self, variable: keras.Variable, weight: Stored | None, found: list[Said]) -> None:
        """Settles one variable by all that is said of it."""
        spec: list[str | None] = [None] * len(variable.shape)
        for said in found:
            against = next((other for other in found[: found.index(said)] if not said.agrees(other)), None)
            if against is not None:
                self.found.conflicts.append(self._conflict(variable, weight, against, said))
                continue
            spec = [new if known else old for old, new, known in zip(spec, said.spec, said.known, strict=True)]
        self.settled[id(variable)] = (variable, tuple(spec))

    def _conflict(self, variable: keras.Variable, weight: Stored | None, one: Said, other: Said) -> LayoutConflict:
        instead = one.spec
        if weight is not None and other.expression is not None:
            traced = Traced(other.expression, self.sizes)
            traced.say(one.spec, weight)
            instead = traced.value
        return LayoutConflict(
            variable.path, shape_of(variable), one, other, None if instead == other.asked else instead
        )

    def _settle(self, expression: Expression, asked: Spec | None) -> None:
        """Lets what nothing is said of follow what it is used with."""
        weights = expression.weights_used()
        if expression.shape is None or not all(weight.is_built for weight in weights):
            return
        bases: dict[Expression, Spec | None] = {
            weight: self.settled.get(id(weight.variable), (None, None))[1] for weight in weights if is_base(weight)
        }
        traced = tracing(expression, asked, bases, self.sizes)
        for weight in weights:
            spec = () if traced is None else traced.of(weight)
            if id(weight.variable) not in self.settled and any(spec):
                self.settled[id(weight.variable)] = (weight.variable, spec)


def answer_of(layouts: keras.distribution.LayoutMap) -> Answer:
    """What a layout map of Keras's says, by its own rule: a path, or one regular expression that fits."""

    def said(names: tuple[str, ...], words: Mapping[str, bool], made: bool) -> tuple[object, Spec] | None:
        for name in names:
            layout = answer(layouts, name, made=made)
            if layout is not None:
                return _key(layouts, name, layout), tuple(layout.axes)
        return None

    own: Answer | None = getattr(layouts, "answer", None)
    return said if own is None else own


def _key(layouts: keras.distribution.LayoutMap, name: str, layout: object) -> object:
    """The key by which a map has a layout for a name."""
    return name if name in list(layouts) else next((key for key in layouts if layouts[key] is layout), name)


__all__ = ["Answer", "LaidOut", "LayoutConflict", "Misfit", "Said", "answer_of", "laid_out"]

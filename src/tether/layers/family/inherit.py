"""A child layer on its parent's weights: shared, combined with its own, or copied as a start."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import keras

from tether import keras_seam, patterns
from tether.errors import ShapeMismatch, TetherError, UnknownName, received
from tether.forms.form import LayerForm
from tether.layers.family.fill import Provenance, Rule, check_rule, describe, filled
from tether.layers.family.named import (
    Named,
    frozen_weights,
    layer_pairs,
    named_weights,
    select,
    select_all,
    take_flags,
    train_only,
)
from tether.layers.tying.fit import given_twice, refuse_layer
from tether.layers.tying.state import View, layout_of, numpy_of, weights_below
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import tie, weight_of, weights_of
from tether.types import AnyLayer, Array
from tether.weights import placement
from tether.weights.expression import Expression, as_expression, live_weights
from tether.weights.identity import sharing
from tether.weights.storage import Copy
from tether.weights.weight import Weight

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # Keras's classes have bases without types, so that mypy takes an instance for a class too: as a layer, by default.
    Heir = TypeVar("Heir", bound=keras.Layer, default=keras.Layer)


@overload
def inherit(
    parent: keras.Layer,
    changes: Mapping[str, object] | None = None,
    /,
    *,
    into: type[Heir],
    share: bool | Sequence[str] = True,
    match: Mapping[str, str] | None = None,
    fill: Rule = None,
    name: None = None,
    **by_name: object,
) -> Heir: ...
@overload
def inherit(
    parent: keras.Layer,
    changes: Mapping[str, object] | None = None,
    /,
    *,
    into: AnyLayer,
    share: bool | Sequence[str] = True,
    match: Mapping[str, str] | None = None,
    fill: Rule = None,
    name: None = None,
    **by_name: object,
) -> AnyLayer: ...
@overload
def inherit(
    parent: AnyLayer,
    changes: Mapping[str, object] | None = None,
    /,
    *,
    into: None = None,
    share: bool | Sequence[str] = True,
    match: Mapping[str, str] | None = None,
    fill: Rule = None,
    name: str | None = None,
    **by_name: object,
) -> AnyLayer: ...
@overload
def inherit(parent: keras.Layer, changes: LayerForm, /) -> keras.Layer: ...
def inherit(
    parent: keras.Layer,
    changes: Mapping[str, object] | LayerForm | None = None,
    /,
    *,
    into: keras.Layer | type[keras.Layer] | None = None,
    share: bool | Sequence[str] = True,
    match: Mapping[str, str] | None = None,
    fill: Rule = None,
    name: str | None = None,
    **by_name: object,
) -> keras.Layer:
    """A new layer (or model) on a parent's weights.

    The parent keeps its values, outputs, weight order and variables, and the child does not own it. What of the
    parent is frozen at this moment stays frozen in the child, also where the child combines it with parts of its
    own that learn.

    Args:
        parent: A built Keras layer or model.
        changes: What the child computes with instead, by the weight's path or a pattern of paths
            (`{"*/query/kernel": tether.low_rank(8)}`); or a form that changes the layer itself
            (`tether.forms.compose(10)`). A change is a function from the parent's expression to the child's (a
            form is one), or an expression, a number or an array.
        into: The child: a layer of another class, or a class that is made from the parent's config. Weights are
            matched by name; the others are the child's own. Left out, the child is of the parent's class.
        share: Whether weights are shared: all, none, or those that a list of names and patterns means
            (`tether.patterns`). The others are true copies, as start values.
        match: The parent's name for a name of the child's, where they differ.
        fill: What a copy of another size has where the parent has nothing: `"zeros"`, `"initializer"`, `"mean"`
            (of the parent's values along the axis that grew), or a function `(value, start) -> array`.
        name: The child's name; left out, the parent's and `_child`. A layer given as `into` has its own.
        **by_name: Changes by the weight's name: `kernel=lambda w: w + tether.low_rank(8)`.

    Returns:
        The child, built. `child.inheritance` reports what came from where.

    Raises:
        TetherError: The parent is not built, or an argument contradicts another.
        UnknownName: A name or pattern fits no weight.
        ShapeMismatch: A shared weight has another shape than the child's, or a copied one and there is no `fill`.
        Unsupported: The form, the layer or one of its weights does not allow it; the error names the way that works.

    Example:
    ```python
    parent.trainable = False
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(8))
    ```
    """
    refuse_layer("inherit", parent)
    if not parent.built:
        raise TetherError(
            f"`inherit` needs a parent that is built, and {parent.name!r} is not. Call it on data, or build it: "
            f"`{parent.name}.build(input_shape)`."
        )
    asked = _asked(changes, by_name)
    if name is not None and (into is not None or isinstance(changes, LayerForm)):
        raise TetherError(f"A child that is given, or made by a form, has its own name. {received(name=name)}")
    with Rollback.below(parent):
        if isinstance(changes, LayerForm):
            return _by_form(parent, changes, asked, into=into, share=share, match=match, fill=fill)
        child = copy_of(parent, name) if into is None else _instance(into, parent)
        return _Heir(parent, child, asked, into=into, share=share, match=match or {}, fill=fill).make()


def _asked(changes: object, by_name: Mapping[str, object]) -> dict[str, object]:
    """The changes by name or pattern."""
    if changes is None or isinstance(changes, LayerForm):
        return dict(by_name)
    if not isinstance(changes, Mapping):
        raise TetherError(
            "The changes are given by name or pattern, as in `inherit(parent, kernel=tether.low_rank(8))` or "
            f"`inherit(parent, {{'*/kernel': tether.low_rank(8)}})`; a form of the whole layer is called first: "
            f"`inherit(parent, tether.forms.compose(10))`. {received(changes=changes)}"
        )
    twice = set(changes) & set(by_name)
    if twice:
        raise TetherError(given_twice(twice))
    return {**changes, **by_name}


def changed(change: object, base: Expression, path: str) -> Expression:
    """What a change makes of a base.

    Raises:
        TetherError: It is no change, or does not return an expression.
    """
    made = change(base) if callable(change) and not isinstance(change, Expression) else change
    try:
        return as_expression(made)
    except TypeError:
        raise _no_change(path, change, made) from None


def _no_change(path: str, change: object, made: object) -> TetherError:
    whole = isinstance(change, LayerForm)
    hint = " This form changes the whole layer: give it without a name, `inherit(parent, form)`." if whole else ""
    return TetherError(
        f"The change of {path!r} is a function from the parent's expression to the child's, a form such as "
        f"`tether.low_rank(8)`, an expression, a number or an array.{hint} {received(change=change, result=made)}"
    )


# --------------------------------------------------------------------------- the child


class _Heir:
    """The making of one child."""

    def __init__(
        self,
        parent: keras.Layer,
        child: keras.Layer,
        asked: Mapping[str, object],
        *,
        into: keras.Layer | type[keras.Layer] | None,
        share: bool | Sequence[str],
        match: Mapping[str, str],
        fill: Rule,
    ) -> None:
        check_rule(fill)
        self.parent, self.child, self.fill = parent, child, fill
        self.copied, self.given = into is None, into is child
        self.theirs = named_weights(parent)
        self.frozen = frozen_weights(self.theirs)
        if not self.child.built:
            build_like(self.child, parent)
        self.mine = named_weights(self.child)
        self.sources = self._matched(match)
        self.changes = self._changes(asked)
        self.shared = self._shared(share)
        self.kept = self._kept()

    def _matched(self, match: Mapping[str, str]) -> dict[str, Named]:
        """The parent's weight for each of the child's, by the child's path."""
        by_path = {weight.path: weight for weight in self.theirs}
        by_path.update({weight.name: weight for weight in self.theirs if weight.name not in by_path})
        found = {}
        for weight in self.mine:
            source = by_path.get(weight.path) or by_path.get(weight.name)
            if source is not None:
                found[weight.path] = source
        for name, source_name in match.items():
            (weight,), (source,) = (
                self._one(self.child, self.mine, name),
                self._one(self.parent, self.theirs, source_name),
            )
            found[weight.path] = source
        return found

    @staticmethod
    def _one(root: keras.Layer, weights: list[Named], name: str) -> list[Named]:
        found = select(root, weights, name)
        if len(found) > 1:
            raise UnknownName(
                f"`match` names one weight by one. {name!r} fits {', '.join(weight.name for weight in found)}."
            )
        return found

    def _changes(self, asked: Mapping[str, object]) -> dict[str, object]:
        found = select_all(self.child, self.mine, asked)
        for weight, change in found:
            if change is None:
                raise _no_change(weight.name, change, None)
        return {weight.path: change for weight, change in found}

    def _shared(self, share: object) -> set[str]:
        if isinstance(share, bool):
            return set(self.sources) if share else set()
        if isinstance(share, str) or not isinstance(share, Sequence):
            one = f", as in `share=[{share!r}]`" if isinstance(share, str) else ""
            raise TetherError(f"`share` is True, False or a list of names{one}. {received(share=share)}")
        wanted = set(self.sources) if share and patterns.leaves_out(share[0]) else set()
        for pattern in share:
            if patterns.leaves_out(pattern):
                wanted -= {weight.path for weight in select(self.child, self.mine, pattern[1:])}
            else:
                wanted |= {weight.path for weight in select(self.child, self.mine, pattern)}
        alone = sorted(wanted - set(self.sources))
        if alone:
            raise UnknownName(
                f"{self.parent.name!r} has no weight to share as {alone[0]!r}. Name it: `match={{{alone[0]!r}: ...}}`."
            )
        return wanted

    def _kept(self) -> set[str]:
        """The frozen weights that stay frozen in a layer's flags: copies in a copy, and what is shared as it is.

        A copy that the caller asks for by name, or for a layer of his own, is one to train.
        """
        kept = self._is_the_same or not (self.given or self.shared)
        frozen = {path for path, source in self.sources.items() if source.path in self.frozen}
        return frozen - set(self.changes) if kept else set()

    def make(self) -> keras.Layer:
        """Copies, then ties; everything is computed before anything of the child is tied."""
        copies: list[tuple[Named, Named, Array]] = []
        ties: dict[str, Expression] = {}
        report = Provenance()
        shared = (self.sources[weight.path].path for weight in self.mine if weight.path in self.shared)
        bases = weights_of(self.parent, dict.fromkeys(shared))
        for weight in self.mine:
            source, change = self.sources.get(weight.path), self.changes.get(weight.path)
            how = "own" if source is None else "shared"
            if source is None:
                if change is not None:
                    ties[weight.path] = self._alone(change, weight)
            elif weight.path in self.shared:
                ties[weight.path] = self._of_parent(weight, source, bases[source.path], change)
            else:
                value, how = self._copied(weight, source)
                if change is not None:
                    ties[weight.path] = self._of_copy(weight, source, value, change)
                else:
                    copies.append((weight, source, value))
                    if weight.path in self.kept and self._has_its_own:
                        ties[weight.path] = weight_of(self.child, weight.path).stop_gradient()
            if change is not None:
                text = f"combined: {ties[weight.path].notation()}"
                how = f"{how}; {text}" if how.startswith("copied") else text
            name, shape = (None, None) if source is None else (source.name, source.shape)
            report.add(weight.name, weight.shape, name, shape, how)
        self._assign(copies)
        self._assign_attributes()
        if ties:
            self._tie(ties)
        self._set_flags(ties)
        taken = {source.name for source in self.sources.values()}
        report.unused.extend(weight.name for weight in self.theirs if weight.name not in taken)
        keras_seam.set_untracked(self.child, "inheritance", report)
        return self.child

    def _tie(self, ties: dict[str, Expression]) -> None:
        try:
            tie(self.child, ties)
        except ShapeMismatch as error:
            raise ShapeMismatch(
                f"{error} To start a child of another size at the parent's values, copy: "
                "`inherit(parent, ..., share=False, fill='initializer')`."
            ) from error

    def _alone(self, change: object, weight: Named) -> Expression:
        """A change of a weight that the parent does not have: it starts from the child's own."""
        if callable(change) and not isinstance(change, Expression):
            own = weight_of(self.child, weight.path)
            return changed(change, own, weight.name)
        return changed(change, as_expression(0), weight.name)

    def _of_parent(self, weight: Named, source: Named, base: Expression, change: object) -> Expression:
        if self._is_the_same:  # its own flags say what trains, as the parent's do
            return base
        still = base.stop_gradient() if source.path in self.frozen else base
        return still if change is None else changed(change, still, weight.name)

    @cached_property
    def _has_its_own(self) -> bool:
        """Whether the child has something that the parent has not, which may learn in a layer that is frozen."""
        return bool(self.changes) or any(weight.path not in self.sources for weight in self.mine)

    @cached_property
    def _is_the_same(self) -> bool:
        """Whether the child has nothing of its own, so that what trains of it may be switched as of the parent."""
        return not self.changes and all(weight.path in self.shared for weight in self.mine)

    def _copied(self, weight: Named, source: Named) -> tuple[Array, str]:
        value, start = numpy_of(source.variable), numpy_of(weight.variable)
        try:
            return filled(value, start, self.fill), describe(value.shape, start.shape, self.fill)
        except ShapeMismatch as error:
            raise ShapeMismatch(f"{weight.name!r}: {error}") from error

    def _of_copy(self, weight: Named, source: Named, value: Array, change: object) -> Expression:
        own = Weight(name=_label(self.child, weight))
        own.find_path()
        own.give_start(value.shape, keras_seam.stored_dtype(weight.variable), Copy(value), path=weight.variable.path)
        placement.lay_out_as(own.variable, layout_of(source.variable))
        expression = changed(change, own, weight.name)
        if expression is not own:
            try:
                expression.assign(value)  # a form with an inverse starts at the parent's value
            except (TetherError, TypeError):
                own.assign(value)
        return expression

    def _assign(self, copies: list[tuple[Named, Named, Array]]) -> None:
        originals = {weight.origin: weight for weight in weights_below(self.parent)}
        done: set[int] = set()
        for weight, source, value in copies:
            if not isinstance(weight.variable, View):
                placement.lay_out_as(weight.variable, layout_of(source.variable))
                weight.variable.assign(value)
                continue
            for stored in weight.variable.expression.weights_used():
                original = originals.get(stored.origin)
                if original is not None and original.is_built and id(stored) not in done:
                    placement.lay_out_as(stored.variable, keras_seam.layout_of(original.variable))
                    stored.assign(numpy_of(original.variable))
                    done.add(id(stored))
            if not all(id(stored) in done for stored in weight.variable.expression.weights_used()):
                weight.variable.assign(value)

    def _assign_attributes(self) -> None:
        """Copies into the weights that layers of the user's own hold as attributes, which have no name to share by."""
        for weight, other in layer_pairs(self.child, self.parent) if self.copied else ():
            if isinstance(weight, Weight) and other.is_built and weight.shape in (None, other.shape):
                weight.give_start(other.shape, other.dtype, "zeros")
                placement.lay_out_as(weight.variable, keras_seam.layout_of(other.variable))
                weight.assign(other.value)

    def _set_flags(self, ties: dict[str, Expression]) -> None:
        """Frozen parts of the parent are frozen in the child, except layers in which something of its own learns."""
        if self.copied and not self._has_its_own and (self._is_the_same or not self.shared):
            take_flags(self.child, self.parent)
            return
        frozen = {path for path, source in self.sources.items() if source.path in self.frozen}
        if not frozen:
            return
        learns = {
            weight.path
            for weight in self.mine
            if weight.can_train
            and not (self.given and weight.frozen)
            and (
                weight.path not in frozen
                or (weight.path not in self.shared | self.kept and weight.path not in self.changes)
                or (weight.path in self.changes and live_weights(ties[weight.path]))
            )
        }
        train_only(self.child, self.mine, learns, frozen)
        for weight in named_weights(self.child) if not self._has_its_own else ():
            if weight.path in self.kept and not weight.frozen:  # beside one that learns in the same layer
                weight.variable.trainable = False


def _label(child: keras.Layer, weight: Named) -> str:
    return f"{child.name}.{weight.name}".replace("/", ".")


# --------------------------------------------------------------------------- making and building the child


def copy_of(parent: keras.Layer, name: str | None = None) -> keras.Layer:
    """A new layer of the parent's class and config under a name of its own, with fresh weights."""
    config = dict(parent.get_config())
    config["name"] = keras_seam.unique_name(f"{parent.name}_child") if name is None else name
    try:
        with sharing():
            return type(parent).from_config(config)
    except Exception as error:
        raise TetherError(
            f"A child of {parent.name!r} is made from the parent's config, and that failed: {error} Give "
            f"{type(parent).__name__} a `get_config` that holds all its arguments, or give the child: "
            "`inherit(parent, into=child)`."
        ) from error


def _instance(into: object, parent: keras.Layer) -> keras.Layer:
    cls: type[keras.Layer] | None = into if inspect.isclass(into) else None
    if cls is not None and issubclass(cls, keras.layers.Layer):
        config = {key: value for key, value in parent.get_config().items() if key not in ("name", "tether")}
        try:
            return cls.from_config(config)
        except Exception as error:
            raise TetherError(
                f"A {cls.__name__} cannot be made from the config of the {type(parent).__name__} {parent.name!r}. Give "
                f"the child itself, with arguments of its own: `inherit(parent, into={cls.__name__}(...))`. "
                f"{_last_words(error)}"
            ) from error
    if not isinstance(into, keras.layers.Layer) or isinstance(into, Weight) or into is parent:
        raise TetherError(
            f"`into` is another layer than the parent, or a layer class, as in `into=keras.layers.Dense`. "
            f"{received(into=into)}"
        )
    return into


def _last_words(error: BaseException) -> str:
    """What an error of Keras says, without the config that it repeats."""
    said = str(error).rpartition("Exception encountered:")[2].strip()
    return f"Its constructor says: {said[:200]}{'…' if len(said) > 200 else ''}"


def build_like(child: keras.Layer, parent: keras.Layer) -> None:
    """Builds a layer for the inputs that another was built for.

    Raises:
        TetherError: It cannot be built so.
    """
    config = parent.get_build_config()
    try:
        if not config:
            raise ValueError("the parent does not know its input shape")
        child.build_from_config(config)
        child.built = True
    except TetherError:
        raise
    except Exception as error:
        raise TetherError(
            f"The child {child.name!r} could not be built for the inputs of {parent.name!r} ({error}). Build it first, "
            "by a call on data or `child.build(input_shape)`, then `inherit(parent, into=child)`."
        ) from error


def _by_form(parent: keras.Layer, form: LayerForm, asked: Mapping[str, object], **others: object) -> keras.Layer:
    """A child that a layer form makes."""
    if others["into"] is not None or others["match"] or others["fill"] is not None or others["share"] is not True:
        raise TetherError(f"{form!r} makes the child and says what it shares; leave out into, share, match and fill.")
    if asked:
        raise TetherError(f"{form!r} says what the child's weights are; leave out {', '.join(asked)}.")
    child = form.layer(parent)
    theirs = named_weights(parent)
    frozen = frozen_weights(theirs)
    given = weights_of(parent, (weight.path for weight in theirs))
    given = {path: base.stop_gradient() if path in frozen else base for path, base in given.items()}
    ties = form.weights(given)
    tie(child, ties)
    build_like(child, parent)
    report = Provenance()
    for weight in named_weights(child):
        expression = ties.get(weight.path)
        how = "own" if expression is None else f"combined: {expression.notation()}"
        report.add(weight.name, weight.shape, None, None, how)
    keras_seam.set_untracked(child, "inheritance", report)
    return child

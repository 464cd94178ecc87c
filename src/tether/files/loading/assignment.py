"""Values from a file go into the stored weights of a model, whatever is tied in it.

A file offers a value for a *target*: a stored variable, a `tether.Weight`, or the view that a tied layer has in
the place of a variable. A value for a view is pushed back through its expression to the weights that it is made
of; where that has no inverse, to the base that others were added to (`tether.weights.algebra`), unless the file has a
value of the base's own. So one stored weight may be offered several values, which are compared, and resolved if they
differ. A view that is left is compared with what the other entries made of it. Everything is planned and checked
before anything is assigned.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, NotInvertible, ShapeMismatch, TetherError, ValueConflict, listed, received
from tether.files.loading.entries import Conflict, Loaded, Report, Rows, difference_of, tolerance_of
from tether.layers.tying.state import View, shape_of
from tether.types import Array, Tensor
from tether.weights.algebra import as_it_is, base_of, invert, put
from tether.weights.expression import Expression, Stored
from tether.weights.leaves import numpy_dtype
from tether.weights.operators.indexing import refuse_entries
from tether.weights.weight import Weight

Resolve = str | Callable[[str, list[Array]], Any]

_Way = Callable[[Expression, Any], dict[Stored, Any]]
"""From a value of an expression to values of its weights."""

RULES = ("error", "first", "mean")


@dataclass(frozen=True)
class Offer:
    """A value that a file has for a target; it is read when it is needed, and again if it is needed again."""

    target: Any
    """A Keras variable, a `tether.Weight`, or a view."""
    source: str
    """What the file calls it."""
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    rows: Rows | None = None
    """The same in parts, if the file has it as it is."""


@dataclass(frozen=True)
class Wanted:
    """A stored variable that a file should fill."""

    variable: keras.Variable
    name: str
    required: bool = True


def check_resolve(resolve: object) -> None:
    """Refuses what is no rule for values that differ.

    Raises:
        TetherError: It is neither the name of a rule nor a function.
    """
    if not callable(resolve) and not (isinstance(resolve, str) and resolve in RULES):
        raise TetherError(
            f"`resolve` is one of {', '.join(map(repr, RULES))}, or a function of a name and a list of arrays that "
            f"returns the array to load. {received(resolve=resolve)}"
        )


# --------------------------------------------------------------------------- the plan


@dataclass
class _Candidate:
    """A value for one stored variable, in its shape and dtype."""

    source: str
    read: Callable[[], Array]
    offer: Offer
    rows: Rows | None


class Assignment:
    """What goes where; `check` finds whatever is wrong, `carry_out` assigns."""

    def __init__(self, offers: Iterable[Offer], resolve: Resolve) -> None:
        check_resolve(resolve)
        self.resolve = resolve
        self.candidates: dict[int, list[_Candidate]] = {}
        self.variables: dict[int, keras.Variable] = {}
        self.owners: dict[int, Weight] = {}
        self.to_compare: list[Offer] = []
        self.values: dict[int, Callable[[], Array]] = {}
        self.rows: dict[int, Rows | None] = {}
        """The same in parts, of what is in the file as it is in memory."""
        self.conflicts: list[Conflict] = []
        for_bases = [offer for offer in offers if not self._add(offer)]
        known = set(self.candidates)
        for offer in for_bases:
            self._add_to_base(offer, known)

    def _add(self, offer: Offer) -> bool:
        """Takes an offer for what its target is; says whether that can be told without looking for a base."""
        target = offer.target
        check_fit(offer)
        stored = as_it_is(target.expression) if isinstance(target, View) else target
        if stored is not None:
            self._take(stored, offer)
            return True
        return base_of(target.expression) is None and self._take_through(offer, invert)

    def _add_to_base(self, offer: Offer, known: set[int]) -> None:
        """Takes an offer for the base of its target, unless the file has a value of the base's own.

        Args:
            offer: An offer for a view whose expression has no inverse.
            known: The ids of the variables for which the file has values of their own.
        """
        weight = base_of(offer.target.expression)
        if weight is not None and id(weight.variable) not in known:
            self._take(weight, offer)
        elif weight is not None or not self._take_through(offer, put, known):
            self.to_compare.append(offer)

    def _take_through(self, offer: Offer, way: _Way, known: Container[int] = ()) -> bool:
        """Takes an offer for the weights of its view, if there is a way to them and none of them is known."""
        try:
            weights = list(self._parts(offer, way))
        except NotInvertible:
            return False
        if any(id(weight.variable) in known for weight in weights):
            return False
        for each in weights:
            self._take_as(each, _Candidate(offer.source, self._part_reader(offer, way, each), offer, None))
        return True

    def _parts(self, offer: Offer, way: _Way) -> dict[Stored, Tensor]:
        view = offer.target
        value = _cast(offer.read(), keras_seam.stored_dtype(view), offer)
        return way(view.expression, keras.ops.convert_to_tensor(value))

    def _part_reader(self, offer: Offer, way: _Way, weight: Stored) -> Callable[[], Array]:
        def read() -> Array:
            part = keras_seam.on_host(keras_seam.plain_tensor(self._parts(offer, way)[weight]), offer.source)
            return _cast(np.asarray(part), _dtype_of(weight), offer)

        return read

    def _take(self, target: object, offer: Offer) -> None:
        dtype = _dtype_of(target)
        rows = offer.rows if offer.dtype == dtype else None
        self._take_as(target, _Candidate(offer.source, lambda: _cast(offer.read(), dtype, offer), offer, rows))

    def _take_as(self, target: object, candidate: _Candidate) -> None:
        variable = target.variable if isinstance(target, Weight) else target
        if isinstance(target, Weight):
            self.owners[id(variable)] = target
        self.variables[id(variable)] = variable
        self.candidates.setdefault(id(variable), []).append(candidate)

    def name_of(self, variable_id: int) -> str:
        """What a stored variable is called in messages."""
        return str(self.variables[variable_id].path)

    # ------------------------------------------------------------------ checking

    def check(self) -> None:
        """Compares what has to agree, and decides what is loaded.

        Raises:
            ValueConflict: Values of one weight differ, and `resolve` is `"error"`.
        """
        for key, candidates in self.candidates.items():
            self.values[key], self.rows[key] = candidates[0].read, candidates[0].rows
        for key, candidates in self.candidates.items():
            if len(candidates) > 1:
                self._compare(key, candidates)
        for offer in self.to_compare:
            self._compare_view(offer)
        for key, owner in self.owners.items():
            if owner.role == "integers" and key in self.values:
                refuse_entries(owner, self.values[key](), self.candidates[key][0].source)
        if self.resolve == "error" and self.conflicts:
            raise ValueConflict(_conflict_message(self.conflicts))

    def _compare(self, key: int, candidates: list[_Candidate]) -> None:
        first = candidates[0].read()
        others = [(each, difference_of(first, each.read())) for each in candidates[1:]]
        differing = [(each, by) for each, by in others if by is not None and not self._reproduces(each.offer)]
        if not differing:
            return
        farthest, by = max(differing, key=lambda pair: np.inf if np.isnan(pair[1] or 0.0) else pair[1] or 0.0)
        sources = (candidates[0].source, farthest.source, *(e.source for e, _ in differing if e is not farthest))
        name = self.name_of(key)
        taken = self.resolve if isinstance(self.resolve, str) else getattr(self.resolve, "__name__", "a function")
        self.conflicts.append(Conflict(name, sources, float(by or 0.0), taken))
        if self.resolve != "first":
            self.rows[key] = None
        if self.resolve == "mean":
            self.values[key] = lambda: _mean(name, [each.read() for each in candidates])
            self.values[key]()  # what has no mean is an error now
        elif callable(self.resolve):
            resolved = _resolved_by(self.resolve, name, [each.read() for each in candidates])
            self.values[key] = lambda: resolved

    def _reproduces(self, offer: Offer) -> bool:
        """Whether a view gives the file's value exactly, with what is planned: its inverse was only rounded."""
        if not isinstance(offer.target, View) or isinstance(offer.target.expression, Weight):
            return False
        value = _cast(offer.read(), keras_seam.stored_dtype(offer.target), offer)
        return difference_of(value, self._planned_value(offer.target)) is None

    def _planned_value(self, view: View) -> Array:
        """The value that a view is going to have."""
        mapping = []
        for weight in view.expression.weights_used():
            reader = self.values.get(id(weight.variable))
            if reader is not None:
                mapping.append((weight.variable, keras.ops.convert_to_tensor(reader(), dtype=weight.dtype)))
        with keras.StatelessScope(state_mapping=mapping):
            return np.asarray(keras_seam.on_host(keras_seam.plain_tensor(view.value), view.path))

    def _compare_view(self, offer: Offer) -> None:
        view = offer.target
        value = _cast(offer.read(), keras_seam.stored_dtype(view), offer)
        planned = self._planned_value(view)
        difference = difference_of(value, planned)
        if difference is not None and not difference <= tolerance_of(value):
            sources = (offer.source, f"{view.path} = {view.expression.notation()}")
            self.conflicts.append(Conflict(str(view.path), sources, difference, "the expression"))

    # ------------------------------------------------------------------ assigning

    def carry_out(self) -> tuple[Loaded, ...]:
        """Assigns what was planned, one weight after another.

        Raises:
            TetherError: The file cannot be read any more, though it could when it was opened.
        """
        loaded: list[Loaded] = []
        try:
            for key in self.values:
                loaded.append(self._carry_out_one(key))
        except (OSError, InvalidConfig) as error:
            raise TetherError(
                f"The file cannot be read to its end any more: {error} By then {len(loaded)} of {len(self.values)} "
                "weights had been loaded. Load it again, or another file."
            ) from error
        return tuple(loaded)

    def _carry_out_one(self, key: int) -> Loaded:
        variable, owner, rows = self.variables[key], self.owners.get(key), self.rows[key]
        if owner is not None:
            owner.generation += 1
        if rows is None:
            keras_seam.write(variable, self.values[key]())
        else:
            keras_seam.write_rows(variable, numpy_dtype(keras_seam.held_dtype(variable)), rows)
        return Loaded(self.name_of(key), tuple(each.source for each in self.candidates[key]))


def assign_offers(
    offers: Sequence[Offer],
    wanted: Sequence[Wanted],
    *,
    resolve: Resolve,
    strict: bool,
    skipped: Sequence[tuple[str, bool]] = (),
    what: str,
) -> Report:
    """Loads what a file offers.

    Args:
        offers: The values, in the order in which `"first"` is meant.
        wanted: The stored variables that should have a value.
        resolve: What to do with different values for one weight.
        strict: Whether a file with more, or less, than the model is an error.
        skipped: The names of what the file has and nothing took, and whether that is an error if strict.
        what: What the file is called in messages.

    Raises:
        ShapeMismatch: A value has another shape than its target.
        TetherError: Dtypes do not fit, or the file has more or less than the model and `strict` is set.
        ValueConflict: Values differ and `resolve` is `"error"`.
    """
    plan = Assignment(offers, resolve)
    missing = [each for each in wanted if id(each.variable) not in plan.candidates]
    if strict:
        _refuse_misfit(missing, skipped, what)
    plan.check()
    loaded = plan.carry_out()
    return Report(
        loaded=loaded,
        skipped=tuple(name for name, _ in skipped),
        missing=tuple(each.name for each in missing),
        conflicting=tuple(plan.conflicts),
    )


def _refuse_misfit(missing: Sequence[Wanted], skipped: Sequence[tuple[str, bool]], what: str) -> None:
    absent = [each.name for each in missing if each.required]
    unused = [name for name, counts in skipped if counts]
    if absent or unused:
        parts = [f"has no value for {listed(map(repr, absent), 6)}"] if absent else []
        parts += [f"has values that the model has no place for: {listed(map(repr, unused), 6)}"] if unused else []
        raise TetherError(
            f"{what} {', and '.join(parts)}. Load what fits with `strict=False`; the report says what did not."
        )


# --------------------------------------------------------------------------- values


def _dtype_of(target: object) -> str:
    """The dtype of what is stored in a target: of the tensor that is there, which may be narrower than asked for."""
    if isinstance(target, View):
        return keras_seam.stored_dtype(target)
    if isinstance(target, Weight) and not target.is_built:
        return target.dtype or keras.config.floatx()
    return keras_seam.held_dtype(target.variable if isinstance(target, Weight) else target)


def check_fit(offer: Offer) -> None:
    """Refuses a value of another shape, or another kind of numbers, than its target's.

    Raises:
        ShapeMismatch: It has another shape.
        TetherError: Its numbers are of another kind.
    """
    target = offer.target
    shape = tuple(target.shape or ()) if isinstance(target, Weight) else shape_of(target)
    path = target.name if isinstance(target, Weight) else target.path
    if offer.shape != shape:
        raise ShapeMismatch(f"{path} has shape {shape}; {offer.source!r} has shape {offer.shape}. Nothing was changed.")
    dtype = _dtype_of(target)
    if _kind(offer.dtype) != _kind(dtype):
        raise TetherError(
            f"{path} is stored as {dtype}; {offer.source!r} is {offer.dtype}, whose numbers mean something else. "
            "Nothing was changed."
        )


def _kind(dtype: str) -> str:
    if dtype.startswith("complex"):
        return "complex"
    return "float" if keras_seam.is_float(dtype) else "bool" if dtype == "bool" else "integer"


def _cast(array: Array, dtype: str, offer: Offer) -> Array:
    """The value in a dtype of the same kind; an integer that does not fit is an error."""
    if str(array.dtype) == dtype:
        return array
    found = array.astype(numpy_dtype(dtype))
    if _kind(dtype) == "integer" and not _is_same(found, array):
        raise TetherError(f"{offer.source!r} has numbers that {dtype} cannot hold. Nothing was changed.")
    return found


def _is_same(found: Array, array: Array) -> bool:
    """Whether integers of two dtypes are the same numbers."""
    return np.array_equal(found.astype(array.dtype), array) and np.array_equal(found < 0, array < 0)


def _mean(name: str, arrays: list[Array]) -> Array:
    if _kind(str(arrays[0].dtype)) != "float":
        raise TetherError(f"{name} holds {arrays[0].dtype}, which has no mean. Use `resolve='first'` or a function.")
    total = np.zeros(arrays[0].shape, "float64")
    for array in arrays:
        total += array.astype("float64")
    return (total / len(arrays)).astype(arrays[0].dtype)


def _resolved_by(resolve: Callable[[str, list[Array]], object], name: str, arrays: list[Array]) -> Array:
    found = np.asarray(resolve(name, [array.copy() for array in arrays]))
    if found.shape != arrays[0].shape or _kind(str(found.dtype)) != _kind(str(arrays[0].dtype)):
        raise ShapeMismatch(
            f"The function given as `resolve` returns an array of shape {arrays[0].shape} and {arrays[0].dtype} for "
            f"{name}. {received(shape=found.shape, dtype=str(found.dtype))}"
        )
    return found.astype(arrays[0].dtype)


def _conflict_message(conflicts: Sequence[Conflict]) -> str:
    lines = [str(conflict) for conflict in conflicts[:5]]
    if len(conflicts) > 5:
        lines.append(f"and {len(conflicts) - 5} more")
    return (
        "There are different values for what is one weight: "
        + "; ".join(lines)
        + ". Nothing was changed. Say which is right: `resolve='first'`, `'mean'`, or a function of the name and the "
        "arrays."
    )


__all__ = [
    "RULES",
    "Array",
    "Assignment",
    "Offer",
    "Report",
    "Resolve",
    "Wanted",
    "assign_offers",
    "check_fit",
    "check_resolve",
]

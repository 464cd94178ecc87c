"""Giving a stored weight another size along an axis, and letting everything that uses it follow.

What follows is worked out before anything changes. Where a layer cannot follow, the error names it and the model is
as it was.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, Unsupported, as_int, received
from tether.kinds import Kind, kind_of
from tether.layers.family.fill import Provenance, Rule, check_rule, describe, filled
from tether.layers.tying import paths
from tether.layers.tying.state import View, numpy_of, state_of, users
from tether.layers.tying.tied import base_class
from tether.types import Array
from tether.weights.expression import Expression, Node, Shape, known_shape
from tether.weights.storage import Use
from tether.weights.weight import Weight


def resize(
    weight: object, axis: int, new_size: int, *, fill: object = "initializer", model: keras.Model | None = None
) -> Provenance:
    """Gives a stored weight another size along an axis, in place; every layer that uses it follows.

    Settings that hold the size follow (`Dense.units`, `Embedding.input_dim`, `EinsumDense`'s output shape,
    `Conv2D.filters`), and so do the biases that belong to it. Entries that both sizes have are kept, those beyond the
    new size are cut. Expressions of the weight that no layer uses have to be written anew.

    Args:
        weight: A `tether.Weight` that is built. Of a plain layer: `tether.weight_of(layer, "kernel")`.
        axis: The axis that changes.
        new_size: Its new size.
        fill: What new entries get: `"initializer"`, what the weight's initializer makes; `"zeros"`; `"mean"`, the
            mean over the axis; a Keras initializer; an array of the new entries; or a function of the present array
            and of a start of the new shape, which returns the whole new array. A bias follows the rules that have a
            name, and otherwise gets what its layer's initializer makes.
        model: The model around it, if there is one. Then its graph follows as well, and its optimizer: what that
            keeps for a new entry is zero. It stays compiled.

    Returns:
        A row for each variable that has changed.

    Raises:
        Unsupported: A use cannot follow. Nothing has changed.
        TetherError: The axis, the size or the rule does not fit the weight.

    Example:
    ```python
    table = tether.weight_of(model, "embedding/embeddings")
    tether.files.resize(table, 0, 103, fill="mean", model=model)
    assert model.get_layer("embedding").input_dim == 103
    ```
    """
    if not isinstance(weight, Weight) or not weight.is_built:
        raise TetherError(
            "`resize` takes a stored weight that is built. That of a layer is `tether.weight_of(layer, 'kernel')`. "
            f"{received(weight=weight)}"
        )
    if model is not None and not isinstance(model, keras.layers.Layer):
        raise TetherError(f"`model` is a Keras model or layer. {received(model=model)}")
    shape, axis, size = _checked(weight, axis, new_size)
    plan = _Resizing(weight, _with_size(shape, axis, size), axis, fill)
    for use in weight.uses:
        plan.follow(use)
    if model is not None:
        plan.look_around(model)
    if plan.problems:
        raise Unsupported(
            f"The weight {weight.name!r} cannot be resized from {shape} to {plan.shape}: {'; '.join(plan.problems)}. "
            "Nothing has changed."
        )
    plan.carry_out(model)
    return plan.report


def _checked(weight: Weight, axis: object, new_size: object) -> tuple[Shape, int, int]:
    shape = weight.shape or ()
    axis, size = as_int(axis, "axis"), as_int(new_size, "new_size")
    if not -len(shape) <= axis < len(shape) or size < 1:
        raise ShapeMismatch(f"The weight {weight.name!r} has shape {shape}. {received(axis=axis, new_size=new_size)}")
    return shape, axis % len(shape), size


def _with_size(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


@dataclass
class _Change:
    """A variable that gets another value, and the name that it has in the report."""

    variable: keras.Variable
    name: str
    value: Array
    how: str


@dataclass
class _Resizing:
    """Everything that changes with a weight, and what speaks against it."""

    weight: Weight
    shape: Shape
    axis: int
    fill: Any
    changes: dict[int, _Change] = field(default_factory=dict)
    settings: list[Callable[[Undo], None]] = field(default_factory=list)
    views: list[tuple[View, Shape]] = field(default_factory=list)
    parts: list[tuple[Expression, Shape]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    report: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        initializer = self.weight.initializer or self.weight.first_initializer
        self._change(self.weight.variable, self.weight.name, self.shape, self.fill, initializer)

    def _change(self, variable: keras.Variable, name: str, shape: Shape, rule: object, initializer: object) -> None:
        present = numpy_of(variable)
        value, how = _resized(present, shape, rule, initializer, self.axis)
        self.changes[id(variable)] = _Change(variable, name, value, how)

    # ------------------------------------------------------------------ what follows

    def follow(self, use: Use) -> None:
        """Adds what one use of the weight needs."""
        layer = use.layer()
        if layer is None:
            return
        name = f"{layer.name}/{use.name}"
        try:
            parts = shapes_with(use.expression, {self.weight: self.shape})
            view = next(v for v in paths.own_variables(layer) if isinstance(v, View) and v.use is use)
            before, after = tuple(view.shape), parts[-1][1]
            self.parts.extend(parts)
            if before != after:
                self.views.append((view, after))
                self._follow_in(layer, view, before, after)
        except TetherError as error:
            self.problems.append(f"{name} = {use.expression.notation()} cannot follow: {error}")

    def _follow_in(self, layer: keras.Layer, view: View, before: Shape, after: Shape) -> None:
        axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=False)) if old != new]
        if len(before) != len(after) or len(axes) != 1:
            raise Unsupported(f"its shape would go from {before} to {after}")
        (axis,) = axes
        found = next((size for size in sizes_of(layer) if (view.name, axis) in size.axes), None)
        if found is None:
            raise Unsupported(f"no setting of {type(layer).__name__} is the size of axis {axis}")
        self.settings.append(lambda undo: found.set(after[axis], undo))
        for name, at in found.axes:
            for variable in paths.own_variables(layer):
                if variable.name == name and variable is not view:
                    self._take_along(layer, variable, at, after[axis])

    def _take_along(self, layer: keras.Layer, variable: keras.Variable, axis: int, size: int) -> None:
        """Resizes what belongs to a weight: a bias."""
        if isinstance(variable, View):
            if shapes_with(variable.expression, {self.weight: self.shape})[-1][1][axis] != size:
                raise Unsupported(f"its {variable.name} is tied to {variable.expression.notation()}, of another size")
            return
        rule = self.fill if isinstance(self.fill, str) else "initializer"
        initializer = getattr(layer, f"{variable.name}_initializer", None)
        self._change(
            variable, f"{layer.name}/{variable.name}", _with_size(tuple(variable.shape), axis, size), rule, initializer
        )

    def look_around(self, model: keras.Model) -> None:
        """Adds what in a model uses the weight without a tie, and what its optimizer cannot follow."""
        for layer in keras_seam.contained_layers(model):
            state = state_of(layer)
            for penalty in state.penalties if state is not None else ():
                if self.weight in penalty.weights and not penalty.is_void:
                    problem = f"the soft tie {penalty.notation()} compares it with a weight of the old size"
                    if problem not in self.problems:
                        self.problems.append(problem)
        if hasattr(getattr(model, "optimizer", None), "optimizers"):
            self.problems.append("the model's optimizer is made of several; compile the model with one before")
        for variable, slot, name in self._slots(model):
            if tuple(slot.shape) not in ((), tuple(variable.shape)):
                self.problems.append(
                    f"what the optimizer keeps for {variable.path} ({name}) has another shape than the weight; compile "
                    "the model anew before"
                )

    def _slots(self, model: keras.Model) -> Iterator[tuple[Any, Any, str]]:
        optimizer = getattr(model, "optimizer", None)
        kept = keras_seam.optimizer_slots(optimizer) if optimizer is not None else {}
        for key, change in self.changes.items():
            for name, slot in kept.get(key, ()):
                yield change.variable, slot, name

    # ------------------------------------------------------------------ changing

    def carry_out(self, model: keras.Model) -> None:
        """Changes everything, or nothing.

        Raises:
            Unsupported: A layer of the model's graph cannot take what it would get.
        """
        resized = [change.variable for change in self.changes.values()]
        keras_seam.before_change([self.weight, *users(self.weight)], resized=resized, adjusted=model)
        undo: Undo = []
        try:
            self._carry_out(model, undo)
        except BaseException as error:
            for step in reversed(undo):
                step()
            if isinstance(error, Exception):
                raise Unsupported(
                    f"The weight {self.weight.name!r} cannot be resized to {self.shape}, since the model around it "
                    f"cannot follow: {_plainly(error)} Nothing has changed."
                ) from error
            raise

    def _carry_out(self, model: keras.Model, undo: Undo) -> None:
        optimizer = getattr(model, "optimizer", None)
        slots = list(self._slots(model))
        undo.append(lambda: keras_seam.recognize_variables(optimizer))
        for variable, slot, name in slots:
            if tuple(slot.shape) == tuple(variable.shape):
                made, present = self.changes[id(variable)].value, numpy_of(slot)
                start = (made if "average" in name else np.zeros_like(made)).astype(present.dtype)
                _give(slot, filled(present, start, "initializer"), undo)
        for change in self.changes.values():
            before = tuple(change.variable.shape)
            _give(change.variable, change.value, undo)
            self.report.add(change.name, change.value.shape, change.name, before, change.how)
        keras_seam.recognize_variables(optimizer)
        self.weight.generation += 1
        for view, shape in self.views:
            _give_shape(view, shape, undo)
        before_parts = [(part, part.shape or ()) for part, _ in self.parts]
        undo.append(lambda: take_shapes(before_parts))
        take_shapes(self.parts)
        for layer in users(self.weight):
            for variable in paths.own_variables(layer):
                if isinstance(variable, View):
                    variable.planner = None
        for setting in self.settings:
            setting(undo)
        if model is not None:
            keras_seam.infer_graph(model, undo)
            inputs = getattr(model, "inputs", None)
            if inputs:
                structure = inputs[0] if isinstance(model, keras_seam.Sequential) else model.input
                keras_seam.trace(lambda *x: model(keras.tree.pack_sequence_as(structure, x)), *inputs)


def _plainly(error: Exception) -> str:
    """What Keras says, without its colours and the list of what a call got."""
    text = re.sub(r"\x1b\[\d+m", "", str(error)).partition("Arguments received by")[0]
    return " ".join(text.split()).rstrip(".") + "."


def _give(variable: keras.Variable, value: Array, undo: Undo) -> None:
    before = numpy_of(variable)
    undo.append(lambda: keras_seam.give_value(variable, before))
    keras_seam.give_value(variable, value)


def _give_shape(view: View, shape: Shape, undo: Undo) -> None:
    before = tuple(view.shape)
    undo.append(lambda: keras_seam.give_shape(view, before))
    keras_seam.give_shape(view, shape)


def _resized(present: Array, shape: Shape, rule: Any, initializer: object, axis: int) -> tuple[Array, str]:
    """The value in its new shape, and what was done."""
    given, start = rule, np.zeros(shape, present.dtype)
    if isinstance(rule, keras.initializers.Initializer):
        given, initializer = "initializer", rule
    elif rule is not None and not callable(rule) and not isinstance(rule, str):
        given = _from_array(np.asarray(rule), present, shape, axis)
    check_rule(given)
    if given is None and any(new > old for new, old in zip(shape, present.shape, strict=True)):
        given = "initializer"
    if given == "initializer" and shape != present.shape:
        made = keras.initializers.get(initializer or "glorot_uniform")(shape, dtype=str(present.dtype))
        start = np.asarray(keras_seam.to_numpy(made, in_step=True)).astype(present.dtype)
    how: Rule = given if isinstance(given, str) or callable(rule) else "array"
    return filled(present, start, given or "zeros"), describe(present.shape, shape, how)


def _from_array(array: Array, present: Array, shape: Shape, axis: int) -> Rule:
    """The rule that puts an array where there was nothing."""
    new = tuple(max(size - old, 0) if size != old else size for size, old in zip(shape, present.shape, strict=True))
    if array.shape != new:
        raise ShapeMismatch(f"The array for the new entries has the shape {new}. {received(shape=array.shape)}")
    return lambda value, start: np.concatenate([value, array.astype(start.dtype)], axis=axis)


# --------------------------------------------------------------------------- sizes of layers
# The sizes of a layer: which axes of its weights have to agree, and the setting that says how large they are.


Undo = list[Callable[[], None]]


@dataclass(frozen=True)
class Size:
    """One size of a layer."""

    axes: tuple[tuple[str, int], ...]
    """The weights that have it, by name, and on which axis."""
    set: Callable[[int, Undo], None]
    """Tells the layer the new size; gives the undo list what puts the old one back."""


def sizes_of(layer: keras.Layer) -> list[Size]:
    """The sizes of a layer that can change after it was built.

    Raises:
        Unsupported: It is of a class whose sizes are not known here, or it is quantised or has Keras's LoRA.
    """
    cls = base_class(type(layer))
    if getattr(layer, "quantization_mode", None) is not None or getattr(layer, "lora_enabled", False):
        raise Unsupported("it is quantised or has Keras's LoRA")
    kind = kind_of(cls, "build").of(layer)
    if not kind.axes:
        raise Unsupported(f"{cls.__name__} does not say which of its settings hold the size")
    if "." in kind.quantized.get("kernel", ""):
        raise Unsupported("its equation has an ellipsis")
    return [
        Size(
            tuple((name, axes.index(letter)) for name, axes in kind.axes.items() if letter in axes),
            functools.partial(_set_size, layer, kind, letter),
        )
        for letter in next(iter(kind.axes.values()))
        if letter in kind.inputs or letter in kind.settings
    ]


def _set_size(layer: keras.Layer, kind: Kind, letter: str, size: int, undo: Undo) -> None:
    if letter in kind.inputs:
        _set_input(layer, kind.inputs[letter], size, undo)
    if letter in kind.settings:
        name, *place = kind.settings[letter]
        sizes = getattr(layer, name)
        new = tuple(size if n is not None and at in place else n for at, n in enumerate(sizes)) if place else size
        _replace(layer, name, new, undo)


def _set_input(layer: keras.Layer, axis: int, size: int, undo: Undo) -> None:
    """Tells the layer the size of an axis of its input."""
    spec, shapes = layer.input_spec, keras_seam.build_shapes(layer)
    if spec is not None and spec.axes:
        axes = {at: size if at in (axis, axis % (len(spec.shape or ()) or 1)) else n for at, n in spec.axes.items()}
        kept = {key: getattr(spec, key) for key in ("dtype", "shape", "ndim", "max_ndim", "min_ndim")}
        _replace(layer, "input_spec", keras.layers.InputSpec(axes=axes, **kept), undo)
    if shapes is not None and len(shapes) == 1:
        ((key, shape),) = shapes.items()
        undo.append(lambda: keras_seam.set_build_shapes(layer, shapes))
        keras_seam.set_build_shapes(layer, {key: _with_size(tuple(shape), axis % len(shape), size)})


def _replace(layer: keras.Layer, name: str, value: object, undo: Undo) -> None:
    before = getattr(layer, name)
    undo.append(lambda: setattr(layer, name, before))
    setattr(layer, name, value)


# --------------------------------------------------------------------------- shapes of weights
# What an expression's shape becomes when a weight in it gets another size.


def shapes_with(root: Expression, shapes: Mapping[Weight, Shape]) -> list[tuple[Expression, Shape]]:
    """The shapes of all parts of an expression, itself last, if some of its weights had others.

    Raises:
        ShapeMismatch: The operands of a part would not fit any more.
    """
    found: dict[int, Shape] = {}
    parts: list[tuple[Expression, Shape]] = []
    stack = [root]
    while stack:
        current = stack[-1]
        operands = current.operands if isinstance(current, Node) else ()
        waiting = [operand for operand in operands if id(operand) not in found]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if id(current) in found:
            continue
        if isinstance(current, Node):
            shape = current._checked_shape([found[id(operand)] for operand in operands])
        else:
            shape = shapes[current] if isinstance(current, Weight) and current in shapes else known_shape(current)
        found[id(current)] = shape
        parts.append((current, shape))
    return parts


def take_shapes(parts: list[tuple[Expression, Shape]]) -> None:
    """Lets the parts of an expression know the shapes that they have now."""
    set_slot = object.__setattr__
    for part, shape in parts:
        if isinstance(part, Node):
            set_slot(part, "_shape", shape)


__all__ = ["resize", "shapes_with", "sizes_of", "take_shapes"]

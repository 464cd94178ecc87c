"""Operators that move or join numbers and compute none: reshape, transpose, slice, concatenate, sums of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import EllipsisType

import keras
import numpy as np

from tether.errors import (
    InvalidConfig,
    NotATensor,
    ShapeMismatch,
    TetherError,
    as_dtype,
    as_int,
    as_ints,
    received,
)
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links, Row
from tether.weights.expression import (
    Expression,
    Node,
    Shape,
    Term,
    as_expression,
    known_shape,
    provide,
    register,
)
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import result_type

# --------------------------------------------------------------------------- moving
# Looking at a value in another way: transposed, reshaped, sliced, in another dtype.


@register
class Transpose(Node):
    """The operand with its axes permuted."""

    name, elementwise_cost, accepts = "transpose", False, ("axes",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Axes are integers, or left out."""
        axes = given.get("axes")
        return {"axes": None if axes is None else as_ints(axes, "axes")}

    def _axes(self, rank: int) -> tuple[int, ...]:
        axes = self.parameters["axes"]
        if axes is None:
            return tuple(reversed(range(rank)))
        axes = tuple(axis + rank if axis < 0 else axis for axis in axes)
        if sorted(axes) != list(range(rank)):
            raise ShapeMismatch(
                f"{self.notation()} needs a permutation of {rank} axes. {received(axes=self.parameters['axes'])}"
            )
        return axes

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes in their new order."""
        return tuple(shapes[0][axis] for axis in self._axes(len(shapes[0])))

    def compute(self, *values: Tensor) -> Tensor:
        """The value with its axes permuted."""
        return keras.ops.transpose(values[0], axes=self._axes(len(values[0].shape)))

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the operand in another order."""
        return tuple(operands[0][axis] for axis in self._axes(len(operands[0])))

    def format(self, *terms: Term) -> Term:
        axes = self.parameters["axes"]
        method = "T" if axes is None else f"transpose({', '.join(map(str, axes))})"
        return Term(f"{terms[0].inside(100)}.{method}")

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The sizes in their old order."""
        axes = self._axes(len(shape))
        return tuple(shape[axes.index(axis)] for axis in range(len(shape)))

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value with its axes permuted back."""
        axes = self._axes(len(value.shape))
        return [keras.ops.transpose(value, axes=tuple(axes.index(axis) for axis in range(len(axes))))]


@register
class Reshape(Node):
    """Another shape of as many elements."""

    name, elementwise_cost, accepts = "reshape", False, ("shape",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Sizes of 0 or more, one of which may be -1."""
        sizes = as_ints(given.get("shape"), "shape")
        if any(size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InvalidConfig(f"A shape has sizes of 0 or more, and at most one -1. {received(shape=sizes)}")
        return {"shape": sizes}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The wanted shape, with -1 worked out."""
        wanted, count = self.parameters["shape"], math.prod(shapes[0])
        known = math.prod(size for size in wanted if size != -1)
        if -1 in wanted and known and count % known == 0:
            wanted = tuple(count // known if size == -1 else size for size in wanted)
        if -1 in wanted or math.prod(wanted) != count:
            raise ShapeMismatch(
                f"{self.operands[0].notation()} has shape {shapes[0]} ({count} elements), and another shape has as "
                f"many; one size may be left to -1, as in `reshape({shapes[0][0] if shapes[0] else 1}, -1)`. "
                f"{received(shape=self.parameters['shape'])}"
            )
        return wanted

    def compute(self, *values: Tensor) -> Tensor:
        """The value in its other shape."""
        return keras.ops.reshape(values[0], self.shape)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the operand, split and joined."""
        return links.reshaped(operands[0], self.shape or ())

    def format(self, *terms: Term) -> Term:
        return Term(f"{terms[0].inside(100)}.reshape{self.parameters['shape']}")

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value in the operand's shape."""
        return [keras.ops.reshape(value, self.operands[0].shape)]


Part = int | slice | EllipsisType | None
"""What an index has for an axis, or for axes left out."""


@register
class Index(Node):
    """Basic slicing: integers, slices, `...` and `None`."""

    name, elementwise_cost, accepts = "index", False, ("key",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The parts of the index, in forms that JSON knows."""
        key = given.get("key")
        if not isinstance(key, (list, tuple)) or len(key) > 64:
            raise InvalidConfig(f"An index is a list of parts. {received(key=key)}")
        return {"key": tuple(cls._part(part) for part in key)}

    @staticmethod
    def _part(part: object) -> int | str | tuple[str | int | None, ...] | None:
        if part is None or part is Ellipsis or part == "...":
            return None if part is None else "..."
        if isinstance(part, slice):
            part = ("slice", part.start, part.stop, part.step)
        if isinstance(part, (list, tuple)):
            if len(part) != 4 or part[0] != "slice":
                raise InvalidConfig(f"A slice is ['slice', start, stop, step]. {received(part=part)}")
            bounds = tuple(None if bound is None else as_int(bound, "a slice's bound") for bound in part[1:])
            if bounds[2] == 0:
                raise InvalidConfig("A slice's step cannot be 0.")
            return ("slice", *bounds)
        return as_int(part, "an index")

    def _key(self) -> tuple[Part, ...]:
        return tuple(
            Ellipsis if part == "..." else slice(*part[1:]) if isinstance(part, tuple) else part
            for part in self.parameters["key"]
        )

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The shape of the slice."""
        try:
            return np.broadcast_to(np.int8(0), shapes[0])[self._key()].shape
        except IndexError as error:
            raise ShapeMismatch(
                f"{self.operands[0].notation()} has shape {shapes[0]}; {self.notation()} does not fit it: {error}."
            ) from None

    def compute(self, *values: Tensor) -> Tensor:
        value = values[0]
        sizes = tuple(value.shape)
        key, flips = self._positive(sizes)
        value = value[key]
        return keras.ops.flip(value, axis=flips) if flips else value

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The axes that are kept as they are."""
        key, shape = self._key(), self.operands[0].shape or ()
        left = len(shape) - sum(1 for part in key if part is not None and part is not Ellipsis)
        full: list[Part] = []
        for part in key if Ellipsis in key else (*key, Ellipsis):
            full += [slice(None)] * left if part is Ellipsis else [part]
        found: list[Row] = []
        axis = 0
        for part in full:
            if part is None:
                found.append(())
                continue
            if isinstance(part, slice):
                taken = range(*part.indices(shape[axis]))
                whole = taken == range(shape[axis])
                found.append(operands[0][axis] if whole else links.label(len(taken)))
            axis += 1
        return tuple(found)

    def _positive(self, sizes: Shape) -> tuple[tuple[Part, ...], tuple[int, ...]]:
        """The key with negative steps written as a positive slice and a flip (PyTorch has no negative steps)."""
        key = self._key()
        taken = sum(1 for part in key if part is not None and part is not Ellipsis)
        result: list[Part] = []
        flips: list[int] = []
        axis = out_axis = 0
        for part in key:
            if part is None:
                out_axis += 1
            elif part is Ellipsis:
                axis += len(sizes) - taken
                out_axis += len(sizes) - taken
            elif isinstance(part, slice):
                if part.step is not None and part.step < 0:
                    walked = range(*part.indices(sizes[axis]))
                    last = walked[-1] if len(walked) else 0
                    part = slice(last, walked[0] + 1, -part.step) if len(walked) else slice(0, 0)
                    flips.append(out_axis)
                axis += 1
                out_axis += 1
            else:
                axis += 1
            result.append(part)
        return tuple(result), tuple(flips)

    def format(self, *terms: Term) -> Term:
        parts = []
        for part in self._key():
            if isinstance(part, slice):
                text = f"{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}"
                parts.append(text if part.step is None else f"{text}:{part.step}")
            else:
                parts.append("..." if part is Ellipsis else str(part))
        return Term(f"{terms[0].inside(100)}[{', '.join(parts) or '()'}]")


@register
class Cast(Node):
    """The operand in another dtype."""

    name, accepts = "cast", ("dtype",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """A dtype that Keras knows."""
        return {"dtype": as_dtype(given.get("dtype"))}

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def infer_dtype(self, *dtypes: str) -> str:
        return str(self.parameters["dtype"])

    def compute(self, *values: Tensor) -> Tensor:
        """The value in its other dtype."""
        return keras.ops.cast(values[0], self.parameters["dtype"])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def format(self, *terms: Term) -> Term:
        return Term(f"{terms[0].inside(100)}.astype({self.parameters['dtype']})")

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value in the operand's dtype."""
        return [keras.ops.cast(value, self.operands[0].dtype or value.dtype)]


def transpose(x: object, axes: Sequence[int] | None = None) -> Expression:
    """`x` with its axes permuted, reversed if `axes` is left out; transposing back gives `x` itself.

    Args:
        x: A weight, an expression, a number or an array.
        axes: The number of the axis of `x` that each axis of the result is, as in NumPy; left out, all in reverse.

    Returns:
        The expression. A shape `(a, b, c)` becomes `(c, b, a)`, or what `axes` says.

    Raises:
        ShapeMismatch: `axes` is no permutation of the axes of `x`.

    Example:
    ```python
    table = tether.Weight((100, 16), name="table")
    assert tether.ops.transpose(table) == table.T
    heads = tether.Weight((16, 2, 8), name="heads")
    assert tether.ops.transpose(heads, (1, 0, 2)).shape == (2, 16, 8)
    ```
    """
    x = as_expression(x)
    if isinstance(x, Transpose) and axes is None and x.parameters["axes"] is None:
        return x.operands[0]
    if axes is not None and not isinstance(axes, (int, str)):
        axes = tuple(axes)
        if len(axes) == 1 and isinstance(axes[0], (tuple, list)):  # `w.transpose((1, 0))`, as in NumPy
            axes = tuple(axes[0])
    return Transpose(x, axes=axes)


def swapaxes(x: object, axis1: int, axis2: int) -> Expression:
    """`x` with two axes exchanged; also the method `x.swapaxes(axis1, axis2)`.

    Args:
        x: A weight, an expression, a number or an array. Its shape has to be known.
        axis1: The number of an axis; from the end if it is below zero.
        axis2: That of the other one.

    Returns:
        The expression: a shape `(a, b, c)` becomes `(a, c, b)` for the axes 1 and 2.

    Raises:
        UnknownShape: A weight in it has no shape yet.
        ShapeMismatch: `x` has no such axis.

    Example:
    ```python
    heads = tether.Weight((16, 2, 8), name="heads")
    assert tether.ops.swapaxes(heads, 0, 1).shape == heads.swapaxes(0, 1).shape == (2, 16, 8)
    ```
    """
    x = as_expression(x)
    shape = known_shape(x)
    rank = len(shape)
    first, second = as_int(axis1, "axis1"), as_int(axis2, "axis2")
    if not (-rank <= first < rank and -rank <= second < rank):
        raise ShapeMismatch(f"{x.notation()} has {rank} axes, shape {shape}. {received(axis1=axis1, axis2=axis2)}")
    axes = list(range(rank))
    axes[first], axes[second] = axes[second], axes[first]
    if axes == sorted(axes):
        return x
    return transpose(x, None if axes == sorted(axes, reverse=True) else axes)


def reshape(x: object, newshape: Sequence[int]) -> Expression:
    """`x` in another shape of as many elements; one size may be -1.

    Args:
        x: A weight, an expression, a number or an array.
        newshape: The sizes; -1 stands for what is left.

    Returns:
        The expression, of that shape.

    Raises:
        ShapeMismatch: The shape has another number of elements.
        TetherError: It is no tuple of whole numbers, or has more than one -1.

    Example:
    ```python
    heads = tether.Weight((16, 2, 8), name="heads")
    layer = tether.tie(keras.layers.Dense(16), kernel=tether.ops.reshape(heads, (16, -1)))
    ```
    """
    return Reshape(as_expression(x), shape=tuple(newshape))


def index(x: Expression, key: object) -> Expression:
    """`x[key]`, with integers, slices, `...` and `None`."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, (list, np.ndarray)) for part in parts):
        raise TetherError(
            f"An index has integers, slices, `...` and `None`. To pick rows by number, write "
            f"`tether.ops.take(x, indices, axis)`. {received(key=key)}"
        )
    return Index(x, key=parts)


def cast(x: object, dtype: str) -> Expression:
    """`x` with its numbers in another dtype.

    Args:
        x: A weight, an expression, a number or an array, of any shape.
        dtype: The name of a dtype, such as `"bfloat16"`.

    Returns:
        The expression, of the shape of `x`.

    Raises:
        InvalidConfig: There is no such dtype.

    Example:
    ```python
    w = tether.Weight((8, 4), dtype="float32", name="w")
    assert tether.ops.cast(w, "float16").dtype == "float16"
    ```
    """
    return Cast(as_expression(x), dtype=dtype)


# --------------------------------------------------------------------------- joining
# Several values made one: joined, stacked, chosen between, contracted.


class _Joined(Node):
    arity, accepts = None, ("axis",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The axis is an integer."""
        return {"axis": as_int(given.get("axis", 0), "axis")}

    def infer_dtype(self, *dtypes: str) -> str:
        return result_type(*dtypes)

    def format(self, *terms: Term) -> Term:
        return Term(f"{self.name}([{', '.join(term.text for term in terms)}], axis={self.parameters['axis']})")

    def _misfit(self, shapes: tuple[Shape, ...]) -> ShapeMismatch:
        parts = ", ".join(f"{o.notation()} has shape {s}" for o, s in zip(self.operands, shapes, strict=True))
        return ShapeMismatch(f"The shapes in {self.notation()} do not fit: {parts}.")


@register
class Concatenate(_Joined):
    """Values joined along one of their axes."""

    name = "concatenate"

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes along the axis add up."""
        axis, rank = self.parameters["axis"], len(shapes[0])
        if not -rank <= axis < rank or any(len(shape) != rank for shape in shapes):
            raise self._misfit(shapes)
        axis %= rank
        rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
        if len(rests) != 1:
            raise self._misfit(shapes)
        return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.concatenate(values, axis=self.parameters["axis"])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of every part, but for the one along which they are joined."""
        shape = self.shape or ()
        axis = self.parameters["axis"] % len(shape)
        parts = [(*axes[:axis], (), *axes[axis + 1 :]) for axes in operands]
        found = links.broadcast((*shape[:axis], 1, *shape[axis + 1 :]), *parts)
        return (*found[:axis], links.label(shape[axis]), *found[axis + 1 :])

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value, cut where it was joined."""
        if any(isinstance(operand, Constant) for operand in self.operands):
            return None
        axis = self.parameters["axis"]
        cuts = np.cumsum([operand.shape[axis] for operand in self.operands])[:-1]  # type: ignore[index]
        return list(keras.ops.split(value, [int(cut) for cut in cuts], axis=axis))


@register
class Stack(_Joined):
    """Joined along a new axis."""

    name = "stack"

    def infer_shape(self, *shapes: Shape) -> Shape:
        axis, rank = self.parameters["axis"], len(shapes[0]) + 1
        if not -rank <= axis < rank or len(set(shapes)) != 1:
            raise self._misfit(shapes)
        axis %= rank
        return (*shapes[0][:axis], len(shapes), *shapes[0][axis:])

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.stack(values, axis=self.parameters["axis"])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of every entry, and the new one."""
        shape = self.shape or ()
        axis = self.parameters["axis"] % len(shape)
        found = links.broadcast((*shape[:axis], *shape[axis + 1 :]), *operands)
        return (*found[:axis], links.label(shape[axis]), *found[axis:])

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The entries along the axis."""
        if any(isinstance(operand, Constant) for operand in self.operands):
            return None
        return list(keras.ops.unstack(value, axis=self.parameters["axis"]))


@register
class Where(Node):
    """Chosen elementwise by a condition."""

    name, arity = "where", 3

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The broadcast of all three shapes."""
        return tuple(np.broadcast_shapes(*shapes))

    def infer_dtype(self, *dtypes: str) -> str:
        """Keras's promotion of the two values."""
        return result_type(*dtypes[1:])

    def compute(self, *values: Tensor) -> Tensor:
        condition = keras.ops.cast(values[0], "bool")
        return keras.ops.where(condition, values[1], values[2])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Axes that meet are one."""
        return links.broadcast(self.shape or (), *operands)


MAX_LABELS = 52


@register
class Einsum(Node):
    """A contraction in Einstein's notation, with explicit output and no ellipsis."""

    name, arity, accepts = "einsum", None, ("equation",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """An equation of letters, with explicit output."""
        equation = given.get("equation")
        if not isinstance(equation, str) or equation.count("->") != 1:
            raise InvalidConfig(
                "An equation comes first, and has the axes of each operand and after '->' those of the result, as in "
                f"`tether.ops.einsum('ij,jk->ik', a, b)`. {received(equation=equation)}"
            )
        equation = equation.replace(" ", "")
        inputs, output = equation.split("->")
        labels = set(inputs) - {","}
        if not all(label.isascii() and label.isalpha() for label in labels | set(output)) or len(labels) > MAX_LABELS:
            raise InvalidConfig(
                "An equation has letters, commas and '->', a letter for each axis and no '...', as in 'ij,jk->ik'. "
                f"{received(equation=equation)}"
            )
        if not set(output) <= labels or len(set(output)) != len(output):
            raise InvalidConfig(
                f"The output has each label once, and all stand on the left. {received(equation=equation)}"
            )
        return {"equation": equation}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes of the output's labels."""
        inputs, output = self.parameters["equation"].split("->")
        terms = inputs.split(",")
        sizes: dict[str, int] = {}
        for place, (term, shape) in enumerate(zip(terms, shapes, strict=False)):
            if len(term) != len(shape):
                raise ShapeMismatch(
                    f"In {self.notation()}, {term!r} names {len(term)} axes and "
                    f"{self.operands[place].notation()} has shape {shape}."
                )
            for label, size in zip(term, shape, strict=True):
                if sizes.setdefault(label, size) != size:
                    raise ShapeMismatch(f"In {self.notation()}, axis {label!r} has sizes {sizes[label]} and {size}.")
        if len(terms) != len(shapes):
            given = ", ".join(operand.notation() for operand in self.operands)
            raise ShapeMismatch(
                f"{self.parameters['equation']!r} names {len(terms)} operands, separated by commas, and {len(shapes)} "
                f"came: {given}. {received(operands=len(shapes))}"
            )
        return tuple(sizes[label] for label in output)

    def infer_dtype(self, *dtypes: str) -> str:
        return result_type(*dtypes)

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.einsum(self.parameters["equation"], *values)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """An axis for each letter, in all operands that have it."""
        inputs, output = self.parameters["equation"].split("->")
        found: dict[str, Row] = {}
        for letters, axes in zip(inputs.split(","), operands, strict=True):
            for letter, row in zip(letters, axes, strict=True):
                found[letter] = links.same(found.get(letter, ()), row)
        return tuple(found[letter] for letter in output)

    def format(self, *terms: Term) -> Term:
        return Term(f"einsum({self.parameters['equation']!r}, {', '.join(term.text for term in terms)})")


def concatenate(xs: Iterable[object], axis: int = 0) -> Expression:
    """Values joined along an axis; the other sizes must agree.

    Args:
        xs: Weights, expressions or arrays, of one shape but for that axis.
        axis: The axis.

    Returns:
        The expression; its size along the axis is the sum of theirs.

    Raises:
        ShapeMismatch: Other sizes differ.
        TetherError: There is nothing to join.

    Example:
    ```python
    old = tether.Weight((100, 16), name="old", trainable=False)
    new = tether.Weight((3, 16), name="new")
    layer = tether.tie(keras.layers.Embedding(103, 16), embeddings=tether.ops.concatenate([old, new]))
    ```
    """
    return Concatenate(*_several("concatenate", xs), axis=axis)


def stack(xs: Iterable[object], axis: int = 0) -> Expression:
    """Values of one shape joined along a new axis.

    Args:
        xs: Weights, expressions or arrays, of one shape.
        axis: Where the new axis is in the result.

    Returns:
        The expression, with one axis more, of size `len(xs)`.

    Raises:
        ShapeMismatch: The shapes differ.
        TetherError: There is nothing to join.

    Example:
    ```python
    heads = [tether.Weight((16, 8), name=f"head_{number}") for number in range(2)]
    kernel = tether.ops.stack(heads, axis=1)
    assert kernel.shape == (16, 2, 8)
    ```
    """
    return Stack(*_several("stack", xs), axis=axis)


def _several(function: str, xs: object) -> list[Expression]:
    """The expressions of a list."""
    if isinstance(xs, Expression) or not isinstance(xs, Iterable):
        raise NotATensor(
            f"`{function}` takes a list of weights and expressions, and then the axis: "
            f"`tether.ops.{function}([a, b], axis=0)`. {received(xs=xs)}"
        )
    return [as_expression(x) for x in xs]


def where(condition: object, x1: object, x2: object) -> Expression:
    """`x1` where the condition holds (is not zero), `x2` elsewhere, under NumPy's broadcasting.

    Args:
        condition: An array of truth values, or of numbers; a weight or an expression too.
        x1: A weight, an expression, a number or an array.
        x2: The same.

    Returns:
        The expression, of the shape to which all three broadcast.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight((4, 4), name="w")
    lower = tether.ops.where(np.tril(np.ones((4, 4), bool)), w, 0)
    assert (np.triu(lower.numpy(), 1) == 0).all()
    ```
    """
    if isinstance(condition, bool):
        raise TetherError(
            "The condition of `where` is one truth value for all numbers. An expression is compared with `==` as a "
            "whole; number by number write `tether.ops.apply(keras.ops.equal, w, 0)`. "
            f"{received(condition=condition)}"
        )
    return Where(as_expression(condition), as_expression(x1), as_expression(x2))


def einsum(subscripts: str, *operands: object) -> Expression:
    """A contraction in Einstein's notation, such as `"ij,jk->ik"`: explicit output, no ellipsis.

    Args:
        subscripts: The letters of the operands' axes, and after `->` those of the result.
        *operands: Weights, expressions or arrays, each with as many axes as it has letters.

    Returns:
        The expression, with an axis for each letter after `->`.

    Raises:
        ShapeMismatch: An operand has another number of axes, or a letter two sizes.
        TetherError: The subscripts cannot be read.

    Example:
    ```python
    core = tether.Weight((2, 2, 2), name="core")
    left, right = tether.Weight((8, 2), name="left"), tether.Weight((2, 4), name="right")
    kernel = tether.ops.einsum("ia,abc,cj->ijb", left, core, right)
    assert kernel.shape == (8, 4, 2)
    ```
    """
    if isinstance(subscripts, str):
        return Einsum(*map(as_expression, operands), equation=subscripts)
    return Einsum(as_expression(0), equation=subscripts)  # which says how an equation reads


provide(transpose=transpose, swapaxes=swapaxes, reshape=reshape, index=index, cast=cast)

"""One of several values, chosen when the layer is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from tether.errors import ShapeMismatch, TetherError, received
from tether.weights.expression import Expression, Node, Shape, Tensor, Term, as_expression
from tether.weights.operators.arithmetic import result_type
from tether.weights.operators.registry import register


@register
class Choose(Node):
    """`[a, b, c][index]`: the first operand is the index, a whole number of shape `()`.

    The options that are not chosen get a gradient of zero, on every backend, whether the index is known
    when the backend compiles or a tensor. They are live weights: weight decay goes on for them.
    """

    name, arity, indices = "choose", None, (0,)

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The one shape of all options."""
        index, *options = shapes
        if index != () or not options:
            raise ShapeMismatch(f"`choose` takes one whole number and the options. {received(index_shape=index)}")
        if any(shape != options[0] for shape in options):
            listed = ", ".join(f"{o.notation()} has shape {s}" for o, s in zip(self.operands[1:], options, strict=True))
            raise ShapeMismatch(f"What can be chosen must have one shape: {listed}.")
        return options[0]

    def infer_dtype(self, *dtypes: str) -> str | None:
        """Keras's promotion of the options."""
        index, *options = dtypes
        if not index.startswith(("int", "uint")):
            raise TetherError(f"An index is a whole number. {received(dtype=index)}")
        return options[0] if len(set(options)) == 1 else result_type(*options)

    def compute(self, *values: Tensor) -> Tensor:
        """The option that the index names; one beyond the ends is taken as the nearest."""
        index, *options = values
        dtypes = {keras.backend.standardize_dtype(option.dtype) for option in options}
        if len(dtypes) > 1:
            options = [keras.ops.cast(option, result_type(*sorted(dtypes))) for option in options]
        last = len(options) - 1
        if isinstance(index, int):
            chosen = options[min(max(index, 0), last)]
        else:
            branches = [lambda *given, place=place: given[place] for place in range(len(options))]
            index = keras.ops.clip(keras.ops.cast(index, "int32"), 0, last)
            chosen = keras.ops.switch(index, branches, *options)
        # The sum of no elements is zero, and so is its gradient: every option has one.
        nothing = [keras.ops.sum(keras.ops.reshape(option, (-1,))[:0]) for option in options]
        return keras.ops.add(chosen, keras.ops.cast(sum(nothing[1:], nothing[0]), chosen.dtype))

    def format(self, *terms: Term) -> Term:
        """`[a, b][index]`."""
        index, *options = terms
        return Term(f"[{', '.join(option.text for option in options)}][{index.text}]")

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The same shape."""
        return shape


def choose(index: Any, options: Sequence[Any]) -> Expression:
    """One of the options, by an argument (or expression) that is a whole number."""
    return Choose(as_expression(index), *map(as_expression, options))

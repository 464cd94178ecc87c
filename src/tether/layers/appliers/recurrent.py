"""Cells of recurrent layers: what their time loop computes at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tether.layers.appliers.dense import Shape
from tether.layers.appliers.planned import applied
from tether.planning.plan import Problem


def step_problem(shape: Shape, **call: Any) -> Problem:
    """Rows times a matrix, at each step of a loop."""
    return Problem(("b", "i"), ("i", "o"), ("b", "o"), shape, repeated=True, **call)


def _drops(cell: Any, training: Any) -> bool:
    return bool(training) and (cell.dropout > 0 or cell.recurrent_dropout > 0)


def _projected(cell: Any, x: Any, h: Any) -> tuple[Any, Any] | None:
    """The input and the state, each times its kernel; `None` if both kernels are to be built."""
    of_x, of_h = applied(cell.kernel, x, step_problem), applied(cell.recurrent_kernel, h, step_problem)
    if of_x is None and of_h is None:
        return None
    return (
        keras.ops.matmul(x, cell.kernel) if of_x is None else of_x,
        keras.ops.matmul(h, cell.recurrent_kernel) if of_h is None else of_h,
    )


def lstm_cell_call(base: Any) -> Callable[..., Any]:
    """`LSTMCell.call`."""

    def call(self: Any, inputs: Any, states: Any, training: bool = False) -> Any:
        found = None if _drops(self, training) else _projected(self, inputs, states[0])
        if found is None:
            return base.call(self, inputs, states, training=training)
        z = keras.ops.add(*found)
        if self.use_bias:
            z = keras.ops.add(z, self.bias)
        i, f, new, o = keras.ops.split(z, 4, axis=-1)
        c = self.recurrent_activation(f) * states[1] + self.recurrent_activation(i) * self.activation(new)
        h = self.recurrent_activation(o) * self.activation(c)
        return h, [h, c]

    return call


def gru_cell_call(base: Any) -> Callable[..., Any]:
    """`GRUCell.call`, with the reset gate after the product."""

    def call(self: Any, inputs: Any, states: Any, training: bool = False) -> Any:
        nested = isinstance(states, (list, tuple))
        before = states[0] if nested else states
        found = None
        if self.reset_after and not _drops(self, training):
            found = _projected(self, inputs, before)
        if found is None:
            return base.call(self, inputs, states, training=training)
        of_x, of_h = found
        if self.use_bias:
            of_x, of_h = keras.ops.add(of_x, self.bias[0]), keras.ops.add(of_h, self.bias[1])
        x_update, x_reset, x_new = keras.ops.split(of_x, 3, axis=-1)
        h_update, h_reset, h_new = keras.ops.split(of_h, 3, axis=-1)
        update = self.recurrent_activation(x_update + h_update)
        reset = self.recurrent_activation(x_reset + h_reset)
        h = update * before + (1 - update) * self.activation(x_new + reset * h_new)
        return h, [h] if nested else h

    return call


def simple_cell_call(base: Any) -> Callable[..., Any]:
    """`SimpleRNNCell.call`."""

    def call(self: Any, sequence: Any, states: Any, training: bool = False) -> Any:
        nested = isinstance(states, (list, tuple))
        found = None if _drops(self, training) else _projected(self, sequence, states[0] if nested else states)
        if found is None:
            return base.call(self, sequence, states, training=training)
        h = keras.ops.add(*found)
        if self.bias is not None:
            h = keras.ops.add(h, self.bias)
        if self.activation is not None:
            h = self.activation(h)
        return h, [h] if nested else h

    return call

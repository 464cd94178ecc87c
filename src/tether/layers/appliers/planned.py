"""The plan of one use: made at the first call of each kind, then kept with the view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras

from tether import keras_seam
from tether.layers.view import View
from tether.planning import control
from tether.planning.alternatives import make_plan
from tether.planning.control import Noted
from tether.planning.execution import Convolve, execute
from tether.planning.plan import Coded, Integers, Plan, Problem
from tether.planning.products import Products, products
from tether.weights.evaluation import remembers
from tether.weights.expression import Expression, Tensor, is_view, live_weights

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_KEPT = 256
"""Plans kept for one use: an eager loop over inputs of ever other lengths does not fill the memory."""

MakeProblem = Callable[..., Problem]


class Planner:
    """The plans of one view."""

    def __init__(self, view: View) -> None:
        self.expression = view.expression
        self.weights = view.expression.weights_used()
        self._products: Products | None = None
        self._plans: dict[Any, Plan] = {}

    @property
    def products(self) -> Products:
        """The weight as a sum of products."""
        if self._products is None:
            self._products = products(self.expression)
        return self._products

    def stored(self) -> list[Tensor]:
        """What is stored in the weights now."""
        return [keras_seam.raw_value(weight.variable) for weight in self.weights]

    def plan(self, view: View, x: Tensor, problem: MakeProblem, training: bool, dtype: str) -> Plan:
        """The plan for a call with an input of this shape."""
        live = view.use.live
        flags = tuple(weight.trainable for weight in self.weights) if training and live else ()
        mode, kept = control.mode(), remembers()
        # JAX has symbols for sizes that are not known yet, which cannot be compared.
        shape = tuple(size if isinstance(size, int) else None for size in x.shape)
        key = (shape, dtype, training, live, flags, mode, kept, problem)
        found = self._plans.get(key)
        if found is None:
            asked = problem(shape, training=training, itemsize=BYTES.get(dtype, 4))

            def trains(expression: Expression) -> bool:
                return live and any(weight.trainable for weight in live_weights(expression))

            found = make_plan(replace(asked, repeated=True) if kept else asked, self.products, trains, mode)
            if len(self._plans) >= MAX_KEPT:
                self._plans.clear()
            self._plans[key] = found
        control.note(lambda: Noted(view.path, self.expression.notation(), shape, found))
        return found


def planner_of(view: Any) -> Planner | None:
    """The planner of what a layer holds as its weight, or `None` if there is nothing to plan."""
    if not isinstance(view, View) or is_view(view.expression) or not keras_seam.autocasts(view):
        return None
    planner = view.planner
    if planner is None or planner.expression is not view.expression:
        if view.expression.shape is None:
            return None
        planner = view.planner = Planner(view)
    return planner


def applied(view: Any, x: Tensor, problem: MakeProblem, convolve: Convolve | None = None) -> Tensor | None:
    """What the layer computes with its weight, by plan; `None` where the layer has to build the weight itself."""
    planner = planner_of(view)
    if planner is None:
        return None
    dtype = view.dtype
    training = control.assumed_training()
    if training is None:
        training = keras_seam.is_training_call()
        if not training and keras_seam.TRACES_GRADIENTS:
            training = keras_seam.is_differentiated(x, *planner.stored())
    plan = planner.plan(view, x, problem, training, dtype)
    if plan.materializes or (keras_seam.is_sparse(x) and not plan.takes_sparse):
        return None
    factors = [_value(view, factor, dtype, how) for factor, how in plan.reads]
    return execute(plan, x, factors, convolve)


def _value(view: View, factor: Expression, dtype: str, how: Coded | None) -> Any:
    """A factor as the view would read it: in the view's dtype, without a gradient if the use has none."""
    if how is not None:
        return Integers(keras_seam.plain_tensor(view.read(how.stored)), how, dtype)
    value = keras_seam.plain_tensor(view.read(factor))
    if keras_seam.tensor_dtype(value) != dtype:
        value = keras.ops.cast(value, dtype)
    return value if view.use.live else keras.ops.stop_gradient(value)


__all__ = ["Planner", "applied", "planner_of"]

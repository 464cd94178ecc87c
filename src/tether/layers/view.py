"""What a tied layer holds in the place of a variable: no storage, an expression read at every access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.weights.evaluation import evaluate
from tether.weights.expression import Expression, Tensor
from tether.weights.weight import Use, Weight


class View(keras_seam.Variable):
    """A variable of a tied layer: its value is an expression over stored weights.

    It is never tracked: what is stored, counted, trained and saved are the expression's weights.
    Its value has the dtype that the layer asked for, then autocasts as a variable of the layer would.
    """

    def __init__(
        self,
        use: Use,
        *,
        name: str,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        autocast: bool,
        trainable: bool,
    ) -> None:
        keras_seam.prepare_view(self, name=name, path=path, shape=shape, dtype=dtype, autocast=autocast)
        self.use = use
        self.slot_trainable = trainable
        self.frozen = False
        self.planner: Any = None

    @property
    def expression(self) -> Expression:
        """What the view evaluates."""
        return self.use.expression

    @property
    def value(self) -> Tensor:
        """The tensor, under the caller's stateless and autocast scopes."""
        scope = keras_seam.get_autocast_scope()
        if scope is not None and scope.dtype is not None and not keras_seam.autocasts(self):
            with keras_seam.AutocastScope(None):
                value = self._read()
        else:
            value = self._read()
        return value

    def _read(self) -> Tensor:
        use = self.use
        value = self.read(use.expression)
        dtype = self.dtype
        if keras_seam.tensor_dtype(value) != dtype:
            value = keras.ops.cast(value, dtype)
        if not use.live and keras_seam.is_float(dtype):
            value = keras.ops.stop_gradient(value)
        return value

    def read(self, part: Expression, how: Callable[[Expression], Any] = evaluate) -> Any:
        """What a function makes of the expression, or of a part of it, for this use: by default the tensor.

        Whatever a layer computes from its expression goes through here, so that somebody who watches can tell the
        uses of a weight apart.
        """
        return how(part)

    def assign(self, value: Any) -> Any:
        """Stores a value through the expression.

        Raises:
            NotInvertible: The expression has no inverse.
        """
        into = getattr(value, "into_view", None)
        if into is not None:
            into(self)
        else:
            self.expression.assign(value)
        return value

    def assign_add(self, value: Any) -> Any:
        """Adds to what is stored, through the expression."""
        return self.assign(keras.ops.add(self.value, value))

    def assign_sub(self, value: Any) -> Any:
        """Subtracts from what is stored, through the expression."""
        return self.assign(keras.ops.subtract(self.value, value))

    def numpy(self) -> Any:
        """The present value as a NumPy array."""
        return keras.ops.convert_to_numpy(self.value)

    @property
    def trainable(self) -> bool:
        """Whether a gradient flows through this use."""
        keras_seam.refuse_spectral_normalization(self)
        return self.use.live

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.frozen = not value
        layer = self.use.layer()
        self.follow(True if layer is None else keras_seam.own_trainable_flag(layer))

    @property
    def regularizer(self) -> Any:
        """What adds a penalty on this use's value to the losses of its layer."""
        return self.use.regularizer

    @regularizer.setter
    def regularizer(self, value: Any) -> None:
        if value is not None and not callable(value):
            raise TetherError(f"A regularizer is a function of a tensor, or None. {received(regularizer=value)}")
        self.use.regularizer = value

    @property
    def constraint(self) -> Any:
        """What the stored weight is held to after each step; only of a use that is the weight itself."""
        weight = self.expression
        return weight.present_constraint if isinstance(weight, Weight) else None

    @constraint.setter
    def constraint(self, value: Any) -> None:
        if value is not None and not callable(value):
            raise TetherError(f"A constraint is a function of a tensor, or None. {received(constraint=value)}")
        weight = self.expression
        if isinstance(weight, Weight):
            weight.present_constraint = value
        elif value is not None:
            raise Unsupported(
                f"A constraint acts on what is stored, and {self.path} is {weight.notation()}. Constrain the weight, "
                "`tether.Weight(constraint=...)`, or write the constraint into the expression."
            )

    def follow(self, layer_trainable: bool) -> None:
        """Takes over the layer's flag: a use is live if layer, attribute and user all let it train."""
        live = layer_trainable and self.slot_trainable and not self.frozen
        if live != self.use.live:
            keras_seam.before_freezing()
            self.use.live = live
            for weight in self.expression.weights_used():
                weight.refresh(self.use)

    def __repr__(self) -> str:
        return f"<View {self.path} = {self.expression.notation()}, shape={tuple(self.shape)}, dtype={self.dtype}>"

    def __reduce__(self) -> Any:
        raise TetherError(
            f"The view {self.path} cannot be copied by itself: copy or pickle the layer, or take its value."
        )


def view_like(variable: Any, use: Use, *, trainable: bool) -> View:
    """A view with the name, path, shape and dtype of a variable, or of another view."""
    return View(
        use,
        name=variable.name,
        path=variable.path,
        shape=shape_of(variable),
        dtype=keras_seam.stored_dtype(variable),
        autocast=keras_seam.autocasts(variable),
        trainable=trainable,
    )


def shape_of(variable: Any) -> tuple[int, ...]:
    """The shape of a variable or view, in plain numbers."""
    return tuple(int(n) for n in variable.shape)


def numpy_of(variable: Any) -> np.ndarray[Any, Any]:
    """A copy of the value of a variable or view."""
    return np.array(keras.ops.convert_to_numpy(variable.value))


def stored_variables(variable: Any) -> list[Any]:
    """The stored variables behind a variable: itself, or those of a view's weights."""
    if isinstance(variable, View):
        return [weight.variable for weight in variable.expression.weights_used() if weight.is_built]
    return [variable]

"""An optimizer whose learning rate differs from variable to variable.

Every optimizer of Keras makes its step from a learning rate that it is given beside the gradient, so a factor on that
rate is all that a variable of its own speed needs. It is given in two places: `update_step` of one variable, and on
PyTorch, for the optimizers that step all variables at once, `_parallel_update_step`. Weight decay reads the rate
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from tether.keras_seam.layers import set_untracked
from tether.types import Tensor

_Base: Any = keras.Optimizer if TYPE_CHECKING else object


class RatedOptimizer(_Base):
    """Comes before the class of a Keras optimizer; a subclass says the factor of a variable."""

    _factor = 1.0
    """That of the variables whose weights decay now."""

    def factor_of(self, variable: keras.Variable) -> float:
        """The factor on the learning rate of a variable."""
        raise TypeError(f"{type(self).__name__} does not say how fast a variable learns.")

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        """The step of one variable; TensorFlow gives its own, of which Keras's is known."""
        known = self._trainable_variables[self._get_variable_index(variable)]
        super().update_step(gradient, variable, _times(learning_rate, self.factor_of(known)))

    def _parallel_update_step(
        self, grads: Sequence[Tensor], variables: Sequence[keras.Variable], learning_rate: Tensor
    ) -> None:
        whole = getattr(self, "_u_product", None)  # what Nadam advances once a step
        before = None if whole is None else keras.ops.copy(whole.value)
        for factor, places in self._by_factor(variables):
            if whole is not None:
                whole.assign(before)
            given = [grads[place] for place in places], [variables[place] for place in places]
            super()._parallel_update_step(*given, _times(learning_rate, factor))

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        variables = [variable for variable in variables if self.weight_decay and self._use_weight_decay(variable)]
        for factor, places in self._by_factor(variables):
            set_untracked(self, "_factor", factor)
            try:
                super()._apply_weight_decay([variables[place] for place in places])
            finally:
                set_untracked(self, "_factor", 1.0)

    def _get_current_learning_rate(self) -> Tensor:
        return _times(super()._get_current_learning_rate(), self._factor)

    def _by_factor(self, variables: Sequence[keras.Variable]) -> Iterator[tuple[float, list[int]]]:
        """The places of the variables of each factor."""
        found: dict[float, list[int]] = {}
        for place, variable in enumerate(variables):
            found.setdefault(self.factor_of(variable), []).append(place)
        yield from found.items()


def _times(learning_rate: Tensor, factor: float) -> Tensor:
    return learning_rate if factor == 1.0 else keras.ops.multiply(learning_rate, factor)


__all__ = ["RatedOptimizer"]

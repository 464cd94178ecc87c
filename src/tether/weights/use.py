"""One place where an expression is read: what decides whether the weights in it train."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tether.weights.expression import Expression, live_weights, resolved

if TYPE_CHECKING:
    from tether.weights.weight import Weight


@dataclass(eq=False)
class Use:
    """One layer's attribute that reads an expression. Registered from `tie` until `untie`.

    It outlives its layer, so that what trains never depends on when Python collects garbage.
    """

    name: str
    """The layer's own name for the weight: `kernel`."""
    expression: Expression
    layer: weakref.ref[Any]
    live: bool = True
    """Whether gradient may flow through this use: the layer is trainable, and so is the attribute."""
    regularizer: Any = None

    def resolve(self) -> None:
        """Writes out what weights in the expression have become, and tells the weights in it of the use."""
        self.expression = resolved(self.expression)
        for weight in self.expression.weights_used():
            weight.add_use(self)

    def reaches(self, weight: Weight) -> bool:
        """Whether a gradient reaches the weight through this use."""
        return self.live and weight in live_weights(self.expression)

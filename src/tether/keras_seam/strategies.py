"""TensorFlow's strategies: which one has a variable on its replicas, and whether a new variable would join it.

A variable that is made in the scope of a `MirroredStrategy` has a copy on each replica. One that is made outside has
none, and an optimizer that meets it in a replica fails in the middle of a step. So whoever makes variables beside
those of a strategy has to be in its scope.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import backend as _backend

from tether.errors import Unsupported

_HAS_STRATEGIES = _backend.backend() == "tensorflow"


def strategy_of(variable: keras.Variable) -> Any:
    """The strategy in whose scope a variable was made, `None` if in none."""
    return getattr(variable._value, "distribute_strategy", None) if _HAS_STRATEGIES else None


def refuse_outside(layers: Iterable[keras.Layer]) -> None:
    """Refuses to make variables for layers whose others are those of a strategy, outside of its scope.

    Raises:
        Unsupported: That is what would happen.
    """
    if not _HAS_STRATEGIES:
        return
    import tensorflow as tf

    present = tf.distribute.get_strategy()
    for variable in (variable for layer in layers for variable in layer.variables):
        strategy = strategy_of(variable)
        if strategy is not None and strategy is not present:
            raise _outside(variable, strategy)


def refuse_mixed(layers: Iterable[keras.Layer]) -> None:
    """Refuses layers of which some variables were made in the scope of a strategy, and some outside.

    Raises:
        Unsupported: There is such a layer.
    """
    for layer in layers if _HAS_STRATEGIES else ():
        inside = [variable for variable in layer.variables if strategy_of(variable) is not None]
        if inside and len(inside) < len(layer.variables):
            raise _outside(inside[0], strategy_of(inside[0]))


def _outside(variable: keras.Variable, strategy: Any) -> Unsupported:
    return Unsupported(
        f"The weight {variable.path!r} was made in the scope of a `{type(strategy).__name__}`, and what is made beside "
        "it here would have no copy on the replicas. Do it in the scope: `with strategy.scope(): ...`, ties, adapters "
        "and all that makes variables. Nothing was changed."
    )

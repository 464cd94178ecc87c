"""Functions of expressions, named as in `keras.ops`.

They take weights, expressions, numbers and arrays, and return an expression: nothing is computed
until a layer is called or `.value` is read.

Example:
```python
frozen, free = tether.Weight((990, 64), name="frozen"), tether.Weight((10, 64), name="free")
embeddings = tether.ops.concatenate([frozen.stop_gradient(), free], axis=0)
layer = tether.tie(keras.layers.Embedding(1000, 64), embeddings=embeddings)
```
"""

from typing import TYPE_CHECKING

import keras

from tether.errors import not_there
from tether.weights.integers import integers
from tether.weights.operators.arithmetic import (
    add,
    divide,
    matmul,
    multiply,
    negative,
    scale_gradient,
    stop_gradient,
    subtract,
)
from tether.weights.operators.choice import choose
from tether.weights.operators.elementwise import abs, exp, log, max, maximum, mean, min, minimum, power, sqrt, sum
from tether.weights.operators.function import apply
from tether.weights.operators.indexing import take
from tether.weights.operators.structure import (
    cast,
    concatenate,
    einsum,
    reshape,
    stack,
    swapaxes,
    transpose,
    where,
)

__all__ = [
    "abs", "add", "apply", "cast", "choose", "concatenate", "divide", "einsum", "exp", "integers", "log", "matmul",
    "max", "maximum", "mean", "min", "minimum", "multiply", "negative", "power", "reshape", "scale_gradient", "sqrt",
    "stack", "stop_gradient", "subtract", "sum", "swapaxes", "take", "transpose", "where",
]  # fmt: skip


if not TYPE_CHECKING:  # or every name would pass a type checker

    def __getattr__(name: str) -> object:
        """Says what there is in the place of a name that is none."""
        if hasattr(keras.ops, name):
            raise AttributeError(
                f"`tether.ops` has no {name!r}. Any function of `keras.ops` goes into an expression by "
                f"`tether.ops.apply(keras.ops.{name}, w)`."
            )
        raise AttributeError(not_there("tether.ops", name, __all__))

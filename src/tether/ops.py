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
from tether.weights.operators.function import apply
from tether.weights.operators.structure import cast, concatenate, einsum, reshape, stack, take, transpose, where

__all__ = [
    "add", "apply", "cast", "choose", "concatenate", "divide", "einsum", "matmul", "multiply", "negative", "reshape",
    "scale_gradient", "stack", "stop_gradient", "subtract", "take", "transpose", "where",
]  # fmt: skip

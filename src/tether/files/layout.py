"""How a tensor of somebody else's file holds a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tether.errors import TetherError, received
from tether.files.entries import Array


@dataclass(frozen=True, init=False)
class Tensor:
    """A tensor of a file, and how it holds a weight of the model.

    Args:
        *names: What it is called. The first that a file has is read; the first is written.
        inputs: For a kernel as PyTorch's `Linear` stores it, outputs first: how many leading axes of the model's
            kernel are inputs. A kernel with an axis of heads is folded into two axes there. Left out, the tensor is
            laid out as the weight.
        folded: Whether all axes of the weight are one there, as in the bias of a projection to heads.
        part: `(k, n)`: the weight is the k-th of n equal parts of the tensor's first axis, as where query, key and
            value are one tensor.

    Example:
    ```python
    names = {"head.kernel": tether.files.Tensor("lm_head.weight", "embed_tokens.weight", inputs=1)}
    tether.files.load_safetensors(model, "model.safetensors", names=names)
    ```
    """

    names: tuple[str, ...]
    inputs: int | None
    folded: bool
    part: tuple[int, int] | None

    def __init__(
        self, *names: str, inputs: int | None = None, folded: bool = False, part: tuple[int, int] | None = None
    ) -> None:
        if not names or not all(type(name) is str and name for name in names):
            raise TetherError(f"A tensor of a file has a name, or several to look for. {received(names=names)}")
        if inputs is not None and (type(inputs) is not int or inputs < 1):
            raise TetherError(f"`inputs` is how many axes of a kernel are inputs. {received(inputs=inputs)}")
        if part is not None and not 0 <= part[0] < part[1]:
            raise TetherError(f"`part` is a number from 0, and how many parts there are. {received(part=part)}")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "folded", bool(folded))
        object.__setattr__(self, "part", part)

    @property
    def is_plain(self) -> bool:
        """Whether it is laid out as the weight."""
        return self.inputs is None and self.part is None and not self.folded

    def describe(self) -> str:
        """What it holds, in a few words."""
        return "a kernel" if self.inputs is not None else "a part" if self.part is not None else "folded, one"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, of the weight's."""
        if self.inputs is not None:
            shape = (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs]))
        elif self.folded:
            shape = (math.prod(shape),)
        return shape if self.part is None else (shape[0] * self.part[1], *shape[1:])

    def to_weight(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The weight of this shape, from the tensor."""
        if self.part is not None:
            size = len(array) // self.part[1]
            array = array[self.part[0] * size : (self.part[0] + 1) * size]
        return (array if self.inputs is None else array.T).reshape(shape)

    def to_file(self, weight: Array) -> Array:
        """The tensor, or this part of it, from the weight."""
        if self.inputs is not None:
            return np.ascontiguousarray(weight.reshape(math.prod(weight.shape[: self.inputs]), -1).T)
        return weight.reshape(-1) if self.folded else weight


__all__ = ["Tensor"]

"""FourierFT: a sum of a base and a wave of few frequencies, of which the heights are trained.

    W' = W + s · Re(F⁻¹ S),   S: zero but at some places that a seed chooses, where it is c, started at zero

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform" (arXiv:2405.03003).
"""

from __future__ import annotations

import functools
import math

import keras
import numpy as np

from tether.errors import InvalidConfig, ShapeMismatch, as_int, received
from tether.forms.form import (
    AddedForm,
    Float32Node,
    as_alpha,
    as_dtype,
    as_rank,
    from_matrix,
    part,
    rows_and_columns,
    shape_of_base,
    torch_draws,
)
from tether.forms.low_rank import number_before, stored_behind
from tether.types import Array, Config, Tensor
from tether.weights.expression import MAX_ELEMENTS, Expression, Shape, Term, register
from tether.weights.weight import Weight

__all__ = ["fourier"]


@register
class Waves(Float32Node):
    """The real part of the inverse transform of a matrix that is zero but at some places."""

    name, accepts = "waves", ("rows", "columns", "seed")
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Three whole numbers: the sizes, and what chooses the places."""
        found = {name: as_int(given.get(name), name) for name in cls.accepts}
        if min(found["rows"], found["columns"]) < 1 or found["rows"] * found["columns"] > MAX_ELEMENTS:
            raise InvalidConfig(f"A matrix has rows and columns. {received(**given)}")
        return found

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The matrix, if it has so many places."""
        rows, columns, _ = self.parameters.values()
        if len(shapes[0]) != 1 or not 0 < shapes[0][0] <= rows * columns:
            raise ShapeMismatch(f"A matrix of {(rows, columns)} has no such frequencies. {received(shape=shapes[0])}")
        return rows, columns

    def compute_wide(self, *values: Tensor) -> Tensor:
        rows, columns, seed = self.parameters.values()
        places = _places(rows, columns, seed, int(values[0].shape[0]))
        spectrum = keras.ops.scatter(places, values[0], (rows, columns))
        return keras.ops.ifft2((spectrum, keras.ops.zeros_like(spectrum)))[0]

    def format(self, *terms: Term) -> Term:
        """`waves(c)`."""
        return Term(f"waves({terms[0].text})")


@functools.lru_cache(maxsize=256)
def _places(rows: int, columns: int, seed: int, count: int) -> Array:
    """The first of all places in an order that PyTorch draws from a seed; inputs vary fastest there."""
    size = rows * columns
    moved: dict[int, int] = {}
    found = []
    for place, draw in enumerate(torch_draws(seed, 0, count).tolist()):
        other = place + draw % (size - place)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    chosen = np.asarray(found, "int64")
    return np.stack([chosen % rows, chosen // rows], axis=1).astype("int32")


class Fourier(AddedForm):
    """What `tether.forms.fourier` makes: the expression, and weights of its own."""

    def __init__(self, count: int, scale: float, seed: int, split: int | None, dtype: str | None) -> None:
        self.stored = as_dtype(dtype)
        self.count, self.split = as_rank(count, "count"), split
        given = as_alpha(scale, "scale")
        self.scale, self.seed = 1.0 if given is None else given, as_int(seed, "`seed`")

    def delta(self, base: Expression) -> Expression:
        """`s · Re(F⁻¹ S)`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        n, m = math.prod(rows), math.prod(columns)
        if self.count > n * m:
            raise ShapeMismatch(f"{base.notation()} has {n * m} frequencies. {received(count=self.count)}")
        heights = part(base, "fourier_c", "zeros", (self.count,), dtype=self.stored)
        return self.scale * from_matrix(Waves(heights, rows=n, columns=m, seed=self.seed), rows, columns)


def waves_of(part: Expression) -> tuple[float, Waves, Weight] | None:
    """The number before a FourierFT, its waves and their stored heights; `None` if a part is something else."""
    scale, waves = number_before(part)
    own = stored_behind(waves.operands[0]) if isinstance(waves, Waves) else None
    return None if own is None or not isinstance(waves, Waves) else (scale, waves, own)


def fourier(
    count: int = 1000,
    *,
    scale: float = 150.0,
    seed: int = 777,
    split: int | None = None,
    dtype: str | None = None,
) -> Fourier:
    """A wave of few frequencies, to be added to a weight (FourierFT).

    It starts at zero, so the sum starts at the base. What trains is one number for each frequency.

    Args:
        count: How many frequencies; at most as many as the weight has numbers.
        scale: What the wave is multiplied with.
        seed: What chooses the frequencies: as PyTorch's `randperm` does, so that PEFT chooses the same.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form, to be added to a base of two or more axes; the sum has the base's shape.

    Raises:
        TetherError: A number that makes no sense; at use, a base of fewer than two axes, or of fewer numbers.

    Example:
    ```python
    child = tether.inherit(parent, kernel=lambda w: w.stop_gradient() + tether.forms.fourier(16, scale=10.0))
    ```
    """
    return Fourier(count, scale, seed, split, dtype)

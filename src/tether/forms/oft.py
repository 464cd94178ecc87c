"""OFT: a base whose inputs are rotated, in blocks.

    W' = R W,   R = diag(R₁, …, R_k),   Rᵢ = (I + Qᵢ)(I − Qᵢ)⁻¹,   Qᵢ = −Qᵢᵀ started at zero

A rotation keeps the angles between the columns of W. Qiu et al. 2023, "Controlling Text-to-Image Diffusion by
Orthogonal Finetuning" (arXiv:2306.07280); with the first terms of a series for the inverse: Qiu et al. 2025,
"Orthogonal Finetuning Made Scalable" (arXiv:2506.19847).
"""

from __future__ import annotations

import math

import keras
import numpy as np

from tether import ops
from tether.errors import InvalidConfig, ShapeMismatch, as_int, received
from tether.forms.form import (
    AddedForm,
    Float32Node,
    as_dtype,
    as_rank,
    from_matrix,
    part,
    rows_and_columns,
    shape_of_base,
)
from tether.forms.low_rank import number_before, stored_behind
from tether.types import Config, Tensor
from tether.weights.expression import Expression, Shape, Term, program, register
from tether.weights.operators.structure import Einsum
from tether.weights.weight import Weight

__all__ = ["oft"]

_EACH, _ALIKE = "kij,kjo->kio", "ij,kjo->kio"


@register
class Turn(Float32Node):
    """What each of several rotations has more than the identity: `2 (I − Q)⁻¹ Q`, zero for a Q of zero.

    Each row of the operand is the upper triangle of a skew-symmetric Q.
    """

    name, accepts = "turn", ("terms",)
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """How many terms of the series `I + 2 Q + 2 Q² + …`, or none for the inverse itself."""
        terms = given.get("terms")
        if terms is not None and not 0 < as_int(terms, "terms") <= 64:
            raise InvalidConfig(f"A series has 1 to 64 terms. {received(terms=terms)}")
        return {"terms": terms}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """A square matrix for each row."""
        count, numbers = shapes[0]
        size = size_of(numbers)
        if size is None:
            raise ShapeMismatch(f"The upper triangle of a matrix has 1, 3, 6, 10, … numbers. {received(n=numbers)}")
        return count, size, size

    def compute_wide(self, *values: Tensor) -> Tensor:
        v = values[0]
        count, numbers = v.shape
        size = size_of(numbers) or 0
        place = np.zeros((size, size), "int32")
        place[np.triu_indices(size, 1)] = np.arange(1, numbers + 1)
        place += np.where(place.T > 0, place.T + numbers, 0)
        zero = keras.ops.zeros((count, 1), v.dtype)
        all_of = keras.ops.concatenate([zero, v, keras.ops.negative(v)], axis=1)
        q = keras.ops.reshape(keras.ops.take(all_of, place.reshape(-1), axis=1), (count, size, size))
        terms = self.parameters["terms"]
        if terms is None:
            eye = keras.ops.eye(size, dtype=v.dtype)
            return keras.ops.solve(keras.ops.subtract(eye, q), keras.ops.multiply(2.0, q))
        # The last power of more than two terms counts once, as in PEFT.
        last = 0 if terms == 1 else 1 if terms == 2 else max(3, terms - 1)
        result, power = keras.ops.zeros_like(q), None
        for degree in range(1, last + 1):
            power = q if power is None else keras.ops.matmul(power, q)
            times = 1.0 if degree == last > 1 else 2.0
            result = keras.ops.add(result, keras.ops.multiply(times, power))
        return result

    def format(self, *terms: Term) -> Term:
        """`turn(q)`."""
        series = "" if self.parameters["terms"] is None else f", terms={self.parameters['terms']}"
        return Term(f"turn({terms[0].text}{series})")


def size_of(numbers: int) -> int | None:
    """The size of a matrix whose upper triangle has so many numbers; `None` if none has."""
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    return size if size > 1 and size * (size - 1) // 2 == numbers else None


class Oft(AddedForm):
    """What `tether.forms.oft` makes: the expression, and weights of its own."""

    def __init__(self, size: int, share: bool, terms: int | None, split: int | None, dtype: str | None) -> None:
        self.stored = as_dtype(dtype)
        self.size, self.share, self.split = as_block(size), bool(share), split
        self.terms = None if terms is None else as_rank(terms, "terms")

    def delta(self, base: Expression) -> Expression:
        """`(R − I) W`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        count, m = blocks(self.size, rows, base), math.prod(columns)
        shape = (1 if self.share else count, self.size * (self.size - 1) // 2)
        turn = Turn(part(base, "oft_q", "zeros", shape, dtype=self.stored), terms=self.terms)
        matrix = base.reshape(count, self.size, m)
        if self.share:
            turned = ops.einsum(_ALIKE, turn.reshape(self.size, self.size), matrix)
        else:
            turned = ops.einsum(_EACH, turn, matrix)
        return from_matrix(turned.reshape(count * self.size, m), rows, columns)


def as_block(size: object) -> int:
    """The size of a block.

    Raises:
        TetherError: It is no whole number of at least 2.
    """
    size = as_rank(size, "size")
    if size < 2:
        raise ShapeMismatch(f"A block that can turn has a size of 2 or more. {received(size=size)}")
    return size


def blocks(size: int, rows: Shape, base: Expression) -> int:
    """How many blocks of a size the rows of a base are.

    Raises:
        ShapeMismatch: They cannot be divided so.
    """
    count, rest = divmod(math.prod(rows), size)
    if rest:
        raise ShapeMismatch(
            f"{base.notation()} has {math.prod(rows)} inputs, which are no blocks of {size}. Take a size that divides "
            f"them. {received(size=size)}"
        )
    return count


def turned_of(part: Expression) -> tuple[Turn, Weight] | None:
    """What turns the base of an OFT, and the stored triangles of it; `None` if a part is something else."""
    scale, product = number_before(part)
    if scale != 1 or not isinstance(product, Einsum) or product.parameters["equation"] not in (_EACH, _ALIKE):
        return None
    turn = number_before(product.operands[0])[1]
    own = stored_behind(turn.operands[0]) if isinstance(turn, Turn) else None
    return None if own is None or not isinstance(turn, Turn) else (turn, own)


def turns_in(part: Expression) -> list[Turn]:
    """All that turns in a part."""
    return [step.expression for step in program(part) if isinstance(step.expression, Turn)]


def oft(
    size: int = 32,
    *,
    share: bool = False,
    terms: int | None = None,
    split: int | None = None,
    dtype: str | None = None,
) -> Oft:
    """Rotations of a weight's inputs, in blocks, to be added to it as what they change (OFT).

    They start at none, so the sum starts at the base. Lengths of outputs, and angles between them, stay what they are.

    Args:
        size: The size of the blocks; it divides the number of inputs.
        share: Whether all blocks of a weight turn alike.
        terms: How many terms of a series stand for the inverse, which is then no solve but a product or two; the
            rotation is no longer exact, the less so the farther it turns. PEFT's default is 5.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form, to be added to a base of two or more axes; the sum has the base's shape.

    Raises:
        TetherError: A number that makes no sense; at use, a base of fewer than two axes, or of a number of inputs that
            the size does not divide.

    Example:
    ```python
    child = tether.inherit(parent, kernel=tether.forms.oft(8))
    ```
    """
    return Oft(size, share, terms, split, dtype)

"""A matrix with orthonormal columns (or rows, if it is wide), made from an unconstrained one.

    householder:  Q = H₁ H₂ … H_k · sign(diag X),   Hᵢ = I − 2 yᵢ yᵢᵀ / ‖yᵢ‖²,   Y = tril(X, −1) + I
    cayley:       Q = B · (I − A/2)⁻¹ (I + A/2),    A = tril(X) − tril(X)ᵀ,  B a fixed orthogonal matrix

X is the base. Lezcano-Casado and Martínez-Rubio 2019, "Cheap Orthogonal Constraints in Neural Networks"
(arXiv:1901.08428); the product of reflections as one triangular solve: Joffrain et al. 2006, "Accumulating
Householder transformations, revisited" (ACM TOMS 32). The conventions are those of
`torch.nn.utils.parametrizations.orthogonal`.
"""

from __future__ import annotations

import keras
import numpy as np

from tether.errors import ShapeMismatch, TetherError, received
from tether.forms.form import (
    Float32Node,
    Form,
    as_array,
    as_matrix,
    base_expression,
    from_matrix,
    part,
    rows_and_columns,
    shape_of_base,
)
from tether.types import Array, Tensor
from tether.weights.expression import Expression, Shape, register

__all__ = ["orthogonal"]


class _Orthogonal(Float32Node):
    """A wide matrix is the transpose of a tall one, as in PyTorch."""

    __slots__ = ()

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the first operand, if it is a matrix."""
        if len(shapes[0]) != 2 or 0 in shapes[0]:
            raise ShapeMismatch(
                f"{self.operands[0].notation()} is no matrix, so it has no orthonormal columns. Give the weight its "
                f"shape where it is made, and it is read as one. {received(shape=shapes[0])}"
            )
        return shapes[0]

    def compute_wide(self, *values: Tensor) -> Tensor:
        x, *rest = values
        wide = x.shape[0] < x.shape[1]
        q = self.tall(keras.ops.transpose(x) if wide else x, *rest)
        return keras.ops.transpose(q) if wide else q

    def tall(self, x: Tensor, *rest: Tensor) -> Tensor:
        """The orthogonal matrix for an X with at least as many rows as columns."""
        raise TypeError(f"{type(self).__name__} does not compute.")

    def checked(self, value: Tensor) -> Array:
        """The value as a tall array with orthonormal columns."""
        array = as_array(value)
        array = array.T if array.shape[0] < array.shape[1] else array
        error = float(np.max(np.abs(array.T @ array - np.eye(array.shape[1]))))
        if not error <= 1e-6 * max(10, len(array)):
            raise self.out_of_range(
                "matrices with orthonormal columns (rows, if wide), such as `keras.initializers.Orthogonal()` makes",
                distance_of_their_products_from_the_identity=error,
            )
        return array

    def like(self, value: Tensor, array: Array) -> Tensor:
        """A tall array as a value of the first operand, of the shape of a value of this expression."""
        return self.start(array if array.shape == tuple(value.shape) else array.T)


@register
class Householder(_Orthogonal):
    """The product of the reflections that the columns below the diagonal stand for, in the compact WY form."""

    name = "householder"
    __slots__ = ()

    def tall(self, x: Tensor, *rest: Tensor) -> Tensor:
        """`(I - Y T Y₁ᵀ) · signs`, where T⁻¹ is the upper triangle of YᵀY with half its diagonal."""
        n, k = x.shape
        eye = keras.ops.eye(n, k, dtype=x.dtype)
        y = keras.ops.add(keras.ops.tril(x, -1), eye)
        gram = keras.ops.matmul(keras.ops.transpose(y), y)
        square = eye[:k]
        half = keras.ops.add(keras.ops.triu(gram, 1), keras.ops.multiply(0.5 * square, gram))
        solved = keras.ops.solve_triangular(half, keras.ops.transpose(y[:k]), lower=False)
        q = keras.ops.subtract(eye, keras.ops.matmul(y, solved))
        diagonal = keras.ops.sum(keras.ops.multiply(square, x[:k]), axis=0)  # only its signs count: no gradient
        return keras.ops.multiply(q, keras.ops.where(diagonal < 0, -1.0, 1.0))

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The same shape, if it is a matrix's."""
        return self.infer_shape(shape)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The reflections of a QR decomposition, and the signs of R on the diagonal."""
        array = self.checked(value)
        packed, tau = np.linalg.qr(array, mode="raw")
        x = np.tril(packed.T, -1)
        signs = np.where(np.diagonal(packed.T) < 0, -1.0, 1.0)
        # No reflection at all is one that flips a single axis, flipped back.
        x[range(len(tau)), range(len(tau))] = np.where(tau == 0, -signs, signs)
        return [self.like(value, x)]


@register
class Cayley(_Orthogonal):
    """The Cayley map of a skew-symmetric matrix, after a fixed orthogonal one."""

    name, arity = "cayley", 2
    __slots__ = ()

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of X, if the fixed matrix is square and of its longer side."""
        shape = super().infer_shape(*shapes)
        if shapes[1] != (max(shape), max(shape)):
            raise ShapeMismatch(
                f"A Cayley map of shape {shape} goes after a fixed matrix of shape {(max(shape), max(shape))}. "
                f"{received(shape=shapes[1])}"
            )
        return shape

    def tall(self, x: Tensor, *rest: Tensor) -> Tensor:
        """`B · (I - A/2)⁻¹ (I + A/2)`, its first columns."""
        n, k = x.shape
        lower = keras.ops.pad(keras.ops.tril(x), [[0, 0], [0, n - k]])
        half = keras.ops.multiply(0.5, keras.ops.subtract(lower, keras.ops.transpose(lower)))
        eye = keras.ops.eye(n, dtype=x.dtype)
        q = keras.ops.solve(keras.ops.subtract(eye, half), keras.ops.add(eye, half)[:, :k])
        return keras.ops.matmul(rest[0], q)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """Zero, after a fixed matrix that begins with the value and is completed by a QR decomposition."""
        array = self.checked(value)
        n, k = array.shape
        rest = np.linalg.qr(array, mode="complete")[0][:, k:]
        return [self.like(value, np.zeros((n, k))), self.start(np.concatenate([array, rest], axis=1), 1)]


class Orthogonal(Form):
    """What `tether.forms.orthogonal` makes: the expression, and weights of its own."""

    def __init__(self, map: str, split: int | None) -> None:
        if map not in ("householder", "cayley"):
            raise TetherError(f"An orthogonal matrix is made by 'householder' or 'cayley'. {received(map=map)}")
        self.map, self.split = map, split

    def __call__(self, base: Expression) -> Expression:
        """The orthogonal matrix made from the base."""
        base = base_expression(self, base)
        if base.shape is None and self.map == "householder":
            return Householder(base)  # a matrix, whose sizes the tie will tell
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        matrix = as_matrix(base, rows, columns)
        if self.map == "householder":
            return from_matrix(Householder(matrix), rows, columns)
        size = max(matrix.shape or ())
        return from_matrix(Cayley(matrix, part(base, "before", np.eye(size), trainable=False)), rows, columns)


def orthogonal(map: str = "householder", *, split: int | None = None) -> Orthogonal:
    """A weight whose matrix has orthonormal columns, or rows if it has more columns than rows.

    The base itself is what is stored, of shape `(rows, columns)` or more axes, and any numbers will do. Any
    orthogonal value can be assigned. A base whose shape comes from the tie starts (with `"householder"`) at what
    the layer's initializer gives, if that is orthogonal: `kernel_initializer="orthogonal"`.

    Args:
        map: `"householder"`: a product of reflections; it can make every orthogonal matrix, and its signs stay as
            they were assigned. `"cayley"`: a rotation after a fixed orthogonal matrix, which an assignment sets
            and which is the identity until then; smooth, and costs a solve of the size of the longer side.
        split: How many leading axes of a kernel are rows; see `rows_and_columns`.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: Another map; at use, a base of fewer than two axes.
        NotInvertible: When a value is assigned that is not orthogonal.

    Example:
    ```python
    kernel = tether.forms.orthogonal()(tether.Weight(name="kernel"))
    layer = tether.tie(keras.layers.Dense(64, kernel_initializer="orthogonal"), kernel=kernel)
    ```
    """
    return Orthogonal(map, split)

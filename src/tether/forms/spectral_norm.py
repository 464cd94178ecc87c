"""Spectral normalisation: a kernel divided by its largest singular value.

    W' = W / σ,   σ = vᵀ W u,   u ← Wᵀ v / ‖Wᵀ v‖,  v ← W u / ‖W u‖   once per training call

Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks" (arXiv:1802.05957). The
conventions are those of `torch.nn.utils.parametrizations.spectral_norm`.
"""

from __future__ import annotations

import math

import keras
import numpy as np

from tether.errors import InvalidConfig, ShapeMismatch, TetherError, as_int, received
from tether.forms.form import (
    Float32Node,
    Form,
    as_array,
    as_matrix,
    as_rank,
    base_expression,
    from_matrix,
    part,
    rows_and_columns,
    shape_of_base,
    start_value,
    widened,
)
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Shape, StatefulNode, Term, register
from tether.weights.operators.indexing import Gather
from tether.weights.weight import Weight

__all__ = ["spectral_norm"]

FIRST_ITERATIONS = 15


@register
class SpectralNorm(Float32Node, StatefulNode):
    """A matrix divided by its largest singular value, which a power iteration follows."""

    name, arity, accepts = "spectral_norm", 3, ("iterations", "epsilon")
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Iterations per training call, and the least norm that is divided by."""
        iterations, epsilon = as_int(given.get("iterations"), "iterations"), given.get("epsilon")
        if not 1 <= iterations <= 1000:
            raise InvalidConfig(f"A power iteration has 1 to 1000 rounds. {received(iterations=iterations)}")
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
            raise InvalidConfig(f"`epsilon` is a small number above zero. {received(epsilon=epsilon)}")
        return {"iterations": iterations, "epsilon": float(epsilon)}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the matrix, if both vectors fit it."""
        matrix, u, v = shapes
        if len(matrix) != 2 or (u, v) != (matrix[1:], matrix[:1]):
            raise ShapeMismatch(
                f"A spectral norm is that of a matrix, with a vector of its columns and one of its rows. "
                f"{received(matrix=matrix, u=u, v=v)}"
            )
        if not all(isinstance(operand, (Weight, Gather)) for operand in self.operands[1:]):
            raise InvalidConfig(
                "The vectors of a spectral norm are weights, which a training call can advance, or entries of stacked "
                "ones."
            )
        return matrix

    def advance(self, *values: Tensor) -> dict[int, Tensor]:
        """Some rounds of the power iteration."""
        matrix, u, v = (keras.ops.stop_gradient(widened(value)) for value in values)
        for _ in range(self.parameters["iterations"]):
            u = self._unit(keras.ops.matmul(v, matrix))
            v = self._unit(keras.ops.matmul(matrix, u))
        return {1: u, 2: v}

    def _unit(self, vector: Tensor) -> Tensor:
        norm = keras.ops.sqrt(keras.ops.sum(keras.ops.square(vector)))
        return keras.ops.divide(vector, keras.ops.maximum(norm, self.parameters["epsilon"]))

    def compute_wide(self, *values: Tensor) -> Tensor:
        """The matrix divided by `vᵀ W u`, in whose gradient the vectors, which do not train, are constants."""
        matrix, u, v = values
        return keras.ops.divide(matrix, keras.ops.sum(keras.ops.multiply(v, keras.ops.matmul(matrix, u))))

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the matrix; one vector has its columns, the other its rows."""
        matrix, u, v = operands
        links.same(matrix[1], u[0])
        links.same(matrix[0], v[0])
        return matrix

    def format(self, *terms: Term) -> Term:
        return Term(f"spectral_norm({terms[0].text})")

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value itself and its largest singular vectors, if its norm is one."""
        array = as_array(value)
        largest = float(np.linalg.norm(array, 2)) if np.isfinite(array).all() else math.inf
        if not abs(largest - 1) <= 1e-4:
            raise self.out_of_range("matrices whose largest singular value is 1", largest=largest)
        left, _, right = np.linalg.svd(array, full_matrices=False)
        return [self.start(array, 0), self.start(right[0], 1), self.start(left[:, 0], 2)]


class SpectralNormForm(Form):
    """What `tether.forms.spectral_norm` makes: the expression, and weights of its own."""

    def __init__(self, iterations: int, epsilon: float, split: int | None, seed: int | None) -> None:
        self.iterations, self.epsilon, self.split, self.seed = as_rank(iterations, "iterations"), epsilon, split, seed
        SpectralNorm.check_parameters({"iterations": iterations, "epsilon": epsilon})

    def __call__(self, base: Expression) -> Expression:
        """The base divided by its largest singular value."""
        base = base_expression(self, base)
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        n, m = math.prod(rows), math.prod(columns)
        matrix = start_value(base).reshape(n, m)
        if not np.any(matrix):
            raise TetherError(f"{base.notation()} is zero everywhere, so it cannot be divided by its norm.")
        v = np.asarray(
            keras.ops.convert_to_numpy(keras.random.normal((n,), dtype="float32", seed=self.seed)), dtype="float64"
        )
        for _ in range(FIRST_ITERATIONS):
            u = v @ matrix
            u = u / max(float(np.linalg.norm(u)), self.epsilon)
            v = matrix @ u
            v = v / max(float(np.linalg.norm(v)), self.epsilon)
        left, right = (part(base, name, start, trainable=False, role="state") for name, start in (("u", u), ("v", v)))
        normed = SpectralNorm(
            as_matrix(base, rows, columns), left, right, iterations=self.iterations, epsilon=float(self.epsilon)
        )
        return from_matrix(normed, rows, columns)


def spectral_norm(
    iterations: int = 1, *, epsilon: float = 1e-12, split: int | None = None, seed: int | None = None
) -> SpectralNormForm:
    """A weight divided by its largest singular value, so that its layer lengthens no vector.

    The base is what is stored, and stays as it is. The two singular vectors are weights that do not train; they
    start with 15 rounds of the power iteration on the base's present value, and go on by `iterations` rounds in
    each outer call with `training=True`. A value whose largest singular value is 1 can be assigned.

    Args:
        iterations: Rounds per training call.
        epsilon: The least norm that a vector is divided by.
        split: How many leading axes of a kernel are rows; see `rows_and_columns`.
        seed: Of the vector that the first rounds start from.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: A number that makes no sense; at use, a base of fewer than two axes, or zero everywhere.
        NotInvertible: When a value of another norm is assigned.

    Example:
    ```python
    kernel = tether.weight_of(layer, "kernel")
    tether.tie(layer, kernel=tether.forms.spectral_norm()(kernel))
    ```
    """
    return SpectralNormForm(iterations, epsilon, split, seed)

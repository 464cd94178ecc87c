"""A penalty that keeps two expressions close: one more loss of the layer that it is recorded on."""

from __future__ import annotations

import math
import weakref

import keras

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, UnboundArgument, received
from tether.types import Tensor
from tether.weights.evaluation import evaluate
from tether.weights.expression import Expression, Stored, leaves
from tether.weights.leaves import Argument, Constant
from tether.weights.storage import Use

ALIVE: weakref.WeakSet[Penalty] = weakref.WeakSet()
"""Every penalty of the process: without any, nobody has to look for those that a change ends."""


Stated = tuple[Expression, Expression, Expression, tuple[Stored, ...]]
"""A penalty as a config has it: both expressions, the strength, and the weights that are its own."""


class Penalty:
    """`strength * sum((a - b)**2)`.

    It counts as long as every weight in it is in use. Weights that no layer of the model uses, such as a
    strength that follows a schedule, are the penalty's own: the layer that records it stores them.
    """

    def __init__(
        self,
        recorder: keras.Layer,
        a: Expression,
        b: Expression,
        strength: Expression,
        owned: tuple[Stored, ...],
        *,
        made_by_code: bool = False,
    ) -> None:
        self.recorder = weakref.ref(recorder)
        self.a, self.b, self.strength, self.owned = a, b, strength, owned
        self.made_by_code = made_by_code
        ALIVE.add(self)
        parts = [part for part in (a, b) if set(part.weights_used()) & set(owned)]
        schedule = [strength.stop_gradient()] if set(strength.weights_used()) & set(owned) else []
        self.uses = [Use("soft_tie", part, self.recorder) for part in [*parts, *schedule]]
        """Of its own weights only: a penalty is no reason for a frozen weight of a layer to train."""

    def register(self) -> None:
        """Lets the penalty's own weights know who uses them, and makes them now if nobody has."""
        for use in self.uses:
            for weight in use.expression.weights_used():
                if weight in self.owned:
                    weight.add_use(use)
        for weight in self.owned:
            if weight.shape is not None:
                _ = weight.variable

    def unregister(self) -> None:
        """Ends the uses that `register` made."""
        for use in self.uses:
            for weight in use.expression.weights_used():
                weight.remove_use(use)

    def follow(self, layer_trainable: bool) -> None:
        """Takes over the flag of the layer that records it."""
        if any(use.live != layer_trainable for use in self.uses):
            keras_seam.before_freezing()
        for use in self.uses:
            use.live = layer_trainable
        for weight in self.owned:
            for use in self.uses:
                weight.refresh(use)

    @property
    def weights(self) -> tuple[Stored, ...]:
        """The weights in it, each once."""
        return tuple(dict.fromkeys(w for part in (self.a, self.b, self.strength) for w in part.weights_used()))

    @property
    def is_void(self) -> bool:
        """Whether a weight in it was in use and no longer is: the layer was untied, or tied to something else."""
        return any(weight.was_used and not weight.uses for weight in self.weights)

    @property
    def counts(self) -> bool:
        """Whether it is a loss now: everything in it exists and is in use.

        A layer that comes alone out of a file or a clone still names the weights of others in its penalties.
        """
        return not self.is_void and all(weight.is_built and not self.misses(weight) for weight in self.weights)

    def misses(self, weight: Stored) -> bool:
        """Whether a file has named this weight, and no layer has it."""
        return weight.only_named and not weight.uses and weight not in self.owned

    def value(self) -> Tensor:
        """The penalty now, a scalar; 16-bit weights are compared in float32."""
        a, b = evaluate(self.a), evaluate(self.b)
        if tuple(a.shape) != tuple(b.shape):
            raise ShapeMismatch(penalty_misfit(self.a, self.b, tuple(a.shape), tuple(b.shape)))
        dtype = "float64" if "float64" in (_dtype(a), _dtype(b)) else "float32"
        difference = keras.ops.subtract(keras.ops.cast(a, dtype), keras.ops.cast(b, dtype))
        strength = keras.ops.stop_gradient(keras.ops.cast(evaluate(self.strength), dtype))
        return keras.ops.multiply(strength, keras.ops.sum(keras.ops.square(difference)))

    def notation(self) -> str:
        """The penalty as people write it in mathematics."""
        return f"{self.strength.notation()} * sum(({self.a.notation()} - {self.b.notation()})**2)"


def _dtype(tensor: Tensor) -> str:
    return str(keras.backend.standardize_dtype(tensor.dtype))


def check(a: Expression, b: Expression, strength: Expression) -> None:
    """Refuses what cannot be a penalty, also one of a stranger's file.

    Raises:
        ShapeMismatch: The shapes of `a` and `b` differ, or the strength is not one number.
        UnboundArgument: An argument occurs: a loss is computed outside of the call that would bind it.
        TetherError: Both are the same, or integers, or the strength is negative.
    """
    for part in (a, b, strength):
        for leaf in leaves(part):
            if isinstance(leaf, Argument):
                raise UnboundArgument(
                    f"A soft tie is a loss, which is computed outside of the call that gives {leaf.name!r} a value. "
                    f"Tie what {part.notation()} is made of."
                )
    if a == b:
        raise TetherError(f"{a.notation()} is the same on both sides, so nothing is left to keep close.")
    if a.shape is not None and b.shape is not None and a.shape != b.shape:
        raise ShapeMismatch(penalty_misfit(a, b, a.shape, b.shape))
    for part in (a, b):
        if part.dtype is not None and not keras_seam.is_float(part.dtype):
            raise TetherError(f"A soft tie is for floating-point weights; {part.notation()} is of dtype {part.dtype}.")
    if strength.shape not in (None, ()):
        raise ShapeMismatch(f"The strength of a soft tie is one number. {received(shape=strength.shape)}")
    if isinstance(strength, Constant):
        held = strength.number if strength.array is None else strength.array
        number = float(held)  # type: ignore[arg-type]
        if not (math.isfinite(number) and number >= 0):
            raise TetherError(f"The strength of a soft tie is 0 or more. {received(strength=number)}")


def penalty_misfit(a: Expression, b: Expression, shape: tuple[int, ...], other: tuple[int, ...]) -> str:
    """Says that two shapes differ, and what may be meant."""
    hint = f" Did you mean {b.T.notation()}?" if shape == tuple(reversed(other)) else ""
    return f"{a.notation()} has shape {shape}, but {b.notation()} has shape {other}.{hint}"

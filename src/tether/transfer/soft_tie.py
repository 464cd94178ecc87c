"""A penalty that keeps two weights close, without making them one."""

from __future__ import annotations

import weakref

import keras

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, received
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.penalty import Penalty, check
from tether.layers.tying.state import shape_of, state_of
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import attach_penalty, detach_penalty, penalty_places, weight_of
from tether.types import Tensor
from tether.weights.expression import Expression, Stored, as_expression
from tether.weights.weight import Weight


class SoftTie:
    """A soft tie that was made: what it says, what it costs now, and how to remove it.

    Example:
    ```python
    soft = tether.transfer.soft_tie(model, "attention/query/kernel", "attention/key/kernel", strength=0.1)
    print(soft.a, soft.b, keras.ops.convert_to_numpy(soft.value))
    soft.remove()
    ```
    """

    def __init__(self, model: keras.Model, penalty: Penalty) -> None:
        self._model = weakref.ref(model)
        self._penalty = penalty

    @property
    def a(self) -> Expression:
        """The expression on one side of the tie."""
        return self._penalty.a

    @property
    def b(self) -> Expression:
        """The expression on the other side of the tie."""
        return self._penalty.b

    @property
    def strength(self) -> Expression:
        """What the squared distance is multiplied by."""
        return self._penalty.strength

    @property
    def value(self) -> Tensor:
        """The penalty now, a scalar."""
        return self._penalty.value()

    def remove(self) -> None:
        """Ends it: the penalty is no longer among the model's losses. A second time does nothing."""
        model, recorder = self._model(), self._penalty.recorder()
        holders = [] if model is None else list(keras_seam.contained_layers(model))
        holders += [] if recorder is None else [recorder]
        keras_seam.before_change([] if recorder is None else [recorder], makes_variables=False)
        detach_penalty(self._penalty, holders)

    def __repr__(self) -> str:
        return f"<SoftTie {self._penalty.notation()}>"


def soft_tie(model: keras.Model, a: object, b: object, strength: object) -> SoftTie:
    """Adds the loss `strength * sum((a - b)**2)` to a model, which pulls two weights towards each other.

    The gradient flows to both sides; put one under `stop_gradient()` to pull only the other. The penalty is
    in `model.losses`, counts in `fit`, and is saved, loaded and cloned with the model. It belongs to the
    model's layers, as a regularizer does: another model made of the same layers has it too. It makes no frozen
    weight train, and it ends when a weight in it is untied. (A Weight that the constructor of a layer of your own
    makes is another one in a clone: make its soft tie in that constructor too.)

    Args:
        model: A Keras layer or model. Changed in place: the weights named by paths are promoted.
        a: A path in the model, or an expression, or an array.
        b: The same; of the shape of `a` (`table.T` is an expression).
        strength: A number of 0 or more, or an expression of shape `()`. A `tether.Weight` that is assigned to
            between epochs makes a schedule; the penalty never trains it.

    Returns:
        A handle with `remove()`.

    Raises:
        UnknownName: A path names no weight, or two.
        ShapeMismatch: The shapes of the two sides differ.
        TetherError: Both sides are the same weight, or are not floating-point numbers, or the strength is negative.

    Example:
    ```python
    english, german = keras.layers.Dense(16, name="english"), keras.layers.Dense(16, name="german")
    pair = keras.Sequential([keras.Input((16,)), english, german])
    soft = tether.transfer.soft_tie(pair, "english/kernel", "german/kernel", strength=1e-3)
    pair.compile("adam", "mse")
    assert len(pair.losses) == 1
    ```

    Reference:
        Evgeniou and Pontil, "Regularized multi-task learning", 2004.
    """
    refuse_layer("soft_tie", model)
    scale = _expression(model, "strength", strength, paths_allowed=False)
    _check_places(model, a, b)
    with Rollback.below(model):
        left = _expression(model, "a", a, paths_allowed=True)
        right = _expression(model, "b", b, paths_allowed=True)
        check(left, right, scale)
        weights = tuple(dict.fromkeys(w for part in (left, right, scale) for w in part.weights_used()))
        if not any(part.weights_used() for part in (left, right)):
            raise TetherError(f"Neither side of the soft tie has a weight. {received(a=a, b=b)}")
        recorder, lent = penalty_places(model, weights)
        present = _weights_of_layers(model)
        owned = tuple(weight for weight in weights if weight not in present)
        made_by_code = keras_seam.maker(model) is not None
        keras_seam.before_change([recorder] if recorder.built else [], makes_variables=False)
        penalty = Penalty(recorder, left, right, scale, owned, made_by_code=made_by_code)
        attach_penalty(penalty, recorder, lent)
    return SoftTie(model, penalty)


def soft_ties(model: keras.Model) -> list[SoftTie]:
    """The soft ties of a model, for example of one that was loaded.

    Args:
        model: A Keras layer or model.

    Returns:
        A handle for each.

    Example:
    ```python
    tether.transfer.soft_tie(model, "attention/query/kernel", "attention/key/kernel", strength=0.1)
    (soft,) = tether.transfer.soft_ties(model)
    soft.remove()
    assert not tether.transfer.soft_ties(model)
    ```
    """
    found: dict[int, Penalty] = {}
    for layer in keras_seam.contained_layers(model):
        state = state_of(layer)
        for penalty in state.penalties if state is not None else ():
            if penalty.recorder() is layer and not penalty.is_void:
                found.setdefault(id(penalty), penalty)
    return [SoftTie(model, penalty) for penalty in found.values()]


def _expression(model: keras.Model, name: str, value: object, *, paths_allowed: bool) -> Expression:
    if isinstance(value, str) and paths_allowed:
        promoted: Expression = weight_of(model, value)
        return promoted
    try:
        return as_expression(value)
    except TypeError:
        kinds = "a path in the model, an expression or an array" if paths_allowed else "a number or an expression"
        raise TetherError(f"`{name}` of a soft tie is {kinds}. {received(**{name: value})}") from None


def _check_places(model: keras.Model, a: object, b: object) -> None:
    """What can be said of paths before their weights are promoted."""
    if not (isinstance(a, str) and isinstance(b, str)):
        return
    one, other = (paths.locate(model, paths.split(side)).variable for side in (a, b))
    if one is None or other is None:
        return
    if one is other:
        raise TetherError(f"{a!r} and {b!r} are the same weight, so nothing is left to keep close.")
    shape, other_shape = (shape_of(variable) for variable in (one, other))
    if shape != other_shape:
        hint = f" Transpose one: `b=tether.weight_of(model, {b!r}).T`." if shape == other_shape[::-1] else ""
        raise ShapeMismatch(f"{a!r} has shape {shape}, but {b!r} has shape {other_shape}.{hint}")


def _weights_of_layers(model: keras.Model) -> set[Stored]:
    """The weights that layers of the model use or hold, those that only penalties have left out."""
    found: set[Stored] = set()
    for layer in keras_seam.contained_layers(model):
        state = state_of(layer)
        if state is not None:
            asked = [*state.pending.values(), *state.recorded.values(), *(slot.tie for slot in state.slots)]
            found.update(weight for tie in asked for weight in tie.expression.weights_used())
        if not isinstance(layer, Weight):
            children = (child for child in keras_seam.sublayers(layer) if isinstance(child, Weight))
            found.update(child for child in children if paths.holders(layer, child))
    return found

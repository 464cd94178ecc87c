"""A slow copy of a model that follows it while it trains: an average of its weights, or a copy now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, UnknownName, Unsupported, received
from tether.layers.tying.state import View
from tether.transfer.copy import Held, Pair, built, leaf_pairs, paired
from tether.types import Tensor
from tether.weights.algebra import is_invertible


class Follow(keras.callbacks.Callback):
    """Moves a target's weights towards a source's after each step of the optimizer.

    `target <- momentum * target + (1 - momentum) * source`, for every floating-point weight, moving
    statistics included; others are copied. With momentum 0 it is a copy, every so many steps. The average is
    computed in float32 or better, but kept in the target's own dtype, and 16 bits are too few for a momentum near 1.

    It counts updates of the weights, not batches: gradients that are only accumulated do not move the
    target. With `steps_per_execution` the steps in between cannot be seen, so the target takes as many moves
    towards the source as it is afterwards. A tied weight moves once.

    Args:
        target: The layer or model that follows. It shares no weight with the source, and the optimizer does not
            train it: freeze it if it is part of the model.
        source: The layer or model that is followed, usually the one that is trained, or a part of it.
        momentum: How much of the target stays at each step, at least 0 and less than 1.
        every: How many updates there are from one move to the next.
        match: The source's path for a path of the target, where they differ, as for `tether.transfer.copy`.
            `None` leaves a weight alone.

    Raises:
        TetherError: An argument is out of its range; also at the start of `fit`, if a layer is not built,
            the two share a weight, or the optimizer trains the target.
        UnknownName: A weight of the target has no counterpart.
        ShapeMismatch: Two corresponding weights have different shapes.
        Unsupported: A tied weight of the target cannot be assigned.

    Example:
    ```python
    teacher = keras.models.clone_model(model)
    tether.transfer.copy(model, teacher)
    model.compile("adam", loss)
    model.fit(x, y, verbose=0, callbacks=[tether.transfer.Follow(target=teacher, source=model, momentum=0.99)])
    ```

    Reference:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Tarvainen and
        Valpola, "Mean teachers are better role models", 2017.
    """

    def __init__(
        self,
        target: keras.Layer,
        source: keras.Layer,
        *,
        momentum: float = 0.99,
        every: int = 1,
        match: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__()
        momentum, every = _checked_momentum(momentum), _checked_steps(every)
        if target is source:
            raise TetherError("The target cannot follow itself. Make a copy: `keras.models.clone_model(source)`.")
        self.target, self.source = target, source
        self.momentum, self.every, self.match = momentum, every, match
        self._moves: list[_Move] | None = None
        self._seen = 0
        self._batches = 0
        if getattr(target, "built", True) and getattr(source, "built", True):
            _plan(target, source, match)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Checks everything again: layers may have been built or tied since."""
        if self.model.optimizer is None:
            raise TetherError(f"The model {self.model.name!r} has no optimizer whose steps `Follow` could count.")
        self._seen, self._batches = _steps(self.model.optimizer), 0
        self._moves = None
        if self.model.built:  # else its first step builds it, on some backends
            self._moves = self._checked_plan()

    def _checked_plan(self) -> list[_Move]:
        moves = _plan(self.target, self.source, self.match)
        trained = {id(variable) for variable in self.model.trainable_variables}
        both = [place.path for place in moves if any(id(variable) in trained for variable in place.written)]
        if both:
            raise TetherError(
                f"The optimizer of {self.model.name!r} trains {both[0]!r}, which is to follow the source. Freeze the "
                "target before `compile`: `target.trainable = False`."
            )
        return moves

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Moves the target if the optimizer has made enough steps."""
        self._batches += self.model.steps_per_execution
        if (self._seen + self._batches) // self.every == self._seen // self.every:
            return  # not due, whatever the optimizer did: on JAX it is costly to ask
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        if self._moves is None:
            self._moves = self._checked_plan()
        now = _steps(self.model.optimizer)
        due = now // self.every - self._seen // self.every
        self._seen, self._batches = now, 0
        if due > 0:
            for move in self._moves:
                move.make(self.momentum**due)


def _steps(optimizer: keras.Optimizer) -> int:
    """The steps that an optimizer has made; a counter that TensorFlow keeps on each replica is no number to Python."""
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def _checked_momentum(momentum: object) -> float:
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise TetherError(f"The momentum is a number, at least 0 and less than 1. {received(momentum=momentum)}")
    return float(momentum)


def _checked_steps(every: object) -> int:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise TetherError(f"`every` is a whole number of steps, 1 or more. {received(every=every)}")
    return every


class _Move:
    """One weight of the target, and where it moves."""

    def __init__(self, path: str, place: Any, written: list[Any], source: Any, expression: Any = None) -> None:
        self.path, self.place, self.written, self.source, self.expression = path, place, written, source, expression

    def make(self, momentum: float) -> None:
        """Moves the followers one step."""
        value = _between(self.place, self.source, momentum)
        if self.expression is None:
            self.place.assign(value)
        else:
            self.expression.assign(value)


def _between(target: keras.Variable, source: keras.Variable | View, momentum: float) -> Tensor:
    dtype = keras_seam.stored_dtype(target)
    new = keras.ops.stop_gradient(keras.ops.convert_to_tensor(source.value))
    if momentum == 0 or not keras_seam.is_float(dtype):
        return keras_seam.own_copy(keras.ops.cast(new, dtype))
    wide = "float64" if dtype == "float64" else "float32"
    old = keras.ops.stop_gradient(keras.ops.convert_to_tensor(target.value))
    if keras_seam.is_shard(old) != keras_seam.is_shard(new):  # one of the two is sharded, and its shard is no whole
        old, new = keras_seam.whole(old), keras_seam.whole(new)
    mixed = momentum * keras.ops.cast(old, wide) + (1 - momentum) * keras.ops.cast(new, wide)
    return keras.ops.cast(mixed, dtype)


def _plan(target: keras.Layer, source: keras.Layer, match: Mapping[str, str | None] | None) -> list[_Move]:
    """What moves where, each stored variable of the target once."""
    built("Follow", "target", target)
    built("Follow", "source", source)
    moves: dict[int, _Move] = {}
    found = paired(source, target, match)
    missing = [pair.target.path for pair in found if pair.source is None and not pair.left_alone]
    if missing:
        raise UnknownName(
            f"{source.name!r} has no weight that {missing[0]!r} of {target.name!r} could follow. Name it, or leave it "
            f"alone: match={{{missing[0]!r}: 'path/in/source'}} or {{{missing[0]!r}: None}}."
        )
    _refuse_shared(source, found)
    for pair in found:
        for move in _moves_of(pair.target, pair.source) if pair.source is not None else ():
            _add(moves, move)
    return list({id(move): move for move in moves.values()}.values())


def _moves_of(held: Held, source: Held) -> list[_Move]:
    weights = leaf_pairs(held.expression, source.expression)
    if weights is not None:
        for mine, theirs in weights:
            _same_shape(held, source, mine.variable, theirs.variable)
        return [_Move(held.path, mine.variable, [mine.variable], theirs.variable) for mine, theirs in weights]
    _same_shape(held, source, held.variable, source.variable)
    if held.expression is None or any(held.variable is variable for variable in held.stored):
        return [_Move(held.path, held.variable, [held.variable], source.variable)]
    if not is_invertible(held.expression):
        raise Unsupported(
            f"{held.path!r} of the target is {held.expression.notation()}, which cannot be assigned, and the source's "
            f"{source.path!r} is not of that form. Tie the target as the source is tied, or make it plain: "
            "`tether.materialize(source)`."
        )
    return [_Move(held.path, held.variable, held.stored, source.variable, held.expression)]


def _same_shape(held: Held, source: Held, mine: keras.Variable, theirs: keras.Variable) -> None:
    if tuple(mine.shape) != tuple(theirs.shape):
        raise ShapeMismatch(
            f"{held.path!r} of the target has shape {tuple(mine.shape)}, but {source.path!r} of the source has shape "
            f"{tuple(theirs.shape)}. A weight can follow only one of its own shape."
        )


def _add(moves: dict[int, _Move], move: _Move) -> None:
    for variable in move.written:
        before = moves.setdefault(id(variable), move)
        if before is not move and (before.source is not move.source or before.place is not move.place):
            raise TetherError(
                f"{before.path!r} and {move.path!r} of the target are one stored weight, {variable.path!r}, and follow "
                "two weights of the source. Leave one alone: match={" + repr(move.path) + ": None}."
            )


def _refuse_shared(source: keras.Layer, found: list[Pair]) -> None:
    theirs = {id(variable) for variable in source.variables}
    theirs |= {id(variable) for pair in found if pair.source is not None for variable in pair.source.stored}
    for held in (pair.target for pair in found):
        for variable in held.stored:
            if id(variable) in theirs:
                raise TetherError(
                    f"{held.path!r} of the target shares the stored weight {variable.path!r} with the source, so it "
                    "cannot follow it. Give the target weights of its own: `keras.models.clone_model(source)`."
                )


__all__ = ["Follow"]

"""Computing the value of an expression, once for each call of the outer layer.

A value that took arithmetic is remembered for as long as the outer Keras call runs. It is used again
only if it is certain to be the same: the tensors stored in its weights are the very ones that it was
computed from, the autocast dtype and the bound arguments are the same, and the backend is in the same
trace. Before a time loop the values that the loop needs are *held*: computed outside, then read inside.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

import keras

from tether import keras_seam
from tether.types import Tensor
from tether.weights.expression import Expression, Node, StatefulNode, Step, Stored, is_view, program, provide
from tether.weights.leaves import Argument, Constant, bindings, lent, lent_value
from tether.weights.operators.choice import Adapted

_CACHE = "_tether_values"
_ADVANCED = "_tether_advanced"
_HELD = object()
Fingerprint = tuple[tuple[Tensor, int, int], ...]
"""The tensors that a value depends on, how often each was changed in place, and the generation of its weight."""
Cache = dict[object, tuple[Fingerprint, object, Tensor]]
"""The values of one call, by expression and autocast dtype, with the trace that each was computed in."""
Held = tuple[Cache, object]
"""A cache, and the key of a value in it that is held."""
Made = TypeVar("Made")


class _Turn:
    """One turn of a loop within an outer call, and the nodes that have been advanced in it."""

    def __init__(self) -> None:
        self.advanced: set[StatefulNode] = set()


class _Scope(keras_seam.ThreadScope):
    memory: dict[object, tuple[list[keras_seam.Snapshot], Tensor]] | None = None
    turn: _Turn | None = None


_scope = _Scope()


def evaluate(expression: Expression) -> Tensor:
    """The tensor of an expression, under the caller's stateless, autocast and argument scopes."""
    if isinstance(expression, Stored) and expression.became is None:
        return expression.variable.value
    expression = without_what_is_off(expression)
    if is_view(expression) or keras_seam.is_compiling():  # a graph has equal parts once
        return _compute(expression)
    caches = _call_caches()
    key: tuple[object, ...] = (expression, autocast_dtype())
    if _scope.turn is not None and keras_seam.is_training_call() and _changes_in_training(expression):
        key = (*key, _scope.turn)
    memory = _scope.memory
    if memory is not None and remembers() and keras_seam.is_plain_eager():
        return _remembered(memory, expression, key)
    if not caches:
        return _compute(expression)
    fingerprint = _fingerprint(expression)
    for cache in caches:
        entry = cache.get(key)
        if entry is None or not _same(entry[0], fingerprint):
            continue
        if entry[1] is _HELD or (cache is caches[0] and entry[1] == keras_seam.trace_token()):
            return entry[2]
    value = _compute(expression)
    if _changes_in_training(expression):
        fingerprint = _fingerprint(expression)
    caches[0][key] = (fingerprint, keras_seam.trace_token(), value)
    return value


def _changes_in_training(expression: Expression) -> bool:
    nodes = [step.expression for step in program(expression) if isinstance(step.expression, Node)]
    return any(isinstance(node, StatefulNode) or node.is_random for node in nodes)


# --------------------------------------------------------------------------- what is off
# Where a strength can be read at no cost (PyTorch, outside of a graph), a part of strength zero is not computed at all.
# In a graph it is computed, and switched off there: the same graph serves when it is on.


class _Switches:
    """The strengths of an expression with adapters, as they were last read, and the expression without what is off."""

    def __init__(self, expression: Adapted) -> None:
        parts = expression.parts.items()
        self.strengths = [(name, strength) for name, (strength, _) in parts if isinstance(strength, Stored)]
        self.read: list[tuple[Tensor, int, bool]] = [(None, 0, False)] * len(self.strengths)
        self.without: dict[tuple[str, ...], Expression] = {}

    def off(self) -> tuple[str, ...]:
        """The names of the parts that are off now."""
        found = []
        for place, (name, strength) in enumerate(self.strengths):
            value, (known, changes, is_off) = keras_seam.stored_value(strength.variable), self.read[place]
            now = keras_seam.mutations(value)
            if value is not known or now != changes:
                is_off = not keras_seam.on_host(value)
                self.read[place] = (value, now, is_off)
            if is_off:
                found.append(name)
        return tuple(found)


_switches: weakref.WeakKeyDictionary[Adapted, _Switches] = weakref.WeakKeyDictionary()


def without_what_is_off(expression: Expression) -> Expression:
    """The expression without the parts of adapters that are off, as far as that is known now."""
    if type(expression) is not Adapted or not keras_seam.can_read_numbers():
        return expression
    known = _switches.get(expression)
    if known is None:
        known = _switches[expression] = _Switches(expression)
    off = known.off()
    if not off:
        return expression
    if off not in known.without:
        known.without[off] = expression.without(off)
    return known.without[off]


def remembering() -> contextlib.AbstractContextManager[None]:
    """Keeps values that took arithmetic from call to call, until what they were computed from changes."""
    return _scope.set(memory={})


def remembers() -> bool:
    """Whether values are kept from call to call now."""
    return _scope.memory is not None and not keras_seam.is_training_call()


def _remembered(
    memory: dict[object, tuple[list[keras_seam.Snapshot], Tensor]], expression: Expression, key: object
) -> Tensor:
    """The value as it was computed before, if nothing that it depends on has changed since."""
    now = _snapshot(expression)
    entry = memory.get(key)
    if entry is not None and all(keras_seam.is_same_snapshot(a, b) for a, b in zip(entry[0], now, strict=True)):
        return entry[1]
    value = _compute(expression)
    if not keras_seam.is_traced(value):
        memory[key] = (now, value)
    return value


def _snapshot(expression: Expression) -> list[keras_seam.Snapshot]:
    found: list[keras_seam.Snapshot] = []
    for step in program(expression):
        leaf = step.expression
        if isinstance(leaf, Stored):
            if keras_seam.is_sharded(leaf.variable):  # FSDP2 gathers new values into a tensor without counting it
                found.append((object(), 0))
            else:
                found.append(keras_seam.snapshot(keras_seam.raw_value(leaf.variable)))
        elif isinstance(leaf, Argument):
            found.append((bindings().get(leaf.key, leaf.default), 0))
    return found


def hold(expression: Expression) -> list[Held]:
    """Starts to hold; the result goes to `release`."""
    held: list[Held] = []
    for cache in _call_caches()[:1]:
        if not is_view(expression):
            key = (expression, autocast_dtype())
            value = evaluate(expression)
            cache[key] = (_fingerprint(expression), _HELD, value)
            held.append((cache, key))
    return held


def hold_for_each(key: object, value: Tensor) -> list[Held]:
    """Holds a value that is one for each example, under a key of the caller's; the result goes to `release`."""
    held: list[Held] = []
    for cache in _call_caches()[:1]:
        cache[key] = ((), _HELD, value)
        held.append((cache, key))
    return held


def held_for_each(key: object) -> Tensor | None:
    """What is held under a key, if something is."""
    for cache in _call_caches():
        entry = cache.get(key)
        if entry is not None and entry[1] is _HELD:
            return entry[2]
    return None


def release(entries: list[Held]) -> None:
    """Stops holding what `hold` returned."""
    for cache, key in entries:
        cache.pop(key, None)


def autocast_dtype() -> str | None:
    """The dtype to which Keras casts floating-point variables at the moment, if any."""
    scope = keras_seam.get_autocast_scope()
    return None if scope is None else scope.dtype


def _call_caches() -> list[Cache]:
    return [_of_this_call(owner, _CACHE, dict) for owner in keras_seam.call_owners()]


def _of_this_call(owner: object, name: str, make: Callable[[], Made]) -> Made:
    """What is remembered under a name for as long as a call runs."""
    found: Made | None = getattr(owner, name, None)
    if found is None:
        found = make()
        setattr(owner, name, found)
    return found


def _fingerprint(expression: Expression) -> Fingerprint:
    """The tensors that the value depends on, and how often each was changed in place."""
    found: list[tuple[Tensor, int, int]] = []
    for step in program(expression):
        leaf = step.expression
        if isinstance(leaf, Stored):
            tensor = keras_seam.raw_value(leaf.variable)
            found.append((tensor, 0 if tensor is None else keras_seam.mutations(tensor), leaf.generation))
        elif isinstance(leaf, Argument):
            found.append((bindings().get(leaf.key, leaf.default), 0, 0))
    return tuple(found)


def _same(before: Fingerprint, now: Fingerprint) -> bool:
    return len(before) == len(now) and all(
        a[0] is b[0] and a[1] == b[1] and a[2] == b[2] and a[0] is not None for a, b in zip(before, now, strict=True)
    )


def _compute(expression: Expression) -> Tensor:
    values: list[Tensor] = []
    steps = program(expression)
    given, needed = _lent(steps) if lent.values else ({}, None)
    for place, step in enumerate(steps):
        current = step.expression
        if needed is not None and (place in given or place not in needed):
            values.append(cast_to_scope(given[place]) if place in given else None)
        elif isinstance(current, Node):
            values.append(_apply(current, [values[place] for place in step.operands]))
        elif isinstance(current, Stored):
            values.append(keras_seam.plain_tensor(current.value))
        elif isinstance(current, Constant):
            values.append(current.tensor())
        elif isinstance(current, Argument):
            found = current.bound()
            values.append(found if isinstance(found, int) else cast_to_scope(current.tensor()))
    return values[-1]


def _lent(steps: tuple[Step, ...]) -> tuple[dict[int, Tensor], set[int]]:
    """The values that steps of a program are lent, and the places of what is needed beside them."""
    given: dict[int, Tensor] = {}
    needed = {len(steps) - 1}
    for place in range(len(steps) - 1, -1, -1):
        if place not in needed:
            continue
        value = lent_value(steps[place].expression) if isinstance(steps[place].expression, Node) else None
        if value is None:
            needed.update(steps[place].operands)
        else:
            given[place] = value
    return given, needed


def _apply(node: Node, values: list[Tensor]) -> Tensor:
    """Computes one node. An index that is a plain number stays one for a node that chooses by it."""
    for place, operand in enumerate(node.operands):
        if isinstance(operand, Argument) and isinstance(values[place], int) and place not in node.indices:
            values[place] = cast_to_scope(operand.tensor())
    if isinstance(node, StatefulNode) and _advances_now(node):
        training = keras_seam.undecided_training()
        for place, value in node.advance(*values).items():
            if training is not None:
                value = keras.ops.where(training, value, keras.ops.cast(values[place], value.dtype))
            with keras_seam.AutocastScope(None):
                node.operands[place].assign(value)
            # The tensor itself: PyTorch's variable is written to again at the next turn.
            values[place] = keras.ops.cast(value, keras_seam.tensor_dtype(values[place]))
    return node.compute(*values)


@contextlib.contextmanager
def once_more() -> Iterator[None]:
    """Lets nodes with a state be advanced inside the block as in an outer call: once at each turn of a loop."""
    with _scope.set(turn=_Turn()):
        yield


def _advances_now(node: StatefulNode) -> bool:
    """Whether a training call is running in which this node has not been advanced yet."""
    if not keras_seam.is_training_call():
        return False
    turn = _scope.turn
    done = _of_this_call(keras_seam.call_owners()[-1], _ADVANCED, set) if turn is None else turn.advanced
    if node in done:
        return False
    done.add(node)
    return True


def cast_to_scope(value: Tensor) -> Tensor:
    """What autocast does to a variable, done to a tensor."""
    scope = keras_seam.get_autocast_scope()
    return value if scope is None or scope.dtype is None else scope.maybe_cast(value)


provide(evaluate=evaluate)

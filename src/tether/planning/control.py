"""What a user says and asks about plans: `force`, `cached`, `explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import keras

from tether import keras_seam
from tether.errors import TetherError, received
from tether.planning.cost import machine
from tether.planning.plan import ASSUMED_ROWS, Plan
from tether.weights.evaluation import remembering

# --------------------------------------------------------------------------- force and cached
# How long a choice of plans, or a remembered value, holds: scopes of the present thread.


Mode = Literal["auto", "materialize", "factored"]
MODES = ("auto", "materialize", "factored")


class _Scope(keras_seam.ThreadScope):
    noted: list[Noted] | None = None
    training: bool | None = None
    mode: Mode = "auto"


_scope = _Scope()


def mode() -> Mode:
    """How plans are chosen now."""
    return _scope.mode


@contextlib.contextmanager
def force(how: Mode) -> Iterator[None]:
    """Plans of one kind, for the calls within this scope.

    A plan is chosen when a layer is called, so a model that is compiled already keeps the plans that it was
    compiled with.

    Args:
        how: `"materialize"` builds each weight before the layer uses it, as a layer without an applier does;
            `"factored"` never builds a sum or product of weights where its parts can be applied one after
            another; `"auto"` chooses by cost, as outside of any scope.

    Raises:
        TetherError: Another word.

    Example:
    ```python
    child = tether.inherit(parent, kernel=tether.low_rank(2))
    with tether.planning.force("materialize"):
        y = child(rows)
    ```
    """
    if how not in MODES:
        raise TetherError(f'`force` takes "materialize", "factored" or "auto". {received(how=how)}')
    with _scope.set(mode=how):
        yield


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Keeps combined weights from call to call, for eager loops that do not train.

    Within this scope a weight such as `w + a @ b` is computed at its first use and again only after a stored
    weight that it is made of was written to: by `assign`, an optimizer, or the backend's own assignment and
    in-place operations. (PyTorch does not tell of writes to `tensor.data`.) A call that is compiled or recorded
    for a gradient computes as it does outside. Each kept weight takes its memory until the scope ends.

    Example:
    ```python
    layer = tether.inherit(parent, kernel=tether.low_rank(8))
    with tether.planning.cached():
        for batch in (rows, 2 * rows):
            y = layer(batch)
    ```
    """
    with remembering():
        yield


@contextlib.contextmanager
def recording(*, training: bool) -> Iterator[list[Any]]:
    """Notes the plans that calls within this scope follow; they are made as if the calls trained, or did not."""
    noted: list[Any] = []
    with _scope.set(noted=noted, training=training):
        yield noted


def assumed_training() -> bool | None:
    """Whether plans are to be made for a training step, if a scope says so."""
    return _scope.training


def note_plan(make: Callable[[], Any]) -> None:
    """Adds to what is noted, if anything is."""
    if _scope.noted is not None:
        _scope.noted.append(make())


# --------------------------------------------------------------------------- explain
# What a plan is and what the others would cost, in words.


@dataclass(frozen=True)
class Noted:
    """The plan that one use of a weight followed in one call."""

    path: str
    expression: str
    input_shape: tuple[int | None, ...]
    plan: Plan

    def __str__(self) -> str:
        return f"{self.path} = {self.expression}, for inputs of shape {self.input_shape}"

    def alternatives(self) -> Iterator[tuple[bool, str, str, str, tuple[str, ...]]]:
        """Each way of computing it: whether it is chosen, its name, its time, what it does, its steps if chosen."""
        for alternative in self.plan.alternatives:
            chosen = alternative.name == self.plan.name and (
                self.plan.materializes or alternative.seconds == self.plan.seconds
            )
            time, steps = f"{alternative.seconds * 1e6:,.0f}", tuple(alternative.steps) if chosen else ()
            yield chosen, alternative.name, time, _WHAT_IT_DOES[alternative.name], steps


_WHAT_IT_DOES = {
    "materialize": "builds the weight",
    "factored": "applies the parts",
    "partly": "builds some parts",
    "mixed": "builds the weight, and computes its gradient by parts",
}
_NO_PLAN = "Every weight is stored as it is used, or the kind of layer builds it first: no plan."


@dataclass(frozen=True)
class Explanation:
    """The plans of a call; prints as text."""

    title: str
    uses: tuple[Noted, ...]

    def __str__(self) -> str:
        lines = [self.title]
        if not self.uses:
            lines.append(f"  {_NO_PLAN}")
        for use in self.uses:
            lines += ["", str(use)]
            for chosen, name, time, does, steps in use.alternatives():
                lines.append(f" {'->' if chosen else '  '} {name:<12}{time:>12} µs  {does}")
                lines += [f"        {step}" for step in steps]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self.title)}</p>"]
        if not self.uses:
            parts.append(f"<p>{_NO_PLAN}</p>")
        for use in self.uses:
            rows = ""
            for chosen, name, time, does, steps in use.alternatives():
                words = "".join(f"<br><code>{escape(step)}</code>" for step in steps)
                rows += (
                    f"<tr><td>{'→' if chosen else ''}</td><th scope='row' style='text-align:left'>{escape(name)}</th>"
                    f"<td>{time} µs</td><td style='text-align:left'>{escape(does)}{words}</td></tr>"
                )
            what = f"<caption style='text-align:left'><code>{escape(str(use))}</code></caption>"
            parts.append(f"<table>{what}<tbody>{rows}</tbody></table>")
        return "".join(parts)


def explain(
    layer: keras.Layer, input_shape: object, *, training: bool = False, dtype: str | None = None
) -> Explanation:
    """How a layer, or a model, computes with its combined weights, and what the alternatives would cost.

    The layer is built if it is not yet; nothing is computed.

    Args:
        layer: A layer or model.
        input_shape: The shape of the call's input, with the batch; `None` counts as 32. For a list or dict of inputs,
            one of shapes. A `keras.KerasTensor` in the place of a shape says the dtype too.
        training: Whether to plan for a training step: the gradients are counted too.
        dtype: The dtype of the input; left out, the layer's own.

    Returns:
        The plans, as an object with `uses` (each with its `plan`) that prints as text. Times are the cost
        model's, in microseconds, forward and backward.

    Raises:
        TetherError: Not a layer, or a shape that is none.

    Example:
    ```python
    child = tether.inherit(parent, kernel=tether.low_rank(2))
    print(tether.planning.explain(child, (32, 16), training=True))
    ```
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TetherError(f"`explain` takes a layer or a model. {received(layer=type(layer).__name__)}")
    spec = _spec(input_shape, dtype or layer.input_dtype or keras.config.floatx())
    if not layer.built:
        layer(spec)
    with recording(training=training) as noted:
        keras_seam.trace(layer, spec)
    kind = "a training step" if training else "inference"
    shapes = " and ".join(dict.fromkeys(str(tuple(tensor.shape)) for tensor in keras.tree.flatten(spec)))
    title = f"{layer.name}: {kind} with inputs of shape {shapes} on {machine().name}"
    return Explanation(title, tuple(dict.fromkeys(noted)))


_NESTED = (list, tuple, Mapping, keras.KerasTensor)


def _spec(shape: Any, dtype: str) -> Any:
    """What stands for the inputs of a call."""
    if isinstance(shape, Mapping):
        return {name: _spec(inner, dtype) for name, inner in shape.items()}
    if isinstance(shape, keras.KerasTensor):
        shape, dtype = shape.shape, shape.dtype
    elif isinstance(shape, (list, tuple)) and any(isinstance(size, _NESTED) for size in shape):
        return [_spec(inner, dtype) for inner in shape]
    try:
        return keras.KerasTensor(tuple(ASSUMED_ROWS if size is None else int(size) for size in shape), dtype=dtype)
    except (TypeError, ValueError):
        raise TetherError(f"A shape reads like (32, 1024). {received(input_shape=shape)}") from None

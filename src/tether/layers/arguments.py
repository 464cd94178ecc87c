"""The arguments of expressions, as keywords of a tied layer's call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from tether.layers.state import State, state_of
from tether.weights.expression import Expression, leaves
from tether.weights.leaves import Argument, bind


def arguments_by_name(state: State) -> dict[str, list[Argument]]:
    """The arguments in the ties recorded on a layer, and in those that were asked for there."""
    found: dict[str, list[Argument]] = {}
    for leaf in [*(leaf for tie in state.recorded.values() for leaf in arguments_in(tie.expression)), *state.takes]:
        if leaf not in found.setdefault(leaf.name, []):
            found[leaf.name].append(leaf)
    return found


def arguments_in(expression: Expression) -> list[Argument]:
    """The arguments of an expression, each once."""
    return [leaf for leaf in leaves(expression) if isinstance(leaf, Argument)]


def taking(base: Any, names: tuple[str, ...], own_call: Callable[..., Any]) -> dict[str, Any]:
    """A `call` with the base's parameters and the arguments of expressions as keywords, around `own_call`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        state = state_of(self) if given else None
        if state is None:
            return own_call(self, *args, **kwargs)
        known = arguments_by_name(state)
        with bind({argument: value for name, value in given.items() for argument in known.get(name, ())}):
            return own_call(self, *args, **kwargs)

    def compute_output_spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.compute_output_spec(self, *args, **{k: v for k, v in kwargs.items() if k not in names})

    signature = inspect.signature(base.call)
    parameters = list(signature.parameters.values())
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    end = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = signature.replace(parameters=parameters[:end] + extra + parameters[end:])  # type: ignore[attr-defined]
    call.__doc__ = base.call.__doc__
    return {"call": call, "compute_output_spec": compute_output_spec}

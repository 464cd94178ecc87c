"""Ties that no longer hold, and parts of ties that cannot learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from tether import keras_seam
from tether.errors import UnknownName
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.mending import code_of
from tether.inspection.checking.rules.registry import rule
from tether.inspection.checking.values import is_zero
from tether.layers.tying import paths
from tether.layers.tying.state import Slot, Tie, View, state_of
from tether.layers.tying.tied import Tied
from tether.weights.expression import Expression, Node, is_view, program
from tether.weights.weight import Weight


@rule("lost-tie", "a tie that was made and no longer holds: the layer reads something else")
def lost_tie(context: Context) -> Iterator[Finding]:
    """An attribute was overwritten, a sub-layer replaced, or a layer built again."""
    reported: set[int] = set()
    for layer, _, slot in context.tied:
        why = _why_lost(layer, slot)
        if why is not None:
            reported.add(id(slot.tie))
            where = f"{context.path_of(layer)}/{slot.view.use.name}"
            yield Finding("lost-tie", "error", where, why, MADE_ANEW)
    for layer in context.layers:
        state = state_of(layer)
        for tie in state.recorded.values() if state is not None else ():
            if id(tie) in reported:
                continue
            why = _why_not_there(layer, tie)
            if why is not None:
                path = "/".join(tie.path)
                where = path if layer is context.model else f"{context.path_of(layer)}/{path}"
                target = "model" if layer is context.model else context.layer_code(layer)
                mend = f"tether.tie({target}, {{{path!r}: {_code(context, tie.expression)}}})"
                yield Finding("lost-tie", "error", where, why, mend)


def _why_lost(layer: Any, slot: Slot) -> str | None:
    """What has become of a view; `None` if the layer reads it."""
    notation = slot.view.expression.notation()
    if not isinstance(layer, Tied):
        return f"The class of the layer was replaced, so it no longer saves nor guards its tie to {notation}."
    if paths.holders(layer, slot.view):
        return None
    name = slot.view.name
    present = next((vars(layer)[n] for n in (f"_{name}", name) if n in vars(layer)), None)
    held_by = {id(other.view) for other in state_of(layer).slots}  # type: ignore[union-attr]
    if present is None or id(present) in held_by:
        return None  # kept where attributes do not tell: in an object of the layer's own
    what = f"a variable of its own, {present.path!r}" if isinstance(present, keras.Variable) else "a tensor"
    return (
        f"The layer was tied to {notation}, and its attribute now holds {what}: it was overwritten, or the layer was "
        f"built again. The layer no longer follows {notation}, and a file of the model says that it does."
    )


def _why_not_there(layer: Any, tie: Tie) -> str | None:
    """Why a recorded tie does not hold; `None` if it does, or waits for the layer to be built."""
    notation = tie.expression.notation()
    try:
        place = paths.locate(layer, tie.path)
    except UnknownName:
        return f"A tie to {notation} is recorded here, and there is no weight of that path any more."
    variable = place.variable
    if variable is None or (isinstance(variable, View) and variable.expression == tie.expression):
        return None
    is_tied = isinstance(variable, View)
    holds = variable.expression.notation() if is_tied else f"a variable of its own, {variable.path!r}"
    return (
        f"A tie to {notation} is recorded for this weight, which is now {holds}: the layer that was tied has been "
        "replaced. Read back from a file, the model would be tied again, to another value."
    )


MADE_ANEW = (
    "fresh = keras.models.clone_model(model)  # made anew, with the ties that are recorded\n"
    "tether.transfer.copy(model, fresh)\n"
    "model = fresh"
)


def _code(context: Context, expression: Expression) -> str:
    known = {w: context.weight_code(w.variable) for w in expression.weights_used() if w.is_built}
    return code_of(expression, known)


@rule("view-kept-by-parent", "a layer that keeps the weight of a tied layer as an attribute of its own")
def view_kept_by_parent(context: Context) -> Iterator[Finding]:
    """Keras tracks it there as one more variable: it is counted, optimized and saved beside the stored one."""
    for layer in context.layers:
        for variables in keras_seam.variable_lists(layer).values():
            for view in variables:
                if isinstance(view, View):
                    held = "/".join(paths.holders(layer, view)[0]) if paths.holders(layer, view) else view.name
                    owner = view.use.layer()
                    of = "another layer" if owner is None else f"layer {owner.name!r}"
                    yield Finding(
                        "view-kept-by-parent",
                        "error",
                        f"{context.path_of(layer)}/{held}",
                        f"This attribute is the {view.name} of {of}, which is tied to {view.expression.notation()}. "
                        "Keras takes it for a variable of this layer: it is counted a second time, gets slots of the "
                        "optimizer, and is stepped beside the stored weight.",
                        f"inner = {'...' if owner is None else context.layer_code(owner)}  # keep the layer, not its "
                        f"weight: read `self.inner.{view.name}` in `call`",
                    )


# --------------------------------------------------------------------------- factors

PRODUCTS = ("matmul", "multiply", "einsum")


@rule("dead-factors", "two factors of a product that are both zero: neither has a gradient, ever")
def dead_factors(context: Context) -> Iterator[Finding]:
    """The gradient of each is a multiple of the other."""
    dead: dict[Weight, set[int]] = {}  # a weight that is zero, and the uses that are no help to it
    pairs: dict[tuple[Weight, ...], str] = {}
    for layer, _, slot in context.tied:
        where = f"{context.path_of(layer)}/{slot.view.use.name}"
        for step in program(slot.view.expression):
            factors = _zero_factors(context, step.expression)
            if len(factors) > 1:
                pairs.setdefault(factors, where)
                for weight in factors:
                    dead.setdefault(weight, set()).add(id(slot.view.use))
    for factors, where in pairs.items():
        stuck = all(id(use) in dead[weight] for weight in factors for use in weight.uses)
        if stuck and any(weight.trainable for weight in factors):
            yield _dead(context, where, [weight.name for weight in factors], [weight.variable for weight in factors])
    for layer in context.layers:
        if getattr(layer, "lora_enabled", False):
            variables = [
                value
                for name, value in keras_seam.own_attributes(layer)
                if name.startswith("lora_") and isinstance(value, keras.Variable)
            ]
            if len(variables) == 2 and all(_is_zero(context, variable) for variable in variables):
                yield _dead(context, context.path_of(layer), [variable.name for variable in variables], variables)


def _dead(context: Context, where: str, names: list[str], factors: list[Any]) -> Finding:
    chosen = next((factor for factor in factors if factor.trainable), factors[0])
    return Finding(
        "dead-factors",
        "error",
        where,
        f"The factors {' and '.join(names)} are both zero everywhere. The gradient of each is a multiple of the other, "
        "so neither ever changes. One of them has to start away from zero.",
        f"{context.variable_code(chosen)}.assign(keras.random.normal({tuple(chosen.shape)}, stddev=0.02))",
    )


def _zero_factors(context: Context, expression: Expression) -> tuple[Weight, ...]:
    """Weights that make operands of a product zero everywhere: one for each such operand."""
    if not isinstance(expression, Node) or expression.name not in PRODUCTS:
        return ()
    found = [_zero_part(context, operand) for operand in expression.operands]
    return tuple(dict.fromkeys(weight for weight in found if weight is not None))


def _zero_part(context: Context, expression: Expression) -> Weight | None:
    """A weight that is zero everywhere, and makes an expression so."""
    if isinstance(expression, Weight):
        return expression if expression.is_built and _is_zero(context, expression.variable) else None
    if not isinstance(expression, Node) or not (len(expression.operands) == 1 or expression.name in PRODUCTS):
        return None
    if not (expression.name in PRODUCTS or is_view(expression) or expression.name in ("scale_gradient", "cast")):
        return None
    return next(filter(None, (_zero_part(context, operand) for operand in expression.operands)), None)


def _is_zero(context: Context, variable: Any) -> bool:
    values = context.values_of(variable)
    return values is not None and len(values.shape) > 0 and is_zero(values)

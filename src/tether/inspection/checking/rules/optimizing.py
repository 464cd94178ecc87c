"""Optimizers that do not fit the weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tether import keras_seam
from tether.inspection.aliases import aliases
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.rules.registry import rule
from tether.inspection.facts import Shape, Slot
from tether.layers.training import still

MOST_MISSED = 20
"""Findings of one rule name at most so many names."""


@rule("compiled-before-tied", "an optimizer that was built with other weights than the model has now")
def compiled_before_tied(context: Context) -> Iterator[Finding]:
    """A weight that it does not know cannot be trained on; one that is gone keeps its slots."""
    if not getattr(context.model, "compiled", False):
        return
    known = {id(variable): variable for variable in keras_seam.optimized_variables(context.model.optimizer)}
    missing = [variable for variable in context.model.trainable_variables if id(variable) not in known]
    present = {id(variable) for variable in context.model.variables}
    gone = [variable for key, variable in known.items() if key not in present]
    if known and missing:
        why = (
            f"The optimizer was built without {_listed(missing)}: what trains was tied, untied or unfrozen after the "
            "model had trained. `fit` asks for `compile`; a step by hand fails, or leaves it as it is."
        )
    elif gone:
        why = (
            f"The optimizer was built with {_listed(gone)}, which the model no longer has: it was tied after it had "
            "trained. The optimizer keeps slots for nothing. `fit` asks for `compile`; on JAX a step by hand fails."
        )
    else:
        return
    yield Finding("compiled-before-tied", "error", "optimizer", why, _compile_again(context))


def _listed(variables: list[Any]) -> str:
    names = [repr(variable.path) for variable in variables]
    more = f" and {len(names) - MOST_MISSED} more" if len(names) > MOST_MISSED else ""
    return ", ".join(names[:MOST_MISSED]) + more


def _compile_again(context: Context) -> str:
    loss = "" if getattr(context.model, "loss", None) is None else ", loss=model.loss"
    return f"model.compile(model.optimizer.from_config(model.optimizer.get_config()){loss})"


@rule("stepped-twice", "an optimizer that was given one variable several times")
def stepped_twice(context: Context) -> Iterator[Finding]:
    """A list such as `a.trainable_weights + b.trainable_weights` has a shared weight twice: it makes two steps."""
    for where, optimizer in context.optimizers:
        variables = keras_seam.optimized_variables(optimizer)
        counted = Counter(map(id, variables))
        for variable in {id(v): v for v in variables}.values():
            if counted[id(variable)] > 1:
                code = "model.optimizer" if where == "optimizer" else f"model.{where.replace('/', '.')}"
                yield Finding(
                    "stepped-twice",
                    "error",
                    variable.path,
                    f"The optimizer in `{where}` was built with this variable {counted[id(variable)]} times, so each "
                    "step of a loop that hands over the same list moves it as often, by the whole gradient each "
                    "time. A list of the weights of two layers names what they share twice.",
                    "variables = tether.inspection.unique(model.trainable_weights)  # of all layers that train\n"
                    f"{code} = type({code}).from_config({code}.get_config())\n"
                    f"{code}.build(variables)  # and in the loop: {code}.apply(gradients, variables)",
                )


@rule("misfit-slot", "what an optimizer keeps for no weight, or for one of another shape", file=True)
def misfit_slot(context: Context) -> Iterator[Finding]:
    """It was kept for something that is gone or was resized: training goes on from a wrong state, or fails."""
    shapes = {kept for weight in context.facts.weights for kept in _shapes_kept_for(weight.shape)}
    for slot in context.facts.optimizer:
        if not slot.shape or slot.shape == (1,) or slot.shape == (0,):
            continue
        if context.file is not None or slot.weight is None:
            if context.file is not None and slot.shape in shapes:
                continue
            why = f"The optimizer keeps a state of shape {slot.shape} for no weight of the model."
        else:
            weight = context.facts.weight(slot.weight)
            if slot.shape in _shapes_kept_for(weight.shape):
                continue
            why = (
                f"The optimizer keeps a state of shape {slot.shape} for {context.name_of(weight)!r}, which has shape "
                f"{weight.shape}."
            )
        yield Finding("misfit-slot", "warning", _slot_name(slot), f"{why} {_EFFECT}", _mend_slots(context))


_EFFECT = "The weight was replaced or resized after the optimizer was built."


def _shapes_kept_for(shape: Shape) -> set[Shape]:
    """The shapes of what optimizers keep for a weight: as it is, or its rows and columns (Adafactor)."""
    return {shape, shape[:-1], (*shape[:-2], *shape[-1:]), shape[::-1]}


def _slot_name(slot: Slot) -> str:
    return f"{slot.place} ({slot.name})" if slot.name else slot.place


def _mend_slots(context: Context) -> str:
    return _compile_again(context) if context.model is not None else "model = keras.saving.load_model(path)"


@rule("decays-frozen-use", "an optimizer that decays a weight that trains elsewhere, and is only read here")
def decays_frozen_use(context: Context) -> Iterator[Finding]:
    """A model that is compiled hands it only what it trains. An optimizer that is called by hand gets everything."""
    only_read = still(context.model)
    for where, optimizer in context.optimizers if only_read else ():
        inner, pattern = keras_seam.inner_optimizer(optimizer), keras_seam.decay_pattern(optimizer)
        known = {id(variable) for variable in keras_seam.optimized_variables(optimizer)}
        if not getattr(inner, "weight_decay", None) or keras_seam.is_given_what_trains(optimizer, context.model):
            continue
        for variable in only_read:
            if keras_seam.is_excluded_from_decay(optimizer, variable) or (known and id(variable) not in known):
                continue
            if pattern is not None and pattern.search(variable.name):
                continue
            code = "model.optimizer" if where == "optimizer" else f"model.{where.replace('/', '.')}"
            yield Finding(
                "decays-frozen-use",
                "warning",
                variable.path,
                f"It trains elsewhere, and every use of it in this model is frozen or under `stop_gradient`. Keras has "
                f"one flag for a variable, so it is among `trainable_variables`, and `{where}` decays it: on JAX its "
                "gradient is zero and not missing.",
                f"{code} = type({code}).from_config({code}.get_config())\n"
                f"{code}.exclude_from_weight_decay(var_list=[{context.variable_code(variable)}])\n"
                f"# or let the model train: `model.compile({code}, ...)` hands its optimizer what the model trains",
            )


# --------------------------------------------------------------------------- names


@rule("name-misses-alias", "a rule that goes by names and names a user of a shared weight, not what is stored")
def name_misses_alias(context: Context) -> Iterator[Finding]:
    """A stored weight has one path; the name of a user matches nothing, and nothing says so."""
    names = aliases(context.model)
    shared = {path: others for path, others in names.items() if len(others) > 1}
    variables = {context.unique_path(variable): variable for variable in context.model.weights}
    for where, optimizer in context.optimizers:
        pattern = keras_seam.decay_pattern(optimizer)
        for path, others in shared.items():
            variable = variables[path]
            if pattern is None or not optimizer.weight_decay or pattern.search(variable.name):
                continue
            if keras_seam.is_excluded_from_decay(optimizer, variable):
                continue
            missed = [name for name in others[1:] if pattern.search(name)]
            if missed:
                yield Finding(
                    "name-misses-alias",
                    "warning",
                    missed[0],
                    f"`exclude_from_weight_decay(var_names=...)` of `{where}` names {pattern.pattern!r}, which "
                    f"matches {missed[0]!r}; that reads the stored weight {path!r}, whose name does not match. It is "
                    "decayed.",
                    f"optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("
                    f"{pattern.pattern!r}))  # before the optimizer is built",
                )
    yield from _missed_by_layouts({path: (variables[path].path, *others[1:]) for path, others in shared.items()})


def _missed_by_layouts(shared: dict[str, tuple[str, ...]]) -> Iterator[Finding]:
    layouts = keras_seam.layout_map()
    for path, *others in shared.values() if layouts is not None else ():
        if any(key == path or re.fullmatch(key, path) for key in layouts):
            continue
        for key in layouts:
            missed = next((name for name in others if key == name or re.fullmatch(key, name)), None)
            if missed is not None:
                yield Finding(
                    "name-misses-alias",
                    "warning",
                    missed,
                    f"The layout map of the distribution has {key!r}, which matches {missed!r}; that reads the stored "
                    f"weight {path!r}, which matches nothing. It is on every device as a whole.",
                    f"layout_map[{path!r}] = layout_map[{missed!r}]  # before the weight is made",
                )

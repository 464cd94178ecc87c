"""How weights are stored: under which path, and for whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import keras

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.mending import code_of
from tether.inspection.checking.rules.registry import rule
from tether.inspection.facts import StoredWeight
from tether.layers.records import verification


@rule("path-used-twice", "one path that two variables have", file=True)
def path_used_twice(context: Context) -> Iterator[Finding]:
    """Whatever goes by path cannot tell them apart; on PyTorch one of two of Keras's own is missing in `state_dict`."""
    by_path: dict[str, list[StoredWeight]] = defaultdict(list)
    for weight in context.weights:
        if weight.path is not None:
            by_path[weight.path].append(weight)
    for path, weights in by_path.items():
        if len(weights) > 1:
            names = [context.name_of(weight) for weight in weights]
            lost = sum(not context.is_shared(weight) for weight in weights) > 1
            missing = "On PyTorch all but one of them are missing in `state_dict()` and `named_parameters()`, and what"
            yield Finding(
                "path-used-twice",
                "warning",
                path,
                f"{len(weights)} variables have this path: {', '.join(dict.fromkeys(names))}. "
                f"{missing if lost else 'What'} goes by path (a layout map, `get_state_tree`) cannot tell them apart.",
                _rename(context, weights[-1]),
            )


def _rename(context: Context, weight: StoredWeight) -> str:
    if context.is_shared(weight):
        return f"tether.Weight(..., name={'another_' + context.variables[weight.place].name!r})  # a name of its own"
    if context.file is not None:
        return "# give the layers names of their own: keras.layers.Dense(..., name='...')"
    variable = context.variables[weight.place]
    layer, _ = next(iter(context.uses(variable)), (None, None))
    kind = "Dense" if layer is None else type(layer).__name__
    return f"keras.layers.{kind}(..., name={'another_' + str(getattr(layer, 'name', 'name'))!r})  # a name of its own"


@rule("unrecorded-tie", "a tie that no config holds: a file, a clone or a pickle would be untied")
def unrecorded_tie(context: Context) -> Iterator[Finding]:
    """It was made on a layer whose config is not part of the model's, such as the cell of a recurrent layer."""
    try:
        found = verification.unrecorded(context.model)
    except Exception:  # a class without a config of its own: Keras refuses to save or clone it, and says why
        return
    for lost in found:
        where = "/".join((context.path_of(lost.layer), *lost.path))
        yield Finding(
            "unrecorded-tie", "error", where, verification.message(lost, context.model), _record(context, lost)
        )


def _record(context: Context, lost: verification.Unrecorded) -> str:
    outer = verification.recorder_for(lost, context.model)
    if outer is None or lost.expression is None:
        return "tether.files.save_model(model, path)  # says what to change in the layer that makes the weight"
    layer, path = outer
    known = {w: context.weight_code(w.variable) for w in lost.expression.weights_used() if w.is_built}
    return f"tether.tie({context.layer_code(layer)}, {{{'/'.join(path)!r}: {code_of(lost.expression, known)}}})"


@rule("orphan-variable", "a variable that a layer tracks and nothing reads")
def orphan_variable(context: Context) -> Iterator[Finding]:
    """It is trained, saved and counted, and has no effect: what is left when an attribute was overwritten."""
    held = {id(item.found.value) for item in context.captured if isinstance(item.found.value, keras.Variable)}
    for layer in context.layers:
        for variables in keras_seam.variable_lists(layer).values():
            for variable in variables:
                if id(variable) not in held and id(variable) not in _in_properties(layer):
                    yield Finding(
                        "orphan-variable",
                        "warning",
                        f"{context.path_of(layer)}/{variable.name}",
                        f"The layer tracks the variable {variable.path!r} of shape {tuple(variable.shape)}, and no "
                        "attribute of any layer holds it: an attribute that held it was overwritten. It still takes "
                        "memory, slots of the optimizer and weight decay, and is saved.",
                        f"fresh = type(layer).from_config(layer.get_config())  # layer {layer.name!r}, made anew; "
                        "share its weight by `tether.tie` instead of by setting the attribute",
                    )


def _in_properties(layer: Any) -> set[int]:
    """The ids of variables that properties of the layer's class give, wherever it keeps them."""
    found = set()
    for cls in type(layer).__mro__:
        if cls is keras.layers.Layer:
            break
        for name, attribute in vars(cls).items():
            if isinstance(attribute, property):
                try:
                    found.add(id(getattr(layer, name)))
                except Exception:  # a property that is not ready
                    continue
    return found

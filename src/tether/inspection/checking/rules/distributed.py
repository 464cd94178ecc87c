"""Rules about models on many devices: how their variables lie there, and what the engines that train there store.

Names, shapes and layouts are all that is read, and no value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import keras

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding, rule
from tether.layers.use_layouts import LaidOut, answer_of, laid_out
from tether.weights.expression import Stored
from tether.weights.placement import Spec, Traced, is_base
from tether.weights.weight import Weight

_MAKE_AGAIN = (
    "with keras.distribution.distribution().scope():  # with a map that says so\n"
    "    model = keras.models.clone_model(model)  # or load it here: what is made in the scope lies as the map says"
)


@dataclass(frozen=True)
class _Asked:
    """What the layout map in force says of a model."""

    layouts: keras.distribution.LayoutMap
    sizes: dict[str, int]
    laid: LaidOut


def _asked(context: Context) -> _Asked | None:
    layouts = keras_seam.layout_map()
    mesh = getattr(layouts, "device_mesh", None)
    if layouts is None or mesh is None or not context.model.built:
        return None
    sizes = keras_seam.mesh_sizes(mesh)
    return _Asked(layouts, sizes, laid_out(context.model, answer_of(layouts), sizes))


def _present(variable: keras.Variable) -> Spec | None:
    """How a variable lies: by its tensor, or as it was made to, if that has no names."""
    found = keras_seam.lies_as(variable)
    return keras_seam.layout_of(variable) if found is None else found


def _divided(spec: Spec, sizes: Mapping[str, int]) -> Spec:
    """A layout without the axes of the mesh that have one device only: they divide nothing."""
    return tuple(None if name is None or sizes.get(name, 1) < 2 else name for name in spec)


@rule("layout-missed", "a layout of the map in force that reaches no weight, or a weight that lies in another way")
def layout_missed(context: Context) -> Iterator[Finding]:
    """Keras asks the map once, when a variable is made: what was made before, or moved since, lies as it did."""
    asked = context.once(_asked)
    if asked is None:
        return
    for key in asked.layouts:
        reached = key in asked.laid.keys or any(variable.path == key for variable, _ in asked.laid.specs)
        if not reached and not str(key).startswith("!"):
            yield Finding(
                "layout-missed",
                "hint",
                str(key),
                "The layout map of the distribution in force has this name or pattern, and nothing in the model is "
                "called so: neither a stored weight nor a use of one.",
                "print(tether.inspection.aliases(model))  # the names that there are",
            )
    parts = {id(weight.variable) for weight in _weights(context) if not is_base(weight)}
    for variable, spec in asked.laid.specs:
        present = _present(variable)
        wanted = _divided(spec, asked.sizes)
        if id(variable) in parts or (present is not None and _divided(present, asked.sizes) == wanted):
            continue
        if present is None and not any(wanted):
            continue
        lies = "lies on one device" if present is None else f"is laid out as {present}"
        yield Finding(
            "layout-missed",
            "warning",
            context.unique_path(variable),
            f"By the layout map of the distribution in force it is laid out as {spec}, and it {lies}: it was made "
            "before the map was in force, or something has moved it.",
            _MAKE_AGAIN,
        )


def _weights(context: Context) -> list[Weight]:
    """The stored weights that tied layers read."""
    found: dict[int, Weight] = {}
    for _, _, slot in context.tied:
        for weight in slot.view.expression.weights_used():
            if isinstance(weight, Weight) and weight.is_built:
                found[id(weight)] = weight
    return list(found.values())


@rule("layout-conflict", "two uses of a weight of which the layout map in force says what does not agree")
def layout_conflict(context: Context) -> Iterator[Finding]:
    """A stored weight lies in one way; whatever else is said of a use of it means moving it at every step."""
    asked = context.once(_asked)
    for conflict in () if asked is None else asked.laid.conflicts:
        yield Finding(
            "layout-conflict",
            "error",
            conflict.other.name,
            f"{conflict} The first counts, and what the other use computes with is moved for it at every step.",
            f"layouts = {{{conflict.other.name!r}: {conflict.instead!r}}}  # in the map, or leave this name out",
        )


@rule("layout-misfit", "a layout of the map in force that does not fit the shape of a weight")
def layout_misfit(context: Context) -> Iterator[Finding]:
    """With another number of axes it means nothing; an axis that the devices do not divide evenly stays whole."""
    asked = context.once(_asked)
    if asked is None:
        return
    for misfit in asked.laid.misfits:
        yield Finding(
            "layout-misfit",
            "error",
            misfit.name,
            f"The layout map has {misfit.asked} for it by the key {misfit.key!r}, and it has shape {misfit.shape}: a "
            "layout has an entry for each axis. It is whole on every device.",
            f"layouts = {{{misfit.name!r}: {(None,) * len(misfit.shape)!r}}}  # or with axes of the mesh in it",
        )
    for misfit in asked.laid.undivided:
        axis = misfit.axis or 0
        name = misfit.asked[axis]
        yield Finding(
            "layout-misfit",
            "warning",
            misfit.name,
            f"The layout map divides its axis {axis}, of size {misfit.shape[axis]}, over {name!r}, which has "
            f"{asked.sizes[name or '']} devices: they cannot have equal parts. The axis is whole on every device.",
            f"layouts = {{{misfit.name!r}: {_without(misfit.asked, axis)!r}}}  # or another size, such as "
            f"{-(-misfit.shape[axis] // asked.sizes[name or '']) * asked.sizes[name or '']}",
        )


def _without(spec: Spec, axis: int) -> Spec:
    return (*spec[:axis], None, *spec[axis + 1 :])


@rule("part-whole", "a part of a weight that is whole on every device, though the weight itself is divided")
def part_whole(context: Context) -> Iterator[Finding]:
    """Then the gradient of the whole weight travels at every step, to be multiplied with the part."""
    seen: set[int] = set()
    for _, _, slot in context.tied:
        expression = slot.view.expression
        weights: list[Stored] = [weight for weight in expression.weights_used() if weight.is_built]
        layouts = {weight: _present(weight.variable) for weight in weights}
        bases = {weight: spec for weight, spec in layouts.items() if is_base(weight) and spec and any(spec)}
        sizes = next((found for weight in bases if (found := keras_seam.devices_of(weight.variable)) is not None), None)
        if sizes is None or expression.shape is None:
            continue
        traced = Traced(expression, sizes)
        for weight, spec in bases.items():
            traced.say(spec, weight)
        for weight in weights:
            wanted, present = _divided(traced.of(weight), sizes), layouts[weight]
            is_whole = present is None or not any(_divided(present, sizes))
            if is_base(weight) or id(weight) in seen or not is_whole or not any(wanted):
                continue
            seen.add(id(weight))
            base, spec = next(iter(bases.items()))
            yield Finding(
                "part-whole",
                "warning",
                context.unique_path(weight.variable),
                f"It is whole on every device, and {base.path!r}, which it is a part of or made for, is laid out as "
                f"{spec}. As {wanted} it takes less memory, and less travels at every step.",
                _MAKE_AGAIN,
            )


FULLY_SHARD = (
    "model = ...  # made anew\n"
    "tether.distribution.fully_shard(model)  # in the place of torch.distributed.fsdp.fully_shard(model)"
)


@rule("replaced-parameter", "a parameter that PyTorch has for a model and that its layers do not compute with")
def replaced_parameter(context: Context) -> Iterator[Finding]:
    """FSDP2 registers parameters of its own, and Keras's variables keep the old ones unless they are told."""
    reported: set[str] = set()
    for layer in context.layers:
        for key, variable in keras_seam.stray_parameters(layer):
            if key in reported:
                continue
            reported.add(key)
            yield Finding(
                "replaced-parameter",
                "error",
                context.unique_path(variable),
                f"The parameter that PyTorch lists for {layer.name!r} under {key!r} is not the one that the layer "
                "computes with: somebody has put another in its place, as PyTorch's `fully_shard` (FSDP2) does, and "
                "the Keras variable has the old one. An optimizer of PyTorch's steps the listed one, which gets no "
                "gradient, so the model does not train.",
                FULLY_SHARD,
            )


@rule("outside-strategy", "a variable that was not made in the scope of the strategy that has the model's others")
def outside_strategy(context: Context) -> Iterator[Finding]:
    """TensorFlow cannot train it in a replica, or each replica writes to it."""
    variables = context.model.variables
    inside = [variable for variable in variables if keras_seam.strategy_of(variable) is not None]
    if not inside:
        return
    scope = (
        f"the scope of the `{type(keras_seam.strategy_of(inside[0])).__name__}` of {context.unique_path(inside[0])!r}"
    )
    for variable in variables:
        if keras_seam.strategy_of(variable) is None:
            yield Finding(
                "outside-strategy",
                "error",
                context.unique_path(variable),
                f"This variable was made outside of {scope}. It has no copy on each replica, and training it fails.",
                "with strategy.scope():\n    model = ...  # all that makes variables: layers, ties, adapters",
            )
    optimizer = getattr(context.model, "optimizer", None)
    if optimizer is not None and keras_seam.strategy_of(optimizer.iterations) is None:
        yield Finding(
            "outside-strategy",
            "error",
            optimizer.name,
            f"This optimizer was made outside of {scope}. Each replica adds to its counter of steps, which "
            "schedules of the learning rate and `Follow` read: it counts a step once for each replica.",
            "with strategy.scope():\n    model.compile(...)  # with a new optimizer",
        )

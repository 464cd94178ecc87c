"""Rules about models on many devices: how their variables lie there. Names, shapes and layouts are all that is read."""

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

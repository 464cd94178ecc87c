"""Layers that were not built as their classes want it, or that overwrite what they share."""

from __future__ import annotations

import dis
import random
from collections.abc import Iterator
from typing import Any

import keras

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.rules.registry import rule
from tether.layers.tying.state import stored_variables
from tether.layers.tying.tied import base_class


@rule("parent-not-built", "a subclass of a Keras layer whose build does not call its parent's")
def parent_not_built(context: Context) -> Iterator[Finding]:
    """The weights that the parent computes with are missing."""
    for layer in context.layers:
        own = base_class(type(layer))
        if not layer.built or _is_of_keras(own):
            continue
        parent = next(cls for cls in own.__mro__ if _is_of_keras(cls))
        if not issubclass(parent, keras.layers.Layer) or issubclass(keras.Model, parent):
            continue  # mixes in something, or derives from `Layer` or `Model`, which have no weights of their own
        missing = _missing(layer, own, parent)
        if missing:
            yield Finding(
                "parent-not-built",
                "error",
                context.path_of(layer),
                f"{own.__name__} is a {parent.__name__}, whose `build` makes {', '.join(missing)}; the layer is built "
                f"and has no such attribute. `{own.__name__}.build` does not call its parent's.",
                f"super().build(input_shape)  # the first line of {own.__name__}.build",
            )


def _is_of_keras(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "keras"


def _missing(layer: Any, own: Any, parent: Any) -> list[str]:
    """The attributes that the layer's call reads, the parent's `build` makes, and the layer lacks."""
    classes = own.__mro__[: own.__mro__.index(parent)]
    if not any("build" in vars(cls) for cls in classes):
        return []
    present = {name for name, _ in keras_seam.attributes(layer)}
    wanted = _made_in(parent.build) & _read_in(own.call, parent) - present - {"built", "input_spec"}
    return sorted(wanted & _attributes_of_the_parent(layer, parent)) if wanted else []


def _made_in(build: Any) -> set[str]:
    return {i.argval for i in dis.get_instructions(build) if i.opname == "STORE_ATTR"}


def _read_in(call: Any, parent: Any) -> set[str]:
    """The attributes that a call reads, and those behind the properties that it reads."""
    names = {i.argval for i in dis.get_instructions(call) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    if call is not parent.call and "__class__" in call.__code__.co_freevars:  # it calls `super()`
        names |= _read_in(parent.call, parent)
    return names | {f"_{name}" for name in names}


def _attributes_of_the_parent(layer: Any, parent: Any) -> set[str]:
    """What a layer of the parent's class would have after its `build`; some attributes depend on the arguments."""
    drawn = random.getstate()  # initializers without a seed draw one
    try:
        with keras.StatelessScope():
            scratch = parent.from_config(parent.get_config(layer))
            scratch.build_from_config(layer.get_build_config())
        return {name for name, _ in keras_seam.attributes(scratch)}
    except Exception:  # a parent that cannot be made by itself has nothing to compare with
        return set()
    finally:
        random.setstate(drawn)


@rule("spectral-norm-over-shared", "a SpectralNormalization around a layer whose weight others read")
def spectral_norm_over_shared(context: Context) -> Iterator[Finding]:
    """It overwrites the weight at every step of training, for everybody."""
    for wrapper in context.layers:
        if not isinstance(wrapper, keras.layers.SpectralNormalization) or not wrapper.built:
            continue
        inner, kernel = wrapper.layer, wrapper.kernel
        for variable in stored_variables(kernel):
            others = [layer for layer in _readers(context, variable) if layer not in (inner, wrapper)]
            others += [parent for parent in context.parents.get(id(inner), ()) if parent is not wrapper]
            others += [inner for _ in range(_calls_outside(context, inner))]
            if others:
                name = next((n for n in ("kernel", "embeddings") if hasattr(inner, n)), kernel.name)
                yield Finding(
                    "spectral-norm-over-shared",
                    "error",
                    context.path_of(wrapper),
                    f"At every step of training it overwrites the {name} of {inner.name!r} by the normalised one, and "
                    f"{context.path_of(others[0])!r} reads the same weight. Each step changes what that layer "
                    "computes, and undoes what the optimizer did.",
                    f"kernel = tether.weight_of(layer, {name!r})  # `layer`: {inner.name!r}, without the wrapper\n"
                    f"tether.tie(layer, {name}=tether.forms.spectral_norm()(kernel))",
                )
                break


def _readers(context: Context, variable: Any) -> Iterator[Any]:
    """The layers that read a stored variable: by an attribute, in their graph, or by a tie."""
    yield from (captured.layer for captured in context.captured if captured.found.value is variable)
    for layer, _, slot in context.tied:
        if any(variable is stored for stored in stored_variables(slot.view)):
            yield layer


def _calls_outside(context: Context, inner: Any) -> int:
    """How often graphs of the model call a layer by itself."""
    return sum(called is inner for layer in context.layers for called, _, _ in keras_seam.calls_in_graph(layer))

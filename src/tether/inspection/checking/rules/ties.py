"""Rules about how a tie is made, built and kept in a file."""

from __future__ import annotations

import dis
import random
from collections import defaultdict
from collections.abc import Iterator

import keras

from tether import keras_seam
from tether.errors import UnknownName
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding, as_code, rule
from tether.inspection.checking.samples import is_zero
from tether.inspection.facts import StoredWeight
from tether.layers.records import verification
from tether.layers.tying import paths
from tether.layers.tying.state import Tie, View, ViewSlot, state_of, stored_variables
from tether.layers.tying.tied import Tied, base_class
from tether.types import Function
from tether.weights.expression import Expression, Node, is_view, program
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- tying
# Ties that no longer hold, and parts of ties that cannot learn.


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


def _why_lost(layer: keras.Layer, slot: ViewSlot) -> str | None:
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


def _why_not_there(layer: keras.Layer, tie: Tie) -> str | None:
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
    return as_code(expression, known)


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


def _dead(context: Context, where: str, names: list[str], factors: list[keras.Variable]) -> Finding:
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


def _is_zero(context: Context, variable: keras.Variable) -> bool:
    values = context.values_of(variable)
    return values is not None and len(values.shape) > 0 and is_zero(values)


# --------------------------------------------------------------------------- building
# Layers that were not built as their classes want it, or that overwrite what they share.


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


def _missing(layer: keras.Layer, own: type[keras.Layer], parent: type[keras.Layer]) -> list[str]:
    """The attributes that the layer's call reads, the parent's `build` makes, and the layer lacks."""
    classes = own.__mro__[: own.__mro__.index(parent)]
    if not any("build" in vars(cls) for cls in classes):
        return []
    present = {name for name, _ in keras_seam.attributes(layer)}
    wanted = _made_in(parent.build) & _read_in(own.call, parent) - present - {"built", "input_spec"}
    return sorted(wanted & _attributes_of_the_parent(layer, parent)) if wanted else []


def _made_in(build: Function) -> set[str]:
    return {i.argval for i in dis.get_instructions(build) if i.opname == "STORE_ATTR"}


def _read_in(call: Function, parent: type[keras.Layer]) -> set[str]:
    """The attributes that a call reads, and those behind the properties that it reads."""
    names = {i.argval for i in dis.get_instructions(call) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    if call is not parent.call and "__class__" in call.__code__.co_freevars:  # it calls `super()`
        names |= _read_in(parent.call, parent)
    return names | {f"_{name}" for name in names}


def _attributes_of_the_parent(layer: keras.Layer, parent: type[keras.Layer]) -> set[str]:
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


def _readers(context: Context, variable: keras.Variable) -> Iterator[keras.Layer]:
    """The layers that read a stored variable: by an attribute, in their graph, or by a tie."""
    yield from (captured.layer for captured in context.captured if captured.found.value is variable)
    for layer, _, slot in context.tied:
        if any(variable is stored for stored in stored_variables(slot.view)):
            yield layer


def _calls_outside(context: Context, inner: keras.Layer) -> int:
    """How often graphs of the model call a layer by itself."""
    return sum(called is inner for layer in context.layers for called, _, _ in keras_seam.calls_in_graph(layer))


# --------------------------------------------------------------------------- storing
# How weights are stored: under which path, and for whom.


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
    return f"tether.tie({context.layer_code(layer)}, {{{'/'.join(path)!r}: {as_code(lost.expression, known)}}})"


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


def _in_properties(layer: keras.Layer) -> set[int]:
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

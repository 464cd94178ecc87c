"""The class of a tied layer: a subclass of the layer's own class, made once for each.

It keeps its base's name (Keras derives file paths from it), its base's `build`, `call` and their
signatures. It hands out views when the base asks for a variable, keeps Keras's tracker and recursion
away from weights that others share, lists and saves variables in the base's order, and writes the
ties into its config under the one key `"tether"`.
"""

from __future__ import annotations

import inspect
import io
from typing import Any, NoReturn

import keras

from tether import keras_seam
from tether.errors import UnknownName, Unsupported, received
from tether.forms.dropout import refuse_dropout
from tether.layers.records import own_values
from tether.layers.records.record import encode_ties
from tether.layers.tying import paths
from tether.layers.tying.fit import (
    refuse_misfit,
    refuse_tie,
    refuse_unsupported,
    start_from_layer,
    start_from_values,
    warn_of_initializer,
)
from tether.layers.tying.state import (
    STATE,
    WEIGHTS,
    State,
    Tie,
    View,
    ViewSlot,
    arguments_by_name,
    from_above,
    hang_weights,
    in_base_order,
    known_order,
    new_use,
    serializing,
    slots_of,
    state_of,
    taking,
    view_like,
    weights_below,
)
from tether.layers.tying.swap import exchange, swapped
from tether.types import Config, Function, Saveable, Store, Tensor
from tether.weights import placement
from tether.weights.expression import Expression, resolved
from tether.weights.leaves import bind
from tether.weights.operators.indexing import readings
from tether.weights.storage import Use
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- the class


KEY = "tether"
_classes: dict[tuple[type | str, ...], type] = {}


def tied_class(base: type[keras.Layer], arguments: tuple[str, ...] = ()) -> type:
    """The tied subclass of a layer class; its `call` takes these arguments of expressions as keywords."""
    key: tuple[type | str, ...] = (base, *arguments)
    if key not in _classes:
        _classes[key] = _make(base, arguments)
    return _classes[key]


def takes_arguments(layer: keras.Layer) -> bool:
    """Whether the call of a layer takes arguments of its ties."""
    return bool(getattr(type(layer), "_tether_arguments", ()))


def take_arguments(layer: keras.Layer) -> None:
    """Lets the call of a tied layer take the arguments in the ties recorded on it, and no others.

    Raises:
        Unsupported: The layer's call has a parameter of that name already.
    """
    state = state_of(layer)
    names = () if state is None else tuple(arguments_by_name(state))
    base = base_class(type(layer))
    if names != getattr(type(layer), "_tether_arguments", ()):
        taken = set(inspect.signature(base.call).parameters) & set(names)
        if taken:
            raise Unsupported(
                f"The call of {base.__name__} has a parameter {sorted(taken)[0]!r} of its own. Give the argument "
                "another name."
            )
        layer.__class__ = tied_class(base, names)
        keras_seam.refresh_call_signature(layer)


def base_class(cls: type[keras.Layer]) -> type[keras.Layer]:
    """The class that a tied class was made from; any other class is its own."""
    return cls._tether_base if issubclass(cls, Tied) else cls


class Tied:
    """What a tied layer does otherwise than its base. Mixed in front of the base by `tied_class`."""

    _tether_base: type
    _tether_arguments: tuple[str, ...] = ()

    # ------------------------------------------------------------------ variables

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """Hands out a view where a tie waits for a variable of this name, and makes a variable elsewhere."""
        for position, value in zip(("shape", "initializer", "dtype"), args, strict=False):
            kwargs.setdefault(position, value)
        state = state_of(self)
        name = kwargs.get("name")
        tie = None if state is None or name is None else state.pending.get((name,))
        if state is not None and any(slot.tie.path[-1:] == (name,) and slot.named for slot in state.slots):
            state.clashes.append(str(name))
        if state is None or tie is None:
            return super().add_weight(**kwargs)  # type: ignore[misc]
        view = hand_out(self, state, tie, **kwargs)
        state.pending = {path: waiting for path, waiting in state.pending.items() if waiting is not tie}
        return view

    def __setattr__(self, name: str, value: object) -> None:
        if value is True and vars(self).get(name) is True:
            return  # Keras says so at every call that a layer is built and was called
        if isinstance(value, View):
            check = getattr(self, "check_attribute", None)  # of an extended class
            if check is not None:
                check(name, value)
            keras_seam.set_untracked(self, name, value)
            return
        super().__setattr__(name, value)
        state = state_of(self)
        if state is not None and state.pending and isinstance(value, keras.layers.Layer):
            forward(self, state)

    def _lock_state(self) -> None:
        settle(self)
        state = state_of(self)
        if state is not None and state.when_built:
            waiting, state.when_built = state.when_built, []
            for each in waiting:
                each.act(self)
        super()._lock_state()  # type: ignore[misc]

    @property
    def weights(self) -> list[keras.Variable]:
        """The stored weight variables, each once, in the order of the untied layer."""
        state = state_of(self)
        if state is None:
            return super().weights  # type: ignore[misc]
        return known_order(self, state) or in_base_order(self, state, super().weights)  # type: ignore[misc]

    @property
    def variables(self) -> list[keras.Variable]:
        """All stored state, each variable once, in the order of the untied layer."""
        state = state_of(self)
        if state is None:
            return super().variables  # type: ignore[misc]
        return known_order(self, state) or in_base_order(self, state, super().variables)  # type: ignore[misc]

    # ------------------------------------------------------------------ what trains

    @property
    def trainable(self) -> bool:
        """The layer's flag. Setting it decides for this layer's uses of its weights, not for the weights."""
        keras_seam.notice_compiling()
        return keras_seam.own_trainable_flag(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        value = bool(value)
        keras_seam.set_own_trainable_flag(self, value)
        for variable in keras_seam.variable_lists(self)["trainable_variables"]:
            variable.trainable = value
        state = state_of(self)
        hung = vars(self).get(WEIGHTS) or ()
        for layer in keras_seam.sublayers(self):
            if not any(layer is weight for weight in hung):
                layer.trainable = value
        for slot in state.slots if state is not None else ():
            slot.view.follow(value)
        for penalty in state.penalties if state is not None else ():
            if penalty.recorder() is self:
                penalty.follow(value)

    def _get_own_losses(self) -> list[Tensor]:
        losses = super()._get_own_losses()  # type: ignore[misc]
        state = state_of(self)
        if state is None:
            return losses
        regularized = [slot for slot in state.slots if slot.view.use.regularizer is not None and slot.view.use.live]
        scope = keras_seam.losses_scope() if regularized else None
        counted = set() if scope is None else scope.setdefault("pairs", set())
        for slot in regularized:
            use = slot.view.use
            pair = (use.expression, repr(keras.regularizers.serialize(use.regularizer)))
            if use.regularizer is not None and pair not in counted:
                counted.add(pair)
                for given in readings(use.expression):
                    with bind(given):
                        losses.append(use.regularizer(slot.view.value))
        for penalty in state.penalties:
            if penalty.recorder() is self and penalty.counts:
                losses.append(penalty.value())
        return losses

    # ------------------------------------------------------------------ files

    def save_own_variables(self, store: Store) -> None:
        """Writes as the base does, without what is stored in weights."""
        state = state_of(self)
        if state is None:
            super().save_own_variables(store)  # type: ignore[misc]
        else:
            own_values.save(self, state, store, super().save_own_variables)  # type: ignore[misc]

    def load_own_variables(self, store: Store) -> None:
        """Reads what this layer wrote, or what it wrote before it was tied."""
        state = state_of(self)
        if state is None:
            super().load_own_variables(store)  # type: ignore[misc]
        else:
            own_values.load(self, state, store, super().save_own_variables, super().load_own_variables)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Config) -> keras.Layer:
        """A tied layer from its config, with weights of its own or those of the sharing scope."""
        return from_above["revive"](cls._tether_base, config)

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        buffer = io.BytesIO()
        keras_seam.save_to(self, buffer)
        return (from_above["unpickle"], (buffer.getvalue(), {weight.uid: weight for weight in weights_below(self)}))

    def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, object]:
        children = {
            name: child
            for name, child in super()._trackable_children(*args, **kwargs).items()  # type: ignore[misc]
            if not isinstance(child, View) and not isinstance(vars(self).get(name), View)
        }
        hung = vars(self).get(WEIGHTS) or ()
        return {**children, **{f"{WEIGHTS}_{place}": weight for place, weight in enumerate(hung)}}

    # ------------------------------------------------------------------ what would untie it

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would train or freeze what others share."""
        names = ", ".join(slot.view.name for slot in slots_of(self))
        raise Unsupported(
            f"`enable_lora` on the tied layer {self.name!r} would train or freeze weights that others share "  # type: ignore[attr-defined]
            f"(tied: {names}). Write the low-rank part as an expression: `tether.tie(layer, kernel=w + a @ b)`."
        )

    def _set_dtype_policy(self, value: object) -> None:
        """Refuses a policy that quantises: Keras would build integers around a view."""
        if keras.dtype_policies.get(value).quantization_mode is not None:
            raise Unsupported(
                f"A policy that quantises would untie the tied layer {self.name!r}. `layer.quantize('int8')` "  # type: ignore[attr-defined]
                f"keeps the tie. {received(dtype_policy=value)}"
            )
        keras.layers.Layer.dtype_policy.fset(self, value)

    # With Keras's own getter: the graph of `torch.compile` would end at a getter that asks `super()` for a property.
    dtype_policy = property(keras.layers.Layer.dtype_policy.fget, _set_dtype_policy, doc="The layer's dtype policy.")


def _make(base: type[keras.Layer], arguments: tuple[str, ...]) -> type:
    if base is Weight or issubclass(base, Tied):
        raise Unsupported(f"{base.__name__} cannot be tied.")
    namespace: dict[str, object] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tether_base": base,
        "_tether_arguments": arguments,
    }

    def get_config(self: keras.Layer) -> Config:
        with serializing(self):
            config = dict(base.get_config(self))
        state = state_of(self)
        if state is not None:
            if not all(waiting.made_by_code for waiting in state.when_built):
                raise Unsupported(
                    f"{self.name!r} is going to share weights as soon as it is built, which no config says. Build it "
                    f"first, by a call on data or `{self.name}.build(input_shape)`; or `tether.untie` it."
                )
            ties = encode_ties(self, state)
            if ties["ties"] and keras_seam.inside_bidirectional_init():
                raise Unsupported(
                    f"Bidirectional copies the layer that it is given by its config, which would untie {self.name!r}. "
                    "Tie from outside: `tether.tie(keras.layers.Bidirectional(layer), "
                    "{'forward_layer/cell/kernel': w, 'backward_layer/cell/kernel': w})`."
                )
            config[KEY] = ties
        return config

    from tether.layers.appliers import holding, loop_hooks, planned_call  # imported with the first tie

    namespace["get_config"] = keras_seam.mark_like(get_config, base.get_config)
    if hasattr(base, "get_dropout_mask"):
        namespace.update(loop_hooks(base))
    elif hasattr(base, "get_initial_state") and hasattr(base, "state_size"):
        namespace["get_initial_state"] = holding(base.get_initial_state)

    call = planned_call(base)
    if call is not None:
        call.__signature__ = inspect.signature(base.call)  # type: ignore[attr-defined]
        namespace["call"] = call
    if arguments:
        namespace.update(taking(base, arguments, call or base.call))
        if hasattr(base, "_default_save_signature"):
            namespace["_default_save_signature"] = None
    if not hasattr(base, "enable_lora"):
        namespace["enable_lora"] = _absent("enable_lora")
    if not hasattr(base, "_trackable_children"):
        namespace["_trackable_children"] = _absent("_trackable_children")
    cls = type(base.__name__, (Tied, base), namespace)
    keras_seam.register_made(cls, keras_seam.TIED_NAME)
    return cls


def own_entries(saveable: Saveable) -> dict[str, Tensor]:
    """What a Keras object writes of its own, by key; in a tied layer with views at the places of what it leaves out."""
    state = state_of(saveable) if isinstance(saveable, Tied) else None
    if state is not None:
        plain: Any = super(Tied, saveable)
        return own_values.entries(saveable, state, plain.save_own_variables)
    found: dict[str, Tensor] = {}
    saveable.save_own_variables(found)
    return found


class _absent:
    """Hides a method of `Tied` whose base has none."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")


# --------------------------------------------------------------------------- placing views
# Putting views where variables are, or would be.
#
# A tie of a variable that exists puts a view in its place. A tie of a layer that is not built waits until the layer
# asks for the variable of that name, and is then handed a view.


def become_tied(layer: keras.Layer) -> State:
    """Turns a layer into an instance of its tied class, without ties yet if it is not one; gives its state."""
    state = state_of(layer)
    if state is None:
        state = State()
        layer.__class__ = tied_class(type(layer))
        keras_seam.set_untracked(layer, STATE, state)
        keras_seam.shield_tracker(layer, View)
        if not isinstance(layer, keras.Model):
            keras_seam.take_over_quantize(layer)
    return state


# --------------------------------------------------------------------------- a variable that exists


def replace(layer: keras.Layer, variable: keras.Variable, name: str, asked: Tie) -> None:
    """Puts a view in the place of a variable, or of another view."""
    state, expression = become_tied(layer), asked.expression
    start_from_values(layer, name, expression, variable)
    if isinstance(variable, View):
        use = new_use(layer, name, expression, variable.use.regularizer)
        drop_use(variable.use)
        next(slot.tie for slot in state.slots if slot.view is variable).forget()
        view = view_like(variable, use, trainable=variable.slot_trainable)
        view.frozen = variable.frozen
    else:
        own = keras_seam.variable_lists(layer)[keras_seam.STORES[0]]
        use = new_use(layer, name, expression, variable.regularizer)
        view = view_like(variable, use, trainable=any(variable is other for other in own))
        by_itself = keras_seam.own_trainable_flag(layer) and not variable.trainable  # whatever the layer is
        view.frozen = by_itself and view.slot_trainable
        constraint = variable.constraint
        variable.regularizer = None
        for weight in expression.weights_used():
            if weight.is_built and weight.variable is variable and weight.regularizer is not None:
                variable.regularizer = weight.regularizer
        _pass_constraint(constraint, expression)
    exchange(layer, state, variable, view, asked)
    _register(layer, view)


def _register(layer: keras.Layer, view: View) -> None:
    view.follow(keras_seam.own_trainable_flag(layer))
    for weight in view.expression.weights_used():
        weight.add_use(view.use)
    placement.follow(view.path, view.expression)


def drop_use(use: Use) -> None:
    """Ends a use of its weights."""
    for weight in use.expression.weights_used():
        weight.remove_use(use)


# --------------------------------------------------------------------------- a layer that is being built


def hand_out(layer: keras.Layer, state: State, asked: Tie, **kwargs: Any) -> View:
    """The view that `add_weight` returns in the place of a new variable."""
    name = kwargs["name"]
    refuse_unsupported(layer)
    shape = tuple(int(n) for n in (kwargs.get("shape") or ()))
    dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or layer.variable_dtype)
    initializer = kwargs.get("initializer")
    wished = initializer is not None
    if not wished:
        initializer = "glorot_uniform" if keras_seam.is_float(dtype) else "zeros"
    initializer = keras.initializers.get(initializer)
    trainable = bool(kwargs.get("trainable", True))
    expression = resolved(asked.expression)
    constraint = keras.constraints.get(kwargs.get("constraint"))
    regularizer = keras.regularizers.get(kwargs.get("regularizer"))
    refuse_dropout(layer, name, expression)
    refuse_misfit(layer, name, shape, constraint, expression)
    if wished:
        warn_of_initializer(layer, name, expression, initializer)
    started = [weight for weight in expression.weights_used() if not weight.is_built]
    for weight in started:
        weight.autocasts = weight.autocasts and bool(kwargs.get("autocast", True))
    with keras_seam.name_scope(layer):
        path = f"{keras_seam.current_path()}/{name}"
    start_from_layer(expression, path, shape, dtype, initializer)
    for weight in started if not wished else ():
        weight.first_initializer = None  # nobody chose it, so no later layer is told that its own is not used
    store = keras_seam.STORES[0] if trainable else keras_seam.STORES[1]
    index = len(keras_seam.variable_lists(layer)[store]) + sum(slot.store == store for slot in state.slots)
    use = new_use(layer, name, expression, regularizer)
    view = View(
        use,
        name=name,
        path=path,
        shape=shape,
        dtype=dtype,
        autocast=bool(kwargs.get("autocast", True)),
        trainable=trainable,
    )
    _pass_constraint(constraint, expression)
    keras_seam.note_new_use()
    state.slots.append(ViewSlot(view, store, index, asked, named=True))
    _register(layer, view)
    hang_weights(layer)
    return view


def forward(layer: keras.Layer, state: State) -> None:
    """Hands waiting ties on to a sub-layer that has just been made."""
    for path, asked in list(state.pending.items()):
        if len(path) < 2:
            continue
        step = paths.find_child(layer, path)
        if step is None:
            continue
        child, canonical, rest = step
        del state.pending[path]
        if asked.path[-len(path) :] == path:
            asked.rename(asked.path[: -len(path)] + canonical + rest)
        become_tied(child)
        place = paths.locate(child, rest)
        below = become_tied(place.layer)
        if place.variable is None:
            below.pending[place.leaf] = asked
        else:
            replace(place.layer, place.variable, place.leaf_name, asked)


def settle(layer: keras.Layer) -> None:
    """At the end of `build`: ties that no `add_weight` has met must find a variable now."""
    state = state_of(layer)
    if state is None:
        return
    for name in state.clashes:
        paths.find_variable(layer, (name,))  # raises, now that both variables have their places
    if state.pending:
        with swapped(keras_seam.contained_layers(layer)):
            _settle(layer, state)


def _settle(layer: keras.Layer, state: State) -> None:
    for path, asked in list(state.pending.items()):
        found = paths.find_variable(layer, path)
        child = None if found is not None else paths.find_child(layer, path)
        if found is None and child is None:
            del state.pending[path]
            asked.forget()
            layer.built = True
            raise UnknownName(paths.nothing_there(layer, path, layer, path))
        del state.pending[path]
        if found is not None:
            variable, canonical = found
            refuse_tie(layer, "/".join(canonical), variable, asked.expression)
            if asked.recorder() is layer:
                asked.rename(canonical)
            replace(layer, variable, "/".join(canonical), asked)
        else:
            place = paths.locate(layer, path)
            below = become_tied(place.layer)
            if place.variable is None:
                below.pending[place.leaf] = asked
            else:
                refuse_tie(place.layer, place.leaf_name, place.variable, asked.expression)
                replace(place.layer, place.variable, place.leaf_name, asked)


def _pass_constraint(constraint: keras.constraints.Constraint | None, expression: Expression) -> None:
    if constraint is not None and isinstance(expression, Weight):
        expression.variable.constraint = constraint


__all__ = ["KEY", "Tied", "base_class", "own_entries", "tied_class"]

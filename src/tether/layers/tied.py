"""The class of a tied layer: a subclass of the layer's own class, made once for each.

It keeps its base's name (Keras derives file paths from it), its base's `build`, `call` and their
signatures. It hands out views when the base asks for a variable, keeps Keras's tracker and recursion
away from weights that others share, lists and saves variables in the base's order, and writes the
ties into its config under the one key `"tether"`.
"""

from __future__ import annotations

import inspect
import io
from typing import Any

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, Unsupported, received
from tether.layers import storage
from tether.layers.arguments import arguments_by_name, taking
from tether.layers.looping import holding, loop_hooks
from tether.layers.record import VERSION, encode_ties, read_record
from tether.layers.state import WEIGHTS, in_base_order, known_order, serializing, state_of, weights_below
from tether.layers.view import View
from tether.weights.identity import sharing
from tether.weights.weight import Weight

KEY = "tether"
_classes: dict[tuple[Any, ...], type] = {}


def tied_class(base: type, arguments: tuple[str, ...] = ()) -> type:
    """The tied subclass of a layer class; its `call` takes these arguments of expressions as keywords."""
    key = (base, *arguments)
    if key not in _classes:
        _classes[key] = _make(base, arguments)
    return _classes[key]


def takes_arguments(layer: Any) -> bool:
    """Whether the call of a layer takes arguments of its ties."""
    return bool(getattr(type(layer), "_tether_arguments", ()))


def take_arguments(layer: Any) -> None:
    """Lets the call of a tied layer take the arguments in the ties recorded on it, and no others.

    Raises:
        Unsupported: The layer's call has a parameter of that name already.
    """
    state = state_of(layer)
    names = () if state is None else tuple(arguments_by_name(state))
    base: Any = base_class(type(layer))
    if names != getattr(type(layer), "_tether_arguments", ()):
        taken = set(inspect.signature(base.call).parameters) & set(names)
        if taken:
            raise Unsupported(
                f"The call of {base.__name__} has a parameter {sorted(taken)[0]!r} of its own. Give the argument "
                "another name."
            )
        layer.__class__ = tied_class(base, names)
        keras_seam.refresh_call_signature(layer)


def base_class(cls: type) -> type:
    """The class that a tied class was made from; any other class is its own."""
    return cls._tether_base if issubclass(cls, Tied) else cls


class Tied:
    """What a tied layer does otherwise than its base. Mixed in front of the base by `tied_class`."""

    _tether_base: type
    _tether_arguments: tuple[str, ...] = ()

    # ------------------------------------------------------------------ variables

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Hands out a view where a tie waits for a variable of this name, and makes a variable elsewhere."""
        from tether.layers.placing import hand_out

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

    def __setattr__(self, name: str, value: Any) -> None:
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
            from tether.layers.placing import forward

            forward(self, state)

    def _lock_state(self) -> None:
        from tether.layers.placing import settle

        settle(self)
        super()._lock_state()  # type: ignore[misc]

    @property
    def weights(self) -> list[Any]:
        """The stored weight variables, each once, in the order of the untied layer."""
        state = state_of(self)
        if state is None:
            return super().weights  # type: ignore[misc]
        return known_order(self, state) or in_base_order(self, state, super().weights)  # type: ignore[misc]

    @property
    def variables(self) -> list[Any]:
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

    def _get_own_losses(self) -> list[Any]:
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
            if pair not in counted:
                counted.add(pair)
                losses.append(use.regularizer(slot.view.value))
        for penalty in state.penalties:
            if penalty.recorder() is self and penalty.counts:
                losses.append(penalty.value())
        return losses

    # ------------------------------------------------------------------ files

    def save_own_variables(self, store: Any) -> None:
        """Writes as the base does, without what is stored in weights."""
        state = state_of(self)
        if state is None:
            super().save_own_variables(store)  # type: ignore[misc]
        else:
            storage.save(self, state, store, super().save_own_variables)  # type: ignore[misc]

    def load_own_variables(self, store: Any) -> None:
        """Reads what this layer wrote, or what it wrote before it was tied."""
        state = state_of(self)
        if state is None:
            super().load_own_variables(store)  # type: ignore[misc]
        else:
            storage.load(self, state, store, super().save_own_variables, super().load_own_variables)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """A tied layer from its config, with weights of its own or those of the sharing scope."""
        return revive(cls._tether_base, config)

    def __reduce__(self) -> Any:
        buffer = io.BytesIO()
        keras_seam.save_to(self, buffer)
        return (_unpickle, (buffer.getvalue(), {weight.uid: weight for weight in weights_below(self)}))

    def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
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
        state = state_of(self)
        names = ", ".join(slot.view.name for slot in state.slots) if state is not None else ""
        raise Unsupported(
            f"`enable_lora` on the tied layer {self.name!r} would train or freeze weights that others share "  # type: ignore[attr-defined]
            f"(tied: {names}). Write the low-rank part as an expression: `tether.tie(layer, kernel=w + a @ b)`."
        )

    @property
    def dtype_policy(self) -> Any:
        """The layer's dtype policy. One that quantises is refused: Keras would build integers around a view."""
        return super().dtype_policy  # type: ignore[misc]

    @dtype_policy.setter
    def dtype_policy(self, value: Any) -> None:
        if keras.dtype_policies.get(value).quantization_mode is not None:
            raise Unsupported(
                f"A policy that quantises would untie the tied layer {self.name!r}. `layer.quantize('int8')` "  # type: ignore[attr-defined]
                f"keeps the tie. {received(dtype_policy=value)}"
            )
        keras.layers.Layer.dtype_policy.fset(self, value)


def _make(base: Any, arguments: tuple[str, ...]) -> type:
    if base is Weight or issubclass(base, Tied):
        raise Unsupported(f"{base.__name__} cannot be tied.")
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tether_base": base,
        "_tether_arguments": arguments,
    }

    def get_config(self: Any) -> dict[str, Any]:
        with serializing(self):
            config = dict(base.get_config(self))
        state = state_of(self)
        if state is not None:
            ties = encode_ties(self, state)
            if ties["ties"] and keras_seam.inside_bidirectional_init():
                raise Unsupported(
                    f"Bidirectional copies the layer that it is given by its config, which would untie {self.name!r}. "
                    "Tie from outside: `tether.tie(keras.layers.Bidirectional(layer), "
                    "{'forward_layer/cell/kernel': w, 'backward_layer/cell/kernel': w})`."
                )
            config[KEY] = ties
        return config

    namespace["get_config"] = keras_seam.mark_like(get_config, base.get_config)
    if hasattr(base, "get_dropout_mask"):
        namespace.update(loop_hooks(base))
    elif hasattr(base, "get_initial_state") and hasattr(base, "state_size"):
        namespace["get_initial_state"] = holding(base.get_initial_state)
    from tether.layers.appliers import planned_call  # imported with the first tie

    call = planned_call(base)
    if call is not None:
        call.__signature__ = inspect.signature(base.call)  # type: ignore[attr-defined]
        namespace["call"] = call
    if arguments:
        namespace.update(taking(base, arguments, call or base.call))
    if not hasattr(base, "enable_lora"):
        namespace["enable_lora"] = _absent("enable_lora")
    if not hasattr(base, "_trackable_children"):
        namespace["_trackable_children"] = _absent("_trackable_children")
    cls = type(base.__name__, (Tied, base), namespace)
    keras_seam.register_tied(cls)
    return cls


def own_entries(saveable: Any) -> dict[str, Any]:
    """What a Keras object writes of its own, by key; in a tied layer with views at the places of what it leaves out."""
    state = state_of(saveable) if isinstance(saveable, Tied) else None
    if state is not None:
        return storage.entries(saveable, state, super(Tied, saveable).save_own_variables)
    found: dict[str, Any] = {}
    saveable.save_own_variables(found)
    return found


class _absent:
    """Hides a method of `Tied` whose base has none."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")


# --------------------------------------------------------------------------- coming back from a file


def revive(base: type, config: dict[str, Any]) -> Any:
    """A layer of the base class from a config, with the ties that the config records."""
    from tether.layers.tie import restore

    config = dict(config)
    record = config.pop(KEY, None)
    layer = base.from_config(config)  # type: ignore[attr-defined]
    if record is not None:
        read = read_record(record)
        restore(layer, read.ties, read.takes, read.penalties)
    return layer


class TiedReader:
    """What a file's name for a tied layer stands for: finds the base that the config names.

    It is the tied subclass of whichever class the config names. Who asks whether it is a subclass of a
    layer class, as KerasHub does before it reads a preset, is told that it is.
    """

    __name__ = __qualname__ = "Tied"

    @property
    def __bases__(self) -> tuple[type, ...]:
        return tuple(_subclasses(keras.layers.Layer))

    def from_config(self, config: dict[str, Any]) -> Any:
        """The tied layer of a config that a stranger may have written.

        Raises:
            InvalidConfig: It names no layer class, or ties that cannot be read.
        """
        record = config.get(KEY)
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise InvalidConfig(
                f"A tied layer's config has the key {KEY!r} of version {VERSION}. {received(tether=record)}"
            )
        reference = record.get("base")
        if not isinstance(reference, dict) or set(reference) != {"module", "class_name", "registered_name"}:
            raise InvalidConfig(f"A tied layer's config names its class. {received(base=reference)}")
        if not all(isinstance(part, (str, type(None))) for part in reference.values()):
            raise InvalidConfig(f"A class is named by strings. {received(base=reference)}")
        try:
            base = keras_seam.find_class(reference)
        except Exception as error:
            raise InvalidConfig(f"The class of a tied layer cannot be found: {error}") from error
        if not isinstance(base, type) or not issubclass(base, keras.layers.Layer) or issubclass(base, (Tied, Weight)):
            raise InvalidConfig(f"A tied layer's class is a Keras layer. {received(base=reference)}")
        return revive(base, config)


def _subclasses(cls: type) -> dict[type, None]:
    found: dict[type, None] = {cls: None}
    waiting: list[type] = [cls]
    while waiting:
        below: list[type] = type.__subclasses__(waiting.pop())
        children = [child for child in below if child not in found]
        found.update(dict.fromkeys(children))
        waiting.extend(children)
    return found


keras_seam.register_reader(TiedReader())


def _unpickle(data: bytes, weights: dict[str, Weight]) -> Any:
    with sharing(dict(weights)):
        return keras_seam.load_from(io.BytesIO(data), compile=True)


__all__ = ["KEY", "Tied", "TiedReader", "base_class", "own_entries", "revive", "tied_class"]

"""What a tied layer holds: views in the place of variables, its ties, and the arguments that its call takes."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.types import Array, Function, Tensor
from tether.weights import placement
from tether.weights.evaluation import cast_to_scope, evaluate
from tether.weights.expression import Expression, Stored, leaves
from tether.weights.leaves import Argument, bind
from tether.weights.placement import Spec
from tether.weights.storage import Use
from tether.weights.weight import Weight

if TYPE_CHECKING:
    from tether.layers.tying.penalty import Penalty

# --------------------------------------------------------------------------- views
# What a tied layer holds in the place of a variable: no storage, an expression read at every access.


_OF_EXPRESSIONS = {"T", "mT", "transpose", "swapaxes", "reshape", "astype", "sum", "mean", "stop_gradient"}
"""What people look for at a view, since the expression in it has it."""
views: weakref.WeakValueDictionary[int, View] = weakref.WeakValueDictionary()
"""By number: what `torch.compile` runs itself gets plain values only."""
_numbers = itertools.count()


class _Instead(keras_seam.ThreadScope):
    """Numbers that views have for a moment in the place of their values, by the views' numbers."""

    numbers: dict[int, float] | None = None


_instead = _Instead()


def standing_in(numbers: Iterable[tuple[View, float]]) -> contextlib.AbstractContextManager[None]:
    """Lets views have one number everywhere inside the block: a layer's own call then computes without them."""
    return _instead.set(numbers={view.number: number for view, number in numbers})


class View(keras_seam.Variable):
    """A variable of a tied layer: its value is an expression over stored weights.

    It is never tracked: what is stored, counted, trained and saved are the expression's weights.
    Its value has the dtype that the layer asked for, then autocasts as a variable of the layer would.
    """

    def __init__(
        self,
        use: Use,
        *,
        name: str,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        autocast: bool,
        trainable: bool,
    ) -> None:
        keras_seam.prepare_view(self, name=name, path=path, shape=shape, dtype=dtype, autocast=autocast)
        self.use = use
        self.slot_trainable = trainable
        self.frozen = False
        self.planner: object = None
        self.number = next(_numbers)
        views[self.number] = self

    @property
    def expression(self) -> Expression:
        """The expression that the view evaluates."""
        return self.use.expression

    @property
    def value(self) -> Tensor:
        """The tensor, under the caller's stateless and autocast scopes."""
        if _instead.numbers is not None and self.number in _instead.numbers:
            return cast_to_scope(keras.ops.full(self.shape, _instead.numbers[self.number], self.dtype))
        scope = keras_seam.get_autocast_scope()
        if scope is not None and scope.dtype is not None and not keras_seam.autocasts(self):
            with keras_seam.AutocastScope(None):
                value = self._read()
        else:
            value = self._read()
        return value

    def _read(self) -> Tensor:
        use = self.use
        value = self.read(use.expression)
        dtype = self.dtype
        if keras_seam.tensor_dtype(value) != dtype:
            value = keras.ops.cast(value, dtype)
        if not use.live and keras_seam.is_float(dtype):
            value = keras.ops.stop_gradient(value)
        return value

    def read(self, part: Expression, how: Callable[[Expression], Tensor] = evaluate) -> Tensor:
        """What a function makes of the expression, or of a part of it, for this use: by default the tensor.

        Whatever a layer computes from its expression goes through here, so that somebody who watches can tell the
        uses of a weight apart.
        """
        return how(part)

    def assign(self, value: Tensor) -> Tensor:
        """Stores a value through the expression.

        Raises:
            NotInvertible: The expression has no inverse.
        """
        into = getattr(value, "into_view", None)
        if into is not None:
            into(self)
        else:
            self.expression.assign(value)
        return value

    def assign_add(self, value: Tensor) -> Tensor:
        """Adds to what is stored, through the expression."""
        return self.assign(keras.ops.add(self.value, value))

    def assign_sub(self, value: Tensor) -> Tensor:
        """Subtracts from what is stored, through the expression."""
        return self.assign(keras.ops.subtract(self.value, value))

    def numpy(self) -> Array:
        """The present value as a NumPy array."""
        with keras_seam.whole_values():
            return keras_seam.to_numpy(self.value, self.path)

    @property
    def trainable(self) -> bool:
        """Whether a gradient flows through this use."""
        keras_seam.refuse_spectral_normalization(self)
        return self.use.live

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.frozen = not value
        layer = self.use.layer()
        self.follow(True if layer is None else keras_seam.own_trainable_flag(layer))

    @property
    def regularizer(self) -> keras.Regularizer | None:
        """What adds a penalty on this use's value to the losses of its layer."""
        return self.use.regularizer

    @regularizer.setter
    def regularizer(self, value: object) -> None:
        if value is not None and not callable(value):
            raise TetherError(f"A regularizer is a function of a tensor, or None. {received(regularizer=value)}")
        self.use.regularizer = value

    @property
    def constraint(self) -> keras.constraints.Constraint | None:
        """What the stored weight is held to after each step; only of a use that is the weight itself."""
        weight = self.expression
        return weight.present_constraint if isinstance(weight, Weight) else None

    @constraint.setter
    def constraint(self, value: object) -> None:
        if value is not None and not callable(value):
            raise TetherError(f"A constraint is a function of a tensor, or None. {received(constraint=value)}")
        weight = self.expression
        if isinstance(weight, Weight):
            weight.present_constraint = value
        elif value is not None:
            raise Unsupported(
                f"A constraint acts on what is stored, and {self.path} is {weight.notation()}. Constrain the weight, "
                "`tether.Weight(constraint=...)`, or write the constraint into the expression."
            )

    def follow(self, layer_trainable: bool) -> None:
        """Takes over the layer's flag: a use is live if layer, attribute and user all let it train."""
        live = layer_trainable and self.slot_trainable and not self.frozen
        if live != self.use.live:
            keras_seam.before_freezing()
            self.use.live = live
            for weight in self.expression.weights_used():
                weight.refresh(self.use)

    if not TYPE_CHECKING:  # or every name would pass a type checker

        def __getattr__(self, name: str) -> object:
            """Says how to write what only an expression has."""
            if name in _OF_EXPRESSIONS:
                raise AttributeError(
                    f"{self.path} is what a layer reads, and has no {name!r}. For an expression, to be tied elsewhere, "
                    f"write `tether.weight_of(layer, {self.name!r}).{name}`; for a tensor, `layer.{self.name}.value`."
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<View {self.path} = {self.expression.notation()}, shape={tuple(self.shape)}, dtype={self.dtype}>"

    def __reduce__(self) -> NoReturn:
        raise TetherError(
            f"The view {self.path} cannot be copied by itself: copy or pickle the layer, or take its value."
        )


def view_like(variable: keras.Variable, use: Use, *, trainable: bool) -> View:
    """A view with the name, path, shape and dtype of a variable, or of another view."""
    return View(
        use,
        name=variable.name,
        path=variable.path,
        shape=shape_of(variable),
        dtype=keras_seam.stored_dtype(variable),
        autocast=keras_seam.autocasts(variable),
        trainable=trainable,
    )


def shape_of(variable: keras.Variable) -> tuple[int, ...]:
    """The shape of a variable or view, in plain numbers."""
    return tuple(int(n) for n in variable.shape)


def numpy_of(variable: keras.Variable) -> Array:
    """A copy of the value of a variable or view, for what all processes do if it lies on several."""
    with keras_seam.whole_values():
        return np.array(keras_seam.to_numpy(variable.value, variable.path, in_step=True))


def layout_of(variable: keras.Variable) -> Spec | None:
    """How a variable lies on the devices, or the value of a view; `None` without a distribution."""
    if isinstance(variable, View):
        return placement.layout_of_value(variable.path, variable.expression)
    return keras_seam.layout_of(variable)


def users(weight: Weight) -> list[Any]:
    """The layers with a use of a weight, each once."""
    return list({id(layer): layer for use in weight.uses if (layer := use.layer()) is not None}.values())


def stored_variables(variable: keras.Variable) -> list[keras.Variable]:
    """The stored variables behind a variable: itself, or those of a view's weights."""
    if isinstance(variable, View):
        return [weight.variable for weight in variable.expression.weights_used() if weight.is_built]
    return [variable]


# --------------------------------------------------------------------------- what a layer remembers
# What a tied layer remembers about its ties.


from_above: dict[str, Function] = {}
"""What a module asks of one that stands above it, which puts it here when it is imported: `revive` and `unpickle` of a
tied layer, `refuse_to_lose` a tie before a file is written, and the `facts` of a model for its card."""

STATE = "_tether"
WEIGHTS = "_tether_weights"


@dataclass(eq=False)
class Tie:
    """One tie as it was asked for: where it is recorded, and by which path from there."""

    recorder: weakref.ref[keras.Layer]
    path: tuple[str, ...]
    expression: Expression
    made_by_code: bool = False
    """Made inside the constructor or `build` of a Keras object, which makes it again when it is made again."""
    quantized: bool = False
    """Quantised since, of which that constructor knows nothing."""

    def record(self, recorder: keras.Layer, path: tuple[str, ...]) -> None:
        """Records the tie on a tied layer, in the place of another one of the same path."""
        self.recorder, self.path = weakref.ref(recorder), path
        recorded = vars(recorder)[STATE].recorded
        recorded.pop(path, None)
        recorded[path] = self

    def rename(self, path: tuple[str, ...]) -> None:
        """Records the tie under another path from the layer that records it, if one does."""
        if self.is_recorded:
            self.forget()
            self.record(self.recorder(), path)

    def forget(self) -> None:
        """Removes the tie from the layer that records it."""
        if self.is_recorded:
            del vars(self.recorder())[STATE].recorded[self.path]

    @property
    def is_recorded(self) -> bool:
        """Whether a layer records the tie: it was not untied since, nor replaced by another one."""
        recorder = self.recorder()
        state = None if recorder is None else vars(recorder).get(STATE)
        return state is not None and state.recorded.get(self.path) is self


@dataclass(eq=False)
class ViewSlot:
    """A view, and the position that its variable has or would have in the layer's lists."""

    view: View
    store: str
    index: int
    tie: Tie
    named: bool = False
    """Whether `add_weight` handed the view out by name."""


@dataclass(eq=False)
class WhenBuilt:
    """What is to be done with a layer as soon as it is built: until then, nobody knows its weights."""

    act: Callable[[keras.Layer], None]
    made_by_code: bool
    """Asked for inside the constructor of a Keras object, which asks for it again when it is made again."""


@dataclass(eq=False)
class State:
    """The ties of one layer: those that wait for a variable, and those that have one."""

    pending: dict[tuple[str, ...], Tie] = field(default_factory=dict)
    slots: list[ViewSlot] = field(default_factory=list)
    recorded: dict[tuple[str, ...], Tie] = field(default_factory=dict)
    """The ties recorded on this layer, for it and for layers below it, by their paths from here."""
    lent: list[tuple[Tie, tuple[str, ...]]] = field(default_factory=list)
    """Ties recorded on a graph around this layer, by their paths from here: for a clone of the graph."""
    takes: list[Argument] = field(default_factory=list)
    """Arguments of ties that were asked for here and are recorded on layers below: this layer's call takes them."""
    penalties: list[Penalty] = field(default_factory=list)
    """Penalties recorded here, and those of a graph around this layer: for a clone of the graph."""
    when_built: list[WhenBuilt] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)
    """Names that the layer gave to a second variable after a view had been handed out for the first."""
    held: list[Any] = field(default_factory=list)
    orders: dict[tuple[int, ...], list[keras.Variable]] = field(default_factory=dict)
    """Variables in the base's order, by the ids of what Keras listed: asked for at every step."""
    order: tuple[tuple[int, int, int], list[keras.Variable]] | None = None
    """The same for a layer without other sub-layers than its weights, by what it has."""


def state_of(layer: keras.Layer) -> State | None:
    """The state of a tied layer, or `None` of any other."""
    found = vars(layer).get(STATE)
    return found if isinstance(found, State) else None


def slots_of(layer: keras.Layer) -> list[ViewSlot]:
    """The places of the views that a layer has; none, if it is not tied."""
    state = state_of(layer)
    return [] if state is None else state.slots


def ordered_variables(layer: keras.Layer, state: State) -> dict[str, list[keras.Variable]]:
    """The layer's own variables by store, in the base's order, with views at their places."""
    lists = {store: list(variables) for store, variables in keras_seam.variable_lists(layer).items()}
    for slot in sorted(state.slots, key=lambda slot: slot.index):
        lists[slot.store].insert(min(slot.index, len(lists[slot.store])), slot.view)
    return lists


def in_base_order(layer: keras.Layer, state: State, found: list[keras.Variable]) -> list[keras.Variable]:
    """Variables that Keras listed, those of the layer itself first and in the order that its base has."""
    if not state.slots:
        return found
    key = tuple(map(id, found))
    if key not in state.orders:
        lists = ordered_variables(layer, state)
        known = set(key)
        ordered: dict[int, keras.Variable] = {}
        for store in keras_seam.STORES:
            for variable in lists[store]:
                for stored in stored_variables(variable):
                    if id(stored) in known:
                        ordered.setdefault(id(stored), stored)
        for variable in found:
            ordered.setdefault(id(variable), variable)
        state.orders = {key: list(ordered.values()), **dict(list(state.orders.items())[:1])}
    return list(state.orders[key])


def known_order(layer: keras.Layer, state: State) -> list[keras.Variable] | None:
    """All variables in the base's order, as they were last found, if they are sure to be the same.

    That is so as long as the layer has no sub-layers but the weights of its views, and no more variables.
    """
    counts = keras_seam.counts(layer)
    if state.order is not None and state.order[0] == counts:
        return state.order[1].copy()
    hung = vars(layer).get(WEIGHTS) or ()
    if not state.slots or counts[-1] != len(hung) or not all(weight.is_built for weight in hung):
        return None
    found = [variable for variables in keras_seam.variable_lists(layer).values() for variable in variables]
    found += [weight.variable for weight in hung]
    ordered = in_base_order(layer, state, list({id(variable): variable for variable in found}.values()))
    state.order = (counts, ordered)
    return ordered.copy()


def hang_weights(layer: keras.Layer) -> None:
    """Makes exactly the weights that the layer's views use its sub-layers."""
    state = state_of(layer)
    wanted: list[Stored] = []
    if state is not None:
        state.orders, state.order = {}, None
        for slot in sorted(state.slots, key=lambda slot: (keras_seam.STORES.index(slot.store), slot.index)):
            wanted.extend(weight for weight in slot.view.expression.weights_used() if weight not in wanted)
        for penalty in state.penalties:
            if penalty.recorder() is layer:
                wanted.extend(weight for weight in penalty.owned if weight not in wanted)
    present = list(vars(layer).get(WEIGHTS) or [])
    with keras_seam.unlocked(layer):
        for weight in present:
            if weight not in wanted and not _held_elsewhere(layer, weight):
                keras_seam.untrack_layer(layer, weight)
        if wanted:
            setattr(layer, WEIGHTS, wanted)
        elif WEIGHTS in vars(layer):
            object.__delattr__(layer, WEIGHTS)
            keras_seam.forget_attribute(layer, WEIGHTS)


def _held_elsewhere(layer: keras.Layer, weight: Weight) -> bool:
    """Whether an attribute of the user's own holds the weight too."""
    return any(value is weight for name, value in vars(layer).items() if name != WEIGHTS)


def weights_below(layer: keras.Layer) -> list[Stored]:
    """The weights in a layer and the layers below it, those of ties that still wait included."""
    found: dict[int, Stored] = {}
    for below in keras_seam.contained_layers(layer):
        state = state_of(below)
        waiting = [] if state is None else [*state.pending.values(), *state.recorded.values()]
        for weight in (w for tie in waiting for w in tie.expression.weights_used()):
            found.setdefault(id(weight), weight)
        for weight in (w for penalty in (state.penalties if state is not None else ()) for w in penalty.weights):
            found.setdefault(id(weight), weight)
        if isinstance(below, Weight):
            found.setdefault(id(below), below)
    return list(found.values())


_serializing = threading.local()


class serializing:
    """Marks an object whose config is being made, so that layers in it leave its ties to it."""

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        self.before: tuple[int, ...] = getattr(_serializing, "owners", ())
        _serializing.owners = (*self.before, id(self.layer))

    def __exit__(self, *_: object) -> None:
        _serializing.owners = self.before


def is_serializing(layer: keras.Layer) -> bool:
    """Whether the object's config is being made, on this thread."""
    return id(layer) in getattr(_serializing, "owners", ())


def new_use(layer: keras.Layer, name: str, expression: Expression, regularizer: keras.Regularizer | None) -> Use:
    """A use of an expression by a layer, not registered yet."""
    return Use(name=name, expression=expression, layer=weakref.ref(layer), regularizer=regularizer)


# --------------------------------------------------------------------------- arguments
# The arguments of expressions, as keywords of a tied layer's call.


def arguments_by_name(state: State) -> dict[str, list[Argument]]:
    """The arguments in the ties recorded on a layer, in those asked for there, and in the layer's own weights.

    A tie of the layer's own weight may be recorded on a model around it, and the layer be called by itself.
    """
    found: dict[str, list[Argument]] = {}
    expressions = [tie.expression for tie in state.recorded.values()] + [slot.view.expression for slot in state.slots]
    for leaf in [*(leaf for expression in expressions for leaf in arguments_in(expression)), *state.takes]:
        if leaf not in found.setdefault(leaf.name, []):
            found[leaf.name].append(leaf)
    return found


def arguments_in(expression: Expression) -> list[Argument]:
    """The arguments of an expression, each once."""
    return [leaf for leaf in leaves(expression) if isinstance(leaf, Argument)]


def taking(base: type[keras.Layer], names: tuple[str, ...], own_call: Function) -> dict[str, Function]:
    """A `call` with the base's parameters and the arguments of expressions as keywords, around `own_call`."""

    def call(self: keras.Layer, *args: Any, **kwargs: Any) -> Tensor:
        given = {name: kwargs.pop(name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        state = state_of(self) if given else None
        if state is None:
            return own_call(self, *args, **kwargs)
        known = arguments_by_name(state)
        with bind({argument: value for name, value in given.items() for argument in known.get(name, ())}):
            return own_call(self, *args, **kwargs)

    def compute_output_spec(self: keras.Layer, *args: Any, **kwargs: Any) -> Tensor:
        return base.compute_output_spec(self, *args, **{k: v for k, v in kwargs.items() if k not in names})

    signature = inspect.signature(base.call)
    parameters = list(signature.parameters.values())
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    end = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    call.__signature__ = signature.replace(parameters=parameters[:end] + extra + parameters[end:])  # type: ignore[attr-defined]
    call.__doc__ = base.call.__doc__
    return {"call": call, "compute_output_spec": compute_output_spec}

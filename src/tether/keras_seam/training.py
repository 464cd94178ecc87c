"""Models that are trained, while what they compute with or what trains in them changes.

Keras traces a model's step once, and its optimizer keeps slots for the variables that trained when it was built. A
change to a layer reaches neither, and no layer knows the models around it. So the *change* finds the models. Those that
hold ties are known since their `compile`; others are looked for in memory, but only if some layer in the process has
not been seen before. From a change until the model is used again a *gate* stands before the methods that make its
traced functions, which `fit`, `train_on_batch`, `evaluate` and `predict` call first on every backend. It forgets what
was traced, and lets training pass if the optimizer knows what trains. Nothing is asked at every step.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras

from tether.errors import TetherError, listed
from tether.keras_seam import census
from tether.keras_seam.frames import (
    _first_local,
    _frames,
    _is_tracing,
    code_of,
    maker,
    methods,
    nested,
    saving_scope,
)
from tether.keras_seam.layers import contained_layers, inner_optimizer, optimized_variables, set_untracked
from tether.keras_seam.optimizers import SlotSource, forget_entries_of, move_slots
from tether.keras_seam.sharding import refuse_outside, refuse_sharded
from tether.types import Function, Tensor

answers: dict[str, Function] = {}
"""What those who know ties say of a model: `"is_tied"`, whether it holds any; `"live"`, which of its uses let a
gradient through; `"differences"`, the names of the weights of which that has changed since; `"still"`, the variables
that train elsewhere, and that the model holds in frozen uses only."""

_TRACES = ("train_function", "test_function", "predict_function")
_MAKERS = ("make_train_function", "make_test_function", "make_predict_function")
_RUNNERS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")
_GUARDED = (*_MAKERS, "get_compile_config")
_GATE = "_tether_gate"


_RUNNING = {id(code): code for code in map(code_of, methods(keras.Model, *_RUNNERS))}
_COMPILE = code_of(keras.Model.compile)
_IN_COMPILE = {id(code): code for code in (_COMPILE, *nested(keras.Model.compile))}


# --------------------------------------------------------------------------- which models there are


_models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
"""The models that have been seen."""
_tied: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
"""Those of them that hold ties."""
_OF_TRACES = nested(*methods(keras.Model, "_make_function", *_MAKERS))
"""The functions that are made for each model when it is traced."""


def _notice(model: keras.Model) -> None:
    _models.add(model)
    if vars(model).get("compiled") and answers["is_tied"](model):
        hand_over_what_trains(model)


census.told_of_models.append(_notice)


def notice_compiling() -> None:
    """Called where a layer of Tether's is asked whether it trains, as `compile` asks every layer of a model."""
    if _is_tracing():
        return
    frame = sys._getframe(2)
    if id(frame.f_code) in _IN_COMPILE:
        outer = frame if frame.f_code is _COMPILE else frame.f_back  # before Python 3.12 a comprehension has a frame
        if outer is not None and outer.f_code is _COMPILE:
            model = _first_local(outer)
            _models.add(model)
            gate = vars(model).get(_GATE)
            if gate is not None:
                gate.live = None
            hand_over_what_trains(model)


# --------------------------------------------------------------------------- what changes


_changes = 0


def note_new_use() -> None:
    """Called when a layer that is being built begins to use weights."""
    global _changes
    _changes += 1
    if census.has_new_optimizers():  # a model may have been compiled before it was given the layer
        census.find_new()


def before_freezing() -> None:
    """Called before a use, or a weight, starts or stops to train."""
    global _changes
    _changes += 1
    for model in list(_tied):
        if vars(model).get("train_function") is not None or _is_built(vars(model).get("optimizer")):
            _gate_of(model).remember(model)


def before_change(
    layers: Iterable[keras.Layer],
    *,
    makes_variables: bool = True,
    resized: Iterable[keras.Layer] = (),
    adjusted: object = None,
) -> None:
    """Called before layers that are built get other variables, or other expressions to compute with.

    Args:
        layers: Those layers, or whatever else of Keras's the models contain.
        makes_variables: Whether variables are made for the layers.
        resized: Variables that will have other shapes.
        adjusted: The model whose optimizer will get slots of the new shapes.

    Raises:
        TetherError: A model that contains one of them is at work: this runs in one of its callbacks.
        Unsupported: A variable of one of them is sharded with FSDP2; or of a strategy of TensorFlow's, and new ones are
            made outside of its scope.
    """
    global _changes
    _changes += 1
    layers = list(layers)
    refuse_sharded(variable for layer in layers for variable in layer.variables)
    if makes_variables:
        refuse_outside(layers)
    changed, resized = {id(layer): layer for layer in layers}, list(resized)
    if not changed or not (census.has_optimizers() or census.alive(_OF_TRACES)):
        return
    census.see(*changed.values())
    census.find_new()
    concerned = [model for model in list(_models) if _is_concerned(model, changed, again=bool(resized))]
    if concerned:
        _refuse_at_work(concerned)
    for model in concerned:
        _tied.add(model)
        gate = _gate_of(model)
        gate.remember(model, model.trainable_variables)
        gate.is_stale = True
        if model is not adjusted:
            gate.resized += map(weakref.ref, resized)


def keep_slots(origins: Mapping[int, SlotSource], gone: Iterable[keras.Variable] = ()) -> None:
    """Called after a change: the optimizers of compiled models go on with what they keep for the weights, if they can.

    An optimizer that cannot is left as it is, and its model asks to be compiled again.

    Args:
        origins: For variables that took the place of others, by their ids: of which.
        gone: Variables that are stored no more, or in fewer models.
    """
    left = {id(variable) for variable in gone} | {id(one) for origin in origins.values() for one in origin.variables}
    for model in list(_models) if left else ():
        optimizer = vars(model).get("optimizer")
        if not vars(model).get("compiled") or not _is_built(optimizer):
            continue
        known, now = {id(variable) for variable in optimized_variables(optimizer)}, model.trainable_variables
        if known.isdisjoint(left) or not known - {id(variable) for variable in now} <= left:
            continue
        if move_slots(optimizer, now, origins):
            gate = vars(model).get(_GATE)
            if gate is not None and gate.trained is not None:
                gate.trained = [weakref.ref(variable) for variable in now]


def forget_entries(entries: Sequence[tuple[keras.Variable, int]]) -> None:
    """Called after entries of variables were replaced: the optimizers of compiled models start anew for these.

    Args:
        entries: Variables, and the places of entries along their first axes.
    """
    for model in list(_models):
        optimizer = vars(model).get("optimizer")
        if vars(model).get("compiled") and _is_built(optimizer):
            forget_entries_of(optimizer, entries)


def _is_concerned(model: keras.Model, changed: Mapping[int, object], *, again: bool) -> bool:
    """Whether a model has been compiled or traced, contains one of what is changed, and is not known to."""
    attributes = vars(model)
    gate = attributes.get(_GATE)
    if gate is not None and gate.is_stale and not again:
        return False
    if not attributes.get("compiled") and all(attributes.get(trace) is None for trace in _TRACES):
        return False
    return not changed.keys().isdisjoint(map(id, contained_layers(model)))


def _refuse_at_work(models: list[keras.Model]) -> None:
    for frame in _frames():
        if id(frame.f_code) in _RUNNING:
            at_work = _first_local(frame)
            if any(model is at_work for model in models) and maker(None) is None:
                raise TetherError(
                    f"The model {at_work.name!r} is at work on its data, with what was to be changed now. Change it "
                    f"before or after `{frame.f_code.co_name}`, and not in a callback. Nothing was changed."
                )


def refuse_in_fit(layers: Iterable[keras.Layer], instead: str) -> None:
    """Refuses to change what trains of layers while a model that contains one of them is in `fit`.

    Its optimizer and its compiled step were made for what trains: one backend would raise, another go on with the old
    weights, a third step the new ones with the state of the old.

    Args:
        layers: Those layers, or weights.
        instead: What to do instead, for the error.

    Raises:
        TetherError: This runs in a callback of such a model.
    """
    changed = set(map(id, layers))
    for frame in _frames() if changed else ():
        if id(frame.f_code) in _RUNNING and frame.f_code.co_name == "fit":
            at_work = _first_local(frame)
            if isinstance(at_work, keras.Model) and not changed.isdisjoint(map(id, contained_layers(at_work))):
                raise TetherError(
                    f"The model {at_work.name!r} is in `fit`, with an optimizer and a step that were made for what "
                    f"trains now, so that cannot change in a callback. {instead} Nothing was changed."
                )


def _is_built(optimizer: keras.Optimizer) -> bool:
    return bool(getattr(inner_optimizer(optimizer), "built", False))


def _gate_of(model: keras.Model) -> _Gate:
    gate = vars(model).get(_GATE)
    return _Gate(model) if gate is None else gate


class _Gate:
    """What has to be seen to before a model is used again, since something in it has changed."""

    def __init__(self, model: keras.Model) -> None:
        self.is_stale = False
        """Whether what was traced may compute something else than the model does now."""
        self.resized: list[weakref.ref[keras.Variable]] = []
        self.optimizer: weakref.ref[keras.Optimizer] | None = None
        self.trained: list[weakref.ref[keras.Variable]] | None = None
        self.live: object = None
        set_untracked(model, _GATE, self)
        for name in _GUARDED:
            set_untracked(model, name, _Guarded(model, name))

    def remember(self, model: keras.Model, trained: list[keras.Variable] | None = None) -> None:
        """Notes how things are before the first change, given what trains if that is not in the middle of changing."""
        optimizer = vars(model).get("optimizer")
        if _is_built(optimizer) and (self.optimizer is None or self.optimizer() is not optimizer):
            self.optimizer, self.trained = weakref.ref(optimizer), None
        if self.optimizer is not None and self.trained is None and trained is not None:
            self.trained = [weakref.ref(variable) for variable in trained]
        if self.live is None and vars(model).get("train_function") is not None:
            self.live = answers["live"](model)

    def forget_traces(self, model: keras.Model) -> None:
        """Has everything traced again, if it may be another thing than it was."""
        if self.is_stale:
            self.is_stale = False
            for trace in _TRACES:
                setattr(model, trace, None)
            if vars(model).get("compiled"):
                hand_over_what_trains(model)

    def let_train(self, model: keras.Model) -> None:
        """Takes the gate away, or refuses to.

        Raises:
            TetherError: The optimizer was built for other variables than those that train now.
        """
        if not self.fits(model):
            known = set(map(id, optimized_variables(model.optimizer)))
            new = [variable.path for variable in model.trainable_variables if id(variable) not in known]
            unknown = f", such as {listed(map(repr, new))}" if new else ""
            raise TetherError(
                f"The model {model.name!r} was changed after it was trained (a tie, an adapter, a freeze or the like): "
                f"other weights train now than its optimizer was made for{unknown}. "
                "Compile the model again before `fit`, with a new optimizer: `model.compile(...)`."
            )
        differences = [] if self.live is None else answers["differences"](model, self.live)
        for name in (_GATE, *_GUARDED):
            vars(model).pop(name, None)
        if differences:
            model.train_function = None
            warnings.warn(
                f"What trains of the weight {listed(map(repr, differences))} has changed since the model "
                f"{model.name!r} was compiled (a layer that uses it, or the weight itself, was frozen or unfrozen). It "
                "takes effect now, with what the optimizer has kept so far. Compile the model again after a "
                "change, and it starts anew.",
                stacklevel=5,
            )

    def fits(self, model: keras.Model) -> bool:
        """Whether the optimizer may go on, or begin, with what trains now."""
        optimizer, now = vars(model).get("optimizer"), model.trainable_variables
        known = optimized_variables(optimizer) if _is_built(optimizer) else now
        is_the_same = self.optimizer is not None and self.optimizer() is optimizer
        if is_the_same and any(_is_among(reference(), known) for reference in self.resized):
            return False
        if type(model).train_step is keras.Model.train_step:
            return _are_the_same(known, now)
        # A step of the user's own may give the optimizer what it likes, as long as that goes on as before.
        return not is_the_same or self.trained is None or _are_the_same([one() for one in self.trained], now)


def _is_among(variable: keras.Variable, variables: list[keras.Variable]) -> bool:
    return any(variable is one for one in variables)


def _are_the_same(variables: list[keras.Variable], others: list[keras.Variable]) -> bool:
    """Whether two lists have the same variables in the same order: JAX goes by the order."""
    return len(variables) == len(others) and all(a is b for a, b in zip(variables, others, strict=True))


class _Guarded:
    """Stands in the place of a method of a model."""

    def __init__(self, model: keras.Model, name: str) -> None:
        self.model, self.name = weakref.ref(model), name

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        model: keras.Model = self.model()
        gate = vars(model)[_GATE]
        if self.name in _MAKERS:
            gate.forget_traces(model)
            if self.name == "make_train_function":
                gate.let_train(model)
        elif saving_scope() is not None and not gate.fits(model):
            return {}  # a copy whose optimizer would not take the state that is saved beside it
        return getattr(type(model), self.name)(model, *args, **kwargs)


# --------------------------------------------------------------------------- what an optimizer gets


def hand_over_what_trains(model: keras.Model) -> None:
    """Keeps from the optimizer of a compiled model what only trains in other models.

    Keras has one flag for a variable, so it gives the optimizer a weight that trains elsewhere and of which the model
    holds frozen uses only. On JAX its gradient is zero and not missing, and the weight is decayed, or worse.
    """
    _tied.add(model)
    optimizer = vars(model).get("optimizer")
    if optimizer is not None:
        census.see(optimizer)
        for part in _parts(optimizer):
            census.see(part)
            step = vars(part).get("apply")
            if not isinstance(step, _Step):
                step = _Step(part)
            step.models.add(model)


def is_given_what_trains(optimizer: keras.Optimizer, model: keras.Model) -> bool:
    """Whether an optimizer gets only what trains in a model."""
    steps = (vars(part).get("apply") for part in _parts(optimizer))
    return any(isinstance(step, _Step) and model in step.models for step in steps)


def _parts(optimizer: keras.Optimizer) -> list[keras.Optimizer]:
    """The optimizers that make the steps of an optimizer: it may scale a loss for one, or be made of several."""
    inner = inner_optimizer(optimizer)
    return [inner, *inner.optimizers] if _is_of_several(inner) else [inner]


def _is_of_several(optimizer: keras.Optimizer) -> bool:
    return isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ()))


class _Step:
    """Stands in the place of an optimizer's `apply`: passes on what trains in the model that it optimises."""

    def __init__(self, optimizer: keras.Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self._found: tuple[object, frozenset[int]] = (None, frozenset())
        set_untracked(optimizer, "apply", self)
        set_untracked(optimizer, "finalize_variable_values", self.finalize)

    def __call__(
        self, grads: Sequence[Tensor | None], trainable_variables: Iterable[keras.Variable] | None = None
    ) -> Tensor:
        optimizer: keras.Optimizer = self.optimizer()
        still = self._still(optimizer)
        if not still or len(grads) == 0:
            return type(optimizer).apply(optimizer, grads, trainable_variables)
        variables = optimized_variables(optimizer) if trainable_variables is None else list(trainable_variables)
        if not optimizer.built:
            with keras.name_scope(optimizer.name):
                optimizer.build(variables)
        if _is_of_several(optimizer):  # each of them is asked in its turn
            for model in list(self.models):
                hand_over_what_trains(model)
            return type(optimizer).apply(optimizer, grads, variables)
        pairs = [pair for pair in zip(grads, variables, strict=True) if id(pair[1]) not in still]
        kept = self._values(optimizer, still) if getattr(optimizer, "ema_overwrite_frequency", None) else []
        result = type(optimizer).apply(optimizer, [gradient for gradient, _ in pairs], [one for _, one in pairs])
        _put_back(kept)
        self._average(optimizer, still)
        return result

    def finalize(self, var_list: object) -> None:
        """Gives averages to what trained."""
        optimizer: keras.Optimizer = self.optimizer()
        kept = self._values(optimizer, self._still(optimizer)) if getattr(optimizer, "use_ema", False) else []
        type(optimizer).finalize_variable_values(optimizer, var_list)
        _put_back(kept)

    def _average(self, optimizer: keras.Optimizer, still: frozenset[int]) -> None:
        """Makes the average of a weight that does not train here the weight: `SwapEMAWeights` exchanges the two."""
        averages = getattr(optimizer, "_model_variables_moving_average", None) or ()
        for one, average in zip(optimized_variables(optimizer), averages, strict=False):
            if average is not None and id(one) in still:
                average.assign(one.value)

    def _values(self, optimizer: keras.Optimizer, still: frozenset[int]) -> list[tuple[keras.Variable, Tensor]]:
        """An average of a weight that does not train is of what it was: it must not take the weight's place."""
        return [(one, keras.ops.copy(one.value)) for one in optimized_variables(optimizer) if id(one) in still]

    def _still(self, optimizer: keras.Optimizer) -> frozenset[int]:
        """The ids of the variables that none of the models trains."""
        models = [model for model in self.models if any(one is optimizer for one in _parts(model.optimizer))]
        state = (_changes, *(tuple(map(id, model.layers)) for model in models))
        if self._found[0] != state:
            each = [frozenset(map(id, answers["still"](model))) for model in models]
            self._found = (state, frozenset.intersection(*each) if each else frozenset())
        return self._found[1]


def _put_back(values: list[tuple[keras.Variable, Tensor]]) -> None:
    for variable, value in values:
        variable.assign(value)

"""The turns of one call of a `Repeat`: one by one, or in a loop of the backend."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from tether import keras_seam
from tether.types import Nested, Tensor
from tether.weights.expression import known_shape
from tether.weights.leaves import lend
from tether.weights.operators.indexing import Gather
from tether.weights.weight import Weight

__all__ = ["Turns", "are_written_out", "entries_of", "is_tensor", "split", "written_out"]


class _Scope(keras_seam.ThreadScope):
    one_by_one: bool = False


_scope = _Scope()


def written_out() -> contextlib.AbstractContextManager[None]:
    """Writes turns out one by one inside the block: for a converter that does not take the backend's loop."""
    return _scope.set(one_by_one=True)


def are_written_out() -> bool:
    """Whether that holds now."""
    return _scope.one_by_one


class Turns:
    """The turns of one call."""

    def __init__(
        self,
        layer: Any,  # the `Repeat`
        turns: int,
        inputs: Nested,
        args: tuple[Nested, ...],
        named: dict[str, Nested],
        training: Tensor,
        mask: Tensor,
    ) -> None:
        self.layer, self.turns, self.mask = layer, turns, mask
        self.inputs, self.args = inputs, args
        self.stacked = {name: named.pop(name) for name in layer.stacked if name in named}
        self.named = named
        self.run: Any = self._run
        if self._compiles():
            self.run = layer.compiled_turn()
            if layer.block.trainable_variables:  # the later turns get what has a gradient
                self.inputs = keras_seam.like_an_output(inputs)
        self.trains = training is not None and training is not False

    # ------------------------------------------------------------------ a turn

    def _turn(
        self, x: Tensor, args: Nested, named: Mapping[str, Nested], place: Tensor
    ) -> tuple[Nested, tuple[Nested, ...]]:
        layer = self.layer
        if self.mask is not None:
            keras_seam.set_mask(x, self.mask)
        y, more = split(self.run(x, args, named, place))
        layer.refuse_other_shape(x, y)
        if keras_seam.tensor_dtype(y) != keras_seam.tensor_dtype(x):
            y = keras.ops.cast(y, x.dtype)
        if layer.skip_seeds is not None:
            y = self._kept(x, y, named.get("training"))
        return y, more

    def _run(self, x: Tensor, args: Nested, named: Mapping[str, Nested], place: Tensor) -> Nested:
        with self.layer.at(place):
            return self.layer.block(x, *args, **named)

    def _compiles(self) -> bool:
        """Whether PyTorch is to compile the turn, once for all of them: nobody is reading the whole loop already."""
        asked = self.layer.has_run and self.layer.compile_turn and keras_seam.RUNS_FROM_PYTHON and not self.layer.remat
        return asked and not keras_seam.is_compiling()

    def _kept(self, x: Tensor, y: Tensor, training: Tensor) -> Nested:
        rate = self.layer.skip_rate
        if not self.trains:
            return _weighed(x, y, 1 - rate)
        shape = (keras.ops.shape(x)[0], *(1,) * (len(x.shape) - 1))
        drawn = keras.random.uniform(shape, seed=self.layer.skip_seeds)
        found = keras.ops.where(keras.ops.greater_equal(drawn, rate), y, x)
        return keras.ops.where(training, found, _weighed(x, y, 1 - rate)) if is_tensor(training) else found

    # ------------------------------------------------------------------ halting

    def _start(self) -> dict[str, Nested]:
        """What is kept from turn to turn with `halt`: what is left of each example's weight, the mean, the turns."""
        if self.layer.halt is None:
            return {}
        left = keras.ops.ones_like(self.inputs[..., :1])
        return {"left": left, "mean": keras.ops.zeros_like(self.inputs), "turns": keras.ops.zeros_like(left)}

    def _halted(self, kept: dict[str, Nested], x: Tensor, y: Tensor, place: Tensor) -> tuple[Nested, dict[str, Nested]]:
        layer, left = self.layer, kept["left"]
        assert layer.halt is not None
        runs = keras.ops.greater(left, 0.0)
        chance = keras.ops.cast(layer.halt(y), left.dtype)
        is_last = keras.ops.logical_or(
            keras.ops.greater_equal(chance, left * (1 - 0.01)), keras.ops.equal(place, self.turns - 1)
        )
        weight = keras.ops.where(runs, keras.ops.where(is_last, left, keras.ops.minimum(chance, left)), 0)
        turns = keras.ops.add(kept["turns"], keras.ops.cast(runs, left.dtype))
        turns = keras.ops.add(turns, keras.ops.where(keras.ops.logical_and(runs, is_last), left, 0))
        left = keras.ops.where(keras.ops.logical_and(runs, is_last), keras.ops.zeros_like(left), left - weight)
        mean = keras.ops.add(kept["mean"], keras.ops.multiply(weight, y))
        return keras.ops.where(runs, y, x), {"left": left, "mean": mean, "turns": turns}

    def _finish(self, x: Tensor, kept: Mapping[str, Nested]) -> Nested:
        if not kept:
            return x
        if self.layer.ponder_cost:
            self.layer.add_loss(self.layer.ponder_cost * keras.ops.mean(kept["turns"]))
        return kept["mean"]

    # ------------------------------------------------------------------ one after another

    def one_by_one(self) -> Nested:
        """The turns as a loop of Python."""
        x, found, others, kept = self.inputs, [], [], self._start()
        for place in range(self.turns):
            y, more = self._turn(x, self.args, {**self.named, **entries_of(self.stacked, place)}, place)
            if kept:
                y, kept = self._halted(kept, x, y, place)
                if not self.trains and not more and _all_zero(kept["left"]):
                    break
            x = y
            if self.layer.outputs == "all":
                found.append(y)
            if more:
                others.append(more)
        y = keras.ops.stack(found) if self.layer.outputs == "all" else self._finish(x, kept)
        if not others or not others[0]:
            return y
        return (y, *keras.tree.map_structure(lambda *each: keras.ops.stack(each), *others))

    # ------------------------------------------------------------------ in a loop of the backend

    def in_a_loop(self) -> Nested:
        """The turns as a loop of the backend, whose step is a function of tensors alone."""
        layer = self.layer
        stacks = layer.stacks()
        states = [node for node, weight in stacks.items() if weight.role == "state"]
        carried = self._carried(stacks)
        ids = {id(variable) for variable in carried}
        fixed_variables = [v for v in self._variables() if id(v) not in ids]
        flat, tensors = keras.tree.flatten((self.args, self.named)), []
        masks: list[Nested] = []
        for each in flat:
            if is_tensor(each):
                tensors.append(each)
                masks.append(keras_seam.mask_of(each))
        noted = _Noted()

        def step(fixed: Nested, carry: Nested, entry: Nested) -> tuple[Nested, Nested]:
            rest = iter(zip(fixed["tensors"], masks, strict=True))

            def given(each: Nested) -> Nested:
                if not is_tensor(each):
                    return each
                tensor, mask = next(rest)
                if mask is not None:
                    keras_seam.set_mask(tensor, mask)
                return tensor

            args, named = keras.tree.pack_sequence_as((self.args, self.named), [given(each) for each in flat])
            mapping = [*zip(fixed_variables, fixed["values"], strict=True), *zip(carried, carry["state"], strict=True)]
            entries = dict(zip(stacks, entry["stacks"], strict=True))
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                with lend(entries) as written:
                    y, more = self._turn(carry["x"], args, {**named, **entry["stacked"]}, carry["place"])
                kept = carry["kept"]
                if kept:
                    y, kept = self._halted(kept, carry["x"], y, carry["place"])
                loss = carry["loss"]
                for each in scope.losses:
                    noted.losses = True
                    loss = keras.ops.add(loss, keras.ops.cast(each, "float32"))
                state = [_or(scope.get_current_value(v), old) for v, old in zip(carried, carry["state"], strict=True)]
            output = {
                "state": [
                    keras.ops.cast(_or(written.get(node), entries[node]), entries[node].dtype) for node in states
                ],
                "all": [y] if layer.outputs == "all" else [],
                "more": list(more),
            }
            place = keras.ops.add(carry["place"], 1)
            return {"place": place, "x": y, "state": state, "loss": loss, "kept": kept}, output

        spec = self._spec_of_outputs(states)
        fixed = {"values": [keras_seam.raw_value(v) for v in fixed_variables], "tensors": tensors}
        carry = {
            "place": keras.ops.convert_to_tensor(0, "int32"),
            "x": self.inputs,
            "state": [self._kept_for_later(v) for v in carried],
            "loss": keras.ops.zeros((), "float32"),
            "kept": self._start(),
        }
        entries = {
            "stacks": [
                _first(
                    self._kept_for_later(weight.variable) if node in states else keras_seam.raw_value(weight.variable),
                    self.turns,
                )
                for node, weight in stacks.items()
            ],
            "stacked": self.stacked,
        }
        may_stop = bool(carry["kept"]) and not self.trains and not states
        if may_stop and not split(layer.spec_of_turn(self.inputs, self.args, {**self.named, **self.stacked}))[1]:
            carry = keras_seam.repeat_while(
                lambda now: keras.ops.any(keras.ops.greater(now["kept"]["left"], 0)),
                step, fixed, carry, entries, self.turns,
            )  # fmt: skip
            output: Nested = {"state": [], "all": [], "more": []}
        else:
            carry, output = keras_seam.scan(
                step, fixed, carry, entries, self.turns, spec, remat=layer.remat and self.trains
            )
        for variable, value in zip(carried, carry["state"], strict=True):
            keras_seam.store(variable, value)
        for node, value in zip(states, output["state"], strict=True):
            weight = stacks[node]
            weight.store(_put_first(keras_seam.raw_value(weight.variable), value))
        if noted.losses:
            layer.add_loss(carry["loss"])
        y = output["all"][0] if output["all"] else self._finish(carry["x"], carry["kept"])
        return (y, *output["more"]) if output["more"] else y

    def _kept_for_later(self, variable: keras.Variable) -> Nested:
        """The value of a state: PyTorch writes to it in place, and a turn that is computed again needs the old one."""
        value = keras_seam.raw_value(variable)
        return keras.ops.copy(value) if self.layer.remat and keras_seam.RUNS_FROM_PYTHON else value

    def _variables(self) -> list[Nested]:
        layer = self.layer
        found = [*layer.block.variables, *layer.block.metrics_variables]
        if layer.halt is not None:
            found += layer.halt.variables
        if layer.skip_seeds is not None:
            found.append(layer.skip_seeds.state)
        return list({id(variable): variable for variable in found}.values())

    def _carried(self, stacks: Mapping[Gather, Weight]) -> list[Nested]:
        """The variables that one turn may change for the next: seeds, metrics, shared statistics."""
        layer = self.layer
        still: set[int] = set()
        stacked = set(map(id, stacks.values()))
        parts = [layer.block, *([] if layer.halt is None else [layer.halt])]
        for part in parts:
            for each in keras_seam.contained_layers(part):
                if isinstance(each, Weight):
                    if each.role != "state" or id(each) in stacked:
                        still.update(map(id, each.variables))
                else:
                    still.update(map(id, keras_seam.variable_lists(each)["trainable_variables"]))
        return [variable for variable in self._variables() if id(variable) not in still]

    def _spec_of_outputs(self, states: list[Gather]) -> Nested:
        """The structure of what a turn hands out; TensorFlow wants to know it before the loop."""
        if keras.backend.backend() != "tensorflow":
            return None
        spec = self.layer.spec_of_turn(self.inputs, self.args, {**self.named, **self.stacked})
        first, more = split(spec)
        return {
            "state": [keras.KerasTensor(known_shape(node), node.dtype) for node in states],
            "all": [keras.KerasTensor(first.shape, self.inputs.dtype)] if self.layer.outputs == "all" else [],
            "more": list(more),
        }


@dataclass
class _Noted:
    """What the step was seen to do while the backend read it."""

    losses: bool = False


# --------------------------------------------------------------------------- pieces


def is_tensor(value: object) -> bool:
    """Whether something is a tensor, or stands for one in a graph."""
    return isinstance(value, keras.KerasTensor) or keras.ops.is_tensor(value)


def split(found: Nested) -> tuple[Nested, tuple[Nested, ...]]:
    """The output of a turn, and what else the block returned."""
    return (found[0], tuple(found[1:])) if isinstance(found, (list, tuple)) else (found, ())


def entries_of(stacked: Mapping[str, Nested], place: int) -> dict[str, Nested]:
    """The entries of a turn, of arguments that have one for each along their first axis."""
    return {name: keras.tree.map_structure(lambda each: each[place], value) for name, value in stacked.items()}


def _weighed(x: Tensor, y: Tensor, share: float) -> Tensor:
    return keras.ops.add(x, keras.ops.multiply(keras.ops.subtract(y, x), share))


def _or(value: Tensor, other: Tensor) -> Nested:
    return other if value is None else value


def _first(value: Tensor, turns: int) -> Nested:
    return value if int(value.shape[0]) == turns else value[:turns]


def _put_first(whole: Tensor, first: Tensor) -> Nested:
    if int(whole.shape[0]) == int(first.shape[0]):
        return first
    return keras.ops.concatenate([first, whole[int(first.shape[0]) :]], axis=0)


def _all_zero(value: Tensor) -> bool:
    """Whether nothing is left of a tensor that can be read; a converter of PyTorch's has no numbers either."""
    can_be_read = keras_seam.is_concrete(value) and not (keras_seam.is_compiling() or keras_seam.lies_elsewhere(value))
    return can_be_read and not keras.ops.convert_to_numpy(value).any()

"""One block used several times, one after another, compiled once: `Repeat`.

What all turns have in common is the block's weights. What a turn has of its own (`vary`, and the block's state) is
stored stacked, as a bank that the depth reads. In a compiled graph the turns are a loop of the backend, which is handed
the entries of the stacks one by one; elsewhere they are a loop of Python.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, Unsupported, received
from tether.layers.depth.bank import StackedWeight, followers, origins_of, values_of, zipped
from tether.layers.depth.turns import Turns, are_written_out, entries_of, is_tensor, split
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.paths import walk
from tether.layers.tying.state import View, arguments_in, slots_of
from tether.layers.tying.swap import Rollback, become_all
from tether.layers.tying.tie import by_path, tie, weight_of
from tether.layers.tying.tied import base_class
from tether.types import Config, Function, Nested, Tensor
from tether.weights import placement
from tether.weights.evaluation import once_more
from tether.weights.expression import Expression, as_expression, known_shape, program, rewritten
from tether.weights.leaves import Argument, bind, lend
from tether.weights.operators.indexing import Gather
from tether.weights.weight import Weight

FEW = 3
"""So few turns are written out one by one in a graph, unless a loop is asked for."""


@keras.saving.register_keras_serializable(package="tether", name="Repeat")
class Repeat(keras.layers.Layer):
    """A block that is used `times` times, each time on what it made the time before.

    The block's weights are shared by all turns, and each of them is stored, counted, trained and saved once. Compiling
    takes no longer for more turns: on JAX and TensorFlow they are one loop of the graph, and PyTorch runs them one
    after another.

    Args:
        block: A layer or model whose first output has the shape of its first input.
        times: How many turns.
        vary: What each turn has of its own, by the weight's path below the block or by a pattern (`tether.patterns`): a
            form (`tether.low_rank(8)`, `tether.forms.scale()`), a function that makes an expression of the shared
            weight, or `"own"`: a weight of its own for each turn, started at the block's value. Stored stacked: a
            factor of shape `(8, 64)` as one weight of shape `(times, 8, 64)`.
        state: `"own"`: each turn has its own moving statistics and whatever else layers keep that does not train.
            `"shared"`: one turn goes on from those of the turn before, as in a loop over one block. Seeds of dropout
            are always handed on, so that turns and steps draw other numbers.
        outputs: `"last"`: what the last turn makes. `"all"`: what each makes, along a new first axis.
        stacked: Names of arguments of the call that have an entry for each turn along their first axis, such as caches.
        remat: Whether a turn is computed again for its gradient, instead of keeping what it computed. Memory then grows
            by one activation a turn. A loop of TensorFlow does so always under XLA, which copies at every turn what a
            loop keeps.
        unroll: `"auto"`: a loop in compiled graphs of more than three turns. `False`: always where there is a graph.
            `True`: never; each turn is written out. The numbers are the same.
        compile_turn: On PyTorch, whether a turn is compiled by itself (`torch.compile`), once for all turns. The other
            backends compile whole calls.
        skip_rate: Stochastic depth (Huang et al. 2016, arXiv:1603.09382): how likely a turn is left out for an example
        in
            training. Otherwise a turn counts by how likely it is kept.
        halt: Adaptive computation time (Graves 2016, arXiv:1603.08983): a layer that makes of a turn's output, of shape
            `(..., features)`, how likely it was the last one, of shape `(..., 1)`, between 0 and 1. The output is the
            mean of the turns' outputs with these weights. Only outside of training is time saved, when all have halted.
        ponder_cost: With `halt`: how much the mean number of turns adds to the loss.
        argument: What the argument of the depth is called in expressions and in the block's call.
        **kwargs: As for any layer.

    Raises:
        TetherError: An argument is none of these.
        ShapeMismatch: When it is built: the block changes the shape of its input.

    Example:
    ```python
    block = keras.layers.Dense(16, activation="tanh")
    body = tether.Repeat(block, times=12, vary={"kernel": tether.low_rank(2), "bias": "own"})
    x = keras.Input((16,))
    model = keras.Model(x, body(x))
    assert [tuple(w.shape) for w in model.weights] == [(16, 16), (12, 16, 2), (12, 2, 16), (12, 16)]
    ```
    """

    def __init__(
        self,
        block: keras.Layer,
        times: int,
        *,
        vary: Mapping[Any, Any] | None = None,
        state: str = "own",
        outputs: str = "last",
        stacked: Sequence[str] = (),
        remat: bool = False,
        unroll: bool | str = "auto",
        skip_rate: float = 0.0,
        halt: keras.Layer | None = None,
        ponder_cost: float = 0.0,
        argument: str = "depth",
        compile_turn: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_layer("Repeat", block)
        kwargs.setdefault("dtype", _policy_of(block))
        super().__init__(**kwargs)
        self.times = _checked_times(times)
        _check_choice("state", state, ("own", "shared"))
        _check_choice("outputs", outputs, ("last", "all"))
        _check_choice("unroll", unroll, ("auto", True, False))
        named: Any = stacked
        rate: Any = skip_rate
        if isinstance(named, str) or not all(isinstance(each, str) for each in named):
            raise TetherError(f"`stacked` lists names of arguments, as in ('cache',). {received(stacked=stacked)}")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise TetherError(f"`skip_rate` is a number from 0 to below 1. {received(skip_rate=skip_rate)}")
        if halt is not None and not isinstance(halt, keras.Layer):
            raise TetherError(f"`halt` is a layer. {received(halt=halt)}")
        if halt is not None and (outputs == "all" or skip_rate):
            raise TetherError(
                "With `halt` the output is a mean of all turns: leave out `outputs='all'` and `skip_rate`."
            )
        if vary is not None and not isinstance(vary, Mapping):
            raise TetherError(f"`vary` has forms by path: {{'kernel': tether.low_rank(8)}}. {received(vary=vary)}")
        self.supports_masking = True
        self.block = block
        self.halt = halt
        self.state, self.outputs, self.stacked = state, outputs, tuple(stacked)
        self.remat, self.unroll, self.argument = bool(remat), unroll, argument
        self.compile_turn = bool(compile_turn)
        self.skip_rate, self.ponder_cost = float(skip_rate), float(ponder_cost)
        self.skip_seeds = keras.random.SeedGenerator() if skip_rate else None
        keras_seam.set_untracked(self, "_wanted", dict(vary or {}))
        keras_seam.set_untracked(self, "_prepared", False)
        keras_seam.set_untracked(self, "_asked", None)
        keras_seam.set_untracked(self, "_of_build", None)
        keras_seam.set_untracked(self, "_compiled", None)
        keras_seam.set_untracked(self, "has_run", False)

    # ------------------------------------------------------------------ building

    def __call__(self, *args: Nested, **kwargs: Nested) -> Nested:
        """Builds the block by what the first call is given, of any number of tensors, and calls it."""
        if self.built:
            return super().__call__(*args, **kwargs)
        keras_seam.set_untracked(self, "_asked", (args, kwargs))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            keras_seam.set_untracked(self, "_asked", None)

    def build(self, input_shape: Nested) -> None:
        """Builds the block, and gives each turn what it has of its own."""
        if not self.block.built:
            asked = self._asked
            tensors = [] if asked is None else [each for each in keras.tree.flatten(asked) if is_tensor(each)]
            if self._of_build is not None:
                self.block.build_from_config(self._of_build)
            elif len(tensors) > 1:
                self._build_by_running(*asked)
            else:
                self.block.build(input_shape)
        if self.halt is not None and not self.halt.built:
            self.halt.build(_first_shape(input_shape))
        self.prepare()

    def _build_by_running(self, args: tuple[Nested, ...], kwargs: Mapping[str, Nested]) -> None:
        tensors = [each for each in keras.tree.flatten((args, kwargs)) if is_tensor(each)]
        specs = [keras.KerasTensor(each.shape, keras.backend.standardize_dtype(each.dtype)) for each in tensors]

        def run(*specs: Nested) -> Nested:
            rest = iter(specs)
            given, named = keras.tree.map_structure(
                lambda each: next(rest) if is_tensor(each) else each, (args, dict(kwargs))
            )
            named.pop("times", None)
            named.update(entries_of({name: named[name] for name in self.stacked if name in named}, 0))
            with self.at(0):
                return self.block(*given, **named)

        keras_seam.trace(run, *specs)

    def prepare(self) -> Repeat:
        """Gives each turn what it has of its own. The block must be built; calls and `build` do this by themselves.

        Returns:
            The layer.

        Raises:
            TetherError: A form makes no expression of its weight, or one of another form for each turn.
            UnknownName: A path in `vary` names no weight of the block.
        """
        if self._prepared:
            return self
        _refuse_taken_name(self.block, self.argument)
        wanted: dict[str, Nested] = {}
        if self.state == "own":
            wanted.update(dict.fromkeys(_own_state(self.block), "state"))
        wanted.update(by_path(self.block, self._wanted))
        expressions: dict[str, Expression] = {}
        depth = self.depth
        for path, change in wanted.items():
            base = weight_of(self.block, path)
            if depth in arguments_in(base):
                raise TetherError(
                    f"The weight {path!r} of {self.block.name!r} is read by {self.argument!r} already, for the turns "
                    "of another Repeat. Give the depth of this one a name: `tether.Repeat(..., argument='round')`."
                )
            options = [_made(path, change, base) for _ in range(self.times)]
            try:
                expressions[path] = zipped(options, depth)[0]
            except TetherError as error:
                raise TetherError(f"What turns have of their own at {path!r} cannot be stacked: {error}") from None
        return self._with_stacks(expressions)

    def _with_stacks(self, expressions: Mapping[str, Expression]) -> Repeat:
        """Ties the block to what reads its stacks; nothing more is to be prepared then."""
        if expressions:
            tie(self.block, dict(expressions))
        for expression in expressions.values():
            for weight in expression.weights_used():
                weight.forget_unused_parts()  # type: ignore[attr-defined]
        keras_seam.set_untracked(self, "_prepared", True)
        keras_seam.set_untracked(self, "_wanted", {})
        return self

    # ------------------------------------------------------------------ what a turn has of its own

    @property
    def depth(self) -> Argument:
        """The argument that stands for the number of a turn, in expressions."""
        return Argument(self.argument, (), "int32")

    def _entries(self) -> Iterator[Gather]:
        """The reads below the block of an entry that the depth names."""
        depth = self.depth
        for layer in keras_seam.contained_layers(self.block):
            for slot in slots_of(layer):
                for step in program(slot.view.expression):
                    node = step.expression
                    if isinstance(node, Gather) and node.operands[1] == depth and node.parameters["axis"] == 0:
                        yield node

    def stacks(self) -> dict[Gather, Weight]:
        """The stacked weights below the block, each with the node that reads its entry at a depth."""
        stored = {node: node.operands[0] for node in self._entries()}
        return {node: weight for node, weight in stored.items() if isinstance(weight, Weight)}

    def stored_turns(self) -> int | None:
        """How many turns something is stored for; `None` where all turns are alike, so that any number may run."""
        return min((known_shape(node.operands[0])[0] for node in self._entries()), default=None)

    def compiled_turn(self) -> Function:
        """A turn as PyTorch compiles it: one graph for all of them, which is handed the entries of the stacks."""
        stacks = self.stacks()
        nodes = tuple(stacks)
        if self._compiled is None or self._compiled[0] != nodes:
            depth, block = self.depth, self.block
            states = tuple(node for node, weight in stacks.items() if weight.role == "state")

            def turn(x: Tensor, place: Tensor, entries: Nested, args: Nested, named: Nested) -> Nested:
                with lend(dict(zip(nodes, entries, strict=True))) as written, bind({depth: place}):
                    found = block(x, *args, **named)
                return found, [written.get(node) for node in states]

            keras_seam.set_untracked(self, "_compiled", (nodes, keras_seam.compiled(turn), states))
        _, run, states = self._compiled

        def of_place(x: Tensor, args: Nested, named: Nested, place: int) -> Nested:
            entries = [keras_seam.raw_value(weight.variable)[place] for weight in stacks.values()]
            number = keras.ops.convert_to_tensor(place, "int32")
            found, written = run(x, number, entries, args, named)
            for node, value in zip(states, written, strict=True):
                if value is not None:
                    with bind({self.depth: place}):
                        node.assign(value)
            return found

        return of_place

    @contextlib.contextmanager
    def at(self, place: Tensor | int) -> Iterator[None]:
        """Lets the block compute as at a turn inside the block of code."""
        with bind({self.depth: place}), once_more():
            yield

    # ------------------------------------------------------------------ calling

    def call(
        self,
        inputs: Nested,
        *args: Nested,
        training: Tensor = None,
        mask: Tensor = None,
        times: int | None = None,
        **kwargs: Nested,
    ) -> Nested:
        """What the turns make of the inputs.

        Args:
            inputs: The first turn's first input.
            *args: More inputs, the same for each turn.
            training: As for any layer; or a bool tensor of shape `()`, also one whose value a compiled graph is given
                later, if the block's layers take it (Keras's BatchNormalization and Dropout do not, in a graph).
            mask: The mask of the inputs, the same for each turn.
            times: Another number of turns: any, or up to those stored where turns have something of their own.
            **kwargs: More arguments of the block's call. Those named in `stacked` have an entry for each turn.

        Returns:
            The last output, or all along a new first axis. Where the block returns a tuple, its first is the output,
            and the others are stacked along a new first axis.

        Raises:
            ShapeMismatch: The block changes the shape.
            TetherError: More turns than are stored.
            Unsupported: A layer of the block asks in Python whether it trains, and `training` is a tensor of a graph.
        """
        turns = self.times if times is None else self._checked_turns(times)
        if is_tensor(training) and not keras_seam.is_undecided(training) and not keras_seam.is_compiling():
            training = bool(training)
        if mask is None:
            mask = keras_seam.mask_of(inputs)
        named = self._for_block(kwargs, training, mask)
        self._check_stacked(named, turns)
        run = Turns(self, turns, inputs, args, named, training, mask)
        try:
            found = run.in_a_loop() if self._is_a_loop(turns, inputs) else run.one_by_one()
        except Exception as error:
            if keras_seam.is_undecided(training) and keras_seam.refuses_to_decide(error):
                raise Unsupported(
                    f"`training` is a tensor here, of which a compiled graph learns later, and a layer of "
                    f"{self.block.name!r} asks for it in Python, as Keras's BatchNormalization and Dropout do. Give "
                    f"True or False to {self.name!r}, and compile the graph once for each. "
                    f"{received(training=training)}"
                ) from error
            raise
        if self.compile_turn and not self.has_run:  # PyTorch would compile a block's first call, and again for the rest
            keras_seam.set_untracked(self, "has_run", True)
        return found

    def _is_a_loop(self, turns: int, x: Tensor) -> bool:
        if self.remat and keras_seam.RUNS_FROM_PYTHON:
            return True
        if self.unroll is True or are_written_out() or (self.unroll == "auto" and turns <= FEW):
            return False
        held = [keras_seam.raw_value(variable) for variable in self.block.variables]
        if any(value is None for value in held):
            return False  # a model that is built by a trace has no values yet, which a loop would carry
        return keras_seam.is_traced_for_a_compiler(x, *held[:1])

    def _for_block(self, kwargs: Mapping[str, Nested], training: Tensor, mask: Tensor) -> dict[str, Nested]:
        """The named arguments of the block's call."""
        named = dict(kwargs)
        takes = keras_seam.call_parameters(self.block)
        if training is not None:
            named["training"] = training
        if mask is not None and "mask" in takes:
            named["mask"] = mask
        return named

    def _check_stacked(self, named: Mapping[str, Nested], turns: int) -> None:
        for name in self.stacked:
            for each in keras.tree.flatten(named.get(name)):
                if each is not None and int(each.shape[0]) != turns:
                    raise ShapeMismatch(
                        f"The argument {name!r} of {self.name!r} has an entry for each of {turns} turns along its "
                        f"first axis. {received(shape=tuple(each.shape))}"
                    )

    def _checked_turns(self, times: object) -> int:
        turns, stored = _checked_times(times), self.stored_turns()
        if stored is not None and turns > stored:
            raise TetherError(
                f"{self.name!r} stores what {stored} turns have of their own, so it can take 1 to {stored}. "
                f"{received(times=times)}"
            )
        return turns

    def compute_output_spec(self, inputs: Nested, *args: Nested, times: int | None = None, **kwargs: Nested) -> Nested:
        """The shapes and dtypes of what a call returns."""
        turns = self.times if times is None else _checked_times(times)
        spec = self.spec_of_turn(inputs, args, kwargs)
        first, more = split(spec)
        self.refuse_other_shape(inputs, first)
        first = keras.KerasTensor(first.shape, inputs.dtype)
        if self.outputs == "all":
            first = _with_turns(first, turns)
        if not more:
            return first
        return (first, *keras.tree.map_structure(lambda each: _with_turns(each, turns), more))

    def spec_of_turn(self, inputs: Nested, args: tuple[Nested, ...], kwargs: Mapping[str, Nested]) -> Nested:
        """The shapes and dtypes of what one turn returns."""
        takes = keras_seam.call_parameters(self.block)
        named = {
            name: value
            for name, value in kwargs.items()
            if name not in ("training", "mask") or (value is not None and name in takes)
        }

        def entry(each: Nested) -> Nested:
            return keras.KerasTensor(each.shape[1:], keras.backend.standardize_dtype(each.dtype))

        for name in self.stacked:
            if name in named:
                named[name] = keras.tree.map_structure(entry, named[name])

        def as_spec(each: Nested) -> Nested:
            if not is_tensor(each) or isinstance(each, keras.KerasTensor):
                return each
            return keras.KerasTensor(each.shape, keras.backend.standardize_dtype(each.dtype))

        inputs, args, named = keras.tree.map_structure(as_spec, (inputs, args, named))
        with self.at(0):
            return self.block.compute_output_spec(inputs, *args, **named)

    def refuse_other_shape(self, inputs: Nested, outputs: Nested) -> None:
        """Raises if the block does not keep the shape of its input."""
        before, after = tuple(inputs.shape), tuple(outputs.shape)
        # Sizes that a graph leaves open are no plain numbers, and comparing them would fix them.
        known = zip(before, after, strict=False)
        differ = any(type(a) is int and type(b) is int and a != b for a, b in known)
        if len(before) != len(after) or differ:
            raise ShapeMismatch(
                f"{self.name!r} repeats {self.block.name!r}, so its output must have the shape of its input. It makes "
                f"{after} of {before}. Add a layer to the block that brings it back, or leave what changes the shape "
                "out of the block."
            )

    def compute_mask(self, inputs: Nested, previous_mask: Tensor) -> Nested:
        """The mask of the inputs, unless all turns are returned."""
        return previous_mask if self.outputs == "last" else None

    # ------------------------------------------------------------------ conversions

    def layers(self) -> list[keras.Layer]:
        """The turns as layers of their own, over the same stored weights: what they learn, this layer has.

        Each is a child of the block whose expressions read their entry of each stack, so a model of them keeps the
        values, the gradients and, under the same optimizer, its slots.

        Returns:
            As many layers as there are turns.

        Example:
        ```python
        body = tether.Repeat(keras.layers.Dense(4), 3, vary={"kernel": tether.low_rank(1)})
        body.build((None, 4))
        x = keras.Input((4,))
        y = x
        for layer in body.layers():
            y = layer(y)
        unrolled = keras.Model(x, y)
        assert len(unrolled.weights) == len(body.weights)
        ```
        """
        from tether.layers.family.inherit import inherit  # not everybody who repeats a block takes it apart

        self.prepare()
        depth, found = self.depth, []
        for place in range(self.times):
            child = inherit(self.block)
            changes, number = {}, as_expression(place)
            for path, expression in _expressions(child):
                if depth in arguments_in(expression):
                    changes[path] = _with_number(expression, depth, number)
            found.append(tie(child, changes) if changes else child)
        return found

    @classmethod
    def of(cls, layers: Sequence[keras.Layer], **settings: Any) -> Repeat:
        """A Repeat of layers that exist, also trained ones, with a turn for each: the way back from `layers()`.

        What the layers share all turns share, and what differs is stored stacked. The layers follow: where they are
        used, their weights are entries of the stacks, and the optimizer of a compiled model that has trained them goes
        on, as with `tether.bank`. Moving statistics are copied.

        Args:
            layers: Two built layers or more, in their order, that are made alike: their weights have the same paths,
                shapes and forms.
            **settings: As for `Repeat`, but for `vary`.

        Returns:
            The layer, built.

        Raises:
            TetherError: The layers are not alike, or not built; nothing is changed then.

        Example:
        ```python
        first, second = keras.layers.Dense(4, name="first"), keras.layers.Dense(4, name="second")
        first.build((None, 4))
        second.build((None, 4))
        tether.tie(second, kernel=tether.weight_of(first, "kernel"))
        body = tether.Repeat.of([first, second])
        assert [tuple(weight.shape) for weight in body.weights] == [(4, 4), (2, 4)]
        ```
        """
        from tether.layers.family.inherit import inherit

        if "vary" in settings:
            raise TetherError("`Repeat.of` takes what turns have of their own from the layers: leave `vary` out.")
        blocks = _checked_blocks(layers)
        depth, stacks = Argument(settings.get("argument", "depth"), (), "int32"), dict[tuple[int, ...], StackedWeight]()
        expressions: dict[str, Expression] = {}
        with contextlib.ExitStack() as undone:
            for layer in blocks:
                _refuse_taken_name(layer, depth.name)
                undone.enter_context(Rollback.below(layer))
            states = _own_state(blocks[0])
            for path in _weights_at(blocks[0]):
                options = [weight_of(layer, path) for layer in blocks]
                if path in states and settings.get("state", "own") == "own":
                    expressions[path] = zipped([_own(option, "state") for option in options], depth)[0]
                elif path not in states and any(option != options[0] for option in options):
                    expressions[path] = zipped(options, depth, known=stacks)[0]
            child = inherit(blocks[0], name=blocks[0].name)
            made = cls(child, len(blocks), **settings)
        become_all(followers(stacks.values()), origins_of(stacks.values()))
        return made._with_stacks(expressions)

    # ------------------------------------------------------------------ files

    def get_config(self) -> Config:
        """The block, with its ties, and the settings. It does not grow with the number of turns.

        Raises:
            TetherError: The layer is not built, and what turns have of their own cannot be written.
        """
        if self._wanted and not self._prepared:
            raise TetherError(
                f"{self.name!r} is not built, so it does not know yet what its turns have of their own. Call it, or "
                f"build it (`layer.build(input_shape)`), before it is saved or copied."
            )
        config: Config = {
            **super().get_config(),
            "block": keras.saving.serialize_keras_object(self.block),
            "times": self.times,
            "state": self.state,
            "argument": self.argument,
        }
        defaults = {
            "outputs": "last",
            "stacked": (),
            "remat": False,
            "unroll": "auto",
            "skip_rate": 0.0,
            "compile_turn": False,
        }
        config.update({name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value})
        if self.halt is not None:
            config.update(halt=keras.saving.serialize_keras_object(self.halt), ponder_cost=self.ponder_cost)
        return config

    @classmethod
    def from_config(cls, config: Config) -> Repeat:
        """Makes the layer again from what `get_config` wrote.

        Raises:
            InvalidConfig: It is not what `get_config` writes.
        """
        config = dict(config)
        described = config.pop("block", None)
        # The block is built where the original was, below this layer: its weights have their paths from there.
        of_build = described.get("build_config") if isinstance(described, dict) else None
        if of_build is not None:
            described = {name: value for name, value in described.items() if name != "build_config"}
        block = keras.saving.deserialize_keras_object(described)
        if not isinstance(block, keras.Layer):
            raise InvalidConfig(f"The block of a Repeat is a layer. {received(block=block)}")
        if config.get("halt") is not None:
            config["halt"] = keras.saving.deserialize_keras_object(config["halt"])
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        try:
            made = cls(block, **config)
        except TypeError as error:
            raise InvalidConfig(f"A Repeat cannot be made from its config: {error}") from error
        keras_seam.set_untracked(made, "_of_build", of_build)
        return made


# --------------------------------------------------------------------------- pieces


def _policy_of(block: keras.Layer) -> Any:
    policy = block.dtype_policy
    if policy.quantization_mode is None:
        return policy
    if policy.compute_dtype == policy.variable_dtype:
        return policy.compute_dtype
    return f"mixed_{policy.compute_dtype}"


def _checked_times(times: object) -> int:
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise TetherError(f"`times` is a whole number of turns, 1 or more. {received(times=times)}")
    return times


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if not any(value is one or (isinstance(one, str) and value == one) for one in known):
        raise TetherError(f"`{name}` is one of {', '.join(map(repr, known))}. {received(**{name: value})}")


def _first_shape(shape: Nested) -> Nested:
    return shape[0] if isinstance(shape, (list, tuple)) and shape and isinstance(shape[0], (list, tuple)) else shape


def _with_turns(spec: Nested, turns: int) -> Nested:
    return keras.KerasTensor((turns, *spec.shape), spec.dtype)


def _weights_at(layer: keras.Layer) -> dict[str, keras.Variable]:
    """The floats below a layer, by path."""
    return {
        "/".join(path): variable
        for path, _, _, variable in walk(layer)
        if isinstance(variable, View) or keras_seam.is_float(keras_seam.stored_dtype(variable))
    }


def _settings_of(layer: keras.Layer) -> list[dict[str, Any]]:
    """The plain settings of a layer and of those below it, such as activations and rates, without names and seeds."""
    found = []
    for each in keras_seam.contained_layers(layer):
        try:
            config = {} if isinstance(each, Weight) else each.get_config()
        except NotImplementedError:  # of a layer that cannot be saved
            config = {}
        plain = {name: value for name, value in config.items() if isinstance(value, (str, bool, int, float))}
        found.append({name: value for name, value in plain.items() if name not in ("name", "seed", "trainable")})
    return [settings for settings in found if settings]


def _checked_blocks(layers: object) -> list[keras.Layer]:
    """Layers that are made alike, as far as their weights show it."""
    blocks = list(layers) if isinstance(layers, Sequence) else []
    if len(blocks) < 2 or not all(isinstance(layer, keras.Layer) for layer in blocks):
        raise TetherError(f"`Repeat.of` takes two layers or more in their order. {received(layers=layers)}")
    for layer in blocks:
        refuse_layer("Repeat.of", layer)
        if not layer.built:
            raise TetherError(f"{layer.name!r} is not built: call it, or build it, before it becomes a turn.")
    looks = [
        (
            base_class(type(layer)),
            {path: (variable.shape, variable.trainable) for path, variable in _weights_at(layer).items()},
        )
        for layer in blocks
    ]
    for layer, look in zip(blocks, looks, strict=True):
        if look != looks[0]:
            differing = sorted(path for path in {*look[1], *looks[0][1]} if look[1].get(path) != looks[0][1].get(path))
            raise TetherError(
                "The turns of a Repeat are made alike: of one class, with weights of the same paths and shapes, frozen "
                f"alike. {blocks[0].name!r} and {layer.name!r} differ{f' at {differing[0]!r}' if differing else ''}."
            )
        if _settings_of(layer) != _settings_of(blocks[0]):
            raise TetherError(
                "The turns of a Repeat are made alike, with the same settings. Those of "
                f"{blocks[0].name!r} and {layer.name!r} differ, such as an activation or a rate."
            )
    return blocks


def _own_state(block: keras.Layer) -> list[str]:
    """The paths of the moving statistics below a block: floats that its layers keep and that do not train."""
    found: dict[int, str] = {}
    for path, _, layer, variable in walk(block):
        listed = keras_seam.variable_lists(layer)["non_trainable_variables"]
        is_state = any(variable is each for each in listed) and keras_seam.is_float(keras_seam.stored_dtype(variable))
        if is_state and not isinstance(variable, View):
            found.setdefault(id(variable), "/".join(path))
    return list(found.values())


def _refuse_taken_name(block: keras.Layer, argument: str) -> None:
    parameters = inspect.signature(block.call).parameters
    if argument in parameters and argument not in getattr(type(block), "_tether_arguments", ()):
        raise Unsupported(
            f"The call of {block.name!r} has a parameter {argument!r} of its own. Give the depth another name: "
            f"`tether.Repeat(block, times, argument='turn')`."
        )


def _made(path: str, change: Any, base: Expression) -> Expression:
    """The expression of one turn, from what `vary` says."""
    if change in ("own", "state"):
        return _own(base, "state" if change == "state" else None)
    if not callable(change):
        raise TetherError(
            f"`vary` has a form, a function of the shared weight or 'own' for each weight. "
            f"{received(weight=path, change=change)}"
        )
    try:
        return as_expression(change(base))
    except TypeError as error:
        raise TetherError(f"What `vary` has for {path!r} made no expression of its weight: {error}") from None


def _own(base: Expression, role: str | None) -> Weight:
    """A weight of a turn's own, started at the value that the block has."""
    shape = known_shape(base)
    path = base.path if isinstance(base, Weight) else base.notation()
    name = base.name if isinstance(base, Weight) else "own"
    found = Weight(shape, dtype=base.dtype, trainable=role is None, name=name, role=role)
    waiting = keras_seam.waiting_start(base.variable) if isinstance(base, Weight) else None
    if waiting is not None:  # inside a trace, where the block has no value yet
        found.start_by(waiting, path=path)
    else:
        found.start_at(values_of(base, path), path=path)
    placement.lay_out_as(found.variable, placement.layout_of_value(path, base))
    return found


def _expressions(layer: keras.Layer) -> Iterator[tuple[str, Expression]]:
    """The expressions below a layer, by path."""
    for path, _, _, variable in walk(layer):
        if isinstance(variable, View):
            yield "/".join(path), variable.expression


def _with_number(expression: Expression, argument: Argument, number: Expression) -> Expression:
    """The expression with a number in the place of an argument."""
    return rewritten(expression, lambda _, part: number if part == argument else None)


__all__ = ["Repeat"]

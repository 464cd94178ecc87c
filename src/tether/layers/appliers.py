"""How each kind of layer applies its weight by plan: what it computes, in the letters of an einsum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras

from tether import keras_seam
from tether.errors import ShapeMismatch, Unsupported, received
from tether.forms.dropout import InputDropout, pieces_of
from tether.kinds import kind_of, letters_of
from tether.layers.tying.state import View, standing_in, state_of, views
from tether.planning import control
from tether.planning.alternatives import make_plan
from tether.planning.control import Mode, Noted
from tether.planning.execution import Convolve, execute
from tether.planning.plan import Coded, Convolution, Entries, Integers, Plan, Problem
from tether.planning.products import Products, products
from tether.types import Function, Tensor
from tether.weights.each import (
    are_options,
    bound_for_each,
    choices_in,
    for_options,
    is_stack,
    once,
    rows,
    weights_of_choice,
    whole_rows,
    without_bad,
)
from tether.weights.evaluation import (
    Held,
    evaluate,
    held_for_each,
    hold,
    hold_for_each,
    release,
    remembers,
    without_what_is_off,
)
from tether.weights.expression import Expression, Stored, is_view, live_weights
from tether.weights.leaves import Choice, bind
from tether.weights.operators.choice import where_option

# --------------------------------------------------------------------------- calls by plan
# The plan of one use: made at the first call of each kind, then kept with the view.


BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_KEPT = 256
"""Plans kept for one use: an eager loop over inputs of ever other lengths does not fill the memory."""

MakeProblem = Callable[..., Problem]
Whole = Callable[[Tensor, Tensor], Tensor]
"""What a layer computes of its input and its weight, both tensors."""


class Planner:
    """The plans of one view."""

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self.weights = expression.weights_used()
        self.choices = choices_in(expression)
        """The choices that the weight reads, of which examples may make one for themselves."""
        self._others: dict[Expression, Planner | None] = {}
        self._pieces: tuple[tuple[Planner, InputDropout | None], ...] | None = None
        self._products: dict[bool, Products] = {}
        self._plans: dict[object, Plan] = {}
        self.numbers: dict[int, int] = {}
        """The numbers of the plans that a graph of `torch.compile` reads, by their ids: they are kept for it."""

    def products(self, each: bool) -> Products:
        """The weight as a sum of products; with all options, if each example chooses for itself."""
        if each not in self._products:
            self._products[each] = products(self.expression, each)
        return self._products[each]

    @property
    def pieces(self) -> tuple[tuple[Planner, InputDropout | None], ...]:
        """The planners of its terms by the dropout on their input; none, if no term has any."""
        if self._pieces is None:
            terms = pieces_of(self.expression)
            dropped = any(term.dropout is not None for term in terms)
            self._pieces = tuple((Planner(term.expression), term.dropout) for term in terms if dropped)
        return self._pieces

    def of(self, expression: Expression) -> Planner | None:
        """The planner of what the expression is without adapters that are off; `None` if nothing is left to plan."""
        if expression not in self._others:
            self._others[expression] = None if is_view(expression) else Planner(expression)
        return self._others[expression]

    def find(
        self,
        problem: MakeProblem,
        settings: tuple[object, ...],
        shape: Shape,
        dtype: str,
        training: bool,
        live: bool,
        flags: tuple[bool, ...],
        mode: Mode,
        kept: bool,
        chosen: tuple[int, int, bool],
    ) -> Plan:
        """The plan for calls of one kind, made at the first of them; `flags` say which weights train."""
        key = (shape, dtype, training, live, flags, mode, kept, chosen, problem, settings)
        found = self._plans.get(key)
        if found is None:
            asked = problem(shape, *settings, training=training, itemsize=BYTES.get(dtype, 4))
            axes, place, mixed = chosen
            if axes:
                asked = replace(asked, choice=self.choices[place], chosen=axes, mixed=mixed)
                refuse_axes(asked)

            def trains(expression: Expression) -> bool:
                return live and any(weight.trainable for weight in live_weights(expression))

            of_weight = self.products(axes > 0)
            found = make_plan(replace(asked, repeated=True) if kept else asked, of_weight, trains, mode)
            if axes and found.materializes:
                raise Unsupported(
                    f"{self.expression.notation()} cannot be chosen for each example: it has no plan for a "
                    "layer of this kind. Make one choice for a call."
                )
            if len(self._plans) >= MAX_KEPT:
                self._plans.clear()
            self._plans[key] = found
        return found


def planner_of(view: keras.Variable) -> Planner | None:
    """The planner of what a layer holds as its weight, or `None` if there is nothing to plan."""
    if not _is_planned(view):
        return None
    planner: Planner | None = view.planner
    if planner is None or planner.expression is not view.expression:
        planner = view.planner = Planner(view.expression)
    return planner


def _is_planned(view: keras.Variable) -> bool:
    if not isinstance(view, View) or is_view(view.expression) or not keras_seam.autocasts(view):
        return False
    return view.expression.shape is not None


@keras_seam.found_once
def _number_of_plan(number: int, place: int | None, *asked: Any) -> int:
    """Makes the plan for a kind of call of a view, or of one of its pieces, and lets the view have it by its number."""
    view = views[number]
    planner = planner_of(view)
    if planner is None:
        raise TypeError("A view that nothing is planned for was asked for its plan.")
    plan = (planner if place is None else planner.pieces[place][0]).find(*asked)
    found = planner.numbers.setdefault(id(plan), len(planner.numbers))
    setattr(view, f"plan_{found}", plan)
    return found


@keras_seam.found_once
def _count_of_pieces(number: int) -> int:
    """How many pieces a view has, which it gets under their numbers."""
    view = views[number]
    planner = planner_of(view)
    if planner is None:
        raise TypeError("A view that nothing is planned for was asked for its pieces.")
    for place, (piece, dropout) in enumerate(planner.pieces):
        setattr(view, f"piece_{place}", (piece.expression, piece.weights, dropout))
    return len(planner.pieces)


def refuse_axes(problem: Problem) -> None:
    """Refuses a choice whose axes are not those of examples.

    Raises:
        Unsupported: The weight is applied along an axis that the choice has, or the layer's output lacks it.
    """
    axes = problem.inputs[: problem.chosen]
    if len(axes) < problem.chosen or any(axis in problem.kernel or axis not in problem.outputs for axis in axes):
        rows = sum(1 for axis in problem.inputs if axis not in problem.kernel)
        raise Unsupported(
            f"A choice for each example has the leading axes of the layer's input, here {rows} at most: those that the "
            f"weight is not applied along. {received(axes_of_choice=problem.chosen, input_shape=problem.sizes)}"
        )


def _chosen_now(choices: tuple[Choice, ...], x: Tensor) -> tuple[int, int, bool]:
    """How many axes the choice has that examples make for themselves, which it is, and whether they mix options."""
    found = bound_for_each(choices) if choices else None
    if found is None:
        return 0, 0, False
    choice, bound = found
    mixed = keras_seam.is_float(keras_seam.tensor_dtype(bound))
    sizes = tuple(bound.shape)[: len(bound.shape) - mixed]
    for size, of_input in zip(sizes, x.shape, strict=False):
        if isinstance(size, int) and isinstance(of_input, int) and size != of_input:
            raise ShapeMismatch(
                f"A choice for each example has the leading axes of the layer's input, {tuple(x.shape)}. "
                f"{received(shape=tuple(bound.shape))}"
            )
    return len(sizes), choices.index(choice), mixed


def _kind_of_call(
    view: View, x: Tensor, weights: tuple[Stored, ...], choices: tuple[Choice, ...]
) -> tuple[Shape, str, bool, bool, tuple[bool, ...], Mode, bool, tuple[int, int, bool]]:
    """What tells calls with other plans apart, as plain values: the last arguments of `Planner.find`."""
    live = view.use.live
    training = control.assumed_training()
    if training is None:
        training = keras_seam.is_training_call()
        if not training and keras_seam.may_differentiate():
            stored = [keras_seam.raw_value(weight.variable) for weight in weights]
            training = keras_seam.is_differentiated(x, *stored)
    shape = keras_seam.known_sizes(x)
    flags = tuple([weight.trainable for weight in weights]) if training and live else ()
    return shape, view.dtype, training, live, flags, control.mode(), remembers(), _chosen_now(choices, x)


def applied(
    view: keras.Variable,
    x: Tensor,
    problem: MakeProblem,
    convolve: Convolve | None = None,
    settings: tuple[object, ...] = (),
    whole: Whole | None = None,
) -> Tensor | None:
    """What the layer computes with its weight, by plan; `None` where the layer has to build the weight itself.

    Args:
        view: What the layer has as its weight.
        x: The layer's input.
        problem: Says what the layer computes, for a shape of the input: a function of a module, told apart by itself.
        convolve: The layer's own convolution with a kernel.
        settings: More for `problem`: plain values, by which plans are told apart too.
        whole: What the layer computes of an input and a weight that is built, for the kinds of layers that apply a
            dropout on the input of a part. In the axes of the problem's outputs.
    """
    if keras_seam.is_compiling():
        if not _is_planned(view):
            return None
        if whole is not None and keras_seam.is_training_call() and _count_of_pieces(view.number):
            return _by_pieces(view, x, None, problem, convolve, settings, whole)
        kind = _kind_of_call(view, x, view.expression.weights_used(), choices_in(view.expression))
        plan = getattr(view, f"plan_{_number_of_plan(view.number, None, problem, settings, *kind)}")
    else:
        planner = planner_of(view)
        if planner is None:
            return None
        now = without_what_is_off(planner.expression)
        if now is not planner.expression:
            planner = planner.of(now)
            if planner is None:
                return None
        if whole is not None and _drops() and planner.pieces:
            return _by_pieces(view, x, planner, problem, convolve, settings, whole)
        kind = _kind_of_call(view, x, planner.weights, planner.choices)
        plan = planner.find(problem, settings, *kind)
        control.note_plan(lambda: Noted(view.path, view.expression.notation(), kind[0], plan))
    if plan.materializes or (keras_seam.is_sparse(x) and not plan.takes_sparse):
        return None
    return _carried_out(view, plan, x, convolve)


def _carried_out(view: View, plan: Plan, x: Tensor, convolve: Convolve | None) -> Tensor:
    if plan.choice is not None:
        return execute(plan, x, _read_for_each(view, plan, x), convolve)
    factors = [
        None
        if read is None
        else _value(view, read[0].expression, view.dtype, read[1], once if read[0].how == "once" else evaluate)
        for read in plan.reads
    ]
    return execute(plan, x, factors, convolve)


def _read_for_each(view: View, plan: Plan, x: Tensor) -> list[Tensor]:
    """The factors of a plan, as they are read where examples choose for themselves."""
    found = None if plan.choice is None else bound_for_each([plan.choice])
    if found is None:
        raise TypeError("A plan for choices of examples was asked for where there are none.")
    choice, bound = found
    values: list[Tensor] = [None] * len(plan.reads)
    options: list[int] = []
    for place, read in enumerate(plan.reads):
        if read is None:
            continue
        (expression, how), coded_as = (read[0].expression, read[0].how), read[1]
        if how in ("value", "once"):
            values[place] = _value(view, expression, view.dtype, coded_as, once if how == "once" else evaluate)
        elif how == "numbers":
            values[place] = bound
        elif how == "rows":
            if plan.gradient is None:
                values[place] = _in_place(view, expression, choice, bound, x)
            if values[place] is None:
                values[place] = _of_each(view, expression, rows, choice, bound)
        elif how in ("options", "table"):
            values[place] = _value(view, expression, view.dtype, None, functools.partial(for_options, choice=choice))
            options += [place] if how == "options" else []
    kept, bad = without_bad([values[place] for place in options]) if options else ([], None)
    for place, value in zip(options, kept, strict=True):
        values[place] = value
    for place, read in enumerate(plan.reads):
        if read is not None and read[0].how == "weights":
            values[place] = weights_of_choice(choice, bound, bad, view.dtype)
    return values


def _in_place(view: View, expression: Expression, choice: Choice, bound: Tensor, x: Tensor) -> Entries | None:
    """The entries of a stored stack, where a product with one row of each example reads them without a copy."""
    is_one_row = x.shape[1:-1] in ((), (1,)) and len(bound.shape) == 1
    if not is_one_row or not expression.dtype == view.dtype == "float32" or not is_stack(expression, choice):
        return None
    if not keras_seam.reads_entries_in_place(x) or not are_options(choice, bound):
        return None
    return Entries(_value(view, expression, view.dtype, None, functools.partial(for_options, choice=choice)), bound)


def _drops() -> bool:
    """Whether parts have a dropout on their input now, or a plan is asked for as if they had."""
    return keras_seam.is_training_call() or bool(control.assumed_training())


def _by_pieces(
    view: View,
    x: Tensor,
    planner: Planner | None,
    problem: MakeProblem,
    convolve: Convolve | None,
    settings: tuple[object, ...],
    whole: Whole,
) -> Tensor:
    """The sum of what the layer computes with each term of its weight: with dropout on the input of those that have it.

    Without a planner, `torch.compile` reads this: it asks for numbers, and finds the rest at the view.
    """
    total: Tensor | None = None
    for place in range(_count_of_pieces(view.number) if planner is None else len(planner.pieces)):
        if planner is None:
            expression, weights, dropout = getattr(view, f"piece_{place}")
        else:
            piece, dropout = planner.pieces[place]
            expression, weights = piece.expression, piece.weights
        given = x if dropout is None or control.assumed_training() else dropout.dropped(x)
        kind = _kind_of_call(view, given, weights, choices_in(expression))
        if planner is None:
            plan = getattr(view, f"plan_{_number_of_plan(view.number, place, problem, settings, *kind)}")
        else:
            plan = piece.find(problem, settings, *kind)
            control.note_plan(functools.partial(Noted, view.path, expression.notation(), kind[0], plan))
        if plan.materializes or (keras_seam.is_sparse(given) and not plan.takes_sparse):
            y = whole(given, _value(view, expression, view.dtype, None))
        else:
            y = _carried_out(view, plan, given, convolve)
        total = y if total is None else keras_seam.add(total, y)
    return total


def _value(
    view: View,
    factor: Expression,
    dtype: str,
    how: Coded | None,
    read: Callable[[Expression], Tensor] = evaluate,
) -> Tensor:
    """A factor as the view would read it: in the view's dtype, without a gradient if the use has none."""
    if how is not None:
        return Integers(keras_seam.plain_tensor(view.read(how.stored)), how, dtype)
    value = keras_seam.plain_tensor(view.read(factor, read))
    if keras_seam.tensor_dtype(value) != dtype:
        value = keras.ops.cast(value, dtype)
    return value if view.use.live else keras.ops.stop_gradient(value)


# --------------------------------------------------------------------------- matrix products
# Dense and EinsumDense: inputs times a kernel.


Shape = tuple[int | None, ...]


def dense_problem(shape: Shape, **call: Any) -> Problem:
    """Rows of any number of axes times a matrix."""
    rows = tuple(f"b{axis}" for axis in range(len(shape) - 1))
    return Problem((*rows, "i"), ("i", "o"), (*rows, "o"), shape, **call)


@functools.lru_cache(maxsize=1024)
def einsum_problem(equation: str) -> Callable[..., Problem]:
    """The problem of an equation such as `"abc,cd->abd"`, which may begin with `...`."""

    def problem(shape: Shape, **call: Any) -> Problem:
        inputs, kernel, output = letters_of(equation)
        extra = tuple(f"b{axis}" for axis in range(len(shape) - len(inputs.replace("...", ""))))
        return Problem(_letters(inputs, extra), tuple(kernel), _letters(output, extra), shape, **call)

    return problem


def _letters(part: str, extra: tuple[str, ...]) -> tuple[str, ...]:
    before, dots, after = part.partition("...")
    return (*before, *(extra if dots else ()), *after)


def _finished(layer: keras.Layer, y: Tensor) -> Tensor:
    if layer.bias is not None:
        y = keras_seam.add(y, _beside(layer.bias, y))
    return y if layer.activation is None else layer.activation(y)


def _tensor(weight: Tensor) -> Tensor:
    return weight.value if isinstance(weight, keras.Variable) else weight


def chosen_for_each(view: object) -> tuple[View, Choice, Tensor] | None:
    """A view whose weight examples choose for themselves now, the choice, and what it is bound to."""
    if not isinstance(view, View) or is_view(view.expression):
        return None
    found = bound_for_each(choices_in(view.expression))
    return None if found is None else (view, *found)


def _beside(weight: Tensor, y: Tensor, own: Sequence[int] | None = None) -> Tensor:
    """The value of a weight, so that it goes with a result: with an axis for each of the result's, if rows choose it.

    Args:
        weight: What the layer has as its weight.
        y: The result.
        own: The axes of the result that the weight has; left out, the last ones.
    """
    found = chosen_for_each(weight)
    if found is None:
        return _tensor(weight)
    view, choice, bound = found
    mixed = keras_seam.is_float(keras.backend.standardize_dtype(bound.dtype))
    axes, rank = len(bound.shape) - mixed, len(y.shape)
    own = range(rank - len(view.shape), rank) if own is None else [axis % rank for axis in own]
    _chosen_now((choice,), y)
    if axes > min(own):
        raise Unsupported(
            f"A choice for each example has the leading axes of the layer's input, up to those of {view.path}. "
            f"{received(axes_of_choice=axes, weight_axes=tuple(own))}"
        )
    value = keras.ops.cast(_of_each(view, view.expression, whole_rows, choice, bound), y.dtype)
    sizes = [view.shape[list(own).index(axis)] if axis in own else 1 for axis in range(axes, rank)]
    return keras.ops.reshape(value, (*keras.ops.shape(value)[:axes], *sizes))


def _is_quicker_here(inputs: Tensor) -> bool:
    """Whether the product is computed here where the weight is built, and not by Keras's own call."""
    return keras_seam.RUNS_FROM_PYTHON and not keras_seam.is_sparse(inputs)


def dense_call(base: type[keras.Layer]) -> Function:
    """`Dense.call` with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, inputs: Tensor, training: object = None) -> Tensor:
        y = applied(self.kernel, inputs, dense_problem, whole=keras_seam.matmul)
        if y is None and (_is_quicker_here(inputs) or chosen_for_each(self.bias)):
            y = keras_seam.matmul(inputs, _tensor(self.kernel))
        return base.call(self, inputs, training=training) if y is None else _finished(self, y)

    return call


def einsum_dense_call(base: type[keras.Layer]) -> Function:
    """`EinsumDense.call` with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, inputs: Tensor, training: object = None) -> Tensor:
        einsum = functools.partial(keras.ops.einsum, self.equation)
        y = applied(self.kernel, inputs, einsum_problem(self.equation), whole=einsum)
        if y is None and (_is_quicker_here(inputs) or chosen_for_each(self.bias)):
            y = keras.ops.einsum(self.equation, inputs, self.kernel)
        return base.call(self, inputs, training=training) if y is None else _finished(self, y)

    return call


# --------------------------------------------------------------------------- lookups
# Embedding and ReversibleEmbedding: rows of a table, which is looked up before it is multiplied.


def lookup_problem(shape: Shape, **call: Any) -> Problem:
    """Numbers of any shape, and the rows of a table."""
    rows = tuple(f"b{axis}" for axis in range(len(shape)))
    return Problem(rows, ("v", "d"), (*rows, "d"), shape, lookup=True, **call)


def logits_problem(shape: Shape, **call: Any) -> Problem:
    """Rows times the transposed table."""
    rows = tuple(f"b{axis}" for axis in range(len(shape) - 1))
    return Problem((*rows, "d"), ("v", "d"), (*rows, "v"), shape, **call)


def _rows(layer: keras.Layer, inputs: Tensor) -> Tensor:
    if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
        inputs = keras.ops.cast(inputs, "int32")
    y = applied(layer.embeddings, inputs, lookup_problem)
    return y if y is None else keras.ops.cast(y, layer.compute_dtype)


def embedding_call(base: type[keras.Layer]) -> Function:
    """`Embedding.call` with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, inputs: Tensor) -> Tensor:
        y = _rows(self, inputs)
        return base.call(self, inputs) if y is None else y

    return call


def reversible_call(base: type[keras.Layer]) -> Function:
    """`ReversibleEmbedding.call`, both ways with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, inputs: Tensor, reverse: bool = False) -> Tensor:
        if not reverse:
            y = _rows(self, inputs)
            if y is None:
                return base.call(self, inputs)
            mask = keras.layers.Embedding.compute_mask(self, inputs)
            if mask is not None:
                keras_seam.set_mask(y, mask)
            return y
        table = self.embeddings if self.tie_weights else self.reverse_embeddings
        problem = logits_problem if self.tie_weights else dense_problem
        y = applied(table, inputs, problem) if self.reverse_dtype is None else None
        if y is None:
            return base.call(self, inputs, reverse=True)
        cap = self.logit_soft_cap
        return y if cap is None else keras.ops.multiply(keras.ops.tanh(keras.ops.divide(y, cap)), cap)

    return call


# --------------------------------------------------------------------------- convolutions
# Convolutions: channels mixed by the factors of a low-rank kernel, before or after the layer's own convolution.


def convolution_call(base: type[keras.Layer]) -> Function:
    """`call` of a convolution without groups."""

    def call(self: keras.Layer, inputs: Tensor) -> Tensor:
        y = None if self.groups != 1 else _convolved(self, inputs, keras.ops.conv)
        return base.call(self, inputs) if y is None else _finished_convolution(self, y, self.filters)

    return call


def depthwise_call(base: type[keras.Layer]) -> Function:
    """`call` of a convolution of each channel by itself."""

    def call(self: keras.Layer, inputs: Tensor) -> Tensor:
        each, of_each = int(self.kernel.shape[-2]), int(self.kernel.shape[-1])
        y = _convolved(self, inputs, keras.ops.depthwise_conv, (each, of_each))
        if y is None:
            return base.call(self, inputs)
        return _finished_convolution(self, _channels(self, y, (each * of_each,), 2), each * of_each)

    return call


def _channels(layer: keras.Layer, y: Tensor, sizes: tuple[int, ...], instead_of: int) -> Tensor:
    """A result with its axes of channels in other sizes."""
    shape = list(keras.ops.shape(y))
    place = len(shape) - instead_of if layer.data_format == "channels_last" else 1
    return keras.ops.reshape(y, [*shape[:place], *sizes, *shape[place + instead_of :]])


def _convolved(layer: keras.Layer, x: Tensor, operation: Function, depthwise: tuple[int, int] | None = None) -> Tensor:
    causal, last = layer.padding == "causal", layer.data_format == "channels_last"
    width = layer.dilation_rate[0] * (layer.kernel_size[0] - 1) if causal else 0

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        if width:  # zeros stay zeros when channels are mixed
            x = keras.ops.pad(x, [[0, 0], [width, 0], [0, 0]] if last else [[0, 0], [0, 0], [width, 0]])
        return operation(
            x,
            kernel,
            strides=layer.strides if depthwise else list(layer.strides),  # as Keras does, and TensorFlow wants
            padding="valid" if causal else layer.padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )

    def whole(x: Tensor, kernel: Tensor) -> Tensor:
        y = convolve(x, kernel)
        return y if depthwise is None else _channels(layer, y, depthwise, 1)

    sizes = (layer.strides, layer.kernel_size, layer.dilation_rate)
    settings = (*sizes, layer.padding == "valid", layer.data_format, depthwise is not None)
    y = applied(layer.kernel, x, convolution_problem, convolve, settings, whole)
    return whole(x, _tensor(layer.kernel)) if y is None and layer.use_bias and chosen_for_each(layer.bias) else y


def convolution_problem(
    shape: Shape,
    strides: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation_rate: tuple[int, ...],
    shrinks: bool,
    data_format: str,
    depthwise: bool,
    **call: Any,
) -> Problem:
    """A convolution with a stride, a size and a dilation for each position; one without padding `shrinks`."""
    rank, last = len(strides), data_format == "channels_last"
    places, made, taps = ([f"{letter}{axis}" for axis in range(rank)] for letter in "spk")
    positions = tuple(
        None if size is None else (size - 1 - shrinks * dilation * (taken - 1)) // stride + 1
        for size, stride, taken, dilation in zip(
            shape[1:-1] if last else shape[2:], strides, kernel_size, dilation_rate, strict=True
        )
    )
    ends = ("i", "o") if depthwise else ("o",)
    inputs = ("b", *places, "i") if last else ("b", "i", *places)
    outputs = ("b", *made, *ends) if last else ("b", *ends, *made)
    return Problem(inputs, (*taps, "i", "o"), outputs, shape, convolution=Convolution(positions, depthwise), **call)


def _finished_convolution(layer: keras.Layer, y: Tensor, channels: int) -> Tensor:
    if layer.use_bias:
        ones, last = (1,) * layer.rank, layer.data_format == "channels_last"
        if chosen_for_each(layer.bias):
            y = keras.ops.add(y, _beside(layer.bias, y, [-1 if last else 1]))
        else:
            shape = (1, *ones, channels) if last else (1, channels, *ones)
            y = keras.ops.add(y, keras.ops.reshape(layer.bias, shape))
    return y if layer.activation is None else layer.activation(y)


# --------------------------------------------------------------------------- recurrent cells
# Cells of recurrent layers: what their time loop computes at each step.


def step_problem(shape: Shape, **call: Any) -> Problem:
    """Rows times a matrix, at each step of a loop."""
    return Problem(("b", "i"), ("i", "o"), ("b", "o"), shape, repeated=True, **call)


def _projected(cell: keras.Layer, x: Tensor, h: Tensor, training: object) -> tuple[Tensor, Tensor] | None:
    """The input and the state, each times its kernel; `None` if both kernels are to be built, or the cell drops out."""
    if training and (cell.dropout > 0 or cell.recurrent_dropout > 0):
        return None
    of_x, of_h = applied(cell.kernel, x, step_problem), applied(cell.recurrent_kernel, h, step_problem)
    if of_x is None and of_h is None:
        return None
    return (
        keras.ops.matmul(x, cell.kernel) if of_x is None else of_x,
        keras.ops.matmul(h, cell.recurrent_kernel) if of_h is None else of_h,
    )


def _biases(bias: Tensor, y: Tensor) -> Tensor:
    """The two biases of a cell with two, each so that it goes with a result."""
    if not chosen_for_each(bias):
        return bias
    return keras.ops.moveaxis(_beside(bias, keras.ops.expand_dims(y, 1)), 1, 0)


def lstm_cell_call(base: type[keras.Layer]) -> Function:
    """`LSTMCell.call` with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, inputs: Tensor, states: Tensor, training: bool = False) -> Tensor:
        found = _projected(self, inputs, states[0], training)
        if found is None:
            return base.call(self, inputs, states, training=training)
        z = keras.ops.add(*found)
        if self.use_bias:
            z = keras.ops.add(z, _beside(self.bias, z))
        i, f, new, o = keras.ops.split(z, 4, axis=-1)
        c = self.recurrent_activation(f) * states[1] + self.recurrent_activation(i) * self.activation(new)
        h = self.recurrent_activation(o) * self.activation(c)
        return h, [h, c]

    return call


def gru_cell_call(base: type[keras.Layer]) -> Function:
    """`GRUCell.call`, with the reset gate after the product."""

    def call(self: keras.Layer, inputs: Tensor, states: Tensor, training: bool = False) -> Tensor:
        nested = isinstance(states, (list, tuple))
        before = states[0] if nested else states
        found = _projected(self, inputs, before, training) if self.reset_after else None
        if found is None:
            return base.call(self, inputs, states, training=training)
        of_x, of_h = found
        if self.use_bias:
            of_both = _biases(self.bias, of_x)
            of_x, of_h = keras.ops.add(of_x, of_both[0]), keras.ops.add(of_h, of_both[1])
        x_update, x_reset, x_new = keras.ops.split(of_x, 3, axis=-1)
        h_update, h_reset, h_new = keras.ops.split(of_h, 3, axis=-1)
        update = self.recurrent_activation(x_update + h_update)
        reset = self.recurrent_activation(x_reset + h_reset)
        h = update * before + (1 - update) * self.activation(x_new + reset * h_new)
        return h, [h] if nested else h

    return call


def simple_cell_call(base: type[keras.Layer]) -> Function:
    """`SimpleRNNCell.call` with its weight applied by plan, if that is cheaper."""

    def call(self: keras.Layer, sequence: Tensor, states: Tensor, training: bool = False) -> Tensor:
        nested = isinstance(states, (list, tuple))
        found = _projected(self, sequence, states[0] if nested else states, training)
        if found is None:
            return base.call(self, sequence, states, training=training)
        h = keras.ops.add(*found)
        if self.bias is not None:
            h = keras.ops.add(h, _beside(self.bias, h))
        if self.activation is not None:
            h = self.activation(h)
        return h, [h] if nested else h

    return call


# --------------------------------------------------------------------------- normalizations
# What a normalization multiplies with and adds, where examples choose it: the layer's own call has ones and zeros then.


def normalization_call(base: type[keras.Layer]) -> Function:
    """`call` of a normalization, with its scale and shift for each example where a choice says so."""

    def call(self: keras.Layer, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale, shift = getattr(self, "gamma", None), getattr(self, "beta", None)
        if scale is None and isinstance(getattr(self, "scale", None), keras.Variable):
            scale = self.scale  # of RMSNormalization
        found = chosen_for_each(scale) or chosen_for_each(shift)
        if found is None:
            return base.call(self, inputs, *args, **kwargs)
        _, choice, bound = found
        axis = getattr(self, "axis", -1)
        own = sorted(each % len(inputs.shape) for each in (axis if isinstance(axis, (list, tuple)) else [axis]))
        with standing_in((view, number) for view, number in ((scale, 1.0), (shift, 0.0)) if isinstance(view, View)):
            y = base.call(self, inputs, *args, **kwargs)
        added = _along(shift, y, own) if isinstance(shift, keras.Variable) else 0.0
        if chosen_for_each(scale):
            y = y if isinstance(shift, View) else keras.ops.subtract(y, added)
            y = keras.ops.add(keras.ops.multiply(y, _along(scale, y, own)), added)
        else:
            y = y if not isinstance(scale, View) else keras.ops.multiply(y, _along(scale, y, own))
            y = keras.ops.add(y, added)
        if choice.none is None or hasattr(self, "moving_mean") or keras_seam.is_float(keras_seam.tensor_dtype(bound)):
            return y
        with bind({choice: -1}):  # to the last bit
            of_base = base.call(self, inputs, *args, **kwargs)
        return where_option(bound, len(choice.choices), y, of_base)

    return call


def _along(weight: keras.Variable, y: Tensor, own: Sequence[int]) -> Tensor:
    if chosen_for_each(weight):
        return _beside(weight, y, own)
    sizes = [weight.shape[own.index(axis)] if axis in own else 1 for axis in range(len(y.shape))]
    return keras.ops.cast(keras.ops.reshape(_tensor(weight), sizes), y.dtype)


# --------------------------------------------------------------------------- loops
# Weights of a cell are computed once, before the loop over time, and not at each of its steps.


def _hold(cell: keras.Layer) -> None:
    """Computes the cell's composite weights now, outside the time loop that is about to run."""
    state = state_of(cell)
    if state is None or state.held:
        return
    casts = cell.compute_dtype != cell.variable_dtype and keras_seam.is_float(cell.compute_dtype)
    with keras_seam.AutocastScope(cell.compute_dtype) if casts else contextlib.nullcontext():
        state.held = [entry for slot in state.slots for entry in _held(cell, slot.view)]


def _held(cell: keras.Layer, view: View) -> list[Held]:
    """What a loop reads of a weight: its value; or what it reads for each example, if these choose for themselves."""
    found, planner = chosen_for_each(view), planner_of(view)
    if found is None or planner is None:
        return view.read(view.expression, hold)
    _, choice, bound = found
    if view is getattr(cell, "bias", None):
        value = _of_each(view, view.expression, whole_rows, choice, bound)
        return hold_for_each((whole_rows, view.number, view.expression), value)
    parts = {factor.expression for term in planner.products(True).terms for factor in term.factors}
    held: list[Held] = []
    for part in parts:
        if choice in choices_in(part):
            held += hold_for_each((rows, view.number, part), _of_each(view, part, rows, choice, bound))
    return held


def _of_each(view: View, part: Expression, read: Callable[..., Tensor], choice: Choice, bound: Tensor) -> Tensor:
    """What a function reads of a part for each example, in the view's dtype; as a loop holds it, if one does."""
    value = held_for_each((read, view.number, part))
    if value is None:
        value = _value(view, part, view.dtype, None, functools.partial(read, choice=choice, bound=bound))
    return value


def loop_hooks(base: type[keras.Layer]) -> dict[str, Any]:
    """An RNN asks its cell for a dropout mask before its loop, and takes it back after."""

    def get_dropout_mask(self: keras.Layer, step_input: object) -> Tensor:
        _hold(self)
        return base.get_dropout_mask(self, step_input)

    def reset_dropout_mask(self: keras.Layer) -> None:
        state = state_of(self)
        if state is not None:
            release(state.held)
            state.held = []
        base.reset_dropout_mask(self)

    return {"get_dropout_mask": get_dropout_mask, "reset_dropout_mask": reset_dropout_mask}


def holding(get_initial_state: Function) -> Function:
    """A cell of the user's own has one call before the loop: the one for its first state."""

    def held_state(self: keras.Layer, *args: Any, **kwargs: Any) -> Tensor:
        state = state_of(self)
        if state is not None:
            state.held = []
            _hold(self)
            state.held = []
        return get_initial_state(self, *args, **kwargs)

    return held_state


# --------------------------------------------------------------------------- which kind has which
# An applier replaces one method of a tied layer, and only where the layer's class has Keras's own: a user's subclass
# with a `call` of its own keeps it. What the layer does beside the product (bias, activation, precision) is written
# as Keras does it.


APPLIERS: dict[str, Callable[[type], Function]] = {
    "dense": dense_call,
    "einsum_dense": einsum_dense_call,
    "embedding": embedding_call,
    "reversible": reversible_call,
    "convolution": convolution_call,
    "depthwise": depthwise_call,
    "lstm_cell": lstm_cell_call,
    "gru_cell": gru_cell_call,
    "simple_cell": simple_cell_call,
    "normalization": normalization_call,
}
"""By the names that they have in the table of kinds."""


def planned_call(base: type[keras.Layer]) -> Function | None:
    """A `call` that applies combined weights by plan, or `None` for a class that has no applier."""
    name = kind_of(base, "call").applier
    if not name:
        return None
    call = APPLIERS[name](base)
    call.__doc__ = base.call.__doc__
    return call


__all__ = ["APPLIERS", "applied", "planned_call"]

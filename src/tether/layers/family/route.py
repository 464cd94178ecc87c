"""Weights that are chosen: for a call, for each example of a batch, or for each token."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import keras

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, did_you_mean, received
from tether.layers.depth.bank import StackedWeight, as_options, followers, origins_of, with_number, zipped
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import arguments_in, slots_of
from tether.layers.tying.swap import become_all
from tether.layers.tying.tie import tie
from tether.types import AnyLayer, Config, Tensor
from tether.weights.algebra import split_sum, terms_of
from tether.weights.expression import Expression, Shape, Stored, as_expression, program
from tether.weights.leaves import Argument, Choice, bind
from tether.weights.operators.choice import Choose, Routed
from tether.weights.weight import Weight

FEW_OPTIONS = 8
"""So many options are stored as they are. Of more that are of one form the weights in which they differ are stacked."""
NONE = "none"
"""What -1 is called."""


def route(
    layer: AnyLayer,
    options: Mapping[str, object] | None = None,
    /,
    *,
    base: object = None,
    default: object = 0,
    argument: str = "choice",
    train: Iterable[str | int] | None = None,
    **by_name: object,
) -> AnyLayer:
    """Gives weights of a layer several expressions, one of which is chosen: for a call, an example or a token.

    Afterwards the layer's call takes the choice as a keyword. `layer(x, choice=1)` chooses for the whole call;
    `layer(x, choice=[0, 2, 1, 1])` for each example of a batch of four, and an array of shape `(batch, tokens)` for
    each token: what all options have in common is then computed once for the batch, and the rest for each. An array of
    floats of shape `(batch, options)` has the weights of a mixture for each example.

    -1, or `"none"`, is the base: what the options have in common (`w` of `w + tether.low_rank(8)`), or what `base`
    says. In a compiled graph a number that is none of the options is the base too (NaN, where there is no base); where
    it is known it is an error.

    An option that was not chosen in a step gets a gradient of zero, on every backend; it is a live weight all the
    same, so an optimizer with weight decay or momentum goes on changing it. With `train` the weights of the other
    options are frozen and stored apart, so that no optimizer touches them or keeps anything for them.

    Args:
        layer: A Keras layer or model, built or not. Changed in place.
        options: The options by the weight's path, for names that are not identifiers or that this function has.
        base: What -1 is: an expression, or a dict of them by the weight's path. Left out, what is the base of every
            option; if they have none in common, one of the options must be chosen.
        default: The choice where a call makes none, as `fit` and `predict` do: a number, a name or a bool.
        argument: What the keyword of the call is named.
        train: The options that train, by name or number: `["french"]`, or none of them with `[]`. The weights in which
            the options differ become two banks, one that trains and one that is frozen. Left out, they train as they
            did. What options have in common is as it was either way.
        **by_name: The options by the weight's name: a list of expressions, or a dict of them by name. With names
            the choice may be one of them. Options in a list are named after the weights that they are, if each is
            one. All weights of one `route` have equally many options. More than 8 of one form become a bank
            (`tether.bank`): the weights in which they differ are stored stacked, and a graph is compiled as quickly as
            for two. Of low-rank parts the ranks may differ then: the thinner ones are filled up with zeros.

    Returns:
        The same layer. For each example can be chosen for the kernels and biases of Dense, EinsumDense and Conv1D to
        Conv3D, tables of embeddings, the weights of recurrent cells, and the scales and shifts of normalizations; other
        layers take one choice for a call.

    Raises:
        TetherError: Options that do not match each other, or a default that is none of them.
        ShapeMismatch: The options of one weight have different shapes, or not the weight's.

    Example:
    ```python
    base = tether.Weight((8, 64), "glorot_uniform", name="base")
    french = tether.Weight((8, 64), "zeros", name="french")
    layer = tether.route(keras.layers.Dense(64), kernel={"base": base, "french": base + french})
    y = layer(np.ones((2, 8), "float32"), choice="french")
    y = layer(np.ones((2, 8), "float32"), choice=[1, -1])  # french, and the base alone
    ```
    """
    given = {**(options or {}), **by_name}
    if not given:
        raise TetherError(
            "`route` needs options for at least one weight, as in `route(layer, kernel=[parent, own])`. "
            f"{received(layer=layer)}"
        )
    listed = {path: _listed(path, found) for path, found in given.items()}
    names = next(iter(listed.values()))[0]
    for path, (others, _) in listed.items():
        if len(others) != len(names) or (all(map(_is_a_name, (*others, *names))) and others != names):
            raise TetherError(
                f"One choice decides for all weights of the layer, so all have the same options: "
                f"{next(iter(listed))!r} has {', '.join(names)}. {received(**{path: others})}"
            )
    named = next((found for found, _ in listed.values() if all(map(_is_a_name, found))), names)
    expressions = {path: as_options(found) for path, (_, found) in listed.items()}
    bases = {path: _base_of(path, found, base, len(listed)) for path, found in expressions.items()}
    learning = None if train is None else _places(train, named)
    none = NONE if all(each is not None for each in bases.values()) and NONE not in named else None
    number = Choice(argument, named, default=default, none=none)
    ties, stacked = {}, []
    for path, found in expressions.items():
        chosen, stacks = _chosen(number, found, learning)
        root = bases[path]
        ties[path] = chosen if root is None or none is None else Routed(number, root, chosen)
        stacked += stacks
    tie(layer, ties)
    become_all(followers(stacked), origins_of(stacked))
    return layer


# --------------------------------------------------------------------------- a model with the choice as an input


def routed(model: keras.Model, argument: str = "choice", *, choice: keras.KerasTensor | None = None) -> keras.Model:
    """A model over the same weights with one more input: the choice of each example, for all routed layers in it.

    So `fit`, `predict` and `evaluate` take a column of choices, and a model that is saved or exported has it as an
    input. Layers inside may be routed at any depth, by `tether.route` on the model or on each of them.

    Args:
        model: A functional or sequential model with routed layers.
        argument: The name of the choice, as it was given to `route`; the new input has it too.
        choice: Another input in the place of whole numbers of shape `(batch,)`: `keras.Input((None,), dtype="int32")`
            for a choice for each token, `keras.Input((options,))` for the weights of a mixture.

    Returns:
        The model. Its inputs are a dict, with the choice under its name, if those of the model are; else a list that
        ends with the choice.

    Raises:
        TetherError: No layer in the model is routed by this name, or the model's inputs are not known.

    Example:
    ```python
    weight = tether.weight_of(model, "head/kernel")
    tether.route(model, {"head/kernel": [weight.stop_gradient() + tether.low_rank(2) for _ in range(4)]})
    tasks = tether.routed(model)
    tasks.compile("adam", loss)
    tasks.fit([x, np.array([0, 1, 2, 3, -1, 0, 1, 2])], y, verbose=0)
    ```
    """
    refuse_layer("routed", model)
    if not isinstance(getattr(model, "inputs", None), list):
        raise TetherError(
            "`routed` needs a model whose inputs are known: a functional or a sequential one that is built. In a model "
            f"of your own hand the choice on: `layer(x, {argument}={argument})`. {received(model=model.name)}"
        )
    call = RoutedCall(model, argument, name=f"{model.name}_routed")
    number = keras.Input((), dtype="int32", name=argument) if choice is None else choice
    named = getattr(model, "input", None)  # a sequential model has the list alone
    given = named if isinstance(named, Mapping) else list(model.inputs)
    outputs = call(given if len(model.inputs) > 1 or isinstance(given, Mapping) else given[0], number)
    inputs = {**given, argument: number} if isinstance(given, Mapping) else [*given, number]
    return keras.Model(inputs, outputs, name=f"{model.name}_by_{argument}")


@keras.saving.register_keras_serializable(package="tether", name="RoutedCall")
class RoutedCall(keras.layers.Layer):
    """A call of a model in which all layers have the same choice: what `tether.routed` makes.

    Args:
        model: The model.
        argument: The name of the choice.
        **kwargs: As for any layer.
    """

    def __init__(self, model: keras.Model, argument: str = "choice", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model, self.argument = model, argument
        self._choices()

    def _choices(self) -> list[Argument]:
        found = [
            leaf
            for layer in keras_seam.contained_layers(self.model)
            for slot in slots_of(layer)
            for leaf in arguments_in(slot.view.expression)
        ]
        named = [leaf for leaf in dict.fromkeys(found) if leaf.name == self.argument]
        if not named:
            names = ", ".join(sorted({leaf.name for leaf in found})) or "none"
            raise TetherError(
                f"No layer in {self.model.name!r} takes a choice of this name; it has: {names}. Route its layers "
                f"first: `tether.route(model, {{'dense/kernel': [...]}})`. {received(argument=self.argument)}"
            )
        return named

    def build(self, inputs_shape: Any, choice_shape: Any) -> None:
        """The model is built already."""

    def call(self, inputs: Tensor, choice: Tensor) -> Tensor:
        """The model's outputs, each example with its choice."""
        with bind(dict.fromkeys(self._choices(), choice)):
            return self.model(inputs)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor) -> None:
        """The model has dealt with masks."""
        return

    def get_config(self) -> Config:
        """The model and the name."""
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "argument": self.argument,
        }

    @classmethod
    def from_config(cls, config: Config) -> RoutedCall:
        """Makes the layer again from what `get_config` wrote."""
        config = dict(config)
        return cls(keras.saving.deserialize_keras_object(config.pop("model")), **config)


# --------------------------------------------------------------------------- options


def _places(wanted: object, names: Sequence[str]) -> set[int]:
    """The numbers of options that are named.

    Raises:
        TetherError: One is none of the options.
    """
    if isinstance(wanted, (str, Mapping)) or not isinstance(wanted, Iterable):
        raise TetherError(f"`train` is a list of options, as in `train=[{names[0]!r}]`. {received(train=wanted)}")
    found = set()
    for each in wanted:
        place = names.index(each) if each in names else each
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(names):
            near = did_you_mean(str(each), names)
            raise TetherError(f"What trains are options, by name or number.{near} {received(train=each)}")
        found.add(place)
    return found


def _chosen(
    number: Choice, options: Sequence[Expression], train: Collection[int] | None
) -> tuple[Expression, list[StackedWeight]]:
    """One of several expressions by number: of one form by their weights, else by a switch of them all."""
    _refuse_shapes(options)
    if len(options) > 1:  # one of them may have an alpha that makes its scale 1, which is not written
        written = [with_number(option) for option in options]
        options = written if len({len(program(option)) for option in options}) > 1 else options
    if train is not None:
        return zipped(options, number, train=train)
    few = len(options) <= FEW_OPTIONS and len({tuple(map(_shape_of, each.weights_used())) for each in options}) == 1
    if len(options) > 1:
        try:
            return zipped(options, number, stored=not few)
        except TetherError:
            pass  # of several forms, or of weights that cannot be stacked
    return Choose(number, *options, strict=True), []


def _shape_of(weight: Stored) -> Shape | None:
    return weight.shape


def _refuse_shapes(options: Sequence[Expression]) -> None:
    shapes = [option.shape for option in options]
    known = {shape for shape in shapes if shape is not None}
    if len(known) > 1:
        each = ", ".join(f"{o.notation()} has shape {s}" for o, s in zip(options, shapes, strict=True))
        raise ShapeMismatch(f"What can be chosen must have one shape: {each}.")


def _base_of(path: str, options: Sequence[Expression], asked: object, count: int) -> Expression | None:
    """What -1 is for one weight: as it was asked for, or the base that all options have."""
    if isinstance(asked, Mapping):
        if path in asked:
            return as_expression(asked[path])
        unknown = [str(name) for name in asked]
        if count == 1:
            raise TetherError(f"The bases are given by the weights' paths, here {path!r}. {received(base=unknown)}")
    elif asked is not None:
        if count > 1:
            raise TetherError(
                "With options for several weights the base is a dict by their paths, as in "
                f"`base={{{path!r}: weight}}`. {received(base=asked)}"
            )
        return as_expression(asked)
    sums = [terms_of(option) for option in options]
    common = [term for term in sums[0] if term.shape == options[0].shape and all(term in terms for terms in sums[1:])]
    if common:
        return functools.reduce(operator.add, common)
    chains = [_bases_in(option) for option in options]
    return next((each for each in chains[0] if all(each in chain for chain in chains[1:])), None)


def _bases_in(expression: Expression) -> list[Expression]:
    """An expression, its base, the base of that, and so on."""
    found = [expression]
    while (split := split_sum(found[-1])) is not None and split.base is not found[-1]:
        found.append(split.base)
    return found


def _is_a_name(name: str) -> bool:
    return not name.isdigit()


def _listed(path: str, options: object) -> tuple[tuple[str, ...], list[object]]:
    """The names and expressions of one weight's options."""
    if isinstance(options, Mapping) and options and all(isinstance(name, str) and name for name in options):
        return tuple(options), list(options.values())
    if isinstance(options, (list, tuple)) and options:
        found = [option.name if isinstance(option, Weight) else "" for option in options]
        if "" in found or len(set(found)) < len(found):
            found = [str(place) for place in range(len(options))]
        return tuple(found), list(options)
    one = " To tie it to one expression use `tether.tie`." if isinstance(options, Expression) else ""
    raise TetherError(
        f"The options of {path!r} are a list of expressions, or a dict of them by name.{one}"
        f" {received(options=options)}"
    )


__all__ = ["route", "routed"]

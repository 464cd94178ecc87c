"""Each use's share of the gradient of a shared weight: whose part is large, whose points the other way."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, received
from tether.inspection.live import layer_path, unique_paths
from tether.layers.tying.state import WEIGHTS, View, slots_of, stored_variables
from tether.types import Array, Config, Tensor
from tether.weights.expression import Expression
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- a tensor for each reader
# Which part of a gradient came from whom: each reader of a stored variable is handed a tensor of its own.
#
# A weight's gradient is the sum over its uses. In one forward pass every use reads a tensor that equals the weight
# and is nobody else's, so one backward pass gives the share of each. A stateless scope hands the tensors out: it is
# asked for the value of a variable, knows who asks, and keeps every write away from the model.


@dataclass(frozen=True)
class Reader:
    """Who reads a stored variable: a view of it, or a layer that holds it."""

    owner: keras.Layer | View
    where: str
    """The layer and its own name for the weight, or the rest: what reads it and is none of them."""
    expression: str | None = None
    """What a view computes from it."""


ELSEWHERE = Reader(None, "elsewhere")
"""A regularizer of the stored weight, a soft tie, a function that captured the variable."""


def readers(model: object) -> dict[int, list[Reader]]:
    """The readers of each stored variable of a model, by the variable's id, in the order of its layers."""
    objects = list(keras_seam.saved_objects(model))
    names = {place: saveable.name for place, saveable in objects if isinstance(saveable, keras.layers.Layer)}
    places = {id(saveable): place for place, saveable in objects}
    found: dict[int, dict[int, Reader]] = {}
    for layer in keras_seam.contained_layers(model):
        if isinstance(layer, Weight):
            continue
        place = places.get(id(layer))
        path = layer.name if place is None else layer_path(place, names)
        for variable, owner, name, expression in _reads(layer):
            where = "/".join(part for part in (path, name) if part)
            found.setdefault(id(variable), {}).setdefault(id(owner), Reader(owner, where, expression))
    return {variable: list(of_variable.values()) for variable, of_variable in found.items()}


def _reads(layer: keras.Layer) -> Iterator[tuple[keras.Variable, keras.Layer | View, str, str | None]]:
    """What one layer reads by itself: the variable, who it is that reads, the layer's name for it, the expression."""
    for slot in slots_of(layer):
        for variable in stored_variables(slot.view):
            yield variable, slot.view, slot.view.use.name, slot.view.expression.notation()
    for variables in keras_seam.variable_lists(layer).values():
        for variable in variables:
            yield variable, layer, variable.name, None
    for name, value in keras_seam.attributes(layer):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in items if name != WEIGHTS else ():
            if isinstance(item, Weight) and item.is_built:
                yield item.variable, layer, name, item.notation()


class _HandedOut(keras.StatelessScope):
    """A scope in which the value of a variable depends on who reads it.

    Args:
        tensors: The tensor for each variable's id and reader's id; the one of the reader `None` is for the others.
    """

    def __init__(self, tensors: Mapping[tuple[int, int | None], Tensor]) -> None:
        super().__init__(collect_losses=True)
        self._tensors = tensors
        self._split = {variable for variable, reader in tensors if reader is not None}
        self._here = threading.local()

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        """What was assigned in the scope, or the tensor of the reader at work, or `None`."""
        assigned = super().get_current_value(variable)
        if assigned is not None:
            return assigned
        key = id(variable)
        if key in self._split:
            for reader in self._at_work():
                if (key, id(reader)) in self._tensors:
                    return self._tensors[key, id(reader)]
        return self._tensors.get((key, None))

    def _at_work(self) -> Iterator[keras.Layer | View]:
        view = getattr(self._here, "view", None)
        if view is not None:
            yield view
        yield from keras_seam.running_layers()

    def read(self, view: View, part: Expression, how: Callable[[Expression], Tensor] | None = None) -> Tensor:
        """In the place of `View.read`: notes who reads."""
        arguments = (part,) if how is None else (part, how)
        before = getattr(self._here, "view", None)
        self._here.view = view
        try:
            return View.read(view, *arguments)
        finally:
            self._here.view = before

    @contextlib.contextmanager
    def watching(self, views: Sequence[View]) -> Iterator[None]:
        """Lets these views say when they read."""
        for view in views:
            keras_seam.set_untracked(view, "read", functools.partial(self.read, view))
        try:
            yield
        finally:
            for view in views:
                object.__delattr__(view, "read")


@dataclass(frozen=True)
class Shares:
    """The gradient of one stored variable, by who read it; `None` where none came."""

    variable: keras.Variable
    readers: tuple[Reader, ...]
    gradients: tuple[Tensor | None, ...]


def shares(model: keras.Layer, loss_of: Callable[[], Tensor]) -> tuple[float, list[Shares]]:
    """The value of a loss, and its gradient to each variable of a model that trains, by reader.

    Args:
        model: A layer or model, built.
        loss_of: Computes a scalar by calls of the model.
    """
    known = readers(model)
    keys: list[tuple[int, int | None]] = []
    values: list[Tensor] = []
    asked: list[tuple[keras.Variable, list[Reader]]] = []
    for variable in model.trainable_variables:
        found = known.get(id(variable), [])
        split = [*found, ELSEWHERE] if len(found) > 1 else found or [ELSEWHERE]
        asked.append((variable, split))
        for reader in split:
            keys.append((id(variable), id(reader.owner) if len(split) > 1 and reader is not ELSEWHERE else None))
            values.append(keras_seam.raw_value(variable))
    views = [reader.owner for split in known.values() for reader in split if isinstance(reader.owner, View)]
    unique = list({id(view): view for view in views}.values())

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        scope = _HandedOut(dict(zip(keys, tensors, strict=True)))
        with scope, scope.watching(unique):
            return keras.ops.convert_to_tensor(loss_of())

    with keras_seam.undisturbed(model):
        value, gradients = _BACKWARD[keras.backend.backend()](loss, values)
    given = iter(gradients)
    return float(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))), [
        Shares(variable, tuple(split), tuple(next(given) for _ in split)) for variable, split in asked
    ]


# --------------------------------------------------------------------------- one backward pass

LossOf = Callable[[Sequence[Tensor]], Tensor]
Result = tuple[Tensor, Sequence[Tensor | None]]


def _jax(loss: LossOf, values: list[Tensor]) -> Result:
    import jax

    return jax.value_and_grad(loss)(values)


def _tensorflow(loss: LossOf, values: list[Tensor]) -> Result:
    import tensorflow as tf

    tensors = [tf.identity(value) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = loss(tensors)
    found = tape.gradient(value, tensors)
    return value, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]


def _torch(loss: LossOf, values: list[Tensor]) -> Result:
    import torch

    tensors = [value.detach().requires_grad_() for value in values]
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    # Dropout without a seed takes its numbers from PyTorch's own generator, which no scope keeps as it is.
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        value = loss(tensors)
    if not value.requires_grad:
        return value, [None] * len(tensors)
    return value.detach(), torch.autograd.grad(value, tensors, allow_unused=True)


_BACKWARD: dict[str, Callable[[LossOf, list[Tensor]], Result]] = {
    "jax": _jax,
    "tensorflow": _tensorflow,
    "torch": _torch,
}


# --------------------------------------------------------------------------- gradients
# How each use of a shared weight pulls at it: its share of the gradient, and whether the uses agree.


VERSION = 1
_CHUNK = 1 << 20
"""Numbers that are added up at a time, in double precision."""

Cosine = float | None
Loss = str | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class UseGradient:
    """The share of one use."""

    where: str
    """The layer and its name for the weight: `decode/kernel`. `elsewhere` is what comes through none: a regularizer
    of the stored weight, a soft tie, a function that captured the variable."""
    expression: str | None
    """What it reads, in mathematics; `None` for a variable of the layer's own."""
    norm: float
    cosine_to_total: Cosine
    """With the whole gradient of the weight; `None` if one of them is zero, or not finite."""


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of one stored weight."""

    norm: float
    """Of the whole gradient: the sum of the shares."""
    uses: tuple[UseGradient, ...]
    cosines: tuple[tuple[Cosine, ...], ...]
    """Between the shares, a row and a column for each use; `None` where one of them is zero, or not finite."""

    @property
    def lowest(self) -> tuple[Cosine, ...]:
        """For each use the lowest cosine with another one: below zero it pulls against it."""
        return tuple(
            min((value for place, value in enumerate(row) if place != own and value is not None), default=None)
            for own, row in enumerate(self.cosines)
        )


@dataclass(frozen=True)
class Gradients:
    """The gradient of a loss on one batch, by weight and use; prints as text, and is a table in a notebook.

    Attributes:
        name: The model's.
        of: Which loss it is the gradient of, in words.
        loss: Its value.
        weights: Every weight that trains, by the path of its variable.
    """

    name: str
    of: str
    loss: float
    weights: Mapping[str, WeightGradient]

    @property
    def shared(self) -> dict[str, WeightGradient]:
        """The weights with more than one use."""
        return {path: weight for path, weight in self.weights.items() if len(weight.uses) > 1}

    def to_json(self) -> Config:
        """All of it as what JSON can hold; a number that is not finite is `None`."""
        weights = {path: _plain(asdict(weight)) for path, weight in self.weights.items()}
        return {"version": VERSION, "name": self.name, "of": self.of, "loss": _plain(self.loss), "weights": weights}

    def _lines(self) -> list[tuple[str, ...]]:
        """The rows of the table: of a weight its path and norm, of a use that and its cosines."""
        rows: list[tuple[str, ...]] = []
        for path, weight in self.shared.items():
            rows.append((path, _number(weight.norm), "", ""))
            for use, lowest in zip(weight.uses, weight.lowest, strict=True):
                equation = use.where if use.expression is None else f"{use.where} = {use.expression}"
                rows.append((f"  {equation}", _number(use.norm), _number(use.cosine_to_total), _number(lowest)))
        return rows

    def _title(self) -> str:
        return f"{self.name}: gradient of {self.of}, which is {_number(self.loss)}"

    def _rest(self) -> str:
        others = [weight.norm for path, weight in self.weights.items() if path not in self.shared]
        if not others:
            return ""
        count = "The one weight that has" if len(others) == 1 else f"The {len(others)} weights that have"
        alone = "" if self.shared else " No weight has more."
        return f"{count} one use: norm {_number(math.hypot(*others))} together.{alone}"

    def __str__(self) -> str:
        lines = [self._title()]
        rows = self._lines()
        if rows:
            rows = [_HEADER, *rows]
            widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
            lines.append("")
            for row in rows:
                cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
                lines.append("  ".join((row[0].ljust(widths[0]), *cells)).rstrip())
        return "\n".join([*lines, *(["", self._rest()] if self._rest() else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{escape(cell)}</th>" for cell in _HEADER)
        body = ""
        for first, *numbers in self._lines():
            indent = len(first) - len(first.lstrip())
            name = f"<td style='text-align:left;padding-left:{1 + indent}em'>{escape(first.strip())}</td>"
            body += f"<tr>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in numbers)}</tr>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""
        return f"<p>{escape(self._title())}</p>{table}<p>{escape(self._rest())}</p>"


_HEADER = ("weight, and its uses", "norm", "cosine to the whole", "lowest to another use")


def gradients(model: object, x: Tensor, y: Tensor = None, *, loss: Loss | None = None) -> Gradients:
    """Each use's share of the gradient of a shared weight, on one batch.

    The gradient of a weight is the sum over its uses. A use whose share has a negative cosine with another's pulls
    the weight the other way; the norm of the whole grows with the uses as far as they agree, which is what a
    learning rate or a clipping by norm meets. A layer that is called several times (a block that is repeated, the
    steps of a time loop) is one use: its calls are summed. A variable that several layers hold without a tie has
    one use for each of them.

    The batch goes through the model once, as in a training step, and back. Nothing of the model changes: no weight,
    no moving average, no random state, no metric. It takes the memory of one gradient for each use.

    Args:
        model: A Keras model or layer that is built.
        x: One batch of inputs, as the model is called with: an array or tensor, or a list or dict of them.
        y: The targets. Without them the loss is of the outputs alone.
        loss: A function of `(y, y_pred)`, a Keras loss or its name; what it gives is averaged. Left out, it is the
            compiled loss if there are targets, or if `compile` was given no loss and layers add their own;
            otherwise the mean square of the outputs. Without targets `y` is `None` in a function's call. In every
            case the model's own losses are added, as in training: regularizers, soft ties, `add_loss`.

    Returns:
        The gradients of all weights that train, in `.weights` by path; the text lists those with several uses.

    Raises:
        TetherError: It is not a layer, it is not built, nothing in it trains, there is no loss for the targets, or
            the loss gives nothing.
        ShapeMismatch: `x` and `y` are not equally many examples.

    Example:
    ```python
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    found = tether.inspection.gradients(model, x, y, loss=loss)
    print(found)
    found.weights[table.path].cosines[0][1]                  # between the shares of its two uses
    ```
    """
    if not isinstance(model, keras.layers.Layer):
        raise TetherError(f"Gradients are those of a Keras model or layer. {received(model=type(model).__name__)}")
    if not model.built:
        raise TetherError(
            f"{model.name!r} is not built, so it has no weights yet. Build it by a call on data, or by "
            "`model.build(input_shape)`."
        )
    if not model.trainable_variables:
        raise TetherError(f"Nothing in {model.name!r} trains, so no weight has a gradient.")
    x, y = _tensors(x, "x"), None if y is None else _tensors(y, "y")
    examples, targets = _count(x), _count(y)
    if None not in (examples, targets) and examples != targets:
        raise ShapeMismatch(f"A batch has as many targets as inputs. {received(x=examples, y=targets)}")
    words, of = _loss_of(model, x, y, loss)
    training = {"training": True} if "training" in keras_seam.call_parameters(model) else {}
    value, found = shares(model, lambda: of(model(x, **training)))
    if examples is not None:
        words = f"{words} on {examples} example{'s' if examples != 1 else ''}"
    paths = unique_paths(model)
    weights: dict[str, WeightGradient] = {}
    for share in found:
        weights[paths[id(share.variable)]] = _measured(share)
    return Gradients(model.name, words, value, weights)


# --------------------------------------------------------------------------- the batch and the loss


def _tensors(batch: object, name: str) -> Tensor:
    def tensor(value: Tensor) -> Tensor:
        if keras.ops.is_tensor(value):
            return value
        if not hasattr(value, "__array__"):
            raise TetherError(
                "One batch is an array or tensor, or a list or dict of them. " + received(**{name: type(value)})
            )
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            return array  # text, for a layer that takes it
        return keras.ops.convert_to_tensor(array.astype(keras.config.floatx()) if array.dtype == "float64" else array)

    return keras.tree.map_structure(tensor, batch)


def _count(batch: object) -> int | None:
    """How many examples a batch has, if it says so."""
    first = next((value for value in keras.tree.flatten(batch) if value is not None and len(value.shape)), None)
    return None if first is None else first.shape[0]


def _loss_of(model: keras.Layer, x: Tensor, y: Tensor, loss: Loss | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A loss in words, and as a function of the outputs."""
    compiled = keras_seam.has_compiled_loss(model)
    if loss is not None:
        function = keras.losses.get(loss)
        return _name_of(loss, function), lambda y_pred: _with_own(model, _checked(function(y, y_pred)))
    if y is not None and isinstance(model, keras.Model) and (compiled or _has_own_loss(model)):
        return "the compiled loss", lambda y_pred: keras_seam.training_loss(model, x, y, y_pred)
    if y is not None:
        raise TetherError(
            f"{model.name!r} has no loss for these targets. Compile it with one, or give it here: `loss='mse'`."
        )
    if not compiled and isinstance(model, keras.Model) and (model.compiled or _has_own_loss(model)):
        return "the model's own losses", lambda y_pred: _own(model, x, y_pred)
    return "the mean square of the outputs", lambda y_pred: _with_own(model, _mean_square(y_pred))


def _own(model: keras.Layer, x: Tensor, y_pred: Tensor) -> Tensor:
    if not _has_own_loss(model) and not model.losses:
        raise TetherError(
            f"{model.name!r} was compiled without a loss, and no layer of it adds one. Give one here: a function of "
            "`(y, y_pred)` as `loss`."
        )
    return keras_seam.training_loss(model, x, None, y_pred)


def _has_own_loss(model: keras.Layer) -> bool:
    return type(model).compute_loss is not keras.Model.compute_loss


def _name_of(loss: object, function: object) -> str:
    name = loss if isinstance(loss, str) else getattr(function, "__name__", None) or getattr(function, "name", None)
    return f"the loss {name or type(function).__name__}"


def _checked(value: Tensor) -> Tensor:
    if value is None:
        raise TetherError("The loss gave nothing. It takes `(y, y_pred)` and returns a number, or one an example.")
    return value


def _with_own(model: keras.Layer, value: Tensor) -> Tensor:
    """The mean of a loss, and what the model adds."""
    total = keras.ops.mean(value)
    for own in model.losses:
        total = keras.ops.add(total, keras.ops.sum(keras.ops.cast(own, total.dtype)))
    return total


def _mean_square(y_pred: Tensor) -> Tensor:
    outputs = [o for o in keras.tree.flatten(y_pred) if keras_seam.is_float(keras.backend.standardize_dtype(o.dtype))]
    if not outputs:
        raise TetherError("The model has no outputs of numbers. Give a loss: `loss=function of (y, y_pred)`.")
    return sum(keras.ops.mean(keras.ops.square(output)) for output in outputs)


# --------------------------------------------------------------------------- measuring


def _measured(share: Shares) -> WeightGradient:
    """Norms and cosines of the shares; what comes from elsewhere is listed if anything does."""
    arrays = [None if g is None else np.ravel(keras_seam.to_numpy(g, in_step=True)) for g in share.gradients]
    products = _products(arrays)
    norms = np.sqrt(np.diagonal(products))
    listed = [place for place, reader in enumerate(share.readers) if reader is not ELSEWHERE or norms[place] != 0]
    cosines = [[_cosine(products, norms, a, b) for b in (*listed, -1)] for a in listed]
    return WeightGradient(
        norm=float(norms[-1]),
        uses=tuple(
            UseGradient(share.readers[place].where, share.readers[place].expression, float(norms[place]), row[-1])
            for place, row in zip(listed, cosines, strict=True)
        ),
        cosines=tuple(tuple(row[:-1]) for row in cosines),
    )


def _products(arrays: Sequence[Array | None]) -> Array:
    """The inner products of some vectors and of their sum, which comes last; a missing one is zero."""
    found = np.zeros((len(arrays) + 1, len(arrays) + 1))
    size = max((array.size for array in arrays if array is not None), default=0)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        rows = np.zeros((len(arrays) + 1, stop - start))
        for row, array in zip(rows, arrays, strict=False):
            if array is not None:
                row[:] = array[start:stop]
        with np.errstate(invalid="ignore", over="ignore"):  # a gradient that is not finite is what somebody looks for
            rows[-1] = rows[:-1].sum(axis=0)
            found += rows @ rows.T
    return found


def _cosine(products: Array, norms: Array, a: int, b: int) -> Cosine:
    if not all(0 < norm < math.inf for norm in (norms[a], norms[b])):
        return None
    return float(np.clip(products[a, b] / (norms[a] * norms[b]), -1.0, 1.0))


def _plain(value: object) -> object:
    """What `asdict` gives, with lists for tuples and `None` for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


__all__ = ["Gradients", "UseGradient", "WeightGradient", "gradients"]

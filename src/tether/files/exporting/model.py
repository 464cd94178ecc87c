"""The model that a converter is given: its inputs, and its shared weights kept as one."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError, received
from tether.layers.tying.state import state_of, stored_variables
from tether.layers.tying.tied import base_class
from tether.types import Array, Tensor
from tether.weights.leaves import numpy_dtype
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- inputs
# What an export is asked for: a model, and what its call takes, as a function of plain tensors.


BATCHES = (1, 3)
"""The batch sizes that are tried if the caller gives no inputs: an exporter may have fixed one."""

OTHER_SIZE = 4
"""What stands for another size that the model leaves open, where inputs are made up."""

Shape = tuple[int | None, ...]


@dataclass
class Asked:
    """A model, and the inputs of one call of it."""

    model: keras.Model
    signature: list[object]
    """The positional arguments of the call: structures of specs."""
    specs: list[tuple[str, Shape, str]]
    """The tensors of the signature, flat: a name of its own for each, shape (`None` where it is open), dtype."""
    options: dict[str, object] = field(default_factory=dict)
    """What the caller passes on to the converter."""

    def described(self, held: Sequence[keras.Variable]) -> list[tuple[tuple[int | str, ...], str]]:
        """Shape and dtype of each input, then of each variable that is held out, with a name for each open size."""
        shapes = [
            (tuple(_name_of(place, at) if n is None else n for at, n in enumerate(shape)), dtype)
            for place, (_, shape, dtype) in enumerate(self.specs)
        ]
        return shapes + [(tuple(variable.shape), variable.dtype) for variable in held]

    def call(self, tensors: Sequence[Tensor], values: Sequence[tuple[keras.Variable, Tensor]] = ()) -> list[Tensor]:
        """The model's outputs, flat, for flat inputs, with variables standing for other values."""
        arguments = keras.tree.pack_sequence_as(self.signature, list(tensors))
        with keras.StatelessScope(state_mapping=list(values)):
            return list(keras.tree.flatten(self.model(*arguments, training=False)))

    def with_held(self, tensors: Sequence[Tensor], held: Sequence[keras.Variable]) -> list[Tensor]:
        """The same for tensors of which the last stand for variables."""
        inputs = len(self.specs)
        return self.call(tensors[:inputs], list(zip(held, tensors[inputs:], strict=True)))

    def reference(self, arrays: Sequence[Array]) -> list[Array]:
        """What the model itself gives for the inputs."""
        outputs = self.call([keras.ops.convert_to_tensor(array) for array in arrays])
        return [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]

    def made_up(self, batch: int) -> list[Array]:
        """Inputs with these shapes and dtypes: noise, and zeros where a number may be an index."""
        rng = np.random.default_rng(0)
        arrays = []
        for _, shape, dtype in self.specs:
            known = tuple(
                batch if at == 0 and n is None else OTHER_SIZE if n is None else n for at, n in enumerate(shape)
            )
            noise = rng.normal(size=known).astype("float32") if keras_seam.is_float(dtype) else np.zeros(known)
            arrays.append(np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(noise, dtype))))
        return arrays

    @cached_property
    def variables(self) -> list[keras.Variable]:
        """All that the model stores, each variable once."""
        return list({id(variable): variable for variable in self.model.variables}.values())

    @cached_property
    def bytes(self) -> int:
        """What storing each variable once takes."""
        return sum(bytes_of(variable) for variable in self.variables)

    @cached_property
    def output_names(self) -> list[str]:
        """A name for each output of the model."""
        symbols = [
            keras.KerasTensor((2, *shape[1:]) if shape and shape[0] is None else shape, dtype=dtype)
            for _, shape, dtype in self.specs
        ]
        count = len(keras_seam.trace(lambda *tensors: self.call(tensors), *symbols))
        found = [str(name) for name in getattr(self.model, "output_names", None) or ()]
        taken = [name for name, _, _ in self.specs]
        return distinct([*taken, *(found if len(found) == count else [f"output_{at}" for at in range(count)])])[
            len(taken) :
        ]


Runner = Callable[[Asked, Sequence[Array]], list[Array]]
"""Runs a file on arrays, and gives its outputs."""


def ask(model: keras.Model, signature: object, options: dict[str, object]) -> Asked:
    """What is to be exported.

    Raises:
        TetherError: It is no model, or nobody has said yet what its inputs look like.
    """
    if not isinstance(model, keras.Model):
        raise TetherError(
            "What is exported is a Keras model: `keras.Sequential([keras.Input(shape), layer])`. "
            f"{received(model=model)}"
        )
    try:
        found = keras_seam.input_signature(model) if signature is None else _as_arguments(signature)
        specs = [(spec.name or f"input_{at}", tuple(spec.shape), spec.dtype) for at, spec in _flat(found)]
    except (ValueError, TypeError, AttributeError) as error:
        raise TetherError(
            "The inputs are not known. Call the model once, or say what they look like: "
            f"`input_signature=[keras.InputSpec(shape=(None, 8), dtype='float32')]`. {error}"
        ) from error
    names = distinct([name for name, _, _ in specs])
    return Asked(
        model, found, [(name, shape, dtype) for name, (_, shape, dtype) in zip(names, specs, strict=True)], options
    )


def _name_of(place: int, axis: int) -> str:
    return "batch" if axis == 0 else f"size_{place}_{axis}"


def _as_arguments(signature: object) -> list[object]:
    given = list(signature) if isinstance(signature, (list, tuple)) else [signature]
    return keras.tree.map_structure(keras_seam.input_spec, given)


def _flat(signature: object) -> list[tuple[int, keras.InputSpec]]:
    return list(enumerate(keras.tree.flatten(signature)))


def distinct(names: list[str]) -> list[str]:
    """The names as identifiers, each of them once."""
    seen: dict[str, int] = {}
    found = []
    for name in (re.sub(r"\W", "_", name) for name in names):
        seen[name] = seen.get(name, -1) + 1
        found.append(f"{name}_{seen[name]}" if seen[name] else name)
    return found if len(set(found)) == len(found) else [f"{name}_{at}" for at, name in enumerate(found)]


def bytes_of(variable: keras.Variable) -> int:
    """What storing a variable takes, or the value of a view."""
    return math.prod(variable.shape) * numpy_dtype(str(variable.dtype)).itemsize


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Keeps a library from logging what it logs each time."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# --------------------------------------------------------------------------- shared weights
# Which weights a converter must not see as constants.
#
# A converter computes what it can from constants when it converts: the transpose of a kernel, a slice, a product of
# two factors. For a weight with one use that is well. If a weight is used in two ways, its file gets two copies; if a
# kernel is a product of small factors, it gets the large kernel. So such weights are *held out*: the converter is
# given them as further inputs, which it knows nothing about, and in what it made the inputs are turned into stored
# constants.


SMALL = 1024
"""Bytes below which a second copy of a weight does not matter."""


def held_out(asked: Asked) -> list[keras.Variable]:
    """The variables that several uses read in different ways, or that are smaller than what is made of them."""
    ways: dict[int, set[object]] = {}
    grown: set[int] = set()
    for layer in keras_seam.contained_layers(asked.model):
        state = state_of(layer)
        for slot in state.slots if state is not None else ():
            stored = stored_variables(slot.view)
            way = (base_class(type(layer)), slot.tie.path[-1], slot.view.expression)
            for variable in stored:
                ways.setdefault(id(variable), set()).add(way)
            if bytes_of(slot.view) > sum(map(bytes_of, stored)):
                grown.update(map(id, stored))
        for weight in keras_seam.sublayers(layer) if state is None else ():
            for variable in weight.variables if isinstance(weight, Weight) else ():
                ways.setdefault(id(variable), set()).add(id(layer))  # it reads the weight in a way of its own
    held = grown | {variable for variable, found in ways.items() if len(found) > 1}
    return [variable for variable in all_large(asked) if id(variable) in held]


def all_large(asked: Asked) -> list[keras.Variable]:
    """Every variable of some size: for a model whose layers share in ways of their own."""
    return [variable for variable in asked.variables if bytes_of(variable) >= SMALL]


__all__ = ["BATCHES", "Asked", "Shape", "all_large", "ask", "bytes_of", "distinct", "held_out", "quiet"]

"""What a weight stores, and who uses it: the part of `Weight` that people do not see.

One variable, however many layers use it. Ties register their uses, which decide whether it trains; files go through its
hooks; quantising makes it an expression of other weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import (
    LostTie,
    ShapeMismatch,
    TetherError,
    ValueConflict,
    received,
)
from tether.types import Array, Config, Store, Tensor
from tether.weights import placement
from tether.weights.algebra import is_added
from tether.weights.codec import encode_became
from tether.weights.expression import Expression, Shape, Stored, live_weights, note_replacement, resolved
from tether.weights.identity import told_by_file
from tether.weights.operators.indexing import refuse_entries
from tether.weights.placement import Spec


@dataclass(eq=False)
class Use:
    """One layer's attribute that reads an expression. Registered from `tie` until `untie`.

    It outlives its layer, so that what trains never depends on when Python collects garbage.
    """

    name: str
    """The layer's own name for the weight: `kernel`."""
    expression: Expression
    layer: weakref.ref[keras.Layer]
    live: bool = True
    """Whether gradient may flow through this use: the layer is trainable, and so is the attribute."""
    regularizer: keras.Regularizer | None = None

    def resolve(self) -> None:
        """Writes out what weights in the expression have become, and tells the weights in it of the use."""
        self.expression = resolved(self.expression)
        for weight in self.expression.weights_used():
            weight.add_use(self)

    def reaches(self, weight: Stored) -> bool:
        """Whether a gradient reaches the weight through this use."""
        return self.live and weight in live_weights(self.expression)


class Storage(Stored):
    """The variable of a weight: how it comes to be, whether it trains, how it is written and read."""

    uid: str
    origin: str
    generation: int
    born: int
    autocasts: bool
    was_used: bool
    only_named: bool
    first_initializer: Any
    _trainable_flag: bool
    _container_flag: bool
    _given_shape: Shape | None
    _given_dtype: str | None
    _variable: keras.Variable
    _wanted_path: str
    _role: str | None
    _became: Stored | None
    _uses: dict[Use, bool]
    _reached: int
    _beside: set[str]
    _numbers: dict[str, int]
    lies: Spec | None
    """How its variable is to lie on the devices once it is made, if that was found out before."""
    stands_for: str | None
    """The path of the weight that integers and their scale stand for, by which a layout map may name them."""

    @classmethod
    def beside(
        cls,
        base: Stored | None,
        suffix: str,
        start: object,
        shape: Shape | None = None,
        *,
        dtype: str,
        trainable: bool = True,
        role: str = "part",
    ) -> Stored:
        """A weight that belongs to another one, and has its name and its path with a suffix: `dense/kernel_lora_a`.

        What already stands beside the other under that path, in its uses or made for one, gives it a number.

        Args:
            base: The other weight. Without one, the suffix is the name.
            suffix: The rest of the name.
            start: An initializer or its name (with `shape`), or an array of the start values.
            shape: Its shape, with an initializer.
            dtype: The stored dtype.
            trainable: Whether it may train.
            role: What it is for.
        """
        if shape is None:
            start = np.asarray(start)
            shape = start.shape
        suffix = suffix if base is None else f"_{base._free_suffix(suffix)}"
        name = suffix if base is None else base.name + suffix
        weight = cls(shape, dtype=dtype, trainable=trainable, name=name, role=role)
        if base is not None:
            weight._wanted_path = base.path + suffix
            if role in ("integers", "scale"):
                weight.__dict__["stands_for"] = base.path
        if isinstance(start, np.ndarray):
            weight._create(Copy(start), shape, dtype)
        else:
            weight.initializer = keras.initializers.get(start)
            weight._create(weight.initializer, shape, dtype)
        return weight

    def _free_suffix(self, suffix: str) -> str:
        """The suffix, with a number if something stands beside the weight under it."""
        number, found = self._numbers.get(suffix, 0), suffix
        while f"{self.path}_{found}" in self._beside:
            number += 1
            found = f"{suffix}_{number}"
        self._numbers[suffix] = number
        self._beside.add(f"{self.path}_{found}")
        return found

    def forget_unused_parts(self) -> None:
        """Frees the paths of what was made to stand beside the weight, and is in none of its uses."""
        self._beside.clear()
        self._numbers.clear()
        for use in self._uses:
            self._beside.update(_made_for_others(use))

    def store(self, value: Tensor) -> None:
        """Stores a tensor, also inside a layer's autocast: PyTorch would write to the cast copy."""
        keras_seam.store(self.variable, value)

    def give_start(self, shape: Shape, dtype: str, initializer: object, *, path: str | None = None) -> None:
        """Makes the variable from what the first tie says, unless it was made or the arguments say otherwise.

        The path is that of the variable that the weight stands for, for one that has none of its own.
        """
        if self._variable is None:
            self._wanted_path = self._wanted_path or path or ""
            self._create(self.initializer or initializer, self._given_shape or shape, self._given_dtype or dtype)

    def start_at(self, values: Array, *, path: str) -> None:
        """Makes the variable of a weight of a known shape and dtype, under a path, with these values."""
        self.start_by(Copy(values), path=path)

    def start_by(self, initializer: keras.Initializer, *, path: str) -> None:
        """Makes the variable of a weight of a known shape and dtype, under a path, by an initializer."""
        self._wanted_path = path
        assert self._given_shape is not None
        self._create(initializer, self._given_shape, self._given_dtype)

    def find_path(self) -> None:
        """Gives up the path that its name says: it will have that of the first variable that it stands for."""
        self._wanted_path = ""

    def can_adopt(self, dtype: str) -> bool:
        """Whether it has no variable yet and nothing speaks against one of this dtype."""
        return self._variable is None and self.dtype in (None, dtype)

    def adopt(self, variable: keras.Variable) -> None:
        """Takes over a variable that exists: the very object, so that optimizers that know it stay valid."""
        if self._variable is not None:
            raise TetherError(f"The weight {self.name!r} has a variable already.")
        self._hold(variable)

    def _create(self, initializer: object, shape: Shape, dtype: str | None) -> None:
        dtype = dtype or keras.config.floatx()
        initializer = initializer or ("glorot_uniform" if keras_seam.is_float(dtype) else "zeros")
        self._given_dtype = keras.backend.standardize_dtype(dtype)
        with keras_seam.path_scope(self.path):
            variable = keras.Variable(
                keras.initializers.get(initializer),
                shape=shape,
                dtype=dtype,
                trainable=self.trainable,
                autocast=self.autocasts,
                name=self.path.rpartition("/")[2],
                **keras_seam.layout_argument(placement.at_creation(self, shape)),
            )
        self._hold(variable)

    def _hold(self, variable: keras.Variable) -> None:
        if self.regularizer is not None:
            variable.regularizer = self.regularizer
        if self.constraint is not None:
            variable.constraint = self.constraint
        self._given_shape = None
        self.autocasts = keras_seam.autocasts(variable)
        keras_seam.tell_apart(variable)
        self._variable = variable
        self.refresh()

    def release(self) -> keras.Variable | None:
        """Gives the variable back, as if it had never been made or adopted (the undo of a failed tie)."""
        variable, shape = self._variable, self.shape
        if variable is not None:
            self._wanted_path = variable.path
            keras_seam.untrack(self, variable)
            keras_seam.set_untracked(self, "_variable", None)
            self._given_shape = shape
        return variable

    def become(self, expression: Expression) -> keras.Variable | None:
        """Gives up its variable: from now on the weight is an expression of other weights, which store its value.

        Whatever names the weight follows: its uses at once, anything else when it is looked at. As long as somebody
        holds the weight, it holds those others.

        Args:
            expression: Of its shape and dtype, over weights that have theirs.

        Returns:
            The variable that it had, if it had one.
        """
        lies = None if self.shape is None else placement.layout_for(self)
        dtype, variable = self.dtype, self.release()
        self._given_dtype = dtype
        self._given_shape = expression.shape
        keras_seam.set_untracked(self, "_became", expression)
        with keras_seam.unlocked(self):
            self.parts = list(expression.weights_used())
        note_replacement()
        placement.follow_from(lies, expression)
        uses = list(self._uses)
        self._uses.clear()
        keras_seam.set_untracked(self, "_reached", 0)
        for use in uses:
            use.resolve()
        self.refresh()
        return variable

    @property
    def variables(self) -> list[keras.Variable]:
        """The one variable, if it has been made, or those of what it has become. Keras asks at every step."""
        if self._became is not None:
            return [variable for part in self.parts for variable in part.variables]
        return [] if self._variable is None else [self._variable]

    weights = variables

    @property
    def present_constraint(self) -> keras.constraints.Constraint | None:
        """The constraint in force: its own, or that of the variable that it took over or was made for."""
        return self.constraint if self._variable is None else self._variable.constraint

    @present_constraint.setter
    def present_constraint(self, value: object) -> None:
        if self._variable is None:
            self.constraint = value
        else:
            self._variable.constraint = value

    @property
    def trainable_flag(self) -> bool:
        """The weight's own flag, whatever its uses say."""
        return bool(self._trainable_flag)

    def refresh(self, use: Use | None = None) -> None:
        """Sets the variable's flag to what flag and uses say, after one of its uses may have changed."""
        if use is not None and use in self._uses:
            reaches = use.reaches(self)
            keras_seam.set_untracked(self, "_reached", self._reached + reaches - self._uses[use])
            self._uses[use] = reaches
        trainable = self.trainable
        if keras_seam.own_trainable_flag(self) != trainable:
            keras_seam.set_own_trainable_flag(self, trainable)
        if self._variable is not None and self._variable.trainable != trainable:
            self._variable.trainable = trainable

    @property
    def metrics(self) -> list[keras.Metric]:
        """None, whatever `Layer` would look for below it: Keras asks for each use at every step."""
        return []

    def add_use(self, use: Use) -> None:
        """Registers a use; it decides with the others whether the weight trains."""
        if use not in self._uses:
            if self._variable is not None:
                keras_seam.refuse_sharded([self._variable])
            self._uses[use] = False
            self._beside.update(_made_for_others(use))
        if not self.was_used:
            self.was_used = True
        self.refresh(use)

    def remove_use(self, use: Use) -> None:
        """Forgets a use that a tie no longer has."""
        if use in self._uses:
            keras_seam.set_untracked(self, "_reached", self._reached - self._uses.pop(use))
            self._beside.difference_update(_made_for_others(use))
            self._numbers.clear()
        self.refresh()

    def own_config(self) -> Config:
        """The same for a record of ties, which names the weight: whether a file holds it, `get_config` says."""
        derived = self.initializer is None
        became = {}
        if self._became is not None:
            became["became"] = encode_became(self._became)
        return {
            "name": self.name,
            "path": self.path if self.is_built else self._wanted_path,
            "shape": None if self.shape is None else list(self.shape),
            "dtype": self.dtype,
            "trainable": self._trainable_flag,
            "initializer": None if derived else keras.initializers.serialize(self.initializer),
            "regularizer": None if self.regularizer is None else keras.regularizers.serialize(self.regularizer),
            "constraint": None if self.constraint is None else keras.constraints.serialize(self.constraint),
            "uid": self.uid,
            "origin": self.origin,
            **({} if self.autocasts else {"autocast": False}),
            **({} if self._role is None else {"role": self._role}),
            **({} if self.stands_for is None else {"of": self.stands_for}),
            **became,
        }

    def save_own_variables(self, store: Store) -> None:
        """Writes the value, once, wherever Keras meets the weight first.

        Raises:
            LostTie: The weight was quantised, and a constructor that knows nothing of it will make it again.
        """
        told = told_by_file() if self._became is not None else None
        if told is not None and id(self) not in told:
            raise LostTie(
                f"The weight {self.name!r} was quantised, and a layer of your own makes it in its constructor, as a "
                "float again. Write the weight into that layer's `get_config` with "
                "`keras.saving.serialize_keras_object`, or save the model before it is quantised."
            )
        if self._variable is not None:
            store["0"] = self._variable
            notes = keras_seam.entry_notes(store)
            if notes is not None:
                notes["tether_uid"] = self.uid

    def load_own_variables(self, store: Store) -> None:
        """Reads the value, or leaves it to a use whose own entry the file has.

        Raises:
            TetherError: The file has neither.
        """
        scope = keras_seam.loading_scope()
        loaded = {} if scope is None else scope.setdefault("loaded", {})
        keys = list(store.keys())
        if keys:
            self.load_value(store["0"], loaded, source="the file's own entry of the weight")
        elif self._variable is not None and id(self) not in loaded and not self._is_added():
            raise TetherError(
                f"The file holds no value for the weight {self.name!r}. It was written before the tie, and no layer "
                f"that uses {self.name} as it is has a value of its own in it. "
                f"Uses: {', '.join(f'{use.name} = {use.expression.notation()}' for use in self._uses) or 'none'}."
            )

    def _is_added(self) -> bool:
        return is_added(self)

    def load_value(self, value: object, loaded: dict[int, str], *, source: str) -> None:
        """Takes a value from a file, once; a second one in the same load must be equal.

        Raises:
            ValueConflict: The file holds two different values for this one weight.
        """
        if id(self) not in loaded and self._variable is not None and keras_seam.is_stored_in(value, self._variable):
            loaded[id(self)] = source  # it was stored before: see `keras_seam.read_archive`
            return
        array = np.asarray(value)
        if tuple(array.shape) != self.shape:
            raise ShapeMismatch(
                f"The weight {self.name!r} has shape {self.shape}; {source} has another. {received(shape=array.shape)}"
            )
        if id(self) in loaded:
            present = np.array(keras_seam.on_host(keras_seam.raw_value(self.variable), self.name, in_step=True))
            array = array.view(present.dtype) if array.dtype.kind == "V" else array
            if not np.array_equal(present.astype("float64"), array.astype("float64"), equal_nan=True):
                difference = float(np.max(np.abs(present.astype("float64") - array.astype("float64"))))
                raise ValueConflict(
                    f"The file holds two different values for the weight {self.name!r}, which is tied here: "
                    f"{loaded[id(self)]} and {source} differ by up to {difference:.3g}. The file was written by an "
                    "untied model. Decide which value is right and assign it (`weight.assign(value)`), or load the "
                    "file into the untied model, average, and tie then."
                )
            return
        if self.role == "integers":
            refuse_entries(self, array, source)
        self.assign(array)
        loaded[id(self)] = source

    _layers = keras_seam.WatchedSublayers()

    def _check_quantize_args(self, *args: Any, **kwargs: Any) -> None:
        """Checked where the work is done."""


def path_of(name: str) -> str:
    """The path of a weight's variable by its name. PyTorch allows no dots in the names of parameters."""
    return "/".join(filter(None, name.split("."))) or "weight"


def _made_for_others(use: Use) -> Iterator[str]:
    """The paths of the weights in a use that have a role."""
    return (weight.path for weight in use.expression.weights_used() if weight.role is not None)


class Copy(keras.initializers.Initializer):
    """Starts a variable at a copy of an array."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __call__(self, shape: Shape, dtype: str | None = None) -> Tensor:
        """The array as a tensor."""
        return keras_seam.own_tensor(self.array, dtype)

"""One place where an expression is read: what decides whether the weights in it train."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import keras
import numpy as np

from tether import keras_seam
from tether.errors import (
    InvalidConfig,
    LostTie,
    ShapeMismatch,
    TetherError,
    UnknownShape,
    Unsupported,
    ValueConflict,
    received,
)
from tether.types import Array, Config
from tether.weights.codec import decode_became, encode_became
from tether.weights.expression import Expression, Shape, Stored, Tensor, live_weights, note_replacement, resolved
from tether.weights.identity import born, fresh_uid, mark, scope_of, told_by_file
from tether.weights.structure import is_added
from tether.weights.weight_config import check_agrees, check_config, check_role, read_start

# --------------------------------------------------------------------------- uses
# One place where an expression is read: what decides whether the weights in it train.


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
    regularizer: Any = None

    def resolve(self) -> None:
        """Writes out what weights in the expression have become, and tells the weights in it of the use."""
        self.expression = resolved(self.expression)
        for weight in self.expression.weights_used():
            weight.add_use(self)

    def reaches(self, weight: Weight) -> bool:
        """Whether a gradient reaches the weight through this use."""
        return self.live and weight in live_weights(self.expression)


# --------------------------------------------------------------------------- weights
# The only thing that owns storage: one variable, however many layers use it.


@keras.saving.register_keras_serializable(package="tether", name="Weight")
class Weight(Stored):
    """One stored weight, to be used in any number of layers and expressions.

    A `Weight` is a Keras layer underneath, so Keras tracks, counts, optimises and saves it once.
    As an attribute of a layer of your own it is that layer's weight too; read `.value` in `call`.

    Args:
        shape: The shape, or an array or tensor, of which a copy becomes the start value. Left out,
            the shape comes from the first tie.
        initializer: A Keras initializer, its name, or an array or tensor to copy. Left out, it is the
            one of the first layer that the weight is tied to.
        dtype: The stored dtype. Left out, that of the array or of the first tie.
        trainable: Whether it may train at all. It does train as long as some use of it does; integers
            never do.
        regularizer: A Keras regularizer of the stored value, counted once however many uses there are.
        constraint: A Keras constraint, applied to the stored value after each step.
        name: Its name, also its variable's path, with "/" for dots. Left out, the path is that of the first layer's
            variable that the weight stands for.
        role: What it is for, where it is no weight of its own: `"part"` of a form, which is added to another weight;
            the `"strength"` of an adapter; `"state"` that training calls advance; `"integers"` and their `"scale"`.

    Raises:
        TetherError: `shape` is a `keras.Variable`, the role is unknown, or the arguments contradict each other.

    Example:
    ```python
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(64, activation="relu"), kernel=codec)
    decode = tether.tie(keras.layers.Dense(784), kernel=codec.T)
    ```
    """

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
    _became: Weight | None
    _uses: dict[Use, bool]
    _reached: int
    _beside: set[str]
    _numbers: dict[str, int]

    def __init__(
        self,
        shape: Any = None,
        initializer: Any = None,
        *,
        dtype: str | None = None,
        trainable: bool = True,
        regularizer: Any = None,
        constraint: Any = None,
        name: str | None = None,
        role: str | None = None,
    ) -> None:
        shape, initializer, start = read_start(shape, initializer, dtype)
        dtype = None if dtype is None else keras.backend.standardize_dtype(dtype)
        # Keras would read the name of a dtype such as int8 as a policy that quantises.
        super().__init__(name=name, dtype=dtype if dtype in ("float16", "bfloat16", "float32", "float64") else None)
        self.initializer = initializer
        self.regularizer = keras.regularizers.get(regularizer)
        self.constraint = keras.constraints.get(constraint)
        if dtype is None and start is not None:
            dtype = keras.backend.standardize_dtype(start.dtype)
        self.__dict__.update(  # none of it is for Keras to track, and looking whether it is takes longer than the rest
            _trainable_flag=bool(trainable),
            _container_flag=True,
            _given_shape=shape,
            _given_dtype=dtype,
            _variable=None,
            autocasts=True,
            _wanted_path="" if name is None else path_of(name),
            _role=check_role(role),
            first_initializer=None,
            uid=(uid := fresh_uid()),
            origin=uid,
            generation=0,
            was_used=False,
            only_named=False,
            _became=None,
            _uses={},
            _reached=0,
            _beside=set(),
            _numbers={},
        )
        born(self)
        keras_seam.see(self)
        self.built = True
        if start is not None:
            self._create(Copy(start), tuple(start.shape), self._given_dtype)
        elif shape is not None and self.initializer is not None:
            self._create(self.initializer, shape, self._given_dtype)

    @classmethod
    def beside(
        cls,
        base: Weight | None,
        suffix: str,
        start: Any,
        shape: Shape | None = None,
        *,
        dtype: str,
        trainable: bool = True,
        role: str = "part",
    ) -> Weight:
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

    # ------------------------------------------------------------------ what it holds

    @property
    def role(self) -> str | None:
        """What it is for, where it is no weight of its own."""
        return self._role

    @property
    def path(self) -> str:
        """The path of its variable, or the one that it will have as far as that is known."""
        return str(self._variable.path) if self.is_built else self._wanted_path or path_of(self.name)

    @property
    def shape(self) -> Shape | None:
        """The shape, or `None` until the first tie gives it one."""
        return self._given_shape if self._variable is None else tuple(int(n) for n in self._variable.shape)

    @property
    def dtype(self) -> str | None:
        """The stored dtype, or `None` until the first tie gives it one."""
        if self._variable is None:
            return self._given_dtype
        return keras_seam.stored_dtype(self._variable)

    @property
    def variable(self) -> Any:
        """The Keras variable, made now if the shape is known and nothing has made it yet.

        Raises:
            UnknownShape: The weight has no shape yet.
        """
        if self._variable is None:
            if self._became is not None:
                raise Unsupported(
                    f"The weight {self.name!r} is {self._became.notation()} now: it was quantised and stores nothing "
                    f"itself. Read `{self.name}.value`; what is stored are "
                    f"{', '.join(part.name for part in self._became.weights_used())}."
                )
            if self._given_shape is None:
                raise UnknownShape(
                    f"The weight {self.name!r} has no shape yet. Give it one where it is made, as in "
                    f"`tether.Weight((784, 64), name={self.name!r})`, or tie it to a layer and build that first."
                )
            self._create(self.initializer, self._given_shape, self._given_dtype)
        return self._variable

    @property
    def is_built(self) -> bool:
        """Whether the variable has been made."""
        return self._variable is not None

    @property
    def value(self) -> Tensor:
        """The stored tensor, under the caller's stateless and autocast scopes."""
        return self.variable.value if self._became is None else self._became.value

    def assign(self, value: Any) -> None:
        """Stores a value of the weight's shape."""
        if self._became is not None:
            self._became.assign(value)
            return
        value = keras.ops.convert_to_tensor(value)
        if self.shape is not None and tuple(value.shape) != self.shape:
            raise ShapeMismatch(
                f"The weight {self.name!r} has shape {self.shape}. {received(shape=tuple(value.shape))}"
            )
        self.generation += 1
        self.store(keras_seam.own_copy(value))

    def store(self, value: Tensor) -> None:
        """Stores a tensor, also inside a layer's autocast: PyTorch would write to the cast copy."""
        with keras_seam.AutocastScope(None):
            self.variable.assign(value)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A weight computes nothing with inputs, although it is a Keras layer.

        Raises:
            TetherError: Always; it says what to write.
        """
        raise TetherError(
            f"The weight {self.name!r} was called. It is one stored value, which a layer of your own reads in its "
            "`call` as `w.value`. A layer that computes with it: `tether.tie(layer, kernel=w)`, or "
            "`tether.Lambda(lambda x, w: x @ w, w=w)`."
        )

    # ------------------------------------------------------------------ how it comes to be

    def give_start(self, shape: Shape, dtype: str, initializer: Any, *, path: str | None = None) -> None:
        """Makes the variable from what the first tie says, unless it was made or the arguments say otherwise.

        The path is that of the variable that the weight stands for, for one that has none of its own.
        """
        if self._variable is None:
            self._wanted_path = self._wanted_path or path or ""
            self._create(self.initializer or initializer, self._given_shape or shape, self._given_dtype or dtype)

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

    def _create(self, initializer: Any, shape: Shape, dtype: str | None) -> None:
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

    def release(self) -> Any:
        """Gives the variable back, as if it had never been made or adopted (the undo of a failed tie)."""
        variable, shape = self._variable, self.shape
        if variable is not None:
            self._wanted_path = variable.path
            keras_seam.untrack(self, variable)
            keras_seam.set_untracked(self, "_variable", None)
            self._given_shape = shape
        return variable

    @property
    def became(self) -> Expression | None:
        """What it has become, if it stores nothing any more."""
        return cast("Expression | None", self._became)

    def become(self, expression: Expression) -> Any:
        """Gives up its variable: from now on the weight is an expression of other weights, which store its value.

        Whatever names the weight follows: its uses at once, anything else when it is looked at. As long as somebody
        holds the weight, it holds those others.

        Args:
            expression: Of its shape and dtype, over weights that have theirs.

        Returns:
            The variable that it had, if it had one.
        """
        dtype, variable = self.dtype, self.release()
        self._given_dtype = dtype
        self._given_shape = expression.shape
        keras_seam.set_untracked(self, "_became", expression)
        with keras_seam.unlocked(self):
            self.parts = list(expression.weights_used())
        note_replacement()
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
    def present_constraint(self) -> Any:
        """The constraint in force: its own, or that of the variable that it took over or was made for."""
        return self.constraint if self._variable is None else self._variable.constraint

    @present_constraint.setter
    def present_constraint(self, value: Any) -> None:
        if self._variable is None:
            self.constraint = value
        else:
            self._variable.constraint = value

    # ------------------------------------------------------------------ what trains

    @property
    def uses(self) -> tuple[Use, ...]:
        """The registered uses, in the order in which they were tied."""
        return tuple(self._uses)

    @property
    def trainable(self) -> bool:
        """Whether it trains: its own flag is set and some registered use lets a gradient through.

        Setting it sets the weight's own flag.
        """
        keras_seam.notice_compiling()
        if not self._trainable_flag or self._became is not None:
            return False
        dtype = self.dtype
        if dtype is not None and not keras_seam.is_float(dtype):
            return False
        return self._reached > 0 if self._uses else bool(self._container_flag)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if not hasattr(self, "_uses"):
            return
        if keras_seam.set_by_a_container():
            self._container_flag = bool(value)
        elif self._trainable_flag != bool(value):
            keras_seam.before_freezing()
            self._trainable_flag = bool(value)
        self.refresh()

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
    def metrics(self) -> list[Any]:
        """None, whatever `Layer` would look for below it: Keras asks for each use at every step."""
        return []

    def add_use(self, use: Use) -> None:
        """Registers a use."""
        if use not in self._uses:
            self._uses[use] = False
            self._beside.update(_made_for_others(use))
        if not self.was_used:
            self.was_used = True
        self.refresh(use)

    def remove_use(self, use: Use) -> None:
        """Forgets a use."""
        if use in self._uses:
            keras_seam.set_untracked(self, "_reached", self._reached - self._uses.pop(use))
            self._beside.difference_update(_made_for_others(use))
            self._numbers.clear()
        self.refresh()

    # ------------------------------------------------------------------ configs and files

    def get_config(self) -> Config:
        """The weight as JSON: everything but its value."""
        return mark(self.own_config(), self)

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
            **became,
        }

    @classmethod
    def from_config(cls, config: Config) -> Weight:
        """The weight of a config: one object for each uid and sharing scope.

        Raises:
            InvalidConfig: The config is not one that a `Weight` wrote, or another one of this uid says something else.
        """
        config = check_config(config)
        uid = config.pop("uid")
        scope = scope_of(uid)
        if scope is not None and uid in scope:
            check_agrees(config, scope[uid])
            scope[uid].only_named = False
            return scope[uid]
        origin, path, initializer = config.pop("origin"), config.pop("path"), config.pop("initializer")
        became, autocasts = config.pop("became", None), config.pop("autocast", True)
        try:
            weight = cls(**config)  # without an initializer it makes no variable, whose path is not known yet
            weight._wanted_path = path_of(weight.name) if path is None else path
            weight.autocasts = autocasts
            weight.initializer = keras.initializers.get(initializer)
            if became is not None:
                weight.become(decode_became(became, weight))
            elif weight.shape is not None and weight.initializer is not None:
                weight._create(weight.initializer, weight.shape, weight._given_dtype)
        except Exception as error:  # a stranger's config may make Keras fail in any way
            raise InvalidConfig(f"A weight cannot be made from its config: {error}") from error
        weight.origin = origin
        if scope is not None:
            scope[uid] = weight
        return weight

    def save_own_variables(self, store: Any) -> None:
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

    def load_own_variables(self, store: Any) -> None:
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

    def load_value(self, value: Any, loaded: dict[int, Any], *, source: str) -> None:
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
            present = keras.ops.convert_to_numpy(keras_seam.raw_value(self.variable))
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
        self.assign(array)
        loaded[id(self)] = source

    # ------------------------------------------------------------------ quantising

    _layers = keras_seam.WatchedSublayers()

    def quantize(self, mode: str | None = None, type_check: bool = True, config: Any = None) -> None:
        """Stores the weight as integers and a scale from now on; all its uses follow.

        `model.quantize` does this for the weights of tied layers. It is for a weight that only layers of your own read.

        Args:
            mode: `"int8"` or `"int4"`.
            type_check: As in Keras; it changes nothing here.
            config: A Keras config of one of these modes.

        Raises:
            Unsupported: Another mode, or a weight that holds no matrix of floats.
        """
        if not keras_seam.is_quantizing_a_model():
            keras_seam.quantizers["weight"](self, mode, config)

    def _check_quantize_args(self, *args: Any, **kwargs: Any) -> None:
        """Checked where the work is done."""

    def __repr__(self) -> str:
        shape = "shape not known yet" if self.shape is None else f"shape={self.shape}"
        state = "" if self.trainable else ", frozen"
        return f"<Weight {self.name}: {shape}, dtype={self.dtype}{state}, uses={len(self._uses)}>"

    def __reduce__(self) -> Any:
        value = None if self._variable is None else self.numpy()
        return (_rebuild, (self.get_config(), value, self._became))


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


def _rebuild(config: Config, value: Any, became: Expression | None = None) -> Weight:
    """A copy with an id of its own; pickle's memo makes it one for all that share it."""
    config = check_config(config)
    config.pop("became", None)
    config.pop("uid")
    origin, path, autocasts = config.pop("origin"), config.pop("path"), config.pop("autocast", True)
    weight = Weight(**config)
    weight.origin = origin
    weight._wanted_path = path_of(weight.name) if path is None else path
    weight.autocasts = autocasts
    if value is not None:
        weight.assign(value)
    if became is not None:
        weight.become(became)
    return weight

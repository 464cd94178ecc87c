"""`tether.Weight`: one stored weight, as people make it and read it."""

from __future__ import annotations

import json
import math
import types
from typing import TYPE_CHECKING, Any, NoReturn, cast

import keras
import numpy as np

from tether import keras_seam
from tether.errors import (
    InvalidConfig,
    NotATensor,
    ShapeMismatch,
    TetherError,
    UnknownShape,
    Unsupported,
    as_dtype,
    did_you_mean,
    received,
)
from tether.types import Config, Function, Tensor
from tether.weights.codec import decode_became
from tether.weights.expression import MAX_ELEMENTS, Expression, Shape
from tether.weights.identity import born, fresh_uid, mark, scope_of
from tether.weights.storage import Copy, Storage, Use, path_of

_FOR_PEOPLE = (
    "T", "assign", "astype", "constraint", "dtype", "get_config", "initializer", "is_built", "mT", "mean", "name",
    "notation", "numpy", "path", "quantize", "regularizer", "reshape", "role", "scale_gradient", "shape",
    "stop_gradient", "sum", "trainable", "transpose", "uses", "value", "variable", "weights_used",
)  # fmt: skip
"""What `dir` names: of expressions, and of a stored weight."""


@keras.saving.register_keras_serializable(package="tether", name="Weight")
class Weight(Storage):
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

    def __init__(
        self,
        shape: object = None,
        initializer: object = None,
        *,
        dtype: str | None = None,
        trainable: bool = True,
        regularizer: object = None,
        constraint: object = None,
        name: str | None = None,
        role: str | None = None,
    ) -> None:
        shape, initializer, start = read_start(shape, initializer, dtype)
        dtype = None if dtype is None else as_dtype(dtype)
        check_flags(name, trainable)
        # Keras would read the name of a dtype such as int8 as a policy that quantises.
        super().__init__(name=name, dtype=dtype if dtype in ("float16", "bfloat16", "float32", "float64") else None)
        self.initializer = initializer
        self.regularizer = read_named("regularizer", regularizer)
        self.constraint = read_named("constraint", constraint)
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
            lies=None,
            stands_for=None,
        )
        born(self)
        keras_seam.see(self)
        self.built = True
        if start is not None:
            self._create(Copy(start), tuple(start.shape), self._given_dtype)
        elif shape is not None and self.initializer is not None:
            self._create(self.initializer, shape, self._given_dtype)

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
    def variable(self) -> keras.Variable:
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

    if not TYPE_CHECKING:

        @value.setter
        def value(self, value: object) -> None:
            raise NotATensor(f"The value of the weight {self.name!r} is stored by a method: `w.assign(value)`.")

    def assign(self, value: Tensor) -> None:
        """Stores a value of the weight's shape.

        Args:
            value: An array or tensor. A copy is stored.

        Raises:
            ShapeMismatch: The value has another shape.
        """
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

    @property
    def became(self) -> Expression | None:
        """What it has become, if it stores nothing any more."""
        return cast("Expression | None", self._became)

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

    def get_config(self) -> Config:
        """The weight as JSON: everything but its value."""
        return mark(self.own_config(), self)

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
            known = cast("Weight", scope[uid])
            check_agrees(config, known)
            known.only_named = False
            return known
        origin, path, initializer = config.pop("origin"), config.pop("path"), config.pop("initializer")
        became, autocasts, of = config.pop("became", None), config.pop("autocast", True), config.pop("of", None)
        try:
            weight = cls(**config)  # without an initializer it makes no variable, whose path is not known yet
            weight.__dict__["stands_for"] = of
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

    def quantize(self, mode: str | None = None, type_check: bool = True, config: object = None) -> None:
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

    def __dir__(self) -> list[str]:
        """What people use, of the much more that Keras has for a layer; and attributes that its save walks into."""
        saved = (keras_seam.KerasSaveable, list, tuple, dict, set)
        held = [name for name, value in keras_seam.attributes(self) if name[0] != "_" and isinstance(value, saved)]
        return [*_FOR_PEOPLE, *held]

    def __repr__(self) -> str:
        shape = "shape not known yet" if self.shape is None else f"shape={self.shape}"
        state = "" if self.trainable else ", frozen"
        return f"<Weight {self.name}: {shape}, dtype={self.dtype}{state}, uses={len(self._uses)}>"

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        value = None if self._variable is None else self.numpy()
        return (_rebuild, (self.get_config(), value, self._became))


def _rebuild(config: Config, value: object, became: Expression | None = None) -> Weight:
    """A copy with an id of its own; pickle's memo makes it one for all that share it."""
    config = check_config(config)
    config.pop("became", None)
    config.pop("uid")
    origin, path, autocasts = config.pop("origin"), config.pop("path"), config.pop("autocast", True)
    of = config.pop("of", None)
    weight = Weight(**config)
    weight.__dict__["stands_for"] = of
    weight.origin = origin
    weight._wanted_path = path_of(weight.name) if path is None else path
    weight.autocasts = autocasts
    if value is not None:
        weight.assign(value)
    if became is not None:
        weight.become(became)
    return weight


# --------------------------------------------------------------------------- from arguments and from configs
# Reading what a weight is made of: from a caller's arguments, and from a config that a stranger may have written.


ROLES = ("part", "fixed", "strength", "state", "integers", "scale")
"""What a weight may be for, where it is no weight of its own."""


def check_role(role: object) -> str | None:
    """A role, or `None`.

    Raises:
        TetherError: It is no role that there is.
    """
    if role is not None and (not isinstance(role, str) or role not in ROLES):
        raise TetherError(f"A weight's role is one of {', '.join(map(repr, ROLES))}, or None. {received(role=role)}")
    return role


def read_start(shape: Any, initializer: object, dtype: object) -> tuple[Shape | None, Any, Any]:
    """Tells a shape from an array: returns shape, initializer, start value."""
    for given in (shape, initializer):
        if isinstance(given, keras.Variable):
            raise TetherError(
                f"A Weight cannot be made from a keras.Variable, since two things could be meant. To share the "
                f"variable that a layer has: `tether.weight_of(layer, {given.name!r})`. To start at a copy of its "
                "present value: `tether.Weight(variable.numpy())`."
            )
        if isinstance(given, Expression):
            raise TetherError(
                "A Weight owns storage; an expression does not. Use the expression itself, or copy its value: "
                "`tether.Weight(expression.numpy())`."
            )
    start = None
    if _is_array(shape):
        if initializer is not None:
            raise TetherError("Give an array or an initializer, not both.")
        start, shape = shape, None
    elif _is_array(initializer):
        start, initializer = initializer, None
    if start is not None:
        start = np.array(keras.ops.convert_to_numpy(start) if keras.ops.is_tensor(start) else start)
        if shape is not None and tuple(shape) != start.shape:
            raise ShapeMismatch(
                f"The array has another shape than the weight. {received(shape=shape, array=start.shape)}"
            )
        if start.dtype == np.float64 and dtype is None:
            start = start.astype(keras.config.floatx())
        if start.dtype == np.int64 and dtype is None and np.array_equal(start.astype("int32"), start):
            start = start.astype("int32")
        return None, None, start
    if isinstance(shape, int) and isinstance(initializer, int):
        raise TetherError(
            f"The sizes of a weight are given in one tuple: `tether.Weight(({shape}, {initializer}))`. "
            f"{received(shape=shape, initializer=initializer)}"
        )
    initializer = read_named("initializer", initializer)
    if dtype is not None and keras_seam.is_random(initializer) and not keras_seam.is_float(as_dtype(dtype)):
        raise TetherError(
            f"{type(initializer).__name__} draws floats, and the weight is to store {as_dtype(dtype)}. Give it its "
            "values, or 'zeros'."
        )
    return None if shape is None else check_shape(shape), initializer, None


def check_flags(name: object, trainable: object) -> None:
    """Refuses what is no name, or no flag.

    Raises:
        TetherError: It is none.
    """
    if name is not None and (not isinstance(name, str) or not name or "/" in name):
        raise TetherError(
            f"A weight's name is a string without '/'; a dot stands for one, as in 'encoder.kernel'. "
            f"{received(name=name)}"
        )
    if not isinstance(trainable, (bool, np.bool_)):
        raise TetherError(f"`trainable` of a weight is True or False. {received(trainable=trainable)}")


def read_named(kind: str, value: object) -> Any:
    """Keras's initializer, regularizer or constraint of a name, a config, an object or a function.

    Raises:
        TetherError: Keras knows none.
    """
    module = getattr(keras, f"{kind}s")
    try:
        return module.get(value)
    except (ValueError, TypeError) as error:
        names = [name for name in dir(module) if name[0].islower() and name not in ("get", "serialize", "deserialize")]
        known = ", ".join(name for name in names if callable(getattr(module, name)))
        raise TetherError(
            f"A weight's {kind} is a Keras {kind}, or the name of one.{did_you_mean(value, names, cutoff=0.5)} "
            f"Keras has: {known or error}. {received(**{kind: value})}"
        ) from error


def _is_array(value: object) -> bool:
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return True
    return isinstance(value, list) and any(isinstance(item, (list, float, np.ndarray)) for item in value)


def check_shape(shape: object) -> Shape:
    """A tuple of sizes, from an int, a tuple or a list."""
    if isinstance(shape, int) and not isinstance(shape, bool):
        shape = (shape,)
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in shape
    ):
        hint = " A size that the layer determines is not written: leave the shape out."
        if isinstance(shape, str):
            hint = f" A name is given by keyword: `tether.Weight(name={shape!r})`."
        elif isinstance(shape, keras.layers.Layer):
            hint = f" To share a layer's weight: `tether.weight_of({shape.name}, 'kernel')`."
        raise TetherError(f"A weight's shape is a tuple of integers, as in (784, 64).{hint} {received(shape=shape)}")
    if any(n < 0 for n in shape) or math.prod(int(n) for n in shape) > MAX_ELEMENTS or len(shape) > 32:
        raise TetherError(
            f"A shape has sizes of 0 or more, and at most {MAX_ELEMENTS:,} elements. {received(shape=shape)}"
        )
    return tuple(int(n) for n in shape)


def check_config(config: object) -> Config:
    """A copy of a weight's config, known to be well formed."""
    keys = {"name", "path", "shape", "dtype", "trainable", "initializer", "regularizer", "constraint", "uid", "origin"}
    if not isinstance(config, dict) or set(config) - {"became", "autocast", "role", "of"} != keys:
        raise InvalidConfig(f"A weight's config has the keys {sorted(keys)}. {received(config=config)}")
    config = dict(config)
    if config["shape"] is not None:
        if not isinstance(config["shape"], (list, tuple)):
            raise InvalidConfig(f"A weight's shape is a list of integers. {received(shape=config['shape'])}")
        try:
            config["shape"] = check_shape(config["shape"])
        except TetherError as error:
            raise InvalidConfig(str(error)) from None
    if config["dtype"] is not None:
        config["dtype"] = as_dtype(config["dtype"])
    for key in ("name", "uid", "origin"):
        if not isinstance(config[key], str) or not config[key] or len(config[key]) > 1000:
            raise InvalidConfig(f"A weight's {key} is a string. {received(**{key: config[key]})}")
    if "/" in config["name"] or not isinstance(config["path"], (str, type(None))):
        raise InvalidConfig(f"A weight's name has no '/'. {received(name=config['name'], path=config['path'])}")
    if config["path"] is not None:
        config["path"] = "/".join(filter(None, config["path"].split("/")))
    try:
        check_role(config.get("role"))
    except TetherError as error:
        raise InvalidConfig(str(error)) from None
    if not isinstance(config.get("of", ""), str) or len(config.get("of", "")) > 1000:
        raise InvalidConfig(f"What a weight stands for is named by a path. {received(of=config['of'])}")
    for key in ("trainable", "autocast"):
        if not isinstance(config.get(key, True), bool):
            raise InvalidConfig(f"A weight's {key} is a bool. {received(**{key: config[key]})}")
    for key, module, kind in (
        ("initializer", keras.initializers, keras.initializers.Initializer),
        ("regularizer", keras.regularizers, keras.regularizers.Regularizer),
        ("constraint", keras.constraints, keras.constraints.Constraint),
    ):
        try:
            config[key] = None if config[key] is None else module.get(config[key])
        except Exception as error:
            raise InvalidConfig(f"A weight's {key} cannot be read: {error}") from error
        if not isinstance(config[key], (kind, types.FunctionType, type(None))):
            raise InvalidConfig(f"A weight's {key} is a Keras {key}. {received(type=type(config[key]).__name__)}")
    return config


def check_agrees(config: Config, weight: Weight) -> None:
    """Refuses a second config of a weight that is unlike what the first one made.

    Args:
        config: A config that `check_config` returned.
        weight: The weight that is known by the same uid.

    Raises:
        InvalidConfig: They differ in what the weight is.
    """
    pairs: dict[str, tuple[object, object]] = {
        "shape": (weight.shape, config["shape"]),
        "dtype": (weight.dtype, config["dtype"]),
        "trainable": (weight._trainable_flag, config["trainable"]),
        "regularizer": (_as_text(weight.regularizer), _as_text(config["regularizer"])),
        "constraint": (_as_text(weight.constraint), _as_text(config["constraint"])),
        "role": (weight.role, config.get("role")),
    }
    for key, (known, said) in pairs.items():
        if known != said and not (key in ("shape", "dtype") and None in (known, said)):
            raise InvalidConfig(
                f"What is read has two configs of one weight, {weight.name!r} and {config['name']!r}, which differ in "
                f"{key}: {known} and {said}. Parts of a model that were saved at different times are joined by "
                "`tether.files.retie`, each loaded by itself."
            )


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    said = {"name": getattr(value, "__name__", type(value).__name__)}
    return json.dumps({**said, **(value.get_config() if hasattr(value, "get_config") else {})}, default=repr)

"""`tether.Weight`: one stored weight, as people make it and read it."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import keras

from tether import keras_seam
from tether.errors import (
    InvalidConfig,
    ShapeMismatch,
    TetherError,
    UnknownShape,
    Unsupported,
    received,
)
from tether.types import Config
from tether.weights.codec import decode_became
from tether.weights.expression import Expression, Shape, Tensor
from tether.weights.identity import born, fresh_uid, mark, scope_of
from tether.weights.storage import Copy, Storage, Use, path_of
from tether.weights.weight_config import check_agrees, check_config, check_role, read_start


_FOR_PEOPLE = (
    "T", "assign", "astype", "constraint", "dtype", "get_config", "initializer", "is_built", "name", "notation", "numpy",
    "path", "quantize", "regularizer", "reshape", "role", "scale_gradient", "shape", "stop_gradient", "trainable",
    "transpose", "uses", "value", "variable", "weights_used",
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

    def __dir__(self) -> list[str]:
        """What people use, of the much more that Keras has for a layer; and attributes that its save walks into."""
        held = [name for name, value in vars(self).items() if name[0] != "_" and isinstance(value, (list, keras.Layer))]
        return [*_FOR_PEOPLE, *held]

    def __repr__(self) -> str:
        shape = "shape not known yet" if self.shape is None else f"shape={self.shape}"
        state = "" if self.trainable else ", frozen"
        return f"<Weight {self.name}: {shape}, dtype={self.dtype}{state}, uses={len(self._uses)}>"

    def __reduce__(self) -> Any:
        value = None if self._variable is None else self.numpy()
        return (_rebuild, (self.get_config(), value, self._became))


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

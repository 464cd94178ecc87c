"""Expressions over stored weights: what a layer computes with, to be written, compared, saved and planned.

An expression is a leaf or a node, one operator applied to others. Everything walks its program, a flat list of steps.
The modules above this one provide what its methods and operators do (`provide`).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotATensor, ShapeMismatch, TetherError, UnknownShape, received
from tether.types import Array, Config, Function, Tensor
from tether.weights.axes import Axes, Links

# --------------------------------------------------------------------------- no silent conversion
# What is no tensor and must not become one silently: the ways by which array libraries would take it for one.
#
# A tensor that is made of an expression is its value of one moment. In a Keras graph it would be a constant that
# nothing trains and no file says where it came from. So each protocol by which NumPy, a backend or Keras asks an
# object for a tensor ends in one error, which says what to write. Operators are left out: `array * expression` is an
# expression.


class NoTensor:
    """An object that every library refuses to compute with, in the object's own words.

    A subclass says in `_instead` what is wrong, and what to write instead.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Every function of `keras.ops`, every node of a graph, and every layer that is called looks for tensors in
        # what it is given: that comes first, and alike on all backends.
        keras_seam.refuse_to_be_looked_into(cls, NoTensor._refuse)

    def _instead(self) -> str:
        raise TypeError(f"{type(self).__name__} does not say what to write instead.")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise NotATensor(self._instead())

    __array__ = __tf_tensor__ = __len__ = _refuse

    shape = dtype = property(_refuse)

    def __jax_array__(self) -> object:
        return _Unread(self)

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: object = (), kwargs: dict[str, object] | None = None
    ) -> object:
        # After this error PyTorch's operators hand over, and its functions raise it.
        found: list[object] = [args, *(kwargs or {}).values()]
        while found:
            value = found.pop()
            if isinstance(value, NoTensor):
                value._refuse()
            found.extend(value if isinstance(value, (list, tuple)) else ())
        return NotImplemented


class _Unread:
    """What JAX gets at first: its operators look at the type and hand over, and whoever wants an array asks on."""

    def __init__(self, owner: NoTensor) -> None:
        self.owner = owner

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        self.owner._refuse()

    __array__ = __jax_array__ = _refuse

    shape = dtype = property(_refuse)


# --------------------------------------------------------------------------- expressions
# What a layer computes with: an immutable value over stored weights, arguments and constants.
#
# An `Expression` is a leaf (a `tether.Weight`, an `Argument`, a constant) or a node that applies one operator to
# other expressions. It owns no storage and computes nothing when it is written down: shape and dtype are known at
# once, the tensor is made when somebody reads `.value`.
#
# Every expression has a *program*: its nodes in the order in which they have to be computed, equal parts listed once.
# Evaluating, comparing, printing, saving and checking all walk that one list, so none of them recurses and none
# computes an equal part twice.


Shape = tuple[int, ...]

MAX_AXES = 32
MAX_ELEMENTS = 1 << 34
"""64 GiB of float32: a value beyond that is a mistake, or a file of somebody who means harm."""


_ways: dict[str, Function] = {}
"""What is done with an expression, by name: evaluating, assigning, writing, each operator. The modules of these use the
classes here, so they put their functions in when they are imported."""


def provide(**functions: Function) -> None:
    """Lets the methods and operators of expressions call these functions."""
    _ways.update(functions)


class Expression(NoTensor):
    """A value built from stored weights: immutable, comparable, hashable, printed as mathematics.

    Write one with operators and methods, or with the functions of `tether.ops`.

    Example:
    ```python
    table = tether.Weight((1000, 64), "glorot_uniform", name="table")
    head = tether.tie(keras.layers.Dense(1000), kernel=0.5 * table.T)

    rows = table[:10].reshape(5, 128) @ tether.Weight((128, 3), name="w").stop_gradient()
    print(rows, rows.shape)                  # table[:10].reshape(5, 128) @ w.stop_gradient() (5, 3)
    rows.numpy()                             # a copy; `rows.value` is a tensor of the backend
    (0.5 * table.T).assign(np.ones((64, 1000)))
    assert table.numpy()[0, 0] == 2
    ```
    """

    __slots__ = ()

    stops_gradient: ClassVar[bool] = False
    """Whether no gradient flows through it to what it is made of."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **kwargs: object) -> Any:
        # NumPy hands `array * expression` over here instead of looping over it. What is no operator is refused.
        name = getattr(ufunc, "__name__", "")
        if name in ("equal", "not_equal"):
            return name == "not_equal"
        in_place = {"out": inputs[:1]}  # `array += expression` makes the name `array` mean the expression
        if method == "__call__" and name in _UFUNCS and (not kwargs or kwargs == in_place):
            return _arithmetic(_UFUNCS[name], *inputs)
        self._refuse_numpy(name)

    def __array_function__(self, function: Any, types: object, args: object, kwargs: object) -> NoReturn:
        self._refuse_numpy(getattr(function, "__name__", ""))

    def _refuse_numpy(self, name: str) -> NoReturn:
        known = {"absolute": "abs", "amax": "max", "amin": "min"}.get(name, name)
        here = "" if known not in _ways else f"`tether.ops.{known}` makes an expression. "
        raise NotATensor(f"NumPy's `{name}` makes an array. {here}{self._instead()}")

    if TYPE_CHECKING:  # what a type checker refuses, with its own words
        __iter__: ClassVar[None] = None
    else:

        def __iter__(self) -> Any:
            raise NotATensor(
                f"{self.notation()} was iterated over, or searched by `in`, or unpacked. An expression has no entries; "
                "rows are expressions too: `[w[0], w[1]]`, and `w.numpy()` is an array."
            )

        def __contains__(self, other: object) -> bool:
            return bool(self.__iter__())

        def _refuse_comparing(self, other: object) -> NoReturn:
            raise NotATensor(
                f"{self.notation()} was compared with {_noted(other)} by size, and an expression has no value yet. "
                "Write `w.numpy() > 0` for its present value, or in an expression `tether.ops.maximum(w, 0)`, or "
                "`tether.ops.apply(keras.ops.greater, w, 0)` as the condition of `tether.ops.where`."
            )

        __lt__ = __le__ = __gt__ = __ge__ = _refuse_comparing

        def __setitem__(self, key: object, value: object) -> NoReturn:
            raise NotATensor(
                f"Entries of {self.notation()} were set, and an expression is immutable. Store a whole value by "
                "`w.assign(value)`, or write another expression: `tether.ops.where(condition, value, w)`, "
                "`tether.ops.concatenate([w[:2], new])`."
            )

        def _refuse_number(self) -> NoReturn:
            raise NotATensor(
                f"{self.notation()} was used where a number is expected, and has shape {self.shape}. Write "
                "`float(w.numpy())` for the present value of one number, or `w.sum()` for an expression."
            )

        __float__ = __int__ = __complex__ = _refuse_number

    @property
    def shape(self) -> Shape | None:
        """The shape of the value, or `None` as long as a weight in it has none."""
        raise TypeError(f"{type(self).__name__} has no shape.")

    @property
    def dtype(self) -> str | None:
        """The dtype of the value outside autocast scopes, or `None` as long as it is not known."""
        raise TypeError(f"{type(self).__name__} has no dtype.")

    @property
    def became(self) -> Expression | None:
        """What a stored weight has become, if it is an expression of other weights now: see `Weight.become`."""
        return None

    @property
    def ndim(self) -> int | None:
        """The number of axes, or `None` as long as the shape is not known."""
        return None if self.shape is None else len(self.shape)

    @property
    def value(self) -> Tensor:
        """The tensor, computed now from what is stored, on the backend in use."""
        return _ways["evaluate"](self)

    if not TYPE_CHECKING:

        @value.setter
        def value(self, value: object) -> None:
            raise NotATensor(f"The value of {self.notation()} is stored by a method: `w.assign(value)`.")

    def numpy(self) -> Array:
        """The value as a NumPy array (a copy).

        Raises:
            TetherError: A part of it lies on the devices of other processes, and this is not inside of
                `tether.distribution.gathering()`.
        """
        with keras_seam.whole_values():
            value = self.value
            return np.array(keras_seam.to_numpy(value, self.notation() if keras_seam.lies_elsewhere(value) else ""))

    def assign(self, value: object) -> None:
        """Stores a value through the expression: afterwards `expression.value` equals it.

        Args:
            value: An array or tensor of the expression's shape.

        Raises:
            NotInvertible: The expression has no inverse; the error names the part.
            ShapeMismatch: The value has another shape.
        """
        _ways["assign"](self, value)

    # ------------------------------------------------------------------ structure

    @property
    def T(self) -> Expression:
        """The value with its axes reversed."""
        return self.transpose()

    @property
    def mT(self) -> Expression:
        """The value with its last two axes exchanged."""
        return self.swapaxes(-2, -1)

    def swapaxes(self, axis1: int, axis2: int) -> Expression:
        """The value with two axes exchanged.

        Args:
            axis1: The number of an axis.
            axis2: That of the other one.

        Raises:
            UnknownShape: A weight in it has no shape yet.
            ShapeMismatch: There is no such axis.
        """
        return _ways["swapaxes"](self, axis1, axis2)

    def transpose(self, *axes: int | Sequence[int]) -> Expression:
        """The value with its axes permuted, reversed if no axes are given.

        Args:
            *axes: The number of the axis that each axis of the result is, one by one or in a tuple, as in NumPy.

        Raises:
            ShapeMismatch: They are no permutation of the axes.
        """
        return _ways["transpose"](self, axes or None)

    def reshape(self, *shape: int | tuple[int, ...]) -> Expression:
        """The value in another shape of as many elements; one size may be -1.

        Args:
            *shape: The sizes, one by one or in a tuple.

        Raises:
            ShapeMismatch: The shape has another number of elements.
        """
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return _ways["reshape"](self, sizes)

    def __getitem__(self, key: object) -> Expression:
        return _ways["index"](self, key)

    def astype(self, dtype: str) -> Expression:
        """The value in another dtype.

        Args:
            dtype: The name of a dtype, such as `"bfloat16"`.

        Raises:
            InvalidConfig: There is no such dtype.
        """
        return _ways["cast"](self, dtype)

    # ------------------------------------------------------------------ along axes

    def sum(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Expression:
        """The sum of its numbers: see `tether.ops.sum`.

        Args:
            axis: An axis, or several; left out, all.
            keepdims: Whether the axes stay, with the size 1.
        """
        return _ways["sum"](self, axis, keepdims)

    def mean(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Expression:
        """The mean of its numbers: see `tether.ops.mean`.

        Args:
            axis: An axis, or several; left out, all.
            keepdims: Whether the axes stay, with the size 1.
        """
        return _ways["mean"](self, axis, keepdims)

    def max(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Expression:
        """The largest of its numbers: see `tether.ops.max`.

        Args:
            axis: An axis, or several; left out, all.
            keepdims: Whether the axes stay, with the size 1.
        """
        return _ways["max"](self, axis, keepdims)

    def min(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Expression:
        """The smallest of its numbers: see `tether.ops.min`.

        Args:
            axis: An axis, or several; left out, all.
            keepdims: Whether the axes stay, with the size 1.
        """
        return _ways["min"](self, axis, keepdims)

    # ------------------------------------------------------------------ gradient

    def stop_gradient(self) -> Expression:
        """The same value; no gradient flows through this use."""
        return _ways["stop_gradient"](self)

    def scale_gradient(self, scale: float) -> Expression:
        """The same value; the gradient through this use is multiplied by `scale`.

        Args:
            scale: A finite number.

        Raises:
            InvalidConfig: It is none.
        """
        return _ways["scale_gradient"](self, scale)

    # ------------------------------------------------------------------ arithmetic

    def __add__(self, other: object) -> Expression:
        return _arithmetic("add", self, other)

    def __radd__(self, other: object) -> Expression:
        return _arithmetic("add", other, self)

    def __sub__(self, other: object) -> Expression:
        return _arithmetic("subtract", self, other)

    def __rsub__(self, other: object) -> Expression:
        return _arithmetic("subtract", other, self)

    def __mul__(self, other: object) -> Expression:
        return _arithmetic("multiply", self, other)

    def __rmul__(self, other: object) -> Expression:
        return _arithmetic("multiply", other, self)

    def __truediv__(self, other: object) -> Expression:
        return _arithmetic("divide", self, other)

    def __rtruediv__(self, other: object) -> Expression:
        return _arithmetic("divide", other, self)

    def __matmul__(self, other: object) -> Expression:
        return _arithmetic("matmul", self, other)

    def __rmatmul__(self, other: object) -> Expression:
        return _arithmetic("matmul", other, self)

    def __pow__(self, other: object) -> Expression:
        return _ways["power"](self, other)

    def __rpow__(self, other: object) -> Expression:
        return _ways["power"](other, self)

    def __neg__(self) -> Expression:
        return _arithmetic("negative", self)

    def __abs__(self) -> Expression:
        return _arithmetic("abs", self)

    # ------------------------------------------------------------------ what must not happen silently

    def _instead(self) -> str:
        return (
            f"{self.notation()} was used where a tensor or an array is expected. Converting it would freeze its "
            "present value into a constant. Write `.value` inside `call` for a tensor that follows the stored weights, "
            "as in `keras.ops.matmul(x, w.value)`, or `.numpy()` for a copy. In a functional graph give the weight to "
            "a layer: `tether.Lambda(lambda x, w: x @ w, w=w)(x)`, or `tether.tie(layer, kernel=w)`."
        )

    def __bool__(self) -> bool:
        return True

    # ------------------------------------------------------------------ views of the program

    def notation(self) -> str:
        """The expression in mathematics, as in `0.5 * codec.T + A @ B`."""
        return _ways["notation"](self)

    def weights_used(self) -> tuple[Stored, ...]:
        """The stored weights in it, each once, in the order in which they appear."""
        # A method, not a property: Keras's save walks into what a layer's properties hold, and the
        # only weight that a Weight uses is itself.
        return tuple(leaf for leaf in leaves(self) if isinstance(leaf, Stored))


if TYPE_CHECKING:

    class _TrackedByKeras:
        """What a type checker is to know of the layer that a weight is, and of `Weight` where that is not known yet.

        Keras's class has bases without types, so that every name would pass for an attribute of a weight.
        """

        name: str
        built: bool
        initializer: Any
        regularizer: Any
        constraint: Any
        uid: str
        origin: str
        born: int
        generation: int
        autocasts: bool
        only_named: bool
        was_used: bool
        first_initializer: Any
        lies: tuple[str | None, ...] | None
        stands_for: str | None

        def __init__(
            self,
            shape: object = None,
            initializer: object = None,
            *,
            dtype: str | None = None,
            trainable: bool = True,
            name: str | None = None,
            role: str | None = None,
        ) -> None: ...

        @property
        def variable(self) -> keras.Variable: ...

        @property
        def variables(self) -> list[keras.Variable]: ...

        @property
        def weights(self) -> list[keras.Variable]: ...

        @property
        def trainable_variables(self) -> list[keras.Variable]: ...

        @property
        def non_trainable_variables(self) -> list[keras.Variable]: ...

        @property
        def path(self) -> str: ...

        @property
        def role(self) -> str | None: ...

        @property
        def is_built(self) -> bool: ...

        @property
        def trainable(self) -> bool: ...
        @trainable.setter
        def trainable(self, value: bool) -> None: ...

        @property
        def trainable_flag(self) -> bool: ...

        @property
        def became(self) -> Expression | None: ...

        @property
        def uses(self) -> tuple[Any, ...]: ...

        @property
        def trainable_weights(self) -> list[keras.Variable]: ...

        @property
        def non_trainable_weights(self) -> list[keras.Variable]: ...

        def count_params(self) -> int: ...

        def get_config(self) -> Config: ...

        def own_config(self) -> Config: ...

        @classmethod
        def from_config(cls, config: Config) -> Stored: ...

        def store(self, value: Tensor) -> None: ...

        def give_start(self, shape: Shape, dtype: str, initializer: object, *, path: str | None = None) -> None: ...

        def load_value(self, value: object, loaded: dict[int, str], *, source: str) -> None: ...

        def add_use(self, use: Any) -> None: ...

        def remove_use(self, use: Any) -> None: ...

        def refresh(self, use: Any = None) -> None: ...

        def _free_suffix(self, suffix: str) -> str: ...

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
        ) -> Stored: ...

else:
    _TrackedByKeras = keras.layers.Layer


class Stored(Expression, _TrackedByKeras):
    """A leaf that owns storage; `tether.Weight` is the only one. What is below that class knows it by this name."""


_UFUNCS = {
    "add": "add", "subtract": "subtract", "multiply": "multiply", "divide": "divide", "true_divide": "divide",
    "matmul": "matmul", "negative": "negative", "power": "power",
}  # fmt: skip
"""NumPy's functions that its arrays call for an operator, and the operator."""


def _noted(value: object) -> str:
    return value.notation() if isinstance(value, Expression) else type(value).__name__ if value is None else repr(value)


def _arithmetic(operator: str, *operands: object) -> Any:
    try:
        expressions = [as_expression(operand) for operand in operands]
    except TypeError:
        wrong = next(operand for operand in operands if not _is_expression(operand))
        hint = "" if isinstance(wrong, NoTensor) else instead_of(wrong)  # a form hands itself over
        if hint:
            others = ", ".join(each.notation() for each in operands if isinstance(each, Expression))
            raise NotATensor(
                f"{others} was combined with what is no weight, expression, number or array.{hint} "
                f"{received(operand=wrong)}"
            ) from None
        return NotImplemented
    return _ways[operator](*expressions)


def _is_expression(value: object) -> bool:
    try:
        as_expression(value)
    except TypeError:
        return False
    return True


def instead_of(value: object, name: str = "kernel") -> str:
    """What to write in the place of what is no expression, as a sentence; nothing where that cannot be said.

    Args:
        value: What was given.
        name: What the weight may be called that was meant.
    """
    if isinstance(value, keras.layers.Layer):
        return f" Of a layer say which weight: `tether.weight_of({_variable_name(value.name)}, {name!r})`."
    if isinstance(value, NoTensor):
        return (
            " A form is called with a weight, or added to one: "
            f"`tether.weight_of(layer, {name!r}) + tether.low_rank(8)`, `tether.forms.dora(8)(w)`."
        )
    if isinstance(value, str):
        return f" A weight has to be looked up: `tether.weight_of(layer, {value!r})`."
    if isinstance(value, (types.FunctionType, type)):
        if str(getattr(value, "__module__", "")).startswith("tether"):
            return f" `{value.__name__}` has to be called first, as in `tether.low_rank(8)`, and that with a weight."
        return f" A function is called with the weight: `function(tether.weight_of(layer, {name!r}))`."
    return ""


def _variable_name(name: str) -> str:
    return name if name.isidentifier() else "layer"


def as_expression(value: object) -> Expression:
    """Turns a number or an array into a constant; an expression stays itself.

    Raises:
        TypeError: It is neither.
    """
    return value if isinstance(value, Expression) else _ways["constant"](value)


class Node(Expression):
    """One operator applied to other expressions.

    A subclass is an operator. It has a `name` for files, lists its parameters in `accepts` and checks
    them in `check_parameters`, and computes shape, dtype and value from those of its operands. It may
    say how to print itself and how to push a value back (`inverse`). Nothing outside its own file has to
    know it.
    """

    name: ClassVar[str]
    arity: ClassVar[int | None] = 1
    """How many operands it takes; `None` for one or more."""
    accepts: ClassVar[tuple[str, ...]] = ()
    """The names of its parameters."""
    indices: ClassVar[tuple[int, ...]] = ()
    """Places of operands by which it chooses: a number that is known while the backend compiles stays one."""
    seeds: ClassVar[tuple[int, ...]] = ()
    """Places of operands that are seeds: expressions that are stored as one draw from one of them."""
    is_random: ClassVar[bool] = False
    """Whether its value in training is drawn: once in a call, and at each turn of a loop again."""
    elementwise_cost: ClassVar[bool] = True
    """Whether computing it does arithmetic; a mere view of memory is not worth remembering."""

    __slots__ = (
        "__weakref__",
        "_cheap",
        "_dtype",
        "_hash",
        "_late",
        "_live",
        "_program",
        "_shape",
        "_since",
        "_waits",
        "operands",
        "parameters",
    )
    operands: tuple[Expression, ...]
    parameters: Config
    _shape: Shape | None  # as known when it was written down
    _dtype: str | None
    _late: tuple[tuple[Shape | None, ...], Shape] | None  # the leaves' shapes, and the shape found from them later
    _waits: Expression | None  # a leaf without a shape: as long as it has none, nobody has to look further
    _since: int  # how many weights had become expressions when the next three were found
    _program: tuple[Step, ...] | None
    _cheap: bool | None
    _live: tuple[Stored, ...] | None
    _hash: int

    def __init__(self, *operands: Expression, **parameters: object) -> None:
        if (self.arity is not None and len(operands) != self.arity) or not operands:
            raise TetherError(
                f"{self.name} takes {self.arity or 'at least one'} operand(s). {received(n=len(operands))}"
            )
        if not set(parameters) <= set(self.accepts):
            raise TetherError(
                f"{self.name} takes the parameters {list(self.accepts)}. {received(parameters=sorted(parameters))}"
            )
        set_slot = object.__setattr__
        set_slot(self, "operands", operands)
        set_slot(self, "parameters", self.check_parameters(parameters))
        set_slot(self, "_hash", hash((self.name, operands, tuple(sorted(self.parameters.items(), key=lambda i: i[0])))))
        for slot in ("_shape", "_dtype", "_late", "_waits", "_program", "_cheap", "_live"):
            set_slot(self, slot, None)
        set_slot(self, "_since", _replaced)
        self._know_what_can_be_known()

    def _know_what_can_be_known(self) -> None:
        """Finds shape and dtype now if the operands have theirs: a wrong shape is an error where it is written.

        It asks the operands only, so a long chain of expressions costs no more than its length.
        """
        shapes = [operand.shape for operand in self.operands]
        known = [shape for shape in shapes if shape is not None]
        if len(known) == len(shapes):
            object.__setattr__(self, "_shape", self._checked_shape(known))
        else:
            waits = (_shapeless_leaf(o) for o, shape in zip(self.operands, shapes, strict=True) if shape is None)
            object.__setattr__(self, "_waits", next(waits))
        dtypes = [o._dtype if isinstance(o, Node) else o.dtype for o in self.operands]
        if None not in dtypes:
            object.__setattr__(self, "_dtype", self.infer_dtype(*(dtype for dtype in dtypes if dtype is not None)))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{self.notation()} is an expression, which is immutable. What trains is said of its weights, "
            f"`w.trainable = False`, or by `.stop_gradient()`; a value is stored by `.assign(value)`. "
            f"{received(attribute=name)}"
        )

    # ------------------------------------------------------------------ what an operator defines

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Validates parameters, also those of a stranger's file; returns all of them, hashable."""
        return {}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The shape of the value, from the shapes of the operands."""
        raise TypeError(f"{type(self).__name__} does not say its shape.")

    def infer_dtype(self, *dtypes: str) -> str | None:
        """The dtype of the value, from those of the operands (a Python number counts by its type)."""
        return dtypes[0]

    def compute(self, *values: Tensor) -> Tensor:
        """The value, from the tensors of the operands, in `keras.ops`."""
        raise TypeError(f"{type(self).__name__} does not compute.")

    def format(self, *terms: Term) -> Term:
        """The expression in mathematics, from those of the operands."""
        arguments = [term.text for term in terms] + [f"{key}={value!r}" for key, value in self.parameters.items()]
        return Term(f"{self.name}({', '.join(arguments)})")

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The shape of the operand that has none yet, if the result has `shape` and that determines it."""
        return None

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """Values for the operands that give `value`, `None` for a constant; or `None` where there is no inverse."""
        return None

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The labels of the value's axes, from those of the operands' axes (`weights.axes`): which axes are the same.

        `None` where none of them is an axis of an operand, as of a function of a whole matrix. An operator that is
        `expanded` need not say it.
        """
        return None

    def expanded(self) -> Expression | None:
        """An equal expression in simpler operators, if there is one: what a planner may compute in another order."""
        return None

    # ------------------------------------------------------------------ what follows from it

    @property
    def shape(self) -> Shape | None:
        """The shape of the value, or `None` as long as a weight in it has none."""
        return _late_shape(self) if self._shape is None else self._shape

    def _checked_shape(self, shapes: list[Shape]) -> Shape:
        """The inferred shape; a misfit is an error that names both shapes."""
        try:
            shape = tuple(int(size) for size in self.infer_shape(*shapes))
        except TetherError:
            raise
        except (ValueError, IndexError, TypeError, OverflowError) as error:
            raise ShapeMismatch(
                f"The shapes in {self.notation()} do not fit: "
                f"{', '.join(f'{o.notation()} has shape {s}' for o, s in zip(self.operands, shapes, strict=True))}"
                f" ({error})."
            ) from None
        if len(shape) > MAX_AXES or math.prod(shape) > MAX_ELEMENTS:
            raise ShapeMismatch(
                f"{self.notation()} would have more than {MAX_AXES} axes or {MAX_ELEMENTS:,} elements. "
                f"{received(shapes=shapes)}"
            )
        return shape

    @property
    def dtype(self) -> str | None:
        """The dtype of the value outside autocast scopes, or `None` as long as it is not known."""
        return _late_dtype(self) if self._dtype is None else self._dtype

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Node) or self._hash != other._hash:
            return False
        return all(a.same_as(b) for a, b in zip(program(self), program(other), strict=False)) and len(
            program(self)
        ) == len(program(other))

    def __repr__(self) -> str:
        return self.notation()

    def __reduce__(self) -> Any:
        # The program, not the operands: pickle would recurse as deep as the expression is.
        return (_rebuild, (_without_operands(self),))


class StatefulNode(Node):
    """An operator with state, which is some of its operands: weights that do not train, or entries of their stack.

    The state is advanced once for each outer call that trains, before the value is computed; in a `Repeat` once at
    each turn.
    """

    __slots__ = ()

    def advance(self, *values: Tensor) -> dict[int, Tensor]:
        """The new state, from the tensors of the operands: a value for each operand that holds some, by its place."""
        raise TypeError(f"{type(self).__name__} does not say how its state goes on.")


Bare = Expression | tuple[type["Node"], tuple[int, ...], Config]
"""A step of a program by itself: a leaf, or a node's class, the places of its operands, and its parameters."""


def _without_operands(root: Expression) -> list[Bare]:
    """The steps of an expression as leaves, and as nodes that name their operands by place."""
    return [
        (type(step.expression), step.operands, step.expression.parameters)
        if isinstance(step.expression, Node)
        else step.expression
        for step in program(root)
    ]


def _rebuild(steps: list[Bare]) -> Expression:
    done: list[Expression] = []
    for step in steps:
        if isinstance(step, Expression):
            done.append(step)
        else:
            cls, places, parameters = step
            done.append(cls(*(done[place] for place in places), **parameters))
    return done[-1]


def rewritten(
    root: Expression,
    instead: Callable[[int, Expression], Expression | None],
    over: Callable[[Node, list[Expression]], Expression] | None = None,
) -> Expression:
    """The expression with other parts in the place of some; what is made of none of them stays the object that it is.

    Args:
        root: The expression.
        instead: What takes the place of a step, by its place in the program; `None` if it stays.
        over: Makes a node again over other operands; left out, as it is.
    """
    done: list[Expression] = []
    for place, step in enumerate(program(root)):
        current = step.expression
        found = instead(place, current)
        if found is None and isinstance(current, Node):
            operands = [done[at] for at in step.operands]
            if any(new is not old for new, old in zip(operands, current.operands, strict=True)):
                found = type(current)(*operands, **current.parameters) if over is None else over(current, operands)
        done.append(current if found is None else found)
    return done[-1]


@dataclass(frozen=True)
class Term:
    """A piece of notation and how tightly its outermost operator binds."""

    text: str
    binding: int = 100

    def inside(self, binding: int) -> str:
        """The text, in parentheses if it binds less tightly than `binding`."""
        return self.text if self.binding >= binding else f"({self.text})"


@dataclass(frozen=True)
class Step:
    """One entry of a program: an expression, and where its operands stand in the list."""

    expression: Expression
    operands: tuple[int, ...]

    def same_as(self, other: Step) -> bool:
        """Whether both compute the same from the same places."""
        if self.operands != other.operands:
            return False
        mine, theirs = self.expression, other.expression
        if isinstance(mine, Node) and isinstance(theirs, Node):
            return mine.name == theirs.name and mine.parameters == theirs.parameters
        return mine == theirs


MAX_STEPS = 10_000
"""More steps than any weight needs; a longer program is refused before it costs memory."""


_replaced = 0
"""How many weights have become expressions: what was found before the last one of them may be out of date."""


def note_replacement() -> None:
    """Has every expression look again at what it is made of: a weight has become an expression."""
    global _replaced
    _replaced += 1


def _up_to_date(root: Node) -> Node:
    if root._since != _replaced:
        for slot in ("_program", "_cheap", "_live"):
            object.__setattr__(root, slot, None)
        object.__setattr__(root, "_since", _replaced)
    return root


def resolved(root: Expression) -> Expression:
    """The expression with what weights have become written out in their places."""
    if not _replaced:
        return root
    if not isinstance(root, Node):
        return root if root.became is None else resolved(root.became)
    waiting, seen = [cast("Expression", root)], set()
    while waiting:
        current = waiting.pop()
        if current.became is not None:
            return _rebuild(_without_operands(root))
        if isinstance(current, Node) and id(current) not in seen:
            seen.add(id(current))
            waiting.extend(current.operands)
    return root


def program(root: Expression) -> tuple[Step, ...]:
    """The steps that compute an expression, in order, equal parts once; the last is the expression itself."""
    if not isinstance(root, Node):
        return (Step(root, ()),) if root.became is None else program(root.became)
    found = _up_to_date(root)._program
    if found is None:
        found = _linearize(root)
        object.__setattr__(root, "_program", found)
    return found


def _linearize(root: Node) -> tuple[Step, ...]:
    steps: list[Step] = []
    places: dict[object, int] = {}  # what a step computes -> its place
    done: dict[int, int] = {}  # id of an expression object -> its place
    stack: list[Expression] = [root]
    while stack:
        current = stack[-1]
        if id(current) in done:
            stack.pop()
            continue
        instead = () if current.became is None else (current.became,)
        operands = current.operands if isinstance(current, Node) else instead
        waiting = [operand for operand in operands if id(operand) not in done]
        if waiting:
            stack.extend(reversed(waiting))
            continue
        stack.pop()
        inputs = tuple(done[id(operand)] for operand in operands)
        if instead:
            (done[id(current)],) = inputs
            continue
        key: object = current
        if isinstance(current, Node):
            key = (current.name, inputs, tuple(sorted(current.parameters.items(), key=lambda i: i[0])))
        if key not in places:
            if len(steps) >= MAX_STEPS:
                raise TetherError(f"An expression may have at most {MAX_STEPS} steps.")
            places[key] = len(steps)
            steps.append(Step(current, inputs))
        done[id(current)] = places[key]
    return tuple(steps)


def _late_shape(root: Node) -> Shape | None:
    """The shape of an expression that was written down before its weights had theirs.

    A failed tie takes the shape that it gave a weight back again, so what was found is kept only as
    long as all leaves have the shapes that it was found from.
    """
    if root._waits is not None and root._waits.shape is None:
        return None
    now = tuple(leaf.shape for leaf in leaves(root))
    if root._late is not None and root._late[0] == now:
        return root._late[1]
    found: list[Shape] = []
    for step in program(root):
        current = step.expression
        shape: Shape | None
        if isinstance(current, Node):
            shape = current._shape or current._checked_shape([found[place] for place in step.operands])
        else:
            shape = current.shape
        if shape is None:
            object.__setattr__(root, "_waits", current)
            return None
        found.append(shape)
    object.__setattr__(root, "_late", (now, found[-1]))
    return found[-1]


def _late_dtype(root: Node) -> str | None:
    """The dtype of an expression that was written down before its weights had theirs."""
    found: list[str] = []
    for step in program(root):
        current = step.expression
        dtype: str | None
        if isinstance(current, Node):
            dtype = current._dtype or current.infer_dtype(*(found[place] for place in step.operands))
        else:
            dtype = current.dtype
        if dtype is None:
            return None
        found.append(dtype)
    return found[-1]


def _shapeless_leaf(expression: Expression) -> Expression | None:
    """A leaf of the expression that is known to have no shape."""
    leaf = expression._waits if isinstance(expression, Node) else expression
    return leaf if leaf is not None and leaf.shape is None else None


def leaves(root: Expression) -> Iterator[Expression]:
    """The expressions in it that have no operands, each once, in the order in which they are written."""
    return (step.expression for step in program(root) if not isinstance(step.expression, Node))


def is_view(root: Expression) -> bool:
    """Whether computing the expression only looks at memory in another way (a transpose, a reshape)."""
    if not isinstance(root, Node):
        return root.became is None or is_view(root.became)
    cheap = _up_to_date(root)._cheap
    if cheap is None:
        cheap = all(
            not isinstance(step.expression, Node) or not step.expression.elementwise_cost for step in program(root)
        )
        object.__setattr__(root, "_cheap", cheap)
    return cheap


def live_weights(root: Expression) -> tuple[Stored, ...]:
    """The weights with an occurrence that no `stop_gradient` shields."""
    if not isinstance(root, Node):
        return root.weights_used() if root.became is None else live_weights(root.became)
    found = _up_to_date(root)._live
    if found is None:
        found = _live_weights(program(root))
        object.__setattr__(root, "_live", found)
    return found


def _live_weights(steps: tuple[Step, ...]) -> tuple[Stored, ...]:
    live = {len(steps) - 1}
    for place in range(len(steps) - 1, -1, -1):
        if place in live and not steps[place].expression.stops_gradient:
            live.update(steps[place].operands)
    return tuple(
        step.expression for place, step in enumerate(steps) if place in live and isinstance(step.expression, Stored)
    )


def known_shape(root: Expression) -> Shape:
    """The shape, or an error that says which weight has none."""
    shape = root.shape
    if shape is None:
        names = [weight.name for weight in root.weights_used() if weight.shape is None]
        raise UnknownShape(
            f"The shape of {root.notation()} is not known, because {', '.join(names)} has none yet. "
            f"Give it one where it is made, as in `tether.Weight((784, 64), name={names[0]!r})`, or tie it first "
            "where the layer's own shape determines it (as itself, transposed, or times a number)."
        )
    return shape


# --------------------------------------------------------------------------- operators by name
# Operators by the name that files use.


OPERATORS: dict[str, type[Node]] = {}

NodeClass = TypeVar("NodeClass", bound=type[Node])


def register(cls: NodeClass) -> NodeClass:
    """Makes an operator known to files, under its `name`."""
    if OPERATORS.setdefault(cls.name, cls) is not cls:
        raise TypeError(f"Two operators are called {cls.name!r}: {OPERATORS[cls.name]} and {cls}.")
    return cls


_sources: list[Callable[[], object]] = []


def when_unknown(load: Callable[[], object]) -> None:
    """Has more operators registered when a name is asked for that is not known yet: `load` imports them."""
    _sources.append(load)


def operator(name: str) -> type[Node] | None:
    """The operator of a name, if there is one."""
    while name not in OPERATORS and _sources:
        _sources.pop(0)()
    return OPERATORS.get(name)

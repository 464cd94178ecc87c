"""What a form is: a recipe that makes an expression, and weights of its own, from a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotInvertible, TetherError, UnknownShape, Unsupported, received
from tether.kinds import KINDS, Kind, letters_of
from tether.types import Array, Tensor
from tether.weights.expression import Expression, Node, NoTensor, Shape, as_expression
from tether.weights.operators.arithmetic import result_type
from tether.weights.weight import Weight


class Form(NoTensor):
    """A way to make a weight from a base: called with the base, it returns an expression over it.

    A subclass defines `__call__`. Every call makes new weights, so one form object serves many layers. The one
    exception is `vera`, which is about sharing: its object makes one pair of frozen bases for all its calls.

    Example:
    ```python
    class Doubled(tether.forms.Form):
        def __call__(self, base):
            return 2 * base

    child = tether.inherit(parent, kernel=Doubled())
    ```
    """

    def __call__(self, base: Expression) -> Expression:
        """The expression of the child's weight; the base's shape must be known."""
        raise TypeError(f"{type(self).__name__} does not say what it makes of a base.")

    def delta(self, base: Expression) -> Expression:
        """What the form's result has more than the base: what an adapter with the form adds."""
        return self(base) - base

    def _instead(self) -> str:
        return f"{self!r} is a form, not a value: add it to a weight or call it with one, and read `.value` of that."

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({settings})"


class AddedForm(Form):
    """A form that is added to its base: `base + form`. A subclass defines `delta`.

    Example:
    ```python
    class Shift(tether.forms.AddedForm):
        def delta(self, base):
            return tether.Weight(base.shape, "zeros", name="shift")

    child = tether.inherit(parent, kernel=lambda w: w.stop_gradient() + Shift())
    ```
    """

    __array_ufunc__ = None

    def delta(self, base: Expression) -> Expression:
        """What is added to the base, of the base's shape."""
        raise TypeError(f"{type(self).__name__} does not say what it adds.")

    def __call__(self, base: Expression) -> Expression:
        base = base_expression(self, base)
        return base + self.delta(base)

    def __add__(self, base: object) -> Any:
        return self(base) if isinstance(base, Expression) else NotImplemented

    __radd__ = __add__

    def __rsub__(self, base: object) -> Any:
        return base - self.delta(base) if isinstance(base, Expression) else NotImplemented

    def __mul__(self, number: object) -> Any:
        return _Multiple(self, number) if isinstance(number, (int, float, Expression)) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> AddedForm:
        return _Multiple(self, -1.0)


class _Multiple(AddedForm):
    """A number (or expression) times what a form adds."""

    def __init__(self, form: AddedForm, factor: object) -> None:
        self.form, self.factor = form, factor

    def delta(self, base: Expression) -> Expression:
        return self.factor * self.form.delta(base)


class ScalingForm(Form):
    """A form that its base is multiplied with: `base * form`. A subclass defines `factor`.

    Example:
    ```python
    class Volume(tether.forms.ScalingForm):
        def factor(self, base):
            return tether.Weight((), "ones", name="volume")

    child = tether.inherit(parent, kernel=lambda w: w * Volume())
    ```
    """

    __array_ufunc__ = None

    def factor(self, base: Expression) -> Expression:
        """What the base is multiplied with; it broadcasts to the base's shape."""
        raise TypeError(f"{type(self).__name__} does not say what it multiplies with.")

    def __call__(self, base: Expression) -> Expression:
        base = base_expression(self, base)
        return base * self.factor(base)

    def __mul__(self, base: object) -> Any:
        return self(base) if isinstance(base, Expression) else NotImplemented

    __rmul__ = __mul__


class LayerForm(NoTensor):
    """A form that changes more than one weight's value: the child has other units than its parent.

    `tether.inherit(parent, form)` asks it for the child's layer, and for the child's weights from the parent's.
    """

    def _instead(self) -> str:
        return f"{self!r} is a form, not a value: `tether.inherit(parent, form)` makes a layer with it."

    def layer(self, parent: keras.Layer) -> keras.Layer:
        """The child: a new Keras layer, not built.

        Raises:
            Unsupported: The parent's outputs would not be what the form promises.
        """
        raise TypeError(f"{type(self).__name__} does not say what layer the child is.")

    def weights(self, parent: Mapping[str, Expression]) -> dict[str, Expression]:
        """The child's weights by name, from the parent's by name."""
        raise TypeError(f"{type(self).__name__} does not say what the child's weights are.")


class Float32Node(Node):
    """A node that loses accuracy in 16 bits: it computes in float32 at least, and casts the result back.

    A subclass defines `compute_wide`, of tensors that have at least 32 bits.
    """

    __slots__ = ()

    def infer_dtype(self, *dtypes: str) -> str | None:
        """Keras's promotion of all, at least to a float."""
        return result_type(*dtypes, "float")

    def compute(self, *values: Tensor) -> Tensor:
        """What `compute_wide` gives, in the dtype that the operands asked for."""
        tensors = [keras.ops.convert_to_tensor(value) for value in values]
        dtype = result_type(*(keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors), "float")
        return keras.ops.cast(self.compute_wide(*map(widened, tensors)), dtype)

    def compute_wide(self, *values: Tensor) -> Tensor:
        """The value, from tensors of at least 32 bits."""
        raise TypeError(f"{type(self).__name__} does not compute.")

    def start(self, value: object, place: int = 0) -> Tensor:
        """An array as a value for an operand, in that operand's dtype: what `inverse` returns."""
        dtype = self.operands[place].dtype
        kept = dtype if dtype is not None and keras_seam.is_float(dtype) else keras.config.floatx()
        return keras.ops.convert_to_tensor(np.asarray(value, dtype="float32" if kept != "float64" else kept), kept)

    def out_of_range(self, expected: str, **values: object) -> NotInvertible:
        """The error for a value that this expression cannot have."""
        return NotInvertible(
            f"{self.notation()} takes only {expected}, so this value cannot be assigned to it. {received(**values)}"
        )


def widened(value: Tensor) -> Tensor:
    """A tensor in its own dtype if that is float32 or float64, else in float32."""
    dtype = keras.backend.standardize_dtype(value.dtype)
    return value if dtype in ("float32", "float64") else keras.ops.cast(value, "float32")


def as_array(value: Tensor) -> Array:
    """A tensor as a float64 array, for inverses: what they check and decompose has to be exact."""
    return np.asarray(keras_seam.to_numpy(widened(value), in_step=True), dtype="float64")


# --------------------------------------------------------------------------- what forms are made with


def base_expression(form: object, base: object) -> Expression:
    """What a form was called with, as an expression.

    Raises:
        TetherError: It is no expression, and no number or array either.
    """
    try:
        return as_expression(base)
    except TypeError:
        raise TetherError(
            f"{type(form).__name__} is called with a weight or an expression, as in "
            f"`tether.forms.{type(form).__module__.rpartition('.')[2]}(...)(tether.weight_of(layer, 'kernel'))`. "
            f"{received(base=type(base).__name__)}"
        ) from None


def shape_of_base(form: object, base: Expression) -> Shape:
    """The base's shape, or an error that says how to give it one.

    Raises:
        UnknownShape: The base has none yet.
    """
    if base.shape is None:
        names = ", ".join(weight.name for weight in base.weights_used() if weight.shape is None)
        raise UnknownShape(
            f"{type(form).__name__} takes its shape from {base.notation()}, but {names} has none yet. Build the layer "
            f"that has it first, or give the shape: `tether.Weight((784, 64), name={names.split(', ')[0]!r})`."
        )
    return base.shape


def rows_and_columns(shape: Shape, split: object = None, *, of: str = "") -> tuple[Shape, Shape]:
    """How a kernel of any number of axes is a matrix from inputs (rows) to outputs (columns).

    Args:
        shape: The kernel's shape: at least two axes.
        split: How many leading axes are inputs. Left out: all but the last (a convolution's window and channels
            are inputs), but of three axes, as the projections of attention have them, the split that makes the
            sum of rows and columns the smallest.
        of: What has the shape, for the error.

    Raises:
        TetherError: The shape has fewer than two axes, or the split leaves one side empty.
    """
    if len(shape) < 2:
        raise TetherError(
            f"A matrix form needs a weight of two or more axes, and {of or 'this one'} has {len(shape)}. Leave it out, "
            "as by the pattern '*kernel', or train it whole: `tether.forms.full()`. "
            f"{received(shape=shape)}"
        )
    if split is None:
        split = len(shape) - 1
        if len(shape) == 3:
            split = min((2, 1), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))
    if isinstance(split, bool) or not isinstance(split, int) or not 0 < split < len(shape):
        raise TetherError(f"A split leaves rows and columns: 1 to {len(shape) - 1}. {received(split=split)}")
    return shape[:split], shape[split:]


def as_matrix(base: Expression, rows: Shape, columns: Shape) -> Expression:
    """An expression of shape `rows + columns` as a matrix."""
    if len(rows) == len(columns) == 1:
        return base
    return base.reshape(math.prod(rows), math.prod(columns))


def from_matrix(matrix: Expression, rows: Shape, columns: Shape) -> Expression:
    """A matrix as an expression of shape `rows + columns`."""
    return matrix if len(rows) == len(columns) == 1 else matrix.reshape(*rows, *columns)


def part(
    base: Expression,
    suffix: str,
    start: object,
    shape: Shape | None = None,
    *,
    dtype: str | None = None,
    trainable: bool = True,
    role: str = "part",
) -> Expression:
    """A weight of a form's own, which stands beside the base: `dense/kernel_lora_a`; in the base's dtype.

    Beside a base of 16 bits, what trains is stored in float32 and cast where it is used: near 1 a bfloat16 has no
    neighbour within 0.004, so a step of 1e-4 on it would be lost, every time.

    Args:
        base: What names it and gives the dtype.
        suffix: The rest of its name.
        start: An initializer or its name (with `shape`), or an array of its start values.
        shape: Its shape, with an initializer.
        dtype: The dtype in which it is stored, if that is to be another one.
        trainable: Whether it may train: `False` for what is fixed by the form itself.
        role: What it is for: `"state"` if calls that train advance it.
    """
    first = next(iter(base.weights_used()), None)
    of_base = part_dtype(base)
    role = "fixed" if role == "part" and not trainable else role
    if dtype is None:
        learns = trainable and role == "part"
        dtype = "float32" if learns and of_base in ("float16", "bfloat16") else of_base
    weight = Weight.beside(first, suffix, start, shape, dtype=dtype, trainable=trainable, role=role)
    return weight.astype(of_base) if keras_seam.is_float(dtype) and weight.dtype != of_base else weight


def as_dtype(dtype: object) -> str | None:
    """The name of a float dtype, or `None` where a form is to choose.

    Raises:
        TetherError: It is neither.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, str) or not keras_seam.is_float(dtype):
        raise TetherError(f"`dtype` is the name of a float dtype, such as 'float32', or None. {received(dtype=dtype)}")
    return dtype


def part_dtype(base: Expression) -> str:
    """The dtype of the weights that a form adds to a base."""
    return base.dtype if base.dtype is not None and keras_seam.is_float(base.dtype) else keras.config.floatx()


def start_value(base: Expression) -> Array:
    """The base's present value in float64, for start values that depend on it."""
    return np.asarray(keras_seam.to_numpy(keras.ops.cast(base.value, "float32"), in_step=True), dtype="float64")


def as_rank(rank: object, name: str = "rank") -> int:
    """A whole number of at least 1; `name` is the parameter's, for the error.

    Raises:
        TetherError: It is not.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        called = isinstance(rank, (Expression, keras.layers.Layer))
        hint = (
            " A form is called twice: `tether.low_rank(8)` makes it, and that is called with the weight."
            if called
            else ""
        )
        raise TetherError(f"`{name}` is a whole number of 1 or more.{hint} {received(**{name: rank})}")
    return int(rank)


def as_alpha(alpha: object, name: str = "alpha") -> float | None:
    """A finite number, or `None` where the scale is to be 1; `name` is the parameter's, for the error.

    Raises:
        TetherError: It is neither.
    """
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.number)) or not math.isfinite(alpha):
        raise TetherError(f"`{name}` is a finite number, or None for a scale of 1. {received(**{name: alpha})}")
    return float(alpha)


def kaiming(seed: int | None = None, nth: int = 0) -> Any:
    """Uniform in ±1/√fan-in: how PyTorch starts a linear layer, and PEFT the first factor of an adapter.

    `nth` tells apart the initializers of one form, which must not all draw the same numbers from one seed.
    """
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed=None if seed is None else seed + nth)


def torch_draws(seed: int, skipped: int, count: int) -> Array:
    """The 32-bit numbers that PyTorch's generator of this seed draws, after it has drawn some."""
    random = np.random.RandomState(seed & 0xFFFFFFFF)  # the same Mersenne twister
    random.randint(0, 1 << 32, skipped, "uint32")
    return random.randint(0, 1 << 32, count, "uint32")


# --------------------------------------------------------------------------- layers by their units
# What the forms that change a layer's units know of Keras layers: whose last kernel axis is the outputs, and how
# many.


_BY_HAND = {"compose": "w @ own", "concatenate": "tether.ops.concatenate([w, own], -1)"}
"""What each form of units makes of a kernel whose outputs are its last axis."""


def units_of(form: str, parent: keras.Layer) -> int:
    """How many outputs a layer has on the last axis of its kernel.

    Raises:
        Unsupported: The layer is of another kind, or its outputs are not the last axis of its kernel.
    """
    cls = getattr(type(parent), "_tether_base", type(parent))
    setting = KINDS.get(cls, Kind()).units  # of the class itself: a subclass may compute otherwise
    if not setting:
        raise Unsupported(
            f"`{form}` knows where the outputs are in Dense, EinsumDense, Conv1D, Conv2D and Conv3D. For another make "
            f"the child yourself, with its units, and tie it: `tether.tie(child, kernel={_BY_HAND[form]})`, where "
            f"`w = tether.weight_of({getattr(parent, 'name', 'parent')}, 'kernel')` and `own` is a `tether.Weight` of "
            f"the shape of what is new. {received(layer=type(parent).__name__)}"
        )
    if parent.quantization_mode is not None or getattr(parent, "lora_enabled", False):
        raise Unsupported(
            f"`{form}` needs the weights of {parent.name!r} as they are, and it is quantised or has LoRA enabled by "
            "Keras. Use it on the layer before that, and `tether.low_rank` for a low-rank part."
        )
    if getattr(parent, "groups", 1) != 1:
        raise Unsupported(
            f"{parent.name!r} convolves in {parent.groups} groups, whose outputs do not see the same inputs; `{form}` "
            "needs groups=1."
        )
    return _last_of_einsum(form, parent) if cls is keras.layers.EinsumDense else int(getattr(parent, setting))


def _last_of_einsum(form: str, parent: keras.Layer) -> int:
    features, kernel, output = letters_of(parent.equation)
    last = kernel[-1:]
    sizes = parent.get_config()["output_shape"]
    size = sizes[-1] if isinstance(sizes, (list, tuple)) else sizes
    biased = parent.bias_axes is None or last in parent.bias_axes
    if not last or last != output[-1:] or last in features or size is None or not biased:
        raise Unsupported(
            f"`{form}` needs an EinsumDense whose kernel, outputs and bias end in the same axis of a known size, as in "
            f"'ab,bc->ac'. {received(equation=parent.equation, output_shape=sizes, bias_axes=parent.bias_axes)}"
        )
    return int(size)


def resized(parent: keras.Layer, units: int, *, needs_bias: bool = False, **changes: object) -> keras.Layer:
    """A new layer like the parent, not built, with another number of units.

    Constraints stay with the parent: they hold for what is stored, not for what a child makes of it.

    Args:
        parent: The layer whose config is taken.
        units: The number of outputs.
        needs_bias: Whether the child has a bias in any case, and not only if the parent has one.
        **changes: Other entries of the config.
    """
    cls = getattr(type(parent), "_tether_base", type(parent))
    left_out = ("name", "trainable", "tether")  # what of the parent is frozen, its expressions say
    config = {key: value for key, value in parent.get_config().items() if key not in left_out}
    size: Any = units
    if cls is keras.layers.EinsumDense:
        shape = config["output_shape"]
        size = [*shape[:-1], units] if isinstance(shape, (list, tuple)) else units
        if needs_bias and config["bias_axes"] is None:
            config["bias_axes"] = letters_of(config["equation"])[2][-1]
    elif needs_bias:
        config["use_bias"] = True
    config.update({"kernel_constraint": None, "bias_constraint": None, KINDS[cls].units: size})
    config.update({"activation": parent.activation, **changes})  # itself: a config names only registered functions
    return cls.from_config(config)


def kernel_of(form: object, parent: Mapping[str, Expression]) -> Expression:
    """The parent's kernel.

    Raises:
        TetherError: There is none.
    """
    if "kernel" not in parent:
        raise TetherError(f"{type(form).__name__} is made of a parent's kernel. {received(weights=sorted(parent))}")
    return parent["kernel"]


__all__ = ["AddedForm", "Form", "LayerForm", "ScalingForm"]

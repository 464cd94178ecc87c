"""One call of a layer: its context, and the tensors in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import keras
from keras import backend as _backend

from tether.keras_seam.layers import set_untracked
from tether.keras_seam.private import of_this_thread, private
from tether.types import Function, Tensor

_set_keras_mask = private("keras.src.backend.common.masking.set_keras_mask", "A mask from an Embedding applied by plan")
_get_keras_mask = private("keras.src.backend.common.masking.get_keras_mask", "A mask in a Repeat")


def call_owners() -> list[object]:
    """The objects that live as long as the calls in progress, innermost first: places for values computed once a call.

    A stateless call has its scope, any other the context of its outermost layer. JAX's time loop opens
    a scope of its own inside the call.
    """
    owners = []
    scope = of_this_thread("stateless_scope")
    while scope is not None:
        owners.append(scope)
        scope = getattr(scope, "original_scope", None)
    context = of_this_thread("current_call_ctx")
    if context is not None:
        owners.append(context)
    return owners


def is_training_call() -> bool:
    """Whether the outermost call in progress was told to train, or may train: see `undecided_training`."""
    value = _training()
    return value is not None and (is_undecided(value) or bool(value))


def undecided_training() -> Tensor | None:
    """The tensor by which a graph is told whether the call trains, if nobody knows it while the graph is made."""
    value = _training()
    return value if is_undecided(value) else None


def _training() -> Any:
    context = of_this_thread("current_call_ctx")
    return None if context is None else context.get_value("training")


def is_undecided(value: object) -> bool:
    """Whether something stands for a number that a graph is given later."""
    if value is None or isinstance(value, (bool, int)):
        return False
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        return isinstance(value, keras.KerasTensor) or (tf.is_tensor(value) and tf.is_symbolic_tensor(value))
    return isinstance(value, keras.KerasTensor) or is_traced(value)


def refuses_to_decide(error: BaseException) -> bool:
    """Whether an error comes of Python asking for the number of something undecided; Keras may have hidden it."""
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        kind: type[BaseException] = tf.errors.OperatorNotAllowedInGraphError
    elif _backend.backend() == "jax":
        import jax

        kind = jax.errors.TracerBoolConversionError
    else:
        return False
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kind):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def set_mask(tensor: Tensor, mask: object) -> None:
    """Hands a mask on with a tensor, as a layer does that computes one in its `call`."""
    _set_keras_mask(tensor, mask)


def mask_of(tensor: Tensor) -> Tensor:
    """The mask that a tensor carries, or `None`."""
    return _get_keras_mask(tensor)


def refresh_call_signature(layer: keras.Layer) -> None:
    """Makes Keras read a layer's `call` again, after its class has changed: it read the signature when it was made."""
    signature = inspect.signature(layer.call)
    names = [parameter.name for parameter in signature.parameters.values()]
    for attribute, value in {
        "_call_signature": signature,
        "call_signature_parameters": names,
        "_call_has_training_arg": "training" in names,
        "_call_has_mask_arg": "mask" in names,
        "_call_has_context_arg": {name: name in names for name in layer._call_context_args},
    }.items():
        set_untracked(layer, attribute, value)


@contextlib.contextmanager
def instead_of_call(layer: keras.Layer, function: Function) -> Iterator[None]:
    """Has Keras call a function in the place of a layer's `call`: it asks the layer for it each time."""
    before = vars(layer).get("call")
    set_untracked(layer, "call", function)
    try:
        yield
    finally:
        object.__delattr__(layer, "call")
        if before is not None:
            set_untracked(layer, "call", before)


def call_parameters(layer: keras.Layer) -> list[str]:
    """The names of what a layer's call takes, as Keras knows them."""
    return list(layer.call_signature_parameters)


def trace_token() -> object:
    """Something equal as long as values may be passed on without crossing a trace of the backend."""
    return _trace_token()


def _make_trace_token() -> Callable[[], object]:
    name = _backend.backend()
    if name == "jax":
        try:
            from jax.extend.core import get_opaque_trace_state
        except ImportError:  # JAX 0.7, the last that takes NumPy 1
            from jax.core import get_opaque_trace_state

        return lambda: get_opaque_trace_state(convention="flax")
    if name == "tensorflow":
        import tensorflow as tf

        return lambda: None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    if name == "torch":
        import torch

        return lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return lambda: None


_trace_token = _make_trace_token()


def _make_mutations() -> Callable[[Tensor], int]:
    if _backend.backend() == "torch":
        return lambda tensor: tensor._version
    return lambda tensor: 0


mutations = _make_mutations()
"""How often a tensor was changed in place (PyTorch counts; JAX cannot, TensorFlow does not tell)."""


def _make_is_plain_eager() -> Callable[[], bool]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.eager import record

        return lambda: tf.executing_eagerly() and not record.could_possibly_record()
    if name == "torch":
        import torch

        return lambda: not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return lambda: of_this_thread("stateless_scope") is None


is_plain_eager = _make_is_plain_eager()
"""Whether a value computed now is a plain tensor, through which no gradient flows: one that may be kept.

JAX's gradients see a variable's value only in a stateless scope.
"""


def _make_is_compiling() -> Callable[[], bool]:
    if _backend.backend() != "torch":
        return lambda: False
    from torch.compiler import is_compiling as of_torch

    return of_torch


is_compiling = _make_is_compiling()
"""Whether `torch.compile` is reading the code: it ends its graph where a call writes to a dict, or plans."""


def _make_can_read_numbers() -> Callable[[], bool]:
    if _backend.backend() != "torch":
        return lambda: False
    return lambda: not is_compiling() and of_this_thread("stateless_scope") is None


can_read_numbers = _make_can_read_numbers()
"""Whether a stored number can be looked at now without a trace in the way: always eager, as PyTorch is."""


def found_once(function: Function) -> Function:
    """Lets `torch.compile` run a function of plain values itself, once, instead of reading it into its graph."""
    if _backend.backend() == "torch":
        # What `torch.compiler.assume_constant_result` does; that would import the whole compiler.
        function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _make_known_sizes() -> Callable[[Tensor], tuple[int | None, ...]]:
    def plain(tensor: Tensor) -> tuple[int | None, ...]:
        # JAX has symbols for sizes that are not known yet, which cannot be compared.
        return tuple([size if isinstance(size, int) else None for size in tensor.shape])

    if _backend.backend() != "torch":
        return plain

    def static(tensor: Tensor) -> tuple[int | None, ...]:
        if not is_compiling():
            return tuple(tensor.shape)
        # The compiler's own symbols pass for integers, and are no plain values for `found_once`.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return tuple([size if has_static_value(size) else None for size in tensor.shape])

    return static


known_sizes = _make_known_sizes()
"""The sizes of a tensor, `None` where a compiler leaves one open."""


def is_traced(value: Tensor) -> bool:
    """Whether a tensor stands for one that a compiler will know later."""
    if _backend.backend() == "jax":
        import jax

        return isinstance(value, jax.core.Tracer)
    return False


def _make_is_sparse() -> Callable[[Tensor], bool]:
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return lambda value: isinstance(value, (tf.SparseTensor, tf.RaggedTensor))
    if name == "jax":
        from jax.experimental import sparse

        return lambda value: isinstance(value, sparse.JAXSparse)
    return lambda value: False


is_sparse = _make_is_sparse()
"""Whether a tensor is kept as the entries that it has, so that few operations take it."""


def is_differentiated(*values: object) -> bool:
    """Whether JAX is differentiating with respect to one of these tensors, or PyTorch records what is done with one.

    Keras's stateless calls do not tell layers without a `training` argument that they train; the tracer does.
    """
    return any(map(_is_differentiated, values))


def _make_is_differentiated() -> Callable[[Any], bool]:
    name = _backend.backend()
    if name == "torch":
        return lambda value: getattr(value, "requires_grad", False)
    if name == "jax":
        return lambda value: type(value).__name__ in _GRADIENT_TRACERS
    return lambda value: False


_is_differentiated = _make_is_differentiated()


def _make_may_differentiate() -> Callable[[], bool]:
    name = _backend.backend()
    if name == "torch":
        from torch import is_grad_enabled

        return is_grad_enabled
    return lambda: name == "jax"


may_differentiate = _make_may_differentiate()
"""Whether `is_differentiated` is worth asking now: PyTorch records nothing where gradients are off."""
_GRADIENT_TRACERS = {"JVPTracer", "LinearizeTracer"}


def trace(function: Function, *specs: object) -> Any:
    """Runs a function on inputs that have a shape and no values, as Keras does when it builds a graph."""
    return _Traced(function).output_spec(*specs)


class _Traced(keras.Operation):
    """A function as one of Keras's operations, which are traced on every backend."""

    def __init__(self, function: Function) -> None:
        super().__init__(name="traced")
        self.function = function
        self.error: Exception | None = None

    def call(self, *specs: object) -> object:
        """Runs the function. Keras puts an error of its own around one that is raised: it is kept."""
        try:
            return self.function(*specs)
        except Exception as error:
            self.error = error
            raise

    def output_spec(self, *specs: object) -> object:
        try:
            return self.compute_output_spec(*specs)
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise


Refusal = Callable[[Any], NoReturn]
"""What raises for an object that is looked into."""


def _make_refuse_to_be_looked_into() -> Callable[[type, Refusal], None]:
    name = keras.backend.backend()
    if name == "torch":
        from torch.utils import _pytree as torch_tree

        return lambda cls, refuse: torch_tree.register_pytree_node(cls, refuse, _nothing_was_flattened)

    import optree

    def with_optree(cls: type, refuse: Refusal) -> None:
        optree.register_pytree_node(cls, refuse, _nothing_was_flattened, namespace="keras")

    if name != "jax":
        return with_optree

    import jax

    def with_jax(cls: type, refuse: Refusal) -> None:
        with_optree(cls, refuse)
        jax.tree_util.register_pytree_node(cls, refuse, _nothing_was_flattened)

    return with_jax


def _nothing_was_flattened(*_: object) -> NoReturn:
    raise TypeError("There is nothing to put together again.")


refuse_to_be_looked_into = _make_refuse_to_be_looked_into()
"""Has `keras.tree` call `refuse(x)`, which raises, for an object of exactly this class.

Keras looks for its symbolic tensors in what each operation, layer and node of a graph is given: before anything else
reads the object, and on every backend. PyTorch's and JAX's own compilers look into what they are given in the same way.
"""

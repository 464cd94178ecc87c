"""What is no tensor and must not become one silently: the ways by which array libraries would take it for one.

A tensor that is made of an expression is its value of one moment. In a Keras graph it would be a constant that nothing
trains and no file says where it came from. So each protocol by which NumPy, a backend or Keras asks an object for a
tensor ends in one error, which says what to write. Operators are left out: `array * expression` is an expression.
"""

from __future__ import annotations

from typing import Any, NoReturn

from tether import keras_seam
from tether.errors import NotATensor


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

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotATensor(self._instead())

    __array__ = __tf_tensor__ = __len__ = _refuse

    shape = dtype = property(_refuse)

    def __jax_array__(self) -> Any:
        return _Unread(self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # After this error PyTorch's operators hand over, and its functions raise it.
        found: list[Any] = [args, *(kwargs or {}).values()]
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

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        self.owner._refuse()

    __array__ = __jax_array__ = _refuse

    shape = dtype = property(_refuse)

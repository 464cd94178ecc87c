"""Which of Keras's own calls is running: copying, loading, saving, fitting."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from keras.src import backend as _backend
from keras.src.layers.layer import Layer as _Layer
from keras.src.layers.normalization.spectral_normalization import SpectralNormalization as _SpectralNormalization
from keras.src.layers.rnn.bidirectional import Bidirectional as _Bidirectional
from keras.src.models import cloning as _cloning
from keras.src.models import functional as _functional
from keras.src.models import model as _model
from keras.src.saving import saving_api as _saving_api
from keras.src.saving import saving_lib as _saving_lib
from keras.src.saving import serialization_lib as _serialization
from keras.src.saving.keras_saveable import KerasSaveable

from tether.errors import Unsupported

# Keras has no "a copy starts here" hook. The stack says it: every clone and every load runs below
# one outermost Keras call. State that must live exactly as long as that call is kept in the frame's
# own local namespace: it is thread-local, it dies with the call, also when the call fails, and no
# frame is kept alive by it.


def _code(function: Callable[..., Any]) -> CodeType:
    return inspect.unwrap(function).__code__


def _methods(cls: type, *names: str) -> list[Callable[..., Any]]:
    """The functions of these names that a class and its bases have."""
    found = (vars(base).get(name) for base in cls.__mro__ for name in names)
    return [method for method in found if inspect.isfunction(method)]


def _nested(*functions: Callable[..., Any]) -> tuple[CodeType, ...]:
    """The functions that are made while other functions run."""
    return tuple(code for one in functions for code in _code(one).co_consts if isinstance(code, CodeType))


_COPYING = {
    _code(function)
    for function in (
        _cloning.clone_model,
        _serialization.deserialize_keras_object,
        _saving_api.load_model,
        _saving_lib.load_model,
        _saving_lib._load_model_from_fileobj,
        _saving_lib._load_model_from_dir,
        _functional.functional_from_config,
        _model.model_from_json,
    )
}
_LOADING = {
    _code(function)
    for function in (
        _saving_lib._load_model_from_fileobj,
        _saving_lib._load_model_from_dir,
        _saving_lib.load_weights_only,
        _saving_lib._load_state,
    )
}
_SAVING = {_code(_saving_lib._save_model_to_fileobj), _code(_saving_lib._save_model_to_dir)}
_LOSSES = {_code(_Layer.losses.fget)}
_TRAINABLE_SETTER = _code(_Layer.trainable.fset)
_SPECTRAL_BUILD = _code(_SpectralNormalization.build)
OF_LAYERS = _nested(*_methods(_Layer, "_initialize_tracker"))
"""The functions that are made for each layer when it is made: its tracker asks them what an attribute is."""
_OF_LAYERS = {id(code) for code in OF_LAYERS}
_BIDIRECTIONAL_INIT = _code(_Bidirectional.__init__)


def _make_is_tracing() -> Callable[[], bool]:
    if _backend.backend() != "torch":
        return lambda: False
    import torch

    return torch.compiler.is_compiling


_is_tracing = _make_is_tracing()
"""Whether PyTorch's compiler is reading the code: there are no frames then. JAX and TensorFlow run it."""


def _frames(depth: int = 2) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _first_local(frame: FrameType) -> Any:
    """The first positional argument of a frame: `self` of a method, `cls` of a classmethod."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_copying(frame: FrameType) -> bool:
    if frame.f_code in _COPYING:
        return True
    if frame.f_code.co_name != "from_config":
        return False
    first = _first_local(frame)
    return isinstance(first, type) and issubclass(first, KerasSaveable)


def _outermost(matches: Callable[[FrameType], bool]) -> FrameType | None:
    found = None
    for frame in _frames(3):
        if matches(frame):
            found = frame
    return found


def _namespace(frame: FrameType | None, key: str) -> dict[Any, Any] | None:
    if frame is None:
        return None
    return frame.f_locals.setdefault(key, {})


def copying_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active Keras call that clones or deserialises."""
    return _namespace(_outermost(_is_copying), ".tether.copying")


def loading_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active Keras call that loads weights."""
    return _namespace(_outermost(lambda frame: frame.f_code in _LOADING), ".tether.loading")


def saving_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as the outermost active write of a `.keras` archive.

    Its key `"root"` holds the model being saved.
    """
    frame = _outermost(lambda frame: frame.f_code in _SAVING)
    namespace = _namespace(frame, ".tether.saving")
    if namespace is not None and frame is not None:
        namespace.setdefault("root", frame.f_locals.get("model"))
    return namespace


def losses_scope() -> dict[Any, Any] | None:
    """A dict that lives as long as one read of the outermost `Layer.losses`."""
    return _namespace(_outermost(lambda frame: frame.f_code in _LOSSES), ".tether.losses")


def set_by_a_container() -> bool:
    """Whether a `trainable` setter runs because Keras recurses from a containing layer."""
    callers = (frame for frame in _frames() if frame.f_code.co_name != "__setattr__")
    return next(itertools.islice(callers, 2, 3)).f_code is _TRAINABLE_SETTER  # after this function and the setter


def inside_bidirectional_init() -> bool:
    """Whether `Bidirectional.__init__` is copying its argument by config."""
    return any(frame.f_code is _BIDIRECTIONAL_INIT for frame in _frames())


def refuse_spectral_normalization(view: Any) -> None:
    """Raises while Keras's SpectralNormalization takes a view: it assigns to it at every training step.

    The view is asked whether it trains. Only if a layer's tracker asks is somebody taking it.
    """
    if _is_tracing() or id(sys._getframe(2).f_code) not in _OF_LAYERS:
        return
    for frame in itertools.islice(_frames(), 8):
        if frame.f_code is _SPECTRAL_BUILD:
            raise Unsupported(
                f"SpectralNormalization overwrites what it normalises at every training step, here {view.path}, for "
                "everybody who shares it. Leave the tied layer without the wrapper."
            )


def maker(exclude: Any) -> Any:
    """The outermost Keras object whose `__init__` or `build` is running, if any, other than `exclude`."""
    found = None
    for frame in _frames():
        if frame.f_code.co_name in ("__init__", "build"):
            owner = _first_local(frame)
            if isinstance(owner, KerasSaveable) and owner is not exclude:
                found = owner
    return found


def running_methods(layer: Any) -> Iterator[type]:
    """The classes whose methods are at work on a layer, innermost first."""
    for frame in _frames(1):
        code = frame.f_code
        if code.co_argcount and _first_local(frame) is layer:
            for cls in type(layer).__mro__:
                function = vars(cls).get(code.co_name)
                if inspect.isfunction(function) and _code(function) is code:
                    yield cls
                    break

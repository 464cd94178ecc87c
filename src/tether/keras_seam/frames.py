"""Which of Keras's own calls is running: copying, loading, saving, fitting.

Keras has no "a copy starts here" hook. The call stack says it. A frame is evidence only by its code: that of a
function of Keras, or of the method that the class of its own first argument really has. What a function is called
plays no part, nor does how many frames there are.

State that must live exactly as long as a call is kept in its frame's own local namespace: it is thread-local, it dies
with the call, also when the call fails, and no frame is kept alive by it.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras
from keras import Layer as _Layer
from keras import backend as _backend
from keras.layers import SpectralNormalization as _SpectralNormalization

from tether.errors import Unsupported
from tether.keras_seam.private import KerasSaveable, is_missing, unpickle
from tether.types import Function, Saveable


def code_of(function: Function) -> CodeType:
    """The code of a function, whatever decorates it."""
    return inspect.unwrap(function).__code__


def methods(cls: type, *names: str) -> list[Function]:
    """The functions of these names that a class and its bases have."""
    found = (vars(base).get(name) for base in cls.__mro__ for name in names)
    return [method for method in found if inspect.isfunction(method)]


def nested(*functions: Function) -> tuple[CodeType, ...]:
    """The functions that are made while other functions run."""
    return tuple(code for one in functions for code in code_of(one).co_consts if isinstance(code, CodeType))


_CLONING = code_of(keras.models.clone_model)
_UNPICKLING = set() if is_missing(unpickle) else {code_of(unpickle)}
_READING = {code_of(keras.saving.load_model), *_UNPICKLING}
"""What makes a model of a file, or of a pickle."""
_COPYING = {
    _CLONING,
    *_READING,
    *map(code_of, (keras.saving.deserialize_keras_object, keras.models.model_from_json)),
}
_LOADING = {*_READING, code_of(keras.saving.load_weights)}
_SAVING = {code_of(keras.saving.save_model), code_of(KerasSaveable.__reduce__)}
_LOSSES = {code_of(_Layer.losses.fget)}
_SPECTRAL_BUILD = code_of(_SpectralNormalization.build)
OF_LAYERS = nested(*methods(_Layer, "_initialize_tracker"))
"""The functions that are made for each layer when it is made: its tracker asks them what an attribute is."""
_OF_LAYERS = {id(code) for code in OF_LAYERS}
_BIDIRECTIONAL_INIT = code_of(keras.layers.Bidirectional.__init__)


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


def _class_with_method(frame: FrameType, name: str) -> type | None:
    """The class that defines the method of this name which a frame runs on its first argument, if it runs one."""
    code = frame.f_code
    if code.co_name != name or not code.co_argcount:  # only spares most frames the closer look
        return None
    first = _first_local(frame)
    for cls in (first if isinstance(first, type) else type(first)).__mro__:
        method = vars(cls).get(name)
        function = getattr(method, "__func__", method)  # of a classmethod
        function = inspect.unwrap(function) if callable(function) else None
        if inspect.isfunction(function) and function.__code__ is code:
            return cls
    return None


def _is_copying(frame: FrameType) -> bool:
    if frame.f_code in _COPYING:
        return True
    cls = _first_local(frame) if _class_with_method(frame, "from_config") is not None else None
    return isinstance(cls, type) and issubclass(cls, KerasSaveable)


def _making(frame: FrameType) -> Saveable | None:
    """The Keras object whose own constructor or `build` a frame runs, if it runs one."""
    if _class_with_method(frame, "__init__") is None and _class_with_method(frame, "build") is None:
        return None
    made = _first_local(frame)
    return made if isinstance(made, KerasSaveable) else None


def _innermost(matches: Callable[[FrameType], bool]) -> FrameType | None:
    return next((frame for frame in _frames(3) if matches(frame)), None)


def _outermost(matches: Callable[[FrameType], bool]) -> FrameType | None:
    found = None
    for frame in _frames(3):
        if matches(frame):
            found = frame
    return found


def _namespace(frame: FrameType | None, key: str) -> dict[str, Any] | None:
    if frame is None:
        return None
    return frame.f_locals.setdefault(key, {})


# --------------------------------------------------------------------------- copies


class Copying(dict[str, Any]):
    """What one call that clones or deserialises has made so far, and when the call was first noticed."""

    def __init__(self, number: int) -> None:
        self.number = number


_numbers = itertools.count()


def copies_begun() -> int:
    """A number that grows with each call that clones or deserialises, and is larger than those of all that run now."""
    _copying_calls()
    return next(_numbers)


def copying_scope(since: int = -1) -> Copying | None:
    """What belongs to the copy in progress: the outermost call that clones or deserialises.

    A model or layer may be copied while another one is read: by a constructor, for a target network. Its config is
    that of a living object, and names what was made during the outer call. So calls that began before that do not
    count. Nor do those around a constructor that clones, or reads a file, by itself.

    Args:
        since: What `copies_begun` said when the original was made.
    """
    found = None
    for copying in _copying_calls():
        if copying.number > since:
            found = copying
    return found


def _copying_calls() -> list[Copying]:
    """The calls that clone or deserialise, innermost first, up to a constructor that asked for a copy of its own."""
    frames: list[FrameType] = []
    own: int | None = None
    whole = False
    for frame in _frames(3):
        if _is_copying(frame):
            frames.append(frame)
            whole = whole or frame.f_code is _CLONING or frame.f_code in _READING
        elif whole and own is None and _making(frame) is not None:
            own = len(frames)
    calls = [_copying_of(frame) for frame in reversed(frames)][::-1]
    return calls[:own]


def _copying_of(frame: FrameType) -> Copying:
    key = ".tether.copying"
    found = frame.f_locals.get(key)
    if found is None:
        found = frame.f_locals.setdefault(key, Copying(next(_numbers)))
    return found


# --------------------------------------------------------------------------- what is read and written


def loading_scope() -> dict[str, Any] | None:
    """A dict that lives as long as the load of weights in progress: the innermost, a constructor may load by itself."""
    return _namespace(_innermost(lambda frame: frame.f_code in _LOADING), ".tether.loading")


def saving_scope() -> dict[str, Any] | None:
    """A dict that lives as long as the write of a `.keras` archive in progress.

    Its key `"root"` holds the model being saved.
    """
    frame = _innermost(lambda frame: frame.f_code in _SAVING)
    namespace = _namespace(frame, ".tether.saving")
    if namespace is not None and frame is not None:
        namespace.setdefault("root", _first_local(frame))
    return namespace


def losses_scope() -> dict[str, Any] | None:
    """A dict that lives as long as one read of the outermost `Layer.losses`."""
    return _namespace(_outermost(lambda frame: frame.f_code in _LOSSES), ".tether.losses")


def set_by_a_container() -> bool:
    """Whether the `trainable` setter that asks runs because a containing layer's own setter passes its flag on."""
    frame: FrameType | None = sys._getframe(1)
    layer = _first_local(frame) if frame is not None else None
    while frame is not None and _first_local(frame) is layer:  # the setter, and `__setattr__` on the way to it
        frame = frame.f_back
    container = None if frame is None else _first_local(frame)
    flag = inspect.getattr_static(type(container), "trainable", None)
    setter = flag.fset if isinstance(flag, property) else None
    return frame is not None and setter is not None and frame.f_code is code_of(setter)


def inside_bidirectional_init() -> bool:
    """Whether `Bidirectional.__init__` is copying its argument by config."""
    return any(frame.f_code is _BIDIRECTIONAL_INIT for frame in _frames())


def refuse_spectral_normalization(view: keras.Variable) -> None:
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


def maker(exclude: object) -> Saveable | None:
    """The outermost Keras object whose own `__init__` or `build` is running, if any, other than `exclude`."""
    found = None
    for frame in _frames():
        owner = _making(frame)
        if owner is not None and owner is not exclude:
            found = owner
    return found


def running_methods(layer: keras.Layer) -> Iterator[type]:
    """The classes whose methods are at work on a layer, innermost first."""
    for frame in _frames(1):
        if frame.f_code.co_argcount and _first_local(frame) is layer:
            cls = _class_with_method(frame, frame.f_code.co_name)
            if cls is not None:
                yield cls

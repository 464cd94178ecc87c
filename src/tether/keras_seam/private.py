"""The private names of Keras that Tether uses, and the versions of Keras on which that is tested.

A private name may move or go with any release. Each is looked up when Tether is imported, and one that is gone costs
what it is needed for: an error then says so, and the rest of Tether works.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import keras

from tether.errors import Unsupported
from tether.types import Saveable

# --------------------------------------------------------------------------- names that may be gone


OLDEST, NEWEST = (3, 13), (3, 15)
"""The oldest and the newest Keras, by their first two numbers, on which every test of Tether's seam is run."""

OVERRIDDEN: dict[str, str] = {
    "_apply_weight_decay": "weights of another learning rate decay by it",
    "_check_quantize_args": "a weight quantises itself, though Keras knows it as no kind of layer that does",
    "_default_save_signature": "TensorFlow calls a model inside of one that it saves, without the model's arguments",
    "_direct_assign": "a value for a variable that is sharded over processes goes to each process's shard",
    "_get_current_learning_rate": "weights of another learning rate decay by it",
    "_get_own_losses": "a tied layer adds the penalties on its uses to the losses of the model",
    "_layers": "a weight notices that a model is about to be quantised, before any layer is",
    "_layout": "an optimizer asks a sharded variable for it where it makes a slot, and the slot is sharded alike",
    "_lock_state": "a tied layer places its weights when its build is over",
    "_parallel_update_step": "PyTorch's optimizers step all variables at once, and each may have its own learning rate",
    "_trackable_children": "a checkpoint of the TensorFlow backend holds a tied layer's weights and not its views",
}
"""What is private to Keras and classes of Tether define again, and what happens because Keras uses it."""

LOOKED_UP: dict[str, str] = {}
"""The private objects that were looked up, and what each is needed for."""

METHODS: dict[str, type] = {}
"""The private methods that were looked up, and their classes."""


def private(path: str, feature: str) -> Any:
    """A private object of Keras.

    Args:
        path: Its module and name.
        feature: What does not work without it, as the start of a sentence.

    Returns:
        The object, or if this Keras has none, one that raises an error when it is used.
    """
    LOOKED_UP[path] = feature
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return _Missing(f"{feature} needs {path}")


def private_method(cls: type, name: str, feature: str) -> Any:
    """A private method of a Keras class, or one that raises an error when it is called."""
    METHODS[name] = cls
    return getattr(cls, name, None) or _Missing(f"{feature} needs {cls.__name__}.{name}")


def is_missing(found: object) -> bool:
    """Whether Keras has no such object."""
    return isinstance(found, _Missing)


class _Missing:
    """What stands for something that Keras does not have."""

    def __init__(self, need: str) -> None:
        self._need = need

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Unsupported(
            f"{self._need}, which Keras {keras.__version__} does not have. Tether is tested on Keras {_tested()}. "
            "Install one of these, or a newer Tether."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # those of Python's protocols, which others ask for by themselves
            raise AttributeError(name)
        self()


def _tested() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def warn_of_an_untested_keras(version: str) -> None:
    """Warns if a version of Keras is older than the oldest, or newer than the newest that is tested."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        warnings.warn(
            f"Keras {version} is installed, and Tether is tested on Keras {_tested()}. What Tether needs of Keras may "
            "work differently there.",
            stacklevel=2,
        )


warn_of_an_untested_keras(keras.__version__)


# --------------------------------------------------------------------------- threads
# What Keras keeps for each thread (the scopes that are open, the call in progress), and what Tether does.


of_this_thread = private("keras.src.backend.common.global_state.get_global_attribute", "Evaluating a weight")
"""The value of a name: `stateless_scope`, `autocast_scope`, `name_scope_stack`, `current_call_ctx`."""

set_in_this_thread = private("keras.src.backend.common.global_state.set_global_attribute", "Making a weight")

AutocastScope = private("keras.src.backend.common.variables.AutocastScope", "Reading a weight under mixed precision")


def get_autocast_scope() -> Any:
    """The scope that says to which precision variables are cast when they are read, if there is one."""
    return of_this_thread("autocast_scope")


class ThreadScope(threading.local):
    """Values of Tether's own that hold in one thread, for the length of a scope; a subclass names them.

    Reading one is something that `torch.compile` knows: a `ContextVar` would end its graph.
    """

    def __init__(self) -> None:
        for name in type(self).__annotations__:  # each thread has its own from the start, as `torch.compile` expects
            setattr(self, name, getattr(type(self), name))

    @contextlib.contextmanager
    def set(self, **values: Any) -> Iterator[None]:
        """Other values within this scope."""
        before = {name: getattr(self, name) for name in values}
        for name, value in values.items():  # a dict that is changed would end the graph of `torch.compile`
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


# --------------------------------------------------------------------------- classes
# Classes of Keras that have no public name, and are found by what has.


def _common_base(*classes: type) -> Any:
    """The most special class that all of these derive from."""
    first, *others = classes
    return next(base for base in first.__mro__ if all(issubclass(other, base) for other in others))


KerasSaveable: type[Saveable] = _common_base(keras.Layer, keras.Metric, keras.Optimizer)
"""What Keras writes to a file and reads from one."""

RandomInitializer: type[keras.Initializer] = _common_base(
    keras.initializers.RandomNormal, keras.initializers.RandomUniform
)
"""An initializer that draws from a seed."""


Functional: type[keras.Model] = type(keras.Model.__new__(keras.Model, inputs=None, outputs=None))
"""The class of a model that is made of its inputs and outputs. Its constructor, which would count names, is not run."""

unpickle = private_method(KerasSaveable, "_unpickle_model", "Unpickling a tied layer")
"""What makes a model or layer again of the bytes that it is pickled as."""


def to_snake_case(name: str) -> str:
    """A class's name as Keras makes automatic names of it: `dense` of `Dense`."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()

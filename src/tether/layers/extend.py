"""A class of the user's own that adds weights to a Keras layer's.

`extend` changes the class itself: it puts a mixin behind it, in front of its parents. So the user's own
methods come first, `super()` in them reaches the mixin, and the mixin reaches the parent. A call of
`super().build()` goes through the mixin's `build`, and that is how it is known to have been made.

```text
Scaled → its mixin → Extended → Dense → ... → Layer
```
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import keras

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.layers import by_name, paths
from tether.layers.rollback import Rollback
from tether.layers.tied import Tied
from tether.layers.view import View
from tether.weights.weight import Weight

T = TypeVar("T")

MIXIN = "_tether_mixin"
"""The class attribute that says that a class is extended."""
BUILDING = "_tether_building"
"""While a layer builds: the classes whose parent's `build` has been called."""
AUTHORS = "_tether_authors"
"""Which class made a weight, by the weight's name."""


def extend(cls: type[T]) -> type[T]:
    """Lets a subclass of a Keras layer add weights: they are saved and loaded, and clashes are refused.

    A class decorator. It changes the class in place and returns it.

    - Every own weight of parent and child is stored under its name, trainable or not. A file that the
      class wrote before it was decorated still loads if it holds all values; if not, the error names
      those that it lacks, and nothing is changed.
    - `build` must call the parent's: `super().build(input_shape)`.
    - A weight must not have the name of another one, nor be kept in an attribute that is an argument, a
      weight or a property of the parent.

    A build or a load that fails leaves the layer as it was. The class needs no `save_own_variables` and
    `load_own_variables` of its own; if it has them, they come first, and may call `super()`'s.

    Args:
        cls: A subclass of a Keras layer, of your own. Its parents may be extended too.

    Returns:
        The same class.

    Raises:
        TetherError: It is not a subclass of a Keras layer, or is one of Keras's or Tether's own.

    Example:
    ```python
    @tether.extend
    class Scaled(keras.layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.gain = self.add_weight(name="gain", shape=(self.units,), initializer="ones")

        def call(self, inputs):
            return super().call(inputs) * self.gain
    ```
    """
    _refuse_class(cls)
    if MIXIN in vars(cls):
        return cls
    own_build = vars(cls).get("build")
    mixin = type("Extended", (Extended,), {"__module__": __name__, "__doc__": Extended.__doc__})
    changed: Any = cls
    try:
        changed.__bases__ = (mixin, *cls.__bases__)
    except TypeError as error:
        raise Unsupported(
            f"`tether.extend` puts a class in front of the bases of {cls.__name__}, and Python does not allow it here: "
            f"{error}. Write {cls.__name__} without a metaclass or `__slots__` of its own."
        ) from error
    setattr(changed, MIXIN, mixin)
    if inspect.isfunction(own_build):
        mixin.build = _parents_build(cls, mixin)  # type: ignore[attr-defined]
        changed.build = _own_build(cls, mixin, own_build)
    return cls


def _refuse_class(cls: Any) -> None:
    if not isinstance(cls, type) or not issubclass(cls, keras.layers.Layer):
        raise TetherError(
            "`tether.extend` decorates a class that subclasses a Keras layer: `@tether.extend` above "
            f"`class Scaled(keras.layers.Dense):`. {received(cls=cls)}"
        )
    if cls.__module__.startswith("keras.") or issubclass(cls, (Tied, Weight)):
        raise TetherError(
            f"`tether.extend` changes the class that it is given, and {cls.__name__} is not yours to change. "
            f"Decorate a subclass: `@tether.extend` above `class Mine({cls.__name__}):`. {received(cls=cls)}"
        )


class Extended:
    """What an extended layer does otherwise than its parent. `extend` mixes it in behind the class."""

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a variable as the parent does, if no other has its name."""
        author = _author(self)
        name = kwargs.get("name")
        if name is not None and not keras_seam.is_locked(self):
            _refuse_name(self, author, name)
        variable = super().add_weight(*args, **kwargs)  # type: ignore[misc]
        _note(self, author, variable)
        return variable

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, keras.Variable):
            author = self.check_attribute(name, value)
            super().__setattr__(name, value)
            _note(self, author, value)
            return
        if keras.ops.is_tensor(value):
            _refuse_property(self, name, value)
        super().__setattr__(name, value)

    def check_attribute(self, name: str, value: Any) -> Any:
        """Refuses an attribute that a weight must not take, a view of a tied one as any other; gives who sets it."""
        author = _author(self)
        _refuse_property(self, name, value)
        _refuse_attribute(self, author, name, value)
        return author

    def save_own_variables(self, store: Any) -> None:
        """Writes every own variable by name."""
        by_name.save(self, store, super().save_own_variables)  # type: ignore[misc]

    def load_own_variables(self, store: Any) -> None:
        """Reads every own variable by name, or by position from a file of the class before it was extended."""
        parent: Any = super()
        by_name.load(
            self,
            store,
            parent.save_own_variables,
            parent.load_own_variables,
            lambda variable: _is_inherited(self, variable),
        )


# --------------------------------------------------------------------------- build


def _own_build(cls: type, mixin: type, build: Any) -> Any:
    """The class's own `build`, and a look whether it called the parent's; undone if anything fails."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if cls not in vars(self)[BUILDING]:
            _refuse_unbuilt_parent(self, cls, mixin, args, kwargs)

    @functools.wraps(build)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if BUILDING in vars(self):
            checked(self, *args, **kwargs)
            return
        with Rollback.below(self):
            keras_seam.set_untracked(self, BUILDING, set())
            checked(self, *args, **kwargs)
            object.__delattr__(self, BUILDING)

    return wrapper


def _parents_build(cls: type, mixin: type) -> Any:
    """What `super().build()` in the class reaches: notes the call and passes it on."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        building = vars(self).get(BUILDING)
        if building is not None:
            building.add(cls)
        parent: Any = super(mixin, self)
        parent.build(*args, **kwargs)
        if building is not None:
            keras_seam.unlock(self)  # `enable_lora` in the parent's build locks the layer before the child is done

    return build


def _refuse_unbuilt_parent(layer: Any, cls: type, mixin: type, args: Any, kwargs: Any) -> None:
    behind = type(layer).__mro__[type(layer).__mro__.index(mixin) + 1 :]
    provider = next(each for each in behind if "build" in vars(each))
    if issubclass(keras.Model, provider):
        return  # `Layer` and `Model` have no weights of their own to build
    parent: Any = next(each for each in behind if issubclass(each, keras.layers.Layer))
    wanted = _weights_of_the_parent(layer, parent, args, kwargs)
    missing = None if wanted is None else [name for name in wanted if name not in _weight_names(layer)]
    if missing == []:
        return  # the class makes all of them itself, or called `Dense.build(self, ...)`
    which = "which could not be listed" if missing is None else ", ".join(missing)
    _, *parameters = inspect.signature(vars(provider)["build"]).parameters
    raise TetherError(
        f"Layer {layer.name!r} ({type(layer).__name__}): the parent's build() was not called; missing: {which}. "
        f"Expected: `super().build({', '.join(parameters)})` in `{cls.__name__}.build`, which reaches "
        f"{provider.__name__}.build. {received(arguments=args or kwargs)}"
    )


def _weights_of_the_parent(layer: Any, parent: Any, args: Any, kwargs: Any) -> list[str] | None:
    """The weights that a layer of the parent's class would have; `None` if such a layer cannot be made."""
    try:
        with keras.StatelessScope():
            scratch = parent.from_config(parent.get_config(layer))
            scratch.build(*args, **kwargs)
            return _weight_names(scratch)
    except Exception:  # any code of the user's: this only makes an error message better
        return None


def _weight_names(layer: Any, prefix: tuple[str, ...] = ()) -> list[str]:
    """The paths of all weights below a layer, the same in every instance."""
    held = paths.Holdings().of(layer)
    found = ["/".join((*prefix, *held.names[id(variable)])) for variable in held.variables]
    for child in held.children if len(prefix) < 8 else ():
        found += _weight_names(child, (*prefix, *held.child(child)))
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------- whose weight it is


def _author(layer: Any) -> type | None:
    """The class whose method is making or keeping a weight; `None` outside of the layer's methods."""
    for cls in keras_seam.running_methods(layer):
        is_machinery = cls is Tied or (issubclass(cls, Extended) and not issubclass(cls, keras.layers.Layer))
        if not is_machinery and not issubclass(keras.layers.Layer, cls):
            return cls
    return None


def _note(layer: Any, author: type | None, variable: Any) -> None:
    if author is not None:
        if AUTHORS not in vars(layer):
            keras_seam.set_untracked(layer, AUTHORS, {})
        vars(layer)[AUTHORS].setdefault(variable.name, author)


def _author_of(layer: Any, variable: Any) -> type | None:
    return vars(layer).get(AUTHORS, {}).get(variable.name)


def _is_behind(layer: Any, author: type | None) -> bool:
    """Whether a class is a parent of the extended classes."""
    mro = type(layer).__mro__
    return author in mro and mro.index(author) > mro.index(Extended)


def _is_inherited(layer: Any, variable: Any) -> bool:
    author = _author_of(layer, variable)
    return isinstance(variable, View) if author is None else _is_behind(layer, author)


# --------------------------------------------------------------------------- what is refused


def _described(layer: Any, variable: Any) -> str:
    author = _author_of(layer, variable)
    held = paths.holders(layer, variable)
    at = f" in the attribute `{'.'.join(held[0])}`" if held else ""
    return f"{variable.path}{at}{f', made by {author.__name__}' if author is not None else ''}"


def _refuse_name(layer: Any, author: type | None, name: str) -> None:
    """Two weights of one name have one path, and one entry in a file and in PyTorch's `state_dict`."""
    present = next((each for each in paths.own_variables(layer) if each.name == name), None)
    if present is None or (_is_behind(layer, author) and _author_of(layer, present) is author):
        return
    by = f"{author.__name__} adds" if author is not None else "there is"
    raise TetherError(
        f"Layer {layer.name!r} ({type(layer).__name__}): {by} a weight named {name!r}, and it has one of that name "
        f"already: {_described(layer, present)}. Expected: another name for the new weight. To let the layer compute "
        f"with a weight of your own in that place, tie it: `tether.tie(layer, {name}=...)`. {received(name=name)}"
    )


def _refuse_property(layer: Any, name: str, value: Any) -> None:
    found = inspect.getattr_static(type(layer), name, None)
    if not isinstance(found, property) or found.fset is not None:
        return
    owner = next(cls for cls in type(layer).__mro__ if name in vars(cls))
    tie = f" To let the layer compute with it, tie it: `tether.tie(layer, {name}=...)`."
    raise TetherError(
        f"Layer {layer.name!r} ({type(layer).__name__}): `self.{name} = ...` is not possible, since `{name}` is a "
        f"property of {owner.__name__} that can only be read. Expected: the new weight in an attribute of another "
        f"name.{'' if issubclass(keras.layers.Layer, owner) else tie} "
        f"{received(type=type(value).__name__, shape=tuple(value.shape))}"
    )


def _refuse_attribute(layer: Any, author: type | None, name: str, variable: Any) -> None:
    """An attribute for a weight of the child's must not be an argument or a weight of the parent's."""
    if author is None or _is_behind(layer, author):
        return
    own = paths.own_variables(layer)
    mro = type(layer).__mro__
    owner = next((cls for cls in mro[mro.index(author) + 1 :] if name in _arguments(cls)), None)
    if owner is not None:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): {author.__name__} keeps the weight {variable.name!r} in "
            f"the attribute `{name}`, and `{name}` is an argument of {owner.__name__}, whose config would hold the "
            f"weight in its place. Expected: an attribute of another name, as in `self.{name}_weight = "
            f"self.add_weight(...)`. {received(attribute=name, weight=variable.path)}"
        )
    present = vars(layer).get(name)
    if present is not variable and any(present is each for each in own) and _author_of(layer, present) is not author:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): {author.__name__} keeps the weight {variable.name!r} in "
            f"the attribute `{name}`, which holds another weight: {_described(layer, present)}. Expected: an attribute "
            f"of another name, or a tie: `tether.tie(layer, {name}=...)`. {received(attribute=name)}"
        )
    is_new = not any(variable is each for each in own)
    if is_new and not keras_seam.is_automatic_variable_name(variable.name):
        _refuse_name(layer, author, variable.name)


def _arguments(cls: type) -> list[str]:
    """The arguments of a class's own constructor, by name."""
    init = vars(cls).get("__init__")
    if not inspect.isfunction(init):
        return []
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(init).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in open_ended]

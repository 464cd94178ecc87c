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
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, Unsupported, received
from tether.layers.records.own_values import FromFile
from tether.layers.tying import paths
from tether.layers.tying.state import View, shape_of, stored_variables
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tied import Tied
from tether.types import AnyLayer, Function, Store, Tensor
from tether.weights.weight import Weight

MIXIN = "_tether_mixin"
"""The class attribute that says that a class is extended."""
BUILDING = "_tether_building"
"""While a layer builds: the classes whose parent's `build` has been called."""
AUTHORS = "_tether_authors"
"""Which class made a weight, by the weight's name."""


def extend(cls: type[AnyLayer]) -> type[AnyLayer]:
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
    changed: type[keras.Layer] = cls
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


def _refuse_class(cls: object) -> None:
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

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """Makes a variable as the parent does, if no other has its name."""
        author = _author(self)
        name = kwargs.get("name")
        if name is not None and not keras_seam.is_locked(self):
            _refuse_name(self, author, name)
        variable = super().add_weight(*args, **kwargs)  # type: ignore[misc]
        _note(self, author, variable)
        return variable

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, keras.Variable):
            author = self.check_attribute(name, value)
            super().__setattr__(name, value)
            _note(self, author, value)
            return
        if keras.ops.is_tensor(value):
            _refuse_property(self, name, value)
        super().__setattr__(name, value)

    def check_attribute(self, name: str, value: object) -> type | None:
        """Refuses an attribute that a weight must not take, a view of a tied one as any other; gives who sets it."""
        author = _author(self)
        _refuse_property(self, name, value)
        _refuse_attribute(self, author, name, value)
        return author

    def save_own_variables(self, store: Store) -> None:
        """Writes every own variable by name."""
        save(self, store, super().save_own_variables)  # type: ignore[misc]

    def load_own_variables(self, store: Store) -> None:
        """Reads every own variable by name, or by position from a file of the class before it was extended."""
        parent: Any = super()
        load(
            self,
            store,
            parent.save_own_variables,
            parent.load_own_variables,
            lambda variable: _is_inherited(self, variable),
        )


# --------------------------------------------------------------------------- build


def _own_build(cls: type[keras.Layer], mixin: type, build: Function) -> Function:
    """The class's own `build`, and a look whether it called the parent's; undone if anything fails."""

    def checked(self: keras.Layer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if cls not in vars(self)[BUILDING]:
            _refuse_unbuilt_parent(self, cls, mixin, args, kwargs)

    @functools.wraps(build)
    def wrapper(self: keras.Layer, *args: Any, **kwargs: Any) -> None:
        if BUILDING in vars(self):
            checked(self, *args, **kwargs)
            return
        with Rollback.below(self):
            keras_seam.set_untracked(self, BUILDING, set())
            checked(self, *args, **kwargs)
            object.__delattr__(self, BUILDING)

    return wrapper


def _parents_build(cls: type[keras.Layer], mixin: type) -> Function:
    """What `super().build()` in the class reaches: notes the call and passes it on."""

    def build(self: keras.Layer, *args: Any, **kwargs: Any) -> None:
        building = vars(self).get(BUILDING)
        if building is not None:
            building.add(cls)
        parent: Any = super(mixin, self)
        parent.build(*args, **kwargs)
        if building is not None:
            keras_seam.unlock(self)  # `enable_lora` in the parent's build locks the layer before the child is done

    return build


def _refuse_unbuilt_parent(
    layer: keras.Layer, cls: type, mixin: type, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    behind = type(layer).__mro__[type(layer).__mro__.index(mixin) + 1 :]
    provider = next(each for each in behind if "build" in vars(each))
    if issubclass(keras.Model, provider):
        return  # `Layer` and `Model` have no weights of their own to build
    parent: type[keras.Layer] = next(each for each in behind if issubclass(each, keras.layers.Layer))
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


def _weights_of_the_parent(
    layer: keras.Layer, parent: type[keras.Layer], args: tuple[object, ...], kwargs: dict[str, object]
) -> list[str] | None:
    """The weights that a layer of the parent's class would have; `None` if such a layer cannot be made."""
    try:
        with keras.StatelessScope():
            scratch = parent.from_config(parent.get_config(layer))
            scratch.build(*args, **kwargs)
            return _weight_names(scratch)
    except Exception:  # any code of the user's: this only makes an error message better
        return None


def _weight_names(layer: keras.Layer) -> list[str]:
    """The paths of all weights below a layer, the same in every instance."""
    return list(dict.fromkeys("/".join(path) for path, _, _, _ in paths.walk(layer)))


# --------------------------------------------------------------------------- whose weight it is


def _author(layer: keras.Layer) -> type | None:
    """The class whose method is making or keeping a weight; `None` outside of the layer's methods."""
    for cls in keras_seam.running_methods(layer):
        is_machinery = cls is Tied or (issubclass(cls, Extended) and not issubclass(cls, keras.layers.Layer))
        if not is_machinery and not issubclass(keras.layers.Layer, cls):
            return cls
    return None


def _note(layer: keras.Layer, author: type | None, variable: keras.Variable) -> None:
    if author is not None:
        if AUTHORS not in vars(layer):
            keras_seam.set_untracked(layer, AUTHORS, {})
        vars(layer)[AUTHORS].setdefault(variable.name, author)


def _author_of(layer: keras.Layer, variable: keras.Variable) -> type | None:
    return vars(layer).get(AUTHORS, {}).get(variable.name)


def _is_behind(layer: keras.Layer, author: type | None) -> bool:
    """Whether a class is a parent of the extended classes."""
    mro = type(layer).__mro__
    return author in mro and mro.index(author) > mro.index(Extended)


def _is_inherited(layer: keras.Layer, variable: keras.Variable) -> bool:
    author = _author_of(layer, variable)
    return isinstance(variable, View) if author is None else _is_behind(layer, author)


# --------------------------------------------------------------------------- what is refused


def _described(layer: keras.Layer, variable: keras.Variable) -> str:
    author = _author_of(layer, variable)
    held = paths.holders(layer, variable)
    at = f" in the attribute `{'.'.join(held[0])}`" if held else ""
    return f"{variable.path}{at}{f', made by {author.__name__}' if author is not None else ''}"


def _refuse_name(layer: keras.Layer, author: type | None, name: str) -> None:
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


def _refuse_property(layer: keras.Layer, name: str, value: keras.Variable) -> None:
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


def _refuse_attribute(layer: keras.Layer, author: type | None, name: str, variable: keras.Variable) -> None:
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


# --------------------------------------------------------------------------- names
# How the own variables of an extended layer are written and read: each one by name.
#
# Many layers write by position, and only the variables that they know of. Here every own variable has an entry under
# its name. The parent's own methods run too, on a store in their own format, because they may do more than move
# values; what else they write is kept under the prefix `parent.`.
#
# A load runs in a stateless scope before it changes anything. So it is known which variables got a value, and a load
# that fails has changed none.


PREFIX = "parent."
Entries = dict[str, Tensor]
Method = Callable[[Store], None]


def keyed(layer: keras.Layer) -> Entries:
    """The layer's own variables by the key that each has in a file.

    It is the variable's name; where that was made up, or is not the only one of its kind, it is the
    attribute that holds the variable.
    """
    lists = keras_seam.variable_lists(layer).values()
    variables = list({id(variable): variable for each in lists for variable in each}.values())
    names = Counter(variable.name for variable in variables)
    found: Entries = {}
    for position, variable in enumerate(variables):
        key = variable.name
        if names[key] > 1 or keras_seam.is_automatic_variable_name(key):
            held = paths.holders(layer, variable)
            key = ".".join(held[0]) if held else f"variable.{position}"
        found[f"{key}.{position}" if key in found else key] = variable
    return found


def save(layer: keras.Layer, store: Store, parent_save: Method) -> None:
    """Writes every own variable, and what else the parent writes."""
    own = keyed(layer)
    for key, variable in own.items():
        store[key] = variable
    for key, value in _written(parent_save).items():
        if not any(value is variable for variable in own.values()) and not _is_derived(key, parent_save):
            store[PREFIX + key] = value


def load(
    layer: keras.Layer,
    store: Store,
    parent_save: Method,
    parent_load: Method,
    is_inherited: Callable[[keras.Variable], bool],
) -> None:
    """Reads what `save` wrote, or what the class wrote when it was not extended.

    Raises:
        TetherError: The file lacks a value, or has one that the layer has no place for. Nothing is changed then.
    """
    own = keyed(layer)
    entries = {key: store[key] for key in list(store.keys())}
    named = {key: variable for key, variable in own.items() if key in entries}
    by_position = len(named) < len(own) and any(key.isdigit() for key in entries)
    if by_position:
        given, lists = _by_position(layer, own, entries, parent_save, is_inherited)
        used = set(given)
    else:
        _refuse_missing(layer, [key for key in own if key not in named], entries)
        given, lists = _by_name(layer, own, entries, parent_save)
        used = {key for key in entries if key.startswith(PREFIX)}
    _refuse_shapes(layer, named, entries)
    _refuse_unknown(layer, [key for key in entries if key not in named and key not in used])
    with keras.StatelessScope() as scope:
        with keras_seam.listed_variables(layer, lists):
            parent_load(given)
        for key, variable in named.items():
            variable.assign(entries[key])
        stored = {key: variable for key, variable in own.items() if not isinstance(variable, View)}
        missing = [key for key, variable in stored.items() if scope.get_current_value(variable) is None]
        _refuse_missing(layer, missing, entries)
    for variable in {id(each): each for v in own.values() for each in stored_variables(v)}.values():
        value = scope.get_current_value(variable)
        if value is not None:
            variable.assign(value)


# --------------------------------------------------------------------------- the parent's own format


def _written(parent_save: Method) -> Entries:
    """What the parent's own method writes: its keys, and the variables or arrays under them."""
    found: Entries = {}
    parent_save(found)
    return found


def _is_derived(key: str, parent_save: Method) -> bool:
    """Whether an entry that is no variable is computed from variables: Keras writes merged kernels by position."""
    method = inspect.unwrap(parent_save)
    return key.isdigit() and method.__module__.startswith("keras.")


def _listed(layer: keras.Layer, written: Entries) -> dict[str, list[keras.Variable]]:
    """The layer's own variables that the parent writes: it counts them, and must not meet the others."""
    ids = {id(value) for value in written.values()}
    lists = keras_seam.variable_lists(layer)
    return {store: [variable for variable in each if id(variable) in ids] for store, each in lists.items()}


def _by_name(
    layer: keras.Layer, own: Entries, entries: Entries, parent_save: Method
) -> tuple[Entries, dict[str, list[keras.Variable]]]:
    """A store in the parent's format, made from a file that has every variable by name."""
    written = _written(parent_save)
    keys = {id(variable): key for key, variable in own.items()}
    given: Entries = {}
    for key, value in written.items():
        if id(value) in keys:
            given[key] = entries[keys[id(value)]]
        elif _is_derived(key, parent_save):
            given[key] = value
    extra = {key[len(PREFIX) :]: value for key, value in entries.items() if key.startswith(PREFIX)}
    return {**given, **extra}, _listed(layer, written)


def _by_position(
    layer: keras.Layer,
    own: Entries,
    entries: Entries,
    parent_save: Method,
    is_inherited: Callable[[keras.Variable], bool],
) -> tuple[Entries, dict[str, list[keras.Variable]]]:
    """A store in the parent's format, from a file that the class wrote when it was not extended."""
    everything = keras_seam.variable_lists(layer)
    inherited = {store: [v for v in variables if is_inherited(v)] for store, variables in everything.items()}
    positions = {key for key in entries if key.isdigit()}
    for lists in (everything, inherited):
        with keras_seam.listed_variables(layer, lists):
            written = _written(parent_save)
        if {key for key in written if key.isdigit()} == positions:
            break
    else:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): the file has {len(positions)} values by position, and "
            f"the layer has {len(own)} weights: {', '.join(own)}. Expected: a file of this class, with the same "
            f"arguments. {received(keys=sorted(entries))}"
        )
    given: Entries = {}
    for key in (key for key in written if key in entries):
        view = isinstance(written[key], View) and not isinstance(entries[key], FromFile)
        given[key] = FromFile(entries[key]) if view else entries[key]
    return given, _listed(layer, written)


# --------------------------------------------------------------------------- what is refused


def _refuse_missing(layer: keras.Layer, missing: list[str], entries: Entries) -> None:
    if missing:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): the file holds no value for {', '.join(missing)}; nothing "
            "was loaded. Expected: a file that the extended class wrote, or one of the class before it was extended "
            "that has all its values. To keep the start values of the new weights, load the file into a layer of the "
            "parent's class and assign its values: `layer.bias.assign(parent.bias)`. "
            f"{received(keys=sorted(entries))}"
        )


def _refuse_unknown(layer: keras.Layer, unknown: list[str]) -> None:
    if not unknown:
        return
    written: Entries = {}
    layer.save_own_variables(written)  # the user's class may write more than its variables
    unknown = [key for key in unknown if key not in written]
    if unknown:
        hint = "" if layer.built else " The layer is not built: build it first, or load a model with its config."
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}) has no weight for what the file holds under "
            f"{', '.join(map(repr, unknown))}; nothing was loaded. It has: {', '.join(keyed(layer)) or 'no weights'}."
            f"{hint} Expected: a file of this class, with the same arguments."
        )


def _refuse_shapes(layer: keras.Layer, named: Entries, entries: Entries) -> None:
    for key, variable in named.items():
        shape = shape_of(variable)
        if not isinstance(variable, View) and tuple(np.shape(entries[key])) != shape:
            raise ShapeMismatch(
                f"The weight {key!r} of layer {layer.name!r} ({type(layer).__name__}) has shape {shape}; nothing was "
                f"loaded. {received(shape=tuple(np.shape(entries[key])))}"
            )

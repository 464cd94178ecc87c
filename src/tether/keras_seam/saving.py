"""What a file holds, and the classes that it names."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import IO, TYPE_CHECKING, Any

import keras
import numpy
from keras import backend as _backend

from tether.keras_seam.frames import _COPYING, _LOADING, _READING, code_of
from tether.keras_seam.layers import inner_optimizer, optimized_variables
from tether.keras_seam.memory import on_host, random_starts_left_out, to_numpy
from tether.keras_seam.private import KerasSaveable, is_missing, private, to_snake_case, unpickle
from tether.keras_seam.processes import gathered, in_step_for, lies_elsewhere, place_in_step
from tether.keras_seam.variables import _outside_stateless_scopes
from tether.types import Array, Config, Function, Saveable, Store, Tensor

if TYPE_CHECKING:
    import h5py

# --------------------------------------------------------------------------- archives


_walk_saveable = private("keras.src.saving.saving_lib._walk_saveable", "Reading what a file holds")
_load_state = private("keras.src.saving.saving_lib._load_state", "Loading an archive")
_H5IOStore = private("keras.src.saving.saving_lib.H5IOStore", "Loading an archive")
_DiskIOStore = private("keras.src.saving.saving_lib.DiskIOStore", "Loading an archive that has assets")
_ObjectSharingScope = private("keras.src.saving.serialization_lib.ObjectSharingScope", "Reading a config")
_get_shared_object = private(
    "keras.src.saving.serialization_lib.get_shared_object", "A model in several places of a file"
)
_name_class = private("keras.src.saving.serialization_lib.serialize_with_public_class", "Naming a tied layer's class")
_retrieve_class = private("keras.src.saving.serialization_lib._retrieve_class_or_fn", "Finding a tied layer's class")
_names_of_classes = private("keras.src.saving.object_registration.GLOBAL_CUSTOM_NAMES", "Naming a tied layer's class")


def saved_objects(root: keras.Layer) -> Iterator[tuple[str, Saveable]]:
    """Everything that Keras writes of a model, each object once, with its place in the file, as it is written."""
    yield from _saved_below(root, "", set())


def _saved_below(saveable: Saveable, place: str, seen: set[int]) -> Iterator[tuple[str, Saveable]]:
    if id(saveable) in seen:
        return
    seen.add(id(saveable))
    yield place, saveable
    with _outside_stateless_scopes():  # to see what an optimizer writes, Keras makes one
        children = list(_walk_saveable(saveable))
    for name, child in children:
        inner = f"{place}/{name}" if place else name
        if isinstance(child, KerasSaveable):
            yield from _saved_below(child, inner, seen)
        elif isinstance(child, (list, dict, tuple)):
            yield from _saved_in_container(child, inner, seen, set())


_NESTED = is_missing(_H5IOStore) or hasattr(_H5IOStore, "has_path")
"""Whether this Keras writes what is in a container within a container."""


Container = list[object] | tuple[object, ...] | dict[str, object]


def _saved_in_container(
    container: Container, place: str, seen: set[int], containers: set[int]
) -> Iterator[tuple[str, Saveable]]:
    if id(container) in containers:
        return
    containers.add(id(container))
    used: dict[str, int] = {}

    def unique(name: str) -> str:
        used[name] = used.get(name, -1) + 1
        return f"{place}/{name}" + (f"_{used[name]}" if used[name] else "")

    for child in list(container.values()) if isinstance(container, dict) else container:
        if isinstance(child, KerasSaveable):
            yield from _saved_below(child, unique(to_snake_case(type(child).__name__)), seen)
        elif _NESTED and isinstance(child, (list, dict, tuple)):
            yield from _saved_in_container(child, unique("container"), seen, containers)


def entry_notes(store: object) -> MutableMapping[str, Any] | None:
    """Where notes go beside what a layer writes: attributes of its HDF5 group, which Keras never reads.

    `None` of a store that has no place for them.
    """
    return getattr(getattr(store, "_h5_entry_group", None), "attrs", None)


class _Instead(keras.StatelessScope):
    """Within, a variable of which a part lies on other processes has another value, as an array: that of a function."""

    def __init__(self, instead: Callable[[Tensor, str], Array]) -> None:
        super().__init__()
        self._instead = instead

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        """What Keras takes for the value of the variable, if it is not `None`."""
        value = super().get_current_value(variable)
        stored = variable._value if value is None else value
        return self._instead(stored, str(variable.path)) if lies_elsewhere(stored) else value


def _placeholder(value: Tensor, name: str) -> Array:
    return numpy.broadcast_to(numpy.zeros((), value.dtype), value.shape)


def own_values(saved: Saveable) -> dict[str, Tensor]:
    """What a Keras object would write of its own, by key. What lies partly on other processes has its shape only."""
    found: dict[str, Tensor] = {}
    with _Instead(_placeholder):
        saved.save_own_variables(found)
    return found


class _Unwritten(dict[str, Tensor]):
    """A store that reads what it is given, and keeps nothing."""

    def __setitem__(self, key: str, value: Tensor) -> None:
        to_numpy(value)


@contextlib.contextmanager
def saved_in_step(model: keras.Layer, *, by_all: bool = False) -> Iterator[None]:
    """Within, Keras saves a model that is split over several processes: all of them call it, and the first one writes.

    Each object writes its values as ever, `save_own_variables` with a scope around it in which Keras asks for values
    that are gathered one at a time. The processes other than the first one do the same with a store that keeps
    nothing, so that they take part in each of the gatherings, and in whatever else Keras does in between. What is kept
    in memory is written `by_all`.
    """
    number, count = place_in_step()
    if count == 1:
        yield
        return
    changed: list[Saveable] = []
    writes = by_all or number == 0
    try:
        for _, saved in list(saved_objects(model)):
            write = getattr(saved, "save_own_variables", None)
            if write is not None:
                object.__setattr__(saved, "save_own_variables", functools.partial(_save_gathered, write, writes))
                changed.append(saved)
        yield
    finally:
        for saved in changed:
            object.__delattr__(saved, "save_own_variables")


def _save_gathered(write: Function, writes: bool, store: Store) -> None:
    with _Instead(gathered):
        write(store if writes else _Unwritten())


def has_own_saving(optimizer: keras.Optimizer) -> bool:
    """Whether an optimizer does not write its variables one after another, as Keras's do."""
    cls = type(optimizer)
    return (cls.save_own_variables, cls.load_own_variables) != (
        keras.Optimizer.save_own_variables,
        keras.Optimizer.load_own_variables,
    )


_NOT_FROM_NUMPY = ("float8_e4m3fn", "float8_e5m2")
"""What Keras cannot make a tensor of on PyTorch."""


@functools.cache
def _open_store() -> type:
    class OpenStore(_H5IOStore):  # type: ignore[misc, valid-type]
        """Keras's store, over a file that is open; what was stored from it already is not read again."""

        def __init__(self, file: h5py.File, stored: dict[str, keras.Variable]) -> None:
            self._open, self._stored = file, stored
            super().__init__("values", mode="r")

        def _get_h5_file(self, path_or_io: object, mode: object = None) -> h5py.File:
            return self._open

        def __getitem__(self, key: str) -> Tensor:
            variable = self._stored.get(f"{self._h5_entry_path}/vars/{key}" if self._h5_entry_path else f"vars/{key}")
            if variable is None:
                return super().__getitem__(key)
            if _backend.backend() != "torch":
                return variable._value
            value = on_host(variable._value)
            return variable._value.detach() if value.dtype.name in _NOT_FROM_NUMPY else value

    return OpenStore


def read_archive(
    archive: zipfile.ZipFile,
    values: h5py.File,
    first: Callable[[keras.Model], dict[str, keras.Variable]],
    *,
    custom_objects: Mapping[str, object] | None,
    compile: bool,
    safe_mode: bool,
    large: int,
) -> keras.Model:
    """What `keras.saving.load_model` makes of an archive, without having all values in memory a second time.

    Args:
        archive: The archive, a `zipfile.ZipFile`.
        values: The values in it, an `h5py.File`.
        first: Called with the model before Keras reads values. It may store some itself, and returns their variables
            by their places in the file.
        custom_objects: As in `load_model`.
        compile: As there.
        safe_mode: As there.
        large: Bytes of a variable from which on no start is drawn for it, unless `first` stores nothing in it.
    """
    config = json.loads(archive.read(_CONFIG))
    if not compile:
        config["compile_config"] = None
    with random_starts_left_out(large) as left_out:
        model = _deserialized(config, custom_objects, safe_mode=safe_mode)
    stored = first(model)
    has_value = {id(variable) for variable in stored.values()}
    for known, start in left_out:
        variable = known()
        if variable is not None and id(variable) not in has_value:
            variable.assign(start())
    store, assets = _open_store()(values, stored), None
    if len(archive.namelist()) > 3:
        assets = _DiskIOStore("assets", archive=archive, mode="r")
    failed: set[int] = set()
    errors: dict[int, tuple[Saveable, Exception]] = {}
    try:
        _load_state(
            model,
            weights_store=store,
            assets_store=assets,
            inner_path="",
            visited_saveables=set(),
            failed_saveables=failed,
            error_msgs=errors,
        )
    finally:
        if assets is not None:
            assets.close()
    if failed:
        _, error = next(iter(errors.values()))
        raise error  # as it was raised, and not as one of Keras's that has its text
    return model


_READING.add(code_of(read_archive))
_COPYING.add(code_of(read_archive))
_LOADING.add(code_of(read_archive))


def optimizer_slots(optimizer: keras.Optimizer) -> dict[int, list[tuple[str, keras.Variable]]]:
    """What an optimizer keeps for each variable, by the variable's id: the name of the slot, and its variable.

    An optimizer holds a list for each kind of slot, in the order of the variables that it was built with.
    """
    optimizer = inner_optimizer(optimizer)
    found: dict[int, list[tuple[str, keras.Variable]]] = {}
    known = optimized_variables(optimizer)
    for name, slots in vars(optimizer).items():
        if name in ("_variables", "_trainable_variables") or not isinstance(slots, list) or len(slots) != len(known):
            continue
        for variable, slot in zip(known, slots, strict=True):
            if isinstance(slot, keras.Variable):
                found.setdefault(id(variable), []).append((name.strip("_"), slot))
    for variable in known:
        found.setdefault(id(variable), [])
    return found


def config_with_ids(model: keras.Model) -> Config:
    """A model's config in which every object has the key `SHARED_ID`, and not just the second mention of one.

    Keras notes an object when it meets it, writes its id from the second time on, and copies the configs of graphs
    and stacks before that time comes. In a second pass it knows all of them.
    """
    with _ObjectSharingScope():
        keras.saving.serialize_keras_object(model)
        return keras.saving.serialize_keras_object(model)


_CONFIG = "config.json"
"""The file in an archive that has the config."""

SHARED_ID = "shared_object_id"
"""Where a config holds the id of an object that the file has in several places."""


def deserialized(config: Config, custom_objects: Mapping[str, object]) -> keras.Layer:
    """The model of a config that this process wrote, as `load_model` makes it before it reads values."""
    return _deserialized(config, custom_objects, safe_mode=False)


def _deserialized(config: Config, custom_objects: Mapping[str, object] | None, *, safe_mode: bool) -> keras.Layer:
    with _ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, custom_objects, safe_mode=safe_mode)


def shared_object(identity: int) -> Any:
    """What was made for an id so far, while a config is read."""
    return _get_shared_object(identity)


def calls_of(operation: keras.Operation) -> int:
    """How many nodes of graphs an operation has: a config counts those of its own graph."""
    return len(operation._inbound_nodes)


def graph_of(model: keras.Model) -> list[tuple[keras.Operation, list[keras.KerasTensor], list[keras.KerasTensor]]]:
    """What a functional model's graph computes, inputs first: what is called, its input and its output tensors."""
    depths = sorted(model._nodes_by_depth, reverse=True)
    nodes = [node for depth in depths for node in model._nodes_by_depth[depth]]
    return [(node.operation, list(node.input_tensors), list(node.outputs)) for node in nodes]


TIED_NAME = "tether>Tied"


def register_made(cls: type, name: str) -> None:
    """Makes Keras write one name for classes that are made at run time into a config: that of whoever reads it."""
    _names_of_classes.update({cls: name})


def register_reader(name: str, reader: object) -> None:
    """Makes Keras hand every config of a name to `reader.from_config`."""
    keras.saving.get_custom_objects()[name] = reader


def register_reader_of(name: str, module: str) -> None:
    """Makes Keras hand every config of a name to the reader that a module registers when it is imported: not yet."""
    register_reader(name, _ReaderOf(name, module))


class _ReaderOf:
    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def from_config(self, config: Config, custom_objects: Mapping[str, object] | None = None) -> object:
        """What the module's reader makes of a config."""
        importlib.import_module(self.module)
        reader: Any = keras.saving.get_custom_objects()[self.name]
        return reader.from_config(config)


def class_reference(cls: type) -> Config:
    """How Keras names a class in a file."""
    found = _name_class(cls, {})
    return {key: found[key] for key in ("module", "class_name", "registered_name")}


def find_class(reference: Config) -> object:
    """The class of a reference, by Keras's own rules of what a file may name."""
    return _retrieve_class(
        reference["class_name"],
        reference["registered_name"],
        reference["module"],
        obj_type="class",
        full_config={**reference, "config": {}},
        custom_objects={},  # those of the open scopes are known
    )


def registered_function(name: str) -> object:
    return keras.saving.get_registered_object(name)


def save_to(model: keras.Model, fileobj: IO[bytes]) -> None:
    """Writes the archive that a Keras model or layer is pickled as."""
    pickled: Function = KerasSaveable.__reduce__
    with in_step_for(model, f"a copy of {model.name!r}"), saved_in_step(model, by_all=True):
        _, (archive,) = pickled(model)
    fileobj.write(archive.getbuffer())


def load_from(fileobj: IO[bytes], *, compile: bool) -> keras.Layer:
    """The model or layer of an archive that this process wrote."""
    return unpickle(fileobj if compile else _without_compile_config(fileobj))


def _without_compile_config(fileobj: IO[bytes]) -> io.BytesIO:
    copy = io.BytesIO()
    with zipfile.ZipFile(fileobj) as archive, zipfile.ZipFile(copy, "w") as written:
        for name in archive.namelist():
            data = archive.read(name)
            if name == _CONFIG:
                data = json.dumps({**json.loads(data), "compile_config": None}).encode()
            written.writestr(name, data)
    copy.seek(0)
    return copy


# --------------------------------------------------------------------------- exports
# Exports to other formats.


_get_input_signature = private("keras.src.export.export_utils.get_input_signature", "Exporting a model")
_patch_tf2onnx = private("keras.src.export.tf2onnx_lib.patch_tf2onnx", "An ONNX file of the TensorFlow backend")
_make_input_spec = private("keras.src.export.export_utils.make_input_spec", "Exporting a model")


def input_signature(model: keras.Model) -> list[object]:
    """The positional arguments of a model's call, as structures of specs, as Keras's exporters read them.

    Raises:
        ValueError: The model has not been called, so nobody knows.
    """
    return list(_get_input_signature(model))


def input_spec(tensor: Tensor) -> keras.InputSpec:
    """The spec of a tensor, a symbolic tensor or a spec."""
    return _make_input_spec(tensor)


def store_each_variable_once(archive: keras.export.ExportArchive) -> None:
    """Makes an export archive of the TensorFlow backend write each variable once.

    It lists Keras's variables, and once more the TensorFlow variables inside them; TensorFlow takes them for two.
    """
    if _backend.backend() == "tensorflow":
        for name in ("variables", "trainable_variables", "non_trainable_variables"):
            setattr(archive._tf_trackable, name, [v.value for v in getattr(archive._tf_trackable, name)])


def mend_tf2onnx() -> None:
    """Makes tf2onnx work with the NumPy of today, as Keras does before it calls it."""
    _patch_tf2onnx()

"""Where variables lie: the distribution in force, and the layout of each variable. Of JAX alone; elsewhere none."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tether.keras_seam.layers import set_untracked
from tether.keras_seam.private import of_this_thread, set_in_this_thread

_IS_JAX = keras.backend.backend() == "jax"


def layout_map() -> keras.distribution.LayoutMap | None:
    """The layouts by path of the distribution in force, if it has any."""
    return getattr(keras.distribution.distribution(), "_layout_map", None) if _IS_JAX else None


@contextlib.contextmanager
def as_if_not_made() -> Iterator[None]:
    """What is made in the block lies on one device, and leaves no trace: not in names, nor in random numbers.

    Keras numbers the names of layers, and draws seeds, by what has been made before.
    """
    names, drawn, of_numpy = of_this_thread("object_name_uids"), random.getstate(), np.random.get_state()
    distribution = keras.distribution.distribution()
    set_in_this_thread("object_name_uids", None if names is None else names.copy())
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
        set_in_this_thread("object_name_uids", names)
        random.setstate(drawn)
        np.random.set_state(of_numpy)


def mesh_sizes(mesh: keras.distribution.DeviceMesh) -> dict[str, int]:
    """How many devices a mesh has along each of its axes, by their names."""
    return dict(zip(mesh.axis_names, map(int, mesh.shape), strict=True))


def _sharding(variable: keras.Variable) -> Any:
    """JAX's own form of the layout that a variable was made with: until Keras 3.14 variables keep only that."""
    layout = getattr(variable, "_layout", None)
    return layout.backend_layout if isinstance(layout, keras.distribution.TensorLayout) else layout


def layout_of(variable: keras.Variable) -> tuple[str | None, ...] | None:
    """The layout that a variable was made with, of the rank of its shape; `None` without a distribution."""
    return _named(getattr(_sharding(variable), "spec", None), len(variable.shape))


def _named(spec: Any, rank: int) -> tuple[str | None, ...] | None:
    """A partition of JAX's as a layout of a rank; `None` if it is none that has one axis of the mesh for each."""
    if spec is None or len(spec) > rank:
        return None
    found = [axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis for axis in spec]
    if not all(isinstance(axis, (str, type(None))) for axis in found):
        return None
    return (*found, *(None,) * (rank - len(found)))


def devices_of(variable: keras.Variable) -> dict[str, int] | None:
    """How many devices the mesh that a variable was laid out on has along each of its axes."""
    mesh = getattr(_sharding(variable), "mesh", None)
    return None if mesh is None else {str(name): int(size) for name, size in mesh.shape.items()}


def layout_argument(axes: Sequence[str | None] | None) -> dict[str, object]:
    """What `keras.Variable` takes to be made with a layout on the mesh in force; nothing to leave it to the map."""
    layouts = layout_map()
    if axes is None or layouts is None:
        return {}
    return {"layout": keras.distribution.TensorLayout(tuple(axes), layouts.device_mesh).backend_layout}


def lay_out(variable: keras.Variable, axes: Sequence[str | None], mesh: keras.distribution.DeviceMesh) -> bool:
    """Lets a variable lie on a mesh in another way, whatever it holds; whether that is another way than before."""
    if layout_of(variable) == tuple(axes):
        return False
    _move(variable, keras.distribution.TensorLayout(tuple(axes), mesh).backend_layout)
    return True


def _move(variable: keras.Variable, sharding: Any) -> None:
    value = variable._value
    if value is not None:
        set_untracked(variable, "_value", keras.distribution.distribute_tensor(value, sharding))
    variable._layout = sharding


def lay_out_value(variable: keras.Variable, value: Any) -> Any:
    """A tensor where the variable lies that is to hold it, as far as the devices can divide it so."""
    axes, sizes = layout_of(variable), devices_of(variable)
    if axes is None or sizes is None or len(axes) != len(value.shape):
        return value
    fitted = tuple(
        axis if axis is None or size % sizes[axis] == 0 else None for axis, size in zip(axes, value.shape, strict=True)
    )
    if fitted != axes:
        sharding = _sharding(variable)
        variable._layout = sharding.update(spec=type(sharding.spec)(*fitted))
    return keras.distribution.distribute_tensor(value, variable._layout)


def lies_as(variable: keras.Variable) -> tuple[str | None, ...] | None:
    """How a variable's tensor really lies on the devices, of the rank of its shape; `None` where that has no names.

    Only what is known of the tensor is asked, and none of its numbers, some of which may lie on another machine.
    """
    sharding = getattr(getattr(variable, "_value", None), "sharding", None)
    return _named(getattr(sharding, "spec", None), len(variable.shape))


def is_all_here(variable: keras.Variable) -> bool:
    """Whether this process can read all numbers of a variable: none lies on devices of another one alone."""
    value = getattr(variable, "_value", None) if _IS_JAX else None
    return bool(getattr(value, "is_fully_addressable", True) or getattr(value, "is_fully_replicated", True))

"""`tether.distribution.layout_map`: a layout map of Keras's for models with ties, by the name of any use.

Keras asks a layout map once for each variable, by its path, while the variable is made. A weight that several layers
use has one path, its parts have others, and what is stored of it may be integers: the names that people know fit none
of these. So the map here knows the layouts of all that a model stores, worked out from those of its uses, and answers
for what is not made yet by the patterns that it was given. What has no name in either follows what it belongs to, when
it is tied (`weights.placement`): that goes by the expression, so no path has to be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras

from tether import keras_seam, patterns
from tether.errors import ShapeMismatch, TetherError, received
from tether.layers.use_layouts import laid_out
from tether.weights.placement import Spec


def layout_map(
    source: keras.layers.Layer | Callable[[], keras.layers.Layer] | Iterable[str] | None,
    layouts: Mapping[Any, object],
    mesh: keras.distribution.DeviceMesh | None = None,
) -> keras.distribution.LayoutMap:
    """A layout map of Keras's in which every stored weight of a model lies as its uses are said to.

    A layout says of a weight over which axis of the mesh each of its axes is divided. It may be given for any use of a
    stored weight, or for the weight itself: it goes back through the expression of the use. A transpose permutes it, a
    reshape splits and joins axes, a sum passes it to each term, a product passes rows to its first factor and columns
    to its second; what is computed of a whole matrix (an orthogonal one, a spectrum) needs it whole. Parts of forms lie
    as the weight that they were made for. An axis that the devices do not divide evenly is whole, and `tether.check`
    says so.

    The map answers for what is made later too: by the patterns, and for adapters, integers, stacks and copies by what
    they are made of.

    Args:
        source: A model or layer that is built; or a function that makes one, which is called once, without a
            distribution; or the paths of variables; or `None`, for models that nobody has made yet. Only names, shapes
            and expressions of a model are looked at.
        layouts: Layouts by name: that of any use, such as `"head/kernel"`, or the weight's own path. A name may be a
            pattern of Tether's (`"*/query/kernel"`) or a regular expression, as a string or compiled. A layout is a
            tuple with the name of an axis of the mesh, or `None`, for each axis; or a `TensorLayout`. Of several names
            that fit, the last one counts. A `LayoutMap` is taken too, and completed: KerasHub's `get_layout_map`.
        mesh: The mesh of devices; left out, that of the `LayoutMap`.

    Returns:
        A `keras.distribution.LayoutMap`, for `keras.distribution.ModelParallel(layout_map=...)`.

    Raises:
        TetherError: Two uses make different layouts of one weight; a layout names no axis of the mesh, or one of them
            twice; or there is no mesh.
        ShapeMismatch: A layout has another number of axes than what it is for.

    Example:
    ```python
    table = tether.Weight((32, 8), "glorot_uniform", name="table")
    i = keras.Input((4,), dtype="int32")
    h = tether.tie(keras.layers.Embedding(32, 8, name="embed"), embeddings=table)(i)
    model = keras.Model(i, tether.tie(keras.layers.Dense(32, use_bias=False, name="head"), kernel=table.T)(h))

    if keras.backend.backend() == "jax":
        mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], keras.distribution.list_devices()[:1])
        layouts = tether.distribution.layout_map(model, {"head/kernel": (None, "model")}, mesh)
        assert layouts["table"].axes == ("model", None)
        scope = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope()
        with scope:                                      # what is made or loaded in here is divided so
            copy = keras.models.clone_model(model)
    ```
    """
    if not isinstance(layouts, Mapping):
        raise TetherError(
            f"`layouts` has layouts by name, as in {{'head/kernel': (None, 'model')}}. {received(layouts=layouts)}"
        )
    mesh = getattr(layouts, "device_mesh", None) if mesh is None else mesh
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise TetherError(
            "A layout map needs the mesh of devices: `keras.distribution.DeviceMesh((2, 4), ['batch', 'model'], "
            f"devices)`. {received(mesh=mesh)}"
        )
    found = DerivedLayoutMap(mesh, layouts)
    if isinstance(source, keras.layers.Layer):
        found.complete(source)
    elif callable(source):
        with keras_seam.as_if_not_made():
            model = source()
        if not isinstance(model, keras.layers.Layer):
            raise TetherError(f"The function returns a Keras model or layer. {received(returned=type(model).__name__)}")
        found.complete(model)
    elif source is not None:
        found.answer_for(_paths(source))
    return found


def _paths(source: object) -> list[str]:
    found = list(source) if isinstance(source, Iterable) and not isinstance(source, str) else [source]
    if isinstance(source, str) or not all(isinstance(path, str) for path in found):
        raise TetherError(
            "`layout_map` takes a Keras model or layer, a function that makes one, or a list of the paths of "
            f"variables. {received(source=source)}"
        )
    return found  # type: ignore[return-value]


# --------------------------------------------------------------------------- layouts by name


class DerivedLayoutMap(keras.distribution.LayoutMap):
    """A layout map with the layouts of stored weights by their paths, and those that were given, by patterns.

    Args:
        mesh: The mesh of devices.
        layouts: What was given: layouts by name or pattern, or a layout map.
    """

    def __init__(self, mesh: keras.distribution.DeviceMesh, layouts: Mapping[Any, object]) -> None:
        super().__init__(mesh)
        self.sizes = keras_seam.mesh_sizes(mesh)
        self.given: dict[Any, keras.distribution.TensorLayout] = {}
        self.found: dict[str, keras.distribution.TensorLayout] = {}
        for key in layouts:
            self[key] = None if patterns.leaves_out(key) else layouts[key]

    def __getitem__(self, key: str) -> keras.distribution.TensorLayout | None:
        """The layout of a path: as it was worked out, or by the last name or pattern that fits; `None` for neither."""
        if key in self.found:
            return self.found[key]
        answer = self.answer((key,), {})
        return None if answer is None else self._on_mesh(answer[1])

    def __setitem__(self, key: Any, layout: object) -> None:
        if not patterns.leaves_out(key):
            self.given[key] = self._checked(key, layout)
        else:
            self.given[key] = self._on_mesh(())

    def __delitem__(self, key: Any) -> None:
        del (self.found if key in self.found else self.given)[key]

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[object]:
        return iter(dict.fromkeys([*self.found, *self.given]))

    def answer(
        self, names: tuple[str, ...], words: Mapping[str, bool], made: bool = False
    ) -> tuple[object, Spec] | None:
        """The name or pattern that counts for what is called so, and its layout; `None` if none fits.

        Names and patterns fit as a whole, so it is no matter whether it was `made` for another weight.
        """
        found: tuple[object, Spec] | None = None
        for key, layout in self.given.items():
            excluding = patterns.leaves_out(key)
            if _fits(key[1:] if excluding else key, names, words):
                found = None if excluding else (key, tuple(layout.axes))
        return found

    def _on_mesh(self, spec: Spec) -> keras.distribution.TensorLayout:
        return keras.distribution.TensorLayout(spec, self.device_mesh)

    def _checked(self, key: Any, layout: object) -> keras.distribution.TensorLayout:
        axes = getattr(layout, "axes", layout)
        if isinstance(axes, str) or not isinstance(axes, (tuple, list)):
            raise TetherError(
                "A layout is a tuple with the name of an axis of the mesh, or None, for each axis of the weight, as "
                f"in (None, 'model'). {received(**{'layout of ' + repr(key): layout})}"
            )
        names = [axis for axis in axes if axis is not None]
        wrong = [axis for axis in names if axis not in self.sizes]
        if wrong or len(set(names)) != len(names):
            raise TetherError(
                f"The layout of {key!r} names each axis of the mesh once at most, and the mesh has "
                f"{', '.join(map(repr, self.sizes))}. {received(layout=tuple(axes))}"
            )
        return self._on_mesh(tuple(axes))

    # ------------------------------------------------------------------ of a model

    def answer_for(self, known: Iterable[str]) -> None:
        """Settles what the paths of variables get, of which nothing else is known."""
        for path in known:
            layout = self[path]
            if layout is not None:
                self.found[path] = layout

    def complete(self, model: keras.layers.Layer) -> None:
        """Works out the layouts of all that a model stores.

        Raises:
            TetherError: Two uses make different layouts of one weight.
            ShapeMismatch: A layout has another number of axes than what it is for.
        """
        found = laid_out(model, self.answer, self.sizes)
        for misfit in found.misfits:
            raise ShapeMismatch(
                f"The key {misfit.key!r} fits {misfit.name!r}, which has shape {misfit.shape}: a layout has an entry "
                f"for each axis. Name in the key only what the layout is for, or leave this one out by a key after it, "
                f"`'!{misfit.name}': None`. {received(layout=misfit.asked)}"
            )
        for conflict in found.conflicts:
            raise TetherError(str(conflict))
        by_path: dict[str, set[Spec]] = {}
        for variable, spec in found.specs:
            by_path.setdefault(variable.path, set()).add(spec)
        agreed = {path: next(iter(specs)) for path, specs in by_path.items() if len(specs) == 1}
        self.found.update({path: self._on_mesh(spec) for path, spec in agreed.items()})


def _fits(key: Any, names: tuple[str, ...], words: Mapping[str, bool]) -> bool:
    """Whether a pattern of Tether's, or a string that is a regular expression, is for what has one of these names."""
    if patterns.fits(key, *names, words=words):
        return True
    if not isinstance(key, str):
        return False
    try:
        return any(re.fullmatch(key, name) for name in names)
    except re.error:
        return False


__all__ = ["layout_map"]

"""What the rules judge: a model or a file, its facts, and what is found out about it, each thing once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError
from tether.inspection.checking.captured import Found, arguments_of, reached
from tether.inspection.checking.samples import InMemory, Readable
from tether.inspection.facts import Facts, StoredWeight
from tether.inspection.live import OPTIMIZER, UNSAVED, layer_path, own_entries_of, unique_paths
from tether.layers.tying import paths
from tether.layers.tying.state import State, View, ViewSlot, state_of, stored_variables
from tether.types import Config, Function, Nested, Saveable, Tensor
from tether.weights.weight import Weight

T = TypeVar("T")

SHAKE = 0.05
"""The standard deviation of what is added to the weights to tell one that cannot learn from one that is at rest."""


@dataclass(frozen=True)
class Batch:
    """One batch of the data that `check` was given."""

    x: Any
    y: Any = None


@dataclass(frozen=True)
class Captured:
    """Something that a layer, or a call in a graph, holds or captures."""

    where: str
    """The layer or operation, and the attribute."""
    found: Found
    layer: keras.Layer
    """The layer that holds it, or the layer whose graph calls an operation with it."""
    in_graph: bool
    """Whether it is an argument of a call in a graph."""


class Context:
    """A model or a file, as the rules see it.

    Attributes:
        facts: The facts.
        model: The live model or layer, or `None` if a file is checked.
        file: The file, or `None`.
        data: One batch, or `None`.
    """

    def __init__(self, facts: Facts, *, model: Any = None, file: Path | None = None, data: Batch | None = None) -> None:
        self.facts, self.model, self.file, self.data = facts, model, file, data
        self._open = contextlib.ExitStack()
        self._found: dict[object, Any] = {}

    def once(self, find: Callable[[Context], T]) -> T:
        """What a function finds out, remembered for the other rules that ask."""
        if find not in self._found:
            self._found[find] = find(self)
        found: T = self._found[find]
        return found

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # ------------------------------------------------------------------ layers

    @cached_property
    def layers(self) -> list[keras.Layer]:
        """Every layer of the model, itself first, without Tether's weights."""
        found = keras_seam.contained_layers(self.model)
        return [layer for layer in found if not isinstance(layer, Weight)]

    @cached_property
    def _known_layers(self) -> set[int]:
        return {id(layer) for layer in keras_seam.contained_layers(self.model)}

    @cached_property
    def _objects(self) -> list[tuple[str, Saveable]]:
        return list(keras_seam.saved_objects(self.model))

    @cached_property
    def _layer_paths(self) -> dict[int, str]:
        names = {place: saveable.name for place, saveable in self._objects if isinstance(saveable, keras.layers.Layer)}
        return {id(saveable): layer_path(place, names) for place, saveable in self._objects}

    def path_of(self, layer: keras.Layer) -> str:
        """The names of the layers from the model down to one of them."""
        return self._layer_paths.get(id(layer)) or str(layer.name)

    @cached_property
    def parents(self) -> dict[int, list[keras.Layer]]:
        """The layers that hold each layer, by its id."""
        found: dict[int, list[keras.Layer]] = {}
        for layer in self.layers:
            for child in {id(child): child for child in keras_seam.sublayers(layer)}.values():
                found.setdefault(id(child), []).append(layer)
        return found

    @cached_property
    def tied(self) -> list[tuple[keras.Layer, State, ViewSlot]]:
        """Every view of a tied layer."""
        return [(layer, state, slot) for layer in self.layers if (state := state_of(layer)) for slot in state.slots]

    @cached_property
    def _readers(self) -> dict[int, list[View]]:
        found: dict[int, list[View]] = {}
        for _, _, slot in self.tied:
            for stored in {id(stored): stored for stored in stored_variables(slot.view)}.values():
                found.setdefault(id(stored), []).append(slot.view)
        return found

    def views_of(self, variable: keras.Variable) -> list[View]:
        """The views of tied layers that read a stored variable."""
        return self._readers.get(id(variable), [])

    # ------------------------------------------------------------------ weights

    @cached_property
    def variables(self) -> dict[str, keras.Variable]:
        """The variable of each stored weight, by its place."""
        found: Config = {}
        for place, saveable in self._objects:
            for key, value in own_entries_of(saveable).items():
                found[f"{place}/vars/{key}" if place else f"vars/{key}"] = value
        for variable in self.model.weights:
            found.setdefault(f"{UNSAVED}{variable.path}", variable)
        return {weight.place: found[weight.place] for weight in self.facts.weights}

    @cached_property
    def _unique_paths(self) -> dict[int, str]:
        return unique_paths(self.model)

    def unique_path(self, variable: keras.Variable) -> str:
        """The path of a variable, with a number where another one of the model has it too."""
        return self._unique_paths.get(id(variable), str(variable.path))

    @cached_property
    def _by_variable(self) -> dict[int, StoredWeight]:
        return {id(self.variables[weight.place]): weight for weight in self.facts.weights}

    def weight_of(self, variable: keras.Variable) -> StoredWeight | None:
        """The facts of a variable, if the model stores it."""
        return self._by_variable.get(id(variable))

    @cached_property
    def weights(self) -> list[StoredWeight]:
        """The stored weights that are none of a random generator or a metric."""
        return [weight for weight in self.facts.weights if not weight.state]

    @cached_property
    def _shared(self) -> set[int]:
        found = keras_seam.contained_layers(self.model) if self.model is not None else ()
        return {id(layer.variable) for layer in found if isinstance(layer, Weight) and layer.is_built}

    def is_shared(self, weight: StoredWeight) -> bool:
        """Whether a stored weight is one of Tether's, as far as that is known: of a file it is not."""
        return bool(self._shared) and id(self.variables[weight.place]) in self._shared

    def name_of(self, weight: StoredWeight) -> str:
        """A name of a weight for people: that of its first use."""
        uses = self.facts.uses_of(weight)
        return uses[0].where if uses else weight.path or weight.place

    @cached_property
    def values(self) -> dict[str, Readable]:
        """The values of the stored weights that have any, by place. They are read when they are asked for."""
        if self.file is not None:
            from tether.inspection.checking.samples import opened_samples

            return self._open.enter_context(opened_samples(self.file, self.facts))
        found: dict[str, Readable] = {}
        for weight in self.weights:
            value = self.values_of(self.variables[weight.place])
            if value is not None and weight.dtype != "string":
                found[weight.place] = value
        return found

    def values_of(self, variable: keras.Variable) -> Readable | None:
        """The values of a variable or array; `None` of a variable that has none yet, or not all of them here."""
        if isinstance(variable, np.ndarray):
            return InMemory(variable.shape, lambda: variable)
        if isinstance(variable, keras.Variable) and not keras_seam.is_all_here(variable):
            return None
        stored = keras_seam.stored_value(variable) if isinstance(variable, keras.Variable) else variable
        if (
            stored is None
            or keras_seam.is_shard(stored)
            or keras_seam.is_sparse(stored)
            or not keras_seam.is_concrete(stored)
        ):
            return None
        return InMemory(stored.shape, partial(keras_seam.on_host, stored))

    # ------------------------------------------------------------------ what is held and captured

    @cached_property
    def captured(self) -> list[Captured]:
        """Every variable, array and layer that a layer, or a call in a graph, holds or captures.

        A layer may refer to another one of the model, which Keras saves there; a function cannot.
        """
        found = []
        for layer in self.layers:
            path = self.path_of(layer)
            for item in reached(layer, set() if isinstance(layer, keras.layers.Lambda) else self._known_layers):
                found.append(Captured(f"{path}/{item.attribute}", item, layer, in_graph=False))
        for layer in self.layers:
            inside = "" if layer is self.model else f"{self.path_of(layer)}/"
            for called, args, kwargs in keras_seam.calls_in_graph(layer):
                held = list(arguments_of(args, kwargs))
                if not isinstance(called, keras.layers.Layer):
                    held += reached(called, set())
                found += [Captured(f"{inside}{called.name}", item, layer, in_graph=True) for item in held]
        return found

    @cached_property
    def known_variables(self) -> set[int]:
        """The ids of all variables that Keras tracks in the model, its metrics' and its optimizer's included."""
        known = [*self.model.variables, *getattr(self.model, "metrics_variables", ())]
        known += [variable for _, optimizer in self.optimizers for variable in optimizer.variables]
        return {id(variable) for variable in known}

    # ------------------------------------------------------------------ training

    @cached_property
    def optimizers(self) -> list[tuple[str, keras.Optimizer]]:
        """The optimizers of the model and of its layers, and the attributes that hold them."""
        found: dict[int, tuple[str, keras.Optimizer]] = {}
        compiled = getattr(self.model, "optimizer", None)
        if compiled is not None:
            found[id(compiled)] = ("optimizer", compiled)
        for layer in self.layers:
            for name, value in keras_seam.own_attributes(layer):
                if isinstance(value, keras.optimizers.Optimizer):
                    where = name if layer is self.model else f"{self.path_of(layer)}/{name}"
                    found.setdefault(id(value), (where, value))
        return list(found.values())

    @cached_property
    def gradients(self) -> Nested:
        """The gradients of one batch, by use; `None` if nothing trains."""
        return self._gradients() if self.model.trainable_variables else None

    @cached_property
    def shaken_gradients(self) -> Nested:
        """The same with something added to every weight that trains, so that nothing is zero by its start.

        The model is not changed: the other values live in a scope.
        """
        rng = np.random.default_rng(0)
        other = []
        for variable in self.model.trainable_variables:
            added = keras.ops.convert_to_tensor(SHAKE * rng.standard_normal(variable.shape), dtype="float32")
            stored = keras_seam.stored_dtype(variable)
            plain = keras_seam.plain_tensor(keras_seam.stored_value(variable))
            other.append((variable, keras.ops.add(plain, keras.ops.cast(added, stored))))
        with keras.StatelessScope(state_mapping=other):
            return self._gradients()

    def _gradients(self) -> Nested:
        from tether.inspection.gradients import gradients

        data = self.data
        assert data is not None
        has_loss = keras_seam.has_compiled_loss(self.model) or getattr(self.model, "compiled", False)
        return self._passed(lambda: gradients(self.model, data.x, data.y if has_loss else None))

    @cached_property
    def outputs(self) -> Tensor:
        """What the model makes of the batch, not in training."""
        assert self.data is not None
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, self.data.x)
        with keras_seam.undisturbed(self.model), keras.StatelessScope():
            return self._passed(lambda: self.model(x))

    def _passed(self, run: Function) -> Any:
        try:
            return run()
        except TetherError:
            raise
        except Exception as error:  # the user's own code runs here
            raise TetherError(
                f"The batch could not be passed through {self.model.name!r} and back: {type(error).__name__}: {error}. "
                "Expected: `data=(x, y)` or `data=x`, one batch as the model takes it, x as in `model(x)`."
            ) from error

    # ------------------------------------------------------------------ code that mends

    def use_path(self, layer: keras.Layer, variable: keras.Variable) -> str:
        """The path by which `tether.tie(model, {path: ...})` finds a variable or view of a layer."""
        if (id(layer), id(variable)) not in self._places:
            return f"{self.path_of(layer)}/{variable.name}"
        canonical, names = self._places[id(layer), id(variable)]
        with contextlib.suppress(TetherError):  # an ambiguous name, or a wrapper that must not be tied
            if paths.locate(self.model, names, self._holdings).variable is variable:
                return "/".join(names)
        return "/".join(canonical)

    @cached_property
    def _holdings(self) -> paths.Holdings:
        return paths.Holdings()

    @cached_property
    def _places(self) -> dict[tuple[int, int], tuple[paths.Path, paths.Path]]:
        """The canonical path and the path by names of each weight of each layer."""
        found: dict[tuple[int, int], tuple[paths.Path, paths.Path]] = {}
        for canonical, names, owner, variable in paths.walk(self.model):
            found.setdefault((id(owner), id(variable)), (canonical, names))
        return found

    def known_path(self, where: str) -> str:
        """The path by which `tether.tie(model, {path: ...})` finds a use: a single layer's own name is not in it."""
        for path in (where, where.partition("/")[2]):
            with contextlib.suppress(TetherError):
                paths.locate(self.model, paths.split(path), self._holdings)
                return path
        return where

    @cached_property
    def _uses(self) -> dict[int, list[tuple[keras.Layer, keras.Variable]]]:
        found: dict[int, list[tuple[keras.Layer, keras.Variable]]] = {}
        for layer in self.layers:
            for held in paths.own_variables(layer):
                expression = getattr(held, "expression", None)
                if expression is None:
                    found.setdefault(id(held), []).append((layer, held))
                elif isinstance(expression, Weight) and expression.is_built:
                    found.setdefault(id(expression.variable), []).append((layer, held))
        return found

    def uses(self, variable: keras.Variable) -> list[tuple[keras.Layer, keras.Variable]]:
        """The layers that read a stored variable as it is, and what they hold: the variable, or a view of it."""
        return self._uses.get(id(variable), [])

    def weight_code(self, variable: keras.Variable) -> str:
        """Code for the weight behind a variable."""
        if not self.uses(variable):
            return self.variable_code(variable)
        layer, held = self.uses(variable)[0]
        return f"tether.weight_of(model, {self.use_path(layer, held)!r})"

    def variable_code(self, variable: keras.Variable) -> str:
        """Code for a stored variable."""
        return f"tether.inspection.aliases(model).find({'^' + self.unique_path(variable) + '$'!r})[0]"

    def layer_code(self, layer: keras.Layer) -> str:
        """A line of code that names a layer of the model."""
        chain: list[keras.Layer] = [layer]
        while chain[-1] is not self.model:
            above = [parent for parent in self.parents.get(id(chain[-1]), ()) if parent not in chain]
            if not above:
                return repr(layer.name)
            chain.append(above[0])
        code = "model"
        for parent, child in zip(chain[::-1], chain[-2::-1], strict=False):
            if isinstance(parent, (keras_seam.Functional, keras_seam.Sequential)):
                code += f".get_layer({child.name!r})"
            else:
                name, *steps = self._holdings.of(parent).child(child)
                code += f".{name}" + "".join(f"[{step}]" if step.isdigit() else f"[{step!r}]" for step in steps)
        return code


__all__ = ["OPTIMIZER", "Batch", "Captured", "Context"]

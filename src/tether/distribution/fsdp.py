"""`fully_shard`: which weights of a model FSDP2 gathers together, and the model brought to it."""

from __future__ import annotations

import functools
import importlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import keras

from tether import keras_seam, patterns
from tether.errors import TetherError, UnknownName, Unsupported, received
from tether.layers.depth.repeat import Repeat
from tether.layers.tying import paths
from tether.layers.tying.penalty import ALIVE
from tether.layers.tying.state import slots_of, stored_variables
from tether.weights.weight import Weight

if TYPE_CHECKING:
    from tether.distribution.carriers import Sharding

Model = TypeVar("Model", bound=keras.Layer)

_SHARDING = "_tether_sharding"
_NOT_BELOW = (keras.layers.RNN, keras.layers.Wrapper, Repeat)
"""Layers that call what is in them many times, or with values of their own: no group begins below them."""


def fully_shard(
    model: Model,
    mesh: Any = None,
    groups: Any = "blocks",
    *,
    reshard_after_forward: bool | int | None = None,
    mp_policy: Any = None,
    offload_policy: Any = None,
) -> Model:
    """Shards a model with PyTorch's FSDP2: each process stores a part of every weight, and of all that belongs to it.

    Each process makes the same model and calls this before the first step. The weights of a group are gathered when
    the group's layer is called, freed after it, and gathered again for its gradients, which are averaged over the
    processes. A weight belongs to the smallest group that holds all layers that use it, so a tied weight is gathered
    and reduced once. Train on with the model itself: a loop over `model.parameters()` with an optimizer of PyTorch's
    that is made after this call, or `compile` and `fit`.

    Tie layers, add adapters, quantise and load values before; a sharded model refuses to be changed.

    Args:
        model: A built model or layer. It stays the same object, of the same class.
        mesh: A `DeviceMesh` of PyTorch's: of one dimension, or of two for shards that are replicated. Left out, it
            is all processes.
        groups: `"blocks"`: layers of one class with weights of the same shapes are groups of their own, as the blocks
            of a transformer are; the rest is the model's group. `"model"`: all weights are one group. Or the layers
            that are groups, or patterns of their paths.
        reshard_after_forward: As for PyTorch's `fully_shard`, for all groups but the model's own, which stays gathered
            until the backward pass.
        mp_policy: PyTorch's `MixedPrecisionPolicy`. A dtype policy of Keras's needs none.
        offload_policy: PyTorch's `CPUOffloadPolicy`, for example.

    Returns:
        The model that was given.

    Raises:
        Unsupported: The backend is not PyTorch, PyTorch has no FSDP2, or the model is sharded already.
        UnknownName: A pattern fits no layer.
        TetherError: No process group was started, the model is not built, or the groups cannot be groups.

    Example:
    ```python
    if keras.backend.backend() == "torch":
        import torch.distributed as dist

        # one process here; `torchrun` starts several, and then it is dist.init_process_group("gloo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        sharded = tether.distribution.fully_shard(keras.models.clone_model(model))
        sharded.compile("adam", loss)
        sharded.fit(x, y, verbose=0)
        dist.destroy_process_group()
    ```

    Reference:
        Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", 2023.
    """
    _refuse_backend()
    _refuse_model(model)
    chosen = _group_layers(model, groups)
    torch, carriers = importlib.import_module("torch"), _carriers()
    if not torch.distributed.is_initialized():
        raise TetherError(
            "`fully_shard` divides a model among processes, and no process group was started. Run the program by "
            "`torchrun --nproc-per-node=2 program.py`, and call `torch.distributed.init_process_group()` in it first."
        )
    if mesh is None:
        kind = torch.device(keras_seam.parameter_of(model.variables[0]).device).type
        mesh = torch.distributed.init_device_mesh(kind, (torch.distributed.get_world_size(),))
    if not isinstance(mesh, torch.distributed.DeviceMesh):
        raise TetherError(f"`mesh` is a `torch.distributed.DeviceMesh`, or None. {received(mesh=mesh)}")

    options = {"mp_policy": mp_policy, "offload_policy": offload_policy}
    options = {name: value for name, value in options.items() if value is not None}
    places = _places(model, chosen)
    listings = keras_seam.listings([variable for _, variables in places for variable in variables], model)
    scalars = _trained_scalars(model)
    listings.update(keras_seam.listings(scalars, model))
    made = {id(layer): carriers.Carrier(variables) for layer, variables in places}
    root = made[id(model)]
    root.groups = torch.nn.ModuleList(carrier for carrier in made.values() if carrier is not root)
    for carrier in root.groups:
        carriers.shard_module(carrier, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    carriers.shard_module(root, mesh=mesh, **options)
    wholes = [carriers.Whole(variable, mesh, listings[id(variable)]) for variable in scalars]
    sharding = carriers.Sharding(root, wholes, keeps=bool(_penalized(model)))
    with torch.no_grad():
        root.run(lambda: None)  # which is the root, FSDP2 sees by the first call
    sharding.reshard()

    for carrier in made.values():
        carrier.tell(listings)
    for one in wholes:
        one.tell()
    keras_seam.set_untracked(model, _SHARDING, sharding)
    for layer, _ in places:
        around = sharding.run if layer is model else made[id(layer)].run
        keras_seam.set_untracked(layer, "forward", functools.partial(_forward, around, weakref.ref(layer)))
    keras_seam.set_untracked(model, "zero_grad", sharding.zero_grad)
    model.register_state_dict_pre_hook(lambda *_: sharding.reshard())
    model.register_load_state_dict_pre_hook(lambda *_: sharding.reshard())
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and getattr(optimizer, "built", False):
        keras_seam.adopt_slots(optimizer)
    return model


def _forward(around: Any, layer: weakref.ref[keras.Layer], *args: Any, **kwargs: Any) -> Any:
    """A layer's `forward`, within its group; where no values are computed, without."""
    present: Any = layer()
    own = functools.partial(type(present).forward, present)
    return around(own, *args, **kwargs) if keras_seam.computes((args, kwargs)) else own(*args, **kwargs)


def fsdp_module(model: keras.Layer) -> Any:
    """What FSDP2 made of a model: PyTorch's `FSDPModule`, whose methods steer it.

    Args:
        model: A model that was given to `fully_shard`.

    Returns:
        The module of the model's own group; those of the others are below it.

    Raises:
        TetherError: The model is not sharded.

    Example:
    ```python
    if keras.backend.backend() == "torch":
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        sharded = tether.distribution.fully_shard(keras.models.clone_model(model))
        tether.distribution.fsdp_module(sharded).set_requires_gradient_sync(False)  # gradients add up unreduced
        dist.destroy_process_group()
    ```
    """
    return _sharding_of(model).root


def _sharding_of(model: keras.Layer) -> Sharding:
    found = getattr(model, "__dict__", {}).get(_SHARDING)
    if found is None:
        raise TetherError(
            "Expected a model that was sharded: `tether.distribution.fully_shard(model)`. "
            + received(model=getattr(model, "name", model))
        )
    return cast("Sharding", found)


# --------------------------------------------------------------------------- what is refused


def _refuse_backend() -> None:
    backend = keras.backend.backend()
    if backend != "torch":
        instead = {
            "jax": "give the model a layout: `tether.distribution.layout_map`",
            "tensorflow": "make and train the model in the scope of a `tf.distribute.MirroredStrategy`",
        }.get(backend, "use the PyTorch backend")
        raise Unsupported(f"`fully_shard` is of the PyTorch backend; on {backend}, {instead}.")


def _carriers() -> Any:
    try:
        return importlib.import_module("tether.distribution.carriers")
    except ImportError as error:
        version = importlib.import_module("torch").__version__
        raise Unsupported(
            f"`fully_shard` needs FSDP2, which PyTorch has since 2.6. {received(torch=version)}"
        ) from error


def _refuse_model(model: object) -> None:
    if not isinstance(model, keras.layers.Layer) or isinstance(model, Weight):
        raise TetherError(f"What can be sharded is a Keras model or layer. {received(model=model)}")
    if not model.built or not model.variables:
        raise TetherError(
            f"{model.name!r} is not built, so it has no weights yet to be sharded. Call it once on data, or write "
            f"`{model.name}.build(input_shape)`."
        )
    sharded = next((v for v in model.variables if keras_seam.is_shard(keras_seam.parameter_of(v))), None)
    if sharded is None:
        sharded = next((variable for _, variable in keras_seam.stray_parameters(model)), None)
    if sharded is not None:
        raise Unsupported(
            f"{sharded.path!r} of {model.name!r} is sharded already, or its parameter was replaced. Call "
            "`tether.distribution.fully_shard` once, on the outermost model, and PyTorch's `fully_shard` not at all."
        )


# --------------------------------------------------------------------------- which weights are one group


def _group_layers(model: keras.Layer, groups: object) -> list[keras.Layer]:
    """The layers below a model that are groups of their own."""
    if isinstance(groups, str) and groups == "model":
        return []
    if isinstance(groups, str) and groups == "blocks":
        return list(_repeated(model))
    given = [groups] if isinstance(groups, str) else groups
    if not isinstance(given, (list, tuple)):
        raise TetherError(
            "`groups` is 'blocks', 'model', or a list of layers or of patterns of their paths, as in "
            f"`groups=['block_*']`. {received(groups=groups)}"
        )
    below = [(path, names, mixed, layer) for path, names, mixed, layer in paths.walk_layers(model) if path]
    closed = {id(inner) for *_, layer in below if isinstance(layer, _NOT_BELOW) for inner in _inside(layer)}
    found: dict[int, keras.Layer] = {}
    for each in given:
        fitting = [layer for *spelled, layer in below if _is_meant(each, layer, spelled)]
        if not fitting:
            names = ["/".join(mixed) for _, _, mixed, _ in below]
            said = patterns.missed(each, names, "layer") if isinstance(each, str) else received(groups=each)
            raise UnknownName(f"No layer of {model.name!r} is meant by {each!r} of `groups`. {said}")
        inside = next((layer for layer in fitting if id(layer) in closed), None)
        if inside is not None:
            raise TetherError(
                f"{inside.name!r} cannot be a group of its own: the layer around it calls it many times, or with "
                "values of its own. Name the layer around it in `groups`."
            )
        found.update((id(layer), layer) for layer in fitting if layer.variables)
    return list(found.values())


def _is_meant(asked: Any, layer: keras.Layer, spelled: Sequence[paths.Path]) -> bool:
    if isinstance(asked, keras.layers.Layer):
        return layer is asked
    return patterns.fits(asked, *("/".join(each) for each in spelled))


def _inside(layer: keras.Layer) -> Iterable[keras.Layer]:
    return (inner for inner in keras_seam.contained_layers(layer) if inner is not layer)


def _repeated(layer: keras.Layer) -> Iterator[keras.Layer]:
    """The outermost layers below one that look like others beside them: the same class, weights of the same shapes."""
    below = [inner for inner in keras_seam.sublayers(layer) if not isinstance(inner, Weight) and inner.variables]
    below = list({id(inner): inner for inner in below}.values())
    looks = Counter(map(_look, below))
    for inner in below:
        if looks[_look(inner)] > 1:
            yield inner
        elif not isinstance(inner, _NOT_BELOW):
            yield from _repeated(inner)


def _look(layer: keras.Layer) -> tuple[object, ...]:
    own = [variable for inner in keras_seam.contained_layers(layer) for variable in paths.own_variables(inner)]
    return (type(layer).__qualname__, *sorted(tuple(variable.shape) for variable in own))


Groups = list[tuple[keras.Layer, list[keras.Variable]]]


def _places(model: keras.Layer, chosen: list[keras.Layer]) -> Groups:
    """Each group's layer with its variables, the model's own last."""
    groups = {id(layer): layer for layer in chosen}
    used: dict[int, list[tuple[int, ...]]] = {}
    variables: dict[int, keras.Variable] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    waiting: list[tuple[keras.Layer, tuple[int, ...]]] = [(model, (id(model),))]
    while waiting:
        layer, chain = waiting.pop()
        if (id(layer), chain) in seen:
            continue
        seen.add((id(layer), chain))
        for variable in _shardable(layer):
            variables[id(variable)] = variable
            used.setdefault(id(variable), []).append(chain)
        for inner in keras_seam.sublayers(layer):
            waiting.append((inner, (*chain, id(inner)) if id(inner) in groups and id(inner) not in chain else chain))
    penalized = _penalized(model)
    found: dict[int, list[keras.Variable]] = {id(layer): [] for layer in [*chosen, model]}
    for variable in model.variables:
        if id(variable) in variables:
            chains = used[id(variable)]
            common = [group for group in chains[0] if all(group in chain for chain in chains)]
            found[id(model) if id(variable) in penalized else common[-1]].append(variable)
    return [(layer, found[id(layer)]) for layer in [*chosen, model] if found[id(layer)] or layer is model]


def _shardable(layer: keras.Layer) -> list[keras.Variable]:
    """The variables that a layer holds itself and that are weights: what its calls assign to is state, and whole."""
    lists = keras_seam.variable_lists(layer)
    if isinstance(layer, Weight):
        own = [] if layer.role in ("state", "strength") else [v for found in lists.values() for v in found]
    else:
        own = lists["trainable_variables"]
    return [variable for variable in own if len(variable.shape)]


def _trained_scalars(model: keras.Layer) -> list[keras.Variable]:
    """The variables of one number that train, or would if they were not frozen."""
    found = []
    for layer in keras_seam.contained_layers(model):
        for variable in keras_seam.variable_lists(layer)["trainable_variables"]:
            state = isinstance(layer, Weight) and layer.role in ("state", "strength")
            if not len(variable.shape) and not state:
                found.append(variable)
    return list({id(variable): variable for variable in found}.values())


def _penalized(model: keras.Layer) -> set[int]:
    """The ids of the variables in penalties, which are read after the model's call: regularizers and soft ties."""
    found = {id(variable) for variable in model.variables if variable.regularizer is not None}
    layers = keras_seam.contained_layers(model)
    for layer in layers:
        for slot in slots_of(layer):
            if slot.view.regularizer is not None:
                found.update(map(id, stored_variables(slot.view)))
    recorders = set(map(id, layers))
    for penalty in list(ALIVE):
        if id(penalty.recorder()) in recorders:
            found.update(id(weight.variable) for weight in penalty.weights if weight.is_built)
    return found

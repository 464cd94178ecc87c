"""The PyTorch modules that FSDP2 sees: one for each group of weights, in the place of the layers.

FSDP2 works on modules: it gathers a module's parameters before its `forward`, frees them after, and reduces their
gradients in the backward pass. A Keras layer would be such a module, but its class, which FSDP2 changes, says what a
file of it is, and it lists the parameters of all layers below it, also those of other groups. So each group has a
*carrier*: a module that lists the group's parameters and nothing else, and whose `forward` runs what it is given. The
layer's own `forward` goes through it. When FSDP2 registers another parameter with a carrier, the carrier points the
Keras variable at it, and the lists of all modules that have it.

PyTorch is imported at the top of this module, so only `fully_shard` imports it, and only on that backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as shard_module
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, distribute_tensor

from tether import keras_seam
from tether.types import Config, Function, Tensor


class Carrier(torch.nn.Module):
    """Lists the parameters of one group, and runs a layer's `forward` for FSDP2.

    Args:
        variables: The variables of the group.
    """

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        super().__init__()
        self.__dict__["told"] = {}  # whom to tell of a parameter, by its name here
        self.__dict__["shards"] = []
        self.__dict__["names"] = {f"{place}_{variable.path}": variable for place, variable in enumerate(variables)}
        for name, variable in self.names.items():
            parameter = keras_seam.parameter_of(variable)
            if not parameter.is_contiguous():
                parameter = torch.nn.Parameter(parameter.detach().contiguous(), parameter.requires_grad)
            self.register_parameter(name, parameter)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in self.told:
            variable, places = self.told[name]
            keras_seam.point(variable, value, places)

    def tell(self, listings: dict[int, list[keras_seam.Listing]]) -> None:
        """From now on the variables and the modules that list a parameter follow; they are told of the present one."""
        for name, variable in self.names.items():
            parameter = getattr(self, name)
            home = keras_seam.Home(parameter.device_mesh, tuple(parameter.placements), self.reshard)
            keras_seam.make_sharded(variable, home)
            keras_seam.point(variable, parameter, listings[id(variable)])
            self.told[name] = variable, listings[id(variable)]
            self.shards.append(parameter)

    def forward(self, run: Function, masks: list[Tensor], args: tuple[object, ...], kwargs: Config) -> Tensor:
        """Calls a function. FSDP2 has made other tensors of the arguments, which carry no masks of Keras's."""
        for tensor, mask in zip(_tensors((args, kwargs)), masks, strict=True):
            if mask is not None and keras_seam.mask_of(tensor) is None:
                keras_seam.set_mask(tensor, mask)
        return run(*args, **kwargs)

    def run(self, function: Function, *args: Any, **kwargs: Any) -> Tensor:
        """Calls a function with the parameters of the group gathered."""
        masks = [keras_seam.mask_of(tensor) for tensor in _tensors((args, kwargs))]
        return self(function, masks, args, kwargs)


def _tensors(values: object) -> list[Tensor]:
    return [value for value in keras.tree.flatten(values) if isinstance(value, torch.Tensor)]


class Whole:
    """A trained parameter that cannot be sharded, since it is one number: each process holds it.

    In a call the variable's parameter is a plain tensor, whose gradient is averaged over the processes at the end of
    the backward pass; in between it is a replicated `DTensor` over the same memory, as optimizers expect that have
    shards beside it.
    """

    def __init__(self, variable: keras.Variable, mesh: DeviceMesh, places: list[keras_seam.Listing]) -> None:
        self.variable, self.places = variable, places
        before = keras_seam.parameter_of(variable)
        same = [Replicate()] * mesh.ndim
        self.between = torch.nn.Parameter(distribute_tensor(before.detach(), mesh, same), before.requires_grad)
        self.within = torch.nn.Parameter(self.between.detach().to_local(), before.requires_grad)

    def tell(self) -> None:
        """Makes the parameter the variable's."""
        home = keras_seam.Home(self.between.device_mesh, tuple(self.between.placements), self.leave)
        keras_seam.make_sharded(self.variable, home)
        self.leave()

    def enter(self) -> None:
        """Before a call: the plain tensor."""
        self.within.requires_grad_(self.between.requires_grad)
        keras_seam.point(self.variable, self.within, self.places)

    def leave(self) -> None:
        """After a backward pass: the replicated one."""
        keras_seam.point(self.variable, self.between, self.places)


class Sharding:
    """What a model was sharded into, and what happens around its calls.

    Args:
        root: The carrier of the model itself, with those of its groups below it.
        wholes: The trained parameters that each process holds.
        keeps: Whether the weights of the model's own group are read after its call, for a penalty on them.
    """

    def __init__(self, root: Carrier, wholes: list[Whole], keeps: bool) -> None:
        self.root, self.wholes, self.keeps = root, wholes, keeps
        self.carriers = [module for module in root.modules() if isinstance(module, Carrier)]
        self._queued = False

    def run(self, function: Function, *args: Any, **kwargs: Any) -> Tensor:
        """One call of the model."""
        keras_seam.finish_slots()
        for one in self.wholes:
            one.enter()
        outputs = self.root.run(function, *args, **kwargs)
        if not torch.is_grad_enabled():
            if not self.keeps:
                self.reshard()
        elif self.wholes:
            for tensor in _tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self._queue)
        return outputs

    def reshard(self) -> None:
        """Frees what is gathered; each variable's parameter is its shard."""
        for carrier in self.carriers:
            carrier.reshard()
        for one in self.wholes:
            one.leave()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of the model's parameters, where `parameters()` has the gathered ones too.

        Keras's `fit` resets them between the forward and the backward pass; the shards' are meant.
        """
        shards = [parameter for carrier in self.carriers for parameter in carrier.shards]
        for parameter in [*shards, *(one.between for one in self.wholes)]:
            if parameter.grad is not None and set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    def _queue(self, gradient: Tensor) -> None:
        if not self._queued:
            self._queued = True
            keras_seam.after_backward(self._reduce)

    def _reduce(self) -> None:
        """Averages the gradients of the parameters that each process holds, in one exchange."""
        self._queued = False
        trained = [one for one in self.wholes if one.between.requires_grad]
        if trained:
            mesh, sizes = trained[0].between.device_mesh, [one.within.numel() for one in trained]
            have = [float(one.within.grad is not None) for one in trained]
            zeros = [torch.zeros_like(one.within) if one.within.grad is None else one.within.grad for one in trained]
            flat = torch.cat([*(each.reshape(-1) for each in zeros), torch.tensor(have, device=zeros[0].device)])
            mean = DTensor.from_local(flat, mesh, [Partial("avg")] * mesh.ndim).full_tensor()
            parts = mean.split([*sizes, len(have)])
            for one, gradient, exists in zip(trained, parts, parts[-1].tolist(), strict=False):
                one.within.grad = None
                if exists:
                    _add_gradient(one.between, gradient.reshape(one.within.shape).to(one.within.dtype))
        for one in self.wholes:
            one.leave()


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    local = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements)
    parameter.grad = local if parameter.grad is None else parameter.grad + local


__all__ = ["Carrier", "FSDPModule", "Sharding", "Whole", "shard_module"]

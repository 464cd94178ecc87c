"""Programs of `torch.export` (`.pt2`)."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tether.files.exporting.model import Asked, Runner, distinct
from tether.types import Array, Tensor

BACKENDS = ("torch",)
SUFFIX = ".pt2"
LIMIT = None
FOLDS = False
TRACED_BATCH = 2
"""PyTorch takes a size of one for a constant."""


def exported_program(asked: Asked) -> Any:
    """The exported program of the model.

    Keras's own module hands its variables to PyTorch under one name and reads them under another, and its export
    stores both. Here each is a parameter or a buffer, once, under its own name, and the model's call reads these.
    """
    import torch

    names = distinct([variable.path for variable in asked.variables])

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, variable in zip(names, asked.variables, strict=True):
                value = variable.value.detach()
                if variable.trainable and value.is_floating_point():
                    self.register_parameter(name, torch.nn.Parameter(value))
                else:
                    self.register_buffer(name, value)

        def forward(self, *tensors: Tensor) -> Tensor:
            values = [getattr(self, name) for name in names]
            outputs = asked.call(tensors, list(zip(asked.variables, values, strict=True)))
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

    batch = torch.export.Dim("batch")
    sizes = tuple(
        {at: batch if at == 0 else torch.export.Dim.AUTO for at, n in enumerate(shape) if n is None}
        for _, shape, _ in asked.specs
    )
    examples = tuple(torch.as_tensor(array).to(_device(asked)) for array in asked.made_up(TRACED_BATCH))
    options = {name: value for name, value in asked.options.items() if name != "opset_version"}
    return torch.export.export(Module().eval(), examples, **{"dynamic_shapes": (sizes,), "strict": False, **options})


def _device(asked: Asked) -> object:
    return asked.variables[0].value.device if asked.variables else "cpu"


def write(asked: Asked, path: pathlib.Path, held: list[keras.Variable]) -> None:
    """Writes the program. It reads its weights as inputs, so there is nothing to hold out."""
    import torch

    with open(path, "wb") as file:
        torch.export.save(exported_program(asked), file)


def stored(path: pathlib.Path) -> int:
    """The bytes of the weights in a file."""
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist() if "/data/weights/" in entry.filename)


def runner(path: pathlib.Path) -> Runner:
    """A function of arrays that runs the program."""
    import torch

    with open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(asked: Asked, arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            found = module(*(torch.as_tensor(array).to(_device(asked)) for array in arrays))
        outputs = found if isinstance(found, tuple) else (found,)
        return [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]

    return run

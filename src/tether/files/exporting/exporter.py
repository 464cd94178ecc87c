"""Exporting: convert beside the target, see that each weight is stored once and that the outputs are the model's."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import keras
import numpy as np

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import TetherError, Unsupported, received
from tether.files.exporting import litert, onnx_files, saved_model, torch_program
from tether.files.exporting.model import BATCHES, Asked, all_large, ask, held_out
from tether.layers.depth.turns import written_out
from tether.planning import force
from tether.types import Array

Format = Literal["tf_saved_model", "onnx", "litert", "torch"]

FORMATS: dict[str, ModuleType] = {
    "tf_saved_model": saved_model,
    "onnx": onnx_files,
    "litert": litert,
    "torch": torch_program,
}
ONCE = 1.05
"""How much more than its unique weights an artefact may store."""

BESIDE = 16384
"""What an artefact may store beside them: shapes, axes, the numbers of a formula."""

REASONS = {
    ("tf_saved_model", "torch"): "Keras does it with torch_xla, which is made for other releases of PyTorch",
    ("litert", "torch"): "the converter, litert-torch, fixes sizes that are open and stores a transpose as a copy",
    ("torch", "tensorflow"): "torch.export reads PyTorch's operations",
    ("torch", "jax"): "torch.export reads PyTorch's operations",
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the path, and how far its outputs are from the model's.

    Example:
    ```python
    digits = keras.Sequential([keras.Input((16,)), parent])
    format, path = ("torch", "model.pt2") if keras.backend.backend() == "torch" else ("tf_saved_model", "model")
    exported = tether.files.export(digits, path, format=format)
    print(exported.bytes, exported.unique_bytes, exported.difference)
    ```
    """

    path: pathlib.Path
    format: str
    bytes: int
    """The size of the file, or of the files in the folder."""
    unique_bytes: int
    """What the model stores, each weight once."""
    difference: float | None
    """The largest difference between an output of the artefact and the model's; None if it was not run."""

    def __str__(self) -> str:
        ran = "" if self.difference is None else f", outputs within {self.difference:.1e} of the model's"
        return f"{self.path}: {self.bytes:,} bytes for {self.unique_bytes:,} bytes of weights{ran}"


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    format: Format = "tf_saved_model",
    *,
    input_signature: object = None,
    inputs: object = None,
    verify: bool = True,
    tolerance: float = 1e-4,
    **options: object,
) -> Exported:
    """Writes a model in a format that runs without Keras and without Tether, each weight stored once.

    Converters compute what they can in advance: the transpose of a kernel that two layers share becomes a second
    copy of it. Here a shared weight stays one constant, of which the file computes each use.

    What is written is run on inputs and compared with the model before it takes its place. Until then the path
    holds what it held.

    Args:
        model: A Keras model, tied or not.
        path: Where to: a folder for `"tf_saved_model"`; else a file that ends in `.onnx`, `.tflite` or `.pt2`.
        format: `"tf_saved_model"`, `"onnx"`, `"litert"` or `"torch"` (a program of `torch.export`).
        input_signature: What a call takes, as a list of `keras.InputSpec`, if the model does not tell. `None` in a
            shape is a size that stays open.
        inputs: What to compare the outputs for: the argument of a call, or a list of all arguments. If left out,
            noise, and zeros for whole numbers.
        verify: Whether to run what was written. The runtime has to be installed: TensorFlow, ONNX Runtime, PyTorch.
        tolerance: The largest difference from the model's outputs, as a part of the largest of them (at least 1).
        **options: Passed to the converter: `opset_version` for ONNX; attributes of TensorFlow's LiteRT converter;
            arguments of `torch.export.export`; arguments of Keras's exporter for a SavedModel.

    Returns:
        What was written, with sizes and the largest difference.

    Raises:
        Unsupported: The format cannot be written on this backend, a package is missing, the converter cannot take the
            model, or it is split over several processes; the error says what to write instead.
        TetherError: Outputs differ, or a weight would be stored more than once.

    Example:
    ```python
    digits = keras.Sequential([keras.Input((16,)), parent])
    if keras.backend.backend() == "torch":
        print(tether.files.export(digits, "model.pt2", format="torch"))
    else:
        print(tether.files.export(digits, "model"))          # a SavedModel
    ```
    """
    written = _check(path, format)
    keras_seam.refuse_if_split(model, "An export", "export the file")
    asked = ask(model, input_signature, options)
    target = pathlib.Path(path)
    with replaced(target, folder=not written.SUFFIX) as beside:
        arrays = None if inputs is None else _arrays(asked, inputs)
        _write(asked, written, beside, format)
        difference = _compare(asked, written, beside, format, arrays, tolerance) if verify else None
        size = _size(beside)
    return Exported(target, format, size, asked.bytes, difference)


def _check(path: str | os.PathLike[str], format: str) -> ModuleType:
    """The module of a format, if it can be written here."""
    if format not in FORMATS:
        raise TetherError(f"The formats are {', '.join(map(repr, FORMATS))}. {received(format=format)}")
    written, backend, target = FORMATS[format], keras.backend.backend(), pathlib.Path(path)
    if backend not in written.BACKENDS:
        other = written.BACKENDS[0]
        raise Unsupported(
            f"The format {format!r} cannot be written on the {backend} backend: {REASONS[format, backend]}. Save the "
            "model with `tether.files.save_model(model, 'model.keras')` and export the file on another backend: "
            f"`KERAS_BACKEND={other} tether export model.keras -o {target} --format {format}`."
        )
    if written.SUFFIX and target.suffix != written.SUFFIX:
        raise TetherError(f"A file of the format {format!r} ends in {written.SUFFIX!r}. {received(path=str(path))}")
    if not written.SUFFIX and target.suffix in {".keras", ".h5", ".onnx", ".tflite", ".pt2"}:
        raise TetherError(f"The format {format!r} is a folder. {received(path=str(path))}")
    return written


def _write(asked: Asked, written: ModuleType, beside: pathlib.Path, format: str) -> None:
    """Converts; if the converter made copies all the same, once more with every large weight held out."""
    if written.LIMIT is not None and asked.bytes > written.LIMIT:
        raise Unsupported(
            f"A file of the format {format!r} is smaller than 2 GiB, and the model stores {asked.bytes:,} bytes. "
            "Export a SavedModel, or a program of `torch.export`."
        )
    limit = ONCE * asked.bytes + BESIDE
    _convert(asked, written, beside, format, held_out(asked))
    if written.stored(beside) > limit and written.FOLDS:
        _convert(asked, written, beside, format, all_large(asked))
    elif written.stored(beside) > limit:
        raise TetherError(
            f"Keras's exporter stored {written.stored(beside):,} bytes of weights, and the model has {asked.bytes:,}. "
            "A layer may keep tensors outside of its variables: `tether.check(model)`."
        )


def _convert(asked: Asked, written: ModuleType, beside: pathlib.Path, format: str, held: list[keras.Variable]) -> None:
    """Converts as the weights are planned and a `Repeat` is looped, or if the converter cannot take that, otherwise.

    Then each weight is built before it is used, and turns are written out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converters: what holds of what they wrote is seen afterwards
            try:
                written.write(asked, beside, held)
            except TetherError:
                raise
            except Exception:
                with force("materialize"), written_out():
                    written.write(asked, beside, held)
    except TetherError:
        raise
    except Exception as error:
        raise Unsupported(
            f"The converter for {format!r} cannot take the model {asked.model.name!r}: {_first_lines(error)} It may "
            "take it with sizes that are known, as in `input_signature=[keras.InputSpec(shape=(1, 8))]`, or as an "
            "ordinary model, with a copy for each use: `tether.materialize(model)`."
        ) from error


def _compare(
    asked: Asked,
    written: ModuleType,
    beside: pathlib.Path,
    format: str,
    arrays: list[Array] | None,
    tolerance: float,
) -> float:
    """Runs what was written. The largest difference from the model."""
    open_batch = any(shape and shape[0] is None for _, shape, _ in asked.specs)
    tried = [arrays] if arrays is not None else [asked.made_up(n) for n in (BATCHES if open_batch else BATCHES[:1])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = written.runner(beside)
    except ImportError as error:
        raise Unsupported(
            f"What was written cannot be run here, so nobody has seen that it is right: {error}. Install the runtime "
            "(for ONNX: `pip install onnxruntime`), or write it unseen: `verify=False`."
        ) from error
    largest = 0.0
    for given in tried:
        try:
            expected = asked.reference(given)
        except Exception as error:
            raise TetherError(
                f"The model does not run on inputs of shape {', '.join(str(array.shape) for array in given)}, which "
                f"were to be compared: {_first_lines(error)} Give others: `inputs=`."
            ) from error
        try:
            found = run(asked, given)
        except Exception as error:
            raise Unsupported(
                f"The {format!r} file of {asked.model.name!r} does not run on inputs of shape "
                f"{', '.join(str(array.shape) for array in given)}: {_first_lines(error)} It may with sizes that are "
                "known, as in `input_signature=[keras.InputSpec(shape=(1, 8))]`. If the runtime that you use can run "
                "it, write it unseen: `verify=False`."
            ) from error
        for name, one, other in zip(asked.output_names, expected, found, strict=True):
            largest = max(largest, _difference(name, one, other, format, tolerance))
    return largest


def _difference(name: str, expected: Array, found: Array, format: str, tolerance: float) -> float:
    if expected.shape != found.shape:
        raise TetherError(
            f"The output {name!r} of the {format!r} file has the shape {found.shape}, the model's {expected.shape}."
        )
    one, other = np.asarray(expected, "float64"), np.asarray(found, "float64")
    if one.size == 0 or (np.array_equal(np.isnan(one), np.isnan(other)) and np.array_equal(one, other, equal_nan=True)):
        return 0.0
    difference = float(np.max(np.abs(one - other)))
    if not difference <= tolerance * max(1.0, float(np.max(np.abs(one)))):
        raise TetherError(
            f"The output {name!r} of the {format!r} file differs from the model's by {difference:.3g}, and "
            f"`tolerance={tolerance:g}` allows less. In 16 bits runtimes round in other places: `tolerance=1e-2`."
        )
    return difference


def _arrays(asked: Asked, inputs: object) -> list[Array]:
    """Inputs as the caller gave them, flat, with the dtypes of the signature."""
    found = [np.asarray(keras.ops.convert_to_numpy(tensor)) for tensor in keras.tree.flatten(inputs)]
    if len(found) != len(asked.specs):
        raise TetherError(f"The model takes {len(asked.specs)} tensors. {received(inputs=len(found))}")
    return [array.astype(dtype) for array, (_, _, dtype) in zip(found, asked.specs, strict=True)]


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else '.' if not text.endswith('.') else ''}"


def _size(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


# --------------------------------------------------------------------------- folders replaced whole
# Writing a file or a folder beside its target, which it replaces when it is whole.


OF_A_SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra", "keras_metadata.pb"}


@contextlib.contextmanager
def replaced(target: pathlib.Path, *, folder: bool) -> Iterator[pathlib.Path]:
    """Gives a path to write to; if the block ends well, what is there becomes the target.

    A file is renamed over the old one. A folder cannot be: the old one is moved aside first, so a process that dies
    between the two renames leaves both folders beside the target, whole.

    Raises:
        TetherError: The target's folder does not exist, or what is at the target is not of the kind that is written.
    """
    if not target.parent.is_dir():
        raise TetherError(f"The folder of the target does not exist. {received(path=str(target))}")
    if not folder:
        if target.is_dir():
            raise TetherError(f"There is a folder where the file would be. {received(path=str(target))}")
        with written_beside(target) as beside:
            yield beside
        return
    if target.exists() and not is_saved_model(target):
        raise TetherError(
            "What is there is no SavedModel, and is not replaced by one. Name another folder. "
            f"{received(path=str(target))}"
        )
    beside, aside = (target.with_name(f".{uuid.uuid4().hex[:8]}.{target.name}") for _ in range(2))
    try:
        yield beside
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(beside, target)
        except OSError:
            if aside.exists():
                os.replace(aside, target)
            raise
    finally:
        for path in (beside, aside) if target.exists() else (beside,):
            shutil.rmtree(path, ignore_errors=True)


def is_saved_model(path: pathlib.Path) -> bool:
    """Whether a folder holds a SavedModel and nothing else, or nothing at all."""
    if not path.is_dir():
        return False
    found = {entry.name for entry in path.iterdir()}
    return not found or ("saved_model.pb" in found and found <= OF_A_SAVED_MODEL)


__all__ = ["Exported", "export", "is_saved_model", "replaced"]

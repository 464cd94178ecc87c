"""Starts that need data: EVA, where the first factors start at the directions in which the layers' inputs vary.

Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (arXiv:2410.07170). The
second factors stay zero, so the model computes what it did; ranks stay what they are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.adapters.manage import adapted_weights, check, check_known
from tether.errors import TetherError, received
from tether.forms.low_rank import factors_of
from tether.kinds import letters_of
from tether.layers.family.named import Named, named_weights
from tether.patterns import ALL_LINEAR
from tether.types import Array, Function, Tensor
from tether.weights.weight import Weight


@dataclass
class _Seen:
    """A first factor, and the products of the inputs of all layers that have it, summed over all rows."""

    factor: Weight
    second: Weight
    layers: list[tuple[str, keras.Layer]] = field(default_factory=list)
    products: Array | None = None

    def add(self, rows: Tensor) -> None:
        """Takes in inputs, one a row."""
        found = keras_seam.to_numpy(keras.ops.matmul(keras.ops.transpose(rows), rows), in_step=True).astype("float64")
        self.products = found if self.products is None else self.products + found


def start_from(model: keras.Layer, name: str, data: object, /) -> dict[str, float]:
    """Starts the low-rank parts of an adapter at the directions in which their layers' inputs are largest (EVA).

    The model is called with each batch, and of all inputs that a layer gets the leading right singular vectors
    become the columns of its first factor. The second factor is zero, so nothing that the model computes changes.
    For each layer the products of its inputs are kept meanwhile: a square of float64 as wide as these.

    Args:
        model: The model.
        name: An adapter that has not trained yet, with `tether.low_rank` on kernels of Dense or EinsumDense.
        data: What the model is called with: an array, or an iterable of batches. A few hundred rows are enough.

    Returns:
        For each weight that was started, by its path, how much of the sum of squares of its inputs its factor spans.
        Parts of other forms and other layers keep their start, and are not in it.

    Raises:
        UnknownName: The model has no adapter of this name.
        TetherError: It has trained, nothing of it can be started, or the model was called with no data.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(2)})
    spanned = tether.adapters.start_from(model, "french", [x[:16], x[16:]])
    assert 0 < min(spanned.values()) <= 1
    ```
    """
    check(model, "start_from")
    check_known(model, [name])
    seen = _first_factors(model, name)
    if not seen:
        raise TetherError(
            f"The adapter {name!r} has no low-rank part on a kernel of Dense or EinsumDense, and only of these the "
            "inputs say where to start."
        )
    for each in seen:
        if np.any(keras_seam.to_numpy(each.second.value, each.second.name, in_step=True)):
            raise TetherError(
                f"The part of {each.layers[0][0]!r} has trained, or has another start: its second factor is not zero, "
                "so another first one would change what the model computes. Call `start_from` right after `add`."
            )
    with contextlib.ExitStack() as watched:
        for each in seen:
            for _, layer in each.layers:
                watched.enter_context(_watched(layer, each))
        for batch in [data] if keras.ops.is_tensor(data) or isinstance(data, (np.ndarray, Mapping)) else _batches(data):
            model(batch, training=False)
    return {path: share for each in seen for path, share in _started(each).items()}


def _batches(data: object) -> Iterable[Any]:
    if not isinstance(data, Iterable):
        raise TetherError(f"`data` is an array, or an iterable of batches. {received(data=type(data).__name__)}")
    return data


def _first_factors(model: keras.Layer, name: str) -> list[_Seen]:
    """The first factors of an adapter, each once, with the layers that have them."""
    layers = {weight.path: weight for weight in named_weights(model)}
    found: dict[int, _Seen] = {}
    for path, expression in adapted_weights(model).items():
        factors = factors_of(expression.parts[name][1]) if name in expression.parts else None
        if factors is not None and path in layers and _rows_of(layers[path], factors[1]) is not None:
            _, a, b = factors
            found.setdefault(id(a), _Seen(a, b)).layers.append((path, layers[path].layer))
    return list(found.values())


def _rows_of(named: Named, factor: Weight) -> Function | None:
    """How the inputs of a layer become rows that its first factor is multiplied with; `None` where they do not."""
    if not named.fits(ALL_LINEAR):
        return None
    return _rows_of_layer(named.layer, len(factor.shape or ()) - 1)


def _rows_of_layer(layer: Any, count: int) -> Function | None:
    """The same, for a factor whose first `count` axes are inputs."""
    if isinstance(layer, keras.layers.Dense):
        return (lambda x: keras.ops.reshape(x, (-1, x.shape[-1]))) if count == 1 else None
    inputs, kernel, outputs = letters_of(layer.equation)
    summed = [letter for letter in kernel if letter in inputs and letter not in outputs]
    before, dots, after = inputs.partition("...")
    letters = before + after
    if summed != list(kernel[:count]) or any(letter in letters for letter in kernel[count:]):
        return None

    def rows(x: Tensor) -> Tensor:
        places = [letters.index(letter) for letter in summed]
        extra = len(x.shape) - len(letters) if dots else 0
        places = [place + extra if place >= len(before) else place for place in places]
        others = [axis for axis in range(len(x.shape)) if axis not in places]
        x = keras.ops.transpose(x, [*others, *places])
        return keras.ops.reshape(x, (-1, math.prod(x.shape[len(others) :])))

    return rows


@contextlib.contextmanager
def _watched(layer: Any, seen: _Seen) -> Iterator[None]:
    """Takes in what a layer is called with."""
    rows = _rows_of_layer(layer, len(seen.factor.shape or ()) - 1)
    call = layer.call

    @functools.wraps(call)
    def noting(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if rows is not None:
            seen.add(rows(keras.ops.cast(keras.ops.stop_gradient(inputs), "float32")))
        return call(inputs, *args, **kwargs)

    with keras_seam.instead_of_call(layer, noting):
        yield


def _started(seen: _Seen) -> dict[str, float]:
    """Gives a first factor its start; the share of the inputs' squares that it spans, for each path."""
    if seen.products is None:
        raise TetherError(
            f"The layer of {seen.layers[0][0]!r} was not called, so its inputs are not known. `data` holds what the "
            "model is called with."
        )
    total = float(np.trace(seen.products))
    if not math.isfinite(total) or total == 0:
        raise TetherError(f"The inputs of the layer of {seen.layers[0][0]!r} are zero, or not finite.")
    squares, directions = np.linalg.eigh(seen.products)
    start = keras_seam.to_numpy(seen.factor.value, seen.factor.name, in_step=True).astype("float64")
    columns = start.reshape(len(squares), -1)
    kept = min(columns.shape[1], int((squares > squares[-1] * len(squares) * np.finfo("float32").eps).sum()))
    columns[:, :kept] = directions[:, ::-1][:, :kept]  # what has no direction keeps its random start
    seen.factor.assign(columns.reshape(start.shape).astype("float32"))
    share = float(squares[::-1][:kept].clip(0).sum() / total)
    return {path: share for path, _ in seen.layers}


__all__ = ["start_from"]

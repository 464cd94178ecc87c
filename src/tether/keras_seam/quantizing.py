"""Quantising, by Keras and by Tether."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import keras

from tether.keras_seam.frames import _frames, _is_tracing, _namespace, code_of
from tether.keras_seam.layers import flatten_layers, set_untracked
from tether.keras_seam.private import is_missing, private

_resolve_quantization = private(
    "keras.src.quantizers.quantization_config.validate_and_resolve_config", "Quantising a tied layer"
)
_should_quantize_layer = private("keras.src.quantizers.utils.should_quantize_layer", "Quantising a model with ties")

# `Model.quantize` goes through a list of all layers and asks each one that has no sub-layers. A tied layer has some,
# its weights, and would be passed over. When the list is made, before any layer is changed, Keras reads the sub-layers
# of each layer, and so of each weight: that is the moment to do the work for tied layers, or to refuse.


quantizers: dict[str, Callable[..., None]] = {}
"""What quantises ties: `"model"`, of a model, mode, config and filters; `"layer"`, of a layer, Keras's own method, mode
and config; `"weight"`, of a weight, mode and config."""

_MODEL_QUANTIZE = code_of(keras.Model.quantize)
_FLATTEN_LAYERS = None if is_missing(flatten_layers) else code_of(flatten_layers)


class WatchedSublayers:
    """The list of a layer's sub-layers; who reads it to quantise a whole model is noticed first."""

    def __get__(self, layer: keras.Layer, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if not _is_tracing():
            frame = sys._getframe(1)
            caller = frame.f_back if frame.f_code is _FLATTEN_LAYERS else None
            if caller is not None and caller.f_code is _MODEL_QUANTIZE:
                _notice_quantizing(caller)
        try:
            return vars(layer)["_layers"]
        except KeyError:
            raise AttributeError("_layers") from None

    def __set__(self, layer: keras.Layer, value: Any) -> None:
        vars(layer)["_layers"] = value


def _notice_quantizing(frame: FrameType) -> None:
    scope = _namespace(frame, ".tether.quantizing")
    if scope is not None and not scope:
        scope["begun"] = True
        given = frame.f_locals
        quantizers["model"](given["self"], given["mode"], given["config"], given["filters"])


def is_quantizing_a_model() -> bool:
    """Whether `Model.quantize` is what asks a layer to quantise itself."""
    return any(frame.f_code is _MODEL_QUANTIZE for frame in itertools.islice(_frames(), 4))


def quantization_config(mode: Any, config: Any) -> Any:
    """The config that `quantize(mode, config)` means; its `mode` is one that Keras knows."""
    return _resolve_quantization(mode, config)


def passes(layer: keras.Layer, filters: Any) -> bool:
    """Whether the filters of `Model.quantize` let a layer through."""
    return bool(_should_quantize_layer(layer, filters))


def take_over_quantize(layer: keras.Layer) -> None:
    """Has what quantises ties called for `layer.quantize(...)`, with the layer and Keras's own method first.

    Keras gives each layer a `quantize` of its own when it is made, so that one of another class would not be found.
    """
    original = layer.quantize

    @functools.wraps(original)
    def quantize(mode: Any = None, config: Any = None, **kwargs: Any) -> None:
        quantizers["layer"](layer, original, mode, config, **kwargs)

    quantize.original = original  # type: ignore[attr-defined]
    set_untracked(layer, "quantize", quantize)


def give_back_quantize(layer: keras.Layer) -> None:
    """Undoes `take_over_quantize`: the layer has Keras's own method again."""
    original = getattr(layer.quantize, "original", None)
    if original is not None:
        set_untracked(layer, "quantize", original)

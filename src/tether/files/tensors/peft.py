"""LoRA adapters in the folders of the library PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PEFT has `W + s · B A` for a `Linear` that stores `W` outputs first; Tether has `w + s · a b` for a kernel with its
inputs first, so `a` is `Aᵀ` and `b` is `Bᵀ`. The scale `s` is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether.atomic import written_beside
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, Unsupported, received
from tether.files.keras.archive import reading
from tether.files.loading.assignment import Assignment, Offer
from tether.files.loading.entries import Entry, Report, entry_of
from tether.files.loading.matching import check_built, dotted
from tether.files.tensors.dialects import Names, Naming
from tether.files.tensors.safetensors import opened_tensors, write_tensors
from tether.forms.low_rank import low_rank
from tether.layers.family.named import Named, named_weights, tie_what_learns
from tether.layers.tying.state import View
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import weight_of
from tether.types import Array
from tether.weights.algebra import split_sum
from tether.weights.expression import Expression
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import Add, MatMul, Multiply, Subtract
from tether.weights.operators.choice import Adapted
from tether.weights.operators.structure import Reshape
from tether.weights.weight import Weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1 << 24
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "r", "rank_pattern", "alpha_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "layers_to_transform", "layers_pattern", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
"""What a config may say without a change to the values: which modules have a part, the tensors say."""


@dataclass(frozen=True)
class _Place:
    """A weight of the model that may have a part, and what a PEFT folder calls its module."""

    named: Named
    modules: tuple[str, ...]
    inputs: int | None


# --------------------------------------------------------------------------- loading


def load_peft(model: keras.Model, folder: str | os.PathLike[str], *, names: Names = None) -> Report:
    """Adds the LoRA adapter of a PEFT folder to a model, in place.

    Each weight that the adapter names becomes `w.stop_gradient() + s · a @ b`, with the adapter's scale. Where there is
    such a part already, it is replaced. What was frozen in the model stays frozen, and the adapter learns all the
    same. Compile the model again before it trains on. If anything is wrong, the model
    is as it was.

    Args:
        model: A built Keras model with the base's weights.
        folder: The folder, with `adapter_config.json` and `adapter_model.safetensors`.
        names: What the weights are called in the base's file, as for `load_safetensors`: a module is such a name
            without `.weight`. Left out, modules are the layers' own names with dots.

    Returns:
        What was loaded.

    Raises:
        Unsupported: The adapter is not plain LoRA: DoRA, trained biases, modules saved whole and the like.
        UnknownName: The model has no weight for a module.
        ShapeMismatch: The factors have other shapes than the weight.
        InvalidConfig: The folder's files are damaged.

    Example:
    ```python
    child = tether.inherit(model, {"*/query/kernel": tether.low_rank(8, alpha=16)})
    tether.files.save_peft(child, "my-lora")
    print(tether.files.load_peft(model, "my-lora"))
    ```
    """
    check_built("load_peft", model)
    source = pathlib.Path(folder)
    config = _read_config(source)
    by_module = {module: place for place in _places(model, names) for module in place.modules}
    with opened_tensors(source / TENSORS) as (tensors, _):
        factors = _factors(tensors)
        ties, values = {}, []
        with Rollback.below(model):
            for module, (a, b) in factors.items():
                if module not in by_module:
                    raise UnknownName(
                        f"{model.name!r} has no weight for the module {module!r} of the adapter. Say what its weights "
                        f"are called: `names=...`. Known modules: {', '.join(list(by_module)[:8])}."
                    )
                place = by_module[module]
                rank = _checked_rank(module, a, b, config)
                base = _without_part(weight_of(model, place.named.path), place.named.name)
                inputs = _inputs_of(place, a, b)
                form = low_rank(
                    rank, alpha=_of_pattern(config, "alpha", module), rank_stabilized=config["use_rslora"], split=inputs
                )
                ties[place.named.path] = form(base.stop_gradient())
                left, right = ties[place.named.path].weights_used()[-2:]
                values += [(left, a), (right, b)]
            tie_what_learns(model, ties, named_weights(model))
            plan = Assignment([_factor_offer(weight, entry) for weight, entry in values], "error")
            plan.check()
        loaded = plan.carry_out()
    return Report(loaded=loaded)


def _factor_offer(weight: Weight, entry: Entry) -> Offer:
    """PEFT's factor, which is the other way round."""
    shape = tuple(weight.shape or ())
    return Offer(weight, entry.name, shape, entry.dtype, lambda: np.ascontiguousarray(entry.read().T).reshape(shape))


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG:
        raise TetherError(f"A PEFT adapter is a folder with {CONFIG} and {TENSORS}. {received(folder=str(folder))}")
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InvalidConfig(f"{CONFIG} is a dict. {received(config=config)}")
    config = {"use_rslora": False, "lora_alpha": 8, "r": 8, "rank_pattern": {}, "alpha_pattern": {}, **config}
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"The adapter is not LoRA. {received(peft_type=config.get('peft_type'))}")
    for key, value in config.items():
        if key not in _IGNORED and value and not (key in ("bias", "lora_bias") and value == "none"):
            raise Unsupported(f"The adapter asks for {key}={value!r}, which Tether does not read. Plain LoRA it does.")
    patterns = [config["rank_pattern"] or {}, config["alpha_pattern"] or {}]
    numbers = [
        config["r"],
        config["lora_alpha"],
        *(n for each in patterns if isinstance(each, dict) for n in each.values()),
    ]
    if not all(isinstance(each, dict) for each in patterns) or not all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < math.inf for n in numbers
    ):
        raise InvalidConfig(f"The ranks and alphas of an adapter are positive numbers. {received(numbers=numbers)}")
    return config


def _of_pattern(config: Mapping[str, Any], kind: str, module: str) -> float:
    """The rank or alpha of a module: the config's, or that of a pattern that fits the end of its name."""
    default = config["r" if kind == "rank" else "lora_alpha"]
    for pattern, value in (config[f"{kind}_pattern"] or {}).items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise InvalidConfig(f"{pattern!r} is no pattern of a module's name: {error}") from error
        if fits:
            return float(value)
    return float(default)


def _factors(tensors: Mapping[str, Entry]) -> dict[str, tuple[Entry, Entry]]:
    """A and B of each module."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise Unsupported(f"The adapter has the tensor {name!r}, which is no factor of LoRA.")
        found.setdefault(match[1], {})[match[2] or match[3]] = entry
    for module, pair in found.items():
        if len(pair) != 2 or any(len(entry.shape) != 2 for entry in pair.values()):
            raise InvalidConfig(f"The adapter has A and B of two axes for each module. {received(module=module)}")
    if not found:
        raise InvalidConfig("The adapter has no factors.")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _checked_rank(module: str, a: Entry, b: Entry, config: Mapping[str, Any]) -> int:
    rank = _of_pattern(config, "rank", module)
    if not a.shape[0] == b.shape[1] == rank:
        raise InvalidConfig(
            f"The factors of {module!r} have another rank than the config. {received(A=a.shape, B=b.shape, r=rank)}"
        )
    return int(rank)


def _inputs_of(place: _Place, a: Entry, b: Entry) -> int:
    """How many leading axes of the weight are inputs, so that the factors fit."""
    shape = place.named.shape
    fits = [n for n in range(1, len(shape)) if (math.prod(shape[:n]), math.prod(shape[n:])) == (a.shape[1], b.shape[0])]
    if not fits or (place.inputs is not None and place.inputs not in fits):
        raise ShapeMismatch(
            f"{place.named.name} has shape {shape}; the adapter's factors make {(a.shape[1], b.shape[0])}, inputs "
            "first."
        )
    return fits[0] if place.inputs is None else place.inputs


def _without_part(expression: Expression, name: str) -> Expression:
    """What an adapter is added to: the expression, without a low-rank part that it may have."""
    found = split_sum(expression) if isinstance(expression, (Add, Subtract, Adapted)) else None
    if found is None:
        return expression
    if isinstance(expression, Add) and len(found.added) == 1 and _taken_apart(found.added[0]) is not None:
        return found.base
    raise Unsupported(f"{name} = {expression.notation()} has an adapter of another kind. Remove it first.")


def _places(model: keras.Model, names: Names) -> list[_Place]:
    found = named_weights(model)
    naming = Naming(names, frozenset(dotted(named.name) for named in found))
    places = []
    for named in found:
        if len(named.shape) >= 2:
            for tensor in naming.of(dotted(named.name))[:1]:
                modules = tuple(_module(each) for each in tensor.names)
                places.append(_Place(named, modules, tensor.inputs))
    return places


def _module(name: str) -> str:
    return re.sub(r"\.(weight|kernel|embeddings)$", "", name)


# --------------------------------------------------------------------------- saving


def save_peft(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    names: Names = None,
    adapter: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes the low-rank parts of a model as a PEFT folder.

    Args:
        model: A model with `w + tether.low_rank(...)`, or with named adapters of that form.
        folder: Where to. It is made if it is not there.
        names: What the weights are called in the base's file, as for `load_peft`.
        adapter: Which of several named adapters.
        base_model: What the config calls the base: a name on the Hub, or a folder.

    Raises:
        Unsupported: A part is not the plain product of two factors, which is what LoRA has.
        TetherError: The model has no such part.

    Example:
    ```python
    child = tether.inherit(model, {"*/query/kernel": tether.low_rank(8, alpha=16)})
    tether.files.save_peft(child, "my-lora")
    ```
    """
    check_built("save_peft", model)
    target = pathlib.Path(folder)
    parts = _parts(model, names, adapter)
    if not parts:
        raise TetherError(
            f"{model.name!r} has no low-rank part to save. Make one: "
            "`tether.inherit(model, {'*/kernel': tether.low_rank(8, alpha=16)})`."
        )
    ranks = {module: int((a.shape or ())[-1]) for module, (_, a, _, _) in parts.items()}
    alphas = {module: scale * ranks[module] for module, (scale, _, _, _) in parts.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": sorted(parts),
        "rank_pattern": {re.escape(module): n for module, n in ranks.items() if n != rank},
        "alpha_pattern": {re.escape(module): _whole(n) for module, n in alphas.items() if n != alpha},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }
    tensors = []
    for module, (_, a, b, is_table) in parts.items():
        stem = f"{_PREFIX}{module}.lora_"
        first, second = ("embedding_A", "embedding_B") if is_table else ("A.weight", "B.weight")
        tensors += [_factor(stem + first, a, 1), _factor(stem + second, b, 0)]
    target.mkdir(exist_ok=True)
    write_tensors(target / TENSORS, tensors, {"format": "pt"})
    with written_beside(target / CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _factor(name: str, weight: Weight, axis: int) -> Entry:
    """A factor the other way round: `(*rows, r)` is `(r, rows)` there, `(r, *columns)` is `(columns, r)`."""
    held = entry_of(weight.variable, name)
    shape = held.shape
    matrix = (math.prod(shape[:-1]), shape[-1]) if axis else (shape[0], math.prod(shape[1:]))

    def read() -> Array:
        return np.ascontiguousarray(held.read().reshape(matrix).T)

    return Entry(name, matrix[::-1], held.dtype, read)


def _parts(model: keras.Model, names: Names, adapter: str | None) -> dict[str, tuple[float, Weight, Weight, bool]]:
    """The scale, the factors, and whether it is an embedding's, by module."""
    found = {}
    for place in _places(model, names):
        view = place.named.variable
        if not isinstance(view, View) or not isinstance(view.expression, (Add, Subtract, Adapted)):
            continue
        parts, scale = _parts_of(view.expression, adapter)
        if not parts:
            continue  # a sum of weights, and no adapter, or none of this name
        taken = _taken_apart(parts[0]) if len(parts) == 1 else None
        if taken is None:
            raise Unsupported(
                f"{place.named.name} = {view.expression.notation()} is no base with the product of two factors, which "
                "is all that LoRA has. Save it as safetensors: `tether.files.save_safetensors`."
            )
        table = isinstance(place.named.layer, keras.layers.Embedding)
        found[place.modules[0]] = (scale * taken[0], taken[1], taken[2], table)
    return found


def _parts_of(expression: Add | Subtract | Adapted, adapter: str | None) -> tuple[tuple[Expression, ...], float]:
    """What is added to the base, and by which strength."""
    if not isinstance(expression, Adapted):
        found = split_sum(expression)
        return () if found is None else found.added, 1.0
    parts = expression.parts
    if adapter is None and len(parts) > 1:
        raise TetherError(f"The model has several adapters. Say which: `adapter=...`, one of {', '.join(parts)}.")
    if adapter is not None and adapter not in parts:
        return (), 1.0
    strength, part = parts[adapter] if adapter is not None else next(iter(parts.values()))
    return (part,), float(strength.numpy())


def _taken_apart(part: Expression) -> tuple[float, Weight, Weight] | None:
    """The scale and the two factors of a low-rank part; `None` if it is something else."""
    scale = 1.0
    if isinstance(part, Multiply):
        numbers = [each.number for each in part.operands if isinstance(each, Constant) and each.array is None]
        others = [each for each in part.operands if not isinstance(each, Constant)]
        if len(numbers) != 1 or len(others) != 1:
            return None
        scale, part = float(numbers[0] or 0.0), others[0]
    if isinstance(part, Reshape):
        part = part.operands[0]
    if not isinstance(part, MatMul):
        return None
    a, b = (each.operands[0] if isinstance(each, Reshape) else each for each in part.operands)
    if not isinstance(a, Weight) or not isinstance(b, Weight) or (a.shape or ())[-1:] != (b.shape or ())[:1]:
        return None
    return scale, a, b


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


__all__ = ["load_peft", "save_peft"]

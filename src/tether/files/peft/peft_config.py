"""What the config of a PEFT folder says, and what becomes of each of its fields."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tether.errors import InvalidConfig, TetherError, Unsupported, received
from tether.files.keras.archive import reading
from tether.forms.dropout import OutputDropout
from tether.types import Config

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG = 1 << 24

HONOURED, TENSORS_SAY, TRAINING, NO_EFFECT, REFUSED = "honoured", "tensors", "training", "no effect", "refused"
"""What becomes of a field: the values follow it; the tensors of the file say it already; it acts on training alone, and
Tether passes it over with a warning; it says nothing of values; a folder that sets it is refused."""

_GENERAL = {
    "peft_type": HONOURED, "modules_to_save": HONOURED, "r": HONOURED, "rank_pattern": HONOURED,
    "alpha_pattern": HONOURED,
    "target_modules": TENSORS_SAY, "exclude_modules": TENSORS_SAY, "layers_to_transform": TENSORS_SAY,
    "layers_pattern": TENSORS_SAY,
    "auto_mapping": NO_EFFECT, "base_model_name_or_path": NO_EFFECT, "fan_in_fan_out": NO_EFFECT,
    "inference_mode": NO_EFFECT, "peft_version": NO_EFFECT, "revision": NO_EFFECT, "task_type": NO_EFFECT,
    "runtime_config": NO_EFFECT,
}  # fmt: skip
FIELDS: dict[str, dict[str, str]] = {
    "LORA": {
        **_GENERAL,
        "lora_alpha": HONOURED, "use_rslora": HONOURED, "use_dora": HONOURED, "bias": HONOURED, "lora_bias": HONOURED,
        "trainable_token_indices": HONOURED, "init_lora_weights": HONOURED, "ensure_weight_tying": HONOURED,
        "lora_dropout": HONOURED,
        "eva_config": NO_EFFECT, "corda_config": NO_EFFECT, "loftq_config": NO_EFFECT, "lora_ga_config": NO_EFFECT,
        "qalora_group_size": NO_EFFECT, "megatron_core": NO_EFFECT, "megatron_config": REFUSED,
        "alora_invocation_tokens": REFUSED, "arrow_config": REFUSED, "kasa_config": REFUSED,
        "layer_replication": REFUSED, "monteclora_config": REFUSED, "target_parameters": REFUSED,
        "use_bdlora": REFUSED, "use_qalora": REFUSED, "velora_config": REFUSED,
    },
    "IA3": {**_GENERAL, "feedforward_modules": HONOURED, "init_ia3_weights": NO_EFFECT},
    "LOHA": {
        **_GENERAL,
        "alpha": HONOURED, "rank_dropout": HONOURED, "module_dropout": HONOURED, "init_weights": NO_EFFECT,
        "use_effective_conv2d": TENSORS_SAY,
    },
    "LOKR": {
        **_GENERAL,
        "alpha": HONOURED, "rank_dropout": HONOURED, "module_dropout": HONOURED, "rank_dropout_scale": HONOURED,
        "init_weights": NO_EFFECT, "decompose_factor": TENSORS_SAY, "decompose_both": TENSORS_SAY,
        "use_effective_conv2d": TENSORS_SAY,
    },
    "VERA": {
        **_GENERAL,
        "bias": HONOURED, "projection_prng_key": HONOURED, "save_projection": TENSORS_SAY, "vera_dropout": HONOURED,
        "d_initial": NO_EFFECT, "init_weights": NO_EFFECT,
    },
    "OFT": {
        **_GENERAL,
        "bias": HONOURED, "use_cayley_neumann": HONOURED, "num_cayley_neumann_terms": HONOURED,
        "oft_block_size": TENSORS_SAY, "block_share": TENSORS_SAY, "module_dropout": TRAINING,
        "init_weights": NO_EFFECT, "eps": NO_EFFECT, "coft": REFUSED,
    },
    "BOFT": {
        **_GENERAL,
        "bias": HONOURED, "boft_block_size": TENSORS_SAY, "boft_block_num": TENSORS_SAY,
        "boft_n_butterfly_factor": TENSORS_SAY, "boft_dropout": TRAINING, "init_weights": NO_EFFECT,
    },
    "FOURIERFT": {
        **_GENERAL,
        "bias": HONOURED, "scaling": HONOURED, "random_loc_seed": HONOURED, "n_frequency": TENSORS_SAY,
        "n_frequency_pattern": TENSORS_SAY, "init_weights": NO_EFFECT,
    },
}  # fmt: skip
"""What becomes of each field of a config, by `peft_type`."""

_LYCORIS: Config = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True, "use_effective_conv2d": False}
CONSTANTS: dict[str, Config] = {
    "LORA": {
        "use_rslora": False, "init_lora_weights": True, "ensure_weight_tying": False, "fan_in_fan_out": False,
        "lora_dropout": 0.0,
    },
    "IA3": {"fan_in_fan_out": False, "init_ia3_weights": True},
    "LOHA": _LYCORIS,
    "LOKR": {**_LYCORIS, "decompose_both": False, "rank_dropout_scale": False},
    "VERA": {"vera_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True},
    "OFT": {"r": 0, "module_dropout": 0.0, "coft": False, "fan_in_fan_out": False, "init_weights": True},
    "BOFT": {"boft_block_num": 0, "boft_dropout": 0.0, "fan_in_fan_out": False, "init_weights": True},
    "FOURIERFT": {"fan_in_fan_out": False, "init_weights": False},
}  # fmt: skip
"""What the config of a kind always says."""

RANKED = ("LORA", "LOHA", "LOKR", "VERA")
"""Kinds whose parts have a rank."""
_STARTS_KEPT = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts of a LoRA that leave the base as it is."""
_DEFAULTS: dict[str, Config] = {
    "OFT": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    "FOURIERFT": {"scaling": 150.0, "random_loc_seed": 777},
}
_STARTS_TAKEN_OFF = ("pissa", "olora")
"""Starts that take a product off the base, which can be computed again from it."""


@dataclass(frozen=True)
class PeftConfig:
    """The config of a PEFT folder, read and checked."""

    kind: str
    fields: Config

    def __getitem__(self, field: str) -> Any:
        return self.fields.get(field)

    @property
    def start(self) -> str:
        """How the base was changed at the start: `"zeros"` if it was not."""
        start = self.fields.get("init_lora_weights", True)
        return start if start in _STARTS_TAKEN_OFF else "zeros"

    @property
    def dropout(self) -> float:
        """The dropout on the input of the modules' low-rank parts."""
        return float(self.fields.get(f"{self.kind.lower()}_dropout") or 0.0)

    @property
    def output_dropout(self) -> OutputDropout:
        """The dropout on the outputs of a LoHa's or LoKr's parts: a LoHa's others are always larger for it."""
        outputs, whole = (float(self.fields.get(f"{what}_dropout") or 0.0) for what in ("rank", "module"))
        rescaled = self.kind == "LOHA" or bool(self.fields.get("rank_dropout_scale"))
        return OutputDropout(outputs, rescaled and outputs > 0, whole)

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return int(self._of_pattern("rank_pattern", module, self.fields["r"]))

    def alpha(self, module: str) -> float:
        """The alpha of a module, by which its rank is divided for the scale."""
        return float(self._of_pattern("alpha_pattern", module, self.fields[_alpha_field(self.kind)]))

    def _of_pattern(self, field: str, module: str, default: float) -> float:
        """What a pattern that fits the end of a module's name says, else the default."""
        for pattern, value in (self.fields.get(field) or {}).items():
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return float(value)
            except re.error as error:
                raise InvalidConfig(f"{pattern!r} is no pattern of a module's name: {error}") from error
        return default

    def names_module(self, field: str, module: str) -> bool:
        """Whether a list of names in a field means a module: its whole name, or the end of it."""
        return any(module == name or module.endswith(f".{name}") for name in self.fields.get(field) or ())


def _alpha_field(kind: str) -> str:
    return "lora_alpha" if kind == "LORA" else "alpha"


def read_config(folder: pathlib.Path) -> PeftConfig:
    """The config of a folder.

    Raises:
        TetherError: There is none, or its tensors are a pickle.
        Unsupported: It asks for something that would change the values and is not read.
        InvalidConfig: It is damaged.
    """
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG:
        raise TetherError(f"A PEFT adapter is a folder with {CONFIG} and {TENSORS}. {received(folder=str(folder))}")
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        raise Unsupported(
            f"{str(folder)!r} has its tensors in {PICKLE}, a pickle, which may hold code and is not read. Convert it "
            "where PyTorch is and where you trust the file: `safetensors.torch.save_file(torch.load("
            f"'{PICKLE}', weights_only=True), '{TENSORS}')`."
        )
    with reading(path):
        fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise InvalidConfig(f"{CONFIG} is a dict. {received(config=fields)}")
    kind = fields.get("peft_type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise Unsupported(f"The adapter is none of {', '.join(FIELDS)}. {received(peft_type=kind)}")
    defaults = {"r": 8, "lora_alpha": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, **_DEFAULTS.get(kind, {})}
    config = PeftConfig(kind, {**defaults, **fields})
    _refuse_fields(config)
    _check_numbers(config)
    return config


def _refuse_fields(config: PeftConfig) -> None:
    known = FIELDS[config.kind]
    for field, value in config.fields.items():
        fate = known.get(field, REFUSED if field not in ("lora_alpha", "alpha") else NO_EFFECT)
        if fate == REFUSED and value and value != "none":
            raise Unsupported(
                f"The adapter asks for {field}={value!r}, which Tether does not read, and which would change what the "
                "model computes. Nothing was changed."
            )
    start = config.fields.get("init_lora_weights", True)
    if config.kind == "LORA" and start not in (*_STARTS_KEPT, *_STARTS_TAKEN_OFF):
        raise Unsupported(
            f"The adapter was started by init_lora_weights={start!r}, which changes the base in a way that cannot be "
            "computed again from the base alone. Let PEFT convert it to a plain LoRA: `model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)`, with the adapter as it was before training. "
            "Nothing was changed."
        )
    bias = config.fields.get("bias")
    if bias not in (None, "none", "all", f"{config.kind.lower()}_only"):
        raise InvalidConfig(f"`bias` is 'none', 'all' or '{config.kind.lower()}_only'. {received(bias=bias)}")


def _check_numbers(config: PeftConfig) -> None:
    patterns = [config["rank_pattern"] or {}, config["alpha_pattern"] or {}]
    if not all(isinstance(each, dict) for each in patterns):
        raise InvalidConfig(f"The patterns of ranks and alphas are dicts. {received(patterns=patterns)}")
    ranks = [config["r"], *patterns[0].values()] if config.kind in RANKED else []
    alphas = [config[_alpha_field(config.kind)], *patterns[1].values()]
    for numbers, least in ((ranks, 1.0), (alphas, -math.inf)):
        if not all(_is_number(n) and least <= n < math.inf for n in numbers):
            raise InvalidConfig(f"Ranks are positive numbers, and alphas finite ones. {received(numbers=numbers)}")
    frequencies = config["n_frequency_pattern"] or {}
    if not isinstance(frequencies, dict) or not all(map(_is_number, frequencies.values())):
        raise InvalidConfig(f"`n_frequency_pattern` is a dict of numbers. {received(value=frequencies)}")
    whole = ("random_loc_seed", "num_cayley_neumann_terms", "projection_prng_key")
    for field in {"scaling", *whole} & set(config.fields):
        value = config[field]
        right = _is_number(value) and math.isfinite(value) and (field == "scaling" or type(value) is int)
        if not (right or (value is None and field == "projection_prng_key")):
            raise InvalidConfig(f"`{field}` is a number. {received(value=value)}")
    if config.fields.get("num_cayley_neumann_terms", 1) < 1:
        raise InvalidConfig(f"`num_cayley_neumann_terms` is 1 or more. {received(value=config.fields)}")
    for field in ("lora_dropout", "vera_dropout", "rank_dropout", "module_dropout"):
        rate = config[field] or 0.0
        if not _is_number(rate) or not 0 <= rate < 1:
            raise InvalidConfig(f"`{field}` is a number from 0 to less than 1. {received(value=rate)}")
    for field in ("modules_to_save", "feedforward_modules"):
        if not isinstance(config[field] or [], list):
            raise InvalidConfig(f"`{field}` is a list of names. {received(value=config[field])}")
    tokens = config["trainable_token_indices"] or {}
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    if not all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in lists):
        raise InvalidConfig(f"`trainable_token_indices` are lists of numbers. {received(value=tokens)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def commonest(values: Mapping[str, Any], otherwise: Any) -> Any:
    """The value that most modules have, which a config says for all."""
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise


def whole_number(number: float) -> int | float:
    """A number without a point, if it is whole."""
    return int(number) if float(number).is_integer() else number

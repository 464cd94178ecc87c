"""Adapters from the folders of the library PEFT: `adapter_config.json` and `adapter_model.safetensors`.

`peft_config` reads what the config says, `peft_places` finds a module's weights in a model, and `peft_parts` makes of
each module's tensors a form with values. Here they meet, and become expressions of the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np

from tether.errors import InvalidConfig, ShapeMismatch, UnknownName, Unsupported
from tether.files.loading.assignment import Assignment, Offer
from tether.files.loading.entries import Entry, Report
from tether.files.loading.matching import check_built
from tether.files.peft import peft_parts
from tether.files.peft.peft_config import FIELDS, TENSORS, TRAINING, PeftConfig, read_config
from tether.files.peft.peft_parts import Addition, Made, is_part
from tether.files.peft.peft_places import LEAVES, PREFIX, PeftPlace, peft_places_of, refuse_pieces
from tether.files.tensors.dialects import Names
from tether.files.tensors.tensor_file import opened_tensors
from tether.forms.dora import lengths_of
from tether.forms.form import Form, part, start_value
from tether.forms.low_rank import products_of
from tether.forms.oft import turns_in
from tether.forms.rows import rows_of
from tether.forms.scale import scaled_of
from tether.forms.weight_norm import Magnitude
from tether.layers.family.named import named_weights, tie_what_learns
from tether.layers.tying.state import View
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import weights_of
from tether.weights.algebra import as_it_is, split_sum
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.operators.arithmetic import Add, Multiply, StopGradient, Subtract
from tether.weights.operators.choice import Adapted
from tether.weights.operators.structure import Where

_FACTOR = re.compile(
    r"(.+?)\.(?:lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?|lora_B\.(bias)|"
    r"token_adapter\.(trainable_tokens_delta)|(oft_R)\.weight|"
    r"(ia3_l|hada_\w+|lokr_\w+|vera_lambda_[bd]|boft_[Rs]|fourierft_spectrum))"
)


def load_peft(model: keras.Model, folder: str | os.PathLike[str], *, names: Names = None) -> Report:
    """Adds the adapter of a PEFT folder to a model, in place.

    LoRA (also of convolutions and tables, DoRA, PiSSA and OLoRA), IA3, LoHa, LoKr, VeRA, OFT, BOFT and FourierFT are
    read, with biases, modules and tokens that were trained whole. Each weight that the adapter changes becomes an
    expression over its frozen base. Where there is such a part already, it is replaced. What was frozen in the model
    stays frozen, and the adapter learns all the same. Compile the model again before it trains on. If anything is
    wrong, the model is as it was. To have the adapter under a name, among others, use
    `tether.adapters.load(model, folder)`.

    Args:
        model: A built Keras model with the base's weights.
        folder: The folder, with `adapter_config.json` and `adapter_model.safetensors`.
        names: What the weights are called in the base's file, as for `load_safetensors`: a module is such a name
            without `.weight`. Left out, modules are the layers' own names with dots.

    Returns:
        What was loaded.

    Raises:
        Unsupported: The folder asks for what would change the values and is not read; the error names the field.
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
    with opened_peft(model, folder, names) as found, Rollback.below(model):
        bases = {path: _without_part(base, path) for path, base in weights_of(model, found.additions).items()}
        ties = {path: found.applied(path, base.stop_gradient()) for path, base in bases.items()}
        others = other_users(model, bases) if found.config["ensure_weight_tying"] else {}
        ties.update({path: _with(expression, bases, ties) for path, expression in others.items()})
        tie_what_learns(model, ties, named_weights(model))
        return found.assign()


@dataclass
class OpenedFolder:
    """A folder whose tensors can be read, and what it adds to which weights of a model."""

    config: PeftConfig
    additions: dict[str, Addition]
    offers: list[Offer] = field(default_factory=list)
    made: dict[str, Expression] = field(default_factory=dict)
    """What was added to which weight."""

    def parts(self, model: keras.Layer) -> dict[str, Made]:
        """What makes the part of each weight: of those in the folder, and if it asks for it of those tied to them."""
        found: dict[str, Made] = {path: partial(self.part, path) for path in self.additions}
        if self.config["ensure_weight_tying"]:
            bases = weights_of(model, self.additions)
            found.update({path: partial(self._part_of_other, bases) for path in other_users(model, bases)})
        return found

    def _part_of_other(self, bases: Mapping[str, Expression], base: Expression) -> Expression:
        """What is added to a weight that is computed from weights of the folder."""
        return _with(base, bases, {path: of + self.made[path] for path, of in bases.items()}) - base

    def applied(self, path: str, base: Expression) -> Expression:
        """What a weight becomes, of its base."""
        addition = self.additions[path]
        made = part(base, "full", start_value(base)) if addition.whole else addition.form(base)
        self._offer(addition, made, base)
        return made

    def part(self, path: str, base: Expression) -> Expression:
        """What is added to a weight."""
        addition = self.additions[path]
        form = addition.form
        made = form.delta(base) if isinstance(form, Form) else form(base) - base
        self._offer(addition, made, base)
        self.made[path] = made
        return made

    def _offer(self, addition: Addition, made: Expression, base: Expression) -> None:
        known = set(base.weights_used())
        own = [weight for weight in made.weights_used() if weight not in known]
        for weight, value in zip(own, addition.values, strict=True):
            if value is not None and not any(offer.target is weight for offer in self.offers):
                self.offers.append(_offer_of(weight, value))

    def assign(self) -> Report:
        """Gives the weights that were made the values of the file."""
        plan = Assignment(self.offers, "error")
        plan.check()
        return Report(loaded=plan.carry_out())


def _offer_of(weight: Stored, value: peft_parts.MappedValue) -> Offer:
    shape, entry = tuple(weight.shape or ()), value.entry
    numbers = math.prod(entry.shape) if value.numbers is None else value.numbers
    if entry.shape != value.expected or numbers != math.prod(shape):
        raise ShapeMismatch(
            f"{entry.name!r} has shape {entry.shape}, and {value.expected} is expected for {weight.name!r}."
        )
    return Offer(
        weight, entry.name, shape, entry.dtype, lambda: np.ascontiguousarray(value.turned(entry.read())).reshape(shape)
    )


@contextlib.contextmanager
def opened_peft(
    model: keras.Layer, folder: str | os.PathLike[str], names: Names, *, trainable: bool = True
) -> Iterator[OpenedFolder]:
    """A folder of PEFT's, for a model; `trainable` says whether what it adds is to train.

    Raises:
        Unsupported: It asks for what is not read.
        UnknownName: The model has no weight for a module.
        ShapeMismatch: A tensor does not fit its weight.
        InvalidConfig: It is damaged.
    """
    source = pathlib.Path(folder)
    config = read_config(source)
    with opened_tensors(source / TENSORS) as (tensors, _):
        additions = _Reading(model, names, config, tensors).additions()
        _warn_of_logits(model, config, additions)
        if trainable:
            _warn_of_training(config)
        yield OpenedFolder(config, additions)


class _Reading:
    """Which tensors of a folder are for which weights of a model."""

    def __init__(self, model: keras.Layer, names: Names, config: PeftConfig, tensors: Mapping[str, Entry]) -> None:
        self.model, self.config = model, config
        self.places: dict[str, dict[str, PeftPlace]] = {}
        for place in peft_places_of(model, names):
            for module in place.modules:
                self.places.setdefault(module, {}).setdefault(place.leaf, place)
        self.modules: dict[str, dict[str, Entry]] = {}
        self.whole: dict[str, Entry] = {}
        self.shared: dict[str, Entry] = {}
        for name, entry in tensors.items():
            self._sort(name, entry)

    def _sort(self, name: str, entry: Entry) -> None:
        if name in ("base_model.vera_A", "base_model.vera_B"):
            self.shared[name.removeprefix("base_model.")] = entry
            return
        if not name.startswith(PREFIX):
            raise Unsupported(f"The adapter has the tensor {name!r}, and those of PEFT begin with {PREFIX!r}.")
        rest = name.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(rest)
        if match is None:
            self.whole[rest.replace(".base_layer.", ".")] = entry
        else:
            what = next(each for each in match.groups()[1:] if each is not None)
            self.modules.setdefault(match[1], {})[what] = entry

    def additions(self) -> dict[str, Addition]:
        """What is done to each weight, by its path."""
        if not self.modules:
            raise InvalidConfig("The adapter has no factors.")
        found: dict[str, Addition] = {}
        of_vera: dict[str, tuple[PeftPlace, Mapping[str, Entry]]] = {}
        for module, tensors in self.modules.items():
            place = self._place(module, "weight")
            kind = self._kind(module, tensors)
            if kind == "VERA":
                of_vera[module] = (place, tensors)
            elif kind == "IA3":
                bias = self.places[module].get("bias")
                found.update(peft_parts.ia3(place, bias, module, tensors["ia3_l"], self.config))
            elif kind == "LORA":
                if "trainable_tokens_delta" in tensors:
                    self._add(
                        found,
                        place,
                        peft_parts.tokens(place, module, tensors.pop("trainable_tokens_delta"), self.config),
                    )
                bias_entry = tensors.pop("bias", None)
                if bias_entry is not None:
                    at = self._place(module, "bias")
                    self._add(found, at, peft_parts.lora_bias(at, module, bias_entry, self.config))
                if tensors:
                    self._add(found, place, peft_parts.lora(place, module, tensors, self.config))
            else:
                self._add(found, place, peft_parts.BUILDERS[kind](place, module, tensors, self.config))
        if of_vera:
            found.update(peft_parts.vera_family(of_vera, self.shared, self.config))
        for name, entry in self.whole.items():
            module, _, leaf = name.rpartition(".")
            place = self._place(module, leaf)
            self._add(found, place, Addition(peft_parts.FULL, (peft_parts.whole_value(place, entry),), whole=True))
        return found

    def _kind(self, module: str, tensors: Mapping[str, Entry]) -> str:
        starts = {
            "ia3": "IA3", "hada": "LOHA", "lokr": "LOKR", "vera": "VERA", "oft": "OFT", "boft": "BOFT",
            "fourierft": "FOURIERFT",
        }  # fmt: skip
        kinds = {starts.get(name.partition("_")[0], "LORA") for name in tensors}
        if kinds != {self.config.kind}:
            raise InvalidConfig(
                f"The config says that the adapter is {self.config.kind}, and {module!r} has the tensors "
                f"{', '.join(tensors)}."
            )
        return self.config.kind

    def _add(self, found: dict[str, Addition], place: PeftPlace, addition: Addition) -> None:
        if place.named.path in found:
            raise Unsupported(
                f"The adapter changes {place.named.name!r} in two ways at once, which Tether does not read. "
                "Nothing was changed."
            )
        found[place.named.path] = addition

    def _place(self, module: str, leaf: str) -> PeftPlace:
        leaf = LEAVES.get(leaf, leaf)
        place = self.places.get(module, {}).get(leaf)
        if place is None:
            known = ", ".join(list(self.places)[:8])
            raise UnknownName(
                f"{self.model.name!r} has no weight for the module {module!r} of the adapter (its {leaf}). Say what "
                f"its weights are called: `names=...`. Known modules: {known}."
            )
        refuse_pieces(place)
        return place


def _without_part(expression: Expression, name: str) -> Expression:
    """What an adapter is added to: the expression, without a part of an adapter that it may have."""
    if isinstance(expression, StopGradient):
        return _without_part(expression.operands[0], name)
    if lengths_of(expression) is not None and isinstance(expression, Magnitude):
        return _without_part(expression.operands[0], name)
    if rows_of(expression) is not None and isinstance(expression, Where):
        return _without_part(expression.operands[2], name)
    scaled = scaled_of(expression) if isinstance(expression, Multiply) else None
    if scaled is not None:
        return _without_part(scaled[0], name)
    found = split_sum(expression) if isinstance(expression, (Add, Subtract, Adapted)) else None
    if found is None:
        return expression
    if not isinstance(expression, Adapted) and (
        (len(found.added) == 1 and is_part(found.added[0]))
        or all(map(products_of, found.added))
        or all(map(turns_in, found.added))
    ):
        return _without_part(found.base, name)
    raise Unsupported(f"{name} = {expression.notation()} has an adapter of another kind. Remove it first.")


def other_users(model: keras.Layer, bases: Mapping[str, Expression]) -> dict[str, Expression]:
    """The expressions of other weights that are computed from stored weights which a folder changes."""
    changed = {stored for stored in map(as_it_is, bases.values()) if stored is not None}
    return {
        named.path: named.variable.expression
        for named in named_weights(model)
        if isinstance(named.variable, View)
        and named.path not in bases
        and changed & set(named.variable.expression.weights_used())
    }


def _with(expression: Expression, bases: Mapping[str, Expression], new: Mapping[str, Expression]) -> Expression:
    """An expression with other expressions in the places of stored weights."""
    found: dict[str, Any] = {weight.uid: weight for weight in expression.weights_used()}
    for path, base in bases.items():
        stored = as_it_is(base)
        if stored is not None:
            found[stored.uid] = new[path]
    return decode(encode(expression), found)


def _warn_of_logits(model: keras.Layer, config: PeftConfig, additions: Mapping[str, Addition]) -> None:
    """Says where a table that is adapted is also used for the logits by the same layer, which PEFT leaves alone."""
    if config["ensure_weight_tying"]:
        return
    for named in named_weights(model):
        layer = named.layer
        both_ways = isinstance(layer, keras.layers.ReversibleEmbedding) and layer.tie_weights
        if named.path in additions and both_ways:
            warnings.warn(
                f"The adapter changes {named.name!r}, which the layer also computes the logits with. PEFT leaves the "
                "logits as they were unless `ensure_weight_tying` is set; here they follow.",
                stacklevel=5,  # who called the function that opened it
            )


def _warn_of_training(config: PeftConfig) -> None:
    """Says which fields of a config Tether passes over, as they act in training alone."""
    passed_over = {field: config[field] for field, fate in FIELDS[config.kind].items() if fate == TRAINING}
    asked = ", ".join(f"{field}={value!r}" for field, value in passed_over.items() if value)
    if asked:
        warnings.warn(
            f"The adapter asks for {asked}, which acts in training alone and which Tether does not do: it trains "
            "without. What it computes is the same. Load it with `trainable=False` if it is not to train: "
            "`tether.adapters.load(model, folder, trainable=False)`.",
            stacklevel=5,  # who called the function that opened it
        )


__all__ = ["load_peft", "opened_peft"]

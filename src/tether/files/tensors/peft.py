"""Adapters in the folders of the library PEFT: `adapter_config.json` and `adapter_model.safetensors`.

`peft_config` reads what the config says, `peft_parts` makes of each module's tensors a form with values. Here they meet
the model: which weight a module is, what becomes of it, and the way back into a folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import keras
import numpy as np

from tether.atomic import written_beside
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, UnknownName, Unsupported, received
from tether.files.loading.assignment import Assignment, Offer
from tether.files.loading.entries import Entry, Report, entry_of
from tether.files.loading.matching import check_built, dotted
from tether.files.tensors import peft_parts
from tether.files.tensors.dialects import Names, Naming
from tether.files.tensors.peft_config import CONFIG, FIELDS, TENSORS, PeftConfig, read_config
from tether.files.tensors.peft_parts import Addition, Made, Place, as_stored
from tether.files.tensors.safetensors import opened_tensors, write_tensors
from tether.forms.dropout import rate_of, without_dropout
from tether.forms.form import Form, part, start_value
from tether.forms.full import whole_of
from tether.forms.low_rank import factors_of, stored_behind
from tether.forms.rows import rows_of
from tether.forms.weight_norm import Magnitude
from tether.layers.family.named import named_weights, tie_what_learns
from tether.layers.tying.state import View
from tether.layers.tying.swap import Rollback
from tether.layers.tying.tie import weights_of
from tether.types import Array
from tether.weights.algebra import as_it_is, split_sum
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import Add, Multiply, StopGradient, Subtract
from tether.weights.operators.choice import Adapted
from tether.weights.operators.structure import Where
from tether.weights.weight import Weight

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(.+?)\.(?:lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?|lora_B\.(bias)|"
    r"token_adapter\.(trainable_tokens_delta)|(ia3_l|hada_\w+|lokr_\w+|vera_lambda_[bd]))"
)
_LEAVES = {
    "weight": "weight",
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
}
"""Which parameter of a PyTorch module a variable of this name is."""


# --------------------------------------------------------------------------- loading


def load_peft(model: keras.Model, folder: str | os.PathLike[str], *, names: Names = None) -> Report:
    """Adds the adapter of a PEFT folder to a model, in place.

    LoRA (also of convolutions and tables, DoRA, PiSSA and OLoRA), IA3, LoHa, LoKr and VeRA are read, with biases,
    modules and tokens that were trained whole. Each weight that the adapter changes becomes an expression over its
    frozen base. Where there is such a part already, it is replaced. What was frozen in the model stays frozen, and the
    adapter learns all the same. Compile the model again before it trains on. If anything is wrong, the model is as it
    was. To have the adapter under a name, among others, use `tether.adapters.load(model, folder)`.

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
        warn_of_other_users(model, found.config, found.additions)
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


def _offer_of(weight: Stored, value: peft_parts.Value) -> Offer:
    shape, entry = tuple(weight.shape or ()), value.entry
    if entry.shape != value.expected or math.prod(entry.shape) != math.prod(shape):
        raise ShapeMismatch(
            f"{entry.name!r} has shape {entry.shape}, and {value.expected} is expected for {weight.name!r}."
        )
    return Offer(
        weight, entry.name, shape, entry.dtype, lambda: np.ascontiguousarray(value.turned(entry.read())).reshape(shape)
    )


@contextlib.contextmanager
def opened_peft(model: keras.Layer, folder: str | os.PathLike[str], names: Names) -> Iterator[OpenedFolder]:
    """A folder of PEFT's, for a model.

    Raises:
        Unsupported: It asks for what is not read.
        UnknownName: The model has no weight for a module.
        ShapeMismatch: A tensor does not fit its weight.
        InvalidConfig: It is damaged.
    """
    source = pathlib.Path(folder)
    config = read_config(source)
    with opened_tensors(source / TENSORS) as (tensors, _):
        yield OpenedFolder(config, _Reading(model, names, config, tensors).additions())


class _Reading:
    """Which tensors of a folder are for which weights of a model."""

    def __init__(self, model: keras.Layer, names: Names, config: PeftConfig, tensors: Mapping[str, Entry]) -> None:
        self.model, self.config = model, config
        self.places: dict[str, dict[str, Place]] = {}
        for place in _places(model, names):
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
        if not name.startswith(_PREFIX):
            raise Unsupported(f"The adapter has the tensor {name!r}, and those of PEFT begin with {_PREFIX!r}.")
        rest = name.removeprefix(_PREFIX)
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
        of_vera: dict[str, tuple[Place, Mapping[str, Entry]]] = {}
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
                build = peft_parts.loha if kind == "LOHA" else peft_parts.lokr
                self._add(found, place, build(place, module, tensors, self.config))
        if of_vera:
            found.update(peft_parts.vera_family(of_vera, self.shared, self.config))
        for name, entry in self.whole.items():
            module, _, leaf = name.rpartition(".")
            place = self._place(module, leaf)
            self._add(found, place, Addition(peft_parts.FULL, (peft_parts.whole_value(place, entry),), whole=True))
        return found

    def _kind(self, module: str, tensors: Mapping[str, Entry]) -> str:
        starts = {"ia3": "IA3", "hada": "LOHA", "lokr": "LOKR", "vera": "VERA"}
        kinds = {starts.get(name.partition("_")[0], "LORA") for name in tensors}
        if kinds != {self.config.kind}:
            raise InvalidConfig(
                f"The config says that the adapter is {self.config.kind}, and {module!r} has the tensors "
                f"{', '.join(tensors)}."
            )
        return self.config.kind

    def _add(self, found: dict[str, Addition], place: Place, addition: Addition) -> None:
        if place.named.path in found:
            raise Unsupported(
                f"The adapter changes {place.named.name!r} in two ways at once, which Tether does not read. "
                "Nothing was changed."
            )
        found[place.named.path] = addition

    def _place(self, module: str, leaf: str) -> Place:
        leaf = _LEAVES.get(leaf, leaf)
        place = self.places.get(module, {}).get(leaf)
        if place is None:
            known = ", ".join(list(self.places)[:8])
            raise UnknownName(
                f"{self.model.name!r} has no weight for the module {module!r} of the adapter (its {leaf}). Say what "
                f"its weights are called: `names=...`. Known modules: {known}."
            )
        _refuse_pieces(place)
        return place


def _refuse_pieces(place: Place) -> None:
    """Refuses a module whose parameter is another than one weight of the model, inputs and outputs apart."""
    if not place.whole:
        raise Unsupported(
            f"{place.modules[0]!r} has {place.named.name!r} in a layout that adapters cannot be taken over from or to: "
            "several weights in one tensor, or axes in another order."
        )


def _places(model: keras.Layer, names: Names) -> list[Place]:
    found = named_weights(model)
    naming = Naming(names, frozenset(dotted(named.name) for named in found))
    places = []
    for named in found:
        for tensor in naming.of(dotted(named.name))[:1]:
            split = [each.rpartition(".") for each in tensor.names]
            leaf = _LEAVES.get(split[0][2], split[0][2])
            modules = tuple(dict.fromkeys(module for module, _, _ in naming.ordered(split)))
            places.append(Place(named, modules, leaf, tensor.leading_inputs, tensor.is_whole))
    return places


def _without_part(expression: Expression, name: str) -> Expression:
    """What an adapter is added to: the expression, without a part of an adapter that it may have."""
    if isinstance(expression, StopGradient):
        return _without_part(expression.operands[0], name)
    if _lengths_of(expression) is not None and isinstance(expression, Magnitude):
        return _without_part(expression.operands[0], name)
    if rows_of(expression) is not None and isinstance(expression, Where):
        return _without_part(expression.operands[2], name)
    found = split_sum(expression) if isinstance(expression, (Add, Subtract, Adapted)) else None
    if found is None:
        return expression
    if not isinstance(expression, Adapted) and len(found.added) == 1 and _is_lora(found.added[0]):
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


def warn_of_other_users(model: keras.Layer, config: PeftConfig, additions: Mapping[str, Addition]) -> None:
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
                stacklevel=3,
            )


# --------------------------------------------------------------------------- saving


def save_peft(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    names: Names = None,
    adapter: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes the parts of a model that were added to others as a PEFT folder.

    Low-rank parts (also of convolutions and tables), DoRA, weights trained whole (`tether.forms.full`) and rows of
    tables (`tether.forms.rows`) are written as one LoRA adapter, which PEFT reads.

    Args:
        model: A model with `w + tether.low_rank(...)`, or with named adapters of such forms.
        folder: Where to. It is made if it is not there.
        names: What the weights are called in the base's file, as for `load_peft`. With `"bert"`, the modules of a
            backbone alone are written as they are called there, and those of a model with a head below `bert.`, as in
            `BertForMaskedLM`.
        adapter: Which of several named adapters.
        base_model: What the config calls the base: a name on the Hub, or a folder.
        task_type: What the config calls the task, such as `"SEQ_CLS"`.

    Raises:
        Unsupported: A part is of a kind that is not written.
        UnknownName: `names` does not say what a weight with a part is called.
        TetherError: The model has no such part.

    Example:
    ```python
    child = tether.inherit(model, {"*/query/kernel": tether.low_rank(8, alpha=16)})
    tether.files.save_peft(child, "my-lora")
    ```
    """
    check_built("save_peft", model)
    target = pathlib.Path(folder)
    found = _Writing(model, names, adapter)
    if not found.tensors:
        raise TetherError(
            f"{model.name!r} has no low-rank part to save. Make one: "
            "`tether.inherit(model, {'*/kernel': tether.low_rank(8, alpha=16)})`."
        )
    config = {
        **{name: None for name, fate in FIELDS["LORA"].items() if fate != "refused" and not name.endswith("_config")},
        **found.config(),
        "base_model_name_or_path": base_model,
        "task_type": task_type,
    }
    target.mkdir(exist_ok=True)
    write_tensors(target / TENSORS, found.tensors, {"format": "pt"})
    with written_beside(target / CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2), encoding="utf-8")


class _Writing:
    """The tensors of a folder, and what its config has to say of them."""

    def __init__(self, model: keras.Layer, names: Names, adapter: str | None) -> None:
        self.adapter = adapter
        self.tensors: list[Entry] = []
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.dora: set[str] = set()
        self.whole: dict[tuple[str, str], Entry] = {}
        self.shifts: dict[str, Entry] = {}
        self.tokens: dict[str, list[int]] = {}
        for place in _places(model, names):
            if isinstance(place.named.variable, View):
                self._write(place, place.named.variable.expression)
        self._refuse_nameless(model, names)
        for what, some in (("lengths (DoRA)", self.dora), ("biases of factors", set(self.shifts))):
            if some and some != set(self.ranks):
                raise Unsupported(
                    f"PEFT has {what} for all modules of an adapter or for none, and here only "
                    f"{', '.join(sorted(some))} of {', '.join(sorted(self.ranks))} have some."
                )
        self.saved = {module for module, leaf in self.whole if leaf != "bias"}
        for (module, _), entry in self.whole.items():
            inner = ".base_layer" if module in self.ranks and module not in self.saved else ""
            stem, _, leaf = entry.name.rpartition(".")
            self.tensors.append(replace(entry, name=f"{stem}{inner}.{leaf}"))
        self.tensors += self.shifts.values()

    def _refuse_nameless(self, model: keras.Layer, names: Names) -> None:
        """Refuses to leave out a weight that the adapter changes, because no name is known for it."""
        placed = {place.named.path for place in _places(model, names)}
        for named in named_weights(model):
            if named.path not in placed and isinstance(named.variable, View) and self._added(named.variable.expression):
                raise UnknownName(
                    f"The adapter changes {named.name!r}, and `names` does not say what that is called in the base's "
                    f"file. Give a `tether.files.Table` or a mapping that does. {received(names=names)}"
                )

    def _write(self, place: Place, expression: Expression) -> None:
        found = self._added(expression)
        if len(found) > 1:
            raise _not_written(place, expression, 1.0)
        if found:
            _refuse_pieces(place)
        for added, strength in found:
            module = place.modules[0]
            low = factors_of(added)
            lengths = _lengths_of(added)
            if low is not None or lengths is not None:
                self.dropouts[module] = rate_of(added)
            whole, rows, shift = whole_of(added), rows_of(added), _shift_of(added)
            if low is not None:
                self._low_rank(place, module, strength * low[0], low[1], low[2])
            elif lengths is not None and strength == 1:
                self._low_rank(place, module, *lengths[:3])
                self._lengths(place, module, lengths[3])
            elif whole is not None and strength == 1:
                self._whole(place, module, whole)
            elif shift is not None and place.leaf == "bias":
                stored, _, back = as_stored(place)
                self.shifts[module] = _turned(f"{_PREFIX}{module}.lora_B.bias", shift, stored, back)
            elif rows is not None and strength == 1:
                self.tokens[module] = list(rows[1])
                name = f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"
                self.tensors.append(entry_of(rows[0].variable, name))
            else:
                raise _not_written(place, expression, strength)

    def _added(self, expression: Expression) -> list[tuple[Expression, float]]:
        """What is added to the base, each by which strength."""
        if isinstance(expression, Adapted):
            parts = expression.parts
            if self.adapter is None and len(parts) > 1:
                raise TetherError(
                    f"The model has several adapters. Say which: `adapter=...`, one of {', '.join(parts)}."
                )
            if self.adapter is not None and self.adapter not in parts:
                return []
            strength, added = parts[self.adapter] if self.adapter is not None else next(iter(parts.values()))
            return [(added, float(strength.numpy()))]
        if self.adapter is not None:
            return []
        if isinstance(expression, Magnitude) or rows_of(expression) is not None:
            return [(expression, 1.0)]
        if isinstance(expression, Weight):
            return [(expression, 1.0)] if expression.role == "part" else []
        found = split_sum(expression) if isinstance(expression, (Add, Subtract)) else None
        return [] if found is None else [(added, 1.0) for added in found.added]

    def _low_rank(self, place: Place, module: str, scale: float, a: Weight, b: Weight) -> None:
        table = isinstance(place.named.layer, keras.layers.Embedding)
        first, second = ("embedding_A", "embedding_B") if table else ("A.weight", "B.weight")
        self.ranks[module] = int((a.shape or ())[-1])
        self.alphas[module] = scale * self.ranks[module]
        stem = f"{_PREFIX}{module}.lora_"
        self.tensors += [_first_factor(place, stem + first, a), _second_factor(place, stem + second, b)]

    def _lengths(self, place: Place, module: str, lengths: Weight) -> None:
        self.dora.add(module)
        size = math.prod(lengths.shape or ())
        shape = (1, size, *(1 for _ in place.named.shape[:-2])) if place.is_convolution else (size,)
        self.tensors.append(
            _turned(f"{_PREFIX}{module}.lora_magnitude_vector", lengths, shape, lambda v: v.reshape(shape))
        )

    def _whole(self, place: Place, module: str, own: Weight) -> None:
        stored, _, back = as_stored(place)
        self.whole[module, place.leaf] = _turned(f"{_PREFIX}{module}.{place.leaf}", own, stored, back)

    def config(self) -> dict[str, Any]:
        """What the config says of the modules."""
        rank, alpha = _commonest(self.ranks, 8), _commonest(self.alphas, 8)
        biased = {module for module, leaf in self.whole if leaf == "bias"} - self.saved
        return {
            "peft_type": "LORA",
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _whole_number(alpha),
            "target_modules": sorted(self.ranks) or sorted(self.tokens),
            "rank_pattern": {re.escape(module): n for module, n in self.ranks.items() if n != rank},
            "alpha_pattern": {re.escape(m): _whole_number(n) for m, n in self.alphas.items() if n != alpha},
            "use_rslora": False,
            "use_dora": bool(self.dora),
            "init_lora_weights": True,
            "ensure_weight_tying": False,
            "lora_bias": bool(self.shifts),
            "bias": "none" if not biased else "lora_only" if biased <= set(self.ranks) else "all",
            "fan_in_fan_out": False,
            "lora_dropout": _commonest(self.dropouts, 0.0),
            "modules_to_save": sorted(self.saved) or None,
            "trainable_token_indices": self.tokens or None,
        }


def _not_written(place: Place, expression: Expression, strength: float) -> Unsupported:
    at = "" if strength == 1 else f" at strength {strength:g}"
    return Unsupported(
        f"{place.named.name} = {expression.notation()} has a part{at} that a LoRA folder of PEFT's cannot hold: for "
        "each weight it holds one low-rank part at any strength, or at strength 1 a DoRA, a weight trained whole, or "
        "rows. Save it as safetensors: `tether.files.save_safetensors`, or `tether.adapters.save`."
    )


def _is_lora(added: Expression) -> bool:
    """Whether a part is one of those that a LoRA folder may have."""
    return any(of(added) is not None for of in (factors_of, _lengths_of, whole_of, rows_of, _shift_of))


def _shift_of(added: Expression) -> Weight | None:
    """The stored vector of what is added to a bias, by the scale of its module."""
    if isinstance(added, Multiply) and isinstance(added.operands[0], Constant):
        added = added.operands[1]
    found = stored_behind(added)
    return found if found is not None and found.role == "part" else None


def _lengths_of(added: Expression) -> tuple[float, Weight, Weight, Weight] | None:
    """The scale, factors and lengths of a DoRA, alone or as what it adds to its base."""
    added = without_dropout(added)
    if isinstance(added, Subtract) and isinstance(added.operands[0], Magnitude):
        added = added.operands[0]
    if not isinstance(added, Magnitude):
        return None
    direction, lengths = added.operands
    found = split_sum(direction) if isinstance(direction, Add) else None
    low = factors_of(found.added[0]) if found is not None and len(found.added) == 1 else None
    own = stored_behind(lengths)
    return None if low is None or own is None else (*low, own)


def _first_factor(place: Place, name: str, weight: Weight) -> Entry:
    """`(*rows, r)` as `(r, rows)`, for a convolution `(r, channels, *window)`."""
    *rows, rank = weight.shape or ()
    if place.is_convolution:
        window = len(rows) - 1
        order = (window + 1, window, *range(window))
        return _turned(name, weight, (rank, rows[-1], *rows[:-1]), lambda array: array.transpose(order))
    return _turned(name, weight, (rank, math.prod(rows)), lambda array: array.reshape(-1, rank).T)


def _second_factor(place: Place, name: str, weight: Weight) -> Entry:
    """`(r, *columns)` as `(columns, r)`, for a convolution with a window of one."""
    rank, *columns = weight.shape or ()
    shape: tuple[int, ...] = (math.prod(columns), rank)
    if place.is_convolution:
        shape = (*shape, *(1 for _ in place.named.shape[:-2]))
    return _turned(name, weight, shape, lambda array: array.reshape(rank, -1).T.reshape(shape))


def _turned(name: str, weight: Weight, shape: tuple[int, ...], turned: Callable[[Array], Array]) -> Entry:
    held = entry_of(weight.variable, name)
    return Entry(name, shape, held.dtype, lambda: np.ascontiguousarray(turned(held.read())))


def _commonest(values: Mapping[str, Any], otherwise: float) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise


def _whole_number(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


__all__ = ["load_peft", "save_peft"]

"""Adapters into the folders of the library PEFT: which part of which weight is what there, and what the config says.

A folder holds one kind of adapter. Its parts are told by their structure, so those that were written by hand, or read
from a folder, are written too.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import keras

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import TetherError, UnknownName, Unsupported, received
from tether.files.loading.entries import Entry, entry_of
from tether.files.loading.matching import check_built
from tether.files.peft.peft_config import CONFIG, CONSTANTS, FIELDS, TENSORS, commonest, whole_number
from tether.files.peft.peft_parts import shift_of, turned_there
from tether.files.peft.peft_places import (
    PREFIX,
    PeftPlace,
    as_stored,
    factor_of,
    first_factor,
    inputs_first,
    inputs_scaled,
    outputs_scaled,
    peft_places_of,
    refuse_pieces,
    second_factor,
    seed_of,
    side_by_side,
    skew,
    times,
    transposed,
    turned,
)
from tether.files.tensors.dialects import Names
from tether.files.tensors.tensor_file import write_tensors
from tether.forms.boft import butterfly_of
from tether.forms.dora import lengths_of
from tether.forms.dropout import OutputDropout, output_dropout_of, rate_of
from tether.forms.fourier import waves_of
from tether.forms.full import whole_of
from tether.forms.hadamard import pairs_of
from tether.forms.kronecker import Sizes, matrices_of
from tether.forms.low_rank import products_of
from tether.forms.oft import size_of, turned_of
from tether.forms.rows import rows_of
from tether.forms.scale import scaled_of
from tether.forms.vera import vectors_of
from tether.forms.weight_norm import Magnitude
from tether.layers.family.named import named_weights
from tether.layers.tying.state import View
from tether.types import Config
from tether.weights.algebra import split_sum
from tether.weights.expression import Expression
from tether.weights.operators.arithmetic import Add, Multiply, Subtract
from tether.weights.operators.choice import Adapted
from tether.weights.weight import Weight


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

    Low-rank parts (also of convolutions and tables), DoRA and rows of tables (`tether.forms.rows`) are written as one
    LoRA adapter, which PEFT reads; parts of `tether.forms.scale` as IA3, of `hadamard` as LoHa, of `kronecker` as LoKr,
    of `vera` as VeRA, and those of `oft`, `boft` and `fourier` as they are called. Weights trained whole
    (`tether.forms.full`) may be beside any. A folder holds one kind.

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
        Unsupported: A part is of a kind that is not written, or they are of several kinds.
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
    with keras_seam.in_step_for(model, f"save_peft({target.name!r})"):
        found = _Writing(model, names, adapter)
        if not found.tensors:
            raise TetherError(
                f"{model.name!r} has no low-rank part to save. Make one: "
                "`tether.inherit(model, {'*/kernel': tether.low_rank(8, alpha=16)})`."
            )
        config = {**found.config(), "base_model_name_or_path": base_model, "task_type": task_type}
        target.mkdir(exist_ok=True)
        write_tensors(target / TENSORS, found.tensors, {"format": "pt"})
        if keras_seam.place_in_step()[0] == 0:
            with written_beside(target / CONFIG) as beside:
                beside.write_text(json.dumps(config, indent=2), encoding="utf-8")


class _Writing:
    """The tensors of a folder, and what its config has to say of them."""

    def __init__(self, model: keras.Layer, names: Names, adapter: str | None) -> None:
        self.adapter = adapter
        self.tensors: list[Entry] = []
        self.targets: dict[str, str] = {}
        """The kind of each module that has a part."""
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.output_dropouts: dict[str, OutputDropout] = {}
        self.dora: set[str] = set()
        self.whole: dict[tuple[str, str], Entry] = {}
        self.shifts: dict[str, Entry] = {}
        self.tokens: dict[str, list[int]] = {}
        self.kronecker: list[Sizes] = []
        self.vera: dict[str, tuple[tuple[Weight, Weight], tuple[int, int]]] = {}
        self.scaled: dict[str, tuple[PeftPlace, tuple[Weight, float]]] = {}
        self.scaled_biases: dict[str, tuple[Weight, float]] = {}
        self.more: Config = {}
        """What the config of a kind says besides."""
        places = peft_places_of(model, names)
        self.biased = {place.modules[0] for place in places if place.leaf == "bias"}
        for place in places:
            if isinstance(place.named.variable, View):
                self._write(place, place.named.variable.expression)
        self._refuse_nameless(model, names, {place.named.path for place in places})
        self._finish()

    def _write(self, place: PeftPlace, expression: Expression) -> None:
        found = self._added(expression)
        if found is None:
            return
        refuse_pieces(place)
        if not any(way(place, *found) for way in self._ways(place)):
            raise _not_written(place, expression, found[1])
        if place.modules[0] in self.ranks:
            self.dropouts[place.modules[0]] = rate_of(found[0])
            self.output_dropouts[place.modules[0]] = output_dropout_of(found[0])

    def _refuse_nameless(self, model: keras.Layer, names: Names, placed: set[str]) -> None:
        """Refuses to leave out a weight that the adapter changes, because no name is known for it."""
        for named in named_weights(model):
            if named.path in placed or not isinstance(named.variable, View):
                continue
            if self._added(named.variable.expression) is not None:
                raise UnknownName(
                    f"The adapter changes {named.name!r}, and `names` does not say what that is called in the base's "
                    f"file. Give a `tether.files.Table` or a mapping that does. {received(names=names)}"
                )

    def _added(self, expression: Expression) -> tuple[Expression, float] | None:
        """What is added to the base, and by which strength."""
        if isinstance(expression, Adapted):
            parts = expression.parts
            if self.adapter is None and len(parts) > 1:
                raise TetherError(
                    f"The model has several adapters. Say which: `adapter=...`, one of {', '.join(parts)}."
                )
            if self.adapter is not None and self.adapter not in parts:
                return None
            strength, added = parts[self.adapter] if self.adapter is not None else next(iter(parts.values()))
            return added, float(strength.numpy())
        if self.adapter is not None:
            return None
        is_product = isinstance(expression, Multiply) and scaled_of(expression) is not None
        if is_product or isinstance(expression, Magnitude) or rows_of(expression) is not None:
            return expression, 1.0
        if isinstance(expression, Weight):
            return (expression, 1.0) if expression.role == "part" else None
        found = split_sum(expression) if isinstance(expression, (Add, Subtract)) else None
        return None if found is None else (functools.reduce(operator.add, found.added), 1.0)

    # ------------------------------------------------------------------- the kinds

    def _ways(self, place: PeftPlace) -> tuple[Callable[[PeftPlace, Expression, float], bool], ...]:
        """What a part may be: each writes it and returns true, or leaves it to the next."""
        is_matrix = not place.is_table and not place.is_convolution
        of_matrices = (self._vera, self._oft, self._boft, self._fourier) if is_matrix else ()
        return (
            self._low_rank, self._dora, self._whole, self._shift, self._rows, self._hadamard, self._kronecker,
            *of_matrices, self._scale,
        )  # fmt: skip

    def _ranked(self, kind: str, place: PeftPlace, scale: float, rank: int) -> str:
        """Notes a module with a rank and a scale, and returns what its tensors' names begin with."""
        module = place.modules[0]
        self.targets[module] = kind
        self.ranks[module], self.alphas[module] = rank, scale * rank
        return f"{PREFIX}{module}."

    def _low_rank(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = products_of(added)
        return found is not None and self._factors(place, strength, found)

    def _factors(self, place: PeftPlace, strength: float, found: Sequence[tuple[float, Weight, Weight]]) -> bool:
        """One low-rank part, or several whose factors are put side by side: as a start that is taken off again."""
        scale = found[0][0] or 1.0
        rank = sum(int((a.shape or ())[-1]) for _, a, _ in found)
        stem = self._ranked("LORA", place, strength * scale, rank)
        first, second = ("embedding_A", "embedding_B") if place.is_table else ("A.weight", "B.weight")
        self.tensors += [
            side_by_side([first_factor(place, f"{stem}lora_{first}", a) for _, a, _ in found], 0),
            side_by_side(
                [second_factor(place, f"{stem}lora_{second}", b) for *_, b in found], 1, [s / scale for s, *_ in found]
            ),
        ]
        return True

    def _dora(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = lengths_of(added)
        if found is None or strength != 1:
            return False
        self._factors(place, 1.0, [found[:3]])
        self.dora.add(place.modules[0])
        size = math.prod(found[3].shape or ())
        shape = (1, size, *(1 for _ in place.named.shape[:-2])) if place.is_convolution else (size,)
        name = f"{PREFIX}{place.modules[0]}.lora_magnitude_vector"
        self.tensors.append(turned(name, found[3], shape, lambda v: v.reshape(shape)))
        return True

    def _whole(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        own = whole_of(added)
        if own is None or strength != 1:
            return False
        stored, _, back = as_stored(place)
        module = place.modules[0]
        self.whole[module, place.leaf] = turned(f"{PREFIX}{module}.{place.leaf}", own, stored, back)
        return True

    def _shift(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        own = shift_of(added)
        if own is None or place.leaf != "bias":
            return False
        stored, _, back = as_stored(place)
        self.shifts[place.modules[0]] = turned(f"{PREFIX}{place.modules[0]}.lora_B.bias", own, stored, back)
        return True

    def _rows(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = rows_of(added)
        if found is None or strength != 1:
            return False
        self.tokens[place.modules[0]] = list(found[1])
        name = f"{PREFIX}{place.modules[0]}.token_adapter.trainable_tokens_delta"
        self.tensors.append(entry_of(found[0].variable, name))
        return True

    def _hadamard(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = pairs_of(added)
        if found is None or place.is_table:
            return False
        stem = self._ranked("LOHA", place, strength * found[0], int((found[1][0].shape or ())[-1]))
        for number, (a, b) in enumerate(found[1:], 1):
            self.tensors += [
                transposed(f"{stem}hada_w{number}_a", b),
                inputs_first(place, f"{stem}hada_w{number}_b", a),
            ]
        return True

    def _kronecker(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = matrices_of(added)
        window = place.named.shape[:-2] if place.is_convolution else ()
        if found is None or place.is_table or math.prod(found[1].window) != math.prod(window):
            return False
        scale, sizes, (small, *large) = found
        if sizes.turned != turned_there(window, whole=sizes.inner is None):
            return False
        half = (max(sizes.large[0], sizes.large[1]) + 1) // 2
        if sizes.inner is not None and sizes.inner >= half:
            return False  # PEFT has one matrix of this rank
        stem = self._ranked("LOKR", place, strength * scale, sizes.inner or half)
        self.kronecker.append(sizes)
        self.tensors.append(transposed(f"{stem}lokr_w1", small))
        if sizes.inner is None:
            shape = (sizes.large[1], sizes.large[0], *window)
            self.tensors.append(inputs_first(place, f"{stem}lokr_w2", large[0], shape))
        else:
            self.tensors += [
                transposed(f"{stem}lokr_w2_a", large[1]), inputs_first(place, f"{stem}lokr_w2_b", large[0]),
            ]  # fmt: skip
        return True

    def _vera(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = vectors_of(added)
        if found is None:
            return False
        scale, bases, (d, b) = found
        stem = self._ranked("VERA", place, 1.0, math.prod(d.shape or ()))
        outputs = math.prod(b.shape or ())
        self.vera[place.modules[0]] = (bases, (math.prod(place.named.shape) // outputs, outputs))
        times = strength * scale
        self.tensors += [
            entry_of(d.variable, f"{stem}vera_lambda_d"),
            turned(f"{stem}vera_lambda_b", b, (outputs,), lambda v: v if times == 1 else (times * v).astype(v.dtype)),
        ]
        return True

    def _oft(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = turned_of(added)
        if found is None or strength != 1:
            return False
        turn, own = found
        count, size, terms = (own.shape or (0,))[0], (turn.shape or (0,))[-1], turn.parameters["terms"]
        self._alike("OFT", place, "oft_block_size", size)
        self._alike("OFT", place, "block_share", count == 1 != math.prod(place.named.shape[: place.split]) // size)
        self._alike("OFT", place, "use_cayley_neumann", terms is not None)
        self._alike("OFT", place, "num_cayley_neumann_terms", terms or 5)
        sign = 1 if terms is not None else -1
        name = f"{PREFIX}{place.modules[0]}.oft_R.weight"
        self.tensors.append(turned(name, own, own.shape or (), lambda array: sign * array))
        return True

    def _boft(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = butterfly_of(added)
        if found is None or strength != 1:
            return False
        own, scale = found
        size = size_of((own.shape or (0, 0))[1]) or 0
        count = math.prod(place.named.shape[: place.split]) // size
        factors = (own.shape or (0,))[0] // count
        self._alike("BOFT", place, "boft_block_size", size)
        self._alike("BOFT", place, "boft_n_butterfly_factor", factors)
        stem = f"{PREFIX}{place.modules[0]}.boft_"
        outputs = math.prod(scale.shape or ())
        self.tensors += [
            turned(f"{stem}R", own, (factors, count, size, size), lambda array: skew(array, (factors, count, size))),
            turned(f"{stem}s", scale, (outputs, 1), lambda array: array.reshape(outputs, 1)),
        ]
        return True

    def _fourier(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = waves_of(added)
        if found is None:
            return False
        scale, waves, own = found
        self._alike("FOURIERFT", place, "random_loc_seed", waves.parameters["seed"])
        module, total = place.modules[0], strength * scale
        common = self.more.setdefault("scaling", total or 1.0)
        counts = self.more.setdefault("n_frequency_pattern", {})
        self.more["n_frequency"] = counts[module] = math.prod(own.shape or ())
        name = f"{PREFIX}{module}.fourierft_spectrum"
        self.tensors.append(times(turned(name, own, own.shape or (), lambda array: array), total / common))
        return True

    def _alike(self, kind: str, place: PeftPlace, field: str, value: object) -> None:
        """Notes what the config of a kind says once for all modules."""
        module = place.modules[0]
        if self.more.setdefault(field, value) != value:
            raise Unsupported(
                f"A {kind} folder of PEFT's has one `{field}` for all modules, and {module!r} has another than those "
                f"before. Write them apart, under names of their own. {received(**{field: value})}"
            )
        self.targets[module] = kind

    def _scale(self, place: PeftPlace, added: Expression, strength: float) -> bool:
        found = scaled_of(added)
        if found is None or place.is_table:
            return False
        if place.leaf == "bias":
            self.scaled_biases[place.modules[0]] = (found[1], strength)
        else:
            self.scaled[place.modules[0]] = (place, (found[1], strength))
            self.targets[place.modules[0]] = "IA3"
        return True

    # ------------------------------------------------------------------- what all modules say together

    @property
    def kind(self) -> str:
        """The kind of adapter that the folder is."""
        kinds = sorted({*self.targets.values(), *(["LORA"] if self.tokens or self.shifts else [])})
        if len(kinds) > 1:
            listed = "; ".join(
                f"{kind}: {', '.join(module for module, each in self.targets.items() if each == kind)}"
                for kind in kinds
            )
            raise Unsupported(
                f"A folder of PEFT's holds one kind of adapter, and here are {' and '.join(kinds)} ({listed}). Give "
                "each kind a name of its own, by `tether.adapters.add`, and write them apart: `adapter=...`."
            )
        return kinds[0] if kinds else "LORA"

    def _finish(self) -> None:
        """Checks what PEFT has for all modules alike, and writes what they have in common."""
        kind, of_lora = self.kind, set(self.ranks)
        for what, some in (("lengths (DoRA)", self.dora), ("biases of factors", set(self.shifts))):
            if some and some != of_lora:
                raise Unsupported(
                    f"PEFT has {what} for all modules of an adapter or for none, and here only "
                    f"{', '.join(sorted(some))} of {', '.join(sorted(of_lora))} have some."
                )
        self.saved = {module for module, leaf in self.whole if leaf != "bias"}
        self.alone = {module for module, leaf in self.whole if leaf == "bias"} - self.saved
        if self.alone and "bias" not in FIELDS[kind]:
            raise Unsupported(
                f"A {kind} folder of PEFT's holds no bias trained by itself: {', '.join(sorted(self.alone))}. "
                "Train the module's kernel along."
            )
        for (module, _), entry in self.whole.items():
            inner = ".base_layer" if module in self.targets and module not in self.saved else ""
            stem, _, leaf = entry.name.rpartition(".")
            self.tensors.append(replace(entry, name=f"{stem}{inner}.{leaf}"))
        self.tensors += self.shifts.values()
        self._finish_scales()
        if kind == "LOKR":
            self.more["decompose_factor"] = factor_of(self.kronecker)
        if kind == "VERA":
            self._finish_vera()

    def _finish_scales(self) -> None:
        """Writes each module's factors as those of its outputs, which its bias has too, or of its inputs."""
        forward = []
        for module in sorted({*self.scaled, *self.scaled_biases}):
            place, own = self.scaled.get(module, (None, None))
            written = None
            if place is not None and own is not None:
                follows = module not in self.biased or self.scaled_biases.get(module) == own
                written = outputs_scaled(place, *own) if follows else None
                if written is None and module not in self.scaled_biases:
                    written = inputs_scaled(place, *own)
                    forward.append(module)
            if written is None:
                raise Unsupported(
                    f"IA3 of PEFT's multiplies the outputs of {module!r}, its bias too, or its inputs, by one vector, "
                    "and here it is otherwise. Multiply kernel and bias by one weight, as `tether.forms.scale` says, "
                    "or the kernel by `tether.forms.scale(axis=0)`."
                )
            self.tensors.append(written)
        if self.scaled:
            self.more["feedforward_modules"] = forward

    def _finish_vera(self) -> None:
        """Writes the matrices that all modules share, unless they are those that PEFT draws from a seed."""
        bases = {id(pair[0]): pair for pair, _ in self.vera.values()}
        if len(bases) > 1 or len({id(pair[1]) for pair, _ in self.vera.values()}) > 1:
            raise Unsupported(
                "The modules of a VeRA of PEFT's share one pair of matrices, and here are several. Make all parts with "
                "one form: `form = tether.forms.vera(...)`."
            )
        a, b = next(iter(bases.values()))
        n, m = (max(sizes[side] for _, sizes in self.vera.values()) for side in (0, 1))
        rank = int((a.shape or ())[-1])
        seed = seed_of(a, b) if (a.shape, b.shape) == ((n, rank), (rank, m)) else None
        self.more.update(projection_prng_key=seed or 0, save_projection=seed is None)
        if seed is None:
            self.tensors += [
                turned("base_model.vera_A", a, (rank, n), lambda array: array[:n].T),
                turned("base_model.vera_B", b, (m, rank), lambda array: array[:, :m].T),
            ]

    def config(self) -> Config:
        """What the config says of the modules."""
        kind = self.kind
        alike: Config = {
            "peft_type": kind,
            "inference_mode": True,
            "target_modules": sorted(self.targets) or sorted(self.tokens),
            "modules_to_save": sorted(self.saved) or None,
        }
        rank, alpha = commonest(self.ranks, 8), commonest(self.alphas, 8)
        ranks: Config = {
            "r": rank,
            "lora_alpha" if kind == "LORA" else "alpha": whole_number(alpha),
            "rank_pattern": {re.escape(module): n for module, n in self.ranks.items() if n != rank},
            "alpha_pattern": {re.escape(m): whole_number(n) for m, n in self.alphas.items() if n != alpha},
        }
        only = f"{kind.lower()}_only"
        bias = "none" if not self.alone else only if self.alone <= set(self.targets) else "all"
        found: Config = {**alike, **CONSTANTS[kind]}
        if kind == "LORA":
            unset = {name for name, fate in FIELDS[kind].items() if fate != "refused" and name[-7:] != "_config"}
            found = {**dict.fromkeys(sorted(unset)), **found, **ranks}
            found.update(
                use_dora=bool(self.dora), lora_bias=bool(self.shifts), trainable_token_indices=self.tokens or None
            )
        elif kind in ("LOHA", "LOKR"):
            dropout = commonest(self.output_dropouts, OutputDropout())
            found.update(ranks, rank_dropout=dropout.outputs, module_dropout=dropout.whole)
            if kind == "LOKR":
                found["rank_dropout_scale"] = dropout.rescaled
        elif kind == "VERA":
            found["r"] = rank
        if kind in ("LORA", "VERA"):
            found[f"{kind.lower()}_dropout"] = commonest(self.dropouts, 0.0)
        if "bias" in FIELDS[kind]:
            found["bias"] = bias
        return {**found, **self.more}


def _not_written(place: PeftPlace, expression: Expression, strength: float) -> Unsupported:
    at = "" if strength == 1 else f" at strength {strength:g}"
    return Unsupported(
        f"{place.named.name} = {expression.notation()} has a part{at} that a folder of PEFT's cannot hold: for each "
        "weight it holds one low-rank part, LoHa, LoKr, VeRA, FourierFT or factors of inputs or outputs at any "
        "strength, or at strength 1 a DoRA, OFT, BOFT, a weight trained whole, or rows. Tables have low-rank parts "
        "and DoRA there, convolutions no VeRA, OFT, BOFT and FourierFT. Save it as safetensors: "
        "`tether.files.save_safetensors`, or `tether.adapters.save`."
    )


__all__ = ["save_peft"]

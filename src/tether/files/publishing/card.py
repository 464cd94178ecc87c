"""The card of a model: what is in it, in Markdown, for people who did not make it."""

from __future__ import annotations

import math
import os
import pathlib
import re
import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import TetherError, received
from tether.forms.low_rank import factors_of
from tether.layers.tying.state import from_above, slots_of
from tether.layers.tying.tied import base_class
from tether.weights.expression import Expression, Stored
from tether.weights.operators.choice import Adapted
from tether.weights.weight import Weight

FILE = "model.keras"
"""What a model's file is called where a card lies beside it."""


def card(model: keras.Model, path: str | os.PathLike[str] | None = None) -> str:
    """Describes a model in Markdown: what is shared, what it stores, its adapters, how to load it, and the versions.

    Names and expressions of the model are escaped, whatever is in them. No value is read.

    Args:
        model: A built Keras model.
        path: Where to write the card, such as `"README.md"`: beside the target, and renamed. Left out, it is only
            returned.

    Returns:
        The card.

    Raises:
        TetherError: It is no built model, or the folder of the path does not exist.

    Example:
    ```python
    tether.tie(model, {"head/kernel": tether.weight_of(model, "embedding/embeddings").T})
    print(tether.files.card(model, "README.md"))
    ```
    """
    text = described(model, f'tether.files.load_model("{FILE}")')
    if path is not None:
        target = pathlib.Path(path)
        if not target.parent.is_dir():
            raise TetherError(f"The folder of the card does not exist. {received(path=str(path))}")
        if target.is_dir():
            raise TetherError(f"There is a folder where the card would be. {received(path=str(path))}")
        with written_beside(target) as beside:
            beside.write_text(text, encoding="utf-8")
    return text


def described(model: keras.Model, loading: str) -> str:
    """The card of a model that is loaded by some code.

    Raises:
        TetherError: It is no built model.
    """
    if not isinstance(model, keras.Model):
        raise TetherError(f"A card is that of a Keras model. {received(model=model)}")
    if not model.built:
        raise TetherError(f"{model.name!r} is not built, so it stores nothing yet. Call it once, or `build` it.")
    facts = from_above["facts"](model)
    adapters = _adapters(model)
    parts = [
        [f"# {escaped(model.name)}"],
        ["A Keras model with shared weights. Reading it takes Tether, the package `keras-tether`."]
        if any(use.tied for use in facts.uses)
        else ["A Keras model."],
        ["## What is stored", "", *_sizes(facts)],
        ["## What is shared", "", *_shared(facts, {path for each in adapters.values() for path in each.strengths})],
        ["## Adapters", "", *_adapter_table(adapters)] if adapters else [],
        ["## How to load it", "", *_loading(model, loading)],
        ["## Versions", "", *_versions()],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


# --------------------------------------------------------------------------- what is stored and shared
# From the facts of the model, which stand above this module.


def _sizes(facts: Any) -> Iterator[str]:
    weights = [weight for weight in facts.weights if not weight.state]
    stored = sum(math.prod(weight.shape) for weight in weights)
    alone = [weight for weight in weights if not facts.uses_of(weight)]
    unshared = sum(math.prod(each.shape) for each in (*facts.uses, *alone))
    trained = sum(math.prod(weight.shape) for weight in weights if weight.trainable)
    yield from _table(
        ("", "parameters", "bytes"),
        [
            ("stored, each weight once", f"{stored:,}", f"{facts.stored_bytes:,}"),
            ("if every use were a variable of its layer", f"{unshared:,}", f"{facts.unshared_bytes:,}"),
        ],
    )
    yield ""
    yield f"{trained:,} of the parameters train."


def _shared(facts: Any, strengths: set[str]) -> Iterator[str]:
    """The weights with more than one use. The strength of an adapter has many, and is no sharing."""
    shared = [weight for weight in facts.shared() if weight.path not in strengths]
    if not shared:
        yield "No weight has more than one use."
        return
    yield from _table(
        ("stored weight", "shape", "dtype", "read by"),
        [
            (
                code(weight.path or weight.place),
                code(str(weight.shape)),
                code(weight.dtype),
                "<br>".join(
                    f"{code(use.where)} as {code(use.expression or weight.path or weight.place)}"
                    for use in facts.uses_of(weight)
                ),
            )
            for weight in shared
        ],
    )


# --------------------------------------------------------------------------- adapters


@dataclass
class _Adapter:
    """One adapter, as the expressions of a model tell."""

    weights: int = 0
    """How many weights it changes."""
    ranks: set[int] = field(default_factory=set)
    own: dict[int, Stored] = field(default_factory=dict)
    """What it may train, by id."""
    strengths: set[str] = field(default_factory=set)
    """The paths of its strength."""


def _adapters(model: keras.Model) -> dict[str, _Adapter]:
    """The adapters by name, in the order in which they were added. Those that are merged are in no file either."""
    found: dict[str, _Adapter] = {}
    order: dict[str, int] = {}
    for expression in _expressions(model):
        if isinstance(expression, Adapted):
            base = set(expression.base.weights_used())
            for name, (strength, part) in expression.parts.items():
                each = found.setdefault(name, _Adapter())
                order[name] = max(order.get(name, 0), expression.order[name])
                each.weights += 1
                factors = factors_of(part)
                if factors is not None:
                    each.ranks.add(int((factors[1].shape or (0,))[-1]))
                own = [weight for weight in part.weights_used() if weight not in base]
                each.own.update((id(weight), weight) for weight in own if weight.role in ("part", None))
                if isinstance(strength, Weight):
                    each.strengths.add(strength.variable.path)
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def _expressions(model: keras.Model) -> Iterator[Expression]:
    for layer in keras_seam.contained_layers(model):
        for slot in slots_of(layer):
            yield slot.view.expression


def _adapter_table(adapters: dict[str, _Adapter]) -> list[str]:
    return _table(
        ("adapter", "weights changed", "rank", "parameters of its own"),
        [
            (
                code(name),
                str(each.weights),
                ", ".join(map(str, sorted(each.ranks))) or "none",
                f"{sum(math.prod(weight.shape or ()) for weight in each.own.values()):,}",
            )
            for name, each in adapters.items()
        ],
    )


# --------------------------------------------------------------------------- loading


def _loading(model: keras.Model, loading: str) -> Iterator[str]:
    yield from ("```sh", "pip install keras-tether", "```", "", "```python", "import tether", "")
    yield f"model = {loading}"
    yield "```"
    own = {
        keras.saving.get_registered_name(cls)
        for cls in (base_class(type(layer)) for layer in keras_seam.contained_layers(model))
        if cls.__module__.partition(".")[0] not in ("keras", "tether")
    }
    if own:
        yield ""
        yield (
            f"It has layers of classes that are not Keras's: {', '.join(map(code, sorted(own)))}. Import what "
            "registers them before, or hand them over as `custom_objects`."
        )


def _versions() -> list[str]:
    backend = keras.backend.backend()
    versions = {"keras-tether": sys.modules["tether"].__version__, "keras": keras.__version__}
    backend_version = getattr(sys.modules.get(backend), "__version__", "")
    return _table(("package", "version"), [*versions.items(), (f"{backend} (the backend)", str(backend_version))])


# --------------------------------------------------------------------------- Markdown


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    shown = " ".join(text.split())
    return re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", shown)


def code(text: str) -> str:
    """Text as code within a line, also in a cell of a table: fenced by more backticks than it has in a row."""
    shown = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if len(fence) > 1 or not shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [list(head), *map(list, rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]]


__all__ = ["FILE", "card", "code", "described", "escaped"]

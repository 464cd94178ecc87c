"""A layer's ties as JSON: which path reads which expression, and the weights in them.

```json
{"needs": "...", "version": 1, "base": {"module": ..., "class_name": ..., "registered_name": ...},
 "ties": {"kernel": [{"weight": "4f1c..."}, {"op": "transpose", "of": [0], "axes": null}]},
 "weights": {"4f1c...": {"name": "codec", "shape": [784, 64], ...}}}
```

Two keys are there only if there is something to say: `"takes"`, the arguments of the layer's call, and
`"penalties"`, soft ties as `{"a": [...], "b": [...], "strength": [...], "owned": ["4f1c..."]}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, TetherError, received
from tether.layers.tying.penalty import Penalty, Stated, check
from tether.layers.tying.state import State, Tie, is_serializing
from tether.types import Config
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression, Stored
from tether.weights.identity import mark, scope_of
from tether.weights.leaves import Argument
from tether.weights.weight import Weight

VERSION = 1


NEEDS = "This file holds ties of weights. Install keras-tether (`pip install keras-tether`) and `import tether` first."
"""The first words of a record: Keras's error prints them where Tether was not imported."""


def ties_to_write(layer: keras.Layer, state: State) -> dict[str, Tie]:
    """The ties that this layer's config has to hold: its own, and those that no config around it will hold."""
    ties = {"/".join(path): tie for path, tie in state.recorded.items()}
    elsewhere: list[tuple[str, Tie]] = [("/".join(path), tie) for path, tie in state.pending.items()]
    elsewhere += [(slot.view.use.name, slot.tie) for slot in state.slots]
    elsewhere += [("/".join(path), tie) for tie, path in state.lent if tie.is_recorded]
    for path, tie in elsewhere:
        recorder = tie.recorder()
        if recorder is not layer and (recorder is None or not is_serializing(recorder)):
            ties.setdefault(path, tie)
    return ties


def penalties_to_write(layer: keras.Layer, state: State) -> list[Penalty]:
    """The penalties that this layer's config has to hold: its own, and those that no config around it will hold."""
    found = []
    for penalty in state.penalties:
        recorder = penalty.recorder()
        if not penalty.is_void and (recorder is layer or recorder is None or not is_serializing(recorder)):
            found.append(penalty)
    return found


def encode_ties(layer: keras.Layer, state: State) -> Config:
    """The `"tether"` entry of a layer's config."""
    written = ties_to_write(layer, state)
    ties = {path: tie.expression for path, tie in written.items()}
    penalties = penalties_to_write(layer, state)
    weights = {weight.uid: weight for expression in ties.values() for weight in expression.weights_used()}
    weights.update({weight.uid: weight for penalty in penalties for weight in penalty.weights})
    # A record names a weight; whether a layer makes it again, that layer's own config says. So these are not marked.
    configs = {uid: weight.own_config() for uid, weight in weights.items()}
    record = {
        "needs": NEEDS,
        "version": VERSION,
        "base": keras_seam.class_reference(type(layer)._tether_base),
        "ties": {path: encode(expression) for path, expression in ties.items()},
        "weights": configs,
        **({"takes": [encode(argument)[0] for argument in state.takes]} if state.takes else {}),
        **({"penalties": [_encode_penalty(penalty) for penalty in penalties]} if penalties else {}),
    }
    return mark(record, *written.values(), *penalties)


_PENALTY = ("a", "b", "strength")


def _encode_penalty(penalty: Penalty) -> Config:
    return {
        **{part: encode(getattr(penalty, part)) for part in _PENALTY},
        "owned": [weight.uid for weight in penalty.owned],
    }


def _decode_penalty(entry: object, weights: dict[str, Weight]) -> Stated:
    if not isinstance(entry, dict) or set(entry) != {*_PENALTY, "owned"}:
        raise InvalidConfig(f"A penalty has a, b, strength and owned. {received(penalty=entry)}")
    owned = entry["owned"]
    if not isinstance(owned, (list, tuple)) or not all(isinstance(uid, str) and uid in weights for uid in owned):
        raise InvalidConfig(f"A penalty names its own weights, which the record has. {received(owned=owned)}")
    a, b, strength = (decode(entry[part], weights) for part in _PENALTY)
    try:
        check(a, b, strength)
    except TetherError as error:
        raise InvalidConfig(f"A penalty cannot be read: {error}") from error
    return a, b, strength, tuple(dict.fromkeys(weights[uid] for uid in owned))


@dataclass(frozen=True)
class Record:
    """What an entry says: expressions by path, and the arguments that the layer's call takes for layers below."""

    ties: dict[str, Expression]
    takes: list[Argument]
    penalties: list[tuple[Expression, Expression, Expression, tuple[Stored, ...]]]
    """Both sides, the strength, and the weights of the penalty's own."""


def read_record(record: object) -> Record:
    """The ties of an entry, its weights made or found in the sharing scope.

    Raises:
        InvalidConfig: It is not what `encode_ties` writes.
    """
    known = {"needs", "takes", "penalties"}
    if not isinstance(record, dict) or set(record) - known != {"version", "base", "ties", "weights"}:
        raise InvalidConfig(
            f"A record of ties has version, base, ties and weights. {received(record=type(record).__name__)}"
        )
    if record["version"] != VERSION:
        raise InvalidConfig(f"This Tether reads records of version {VERSION}. {received(version=record['version'])}")
    ties, configs = record["ties"], record["weights"]
    if not isinstance(ties, dict) or not isinstance(configs, dict):
        raise InvalidConfig(
            f"Ties and weights are dicts. {received(ties=type(ties).__name__, weights=type(configs).__name__)}"
        )
    weights: dict[str, Weight] = {}
    for uid, config in configs.items():
        if not isinstance(config, dict) or config.get("uid") != uid:
            raise InvalidConfig(f"A weight's config names its own uid. {received(uid=uid)}")
        made = (scope_of(uid) or {}).get(uid)
        only_named = made is None or made.only_named
        weights[uid] = Weight.from_config(config)
        weights[uid].only_named = only_named
    takes = record.get("takes", [])
    if not isinstance(takes, (list, tuple)):
        raise InvalidConfig(f"The arguments of a record are a list. {received(takes=takes)}")
    arguments = [decode([leaf], {}) for leaf in takes]
    if not all(isinstance(argument, Argument) for argument in arguments):
        raise InvalidConfig(f"The arguments of a record are arguments. {received(takes=takes)}")
    penalties = record.get("penalties", [])
    if not isinstance(penalties, (list, tuple)):
        raise InvalidConfig(f"The penalties of a record are a list. {received(penalties=penalties)}")
    expressions = {path: decode(steps, weights) for path, steps in ties.items()}
    for weight in (weight for expression in expressions.values() for weight in expression.weights_used()):
        weight.only_named = False
    return Record(
        expressions,
        arguments,  # type: ignore[arg-type]
        [_decode_penalty(entry, weights) for entry in penalties],
    )

"""A layer's ties as JSON: which path reads which expression, and the weights in them.

```json
{"version": 1, "base": {"module": ..., "class_name": ..., "registered_name": ...},
 "ties": {"kernel": [{"weight": "4f1c..."}, {"op": "transpose", "of": [0], "axes": null}]},
 "weights": {"4f1c...": {"name": "codec", "shape": [784, 64], ...}}}
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tether import keras_seam
from tether.errors import InvalidConfig, received
from tether.layers.state import State, Tie, is_serializing
from tether.weights.argument import Argument
from tether.weights.codec import decode, encode
from tether.weights.expression import Expression
from tether.weights.weight import Weight

VERSION = 1


def ties_to_write(layer: Any, state: State) -> dict[str, Expression]:
    """The ties that this layer's config has to hold: its own, and those that no config around it will hold."""
    ties = {"/".join(tie.path): tie.expression for tie in state.recorded}
    elsewhere: list[tuple[str, Tie]] = [("/".join(path), tie) for path, tie in state.pending.items()]
    elsewhere += [(slot.view.use.name, slot.tie) for slot in state.slots]
    elsewhere += [("/".join(path), tie) for tie, path in state.lent]
    for path, tie in elsewhere:
        recorder = tie.recorder()
        if recorder is not layer and (recorder is None or not is_serializing(recorder)):
            ties.setdefault(path, tie.expression)
    return ties


def encode_ties(layer: Any, state: State) -> dict[str, Any]:
    """The `"tether"` entry of a layer's config."""
    ties = ties_to_write(layer, state)
    weights = {weight.uid: weight for expression in ties.values() for weight in expression.weights_used()}
    scope = keras_seam.saving_scope()
    if scope is not None:
        scope.setdefault("covered", set()).add(id(layer))
    return {
        "version": VERSION,
        "base": keras_seam.class_reference(type(layer)._tether_base),
        "ties": {path: encode(expression) for path, expression in ties.items()},
        "weights": {uid: weight.get_config() for uid, weight in weights.items()},
        **({"takes": [encode(argument)[0] for argument in state.takes]} if state.takes else {}),
    }


@dataclass(frozen=True)
class Record:
    """What an entry says: expressions by path, and the arguments that the layer's call takes for layers below."""

    ties: dict[str, Expression]
    takes: list[Argument]


def read_record(record: Any) -> Record:
    """The ties of an entry, its weights made or found in the sharing scope.

    Raises:
        InvalidConfig: It is not what `encode_ties` writes.
    """
    if not isinstance(record, dict) or set(record) - {"takes"} != {"version", "base", "ties", "weights"}:
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
        weights[uid] = Weight.from_config(config)
    takes = record.get("takes", [])
    if not isinstance(takes, (list, tuple)):
        raise InvalidConfig(f"The arguments of a record are a list. {received(takes=takes)}")
    arguments = [decode([leaf], {}) for leaf in takes]
    if not all(isinstance(argument, Argument) for argument in arguments):
        raise InvalidConfig(f"The arguments of a record are arguments. {received(takes=takes)}")
    return Record({path: decode(steps, weights) for path, steps in ties.items()}, arguments)  # type: ignore[arg-type]

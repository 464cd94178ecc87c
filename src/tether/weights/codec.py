"""How an expression is written: as JSON, safe to read from a stranger, and as mathematics."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping

import numpy as np

from tether.errors import NUMERIC, InvalidConfig, TetherError, received
from tether.types import Array, Config
from tether.weights.expression import MAX_AXES, MAX_STEPS, Expression, Node, Stored, Term, operator, program, provide
from tether.weights.leaves import MAX_CONSTANT, Argument, Choice, Constant, Slots, numpy_dtype

# --------------------------------------------------------------------------- as JSON
# Expressions as JSON: a flat list of steps that name earlier steps, so that no file can hold a cycle.
#
# A step is one of `{"weight": uid}`, `{"number": 0.5}`, `{"array": {...}}`, `{"argument": {...}}` or `{"op": name,
# "of": [places], ...parameters}`. The last step is the expression. A file names operators and registered functions;
# it never holds code.


def encode(root: Expression) -> list[Config]:
    """The expression as JSON; weights by uid."""
    steps: list[Config] = []
    for step in program(root):
        current = step.expression
        if isinstance(current, Node):
            parameters = {key: _plain(value) for key, value in current.parameters.items()}
            steps.append({"op": current.name, "of": list(step.operands), **parameters})
        elif isinstance(current, Stored):
            steps.append({"weight": current.uid})
        elif isinstance(current, Argument):
            steps.append({"argument": _encode_argument(current)})
        elif isinstance(current, Constant):
            steps.append(_encode_constant(current))
    return steps


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _encode_argument(argument: Argument) -> Config:
    found: Config = {"name": argument.name, "shape": list(argument.shape), "dtype": argument.dtype}
    if isinstance(argument, Slots):
        return {**found, "slots": list(argument.names), "none": argument.none}
    if argument.default is not None:
        found["default"] = argument.default
    if argument.choices is not None:
        found["choices"] = list(argument.choices)
    if isinstance(argument, Choice):
        found["each"] = True
        if argument.none is not None:
            found["none"] = argument.none
    return found


def _encode_constant(constant: Constant) -> Config:
    if constant.array is None:
        number = constant.number
        if isinstance(number, float) and not math.isfinite(number):
            return {"number": repr(number)}
        return {"number": number}
    array = constant.array
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"array": {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}}


def decode(steps: object, weights: Mapping[str, Stored]) -> Expression:
    """The expression of a JSON list.

    Args:
        steps: What `encode` wrote, possibly by a stranger.
        weights: The weights that it may name, by uid.

    Raises:
        InvalidConfig: It is not what `encode` writes.
    """
    if not isinstance(steps, (list, tuple)) or not 0 < len(steps) <= MAX_STEPS:
        raise InvalidConfig(f"An expression is a list of 1 to {MAX_STEPS} steps. {received(type=type(steps).__name__)}")
    done: list[Expression] = []
    for place, step in enumerate(steps):
        if not isinstance(step, dict):
            raise InvalidConfig(f"Step {place} of an expression is a dict. {received(step=step)}")
        try:
            done.append(_decode_step(step, done, weights))
        except InvalidConfig:
            raise
        except (
            TetherError,
            TypeError,
            ValueError,
            OverflowError,
            MemoryError,
            KeyError,
            AttributeError,
            IndexError,
        ) as error:
            raise InvalidConfig(f"Step {place} of an expression cannot be read: {error}") from error
    return done[-1]


def encode_became(expression: Expression) -> Config:
    """What a weight has become, as JSON, with the weights in it."""
    parts = expression.weights_used()
    return {"steps": encode(expression), "weights": {part.uid: part.get_config() for part in parts}}


def decode_became(content: object, weight: Stored) -> Expression:
    """What a weight has become, from the JSON that `encode_became` wrote.

    Args:
        content: The JSON, possibly a stranger's.
        weight: The weight, whose shape and dtype the expression must have.

    Raises:
        InvalidConfig: It is not what `encode_became` writes.
    """
    if not isinstance(content, dict) or set(content) != {"steps", "weights"}:
        raise InvalidConfig(f"What a weight has become has steps and weights. {received(became=content)}")
    configs = content["weights"]
    if not isinstance(configs, dict) or any(not isinstance(c, dict) or "became" in c for c in configs.values()):
        raise InvalidConfig(f"What a weight has become names stored weights. {received(weights=configs)}")
    parts = {uid: type(weight).from_config(config) for uid, config in configs.items()}
    expression = decode(content["steps"], parts)
    if not isinstance(expression, Node) or not expression.weights_used():
        raise InvalidConfig(f"What a weight has become is made of other weights. {received(steps=content['steps'])}")
    if (expression.shape, expression.dtype) != (weight.shape, weight.dtype):
        raise InvalidConfig(
            f"The weight {weight.name!r} of shape {weight.shape} and dtype {weight.dtype} cannot have become "
            f"{expression.notation()}. {received(shape=expression.shape, dtype=expression.dtype)}"
        )
    return expression


def _decode_step(step: Config, done: list[Expression], weights: Mapping[str, Stored]) -> Expression:
    if "op" in step:
        return _decode_node(step, done)
    if len(step) != 1:
        raise InvalidConfig(f"A leaf is a dict of one key. {received(keys=sorted(map(str, step)))}")
    ((kind, content),) = step.items()
    if kind == "weight":
        if not isinstance(content, str) or content not in weights:
            raise InvalidConfig(f"An expression names a weight that the file does not have. {received(weight=content)}")
        return weights[content]
    if kind == "number":
        if content in ("inf", "-inf", "nan"):
            content = float(content)
        if isinstance(content, bool) or not isinstance(content, (int, float)):
            raise InvalidConfig(f"A number is an int or a float. {received(number=content)}")
        return Constant.of(content)
    if kind == "array":
        return Constant(array=_decode_array(content))
    if kind == "argument":
        return _decode_argument(content)
    raise InvalidConfig(f"An expression has no leaf of this kind. {received(kind=kind)}")


def _decode_argument(content: object) -> Argument:
    needed = {"name", "shape", "dtype"}
    known = {*needed, "default", "choices", "each", "none", "slots"}
    if not isinstance(content, dict) or not needed <= set(content) <= known:
        raise InvalidConfig(f"An argument has name, shape and dtype. {received(argument=content)}")
    shape, default = content["shape"], content.get("default")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int for n in shape):
        raise InvalidConfig(f"An argument's shape is a list of integers. {received(shape=shape)}")
    if not isinstance(content["dtype"], str):
        raise InvalidConfig(f"An argument's dtype is a string. {received(dtype=content['dtype'])}")
    if type(default) not in (int, float, type(None)):
        raise InvalidConfig(f"An argument's default is a number. {received(default=default)}")
    choices, none = content.get("choices"), content.get("none")
    if not isinstance(none, (str, type(None))):
        raise InvalidConfig(f"What -1 is called is a name. {received(none=none)}")
    if "slots" in content:
        return Slots(content["name"], content["slots"], none=none)
    if content.get("each"):
        return Choice(content["name"], choices, default=default, none=none)
    return Argument(content["name"], tuple(shape), content["dtype"], default=default, choices=choices)


def _decode_node(step: Config, done: list[Expression]) -> Expression:
    parameters = dict(step)
    name, places = parameters.pop("op"), parameters.pop("of", None)
    found = operator(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidConfig(f"No operator of expressions has this name. {received(op=name)}")
    if not isinstance(places, (list, tuple)) or not places:
        raise InvalidConfig(f"The operator {name!r} needs a list of places. {received(of=places)}")
    for place in places:
        if type(place) is not int or not 0 <= place < len(done):
            raise InvalidConfig(
                f"Step {len(done)} of an expression may name the steps before it; naming itself or a later one "
                f"would be a cycle. {received(of=places)}"
            )
    return found(*(done[place] for place in places), **parameters)


def _decode_array(content: object) -> Array:
    if not isinstance(content, dict) or set(content) != {"dtype", "shape", "data"}:
        raise InvalidConfig(f"An array has dtype, shape and data. {received(array=type(content).__name__)}")
    shape, data = content["shape"], content["data"]
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_AXES
        or not all(type(n) is int and 0 <= n <= MAX_CONSTANT for n in shape)
    ):
        raise InvalidConfig(f"An array's shape is a list of integers. {received(shape=shape)}")
    if math.prod(shape) > MAX_CONSTANT or not isinstance(data, str) or len(data) > MAX_CONSTANT * 24:
        raise InvalidConfig(f"An array has at most {MAX_CONSTANT:,} elements. {received(shape=shape)}")
    if not isinstance(content["dtype"], str) or content["dtype"] not in NUMERIC:
        raise InvalidConfig(f"An array holds numbers of a dtype that Keras knows. {received(dtype=content['dtype'])}")
    dtype = numpy_dtype(content["dtype"])
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidConfig(f"An array's data is not base64: {error}") from None
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise InvalidConfig(
            f"An array's data has another length than its shape. {received(shape=shape, bytes=len(raw))}"
        )
    array = np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
    array.flags.writeable = False
    return array


# --------------------------------------------------------------------------- as mathematics
# An expression in mathematics.


MAX_TEXT = 400
"""A part whose text is longer is left out, so that shared parts cannot make the text explode."""


def notation(root: Expression) -> str:
    """The expression as people write it; parts that would take a page are `...`."""
    terms: list[Term] = []
    for step in program(root):
        expression = step.expression
        if isinstance(expression, Node):
            term = expression.format(*(terms[place] for place in step.operands))
        elif isinstance(expression, (Constant, Argument)):
            term = expression.format()
        else:
            term = Term(expression.name)  # type: ignore[attr-defined]
        terms.append(term if len(term.text) <= MAX_TEXT else Term("..."))
    return terms[-1].text


provide(notation=notation)

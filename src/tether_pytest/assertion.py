"""Whether two names of a model read the same stored weight."""

from __future__ import annotations

import keras

from tether.errors import TetherError, received
from tether.layers.tying.paths import locate, split
from tether.layers.tying.state import View


def assert_tied(model: object, one: str, other: str) -> None:
    """Fails unless two names of a model read the same stored weight.

    They do if there is a stored weight that both are computed from: as it is, transposed, sliced, or with other
    weights. The strength of an adapter, which all weights with that adapter have, does not count.

    Args:
        model: A built Keras model or layer.
        one: The path of a weight, as for `tether.tie`: `"head/kernel"`.
        other: Another one.

    Raises:
        AssertionError: They share no stored weight. It says what each reads, and what to write.
        TetherError: It is no built model, or the names are one weight's.
        UnknownName: The model has no weight of a name.
    """
    __tracebackhide__ = True
    if not isinstance(model, keras.layers.Layer):
        raise TetherError(f"Names of weights are those of a Keras model or layer. {received(model=model)}")
    first, second = (_variable(model, name) for name in (one, other))
    if first is second:
        raise TetherError(
            f"{one!r} and {other!r} are one variable of {model.name!r}, so this can never fail. Name two weights."
        )
    if _stored(first).keys() & _stored(second).keys():
        return
    raise AssertionError(
        f"{one!r} and {other!r} of {model.name!r} share no stored weight.\n"
        f"  {one}: {_read(first)}\n  {other}: {_read(second)}\nTo tie them, write: {_mend(one, other, first, second)}"
    )


def _variable(model: keras.Layer, name: str) -> keras.Variable:
    variable = locate(model, split(name)).variable
    if variable is None:
        raise TetherError(
            f"{name!r} of {model.name!r} is not built yet, so it reads nothing. Call the model once, or `build` it."
        )
    return variable


def _stored(variable: keras.Variable) -> dict[int, keras.Variable]:
    if not isinstance(variable, View):
        return {id(variable): variable}
    weights = [weight for weight in variable.expression.weights_used() if weight.is_built and weight.role != "strength"]
    return {id(weight.variable): weight.variable for weight in weights}


def _read(variable: keras.Variable) -> str:
    shape = tuple(variable.shape)
    if not isinstance(variable, View):
        return f"its own variable {variable.path!r}, of shape {shape}"
    stored = ", ".join(f"{each.path!r}" for each in _stored(variable).values()) or "no stored weight"
    return f"{variable.expression.notation()}, of shape {shape}, from {stored}"


def _mend(one: str, other: str, first: keras.Variable, second: keras.Variable) -> str:
    shape, weight = tuple(first.shape), f"tether.weight_of(model, {other!r})"
    if shape == tuple(second.shape):
        return f"tether.tie(model, {{{one!r}: {weight}}})"
    if shape == tuple(second.shape)[::-1]:
        return f"tether.tie(model, {{{one!r}: {weight}.T}})"
    return f"tether.tie(model, {{{one!r}: an expression of the shape {shape} over {weight}}})"


__all__ = ["assert_tied"]

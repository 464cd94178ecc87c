"""One of several weights, chosen when the layer is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tether.errors import TetherError, received
from tether.layers.tie import tie
from tether.weights.expression import Expression
from tether.weights.leaves import Argument
from tether.weights.operators.choice import choose
from tether.weights.weight import Weight


def route(
    layer: Any,
    options: Mapping[str, Any] | None = None,
    /,
    *,
    default: Any = 0,
    argument: str = "choice",
    **by_name: Any,
) -> Any:
    """Gives weights of a layer several expressions, one of which is chosen at each call.

    Afterwards the layer's call takes the choice as a keyword: `layer(x, choice=1)`. One choice holds for the
    whole call. An option that was not chosen in a step gets a gradient of zero, on every backend; it is a live
    weight all the same, so an optimizer with weight decay or momentum goes on changing it. Put the options that
    must not change under `stop_gradient()`.

    Args:
        layer: A Keras layer or model, built or not. Changed in place.
        options: The options by the weight's path, for names that are not identifiers or that this function has.
        default: The choice where a call makes none, as `fit` and `predict` do: a number, a name or a bool.
        argument: What the keyword of the call is named.
        **by_name: The options by the weight's name: a list of expressions, or a dict of them by name. With names
            the choice may be one of them. Options in a list are named after the weights that they are, if each is
            one. All weights of one `route` have equally many options.

    Returns:
        The same layer. `choice` is a whole number, a name, a bool (False is 0), a NumPy number or a scalar tensor
        (beyond the ends it is taken as the nearest; a number that is known is checked).

    Raises:
        TetherError: Options that do not match each other, or a default that is none of them.
        ShapeMismatch: The options of one weight have different shapes, or not the weight's.

    Example:
    ```python
    layer = tether.route(keras.layers.Dense(64), kernel={"base": base, "french": base + french})
    y = layer(x, choice="french")
    ```
    """
    given = {**(options or {}), **by_name}
    if not given:
        raise TetherError("`route` needs options, as in `route(layer, kernel=[parent, own])`.")
    listed = {path: _listed(path, found) for path, found in given.items()}
    names = next(iter(listed.values()))[0]
    for path, (others, _) in listed.items():
        if len(others) != len(names) or (all(map(_is_a_name, (*others, *names))) and others != names):
            raise TetherError(
                f"One choice decides for all weights of the layer, so all have the same options: "
                f"{next(iter(listed))!r} has {', '.join(names)}. {received(**{path: others})}"
            )
    named = next((found for found, _ in listed.values() if all(map(_is_a_name, found))), names)
    leaf = Argument(argument, (), "int32", default=default, choices=named)
    return tie(layer, {path: choose(leaf, expressions) for path, (_, expressions) in listed.items()})


def _is_a_name(name: str) -> bool:
    return not name.isdigit()


def _listed(path: str, options: Any) -> tuple[tuple[str, ...], list[Any]]:
    """The names and expressions of one weight's options."""
    if isinstance(options, Mapping) and options and all(isinstance(name, str) and name for name in options):
        return tuple(options), list(options.values())
    if isinstance(options, (list, tuple)) and options:
        found = [option.name if isinstance(option, Weight) else "" for option in options]
        if "" in found or len(set(found)) < len(found):
            found = [str(place) for place in range(len(options))]
        return tuple(found), list(options)
    one = " To tie it to one expression use `tether.tie`." if isinstance(options, Expression) else ""
    raise TetherError(
        f"The options of {path!r} are a list of expressions, or a dict of them by name.{one}"
        f" {received(options=options)}"
    )

"""Each stored variable once: what an optimizer has to be given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tether.layers.tying.state import stored_variables


def unique(variables: Iterable[Any]) -> list[Any]:
    """The stored variables of a list, each once, in the order in which they first appear.

    `a.trainable_weights + b.trainable_weights` lists a shared weight twice, and an optimizer that is
    given that list steps it twice. A view stands for the stored variables of its expression.

    Args:
        variables: Keras variables, possibly repeated.

    Example:
    ```python
    variables = tether.inspection.unique(a.trainable_weights + b.trainable_weights)
    optimizer.apply(gradients, variables)
    ```
    """
    found: dict[int, Any] = {}
    for variable in variables:
        for stored in stored_variables(variable):
            found.setdefault(id(stored), stored)
    return list(found.values())

"""The facts of whatever is given: a model, a file, or facts."""

from __future__ import annotations

import os

import keras

from tether.errors import TetherError, received
from tether.inspection.facts import Difference, Facts, difference
from tether.inspection.live import live_facts
from tether.layers.tying.state import from_above


def facts(source: object) -> Facts:
    """The facts of a model's sharing: what is stored, who uses it and how, what it takes.

    Args:
        source: A model or layer, the path of a `.keras`, `.weights.h5` or `.safetensors` file (read without making
            the model, and without reading a value), or facts.

    Returns:
        The facts. `.to_json()` gives them as what JSON can hold.

    Raises:
        TetherError: It is none of these, or a broken file.
        FileNotFoundError: There is no such file.

    Example:
    ```python
    facts = tether.inspection.facts(model)
    for weight in facts.shared():
        print(weight.path, weight.bytes, [use.where for use in facts.uses_of(weight)])
    ```
    """
    if isinstance(source, Facts):
        return source
    if isinstance(source, (str, os.PathLike)):
        from tether.inspection.stored import file_facts

        return file_facts(source)
    if isinstance(source, keras.layers.Layer):
        return live_facts(source)
    raise TetherError(
        "Facts are those of a Keras model or layer, or of the path of a file. " + received(source=type(source).__name__)
    )


def diff(before: object, after: object) -> Difference:
    """What differs in storing and sharing between two models, two files, or a model and a file.

    Args:
        before: A model or layer, the path of a file, or facts.
        after: The same.

    Returns:
        The differences, which print as text; false if there is none.

    Raises:
        TetherError: A side is none of these, or a broken file.
        FileNotFoundError: There is no such file.

    Example:
    ```python
    model.save("before.keras")
    model.get_layer("head").trainable = False
    print(tether.inspection.diff("before.keras", model))
    ```
    """
    return difference(facts(before), facts(after))


from_above.update(facts=facts)

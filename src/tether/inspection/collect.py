"""The facts of whatever is given, and how many numbers it stores: of a model, a file, or facts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

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


@dataclass(frozen=True)
class Count(Mapping[str, float | None]):
    """How many numbers a model stores, each weight counted once; as fields, and as a mapping of them.

    Attributes:
        trained: Those that train; `None` in the count of a file that does not say what trains.
        frozen: Those that do not; `None` where the file does not say.
        total: All of them.
        percent: How many of a hundred train.
    """

    trained: int | None
    frozen: int | None
    total: int
    percent: float | None

    def __getitem__(self, name: str) -> float | None:
        if name not in tuple(self):
            raise KeyError(name)
        value: float | None = getattr(self, name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __str__(self) -> str:
        if self.trained is None or self.frozen is None or self.percent is None:
            return f"{self.total:,} parameters; the file does not say which of them train"
        return f"{self.trained:,} of {self.total:,} parameters trained ({self.percent:.3g} %), {self.frozen:,} frozen"


def count(source: object) -> Count:
    """Counts the numbers that a model trains and those that are frozen, each stored weight once.

    State that is no weight, such as that of a random generator, does not count; moving means do.

    Args:
        source: A model or layer, the path of a file, or facts.

    Returns:
        The count, which prints as one line.

    Raises:
        TetherError: It is none of these, or a broken file.
        FileNotFoundError: There is no such file.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/query/kernel": tether.low_rank(8)}, freeze="all")
    print(tether.inspection.count(model))
    assert tether.inspection.count(model).percent < 50
    ```
    """
    return count_of(facts(source))


def count_of(found: Facts) -> Count:
    """The count of some facts."""
    sizes = [(math.prod(weight.shape), weight.trainable) for weight in found.weights if not weight.state]
    total = sum(size for size, _ in sizes)
    if any(trains is None for _, trains in sizes):
        return Count(None, None, total, None)
    trained = sum(size for size, trains in sizes if trains)
    return Count(trained, total - trained, total, 100 * trained / total if total else 0.0)

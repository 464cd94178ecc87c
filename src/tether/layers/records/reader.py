"""A tied layer that comes back: from a config, a file or a pickle, with the ties that its record names.

It stands above `tie`, which makes the ties again; the tied class asks for it by `from_above`.
"""

from __future__ import annotations

import io

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, received
from tether.layers.records.record import VERSION, read_record
from tether.layers.tying.state import from_above
from tether.layers.tying.tie import restore
from tether.layers.tying.tied import KEY, Tied
from tether.types import Config
from tether.weights.identity import sharing
from tether.weights.weight import Weight


def revive(base: type, config: Config) -> keras.Layer:
    """A layer of the base class from a config, with the ties that the config records."""
    config = dict(config)
    record = config.pop(KEY, None)
    layer = base.from_config(config)  # type: ignore[attr-defined]
    if record is not None:
        read = read_record(record)
        restore(layer, read.ties, read.takes, read.penalties)
    return layer


class TiedReader:
    """What a file's name for a tied layer stands for: finds the base that the config names.

    It is the tied subclass of whichever class the config names. Who asks whether it is a subclass of a
    layer class, as KerasHub does before it reads a preset, is told that it is.
    """

    __name__ = __qualname__ = "Tied"

    @property
    def __bases__(self) -> tuple[type, ...]:
        return tuple(_subclasses(keras.layers.Layer))

    def from_config(self, config: Config) -> keras.Layer:
        """The tied layer of a config that a stranger may have written.

        Raises:
            InvalidConfig: It names no layer class, or ties that cannot be read.
        """
        record = config.get(KEY)
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise InvalidConfig(
                f"A tied layer's config has the key {KEY!r} of version {VERSION}. {received(tether=record)}"
            )
        reference = record.get("base")
        if not isinstance(reference, dict) or set(reference) != {"module", "class_name", "registered_name"}:
            raise InvalidConfig(f"A tied layer's config names its class. {received(base=reference)}")
        if not all(isinstance(part, (str, type(None))) for part in reference.values()):
            raise InvalidConfig(f"A class is named by strings. {received(base=reference)}")
        try:
            base = keras_seam.find_class(reference)
        except Exception as error:
            raise InvalidConfig(f"The class of a tied layer cannot be found: {error}") from error
        if not isinstance(base, type) or not issubclass(base, keras.layers.Layer) or issubclass(base, (Tied, Weight)):
            raise InvalidConfig(f"A tied layer's class is a Keras layer. {received(base=reference)}")
        return revive(base, config)


def _subclasses(cls: type) -> dict[type, None]:
    found: dict[type, None] = {cls: None}
    waiting: list[type] = [cls]
    while waiting:
        below: list[type] = type.__subclasses__(waiting.pop())
        children = [child for child in below if child not in found]
        found.update(dict.fromkeys(children))
        waiting.extend(children)
    return found


keras_seam.register_reader(keras_seam.TIED_NAME, TiedReader())


def _unpickle(data: bytes, weights: dict[str, Weight]) -> keras.Layer:
    with sharing(dict(weights)):
        return keras_seam.load_from(io.BytesIO(data), compile=True)


from_above.update(revive=revive, unpickle=_unpickle)

__all__ = ["TiedReader", "revive"]

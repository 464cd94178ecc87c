"""Learning rates of their own for some weights: LoRA+, where the second factor learns faster than the first.

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354): with one rate for both,
the factor that starts at zero learns too slowly in wide models; 16 times that of the other is the paper's advice.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tether import keras_seam, patterns
from tether.errors import InvalidConfig, TetherError, UnknownName, received
from tether.patterns import Pattern
from tether.types import Config

SECOND_FACTORS = ("*_lora_b", "*_lora_b_[0-9]*")
LORA_PLUS: Mapping[Pattern, float] = {SECOND_FACTORS: 16.0}
NAME = "tether>LearningRates"


def learning_rates(
    optimizer: keras.Optimizer | str, multipliers: Mapping[Pattern, float] = LORA_PLUS, /
) -> keras.Optimizer:
    """An optimizer that multiplies its learning rate for some weights (LoRA+).

    It is of the class of the one that is given, with its settings and schedule, and steps weights that no pattern
    fits as that one does. Weight decay goes by the same rate. It may be inside of a `LossScaleOptimizer`, and comes
    back with a saved model. (The step of Ftrl is not proportional to its learning rate, and so not to a multiplier.)

    Args:
        optimizer: A Keras optimizer that has not stepped yet, or the name of one.
        multipliers: Factors of the learning rate by patterns of variables' paths (`tether.patterns`), a later one
            counting: `{"*_lora_b*": 16, "head/*": 0.1}`. Left out, the second factors of low-rank parts learn 16
            times as fast as all else.

    Returns:
        A new optimizer, for `compile`.

    Raises:
        TetherError: It is no optimizer, has stepped, or a multiplier is no positive number.
        UnknownName: At the first step, a pattern that fits no weight that trains.

    Example:
    ```python
    tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(8)})
    model.compile(tether.adapters.learning_rates(keras.optimizers.AdamW(1e-4)), "mse")
    ```
    """
    found = _plain(optimizer)
    given: object = multipliers
    if not (isinstance(given, Mapping) and given):
        raise TetherError(
            "Multipliers are positive numbers by pattern: `{'*_lora_b*': 16, 'head/*': 0.1}`. "
            f"{received(multipliers=multipliers)}"
        )
    for pattern, number in multipliers.items():
        list(patterns.parts(pattern))
        asked: object = number
        if isinstance(asked, bool) or not isinstance(asked, (int, float, np.number)) or not 0 < asked < math.inf:
            raise TetherError(
                f"A multiplier of a learning rate is a positive number. {received(pattern=pattern, multiplier=number)}"
            )
    keras_seam.set_untracked(found, "multipliers", {key: float(number) for key, number in multipliers.items()})
    keras_seam.set_untracked(found, "factors", {})
    found.__class__ = _rated(found.__class__)
    return found


def _plain(optimizer: object) -> Any:
    """A new optimizer with the settings of one."""
    try:
        given = keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        raise TetherError(f"`learning_rates` takes a Keras optimizer, or the name of one: {error}") from None
    if not isinstance(given, keras.optimizers.Optimizer):
        raise TetherError(
            f"`learning_rates` takes a Keras optimizer, or the name of one. {received(optimizer=optimizer)}"
        )
    if isinstance(given, LearningRates):
        raise TetherError(
            "The optimizer has learning rates of its own already. Give all multipliers at once: "
            f"`learning_rates(optimizer, {{**{given.multipliers}, ...}})`."
        )
    if isinstance(given, keras.optimizers.LossScaleOptimizer):
        raise TetherError(
            "A loss scale goes around the optimizer with rates: "
            "`keras.optimizers.LossScaleOptimizer(tether.adapters.learning_rates(inner))`."
        )
    if given.built:
        raise TetherError(
            f"The optimizer {given.name!r} has stepped already, and what it keeps for each weight is of its old rates. "
            "Give a new one."
        )
    return type(given).from_config(given.get_config())


@functools.cache
def _rated(base: Any) -> type:
    cls = type(base.__name__, (LearningRates, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    keras_seam.register_made(cls, NAME)
    return cls


class LearningRates(keras_seam.RatedOptimizer):
    """What comes before the class of the optimizer in `learning_rates`: the multipliers, by pattern."""

    multipliers: Mapping[Any, float]
    factors: dict[str, float]
    """By the paths of variables, as they were found."""

    def build(self, variables: list[keras.Variable]) -> None:
        """As the optimizer, once each pattern is known to fit.

        Raises:
            UnknownName: One fits none of the variables.
        """
        names = [variable.path for variable in variables]
        for pattern in self.multipliers:
            if not any(patterns.fits(pattern, name) for name in names):
                raise UnknownName(
                    f"No weight that the optimizer steps fits the pattern {pattern!r}. "
                    f"{patterns.missed(pattern, names)}"
                )
        super().build(variables)
        for variable in variables:  # now, before a step is compiled: a graph only looks the factors up
            self.factor_of(variable)

    def factor_of(self, variable: keras.Variable) -> float:
        """The multiplier of the last pattern that fits."""
        known: dict[str, float] = self.factors
        if variable.path not in known:
            fitting = (number for pattern, number in self.multipliers.items() if patterns.fits(pattern, variable.path))
            known[variable.path] = ([1.0, *fitting])[-1]
        return known[variable.path]

    def get_config(self) -> Config:
        """The plain optimizer and the multipliers, as JSON."""
        base: Any = type(self).__bases__[1]
        plain = keras.optimizers.serialize(base.from_config(super().get_config()))
        public = getattr(keras.optimizers, base.__name__, None)
        if isinstance(public, type) and issubclass(base, public):  # the name that other backends know too
            plain = {**plain, "module": "keras.optimizers", "registered_name": None}
        return {
            "optimizer": plain,
            "multipliers": [[_encoded(pattern), number] for pattern, number in self.multipliers.items()],
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, object] | None = None) -> keras.Optimizer:
        """The optimizer of a config."""
        return _Reader.from_config(config, custom_objects)


class _Reader:
    """What Keras hands the configs to: no class is known by the name, since each optimizer has its own."""

    @classmethod
    def from_config(cls, config: Any, custom_objects: Mapping[str, object] | None = None) -> keras.Optimizer:
        """The optimizer of a config that a stranger may have written.

        Raises:
            InvalidConfig: It is none that `learning_rates` wrote.
        """
        if not isinstance(config, dict) or set(config) != {"optimizer", "multipliers"}:
            raise InvalidConfig(f"Learning rates have an optimizer and multipliers. {received(config=config)}")
        try:
            plain = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects)
            return learning_rates(plain, {_decoded(pattern): number for pattern, number in config["multipliers"]})
        except (TetherError, ValueError, TypeError, KeyError, re.error) as error:
            raise InvalidConfig(f"Learning rates cannot be read: {error}") from error


def _encoded(pattern: object) -> list[object]:
    return [
        {"regex": each.pattern, "flags": each.flags} if isinstance(each, re.Pattern) else each
        for each in patterns.parts(pattern)
    ]


def _decoded(pattern: Any) -> tuple[Any, ...]:
    if not isinstance(pattern, list):
        raise TypeError(f"A pattern is a list. {received(pattern=pattern)}")
    return tuple(re.compile(each["regex"], each["flags"]) if isinstance(each, dict) else each for each in pattern)


keras_seam.register_reader(NAME, _Reader)

__all__ = ["learning_rates"]

"""Tether shares and combines the weights of Keras layers.

What a layer computes with is an expression over stored weights. Sharing is two layers whose
expressions name the same stored weight. Combining is an expression that names several.
"""

import importlib
from typing import TYPE_CHECKING

from tether import inspection, keras_seam, ops, weights
from tether.errors import TetherError, not_there
from tether.layers import Lambda, Repeat, bank, call, materialize, route, routed, tie, unbank, untie, weight_of
from tether.weights import Expression, Weight, expression, sharing

if TYPE_CHECKING:
    from tether import adapters, distribution, files, forms, planning, transfer
    from tether.forms.low_rank import low_rank
    from tether.inspection.checking import CheckCallback, check
    from tether.inspection.plotting import plot
    from tether.inspection.summary import summary
    from tether.layers.depth.share_depth import share_depth
    from tether.layers.family.extend import extend
    from tether.layers.family.inherit import inherit

__version__ = "0.1.0"
"""The version: the package's metadata takes it from this line."""

__all__ = [
    "CheckCallback",
    "Expression",
    "Lambda",
    "Repeat",
    "TetherError",
    "Weight",
    "adapters",
    "bank",
    "call",
    "check",
    "distribution",
    "extend",
    "files",
    "forms",
    "inherit",
    "inspection",
    "low_rank",
    "materialize",
    "ops",
    "planning",
    "plot",
    "route",
    "routed",
    "share_depth",
    "sharing",
    "summary",
    "tie",
    "transfer",
    "unbank",
    "untie",
    "weight_of",
    "weights",
]

_LATER = {
    "CheckCallback": "tether.inspection.checking",
    "adapters": "tether.adapters",
    "check": "tether.inspection.checking",
    "distribution": "tether.distribution",
    "extend": "tether.layers.family.extend",
    "files": "tether.files",
    "forms": "tether.forms",
    "inherit": "tether.layers.family.inherit",
    "low_rank": "tether.forms.low_rank",
    "planning": "tether.planning",
    "plot": "tether.inspection.plotting",
    "share_depth": "tether.layers.depth.share_depth",
    "summary": "tether.inspection.summary",
    "transfer": "tether.transfer",
}
"""What not every program needs: imported when it is first asked for, or when a file names an operator in it."""

expression.when_unknown(lambda: importlib.import_module("tether.forms"))
keras_seam.register_reader_of("tether>LearningRates", "tether.adapters.rates")


if not TYPE_CHECKING:  # or every name would pass a type checker

    def __getattr__(name: str) -> object:
        """Imports what is asked for the first time."""
        if name not in _LATER:
            raise AttributeError(not_there("tether", name, __all__))
        module = importlib.import_module(_LATER[name])
        found = module if module.__name__ == f"tether.{name}" else getattr(module, name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return __all__

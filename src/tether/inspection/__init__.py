"""The facts of a model's sharing."""

from tether.inspection.aliases import Aliases, aliases
from tether.inspection.collect import diff, facts
from tether.inspection.difference import Change, Difference
from tether.inspection.facts import Facts, Slot, StoredWeight, UseOf
from tether.inspection.gradients import Gradients, UseGradient, WeightGradient, gradients
from tether.inspection.unique import unique

__all__ = [
    "Aliases",
    "Change",
    "Difference",
    "Facts",
    "Gradients",
    "Slot",
    "StoredWeight",
    "UseGradient",
    "UseOf",
    "WeightGradient",
    "aliases",
    "diff",
    "facts",
    "gradients",
    "unique",
]

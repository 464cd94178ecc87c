"""The facts of a model's sharing."""

from tether.inspection.collect import diff, facts
from tether.inspection.facts import Change, Difference, Facts, Slot, StoredWeight, UseOf
from tether.inspection.gradients import Gradients, UseGradient, WeightGradient, gradients
from tether.inspection.live import Aliases, aliases, unique

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

"""The facts of a model's sharing."""

from tether.inspection.aliases import Aliases, aliases
from tether.inspection.collect import diff, facts
from tether.inspection.difference import Change, Difference
from tether.inspection.facts import Facts, Slot, StoredWeight, UseOf
from tether.inspection.unique import unique

__all__ = [
    "Aliases",
    "Change",
    "Difference",
    "Facts",
    "Slot",
    "StoredWeight",
    "UseOf",
    "aliases",
    "diff",
    "facts",
    "unique",
]

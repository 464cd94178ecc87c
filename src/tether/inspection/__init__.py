"""The facts of a model's sharing."""

import importlib

from tether.inspection.collect import Count, count, diff, facts
from tether.inspection.facts import AdapterOf, Change, Difference, Facts, Slot, StoredWeight, UseOf, shown_by
from tether.inspection.gradients import Gradients, UseGradient, WeightGradient, gradients
from tether.inspection.live import Aliases, aliases, unique

__all__ = [
    "AdapterOf",
    "Aliases",
    "Change",
    "Count",
    "Difference",
    "Facts",
    "Gradients",
    "Slot",
    "StoredWeight",
    "UseGradient",
    "UseOf",
    "WeightGradient",
    "aliases",
    "count",
    "diff",
    "facts",
    "gradients",
    "unique",
]

# In a notebook facts are the table of their summary, which is imported when it is first shown.
shown_by(lambda facts: str(importlib.import_module("tether.inspection.summary").Summary(facts)._repr_html_()))

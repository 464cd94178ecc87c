"""The rules, a file for each family: importing it registers its rules, and nothing else has to know it."""

import importlib
import pkgutil

from tether.inspection.checking.finding import RULES, Rule

for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")

__all__ = ["RULES", "Rule"]

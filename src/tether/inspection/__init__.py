"""The facts of a model's sharing."""

from tether.inspection.aliases import Aliases, aliases
from tether.inspection.unique import unique

__all__ = ["Aliases", "aliases", "unique"]

"""Sharing short of one variable: a copy, a penalty that keeps weights close, an average that follows."""

from tether.transfer.copy import copy
from tether.transfer.follow import Follow
from tether.transfer.soft_tie import SoftTie, soft_tie, soft_ties

__all__ = ["Follow", "SoftTie", "copy", "soft_tie", "soft_ties"]

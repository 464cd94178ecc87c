"""Findings: sharing that is broken, or only looks like sharing."""

from tether.inspection.checking.callback import CheckCallback
from tether.inspection.checking.examine import check

__all__ = ["CheckCallback", "check"]

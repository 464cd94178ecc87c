"""Findings: sharing that is broken, or only looks like sharing."""

from tether.inspection.checking.examine import CheckCallback, check

__all__ = ["CheckCallback", "check"]

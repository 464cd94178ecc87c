"""The operators of expressions, one theme a file; importing this registers them for files."""

from tether.weights.operators import (
    adapted,
    arithmetic,
    choosing,
    function,
    gradient,
    joining,
    quantized,
    structure,
)
from tether.weights.operators.registry import OPERATORS, register

__all__ = [
    "OPERATORS", "adapted", "arithmetic", "choosing", "function", "gradient", "joining", "quantized", "register",
    "structure",
]  # fmt: skip

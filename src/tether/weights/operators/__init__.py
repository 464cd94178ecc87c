"""The operators of expressions, one theme a file; importing this registers them for files."""

from tether.weights.operators import arithmetic, choice, function, indexing, quantized, structure

__all__ = ["arithmetic", "choice", "function", "indexing", "quantized", "structure"]

"""Files that keep a tie, and that are whole at every moment."""

from tether.files.save import save_model

__all__ = ["save_model"]

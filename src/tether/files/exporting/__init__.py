"""A model in a format that runs without Keras, with each weight stored once."""

from tether.files.exporting.export import Exported, export

__all__ = ["Exported", "export"]

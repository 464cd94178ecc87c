"""A model in a format that runs without Keras, with each weight stored once."""

from tether.files.exporting.exporter import Exported, export

__all__ = ["Exported", "export"]

"""The command `tether`.

It lies beside the package and not in it: `import tether` imports Keras, which takes seconds and asks for its backend.
Here the backend is chosen first, and help and version are told without either.
"""

from tether_cli.commands import app, main

__all__ = ["app", "main"]

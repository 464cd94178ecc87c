"""Checks that need several devices: JAX simulates them, in a process that says so before it starts.

Run as `python -m tests.distribution.simulated GROUP`: it runs the checks of a group and prints what failed, by name, as
JSON. `tests.distribution.running` starts it on a number of devices.
"""

import json
import sys
import time
import traceback

CHECKS: dict[str, dict[str, object]] = {}
"""The checks of each group, by name."""


def check(group):
    """Registers a check: a function that raises if something is wrong."""

    def register(function):
        CHECKS.setdefault(group, {})[function.__name__] = function
        return function

    return register


def main(group):
    """Runs a group; what each check raised, `None` if nothing, and the seconds that it took."""
    said = {}
    for name, function in CHECKS[group].items():
        started = time.perf_counter()
        try:
            function()
            error = None
        except Exception:
            error = traceback.format_exc()
        said[name] = [error, round(time.perf_counter() - started, 1)]
    print(json.dumps(said))


if __name__ == "__main__":
    import importlib

    from tests.distribution import simulated  # the module of the checks registers there, and not in __main__

    importlib.import_module(f"tests.distribution.{sys.argv[1]}")
    simulated.main(sys.argv[1])

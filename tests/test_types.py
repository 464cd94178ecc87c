"""What type checkers tell a user of the installed package: types, slips, and no names that are not there."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import sysconfig
import types
import venv

import pytest

import tether

pytestmark = pytest.mark.spread

USER = pathlib.Path(__file__).parent / "fixtures/typed_user.py"
OF_KERAS = {"Dense", "Layer", "Model"}
OTHERS = "jax.*,torch.*,tensorflow.*,h5py.*,ml_dtypes.*,onnx.*,optree.*,rich.*,typer.*,opt_einsum.*"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python that has the package installed, wherever the one is that is tested."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    source = pathlib.Path(tether.__file__).parents[1]
    (packages / "tether.pth").write_text(f"{source}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return folder / "bin/python"


def expected(checker, *, keras_is_known=True):
    """What the comments of the user's file say of each line: a type, or `error`."""
    found = {}
    for number, line in enumerate(USER.read_text(encoding="utf-8").splitlines(), 1):
        _, comment, said = line.partition("  # ")
        if comment:
            said, _, other = said.removesuffix(")").partition(" (mypy: ")
            said = other if other and checker == "mypy" else said
            found[number] = said if keras_is_known or said not in OF_KERAS else "Any"
    return found


def by_mypy(python, folder, file, *, keras_is_known=False):
    """What strict mypy says of a file, by line. That Keras has no types is not the user's fault."""
    of_keras = "follow_untyped_imports" if keras_is_known else "ignore_missing_imports"
    config = folder / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = true\ndisallow_subclassing_any = false\n"
        f"disallow_untyped_calls = false\n[mypy-keras.*]\n{of_keras} = true\n[mypy-{OTHERS}]\nfollow_imports = skip\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", folder / "cache"]
    return said_of(file, [*command, "--python-executable", python, file], r'note: Revealed type is "(.+)"')


def by_pyright(python, file):
    """The same of pyright."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", python, file]
    return said_of(file, command, r'information: Type of ".+" is "(.+)"')


def said_of(file, command, revealed):
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found = {}
    for path, number, rest in re.findall(r"^\s*(\S+?\.py):(\d+):(?:\d+)?[ :-]*(.*)$", ran.stdout, re.MULTILINE):
        assert pathlib.Path(path).name == file.name, f"an error in the package: {path}:{number} {rest}"
        kind = re.match(revealed, rest)
        if kind:
            found[int(number)] = re.sub(r"(?:\w+\.)+(\w+)", r"\1", kind[1])
        elif rest.startswith("error"):
            found[int(number)] = "error"
    return found


def test_mypy_knows_types_and_slips(python, tmp_path):
    """Keras has no types for it, as a rule: what is of Keras's is `Any` then, and the rest is not."""
    assert by_mypy(python, tmp_path, USER) == expected("mypy", keras_is_known=False)


def test_every_public_name_is_known_to_mypy(python, tmp_path):
    """Modules are imported when they are asked for, and forms are found in their folder, which no checker sees."""
    lines = ["import tether"]
    for name in tether.__all__:
        lines.append(f"tether.{name}")
        found = getattr(tether, name)
        if isinstance(found, types.ModuleType):
            lines += [f"tether.{name}.{inner}" for inner in found.__all__]
    assert len(lines) > 80
    file = tmp_path / "names.py"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = by_mypy(python, tmp_path, file)
    assert not {lines[number - 1]: found for number, found in said.items()}


@pytest.mark.slow
def test_mypy_follows_keras(python, tmp_path):
    """With `follow_untyped_imports` for Keras, layers and models are what they are."""
    assert by_mypy(python, tmp_path, USER, keras_is_known=True) == expected("mypy")


@pytest.mark.slow
def test_pyright_knows_types_and_slips(python):
    if importlib.util.find_spec("pyright") is None:
        pytest.fail("What pyright says is tested, and it is not installed: make pyright")
    assert by_pyright(python, USER) == expected("pyright")

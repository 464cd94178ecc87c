"""The contract that imports never go in a circle, on small packages."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/check_circles.py"


def check(folder, **sources):
    for name, source in {"__init__": "", **sources}.items():
        path = folder / "package" / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    ran = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize(
    "back",
    [
        "from package.a import x",
        "import package.a",
        "from package import a",
        "def f():\n    from package.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.a import x",
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(tmp_path, back):
    code, said = check(tmp_path, a="from package.b import y", b=back)
    assert code == 1 and "package.a" in said and "package.b" in said


def test_a_long_circle_is_named_whole(tmp_path):
    code, said = check(tmp_path, a="import package.b", b="import package.c", c="import package.a", d="import package.a")
    assert code == 1
    assert all(f"package.{name}" in said for name in "abc") and "package.d" not in said


def test_imports_one_way_are_kept_and_so_is_a_folder_that_gathers_its_files(tmp_path):
    code, said = check(
        tmp_path,
        a="from package.deep.one import x\nfrom package.deep import two",
        deep__in____init__="from package.deep.one import x\nfrom package.deep.two import z",
        deep__in__one="import keras",
        deep__in__two="from package.deep import one",
    )
    assert (code, "KEPT (5 files)" in said) == (0, True), said


def test_tether_has_no_circle():
    ran = subprocess.run(
        [sys.executable, SCRIPT, SCRIPT.parents[1] / "src"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout

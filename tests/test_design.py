"""`docs/design.md`: its walks are what runs, its files are there, its picture is the present one."""

import ast
import collections
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/tether"
TEXT = (ROOT / "docs/design.md").read_text(encoding="utf-8")


def script(name):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


walks = script("walks")


def told(walk):
    """The files that the page names for a walk."""
    section = TEXT.split(f"### {walk}\n")[1].split("\n##")[0]
    return set(re.findall(r"`([a-z_/]+\.py)`", section))


@pytest.mark.parametrize("walk", walks.WALKS)
def test_a_walk_passes_the_files_that_the_page_names(walk):
    named, passed = told(walk), set(walks.walked(walk).files)
    assert passed - named == set(), "not on the page"
    own = {file for file in named if not file.startswith("keras_seam/")}  # which of the seam, depends on the backend
    assert own - passed == set(), "not passed"


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", TEXT)) | set().union(*map(told, walks.WALKS))
    assert len(named) > 40
    missing = [file for file in named if not any((root / file).is_file() for root in (ROOT, SOURCE))]
    assert missing == []


def test_the_map_names_every_folder_and_file_at_the_top():
    block = TEXT.split("```text\n")[1].split("```")[0]
    named = set(re.findall(r"^  (\S+)", block, re.M))
    top = {path.name + "/" if path.is_dir() else path.name for path in SOURCE.iterdir()}
    assert named == {name for name in top if name.endswith(("/", ".py"))} - {"__pycache__/", "__main__.py"}


def test_the_picture_shows_the_rooms_and_arrows_of_today():
    house = script("draw_house")
    there = house.PICTURE.read_text(encoding="utf-8")
    assert house.rooms_and_arrows(house.draw()) == house.rooms_and_arrows(there), "run scripts/draw_house.py"
    assert there.count("<path d=") > 10


def test_no_two_modules_and_no_two_classes_have_one_name():
    modules = [path for path in SOURCE.rglob("*.py") if not path.stem.startswith("__")]
    classes = [
        node.name
        for path in modules
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    for names in ([path.stem for path in modules], classes):
        assert [name for name, count in collections.Counter(names).items() if count > 1] == []

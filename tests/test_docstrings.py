"""Docstrings of public names: what they say, and their examples, which run after the lines of docs/reference.md."""

import inspect
import re

import pytest

import tether
from tests import fake_hub
from tests.documents import ROOT, python_blocks, run

pytestmark = pytest.mark.spread

MODULES = (
    "", "ops", "forms", "transfer", "planning", "files", "adapters", "distribution", "inspection", "weights", "errors",
)  # fmt: skip
PAGE = "docs/reference.md"
SECTION = re.compile(r"^(\w+):\n((?:    .*\n|\n)*)", re.MULTILINE)
# Where nothing can go wrong, or only what Python itself reports.
RAISES_NOTHING = {
    "tether.adapters.disabled",
    "tether.adapters.names",
    "tether.adapters.strengths",
    "tether.inspection.aliases",
    "tether.inspection.unique",
    "tether.planning.cached",
    "tether.transfer.soft_ties",
}


def errors_of(module):
    return [name for name, thing in vars(module).items() if inspect.isclass(thing) and issubclass(thing, Exception)]


def public_names():
    """Each public object once, under the shortest of its names; modules too."""
    found = {}
    for name in MODULES:
        module = getattr(tether, name) if name else tether
        found[id(module)] = (module.__name__, module)
        for public in getattr(module, "__all__", None) or errors_of(module):
            thing = getattr(module, public)
            if not inspect.ismodule(thing):
                found.setdefault(id(thing), (f"{module.__name__}.{public}", thing))
    return dict(found.values())


PUBLIC = public_names()
FUNCTIONS = sorted(name for name, thing in PUBLIC.items() if inspect.isfunction(thing))
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
WITH_EXAMPLE = sorted(name for name, thing in PUBLIC.items() if EXAMPLE.search(inspect.getdoc(thing) or ""))


def sections(name):
    return {match[1]: match[2] for match in SECTION.finditer(inspect.getdoc(PUBLIC[name]) + "\n")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_returns_and_raises(name):
    said = sections(name)
    signature = inspect.signature(PUBLIC[name])
    described = re.findall(r"^    (\*{0,2}\w+): ", said.get("Args", ""), re.MULTILINE)
    assert [one.lstrip("*") for one in described] == list(signature.parameters)
    assert ("Returns" in said or "Yields" in said) == (signature.return_annotation not in ("None", "Iterator[None]"))
    assert ("Raises" in said) != (name in RAISES_NOTHING)
    for error in re.findall(r"^    (\w+): ", said.get("Raises", ""), re.MULTILINE):
        assert hasattr(tether.errors, error) or error in ("FileNotFoundError", "TypeError")
    assert name in WITH_EXAMPLE


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub.install(monkeypatch, tmp_path / "hub")
    namespace = {"__name__": name}
    ((line, code),) = python_blocks(PAGE)
    run(PAGE, code, line, namespace)
    for number, code in enumerate(EXAMPLE.findall(inspect.getdoc(PUBLIC[name])), 1):
        exec(compile(code, f"<example {number} of {name}>", "exec"), namespace)


def test_the_page_names_the_modules_that_are_public():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert re.findall(r"^\| `(tether[.\w]*)`", text, re.MULTILINE) == [f"tether.{name}".rstrip(".") for name in MODULES]

"""The package as others get it: its metadata, its README on an index, and what its repository offers to others."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import types
import zipfile

import pytest
import yaml

import tether
from tests.documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
URLS = PROJECT["project"]["urls"]
HOME = URLS["Homepage"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(name):
    return yaml.safe_load(read(name))


# --------------------------------------------------------------------------- metadata


def test_the_version_has_one_source():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/tether/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.dev\d+)?", tether.__version__)
    assert read("src/tether/__init__.py").count(f'__version__ = "{tether.__version__}"') == 1


def test_the_citation_is_of_this_version():
    citation = parsed("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == tether.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == HOME
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]
    released = re.search(rf"^## \[{re.escape(tether.__version__)}\] - (\S+)$", read("CHANGELOG.md"), re.M)
    assert str(citation.get("date-released")) == (released[1] if released else "None")


def test_every_address_of_the_repository_is_the_one_of_the_project():
    assert all(url.startswith(HOME) for url in URLS.values())
    owner = HOME.removeprefix("https://github.com/")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in [*(name for name in files if name.endswith((".md", ".yml", ".yaml", ".cff"))), "action.yml"]:
        if (ROOT / name).is_file():
            for found in re.findall(r"(?:github\.com/|uses: )([\w-]+/tether)\b", read(name)):
                assert found == owner, name


def test_the_extras_that_documents_name_exist():
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {"jax", "tensorflow", "torch", "export"} <= extras
    named = {
        name
        for page in ("README.md", "docs/exports.md", "RELEASING.md")
        for name in re.findall(r"(?:tether|checkout)\[([\w,-]+)\]", read(page))
    }
    assert named
    assert {extra for text in named for extra in text.split(",")} <= extras
    assert set(re.findall(r"\[\.?(\w+)\]'", read("Makefile"))) <= extras


# --------------------------------------------------------------------------- the README on an index


@pytest.fixture
def build_readme(monkeypatch):
    """The hook, without Hatch, which only the one who builds has."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = type("MetadataHookInterface", (), {"root": str(ROOT)})
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("build_readme", ROOT / "scripts/build_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_of_the_readme_is_absolute_and_leads_to_a_file(build_readme):
    metadata = {"version": tether.__version__, "urls": URLS}
    build_readme.ReadmeHook().update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown"
    before, after = LINK.findall(read("README.md")), LINK.findall(metadata["readme"]["text"])
    assert len(before) == len(after) > 10
    pictures = 0
    for old, new in zip(before, after, strict=True):
        if "://" in old:
            assert new == old
            continue
        kind, tag, path = re.fullmatch(rf"{re.escape(HOME)}/(raw|blob)/([^/]+)/(.+)", new).groups()
        assert (tag, path) == (f"v{tether.__version__}", old)
        assert (ROOT / path.partition("#")[0]).is_file()
        assert (kind == "raw") == (ROOT / path).name.endswith((".svg", ".png"))
        pictures += kind == "raw"
    assert pictures == 1


def test_only_links_of_the_text_are_changed(build_readme):
    text = "[a](b.md#c) [d](#e) [f](https://g)\n![h](./i.png)\n\n```md\n[j](k.md)\n```\n[m](mailto:n@o)"
    assert build_readme.with_absolute_links(text, "https://home", "v1") == (
        "[a](https://home/blob/v1/b.md#c) [d](#e) [f](https://g)\n![h](https://home/raw/v1/i.png)\n\n"
        "```md\n[j](k.md)\n```\n[m](mailto:n@o)"
    )


# --------------------------------------------------------------------------- what was built


@pytest.fixture
def check_dist():
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / "scripts/check_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_of_the_package_is_all_that_is_no_python(check_dist):
    assert {name for name in check_dist.sources() if not name.endswith(".py")} == check_dist.DATA


def wheel(folder, names, readme):
    path = folder / "keras_tether-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
        file.writestr("keras_tether-9.9.9.dist-info/METADATA", f"Name: keras-tether\nVersion: 9.9.9\n\n{readme}")
    return path


def test_a_wheel_that_lacks_a_file_or_has_one_too_many_is_found(check_dist, tmp_path):
    links = "[a](https://home) " * 10
    assert check_dist.check_wheel(wheel(tmp_path, check_dist.sources(), links)) == "9.9.9"
    with pytest.raises(check_dist.Wrong, match=r"missing \['tether/inspection/plotting/map\.js'\], unwanted \[\]"):
        check_dist.check_wheel(wheel(tmp_path, check_dist.sources() - {"tether/inspection/plotting/map.js"}, links))
    with pytest.raises(check_dist.Wrong, match=r"unwanted \['tests/test_cli\.py'\]"):
        check_dist.check_wheel(wheel(tmp_path, {*check_dist.sources(), "tests/test_cli.py"}, links))
    with pytest.raises(check_dist.Wrong, match=r"relative: \['docs/a\.md'\]"):
        check_dist.check_wheel(wheel(tmp_path, check_dist.sources(), links + "[b](docs/a.md)"))


def test_a_tag_is_that_of_a_release_that_the_changelog_and_the_citation_know(check_dist, monkeypatch):
    files = {"CHANGELOG.md": "## [1.2.3] - 2030-01-02\n", "CITATION.cff": 'date-released: "2030-01-02"\n'}
    monkeypatch.setattr(check_dist, "_read", files.get)
    check_dist.check_tag("v1.2.3", "1.2.3")
    with pytest.raises(check_dist.Wrong, match=r"its tag is v1\.2\.3"):
        check_dist.check_tag("v1.2.4", "1.2.3")
    with pytest.raises(check_dist.Wrong, match="has no heading"):
        check_dist.check_tag("v1.2.4", "1.2.4")
    files["CITATION.cff"] = "date-released: 2030-01-03\n"
    with pytest.raises(check_dist.Wrong, match="date-released: 2030-01-02"):
        check_dist.check_tag("v1.2.3", "1.2.3")


# --------------------------------------------------------------------------- workflows, action, hook

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
USES = re.compile(r"\./\S+|[\w-]+/[\w./-]+@(v\d+|release/v\d+)")


def steps(data):
    jobs = data["jobs"].values() if "jobs" in data else [data["runs"]]
    return [step for job in jobs for step in job.get("steps", [])]


def named_targets(text):
    """The targets of `make` that a script asks for."""
    for words in re.findall(r"^make (.*)$", re.sub(r"\$\{\{.*?\}\}", "", text), re.M):
        yield from (word for word in words.split() if "=" not in word and not word.startswith(("$", '"')))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_what_it_needs(path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert data["name"] and data[True]  # YAML 1.1 reads the key `on` as true
    assert data["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    asked = []
    for name, job in data["jobs"].items():
        for needed in job.get("needs", []):
            assert needed in data["jobs"]
        if "uses" in job:
            assert USES.fullmatch(job["uses"]) and (ROOT / job["uses"]).is_file()
            continue
        assert job["runs-on"] and job["timeout-minutes"], name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or USES.fullmatch(step["uses"]), step
            asked += named_targets(step.get("run", ""))
    assert asked and set(asked) <= targets


def test_the_matrix_is_every_supported_python_and_backend():
    matrix = parsed(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    versions = [line.rpartition(" :: ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert matrix["python"] == versions
    assert f">={versions[0]}" == PROJECT["project"]["requires-python"]
    assert set(matrix["backend"]) == set(re.search(r"^BACKENDS := (.*)$", read("Makefile"), re.M)[1].split())


def test_only_a_tag_is_published_after_tests_and_without_a_password():
    data = parsed(".github/workflows/release.yml")
    assert data[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}}
    publish = data["jobs"]["publish"]
    assert set(publish["needs"]) == set(data["jobs"]) - {"publish"}
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]
    assert [name for name, job in data["jobs"].items() if "permissions" in job] == ["publish"]
    assert "secrets." not in read(".github/workflows/release.yml")
    assert any('dist TAG="$GITHUB_REF_NAME"' in step.get("run", "") for step in data["jobs"]["build"]["steps"])


@pytest.mark.parametrize("name", ["action.yml", *(f".github/workflows/{path.name}" for path in WORKFLOWS)])
def test_no_script_is_made_of_what_others_write(name):
    for step in steps(parsed(name)):
        for value in re.findall(r"\$\{\{(.*?)\}\}", step.get("run", "")):
            assert value.strip().startswith("matrix."), f"{value} belongs in `env:`"


# --------------------------------------------------------------------------- the action does what it says

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>calls
for each in "$@"; do if [ "$each" = sarif ]; then echo '{}'; fi; done
exit ${CODE:-0}
"""


@pytest.fixture
def act(tmp_path):
    """Runs the step of the action that checks, with a stand-in for the command."""
    data = parsed("action.yml")
    assert data["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in steps(data))
    (check,) = (step for step in steps(data) if step.get("id") == "check")
    given = {name: entry.get("default", "") for name, entry in data["inputs"].items()}
    (tmp_path / "tether").write_text(FAKE)
    (tmp_path / "tether").chmod(0o755)

    def run(code=0, **inputs):
        for name in ("calls", "output"):
            (tmp_path / name).write_text("")
        values = {**given, **inputs}
        environment = {
            key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda match: values[match[1]], text)
            for key, text in check["env"].items()
        }
        environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "GITHUB_OUTPUT": "output", "CODE": str(code)}
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", check["run"]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done, (tmp_path / "calls").read_text().splitlines(), (tmp_path / "output").read_text()

    return run


def test_the_action_checks_the_files_that_there_are(act, tmp_path):
    for name in ("one model.keras", "two.keras"):
        (tmp_path / name).touch()
    done, calls, output = act(files="*.keras\nthree.weights.h5", options="--ignore\nequal-weights:*.keras")
    assert done.returncode == 0, done.stderr
    files = ["one model.keras", "two.keras", "three.weights.h5"]
    assert calls == ["check", *files, "--ignore", "equal-weights:*.keras", "--format", "sarif"]
    assert (output, (tmp_path / "tether.sarif").read_text()) == ("sarif=tether.sarif\n", "{}\n")


def test_the_action_fails_where_the_check_does(act, tmp_path):
    done, calls, output = act(code=1, files="one.keras", sarif="found.sarif")
    assert done.returncode == 1
    assert calls == ["check", "one.keras", "--format", "sarif", "check", "one.keras"]  # and says why, in the log
    assert output == "sarif=found.sarif\n"
    assert act(code=2, files="one.keras")[0].returncode == 2
    done, calls, _ = act(files="*.keras")
    assert (done.returncode, calls) == (2, [])
    assert "No file matches" in done.stdout


def test_what_the_action_is_given_is_no_code(act, tmp_path):
    act(files='a.keras; touch "ran" $(touch ran) `touch ran`', options="$(touch ran)", sarif="found.sarif")
    assert not (tmp_path / "ran").exists()


def test_the_hook_of_pre_commit_is_one():
    (hook,) = parsed(".pre-commit-hooks.yaml")
    assert {"id", "name", "entry", "language"} <= set(hook)
    assert hook["entry"] == "tether check"
    wanted = re.compile(hook["files"])
    assert all(wanted.search(name) for name in ("m.keras", "a/m.weights.h5", "m.safetensors"))
    assert not any(wanted.search(name) for name in ("keras", "m.h5", "m.py", "m.keras.md"))

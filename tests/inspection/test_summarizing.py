"""The summary: everything is said at every width, in plain text, on terminals and in notebooks."""

import gc
import html.parser
import io
import os
import re
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import tether
from tests.inspection import models
from tests.inspection.models import MODELS, fitted, values
from tether.inspection import Facts, StoredWeight, UseOf, facts
from tether.inspection.facts import human_bytes
from tether.inspection.summary import NARROWEST, fold, literal

layers = keras.layers
TITLE = r"weight, and what reads it +shape"
SILENT = {"print_fn": lambda line: None}


def text(source, width=100, **options):
    return str(tether.summary(source, width=width, **SILENT, **options))


def bare(words):
    """Without white space, which folding changes."""
    return re.sub(r"\s", "", words)


def rows(source, **options):
    """The rows of a wide summary, up to the totals."""
    body = text(source, 300, **options).split("\n\n")[1]
    return body.splitlines()[2:]


# --------------------------------------------------------------------------- what it says


def test_a_tied_autoencoder_reads_like_this():
    model = fitted(models.tied_autoencoder(), "adam")
    assert text(model) == (
        "autoencoder\n"
        "\n"
        "weight, and what reads it  shape   dtype    bytes  trains   optimizer\n"
        "---------------------------------------------------------------------\n"
        "encode/bias                (3,)    float32   12 B  trained       24 B\n"
        "codec (shared by 2 uses)   (6, 3)  float32   72 B  trained      144 B\n"
        "  encode/kernel = codec                            trained\n"
        "  decode/kernel = codec.T  (3, 6)                  trained\n"
        "decode/bias                (6,)    float32   24 B  trained       48 B\n"
        "\n"
        "stored     108 B  3 weights, 27 parameters (27 trained, 0 frozen)\n"
        "unshared   180 B  if every use were a variable of its layer\n"
        "saved       72 B  40.0% of unshared: 1 weight shared by 2 uses\n"
        f"optimizer  {facts(model).optimizer_bytes} B  8 variables"
    )


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_said_at_every_width(name):
    found = facts(MODELS[name]())
    for width in (300, 100, 80, 79, 60, 40, NARROWEST):
        lines = text(found, width).splitlines()
        assert max(map(cell_len, lines)) <= width
        said = bare("".join(lines))
        header = next((line for line in lines if re.match(TITLE, line)), None)
        names = said if header is None else bare("".join(line[: header.index("shape")] for line in lines))
        for weight in found.weights:
            assert bare(weight.path) in names and bare(f"{weight.shape}") in said and weight.dtype in said
            assert bare(human_bytes(weight.bytes)) in said
            for use in found.uses_of(weight):
                assert not use.expression or bare(f"{use.where} = {use.expression}") in names
                assert use.reaches(weight) or "frozen" in said
        assert bare(human_bytes(found.stored_bytes)) in said and bare(human_bytes(found.unshared_bytes)) in said


@pytest.mark.parametrize("name", ["plain", "block", "low_rank_child", "with_state"])
def test_a_hundred_columns_are_enough_for_columns(name):
    assert re.search(f"^{TITLE}", text(fitted(MODELS[name](), "adam")), re.MULTILINE)


def test_a_use_that_is_frozen_is_marked_by_itself():
    said = rows(models.frozen_use())
    start = next(number for number, line in enumerate(said) if line.startswith("w (shared by 3 uses)"))
    assert [(line.split()[0], line.split()[-1]) for line in said[start : start + 4]] == [
        ("w", "trained"), ("a/kernel", "trained"), ("b/kernel", "frozen"), ("c/kernel", "frozen")
    ]  # fmt: skip


def test_under_a_frozen_weight_a_use_that_trains_others_is_frozen():
    said = text(models.low_rank_child(), 300)
    under = said[said.index("parent/kernel (shared") :].splitlines()
    assert [line.split()[-1] for line in under[:3]] == ["frozen"] * 3
    under = said[said.index("parent/kernel_lora_a") :].splitlines()
    assert [line.split()[-1] for line in under[:2]] == ["trained"] * 2


def test_a_plain_weight_takes_one_line():
    model = keras.Sequential([keras.Input((4,)), *(layers.Dense(4) for _ in range(20))])
    assert len(rows(model)) == 40 == len(model.weights)


def test_weights_of_one_path_are_told_apart_by_their_layers():
    class Twice(layers.Layer):
        def __init__(self):
            super().__init__(name="twice")
            self.parts = [layers.Dense(2, use_bias=False, name=name) for name in ("one", "two")]
            for part in self.parts:
                part.build((None, 2))
                part.kernel._path = "same/kernel"

    assert [line.split()[0] for line in rows(Twice())] == ["same/kernel", "one/kernel", "same/kernel", "two/kernel"]


def test_what_is_shared_alone():
    model = models.transposed_head()
    said = rows(model, shared_only=True)
    assert [line.split()[0] for line in said] == [
        "encoder/embed/embeddings",
        "encoder/embed/embeddings",
        "top/lm_head/kernel",
    ]
    hidden = [w for w in facts(model).weights if w.shape != (7, 3)]
    size = human_bytes(sum(w.bytes for w in hidden))
    assert f"{len(hidden)} weights with no use but the layer's own ({size}) not listed." in text(
        model, shared_only=True
    )
    assert "stored" in text(models.plain(), shared_only=True)


def test_what_sharing_saves_and_what_it_costs():
    model = models.more_than_unshared()
    found = facts(model)
    assert f"{human_bytes(found.stored_bytes - found.unshared_bytes)} more than unshared" in text(model)
    assert re.search(r"^saved +0 B  no weight is shared$", text(models.plain()), re.MULTILINE)
    assert re.search(r"2 weights shared by 4 uses", text(models.low_rank_child()))


def test_what_is_written_twice_is_marked():
    said = rows(models.private_sharing())
    (again,) = [line.strip() for line in said if "again" in line]
    assert again == "stored again at layers/dense_1/vars/0"


def test_a_weight_that_nobody_reads_is_marked():
    weight = StoredWeight("vars/0", (2,), "float32", path="alone", trainable=True)
    assert "alone (not used)" in text(Facts("model", (weight,), ()))
    assert "not used" not in text(Facts("model", (weight,), (), ties=False))


def test_state_is_told_from_weights():
    state = StoredWeight("vars/0", (2,), "int64", trainable=False, state=True)
    said = text(Facts("model", (state,), ()))
    assert "0 weights, 0 parameters, 1 entry of state" in said and re.search(r"vars/0 .* state$", said, re.MULTILINE)


# --------------------------------------------------------------------------- files


def test_a_file_says_what_it_holds(tmp_path):
    model = fitted(models.tied_autoencoder(), "adam")
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    said = text(tmp_path / "m.keras")
    assert "codec (shared by 2 uses)" in said and "decode/kernel = codec.T" in said and "encode/vars/1" in said
    assert said.splitlines()[-4:] == text(model).splitlines()[-4:]
    assert "the file does not say" not in said


def test_a_file_says_what_it_does_not_hold(tmp_path):
    model = models.tied_autoencoder()
    model.save_weights(tmp_path / "m.weights.h5")
    said = text(tmp_path / "m.weights.h5")
    assert re.search(r"^codec .* \?$", said, re.MULTILINE) and "?: the file does not say." in said
    uses = tuple(UseOf("encode", None, "codec", ("vars/0",), (2,), "float32") for _ in range(2))
    found = Facts("file", (StoredWeight("vars/0", (2,), "float32", path="codec"),), uses, ties=False)
    assert "does not tell of every use" in text(found) and "saved" not in [
        line.split(" ")[0] for line in text(found).splitlines()
    ]
    assert "  encode/? = codec" in text(found)


# --------------------------------------------------------------------------- printing


def test_it_prints_plain_text_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    model = models.tied_autoencoder()
    found = tether.summary(model)
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.isascii()
    assert [line.rstrip() for line in out.splitlines()] == str(found).splitlines() == text(model).splitlines()


def test_the_width_that_the_environment_gives_is_obeyed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    tether.summary(models.low_rank_child())
    assert 40 < max(map(len, capsys.readouterr().out.splitlines())) <= 50


def test_a_width_is_obeyed(capsys):
    found = tether.summary(models.low_rank_child(), width=45)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == str(found).splitlines()
    assert max(map(len, str(found).splitlines())) <= 45


def test_it_is_given_line_by_line_to_a_function(capsys):
    lines = []
    found = tether.summary(models.slices(), print_fn=lines.append)
    assert lines == str(found).splitlines() and all(type(line) is str for line in lines)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_colours_and_the_same_text():
    found = tether.summary(models.frozen_use(), **SILENT)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    console.print(found)
    coloured = console.file.getvalue()
    assert "\x1b[" in coloured
    shown = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()]
    assert shown == str(found).splitlines()


def test_it_fits_in_what_is_around_it():
    from rich.panel import Panel

    console = Console(file=io.StringIO(), width=60)
    console.print(Panel(tether.summary(models.low_rank_child(), **SILENT)))
    lines = console.file.getvalue().splitlines()
    assert {cell_len(line) for line in lines} == {60} and "lora_b" in console.file.getvalue()


def test_a_terminal_of_a_narrow_encoding_gets_what_it_can_show(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import keras, tether\n"
        "layer = keras.layers.Dense(2, name='ключ'); layer.build((None, 2)); tether.summary(layer)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rb"\u043a\u043b\u044e\u0447/kernel" in done.stdout


@pytest.mark.parametrize("width", [0, -1, NARROWEST - 1, True])
def test_too_narrow_a_width_is_refused(width):
    with pytest.raises(tether.TetherError, match="columns"):
        tether.summary(models.slices(), width=width)


def test_what_cannot_be_called_is_no_print_function():
    with pytest.raises(tether.TetherError, match="print_fn"):
        tether.summary(models.slices(), print_fn="stdout")


def test_of_anything_else_there_is_no_summary(tmp_path):
    with pytest.raises(tether.TetherError, match="model or layer"):
        tether.summary(3)
    with pytest.raises(FileNotFoundError):
        tether.summary(tmp_path / "missing.keras")


# --------------------------------------------------------------------------- the object


def test_the_summary_has_its_facts_and_a_short_name():
    model = models.tied_autoencoder()
    found = tether.summary(model, **SILENT)
    assert found.facts == facts(model)
    assert repr(found) == "<Summary of 'autoencoder': 108 B stored, 180 B unshared, 72 B saved>"


# --------------------------------------------------------------------------- hostile names

NAMES = [
    "[red]",
    "[/]",
    "[bold]x[/bold]",
    "<b>x</b>",
    "<script>alert(1)</script>",
    "&amp;",
    '"',
    ":smile:",
    "100%",
    "{x}",
]


def named(name):
    weight = StoredWeight("vars/0", (2, 2), "float32", path=name, trainable=True)
    uses = tuple(UseOf(name, name, f"{name}.T", ("vars/0",), (2, 2), "float32", trains=True) for _ in range(2))
    return Facts(name, (weight,), uses)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name, capsys):
    tether.summary(named(name), width=200)
    out = capsys.readouterr().out
    assert out.startswith(f"{name}\n") and f"\n{name} (shared by 2 uses)" in out
    assert out.count(f"{name}/{name} = {name}.T") == 2
    table = tether.summary(named(name), **SILENT)._repr_html_()
    assert cells(table)[0] == name and f"{name}/{name} = {name}.T" in cells(table)


def test_a_real_model_may_have_such_names(capsys):
    weight = tether.Weight((2, 2), "ones", name="[red]w<b>")
    layer = tether.tie(layers.Dense(2, name="[bold]dense<i>"), kernel=weight.T)
    layer.build((None, 2))
    tether.summary(layer)
    assert "[bold]dense<i>/kernel = [red]w<b>.T" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m", "two\nlines", "\x07bell", "\u202eright to left", "\r", "a\tb"])
def test_a_name_does_not_steer_the_terminal(name, capsys):
    tether.summary(named(name), width=200)
    out = capsys.readouterr().out
    assert not set(name) & set(out) - {"\n"} - {c for c in name if c.isprintable()}
    assert name.encode("unicode_escape").decode() in out


# --------------------------------------------------------------------------- folding


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=120), st.integers(4, 40), st.integers(0, 2))
def test_folding_loses_nothing_but_spaces(words, width, hang):
    words = literal(words)
    lines = fold(words, width, hang)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(cell_len(line) <= width for line in lines)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(NARROWEST, 140))
def test_any_name_fits_any_width(name, width):
    said = text(named(name), width)
    assert all(cell_len(line) <= width for line in said.split("\n"))
    assert bare(literal(name)) in bare(said)


def test_paths_are_folded_at_slashes():
    assert fold("encoder/layer_0/attention/query/kernel", 26) == ["encoder/layer_0/attention/", "query/kernel"]
    assert fold("x" * 25, 10, hang=2) == ["x" * 10, "  " + "x" * 8, "  " + "x" * 7]


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (200_704, "200.7 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (-448, "-448 B"), (-20_000, "-20.0 kB"), (438_000_000, "438.0 MB"), (7 * 10**9, "7.0 GB"), (10**18, "1,000.0 PB")],
)  # fmt: skip
def test_bytes_in_units_that_people_read(number, words):
    assert human_bytes(number) == words


# --------------------------------------------------------------------------- notebooks


class Reader(html.parser.HTMLParser):
    """Reads a table; elements that are not closed in order are an error."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.cells, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        if tag in ("td", "th", "caption", "p"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if any(tag in self.open for tag in ("td", "th", "caption", "p")):
            self.cells[-1] += data


def read(table):
    reader = Reader()
    reader.feed(table)
    reader.close()
    assert not reader.open
    return reader


def cells(table):
    return read(table).cells


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_a_notebook_says_the_same(name):
    found = tether.summary(MODELS[name](), **SILENT)
    reader = read(found._repr_html_())
    assert set(reader.tags) <= {"div", "style", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "p"}
    assert set(reader.attributes) <= {"class", "scope"}
    said = bare("".join(reader.cells))
    for line in str(tether.summary(found.facts, width=300, **SILENT)).splitlines():
        for piece in re.split(r"\s{2,}", line.strip()):
            assert not piece.strip("-") or bare(piece) in said


def test_the_table_is_whole_in_itself_and_has_no_script():
    table = tether.summary(models.tied_autoencoder(), **SILENT)._repr_html_()
    assert not re.search(r"https?:|url\(|@import|<script|\son\w+=", table)
    assert "prefers-color-scheme:dark" in table and "color:inherit" in table


@pytest.fixture
def notebook(monkeypatch):
    """What a kernel puts where people look for it."""

    class Shell:
        kernel = object()

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)


def test_in_a_notebook_nothing_is_printed(notebook, capsys):
    found = tether.summary(models.slices())
    assert capsys.readouterr().out == "" and found._repr_html_().startswith("<div")
    lines = []
    tether.summary(models.slices(), print_fn=lines.append)
    assert lines


def test_in_ipython_on_a_terminal_it_is_printed(notebook, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", staticmethod(lambda: object()))
    tether.summary(models.slices())
    assert "whole" in capsys.readouterr().out


# --------------------------------------------------------------------------- large models


def test_a_model_of_thousands_of_weights_is_summarized_in_the_time_of_reading_it():
    """The work grows with the number of weights, not with its square."""

    def large(count):
        weights = [StoredWeight(f"layers/d_{n}/vars/0", (4, 4), "float32", path=f"d_{n}/kernel") for n in range(count)]
        uses = [UseOf(f"d_{n}", "kernel", None, (weights[n // 2].place,), (4, 4), "float32") for n in range(count)]
        return Facts("large", tuple(weights), tuple(uses))

    def seconds(count):
        found = large(count)
        start = time.perf_counter()
        text(found)
        tether.summary(found, shared_only=True, **SILENT)._repr_html_()
        return time.perf_counter() - start

    seconds(100)
    ratio = min(seconds(4000) / seconds(500) for _ in range(3))
    assert ratio < 24


def bert(width=768, depth=12, vocabulary=30_522, length=64):
    """A model like BERT's base, whose head reads its table."""
    table = tether.Weight((vocabulary, width), "normal", name="table")
    ids = keras.Input((length,), dtype="int32")
    x = tether.tie(layers.Embedding(vocabulary, width, name="tokens"), embeddings=table)(ids)
    for number in range(depth):
        attention = layers.MultiHeadAttention(12, width // 12, name=f"attention_{number}")
        x = layers.LayerNormalization(name=f"norm_{number}_1")(x + attention(x, x))
        inner = layers.Dense(4 * width, activation="gelu", name=f"inner_{number}")(x)
        x = layers.LayerNormalization(name=f"norm_{number}_2")(x + layers.Dense(width, name=f"outer_{number}")(inner))
    return keras.Model(ids, tether.tie(layers.Dense(vocabulary, name="head"), kernel=table.T)(x))


def most_memory():
    """The most memory that the process has had since it was last asked to forget that, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def forget_the_most_memory():
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the memory from Linux")
def test_a_model_of_a_hundred_million_parameters_is_read_in_seconds_without_a_copy(tmp_path):
    model = bert()
    assert 105e6 < model.count_params() < 115e6
    model.save(tmp_path / "bert.keras")
    tether.summary(models.slices(), **SILENT)  # what is imported first
    (table,) = (v for v in model.weights if v.path == "table")
    size = int(np.prod(table.shape)) * 4
    for source in (model, tmp_path / "bert.keras"):
        gc.collect()
        forget_the_most_memory()
        before = most_memory()
        start = time.perf_counter()
        found = tether.summary(source, **SILENT)
        assert str(found) and found._repr_html_()
        elapsed, more = time.perf_counter() - start, most_memory() - before
        print(f"{type(source).__name__}: {elapsed:.2f} s, {more / 1e6:.1f} MB more")
        assert elapsed < 3 and more < size / 4
        assert found.facts.stored_bytes == sum(int(np.prod(v.shape)) * 4 for v in model.weights)
        assert [weight.path for weight in found.facts.shared()] == ["table"]


def test_values_do_not_matter():
    model = models.frozen_use()
    before = text(model)
    model.get_layer("plain").kernel.assign(values(4, 4) * np.nan)
    assert text(model) == before

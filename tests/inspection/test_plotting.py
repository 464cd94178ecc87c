"""The weight map: that it shows what there is, where it says, and harms nobody."""

import base64
import hashlib
import html.parser
import importlib.resources
import itertools
import os
import pathlib
import pickle
import re
import time
from dataclasses import replace

import keras
import numpy as np
import pytest

import tether
from tests.documents import ROOT
from tests.inspection.maps import Map, bert, facts_of, line_of, low_rank_child, many, reads, stored, tied_blocks
from tether import demo
from tether.errors import TetherError, Unsupported
from tether.inspection import Slot, plotting
from tether.inspection.plotting import layout
from tether.inspection.plotting.layout import HAIR, LINE, SHARED, TALL

MODELS = {"autoencoder": lambda: demo.autoencoder(demo.TIED, 1), "low rank": low_rank_child, "bert": bert}


@pytest.fixture(scope="module", params=MODELS)
def facts(request):
    return tether.inspection.facts(MODELS[request.param]())


@pytest.fixture(params=[".html", ".svg"])
def drawn(request, facts, tmp_path):
    return Map(tether.plot(facts, tmp_path / f"map{request.param}"))


def plotted(source, tmp_path, suffix=".svg", **options):
    return Map(tether.plot(source, tmp_path / f"map{suffix}", **options))


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def top_of(element):
    return numbers(element.get("transform"))[1]


def solid_of(element):
    """The top and the height of the solid part of a weight or use."""
    solid = next(rect for rect in element.iter("rect") if rect.get("class") == "solid")
    return top_of(element) + float(solid.get("y")), float(solid.get("height"))


def is_shown(element):
    return not any(inner.get("display") == "none" for inner in element.iter())


# --------------------------------------------------------------------------- what is shown


def test_every_weight_use_and_layer_is_drawn(facts, drawn):
    assert sorted(drawn.weights) == sorted(weight.path for weight in facts.weights)
    assert sorted(map(drawn.name, drawn.uses)) == sorted(map(line_of, facts.uses))
    assert {path for path, _ in facts.layers} <= set(drawn.headings)


def test_layers_are_in_the_order_of_the_model(facts, drawn):
    tops = [top_of(drawn.headings[path]) for path, _ in facts.layers]
    assert tops == sorted(tops)


def test_ribbons_connect_each_use_with_the_weights_in_it(facts, drawn):
    expected = [(facts.weight(place).path, line_of(use)) for use in facts.uses for place in use.weights]
    assert drawn.connections() == sorted(expected)


def test_ribbons_begin_and_end_where_the_weight_and_the_use_are(drawn):
    by_id = {element.get("id"): element for element in drawn.root.iter()}
    for ribbon in drawn.ribbons:
        _, y, *curve, _, end = numbers(ribbon.get("d").split("V")[0])
        to_bottom, bottom = numbers(ribbon.get("d").split("V")[1])[0], numbers(ribbon.get("d"))[-1]
        top, height = solid_of(by_id["w" + ribbon.get("data-weight")])
        assert (y, bottom) == pytest.approx((top, top + height), abs=0.03)
        part, share = numbers(ribbon.get("data-part"))
        use_top, use_height = solid_of(by_id["r" + ribbon.get("data-row")])
        assert (end, to_bottom) == pytest.approx(
            (use_top + part * use_height, use_top + (part + share) * use_height), abs=0.05
        )
        assert len(curve) == 4


def test_the_ribbons_of_one_use_share_its_height_by_their_bytes(facts, drawn):
    of_row = {}
    for ribbon in drawn.ribbons:
        of_row.setdefault(drawn.name(drawn.rows[int(ribbon.get("data-row"))]), []).append(
            tuple(numbers(ribbon.get("data-part")))
        )
    for use in facts.uses:
        counts = [facts.weight(place).bytes for place in use.weights]
        shares = [count / sum(counts) for count in counts]
        starts = [0.0, *itertools.accumulate(shares)]
        expected = list(zip(starts, shares, strict=False))
        assert np.allclose(sorted(of_row[line_of(use)]), sorted(expected), atol=1e-3)


def test_heights_are_proportional_to_bytes_and_never_nothing(facts, drawn):
    found = [(weight.bytes, solid_of(drawn.weights[weight.path])[1]) for weight in facts.weights]
    found += [(int(use.get("data-bytes")), solid_of(use)[1]) for use in drawn.uses]
    scale = max(height for _, height in found) / max(count for count, _ in found)
    for count, height in found:
        assert height == pytest.approx(count * scale, abs=0.02) or (count * scale < HAIR and 0 < height <= HAIR)


def test_no_two_weights_and_no_two_layers_overlap(drawn):
    columns = [list(drawn.weights.values()), [row for row in drawn.rows if row.find("rect") is not None]]
    for column in columns:
        spans = sorted((top_of(g), top_of(g) + float(g.find("rect").get("height"))) for g in column if is_shown(g))
        assert all(end <= start + 0.02 for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_tie_is_labelled_with_its_expression(facts, drawn):
    labels = {drawn.name(use): "".join(use.find("g").findall("text")[-1].itertext()) for use in drawn.uses}
    for use in facts.uses:
        if use.tied:
            start = labels[line_of(use)].removesuffix("…")
            assert use.expression == start or (len(start) > 40 and use.expression.startswith(start))


def test_what_is_shared_stands_out_and_the_rest_is_quiet(facts, drawn):
    shared = {weight.path for weight in facts.shared()}
    assert shared
    assert {name for name, g in drawn.weights.items() if "shared" in g.get("class").split()} == shared
    tied = {line_of(use) for use in facts.uses if use.tied}
    assert {drawn.name(use) for use in drawn.uses if "tied" in use.get("class").split()} == tied


def test_the_totals_are_on_top(tmp_path):
    model = demo.autoencoder(demo.TIED, 1)
    for suffix in (".html", ".svg"):
        text = plotted(model, tmp_path, suffix).text
        for total in ("stored", "204.1 kB", "unshared", "404.8 kB", "saved", "200.7 kB", "49.6% of that"):
            assert total in text


def test_a_combination_that_costs_more_than_it_shares_is_said_to_add(tmp_path):
    w, a = stored("w"), stored("a")
    made = facts_of([w, a], [reads("dense", "w", "a", expression="w + a", tied=True)])
    text = plotted(made, tmp_path, ".html").text
    assert "<dt>added</dt><dd>128 B" in text
    assert "<dt>saved</dt>" not in text


def test_hovering_tells_shape_dtype_bytes_uses_and_slots(tmp_path):
    model = demo.autoencoder(demo.TIED, 1)
    images = np.zeros((10, demo.PIXELS), "float32")
    model.fit(images, images, verbose=0)
    drawn = plotted(model, tmp_path)
    said = drawn.weights["codec"].find("title").text
    for fact in (
        "784 × 64, float32, 200.7 kB",
        "trained, shared by 2 uses",
        "read by encode/kernel = codec",
        "read by decode/kernel = codec.T",
        "401.4 kB",
    ):
        assert fact in said
    assert re.search(r"optimizer: \w*momentum\w*, \w*velocit\w*, ", said)
    (use,) = (use for use in drawn.uses if drawn.name(use).startswith("decode/kernel"))
    assert "64 × 784, float32, 200.7 kB if it were stored" in use.find("title").text
    assert "reads codec: trained" in use.find("title").text


def test_of_very_many_uses_the_facts_list_some_and_count_the_rest(tmp_path):
    w = stored("w")
    made = facts_of([w], [reads(f"layer_{n}", "w", expression="w", tied=True) for n in range(300)])
    said = plotted(made, tmp_path).weights["w"].find("title").text
    assert "shared by 300 uses" in said
    assert said.count("read by") == 8
    assert "and 292 more" in said


# --------------------------------------------------------------------------- colours


def test_colours_tell_trained_frozen_unused_and_state(tmp_path):
    weights = [
        stored("trains"),
        stored("frozen", trainable=False),
        stored("orphan"),
        stored("seed", state=True, trainable=False),
        stored("file", trainable=None),
    ]
    uses = [
        reads("a", "trains", trains=True),
        reads("b", "trains", expression="trains", tied=True, trains=False),
        reads("c", "frozen", trains=False),
        reads("d", "trains", "frozen", expression="stop_gradient(trains) + frozen", trains=True, stopped=("trains",)),
        reads("e", "file"),
    ]
    drawn = plotted(facts_of(weights, uses), tmp_path)
    colour = {name: g.get("class").split()[1] for name, g in drawn.weights.items()}
    assert colour == {
        "trains": "trained",
        "frozen": "frozen",
        "orphan": "unused",
        "seed": "state",
        "file": "unknown",
    }
    found = {
        (ribbon.get("data-weight"), drawn.name(drawn.rows[int(ribbon.get("data-row"))])[0]): ribbon.get("class")
        for ribbon in drawn.ribbons
    }
    assert {key: value.split()[1] for key, value in found.items()} == {
        ("0", "a"): "trained",
        ("0", "b"): "here",
        ("1", "c"): "frozen",
        ("0", "d"): "here",
        ("1", "d"): "frozen",
        ("4", "e"): "unknown",
    }
    assert drawn.words("legend")[: len(layout.KINDS)] == list(layout.KINDS)


def test_the_legend_names_only_what_there_is(tmp_path):
    words = plotted(facts_of([stored("w")], [reads("a", "w", trains=True)]), tmp_path).words("legend")
    assert [text for text in words if text in layout.KINDS] == ["trained"]
    assert not any("shared" in text for text in words)
    tied = plotted(facts_of([stored("w")], [reads("a", "w", tied=True), reads("b", "w", tied=True)]), tmp_path)
    assert any("shared" in text for text in tied.words("legend"))


def test_freezing_one_of_two_layers_freezes_its_ribbon_alone(tmp_path):
    model = demo.autoencoder(demo.TIED, 1)
    model.get_layer("decode").trainable = False
    drawn = plotted(model, tmp_path)
    colours = {drawn.name(use): use.get("class").split()[1] for use in drawn.uses}
    assert colours["encode/kernel = codec (Dense)"] == "trained"
    assert colours["decode/kernel = codec.T (Dense)"] == "here"
    assert "trained" in drawn.weights["codec"].get("class")


def contrast(first, second):
    def light(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_words_and_colours_stand_out_from_the_paper_in_light_and_dark():
    style = importlib.resources.files(plotting).joinpath("map.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): light-dark\(([^)]+)\)", style))
    pairs = {name: pair.split(", ") for name, pair in colours.items()}
    for side in (0, 1):
        for name in pairs.keys() - {"paper", "line"}:
            least = 4.5 if name in ("ink", "soft") else 3
            assert contrast(pairs[name][side], pairs["paper"][side]) >= least, (name, side)


# --------------------------------------------------------------------------- open and closed


def test_twelve_blocks_are_closed_and_the_tie_is_open(tmp_path):
    drawn = plotted(bert(), tmp_path)
    expanded = {name: g.get("aria-expanded") == "true" for name, g in drawn.headings.items()}
    assert not any(expanded[f"transformer_layer_{n}"] for n in range(12))
    assert expanded["token_embedding"]
    assert expanded["logits"]
    assert "token_embedding.embeddings.T" in drawn.words()
    shown = [g for g in drawn.rows if is_shown(g)]
    assert len(shown) <= layout.MOST_OPEN


def expanded(drawn):
    return {name for name, g in drawn.headings.items() if g.get("aria-expanded") == "true"}


@pytest.mark.parametrize("count", [24, 96, 300])
def test_in_a_big_model_the_shared_weights_are_on_top_and_the_ties_open_within_a_page(count, tmp_path):
    made = tied_blocks(count, tied=(3, count - 4))
    drawn = plotted(made, tmp_path)
    assert next(iter(drawn.headings)) == SHARED
    assert {SHARED, "embedding", "block_3", "block_3/mlp", f"block_{count - 4}/mlp", "head"} <= expanded(drawn)
    assert not {"block_2", "block_3/attention", f"block_{count - 5}"} & expanded(drawn)
    tops = {name: top_of(drawn.weights[name]) for name in ("table", "common")}
    assert max(tops.values()) < min(top_of(use) for use in drawn.uses)
    ties = [use for use in drawn.uses if "tied" in use.get("class").split()]
    assert len(ties) == 4
    assert all(is_shown(use) and top_of(use) < 1500 for use in ties)


def test_in_a_small_model_a_shared_weight_is_beside_its_first_reader(tmp_path):
    drawn = plotted(tied_blocks(3), tmp_path)
    assert SHARED not in drawn.headings
    assert top_of(drawn.weights["table"]) == top_of(drawn.uses[0])


def test_of_many_layers_side_by_side_those_that_are_alike_have_one_heading(tmp_path):
    made = tied_blocks(96, tied=(40, 41, 80))
    drawn = plotted(made, tmp_path)
    groups = [name for name, g in drawn.headings.items() if "…" in name]
    assert groups == ["block_0 … 39", "block_42 … 79", "block_81 … 95"]  # two in a row have their own
    assert "40 layers" in drawn.headings["block_0 … 39"].find("title").text
    level = {name: int(g.get("aria-level")) for name, g in drawn.headings.items()}
    assert (level["block_0 … 39"], level["block_0"], level["block_0/mlp"], level["block_40"]) == (1, 2, 3, 1)
    assert not any("…" in name for name in plotted(tied_blocks(20), tmp_path).headings)


def test_a_closed_group_of_very_many_weights_is_no_page_of_hairlines(tmp_path):
    weights = [stored("large", (4000, 4000))]
    weights += [stored(f"block_{n // 20}/layer_{n % 20}/bias", (4,)) for n in range(4000)]
    made = facts_of(weights, [reads(w.path.rpartition("/")[0] or "large", w.place, shape=w.shape) for w in weights])
    drawn = plotted(made, tmp_path)
    assert float(drawn.headings["block_0 … 199"].find("rect").get("height")) < TALL
    assert all(solid_of(g)[1] > 0 for g in drawn.weights.values())


def test_a_small_model_is_open(tmp_path):
    assert all(g.get("aria-expanded") == "true" for g in plotted(low_rank_child(), tmp_path).headings.values())


def test_a_closed_layer_is_as_high_as_what_is_in_it(tmp_path):
    drawn = plotted(many(400, block=100), tmp_path)
    for name in (f"block_{n}" for n in range(4)):
        heading = drawn.headings[name]
        assert heading.get("aria-expanded") == "false"
        top, height = top_of(heading), float(heading.find("rect").get("height"))
        inside = [solid_of(g) for weight, g in drawn.weights.items() if weight.startswith(f"{name}/")]
        assert len(inside) == 100
        assert min(y for y, _ in inside) >= top - 0.02
        assert max(y + h for y, h in inside) <= top + height + 0.02


def test_levels_say_how_deep_a_layer_is(tmp_path):
    drawn = plotted(bert(blocks=1), tmp_path)
    level = {name: int(g.get("aria-level")) for name, g in drawn.headings.items()}
    assert level["transformer_layer_0"] == 1
    assert level["transformer_layer_0/self_attention_layer"] == 2
    assert level["transformer_layer_0/self_attention_layer/query"] == 3


def test_names_that_only_lead_on_take_one_row(tmp_path):
    model = keras.Sequential(
        [keras.Input((3, 2)), keras.layers.TimeDistributed(keras.layers.Dense(2, name="inner"), name="outer")]
    )
    assert list(plotted(model, tmp_path).headings) == ["outer/inner"]


def test_thousands_of_layers_in_each_other_are_drawn(tmp_path):
    deep = "/".join(["a"] * 5000)
    made = facts_of([stored("w"), stored("v")], [reads(deep, "w"), reads(f"{deep}/b", "v")])
    assert len(plotted(made, tmp_path).ribbons) == 2


# --------------------------------------------------------------------------- shared only


@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_only_what_is_shared_is_drawn_and_the_totals_are_those_of_the_whole(suffix, tmp_path):
    made = tied_blocks(24, tied=(3, 5))
    whole, drawn = plotted(made, tmp_path, suffix), plotted(made, tmp_path, suffix, shared_only=True)
    assert list(drawn.weights) == ["table", "common"]
    assert sorted(use.split("/")[0] for _, use in drawn.connections()) == ["block_3", "block_5", "embedding", "head"]
    assert {"block_3", "block_5/mlp"} - set(drawn.headings) == {"block_3"}  # names that only lead on
    assert not any(name.startswith("block_4") for name in drawn.headings)
    stored_bytes = layout.human_bytes(made.stored_bytes)
    assert stored_bytes in whole.text and stored_bytes in drawn.text
    hidden = layout.human_bytes(made.stored_bytes - made.shared_only().stored_bytes)
    assert "70 weights not shared" in drawn.text and hidden in drawn.text
    assert "not drawn" not in whole.text


def test_a_part_of_a_tie_is_drawn_with_it_though_it_has_one_use(tmp_path):
    weights = [stored("w"), stored("a"), stored("bias")]
    uses = [reads("dense", "w", "a", expression="w + a", tied=True), reads("dense", "bias", attribute="bias")]
    assert list(plotted(facts_of(weights, uses), tmp_path, shared_only=True).weights) == ["w", "a"]


@pytest.mark.parametrize(("ties", "said"), [(True, "Leave it out"), (False, "file does not say")])
def test_with_nothing_shared_there_is_nothing_to_draw(ties, said, tmp_path):
    with pytest.raises(TetherError, match=f"no weight that is shared.*{said}"):
        tether.plot(replace(many(3), ties=ties), tmp_path / "map.html", shared_only=True)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- odd models


@pytest.mark.parametrize("source", [keras.layers.Dense(3, name="unbuilt"), facts_of([], [])], ids=["layer", "facts"])
def test_a_model_without_weights_is_an_error_that_says_to_build_it(source, tmp_path):
    with pytest.raises(TetherError, match=r"has no weights.*built"):
        tether.plot(source, tmp_path / "map.html")
    assert not list(tmp_path.iterdir())


def test_weights_of_no_size_are_drawn(tmp_path):
    made = facts_of([stored("w", (0, 4)), stored("v", (0,))], [reads("a", "w", "v", shape=(0, 4), expression="w + v")])
    drawn = plotted(made, tmp_path)
    assert all(solid_of(g)[1] > 0 for g in drawn.weights.values())
    assert not re.search(r"\bnan\b|\binf\b", drawn.text)
    assert len(drawn.ribbons) == 2


def test_a_use_of_a_constant_has_no_ribbon(tmp_path):
    made = facts_of([stored("w")], [reads("a", "w"), reads("b", expression="0", tied=True)])
    drawn = plotted(made, tmp_path)
    assert len(drawn.uses) == 2
    assert len(drawn.ribbons) == 1


def test_a_layer_alone_is_drawn(tmp_path):
    layer = keras.layers.Dense(3, name="alone")
    layer.build((None, 2))
    assert list(plotted(layer, tmp_path).headings) == ["alone"]


def test_two_thousand_weights_take_space_and_time_by_their_number(tmp_path):
    def measured(count):
        made = many(count)
        started = time.process_time()
        text = plotted(made, tmp_path, ".html").text
        return len(text), time.process_time() - started

    size, seconds = (min(values) for values in zip(*(measured(500) for _ in range(3)), strict=True))
    large, longer = (min(values) for values in zip(*(measured(2000) for _ in range(3)), strict=True))
    assert large < 4.4 * size
    assert large < 2000 * 2500
    assert longer < 10 * seconds  # four times as many; what is quadratic takes sixteen times as long


# --------------------------------------------------------------------------- files as sources


def test_a_saved_model_is_drawn_without_being_made(tmp_path):
    model = demo.autoencoder(demo.TIED, 1)
    model.save(tmp_path / "tied.keras")
    drawn = plotted(tmp_path / "tied.keras", tmp_path)
    uses = [use for weight, use in drawn.connections() if weight == "codec"]
    assert [use.split(" (")[0] for use in uses] == ["decode/kernel = codec.T", "encode/kernel = codec"]


def test_a_file_of_weights_without_notes_is_drawn_and_its_sharing_called_unknown(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.save_weights(tmp_path / "plain.weights.h5")
    text = plotted(tmp_path / "plain.weights.h5", tmp_path, ".html").text
    assert "<dt>unshared</dt><dd>unknown" in text
    assert "<dt>saved</dt>" not in text
    assert "trained or frozen: the file does not say" in text


def test_names_joined_by_dots_are_grouped_too(tmp_path):
    from safetensors.numpy import save_file

    save_file(
        {f"h.{n}.attn.{part}": np.zeros((4, 4), "float32") for n in range(3) for part in "qk"},
        tmp_path / "other.safetensors",
    )
    drawn = plotted(tmp_path / "other.safetensors", tmp_path)
    assert set(drawn.headings) == {"h", *(f"h.{n}.attn" for n in range(3))}
    assert len(drawn.ribbons) == 6


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        tether.plot(tmp_path / "missing.keras", tmp_path / "map.html")


# --------------------------------------------------------------------------- names that attack

ATTACKS = [
    "</script><script>alert(1)</script>",
    "</svg><img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    "\"' onload=alert(1) x='",
    "&lt;script&gt;",
    "$script ${style}",
    "\x00\x1b[31m\x08\ud800￾",
    "\u202egnp.exe",
    "{{7*7}}",
]


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *sorted(name for name, _ in attributes)))


def with_name(name):
    w = stored("w0", path=name)
    uses = [
        reads(name, "w0", attribute=name, expression=name, tied=True),
        reads("b", "w0", attribute=name, expression=name, tied=True),
    ]
    return facts_of([w], uses, name=name)


@pytest.mark.parametrize("attack", ATTACKS)
def test_names_are_words_and_nothing_else(attack, tmp_path):
    assert len(plotted(with_name(attack), tmp_path, ".svg", title=attack).uses) == 2
    page = plotted(with_name(attack), tmp_path, ".html", title=attack)
    plain = plotted(with_name("plain" * 6), tmp_path, ".html", title="plain")
    elements = Elements(page.text)
    kinds = {kind for kind in elements.found if kind[0] not in ("text", "tspan")}
    assert kinds == {kind for kind in Elements(plain.text).found if kind[0] not in ("text", "tspan")}
    assert elements.found.count(("script",)) == 1
    assert not re.search("[\u202a-\u202e\x00\x1b\x08]", page.text)


def test_a_name_that_is_kept_apart_is_still_told(tmp_path):
    drawn = plotted(with_name("</script><script>alert(1)"), tmp_path)
    assert "</script><script>alert(1)" in drawn.weights


# --------------------------------------------------------------------------- in a notebook


class Tags(html.parser.HTMLParser):
    """The elements of HTML, with the values of their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.parametrize("attack", ["plain", *ATTACKS])
def test_in_a_notebook_a_page_is_in_a_frame_that_reaches_nothing(attack, tmp_path):
    path = tether.plot(with_name(attack), tmp_path / "map.html", title=attack)
    ((tag, attributes),) = Tags(path._repr_html_()).found
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts"  # not the notebook's origin
    assert attributes["srcdoc"] == path.read_text(encoding="utf-8")


def test_in_a_notebook_a_drawing_is_an_image(tmp_path):
    path = tether.plot(with_name(ATTACKS[0]), tmp_path / "map.svg")
    ((tag, attributes),) = Tags(path._repr_html_()).found
    kind, _, data = attributes["src"].partition("base64,")
    assert (tag, kind) == ("img", "data:image/svg+xml;")
    assert base64.b64decode(data).decode() == path.read_text(encoding="utf-8")


def test_what_plot_returns_is_a_path_that_prints_as_one(tmp_path):
    path = tether.plot(many(2), tmp_path / "a 'b' <c>.html")
    assert isinstance(path, pathlib.Path)
    assert str(path) == f"{path}" == os.fspath(path) == str(tmp_path / "a 'b' <c>.html")
    assert path == tmp_path / "a 'b' <c>.html"
    assert pickle.loads(pickle.dumps(path)) == path
    assert Tags(path._repr_html_()).found[0][1]["title"] == path.name
    assert plotting.WeightMap(tmp_path)._repr_html_() is None
    path.unlink()
    assert path._repr_html_() is None


# --------------------------------------------------------------------------- self-contained


def test_a_page_refers_to_nothing_outside_itself(facts, tmp_path):
    text = plotted(facts, tmp_path, ".html").text
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|<iframe|<object|<embed", text)
    assert re.findall(r"href=\"([^\"]*)\"", text) == ["data:,"]


def test_a_drawing_refers_to_nothing_outside_itself(facts, tmp_path):
    text = plotted(facts, tmp_path).text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|href|<script|<foreignObject", text)


def test_the_policy_of_a_page_allows_its_own_script_and_style_and_no_more(tmp_path):
    text = plotted(many(3), tmp_path, ".html").text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        ((content,),) = [re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert " style=" not in text
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL))


def test_the_same_facts_give_the_same_file(facts, tmp_path):
    for suffix in (".html", ".svg"):
        first = plotted(facts, tmp_path, suffix).text
        again = type(facts).from_json(facts.to_json())
        assert plotted(again, tmp_path, suffix).text == first


def test_it_has_a_title_a_description_and_roles(drawn):
    if drawn.root.find("title") is not None:
        ids = [element.get("id") for element in drawn.root.iter()]
        assert set(drawn.root.get("aria-labelledby").split()) <= set(ids)
        assert "stored weight" in drawn.root.find("desc").text
    else:
        assert "stored weight" in drawn.root.get("aria-label")
        assert '<html lang="en">' in drawn.text
    assert all(g.get("role") == "listitem" for g in drawn.weights.values())
    assert all(g.get("role") == "treeitem" for g in (*drawn.uses, *drawn.headings.values()))
    assert all(g.find("title").text for g in (*drawn.weights.values(), *drawn.uses, *drawn.headings.values()))


def test_what_a_page_is_made_of_is_in_the_package():
    for name in ("map.css", "page.css", "page.html", "map.js"):
        assert importlib.resources.files(plotting).joinpath(name).read_text(encoding="utf-8")


# --------------------------------------------------------------------------- the file


def test_left_out_the_path_is_named_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = demo.autoencoder(demo.TIED, 1)
    path = tether.plot(model)
    assert str(path) == f"{model.name}-weights.html"
    assert (tmp_path / path).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["../up", "/root", "..", ".hidden", "a b?*", "x" * 500, "ü"])
def test_a_name_never_leads_out_of_the_folder(name, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = tether.plot(facts_of([stored("w")], [reads("a", "w")], name=name))
    assert [found.name for found in folder.iterdir()] == [str(path)]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_title_can_be_given(tmp_path):
    for suffix in (".html", ".svg"):
        assert "Tied &amp; true" in plotted(many(2), tmp_path, suffix, title="Tied & true").text
        assert "Weights of made" in plotted(many(2), tmp_path, suffix).text
    with pytest.raises(TetherError, match="title=3"):
        tether.plot(many(2), tmp_path / "map.html", title=3)


def test_it_is_written_over_an_old_file(tmp_path):
    path = tmp_path / "map.html"
    path.write_text("old")
    assert tether.plot(many(2), str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "map.html"
    path.write_text("old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tether.plot(many(2), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"]


@pytest.mark.parametrize("name", ["map.png", "map", "map.htm", ".html"])
def test_another_ending_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(Unsupported, match=r"\.html or a \.svg"):
        tether.plot("not even a source", tmp_path / name)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tether.plot(many(2), tmp_path / "nowhere" / "map.html")


def test_optimizer_slots_are_counted_in_the_totals(tmp_path):
    w = stored("w")
    made = type(many(1))("made", (w,), (reads("a", "w"),), (Slot("optimizer/0", (8, 4), "float32", "m", "w"),))
    assert "<dt>optimizer</dt><dd>128 B" in plotted(made, tmp_path, ".html").text


def test_small_weights_get_room_for_their_names(tmp_path):
    drawn = plotted(facts_of([stored("large", (9000, 90)), stored("small", (2,))], []), tmp_path)
    box, solid = drawn.weights["small"].findall("rect")
    assert float(solid.get("height")) == HAIR
    assert float(box.get("height")) == LINE
    assert any("at least" in text for text in drawn.words())


def test_the_drawing_in_the_docs_is_the_present_one(tmp_path):
    facts = replace(tether.inspection.facts(demo.autoencoder(demo.TIED, 1)), optimizer=())
    path = tether.plot(facts, tmp_path / "map.svg", title="A tied autoencoder")
    drawn = re.sub(r"sequential_\d+", "sequential", path.read_text(encoding="utf-8"))  # Keras counts its models
    assert drawn == (ROOT / "docs/weight-map-autoencoder.svg").read_text(encoding="utf-8")

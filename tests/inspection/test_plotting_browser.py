"""The page of a weight map in headless Chromium, driven by Playwright. `make test-all` installs the latter."""

import importlib.resources
import re
import shutil

import pytest

import tether
from tests.inspection.maps import Map, bert, facts_of, low_rank_child, many, reads, stored, tied_blocks
from tether import demo

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def chromium():
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.fail("The map is tested in a browser, and Chromium is not installed: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("The browser is driven by Playwright, which is not installed: make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens the map of a source from its file. The test fails if the page says anything on the console."""
    said, opened = [], []

    def visit(source, *, width=1280, height=800, scheme="light", suffix=".html", **options):
        path = tether.plot(source, tmp_path / f"map{suffix}", **options)
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: opened.append(request.url))
        page.goto(path.as_uri())
        page.path = path
        return page

    yield visit
    for context in chromium.contexts:
        context.close()
    assert said == []
    assert {url.split(":")[0] for url in opened} <= {"file", "data"}
    assert {url for url in opened if url.startswith("file")} <= {p.as_uri() for p in tmp_path.glob("map.*")}


@pytest.fixture(scope="module")
def bert_facts():
    return tether.inspection.facts(bert())


@pytest.fixture(scope="module")
def tied_facts():
    return tether.inspection.facts(demo.autoencoder(demo.TIED, 1))


def geometry(page):
    """Numbers and visibility of everything that the script places."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".map, .map g, .map path, .map rect, .map text")].map((element) =>
            ["transform", "d", "x", "y", "width", "height", "display", "aria-expanded", "viewBox"].map(
                (name) => element.getAttribute(name) ?? ""))"""
    )


def as_written(path):
    """The same, of the file."""
    tags = ("g", "path", "rect", "text")
    elements = [element for element in Map(path).root.iter() if element.tag in tags or element.tag == "svg"]
    names = ("transform", "d", "x", "y", "width", "height", "display", "aria-expanded", "viewBox")
    return [[element.get(name) or "" for name in names] for element in elements]


def row(page, name):
    """The element of a layer, use or weight, by the start of its facts."""
    return page.locator(f".map [aria-label^='{name}']").first


def lit(page):
    return page.locator(".map .weight.lit").count()


@pytest.mark.parametrize("model", [bert, low_rank_child, lambda: demo.autoencoder(demo.TIED, 1), lambda: many(60)])
def test_the_script_places_everything_where_the_file_has_it(model, visit):
    page = visit(model(), width=1008)
    placed, written = geometry(page), as_written(page.path)
    assert len(placed) == len(written) > 20
    for now, before in zip(placed, written, strict=True):
        for a, b in zip(now, before, strict=True):
            assert re.sub(r"-?[\d.]+", "0", a) == re.sub(r"-?[\d.]+", "0", b)
            assert [float(n) for n in re.findall(r"-?[\d.]+", a)] == pytest.approx(
                [float(n) for n in re.findall(r"-?[\d.]+", b)], abs=0.25
            )


def test_hovering_shows_facts_and_dims_the_rest(visit, bert_facts):
    page = visit(bert_facts)
    tip = page.locator("#facts")
    assert tip.is_hidden()
    row(page, "token_embedding/embeddings;").locator(".solid").hover()
    text = tip.inner_text()
    assert text.startswith("token_embedding/embeddings\n")
    assert "shared by 2 uses" in text
    assert "read by logits/kernel = token_embedding.embeddings.T" in text
    assert lit(page) == 1
    other = row(page, "position_embedding/embeddings;")
    assert other.evaluate("element => Number(getComputedStyle(element).opacity)") < 0.5
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    assert lit(page) == 0


def test_hovering_a_ribbon_shows_the_facts_of_its_use(visit, tied_facts):
    page = visit(tied_facts)
    box = row(page, "decode/kernel").locator(".solid").bounding_box()
    page.mouse.move(box["x"] - 20, box["y"] + box["height"] - 15)
    assert page.locator("#facts").inner_text().startswith("decode/kernel = codec.T (Dense)")


def test_facts_stay_within_the_window(visit, bert_facts):
    page = visit(bert_facts, width=800, height=500)
    for part in (row(page, "token_embedding/embeddings;").locator(".solid"), row(page, "logits;").locator(".label")):
        part.hover()
        box = page.locator("#facts").bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["width"] <= 800 and box["y"] + box["height"] <= 500


def test_layers_close_and_open(visit, bert_facts):
    page = visit(bert_facts)
    block, query = row(page, "transformer_layer_3;"), row(page, "transformer_layer_3/self_attention_layer/query;")
    height = page.locator(".map").bounding_box()["height"]
    assert block.get_attribute("aria-expanded") == "false"
    assert query.is_hidden()
    block.locator(".label").click()
    assert block.get_attribute("aria-expanded") == "true"
    row(page, "transformer_layer_3/self_attention_layer;").locator(".label").click()
    assert query.is_visible()
    assert page.locator(".map").bounding_box()["height"] > height + 100
    block.locator(".label").click()
    assert query.is_hidden()
    assert page.locator(".map").bounding_box()["height"] == height


def test_a_click_on_a_stripe_opens_the_closed_layer_around_it(visit, bert_facts):
    page = visit(bert_facts)
    row(page, "transformer_layer_3/self_attention_layer/query/kernel;").locator(".solid").click(force=True)
    assert row(page, "transformer_layer_3;").get_attribute("aria-expanded") == "true"


def test_all_open_and_all_close(visit, bert_facts):
    page = visit(bert_facts)
    page.click("#open")
    assert page.locator(".use:visible").count() == len(bert_facts.uses)
    assert page.locator(".weight .name:visible").count() == len(bert_facts.weights)
    page.click("#close")
    assert page.locator(".heading[aria-expanded=true]").count() == 0
    assert page.locator(".use .name:visible").count() == 0
    assert page.locator(".ribbon").count() == sum(len(use.weights) for use in bert_facts.uses)


@pytest.mark.parametrize(
    ("words", "uses"),
    [
        ("layer_3/self_attention_layer/QUERY", ["query/bias", "query/kernel"]),
        ("logits/bias", ["logits/bias"]),
        ("embeddings.T", ["logits/kernel = token_embedding.embeddings.T", "token_embedding/embeddings = "]),
    ],
    ids=["layer", "weight", "expression"],
)
def test_search_shows_what_has_the_words_and_who_shares_it(words, uses, visit, bert_facts):
    page = visit(bert_facts)
    height = page.locator(".map").bounding_box()["height"]
    page.fill("#search", words)
    found = sorted(page.locator(".use:visible").evaluate_all("all => all.map((e) => e.getAttribute('aria-label'))"))
    assert len(found) == len(uses)
    assert all(part in label for part, label in zip(uses, found, strict=True))
    assert f"{len(uses)} of {len(bert_facts.uses)} uses" in page.locator("#found").inner_text()
    assert page.locator(".weight:visible").count() == len(
        {w for u in bert_facts.uses if line(u) in joined(found) for w in u.weights}
    )
    page.fill("#search", "")
    assert page.locator("#found").inner_text() == ""
    assert page.locator(".map").bounding_box()["height"] == height


def line(use):
    return f"{use.layer}/{use.attribute}"


def joined(labels):
    return {re.split(r"[ ;]", label)[0] for label in labels}


def test_a_search_without_a_match_says_so(visit, tied_facts):
    page = visit(tied_facts)
    page.fill("#search", "nothing like this")
    assert page.locator("#found").inner_text() == "0 of 3 weights, 0 of 4 uses"
    assert page.locator(".use:visible, .weight:visible, .heading:visible").count() == 0


def test_the_map_can_be_walked_with_the_keyboard(visit, bert_facts):
    page = visit(bert_facts)
    focused = "document.activeElement.getAttribute('aria-label')?.split(';')[0]"
    page.focus("#theme")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "token_embedding/embeddings"
    assert "shared by 2 uses" in page.locator("#facts").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "logits/bias"  # the others are in closed layers
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "shared weights"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "token_embedding"
    page.keyboard.press("Enter")
    assert row(page, "token_embedding;").get_attribute("aria-expanded") == "false"
    page.keyboard.press("ArrowRight")
    assert row(page, "token_embedding;").get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("token_embedding/embeddings = ")
    page.keyboard.press("End")
    assert page.evaluate(focused) == "logits/bias (Dense)"
    page.keyboard.press("Escape")
    assert page.locator("#facts").is_hidden()


def test_left_and_right_close_open_and_move_as_in_any_tree(visit):
    page = visit(tied_blocks(3))
    focused = "document.activeElement.getAttribute('aria-label')?.split(/[; ]/)[0]"
    page.focus("#theme")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    for key, expected in [
        ("ArrowDown", "embedding/embeddings"),
        ("ArrowLeft", "embedding"),
        ("ArrowDown", "embedding/embeddings"),
        ("ArrowDown", "block_0"),
        ("ArrowRight", "block_0/attention"),
        ("ArrowRight", "block_0/attention/query"),
        ("ArrowLeft", "block_0/attention/query"),  # closed
        ("ArrowLeft", "block_0/attention"),
        ("ArrowLeft", "block_0/attention"),
        ("ArrowDown", "block_0/mlp"),
        ("ArrowUp", "block_0/attention"),
        ("ArrowRight", "block_0/attention"),  # opened again
        ("ArrowRight", "block_0/attention/query"),
    ]:
        page.keyboard.press(key)
        assert page.evaluate(focused) == expected, key
    ring = page.evaluate("getComputedStyle(document.activeElement.querySelector('.hit')).stroke")
    assert ring == "rgb(27, 36, 48)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_serious(scheme, width, visit):
    page = visit(tied_blocks(6, tied=(3, 5)), width=width, scheme=scheme)
    page.evaluate(axe())
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), { src: 'data:,' }))")
    assert "image-alt" in serious(page)  # axe does find what is wrong
    page.evaluate("document.querySelector('img').remove()")
    assert serious(page) == set()
    page.click("#open")
    row(page, "block_3;").locator(".label").hover()
    assert serious(page) == set()
    page.fill("#search", "block_5")
    assert serious(page) == set()


def axe():
    """The program that judges whether a page can be used by everyone."""
    try:
        return importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        pytest.fail("The page is judged by axe, which is not installed: make browser")


def serious(page):
    """The rules that axe finds broken, except those of little weight."""
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    return {rule["id"] for rule in found["violations"] if rule["impact"] in ("serious", "critical")}


def test_on_a_telephone_the_layers_are_in_the_window_and_can_be_opened(visit, bert_facts):
    page = visit(bert_facts, width=390, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    blocks = page.locator(".heading .name:visible")
    assert blocks.count() > 12
    row(page, "transformer_layer_3;").locator(".label").click()
    assert row(page, "transformer_layer_3;").get_attribute("aria-expanded") == "true"
    page.click("#open")
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("header *, .map text, .map rect, .map path")]
            .map((e) => [e.textContent, e.getBoundingClientRect()]).filter(([, box]) => box.width)
            .map(([words, { left, right }]) => [words, left, right])"""
    )
    assert len(boxes) > 500
    assert [words for words, left, right in boxes if left < 0 or right > 390] == []
    shown = page.locator(".map text:visible").all_text_contents()
    assert any(text.startswith("kernel = token_embedding.embed") for text in shown)


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_ribbons_reach_from_the_bars_of_weights_to_those_of_uses(width, visit, tied_facts):
    page = visit(tied_facts, width=width)
    left, right, ribbons = page.evaluate(
        """() => [".weight > .box", ".use > .solid", ".ribbon"].map((selector) =>
            [...document.querySelectorAll(selector)].map((element) => element.getBoundingClientRect())
                .map(({ left, right }) => [left, right]))"""
    )
    assert len(ribbons) == 4
    for start, end in ribbons:
        assert start == pytest.approx(left[0][1], abs=0.6)
        assert end == pytest.approx(right[0][0], abs=0.6)


def test_a_window_that_was_narrow_shows_what_a_wide_one_does(visit, bert_facts):
    page = visit(bert_facts)
    before = geometry(page)
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.querySelector('.map').clientWidth < 390")
    assert geometry(page) != before
    page.set_viewport_size({"width": 1280, "height": 800})
    page.wait_for_function("document.querySelector('.map').clientWidth > 1000")
    assert geometry(page) == before


def test_what_is_closed_and_opened_again_is_as_before(visit):
    page = visit(tied_blocks(3))
    before = geometry(page)
    page.click("#close")
    assert geometry(page) != before
    page.click("#open")
    assert geometry(page) == before


def test_on_paper_the_map_is_light_whole_and_without_tools(visit, bert_facts):
    page = visit(bert_facts, width=1280, scheme="dark")
    page.click("#theme")
    page.click("#theme")  # chosen dark
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 1000, "height": 700})
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 252, 253)"
    assert page.locator(".tools").is_hidden()
    assert page.locator(".map").bounding_box()["width"] <= 1000
    assert page.evaluate("getComputedStyle(document.querySelector('main')).overflowX") == "visible"


def test_in_the_frame_of_a_notebook_the_page_works_and_cannot_reach_the_notebook(chromium, tmp_path, tied_facts):
    page = chromium.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_content("<title>notebook</title>" + tether.plot(tied_facts, tmp_path / "map.html")._repr_html_())
    frame = page.frame_locator("iframe")
    frame.locator("#close").click()
    assert frame.locator(".heading[aria-expanded=true]").count() == 0
    assert frame.locator(".heading").count() == 2
    assert said == []
    reach = "() => { try { return parent.document.title; } catch (error) { return error.name; } }"
    assert page.frames[1].evaluate(reach) == "SecurityError"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(scheme, visit, tied_facts):
    page = visit(tied_facts, scheme=scheme)
    colours = {"light": "rgb(251, 252, 253)", "dark": "rgb(20, 24, 29)"}
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == colours[scheme]
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.locator("#theme").inner_text().lower() == other
    page.click("#theme")
    assert page.evaluate(paper) == colours[other]
    assert page.locator("#theme").inner_text().lower() == scheme
    page.click("#theme")
    assert page.evaluate(paper) == colours[scheme]


@pytest.mark.parametrize(("scheme", "colour"), [("light", "rgb(251, 252, 253)"), ("dark", "rgb(20, 24, 29)")])
def test_a_drawing_alone_is_light_or_dark(scheme, colour, visit, tied_facts):
    page = visit(tied_facts, scheme=scheme, suffix=".svg")
    assert page.evaluate("getComputedStyle(document.querySelector('.paper')).fill") == colour


@pytest.mark.parametrize("width", [800, 1280, 1900])
def test_all_words_are_within_the_page_and_within_their_columns(width, visit, bert_facts):
    page = visit(bert_facts, width=width)
    page.click("#open")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    frame = page.locator(".map").bounding_box()
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".map text")].filter((e) => e.getBoundingClientRect().width).map((e) => {
            const { left, right } = e.getBoundingClientRect();
            return [e.textContent, left, right];
        })"""
    )
    assert len(boxes) > 300
    for text, left, right in boxes:
        assert left >= frame["x"] - 1, text
        assert right <= frame["x"] + frame["width"] + 1, text


def test_names_that_attack_do_no_harm(visit):
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    w = stored("w", path=name)
    made = facts_of([w], [reads(name, "w", attribute=name, expression=name, tied=True)], name=name)
    page = visit(made, title=name)
    assert page.title() == name
    assert page.locator("h1").inner_text() == name
    row(page, "</script>").locator(".solid").hover()
    assert page.locator("#facts").inner_text().startswith(name)
    page.fill("#search", "<img")
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0


def test_the_policy_keeps_the_page_from_the_network(chromium, tmp_path):
    page = chromium.new_page()
    page.goto(tether.plot(many(2), tmp_path / "map.html").as_uri())
    blocked = page.evaluate(
        """async () => {
            const found = [];
            addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
            await fetch("http://127.0.0.1:9/").catch(() => {});
            document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/" }));
            document.body.append(Object.assign(document.createElement("script"), { textContent: "window.ran = true" }));
            await new Promise((done) => setTimeout(done, 100));
            return [...found, window.ran ?? "not run"];
        }"""
    )
    assert sorted(blocked) == ["connect-src", "img-src", "not run", "script-src-elem"]
    page.close()


def test_a_thousand_weights_can_be_searched(visit):
    page = visit(many(1000))
    page.fill("#search", "block_123/layer_2")
    assert page.locator("#found").inner_text() == "1 of 1000 weights, 1 of 1000 uses"

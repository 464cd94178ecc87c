"""A model's card, and the Hugging Face Hub, of which a stand-in is asked."""

import inspect
import re
import sys

import keras
import numpy as np
import pytest
from markdown_it import MarkdownIt

import tether
from tests import fake_hub
from tests.kinds import Bilinear
from tests.support import numpy
from tether.adapters.manage import own_weights
from tether.errors import InvalidConfig, LostTie, TetherError, Unsupported

layers = keras.layers


@pytest.fixture
def hub(monkeypatch, tmp_path):
    return fake_hub.install(monkeypatch, tmp_path / "hub")


def words(name="words", embedding="embedding", head="head", width=8, tied=True):
    tokens = keras.Input((6,), dtype="int32")
    embed = layers.Embedding(20, width, name=embedding)
    h = layers.Dropout(0.5)(embed(tokens))
    model = keras.Model(tokens, layers.Dense(20, name=head)(h), name=name)
    if tied:
        tether.tie(model, {f"{head}/kernel": tether.weight_of(embed, "embeddings").T})
    return model


def tables(text):
    """The tables of a text, as a reader of Markdown sees them: rows of the texts of the cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found = []
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append("".join(part.content or "\n" for part in tokens[number + 1].children))
    return found


def headings(text):
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    shown = [tokens[number + 1] for number, token in enumerate(tokens) if token.type == "heading_open"]
    return ["".join(part.content for part in inline.children) for inline in shown]


# --------------------------------------------------------------------------- the card


def test_a_card_says_what_is_stored_and_shared():
    model = words()
    text = tether.files.card(model)
    sizes, shared, _ = tables(text)
    stored = 20 * 8 + 20
    assert sizes[1][1:] == [f"{stored:,}", f"{tether.inspection.facts(model).stored_bytes:,}"]
    assert sizes[2][1:] == [f"{stored + 20 * 8:,}", f"{tether.inspection.facts(model).unshared_bytes:,}"]
    assert f"{stored} of the parameters train." in text
    name, shape, dtype, uses = shared[1]
    assert (name, shape, dtype, len(shared)) == ("embedding/embeddings", "(20, 8)", "float32", 2)
    assert "embedding/embeddings as embedding.embeddings" in uses and "head/kernel as embedding.embeddings.T" in uses
    assert headings(text) == ["words", "What is stored", "What is shared", "How to load it", "Versions"]


def test_a_card_says_the_versions_and_how_to_load(tmp_path, monkeypatch):
    model = words()
    text = tether.files.card(model)
    versions = dict(tables(text)[-1])
    assert versions["keras"] == keras.__version__ and versions["keras-tether"] == tether.__version__
    backend = keras.backend.backend()
    assert versions[f"{backend} (the backend)"] == sys.modules[backend].__version__
    monkeypatch.chdir(tmp_path)
    tether.files.save_model(model, "model.keras")
    namespace = {}
    exec(re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1], namespace)
    assert namespace["model"].name == "words"
    assert "custom_objects" not in text


def test_a_card_names_classes_that_the_reader_has_to_have():
    x, table = keras.Input((4,)), tether.Weight((4, 4), name="table")
    text = tether.files.card(keras.Model(x, Bilinear(table)(x)))
    assert keras.saving.get_registered_name(Bilinear) in text and "custom_objects" in text


def test_a_card_has_the_adapters_and_not_their_strengths():
    model = words()
    tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(2)}, also="*/bias")
    tether.adapters.add(
        model, "german", {"head/kernel": tether.low_rank(3), "embedding/embeddings": tether.low_rank(5)}
    )
    tether.adapters.add(model, "louder", {"head/kernel": tether.forms.scale(axis=-1)})
    text = tether.files.card(model)
    adapters = tables(text)[2]
    own = {name: sum(int(np.prod(weight.shape)) for weight in found) for name, found in own_weights(model).items()}
    assert adapters[1] == ["french", "2", "2", str(2 * (20 + 8) + 20)] == ["french", "2", "2", str(own["french"])]
    assert adapters[2] == ["german", "2", "3, 5", str(3 * 28 + 5 * 28)] == ["german", "2", "3, 5", str(own["german"])]
    assert adapters[3][:3] == ["louder", "1", "none"] and adapters[3][3] == str(own["louder"])
    assert [row[0] for row in tables(text)[1][1:]] == ["embedding/embeddings"]


def test_a_plain_model_has_a_card_too():
    text = tether.files.card(words(tied=False))
    assert "No weight has more than one use." in text and "Tether" not in text.partition("How to load")[0]


HOSTILE = ["a|b", "`a` ``b", "<script>alert(1)", "*a*_b_", "[a](b)", "a\\|b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_name_is_it_is_shown_as_it_is(name):
    model = words(name=name, embedding=name, head=f"{name}2")
    text = tether.files.card(model)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert headings(text)[0] == name
    assert "<script" not in html and "<a " not in html
    _, shared, _ = tables(text)
    assert [len(row) for row in shared] == [4, 4]
    assert shared[1][0] == f"{name}/embeddings"
    assert f"{name}2/kernel as {name}.embeddings.T" in shared[1][3]


def test_a_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, path = words(), tmp_path / "README.md"
    text = tether.files.card(model, path)
    assert path.read_text(encoding="utf-8") == text

    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="full"):
        tether.files.card(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert path.read_bytes() == text.encode()


def test_what_has_no_card(tmp_path):
    with pytest.raises(TetherError, match="that of a Keras model"):
        tether.files.card(layers.Dense(3))
    with pytest.raises(TetherError, match="not built"):
        tether.files.card(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(TetherError, match="does not exist"):
        tether.files.card(words(), tmp_path / "nowhere/README.md")
    with pytest.raises(TetherError, match="is a folder"):
        tether.files.card(words(), tmp_path)


# --------------------------------------------------------------------------- the Hub


def test_a_model_goes_to_the_hub_and_comes_back_tied(hub, rng):
    model = words()
    x = rng.integers(0, 20, (2, 6))
    assert tether.files.push(model, "me/words", private=True, token="secret") == "https://hub.example/me/words"
    assert {file.name for file in (hub.folder / "me/words").iterdir()} == {"model.keras", "README.md"}
    card = (hub.folder / "me/words/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: keras\n") and "secret" not in card
    assert "model = tether.files.pull('me/words')" in card
    again = tether.files.pull("me/words", token="secret")
    np.testing.assert_allclose(numpy(again(x)), numpy(model(x)), rtol=1e-6)
    assert [row[0] for row in tables(tether.files.card(again))[1][1:]] == ["embedding/embeddings"]
    assert hub.calls == [
        ("create_repo", "me/words", {"private": True, "token": "secret"}),
        ("upload_folder", "me/words", {"revision": None, "commit_message": "Saves words", "token": "secret"}),
        ("hf_hub_download", "me/words", {"revision": None, "token": "secret"}),
    ]


def test_what_is_asked_for_is_handed_on(hub):
    (hub.folder / "me/words").mkdir(parents=True)
    (hub.folder / "me/words/README.md").write_text("mine")
    tether.files.push(words(), "me/words", revision="next", commit_message="Better", card=False)
    assert (hub.folder / "me/words/README.md").read_text() == "mine"
    assert hub.calls[1][2] == {"revision": "next", "commit_message": "Better", "token": None}
    (hub.folder / "me/words/model.keras").rename(hub.folder / "me/words/other.keras")
    assert tether.files.pull("me/words", filename="other.keras", revision="next", compile=False).name == "words"
    assert hub.calls[2][2] == {"revision": "next", "token": None}


def test_nothing_is_made_for_a_model_that_cannot_be_saved(hub, monkeypatch):
    from tether.files.publishing import hub as module

    def loses(*_):
        raise LostTie("a tie would be lost")

    monkeypatch.setattr(module, "save_model", loses)
    with pytest.raises(LostTie):
        tether.files.push(words(), "me/words")
    with pytest.raises(TetherError, match="not built"):
        tether.files.push(keras.Sequential([layers.Dense(3)]), "me/words")
    with pytest.raises(TetherError, match="'owner/name'"):
        tether.files.push(words(), "")
    assert hub.calls == []


def test_what_is_not_there_is_named(hub):
    tether.files.push(words(), "me/words")
    with pytest.raises(TetherError, match=r"no file 'gone\.keras'.*filename="):
        tether.files.pull("me/words", filename="gone.keras")
    hub.is_reached = False
    with pytest.raises(fake_hub.LocalEntryNotFoundError):
        tether.files.pull("me/words")


def test_what_comes_from_the_hub_is_read_as_a_strangers_file(hub):
    tether.files.push(words(), "me/words")
    file = hub.folder / "me/words/model.keras"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InvalidConfig):
        tether.files.pull("me/words")


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: tether.files.push(words(), "me/words"), lambda: tether.files.pull("me/words")):
        with pytest.raises(Unsupported, match=r"pip install 'keras-tether\[hub\]'"):
            call()


def test_the_stand_in_takes_what_the_package_takes(tmp_path):
    """Whatever the stand-in has, the package has by the same name and kind."""
    import huggingface_hub as real  # which the tests' tokenizers need

    fake = fake_hub.FakeHub(tmp_path).module()
    for path in ("HfApi.__init__", "HfApi.create_repo", "HfApi.upload_folder", "hf_hub_download"):
        mine, theirs = fake, real
        for name in path.split("."):
            mine, theirs = getattr(mine, name), getattr(theirs, name)
        taken = inspect.signature(theirs).parameters
        for name, parameter in inspect.signature(mine).parameters.items():
            assert name in taken, (path, name)
            assert (taken[name].default is taken[name].empty) == (parameter.default is parameter.empty), (path, name)
    assert issubclass(real.errors.LocalEntryNotFoundError, real.errors.EntryNotFoundError)

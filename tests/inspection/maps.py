"""Reading a weight map back, and models to draw."""

import re
from xml.etree import ElementTree

import keras

import tether
from tether.inspection import Facts, StoredWeight, UseOf

SVG = "{http://www.w3.org/2000/svg}"


class Map:
    """What a map shows, of an SVG or of the drawing in a page."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        drawing = self.text if path.suffix == ".svg" else re.search(r"<svg.*</svg>", self.text, re.DOTALL).group()
        self.root = ElementTree.fromstring(drawing.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1))
        self.weights = {self.name(g): g for g in self.all("weight")}
        self.rows = self.root.find(".//g[@class='rows']").findall("g")
        self.uses = [g for g in self.rows if "use" in g.get("class").split()]
        self.headings = {self.name(g): g for g in self.rows if "heading" in g.get("class").split()}
        self.ribbons = self.all("ribbon")

    def all(self, kind):
        return [element for element in self.root.iter() if kind in element.get("class", "").split()]

    def name(self, element):
        """The first line of the facts."""
        return element.find("title").text.split("\n")[0]

    def connections(self):
        """The names of the weight and of the use of each ribbon."""
        by_id = {element.get("id"): element for element in self.root.iter() if element.get("id")}
        return sorted(
            (self.name(by_id["w" + ribbon.get("data-weight")]), self.name(by_id["r" + ribbon.get("data-row")]))
            for ribbon in self.ribbons
        )

    def words(self, part=None):
        """All that is written in the drawing, or in a part of it."""
        return [
            "".join(text.itertext()) for top in (self.all(part) if part else [self.root]) for text in top.iter("text")
        ]


def line_of(use):
    """How a map says what a use reads."""
    attribute = use.attribute or "/".join(use.weights[0].split("/")[-2:])
    expression = f" = {use.expression}" if use.expression else ""
    return f"{use.layer}/{attribute}{expression}" + (f" ({use.kind})" if use.kind else "")


def stored(place, shape=(8, 4), **options):
    return StoredWeight(place, shape, "float32", **{"path": place, "trainable": True, **options})


def reads(layer, *places, attribute="kernel", shape=(8, 4), **options):
    return UseOf(layer, attribute, options.pop("expression", None), places, shape, "float32", "Dense", **options)


def facts_of(weights, uses, name="made"):
    layers = dict.fromkeys((use.layer, use.kind) for use in uses)
    return Facts(name, tuple(weights), tuple(uses), layers=tuple(layers))


def many(count, block=4):
    """Facts of so many weights, in blocks of layers of one weight."""
    weights = [stored(f"block_{n // block}/layer_{n % block}/kernel") for n in range(count)]
    return facts_of(weights, [reads(f"block_{n // block}/layer_{n % block}", w.place) for n, w in enumerate(weights)])


def tied_blocks(count, tied=()):
    """Facts of a table, so many blocks, and a head that reads the table; the blocks of `tied` share a kernel."""
    table, common = stored("table", (1000, 64)), stored("common", (64, 64))
    uses = [reads("embedding", "table", attribute="embeddings", shape=(1000, 64), expression="table", tied=True)]
    weights = [table, *([common] if tied else [])]
    for n in range(count):
        for layer in (f"block_{n}/attention/query", f"block_{n}/attention/key", f"block_{n}/mlp"):
            if n in tied and layer.endswith("mlp"):
                uses.append(reads(layer, "common", shape=(64, 64), expression="common", tied=True))
                continue
            weights.append(stored(f"{layer}/kernel", (64, 64)))
            uses.append(reads(layer, f"{layer}/kernel", shape=(64, 64)))
    uses.append(reads("head", "table", shape=(64, 1000), expression="table.T", tied=True))
    return facts_of(weights, uses, name="tied_blocks")


def low_rank_child():
    """A parent and a child that adds a small weight to the parent's frozen one."""
    parent = keras.layers.Dense(16, name="parent")
    inputs = keras.Input((32,))
    first = parent(inputs)
    child = tether.inherit(parent, kernel=lambda w: w.stop_gradient() + tether.low_rank(2))
    child.name = "child"
    return keras.Model(inputs, [first, child(inputs)], name="family")


def bert(vocabulary=60, width=8, inner=16, heads=2, blocks=12, length=16):
    """BERT with the head that guesses words, on the transposed table of words."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=vocabulary,
        num_layers=blocks,
        num_heads=heads,
        hidden_dim=width,
        intermediate_dim=inner,
        max_sequence_length=length,
    )
    x = keras.layers.Dense(width, activation="gelu", name="transform")(backbone.output["sequence_output"])
    head = keras.layers.Dense(vocabulary, name="logits")
    tether.tie(head, kernel=tether.weight_of(backbone.token_embedding, "embeddings").T)
    return keras.Model(backbone.input, head(keras.layers.LayerNormalization(name="norm")(x)), name="bert")

"""One pattern language: a list means the same weights to every function that takes one."""

import re

import keras
import pytest

import tether
from tether import adapters
from tether.errors import UnknownName
from tether.layers.tying.state import slots_of
from tether.layers.tying.tie import by_path

pytestmark = pytest.mark.spread

layers = keras.layers
BIASES = {"left/bias", "right/bias", "head/bias"}
KERNELS = {"left/kernel", "right/kernel", "head/kernel"}
LISTS = [
    ("*/kernel", KERNELS),
    ("all-linear", KERNELS),
    (["all-linear", "!head/*"], KERNELS - {"head/kernel"}),
    (["!head/*", "all-linear"], {"left/bias", "right/bias", "norm/gamma", *KERNELS}),
    (["*", "!all-linear"], {*BIASES, "norm/gamma"}),
    (["!all-linear"], {*BIASES, "norm/gamma"}),
    (["all-linear", "*/bias"], KERNELS | BIASES),
    (["*/bias", "!left/*", "all-linear", "!right/*"], {"head/bias", "head/kernel", "left/kernel"}),
    (["!left/*", "!right/*"], {"head/kernel", "head/bias", "norm/gamma"}),
    (["*/kernel", "!head/*", "head/*"], {*KERNELS, "head/bias"}),
    ([re.compile(r"(left|head)/.*"), "!*/bias"], {"left/kernel", "head/kernel"}),
]


PLACES = ["", "left", "norm", "right", "head"]


def block(name="block"):
    x = keras.Input((4,))
    y = layers.Dense(4, name="left")(x)
    y = layers.RMSNormalization(name="norm")(y)
    y = layers.Dense(4, name="right")(y)
    return keras.Model(x, layers.Dense(4, name="head")(y), name=name)


def by_adding(model, pattern):
    adapters.add(model, "a", {tuple(pattern) if isinstance(pattern, list) else pattern: tether.forms.full()})
    return set(adapters.manage.adapted_weights(model))


def by_also(model, pattern):
    adapters.add(model, "a", {}, also=pattern)
    return set(adapters.manage.adapted_weights(model))


def by_tying(model, pattern):
    key = tuple(pattern) if isinstance(pattern, list) else pattern
    return set(by_path(model, {key: 1.0}))


def by_inheriting(model, pattern):
    key = tuple(pattern) if isinstance(pattern, list) else pattern
    child = tether.inherit(model, {key: lambda w: 2.0 * w}, share=False)
    return {path for path, rule in tied_paths(child) if rule.startswith("2.0")}


def by_sharing(model, pattern):
    child = tether.inherit(model, share=pattern if isinstance(pattern, list) else [pattern])
    return {path for path, _ in tied_paths(child)}


def by_depth(model, pattern):
    other = keras.models.clone_model(model)
    shared = tether.share_depth([model, other], "all", only=pattern, keep=())
    return {row.name for row in shared.weights if row.how == "shared"}


def by_aliases(model, pattern):
    paths = {id(variable): path for path, variable in stored(model)}
    return {paths[id(variable)] for variable in tether.inspection.aliases(model).find(pattern)}


def stored(model):
    return [(f"{layer.name}/{v.name}", v) for layer in model.layers for v in layer.weights]


def tied_paths(model):
    return [
        (f"{layer.name}/{slot.view.name}", slot.view.expression.notation())
        for layer in model.layers
        for slot in slots_of(layer)
    ]


WAYS = {way.__name__: way for way in (by_adding, by_also, by_tying, by_inheriting, by_sharing, by_depth, by_aliases)}


@pytest.mark.parametrize("pattern", range(len(LISTS)), ids=[str(each) for each, _ in LISTS])
@pytest.mark.parametrize("way", WAYS)
def test_a_list_means_the_same_weights_everywhere(way, pattern):
    given, meant = LISTS[pattern]
    model = block()
    scale = next(v.name for v in model.get_layer("norm").weights)
    meant = {name.replace("norm/gamma", f"norm/{scale}") for name in meant}
    found = {
        re.sub(r"layers/(\d)/", lambda place: f"{PLACES[int(place[1])]}/", name) for name in WAYS[way](model, given)
    }
    assert found == meant


def test_a_name_to_share_that_is_not_there_is_an_error():
    for share in (["no_such"], ["*/kernel", "!no_such/*"], ["*/kernel", "no_such"]):
        with pytest.raises(UnknownName, match="no_such"):
            tether.inherit(block(), share=share)

"""Which copies share: a copy is tied within itself, wherever it is made, and never to its original or another copy."""

import copy
import pickle

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy

layers = keras.layers


def tied_net(name="net"):
    weight = tether.Weight(name="w")
    one, two = (
        tether.tie(layers.Dense(3, use_bias=False, name=n), kernel=e) for n, e in (("one", weight), ("two", weight.T))
    )
    x = keras.Input((3,))
    return keras.Model(x, two(one(x)), name=name)


def kernels(net):
    return [numpy(net.get_layer(name).kernel) for name in ("one", "two")]


def is_tied(net):
    one, two = kernels(net)
    return np.array_equal(one, two.T)


def moves(net, others):
    """Whether a change of one network's weight is seen by that network alone."""
    before = [kernels(other) for other in others]
    net.get_layer("one").kernel.assign(np.arange(9.0).reshape(3, 3) + 100)
    after = [kernels(other) for other in others]
    alone = all(np.array_equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    return alone and is_tied(net) and kernels(net)[0][0, 0] == 100


GLOBAL = {}

COPIES = {
    "clone_model": keras.models.clone_model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "from_config": lambda net: type(net).from_config(net.get_config()),
    "deserialize": lambda net: keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(net)),
    "clone_model_of_another": lambda net: keras.models.clone_model(GLOBAL["net"]),
}


@keras.saving.register_keras_serializable("copies")
class Agent(keras.Model):
    """Copies the network that it is given, twice, in its constructor."""

    def __init__(self, online, way="clone_model", **kwargs):
        super().__init__(**kwargs)
        self.online, self.way = online, way
        self.targets = [COPIES[way](online) for _ in range(2)]

    @property
    def nets(self):
        return [self.online, *self.targets]

    def call(self, x):
        return sum((k + 1.0) * net(x) for k, net in enumerate(self.nets))

    def get_config(self):
        online = keras.saving.serialize_keras_object(self.online)
        return {**super().get_config(), "online": online, "way": self.way}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        return cls(keras.saving.deserialize_keras_object(config.pop("online")), **config)


@keras.saving.register_keras_serializable("copies")
class LateAgent(Agent):
    """Does so when it is built."""

    def __init__(self, online, way="clone_model", **kwargs):
        keras.Model.__init__(self, **kwargs)
        self.online, self.way, self.targets = online, way, []

    def build(self, shape):
        self.targets = [COPIES[self.way](self.online) for _ in range(2)]


def again_from_config(agent, tmp_path):
    made = type(agent).from_config(agent.get_config())
    made(np.ones((1, 3), "float32"))
    return made


def again_from_file(agent, tmp_path):
    agent.save(tmp_path / "agent.keras")
    return keras.saving.load_model(tmp_path / "agent.keras")


def again_from_ours(agent, tmp_path):
    tether.files.save_model(agent, tmp_path / "agent.keras")
    return tether.files.load_model(tmp_path / "agent.keras")


def again_twice(agent, tmp_path):
    return again_from_file(again_from_file(agent, tmp_path), tmp_path)


AGAIN = {
    "made": lambda agent, tmp_path: agent,
    "from_config": again_from_config,
    "loaded": again_from_file,
    "loaded_by_tether": again_from_ours,
    "loaded_twice": again_twice,
    "deepcopied": lambda agent, tmp_path: copy.deepcopy(agent),
}


@pytest.mark.parametrize("again", list(AGAIN))
@pytest.mark.parametrize("way", list(COPIES))
@pytest.mark.parametrize("cls", [Agent, LateAgent])
def test_networks_that_a_constructor_or_build_copies_are_apart(cls, way, again, tmp_path):
    if way in ("deepcopy", "pickle") and again == "loaded_twice":
        return  # one file more of what "loaded" says
    GLOBAL["net"] = tied_net()
    agent, x = cls(tied_net(), way), np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
    agent(x)
    for k, net in enumerate(agent.nets):
        net.get_layer("one").kernel.assign(np.random.default_rng(k).normal(size=(3, 3)))
    made = AGAIN[again](agent, tmp_path)
    if again not in ("made", "from_config"):
        np.testing.assert_allclose(numpy(made(x)), numpy(agent(x)), rtol=1e-5)
    nets = made.nets
    assert len(nets) == 3 and all(is_tied(net) for net in nets)
    assert len(made.weights) == 3
    for net in nets:
        assert moves(net, [*(other for other in nets if other is not net), GLOBAL["net"]])
    if made is not agent:
        assert kernels(agent.online)[0][0, 0] != 100


@keras.saving.register_keras_serializable("copies")
class Reader(layers.Layer):
    """Reads its part from a config in its constructor, as many classes do."""

    def __init__(self, part, **kwargs):
        super().__init__(**kwargs)
        self.part = keras.saving.deserialize_keras_object(part) if isinstance(part, dict) else part

    def call(self, x):
        return self.part(x)

    def get_config(self):
        return {**super().get_config(), "part": keras.saving.serialize_keras_object(self.part)}


@pytest.mark.parametrize("again", ["save", "clone", "from_config"])
def test_a_part_that_a_constructor_reads_from_a_config_stays_tied_to_what_is_around_it(again, tmp_path):
    weight = tether.Weight(name="w")
    x = keras.Input((3,))
    h = Reader(tether.tie(layers.Dense(3, use_bias=False, name="one"), kernel=weight), name="reader")(x)
    model = keras.Model(x, tether.tie(layers.Dense(3, use_bias=False, name="two"), kernel=weight.T)(h))
    if again == "save":
        model.save(tmp_path / "m.keras")
        made = keras.saving.load_model(tmp_path / "m.keras")
    else:
        made = keras.models.clone_model(model) if again == "clone" else type(model).from_config(model.get_config())
    made.get_layer("reader").part.kernel.assign(np.arange(9.0).reshape(3, 3))
    assert np.array_equal(numpy(made.get_layer("two").kernel), np.arange(9.0).reshape(3, 3).T)
    assert len(made.weights) == len(model.weights) == 1


def test_a_clone_function_that_clones_a_part_belongs_to_the_clone():
    weight = tether.Weight(name="w")
    inner = keras.Sequential([keras.Input((3,)), tether.tie(layers.Dense(3, use_bias=False), kernel=weight)], name="in")
    x = keras.Input((3,))
    model = keras.Model(x, tether.tie(layers.Dense(3, use_bias=False, name="out"), kernel=weight.T)(inner(x)))

    def part(layer):
        if isinstance(layer, keras.Model):
            return keras.models.clone_model(layer)
        return type(layer).from_config(layer.get_config())

    made = keras.models.clone_model(model, clone_function=part)
    assert len(made.weights) == len(model.weights) == 1
    assert made.weights[0] is not model.weights[0]


@pytest.mark.parametrize("name", ["build", "__init__", "from_config", "clone_model", "load_model", "call"])
def test_what_a_plain_function_is_called_plays_no_part(name, tmp_path):
    """A function is no constructor because of its name, and no copy either, whatever its first argument is."""

    def plain(model):
        weight = tether.weight_of(model.get_layer("first"), "kernel")
        tether.tie(model.get_layer("block").inner, kernel=weight.T)
        config = model.get_layer("first").get_config()
        return [type(model.get_layer("first")).from_config(config) for _ in range(2)]

    function = type(plain)(plain.__code__.replace(co_name=name), globals(), name)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="first"), Block(name="block")])
    one, two = function(model)
    for copied in (one, two):
        copied.build((None, 4))
    assert one.kernel.expression is not two.kernel.expression
    with pytest.raises(tether.errors.LostTie, match="would lose a tie"):
        model.save(tmp_path / "m.keras")


@keras.saving.register_keras_serializable("copies")
class Block(layers.Layer):
    """Makes a layer of its own, which its config does not hold."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)

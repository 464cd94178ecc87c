"""Whatever changes a layer's variables: the lists, the files and the backend know exactly what is stored afterwards."""

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy

pytestmark = pytest.mark.spread

layers = keras.layers


def plain():
    x = keras.Input((4,))
    h = layers.Dense(4, name="b")(layers.Dense(4, name="a")(x))
    return keras.Model(x, layers.BatchNormalization(name="n")(h))


def nested():
    inner = plain()
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(4, name="top")(inner(x)))
    model.get_layer = {"a": inner.get_layer("a"), "b": inner.get_layer("b"), "n": inner.get_layer("n")}.get
    return model


class Subclassed(keras.Model):
    """Keeps its layers in a list."""

    def __init__(self):
        super().__init__()
        self.parts = [layers.Dense(4, name="a"), layers.Dense(4, name="b"), layers.BatchNormalization(name="n")]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def get_layer(self, name):
        return next(part for part in self.parts if part.name == name)


def subclassed():
    model = Subclassed()
    model(np.ones((1, 4), "float32"))
    return model


MODELS = {"functional": plain, "nested": nested, "subclassed": subclassed}


def tie(model):
    tether.tie(model.get_layer("b"), kernel=tether.weight_of(model.get_layer("a"), "kernel").T)


def tie_to_new(model):
    tether.tie(model.get_layer("b"), kernel=tether.Weight((4, 4), "ones", name="new"), bias=tether.Weight(name="other"))


def untie(model):
    tie(model)
    tether.untie(model.get_layer("b"))


def untie_all(model):
    tie(model)
    tether.untie(model)


def tie_again(model):
    tie_to_new(model)
    tether.tie(model.get_layer("b"), kernel=tether.Weight((4, 4), "ones", name="newer"))


def state(model):
    tether.tie(model.get_layer("n"), moving_mean=tether.Weight((4,), "zeros", name="mean", trainable=False))


def low_rank(model):
    kernel = tether.weight_of(model.get_layer("a"), "kernel")
    tether.tie(model.get_layer("a"), kernel=kernel.stop_gradient() + tether.low_rank(2))


def shared_low_rank(model):
    tie(model)
    low_rank(model)


def adapters(model):
    tether.adapters.add(model, "x", {"*kernel": tether.low_rank(2)})


def adapters_merged(model):
    adapters(model)
    tether.adapters.merge(model)


def adapters_unmerged(model):
    adapters_merged(model)
    tether.adapters.unmerge(model)


def adapters_removed(model):
    adapters(model)
    tether.adapters.remove(model, "x")


def quantized(model):
    tie(model)
    model.get_layer("b").quantize("int8")


def failed(model):
    with pytest.raises(tether.TetherError):
        tether.tie(model.get_layer("b"), kernel=tether.Weight((4, 4), name="w"), bias=tether.Weight((9,), name="x"))


VERBS = [
    tie, tie_to_new, untie, untie_all, tie_again, state, low_rank, shared_low_rank, adapters, adapters_merged,
    adapters_unmerged, adapters_removed, quantized, failed,
]  # fmt: skip


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", list(MODELS))
def test_each_layer_lists_what_is_stored_once_and_computes_what_its_copy_computes(kind, verb, asked_before, tmp_path):
    model = MODELS[kind]()
    is_torch = keras.backend.backend() == "torch"
    if asked_before and is_torch:
        list(model.parameters())
    verb(model)
    assert len({id(v) for v in model.variables}) == len(model.variables)
    values = [np.array(value) for value in model.get_weights()]
    model.set_weights(values)
    for layer in keras.tree.flatten([model, *(model.get_layer(name) for name in "abn")]):
        if is_torch:
            assert {id(p) for p in layer.parameters()} == {id(v.value) for v in layer.variables}, layer.name
            state_dict = model.state_dict()
            assert {v.data_ptr() for v in state_dict.values()} == {v.value.data_ptr() for v in model.variables}
    model.save_weights(tmp_path / "m.weights.h5")
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    before = numpy(model(x))
    model.set_weights([np.zeros_like(value) for value in values])
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_allclose(numpy(model(x)), before, rtol=1e-5, atol=1e-6)


KINDS = {
    "dense": (lambda: layers.Dense(4), (4,), ["kernel", "bias"]),
    "lstm cell": (lambda: layers.LSTMCell(4), (4,), ["kernel", "recurrent_kernel", "bias"]),
    "norm": (lambda: layers.LayerNormalization(), (4,), ["gamma", "beta"]),
    "batch norm": (lambda: layers.BatchNormalization(), (4,), ["gamma", "beta", "moving_mean", "moving_variance"]),
}


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_of_several_ties_is_undone_and_the_order_stays(kind, built):
    make, shape, names = KINDS[kind]
    untied = make()
    untied.build((None, *shape))
    order = [v.name for v in untied.weights]
    for undone in names:
        for again in names:
            layer = make()
            if built:
                layer.build((None, *shape))
            weights = {name: tether.Weight(name=f"w_{name}") for name in names}
            tether.tie(layer, dict(weights))
            if not built:
                layer.build((None, *shape))
            place = {v.name: k for k, v in enumerate(untied.weights)}
            for name, weight in weights.items():
                weight.assign(np.full(untied.weights[place[name]].shape, float(place[name])))
            tether.untie(layer, undone)
            if again != undone:
                tether.untie(layer, again)
            weights[undone].assign(weights[undone].numpy() + 100)
            assert len(layer.weights) == len(order)
            assert [float(value.ravel()[0]) for value in layer.get_weights()] == [*map(float, range(len(order)))]
            kept = [name for name in names if name not in (undone, again)]
            for name in kept:
                weights[name].assign(weights[name].numpy() + 7)
                assert np.all(numpy(getattr(layer, name)) == place[name] + 7)


def dense(tied, way="promoted", **options):
    layer = layers.Dense(2, use_bias=False, kernel_initializer="ones", **options)
    if way == "before build" and tied:
        tether.tie(layer, kernel=tether.Weight(name="w"))
    layer.build((None, 2))
    if way == "promoted" and tied:
        tether.weight_of(layer, "kernel")
    if way == "tied" and tied:
        tether.tie(layer, kernel=tether.Weight(name="w"))
    return layer


WAYS = ["promoted", "tied", "before build"]


@pytest.mark.parametrize("way", WAYS)
def test_constraint_and_regularizer_of_a_tied_layer_read_as_of_a_plain_one(way):
    options = {"kernel_constraint": "non_neg", "kernel_regularizer": keras.regularizers.L2(0.5)}
    plain_layer, tied = dense(False, way, **options), dense(True, way, **options)
    for name in ("constraint", "regularizer"):
        assert type(getattr(tied.kernel, name)) is type(getattr(plain_layer.kernel, name)) is not type(None)
    tether.untie(tied)
    for name in ("constraint", "regularizer"):
        assert type(getattr(tied.kernel, name)) is type(getattr(plain_layer.kernel, name))


@pytest.mark.parametrize("way", WAYS)
def test_constraint_and_regularizer_that_are_set_later_act_as_on_a_plain_layer(way):
    x, y = np.ones((4, 2), "float32"), np.full((4, 2), -100.0, "float32")
    results = []
    for tied in (False, True):
        layer = dense(tied, way)
        layer.kernel.regularizer = keras.regularizers.L2(0.1)
        layer.kernel.constraint = keras.constraints.NonNeg()
        model = keras.Sequential([keras.Input((2,)), layer])
        assert float(numpy(sum(model.losses))) == pytest.approx(0.4)
        model.compile("sgd", "mse")
        model.fit(x, y, verbose=0)
        results.append(layer.get_weights()[0])
        layer.kernel.regularizer = layer.kernel.constraint = None
        assert not model.losses and layer.kernel.constraint is None
    np.testing.assert_allclose(results[0], results[1])


def test_a_constraint_cannot_be_set_on_what_is_made_of_a_weight():
    weight = tether.Weight((2, 2), "ones", name="w")
    layer = tether.tie(layers.Dense(2, use_bias=False), kernel=weight.T)
    layer.build((None, 2))
    layer.kernel.constraint = None
    with pytest.raises(tether.TetherError, match=r"Constrain the weight"):
        layer.kernel.constraint = keras.constraints.NonNeg()
    for name in ("constraint", "regularizer"):
        with pytest.raises(tether.TetherError, match="function of a tensor, or None"):
            setattr(layer.kernel, name, "non_neg")
    assert weight.variable.constraint is None


@keras.saving.register_keras_serializable("swap")
class Counter(layers.Layer):
    """Keeps a count in float32 whatever its layers compute in."""

    def build(self, shape):
        self.count = self.add_weight(name="count", shape=(), initializer="zeros", trainable=False, autocast=False)

    def call(self, x):
        self.count.assign_add(1.0 / 1024)
        return x


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("way", ["tied", "tied before build", "cloned", "loaded", "loaded by tether"])
def test_state_that_is_shared_is_kept_in_its_own_precision(way, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, (64, 3)).astype("float32")

    def model(tied):
        norm, counter = layers.BatchNormalization(name="n", momentum=0.9), Counter(name="c")
        if tied:
            tether.tie(norm, moving_mean=tether.Weight(name="mean"), moving_variance=tether.Weight(name="variance"))
            tether.tie(counter, count=tether.Weight(name="count"))
        return keras.Sequential([keras.Input((3,)), norm, counter, layers.Dense(1)])

    def after_fit(made):
        made.compile("sgd", "mse")
        made.fit(x, x[:, :1], epochs=2, shuffle=False, verbose=0)
        norm, counter = made.get_layer("n"), made.get_layer("c")
        return [numpy(v).astype("float32") for v in (norm.moving_mean, norm.moving_variance, counter.count)]

    wanted = after_fit(model(False))
    assert np.all(np.abs(wanted[0]) > 0.01) and wanted[2] > 0
    made = model(way == "tied before build")
    if way != "tied before build":
        for name in ("n/moving_mean", "n/moving_variance", "c/count"):
            tether.weight_of(made, name)
    if way == "cloned":
        made = keras.models.clone_model(made)
    elif way.startswith("loaded"):
        made.save(tmp_path / "m.keras")
        load = keras.saving.load_model if way == "loaded" else tether.files.load_model
        made = load(tmp_path / "m.keras")
    for one, two in zip(wanted, after_fit(made), strict=True):
        np.testing.assert_allclose(one, two, rtol=0.02)

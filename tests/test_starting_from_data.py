"""Adapters whose first factors start from data: the directions of the inputs, and what a low-rank part mends."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether import adapters
from tether.errors import TetherError, UnknownName
from tether.forms.low_rank import factors_of
from tether.layers.family.named import named_weights

pytestmark = pytest.mark.spread

layers = keras.layers
KINDS = {
    "dense": (lambda: layers.Dense(3), (4, 6), lambda x: x.reshape(-1, 6)),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (4, 6), lambda x: x.reshape(-1, 6)),
    "einsum, ellipsis": (lambda: layers.EinsumDense("...x,xy->...y", 3), (4, 6), lambda x: x.reshape(-1, 6)),
    "einsum, two axes": (
        lambda: layers.EinsumDense("abcd,cde->abe", (None, 5)), (4, 2, 3), lambda x: x.reshape(-1, 6),
    ),
    "einsum, inputs first": (
        lambda: layers.EinsumDense("abc,bd->adc", (3, 4)), (6, 4), lambda x: x.transpose(0, 2, 1).reshape(-1, 6),
    ),
}  # fmt: skip


def make_model(kind="dense", rank=2):
    make, shape, _ = KINDS[kind]
    keras.utils.set_random_seed(1)
    x = keras.Input(shape)
    model = keras.Model(x, make()(x))
    model.trainable = False
    return adapters.add(model, "a", {"*/kernel": tether.low_rank(rank)})


def factor(model, path=None):
    expression = adapters.manage.adapted_weights(model)
    return factors_of(expression[path or next(iter(expression))].parts["a"][1])[1]


def data(kind, rng, count=16):
    """Inputs that vary far more in some directions than in others."""
    x = rng.normal(size=(count, *KINDS[kind][1]))
    rows = KINDS[kind][2](x)
    mixed = rows * np.array([5.0, 0.1, 3.0, 0.2, 0.1, 0.3])
    x[...] = mixed.reshape(count, 4, 6).transpose(0, 2, 1) if kind == "einsum, inputs first" else mixed.reshape(x.shape)
    return x.astype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_factor_spans_the_leading_directions_of_all_batches(kind, rng):
    model, x = make_model(kind), data(kind, rng)
    before = numpy(model(x))
    shares = adapters.start_from(model, "a", [x[:4], x[4:7], x[7:]])
    rows = KINDS[kind][2](x).astype("float64")
    _, s, v = np.linalg.svd(rows, full_matrices=False)
    a = factor(model).numpy().reshape(6, 2)
    assert_close(a.T @ a, np.eye(2), 1e-4)
    assert_close(a @ a.T, v[:2].T @ v[:2], 1e-3)
    assert list(shares.values()) == [pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-4)]
    assert np.array_equal(numpy(model(x)), before)


def test_it_is_the_same_for_one_array_and_training_goes_on(rng):
    model, other, x = make_model(), make_model(), data("dense", rng)
    adapters.start_from(model, "a", x)
    adapters.start_from(other, "a", iter([x[:3], x[3:]]))
    assert_close(np.abs(factor(model).numpy()), np.abs(factor(other).numpy()), 1e-3)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    losses = model.fit(x, np.zeros((16, 4, 3)), epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_fewer_directions_than_the_rank_leave_the_rest_at_its_start(rng):
    model = make_model(rank=4)
    start = factor(model).numpy()
    x = np.zeros((8, 4, 6), "float32")
    x[..., 2] = rng.normal(size=(8, 4))
    assert adapters.start_from(model, "a", x) == {next(iter(adapters.manage.adapted_weights(model))): pytest.approx(1)}
    found = factor(model).numpy()
    assert_close(np.abs(found[:, 0]), [0, 0, 1, 0, 0, 0], 1e-5)
    assert np.array_equal(found[:, 1:], start[:, 1:])


def test_attention_and_several_layers_see_their_own_inputs(rng):
    keras.utils.set_random_seed(1)
    x = keras.Input((5, 6))
    y = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Dense(6, activation="relu", name="hidden")(y)))
    model.trainable = False
    adapters.add(model, "a", {"all-linear": tether.low_rank(2, dropout=0.1)})
    given = rng.normal(size=(8, 5, 6)).astype("float32")
    before = numpy(model(given))
    shares = adapters.start_from(model, "a", given)
    assert len(shares) == 6 and all(0 < share <= 1.0001 for share in shares.values())
    assert np.array_equal(numpy(model(given)), before)
    inside = numpy(keras.Model(x, y)(given)).reshape(-1, 6)
    v = np.linalg.svd(inside, full_matrices=False)[2][:2]
    hidden = next(w.path for w in named_weights(model) if w.layer.name == "hidden" and w.path in shares)
    a = factor(model, hidden).numpy()
    assert_close(a @ a.T, v.T @ v, 1e-3)
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_a_part_that_two_layers_share_starts_from_the_inputs_of_both(rng):
    keras.utils.set_random_seed(1)
    one, two = layers.Dense(6, name="one"), layers.Dense(6, name="two", use_bias=False)
    x = keras.Input((6,))
    model = keras.Model(x, two(one(x)))
    tether.tie(two, kernel=tether.weight_of(one, "kernel"))
    model.trainable = False
    adapters.add(model, "a", {"one/kernel": tether.low_rank(2)})
    given = rng.normal(size=(16, 6)).astype("float32")
    adapters.start_from(model, "a", given)
    v = np.linalg.svd(given)[2][:2]
    assert_close(factor(model).numpy() @ factor(model).numpy().T, v.T @ v, 1e-3)


def test_what_cannot_be_started_is_said(rng):
    x = data("dense", rng)
    model = make_model()
    with pytest.raises(UnknownName):
        adapters.start_from(model, "b", x)
    for nothing in ([], 3):
        with pytest.raises(TetherError):
            adapters.start_from(model, "a", nothing)
    with pytest.raises(TetherError, match="zero"):
        adapters.start_from(model, "a", np.zeros_like(x))
    with pytest.raises(TetherError, match="not finite"):
        adapters.start_from(model, "a", np.full_like(x, np.nan))
    start = factor(model).numpy()
    with pytest.raises(Exception, match=r"(?s)."):
        adapters.start_from(model, "a", [x, np.zeros((2, 3))])
    assert np.array_equal(factor(model).numpy(), start) and "call" not in vars(model.layers[1])
    factors_of(next(iter(adapters.manage.adapted_weights(model).values())).parts["a"][1])[2].assign(np.ones((2, 3)))
    with pytest.raises(TetherError, match="trained"):
        adapters.start_from(model, "a", x)
    scaled = make_model()
    adapters.remove(scaled, "a")
    adapters.add(scaled, "a", {"*/kernel": tether.forms.scale()})
    with pytest.raises(TetherError, match="no low-rank part"):
        adapters.start_from(scaled, "a", x)


# --------------------------------------------------------------------------- LoftQ


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_a_part_that_starts_at_what_quantising_lost_is_nearer_to_the_floats(rng):
    keras.utils.set_random_seed(1)
    x = keras.Input((16,))
    model = keras.Model(x, layers.Dense(12, name="two")(layers.Dense(16, activation="relu", name="one")(x)))
    for layer in model.layers[1:]:
        tether.weight_of(layer, "kernel")
    floats = {
        path: numpy(model.get_layer(path.partition("/")[0]).kernel.value) for path in ("one/kernel", "two/kernel")
    }
    given = rng.normal(size=(32, 16)).astype("float32")
    right = numpy(model(given))
    model.quantize("int4")
    lost = float(np.linalg.norm(numpy(model(given)) - right))
    adapters.add(model, "q", {path: tether.low_rank(4, start=value) for path, value in floats.items()})
    assert float(np.linalg.norm(numpy(model(given)) - right)) < 0.8 * lost
    for path, value in floats.items():
        kernel = model.get_layer(path.partition("/")[0]).kernel
        residue = value - kernel.expression.base.numpy()
        best = np.linalg.svd(residue, compute_uv=False)[4:]
        assert np.linalg.norm(numpy(kernel.value) - value) == pytest.approx(np.linalg.norm(best), rel=1e-3)

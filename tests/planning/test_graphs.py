"""`torch.compile` reads a tied layer into one graph, as it does a plain one: nothing in a call of it ends the graph."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="`torch.compile` is PyTorch's")


def weight(rng, *shape):
    return tether.Weight(rng.normal(size=shape).astype("float32"))


def dense(rng, kernel):
    return tether.tie(keras.layers.Dense(6, activation="relu"), kernel=kernel), (8,)


def low_rank(rng):
    return dense(rng, weight(rng, 8, 6) + tether.low_rank(2))


def adapted(rng):
    layer = keras.layers.Dense(6, name="d")
    layer.build((None, 8))
    tether.adapters.add(keras.Sequential([keras.Input((8,)), layer]), "x", {"d/kernel": tether.low_rank(2)})
    return layer, (8,)


def convolution(rng):
    return tether.tie(keras.layers.Conv2D(4, 3, padding="same"), kernel=2 * weight(rng, 3, 3, 2, 4)), (8, 8, 2)


def causal_convolution(rng):
    kernel = weight(rng, 3, 2, 4) + tether.low_rank(1)
    return tether.tie(keras.layers.Conv1D(4, 3, padding="causal", dilation_rate=2), kernel=kernel), (9, 2)


def routed(rng):
    return tether.route(keras.layers.Dense(6), kernel={"a": weight(rng, 8, 6), "b": weight(rng, 8, 6)}), (8,)


def recurrent(rng):
    return tether.tie(keras.layers.LSTM(4), {"cell/kernel": weight(rng, 3, 2) @ weight(rng, 2, 16)}), (5, 3)


def einsum(rng):
    layer = keras.layers.EinsumDense("abc,cd->abd", output_shape=(None, 6))
    return tether.tie(layer, kernel=weight(rng, 8, 6) + tether.low_rank(2)), (5, 8)


def function(rng):
    return tether.Lambda(lambda x, w: x @ w, w=weight(rng, 8, 3) @ weight(rng, 3, 6)), (8,)


def shared_norm(rng):
    return tether.tie(keras.layers.BatchNormalization(), gamma=2 * weight(rng, 8)), (8,)


KINDS = [
    low_rank, adapted, convolution, causal_convolution, routed, recurrent, einsum, function, shared_norm,
]  # fmt: skip
QUICK = (low_rank, convolution)


def graphs(model, x):
    import torch

    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.as_tensor(x))
    torch._dynamo.reset()
    return found.graph_count, [str(each.reason)[:300] for each in found.break_reasons]


@pytest.mark.filterwarnings("ignore")  # of PyTorch's, about what it reads
@pytest.mark.parametrize(
    "make", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_it_is_one_graph_which_computes_the_same(rng, make):
    import torch

    layer, shape = make(rng)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    x = rng.random((4, *shape)).astype("float32")
    assert graphs(model, x) == (1, [])
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(torch.as_tensor(x)).detach(), model(x).detach(), tolerance=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_call_that_drops_the_input_of_a_part_is_one_graph(rng):
    import torch

    layer, shape = dense(rng, weight(rng, 8, 6).stop_gradient() + tether.low_rank(2, start="orthogonal", dropout=0.5))
    layer.build((None, *shape))
    layer.kernel.expression.weights_used()[2].assign(rng.normal(size=(2, 6)))
    x = torch.as_tensor(rng.random((4, *shape)).astype("float32"))

    def call(x):
        return layer(x, training=True)

    torch._dynamo.reset()
    found = torch._dynamo.explain(call)(x)
    assert (found.graph_count, found.break_reasons) == (1, [])
    compiled = torch.compile(call, backend="eager")
    values = []
    for one in (compiled, call):
        torch.manual_seed(0)
        values.append(one(x).detach())
    assert_close(*values)
    assert not np.allclose(compiled(x).detach(), values[0])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [low_rank, convolution, einsum])
def test_a_size_that_is_open_is_one_graph_too(rng, make):
    import torch

    layer, shape = make(rng)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (4, 7, 9):
        x = rng.random((rows, *shape)).astype("float32")
        assert_close(compiled(torch.as_tensor(x)).detach(), model(x).detach(), tolerance=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_graph_follows_another_expression_and_another_size_of_batch(rng):
    import torch

    layer, shape = low_rank(rng)
    model = keras.Sequential([keras.Input(shape), layer])
    compiled = torch.compile(model, backend="eager")
    x = rng.random((4, *shape)).astype("float32")
    for change in (lambda: None, lambda: tether.tie(layer, kernel=weight(rng, 6, 8).T + tether.low_rank(1))):
        change()
        for rows in (4, 7, 1):
            batch = np.resize(x, (rows, *shape))
            assert_close(compiled(torch.as_tensor(batch)).detach(), model(batch).detach(), tolerance=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_ends_its_graph_where_that_of_a_plain_model_does(rng):
    import torch
    from torch._dynamo.utils import counters

    ends = []
    for tied in (True, False):
        layer = low_rank(rng)[0] if tied else keras.layers.Dense(6, activation="relu")
        model = keras.Sequential([keras.Input((8,)), layer])
        model.compile("sgd", "mse", jit_compile=True)
        torch._dynamo.reset()
        counters.clear()
        model.fit(np.ones((4, 8), "float32"), np.zeros((4, 6), "float32"), epochs=1, verbose=0)
        ends.append(sorted(reason.split("\n")[0] for reason in counters["graph_break"]))
    torch._dynamo.reset()
    assert ends[0] == ends[1]

"""Planned layers compute what layers compute that build their weights first: outputs, gradients, files, fits."""

import contextlib
import math
import random
from unittest import mock

import keras
import numpy as np
import pytest

import tether
from tests.planning.drawing import Drawing
from tests.support import as_zero, gradients, numpy
from tether import ops, planning
from tether.layers.tying.state import weights_below
from tether.planning.alternatives import Search
from tether.planning.control import recording

layers = keras.layers
BACKEND = keras.backend.backend()
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Kind:
    """A kind of layer, one of its weights, and how to call it."""

    def __init__(self, make, shape, path="kernel", *, ids=None, call=None, batch=3, only=None):
        self.make, self.shape, self.path, self.ids, self.batch, self.only = make, shape, path, ids, batch, only
        self.call = call or (lambda layer, x: layer(x))

    def inputs(self, rng, batch=None):
        shape = (self.batch if batch is None else batch, *self.shape)
        if self.ids is not None:
            return rng.integers(0, self.ids, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    def tied(self, make, expression, rng):
        """A layer whose weight an expression replaces: `expression(make, shape)`."""
        layer = self.make()
        part = getattr(layer, "cell", layer)
        for name in ("kernel", "recurrent", "depthwise", "embeddings"):
            if hasattr(part, f"{name}_initializer"):
                setattr(part, f"{name}_initializer", start)  # Keras's own are slow to compile on JAX
        self.call(layer, keras.KerasTensor((self.batch, *self.shape), "float32" if self.ids is None else "int32"))
        found = layer
        for part in self.path.split("/"):
            found = getattr(found, part)
        return tether.tie(layer, {self.path: expression(make, tuple(found.shape))})


def start(shape, dtype=None):
    return keras.ops.convert_to_tensor(np.random.default_rng(len(shape)).normal(size=shape) * 0.5, dtype)


def cell(layer, x):
    states = [keras.ops.ones((x.shape[0], size)) * 0.5 for size in np.ravel(layer.state_size)]
    return layer(x, states)[0]


def backward(layer, x):
    if not layer.built:
        layer.build((None, 4))
    return layer(x, reverse=True)


EINSUM = {
    "einsum": Kind(lambda: layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d", activation="tanh"), (4, 8)),
    "einsum, heads": Kind(lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (4, 8)),
    "einsum, heads out": Kind(lambda: layers.EinsumDense("abcd,cde->abe", (None, 6), bias_axes="e"), (4, 2, 4)),
    "einsum, ellipsis": Kind(lambda: layers.EinsumDense("...x,xy->...y", 6), (2, 3, 8)),
    "einsum, outputs first": Kind(lambda: layers.EinsumDense("ab,cb->ca", (3,)), (8,)),
    "einsum, both": Kind(lambda: layers.EinsumDense("abc,bcd->abd", (4, 6), bias_axes="bd"), (4, 8)),
}
DENSE = {
    "dense": Kind(lambda: layers.Dense(6, activation="tanh", bias_initializer="uniform"), (8,)),
    "dense, rank 3": Kind(lambda: layers.Dense(6, use_bias=False), (4, 8)),
}
EMBEDDING = {
    "embedding": Kind(lambda: layers.Embedding(12, 6), (5,), "embeddings", ids=12),
    "embedding, mask": Kind(lambda: layers.Embedding(12, 6, mask_zero=True), (5,), "embeddings", ids=12),
    "reversible": Kind(lambda: layers.ReversibleEmbedding(12, 6, mask_zero=True), (5,), "embeddings", ids=12),
    "reversible, back": Kind(lambda: layers.ReversibleEmbedding(12, 6), (5, 6), "embeddings", call=backward),
    "reversible, cap": Kind(
        lambda: layers.ReversibleEmbedding(12, 6, logit_soft_cap=2.0), (5, 6), "embeddings", call=backward
    ),
    "reversible, own": Kind(
        lambda: layers.ReversibleEmbedding(12, 6, tie_weights=False), (5, 6), "reverse_embeddings", call=backward
    ),
    "reversible, dtype": Kind(
        lambda: layers.ReversibleEmbedding(12, 6, reverse_dtype="float32"), (5, 6), "embeddings", call=backward
    ),
}
CONVOLUTION = {
    "conv1d, causal": Kind(lambda: layers.Conv1D(6, 3, padding="causal", dilation_rate=2), (9, 4)),
    "conv1d, strides": Kind(lambda: layers.Conv1D(6, 3, strides=2, padding="same", activation="tanh"), (9, 4)),
    "conv2d": Kind(lambda: layers.Conv2D(6, (2, 3), bias_initializer="uniform"), (5, 6, 4), batch=2),
    "conv2d, strides": Kind(lambda: layers.Conv2D(6, 3, strides=(2, 1), padding="same"), (5, 6, 4), batch=2),
    "conv2d, dilation": Kind(lambda: layers.Conv2D(6, 2, dilation_rate=2, use_bias=False), (5, 6, 4), batch=2),
    "conv3d": Kind(lambda: layers.Conv3D(6, 2), (3, 4, 3, 4), batch=2),
    "conv2d, groups": Kind(lambda: layers.Conv2D(6, 2, groups=2), (4, 4, 4), batch=2),
}
DEPTHWISE = {
    "depthwise1d": Kind(lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), (7, 4)),
    "depthwise2d": Kind(lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"), (5, 6, 4), batch=2),
    "depthwise2d, same": Kind(lambda: layers.DepthwiseConv2D((2, 3), padding="same"), (5, 6, 4), batch=2),
}
if BACKEND != "tensorflow":  # TensorFlow convolves channels_first on GPUs only
    CONVOLUTION["conv1d, channels first"] = Kind(lambda: layers.Conv1D(6, 3, data_format="channels_first"), (4, 9))
    CONVOLUTION["conv2d, channels first"] = Kind(
        lambda: layers.Conv2D(6, 3, padding="same", data_format="channels_first"), (4, 5, 6), batch=2
    )
    DEPTHWISE["depthwise2d, channels first"] = Kind(
        lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, data_format="channels_first"), (4, 5, 6), batch=2
    )
RECURRENT = {
    "lstm cell": Kind(lambda: layers.LSTMCell(3), (4,), call=cell),
    "lstm cell, recurrent": Kind(lambda: layers.LSTMCell(3, use_bias=False), (4,), "recurrent_kernel", call=cell),
    "gru cell": Kind(lambda: layers.GRUCell(3, bias_initializer="uniform"), (4,), call=cell),
    "gru cell, recurrent": Kind(lambda: layers.GRUCell(3), (4,), "recurrent_kernel", call=cell),
    "gru cell, before": Kind(lambda: layers.GRUCell(3, reset_after=False), (4,), "recurrent_kernel", call=cell),
    "simple cell": Kind(lambda: layers.SimpleRNNCell(6, bias_initializer="uniform"), (4,), call=cell),
    "simple cell, recurrent": Kind(lambda: layers.SimpleRNNCell(6), (4,), "recurrent_kernel", call=cell),
    "lstm": Kind(lambda: layers.LSTM(3, return_sequences=True), (4, 4), "cell/recurrent_kernel"),
    "gru": Kind(lambda: layers.GRU(3), (4, 4), "cell/kernel"),
    "simple rnn": Kind(lambda: layers.SimpleRNN(6, unroll=True), (3, 4), "cell/recurrent_kernel"),
}
HEADS = {
    "query": Kind(lambda: layers.MultiHeadAttention(2, 3), (4, 8), "query_dense/kernel", call=lambda m, x: m(x, x)),
    "output": Kind(lambda: layers.MultiHeadAttention(2, 3), (4, 8), "output_dense/kernel", call=lambda m, x: m(x, x)),
}
BUILT = ("conv2d, groups", "reversible, dtype", "gru cell, before")
FUSED = ("lstm", "gru", "simple rnn")  # some backends compute whole loops at once
KINDS = {**DENSE, **EINSUM, **EMBEDDING, **CONVOLUTION, **DEPTHWISE, **RECURRENT, **HEADS}


# --------------------------------------------------------------------------- expressions of any shape


class Weights:
    """Makes weights and remembers them."""

    def __init__(self, rng):
        self.rng, self.all = rng, []

    def __call__(self, *shape, **options):
        value = np.asarray(self.rng.normal(size=shape) * 0.5, "float32")
        self.all.append(tether.Weight(value, name=f"w{len(self.all)}", **options))
        return self.all[-1]


def sides(shape):
    """Rows and columns that a weight's shape is made of."""
    split = 1 if len(shape) == 3 and shape[0] > 3 else len(shape) - 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def low_rank(make, shape):
    n, m = sides(shape)
    product = make(n, 2) @ make(2, m)
    return product if product.shape == shape else product.reshape(shape)


def kronecker(make, shape):
    n, m = sides(shape)
    small = next(k for k in (2, 3, 1) if n % k == 0), next(k for k in (3, 2, 1) if m % k == 0)
    a, b = make(*small), make(n // small[0], m // small[1])
    return ops.einsum("ab,cd->acbd", a, b).reshape(shape)


def scaled(make, shape):
    return make(*shape) * make(shape[-1]) * make(*shape[:1], *(1,) * (len(shape) - 1))


def channels(make, shape):
    """Low rank in the last two axes on both sides of what has all, and a product of places and channels."""
    *places, i, o = shape
    at = "xyz"[: len(places)]
    narrow = ops.einsum(f"ip,{at}pq,qo->{at}io", make(i, 2), make(*places, 2, 3), make(3, o))
    return narrow + 0.5 * ops.einsum(f"{at},io->{at}io", make(*places), make(i, o))


EXPRESSIONS = {
    "low rank": lambda make, shape: make(*shape) + 0.5 * low_rank(make, shape),
    "product": low_rank,
    "kronecker": lambda make, shape: make(*shape) - kronecker(make, shape),
    "scaled": lambda make, shape: scaled(make, shape) + low_rank(make, shape),
    "frozen": lambda make, shape: make(*shape).stop_gradient() + low_rank(make, shape).scale_gradient(0.5),
    "opaque": lambda make, shape: ops.apply(keras.ops.tanh, make(*shape)) + 2.0 * low_rank(make, shape),
    "sliced": lambda make, shape: low_rank(make, (shape[0] + 1, *shape[1:]))[1:] + make(*shape)[::-1],
    "constant": lambda make, shape: low_rank(make, shape) + 0.25,
    "last axis": lambda make, shape: make(*shape) + make(shape[-1]) * make(),
}
USUAL = ("low rank", "scaled", "kronecker")
OF_KIND = {
    **dict.fromkeys(("dense", "embedding"), tuple(EXPRESSIONS)),
    **dict.fromkeys((*CONVOLUTION, *DEPTHWISE), ("low rank", "channels")),
    **dict.fromkeys((*RECURRENT, *HEADS), ("low rank",)),
    **dict.fromkeys(("lstm cell, recurrent", "embedding, mask", "reversible, cap"), ("kronecker",)),
    "conv2d": ("low rank", "kronecker", "scaled", "frozen", "channels"),
}
EXPRESSIONS["channels"] = channels


# --------------------------------------------------------------------------- comparing


@contextlib.contextmanager
def planned(how, training=False):
    """Plans of a kind, noted. `"partly"` builds some terms, wherever there are several to build."""
    if how == "partly":
        before = Search.subsets

        def some(self):
            count = len(self.products.terms)
            found = [merged for merged in before(self) if 0 < len(merged) < count]
            return found or [tuple(range(count))]

        with mock.patch.object(Search, "subsets", some), recording(training=training) as noted:
            yield noted
        return
    with planning.force(how), recording(training=training) as noted:
        yield noted


def assert_near(found, wanted, tolerance=1e-5, where=""):
    found, wanted = (np.asarray(numpy(a), "float64") for a in (found, wanted))
    assert found.shape == wanted.shape, (where, found.shape, wanted.shape)
    scale = max(1.0, np.abs(wanted).max(initial=0.0))
    difference = np.abs(found - wanted).max(initial=0.0)
    assert difference <= tolerance * scale, f"{where}: {difference / scale:.2e}"


def loss_of(y):
    factors = np.random.default_rng(5).normal(size=tuple(y.shape))
    return keras.ops.sum(keras.ops.square(y) * keras.ops.cast(factors, y.dtype) + y)


def with_gradients(outputs_of, variables, hows):
    """For each way the outputs, and the gradients of a loss of them; compiled on JAX, which is slow op by op."""
    if BACKEND == "jax":
        import jax

        def pure(values, how):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                y = outputs_of(how)
                return loss_of(y), y

        def every(values):
            return [jax.value_and_grad(pure, has_aux=True)(values, how) for how in hows]

        values = [variable.value for variable in variables]
        found = jax.jit(every, compiler_options=QUICK)(values)
        return [(numpy(y), [numpy(g) for g in grads]) for (_, y), grads in found]
    done = []
    for how in hows:
        kept = []

        def loss(how=how, kept=kept):
            kept.append(outputs_of(how))
            return loss_of(kept[0])

        _, grads = gradients(loss, variables)
        done.append((numpy(kept[0]), grads))
    return done


def assert_same(call, x, weights, hows=("factored", "partly"), tolerance=1e-5, training=True):
    """All ways agree with building the weights first, in outputs and gradients; the names of the plans of each."""
    variables, plans = [weight.variable for weight in weights], {}
    given = keras.Variable(x, dtype=x.dtype.name, trainable=x.dtype.kind == "f")
    if given.trainable:
        variables.append(given)

    def outputs_of(how):
        with planned(how, training) as noted:
            y = call(given.value if given.trainable else keras.ops.convert_to_tensor(x))
        plans[how] = {use.plan.name for use in noted}
        return y

    (wanted, wanted_grads), *found = with_gradients(outputs_of, variables, ("materialize", *hows))
    assert plans["materialize"] <= {"materialize"}
    for how, (y, grads) in zip(hows, found, strict=True):
        assert_near(y, wanted, tolerance, how)
        for variable, grad, other in zip(variables, grads, wanted_grads, strict=True):
            grad, other = (as_zero(g, tuple(variable.shape)) for g in (grad, other))
            assert_near(grad, other, 2 * tolerance, f"{how}, gradient of {variable.path}")
    return plans


# --------------------------------------------------------------------------- outputs and gradients


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        pytest.param(name, expression, id=f"{name}: {expression}")
        for name in KINDS
        for expression in OF_KIND.get(name, USUAL)
    ],
)
def test_outputs_and_gradients_are_those_of_the_built_weight(name, expression, rng):
    kind, make = KINDS[name], Weights(rng)
    layer = kind.tied(make, EXPRESSIONS[expression], rng)
    plans = assert_same(lambda x: kind.call(layer, x), kind.inputs(rng), make.all)
    if name in BUILT:
        assert plans["factored"] | plans["partly"] <= {"materialize"}
    elif expression == "low rank" and name not in FUSED:  # otherwise building would be compared with building
        assert plans == {how: {how} for how in ("materialize", "factored", "partly")}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["dense", "einsum, heads", "embedding", "conv1d, causal"])
def test_random_expressions(kind, seed, rng):
    kind, drawing = KINDS[kind], Drawing(random.Random(seed), seed)
    layer = kind.tied(drawing, lambda drawing, shape: drawing.expression(shape, 3), rng)
    used = list(tether.weight_of(layer, kind.path).weights_used())
    assert_same(lambda x: kind.call(layer, x), kind.inputs(rng), used, ("factored",))


@pytest.mark.parametrize("kind", ["dense, rank 3", "embedding", "depthwise2d"])
def test_the_plan_of_least_cost(kind, rng):
    kind, make = KINDS[kind], Weights(rng)
    layer = kind.tied(make, EXPRESSIONS["low rank"], rng)
    assert_same(lambda x: kind.call(layer, x), kind.inputs(rng), make.all, ("auto",), training=False)


# --------------------------------------------------------------------------- what a layer does beside the product


def lowered(rng, n=8, m=6, rank=2, **options):
    make = Weights(rng)
    w, a, b = make(n, m, **options), make(n, rank, **options), make(rank, m, **options)
    return w, a, b


def test_bias_and_activation_are_kept(rng):
    w, a, b = lowered(rng)
    layer = tether.tie(layers.Dense(6, activation="relu", bias_initializer="normal"), kernel=w + a @ b)
    x = rng.normal(size=(3, 8)).astype("float32")
    layer.build(x.shape)
    layer.bias.assign(rng.normal(size=6))
    wanted = np.maximum(x @ (w.numpy() + a.numpy() @ b.numpy()) + numpy(layer.bias), 0)
    with planning.force("factored"):
        assert_near(layer(x), wanted)


def test_masks_go_on(rng):
    w, a, b = lowered(rng, 12)
    ids = np.array([[1, 2, 0], [0, 11, 4]], "int32")
    for cls in (layers.Embedding, layers.ReversibleEmbedding):
        layer = tether.tie(cls(12, 6, mask_zero=True), embeddings=w + a @ b)
        for how in ("materialize", "factored"):
            with planning.force(how):
                y = layer(ids)
            np.testing.assert_array_equal(numpy(y._keras_mask), ids != 0)


def test_numbers_of_entries_of_other_dtypes(rng):
    w, a, b = lowered(rng, 12)
    layer = tether.tie(layers.Embedding(12, 6), embeddings=w + a @ b)
    value = w.numpy() + a.numpy() @ b.numpy()
    for dtype in ("uint8", "float32") if BACKEND == "jax" else ("int64", "uint8", "float32"):
        ids = keras.ops.convert_to_tensor(np.array([[3, 0], [11, 5]]), dtype)
        with planning.force("factored"):
            assert_near(layer(ids), value[[[3, 0], [11, 5]]])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", ["dense", "einsum, heads", "embedding", "conv2d", "reversible, back"])
def test_low_precision(kind, policy, rng):
    kind, make = KINDS[kind], Weights(rng)
    keras.config.set_dtype_policy(policy)
    layer = kind.tied(make, EXPRESSIONS["low rank"], rng)
    plain = kind.make()
    x = kind.inputs(rng)
    outputs = {}
    for how in ("materialize", "factored"):
        with planned(how) as noted:
            outputs[how] = kind.call(layer, keras.ops.convert_to_tensor(x))
        assert {use.plan.name for use in noted} == {how}
        assert outputs[how].dtype == outputs["materialize"].dtype
        assert_near(keras.ops.cast(outputs[how], "float32"), keras.ops.cast(outputs["materialize"], "float32"), 0.03)
    assert outputs["factored"].dtype == kind.call(plain, keras.ops.convert_to_tensor(x)).dtype


@pytest.mark.parametrize(
    "dtypes", [("float16",) * 3, ("float32", "float16", "float16"), ("bfloat16",) * 3], ids="-".join
)
def test_weights_of_another_dtype_than_the_layer(dtypes, rng):
    values = [rng.normal(size=shape) * 0.5 for shape in ((8, 6), (8, 2), (2, 6))]
    w, a, b = (
        tether.Weight(value, dtype=dtype, name=f"w{n}")
        for n, (value, dtype) in enumerate(zip(values, dtypes, strict=True))
    )
    layer = tether.tie(layers.Dense(6), kernel=w + a @ b)
    x = rng.normal(size=(3, 8)).astype("float32")
    layer.build(x.shape)
    for how in ("materialize", "factored"):
        with planned(how) as noted:
            y = layer(x)
        assert {use.plan.name for use in noted} == {how}
        assert keras.backend.standardize_dtype(y.dtype) == "float32"
        assert_near(y, x @ (values[0] + values[1] @ values[2]), 5e-2 if "bfloat16" in dtypes else 5e-3)


def test_a_weight_of_whole_numbers_in_a_product(rng):
    n = tether.Weight(np.arange(48).reshape(8, 6) % 3, dtype="int32", trainable=False, name="n")
    v = tether.Weight(rng.normal(size=(6,)).astype("float32"), name="v")
    layer = tether.tie(layers.Dense(6), kernel=n * v)
    x = rng.normal(size=(3, 8)).astype("float32")
    layer.build(x.shape)
    with planning.force("factored"):
        assert_near(layer(x), x @ (n.numpy() * v.numpy()))


@pytest.mark.parametrize("expression", ["low rank", "kronecker"])
@pytest.mark.parametrize("ids", [[-1, -12], [3, 12], [-13]], ids=str)
def test_numbers_beyond_the_table_are_what_they_are_for_a_built_one(ids, expression, rng):
    layer = tether.tie(layers.Embedding(12, 6), embeddings=EXPRESSIONS[expression](Weights(rng), (12, 6)))
    layer.build((None,))
    found = []
    for how in ("materialize", "factored"):
        with planning.force(how):
            try:
                found.append(numpy(layer(np.array(ids, "int32"))))
            except (ValueError, IndexError, RuntimeError) as error:  # TensorFlow and PyTorch refuse
                found.append(type(error))
            except Exception as error:
                assert type(error).__name__ == "InvalidArgumentError"
                found.append(type(error))
    if isinstance(found[0], type):
        assert found[1] is found[0]
    else:
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense, rank 3", "einsum, heads", "embedding"])
def test_an_empty_batch(kind, rng):
    kind, make = KINDS[kind], Weights(rng)
    layer = kind.tied(make, EXPRESSIONS["kronecker"], rng)
    shapes = set()
    for how in ("materialize", "factored", "auto"):
        with planning.force(how):
            shapes.add(tuple(kind.call(layer, keras.ops.convert_to_tensor(kind.inputs(rng, 0))).shape))
    assert len(shapes) == 1 and shapes.pop()[0] == 0


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse tensors there")
@pytest.mark.parametrize("expression", ["low rank", "kronecker", "scaled", "opaque"])
def test_sparse_inputs(expression, rng):
    make = Weights(rng)
    weight = EXPRESSIONS[expression](make, (8, 6))
    layer = tether.tie(layers.Dense(6), kernel=weight)
    layer.build((None, 8))
    x = (rng.normal(size=(3, 8)) * (rng.random((3, 8)) < 0.4)).astype("float32")
    if BACKEND == "jax":
        from jax.experimental import sparse

        given = sparse.BCOO.fromdense(x)
    else:
        import tensorflow as tf

        given = tf.sparse.from_dense(x)
    for how in ("factored", "auto"):
        with planning.force(how):
            assert_near(layer(given), x @ weight.numpy())


@pytest.mark.parametrize("expression", ["low rank", "kronecker", "scaled"])
@pytest.mark.parametrize("dtype", ["int32", "float16", "bool"])
def test_inputs_of_another_dtype_than_the_layer(dtype, expression, rng):
    make = Weights(rng)
    weight = EXPRESSIONS[expression](make, (8, 6))
    layer = tether.tie(layers.Dense(6, autocast=False), kernel=weight)
    x = np.abs(rng.normal(size=(3, 8)) * 3).astype(dtype)
    layer.build(x.shape)
    found = {}
    for how in ("materialize", "factored"):
        with planned(how) as noted:
            found[how] = layer(keras.ops.convert_to_tensor(x))
        assert {use.plan.name for use in noted} == {how}
    assert found["factored"].dtype == found["materialize"].dtype
    assert_near(found["factored"], x.astype("float32") @ weight.numpy())


# --------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("how", ["materialize", "factored", "auto"])
def test_a_frozen_layer_passes_no_gradient_to_its_weights_and_one_to_its_input(how, rng):
    w, a, b = lowered(rng)
    other = tether.tie(layers.Dense(6), kernel=w + a @ b)
    layer = tether.tie(layers.Dense(6), kernel=w + a @ b)
    x = keras.Variable(rng.normal(size=(3, 8)).astype("float32"))
    layer.build(x.shape), other.build(x.shape)
    layer.trainable = False
    assert w.trainable  # by the other layer
    variables = [w.variable, a.variable, b.variable, x]
    with planning.force(how):
        _, grads = gradients(lambda: keras.ops.sum(layer(x.value) ** 2), variables)
    for grad, variable in zip(grads[:3], variables, strict=False):
        assert not np.any(as_zero(grad, tuple(variable.shape)))
    kernel = w.numpy() + a.numpy() @ b.numpy()
    assert_near(grads[3], 2 * (numpy(x.value) @ kernel) @ kernel.T)


@pytest.mark.parametrize("how", ["factored", "auto"])
def test_stopped_parts_get_no_gradient(how, rng):
    w, a, b = lowered(rng)
    tether.tie(layers.Dense(6), kernel=w).build((None, 8))  # so that it trains at all
    layer = tether.tie(layers.Dense(6), kernel=w.stop_gradient() + a.stop_gradient() @ b)
    x = rng.normal(size=(3, 8)).astype("float32")
    layer.build(x.shape)
    with planning.force(how):
        _, grads = gradients(lambda: keras.ops.sum(layer(x)), [w.variable, a.variable, b.variable])
    assert not np.any(as_zero(grads[0], (8, 6))) and not np.any(as_zero(grads[1], (8, 2)))
    assert_near(grads[2], np.tile((x @ a.numpy()).sum(0)[:, None], (1, 6)))


def test_frozen_weights_do_not_train(rng):
    w, a, b = lowered(rng)
    w.trainable = a.trainable = False
    layer = tether.tie(layers.Dense(6), kernel=w + a @ b)
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile("sgd", "mse")
    before = [v.numpy() for v in (w, a, b)]
    with planning.force("factored"):
        model.fit(rng.normal(size=(8, 8)), rng.normal(size=(8, 6)), verbose=0)
    assert [np.any(v.numpy() != old) for v, old in zip((w, a, b), before, strict=True)] == [False, False, True]


# --------------------------------------------------------------------------- classes, files, fits


@keras.saving.register_keras_serializable("tether_planning_tests")
class OwnCall(layers.Dense):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training) + 1.0


@keras.saving.register_keras_serializable("tether_planning_tests")
class OwnName(layers.Dense):
    pass


@pytest.mark.parametrize("cls", [OwnCall, OwnName])
def test_a_class_of_the_user_keeps_its_call(cls, rng):
    w, a, b = lowered(rng)
    layer = tether.tie(cls(6), kernel=w + a @ b)
    x = rng.normal(size=(3, 8)).astype("float32")
    with planned("factored") as noted:
        y = layer(x)
    assert_near(y, x @ (w.numpy() + a.numpy() @ b.numpy()) + (cls is OwnCall))
    assert bool(noted) == (cls is OwnName)


def test_a_call_that_is_set_on_the_instance_is_kept(rng):
    w, a, b = lowered(rng)
    layer = layers.Dense(6)
    layer.build((None, 8))
    layer.call = lambda inputs: inputs * 0.0
    tether.tie(layer, kernel=w + a @ b)
    assert not np.any(numpy(layer(np.ones((2, 8), "float32"))))


def test_a_functional_model_with_an_unknown_batch(rng, tmp_path):
    make = Weights(rng)
    inputs = keras.Input((5,), dtype="int32")
    table = make(12, 8) + make(12, 2) @ make(2, 8)
    x = tether.tie(layers.Embedding(12, 8), embeddings=table)(inputs)
    x = tether.tie(layers.EinsumDense("abc,cde->abde", (None, 2, 3)), kernel=low_rank(make, (8, 2, 3)))(x)
    x = layers.Reshape((30,))(x)
    w, d = make(30, 4), make(4)
    model = keras.Model(inputs, tether.tie(layers.Dense(4), kernel=w * d + make(30, 1) @ make(1, 4))(x))
    ids, y = rng.integers(0, 12, (7, 5)).astype("int32"), rng.normal(size=(7, 4)).astype("float32")
    with planning.force("materialize"):
        wanted = numpy(model(ids))
    with planning.force("factored"):
        assert_near(model.predict(ids, batch_size=4, verbose=0), wanted, 1e-4)  # batches of 4 and 3
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
        assert_near(again(ids), wanted, 1e-4)
        assert len(again.weights) == len(model.weights)
        model.compile(keras.optimizers.SGD(0.05), "mse")
        losses = model.fit(ids, y, batch_size=4, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["conv2d", "depthwise2d", "reversible, back", "einsum, heads out", "query"])
def test_an_unknown_batch(kind, rng):
    kind, make = KINDS[kind], Weights(rng)
    layer = kind.tied(make, EXPRESSIONS["low rank"], rng)
    inputs = keras.Input(kind.shape, dtype="int32" if kind.ids else "float32")
    with planning.force("materialize"):
        wanted = numpy(kind.call(layer, keras.ops.convert_to_tensor(kind.inputs(np.random.default_rng(1), 5))))
    with planned("factored") as noted:
        model = keras.Model(inputs, kind.call(layer, inputs))
        found = model.predict(kind.inputs(np.random.default_rng(1), 5), batch_size=2, verbose=0)
    assert_near(found, wanted, 1e-4)
    assert {use.plan.name for use in noted} == {"factored"}


def test_two_axes_of_unknown_size(rng):
    w, a, b = lowered(rng)
    inputs = keras.Input((None, 8))
    kernel = w + (a @ b) * tether.Weight((6,), "ones", name="d")
    dense = tether.tie(layers.Dense(6), kernel=kernel)
    heads = tether.tie(layers.EinsumDense("abc,cde->abde", (None, 2, 3)), kernel=kernel.reshape(8, 2, 3))
    with planning.force("factored"):
        model = keras.Model(inputs, [dense(inputs), heads(inputs)])
        for shape in ((2, 3, 8), (4, 1, 8), (1, 7, 8)):
            x = rng.normal(size=shape).astype("float32")
            found = model.predict(x, verbose=0)
            assert_near(found[0], x @ kernel.numpy(), 1e-4)
            assert_near(found[1], (x @ kernel.numpy()).reshape(*shape[:2], 2, 3), 1e-4)


# --------------------------------------------------------------------------- routes and adapters


@pytest.mark.parametrize("how", ["factored", "auto", "materialize"])
def test_routes_take_their_choice(how, rng):
    make = Weights(rng)
    a, b = make(8, 6), make(8, 6)
    kernel = b + make(8, 2) @ make(2, 6)
    layer = tether.route(layers.Dense(6), kernel=[a, kernel])
    x = rng.normal(size=(3, 8)).astype("float32")
    with planning.force(how):
        for choice in (0, 1, 0):
            assert_near(layer(x, choice=choice), x @ (a, kernel)[choice].numpy())
            assert_near(layer(x, choice=keras.ops.convert_to_tensor(choice)), x @ (a, kernel)[choice].numpy())
        assert_near(layer(x), x @ a.numpy())


@pytest.mark.parametrize("how", ["factored", "auto", "materialize"])
def test_an_argument_within_a_sum_is_a_keyword_of_the_call(how, rng):
    w, a, b = lowered(rng)
    strength = tether.weights.Argument("strength", default=1.0)
    layer = tether.tie(layers.Dense(6), kernel=w + strength * (a @ b))
    x = rng.normal(size=(3, 8)).astype("float32")
    with planning.force(how):
        for value in (0.0, 0.5, 2.0):
            assert_near(layer(x, strength=value), x @ (w.numpy() + value * a.numpy() @ b.numpy()))
        assert_near(layer(x), x @ (w.numpy() + a.numpy() @ b.numpy()))


def adapted_model(rng):
    inputs = keras.Input((4, 8))
    x = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    for name, paths in (
        ("french", ("attention/query/kernel", "attention/value/kernel", "head/kernel")),
        ("german", ("attention/attention_output/kernel", "head/kernel")),
    ):
        tether.adapters.add(model, name, {path: tether.low_rank(2) for path in paths})
    for weight in model.trainable_variables:
        weight.assign(rng.normal(size=weight.shape) * 0.3)
    return model


def test_adapters_compute_the_same_by_plan(rng):
    model = adapted_model(rng)
    x = rng.normal(size=(3, 4, 8)).astype("float32")
    tether.adapters.set_strengths(model, {"french": 0.3, "german": 0.7})
    with recording(training=False) as noted:
        model(x)
    assert {use.path.partition("/")[0] for use in noted} == {"attention", "head"} and len(noted) == 4
    used = [weight for weight in weights_below(model) if weight.trainable]
    plans = assert_same(model, x, used, ("factored", "auto"))
    assert plans["factored"] == {"factored"}


# --------------------------------------------------------------------------- built forward, by parts backward


def of_many_rows(equation=None):
    """A layer, and the shape of a call for which its weight is built and its gradient is not."""
    rng = np.random.default_rng(0)
    w, a, b = (
        tether.Weight(0.1 * rng.normal(size=shape).astype("float32"), name=name)
        for name, shape in (("w", (256, 256)), ("a", (256, 16)), ("b", (16, 256)))
    )
    total = w.stop_gradient() + a @ b
    if equation is None:
        return tether.tie(keras.layers.Dense(256, activation="tanh"), kernel=total), (2048, 256)
    heads = keras.layers.EinsumDense(equation, output_shape=(None, 4, 64), bias_axes="de")
    return tether.tie(heads, kernel=total.reshape(256, 4, 64)), (8, 256, 256)


@pytest.mark.parametrize("equation", [None, "abc,cde->abde"], ids=["dense", "einsum"])
def test_a_weight_that_is_built_has_the_gradients_of_its_parts(equation):
    layer, shape = of_many_rows(equation)
    layer.build(shape)
    (use,) = tether.planning.explain(layer, shape, training=True).uses
    assert use.plan.name == "mixed"
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    with tether.planning.force("materialize"):
        expected = all_gradients(layer, x)
    for found, wanted in zip(all_gradients(layer, x), expected, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5)


def all_gradients(layer, x):
    """The loss of a training call, and its gradients to the layer's weights and the input."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]

        def loss(weights, x):
            return (layer.stateless_call(weights, fixed, x, training=True)[0] ** 2).mean()

        value, (weights, of_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
            [v.value for v in layer.trainable_variables], x
        )
    elif backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_mean(layer(x, training=True) ** 2)
        *weights, of_x = tape.gradient(value, [*(v.value for v in layer.trainable_variables), x])
    else:
        import torch

        x = torch.tensor(x, requires_grad=True)
        value = (layer(x, training=True) ** 2).mean()
        *weights, of_x = torch.autograd.grad(value, [*(v.value for v in layer.trainable_variables), x])
    return [numpy(tensor) for tensor in (value, *weights, of_x)]


def test_the_gradient_of_the_parts_can_be_differentiated_again():
    layer, shape = of_many_rows()
    layer.build(shape)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")

    def second():
        """The gradient, to the two parts, of the sum of squares of their first gradients."""
        backend = keras.backend.backend()
        if backend == "jax":
            import jax

            fixed = [v.value for v in layer.non_trainable_variables]

            def loss(weights):
                return (layer.stateless_call(weights, fixed, x, training=True)[0] ** 2).mean()

            def squares(weights):
                return sum((g**2).sum() for g in jax.grad(loss)(weights))

            return jax.grad(squares)([v.value for v in layer.trainable_variables])
        weights = [v.value for v in layer.trainable_variables]
        if backend == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    value = tf.reduce_mean(layer(x, training=True) ** 2)
                total = sum(tf.reduce_sum(g**2) for g in inner.gradient(value, weights))
            return outer.gradient(total, weights)
        import torch

        value = (layer(torch.as_tensor(x), training=True) ** 2).mean()
        total = sum((g**2).sum() for g in torch.autograd.grad(value, weights, create_graph=True))
        return torch.autograd.grad(total, weights)

    with tether.planning.force("materialize"):
        expected = [numpy(tensor) for tensor in second()]
    for found, wanted in zip(second(), expected, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(numpy(found) / scale, wanted / scale, atol=1e-4)

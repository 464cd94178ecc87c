"""A trained low-rank part over a frozen base: the base's gradient is never formed; and what planning costs."""

import statistics
import time
from unittest import mock

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether import planning
from tether.layers import appliers
from tether.layers.appliers import dense_problem
from tether.planning.alternatives import make_plan
from tether.planning.control import recording
from tether.planning.products import products

layers = keras.layers
BACKEND = keras.backend.backend()
N, M, RANK, ROWS = 256, 192, 4, 64


def parts(rng):
    a, b = rng.normal(size=(N, RANK)).astype("float32"), rng.normal(size=(RANK, M)).astype("float32")
    return tether.Weight(a, name="a"), tether.Weight(b, name="b")


def stopped(rng):
    a, b = parts(rng)
    return tether.tie(layers.Dense(M), kernel=tether.Weight((N, M), name="w").stop_gradient() + a @ b)


def frozen_weight(rng):
    a, b = parts(rng)
    return tether.tie(layers.Dense(M), kernel=tether.Weight((N, M), trainable=False, name="w") + a @ b)


def frozen_parent(rng):
    parent = layers.Dense(M)
    parent.build((None, N))
    parent.trainable = False
    return tether.inherit(parent, kernel=tether.low_rank(RANK))


def adapter(rng):
    layer = layers.Dense(M)
    layer.build((None, N))
    return tether.adapters.add(layer, "french", {"kernel": tether.low_rank(RANK)})


FROZEN = {"stop_gradient": stopped, "weight": frozen_weight, "parent": frozen_parent, "adapter": adapter}


def product_shapes(layer, x):
    """The shapes of all matrix products of a compiled training step: forward, and gradients of what trains."""
    variables = layer.trainable_variables

    def loss_of():
        return keras.ops.sum(keras.ops.square(layer(x, training=True)))

    return {"jax": _of_jax, "tensorflow": _of_tensorflow, "torch": _of_torch}[BACKEND](loss_of, variables)


def _of_jax(loss_of, variables):
    import jax
    from jax.extend.core import jaxprs_in_params

    def pure(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return loss_of()

    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.outvars[0].aval.shape)
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(jax.grad(pure))([variable.value for variable in variables]).jaxpr)
    return found


def _of_tensorflow(loss_of, variables):
    import tensorflow as tf

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = loss_of()
        return tape.gradient(loss, [variable.value for variable in variables])

    graph = step.get_concrete_function().graph
    waiting, operations = [output.op for output in graph.outputs], {}  # TensorFlow computes what the outputs need
    while waiting:
        operation = waiting.pop()
        if operation.name not in operations:
            operations[operation.name] = operation
            waiting += [tensor.op for tensor in operation.inputs]
    kinds = ("MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")
    return [tuple(op.outputs[0].shape.as_list()) for op in operations.values() if op.type in kinds]


def _of_torch(loss_of, variables):
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                found.append(tuple(result.shape))
            return result

    with Record():
        loss_of().backward()
    for variable in variables:
        assert variable.value.grad is not None
        variable.value.grad = None
    return found


def of_the_base(shapes):
    """Those that are as large as the base, whatever the order of axes."""
    return [shape for shape in shapes if sorted(size for size in shape if size > 1) == sorted((N, M))]


@pytest.mark.parametrize("kind", FROZEN)
def test_no_product_has_the_shape_of_a_frozen_base(kind, rng):
    layer = FROZEN[kind](rng)
    x = keras.ops.convert_to_tensor(rng.normal(size=(ROWS, N)).astype("float32"))
    layer(x)
    with planning.force("materialize"):
        assert len(of_the_base(product_shapes(layer, x))) >= 2  # the low-rank part, and the gradient of the whole
    with recording(training=True) as noted:
        shapes = product_shapes(layer, x)
    assert {use.plan.name for use in noted} == {"factored"}
    assert shapes and not of_the_base(shapes)


def test_a_base_that_trains_gets_its_gradient(rng):
    a, b = parts(rng)
    layer = tether.tie(layers.Dense(M), kernel=tether.Weight((N, M), name="w") + a @ b)
    x = keras.ops.convert_to_tensor(rng.normal(size=(ROWS, N)).astype("float32"))
    layer(x)
    assert of_the_base(product_shapes(layer, x))


def test_a_model_trains_the_same_by_plan(rng):
    x, y = rng.normal(size=(80, N)).astype("float32"), rng.normal(size=(80, M)).astype("float32")

    def trained(how):
        keras.utils.set_random_seed(3)
        layer = stopped(np.random.default_rng(5))
        model = keras.Sequential([keras.Input((N,)), layer])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        with planning.force(how), recording(training=True) as noted:
            losses = model.fit(x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0).history["loss"]
        return [numpy(v.value) for v in model.variables], losses, {use.plan.name for use in noted}

    built, losses, names = trained("materialize")
    assert names == {"materialize"}
    values, again, names = trained("auto")
    assert names == {"factored"}
    np.testing.assert_allclose(again, losses, rtol=1e-4)
    for value, other in zip(values, built, strict=True):
        assert_close(value, other, 1e-4)


# --------------------------------------------------------------------------- what planning costs


def test_planning_takes_a_millisecond_at_most(rng):
    a, b = parts(rng)
    expression = tether.Weight((N, M), name="w") + a @ b
    seconds = []
    for rows in range(50):
        start = time.perf_counter()
        form = products(expression)
        make_plan(dense_problem((rows + 1, N), training=True), form, lambda factor: True)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"planning w + a @ b: {1e3 * median:.2f} ms")
    assert median < 3e-3  # 1 ms on a machine that does nothing else


def test_only_the_first_call_of_a_kind_is_planned(rng):
    layer = stopped(rng)
    x = rng.normal(size=(ROWS, N)).astype("float32")
    with (
        mock.patch.object(appliers, "make_plan", wraps=make_plan) as plans,
        mock.patch.object(appliers, "products", wraps=products) as forms,
    ):
        layer(x)
        first = plans.call_count
        assert first and forms.call_count == 1
        for _ in range(5):
            layer(x)
        assert plans.call_count == first
        layer(x[:7]), layer(x[:7])
        assert plans.call_count == first + 1
        layer(x, training=True), layer(x, training=True)
        # PyTorch records a gradient of every call, unless it is told not to.
        training = first + 1 if keras.backend.backend() == "torch" else first + 2
        assert plans.call_count == training
        with planning.force("factored"):
            layer(x), layer(x)
        assert plans.call_count == training + 1
        assert forms.call_count == 1


def test_what_trains_is_asked_again_when_it_changes(rng):
    a, b = parts(rng)
    w = tether.Weight((N, M), name="w")
    layer = tether.tie(layers.Dense(M), kernel=w + a @ b)
    x = keras.ops.convert_to_tensor(rng.normal(size=(ROWS, N)).astype("float32"))
    layer(x, training=True)
    assert of_the_base(product_shapes(layer, x))
    w.trainable = False
    assert not of_the_base(product_shapes(layer, x))
    w.trainable = True
    assert of_the_base(product_shapes(layer, x))


def test_a_layer_that_is_tied_again_is_planned_again(rng):
    layer = stopped(rng)
    x = rng.normal(size=(3, N)).astype("float32")
    layer(x)
    a, b = parts(rng)
    tether.tie(layer, kernel=a @ b)
    with planning.force("factored"):
        assert_close(layer(x), x @ numpy(a.value) @ numpy(b.value), 1e-3)


def test_plans_of_ever_other_shapes_do_not_fill_the_memory(rng):
    layer = stopped(rng)
    with mock.patch.object(appliers, "MAX_KEPT", 2):
        for rows in range(1, 6):
            layer(np.ones((rows, N), "float32"))
    assert len(layer.kernel.planner._plans) <= 2

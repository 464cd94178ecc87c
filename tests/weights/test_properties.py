"""Random expressions against NumPy, in value, gradient and notation; random files against the promise of one error."""

import base64
import contextlib
import copy
import json
import pickle
import time
import tracemalloc

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tether
from tests.support import as_zero, gradients
from tether.errors import InvalidConfig
from tether.layers.records.record import read_record
from tether.weights import Argument, Constant, Expression, Node, Weight, bind
from tether.weights.codec import decode, encode
from tether.weights.expression import MAX_STEPS, OPERATORS, as_expression, leaves, program
from tether.weights.leaves import Choice
from tether.weights.operators.choice import Adapted, Choose, Routed
from tether.weights.operators.quantized import Dequantize, Unpack

ops = tether.ops
BACKEND = keras.backend.backend()


def bounded(examples=60):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


# --------------------------------------------------------------------------- random expressions
#
# A random expression is drawn as a growing pool: each step applies one operator to members of the pool,
# so parts are shared as they are in life. Beside each expression stands its oracle, the same in NumPy:
# a function of the weights' values, and of their values at the point where gradients are taken, which
# `stop_gradient` and `scale_gradient` need.

SHAPES = {"a": (2, 3), "b": (2, 3), "c": (3, 2), "v": (3,), "u": (2, 1), "s": (), "t": (2, 1, 3)}
STRENGTH = Argument("strength")
BOUND = 0.7
MASK = np.array([True, False, True])


@keras.saving.register_keras_serializable("tether_tests")
def mean_of_both(x, y):
    return (x + y) / 2


def values_of(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.5, 1.5, shape) for name, shape in SHAPES.items()}


def fits(*shapes):
    try:
        return np.prod(np.broadcast_shapes(*shapes)) <= 200
    except ValueError:
        return False


def can_multiply(a, b):
    return bool(a and b) and a[-1] == b[max(len(b) - 2, 0)] and fits(a[:-2], b[:-2])


class Pool:
    """The expressions drawn so far, each with its oracle and its shape."""

    def __init__(self, draw, weights):
        self.draw = draw
        self.members = [
            (weights[name], lambda now, base, name=name: now[name], shape) for name, shape in SHAPES.items()
        ]
        self.members.append((STRENGTH, lambda now, base: np.float64(BOUND), ()))

    def choose(self, accepts=lambda shape: True):
        found = [member for member in reversed(self.members) if accepts(member[2])]
        assume(found)
        return self.draw(st.sampled_from(found))

    def grow(self):
        make = self.draw(st.sampled_from(STEPS))
        expression, oracle = make(self)
        value = oracle(values_of(0), values_of(0))
        if value.size <= 200 and value.ndim <= 4 and np.all(np.abs(value) < 1e3):
            self.members.append((expression, oracle, value.shape))
        return expression


def binary(symbol, python, numpy):
    def step(pool):
        x, fx, shape = pool.choose()
        kind = pool.draw(st.sampled_from(["expression", "number", "array"]))
        if kind == "expression":
            y, fy, _ = pool.choose(lambda other: fits(shape, other))
            if symbol == "/":
                y, fy = y * y + 0.5, lambda now, base, g=fy: g(now, base) ** 2 + 0.5
        else:
            constant = pool.draw(st.sampled_from([0.5, -2.0, 3, 1.25]))
            y = constant if kind == "number" else np.full(shape[-1:], constant, "float32")
            fy = lambda now, base: y  # noqa: E731
            if pool.draw(st.booleans()) and symbol != "/":
                return python(y, x), lambda now, base: numpy(fy(now, base), fx(now, base))
        return python(x, y), lambda now, base: numpy(fx(now, base), fy(now, base))

    return step


def matmul(pool):
    x, fx, shape = pool.choose(lambda shape: any(can_multiply(shape, other) for _, _, other in pool.members))
    y, fy, _ = pool.choose(lambda other: can_multiply(shape, other))
    return x @ y, lambda now, base: np.matmul(fx(now, base), fy(now, base))


def unary(make):
    """A step of one operand: `make(pool, x, shape)` gives the expression and a function of an array."""

    def step(pool):
        x, fx, shape = pool.choose()
        expression, numpy = make(pool, x, shape)
        return expression, lambda now, base: numpy(fx(now, base))

    return step


def transposed(pool, x, shape):
    axes = pool.draw(st.one_of(st.none(), st.permutations(range(len(shape)))))
    if axes is None:
        return x.T, np.transpose
    axes = tuple(axis - len(shape) * pool.draw(st.booleans()) for axis in axes)
    return ops.transpose(x, axes), lambda value: np.transpose(value, axes)


def reshaped(pool, x, shape):
    size = int(np.prod(shape))
    sizes = pool.draw(st.sampled_from([(size,), (1, size), (-1,), (size, 1), (1, -1, 1), shape[::-1]]))
    return x.reshape(sizes), lambda value: np.reshape(value, sizes)


BOUNDS = st.one_of(st.none(), st.integers(-4, 4))
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([None, 1, 2, -1, -2]))


def indexed(pool, x, shape):
    parts = [pool.draw(st.one_of(SLICES, st.integers(-size, size - 1) if size else SLICES)) for size in shape]
    cut = pool.draw(st.integers(0, len(parts)))
    key = parts[:cut]
    if pool.draw(st.booleans()):
        resume = pool.draw(st.integers(cut, len(parts)))
        key += [Ellipsis, *parts[resume:]]
    if pool.draw(st.booleans()):
        key.insert(pool.draw(st.integers(0, len(key))), None)
    key = tuple(key)
    return x[key], lambda value: value[key]


def taken(pool):
    x, fx, shape = pool.choose(lambda shape: bool(shape) and 0 not in shape)
    axis = pool.draw(st.integers(-len(shape), len(shape) - 1))
    indices = pool.draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=4))
    indices = pool.draw(st.sampled_from([indices, indices[0], [indices, indices]]))
    return ops.take(x, indices, axis), lambda now, base: np.take(fx(now, base), indices, axis=axis)


def joined(function, numpy):
    def step(pool):
        x, fx, shape = pool.choose(lambda shape: bool(shape))
        y, fy, _ = pool.choose(lambda other: other == shape)
        axis = pool.draw(st.integers(-len(shape), len(shape) - 1))
        return function([x, y, x], axis), lambda now, base: numpy(
            [fx(now, base), fy(now, base), fx(now, base)], axis=axis
        )

    return step


def chosen(pool):
    x, fx, shape = pool.choose()
    y, fy, other = pool.choose(lambda other: fits(shape, other))
    if pool.draw(st.booleans()) and fits(shape, other, (3,)):
        return ops.where(MASK, x, y), lambda now, base: np.where(MASK, fx(now, base), fy(now, base))
    return ops.where(x, y, 2.0), lambda now, base: np.where(fx(now, base) != 0, fy(now, base), 2.0)


def routed(pool):
    x, fx, shape = pool.choose()
    y, fy, _ = pool.choose(lambda other: other == shape)
    if pool.draw(st.booleans()):
        place = pool.draw(st.integers(-1, 2))
        number = Choice("each", [*"abc"], default=place, none="none")
        return Routed(number, x, Choose(number, y, x, y, strict=True)), (fy, fx, fy, fx)[place]
    place = pool.draw(st.integers(0, 2))
    argument = Argument("choice", (), "int32", default=place)
    return ops.choose(argument, [x, y, x]), (fx, fy, fx)[place]


def adapted(pool):
    x, fx, shape = pool.choose()
    y, fy, _ = pool.choose(lambda other: other == shape)
    strength = pool.draw(st.sampled_from([0.5, -1.0, 2.0]))
    expression = Adapted(x, as_expression(strength), y, names=("part",))
    return expression, lambda now, base: fx(now, base) + strength * fy(now, base)


def contracted(pool):
    x, fx, shape = pool.choose(lambda shape: len(shape) == 2)
    y, fy, _ = pool.choose(lambda other: len(other) == 2 and other[0] == shape[1])
    equation = pool.draw(st.sampled_from(["ij,jk->ik", "ij,jk->kji", "ij,jk->", "ij,jk->k", "ij,jk->j"]))
    return ops.einsum(equation, x, y), lambda now, base: np.asarray(np.einsum(equation, fx(now, base), fy(now, base)))


def applied(pool):
    x, fx, shape = pool.choose()
    if pool.draw(st.booleans()):
        return ops.apply(keras.ops.tanh, x), lambda now, base: np.tanh(fx(now, base))
    y, fy, _ = pool.choose(lambda other: fits(shape, other))
    return ops.apply(mean_of_both, x, y), lambda now, base: (fx(now, base) + fy(now, base)) / 2


def stopped(pool):
    x, fx, _ = pool.choose()
    return x.stop_gradient(), lambda now, base: fx(base, base)


def scaled(pool):
    x, fx, _ = pool.choose()
    scale = pool.draw(st.sampled_from([0.0, 0.5, -1.0, 2]))
    return x.scale_gradient(scale), lambda now, base: fx(base, base) + scale * (fx(now, base) - fx(base, base))


def dequantised(pool):
    """Threes, stored whole or in half a byte each, times an expression as the scale."""
    x, fx, shape = pool.choose(lambda shape: bool(shape) and 0 not in shape)
    axis = pool.draw(st.integers(0, len(shape) - 1))
    if pool.draw(st.booleans()):
        packed = [(size + 1) // 2 if place == axis else size for place, size in enumerate(shape)]
        codes = Unpack(Constant.of(np.full(packed, 0x33, "int8")), axis=axis, size=shape[axis])
    else:
        codes = Constant.of(np.full(shape, 3, "int8"))
    sizes = pool.draw(st.sampled_from([None, (int(np.prod(shape)),), (1, *shape)]))
    expression = Dequantize(codes, x, dtype=x.dtype, shape=sizes)
    return expression, lambda now, base: np.reshape(3 * fx(now, base), sizes or shape)


def cast_to_the_same(pool):
    x, fx, _ = pool.choose()
    return x.astype(keras.config.floatx()), fx


def powered(pool, x, shape):
    exponent = pool.draw(st.sampled_from([2, 3, 1, 0]))
    return x**exponent, lambda value: value**exponent


def of_each(pool, x, shape):
    """A function of each number, kept away from where it has no gradient."""
    name = pool.draw(st.sampled_from(["abs", "exp", "log", "sqrt"]))
    if name == "abs":
        return abs(x * x + 0.5), lambda value: np.abs(value**2 + 0.5)
    if name == "exp":
        return ops.exp(0.1 * x / (x * x + 1.0)), lambda value: np.exp(0.1 * value / (value**2 + 1.0))
    return getattr(ops, name)(x * x + 0.5), lambda value: getattr(np, name)(value**2 + 0.5)


def limited(pool, x, shape):
    """The larger or smaller of two numbers that are never equal."""
    name = pool.draw(st.sampled_from(["maximum", "minimum"]))
    return getattr(ops, name)(x, x * x + 2.0), lambda value: getattr(np, name)(value, value**2 + 2.0)


def reduced(pool, x, shape):
    name = pool.draw(st.sampled_from(["sum", "mean", "max", "min"]))
    axes = pool.draw(st.one_of(st.none(), st.sets(st.integers(0, len(shape) - 1)) if shape else st.just(set())))
    kept = pool.draw(st.booleans())
    axes = None if axes is None else tuple(axis - len(shape) * pool.draw(st.booleans()) for axis in sorted(axes))
    assume(0 not in shape)
    if name in ("max", "min"):  # what the gradient is for equal numbers, backends choose differently
        assume(int(np.prod([shape[axis] for axis in (range(len(shape)) if axes is None else axes)])) == 1)
    return getattr(x, name)(axes, keepdims=kept), lambda value: np.asarray(
        getattr(np, name)(value, axis=axes, keepdims=kept)
    )


STEPS = [
    binary("+", lambda x, y: x + y, np.add),
    binary("-", lambda x, y: x - y, np.subtract),
    binary("*", lambda x, y: x * y, np.multiply),
    binary("/", lambda x, y: x / y, np.divide),
    matmul,
    unary(lambda pool, x, shape: (-x, np.negative)),
    unary(transposed),
    unary(reshaped),
    unary(indexed),
    unary(powered),
    unary(of_each),
    unary(limited),
    unary(reduced),
    taken,
    joined(ops.concatenate, np.concatenate),
    joined(ops.stack, np.stack),
    chosen,
    routed,
    adapted,
    contracted,
    applied,
    stopped,
    scaled,
    dequantised,
    cast_to_the_same,
]


@st.composite
def expressions(draw, weights, steps=6):
    """An expression over `weights` (a function of no arguments gives them), and its oracle."""
    pool = Pool(draw, weights())
    for _ in range(draw(st.integers(1, steps))):
        pool.grow()
    expression, oracle, _ = pool.members[-1]
    return expression, oracle


SEEDS = st.integers(0, 20)
_made = {}


def weights():
    """The weights of all random expressions, made once: what differs is what is assigned."""
    dtype = keras.config.floatx()
    if dtype not in _made:
        _made[dtype] = {name: Weight(shape, "zeros", dtype=dtype, name=name) for name, shape in SHAPES.items()}
    return _made[dtype]


def assign(values):
    for name, weight in weights().items():
        weight.assign(values[name])


def close(found, expected, tolerance):
    scale = 1.0 + float(np.max(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(np.asarray(found, "float64"), expected, rtol=tolerance, atol=tolerance * scale)


@given(expressions(weights), SEEDS)
@bounded(60)
def test_values_shapes_and_dtypes_are_those_of_numpy(drawn, seed):
    expression, oracle = drawn
    values = values_of(seed)
    assign(values)
    shape, dtype = expression.shape, expression.dtype
    with bind({STRENGTH: BOUND}):
        value = expression.value
        expected = oracle(values, values)
        assert tuple(value.shape) == shape == expected.shape
        assert keras.backend.standardize_dtype(value.dtype) == dtype == "float32"
        close(expression.numpy(), expected, 1e-4)


@contextlib.contextmanager
def most_precise():
    """The most precise arithmetic that Keras has on the backend; gives its dtype and how close it comes.

    On PyTorch many functions of `keras.ops` cast float64 to float32 (`keras.backend.result_type` knows no
    float64 there). The finite differences are taken in NumPy's float64 everywhere, so they stay exact.
    """
    if BACKEND == "torch":
        yield "float32", 1e-4
        return
    keras.config.set_floatx("float64")
    try:
        if BACKEND == "jax":
            import jax

            with jax.enable_x64(True):
                yield "float64", 1e-6
        else:
            yield "float64", 1e-6
    finally:
        keras.config.set_floatx("float32")


def finite_differences(loss, values, step=1e-5):
    """The gradient of `loss(values)` with respect to every weight, by central differences."""
    found = {}
    for name, value in values.items():
        gradient = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * step
                ends.append(loss({**values, name: moved}))
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
        found[name] = gradient
    return found


@given(st.data(), SEEDS)
@bounded(20 if BACKEND == "jax" else 40)  # JAX compiles for every new shape
def test_gradients_are_those_of_finite_differences(data, seed):
    with most_precise() as (dtype, tolerance):
        expression, oracle = data.draw(expressions(weights, steps=5))
        values = values_of(seed)
        assign(values)
        rng = np.random.default_rng(seed)
        directions = rng.normal(size=expression.shape).astype(dtype)
        used = {weight.name: weight for weight in expression.weights_used()}
        assume(used)
        with bind({STRENGTH: BOUND}):
            if keras.backend.standardize_dtype(expression.value.dtype) != dtype:
                tolerance = 1e-3  # some functions of `keras.ops`, tanh among them, cast float64 to float32
            _, found = gradients(
                lambda: keras.ops.sum(
                    keras.ops.cast(expression.value, dtype) * keras.ops.convert_to_tensor(directions)
                    # Every weight is in the loss, so that PyTorch has something to differentiate.
                    + sum(0.0 * keras.ops.sum(weight.value) for weight in used.values())
                ),
                [weight.variable for weight in used.values()],
            )
        expected = finite_differences(
            lambda now: np.sum(oracle(now, values) * directions), {name: values[name] for name in SHAPES}
        )
        for (name, weight), gradient in zip(used.items(), found, strict=True):
            close(as_zero(gradient, weight.shape), expected[name], tolerance)


def integers(x):
    return x if isinstance(x, Expression) else Constant.of(np.array(x, "int8"))


NAMES = {
    **{name: getattr(ops, name) for name in ("take", "concatenate", "stack", "where", "einsum")},
    **{name: getattr(ops, name) for name in ("abs", "exp", "log", "sqrt", "maximum", "minimum")},
    **{name: getattr(ops, name) for name in ("sum", "mean", "max", "min")},
    "tanh": lambda x: ops.apply(keras.ops.tanh, x),
    "mean_of_both": lambda x, y: ops.apply(mean_of_both, x, y),
    "unpack": lambda x, axis, size: Unpack(integers(x), axis=axis, size=size),
    "dequantize": lambda x, scale: Dequantize(integers(x), as_expression(scale), dtype="float32"),
    "float32": "float32",
    "strength": STRENGTH,
}


@given(expressions(weights), SEEDS)
@bounded(60)
def test_notation_read_as_python_means_the_same(drawn, seed):
    expression, _ = drawn
    assign(values_of(seed))
    text = expression.notation()
    assume("array[" not in text and "..., " not in text and not text.startswith("..."))
    choices = {leaf.default for leaf in leaves(expression) if isinstance(leaf, Argument) and leaf.name == "choice"}
    assume(len(choices) <= 1)  # two arguments of one name and different defaults read the same
    read = eval(text, {"__builtins__": {}}, {**NAMES, **weights(), "choice": next(iter(choices), None)})
    with bind({STRENGTH: BOUND}):
        close(tether.ops.multiply(read, 1.0).numpy(), expression.numpy().astype("float64"), 1e-4)


@given(expressions(weights), SEEDS)
@bounded(40)
def test_expressions_travel_as_json(drawn, seed):
    expression, _ = drawn
    assign(values_of(seed))
    known = {weight.uid: weight for weight in weights().values()}
    steps = json.loads(json.dumps(encode(expression), allow_nan=False))
    read = decode(steps, known)
    assert read == expression
    assert hash(read) == hash(expression)
    assert (read.notation(), read.shape, read.dtype) == (expression.notation(), expression.shape, expression.dtype)
    assert encode(read) == encode(expression)
    with bind({STRENGTH: BOUND}):
        np.testing.assert_array_equal(read.numpy(), expression.numpy())


@given(expressions(weights))
@bounded(15)
def test_expressions_travel_by_pickle_and_deepcopy(drawn):
    expression, _ = drawn
    assign(values_of(1))
    with bind({STRENGTH: BOUND}):
        value = expression.numpy()
        for copied in (copy.deepcopy(expression), pickle.loads(pickle.dumps(expression))):
            assert copied.notation() == expression.notation()
            assert not set(copied.weights_used()) & set(expression.weights_used())
            np.testing.assert_array_equal(copied.numpy(), value)


@given(expressions(weights), expressions(weights))
@bounded(60)
def test_equality_is_that_of_what_is_written_into_files(first, second):
    one, other = first[0], second[0]
    assert (one == other) == (encode(one) == encode(other))
    assert one != other or hash(one) == hash(other)
    assert one == decode(encode(one), {weight.uid: weight for weight in weights().values()})


@given(expressions(weights), SEEDS)
@bounded(40)
def test_what_can_be_assigned_is_the_value_afterwards(drawn, seed):
    expression, _ = drawn
    values = values_of(seed)
    assign(values)
    wanted = np.random.default_rng(seed).uniform(0.5, 1.5, expression.shape).astype("float32")
    with bind({STRENGTH: BOUND}):
        try:
            expression.assign(wanted)
        except tether.TetherError:
            for name, weight in weights().items():
                np.testing.assert_array_equal(weight.numpy(), values[name].astype("float32"))
        else:
            close(expression.numpy(), wanted.astype("float64"), 1e-4)


# --------------------------------------------------------------------------- random files
#
# Whatever a file holds, reading it gives a valid object or an error of Tether's own.

NUMBERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**40, 2**63, -(2**70), 10**30, 1e300, 0.5, float("nan"), float("inf")]),
)
TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        [
            "weight", "number", "array", "argument", "op", "of", "a", "zeros", "float32", "string", "int8", "bfloat16",
            "complex64", "bool", "keras.ops.tanh", "keras.ops.__class__", "keras.ops.while_loop", "nan", "slice",
            "kernel", "kernel/0", "../kernel", "", "_tracker", "trainable_variables/0", "__class__", "ij,jk->ik",
            *OPERATORS,
        ]
    ),
)  # fmt: skip
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    ATOMS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)), max_leaves=8
)
STEP_KEYS = st.sampled_from(
    ["op", "of", "axes", "shape", "key", "dtype", "indices", "axis", "function", "equation", "scale", "size", "weight"]
)
WILD_STEPS = st.lists(
    st.one_of(
        JSON,
        st.dictionaries(STEP_KEYS, JSON, max_size=4),
        st.builds(
            lambda op, of, rest: {**rest, "op": op, "of": of},
            st.sampled_from(sorted(OPERATORS)),
            st.lists(st.integers(-1, 3), max_size=3),
            st.dictionaries(STEP_KEYS, JSON, max_size=2),
        ),
        st.just({"weight": "a"}),
        st.just({"number": 2}),
    ),
    max_size=5,
)


def places_of(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places_of(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places_of(value[index], (*path, index))


@st.composite
def mutated(draw, value, replacements=JSON):
    """A JSON value with one to three places replaced, removed, doubled or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places_of(value))))
        if not path:
            value = draw(st.one_of(replacements, st.just([value])))
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "double", "move"]))
        if change == "replace":
            holder[path[-1]] = draw(replacements)
        elif change == "remove":
            del holder[path[-1]]
        elif change == "double" and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        elif change == "double":
            holder[draw(TEXTS)] = copy.deepcopy(holder[path[-1]])
        else:
            other = draw(st.sampled_from(list(places_of(value))))
            found = value
            for key in other:
                found = found[key]
            holder[path[-1]] = copy.deepcopy(found)
    return value


@contextlib.contextmanager
def soon(seconds=5.0):
    """The block takes little processor time, whatever it was given."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def is_tethers(error):
    """Whether the error is Tether's, or one of Keras that was raised because of it."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, tether.TetherError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def read_or_refused(read):
    """What `read()` gives, or None if it raised an error of Tether's; every other error fails the test."""
    with soon():
        try:
            return read()
        except tether.TetherError:
            return None


def check_expression(found):
    if found is not None:
        assert isinstance(found, Expression)
        assert found.shape is None or all(type(size) is int and size >= 0 for size in found.shape)
        assert isinstance(found.notation(), str)
        assert found.dtype is None or isinstance(found.dtype, str)


KNOWN = {"a": Weight((2, 3), "zeros"), "later": Weight()}


@given(st.one_of(JSON, WILD_STEPS))
@bounded(150)
def test_reading_wild_expressions_gives_one_or_tethers_error(steps):
    check_expression(read_or_refused(lambda: decode(steps, KNOWN)))


@given(st.data())
@bounded(150)
def test_reading_changed_expressions_gives_one_or_tethers_error(data):
    expression, _ = data.draw(expressions(weights))
    known = {weight.uid: weight for weight in weights().values()}
    steps = data.draw(mutated(encode(expression)))
    check_expression(read_or_refused(lambda: decode(steps, known)))


@given(st.sampled_from(sorted(OPERATORS)), st.integers(1, 3), st.dictionaries(STEP_KEYS, JSON, max_size=2), st.data())
@bounded(150)
def test_operators_refuse_parameters_that_make_no_sense(name, count, parameters, data):
    accepts = OPERATORS[name].accepts
    parameters.update({key: data.draw(JSON) for key in accepts if data.draw(st.booleans())})
    steps = [{"weight": "a"}, {"op": name, "of": [0] * count, **parameters}]
    check_expression(read_or_refused(lambda: decode(steps, KNOWN)))


BYTES = encode(Constant.of(np.zeros((2, 3), "int8")))[0]["array"]


@pytest.mark.parametrize(
    "steps",
    [
        None, "a", 3, {}, [], [None], ["weight"], [[]], [{}], [{"weight": "unknown"}], [{"weight": ["a"]}],
        [{"weight": {"a": 1}}], [{"weight": "a", "number": 1}], [{"leaf": 1}], [{"number": "1"}], [{"number": True}],
        [{"number": None}], [{"number": 2**63}], [{"number": 10**400}], [{"number": [1]}],
        [{"op": "add", "of": [0, 0]}], [{"weight": "a"}, {"op": "add", "of": [0, 1]}],
        [{"weight": "a"}, {"op": "add", "of": [0, 2]}, {"op": "negative", "of": [1]}],
        [{"weight": "a"}, {"op": "negative", "of": [-1]}], [{"weight": "a"}, {"op": "negative", "of": [True]}],
        [{"weight": "a"}, {"op": "negative", "of": [0.0]}], [{"weight": "a"}, {"op": "negative", "of": []}],
        [{"weight": "a"}, {"op": "negative", "of": {"0": 0}}], [{"weight": "a"}, {"op": "negative"}],
        [{"weight": "a"}, {"op": "negative", "of": [0, 0]}],
        [{"weight": "a"}, {"op": "negative", "of": [0], "axis": 1}],
        [{"weight": "a"}, {"op": "negative", "of": [0], "self": 1}], [{"weight": "a"}, {"op": "unknown", "of": [0]}],
        [{"weight": "a"}, {"op": ["add"], "of": [0]}], [{"weight": "a"}, {"op": "__init__", "of": [0]}],
        [{"weight": "a"}, {"op": "matmul", "of": [0, 0]}],
        [{"weight": "a"}, {"op": "reshape", "of": [0], "shape": [1 << 62, 1 << 62]}],
        [{"weight": "a"}, {"op": "reshape", "of": [0], "shape": [1] * 100 + [6]}],
        [{"weight": "a"}, {"op": "reshape", "of": [0], "shape": "23"}],
        [{"weight": "a"}, {"op": "transpose", "of": [0], "axes": [0, 1 << 70]}],
        [{"weight": "a"}, {"op": "index", "of": [0], "key": [["slice", 0, 1]]}],
        [{"weight": "a"}, {"op": "index", "of": [0], "key": [["slice", 0, 1, 0]]}],
        [{"weight": "a"}, {"op": "index", "of": [0], "key": [None] * 60}],
        [{"weight": "a"}, {"op": "index", "of": [0], "key": [[0, 1]]}],
        [{"weight": "a"}, {"op": "take", "of": [0], "indices": [1 << 70], "axis": 0}],
        [{"weight": "a"}, {"op": "cast", "of": [0], "dtype": "string"}],
        [{"weight": "a"}, {"op": "cast", "of": [0], "dtype": "complex64"}],
        [{"weight": "a"}, {"op": "cast", "of": [0], "dtype": ["float32"]}],
        [{"weight": "a"}, {"op": "unpack", "of": [0], "axis": 0, "size": 4}],
        [{"array": BYTES}, {"op": "unpack", "of": [0], "axis": 0, "size": 9}],
        [{"array": BYTES}, {"op": "unpack", "of": [0], "axis": 9, "size": 4}],
        [{"weight": "a"}, {"op": "dequantize", "of": [0, 0], "dtype": "float32"}],
        [{"number": 2}, {"number": 0.5}, {"op": "dequantize", "of": [0, 1], "dtype": "float32"}],
        [{"array": BYTES}, {"weight": "a"}, {"op": "dequantize", "of": [0, 1], "dtype": "int8"}],
        [{"array": BYTES}, {"weight": "a"}, {"op": "dequantize", "of": [0, 1], "dtype": "float32", "shape": [1 << 62]}],
        [{"weight": "a"}, {"op": "scale_gradient", "of": [0], "scale": float("nan")}],
        [{"weight": "a"}, {"op": "scale_gradient", "of": [0], "scale": 10**400}],
        [{"weight": "a"}, {"op": "apply", "of": [0], "function": "os.system"}],
        [{"weight": "a"}, {"op": "apply", "of": [0], "function": "keras.ops.numpy.tanh"}],
        [{"weight": "a"}, {"op": "apply", "of": [0], "function": "keras.ops.__getattribute__"}],
        [{"weight": "a"}, {"op": "apply", "of": [0], "function": {"class_name": "__lambda__", "config": {}}}],
        [{"argument": {"name": "k", "shape": [1 << 40], "dtype": "float32"}}],
        [{"argument": {"name": "k", "shape": [1 << 20, 1 << 20], "dtype": "float32"}}],
        [{"argument": {"name": "k", "shape": [1] * 100, "dtype": "float32"}}],
        [{"argument": {"name": "k k", "shape": [], "dtype": "float32"}}],
        [{"argument": {"name": "k", "shape": [], "dtype": "string"}}],
        [{"argument": {"name": "k", "shape": [], "dtype": None}}],
        [{"argument": {"name": "k", "shape": []}}], [{"argument": "k"}],
    ],
)  # fmt: skip
def test_files_that_nobody_wrote_are_refused(steps):
    with soon(), pytest.raises(InvalidConfig):
        decode(steps, KNOWN)


def array_step(dtype="float32", shape=(2,), data=None):
    data = np.zeros(2, "float32").tobytes() if data is None else data
    return [{"array": {"dtype": dtype, "shape": shape, "data": base64.b64encode(data).decode()}}]


@pytest.mark.parametrize(
    "steps",
    [
        array_step(shape=[1 << 30]), array_step(shape=[3]), array_step(shape=[-2]), array_step(shape=[2.0]),
        array_step(shape=[1 << 40, 0], data=b""), array_step(shape=[1 << 70, 0], data=b""), array_step(shape="2"),
        array_step(shape=[1] * 40 + [2]), array_step(dtype="object"), array_step(dtype="O", shape=[1]),
        array_step(dtype="S4"), array_step(dtype="V4"), array_step(dtype="f4,f4", shape=[1]),
        array_step(dtype="M8[s]", shape=[1]), array_step(dtype="complex64", shape=[1]), array_step(dtype=">f4"),
        array_step(dtype="(2,)f4", shape=[1]),
        array_step(dtype="float128", shape=[0], data=b""), array_step(dtype="nonsense"),
        array_step(dtype=None, shape=[1]),
        array_step(dtype=["f4"]), array_step(dtype={"names": ["a"], "formats": ["f4"]}), array_step(dtype="finfo"),
        array_step(dtype=7), [{"array": {"dtype": "float32", "shape": [2], "data": "not base64!"}}],
        [{"array": {"dtype": "float32", "shape": [2], "data": 8}}], [{"array": {"dtype": "float32", "shape": [2]}}],
        [{"array": [1.0]}],
    ],
)  # fmt: skip
def test_arrays_that_nobody_wrote_are_refused(steps):
    with soon(), pytest.raises(InvalidConfig):
        decode(steps, {})


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_arrays_of_every_dtype_travel(dtype):
    array = np.array([[1.0, 0.0]]).astype(getattr(ml_dtypes, dtype, dtype))
    constant = tether.weights.Constant.of(array)
    read = decode(json.loads(json.dumps(encode(constant))), {})
    assert read == constant
    assert (read.dtype, read.shape) == (dtype, (1, 2))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -0.0, 0, 2**53 + 1, 1e-300, 0.1])
def test_every_number_travels_in_strict_json(number):
    constant = tether.weights.Constant.of(number)
    text = json.dumps(encode(constant), allow_nan=False)
    assert decode(json.loads(text), {}) == constant


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("wrap", [
    lambda deep: deep, lambda deep: [deep], lambda deep: [{"weight": deep}], lambda deep: [{"number": deep}],
    lambda deep: [{"argument": deep}], lambda deep: [{"array": deep}], lambda deep: [{"op": deep, "of": [0]}],
    lambda deep: [{"weight": "a"}, {"op": "index", "of": [0], "key": deep}],
    lambda deep: [{"weight": "a"}, {"op": "reshape", "of": [0], "shape": deep}],
    lambda deep: [{"weight": "a"}, {"op": "negative", "of": deep}],
])  # fmt: skip
def test_values_nested_deeper_than_python_recurses_are_refused(wrap):
    with soon(), pytest.raises(InvalidConfig) as caught:
        decode(wrap(deep_list(100_000)), KNOWN)
    assert len(str(caught.value)) < 10_000


def test_errors_about_large_files_are_short():
    long = "x" * 1_000_000
    for steps in ([{"weight": long}], [list(range(1_000_000))], [{"weight": "a"}, {"op": long}], [{long: 1}]):
        with soon(), pytest.raises(InvalidConfig) as caught:
            decode(steps, KNOWN)
        assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("leaf, op, times", [("a", "transpose", 1), ("later", "multiply", 2), ("a", "where", 3)])
def test_the_longest_chains_are_read_in_bounded_time(leaf, op, times):
    chain = [{"weight": leaf}, *({"op": op, "of": [place] * times} for place in range(MAX_STEPS - 1))]
    with soon(10):
        found = decode(chain, KNOWN)
        turned = op == "transpose" and MAX_STEPS % 2 == 0
        assert found.shape == (None if leaf == "later" else (3, 2) if turned else (2, 3))
        assert found.dtype == (None if leaf == "later" else "float32")
        assert len(found.notation()) < 10_000
        assert len(program(found)) == MAX_STEPS
    with pytest.raises(InvalidConfig):
        decode([*chain, {"op": op, "of": [0] * times}], KNOWN)


def test_small_files_of_large_values_take_little_memory():
    chain = [{"weight": "a"}, *({"op": "concatenate", "of": [place] * 2, "axis": 0} for place in range(30))]
    chain += [{"op": "add", "of": [place, place]} for place in range(30, 1000)]
    tracemalloc.start()
    try:
        assert decode(chain, KNOWN).shape == (2**31, 3)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_sizes_that_double_with_every_step_are_refused():
    chain = [{"weight": "a"}, *({"op": "concatenate", "of": [place] * 2, "axis": 0} for place in range(100))]
    with soon(), pytest.raises(InvalidConfig, match="elements"):
        decode(chain, KNOWN)
    chain = [{"weight": "a"}, *({"op": "stack", "of": [place], "axis": 0} for place in range(100))]
    with soon(), pytest.raises(InvalidConfig, match="axes"):
        decode(chain, KNOWN)


def test_no_function_of_keras_does_harm_when_a_file_names_it():
    names = [name for name in dir(keras.ops) if callable(getattr(keras.ops, name))]
    assert len(names) > 150
    accepted = 0
    for name in names:
        for places in ([0], [0, 0], [0, 1], [1, 0, 1]):
            steps = [{"weight": "a"}, {"number": 2}, {"op": "apply", "of": places, "function": f"keras.ops.{name}"}]
            found = read_or_refused(lambda steps=steps: decode(steps, KNOWN))
            check_expression(found)
            accepted += found is not None
    assert accepted > 100


# --------------------------------------------------------------------------- weights and ties of strangers

WEIGHT_CONFIG = Weight(
    (2, 3), keras.initializers.RandomUniform(seed=1), regularizer="l2", constraint="non_neg", name="of_a_stranger"
).get_config()
SIZES = st.one_of(
    st.lists(st.sampled_from([-1, 0, 1, 3, 2**40, 10**30, True, 1.5, "3", None]), max_size=3),
    st.lists(st.just(1), min_size=30, max_size=40),
)


def keras_object(module, name, **config):
    return {"module": module, "class_name": name, "config": config, "registered_name": None}


KERAS_OBJECTS = st.sampled_from(
    [
        keras_object("keras.layers", "Dense", units=2),
        keras_object("keras.initializers", "Constant", value="x"),
        keras_object("keras.initializers", "Constant"),
        keras_object("keras.initializers", "RandomNormal", stddev="x"),
        keras_object("keras.initializers", "Identity"),
        keras_object("keras.regularizers", "L2", l2="x"),
        keras_object("keras.constraints", "MaxNorm", max_value=[]),
        keras_object("builtins", "eval"),
        keras_object("tether.weights.weight", "Weight"),
        {"class_name": "__lambda__", "config": {"value": "x"}},
        {"class_name": "function", "config": "print", "module": "builtins", "registered_name": "function"},
    ]
)


@given(mutated(WEIGHT_CONFIG, st.one_of(ATOMS, KERAS_OBJECTS)), st.one_of(st.none(), SIZES))
@bounded(120)
def test_reading_changed_weights_gives_one_or_tethers_error(config, shape):
    if isinstance(config, dict) and shape is not None:
        config["shape"] = shape
    found = read_or_refused(lambda: Weight.from_config(config))
    if found is not None:
        assert isinstance(found, Weight)
        assert found.shape is None or found.shape == tuple(config["shape"])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 40]}, {"shape": [1 << 20, 1 << 20]}, {"shape": [10**30]}, {"shape": [-1]}, {"shape": [1] * 40},
        {"shape": "23"}, {"shape": [True, 2]}, {"shape": [2.0, 3]}, {"shape": {"0": 1}}, {"dtype": "string"},
        {"dtype": "complex64"}, {"dtype": "float33"}, {"dtype": ["float32"]}, {"dtype": 3}, {"name": ""},
        {"name": None},
        {"name": "a/b"}, {"name": "x" * 2000}, {"uid": None}, {"uid": ""}, {"uid": 3}, {"origin": []}, {"path": 3},
        {"trainable": 1}, {"trainable": None}, {"initializer": 3}, {"initializer": "nonsense"}, {"initializer": []},
        {"regularizer": "nonsense"}, {"constraint": {"class_name": "nonsense", "config": {}}},
        {"initializer": keras_object("keras.layers", "Dense", units=2)},
        {"initializer": keras_object("keras.initializers", "Constant", value="x")},
        {"initializer": keras_object("keras.initializers", "Identity"), "shape": [2]},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_weights_that_nobody_wrote_are_refused(change):
    with soon(), pytest.raises(InvalidConfig):
        Weight.from_config({**WEIGHT_CONFIG, **change})


@pytest.mark.parametrize("key", [None, *WEIGHT_CONFIG])
def test_weights_nested_deeper_than_python_recurses_are_refused(key):
    deep = deep_list(100_000)
    with soon(), pytest.raises(InvalidConfig) as caught:
        Weight.from_config(deep if key is None else {**WEIGHT_CONFIG, key: deep})
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("config", [None, "codec", [], {}, 3, {"name": "codec"}], ids=str)
def test_what_is_no_config_of_a_weight_is_refused(config):
    with soon(), pytest.raises(InvalidConfig):
        Weight.from_config(config)


def tied_dense():
    table = Weight(np.arange(6, dtype="float32").reshape(3, 2), name="table_of_a_stranger")
    bias = Weight(np.zeros(3, "float32"), name="bias_of_a_stranger")
    layer = keras.layers.Dense(3, name="tied_of_a_stranger")
    tether.tie(layer, kernel=0.5 * table.T, bias=bias + np.array([1.0, 2.0, 3.0]))
    layer.build((None, 2))
    return layer


TIED_CONFIG = keras.saving.serialize_keras_object(tied_dense())
RECORD = TIED_CONFIG["config"]["tether"]


def test_the_record_of_a_tied_layer_is_read():
    found = read_record(copy.deepcopy(RECORD))
    assert RECORD["base"]["class_name"] == "Dense"
    assert {path: tie.notation() for path, tie in found.ties.items()} == {
        "kernel": "0.5 * table_of_a_stranger.T",
        "bias": "bias_of_a_stranger + [1.0, 2.0, 3.0]",
    }


def record_is_sound(found):
    if found is not None:
        for path, expression in found.ties.items():
            assert isinstance(path, str)
            check_expression(expression)


@given(mutated(RECORD))
@bounded(100)
def test_reading_changed_records_gives_ties_or_tethers_error(record):
    record_is_sound(read_or_refused(lambda: read_record(record)))


@given(JSON)
@bounded(60)
def test_reading_wild_records_gives_ties_or_tethers_error(record):
    record_is_sound(read_or_refused(lambda: read_record(record)))


def load(config):
    """The layer of a config, or None if an error of Tether's came out, alone or inside one of Keras's."""
    with soon():
        try:
            return keras.saving.deserialize_keras_object(config)
        except Exception as error:
            if not is_tethers(error):
                raise
            return None


def test_a_config_of_a_tied_layer_loads():
    layer = load(copy.deepcopy(TIED_CONFIG))
    assert isinstance(layer, keras.layers.Dense)
    table, bias = (w for w in layer.weights)
    assert_tied = layer(np.ones((1, 2), "float32"))
    assert tuple(assert_tied.shape) == (1, 3)
    assert {tuple(table.shape), tuple(bias.shape)} == {(3, 2), (3,)}


@given(mutated(RECORD))
@bounded(80)
def test_loading_a_layer_with_a_changed_record_gives_one_or_tethers_error(record):
    config = copy.deepcopy(TIED_CONFIG)
    config["config"]["tether"] = record
    layer = load(config)
    assert layer is None or isinstance(layer, keras.layers.Layer)


WILD_PATHS = [
    "", "/", "kernel/", "/kernel", "kernel/0", "../kernel", "nothing", "_tracker", "__class__", "units", "activation",
    "trainable_variables/0", "kernel/" * 10_000, "x" * 100_000, "_tether", "bias\x00", "kernel_initializer",
]  # fmt: skip


@pytest.mark.parametrize("path", WILD_PATHS, ids=lambda path: repr(path[:20]))
def test_a_tie_of_a_path_that_is_no_weight_is_refused(path):
    config = copy.deepcopy(TIED_CONFIG)
    record = config["config"]["tether"]
    record["ties"] = {path: record["ties"]["kernel"]}
    with soon(), pytest.raises(Exception) as caught:  # Keras may wrap it
        keras.saving.deserialize_keras_object(config)
    assert is_tethers(caught.value)


BASES = [
    None, "Dense", {}, {"module": "keras.layers", "class_name": "Dense"},
    {"module": "keras.layers", "class_name": "Nothing", "registered_name": None},
    {"module": "builtins", "class_name": "dict", "registered_name": None},
    {"module": "os", "class_name": "system", "registered_name": None},
    {"module": "tether.weights.weight", "class_name": "Weight", "registered_name": "Weight"},
    {"module": "keras.optimizers", "class_name": "Adam", "registered_name": None},
    {"module": None, "class_name": None, "registered_name": None},
    {"module": [], "class_name": {}, "registered_name": 3},
    {"module": "keras.layers", "class_name": "Dense", "registered_name": "tether>Tied"},
    {"module": None, "class_name": "Dense", "registered_name": "tether>Tied"},
]  # fmt: skip


@pytest.mark.parametrize("base", BASES, ids=lambda base: str(base)[:60])
def test_a_base_that_is_no_layer_is_refused(base):
    config = copy.deepcopy(TIED_CONFIG)
    config["config"]["tether"]["base"] = base
    with soon(), pytest.raises(Exception) as caught:  # Keras may wrap it
        keras.saving.deserialize_keras_object(config)
    assert is_tethers(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": None}, {"ties": None}, {"ties": []}, {"weights": None}, {"weights": []},
        {"weights": {}}, {"ties": {"kernel": None}}, {"ties": {"kernel": []}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_records_that_nobody_wrote_are_refused(change):
    check_refused_record({**copy.deepcopy(RECORD), **change})


@pytest.mark.parametrize("wrap", [
    lambda deep: deep, lambda deep: {**RECORD, "version": deep}, lambda deep: {**RECORD, "ties": deep},
    lambda deep: {**RECORD, "weights": deep}, lambda deep: {**RECORD, "ties": {"kernel": deep}},
    lambda deep: {**RECORD, "weights": {"a": deep}}, lambda deep: {**RECORD, "more": deep},
    lambda deep: {**RECORD, "weights": {"a": {**WEIGHT_CONFIG, "uid": deep}}},
])  # fmt: skip
def test_records_nested_deeper_than_python_recurses_are_refused(wrap):
    check_refused_record(wrap(deep_list(100_000)))


def check_refused_record(record):
    with soon(), pytest.raises(InvalidConfig) as caught:
        read_record(record)
    assert len(str(caught.value)) < 10_000
    with soon(), pytest.raises(Exception) as caught:  # Keras may wrap it
        keras.saving.deserialize_keras_object({**TIED_CONFIG, "config": {**TIED_CONFIG["config"], "tether": record}})
    assert is_tethers(caught.value)


def test_a_weight_under_another_uid_is_refused():
    record = copy.deepcopy(RECORD)
    first, second = record["weights"]
    record["weights"][first], record["weights"][second] = record["weights"][second], record["weights"][first]
    with pytest.raises(InvalidConfig, match="uid"):
        read_record(record)


def test_random_trees_reach_every_operator():
    seen = set()

    @given(expressions(weights))
    @bounded(150)
    def look(drawn):
        seen.update(step.expression.name for step in program(drawn[0]) if isinstance(step.expression, Node))

    look()
    assert seen == {name for name, operator in OPERATORS.items() if operator.__module__.startswith("tether.weights")}

"""Weights that each example or token chooses for itself: equal to one example after another, each with its choice."""

import keras
import numpy as np
import pytest
from keras import ops

import tether
from tests.support import assert_close, gradients, numpy
from tether.errors import ShapeMismatch, TetherError, UnboundArgument, Unsupported

pytestmark = pytest.mark.spread

layers = keras.layers
COUNT = 3


def drawn(rng, shape):
    return rng.normal(size=shape).astype("float32")


def options(rng, shape, form, count=COUNT):
    """A base, and expressions over it with values of their own."""
    base = tether.Weight(drawn(rng, shape), name="base")
    found = [form(base) for _ in range(count)]
    for expression in found:
        for weight in expression.weights_used():
            if weight is not base and weight.trainable:
                weight.assign(0.5 * drawn(rng, weight.shape))
    return base, found


def low(base):
    return base + tether.low_rank(2, alpha=3)


FORMS = {
    "low_rank": low,
    "frozen": lambda base: base.stop_gradient() + tether.low_rank(2),
    "full": lambda base: base + tether.Weight(base.shape, "zeros", name="own"),
    "scale": lambda base: base * tether.forms.scale(),
    "hadamard": lambda base: base + tether.forms.hadamard(2),
    "dora": tether.forms.dora(2),
    "whole": lambda base: tether.Weight(base.shape, "zeros", name="own"),
}


def by_each(layer, x, choice, **more):
    """What the layer computes for each example by itself, with the choice of a call."""
    found = [layer(x[i : i + 1], choice=int(c), **more) for i, c in enumerate(choice)]
    return np.concatenate([numpy(each) for each in found])


LAYERS = {
    "dense": (lambda: layers.Dense(5), "kernel", (4, 5), (6, 4)),
    "dense, tokens": (lambda: layers.Dense(5, activation="tanh"), "kernel", (4, 5), (6, 3, 4)),
    "einsum": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"),
        "kernel",
        (4, 2, 3),
        (6, 3, 4),
    ),
    "einsum, joined": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 5)), "kernel", (2, 3, 5), (6, 3, 2, 3)),
    "embedding": (lambda: layers.Embedding(7, 4), "embeddings", (7, 4), "ids"),
    "convolution": (lambda: layers.Conv1D(5, 2), "kernel", (2, 4, 5), (6, 7, 4)),
    "convolution, one channel": (lambda: layers.Conv2D(3, 2, strides=2), "kernel", (2, 2, 1, 3), (6, 5, 4, 1)),
    "convolution, 1x1": (lambda: layers.Conv2D(5, 1), "kernel", (1, 1, 4, 5), (6, 3, 3, 4)),
}  # fmt: skip


def make(rng, kind, form, count=COUNT, **more):
    build, name, shape, inputs = LAYERS[kind]
    base, found = options(rng, shape, FORMS[form], count)
    layer = tether.route(build(), {name: found}, **more)
    x = rng.integers(0, 7, (6, 3)) if inputs == "ids" else drawn(rng, inputs)
    return layer, base, found, x


CASES = [
    *(("dense", form) for form in FORMS),
    *((kind, "low_rank") for kind in LAYERS if kind != "dense"),
    ("embedding", "full"), ("embedding", "scale"), ("einsum", "dora"), ("convolution", "full"),
    ("convolution, one channel", "full"), ("convolution, one channel", "hadamard"),
    ("convolution", "scale"), ("einsum, joined", "frozen"), ("dense, tokens", "whole"), ("dense, tokens", "hadamard"),
]  # fmt: skip


@pytest.mark.parametrize("count", [COUNT, 11])
@pytest.mark.parametrize(("kind", "form"), CASES, ids=str)
def test_each_example_has_its_own(rng, kind, form, count):
    more = {} if form not in ("dora", "whole") else {"base": tether.Weight(drawn(rng, LAYERS[kind][2]), name="other")}
    layer, _, _, x = make(rng, kind, form, count, **more)
    choice = np.array([2, -1, 0, 2, 1, count - 1])
    assert_close(layer(x, choice=choice), by_each(layer, x, choice), 1e-4)


@pytest.mark.parametrize("kind", ["dense, tokens", "einsum", "embedding"])
def test_each_token_has_its_own(rng, kind):
    layer, _, _, x = make(rng, kind, "low_rank")
    choice = rng.integers(-1, COUNT, x.shape[:2])
    found = numpy(layer(x, choice=choice))
    for place in range(-1, COUNT):
        whole = numpy(layer(x, choice=place))
        assert_close(found[choice == place], whole[choice == place], 1e-4)


@pytest.mark.parametrize("count", [COUNT, 11])
@pytest.mark.parametrize("kind", ["dense", "einsum", "embedding", "convolution"])
def test_none_of_them_is_the_base_to_the_last_bit(rng, kind, count):
    layer, base, _, x = make(rng, kind, "low_rank", count)
    plain = tether.tie(LAYERS[kind][0](), {LAYERS[kind][1]: base})
    plain(x)
    nothing = numpy(layer(x, choice=np.full(6, -1)))
    assert_close(nothing, plain(x), 0 if kind == "embedding" else 1e-6)
    assert np.array_equal(nothing, numpy(layer(x, choice=-np.ones(6, "int64"))))
    for spoiled in layer.weights[1:]:
        if "lora" in spoiled.path:
            spoiled.assign(np.full(spoiled.shape, np.nan))
    assert np.array_equal(numpy(layer(x, choice=np.full(6, -1))), nothing)


@pytest.mark.parametrize("kind", ["dense", "dense, tokens", "convolution", "embedding"])
@pytest.mark.parametrize("form", ["low_rank", "full"])
def test_an_option_that_is_not_finite_spoils_nobody_else(rng, kind, form):
    layer, _, found, x = make(rng, kind, form)
    choice = np.array([0, 1, 2, -1, 0, 1])
    before = numpy(layer(x, choice=choice))
    found[1].weights_used()[-1].assign(np.full(found[1].weights_used()[-1].shape, np.nan))
    after = numpy(layer(x, choice=choice))
    assert np.isnan(after[choice == 1]).any(axis=tuple(range(1, after.ndim))).all()
    assert_close(after[choice != 1], before[choice != 1], 1e-5)


@pytest.mark.parametrize("count", [COUNT, 11])
@pytest.mark.parametrize("kind", ["dense", "dense, tokens", "einsum", "embedding", "convolution"])
def test_gradients_are_those_of_one_example_after_another(rng, kind, count):
    layer, _, _, x = make(rng, kind, "low_rank", count)
    choice = np.array([2, -1, 0, 2, 2, 0])  # nobody takes option 1
    layer(x)
    variables = layer.trainable_variables
    _, found = gradients(lambda: ops.sum(layer(x, choice=choice) ** 2), variables)
    looped = lambda: sum(ops.sum(layer(x[i : i + 1], choice=int(c)) ** 2) for i, c in enumerate(choice))  # noqa: E731
    _, wanted = gradients(looped, variables)
    for one, other, variable in zip(found, wanted, variables, strict=True):
        assert one is not None, variable.path
        assert_close(one, other, 1e-3)
        if count > 8 and "lora" in variable.path:
            assert not np.any(numpy(one)[1]) and np.any(numpy(one)[2])


def test_ids_that_were_never_seen_are_not_compiled_again(rng):
    layer, _, _, x = make(rng, "dense", "low_rank", 11)
    inputs, choice = keras.Input((4,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    model.compile("sgd", "mse")
    y = drawn(rng, (6, 5))
    traces = []
    call = type(layer).call

    def counted(self, *args, **kwargs):
        traces.append(1)
        return call(self, *args, **kwargs)

    ids = lambda: rng.integers(-1, 11, 6)  # noqa: E731
    model.train_on_batch([x, ids()], y)
    type(layer).call = counted
    try:
        for _ in range(5):
            model.train_on_batch([x, ids()], y)
    finally:
        type(layer).call = call
    assert len(traces) == (5 if keras.backend.backend() == "torch" else 0)


@pytest.mark.parametrize("jit", [False, True])
def test_fit_predict_and_evaluate_with_a_column_of_choices(rng, jit, tmp_path):
    layer, _, _, _ = make(rng, "dense", "low_rank", 11)
    x, ids = drawn(rng, (12, 4)), rng.integers(-1, 11, 12)
    y = by_each(layer, x, ids)
    inputs, choice = keras.Input((4,), name="x"), keras.Input((), dtype="int32", name="choice")
    model = keras.Model({"x": inputs, "choice": choice}, layer(inputs, choice=choice))
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit and keras.backend.backend() != "torch")
    given = {"x": x, "choice": ids}
    assert_close(model.predict(given, verbose=0, batch_size=5), y, 1e-4)
    assert model.evaluate(given, y, verbose=0) < 1e-6
    model.fit(given, y + 1, verbose=0, epochs=2)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again.predict(given, verbose=0), model.predict(given, verbose=0), 1e-5)


def test_a_number_beyond_the_options_is_the_base_in_a_graph(rng):
    layer, _, _, x = make(rng, "dense", "low_rank", 11)
    inputs, choice = keras.Input((4,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    ids = np.array([0, 99, 3, -7, 11, -1])
    wanted = by_each(layer, x, [0, -1, 3, -1, -1, -1])
    if keras.backend.backend() == "torch":
        with pytest.raises(TetherError, match="is one of"):
            layer(x, choice=ids)
        return
    assert_close(model.predict([x, ids], verbose=0), wanted, 1e-4)


def test_weights_of_a_mixture(rng):
    for kind in ("dense, tokens", "embedding", "convolution"):
        layer, base, found, x = make(rng, kind, "low_rank")
        weights = rng.random((6, COUNT)).astype("float32") / COUNT
        values = [each.numpy() for each in found]
        y = numpy(layer(x, choice=weights))
        plain = tether.tie(LAYERS[kind][0](), {LAYERS[kind][1]: tether.Weight(np.zeros(base.shape, "float32"))})
        plain(x)
        for i, row in enumerate(weights):
            mixed = sum(w * value for w, value in zip(row, values, strict=True)) + (1 - row.sum()) * base.numpy()
            plain.weights[0].assign(mixed)
            assert_close(y[i], numpy(plain(x[i : i + 1]))[0], 1e-4)


def test_weights_of_a_mixture_have_a_gradient(rng):
    layer, _, _, x = make(rng, "dense", "low_rank")
    layer(x)
    weights = keras.Variable(rng.random((6, COUNT)).astype("float32"))
    _, (found,) = gradients(lambda: ops.sum(layer(x, choice=ops.convert_to_tensor(weights)) ** 2), [weights])
    step = 1e-2
    for place in ((0, 1), (4, 2)):
        moved = [numpy(weights).copy() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        high, lower = (float(np.sum(numpy(layer(x, choice=each)) ** 2)) for each in moved)
        assert_close(numpy(found)[place], (high - lower) / (2 * step), 2e-2)


@pytest.mark.parametrize("count", [2, 11])
def test_ranks_may_differ(rng, count):
    base = tether.Weight(drawn(rng, (4, 5)), name="base")
    found = [base + tether.low_rank(1 + place % 3, alpha=2 + place % 2) for place in range(count)]
    for expression in found:
        for weight in expression.weights_used()[1:]:
            weight.assign(drawn(rng, weight.shape))
    values = [each.numpy() for each in found]
    layer = tether.route(layers.Dense(5, use_bias=False), kernel=found)
    x = drawn(rng, (count + 1, 4))
    layer(x)
    assert [weight.shape for weight in layer.weights] == [(4, 5), (count, 4, min(count, 3)), (count, min(count, 3), 5)]
    y = numpy(layer(x, choice=np.arange(-1, count)))
    for place, value in enumerate([base.numpy(), *values]):
        assert_close(y[place], x[place] @ value, 1e-4)
    for expression, value in zip(found, values, strict=True):
        assert_close(expression.numpy(), value, 1e-5)  # what is held elsewhere follows the stack


def test_a_bias_and_a_kernel_are_chosen_together(rng):
    _, kernels = options(rng, (4, 5), low)
    _, biases = options(rng, (5,), FORMS["full"])
    for only in ({"kernel": kernels, "bias": biases}, {"bias": biases}):
        layer = tether.route(layers.Dense(5), only)
        x = drawn(rng, (6, 3, 4))
        choice = np.array([0, 1, -1, 2, 2, 0])
        assert_close(layer(x, choice=choice), by_each(layer, x, choice), 1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LayerNormalization(), lambda: layers.RMSNormalization(), lambda: layers.GroupNormalization(2),
        lambda: layers.BatchNormalization(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["gamma", "beta", "both"])
def test_scales_and_shifts_of_normalizations(rng, make, which):
    layer = make()
    layer.build((None, 3, 4))
    names = {"gamma": ["gamma"], "beta": ["beta"], "both": ["gamma", "beta"]}[which]
    if isinstance(layer, layers.RMSNormalization):
        if which != "gamma":
            pytest.skip("it has no shift")
        names = ["scale"]
    chosen = {}
    for name in names:
        weight = tether.weight_of(layer, name)
        chosen[name] = [weight + tether.Weight(drawn(rng, (4,)), name=f"{name}{i}") for i in range(COUNT)]
    tether.route(layer, chosen)
    x, choice = drawn(rng, (6, 3, 4)), np.array([0, 1, -1, 2, 2, 0])
    assert_close(layer(x, choice=choice), by_each(layer, x, choice), 1e-4)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN])
@pytest.mark.parametrize("weights", [("kernel",), ("kernel", "recurrent_kernel", "bias")], ids=len)
def test_recurrent_layers(rng, kind, weights):
    layer = kind(3)
    layer.build((None, 5, 4))
    chosen = {}
    for name in weights:
        weight = tether.weight_of(layer, f"cell/{name}")
        make = FORMS["full"] if name == "bias" else low
        found = [make(weight) for _ in range(COUNT)]
        for expression in found:
            for own in expression.weights_used()[1:]:
                own.assign(0.3 * drawn(rng, own.shape))
        chosen[f"cell/{name}"] = found
    tether.route(layer, chosen)
    x, choice = drawn(rng, (6, 5, 4)), np.array([0, 1, -1, 2, 2, 0])
    assert_close(layer(x, choice=choice), by_each(layer, x, choice), 1e-4)


def test_attention_by_path_and_the_models_around_it(rng):
    attention = layers.MultiHeadAttention(2, 3)
    attention.build((None, 5, 4), (None, 5, 4))
    chosen = {}
    for path in ("query/kernel", "value/kernel", "attention_output/kernel"):
        weight = tether.weight_of(attention, path)
        found = [weight + tether.low_rank(2, split=None) for _ in range(COUNT)]
        for expression in found:
            for own in expression.weights_used()[1:]:
                own.assign(0.5 * drawn(rng, own.shape))
        chosen[path] = found
    tether.route(attention, chosen)
    x, choice = drawn(rng, (6, 5, 4)), np.array([0, 1, -1, 2, 2, 0])
    wanted = np.concatenate([numpy(attention(x[i : i + 1], x[i : i + 1], choice=int(c))) for i, c in enumerate(choice)])
    assert_close(attention(x, x, choice=choice), wanted, 1e-4)


def test_in_bfloat16(rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer, _, _, x = make(rng, "dense, tokens", "low_rank", 11)
    choice = np.array([0, 1, -1, 2, 2, 10])
    found = layer(x, choice=choice)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert_close(ops.cast(found, "float32"), by_each(layer, x, choice).astype("float32"), 5e-2)


# --------------------------------------------------------------------------- what is refused


def test_a_value_is_asked_for_with_one_choice(rng):
    layer, _, _, x = make(rng, "dense", "low_rank")
    layer(x)
    assert_close(layer.kernel, layer.kernel.expression.numpy())  # of the default
    choice = next(tether.layers.tying.state.arguments_in(layer.kernel.expression).__iter__())
    with tether.weights.bind({choice: np.array([0, 1])}), pytest.raises(UnboundArgument, match="choice=0"):
        layer.kernel.value  # noqa: B018


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        (np.zeros((5,), "int32"), ShapeMismatch, "leading axes"),
        (np.zeros((6, 3, 4), "int32"), Unsupported, "leading axes"),
        (np.zeros((6, 2), "float32"), ShapeMismatch, "3 options"),
        (np.zeros((6,), "bool"), TetherError, "whole numbers"),
    ],
    ids=str,
)
def test_a_choice_of_another_shape_is_refused(rng, choice, error, words):
    layer, _, _, x = make(rng, "dense, tokens", "low_rank")
    with pytest.raises(error, match=words):
        layer(x, choice=choice)


def test_a_layer_that_takes_one_choice_says_so(rng):
    layer = layers.PReLU()
    layer.build((None, 4))
    weight = tether.weight_of(layer, "alpha")
    tether.route(layer, alpha=[weight, weight * 2])
    x = drawn(rng, (3, 4))
    layer(x, choice=1)
    with pytest.raises(UnboundArgument, match="one choice"):
        layer(x, choice=np.array([0, 1, 1]))


def test_without_a_base_one_of_the_options_is_chosen(rng):
    layer, _, _, x = make(rng, "dense", "whole", 11)
    with pytest.raises(TetherError, match="is one of"):
        layer(x, choice=np.array([0, -1, 2, 3, 4, 5]))
    with pytest.raises(TetherError, match="is one of"):
        layer(x, choice="none")


# --------------------------------------------------------------------------- whole models


def two_branches(rng, kind="functional"):
    """A model of two inputs with routed layers at two depths, and the same choice for both."""
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="relu", name="inner_dense")], name="inner")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    first = layers.Dense(5, name="first")
    joined = layers.Concatenate()([inner(first(left)), inner(first(right))])
    outputs = layers.Dense(2, name="head")(joined)
    given = {"left": left, "right": right} if kind == "dict" else [left, right]
    model = keras.Model(given, outputs, name="model")
    ties = {}
    for path in ("first/kernel", "inner/inner_dense/kernel"):
        weight = tether.weight_of(model, path)
        found = [weight + tether.low_rank(2) for _ in range(COUNT)]
        for expression in found:
            for own in expression.weights_used()[1:]:
                own.assign(0.5 * drawn(rng, own.shape))
        ties[path] = found
    return model, ties


@pytest.mark.parametrize("where", ["model", "layers"])
@pytest.mark.parametrize("kind", ["functional", "dict"])
def test_a_model_with_the_choice_as_one_more_input(rng, kind, where, tmp_path):
    model, ties = two_branches(rng, kind)
    if where == "model":
        tether.route(model, ties)
    else:
        for path, found in ties.items():
            parent, _, name = path.rpartition("/")
            layer = model.get_layer("inner").get_layer("inner_dense") if "inner" in parent else model.get_layer(parent)
            tether.route(layer, {name: found})
    by_choice = tether.routed(model)
    left, right, ids = drawn(rng, (6, 4)), drawn(rng, (6, 4)), np.array([0, 1, -1, 2, 2, 0])
    given = {"left": left, "right": right, "choice": ids} if kind == "dict" else [left, right, ids]

    def alone(i):
        one = (
            {"left": left[i : i + 1], "right": right[i : i + 1]}
            if kind == "dict"
            else [left[i : i + 1], right[i : i + 1]]
        )
        with tether.weights.bind({tether.weights.Argument("choice", (), "int32"): int(ids[i])}):
            return numpy(model(one))

    wanted = np.concatenate([alone(i) for i in range(6)])
    assert_close(by_choice.predict(given, verbose=0), wanted, 1e-4)
    assert {v.path for v in by_choice.weights} == {v.path for v in model.weights}
    by_choice.compile(keras.optimizers.SGD(0.01), "mse")
    by_choice.fit(given, wanted, verbose=0)
    by_choice.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again.predict(given, verbose=0), by_choice.predict(given, verbose=0), 1e-5)
    assert len(again.weights) == len(model.weights)


def test_a_sequential_model_takes_a_column_of_choices(rng):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="d"), layers.Dense(2)])
    weight = tether.weight_of(model, "d/kernel")
    tether.route(model, {"d/kernel": [weight + tether.low_rank(1) for _ in range(COUNT)]})
    x, ids = drawn(rng, (6, 4)), np.array([0, 1, -1, 2, 2, 0])
    found = tether.routed(model).predict([x, ids], verbose=0)
    assert_close(found, by_each(model, x, ids), 1e-4)


def test_a_mixture_and_tokens_as_the_input_of_a_model(rng):
    inputs = keras.Input((3, 4))
    layer, _, _, _ = make(rng, "dense, tokens", "low_rank")
    model = keras.Model(inputs, layer(inputs))
    x, ids = drawn(rng, (6, 3, 4)), rng.integers(-1, COUNT, (6, 3))
    by_token = tether.routed(model, choice=keras.Input((3,), dtype="int32"))
    assert_close(by_token.predict([x, ids], verbose=0), layer(x, choice=ids), 1e-4)
    mixed = tether.routed(model, choice=keras.Input((COUNT,)))
    weights = rng.random((6, COUNT)).astype("float32")
    assert_close(mixed.predict([x, weights], verbose=0), layer(x, choice=weights), 1e-4)


def test_a_model_that_is_not_routed_is_refused(rng):
    model, ties = two_branches(rng)
    with pytest.raises(TetherError, match=r"tether\.route"):
        tether.routed(model)
    tether.route(model, ties, argument="task")
    with pytest.raises(TetherError, match="it has: task"):
        tether.routed(model)
    assert len(tether.routed(model, "task").inputs) == 3


@pytest.mark.parametrize("count", [COUNT, 11])
def test_a_tie_that_is_made_again_from_a_model_keeps_the_choice(rng, count):
    layer, _, _, x = make(rng, "dense", "low_rank", count)
    inputs, choice = keras.Input((4,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    ids = np.array([0, -1, 2, 1, 2, 0])
    wanted = numpy(model([x, ids]))
    tether.adapters.add(model, "more", {f"{layer.name}/kernel": tether.low_rank(2)})
    assert_close(model([x, ids]), wanted, 1e-5)
    tether.adapters.remove(model, "more")
    assert_close(model([x, ids]), wanted, 1e-5)
    assert_close(layer(x, choice=ids), wanted, 1e-5)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_close(clone([x, ids]), wanted, 1e-5)
    layer.quantize("int8")
    assert_close(layer(x, choice=ids), wanted, 0.2)
    assert not np.allclose(numpy(layer(x, choice=ids)), numpy(layer(x)))


def test_the_value_of_a_choice_is_taken_by_binding_it(rng):
    layer, _, found, x = make(rng, "dense", "low_rank", 11)
    layer(x)
    number = tether.weights.Argument("choice", (), "int32")
    with tether.weights.bind({number: 2}):
        assert_close(layer.kernel, found[2].numpy(), 1e-5)
        value = numpy(layer.kernel)
        tether.untie(layer)
    assert_close(layer.kernel, value, 1e-6)
    assert type(layer) is layers.Dense


@pytest.mark.parametrize("count", [COUNT, 11])
def test_one_choice_is_for_each_example_and_another_for_the_call(rng, count):
    _, found = options(rng, (4, 5), low, count)
    layer = tether.route(layers.Dense(5, use_bias=False), kernel=found, argument="first")
    layer.build((None, 4))
    whole = tether.weight_of(layer, "kernel")
    more = [whole + tether.low_rank(1) for _ in range(count)]
    for expression in more:
        for own in expression.weights_used()[-2:]:
            own.assign(drawn(rng, own.shape))
    tether.route(layer, kernel=more, argument="second")
    x = drawn(rng, (6, 4))
    ids = np.array([2, -1, 0, 2, 1, count - 1])
    for one in (0, 2, -1):
        wanted = [numpy(layer(x[i : i + 1], first=int(c), second=one)) for i, c in enumerate(ids)]
        assert_close(layer(x, first=ids, second=one), np.concatenate(wanted), 1e-4)
        wanted = [numpy(layer(x[i : i + 1], first=one, second=int(c))) for i, c in enumerate(ids)]
        assert_close(layer(x, first=one, second=ids), np.concatenate(wanted), 1e-4)
    with pytest.raises(Unsupported, match="One choice"):
        layer(x, first=ids, second=ids)


def test_options_of_several_forms_under_an_adapter(rng):
    base, french, german = (tether.Weight(drawn(rng, (4, 5)), name=name) for name in ("base", "french", "german"))
    chosen = {"plain": base, "french": base + french, "scaled": 2.0 * base + german}
    layer = tether.route(layers.Dense(5, name="d"), kernel=chosen, base=base)
    inputs, choice = keras.Input((4,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    values = [base.numpy(), base.numpy() + french.numpy(), 2.0 * base.numpy() + german.numpy()]
    tether.adapters.add(model, "more", {"d/kernel": tether.low_rank(2)})
    x, ids = drawn(rng, (6, 4)), np.array([0, 1, 2, -1, 1, 0])
    before = numpy(model([x, ids]))
    assert_close(before, by_each(layer, x, ids), 1e-4)
    weights = rng.random((6, 3)).astype("float32") / 3
    wanted = [
        row @ (sum(w * value for w, value in zip(each, values, strict=True)) + (1 - each.sum()) * base.numpy())
        for row, each in zip(x, weights, strict=True)
    ]
    assert_close(layer(x, choice=weights), np.stack(wanted), 1e-4)
    german.assign(np.full((4, 5), np.nan))
    after = numpy(model([x, ids]))
    assert np.isnan(after[2]).all()
    assert_close(np.delete(after, 2, 0), np.delete(before, 2, 0), 1e-5)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the others do not read in place")
@pytest.mark.parametrize("kind", ["dense", "dense, one token", "dense, tokens", "einsum, one token"])
@pytest.mark.parametrize("numbers", [[2, 10, 0, 2, 1, 5], [2, -1, 0, 2, 1, 5]], ids=["options", "with the base"])
def test_one_row_of_an_example_is_multiplied_with_what_is_stored(rng, kind, numbers, monkeypatch):
    import torch

    from tether import keras_seam

    kinds = {
        "dense": (layers.Dense(5), (4, 5), (6, 4)),
        "dense, one token": (layers.Dense(5), (4, 5), (6, 1, 4)),
        "dense, tokens": (layers.Dense(5), (4, 5), (6, 3, 4)),
        "einsum, one token": (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (4, 2, 3), (6, 1, 4)),
    }
    plain, shape, inputs = kinds[kind]
    _, found = options(rng, shape, lambda base: base + tether.low_rank(2), 11)
    layer, x = tether.route(plain, kernel=found), drawn(rng, inputs)
    products, whole = [], keras_seam.product_with_entries
    monkeypatch.setattr(keras_seam, "product_with_entries", lambda *given: products.append(1) or whole(*given))
    with tether.planning.force("factored"), torch.no_grad():
        y = layer(x, choice=np.array(numbers))
        assert bool(products) == (kind != "dense, tokens" and -1 not in numbers)
        assert_close(y, by_each(layer, x, numbers), 1e-4)
    count = len(products)
    with tether.planning.force("factored"):
        assert_close(layer(x, choice=np.array(numbers)), y, 1e-4)
    assert len(products) == count, "a gradient may be asked for"


@pytest.mark.parametrize("mode", ["auto", "factored", "materialize"])
@pytest.mark.parametrize("with_base", [False, True])
def test_a_mixture_of_options_that_are_too_much_for_one_sum(rng, mode, with_base):
    """Options that expand to many terms are one factor of a plan, which holds the base too."""
    base = tether.Weight(drawn(rng, (3, 4)), name="base")
    found = [tether.forms.gate()(base), tether.forms.gate()(base), base + tether.forms.kronecker()]
    layer = tether.route(layers.Dense(4, use_bias=False), kernel=found, base=base if with_base else None)
    layer.build((None, 3))
    for weight in layer.weights:
        weight.assign(drawn(rng, weight.shape))
    x, share = drawn(rng, (5, 3)), rng.dirichlet(np.ones(4), 5).astype("float32")
    mixture = share[:, :3] if with_base else share[:, :3] / share[:, :3].sum(axis=1, keepdims=True)
    right = sum(mixture[:, i : i + 1] * numpy(layer(x, choice=i)) for i in range(3))
    if with_base:
        right = right + share[:, 3:] * numpy(layer(x, choice=-1))
    with tether.planning.force(mode):
        assert_close(layer(x, choice=mixture), right)

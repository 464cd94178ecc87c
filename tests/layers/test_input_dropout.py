"""Dropout on the input of a part of a weight: what a layer computes with it, what is drawn, and who refuses it."""

import copy
from unittest import mock

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether import adapters
from tether.errors import InvalidConfig, TetherError, Unsupported
from tether.forms.dropout import InputDropout, SeedStart, pieces_of, rate_of
from tether.forms.low_rank import factors_of
from tether.weights.codec import decode, encode

pytestmark = pytest.mark.spread

layers = keras.layers
BACKEND = keras.backend.backend()
KINDS = {
    "dense": (lambda: layers.Dense(3, bias_initializer="uniform"), (2, 4)),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (5, 4)),
    "einsum, inputs of two axes": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 3)), (5, 2, 2)),
    "conv1d, causal": (lambda: layers.Conv1D(3, 2, padding="causal", bias_initializer="uniform"), (5, 4)),
    "conv2d, strides": (lambda: layers.Conv2D(3, 2, strides=2), (5, 5, 2)),
    "depthwise": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, bias_initializer="uniform"), (5, 5, 2)),
}
if BACKEND != "tensorflow":  # TensorFlow convolves channels_first on GPUs only
    KINDS["depthwise, channels first"] = (
        lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, data_format="channels_first"),
        (2, 5, 5),
    )
FORMS = {
    "low_rank": lambda: tether.low_rank(2, alpha=3, dropout=0.5),
    "pissa": lambda: tether.low_rank(2, start="pissa", dropout=0.5),
    "dora": lambda: tether.forms.dora(2, dropout=0.5),
    "vera": lambda: tether.forms.vera(3, dropout=0.5),
}


def every_other(x, rate, seed):
    """A dropout that can be said beforehand."""
    kept = np.arange(np.prod(x.shape)).reshape(x.shape) % 2
    return keras.ops.multiply(x, keras.ops.cast(kept / (1 - rate), x.dtype))


def known():
    return mock.patch("keras.random.dropout", every_other)


def moved(layer, rng):
    """Gives the parts of a layer values other than their start."""
    for weight in layer.weights:
        if "_lora_" in weight.path or "_vera_" in weight.path or "_magnitude" in weight.path:
            weight.assign(rng.normal(size=weight.shape))
    return layer


def tied(make, shape, rng, form=FORMS["low_rank"]):
    """A layer with a part on its frozen kernel, and a plain one of the same base."""
    layer = make()
    layer.build((None, *shape))
    plain = make()
    plain.build((None, *shape))
    plain.set_weights(layer.get_weights())
    tether.tie(layer, kernel=form()(tether.weight_of(layer, "kernel").stop_gradient()))
    return moved(layer, rng), plain


def bias_of(plain):
    return 0.0 if plain.bias is None else numpy(plain.bias.value)


# --------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("mode", ["auto", "factored", "materialize"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_input_of_the_part_is_dropped_and_that_of_the_base_is_whole(kind, form, mode, rng):
    make, shape = KINDS[kind]
    layer, plain = tied(make, shape, rng, FORMS[form])
    x = rng.normal(size=(2, *shape)).astype("float32")
    with known(), tether.planning.force(mode):
        found = numpy(layer(x, training=True))
    expected = numpy(plain(x))
    dropped = next(piece.expression for piece in pieces_of(layer.kernel.expression) if piece.dropout is not None)
    base = sum(p.expression.numpy() for p in pieces_of(layer.kernel.expression) if p.dropout is None)
    plain.kernel.assign(base)
    if plain.bias is not None:
        expected = numpy(plain(x))
        plain.bias.assign(np.zeros(plain.bias.shape))
    else:
        expected = numpy(plain(x))
    plain.kernel.assign(dropped.numpy())
    assert_close(found, expected + numpy(plain(numpy(every_other(x, 0.5, None)))), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_does_not_train_computes_with_the_kernel(kind, rng):
    make, shape = KINDS[kind]
    layer, plain = tied(make, shape, rng)
    x = rng.normal(size=(2, *shape)).astype("float32")
    plain.kernel.assign(numpy(layer.kernel.value))
    a, b = (weight.numpy() for weight in factors_of(layer.kernel.expression.operands[1])[1:])
    assert_close(numpy(layer.kernel.value), layer.kernel.expression.operands[0].numpy() + 1.5 * np.tensordot(a, b, 1))
    assert_close(layer(x), plain(x))
    assert_close(layer(x, training=False), plain(x))


def test_the_gradient_is_that_of_what_is_computed(rng):
    layer, plain = tied(*KINDS["dense"], rng)
    _, a, b, _ = layer.kernel.expression.weights_used()
    x = rng.normal(size=(2, 2, 4)).astype("float32")
    dropped = numpy(every_other(x, 0.5, None))

    def by_hand():
        low = keras.ops.matmul(keras.ops.matmul(dropped, a.value), b.value)
        return keras.ops.sum((plain(x) + 1.5 * low) ** 2)

    variables = [a.variable, b.variable]
    with known():
        loss, found = gradients(lambda: keras.ops.sum(layer(x, training=True) ** 2), variables)
    right, expected = gradients(by_hand, variables)
    assert loss == pytest.approx(right, rel=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-3)


def test_a_dropped_part_may_be_turned_scaled_cut_and_negated(rng):
    w = tether.Weight(rng.normal(size=(4, 6)).astype("float32"), name="w")
    whole = w.stop_gradient() + tether.low_rank(2, dropout=0.5)
    expressions = [
        whole.T,
        0.5 * whole,
        -whole,
        w - tether.low_rank(1, dropout=0.1)(w),
        whole / 2,
        (whole @ w.T),
        whole[:, :3],
    ]
    for expression in expressions:
        pieces = pieces_of(expression)
        assert sum(piece.dropout is not None for piece in pieces) == 1
        assert_close(sum(piece.expression.numpy() for piece in pieces), expression.numpy())
    two = whole + tether.low_rank(1, dropout=0.2)
    assert [piece.dropout and rate_of(piece.dropout) for piece in pieces_of(two)] == [None, 0.5, 0.2]


def test_half_precision_is_kept(rng):
    layer = layers.Dense(3, dtype="mixed_bfloat16")
    layer.build((None, 4))
    tether.tie(layer, kernel=tether.weight_of(layer, "kernel").stop_gradient() + tether.low_rank(2, dropout=0.5))
    y = layer(rng.normal(size=(2, 4)), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


# --------------------------------------------------------------------------- what is drawn


def make_model(seed=None, rate=0.5, units=(4, 3)):
    keras.utils.set_random_seed(7)
    x = keras.Input((6,))
    model = keras.Model(x, [layers.Dense(n, name=f"dense_{n}")(x) for n in units])
    model.trainable = False
    return adapters.add(model, "a", {"*/kernel": tether.low_rank(2, alpha=4, seed=seed, dropout=rate)})


def states(model):
    return {v.path: np.asarray(numpy(v.value)).tolist() for v in model.variables if "_dropout" in v.path}


def test_every_call_and_every_part_draws_others(rng):
    model = make_model(seed=3, units=(4,))
    second = adapters.add(model, "b", {"*/kernel": tether.low_rank(2, seed=3, dropout=0.5)})
    assert len({tuple(state) for state in states(second).values()}) == 2
    moved(model, rng)
    x = rng.normal(size=(8, 6)).astype("float32")
    given = []

    def noted(x, rate, seed):
        given.append(numpy(dropout(x, rate, seed=seed)))
        return keras.ops.convert_to_tensor(given[-1])

    dropout = keras.random.dropout
    with mock.patch("keras.random.dropout", noted):
        model(x, training=True)
        model(x, training=True)
    assert len(given) == 4
    for one in range(4):
        assert 0.1 < np.mean(given[one] == 0) < 0.9
        np.testing.assert_allclose(given[one][given[one] != 0], 2 * x[given[one] != 0], rtol=1e-6)
        for other in range(one):
            assert not np.array_equal(given[one], given[other])


def test_training_goes_on_after_a_file_as_if_there_had_been_none(rng, tmp_path):
    x = rng.normal(size=(8, 6)).astype("float32")
    y = [np.zeros((8, 4), "float32"), np.zeros((8, 3), "float32")]

    def fit(model, epochs):
        model.fit(x, y, epochs=epochs, shuffle=False, verbose=0)

    straight, broken = make_model(seed=3), make_model(seed=3)
    for model in (straight, broken):
        moved(model, np.random.default_rng(2))
        model.compile(keras.optimizers.SGD(0.05), "mse")
    fit(straight, 4)
    fit(broken, 2)
    assert states(straight) != states(broken) != states(make_model(seed=3))
    broken.save(tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    assert list(states(again).values()) == list(states(broken).values())
    fit(again, 2)
    for one, other in zip(straight.variables, again.variables, strict=True):
        assert_close(one.value, other.value, 1e-4)


def test_a_clone_draws_for_itself_and_a_seeded_one_alike():
    free, seeded = make_model(), make_model(seed=3)
    assert list(states(keras.models.clone_model(free)).values()) != list(states(free).values())
    assert list(states(keras.models.clone_model(seeded)).values()) == list(states(seeded).values())
    twin = copy.deepcopy(free)
    assert list(states(twin).values()) == list(states(free).values())
    assert not {id(v) for v in twin.variables} & {id(v) for v in free.variables}


def test_a_stateless_call_hands_the_state_on(rng):
    model = make_model(seed=3)
    moved(model, rng)
    x = rng.normal(size=(8, 6)).astype("float32")
    before = states(model)
    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    first, after = model.stateless_call(*values, x, training=True)
    assert states(model) == before
    again, _ = model.stateless_call(*values, x, training=True)
    later, _ = model.stateless_call(values[0], after, x, training=True)
    assert_close(first[0], again[0])
    assert not np.allclose(numpy(first[0]), numpy(later[0]))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_fit_learns_with_it(compiled, rng):
    model = make_model(rate=0.2)
    x = rng.normal(size=(32, 6)).astype("float32")
    right = x @ rng.normal(size=(6, 4)).astype("float32"), x @ rng.normal(size=(6, 3)).astype("float32")
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=compiled)
    losses = model.fit(x, list(right), epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    if BACKEND != "torch":  # which draws from its own generator where nobody gave a seed
        assert all(state[1] == 20 for state in states(model).values())


# --------------------------------------------------------------------------- adapters


def test_strengths_weigh_what_was_dropped_and_what_is_off_draws_nothing(rng):
    model = make_model(units=(4,))
    adapters.add(model, "b", {"*/kernel": tether.low_rank(1)})
    adapters.add(model, "c", {"*/kernel": tether.low_rank(1, dropout=0.25)})
    moved(model, rng)
    x = rng.normal(size=(4, 6)).astype("float32")
    adapters.activate(model)
    assert_close(model(x, training=True), model(x), 1e-6)
    parts = {}
    for name in "abc":
        adapters.activate(model, name)
        with known():
            parts[name] = numpy(model(x, training=True))
    adapters.activate(model)
    base = numpy(model(x))
    adapters.set_strengths(model, {"a": 0.5, "b": -1.0, "c": 2.0})
    with known():
        both = numpy(model(x, training=True))
    expected = base + sum(s * (parts[name] - base) for name, s in {"a": 0.5, "b": -1.0, "c": 2.0}.items())
    assert_close(both, expected, 1e-4)


def test_a_diverged_part_that_is_off_adds_nothing_in_training(rng):
    model = make_model(units=(4,))
    x = rng.normal(size=(4, 6)).astype("float32")
    right = numpy(model(x))
    for weight in adapters.manage.own_weights(model)["a"]:
        weight.assign(np.full(weight.shape, np.nan, "float32"))
    adapters.activate(model)
    for mode in ("auto", "factored", "materialize"):
        with tether.planning.force(mode):
            assert_close(model(x, training=True), right, 1e-6)


def test_nine_adapters_all_drop(rng):
    model = make_model(units=(4,))
    for number in range(8):
        adapters.add(model, f"more {number}", {"*/kernel": tether.low_rank(1, dropout=0.5)})
    moved(model, rng)
    x = rng.normal(size=(4, 6)).astype("float32")
    with mock.patch("keras.random.dropout", side_effect=every_other) as dropout:
        model(x, training=True)
    assert dropout.call_count == 9


def test_an_adapter_with_dropout_is_saved_combined_merged_and_written_for_peft(rng, tmp_path):
    model = make_model(units=(4,))
    adapters.add(model, "b", {"*/kernel": tether.low_rank(2, dropout=0.5)})
    moved(model, rng)
    x = rng.normal(size=(4, 6)).astype("float32")
    lost = adapters.combine(model, {"a": 0.5, "b": 2.0}, into="both", method="cat")
    assert set(lost.values()) == {0.0}
    adapters.activate(model, "a")
    right = numpy(model(x))
    adapters.save(model, "a", tmp_path / "a.safetensors")
    tether.files.save_peft(model, tmp_path / "folder", adapter="a")
    adapters.merge(model)
    assert_close(model(x, training=True), right)
    fresh = make_model(units=(4,))
    fresh.set_weights([*fresh.get_weights()])
    adapters.remove(fresh, "a")
    for source in (tmp_path / "a.safetensors", tmp_path / "folder"):
        adapters.load(fresh, source, name="again")
        assert_close(fresh(x), right, 1e-4)
        expression = fresh.layers[1].kernel.expression
        assert [rate_of(part) for _, part in expression.parts.values()] == [0.5]
        with known():
            assert not np.allclose(numpy(fresh(x, training=True)), right)
        adapters.remove(fresh, "again")


# --------------------------------------------------------------------------- what is refused


class OwnCall(layers.Dense):
    """A layer that computes something else with its kernel."""

    def call(self, inputs, training=None):
        return keras.ops.tanh(keras.ops.matmul(inputs, self.kernel))


REFUSED = {
    "embedding": (lambda: layers.Embedding(5, 4), (3,), "embeddings"),
    "lstm": (lambda: layers.LSTM(3), (5, 4), "cell/kernel"),
    "groups": (lambda: layers.Conv2D(4, 2, groups=2), (5, 5, 4), "kernel"),
    "transposed": (lambda: layers.Conv1DTranspose(4, 2), (5, 4), "kernel"),
    "own call": (lambda: OwnCall(3), (4,), "kernel"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_drop_refuses_by_name_and_stays_as_it_was(kind):
    make, shape, path = REFUSED[kind]
    layer = make()
    layer.build((None, *shape))
    before = type(layer), [id(v) for v in layer.variables]
    shape = next(v.shape for v in layer.variables if v.path.endswith(path.rpartition("/")[2]))
    base = tether.Weight(tuple(shape), name="base")
    with pytest.raises(Unsupported, match=path.rpartition("/")[2]):
        tether.tie(layer, {path: base + tether.low_rank(2, dropout=0.1)})
    assert (type(layer), [id(v) for v in layer.variables]) == before


@pytest.mark.parametrize("kind", ["embedding", "own call"])
def test_a_layer_that_is_not_built_refuses_it_too(kind):
    make, _, path = REFUSED[kind]
    base = tether.Weight((5, 4) if kind == "embedding" else (4, 3), name="base")
    with pytest.raises(Unsupported, match="dropout"):
        tether.tie(make(), {path: base + tether.low_rank(2, dropout=0.1)})


def test_what_is_no_sum_refuses_it():
    w = tether.Weight((4, 3), name="w")
    whole = w + tether.low_rank(2, dropout=0.1)
    for expression in (tether.ops.exp(whole), whole * whole, w / (whole * 1.0), tether.forms.weight_norm()(whole)):
        layer = layers.Dense(3)
        layer.build((None, 4))
        with pytest.raises(Unsupported, match="sum"):
            tether.tie(layer, kernel=expression)


@pytest.mark.parametrize("rate", [1.0, -0.1, "a half", None, True, float("nan")])
def test_a_rate_is_a_share(rate):
    for form in (tether.low_rank, tether.forms.dora, tether.forms.vera):
        with pytest.raises(TetherError, match="dropout"):
            form(2, dropout=rate)


def test_a_file_of_a_stranger_is_checked():
    w = tether.Weight((4, 3), name="w")
    expression = w + tether.low_rank(2, dropout=0.25, seed=1)
    weights = {weight.uid: weight for weight in expression.weights_used()}
    steps = encode(expression)
    assert decode(steps, weights) == expression
    place = next(n for n, step in enumerate(steps) if step.get("op") == "input_dropout")
    for change in ({"rate": 1.5}, {"rate": "x"}, {"seeded": 1}, {"of": [steps[place]["of"][0], 0]}, {"more": 1}):
        with pytest.raises(InvalidConfig):
            decode([*steps[:place], {**steps[place], **change}, *steps[place + 1 :]], weights)


def test_nothing_is_made_without_a_rate():
    w = tether.Weight((4, 3), name="w")
    assert len((w + tether.low_rank(2, dropout=0)).weights_used()) == 3
    state = next(s for s in (w + tether.low_rank(2, dropout=0.5)).weights_used() if s.role == "state")
    assert isinstance(state.initializer, SeedStart) and not state.trainable
    assert isinstance((w + tether.low_rank(2, dropout=0.5)).operands[1], InputDropout)

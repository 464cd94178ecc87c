"""Several adapters on one model: switched, frozen, combined, merged in part, and found by names in other models."""

import re

import keras
import numpy as np
import pytest

import tether
from tests.kinds import KINDS, for_each
from tests.support import numpy
from tether import adapters
from tether.errors import TetherError, UnknownName

pytestmark = pytest.mark.spread

layers = keras.layers
MATRICES = ("dense", "einsum_dense", "embedding", "conv1d", "conv2d", "depthwise", "lstm", "gru", "attention", "block")
FORMS = {
    "low_rank": lambda: tether.low_rank(2, alpha=3),
    "olora": lambda: tether.low_rank(2, start="olora"),
    "dora": lambda: tether.forms.dora(2),
    "vera": lambda: tether.forms.vera(3),
    "hadamard": lambda: tether.forms.hadamard(2),
    "kronecker": lambda: tether.forms.kronecker(),
    "scale": lambda: tether.forms.scale(),
    "full": lambda: tether.forms.full(),
    "rows": lambda: tether.forms.rows([1, 0]),
    "oft": lambda: tether.forms.oft(2),
    "boft": lambda: tether.forms.boft(2),
    "fourier": lambda: tether.forms.fourier(3, scale=2),
}


def make_model(kind=KINDS["dense"], frozen=True):
    keras.utils.set_random_seed(5)
    layer = kind.make()
    x = kind.symbol()
    model = keras.Model(x, layer(x, x) if isinstance(layer, layers.MultiHeadAttention) else layer(x))
    model.trainable = not frozen
    return model


def pattern(kind):
    return f"*{kind.path}"


def move(model, name, value=None, seed=3):
    """Gives an adapter's weights other values."""
    rng = np.random.default_rng(seed)
    for weight in adapters.manage.own_weights(model)[name]:
        new = 0.3 * rng.normal(size=weight.shape) if value is None else np.full(weight.shape, value)
        weight.assign(new.astype("float32"))


def predict(model, x):
    return np.asarray(model.predict(x, verbose=0))


# --------------------------------------------------------------------------- off is off


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1.0])
@for_each(*MATRICES)
def test_what_is_off_adds_nothing_whatever_it_holds(kind, bad, rng):
    model, x = make_model(kind), kind.inputs(rng)
    right = predict(model, x)
    adapters.add(model, "a", {pattern(kind): tether.low_rank(1)})
    adapters.add(model, "b", {pattern(kind): tether.low_rank(1)})
    move(model, "a", bad)
    adapters.activate(model)
    for mode in ("auto", "factored", "materialize"):
        with tether.planning.force(mode):
            np.testing.assert_allclose(numpy(model(x)), right, rtol=1e-6, atol=1e-6)
    assert np.array_equal(predict(model, x), right)
    move(model, "b")
    adapters.activate(model, "b")
    assert np.isfinite(predict(model, x)).all() and not np.allclose(predict(model, x), right)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_switched_off_and_on(form, rng):
    kind = KINDS["dense"]
    model, x = make_model(kind), kind.inputs(rng)
    right = predict(model, x)
    adapters.add(model, "a", {pattern(kind): FORMS[form]()})
    move(model, "a")
    on = predict(model, x)
    assert not np.allclose(on, right)
    with adapters.disabled(model):
        assert np.array_equal(predict(model, x), right)
    assert np.array_equal(predict(model, x), on)
    move(model, "a", np.nan)
    with adapters.disabled(model):
        assert np.array_equal(predict(model, x), right)
    adapters.remove(model, "a")
    assert np.array_equal(predict(model, x), right)


# --------------------------------------------------------------------------- one of several trains


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.05),
    "adamw": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1),
    "ema": lambda: keras.optimizers.Adam(0.05, use_ema=True, ema_overwrite_frequency=2),
}


@pytest.mark.parametrize("form", ["low_rank", "olora", "vera", "dora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_off_stays_to_the_last_bit_while_another_trains(optimizer, form, rng):
    kind = KINDS["dense"]
    model, x = make_model(kind), kind.inputs(rng, 8)
    y = predict(model, x) + 1
    for name in ("first", "second"):
        adapters.add(model, name, {pattern(kind): FORMS[form]()})
        move(model, name, seed=len(name))
    for on, off in (("first", "second"), ("second", "first")):
        adapters.activate(model, on)
        model.compile(OPTIMIZERS[optimizer](), "mse")
        own = {name: [w.numpy() for w in weights] for name, weights in adapters.manage.own_weights(model).items()}
        model.fit(x, y, epochs=4, batch_size=4, verbose=0)
        now = {name: [w.numpy() for w in weights] for name, weights in adapters.manage.own_weights(model).items()}
        assert all(np.array_equal(a, b) for a, b in zip(own[off], now[off], strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(own[on], now[on], strict=True))


def test_switching_what_trains_asks_for_compile_and_computing_does_not(rng):
    kind = KINDS["dense"]
    model, x = make_model(kind), kind.inputs(rng, 4)
    for name in ("first", "second"):
        adapters.add(model, name, {pattern(kind): tether.low_rank(1)})
    adapters.activate(model, "first")
    model.compile("adam", "mse")
    y = predict(model, x)
    model.fit(x, y, verbose=0)
    function = model.predict_function
    adapters.activate(model, "second")
    predict(model, x)
    assert model.predict_function is function
    with pytest.raises(TetherError, match="Compile the model again"):
        model.fit(x, y, verbose=0)


def test_what_a_form_has_fixed_is_never_trained(rng):
    kind = KINDS["dense"]
    for form in ("olora", "vera"):
        model = make_model(kind)
        adapters.add(model, "a", {pattern(kind): FORMS[form]()})
        count = len(model.trainable_variables)
        adapters.activate(model)
        assert not model.trainable_variables
        adapters.activate(model, "a")
        assert len(model.trainable_variables) == count == len(adapters.manage.own_weights(model)["a"])


def test_activate_for_inference_alone_trains_nothing():
    kind = KINDS["dense"]
    model = make_model(kind)
    adapters.add(model, "a", {pattern(kind): tether.low_rank(1)})
    adapters.add(model, "b", {pattern(kind): tether.low_rank(1)}, trainable=False)
    assert len(model.trainable_variables) == 2
    adapters.activate(model, "a", "b", trainable=False)
    assert not model.trainable_variables and adapters.strengths(model) == {"a": 1.0, "b": 1.0}
    adapters.trainable(model, "b")
    assert len(model.trainable_variables) == 2
    with pytest.raises(UnknownName, match="It has: a, b"):
        adapters.trainable(model, "c")


@pytest.mark.parametrize("freeze", ["adapted", "all", None])
def test_what_stops_to_train(freeze):
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2, name="two")(layers.Dense(3, name="one")(x)))
    before = {variable.path for variable in model.trainable_variables}
    adapters.add(model, "a", {"one/kernel": tether.low_rank(1)}, freeze=freeze)
    now = {variable.path for variable in model.trainable_variables}
    parts = {path for path in now if "lora" in path}
    assert len(parts) == 2
    gone = {path.rpartition("/")[0].rpartition("/")[2] + "/" + path.rpartition("/")[2] for path in before - now}
    assert (
        gone
        == {"adapted": {"one/kernel"}, "all": {"one/kernel", "one/bias", "two/kernel", "two/bias"}, None: set()}[freeze]
    )
    with pytest.raises(TetherError, match="'adapted', 'all' or None"):
        adapters.add(model, "b", {"one/kernel": tether.low_rank(1)}, freeze="everything")
    assert adapters.names(model) == ["a"]


def test_a_second_adapter_leaves_the_first_training_under_freeze_all():
    model = make_model(frozen=False)
    for name in ("a", "b"):
        adapters.add(model, name, {"*kernel": tether.low_rank(1)}, freeze="all")
    assert len(model.trainable_variables) == 4


def test_also_trains_weights_whole_and_saves_them(rng, tmp_path):
    x = keras.Input((4,))

    def fresh():
        keras.utils.set_random_seed(2)
        model = keras.Model(x, layers.Dense(2, name="head")(layers.Dense(3, name="body")(x)))
        model.trainable = False
        return model

    model, data = fresh(), rng.normal(size=(8, 4)).astype("float32")
    adapters.add(model, "a", {"body/kernel": tether.low_rank(1)}, also=["head/*", "!head/bias"])
    assert {w.name for w in model.trainable_weights} == {"kernel_lora_a", "kernel_lora_b", "kernel_full"}
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(data, np.ones((8, 2)), epochs=3, verbose=0)
    right = predict(model, data)
    adapters.save(model, "a", tmp_path / "a.safetensors")
    other = fresh()
    adapters.load(other, tmp_path / "a.safetensors")
    np.testing.assert_allclose(predict(other, data), right, atol=1e-6)
    adapters.activate(other)
    np.testing.assert_array_equal(predict(other, data), predict(fresh(), data))


# --------------------------------------------------------------------------- patterns


def weights_with(model):
    return sorted(model for model in adapters.manage.adapted_weights(model))


def two_branches():
    x = keras.Input((4,))
    left = layers.Dense(4, name="left")(x)
    right = layers.Dense(4, name="right")(x)
    return keras.Model(x, layers.Dense(2, name="head")(layers.Concatenate()([left, right])))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"*/kernel": 1}, {"left", "right", "head"}),
        ({"all-linear": 1}, {"left", "right", "head"}),
        ({("all-linear", "!head/*"): 1}, {"left", "right"}),
        ({"*/kernel": 1, "!head/*": None}, {"left", "right"}),
        ({("*/kernel", "!*ght/*"): 1}, {"left", "head"}),
        ({re.compile(r"(left|head)/kernel"): 1}, {"left", "head"}),
        ({("!right/*", "!*/bias"): 1}, {"left", "head"}),
        ({"left/kernel": 1, "*/kernel": 2}, {"left", "right", "head"}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_patterns_choose_weights(changes, chosen):
    model = two_branches()
    given = {key: None if rank is None else tether.low_rank(rank) for key, rank in changes.items()}
    adapters.add(model, "a", given)
    found = {layer.name for layer in model.layers if len(layer.weights) > 2}
    assert found == chosen
    ranks = {w.shape[-1] for w in adapters.manage.own_weights(model)["a"] if w.name.endswith("lora_a")}
    assert ranks == {max(rank for rank in changes.values() if rank is not None)}  # the later pattern wins


def test_a_pattern_that_misses_says_what_is_near():
    with pytest.raises(UnknownName, match=r"Did you mean 'left/kernel'.*6 weights"):
        adapters.add(two_branches(), "a", {"*lefd/kernel": tether.low_rank(1)})
    with pytest.raises(UnknownName, match=r"'\(lost\)/kernel'"):
        adapters.add(two_branches(), "a", {re.compile("(lost)/kernel"): tether.low_rank(1)})
    with pytest.raises(TetherError, match=r"re\.compile"):
        adapters.add(two_branches(), "a", {3: tether.low_rank(1)})


# --------------------------------------------------------------------------- combining


def three(rng, forms=("low_rank", "low_rank", "low_rank"), kind=KINDS["dense"]):
    model = make_model(kind)
    for name, form in zip(("a", "b", "c"), forms, strict=True):
        adapters.add(model, name, {pattern(kind): FORMS[form]()})
        move(model, name, seed=ord(name))
    return model, kind.inputs(rng)


def value_of(model, kind, **strengths):
    adapters.activate(model)
    adapters.set_strengths(model, strengths)
    return tether.weight_of(model.layers[-1], kind.path).numpy()


@pytest.mark.parametrize("method", ["linear", "cat"])
@for_each("dense", "einsum_dense", "conv2d", "embedding", "attention")
def test_an_exact_combination_computes_the_weighted_sum(kind, method, rng):
    model, _ = three(rng, kind=kind)
    weights = {"a": 0.7, "c": -0.3}
    right = value_of(model, kind, **weights)
    assert set(adapters.combine(model, weights, into="both", method=method).values()) == {0.0}
    np.testing.assert_allclose(value_of(model, kind, both=1.0), right, atol=1e-6)
    assert adapters.names(model) == ["a", "b", "c", "both"]
    adapters.remove(model, "a")
    np.testing.assert_allclose(value_of(model, kind, both=1.0), right, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_combined_with_a_low_rank_part(form, rng):
    kind = KINDS["dense"]
    model, _ = three(rng, ("low_rank", form, form))
    right = value_of(model, kind, a=0.5, b=2.0, c=-1.0)
    adapters.combine(model, {"a": 0.5, "b": 2.0, "c": -1.0}, into="all")
    np.testing.assert_allclose(value_of(model, kind, all=1.0), right, atol=2e-6)


def test_a_cut_combination_reports_what_it_lost(rng):
    kind = KINDS["dense"]
    model, _ = three(rng)
    base = value_of(model, kind)
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    target = value_of(model, kind, **weights) - base
    s = np.linalg.svd(target.astype("float64"), compute_uv=False)
    lost = adapters.combine(model, weights, into="two", method="svd", rank=2)
    (error,) = lost.values()
    assert error == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), abs=1e-4)
    found = value_of(model, kind, two=1.0) - base
    assert np.linalg.matrix_rank(found, tol=1e-4) == 2
    assert np.linalg.norm(found - target) == pytest.approx(np.linalg.norm(s[2:]), rel=1e-2)


def test_ties_keeps_the_largest_and_the_sign_that_prevails(rng):
    model = make_model()
    deltas = [np.array([[4, -1, 3], [0.1, 2, 0.2]]), np.array([[-2, -3, 0.3], [0.2, 5, 0.1]])]
    for name, delta in zip("ab", deltas, strict=True):
        adapters.add(model, name, {"*kernel": tether.forms.full()})
        (weight,) = adapters.manage.own_weights(model)[name]
        base = weight.numpy()
        base[:2] += delta.astype("float32")
        weight.assign(base)
    before = value_of(model, KINDS["dense"])
    adapters.combine(model, {"a": 1.0, "b": 1.0}, into="c", method="ties", density=0.25)
    found = value_of(model, KINDS["dense"], c=1.0) - before
    # Of 12 entries each keeps 3: 4, 3, 2 and 5, -3, -2. At [0, 0] 4 and -2 meet, and 4 prevails.
    np.testing.assert_allclose(found[:2], [[4, -3, 3], [0, 3.5, 0]], atol=1e-5)


def test_dare_drops_and_scales_up(rng):
    kind = KINDS["dense"]
    model, _ = three(rng)
    base = value_of(model, kind)
    whole = value_of(model, kind, a=1.0) - base
    adapters.combine(model, {"a": 1.0}, into="d", method="dare", density=0.5, seed=1)
    found = value_of(model, kind, d=1.0) - base
    kept = np.abs(found) > 1e-6
    assert 0 < kept.sum() < found.size
    np.testing.assert_allclose(found[kept], 2 * whole[kept], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, "x"), "numbers by name"),
        (({"a": 1.0, "z": 1.0}, "x"), "no adapter 'z'"),
        (({"a": np.nan}, "x"), "finite"),
        (({"a": 1.0}, "a"), "name of its own"),
    ],
)
def test_a_combination_that_makes_no_sense_changes_nothing(arguments, words, rng):
    model, x = three(rng)
    before = predict(model, x)
    with pytest.raises(TetherError, match=words):
        adapters.combine(model, arguments[0], into=arguments[1])
    for options, said in (
        ({"method": "mean"}, "one of"),
        ({"method": "svd"}, "rank="),
        ({"rank": 0}, "1 or more"),
        ({"method": "ties", "density": 0}, "share"),
    ):
        with pytest.raises(TetherError, match=said):
            adapters.combine(model, {"a": 1.0}, into="y", **options)
    assert adapters.names(model) == ["a", "b", "c"] and np.array_equal(predict(model, x), before)


def test_cat_is_for_low_rank_parts(rng):
    model, _ = three(rng, ("low_rank", "dora", "low_rank"))
    with pytest.raises(TetherError, match="'b' adds"):
        adapters.combine(model, {"a": 1.0, "b": 1.0}, into="x", method="cat")


# --------------------------------------------------------------------------- merging some


def test_some_are_merged_and_the_others_can_still_be_switched(rng):
    model, x = three(rng)
    adapters.set_strengths(model, {"a": 0.5, "b": 1.0, "c": 2.0})
    right = predict(model, x)
    for _ in range(2):
        adapters.merge(model, ["a", "c"])
        np.testing.assert_allclose(predict(model, x), right, atol=1e-6)
        adapters.set_strengths(model, {"b": 0.0})
        without = predict(model, x)
        assert not np.allclose(without, right)
        with pytest.raises(TetherError, match="is merged"):
            adapters.set_strengths(model, {"a": 0.0})
        adapters.set_strengths(model, {"b": 1.0})
        adapters.unmerge(model)
        assert np.array_equal(predict(model, x), right)
        assert adapters.strengths(model) == {"a": 0.5, "b": 1.0, "c": 2.0}
    with pytest.raises(UnknownName):
        adapters.merge(model, ["z"])


# --------------------------------------------------------------------------- names and files


def test_names_come_in_the_order_of_adding_also_after_a_file(rng, tmp_path):
    model = two_branches()
    order = ["z", "a", "m"]
    for name, where in zip(order, ("right/*", "left/kernel", "*/kernel"), strict=True):
        adapters.add(model, name, {where: tether.forms.full()})
    assert adapters.names(model) == list(adapters.strengths(model)) == order
    for save, load in (
        (lambda path: model.save(path), keras.saving.load_model),
        (lambda path: tether.files.save_model(model, path), tether.files.load_model),
    ):
        save(tmp_path / "m.keras")
        again = load(tmp_path / "m.keras")
        assert adapters.names(again) == order
        adapters.add(again, "b", {"left/bias": tether.forms.full()})
        assert adapters.names(again) == [*order, "b"]
    adapters.remove(model, "a")
    adapters.add(model, "a", {"left/kernel": tether.forms.full()})
    assert adapters.names(model) == ["z", "m", "a"]


def backbone(order=("query", "value")):
    keras.utils.set_random_seed(4)
    x = keras.Input((4,))
    made = {name: layers.Dense(4, activation="tanh", name=name) for name in ("query", "value")}
    for name in ("query", "value"):
        made[name].build((None, 4))
    parts = [made[name](x) for name in order]
    return keras.Model(
        x, layers.Add(name="sum")([parts[order.index("query")], parts[order.index("value")]]), name="body"
    )


def around(body, extra=0):
    x = keras.Input((4,))
    h = x
    for n in range(extra):
        h = layers.Dropout(0.1, name=f"drop_{n}")(h)
    return keras.Model(x, layers.Dense(3, name="logits")(body(h)))


@pytest.mark.parametrize("where", ["alone", "another head", "other order", "deeper"])
@pytest.mark.parametrize("trained_in", ["classifier", "alone"])
def test_an_adapter_goes_by_the_names_of_layers(trained_in, where, rng, tmp_path):
    x = rng.normal(size=(5, 4)).astype("float32")
    body = backbone()
    model = around(body) if trained_in == "classifier" else body
    adapters.add(model, "a", {"*query/kernel": tether.low_rank(1), "*value/kernel": tether.low_rank(2)})
    move(model, "a")
    right = predict(body, x)
    adapters.save(model, "a", tmp_path / "a.safetensors")
    other = backbone(("value", "query") if where == "other order" else ("query", "value"))
    target = {"alone": lambda: other, "another head": lambda: around(other, 2), "other order": lambda: other}.get(
        where, lambda: keras.Sequential([keras.Input((4,)), around(other)])
    )()
    adapters.load(target, tmp_path / "a.safetensors")
    np.testing.assert_allclose(predict(other, x), right, atol=1e-6)


def test_two_places_for_one_adapter_are_an_error_that_says_so(tmp_path):
    body = backbone()
    adapters.add(body, "a", {"query/kernel": tether.low_rank(1)})
    adapters.save(body, "a", tmp_path / "a.safetensors")
    x = keras.Input((4,))
    first, second = backbone(), backbone()
    first.name, second.name = "first", "second"
    model = keras.Model(x, layers.Add()([first(x), second(x)]))
    with pytest.raises(UnknownName, match="several places"):
        adapters.load(model, tmp_path / "a.safetensors")
    adapters.load(model.get_layer("second"), tmp_path / "a.safetensors")
    with pytest.raises(UnknownName, match=r"lacks 1 of the 1 weights.*'query/kernel'"):
        adapters.load(two_branches(), tmp_path / "a.safetensors")


def test_keys_of_the_file_can_be_read(tmp_path):
    from safetensors import safe_open

    model = around(backbone())
    adapters.add(model, "a", {"*query/kernel": tether.low_rank(1)})
    adapters.save(model, "a", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert sorted(file.keys()) == ["query/kernel_lora_a", "query/kernel_lora_b"]


# --------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "form", ["low_rank", "dora", "vera", "hadamard", "kronecker", "scale", "full", "rows", "oft", "fourier"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parts_of_a_base_of_16_bits_train_in_float32(form, dtype, rng, tmp_path):
    x = keras.Input((4,), dtype=dtype)
    model = keras.Model(x, layers.Dense(4, use_bias=False, dtype=dtype, name="d")(x))
    model.trainable = False
    adapters.add(model, "a", {"d/kernel": FORMS[form]()})
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    kernel = model.get_layer("d").kernel
    assert kernel.dtype == dtype and keras.backend.standardize_dtype(model(np.ones((1, 4))).dtype) == dtype
    optimizer = keras.optimizers.SGD(1e-4)
    optimizer.build(model.trainable_variables)
    before = [numpy(variable.value) + 0 for variable in model.trainable_variables]
    for _ in range(50):
        optimizer.apply(
            [keras.ops.ones(v.shape, v.dtype) for v in model.trainable_variables], model.trainable_variables
        )
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_allclose(numpy(variable.value), value - 0.005, atol=1e-5)
    adapters.save(model, "a", tmp_path / "a.safetensors")
    adapters.remove(model, "a")
    adapters.load(model, tmp_path / "a.safetensors")
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}


def test_the_dtype_of_parts_can_be_chosen():
    x = keras.Input((4,), dtype="bfloat16")
    model = keras.Model(x, layers.Dense(4, dtype="bfloat16", name="d")(x))
    adapters.add(model, "a", {"d/kernel": tether.low_rank(1, dtype="bfloat16")}, freeze="all")
    assert {variable.dtype for variable in model.trainable_variables} == {"bfloat16"}
    with pytest.raises(TetherError, match="float dtype"):
        tether.low_rank(1, dtype="int8")


def test_a_file_of_version_1_names_weights_by_positions():
    """Written by the code of version 0.1.0 for `low_rank(2, start="pissa")` on three kernels, below a backbone."""
    import json
    import pathlib

    from safetensors import safe_open

    path = pathlib.Path(__file__).parent / "fixtures" / "0.1.0" / "adapter.safetensors"
    x, y = keras.Input((4,)), keras.Input((4,))
    body = keras.Model(x, layers.Dense(4, name="query")(layers.Dense(4)(x)), name="backbone")
    model = keras.Model(y, layers.Dense(2, name="logits")(body(y)))
    before = {name: tether.weight_of(model, name).numpy() for name in ("backbone/query/kernel", "logits/kernel")}
    adapters.load(model, path)
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["adapter"])
        held = {header["weights"][uid]["path"]: file.get_tensor(uid) for uid in file.keys()}  # noqa: SIM118
    assert header["version"] == 1 and "layers/1/layers/2/kernel" in header["ties"]
    for name, short in (("backbone/query/kernel", "query/kernel"), ("logits/kernel", "logits/kernel")):
        a, b, c, d = (held[f"{short}_{end}"] for end in ("lora_a", "lora_b", "pissa_a", "pissa_b"))
        np.testing.assert_allclose(
            tether.weight_of(model, name).numpy(), before[name] + a @ b - c @ d, rtol=1e-4, atol=1e-5
        )
    adapters.activate(model)
    adapters.activate(model, "a")
    trained = {
        variable.name.rpartition("_lora")[0] for variable in model.trainable_variables if "lora" in variable.name
    }
    assert trained == {"kernel"} and not any("pissa" in variable.path for variable in model.trainable_variables)


@pytest.mark.parametrize("how", ["frozen when added", "frozen with the model", "trained before"])
def test_an_adapter_that_is_frozen_stays_one_when_another_is_added_elsewhere(how, rng):
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Dense(4, name="body")(x)))
    model.trainable = False
    adapters.add(model, "a", {"body/kernel": tether.low_rank(1)}, trainable=how != "frozen when added")
    if how == "frozen with the model":
        model.trainable = False
    elif how == "trained before":
        adapters.trainable(model)
    move(model, "a")
    given = rng.normal(size=(3, 4)).astype("float32")
    right = predict(model, given)
    adapters.add(model, "b", {}, also="head/*", freeze="all")
    assert adapters.names(model) == ["a", "b"]
    assert np.array_equal(predict(model, given), right)
    assert {variable.path for variable in model.trainable_variables} == {"head/kernel_full", "head/bias_full"}
    adapters.activate(model, "b")
    assert not np.allclose(predict(model, given), right)
    adapters.combine(model, {"a": 2.0}, into="twice")
    adapters.remove(model, "a")
    assert adapters.names(model) == ["b", "twice"]


@pytest.mark.thin(2)
@pytest.mark.spread(3)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("verb", [adapters.activate, adapters.trainable])
def test_another_adapter_does_not_begin_to_train_in_a_callback(verb, nested):
    inner = two_branches()
    for name in "ab":
        adapters.add(inner, name, {"*/kernel": tether.low_rank(1)})
    adapters.activate(inner, "a")
    x = keras.Input((4,))
    model = keras.Model(x, inner(x)) if nested else inner
    seen = []

    class Change(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            adapters.activate(inner, "a")  # what trains already
            adapters.set_strengths(inner, {"a": 0.5})
            with pytest.raises(TetherError, match=r"is in `fit`.*set_strengths"):
                verb(inner, "b")
            seen.append(adapters.strengths(inner))

    model.compile("adam", "mse")
    x, y = np.ones((8, 4), "float32"), np.zeros((8, 2), "float32")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[Change()])
    assert seen == [{"a": 0.5, "b": 0.0}] * 2
    verb(inner, "b")
    adapters.set_strengths(inner, {"b": 1.0})
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)


# --------------------------------------------------------------------------- what combining and names leave as it was


@pytest.mark.parametrize("freeze", [None, "adapted", "all"])
@pytest.mark.parametrize("rank", [None, 1])
def test_combining_freezes_nothing(freeze, rank):
    model = make_model(frozen=False)
    adapters.add(model, "a", {pattern(KINDS["dense"]): tether.low_rank(2)}, freeze=freeze)
    move(model, "a")
    trained = {weight.path for weight in model.trainable_weights}
    value = {weight.path: numpy(weight) for weight in model.weights}
    adapters.combine(model, {"a": 1.0}, into="b", rank=rank)
    made = {weight.path for weight in adapters.manage.own_weights(model)["b"] if weight.trainable}
    assert {weight.path for weight in model.trainable_weights} == trained | made and made
    for weight in model.weights:
        if weight.path in value:
            np.testing.assert_array_equal(numpy(weight), value[weight.path])


@pytest.mark.parametrize("options", [{"rank": 1}, {"method": "ties"}, {"method": "dare", "seed": 1}])
def test_an_adapter_that_has_diverged_is_named_and_nothing_is_made(options):
    model = make_model()
    for name in ("a", "b"):
        adapters.add(model, name, {pattern(KINDS["dense"]): tether.low_rank(2)})
        move(model, name, value=np.nan if name == "b" else None)
    with pytest.raises(TetherError, match="adapter 'b' adds numbers"):
        adapters.combine(model, {"a": 1.0, "b": 0.5}, into="c", **options)
    assert adapters.names(model) == ["a", "b"]


def test_a_name_is_one_string_that_can_be_part_of_the_name_of_a_weight():
    model = make_model()
    with pytest.raises(TetherError, match=r"no '/' in it.*'a/b'"):
        adapters.add(model, "a/b", {pattern(KINDS["dense"]): tether.low_rank(2)})
    adapters.add(model, "a", {pattern(KINDS["dense"]): tether.low_rank(2)})
    with pytest.raises(TetherError, match=r"by its name, a string.*\['a'\]"):
        adapters.remove(model, ["a"])
    assert adapters.names(model) == ["a"]

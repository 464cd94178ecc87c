"""Dropout on the outputs of a part of a weight, and on the whole of it: what is drawn, and when."""

import json
import warnings

import keras
import numpy as np
import pytest

import tether
from tests.files.peft_folders import FOLDERS, base, changed, close, predict
from tests.support import assert_close, gradients, numpy
from tether import adapters, forms
from tether.errors import InvalidConfig, TetherError
from tether.forms.dropout import DropMask, OutputDropout, output_dropout_of
from tether.weights.codec import decode, encode

pytestmark = pytest.mark.spread

layers = keras.layers
BACKEND = keras.backend.backend()
KINDS = {
    "dense": (lambda: layers.Dense(12), (4,), "kernel"),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 4)), (2, 4), "kernel"),
    "conv": (lambda: layers.Conv2D(12, 2), (3, 3, 2), "kernel"),
    "table": (lambda: layers.Embedding(5, 12), (2,), "embeddings"),
}
FORMS = {
    "hadamard": lambda **rates: forms.hadamard(2, alpha=3, seed=5, **rates),
    "kronecker": lambda **rates: forms.kronecker(seed=5, rank_dropout_scale=True, **rates),
    "kronecker, rank": lambda **rates: forms.kronecker(1, seed=5, rank_dropout_scale=True, **rates),
}


def moved(layer):
    """Gives the parts of a layer values other than their start: the same ones each time."""
    rng = np.random.default_rng(1)
    for weight in layer.weights:
        if "_lo" in weight.path:
            weight.assign(rng.uniform(0.5, 1.0, size=weight.shape))
    return layer


def tied(kind, form):
    make, shape, name = KINDS[kind]
    keras.utils.set_random_seed(3)
    layer = make()
    layer.build((None, *shape))
    form.split = 1 if kind == "einsum" else None  # its outputs have two axes
    tether.tie(layer, {name: form(tether.weight_of(layer, name).stop_gradient())})
    return moved(layer)


def inputs(kind, rng, n=3):
    shape = KINDS[kind][1]
    if kind == "table":
        return rng.integers(0, 5, (n, *shape))
    return rng.uniform(0.5, 1.0, size=(n, *shape)).astype("float32")


def drawn(kind, form, calls, rng):
    """The factors of the part's outputs in calls that train, by dividing; one row a call."""
    layer, off = tied(kind, form), tied(kind, FORMS["hadamard"]())
    for weight in off.weights:
        if "_lo" in weight.path:
            weight.assign(np.zeros(weight.shape))
    x = inputs(kind, rng)
    without = numpy(off(x)).reshape(-1, 12)
    whole = numpy(layer(x)).reshape(-1, 12) - without
    at = whole.argmax(axis=0), np.arange(12)
    found = []
    for _ in range(calls):
        now = numpy(layer(x, training=True)).reshape(-1, 12) - without
        factor = now[at] / whole[at]
        assert_close(now, whole * factor, 1e-3)  # all examples and places have one factor
        found.append(factor)
    return np.array(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_outputs_is_dropped_and_the_mean_stays(kind, form, rng):
    found = drawn(kind, FORMS[form](rank_dropout=0.25), 80, rng)
    assert abs(np.mean(np.abs(found) < 1e-3) - 0.25) < 0.07
    assert_close(found.mean(axis=1), np.ones(80), 1e-3)  # in each call, for all outputs together
    assert_close(found.mean(axis=0), np.ones(12), 0.3)  # and for each output, over calls
    assert len({tuple(row.round(2)) for row in found}) > 40


def test_without_the_scale_what_is_kept_is_as_large_as_ever(rng):
    found = drawn("dense", forms.kronecker(seed=5, rank_dropout=0.5), 80, rng)
    assert abs(np.mean(np.abs(found) < 1e-3) - 0.5) < 0.08
    assert_close(found[np.abs(found) > 1e-3], np.ones(np.sum(np.abs(found) > 1e-3)), 1e-3)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_the_whole_part_is_left_out_of_a_share_of_calls(kind, rng):
    found = drawn(kind, forms.hadamard(2, seed=5, module_dropout=0.3), 150, rng)
    assert_close(found, found[:, :1] * np.ones((1, 12)), 1e-3)
    assert abs(np.mean(np.abs(found[:, 0]) < 1e-3) - 0.3) < 0.12
    both = drawn(kind, forms.hadamard(2, seed=5, rank_dropout=0.5, module_dropout=0.5), 60, rng)
    off = np.abs(both).max(axis=1) < 1e-3
    assert abs(np.mean(off) - 0.5) < 0.2
    assert_close(both[~off].mean(axis=1), np.ones(np.sum(~off)), 1e-3)


def test_nothing_is_left_where_no_output_is_kept(rng):
    found = drawn("dense", forms.hadamard(2, seed=5, rank_dropout=0.95), 60, rng)
    assert np.isfinite(found).all()
    assert (np.abs(found).max(axis=1) < 1e-3).any()


@pytest.mark.parametrize("mode", ["auto", "factored", "materialize"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_does_not_train_computes_with_the_whole_part(kind, form, mode, rng):
    layer, plain = tied(kind, FORMS[form](rank_dropout=0.5, module_dropout=0.5)), tied(kind, FORMS[form]())
    x = inputs(kind, rng)
    name = KINDS[kind][2]
    assert np.array_equal(tether.weight_of(layer, name).numpy(), tether.weight_of(plain, name).numpy())
    with tether.planning.force(mode):
        for _ in range(3):
            assert_close(layer(x, training=False), plain(x), 1e-5)
            assert_close(layer(x), plain(x), 1e-5)


@pytest.mark.parametrize("mode", ["factored", "materialize"])
def test_a_plan_draws_as_the_built_weight_does(mode, rng):
    with tether.planning.force(mode):
        found = drawn("dense", FORMS["kronecker, rank"](rank_dropout=0.5), 40, rng)
    assert abs(np.mean(np.abs(found) < 1e-3) - 0.5) < 0.12
    assert_close(found.mean(axis=1), np.ones(40), 1e-3)


def test_what_was_dropped_has_no_gradient(rng):
    layer = tied("dense", forms.hadamard(2, seed=5, rank_dropout=0.5))
    b = next(w for w in layer.trainable_weights if "loha_b2" in w.path)
    x = inputs("dense", rng)
    zeros = []
    for _ in range(20):
        layer(x, training=True)  # draws: on JAX `gradients` leaves no new state, so that all of its calls draw the same
        _, (gradient,) = gradients(lambda: keras.ops.sum(layer(x, training=True) ** 2), [b])
        zeros += list(np.abs(numpy(gradient)).max(axis=0) == 0)
    assert 0.3 < np.mean(zeros) < 0.7


def test_a_recurrent_layer_has_one_draw_for_all_steps(rng):
    keras.utils.set_random_seed(3)
    layer = layers.SimpleRNN(6, recurrent_initializer="zeros", activation=None, return_sequences=True)
    layer.build((None, 4, 5))
    tether.tie(
        layer, {"cell/kernel": 0.0 * tether.weight_of(layer, "cell/kernel") + forms.hadamard(2, rank_dropout=0.5)}
    )
    moved(layer)
    x = rng.normal(size=(2, 4, 5)).astype("float32")
    rows = set()
    for _ in range(10):
        off = np.abs(numpy(layer(x, training=True))).max(axis=0) < 1e-6
        assert np.array_equal(off, np.broadcast_to(off[:1], off.shape))
        rows.add(tuple(off[0]))
    assert len(rows) > 3


def test_half_precision_is_kept(rng):
    layer = layers.Dense(3, dtype="mixed_bfloat16")
    layer.build((None, 4))
    tether.tie(layer, kernel=tether.weight_of(layer, "kernel").stop_gradient() + forms.hadamard(2, rank_dropout=0.5))
    stored = layers.Dense(3, dtype="bfloat16")
    stored.build((None, 4))
    tether.tie(stored, kernel=tether.weight_of(stored, "kernel").stop_gradient() + forms.kronecker(module_dropout=0.5))
    for each in (layer, stored):
        for training in (True, False):
            y = each(rng.normal(size=(2, 4)), training=training)
            assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


# --------------------------------------------------------------------------- models, files, depth


def make_model(seed=None, nested=False):
    keras.utils.set_random_seed(7)
    x = keras.Input((6,))
    y = layers.Dense(4, name="one")(x)
    if nested:
        y = keras.Model(x, y, name="inner")(x)
    model = keras.Model(x, y)
    adapters.add(model, "a", {"*/kernel": forms.hadamard(2, seed=seed, rank_dropout=0.3, module_dropout=0.2)})
    return moved(model)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_trains_is_saved_and_cloned_with_it(compiled, nested, rng, tmp_path):
    model = make_model(seed=None if compiled else 3, nested=nested)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = x @ rng.normal(size=(6, 4)).astype("float32")
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=compiled)
    state = next(v for v in model.variables if "_dropout" in v.path)
    start, before = numpy(state.value).copy(), model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=30, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.8 * before
    if BACKEND != "torch" or not compiled:  # which draws from its own generator where nobody gave a seed
        assert list(numpy(state.value) - start) == [0, 2 * 30]
    right = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = tether.files.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    adapters.save(model, "a", tmp_path / "a.safetensors")
    adapters.remove(clone, "a")
    adapters.load(clone, tmp_path / "a.safetensors")
    for each in (again, clone):
        assert_close(each.predict(x, verbose=0), right, 1e-5)
        assert len({numpy(each(x, training=True)).tobytes() for _ in range(8)}) > 1
        expression = tether.weight_of(each, "inner/one/kernel" if nested else "one/kernel")
        assert output_dropout_of(expression) == OutputDropout(0.3, True, 0.2)


def test_an_adapter_that_is_off_or_merged_drops_nothing(rng):
    model = make_model()
    x = rng.normal(size=(4, 6)).astype("float32")
    with adapters.disabled(model):
        assert_close(model(x, training=True), model(x), 1e-6)
    right = numpy(model(x))
    adapters.merge(model)
    assert_close(model(x, training=True), right, 1e-5)
    adapters.unmerge(model)
    assert any(not np.allclose(numpy(model(x, training=True)), right) for _ in range(4))


def test_a_stateless_call_hands_the_state_on(rng):
    model = make_model(seed=3)
    x = rng.normal(size=(4, 6)).astype("float32")
    values = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    first, after = model.stateless_call(*values, x, training=True)
    again, _ = model.stateless_call(*values, x, training=True)
    assert_close(first, again)
    for _ in range(8):
        later, after = model.stateless_call(values[0], after, x, training=True)
        if not np.allclose(numpy(first), numpy(later)):
            return
    pytest.fail("every call has drawn the same")


@pytest.mark.parametrize("own", [False, True])
def test_each_turn_of_a_loop_draws_for_itself(own, rng):
    keras.utils.set_random_seed(3)
    block = layers.Dense(8, use_bias=False)
    block.build((None, 8))
    form = forms.hadamard(1, seed=4, rank_dropout=0.5)
    if not own:
        tether.tie(block, kernel=0.0 * tether.weight_of(block, "kernel") + form)
    repeat = tether.Repeat(block, 6, outputs="all", vary={"kernel": lambda w: 0.0 * w + form} if own else None)
    x = keras.Input((8,))
    model = moved(keras.Model(x, repeat(x)))
    x = np.abs(rng.normal(size=(2, 8))).astype("float32")
    model.compile(jit_compile=False)
    assert_close(model.predict(x, verbose=0), model(x), 1e-5)
    calls = []
    for _ in range(3):
        off = numpy(model(x, training=True))[:, 0] == 0  # of each turn, what was dropped
        assert 0.2 < off.mean() < 0.8
        assert len({tuple(turn) for turn in off}) > 3
        calls.append(off.tobytes())
    assert len(set(calls)) == 3


# --------------------------------------------------------------------------- folders of PEFT's


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["loha", "lokr", "loha_conv", "lokr_conv1d"])
def test_the_dropouts_of_a_folder_act_in_training_and_are_written_again(name, named, tmp_path):
    asked = {"rank_dropout": 0.5, "module_dropout": 0.25}
    if name.startswith("lokr"):
        asked["rank_dropout_scale"] = True
    folder = changed(tmp_path, name, **asked)
    model, x, right, _ = base(name)
    for _ in range(2):  # the second replaces the first
        if named:
            for each in adapters.names(model):
                adapters.remove(model, each)
            adapters.load(model, folder, name="theirs")
        else:
            tether.files.load_peft(model, folder)
        close(predict(model, x), right)
    outputs = [numpy(model(x, training=True)) for _ in range(3)]
    assert all(np.isfinite(y).all() for y in outputs)
    assert not (np.allclose(outputs[0], outputs[1]) and np.allclose(outputs[0], outputs[2]))
    tether.files.save_peft(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {field: config[field] for field in asked} == asked
    for parts in (v for v in model.variables if "_dropout" in v.path):
        assert parts.dtype == "uint32"
    again, *_ = base(name)
    tether.files.load_peft(again, tmp_path / "again")
    close(predict(again, x), right)


def test_a_loha_of_peft_is_always_rescaled_and_a_lokr_if_it_asks(tmp_path):
    cases = ("loha", {}, True), ("lokr", {}, False), ("lokr", {"rank_dropout_scale": True}, True)
    for number, (name, more, rescaled) in enumerate(cases):
        model, *_ = base(name)
        tether.files.load_peft(model, changed(tmp_path / str(number), name, rank_dropout=0.5, **more))
        found = {output_dropout_of(w.expression) for w in named(model)}
        assert found - {OutputDropout()} == {OutputDropout(0.5, rescaled, 0.0)}


def named(model):
    return [layer.kernel for layer in model.layers if hasattr(getattr(layer, "kernel", None), "expression")]


@pytest.mark.parametrize(("name", "field"), [("oft", "module_dropout"), ("boft", "boft_dropout")])
def test_a_dropout_of_training_that_is_passed_over_is_named(name, field, tmp_path):
    folder = changed(tmp_path, name, **{field: 0.1})
    for read in (tether.files.load_peft, adapters.load):
        model, x, right, _ = base(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read(model, folder)
        (own,) = [each for each in caught if each.category is UserWarning]
        assert f"{field}=0.1" in str(own.message) and own.filename == __file__
        close(predict(model, x), right)
    model, x, right, _ = base(name)
    adapters.load(model, folder, trainable=False)
    close(predict(model, x), right)
    tether.files.load_peft(base(name)[0], FOLDERS / name)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("rate", [1.0, -0.1, "a half", None, True, float("nan")])
def test_a_rate_is_a_share(rate, tmp_path):
    for field in ("rank_dropout", "module_dropout"):
        for form in (forms.hadamard, forms.kronecker):
            with pytest.raises(TetherError, match=field):
                form(2, **{field: rate})
        if rate is not None:
            model, *_ = base("loha")
            with pytest.raises(InvalidConfig, match=field):
                tether.files.load_peft(model, changed(tmp_path / field, "loha", **{field: rate}))


def test_a_file_of_a_stranger_is_checked():
    w = tether.Weight((4, 3), name="w")
    expression = w + forms.hadamard(2, rank_dropout=0.25, seed=1)
    weights = {weight.uid: weight for weight in expression.weights_used()}
    steps = encode(expression)
    assert decode(steps, weights) == expression
    assert "drop_mask(0.25)" in expression.notation()
    place = next(n for n, step in enumerate(steps) if step.get("op") == "drop_mask")
    for change in ({"outputs": 1.5}, {"whole": "x"}, {"seeded": 1}, {"rescaled": None}, {"of": [0]}, {"shape": [0]}):
        with pytest.raises(InvalidConfig):
            decode([*steps[:place], {**steps[place], **change}, *steps[place + 1 :]], weights)


def test_nothing_is_made_without_a_rate():
    w = tether.Weight((4, 3), name="w")
    assert len((w + forms.hadamard(2)).weights_used()) == 5
    whole = w + forms.hadamard(2, module_dropout=0.5)
    state = next(s for s in whole.weights_used() if s.role == "state")
    assert not state.trainable and len(whole.weights_used()) == 6
    assert isinstance(whole.operands[1].operands[1], DropMask)

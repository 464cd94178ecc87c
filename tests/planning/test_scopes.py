"""Scopes in which plans are chosen otherwise, or built weights are kept; and plans in words."""

import contextlib
from html import escape

import keras
import numpy as np
import pytest

import tether
from tests.support import as_zero, assert_close, gradients, numpy
from tether import ops, planning
from tether.errors import TetherError
from tether.planning import control
from tether.weights import evaluation

layers = keras.layers
BACKEND = keras.backend.backend()
CALLS = []


@keras.saving.register_keras_serializable("tether_planning_tests")
def counted(x):
    CALLS.append(1)
    return x * 2.0


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def weights():
    return [tether.Weight(data(*shape, seed=n), name=f"w{n}") for n, shape in enumerate([(8, 6), (8, 2), (2, 6)])]


def make_layer(**options):
    w, a, b = weights()
    layer = tether.tie(layers.Dense(6, **options), kernel=ops.apply(counted, w) + a @ b)
    layer.build((None, 8))
    return layer, w, a, b


def kernel_of(w, a, b):
    return 2.0 * numpy(w.value) + numpy(a.value) @ numpy(b.value)


def eager():
    """Without a gradient being recorded."""
    if BACKEND == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def count(call):
    before = len(CALLS)
    call()
    return len(CALLS) - before


# --------------------------------------------------------------------------- force


@pytest.mark.parametrize("how", ["fast", "", None, 1, "Factored"], ids=repr)
def test_another_word_is_refused(how):
    with pytest.raises(TetherError, match=r'"materialize", "factored" or "auto"'), planning.force(how):
        pass
    assert control.mode() == "auto"


def test_force_nests_and_ends_with_its_scope():
    with planning.force("factored"):
        assert control.mode() == "factored"
        with planning.force("materialize"):
            assert control.mode() == "materialize"
            with planning.force("auto"):
                assert control.mode() == "auto"
        assert control.mode() == "factored"
    assert control.mode() == "auto"


def test_force_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), planning.force("factored"):
        _ = 1 / 0
    assert control.mode() == "auto"


def test_force_decides_for_calls_within_it():
    layer, w, a, b = make_layer()
    x = data(3, 8, seed=9)
    for how, names in (("materialize", {"materialize"}), ("factored", {"factored"})):
        with planning.force(how), control.recording(training=False) as noted:
            assert_close(layer(x), x @ kernel_of(w, a, b))
        assert {use.plan.name for use in noted} == names


# --------------------------------------------------------------------------- cached


def test_a_built_weight_is_computed_once():
    layer, w, a, b = make_layer()
    x = data(3, 8, seed=9)
    with eager():
        assert count(lambda: [layer(x) for _ in range(3)]) == 3
        for how in ("materialize", "factored", "auto"):
            with planning.force(how), planning.cached():
                assert count(lambda: [layer(x) for _ in range(3)]) == 1
                assert_close(layer(x), x @ kernel_of(w, a, b))
                assert count(lambda: layer(data(5, 8))) == 0
        assert count(lambda: layer(x)) == 1


def raw_write(weight):
    """Writes to a stored value as the backend does it, past Keras."""
    variable = weight.variable
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            variable.value.add_(1.0)
    elif BACKEND == "tensorflow":
        variable._value.assign_add(np.ones(variable.shape, "float32"))
    else:
        variable.assign(variable.value + 1.0)


def raw_write_to_a_part(weight):
    variable = weight.variable
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            variable.value[0, 0] = 7.0
    elif BACKEND == "tensorflow":
        variable._value[0, 0].assign(7.0)
    else:
        variable.assign(variable.value.at[0, 0].set(7.0))


WRITES = {
    "weight.assign": lambda layer, w: w.assign(data(*w.shape, seed=20)),
    "variable.assign": lambda layer, w: w.variable.assign(data(*w.shape, seed=21)),
    "variable.assign_add": lambda layer, w: w.variable.assign_add(np.ones(w.shape, "float32")),
    "the backend": lambda layer, w: raw_write(w),
    "the backend, a part": lambda layer, w: raw_write_to_a_part(w),
    "set_weights": lambda layer, w: layer.set_weights([v + 1.0 for v in layer.get_weights()]),
}


@pytest.mark.parametrize("how", ["materialize", "factored"])
@pytest.mark.parametrize("write", WRITES)
def test_it_is_computed_again_after_a_write(write, how):
    layer, w, a, b = make_layer(use_bias=False)
    x = data(3, 8, seed=9)
    with eager(), planning.force(how), planning.cached():
        layer(x)
        for weight in (w, a, w):
            for _ in range(2):
                before = numpy(weight.value).copy()
                WRITES[write](layer, weight)
                y = layer(x)
                assert_close(y, x @ kernel_of(w, a, b))
                assert np.any(numpy(weight.value) != before) or "part" in write or write.endswith(".assign")
                if BACKEND != "tensorflow" or "part" not in write:  # TensorFlow reads such a variable by copying it
                    assert count(lambda: layer(x)) == 0


def test_only_what_a_write_touches_is_computed_again():
    layer, w, a, b = make_layer()
    x = data(3, 8, seed=9)
    with eager(), planning.force("factored"), planning.cached():
        layer(x)
        a.assign(data(8, 2, seed=30))
        assert count(lambda: layer(x)) == 0  # the function is of w
        assert_close(layer(x), x @ kernel_of(w, a, b))
        w.assign(data(8, 6, seed=31))
        assert count(lambda: [layer(x), layer(x)]) == 1


def test_it_is_computed_again_after_steps_of_an_optimizer():
    layer, w, a, b = make_layer(use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = data(6, 8, seed=9)
    with planning.cached():
        for _ in range(2):
            with eager():
                model(x), model(x)
            before = numpy(w.value).copy()
            model.fit(x, data(6, 6), batch_size=3, epochs=1, verbose=0)
            assert np.any(numpy(w.value) != before)
            wanted = x @ kernel_of(w, a, b)
            with eager():
                assert_close(model(x), wanted, 1e-4)
                assert_close(model(x), wanted, 1e-4)
            assert_close(model.predict(x, verbose=0), wanted, 1e-4)


def test_it_is_computed_again_after_other_weights_were_loaded(tmp_path):
    layer, w, *_ = make_layer(use_bias=False)
    model = keras.Sequential([keras.Input((8,)), layer])
    x = data(3, 8, seed=9)
    model.save_weights(tmp_path / "m.weights.h5")
    wanted = numpy(model(x))
    w.assign(data(8, 6, seed=40))
    with eager(), planning.cached():
        assert np.abs(numpy(model(x)) - wanted).max() > 0.1
        model.load_weights(tmp_path / "m.weights.h5")
        assert_close(model(x), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_few_bits_are_kept_too(dtype):
    w, a = tether.Weight((4, 3), "ones", dtype=dtype, name="w"), tether.Weight((4, 3), "ones", dtype=dtype, name="a")
    layer = tether.tie(layers.Dense(3, dtype=dtype), kernel=w + a)
    x = np.ones((2, 4), "float32")
    with eager(), planning.cached():
        assert_close(keras.ops.cast(layer(x), "float32"), np.full((2, 3), 8.0))
        w.assign(np.full((4, 3), 2.0))
        assert_close(keras.ops.cast(layer(x), "float32"), np.full((2, 3), 12.0))
        assert_close(keras.ops.cast(layer(x), "float32"), np.full((2, 3), 12.0))


def test_each_precision_has_a_value_of_its_own():
    w, a, b = weights()
    x = data(3, 8, seed=9)
    kernel = w + a @ b
    half = tether.tie(layers.Dense(6, use_bias=False, dtype="mixed_float16"), kernel=kernel)
    full = tether.tie(layers.Dense(6, use_bias=False), kernel=kernel)
    with eager(), planning.force("materialize"), planning.cached():
        for _ in range(2):
            assert keras.backend.standardize_dtype(half(x).dtype) == "float16"
            assert_close(full(x), x @ numpy(kernel.value))
            assert_close(keras.ops.cast(half(x), "float32"), x @ numpy(kernel.value), 0.1)


def test_an_argument_decides_for_what_is_kept():
    w, a, b = weights()
    layer = tether.route(layers.Dense(6, use_bias=False), kernel=[w, w + a @ b])
    x = data(3, 8, seed=9)
    both = x @ numpy(w.value), x @ numpy((w + a @ b).value)
    with eager(), planning.cached():
        for choice in (0, 1, 1, 0, 1):
            assert_close(layer(x, choice=choice), both[choice])
            assert_close(layer(x, choice=keras.ops.convert_to_tensor(choice)), both[choice])


def test_nothing_is_kept_after_the_scope():
    layer, *_ = make_layer()
    x = data(3, 8, seed=9)
    with eager():
        with planning.cached():
            layer(x)
            assert evaluation._scope.memory
        assert evaluation._scope.memory is None
        with pytest.raises(ZeroDivisionError), planning.cached():
            layer(x)
            _ = 1 / 0
        assert evaluation._scope.memory is None
        assert count(lambda: [layer(x), layer(x)]) == 2


def test_scopes_nest():
    layer, *_ = make_layer()
    x = data(3, 8, seed=9)
    with eager(), planning.cached():
        layer(x)
        with planning.cached():
            assert count(lambda: [layer(x), layer(x)]) <= 1
        assert count(lambda: layer(x)) == 0


@pytest.mark.parametrize("how", ["materialize", "factored", "auto"])
def test_gradients_within_the_scope_are_right(how):
    layer, w, a, b = make_layer()
    x = data(3, 8, seed=9)
    variables = [weight.variable for weight in (w, a, b)]

    def loss():
        return keras.ops.sum(keras.ops.square(layer(x)))

    _, wanted = gradients(loss, variables)
    with planning.force(how), planning.cached():
        with eager():
            layer(x)
        _, found = gradients(loss, variables)
        with eager():
            layer(x)
        _, again = gradients(loss, variables)
    for one, two, other in zip(found, again, wanted, strict=True):
        assert_close(one, other, 1e-4)
        assert_close(two, other, 1e-4)


def test_gradients_of_the_input_within_the_scope_are_right():
    layer, w, a, b = make_layer(use_bias=False)
    x = keras.Variable(data(3, 8, seed=9))
    with planning.cached():
        with eager():
            layer(x.value)
        _, (found,) = gradients(lambda: keras.ops.sum(layer(x.value)), [x])
    assert_close(found, np.tile(kernel_of(w, a, b).sum(1), (3, 1)), 1e-4)


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is traced")
@pytest.mark.parametrize("how", ["materialize", "factored"])
def test_no_tracer_leaks_out_of_what_is_compiled(how):
    layer, w, a, b = make_layer(use_bias=False)
    x = data(3, 8, seed=9)
    if BACKEND == "jax":
        import jax

        compiled = jax.jit(lambda x: layer(x))
    else:
        import tensorflow as tf

        compiled = tf.function(lambda x: layer(x))
    with planning.force(how), planning.cached():
        assert_close(compiled(keras.ops.convert_to_tensor(x)), x @ kernel_of(w, a, b))
        assert_close(layer(x), x @ kernel_of(w, a, b))
        assert count(lambda: layer(x)) == 0
    assert_close(layer(x), x @ kernel_of(w, a, b))


def test_a_model_is_built_and_saved_within_the_scope(tmp_path):
    w, a, b = weights()
    with planning.cached():
        inputs = keras.Input((8,))
        model = keras.Model(inputs, tether.tie(layers.Dense(6), kernel=w + a @ b)(inputs))
        wanted = model.predict(data(3, 8), verbose=0)
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
        assert_close(again.predict(data(3, 8), verbose=0), wanted)


def test_state_goes_on_in_training_calls_within_the_scope():
    def outputs(within):
        keras.utils.set_random_seed(1)
        w = tether.Weight(data(4, 4), name="w")
        layer = tether.tie(layers.Dense(4), kernel=tether.forms.spectral_norm(seed=1)(w) + 1.0)
        state = [weight for weight in tether.weight_of(layer, "kernel").weights_used() if weight is not w]
        for weight in state:
            weight.assign(np.eye(1, 4).ravel())
        x, found = data(2, 4), []
        with eager(), planning.cached() if within else contextlib.nullcontext():
            for training in (True, True, False, True):
                y = numpy(layer(x, training=training))
                found.append([y, *(numpy(weight.value).copy() for weight in state)])
        return found

    within, outside = outputs(True), outputs(False)
    for step, (found, wanted) in enumerate(zip(within, outside, strict=True)):
        assert_close(found[0], wanted[0])
        assert_close(found[1], wanted[1])
        changed = step != 2
        assert (step == 0 or np.abs(found[1] - within[step - 1][1]).max() > 1e-4) == changed


def test_a_recurrent_layer_builds_its_kernel_once_a_call_within_the_scope():
    w, a, b = weights()
    cell = layers.SimpleRNN(6, unroll=True)
    layer = tether.tie(cell, {"cell/kernel": ops.apply(counted, w) + a @ b})
    x = data(2, 5, 8)
    wanted = numpy(layer(x))
    with planning.force("materialize"), planning.cached():
        with eager():
            assert count(lambda: layer(x)) == 1
            assert_close(layer(x), wanted)
        variables = [w.variable, a.variable]
        before = len(CALLS)
        gradients(lambda: keras.ops.sum(layer(x)), variables)
        assert len(CALLS) - before == 1


# --------------------------------------------------------------------------- explain


def test_an_explanation_names_the_plan_and_the_others():
    layer, *_ = make_layer()
    text = str(planning.explain(layer, (32, 8)))
    assert f"{layer.name}: inference with inputs of shape (32, 8)" in text
    assert "counted(w0) + w1 @ w2" in text and "(32, 8)" in text
    assert text.count("->") == 1
    for name in ("materialize", "factored"):
        assert name in text
    assert "µs" in text and repr(planning.explain(layer, (32, 8))) == text


def test_an_explanation_is_a_table_in_a_notebook():
    layer, *_ = make_layer()
    found = planning.explain(layer, (32, 8))
    (use,) = found.uses
    html = found._repr_html_()
    assert html.count("<table>") == 1 and html.count("→") == 1
    assert html.count("<tr>") == len(use.plan.alternatives) >= 2
    for words in (found.title, use.path, "counted(w0) + w1 @ w2", *use.plan.alternatives[0].steps):
        assert escape(words) in html
    plain = keras.layers.Dense(2)
    assert "<table" not in planning.explain(plain, (32, 8))._repr_html_()


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow takes no such names")
def test_names_in_an_explanation_are_words_and_nothing_else():
    weight = tether.Weight((8, 4), "ones", name="w<script>alert(1)")
    layer = tether.tie(keras.layers.Dense(4, name="dense<b>"), kernel=weight.stop_gradient() + tether.low_rank(1))
    found = planning.explain(layer, (32, 8), training=True)
    assert found.uses and "w<script>" in str(found) and "dense<b>" in str(found)
    html = found._repr_html_()
    assert "w&lt;script&gt;alert(1)" in html and "dense&lt;b&gt;" in html
    assert "<script" not in html and "<b>" not in html


@pytest.mark.parametrize("how", ["materialize", "factored"])
def test_an_explanation_follows_force(how):
    layer, *_ = make_layer()
    with planning.force(how):
        explanation = planning.explain(layer, (32, 8))
    (use,) = explanation.uses
    assert use.plan.name == how
    assert {alternative.name for alternative in use.plan.alternatives} >= {"materialize", "factored"}
    (chosen,) = [line for line in str(explanation).splitlines() if "->" in line]
    assert how in chosen
    assert use.plan.alternatives == tuple(sorted(use.plan.alternatives, key=lambda found: found.seconds))


def test_an_explanation_of_training_counts_gradients():
    layer, *_ = make_layer()
    inference, training = (planning.explain(layer, (32, 8), training=t) for t in (False, True))
    assert "a training step" in str(training) and "a training step" not in str(inference)
    for one, other in zip(inference.uses, training.uses, strict=True):
        seconds = {a.merged: a.seconds for a in one.plan.alternatives}
        assert all(a.seconds > seconds[a.merged] for a in other.plan.alternatives)


def test_an_unknown_batch_counts_as_32():
    layer, *_ = make_layer()
    assert str(planning.explain(layer, (None, 8))) == str(planning.explain(layer, (32, 8)))


def test_an_unbuilt_layer_is_built_once():
    w, a, b = weights()
    layer = tether.tie(layers.Dense(6), kernel=w + a @ b)
    (use,) = planning.explain(layer, (4, 8)).uses
    assert use.input_shape == (4, 8) and layer.built
    assert [v.path for v in layer.weights] == ["w0", "w1", "w2", f"{layer.name}/bias"]


def test_a_whole_model_is_explained_and_not_changed():
    w, a, b = weights()
    inputs = keras.Input((8,))
    x = tether.tie(layers.Dense(6, name="first"), kernel=w + a @ b)(inputs)
    x = layers.Dropout(0.5)(layers.BatchNormalization()(x))
    x = tether.tie(layers.Dense(8, name="second"), kernel=(w + a @ b).T)(x)
    model = keras.Model(inputs, layers.Dense(1)(x))
    before = [numpy(v.value).copy() for v in model.variables]
    objects = list(model.variables)
    explanation = planning.explain(model, (16, 8), training=True)
    assert [use.path.split("/")[0] for use in explanation.uses] == ["first", "second"]
    assert [use.input_shape for use in explanation.uses] == [(16, 8), (16, 6)]
    assert all(one is other for one, other in zip(model.variables, objects, strict=True))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable.value), value)
    y = data(4, 8)
    assert numpy(model(y)).shape == (4, 1)


def test_numbers_of_entries_have_a_dtype():
    w, a, b = weights()
    layer = tether.tie(layers.Embedding(8, 6), embeddings=w + a @ b)
    (use,) = planning.explain(layer, (4, 5), dtype="int32").uses
    assert use.input_shape == (4, 5)
    (other,) = planning.explain(layer, (4, 5)).uses
    assert other.plan.name == use.plan.name


def test_a_layer_without_plans_says_so():
    assert "no plan" in str(planning.explain(layers.Dense(3), (2, 4)))
    layer = tether.tie(layers.Dense(6), kernel=weights()[0])
    assert "no plan" in str(planning.explain(layer, (2, 8)))


def test_bad_arguments_are_refused():
    layer, *_ = make_layer()
    with pytest.raises(TetherError, match="layer or a model"):
        planning.explain("dense", (2, 8))
    for shape in (8, None, ("a", 8), (2, 8.5, object())):
        with pytest.raises(TetherError, match="shape reads like"):
            planning.explain(layer, shape)


def test_an_explanation_leaves_no_scope_behind():
    layer, *_ = make_layer()
    planning.explain(layer, (2, 8), training=True)
    assert control.assumed_training() is None
    with pytest.raises(Exception, match=r"shape|incompatible|size"):
        planning.explain(layer, (2, 9))
    assert control.assumed_training() is None
    _, grads = gradients(lambda: keras.ops.sum(layer(data(2, 8))), [layer.bias])
    assert_close(as_zero(grads[0], (6,)), np.full(6, 2.0))

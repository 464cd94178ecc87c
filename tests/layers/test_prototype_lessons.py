"""What broke a prototype of Tether, one test each, so that it does not break again."""

import warnings

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, gradients, numpy
from tether.layers.tying.state import View


def tied_dense(weight, units=4, **kwargs):
    layer = tether.tie(keras.layers.Dense(units, **kwargs), kernel=weight)
    layer.build((None, weight.shape[0]))
    return layer


@keras.saving.register_keras_serializable(package="lessons")
class Keeper(keras.layers.Layer):
    """Puts its variables into containers of its own."""

    def build(self, shape):
        a = self.add_weight(name="a", shape=(4,))
        b = self.add_weight(name="b", shape=(4,))
        self.listed, self.mapped = [a, b], {"a": a}

    def call(self, inputs):
        return inputs * self.listed[0] + self.mapped["a"] + self.listed[1]


@pytest.mark.parametrize("built", [False, True])
def test_views_in_a_list_or_a_dict_of_the_layer_are_not_tracked(built, rng):
    w = tether.Weight(rng.normal(size=(4,)).astype("float32"), name="w")
    layer = Keeper()
    if built:
        layer.build((None, 4))
    tether.tie(layer, a=w)
    x = np.ones((2, 4), "float32")
    y = layer(x)
    assert isinstance(layer.listed[0], View) and isinstance(layer.mapped["a"], View)
    assert len(layer.weights) == 2 and layer.count_params() == 8
    assert not any(isinstance(v, View) for v in layer.trainable_variables)
    assert_close(y, x * w.numpy() + w.numpy() + numpy(layer.listed[1].value))


def test_a_normalization_is_refused_because_it_computes_with_constants(rng):
    norm = keras.layers.Normalization()
    norm.adapt(rng.normal(2.0, 3.0, size=(64, 4)).astype("float32"))
    with pytest.raises(tether.TetherError, match="constants that it derives"):
        tether.weight_of(norm, "mean")
    assert type(norm) is keras.layers.Normalization


@keras.saving.register_keras_serializable(package="lessons")
class ExtraState(keras.layers.Dense):
    """Saves something of its own beside what Keras saves."""

    counter = 0

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["counter"] = np.array(self.counter)

    def load_own_variables(self, store):
        self.counter = int(np.array(store["counter"]))
        rest = {key: store[key] for key in store.keys() if key != "counter"}  # noqa: SIM118
        super().load_own_variables(rest)


def test_a_users_extra_state_is_kept(tmp_path):
    model = keras.Sequential([keras.Input((4,)), tether.tie(ExtraState(4), kernel=tether.Weight(name="w"))])
    model.layers[0].counter = 5
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.layers[0].counter == 5
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_weights_are_listed_in_the_order_of_the_base():
    gamma = tether.Weight(name="gamma")
    norm = tether.tie(keras.layers.LayerNormalization(), gamma=gamma)
    norm.build((None, 3))
    norm.set_weights([np.full(3, 2.0), np.full(3, 5.0)])
    assert np.array_equal(gamma.numpy(), np.full(3, 2.0)) and np.array_equal(numpy(norm.beta.value), np.full(3, 5.0))


@pytest.mark.parametrize("name", ["kernel", "recurrent_kernel"])
def test_an_lstm_cell_without_bias_keeps_kernel_and_recurrent_kernel_apart(name, rng):
    plain = keras.layers.LSTMCell(4, use_bias=False)
    plain.build((None, 4))
    tied = keras.layers.LSTMCell(4, use_bias=False)
    tether.tie(tied, {name: tether.Weight(name="w")})
    tied.build((None, 4))
    values = [rng.normal(size=(4, 16)).astype("float32") for _ in range(2)]
    for cell in (plain, tied):
        cell.set_weights(values)
    x, state = rng.normal(size=(2, 4)).astype("float32"), [np.ones((2, 4), "float32")] * 2
    assert_close(tied(x, state)[0], plain(x, state)[0])


@pytest.mark.parametrize("tied_names", ["kernel recurrent_kernel bias", "recurrent_kernel bias", "bias kernel", "bias"])
@pytest.mark.parametrize("kind", [keras.layers.LSTMCell, keras.layers.GRUCell, keras.layers.SimpleRNNCell])
def test_weights_that_are_tied_before_the_build_are_listed_in_the_order_of_the_base(kind, tied_names):
    plain, cell = kind(3), kind(3)
    plain.build((None, 2))
    weights = {name: tether.Weight(name=f"w_{name}") for name in tied_names.split()}
    tether.tie(cell, weights)
    cell.build((None, 2))
    assert [variable.shape for variable in cell.weights] == [variable.shape for variable in plain.weights]
    names = ["kernel", "recurrent_kernel", "bias"]
    expected = [weights[name].variable if name in weights else getattr(cell, name) for name in names]
    assert all(found is wanted for found, wanted in zip(cell.weights, expected, strict=True))
    values = [np.random.default_rng(7).normal(size=variable.shape) for variable in plain.weights]
    plain.set_weights(values), cell.set_weights(values)
    x, state = np.ones((2, 2), "float32"), [np.ones((2, 3), "float32")] * (2 if kind is keras.layers.LSTMCell else 1)
    assert_close(cell(x, state)[0], plain(x, state)[0])


def test_enable_lora_is_refused_and_changes_nothing():
    w = tether.Weight((4, 4), "ones", name="w")
    layer = tied_dense(w)
    with pytest.raises(tether.TetherError, match="low-rank part as an expression"):
        layer.enable_lora(2)
    assert w.trainable and len(layer.weights) == 2


def test_quantize_keeps_the_tie():
    w = tether.Weight((4, 4), "ones", name="w")
    layer, other = tied_dense(w), tied_dense(w.T)
    layer.quantize("int8")
    assert layer.quantization_mode is None and isinstance(layer.kernel, View)
    assert set(other.kernel.expression.weights_used()) == set(layer.kernel.expression.weights_used())
    assert [keras.backend.standardize_dtype(v.dtype) for v in w.variables] == ["int8", "float32"]


def test_quantize_of_a_model_does_not_pass_over_tied_layers():
    inputs = keras.Input((4,))
    w = tether.Weight(name="w")
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=w)(inputs))
    plain = tether.materialize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns that an input layer cannot be quantised
        model.quantize("int8")
        plain.quantize("int8")
    assert w.became is not None
    assert plain.layers[-1].quantization_mode == "int8"


def test_a_quantized_layer_cannot_be_tied():
    layer = keras.layers.Dense(4)
    layer.build((None, 4))
    layer.quantize("int8")
    with pytest.raises(tether.TetherError, match="quantised"):
        tether.tie(layer, kernel=tether.Weight((4, 4), "ones"))
    born = keras.layers.Dense(4, dtype="int8_from_float32")
    with pytest.raises(tether.TetherError, match="quantised"):
        tether.tie(born, kernel=tether.Weight((4, 4), "ones"))


def test_a_float32_weight_in_a_pure_bfloat16_layer_gives_bfloat16():
    w = tether.Weight((4, 4), "ones", name="w")
    layer = tied_dense(w, dtype="bfloat16")
    y = layer(np.ones((2, 4), "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert w.dtype == "float32"


def test_a_bfloat16_weight_in_a_float32_layer_gives_float32():
    w = tether.Weight((4, 4), "ones", dtype="bfloat16", name="w")
    assert keras.backend.standardize_dtype(tied_dense(w)(np.ones((2, 4), "float32")).dtype) == "float32"


def test_bidirectional_around_a_tied_layer_is_refused_and_named():
    lstm = tether.tie(keras.layers.LSTM(3), {"cell/kernel": tether.Weight((4, 12), "ones")})
    with pytest.raises(tether.TetherError, match="Tie from outside"):
        keras.layers.Bidirectional(lstm)


def test_bidirectional_tied_by_path_shares_and_saves(tmp_path, rng):
    w = tether.Weight(name="w")
    both = tether.tie(
        keras.layers.Bidirectional(keras.layers.LSTM(3)),
        {"forward_layer/cell/kernel": w, "backward_layer/cell/kernel": w},
    )
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, both(inputs))
    assert len(model.weights) == 5
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert len(loaded.weights) == 5
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    assert_close(loaded(x), model(x), 0)


def test_nnx_mode_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(tether.keras_seam, "is_nnx_enabled", lambda: True)
    with pytest.raises(tether.TetherError, match="NNX"):
        tether.tie(keras.layers.Dense(4), kernel=tether.Weight((4, 4), "ones"))


def test_a_plain_parent_that_reads_a_view_does_not_step_it_twice(rng):
    """The parent lists the view; `unique` and the optimizer's own list are the stored variables."""
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    inner = tied_dense(w)
    assert [v.path for v in tether.inspection.unique([inner.kernel, w.variable])] == [w.variable.path]


def test_recurrent_kernels_are_computed_once_a_call_outside_the_time_loop(rng):
    a = tether.Weight((3, 1), "ones", name="a")
    b = tether.Weight((1, 12), "zeros", name="b")
    base = tether.Weight(rng.normal(size=(3, 12)).astype("float32"), name="base")
    counter.calls = 0
    lstm = tether.tie(keras.layers.LSTM(3), {"cell/recurrent_kernel": tether.ops.apply(counter, base + a @ b)})
    x = rng.normal(size=(2, 6, 4)).astype("float32")
    lstm(x)
    counter.calls = 0
    lstm(x)
    assert counter.calls == 1
    plain = keras.layers.LSTM(3)
    plain.build(x.shape)
    plain.set_weights([numpy(lstm.cell.kernel.value), base.numpy(), numpy(lstm.cell.bias.value)])
    assert_close(lstm(x), plain(x))


@keras.saving.register_keras_serializable(package="lessons")
def counter(x):
    counter.calls += 1
    return keras.ops.add(x, 0.0)


def test_an_expression_used_by_two_layers_is_computed_once_a_call_of_the_model(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    counter.calls = 0
    expression = tether.ops.apply(counter, w)
    inputs = keras.Input((4,))
    outputs = inputs
    for _ in range(3):
        outputs = tether.tie(keras.layers.Dense(4), kernel=expression)(outputs)
    model = keras.Model(inputs, outputs)
    counter.calls = 0
    model(np.ones((2, 4), "float32"))
    assert counter.calls == 1
    w.assign(np.zeros((4, 4)))
    counter.calls = 0
    y = model(np.ones((2, 4), "float32"))
    assert counter.calls == 1
    assert np.array_equal(numpy(y), np.zeros((2, 4)))


@pytest.mark.parametrize("planned", ["materialize", "factored", "auto"])
def test_a_value_of_a_traced_branch_is_not_used_outside_of_it(planned, rng):
    """JAX traces the branches of a condition within a call that runs eagerly, with the same stored tensors."""
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    inner = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=2.0 * w + w @ w)

    class Branching(keras.layers.Layer):
        def call(self, x):
            y = keras.ops.cond(keras.ops.sum(x) > 0, lambda: inner(x), lambda: inner(2 * x))
            return y + inner(x)

    layer, x = Branching(), np.abs(rng.normal(size=(2, 4))).astype("float32")
    layer.inner = inner
    with tether.planning.force(planned):
        for _ in range(2):
            assert_close(layer(x), 2 * x @ (2 * w.numpy() + w.numpy() @ w.numpy()), 1e-4)


def test_a_value_computed_without_gradients_is_not_used_where_gradients_are_wanted(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    layer = tied_dense(tether.Weight((4, 4), "zeros", name="z"), use_bias=False)
    tether.tie(layer, kernel=2.0 * w)

    @keras.saving.register_keras_serializable(package="lessons", name="Twice")
    class Twice(keras.layers.Layer):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def call(self, x):
            if keras.backend.backend() == "torch":
                import torch

                with torch.no_grad():
                    target = self.layer(x)
            else:
                target = keras.ops.stop_gradient(self.layer(x))
            return self.layer(x) - 0.5 * target

    twice = Twice(layer)
    x = np.ones((1, 4), "float32")
    _, (grad,) = gradients(lambda: keras.ops.sum(twice(x)), [w.variable])
    assert_close(grad, np.full((4, 4), 2.0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_time_distributed(wrapped, rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    dense = keras.layers.Dense(4, use_bias=False)
    if wrapped:
        layer = tether.tie(keras.layers.TimeDistributed(dense), {"layer/kernel": 2.0 * w})
    else:
        layer = keras.layers.TimeDistributed(tether.tie(dense, kernel=2.0 * w))
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    assert_close(layer(x), x @ (2.0 * w.numpy()), 1e-4)
    model = keras.Sequential([keras.Input((3, 4)), layer])
    clone = keras.models.clone_model(model)
    assert len(clone.weights) == 1


def test_lazy_build_in_fit(rng):
    w = tether.Weight(name="w")
    model = keras.Sequential(
        [tether.tie(keras.layers.Dense(4), kernel=w), tether.tie(keras.layers.Dense(4), kernel=w.T)]
    )
    model.compile("adam", "mse")
    x = rng.normal(size=(8, 4)).astype("float32")
    model.fit(x, x, epochs=2, verbose=0)
    assert len(model.weights) == 3 and w.shape == (4, 4)


def test_saved_model_export(tmp_path, rng):
    if keras.backend.backend() == "torch":
        import torch

        w = tether.Weight((4, 4), "ones", name="w")
        inputs = keras.Input((4,))
        model = keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=w.T)(inputs))
        x = torch.ones((2, 4))
        exported = torch.export.export(model, (x,), strict=False)
        assert_close(exported.module()(x).detach(), model(x).detach())
        return
    import tensorflow as tf

    w = tether.Weight((4, 4), "ones", name="w")
    inputs = keras.Input((4,))
    hidden = tether.tie(keras.layers.Dense(4), kernel=w)(inputs)
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=w.T)(hidden))
    model.export(tmp_path / "saved", verbose=False)
    x = rng.normal(size=(2, 4)).astype("float32")
    artifact = tf.saved_model.load(str(tmp_path / "saved"))
    assert_close(np.asarray(artifact.serve(x)), model(x))


def test_tensorflow_checkpoints_and_saved_models(tmp_path, rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    inputs = keras.Input((4,))
    built = keras.layers.Dense(4)
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=w)(built(inputs)))
    tether.tie(built, kernel=w.T)
    if keras.backend.backend() != "tensorflow":
        return  # TensorFlow's own formats are there with its backend only
    import tensorflow as tf

    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    value = w.numpy()
    w.assign(np.zeros((4, 4)))
    tf.train.Checkpoint(model=model).restore(path)
    assert np.array_equal(w.numpy(), value)
    tf.saved_model.save(model, str(tmp_path / "sm"))


def test_torch_sees_each_parameter_once(rng):
    w = tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="w")
    inputs = keras.Input((4,))
    hidden = tether.tie(keras.layers.Dense(4), kernel=w)(inputs)
    model = keras.Model(inputs, tether.tie(keras.layers.Dense(4), kernel=w.T)(hidden))
    if keras.backend.backend() == "torch":
        assert len(list(model.parameters())) == 3
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        assert w.variable.path in names
    assert len(model.variables) == 3


def test_torch_forgets_the_parameter_that_a_tie_replaced(rng):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4, name="a")(inputs)
    inner = keras.Model(inputs, keras.layers.Dense(4, name="b")(hidden))
    outer = keras.Sequential([keras.Input((4,)), inner])
    tether.tie(inner.get_layer("b"), kernel=tether.weight_of(inner.get_layer("a"), "kernel").T)
    assert [len(m.variables) for m in (inner, outer)] == [3, 3]
    if keras.backend.backend() == "torch":
        for model in (inner, outer):
            assert len(list(model.parameters())) == 3
            assert not any("b/kernel" in name for name in model.state_dict())


def test_torch_lists_the_new_weight_of_a_layer_in_a_model(rng):
    inputs = keras.Input((4,))
    layer = keras.layers.Dense(4)
    model = keras.Model(inputs, layer(inputs))
    old, new = layer.kernel, tether.Weight(rng.normal(size=(4, 4)).astype("float32"), name="new")
    tether.tie(layer, kernel=2.0 * new)
    assert [v.path for v in model.variables] == [new.variable.path, layer.bias.path]
    if keras.backend.backend() == "torch":
        found = {id(parameter) for parameter in model.parameters()}
        assert found == {id(new.variable.value), id(layer.bias.value)} and id(old.value) not in found

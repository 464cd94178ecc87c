"""What is no tensor never becomes one silently: the same error on every backend, and it names `.value`."""

import os

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close
from tether.errors import NotATensor

X = np.random.default_rng(0).random((4, 8)).astype("float32")
VALUES = np.random.default_rng(1).random((8, 8)).astype("float32")


def tensor(value=X):
    return keras.ops.convert_to_tensor(value)


def weight():
    return tether.Weight(VALUES, name="w")


EXPRESSIONS = {
    "a weight": weight,
    "an expression": lambda: 2.0 * weight().T,
    "a form on a weight": lambda: weight() + tether.low_rank(2),
    "an argument": lambda: weight() * tether.weights.Argument("strength", default=1.0),
}


def native_product(x, w):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.matmul(x, w)
    if keras.backend.backend() == "torch":
        import torch

        return torch.matmul(x, w)
    import jax

    return jax.numpy.matmul(x, w)


def native_conversion(w):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(w)
    if keras.backend.backend() == "torch":
        import torch

        return torch.tensor(w)
    import jax

    return jax.numpy.asarray(w)


def compiled_product(w):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x: keras.ops.matmul(x, w))(tensor())
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(lambda x: keras.ops.matmul(x, w))(tensor())
    return keras.ops.matmul(tensor(), w)


class Computes(keras.layers.Layer):
    """A layer that computes with something it holds, as it is told."""

    def __init__(self, held, compute):
        super().__init__()
        self.held, self.compute = held, compute

    def call(self, x):
        return self.compute(x, self.held)


def built_dense():
    layer = keras.layers.Dense(8, use_bias=False)
    layer.build((None, 8))
    return layer


EAGER = {
    "keras.ops.matmul(array, w)": lambda w: keras.ops.matmul(X, w),
    "keras.ops.matmul(tensor, w)": lambda w: keras.ops.matmul(tensor(), w),
    "keras.ops.matmul(w, tensor)": lambda w: keras.ops.matmul(w, tensor(X.T)),
    "keras.ops.einsum": lambda w: keras.ops.einsum("ij,jk->ik", tensor(), w),
    "keras.ops.where": lambda w: keras.ops.where(tensor(VALUES) > 0.5, w, 0.0),
    "keras.ops.concatenate": lambda w: keras.ops.concatenate([tensor(VALUES), w]),
    "keras.ops.stack": lambda w: keras.ops.stack([w, w]),
    "keras.ops.sum": lambda w: keras.ops.sum(w),
    "keras.ops.relu": lambda w: keras.ops.relu(w),
    "keras.ops.take": lambda w: keras.ops.take(w, [0], axis=0),
    "keras.ops.cast": lambda w: keras.ops.cast(w, "float16"),
    "keras.ops.stop_gradient": lambda w: keras.ops.stop_gradient(w),
    "keras.ops.convert_to_tensor": lambda w: keras.ops.convert_to_tensor(w),
    "keras.ops.convert_to_tensor, a list": lambda w: keras.ops.convert_to_tensor([w, w]),
    "keras.ops.convert_to_numpy": lambda w: keras.ops.convert_to_numpy(w),
    "the backend's product": lambda w: native_product(tensor(), w),
    "the backend's conversion": native_conversion,
    "a compiled function": compiled_product,
    "numpy.asarray": lambda w: np.asarray(w),
    "numpy.dot": lambda w: np.dot(X, w),
    "len": lambda w: len(w),
    "a layer's inputs": lambda w: keras.layers.Dense(3)(w),
    "one of a layer's inputs": lambda w: keras.layers.Add()([tensor(VALUES), w]),
    "a model's inputs": lambda w: keras.Sequential([keras.layers.Dense(3)]).predict(w, verbose=0),
    "a variable's assign": lambda w: built_dense().kernel.assign(w),
    "a layer's set_weights": lambda w: built_dense().set_weights([w]),
    "another weight's assign": lambda w: tether.Weight((8, 8), "zeros").assign(w),
    "in call, keras.ops": lambda w: Computes(w, lambda x, w: keras.ops.matmul(x, w))(X),
    "in call, an operator on the right": lambda w: Computes(w, lambda x, w: x @ w)(X),
    "in call, an operator on the left": lambda w: Computes(w, lambda x, w: w + x)(VALUES),
    "in call, tether.ops": lambda w: Computes(w, tether.ops.matmul)(X),
    "in call, returned and used": lambda w: keras.layers.Dense(2)(Computes(w, lambda x, w: w)(X)),
}

GRAPH = {
    "keras.ops.matmul(x, w)": lambda x, w: keras.ops.matmul(x, w),
    "keras.ops.matmul(w, x)": lambda x, w: keras.ops.matmul(w, keras.ops.transpose(x)),
    "keras.ops.where": lambda x, w: keras.ops.where(x > 0, w, 0.0),
    "keras.ops.concatenate": lambda x, w: keras.ops.concatenate([x, w], axis=0),
    "keras.ops.einsum": lambda x, w: keras.ops.einsum("bi,ij->bj", x, w),
    "x @ w": lambda x, w: x @ w,
    "w @ x": lambda x, w: w @ keras.ops.transpose(x),
    "x + w": lambda x, w: x + w,
    "w + x": lambda x, w: w + x,
    "x * w": lambda x, w: x * w,
    "w * x": lambda x, w: w * x,
    "x - w": lambda x, w: x - w,
    "w / x": lambda x, w: w / x,
    "x > w": lambda x, w: x > w,
    "tether.ops": lambda x, w: tether.ops.matmul(x, w),
    "a layer's inputs": lambda x, w: keras.layers.Add()([x, w]),
    "in call, keras.ops": lambda x, w: Computes(w, lambda x, w: keras.ops.matmul(x, w))(x),
    "in call, an operator": lambda x, w: Computes(w, lambda x, w: x @ w)(x),
    "in call, returned": lambda x, w: Computes(w, lambda x, w: w)(x),
    "a model's outputs": lambda x, w: keras.Model(x, w),
    "a model's inputs": lambda x, w: keras.Model(w, x),
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("use", EAGER)
def test_what_computes_with_tensors_refuses_an_expression_and_names_its_value(use, expression):
    with pytest.raises(tether.TetherError, match=r"\.value"):
        EAGER[use](EXPRESSIONS[expression]())


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("use", GRAPH)
def test_a_graph_with_an_expression_in_it_is_refused_when_it_is_made(use, expression):
    inputs = keras.Input((8,), batch_size=8)
    with pytest.raises(tether.TetherError, match=r"\.value"):
        keras.Model(inputs, GRAPH[use](inputs, EXPRESSIONS[expression]()))


@pytest.mark.parametrize("inputs", [X, tensor(), keras.Input((8,))], ids=["array", "tensor", "symbolic"])
def test_a_weight_is_a_layer_that_is_not_called(inputs):
    for call in (weight(), keras.Sequential([weight()])):
        with pytest.raises(tether.TetherError, match=r"called.*\.value.*tether\.tie"):
            call(inputs)


FORMS = {
    "added": tether.low_rank(2),
    "scaling": tether.forms.scale(),
    "of a weight": tether.forms.orthogonal(),
    "of a layer": tether.forms.compose(3),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_no_tensor_either(form):
    for use in (
        lambda f: keras.ops.matmul(X, f),
        lambda f: keras.ops.matmul(keras.Input((8,)), f),
        lambda f: keras.Input((8,)) @ f,
        lambda f: keras.ops.convert_to_tensor(f),
        lambda f: keras.layers.Dense(2)(f),
    ):
        with pytest.raises(tether.TetherError, match="is a form"):
            use(FORMS[form])


def test_the_ways_that_the_errors_name_work(tmp_path):
    w = weight()
    inputs = keras.Input((8,))
    tied = tether.tie(keras.layers.Dense(8, use_bias=False), kernel=w)
    models = {
        "tie": keras.Model(inputs, tied(inputs)),
        "Lambda": keras.Model(inputs, tether.Lambda(product, w=w)(inputs)),
        "a layer of one's own": keras.Sequential([inputs, Computes(w, lambda x, w: keras.ops.matmul(x, w.value))]),
    }
    for factor in (1.0, 2.0):
        w.assign(factor * VALUES)
        for name, model in models.items():
            assert_close(model(X), factor * X @ VALUES)
            assert model.count_params() == 64, name
    for name in ("tie", "Lambda"):
        path = os.path.join(tmp_path, f"{name}.keras")
        models[name].save(path)
        assert_close(keras.saving.load_model(path)(X), 2.0 * X @ VALUES)


@keras.saving.register_keras_serializable("tether_tests_conversion")
def product(x, w):
    return keras.ops.matmul(x, w)


def test_tensors_outside_calls_stay_constants_of_expressions():
    w = weight()
    assert_close((tensor() @ w).value, X @ VALUES)
    w.assign(2 * VALUES)
    assert_close((tensor(VALUES) - w).value, -VALUES)


def test_layers_take_weights_in_their_constructors_as_before():
    w = weight()

    class Holds(keras.layers.Layer):
        def __init__(self, table, others=(), **kwargs):
            super().__init__(**kwargs)
            self.table, self.others = table, list(others)

        def call(self, x):
            return keras.ops.matmul(x, self.table.value)

    layer = Holds(w, others=[weight(), weight()])
    assert_close(layer(X), X @ VALUES)
    assert len(layer.weights) == 3


def test_the_error_is_a_type_error_too():
    with pytest.raises(TypeError):
        keras.ops.matmul(X, weight())
    assert issubclass(NotATensor, tether.TetherError)

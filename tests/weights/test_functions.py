"""Functions of ordinary Keras code applied to expressions: shapes, dtypes and values are NumPy's, on every backend."""

import os

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy

registered = keras.saving.register_keras_serializable("tether_tests_functions")

SQUARE = np.random.default_rng(0).random((4, 4)).astype("float32")
ROW = np.arange(1, 5, dtype="float32")
INTEGERS = np.array([[1, -2], [3, 4]], "int32")
EYE = keras.ops.convert_to_tensor(np.eye(4, dtype="float32"))


@registered
def cayley(x):
    eye = keras.ops.eye(x.shape[0])
    return keras.ops.solve(eye + x, eye - x)


@registered
def first_zero(x):
    return keras.ops.concatenate([keras.ops.zeros((1,)), x[1:]])


@registered
def with_a_tensor_of_its_own(x):
    return EYE + x


@registered
def product(x, y):
    return x @ y + 1.0


@registered
def larger_half(x):
    return keras.ops.where(x > 0.5, x, 0.0)


@registered
def columns_as_rows(x):
    return keras.ops.stack([x[:, column] for column in range(x.shape[1])])


@registered
def flat_if_a_matrix(x):
    return keras.ops.reshape(x, (-1,)) if len(x.shape) == 2 else x


@registered
def first_rows(x, count):
    return x[:count]


@registered
def rolled(x, by):
    return keras.ops.roll(x, by, axis=0)


@registered
def picked(x, places):
    return keras.ops.take(x, places, axis=0)


@registered
def dequantized(x):
    return keras.ops.cast(x, "float32") * 0.5


@registered
def doubled_twice(x):
    return keras.ops.fori_loop(0, 2, lambda _, y: y * 2.0, x)


@registered
def from_singular_values(x):
    u, s, v = keras.ops.svd(x, full_matrices=False)
    return keras.ops.matmul(u * s, v)


APPLIED = {
    "a product with an identity": (cayley, [SQUARE], np.linalg.solve(np.eye(4) + SQUARE, np.eye(4) - SQUARE)),
    "a slice": (first_zero, [ROW], np.array([0.0, 2.0, 3.0, 4.0])),
    "a tensor that it has": (with_a_tensor_of_its_own, [SQUARE], np.eye(4) + SQUARE),
    "two operands": (product, [SQUARE, SQUARE], SQUARE @ SQUARE + 1),
    "a comparison": (larger_half, [SQUARE], np.where(SQUARE > 0.5, SQUARE, 0)),
    "a loop over an axis": (columns_as_rows, [SQUARE], SQUARE.T),
    "a branch on the shape": (flat_if_a_matrix, [SQUARE], SQUARE.reshape(-1)),
    "a size that is a number": (first_rows, [SQUARE, 2], SQUARE[:2]),
    "a number": (rolled, [SQUARE, 1], np.roll(SQUARE, 1, 0)),
    "an array of places": (picked, [SQUARE, np.array([2, 0])], SQUARE[[2, 0]]),
    "integers": (dequantized, [INTEGERS], INTEGERS * 0.5),
    "float16": (flat_if_a_matrix, [SQUARE.astype("float16")], SQUARE.astype("float16").reshape(-1)),
    "a loop of the backend": (doubled_twice, [SQUARE], SQUARE * 4),
    "several results inside": (from_singular_values, [SQUARE], SQUARE),
}


def weight_or_constant(operand):
    """Places and numbers stay constants."""
    if not isinstance(operand, np.ndarray) or operand.dtype == np.int64:
        return operand
    return tether.Weight(operand, dtype=str(operand.dtype))


@pytest.mark.parametrize("case", APPLIED)
def test_a_function_of_ordinary_keras_code_has_numpys_values(case):
    function, operands, wanted = APPLIED[case]
    expression = tether.ops.apply(function, *map(weight_or_constant, operands))
    found = numpy(expression.value)
    assert expression.shape == found.shape == wanted.shape
    assert expression.dtype == str(found.dtype)
    np.testing.assert_allclose(found.astype("float32"), wanted, atol=1e-4)


def test_layers_with_applied_functions_train_save_load_and_clone(tmp_path):
    kernel, bias = tether.Weight(SQUARE, name="kernel"), tether.Weight(ROW, name="bias")
    layer = tether.tie(
        keras.layers.Dense(4, name="dense"),
        kernel=tether.ops.apply(cayley, kernel),
        bias=tether.ops.apply(first_zero, bias) * 2.0,
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile("sgd", "mse")
    x = np.ones((8, 4), "float32")
    model.fit(x, np.zeros((8, 4)), verbose=0)
    stored_kernel, stored_bias = kernel.numpy(), bias.numpy()
    assert not np.array_equal(stored_kernel, SQUARE)
    assert stored_bias[0] == ROW[0]  # no gradient comes through what the function drops
    path = os.path.join(tmp_path, "model.keras")
    model.save(path)
    cloned = keras.models.clone_model(model)
    cloned.set_weights(model.get_weights())
    wanted = np.linalg.solve(np.eye(4) + stored_kernel, np.eye(4) - stored_kernel)
    for made in (model, keras.saving.load_model(path), tether.files.load_model(path), cloned):
        assert_close(made.layers[0].kernel, wanted, 1e-4)
        assert_close(made.layers[0].bias, np.concatenate([[0], stored_bias[1:]]) * 2, 1e-4)
        assert_close(made(x), model(x), 1e-4)


def test_a_function_of_weights_that_get_their_shape_late_is_known_then():
    wide = tether.Weight(name="wide")
    expression = tether.ops.apply(product, wide, wide.T) + 0.0
    assert expression.shape is None
    tether.tie(keras.layers.Dense(5), kernel=wide).build((None, 3))
    assert (expression.shape, expression.dtype) == ((3, 3), "float32")
    assert_close(expression.value, wide.numpy() @ wide.numpy().T + 1)


@registered
def no_matrices_of_that_size(x):
    return keras.ops.matmul(x, keras.ops.ones((7, 7)))


class Peculiar(Exception):
    def __init__(self, what, number):
        super().__init__(f"{what} {number}")


@registered
def peculiar_error(x):
    raise Peculiar("peculiar", 3)


@registered
def nothing(x):
    return None


@registered
def a_number(x):
    return 1.0


@registered
def an_array(x):
    return np.ones(3, "float32")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (no_matrices_of_that_size, "could not be found.*7"),
        (peculiar_error, "could not be found: Peculiar: peculiar 3"),
        (nothing, "one tensor.*NoneType"),
        (a_number, "one tensor.*float"),
        (an_array, "one tensor.*ndarray"),
    ],
)
def test_a_function_that_fails_says_so_when_it_is_applied(function, says):
    with pytest.raises(tether.TetherError, match=rf"(?s){says}"):
        tether.ops.apply(function, tether.Weight(SQUARE))


@registered
def entries_above_a_half(x):
    return x[x > 0.5]


def test_a_shape_that_depends_on_values_is_refused():
    with pytest.raises(tether.TetherError, match="shape"):
        numpy(tether.ops.apply(entries_above_a_half, tether.Weight(SQUARE)).value)

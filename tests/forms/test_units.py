"""The forms that make a child with other units than its parent: compose and concatenate."""

import keras
import numpy as np
import pytest

import tether
from tests.support import assert_close, numpy
from tether import forms
from tether.errors import ShapeMismatch, TetherError, Unsupported

PARENTS = {
    "dense": (lambda **k: keras.layers.Dense(4, **k), (5, 3)),
    "dense without a bias": (lambda **k: keras.layers.Dense(4, use_bias=False, **k), (5, 3)),
    "einsum": (lambda **k: keras.layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", **k), (5, 2, 3)),
    "einsum without a bias": (lambda **k: keras.layers.EinsumDense("...c,cd->...d", 4, **k), (5, 3)),
    "einsum of heads": (
        lambda **k: keras.layers.EinsumDense("abc,chd->abhd", (None, 2, 4), bias_axes="hd", **k),
        (5, 2, 3),
    ),
    "convolution of one axis": (lambda **k: keras.layers.Conv1D(4, 3, strides=2, **k), (5, 8, 3)),
    "convolution of two axes": (lambda **k: keras.layers.Conv2D(4, 3, padding="same", **k), (5, 6, 6, 3)),
    "convolution of three axes": (lambda **k: keras.layers.Conv3D(4, 2, use_bias=False, **k), (2, 3, 3, 3, 3)),
}


def parent_of(kind, **config):
    make, shape = PARENTS[kind]
    layer = make(**config)
    layer.build(shape)
    rng = np.random.default_rng(2)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    return layer, rng.normal(size=shape).astype("float32")


def own_weights(child, parent):
    shared = {id(variable) for variable in parent.weights}
    return [variable for variable in child.weights if id(variable) not in shared]


def randomized(variables, seed=4):
    rng = np.random.default_rng(seed)
    for variable in variables:
        variable.assign(rng.normal(size=variable.shape))


@pytest.mark.parametrize("kind", PARENTS)
def test_a_composed_child_goes_on_where_its_parent_ends(kind):
    parent, x = parent_of(kind)
    child = tether.inherit(parent, forms.compose(5, activation="tanh"))
    assert type(child).__name__ == type(parent).__name__
    matrix, bias = own_weights(child, parent)
    assert matrix.shape == (4, 5)
    np.testing.assert_array_equal(bias.numpy(), 0)
    randomized([matrix, bias])
    assert_close(child(x), np.tanh(numpy(parent(x)) @ matrix.numpy() + bias.numpy()), 1e-4)


@pytest.mark.parametrize("kind", PARENTS)
def test_a_composed_child_without_a_bias_of_its_own_keeps_its_parents(kind):
    parent, x = parent_of(kind)
    child = tether.inherit(parent, forms.compose(2, use_bias=False))
    (matrix,) = own_weights(child, parent)
    assert_close(child(x), numpy(parent(x)) @ matrix.numpy(), 1e-4)


@pytest.mark.parametrize("kind", PARENTS)
def test_a_concatenated_childs_first_outputs_are_its_parents(kind):
    parent, x = parent_of(kind, activation="relu")
    child = tether.inherit(parent, forms.concatenate(3))
    own = own_weights(child, parent)
    assert len(own) == len(parent.weights)
    randomized(own)
    outputs, wanted = numpy(child(x)), numpy(parent(x))
    assert outputs.shape == (*wanted.shape[:-1], 7)
    np.testing.assert_allclose(outputs[..., :4], wanted, rtol=1e-5, atol=1e-5)
    beside = type(parent).from_config(plain_config(child))
    beside.build(x.shape)
    beside.set_weights([numpy(child.kernel.value)] + ([numpy(child.bias.value)] if len(own) == 2 else []))
    assert_close(outputs, beside(x), 1e-4)


def plain_config(child):
    return {key: value for key, value in child.get_config().items() if key not in ("tether", "name")}


@pytest.mark.parametrize(
    "form", [lambda: forms.compose(5), lambda: forms.concatenate(5)], ids=["compose", "concatenate"]
)
@pytest.mark.parametrize("kind", ["dense", "einsum of heads", "convolution of two axes"])
def test_a_child_trains_saves_and_goes_on(form, kind, tmp_path):
    parent, x = parent_of(kind)
    parent.trainable = False
    before = [numpy(variable) for variable in parent.weights]
    child = tether.inherit(parent, form())
    model = keras.Sequential([keras.Input(x.shape[1:]), child])
    y = np.random.default_rng(6).normal(size=numpy(model(x)).shape).astype("float32")
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=3, batch_size=8, shuffle=False, verbose=0)
    for mine, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-6, err_msg=mine.path)
    for variable, value in zip(parent.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)
    assert len(model.trainable_variables) == 2


def test_the_notation_of_the_childrens_weights():
    parent = keras.layers.Dense(4, name="parent")
    parent.build((None, 3))
    composed = tether.inherit(parent, forms.compose(2))
    assert composed.kernel.expression.notation() == "parent.kernel @ parent.kernel_compose"
    assert composed.bias.expression.notation() == "parent.bias @ parent.kernel_compose + parent.bias_own"
    longer = tether.inherit(parent, forms.concatenate(2))
    assert longer.kernel.expression.notation() == "concatenate([parent.kernel, parent.kernel_own], axis=-1)"


def test_children_of_a_child():
    parent, x = parent_of("dense")
    grandchild = tether.inherit(tether.inherit(parent, forms.concatenate(2)), forms.compose(3))
    assert grandchild(x).shape == (5, 3)
    assert grandchild.kernel.expression.notation().startswith("concatenate([")


def test_a_child_in_sixteen_bits():
    parent, x = parent_of("dense", dtype="mixed_bfloat16")
    for form in (forms.compose(5), forms.concatenate(5)):
        child = tether.inherit(parent, form)
        assert keras.backend.standardize_dtype(child(keras.ops.convert_to_tensor(x)).dtype) == "bfloat16"


def test_the_parents_constraint_stays_with_the_parent():
    parent, _ = parent_of("dense", kernel_constraint="non_neg")
    assert tether.inherit(parent, forms.concatenate(2)).kernel_constraint is None
    assert isinstance(parent.kernel_constraint, keras.constraints.NonNeg)


# --------------------------------------------------------------------------- what is refused


def test_a_parent_with_an_activation_cannot_be_composed():
    parent, _ = parent_of("dense", activation="relu")
    with pytest.raises(Unsupported, match=r"'relu'.*Stack the layers: `keras.Sequential"):
        tether.inherit(parent, forms.compose(2))


def first_counts_double(x):
    return x + x[..., :1]


@pytest.mark.parametrize(
    "activation",
    ["softmax", "log_softmax", "glu", "sparsemax", first_counts_double, keras.layers.Softmax(), keras.layers.PReLU()],
    ids=["softmax", "log_softmax", "glu", "sparsemax", "of ones own", "Softmax", "PReLU"],
)
def test_an_activation_that_mixes_outputs_cannot_be_concatenated(activation):
    parent = keras.layers.Dense(4, activation=activation)
    with pytest.raises(Unsupported, match=r"depend on each other.*keras.layers.Activation"):
        forms.concatenate(2).layer(parent)


ELEMENTWISE = [
    "relu", "relu6", "elu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid", "hard_sigmoid", "softplus", "softsign",
    "exponential", "leaky_relu", "log_sigmoid", "celu", "hard_tanh", "squareplus", "linear",
]  # fmt: skip


@pytest.mark.parametrize("activation", [*ELEMENTWISE, None, keras.layers.LeakyReLU()], ids=str)
def test_an_elementwise_activation_can_be_concatenated(activation):
    assert forms.concatenate(2).layer(keras.layers.Dense(4, activation=activation)).units == 6


class MyDense(keras.layers.Dense):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Embedding(4, 3), keras.layers.LSTM(4), keras.layers.DepthwiseConv2D(3), MyDense(4), "Dense", None,
        keras.layers.Conv2D(4, 3, groups=2), keras.layers.EinsumDense("ab,cb->ac", 4),
        keras.layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="b"), keras.layers.EinsumDense("ab,b->ab", 4),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
@pytest.mark.parametrize("form", [forms.compose(2), forms.concatenate(2)], ids=["compose", "concatenate"])
def test_a_layer_whose_outputs_are_elsewhere_is_refused(form, layer):
    with pytest.raises(Unsupported, match=r"needs|knows"):
        form.layer(layer)


@pytest.mark.parametrize("form", [forms.compose(2), forms.concatenate(2)], ids=["compose", "concatenate"])
def test_weights_without_a_kernel_are_refused(form):
    with pytest.raises(TetherError, match=r"parent's kernel. Received: weights=\['table'\]"):
        form.weights({"table": tether.Weight((3, 4), "ones")})
    with pytest.raises(TetherError, match="has none yet"):
        form.weights({"kernel": tether.Weight(name="later")})


def test_a_child_of_lora_is_refused():
    parent, _ = parent_of("dense")
    parent.enable_lora(1)
    with pytest.raises(Unsupported, match="LoRA"):
        tether.inherit(parent, forms.concatenate(2))


def test_a_matrix_of_other_rows_does_not_fit():
    with pytest.raises(ShapeMismatch):
        forms.compose(2).weights({"kernel": tether.Weight((3, 4), "ones"), "bias": tether.Weight((5,), "ones")})


def doubled(x):
    return 2 * x


def test_a_childs_activation_is_its_parents_even_if_no_file_could_name_it():
    parent, x = parent_of("dense", activation=doubled)
    child = tether.inherit(parent, forms.concatenate(2))
    assert child.activation is doubled
    assert_close(numpy(child(x))[:, :4], parent(x))

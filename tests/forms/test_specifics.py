"""What single forms promise beyond what all of them do."""

import keras
import numpy as np
import pytest

import tether
from tests.forms.cases import base_weight, own_weights
from tests.support import as_zero, gradients, numpy
from tether import forms
from tether.errors import InvalidConfig, NotInvertible, ShapeMismatch, TetherError
from tether.forms.fourier import Waves
from tether.forms.oft import Turn
from tether.forms.spectral_norm import SpectralNorm
from tether.forms.vera import DrawnByTorch
from tether.weights.codec import decode, encode
from tether.weights.leaves import MAX_CONSTANT


def gradient_of(loss, weight):
    return as_zero(gradients(loss, [weight.variable])[1][0], weight.shape)


# --------------------------------------------------------------------------- arithmetic with forms


@pytest.mark.parametrize("name", ["vera", "hadamard", "kronecker"])
def test_an_added_form_can_be_added_subtracted_and_multiplied(name, rng):
    base = base_weight((6, 4))
    make = {"vera": lambda: forms.vera(3, seed=1), "hadamard": lambda: forms.hadamard(2, seed=1)}
    make["kronecker"] = lambda: forms.kronecker(seed=1)
    changes = []
    for combine in (lambda w, f: w + f, lambda w, f: f + w, lambda w, f: w - f, lambda w, f: w + 0.5 * f):
        expression = combine(base, make[name]())
        own = own_weights(expression, base)
        for place, weight in enumerate(own.values()):
            weight.assign(np.random.default_rng(place).normal(size=weight.shape))
        changes.append(expression.numpy() - base.numpy())
    np.testing.assert_allclose(changes[1], changes[0], atol=1e-6)
    np.testing.assert_allclose(changes[2], -changes[0], atol=1e-6)
    np.testing.assert_allclose(changes[3], changes[0] / 2, atol=1e-6)
    assert np.abs(changes[0]).max() > 0.1


def test_a_weight_can_be_multiplied_with_scale_from_both_sides():
    for multiply in (lambda base: base * forms.scale(), lambda base: forms.scale() * base):
        base = base_weight((6, 4))
        expression = multiply(base)
        own_weights(expression, base)["scale"].assign(np.arange(4.0))
        np.testing.assert_array_equal(expression.numpy(), base.numpy() * np.arange(4, dtype="float32"))


@pytest.mark.parametrize(
    ("axis", "shape"),
    [(-1, (4,)), (2, (4,)), (0, (2, 1, 1)), (1, (3, 1)), ((0, -1), (2, 1, 4)), ((-1, -2), (3, 4)), (None, ())],
)
def test_scale_has_a_factor_for_each_entry_of_its_axes(axis, shape):
    base = base_weight((2, 3, 4))
    expression = forms.scale(axis)(base)
    assert own_weights(expression, base)["scale"].shape == shape
    assert expression.shape == (2, 3, 4)


def test_a_bias_can_have_the_forms_that_need_no_matrix():
    bias = tether.Weight(np.arange(3, dtype="float32"), name="bias")
    for form in (forms.scale(), forms.gate(), forms.gate(per="output"), forms.masked([True, False, True], "parent")):
        np.testing.assert_array_equal(form(bias).numpy(), bias.numpy())


# --------------------------------------------------------------------------- vera


def test_one_vera_form_shares_its_frozen_bases_between_all_weights():
    form = forms.vera(3, size=(9, 7), seed=1)
    first, second = base_weight((6, 4)), base_weight((9, 7), seed=8)
    kernels = [form(first), form(second)]
    own = [own_weights(kernel, base) for kernel, base in zip(kernels, (first, second), strict=True)]
    assert own[0]["a"] is own[1]["a"]
    assert own[0]["b"] is own[1]["b"]
    assert own[0]["vera_d"] is not own[1]["vera_d"]
    assert own[0]["a"].shape == (9, 3)
    assert own[0]["b"].shape == (3, 7)
    np.testing.assert_array_equal(own[0]["vera_d"].numpy(), np.full(3, np.float32(0.1)))


def test_the_first_weight_gives_veras_bases_their_size():
    form = forms.vera(3)
    form(base_weight((6, 4)))
    assert form(base_weight((5, 4))).shape == (5, 4)
    with pytest.raises(ShapeMismatch, match=r"size=\(8, 4\)\)`. Received: rows=8, columns=4"):
        form(base_weight((8, 4)))
    with pytest.raises(ShapeMismatch, match=r"size=\(6, 5\)"):
        form(base_weight((6, 5)))
    with pytest.raises(ShapeMismatch, match=r"size=\(9, 4\)"):
        forms.vera(3, size=(4, 4))(base_weight((9, 4)))


def test_veras_bases_are_stored_once_in_a_model(tmp_path):
    form = forms.vera(16, seed=3)
    layers = []
    for _ in range(3):
        layer = keras.layers.Dense(8)
        layer.build((None, 8))
        tether.tie(layer, kernel=tether.weight_of(layer, "kernel").stop_gradient() + form)
        layers.append(layer)
    model = keras.Sequential([keras.Input((8,)), *layers])
    frozen = {w.path for w in model.non_trainable_weights if "vera_bases" in w.path}
    assert len(frozen) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len([w for w in loaded.non_trainable_weights if "vera_bases" in w.path]) == 2
    assert loaded.count_params() == model.count_params()


def test_veras_bases_are_random_and_differ():
    base = base_weight((5, 5))
    own = own_weights(forms.vera(5, seed=1)(base), base)
    assert not np.array_equal(own["a"].numpy(), own["b"].numpy())
    again = own_weights(forms.vera(5, seed=1)(base), base)
    np.testing.assert_array_equal(own["a"].numpy(), again["a"].numpy())


def test_hadamards_factors_differ_under_one_seed():
    base = base_weight((4, 4))
    own = own_weights(forms.hadamard(4, seed=1)(base), base)
    assert not np.array_equal(own["loha_a1"].numpy(), own["loha_a2"].numpy())
    assert not np.array_equal(own["loha_a1"].numpy(), own["loha_b1"].numpy())


# --------------------------------------------------------------------------- kronecker


@pytest.mark.parametrize(
    ("shape", "factor", "small", "large"),
    [
        ((12, 6), None, (3, 2), (4, 3)), ((16, 16), None, (4, 4), (4, 4)), ((7, 9), None, (1, 3), (7, 3)),
        ((12, 6), 2, (2, 2), (6, 3)), ((12, 6), 6, (2, 1), (6, 6)), ((10, 9), 4, (2, 3), (5, 3)),
    ],
)  # fmt: skip
def test_kroneckers_matrices_divide_the_shape(shape, factor, small, large):
    base = base_weight(shape)
    own = own_weights(forms.kronecker(factor=factor)(base), base)
    assert own["lokr_c"].shape == small
    assert own["lokr_d"].shape == large


@pytest.mark.parametrize(("rank", "is_product"), [(1, True), (2, False), (7, False)])
def test_kroneckers_larger_matrix_is_a_product_only_where_that_is_thin(rank, is_product):
    base = base_weight((12, 6))  # the larger matrix is 4 × 3
    assert ("lokr_a" in own_weights(forms.kronecker(rank)(base), base)) is is_product


# --------------------------------------------------------------------------- dora and weight_norm


def test_doras_norm_is_a_constant_in_the_gradient():
    base = base_weight((6, 4))
    expression = forms.dora(2, seed=1)(base)
    factors = np.random.default_rng(2).normal(size=(6, 4)).astype("float32")
    found = gradient_of(lambda: keras.ops.sum(keras.ops.multiply(expression.value, factors)), base)
    norms = np.linalg.norm(base.numpy(), axis=0)
    np.testing.assert_allclose(found, factors * (norms / norms), rtol=1e-5, atol=1e-5)


def test_doras_lengths_start_at_those_of_the_start():
    base, target = base_weight((6, 4)), np.random.default_rng(9).normal(size=(6, 4)).astype("float32")
    np.testing.assert_allclose(forms.dora(4, start=target)(base).numpy(), target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [forms.weight_norm(), forms.dora(1)], ids=["weight_norm", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_output_whose_weights_are_zero_stays_finite(form, dtype):
    values = np.array([[1.0, 0.0], [2.0, 0.0]], dtype=dtype)
    base = tether.Weight(values, name="w")
    expression = form(base)
    np.testing.assert_allclose(expression.numpy().astype("float32"), values, rtol=2e-3, atol=1e-6)
    gradient = gradient_of(lambda: keras.ops.sum(expression.value), base)
    assert np.isfinite(gradient.astype("float32")).all()


def test_weight_norm_is_computed_in_float32():
    values = np.full((1000, 2), 30.0, dtype="float16")  # the sum of squares is beyond float16
    expression = forms.weight_norm()(tether.Weight(values, name="w"))
    assert expression.dtype == "float16"
    np.testing.assert_allclose(expression.numpy().astype("float32"), 30.0, rtol=2e-3)


def test_weight_norm_changes_direction_and_length_apart():
    base = base_weight((3, 3, 2, 4))
    expression = forms.weight_norm()(base)
    base.assign(7 * base.numpy())
    np.testing.assert_allclose(expression.numpy(), base.numpy() / 7, rtol=1e-5)
    own_weights(expression, base)["g"].assign(np.ones(4))
    np.testing.assert_allclose(np.square(expression.numpy()).sum(axis=(0, 1, 2)), 1, rtol=1e-5)


# --------------------------------------------------------------------------- gate and masked


@pytest.mark.parametrize(("per", "shape"), [("weight", ()), ("output", (2, 3))])
def test_a_gate_starts_at_its_share(per, shape):
    base = base_weight((6, 2, 3))
    expression = forms.gate(start=0.9, per=per)(base)
    own = own_weights(expression, base)
    assert own["gate"].shape == shape
    own["own"].assign(np.zeros((6, 2, 3)))
    np.testing.assert_allclose(expression.numpy(), 0.9 * base.numpy(), rtol=1e-5)


def test_a_mask_lets_no_gradient_through_outside():
    base, mask = base_weight((2, 3)), np.array([[1, 0, 1], [0, 1, 0]])
    for expression, weight in [
        (forms.masked(mask)(base), base),
        ((parent := forms.masked(mask, outside="parent")(base)), own_weights(parent, base)["own"]),
    ]:
        found = gradient_of(lambda expression=expression: keras.ops.sum(expression.value * 3), weight)
        np.testing.assert_array_equal(found, 3 * mask)
    assert base not in tether.weights.expression.live_weights(parent)


def test_a_mask_that_broadcasts():
    base = base_weight((2, 3))
    np.testing.assert_array_equal(forms.masked([1, 0, 1])(base).numpy(), base.numpy() * [1, 0, 1])
    np.testing.assert_array_equal(forms.masked(True)(base).numpy(), base.numpy())


def test_a_mask_too_large_for_a_config_is_stored(tmp_path):
    shape = (1024, MAX_CONSTANT // 1024 + 1)
    mask = np.random.default_rng(1).random(shape) > 0.5
    base = tether.Weight(np.ones(shape, "float32"), name="w")
    expression = forms.masked(mask)(base)
    stored = own_weights(expression, base)["mask"]
    assert not stored.trainable
    assert expression.notation() == "where(w_mask, w, 0.0)"
    layer = tether.tie(keras.layers.Dense(shape[1], use_bias=False), kernel=expression)
    model = keras.Sequential([keras.Input((1024,)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded.layers[0].kernel.value), mask)
    assert len(loaded.trainable_weights) == 1


# --------------------------------------------------------------------------- spectral_norm


def normed_model(w, **settings):
    kernel = forms.spectral_norm(seed=1, **settings)(w)
    layer = tether.tie(keras.layers.Dense(w.shape[1], use_bias=False), kernel=kernel)
    return keras.Sequential([keras.Input((w.shape[0],)), layer]), own_weights(kernel, w)


def test_a_spectral_norm_starts_near_the_norm_and_comes_nearer_with_each_training_call():
    w = base_weight((6, 4))
    model, own = normed_model(w)
    before = w.numpy()
    largest = np.linalg.norm(before, 2)
    apart = []
    for _ in range(40):
        kernel = numpy(model(np.eye(6, dtype="float32"), training=True))
        apart.append(abs(np.linalg.norm(kernel, 2) - 1))
    assert apart[0] < 0.05
    assert apart[-1] < 1e-5
    assert apart[-1] <= apart[0]
    np.testing.assert_array_equal(w.numpy(), before)
    np.testing.assert_allclose(own["v"].numpy() @ before @ own["u"].numpy(), largest, rtol=1e-5)


def test_a_spectral_norms_vectors_start_with_fifteen_rounds():
    # Singular values so near to each other that every round still moves the vectors.
    w = tether.Weight((np.eye(6, 4) * [1.0, 1.02, 0.99, 0.98]).astype("float32"), name="w")
    own = own_weights(forms.spectral_norm(seed=1)(w), w)
    matrix, v = w.numpy().astype("float64"), numpy(keras.random.normal((6,), seed=1)).astype("float64")
    for _ in range(15):
        u = v @ matrix / np.linalg.norm(v @ matrix)
        v = matrix @ u / np.linalg.norm(matrix @ u)
    np.testing.assert_allclose(own["u"].numpy(), u, atol=1e-6)
    np.testing.assert_allclose(own["v"].numpy(), v, atol=1e-6)


def test_inference_does_not_advance_a_spectral_norm():
    w = base_weight((6, 4))
    model, own = normed_model(w)
    w.assign(base_weight((6, 4), seed=20).numpy())
    before = own["u"].numpy(), own["v"].numpy()
    first = numpy(model(np.eye(6, dtype="float32")))
    np.testing.assert_array_equal(first, numpy(model(np.eye(6, dtype="float32"), training=False)))
    np.testing.assert_array_equal(own["u"].numpy(), before[0])
    model(np.eye(6, dtype="float32"), training=True)
    assert not np.array_equal(own["u"].numpy(), before[0])


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_training_call_is_so_many_rounds_of_the_power_iteration(iterations):
    w = base_weight((6, 4))
    model, own = normed_model(w, iterations=iterations)
    w.assign(base_weight((6, 4), seed=20).numpy())
    matrix, v = w.numpy().astype("float64"), own["v"].numpy().astype("float64")
    model(np.eye(6, dtype="float32"), training=True)
    for _ in range(iterations):
        u = v @ matrix / np.linalg.norm(v @ matrix)
        v = matrix @ u / np.linalg.norm(matrix @ u)
    np.testing.assert_allclose(own["u"].numpy(), u, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own["v"].numpy(), v, rtol=1e-5, atol=1e-6)


def test_two_uses_of_one_spectral_norm_advance_it_once_a_call():
    w = base_weight((5, 5))
    kernel = forms.spectral_norm(seed=1)(w)
    own = own_weights(kernel, w)
    w.assign(base_weight((5, 5), seed=20).numpy())
    layers = [tether.tie(keras.layers.Dense(5, use_bias=False), kernel=kernel) for _ in range(2)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    matrix, v = w.numpy(), own["v"].numpy()
    model(np.eye(5, dtype="float32"), training=True)
    u = v @ matrix / np.linalg.norm(v @ matrix)
    np.testing.assert_allclose(own["u"].numpy(), u, rtol=1e-5, atol=1e-6)


def test_a_spectral_norm_in_two_expressions_advances_once_a_call():
    """Both are computed: what is remembered is the value of one expression, and not of its parts."""
    w = base_weight((5, 5))
    normed = forms.spectral_norm(seed=1)(w)
    own = own_weights(normed, w)
    w.assign(base_weight((5, 5), seed=20).numpy())
    kernels = (normed, normed.T, -normed)
    layers = [tether.tie(keras.layers.Dense(5, use_bias=False), kernel=kernel) for kernel in kernels]
    model = keras.Sequential([keras.Input((5,)), *layers])
    matrix, v = w.numpy(), own["v"].numpy()
    for _ in range(2):  # once in each call, and not once for all
        with tether.planning.force("materialize"):
            model(np.eye(5, dtype="float32"), training=True)
        u = v @ matrix / np.linalg.norm(v @ matrix)
        v = matrix @ u / np.linalg.norm(matrix @ u)
        np.testing.assert_allclose(own["u"].numpy(), u, rtol=1e-5, atol=1e-6)


def test_fit_keeps_the_norm_near_one():
    w = base_weight((6, 4))
    model, _ = normed_model(w)
    rng = np.random.default_rng(0)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(rng.normal(size=(64, 6)), 9 * rng.normal(size=(64, 4)), epochs=5, batch_size=8, verbose=0)
    assert abs(np.linalg.norm(numpy(model.layers[0].kernel.value), 2) - 1) < 0.02


def test_a_weight_of_zeros_has_no_direction_to_normalise():
    with pytest.raises(tether.TetherError, match="zero everywhere"):
        forms.spectral_norm()(tether.Weight((3, 4), "zeros"))


def test_a_files_spectral_norm_is_checked():
    w, u, v = base_weight((6, 4)), tether.Weight((4,), "ones"), tether.Weight((6,), "ones")
    weights = {weight.uid: weight for weight in (w, u, v)}
    steps = encode(SpectralNorm(w, u, v, iterations=1, epsilon=1e-12))
    assert decode(steps, weights).notation() == "spectral_norm(w)"
    for change in (
        {"iterations": 0}, {"iterations": 10**9}, {"iterations": 1.5}, {"iterations": None}, {"epsilon": 0.0},
        {"epsilon": "a"}, {"epsilon": float("nan")}, {"epsilon": True}, {"of": [0, 2, 1]}, {"of": [0, 1]}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(InvalidConfig):
            decode([*steps[:-1], {**steps[-1], **change}], weights)
    with pytest.raises(InvalidConfig, match="weights, which a training call can advance"):
        SpectralNorm(w, 2.0 * u, v, iterations=1, epsilon=1e-12)


# --------------------------------------------------------------------------- orthogonal, symmetric, positive


def orthogonality(q):
    q = q.T if q.shape[0] < q.shape[1] else q
    return np.abs(q.T @ q - np.eye(q.shape[1])).max()


@pytest.mark.parametrize("map", ["householder", "cayley"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (40, 40), (64, 16), (16, 64)])
def test_any_numbers_give_an_orthogonal_matrix(map, shape):
    for scale in (0.01, 1.0, 20.0):
        base = tether.Weight(scale * base_weight(shape).numpy(), name="w")
        assert orthogonality(forms.orthogonal(map, split=1)(base).numpy()) < 2e-4 * max(1.0, scale * (map == "cayley"))


@pytest.mark.parametrize("map", ["householder", "cayley"])
@pytest.mark.parametrize(
    "value",
    [
        np.eye(4), -np.eye(4), np.eye(4)[[1, 0, 3, 2]], np.eye(4)[:, :2], np.eye(4)[:2], -np.eye(5)[::-1],
        np.diag([1.0, -1.0, 1.0]), np.array([[1.0]]), np.array([[-1.0]]), np.array([[0.6], [-0.8]]),
    ],
    ids=str,
)  # fmt: skip
def test_orthogonal_matrices_with_zeros_and_reflections_can_be_assigned(map, value):
    expression = forms.orthogonal(map, split=1)(base_weight(value.shape))
    expression.assign(value.astype("float32"))
    np.testing.assert_allclose(expression.numpy(), value, atol=1e-6)


@pytest.mark.parametrize("map", ["householder", "cayley"])
def test_training_leaves_an_orthogonal_matrix_orthogonal(map):
    base = base_weight((6, 4))
    kernel = forms.orthogonal(map)(base)
    model = keras.Sequential([keras.Input((6,)), tether.tie(keras.layers.Dense(4, use_bias=False), kernel=kernel)])
    target = numpy(keras.initializers.Orthogonal(seed=5)((6, 4)))
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(x, x @ target, epochs=60, batch_size=64, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert orthogonality(kernel.numpy()) < 1e-5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_weight_whose_shape_the_tie_tells_starts_at_the_layers_orthogonal_initializer(shape):
    kernel = forms.orthogonal()(tether.Weight(name="w"))
    initializer = keras.initializers.Orthogonal(seed=3)
    layer = tether.tie(keras.layers.Dense(shape[1], kernel_initializer=initializer), kernel=kernel)
    layer.build((None, shape[0]))
    np.testing.assert_allclose(numpy(layer.kernel.value), numpy(initializer(shape)), atol=1e-5)


def test_the_upper_triangle_of_householders_base_has_no_gradient():
    base = base_weight((5, 3))
    expression = forms.orthogonal()(base)
    factors = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
    found = gradient_of(lambda: keras.ops.sum(keras.ops.multiply(expression.value, factors)), base)
    np.testing.assert_array_equal(np.triu(found), 0)
    assert np.abs(np.tril(found, -1)).max() > 0.01


def test_the_inverse_of_a_form_reaches_a_weight_behind_other_expressions():
    base = base_weight((6, 4))
    expression = forms.orthogonal()(base.T)
    value = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 4)))[0].T.astype("float32")
    expression.assign(value)
    np.testing.assert_allclose(expression.numpy(), value, atol=1e-5)


def test_a_nearly_orthogonal_value_is_refused_with_how_far_it_is():
    value = np.eye(4, dtype="float32")
    value[0, 0] = 1.001
    with pytest.raises(NotInvertible, match=r"orthonormal columns .*identity=0\.002"):
        forms.orthogonal()(base_weight((4, 4))).assign(value)


def test_a_positive_weight_starts_at_the_layers_initializer_and_takes_large_and_small_values():
    gamma = forms.positive()(tether.Weight(name="gamma"))
    layer = tether.tie(keras.layers.LayerNormalization(), gamma=gamma)
    layer.build((None, 3))
    np.testing.assert_allclose(numpy(layer.gamma.value), 1, rtol=1e-6)
    gamma.assign(np.array([1e-6, 1.0, 500.0], dtype="float32"))
    np.testing.assert_allclose(gamma.numpy(), [1e-6, 1.0, 500.0], rtol=1e-5)
    with pytest.raises(NotInvertible, match=r"finite numbers above zero.*least=-1\.0"):
        gamma.assign(np.array([-1.0, 1.0, 1.0], dtype="float32"))
    with pytest.raises(NotInvertible):
        gamma.assign(np.array([np.inf, 1.0, 1.0], dtype="float32"))


def test_a_symmetric_layer_starts_where_its_shape_is_told():
    kernel = forms.symmetric()(tether.Weight(name="w"))
    layer = tether.tie(keras.layers.Dense(4), kernel=kernel)
    layer.build((None, 4))
    value = numpy(layer.kernel.value)
    np.testing.assert_array_equal(value, value.T)
    assert np.abs(value).max() > 0
    with pytest.raises(ShapeMismatch, match="square"):
        tether.tie(keras.layers.Dense(3), kernel=forms.symmetric()(tether.Weight(name="v"))).build((None, 4))


def test_a_copy_of_a_parent_starts_at_its_values_where_the_form_has_an_inverse():
    parent = keras.layers.Dense(4, kernel_initializer="orthogonal")
    parent.build((None, 6))
    child = tether.inherit(parent, share=False, kernel=forms.orthogonal("cayley"))
    np.testing.assert_allclose(numpy(child.kernel.value), numpy(parent.kernel), atol=1e-5)


# --------------------------------------------------------------------------- rotations, waves, draws


@pytest.mark.parametrize("terms", [0, 65, "five", True, 1.5])
def test_a_series_of_terms_that_make_no_sense_is_refused(terms):
    with pytest.raises(TetherError, match=r"terms"):
        Turn(base_weight((2, 3)), terms=terms)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (2, 3, 1), (2, 0)])
def test_what_is_no_upper_triangle_does_not_turn(shape):
    with pytest.raises(ShapeMismatch):
        Turn(base_weight(shape))


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"columns": -1}, {"seed": 0.5}, {"rows": 1 << 20, "columns": 1 << 20}, {"rows": 1, "columns": 2}],
)
def test_waves_of_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(TetherError):
        Waves(base_weight((3,)), **{"rows": 3, "columns": 4, "seed": 1, **wrong})


@pytest.mark.parametrize("terms", [2, 3, 5, 9])
def test_a_series_comes_nearer_to_the_rotation_with_each_term(terms, rng):
    q = tether.Weight((0.1 * rng.normal(size=(2, 6))).astype("float32"), name="q")
    exact = Turn(q).numpy()
    assert np.abs(Turn(q, terms=terms).numpy() - exact).max() < 4 * np.abs(q.numpy()).max() ** min(terms, 3)
    turned = exact + np.eye(4)
    np.testing.assert_allclose(turned @ turned.swapaxes(1, 2), np.stack([np.eye(4)] * 2), atol=1e-6)


def test_an_oft_keeps_lengths_and_angles(rng):
    w = base_weight((6, 4))
    expression = forms.oft(3)(w)
    (own,) = own_weights(expression, w).values()
    own.assign(rng.normal(size=own.shape).astype("float32"))
    assert np.abs(expression.numpy() - w.numpy()).max() > 0.1
    np.testing.assert_allclose(expression.numpy().T @ expression.numpy(), w.numpy().T @ w.numpy(), atol=1e-5)


def test_a_butterfly_reaches_all_inputs():
    w = tether.Weight(np.eye(8, dtype="float32"), name="w")
    expression = forms.boft(2, factors=3)(w)
    own_weights(expression, w)["boft_q"].assign(np.full((12, 1), 0.3, "float32"))
    assert np.abs(expression.numpy()).min() > 1e-3


@pytest.mark.parametrize("wrong", [{"seed": "x"}, {"skipped": -1}, {"skipped": 1 << 40}, {"seed": 1.0}])
def test_draws_that_make_no_sense_are_refused(wrong):
    with pytest.raises(TetherError, match="Received: "):
        DrawnByTorch(**wrong)
    with pytest.raises(TetherError, match="Received: "):
        DrawnByTorch()((1 << 20, 1 << 10))


# --------------------------------------------------------------------------- what a low-rank part starts near


@pytest.mark.parametrize("alpha", [-2, 3])
@pytest.mark.parametrize("start", ["pissa", "olora", "array"])
def test_a_start_is_the_same_whatever_the_sign_of_the_scale(start, alpha, rng):
    base = base_weight((4, 3))
    array = base.numpy() + np.outer(rng.normal(size=4), rng.normal(size=3))
    made = base + tether.low_rank(2, alpha=alpha, start=array if start == "array" else start)
    np.testing.assert_allclose(made.numpy(), array if start == "array" else base.numpy(), atol=1e-5)


@pytest.mark.parametrize("values", [np.nan, np.inf])
def test_a_start_that_no_factors_have_is_refused_before_anything_changes(values):
    layer = keras.layers.Dense(3, name="d")
    layer.build((None, 4))
    names = [weight.path for weight in layer.weights]
    refused = {
        "finite numbers": tether.low_rank(2, start=np.full((4, 3), values)),
        "`alpha` other than 0": tether.low_rank(2, alpha=0, start="pissa"),
    }
    for message, form in refused.items():
        with pytest.raises(TetherError, match=message):
            tether.adapters.add(layer, "a", {"kernel": form})
        assert [weight.path for weight in layer.weights] == names and not tether.adapters.names(layer)

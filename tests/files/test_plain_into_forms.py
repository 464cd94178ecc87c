"""A checkpoint of a plain layer goes to the base of whatever the layer computes with now, by every way of loading."""

import keras
import numpy as np
import pytest

import tether
from tests.forms.cases import CASES, expression_of, own_weights
from tests.support import numpy

layers = keras.layers


def in_a_model(kernel, units, inputs):
    layer = layers.Dense(units, use_bias=False, name="d")
    if kernel is not None:
        tether.tie(layer, kernel=kernel)
    return keras.Sequential([keras.Input((inputs,)), layer], name="m")


def checkpoint(value, folder):
    """The files of a plain layer."""
    plain = in_a_model(None, value.shape[1], value.shape[0])
    plain.set_weights([value])
    plain.save_weights(folder / "plain.weights.h5")
    tether.files.save_safetensors(plain, folder / "plain.safetensors")
    return folder


WAYS = {
    "load_weights": lambda model, folder: model.load_weights(folder / "plain.weights.h5"),
    "load_untied": lambda model, folder: tether.files.load_untied(model, folder / "plain.weights.h5"),
    "load_safetensors": lambda model, folder: tether.files.load_safetensors(model, folder / "plain.safetensors"),
}
FOLLOWING = {"own", "magnitude", "g", "before", "u", "v", "full", "rows"}
"""The weights of forms that follow from the value that the whole is given."""
ways = pytest.mark.parametrize("way", WAYS)


@ways
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.starts_equal or case.good])
def test_a_layer_with_a_form_computes_with_what_the_plain_layer_had(name, way, rng, tmp_path):
    case = CASES[name]
    value = (case.good or (lambda rng, shape: rng.normal(size=shape)))(rng, case.shape).astype("float32")
    base, kernel = expression_of(name)
    own = own_weights(kernel, base)
    added = {key: weight.numpy() for key, weight in own.items() if key not in FOLLOWING}
    model = in_a_model(kernel, case.shape[1], case.shape[0])
    WAYS[way](model, checkpoint(value, tmp_path))
    np.testing.assert_allclose(numpy(model(np.eye(case.shape[0], dtype="float32"))), value, rtol=2e-5, atol=2e-5)
    if case.starts_equal:
        np.testing.assert_array_equal(base.numpy(), value)
    for key, before in added.items():
        np.testing.assert_array_equal(own[key].numpy(), before, err_msg=key)


@ways
def test_a_masked_weight_takes_all_of_it(way, rng, tmp_path):
    value = rng.normal(size=(6, 4)).astype("float32")
    base, kernel = expression_of("masked")
    WAYS[way](in_a_model(kernel, 4, 6), checkpoint(value, tmp_path))
    np.testing.assert_array_equal(base.numpy(), value)


@ways
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bad])
def test_what_a_form_cannot_be_is_refused_and_changes_nothing(name, way, rng, tmp_path):
    case = CASES[name]
    _, kernel = expression_of(name)
    model = in_a_model(kernel, case.shape[1], case.shape[0])
    before = model.get_weights()
    folder = checkpoint(np.nan_to_num(case.bad(rng, case.shape), nan=7.0).astype("float32"), tmp_path)
    # Keras puts what went wrong into an error of its own.
    with pytest.raises(ValueError, match=r"differ|has no value for"):
        WAYS[way](model, folder)
    assert all(np.array_equal(one, two) for one, two in zip(before, model.get_weights(), strict=True))


NAMES = (
    ("W", "W.a", "W.b"),
    ("W", "A", "B"),
    ("base", "W.lora_a", "W.lora_b"),
    ("z", "lora_a", "lora_b"),
    ("d.kernel",) * 3,
)


@ways
@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_low_rank_written_by_hand_is_understood_with_whatever_names(names, way, rng, tmp_path):
    value = rng.normal(size=(6, 4)).astype("float32")
    starts = zip(((6, 4), (6, 2), (2, 4)), ("glorot_uniform", "glorot_uniform", "zeros"), names, strict=True)
    w, a, b = (tether.Weight(shape, start, name=name) for shape, start, name in starts)
    model = in_a_model(w.stop_gradient() + a @ b, 4, 6)
    factor = a.numpy()
    WAYS[way](model, checkpoint(value, tmp_path))
    np.testing.assert_array_equal(w.numpy(), value)
    np.testing.assert_array_equal(a.numpy(), factor)
    np.testing.assert_array_equal(b.numpy(), np.zeros((2, 4)))


@ways
@pytest.mark.parametrize("form", ["low_rank", "gate", "dora"])
def test_a_named_adapter_leaves_the_base_where_it_was(form, way, rng, tmp_path):
    value = rng.normal(size=(6, 4)).astype("float32")
    model = in_a_model(None, 4, 6)
    tether.adapters.add(model, "french", {"d/kernel": CASES[form].make()})
    WAYS[way](model, checkpoint(value, tmp_path))
    np.testing.assert_allclose(numpy(model(np.eye(6, dtype="float32"))), value, rtol=2e-5, atol=2e-5)
    assert tether.adapters.strengths(model) == {"french": 1.0}


@ways
def test_the_bases_own_value_comes_before_what_a_child_would_have_it_be(way, rng, tmp_path):
    """A parent and a child in one model: the plain checkpoint has a value for each, and only one can be the base's."""

    def family(tied):
        inputs = keras.Input((6,))
        parent = layers.Dense(4, use_bias=False, name="parent")
        outputs = parent(inputs)
        child = tether.inherit(parent, kernel=tether.low_rank(2, seed=1), name="child") if tied else None
        child = child or layers.Dense(4, use_bias=False, name="child")
        return keras.Model(inputs, [outputs, child(inputs)], name="m")

    plain, value = family(False), rng.normal(size=(6, 4)).astype("float32")
    for other, differs in ((value, False), (value + 1, True)):
        plain.set_weights([value, other])
        plain.save_weights(tmp_path / "plain.weights.h5")
        tether.files.save_safetensors(plain, tmp_path / "plain.safetensors")
        model = family(True)
        if differs:
            with pytest.raises(ValueError, match=r"child/kernel.* differ"):
                WAYS[way](model, tmp_path)
        else:
            WAYS[way](model, tmp_path)
            np.testing.assert_array_equal(model.get_layer("parent").kernel.numpy(), value)


def test_a_file_of_the_tied_model_still_has_to_hold_what_is_no_part(tmp_path):
    """A weight that only a layer of its own uses is not passed over, as what was added is."""
    w, v = (tether.Weight((6, 6), "glorot_uniform", name=name) for name in "wv")
    model = in_a_model(w @ v, 6, 6)
    folder = checkpoint(np.ones((6, 6), "float32"), tmp_path)
    with pytest.raises(ValueError, match="differs from it"):
        model.load_weights(folder / "plain.weights.h5")

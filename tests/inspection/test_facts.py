"""The facts of live models: what is stored, who reads it and how, what it takes."""

import json
import math

import keras
import numpy as np
import pytest

import tether
from tests.inspection import models
from tests.inspection.models import MODELS, fitted
from tether.errors import InvalidConfig
from tether.inspection import Facts, facts
from tether.inspection.summary import Summary

layers = keras.layers


def uses(found):
    """The uses by layer and attribute."""
    return {use.where: use for use in found.uses}


def weights(found):
    """The stored weights by path."""
    return {weight.path: weight for weight in found.weights}


def said(found):
    """What each tie reads."""
    return {use.where: use.expression for use in found.uses if use.tied}


def size(variables):
    """Bytes, from shapes and dtypes."""
    return sum(math.prod(v.shape) * (2 if "16" in v.dtype else 4) for v in variables)


# --------------------------------------------------------------------------- what holds for every model


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_model_is_stored_once(name):
    model = MODELS[name]()
    found = facts(model)
    assert sorted(w.path for w in found.weights if not w.state) == sorted(v.path for v in model.weights)
    assert found.stored_bytes == size(model.weights)
    assert {w.path: w.trainable for w in found.weights} == {v.path: bool(v.trainable) for v in model.weights}
    assert len({place for w in found.weights for place in (w.place, *w.again)}) == sum(
        1 + len(w.again) for w in found.weights
    )


WITHOUT_A_PLAIN_COPY = {
    "unbuilt", "ties_itself", "private_sharing", "routed", "own_attribute", "own_attribute_alone", "shared_layer",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_A_PLAIN_COPY])
def test_unshared_it_takes_what_a_materialised_copy_takes(name):
    model = MODELS[name]()
    plain = facts(tether.materialize(model))
    assert plain.stored_bytes == plain.unshared_bytes == facts(model).unshared_bytes
    assert not list(plain.shared()) and not any(use.tied for use in plain.uses)


@pytest.mark.parametrize("name", MODELS)
def test_facts_are_the_same_after_json(name):
    found = facts(fitted(MODELS[name](), "adam") if name in ("slices", "frozen_use") else MODELS[name]())
    data = json.loads(json.dumps(found.to_json()))
    assert Facts.from_json(data) == found
    assert data["totals"] == {
        "stored_bytes": found.stored_bytes,
        "unshared_bytes": found.unshared_bytes,
        "optimizer_bytes": found.optimizer_bytes,
    }


# --------------------------------------------------------------------------- one by one


def test_a_tied_autoencoder():
    found = facts(models.tied_autoencoder())
    assert said(found) == {"encode/kernel": "codec", "decode/kernel": "codec.T"}
    codec = weights(found)["codec"]
    assert found.uses_of(codec) == (uses(found)["encode/kernel"], uses(found)["decode/kernel"])
    assert list(found.shared()) == [codec] and found.weight(codec.place) is codec
    assert (codec.shape, codec.dtype, codec.bytes) == ((6, 3), "float32", 6 * 3 * 4)
    assert uses(found)["decode/kernel"].shape == (3, 6)
    assert found.unshared_bytes - found.stored_bytes == codec.bytes
    assert found.layers == (("encode", "Dense"), ("decode", "Dense"))
    assert [use.where for use in found.uses] == ["encode/kernel", "encode/bias", "decode/kernel", "decode/bias"]
    assert all(use.trains for use in found.uses) and found.name == "autoencoder" and found.ties


def test_a_tie_that_was_made_after_build_and_nested():
    found = facts(models.transposed_head())
    assert said(found) == {"encoder/embed/embeddings": "embed.embeddings", "top/lm_head/kernel": "embed.embeddings.T"}
    (table,) = found.shared()
    assert table.shape == (7, 3) and uses(found)["top/lm_head/kernel"].kind == "Dense"


def test_slices_take_together_what_is_stored():
    found = facts(models.slices())
    assert said(found) == {"left/kernel": "whole[:, :2]", "right/kernel": "whole[:, 2:]"}
    assert [use.shape for use in found.uses] == [(4, 2), (4, 4)]
    assert found.unshared_bytes == found.stored_bytes == 4 * 6 * 4


def test_a_low_rank_child_of_a_frozen_parent():
    found = facts(models.low_rank_child())
    use = uses(found)["child/kernel"]
    kernel, a, b = (found.weight(place) for place in use.weights)
    assert use.trains and use.stopped == (kernel.place,)
    assert [use.reaches(w) for w in (kernel, a, b)] == [False, True, True]
    assert [w.trainable for w in (kernel, a, b)] == [False, True, True]
    assert uses(found)["parent/kernel"].trains is False and uses(found)["parent/kernel"].stopped == (kernel.place,)
    assert uses(found)["child/bias"].trains is False


def test_a_use_is_frozen_or_cut_by_itself():
    found = facts(models.frozen_use())
    (shared,) = found.shared()
    trains = {use.where: use.reaches(shared) for use in found.uses_of(shared)}
    assert trains == {"a/kernel": True, "b/kernel": False, "c/kernel": False}
    assert shared.trainable
    assert uses(found)["c/kernel"].trains is False  # the gradient that the weight gets comes through another use
    assert uses(found)["c/bias"].trains is True and uses(found)["b/bias"].trains is False
    plain = uses(found)["plain/kernel"]
    assert plain.trains is False and plain.reaches(found.weight(plain.weights[0])) is False


def test_the_options_of_a_route_are_uses_of_each():
    found = facts(models.routed())
    base, french = weights(found)["base"], weights(found)["french"]
    (use,) = found.uses_of(base)
    assert found.uses_of(french) == (use,)
    assert set(use.weights) == {base.place, french.place} and "choice" in use.expression
    assert found.stored_bytes - found.unshared_bytes == base.bytes  # two are stored where one is used


def test_an_extended_class_has_its_own_name_and_weights():
    found = facts(models.extended())
    assert found.layers == (("scaled", "Scaled"), ("again", "Scaled"))
    assert [use.attribute for use in found.uses if use.layer == "scaled"] == ["kernel", "bias", "gain"]
    assert not list(found.shared()) and not any(use.tied for use in found.uses)


def test_models_in_a_subclassed_model():
    found = facts(models.nested())
    assert said(found) == {
        "body/narrow/kernel": "0.5 * wide.kernel",
        "body/wide/kernel": "wide.kernel",
        "head/out/kernel": "wide.kernel.T",
    }
    assert [layer for layer, _ in found.layers] == ["body/narrow", "body/wide", "head/out"]


def test_layers_in_lists_and_dicts_come_in_the_order_in_which_they_were_made():
    found = facts(models.block())
    assert [layer for layer, _ in found.layers] == [
        "block",
        "block/first",
        "block/one",
        "block/two",
        "block/norm",
        "last",
    ]
    assert uses(found)["block/two/kernel"].expression == "first.kernel.T"
    steps = found.weight(uses(found)["block/steps"].weights[0])
    assert (steps.shape, steps.dtype, steps.trainable, steps.bytes) == ((), "int32", False, 4)


@pytest.mark.parametrize("name", ["attention", "attention_after_build"])
def test_parts_of_an_attention_layer(name):
    found = facts(MODELS[name]())
    (shared,) = found.shared()
    assert {use.where for use in found.uses_of(shared)} == {"attention/query/kernel", "attention/key/kernel"}
    assert {use.kind for use in found.uses} == {"EinsumDense"}


def test_a_weight_that_a_layer_reads_as_its_attribute_is_used_by_it():
    found = facts(models.own_attribute())
    (table,) = found.shared()
    assert {use.where: use.tied for use in found.uses_of(table)} == {"embed/embeddings": True, "bilinear/table": False}
    assert uses(found)["bilinear/table"].kind == "Bilinear"
    assert uses(found)["bilinear/table"].expression == "table"


def test_a_weight_that_a_layer_holds_to_tie_it_below_is_not_used_by_it():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__(name="holder")
            self.weight = tether.Weight((4, 4), "ones", name="w")
            self.one = tether.tie(layers.Dense(4, name="one"), kernel=self.weight)
            self.one.build((None, 4))

    found = facts(Holder())
    assert said(found) == {"one/kernel": "w"} and not list(found.shared())


def test_a_weight_alone_in_a_layer():
    class Alone(layers.Layer):
        def __init__(self):
            super().__init__(name="alone")
            self.weight = tether.Weight((4, 4), "ones", name="w")
            self.built = True

    found = facts(Alone())
    assert [(use.where, use.expression, use.trains) for use in found.uses] == [("alone/weight", "w", True)]
    assert facts(tether.Weight((4, 4), "ones")).stored_bytes == 64


def test_what_people_do_without_tether_is_shared_too():
    found = facts(models.private_sharing())
    (kernel,) = found.shared()
    assert {use.where for use in found.uses_of(kernel)} == {"a/kernel", "b/kernel"}
    assert len(kernel.again) == 1 and kernel.again[0] != kernel.place  # Keras writes it twice


def test_a_reversible_embedding_uses_its_table_once():
    found = facts(models.reversible_embedding())
    assert not list(found.shared())
    assert [use.attribute for use in found.uses if use.layer == "table"] == ["embeddings"]


def test_state_that_does_not_train():
    found = facts(models.batch_normalization())
    (gamma,) = found.shared()
    assert {use.where for use in found.uses_of(gamma)} == {"one/gamma", "two/gamma"}
    assert {u.attribute: u.trains for u in found.uses if u.layer == "one"} == {
        "gamma": True, "beta": True, "moving_mean": False, "moving_variance": False
    }  # fmt: skip


def test_parts_of_recurrent_layers():
    found = facts(models.recurrent())
    assert said(found) == {"a/lstm_cell/recurrent_kernel": "recurrent", "b/gru_cell/kernel": "recurrent"}
    assert [u.attribute for u in found.uses if u.layer == "a/lstm_cell"] == ["kernel", "recurrent_kernel", "bias"]


def test_a_model_that_is_not_built_stores_nothing():
    found = facts(models.unbuilt())
    assert found.weights == found.uses == () and found.stored_bytes == found.unshared_bytes == 0


def test_a_layer_at_two_places_is_one_layer():
    found = facts(models.shared_layer())
    assert [use.where for use in found.uses if "twice" in use.where] == ["inner/twice/kernel", "inner/twice/bias"]
    (kernel,) = found.shared()
    assert found.stored_bytes == kernel.bytes + 2 * 4 * 4


def test_a_layer_by_itself():
    layer = layers.Dense(3, name="alone")
    assert facts(layer).weights == ()
    layer.build((None, 2))
    found = facts(layer)
    assert [use.where for use in found.uses] == ["alone/kernel", "alone/bias"] and found.name == "alone"
    assert [w.place for w in found.weights] == ["vars/0", "vars/1"]


def test_facts_are_their_own():
    found = facts(models.slices())
    assert facts(found) is found


# --------------------------------------------------------------------------- dtypes


def test_bytes_are_those_of_the_dtype():
    narrow, wide = facts(models.bfloat16()), facts(models.tied_autoencoder())
    assert {w.dtype for w in narrow.weights} == {u.dtype for u in narrow.uses} == {"bfloat16"}
    assert 2 * narrow.stored_bytes == wide.stored_bytes and 2 * narrow.unshared_bytes == wide.unshared_bytes


def test_a_use_has_the_dtype_that_its_layer_computes_from():
    found = facts(models.float32_weight_in_bfloat16())
    (shared,) = found.shared()
    assert shared.dtype == "float32"
    assert {use.where: use.dtype for use in found.uses_of(shared)} == {"a/kernel": "bfloat16", "b/kernel": "float32"}
    assert uses(found)["a/kernel"].bytes == 4 * 4 * 2


# --------------------------------------------------------------------------- optimizers

OPTIMIZERS = {
    "adam": (lambda: keras.optimizers.Adam(0.1), ("momentums", "velocities")),
    "momentum": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), ("momentums",)),
    "average": (
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True),
        ("model_variables_moving_average", "momentums"),
    ),
    "loss scale": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
        ("momentums", "velocities"),
    ),
    "none": (lambda: keras.optimizers.SGD(0.1), ()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_kept_once_for_a_shared_weight(name):
    make, slots = OPTIMIZERS[name]
    found = facts(fitted(models.tied_autoencoder(), make()))
    for weight in found.weights:
        kept = found.slots_of(weight)
        assert tuple(sorted(slot.name for slot in kept)) == slots
        assert all((slot.shape, slot.bytes) == (weight.shape, weight.bytes) for slot in kept)
    counters = [slot for slot in found.optimizer if slot.weight is None]
    assert counters and all(slot.shape == () for slot in counters)
    assert found.optimizer_bytes == len(slots) * found.stored_bytes + sum(slot.bytes for slot in counters)


def test_an_optimizer_keeps_nothing_for_what_is_frozen():
    found = facts(fitted(models.frozen_use(), "adam"))
    kept = {weight.path for weight in found.weights if found.slots_of(weight)}
    assert kept == {weight.path for weight in found.weights if weight.trainable} != set(weights(found))


def test_an_optimizer_that_has_not_trained_keeps_its_counters():
    model = models.tied_autoencoder()
    assert facts(model).optimizer == () and facts(model).optimizer_bytes == 0
    model.compile("adam", "mse")
    assert all(slot.weight is None for slot in facts(model).optimizer)


# --------------------------------------------------------------------------- nothing is read


@pytest.mark.parametrize("name", ["nested", "with_state", "bidirectional"])
def test_no_value_is_read(name, monkeypatch):
    model = fitted(MODELS[name](), "adam") if name == "with_state" else MODELS[name]()

    def refuse(*args, **kwargs):
        raise AssertionError("a value was read")

    monkeypatch.setattr("tether.layers.tying.state.View.value", property(refuse))
    monkeypatch.setattr("tether.weights.weight.Weight.value", property(refuse))
    for cls in {cls for v in model.variables for cls in type(v).__mro__ if cls.__module__.startswith("keras")}:
        for method in ("numpy", "__array__"):
            monkeypatch.setattr(cls, method, refuse, raising=False)
        if "value" in vars(cls):
            monkeypatch.setattr(cls, "value", property(refuse))
    assert facts(model).weights


def test_what_a_layer_computes_for_its_file_stands_for_the_variable():
    """Keras's LoRA writes a kernel with the low-rank part added, and not the parts."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
    model.layers[0].enable_lora(2)
    found = facts(model)
    assert found.stored_bytes == size(model.weights)
    assert {w.path.rpartition("/")[2]: w.place.startswith("!") for w in found.weights} == {
        "kernel": False, "bias": False, "lora_kernel_a": True, "lora_kernel_b": True
    }  # fmt: skip


def test_what_is_no_variable_is_state():
    class Counting(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(3,), name="scale")

        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["seen"] = np.zeros((5,), "int64")

    layer = Counting(name="counting")
    layer.build((None, 3))
    found = facts(layer)
    assert {w.place: w.state for w in found.weights} == {"vars/0": False, "vars/seen": True}
    assert found.weight("vars/seen").dtype == "int64" and found.uses_of(found.weight("vars/seen")) == ()


# --------------------------------------------------------------------------- what is none of it


@pytest.mark.parametrize("source", [None, 3, [keras.layers.Dense(1)], keras.optimizers.SGD(0.1)], ids=type)
def test_of_anything_else_there_are_no_facts(source):
    with pytest.raises(tether.TetherError, match="model or layer"):
        facts(source)


# --------------------------------------------------------------------------- in a notebook, and in part


def test_in_a_notebook_facts_are_the_table_of_their_summary():
    found = facts(models.tied_autoencoder())
    assert found._repr_html_() == Summary(found)._repr_html_()


def test_names_in_that_table_are_words_and_nothing_else():
    weight = tether.Weight((2, 2), "ones", name="w<script>alert(1)")
    layer = tether.tie(keras.layers.Dense(2, name="dense<b>"), kernel=weight.T)
    layer.build((None, 2))
    html = facts(layer)._repr_html_()
    assert "w&lt;script&gt;alert(1)" in html and "dense&lt;b&gt;" in html
    assert "<script" not in html and "<b>" not in html


@pytest.mark.parametrize("name", MODELS)
def test_the_part_that_is_shared_has_what_the_summary_lists(name):
    found = facts(MODELS[name]())
    part = found.shared_only()
    listed = str(Summary(found, shared_only=True))
    hidden = len(found.weights) - len(part.weights)
    assert (f"{hidden} weight" in listed and "not listed" in listed) == (hidden > 0)
    assert set(part.weights) == {weight for weight in found.weights if not found.is_plain(weight)}
    assert set(part.uses) == {use for weight in part.weights for use in found.uses_of(weight)}
    assert {use.layer for use in part.uses} <= {layer for layer, _ in found.layers} | {""}
    assert {layer for layer, _ in part.layers} >= {use.layer for use in part.uses if use.layer} & dict(
        found.layers
    ).keys()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: [data],
        lambda data: {**data, "version": 99},
        lambda data: {key: value for key, value in data.items() if key != "uses"},
        lambda data: {**data, "weights": [{"place": "a", "colour": "red"}]},
        lambda data: {**data, "layers": [1]},
        lambda data: {**data, "optimizer": None},
    ],
)
def test_json_of_something_else_is_refused(spoil):
    data = facts(models.slices()).to_json()
    with pytest.raises(InvalidConfig):
        Facts.from_json(spoil(data))

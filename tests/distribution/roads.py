"""How what is stored lies on eight devices, whatever way it was made by."""

import pathlib
import re
import tempfile

import keras
import numpy as np

import tether
from tests.distribution.models import (
    D,
    bytes_here,
    child,
    layers,
    local,
    mesh_of,
    plain_map,
    scope,
    seeded,
    shards,
    tied_pair,
)
from tests.distribution.programs import check
from tether import keras_seam
from tether.distribution import layout_map

MESH = mesh_of(2, 4)
COLUMNS = {"up/kernel": (None, "model")}
ROWS = {"up/kernel": ("model", None)}
TABLE = {"table": ("model", None)}


def raises(kind, act, *words):
    """The text of the error that something raises, which has these words in it."""
    try:
        act()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


# --------------------------------------------------------------------------- the map


@check
def a_layout_goes_back_from_any_use():
    model = tied_pair()
    for layouts in (
        {"head/kernel": (None, "model")},
        {"*/embeddings": ("model", None)},
        {"table": ("model", None)},
        {".*ead.kernel": (None, "model")},
        {re.compile("h.*/kernel"): (None, "model")},
        {"*": ("batch", None), ("*kernel", "!embed*"): (None, "model"), "!*embeddings": None, "!table": None},
    ):
        found = layout_map(model, layouts, MESH)
        assert isinstance(found, D.LayoutMap) and found["table"].axes == ("model", None), layouts
        with scope(found):
            assert shards(tied_pair()) == {"table": (8, 8)}, layouts


@check
def a_map_is_made_of_a_model_of_a_function_of_paths_and_of_nothing():
    made = []

    def build():
        made.append(tied_pair())
        return made[-1]

    key = {"head/kernel": (None, "model")}
    for source in (tied_pair(), build, ["table"], None):
        with scope(layout_map(source, key, MESH)):
            assert shards(tied_pair()) == {"table": (8, 8)}, source
    assert len(made) == 1 and len(made[0].weights[0].value.devices()) == 1
    assert layout_map(["a/kernel", "b/kernel"], {"?/kernel": (None, "model")}, MESH)["b/kernel"].axes == (None, "model")


@check
def a_function_that_makes_a_model_is_called_without_a_trace():
    def build():
        return keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(8)])

    keras.utils.set_random_seed(1)
    right = build()
    after = int(right.layers[1].name.partition("_")[2] or 0) + 1
    keras.utils.set_random_seed(1)
    with scope(layout_map(build, {f"dense_{after + 1}/kernel": (None, "model")}, MESH)):
        model = build()
    assert [layer.name for layer in model.layers] == [f"dense_{after}", f"dense_{after + 1}"]
    assert local(model.layers[1].kernel) == (8, 2) and local(model.layers[0].kernel) == (8, 8)
    for one, other in zip(model.weights, right.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@check
def two_uses_that_disagree_are_an_error_that_names_both():
    model, both = tied_pair(), {"embed/embeddings": (None, "model"), "head/kernel": (None, "model")}
    text = raises(
        tether.TetherError, lambda: layout_map(model, both, MESH), "'embed/embeddings'", "'head/kernel' = table.T"
    )
    assert "(None, 'model')" in text and "('model', None)" in text and "'table'" in text
    raises(
        tether.TetherError, lambda: layout_map(model, {**TABLE, "head/kernel": (None, None)}, MESH), "'table'", "head"
    )
    layout_map(model, {**TABLE, "head/kernel": (None, "model")}, MESH)


@check
def a_layout_that_cannot_be_is_an_error():
    model = tied_pair()
    raises(
        tether.TetherError, lambda: layout_map(model, {"table": ("modle", None)}, MESH), "'modle'", "'batch', 'model'"
    )
    raises(tether.TetherError, lambda: layout_map(model, {"table": ("model", "model")}, MESH), "once")
    raises(tether.TetherError, lambda: layout_map(model, {"table": "model"}, MESH), "tuple")
    raises(tether.TetherError, lambda: layout_map(model, ["table"], MESH), "by name")
    raises(tether.TetherError, lambda: layout_map(model, {"table": ("model", None)}), "mesh")
    raises(tether.TetherError, lambda: layout_map("table", {"table": ("model", None)}, MESH), "list of the paths")
    raises(ValueError, lambda: layout_map(model, {"table": ("model",)}, MESH), "(32, 8)", "('model',)")


@check
def an_axis_that_is_not_divided_evenly_is_whole():
    with scope(layout_map(lambda: tied_pair(30), TABLE, MESH)):
        assert shards(tied_pair(30)) == {"table": (30, 8)}
    with scope(plain_map(MESH, TABLE)):  # where Keras alone raises JAX's error
        model = tied_pair(30)
        assert shards(model) == {"table": (30, 8)}
        (finding,) = tether.check(model, rules=["layout-misfit"])
        assert finding.severity == "warning" and "size 30" in finding.why


@check
def the_map_of_somebody_else_is_completed():
    theirs = plain_map(MESH, {"embed.*": ("model", "batch")})
    found = layout_map(tied_pair(), theirs)
    assert found.device_mesh is MESH and found["table"].axes == ("model", "batch")


@check
def how_a_tensor_really_lies_is_read_off_it():
    with scope(plain_map(MESH, TABLE)):
        (variable,) = tied_pair().weights
    assert keras_seam.lies_as(variable) == ("model", None) and keras_seam.is_all_here(variable)
    keras_seam.lay_out(variable, ("batch", None), MESH)
    assert keras_seam.lies_as(variable) == ("batch", None) and local(variable) == (16, 8)


# --------------------------------------------------------------------------- parts


def _of_form(form, layouts, **kwargs):
    with scope(plain_map(MESH, layouts)):
        found = shards(child(form, **kwargs))
    return {path.removeprefix("up/kernel"): shape for path, shape in found.items()}


@check
def parts_lie_as_the_kernel_that_they_were_made_for():
    forms = tether.forms
    for form, columns, rows in (
        (tether.low_rank(4), {"_lora_a": (64, 4), "_lora_b": (4, 32)}, {"_lora_a": (16, 4), "_lora_b": (4, 128)}),
        (forms.dora(4), {"_lora_b": (4, 32), "_magnitude": (32,)}, {"_lora_a": (16, 4), "_magnitude": (128,)}),
        (forms.hadamard(4), {"_loha_a1": (64, 4), "_loha_b2": (4, 32)}, {"_loha_a2": (16, 4), "_loha_b1": (4, 128)}),
        (forms.kronecker(), {"_lokr_c": (8, 2), "_lokr_d": (8, 16)}, {"_lokr_c": (2, 8), "_lokr_d": (8, 16)}),
        (forms.vera(4), {"vera_bases/b": (4, 32), "_vera_b": (32,)}, {"vera_bases/a": (16, 4), "_vera_b": (128,)}),
        (forms.scale(), {"_scale": (32,)}, {"_scale": (128,)}),
        (forms.weight_norm(), {"_g": (32,)}, {"_g": (128,)}),
        (forms.spectral_norm(), {"_u": (32,), "_v": (64,)}, {"_u": (128,), "_v": (16,)}),
        (forms.oft(8), {"_oft_q": (8, 28)}, {"_oft_q": (8, 28)}),
        (forms.boft(4), {"_boft_q": (16, 6), "_boft_s": (32,)}, {"_boft_q": (16, 6), "_boft_s": (128,)}),
        (forms.gate(per="output"), {"_own": (64, 32), "_gate": (32,)}, {"_own": (16, 128), "_gate": (128,)}),
        (forms.full(), {"_full": (64, 32)}, {"_full": (16, 128)}),
        (forms.fourier(8), {"_fourier_c": (8,)}, {"_fourier_c": (8,)}),
        (forms.rows([1, 2]), {"_rows": (2, 32)}, {"_rows": (2, 128)}),
    ):
        assert columns.items() <= _of_form(form, COLUMNS).items(), form
        again = forms.vera(4) if "vera_bases/b" in columns else form
        assert rows.items() <= _of_form(again, ROWS).items(), form


@check
def the_parts_of_attention_lie_as_its_heads():
    equation, shape = "abc,cde->abde", (None, None, 16)
    for spec, a, b in (((None, "model", None), (16, 3), (3, 2, 8)), (("model", None, None), (4, 3), (3, 8, 8)),
                       ((None, None, "model"), (16, 3), (3, 8, 2))):  # fmt: skip
        with scope(plain_map(MESH, {"up/kernel": spec})):
            up = layers.EinsumDense(equation, (None, 8, 8), name="up")
            up.build(shape)
            found = shards(tether.inherit(up, kernel=tether.low_rank(3), name="child"))
        assert (found["up/kernel_lora_a"], found["up/kernel_lora_b"]) == (a, b), spec


@check
def a_name_of_the_part_itself_counts_for_it():
    with scope(plain_map(MESH, {**COLUMNS, ".*lora_b": (None, None)})):
        found = shards(child(tether.low_rank(4)))
    assert found["up/kernel"] == (64, 32) and found["up/kernel_lora_b"] == (4, 128)


# --------------------------------------------------------------------------- made later


def _autoencoder():
    code, i = tether.Weight(name="code", initializer=seeded(5)), keras.Input((32,))
    h = tether.tie(layers.Dense(16, activation="tanh", name="enc"), kernel=code)(i)
    return keras.Model(i, tether.tie(layers.Dense(32, name="dec"), kernel=code.T)(h))


@check
def integers_and_their_scale_lie_as_what_they_stand_for():
    for mode, codes in (("int8", (32, 4)), ("int4", (16, 4))):
        with scope(plain_map(MESH, {"code": (None, "model")})):
            model = _autoencoder()
            model.quantize(mode)
            found = shards(model)
            assert found[f"code_{mode}"] == codes and found["code_scale"] == (1, 4), found
            path = pathlib.Path(tempfile.mkdtemp()) / "model.keras"
            tether.files.save_model(model, path)
            assert shards(tether.files.load_model(path)) == found, mode


@check
def what_is_made_plain_again_lies_as_its_use_did():
    with scope(plain_map(MESH, {"code": (None, "model")})):
        model = _autoencoder()
        plain = tether.materialize(model)
        tether.untie(model)
        for each in (model, plain):
            assert local(each.get_layer("enc").kernel) == (32, 4) and local(each.get_layer("dec").kernel) == (4, 32)


@check
def an_adapter_that_is_added_later_lies_as_its_base():
    with scope(layout_map(None, {"*/kernel": (None, "model")}, MESH)):
        model = keras.Sequential([keras.Input((16,)), layers.Dense(32, name="one"), layers.Dense(8, name="two")])
        tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(2)})
        tether.adapters.add(model, "german", {"one/kernel": tether.forms.hadamard(2)})
    found = {
        path.rpartition("/")[0][-3:] + path.rpartition("kernel")[2]: s
        for path, s in shards(model).items()
        if "_lo" in path
    }
    right = {"one_lora_a": (16, 2), "one_lora_b": (2, 8), "two_lora_a": (32, 2), "two_lora_b": (2, 2)}
    right |= {"one_loha_a1": (16, 2), "one_loha_b1": (2, 8), "one_loha_a2": (16, 2), "one_loha_b2": (2, 8)}
    assert found == right, found


@check
def a_copy_lies_as_its_parent_does():
    with scope(plain_map(MESH, {"up/kernel": (None, "model"), "up/bias": ("model",)})):
        up = layers.Dense(32, name="up")
        up.build((None, 16))
        for made in (tether.inherit(up, share=False, name="child"), tether.inherit(up, share=False, name="other",
                     kernel=lambda w: w + tether.low_rank(2))):  # fmt: skip
            found = {path.rpartition("/")[2]: shape for path, shape in shards(made).items()}
            assert found["kernel"] == (16, 8) and found["bias"] == (8,), found
            assert found.get("kernel_lora_b", (2, 8)) == (2, 8), found


@check
def what_is_resized_stays_divided_if_it_can_be():
    with scope(plain_map(MESH, TABLE)):
        model = tied_pair()
        model.compile("adam", "mse")
        model.fit(np.zeros((8, 4), "int32"), np.zeros((8, 4, 32), "float32"), verbose=0)
        table = tether.weight_of(model, "embed/embeddings")
        for size, here in ((40, 10), (42, 42)):
            tether.files.resize(table, 0, size, model=model)
            assert local(table.variable) == (here, 8)
            assert {local(slot) for slot in model.optimizer.variables if len(slot.shape) == 2} == {(here, 8)}


@check
def a_bank_is_whole_along_its_own_axis():
    with scope(plain_map(MESH, {"[abc]/kernel": (None, "model")})):
        kernels = []
        for name in "abc":
            layer = layers.Dense(32, use_bias=False, name=name)
            layer.build((None, 16))
            kernels.append(tether.weight_of(layer, "kernel"))
        which = tether.weights.Argument("which", (), "int32", default=0)
        stacked = tether.tie(layers.Dense(32, use_bias=False, name="stacked"), kernel=tether.bank(kernels, which))
        stacked.build((None, 16))
        assert [local(v) for v in stacked.weights] == [(3, 16, 8)], shards(stacked)
    with scope(plain_map(MESH, COLUMNS)):
        up = layers.Dense(128, use_bias=False, name="up")
        up.build((None, 64))
        base = tether.weight_of(up, "kernel")
        options = [base + tether.low_rank(2) for _ in range(3)]
        stacked = tether.tie(layers.Dense(128, use_bias=False, name="stacked"), kernel=tether.bank(options, which))
        stacked.build((None, 64))
        found = {tuple(v.shape): local(v) for v in stacked.weights}
    assert found == {(64, 128): (64, 32), (3, 64, 2): (3, 64, 2), (3, 2, 128): (3, 2, 32)}, found


@check
def slots_lie_as_their_weights_and_each_device_has_its_share():
    with scope(plain_map(MESH, COLUMNS)):
        model = child(tether.low_rank(4))
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    share = (64 * 32 + 64 * 4 + 4 * 32) * 4  # the kernel and B by columns over four; A whole, since it has none
    assert bytes_here(model.weights) == share
    slots = [variable for variable in model.optimizer.variables if variable.shape]
    assert len(slots) == 6 and bytes_here(slots) == 2 * share


# --------------------------------------------------------------------------- findings


def _found(model, rule):
    return [(finding.severity, finding.where) for finding in tether.check(model, rules=[rule])]


@check
def a_model_that_lies_as_the_map_says_is_clean():
    rules = ["layout-missed", "layout-conflict", "layout-misfit", "part-whole"]
    for layouts, build in (({"head/kernel": (None, "model")}, tied_pair), (COLUMNS, lambda: child(tether.low_rank(4)))):
        for found in (plain_map(MESH, layouts), layout_map(build(), layouts, MESH)):
            with scope(found):
                model = build()
                assert not tether.check(model, rules=rules), (layouts, str(tether.check(model, rules=rules)))
    assert not tether.check(tied_pair(), rules=rules)


@check
def a_layout_that_reaches_nothing_is_found():
    before = tied_pair()
    with scope(plain_map(MESH, {"head/kernel": (None, "model"), "hed/kernel": (None, "model")})):
        assert _found(tied_pair(), "layout-missed") == [("hint", "hed/kernel")]
        assert _found(before, "layout-missed") == [("warning", "table"), ("hint", "hed/kernel")]


@check
def layouts_in_conflict_are_found():
    with scope(plain_map(MESH, {".*/(embeddings|kernel)": (None, "model")})):
        assert _found(tied_pair(), "layout-conflict") == [("error", "head/kernel")]


@check
def a_layout_of_another_rank_is_found():
    with scope(plain_map(MESH, {"table": ("model", None, None)})):
        model = tied_pair()
        assert shards(model) == {"table": (32, 8)}
        assert _found(model, "layout-misfit") == [("error", "table")]


@check
def a_part_that_is_whole_is_found():
    with scope(plain_map(MESH, {**COLUMNS, ".*lora.*": (None, None)})):
        assert _found(child(tether.low_rank(4)), "part-whole") == [("warning", "up/kernel_lora_b")]

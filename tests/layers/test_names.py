"""The path of a weight is a function of the model: not of what else lives, nor of how often it was copied."""

import re

import keras
import numpy as np
import pytest

import tether
from tests.support import numpy
from tether import adapters, forms
from tether.errors import UnknownName

pytestmark = pytest.mark.spread

layers = keras.layers
on_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch registers parameters by path")


def dense(name, units=3, **options):
    return layers.Dense(units, name=name, **options)


def weight(name, *shape):
    return tether.Weight(shape or (3, 3), "glorot_uniform", name=name)


def functional(*made, name="net"):
    inputs = outputs = keras.Input((3,))
    for layer in made:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name=name)


def block(name):
    """A layer of its own with layers below."""

    class Block(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.query, self.value = dense("query"), dense("value")

        def build(self, shape):
            self.query.build(shape)
            self.value.build(shape)

        def call(self, x):
            return self.value(self.query(x))

    keras.saving.register_keras_serializable("test_names", name="Block")(Block)
    return Block(name=name)


# Each gives a model; what else was made before plays no part, so it is made several times.
MODELS = {
    "promoted": lambda: promote(functional(dense("one"), dense("two")), "one/kernel"),
    "promoted in a block": lambda: promote(functional(block("block"), dense("two")), "block/query/kernel"),
    "promoted in a sequential model": lambda: promote(
        keras.Sequential([keras.Input((3,)), dense("one"), dense("two")], name="seq"), "one/kernel"
    ),
    "named": lambda: functional(*(tether.tie(dense(n), kernel=w) for w in [weight("codec")] for n in ("one", "two"))),
    "named with dots": lambda: functional(tether.tie(dense("one"), kernel=weight("shared.codec"))),
    "low rank": lambda: formed(functional(dense("one"), dense("two")), "one/kernel", tether.low_rank(2)),
    "low rank in a block": lambda: formed(functional(block("block")), "block/query/kernel", tether.low_rank(2)),
    "every form": lambda: every_form(),
    "an adapter": lambda: adapters.add(functional(dense("one")), "french", {"*/kernel": tether.low_rank(2)}),
    "a child": lambda: child_of(functional(dense("one"), dense("two"))),
    "integers": lambda: integers(functional(*(tether.tie(dense(n), kernel=w) for w in [weight("w")] for n in "ab"))),
    "several parts of one base": lambda: over_one_weight(3),
    "two adapters": lambda: with_adapters("french", "german"),
    "two of one name": lambda: functional(*(tether.tie(dense(n), kernel=weight("w")) for n in ("one", "two"))),
}


def promote(model, path):
    tether.weight_of(model, path)
    return model


def formed(model, path, form):
    return tether.tie(model, {path: form(tether.weight_of(model, path).stop_gradient())})


def every_form():
    model = functional(*(dense(n) for n in ("a", "b", "c", "d", "e")))
    made = [forms.dora(2), forms.gate(), forms.spectral_norm(), forms.weight_norm(), forms.scale()]
    for layer, form in zip("abcde", made, strict=True):
        tether.tie(model, {f"{layer}/kernel": form(tether.weight_of(model, f"{layer}/kernel"))})
    return model


def child_of(model):
    child = tether.inherit(model, {"*/kernel": tether.low_rank(2)}, name="child")
    return keras.Sequential([keras.Input((3,)), model, child], name="both")


def integers(model):
    tether.weight_of(model, "a/kernel").quantize("int8")
    return model


def paths(model):
    return [variable.path for variable in model.weights]


WANTED = {
    "promoted": {"one/kernel"},
    "promoted in a block": {"block/query/kernel"},
    "named": {"codec"},
    "named with dots": {"shared/codec"},
    "low rank": {"one/kernel", "one/kernel_lora_a", "one/kernel_lora_b"},
    "low rank in a block": {"block/query/kernel", "block/query/kernel_lora_a", "block/query/kernel_lora_b"},
    "every form": {
        *("a/kernel_magnitude", "a/kernel_lora_a", "b/kernel_gate", "b/kernel_own", "c/kernel_u", "c/kernel_v"),
        *("d/kernel_g", "e/kernel_scale"),
    },
    "an adapter": {"one/kernel", "one/kernel_lora_a", "one/kernel_lora_b", "french/strength"},
    "integers": {"w_int8", "w_scale"},
    "two of one name": {"w"},
}


@pytest.mark.parametrize("what", MODELS)
def test_the_same_code_gives_the_same_paths_whatever_lives(what):
    alive = [MODELS[what]() for _ in range(3)]
    assert paths(alive[0]) == paths(alive[1]) == paths(alive[2])
    assert WANTED.get(what, set()) <= set(paths(alive[0]))


@pytest.mark.parametrize("what", MODELS)
def test_a_copy_has_the_paths_of_its_original_and_so_has_the_third_generation_of_files(what, tmp_path):
    alive = [MODELS[what]()]
    # Keras itself leaves out the model's name in the paths of a layer that it builds again below an inner model.
    mine = {v.path for w in alive[0]._flatten_layers() if isinstance(w, tether.Weight) for v in w.variables}
    alive.append(keras.models.clone_model(alive[0]))
    for generation in range(3):
        alive[-1].save(tmp_path / f"{generation}.keras")
        alive.append(keras.saving.load_model(tmp_path / f"{generation}.keras"))
    for model in alive:
        found = {v.path for w in model._flatten_layers() if isinstance(w, tether.Weight) for v in w.variables}
        assert found == mine


def test_promoting_changes_no_path():
    for make in (lambda: functional(dense("one"), dense("two")), lambda: functional(block("b"))):
        plain, model = make(), make()
        for path in tether.layers.tying.paths.weight_paths(model):
            tether.weight_of(model, path)
        assert paths(model) == paths(plain)


def test_a_variable_is_looked_up_under_its_path_while_it_is_made(monkeypatch):
    """What a layout map does."""
    seen = []
    create = keras.Variable.__init__

    def watched(self, initializer, *args, **kwargs):
        def start(shape, dtype=None):
            seen.append(self.path)
            return keras.initializers.get(initializer)(shape, dtype=dtype)

        create(self, start if callable(initializer) else initializer, *args, **kwargs)

    model = functional(block("block"))
    kernel = tether.weight_of(model, "block/query/kernel")
    monkeypatch.setattr(keras.Variable, "__init__", watched)
    with keras.name_scope("elsewhere"):
        made = [weight("a.b.codec"), *tether.low_rank(2)(kernel).weights_used()[1:]]
        kernel.quantize("int8")
    assert [w.path for w in made] == ["a/b/codec", "block/query/kernel_lora_a", "block/query/kernel_lora_b"]
    assert seen == [*(w.path for w in made), "block/query/kernel_int8", "block/query/kernel_scale"]


@pytest.mark.parametrize("name", ["_odd.größe (1)", "a b", "1", "w:0"])
def test_any_name_will_do_also_where_a_layer_is_built_in_a_graph(name):
    layer = tether.tie(dense("one"), kernel=tether.Weight(name=name) * 1.0)
    model = keras.Sequential([layer])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 3)), np.ones((2, 3)), verbose=0)
    assert name.replace(".", "/") in paths(model)


# --------------------------------------------------------------------------- several parts beside one base


def low_rank_paths(model):
    return [path for path in paths(model) if "lora_a" in path]


def over_one_weight(count):
    """Layers that each add a part of their own to one weight, written before any of them is built."""
    shared = weight("shared")
    return functional(*(tether.tie(dense(f"d{n}"), kernel=shared + tether.low_rank(1)) for n in range(count)))


def with_adapters(*names):
    model = functional(dense("one"))
    for name in names:
        adapters.add(model, name, {"*/kernel": tether.low_rank(2)})
    return model


def test_parts_beside_one_base_are_numbered_in_the_order_in_which_they_are_made():
    for model in [over_one_weight(3) for _ in range(2)]:
        assert low_rank_paths(model) == ["shared_lora_a", "shared_lora_a_1", "shared_lora_a_2"]
    for model in [with_adapters("french", "german") for _ in range(2)]:
        assert low_rank_paths(model) == ["one/kernel_lora_a", "one/kernel_lora_a_1"]
        adapters.remove(model, "french")
        adapters.add(model, "spanish", {"*/kernel": tether.low_rank(2)})
        assert low_rank_paths(model) == ["one/kernel_lora_a_1", "one/kernel_lora_a"]
    for parent in [dense("parent") for _ in range(2)]:
        parent.build((None, 3))
        children = [tether.inherit(parent, kernel=tether.low_rank(2)) for _ in range(2)]
        assert [low_rank_paths(child) for child in children] == [["parent/kernel_lora_a"], ["parent/kernel_lora_a_1"]]


def test_a_part_that_is_taken_off_leaves_its_path(tmp_path):
    """So that paths follow from what the model has, and not from what it had."""
    model = with_adapters()
    for _ in range(3):
        adapters.add(model, "french", {"*/kernel": tether.low_rank(2)})
        assert low_rank_paths(model) == ["one/kernel_lora_a"]
        adapters.remove(model, "french")


def test_parts_that_are_added_after_a_copy_know_those_that_were_there(tmp_path):
    model = with_adapters("french")
    model.save(tmp_path / "m.keras")
    for copy in (keras.models.clone_model(model), keras.saving.load_model(tmp_path / "m.keras")):
        adapters.add(copy, "german", {"*/kernel": tether.low_rank(2)})
        assert low_rank_paths(copy) == ["one/kernel_lora_a", "one/kernel_lora_a_1"]


def test_an_adapter_of_a_file_stands_beside_those_that_are_there(tmp_path):
    model = with_adapters("french")
    adapters.save(model, "french", tmp_path / "french.safetensors")
    adapters.load(model, tmp_path / "french.safetensors", name="again")
    assert low_rank_paths(model) == ["one/kernel_lora_a", "one/kernel_lora_a_1"]
    again = model.get_layer("one").kernel.expression.parts["again"][1].weights_used()
    assert [w.name for w in again] == ["one.kernel_lora_a_1", "one.kernel_lora_b_1"]
    other = with_adapters()
    adapters.load(other, tmp_path / "french.safetensors")
    assert low_rank_paths(other) == ["one/kernel_lora_a"]


def test_a_tie_that_fails_takes_no_path():
    model = functional(dense("one"), dense("two", 4))
    base = tether.weight_of(model, "one/kernel")
    with pytest.raises(tether.TetherError):
        adapters.add(model, "french", {"one/kernel": tether.low_rank(2), "two/kernel": lambda w: base})
    adapters.add(model, "french", {"one/kernel": tether.low_rank(2)})
    assert low_rank_paths(model) == ["one/kernel_lora_a"]


# --------------------------------------------------------------------------- what goes by path


@pytest.mark.parametrize("what", [name for name in MODELS if name != "two of one name"])
def test_a_state_tree_holds_every_weight_and_takes_values_back(what):
    model = MODELS[what]()
    model.compile("sgd", "mse")
    tree = model.get_state_tree(value_format="numpy_array")
    kinds = ("trainable_variables", "non_trainable_variables")
    found = [leaf for kind in kinds for leaf in keras.tree.flatten(tree[kind])]
    stored = model.get_weights()
    assert sorted(leaf.shape for leaf in found) == sorted(value.shape for value in stored)
    doubled = {kind: keras.tree.map_structure(lambda leaf: (2 * leaf).astype(leaf.dtype), tree[kind]) for kind in kinds}
    model.set_state_tree(doubled)
    for before, now in zip(stored, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, (2 * before).astype(before.dtype))


def test_weight_decay_can_leave_out_parts_by_name():
    model = formed(functional(dense("one", use_bias=False)), "one/kernel", tether.low_rank(2, seed=1))
    optimizer = keras.optimizers.AdamW(0.0, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel_lora_a"])
    model.compile(optimizer, "mse")
    a, b = (v for v in model.weights if "lora" in v.path)
    b.assign(np.ones(b.shape))
    optimizer.build(model.trainable_variables)
    before = numpy(a.value)
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    np.testing.assert_array_equal(numpy(a.value), before)
    optimizer.learning_rate = 1.0
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    np.testing.assert_array_equal(numpy(a.value), before)
    np.testing.assert_allclose(numpy(b.value), np.full(b.shape, 0.5), rtol=1e-6)


def test_names_of_twins_are_numbered_in_the_models_order():
    for model in [MODELS["two of one name"]() for _ in range(2)]:
        first, second = (model.get_layer(name).kernel.expression.variable for name in ("one", "two"))
        names = tether.inspection.aliases(model)
        assert names["w"] == ("w", "one/kernel") and names["w_1"] == ("w_1", "two/kernel")
        assert names.find("^w$") == [first] and names.find("^w_1$") == names.find("two/kernel") == [second]
        found = tether.inspection.gradients(model, np.ones((2, 3), "float32"))
        assert {"w", "w_1"} <= set(found.weights)


def test_check_finds_twins_and_says_what_cannot_tell_them_apart():
    (found,) = [each for each in tether.check(MODELS["two of one name"]()) if each.rule == "path-used-twice"]
    assert "get_state_tree" in found.why and "state_dict" not in found.why
    assert found.mend == "tether.Weight(..., name='another_w')  # a name of its own"


# --------------------------------------------------------------------------- PyTorch's parameters


def beside_a_plain_variable():
    return functional(tether.tie(dense("tied"), kernel=weight("net.plain.kernel")), block("net"), dense("plain"))


def two_in_one_layer():
    return functional(tether.tie(dense("one"), kernel=weight("w"), bias=weight("w", 3)))


def nested():
    inner = functional(*(tether.tie(dense(n), kernel=weight("w")) for n in ("a", "b")), name="inner")
    return functional(inner, *(tether.tie(dense(n), kernel=weight("w")) for n in ("c", "d")), name="outer")


def in_a_block():
    made = block("block")
    tether.tie(made, {"query/kernel": weight("w"), "value/kernel": weight("w")})
    return functional(made)


def after_untie():
    """A plain variable has the path that its layer gives it, and the promoted weight keeps it too."""
    model = promote(functional(dense("one"), dense("two")), "one/kernel")
    tether.tie(model, {"two/kernel": tether.weight_of(model, "one/kernel").T})
    return keras.Sequential([keras.Input((3,)), tether.untie(model, "one/kernel")])


TWINS = {
    "two in two layers": MODELS["two of one name"],
    "two in one layer": two_in_one_layer,
    "nested": nested,
    "in a block": in_a_block,
    "beside a plain variable": beside_a_plain_variable,
    "after untie": after_untie,
}


@on_torch
@pytest.mark.parametrize("copy", ["made", "cloned", "loaded"])
@pytest.mark.parametrize("what", TWINS)
def test_parameters_and_state_dict_have_every_stored_variable_once(what, copy, tmp_path):
    model = TWINS[what]()
    if copy == "cloned":
        model = keras.models.clone_model(model)
    if copy == "loaded":
        model.save(tmp_path / "m.keras")
        model = keras.saving.load_model(tmp_path / "m.keras")
    listed = [id(parameter) for parameter in model.parameters()]
    assert sorted(listed) == sorted(id(variable.value) for variable in model.variables)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model.get_weights()
    for variable in model.weights:
        variable.assign(numpy(variable.value) + 1)
    model.load_state_dict(kept)
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@on_torch
def test_the_keys_of_twins_follow_the_models_order_every_time(tmp_path):
    alive = [nested(), nested()]
    alive += [keras.models.clone_model(alive[0])]
    alive[0].save(tmp_path / "m.keras")
    alive += [keras.saving.load_model(tmp_path / "m.keras")]
    for model in alive:
        state = model.state_dict()
        keys = ["_torch_params.w", "_torch_params.w_1", "_torch_params.w_2", "_torch_params.w_3"]
        assert [key for key in state if key in keys] == keys
        stored = [layer.kernel.expression.variable for layer in model._flatten_layers() if hasattr(layer, "kernel")]
        ordered = [variable for variable in model.variables if any(variable is other for other in stored)]
        for key, variable in zip(keys, ordered, strict=True):
            np.testing.assert_array_equal(numpy(state[key]), numpy(variable.value))
        assert {variable.path for variable in stored} == {"w"}


@on_torch
def test_what_pytorch_trains_is_every_one_of_them():
    import torch

    model = nested()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.get_weights()
    model(np.ones((2, 3), "float32")).square().sum().backward()
    optimizer.step()
    assert all(not np.array_equal(one, two) for one, two in zip(before, model.get_weights(), strict=True))


def two_blocks():
    x = keras.Input((4,))
    h = keras.layers.Dense(4, name="first")(x)
    return keras.Model(x, keras.layers.Dense(4, name="second")(keras.layers.Dense(4, name="third")(h)))


@pytest.mark.parametrize(
    ("given", "tied"),
    [
        (lambda w: {"*/kernel": w}, {"first", "second", "third"}),
        (lambda w: {"*/kernel": w, "!first/*": None}, {"second", "third"}),
        (lambda w: {("*/kernel", "!s*"): w}, {"first", "third"}),
        (lambda w: {re.compile("(first|second)/kernel"): w}, {"first", "second"}),
        (
            lambda w: {"*/kernel": 2 * w, "first/kernel": w, "second/kernel": w, "third/kernel": w.T},
            {"first", "second"},
        ),
    ],
)
def test_a_pattern_ties_several_weights_at_once(given, tied, tmp_path):
    model, w = two_blocks(), tether.Weight((4, 4), "glorot_uniform", name="shared")
    tether.tie(model, given(w))
    found = {layer.name for layer in model.layers if getattr(getattr(layer, "kernel", None), "expression", None) is w}
    assert found == tied
    again = keras.models.clone_model(model)
    assert again.count_params() == model.count_params()


def test_a_pattern_that_misses_ties_nothing():
    model = two_blocks()
    with pytest.raises(UnknownName, match=r"'\*/kernle'.*6 weights"):
        tether.tie(model, {"first/kernel": tether.Weight((4, 4), "ones"), "*/kernle": 1.0})
    assert all(type(layer) is keras.layers.Dense for layer in model.layers[1:])
    names = tether.inspection.aliases(model)
    assert len(names.find("*/kernel")) == len(names.find(re.compile(r".*kernel"))) == len(names.find("kernel$")) == 3
    assert names.find(["*/kernel", "!third/*"]) == [model.get_layer(n).kernel for n in ("first", "second")][:2]

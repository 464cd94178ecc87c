"""What processes do with files of a tied model that is split over all of them, and with the values in it.

Two processes do all of it; one process with several devices does what is not about others.
"""

import contextlib
import json
import time
import types

import keras
import numpy as np
from safetensors.numpy import load_file

import tether
from tests.distribution.programs import check, of_several

D, L = keras.distribution, keras.layers
SIZE, WIDTH = 16, 8


# --------------------------------------------------------------------------- a model


def values():
    """The right values, by the names that a file of tensors has for them."""
    rng = np.random.default_rng(3)
    shapes = {"embed.embeddings": (SIZE, WIDTH), "up.kernel": (WIDTH, 32), "up.bias": (32,), "down.kernel": (32, WIDTH)}
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def build(filled=True):
    tokens, table = keras.Input((4,), dtype="int32"), tether.Weight(name="table")
    embed = tether.tie(L.Embedding(SIZE, WIDTH, name="embed"), embeddings=table)
    h = L.Dense(32, activation="tanh", name="up")(embed(tokens))
    h = L.Dense(WIDTH, use_bias=False, name="down")(h)
    model = keras.Model(tokens, tether.tie(L.Dense(SIZE, use_bias=False, name="head"), kernel=table.T)(h), name="words")
    if filled:
        for variable, value in by_name(model):
            variable.assign(value)
    return model


def by_name(model):
    """Each stored variable, and its right value."""
    up, down, right = model.get_layer("up"), model.get_layer("down"), values()
    held = [model.get_layer("embed").embeddings.expression.variable, up.kernel, up.bias, down.kernel]
    return list(zip(held, right.values(), strict=True))


def layouts(rows=1):
    """A distribution that splits the table by rows, and the kernels by columns and by rows."""
    mesh = D.DeviceMesh((rows, len(D.list_devices("cpu")) // rows), ["batch", "model"], D.list_devices("cpu"))
    found = D.LayoutMap(mesh)
    found["table"] = ("model", None)
    found[".*up/kernel"] = (None, "model")
    found[".*up/bias"] = ("model",)
    found[".*down/kernel"] = ("model", None)
    return D.ModelParallel(layout_map=found, batch_dim_name="batch", auto_shard_dataset=False)


def holds(variable, right, *, split=True):
    """Asserts that the parts of a variable that lie here are those of a value, and whether they are parts."""
    shards = variable.value.addressable_shards
    assert shards
    for shard in shards:
        np.testing.assert_array_equal(np.asarray(shard.data), right[shard.index], err_msg=variable.path)
    assert not split or all(shard.data.shape != right.shape for shard in shards), f"{variable.path} is whole"


def holds_all(model):
    for variable, right in by_name(model):
        holds(variable, right)


def zeroed(model):
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    return model


def prepare(folder):
    """What one process writes, for several to read."""
    single = trained(build())
    for variable, right in by_name(single):
        variable.assign(right)
    tether.files.save_model(single, folder / "single.keras")
    np.savez(folder / "single.npz", *(variable.numpy() for variable in single.optimizer.variables))
    odd = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="odd")])
    tether.files.save_model(odd, folder / "odd.keras")
    (folder / "broken.keras").write_bytes((folder / "odd.keras").read_bytes()[:-200])
    (folder / "broken.safetensors").write_bytes(b"\x10" + 7 * b"\0" + b"no header in here")


def start(folder, number):
    import jax
    from jax.experimental.multihost_utils import sync_global_devices

    D.set_distribution(layouts())
    count = jax.process_count()
    return types.SimpleNamespace(folder=folder, number=number, count=count, model=build(), meet=sync_global_devices)


def is_split(variable):
    """Whether parts of a variable lie on other devices than the first, and so on other processes if there are any."""
    return len(variable.value.sharding.device_set) > 1 and not variable.value.is_fully_replicated


@contextlib.contextmanager
def raises(kind, *parts):
    """Asserts that an error is raised, with all of these in its text."""
    try:
        yield
    except kind as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return
    raise AssertionError(f"no {kind.__name__}")


# --------------------------------------------------------------------------- files of tensors


@check
def a_single_file_of_tensors_is_written_by_one_process_and_there_for_all(c):
    path = c.folder / "m.safetensors"
    tether.files.save_safetensors(c.model, path)
    found = load_file(path)
    assert set(found) == set(values())
    for name, right in values().items():
        np.testing.assert_array_equal(found[name], right)


@check
def each_process_reads_its_parts_of_a_single_file(c):
    model = zeroed(build())
    report = tether.files.load_safetensors(model, c.folder / "m.safetensors")
    assert len(report.loaded) == 4 and not report.missing and not report.skipped
    holds_all(model)


@check
def each_process_writes_the_parts_that_it_owns_once(c):
    folder = c.folder / "own"
    folder.mkdir(exist_ok=True)
    tether.files.save_safetensors(c.model, folder, per_process=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert sorted(each.name for each in folder.iterdir()) == sorted([*files, "model.safetensors.index.json"])
    assert len(files) == c.count and index["metadata"]["total_size"] == sum(v.nbytes for v in values().values())
    seen = {name: np.zeros(value.shape, "int32") for name, value in values().items()}
    for number, file in enumerate(files):
        assert f"{number + 1:05d}-of-{c.count:05d}" in file
        for name, part in load_file(folder / file).items():
            of, _, bounds = name.rstrip("]").partition("[")
            assert bool(bounds) == (c.count > 1)  # what lies on one process is whole
            place = tuple(slice(*map(int, each.split(":"))) for each in bounds.split(", ")) if bounds else ...
            np.testing.assert_array_equal(part, values()[of][place])
            seen[of][place] += 1
    assert all((count == 1).all() for count in seen.values())


@check
def a_second_save_takes_the_place_of_the_first(c):
    folder = c.folder / "own"
    before = {each.name for each in folder.iterdir()}
    c.meet("looked")
    tether.files.save_safetensors(c.model, folder, per_process=True)
    after = {each.name for each in folder.iterdir()}
    assert len(after) == c.count + 1 and before & after == {"model.safetensors.index.json"}


@check
def parts_are_read_onto_another_mesh(c):
    with layouts(rows=2).scope():
        model = zeroed(build(filled=False))
        tether.files.load_safetensors(model, c.folder / "own")
        holds_all(model)
        columns = 32 // (len(D.list_devices("cpu")) // 2)
        assert model.get_layer("up").kernel.value.addressable_shards[0].data.shape == (WIDTH, columns)


@check
def what_every_process_has_a_copy_of_is_written_once(c):
    devices = D.list_devices("cpu")
    mesh = D.DeviceMesh((len(devices),), ["batch"], devices)
    with D.DataParallel(mesh, auto_shard_dataset=False).scope():
        model = build()
        folder = c.folder / "copies"
        folder.mkdir(exist_ok=True)
        tether.files.save_safetensors(model, folder, per_process=True)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(values())
        zeroed(model)
        tether.files.load_safetensors(model, folder)
        for variable, right in by_name(model):
            holds(variable, right, split=False)


@check
def names_are_given_to_parts_and_other_layouts_refused(c):
    folder = c.folder / "named"
    folder.mkdir(exist_ok=True)
    names = {"up.kernel": "mlp.weight"}
    tether.files.save_safetensors(c.model, folder, names=names, per_process=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert any(name.partition("[")[0] == "mlp.weight" for name in index["weight_map"])
    model = zeroed(build())
    tether.files.load_safetensors(model, folder, names=names)
    holds_all(model)
    turned = {"up.kernel": tether.files.Tensor("mlp.weight", inputs=1)}
    before = sorted(folder.iterdir())
    c.meet("looked")
    with raises(tether.errors.Unsupported, "up.kernel", "per_process"):
        tether.files.save_safetensors(c.model, folder, names=turned, per_process=True)
    assert sorted(folder.iterdir()) == before
    tether.files.save_safetensors(c.model, c.folder / "turned.safetensors", names=turned)
    np.testing.assert_array_equal(load_file(c.folder / "turned.safetensors")["mlp.weight"], values()["up.kernel"].T)


class Holder(L.Layer):
    """A layer that holds one weight of any dtype."""

    def __init__(self, table):
        super().__init__(name="holder")
        self.table = table
        self.built = True


@check
def values_in_sixteen_and_eight_bits_are_kept(c):
    folder = c.folder / "small"
    folder.mkdir(exist_ok=True)
    right = np.arange(64).reshape(8, 8) % 9
    for dtype in ("bfloat16", "float16", "int8", "uint8", "bool", "int32", "float8_e4m3fn"):
        weight = tether.Weight((8, 8), "zeros", dtype=dtype, name="table")
        holder = Holder(weight)
        weight.assign(keras.ops.cast(right % 2 if dtype == "bool" else right, dtype))
        expected = np.asarray(right % 2 if dtype == "bool" else right, "float32")
        with tether.distribution.gathering():
            np.testing.assert_array_equal(weight.numpy().astype("float32"), expected, err_msg=dtype)
        for path, options in ((folder / "one.safetensors", {}), (folder, {"per_process": True})):
            tether.files.save_safetensors(holder, path, **options)
            source = path if path.is_file() else path / "model.safetensors.index.json"
            weight.assign(keras.ops.zeros((8, 8), dtype))
            tether.files.load_safetensors(holder, source)
            with tether.distribution.gathering():
                np.testing.assert_array_equal(weight.numpy().astype("float32"), expected, err_msg=dtype)


# --------------------------------------------------------------------------- models


def trained(model):
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(np.ones((4, 4), "int32"), np.zeros((4, 4, SIZE), "float32"), verbose=0)
    return model


def gathered(variables):
    with tether.distribution.gathering():
        return [tether.keras_seam.to_numpy(variable.value) for variable in variables]


@check
def a_trained_model_is_saved_whole_with_its_slots(c):
    c.trained = trained(build())
    slots = [v for v in c.trained.optimizer.variables if len(v.shape)]
    assert slots and any(is_split(v) for v in slots)
    found = gathered([*c.trained.weights, *c.trained.optimizer.variables])
    path = c.folder / "trained.keras"
    tether.files.save_model(c.trained, path)
    assert path.is_file()
    if c.number == 0:
        np.savez(c.folder / "trained.npz", *found)
    c.meet("written")


@check
def a_model_and_its_slots_are_loaded_by_parts(c):
    again = tether.files.load_model(c.folder / "trained.keras")
    mine, others = (m.weights + m.optimizer.variables for m in (c.trained, again))
    for old, new in zip(mine, others, strict=True):
        assert old.path.rpartition("/")[2] == new.path.rpartition("/")[2]
        assert not len(old.shape) or "iteration" in new.path or is_split(new)
        for a, b in zip(old.value.addressable_shards, new.value.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    again.fit(np.ones((4, 4), "int32"), np.zeros((4, 4, SIZE), "float32"), verbose=0)


@check
def a_file_of_one_process_is_loaded_by_parts(c):
    model = tether.files.load_model(c.folder / "single.keras")
    holds_all(model)
    assert all(is_split(v) for v in model.optimizer.variables if len(v.shape))
    right = dict(np.load(c.folder / "single.npz"))
    for number, variable in enumerate(model.optimizer.variables):
        for shard in variable.value.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), right[f"arr_{number}"][shard.index])


@check
def weights_of_an_untied_file_go_to_the_shared_one(c):
    model = zeroed(build())
    report = tether.files.load_untied(model, c.folder / "single.keras")
    assert len(report.loaded) == 4
    holds_all(model)


# --------------------------------------------------------------------------- looking, and changing the model


@of_several
def one_process_alone_does_not_read_what_lies_elsewhere(c):
    table = c.model.get_layer("embed").embeddings.expression
    before = len(c.model.weights)
    for read, name in (
        (table.numpy, "table"), (table.T.numpy, "table"), (c.model.get_layer("head").kernel.numpy, "head/kernel"),
    ):  # fmt: skip
        with raises(tether.TetherError, name, "processes", "tether.distribution.gathering()"):
            read()
    assert len(c.model.weights) == before
    with tether.distribution.gathering():
        np.testing.assert_array_equal(table.numpy(), values()["embed.embeddings"])
        np.testing.assert_array_equal(table.T.numpy(), values()["embed.embeddings"].T)
        np.testing.assert_array_equal(c.model.get_layer("head").kernel.numpy(), values()["embed.embeddings"].T)


@check
def a_summary_and_a_card_read_no_values(c):
    assert "table" in str(tether.summary(c.model))
    assert "table" in tether.files.card(c.model)


def outputs(model):
    """What a model gives for some tokens: a value that every process computes a part of, or all of."""
    return gathered([types.SimpleNamespace(value=model(np.arange(8).reshape(2, 4) % SIZE))])[0]


@check
def an_adapter_is_added_saved_merged_and_loaded(c):
    model = build()
    plain = outputs(model)
    tether.adapters.add(model, "french", {"up/kernel": tether.low_rank(2), "embed/embeddings": tether.low_rank(2)})
    parts = [w for w in model.weights if "lora_b" in w.path]
    assert len(parts) == 2
    for part in parts:
        part.assign(np.full(part.shape, 0.25, "float32"))
    assert tether.adapters.strengths(model) == {"french": 1.0}
    changed = outputs(model)
    assert np.abs(changed - plain).max() > 1e-3
    path = c.folder / "french.safetensors"
    tether.adapters.save(model, "french", path)
    other = build()
    tether.adapters.load(other, path)
    np.testing.assert_allclose(outputs(other), changed, atol=1e-5)
    tether.adapters.merge(other)
    np.testing.assert_allclose(outputs(other), changed, atol=1e-5)
    tether.files.save_safetensors(model, c.folder / "adapted.safetensors")
    again = build()
    tether.adapters.load(again, path)
    zeroed(again)
    tether.files.load_safetensors(again, c.folder / "adapted.safetensors")
    tether.adapters.set_strengths(again, {"french": 1.0})
    np.testing.assert_allclose(outputs(again), changed, atol=1e-5)


@check
def a_peft_folder_is_written_and_read(c):
    child = tether.inherit(build(), {"up/kernel": lambda w: w + tether.low_rank(2, alpha=4)})
    for part in [w for w in child.weights if "lora_b" in w.path]:
        part.assign(np.full(part.shape, 0.25, "float32"))
    tether.files.save_peft(child, c.folder / "peft")
    other = build()
    tether.files.load_peft(other, c.folder / "peft")
    np.testing.assert_allclose(outputs(other), outputs(child), atol=1e-5)


@check
def a_plain_model_has_the_values(c):
    plain = tether.materialize(build())
    np.testing.assert_allclose(outputs(plain), outputs(c.model), atol=1e-6)


@check
def a_layer_is_untied_and_tied_again(c):
    model = build()
    tether.untie(model.get_layer("head"))
    assert len(model.weights) == 5
    np.testing.assert_allclose(outputs(model), outputs(c.model), atol=1e-6)
    tether.tie(model.get_layer("head"), kernel=tether.weight_of(model.get_layer("embed"), "embeddings").T)
    assert len(model.weights) == 4
    np.testing.assert_allclose(outputs(model), outputs(c.model), atol=1e-6)


@check
def children_start_at_the_values_of_their_parent(c):
    parent = build()
    for child in (tether.inherit(parent, share=False), tether.inherit(parent), keras.models.clone_model(parent)):
        assert child is not parent
    np.testing.assert_allclose(outputs(tether.inherit(parent, share=False)), outputs(parent), atol=1e-6)
    for form in (tether.low_rank(2), tether.low_rank(2, start="pissa"), tether.forms.dora(2), tether.forms.scale()):
        child = tether.inherit(
            parent, {"up/kernel": lambda w, form=form: form(w) if "low" not in repr(form) else w + form}
        )
        np.testing.assert_allclose(outputs(child), outputs(parent), atol=1e-5)


@check
def banks_routes_and_shared_depths_are_made(c):
    parts = [tether.weight_of(build().get_layer("up"), "kernel") for _ in range(2)]
    choice = tether.weights.Argument("choice", (), "int32", default=0)
    tether.tie(layer := L.Dense(32, name="banked"), kernel=tether.bank(parts, choice))
    assert tuple(layer(np.ones((2, WIDTH), "float32"), choice=1).shape) == (2, 32)
    (stack,) = [weight for weight in layer.weights if len(weight.shape) == 3]
    np.testing.assert_array_equal(gathered([stack])[0], np.stack([values()["up.kernel"]] * 2))
    layer = L.Dense(32, name="up")
    layer.build((None, WIDTH))
    routed = tether.route(layer, kernel=[tether.Weight(values()["up.kernel"], name=f"option{n}") for n in range(3)])
    assert tuple(routed(np.ones((2, WIDTH), "float32"), choice=1).shape) == (2, 32)
    block = L.Dense(WIDTH, name="block")
    block.build((None, WIDTH))
    body = tether.Repeat(block, times=3, vary={"kernel": tether.low_rank(2)})
    assert tuple(body(np.ones((2, WIDTH), "float32")).shape) == (2, WIDTH)


@check
def weights_are_rounded_to_eight_bits(c):
    model = build()
    if c.count > 1:
        with raises(tether.errors.Unsupported, "up/kernel", "tether.weight_of"):
            model.quantize("int8")
        holds_all(model)
    before = outputs(model)
    for name in ("up", "down"):
        tether.weight_of(model.get_layer(name), "kernel")
    model.quantize("int8")
    assert {str(weight.dtype) for weight in model.weights} == {"int8", "float32"}
    assert np.abs(outputs(model) - before).max() < 0.05 * np.abs(before).max()
    path = c.folder / "rounded.keras"
    tether.files.save_model(model, path)
    np.testing.assert_allclose(outputs(tether.files.load_model(path)), outputs(model), atol=1e-5)


@check
def a_table_gets_more_rows(c):
    model = build()
    table = tether.weight_of(model.get_layer("embed"), "embeddings")
    tether.files.resize(table, 0, SIZE + 4, fill="zeros", model=model)
    with tether.distribution.gathering():
        found = model.get_layer("embed").embeddings.numpy()
    np.testing.assert_array_equal(found, np.concatenate([values()["embed.embeddings"], np.zeros((4, WIDTH))]))


@check
def what_is_made_of_a_split_weight_is_split_alike(c):
    rows, columns = ("model", None), (None, "model")

    def laid(model, *ends):
        found = {variable.path: tether.keras_seam.lies_as(variable) for variable in model.weights}
        return [next(axes for path, axes in found.items() if path.endswith(end)) for end in ends]

    model = build()
    tether.adapters.add(model, "x", {"up/kernel": tether.low_rank(2), "embed/embeddings": tether.low_rank(2)})
    assert laid(model, "up/kernel_lora_b", "table_lora_a") == [columns, rows]
    assert laid(model, "up/kernel_lora_a", "table_lora_b") == [(None, None), (None, None)]
    tether.files.save_model(model, c.folder / "adapted.keras")
    again = tether.files.load_model(c.folder / "adapted.keras")
    ends = [variable.path for variable in model.weights]
    assert laid(again, *ends) == laid(model, *ends)
    for made in (tether.untie(build()), tether.materialize(build())):
        assert laid(made, "head/kernel", "up/kernel", "down/kernel") == [columns, columns, rows]
    for made in (keras.models.clone_model(build()), tether.inherit(build(), share=False)):
        assert laid(made, "table", "up/kernel", "down/kernel") == [rows, columns, rows]
    model = build()
    tether.files.resize(tether.weight_of(model.get_layer("embed"), "embeddings"), 0, SIZE + 8, model=model)
    assert laid(model, "table") == [rows]
    for name in ("up", "down"):
        tether.weight_of(model.get_layer(name), "kernel")
    model.quantize("int8")
    assert laid(model, "table_int8", "up/kernel_int8", "down/kernel_int8") == [rows, columns, rows]
    assert laid(model, "up/kernel_scale", "down/kernel_scale") == [columns, (None, None)]


@check
def values_are_copied_from_another_model(c):
    model = zeroed(build())
    tether.transfer.copy(c.model, model)
    holds_all(model)


@check
def gradients_of_uses_are_measured(c):
    x = np.arange(8).reshape(2, 4) % SIZE
    found = tether.inspection.gradients(
        c.model, x, np.zeros((2, 4, SIZE), "float32"), loss=keras.losses.MeanSquaredError()
    )
    assert "table" in str(found)


@of_several
def a_copy_in_another_format_is_left_to_one_process(c):
    with raises(tether.errors.Unsupported, "words", "save_model"):
        tether.files.export(c.model, c.folder / "exported")


# --------------------------------------------------------------------------- what goes wrong


@of_several
def a_call_that_one_process_makes_alone_ends(c):
    begun = time.monotonic()
    with tether.distribution.time_limit(1):
        if c.number == 0:
            with raises(tether.TetherError, "process 1", "1 seconds", "every process"):
                tether.files.save_safetensors(c.model, c.folder / "alone.safetensors")
        else:
            time.sleep(2)
            with raises(tether.TetherError, "process 1", "1 seconds"):
                tether.files.save_safetensors(c.model, c.folder / "late.safetensors")
    assert time.monotonic() - begun < 20 and not list(c.folder.glob("*a*e.safetensors"))
    c.meet("ended")
    with tether.distribution.time_limit(1):
        if c.number == 1:
            with raises(tether.TetherError, "process 0", "1 seconds", "every process"):
                tether.files.save_model(c.model, c.folder / "alone.keras")
        else:
            time.sleep(2)
            with raises(tether.TetherError, "process 1", "1 seconds"):
                tether.files.save_model(c.model, c.folder / "late.keras")
    c.meet("ended again")
    tether.files.save_safetensors(c.model, c.folder / "together.safetensors")


@of_several
def different_calls_end(c):
    with raises(tether.TetherError, "save_safetensors", "save_model"):
        if c.number == 0:
            tether.files.save_safetensors(c.model, c.folder / "one.safetensors")
        else:
            tether.files.save_model(c.model, c.folder / "two.keras")
    tether.files.save_safetensors(c.model, c.folder / "together.safetensors")


@of_several
def a_failure_in_one_process_is_told_in_all(c):
    for failing in (0, 1):
        model = build()
        layer, write = model.get_layer("up"), model.get_layer("up").save_own_variables

        def fails(store, failing=failing, write=write):
            if c.number == failing:
                raise OSError("the disk is full")
            write(store)

        object.__setattr__(layer, "save_own_variables", fails)
        path = c.folder / f"failing{failing}.keras"
        kind = OSError if c.number == failing else tether.TetherError
        with tether.distribution.time_limit(20), raises(kind, "the disk is full"):
            tether.files.save_model(model, path)
        c.meet("failed")
        assert not path.exists() and not list(c.folder.glob(f".*{path.name}"))
    tether.files.save_safetensors(c.model, c.folder / "together.safetensors")


@check
def a_layout_that_does_not_fit_is_no_damage_of_a_file(c):
    devices = D.list_devices("cpu")
    mesh = D.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
    odd = D.LayoutMap(mesh)
    odd["odd/kernel"] = (None, "model")
    with D.ModelParallel(layout_map=odd, batch_dim_name="batch", auto_shard_dataset=False).scope():
        try:
            tether.files.load_model(c.folder / "odd.keras")
        except tether.errors.InvalidConfig as error:
            raise AssertionError(error) from error
        except tether.TetherError as error:
            assert "damaged" not in str(error)
        else:
            raise AssertionError("no error")
    c.meet("odd")


@check
def damage_is_told_in_all_processes(c):
    with raises(tether.errors.InvalidConfig, "broken.keras"):
        tether.files.load_model(c.folder / "broken.keras")
    with raises(tether.errors.InvalidConfig, "broken.safetensors"):
        tether.files.load_safetensors(c.model, c.folder / "broken.safetensors")
    holds_all(c.model)
    tether.files.save_safetensors(c.model, c.folder / "together.safetensors")


# --------------------------------------------------------------------------- Orbax


@check
def a_checkpoint_of_orbax_comes_back_on_another_mesh(c):
    folder = c.folder / "orbax"
    saving = keras.callbacks.OrbaxCheckpoint(directory=str(folder), monitor="loss", save_on_background=False)
    model = build()
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    model.fit(np.ones((4, 4), "int32"), np.zeros((4, 4, SIZE), "float32"), verbose=0, callbacks=[saving])
    right = gathered([*model.weights, *model.optimizer.variables])
    with layouts(rows=2).scope():
        again = keras.saving.load_model(str(folder))
        for variable, value in zip([*again.weights, *again.optimizer.variables], right, strict=True):
            holds(variable, value, split=False)
        assert is_split(again.get_layer("up").kernel)
        assert again.get_layer("head").kernel.expression == again.get_layer("embed").embeddings.expression.T
        other = zeroed(build())
        other.compile(keras.optimizers.Adam(1e-3), "mse")  # which Keras asks for
        other.load_weights(str(folder))
        for variable, value in zip(other.weights, right, strict=False):
            holds(variable, value)

"""Weights of every dtype, also where a backend holds another one than it was asked for: files have what is there."""

import json

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import tether
from tests.files import hostile
from tests.support import assert_close
from tether import keras_seam
from tether.errors import TetherError, Unsupported
from tether.files.loading.entries import Entry
from tether.files.tensors.tensor_file import write_tensors

BACKEND = keras.backend.backend()
REAL = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32",
    "float64", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
COMPLEX = ["complex64", "complex128"]
NOT_HERE = {"torch": {"uint64"}, "tensorflow": {"float8_e4m3fn", "float8_e5m2"}}.get(BACKEND, set())
NARROWER = {
    "jax": {"float64": "float32", "int64": "int32", "uint64": "uint32", "complex128": "complex64"},
    "torch": {"uint16": "int32", "uint32": "int64"},
}.get(BACKEND, {})
"""What a backend holds for what it has not."""
SHAPES = {"scalar": (), "empty": (0, 3), "matrix": (3, 2), "large": (1100, 1000)}
SAFETENSORS = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")  # JAX's, of each such variable


def of_dtypes(dtypes):
    return pytest.mark.parametrize("dtype", [dtype for dtype in dtypes if dtype not in NOT_HERE])


@keras.saving.register_keras_serializable(package="test_dtypes")
class Holder(keras.layers.Layer):
    """Weights of one dtype."""

    def __init__(self, stored, **kwargs):
        super().__init__(**kwargs)
        self.stored = stored

    def build(self, shape):
        for name, shape_ in SHAPES.items():
            setattr(self, name, self.add_weight(shape_, "zeros", dtype=self.stored, trainable=False, name=name))

    def call(self, x):
        return x

    def get_config(self):
        return {**super().get_config(), "stored": self.stored}


def holding(dtype):
    return keras.Sequential([keras.Input((2,)), Holder(dtype, name="holder")])


def filled(dtype, rng):
    """A model with values that its dtype has exactly, and these values."""
    model = holding(dtype)
    values = [value_of(dtype, shape, rng) for shape in SHAPES.values()]
    for variable, value in zip(model.weights, values, strict=True):
        keras_seam.write(variable, value.astype(getattr(ml_dtypes, held(dtype), held(dtype))))
    return model, values


def held(dtype):
    return NARROWER.get(dtype, dtype)


def value_of(dtype, shape, rng):
    if dtype == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    numbers = np.asarray(rng.integers(0, 2 if dtype == "float8_e5m2" else 9, shape))
    if dtype.startswith("u"):  # up to the largest that is held here
        largest = min(np.iinfo(held(dtype)).max, np.iinfo(dtype).max)
        return np.asarray(numbers.astype("uint64") + np.uint64(largest - 8))
    return np.asarray(numbers + 1j * numbers) if dtype in COMPLEX else numbers


def values_of(model):
    return [keras_seam.on_host(keras_seam.plain_tensor(keras_seam.raw_value(variable))) for variable in model.weights]


def assert_same(model, values, dtype):
    for found, value in zip(values_of(model), values, strict=True):
        assert str(found.dtype) == held(dtype)
        wide = "complex128" if dtype in COMPLEX else "object"
        assert np.array_equal(found.astype(wide), value.astype(wide))


# --------------------------------------------------------------------------- safetensors


@of_dtypes([*REAL, "complex64"])
def test_safetensors_have_what_is_there_and_give_it_back(dtype, rng, tmp_path):
    model, values = filled(dtype, rng)
    path = tmp_path / "m.safetensors"
    tether.files.save_safetensors(model, path)
    with safe_open(path, "np") as file:  # which raises if the header and the data do not fit
        codes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert codes == {SAFETENSORS[held(dtype)]}
    for name, value in zip(SHAPES, values, strict=True):
        stored = value.astype(getattr(ml_dtypes, held(dtype), held(dtype)))
        assert raw(path, f"holder.{name}") == ([*value.shape], stored.tobytes())
    again = holding(dtype)
    report = tether.files.load_safetensors(again, path)
    assert len(report.loaded) == 4 and not report.conflicting
    assert_same(again, values, dtype)


def raw(path, name):
    """The shape and the bytes of a tensor."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    first, last = (start + at for at in entry["data_offsets"])
    return entry["shape"], data[first:last]


@pytest.mark.skipif("complex128" in NARROWER, reason="the backend holds complex64 for complex128")
def test_a_dtype_that_safetensors_have_not_is_refused_before_anything_is_written(rng, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(Unsupported, match="complex128"):
        tether.files.save_safetensors(filled("complex128", rng)[0], path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.spread(3)
@pytest.mark.parametrize("dtype", NARROWER)
def test_what_another_backend_wrote_in_full_is_held_as_narrow_as_here(dtype, rng, tmp_path):
    """Also a large weight, which is read in parts where the file has what is in memory."""
    _, values = filled(dtype, rng)
    wide = [value.astype(dtype) for value in values]
    again, path = holding(dtype), tmp_path / "m.weights.h5"
    again.save_weights(path)
    rewrite(path, wide)
    tether.files.load_untied(again, path)
    assert_same(again, values, dtype)
    if dtype in SAFETENSORS:
        from safetensors.numpy import save_file

        again, path = holding(dtype), tmp_path / "m.safetensors"
        save_file({f"holder.{name}": value for name, value in zip(SHAPES, wide, strict=True)}, path)
        tether.files.load_safetensors(again, path)
        assert_same(again, values, dtype)


def rewrite(path, values):
    """Gives the entries of a file other dtypes, as another backend would have written them."""
    with h5py.File(path, "r+") as file:
        for number, value in enumerate(values):
            del file[f"layers/holder/vars/{number}"]
            file[f"layers/holder/vars/{number}"] = value


@pytest.mark.spread(3)
@pytest.mark.parametrize("dtype", sorted({"int64", "uint64"} & set(NARROWER)) or ["int32"])
def test_a_number_that_is_not_held_here_is_refused_and_nothing_changes(dtype, rng, tmp_path):
    from safetensors.numpy import save_file

    model, values = filled(dtype, rng)
    too_large = {f"holder.{name}": np.full(shape, 2**40, "int64") for name, shape in SHAPES.items()}
    save_file(too_large, tmp_path / "m.safetensors")
    with pytest.raises(TetherError, match=f"{held(dtype)} cannot hold"):
        tether.files.load_safetensors(model, tmp_path / "m.safetensors")
    assert_same(model, values, dtype)


def test_a_sign_that_would_be_lost_is_refused(rng, tmp_path):
    from safetensors.numpy import save_file

    model, values = filled("int8", rng)
    save_file(
        {f"holder.{name}": np.full(shape, 250, "uint8") for name, shape in SHAPES.items()}, tmp_path / "m.safetensors"
    )
    with pytest.raises(TetherError, match="int8 cannot hold"):
        tether.files.load_safetensors(model, tmp_path / "m.safetensors")
    assert_same(model, values, "int8")


def test_parts_of_one_tensor_that_differ_in_dtype_are_refused(tmp_path):
    x = keras.Input((4,))
    parts = [
        keras.layers.Dense(3, use_bias=False, name=name, dtype=d)(x)
        for name, d in zip("qk", ("float32", "bfloat16"), strict=True)
    ]
    names = {f"{name}.kernel": tether.files.Tensor("qk", inputs=1, part=(n, 2)) for n, name in enumerate("qk")}
    with pytest.raises(TetherError, match="different dtypes"):
        tether.files.save_safetensors(keras.Model(x, parts), tmp_path / "m.safetensors", names=names)
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_not_what_the_header_says_is_never_written(tmp_path):
    entry = Entry("w", (2,), "float64", lambda: np.zeros(2, "float32"))
    with pytest.raises(TetherError, match=r"'w' became something else.*float64.*float32"):
        write_tensors(tmp_path / "m.safetensors", [entry], {})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- Keras's files

SAVED = [dtype for dtype in [*REAL, *COMPLEX] if not dtype.startswith("float8")]


@of_dtypes(SAVED)
@pytest.mark.parametrize("load", ["model", "untied"])
def test_keras_files_have_what_is_there_and_give_it_back(load, dtype, rng, tmp_path):
    model, values = filled(dtype, rng)
    path = tmp_path / "m.keras"
    tether.files.save_model(model, path)
    again = tether.files.load_model(path) if load == "model" else holding(dtype)
    if load == "untied":
        tether.files.load_untied(again, path)
    assert_same(again, values, dtype)
    assert {weight.dtype for weight in tether.inspection.facts(path).weights} == {held(dtype)}
    assert not tether.inspection.diff(model, path)


@pytest.mark.spread(3)
@pytest.mark.parametrize("dtype", NARROWER)
def test_a_model_that_another_backend_saved_in_full_is_held_as_narrow_as_here(dtype, rng, tmp_path):
    model, values = filled(dtype, rng)
    path = tmp_path / "m.keras"
    tether.files.save_model(model, path)

    def widen(file):
        for number, value in enumerate(values):
            del file[f"layers/holder/vars/{number}"]
            file[f"layers/holder/vars/{number}"] = value.astype(dtype)

    hostile.with_values(widen)(path)
    assert_same(tether.files.load_model(path), values, dtype)


@pytest.mark.skipif("float8_e4m3fn" in NOT_HERE, reason="the backend has no such variable")
@pytest.mark.parametrize("load", ["model", "untied"])
def test_float8_of_keras_files_is_read_though_the_file_does_not_say_what_it_is(load, rng, tmp_path):
    """Keras on JAX writes its bytes, and cannot read them."""
    model, values = filled("uint8", rng)
    values = [value.astype("float64") % 8 for value in values]
    path = tmp_path / "m.keras"
    tether.files.save_model(model, path)

    def as_bytes(file):
        for number, value in enumerate(values):
            del file[f"layers/holder/vars/{number}"]
            file[f"layers/holder/vars/{number}"] = value.astype(ml_dtypes.float8_e4m3fn)

    hostile.with_values(as_bytes)(path)
    hostile.with_config(lambda config: config["config"]["layers"][1]["config"].update(stored="float8_e4m3fn"))(path)
    again = tether.files.load_model(path) if load == "model" else holding("float8_e4m3fn")
    if load == "untied":
        tether.files.load_untied(again, path)
    assert_same(again, values, "float8_e4m3fn")


# --------------------------------------------------------------------------- ties, adapters, PEFT, retie


def tied(dtype):
    w, x = tether.Weight(name="w", dtype=dtype), keras.Input((4,), dtype=dtype)
    h = tether.tie(keras.layers.Dense(3, name="enc", dtype=dtype), kernel=w)(x)
    return keras.Model(x, tether.tie(keras.layers.Dense(4, name="dec", dtype=dtype), kernel=w.T)(h), name="tied")


def plain(dtype):
    x = keras.Input((4,), dtype=dtype)
    return keras.Model(
        x, keras.layers.Dense(4, name="dec", dtype=dtype)(keras.layers.Dense(3, name="enc", dtype=dtype)(x))
    )


FLOATS = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["safetensors", "keras"])
def test_ties_of_every_dtype_fill_tied_and_plain_models(kind, dtype, tmp_path):
    source, path = tied(dtype), tmp_path / f"m.{kind}"
    if kind == "keras":
        tether.files.save_model(source, path)
        assert not tether.inspection.diff(source, path)
    else:
        tether.files.save_safetensors(source, path)
    load = tether.files.load_untied if kind == "keras" else tether.files.load_safetensors
    for target in (tied(dtype), plain(dtype)):
        assert not load(target, path).conflicting
        assert np.array_equal(host(target.layers[1].kernel), host(source.layers[1].kernel))
        assert np.array_equal(host(target.layers[2].kernel), host(source.layers[1].kernel).T)


def host(variable):
    return np.asarray(keras_seam.on_host(keras_seam.plain_tensor(variable.value)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_adapter_of_every_dtype_is_written_as_it_is_and_read(dtype, rng, tmp_path):
    model, path = plain(dtype), tmp_path / "a.safetensors"
    tether.adapters.add(model, "style", {"enc/kernel": tether.low_rank(2, dtype=dtype)})
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    tether.adapters.save(model, "style", path)
    with safe_open(path, "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {SAFETENSORS[held(dtype)]}  # noqa: SIM118
    again = plain(dtype)
    again.set_weights([host(layer) for layer in plain_weights(model)])
    tether.adapters.load(again, path)
    assert np.array_equal(host(again.layers[1].kernel), host(model.layers[1].kernel))


def plain_weights(model):
    """The weights that a model has without its adapter, in the order of `plain`."""
    base = tether.weight_of(model, "enc/kernel").base.weights_used()[0]
    return [base.variable, model.layers[1].bias, model.layers[2].kernel, model.layers[2].bias]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_peft_folder_of_every_dtype_is_written_as_it_is_and_read(dtype, rng, tmp_path):
    base = plain(dtype)
    child = tether.inherit(base, {"enc/kernel": tether.low_rank(2, alpha=4, dtype=dtype)})
    for variable in child.trainable_variables:
        if "lora" in variable.path:
            variable.assign(rng.normal(size=variable.shape))
    tether.files.save_peft(child, tmp_path / "lora")
    with safe_open(tmp_path / "lora/adapter_model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {SAFETENSORS[held(dtype)]}  # noqa: SIM118
    again = plain(dtype)
    again.set_weights(base.get_weights())
    tether.files.load_peft(again, tmp_path / "lora")
    assert_close(again.layers[1].kernel, child.layers[1].kernel)


@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_of_every_dtype_are_joined(dtype, tmp_path):
    whole = tied(dtype)
    parts = []
    for number, name in enumerate(("enc", "dec")):
        x = keras.Input((4 - number,), dtype=dtype)
        keras.Model(x, whole.get_layer(name)(x), name=name).save(tmp_path / f"{name}.keras")
        parts.append(keras.saving.load_model(tmp_path / f"{name}.keras"))
    assert not tether.files.retie(*parts).conflicting
    assert np.array_equal(host(parts[0].layers[1].kernel), host(whole.get_layer("enc").kernel))
    assert np.array_equal(host(parts[1].layers[1].kernel), host(parts[0].layers[1].kernel).T)

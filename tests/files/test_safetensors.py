"""Models as safetensors: each weight once, with what is tied in the header."""

import json
import os
import re
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tether
from tests.files.models import autoencoder, randomize, stack, state
from tests.support import assert_close, numpy
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, Unsupported, ValueConflict

pytestmark = pytest.mark.spread

layers = keras.layers
INPUTS = {autoencoder: np.ones((2, 5), "float32"), stack: np.array([[1, 2, 6, 0]], "int32")}
every_model = pytest.mark.parametrize("make", [autoencoder, stack], ids=lambda f: f.__name__)


def saved(model, tmp_path, name="m.safetensors", **options):
    tether.files.save_safetensors(model, tmp_path / name, **options)
    return tmp_path / name


def tensors(path):
    with safe_open(path, framework="np") as file:
        return {key: file.get_slice(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("into", [True, False], ids=["into_tied", "into_untied"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@every_model
def test_every_sharing_is_loaded_into_every_other(make, tied, into, rng, tmp_path):
    source = randomize(make(tied), rng)
    if not tied and into:
        first, second = source.get_layer(index=1).weights[0], source.layers[-1].kernel
        second.assign(numpy(first).T)
    path = saved(source, tmp_path)
    target = make(into)
    report = tether.files.load_safetensors(target, path)
    assert_close(target(INPUTS[make]), source(INPUTS[make]))
    assert len(report.loaded) == len(target.weights) and not report.missing and not report.skipped


@every_model
def test_the_plain_library_reads_each_weight_once(make, rng, tmp_path):
    model = randomize(make(True), rng)
    found = load_file(saved(model, tmp_path))
    assert sum(array.size for array in found.values()) == model.count_params()
    values = sorted(array.tobytes() for array in found.values())
    assert values == sorted(value.tobytes() for value in model.get_weights())


def test_names_are_those_of_the_first_use_as_it_is(tmp_path):
    found, metadata = tensors(saved(autoencoder(True), tmp_path))
    assert set(found) == {"encode.kernel", "encode.bias", "decode.bias"}
    plan = json.loads(metadata["tether"])
    assert set(plan["ties"]) == {"decode.kernel"} and set(plan["weights"].values()) == {"encode.kernel"}
    found, metadata = tensors(saved(autoencoder(False), tmp_path))
    assert set(found) == {"encode.kernel", "encode.bias", "decode.kernel", "decode.bias"}
    assert "tether" not in metadata


def values(model):
    """The stored bits, whatever the weights are called."""
    return [value for _, value in state(model)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_weight_keeps_its_dtype(dtype, rng, tmp_path):
    source, target = (autoencoder(True, dtype=dtype) for _ in range(2))
    randomize(source, rng)
    path = saved(source, tmp_path)
    codes = {tensor.get_dtype() for tensor in tensors(path)[0].values()}
    assert codes == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    tether.files.load_safetensors(target, path)
    assert values(target) == values(source)
    wide = autoencoder(False)
    tether.files.load_safetensors(wide, path)
    assert np.array_equal(numpy(wide.layers[1].kernel), numpy(source.layers[1].kernel).astype("float32"))


def test_a_file_of_the_plain_library_is_read(rng, tmp_path):
    kernel = rng.normal(size=(5, 3)).astype("float32")
    arrays = {"encode.kernel": kernel, "encode.bias": np.zeros(3, "float32"), "decode.bias": np.ones(5, "float32")}
    save_file(arrays, tmp_path / "m.safetensors")
    target = autoencoder(True)
    tether.files.load_safetensors(target, tmp_path / "m.safetensors")
    assert np.array_equal(numpy(target.layers[2].kernel), kernel.T)
    with pytest.raises(TetherError, match="has no value for 'decode/kernel'"):
        tether.files.load_safetensors(autoencoder(False), tmp_path / "m.safetensors")


def test_an_adapter_model_takes_its_base_by_name_and_itself_whole(rng, tmp_path):
    path = saved(randomize(autoencoder(False), rng), tmp_path)

    def adapted():
        base = autoencoder(False)
        base.trainable = False
        return tether.inherit(base, {"*/kernel": tether.low_rank(2, alpha=4)})

    child = adapted()
    report = tether.files.load_safetensors(child, path)
    plain = autoencoder(False)
    tether.files.load_safetensors(plain, path)
    x = INPUTS[autoencoder]
    assert_close(child(x), plain(x))
    assert len(report.missing) == 4 and all("lora" in name for name in report.missing)
    for variable in child.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    whole = saved(child, tmp_path, "whole.safetensors")
    again = adapted()
    assert not tether.files.load_safetensors(again, whole).missing
    assert_close(again(x), child(x))
    assert not np.allclose(numpy(again(x)), numpy(plain(x)))
    merged = autoencoder(False)
    with pytest.raises(TetherError, match="lora_a"):
        tether.files.load_safetensors(merged, whole)


def test_a_model_with_named_adapters_takes_its_base_by_name(rng, tmp_path):
    plain = randomize(autoencoder(False), rng)
    path = saved(plain, tmp_path)
    model = autoencoder(False)
    tether.adapters.add(model, "french", {"*/kernel": tether.low_rank(2)})
    tether.files.load_safetensors(model, path)
    assert_close(model(INPUTS[autoencoder]), plain(INPUTS[autoencoder]))


def test_a_stored_weight_under_a_formula_has_a_name_of_its_own(rng, tmp_path):
    def make():
        model = autoencoder(False)
        w = tether.weight_of(model, "encode/kernel")
        return tether.tie(model, {"encode/kernel": w * w})

    source, target = randomize(make(), rng), make()
    path = saved(source, tmp_path)
    assert "encode.kernel_1" in tensors(path)[0]
    tether.files.load_safetensors(target, path)
    assert np.array_equal(numpy(target.layers[1].kernel), numpy(source.layers[1].kernel))
    untied = autoencoder(False)
    tether.files.load_safetensors(untied, path)
    assert_close(untied.layers[1].kernel, source.layers[1].kernel)


def rewritten(path, rename, ties=True):
    """A file with other names of its tensors, in the plan too."""
    found = load_file(path)
    plan = json.loads(tensors(path)[1]["tether"])
    plan["weights"] = {uid: rename(name) for uid, name in plan["weights"].items()}
    metadata = {"format": "pt", **({"tether": json.dumps(plan)} if ties else {})}
    save_file({rename(name): value for name, value in found.items()}, path, metadata=metadata)
    return path


def with_forms(**forms):
    """An autoencoder whose kernels have forms."""
    model = autoencoder(False)
    return tether.tie(
        model, {f"{layer}/kernel": form(tether.weight_of(model, f"{layer}/kernel")) for layer, form in forms.items()}
    )


MODELS = {
    "low rank": lambda: with_forms(encode=tether.low_rank(2), decode=tether.low_rank(1)),
    "dora": lambda: with_forms(encode=tether.forms.dora(2)),
    "a formula": lambda: with_forms(encode=lambda w: w * w, decode=lambda w: w @ w.T @ w),
    "a shared low rank": lambda: shared(tether.low_rank(2)),
    "integers": lambda: quantized(autoencoder(True)),
}


def drawn(model, rng):
    for variable in model.weights:
        is_whole = variable.dtype == "int8"
        value = rng.integers(-9, 9, variable.shape) if is_whole else rng.normal(size=variable.shape)
        variable.assign(value.astype(variable.dtype))


def shared(form):
    model = autoencoder(False)
    kernel = form(tether.weight_of(model, "encode/kernel"))
    return tether.tie(model, {"encode/kernel": kernel, "decode/kernel": kernel.T})


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
    return model


@pytest.mark.parametrize("what", MODELS)
def test_where_the_structure_is_the_same_names_play_no_part(what, rng, tmp_path):
    source, target = MODELS[what](), MODELS[what]()
    drawn(source, rng)
    path = saved(source, tmp_path)
    shared_names = set(json.loads(tensors(path)[1]["tether"])["weights"].values())
    rewritten(path, lambda name: f"z{len(name)}.{name[::-1]}" if name in shared_names else name)
    report = tether.files.load_safetensors(target, path)
    assert not report.missing and not report.skipped and not report.conflicting
    assert values(target) == values(source)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("what", MODELS)
def test_the_names_of_0_1_0_are_read(what, ties, rng, tmp_path):
    """There a form's part had a dot before what it adds, and a name that was taken got `.stored`."""
    source, target = MODELS[what](), MODELS[what]()
    drawn(source, rng)

    def before(name):
        return re.sub(
            r"kernel_1$", "kernel.stored", re.sub(r"(kernel|codec)_(lora|magnitude|int8|scale)", r"\1.\2", name)
        )

    path = rewritten(saved(source, tmp_path), before, ties)
    assert any(name != before(name) for name in tensors(saved(source, tmp_path, "new.safetensors"))[0])
    assert not tether.files.load_safetensors(target, path).missing
    assert values(target) == values(source)


def test_weights_of_one_path_are_told_apart_by_the_models_order(rng, tmp_path):
    def make(keep=[]):  # noqa: B006
        model = autoencoder(False)
        a, b = (tether.Weight((5, 3), "normal", name="factor") for _ in range(2))
        keep.append(model)  # what else lives plays no part
        return tether.tie(model, {"encode/kernel": a * b, "decode/kernel": (a - b).T})

    source, target = make(), make()
    randomize(source, rng)
    path = saved(source, tmp_path)
    assert {"factor", "factor_1"} <= set(tensors(path)[0])
    assert set(tensors(saved(target, tmp_path, "other.safetensors"))[0]) == set(tensors(path)[0])
    tether.files.load_safetensors(target, path)
    assert values(target) == values(source)
    clone = keras.models.clone_model(target)
    rewritten(path, lambda name: name, ties=False)
    tether.files.load_safetensors(clone, path)
    assert values(clone) == values(source)


# --------------------------------------------------------------------------- names


def test_names_by_mapping_and_by_function(rng, tmp_path):
    source, target = randomize(autoencoder(False), rng), autoencoder(False)
    names = {"encode.kernel": "w1", "decode.kernel": tether.files.Tensor("w2", inputs=1)}
    path = saved(source, tmp_path, names=names)
    found = load_file(path)
    assert set(found) == {"w1", "w2", "encode.bias", "decode.bias"}
    assert np.array_equal(found["w2"], numpy(source.layers[2].kernel).T)
    tether.files.load_safetensors(target, path, names=names)
    assert state(target) == state(source)
    path = saved(source, tmp_path, names=str.upper)
    assert "ENCODE.KERNEL" in load_file(path)
    tether.files.load_safetensors(randomize(target, rng), path, names=str.upper)
    assert state(target) == state(source)


def test_parts_of_one_tensor_are_split_and_joined(rng, tmp_path):
    def make():
        x = keras.Input((4,))
        return keras.Model(x, [layers.Dense(3, use_bias=False, name=name)(x) for name in "qkv"])

    def names(name):
        return tether.files.Tensor("qkv.weight", inputs=1, part=("qkv".index(name[0]), 3))

    source, target = randomize(make(), rng), make()
    path = saved(source, tmp_path, names=names)
    fused = load_file(path)["qkv.weight"]
    assert np.array_equal(fused, np.concatenate([value.T for value in source.get_weights()]))
    tether.files.load_safetensors(target, path, names=names)
    assert state(target)[0][1] == state(source)[0][1] and state(target)[2][1] == state(source)[2][1]
    with pytest.raises(TetherError, match="2 of the 3 parts"):
        saved(source, tmp_path, names=lambda name: names(name) if name[0] != "k" else None)


def test_two_names_for_one_tensor_are_tied_embeddings(rng, tmp_path):
    """The first name that the file has is read, so that a head that is not in the file has the embedding."""
    names = {
        "embed.embeddings": "embed_tokens.weight",
        "head.kernel": tether.files.Tensor("lm_head.weight", "embed_tokens.weight", inputs=1),
    }
    source = randomize(stack(True), rng)
    path = saved(source, tmp_path, names=names)
    assert "lm_head.weight" not in load_file(path)
    untied = stack(False)
    tether.files.load_safetensors(untied, path, names=names)
    assert np.array_equal(numpy(untied.layers[-1].kernel), numpy(source.layers[1].embeddings).T)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_the_tensors_say_whether_embeddings_are_tied(flag, equal, rng, tmp_path):
    names = {
        "embed.embeddings": "model.embed_tokens.weight",
        "head.kernel": tether.files.Tensor("lm_head.weight", inputs=1),
    }
    source = randomize(stack(False), rng)
    if equal:
        source.layers[-1].kernel.assign(numpy(source.layers[1].embeddings).T)
    path = saved(source, tmp_path, names=names)
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": flag}))
    tied, untied = stack(True), stack(False)
    report = tether.files.load_safetensors(untied, path, names=names)
    assert_close(untied.layers[-1].kernel, source.layers[-1].kernel)
    assert bool(report.conflicting) is (flag is not equal)
    if equal:
        tether.files.load_safetensors(tied, path, names=names)
        assert_close(tied(INPUTS[stack]), source(INPUTS[stack]))
    else:
        with pytest.raises(ValueConflict, match=r"model\.embed_tokens\.weight.*lm_head\.weight"):
            tether.files.load_safetensors(tied, path, names=names)


def test_wrong_names_are_refused(rng, tmp_path):
    model = autoencoder(False)
    path = saved(model, tmp_path)
    with pytest.raises(TetherError, match="'bert'"):
        tether.files.load_safetensors(model, path, names="gpt9")
    with pytest.raises(TetherError, match=r"'encode\.kernel'"):
        tether.files.load_safetensors(model, path, names={"encode.kernel": 3})
    with pytest.raises(TetherError, match="Two weights would be 'same'"):
        saved(model, tmp_path, names=lambda name: "same")
    for wrong in ({"inputs": 0}, {"part": (3, 3)}):
        with pytest.raises(TetherError):
            tether.files.Tensor("x", **wrong)
    with pytest.raises(TetherError):
        tether.files.Tensor()


def test_a_kernel_of_another_size_says_what_was_expected(rng, tmp_path):
    save_file({"w": np.zeros((4, 5), "float32")}, tmp_path / "m.safetensors")
    names = {"encode.kernel": tether.files.Tensor("w", inputs=1)}
    with pytest.raises(ShapeMismatch, match=r"\(5, 3\) is \(3, 5\) there.*\(4, 5\)"):
        tether.files.load_safetensors(autoencoder(False), tmp_path / "m.safetensors", names=names, strict=False)


# --------------------------------------------------------------------------- the file


def test_shards_are_read(rng, tmp_path):
    source, target = randomize(autoencoder(False), rng), autoencoder(False)
    found = load_file(saved(source, tmp_path))
    index = {}
    for number, (name, _array) in enumerate(sorted(found.items())):
        shard = f"model-{number % 2}.safetensors"
        index[name] = shard
    for shard in set(index.values()):
        save_file({name: found[name] for name in index if index[name] == shard}, tmp_path / shard)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    tether.files.load_safetensors(target, path)
    assert state(target) == state(source)
    path.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(InvalidConfig, match="beside it"):
        tether.files.load_safetensors(target, path)
    path.write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    with pytest.raises(TetherError, match="not beside it"):
        tether.files.load_safetensors(target, path)


def damaged(data):
    """What may be wrong with a file: its bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]

    def with_header(**changes):
        text = json.dumps({**header, **changes}).encode()
        return len(text).to_bytes(8, "little") + text + body

    first = header["encode.kernel"]
    yield "empty", b""
    yield "cut short", data[:-1]
    yield "too long", data + b"\0"
    yield "the header is longer than the file", (1 << 40).to_bytes(8, "little") + data[8:]
    yield "the header is no JSON", data[:8] + b"[" + data[9:]
    yield "offsets that overlap", with_header(**{"encode.kernel": {**first, "data_offsets": [4, 64]}})
    yield "a shape that does not fit", with_header(**{"encode.kernel": {**first, "shape": [1 << 40, 1 << 40]}})
    yield "a dtype of nobody", with_header(**{"encode.kernel": {**first, "dtype": "F31"}})
    yield "a plan that is none", with_header(__metadata__={"tether": "["})
    yield "a plan of another version", with_header(__metadata__={"tether": json.dumps({"version": 9})})
    yield (
        "a plan that names code",
        with_header(
            __metadata__={
                "tether": json.dumps(
                    {
                        "version": 1,
                        "weights": {"u": "encode.kernel"},
                        "ties": {
                            "decode.kernel": {
                                "dtype": "float32",
                                "steps": [{"weight": "u"}, {"op": "apply", "of": [0], "function": "os>system"}],
                            }
                        },
                    }
                )
            }
        ),
    )


def test_a_damaged_file_changes_nothing(rng, tmp_path):
    data = saved(randomize(autoencoder(True), rng), tmp_path).read_bytes()
    model = autoencoder(False)
    before = state(model)
    path = tmp_path / "damaged.safetensors"
    count = 0
    for what, bytes_ in damaged(data):
        path.write_bytes(bytes_)
        with pytest.raises(TetherError):
            tether.files.load_safetensors(model, path)
            pytest.fail(what)
        assert state(model) == before, what
        count += 1
    assert count == 11


def test_other_targets_and_sources_are_refused(tmp_path):
    model = autoencoder(True)
    with pytest.raises(TetherError, match=r"\.safetensors"):
        tether.files.save_safetensors(model, tmp_path / "m.bin")
    with pytest.raises(TetherError, match="folder"):
        tether.files.save_safetensors(model, tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(TetherError, match="no file"):
        tether.files.load_safetensors(model, tmp_path / "m.safetensors")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(Unsupported, match="end with"):
        tether.files.load_safetensors(model, tmp_path / "m.bin")
    with pytest.raises(TetherError, match="not built"):
        tether.files.save_safetensors(layers.Dense(2), tmp_path / "m.safetensors")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = autoencoder(True)
    path = saved(model, tmp_path)
    before = path.read_bytes()

    def fails(value, name):
        raise MemoryError

    monkeypatch.setattr(tether.files.tensors.safetensors.keras_seam, "on_host", fails)
    with pytest.raises(MemoryError):
        saved(model, tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


MEMORY = """
import resource, sys
import keras, numpy as np
import tether
import tether.files.tensors.safetensors
size = int(sys.argv[3])
layers = [keras.layers.Dense(size, use_bias=False, name=f"d{n}") for n in range(12)]
model = keras.Sequential([keras.Input((size,)), *layers])
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
def now():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
first = keras.layers.Dense(600, name="d0", use_bias=False)  # what loads for the first time in a process takes more
tether.files.load_safetensors(keras.Sequential([keras.Input((600,)), first]), sys.argv[2])
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = now()
tether.files.load_safetensors(model, sys.argv[1])
print((peak() - before) / (4 * 12 * size * size))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell a process's peak memory"
)
def test_loading_takes_little_memory_beside_the_models(tmp_path):
    size = 1600
    arrays = {f"d{n}.kernel": np.full((size, size), n, "float32") for n in range(12)}
    save_file(arrays, tmp_path / "m.safetensors")
    save_file({"d0.kernel": np.zeros((600, 600), "float32")}, tmp_path / "small.safetensors")
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            MEMORY,
            str(tmp_path / "m.safetensors"),
            str(tmp_path / "small.safetensors"),
            str(size),
        ],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # What the model has already is not counted. A tensor of the file is a twelfth of it: none is in memory whole, but
    # one on TensorFlow, where writing a part of a variable makes every read of it a copy. JAX compiles for each shape.
    assert float(ran.stdout.split()[-1]) < {"torch": 0.05, "tensorflow": 0.1, "jax": 0.2}[keras.backend.backend()]

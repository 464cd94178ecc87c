"""Exported models: the outputs, the sizes, what is stored once, and what is refused."""

import keras
import numpy as np
import pytest

import tether
from tests.files.models import randomize
from tests.files.running import BACKEND, ELSEWHERE, HERE, SUFFIXES, WRITTEN_ON, outputs, stored_sizes
from tests.kinds import Bilinear
from tests.support import numpy
from tether.errors import TetherError, Unsupported
from tether.files.exporting import exporter
from tether.files.exporting.model import Asked

pytestmark = pytest.mark.spread(3)  # each backend has its own formats

layers = keras.layers
WIDTH = 896
"""Of the kernels: 3 MB each, beside which headers do not count."""


def dense(expression, units=WIDTH, **options):
    return tether.tie(layers.Dense(units, **options), kernel=expression)


def plain():
    x, w = keras.Input((WIDTH,)), tether.Weight(name="codec")
    return keras.Model(x, dense(w)(dense(w, activation="tanh")(x)))


def transposed():
    x, w = keras.Input((WIDTH,)), tether.Weight(name="codec")
    return keras.Model(x, dense(w.T)(dense(w, activation="tanh", name="encode")(x)))


def sliced():
    x, w = keras.Input((WIDTH,)), tether.Weight((WIDTH, WIDTH), name="both")
    half = WIDTH // 2
    parts = [dense(w[:, :half], half, activation="tanh"), dense(w[:, half:], half)]
    h = layers.Concatenate()([part(x) for part in parts])
    return keras.Model(x, dense(w)(h))


def concatenated():
    x = keras.Input((WIDTH,))
    u, v = (tether.Weight((WIDTH, WIDTH // 2), name=name) for name in "uv")
    h = dense(tether.ops.concatenate([u, v], axis=-1), activation="tanh")(x)
    return keras.Model(x, dense(u, WIDTH // 2)(h))


def inherited():
    x, parent = keras.Input((WIDTH,)), layers.Dense(WIDTH, activation="tanh", name="parent")
    h = parent(x)
    parent.trainable = False
    return keras.Model(x, tether.inherit(parent, kernel=lambda w: w + tether.low_rank(8))(h))


def planned():
    """A table and a head of two factors: what is made of them is ten times as large."""
    ids = keras.Input((6,), dtype="int32")
    a, b = tether.Weight((3000, 64), name="a"), tether.Weight((64, WIDTH), name="b")
    table = tether.tie(layers.Embedding(3000, WIDTH), embeddings=a @ b)
    big = layers.Dense(WIDTH, name="big")
    return keras.Model(ids, dense((a @ b).T, 3000)(big(table(ids))))


def routed():
    x = keras.Input((WIDTH,))
    base, other = (tether.Weight((WIDTH, WIDTH), name=name) for name in ("base", "other"))
    layer = tether.route(layers.Dense(WIDTH), kernel=[base, base + other], default=1)
    return keras.Model(x, layer(x))


def convolved():
    """A kernel that runs both ways: the layouts of the two layers differ in most formats."""
    x, w = keras.Input((4, 4, 256)), tether.Weight((3, 3, 256, 256), name="kernel")
    down = tether.tie(layers.Conv2D(256, 3, padding="same", activation="relu"), kernel=w)
    up = tether.tie(layers.Conv2DTranspose(256, 3, padding="same"), kernel=w)
    return keras.Model(x, up(down(x)))


def looked_up():
    """An embedding and the head that is its transpose."""
    ids = keras.Input((6,), dtype="int32")
    embed = layers.Embedding(3000, 256)
    h = layers.LayerNormalization()(embed(ids))
    return keras.Model(ids, dense(tether.weight_of(embed, "embeddings").T, 3000)(h))


KINDS = {
    kind.__name__: kind
    for kind in (plain, transposed, sliced, concatenated, inherited, planned, routed, convolved, looked_up)
}
QUICK = ("plain", "transposed", "sliced", "concatenated", "inherited", "planned")


def arrays(model, batch):
    rng = np.random.default_rng(batch)
    return [
        rng.integers(0, 3000, (batch, *symbol.shape[1:])).astype("int32")
        if symbol.dtype == "int32"
        else rng.normal(size=(batch, *symbol.shape[1:])).astype("float32")
        for symbol in keras.tree.flatten(model.input)
    ]


def scaled(model, rng):
    """Values of which outputs are about one."""
    for variable in randomize(model, rng).weights:
        variable.assign(numpy(variable) * 0.05)
    return model


def small():
    """Dense 6 -> 5 -> 6, the second kernel the first one's transpose."""
    x, w = keras.Input((6,), name="x"), tether.Weight(name="codec")
    return keras.Model(x, dense(w.T, 6, name="decode")(dense(w, 5, activation="tanh", name="encode")(x)))


def assert_outputs(model, path, format, batches=(1, 3)):
    for batch in batches:
        given = arrays(model, batch)
        expected = keras.tree.flatten(model(given if len(given) > 1 else given[0], training=False))
        found = outputs(path, format, given)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, numpy(other), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- what is written


@pytest.mark.thin(3)
@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize(
    "kind", [kind if name in QUICK else pytest.param(kind, marks=pytest.mark.slow) for name, kind in KINDS.items()]
)
def test_outputs_are_the_models_and_each_weight_is_stored_once(kind, format, tmp_path, rng):
    model = scaled(kind(), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    exported = tether.files.export(model, path, format)
    assert_outputs(model, path, format)
    unique = sum(4 * int(np.prod(variable.shape)) for variable in model.weights)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert exported.unique_bytes == unique
    assert exported.bytes == sum(file.stat().st_size for file in files) <= 1.05 * unique
    largest = max(int(np.prod(variable.shape)) for variable in model.weights)
    stored = sum(size for size in stored_sizes(path, format) if size >= largest // 4)
    assert stored <= sum(n for v in model.weights if (n := int(np.prod(v.shape))) >= largest // 4)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("format", HERE)
def test_a_transposed_weight_is_stored_once(format, tmp_path, rng):
    model = scaled(transposed(), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    assert [size for size in stored_sizes(path, format) if size >= WIDTH**2 // 2] == [WIDTH**2]
    kernel, first, second = (numpy(v) for v in model.weights)
    (x,) = arrays(model, 2)
    (found,) = outputs(path, format, [x])
    np.testing.assert_allclose(found, np.tanh(x @ kernel + first) @ kernel.T + second, rtol=1e-5, atol=1e-5)


def recurrent(rng):
    x = keras.Input((5, 64))
    first = layers.LSTM(64, return_sequences=True)
    h = first(x)
    second = tether.inherit(first, {"cell/kernel": lambda w: 0.5 * w})
    return scaled(keras.Model(x, layers.Dense(3)(second(h)[:, -1])), rng)


@pytest.mark.slow
@pytest.mark.parametrize("format", [name for name in HERE if name != "litert"])
def test_recurrent_layers_that_share(format, tmp_path, rng):
    model = recurrent(rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    assert_outputs(model, path, format)
    assert sum(size >= 64 * 256 for size in stored_sizes(path, format)) == 2


@pytest.mark.slow
@pytest.mark.skipif("litert" not in HERE, reason="not written on this backend")
def test_recurrent_layers_want_sizes_that_are_known_in_litert(tmp_path, rng):
    model, path = recurrent(rng), tmp_path / "model.tflite"
    if BACKEND == "tensorflow":
        with pytest.raises(Unsupported, match="input_signature"):
            tether.files.export(model, path, "litert")
    tether.files.export(model, path, "litert", input_signature=[keras.InputSpec(shape=(1, 5, 64), dtype="float32")])
    assert_outputs(model, path, "litert", batches=(1,))
    assert sum(size >= 64 * 256 for size in stored_sizes(path, "litert")) == 2


@pytest.mark.parametrize("format", HERE)
def test_a_weight_that_a_layer_of_ones_own_reads_is_stored_once_too(format, tmp_path, rng):
    x, table = keras.Input((64,)), tether.Weight((64, 64), name="table")
    model = scaled(keras.Model(x, Bilinear(table)(dense(table, 64)(x))), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    assert_outputs(model, path, format)
    assert [size for size in stored_sizes(path, format) if size >= 64 * 64] == [64 * 64]


@pytest.mark.parametrize("format", [name for name in HERE if name in ("onnx", "litert")])
def test_a_copy_that_nobody_foresaw_is_taken_out_too(format, tmp_path, rng):
    ids = keras.Input((4,), dtype="int32")
    both = layers.ReversibleEmbedding(3000, 64)  # shares without Tether
    model = scaled(keras.Model(ids, both(both(ids), reverse=True)), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    exported = tether.files.export(model, path, format)
    assert_outputs(model, path, format)
    assert exported.bytes <= 1.05 * exported.unique_bytes


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize")  # Keras, of the input
@pytest.mark.parametrize("format", HERE)
def test_quantised_weights_stay_integers(format, tmp_path, rng):
    x, w = keras.Input((512,)), tether.Weight(name="codec")
    model = scaled(keras.Model(x, dense(w.T, 512)(dense(w, 512, activation="tanh")(x))), rng)
    model.quantize("int8")
    exported = tether.files.export(model, tmp_path / f"model{SUFFIXES[format]}", format)
    assert exported.difference < 1e-4
    assert exported.bytes < 0.5 * 4 * 512 * 512


def exact_gelu(x):
    """By the error function; Keras's name "gelu" means the approximation."""
    return keras.activations.gelu(x, approximate=False)


@pytest.mark.parametrize("format", HERE)
def test_the_exact_gelu(format, tmp_path, rng):
    from scipy.special import erf

    x, w = keras.Input((64,)), tether.Weight(name="codec")
    h = dense(w, 64, activation=exact_gelu, use_bias=False)(x)
    model = randomize(keras.Model(x, dense(w.T, 64, use_bias=False)(h)), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    (kernel,) = (numpy(variable) for variable in model.weights)
    given = np.linspace(-6, 6, 3 * 64, dtype="float32").reshape(3, 64)
    hidden = (given @ kernel).astype("float64")
    expected = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2))) @ kernel.T
    (found,) = outputs(path, format, [given])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def several():
    """Inputs in a dict, two outputs, sizes that are open."""
    tokens, extra = keras.Input((None,), dtype="int32", name="tokens"), keras.Input((6,), name="extra")
    embed = layers.Embedding(7, 6)
    h = layers.GlobalAveragePooling1D()(embed(tokens)) + extra
    head = dense(tether.weight_of(embed, "embeddings").T, 7, name="head")
    return keras.Model({"tokens": tokens, "extra": extra}, {"scores": head(h), "pooled": h})


@pytest.mark.parametrize("format", HERE)
def test_inputs_and_outputs_may_be_several(format, tmp_path, rng):
    model = randomize(several(), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    exported = tether.files.export(model, path, format)
    assert exported.difference < 1e-5


def test_names_of_inputs_outputs_and_weights_are_the_models(tmp_path, rng):
    import onnx

    model = randomize(several(), rng)
    tether.files.export(model, tmp_path / "model.onnx", "onnx")
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert {found.name for found in graph.input} == {"tokens", "extra"}
    assert len(graph.output) == 2
    assert not {found.name for found in graph.input} & {found.name for found in graph.output}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        table = tether.Weight(name="table")
        self.encode, self.decode = dense(table, 5), dense(table.T, 6)

    def call(self, x):
        return self.decode(self.encode(x))


def test_a_subclassed_model_says_what_it_takes_by_a_call_or_by_a_signature(tmp_path, rng):
    x = rng.normal(size=(2, 6)).astype("float32")
    path = tmp_path / "model.onnx"
    with pytest.raises(TetherError, match="Call the model once"):
        tether.files.export(Subclassed(), path, "onnx")
    model = Subclassed()
    model(x)
    tether.files.export(model, path, "onnx", inputs=x)
    np.testing.assert_allclose(outputs(path, "onnx", [x])[0], numpy(model(x)), rtol=1e-5, atol=1e-6)
    fixed = [keras.InputSpec(shape=(2, 6), dtype="float32")]
    tether.files.export(model, path, "onnx", input_signature=fixed)
    np.testing.assert_allclose(outputs(path, "onnx", [x])[0], numpy(model(x)), rtol=1e-5, atol=1e-6)


def test_training_is_off_and_the_model_stays_as_it_was(tmp_path, rng):
    x = keras.Input((6,))
    h = layers.Dropout(0.5)(layers.BatchNormalization()(x))
    model = randomize(keras.Model(x, layers.Dense(6)(h)), rng)
    before = [numpy(variable).copy() for variable in model.variables]
    path = tmp_path / "model.onnx"
    tether.files.export(model, path, "onnx")
    assert_outputs(model, path, "onnx")
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(variable), value)


def test_options_go_to_the_converter(tmp_path):
    import onnx

    path = tmp_path / "model.onnx"
    tether.files.export(small(), path, "onnx", opset_version=18)
    assert {found.domain: found.version for found in onnx.load(str(path)).opset_import}[""] == 18


PLAIN = {
    "tensorflow": ["tf_saved_model", "onnx", "litert"],
    "jax": ["tf_saved_model", "onnx"],
    "torch": ["onnx", "torch"],
}


@pytest.mark.filterwarnings("ignore")  # of Keras's exporters and what they call
@pytest.mark.parametrize("format", PLAIN[BACKEND])
def test_keras_own_export_has_the_right_outputs(format, tmp_path, rng):
    model = randomize(small(), rng)
    model(arrays(model, 1)[0])
    path = tmp_path / f"model{SUFFIXES[format]}"
    model.export(path, format=format, verbose=False)
    assert_outputs(model, path, format, batches=(1,))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("format", ELSEWHERE)
def test_what_a_backend_cannot_write_is_refused_with_the_command_for_one_that_can(format, tmp_path):
    with pytest.raises(Unsupported, match=f"cannot be written on the {BACKEND} backend") as raised:
        tether.files.export(small(), tmp_path / f"model{SUFFIXES[format]}", format)
    other = str(raised.value).partition("KERAS_BACKEND=")[2].split()[0]
    assert other in WRITTEN_ON[format]
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Unsupported, match="pip install onnx"):
        tether.files.export(small(), tmp_path / "model.onnx", "onnx")


@pytest.mark.skipif(
    "tf_saved_model" not in HERE or keras.backend.backend() == "tensorflow",
    reason="refused for the backend before that, or TensorFlow is the backend and so is there",
)
def test_a_saved_model_without_tensorflow_names_it(tmp_path, monkeypatch):
    import sys

    model = small()
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(Unsupported, match=r"on the \w+ backend too.*`pip install tensorflow`"):
        tether.files.export(model, tmp_path / "saved", "tf_saved_model")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_missing_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported, match="verify=False"):
        tether.files.export(small(), tmp_path / "model.onnx", "onnx")
    exported = tether.files.export(small(), tmp_path / "model.onnx", "onnx", verify=False)
    assert exported.difference is None
    assert exported.path.exists()


@pytest.mark.parametrize("format", HERE)
def test_other_outputs_are_an_error_and_what_was_there_stays(format, tmp_path, rng, monkeypatch):
    path = tmp_path / f"model{SUFFIXES[format]}"
    model = randomize(small(), rng)
    tether.files.export(model, path, format)
    old = {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}
    reference = Asked.reference
    monkeypatch.setattr(Asked, "reference", lambda self, given: [one + 1 for one in reference(self, given)])
    with pytest.raises(TetherError, match="differs from the model's by 1"):
        tether.files.export(model, path, format)
    assert {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()} == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_converter_that_fails_is_named_and_leaves_nothing(tmp_path):
    class Strange(layers.Layer):
        def call(self, x):
            return keras.ops.convert_to_tensor(float(np.asarray(keras.ops.sum(x))) * np.ones(3))

        def compute_output_shape(self, shape):
            return (3,)

    x = keras.Input((6,))
    with pytest.raises(Unsupported, match="The converter for 'onnx' cannot take"):
        tether.files.export(keras.Model(x, Strange()(x)), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_path_of_another_kind_is_refused(tmp_path):
    model = small()
    with pytest.raises(TetherError, match=r"ends in '\.onnx'"):
        tether.files.export(model, tmp_path / "model.bin", "onnx")
    with pytest.raises(TetherError, match="The formats are"):
        tether.files.export(model, tmp_path / "model.bin", "openvino")
    with pytest.raises(TetherError, match="does not exist"):
        tether.files.export(model, tmp_path / "nowhere/model.onnx", "onnx")
    with pytest.raises(TetherError, match="is a Keras model"):
        tether.files.export(layers.Dense(3), tmp_path / "model.onnx", "onnx")
    with pytest.raises(TetherError, match="takes 1 tensors"):
        tether.files.export(model, tmp_path / "model.onnx", "onnx", inputs=[np.ones((1, 6)), np.ones((1, 6))])


# --------------------------------------------------------------------------- folders


def test_a_folder_takes_the_place_of_a_saved_model_only(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with (
        pytest.raises(TetherError, match="is not replaced by one"),
        exporter.replaced(mine, folder=True) as beside,
    ):
        beside.mkdir()
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]


def test_a_folder_whose_rename_fails_is_the_old_one(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    (served / "saved_model.pb").write_text("old")
    replace = exporter.os.replace

    def fails(source, target):
        if target == served and source.name.startswith(".") and (source / "new").exists():
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(exporter.os, "replace", fails)
    with pytest.raises(OSError, match="the disk is gone"), exporter.replaced(served, folder=True) as beside:
        beside.mkdir()
        (beside / "new").write_text("new")
    assert (served / "saved_model.pb").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["served"]


@pytest.mark.thin(2)
@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize("count", [3, 11])
def test_a_choice_for_each_example_is_one_more_input(format, count, tmp_path, rng):
    x = keras.Input((64,))
    first, second = layers.Dense(64, name="first"), layers.Dense(32, name="second")
    model = keras.Model(x, second(first(x)))
    ties = {}
    for path in ("first/kernel", "second/kernel"):
        weight = tether.weight_of(model, path)
        ties[path] = [weight + tether.low_rank(2) for _ in range(count)]
    tether.route(model, ties)
    by_choice = scaled(tether.routed(model), rng)
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(by_choice, path, format)
    for batch in (1, 4):
        given = [rng.normal(size=(batch, 64)).astype("float32"), rng.integers(-1, count, batch).astype("int32")]
        (found,) = outputs(path, format, given)
        np.testing.assert_allclose(found, numpy(by_choice(given, training=False)), rtol=1e-5, atol=1e-5)

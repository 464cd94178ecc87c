"""Exported models whose depth shares weights: what is read back computes what the model does."""

import keras
import numpy as np
import pytest

import tether
from tests.files.running import BACKEND, ELSEWHERE, HERE, SUFFIXES, outputs, stored_sizes
from tests.files.test_exports import arrays, assert_outputs
from tests.layers.test_repeat import Attends
from tether.errors import Unsupported

pytestmark = [pytest.mark.spread(3), pytest.mark.filterwarnings("ignore:The .grad attribute")]
WIDTH = 8
TURNS = 5
LARGE = 600
"""Smaller kernels may be stored again as a converter likes to read them."""


def block_of(name):
    x = keras.Input((WIDTH,))
    y = keras.layers.LayerNormalization(name="norm")(x)
    y = keras.layers.Dense(2 * WIDTH, activation="relu", name="up")(y)
    return keras.Model(x, keras.layers.Add()([x, keras.layers.Dense(WIDTH, name="down")(y)]), name=name)


def with_statistics():
    x = keras.Input((WIDTH,))
    y = keras.layers.BatchNormalization(name="statistics")(x)
    y = keras.layers.Dropout(0.3)(keras.layers.Dense(WIDTH, activation="tanh", name="dense")(y))
    return keras.Model(x, keras.layers.Add()([x, y]), name="block")


def shared(pattern, values):
    x = y = keras.Input((WIDTH,))
    for place in range(4):
        y = block_of(f"block_{place}")(y)
    model = keras.Model(x, keras.layers.Dense(1)(y))
    spread_out(model)
    tether.share_depth(model, pattern, blocks="block_*", values=values)
    return model


def repeated(block=None, head=True, **settings):
    x = keras.Input((WIDTH,))
    body = tether.Repeat(block_of("block") if block is None else block, TURNS, **settings)
    y = body(x)
    model = keras.Model(x, keras.layers.Dense(1)(y) if head else y)
    spread_out(model)
    return model


def attending():
    """Two inputs, a mask, and an encoder output that all turns share."""
    x, context = keras.Input((5, WIDTH)), keras.Input((3, WIDTH))
    model = keras.Model([x, context], tether.Repeat(Attends(name="block"), TURNS)(x, context))
    spread_out(model)
    return model


def apart():
    x = y = keras.Input((WIDTH,))
    body = tether.Repeat(block_of("block"), TURNS, vary=VARY)
    body.build((None, WIDTH))
    for layer in body.layers():
        y = layer(y)
    model = keras.Model(x, y)
    spread_out(model)
    return model


def spread_out(model):
    drawn = np.random.RandomState(5)
    for weight in model.weights:
        if not weight.path.endswith(("_u", "_v", "seed_generator_state")):
            size = np.abs(drawn.randn(*weight.shape)) if "variance" in weight.path else drawn.randn(*weight.shape) * 0.3
            weight.assign(size + (1.0 if "variance" in weight.path else 0.0))


VARY = {"up/kernel": tether.low_rank(2), "down/bias": "own", "norm/gamma": tether.forms.scale()}
SHARED = {
    "all": lambda: shared("all", "first"),
    "cycle, a part of each": lambda: shared("cycle:2", tether.low_rank(2)),
}
REPEATED = {
    "varied": lambda: repeated(vary=VARY, unroll=False),
    "own statistics": lambda: repeated(with_statistics(), unroll=False),
    "shared statistics": lambda: repeated(with_statistics(), state="shared", unroll=False),
    "all outputs": lambda: repeated(vary=VARY, outputs="all", unroll=False, head=False),
    "stochastic depth": lambda: repeated(skip_rate=0.2, unroll=False),
    "halting": lambda: repeated(vary=VARY, halt=keras.layers.Dense(1, activation="sigmoid", name="halt"), unroll=False),
    "a norm of each turn": lambda: repeated(vary={"up/kernel": tether.forms.spectral_norm()}, unroll=False),
    "computed again": lambda: repeated(vary=VARY, remat=True, unroll=False),
    "written out": lambda: repeated(vary=VARY, unroll=True),
    "two inputs": attending,
    "taken apart": apart,
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize("kind", SHARED)
def test_a_model_of_shared_depth(kind, format, tmp_path):
    model = SHARED[kind]()
    path = tmp_path / f"model{SUFFIXES[format]}"
    exported = tether.files.export(model, path, format)
    assert_outputs(model, path, format)
    assert exported.unique_bytes == 4 * model.count_params()


@pytest.mark.parametrize("format", HERE)
def test_a_kernel_of_all_blocks_is_stored_once(format, tmp_path):
    x = y = keras.Input((LARGE,))
    for place in range(3):
        y = keras.layers.Dense(LARGE, activation="tanh", name=f"block_{place}")(y)
    model = keras.Model(x, y)
    tether.share_depth(model, blocks="block_*")
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    assert [size for size in stored_sizes(path, format) if size >= LARGE**2 // 2] == [LARGE**2]


@pytest.mark.thin(3)
@pytest.mark.parametrize("format", HERE)
@pytest.mark.parametrize("kind", REPEATED)
def test_a_model_with_a_repeat(kind, format, tmp_path):
    if kind == "two inputs" and format == "litert":
        pytest.skip("LiteRT cannot resize Keras's attention, in a Repeat or not")
    model = REPEATED[kind]()
    path = tmp_path / f"model{SUFFIXES[format]}"
    tether.files.export(model, path, format)
    if kind == "two inputs" and format == "tf_saved_model":  # takes them as the model does: in a list
        import tensorflow as tf

        given, loaded = arrays(model, 3), tf.saved_model.load(str(path))
        found = loaded.serve(given)
        np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(given)), rtol=1e-5, atol=1e-5)
    else:
        assert_outputs(model, path, format)


@pytest.mark.parametrize("format", HERE)
def test_the_turns_of_the_file_are_those_of_the_model(format, tmp_path):
    """What is stored of each turn is in the file: another value of it gives another file."""
    found = []
    for scale in (1.0, 2.0):
        model = repeated(vary={"down/bias": "own"})
        stack = next(w for w in model.weights if w.shape == (TURNS, WIDTH))
        value = np.array(keras.ops.convert_to_numpy(stack))
        value[TURNS - 1] *= scale
        stack.assign(value)
        path = tmp_path / f"model{scale}{SUFFIXES[format]}"
        tether.files.export(model, path, format)
        (given,) = arrays(model, 2)
        (output,) = outputs(path, format, [given])
        np.testing.assert_allclose(output, keras.ops.convert_to_numpy(model(given)), rtol=1e-5, atol=1e-5)
        found.append(output)
    assert not np.allclose(*found)


@pytest.mark.parametrize("format", ELSEWHERE)
@pytest.mark.parametrize("kind", ["shared", "repeated"])
def test_a_format_of_another_backend_is_refused_by_name(kind, format, tmp_path):
    model = SHARED["all"]() if kind == "shared" else repeated(vary=VARY)
    with pytest.raises(Unsupported, match=f"cannot be written on the {BACKEND} backend"):
        tether.files.export(model, tmp_path / f"model{SUFFIXES[format]}", format)
    assert not list(tmp_path.iterdir())

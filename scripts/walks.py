"""What a reader passes who follows one call through the package: `python scripts/walks.py [--files]`.

For each of four walks: the files of Tether in which a function runs, and the calls that lead from one file of Tether to
another, counted by `sys.setprofile`. Comprehensions and generators are part of the function that they are written in;
code that runs when a module is imported is not counted.
"""

import argparse
import collections
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tether

SOURCE = pathlib.Path(tether.__file__).parent
X = np.ones((4, 8), "float32")


def dense(name):
    layer = keras.layers.Dense(8, name=name)
    layer.build((None, 8))
    return layer


def model():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="one"), keras.layers.Dense(8, name="two")])


def tie_and_call():
    weight, layer = tether.Weight((8, 8), "ones", name="w"), dense("d")
    other = dense("e")
    tether.tie(other, kernel=weight.T)

    def walk():
        tether.tie(layer, kernel=weight.T)
        layer(X)

    return walk


def weight_of():
    tied = model()
    return lambda: tether.weight_of(tied, "one/kernel")


def load():
    tied = model()
    tether.tie(tied, {"two/kernel": tether.weight_of(tied, "one/kernel").T})
    path = pathlib.Path(tempfile.mkdtemp()) / "model.keras"
    tether.files.save_model(tied, path)
    return lambda: tether.files.load_model(path)


def inherit_and_plan():
    parent = dense("parent")
    parent.trainable = False

    def walk():
        child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(2))
        child(X)

    return walk


WALKS = {"tie + call": tie_and_call, "weight_of": weight_of, "load": load, "inherit + plan": inherit_and_plan}
INNER = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>"}


class Walk:
    """The files that are passed, and the calls from file to file."""

    def __init__(self):
        self.files = collections.Counter()
        self.calls = 0

    def note(self, frame, event, _):
        """What `sys.setprofile` calls."""
        if event != "call":
            return
        here = self._file(frame)
        if here is None or frame.f_code.co_name == "<module>":
            return
        self.files[here] += 1
        outer = frame.f_back
        while outer is not None and self._file(outer) is None:  # Keras's code, or Python's, in between
            outer = outer.f_back
        if frame.f_code.co_name not in INNER and outer is not None and self._file(outer) != here:
            self.calls += 1

    @staticmethod
    def _file(frame):
        path = pathlib.Path(frame.f_code.co_filename)
        return str(path.relative_to(SOURCE)) if path.is_relative_to(SOURCE) else None


def walked(name):
    """One walk, the second time that it is made: what is imported or made once is there by then."""
    WALKS[name]()()
    walk, run = Walk(), WALKS[name]()
    sys.setprofile(walk.note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return walk


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="list the files, with the calls of functions in each")
    asked = parser.parse_args()
    print(f"{'walk':16s} {'files':>6s} {'calls from file to file':>24s}")
    for name in WALKS:
        walk = walked(name)
        print(f"{name:16s} {len(walk.files):6d} {walk.calls:24d}")
        for file, count in walk.files.most_common() if asked.files else ():
            print(f"    {count:5d}  {file}")


if __name__ == "__main__":
    main()

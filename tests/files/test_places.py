"""Where a file has each value of a model."""

import keras
import numpy as np

import tether
from tests.files import hostile
from tether.files.keras.archive import contents, places_of


def test_the_places_are_those_in_the_file(tmp_path):
    model = hostile.tied_model()
    model.compile("adam", "mse", metrics=["mae"])
    x = np.ones((4, 4), "float32")
    model.fit(x, x, verbose=0)
    tether.files.save_model(model, tmp_path / "model.keras")
    assert places_of(model) == contents(tmp_path / "model.keras").values
    assert {place.split("/")[0] for place in places_of(model, of_layers=True)} == {"layers"}


def test_a_model_in_a_model_has_its_places_below(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner])
    tether.files.save_model(model, tmp_path / "model.keras")
    assert places_of(model) == contents(tmp_path / "model.keras").values
    assert len(places_of(model)) == 2

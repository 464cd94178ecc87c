"""The config of a model with one layer in several places."""

import copy
import io
import json
import zipfile

import keras

import tether
from tests.scenarios.test_b_one_layer_several_places import (
    MODELS,
    in_a_graph_and_a_stack,
    inside_and_outside,
    part_of_one_graph_in_another,
)
from tether import keras_seam
from tether.files.keras.save import has_shared_layers, mended, shared_layers

layers = keras.layers


def config_of(model):
    """What Keras writes."""
    buffer = io.BytesIO()
    keras_seam.save_to(model, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return json.loads(archive.read("config.json"))


def test_shared_layers_are_those_in_two_models_at_once():
    for make in MODELS:
        assert [layer.name for layer in shared_layers(make())]
    assert [layer.name for layer in shared_layers(inside_and_outside())] == ["shared"]


def test_a_layer_that_one_model_calls_twice_or_an_input_is_none():
    layer, x = layers.Dense(4), keras.Input((4,))
    encoder = keras.Model(x, layer(layer(x)))
    assert not has_shared_layers(encoder)
    assert not has_shared_layers(keras.Model(x, layers.Dense(2)(encoder(x))))
    assert not has_shared_layers(keras.Sequential([x, layers.Dense(4), encoder]))


def test_each_place_has_the_id_and_the_calls_are_counted():
    model = in_a_graph_and_a_stack()
    config = config_of(model)
    before = copy.deepcopy(config)
    found = mended(model, config)
    assert config == before
    inner = {layer["name"]: layer for layer in found["config"]["layers"]}
    places = [
        next(layer for layer in inner["graph"]["config"]["layers"] if layer["name"] == "shared"),
        next(layer for layer in inner["stack"]["config"]["layers"] if layer["config"]["name"] == "shared"),
        inner["shared"],
    ]
    assert len({place["shared_object_id"] for place in places}) == 1
    (_, outputs) = found["config"]["output_layers"]
    assert outputs[0] == "shared" and outputs[1] > 0


def test_no_reader_of_tethers_own_is_left_in_the_config():
    found = json.dumps(mended(model := part_of_one_graph_in_another(), config_of(model)))
    assert "tether" not in found and "CallCounter" not in found


def test_what_has_no_layer_in_several_places_keeps_the_config_that_keras_wrote(tmp_path):
    layer, x = layers.Dense(4, name="d"), keras.Input((4,), name="x")
    model = keras.Model(x, layer(layer(x)), name="m")
    tether.files.save_model(model, tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert json.loads(archive.read("config.json")) == config_of(model)

"""Files of a model that is split over two processes of JAX: see `roads_of_files` for what each process does."""

import keras
import numpy as np
import pytest

import tether
from tests.distribution import roads_of_files as roads
from tests.distribution.several import said_by

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="`keras.distribution` is of JAX")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    roads.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def said(folder):
    return said_by("roads_of_files", folder, processes=2, devices=2)


@pytest.mark.parametrize("name", [each.__name__ for each in roads.CHECKS])
def test_in_two_processes(said, name):
    assert [each[name] for each in said] == ["", ""], "\n".join(each[name] for each in said)


def test_one_process_reads_what_two_have_written(said, folder):
    model = roads.zeroed(roads.build())
    tether.files.load_safetensors(model, folder / "own")
    for variable, right in roads.by_name(model):
        np.testing.assert_array_equal(variable.numpy(), right)
    trained = tether.files.load_model(folder / "trained.keras")
    right = dict(np.load(folder / "trained.npz"))
    for number, variable in enumerate([*trained.weights, *trained.optimizer.variables]):
        np.testing.assert_array_equal(variable.numpy(), right[f"arr_{number}"], err_msg=variable.path)

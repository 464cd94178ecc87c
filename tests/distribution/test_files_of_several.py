"""Files of a model that is split over several devices or processes of JAX: `roads_of_files` has what each does."""

import keras
import numpy as np
import pytest

import tether
from tests.distribution import memory_of_loading as memory
from tests.distribution import roads_of_files as roads
from tests.distribution.programs import names, said_by

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="`keras.distribution` is of JAX")


def run(program, folder, **options):
    """What a program says, for which this process has written what it reads."""
    program.prepare(folder)
    return said_by(program.__name__.rpartition(".")[2], folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_processes(folder):
    return run(roads, folder, processes=2, devices=2)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    return run(roads, tmp_path_factory.mktemp("eight"), devices=8)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run(memory, tmp_path_factory.mktemp("memory"), processes=2, variables=memory.ALLOCATOR)


@pytest.mark.parametrize("name", names("roads_of_files"))
def test_in_two_processes(two_processes, name):
    assert [each[name] for each in two_processes] == ["", ""], "\n".join(each[name] for each in two_processes)


@pytest.mark.parametrize("name", names("roads_of_files", processes=1))
def test_in_one_process_with_eight_devices(eight_devices, name):
    assert eight_devices[0][name] == "", eight_devices[0][name]


@pytest.mark.parametrize("name", names("memory_of_loading"))
def test_the_memory_of_two_processes(measured, name):
    assert [each[name] for each in measured] == ["", ""], "\n".join(each[name] for each in measured)


def test_one_process_reads_what_two_have_written(two_processes, folder):
    model = roads.zeroed(roads.build())
    tether.files.load_safetensors(model, folder / "own")
    for variable, right in roads.by_name(model):
        np.testing.assert_array_equal(variable.numpy(), right)
    trained = tether.files.load_model(folder / "trained.keras")
    right = dict(np.load(folder / "trained.npz"))
    for number, variable in enumerate([*trained.weights, *trained.optimizer.variables]):
        np.testing.assert_array_equal(variable.numpy(), right[f"arr_{number}"], err_msg=variable.path)
    assert trained.get_layer("head").kernel.expression == trained.get_layer("embed").embeddings.expression.T

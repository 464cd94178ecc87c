"""Layouts on simulated devices, with JAX: each group of checks runs in a process of its own, once."""

import functools

import keras
import pytest

from tests.distribution.programs import names, said_by

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="`keras.distribution` is JAX's")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    @functools.cache
    def of(program, devices=8, limit=240, quick=True, processes=1, only=None):
        folder = tmp_path_factory.mktemp(program)
        return said_by(program, folder, processes=processes, devices=devices, limit=limit, quick=quick, only=only)

    return of


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names("roads"))
def test_what_is_stored_lies_as_its_uses_say_and(said, name):
    error = said("roads")[0][name]
    assert error == "", error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names("training"))
def test_training_is_that_of_one_device_with(said, name):
    error = said("training")[0][name]
    assert error == "", error


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if "everything" in each else pytest.mark.slow) for each in names("training")]
)
def test_training_in_two_processes_is_that_of_one_device_with(said, name):
    for process in said("training", processes=2, devices=4, only=name):
        assert process[name] == "", process[name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names("texts"))
def test_in_the_compiled_text(said, name):
    error = said("texts", quick=False)[0][name]
    assert error == "", error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names("wide"))
def test_in_the_compiled_text_for_64_devices(said, name):
    error = said("wide", devices=64, quick=False)[0][name]
    assert error == "", error


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", names("wide"))
def test_in_the_compiled_text_for_256_devices(said, name):
    error = said("wide", devices=256, limit=800, quick=False)[0][name]
    assert error == "", error


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names("hub"))
def test_keras_hub_has_it_that(said, name):
    pytest.importorskip("keras_hub")
    error = said("hub")[0][name]
    assert error == "", error

"""Layouts on simulated devices, with JAX: each group of checks runs in a process of its own, once."""

import keras
import pytest

from tests.distribution.running import checks, results

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="`keras.distribution` is JAX's")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", checks("roads"))
def test_what_is_stored_lies_as_its_uses_say_and(name):
    error, _ = results("roads")[name]
    assert error is None, error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", checks("training"))
def test_training_is_that_of_one_device_with(name):
    error, _ = results("training")[name]
    assert error is None, error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", checks("texts"))
def test_in_the_compiled_text(name):
    error, _ = results("texts", quick=False)[name]
    assert error is None, error


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", checks("wide"))
def test_in_the_compiled_text_for_64_devices(name):
    error, _ = results("wide", devices=64, quick=False)[name]
    assert error is None, error


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", checks("wide"))
def test_in_the_compiled_text_for_256_devices(name):
    error, _ = results("wide", devices=256, limit=800, quick=False)[name]
    assert error is None, error


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", checks("hub"))
def test_keras_hub_has_it_that(name):
    pytest.importorskip("keras_hub")
    error, _ = results("hub")[name]
    assert error is None, error

"""Layouts on simulated devices, with JAX: each group of checks runs in a process of its own, once."""

import keras
import pytest

from tests.distribution.running import checks, results

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="`keras.distribution` is JAX's")


@pytest.mark.parametrize("name", checks("roads"))
def test_it_lies_on_eight_devices_so_that(name):
    error, _ = results("roads")[name]
    assert error is None, error

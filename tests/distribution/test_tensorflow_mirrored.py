"""Models in the scope of TensorFlow's `MirroredStrategy` learn as on one device."""

import keras
import pytest

from tests.distribution import processes

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's")
SCRIPT = "tensorflow_mirrored.py"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return processes.run(SCRIPT, tmp_path_factory.mktemp("mirrored"), count=1)[0]


@pytest.mark.parametrize("name", processes.names(SCRIPT))
def test_two_replicas(said, name):
    assert said.get(name, "not reached: a case before it failed, or took too long") == "ok"

"""Models in the scope of TensorFlow's `MirroredStrategy` learn as on one device."""

import keras
import pytest

from tests.distribution.programs import names, said_by

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's")
PROGRAM = "tensorflow_mirrored"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return said_by(PROGRAM, tmp_path_factory.mktemp("mirrored"))[0]


@pytest.mark.parametrize("name", names(PROGRAM))
def test_two_replicas(said, name):
    assert said[name] == "", said[name]


@pytest.mark.parametrize("name", names("tensorflow_workers"))
def test_two_workers(tmp_path, name):
    for process in said_by("tensorflow_workers", tmp_path, processes=2, only=name):
        assert process[name] == "", process[name]

"""Models that FSDP2 divides between two processes learn as in one, and go through files."""

import keras
import numpy as np
import pytest

from tests.distribution import processes

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="FSDP2 is PyTorch's"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint of one process is meant
]


def before_roads(folder):
    """What one process leaves for two: a checkpoint of PyTorch's."""
    import torch.distributed.checkpoint as dcp

    from tests.distribution.torch_fsdp import language_model

    model = language_model()
    dcp.save(model.state_dict(), checkpoint_id=folder / "one", no_dist=True)
    np.savez(folder / "one.npz", *[weight.numpy() for weight in model.weights])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    found = {}

    def of(script):
        if script not in found:
            folder = tmp_path_factory.mktemp(script.partition(".")[0])
            if script == "torch_roads.py":
                before_roads(folder)
            found[script] = (processes.run(script, folder), folder)
        return found[script]

    return of


CASES = [(script, name) for script in ("torch_fsdp.py", "torch_roads.py") for name in processes.names(script)]


@pytest.mark.parametrize(("script", "name"), CASES, ids=[name for _, name in CASES])
def test_two_processes(said, script, name):
    for process in said(script)[0]:
        assert process.get(name, "not reached: a case before it failed, or took too long") == "ok"


def test_a_checkpoint_of_two_processes_is_read_by_one(said):
    import torch.distributed.checkpoint as dcp

    from tests.distribution.torch_fsdp import language_model

    folder = said("torch_roads.py")[1]
    model = language_model()
    values = model.state_dict()
    dcp.load({"model": values}, checkpoint_id=folder / "two", no_dist=True)
    model.load_state_dict(values)
    right = np.load(folder / "values_0.npz")
    assert all(np.array_equal(weight.numpy(), right[f"arr_{place}"]) for place, weight in enumerate(model.weights))

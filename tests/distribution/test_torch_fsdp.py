"""Models that FSDP2 divides between two processes learn as in one, and go through files."""

import keras
import numpy as np
import pytest

from tests.distribution.programs import names, said_by

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

    def of(program):
        if program not in found:
            folder = tmp_path_factory.mktemp(program)
            if program == "torch_roads":
                before_roads(folder)
            found[program] = (said_by(program, folder, processes=2), folder)
        return found[program]

    return of


CHECKS = [(program, name) for program in ("torch_fsdp", "torch_roads") for name in names(program)]


@pytest.mark.parametrize(("program", "name"), CHECKS, ids=[name for _, name in CHECKS])
def test_two_processes(said, program, name):
    for process in said(program)[0]:
        assert process[name] == "", process[name]


def test_a_checkpoint_of_two_processes_is_read_by_one(said):
    import torch.distributed.checkpoint as dcp

    from tests.distribution.torch_fsdp import language_model

    folder = said("torch_roads")[1]
    model = language_model()
    values = model.state_dict()
    dcp.load({"model": values}, checkpoint_id=folder / "two", no_dist=True)
    model.load_state_dict(values)
    right = np.load(folder / "values_0.npz")
    assert all(np.array_equal(weight.numpy(), right[f"arr_{place}"]) for place, weight in enumerate(model.weights))

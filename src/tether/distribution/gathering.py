"""Several processes that run one program: reading values that lie on all of them, and waiting for each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from tether import keras_seam
from tether.errors import TetherError, received


@contextlib.contextmanager
def gathering() -> Iterator[None]:
    """Within, a value that lies partly on other processes is gathered when it is read.

    A weight that is split over the devices of several processes of JAX cannot be read by one of them alone:
    `weight.numpy()` is an error there. Inside this block it gives all of the value, in every process. So does
    `weight.value` of a model that PyTorch's FSDP2 divides (`fully_shard`), which is this process's shard elsewhere.
    Every process has to run the block and read the same values in the same order. On JAX, if one does not, the others
    raise after `time_limit`; on PyTorch, after the time limit of the process group.

    What reads values in order to save, load or change a model gathers by itself and needs no such block. In one
    process the block changes nothing.

    Raises:
        TetherError: On entering or leaving the block, or on reading a value, if another process has failed or did not
            come within the time limit.

    Example:
    ```python
    table = tether.Weight((16, 8), name="table")
    with tether.distribution.gathering():
        values = table.numpy()
    assert values.shape == (16, 8)
    ```
    """
    with keras_seam.gathering("tether.distribution.gathering()"), keras_seam.whole_values():
        yield


def time_limit(seconds: float) -> AbstractContextManager[None]:
    """Within, a process waits so many seconds for the other processes before it raises.

    What several processes do in step (`tether.files.save_model`, `load_model`, `save_safetensors`, `load_safetensors`,
    and whatever gathers a value) begins and ends together, and they meet before each value that is gathered. The limit
    is for one such wait; it has to be longer than process 0 needs to write the largest weight. Without this block it is
    600 seconds.

    Args:
        seconds: For how long a process waits.

    Returns:
        A context manager.

    Raises:
        TetherError: It is not a number above zero.

    Example:
    ```python
    with tether.distribution.time_limit(1800):
        tether.files.save_model(model, "model.keras")
    ```
    """
    given: object = seconds
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e8:
        raise TetherError(f"A time limit is a number of seconds above zero. {received(seconds=seconds)}")
    return keras_seam.time_limit(float(given))


__all__ = ["gathering", "time_limit"]

"""Several processes of JAX that run one program: which values one of them can read, and what all of them do in step.

An array of JAX may lie on the devices of several processes. A process reads what lies on its own; the rest comes by a
collective operation, in which all processes have to take part. One that does not would leave the others waiting, so
before each such operation they meet, in the store of keys that JAX's coordination service has: process 0 looks for a
word of each other one and answers. Who has failed says so there, and the others raise instead of going on. A meeting
to which somebody does not come ends with an error after a time limit.

In one process, and on other backends, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy

from tether.errors import TetherError, Unsupported, received
from tether.types import Array, Tensor

TIME_LIMIT = 600.0
"""Seconds that a process waits for the others, unless `time_limit` says otherwise: longer than writing one weight."""
_SAID, _FAILED = "+", "-"
_BY_JAX = keras.backend.backend() == "jax"


def process_count() -> int:
    if not _BY_JAX:
        return 1
    import jax

    return int(jax.process_count())


def process_number() -> int:
    if not _BY_JAX:
        return 0
    import jax

    return int(jax.process_index())


def spans_processes(value: Tensor) -> bool:
    """Whether a tensor lies on devices of several processes, in parts or as a copy on each."""
    return _BY_JAX and not getattr(value, "is_fully_addressable", True)


def lies_elsewhere(value: Tensor) -> bool:
    """Whether a part of a tensor lies on the devices of other processes only."""
    return spans_processes(value) and not value.is_fully_replicated


class _Here(threading.local):
    """What holds in one thread."""

    def __init__(self) -> None:
        self.road: _Road | None = None
        self.seconds = TIME_LIMIT
        self.gathering = False


_here = _Here()
_roads = 0
_spoken: list[str] = []
"""The keys that this process has set, and which somebody may still read."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, a process waits so many seconds for the others."""
    before, _here.seconds = _here.seconds, seconds
    try:
        yield
    finally:
        _here.seconds = before


@contextlib.contextmanager
def in_step(what: str) -> Iterator[None]:
    """What all processes do together: each comes to its beginning and to its end, or all of them raise.

    Within another one it is a part of that one.

    Args:
        what: The call, for messages; the same in every process.

    Raises:
        TetherError: Another process has failed, is somewhere else, or did not come within the time limit.
    """
    global _roads
    if _here.road is not None or process_count() == 1:
        yield
        return
    road, _roads = _Road(what, _roads), _roads + 1
    road.meet(what)
    _here.road = road
    try:
        yield
        road.meet("the end")
    except BaseException as error:
        road.give_up(error)
        raise
    finally:
        _here.road = None


def place_in_step() -> tuple[int, int]:
    """The number of this process and how many there are, among those that do in step what it does: 0 of 1, if alone."""
    return (0, 1) if _here.road is None else (process_number(), process_count())


def said_by_first(text: str) -> str:
    """A text that process 0 has, in every process: within what they do in step."""
    return text if _here.road is None else _here.road.meet("a name", gives=text)


@contextlib.contextmanager
def in_step_for(model: keras.Layer, what: str) -> Iterator[None]:
    """What reads or stores values of a model: `gathering`, if any of them spans several processes.

    If each of them lies on this process alone, other processes have nothing to do with it.
    """
    with gathering(what) if _is_split(model) else contextlib.nullcontext():
        yield


def _is_split(model: keras.Layer) -> bool:
    if process_count() == 1:
        return False
    variables = [*model.weights, *getattr(getattr(model, "optimizer", None), "variables", ())]
    return any(spans_processes(variable._value) for variable in variables)


def refuse_if_split(model: keras.Layer, what: str, then: str) -> None:
    """Refuses what one process has to do alone, of a model of which it may not have all values.

    Raises:
        Unsupported: The model lies on several processes; it says how to get it into one.
    """
    if _is_split(model):
        raise Unsupported(
            f"{what} is made by one process, and {model.name!r} is split over {process_count()}. Save it in all "
            f"(`tether.files.save_model(model, 'model.keras')`), load that in one process, and {then}."
        )


@contextlib.contextmanager
def in_step_where_distributed(what: str) -> Iterator[None]:
    """What makes variables and reads values, in step where the distribution in force puts them on several processes."""
    mesh = getattr(keras.distribution.distribution(), "device_mesh", None)
    spans = _BY_JAX and mesh is not None and process_count() > 1 and mesh.backend_mesh.is_multi_process
    with gathering(what) if spans else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def gathering(what: str = "reading values") -> Iterator[None]:
    """Within, values that lie partly on other processes are gathered when they are read; all processes run it."""
    before = _here.gathering
    with in_step(what):
        _here.gathering = True
        try:
            yield
        finally:
            _here.gathering = before


class _Road:
    """Something that all processes do in step, and how often they have met on it."""

    def __init__(self, what: str, number: int) -> None:
        self.what, self.number, self.met, self.is_over = what, number, 0, False

    def meet(self, word: str, gives: str = "") -> str:
        """Waits until every process is here with the same word.

        Args:
            word: What they are about to do.
            gives: What process 0 says to the others.

        Returns:
            What process 0 says.

        Raises:
            TetherError: One of them is not.
        """
        client = _client()
        if client is None:  # then no time limit can be had
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"{self.what}: {word}")
            return gives
        place, self.met = self._place(), self.met + 1
        try:
            said = _led(client, place, word, gives) if process_number() == 0 else _followed(client, place, word)
        except BaseException:
            self.is_over = True
            raise
        if said.startswith(_FAILED):
            self.is_over = True
            raise TetherError(f"{self.what} has to be done by all processes, and was ended: {said[1:]}")
        for key in [each for each in _spoken if not each.startswith(f"{place}/")]:
            client.key_value_delete(key)
            _spoken.remove(key)
        return said[1:]

    def give_up(self, error: BaseException) -> None:
        """Says to those who wait at the next meeting that this process will not come."""
        client = _client()
        if not self.is_over and client is not None:
            place, number = self._place(), process_number()
            text = f"process {number} failed with {type(error).__name__}: {str(error)[:800]}"
            _say(client, f"{place}/{'verdict' if number == 0 else number}", _FAILED + text)

    def _place(self) -> str:
        return f"tether/{self.number}/{self.met}"


def _led(client: Any, place: str, word: str, gives: str) -> str:
    """Process 0 at a meeting: what it says to the others in the end."""
    wrong = ""
    for number in range(1, process_count()):
        said = _heard(client, f"{place}/{number}")
        if said is None:
            wrong = f"process {number} did not come to it within {_here.seconds:g} seconds, at {word!r}. {_HOW}"
        elif said.startswith(_FAILED):
            wrong = said[1:]
        elif said[1:] != word:
            wrong = f"process {number} is at {said[1:]!r} where process 0 is at {word!r}."
        if wrong:
            break
    verdict = _FAILED + wrong if wrong else _SAID + gives
    _say(client, f"{place}/verdict", verdict)
    return verdict


def _followed(client: Any, place: str, word: str) -> str:
    """Any other process at a meeting: what process 0 says, or that it has said nothing."""
    number = process_number()
    _say(client, f"{place}/{number}", _SAID + word)
    verdict = _heard(client, f"{place}/verdict")
    if verdict is None:
        verdict = f"{_FAILED}process {number} waited {_here.seconds:g} seconds for process 0, at {word!r}. {_HOW}"
        _say(client, f"{place}/{number}", verdict)
    return verdict


_HOW = (
    "Call it in every process, not in one of them only. Where a process needs longer, say so: "
    "`with tether.distribution.time_limit(seconds): ...`."
)


def _say(client: Any, key: str, text: str) -> None:
    client.key_value_set(key, text, allow_overwrite=True)
    if key not in _spoken:
        _spoken.append(key)


def _heard(client: Any, key: str) -> str | None:
    """What somebody says; `None` if nobody says anything within the time limit."""
    try:
        return str(client.blocking_key_value_get(key, max(1, math.ceil(_here.seconds * 1000))))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise TetherError(f"The other processes cannot be reached any more: {error}") from error
        return None


def _client() -> Any:
    """JAX's access to the store that its processes share; `None` where it has none, or another one."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    client = global_state.client
    needed = ("key_value_set", "key_value_delete", "blocking_key_value_get")
    return client if all(hasattr(client, name) for name in needed) else None


def gathered(value: Tensor, name: str = "", *, in_step: bool = False) -> Array:
    """All of a value that lies partly on other processes, as an array: every process has to ask for it.

    Args:
        value: The value.
        name: What it is called in messages.
        in_step: Whether whoever reads it is something that every process does anyway, as what changes a model is.

    Raises:
        TetherError: Nobody gathers here, or another process does not take part.
    """
    said = f"{name or 'A value'} of shape {tuple(value.shape)} and {value.dtype}"
    if in_step and not _here.gathering:
        with gathering(said):
            return gathered(value, name)
    if not _here.gathering:
        raise TetherError(
            f"{said} lies partly on the devices of other processes, so this process alone cannot read it. Read it in "
            "every process within `with tether.distribution.gathering(): ...`, or read `addressable_shards` of "
            f"its tensor, which lie here. {received(process=process_number(), sharding=str(value.sharding))}"
        )
    assert _here.road is not None
    _here.road.meet(said)
    from jax.experimental import multihost_utils

    return numpy.asarray(multihost_utils.process_allgather(value, tiled=True))

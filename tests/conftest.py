"""What all tests share: slow ones on request, tables spread over the backends, a fixed seed, quiet backends."""

import collections
import gc
import itertools
import pathlib
import zlib

import keras
import numpy as np
import pytest

from tether.keras_seam import census

BACKENDS = ("jax", "torch", "tensorflow")
SPREAD = {
    "forms": 1, "guides": 1, "inspection": 1, "planning": 1, "transfer": 1, "weights": 1,
    "conformance": 2, "files": 2, "layers": 2, "scenarios": 2,
}  # fmt: skip
"""With --spread, on how many backends each test of a folder runs; others run on all. A module may say otherwise."""
TURNS = {
    1: ("torch", "tensorflow", "torch", "torch", "jax", "torch", "torch"),
    2: ("torch jax", "torch tensorflow") * 2 + ("torch tensorflow", "torch jax", "torch tensorflow"),
}
"""Which backends run a test that is for one or two of them: PyTorch most, which compiles nothing; on the others tracing
and compiling take most of the time."""
AS_ONE = {"guides"}
"""Folders whose modules are one piece of work, whose tests look at what the module has trained once: with --spread all
tests of a module run on the same backend."""
MOST_MAPPINGS = 20_000
"""JAX maps memory for each program that it has compiled, of which Linux allows a process some 65,000 mappings."""


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--spread", action="store_true", help="run most tests on one or two of the backends only")


def pytest_collection_modifyitems(config, items):
    leave_out(config, items, {item for item in items if is_too_slow(item, config.getoption("--run-slow"))})
    if config.getoption("--spread"):
        leave_out(config, items, set(elsewhere(items)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker gets all tests of a module, in their order: what the module has made is made once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def leave_out(config, items, these):
    config.hook.pytest_deselected(items=list(these))
    items[:] = [item for item in items if item not in these]


def is_too_slow(item, run_slow):
    """Whether a test is left out since it takes long: always, or where another backend runs what takes minutes."""
    here, marker = keras.backend.backend(), item.get_closest_marker("slow")
    return marker is not None and not (run_slow and marker.kwargs.get("on", here) == here)


def folder_of(item, folders):
    return next((part for part in item.path.relative_to(item.config.rootpath).parts if part in folders), None)


def elsewhere(items):
    """The tests that other backends run: neighbours in a module go to different backends.

    Which ones is told from names alone, since a table may be longer on one backend: by the place of the function in its
    module, and what the test is called. A test that some backend leaves out runs on all, or it might run on none.

    Of a large table (`thin`) the rows on some diagonals run; a table that is for all backends has other diagonals on
    each. So each value of each parameter is in a row that runs, on this backend or another.
    """
    places = collections.defaultdict(dict)
    here = keras.backend.backend()
    for item in items:
        marker = item.get_closest_marker("spread")
        folder = folder_of(item, SPREAD)
        says = (marker.args[0] if marker.args else 1) if marker else SPREAD.get(folder, len(BACKENDS))
        thin = item.get_closest_marker("thin")
        turn = BACKENDS.index(here) if says == len(BACKENDS) else 0
        if thin is not None and (diagonal_of(item) + turn) % thin.args[0]:
            yield item
        if says == len(BACKENDS) or item.get_closest_marker("skipif") is not None:
            continue
        whole = folder in AS_ONE
        among = places[folder if whole else item.path]
        place = among.setdefault(item.path if whole else (item.cls, item.originalname), len(among))
        if not whole and hasattr(item, "callspec"):
            place += zlib.crc32(item.callspec.id.encode())
        turns = [says] if isinstance(says, str) else TURNS[says]
        if here not in turns[place % len(turns)].split():
            yield item


def diagonal_of(item):
    """On which diagonal of its table a row is: the places of its values among those of each parameter, together."""
    row, diagonal = next(iter(item.callspec.indices.values())), 0
    for mark in reversed(list(item.iter_markers("parametrize"))):  # the last parameter changes from row to row
        row, place = divmod(row, len(mark.args[1]))
        diagonal += place
    return diagonal


def pytest_collection_finish():
    """What was imported stays: the garbage collector, and who goes through memory, need not look at it again."""
    gc.collect()
    census.find_new()
    gc.freeze()


def pytest_report_header(config):
    return f"keras {keras.__version__}, backend {keras.backend.backend()}"


TESTS_RUN = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """On JAX, what was compiled is given back before it is too much: a process without mappings left would crash."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if keras.backend.backend() != "jax" or next(TESTS_RUN) % 10 or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(7)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def rng():
    return np.random.default_rng(11)

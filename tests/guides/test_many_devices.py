"""The guide of many devices: each engine is held beside one device, and its plan on paper beside what is measured."""

import io

import keras
import numpy as np
import pytest
from rich.console import Console

from guides import many_devices

BACKEND = keras.backend.backend()
ENGINE = {"jax": "ModelParallel, 2 x 4", "torch": "fully_shard (FSDP2), 2 processes"}
needs_engine = pytest.mark.skipif(BACKEND not in ENGINE, reason="the guide has engines of JAX and PyTorch")


def held(rows):
    for row in rows:
        assert row.loss_difference < 1e-5, row
        assert row.output_difference < 1e-5, row


@needs_engine
def test_an_engine_computes_what_one_device_does_and_stores_less(capfd):
    console = Console(width=120, file=io.StringIO())
    rows = many_devices.main(engines=[ENGINE[BACKEND]], console=console)
    held(rows)
    one, many = rows
    assert many.engine == ENGINE[BACKEND] and one.share == 1
    assert many.share < 0.55
    text = console.file.getvalue()
    assert f"{many.local:,}" in text and many.engine in text
    if BACKEND == "jax":  # what is divided by columns or rows, and the rest
        assert many.local == expected(4)


def expected(devices):
    """Bytes on a device of the model of the guide, by the formula of the plan."""
    letters, width, rank = many_devices.text()[2], many_devices.WIDTH, many_devices.RANK
    stored, blocks = many_devices.Stored, many_devices.BLOCKS
    weights = [
        stored((letters, width), 0),
        stored((width, width), 0, blocks),  # the query, by its rows
        stored((width, width), None, 3 * blocks),
        stored((width,), None, 4 * blocks),
        stored((width, 4 * width), 1, blocks),
        stored((4 * width,), None, blocks),
        stored((4 * width, width), 0, blocks),
        stored((width,), None, blocks),
        stored((width,), None, 4 * blocks),
        # Parts: rows to the first factor, columns to the second.
        stored((width, rank), 0, blocks), stored((rank, width), None, blocks),
        stored((width, rank), None, blocks), stored((rank, 4 * width), 1, blocks),
        stored((4 * width, rank), 0, blocks), stored((rank, width), None, blocks),
        stored((1,), None),
    ]  # fmt: skip
    return many_devices.bytes_stored(weights, devices)


def test_the_plan_has_the_formulas_of_what_is_measured():
    # `tests/distribution/texts.py` finds these bytes in the compiled step of a 64 x 128 kernel on a mesh of 2 x 4.
    kernel = [many_devices.Stored((64, 128), 1), many_devices.Stored((64, 4), None)]
    assert many_devices.bytes_reduced(kernel, 4) == 9_216
    rows = {row["devices"]: row for row in many_devices.plan()}
    assert set(rows) == {8, 256, 4096}
    numbers = many_devices.bytes_stored(many_devices.large_model(), 1, 1)
    assert 2.4e9 < numbers < 2.6e9
    for devices, row in rows.items():
        assert np.isclose(row["base by FSDP, GB"], 2 * numbers / devices / 1e9)
        assert np.isclose(row["gathered by FSDP, GB"], 4 * numbers / 1e9)
        assert row["base, GB"] > 2 * numbers / 8 / 1e9


def test_the_text_is_that_of_python_and_eight_devices_divide_its_letters():
    x, y, letters = many_devices.text()
    assert x.shape == y.shape == (many_devices.STEPS, many_devices.BATCH, many_devices.LENGTH)
    assert (x[..., 1:] == y[..., :-1]).all() and letters % 8 == 0 and x.max() < letters


@pytest.mark.slow
@needs_engine
def test_all_engines():
    rows = many_devices.main(console=Console(file=io.StringIO()))
    held(rows)
    assert [row.engine for row in rows] == list(many_devices.ENGINES)

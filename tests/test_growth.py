"""What Tether does grows with a model and not with its square: functions that are called are counted, not seconds."""

import pathlib

import pytest
from benchmarks import growth

SMALL, LARGE = 30, 120
MOST = 1.08
"""The exponent between them. With twice the growth of a line in a tenth of the work it is 1.15."""


def calls(road, kind, size, folder):
    """The functions that are called on a road, on a model of a size; `None` if the model has no such road."""
    prepare = growth.CHANGING[road] if road in growth.CHANGING else growth.of_model(growth.ROADS[road])
    run = prepare(kind, size, True, folder)
    return growth.calls_of(run)


BY_KIND = [
    *(("listed", road) for road in growth.CHANGING),
    *(("uses", road) for road in ("tie by layer", "tie at once", "untie")),
    *(("uses", road) for road in growth.ROADS if road not in ("load", "save")),
    *(("listed", road) for road in ("check", "check a trained model", "inherit", "facts of a file", "load", "save")),
    *(("promoted", road) for road in ("tie at once", "untie", "check", "load_safetensors", "aliases")),
    *(("low_rank", road) for road in ("facts", "summary", "plot", "tether.files.load_model", "inherit")),
]


@pytest.mark.parametrize(("kind", "road"), BY_KIND, ids=lambda value: value.replace(" ", "_"))
def test_four_times_the_layers_take_four_times_the_calls(kind, road, tmp_path):
    calls(road, kind, 4, pathlib.Path(tmp_path))  # what is imported or compiled once
    few, many = (calls(road, kind, size, pathlib.Path(tmp_path)) for size in (SMALL, LARGE))
    assert growth.exponent((SMALL, LARGE), (few, many)) <= MOST


def test_a_step_calls_no_function_for_each_use():
    few, many = (growth.calls_of(growth.step("uses", size, True, None)) for size in (SMALL, LARGE))
    plain_few, plain_many = (growth.calls_of(growth.step("uses", size, False, None)) for size in (SMALL, LARGE))
    assert many - few <= 1.5 * (plain_many - plain_few) + 200

"""What Tether does grows with a model and not with its square: functions that are called are counted, not seconds."""

import pathlib

import keras
import pytest
from benchmarks import growth

pytestmark = pytest.mark.spread("torch")

SMALL, LARGE = 30, 120
MOST = 1.08
"""The exponent between them; what is quadratic in a tenth of the work at the smaller size is above 1.15."""


def calls(road, kind, size, folder):
    """The functions that are called on a road, on a model of a size."""
    prepare = growth.CHANGING[road] if road in growth.CHANGING else growth.of_model(growth.ROADS[road])
    run = prepare(kind, size, True, folder)
    return growth.calls_of(run)


ONE_BY_ONE = ("tie by layer", "tie by path", "untie by path")
"""On PyTorch a layer that lists the parameters of many below it is looked through by each such call: Keras does not say
which of them another layer stores too. The way around is one call for all, `tie at once`."""
MOST_ONE_BY_ONE = 1.6

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
    looks_through = keras.backend.backend() == "torch" and kind == "listed" and road in ONE_BY_ONE
    assert growth.exponent((SMALL, LARGE), (few, many)) <= (MOST_ONE_BY_ONE if looks_through else MOST)


def test_a_step_calls_no_function_for_each_use():
    few, many = (growth.calls_of(growth.step("uses", size, True, None)) for size in (SMALL, LARGE))
    plain_few, plain_many = (growth.calls_of(growth.step("uses", size, False, None)) for size in (SMALL, LARGE))
    assert many - few <= 1.5 * (plain_many - plain_few) + 200

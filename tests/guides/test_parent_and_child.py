"""The guide of a parent and its children: what it prints is so."""

import keras
import pytest

from guides import parent_and_child


@pytest.mark.parametrize("part", list(parent_and_child.PARTS.values()), ids=lambda part: part.__name__)
def test_every_part_learns_on_after_its_file(part):
    keras.utils.set_random_seed(0)
    found = part(*parent_and_child.data())
    losses = found["losses"]
    assert len(losses) == 10
    assert losses[-1] < losses[4] < losses[0]


def test_what_each_part_shows():
    x, y = parent_and_child.data()
    first = parent_and_child.parent_then_own(x, y)
    assert "@" in first["kernel"] and first["weights"] == 4 and first["moved"] > 0.01
    second = parent_and_child.parent_times_a_factor(x, y)
    assert second["kernel"] == "3.0 * parent.kernel" and second["weights"] == 2
    assert second["ratio"] == pytest.approx((3, 3), abs=1e-5)
    third = parent_and_child.parent_or_own(x, y)
    assert third["weights"] == 3 and third["difference"] > 0.1
    fourth = parent_and_child.outputs_side_by_side(x, y)
    assert fourth["units"] == y.shape[1] and fourth["parent_unchanged"] and fourth["weights"] == 4


def test_it_prints_its_four_parts(capsys):
    parent_and_child.main()
    printed = capsys.readouterr().out
    assert all(title in printed for title in parent_and_child.PARTS)

"""Every rule finds its planted fault, says where, and the same model without the fault is clean."""

from pathlib import Path

import keras
import pytest

import tether
from tests.inspection.checking.faults import ELSEWHERE, FAULTS
from tether.inspection.checking.rules import RULES


def of_faults(fits):
    """One test for each fault that fits; what one backend alone has is tested there."""
    own = [pytest.mark.spread(3)]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=own if each.backend else []) for name, each in FAULTS.items() if fits(each)]
    )


each_fault = of_faults(lambda fault: True)

DISTRIBUTED = {"layout-conflict", "layout-misfit", "layout-missed", "part-whole"}
"""Their faults are planted on several devices, in `tests/distribution/roads.py`."""


def test_every_rule_has_a_planted_fault():
    assert {fault.rule for fault in FAULTS.values()} | DISTRIBUTED | ELSEWHERE == set(RULES)
    planted = (Path(__file__).parents[2] / "distribution" / "roads.py").read_text(encoding="utf-8")
    assert all(f'"{name}") == [(' in planted for name in DISTRIBUTED)


@each_fault
def test_a_planted_fault_is_found(name, rng):
    fault = FAULTS[name]
    model, data = fault.make(rng, True)
    found = tether.check(model, data).by_rule(fault.rule)
    assert found, "nothing found"
    assert {finding.severity for finding in found} == {fault.severity}
    assert found[0].where.startswith(fault.where), found
    assert found[0].why and found[0].mend


@each_fault
def test_the_same_model_without_the_fault_is_clean(name, rng):
    model, data = FAULTS[name].make(rng, False)
    found = tether.check(model, data)
    assert not found, str(found)


@of_faults(lambda fault: fault.mends)
def test_the_code_of_a_finding_mends_the_model(name, rng):
    fault = FAULTS[name]
    model, data = fault.make(rng, True)
    (*_, finding) = tether.check(model, data).by_rule(fault.rule)
    names = {"model": model, "tether": tether, "keras": keras}
    exec(finding.mend, names)
    left = tether.check(names["model"], data)
    assert not left.by_rule(fault.rule), str(left)


@of_faults(lambda fault: not fault.mends)
def test_the_code_of_other_findings_is_python(name, rng):
    fault = FAULTS[name]
    model, data = fault.make(rng, True)
    for finding in tether.check(model, data).by_rule(fault.rule):
        compile(finding.mend, "mend", "exec")

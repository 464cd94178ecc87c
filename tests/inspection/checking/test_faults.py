"""Every rule finds its planted fault, says where, and the same model without the fault is clean."""

import keras
import pytest

import tether
from tests.inspection.checking.faults import ELSEWHERE, FAULTS
from tether.inspection.checking.rules import RULES

each_fault = pytest.mark.parametrize("name", list(FAULTS))


def test_every_rule_has_a_planted_fault():
    assert {fault.rule for fault in FAULTS.values()} | ELSEWHERE == set(RULES)


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


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.mends])
def test_the_code_of_a_finding_mends_the_model(name, rng):
    fault = FAULTS[name]
    model, data = fault.make(rng, True)
    (*_, finding) = tether.check(model, data).by_rule(fault.rule)
    names = {"model": model, "tether": tether, "keras": keras}
    exec(finding.mend, names)
    left = tether.check(names["model"], data)
    assert not left.by_rule(fault.rule), str(left)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.mends])
def test_the_code_of_other_findings_is_python(name, rng):
    fault = FAULTS[name]
    model, data = fault.make(rng, True)
    for finding in tether.check(model, data).by_rule(fault.rule):
        compile(finding.mend, "mend", "exec")

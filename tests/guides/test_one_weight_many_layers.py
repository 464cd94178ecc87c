"""The guide of one weight in many layers: what it prints is so."""

from guides import one_weight_many_layers as guide


def test_an_external_matrix_is_one_weight_in_two_layers():
    found = guide.external_matrix()
    assert found["parameters"] == 18
    assert found["loss"][1] < 0.05 * found["loss"][0]
    assert found["tied_after_a_file"]


def test_a_lambda_with_a_named_weight_trains_on_after_a_file():
    found = guide.lambda_case()
    assert found["weights"] == 1
    losses = found["losses"]
    assert losses[-1] < losses[9] < losses[0]


def test_a_copy_drifts_apart_and_a_tie_does_not():
    found = guide.copy_case()
    assert found["copied"]["at first"] == found["shared"]["at first"] == 0
    assert found["copied"]["trained"] > 0.1
    assert found["shared"]["trained"] == 0
    assert found["shared"]["parameters"] == 18 and found["copied"]["parameters"] == 36


def test_it_prints_its_three_cases(capsys):
    guide.main()
    printed = capsys.readouterr().out
    assert "external matrix" in printed and "copied" in printed and "shared" in printed

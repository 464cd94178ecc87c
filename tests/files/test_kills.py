"""A process killed at any moment of a save leaves a whole file."""

import json
import os
import subprocess
import sys

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.spread


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_save_never_costs_the_file(count, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.files.kills", str(tmp_path), str(count)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["saves"] > 0, "some saves were finished"
    assert report["left"] >= count // 4, "many kills fell into a save"
    assert report["kept"] == report["left"], "what may belong to somebody else stays"
    assert report["after"] == ["model.keras"], "what is old and nobody's goes"

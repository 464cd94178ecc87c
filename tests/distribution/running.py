"""Starting a process with simulated devices, once for a group of checks, under a hard limit of time."""

import functools
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def results(group, devices=8, limit=240, quick=True):
    """What each check of a module of this folder said, by name: an error or `None`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    if quick:  # to compile quickly; what is compiled is not looked at
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment.update(
        KERAS_BACKEND="jax",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.distribution.simulated", group],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def checks(group):
    """The names of the checks of a module of this folder, without running it."""
    source = (ROOT / "tests" / "distribution" / f"{group}.py").read_text(encoding="utf-8")
    names = source.split("\n@check(")[1:]
    return [each.partition("def ")[2].partition("(")[0] for each in names]

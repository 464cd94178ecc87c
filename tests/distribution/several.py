"""Programs that several processes run together, or one process with several devices, and what each of them says.

A program is a module of this folder with functions; those in its `CHECKS` are called by every process, in order, with
what its `start` returned. What each raised is written down, so that one start of the processes serves many tests.
"""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 150
"""Seconds that the processes of one program may take."""


def said_by(program, folder, *, processes=1, devices=1, variables=()):
    """Runs a program; what each check raised (or nothing), by its name, for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **dict(variables),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.distribution.several", program, str(folder), str(processes), port]
    logs = [folder / f"log{number}.txt" for number in range(processes)]
    running = []
    for number, log in enumerate(logs):
        with log.open("w") as output:
            start = [*command, str(number)]
            running.append(subprocess.Popen(start, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT))
    try:
        end = time.monotonic() + PATIENCE
        for each in running:
            each.wait(max(1, end - time.monotonic()))
    finally:
        for each in running:
            each.kill()
            each.wait()
    texts = [log.read_text()[-3000:] for log in logs]
    found = [folder / f"said{number}.json" for number in range(processes)]
    assert all(each.exists() for each in found), "\n\n".join(texts)
    return [json.loads(each.read_text()) for each in found]


def take_part(program, folder, processes, port, number):
    """One process of a program."""
    import jax

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    import keras

    import tether

    if processes > 1:
        keras.distribution.initialize(f"127.0.0.1:{port}", processes, number)
    print("imported", time.process_time(), flush=True)
    module = importlib.import_module(f"tests.distribution.{program}")
    context, said = module.start(folder, number), {}
    wanted = os.environ.get("ONLY", "")
    for check in module.CHECKS:
        if wanted and wanted not in check.__name__:
            continue
        begun = time.monotonic()
        try:
            with tether.distribution.time_limit(20):
                check(context)
            said[check.__name__] = ""
        except Exception:
            said[check.__name__] = traceback.format_exc()[-3000:]
        print(f"{time.monotonic() - begun:6.2f} s  {check.__name__}: {said[check.__name__][-400:] or 'ok'}", flush=True)
    (folder / f"said{number}.json").write_text(json.dumps(said))
    end = time.monotonic() + 60
    while len(list(folder.glob("said*.json"))) < processes and time.monotonic() < end:
        time.sleep(0.05)  # the first process serves the others
    os._exit(0)


if __name__ == "__main__":
    name, where, count, free_port, own = sys.argv[1:]
    take_part(name, pathlib.Path(where), int(count), free_port, int(own))

"""Programs that several processes run together, or one process with several devices, and what each of them says.

A program is a module of this folder. Its checks are the functions under `check` or `of_several`; every process calls
them in order, each with what the program's `start(folder, number)` returned, or with nothing where there is no `start`.
What each raised is written down, so that one start of the processes serves many tests.
"""

import contextlib
import datetime
import importlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
NOT_REACHED = "not reached: a check before it failed, or took too long"


def check(function):
    """Marks a function as a check."""
    function.of_several = False
    return function


def of_several(function):
    """Marks a function as a check that is about other processes: a program of one process leaves it out."""
    function.of_several = True
    return function


def names(program, processes=2):
    """The names of a program's checks, read without running it."""
    source = (ROOT / "tests" / "distribution" / f"{program}.py").read_text(encoding="utf-8")
    found = re.findall(r"^@(check|of_several)\ndef (\w+)", source, re.M)
    return [name for kind, name in found if processes > 1 or kind == "check"]


def said_by(program, folder, *, processes=1, devices=1, quick=True, limit=150, only=None, variables=()):
    """Runs a program under a limit of time.

    Args:
        program: The name of the module.
        folder: Where the processes write what they say, and what they want.
        processes: How many.
        devices: How many each of them has (JAX).
        quick: Whether XLA leaves out what takes long; not where the compiled text is looked at.
        limit: Seconds for all of it.
        only: The one check that is called; all, if it is `None`.
        variables: More variables of the environment, by name.

    Returns:
        For each process what each check raised, by its name: `""` where all is well.
    """
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(processes)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = ",".join(str(each.getsockname()[1]) for each in free)
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1" if quick else "0", **dict(variables),
    }  # fmt: skip
    module = "tests.distribution.programs"
    command = [sys.executable, "-m", module, program, str(folder), ports, only or ""]
    logs = [folder / f"log{number}.txt" for number in range(processes)]
    running = []
    try:
        for number, log in enumerate(logs):
            with log.open("w") as output:
                start = [*command, str(number)]
                running.append(subprocess.Popen(start, stdout=output, stderr=output, env=environment, cwd=folder))
        end = time.monotonic() + limit
        for each in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(1, end - time.monotonic()))
    finally:
        for each in running:
            each.kill()
            each.wait()
    said = [folder / f"said{number}.json" for number in range(processes)]
    assert all(each.exists() for each in said), "\n\n".join(log.read_text()[-3000:] for log in logs)
    reached = dict.fromkeys(names(program, processes), NOT_REACHED)
    return [{**reached, **json.loads(each.read_text())} for each in said]


def take_part(program, folder, ports, only, number):
    """One process of a program."""
    patience, processes = contextlib.nullcontext, len(ports)
    if processes > 1:
        join = {"jax": _join_jax, "tensorflow": _join_tensorflow, "torch": _join_torch}[os.environ["KERAS_BACKEND"]]
        patience = join(ports, number)
    module = importlib.import_module(f"tests.distribution.{program}")
    given = [module.start(folder, number)] if hasattr(module, "start") else []
    said, own = {}, folder / f"said{number}.json"
    for function in [each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__]:
        if not hasattr(function, "of_several") or (function.of_several and processes == 1):
            continue
        if only not in ("", function.__name__):
            continue
        begun = time.monotonic()
        try:
            with patience():
                function(*given)
            said[function.__name__] = ""
        except Exception:
            said[function.__name__] = traceback.format_exc()[-3000:]
        print(f"{time.monotonic() - begun:6.2f} s  {function.__name__}", flush=True)
        own.with_suffix(".new").write_text(json.dumps(said))
        own.with_suffix(".new").rename(own)
        if said[function.__name__] and processes > 1:
            break  # the others may wait in the middle of it
    (folder / f"ended{number}").touch()
    end = time.monotonic() + 60
    while len(list(folder.glob("ended*"))) < processes and time.monotonic() < end:
        time.sleep(0.05)  # the first process serves the others
    os._exit(0)


def _join_jax(ports, number):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    import keras

    import tether

    keras.distribution.initialize(f"127.0.0.1:{ports[0]}", len(ports), number)
    return lambda: tether.distribution.time_limit(20)


def _join_tensorflow(ports, number):
    workers = [f"127.0.0.1:{port}" for port in ports]
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": number}})
    return contextlib.nullcontext


def _join_torch(ports, number):
    import torch.distributed as dist

    sys.modules["tensorflow"] = None  # Keras would import it to write a config, which takes ten seconds
    patience = datetime.timedelta(seconds=60)
    address = f"tcp://127.0.0.1:{ports[0]}"
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=len(ports), timeout=patience)
    return contextlib.nullcontext


if __name__ == "__main__":
    name, where, free_ports, wanted, own_number = sys.argv[1:]
    take_part(name, pathlib.Path(where), free_ports.split(","), wanted, int(own_number))

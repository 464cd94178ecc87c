"""Runs a script of this folder in several processes of PyTorch, and reads what they say.

The processes find each other through a file. A script names its cases by `case` and ends with `run_cases()`. Each
process runs them in order and writes after each how it went, so that one that fails or hangs is told from those before.
"""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 150
"""Seconds for all cases of a script."""

CASES = {}


def case(function):
    """Names a function as a case: it is called in each process with the folder that they share."""
    CASES[function.__name__] = function
    return function


def names(script):
    """The cases of a script, read without running it."""
    lines = (pathlib.Path(__file__).parent / script).read_text(encoding="utf-8").split("\n@case\ndef ")[1:]
    return [line.partition("(")[0] for line in lines]


def join_torch(rank, count, folder):
    """Starts the process group of PyTorch."""
    import torch.distributed as dist

    sys.modules["tensorflow"] = None  # Keras would import it to write a config, which takes ten seconds
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
    return dist.barrier


def run_cases(join=None):
    """In a process: runs the cases, and writes what came of each.

    For a person who looks for a fault: `ONLY="one_case another"` in the environment runs these, `TIMES=1` prints how
    long each takes.

    Args:
        join: Called with the number of the process, how many there are, and their folder; returns what waits for all.
    """
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    wait = join(rank, count, folder) if join is not None else lambda: None
    said = {}
    for name, function in CASES.items():
        if name not in os.environ.get("ONLY", name).split():
            continue
        start = time.monotonic()
        try:
            function(folder)
            said[name] = "ok"
        except BaseException:
            said[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(said))
        if said[name] != "ok":
            break  # the other processes may wait in the middle of a case
        if "TIMES" in os.environ:
            print(f"{rank} {name} {time.monotonic() - start:.1f}", flush=True)
    if len(said) == len(CASES):
        wait()
    os._exit(0)


def run(script, folder, count=2):
    """Starts the processes, waits for them, and returns what each said of each case."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    program = pathlib.Path(__file__).parent / script
    processes = []
    try:
        for rank in range(count):
            arguments = [sys.executable, str(program), str(rank), str(count), str(folder)]
            processes.append(subprocess.Popen(arguments, cwd=folder, env=environment))
        end = time.monotonic() + LIMIT
        for process in processes:
            process.wait(max(1, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]

"""What groups cost and save under FSDP2: the peak memory of two processes, with groups by block and with one group.

Run with `KERAS_BACKEND=torch python -m benchmarks.sharding`; other backends have nothing to measure. Each line is a
fresh pair of processes on the processor. The memory is the largest that a process has had, above what it had when the
model was sharded, in MiB: what is gathered, gradients before they are reduced, and activations.
"""

import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import keras
import numpy as np

import tether
from benchmarks._measure import write

WIDTH, HIDDEN, BLOCKS = 512, 2048, 12
MIB = 2**20


def model_of_blocks():
    """Blocks of two kernels, and an embedding that is tied to the head."""
    inputs = keras.Input((16,), dtype="int32")
    table = tether.Weight(name="table", initializer="uniform")
    h = tether.tie(keras.layers.Embedding(2000, WIDTH, name="embed"), embeddings=table)(inputs)
    for number in range(BLOCKS):
        parts = [keras.layers.Dense(HIDDEN, activation="relu"), keras.layers.Dense(WIDTH)]
        block = keras.Sequential(parts, name=f"block_{number}")
        block.build((None, 16, WIDTH))
        h = h + block(h)
    return keras.Model(inputs, tether.tie(keras.layers.Dense(2000, use_bias=False), kernel=table.T)(h))


def present():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB


def process(rank, folder, groups):
    """One of two processes: says how far its memory rose in a forward pass and in a step."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=2)
    model = model_of_blocks()
    whole = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    tether.distribution.fully_shard(model, groups=groups)
    x = torch.as_tensor(np.random.default_rng(0).integers(0, 2000, (2, 16)))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = present()
    with torch.no_grad():
        model(x)
    forward = peak_since() - before
    torch.nn.functional.cross_entropy(model(x).reshape(-1, 2000), x.reshape(-1)).backward()
    step = peak_since() - before
    dist.barrier()
    if rank == "0":
        print(f"{whole:.0f} {forward:.0f} {step:.0f}", flush=True)


def peak_since():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(groups):
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-m", "benchmarks.sharding", str(rank), folder, groups] for rank in range(2)]
        # Freed memory goes back at once, so that the peak is that of what is held together.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "GLOO_SOCKET_IFNAME": "lo"}
        started = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True, env=environment) for one in commands]
        said = [each.communicate(timeout=300)[0] for each in started]
    return [float(number) for number in said[0].split()]


def main():
    if keras.backend.backend() != "torch":
        print("FSDP2 is PyTorch's: nothing to measure here.")
        return
    rows = []
    for groups in ("blocks", "model"):
        whole, forward, step = measure(groups)
        rows.append({"case": groups, "all_weights_mib": whole, "forward_mib": forward, "step_mib": step})
    write("sharding", rows)


if __name__ == "__main__":
    process(*sys.argv[1:]) if sys.argv[1:] else main()

"""A tied language model with low-rank parts on many devices: each engine computes what one device does.

The model reads characters. One table embeds them and, transposed, makes the logits; the kernels of its blocks are those
of a frozen start plus low-rank parts. It trains for a few steps

- on one device;
- with `keras.distribution` (JAX, eight simulated devices): the batch divided over eight, and weights divided over a
  mesh of 2 × 4 and of 1 × 8, by a layout map that names the head and the blocks' kernels and nothing of the table and
  the parts: `tether.distribution.layout_map` derives those;
- under PyTorch's DistributedDataParallel in two processes, each with half of each batch;
- with `tether.distribution.fully_shard` (FSDP2) in two processes.

The table that is printed has the loss at the end, how far losses and final outputs are from those of one device, and
how many bytes of weights a device holds.

Run it with `python guides/many_devices.py` (about two minutes). It starts a process for each engine, since a process
has one backend. The text are the help topics that Python brings. `--plan` prints what a model of 2.5 thousand million
numbers and a thousand adapters would store and move on 8, 256 and 4,096 devices, by formulas that hold for the small
model too: no device is asked.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np

ENGINES = {
    "one device, JAX": ("jax", "one", 1),
    "DataParallel, 8 devices": ("jax", "data", 1),
    "ModelParallel, 2 x 4": ("jax", "2x4", 1),
    "ModelParallel, 1 x 8": ("jax", "1x8", 1),
    "one device, PyTorch": ("torch", "one", 1),
    "DDP, 2 processes": ("torch", "ddp", 2),
    "fully_shard (FSDP2), 2 processes": ("torch", "fsdp", 2),
}
"""Backend, way and number of processes."""
LENGTH, BATCH, WIDTH, HEADS, BLOCKS, RANK = 16, 16, 32, 4, 2, 4
STEPS, RATE = 8, 0.5
LIMIT = 240
"""Seconds after which a process is ended."""


# --------------------------------------------------------------------------- the model and the text


def text():
    """Batches of characters, as numbers, and how many characters there are."""
    from pydoc_data import topics

    words = "".join(topics.topics[name] for name in sorted(topics.topics)[:8])
    letters = sorted(set(words))
    letters += [""] * (-len(letters) % 8)  # a table that eight devices can divide
    numbers = np.array([letters.index(letter) for letter in words], "int32")
    starts = np.random.default_rng(0).integers(0, len(numbers) - LENGTH - 1, (STEPS, BATCH))
    rows = numbers[starts[..., None] + np.arange(LENGTH + 1)]
    return rows[..., :-1], rows[..., 1:], len(letters)


def build(letters):
    """A tied language model whose blocks have low-rank parts; the same numbers in every process."""
    import keras

    import tether

    def start(seed):
        return keras.initializers.RandomNormal(stddev=0.1, seed=seed)

    table = tether.Weight((letters, WIDTH), start(1), name="table")
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = tether.tie(keras.layers.Embedding(letters, WIDTH, name="embed"), embeddings=table)(inputs)
    for place in range(BLOCKS):
        seeds = [10 * (place + 1) + number for number in range(4)]
        attention = keras.layers.MultiHeadAttention(
            HEADS, WIDTH // HEADS, kernel_initializer=start(seeds[0]), name=f"attention_{place}"
        )
        x = keras.layers.LayerNormalization(name=f"norm_{place}")(x + attention(x, x, use_causal_mask=True))
        up = keras.layers.Dense(4 * WIDTH, "gelu", kernel_initializer=start(seeds[1]), name=f"up_{place}")
        down = keras.layers.Dense(WIDTH, kernel_initializer=start(seeds[2]), name=f"down_{place}")
        x = keras.layers.LayerNormalization(name=f"norm_down_{place}")(x + down(up(x)))
    head = tether.tie(keras.layers.Dense(letters, use_bias=False, name="head"), kernel=table.T)
    model = keras.Model(inputs, head(x), name="characters")
    parts = tether.low_rank(RANK, seed=5)
    return tether.adapters.add(model, "part", {"up_*/kernel": parts, "down_*/kernel": parts, "*/query/kernel": parts})


LAYOUTS = {
    "head/kernel": (None, "model"),
    "up_*/kernel": (None, "model"),
    "down_*/kernel": ("model", None),
    "*/query/kernel": ("model", None, None),
}
"""What is said; the table's rows, and the parts' rows and columns, follow."""


# --------------------------------------------------------------------------- one process of an engine


@dataclass
class Found:
    """What a process says."""

    losses: list[float]
    outputs: list
    local: int
    """Bytes of weights on one device."""


def of_jax(way):
    """Trains by Keras's own `fit`, under a distribution."""
    import keras

    import tether

    x, y, letters = text()
    devices = keras.distribution.list_devices("cpu")
    if way == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    elif way != "one":
        shape = tuple(map(int, way.split("x")))
        mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
        layouts = tether.distribution.layout_map(lambda: build(letters), LAYOUTS, mesh)
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        )
    model = build(letters)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss)
    losses = [float(model.train_on_batch(*batch)) for batch in zip(x, y, strict=True)]
    local = sum(v.value.addressable_shards[0].data.nbytes for v in model.weights)
    return Found(losses, np.asarray(model.predict_on_batch(x[0])).tolist(), local)


def of_torch(way, rank, processes):
    """Trains by a loop of PyTorch's, in one process or one of two."""
    import keras
    import torch

    import tether

    x, y, letters = text()
    model = build(letters)
    if processes > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    if way == "fsdp":
        model = tether.distribution.fully_shard(model)
    called = torch.nn.parallel.DistributedDataParallel(model) if way == "ddp" else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, RATE), []
    mine = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for rows, answers in zip(x, y, strict=True):
        logits = called(torch.as_tensor(rows[mine]))
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, letters), torch.as_tensor(answers[mine]).reshape(-1).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        said = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(said)
        losses.append(float(said) / processes)
    with torch.no_grad():
        outputs = keras.ops.convert_to_numpy(called(torch.as_tensor(x[0])))
    local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() * p.element_size() for p in model.parameters())
    return Found(losses, outputs.tolist(), local)


def child(backend, way, rank, processes, folder):
    """One process: writes what it found."""
    found = of_jax(way) if backend == "jax" else of_torch(way, rank, processes)
    (folder / f"{rank}.json").write_text(json.dumps(vars(found)))
    if processes > 1:
        import torch

        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # without waiting for the threads of the processes' connections


# --------------------------------------------------------------------------- on paper


@dataclass(frozen=True)
class Stored:
    """A weight, how it is divided, and how many there are of it."""

    shape: tuple[int, ...]
    divided: int | None
    """Which axis lies over the model axis of the mesh; `None` if it is whole on each device."""
    count: int = 1

    def local(self, devices):
        """Numbers on each of so many devices along the model axis."""
        shape = list(self.shape)
        if self.divided is not None:
            assert shape[self.divided] % devices == 0
            shape[self.divided] //= devices
        return self.count * int(np.prod(shape))


def large_model(layers=18, width=2048, vocabulary=256_000, inner=16_384, heads=8, head=256):
    """A tied model of 2.5 thousand million numbers, with a table that is also the head, and one key for all heads."""
    return [
        Stored((vocabulary, width), 0),
        Stored((width, heads * head), 1, layers),  # query
        Stored((width, head), None, 2 * layers),  # key and value
        Stored((heads * head, width), 0, layers),
        Stored((width, inner), 1, 2 * layers),
        Stored((inner, width), 0, layers),
        Stored((width,), None, 2 * layers + 1),
    ]


def adapters(count, layers=18, width=2048, rank=8, heads=8, head=256):
    """So many adapters on queries and values: first factors whole, second ones divided as the columns they make."""
    return [
        Stored((width, rank), None, 2 * layers * count),
        Stored((rank, heads * head), 1, layers * count),
        Stored((rank, head), None, layers * count),
    ]


def bytes_stored(weights, model_devices, itemsize=4):
    """Bytes of weights on one device."""
    return itemsize * sum(each.local(model_devices) for each in weights)


def bytes_reduced(weights, model_devices, itemsize=4):
    """Bytes of gradients that one device gets in a step of data parallel training: its part of each weight that trains.

    For a kernel that trains and is divided by columns, with a low-rank part, these are the kernel's columns and the
    first factor: the gradient of the second one is computed from what was reduced already.
    """
    return bytes_stored(weights, model_devices, itemsize)


MESHES = {8: (1, 8), 256: (32, 8), 4096: (512, 8)}
"""Devices along the batch and along the model."""


def plan():
    """What a device stores, and gets in a step, by the number of devices: the base in 2 bytes a number, the rest in 4.

    By FSDP all weights are divided over all devices, and gathered for the forward pass and again for the backward one.
    """
    base, parts, some = large_model(), adapters(1000), adapters(16)
    rows = []
    for devices, (batch, model) in MESHES.items():
        rows.append(
            {
                "devices": devices,
                "mesh": f"{batch} x {model}",
                "base, GB": bytes_stored(base, model, 2) / 1e9,
                "base by FSDP, GB": bytes_stored(base, 1, 2) / devices / 1e9,
                "1,000 adapters, GB": bytes_stored(parts, model) / 1e9,
                "slots of Adam, 16 train, MB": 2 * bytes_stored(some, model) / 1e6,
                "gradients, 16 train, MB": bytes_reduced(some, model) / 1e6,
                "gradients, the base trains, GB": bytes_reduced(base, model) / 1e9,
                "gathered by FSDP, GB": 2 * bytes_stored(base, 1, 2) / 1e9,
            }
        )
    return rows


# --------------------------------------------------------------------------- all of them


def run(backend, way, processes):
    """Starts the processes of an engine, waits for them, and gives what the first one found."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={1 if way == 'one' else 8}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
        free.close()
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", backend, way, str(rank), str(processes), folder],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            said = [process.communicate(timeout=LIMIT)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, errors in zip(started, said, strict=True):
            if process.returncode:
                raise RuntimeError(f"{backend}, {way}: {errors.strip().splitlines()[-1]}")
        return Found(**json.loads((pathlib.Path(folder) / "0.json").read_text()))


@dataclass(frozen=True)
class Row:
    """An engine, beside one device of the same backend."""

    engine: str
    loss: float
    loss_difference: float
    output_difference: float
    local: int
    share: float
    """Of the bytes of one device."""


def main(engines=None, console=None):
    """Trains with each engine and prints the table.

    Args:
        engines: Names of engines; all, if left out. One device of each backend is always there.
        console: Where the table is printed.

    Returns:
        The rows.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows, one = [], {}
    for engine, (backend, way, processes) in ENGINES.items():
        if engines is not None and engine not in engines and way != "one":
            continue
        if engines is not None and backend not in {ENGINES[name][0] for name in engines}:
            continue
        found = run(backend, way, processes)
        first = one.setdefault(backend, found)
        rows.append(
            Row(
                engine,
                found.losses[-1],
                float(np.abs(np.array(found.losses) - first.losses).max()),
                float(np.abs(np.array(found.outputs) - first.outputs).max()),
                found.local,
                found.local / first.local,
            )
        )
    table = Table(title=f"{STEPS} steps of {BATCH} rows, each engine beside one device", box=box.SIMPLE)
    table.add_column("engine", no_wrap=True)
    for header in ("last loss", "losses differ by", "outputs differ by", "bytes a device", "of one device"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.engine,
            f"{row.loss:.4f}",
            f"{row.loss_difference:.1e}",
            f"{row.output_difference:.1e}",
            f"{row.local:,}",
            f"{row.share:.2f}",
        )
    (console or Console(width=110)).print(table)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A tied language model on many devices.")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="the plan on paper alone")
    options = parser.parse_args()
    if options.child:
        backend, way, rank, processes, folder = options.child
        child(backend, way, int(rank), int(processes), pathlib.Path(folder))
    if options.plan:
        for row in plan():
            print(
                ", ".join(
                    f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"
                    for name, value in row.items()
                )
            )
    else:
        main()

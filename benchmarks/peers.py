"""Beside PyTorch's own ways to add a low-rank part: `torch.nn.utils.parametrize`, which builds the weight, and peft.

Run with `KERAS_BACKEND=torch python -m benchmarks.peers`; peft is an optional extra and is left out where it is
not installed. Ours is a Keras layer in a Keras model, theirs are bare PyTorch modules, so ours includes what Keras
does around a call. `plain` is a Keras Dense beside a bare Linear, neither with a low-rank part: what of it is not ours.
`speedup` is theirs / ours: asked for, never below 0.95.
"""

import importlib.util

import keras
import torch

from benchmarks._measure import compare_made, write
from benchmarks._steps import data, forward, model_of, train
from benchmarks.planner import dense

CASES = [(16, 1024, 8), (16, 4096, 8), (128, 1024, 8), (1024, 1024, 8), (4096, 1024, 8), (4096, 1024, 256)]


class LowRank(torch.nn.Module):
    """W + B A, as a parametrization."""

    def __init__(self, width, rank):
        super().__init__()
        self.a = torch.nn.Parameter(0.02 * torch.randn(rank, width))
        self.b = torch.nn.Parameter(0.02 * torch.randn(width, rank))

    def forward(self, weight):
        return weight + self.b @ self.a


def parametrized(width, rank):
    layer = torch.nn.Linear(width, width)
    layer.weight.requires_grad_(False)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", LowRank(width, rank))
    return layer


def with_peft(width, rank):
    import peft

    model = torch.nn.Sequential(torch.nn.Linear(width, width))
    made = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], bias="all"))
    return made.base_model.model


def runner(module, x, step):
    inputs = torch.as_tensor(x)
    if step == "forward":

        def run():
            with torch.no_grad():
                return module(inputs)

        return run
    weights = [weight for weight in module.parameters() if weight.requires_grad]

    def run():
        given = inputs.detach().requires_grad_()
        return torch.autograd.grad(module(given).square().mean(), [*weights, given])

    return run


def main(budget=6.0):
    if keras.backend.backend() != "torch":
        print("PyTorch's own ways are compared on PyTorch: KERAS_BACKEND=torch python -m benchmarks.peers")
        return
    peers = {"plain": lambda width, rank: torch.nn.Linear(width, width), "parametrize": parametrized}
    if importlib.util.find_spec("peft"):
        peers["peft"] = with_peft
    rows = []
    for name, peer in peers.items():
        for count, width, rank in CASES:
            for step, run in (("forward", forward), ("training", train)):

                def pair(name=name, peer=peer, count=count, width=width, rank=rank, run=run, step=step):
                    layer = keras.layers.Dense(width) if name == "plain" else dense(count, width, rank, True)[0]
                    x = data((count, width))
                    return run(model_of(layer, x.shape), x), runner(peer(width, rank), x, step)

                found = compare_made(pair, budget=budget)
                case = f"peers: {name} rows={count} width={width} rank={rank} {step}"
                rows.append({"case": case, "speedup": 1 / found["ratio"], **found})
                print(f"{rows[-1]['speedup']:.2f} x  {case}", flush=True)
    write("peers", rows)


if __name__ == "__main__":
    main()

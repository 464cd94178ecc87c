"""Adapters beside peft on the same transformer, both on the CPU or both on the GPU that Keras chooses.

    pip install peft
    KERAS_BACKEND=torch python -m benchmarks.adapters             # some minutes; writes benchmarks/results
    KERAS_BACKEND=torch python -m benchmarks.adapters --quick     # whether it runs: small, and nothing is written

Width 512, 4 layers, batch 8 × 128, all six projections of each layer adapted with rank 8. Both sides run the same
PyTorch functions in between (attention, norms, GELU) and the same `torch.optim.AdamW` in float32, so what differs is
how adapted projections are computed. Before they are measured, both have to give the same outputs with the same
factors. Each pair is measured in turn in one process; a ratio below 1 means that Tether is faster. What is kept for the
gradient is counted in bytes of different memory that autograd saves, and is no peak of the whole process.
"""

import argparse
import copy
import pathlib
import tempfile

import keras
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional

import tether
from benchmarks._measure import compare, compare_made, show, write

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--quick", action="store_true", help="small sizes and few rounds; nothing is written")
QUICK = options.parse_args().quick
WIDTH, LAYERS, HEADS, BATCH, LENGTH, RANK = (64, 1, 4, 2, 16, 4) if QUICK else (512, 4, 8, 8, 128, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # as Keras chooses
NAMES = ("query", "key", "value", "output", "up", "down")


def mixed(q, k, v):
    """Attention over heads."""
    q, k, v = (each.view(BATCH, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for each in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(BATCH, -1, WIDTH)


def block(x, of):
    """One layer of a transformer whose projections are `of[name]`."""
    h = functional.layer_norm(x, (WIDTH,))
    x = x + of["output"](mixed(of["query"](h), of["key"](h), of["value"](h)))
    h = functional.layer_norm(x, (WIDTH,))
    return x + of["down"](functional.gelu(of["up"](h)))


def sizes(name):
    return {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}.get(name, (WIDTH, WIDTH))


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(*sizes(name)) for name in NAMES}) for _ in range(LAYERS)
        )

    def forward(self, x):
        for layer in self.layers:
            x = block(x, layer)
        return x


class Ours(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [  # each with a name of its own: Keras registers parameters by path on PyTorch
            {name: keras.layers.Dense(sizes(name)[1], name=f"{name}_{place}") for name in NAMES}
            for place in range(LAYERS)
        ]

    def build(self, shape):
        for layer in self.blocks:
            for name in NAMES:
                layer[name].build((None, None, sizes(name)[0]))

    def call(self, x):
        for layer in self.blocks:
            x = block(x, layer)
        return x


def pair(adapters=("one",), dora=False):
    """Both models with the same base and adapters, the first of them active."""
    torch.manual_seed(0)
    theirs = Theirs()
    ours = Ours()
    ours.build((BATCH, LENGTH, WIDTH))
    for layer, other in zip(ours.blocks, theirs.layers, strict=True):
        for name in NAMES:
            layer[name].kernel.assign(other[name].weight.detach().T.numpy())
            layer[name].bias.assign(other[name].bias.detach().numpy())
    ours.trainable = False
    form = tether.forms.dora if dora else tether.low_rank
    for name in adapters:
        tether.adapters.add(ours, name, {"*/kernel": form(RANK, alpha=16)})
    tether.adapters.activate(ours, adapters[0])
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(NAMES), use_dora=dora, lora_dropout=0.0)
    theirs = get_peft_model(theirs, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        theirs.add_adapter(name, copy.deepcopy(config))
    theirs.set_adapter(adapters[0])
    refuse_different(ours, theirs.to(DEVICE), adapters[0])
    return ours, theirs


@torch.no_grad()
def refuse_different(ours, theirs, name):
    """Gives both sides the same factors, which are not zero, and compares their outputs."""
    for place, blocks in enumerate(ours.blocks):
        for at in NAMES:
            _, part = blocks[at].kernel.expression.parts[name]
            layer = theirs.base_model.model.layers[place][at]
            own = {weight.path.rpartition("_")[2]: weight for weight in part.weights_used()}
            for letter, factors in (("a", layer.lora_A), ("b", layer.lora_B)):
                value = torch.randn(factors[name].weight.shape, generator=torch.Generator().manual_seed(place)) / 16
                factors[name].weight.copy_(value)
                own[letter].assign(value.T.numpy())
    difference = (ours(X) - theirs(X)).abs().max().item()
    assert difference < 1e-3, f"Both sides compute the same, but for rounding; they differ by {difference}."


X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def finished(run):
    """A call that waits for the GPU, where there is one: it returns before it has computed."""
    if DEVICE == "cpu":
        return run

    def waiting():
        found = run()
        torch.cuda.synchronize()
        return found

    return waiting


def forward(model):
    def run():
        with torch.no_grad():
            return model(X)

    return run


def step(model):
    """Forward, backward and AdamW over what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run():
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    return run


def saved_bytes(model):
    """What a step keeps for its backward pass, each piece of memory once, without what the model stores."""
    stored = [v.value for v in model.variables] if isinstance(model, keras.Model) else [*model.parameters()]
    kept, own = {}, {value.untyped_storage().data_ptr() for value in stored}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(X).square().mean()
    loss.backward()
    return sum(kept.values())


CASES = {
    "one active": {},
    "eight loaded, one active": {"adapters": tuple(f"a{n}" for n in range(8))},
    "DoRA": {"dora": True},
}


def main():
    if keras.backend.backend() != "torch":
        print("peft is for PyTorch: KERAS_BACKEND=torch")
        return
    rows = []
    for case, how in CASES.items():
        trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in pair(**how)]
        assert trained[0] == trained[1], trained
        for what, run in (("forward", forward), ("step", step)):

            def made(run=run, how=how):
                return [finished(run(model)) for model in pair(**how)]

            effort = {"pairs": 1, "budget": 0.2, "rounds": 3} if QUICK else {"pairs": 3, "budget": 24.0}
            rows.append({"case": f"{case}, {what}", **compare_made(made, **effort)})
        ours, theirs = map(saved_bytes, pair(**how))
        sizes_mb = {"ours_mb": ours / 1e6, "theirs_mb": theirs / 1e6, "ratio": ours / theirs}
        rows.append({"case": f"{case}, kept for the gradient", **sizes_mb})
    ours, theirs = pair(adapters=("one", "two"))
    switch = compare(
        lambda: [tether.adapters.activate(ours, name) for name in ("two", "one")],
        lambda: [theirs.set_adapter(name) for name in ("two", "one")],
        noise=False,
    )
    rows.append({"case": "two switches", **switch})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "one.safetensors"
        tether.adapters.save(ours, "one", path)
        theirs.save_pretrained(folder, selected_adapters=["one"])

        def our_load():
            tether.adapters.remove(ours, "one")
            tether.adapters.load(ours, path)

        def their_load():
            theirs.delete_adapter("one")
            theirs.load_adapter(f"{folder}/one", "one")

        rows.append({"case": "an adapter removed and loaded", **compare(our_load, their_load, noise=False)})
        read = compare(lambda: load_file(path), lambda: load_file(path), noise=False)["ours_ms"]
        loaded = rows[-1]["ours_ms"]
        bytes_read = {"ours_ms": loaded, "theirs_ms": read, "ratio": loaded / read}
        rows.append({"case": "the same, beside reading its bytes", **bytes_read})
    show(rows) if QUICK else write("adapters", rows)


if __name__ == "__main__":
    main()

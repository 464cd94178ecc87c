"""What PEFT and PyTorch compute, written to `peft.json` beside this file for `tests/forms/test_parity.py`.

It runs in an environment of its own, since the tests of Tether need neither package:

    python -m venv peft && peft/bin/pip install torch==2.13.0 transformers==4.51.3 accelerate peft==0.15.2
    peft/bin/python tests/forms/parity/measure_peft.py

For each adapter: a linear layer with random weights, the adapter's weights set to random numbers (many start at
zero, where little would be compared), the outputs, and all weights and outputs after one step of SGD on the mean
squared error. For each parametrization: the value, and the gradient of a weighted sum of its entries.
"""

import json
import pathlib
import platform

import peft
import torch
from torch.nn.utils import parametrizations

ROWS, COLUMNS, EXAMPLES, RATE = 8, 6, 5, 0.1

ADAPTERS = {
    "low_rank": peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]),
    "low_rank_rank_stabilized": peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["0"]),
    "low_rank_pissa": peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"]),
    "dora": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"]),
    "vera": peft.VeraConfig(r=4, projection_prng_key=3, target_modules=["0"]),
    "scale": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "scale_inputs": peft.IA3Config(target_modules=["0"], feedforward_modules=["0"]),
    "hadamard": peft.LoHaConfig(r=3, alpha=6, target_modules=["0"]),
    "kronecker": peft.LoKrConfig(r=4, alpha=8, target_modules=["0"]),
    "kronecker_factored": peft.LoKrConfig(r=1, alpha=2, target_modules=["0"]),
}


def numbers(tensor):
    return tensor.detach().double().numpy().tolist()


def adapter(config, generator):
    torch.manual_seed(5)
    linear = torch.nn.Linear(ROWS, COLUMNS)
    found = {"weight": numbers(linear.weight), "bias": numbers(linear.bias), "rate": RATE}
    model = peft.get_peft_model(torch.nn.Sequential(linear), config)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        if getattr(config, "init_lora_weights", True) != "pissa":  # whose start is what is compared
            for p in trained.values():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    x = torch.randn(EXAMPLES, ROWS, generator=generator)
    y = torch.randn(EXAMPLES, COLUMNS, generator=generator)
    found["x"], found["y"] = numbers(x), numbers(y)
    found["shared"] = {name.split(".")[-2]: numbers(b) for name, b in model.named_buffers() if "vera_" in name}
    found["before"] = {short(name): numbers(p) for name, p in trained.items()}
    outputs = model(x)
    found["outputs"] = numbers(outputs)
    torch.nn.functional.mse_loss(outputs, y).backward()
    with torch.no_grad():
        for p in trained.values():
            p -= RATE * p.grad
    found["after"] = {short(name): numbers(p) for name, p in trained.items()}
    found["outputs_after"] = numbers(model(x))
    return found


def short(name):
    return next(part for part in name.split(".") if part.startswith(("lora_", "vera_", "ia3_", "hada_", "lokr_")))


def parametrization(register, shape, generator):
    """A parametrized linear layer's value and gradients, with respect to what is stored."""
    torch.manual_seed(5)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=generator))
    plain = numbers(linear.weight)
    register(linear)
    parametrized = linear.parametrizations.weight
    with torch.no_grad():
        for p in parametrized.parameters():
            if register is orthogonal_householder:  # its diagonal is made of signs, which do not train
                p.add_(torch.tril(0.5 * torch.randn(p.shape, generator=generator), -1))
            elif register is not spectral:
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    linear.train()
    buffers = {name: numbers(b) for name, b in parametrized.named_buffers()}
    weights = torch.randn(shape, generator=generator)
    value = linear.weight
    (value * weights).sum().backward()
    return {
        "plain": plain,
        "stored": {name: numbers(p) for name, p in parametrized.named_parameters()},
        "buffers": buffers,
        "buffers_after": {name: numbers(b) for name, b in parametrized.named_buffers()},
        "weights": numbers(weights),
        "value": numbers(value),
        "gradients": {name: numbers(p.grad) for name, p in parametrized.named_parameters()},
    }


def spectral(linear):
    parametrizations.spectral_norm(linear)


def orthogonal_householder(linear):
    parametrizations.orthogonal(linear, orthogonal_map="householder", use_trivialization=False)


def orthogonal_cayley(linear):
    parametrizations.orthogonal(linear, orthogonal_map="cayley")


PARAMETRIZATIONS = {
    "weight_norm": (parametrizations.weight_norm, (6, 8)),
    "spectral_norm": (spectral, (6, 8)),
    "orthogonal_householder": (orthogonal_householder, (8, 5)),
    "orthogonal_householder_wide": (orthogonal_householder, (4, 7)),
    "orthogonal_householder_square": (orthogonal_householder, (6, 6)),
    "orthogonal_cayley": (orthogonal_cayley, (8, 5)),
    "orthogonal_cayley_wide": (orthogonal_cayley, (4, 7)),
    "orthogonal_cayley_square": (orthogonal_cayley, (6, 6)),
}


def main():
    generator = torch.Generator().manual_seed(11)
    found = {
        "versions": {"peft": peft.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "adapters": {name: adapter(config, generator) for name, config in ADAPTERS.items()},
        "parametrizations": {
            name: parametrization(register, shape, generator) for name, (register, shape) in PARAMETRIZATIONS.items()
        },
    }
    path = pathlib.Path(__file__).parent / "peft.json"
    sections = [
        f'"{section}": {{\n' + ",\n".join(f'"{name}": {json.dumps(case)}' for name, case in cases.items()) + "\n}"
        for section, cases in rounded(found).items()
    ]
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def rounded(value):
    """Numbers to nine digits, which float32 needs and no more."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

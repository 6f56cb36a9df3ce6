"""One base model and a small adapter for every customer, trained, saved, attached, switched and taken off.

    python examples/variants/article.py

The form of the article "Improving LoRA: Implementing DoRA from Scratch": a magnitude per input feature, scaling alpha,
the norm not detached. The model recognises what its sensors saw; each customer's sensors have gains of their own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import dora_kernels

CUSTOMERS = ("Anna", "Ben", "Carla")
SENSORS, CLASSES, RANK, ALPHA = 96, 10, 2, 1.0


def seen(count: int, customer: str | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """What a customer's sensors read, and of which class it is."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, SENSORS, generator=random)
    gains = torch.exp(1.2 * torch.randn(len(CUSTOMERS), SENSORS, generator=random))
    random.manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    readings = patterns[labels] + 2.5 * torch.randn(count, SENSORS, generator=random)
    return readings if customer is None else readings * gains[CUSTOMERS.index(customer)], labels


def train(model: nn.Module, customer: str | None = None, steps: int = 100) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        readings, labels = seen(128, customer, seed=3 + step)
        optimizer.zero_grad()
        F.cross_entropy(model(readings), labels).backward()
        optimizer.step()


@torch.no_grad()
def right(model: nn.Module, customer: str) -> float:
    readings, labels = seen(2000, customer, seed=2)
    return (model(readings).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SENSORS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    train(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = {customer: right(model, customer) for customer in CUSTOMERS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "base.safetensors")
        save_file(before, file)
        print(f"base model        {file.stat().st_size / 1024:7.1f} KiB")
        for customer in CUSTOMERS:
            # alpha is divided by the rank here and not in the article
            dora_kernels.apply_dora(model, rank=RANK, alpha=ALPHA * RANK, magnitude_axis="in", detach_norm=False)
            for layer in dora_kernels.adapted_layers(model).values():
                nn.init.normal_(layer.factors[0], std=RANK**-0.5)  # the article's start
            train(model, customer)
            file = Path(folder, f"{customer}.safetensors")
            dora_kernels.save_adapter(model, file, format="lycoris")
            name = f"{customer}'s adapter"
            print(f"{name:18}{file.stat().st_size / 1024:7.1f} KiB,{right(model, customer):7.1%} right after training")
            dora_kernels.remove_dora(model)
        for customer in CUSTOMERS:  # one model serves them all
            dora_kernels.load_adapter(Path(folder, f"{customer}.safetensors"), model)
            print(f"{customer:6}{alone[customer]:7.1%} right with the base model,{right(model, customer):7.1%} adapted")
    dora_kernels.remove_dora(model)
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    print(f"the base model is {'as before' if same else 'CHANGED'}")


if __name__ == "__main__":
    main()

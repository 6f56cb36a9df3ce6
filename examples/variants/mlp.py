"""Plain, LoRA and DoRA layers compared: an MLP that reads digits learns to read them in mirror writing.

    python examples/variants/mlp.py

The form of the LoRA-and-DoRA-from-scratch MLP project: a magnitude per output feature, scaling alpha / r, an eps of
1e-8, the norm not detached.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dora_kernels

# Ten digits, seven rows of five dots each.
GLYPHS = (
    "0e11131519110e 040c040404040e 0e11010204081f 1f02040201110e 02060a121f0202 "
    "1f101e0101110e 0608101e11110e 1f010204080808 0e11110e11110e 0e11110f01020c"
)


def draw(count: int, random: torch.Generator, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """Digits somewhere on a noisy canvas of 12x12 dots, and what they are."""
    rows = [bytes.fromhex(glyph) for glyph in GLYPHS.split()]
    glyphs = torch.tensor([[[byte >> 4 - dot & 1 for dot in range(5)] for byte in glyph] for glyph in rows])
    labels = torch.randint(10, (count,), generator=random)
    top, left = (torch.randint(free + 1, (count, 1, 1), generator=random) for free in (5, 7))
    canvas = 0.2 * torch.randn(count, 12, 12, generator=random)
    where = torch.arange(count).view(-1, 1, 1), top + torch.arange(7).view(-1, 1), left + torch.arange(5)
    canvas[where] += glyphs[labels]
    return (canvas.flip(2) if mirrored else canvas).flatten(1), labels


def train(model: nn.Module, steps: int, **options: bool) -> None:
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for _ in range(steps):
        images, labels = draw(128, random, **options)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def report(name: str, model: nn.Module) -> None:
    images, labels = draw(2000, torch.Generator().manual_seed(2), mirrored=True)
    right = (model(images).argmax(1) == labels).float().mean()
    summary = dora_kernels.trainable_summary(model)
    print(f"{name:20}{summary.trainable:7,} of {summary.total:,} parameters train{right:8.1%} right")


def main() -> None:
    torch.manual_seed(0)
    read = nn.Sequential(nn.Linear(144, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
    train(read, steps=350)
    report("before", read)
    plain, lora, dora = (copy.deepcopy(read) for _ in range(3))
    dora_kernels.apply_dora(lora, rank=4, alpha=8, use_dora=False)
    dora_kernels.apply_dora(dora, rank=4, alpha=8, detach_norm=False, eps=1e-8)
    for name, model in {"plain layers": plain, "LoRA layers": lora, "DoRA layers": dora}.items():
        train(model, steps=150, mirrored=True)
        report(name, model)
    report("DoRA layers, merged", dora_kernels.merge_all(dora))


if __name__ == "__main__":
    main()

"""A tutorial's checkpoint, with `linear.weight`, `lora.A`, `lora.B` and `m`, in this package's layers.

    python examples/variants/column_norm.py

The column-norm form: A [in, r], B [r, out], m [1, in], scaling alpha, the norm at least 1e-8. The article's checkpoints
(`LinearWithDoRAMerged`) have the same names and shapes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import dora_kernels

ALPHA = 8.0


def checkpoint(sizes: list[tuple[int, int]], rank: int) -> dict[str, Tensor]:
    """What a tutorial's training leaves; a file of it is read with `torch.load(path, weights_only=True)`."""
    state = {}
    for i, (inputs, outputs) in enumerate(sizes):
        W, A = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(inputs, rank) / rank**0.5
        state |= {f"{2 * i}.linear.weight": W, f"{2 * i}.linear.bias": torch.randn(outputs), f"{2 * i}.lora.A": A}
        state[f"{2 * i}.lora.B"] = 0.02 * torch.randn(rank, outputs)
        state[f"{2 * i}.m"] = W.norm(dim=0, keepdim=True) * (0.5 + torch.rand(1, inputs))
    return state


def merged(state: dict[str, Tensor], name: str) -> Tensor:
    """The weight that the tutorial computes with."""
    V = state[f"{name}.linear.weight"] + ALPHA * (state[f"{name}.lora.A"] @ state[f"{name}.lora.B"]).T
    return state[f"{name}.m"] * V / V.norm(dim=0, keepdim=True).clamp(min=1e-8)


def adapter_of(state: dict[str, Tensor]) -> dora_kernels.Adapter:
    """Transposed factors, a magnitude without its first dimension, and alpha as the scaling."""
    layers = {
        key.removesuffix(".m"): dora_kernels.AdapterLayer(
            kind="linear",
            lora_A=state[key.removesuffix("m") + "lora.A"].T,
            lora_B=state[key.removesuffix("m") + "lora.B"].T,
            magnitude=m.squeeze(0),
            scaling=ALPHA,
            magnitude_axis="in",
        )
        for key, m in state.items()
        if key.endswith(".m")
    }
    return dora_kernels.Adapter(layers)


def main() -> None:
    torch.manual_seed(0)
    state = checkpoint([(40, 64), (64, 64), (64, 5)], rank=4)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    base = {key.replace("linear.", ""): tensor for key, tensor in state.items() if ".linear." in key}
    model.load_state_dict(base)
    print(f"attached: {', '.join(dora_kernels.attach(model, adapter_of(state)))}")

    x = torch.randn(100, 40)
    wanted = x
    for name in ("0", "2", "4"):
        wanted = (wanted.relu() if name != "0" else wanted) @ merged(state, name).T + state[f"{name}.linear.bias"]
    with torch.no_grad():
        print(f"outputs differ by {(model(x) - wanted).norm() / wanted.norm():.1e}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "adapter.safetensors")
            dora_kernels.save_adapter(model, file, format="lycoris")
            model.load_state_dict(model.state_dict())
            found = dora_kernels.load_adapter(file, model)
            axes = {layer.magnitude_axis for layer in found.layers.values()}
            print(f"read from {file.name}, magnitudes along {axes}: {(model(x) - wanted).norm() / wanted.norm():.1e}")


if __name__ == "__main__":
    main()

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

SIZES, RANK, ALPHA = {"0": (40, 64), "2": (64, 64), "4": (64, 5)}, 4, 8.0


def checkpoint() -> dict[str, Tensor]:
    """As a tutorial's training leaves it; a file of it is read with `torch.load(path, weights_only=True)`."""
    state = {}
    for name, (inputs, outputs) in SIZES.items():
        W = torch.randn(outputs, inputs) / inputs**0.5
        state |= {f"{name}.linear.weight": W, f"{name}.linear.bias": torch.randn(outputs)}
        state[f"{name}.lora.A"] = torch.randn(inputs, RANK) / RANK**0.5
        state[f"{name}.lora.B"] = 0.02 * torch.randn(RANK, outputs)
        state[f"{name}.m"] = W.norm(dim=0, keepdim=True) * (0.5 + torch.rand(1, inputs))
    return state


def published(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What the tutorial computes from it."""
    for name in SIZES:
        V = state[f"{name}.linear.weight"] + ALPHA * (state[f"{name}.lora.A"] @ state[f"{name}.lora.B"]).T
        weight = state[f"{name}.m"] * V / V.norm(dim=0, keepdim=True).clamp(min=1e-8)
        x = (x if name == "0" else x.relu()) @ weight.T + state[f"{name}.linear.bias"]
    return x


def layer_of(state: dict[str, Tensor], name: str) -> dora_kernels.AdapterLayer:
    """Factors transposed, the magnitude without its first dimension, alpha as the scaling."""
    A, B, m = state[f"{name}.lora.A"], state[f"{name}.lora.B"], state[f"{name}.m"]
    return dora_kernels.AdapterLayer("linear", A.T, B.T, m.squeeze(0), scaling=ALPHA, magnitude_axis="in")


def main() -> None:
    torch.manual_seed(0)
    state = checkpoint()
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    model.load_state_dict({key.replace("linear.", ""): tensor for key, tensor in state.items() if ".linear." in key})
    adapter = dora_kernels.Adapter({name: layer_of(state, name) for name in SIZES})
    x = torch.randn(100, 40)
    wanted = published(x, state)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter.safetensors")
        dora_kernels.save_adapter(adapter, file, format="lycoris")
        print(f"{len(SIZES)} layers of a tutorial's checkpoint, {file.stat().st_size / 1024:.1f} KiB of adapter")
        dora_kernels.load_adapter(file, model)
    with torch.no_grad():
        print(f"outputs differ by {(model(x) - wanted).norm() / wanted.norm():.1e}")
        dora_kernels.merge_all(model)
        print(f"outputs of the merged model differ by {(model(x) - wanted).norm() / wanted.norm():.1e}")


if __name__ == "__main__":
    main()

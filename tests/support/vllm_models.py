"""Tiny models and adapters for vLLM, what PEFT makes of them, and vLLM's engine in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 256
PROMPTS = [[7, 45, 201, 33, 9, 120], [88, 3, 250], [14, 14, 60, 190, 77, 31, 5, 101, 9, 222], [131], [64, 65, 66, 67]]
"""Token ids."""


def config(kind: str) -> Any:
    """A transformers configuration: small; vLLM has heads of 32 and more on a CPU."""
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    gated = {"intermediate_size": 160, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "opt":  # column- and row-parallel layers with biases
        return transformers.OPTConfig(**common, ffn_dim=160, word_embed_proj_dim=128, pad_token_id=0)
    classes = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "phi3": "Phi3Config"}
    return getattr(transformers, classes[kind])(**common, **gated, **({"pad_token_id": 0} if kind == "phi3" else {}))


TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),  # each one layer in the file too
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}


def save_model(kind: str, folder: Path) -> Path:
    """A model with random weights, biases too, large enough that greedy tokens vary."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.12)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def quantise(base: Path, folder: Path) -> Path:
    """The model with its linear layers in 4 bits, a scale for 32 elements, as compressed-tensors packs them.

    The dense model in `base` is replaced by what the 4 bits stand for.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    dense, packed = load_file(base / "model.safetensors"), {}
    for name, weight in dense.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        groups = weight.view(len(weight), -1, 32)
        scale = (groups.abs().amax(2, keepdim=True) / 7.0).bfloat16().float()
        integers = (groups / scale).round().clamp(-8, 7)
        dense[name] = (integers * scale).view_as(weight)
        nibbles = (integers.view(len(weight), -1, 8).long() + 8) << torch.arange(0, 32, 4)
        packed[f"{name}_packed"] = nibbles.sum(2).to(torch.uint32).view(torch.int32)
        packed[f"{name}_scale"] = scale.squeeze(2).bfloat16()
        packed[f"{name}_shape"] = torch.tensor(weight.shape)
    for tensors, where in ((dense, base), (packed, folder)):
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer() -> Any:
    """A word for each token: the server wants a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2")


def save_adapter(model: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter of PEFT's with random factors; the magnitudes of a DoRA one move by up to a third."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.33 * (2.0 * torch.rand_like(parameter) - 1.0))
            elif "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


def peft_logits(model: Path, adapter: Path | None, dtype: torch.dtype = torch.float32) -> Any:
    """A function of token ids ``[T]`` that gives PEFT's logits ``[T, vocabulary]`` in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()
    served = base if adapter is None else PeftModel.from_pretrained(base, adapter).to(dtype).eval()

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        return served(torch.tensor([tokens])).logits[0].double()

    return logits


def run_engine(jobs: list[dict[str, Any]], model: Path, processes: int = 1, **options: Any) -> list[Any]:
    """Start vLLM in another process, do one thing after the other there, and return what each gave.

    Its engine and its worker are in that process too, which starts two to three times sooner; with more `processes` in
    their own, as in production, one for each rank.

    A job ``{"generate": [[adapter, prompt], ...]}`` gives tokens and log-probabilities, one batch; an adapter is a
    folder or None. ``{"load": adapter}`` gives the error, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "jobs.json"), Path(folder, "out.json")
        given.write_text(json.dumps({"model": str(model), "options": options, "jobs": jobs}))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(given), str(out)],
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1" if processes > 1 else "0"),
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-40000:]
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def environment(**more: str) -> dict[str, str]:
    """The environment of an engine: no network, little memory, and no interpreter of Triton's."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **inherited, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", **more,
    }  # fmt: skip

"""Adapters of experts, routers, attention and shared experts, merged into the files of every kind of mixture."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from experts_models import logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming

import dora_kernels
from dora_kernels.adapters.blocks import names_in_model
from dora_kernels.checkpoints.checkpoint import Checkpoint
from dora_kernels.checkpoints.merge import merge_checkpoint
from dora_kernels.cli.inspect import inspect

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
DENSE_FIRST = {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "topk_group": 1}
DEEPSEEK = DENSE_FIRST | {
    "n_shared_experts": 1, "n_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 4},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 8},
    "phimoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 40},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "deepseek_v3": DEEPSEEK,
    "olmoe": {"num_experts": 4, "intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "intermediate_size": 32},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 16,
                    "intermediate_size_mlp": 40, "head_dim": 8},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_dense_layers": 1,
                 "layer_types": ["full_attention"] * 2},
    "hy_v3": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "num_shared_experts": 1,
              "first_k_dense_replace": 1},
    "laguna": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "nemotron_h": {"n_routed_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "n_group": 1, "topk_group": 1,
                   "layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 16},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
}  # fmt: skip
"""By model type: a small configuration."""


def model_of(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | MODELS[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def targets_of(model):
    """All linear layers but the output, all stacks, and routers that are matrices.

    Llama 4's and Phi-3.5-MoE's routers are linear layers that return tuples, which PEFT cannot adapt; Jamba reads the
    weight of dt_proj, past PEFT's layer.
    """
    layers, parameters = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layers += [] if name.endswith(("lm_head", "router", "dt_proj")) else [name]
        elif not isinstance(module, nn.Conv1d):
            router = type(module).__name__.endswith(("Router", "Gate"))
            parameters += [
                f"{name}.{key}" for key, each in module._parameters.items()
                if each is not None and (each.dim() == 3 or (router and key == "weight"))
            ]  # fmt: skip
    return layers, parameters


def trained(model, use_dora, targets):
    layers, parameters = targets
    config = LoraConfig(use_dora=use_dora, r=2, lora_alpha=3, target_modules=layers, target_parameters=parameters)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter *= 1 + 0.1 * torch.randn_like(parameter)
            elif "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return adapted


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_merged_files_are_pefts_model(kind, use_dora, tmp_path, globally):
    base = model_of(kind)
    base.save_pretrained(tmp_path / "base")
    adapted = trained(copy.deepcopy(base), use_dora, targets_of(base))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert (expected - logits(base)).abs().max() > 1e-2
    if use_dora:
        dora_kernels.check_adapter(tmp_path / "adapter", copy.deepcopy(base))
    report = inspect(tmp_path / "adapter", tmp_path / "base")
    assert (report["g"] is not None) == use_dora
    merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=0, atol=1e-5)
    dora_kernels.save_adapter(dora_kernels.read_adapter(tmp_path / "adapter"), tmp_path / "again")
    if kind != "laguna":  # whose shared experts PEFT 0.21 with transformers 5.23 does not load, whoever saved them
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "lfm2_moe", "deepseek_v3"])
def test_single_experts_into_files_of_another_spelling(kind, tmp_path, globally):
    """Servers' files have ``gate_proj`` for what Mixtral's call ``w1``."""
    base = model_of(kind)
    base.save_pretrained(tmp_path / "base")
    layers, parameters = targets_of(base)
    adapted = trained(copy.deepcopy(base), False, (layers, [one for one in parameters if ".experts." in one]))
    adapted.save_pretrained(tmp_path / "adapter")
    dora_kernels.save_adapter(dora_kernels.read_adapter(tmp_path / "adapter"), tmp_path / "vllm", format="vllm")
    merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "vllm", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "qwen3_moe"])
def test_adapters_with_the_names_of_files(kind, use_dora, tmp_path):
    """Before transformers 5 models had their files' names: ``block_sparse_moe.experts.3.w1``."""
    base = model_of(kind)
    base.save_pretrained(tmp_path / "base")
    checkpoint, generator, layers = Checkpoint(tmp_path / "base"), torch.Generator().manual_seed(5), {}
    for key in (key for key in checkpoint if ".experts." in key or "q_proj" in key):
        weight = checkpoint[key]
        a, b = (0.1 * torch.randn(*sizes, generator=generator) for sizes in ((2, weight.shape[1]), (len(weight), 2)))
        m = 1.1 * (weight + 1.5 * b @ a).norm(dim=1) if use_dora else None
        layers[key.removesuffix(".weight")] = dora_kernels.AdapterLayer("linear", a, b, m, 1.5)
    dora_kernels.save_adapter(dora_kernels.Adapter(layers), tmp_path / "adapter")
    merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    loaded = copy.deepcopy(base)
    dora_kernels.load_adapter(tmp_path / "adapter", loaded)
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=0, atol=1e-5)
    assert (logits(loaded) - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("saved", ["gate", "experts", "mlp"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_modules_trained_beside(kind, saved, tmp_path):
    """Routers and stacks in ``modules_to_save`` replace what the files have for them, and nothing is added."""
    base = model_of(kind)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in (each for each in adapted.parameters() if each.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert set(Checkpoint(tmp_path / "merged")) == set(Checkpoint(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)


def test_an_adapter_of_another_model(tmp_path, globally):
    """The error names the file, the weight and the nearest one of the model's files."""
    model_of("jamba").save_pretrained(tmp_path / "base")
    for parameter, message in (
        ("mlp.gate.weight", r"the model's files have no model\.layers\.0\.mlp\.gate\.weight"),
        ("mlp.experts.down_proj", r"the model's files have no such stack, nor \S+\.mlp\.experts\.0\.down_proj\.weight"),
    ):
        folder = tmp_path / parameter
        trained(model_of("mixtral"), True, ([], [parameter])).save_pretrained(folder)
        start = rf"^{re.escape(str(folder))}/adapter_model\.safetensors: model\.layers\.0\.{re.escape(parameter)}: "
        with pytest.raises(ValueError, match=rf"{start}{message}; the nearest is model\.layers\."):
            merge_checkpoint(Checkpoint(tmp_path / "base"), folder, tmp_path / "merged")


def test_every_renaming_of_transformers():
    """What transformers renames in mixtures' blocks when it loads files is found under its name in the model."""
    missing, checked = set(), 0
    for kind, rules in conversion_mapping._build_checkpoint_conversion_mapping().items():
        if not any("experts" in str(rule.source_patterns + rule.target_patterns) for rule in rules):
            continue
        renamings = [rule for rule in rules if type(rule) is WeightRenaming]
        for key in (key for rule in renamings for key in samples(rule.source_patterns[0])):
            name = key
            for rule in renamings:
                name = rule.rename_source_key(name)[0]
            name = name.replace("model.language_model.", "model.", 1)  # the start of names is another list's matter
            checked += 1
            if names_in_model([key]).get(name) != key:
                missing.add(kind)
    assert checked > 30
    # Its vision encoder's linear layers have other names, of which it has no mixtures; and a dense audio encoder's.
    assert missing == {"dots3_note_vision_encoder", "nemo_speechlm"}


def samples(pattern):
    """Keys of files that one of transformers' patterns matches, if it is of a mixture's block."""
    plain = re.sub(r"\(\?[^()]*\)", "", pattern).replace("\\", "").replace("d+", "0").strip("^$")
    choice = re.search(r"\(([^()]*)\)", plain)
    ways = [plain.replace(choice[0], one) for one in choice[1].split("|")] if choice else [plain]
    keys = [f"model.layers.0.{way.lstrip('.')}{'weight' if way.endswith('.') else ''}" for way in ways]
    in_block = re.compile(r"\.(mlp|moe|block_sparse_moe|experts|ffn|share_expert)\.(?!.*scale)")
    return [key for key in keys if in_block.search(key) and "sam_model" not in key]

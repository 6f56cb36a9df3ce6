"""Stacks with as many inputs as outputs, whose A and B fit either way: PEFT before 0.19 exchanges them."""

from __future__ import annotations

import json

import pytest
import torch
from experts_models import IDS, qwen3_moe
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig

import dora_kernels
from dora_kernels.checkpoints.checkpoint import Checkpoint, read_for, scales
from dora_kernels.checkpoints.merge import merge_checkpoint

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
RANK, SCALING = 2, 1.5
VERSIONS = pytest.mark.parametrize("version", ["0.18.1", None], ids=["0.18", "0.17"])
KINDS = pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])


def small():
    """A model of OLMoE's proportions: gate_up_proj is ``[6, 32, 32]``, down_proj ``[6, 32, 16]``."""
    return qwen3_moe(moe_intermediate_size=16)


def logits(model):
    model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        return model(IDS).logits.double()


def written_by_old_peft(folder, version, use_dora, targets, transposed=False, model=None):
    """Write an adapter as PEFT 0.17 and 0.18 lay it out; return the model with the weights that it stands for.

    There a parameter's second dimension is always A's: ``delta[e, i, o] = sum over r of A[e, r, i] B[o, r, e]``.
    """
    model = small().double() if model is None else model
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, module in model.named_modules():
        own = [key for key in ("gate_up_proj", "down_proj") if f"experts.{key}" in targets]
        for depth, key in enumerate(reversed(own if name.endswith(".experts") else [])):
            weight = getattr(module, key).data
            count, first, second = weight.shape
            a, b = (0.3 * torch.randn(size, generator=generator, dtype=torch.float64).float()
                    for size in ((RANK * count, first), (second, RANK * count)))  # fmt: skip
            delta = torch.einsum(
                "ore,eri->eio", b.double().view(second, RANK, count), a.double().view(count, RANK, first)
            )
            adapted = weight + SCALING * delta
            start = f"base_model.model.{name}{'.base_layer' * depth}"
            tensors |= {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
            if use_dora:
                norm = adapted.norm(dim=1 if transposed else 2)
                m = (norm * (1 + 0.1 * torch.randn(norm.shape, generator=generator, dtype=torch.float64))).float()
                tensors[f"{start}.lora_magnitude_vector"] = m
                adapted *= (m / norm).unsqueeze(1 if transposed else 2)
            weight.copy_(adapted)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALING, "use_dora": use_dora,
              "target_modules": [], "target_parameters": targets}  # fmt: skip
    config |= {} if version is None else {"peft_version": version}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def close(model, expected):
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


@VERSIONS
@KINDS
@pytest.mark.parametrize("targets", [STACKS, STACKS[:1]], ids=["both", "square"])
def test_square_stacks_of_older_peft(version, use_dora, targets, tmp_path):
    """Loaded, saved again, converted, combined, merged into a folder: the non-square stack tells, or the version."""
    expected = written_by_old_peft(tmp_path / "old", version, use_dora, targets)
    loaded = small()
    guess = "as many inputs as outputs, and no other stack tells A from B; read exchanged, as PEFT before 0.19 has them"
    assert guess not in str(dora_kernels.load_adapter(tmp_path / "old", loaded).notes)
    close(loaded, expected)
    read = dora_kernels.read_adapter(tmp_path / "old")
    assert (guess in str(read.notes)) == (targets != STACKS)
    dora_kernels.save_adapter(read, tmp_path / "again")
    dora_kernels.save_adapter(loaded, tmp_path / "loaded")
    for folder in ("again", "loaded"):
        again = small()
        dora_kernels.load_adapter(tmp_path / folder, again)
        close(again, expected)
        unseen = small()
        dora_kernels.attach(unseen, dora_kernels.read_adapter(tmp_path / folder))
        close(unseen, expected)
    combined, _ = dora_kernels.combine_adapters(small(), [read, read], [0.25, 0.75])
    summed = small()
    dora_kernels.attach(summed, combined)
    close(summed, expected)
    small().save_pretrained(tmp_path / "base")
    merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "old", tmp_path / "merged")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), expected)
    if use_dora:
        checkpoint = Checkpoint(tmp_path / "base")
        for _, g in scales(checkpoint, *read_for(checkpoint, tmp_path / "old")):
            assert g.min() > 0.5 and g.max() < 1.5
        with pytest.raises(ValueError, match=r"gate_up_proj: lora_A .* are exchanged, as PEFT before 0\.19 saves"):
            dora_kernels.check_adapter(tmp_path / "old", small())
        dora_kernels.check_adapter(tmp_path / "again", small())


def transposed(kind):
    """A small model with stacks ``[E, in, out]``, and the square one of these."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "gpt_oss":  # as in its models, hidden and intermediate sizes are the same
        config, square = GptOssConfig(**sizes, intermediate_size=32, num_experts_per_tok=2), "experts.down_proj"
    else:
        config = Llama4TextConfig(**sizes, intermediate_size=16, intermediate_size_mlp=24, num_experts_per_tok=1)
        square = "experts.gate_up_proj"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64), square


@VERSIONS
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_transposed_models_of_older_peft(version, kind, tmp_path):
    """Their A and B were never exchanged: the model tells, whenever it comes, or its folder's configuration."""
    model, square = transposed(kind)
    model.save_pretrained(tmp_path / "base")
    expected = written_by_old_peft(tmp_path / "old", version, True, [square], transposed=True, model=model)
    loaded = transposed(kind)[0].float()
    dora_kernels.load_adapter(tmp_path / "old", loaded)
    close(loaded, expected)
    for base in (None, transposed(kind)[0].state_dict()):
        read = dora_kernels.read_adapter(tmp_path / "old", base)
        combined, _ = dora_kernels.combine_adapters(loaded, [read], [1.0])
        halved = dora_kernels.with_strength(loaded, read, 0.5)
        assert "as many inputs as outputs" not in str(halved.notes)
        for adapter in (read, combined, dora_kernels.with_strength(loaded, halved, 2)):
            attached = transposed(kind)[0].float()
            dora_kernels.attach(attached, adapter)
            close(attached, expected)
    merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / "old", tmp_path / "merged")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64), expected)


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_square_stacks_of_transposed_models(kind, tmp_path, globally):
    """What this package and PEFT write for them is read again, with the model and for its folder."""
    from peft import LoraConfig, get_peft_model

    model, square = transposed(kind)
    model = model.float()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(use_dora=True, r=2, target_modules=[], target_parameters=[square])
    by_peft = get_peft_model(transposed(kind)[0].float(), config)
    dora_kernels.apply_dora(model, [], rank=2, target_parameters=[square])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in (model, by_peft):
            for name, parameter in each.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    dora_kernels.save_adapter(model, tmp_path / "ours")
    by_peft.save_pretrained(tmp_path / "peft")
    for folder, expected in (("ours", model), ("peft", by_peft)):
        again = transposed(kind)[0].float()
        dora_kernels.load_adapter(tmp_path / folder, again)
        close(again, expected)
        merge_checkpoint(Checkpoint(tmp_path / "base"), tmp_path / folder, tmp_path / f"{folder}-merged")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / f"{folder}-merged"), expected)

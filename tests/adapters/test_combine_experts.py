"""Weighted sums and strengths of adapters of experts: expert by expert, what each adds to the weights adds up."""

from __future__ import annotations

import copy

import pytest
import torch
from experts_models import Mixture, experts

import dora_kernels

QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"
LLAMA4 = "transformers.models.llama4.modeling_llama4", "Llama4TextExperts"
GPT = "transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
EVERY = pytest.mark.parametrize("which", [QWEN, LLAMA4, GPT], ids=["qwen3_moe", "llama4", "gpt_oss"])


def adapter_of(which, seed, use_dora=True, rank=2):
    """An adapter in the middle of training."""
    model = Mixture(experts(*which))
    dora_kernels.apply_dora(model, [], rank=rank, alpha=3, use_dora=use_dora, target_parameters=STACKS)
    torch.manual_seed(seed)
    for layer in dora_kernels.adapted_layers(model).values():
        for parameter in layer.adapter_parameters().values():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return dora_kernels.extract(model)


def merged(which, adapter):
    model = Mixture(experts(*which))
    dora_kernels.attach(model, adapter)
    return dict(dora_kernels.merge_all(model).named_parameters())


@EVERY
def test_the_changes_add_up(which):
    one, two, lora = adapter_of(which, 1), adapter_of(which, 2, rank=3), adapter_of(which, 3, use_dora=False)
    weights = 0.6, -0.7, 0.5
    base = dict(Mixture(experts(*which)).named_parameters())
    result, report = dora_kernels.combine_adapters(Mixture(experts(*which)), [one, two, lora], weights)
    assert {name: layer.rank for name, layer in report.layers.items()} == dict.fromkeys(STACKS, 7)
    assert report.error == 0 and {layer.lora_A.shape[0] for layer in result.layers.values()} == {5}
    changes = [merged(which, each) for each in (one, two, lora)]
    for name, found in merged(which, result).items():
        wanted = base[name] + sum(w * (each[name] - base[name]) for w, each in zip(weights, changes))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_a_rank_that_cuts():
    """The report's error is that of the whole stack: what is lost of all experts, over what all experts change."""
    one, two = adapter_of(QWEN, 1, use_dora=False), adapter_of(QWEN, 2, use_dora=False)
    model = Mixture(experts(*QWEN))
    result, report = dora_kernels.combine_adapters(model, [one, two], [1.0, 1.0], rank=3)
    exact, _ = dora_kernels.combine_adapters(model, [one, two], [1.0, 1.0])
    for name in STACKS:
        cut, whole = (each.layers[name].lora_B @ each.layers[name].lora_A for each in (result, exact))
        assert result.layers[name].lora_A.shape[:2] == (5, 3)
        assert report.layers[name].error == pytest.approx(float((whole - cut).norm() / whole.norm()), rel=1e-6)


@EVERY
def test_a_strength(which):
    adapter = adapter_of(which, 1)
    base, full = dict(Mixture(experts(*which)).named_parameters()), merged(which, adapter)
    half = merged(which, dora_kernels.with_strength(Mixture(experts(*which)), adapter, 0.5))
    for name, found in half.items():
        torch.testing.assert_close(found, (base[name] + full[name]) / 2, rtol=1e-9, atol=1e-9)


def test_the_layout_in_files_is_kept(tmp_path):
    """PEFT exchanges A and B of Llama 4's stacks, and gpt-oss's cannot be split into gate and up."""
    from peft import PeftModel

    handle = dora_kernels.patch_peft_globally()
    try:
        base = Mixture(experts(*LLAMA4), torch.float32)
        adapter = adapter_of(LLAMA4, 1)
        expected = copy.deepcopy(base)
        dora_kernels.attach(expected, adapter)
        dora_kernels.save_adapter(dora_kernels.combine_adapters(base, [adapter], [1.0])[0], tmp_path / "combined")
        for model in (None, base):  # and a file that is read and written again
            read = dora_kernels.read_adapter(tmp_path / "combined", model)
            dora_kernels.save_adapter(read, tmp_path / f"again{model is None}")
        for name in ("combined", "againTrue", "againFalse"):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
            torch.testing.assert_close(loaded(), expected(), rtol=1e-5, atol=1e-5)
    finally:
        handle.restore()
    gpt = adapter_of(GPT, 1, use_dora=False)
    dora_kernels.save_adapter(gpt, tmp_path / "gpt")
    model = Mixture(experts(*GPT))
    read = dora_kernels.read_adapter(tmp_path / "gpt", model)
    for each in (
        read,
        dora_kernels.with_strength(model, read, 0.5),
        dora_kernels.combine_adapters(model, [gpt], [2])[0],
    ):
        with pytest.raises(
            ValueError, match=r"experts\.gate_up_proj cannot be written as 'vllm': gate and up take turns"
        ):
            dora_kernels.save_adapter(each, tmp_path / "vllm", format="vllm")


def test_bad_values():
    """The expert is named."""
    adapter = adapter_of(QWEN, 1)
    adapter.layers[STACKS[1]].lora_B[3, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"adapters: experts\.down_proj, expert 3: lora_B has values that are not finite"
    ):
        dora_kernels.combine_adapters(Mixture(experts(*QWEN)), [adapter], [1.0])

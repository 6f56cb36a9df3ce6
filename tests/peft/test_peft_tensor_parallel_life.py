"""Tensor parallelism in two processes, beyond training: processes that differ, merging plain LoRA, what is refused.

Each check compares a split model with the same model in one process, in float64 but where it says so.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers.distributed.tensor_parallel")

from experts_models import qwen3_moe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tensor_parallel import (
    NEEDS,
    TARGETS,
    agree,
    base_model,
    logits,
    move,
    patched,
    peft_model,
    run,
    solve,
    tokens,
    twins,
    whole,
)
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Phi3Config
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import dora_kernels

pytestmark = NEEDS

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_weights(model):
    return {name: whole(p).clone() for name, p in model.named_parameters() if "base_layer" in name}


def saved(folder, *models):
    """What each model's file of the adapter holds."""
    places = [folder / str(i) for i in range(len(models))]
    for place, model in zip(places, models, strict=True):
        model.save_pretrained(place)
    return [load_file(place / "adapter_model.safetensors") for place in places]


def plain_merging(rank, folder):
    """LoRA alone, with biases of its own; also beside DoRA. PEFT alone raises."""
    with_bias = {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}
    for options in ({}, with_bias):
        one, split = twins(folder, use_dora=False, **options)
        handle = dora_kernels.patch_peft(split)
        before, wanted = base_weights(split), logits(one)
        for safe in (False, True):
            for model in (one, split):
                model.merge_adapter(safe_merge=safe)
            agree(base_weights(split), base_weights(one))
            agree(logits(split), wanted)
            for model in (one, split):
                model.unmerge_adapter()
            agree(base_weights(split), before)
        handle.restore()
    with patched():
        one, split = twins(folder)
        before, wanted = base_weights(split), logits(one)
        for model in (one, split):
            model.add_adapter("plain", LoraConfig(r=2, lora_alpha=3, target_modules=list(TARGETS)))
            move(model, ".plain")
            for keep in (True, False):
                dora_kernels.patch_peft(model, keep_unmerged=keep)
                model.merge_adapter(adapter_names=["plain", "default"])
                if keep:
                    model.unmerge_adapter()
        agree(logits(split), logits(one))
        split.unmerge_adapter()
        agree(base_weights(split), before)
        agree(logits(split), wanted)


def broken_in_one_process(rank, folder):
    """A value that is not finite in one process's part: all refuse the merge, and no weight is written."""
    with patched():
        for use_dora in (True, False):
            split = peft_model(folder, True, use_dora=use_dora)
            before = base_weights(split)
            name = "base_model.model.model.layers.0.self_attn.q_proj"
            if rank == 1:
                split.get_submodule(name).lora_B["default"].weight.to_local().data.fill_(torch.nan)
            first = split.get_submodule(name)
            with pytest.raises(ValueError, match="NaNs detected"):
                first.merge(safe_merge=True)
            assert not first.merged_adapters
            agree(base_weights(split), before)


def apart(rank, folder):
    """One process without gradients, in inference mode, in training mode, or with other data: nobody waits."""
    with patched():
        one, split = twins(folder)
        wanted = logits(one)

        def call():
            return split(input_ids=tokens(), use_cache=False).logits.detach()

        for training in (True, False):
            split.train(training)
            for mode in (torch.no_grad, torch.inference_mode):
                for which in (0, 1):
                    if rank == which:
                        with mode():
                            agree(call().clone(), wanted)
                    else:
                        agree(call(), wanted)
            with torch.inference_mode():
                agree(call().clone(), wanted)
        split.train(rank == 0)
        agree(call(), wanted)
        split.train()
        for _ in range(2):
            ids = tokens(rank)
            split(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        split.zero_grad()
        agree(solve(split), solve(one))


def raised_everywhere(rank, folder):
    """After an exception in the middle of a forward, the next one is right."""

    def fail(*_):
        raise ZeroDivisionError

    with patched():
        one, split = twins(folder)
        hook = split.get_submodule("base_model.model.model.layers.1.input_layernorm").register_forward_hook(fail)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                solve(split)
        hook.remove()
        for model in (one, split):
            for name, p in model.named_parameters():
                if "lora_A" in name:
                    p.data.mul_(2)
        agree(solve(split), solve(one))


def options(rank, folder):
    """Other scalings and ranks by layer, biases that train."""
    ranks = {"rank_pattern": {"q_proj": 5, "down_proj": 2, "embed_tokens": 4}, "alpha_pattern": {"o_proj": 7}}
    with patched():
        others = {"bias": "all"}, {"modules_to_save": ["norm"]}, {"target_modules": None}
        for each in ({"use_rslora": True}, ranks, *others):
            one, split = twins(folder, **each)
            agree(solve(split), solve(one))
            agree(*saved(folder / f"options{rank}", split, one))


def unchanged(base, config, match):
    """The configuration is refused, and the model is left as it was."""
    before = [(name, type(module), sorted(vars(module))) for name, module in base.named_modules()]
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, config)
    assert [(name, type(module), sorted(vars(module))) for name, module in base.named_modules()] == before
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags


def refused(rank, folder):
    """By name, and nothing is changed: PEFT alone trains with wrong gradients or not at all, or crashes."""
    if rank == 0:
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 46, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        AutoModelForCausalLM.from_config(Phi3Config(**sizes, **heads, pad_token_id=0)).save_pretrained(folder / "phi3")
    distributed.barrier()
    with patched():
        phi3 = AutoModelForCausalLM.from_pretrained(folder / "phi3", tp_plan="auto")
        llama = base_model(folder, True)
        for use_dora in (False, True):
            for targets in ("all-linear", r".*\.o_proj"):
                config = LoraConfig(use_dora=use_dora, target_modules=targets)
                unchanged(phi3, config, r"model\.layers\.0\.self_attn\.\w+ cannot have an adapter: .*; expected one of")
            for init in ("pissa", "olora", "orthogonal"):
                config = LoraConfig(use_dora=use_dora, target_modules=["k_proj"], init_lora_weights=init)
                unchanged(llama, config, f"init_lora_weights: .* model.layers.0.self_attn.k_proj .* got '{init}'")
            for copied in ("lm_head", "embed_tokens", "mlp"):
                config = LoraConfig(use_dora=use_dora, target_modules=["k_proj"], modules_to_save=[copied])
                unchanged(llama, config, f"modules_to_save: .* that are not tensor-parallel, got .*{copied}")
            for indices in ([3, 4], {"embed_tokens": [3, 4]}):
                config = LoraConfig(use_dora=use_dora, target_modules=["k_proj"], trainable_token_indices=indices)
                unchanged(llama, config, "trainable_token_indices: model.embed_tokens is tensor-parallel")
            config = LoraConfig(use_dora=use_dora, target_modules=[], target_parameters=["o_proj.weight"])
            unchanged(llama, config, "target_parameters: model.layers.0.self_attn.o_proj.weight is tensor-parallel")


def without_tensor_parallelism(rank, folder):
    """A model that transformers has sharded by FSDP2 has a plan for tensor parallelism too, which does not count."""
    with patched():
        base = LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=DistributedConfig(fsdp_size=2))
        assert base.tp_plan["lm_head"] == "colwise_gather_output"
        model = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    assert model.get_base_model().lm_head.lora_A["default"].weight.shape == (8, 32)


def mixture(folder, split, layers=("q_proj", "o_proj"), use_dora=True):
    """Experts that are spread over the processes, in float32, between layers that are split."""
    options = {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)} if split else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "mixture", experts_implementation="eager", **options)
    config = LoraConfig(r=2, lora_alpha=4, use_dora=use_dora, target_modules=list(layers), target_parameters=STACKS)
    return move(get_peft_model(base, config))


def write_mixture(rank, folder):
    if rank == 0:
        qwen3_moe(num_experts=4).save_pretrained(folder / "mixture")
    distributed.barrier()


def near(got, wanted):
    """In float32, relative to the largest element of each tensor."""
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=3e-5 * float(tensor.abs().max()), msg=name)


def spread_experts(rank, folder):
    """Tensor and expert parallelism together; the files are equal."""
    write_mixture(rank, folder)
    with patched():
        for use_dora in (True, False):
            one, split = mixture(folder, False, use_dora=use_dora), mixture(folder, True, use_dora=use_dora)
            near(solve(split), solve(one))
            files = saved(folder / f"mixture{rank}", split, one)
            assert files[0].keys() == files[1].keys()
            near(*files)


def idle_process(rank, folder):
    """All tokens go to the first process's experts: the other takes part in the sums of the gradients all the same."""
    write_mixture(rank, folder)

    def to_the_first(module, args, output):
        logits, scores, chosen = output
        return logits, scores, torch.arange(2).expand_as(chosen).contiguous()

    with patched():
        for use_dora in (True, False):
            one, split = mixture(folder, False, (), use_dora), mixture(folder, True, (), use_dora)
            for model in (one, split):
                for name, module in model.named_modules():
                    if name.endswith("mlp.gate"):
                        module.register_forward_hook(to_the_first)
            near(solve(split), solve(one))


# The last one ends the launch if the processes are out of step.
CHECKS = [
    plain_merging, apart, raised_everywhere, options, refused, without_tensor_parallelism, spread_experts,
    broken_in_one_process, idle_process,
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(CHECKS, tmp_path_factory.mktemp("tensor_parallel_life"))


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_as_in_one_process(outcomes, function):
    errors = [outcome[function.__name__] for outcome in outcomes]
    assert not any(errors), "\n".join(errors)


def experts_under_fsdp2(rank, folder):
    """Two by two processes: experts that are cut by tensor parallelism, sharded by FSDP2 after the adapter is made."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    write_mixture(rank, folder)
    config = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "o_proj"], target_parameters=STACKS)

    def make(split):
        base = AutoModelForCausalLM.from_pretrained(
            folder / "mixture", dtype=torch.float64, experts_implementation="eager"
        )
        if split:
            apply_tensor_parallelism(base, mesh["tp"], base._expand_parallel_plan(base.tp_plan))
            base._device_mesh, base._tp_size, base.config.distributed_config = mesh, 2, DistributedConfig(tp_size=2)
        return base

    def shard(model, blocks):
        for block in blocks:
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(model, mesh=mesh["fsdp"])

    with patched():
        one, split = (
            move(get_peft_model(make(each), config, autocast_adapter_dtype=False)).train() for each in (False, True)
        )
        shard(split, split.get_base_model().model.layers)
        ids = tokens()
        mine = ids.chunk(2)[mesh["fsdp"].get_local_rank()]
        for _ in range(2):
            for model, rows in ((one, ids), (split, mine)):
                model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        grads = [
            {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad} for model in (split, one)
        ]
        near(*grads)
        early = make(True)
        shard(early, early.model.layers)
        with pytest.raises(ValueError, match=r"self_attn\.q_proj .* sharded by FSDP2 already; add the adapter before"):
            get_peft_model(early, config)


@pytest.mark.slow
def test_experts_under_fsdp2(tmp_path):
    errors = [outcome["experts_under_fsdp2"] for outcome in run([experts_under_fsdp2], tmp_path, 4)]
    assert not any(errors), "\n".join(errors)

"""transformers' tensor parallelism in two processes: every result is that of one process.

The checks run in one launch, one after another, in both processes. Each compares a split model with the same model in
one process, in float64 but where it says so.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers.distributed.tensor_parallel")

from experts_models import qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import check
from safetensors.torch import load_file
from tensor_parallel import (
    NEEDS,
    TARGETS,
    VOCAB,
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
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import dora_kernels
from dora_kernels.engine import collectives, model_forward, writes
from dora_kernels.peft import experts as peft_experts
from dora_kernels.peft import shards

pytestmark = NEEDS

ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3}
SPLIT_NORMS = 5
"""Layers whose norm is summed over the processes: o_proj and down_proj of two blocks, and the embedding."""


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A") and "default" in module.scaling]


def lora(rank, folder):
    """Plain LoRA in row-parallel layers, which raises in PEFT alone, before and after."""
    stock = peft_model(folder, True, use_dora=False)
    with pytest.raises(RuntimeError):
        solve(stock)
    handle = dora_kernels.patch_peft(stock)
    one = peft_model(folder, False, use_dora=False)
    agree(solve(stock), solve(one))
    agree(logits(stock), logits(one))
    handle.restore()
    with pytest.raises(RuntimeError):
        solve(stock)
    with patched():
        agree(solve(peft_model(folder, True, use_dora=False)), solve(one))


def gradients(rank, folder):
    """Loss, logits and every gradient; magnitudes are split as the outputs are."""
    with patched() as handle:
        one, split = twins(folder)
        agree(solve(split), solve(one))
        agree(logits(split), logits(one))
        assert not handle.skipped and len(handle.patched) == 2 * 15
    kinds = {
        name.split(".")[-4]: getattr(p, "placements", None)
        for name, p in split.named_parameters()
        if "magnitude" in name
    }
    assert {name for name, placements in kinds.items() if placements is not None} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip


def float32(rank, folder):
    """Within the budget that stock PEFT's errors in one process give."""
    stock = peft_model(folder, False, dtype=torch.float32)
    with patched():
        check(solve, stock, peft_model(folder, True, dtype=torch.float32))


def fresh(rank, folder):
    """A fresh adapter is the identity, to the bit; also one from a file that one process has written."""
    config = LoraConfig(r=3, use_dora=True, target_modules=list(TARGETS))
    get_peft_model(base_model(folder, False, torch.float32), config).save_pretrained(folder / f"fresh{rank}")
    with patched():
        base = base_model(folder, True, torch.float32)
        wanted = logits(base)
        model = get_peft_model(base, config)
        assert torch.equal(logits(model), wanted)
        loaded = PeftModel.from_pretrained(base_model(folder, True, torch.float32), folder / f"fresh{rank}")
        assert torch.equal(logits(loaded), wanted)


def untrained_start(rank, folder):
    """Without PEFT's usual start, factors that every process has are the first one's, and g is 1 all the same."""
    torch.manual_seed(rank)
    with patched():
        model = peft_model(folder, True, moved=False, init_lora_weights=False)
        for name, p in model.named_parameters():
            if "lora_" in name and not hasattr(p, "device_mesh"):
                both = [torch.empty_like(p) for _ in range(2)]
                distributed.all_gather(both, p.detach())
                assert torch.equal(*both), name
        plain = peft_model(folder, True, moved=False, use_dora=False, init_lora_weights=False)
        with torch.no_grad():
            for p, q in zip(plain.parameters(), unmagnified(model), strict=True):
                p.copy_(q)
        agree(logits(model), logits(plain))


def unmagnified(model):
    """The parameters that plain LoRA has too."""
    return [p for name, p in model.named_parameters() if "magnitude" not in name]


def training(rank, folder):
    """Losses, the adapter's file, evaluation; norms are summed once a step, and the processes ask once a forward."""
    with patched(), pytest.MonkeyPatch.context() as patch:
        counts = {"sums": 0, "questions": 0, "layer's questions": 0}

        def counted(owner, attribute, name):
            original = getattr(owner, attribute)

            def call(*args):
                counts[name] += 1
                return original(*args)

            patch.setattr(owner, attribute, call)

        counted(collectives, "all_true", "layer's questions")
        counted(model_forward, "all_true", "questions")
        results = []
        for split in (False, True):
            model = peft_model(folder, split).train()
            if split:
                counted(collectives, "whole_norm", "sums")
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
            losses = []
            for step in range(3):
                for i in range(2):
                    ids = tokens(10 * step + i)
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    loss.backward()
                    losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            results.append({"losses": torch.stack(losses), "after": logits(model), "again": logits(model)})
            model.save_pretrained(folder / f"trained{rank}{split}")
            if not split:
                assert counts == {"sums": 0, "questions": 0, "layer's questions": 0}
        agree(results[1], results[0])
        assert counts == {"sums": 4 * SPLIT_NORMS, "questions": 8, "layer's questions": 0}
    one, split = (folder / f"trained{rank}{split}" for split in (False, True))
    agree(load_file(split / "adapter_model.safetensors"), load_file(one / "adapter_model.safetensors"))
    assert json.loads((split / "adapter_config.json").read_text()) == json.loads(
        (one / "adapter_config.json").read_text()
    )
    # Each loads the other's.
    with patched():
        loaded = PeftModel.from_pretrained(base_model(folder, True), one)
        agree(logits(loaded), results[0]["after"])
    agree(logits(PeftModel.from_pretrained(base_model(folder, False), split)), results[0]["after"])


def one_process_changes(rank, folder):
    """A write to one process's part only: all sum the norm anew. In a model's forward and at a layer's own call."""
    with patched():
        one, split = twins(folder)
        names = "model.layers.0.self_attn.o_proj", "model.embed_tokens"
        for training in (True, False):
            for model in (one, split):
                model.train(training)
            agree(logits(split), logits(one))
            for name in names:
                parts = [model.get_submodule(f"base_model.model.{name}") for model in (one, split)]
                whole_a, split_a = (
                    layer.lora_embedding_A["default"] if "embed" in name else layer.lora_A["default"].weight
                    for layer in parts
                )
                first = split_a.to_local().shape[1] if rank == 0 else whole_a.shape[1] - split_a.to_local().shape[1]
                whole_a.data[:, first:] *= 3
                if rank == 1:
                    split_a.to_local().data.mul_(3)
            agree(logits(split), logits(one))
            x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            for name in names[:1]:
                a, b = (model.get_submodule(f"base_model.model.{name}") for model in (one, split))
                if rank == 1:
                    b.lora_A["default"].weight.to_local().data.mul_(0.5)
                a.lora_A["default"].weight.data[:, 16:] *= 0.5
                agree(b(x.chunk(2, 1)[rank].contiguous()), a(x))
                agree(b(x.chunk(2, 1)[rank].contiguous()), a(x))


def modes(rank, folder):
    """Checkpointing both ways, generation, disabling, strength, frozen norms, several adapters, mixed batches."""
    with patched():
        one, split = twins(folder)
        both = one, split
        for reentrant in (False, True):
            for model in both:
                model.train()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            agree(solve(split), solve(one))
        for model in both:
            model.gradient_checkpointing_disable()
            model.eval()
        options = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "max_new_tokens": 5}
        assert torch.equal(*(model.generate(**options, do_sample=False) for model in both))
        with one.disable_adapter(), split.disable_adapter():
            agree(logits(split), logits(one))
            agree(logits(split), logits(base_model(folder, False)))
        for model in both:
            dora_kernels.set_dora_strength(model, 0.3)
        agree(solve(split), solve(one))
        for model in both:
            dora_kernels.set_dora_strength(model, 1)
        with dora_kernels.frozen_norms(split):
            agree(logits(split), logits(one))
        names = ["default", "__base__"]
        agree(logits(split, adapter_names=names), logits(one, adapter_names=names))
        for model in both:
            model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=list(TARGETS)))
            move(model, ".other")
            model.base_model.set_adapter(["default", "other"])
        agree(solve(split), solve(one))
        for model in both:
            model.set_adapter("other")
        agree(solve(split), solve(one))
        for model in both:
            model.delete_adapter("other")
            model.set_adapter("default")
        agree(solve(split), solve(one))


class Halve(nn.Module):
    """Dropout of which every process knows the outcome."""

    def forward(self, x):
        return 0.5 * x


def modules(rank, folder):
    """Active dropout of both kinds, and hooks on A and B: PEFT's forward calls the modules."""
    with patched():
        one, split = twins(folder)
        for dropout in ("peft", "lora"):
            for model in (one, split):
                dora_kernels.patch_peft(model.train(), dropout=dropout)
                for layer in layers(model):
                    layer.lora_dropout["default"] = Halve()
            agree(solve(split), solve(one))
        calls = []
        for model in (one, split):
            for layer in layers(model):
                layer.lora_dropout["default"] = nn.Identity()
                for part in (layer.lora_A, layer.lora_B):
                    if "default" in part:
                        part["default"].register_forward_hook(lambda *_: calls.append(1))
        agree(solve(split), solve(one))
        assert len(calls) == 2 * 2 * 14


def compiled(rank, folder):
    """Split layers run between the graphs."""
    with patched():
        one, split = twins(folder)
        model = torch.compile(split, backend="eager")
        results = solve(model)
        agree({name.removeprefix("_orig_mod."): t for name, t in results.items()}, solve(one))
        agree(logits(model), logits(one))


def merging(rank, folder):
    """Merged weights, whole, and the very bits again; several adapters; arithmetic where no copy was kept."""
    with patched():
        one, split = twins(folder)
        before = {name: whole(p).clone() for name, p in split.named_parameters() if "base_layer" in name}
        wanted = logits(one)
        for safe in (False, True):
            for model in (one, split):
                model.merge_adapter(safe_merge=safe)
            merged = {name: whole(p) for name, p in split.named_parameters() if name in before}
            agree(merged, {name: p.detach() for name, p in one.named_parameters() if name in before})
            agree(logits(split), wanted)
            for model in (one, split):
                model.unmerge_adapter()
            assert all(torch.equal(whole(p), before[name]) for name, p in split.named_parameters() if name in before)
            agree(logits(split), wanted)
        for model in (one, split):
            model.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=list(TARGETS)))
            move(model, ".other")
            model.base_model.set_adapter(["default", "other"])
            dora_kernels.patch_peft(model, keep_unmerged=False)
            model.merge_adapter()
        agree(logits(split), logits(one))
        split.unmerge_adapter()
        after = {name: whole(p) for name, p in split.named_parameters() if name in before}
        agree(after, before)
        broken = split.get_submodule("base_model.model.model.layers.1.mlp.down_proj").lora_B["default"].weight
        broken.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="NaNs"):
            split.merge_adapter(safe_merge=True)


def mixture(folder, split, use_dora=True, moved=True):
    options = {"tp_plan": "auto"} if split else {}
    base = AutoModelForCausalLM.from_pretrained(
        folder / "mixture", dtype=torch.float64, experts_implementation="eager", **options
    )
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, use_dora=use_dora, target_modules=["o_proj"], target_parameters=names)
    model = get_peft_model(base.eval(), config, autocast_adapter_dtype=False)
    return move(model) if moved else model


def experts(rank, folder):
    """A mixture of experts: LoRA and DoRA on its stacks, of which each process has some rows or columns."""
    sizes = {"num_hidden_layers": 1, "moe_intermediate_size": 12, "num_experts": 4}
    qwen3_moe(**sizes).save_pretrained(folder / "mixture")  # which the first process writes
    distributed.barrier()
    torch.manual_seed(rank)
    with patched(), pytest.MonkeyPatch.context() as patch:
        plain = mixture(folder, True, use_dora=False)
        agree(solve(plain), solve(mixture(folder, False, use_dora=False)))
        fresh = mixture(folder, True, moved=False)
        with fresh.disable_adapter():
            wanted = logits(fresh)
        assert torch.equal(logits(fresh), wanted)
        one, split = mixture(folder, False), mixture(folder, True)
        agree(solve(split), solve(one))
        sums, whole_norm = [], collectives.whole_norm
        for owner in (collectives, peft_experts):
            patch.setattr(owner, "whole_norm", lambda *args: sums.append(1) or whole_norm(*args))
        agree(logits(split), logits(one))
        agree(solve(split.train()), solve(one.train()))
        assert not sums, "the norm was not kept"
        name = "base_model.model.model.layers.0.mlp.experts"
        for model in (one, split):
            down = model.get_submodule(name).get_base_layer()._parameters["down_proj"]
            if model is one:
                down.data[:, :, 6:] *= 2
                dora_kernels.invalidate(one)  # the sample of W misses these columns
            elif rank == 1:
                down.to_local().data.mul_(2)
        agree(logits(split), logits(one))
        assert len(sums) == 1
        before = logits(one)
        for model in (one, split):
            model.merge_adapter()
        agree(logits(split), before)
        for model in (one, split):
            model.unmerge_adapter()
        agree(logits(split), before)
        one.save_pretrained(folder / f"mixture{rank}one")
        split.save_pretrained(folder / f"mixture{rank}split")
        files = [load_file(folder / f"mixture{rank}{kind}" / "adapter_model.safetensors") for kind in ("one", "split")]
        agree(*files)
        with pytest.raises(ValueError, match="split over processes"):
            split.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")


def transposed_experts(rank, folder):
    """Llama 4's stacks are ``[experts, in, out]``, so its plan has rows and columns exchanged.

    It works in float32 in places whatever the model's dtype. With gradients transformers 5.23 raises in its own sum
    over experts, which is in place, unless the shared expert has an adapter.
    """
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 12, "intermediate_size_mlp": 24,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    base = Llama4ForCausalLM(Llama4TextConfig(**sizes))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    base.save_pretrained(folder / "llama4")  # which the first process writes
    distributed.barrier()
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    layers = ["shared_expert.down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=layers, target_parameters=names)
    models = []
    with patched():
        for options in ({}, {"tp_plan": "auto"}):
            base = Llama4ForCausalLM.from_pretrained(folder / "llama4", dtype=torch.float64, **options)
            models.append(move(get_peft_model(base.eval(), config, autocast_adapter_dtype=False)))
        one, split = map(logits, models)
        trained = [solve(model) for model in models]
        with models[0].disable_adapter():
            assert (logits(models[0]) - one).abs().max() > 1e-2
    stack = models[1].get_base_model().model.layers[0].feed_forward.experts.get_base_layer()._parameters["down_proj"]
    assert stack.to_local().shape == (4, 6, 32)
    split, one = {**trained[1], "logits": split}, {**trained[0], "logits": one}
    for name, wanted in one.items():
        torch.testing.assert_close(split[name], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()), msg=name)


def exact_start(rank, folder):
    """`exact_init` makes a fresh adapter of bfloat16 layers the identity, and `restore` puts its magnitudes back."""
    with patched():
        base = base_model(folder, True, torch.bfloat16)
        wanted = logits(base)
        model = get_peft_model(base, LoraConfig(r=3, use_dora=True, target_modules=list(TARGETS)))
        before = {name: whole(p).clone() for name, p in model.named_parameters() if "magnitude" in name}
        assert not torch.equal(logits(model), wanted)
        handle = dora_kernels.patch_peft(model, exact_init=True)
        assert len(handle.rewritten) == len(before) and torch.equal(logits(model), wanted)
        handle.restore()
        assert all(torch.equal(whole(p), before[n]) for n, p in model.named_parameters() if n in before)


def refused(rank, folder):
    """By name, and nothing is changed."""
    with patched():
        for use_dora in (False, True):
            base = base_model(folder, True)
            wanted, names = logits(base), [name for name, _ in base.named_modules()]
            with pytest.raises(ValueError, match="lm_head cannot have an adapter.*'colwise_gather_output'"):
                get_peft_model(base, LoraConfig(use_dora=use_dora, target_modules=["q_proj", "lm_head"]))
            assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), wanted)
        with pytest.raises(ValueError, match="sharded; adapt the model before sharding it, or use PEFT"):
            dora_kernels.apply_dora(base)
        model = peft_model(folder, True)
        with pytest.raises(ValueError, match=r"embed_tokens: the layer is split over processes"):
            model.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")
        assert list(model.peft_config) == ["default"]
        with pytest.raises(ValueError, match="expected 'composed', since .*q_proj is tensor-parallel"):
            dora_kernels.patch_peft(model, forward="merged")


def restored(rank, folder):
    """Afterwards PEFT refuses DoRA as before."""
    with patched():
        pass
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        peft_model(folder, True)


CHECKS = [
    lora, gradients, float32, fresh, untrained_start, training, one_process_changes, modes, modules, compiled,
    merging, experts, transposed_experts, exact_start, refused, restored,
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run(CHECKS, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_as_in_one_process(outcomes, function):
    errors = [outcome[function.__name__] for outcome in outcomes]
    assert not any(errors), "\n".join(errors)


def with_fsdp2(rank, folder):
    """Two by two processes: inside a block's forward its parameters are split by tensor parallelism alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    targets = [name for name in TARGETS if name != "embed_tokens"]  # FSDP2 refuses PEFT's strided factor there
    config = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets)
    with patched():
        base = base_model(folder, False)
        apply_tensor_parallelism(base, mesh["tp"], base._expand_parallel_plan(base.tp_plan))
        base._device_mesh, base._tp_size, base.config.distributed_config = mesh, 2, DistributedConfig(tp_size=2)
        one, split = (
            move(get_peft_model(each, config, autocast_adapter_dtype=False)).train()
            for each in (base_model(folder, False), base)
        )
        for block in split.get_submodule("base_model.model.model.layers"):
            fully_shard(block, mesh=mesh["fsdp"])
        fully_shard(split, mesh=mesh["fsdp"])
        optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], **ADAM) for m in (one, split)]
        for step in range(2):
            for i in range(2):
                ids = tokens(10 * step + i)
                wanted = one(input_ids=ids, labels=ids, use_cache=False).loss
                ids = ids.chunk(2)[mesh["fsdp"].get_local_rank()]
                loss = split(input_ids=ids, labels=ids, use_cache=False).loss
                for each in (wanted, loss):
                    each.backward()
                mean = loss.detach() / 2
                distributed.all_reduce(mean, group=mesh["fsdp"].get_group())
                torch.testing.assert_close(mean, wanted.detach())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)  # the loss is float32
        close(logits(split.eval()), logits(one.eval()))
        close({n: whole(p) for n, p in split.named_parameters()}, {n: p.detach() for n, p in one.named_parameters()})


def test_a_part_belongs_to_its_parameters_optimizer():
    """Where tensors are not compared, a kept norm needs the proof that only a watched optimizer writes them."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        split, other = (nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])) for _ in range(2))
        writes.watch_optimizers()
        optimizer = torch.optim.SGD([split])
        split.sum().backward()
        optimizer.step()
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                assert writes.owned(shards.part(split))
                assert not writes.owned(shards.part(split), shards.part(other))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_with_fsdp2(tmp_path):
    errors = [outcome["with_fsdp2"] for outcome in run([with_fsdp2], tmp_path, 4)]
    assert not any(errors), "\n".join(errors)

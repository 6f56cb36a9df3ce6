"""DoRA on experts in two processes: every wrapper trains to the losses and the file of one process."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest
import torch
from experts_models import qwen3_moe
from peft import LoraConfig, get_peft_model
from processes import FORKSERVER, GLOO
from safetensors.torch import load_file
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

import dora_kernels

pytestmark = [pytest.mark.slow, GLOO, FORKSERVER]

RANKS, STEPS, ROWS, TOKENS = 2, 4, 2, 9
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


def tokens(step):
    return torch.randint(0, 64, (RANKS * ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def adapted(model, rank=0, experts_alone=False):
    torch.manual_seed(3 + rank)
    config = LoraConfig(
        use_dora=True, r=4, lora_alpha=8, target_modules=[] if experts_alone else ["q_proj"],
        target_parameters=TARGETS[:2] if experts_alone else TARGETS,
    )  # fmt: skip
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def train(call, model, rows, scale=1.0, step=lambda: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-3)
    losses = []
    for number in range(STEPS):
        batch = tokens(number)[rows]
        loss = call(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ddp(rank, path):
    model = adapted(qwen3_moe())
    wrapped = DistributedDataParallel(model)
    return train(wrapped, model, slice(rank * ROWS, (rank + 1) * ROWS)), model, None


def fsdp2(rank, path):
    model = adapted(qwen3_moe())
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, model, slice(rank * ROWS, (rank + 1) * ROWS))
    return losses, model, {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}


def expert_parallel(rank, path):
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(path / "base")
    config.base_model_tp_plan = {"norm": "replicate"}  # an empty one is refused
    base = AutoModelForCausalLM.from_pretrained(
        path / "base", config=config, distributed_config=DistributedConfig(tp_size=RANKS, ep_size=RANKS),
        experts_implementation="grouped_mm",
    )  # fmt: skip
    assert base.model.layers[0].mlp.experts.num_experts == 3
    model = adapted(base, rank, experts_alone=True)  # first values differ between the processes
    return train(model, model, slice(None)), model, None  # both processes have the whole batch


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2, "expert_parallel": expert_parallel}


def in_process(rank, wrapper, path):
    torch.set_num_threads(1)
    dora_kernels.patch_peft_globally()
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=RANKS)
    losses, model, whole = WRAPPERS[wrapper](rank, path)
    # All processes: under expert parallelism saving is one gathering for all.
    model.save_pretrained(path / ("out" if rank == 0 else f"out_{rank}"), state_dict=whole)
    torch.save(losses, path / f"losses_{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(wrapper, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("MASTER_PORT", str(29500 + os.getpid() % 400))
    qwen3_moe().save_pretrained(tmp_path / "base")
    multiprocessing.start_processes(
        in_process, (wrapper, pathlib.Path(tmp_path)), nprocs=RANKS, start_method="forkserver"
    )
    handle = dora_kernels.patch_peft_globally()
    try:
        alone = adapted(qwen3_moe(), experts_alone=wrapper == "expert_parallel")
        expected = train(alone, alone, slice(None))
        alone.save_pretrained(tmp_path / "alone")
    finally:
        handle.restore()
    per_rank = [torch.load(tmp_path / f"losses_{rank}.pt") for rank in range(RANKS)]
    losses = [sum(each) / RANKS for each in zip(*per_rank)]
    assert losses == pytest.approx(expected, rel=1e-5)
    one, two = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("out", "alone"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")

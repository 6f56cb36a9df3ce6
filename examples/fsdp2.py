"""Fine-tune a causal language model with DoRA, sharded by FSDP2 over the GPUs of one machine or several.

    torchrun --nproc-per-node 8 examples/fsdp2.py --model M --data texts.txt --out adapter
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 examples/fsdp2.py ...   (on each machine)
    accelerate launch --num_processes 8 examples/fsdp2.py --model M --data texts.txt --out adapter
"""

from __future__ import annotations

import os

import common
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import dora_kernels


def main() -> None:
    options = common.parser(__doc__.splitlines()[0]).parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if gpu else torch.float32)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, use_dora=True, target_modules="all-linear")
    torch.manual_seed(0)  # the same adapter in every process
    # One dtype for a shard: PEFT's float32 adapters would not fit a bfloat16 base.
    model = get_peft_model(model, config, autocast_adapter_dtype=False).to(device)
    dora_kernels.patch_peft(model)  # before sharding
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "Block")):
            fully_shard(module)
    fully_shard(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    batches = common.batches(tokenizer, common.lines(options.data), options.batch, options.length, rank, world)
    for step in range(1, options.steps + 1):
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step == options.steps):
            print(f"step {step}: loss {loss.item() / world:.4f}")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # alone: it must not look at a sharded tensor, as it does to see whether embeddings have changed
        model.save_pretrained(options.out, state_dict=state, save_embedding_layers=False)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

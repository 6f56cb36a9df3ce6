"""A tiny Llama under transformers' tensor parallelism, in two processes, beside the same model in one."""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, import_utils
from processes import FORKSERVER, GLOO
from torch import Tensor, distributed, multiprocessing, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_kernels

NEEDS = [
    GLOO,
    pytest.mark.skipif(
        not getattr(import_utils, "is_transformers_dtensor_tp", False), reason="PEFT knows no such parallelism"
    ),
    FORKSERVER,
]
"""The `pytestmark` of tests that run it."""

VOCAB = 61
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]


def write_base(folder: Path) -> None:
    """Vocabulary and intermediate size are odd, so the processes' parts differ in size; some layers have a bias."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def base_model(folder: Path, split: bool, dtype: torch.dtype = torch.float64) -> Any:
    options = {"tp_plan": "auto"} if split else {}
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype, **options).eval()


def peft_model(
    folder: Path, split: bool, dtype: torch.dtype = torch.float64, moved: bool = True, **options: Any
) -> Any:
    """With an adapter that is the same in all processes and in one, if it is `moved`."""
    values = {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": list(TARGETS), **options}
    model = get_peft_model(base_model(folder, split, dtype), LoraConfig(**values), autocast_adapter_dtype=False)
    return move(model) if moved else model


@contextlib.contextmanager
def patched() -> Iterator[Any]:
    handle = dora_kernels.patch_peft_globally()
    try:
        yield handle
    finally:
        handle.restore()


def twins(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model in one process and the split one."""
    return peft_model(folder, False, **options), peft_model(folder, True, **options)


def whole(tensor: Any) -> Tensor:
    """All processes' parts together."""
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result.detach()


@torch.no_grad()
def move(model: nn.Module, part: str = "lora_") -> Any:
    """Give the adapter's parameters values that depend on their names only; magnitudes keep their size."""
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in model.named_parameters():
        if part not in name or "lora_" not in name:
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        value = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if "magnitude" in name:
            value = whole(parameter) * (1 + value)
        if hasattr(parameter, "device_mesh"):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def solve(model: nn.Module, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Loss, logits and every gradient, whole."""
    model.zero_grad(set_to_none=True)
    ids = tokens() if ids is None else ids
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **grads}


@torch.no_grad()
def logits(model: nn.Module, **options: Any) -> Tensor:
    result: Tensor = model(input_ids=tokens(), use_cache=False, **options).logits
    return result


def agree(got: Any, wanted: Any) -> None:
    """In float64: far above its rounding, far below any mistake."""
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def _in_group(rank: int, checks: list[Any], folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()})  # the process ends with this
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    outcomes = {}
    try:
        for check in checks:
            try:
                check(rank, folder)
                outcomes[check.__name__] = ""
            except Exception:
                outcomes[check.__name__] = traceback.format_exc()
            torch.save(outcomes, folder / f"{rank}.pt")
            distributed.barrier()
    finally:
        distributed.destroy_process_group()


def run(checks: list[Any], folder: Path, ranks: int = 2) -> list[dict[str, str]]:
    """Run all checks in `ranks` processes, in one launch; return each process's errors by check."""
    write_base(folder / "base")
    multiprocessing.set_forkserver_preload(["peft", "transformers.models.llama.modeling_llama"])  # slow to import
    context: Any = multiprocessing.start_processes(
        _in_group, (checks, folder, ranks), nprocs=ranks, join=False, start_method="forkserver"
    )
    try:
        while not context.join():
            pass
    except Exception as error:  # what ran until then is in the files
        print(error)
    missing = dict.fromkeys((check.__name__ for check in checks), "did not run")
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [{**missing, **(torch.load(file) if file.exists() else {})} for file in files]

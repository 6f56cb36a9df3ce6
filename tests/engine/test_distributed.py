"""Training in two processes: the kept norm is never stale, and what is learned is what stock PEFT learns in one.

Each worker returns its results to the test, and asserts at every forward that they have the very bits of those with a
norm computed afresh.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft_models import counted, kept_norms, move_adapter
from processes import FORKSERVER
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dora_kernels import patch_peft
from dora_kernels.engine import blocked
from dora_kernels.engine.norm_cache import set_norm_reuse

pytestmark = FORKSERVER

RANKS, STEPS, MICRO_BATCHES, ROWS, WIDTH, LAYERS, EVALUATIONS = 2, 4, 3, 4, 12, 5, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.blocks(x))


def stock_model(seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=["up", "down", "head"])
    return move_adapter(get_peft_model(Blocks(), config), seed=seed)


def optimizer_of(model):
    """Fused, which moves no version."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)


def inputs(step, i):
    """A micro-batch of all ranks together."""
    return torch.randn(RANKS * ROWS, WIDTH, generator=torch.Generator().manual_seed(100 * step + i))


def loss_of(y):
    return (y - 1).square().mean()


def train_stock(between_steps=lambda model: None):
    """One process, stock PEFT, on all ranks' rows."""
    model = stock_model()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for i in range(MICRO_BATCHES):
            loss_of(model(inputs(step, i))).backward()
        optimizer.step()
        optimizer.zero_grad()
        between_steps(model)
    return {name: p.detach() for name, p in model.named_parameters()}


def checked(model, x):
    """The result with kept norms, which must be that with norms computed afresh."""
    set_norm_reuse(False)
    try:
        fresh = model(x)
    finally:
        set_norm_reuse(True)
    kept = model(x)
    assert torch.equal(kept, fresh), "a stale norm"
    return kept


def train(rank, model, between_steps=lambda model: None):
    """This rank's part of `train_stock`."""
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for i in range(MICRO_BATCHES):
            with synchronised(model, i == MICRO_BATCHES - 1):
                loss_of(checked(model, inputs(step, i).chunk(RANKS)[rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
        between_steps(model)


@contextlib.contextmanager
def synchronised(model, last):
    """Gradients are exchanged in the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(last)
        yield


def in_group(rank, worker, folder, options):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for of in ("ELEMENTS", "FEATURES"):  # as with large weights, whose |W|² is kept too
                patch.setattr(blocked, f"_FACTORED_{of}", 0)
            torch.save(worker(rank, **options), folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def run(worker, folder, **options):
    """What `worker` returns in each of two processes."""
    multiprocessing.set_forkserver_preload(["peft"])  # whose import takes longer than any test here
    multiprocessing.start_processes(in_group, (worker, folder, options), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def ddp_worker(rank):
    model = stock_model(seed=rank)
    patch_peft(model)
    checked(model, inputs(0, 0))
    model = DistributedDataParallel(model)  # gives every rank the first one's weights
    train(rank, model)
    counts = [(cache.computed, cache.reused) for cache in kept_norms(model)]
    return {name: p.detach() for name, p in model.module.named_parameters()}, counts


def test_ddp(tmp_path):
    wanted = train_stock()
    forwards = 1 + STEPS * MICRO_BATCHES
    for parameters, counts in run(ddp_worker, tmp_path):
        torch.testing.assert_close(parameters, wanted)
        # One for each step and one before the first, besides those computed afresh to compare.
        assert counts == [(forwards + 1 + STEPS, forwards - 1 - STEPS)] * LAYERS


PARTS = ("none", "base_layer", "lora_")


def shrink(model, part):
    """Through a state dict, whole or sharded, which moves no version of a gathered parameter."""
    with torch.no_grad():
        model.load_state_dict({name: 0.9 * t if part in name else t for name, t in model.state_dict().items()})


def shrink_all(model):
    for part in PARTS:
        shrink(model, part)


@contextlib.contextmanager
def memory_never_freed():
    """Parameters are gathered at the same address each time, as an allocator may well decide."""
    resize = torch.UntypedStorage.resize_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", lambda storage, size: size and resize(storage, size))
        yield


def fsdp_worker(rank, reshard_after_forward, same_address):
    model = stock_model()
    patch_peft(model)
    options = {"mesh": init_device_mesh("cpu", (RANKS,)), "reshard_after_forward": reshard_after_forward}
    for block in model.get_submodule("base_model.model.blocks"):
        fully_shard(block, **options)
    fully_shard(model, **options)

    def shrink_and_evaluate(model):
        model.eval()
        with torch.no_grad():
            for part in PARTS:
                shrink(model, part)
                for _ in range(EVALUATIONS):
                    checked(model, inputs(0, 0))
        model.train()

    memory = memory_never_freed() if same_address else contextlib.nullcontext()
    with pytest.MonkeyPatch.context() as patch, counted(patch) as calls, memory:
        train(rank, model, shrink_and_evaluate)
    counts = [(cache.computed, cache.reused) for cache in kept_norms(model)]
    return {name: t.full_tensor() for name, t in model.state_dict().items()}, counts, calls


@pytest.mark.parametrize("same_address", [False, True], ids=["", "same-address"])
@pytest.mark.parametrize("reshard_after_forward", [True, False], ids=["reshard", "keep"])
def test_fsdp2(tmp_path, reshard_after_forward, same_address):
    """Inside a block's forward its parameters are plain tensors, so whole layers run on this package."""
    wanted = train_stock(shrink_all)
    forwards = STEPS * (MICRO_BATCHES + len(PARTS) * EVALUATIONS)
    options = {"reshard_after_forward": reshard_after_forward, "same_address": same_address}
    for parameters, counts, calls in run(fsdp_worker, tmp_path, **options):
        torch.testing.assert_close(parameters, wanted)
        assert calls == {"layer": 2 * LAYERS * forwards, "norm": 0}, "PEFT's own forward ran"
        assert {computed + reused for computed, reused in counts} == {2 * forwards}
        if same_address:  # one at the start, after each step and each loading of other numbers; otherwise it is chance
            assert {reused for _, reused in counts} == {forwards - 1 - STEPS * len(PARTS)}

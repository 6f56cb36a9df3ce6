"""Patched language models under DDP, FSDP and DeepSpeed, two processes, beside stock PEFT in one.

Every wrapper goes through one programme: steps of several micro-batches and an evaluation, with somebody's
hooks on two of the layers; at the end the adapter's file is written. The losses and the file have to be those of one
process with the stock model on both ranks' rows. Offloading by accelerate, under which the patched model raises as the
stock one does, is in test_peft_order.py.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import pathlib
import sys
import tempfile

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.utils.other import fsdp_auto_wrap_policy
from peft_models import VOCAB, base_model, counted, peft_model, toy
from processes import FORKSERVER, GLOO
from safetensors.torch import load_file
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel

from dora_kernels import patch_peft, set_dora_strength

pytestmark = [GLOO, FORKSERVER]

RANKS, STEPS, MICRO_BATCHES, ROWS, TOKENS, EVALUATIONS = 2, 4, 2, 2, 9, 2
# After one step only: what is computed anew for an evaluation would hide what a step has made stale.
EVALUATED = 1
FORWARDS = STEPS * MICRO_BATCHES + EVALUATIONS
LAYERS = 14
# Of small gradients an `eps` of this size leaves the size: Adam's usual one would make rounding errors into steps.
ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}
HOOKED = {"layers.0.self_attn.q_proj": ("base_layer", "lora_A.default"), "layers.1.mlp.down_proj": ("lora_A.default",)}
# How often this package is reached: as whole layers, and for the norm alone where there are hooks.
WHOLE = {"layer": (LAYERS - len(HOOKED)) * FORWARDS, "norm": len(HOOKED) * FORWARDS}
STOCK = {"layer": 0, "norm": 0}


def tokens(step, i):
    """A micro-batch of all ranks together."""
    generator = torch.Generator().manual_seed(100 * step + i)
    return torch.randint(3, VOCAB, (RANKS * ROWS, TOKENS), generator=generator)


def listen(model):
    """Hooks of somebody's, and the list in which they note their calls."""
    calls = []
    for layer, parts in HOOKED.items():
        for part in parts:
            name = f"{layer}.{part}"
            module = model.get_submodule(f"base_model.model.model.{name}")
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


class Plain:
    """One process, no wrapper. The others differ in how they wrap, in what a step is, and in how they write a file."""

    reached = WHOLE
    memory = staticmethod(contextlib.nullcontext)

    def __init__(self, model):
        self.peft = model
        self.model = self.wrap(model)
        self.optimizer = self.optimizer_of()

    def wrap(self, model):
        return model

    def optimizer_of(self):
        """Fused, which moves no version."""
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True, **ADAM)

    def synchronised(self, last):
        """Gradients are exchanged in the last micro-batch of a step only."""
        return contextlib.nullcontext()

    def backward(self, loss, last):
        (loss / MICRO_BATCHES).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder):
        self.peft.save_pretrained(folder)


class Ddp(Plain):
    wrap = staticmethod(DistributedDataParallel)

    def synchronised(self, last):
        return contextlib.nullcontext() if last else self.model.no_sync()


class Fsdp2(Plain):
    """Inside a decoder layer's forward its parameters are plain tensors."""

    reshard_after_forward = True

    def wrap(self, model):
        options = {"mesh": init_device_mesh("cpu", (RANKS,)), "reshard_after_forward": self.reshard_after_forward}
        for layer in model.get_submodule("base_model.model.model.layers"):
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    def synchronised(self, last):
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def save(self, folder):
        full = {name: t.full_tensor() for name, t in self.model.state_dict().items()}
        self.peft.save_pretrained(folder, state_dict=full)


class Fsdp2Kept(Fsdp2):
    reshard_after_forward = False


class Fsdp2InPlace(Fsdp2):
    """Parameters are gathered at the same address each time, as an allocator may well decide."""

    @contextlib.contextmanager
    def memory(self):
        resize = torch.UntypedStorage.resize_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.UntypedStorage, "resize_", lambda storage, size: size and resize(storage, size))
            yield


class Fsdp1(Plain):
    """PEFT's policy wraps every A, B and magnitude, which are empty but in their own forward: PEFT's code runs.

    Which calls A a second time, for its weight.
    """

    reached = STOCK

    def wrap(self, model):
        policy = fsdp_auto_wrap_policy(model)
        return FSDP(model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu"))

    def synchronised(self, last):
        return contextlib.nullcontext() if last else self.model.no_sync()

    def save(self, folder):
        """By a model of no wrappers: with them PEFT 0.21 finds none of the names, and writes an empty file."""
        with FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)):
            full = self.model.state_dict()
        peft_model().save_pretrained(folder, state_dict=full)


class Zero2(Plain):
    """DeepSpeed moves what trains into one buffer, and writes there after each step, which moves no version."""

    stage = 2

    def wrap(self, model):
        import deepspeed

        # Would compile for half a minute; gloo does without. (As an attribute `deepspeed.comm.torch` is torch itself.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        settings = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": False},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, model_parameters=trained, config=settings)[0]

    def optimizer_of(self):
        return self.model.optimizer

    def backward(self, loss, last):
        self.model.backward(loss)
        self.model.step()


class Zero3(Zero2):
    """Parameters are empty but in their own module's forward: PEFT's code runs, as under FSDP1."""

    stage, reached = 3, STOCK

    def save(self, folder):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.peft.parameters())):
            self.peft.save_pretrained(folder)


def programme(wrapper, rank=0, ranks=1):
    """The losses of all forwards, the hooks' calls and the adapter's file."""
    calls = listen(wrapper.peft)
    losses = []

    def forward(step, i):
        ids = tokens(step, i).chunk(ranks)[rank]
        loss = wrapper.model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.detach())
        return loss

    for step in range(STEPS):
        wrapper.model.train()
        for i in range(MICRO_BATCHES):
            last = i == MICRO_BATCHES - 1
            with wrapper.synchronised(last):
                wrapper.backward(forward(step, i), last)
        if step == EVALUATED:
            wrapper.model.eval()
            with torch.no_grad():
                for i in range(EVALUATIONS):
                    forward(step, i)
    with tempfile.TemporaryDirectory() as folder:
        wrapper.save(folder)
        return {"losses": torch.stack(losses), "calls": collections.Counter(calls), "saved": read_adapter(folder)}


def expected_calls(of_A):
    """One a forward of each base layer; `of_A` of each A."""
    names = [f"{layer}.{part}" for layer, parts in HOOKED.items() for part in parts]
    return {name: FORWARDS * (of_A if "lora_A" in name else 1) for name in names}


@torch.no_grad()
def switched_off(wrapper, rank):
    """The loss at strength 0, also where PEFT's code runs."""
    set_dora_strength(wrapper.model, 0)
    ids = tokens(0, 0).chunk(RANKS)[rank]
    wrapper.model.eval()
    return wrapper.model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def loss_of_base():
    ids = tokens(0, 0)
    return base_model("llama").eval()(input_ids=ids, labels=ids).loss


def read_adapter(folder):
    return {name: t.clone() for name, t in load_file(pathlib.Path(folder) / "adapter_model.safetensors").items()}


@functools.cache
def wanted():
    """Of one process and the stock model."""
    return programme(Plain(peft_model()))


def in_group(rank, kind, late, folder):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS, "DS_ACCELERATOR": "cpu"}
    os.environ.update({name: str(value) for name, value in place.items()})  # the process ends with this
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        model = peft_model()
        if not late:
            assert not patch_peft(model).skipped
        wrapper = kind(model)
        if late:
            patch_peft(wrapper.model)
        with pytest.MonkeyPatch.context() as patch, counted(patch) as reached, wrapper.memory():
            results = programme(wrapper, rank, RANKS)
        results["off"] = switched_off(wrapper, rank)
        torch.save({**results, "reached": reached}, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def run(*arguments, folder):
    """What each of two processes returns."""
    multiprocessing.set_forkserver_preload(["peft", "transformers.models.llama.modeling_llama"])  # slow to import
    multiprocessing.start_processes(in_group, (*arguments, folder), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


EARLY = (Ddp, Fsdp2, Fsdp2Kept, Fsdp2InPlace, Fsdp1, Zero2, Zero3)
LATE = (Fsdp2, Fsdp1, Zero3)  # where patching meets what is no whole tensor


@pytest.mark.parametrize(
    ("kind", "late"),
    [(kind, False) for kind in EARLY] + [(kind, True) for kind in LATE],
    ids=lambda value: ("early", "late")[value] if isinstance(value, bool) else value.__name__.lower(),
)
def test_two_processes_are_one(tmp_path, kind, late):
    """Losses, hooks, the adapter's file, and how much of it ran on this package; patched before or after wrapping."""
    if issubclass(kind, Zero2):
        pytest.importorskip("deepspeed")
    results = run(kind, late, folder=tmp_path)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(torch.stack([result["losses"] for result in results]).mean(0), wanted()["losses"])
    close(torch.stack([result["off"] for result in results]).mean(), loss_of_base())
    for result in results:
        assert result["calls"] == expected_calls(1)
        assert result["reached"] == kind.reached
        close(result["saved"], wanted()["saved"])


def test_the_programme():
    """What the others are measured by: stock PEFT learns, and calls A twice."""
    assert wanted()["calls"] == expected_calls(2)
    with tempfile.TemporaryDirectory() as folder:
        peft_model().save_pretrained(folder)
        before = read_adapter(folder)
    assert before.keys() == wanted()["saved"].keys() and len(before) == 3 * LAYERS
    assert all((wanted()["saved"][name] - t).abs().max() > 0.01 for name, t in before.items())


@pytest.mark.parametrize("name", ["first", "conv", "embedding"])
def test_strength_where_peft_runs(name):
    """A hook on the magnitude has PEFT's code run on each kind of layer, as sharding does."""
    model = toy(others=True).eval()
    patch_peft(model)
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    x = {"first": torch.randn(4, 12), "conv": torch.randn(2, 1, 5, 5), "embedding": torch.arange(6)}[name]
    base, dora = layer.base_layer(x), layer(x)
    assert not torch.allclose(base, dora)
    set_dora_strength(model, 0.25)
    torch.testing.assert_close(layer(x), torch.lerp(base, dora, 0.25))
    set_dora_strength(model, 0)
    torch.testing.assert_close(layer(x), base)

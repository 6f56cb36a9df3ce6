"""Patching in any order with what else takes hold of a model: hooks, accelerate, Trainer, torch.compile."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState, PartialState
from helpers import same_bits
from peft_models import (
    FIRST,
    SECOND,
    agree,
    batch,
    check_parity,
    counted,
    lora_layers,
    one_thread,  # noqa: F401
    parts,
    toy,
    toy_input,
    toy_solve,
    toy_twins,
    twins,
)

import dora_kernels
from dora_kernels.peft.linear import DoraLinear

with_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_accelerates_hook_before_the_patch():
    """The layer's forward is the hook's by then: it is left alone, and the handle says why."""
    stock = toy()
    ours = copy.deepcopy(stock)
    hook = Counting()
    add_hook_to_module(ours.base_model.model.first, hook)
    handle = dora_kernels.patch_peft(ours)
    assert handle.patched == [SECOND]
    assert "forward was replaced (by a hook of accelerate, for example)" in handle.skipped[FIRST]
    agree(stock, ours)
    assert hook.calls == 1
    remove_hook_from_module(ours.base_model.model.first)
    handle.restore()
    agree(stock, ours)


def test_accelerates_hook_on_every_layer_before_the_patch():
    model = toy()
    for layer in lora_layers(model):
        add_hook_to_module(layer, Counting())
    with pytest.raises(
        ValueError, match="none of its 2 DoRA layers is supported; .*first: its forward was replaced"
    ):
        dora_kernels.patch_peft(model)


def test_accelerates_hook_after_the_patch(monkeypatch):
    stock, ours, handle = toy_twins()
    hook = Counting()
    add_hook_to_module(ours.base_model.model.first, hook)
    with counted(monkeypatch) as counts:
        agree(stock, ours)
    assert hook.calls == 1 and counts["layer"] == 2 and handle.patched == [FIRST, SECOND]
    handle.restore()
    with counted(monkeypatch) as counts:
        assert same_bits(toy_solve(ours), toy_solve(stock))
    assert hook.calls == 2 and sum(counts.values()) == 0
    remove_hook_from_module(ours.base_model.model.first)
    agree(stock, ours)


@with_dropout
@pytest.mark.parametrize("part", ["base", "A", "B", "magnitude"])
@pytest.mark.parametrize("first", ["hook", "patch"])
def test_accelerates_hook_on_a_part(part, first, dropout):
    stock = toy(lora_dropout=dropout)
    ours = copy.deepcopy(stock)
    hook = Counting()
    if first == "patch":
        dora_kernels.patch_peft(ours)
    add_hook_to_module(parts(ours)[part], hook)
    if first == "hook":
        dora_kernels.patch_peft(ours)
    agree(stock, ours)
    assert hook.calls == 1


def attempt(model):
    try:
        return toy_solve(model)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("first", ["offload", "patch"])
def test_offloading(first):
    """Stock DoRA cannot run with its weights on meta; the patched model does what stock does."""
    stock = toy()
    ours = copy.deepcopy(stock)
    accelerate.cpu_offload(stock, execution_device=torch.device("cpu"))
    if first == "patch":
        handle = dora_kernels.patch_peft(ours)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    if first == "offload":
        handle = dora_kernels.patch_peft(ours)
    wanted, result = attempt(stock), attempt(ours)
    assert same_bits(result, wanted) if isinstance(wanted, dict) else result is wanted
    assert handle.patched == [] and "offloaded" in handle.skipped[FIRST]
    accelerate.hooks.remove_hook_from_submodules(ours)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.mark.parametrize("first", ["prepare", "patch"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerators_prepare(accelerator, first, precision, monkeypatch):
    stock = toy()
    ours = copy.deepcopy(stock)
    if precision == "bf16":
        AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    if first == "patch":
        handle = dora_kernels.patch_peft(ours)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (stock, ours)]
    stock, ours, *optimizers = accelerator.prepare(stock, ours, *optimizers)
    if first == "prepare":
        handle = dora_kernels.patch_peft(ours)
    assert handle.patched == [FIRST, SECOND]
    tolerance = {"rtol": 0.05, "atol": 0.05} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-5}
    with counted(monkeypatch) as counts:
        for _ in range(3):
            losses = []
            for model, optimizer in zip((stock, ours), optimizers, strict=True):
                loss = model(toy_input()).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            torch.testing.assert_close(*losses, **tolerance)
    assert counts["layer"] == 6


class Graphs:
    """A compiler that runs what it is given, and keeps it to be looked at."""

    def __init__(self):
        self.ops = set()

    def __call__(self, graph, inputs):
        self.ops |= {str(node.target) for node in graph.graph.nodes}
        return graph.forward

    @contextlib.contextmanager
    def of(self):
        self.ops = set()
        yield
        self.reached = any("dora_kernels" in op or "_DoRALinear" in op or "dora_linear" in op for op in self.ops)


@pytest.mark.parametrize("first", ["compile", "patch"])
def test_torch_compile(first):
    torch._dynamo.reset()
    stock = toy()
    ours = copy.deepcopy(stock)
    graphs = Graphs()
    if first == "compile":
        compiled = torch.compile(ours, backend=graphs)
        with graphs.of():
            agree(stock, compiled)
        assert graphs.ops and not graphs.reached
        handle = dora_kernels.patch_peft(compiled)
    else:
        handle = dora_kernels.patch_peft(ours)
        compiled = torch.compile(ours, backend=graphs)
    with graphs.of():
        agree(stock, compiled)
    assert graphs.reached and len(handle.patched) == 2
    handle.restore()
    with graphs.of():
        agree(stock, compiled)
    assert not graphs.reached
    torch._dynamo.reset()


@with_dropout
def test_trainer(dropout, tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{name: t[0] for name, t in batch(tokens=(1, 9), seed=i).items()} for i in range(12)]
    stock, ours = twins(lora_dropout=dropout)
    logs = []
    for model in (stock, ours):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        logs.append(trainer.state.log_history)
    stock_losses, losses = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert len(losses) == 3 and losses[0] != losses[1]
    torch.testing.assert_close(losses, stock_losses, rtol=1e-5, atol=0)
    assert all(type(layer) is DoraLinear for layer in lora_layers(ours))
    stock.load_state_dict(ours.state_dict())
    for model in (stock, ours):
        model.gradient_checkpointing_disable()
        model.eval()
    check_parity(stock, ours, batch())


def test_data_parallel_replicas():
    """Whose parameters are plain attributes: PEFT's own path."""
    stock, ours, _ = toy_twins()
    replica = ours.base_model.model.first._replicate_for_data_parallel()
    for name, child in ours.base_model.model.first.named_children():
        copied = child._replicate_for_data_parallel()
        replica._modules[name] = copied
        inner = [*child.named_children()] or [("", child)]
        for key, module in inner:
            twin = module._replicate_for_data_parallel() if key else copied
            if key:
                copied._modules[key] = twin
            for parameter, value in module._parameters.items():
                if value is not None:
                    setattr(twin, parameter, value * 1)
                else:
                    twin._parameters[parameter] = None
    torch.testing.assert_close(replica(toy_input()), stock.base_model.model.first(toy_input()))


def test_a_layer_that_two_names_share():
    stock = toy()
    stock.base_model.model.again = stock.base_model.model.first
    ours = copy.deepcopy(stock)
    assert dora_kernels.patch_peft(ours).patched == [FIRST, SECOND]
    assert isinstance(ours.base_model.model.again, nn.Module)
    agree(stock, ours)

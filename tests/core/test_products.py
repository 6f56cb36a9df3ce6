"""The block that a thread keeps on the CPU belongs to eager calls alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dora_kernels
from dora_kernels.core import products
from dora_kernels.engine import blocked


def problem():
    torch.manual_seed(0)
    return torch.randn(96, 80), torch.randn(4, 80), torch.randn(96, 4)


def norm(weight, lora_A, lora_B):
    return dora_kernels.dora_weight_norm(weight, lora_A, lora_B, scaling=2.0)


@pytest.fixture(autouse=True)
def nothing_kept():
    products._kept.block = None
    yield
    products._kept.block = None


def test_an_eager_call_keeps_one_block():
    norm(*problem())
    block = products._kept.block
    assert block is not None and block.nbytes == 4 << 20
    norm(*problem())
    assert products._kept.block is block


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_graph_has_memory_of_its_own():
    arguments, expected = problem(), norm(*problem())
    traced = torch.jit.trace(lambda *tensors: blocked.weight_norm(*tensors, 2.0), arguments, check_trace=False)
    graph = traced.inlined_graph
    constants = [node.output().toIValue() for node in graph.findAllNodes("prim::Constant")]
    assert not any(isinstance(one, torch.Tensor) and one.numel() > 1 for one in constants)
    threads, results = [], {}
    for number in range(4):
        thread = threading.Thread(target=lambda n=number: results.update({n: traced(*arguments)}))
        threads.append(thread)
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        torch.testing.assert_close(result, expected)


def test_fake_tensors_leave_nothing_behind():
    with FakeTensorMode() as mode:
        fake = blocked.weight_norm(*(mode.from_tensor(t) for t in problem()), 2.0)
    assert isinstance(fake, FakeTensor) and products._kept.block is None
    assert not isinstance(norm(*problem()), FakeTensor)
    block = products._kept.block
    with FakeTensorMode() as mode:
        blocked.weight_norm(*(mode.from_tensor(t) for t in problem()), 2.0)
    assert products._kept.block is block

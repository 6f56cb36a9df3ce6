"""What stands in a parameter's place while its module runs: in threads, under no_grad, and after a failed merge."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dora_kernels
from dora_kernels import DoRAExperts, LoRAExperts


class TwoExperts(nn.Module):
    """Its forward reads a stack twice, and calls `between` in the middle."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x, between=lambda stack: None):
        y = F.linear(x, self.stack[0])
        between(self.stack)
        return y + F.linear(x, self.stack[1])


def layer_of(module=None):
    torch.manual_seed(0)
    layer = DoRAExperts(TwoExperts() if module is None else module, "stack", rank=2)
    nn.init.normal_(layer.lora_B.weight)
    return layer, torch.randn(2, 4)


@torch.no_grad()
def test_compiled_evaluation():
    """In one graph also after calls that were not compiled, whose copies of B it does not keep."""
    layer, x = layer_of()
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(layer(x), compiled(x))
        layer.lora_B.weight.data.mul_(-1.5)


def test_calls_in_two_threads():
    """The second call begins in the middle of the first, which ends before it."""
    layer, x = layer_of()
    expected, found = layer(x), {}
    reading, second = threading.Event(), threading.Event()

    def run(name, between):
        found[name] = layer(x, between)

    def first_waits(stack):
        reading.set()
        second.wait(0.2)

    def second_waits(stack):
        second.set()
        threads[0].join(5)

    threads = [threading.Thread(target=run, args=each) for each in (("first", first_waits), ("second", second_waits))]
    threads[0].start()
    reading.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["first"], expected) and torch.equal(found["second"], expected)
    assert "stack" not in vars(layer._holder())


def test_first_read_without_gradients():
    class ReadsItsShape(TwoExperts):
        def forward(self, x):
            with torch.no_grad():
                assert self.stack.shape == (3, 5, 4)
            return super().forward(x)

    layer, x = layer_of(ReadsItsShape())
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad.count_nonzero() == 10


@pytest.mark.parametrize("product", [torch.mm, torch.Tensor.mm, torch.matmul, torch.Tensor.matmul])
def test_names_of_arguments(product):
    class Named(TwoExperts):
        def forward(self, x):
            name = "other" if "matmul" in product.__name__ else "mat2"
            return product(x, **{name: self.stack[0].t()})

    layer, x = layer_of(Named())
    torch.testing.assert_close(layer(x), F.linear(x, layer._experts().formed_one(0)))


def test_a_merge_that_fails():
    layer, x = layer_of()
    expected, stack = layer(x), layer.weight.clone()
    with pytest.raises(ValueError, match="rounding: expected 'nearest' or 'stochastic', got 'up'"):
        layer.merge("up")
    assert not layer.merged and torch.equal(layer.weight, stack) and torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["data_ptr", "untyped_storage", "storage", "data", "__cuda_array_interface__"])
def test_no_address(name):
    """A kernel that is given the stand-in fails instead of reading the base weight."""

    class GivesItsAddress(TwoExperts):
        def forward(self, x):
            getattr(self.stack, name)
            return super().forward(x)

    layer, x = layer_of(GivesItsAddress())
    said = rf"GivesItsAddress\.stack: inside its layer's call the adapted weight has no {name}"
    with pytest.raises(AttributeError, match=said):
        layer(x)
    assert "stack" not in vars(layer._holder())


def test_an_expert_that_there_is_not():
    class Reads(TwoExperts):
        def forward(self, x, expert):
            return F.linear(x, self.stack[expert])

    layer, x = layer_of(Reads())
    assert torch.equal(layer(x, -1), layer(x, 2))
    with pytest.raises(IndexError, match=r"Reads\.stack: index 3 is out of range for 3 experts"):
        layer(x, 3)
    assert "stack" not in vars(layer._holder())


def test_a_stack_that_is_read_transposed():
    """A magnitude belongs to outputs, so with one it is an error that says what to declare; plain LoRA has none."""

    class Transposed(TwoExperts):
        def forward(self, x):
            return x @ self.stack[0]

    layer, _ = layer_of(Transposed())
    said = (
        r"Transposed\.stack: .* reads this weight as \[experts, in, out\], and the adapter's magnitudes were made for "
        r"\[experts, out, in\]; set is_transposed=True"
    )
    with pytest.raises(dora_kernels.UnsupportedError, match=said):
        layer(torch.randn(2, 5))
    lora = LoRAExperts(layer._holder(), "stack", rank=2)
    nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(2, 5)
    torch.testing.assert_close(lora(x), x @ lora._experts().formed_one(0))


def test_forming_the_weights_warns_once():
    class Summed(TwoExperts):
        def forward(self, x):
            return torch.einsum("sk,enk->sn", x, self.stack)

    layer, x = layer_of(Summed())
    with pytest.warns(RuntimeWarning, match=r"Summed\.stack: the layer's forward .* all experts are formed"):
        y = layer(x)
    torch.testing.assert_close(y, torch.einsum("sk,enk->sn", x, layer._experts().formed()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)

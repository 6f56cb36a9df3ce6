"""The kept norm is never stale, whatever optimizer steps, and is reused where that is known.

A result with the kept norm must have the very bits of one computed afresh, both taking the same path to the norm; where
the device is asked, which adds up in another order, it must have them to float32 rounding.
"""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from cached_layer import IN, OUT, RANK, Layer, accumulate, asks, compares, counted, lane, layer, x  # noqa: F401
from helpers import adamw_8bit
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_kernels import invalidate, set_norm_reuse
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import writes
from dora_kernels.engine.fingerprints import sample


class ThroughData(torch.optim.Optimizer):
    """Writes as 8-bit optimizers do: no version moves."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=0.1)


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False),
    "AdamW-foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "AdamW-fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "AdamW8bit": lambda params: adamw_8bit(params, lr=0.1),
    "through-data": ThroughData,
}
UNSEEN = ("AdamW-fused", "AdamW8bit", "through-data")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(layer, x, name):
    optimizer = OPTIMIZERS[name]([layer.lora_A, layer.lora_B, layer.magnitude])
    for step in range(4):
        before, version = layer.lora_A.detach().clone(), layer.lora_A._version
        computed, reused = counted(layer.cache, lambda: accumulate(layer, x, 3))
        if step > 0 or compares(layer.lane):
            # Six forwards. Before the optimizer's first step only a comparison can know, and the GPU makes none.
            assert (computed, reused) == (1, 5)
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(layer.lora_A, before)
        assert (layer.lora_A._version == version) == (name in UNSEEN)
    assert layer.is_right(x)
    if name == "AdamW8bit":
        assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}


def test_a_closure_that_steps_several_times(layer, x):
    optimizer = torch.optim.LBFGS([layer.lora_A, layer.lora_B], lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        assert layer.is_right(x)
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert layer.is_right(x)


@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_hand_written_update(layer, x, through_data, create_graph):
    """No optimizer, so nothing tells of a step; what counts is that gradients were produced."""
    if create_graph and layer.lane.backend == "triton":
        pytest.skip("a backend asked for by name has no second derivative")
    if create_graph:
        layer.lane = layer.lane._replace(backend="auto")
    for _ in range(4):
        assert layer.is_right(x), "a stale norm"
        grads = torch.autograd.grad(layer(x).square().mean(), [layer.lora_A, layer.lora_B], create_graph=create_graph)
        for parameter, grad in zip([layer.lora_A, layer.lora_B], grads, strict=True):
            if through_data:
                parameter.data.sub_(grad.detach(), alpha=0.1)
            else:
                with torch.no_grad():
                    parameter.sub_(grad, alpha=0.1)


def test_a_second_layer_is_not_vouched_for_by_the_first_ones_optimizer(layer, x):
    """One layer's parameters belong to an optimizer, the other's are updated by hand."""
    other = copy.deepcopy(layer)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(3):
        assert layer.is_right(x) and other.is_right(x)
        (layer(x).square().mean() + other(x).square().mean()).backward()
        optimizer.step()
        for parameter in (other.lora_A, other.lora_B):
            parameter.data.sub_(parameter.grad, alpha=0.1)
        layer.zero_grad()
        other.zero_grad()


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("others", ["frozen", "owned"])
def test_one_tensor_is_updated_by_hand(layer, x, name, others):
    """The base weight too may train; the others are frozen, or in the hands of an optimizer that is seen."""
    tensors = {n: getattr(layer, n) for n in ("weight", "lora_A", "lora_B")}
    tensor = tensors.pop(name).requires_grad_()
    for other in tensors.values():
        other.requires_grad_(others == "owned")
    optimizer = torch.optim.SGD(tensors.values(), lr=0.01)
    for _ in range(3):
        for _ in range(2):
            assert layer.is_right(x), "a stale norm"
            layer(x).square().mean().backward()
            tensor.data.sub_(tensor.grad, alpha=0.1)
            tensor.grad = None
        if others == "owned":
            optimizer.step()


def test_an_interrupted_step(layer, x):
    """It has written, though it never ends."""
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    accumulate(layer, x, 2)
    optimizer.step()
    accumulate(layer, x, 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert layer.is_right(x), "a stale norm"


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_invalidate(layer, x, name):
    """A case that nothing on a GPU can see: written through .data in training, with no step and no gradient."""
    model = nn.Sequential(nn.Identity(), layer)
    model(x)
    getattr(layer, name).data.mul_(1.5)
    invalidate(model)
    assert layer.is_right(x)


def test_invalidate_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got Tensor"):
        invalidate(torch.ones(2))


def test_invalidate_finds_caches_in_dictionaries(lane, x):
    layer = Layer(lane)
    layer(x)
    layer.caches = {"default": layer.cache}
    del layer.cache
    invalidate(layer)
    layer.cache = layer.caches["default"]
    assert counted(layer.cache, lambda: layer(x)) == (1, 0)


def test_evaluation_reuses(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)
        asked = layer.cache.asked
        computed, reused = counted(layer.cache, lambda: [layer(x) for _ in range(10)])
        asked = layer.cache.asked - asked
        assert layer.is_right(x)
    if compares(layer.lane):
        assert (computed, reused, asked) == (0, 10, 0)
    elif asks(layer.lane):
        assert (computed, reused, asked) == (0, 0, 10)
    else:
        assert (computed, reused, asked) == (10, 0, 0)


def test_training_without_gradients_reuses(layer, x):
    with torch.no_grad():
        layer(x)
        assert counted(layer.cache, lambda: [layer(x) for _ in range(10)]) == (0, 10)


def test_the_switch(layer, x):
    layer(x)
    set_norm_reuse(False)
    try:
        assert counted(layer.cache, lambda: [layer(x) for _ in range(3)]) == (3, 0)
        assert layer.is_right(x)
    finally:
        set_norm_reuse(True)
    assert counted(layer.cache, lambda: [layer(x) for _ in range(3)])[1] >= 2


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode_then_gradients(layer, x, training):
    """A norm kept in inference mode is no inference tensor: a graph may save it."""
    layer.train(training)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer.fresh(x))
    for mode in (training, not training):
        layer.train(mode)
        assert layer.is_right(x)
        layer(x).sum().backward()
    assert layer.lora_A.grad is not None


def test_parameters_made_in_inference_mode(lane, x):
    with torch.inference_mode():
        layer = Layer(lane)
        for _ in range(2):
            assert layer.is_right(x)
            layer.lora_A.mul_(1.5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_come_empty(layer, x, copied):
    layer(x)
    twin = copied(layer)
    assert twin.cache is not layer.cache and (twin.cache.computed, twin.cache.reused) == (0, 0)
    assert counted(twin.cache, lambda: twin(x)) == (1, 0)
    twin.lora_A.data.mul_(2)
    twin.cache.invalidate()
    assert twin.is_right(x) and layer.is_right(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoints_recomputation_reuses(layer, x, use_reentrant):
    x = x.requires_grad_()

    def step():
        checkpoint(layer, x, use_reentrant=use_reentrant).square().mean().backward()

    assert counted(layer.cache, step) == (1, 1)
    kept = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).square().mean().backward()
    if layer.lane.backend != "torch" or not use_reentrant or layer.magnitude_axis == "in":
        assert torch.equal(layer.lora_A.grad, kept)
    else:  # the first forward ran under no_grad and was rounded elsewhere, and so was the gradient made from it
        torch.testing.assert_close(layer.lora_A.grad, kept)


def test_a_norm_in_use_is_never_written_again(layer, x):
    """A backward must find the norm of its own forward, though the parameters have moved since."""
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, fused=True)
    settings = Form(layer.scaling, layer.magnitude_axis), True, layer.lane.backend
    handed_out = []
    for _ in range(3):
        divisor = layer.cache.norm(Weights(*layer.arguments), *settings).divisor
        handed_out.append((divisor, divisor.clone()))
        layer(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(divisor, then) for divisor, then in handed_out)
    assert not torch.equal(handed_out[0][0], handed_out[1][0])


@pytest.mark.parametrize("switch", ["no", 0, None])
def test_the_switch_takes_a_bool(switch):
    with pytest.raises(TypeError, match="enabled: expected a bool, got"):
        set_norm_reuse(switch)


def test_what_is_kept(layer, x):
    """A norm, |W|² where that is the cache's to keep, on the CPU copies of A, B and a sample of W; and a slot."""
    layer.weight = nn.Parameter(torch.randn(64 * OUT, IN, device=layer.lane.device), requires_grad=False)
    layer.lora_B = nn.Parameter(torch.randn(64 * OUT, RANK, device=layer.lane.device))
    layer.magnitude = nn.Parameter(torch.ones(64 * OUT if layer.magnitude_axis == "out" else IN, device=x.device))
    layer(x).sum().backward()
    own = {p.data_ptr() for p in layer.parameters()}
    found = list(kept_in(layer.cache))
    tensors = {t.data_ptr(): t for t in found if isinstance(t, torch.Tensor) and t.data_ptr() not in own}
    copies = {id(one): one for one in found if isinstance(one, bytearray)}
    size = sum(t.untyped_storage().nbytes() for t in tensors.values()) + sum(map(len, copies.values()))
    of_this_size = 2 * layer.magnitude.numel() + layer.lora_A.numel() + layer.lora_B.numel()
    assert 0 < size <= 4 * (of_this_size + 2 * sample(layer.weight).numel()) + layer.cache.slot.nbytes
    assert bool(copies) == compares(layer.lane)
    assert not any(t.requires_grad for t in tensors.values())


def kept_in(thing):
    """The tensors and copies of bytes in it."""
    if isinstance(thing, (torch.Tensor, bytearray)):
        yield thing
    elif isinstance(thing, dict):
        yield from kept_in(tuple(thing.values()))
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from kept_in(part)
    elif type(thing).__module__.startswith("dora_kernels."):
        names = getattr(thing, "__slots__", None) or vars(thing)
        yield from kept_in([getattr(thing, name, None) for name in names])


def test_an_address_used_again(lane, x):
    """New tensors where old ones were: addresses, versions and ids may all be the same."""
    layer = Layer(lane)
    for i in range(20):
        assert layer.is_right(x), "a stale norm"
        del layer.lora_B
        layer.lora_B = nn.Parameter(torch.full((OUT, RANK), 0.1 * (i + 1), device=lane.device))


@pytest.mark.parametrize("training", [True, False])
def test_a_rank_cut_off_in_place(layer, x, training):
    """Views of the old factors: addresses, strides and versions stay what they were."""
    layer.train(training)
    with torch.no_grad():
        assert layer.is_right(x)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data[:1], layer.lora_B.data[:, :1]
        assert layer.is_right(x), "a stale norm"


def test_layers_share_nothing(lane, x):
    one, two = Layer(lane), Layer(lane)
    two.lora_A.data.mul_(3)
    for _ in range(3):
        assert one.is_right(x) and two.is_right(x)


def test_the_registry_of_optimizers_does_not_keep_them(lane, x):
    layer = Layer(lane)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    known = id(optimizer)
    assert known in writes._stepped
    del layer, optimizer
    gc.collect()
    assert known not in writes._stepped

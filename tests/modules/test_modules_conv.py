"""`DoRAConv1d`, `2d` and `3d`: against a convolution with the adapted weight written out, merging, PEFT's layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import bf16, f32, f64
from torch import nn

from dora_kernels import DoRAConv1d, DoRAConv2d, DoRAConv3d

pytestmark = pytest.mark.filterwarnings("ignore:groups")

KINDS = {1: DoRAConv1d, 2: DoRAConv2d, 3: DoRAConv3d}

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])

# Beside a kernel of 3 and the channels.
SETTINGS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "groups": 2},
    {"padding": 1, "groups": 4, "dilation": 2, "padding_mode": "replicate"},
]


def random_layer(dims=2, in_channels=4, out_channels=8, kernel=3, *, rank=4, alpha=3, dtype=f64, **options):
    """An adapter that is far from its start."""
    torch.manual_seed(0)
    layer = KINDS[dims](in_channels, out_channels, kernel, rank=rank, alpha=alpha, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.5)
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer


def input_of(layer, size=6):
    kernel = layer.base_layer.kernel_size
    return torch.randn(2, layer.base_layer.in_channels, *(size for _ in kernel), dtype=layer.base_layer.weight.dtype)


def adapter(layer):
    return [*layer.factors, layer.lora_magnitude_vector]


def weight(layer, eps=0.0):
    """The adapted weight of all input channels, ``[out, in, *kernel]``, as a function of the adapter."""
    base, (lora_A, lora_B) = layer.base_layer, layer.factors
    parts = []
    size = base.weight.shape[1]
    for group, (w, a, b) in enumerate(zip(*(t.chunk(base.groups) for t in (base.weight, lora_A, lora_B)), strict=True)):
        update = layer.scaling * torch.tensordot(b.flatten(1), a, dims=1)
        before = torch.zeros_like(update[:, : group * size])
        after = torch.zeros_like(update[:, (group + 1) * size :])
        parts.append(torch.cat([before, w, after], dim=1) + update)
    direction = torch.cat(parts)
    dims = [i for i in range(direction.dim()) if i != (0 if layer.magnitude_axis == "out" else 1)]
    norm = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
    norm = norm.detach() if layer.detach_norm else norm
    return layer.magnitude.view(norm.shape) / (norm + eps) * direction


def convolve(layer, x, eps=0.0):
    """The layer's formula as one convolution without groups."""
    base = layer.base_layer
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    return function(x, weight(layer, eps), base.bias, base.stride, padding, base.dilation)


def check(layer, x, eps=0.0):
    x = x.clone().requires_grad_()
    results = []
    for y in (layer(x), convolve(layer, x, eps)):
        dy = torch.ones_like(y).cumsum(-1).cos()
        results.append([y.detach(), *torch.autograd.grad(y, [x, *adapter(layer)], dy)])
    torch.testing.assert_close(*results)


@axes
@detachments
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_formula(dims, settings, magnitude_axis, detach_norm):
    layer = random_layer(dims, magnitude_axis=magnitude_axis, detach_norm=detach_norm, **settings)
    x = input_of(layer)
    for training in (True, True, False):  # the second time with the kept norm
        check(layer.train(training), x)


@axes
@detachments
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_eps(magnitude_axis, detach_norm, groups, backend):
    layer = random_layer(
        magnitude_axis=magnitude_axis, detach_norm=detach_norm, groups=groups, eps=0.3, backend=backend
    )
    check(layer, input_of(layer), 0.3)


@axes
@detachments
@pytest.mark.parametrize("kernel", [1, 3, (1, 3)])
def test_channels_last(magnitude_axis, detach_norm, kernel):
    """In any mixture of memory formats, and with a fresh norm after a write that goes round a copy."""
    plain = random_layer(kernel=kernel, magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    x = input_of(plain)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    mixed = copy.deepcopy(plain)
    mixed.base_layer.to(memory_format=torch.channels_last)
    for layer in (last, mixed):
        check(layer, x)
        with torch.no_grad():
            layer.lora_A.weight.mul_(2.0)
        check(layer, x)
        original, before = layer.base_layer.weight.clone(), layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), before)
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, original)


@axes
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_dtypes(lane, magnitude_axis, dtype):
    layer = random_layer(magnitude_axis=magnitude_axis, dtype=dtype, backend=lane.backend).to(lane.device)
    x = input_of(layer).to(lane.device)
    y, wanted = layer(x), convolve(copy.deepcopy(layer).to(f64), x.to(f64))
    assert y.dtype == dtype
    plain = F.conv2d(x, weight(layer).to(dtype), layer.base_layer.bias)
    assert (y - wanted).norm() <= 2 * (plain - wanted).norm()


@axes
@pytest.mark.parametrize("groups", [1, 2])
def test_a_new_layer_is_its_base_layer(magnitude_axis, groups):
    base = nn.Conv2d(4, 6, 3, groups=groups, padding_mode="circular", padding=1).eval()
    layer = DoRAConv2d.from_base(base, rank=2, magnitude_axis=magnitude_axis)
    assert layer.base_layer is base and not base.weight.requires_grad and not layer.training
    channels = 6 if magnitude_axis == "out" else 4
    assert layer.lora_magnitude_vector.shape == (1, channels, 1, 1) and layer.magnitude.shape == (channels,)
    assert [tuple(t.shape) for t in layer.factors] == [(2, 4, 3, 3), (6, 2 // groups, 1, 1)]
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), base(x))
    torch.testing.assert_close(layer(x[0]), base(x[0]))  # without a batch


@axes
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_merge_and_unmerge(magnitude_axis, eps, dtype):
    layer = random_layer(magnitude_axis=magnitude_axis, eps=eps, dtype=dtype)
    x = input_of(layer)
    original, before = layer.base_layer.weight.clone(), layer(x)
    wanted = weight(copy.deepcopy(layer).to(f64), eps)
    layer.merge()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.base_layer.weight.to(f64), wanted, rtol=4 * step, atol=1e-6)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original) and torch.equal(layer(x), before)


def test_groups_cannot_be_merged():
    with pytest.warns(UserWarning, match="groups can be neither merged nor saved to a file; use extract and attach"):
        layer = random_layer(groups=2)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="the layer cannot be merged: its update reads all channels"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base_layer.weight, before)


@axes
def test_dropout_is_on_the_low_rank_branch(magnitude_axis):
    """Drawn once, on what that branch reads; none in evaluation."""
    layer = random_layer(magnitude_axis=magnitude_axis, dropout=0.5)
    x = input_of(layer)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    g = layer._scale().detach()
    if magnitude_axis == "out":
        bias = layer.base_layer.bias.view(-1, 1, 1)
        low = layer.lora_B(layer.lora_A(dropped))
        wanted = g * (layer.base_layer(x) - bias + layer.scaling * low) + bias
    else:
        wanted = layer.base_layer(g * x) + layer.scaling * layer.lora_B(layer.lora_A(g * dropped))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(layer.eval()(x), convolve(layer, x))


def test_the_scaled_input_is_made_once():
    """Without active dropout both branches read it."""
    layer = random_layer(magnitude_axis="in", dropout=0.5).eval()
    x, saved = input_of(layer), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert len({t.data_ptr() for t in saved if t.shape == x.shape}) == 2  # x itself, for g's gradient, and the scaled


@axes
@detachments
@pytest.mark.parametrize("groups", [1, 2])
def test_one_norm_for_many_calls(groups, magnitude_axis, detach_norm):
    layer = random_layer(groups=groups, magnitude_axis=magnitude_axis, detach_norm=detach_norm).eval()
    with torch.no_grad():
        for _ in range(3):
            layer(input_of(layer))
    assert (layer._norm_cache.computed, layer._norm_cache.reused) == (1, 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_numbers_of_pefts_layer(dims):
    """Without dilation, groups and another padding than zeros, where PEFT's layer is another function."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, 3, 2, 1, dtype=f64))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    stock = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0].to(f64)
    ours = KINDS[dims](4, 6, 3, 2, 1, rank=2, alpha=4, dtype=f64)
    ours.load_state_dict(stock.state_dict())
    pefts = [
        stock.lora_A["default"].weight, stock.lora_B["default"].weight, stock.lora_magnitude_vector["default"].weight
    ]  # fmt: skip
    x = input_of(ours).requires_grad_()
    results = []
    for layer, parameters in ((stock, pefts), (ours, adapter(ours))):
        y = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "base, options, error, message",
    [
        (nn.Conv1d(2, 2, 1), {}, TypeError, "base: expected a torch.nn.Conv2d and not a subclass, got Conv1d"),
        (nn.ConvTranspose2d(2, 2, 1), {}, TypeError, "got ConvTranspose2d"),
        (nn.Conv2d(4, 4, 1, groups=4), {}, ValueError, "rank: expected a multiple of the 4 groups, got 2"),
        (nn.Conv2d(4, 4, 1), {"eps": -1}, ValueError, "eps: expected a finite number of at least 0, got -1"),
        (nn.Conv2d(4, 4, 1), {"dropout": 1}, ValueError, "dropout: expected a probability"),
    ],
)
def test_bad_bases_and_options(base, options, error, message):
    with pytest.raises(error, match=message):
        DoRAConv2d.from_base(base, rank=2, **options)
    assert all(p.requires_grad for p in base.parameters())


def test_a_base_layer_in_the_constructor():
    base = type("Sub", (nn.Conv2d,), {})(4, 6, 3, stride=2)
    layer, x = DoRAConv2d(rank=2, base_layer=base), torch.randn(1, 4, 7, 7)
    torch.testing.assert_close(layer(x), base(x))
    with pytest.raises(TypeError, match="base_layer: expected a torch.nn.Conv2d, got ConvTranspose2d"):
        DoRAConv2d(rank=2, base_layer=nn.ConvTranspose2d(4, 4, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride' beside base_layer"):
        DoRAConv2d(rank=2, base_layer=base, stride=1)

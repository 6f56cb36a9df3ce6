"""Weighted sums of adapters, and strengths, against dense merged weights in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dora_kernels import apply_dora, merge_dora, set_dora_strength
from dora_kernels.adapters import Adapter, AdapterLayer, combine_adapters, read_adapter, save_adapter, with_strength
from dora_kernels.core import weighted_sum

f32, f64 = torch.float32, torch.float64

BASES = {
    "linear": lambda: nn.Linear(17, 11),
    "wide": lambda: nn.Linear(300, 5, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 7, 3),
    "conv2d": lambda: nn.Conv2d(5, 7, (2, 3)),
    "conv3d": lambda: nn.Conv3d(3, 5, 2),
    "embedding": lambda: nn.Embedding(19, 10),
}
KIND = {"wide": "linear"}
BOTH_AXES = pytest.mark.parametrize("axis", ["out", "in"])
ALL_BASES = pytest.mark.parametrize("kind", list(BASES))


class Net(nn.Module):
    def __init__(self, kind, dtype=f64):
        super().__init__()
        self.first = BASES[kind]().to(dtype)
        self.second = BASES[kind]().to(dtype)


def sizes(module):
    """Inputs, outputs, kernel."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim, ()
    weight = module.weight
    return weight.shape[1], weight.shape[0], tuple(weight.shape[2:])


def random_layer(module, kind, rank, axis="out", scaling=0.7, dtype=f64, **options):
    """A trained one: magnitudes of 0.5 to 1.5 times the norm, B not 0; `axis` None for plain LoRA."""
    inputs, outputs, kernel = sizes(module)
    a = torch.randn(rank, inputs, *kernel, dtype=f64) / math.sqrt(inputs)
    b = torch.randn(outputs, rank, *(1 for _ in kernel), dtype=f64)
    layer = AdapterLayer(KIND.get(kind, kind), a.to(dtype), b.to(dtype), None, scaling, axis or "out", **options)
    if axis is None:
        return layer
    norm = norms(direction(module, layer), layer)
    return replace(layer, magnitude=(norm * (0.5 + torch.rand(len(norm), dtype=f64))).to(dtype))


def adapter(net, kind, rank, axis="out", names=("first", "second"), **options):
    return Adapter({name: random_layer(net.get_submodule(name), kind, rank, axis, **options) for name in names})


def table(module):
    """The base weight as ``[out, in, *kernel]`` in float64."""
    weight = module.weight.detach().double()
    return weight.t() if isinstance(module, nn.Embedding) else weight


def direction(module, layer):
    weight = table(module)
    low = layer.lora_B.double().flatten(1) @ layer.lora_A.double().flatten(1)
    return weight + layer.scaling * low.view(weight.shape)


def norms(weight, layer):
    return (weight if layer.magnitude_axis == "out" else weight.transpose(0, 1)).flatten(1).norm(dim=1)


def merged(module, layer):
    """The dense merged weight in float64, of the definition alone."""
    weight = direction(module, layer)
    if layer.magnitude is None:
        return weight
    norm = norms(weight, layer) + layer.eps
    g = torch.where(norm == 0, 0.0, layer.magnitude.double() / norm)
    return weight * (g.view(-1, *(1,) * (weight.dim() - 1)) if layer.magnitude_axis == "out" else
                     g.view(1, -1, *(1,) * (weight.dim() - 2)))  # fmt: skip


def dense_sum(net, name, adapters, weights):
    module = net.get_submodule(name)
    total = base = table(module)
    for weight, each in zip(weights, adapters):
        if name in each.layers:
            total = total + weight * (merged(module, each.layers[name]) - base)
    return total


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# sums


@ALL_BASES
@BOTH_AXES
@pytest.mark.parametrize("weights", [(0.6, -0.7, 0.3), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)], ids=str)
def test_the_sum_of_the_ranks_is_exact(kind, axis, weights):
    net = Net(kind)
    adapters = [adapter(net, kind, 3, axis), adapter(net, kind, 2, axis, scaling=-1.3), adapter(net, kind, 1, None)]
    total, report = combine_adapters(net, adapters, weights)
    for name in ("first", "second"):
        layer = total.layers[name]
        assert relative(merged(net.get_submodule(name), layer), dense_sum(net, name, adapters, weights)) < 1e-12
        assert (layer.rank, layer.scaling, layer.magnitude_axis, layer.eps) == (6, 1.0, axis, 0.0)
        assert layer.magnitude.shape == (sizes(net.first)[axis == "out"],) and layer.lora_A.dtype == f64
        assert (report.layers[name].rank, report.layers[name].error, report.layers[name].replaced) == (6, 0.0, 0)
    assert report.error == 0.0 and "exact" in str(report)


@ALL_BASES
@BOTH_AXES
@pytest.mark.parametrize("base_dtype", [f32, torch.bfloat16])
def test_in_float32(kind, axis, base_dtype):
    """No farther from the truth than a sum of weights merged in float32."""
    net = Net(kind, base_dtype)
    adapters = [adapter(net, kind, 3, axis, dtype=f32), adapter(net, kind, 2, axis, dtype=torch.bfloat16)]
    weights = (0.6, 0.7)
    total, _ = combine_adapters(net, adapters, weights)
    assert total.layers["first"].lora_A.dtype == total.layers["first"].magnitude.dtype == f32
    exact = dense_sum(net, "first", adapters, weights)
    assert relative(merged(net.first, total.layers["first"]), exact) < 4 * torch.finfo(f32).eps


@BOTH_AXES
def test_plain_lora_alone_stays_plain(axis):
    net = Net("linear")
    adapters = [adapter(net, "linear", 2, None, scaling=2.0), adapter(net, "linear", 3, None)]
    total, _ = combine_adapters(net, adapters, [0.4, -1.5])
    assert total.layers["first"].magnitude is None
    assert relative(merged(net.first, total.layers["first"]), dense_sum(net, "first", adapters, [0.4, -1.5])) < 1e-12


def test_adapters_of_other_layers():
    """Each layer's sum is of the adapters that have it."""
    net = Net("linear")
    adapters = [adapter(net, "linear", 2, names=["first"]), adapter(net, "linear", 3)]
    total, report = combine_adapters(net, adapters, [0.4, 0.9])
    assert {name: layer.rank for name, layer in total.layers.items()} == {"first": 5, "second": 3}
    for name in ("first", "second"):
        assert relative(merged(net.get_submodule(name), total.layers[name]),
                        dense_sum(net, name, adapters, [0.4, 0.9])) < 1e-12  # fmt: skip
    both = replace(adapters[0], layers={**adapters[0].layers, "second": random_layer(net.second, "linear", 1, "in")})
    with pytest.raises(ValueError, match="second: magnitudes along 'out' and along 'in'"):
        combine_adapters(net, [both, adapters[1]], [1.0, 1.0])


@BOTH_AXES
def test_an_eps_goes_into_the_magnitude(axis):
    net = Net("linear")
    adapters = [adapter(net, "linear", 2, axis, eps=0.3), adapter(net, "linear", 2, axis)]
    total, _ = combine_adapters(net, adapters, [0.5, 0.5])
    assert relative(merged(net.first, total.layers["first"]), dense_sum(net, "first", adapters, [0.5, 0.5])) < 1e-12


def test_the_model_may_be_adapted_already():
    from dora_kernels import DoRALinear

    net = Net("linear", f32)
    adapters = [adapter(net, "linear", 2), adapter(net, "linear", 3)]
    expected, _ = combine_adapters(net, adapters, [0.5, 0.5])
    net.first = DoRALinear.from_linear(net.first, rank=2)
    before = [p.clone() for p in net.parameters()]
    found, _ = combine_adapters(net, adapters, [0.5, 0.5])
    assert torch.equal(found.layers["first"].magnitude, expected.layers["first"].magnitude)
    assert all(map(torch.equal, before, net.parameters()))


# rows whose factors cancel


def with_factor(net, g, axis="out", kind="linear", rank=2):
    """An adapter with a given g of its first magnitude."""
    made = adapter(net, kind, rank, axis)
    layer = made.layers["first"]
    layer.magnitude[0] = g * norms(direction(net.first, layer), layer)[0]
    return made


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@BOTH_AXES
@pytest.mark.parametrize("dtype", [f64, f32])
def test_a_row_whose_base_weight_cancels(kind, axis, dtype):
    """``1 + w (g - 1)`` is 0, what is added stays, to rounding; and the report counts it."""
    net = Net(kind, dtype)
    made = with_factor(net, 2.0, axis, kind)
    made.layers["first"] = replace(made.layers["first"], **{
        part: getattr(made.layers["first"], part).to(dtype) for part in ("lora_A", "lora_B", "magnitude")
    })  # fmt: skip
    total, report = combine_adapters(net, [made], [-1.0])
    found, exact = merged(net.first, total.layers["first"]), dense_sum(net, "first", [made], [-1.0])
    dim = 0 if axis == "out" else 1
    assert relative(found.select(dim, 0), exact.select(dim, 0)) < 32 * torch.finfo(dtype).eps
    assert relative(found, exact) < 16 * torch.finfo(dtype).eps
    assert report.layers["first"].replaced == 1 and report.layers["second"].replaced == 0
    assert "cancels in 1 row" in str(report)


@BOTH_AXES
def test_a_row_of_zeros_is_exact(axis):
    """Neither base weight nor update is left; so is the row of a base weight of zeros, and a magnitude of 0."""
    net = Net("linear")
    with torch.no_grad():
        rows = net.first.weight if axis == "out" else net.first.weight.t()
        rows[[0, 2, 4]] = 0.0
        rows[0, 3] = 3.0  # of a norm without rounding
    made = with_factor(net, 2.0, axis)
    layer = made.layers["first"]
    (layer.lora_B if axis == "out" else layer.lora_A.t())[[0, 2]] = 0.0
    layer.magnitude[:2] = torch.tensor([6.0, 0.0])
    for weight in (-1.0, 1.0, 0.5):
        total, report = combine_adapters(net, [made], [weight])
        found, exact = merged(net.first, total.layers["first"]), dense_sum(net, "first", [made], [weight])
        assert relative(found, exact) < 1e-12 and total.layers["first"].magnitude.isfinite().all()
        if weight == -1.0:
            assert not found.select(0 if axis == "out" else 1, 0).any() and not report.layers["first"].replaced
    total, report = combine_adapters(net, [made], [1.0])
    assert not merged(net.first, total.layers["first"]).select(0 if axis == "out" else 1, 1).any()
    assert not report.layers["first"].replaced


def test_tiny_magnitudes_keep_their_digits():
    """Weights that add up to 1 cancel nothing: a row of 1e-12 of its norm stays that row."""
    net = Net("linear", f32)
    made = adapter(net, "linear", 2, dtype=f32)
    made.layers["first"].magnitude[0] *= 1e-12
    total, report = combine_adapters(net, [made, made], [0.25, 0.75])
    found, exact = merged(net.first, total.layers["first"]), merged(net.first, made.layers["first"])
    assert relative(found[0], exact[0]) < 4 * torch.finfo(f32).eps and report.layers["first"].replaced == 0


# a smaller rank


@ALL_BASES
@BOTH_AXES
@pytest.mark.parametrize("dtype", [f64, f32])
def test_a_smaller_rank(kind, axis, dtype):
    """The error is the dense one, and the best that any update of this rank has beside the sum's own factor."""
    net = Net(kind, dtype)
    adapters = [adapter(net, kind, 2, axis, dtype=dtype), adapter(net, kind, 3, axis, dtype=dtype)]
    weights = (0.6, 0.8)
    full, _ = combine_adapters(net, adapters, weights)
    total, report = combine_adapters(net, adapters, weights, rank=3)
    layer, base = total.layers["first"], table(net.first)
    exact, found = dense_sum(net, "first", adapters, weights), merged(net.first, layer)
    lost, change = (found - exact).norm(), (exact - base).norm()
    tolerance = 1e-10 if dtype == f64 else 1e-4
    assert layer.rank == report.layers["first"].rank == 3
    assert report.layers["first"].error == pytest.approx(float(lost / change), rel=tolerance)
    # g of the new adapter is the factor of the base weight; what is left is the update.
    norm = norms(direction(net.first, full.layers["first"]), full.layers["first"])
    factor = full.layers["first"].magnitude.double() / norm
    shape = (-1, *(1,) * (base.dim() - 1)) if axis == "out" else (1, -1, *(1,) * (base.dim() - 2))
    update = (exact - factor.view(shape) * base).flatten(1)
    best = torch.linalg.svdvals(update)[3:].norm()
    assert float(best) > 0.01 * float(change)
    assert float(lost) == pytest.approx(float(best), rel=tolerance)
    assert report.error == max(each.error for each in report.layers.values()) > 0 and "is lost" in str(report)


def test_blocks_of_a_large_weight(monkeypatch):
    net = Net("wide")
    adapters = [adapter(net, "wide", 2), adapter(net, "wide", 2)]
    _, whole = combine_adapters(net, adapters, [0.5, 0.5], rank=1)
    monkeypatch.setattr(weighted_sum, "_BLOCK_ELEMENTS", 2 * 300)
    _, blocks = combine_adapters(net, adapters, [0.5, 0.5], rank=1)
    assert blocks.error == pytest.approx(whole.error, rel=1e-12)


def test_a_rank_that_suffices_loses_nothing():
    net = Net("linear")
    made = adapter(net, "linear", 2)
    _, report = combine_adapters(net, [made], [0.5], rank=7)
    assert report.layers["first"].rank == 2 and report.error == 0.0
    total, report = combine_adapters(net, [made, made], [0.5, 0.25], rank=2)
    assert report.error < 1e-14
    assert relative(merged(net.first, total.layers["first"]), dense_sum(net, "first", [made], [0.75])) < 1e-12


# strengths


@ALL_BASES
@BOTH_AXES
@pytest.mark.parametrize("strength", [0.25, -0.5, 1.0, 1.7])
def test_strength(kind, axis, strength):
    net = Net(kind)
    made = adapter(net, kind, 2, axis)
    weaker = with_strength(net, made, strength)
    assert weaker.layers["first"].rank == 2
    exact = dense_sum(net, "first", [made], [strength])
    assert relative(merged(net.first, weaker.layers["first"]), exact) < 1e-12
    if strength == 1.0:
        assert weaker is made


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (1200, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16, f64])
@BOTH_AXES
def test_strength_0_is_the_base_model(shape, dtype, axis):
    """Bit for bit after merging: g is exactly 1."""
    net = nn.ModuleDict({"layer": nn.Linear(*shape[::-1], bias=False, dtype=dtype)})
    made = Adapter({"layer": random_layer(net["layer"], "linear", 4, axis, dtype=f32)})
    layer = with_strength(net, made, 0.0).layers["layer"]
    weight = net["layer"].weight.detach()
    again = merge_dora(weight, layer.lora_A, layer.lora_B, layer.magnitude, magnitude_axis=axis)
    assert torch.equal(again, weight) and not layer.lora_B.any() and layer.magnitude is not None


def test_strength_of_plain_lora():
    net = Net("linear")
    made = adapter(net, "linear", 2, None)
    weaker = with_strength(net, made, -0.3)
    assert weaker.layers["first"].magnitude is None
    assert relative(merged(net.first, weaker.layers["first"]), dense_sum(net, "first", [made], [-0.3])) < 1e-12


def test_the_strength_of_this_packages_layers():
    """Of a model; by name there is none, and nothing changes where something is wrong."""
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7))
    x = torch.randn(3, 7)
    apply_dora(net, rank=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    set_dora_strength(net, 0)
    assert torch.equal(net(x), net[1].base_layer(net[0].base_layer(x)))
    set_dora_strength(net, 0.25)
    for layer in net:
        x = torch.randn(2, layer.in_features)
        layer.strength = 1.0
        full = layer(x)
        layer.strength = 0.25
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.25 * (full - layer.base_layer(x)))
    net[1].merge()
    for arguments, message in (((0.5,), "1 is merged"), ((0.5, "default"), "no patched layer has a DoRA adapter")):
        with pytest.raises(ValueError, match=message):
            set_dora_strength(net, *arguments)
    assert net[0].strength == 0.25


# bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "^weights: expected 2, one for each adapter, got 1"),
        ({"weights": [1.0, float("nan")]}, ValueError, "^weights: expected a finite number, got nan"),
        ({"weights": [1.0, "2"]}, TypeError, "^weights: expected numbers, got str"),
        ({"adapters": [], "weights": []}, ValueError, "^adapters: expected at least one"),
        ({"adapters": [Adapter({})], "weights": [1.0]}, ValueError, "^adapters: expected layers"),
        ({"adapters": ["x", "y"]}, TypeError, r"^adapters: expected Adapter, got str; read_adapter\(path\) gives one"),
        ({"rank": 0}, ValueError, "^rank: expected at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "^rank: expected an int or None, got float"),
        ({"model": None}, TypeError, r"^model: expected a torch\.nn\.Module, got NoneType"),
        ({"model": nn.ModuleDict({"first": nn.Linear(17, 11)})}, ValueError, "second: the model has no such layer"),
        (
            {"model": nn.ModuleDict({"first": nn.Linear(17, 12), "second": nn.Linear(17, 11)})}, ValueError,
            "first belongs to a linear with 17 inputs and 11 outputs, the model's is a linear with 17 and 12",
        ),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    net = Net("linear")
    values = {"model": net, "adapters": [adapter(net, "linear", 2)] * 2, "weights": [0.5, 0.5], **arguments}
    with pytest.raises(error, match=message):
        combine_adapters(values.pop("model"), values.pop("adapters"), values.pop("weights"), **values)


def test_grouped_and_quantised_layers_are_refused():
    net = nn.ModuleDict({"first": nn.Conv1d(4, 6, 3, groups=2)})
    layer = AdapterLayer("conv1d", torch.randn(2, 4, 3), torch.randn(6, 1, 1), None, 1.0)
    with pytest.raises(ValueError, match="first: adapters of a grouped convolution"):
        combine_adapters(net, [Adapter({"first": layer})], [1.0])
    packed = Net("linear")
    made = adapter(packed, "linear", 2)
    packed.first.weight = nn.Parameter(torch.zeros(11, 17, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="first: expected a floating-point weight, got torch.int8"):
        combine_adapters(packed, [made], [1.0])


def test_names_with_underscores(tmp_path):
    """As kohya's files have them: those of the model."""
    pytest.importorskip("safetensors")
    net = nn.ModuleDict({"to_q": nn.ModuleDict({"first": nn.Linear(7, 5)})})
    made = Adapter({"to_q.first": random_layer(net["to_q"]["first"], "linear", 2, dtype=f32)})
    save_adapter(made, tmp_path, format="kohya")
    weaker = with_strength(net, read_adapter(tmp_path, magnitude_axis="out"), 0.5)
    module, expected = net["to_q"]["first"], with_strength(net, made, 0.5)
    assert relative(merged(module, weaker.layers["to_q.first"]), merged(module, expected.layers["to_q.first"])) < 1e-6
    save_adapter(weaker, tmp_path / "peft")
    assert read_adapter(tmp_path / "peft", net).layers.keys() == {"to_q.first"}

"""DoRA on quantised base layers, of the real libraries on the CPU: against the dense layer that they stand for.

The oracle is a float64 layer on the weight dequantised before the first evaluation, never stock PEFT: in evaluation
bitsandbytes repacks 4-bit weights on some CPUs, after which stock dequantises another weight.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, f32, f64, saved_by
from peft import LoraConfig, get_peft_model
from peft_models import (
    lora_layers,
    one_thread,  # noqa: F401
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dora_kernels
from dora_kernels.modules import dequantize
from dora_kernels.peft.state import SWITCH, dora_adapters

OUT, IN = 96, 128


def bnb_4bit(linear, **options):
    bnb = pytest.importorskip("bitsandbytes")
    values = {"quant_type": "nf4", "compute_dtype": linear.weight.dtype, "compress_statistics": True, **options}
    layer = bnb.nn.Linear4bit(IN, OUT, bias=linear.bias is not None, **values)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bnb_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=linear.bias is not None, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def hqq(linear, **options):
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(**{"nbits": 4, "group_size": 64, "axis": 1, **options})
    return core.HQQLinear(copy.deepcopy(linear), config, compute_dtype=linear.weight.dtype, device="cpu")


def torchao(linear, name="Int8WeightOnlyConfig", **options):
    quantization = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(net, getattr(quantization, name)(**options))
    return net[0]


FORMATS = {
    "nf4": bnb_4bit,
    "nf4, plain scales": lambda linear: bnb_4bit(linear, compress_statistics=False),
    "fp4": lambda linear: bnb_4bit(linear, quant_type="fp4"),
    "int8": bnb_8bit,
    "hqq 4": hqq,
    "hqq 8": lambda linear: hqq(linear, nbits=8),
    "hqq 3": lambda linear: hqq(linear, nbits=3),
    "hqq 2, axis 0": lambda linear: hqq(linear, nbits=2, axis=0),
    "hqq 1": lambda linear: hqq(linear, nbits=1, group_size=32),
    "torchao int8": torchao,
    "torchao int8, 2": lambda linear: torchao(linear, version=2),
    "torchao float8": lambda linear: torchao(linear, "Float8WeightOnlyConfig"),
}
KINDS = pytest.mark.parametrize("kind", FORMATS)


def linear_layer(dtype=bf16, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(3)
    return linear.to(dtype)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Parameter(torch.ones(()), requires_grad=False)  # PEFT wants one to see the device by

    def forward(self, x):
        return self.layer(x)


def peft_model(kind, dtype=bf16, bias=True, **options):
    """A stock model on the quantised layer, its adapter far from where it starts, and the dense weight and bias."""
    linear = linear_layer(dtype, bias)
    net = Net(FORMATS[kind](linear))
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = "4" in kind and "hqq" not in kind, kind == "int8"
    weight = dense(net.layer)
    values = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["layer"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net, LoraConfig(**values))
    for name in list(model.peft_config):
        move(model, weight, name)
    return model, weight, linear.bias


def dense(layer):
    """Of a layer that has not been called yet, by its library."""
    kind = type(layer.weight).__name__ if hasattr(layer, "weight") else ""
    if kind == "Params4bit":
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).detach().to(f64)
    if kind == "Int8Params":
        return (layer.weight.data.double() * layer.weight.SCB.double().view(-1, 1) / 127).detach()
    return (layer.dequantize() if hasattr(layer, "W_q") else layer.weight.dequantize()).detach().to(f64)


@torch.no_grad()
def move(model, weight, name, seed=2):
    generator = torch.Generator().manual_seed(seed)
    layer = lora_layers(model)[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a.copy_(torch.randn(a.shape, generator=generator) / IN**0.5)
    b.copy_(torch.randn(b.shape, generator=generator) * weight.std() * (IN / b.shape[1]) ** 0.5)
    if name in dora_adapters(layer):
        norm = (weight + layer.scaling[name] * b.to(f64) @ a.to(f64)).norm(dim=1)
        m = layer.lora_magnitude_vector[name].weight
        m.copy_(norm * (0.5 + torch.rand(norm.shape, generator=generator)))


def oracle(model, weight, bias, x, names=("default",)):
    """The layer in float64, its gradients by autograd."""
    layer = lora_layers(model)[0]
    x = x.detach().to(f64).requires_grad_()
    leaves = {"x": x}
    y = x @ weight.t()
    for name in names:
        factors = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_magnitude_vector[name].weight)
        a, b, m = (t.detach().to(f64).requires_grad_() for t in factors)
        leaves |= {f"A {name}": a, f"B {name}": b, f"m {name}": m}
        norm = (weight + layer.scaling[name] * b @ a).norm(dim=1).detach()
        y = m / norm * (y + layer.scaling[name] * x @ a.t() @ b.t())
    y = y if bias is None else y + bias.to(f64)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def solve(model, x, names=("default",)):
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = model(x)
    y.double().square().sum().backward()
    layer = lora_layers(model)[0]
    grads = {"x": x.grad}
    for name in names:
        parts = (layer.lora_A[name], layer.lora_B[name], layer.lora_magnitude_vector[name])
        grads |= {f"{key} {name}": part.weight.grad for key, part in zip("ABm", parts, strict=True)}
    return {"y": y.detach(), **grads}


def off(result, wanted):
    return ((result.to(f64) - wanted).norm() / wanted.norm()).item()


def layer_error(model, weight, bias, x):
    """How far the quantised layer's own product is from the dense weight's: it may quantise activations, or round."""
    with torch.no_grad():
        y = lora_layers(model)[0].base_layer.forward(x)
        return off(y, x.to(f64) @ weight.t() + (0 if bias is None else bias.to(f64)))


def batch(dtype=bf16):
    return torch.randn(2, 9, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def check(results, wanted, error, dtype):
    """Each within eight roundings, or four times what the base layer itself is off by."""
    for name, result in results.items():
        assert off(result, wanted[name]) <= max(8 * torch.finfo(dtype).eps, 4 * error), (
            f"{name} is off by {off(result, wanted[name]):.1e}, the layer itself by {error:.1e}"
        )


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_training_and_evaluation(kind, bias, dtype):
    """In training, in evaluation after it, and in training again: of the same weight each time."""
    model, weight, b = peft_model(kind, dtype, bias)
    x = batch(dtype)
    error = layer_error(model.train(), weight, b, x.clone().requires_grad_())
    handle = dora_kernels.patch_peft(model)
    assert handle.patched == ["base_model.model.layer"], handle.skipped
    wanted = oracle(model, weight, b, x)
    check(solve(model, x), wanted, error, dtype)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            y = model(x)
    assert y.dtype == dtype
    in_evaluation = max(error, layer_error(model, weight, b, x))
    check({"y": y}, wanted, in_evaluation, dtype)
    # Repacked for evaluation, bitsandbytes' 4-bit product has no gradient any more, with plain LoRA either.
    base = lora_layers(model)[0].base_layer
    if kind in ("nf4", "nf4, plain scales", "fp4") and base.weight.quant_state.absmax.dtype == bf16:
        return
    cache = vars(lora_layers(model)[0])[SWITCH]["default"]
    assert cache.computed <= 3 and cache.reused >= 1, "an evaluation computes its norm once"
    check(solve(model.train(), x), wanted, in_evaluation, dtype)


@KINDS
def test_the_norm(kind, monkeypatch):
    """By blocks of rows of the dequantised weight, small ones here: exact to float32, nothing of W's size made."""
    model, weight, _ = peft_model(kind)
    dora_kernels.patch_peft(model)
    layer = lora_layers(model)[0]
    variant = layer.lora_variant["default"]
    a, b = (part["default"].weight.detach().to(f64) for part in (layer.lora_A, layer.lora_B))
    wanted = (weight + layer.scaling["default"] * b @ a).norm(dim=1)
    monkeypatch.setattr(dequantize, "BLOCK_ELEMENTS", 1024)
    blocks = [block.numel() for _, block in dequantize.row_blocks(layer.base_layer)()]
    assert sum(blocks) == OUT * IN
    if kind != "hqq 3":  # whose parts end within rows
        assert max(blocks) <= max(1024, 32 * IN), "nearly the whole weight at once"
    norm = variant.divisor(layer, "default", variant.read(layer, "default"))
    assert off(norm, wanted) < 1e-6
    assert torch.equal(dequantize.dequantized(layer.base_layer).to(f64), weight) or kind == "int8"


@KINDS
def test_under_autocast(kind):
    """Activations keep the base result's dtype (peft issue 1692)."""
    model, weight, b = peft_model(kind, f32)
    x = batch(f32)
    dora_kernels.patch_peft(model)
    with torch.autocast("cpu", bf16):
        expected = lora_layers(model)[0].base_layer.forward(x).dtype
        results = solve(model, x)
        add(model, weight)
        model.base_model.set_adapter(["default", "second"])
        assert model(x).dtype == expected
    assert results["y"].dtype == expected
    check(results, oracle(model, weight, b, x), 4 * torch.finfo(bf16).eps, bf16)
    dropping, _, _ = peft_model(kind, bf16, lora_dropout=0.4)
    dora_kernels.patch_peft(dropping)
    with torch.autocast("cpu", bf16):
        assert dropping(batch(bf16)).dtype == bf16
        # On a GPU PEFT leaves the dtype to the variant.
        layer = lora_layers(dropping)[0]
        result = layer.base_layer(batch(bf16))
        dora = layer.lora_variant["default"].forward(layer, active_adapter="default", x=batch(bf16), result=result)
        assert dora.dtype == result.dtype


@KINDS
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_hooks_fire_once(kind, part):
    model, weight, b = peft_model(kind, f32)
    x = batch(f32)
    error = layer_error(model, weight, b, x.clone().requires_grad_())
    dora_kernels.patch_peft(model)
    module = getattr(lora_layers(model)[0], part)
    fired = []
    (module if part == "base_layer" else module["default"]).register_forward_hook(lambda *_: fired.append(part))
    check(solve(model, x), oracle(model, weight, b, x), error, f32)
    assert fired == [part]


def add(model, weight, name="second", **options):
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["layer"], **options))
    move(model, weight, name, 5)


@KINDS
def test_several_adapters(kind):
    model, weight, b = peft_model(kind, f32)
    x = batch(f32)
    error = layer_error(model, weight, b, x.clone().requires_grad_())
    dora_kernels.patch_peft(model)
    add(model, weight)
    for names in (["default", "second"], ["second"], ["default"]):
        model.base_model.set_adapter(names)
        check(solve(model, x, names), oracle(model, weight, b, x, names), error, f32)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), lora_layers(model)[0].base_layer.forward(x))


@KINDS
@pytest.mark.parametrize("dropout", ["peft", "lora"])
def test_dropout(kind, dropout):
    model, weight, b = peft_model(kind, f32, lora_dropout=0.4)
    x = batch(f32)
    error = layer_error(model, weight, b, x.clone().requires_grad_())
    dora_kernels.patch_peft(model, dropout=dropout)
    layer = lora_layers(model)[0]
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x).to(f64)
    a, b_, m = (
        part["default"].weight.detach().to(f64) for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    s = layer.scaling["default"]
    g = m / (weight + s * b_ @ a).norm(dim=1)
    low = s * dropped @ a.t() @ b_.t()
    base = x.to(f64) @ weight.t()
    wanted = base + (g - 1) * (dropped @ weight.t()) + g * low if dropout == "peft" else g * (base + low)
    check({"y": y.detach()}, {"y": wanted + b.detach().to(f64)}, error, f32)
    y.sum().backward()


@KINDS
def test_a_step_of_an_optimizer_is_seen(kind):
    model, weight, b = peft_model(kind, f32)
    x = batch(f32)
    error = layer_error(model, weight, b, x.clone().requires_grad_())
    dora_kernels.patch_peft(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        check(solve(model, x), oracle(model, weight, b, x), error, f32)
        optimizer.step()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "hqq" not in kind])  # whose layers cannot be copied
def test_copies(kind):
    model, *_ = peft_model(kind, f32)
    dora_kernels.patch_peft(model)
    x = batch(f32)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)


@KINDS
def test_restored(kind):
    model, *_ = peft_model(kind, f32)
    stock = type(lora_layers(model)[0])
    handle = dora_kernels.patch_peft(model)
    model(batch(f32))
    handle.restore()
    layer = lora_layers(model)[0]
    assert type(layer) is stock and SWITCH not in vars(layer)
    assert type(layer.lora_variant["default"]).__module__.startswith("peft.")


@KINDS
def test_a_batch_of_several_adapters(kind):
    model, weight, _ = peft_model(kind, f32)
    dora_kernels.patch_peft(model)
    add(model, weight)
    model.eval()
    x = torch.cat([batch(f32), batch(f32)])
    with torch.no_grad():
        model(x)  # repacked
        mixed = model(x, adapter_names=["second", "__base__", "default", "second"])
        for row, name in enumerate(["second", None, "default", "second"]):
            if name is not None:
                model.set_adapter(name)
            with model.disable_adapter() if name is None else contextlib.nullcontext():
                torch.testing.assert_close(mixed[row], model(x)[row], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_nothing_of_the_weights_size(kind, monkeypatch):
    """A training step makes no dense copy of W beyond those of the library's own product; stock makes several."""
    monkeypatch.setattr(dequantize, "BLOCK_ELEMENTS", 1024)
    monkeypatch.setattr("dora_kernels.core.products.BLOCK_ELEMENTS", 1024)
    monkeypatch.setattr("dora_kernels.core.products._kept.block", None)
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape == (OUT, IN):
                counts.append(str(func))
            return out

    def step(model):
        counts.clear()
        with Count():
            model(x).sum().backward()
        return len(counts)

    x = batch(bf16)[:1, :4]
    plain, *_ = peft_model(kind, use_dora=False)
    of_the_product = step(plain)
    model, *_ = peft_model(kind)
    handle = dora_kernels.patch_peft(model)
    assert step(model) <= of_the_product
    handle.restore()
    assert step(model) > of_the_product


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_saved(kind):
    """What plain LoRA on this layer saves, and one activation."""

    def held(use_dora):
        model, *_ = peft_model(kind, use_dora=use_dora)
        if use_dora:
            dora_kernels.patch_peft(model)
        x = batch().requires_grad_()
        _, saved = saved_by(lambda: model(x))
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for at, size in kept.items() if at not in own)

    activation = 18 * OUT * 2
    assert held(True) <= held(False) + activation + 2 * 4 * OUT

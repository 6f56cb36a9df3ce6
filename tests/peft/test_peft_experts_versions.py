"""DoRA on a module of experts of one's own: also with versions of PEFT and transformers that have no such models."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import dora_kernels
from dora_kernels.peft.experts import ParamWrapper

pytestmark = pytest.mark.usefixtures("globally")

COUNT, HIDDEN, INNER = 3, 8, 5
X = torch.randn(7, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Experts(nn.Module):
    """Stacks ``[E, out, in]``; row i goes to expert ``i % E``."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("up", (COUNT, INNER, HIDDEN)), ("down", (COUNT, HIDDEN, INNER))):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))

    def forward(self, x):
        parts = [F.linear(F.silu(F.linear(x[e::COUNT], self.up[e])), self.down[e]) for e in range(COUNT)]
        y = torch.empty_like(x)
        for e, part in enumerate(parts):
            y[e::COUNT] = part
        return y


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


def adapted(use_dora=True, name="default", moved=True):
    config = LoraConfig(
        r=2, lora_alpha=6, use_dora=use_dora, target_modules=[], target_parameters=["experts.up", "experts.down"]
    )
    model = get_peft_model(Model(), config, adapter_name=name, autocast_adapter_dtype=False)
    return move(model) if moved else model


@torch.no_grad()
def move(model):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def dense(model):
    """The module with its adapted weights formed, and the leaves that they are made of."""
    base, leaves = Model(), {}
    for layer in (m for m in model.modules() if isinstance(m, ParamWrapper)):
        weight, a, b, m, _ = layer.problem("default")
        own = leaves[layer.parameter_name] = [None if t is None else t.detach().requires_grad_() for t in (a, b, m)]
        v = weight + layer.scaling["default"] * (own[1] @ own[0])
        if own[2] is not None:
            v = (own[2] / torch.linalg.vector_norm(v, dim=2).detach()).unsqueeze(2) * v
        del base.experts._parameters[layer.parameter_name]
        setattr(base.experts, layer.parameter_name, v)
    return base, leaves


def test_dora(tmp_path):
    fresh = adapted(moved=False)
    torch.testing.assert_close(fresh(X), Model()(X), rtol=1e-12, atol=1e-12)
    model = adapted()
    (expected, leaves), y = dense(model), model(X)
    torch.testing.assert_close(y, expected(X), rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected(X).square().sum().backward()
    for layer in (m for m in model.modules() if isinstance(m, ParamWrapper)):
        m, wanted = layer.lora_magnitude_vector["default"].weight, leaves[layer.parameter_name][2]
        torch.testing.assert_close(m.grad, wanted.grad, rtol=1e-9, atol=1e-9)
        assert all(part["default"].weight.grad.ne(0).any() for part in (layer.lora_A, layer.lora_B))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Model(), tmp_path, autocast_adapter_dtype=False)(X), y)
    before = model.get_base_model().experts.get_base_layer().up.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(X), y, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model().experts.get_base_layer().up, before)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), Model()(X), rtol=0, atol=0)


@pytest.mark.skipif(
    (0, 18) <= tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20),
    reason="PEFT 0.18 and 0.19 allow one adapter with target_parameters",
)
def test_several_adapters():
    model = adapted()
    y = model(X)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    torch.testing.assert_close(model(X), Model()(X), rtol=1e-12, atol=1e-12)
    model.set_adapter("default")
    assert torch.equal(model(X), y)


def test_plain_lora_while_the_patch_is_on():
    model = adapted(use_dora=False)
    stock = model(X)
    dora_kernels.patch_peft(model)
    torch.testing.assert_close(model(X), stock, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(X), dense(model)[0](X), rtol=1e-10, atol=1e-10)


def test_a_misspelt_parameter():
    """Among right ones PEFT says nothing."""
    config = LoraConfig(r=2, use_dora=True, target_modules=[], target_parameters=["experts.up", "experts.dwn"])
    said = r"^target_parameters: the model has no 'experts\.dwn' \(the nearest is 'experts\.down'\)$"
    with pytest.warns(RuntimeWarning, match=said):
        model = get_peft_model(Model(), config)
    assert sum(isinstance(layer, ParamWrapper) for layer in model.modules()) == 1


@pytest.mark.parametrize("excluded", [["experts.up"], ["experts"], r".*experts\.up"], ids=["name", "module", "pattern"])
def test_an_excluded_parameter(excluded):
    """PEFT adapts it all the same."""
    config = LoraConfig(
        r=2, use_dora=True, target_modules=[], target_parameters=["experts.up"], exclude_modules=excluded
    )
    said = r"^exclude_modules: PEFT does not apply it to target_parameters, so \S*experts\.up get adapters; name those"
    with pytest.warns(RuntimeWarning, match=said):
        model = get_peft_model(Model(), config)
    assert sum(isinstance(layer, ParamWrapper) for layer in model.modules()) == 1

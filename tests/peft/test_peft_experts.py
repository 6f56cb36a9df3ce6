"""The life of LoRA and DoRA adapters on the experts of a small Qwen3-MoE."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from experts_models import IDS, IMPLEMENTATIONS, dense, qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import one_thread  # noqa: F401
from safetensors.torch import load_file, save_file

import dora_kernels
from dora_kernels.peft.experts import ParamWrapper
from dora_kernels.peft.state import switch

pytestmark = pytest.mark.usefixtures("globally")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(use_dora=True, **options):
    return LoraConfig(**{
        "use_dora": use_dora, "r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": TARGETS, **options,
    })  # fmt: skip


def trained(model, seed=5):
    """Adapters as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dora(base=None, **options):
    return trained(get_peft_model(qwen3_moe() if base is None else base, config(**options)))


def logits(model):
    return model(IDS).logits


def gradients(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def wrappers(model):
    return [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing(dtype, globally):
    base = qwen3_moe(dtype=dtype)
    before = logits(base)
    if dtype == torch.float32:
        model = get_peft_model(base, config(target_modules="all-linear", target_parameters=None))
        assert len(globally.patched) == 14  # four projections, the router and two stacks, twice
    else:  # of linear layers PEFT's first magnitude is rounded to bfloat16, see exact_init
        model = get_peft_model(base, config(target_parameters=[*TARGETS, "mlp.gate.weight"]))
    assert torch.equal(logits(model), before) and not globally.skipped
    (gate,) = {tuple(layer.lora_magnitude_vector["default"].weight.shape) for layer in wrappers(model)} - {
        (6, 48), (6, 32),
    }  # fmt: skip
    assert gate == (6,)


def test_gradients_are_those_of_the_dense_formula():
    """Of a whole model in float64, routed and gated; then PEFT's LoRA with m fixed to the norm is the same function."""
    model = dora(qwen3_moe("eager", torch.float64))
    grads, layers, oracles = gradients(model), wrappers(model), []
    for layer in layers:
        parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        weight = layer.get_base_layer().get_parameter(layer.parameter_name)
        oracles.append(dense(weight, *(part["default"].weight for part in parts), 2.0))
    base = model.get_base_model()
    inside = {id(layer.get_base_layer()): layer.get_base_layer() for layer in layers}
    with model.disable_adapter():
        for module in inside.values():
            module.__dict__.update({
                layer.parameter_name: oracle.formed
                for layer, oracle in zip(layers, oracles) if layer.get_base_layer() is module
            })  # fmt: skip
        loss = base(input_ids=IDS, labels=IDS).loss
        loss.backward()
        for module in inside.values():
            for layer in layers:
                module.__dict__.pop(layer.parameter_name, None)
    for layer, oracle in zip(layers, oracles):
        for part in ("lora_A", "lora_B", "magnitude"):
            ours = getattr(layer, part if part != "magnitude" else "lora_magnitude_vector")["default"].weight
            name = next(name for name, p in model.named_parameters() if p is ours)
            theirs = getattr(oracle, part).grad
            assert (grads[name] - theirs).abs().max() <= 1e-10 * theirs.abs().max(), name


def test_with_the_magnitude_at_the_norm_it_is_pefts_lora():
    lora = trained(get_peft_model(qwen3_moe(), config(use_dora=False)))
    model = get_peft_model(qwen3_moe(), config())
    with torch.no_grad():
        for ours, theirs in zip(wrappers(model), wrappers(lora)):
            for part in ("lora_A", "lora_B"):
                getattr(ours, part)["default"].weight.copy_(getattr(theirs, part)["default"].weight)
            weight, a, b, m, _ = ours.problem("default")
            m.copy_(torch.linalg.vector_norm(weight + 2.0 * b @ a, dim=2))
    ours, theirs = gradients(model), gradients(unpatched(lora))
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-5, atol=1e-6)
    shared = ours.keys() & theirs.keys()
    assert shared == theirs.keys() and ours.keys() - theirs.keys()


def unpatched(model):
    """The same model on PEFT's own code."""
    from dora_kernels.peft.kinds import restore_layers

    restore_layers(model)
    assert not wrappers(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_lora_has_pefts_numbers_and_files(dtype, tmp_path):
    stock = unpatched(trained(get_peft_model(qwen3_moe(dtype=dtype), config(use_dora=False))))
    model = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(model)
    assert len(handle.patched) == 4 and len(wrappers(model)) == 4
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits(model), logits(stock), rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(model), gradients(stock)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    one, two = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "stock"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    handle.restore()
    assert not wrappers(model) and torch.equal(logits(model), logits(stock))


def test_saving_and_loading(tmp_path):
    model = dora()
    model.save_pretrained(tmp_path)
    dora_kernels.check_adapter(tmp_path, qwen3_moe())
    shapes = {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert shapes[f"{experts}.lora_magnitude_vector"] == (6, 32)
    assert shapes[f"{experts}.base_layer.lora_magnitude_vector"] == (6, 48)
    again = PeftModel.from_pretrained(qwen3_moe(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("use_dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_and_unmerging(dtype, use_dora):
    model = dora(qwen3_moe(dtype=dtype), use_dora=use_dora)
    before = logits(model)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    for layer in wrappers(model):
        name = next(n for n, p in model.named_parameters() if p is layer._stored())
        oracle = dense(
            kept[name], *(getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B")),
            layer.lora_magnitude_vector["default"].weight if use_dora else None, 2.0,
        )  # fmt: skip
        once = oracle.formed.to(dtype)
        same = (layer._stored() == once).float().mean()
        assert same > 0.99 if dtype == torch.bfloat16 else (layer._stored() - once).abs().max() < 1e-6
    model.unmerge_adapter()
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_unmerging_without_a_copy(globally):
    model = dora()
    dora_kernels.patch_peft(model, keep_unmerged=False)
    before = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_several_adapters():
    model = dora()
    first = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.add_adapter("two", config(r=2))
    model.add_adapter("lora", config(use_dora=False, r=2))
    assert torch.equal(logits(model), first)
    trained(model, 6)
    first = logits(model)
    model.set_adapter("lora")
    second = logits(model)
    model.base_model.set_adapter(["default", "two", "lora"])
    together = logits(model)
    assert (together - first).abs().max() > 1e-3 < (together - second).abs().max()
    model.merge_adapter(adapter_names=["default", "two", "lora"])
    torch.testing.assert_close(logits(model), together, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), together)
    model.delete_adapter("two")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_strength():
    model = dora().eval()
    with torch.no_grad(), model.disable_adapter():
        base = logits(model)
    dora_kernels.set_dora_strength(model, 0.0)
    assert torch.equal(logits(model), base)
    dora_kernels.set_dora_strength(model, 0.5)
    half = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = dora()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_and_mixed_dtypes(implementation):
    """float32 adapters on bfloat16 experts, and autocast on a float32 model."""
    exact = dora(qwen3_moe(implementation))
    expected, mixed = logits(exact), dora(qwen3_moe(implementation, torch.bfloat16))
    assert {p.dtype for name, p in mixed.named_parameters() if "lora_" in name} == {torch.float32}
    assert (logits(mixed).float() - expected).norm() <= 2e-2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(exact).float() - expected).norm() <= 2e-2 * expected.norm()
        assert all(gradient.isfinite().all() for gradient in gradients(exact).values())


def test_generation():
    model = dora().eval()
    options = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), expected)
    with dora_kernels.frozen_norms(model) as frozen:
        assert len(frozen) == 4
        assert torch.equal(model.generate(**options), expected)


def test_copies():
    model = dora()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    plain = model.merge_and_unload()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)


def test_restoring_leaves_dora_on_experts(globally):
    """PEFT has no DoRA that they could be restored to."""
    model = dora()
    expected = logits(model)
    globally.restore()
    assert len(wrappers(model)) == 4 and torch.equal(logits(model), expected)


def test_weights_that_are_formed():
    """A forward that reads its weights in another way gets them whole, with their history, and says so once."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("sk,enk->sen", x, self.w)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd()

        def forward(self, x):
            return self.odd(x)

    torch.manual_seed(0)
    model = trained(get_peft_model(Outer(), config(target_parameters=["odd.w"])))
    x = torch.randn(2, 5)
    with pytest.warns(RuntimeWarning, match=r"odd\.w: the layer's forward .* are formed"):
        y = model(x)
    y.sum().backward()
    (layer,) = wrappers(model)
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    oracle = dense(layer._stored(), *(part["default"].weight for part in parts), 2.0)
    torch.einsum("sk,enk->sen", x.double(), oracle.formed).sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, oracle.lora_A.grad.float(), rtol=1e-4, atol=1e-5)


DAMAGE = {
    "no_magnitude": (lambda t, k: t.pop(f"{k}.lora_magnitude_vector"), "has no lora_magnitude_vector"),
    "nan": (lambda t, k: t[f"{k}.lora_A.weight"].fill_(float("nan")), "not finite"),
    "rank": (lambda t, k: t.update({f"{k}.lora_A.weight": t[f"{k}.lora_A.weight"][:-1]}), "expected 6 experts times"),
    "b": (lambda t, k: t.update({f"{k}.lora_B.weight": t[f"{k}.lora_B.weight"][:, :-1]}), "does not fit lora_A"),
    "experts": (
        lambda t, k: t.update({f"{k}.lora_magnitude_vector": t[f"{k}.lora_magnitude_vector"][:3]}),
        "expected 3 experts times",
    ),
    "outputs": (
        lambda t, k: t.update({f"{k}.lora_magnitude_vector": t[f"{k}.lora_magnitude_vector"][:, :5]}),
        r"\[6, 5\]: expected \[6, 32\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_file(damage, said, tmp_path):
    """`check_adapter` names the file and the parameter; PEFT would load some of these with a warning at most."""
    dora().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, "base_model.model.model.layers.1.mlp.experts")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match=said) as caught:
        dora_kernels.check_adapter(tmp_path, qwen3_moe())
    assert "layers.1.mlp.experts" in str(caught.value)


def test_a_file_of_another_models_experts(tmp_path):
    dora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.* belong to another parameter than the model's \[4, 48, 32\]$"):
        dora_kernels.check_adapter(tmp_path, qwen3_moe(num_experts=4))
    with pytest.raises(ValueError, match=r"no tensors for model\.layers\.2\.mlp\.experts\.gate_up_proj"):
        dora_kernels.check_adapter(tmp_path, qwen3_moe(num_hidden_layers=3))


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_weighted_sums(how):
    """Exact with the sum of the ranks: what the new adapter adds to the weights is the weighted sum."""
    model = dora()
    model.add_adapter("two", config(r=2))
    trained(model, 6)
    weights = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        before = [layer._stored().clone() for layer in wrappers(model)]
        model.merge_adapter()
        weights[name] = [layer._stored() - base for layer, base in zip(wrappers(model), before)]
        model.unmerge_adapter()
    model.add_weighted_adapter(["default", "two"], [0.6, -0.7], "sum", combination_type=how, svd_rank=6)
    model.set_adapter("sum")
    model.merge_adapter()
    for layer, base, one, two in zip(wrappers(model), before, *weights.values()):
        torch.testing.assert_close(layer._stored() - base, 0.6 * one - 0.7 * two, rtol=1e-4, atol=1e-5)


def test_weighted_sums_of_experts_in_several_processes():
    """Each process could write its own experts only, and a saved adapter would have those of one."""
    model = dora()
    switch(wrappers(model)[0]).group = "as expert parallelism leaves it"
    before = set(model.peft_config)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: the layer is split over processes"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="svd")
    assert set(model.peft_config) == before


def test_a_file_of_an_older_peft(tmp_path):
    """Before 0.19 A and B were exchanged. Where outputs and inputs are as many in all stacks, the version tells."""
    dora().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "layers.0.mlp.experts.lora_A" in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        tensors[key] = b.view(32, 4, 6).permute(2, 1, 0).reshape(24, 32).contiguous()
        tensors[key.replace("lora_A", "lora_B")] = a.view(6, 4, 24).permute(2, 1, 0).reshape(24, 24).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: .* are exchanged, as PEFT before 0\.19"):
        dora_kernels.check_adapter(tmp_path, qwen3_moe())
    square = {"moe_intermediate_size": 16}  # gate and up have 32 outputs and 32 inputs
    for targets, problem in (
        (TARGETS, None),  # down_proj tells
        (["experts.gate_up_proj"], r"gate_up_proj: .* are exchanged, as PEFT before 0\.19"),
    ):
        folder = tmp_path / str(len(targets))
        dora(qwen3_moe(**square), target_parameters=targets).save_pretrained(folder)
        dora_kernels.check_adapter(folder, qwen3_moe(**square))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.18.1"}))
        with pytest.raises(ValueError, match=problem) if problem else nullcontext():
            dora_kernels.check_adapter(folder, qwen3_moe(**square))


def test_a_parameter_that_is_never_read():
    """It warns once: no part of an adapter is left out without a word."""

    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 4, 4))

        def forward(self, x):
            return x @ self._parameters["w"][0]

    model = get_peft_model(torch.nn.Sequential(OrderedDict(blind=Blind())), config(target_parameters=["blind.w"]))
    with pytest.warns(RuntimeWarning, match=r"blind\.w: a call of its module has not read this parameter"):
        model(torch.randn(2, 4))


def test_a_first_norm_in_factored_form():
    """Experts large enough for the form that works with products of the rank: also in bfloat16, whose W is upcast."""
    model = qwen3_moe(
        dtype=torch.bfloat16, hidden_size=1024, moe_intermediate_size=1024, num_experts=2, num_hidden_layers=1,
        vocab_size=64, head_dim=8,
    )  # fmt: skip
    model = get_peft_model(model, config(target_parameters=TARGETS[:1]))
    (layer,) = wrappers(model)
    weight, _, _, m, _ = layer.problem("default")
    torch.testing.assert_close(m, torch.linalg.vector_norm(weight.float(), dim=2), rtol=1e-5, atol=0)


def test_partitioned_adapters_are_refused():
    """As DeepSpeed ZeRO-3 leaves them."""
    model = dora()
    layer = wrappers(model)[0]
    layer.lora_A["default"].weight.data = torch.empty(0)
    with pytest.raises(dora_kernels.UnsupportedError, match=r"0\.mlp\.experts\.down_proj: .*'default' .*ZeRO-3"):
        model(IDS)
    assert "gate_up_proj" not in vars(layer.get_base_layer())  # nothing is left in the parameter's place

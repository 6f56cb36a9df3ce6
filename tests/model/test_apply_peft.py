"""Models under `apply_dora` against PEFT's `get_peft_model`, tensor by tensor, with PEFT's adapter copied over."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import f64
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft_models import base_model, batch, move_adapter, one_thread  # noqa: F401

from dora_kernels import (
    DoRALinear,
    adapted_layers,
    apply_dora,
    mark_only_dora_trainable,
    merge_all,
    trainable_summary,
)

PREFIX = "base_model.model."


def pair(base, **options):
    """A PEFT model whose adapter has been moved, and ours with the same."""
    dtype = next(base.parameters()).dtype
    stock = move_adapter(get_peft_model(copy.deepcopy(base), LoraConfig(use_dora=True, **options))).to(dtype)
    ours = copy.deepcopy(base)
    names = apply_dora(
        ours, options["target_modules"], rank=options["r"], alpha=options["lora_alpha"],
        use_rslora=options.get("use_rslora", False), rank_pattern=options.get("rank_pattern"),
        alpha_pattern=options.get("alpha_pattern"), exclude_modules=options.get("exclude_modules"),
        adapter_dtype=dtype,
    )  # fmt: skip
    mark_only_dora_trainable(ours)
    state = {name.removeprefix(PREFIX): t for name, t in get_peft_model_state_dict(stock).items()}
    assert not ours.load_state_dict(state, strict=False).unexpected_keys
    pefts = [n.removeprefix(PREFIX) for n, m in stock.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")]
    assert names == pefts
    for name, layer in adapted_layers(ours).items():
        other = stock.get_submodule(PREFIX + name)
        assert (layer.rank, layer.alpha, layer.scaling) == (
            other.r["default"], other.lora_alpha["default"], other.scaling["default"]
        )  # fmt: skip
    return stock, ours


def results(model, forward):
    """The output, and every gradient by its name without PEFT's additions."""
    model.zero_grad()
    y = forward(model)
    y.square().sum().backward()
    grads = {
        name.removeprefix(PREFIX).replace(".default.weight", ".weight").replace(".default", "")
        .replace("vector.weight", "vector"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }  # fmt: skip
    return {"y": y.detach(), **grads}


MODELS = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    ("llama", {"target_modules": r".*\.layers\.1\.(mlp|self_attn)\.(q|up)_proj", "rank_pattern": {"up_proj": 2},
               "alpha_pattern": {r"1\.self_attn\.q_proj": 7}}),
    ("gpt2", {"target_modules": "all-linear", "exclude_modules": ["c_fc"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte", "wpe"]}),
    ("t5", {"target_modules": "all-linear"}),
]  # fmt: skip


@pytest.mark.parametrize("kind, options", MODELS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(MODELS)])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model with `tie_word_embeddings")
def test_numbers_of_a_transformer(kind, options):
    base = base_model(kind).eval().to(f64)
    stock, ours = pair(base, r=3, lora_alpha=5, **options)
    inputs = batch(kind)
    one, other = (results(model, lambda m: m(**inputs).logits) for model in (stock, ours))
    # float64 but for what the model itself computes in float32 (rotary angles, softmax), the same in both.
    torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7)
    summary = trainable_summary(ours)
    assert (summary.trainable, summary.total) == stock.get_nb_trainable_parameters()
    share = 100 * summary.trainable / summary.total
    assert str(summary) == (
        f"trainable params: {summary.trainable:,d} || all params: {summary.total:,d} || trainable%: {share:.4f}"
    )
    if "wte" not in options["target_modules"] and "lm_head" not in options["target_modules"]:
        merged, wanted = merge_all(ours), stock.merge_and_unload()
        for (name, mine), (theirs_name, theirs) in zip(
            merged.state_dict().items(), wanted.state_dict().items(), strict=True
        ):
            assert name == theirs_name
            torch.testing.assert_close(mine, theirs)


class Mixed(nn.Module):
    """An embedding, convolutions over one and two dimensions, a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 6)
        self.first = nn.Conv1d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(1, 4, 3, stride=2)
        self.last = nn.Linear(4, 5)

    def forward(self, x):
        y = torch.tanh(self.first(self.embedding(x).transpose(1, 2)))
        return self.last(torch.tanh(self.second(y.unsqueeze(1))).flatten(2).transpose(1, 2))


def test_numbers_of_a_net_of_all_kinds():
    stock, ours = pair(
        Mixed().to(f64), r=2, lora_alpha=3, target_modules=["embedding", "first", "second", "last"],
        rank_pattern={"second": 1},
    )  # fmt: skip
    x = torch.randint(0, 13, (3, 9))
    one, other = (results(model, lambda m: m(x)) for model in (stock, ours))
    assert len(one) == 13
    torch.testing.assert_close(other, one)
    for mine, theirs in zip(merge_all(ours).parameters(), stock.merge_and_unload().parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gpt2s_layer_is_taken_as_it_lies():
    """Its weight is stored transposed: no copy of it is made, and merging writes where it is."""
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(7, 5)
    before, address = base.weight.clone(), base.weight.data_ptr()
    layer = DoRALinear.from_base(base, rank=2)
    assert (layer.in_features, layer.out_features) == (5, 7) and layer._problem()[0].data_ptr() == address
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.magnitude.mul_(1.5)
    x = torch.randn(3, 5)
    wanted = layer(x)
    layer.merge()
    assert base.weight.data_ptr() == address and base.weight.is_contiguous()
    torch.testing.assert_close(base(x), wanted)
    layer.unmerge()
    assert torch.equal(base.weight, before) and torch.equal(layer(x), wanted)

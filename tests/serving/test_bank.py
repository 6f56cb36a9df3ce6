"""`AdapterBank`: what each row gets, beside what its adapter alone gives through PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from bank_models import SPECS, expected, saved, small, tokens
from helpers import bf16, f64
from peft_models import base_model, one_thread  # noqa: F401
from torch import nn

import dora_kernels
from dora_kernels import AdapterBank
from dora_kernels.testing import beyond, errors, limits

NAMES = ["alice", None, "bob", "dave", "carol", "alice"]


@pytest.fixture(scope="module")
def customers(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def bank(customers):
    base, _, folder = customers
    bank = AdapterBank(base, slots=4)
    for name in SPECS:
        bank.load(name, folder / name)
    yield bank
    bank.close()


@torch.no_grad()
def test_each_row_has_its_adapter(bank, customers):
    """As PEFT alone, in float64 the same digits; and base rows to the bit."""
    base, alone, _ = customers
    ids = tokens(len(NAMES))
    plain = base(ids).logits
    with bank.rows(NAMES):
        mixed = base(ids).logits
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(base(ids).logits, plain), "outside, it is the base model"
    wanted = {"y": torch.stack([alone[name](ids[i : i + 1]).logits[0] for i, name in enumerate(NAMES)])}
    exact = {name: copy.deepcopy(model).double() for name, model in alone.items() if name is not None}
    oracle = {"y": torch.stack([plain[1].double() if name is None else exact[name](ids[i : i + 1]).logits[0]
                                for i, name in enumerate(NAMES)])}  # fmt: skip
    found = errors({"y": mixed}, oracle)
    assert not beyond(found, limits(wanted, oracle)), found


@torch.no_grad()
def test_a_permuted_batch(bank, customers):
    base, ids = customers[0], tokens(len(NAMES))
    with bank.rows(NAMES):
        mixed = base(ids).logits
    order = [3, 0, 5, 1, 4, 2]
    with bank.rows([NAMES[i] for i in order]):
        torch.testing.assert_close(base(ids[order]).logits, mixed[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"cache_implementation": "static"},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
], ids=["greedy", "beams", "beams returned", "static cache", "sampled"])  # fmt: skip
def test_generate(bank, customers, options):
    """The tokens of each row alone, through PEFT."""
    _, alone, _ = customers
    names, ids = ["alice", None, "carol"], tokens(3)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    found = bank.generate({"input_ids": ids}, names, **options)
    each = len(found) // len(names)
    assert each == options.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        wanted = alone[name].generate(input_ids=ids[i : i + 1], **options)
        mine = found[i * each : (i + 1) * each, : wanted.shape[1]]
        assert torch.equal(mine, wanted) and not found[i * each : (i + 1) * each, wanted.shape[1] :].any()


@torch.no_grad()
def test_packed_tokens(bank, customers):
    """A slot, or a name, for each token."""
    base, _, _ = customers
    ids, index = tokens(1, 8), [0, 0, -1, 2, 2, 1, -1, 0]
    x = torch.randn(1, 8, 32)
    layer = base.model.layers[0].self_attn.q_proj
    wanted = []
    for i, at in enumerate(index):
        with bank.rows([None if at < 0 else ["alice", "bob", "dave"][at]]):
            wanted.append(layer(x[:, i]))
    slots = bank.resident
    by_slot = torch.tensor([-1 if at < 0 else slots[["alice", "bob", "dave"][at]] for at in index])
    with bank.tokens(by_slot):
        torch.testing.assert_close(layer(x), torch.stack(wanted, 1))
    with bank.tokens(index, ["alice", "bob", "dave"]):
        torch.testing.assert_close(layer(x), torch.stack(wanted, 1))
        base(ids)
    for wrong in ([9], [-2], [3]):
        with pytest.raises(ValueError, match="slot_index: there is no adapter at"), bank.tokens(wrong, ["alice"]):
            pass
    with (
        pytest.raises(ValueError, match="8 slots were given, and .*q_proj got 3 tokens"),
        bank.tokens(index, ["bob"] * 3),
    ):
        layer(x[:, :3])


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
@torch.no_grad()
def test_other_models(kind):
    """Transposed weights and biases; an encoder; an encoder and a decoder, with beams."""
    model = base_model(kind).eval()
    twin = copy.deepcopy(model)
    dora_kernels.apply_dora(twin, "all-linear", rank=3)
    make = torch.Generator().manual_seed(1)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=make) * 0.2)
    bank = AdapterBank(model)
    bank.load("one", dora_kernels.extract(twin))
    ids = tokens(2)
    if kind == "t5":
        options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
        found = bank.generate(ids, [None, "one"], **options)
        for i, one in enumerate((model, twin)):
            wanted = one.generate(ids[i : i + 1], **options)
            assert torch.equal(found[i : i + 1, : wanted.shape[1]], wanted)
        return
    plain = model(ids).logits
    with bank.rows([None, "one"]):
        logits = model(ids).logits
    assert torch.equal(logits[0], plain[0])
    torch.testing.assert_close(logits[1], twin(ids).logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_one_layer_against_the_oracle(dtype, bias):
    """Within a factor of the errors of plain operations on each row."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 24, bias=bias)).to(dtype)
    layer, bank, loaded = model[0], AdapterBank(model, slots=3), {None: None}
    for i in range(3):
        loaded[f"a{i}"] = small(2 + 3 * i, (40, 24), i, dora=i != 1, dtype=dtype)
        bank.load(f"a{i}", loaded[f"a{i}"])
    names = ["a2", None, "a0", "a1", "a0"]
    x = torch.randn(5, 3, 40).to(dtype)
    with bank.rows(names):
        y = model(x)
    wanted = {
        "y": torch.stack([expected(layer.weight, layer.bias, x[i], loaded[name]) for i, name in enumerate(names)])
    }
    rows = []
    for i, name in enumerate(names):
        row = layer(x[i])
        if name is not None:
            own = loaded[name].layers["0"]
            row = row + (x[i] @ own.lora_A.T @ own.lora_B.T) * own.scaling
            if own.magnitude is not None:
                v = layer.weight.float() + own.scaling * own.lora_B.float() @ own.lora_A.float()
                b = 0 if layer.bias is None else layer.bias
                row = ((row - b) * (own.magnitude / v.norm(dim=1)).to(dtype) + b).to(dtype)
        rows.append(row)
    found = errors({"y": y}, wanted)
    assert not beyond(found, limits({"y": torch.stack(rows)}, wanted)), found
    with bank.rows(names), torch.autocast("cpu", bf16):
        assert model(x).dtype == bf16


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    """B = 0 and the magnitude the norm: the base model to the bit, bias included."""
    model = nn.Sequential(nn.Linear(30, 20))
    adapter = small(2, (30, 20))
    layer = adapter.layers["0"]
    layer.lora_B.zero_()
    layer.magnitude.copy_(model[0].weight.norm(dim=1))
    bank = AdapterBank(model)
    bank.load("new", adapter)
    x = torch.randn(4, 30)
    with bank.rows(["new"] * 4):
        assert torch.equal(model(x), torch.nn.functional.linear(x, model[0].weight, model[0].bias))


class Opaque(nn.Module):
    """A layer that shows its weight only through its forward: int8 with a scale for each row."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bias)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed.to(x.dtype) * self.scale.to(x.dtype), self.shift.to(x.dtype))


@torch.no_grad()
def test_a_layer_that_shows_only_its_forward():
    torch.manual_seed(2)
    model = nn.Sequential(Opaque(torch.randn(20, 30), torch.randn(20)))
    adapter = small(3, (30, 20))
    bank = AdapterBank(model)
    bank.load("one", adapter)
    x = torch.randn(3, 30)
    with bank.rows([None, "one", "one"]):
        y = model(x)
    weight = model[0].packed * model[0].scale
    assert torch.equal(y[0], model(x)[0])
    torch.testing.assert_close(y[1:].double(), expected(weight, model[0].shift, x[1:], adapter), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_norm_in_a_forward(bank, customers, monkeypatch):
    """It is computed when an adapter is loaded, and then no more: nothing that computes one runs."""
    from dora_kernels.engine import blocked, norm, norm_cache, ops

    calls = []
    for module, name in (
        (blocked, "weight_norm"),
        (ops, "weight_norm"),
        (norm, "compute_norm"),
        (norm_cache.NormCache, "norm"),
    ):
        kept = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, kept=kept, **kwargs: (calls.append(1), kept(*args, **kwargs))[1]
        )
    bank.replace("alice", customers[2] / "alice")
    loaded = len(calls)
    assert loaded
    bank.generate(tokens(3), ["alice", "carol", None], max_new_tokens=4)
    assert len(calls) == loaded


@torch.no_grad()
def test_the_model_stays_as_it_is(bank, customers):
    """Modules, parameters and state dict; a copy has no bank; hooks and forwards of others run as ever."""
    base, _, folder = customers
    assert not any("lora" in key for key in base.state_dict())
    ids = tokens(1)
    plain = base(ids).logits
    for copied in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        with bank.rows(["alice"]):
            assert torch.equal(copied(ids).logits, plain)
    with bank.rows(["alice"]):
        adapted = base(ids).logits
    layer, seen = base.model.layers[0].self_attn.q_proj, []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    inner = layer.forward
    layer.forward = lambda x: (seen.append(x), inner(x))[1]
    with bank.rows(["alice"]):
        assert torch.equal(base(ids).logits, adapted) and len(seen) == 2
    bank.close()
    assert torch.equal(base(ids).logits, plain) and len(seen) == 4
    handle.remove()
    del layer.forward
    twice = AdapterBank(base)
    twice.load("alice", folder / "alice")
    with twice.rows(["alice"]):
        assert torch.equal(base(ids).logits, adapted)
    twice.close()
    assert not any("forward" in vars(module) for module in base.modules())


@pytest.mark.parametrize("early", [True, False], ids=["compiled before", "compiled after"])
@torch.no_grad()
def test_compiled(early):
    """What was compiled before there was a bank is compiled anew."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 5)
    if early:
        compiled(x)
    bank = AdapterBank(model)
    bank.load("one", small())
    for names in (["one", None], [None, "one"], ["one", None]):
        with bank.rows(names):
            y = compiled(x)
            assert torch.equal(y, model(x))
        plain = compiled(x)
        assert torch.equal(plain, model(x))
        assert not torch.equal(y[names.index("one")], plain[names.index("one")])


@torch.no_grad()
def test_two_banks_and_blocks_within_blocks(bank, customers):
    """The innermost block counts; another bank's has no say."""
    base, alone, folder = customers
    other = AdapterBank(base)
    other.load("dave", folder / "dave")
    ids = tokens(1)
    with bank.rows(["alice"]):
        with bank.rows(["carol"]):
            torch.testing.assert_close(base(ids).logits, alone["carol"](ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(base(ids).logits, alone["alice"](ids).logits, rtol=1e-4, atol=1e-4)
    with bank.rows([None]), other.rows(["dave"]):
        torch.testing.assert_close(base(ids).logits, alone["dave"](ids).logits, rtol=1e-4, atol=1e-4)
    other.close()


@torch.no_grad()
def test_float64():
    model, adapter = nn.Sequential(nn.Linear(9, 7)).double(), small(3, (9, 7), dtype=f64)
    bank = AdapterBank(model)
    bank.load("one", adapter)
    x = torch.randn(4, 9, dtype=f64)
    with bank.rows(["one"] * 4):
        torch.testing.assert_close(
            model(x), expected(model[0].weight, model[0].bias, x, adapter), rtol=1e-12, atol=1e-12
        )


@torch.no_grad()
def test_a_quantised_model():
    """bitsandbytes' 4-bit layers: the norm is that of the dequantised weight."""
    functional = pytest.importorskip("bitsandbytes").functional
    import bitsandbytes

    torch.manual_seed(3)
    linear = nn.Linear(64, 32)
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    model = nn.Sequential(layer).to("cpu")
    weight = functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state).float()
    adapter = small(4, (64, 32))
    bank = AdapterBank(model)
    bank.load("one", adapter)
    x = torch.randn(3, 64)
    with bank.rows(["one", None, "one"]):
        y = model(x)
    plain = model(x)
    assert torch.equal(y[1], plain[1])
    kept = adapter.layers["0"]
    v = weight + kept.scaling * kept.lora_B @ kept.lora_A
    g, delta = kept.magnitude / v.norm(dim=1), kept.scaling * x @ kept.lora_A.T @ kept.lora_B.T
    wanted = g * (plain - linear.bias + delta) + linear.bias
    torch.testing.assert_close(y[[0, 2]], wanted[[0, 2]], rtol=1e-2, atol=1e-2)

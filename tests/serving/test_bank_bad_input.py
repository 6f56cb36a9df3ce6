"""What `AdapterBank` refuses: each names what is wrong, and leaves the bank as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from bank_models import small
from torch import nn

from dora_kernels import Adapter, AdapterBank, apply_dora
from dora_kernels.adapters import AdapterLayer


@pytest.fixture
def bank():
    torch.manual_seed(0)
    bank = AdapterBank(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Conv1d(4, 4, 1)), slots=2, max_rank=4)
    bank.load("one", small())
    return bank


def layer(**changes):
    own = small().layers["0"]
    fields = {name: getattr(own, name) for name in ("kind", "lora_A", "lora_B", "magnitude", "scaling")} | changes
    return Adapter({"0": AdapterLayer(**fields)})


@pytest.mark.parametrize(("adapter", "words"), [
    (lambda: small(5), "0: its rank is 5, above max_rank=4"),
    (lambda: layer(magnitude=torch.ones(5), magnitude_axis="in"), "0: its magnitude is along 'in'"),
    (lambda: small(names=("7",)), "7: the model has no such layer"),
    (lambda: small(features=(6, 4)), "0 belongs to a linear layer? with 6 inputs and 4 outputs|6 inputs"),
    (lambda: layer(lora_A=torch.full((2, 5), torch.nan)), "0: lora_A has values that are not finite"),
    (lambda: layer(magnitude=torch.ones(3)), r"0: magnitude \[3\]"),
    (lambda: Adapter({}), "it has no layers"),
    (lambda: Adapter({"2": AdapterLayer("conv1d", torch.ones(1, 4, 1), torch.ones(4, 1, 1), torch.ones(4), 1.0)}),
     "2: a bank serves linear layers, and this belongs to a conv1d"),
], ids=["rank", "axis", "names", "sizes", "values", "magnitude", "empty", "kind"])  # fmt: skip
@pytest.mark.parametrize("method", ["load", "replace"])
def test_a_wrong_adapter(bank, adapter, words, method):
    before = bank.names, bank.resident, bank.memory(), vars(bank.model[0])["forward"]
    x = torch.randn(1, 5)
    with bank.rows(["one"]):
        y = bank.model[0](x)
    with pytest.raises(ValueError, match=words):
        getattr(bank, method)("one" if method == "replace" else "two", adapter())
    assert before == (bank.names, bank.resident, bank.memory(), vars(bank.model[0])["forward"])
    with bank.rows(["one"]):
        assert torch.equal(bank.model[0](x), y)


def test_names(bank):
    for call in (bank.unload, bank.pin, lambda name: bank.replace(name, small())):
        with pytest.raises(ValueError, match="there is no adapter 'two' in the bank, which has 'one'"):
            call("two")
    with pytest.raises(ValueError, match="adapters: there is no adapter 'two'"), bank.rows(["one", "two"]):
        pass
    with pytest.raises(ValueError, match="'one' is loaded already"):
        bank.load("one", small())
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        bank.load(1, small())
    for wrong in ("one", 3, [1]):
        with pytest.raises(TypeError, match="adapters: expected"), bank.rows(wrong):
            pass
    with bank.rows(["one"]):
        with pytest.raises(ValueError, match="'one' is in use by 1 running"):
            bank.unload("one")
        with pytest.raises(ValueError, match="'one' are in use"):
            bank.close()
    assert bank.names == ["one"] and bank.resident == {"one": 0}


def test_rows(bank):
    with bank.rows(["one", None]):
        for wrong in (torch.randn(3, 2, 5), torch.randn(1, 2, 5), torch.randn(4, 1, 5)):
            with pytest.raises(
                ValueError, match=f"2 adapters were given, and 0 got {len(wrong)} rows?; expected 2 rows"
            ):
                bank.model[0](wrong)
        with pytest.raises(ValueError, match="2 adapters were given, and 0 got 3 tokens"):
            bank.model[0](torch.randn(3, 5))
        assert bank.model[0](torch.randn(6, 5)).shape == (6, 4), "rows of three tokens, flattened"
        assert bank.model[0](torch.randn(2, 7, 5)).shape == (2, 7, 4)
        x = torch.randn(2, 5)
        assert torch.equal(bank.model[0](input=x), bank.model[0](x)), "by keyword"
    with bank.rows(["one", None], repeats=3):
        assert bank.model[0](torch.randn(6, 1, 5)).shape == (6, 1, 4)
        assert bank.model[0](torch.randn(2, 1, 5)).shape == (2, 1, 4)
        with pytest.raises(ValueError, match="got 4 rows; expected 2 rows, or 6"):
            bank.model[0](torch.randn(4, 1, 5))
    with pytest.raises(ValueError, match="3 adapters in one batch, and the bank has 2 slots"):
        bank.load("two", small())
        bank.load("three", small())
        with bank.rows(["one", "two", "three"]):
            pass


def test_arguments():
    model = nn.Sequential(nn.Linear(5, 4))
    for options, kind, words in (
        ({"slots": 0}, ValueError, "slots: expected at least 1, got 0"),
        ({"max_rank": 1.5}, TypeError, "max_rank: expected an int, got float"),
        ({"host_limit": -1}, ValueError, "host_limit: expected at least 0"),
        ({"slots": None}, TypeError, "slots: expected an int, got NoneType"),
    ):
        with pytest.raises(kind, match=words):
            AdapterBank(model, **options)
    with pytest.raises(TypeError, match="model"):
        AdapterBank(3)


def test_layers_that_cannot_be_served():
    adapted = nn.Sequential(nn.Linear(5, 4))
    apply_dora(adapted, "all-linear", rank=1)
    with pytest.raises(ValueError, match="0: the layer is adapted already"):
        AdapterBank(adapted).load("one", small())
    attention = nn.MultiheadAttention(4, 2)
    model = nn.Sequential(attention)
    with pytest.raises(ValueError, match="out_proj: MultiheadAttention reads the weight itself"):
        AdapterBank(model).load("one", small(features=(4, 4), names=("0.out_proj",)))
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="0 and 1 are the same module"):
        AdapterBank(nn.Sequential(shared, shared)).load("one", small(features=(4, 4), names=("0", "1")))
    with pytest.raises(ValueError, match="meta device"):
        AdapterBank(nn.Sequential(nn.Linear(5, 4, device="meta"))).load("one", small())


def test_layers_that_never_ran(bank):
    """In another thread the batch is not known: said at the end, instead of the base model's answer."""
    x = torch.randn(1, 5, 4)

    class Elsewhere(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            thread = threading.Thread(target=lambda: self.inner(x))
            thread.start()
            thread.join()

    model = Elsewhere(nn.Linear(5, 4))
    other = AdapterBank(model)
    other.load("one", small(names=("inner",)))
    with pytest.raises(RuntimeError, match="none of the layers with adapters"), other.rows(["one"]):
        model(x.mT)
    with other.rows(["one"]):
        pass
    with other.rows([None]):
        model(x.mT)


@pytest.mark.parametrize("key", ["1.weight", "0.token_adapter.trainable_tokens_delta"])
def test_tensors_beside_the_adapter(bank, key):
    """What was trained beside it is no layer's, so the bank would answer without it."""
    adapter = small()
    adapter.beside = {f"base_model.model.{key}": torch.ones(2)}
    for call in (lambda: bank.load("two", adapter), lambda: bank.replace("one", adapter)):
        with pytest.raises(ValueError, match=f"{key} trained beside the adapter, .*merge.*PEFT"):
            call()
    assert bank.names == ["one"]
    adapter.beside = {"base_model.model.2.base_layer.bias": bank.model[2].bias.detach().clone()}
    bank.load("two", adapter)


def test_a_closed_bank(bank):
    assert repr(bank) == "<AdapterBank of Sequential, 1 adapter in 2 slots>"
    bank.close()
    assert repr(bank) == "<AdapterBank of Sequential, closed>"
    with pytest.raises(RuntimeError, match="the bank is closed"):
        bank.load("two", small())
    bank.close()


def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"the base model, which model.unload\(\) returns, got PEFT's PeftModel"):
        AdapterBank(model)
    AdapterBank(model.unload()).load("one", small())


def test_one_is_no_plural(bank):
    with bank.rows(["one"]), pytest.raises(ValueError, match="1 adapter was given, and 0 got 3 rows; expected 1 row$"):
        bank.model[0](torch.randn(3, 2, 5))


def test_generate_is_called_as_the_model_is(bank):
    """By keywords, or with a mapping or a tensor in front."""
    bank.model.generate = lambda inputs=None, input_ids=None, **options: (inputs, input_ids, options)
    ids = torch.ones(1, 2)
    assert bank.generate(input_ids=ids, adapters=["one"], top_k=3) == (None, ids, {"top_k": 3})
    assert bank.generate({"input_ids": ids}, ["one"]) == (None, ids, {})
    assert bank.generate(ids, adapters=["one"]) == (ids, None, {})
    with pytest.raises(TypeError, match="adapters: expected a name or None for each row, got none"):
        bank.generate(ids)

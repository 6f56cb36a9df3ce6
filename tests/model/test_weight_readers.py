"""Layers whose weights the modules around them read: never adapted, for the adapter would not run."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from dora_kernels import Adapter, adapted_layers, apply_dora, attach
from dora_kernels.adapters import AdapterLayer
from dora_kernels.model.places import named_modules
from dora_kernels.model.weight_readers import WeightReaders

# of transformers' small configurations: the layers that "all-linear" may not take, by their last names
READ = {
    "Mamba": {"x_proj", "dt_proj", "out_proj"},
    "Mamba2": {"out_proj"},
    "FalconMamba": {"x_proj", "dt_proj", "out_proj"},
    "Jamba": {"dt_proj"},
    "Zamba2": {"out_proj"},
    "Bamba": {"out_proj"},
    "FalconH1": {"out_proj"},
    "GraniteMoeHybrid": {"out_proj"},
    "Rwkv": {"output", "value"},
    "WavLM": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "Reformer": {"query_key", "value"},
    "Llama": set(),
    "T5": set(),
    "Bloom": set(),
    "Bert": set(),
}


@pytest.mark.parametrize("name", READ)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    maker = getattr(transformers, f"{name}Model", None)
    if maker is None:
        pytest.skip("not in this release")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = maker(getattr(transformers, f"{name}Config")())
    assert read_layers(model) == READ[name]


def test_torch():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    assert read_layers(encoder) == {"out_proj", "linear1", "linear2"}
    assert read_layers(nn.MultiheadAttention(8, 2)) == {"out_proj"}


def test_what_is_never_called():
    """A weight that is read where another path calls the layer is not among them."""
    readers, attention, mixer = WeightReaders(), nn.MultiheadAttention(8, 2), Mixer()
    assert readers.never_calling([attention], "out_proj") is attention
    assert readers.of([mixer], "read") is mixer and readers.never_calling([mixer], "read") is None
    assert readers.never_calling([mixer], "called") is None and readers.of([mixer], "called") is None


def read_layers(model):
    """Last names of linear layers that are read."""
    readers, found = WeightReaders(), set()
    for name, module in named_modules(model):
        if name and isinstance(module, nn.Linear):
            parts = name.split(".")
            parents = [model.get_submodule(".".join(parts[:-depth])) for depth in range(1, len(parts) + 1)]
            if readers.of(parents, name) is not None:
                found.add(parts[-1])
    return found


class Mixer(nn.Module):
    """Calls ``called``, asks for what is harmless of it, and reads the others' weights in one way to compute."""

    def __init__(self, fused=True):
        super().__init__()
        self.called, self.read, self.alias = (nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.fused, self.exact = fused, False

    def forward(self, x):
        if x.is_cuda:
            return self.kernel(x)
        if self.exact:
            return x @ self.called.weight[:2].t()
        return self.alias(self.inner["deep"](self.read(self.plain(x))))

    def plain(self, x):
        if isinstance(self.called.weight, torch.Tensor) and x.dtype != self.called.weight.dtype:
            x = x.to(self.called.weight.device)
        return self.called(x)

    def kernel(self, x):
        weights = self
        return nn.functional.linear(x @ self.read.weight.t(), weights.alias.weight.t())

    def unused(self, x):
        return x @ self.called.weight


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x):
        return self.mixer(x) @ self.mixer.inner.deep.weight


def adapted(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_dora(model, rank=2)
    return list(adapted_layers(model)), [str(one.message) for one in caught]


def test_any_module():
    """By a method that forward calls, by a local name, by one further out; not what is never computed with."""
    names, said = adapted(Held())
    assert names == ["mixer.called"]
    assert said == [
        "'all-linear' leaves out mixer.read, mixer.alias: Mixer reads the weight itself in some of its kernels, where "
        "the adapter would not run; mixer.inner.deep: Held reads the weight itself in some of its kernels, where the "
        "adapter would not run"
    ]
    exact = Mixer()
    assert "called" not in read_layers(exact)
    exact.exact = True
    assert "called" in read_layers(exact)
    with pytest.raises(TypeError, match="read: Mixer reads the weight itself"):
        apply_dora(Held(), ["read"], rank=2)
    layer = AdapterLayer("linear", torch.ones(1, 4), torch.ones(4, 1), torch.ones(4), 1.0)
    with pytest.raises(TypeError, match="mixer.read: Mixer reads the weight itself"):
        attach(Held(), Adapter({"mixer.read": layer}))


def test_a_forward_that_was_exchanged(monkeypatch):
    """On the class or on the module, and wrapped; one that does not call super's replaces it."""

    class Plain(Mixer):
        def forward(self, x):
            return self.called(x)

    def reading(self, x):
        return x @ self.called.weight

    @functools.wraps(reading)
    def wrapper(*args):
        return reading(*args)

    assert read_layers(Plain()) == set()
    model = Plain()
    model.forward = wrapper.__get__(model)
    assert read_layers(model) == {"called"}
    monkeypatch.setattr(Plain, "forward", wrapper)
    assert read_layers(Plain()) == {"called"}

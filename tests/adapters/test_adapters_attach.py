"""From file to model and back: `load_adapter` with a model, `attach`, `extract`; a failure leaves the model alone."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from adapter_models import EPS32, Model, adapted64, adapter_for, assert_same_function, linear_problem
from torch import nn

from dora_kernels import (
    DoRALinear,
    LoRALinear,
    apply_dora,
    attach,
    extract,
    load_adapter,
    read_adapter,
    remove_dora,
    save_adapter,
)
from dora_kernels.adapters import Adapter, combine_adapters

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

LINEAR = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.down", "lm_head"]
EVERY = [*LINEAR, "embed_tokens", "layers.0.conv_in", "layers.1.conv"]


def state(model):
    """All that a failed call must leave: modules, their values, what trains, and what else a layer holds."""
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        {name: (m.scaling, m.alpha) for name, m in model.named_modules() if hasattr(m, "scaling")},
    )


def assert_unchanged(model, before):
    now = state(model)
    assert (now[0], now[2]) == (before[0], before[2])
    assert now[1].keys() == before[1].keys()
    for name, (identity, value, trains) in before[1].items():
        assert now[1][name][0] == identity and now[1][name][2] == trains, name
        assert torch.equal(now[1][name][1], value), name


def merged(model, name):
    """The weight that a layer is after merging, as a linear problem."""
    layer = copy.deepcopy(model.get_submodule(name))
    layer.merge()
    return linear_problem(layer.base_layer)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_models_with_parametrized_layers(kind):
    """As the position embedding of wav2vec 2.0: other layers are adapted; these are refused by name."""

    def made():
        model = nn.ModuleDict({"plain": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        getattr(nn.utils.parametrizations, kind)(model["other"])
        return model

    model, again = made(), made()
    apply_dora(model, ["plain"], rank=2)
    adapter = extract(model)
    assert attach(again, adapter) == ["plain"]
    with pytest.raises(ValueError, match="other: the layer is parametrized; remove the parametrization first"):
        attach(made(), Adapter({"other": adapter.layers["plain"]}))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_attach_and_extract(axis):
    """The layers compute the adapted weight of the formula, and give back what they took."""
    model, original = Model(), Model()
    adapter = adapter_for(model, EVERY, axis=axis)
    assert attach(model, adapter) == EVERY
    for name in EVERY:
        wanted = adapted64(original.get_submodule(name), adapter.layers[name])
        assert float((merged(model, name) - wanted).norm()) <= 4 * EPS32 * float(wanted.norm())
    back = extract(model)
    for name, layer in back.layers.items():
        sent = adapter.layers[name]
        assert (layer.kind, layer.scaling, layer.magnitude_axis, layer.eps) == (sent.kind, sent.scaling, axis, 0.0)
        for part in ("lora_A", "lora_B", "magnitude"):
            assert torch.equal(getattr(layer, part), getattr(sent, part))
    back.layers[EVERY[0]].lora_A.zero_()
    assert extract(model).layers[EVERY[0]].lora_A.any()  # a copy


def test_repr_is_short():
    adapter = adapter_for(Model(), LINEAR[:2], rank=4)
    assert repr(adapter) == "<Adapter of 2 layers, rank 4, DoRA along 'out', format 'model'>"
    mixed = {"other": adapter_for(Model(), LINEAR[2:3], rank=2, plain=True).layers[LINEAR[2]], **adapter.layers}
    assert repr(Adapter(mixed, "peft")) == (
        "<Adapter of 3 layers, rank 2 to 4, DoRA along 'out', plain LoRA, format 'peft'>"
    )
    assert repr(Adapter({})) == "<Adapter of 0 layers, format 'model'>"


def test_adapted_layers_take_the_values():
    """In place where rank, axis and eps are the same, so that optimizers keep their parameters; anew otherwise."""
    model = Model()
    attach(model, adapter_for(model, LINEAR[:2], rank=4))
    layers = {name: model.get_submodule(name) for name in LINEAR[:2]}
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    adapter = adapter_for(Model(), LINEAR[:2], seed=5, rank=4, scaling=0.3)
    ids = torch.arange(30)
    with torch.no_grad():
        model(ids)  # which keeps norms
        attach(model, adapter)
        fresh = Model()
        attach(fresh, adapter)
        assert torch.equal(model(ids), fresh(ids))
    assert {name: model.get_submodule(name) for name in LINEAR[:2]} == layers
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert_same_function(Model(), extract(model), adapter, 0.0)
    layers[LINEAR[0]].dropout.p = 0.25
    other = adapter_for(Model(), LINEAR[:1], seed=6, rank=2, axis="in", eps=1e-3)
    attach(model, other)
    assert model.get_submodule(LINEAR[0]) is not layers[LINEAR[0]]
    assert model.get_submodule(LINEAR[0]).dropout.p == 0.25
    assert model.get_submodule(LINEAR[1]) is layers[LINEAR[1]]
    assert extract(model).layers[LINEAR[0]].eps == 1e-3
    attach(model, adapter_for(Model(), LINEAR[:1], plain=True))
    assert type(model.get_submodule(LINEAR[0])) is LoRALinear
    assert not any(isinstance(m.base_layer, LoRALinear) for m in model.modules() if hasattr(m, "base_layer"))


def test_a_layer_adapted_anew_keeps_its_options():
    model, other = (nn.Sequential(nn.Linear(8, 6)).double() for _ in range(2))
    apply_dora(model, rank=4, dropout=0.25, detach_norm=False, backend="torch")
    apply_dora(other, rank=2, alpha=6.0)
    model[0].strength = 0.5
    model[0].lora_A.weight.requires_grad_(False)
    model.eval()
    before = model[0]
    attach(model, extract(other))
    layer = model[0]
    assert layer is not before and layer.rank == 2 and layer.scaling == 3.0
    assert (layer.dropout.p, layer.detach_norm, layer.backend, layer.strength) == (0.25, False, "torch", 0.5)
    trains = {name: parameter.requires_grad for name, parameter in layer.adapter_parameters().items()}
    assert trains == {"lora_A.weight": False, "lora_B.weight": True, "lora_magnitude_vector": True}
    assert not any(module.training for module in layer.modules())


def test_what_an_earlier_adapter_leaves_is_said(tmp_path):
    first, second, model = (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)) for _ in range(3))
    apply_dora(first, rank=2)
    apply_dora(second, ["1"], rank=2)
    save_adapter(first, tmp_path / "first")
    save_adapter(second, tmp_path / "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load_adapter(tmp_path / "first", model).notes
    with pytest.warns(UserWarning, match="second: 0, 2 stay adapted: .* remove_dora"):
        adapter = load_adapter(tmp_path / "second", model)
    assert len(adapter.notes) == 1 and adapter.notes[0].startswith("0, 2 stay adapted: ")
    remove_dora(model)
    apply_dora(model, ["1"], rank=2)
    model[1].strength = 0.5
    assert load_adapter(tmp_path / "second", model).notes == [
        "1 keep a strength other than 1; set_dora_strength changes it"
    ]


def test_dtypes(tmp_path):
    """A bfloat16 file stays bfloat16 in the model and back in a file; in a float64 model it is float64."""
    model, adapter = Model().bfloat16(), adapter_for(Model(), LINEAR, dtype=torch.bfloat16)
    save_adapter(adapter, tmp_path)
    load_adapter(tmp_path, model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wide = Model().double()
    load_adapter(tmp_path, wide)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    save_adapter(model, tmp_path, force=True)
    assert_same_function(Model(), load_adapter(tmp_path), adapter, 0.0)


def test_a_module_under_two_names():
    """Exchanged under both; two adapters for it are refused."""
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 4)})
    model["c"] = model["a"]
    attach(model, adapter_for(model, ["a"]))
    assert isinstance(model["a"], DoRALinear) and model["c"] is model["a"]
    tied = nn.ModuleDict({"a": nn.Linear(6, 6)})
    tied["c"] = tied["a"]
    before = state(tied)
    with pytest.raises(ValueError, match="a and c are the same module"):
        attach(tied, adapter_for(tied, ["a", "c"]))
    assert_unchanged(tied, before)


def test_gpt2_layers(tmp_path):
    """Stored transposed."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.ModuleDict({"c": conv1d(20, 12)})
    plain = nn.ModuleDict({"c": nn.Linear(12, 20)})
    plain["c"].weight.data.copy_(model["c"].weight.t())
    adapter = adapter_for(plain, ["c"])
    save_adapter(adapter, tmp_path)
    load_adapter(tmp_path, model)
    x = torch.randn(3, 12)
    wanted = x.double() @ adapted64(plain["c"], adapter.layers["c"]).t() + model["c"].base_layer.bias.double()
    assert float((model["c"](x) - wanted).detach().abs().max()) <= 16 * EPS32 * float(wanted.abs().max())


def huge(adapter):
    layer = adapter.layers[LINEAR[-1]]
    object.__setattr__(layer, "lora_A", layer.lora_A.double() * 1e200)


def renamed(adapter):
    adapter.layers["layers.7.q_proj"] = adapter.layers.pop(LINEAR[-1])


def resized(adapter):
    adapter.layers[LINEAR[-1]] = adapter.layers[LINEAR[0]]


def misshapen(adapter):
    layer = adapter.layers[LINEAR[-1]]
    object.__setattr__(layer, "magnitude", layer.magnitude[:-1])


BAD = {
    "no such layer": (renamed, "adapter: layers.7.q_proj: the model has no such layer"),
    "another size": (resized, "adapter: lm_head belongs to a linear with 12 inputs and 12 outputs, the model's is a"),
    "a short magnitude": (misshapen, "adapter: lm_head: magnitude [29]: expected [30]"),
    "too large for the dtype": (huge, "adapter: lm_head: it has values that are not finite in torch.float32"),
}


@pytest.mark.parametrize("what, already", [(what, a) for what in BAD for a in (0, 1) if a or "dtype" not in what])
def test_a_failure_leaves_the_model_unchanged(what, already):
    """The last layer is bad, so that the others were planned before."""
    change, message = BAD[what]
    model = Model()
    model.layers[0].up_proj.bias.requires_grad_(False)
    if already:
        attach(model, adapter_for(model, LINEAR, seed=9))
    adapter = adapter_for(Model(), LINEAR)
    change(adapter)
    before = state(model)
    with pytest.raises(ValueError) as raised:
        attach(model, adapter)
    assert str(raised.value).startswith(message)
    assert_unchanged(model, before)


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("file, model", [(1, 3), (3, 1), (1, (1, 3))])
def test_kernels_are_not_broadcast(tmp_path, file, model, already):
    """The linear layer before it is not changed either."""

    def net(kernel):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, kernel)})

    adapter = adapter_for(net(file), ["a", "conv"])
    save_adapter(adapter, tmp_path)
    base = net(model)
    if already:
        attach(base, adapter_for(base, ["a", "conv"]))
    before = state(base)
    expected = re.escape(f"kernel {[file] * 2}, the model's is a conv2d with 4 and 6 and the kernel ")
    for failing in (lambda: attach(base, adapter), lambda: load_adapter(tmp_path, base),
                    lambda: read_adapter(tmp_path, base.state_dict() if not already else base),
                    lambda: combine_adapters(base, [adapter], [1.0])):  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            failing()
        assert_unchanged(base, before)


@pytest.mark.parametrize("already", [False, True])
def test_groups_are_not_broadcast(already):
    """A file of a convolution without groups, for one that has as many as the rank: B would be broadcast."""
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3, groups=2)})
    if already:
        attach(model, adapter_for(model, ["a", "conv"], rank=2))
    for source, target in ((1, 2), (2, 1)):
        other = nn.ModuleDict({"a": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3, groups=source)})
        base = model if target == 2 else nn.ModuleDict({"a": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3)})
        adapter, before = adapter_for(other, ["a", "conv"], rank=2), state(base)
        with pytest.raises(ValueError, match=r"adapter: conv: lora_B .*: expected \[6, [12], 1, 1\]"):
            attach(base, adapter)
        assert_unchanged(base, before)


def test_merged_layers_and_strengths_are_refused():
    model = Model()
    adapter = adapter_for(model, LINEAR)
    attach(model, adapter)
    layer = model.get_submodule(LINEAR[-1])
    layer.merge()
    before = state(model)
    with pytest.raises(ValueError, match="lm_head is merged; call unmerge"):
        attach(model, adapter)
    assert_unchanged(model, before)
    layer.unmerge()
    layer.strength = 0.5
    with pytest.raises(ValueError, match=r"lm_head has strength 0\.5, .* with_strength\(model, adapter, 0\.5\)"):
        extract(model)


@pytest.mark.parametrize("name, kind", [("layers.1.conv", "conv1d"), ("embed_tokens", "embedding")])
def test_plain_lora_of_other_layers(tmp_path, name, kind):
    """Read and written, not attached."""
    model, adapter = Model(), adapter_for(Model(), [LINEAR[0], name], plain=True)
    save_adapter(adapter, tmp_path)
    assert_same_function(model, read_adapter(tmp_path, model), adapter, 0.0)
    before = state(model)
    with pytest.raises(TypeError, match=f"adapter: {name}: plain LoRA of an? {kind} cannot be attached: without magn"):
        load_adapter(tmp_path, model)
    assert_unchanged(model, before)


def test_other_refusals():
    subclass = type("Other", (nn.Linear,), {})
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": subclass(6, 4)})
    before = state(model)
    with pytest.raises(TypeError, match="Other"):
        attach(model, adapter_for(model, ["a", "b"]))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="no adapted layer"):
        extract(Model())
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        extract({})
    with pytest.raises(TypeError, match="adapter: expected an Adapter, got dict"):
        attach(Model(), {})
    with pytest.raises(ValueError, match="the adapter has no layers"):
        save_adapter(Adapter({}), "nowhere")


def test_tensors_beside_the_adapter(tmp_path):
    """They are named in a warning, unless they are the model's own; adapters made of the adapter keep them."""
    model = Model()
    save_adapter(adapter_for(model, ["layers.0.q_proj"]), tmp_path, format="qdora")
    file = tmp_path / "model_state_dict.safetensors"
    own = {"lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file({**load_file(file), **own, "norm.weight": torch.ones(3)}, file)
    words = "norm.weight trained beside the adapter, left out; .*merge.*PEFT"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        adapter = load_adapter(file, model)
    assert len(caught) == 1 and set(adapter.beside) == {"lm_head.weight", "norm.weight"}
    combined, _ = combine_adapters(model, [adapter, adapter], [0.5, 0.5])
    with pytest.warns(RuntimeWarning, match=words):
        attach(Model(), combined)
    combined.beside["norm.weight"] = torch.ones(3, dtype=torch.bfloat16)
    for other in (torch.zeros(3), torch.full((3,), 1.001)):  # in bfloat16 that is 1
        adapter.beside["norm.weight"] = other
        for both in ([adapter, combined], [combined, adapter]):
            with pytest.raises(ValueError, match="adapters: norm.weight: expected one value"):
                combine_adapters(model, both, [0.5, 0.5])
    with pytest.raises(ValueError, match="source: unet: .*norm.weight: beside its adapter, and a mapping of models"):
        save_adapter({"unet": adapter}, tmp_path / "out", format="qdora")

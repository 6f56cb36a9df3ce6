"""Grouped convolutions: PEFT's norm by default, the exact one where it is asked for, and its record in the file."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from peft_kinds import Net, config, given, twins
from peft_models import (
    lora_layers,
    move_adapter,
    one_thread,  # noqa: F401
)

import dora_kernels
from dora_kernels.peft.config import DoraLoraConfig

KIND = "conv2d, 2 groups"
VALUES = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["layer"]}


def exact_output(model, name="default"):
    """In float64: every channel's update over all inputs, the weight in its own group's."""
    layer = lora_layers(model)[0]
    weight, a, b = (
        t.detach().double() for t in (layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    )
    groups, s = layer.base_layer.groups, layer.scaling[name]
    rows = []
    for group in range(groups):
        w, right, left = (t.chunk(groups)[group] for t in (weight, a, b))
        full = torch.zeros(w.shape[0], a.shape[1], *w.shape[2:], dtype=torch.float64)
        full[:, group * w.shape[1] : (group + 1) * w.shape[1]] = w
        rows.append(full + s * torch.einsum("or,r...->o...", left.flatten(1), right))
    direction = torch.cat(rows)
    g = layer.lora_magnitude_vector[name].weight.detach().double().flatten() / direction.flatten(1).norm(dim=1)
    x = given(model).detach().double()
    return torch.nn.functional.conv2d(x, g[:, None, None, None] * direction, layer.base_layer.bias.double())


def output(model):
    with torch.no_grad():
        return lora_layers(model)[0](given(model)).double()


def exact_model():
    stock, ours = twins(KIND)
    dora_kernels.patch_peft(ours, grouped_norm="exact")
    return stock.eval(), ours.eval()


def test_the_norm_of_what_is_computed():
    stock, ours = exact_model()
    torch.testing.assert_close(output(ours), exact_output(ours), rtol=1e-5, atol=1e-5)
    assert (output(stock) - exact_output(ours)).abs().max() > 0.1, "PEFT's is another one"
    # And PEFT's again where it is asked for, its kept norm forgotten.
    dora_kernels.patch_peft(ours, grouped_norm="peft")
    torch.testing.assert_close(output(ours), output(stock), rtol=1e-5, atol=1e-5)


def test_the_saved_adapter_records_it(tmp_path):
    _, ours = exact_model()
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["grouped_norm"] == "exact"
    wanted = output(ours)

    def loaded():
        torch.manual_seed(0)
        return PeftModel.from_pretrained(Net(KIND), tmp_path).eval()

    with pytest.warns(UserWarning, match="grouped_norm"):
        plain = loaded()
    dora_kernels.patch_peft(plain, grouped_norm="exact")
    torch.testing.assert_close(output(plain), wanted)
    handle = dora_kernels.patch_peft_globally()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*grouped_norm")
            model = loaded()
        torch.testing.assert_close(output(model), wanted)
        # Said again when it is saved again.
        model.save_pretrained(tmp_path / "again")
        assert "grouped_norm" in json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    finally:
        handle.restore()
    assert type(model.peft_config["default"]) is LoraConfig
    assert (output(model) - wanted).abs().max() > 0.1, "restored to PEFT's"


def test_files_of_others_say_nothing(tmp_path):
    """While the global patch is on, as without it."""
    handle = dora_kernels.patch_peft_globally()
    try:
        torch.manual_seed(0)
        model = move_adapter(get_peft_model(Net(KIND), config(KIND)))
        model.save_pretrained(tmp_path)
        assert "grouped_norm" not in json.loads((tmp_path / "adapter_config.json").read_text())
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Net(KIND), tmp_path)
        again.save_pretrained(tmp_path / "again")
        assert "grouped_norm" not in json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert torch.equal(output(again.eval()), output(model.eval()))
        assert torch.equal(output(copy.deepcopy(again)), output(again))
    finally:
        handle.restore()


def test_the_norm_goes_with_its_adapter():
    """One that is injected brings its own, and another of the same name has PEFT's again."""
    stock, ours = twins(KIND)
    ours.add_adapter("second", DoraLoraConfig(**VALUES, grouped_norm="exact"))
    move_adapter(ours, "second", 5)
    ours.set_adapter("second")
    torch.testing.assert_close(output(ours.eval()), exact_output(ours, "second"), rtol=1e-5, atol=1e-5)
    ours.set_adapter("default")
    torch.testing.assert_close(output(ours), output(stock.eval()), rtol=1e-5, atol=1e-5)
    ours.delete_adapter("second")
    for model in (stock, ours):
        model.add_adapter("second", config(KIND))
        move_adapter(model, "second", 5)
        model.set_adapter("second")
        model.eval()
    torch.testing.assert_close(output(ours), output(stock), rtol=1e-5, atol=1e-5)


def test_a_configuration_of_another_class():
    """The norm is what was asked for; that it will not be saved is said."""

    @dataclasses.dataclass
    class Own(LoraConfig):
        more: int = 1

    torch.manual_seed(0)
    model = move_adapter(get_peft_model(Net(KIND), Own(**VALUES, more=2))).eval()
    before = output(model)
    with pytest.warns(RuntimeWarning, match="grouped_norm='exact' will not be saved: .* is a Own, not a plain Lora"):
        handle = dora_kernels.patch_peft(model, grouped_norm="exact")
    torch.testing.assert_close(output(model), exact_output(model), rtol=1e-5, atol=1e-5)
    handle.restore()
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    assert type(model.peft_config["default"]) is Own and "grouped_norm" not in vars(model.peft_config["default"])


def test_another_name():
    _, ours = twins(KIND)
    with pytest.raises(ValueError, match="^grouped_norm: expected 'peft' or 'exact', got 'right'"):
        dora_kernels.patch_peft(ours, grouped_norm="right")

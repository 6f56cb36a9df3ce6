"""Arguments of the functions about adapters that are of a wrong type or out of range: the error names each."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from adapter_models import Model, adapter_for
from torch import nn

from dora_kernels import (
    Adapter,
    AdapterLayer,
    DoRALinear,
    apply_dora,
    combine_adapters,
    load_adapter,
    read_adapter,
    save_adapter,
    set_dora_strength,
    with_strength,
)

pytest.importorskip("safetensors")

NAMES = ["layers.0.q_proj", "lm_head"]
HUGE = [10**400, -(10**400), 10**5000, Fraction(10**400, 3)]
A, B, M = torch.ones(2, 5), torch.ones(4, 2), torch.ones(4)

LAYER = {"kind": "linear", "lora_A": A, "lora_B": B, "magnitude": M, "scaling": 1.0}

WRONG = [
    ("kind", 2, TypeError, "expected a str, got int"),
    ("kind", "dense", ValueError, "expected one of 'linear', 'embedding', .* got 'dense'"),
    ("lora_A", [[1.0]], TypeError, "expected a torch.Tensor, got list"),
    ("lora_A", None, TypeError, "expected a torch.Tensor, got NoneType"),
    ("lora_B", 3.0, TypeError, "expected a torch.Tensor, got float"),
    ("lora_B", torch.ones(4, 2, dtype=torch.int64), TypeError, "expected float32, .* got torch.int64"),
    ("lora_A", A.to_sparse(), TypeError, "expected a dense tensor, got a sparse_coo one"),
    ("lora_A", A.to_mkldnn(), TypeError, "expected a dense tensor, got a _mkldnn one"),
    ("lora_A", torch.nested.nested_tensor([A[0], A[1]]), TypeError, "expected a dense tensor, got a nested one"),
    ("magnitude", 1.0, TypeError, "expected a torch.Tensor, got float"),
    ("scaling", "1", TypeError, "expected a number, got str"),
    ("scaling", True, TypeError, "expected a number, got bool"),
    ("scaling", torch.tensor(1.0), TypeError, "expected a number, got Tensor"),
    ("magnitude_axis", 0, TypeError, "expected a str, got int"),
    ("magnitude_axis", "row", ValueError, "expected one of 'out', 'in', .* got 'row'"),
    ("eps", None, TypeError, "expected a number, got NoneType"),
    *((name, value, ValueError, "expected a number, got one beyond the range of float64")
      for name in ("scaling", "eps") for value in HUGE),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_layers(name, value, error, message):
    AdapterLayer(**LAYER)
    with pytest.raises(error, match=f"^{name}: {message}"):
        AdapterLayer(**{**LAYER, name: value})


@pytest.mark.parametrize(("name", "value"), [("layers", [1]), ("format", 1), ("notes", "x"), ("config", []),
                                             ("layers", {"a": A}), ("layers", {1: AdapterLayer(**LAYER)})])  # fmt: skip
def test_adapters(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected "):
        Adapter(**{"layers": {}, name: value})


@pytest.mark.parametrize("base", ["/model", 3, {"lm_head.weight": 3}, {3: A}, [A], b"x"])
def test_a_base_that_is_none(tmp_path, base):
    save_adapter(adapter_for(Model(), NAMES), tmp_path)
    with pytest.raises(TypeError, match=r"^base: expected a torch.nn.Module, its state dict, or modules by name, got "):
        read_adapter(tmp_path, base)
    assert list(read_adapter(tmp_path, {**Model().state_dict(), "_extra_state": {"any": 1}}).layers) == NAMES


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_numbers_beyond_float64(tmp_path, value):
    model, adapter = Model(), adapter_for(Model(), NAMES)
    save_adapter(adapter, tmp_path)
    calls = {
        "scaling": [lambda: read_adapter(tmp_path, scaling=value), lambda: load_adapter(tmp_path, scaling=value)],
        "strength": [lambda: with_strength(model, adapter, value), lambda: set_dora_strength(applied(), value)],
        "weights": [lambda: combine_adapters(model, [adapter], [value])],
        "alpha": [lambda: DoRALinear(4, 4, rank=2, alpha=value), lambda: apply_dora(Model(), rank=2, alpha=value)],
        "dropout": [lambda: DoRALinear(4, 4, rank=2, dropout=value)],
        "eps": [lambda: DoRALinear(4, 4, rank=2, eps=value)],
    }
    if isinstance(value, int):
        calls["rank"] = [lambda: DoRALinear(4, 4, rank=value),
                         lambda: combine_adapters(model, [adapter], [1], rank=value)]  # fmt: skip
    for name, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=rf"(^|: ){name}: expected .*, got one beyond the range of float64$"):
                call()


def applied():
    model = Model()
    apply_dora(model, ["q_proj"])
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, r"^model: expected a torch\.nn\.Module, got NoneType"),
        ({"adapter": "path"}, TypeError, r"^adapter: expected an Adapter, got str; read_adapter\(path\) gives one"),
        ({"adapter": None}, TypeError, r"^adapter: expected an Adapter, got NoneType"),
        ({"adapter": Adapter({})}, ValueError, r"^adapter: expected layers, got none"),
        ({"strength": "1"}, TypeError, r"^strength: expected a number, got str"),
        ({"strength": None}, TypeError, r"^strength: expected a number, got NoneType"),
        ({"strength": float("nan")}, ValueError, r"^strength: expected a finite number, got nan"),
        ({"model": nn.Linear(2, 2)}, ValueError, r"^adapter: layers.0.q_proj: the model has no such layer"),
    ],
)
def test_with_strength(change, error, message):
    arguments = {"model": Model(), "adapter": adapter_for(Model(), NAMES), "strength": 0.5, **change}
    with pytest.raises(error, match=message):
        with_strength(*arguments.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapters": 3}, TypeError, "^adapters: expected a list of Adapter, got int"),
        ({"adapters": "ab"}, TypeError, "^adapters: expected a list of Adapter, got str"),
        ({"adapters": None}, TypeError, "^adapters: expected a list of Adapter, got NoneType"),
        ({"adapters": iter([])}, TypeError, "^adapters: expected a list of Adapter, got list_iterator"),
        ({"weights": 1.0}, TypeError, "^weights: expected a list of numbers, got float"),
        ({"weights": None}, TypeError, "^weights: expected a list of numbers, got NoneType"),
        ({"weights": [None]}, TypeError, "^weights: expected numbers, got NoneType"),
    ],
)
def test_combine_adapters(change, error, message):
    arguments = {"model": Model(), "adapters": [adapter_for(Model(), NAMES)], "weights": [1.0], **change}
    with pytest.raises(error, match=message):
        combine_adapters(*arguments.values())

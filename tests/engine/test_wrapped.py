"""Models inside `torch.compile`, `DataParallel` and `DistributedDataParallel`: names, files and values stay theirs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dora_kernels import (
    adapted_layers,
    apply_dora,
    attach,
    combine_adapters,
    dora_state_dict,
    extract,
    load_adapter,
    mark_only_dora_trainable,
    merge_all,
    remove_dora,
    save_adapter,
    set_dora_strength,
    trainable_summary,
)

NAMES = ["0", "2.1"]


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Tanh(), nn.Linear(5, 4)))


def trained():
    model = bare()
    apply_dora(model, rank=2)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.weight.normal_()
    mark_only_dora_trainable(model)
    return model


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def block_compiled(model):
    model[2] = compiled(model[2])
    return model


def twice(model):
    return compiled(nn.DataParallel(model))


WRAPPERS = [compiled, block_compiled, nn.DataParallel, twice, nn.parallel.DistributedDataParallel]
X = torch.arange(18.0).view(3, 6) / 9 - 1


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_names_and_values(wrap, group, tmp_path):
    plain = trained()
    model = wrap(copy.deepcopy(plain))
    y = plain(X)
    torch.testing.assert_close(model(X), y)
    assert list(adapted_layers(model)) == NAMES == list(extract(model).layers)
    assert dora_state_dict(model).keys() == dora_state_dict(plain).keys()
    assert trainable_summary(model) == trainable_summary(plain)
    pytest.importorskip("safetensors")
    save_adapter(model, tmp_path)
    other = bare()
    load_adapter(tmp_path, other)
    torch.testing.assert_close(other(X), y)
    assert list(combine_adapters(model, [extract(model)], [0.5])[0].layers) == NAMES
    set_dora_strength(model, 0.0)
    assert torch.equal(model(X), bare()(X))
    set_dora_strength(model, 1.0)
    merge_all(model)
    torch.testing.assert_close(model(X), y)
    assert not adapted_layers(model)


@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if wrap.__name__ != "DistributedDataParallel"],
                         ids=lambda wrap: wrap.__name__)  # fmt: skip
def test_layers_reach_the_model_inside(wrap):
    """Also one that has been compiled and has run."""
    plain = trained()
    model = wrap(bare())
    before = model(X)
    assert apply_dora(model, rank=3) == NAMES
    torch.testing.assert_close(model(X), before)
    assert attach(model, extract(plain)) == NAMES
    torch.testing.assert_close(model(X), plain(X))
    remove_dora(model)
    torch.testing.assert_close(model(X), before)
    assert attach(model, extract(plain)) == NAMES
    torch.testing.assert_close(model(X), plain(X))


def test_a_layer_that_is_compiled_itself():
    """Its wrapper would go on with the old one."""
    model = bare()
    model[0] = compiled(model[0])
    with pytest.raises(ValueError, match=r"0: the layer is wrapped by itself \(OptimizedModule\); adapt it before"):
        apply_dora(model, ["0"])
    model = trained()
    y = model(X)
    model[0] = compiled(model[0])
    assert list(adapted_layers(model)) == NAMES
    torch.testing.assert_close(merge_all(model)(X), y)


def test_a_sharded_model(group):
    """FSDP2 keeps parts of weights, of which no norm can start."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"0: the layer is sharded; adapt the model before"):
        apply_dora(model, ["0"])
    with pytest.raises(ValueError, match=r"'all-linear' finds no layer .*: 0: the layer is sharded"):
        apply_dora(model)


def test_a_sharded_stack(group):
    """As tensor parallelism makes them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.ModuleDict({"experts": nn.Module()})
    stack = distribute_tensor(torch.randn(3, 4, 5), init_device_mesh("cpu", (1,)), [Shard(1)])
    model["experts"].up = nn.Parameter(stack)
    said = r"experts\.up: the layer is sharded; .* dora_kernels\.patch_peft_globally\(\) on a tensor-parallel model"
    with pytest.raises(TypeError, match=said):
        apply_dora(model, [], rank=2, target_parameters=["experts.up"])


"""Replicas, as `torch.nn.DataParallel` makes them: shallow copies with weights of their own, which run at once.

And what a call leaves behind in a layer.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from dora_kernels import patch_peft
from dora_kernels.peft.magnitude import _Called


def patched():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 20)), LoraConfig(r=3, use_dora=True, target_modules=["0"]))
    return model, patch_peft(model)


def replica_of(module, factor):
    """As `torch.nn.parallel.replicate` makes it, with another weight."""
    replica = module._replicate_for_data_parallel()
    replica._parameters["weight"] = nn.Parameter(module.weight.detach() * factor)
    return replica


def test_replicas_record_their_own_weight():
    """The dictionary of hooks is one for all of them."""
    module, x = nn.Linear(64, 8, bias=False), torch.randn(2, 64)
    replicas = [replica_of(module, factor) for factor in (1.0, 2.0, 3.0, 4.0)]
    assert all(replica._forward_hooks is module._forward_hooks for replica in replicas)
    barrier, wrong = threading.Barrier(len(replicas)), []

    def run(replica):
        for _ in range(200):
            barrier.wait()
            if not torch.equal(_Called(replica, x).weight, replica.weight):
                wrong.append(1)

    threads = [threading.Thread(target=run, args=(replica,)) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_computed_factor_is_not_kept():
    """`functional_call` with a computed lora_A: after the call neither it nor its graph is alive."""
    model, _ = patched()
    name = next(name for name, _ in model.named_parameters() if "lora_A" in name)
    start = model.get_parameter(name).detach().clone().requires_grad_()
    computed = start * 2.0
    alive = weakref.ref(computed)
    functional_call(model, {name: computed}, (torch.randn(2, 24),)).sum().backward()
    del computed
    gc.collect()
    assert alive() is None and start.grad is not None


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


REASONS = {
    "parametrized": (lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", Double()),
                     "base_layer is parametrized"),
    "meta": (lambda layer: layer.lora_B["default"].to("meta"), r"lora_B.default.weight is on the meta device"),
    "hook": (lambda layer: layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None),
             "the magnitude of adapter 'default' has a hook"),
    "scaling": (lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
                "the scaling of adapter 'default' is a tensor"),
    "empty": (lambda layer: layer.lora_A["default"].weight.untyped_storage().resize_(0),
              "lora_A.default.weight has no memory now"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_skipped_names_the_cause(reason):
    model, handle = patched()
    change, wanted = REASONS[reason]
    change(model.base_model.model[0])
    ((_, said),) = handle.skipped.items()
    assert wanted in said and said.startswith("its weights cannot be read outside their modules' calls: ")

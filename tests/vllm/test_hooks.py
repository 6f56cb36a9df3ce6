"""What is replaced in vLLM, without an engine: what is refused, and an order that all ranks share."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` runs the tests with its engine", allow_module_level=True)

from vllm_models import environment


@pytest.fixture(scope="module")
def hooks():
    from dora_kernels.vllm import hooks

    hooks.install()
    return hooks


def manager_of(**modules):
    """What a check reads of vLLM's manager, whose adapters have what it is asked for."""
    return SimpleNamespace(
        modules=modules, packed_modules={}, model=torch.nn.Module(),
        _get_lora_layer_weights=lambda adapter, name: adapter.loras.get(name),
    )  # fmt: skip


def test_what_is_not_supported_is_refused_by_name(hooks, monkeypatch):
    """Layers whose output takes another way, as with --fully-sharded-loras, and embeddings."""
    from vllm.lora import layers

    for name in ("RowParallelLinearWithShardedLoRA", "VocabParallelEmbeddingWithLoRA", "FusedMoEWithLoRA"):
        kind = getattr(layers, name)
        adapter = SimpleNamespace(loras={"layer": object()})
        with pytest.raises(ValueError, match=f"layer: .*{name}"):
            hooks._check(manager_of(layer=kind.__new__(kind)), adapter)
    adapter = SimpleNamespace(loras={})
    hooks._check(manager_of(), adapter)
    monkeypatch.setattr(hooks.envs, "VLLM_LORA_ENABLE_DUAL_STREAM", True, raising=False)
    with pytest.raises(ValueError, match="VLLM_LORA_ENABLE_DUAL_STREAM"):
        hooks._check(manager_of(), adapter)


def test_a_layer_of_another_rank_of_a_pipeline_is_no_error(hooks):
    """A layer that this process does not hold is missing in the model, or held by another process."""
    from vllm.model_executor.models.utils import PPMissingLayer

    adapter, manager = SimpleNamespace(loras={"layers.7.q_proj": object()}), manager_of()
    with pytest.raises(ValueError, match=r"layers\.7\.q_proj"):
        hooks._check(manager, adapter)
    manager.model.missing = PPMissingLayer()
    hooks._check(manager, adapter)


def test_every_rank_takes_adapters_in_one_order(hooks):
    """vLLM hands each rank a set of requests, hashed by name, and a row-parallel norm waits for all ranks."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager

    seen = []
    manager = SimpleNamespace(_apply_adapters=lambda requests: seen.extend(one.lora_int_id for one in requests))
    requests = {LoRARequest(f"adapter {number}", number, f"/{number}") for number in range(1, 40)}
    WorkerLoRAManager.set_active_adapters(manager, requests, None)
    assert seen == sorted(seen) and len(seen) == 39


def test_it_is_installed_once(hooks):
    from vllm.lora.peft_helper import PEFTHelper

    before = PEFTHelper._validate_features
    hooks.install()
    assert PEFTHelper._validate_features is before


_UNTESTED = """
import dora_kernels.vllm as plugin
from vllm.lora.peft_helper import PEFTHelper
before = PEFTHelper._validate_features
plugin.TESTED = ("0.0.1",)
plugin.register()
assert PEFTHelper._validate_features is before
config = PEFTHelper(r=8, lora_alpha=8, target_modules=["q_proj"], use_dora=True)
print(*config._validate_features())
"""


def test_a_version_that_is_not_tested():
    """vLLM's methods are as they were, and it refuses DoRA by itself."""
    done = subprocess.run(
        [sys.executable, "-c", _UNTESTED], env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    assert "does not yet support DoRA" in done.stdout
    assert "has not been tested, expected 0.0.1" in done.stdout + done.stderr

"""What vLLM's registry says of model classes."""

from __future__ import annotations

import importlib.util

import pytest

from dora_kernels.vllm.registry import serves_with_lora

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` runs the tests with its engine", allow_module_level=True)


@pytest.mark.parametrize(
    ("classes", "answer"),
    [
        (["GPT2LMHeadModel"], False),  # served, but its class takes no adapters
        (["T5ForConditionalGeneration"], None),
        (["T5ForConditionalGeneration", "LlamaForCausalLM"], True),
    ],
)
def test_with_lora(classes, answer):
    assert serves_with_lora(classes) is answer

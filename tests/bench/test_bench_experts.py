"""The suite `experts`: every provider computes what the dense formula does, and a wrong one is noticed."""

from __future__ import annotations

import pytest
import torch

from bench.providers import LABELS
from bench.suites import SUITES, experts
from dora_kernels.testing import beyond

SMALL = 5, 64, 48, 12, 2


@pytest.mark.parametrize("dtypes", ["fp32", "bf16/fp32"])
@pytest.mark.parametrize("provider", experts.PROVIDERS)
def test_every_provider_is_right(provider, dtypes):
    case = experts.LayerOfExperts(dtypes, torch.device("cpu"), SMALL)
    subject = case.subject(provider)
    assert provider in LABELS and set(subject.parts) == {"forward and backward", "one token"}
    assert not beyond(subject.errors, subject.limits)
    for works in subject.parts.values():
        works[0]()
    assert not beyond(*subject.again())
    assert "experts" in SUITES


def test_a_wrong_one_is_noticed():
    case = experts.LayerOfExperts("fp32", torch.device("cpu"), SMALL)
    subject = case.subject("ours")
    errors, limits = subject.errors, subject.limits
    assert beyond({"y": 100 * limits["y"]}, limits) and not beyond(errors, limits)


def test_parametrized_stacks_are_found_once():
    module = torch.nn.Module()
    for name in experts.STACKS:
        setattr(module, name, torch.nn.Parameter(torch.ones(2, 3, 3)))
        torch.nn.utils.parametrize.register_parametrization(module, name, torch.nn.Identity())
    assert experts.mixtures(module) == [module]

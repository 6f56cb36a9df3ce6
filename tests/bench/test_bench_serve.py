"""The suite serve: every provider computes the same batch, and what a GPU would launch and move."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from bench import report
from bench.run import Options, Run
from bench.suites import serve
from dora_kernels.engine import slots
from dora_kernels.engine.route import Route
from dora_kernels.testing import beyond

RUN = SimpleNamespace(device=torch.device("cpu"))


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", serve.PROVIDERS)
def test_every_provider_computes_the_same_batch(provider, dtypes):
    case = serve.ServeCase(RUN, 5, 3, "zipf", 2, (2, 3), dtypes, 24)
    subject = case.subject(provider)
    assert not beyond(subject.errors, subject.limits) and list(subject.parts) == ["prefill"]


def test_a_wrong_batch_is_seen(monkeypatch):
    """One adapter in the place of another."""
    case = serve.ServeCase(RUN, 4, 3, "distinct", 1, (2,), "fp32", 24)
    right, judged = case.subject("ours_bank"), case.judged("dora")
    assert not beyond(right.errors, right.limits)
    case.__dict__["names"] = case.names[::-1]
    monkeypatch.setattr(case, "judged", lambda kind: judged)
    wrong = case.subject("ours_bank")
    assert beyond(wrong.errors, wrong.limits)


def test_who_is_drawn():
    assert serve.drawn(5, 3, "distinct") == [0, 1, 2, 0, 1]
    uniform, zipf = (serve.drawn(400, 8, how) for how in ("uniform", "zipf"))
    assert set(uniform) == set(zipf) == set(range(8))
    assert zipf.count(0) > 2 * uniform.count(0) and serve.drawn(400, 8, "zipf") == zipf
    assert {(rows, adapters) for rows, adapters, _ in serve.GRID} == {(r, a) for r in (1, 8, 32) for a in (1, 8, 32)}


def test_the_cases():
    labels = [case.label for case in Run(Options(("serve",), "cpu", ["fp32"])).cases()]
    assert len(labels) == len(set(labels)) > 20
    assert "1024x1024, 32 rows, 32 adapters, distinct, rank 16, fp32" in labels
    assert "1024x1024, 8 rows, 8 adapters, zipf, 512 tokens each, rank 16, fp32" in labels
    assert "SmolLM2-135M, 8 rows, 8 adapters, zipf, rank 16, fp32" in labels
    few = Run(Options(("serve",), "cpu", ["fp32"], hidden=[32], ranks=[2], tokens=[1], rounds=3, sample_ms=0.1))
    case = few.cases()[7]
    few.measure(case)
    assert not few.record["failures"] and {row["provider"] for row in few.record["rows"]} == set(serve.PROVIDERS)
    few.record["hardware"]["others"] = 0.0
    table = report.serve_table([few.record])
    assert table.count("\n| 32x32") == 1 and "1.00" not in table.split("\n")[2].split("|")[1]


def test_on_a_gpu_by_count(monkeypatch):
    """As many launches as plain LoRA's, and 1.02 times its bytes at most."""
    launched = []
    kept = slots.kernels

    def counting():
        found = kept()
        return SimpleNamespace(compose=lambda *args: (launched.append(args), found.compose(*args))[1])

    monkeypatch.setattr(slots, "kernels", counting)
    route, ranks = Route.of([1, -1, 0, 1], (2, 2)), (2, 2)
    x, base, a, b = torch.randn(4, 6), torch.randn(4, 5), torch.randn(2, 2, 6), torch.randn(2, 2, 5).mT
    counts = []
    for g in (None, torch.rand(2, 5)):
        launched.clear()
        h = slots.slots_shrink(x, a, route, ranks, "triton")
        slots.slots_compose(base.clone(), h, b, g, None, route, ranks, False, "triton")
        counts.append(len(launched))
    assert counts == [2, 2]
    case = serve.ServeCase(RUN, 32, 32, "distinct", 1, (16,), "bf16", 4096)
    case.__dict__["loaded"] = {
        name: SimpleNamespace(layers={"layers.0": SimpleNamespace(rank=16)}) for name in case.names
    }
    case.__dict__["stack"] = SimpleNamespace(layers=[0])
    (dora, _), (lora, _), (frozen, _) = (case._least(kind) for kind in ("dora", "lora", "frozen"))
    assert frozen < lora < dora <= 1.02 * lora

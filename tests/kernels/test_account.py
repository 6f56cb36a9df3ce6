"""The static account: its formulas are what the interpreter counts, and the counter counts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import bf16, f16, f32

pytest.importorskip("triton")

import triton
import triton.language as tl
from aot import PRIMITIVES, account
from aot.counting import Counts, count, counted
from aot.launches import (
    Call,
    compose,
    factor_grads,
    kept_norm,
    merge,
    one_pass,
    product,
    product_over_tokens,
    scale_reduce,
    shipped,
    weight_norm,
)
from aot.recording import Launch, Made, kernels
from aot.resources import TARGETS
from aot.traffic import FORMULAS, LARGE, issued, least

from bench.__main__ import main
from dora_kernels.kernels import INTERPRETED, config

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off")

# Sizes, ranks and token counts that are no multiples of a tile; one block and several; parts of K, and strips.
_NORMS = (((1, 1), 1), ((5, 130), 3), ((150, 300), 16), ((70, 1100), 33), ((65, 257), 70), ((130, 90), 129))
_COMPOSES = ((1, 1, 1), (1, 70, 300), (16, 16, 129), (17, 33, 129), (133, 3, 300), (65, 130, 40))
_SCALE_REDUCES = ((1, 1), (3, 140), (65, 128), (700, 10), (90, 300))
CALLS: dict[str, Callable[..., Call]] = {
    **{
        f"weight_norm {rows} x {columns}, rank {rank}": partial(weight_norm, (bf16, bf16), rank, (rows, columns))
        for (rows, columns), rank in _NORMS
    },
    "weight_norm fp16": partial(weight_norm, (f16, f16), 9, (67, 133)),
    "weight_norm bf16+fp32": partial(weight_norm, (bf16, f32), 20, (67, 133)),
    "weight_norm fp32": partial(weight_norm, (f32, f32), 5, (67, 133)),
    "weight_norm axis in": partial(weight_norm, (bf16, bf16), 5, (67, 133), axis="in"),
    "weight_norm Conv1D": partial(weight_norm, (bf16, f32), 70, (67, 133), conv1d=True),
    "weight_norm in one part": partial(weight_norm, (bf16, bf16), 2, (70, 20)),
    "weight_norm factored in pieces": partial(weight_norm, (bf16, f32), 140, (67, 133)),
    "weight_norm factored, |W|² given": partial(weight_norm, (bf16, bf16), 129, (67, 133), square=True),
    "weight_norm direct at a high rank": partial(weight_norm, (f16, f16), 140, (67, 133)),
    **{
        f"kept_norm rank {rank}, {'unchanged' if unchanged else 'changed'}": partial(
            kept_norm, (bf16, f32), rank, (67, 133), unchanged=unchanged
        )
        for rank in (5, 140)
        for unchanged in (False, True)
    },
    "factor_grads": partial(factor_grads, (bf16, bf16), 5, 70, 3),
    "factor_grads rank 70": partial(factor_grads, (bf16, f32), 70, 33, 1),
    "factor_grads without dB": partial(factor_grads, (f32, f32), 3, 16, 2, False),
    "factor_grads of parts": partial(factor_grads, (bf16, bf16), 5, 70, 3, groups=2, parts=3),
    "merge": partial(merge, (bf16, bf16), 5, (67, 133)),
    "merge rank 70": partial(merge, (bf16, f32), 70, (67, 133), conv1d=True),
    "merge stochastic": partial(merge, (bf16, f32), 5, (67, 133), seed=7),
    "merge stochastic, axis in": partial(merge, (f16, f16), 70, (67, 133), axis="in", seed=7),
    "merge without m": partial(merge, (f32, f32), 33, (67, 133), axis="in", magnitude=False),
    **{
        f"compose {tokens} x {size}, rank {rank}": partial(compose, (bf16, bf16), tokens, rank, size)
        for tokens, rank, size in _COMPOSES
    },
    "compose fp16+fp32": partial(compose, (f16, f32), 70, 5, 140),
    "compose wide h": partial(compose, (bf16, f32), 70, 35, 140, wide=True),
    "compose fp32": partial(compose, (f32, f32), 35, 40, 70),
    "compose without g": partial(compose, (bf16, bf16), 70, 5, 140, magnitude=False),
    "compose without bias": partial(compose, (bf16, bf16), 70, 5, 140, bias=False),
    "compose in place": partial(compose, (bf16, bf16), 70, 5, 140, False, False, keep=False),
    "compose of experts": partial(compose, (bf16, bf16), 75, 5, 140, groups=3),
    "compose of experts, few tokens": partial(compose, (bf16, f32), 5, 20, 70, wide=True, groups=4, bias=False),
    "compose of adapters": partial(compose, (bf16, bf16), 40, 20, 70, keep=False, groups=2, adapters=True),
    "weight_norm of experts": partial(weight_norm, (bf16, f32), 5, (67, 133), groups=3),
    "kept_norm of experts": partial(kept_norm, (bf16, bf16), 5, (67, 133), groups=3),
    "merge of experts": partial(merge, (bf16, bf16), 5, (67, 133), groups=3, conv1d=True),
    "factor_grads of experts": partial(factor_grads, (bf16, bf16), 5, 70, 3, groups=3),
    "scale_reduce of experts": partial(scale_reduce, bf16, 75, 140, groups=3),
    "product": partial(product, (bf16, bf16), 70, 300, 20),
    "product in pieces": partial(product, (bf16, f32), 5, 130, 60),
    "product of a gradient": partial(product, (f16, f16), 75, 130, 5, transposed=True, out=f32),
    "product of experts": partial(product, (bf16, bf16), 75, 140, 5, groups=3),
    "product of adapters": partial(product, (bf16, bf16), 40, 260, 60, groups=2, adapters=True),
    "one_pass": partial(one_pass, (bf16, bf16), 5, 20, (67, 300)),
    "one_pass that keeps its base": partial(one_pass, (f16, f16), 17, 5, (70, 133), keep=True),
    "one_pass of Conv1D": partial(one_pass, (bf16, f32), 3, 20, (40, 133), conv1d=True, bias=False, keep=True),
    **{f"scale_reduce {tokens} x {size}": partial(scale_reduce, bf16, tokens, size) for tokens, size in _SCALE_REDUCES},
    "scale_reduce fp32": partial(scale_reduce, f32, 37, 140),
    "scale_reduce without scaled": partial(scale_reduce, bf16, 37, 140, scaled=False),
    "scale_reduce without dot": partial(scale_reduce, bf16, 37, 140, dot=False),
    "scale_reduce without sum": partial(scale_reduce, f16, 37, 140, total=False),
    "scale_reduce with a product": partial(scale_reduce, bf16, 300, 140, total=False, rank=5),
    "scale_reduce with a product in pieces": partial(scale_reduce, bf16, 37, 140, rank=20, h=f32),
    "scale_reduce of experts, with a product": partial(scale_reduce, bf16, 75, 140, groups=3, rank=5),
    "product_over_tokens": partial(product_over_tokens, bf16, 175, 140, 20, groups=3, h=f32),
}


@interpreted
@pytest.mark.parametrize("programs", [4, 1024])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_formulas_are_what_the_interpreter_counts(
    make: Callable[..., Call], programs: int, monkeypatch: pytest.MonkeyPatch
):
    """`programs` make a full grid: with few of them a program has several steps or strips even of a small problem."""
    monkeypatch.setattr(config, "_FULL_GRID", programs)
    call = make(device="cpu")
    recorded, counts = counted(call)
    assert counts
    for launch, found in counts:
        formula = FORMULAS[launch.kernel](launch, call.unchanged)
        assert formula.loaded == found.loaded
        assert formula.stored == found.stored
        assert formula.flops == found.flops
        assert found.atomics == 0

        # "changed" is one number, which every program may write.
        assert {**found.stored, "changed": 0} == {**found.distinct_stored, "changed": 0}

    minimum = least(call, recorded.results)
    moved = issued(call, recorded)
    for name in LARGE[call.primitive]:
        once = minimum.of((name,))
        assert moved.of((name,)) == (large_bytes(call, recorded.launches, name, once) if once else 0), name
    if not call.unchanged:
        for name, wanted in minimum.loaded.items():
            seen = [found.distinct_loaded for _, found in counts] + [one.loaded for one in recorded.operations]
            assert max(one.get(name, 0) for one in seen) == wanted, name

    without_memory = make(device="meta").launches
    assert [(one.signature, one.grid) for one in without_memory] == [(one.signature, one.grid) for one, _ in counts]


def large_bytes(call: Call, launches: list[Launch], operand: str, once: int) -> int:
    """What a call moves of one of its large operands, which has `once` bytes."""
    sampled = sum(one["size_w"] * one["w_ptr"] for one in launches if one.kernel == "fingerprint")
    if call.unchanged:
        return sampled
    merged = call.operands.get("m") is not None
    squared = "square" not in call.operands and any(one.kernel == "factored_norm" for one in launches)
    return sampled + once * (2 if operand == "w" and (merged or squared) else 1)


def test_every_kernel_has_a_formula_and_is_compiled():
    assert set(kernels()) == set(FORMULAS) == {launch.kernel for launch in shipped()}


def test_the_account_holds_every_primitive_and_reads_large_operands_once():
    found = account.rows(PRIMITIVES)
    assert {row.call.primitive for row in found} == set(PRIMITIVES)
    known = {(launch.kernel, launch.config) for launch in shipped()}
    for row in found:
        for name in LARGE[row.call.primitive]:
            wanted = large_bytes(row.call, row.launches, name, row.least.of((name,)))
            assert row.issued.of((name,)) == wanted, (row.call.primitive, row.call.case, name)
        if not row.call.unchanged:
            assert row.ratio >= 1.0 and (row.flops_ratio or 1.0) >= 1.0
        assert {(launch.kernel, launch.config) for launch in row.launches} <= known


@triton.jit
def _known(x_ptr, y_ptr, total_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + tile, mask=tile < size, other=0.0)
    again = tl.load(x_ptr + offs)
    tl.atomic_add(total_ptr, tl.sum(again, 0))
    tl.store(y_ptr + tile, tl.dot(x, x), mask=tile < 2 * size)


@interpreted
def test_the_counter_counts_lanes_addresses_products_and_atomics():
    x, y, total = torch.zeros(16, 16), torch.zeros(16, 16), torch.zeros(1)
    arguments = {"x_ptr": x, "y_ptr": y, "total_ptr": total, "size": 100, "BLOCK": 16}
    found = count(Made("known", _known, (2,), arguments, {}))
    assert found == Counts(
        loaded={"x": 2 * 4 * 116},
        stored={"y": 2 * 4 * 200},
        flops=2 * 2 * 16**3,
        distinct_loaded={"x": 4 * 100},
        distinct_stored={"y": 4 * 200},
        atomics=2,
    )
    with pytest.raises(Exception, match=r"lie in none of \['x', 'y', 'total'\]"):
        count(Made("known", _known, (1,), {**arguments, "x_ptr": x[:4].clone(), "size": 256}, {}))


def test_launch_records_grid_and_arguments():
    launch: Launch = compose((bf16, f32), 100, 70, 300, bias=False).launches[0]
    blocks = -(-100 // launch["BLOCK_M"]) * -(-300 // launch["BLOCK_N"])
    assert launch.grid == (blocks,)
    assert (launch["M"], launch["N"], launch["R"]) == (100, 300, 70)
    assert (launch["base_ptr"], launch["b_ptr"], launch["bias_ptr"]) == (2, 4, 0)


def test_command_prints_the_account(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["static", "--no-compile", "--kernel", "scale_reduce", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in record["traffic"]} == {"scale_reduce"} and record["resources"] == []
    assert main(["static", "--no-compile", "--kernel", "scale_reduce"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "kernel" and rows and all(row.startswith("scale_reduce ") for row in rows)
    assert main(["static", "--no-compile", "--all", "--kernel", "scale_reduce"]) == 0
    assert " scaled " in capsys.readouterr().out


def test_command_names_what_is_valid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for option, valid in (("--kernel", PRIMITIVES), ("--target", TARGETS)):
        with pytest.raises(SystemExit, match="2"):
            main(["static", option, "nothing"])
        said = capsys.readouterr().err
        assert "'nothing'" in said and all(name in said for name in valid)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else "there")
    with pytest.raises(SystemExit, match="2"):
        main(["static"])
    assert "triton is not installed" in capsys.readouterr().err


def test_whole_layers():
    """No more launches, passes or bytes kept than PEFT's LoRA has, but for the base result that is kept."""
    pytest.importorskip("peft")
    from aot import layers

    found = {(row.dtypes, row.provider, row.part): row for row in layers.rows()}
    for dtypes in ("bf16", "bf16+fp32"):
        ours, lora = (
            {part: found[dtypes, provider, part] for part in ("forward", "backward")}
            for provider in ("dora_kernels", "PEFT LoRA")
        )
        for part in ours:
            assert ours[part].launches <= lora[part].launches
        total = [sum(sum(row.passes.values()) for row in layer.values()) for layer in (ours, lora)]
        assert total[0] < total[1]
        assert ours["forward"].saved <= lora["forward"].saved + 1 + 0.1
        assert found[dtypes, "dora_kernels", "evaluation, unchanged"].launches <= lora["forward"].launches
        frozen = [found[dtypes, "frozen", part] for part in ("forward", "backward")]
        assert [(row.launches, row.passes["[M, N]"], row.passes["[N, K]"]) for row in frozen] == [(1, 1, 1)] * 2

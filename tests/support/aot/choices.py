"""What the shipped defaults choose for a layer on a GPU, by the model of bytes, launches and host time."""

from __future__ import annotations

import itertools
from typing import Any

from dora_kernels.engine import cost
from dora_kernels.engine.dispatch import ONE_PASS_RANK, ONE_PASS_TOKENS

SHAPES = (1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)
RANKS = 16, 64, 384
TOKENS = 1, 64, 1024, 8192
STATEMENT = (
    f"us, max(host, launches * {1e6 * cost.GAP:g} us + FLOPs / {cost.RATE / 1e12:g} TFLOP/s + bytes / "
    f"{cost.BANDWIDTH / 1e12:g} TB/s), the norm or the merged weight at hand; nothing of it has been measured on a GPU"
)


def rows() -> list[dict[str, Any]]:
    """Every shape, rank, number of tokens and direction."""
    found = []
    for (out, inside), rank, gradients, tokens in itertools.product(SHAPES, RANKS, (True, False), TOKENS):
        shape = out, inside, rank
        row: dict[str, Any] = {
            "layer": f"{out}x{inside}", "rank": rank, "part": "training" if gradients else "evaluation",
            "tokens": tokens,
        }  # fmt: skip
        for way in ("formula", "fused", "merged"):
            one = cost.PATHS[way, gradients]
            size = 2 * tokens * (one.passes_out * out + one.passes_in * inside)
            row |= {
                f"{way} launches": one.launches, f"{way} MB": size / 1e6, f"{way} host": 1e6 * one.host,
                way: 1e6 * cost.seconds(way, gradients, tokens, *shape),
            }  # fmt: skip
        few = tokens <= ONE_PASS_TOKENS and rank <= ONE_PASS_RANK and not gradients
        first = cost.first_tokens("fused", "formula", gradients, *shape)
        later = "fused" if first is not None and tokens >= first else "formula"
        row["default"] = "one pass" if few else later
        found.append(row)
    return found


def table() -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    found = rows()
    texts = [[f"{value:.0f}" if isinstance(value, float) else str(value) for value in row.values()] for row in found]
    return list(found[0]), texts

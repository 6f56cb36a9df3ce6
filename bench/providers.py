"""Who is compared, by the name that `--providers` takes, and what is asked of a comparison. Imports no torch.

A provider is the real, installed library; one that is not installed, or does not run here, raises `Missing`, and the
run says so by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

LABELS = {
    "frozen": "frozen layer",
    "peft_lora": "PEFT LoRA",
    "peft_lora_compiled": "PEFT LoRA, compiled",
    "peft_dora": "PEFT DoRA",
    "peft_dora_cached": "PEFT DoRA, cached",
    "peft_dora_compiled": "PEFT DoRA, compiled",
    "torchtune": "torchtune DoRA",
    "lycoris": "LyCORIS DoRA",
    "axolotl": "axolotl DoRA",
    "dense": "dense, from scratch",
    "ours": "ours: patch_peft",
    "ours_merged": "ours, merged",
    "ours_frozen": "ours, frozen norms",
    "ours_compiled": "ours, compiled",
    "ours_lora": "ours: LoRA",
    "parametrized_dora": "DoRA, parametrized",
    "ours_triton": "ours, triton",
    "ours_torch": "ours, torch",
    "ours_reference": "ours, reference",  # in earlier records
    "ours_direct": "ours, direct form",
    "ours_factored": "ours, factored form",
    "ours_unchanged": "ours, unchanged",  # in earlier records
    "ours_fused": "ours, one kernel",  # in earlier records
    "ours_bank": "ours: AdapterBank",
    "ours_bank_lora": "ours: LoRA bank",
}
REFERENCES = ("ours", "peft_lora", "peft_dora", "frozen", "ours_bank_lora")
"""Those that every row has its ratio to, where they take part."""
DTYPES = ("fp32", "bf16", "fp16", "bf16+fp32", "bf16/fp32")
"""Names in `dora_kernels.testing.DTYPES`; float32 adapters run under autocast after a "+", without it after a "/"."""
ACCUMULATED = 4
"""Micro-batches of the longer optimizer step."""

Work = Callable[[], Any]
Checked = tuple[dict[str, float], dict[str, float]]
"""Errors relative to float64 by name, and those allowed."""


class Missing(Exception):
    """What cannot be had here, a provider, a model or a text, and why, in one line."""


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Where one is imported: it is missing if it is not installed."""
    try:
        yield
    except ImportError as error:
        raise Missing(f"{error}: pip install 'dora-kernels[bench]'") from error


@dataclass
class Subject:
    """One provider's work at one case, checked against the oracle."""

    provider: str
    parts: dict[str, Sequence[Work]]
    """What is timed, by name: the same call on one or several copies of its inputs; none where nothing is."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative to float64."""
    limits: dict[str, float] = field(default_factory=dict)
    least: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By part: the fewest bytes that have to be moved, and the fewest FLOPs."""
    in_graph: frozenset[str] = frozenset()
    """Parts that are replayed from a CUDA graph, so that no time of the host counts."""
    in_place: bool = False
    """True if calls change their inputs, so that the next one has another result."""
    again: Callable[[], Checked] | None = None
    """Checks what the timed calls have left: a norm that an optimizer's step has made stale, for one."""


class Case:
    """One comparison: a shape, a rank, a number of tokens, dtypes."""

    suite: str
    dtypes: str
    label: str
    """For people."""
    facts: dict[str, Any]
    """What every row of the case states: shape, rank, tokens, dtypes."""
    providers: Sequence[str]
    """Those that the suite offers, in the order of its tables."""
    timed = True
    """False where only errors and memory are of interest."""
    share = 0.05
    """Of the run's time, which the timing of a part may take."""

    def prepare(self) -> None:
        """Get what all subjects need; raises Missing where the case cannot be had."""

    def subject(self, provider: str) -> Subject:
        """A provider's work; raises Missing, or what the library has to say."""
        raise NotImplementedError

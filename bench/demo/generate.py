"""Generated tokens: timed with the adapters unmerged, and a sample to read."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from bench.demo.phases import Phase
from bench.demo.settings import WARMUP
from bench.demo.train import clock

LEAST_TOKENS = WARMUP + 6


def time_tokens(models: dict[str, Any], prompt: torch.Tensor, count: int, phase: Phase) -> dict[str, list[float]]:
    """Seconds of each greedy token of each model, the models taking turns token by token."""
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    state: dict[str, tuple[torch.Tensor, Any]] = {}
    orders = list(itertools.permutations(models))
    with torch.no_grad():
        for kind, model in models.items():
            model.eval()
            first = model(input_ids=prompt, use_cache=True)
            state[kind] = first.logits[:, -1:].argmax(-1), first.past_key_values
        for step in range(count):
            if step >= LEAST_TOKENS and phase.over():
                phase.stopped(step, count, "tokens")
                break
            for kind in orders[step % len(orders)]:
                token, cache = state[kind]
                start = clock(prompt.device)
                output = models[kind](input_ids=token, past_key_values=cache, use_cache=True)
                state[kind] = output.logits[:, -1:].argmax(-1), output.past_key_values
                seconds[kind].append(clock(prompt.device) - start)
            phase.advance()
    return seconds


def sample(model: Any, tokenizer: Any, prompt: torch.Tensor, count: int, phase: Phase) -> str:
    """The model's greedy continuation of `prompt`."""
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=pad,
        max_time=phase.box,
    )
    made = ids.shape[1] - prompt.shape[1]
    if made < count and phase.over():
        phase.stopped(made, count, "tokens")
    return str(tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True))

"""One layer of vLLM's on a CPU: the base product, with vLLM's LoRA, with the plugin's op behind it. In turns.

    make test-vllm ARGS=--version      # makes the environment
    .venv-vllm/bin/python -m bench.vllm_layer

The last column is the median of the quotients of neighbouring samples, DoRA over LoRA.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch

SIZE, RANK, THREADS = 2048, 16, 2


def quotients(tokens: int, slots: int, dtype: torch.dtype, samples: int) -> tuple[list[float], float]:
    """Median times in ms of base, LoRA and DoRA, and the quotient."""
    from vllm.lora.layers.utils import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from dora_kernels.vllm.scale import Route, scale_slots_

    prefill, device = tokens > 64, torch.device("cpu")
    wrapper = PunicaWrapperCPU(tokens, tokens, device)
    ids = tuple(1 + (i * slots // tokens if prefill else i % slots) for i in range(tokens))
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=prefill), list(range(1, slots + 1)), slots + 1, 1)
    route = Route(tokens, slots, device)
    route.scaled.fill_(True)
    route.fill(wrapper.token_lora_indices)
    a, b = torch.randn(slots, 1, RANK, SIZE, dtype=dtype), torch.randn(slots, 1, SIZE, RANK, dtype=dtype)
    w, x, g = torch.randn(SIZE, SIZE, dtype=dtype), torch.randn(tokens, SIZE, dtype=dtype), torch.rand(slots, SIZE)

    def base() -> torch.Tensor:
        return torch.nn.functional.linear(x, w)

    def lora() -> torch.Tensor:
        y = base()
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (SIZE,))
        return y

    def dora() -> torch.Tensor:
        y = lora()
        scale_slots_(y, route.order, route.ends, g, None)
        return y

    calls, times = (base, lora, dora), ([], [], [])
    for call, kept in itertools.chain.from_iterable(zip(calls, times) for _ in range(samples)):
        start = time.perf_counter()
        call()
        kept.append(1e3 * (time.perf_counter() - start))
    warm = [kept[2:] for kept in times]
    pairs = [of_dora / of_lora for of_lora, of_dora in zip(warm[1], warm[2])]
    return [statistics.median(kept) for kept in warm], statistics.median(pairs)


def main() -> None:
    torch.set_num_threads(THREADS)
    print(f"{SIZE} x {SIZE}, rank {RANK}, {THREADS} threads; ms: base, LoRA, DoRA; DoRA / LoRA")
    batches = (1, 1), (8, 8), (32, 8), (32, 32), (512, 8)
    for (tokens, slots), dtype in itertools.product(batches, ("float32", "bfloat16")):
        times, quotient = quotients(tokens, slots, getattr(torch, dtype), samples=80 if tokens < 64 else 8)
        print(f"{tokens:4} tokens, {slots:2} adapters, {dtype:8}", *(f"{ms:8.2f}" for ms in times), f"{quotient:8.3f}")


if __name__ == "__main__":
    main()

"""Ask an installed vLLM which model classes it serves with LoRA. It takes seconds, and needs no model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence


def serves_with_lora(architectures: Sequence[str]) -> bool | None:
    """Return whether vLLM's class for a model takes LoRA adapters; None if vLLM has no class of its own for it.

    vLLM is imported in a process of its own: it changes the environment, and what it logs is not for our output.

    Args:
        architectures: names of model classes, as a ``config.json`` has them. The first that vLLM knows counts.

    Raises:
        RuntimeError: vLLM could not be asked. The message has the last line that it said.
    """
    asked = [sys.executable, "-m", "dora_kernels.vllm.registry", *architectures]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"vLLM could not be asked: {said[-1]}")
    answer: bool | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(architectures: Sequence[str]) -> bool | None:
    from vllm.model_executor.models import ModelRegistry, supports_lora

    known = next((name for name in architectures if name in ModelRegistry.models), None)
    return None if known is None else bool(supports_lora(ModelRegistry.models[known].load_model_cls()))


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1:])))

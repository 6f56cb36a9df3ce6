"""A script for `vllm_models.run_engine`: jobs from a file, in one engine of vLLM's; results into another."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(given: str, out: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    task = json.loads(Path(given).read_text())
    engine = LLM(
        task["model"], skip_tokenizer_init=True, enable_lora=True, max_model_len=128, max_num_seqs=32,
        **{"dtype": "float32", "max_lora_rank": 16, "max_loras": 4, "enforce_eager": True, **task["options"]},
    )  # fmt: skip
    ids: dict[str, int] = {}

    def request(adapter: str | None) -> Any:
        return None if adapter is None else LoRARequest(adapter, ids.setdefault(adapter, len(ids) + 1), adapter)

    def run(job: dict[str, Any]) -> Any:
        if "load" in job:
            try:
                engine.llm_engine.add_lora(request(job["load"]))
            except Exception as error:
                return str(error)
            return None
        sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True, detokenize=False)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for _, prompt in job["generate"]],
            sampling,
            lora_request=[request(adapter) for adapter, _ in job["generate"]],
            use_tqdm=False,
        )
        results = []
        for output in outputs:
            one = output.outputs[0]
            tokens = list(one.token_ids)
            results.append([tokens, [step[token].logprob for token, step in zip(tokens, one.logprobs)]])
        return results

    Path(out).write_text(json.dumps([run(job) for job in task["jobs"]]))


if __name__ == "__main__":
    main(*sys.argv[1:])

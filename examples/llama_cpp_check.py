"""Run the files of `examples/merge_to_gguf.py` in llama.cpp, and compare with what transformers computed.

    python -m venv llama-cpp && llama-cpp/bin/pip install llama-cpp-python     # builds for several minutes
    llama-cpp/bin/python examples/llama_cpp_check.py merged

Needs llama-cpp-python and numpy alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy

DTYPES = ("f32", "f16", "q8_0")
SAID: list[str] = []


@llama_cpp.llama_log_callback
def keep_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    SAID.append(text.decode("utf-8", "replace"))


@contextmanager
def loaded(file: Path, threads: int, lora: Path | None = None) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False,
        lora_path=None if lora is None else str(lora),
        # keys and values kept as float16, its default, would hide smaller differences
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()
        gc.collect()


def logits(model: llama_cpp.Llama, windows: numpy.ndarray) -> numpy.ndarray:
    found = []
    for ids in windows:
        model.reset()
        model.eval(ids.tolist())
        found.append(model.scores[: len(ids)].copy())
    return numpy.stack(found)


def speed(model: llama_cpp.Llama, prompt: list[int], tokens: int = 48) -> float:
    """Tokens a second, one at a time after the prompt."""
    model.reset()
    model.eval(prompt)
    start = time.perf_counter()
    for token in prompt[:1] * tokens:
        model.eval([token])
    return tokens / (time.perf_counter() - start)


def compare(label: str, found: numpy.ndarray, wanted: numpy.ndarray) -> None:
    same = (found.argmax(-1) == wanted.argmax(-1)).mean()
    difference = numpy.abs(found - wanted)
    print(
        f"{label}: largest difference of a logit {difference.max():.2g}, root mean square "
        f"{numpy.sqrt((difference.astype(numpy.float64) ** 2).mean()):.2g}, the same first token {same:.1%} of "
        f"{same.size * wanted[..., 0].size} positions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2, help="of the reference's, to compare")
    chosen = parser.parse_args()
    folder: Path = chosen.folder
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p())
    reference = numpy.load(folder / "reference.npz")
    windows, wanted, with_lora = (reference[key][: chosen.windows] for key in ("ids", "logits", "lora_logits"))
    print(f"llama-cpp-python {llama_cpp.__version__}, {chosen.threads} threads, logits' spread {wanted.std():.2f}")

    for dtype in DTYPES:
        file = folder / f"merged-{dtype}.gguf"
        with loaded(file, chosen.threads) as model, loaded(folder / f"base-{dtype}.gguf", chosen.threads) as base:
            compare(f"{file.name}, {file.stat().st_size / 1e6:.1f} MB", logits(model, windows), wanted)
            rates: dict[str, list[float]] = {"merged": [], "base": []}
            for _ in range(chosen.rounds):
                for name, one in (("merged", model), ("base", base)):
                    rates[name].append(speed(one, windows[0, :32].tolist()))
            print("  " + ", ".join(f"{name} {statistics.median(rate):.1f} tokens/s" for name, rate in rates.items()))
            if dtype == DTYPES[0]:
                for text, ids in zip(reference["texts"], reference["text_ids"]):
                    found = model.tokenize(str(text).encode("utf-8"), add_bos=False, special=True)
                    print(f"  tokenizer: {len(found)} ids, {'the same' if found == json.loads(str(ids)) else 'OTHERS'}")

    base_file = folder / "base-f32.gguf"
    with loaded(base_file, chosen.threads) as model:
        SAID.clear()
        # Not by lora_path: llama-cpp-python 0.3.36 does not notice there that llama.cpp refused a file.
        adapter = llama_cpp.llama_adapter_lora_init(model.model, str(folder / "adapter.gguf").encode())
        print(f"adapter.gguf: {'LOADED, without its magnitude' if adapter else 'refused: ' + SAID[-1].strip()}")
    with loaded(base_file, chosen.threads, folder / "adapter-lora.gguf") as model:
        found = logits(model, windows)
        compare("adapter-lora.gguf on base-f32.gguf, and transformers with it", found, with_lora)
        compare("adapter-lora.gguf on base-f32.gguf, and the merged model", found, wanted)


if __name__ == "__main__":
    main()

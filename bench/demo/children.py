"""The two measurements that need processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.demo.model import replace_folder
from bench.demo.phases import Phase
from bench.demo.settings import BOXES, LABELS, MAIN, Settings

LAST_POSITIONS = 16  # whose logits are handed to the fresh process


def ask(module: str, *arguments: str, seconds: float) -> dict[str, Any]:
    """The JSON answer of a module of this package, run in a fresh interpreter."""
    root = str(Path(__file__).parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-m", f"bench.demo.{module}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{module} failed: {lines[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def peak_memory(source: str, settings: Settings, phase: Phase) -> dict[str, int | None]:
    """Peak memory of each variant above the loaded model, None where its process gave none."""
    box = BOXES["memory"]
    peaks: dict[str, int | None] = {}
    for kind in MAIN:
        request = {
            "kind": kind,
            "source": source,
            "rank": settings.rank,
            "lr": settings.lr,
            "tokens": settings.lengths[-1],
            "seconds": box,
        }
        try:
            answer = ask("memory", json.dumps(request), seconds=BOXES["process"])
            peaks[kind] = answer["peak_bytes"]
            if answer["steps"] < 3:
                phase.note = f"{phase.name}: fewer steps than wanted, the time was over"
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            peaks[kind] = None
            phase.note = f"{phase.name}: none for {LABELS[kind]}: {error}"
        phase.advance()
    return peaks


def save_and_check(model: Any, source: str, window: torch.Tensor, folder: Path) -> dict[str, float]:
    """Save the adapter, then let a fresh process with stock PEFT alone load and merge it."""
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    model.save_pretrained(temporary)
    replace_folder(temporary, folder)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=window, use_cache=False).logits[:, -LAST_POSITIONS:]
    with tempfile.TemporaryDirectory() as place:
        reference = str(Path(place) / "reference.safetensors")
        save_file({"ids": window.cpu(), "logits": logits.cpu().contiguous()}, reference)
        return ask("check_saved", source, str(folder), reference, seconds=BOXES["process"])

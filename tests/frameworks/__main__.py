"""Run a framework's own training command with and without this package, and compare.

    python -m tests.frameworks CASE [--record FILE]

It runs in the framework's environment, where this package is not installed: the checkout is on PYTHONPATH. The losses
of all steps have to agree, every DoRA layer has to be called on this package, and the saved adapters have to have the
same tensors and configuration. `make test-frameworks` runs all cases, each in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.frameworks import inputs
from tests.frameworks.cases import CASES, STEPS, Case

ROOT = Path(__file__).parents[2]
BUDGET = 2e-5
"""Largest relative difference of a loss, in six steps of AdamW in float32."""


def run(command: list[str], out: Path, case: Case, folder: Path) -> dict:
    """Run a command and return its losses, the counted calls and what it printed."""
    beside = Path(sys.executable).parent
    paths = [*(Path(__file__).parent / part for part in ("count", *case.paths)), ROOT]
    environment = {
        **os.environ, **case.environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "1",
        "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONHASHSEED": "0", "DO_NOT_TRACK": "1",
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", "COUNTS": str(folder / f"{out.name}.counts"),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }  # fmt: skip
    program = shutil.which(command[0], path=environment["PATH"])
    result = subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    printed = result.stdout + result.stderr
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: status {result.returncode}\n{printed[-6000:]}")
    counts = {"fused": 0, "by modules": 0}
    if Path(environment["COUNTS"]).exists():
        for line in Path(environment["COUNTS"]).read_text().splitlines():
            counts = {name: counts[name] + number for name, number in json.loads(line).items()}
    return {"losses": losses(out, printed), **counts, "printed": printed}


def losses(out: Path, printed: str) -> list[float]:
    """The loss of each step."""
    states = sorted(out.rglob("trainer_state.json"))
    if states:
        history = json.loads(states[-1].read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    logs = sorted(out.rglob("log_*.txt"))  # torchtune's
    if logs:
        return [float(number) for number in re.findall(r"loss:(\S+)", logs[-1].read_text())]
    events = sorted(out.rglob("events.out.tfevents.*"))
    if events:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = [EventAccumulator(str(file)).Reload() for file in events]
        return [event.value for one in found if "loss" in one.Tags()["scalars"] for event in one.Scalars("loss")]
    return [float(number) for number in re.findall(r"^LOSS (\S+)$", printed, re.MULTILINE)]


def adapter(out: Path) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Shapes of the saved adapter's tensors, and its configuration."""
    from safetensors import safe_open

    names = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
    file = sorted(file for name in names for file in out.rglob(name))[-1]
    with safe_open(file, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    if not (file.parent / "adapter_config.json").exists():
        return shapes, {}
    config = json.loads((file.parent / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    return shapes, config


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--record", type=Path, help="JSON file to add the result to")
    given = parser.parse_args()
    case = CASES[given.case]
    sys.path[:0] = [str(Path(__file__).parent / part) for part in case.paths]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.write(folder)
        results = {}
        for kind in ("stock", "patched"):
            out = folder / kind
            command = case.command(folder, out)
            if kind == "patched":
                command = [*command, *case.ours] if case.ours else ["python", "-m", "dora_kernels.run", *command]
            results[kind] = run(command, out, case, folder)
        adapters = [adapter(folder / kind) for kind in results]
    stock, patched = results["stock"], results["patched"]
    found = stock["losses"], patched["losses"]
    assert [len(one) for one in found] == [STEPS, STEPS], f"{found}\n{stock['printed'][-3000:]}"
    off = max(abs(a - b) / abs(a) for a, b in zip(stock["losses"], patched["losses"]))
    said = [line for line in patched["printed"].splitlines() if line.startswith("dora_kernels:")]
    record = {
        "framework": case.framework,
        "command": case.started if case.ours else f"python -m dora_kernels.run {case.started}",
        "versions": {package: importlib.metadata.version(package) for package in case.packages},
        "python": ".".join(map(str, sys.version_info[:3])),
        "layers": case.layers, "fused": patched["fused"], "by modules": patched["by modules"],
        "losses": {kind: result["losses"] for kind, result in results.items()}, "off": off, "said": said,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    assert stock["fused"] == stock["by modules"] == 0
    assert off <= BUDGET, f"the losses differ by {off:.1e}"
    assert adapters[0] == adapters[1], "the adapters' files differ"
    layers = [int(number) for line in set(said) for number in re.findall(r"(\d+) DoRA layers of", line)]
    assert sum(layers) == case.layers, said
    warned = [line for line in said if "WARNING" in line and "nor was the model" not in line]
    assert not warned, warned  # diffusers' script loads what it has trained, and does not run it
    taken = "train and are never called" in patched["printed"]
    assert taken == (case.fused is not None), "the warning about layers that other kernels compute"
    calls = patched["fused"] + patched["by modules"]
    assert patched["fused"] == (calls if case.fused is None else case.fused) and calls, (patched["fused"], calls)
    if given.record is not None:
        known = json.loads(given.record.read_text()) if given.record.exists() else {}
        known[given.case] = record
        given.record.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`python -m dora_kernels.run`: a script that knows nothing of this package, alone and under the launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import dora_kernels

SCRIPT = """
import os, sys
import torch
from peft import LoraConfig, get_peft_model

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.first(x)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, use_dora=True, target_modules=["first"], lora_dropout=0.1))
    layer = model.base_model.model.first
    loss = model(torch.randn(3, 6)).sum()
    loss.backward()
    options = getattr(layer, "_dora_kernels", None)
    import helper
    line = [type(layer).__name__, options.options.dropout if options is not None else None, helper.NAME,
            os.path.basename(sys.argv[0]), *sys.argv[1:], os.environ.get("RANK", "-")]
    print("RESULT", *line, flush=True)
    if "--fail" in sys.argv:
        raise SystemExit(7)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("NAME = 'beside'\n")
    return tmp_path


def run(project, *command, code=0, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(Path(dora_kernels.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [str(part) for part in command]
    result = subprocess.run(
        command, cwd=cwd or project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return sorted(line for line in result.stdout.splitlines() if line.startswith("RESULT")), result.stderr


def test_without(project):
    assert run(project, sys.executable, "train.py")[0] == ["RESULT Linear None beside train.py -"]


@pytest.mark.parametrize("options", [[], ["--dropout", "lora", "--exact-init"]], ids=["", "options"])
def test_a_script(project, options, tmp_path):
    """From another folder: what is beside the script is found, and its arguments are its own."""
    command = [sys.executable, "-m", "dora_kernels.run", *options, project / "train.py", "-x", "1", "--dropout", "0"]
    lines, _ = run(project, *command, cwd="/")
    assert lines == [f"RESULT DoraLinear {'lora' if options else 'peft'} beside train.py -x 1 --dropout 0 -"]


def test_a_module(project):
    lines, _ = run(project, sys.executable, "-m", "dora_kernels.run", "-m", "train", "-x")
    assert lines == ["RESULT DoraLinear peft beside train.py -x -"]


def test_a_module_as_python_takes_it(project):
    lines, _ = run(project, sys.executable, "-m", "dora_kernels.run", "--exact-init", "-mtrain", "-m")
    assert lines == ["RESULT DoraLinear peft beside train.py -m -"]


def test_arguments_after_two_dashes(project):
    """They are the script's, the dashes too, as without the launcher."""
    lines, _ = run(project, sys.executable, "-m", "dora_kernels.run", "train.py", "--", "--x", "--", "-y")
    assert lines == ["RESULT DoraLinear peft beside train.py -- --x -- -y -"]


def test_where_the_script_is(project):
    """Python gives a script its absolute path."""
    (project / "where.py").write_text("import sys\nprint('RESULT', __file__, sys.path[0])\n")
    plain, _ = run(project, sys.executable, "where.py")
    assert run(project, sys.executable, "-m", "dora_kernels.run", "where.py")[0] == plain


def test_its_exit_status(project):
    run(project, sys.executable, "-m", "dora_kernels.run", "train.py", "--fail", code=7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: expected a SCRIPT, or -m and a MODULE"),
        (["--exact-init"], "error: expected a SCRIPT, or -m and a MODULE"),
        (["-m"], "error: expected a MODULE after -m"),
        (["--drop", "lora", "train.py"], "unrecognized arguments: --drop"),
        (["--lr", "train.py"], "unrecognized arguments: --lr"),
        (["nowhere.py"], "no file 'nowhere.py'; a module's name needs -m before it"),
        (["--dropout", "torchtune", "train.py"], "argument --dropout: invalid choice: 'torchtune'"),
    ],
)
def test_bad_arguments(project, arguments, message):
    _, errors = run(project, sys.executable, "-m", "dora_kernels.run", *arguments, code=2)
    assert message in errors and "Traceback" not in errors


def test_torchrun(project):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dora_kernels.run"]
    lines, _ = run(project, sys.executable, *command, "train.py", "a")
    assert lines == [f"RESULT DoraLinear peft beside train.py a {rank}" for rank in (0, 1)]


def test_accelerate_launch(project):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dora_kernels.run"]
    lines, _ = run(project, sys.executable, *command, "train.py", "a")
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["RESULT DoraLinear peft beside train.py a"]

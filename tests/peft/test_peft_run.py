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
from dora_kernels.run import main

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
    if "--bypass" in sys.argv:
        layer.forward = lambda x: x @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T
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


STARTUP = Path(dora_kernels.__file__).parent / "startup"


def run(project, *command, code=0, cwd=None, paths=(), **variables):
    path = os.pathsep.join(map(str, [*paths, STARTUP.parent.parent]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: expected a SCRIPT, a COMMAND, or -m and a MODULE"),
        (["--exact-init"], "error: expected a SCRIPT, a COMMAND, or -m and a MODULE"),
        (["-m"], "error: expected a MODULE after -m"),
        (["--drop", "lora", "train.py"], "unrecognized arguments: --drop"),
        (["--lr", "train.py"], "unrecognized arguments: --lr"),
        (["nowhere.py"], "no file and no command 'nowhere.py'; a module's name needs -m before it"),
        (["--dropout", "torchtune", "train.py"], "argument --dropout: invalid choice: 'torchtune'"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


OUTER = """
import os, subprocess, sys
assert "peft" not in sys.modules and "dora_kernels" not in sys.modules
print("RESULT outer", os.environ["HIDDEN"], flush=True)
sys.exit(subprocess.run([sys.executable, "train.py", *sys.argv[1:]]).returncode)
"""


def test_a_command_and_what_it_starts(project, tmp_path_factory):
    """A command's child process is patched and says so; the user's `sitecustomize` runs; nothing is left behind."""
    (project / "outer").write_text(f"#!{sys.executable}\n{OUTER}")
    (project / "outer").chmod(0o755)
    hidden, temporary = tmp_path_factory.mktemp("hidden"), tmp_path_factory.mktemp("temporary")
    (hidden / "sitecustomize.py").write_text("import os\nos.environ['HIDDEN'] = 'ran'\n")
    command = [sys.executable, "-m", "dora_kernels.run", "--dropout", "lora", "./outer", "--fail"]
    files = sorted(path for path in STARTUP.rglob("*") if "__pycache__" not in path.parts)
    lines, errors = run(project, *command, code=7, paths=[hidden], TMPDIR=str(temporary))
    assert lines == ["RESULT DoraLinear lora beside train.py --fail -", "RESULT outer ran"]
    assert errors.count("dora_kernels: patched 1 DoRA layers of Net, backend torch\n") == 1
    assert "WARNING" not in errors
    assert files == sorted(path for path in STARTUP.rglob("*") if "__pycache__" not in path.parts)
    assert not list(temporary.iterdir())


def test_layers_that_are_never_called(project):
    _, errors = run(project, sys.executable, "-m", "dora_kernels.run", "train.py", "--bypass")
    assert "dora_kernels: WARNING: none of the 1 patched DoRA layers of Net was ever called: other code" in errors


def test_peft_that_cannot_be_imported(project):
    """The script's own import fails, with its own cause."""
    (project / "peft.py").write_text("import nowhere")
    _, errors = run(project, sys.executable, "-m", "dora_kernels.run", "train.py", code=1)
    assert errors.endswith("ModuleNotFoundError: No module named 'nowhere'\n")


def test_torchrun(project):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dora_kernels.run"]
    lines, _ = run(project, sys.executable, *command, "train.py", "a")
    assert lines == [f"RESULT DoraLinear peft beside train.py a {rank}" for rank in (0, 1)]


def test_accelerate_launch(project):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dora_kernels.run"]
    lines, _ = run(project, sys.executable, *command, "train.py", "a")
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["RESULT DoraLinear peft beside train.py a"]


def test_a_module_that_is_not_there(capsys, monkeypatch):
    for name in ("nomodule", "nomodule.train"):
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            main(["-m", name])
        assert stop.value.code == 2 and f"no module named '{name}'" in capsys.readouterr().err

"""The command line: what it prints, its exit statuses, and that every figure in its tables can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dora_kernels
from dora_kernels import cli, dora_linear, testing
from dora_kernels.cli import cases, doctor, parity
from dora_kernels.cli.cases import Case
from dora_kernels.engine import dispatch, formula, norm_cache

f64 = torch.float64
CPU = torch.device("cpu")
SMALL = ["--shape", "9,20,24", "--rank", "3", "--device", "cpu", "--backend", "torch"]
QUANTITIES = ["y", "dX", "dA", "dB", "dm", "db", "norm"]


@pytest.fixture(autouse=True)
def one_thread():
    """These layers are so small that several threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def invoke():
    """Run a command through typer's own runner: (exit status, what it printed)."""
    runner = pytest.importorskip("typer.testing")

    def run(*arguments):
        result = runner.CliRunner().invoke(cli.build_app(), list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def call(capsys):
    """Run `main`, as the console script does: (exit status, stdout, stderr)."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")

    def run(*arguments):
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    return run


def strict_json(text):
    """As JSON has it: Python's own NaN and Infinity are refused."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def break_layer(monkeypatch, quantity, change=lambda t: t.mul_(1.2)):
    """Make one result of the layer wrong on the CPU, and nothing else."""
    right = formula.linear
    if quantity == "norm":
        right_norm = cases.dora_weight_norm
        monkeypatch.setattr(cases, "dora_weight_norm", lambda *args, **kw: change(right_norm(*args, **kw)))
    elif quantity == "y":

        def off(*args):
            y = right(*args)
            return y + (change(y.detach().clone()) - y.detach())

        monkeypatch.setattr(formula, "linear", off)
    else:
        name = {short: name for name, short in cases._GRADIENTS.items()}[quantity]

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor):
                return tensor.view_as(tensor)

            @staticmethod
            def backward(ctx, grad):
                return change(grad.clone())

        def wrong(x, weights, g, *args):
            if name == "x":
                x = Wrong.apply(x)
            elif name == "magnitude":
                g = Wrong.apply(g)
            else:
                weights = weights._replace(**{name: Wrong.apply(getattr(weights, name))})
            return right(x, weights, g, *args)

        monkeypatch.setattr(formula, "linear", wrong)


# parity: the numbers


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_errors_are_those_of_the_layer(dtype, axis):
    """Computed once more, with the formula written out in float64."""
    yardstick = cases.prepare(Case((9, 20, 24), 3, dtype, axis), CPU, seed=5)
    cells = {cell.quantity: cell for cell in cases.measure(yardstick, "torch")}
    leaves = {name: t.to(f64).requires_grad_() for name, t in yardstick.problem.tensors.items()}
    x, weight, lora_A, lora_B, magnitude, bias = leaves.values()
    assert lora_B.any() and yardstick.problem.tensors["lora_A"].dtype == cases.DTYPES[dtype][1]
    direction = weight + 0.7 * lora_B @ lora_A
    norm = direction.detach().norm(dim=1 if axis == "out" else 0)
    g = magnitude / norm
    assert (g.detach() - 1).abs().max() > 0.3, "the magnitudes have not moved"
    y = (x @ direction.T * g if axis == "out" else (x * g) @ direction.T) + bias
    grads = torch.autograd.grad(y, [x, lora_A, lora_B, magnitude, bias], yardstick.problem.dy.to(f64))
    exact = dict(zip(QUANTITIES, [y.detach(), *grads, norm]))

    leaves = {name: t.detach().requires_grad_() for name, t in yardstick.problem.tensors.items()}
    y = dora_linear(**leaves, scaling=0.7, magnitude_axis=axis, backend="torch")
    wanted = [leaves[name] for name in ("x", "lora_A", "lora_B", "magnitude", "bias")]
    grads = torch.autograd.grad(y, wanted, yardstick.problem.dy)
    for name, result in zip(QUANTITIES, [y.detach(), *grads]):
        error = ((result.to(f64) - exact[name]).norm() / exact[name].norm()).item()
        assert cells[name].error == pytest.approx(error, rel=1e-6)
        assert 2 * cells[name].peft <= cells[name].budget < 8 * torch.finfo(yardstick.problem.dy.dtype).eps
        assert cells[name].ok
    assert cells["norm"].ok and cells["norm"].error < 1e-6


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_pefts_formula_is_pefts(dtype):
    """The same numbers as PEFT's own layer, up to a tenth of what that is off by."""
    peft = pytest.importorskip("peft")
    case = Case((9, 20, 24), 3, dtype, "out")
    yardstick = cases.prepare(case, CPU, weight_gradient=True)
    tensors = yardstick.problem.tensors
    model = torch.nn.Sequential(torch.nn.Linear(24, 20))
    config = peft.LoraConfig(r=3, lora_alpha=0.7 * 3, use_dora=True, target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    parameters = {
        "weight": layer.base_layer.weight,
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
        "bias": layer.base_layer.bias,
    }
    for name, parameter in parameters.items():
        parameter.data = tensors[name].clone()
        parameter.requires_grad_()
    leaves = {"x": tensors["x"].clone().requires_grad_(), **parameters}
    y = layer(leaves["x"])
    grads = torch.autograd.grad(y, [leaves[name] for name in yardstick.gradients], yardstick.problem.dy)
    theirs = {"y": y.detach(), **dict(zip(yardstick.gradients, grads))}
    formula = testing.solve(cases.peft_formula, yardstick.problem, yardstick.gradients)
    assert set(formula) == set(theirs)
    for name, result in formula.items():
        assert result.dtype == theirs[name].dtype
        short = cases._GRADIENTS.get(name, name)
        apart = (result.to(f64) - theirs[name].to(f64)).norm() / yardstick.exact[short].norm()
        assert apart <= 0.1 * yardstick.peft[short]


@pytest.mark.parametrize("quantity", [*QUANTITIES, "dW"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_every_cell_can_fail(monkeypatch, quantity, dtype, axis):
    """A result that is wrong by a few times its budget fails, and no other does."""
    yardstick = cases.prepare(Case((9, 20, 24), 3, dtype, axis), CPU, weight_gradient=True)
    assert all(cell.ok for cell in cases.measure(yardstick, "torch"))
    step = 3 * yardstick.budget[quantity]
    break_layer(monkeypatch, quantity, lambda t: t.mul_(1 + step))
    cells = cases.measure(yardstick, "torch")
    assert [cell.quantity for cell in cells if not cell.ok] == [quantity]
    error = next(cell.error for cell in cells if cell.quantity == quantity)
    assert error == pytest.approx(step, rel=0.5)


def test_a_formula_that_overflows_grants_nothing(monkeypatch):
    case = Case((9, 20, 24), 3, "float16", "out")
    fair = cases.prepare(case, CPU).budget["y"]
    right = cases.peft_formula
    for bad in (torch.nan, torch.inf):
        monkeypatch.setattr(cases, "peft_formula", lambda *args, bad=bad, **kw: right(*args, **kw) * bad)
        assert 0 < cases.prepare(case, CPU).budget["y"] <= fair


def test_threads_are_given_back(monkeypatch):
    monkeypatch.setattr(parity, "measure", lambda *args: pytest.fail("stopped"))
    torch.set_num_threads(2)
    with pytest.raises(pytest.fail.Exception):
        parity.run(parity.settings(["9,20,24"], device="cpu"))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_backend_that_runs_is_within_its_budget(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = parity.settings(["17,18,40"], ranks=[5], device=device, weight_gradient=True)
    assert ("triton" in options.backends) == (dispatch.triton_problem(torch.device(device)) is None)
    cells = parity.run(options)
    assert len(cells) == 2 * 4 * 8 * len(options.backends)
    assert not [str(cell) for cell in cells if not cell.ok]


# parity: the command


def test_parity_table(invoke):
    status, output = invoke("parity", *SMALL)
    assert status == 0, output
    assert "torch on cpu: 9 tokens, 24 to 20 features, rank 3" in output
    header = next(line for line in output.splitlines() if line.lstrip().startswith("dtype"))
    assert header.split() == ["dtype", *QUANTITIES]
    for dtype, axis in [(dtype, axis) for dtype in cases.DTYPES for axis in ("out", "in")]:
        rows = [line.split() for line in output.splitlines()]
        ours = [at for at, row in enumerate(rows) if row[:2] == [dtype, "ours"]][axis == "in"]
        assert rows[ours + 1][:3] == ["axis", axis, "PEFT"] and rows[ours + 2][0] == "budget"
        figures = [list(map(float, row[-7:])) for row in rows[ours : ours + 3]]
        assert all(error <= budget for error, budget in zip(figures[0], figures[2]))
    assert " ".join(parity.RULE.split()) in " ".join(output.split()), "the rule is not printed"
    assert "All 56 errors are within their budgets" in output


def test_parity_json_has_every_cell_once(call):
    status, stdout, stderr = call(
        "parity", "--shape", "3,4,5", "--shape", "6,7,8", "--shape", "3,4,5", "--rank", "1", "--rank", "2",
        "--dtype", "float32", "--dtype", "mixed", "--axis", "in", "--backend", "torch", "--backend", "auto",
        "--device", "cpu", "--seed", "3", "--weight", "--json",
    )  # fmt: skip
    report = strict_json(stdout)
    assert report["rule"] == parity.RULE and report["seed"] == 3 and report["backends"] == ["torch", "auto"]
    keys = [
        (*cell["shape"], cell["rank"], cell["dtype"], cell["axis"], cell["backend"], cell["quantity"])
        for cell in report["cells"]
    ]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 1 * 2 * 8
    assert {key[-1] for key in keys} == {*QUANTITIES, "dW"}
    assert all(cell["ok"] == (cell["error"] <= cell["budget"]) for cell in report["cells"])
    assert report["ok"] == all(cell["ok"] for cell in report["cells"])
    assert (status, stderr != "") == ((0, False) if report["ok"] else (1, True))


def test_seeds_differ_and_repeat(call):
    def errors(seed):
        status, stdout, _ = call("parity", *SMALL, "--dtype", "float32", "--json", "--seed", seed)
        assert status == 0
        return [cell["error"] for cell in strict_json(stdout)["cells"]]

    assert errors("1") == errors("1") != errors("2")


def test_an_exceeded_budget(monkeypatch, invoke, call):
    break_layer(monkeypatch, "y", lambda t: t.mul_(1 + 1e-5))
    arguments = ["parity", *SMALL, "--dtype", "float32", "--dtype", "bfloat16"]
    status, output = invoke(*arguments)
    assert status == 1
    assert "2 of 28 results exceed their budget" in output and "within their budgets" not in output
    status, stdout, stderr = call(*arguments, "--json")
    assert status == 1
    report = strict_json(stdout)
    failed = [cell for cell in report["cells"] if not cell["ok"]]
    assert not report["ok"] and [(cell["quantity"], cell["dtype"]) for cell in failed] == [("y", "float32")] * 2
    lines = stderr.splitlines()
    assert len(lines) == 2
    cell = "y, 9,20,24 rank 3 float32 axis out, backend torch"
    assert lines[0].startswith(f"OVER BUDGET: {cell}: off by 1.0e-05, budget ")


def test_a_result_of_nan_exceeds_it(monkeypatch, call):
    break_layer(monkeypatch, "dA", lambda t: t.fill_(torch.nan))
    status, stdout, stderr = call("parity", *SMALL, "--dtype", "mixed", "--axis", "out", "--json")
    assert status == 1 and "dA, 9,20,24 rank 3 mixed axis out" in stderr
    failed = [cell for cell in strict_json(stdout)["cells"] if not cell["ok"]]
    assert [(cell["quantity"], cell["error"]) for cell in failed] == [("dA", None)]


def test_a_call_that_raises_is_a_failure_of_its_own(monkeypatch, call):
    def out_of_order(*args):
        raise RuntimeError("no [room] left\nsecond line")

    monkeypatch.setattr(formula, "linear", out_of_order)
    arguments = ["parity", *SMALL, "--dtype", "float32", "--axis", "out"]
    status, stdout, stderr = call(*arguments)
    assert status == 1 and "failed" in stdout
    wanted = "FAILED: call, 9,20,24 rank 3 float32 axis out, backend torch: RuntimeError: no [room] left"
    assert stderr.splitlines() == [wanted]
    status, stdout, _ = call(*arguments, "--json")
    (cell,) = strict_json(stdout)["cells"]
    assert status == 1 and cell["note"] == "RuntimeError: no [room] left" and cell["error"] is None and not cell["ok"]


def test_a_backend_that_is_not_available(monkeypatch, call):
    monkeypatch.setattr(parity, "triton_problem", lambda device: "the [moon] is full")
    arguments = ["parity", "--shape", "3,4,5", "--dtype", "bfloat16", "--axis", "out", "--device", "cpu"]
    status, stdout, stderr = call(*arguments)
    assert (status, stderr) == (0, "") and "triton was not run: the [moon] is full" in stdout
    status, stdout, _ = call(*arguments, "--json")
    assert status == 0 and strict_json(stdout)["not_run"] == {"triton": "the [moon] is full"}
    status, stdout, stderr = call(*arguments, "--backend", "torch", "--backend", "triton")
    assert (status, stdout) == (2, "")
    assert stderr == "error: --backend: triton is not available on cpu: the [moon] is full\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "half"], ["--dtype", "float32, bfloat16, float16, mixed", "'half'"]),
        (["--backend", "fast"], ["--backend", "auto, torch, triton", "'fast'"]),
        (["--axis", "row"], ["--axis", "out, in", "'row'"]),
        (["--rank", "0"], ["--rank: expected a whole number of at least 1, got '0'"]),
        (["--rank", "2", "--rank", "many"], ["--rank: expected a whole number of at least 1, got 'many'"]),
        (["--shape", "1,2"], ["--shape", "tokens,out_features,in_features", "'1,2'"]),
        (["--shape", "1,2,3,4"], ["--shape", "'1,2,3,4'"]),
        (["--shape", "a,b,c"], ["--shape", "'a,b,c'"]),
        (["--shape", "0,4,4"], ["--shape", "at least 1", "'0,4,4'"]),
        (["--shape", "999999,999999,999999"], ["--shape", "999999,999999,999999", "failed on cpu"]),
        (["--device", "quux"], ["--device", "'quux'", "not available"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'", "not available"]),
        (["--device", "meta"], ["--device", "'meta'", "not available"]),
        (["--seed", "-1"], [f"--seed: expected a whole number from 0 to {2**62}, got '-1'"]),
        (["--seed", "1.5"], [f"--seed: expected a whole number from 0 to {2**62}, got '1.5'"]),
        (["--colour"], ["--colour"]),
        (["surplus"], ["surplus"]),
    ],
    ids=" ".join,
)
def test_bad_input(call, arguments, words):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    status, stdout, stderr = call("parity", *device, *arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "Traceback" not in stderr
    for word in words:
        assert word.lower() in stderr.lower()


def test_bad_input_in_typers_own_runner(invoke):
    status, output = invoke("parity", "--rank", "-3")
    assert status == 2 and "--rank: expected a whole number of at least 1, got '-3'" in output
    with pytest.raises(ValueError, match="--axis"):
        parity.settings(axes=["both"])


# doctor


def test_doctor(monkeypatch, invoke):
    monkeypatch.delenv("CC", raising=False)
    status, output = invoke("doctor")
    assert status == 0, output
    lines = {line[:19].strip(): line[19:].strip() for line in output.splitlines()}
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert lines["auto takes"] and output.count("check") == len(doctor._devices())
    assert "torch: auto uses triton on GPUs only" in output
    assert lines["triton interpreter"].startswith("on" if doctor._interpreted() else "off")
    assert lines["norm reuse"] == "on"


def test_doctor_json(call):
    status, stdout, stderr = call("doctor", "--json")
    report = strict_json(stdout)
    assert (status, stderr, report["ok"]) == (0, "", True)
    for name in ("dora-kernels", "python", "torch", "triton", "peft", "transformers"):
        assert name in report["versions"]
    assert report["devices"][0]["device"] == "cpu"
    for device in report["devices"]:
        assert device["works"] and device["check"] == "works"
        where = torch.device(device["device"])
        assert device["auto"] == dispatch.norm_backend("auto", torch.empty(1, device=where))


def test_doctor_without_a_compiler_or_reuse(monkeypatch, call, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(norm_cache, "_enabled", False)
    monkeypatch.setattr(doctor, "_devices", lambda: [])
    status, stdout, _ = call("doctor")
    assert status == 0 and "C compiler" in stdout and "not found" in stdout
    assert "off" in next(line for line in stdout.splitlines() if line.startswith("norm reuse"))
    compiler = tmp_path / "clang"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert strict_json(call("doctor", "--json")[1])["c_compiler"] == str(compiler)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert strict_json(call("doctor", "--json")[1])["c_compiler"] is None


@pytest.mark.parametrize("quantity", ["y", "dX", "dB", "dm"])
def test_doctor_finds_wrong_numbers(monkeypatch, call, quantity):
    monkeypatch.setattr(doctor, "_devices", lambda: [CPU])
    break_layer(monkeypatch, quantity)
    status, stdout, _ = call("doctor")
    assert status == 1 and "FAILS" in stdout
    status, stdout, _ = call("doctor", "--json")
    report = strict_json(stdout)
    assert status == 1 and not report["ok"] and not report["devices"][0]["works"]
    for dtype in ("float32", "bfloat16", "mixed"):
        assert f"{quantity}, 9,40,24 rank 4 {dtype} axis out, backend torch: off by" in report["devices"][0]["check"]


def test_doctor_names_what_auto_cannot_do(monkeypatch, call):
    def broken(*args):
        raise RuntimeError("ld: cannot find -lcuda")

    monkeypatch.setattr(doctor, "_devices", lambda: [CPU])
    with monkeypatch.context() as patch:
        patch.setattr(formula, "linear", broken)
        status, stdout, _ = call("doctor")
        assert status == 1 and "FAILS" in stdout and "RuntimeError: ld: cannot find -lcuda" in stdout
    monkeypatch.setattr(doctor, "norm_backend", broken)
    status, stdout, _ = call("doctor")
    assert status == 1 and "nothing: ld: cannot find -lcuda" in stdout


def test_doctor_repeats_what_torch_warns_of(monkeypatch, call):
    def devices():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver is too old", stacklevel=1)
        warnings.warn("somebody's deprecation", DeprecationWarning, stacklevel=1)
        return []

    monkeypatch.setattr(doctor, "_devices", devices)
    _, stdout, stderr = call("doctor")
    assert "warning" in stdout and "The NVIDIA driver is too old" in stdout and "deprecation" not in stdout + stderr


@pytest.mark.gpu
def test_doctor_on_a_gpu(call):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    status, stdout, _ = call("doctor", "--json")
    report = strict_json(stdout)
    assert status == 0
    gpus = [device for device in report["devices"] if device["device"].startswith("cuda")]
    assert len(gpus) == torch.cuda.device_count()
    for device in gpus:
        assert device["auto"] == ("triton" if device["triton"] == "available" else "torch")


# the program


def test_top_level(call):
    status, stdout, _ = call()
    assert status == 2 and "doctor" in stdout and "parity" in stdout
    assert call("--help")[0] == 0
    assert call("--version")[:2] == (0, f"dora-kernels {dora_kernels.__version__}\n")
    status, stdout, stderr = call("surgery")
    assert (status, stdout) == (2, "") and "surgery" in stderr and stderr.count("\n") == 1


def python(*arguments):
    root = str(Path(dora_kernels.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_as_a_module():
    pytest.importorskip("typer")
    done = python("-m", "dora_kernels", "parity", *SMALL, "--dtype", "float32", "--axis", "out", "--json")
    assert done.returncode == 0, done.stderr
    report = strict_json(done.stdout)
    assert report["ok"] and len(report["cells"]) == 7 and done.stderr == ""


def test_without_the_extra():
    """One line and status 2; the computation itself needs neither typer nor rich."""
    program = """
import sys
from dora_kernels import cli
from dora_kernels.cli import parity
assert not {"typer", "rich", "triton"} & set(sys.modules), "imported before it is needed"
sys.modules["rich"] = None
first = cli.main(["doctor"])
sys.modules["typer"] = None
cells = parity.run(parity.settings(["3,4,5"], ["float32"], [2], ["out"], ["torch"], "cpu"))
assert len(cells) == 7 and all(cell.ok for cell in cells)
assert (first, cli.main(["parity"])) == (2, 2)
del sys.modules["rich"]
sys.exit(cli.main(["doctor"]))
"""
    done = python("-c", program)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    line = "dora-kernels: the command line needs {}: pip install 'dora-kernels[cli]'"
    assert done.stderr.splitlines() == [line.format(name) for name in ("rich", "rich", "typer")]
